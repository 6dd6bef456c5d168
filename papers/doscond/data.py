"""The paper's graph and node sets in their official layouts, and two generated families that need no files.

Below the folder of ``--data``::

    <NAME>/<NAME>_A.txt .. or <NAME>.txt                     MUTAG, NCI1, DD, PROTEINS (layouts of ``shared.tu``)
    ogbg_molhiv/raw/{edge,node-feat,num-node-list,num-edge-list,graph-label}.csv.gz     and molbbbp, molbace
    ogbg_molhiv/split/scaffold/{train,valid,test}.csv.gz
    CIFAR10/raw/CIFAR10_{train,val,test}.pt                  superpixel graphs of PyG's GNNBenchmarkDataset
    planetoid/ind.<name>.*                                   cora, citeseer, pubmed (layout of ``shared.graphs``)
    <name>/{adj_full.npz,feats.npy,class_map.json,role.json} flickr, ogbn-arxiv as GraphSAINT publishes them
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import graphs, tu
from shared.errors import UserError
from shared.files import sha256_file

TU = ("MUTAG", "NCI1", "DD", "PROTEINS")
OGB = ("ogbg-molhiv", "ogbg-molbbbp", "ogbg-molbace")
SUPERPIXELS = ("CIFAR10",)
PLANETOID = ("cora", "citeseer", "pubmed")
SAINT = ("flickr", "ogbn-arxiv")
GENERATED_GRAPHS, GENERATED_NODES = "molecules", "citations"
GRAPH_SETS = (*TU, *OGB, *SUPERPIXELS, GENERATED_GRAPHS)
NODE_SETS = (*PLANETOID, *SAINT, GENERATED_NODES)

EXPECTED: dict[str, dict[str, int]] = {
    "MUTAG": {"graphs": 188, "features": 7, "classes": 2, "train": 150, "val": 19, "test": 19},
    "NCI1": {"graphs": 4110, "features": 37, "classes": 2, "train": 3288, "val": 411, "test": 411},
    "DD": {"graphs": 1178, "features": 89, "classes": 2, "train": 942, "val": 118, "test": 118},
    "PROTEINS": {"graphs": 1113, "features": 3, "classes": 2, "train": 889, "val": 112, "test": 112},
    "ogbg-molhiv": {"graphs": 41127, "features": 9, "classes": 2, "train": 32901, "val": 4113, "test": 4113},
    "ogbg-molbbbp": {"graphs": 2039, "features": 9, "classes": 2, "train": 1631, "val": 204, "test": 204},
    "ogbg-molbace": {"graphs": 1513, "features": 9, "classes": 2, "train": 1210, "val": 151, "test": 152},
    "CIFAR10": {"graphs": 60000, "features": 5, "classes": 10, "train": 45000, "val": 5000, "test": 10000},
    "cora": {"nodes": 2708, "features": 1433, "classes": 7, "train": 140, "val": 500, "test": 1000},
    "citeseer": {"nodes": 3327, "features": 3703, "classes": 6, "train": 120, "val": 500, "test": 1000},
    "pubmed": {"nodes": 19717, "features": 500, "classes": 3, "train": 60, "val": 500, "test": 1000},
    "flickr": {"nodes": 89250, "features": 500, "classes": 7, "train": 44625, "val": 22312, "test": 22313},
    "ogbn-arxiv": {"nodes": 169343, "features": 128, "classes": 40, "train": 90941, "val": 29799, "test": 48603},
}
"""Counts of the published files and of the paper's splits."""


@dataclass(frozen=True)
class GraphData:
    """Labelled graphs and a split.

    Attributes:
        name: in metrics. classes: C. x: (N, d) float32. edges: (2, E) int64 (source, target). ptr: (G + 1,) int64.
        labels: (G,) int64 in 0..C-1. train, val, test: graph numbers, int64.
        metric: "accuracy", or "auc" for the molecules of OGB, whose networks give one logit.
        origin: hashes of files, or the parameters of the generator. real: read from files.
    """

    name: str
    classes: int
    x: Tensor
    edges: Tensor
    ptr: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    origin: Mapping[str, Any]
    real: bool = True
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        """Refuse what training would stumble over.

        Raises:
            UserError: a label out of range, an empty or overlapping split, a class without training graph, features
                that are not finite.
        """
        _check(self.name, "graph", self.labels, self.classes, (self.train, self.val, self.test), self.x)
        empty = (self.ptr.diff() < 1).nonzero()
        if len(empty):
            raise UserError(f"{self.name}: graph {int(empty[0]) + 1} has no node, expected at least 1")

    def counts(self) -> dict[str, int]:
        """The counts that ``EXPECTED`` lists."""
        sizes = {part: len(getattr(self, part)) for part in ("train", "val", "test")}
        return {"graphs": len(self.labels), "features": self.x.shape[1], "classes": self.classes, **sizes}


@dataclass(frozen=True)
class NodeData:
    """One graph with labelled nodes and a split.

    Attributes:
        name: in metrics. classes: C. x: (N, d) float32, dense or sparse COO. edges: (2, E) int64, from both ends.
        labels: (N,) int64, -1 without a label. train, val, test: node numbers, int64.
        inductive: validation and test nodes are unseen: each part is a graph of its own.
        origin: hashes of files, or the parameters of the generator. real: read from files.
    """

    name: str
    classes: int
    x: Tensor
    edges: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    origin: Mapping[str, Any]
    inductive: bool = False
    real: bool = True

    def __post_init__(self) -> None:
        """Refuse what training would stumble over.

        Raises:
            UserError: as for ``GraphData``, and an edge that names no node.
        """
        _check(self.name, "node", self.labels, self.classes, (self.train, self.val, self.test), self.x)
        if self.edges.numel() and not 0 <= int(self.edges.min()) <= int(self.edges.max()) < len(self.labels):
            ends = f"{int(self.edges.min())} to {int(self.edges.max())}"
            raise UserError(f"{self.name}: edges name nodes {ends}, expected 0 to {len(self.labels) - 1}")

    def counts(self) -> dict[str, int]:
        """The counts that ``EXPECTED`` lists."""
        sizes = {part: len(getattr(self, part)) for part in ("train", "val", "test")}
        return {"nodes": len(self.labels), "features": self.x.shape[1], "classes": self.classes, **sizes}


def _check(name: str, what: str, labels: Tensor, classes: int, parts: tuple[Tensor, ...], x: Tensor) -> None:
    members = torch.cat(parts)
    if len(torch.unique(members)) != len(members) or any(len(part) == 0 for part in parts):
        raise UserError(f"{name}: expected disjoint train, val and test parts with at least one {what} each")
    if int(members.min()) < 0 or int(members.max()) >= len(labels):
        raise UserError(f"{name}: the split names {what} {int(members.max()) + 1}, there are {len(labels)}")
    wrong = (labels[members] < 0) | (labels[members] >= classes)
    if wrong.any():
        at = members[wrong][0]
        raise UserError(f"{name}: {what} {int(at) + 1} has label {int(labels[at])}, expected 0 to {classes - 1}")
    counts = torch.bincount(labels[parts[0]], minlength=classes).tolist()
    if 0 in counts:
        raise UserError(f"{name}: class {counts.index(0)} has no training {what}, counts are {counts}")
    values = x.coalesce().values() if x.is_sparse else x
    if not bool(values.isfinite().all()):
        raise UserError(f"{name}: a feature is not finite")


# ---- graph sets ------------------------------------------------------------------------------------------------------


def load_graphs(folder: Path | None, name: str, split: int = 0) -> GraphData:
    """Read a set of graphs.

    Args:
        folder: laid out as described above. name: one of ``GRAPH_SETS`` with files.
        split: seed of the random split of the TU sets; 0 is the official code's. The others have one published split.

    Raises:
        UserError: no folder, unknown name, a missing file (where it should lie), malformed content.
    """
    if folder is None:
        raise UserError(f"{name} needs --data DIR, the folder that holds it")
    if name in TU:
        return _load_tu(folder, name, split)
    if name in OGB:
        return _load_ogb(folder, name)
    if name in SUPERPIXELS:
        return _load_superpixels(folder, name)
    raise UserError(f"unknown graph set {name!r}, expected one of {', '.join((*TU, *OGB, *SUPERPIXELS))}")


def _load_tu(folder: Path, name: str, split: int) -> GraphData:
    """Attributes and one-hot labels; a set with neither gets node degrees."""
    made = tu.load_tu(folder, name)
    x = made.features()
    if not x.shape[1]:
        x = torch.bincount(made.edges[0], minlength=made.nodes)[:, None].float()
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(split))
    tenth = (len(made) + 9) // 10
    parts = (order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth])
    return GraphData(name, made.classes, x, made.edges, made.ptr, made.graph_labels, *parts, made.origin())


def _file(path: Path, name: str) -> Path:
    if not path.is_file():
        raise UserError(f"{name}: no file {path.name}; expected at {path}")
    return path


def _csv(path: Path, dtype: type) -> np.ndarray:
    """(rows, columns) numbers of a compressed file without header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file
            return np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: {error}; expected numbers between commas, gzip") from error


def _load_ogb(folder: Path, name: str) -> GraphData:
    """Nine integer atom features as they are, bonds from both ends, scaffold split."""
    base = folder / name.replace("-", "_")
    raw = {part: base / "raw" / f"{part}.csv.gz" for part in ("num-node-list", "num-edge-list", "edge", "node-feat")}
    raw["graph-label"] = base / "raw" / "graph-label.csv.gz"
    splits = [base / "split" / "scaffold" / f"{part}.csv.gz" for part in ("train", "valid", "test")]
    files = [_file(path, name) for path in (*raw.values(), *splits)]
    nodes, bonds = (torch.from_numpy(_csv(raw[part], np.int64)[:, 0]) for part in ("num-node-list", "num-edge-list"))
    edges = torch.from_numpy(_csv(raw["edge"], np.int64)).t()
    x = torch.from_numpy(_csv(raw["node-feat"], np.float32))
    labels = torch.from_numpy(_csv(raw["graph-label"], np.int64)[:, 0])
    ptr = torch.cat([nodes.new_zeros(1), nodes.cumsum(0)])
    if len(x) != int(ptr[-1]) or edges.shape != (2, int(bonds.sum())) or not len(labels) == len(nodes) == len(bonds):
        found = f"{len(x)} nodes, {edges.shape[-1]} edges, {len(labels)} labels"
        raise UserError(f"{base}: {found} for counts of {int(ptr[-1])}, {int(bonds.sum())} and {len(nodes)} graphs")
    graph = torch.repeat_interleave(torch.arange(len(nodes)), bonds)
    wrong = ((edges < 0) | (edges >= nodes[graph])).any(0)
    if wrong.any():
        at = graph[wrong][0]
        raise UserError(f"{raw['edge']}: graph {int(at) + 1} has {int(nodes[at])} nodes, an edge names another")
    edges = edges + ptr[graph]
    parts = [torch.from_numpy(_csv(path, np.int64)[:, 0]) for path in splits]
    origin = {path.name: sha256_file(path) for path in files}
    return GraphData(name, 2, x, torch.cat([edges, edges.flip(0)], 1), ptr, labels, *parts, origin, metric="auc")


def _load_superpixels(folder: Path, name: str) -> GraphData:
    """Colour and position of each superpixel; directed edges to its nearest ones, weights dropped."""
    paths = [_file(folder / name / "raw" / f"{name}_{part}.pt", name) for part in ("train", "val", "test")]
    rows: list[dict[str, Tensor]] = []
    ends = [0]
    for path in paths:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no readable list of graphs ({error})") from error
        if not isinstance(loaded, list) or not all({"x", "pos", "edge_index", "y"} <= set(row) for row in loaded):
            raise UserError(f"{path}: expected a list of graphs with x, pos, edge_index and y")
        rows += loaded
        ends.append(len(rows))
    sizes = torch.tensor([len(row["x"]) for row in rows])
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    count = torch.tensor([row["edge_index"].shape[1] for row in rows])
    edges = torch.cat([row["edge_index"] for row in rows], 1).long() + torch.repeat_interleave(ptr[:-1], count)
    x = torch.cat([torch.cat([row["x"], row["pos"]], 1) for row in rows]).float()
    labels = torch.tensor([int(row["y"]) for row in rows])
    parts = [torch.arange(a, b) for a, b in pairwise(ends)]
    return GraphData(name, 10, x, edges, ptr, labels, *parts, {path.name: sha256_file(path) for path in paths})


# ---- node sets -------------------------------------------------------------------------------------------------------


def load_nodes(folder: Path | None, name: str) -> NodeData:
    """Read a graph with labelled nodes and its published split.

    Raises:
        UserError: no folder, unknown name, a missing file (where it should lie), malformed content.
    """
    if folder is None:
        raise UserError(f"{name} needs --data DIR, the folder that holds it")
    if name in PLANETOID:
        return _load_planetoid(folder, name)
    if name in SAINT:
        return _load_saint(folder, name)
    raise UserError(f"unknown node set {name!r}, expected one of {', '.join((*PLANETOID, *SAINT))}")


def _load_planetoid(folder: Path, name: str) -> NodeData:
    """Rows of features divided by their sum; 20 training nodes a class, 500 for validation, 1,000 for testing."""
    made = graphs.load_graph(folder, name, splits=0)
    coo = made.features.tocoo()
    total = np.asarray(made.features.sum(axis=1), dtype=np.float64).ravel()
    values = (coo.data / np.where(total == 0, 1.0, total)[coo.row]).astype(np.float32)
    x = _coo(torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64)), torch.from_numpy(values), coo.shape)
    parts = [torch.from_numpy(made.public_split[part]) for part in ("train", "val", "test")]
    labels = torch.from_numpy(made.labels)
    return NodeData(name, made.classes, x, torch.from_numpy(made.edges), labels, *parts, made.hashes())


def _coo(index: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False).coalesce()


def _load_saint(folder: Path, name: str) -> NodeData:
    """Features standardised by the training nodes; ogbn-arxiv made undirected; flickr inductive."""
    from scipy.sparse import load_npz

    base = folder / name
    paths = {part: _file(base / part, name) for part in ("adj_full.npz", "feats.npy", "class_map.json", "role.json")}
    try:
        adj = load_npz(paths["adj_full.npz"]).tocoo()
        x = np.load(paths["feats.npy"], allow_pickle=False).astype(np.float64)
        role, class_map = (json.loads(paths[part].read_text("utf-8")) for part in ("role.json", "class_map.json"))
        parts = [torch.tensor(role[part], dtype=torch.int64) for part in ("tr", "va", "te")]
        nodes = adj.shape[0]
        labels = torch.full((nodes,), -1)
        labels[torch.tensor([int(k) for k in class_map])] = torch.tensor(list(class_map.values()), dtype=torch.int64)
    except (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{base}: {type(error).__name__} {error}; expected the files of GraphSAINT") from error
    if x.ndim != 2 or len(x) != nodes:
        raise UserError(f"{paths['feats.npy']} has shape {x.shape}, expected ({nodes}, d)")
    known = labels >= 0
    labels[known] -= labels[known].min()
    seen = x[parts[0].numpy()]
    spread = seen.std(axis=0)
    x = (x - seen.mean(axis=0)) / np.where(spread == 0, 1.0, spread)
    edges = torch.from_numpy(np.stack([adj.row, adj.col]).astype(np.int64))
    if name == "ogbn-arxiv":
        edges = torch.cat([edges, edges.flip(0)], 1)
    key = torch.unique(edges[0] * nodes + edges[1])
    origin = {path.name: sha256_file(path) for path in paths.values()}
    features = torch.from_numpy(x.astype(np.float32))
    classes = int(labels.max()) + 1
    edges = torch.stack([key // nodes, key % nodes])
    return NodeData(name, classes, features, edges, labels, *parts, origin, inductive=name == "flickr")


def check(folder: Path, name: str) -> list[str]:
    """Counts of one set beside the expected ones, a line each.

    Raises:
        UserError: something is missing or malformed.
    """
    made = load_graphs(folder, name) if name in GRAPH_SETS else load_nodes(folder, name)
    lines = [f"{name}: {', '.join(made.origin)}"]
    for key, found in made.counts().items():
        wanted = EXPECTED[name][key]
        lines.append(f"  {key:<10}{found:>8}" + ("" if found == wanted else f"   expected {wanted}"))
    return lines


# ---- generated -------------------------------------------------------------------------------------------------------


def generate_graphs(
    generator: torch.Generator,
    graphs: int = 1200,
    train: int = 200,
    val: int = 100,
    types: int = 7,
    shift: float = 0.4,
    spread: float = 0.6,
    copying: tuple[float, float] = (0.15, 0.45),
) -> GraphData:
    """Two classes of molecule-like graphs: trees with rings, 10 to 26 nodes, each node of one of ``types`` types.

    Classes differ in how often the types occur and in how often a node repeats the type of its parent. Within a class
    every graph has its own frequencies, so that one graph says little about its class.

    Args:
        generator: CPU generator, the only source of randomness. graphs, train, val: numbers of graphs; the rest tests.
        shift: distance of a class's mean log-frequencies from the middle. spread: standard deviation between graphs.
        copying: share of nodes that repeat their parent's type, by class.

    Raises:
        ValueError: a split that leaves a part empty.
    """
    if min(train, val, graphs - train - val) < 2:
        raise ValueError(f"{graphs} graphs, {train} for training, {val} for validation: expected 2 or more each")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(graphs) % 2
    sizes = 10 + (17 * uniform(graphs)).long()
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    nodes = int(ptr[-1])
    graph = torch.repeat_interleave(torch.arange(graphs), sizes)
    place = torch.arange(nodes) - ptr[graph]
    back = (uniform(nodes).clamp_min(1e-9).log() / np.log(0.3)).long()  # mostly 0: a chain with short branches
    parent = torch.arange(nodes) - torch.minimum(1 + back, place)
    ring = (place >= 5) & (uniform(nodes) < 0.15)  # closes a ring of up to six
    pairs = [torch.stack([torch.arange(nodes), parent])[:, place > 0]]
    pairs.append(torch.stack([torch.arange(nodes), torch.arange(nodes) - 5])[:, ring])
    edges = torch.cat(pairs, 1)

    direction = torch.linspace(1, -1, types, dtype=torch.float64)
    side = 2.0 * labels - 1
    logits = shift * side[:, None] * direction
    logits = logits + spread * torch.randn(graphs, types, generator=generator, dtype=torch.float64)
    share = logits.softmax(1).cumsum(1)
    drawn = (uniform(nodes)[:, None] > share[graph]).sum(1).clamp(max=types - 1)
    copies = (place > 0) & (uniform(nodes) < torch.tensor(copying, dtype=torch.float64)[labels[graph]])
    source = torch.where(copies, parent, torch.arange(nodes))
    for _ in range(5):  # the nearest ancestor that does not copy; 2^5 exceeds the depth of any tree here
        source = source[source]
    x = torch.nn.functional.one_hot(drawn[source], types).float()

    order = torch.randperm(graphs, generator=generator)
    parts = (order[:train], order[train : train + val], order[train + val :])
    origin = {"generator": "papers.doscond.data.generate_graphs", "graphs": graphs, "train": train, "val": val}
    origin |= {"types": types, "shift": shift, "spread": spread, "copying": list(copying)}
    edges = torch.cat([edges, edges.flip(0)], 1)
    return GraphData(GENERATED_GRAPHS, 2, x, edges, ptr, labels, *parts, origin, real=False)


def generate_nodes(
    generator: torch.Generator,
    nodes: int = 1000,
    classes: int = 5,
    degree: float = 4.0,
    homophily: float = 0.75,
    words: int = 15,
    vocabulary: int = 300,
    signal: float = 0.25,
    train: int = 20,
    val: int = 200,
) -> NodeData:
    """A citation-like graph: ``degree`` neighbours on average, a share ``homophily`` of the edges within a class.

    A node's features are ``words`` draws from a vocabulary, a share ``signal`` of them from the block of its class;
    0/1, rows divided by their sum. ``train`` nodes of each class train, ``val`` validate, the rest tests.

    Raises:
        ValueError: too few nodes for the split.
    """
    if nodes < classes * (train + 2) + val:
        raise ValueError(f"{nodes} nodes, {classes} classes of {train} training nodes, {val} for validation: too few")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(nodes) % classes
    draws = int(nodes * degree / 2)
    source = (uniform(draws) * nodes).long()
    other = (uniform(draws) * (nodes // classes)).long() * classes  # the class of a node is its number modulo C
    away = (labels[source] + 1 + (uniform(draws) * (classes - 1)).long()) % classes
    target = other + torch.where(uniform(draws) < homophily, labels[source], away)
    keep = source != target
    pair = torch.stack([torch.cat([source, target]), torch.cat([target, source])])[:, keep.repeat(2)]
    key = torch.unique(pair[0] * nodes + pair[1])

    block = vocabulary // classes
    drawn = uniform(nodes, words)
    own = labels[:, None] * block + (drawn * block).long()
    word = torch.where(uniform(nodes, words) < signal, own, (drawn * vocabulary).long())
    entry = torch.unique(torch.arange(nodes)[:, None] * vocabulary + word)
    row = entry // vocabulary
    values = (1.0 / torch.bincount(row, minlength=nodes)[row]).float()
    x = _coo(torch.stack([row, entry % vocabulary]), values, (nodes, vocabulary))

    order = torch.randperm(nodes, generator=generator)
    ordered = order[labels[order].argsort(stable=True)]  # class by class
    starts = torch.bincount(labels, minlength=classes).cumsum(0) - torch.bincount(labels, minlength=classes)
    chosen = ordered[(starts[:, None] + torch.arange(train)).flatten()]
    rest = order[~torch.isin(order, chosen)]
    origin = {"generator": "papers.doscond.data.generate_nodes", "nodes": nodes, "classes": classes, "degree": degree}
    origin |= {"homophily": homophily, "words": words, "vocabulary": vocabulary, "signal": signal}
    origin |= {"train": train, "val": val}
    edges = torch.stack([key // nodes, key % nodes])
    parts = (chosen, rest[:val], rest[val:])
    return NodeData(GENERATED_NODES, classes, x, edges, labels, *parts, origin, real=False)
