"""Train GGCN and the networks it is compared with: accuracy against homophily, against depth, and with parts left out.

The default run sweeps a generated family of graphs over homophily and needs no files. The presets named after a graph
run the paper's table on it (ten fixed splits), cora-depth its depth study, ablation its ablation; these need --data.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.errors import UserError, user_errors

NETWORKS = ("ggcn", "mlp", "gcn", "gat", "gcnii", "pairnorm", "gprgnn")
PARTS = {
    "none": {"use_degree": False, "use_sign": False},
    "degree": {"use_degree": True, "use_sign": False},
    "sign": {"use_degree": False, "use_sign": True},
    "both": {"use_degree": True, "use_sign": True},
    "absolute": {"use_degree": False, "use_sign": True, "absolute": True},
}
"""Ablation: which parts GGCN has. ``absolute`` is ``sign`` with messages that have lost their sign."""
TWO = "two_classes"
"""Generated graph of the paper's theory: two classes, weak features, the lowest homophily."""
DEPTHS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of one network on one graph; ``options`` are the network's own keyword arguments."""

    layers: int
    hidden: int
    weight_decay: float
    dropout: float = 0.5
    lr: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)


# The official scripts table_1_*.sh, one row a graph. ``generated`` follows the rows of Texas and Cora.
_GGCN = {  # layers, hidden, weight decay, dropout, decay rate
    "texas": (2, 16, 1e-3, 0.4, 1.0),
    "wisconsin": (5, 16, 6e-4, 0.0, 1.0),
    "cornell": (6, 16, 1e-3, 0.5, 0.7),
    "actor": (4, 32, 7e-3, 0.0, 1.2),
    "squirrel": (2, 32, 4e-3, 0.5, 1.0),
    "chameleon": (5, 32, 1e-2, 0.3, 0.8),
    "citeseer": (10, 80, 1e-7, 0.5, 0.02),
    "cora": (32, 16, 1e-3, 0.5, 0.9),
    "pubmed": (5, 32, 1e-5, 0.3, 1.1),
    "generated": (2, 16, 1e-3, 0.5, 1.0),
}
_MLP = {  # hidden, weight decay, dropout
    "squirrel": (16, 1e-4, 0.6),
    "chameleon": (16, 1e-8, 0.5),
    "citeseer": (64, 1e-7, 0.5),
    "actor": (16, 1e-3, 0.0),
    "pubmed": (64, 1e-6, 0.3),
}
_GCNII = {  # layers, hidden, weight decay, dropout, lamda, alpha
    "cora": (64, 64, 1e-4, 0.5, 0.5, 0.2),
    "citeseer": (64, 64, 5e-6, 0.5, 0.5, 0.5),
    "pubmed": (64, 64, 5e-6, 0.5, 0.5, 0.1),
    "chameleon": (4, 64, 5e-4, 0.5, 1.5, 0.2),
    "cornell": (16, 64, 1e-3, 0.5, 1.0, 0.5),
    "texas": (32, 64, 1e-4, 0.5, 1.5, 0.5),
    "wisconsin": (16, 64, 5e-4, 0.5, 1.0, 0.5),
    "squirrel": (2, 16, 1e-3, 0.6, 0.5, 0.5),
    "actor": (2, 16, 1e-3, 0.0, 0.5, 0.5),
    "generated": (16, 64, 1e-4, 0.5, 0.5, 0.2),
}
_GPRGNN = {  # learning rate, weight decay, dropout of the propagated, alpha
    "cora": (0.002, 5e-4, 0.5, 0.1),
    "citeseer": (0.002, 5e-4, 0.5, 0.1),
    "pubmed": (0.05, 5e-4, 0.5, 0.2),
    "chameleon": (0.05, 0.0, 0.7, 1.0),
    "cornell": (0.05, 5e-4, 0.5, 0.9),
    "texas": (0.05, 5e-4, 0.5, 1.0),
    "wisconsin": (0.05, 5e-4, 0.5, 1.0),
    "squirrel": (0.05, 0.0, 0.7, 0.0),
    "actor": (0.01, 0.0, 0.5, 0.9),
    "generated": (0.01, 5e-4, 0.5, 0.1),
}
_ABLATION = {  # table_B1.sh: hidden, weight decay, dropout, initial lambda0, initial alpha; two layers, no decay
    "chameleon": (32, 6e-4, 0.7, 1.3, 0.2),
    "cora": (64, 1e-3, 0.5, 0.4, 0.7),
    "cornell": (8, 6e-4, 0.5, 0.8, 0.2),
    "citeseer": (80, 1e-7, 0.5, 0.2, 1.0),
}
GRAPHS = (*sorted(set(_GGCN) - {"generated"}), "cornell_fixed", "generated")


@dataclass(frozen=True)
class Config:
    """What to run. GGCN's own fields that are None take the paper's value for the graph."""

    study: Literal["homophily", "table", "depth", "ablation"] = "table"
    """homophily: the generated family; table: all networks; depth: each at every depth; ablation: parts of GGCN."""
    graphs: tuple[str, ...] = ("texas",)
    """Graphs to run on (the homophily study generates its own)."""
    networks: tuple[str, ...] = NETWORKS
    """Networks to train in the table and depth studies."""
    splits: int = 10
    """How many of the ten fixed splits."""
    epochs: int = 1500
    """At most this many epochs."""
    patience: int = 100
    """Stop after this many epochs without a lower validation loss."""
    depths: tuple[int, ...] = DEPTHS
    """Depths of the depth study, and those among which PairNorm and GPRGNN choose by validation in the table."""
    pairnorm_depth: int = 8
    """The deepest PairNorm that the table tries; on larger graphs the deeper ones would cost most of the time."""
    selection_splits: int = 10
    """GCNII's variant and the depths of PairNorm and GPRGNN are chosen by validation on the first so many splits; only
    what is chosen is trained on the others."""
    layers: int | None = None
    """GGCN: layers."""
    hidden: int | None = None
    """GGCN: hidden units."""
    lr: float | None = None
    """GGCN: learning rate of Adam."""
    weight_decay: float | None = None
    """GGCN: weight decay on all parameters."""
    dropout: float | None = None
    """GGCN: dropout."""
    decay_rate: float | None = None
    """GGCN: eta of the decaying aggregation."""
    exponent: float = 3.0
    """GGCN: exponent k of the decaying aggregation."""
    use_degree: bool = True
    """GGCN: degree correction."""
    use_sign: bool = True
    """GGCN: signed messages."""
    use_decay: bool = True
    """GGCN: decaying aggregation."""
    use_sparse: bool = True
    """GGCN: edge form; the other form is N x N."""
    use_bn: bool = False
    """GGCN: batch normalisation (without decay only)."""
    use_ln: bool = False
    """GGCN: layer normalisation (without decay only)."""
    scale_init: float | None = None
    """GGCN without decay: initial scale (0.5 unless the ablation sets it)."""
    deg_intercept_init: float | None = None
    """GGCN without decay: initial slope of the degree correction (0.5 unless the ablation sets it)."""
    normalization: Literal["symmetric", "row"] = "symmetric"
    """D^-1/2 (A + I) D^-1/2, or D^-1 (A + I), which has no degree correction."""
    degree_groups: int = 5
    """Degree groups of the node-level analysis of GCN."""
    homophily: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6, 0.8)
    """Generated family: homophily levels, rising; the first and the last are also run deep."""
    nodes: int = 1000
    """Generated family: nodes of a graph."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        for name, known in (("graphs", GRAPHS), ("networks", NETWORKS)):
            chosen = getattr(self, name)
            unknown = [value for value in chosen if value not in known]
            if unknown or not chosen or len(set(chosen)) != len(chosen):
                raise ValueError(f"--{name} {' '.join(chosen)}: expected different ones among {', '.join(known)}")
        for name, low, high in (
            ("splits", 1, 10),
            ("epochs", 1, None),
            ("patience", 1, None),
            ("degree_groups", 1, None),
            ("selection_splits", 1, 10),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                raise ValueError(
                    f"--{name} is {value}, expected at least {low}" + (f", at most {high}" if high else "")
                )
        for name, low in (("layers", 2), ("hidden", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} is {value}: a GGCN needs at least {low}")
        if not self.depths or min(self.depths) < 2 or len(set(self.depths)) != len(self.depths):
            raise ValueError(f"--depths {self.depths}: expected different numbers of at least 2")
        if self.pairnorm_depth < min(self.depths):
            raise ValueError(f"--pairnorm-depth is {self.pairnorm_depth}, expected at least {min(self.depths)}")
        if self.decay_rate is not None and self.decay_rate <= 0:
            raise ValueError(f"--decay-rate is {self.decay_rate}, expected > 0")
        if self.exponent < 0:
            raise ValueError(f"--exponent is {self.exponent}, expected >= 0")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}, expected 0 <= dropout < 1")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"--lr is {self.lr}, expected > 0")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"--weight-decay is {self.weight_decay}, expected >= 0")
        if (self.use_bn or self.use_ln) and self.use_decay and self.study != "ablation":
            raise ValueError("--use-bn and --use-ln work only with --no-use-decay")
        if self.use_bn and self.use_ln:
            raise ValueError("--use-bn and --use-ln exclude each other")
        if self.normalization == "row" and self.use_degree:
            raise ValueError("--normalization row has no degree correction: add --no-use-degree")
        if self.study == "ablation" and self.normalization == "row":
            raise ValueError("--normalization row has no degree correction, which the ablation varies")
        levels = list(self.homophily)
        if len(levels) < 2 or levels != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] <= 1:
            raise ValueError(f"--homophily {self.homophily}: expected at least two rising levels between 0 and 1")
        if self.nodes < 50:
            raise ValueError(f"--nodes is {self.nodes}, expected at least 50")


def setting(config: Config, graph: str, network: str, layers: int | None = None) -> Setting:
    """The paper's hyper-parameters of a network on a graph, with what the command line says of GGCN.

    Args:
        layers: replaces the depth (depth study; PairNorm and GPRGNN have no depth of their own).
    """
    graph = graph.removesuffix("_fixed")
    homophilous = graph in ("cora", "citeseer")
    if network == "ggcn":
        depth, hidden, decay, dropout, rate = _GGCN[graph]
        made = Setting(depth, hidden, decay, dropout, options={"decay_rate": rate})
    elif network == "mlp":
        hidden, decay, dropout = _MLP.get(graph, (16, 1e-4, 0.5))
        made = Setting(2, hidden, decay, dropout)
    elif network == "gcn":
        made = Setting(2, 16, 5e-4 if homophilous else 5e-5)
    elif network == "gat":
        edge_form = graph in ("actor", "squirrel", "pubmed")  # the scripts use the other attention there
        decay = 5e-4 if homophilous else 5e-5
        made = Setting(2, 8, decay, 0.6, 0.005, {"heads": 8, "negative": edge_form})
    elif network == "gcnii":
        depth, hidden, decay, dropout, lamda, alpha = _GCNII[graph]
        made = Setting(depth, hidden, decay, dropout, options={"lamda": lamda, "alpha": alpha})
    elif network == "pairnorm":
        made = Setting(2, 64, 5e-4, 0.6, 0.005)
    else:
        lr, decay, dprate, alpha = _GPRGNN[graph]
        made = Setting(2, 64, decay, 0.5, lr, {"dprate": dprate, "alpha": alpha})
    if layers is not None:
        made = replace(made, layers=layers)
    return with_flags(config, made) if network == "ggcn" else made


def with_flags(config: Config, made: Setting) -> Setting:
    """A GGCN setting with what the command line says of it; what stands in the setting's options is kept otherwise."""
    sizes = {
        "layers": config.layers,
        "hidden": config.hidden,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "dropout": config.dropout,
    }
    options = {
        "decay_rate": config.decay_rate,
        "scale_init": config.scale_init,
        "deg_intercept_init": config.deg_intercept_init,
    }
    switches = {
        "exponent": config.exponent,
        "use_degree": config.use_degree,
        "use_sign": config.use_sign,
        "use_decay": config.use_decay,
        "use_sparse": config.use_sparse,
        "use_bn": config.use_bn,
        "use_ln": config.use_ln,
    }
    given = {name: value for name, value in options.items() if value is not None}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    return replace(made, **sizes, options=switches | made.options | given)


@dataclass(frozen=True)
class Job:
    """One network to train on every split of one graph.

    Metrics are called ``<graph>/<arm>/test_accuracy``. Jobs with an ``option`` are candidates of one arm: the arm's
    number is that of the candidate with the best mean validation accuracy on the first ``selection_splits`` splits.
    """

    graph: str
    arm: str
    network: str
    setting: Setting
    option: str = ""


def jobs(config: Config) -> Iterator[Job]:
    """Everything that a configuration trains for one seed, in order."""
    if config.study == "homophily":
        for level in config.homophily:
            for network in ("mlp", "gcn", "ggcn"):
                yield Job(f"h={level}", network, network, setting(config, "generated", network))
            for part in ("none", "degree", "sign"):
                yield _part(config, f"h={level}", "generated", part)
        for level in sorted({config.homophily[0], config.homophily[-1]}):
            for network in ("gcn", "ggcn"):
                for depth in config.depths:
                    made = setting(replace(config, layers=None), "generated", network, depth)
                    yield Job(f"h={level}", f"{network}/layers={depth}", network, made)
        yield Job(TWO, "mlp", "mlp", setting(config, "generated", "mlp"))
        for part in ("sign", "absolute"):
            yield _part(config, TWO, "generated", part)
        return
    for graph in config.graphs:
        if config.study == "table":
            for network in config.networks:
                yield from _candidates(config, graph, network)
        elif config.study == "depth":
            for network in config.networks:
                for depth in config.depths if network != "mlp" else ():
                    yield from _candidates(replace(config, layers=None), graph, network, depth)
        else:
            for part in PARTS:
                yield _part(config, graph, graph, part)


def _candidates(config: Config, graph: str, network: str, depth: int | None = None) -> Iterator[Job]:
    """The jobs behind one number of the tables: GCNII has two variants, PairNorm and GPRGNN search their depth."""
    arm = network if depth is None else f"{network}/layers={depth}"
    made = setting(config, graph, network, depth)
    if network == "gcnii":
        for name, variant in (("plain", False), ("star", True)):
            yield Job(graph, arm, network, replace(made, options={**made.options, "variant": variant}), name)
    elif network in ("pairnorm", "gprgnn") and depth is None:
        for layers in config.depths:
            if network == "gprgnn" or layers <= config.pairnorm_depth:
                yield Job(graph, arm, network, replace(made, layers=layers), f"layers={layers}")
    else:
        yield Job(graph, arm, network, made)


def _part(config: Config, name: str, graph: str, part: str) -> Job:
    """A GGCN with some of its parts: settings of Table B1, or those of Table 1 where B1 has none."""
    key = graph.removesuffix("_fixed")
    if key in _ABLATION:
        hidden, decay, dropout, slope, scale = _ABLATION[key]
        options = {"use_decay": False, "deg_intercept_init": slope, "scale_init": scale}
        made = with_flags(config, Setting(2, hidden, decay, dropout, options=options))
    else:
        made = setting(config, graph, "ggcn")
    made = replace(made, options=made.options | PARTS[part])
    return Job(name, f"ggcn_{part}", "ggcn", made)


def _table(graph: str, hours: float, note: str = "", **values: Any) -> Preset:
    title = {
        "cornell": "Cornell as published (Texas's features)",
        "cornell_fixed": "Cornell, corrected",
        "pubmed": "PubMed",
    }
    return Preset(
        Config(graphs=(graph,), **values),
        seeds=[42],
        data=f"{title.get(graph, graph.capitalize())}, ten splits",
        needs_data=True,
        claims=False,
        hours=hours,
        note=note,
    )


PRESETS = {
    "default": Preset(
        Config(study="homophily", splits=1, epochs=500, depths=(8, 32)),
        seeds=3,
        data="generated graphs, homophily 0.1 to 0.8",
        hours=0.05,
        why_not_comparable="generated data",
    ),
    "smoke": Preset(
        Config(study="homophily", splits=1, epochs=2, homophily=(0.1, 0.8), nodes=100, depths=(4,)),
        seeds=1,
        data="generated graphs",
        hours=0.002,
        claims=False,
        why_not_comparable="two epochs",
    ),
    "texas": _table("texas", 0.12, pairnorm_depth=64),
    "wisconsin": _table("wisconsin", 0.12, pairnorm_depth=64),
    "cornell": _table("cornell", 0.12, pairnorm_depth=64),
    "cornell-fixed": _table("cornell_fixed", 0.12, "the paper's Cornell has Texas's features", pairnorm_depth=64),
    "actor": _table("actor", 0.25, selection_splits=3),
    "squirrel": _table("squirrel", 0.5, selection_splits=3),
    "chameleon": _table("chameleon", 0.25, selection_splits=3),
    "citeseer": _table("citeseer", 1.5, selection_splits=3),
    "pubmed": _table("pubmed", 6.0, selection_splits=3),
    "cora": _table("cora", 1.5, selection_splits=3),
    "cora-depth": Preset(
        Config(
            study="depth",
            graphs=("cora",),
            networks=tuple(n for n in NETWORKS if n != "mlp"),
            splits=3,
            selection_splits=1,
        ),
        seeds=[42],
        data="Cora, three of the ten splits",
        needs_data=True,
        claims=False,
        hours=1.5,
        note="all ten: --splits 10, five hours",
    ),
    "ablation": Preset(
        Config(study="ablation", graphs=("texas", "cornell", "chameleon", "cora", "citeseer")),
        seeds=[42],
        data="Texas, Cornell, Chameleon, Cora, Citeseer, ten splits",
        needs_data=True,
        claims=False,
        hours=0.25,
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.run import Run, Unit  # noqa: E402

from data import FILES, NodeData, check, generate, load  # noqa: E402
from model import (  # noqa: E402
    GAT,
    GCN,
    GCNII,
    GGCN,
    GPRGNN,
    MLP,
    Adjacency,
    PairNormGCN,
    SparseMatrix,
    node_analysis,
)

SMALL = 2000
"""Graphs with fewer nodes are trained on one thread."""

CLASSES: dict[str, Any] = {
    "ggcn": GGCN,
    "mlp": MLP,
    "gcn": GCN,
    "gat": GAT,
    "gcnii": GCNII,
    "pairnorm": PairNormGCN,
    "gprgnn": GPRGNN,
}


def build(network: str, made: Setting, features: int, classes: int) -> torch.nn.Module:
    """A network with the sizes and options of a setting."""
    sizes = {"features": features, "layers": made.layers, "hidden": made.hidden, "classes": classes}
    return CLASSES[network](**sizes, dropout=made.dropout, **made.options)


class Problem:
    """A graph with its features, labels and splits, on the device of the run."""

    def __init__(self, data: NodeData, normalization: str, device: torch.device) -> None:
        self.data = data
        self.x = SparseMatrix.of(data.features).to(device)
        self.graph = Adjacency.from_edges(data.edges, len(data.labels), normalization).to(device)
        self.labels = data.labels.to(device)
        self.splits = len(data.train)

    def mask(self, part: str, split: int) -> Tensor:
        """Node ids of a part of a split."""
        return getattr(self.data, part)[split].nonzero().squeeze(1).to(self.labels.device)


def fit(unit: Unit, run: Run, problem: Problem, job: Job, split: int) -> tuple[torch.nn.Module, Tensor]:
    """Full-batch training with early stopping on the validation loss (Sec. 3.4).

    Returns:
        the network with the weights of the epoch of lowest validation loss, and its log-probabilities (N, C).
    """
    x, graph, config = problem.x, problem.graph, run.config
    train, val = problem.mask("train", split), problem.mask("val", split)
    target, val_target = problem.labels[train], problem.labels[val]
    with user_errors():
        model = build(job.network, job.setting, x.shape[1], problem.data.classes)
    fused = run.device.type in ("cpu", "cuda")  # one kernel for all parameters: half of a small network's step
    optimizer = torch.optim.Adam(
        model.parameters(), lr=job.setting.lr, weight_decay=job.setting.weight_decay, fused=fused
    )
    model, optimizer = run.setup(model, optimizer)
    unit.attach(model=model, optimizer=optimizer)
    weights = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    state = unit.state
    if not state:
        state |= {"loss": float("inf"), "waited": 0, "epochs": 0, "best": [w.detach().clone() for w in weights]}
    best = [w.to(run.device) for w in state["best"]]
    state["best"] = best
    for epoch in unit.steps(config.epochs):
        state["epochs"] = epoch + 1
        model.train()
        optimizer.zero_grad()
        loss = F.nll_loss(model(x, graph)[train], target)
        run.backward(loss)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            val_loss = float(F.nll_loss(model(x, graph)[val], val_target))
        unit.log(loss=loss, val_loss=val_loss)
        if val_loss < state["loss"]:
            torch._foreach_copy_(best, [w.detach() for w in weights])
            state["loss"], state["waited"] = val_loss, 0
        else:
            state["waited"] += 1
        if state["waited"] == config.patience:
            break
    with torch.no_grad():
        torch._foreach_copy_([w.detach() for w in weights], best)
        model.eval()
        return model, model(x, graph)


def finish(unit: Unit, run: Run, problem: Problem, job: Job, split: int, model: torch.nn.Module, out: Tensor) -> None:
    """Record what a trained network does on the test nodes, and for GCN how that depends on the degree (Sec. 3.5)."""
    right = out.argmax(1) == problem.labels
    keep = {part: right[problem.mask(part, split)].double().mean().cpu() for part in ("val", "test")}
    name = "/".join(part for part in (job.graph, job.arm, job.option) if part)
    metrics = {f"{name}/test_accuracy": float(keep["test"])}
    if job.arm == "gcn":
        data = problem.data
        with torch.no_grad():
            before = model(problem.x, problem.graph, last=False).argmax(1).cpu()
        test = data.test[split]
        groups = node_analysis(out.argmax(1).cpu(), before, data.labels, data.edges, test, run.config.degree_groups)
        keep |= groups
        for i, (count, accuracy) in enumerate(zip(groups["count"], groups["accuracy"], strict=True), start=1):
            if count > 0:
                metrics[f"{name}/degree_group_{i}/test_accuracy"] = float(accuracy)
    unit.finish(metrics, timings={f"{name}/epoch_seconds": unit.seconds / unit.state["epochs"]}, keep=keep)


def train_job(run: Run, problem: Problem, seed: int, job: Job, splits: range) -> None:
    """Train one network on some splits, each a unit of work that an interrupted run does not repeat."""
    for unit in run.units((seed, job.graph, job.arm, job.option or "-", k) for k in splits):
        split = unit.key[-1]
        finish(unit, run, problem, job, split, *fit(unit, run, problem, job, split))


def train_arm(run: Run, problem: Problem, seed: int, candidates: list[Job]) -> None:
    """Train an arm on every split; of several candidates, the one with the best validation accuracy is the arm."""
    if len(candidates) == 1:
        return train_job(run, problem, seed, candidates[0], range(problem.splits))
    first = min(run.config.selection_splits, problem.splits)
    for job in candidates:
        train_job(run, problem, seed, job, range(first))
    chosen = max(candidates, key=lambda job: sum(float(row["val"]) for row in kept(run, seed, job, first)))
    options = ", ".join(job.option for job in candidates)
    run.print(f"{chosen.graph} {chosen.arm}: {chosen.option} has the best validation accuracy of {options}")
    train_job(run, problem, seed, chosen, range(first, problem.splits))
    rows = kept(run, seed, chosen, problem.splits)
    for unit in run.units((seed, chosen.graph, chosen.arm, "chosen", k) for k in range(problem.splits)):
        unit.finish({f"{chosen.graph}/{chosen.arm}/test_accuracy": float(rows[unit.key[-1]]["test"])})


def kept(run: Run, seed: int, job: Job, splits: int) -> list[dict[str, Any]]:
    """What the finished splits of a candidate recorded: validation and test accuracy."""
    return [run.kept((seed, job.graph, job.arm, job.option, k)) for k in range(splits)]


def problem_of(config: Config, run: Run, seed: int, graph: str) -> Problem:
    """Read or generate the graph of a job, and record it."""
    if config.study == "homophily":
        level = config.homophily[0] if graph == TWO else float(graph.removeprefix("h="))
        sizes: dict[str, Any] = {"classes": 2, "signal": 0.2, "degree": 20.0} if graph == TWO else {}
        with user_errors():
            data = generate(level, run.generator("data", seed, level), nodes=config.nodes, name=graph, **sizes)
        run.data_used(graph, kind="generated", spec=data.origin)
    else:
        data = load(run.data, graph, config.splits)
        run.data_used(graph, kind="real", spec=data.origin)
    return Problem(data, config.normalization, run.device)


def train(config: Config, run: Run) -> None:
    """Train every job of the study on every seed and split, then decide the claims and draw the figure."""
    threads = torch.get_num_threads()
    for seed in run.seeds:
        for graph, of_graph in groupby(jobs(config), key=lambda job: job.graph):
            problem = problem_of(config, run, seed, graph)
            # A second thread has nothing to do on a small graph but wait for the first; and with one, no sum depends
            # on the machine.
            torch.set_num_threads(1 if len(problem.labels) < SMALL else threads)
            for _, of_arm in groupby(of_graph, key=lambda job: job.arm):
                train_arm(run, problem, seed, list(of_arm))
    torch.set_num_threads(threads)
    if run.preset.claims and config.study == "homophily":
        decide(config, run)
    run.figure(draw(config, run))


def decide(config: Config, run: Run) -> None:
    """The paper's statements as comparisons on the generated family (thresholds: paper.toml)."""
    low, high, middle = config.homophily[0], config.homophily[-1], config.homophily[-2]
    means = {name: summary.mean for name, summary in run.metrics.items()}

    def accuracy(level: float, arm: str) -> float:
        return means[f"h={level}/{arm}/test_accuracy"]

    ggcn, gcn = accuracy(low, "ggcn"), accuracy(low, "gcn")
    name = "beats_gcn_under_heterophily"
    run.claim(name, ggcn - gcn >= run.threshold(name, "margin"), ggcn=ggcn, gcn=gcn)

    ggcn, gcn = accuracy(high, "ggcn"), accuracy(high, "gcn")
    name = "equals_gcn_under_homophily"
    run.claim(name, ggcn - gcn >= -run.threshold(name, "margin"), ggcn=ggcn, gcn=gcn)

    name = "best_or_close_everywhere"
    gaps = {h: max(accuracy(h, "gcn"), accuracy(h, "mlp")) - accuracy(h, "ggcn") for h in config.homophily}
    worst = max(gaps, key=lambda h: gaps[h])
    run.claim(name, gaps[worst] <= run.threshold(name, "margin"), largest_gap=gaps[worst], at_homophily=worst)

    deep = max(config.depths)
    name = "keeps_accuracy_with_depth"
    drops = [accuracy(h, "ggcn") - accuracy(h, f"ggcn/layers={deep}") for h in (low, high)]
    run.claim(name, max(drops) <= run.threshold(name, "margin"), drop_heterophily=drops[0], drop_homophily=drops[1])

    name = "gcn_collapses_with_depth"
    shallow, collapsed = accuracy(high, "gcn"), accuracy(high, f"gcn/layers={deep}")
    run.claim(name, shallow - collapsed >= run.threshold(name, "margin"), shallow=shallow, deep=collapsed)

    name = "signed_messages_help_under_heterophily"
    sign, none = accuracy(low, "ggcn_sign"), accuracy(low, "ggcn_none")
    run.claim(name, sign - none >= run.threshold(name, "margin"), signed=sign, unsigned=none)

    name = "the_sign_itself_helps"
    signed, absolute = (means[f"{TWO}/ggcn_{part}/test_accuracy"] for part in ("sign", "absolute"))
    mlp = means[f"{TWO}/mlp/test_accuracy"]
    ahead = signed - absolute >= run.threshold(name, "margin") and signed > mlp
    run.claim(name, ahead, signed=signed, absolute=absolute, mlp=mlp)

    name = "degree_correction_adds_to_signs"
    both = sum(accuracy(h, "ggcn") for h in config.homophily) / len(config.homophily)
    sign = sum(accuracy(h, "ggcn_sign") for h in config.homophily) / len(config.homophily)
    run.claim(name, both - sign >= run.threshold(name, "margin"), both=both, signed=sign)

    name = "low_degree_nodes_lose_first"
    groups = [f"h={middle}/gcn/degree_group_{i}/test_accuracy" for i in range(1, config.degree_groups + 1)]
    found = [means[group] for group in groups if group in means]  # without test nodes a group has no accuracy
    first, last = found[0], found[max(0, len(found) - 2)]
    run.claim(name, last - first >= run.threshold(name, "margin"), lowest=first, second_highest=last)


def draw(config: Config, run: Run) -> Any:
    """The run as a figure: what stands on the x axis is the study's question."""
    metrics = run.metrics

    def line(axis: Any, xs: Any, names: list[str], label: str, style: str = "o-") -> None:
        known = [(x, metrics[name]) for x, name in zip(xs, names, strict=True) if name in metrics]
        axis.errorbar(
            [x for x, _ in known], [m.mean for _, m in known], [m.std for _, m in known], fmt=style, label=label
        )

    if config.study == "homophily":
        figure, axes = report.figure(1, 3)
        arms = {"ggcn": "GGCN", "ggcn_none": "GGCN, no sign, no degree", "gcn": "GCN", "mlp": "MLP"}
        for arm, label in arms.items():
            line(axes[0], config.homophily, [f"h={h}/{arm}/test_accuracy" for h in config.homophily], label)
        axes[0].set(xlabel="homophily of the edges", ylabel="test accuracy", title="two layers")
        for level, style in ((config.homophily[0], "o--"), (config.homophily[-1], "o-")):
            for arm in ("ggcn", "gcn"):
                names = [f"h={level}/{arm}/test_accuracy"]
                names += [f"h={level}/{arm}/layers={depth}/test_accuracy" for depth in config.depths]
                line(axes[1], [2, *config.depths], names, f"{arms[arm]}, h={level}", style)
        axes[1].set(xlabel="layers", title="depth")
        axes[1].set_xscale("log", base=2)
        axes[1].set_xticks([2, *config.depths], labels=[2, *config.depths])
        groups = range(1, config.degree_groups + 1)
        for level in config.homophily:
            names = [f"h={level}/gcn/degree_group_{i}/test_accuracy" for i in groups]
            line(axes[2], groups, names, f"h={level}")
        axes[2].set(xlabel="degree group (low to high)", title="GCN, by degree of the node")
        axes[2].set_xticks(list(groups))
        for axis in axes:
            axis.set_ylim(0, 1.02)
            axis.legend(fontsize=7)
        return figure
    if config.study == "depth":
        figure, axes = report.figure(1, len(config.graphs), squeeze=False)
        for axis, graph in zip(axes[0], config.graphs, strict=True):
            for network in config.networks:
                names = [f"{graph}/{network}/layers={depth}/test_accuracy" for depth in config.depths]
                line(axis, config.depths, names, network)
            axis.set(xlabel="layers", ylabel="test accuracy", title=graph)
            axis.set_xscale("log", base=2)
            axis.set_xticks(config.depths, labels=config.depths)
            axis.legend(fontsize=7)
        return figure
    arms = list(config.networks) if config.study == "table" else [f"ggcn_{part}" for part in PARTS]
    figure, axes = report.figure(1, len(config.graphs), squeeze=False)
    for axis, graph in zip(axes[0], config.graphs, strict=True):
        found = [metrics[f"{graph}/{arm}/test_accuracy"] for arm in arms]
        axis.bar(arms, [m.mean for m in found], yerr=[m.std for m in found], color=report.COLOURS[0])
        axis.set(title=graph, ylabel="test accuracy", ylim=(0, 1))
        axis.tick_params(axis="x", rotation=45)
    return figure


def check_data(config: Config, folder: Path | None) -> list[str]:
    """Counts of the graphs that the configuration uses; for generated graphs, of every graph in the folder."""
    if folder is None:
        if config.study == "homophily":
            return ["nothing to check: this preset generates its graphs; name a folder with --data to check that"]
        raise UserError("--check-data needs --data DIR, the folder with planetoid/, geom_gcn/ and splits/")
    if config.study != "homophily":
        return [line for graph in config.graphs for line in check(folder, graph)]
    lines, good = [], 0
    for graph in FILES:
        try:
            lines += check(folder, graph)
            good += 1
        except UserError as error:
            lines.append(f"{graph}: MISSING or malformed: {error}")
    if not good:
        raise UserError(f"{folder} holds none of the graphs, expected planetoid/, geom_gcn/ and splits/ there")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
