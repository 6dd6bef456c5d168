"""The nine graphs of the paper in their official layout, and a generated family with a dial for homophily."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import graphs
from shared.errors import UserError

FILES = {
    "texas": "texas",
    "wisconsin": "wisconsin",
    "cornell": "cornell",
    "cornell_fixed": "cornell_fixed",
    "actor": "film",
    "squirrel": "squirrel",
    "chameleon": "chameleon",
    "citeseer": "citeseer",
    "pubmed": "pubmed",
    "cora": "cora",
}
"""Graph of the paper -> name of its files. ``cornell`` is the file the paper used (Texas's features and labels on
Cornell's edges); ``cornell_fixed`` is Cornell."""

HOMOPHILY = {
    "texas": 0.061,
    "wisconsin": 0.178,
    "cornell": 0.296,
    "cornell_fixed": 0.123,
    "actor": 0.217,
    "squirrel": 0.222,
    "chameleon": 0.230,
    "citeseer": 0.735,
    "cora": 0.810,
}
"""Edge homophily of the published files, to three digits, for ``--check-data``."""


@dataclass(frozen=True)
class NodeData:
    """A graph, its node features and labels, and splits.

    Attributes:
        name: name in metrics. classes: C.
        edges: (2, E) int64 pairs (source, target), as published; an undirected edge stands twice.
        features: (N, F) float32, torch sparse COO; each row sums to 1, rows without features stay empty.
        labels: (N,) int64; -1 without a label.
        train, val, test: (K, N) bool, one row a split.
        origin: what identifies the data: hashes of files, or the parameters of the generator.
    """

    name: str
    classes: int
    edges: Tensor
    features: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    origin: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse what training would stumble over.

        Raises:
            UserError: masks of another length, overlapping or empty; labels outside 0..C-1; features not finite.
        """
        nodes = len(self.labels)
        values, (row, _) = self.features.values(), self.features.indices()
        if not bool(values.isfinite().all()):
            raise UserError(f"{self.name}: a feature of node {int(row[~values.isfinite()][0])} is not finite")
        if int(self.labels.max()) >= self.classes or int(self.labels.min()) < -1:
            raise UserError(f"{self.name}: labels {int(self.labels.min())}..{int(self.labels.max())}, expected 0..C-1")
        parts = {"train": self.train, "val": self.val, "test": self.test}
        for part, mask in parts.items():
            if mask.shape != (len(self.train), nodes):
                raise UserError(f"{self.name}: {part} masks {tuple(mask.shape)}, expected ({len(self.train)}, {nodes})")
            if bool((mask & (self.labels < 0)).any()):
                raise UserError(f"{self.name}: a node without a label is in a {part} mask")
        for k in range(len(self.train)):
            graphs.check_masks({part: mask[k].numpy() for part, mask in parts.items()}, f"{self.name} split {k}")


def row_normalize(matrix: Any) -> Tensor:
    """Divide each row of a scipy sparse matrix by its sum (empty rows stay) -> torch sparse COO, float32."""
    coo = matrix.tocoo()
    total = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    values = coo.data / np.where(total == 0, 1.0, total)[coo.row]
    index = np.stack([coo.row, coo.col]).astype(np.int64)
    return torch.sparse_coo_tensor(
        torch.from_numpy(index), torch.from_numpy(values.astype(np.float32)), coo.shape, check_invariants=False
    ).coalesce()


def load(folder: Path | None, name: str, splits: int = graphs.SPLITS) -> NodeData:
    """Read a graph of the paper (layout: ``shared.graphs``) with its first ``splits`` splits.

    Raises:
        UserError: unknown name, no folder, a missing file, malformed content.
    """
    if name not in FILES:
        raise UserError(f"unknown graph {name!r}, expected one of {', '.join(FILES)}")
    if folder is None:
        raise UserError(f"graph {name} needs --data DIR, the folder with planetoid/, geom_gcn/ and splits/")
    graph = graphs.load_graph(folder, FILES[name], splits)
    return NodeData(
        name=name,
        classes=graph.classes,
        edges=torch.from_numpy(graph.edges),
        features=row_normalize(graph.features),
        labels=torch.from_numpy(graph.labels),
        train=torch.from_numpy(graph.masks["train"]),
        val=torch.from_numpy(graph.masks["val"]),
        test=torch.from_numpy(graph.masks["test"]),
        origin=graph.hashes(),
    )


def check(folder: Path, name: str) -> list[str]:
    """Counts of one graph beside the expected ones, a line each.

    Raises:
        UserError: something is missing or malformed.
    """
    graph = graphs.load_graph(folder, FILES[name])
    counts, expected = graph.counts(), graphs.EXPECTED[FILES[name]]
    lines = [f"{name}: {len(graph.files)} files, {len(graph.masks['train'])} splits"]
    for key, value in expected.items():
        found = counts[key]
        lines.append(f"  {key:<10}{found:>8}" + ("" if found == value else f"   expected {value}"))
    homophily, published = graph.homophily(), HOMOPHILY.get(name)
    off = published is not None and abs(homophily - published) > 6e-4
    lines.append(f"  homophily {homophily:8.3f}" + (f"   expected {published}" if off else ""))
    return lines


# ---- the generated family --------------------------------------------------------------------------------------------


def generate(
    homophily: float,
    generator: torch.Generator,
    nodes: int = 1000,
    classes: int = 5,
    degree: float = 8.0,
    words: int = 20,
    vocabulary: int = 500,
    signal: float = 0.3,
    name: str = "generated",
) -> NodeData:
    """A graph with heavy-tailed degrees whose edges join nodes of one class with probability ``homophily``.

    A node's features are ``words`` draws from a vocabulary: with probability ``signal`` from the block of its class,
    otherwise from all of it; 0/1, rows normalised, as in the citation graphs. One split, 48/32/20.

    Args:
        homophily: in [0, 1]. generator: CPU generator, the only source of randomness.
        nodes, classes, degree: N, C, mean number of neighbours. words, vocabulary, signal: see above.

    Raises:
        ValueError: a value out of range.
    """
    if not 0.0 <= homophily <= 1.0:
        raise ValueError(f"homophily is {homophily}, expected 0 to 1")
    if classes < 2 or nodes < 10 * classes or vocabulary < classes:
        raise ValueError(
            f"{nodes} nodes, {classes} classes and {vocabulary} words, expected N >= 10 C, C >= 2, words >= C"
        )

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    labels = (torch.arange(nodes) % classes).sort().values  # nodes of a class lie together while edges are drawn
    appeal = uniform(nodes).clamp_min(0.01) ** -0.5  # degrees with a tail d^-3, cut at ten times the smallest
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), appeal.cumsum(0)])
    first = torch.searchsorted(labels, torch.arange(classes + 1))  # where each class begins

    draws = int(nodes * degree / 2)
    source = torch.searchsorted(ends, uniform(draws) * ends[-1], right=True).clamp(1, nodes) - 1
    other = (labels[source] + 1 + (uniform(draws) * (classes - 1)).long()) % classes
    towards = torch.where(uniform(draws) < homophily, labels[source], other)
    low, high = ends[first[towards]], ends[first[towards + 1]]
    target = torch.searchsorted(ends, low + uniform(draws) * (high - low), right=True) - 1
    target = torch.minimum(torch.maximum(target, first[towards]), first[towards + 1] - 1)

    shuffle = torch.randperm(nodes, generator=generator)
    source, target = shuffle[source], shuffle[target]
    both = torch.cat([torch.stack([source, target]), torch.stack([target, source])], 1)[:, (source != target).repeat(2)]
    key = torch.unique(both[0] * nodes + both[1])
    shuffled = torch.empty_like(labels)
    shuffled[shuffle] = labels
    labels = shuffled

    block = vocabulary // classes
    drawn = torch.rand(nodes, words, generator=generator)
    own = labels[:, None] * block + (drawn * block).long()
    word = torch.where(torch.rand(nodes, words, generator=generator) < signal, own, (drawn * vocabulary).long())
    entry = torch.unique(torch.arange(nodes)[:, None] * vocabulary + word)
    row = entry // vocabulary
    values = 1.0 / torch.bincount(row, minlength=nodes)[row]
    features = torch.sparse_coo_tensor(
        torch.stack([row, entry % vocabulary]), values.float(), (nodes, vocabulary), check_invariants=False
    ).coalesce()

    rank = torch.randperm(nodes, generator=generator)
    train, val = rank < int(0.48 * nodes), (rank >= int(0.48 * nodes)) & (rank < int(0.8 * nodes))
    return NodeData(
        name=name,
        classes=classes,
        edges=torch.stack([key // nodes, key % nodes]),
        features=features,
        labels=labels,
        train=train[None],
        val=val[None],
        test=~(train | val)[None],
        origin={
            "generator": "papers.ggcn.data.generate",
            "homophily": homophily,
            "nodes": nodes,
            "classes": classes,
            "degree": degree,
            "words": words,
            "vocabulary": vocabulary,
            "signal": signal,
        },
    )
