"""Condense graphs by one-step gradient matching, train networks on what comes out, and compare with other small sets.

The default run condenses generated molecule-like graphs and a generated citation graph and needs no files. The presets
named after a data set run the paper's protocol on it; these need --data.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.errors import UserError, user_errors

BASELINES = ("random", "herding", "k_center", "dcg")
GRAPH_ARMS = (*BASELINES, "doscond", "whole", "features_only", "continuous", "multi_step")
NODE_ARMS = (*BASELINES, "doscond", "whole")


@dataclass(frozen=True)
class GraphSetting:
    """What the official scripts set for a graph data set, and what its code decides by the data set's name.

    ``nodes`` of a condensed graph; ``joint``: match one batch of all classes instead of class by class; ``bounded``:
    add the bound's term; ``symmetric``: undirected graphs.
    """

    nodes: int
    lr_adj: float
    lr_feat: float = 0.01
    pooling: str = "mean"
    norm: str = "none"
    metric: str = "mse"
    iterations: int = 1000
    hidden: int = 128
    layers: int = 3
    epochs: int = 500
    batch: int = 128
    joint: bool = False
    bounded: bool = False
    symmetric: bool = True


@dataclass(frozen=True)
class NodeSetting:
    """What the published commands set for a node data set, and what the code decides by its name."""

    iterations: int
    lr_adj: float = 1e-3
    lr_feat: float = 1e-3
    rate: float = 0.5
    metric: str = "mse"
    kind: str = "gcn"
    hidden: int = 256
    layers: int = 2
    pge_hidden: int = 128
    steps: int = 1
    """Matching steps at each drawn network, without training it in between."""
    fanouts: tuple[int, ...] = (10, 5)
    epochs: int = 600
    dropout: float = 0.5
    weight_decay: float = 5e-4


GRAPH_SETTINGS = {
    "MUTAG": GraphSetting(18, 0.1),
    "NCI1": GraphSetting(30, 1.0),
    "DD": GraphSetting(285, 2.0),
    "PROTEINS": GraphSetting(39, 1.0),
    "ogbg-molhiv": GraphSetting(26, 0.01, pooling="sum", epochs=100, bounded=True),
    "ogbg-molbbbp": GraphSetting(24, 2.0),
    "ogbg-molbace": GraphSetting(34, 0.01, joint=True),
    "CIFAR10": GraphSetting(118, 0.01, norm="instance", batch=512, joint=True, symmetric=False),
    "molecules": GraphSetting(18, 0.1),
}
NODE_SETTINGS = {
    "cora": NodeSetting(5000),
    "citeseer": NodeSetting(3000),
    "pubmed": NodeSetting(2000),
    "ogbn-arxiv": NodeSetting(
        1000, 0.02, 0.01, 0.001, metric="ours", kind="sgc", pge_hidden=256, steps=5, weight_decay=0.0
    ),
    "flickr": NodeSetting(1000, 5e-3, 5e-3, 0.001, pge_hidden=256, steps=10, fanouts=(15, 8), dropout=0.0),
    "citations": NodeSetting(300),
}
SETS = (*GRAPH_SETTINGS, *NODE_SETTINGS)


@dataclass(frozen=True)
class Config:
    """What to condense and how. Fields that are None take the official value for the data set."""

    sets: tuple[str, ...] = ("molecules",)
    """Data sets; molecules (graphs) and citations (nodes) are generated."""
    arms: tuple[str, ...] = NODE_ARMS
    """Small sets to train on: coresets, condensed sets, the whole set, ablations (graph sets only)."""
    ipc: tuple[int, ...] = (1,)
    """Graphs per class; 0: by --rate."""
    rate: float | None = None
    """Condensed nodes as a share of the training nodes; with --ipc 0, graphs as a share of the training graphs."""
    nodes: int | None = None
    """Nodes of a condensed graph."""
    iterations: int | None = None
    """Networks drawn for one-step matching; multi-step arms draw iterations / outer, for as many matching steps."""
    lr_adj: float | None = None
    """Learning rate of the structure (logits of the edges, or the network that gives the edges of nodes)."""
    lr_feat: float | None = None
    """Learning rate of the features."""
    lr_adj_continuous: float = 0.01
    """Learning rate of an adjacency in [0, 1] (arms dcg and continuous)."""
    drop_at: int = 400
    """Graphs: after this iteration both learning rates are a tenth."""
    beta: float = 0.1
    """Weight of the sparsity penalty."""
    metric: Literal["mse", "cos", "ours"] | None = None
    """Distance of gradients."""
    init: Literal["real", "noise"] = "real"
    """Begin at real graphs or at noise."""
    real_batch: int = 256
    """Real graphs (or nodes) of a class in one matching step."""
    outer: int = 10
    """Multi-step arms: matching steps at each drawn network."""
    inner: int = 5
    """Multi-step arms: epochs of training the network between two of them."""
    lr_inner: float = 0.005
    """Multi-step arms: learning rate of that training (0.01 for nodes)."""
    hidden: int | None = None
    """Hidden units of the network."""
    layers: int | None = None
    """Convolutions of the network."""
    pooling: Literal["mean", "sum"] | None = None
    """Readout over the nodes of a graph."""
    norm: Literal["none", "instance"] | None = None
    """Normalisation after each convolution."""
    epochs: int | None = None
    """Epochs of training on a small set."""
    lr: float = 1e-3
    """Learning rate of that training for graphs; nodes use ten times as much."""
    whole_batch: int = 512
    """Batch size of training on the whole set."""
    evaluations: int = 3
    """Networks trained on each small set."""
    split: Literal["paper", "seed"] = "paper"
    """TU sets: the official code's one split, or another for every seed."""
    train_graphs: int = 200
    """Generated molecules: training graphs (a third as many validate, 900 test)."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        for name, chosen, known in (("sets", self.sets, SETS), ("arms", self.arms, GRAPH_ARMS)):
            if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
                raise ValueError(f"--{name} {' '.join(chosen)}: expected different ones among {', '.join(known)}")
        if not set(self.sets) <= set(GRAPH_SETTINGS) and not set(self.arms) & set(NODE_ARMS):
            raise ValueError(f"--arms {' '.join(self.arms)}: nodes have only {', '.join(NODE_ARMS)}")
        if not self.ipc or min(self.ipc) < 0 or len(set(self.ipc)) != len(self.ipc):
            raise ValueError(f"--ipc {' '.join(map(str, self.ipc))}: expected different numbers of at least 0")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"--rate is {self.rate}, expected more than 0 and at most 1")
        for name in ("real_batch", "outer", "whole_batch", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        for name in ("nodes", "iterations", "hidden", "layers", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 1")
        for name in ("lr_adj", "lr_feat", "lr_adj_continuous", "beta", "inner", "drop_at"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 0")
        for name in ("lr", "lr_inner"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected more than 0")
        if self.train_graphs < 10:
            raise ValueError(f"--train-graphs is {self.train_graphs}, expected at least 10")


def setting(config: Config, name: str) -> Any:
    """The official values for a data set, with what the command line says."""
    made: Any = GRAPH_SETTINGS.get(name) or NODE_SETTINGS[name]
    own = {field.name for field in fields(made)} & {field.name for field in fields(config)}
    given = {key: getattr(config, key) for key in own}
    return replace(made, **{key: value for key, value in given.items() if value is not None})


def _real(name: str, title: str, hours: float, seeds: int = 3, why: str | None = None, **values: Any) -> Preset:
    """A preset on real data; ``values`` are fields of Config, or of Preset where Config has none."""
    own = {field.name for field in fields(Config)}
    config = Config(sets=(name,), **{key: value for key, value in values.items() if key in own})
    rest = {key: value for key, value in values.items() if key not in own}
    return Preset(config, seeds, title, hours=hours, needs_data=True, claims=False, why_not_comparable=why, **rest)


GPU = "1 GPU"
PRESETS = {
    "default": Preset(
        Config(sets=("molecules", "citations"), ipc=(1, 10), hidden=64, iterations=400, drop_at=250, epochs=300),
        seeds=3,
        data="generated molecules, generated citations",
        hours=0.07,
        why_not_comparable="generated data",
    ),
    "smoke": Preset(
        Config(
            sets=("molecules", "citations"),
            arms=("random", "herding", "dcg", "doscond", "whole"),
            iterations=2,
            outer=2,
            epochs=3,
            evaluations=2,
            train_graphs=20,
        ),
        seeds=1,
        data="generated molecules, generated citations",
        hours=0.002,
        claims=False,
        why_not_comparable="two iterations",
    ),
    "mutag": _real("MUTAG", "MUTAG", 0.3, ipc=(1, 10, 20), seeds=5, evaluations=10),
    "nci1": _real("NCI1", "NCI1", 1.0, ipc=(1, 10, 50)),
    "dd": _real("DD", "DD", 1.0, hardware=GPU, ipc=(1, 10, 50)),
    "proteins": _real("PROTEINS", "PROTEINS", 0.5, ipc=(1, 10, 50), why="not in the paper; settings of NCI1"),
    "molhiv": _real("ogbg-molhiv", "ogbg-molhiv, scaffold split", 6.0, hardware=GPU, ipc=(1, 10, 50)),
    "molbbbp": _real("ogbg-molbbbp", "ogbg-molbbbp, scaffold split", 0.7, ipc=(1, 10, 50)),
    "molbace": _real("ogbg-molbace", "ogbg-molbace, scaffold split", 0.7, ipc=(1, 10, 50)),
    "cifar10": _real("CIFAR10", "CIFAR10 superpixel graphs", 12.0, hardware=GPU, ipc=(1, 10, 50)),
    "ablation": _real(
        "MUTAG",
        "MUTAG",
        0.2,
        arms=("doscond", "features_only", "continuous", "multi_step", "dcg"),
        seeds=5,
        evaluations=10,
    ),
    "cora": _real("cora", "Cora, Planetoid split", 0.5, seeds=3),
    "citeseer": _real("citeseer", "Citeseer, Planetoid split", 0.7, seeds=3),
    "pubmed": _real("pubmed", "PubMed, Planetoid split", 0.5, seeds=3),
    "arxiv": _real("ogbn-arxiv", "ogbn-arxiv, GraphSAINT files", 2.0, hardware=GPU),
    "flickr": _real("flickr", "Flickr, GraphSAINT files", 2.0, hardware=GPU),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.run import Run, Unit, unwrap  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import (  # noqa: E402
    GENERATED_GRAPHS,
    GENERATED_NODES,
    GRAPH_SETS,
    GraphData,
    NodeData,
    check,
    generate_graphs,
    generate_nodes,
    load_graphs,
    load_nodes,
)
from model import (  # noqa: E402
    GCN,
    CondensedGraphs,
    CondensedNodes,
    DenseGraphs,
    Graphs,
    GraphSet,
    NodeNet,
    Sparse,
    bound,
    class_counts,
    graph_loss,
    herding,
    k_center,
    match,
    match_nodes,
    neighbourhood,
    normalized,
)

CHUNK = 1024
"""Graphs evaluated in one pass."""

# arm -> discrete edges, learned structure, several matching steps with training in between
METHODS = {
    "doscond": (True, True, False),
    "dcg": (False, True, True),
    "features_only": (True, False, False),
    "continuous": (False, True, False),
    "multi_step": (True, True, True),
}


# ---- graph classification --------------------------------------------------------------------------------------------


class GraphProblem:
    """A set of graphs on the device of the run, with what does not change between units."""

    def __init__(self, config: Config, run: Run, seed: int, name: str) -> None:
        self.run, self.config, self.seed, self.name = run, config, seed, name
        self.setting: GraphSetting = setting(config, name)
        self.data = self._data()
        device = run.device
        with user_errors():
            edges, ptr = self.data.edges.to(device), self.data.ptr.to(device)
            self.graphs = GraphSet(self.data.x.to(device), edges, ptr, self.setting.layers)
        self.labels = self.data.labels.to(device)
        self.train, self.val, self.test = (part.to(device) for part in (self.data.train, self.data.val, self.data.test))
        self.outputs = 1 if self.data.metric == "auc" else self.data.classes
        self.validation = list(self.batches(self.val))
        # Each class's training graphs in an order of its own: coresets and starting points are its beginning.
        order = torch.randperm(len(self.train), generator=run.generator("order", seed, name)).to(device)
        shuffled = self.train[order]
        self.members = [shuffled[self.labels[shuffled] == c] for c in range(self.data.classes)]

    def _data(self) -> GraphData:
        if self.name == GENERATED_GRAPHS:
            train = self.config.train_graphs
            generator = self.run.generator("data", self.seed, self.name)
            data = generate_graphs(generator, train + train // 3 + 900, train, train // 3)
        else:
            data = load_graphs(self.run.data, self.name, self.seed if self.config.split == "seed" else 0)
        self.run.data_used(self.name, kind="real" if data.real else "generated", spec=data.origin)
        return data

    def model(self, copies: int | None = None) -> GCN:
        """A network of this set's sizes."""
        s = self.setting
        with user_errors():
            return GCN(self.data.x.shape[1], self.outputs, s.hidden, s.layers, s.norm, s.pooling, copies)

    def batches(self, index: Tensor) -> Iterator[tuple[Graphs, Tensor]]:
        """These graphs with their labels, in parts."""
        return ((self.graphs.batch(part), self.labels[part]) for part in index.split(CHUNK))

    def counts(self, ipc: int) -> list[int]:
        """Condensed graphs of each class."""
        with user_errors():
            rate = self.config.rate if self.config.rate is not None else 0.1
            return class_counts(self.labels[self.train], ipc, rate)

    def first(self, counts: list[int], members: list[Tensor], what: str) -> Tensor:
        """The first ``counts[c]`` of each class's ``members``."""
        for c, (count, own) in enumerate(zip(counts, members, strict=True)):
            if len(own) < count:
                raise UserError(f"{self.name}: {count} {what} of class {c} asked for, there are {len(own)}")
        return torch.cat([own[:count] for own, count in zip(members, counts, strict=True)])

    def start(self, counts: list[int]) -> Tensor:
        """Training graphs that the condensed ones begin at: of at most ``nodes`` nodes, where there are any."""
        fitting = []
        for c, own in enumerate(self.members):
            small = own[self.graphs.sizes[own] <= self.setting.nodes]
            if not len(small):
                self.run.print(f"warning: no graph of class {c} has at most {self.setting.nodes} nodes, they are cut")
            fitting.append(small if len(small) else own)
        return self.first(counts, fitting, f"graphs with at most {self.setting.nodes} nodes")

    @torch.no_grad()
    def score(self, model: Callable[[Graphs], Tensor], batches: Iterable[tuple[Graphs, Tensor]]) -> Tensor:
        """Accuracy or area under the ROC curve of each network, (K,) float64."""
        scored, truth = zip(*((model(graphs), labels) for graphs, labels in batches), strict=True)
        out, labels = torch.cat(scored, 1), torch.cat(truth)
        if self.data.metric == "accuracy":
            return (out.argmax(-1) == labels).double().mean(1).cpu()
        from sklearn.metrics import roc_auc_score

        return torch.tensor([roc_auc_score(labels.cpu(), row.cpu()) for row in out[..., 0]], dtype=torch.float64)


class Cycle:
    """The training batches of a set: shuffled anew each epoch; one that holds all graphs is made once."""

    def __init__(self, make: Callable[[Tensor], tuple[Graphs, Tensor]], size: int, batch: int, seed: int) -> None:
        self.make, self.sampler = make, EpochSampler(size, batch, seed)
        self.whole = make(torch.arange(size)) if len(self.sampler) == 1 else None

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, step: int) -> tuple[Graphs, Tensor]:
        return self.make(self.sampler[step]) if self.whole is None else self.whole


def fit(unit: Unit, run: Run, problem: GraphProblem, batches: Cycle) -> Any:
    """Train ``evaluations`` networks at once on a set, keep each one's weights of the best validation score.

    Returns:
        the networks, as one model.
    """
    config = run.config
    model = problem.model(config.evaluations)
    fused = run.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=fused)
    model, optimizer = run.setup(model, optimizer)
    unit.attach(model=model, optimizer=optimizer)
    weights = list(model.parameters())
    state = unit.state
    if not state:
        state |= {"score": torch.full((config.evaluations,), -1.0, dtype=torch.float64)}
        state |= {"best": [w.detach().clone() for w in weights]}
    state["best"] = best = [w.to(run.device) for w in state["best"]]
    epochs, each = problem.setting.epochs, len(batches)
    for step in unit.steps(epochs * each):
        if step == epochs // 2 * each:
            restart(optimizer)
        graphs, labels = batches[step]
        model.train()
        optimizer.zero_grad()
        loss = graph_loss(model(graphs), labels).sum()  # networks do not touch one another
        run.backward(loss)
        optimizer.step()
        unit.log(loss=loss / config.evaluations)
        if (step + 1) % each == 0:
            model.eval()
            score = problem.score(model, problem.validation)
            better = score > state["score"]
            if better.any():
                state["score"] = torch.where(better, score, state["score"])
                chosen = better.to(run.device)
                for kept, weight in zip(best, weights, strict=True):
                    kept[chosen] = weight.detach()[chosen]
    with torch.no_grad():
        for kept, weight in zip(best, weights, strict=True):
            weight.copy_(kept)
    return model.eval()


def draw(members: Tensor, count: int) -> Tensor:
    """At most ``count`` of the members at random."""
    return members[torch.randperm(len(members), device=members.device)[:count]]


def restart(*optimizers: torch.optim.Optimizer) -> None:
    """A new optimiser with a tenth of the learning rate, in place of the old one."""
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] *= 0.1


def evaluate(unit: Unit, run: Run, problem: GraphProblem, batches: Cycle, name: str, embed: bool = False) -> None:
    """Train on a small set, test on the real graphs."""
    model = fit(unit, run, problem, batches)
    test = problem.score(model, problem.batches(problem.test))
    everything = problem.score(model, problem.batches(torch.arange(len(problem.labels), device=run.device)))
    keep = {}
    if embed:
        with torch.no_grad():
            rows = torch.cat([unwrap(model).embed(graphs) for graphs, _ in problem.batches(problem.train)])
        keep["embedding"] = rows.view(len(rows), run.config.evaluations, -1)[:, 0]
    metric = problem.data.metric
    metrics = {f"{name}/test_{metric}": float(test.mean()), f"{name}/all_{metric}": float(everything.mean())}
    unit.finish(metrics, timings={f"{name}/epoch_seconds": unit.seconds / problem.setting.epochs}, keep=keep)


def condense(unit: Unit, run: Run, problem: GraphProblem, counts: list[int], arm: str, name: str) -> None:
    """Learn condensed graphs with DosCond, or with one of the schemes it is compared with."""
    config, s = run.config, problem.setting
    discrete, structure, multi_step = METHODS[arm]
    outer, inner = (config.outer, config.inner) if multi_step else (1, 0)
    iterations = max(1, s.iterations // outer)
    small = CondensedGraphs(counts, s.nodes, problem.data.x.shape[1], discrete, s.symmetric).to(run.device)
    small.start(*(problem.graphs.dense(problem.start(counts), s.nodes) if config.init == "real" else ()))
    fused = run.device.type in ("cpu", "cuda")
    lr_adj = (s.lr_adj if discrete else config.lr_adj_continuous) if structure else 0.0
    optimizers = [
        torch.optim.Adam([small.omega], lr=lr_adj, fused=fused),
        torch.optim.Adam([small.x], lr=s.lr_feat, fused=fused),
    ]
    unit.attach(small=small, adam_adj=optimizers[0], adam_feat=optimizers[1])
    losses = unit.state.setdefault("losses", [])
    model = problem.model().to(run.device)
    classes = [problem.train[problem.labels[problem.train] == c] for c in range(problem.data.classes)]
    at_once = [classes] if s.joint else [[own] for own in classes]

    def labelled(index: Tensor) -> tuple[Graphs, Tensor]:
        return problem.graphs.batch(index), problem.labels[index]

    # Where the batch holds all there is, it is made once.
    fixed = {i: labelled(torch.cat(of)) for i, of in enumerate(at_once) if max(map(len, of)) <= config.real_batch}

    def real(i: int) -> tuple[Graphs, Tensor]:
        """Up to ``real_batch`` training graphs of each class of the i-th match."""
        if i in fixed:
            return fixed[i]
        return labelled(torch.cat([draw(own, config.real_batch) for own in at_once[i]]))

    for it in unit.steps(iterations):
        model.reset()
        adam_inner = torch.optim.Adam(model.parameters(), lr=config.lr_inner, fused=fused) if multi_step else None
        total = 0.0
        for k in range(outer):
            sampled = small.sample()
            sides = [small.of_class(sampled, c) for c in range(len(counts))]
            if s.joint:
                sides = [(sampled, small.labels)]
            matched = sum(match(model, side, real(i), s.metric) for i, side in enumerate(sides))
            loss = matched + config.beta * small.penalty()
            if s.bounded:
                loss = loss + bound(sampled, small.x, s.layers, s.pooling)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward(inputs=[small.omega, small.x])
            for optimizer in optimizers:
                optimizer.step()
            small.clamp()
            total += float(matched.detach()) / len(counts)
            if adam_inner is not None and k < outer - 1:
                train_inner(model, adam_inner, small, inner, s.batch)
        losses.append(total / outer)
        unit.log(matching_loss=total / outer)
        if it == config.drop_at:
            restart(*optimizers)

    adj = small.adjacency()
    chance = torch.sigmoid(small.omega.detach()).mean()
    curve = torch.tensor(losses, dtype=torch.float64)
    metrics = {"loss_at_start": float(curve[:10].mean()), "loss_at_end": float(curve[-50:].mean())}
    metrics["edge_share"] = float(adj.mean())
    keep = {"x": small.x, "adj": adj, "losses": curve, "chance": chance, "sparsity": small.sparsity}
    timings = {f"{name}/iteration_seconds": unit.seconds / iterations}
    unit.finish({f"{name}/{k}": v for k, v in metrics.items()}, timings=timings, keep=keep)


def train_inner(model: GCN, optimizer: torch.optim.Optimizer, small: CondensedGraphs, epochs: int, batch: int) -> None:
    """Train the drawn network on the condensed graphs as they are: the inner loop that DosCond does without."""
    graphs = small.graphs()
    for _ in range(epochs):
        for part in torch.randperm(len(small.labels), device=small.x.device).split(batch):
            optimizer.zero_grad()
            graph_loss(model(graphs[part]), small.labels[part]).backward()
            optimizer.step()


def run_graphs(run: Run, seed: int, name: str) -> None:
    """All arms on one set of graphs, one seed."""
    config = run.config
    problem = GraphProblem(config, run, seed, name)
    graphs, s = problem.graphs, problem.setting

    def real_batches(index: Tensor, batch: int) -> Cycle:
        def make(rows: Tensor) -> tuple[Graphs, Tensor]:
            part = index[rows.to(index.device)]
            return graphs.batch(part), problem.labels[part]

        return Cycle(make, len(index), batch, run.derive_seed("batches", seed, name))

    arms = [arm for arm in config.arms if arm != "whole"]
    coresets = {"herding": herding, "k_center": k_center}
    if "whole" in config.arms or set(arms) & set(coresets):
        for unit in run.units([(seed, name, "whole")]):
            evaluate(unit, run, problem, real_batches(problem.train, config.whole_batch), f"{name}/whole", embed=True)
    for ipc in config.ipc:
        counts = problem.counts(ipc)
        for arm in arms:
            title = f"{name}/ipc={ipc}/{arm}"
            if arm in METHODS:
                for unit in run.units([(seed, name, ipc, arm, "condense")]):
                    condense(unit, run, problem, counts, arm, title)
                kept = run.kept((seed, name, ipc, arm, "condense"))
                small = DenseGraphs(kept["x"].to(run.device), kept["adj"].to(run.device))
                labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(run.device)

                def make(rows: Tensor, small: DenseGraphs = small, labels: Tensor = labels) -> tuple[Graphs, Tensor]:
                    rows = rows.to(labels.device)
                    return small[rows], labels[rows]

                batches = Cycle(make, len(labels), s.batch, run.derive_seed("batches", seed, name))
            else:
                if arm == "random":
                    index = problem.first(counts, problem.members, "training graphs")
                else:
                    rows = run.kept((seed, name, "whole"))["embedding"].to(run.device)
                    chosen = []
                    for c, count in enumerate(counts):
                        own = (problem.labels[problem.train] == c).nonzero().squeeze(1)
                        problem.first([count], [own], "training graphs")
                        chosen.append(own[coresets[arm](rows[own], count)])
                    index = problem.train[torch.cat(chosen)]
                batches = real_batches(index, s.batch)
            for unit in run.units([(seed, name, ipc, arm)]):
                evaluate(unit, run, problem, batches, title)


# ---- node classification ---------------------------------------------------------------------------------------------

Part = tuple[Tensor | Sparse, list[Any], Tensor]
"""Features, a propagation for each layer, labels of the last one's rows."""


class NodeProblem:
    """One graph on the device of the run; what its predictions depend on is worked out once."""

    def __init__(self, config: Config, run: Run, seed: int, name: str) -> None:
        self.run, self.config, self.seed, self.name = run, config, seed, name
        self.setting: NodeSetting = setting(config, name)
        self.data = self._data()
        device, x = run.device, self.data.x
        self.x = x.to(device) if not x.is_sparse else sparse(x, device)
        self.labels = self.data.labels.to(device)
        self.train = self.data.train.to(device)
        parts = ("train", "val", "test")
        if self.data.inductive:
            self.hats = {part: self._hat(getattr(self.data, part).to(device)) for part in parts}
        else:
            self.hats = dict.fromkeys(parts, self._hat(torch.arange(len(self.labels), device=device)))
        self.parts = {part: self._exact(part) for part in self.hats}
        self.members = [self.train[self.labels[self.train] == c] for c in range(self.data.classes)]

    def _data(self) -> NodeData:
        if self.name == GENERATED_NODES:
            data = generate_nodes(self.run.generator("data", self.seed, self.name))
        else:
            data = load_nodes(self.run.data, self.name)
        self.run.data_used(self.name, kind="real" if data.real else "generated", spec=data.origin)
        return data

    def _hat(self, own: Tensor) -> Sparse:
        """Normalised adjacency with loops of the graph among these nodes, rows and columns of all nodes."""
        nodes = len(self.data.labels)
        source, target = self.data.edges.to(own.device)
        inside = torch.zeros(nodes, dtype=torch.bool, device=own.device)
        inside[own] = True
        keep = (source != target) & inside[source] & inside[target]
        loops = torch.arange(nodes, device=own.device)
        row, col = torch.cat([target[keep], loops]), torch.cat([source[keep], loops])
        scale = torch.bincount(row, minlength=nodes).float().rsqrt()
        return Sparse.of(row, col, scale[row] * scale[col], (nodes, nodes))

    def _exact(self, part: str) -> Part:
        """All that the predictions for a part depend on."""
        nodes = getattr(self.data, part).to(self.labels.device)
        return self.sampled(self.hats[part], nodes, (self.hats[part].width,) * self.setting.layers)

    def sampled(self, hat: Sparse, nodes: Tensor, fanouts: tuple[int, ...]) -> Part:
        """A sampled neighbourhood of some nodes, with their features and labels."""
        ids, hats = neighbourhood(hat, nodes, fanouts)
        return self.rows(ids), hats, self.labels[nodes]

    def rows(self, ids: Tensor) -> Tensor | Sparse:
        """Features of some nodes."""
        return self.x.rows(ids) if isinstance(self.x, Sparse) else self.x[ids]

    def features(self, ids: Tensor) -> Tensor:
        """The same, dense: (len(ids), d)."""
        rows = self.rows(ids)
        return rows.dense() if isinstance(rows, Sparse) else rows

    def counts(self) -> list[int]:
        """Condensed nodes of each class."""
        with user_errors():
            return class_counts(self.labels[self.train], rate=self.setting.rate)

    def model(self, dropout: float, kind: str = "gcn") -> NodeNet:
        """A network of this set's sizes."""
        s = self.setting
        with user_errors():
            return NodeNet(self.data.x.shape[1], self.data.classes, s.hidden, s.layers, dropout, kind)

    def accuracy(self, model: Callable[..., Tensor], part: str) -> float:
        """Accuracy on a part; the model is in evaluation mode."""
        x, hats, labels = self.parts[part]
        with torch.no_grad():
            return float((model(x, hats).argmax(1) == labels).double().mean())

    def coreset(self, arm: str, counts: list[int]) -> Tensor:
        """Training nodes that a baseline chooses, class by class."""
        if arm == "random":
            generator = self.run.generator("random", self.seed, self.name)
            orders = [torch.randperm(len(own), generator=generator).to(own.device) for own in self.members]
        else:
            rows = self.run.kept((self.seed, self.name, "whole", 0))["embedding"].to(self.labels.device)
            choose = {"herding": herding, "k_center": k_center}[arm]
            place = [(self.labels[self.train] == c).nonzero().squeeze(1) for c in range(len(counts))]
            orders = [choose(rows[p], count) for p, count in zip(place, counts, strict=True)]
        return torch.cat([own[o[:n]] for own, o, n in zip(self.members, orders, counts, strict=True)])

    def induced(self, nodes: Tensor) -> Part:
        """The graph among some nodes."""
        adj = (self.hats["train"].rows(nodes).dense()[:, nodes] > 0).float().fill_diagonal_(0.0)
        return self.rows(nodes), [normalized(adj)] * self.setting.layers, self.labels[nodes]


def sparse(x: Tensor, device: torch.device) -> Sparse:
    """A sparse COO tensor as rows."""
    x = x.coalesce().to(device)
    return Sparse.of(*x.indices(), x.values(), (x.shape[0], x.shape[1]))


def fit_nodes(unit: Unit, run: Run, problem: NodeProblem, part: Part, name: str, embed: bool = False) -> None:
    """Train a network on a small graph, keep the weights of the best validation accuracy, test on the real graph."""
    s = problem.setting
    x, hats, labels = part
    model = problem.model(s.dropout)
    fused = run.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=10 * run.config.lr, weight_decay=s.weight_decay, fused=fused)
    model, optimizer = run.setup(model, optimizer)
    unit.attach(model=model, optimizer=optimizer)
    weights = list(model.parameters())
    state = unit.state
    if not state:
        state |= {"score": -1.0, "best": [w.detach().clone() for w in weights]}
    state["best"] = best = [w.to(run.device) for w in state["best"]]
    for step in unit.steps(s.epochs):
        if step == s.epochs // 2:
            restart(optimizer)
        model.train()
        optimizer.zero_grad()
        loss = F.nll_loss(model(x, hats), labels)
        run.backward(loss)
        optimizer.step()
        unit.log(loss=loss)
        model.eval()
        score = problem.accuracy(model, "val")
        if score > state["score"]:
            state["score"] = score
            torch._foreach_copy_(best, [w.detach() for w in weights])
    with torch.no_grad():
        torch._foreach_copy_([w.detach() for w in weights], best)
        model.eval()
        keep = {"embedding": model(*problem.parts["train"][:2])} if embed else {}
    timings = {f"{name}/epoch_seconds": unit.seconds / s.epochs}
    unit.finish({f"{name}/test_accuracy": problem.accuracy(model, "test")}, timings=timings, keep=keep)


def condense_nodes(unit: Unit, run: Run, problem: NodeProblem, counts: list[int], arm: str, name: str) -> None:
    """Learn condensed nodes: one-step matching, or ("dcg") several steps with training in between."""
    config, s = run.config, problem.setting
    outer, inner = (config.outer, config.inner) if arm == "dcg" else (s.steps, 0)
    iterations = max(1, s.iterations * s.steps // outer)
    small = CondensedNodes(counts, problem.data.x.shape[1], s.pge_hidden).to(run.device)
    if config.init == "real":
        chosen = problem.coreset("random", counts)
        with torch.no_grad():
            small.x.copy_(problem.features(chosen))
    else:
        torch.nn.init.uniform_(small.x)
    fused = run.device.type in ("cpu", "cuda")
    adam_pge = torch.optim.Adam(small.pge.parameters(), lr=s.lr_adj, fused=fused)
    adam_feat = torch.optim.Adam([small.x], lr=s.lr_feat, fused=fused)
    unit.attach(small=small, adam_pge=adam_pge, adam_feat=adam_feat)
    losses = unit.state.setdefault("losses", [])
    model = problem.model(0.0, s.kind).to(run.device)
    for it in unit.steps(iterations):
        model.reset()
        optimizer_inner = torch.optim.Adam(model.parameters(), lr=2 * config.lr_inner, fused=fused)
        optimizer = adam_pge if it % 50 < 10 else adam_feat  # the structure, then the features
        total = 0.0
        for k in range(outer):
            real = []
            for own in problem.members:
                real.append(problem.sampled(problem.hats["train"], draw(own, config.real_batch), s.fanouts))
            loss = match_nodes(model, small, real, s.metric)
            optimizer.zero_grad()
            loss.backward(inputs=list(optimizer.param_groups[0]["params"]))
            optimizer.step()
            total += float(loss.detach()) / len(counts)
            if inner and k < outer - 1:
                with torch.no_grad():
                    x, hat = small.x.clone(), small.hat()
                for _ in range(inner):
                    optimizer_inner.zero_grad()
                    F.nll_loss(model(x, [hat] * s.layers), small.labels).backward()
                    optimizer_inner.step()
        losses.append(total / outer)
        unit.log(matching_loss=total / outer)
    with torch.no_grad():
        keep = {"x": small.x, "hat": small.hat(), "labels": small.labels, "losses": torch.tensor(losses)}
    unit.finish({}, timings={f"{name}/iteration_seconds": unit.seconds / iterations}, keep=keep)


def run_nodes(run: Run, seed: int, name: str) -> None:
    """All arms on one graph with labelled nodes, one seed."""
    config = run.config
    problem = NodeProblem(config, run, seed, name)
    counts = problem.counts()
    arms = [arm for arm in config.arms if arm in NODE_ARMS and arm != "whole"]
    if "whole" in config.arms or set(arms) & {"herding", "k_center"}:
        for unit in run.units((seed, name, "whole", r) for r in range(config.evaluations)):
            fit_nodes(unit, run, problem, problem.parts["train"], f"{name}/whole", embed=True)
    for arm in arms:
        title = f"{name}/{arm}"
        if arm in METHODS:
            for unit in run.units([(seed, name, arm, "condense")]):
                condense_nodes(unit, run, problem, counts, arm, title)
            kept = {k: v.to(run.device) for k, v in run.kept((seed, name, arm, "condense")).items()}
            part: Part = (kept["x"], [kept["hat"]] * problem.setting.layers, kept["labels"])
        else:
            part = problem.induced(problem.coreset(arm, counts))
        for unit in run.units((seed, name, arm, r) for r in range(config.evaluations)):
            fit_nodes(unit, run, problem, part, title)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(config: Config, run: Run) -> None:
    """Condense and evaluate every set for every seed, then decide the claims and draw the figure."""
    if run.world_size > 1:
        raise UserError("condensation is one chain of small steps: start one process a --seed instead of torchrun")
    # The steps are small, and sums over edges made by two threads differ in the last digit from run to run: with one
    # thread a resumed run ends in the numbers of an uninterrupted one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in run.seeds:
        for name in config.sets:
            if name in GRAPH_SETS:
                run_graphs(run, seed, name)
            else:
                run_nodes(run, seed, name)
    torch.set_num_threads(threads)
    complete = {GENERATED_GRAPHS, GENERATED_NODES} <= set(config.sets) and set(NODE_ARMS) <= set(config.arms)
    if run.preset.claims and complete:
        decide(config, run)
    run.figure(picture(config, run))


def decide(config: Config, run: Run) -> None:
    """The paper's statements as comparisons on the generated sets (thresholds: paper.toml)."""
    means = {name: summary.mean for name, summary in run.metrics.items()}
    base, few, many = GENERATED_GRAPHS, min(config.ipc), max(config.ipc)

    def accuracy(arm: str, ipc: int = few) -> float:
        return means[f"{base}/{arm}/test_accuracy" if arm == "whole" else f"{base}/ipc={ipc}/{arm}/test_accuracy"]

    def at_least(name: str, left: float, right: float, **measured: float) -> None:
        run.claim(name, left - right >= run.threshold(name, "margin"), **measured)

    doscond, more, others = accuracy("doscond"), accuracy("doscond", many), {arm: accuracy(arm) for arm in BASELINES}
    at_least("beats_random", doscond, others["random"], doscond=doscond, random=others["random"])
    coresets = {arm: others[arm] for arm in ("herding", "k_center")}
    at_least("beats_coresets", doscond, max(coresets.values()), doscond=doscond, **coresets)
    at_least("as_good_as_multi_step", doscond, others["dcg"], doscond=doscond, dcg=others["dcg"])
    at_least("more_graphs_close_the_gap", more, doscond, few=doscond, many=more)
    name = "keeps_most_of_the_accuracy"
    ratio = more / accuracy("whole")
    run.claim(name, ratio >= run.threshold(name, "ratio"), ratio=ratio, whole=accuracy("whole"))

    title = f"{base}/ipc={few}/doscond"
    name = "matching_loss_falls"
    first, last = means[f"{title}/loss_at_start"], means[f"{title}/loss_at_end"]
    run.claim(name, last <= run.threshold(name, "ratio") * first, start=first, end=last)
    name = "graphs_stay_discrete_and_sparse"
    kept = [run.kept((seed, base, ipc, "doscond", "condense")) for seed in run.seeds for ipc in config.ipc]
    clean = all(is_graph(row["adj"]) for row in kept)
    excess = max(float(row["chance"] - row["sparsity"]) for row in kept)
    run.claim(name, clean and excess <= run.threshold(name, "margin"), graphs=float(clean), excess=excess)

    name = "one_step_is_faster"
    seconds = {arm: run.timings[f"{base}/ipc={many}/{arm}/iteration_seconds"].mean for arm in ("doscond", "dcg")}
    ratio = seconds["dcg"] / seconds["doscond"]
    run.claim(name, ratio >= run.threshold(name, "ratio"), ratio=ratio, **seconds)

    nodes = {arm: means[f"{GENERATED_NODES}/{arm}/test_accuracy"] for arm in ("doscond", "random", "whole")}
    at_least("nodes_beat_random", nodes["doscond"], nodes["random"], **nodes)


def is_graph(adj: Tensor) -> bool:
    """Whether (G, n, n) are undirected graphs: entries 0 and 1, symmetric, no loops."""
    binary = bool(((adj == 0) | (adj == 1)).all())
    return binary and torch.equal(adj, adj.transpose(1, 2)) and not adj.diagonal(dim1=1, dim2=2).any()


def picture(config: Config, run: Run) -> Any:
    """Accuracy of every arm, the matching loss, and what one drawn network costs."""
    metrics, timings = run.metrics, run.timings
    figure, axes = report.figure(1, 3)
    groups = [name if name not in GRAPH_SETTINGS else f"{name}/ipc={ipc}" for name in config.sets for ipc in config.ipc]
    groups = list(dict.fromkeys(groups))
    arms = [arm for arm in GRAPH_ARMS if arm in config.arms]
    for k, arm in enumerate(arms):
        rows = []
        for x, group in enumerate(groups):
            prefix = f"{group.split('/')[0]}/whole" if arm == "whole" else f"{group}/{arm}"
            found = [m for name, m in metrics.items() if name.startswith(f"{prefix}/test_")]
            rows += [(x + 0.8 * (k / len(arms) - 0.5), found[0].mean, found[0].std)] if found else []
        if rows:
            axes[0].bar(*zip(*[(x, mean) for x, mean, _ in rows], strict=True), 0.7 / len(arms), label=arm)
            axes[0].errorbar(*zip(*rows, strict=True), fmt="none", ecolor="black", elinewidth=0.7)
    axes[0].set_xticks(range(len(groups)), labels=[group.replace("/", "\n") for group in groups])
    axes[0].set(ylabel="test score", title="networks trained on each small set", ylim=(0.3, 1))
    axes[0].legend(fontsize=6, ncols=3, loc="upper center")

    condensing = [(name, ipc) for name in config.sets for ipc in (config.ipc if name in GRAPH_SETTINGS else (None,))]
    for name, ipc in condensing if "doscond" in config.arms else []:
        middle = (name, "doscond") if ipc is None else (name, ipc, "doscond")
        curves = torch.stack([run.kept((seed, *middle, "condense"))["losses"] for seed in run.seeds]).mean(0)
        width = max(1, len(curves) // 50)
        smooth = curves[: len(curves) // width * width].view(-1, width).mean(1)
        label = name if ipc is None else f"{name}, {ipc}"
        axes[1].plot(torch.arange(len(smooth)) * width, smooth / smooth[0], label=label)
    axes[1].set(xlabel="drawn networks", ylabel="matching loss, relative", title="DosCond", yscale="log")
    if axes[1].lines:
        axes[1].legend(fontsize=7)

    labels, heights = [], []
    for name, ipc in condensing:
        title = name if ipc is None else f"{name}/ipc={ipc}"
        for arm in ("doscond", "dcg"):
            if f"{title}/{arm}/iteration_seconds" in timings:
                labels.append(f"{title}\n{arm}".replace("/", "\n"))
                heights.append(1000 * timings[f"{title}/{arm}/iteration_seconds"].mean)
    axes[2].bar(labels, heights, color=report.COLOURS[2])
    axes[2].set(ylabel="ms", title="one drawn network", yscale="log")
    axes[2].tick_params(axis="x", labelsize=6)
    return figure


def check_data(config: Config, folder: Path | None) -> list[str]:
    """Counts of the sets that the configuration uses; for generated ones, of every set found in the folder."""
    real = [name for name in config.sets if name not in (GENERATED_GRAPHS, GENERATED_NODES)]
    if folder is None:
        if real:
            raise UserError(f"--check-data needs --data DIR, the folder with {', '.join(real)}")
        return ["nothing to check: this preset generates its data; name a folder with --data to check that"]
    if real:
        return [line for name in real for line in check(folder, name)]
    lines, good = [], 0
    for name in SETS:
        if name in (GENERATED_GRAPHS, GENERATED_NODES):
            continue
        try:
            lines += check(folder, name)
            good += 1
        except UserError as error:
            lines.append(f"{name}: MISSING or malformed: {error}")
    if not good:
        raise UserError(f"{folder} holds none of the data sets; see Data in README.md for where each should lie")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
