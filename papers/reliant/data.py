"""Recidivism, Credit, DBLP and DBLP-L in the layout of the official repository, and a generated biased block graph."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import sha256_file

FOLDERS = {"recidivism": "bail", "credit": "credit", "dblp": "small", "dblp-l": "medium"}
"""Data set of the paper -> its folder in the official repository."""

ALIASES = {folder: name for name, folder in FOLDERS.items()}

EXPECTED: dict[str, dict[str, int]] = {
    "recidivism": {"nodes": 18876, "features": 18, "edges": 642616, "train": 5662, "val": 3776, "test": 9438},
    "credit": {"nodes": 30000, "features": 13, "edges": 2873716, "train": 1000, "val": 7500, "test": 7500},
    "dblp": {"nodes": 39424, "edges": 144344, "train": 19712, "val": 9855, "test": 9857},
    "dblp-l": {"nodes": 129726, "edges": 1311804},
}
"""Counts that the official logs and split files show; ``edges`` counts both directions and one self-loop a node."""

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Table:
    """How a csv of the repository is read: which columns, and the graph and split it gets when no file holds them."""

    label: str
    sensitive: str
    left_out: tuple[str, ...]
    threshold: float
    train: float
    val: float
    cap: int | None = None


TABLES = {
    "recidivism": Table("RECID", "WHITE", (), threshold=0.6, train=0.3, val=0.5),
    "credit": Table("NoDefaultNextMonth", "Age", ("Single",), threshold=0.7, train=0.5, val=0.75, cap=500),
}


@dataclass(frozen=True)
class FairData:
    """A graph whose nodes carry features, a binary label and a binary sensitive attribute.

    Attributes:
        name: name in metrics.
        pairs: (2, M) int64 undirected edges without self-loops, each once, smaller node first.
        features: (N, d) float32. labels, sens: (N,) int64 of 0 and 1.
        train, val, test: node ids, disjoint.
        origin: what identifies the data: hashes of files, or the parameters of the generator.
        files: the files read.
    """

    name: str
    pairs: Tensor
    features: Tensor
    labels: Tensor
    sens: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    origin: Mapping[str, Any]
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what training would stumble over.

        Raises:
            UserError: labels or sensitive attribute not binary, features not finite, split out of range, overlapping
                or with an empty part.
        """
        nodes = len(self.labels)
        for what, values in (("label", self.labels), ("sensitive attribute", self.sens)):
            found = values.unique().tolist()
            if found != [0, 1]:
                raise UserError(f"{self.name}: the {what} takes the values {found[:8]}, expected 0 and 1")
        if not bool(self.features.isfinite().all()):
            node = int((~self.features.isfinite()).any(1).nonzero()[0])
            raise UserError(f"{self.name}: a feature of node {node} is not finite")
        owner = torch.full((nodes,), -1)
        for i, part in enumerate(PARTS):
            index = getattr(self, part)
            if not len(index):
                raise UserError(f"{self.name}: the {part} split is empty")
            if int(index.min()) < 0 or int(index.max()) >= nodes:
                raise UserError(f"{self.name}: the {part} split names node {int(index.max())}, expected 0..{nodes - 1}")
            taken = index[owner[index] >= 0]
            if len(taken) or len(index.unique()) != len(index):
                node = int(taken[0]) if len(taken) else int(index.mode().values)
                raise UserError(f"{self.name}: node {node} is in the {part} split and once more, expected disjoint ids")
            owner[index] = i

    def counts(self) -> dict[str, int]:
        """The counts that ``EXPECTED`` lists."""
        nodes, features = self.features.shape
        out = {"nodes": nodes, "features": features, "edges": 2 * self.pairs.shape[1] + nodes}
        return out | {part: len(getattr(self, part)) for part in PARTS}

    def banded(self) -> FairData:
        """The same data with neighbours close in number (reverse Cuthill-McKee).

        The rows that a sparse product gathers then lie in the cache; nothing that is measured depends on the order.
        """
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import reverse_cuthill_mckee

        nodes, (low, high) = len(self.labels), self.pairs.numpy()
        source, target = np.concatenate([low, high]), np.concatenate([high, low])
        graph = csr_matrix((np.ones(len(source), np.float32), (source, target)), shape=(nodes, nodes))
        order = torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).astype(np.int64))
        rank = torch.empty_like(order)
        rank[order] = torch.arange(nodes)
        return replace(
            self,
            pairs=rank[self.pairs].sort(0).values,
            features=self.features[order],
            labels=self.labels[order],
            sens=self.sens[order],
            **{part: rank[getattr(self, part)] for part in PARTS},
        )


# ---- the official layout ---------------------------------------------------------------------------------------------


def load(folder: Path | None, name: str) -> FairData:
    """Read a data set of the paper.

    Args:
        folder: holds ``bail/``, ``credit/``, ``small/`` or ``medium/`` (or is that folder itself).
        name: a data set of the paper, or the name of its folder.

    Raises:
        UserError: unknown name, no folder, a missing file, malformed content.
    """
    name = ALIASES.get(name, name)
    if name not in FOLDERS:
        raise UserError(f"unknown data set {name!r}, expected one of {', '.join([*FOLDERS, *ALIASES])}")
    if folder is None:
        raise UserError(f"{name} needs --data DIR, the folder with {FOLDERS[name]}/")
    place = folder / FOLDERS[name]
    if not place.is_dir():
        place = folder
    return _read_table(place, name) if name in TABLES else _read_authors(place, name)


def _read_table(place: Path, name: str) -> FairData:
    """bail and credit: a csv, an edge list (built from the features where there is none), a split."""
    table = TABLES[name]
    path = _need(place / f"{FOLDERS[name]}.csv", name)
    with open(path, encoding="utf-8") as file:
        header = file.readline().strip().split(",")
    for column in (table.label, table.sensitive):
        if column not in header:
            raise UserError(f"{path}: no column {column}, only {', '.join(header)}")
    values = _numbers(path, delimiter=",", skiprows=1)
    if values.shape[1] != len(header):
        raise UserError(f"{path}: {values.shape[1]} columns of numbers under {len(header)} names")
    kept = [i for i, column in enumerate(header) if column != table.label and column not in table.left_out]
    raw = values[:, kept]
    labels = values[:, header.index(table.label)]
    pairs, edge_file = _read_edges(place, name, raw, table.threshold)
    if name == "credit":
        features = (raw != 0).astype(np.float32)  # the official loader of credit.npz makes a bag of words of it
    else:
        total = raw.sum(axis=1, keepdims=True)
        features = np.divide(raw, total, out=np.zeros_like(raw), where=total != 0).astype(np.float32)
    split, split_files = _read_split(place, len(labels))
    if not split:
        split = class_split(_integers(labels, path), table.train, table.val, table.cap)
    files = (path, *edge_file, *split_files)
    return _data(name, pairs, features, labels, values[:, header.index(table.sensitive)], split, files)


def _read_authors(place: Path, name: str) -> FairData:
    """DBLP and DBLP-L: bag of words in X.npz, labels.txt and sens.txt (``id value``), edgelist.txt (``u v``)."""
    paths = {part: _need(place / part, name) for part in ("X.npz", "labels.txt", "sens.txt", "edgelist.txt")}
    try:
        with np.load(paths["X.npz"], allow_pickle=False) as file:
            missing = sorted({"data", "row", "col", "shape"} - set(file.files))
            if missing:
                raise UserError(f"{paths['X.npz']}: no array {missing[0]}, only {', '.join(sorted(file.files))}")
            data, row, col, shape = (file[key] for key in ("data", "row", "col", "shape"))
    except (OSError, ValueError) as error:
        raise UserError(f"{paths['X.npz']} is no readable .npz of plain arrays ({error})") from error
    features = np.zeros(tuple(int(size) for size in shape), dtype=np.float32)
    try:
        np.add.at(features, (row, col), data.astype(np.float32))
    except IndexError as error:
        raise UserError(f"{paths['X.npz']}: {error}; expected entries inside of shape {features.shape}") from error
    columns = []
    for part in ("labels.txt", "sens.txt"):
        values = _numbers(paths[part])
        if values.shape != (len(features), 2):
            raise UserError(f"{paths[part]}: {values.shape} numbers, expected ({len(features)}, 2): id and value")
        columns.append(values[:, 1])
    pairs = _pairs(_numbers(paths["edgelist.txt"]), len(features), paths["edgelist.txt"])
    labels, sens = columns[0] == 3, columns[1] == 2
    split, split_files = _read_split(place, len(features))
    if not split:
        split = class_split(labels.astype(np.int64), 0.5, 0.75)
    return _data(name, pairs, features, labels, sens, split, (*paths.values(), *split_files))


def _data(
    name: str,
    pairs: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    sens: np.ndarray,
    split: dict[str, np.ndarray],
    files: tuple[Path, ...],
) -> FairData:
    return FairData(
        name=name,
        pairs=torch.from_numpy(pairs),
        features=torch.from_numpy(features),
        labels=torch.from_numpy(_integers(labels, files[0])),
        sens=torch.from_numpy(_integers(sens, files[0])),
        **{part: torch.from_numpy(index) for part, index in split.items()},
        origin={path.name: sha256_file(path) for path in files},
        files=files,
    )


def _need(path: Path, name: str) -> Path:
    if not path.is_file():
        raise UserError(f"{name}: no file {path.name}; expected at {path}")
    return path


def _numbers(path: Path, **kwargs: Any) -> np.ndarray:
    """A text file of numbers as a (rows, columns) float64 array."""
    try:
        values = np.loadtxt(path, ndmin=2, **kwargs)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; expected lines of numbers") from error
    if not len(values):
        raise UserError(f"{path} holds no line of numbers")
    return values


def _integers(values: np.ndarray, path: Path) -> np.ndarray:
    whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        raise UserError(f"{path}: {values[whole != values][0]} stands where whole numbers are expected")
    return whole


def _read_edges(place: Path, name: str, raw: np.ndarray, threshold: float) -> tuple[np.ndarray, tuple[Path, ...]]:
    """The edge list where one lies there; otherwise the graph of similar rows, as the official loader builds it."""
    text, packed = (place / f"{FOLDERS[name]}_edges{end}" for end in (".txt", "_undirected.npz"))
    if text.is_file():
        return _pairs(_numbers(text), len(raw), text), (text,)
    if not packed.is_file():
        return similar_pairs(raw, threshold), ()
    try:
        with np.load(packed, allow_pickle=False) as file:
            listed = np.stack([file["src"], file["dst"]], axis=1)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{packed} is no .npz with arrays src and dst of one length ({error})") from error
    return _pairs(listed, len(raw), packed), (packed,)


def _pairs(listed: np.ndarray, nodes: int, path: Path) -> np.ndarray:
    """(E, 2) listed edges -> (2, M) distinct undirected pairs without loops, smaller node first."""
    if listed.ndim != 2 or listed.shape[1] != 2:
        raise UserError(f"{path}: {listed.shape[-1]} numbers a line, expected two node ids")
    ids = _integers(listed, path)
    wrong = ((ids < 0) | (ids >= nodes)).any(axis=1)
    if wrong.any():
        line = int(wrong.argmax())
        raise UserError(f"{path} line {line + 1}: edge {tuple(ids[line].tolist())}, expected node ids 0..{nodes - 1}")
    low, high = ids.min(axis=1), ids.max(axis=1)
    key = np.unique((low * nodes + high)[low < high])
    return np.stack([key // nodes, key % nodes])


def similar_pairs(x: np.ndarray, threshold: float, block: int = 1000) -> np.ndarray:
    """The graph of the fairness benchmarks: join j to i when s_ij > threshold * (the largest s_ik with k != i).

    s = 1 / (1 + Euclidean distance). Rows are done ``block`` at a time: O(block N) memory.

    Args:
        x: (N, d) raw features, N >= 2.

    Returns:
        (2, M) int64 pairs, smaller node first (joined when either side asks for it).
    """
    from scipy.spatial.distance import cdist

    nodes = len(x)
    keys = []
    for first in range(0, nodes, block):
        similarity = cdist(x[first : first + block], x)
        similarity += 1.0
        np.reciprocal(similarity, out=similarity)
        rows = np.arange(len(similarity))
        similarity[rows, first + rows] = -1.0
        row, col = np.nonzero(similarity > threshold * similarity.max(axis=1, keepdims=True))
        row += first
        keys.append(np.minimum(row, col) * nodes + np.maximum(row, col))
    key = np.unique(np.concatenate(keys))
    return np.stack([key // nodes, key % nodes])


def _read_split(place: Path, nodes: int) -> tuple[dict[str, np.ndarray], tuple[Path, ...]]:
    """The stored split, in ``split/`` or beside the other files; nothing where none is stored."""
    inside = place / "split" if (place / "split").is_dir() else place
    paths = {part: inside / f"{part}_split.npy" for part in PARTS}
    if not any(path.is_file() for path in paths.values()):
        return {}, ()
    split = {}
    for part, path in paths.items():
        try:
            index = np.load(_need(path, "split"), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no readable .npy of numbers ({error})") from error
        split[part] = _integers(index.ravel(), path)
    named = np.unique(np.concatenate(list(split.values())))
    if len(named) < nodes:
        raise UserError(f"{inside}: the split files name {len(named)} of {nodes} nodes, expected each in one part")
    return split, tuple(paths.values())


def class_split(
    labels: np.ndarray, train: float, val: float, cap: int | None = None, seed: int = 20
) -> dict[str, np.ndarray]:
    """The official split: each class shuffled by Python's generator, cut at the shares ``train`` and ``val``.

    Args:
        labels: (N,) of 0 and 1. cap: at most so many training nodes a class (the others then are in no part).
    """
    shuffle = random.Random(seed).shuffle
    parts: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    members = [np.flatnonzero(labels == value) for value in (0, 1)]
    for index in members:
        shuffle(index)
    for index in members:
        first, second = int(train * len(index)), int(val * len(index))
        parts["train"].append(index[: first if cap is None else min(first, cap)])
        parts["val"].append(index[first:second])
        parts["test"].append(index[second:])
    return {part: np.concatenate(lists) for part, lists in parts.items()}


def check(folder: Path, name: str) -> list[str]:
    """Counts of one data set beside the expected ones, a line each.

    Raises:
        UserError: something is missing or malformed.
    """
    data = load(folder, name)
    lines = [f"{data.name}: {', '.join(str(path.relative_to(folder)) for path in data.files)}"]
    counts = data.counts()
    for key, value in EXPECTED[data.name].items():
        lines.append(f"  {key:<10}{counts[key]:>9}" + ("" if counts[key] == value else f"   expected {value}"))
    positive = [float(data.labels[data.sens == group].float().mean()) for group in (0, 1)]
    lines.append(f"  P(y=1 | s=0) {positive[0]:.3f}, P(y=1 | s=1) {positive[1]:.3f}")
    return lines


# ---- the generated graph ---------------------------------------------------------------------------------------------


def generate(generator: torch.Generator, nodes: int = 2000) -> FairData:
    """A biased block graph: edges and half of the features follow the sensitive attribute, the label leans on it.

    s ~ Bernoulli(0.5); P(y=1 | s) = 0.6 (s=1), 0.45 (s=0); four features y + N(0, 1.5), four s + N(0, 0.7). An edge has
    probability 0.02 inside of a group and 0.004 across, almost twice as much between equal labels as between unequal
    ones at the same mean, scaled so that the mean degree does not depend on N. Split 30/20/50 by class.

    Args:
        generator: CPU generator, the only source of randomness. nodes: N >= 50.
    """
    if nodes < 50:
        raise ValueError(f"{nodes} nodes, expected at least 50")
    scale = 1200 / nodes
    sens = (torch.rand(nodes, generator=generator) < 0.5).long()
    chance = torch.where(sens == 1, 0.6, 0.45)
    labels = (torch.rand(nodes, generator=generator) < chance).long()
    of_label = labels[:, None] + 1.5 * torch.randn(nodes, 4, generator=generator)
    of_group = sens[:, None] + 0.7 * torch.randn(nodes, 4, generator=generator)
    found = []
    for first in range(0, nodes, 1000):  # rows in blocks: N x N numbers would not fit for a large N
        rows = torch.arange(first, min(first + 1000, nodes))
        joined = torch.where(sens[rows][:, None] == sens, 0.02 * scale, 0.004 * scale)
        joined *= torch.where(labels[rows][:, None] == labels, 1.3, 0.7)
        hit = torch.rand(len(rows), nodes, generator=generator) < joined
        found.append((hit & (rows[:, None] < torch.arange(nodes))).nonzero() + torch.tensor([first, 0]))
    seed = int(torch.randint(2**31, (), generator=generator))
    split = class_split(labels.numpy(), 0.3, 0.5, seed=seed)
    return FairData(
        name="generated",
        pairs=torch.cat(found).t().contiguous(),
        features=torch.cat([of_label, of_group], 1),
        labels=labels,
        sens=sens,
        **{part: torch.from_numpy(index) for part, index in split.items()},
        origin={"generator": "papers.reliant.data.generate", "nodes": nodes, "seed": generator.initial_seed()},
    )
