"""Train the benchmark's graph networks and feature-only classifiers to tell bots and stances of Twitter accounts.

The default run generates its data: 3,000 accounts with MGTAB's columns and seven relations. The presets named after a
part of the benchmark run the paper's protocol on the published files; these need --data.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.errors import UserError, user_errors

HOMOGENEOUS = ("gcn", "gat", "sage")
"""Networks that merge the relations."""
RELATIONAL = ("rgcn", "botrgcn", "hgt", "shgn", "rgt")
"""Networks that tell them apart."""
NETWORKS = HOMOGENEOUS + RELATIONAL
CLASSIFIERS = ("adaboost", "forest", "tree", "xgboost", "svm", "logistic", "bayes", "knn", "mlp")
ALL = tuple(range(7))

DEFECTS = {
    "columns": "BotRGCN reads its profile columns one place too far right",
    "dropout_validation": "the validation accuracy is that of the training pass, with dropout, before the step",
    "test_selection": "HGT keeps the epoch of the best test accuracy",
    "same_layer": "S-HGN and HGT apply their first layer twice",
    "plain_softmax": "S-HGN leaves the earlier attention out of its sum",
    "two_relations": "RGT uses the first two relations only",
    "swapped_scores": "precision and recall change places for all networks but HGT and RGT",
}
"""What the official code does otherwise than it says; each is off unless named."""


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of one network; ``options`` are its own keyword arguments."""

    hidden: int = 256
    dropout: float = 0.3
    lr: float = 1e-3
    weight_decay: float = 5e-4
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    **{name: Setting() for name in (*HOMOGENEOUS, "rgcn", "botrgcn")},
    "hgt": Setting(options={"linear": 128, "out": 32}),
    "shgn": Setting(dropout=0.5, options={"linear": 128, "out": 32}),
    "rgt": Setting(hidden=128, dropout=0.5, weight_decay=5e-3, options={"out": 64}),
}
"""The official scripts' defaults."""


@dataclass(frozen=True)
class Config:
    """What to run. Fields that are None take the paper's value for the network."""

    dataset: Literal["generated", "mgtab", "mgtab-large", "cresci-15"] = "mgtab"
    """Data set; all but the generated one are read from --data."""
    tasks: tuple[str, ...] = ("bot", "stance")
    """What to predict: bot, stance."""
    classifiers: tuple[str, ...] = ()
    """Feature-only classifiers to train."""
    networks: tuple[str, ...] = ()
    """Graph networks to train with --relations."""
    relations: tuple[int, ...] = (0, 1)
    """Relations: 0 followers, 1 friends, 2 mention, 3 reply, 4 quoted, 5 url, 6 hashtag."""
    all_relations: tuple[str, ...] = ()
    """Networks to train with all seven relations as well."""
    merged_relations: tuple[str, ...] = ()
    """Networks to train with all seven relations taken for one as well: without the edges' types."""
    each_relation: tuple[str, ...] = ()
    """Networks to train with each relation alone as well."""
    defects: tuple[str, ...] = ()
    """Faults of the official code to repeat; the README lists them."""
    epochs: int = 200
    """Full-batch epochs."""
    hidden: int | None = None
    """Hidden units; HGT's and S-HGN's later widths follow."""
    dropout: float | None = None
    """Dropout."""
    lr: float | None = None
    """Learning rate of AdamW."""
    weight_decay: float | None = None
    """Weight decay of AdamW."""
    heads: int = 4
    """RGT: attention heads along a relation."""
    semantic_heads: int = 4
    """RGT: attention heads over the relations."""
    rel_dim: int = 200
    """S-HGN: width of a relation's vector."""
    beta: float = 0.05
    """S-HGN: share of the earlier layer's attention."""
    nodes: int = 3000
    """Generated data: accounts."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        choices: tuple[tuple[str, tuple[str, ...], bool], ...] = (
            ("tasks", ("bot", "stance"), True),
            ("classifiers", CLASSIFIERS, False),
            ("networks", NETWORKS, False),
            ("all_relations", NETWORKS, False),
            ("merged_relations", NETWORKS, False),
            ("each_relation", NETWORKS, False),
            ("defects", tuple(DEFECTS), False),
        )
        for name, known, needed in choices:
            chosen = getattr(self, name)
            if set(chosen) - set(known) or len(set(chosen)) != len(chosen) or (needed and not chosen):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {' '.join(chosen)}: expected different ones among {', '.join(known)}")
        beyond = {*self.all_relations, *self.merged_relations, *self.each_relation}
        if not (self.classifiers or self.networks or beyond):
            raise ValueError("nothing to train: name --classifiers, --networks, --all-relations or --each-relation")
        relations = self.relations
        if not relations or set(relations) - set(ALL) or len(set(relations)) != len(relations):
            raise ValueError(f"--relations {' '.join(map(str, relations))}: expected different ones among 0..6")
        for name, least in (("epochs", 1), ("hidden", 8), ("heads", 1), ("semantic_heads", 1), ("rel_dim", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")
        if self.hidden is not None and self.hidden % 8:
            raise ValueError(f"--hidden is {self.hidden}, expected a multiple of 8")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}, expected 0 <= dropout < 1")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"--lr is {self.lr}, expected > 0")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"--weight-decay is {self.weight_decay}, expected >= 0")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"--beta is {self.beta}, expected 0 to 1")
        if self.nodes < 100:
            raise ValueError(f"--nodes is {self.nodes}, expected at least 100")
        if self.dataset == "cresci-15":
            if "stance" in self.tasks or "botrgcn" in {*self.networks, *beyond}:
                raise ValueError("cresci-15 has no stance labels and other columns than BotRGCN needs: --tasks bot")
            if beyond or set(relations) - {0, 1}:
                raise ValueError("cresci-15 has relations 0 and 1 only: choose with --relations")


def setting(config: Config, network: str) -> Setting:
    """The paper's hyper-parameters of a network, with what the command line says of it."""
    made = SETTINGS[network]
    options = dict(made.options)
    given = {name: getattr(config, name) for name in ("hidden", "dropout", "lr", "weight_decay")}
    made = replace(made, **{name: value for name, value in given.items() if value is not None})
    if config.hidden is not None and options:  # the later widths keep their ratio, as far as it makes sense
        options["out"] = min(options["out"], config.hidden)
        if "linear" in options:
            options["linear"] = config.hidden // 2
    if network in ("hgt", "shgn") and "same_layer" in config.defects:
        options |= {"same_layer": True, "linear": made.hidden}
    if network == "shgn":
        options |= {"rel_dim": config.rel_dim, "beta": config.beta, "plain": "plain_softmax" in config.defects}
    if network == "rgt":
        options |= {"heads": config.heads, "semantic_heads": config.semantic_heads}
        options["limit"] = 2 if "two_relations" in config.defects else None
    if network == "botrgcn" and "columns" in config.defects:
        options |= {"numeric": (4, 6, 7, 8, *range(10, 16)), "categorical": (1, 2, 3, 5, 9, *range(16, 21))}
    return replace(made, options=options)


@dataclass(frozen=True)
class Job:
    """One method to train for one seed. Metrics are called ``<data set>/<task>/<arm>/test_<score>``."""

    task: str
    arm: str
    method: str
    relations: tuple[int, ...] | None = None
    """``None``: a feature-only classifier."""
    merged: bool = False
    """All edges are of the first type."""


def jobs(config: Config) -> Iterator[Job]:
    """Everything that a configuration trains for one seed, in order."""
    for task in config.tasks:
        for name in config.classifiers:
            yield Job(task, name, name)
        for name in config.networks:
            yield Job(task, name, name, config.relations)
        for name in config.all_relations:
            yield Job(task, f"{name}/relations=all", name, ALL)
        for name in config.merged_relations:
            yield Job(task, f"{name}/relations=merged", name, ALL, merged=True)
        for name in config.each_relation:
            for relation in ALL:
                yield Job(task, f"{name}/relations={RELATIONS[relation]}", name, (relation,))


CONVOLUTIONAL = ("gcn", "gat", "sage", "rgcn", "botrgcn")
ATTENTION = ("hgt", "shgn", "rgt")


def _paper(config: Config, hours: float, seeds: Any, data: str = "MGTAB", **more: Any) -> Preset:
    return Preset(config, seeds=seeds, data=data, needs_data=True, claims=False, hours=hours, **more)


FIRST, SECOND = range(5), range(1, 6)
PRESETS = {
    "default": Preset(
        Config(
            dataset="generated",
            classifiers=("forest", "tree", "svm", "logistic", "bayes", "knn"),
            networks=NETWORKS,
            all_relations=tuple(name for name in NETWORKS if name != "rgt"),  # it takes as long as the others together
            merged_relations=("rgcn",),
            each_relation=("rgcn",),
            epochs=60,
            hidden=64,
            heads=2,
            semantic_heads=2,
        ),
        seeds=3,
        data="generated accounts",
        hours=0.06,
        why_not_comparable="generated data, a quarter of the width",
    ),
    "smoke": Preset(
        Config(
            dataset="generated",
            tasks=("bot",),
            classifiers=("bayes",),
            networks=("gcn", "rgcn", "rgt"),
            epochs=2,
            hidden=8,
            heads=1,
            nodes=200,
        ),
        seeds=1,
        data="generated accounts",
        hours=0.002,
        claims=False,
        why_not_comparable="two epochs",
    ),
    "features": _paper(Config(classifiers=CLASSIFIERS), 1.0, FIRST),
    "convolutional": _paper(Config(networks=CONVOLUTIONAL), 1.2, FIRST, note="GCN, GAT, GraphSAGE, RGCN, BotRGCN"),
    "attention": _paper(Config(networks=ATTENTION), 3.0, SECOND, note="HGT, S-HGN, RGT"),
    "relations": _paper(
        Config(networks=("rgcn",), all_relations=("rgcn",), each_relation=("rgcn",)),
        1.3,
        FIRST,
        note="RGCN with each relation alone, with followers and friends, with all",
    ),
    "official-convolutional": _paper(
        Config(networks=CONVOLUTIONAL, defects=("columns", "dropout_validation")),
        1.2,
        FIRST,
        note="as the official script selects the epoch and reads the columns",
    ),
    "official-attention": _paper(
        Config(networks=ATTENTION, defects=("dropout_validation", "test_selection", "same_layer", "plain_softmax")),
        3.0,
        SECOND,
        note="as the official scripts, with the widths that let them run",
    ),
    "cresci-15": _paper(
        Config(dataset="cresci-15", tasks=("bot",), networks=("gcn", "gat", "sage", "rgcn"), weight_decay=5e-3),
        0.5,
        FIRST,
        data="Cresci-15, standardised",
        note="no number of it was seen",
    ),
    "large": _paper(
        Config(dataset="mgtab-large", networks=("gcn", "sage", "rgcn", "botrgcn")),
        24.0,
        [0],
        data="MGTAB-large",
        hardware="16 CPU cores, 64 GB",
        note="full batch, where the official script samples neighbours",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from shared import report  # noqa: E402
from shared.run import Run, Unit  # noqa: E402

from data import RELATIONS, TASKS, Accounts, describe, generate, load  # noqa: E402
from model import GAT, GCN, HGT, RGCN, RGT, SAGE, SHGN, BotRGCN, RelationGraph, classifier, scores  # noqa: E402

SMALL = 5000
"""Sets with fewer accounts are trained on one thread."""

CLASSES: dict[str, Any] = {
    "gcn": GCN,
    "gat": GAT,
    "sage": SAGE,
    "rgcn": RGCN,
    "botrgcn": BotRGCN,
    "hgt": HGT,
    "shgn": SHGN,
    "rgt": RGT,
}


def build(network: str, made: Setting, features: int, classes: int, relations: int) -> torch.nn.Module:
    """A network with the sizes and options of a setting."""
    return CLASSES[network](features, made.hidden, classes, relations, dropout=made.dropout, **made.options)


class Problem:
    """Accounts on the device of the run, with the graph of each selection of relations made once."""

    def __init__(self, accounts: Accounts, device: torch.device) -> None:
        self.accounts, self.device = accounts, device
        self.x = accounts.features.to(device)
        self._made: tuple[object, RelationGraph] | None = None

    def graph(self, relations: tuple[int, ...], merged: bool = False) -> RelationGraph:
        """The graph of some relations, ``merged`` into one or not."""
        key = relations, merged
        if self._made is None or self._made[0] != key:
            self._made = None  # jobs of one selection follow one another; the forms of a large graph take memory
            edges, types = self.accounts.select(relations)
            types = torch.zeros_like(types) if merged else types
            self._made = key, RelationGraph(edges, types, len(self.x), len(relations)).to(self.device)
        return self._made[1]


def fit_network(unit: Unit, run: Run, problem: Problem, job: Job, seed: int) -> dict[str, float]:
    """Full-batch training; the scores on the test users at the epoch of the best validation accuracy (Sec. 3.1)."""
    config, made = run.config, setting(run.config, job.method)
    assert job.relations is not None
    x, graph = problem.x, problem.graph(job.relations, job.merged)
    labels = problem.accounts.labels[job.task].to(run.device)
    train, val, test = (part.to(run.device) for part in problem.accounts.splits(job.task, seed))
    # Networks of one shape begin alike, so that with and without types they differ in the types only.
    torch.manual_seed(run.derive_seed("network", job.task, job.method, seed))
    with user_errors():
        model = build(job.method, made, x.shape[1], len(TASKS[job.task]), len(job.relations))
    fused = run.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.lr, weight_decay=made.weight_decay, fused=fused)
    model, optimizer = run.setup(model, optimizer)
    unit.attach(model=model, optimizer=optimizer)
    state = unit.state
    state.setdefault("best", -1.0)
    for _ in unit.steps(config.epochs):
        model.train()
        optimizer.zero_grad()
        logits = model(x, graph)
        loss = F.cross_entropy(logits[train], labels[train])
        run.backward(loss)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            prediction = model(x, graph).argmax(1)
        judged, users = prediction, val
        if job.method == "hgt" and "test_selection" in config.defects:
            users = test
        elif "dropout_validation" in config.defects:
            judged = logits.argmax(1)
        accuracy = float((judged[users] == labels[users]).double().mean())
        unit.log(loss=loss, val_accuracy=accuracy)
        if accuracy > state["best"]:
            swapped = "swapped_scores" in config.defects and job.method not in ("hgt", "rgt")
            state["best"], state["scores"] = accuracy, scores(prediction[test], labels[test], swapped)
    return state["scores"]


def fit_classifier(problem: Problem, job: Job, seed: int) -> dict[str, float]:
    """Train a feature-only classifier on the train users and score it on the test users (Sec. 3.4)."""
    labels = problem.accounts.labels[job.task]
    train, _, test = problem.accounts.splits(job.task, seed)
    x = problem.accounts.features
    made = classifier(job.method, seed).fit(x[train].numpy(), labels[train].numpy())
    return scores(torch.from_numpy(made.predict(x[test].numpy())), labels[test])


def accounts_of(config: Config, run: Run, seed: int) -> Accounts:
    """Read or generate the data set of a seed, and record it."""
    if config.dataset == "generated":
        with user_errors():
            accounts = generate(run.derive_seed("data", seed), config.nodes)
        run.data_used("generated", kind="generated", spec=accounts.origin)
    else:
        accounts = load(run.data, config.dataset)
        run.data_used(accounts.name, kind="real", spec=accounts.origin)
    return accounts


def train(config: Config, run: Run) -> None:
    """Train every method on every seed and task, then decide the claims and draw the figure."""
    generated = config.dataset == "generated"
    if generated and run.data is not None:
        raise UserError(
            f"preset {run.preset_name} generates its data; for those in --data name another (--list-presets)"
        )
    threads, problem = torch.get_num_threads(), None
    for seed in run.seeds:
        if generated or problem is None:
            problem = Problem(accounts_of(config, run, seed), run.device)
        # On a small set a second thread has little to do, and with one no sum depends on the machine.
        torch.set_num_threads(1 if len(problem.x) < SMALL else threads)
        by_key = {(seed, job.task, job.arm): job for job in jobs(config)}
        for unit in run.units(by_key):
            job = by_key[unit.key]
            found = (
                fit_classifier(problem, job, seed)
                if job.relations is None
                else fit_network(unit, run, problem, job, seed)
            )
            name = f"{problem.accounts.name}/{job.task}/{job.arm}"
            timings = {} if job.relations is None else {f"{name}/epoch_seconds": unit.seconds / config.epochs}
            unit.finish({f"{name}/test_{score}": value for score, value in found.items()}, timings)
    torch.set_num_threads(threads)
    if run.preset.claims and generated:
        decide(config, run)
    run.figure(draw(config, run))


def decide(config: Config, run: Run) -> None:
    """The paper's findings as comparisons on the generated set (thresholds: paper.toml).

    A claim about methods that the command line left out is not decided.
    """
    means = {name: summary.mean for name, summary in run.metrics.items()}
    every = list(jobs(config))

    def accuracy(task: str, arm: str) -> float:
        return means[f"generated/{task}/{arm}/test_accuracy"]

    def graphs_beat_features(margin: float) -> tuple[bool, dict[str, float]]:
        found: dict[str, list[float]] = {f"{task}_{kind}": [] for task in TASKS for kind in ("graph", "features")}
        for job in every:
            found[f"{job.task}_{'features' if job.relations is None else 'graph'}"].append(accuracy(job.task, job.arm))
        if not all(found.values()):
            raise KeyError("a task, or one of the two kinds of methods")
        best = {name: max(values) for name, values in found.items()}
        return min(best[f"{task}_graph"] - best[f"{task}_features"] for task in TASKS) >= margin, best

    def types_beat_merged_edges(margin: float) -> tuple[bool, dict[str, float]]:
        rgcn, gcn = accuracy("bot", "rgcn/relations=all"), accuracy("bot", "gcn/relations=all")
        return rgcn - gcn >= margin, {"rgcn": rgcn, "gcn": gcn}

    def types_themselves_help(margin: float) -> tuple[bool, dict[str, float]]:
        typed, merged = accuracy("bot", "rgcn/relations=all"), accuracy("bot", "rgcn/relations=merged")
        return typed - merged >= margin, {"typed": typed, "merged": merged}

    def two_relations_beat_one(margin: float) -> tuple[bool, dict[str, float]]:
        if config.relations != (0, 1):
            raise KeyError("the pair of followers and friends")
        two, one = accuracy("stance", "rgcn"), accuracy("stance", "rgcn/relations=followers")
        return two - one >= margin, {"two": two, "followers": one}

    def all_relations_beat_noise(margin: float) -> tuple[bool, dict[str, float]]:
        seven, noise = accuracy("bot", "rgcn/relations=all"), accuracy("bot", "rgcn/relations=hashtag")
        return seven - noise >= margin, {"all": seven, "hashtag": noise}

    def relation_aware_beat_homogeneous(margin: float) -> tuple[bool, dict[str, float]]:
        groups = {}
        for group, networks in (("relational", RELATIONAL), ("homogeneous", HOMOGENEOUS)):
            found = [accuracy("bot", f"{network}/relations=all") for network in networks if network != "rgt"]
            groups[group] = sum(found) / len(found)
        return groups["relational"] - groups["homogeneous"] >= margin, groups

    claims: tuple[Callable[[float], tuple[bool, dict[str, float]]], ...] = (
        graphs_beat_features,
        types_beat_merged_edges,
        types_themselves_help,
        two_relations_beat_one,
        all_relations_beat_noise,
        relation_aware_beat_homogeneous,
    )
    for claim in claims:
        name = claim.__name__
        try:
            holds, measured = claim(run.threshold(name, "margin"))
        except KeyError as error:
            run.print(f"claim {name} is not decided without {error.args[0]}")
        else:
            run.claim(name, holds, **measured)


def draw(config: Config, run: Run) -> Any:
    """Test accuracy of every method, a panel a task; classifiers, networks, and other relations in three colours."""
    metrics, every = run.metrics, list(jobs(config))
    prefix = next(iter(metrics)).partition("/")[0]
    figure, axes = report.figure(1, len(config.tasks), width=5.0, height=4.6, squeeze=False)
    for axis, task in zip(axes[0], config.tasks, strict=True):
        of_task = [job for job in every if job.task == task]
        found = [metrics[f"{prefix}/{task}/{job.arm}/test_accuracy"] for job in of_task]
        kinds = [0 if job.relations is None else 1 if job.relations == config.relations else 2 for job in of_task]
        places = range(len(of_task))
        colours = [report.COLOURS[kind] for kind in kinds]
        axis.barh(places, [m.mean for m in found], xerr=[m.std for m in found], color=colours)
        axis.set_yticks(places, labels=[job.arm.replace("relations=", "") for job in of_task])
        axis.invert_yaxis()
        axis.set_xlim(max(0.0, min(m.mean for m in found) - 0.1), 1.0)
        axis.set(title=task, xlabel="test accuracy")
    return figure


def check_data(config: Config, folder: Path | None) -> list[str]:
    """Counts of the data set beside the published ones."""
    if folder is None:
        if config.dataset == "generated":
            return ["nothing to check: this preset generates its data; name a folder with --data to check MGTAB there"]
        raise UserError("--check-data needs --data DIR, the folder with the data set's files")
    return describe(load(folder, "mgtab" if config.dataset == "generated" else config.dataset))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
