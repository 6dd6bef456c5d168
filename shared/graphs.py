"""Node-classification graphs in the layouts they are published in: Planetoid pickles, Geom-GCN text files, ``.npz``.

A folder of graphs looks like this (the official repositories' own names ``data/`` and ``new_data/`` are found too)::

    planetoid/ind.<name>.{x,y,tx,ty,allx,ally,graph,test.index}      cora, citeseer, pubmed
    geom_gcn/<name>/out1_graph_edges.txt                             texas, wisconsin, cornell, film,
                                                                     chameleon, squirrel
    geom_gcn/<name>/out1_node_feature_label.txt
    geom_gcn/<name>/<name>_directed.npz                              the same graph with its splits in one file
    geom_gcn/cornell_fixed.npz                                       Cornell with its own features and labels
    splits/<name>_split_0.6_0.2_<0..9>.npz                           the ten 48/32/20 splits
"""

from __future__ import annotations

import contextlib
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import UserError
from shared.files import sha256_file
from shared.unpickle import restricted_load

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PLANETOID = ("cora", "citeseer", "pubmed")
GEOM_GCN = ("texas", "wisconsin", "cornell", "film", "chameleon", "squirrel")
FIXED = ("cornell_fixed",)
NAMES = PLANETOID + GEOM_GCN + FIXED
SPLITS = 10
FILM_FEATURES = 932
PLANETOID_PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
SPLIT_PARTS = ("train", "val", "test")

# Where each kind of file is looked for below the folder the user names.
_PLANETOID_FOLDERS = ("planetoid", "data", ".")
_GEOM_FOLDERS = ("geom_gcn", "new_data", ".")
_SPLIT_FOLDERS = ("splits", ".")

EXPECTED: dict[str, dict[str, int]] = {
    name: dict(zip(("nodes", "features", "classes", "edges", "loops", "train", "val", "test"), row))
    for name, row in {
        "cora": (2708, 1433, 7, 5278, 0, 1192, 796, 497),
        "citeseer": (3327, 3703, 6, 4552, 124, 1586, 1061, 665),
        "pubmed": (19717, 500, 3, 44324, 3, 9463, 6310, 3944),
        "texas": (183, 1703, 5, 279, 16, 87, 59, 37),
        "cornell": (183, 1703, 5, 277, 3, 87, 59, 37),
        "cornell_fixed": (183, 1703, 5, 277, 0, 87, 59, 37),
        "wisconsin": (251, 1703, 5, 450, 16, 120, 80, 51),
        "film": (7600, 932, 5, 26659, 93, 3648, 2432, 1520),
        "chameleon": (2277, 2325, 5, 31371, 50, 1092, 729, 456),
        "squirrel": (5201, 2089, 5, 198353, 140, 2496, 1664, 1041),
    }.items()
}
"""Counts of the published files: undirected edges without loops, self-loops, sizes of split 0 over labelled nodes."""


@dataclass(frozen=True)
class Graph:
    """A graph whose nodes carry features and labels.

    Attributes:
        name: one of ``NAMES``, or the caller's.
        features: (N, F) scipy CSR matrix, float32, as published (not normalised).
        labels: (N,) int64 classes 0..C-1; -1 where the publisher gives none (15 nodes of Citeseer).
        edges: (2, E) int64, distinct (source, target) pairs in row-major order; an undirected edge stands twice.
        directed: whether the direction means something (rows of the adjacency matrix are sources).
        masks: "train", "val", "test" -> (K, N) bool, one row a split; nodes without a label are in none.
        public_split: "train", "val", "test" -> node ids of the Planetoid split; empty where there is none.
        files: the files read, for hashing.
    """

    name: str
    features: csr_matrix
    labels: np.ndarray
    edges: np.ndarray
    directed: bool
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    public_split: dict[str, np.ndarray] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    def adjacency(self) -> csr_matrix:
        """(N, N) CSR matrix of ones, float32: row = source, column = target; self-loops as published."""
        from scipy.sparse import csr_matrix

        ones = np.ones(self.edges.shape[1], dtype=np.float32)
        return csr_matrix((ones, (self.edges[0], self.edges[1])), shape=(self.nodes, self.nodes))

    def undirected_edges(self) -> np.ndarray:
        """(2, M) distinct undirected edges without self-loops, smaller node first."""
        low, high = self.edges.min(axis=0), self.edges.max(axis=0)
        keep = low < high
        return distinct_edges(low[keep], high[keep], self.nodes)

    def homophily(self) -> float:
        """Share of undirected edges, self-loops left out, that join two nodes of one class."""
        source, target = self.undirected_edges()
        if not len(source):
            return 0.0
        same = (self.labels[source] == self.labels[target]) & (self.labels[source] >= 0)
        return float(same.mean())

    def counts(self) -> dict[str, int]:
        """The counts that ``EXPECTED`` lists; the sizes of split 0 only where there are splits."""
        out = {
            "nodes": self.nodes,
            "features": int(self.features.shape[1]),
            "classes": self.classes,
            "edges": int(self.undirected_edges().shape[1]),
            "loops": int((self.edges[0] == self.edges[1]).sum()),
        }
        return out | {part: int(mask[0].sum()) for part, mask in self.masks.items()}

    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of every file that was read."""
        return {path.name: sha256_file(path) for path in self.files}


def distinct_edges(source: np.ndarray, target: np.ndarray, nodes: int) -> np.ndarray:
    """(2, E) int64 distinct pairs in row-major order."""
    key = np.unique(source.astype(np.int64) * nodes + target.astype(np.int64))
    return np.stack([key // nodes, key % nodes])


def load_graph(folder: Path, name: str, splits: int = SPLITS) -> Graph:
    """Read one graph and its splits.

    Args:
        folder: the folder described at the top of this module. name: one of ``NAMES``.
        splits: how many of the ten splits to read; 0 for none.

    Raises:
        UserError: unknown name, a missing file (which, and where it should lie), or malformed content.
    """
    if name not in NAMES:
        raise UserError(f"unknown graph {name!r}, expected one of {', '.join(NAMES)}")
    if not 0 <= splits <= SPLITS:
        raise UserError(f"{splits} splits of {name} asked for, expected 0 to {SPLITS}")
    if name in PLANETOID:
        graph = _read_planetoid(folder, name)
    elif name in FIXED:
        graph = _read_npz(_find(folder, _GEOM_FOLDERS, f"{name}.npz", name), name, directed=False)
    else:
        packed = _look(folder, _GEOM_FOLDERS, f"{name}/{name}_directed.npz")
        table = _look(folder, _GEOM_FOLDERS, f"{name}/out1_node_feature_label.txt")
        if packed is not None and table is None:
            graph = _read_npz(packed, name, directed=True)
        else:
            graph = _read_geom_gcn(folder, name)
    masks, files = _read_splits(folder, graph, splits) if splits else ({}, ())
    return Graph(
        graph.name,
        graph.features,
        graph.labels,
        graph.edges,
        graph.directed,
        masks,
        graph.public_split,
        graph.files + files,
    )


def available(folder: Path) -> list[str]:
    """The names of the graphs that (at least in part) lie in ``folder``."""
    out = []
    for name in NAMES:
        places = {
            _look(folder, _PLANETOID_FOLDERS, f"ind.{name}.graph"),
            _look(folder, _GEOM_FOLDERS, f"{name}/out1_graph_edges.txt"),
            _look(folder, _GEOM_FOLDERS, f"{name}/{name}_directed.npz"),
            _look(folder, _GEOM_FOLDERS, f"{name}.npz") if name in FIXED else None,
        }
        if places != {None}:
            out.append(name)
    return out


# ---- finding files ---------------------------------------------------------------------------------------------------


def _look(folder: Path, places: Sequence[str], relative: str) -> Path | None:
    for place in places:
        path = folder / place / relative
        if path.is_file():
            return path
    return None


def _find(folder: Path, places: Sequence[str], relative: str, name: str) -> Path:
    path = _look(folder, places, relative)
    if path is None:
        where = f"{folder / places[0] / relative}"
        hint = "; put the eight Planetoid files ind.pubmed.* there" if name == "pubmed" else ""
        raise UserError(f"{name}: no file {Path(relative).name}; expected at {where}{hint}")
    return path


# ---- Planetoid -------------------------------------------------------------------------------------------------------


def _read_planetoid(folder: Path, name: str) -> Graph:
    """The eight ``ind.<name>.*`` files. Test rows are put where ``test.index`` says; ids it skips become empty rows."""
    from scipy.sparse import csr_matrix, issparse, vstack

    paths = {part: _find(folder, _PLANETOID_FOLDERS, f"ind.{name}.{part}", name) for part in PLANETOID_PARTS}
    parts: dict[str, Any] = {part: restricted_load(paths[part]) for part in PLANETOID_PARTS[:-1]}
    for part in ("x", "tx", "allx"):
        if not issparse(parts[part]):
            raise UserError(f"{paths[part]} holds a {type(parts[part]).__name__}, expected a scipy sparse matrix")
    for part in ("y", "ty", "ally"):
        if not isinstance(parts[part], np.ndarray) or parts[part].ndim != 2:
            raise UserError(f"{paths[part]} holds no two-dimensional array, expected one-hot labels")
    if not isinstance(parts["graph"], dict):
        raise UserError(f"{paths['graph']} holds a {type(parts['graph']).__name__}, expected a dict of neighbour lists")
    try:
        index = np.array(paths["test.index"].read_text().split(), dtype=np.int64)
    except ValueError as error:
        raise UserError(f"{paths['test.index']}: {error}; expected one node number a line") from error

    known = parts["allx"].shape[0]
    if len(index) != parts["tx"].shape[0] or len(set(index.tolist())) != len(index):
        raise UserError(f"{paths['test.index']} names {len(set(index.tolist()))} nodes, tx has {parts['tx'].shape[0]}")
    if not len(index) or index.min() != known:
        raise UserError(
            f"{paths['test.index']} begins at node {min(index, default=-1)}, expected {known}, the rows of allx"
        )
    nodes = int(index.max()) + 1
    if parts["tx"].shape[1] != parts["allx"].shape[1] or parts["ty"].shape[1] != parts["ally"].shape[1]:
        raise UserError(f"{paths['tx']}: other widths than allx and ally of the same graph")
    # Row i of tx belongs to the i-th *line* of test.index.
    below = csr_matrix(
        (np.ones(len(index), np.float32), (index - known, np.arange(len(index)))), shape=(nodes - known, len(index))
    )
    features = csr_matrix(vstack([parts["allx"], below @ parts["tx"]]), dtype=np.float32)
    onehot = np.zeros((nodes, parts["ally"].shape[1]))
    onehot[:known] = parts["ally"]
    onehot[index] = parts["ty"]
    labels = np.where(onehot.sum(axis=1) > 0, onehot.argmax(axis=1), -1)

    source = np.repeat(
        np.fromiter(parts["graph"], np.int64, len(parts["graph"])), [len(v) for v in parts["graph"].values()]
    )
    target = np.fromiter((n for neighbours in parts["graph"].values() for n in neighbours), np.int64, len(source))
    _check_ids(np.stack([source, target]), nodes, paths["graph"])
    edges = distinct_edges(np.concatenate([source, target]), np.concatenate([target, source]), nodes)
    trained = parts["y"].shape[0]
    public = {
        "train": np.arange(trained),
        "val": np.arange(trained, min(trained + 500, known)),
        "test": np.sort(index),
    }
    graph = Graph(name, features, labels, edges, False, public_split=public, files=tuple(paths.values()))
    return _checked(graph, paths["allx"])


# ---- Geom-GCN text ---------------------------------------------------------------------------------------------------


def _read_geom_gcn(folder: Path, name: str) -> Graph:
    """``out1_node_feature_label.txt`` and ``out1_graph_edges.txt``; repeated edge lines count once."""
    from scipy.sparse import csr_matrix

    table = _find(folder, _GEOM_FOLDERS, f"{name}/out1_node_feature_label.txt", name)
    lines = _find(folder, _GEOM_FOLDERS, f"{name}/out1_graph_edges.txt", name)
    ids: list[int] = []
    labels: list[int] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    width = FILM_FEATURES if name == "film" else -1
    for number, row in _rows(table, 3):
        try:
            ids.append(int(row[0]))
            labels.append(int(row[2]))
            entries = _numbers(row[1])
        except ValueError as error:
            raise UserError(f"{table} line {number}: {error}; expected id, numbers between commas, label") from error
        if name == "film":  # the feature column lists where the ones are
            places = np.unique(entries.astype(np.int64))
            if len(places) and (places[0] < 0 or places[-1] >= width):
                raise UserError(f"{table} line {number}: feature {places[-1]}, expected 0 to {width - 1}")
            columns.append(places)
            values.append(np.ones(len(places), np.float32))
            continue
        if width not in (-1, len(entries)):
            raise UserError(f"{table} line {number} has {len(entries)} features, the lines before it {width}")
        width = len(entries)
        columns.append(np.flatnonzero(entries))  # a NaN counts as an entry and is named by the check below
        values.append(entries[columns[-1]].astype(np.float32))
    nodes = len(ids)
    if sorted(ids) != list(range(nodes)) or not nodes:
        raise UserError(f"{table} names {len(set(ids))} distinct nodes on {nodes} lines, expected each of 0..N-1 once")
    order = np.array(ids)
    rows = np.repeat(order, [len(c) for c in columns])
    features = csr_matrix((np.concatenate(values), (rows, np.concatenate(columns))), shape=(nodes, width))
    classes = np.empty(nodes, np.int64)
    classes[order] = labels

    pairs = []
    for number, row in _rows(lines, 2):
        try:
            pairs.append((int(row[0]), int(row[1])))
        except ValueError as error:
            raise UserError(f"{lines} line {number}: {error}; expected two node numbers") from error
    listed = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    _check_ids(listed, nodes, lines)
    edges = distinct_edges(listed[0], listed[1], nodes)
    return _checked(Graph(name, features, classes, edges, True, files=(table, lines)), table)


def _rows(path: Path, fields: int) -> list[tuple[int, list[str]]]:
    """(line number, fields) of a tab-separated file with a header line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); expected a tab-separated text file") from error
    out = []
    for number, line in enumerate(text.splitlines()[1:], start=2):
        row = line.rstrip().split("\t")
        if len(row) != fields:
            raise UserError(f"{path} line {number} has {len(row)} fields between tabs, expected {fields}")
        out.append((number, row))
    return out


def _numbers(text: str) -> np.ndarray:
    """The numbers of a comma-separated list, float64."""
    out = np.empty(0)
    with warnings.catch_warnings(), contextlib.suppress(DeprecationWarning, ValueError):
        warnings.simplefilter("error")  # older versions of numpy only warn when it meets something that is no number
        out = np.fromstring(text, dtype=np.float64, sep=",")
    if len(out) != text.count(",") + 1:
        raise ValueError(f"no list of numbers: {text[:40]!r}")
    return out


# ---- npz -------------------------------------------------------------------------------------------------------------


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Named arrays of an ``.npz`` file, never unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = sorted(set(names) - set(file.files))
            if missing:
                raise UserError(f"{path} holds no array {missing[0]!r}, only {', '.join(sorted(file.files))}")
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable .npz of plain arrays ({error}); download it again") from error


def _read_npz(path: Path, name: str, directed: bool) -> Graph:
    """``node_features``, ``node_labels``, ``edges`` of one file; an undirected graph lists each edge once."""
    from scipy.sparse import csr_matrix

    content = _arrays(path, ("node_features", "node_labels", "edges"))
    labels, pairs = content["node_labels"], content["edges"]
    if content["node_features"].ndim != 2 or len(content["node_features"]) != len(labels):
        raise UserError(f"{path}: features {content['node_features'].shape} for {len(labels)} labels, expected (N, F)")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise UserError(f"{path}: edges {pairs.shape}, expected (E, 2)")
    source, target = pairs.T.astype(np.int64)
    _check_ids(np.stack([source, target]), len(labels), path)
    if not directed:
        source, target = np.concatenate([source, target]), np.concatenate([target, source])
    features = csr_matrix(content["node_features"], dtype=np.float32)
    edges = distinct_edges(source, target, len(labels))
    return _checked(Graph(name, features, labels.astype(np.int64), edges, directed, files=(path,)), path)


# ---- splits and checks -----------------------------------------------------------------------------------------------


def _read_splits(folder: Path, graph: Graph, splits: int) -> tuple[dict[str, np.ndarray], tuple[Path, ...]]:
    """The split files where they lie, else the masks inside the graph's own ``.npz``."""
    keys = [f"{part}_mask" for part in SPLIT_PARTS]
    files: list[Path] = []
    own = graph.files[0] if graph.files[0].suffix == ".npz" else None
    if own is not None and _look(folder, _SPLIT_FOLDERS, f"{graph.name}_split_0.6_0.2_0.npz") is None:
        content = _arrays(own, [f"{key}s" for key in keys])
        if any(len(content[f"{key}s"]) < splits for key in keys):
            raise UserError(f"{own} holds {len(content[f'{keys[0]}s'])} splits, asked for {splits}")
        rows = [[content[f"{key}s"][k] for key in keys] for k in range(splits)]
        where = [f"{own} split {k}" for k in range(splits)]
    else:
        files = [
            _find(folder, _SPLIT_FOLDERS, f"{graph.name}_split_0.6_0.2_{k}.npz", graph.name) for k in range(splits)
        ]
        contents = [_arrays(path, keys) for path in files]
        rows = [[content[key] for key in keys] for content in contents]
        where = [str(path) for path in files]
    masks = {part: np.empty((splits, graph.nodes), dtype=bool) for part in SPLIT_PARTS}
    for k, row in enumerate(rows):
        for part, mask in zip(SPLIT_PARTS, row, strict=True):
            if mask.shape != (graph.nodes,):
                raise UserError(f"{where[k]}: {part} mask has shape {mask.shape}, expected ({graph.nodes},)")
            masks[part][k] = mask.astype(bool) & (graph.labels >= 0)
        check_masks({part: masks[part][k] for part in SPLIT_PARTS}, where[k])
    return masks, tuple(files)


def check_masks(masks: dict[str, np.ndarray], where: str) -> None:
    """Refuse overlapping masks and an empty one.

    Args:
        masks: "train", "val", "test" -> (N,) bool. where: named in the error.

    Raises:
        UserError: says which masks and which node.
    """
    for part in SPLIT_PARTS:
        if not masks[part].any():
            raise UserError(f"{where}: the {part} mask is empty, expected at least one labelled node")
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = masks[first] & masks[second]
        if both.any():
            node = int(both.argmax())
            raise UserError(f"{where}: node {node} is in the {first} and in the {second} mask, expected disjoint masks")


def _check_ids(pairs: np.ndarray, nodes: int, path: Path) -> None:
    wrong = (pairs < 0) | (pairs >= nodes)
    if wrong.any():
        position = int(wrong.any(axis=0).argmax())
        raise UserError(
            f"{path}: edge {position + 1} is {tuple(pairs[:, position].tolist())}, expected ids 0..{nodes - 1}"
        )


def _checked(graph: Graph, path: Path) -> Graph:
    """Refuse features that are not finite and labels that are not 0..C-1."""
    bad = ~np.isfinite(graph.features.data)
    if bad.any():
        node = int(np.searchsorted(graph.features.indptr, int(bad.argmax()), side="right")) - 1
        raise UserError(f"{path}: a feature of node {node} is not finite")
    present = np.unique(graph.labels[graph.labels >= 0])
    lowest = int(graph.labels.min())
    if lowest < -1 or not np.array_equal(present, np.arange(len(present))) or not len(present):
        raise UserError(f"{path}: labels are {present.tolist()[:12]}, expected every one of 0..C-1")
    return graph
