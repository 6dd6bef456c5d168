"""Graph-classification sets of the TU Dortmund collection, in the two text layouts they are published in.

The collection's own layout, one folder a set (also found: the files directly in the folder, or below ``raw/``)::

    <NAME>/<NAME>_A.txt                 "i, j" a line: an edge between nodes i and j, numbered from 1 over all graphs
    <NAME>/<NAME>_graph_indicator.txt   line i: the number, from 1, of the graph that node i is in
    <NAME>/<NAME>_graph_labels.txt      line g: the class of graph g
    <NAME>/<NAME>_node_labels.txt       line i: the label of node i (not in every set)
    <NAME>/<NAME>_node_attributes.txt   line i: numbers between commas (not in every set)
    <NAME>/<NAME>_edge_labels.txt       line k: the label of the edge on line k of _A.txt (not in every set)

One file a set, as it comes with the code of DGCNN::

    <NAME>.txt      number of graphs; then a graph at a time: a line "nodes class", and a line a node:
                    "label k neighbour_1 .. neighbour_k [attributes]", neighbours numbered from 0 within the graph
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import sha256_file

_COUNTS = ("graphs", "classes", "nodes_per_graph", "edges_per_graph", "label_width")
EXPECTED: dict[str, dict[str, float]] = {
    name: dict(zip(_COUNTS, row, strict=True))
    for name, row in {
        "MUTAG": (188, 2, 17.93, 19.79, 7),
        "PTC_MR": (344, 2, 14.29, 14.69, 18),
        "ENZYMES": (600, 6, 32.63, 62.14, 3),
        "PROTEINS": (1113, 2, 39.06, 72.82, 3),
        "DD": (1178, 2, 284.32, 715.66, 89),
        "NCI1": (4110, 2, 29.87, 32.30, 37),
        "NCI109": (4127, 2, 29.68, 32.13, 38),
        "IMDB-BINARY": (1000, 2, 19.77, 96.53, 0),
        "IMDB-MULTI": (1500, 3, 13.00, 65.94, 0),
        "REDDIT-BINARY": (2000, 2, 429.63, 497.75, 0),
        "REDDIT-MULTI-5K": (4999, 5, 508.52, 594.87, 0),
        "COLLAB": (5000, 3, 74.49, 2457.78, 0),
    }.items()
}
"""What the collection states: graphs, classes, mean nodes and undirected edges of a graph, width of one-hot labels."""

EXPECTED_DGCNN = {"PTC_MR": {"nodes_per_graph": 25.56, "edges_per_graph": 25.96, "label_width": 21}}
"""Where the one-file layout holds something else: its PTC_MR has larger graphs, with 19 labels numbered up to 20."""


@dataclass(frozen=True)
class TUGraphs:
    """G graphs with N nodes and E directed edges in all.

    Attributes:
        name: of the set. layout: "tu" or "dgcnn".
        edges: (2, E) int64 node numbers from 0 over all graphs, in the order published; each edge from both ends.
        node_graph: (N,) int64 the graph of each node, never decreasing. ptr: (G + 1,) int64; the nodes of graph g are
            ``ptr[g] .. ptr[g + 1] - 1``, at least one.
        graph_labels: (G,) int64 classes 0..C-1 in the order of the published values.
        label_values: (C,) int64 published value of each class.
        node_labels: (N,) int64 as published, or None. node_attributes: (N, d) float32, or None.
        edge_labels: (E,) int64 as published, or None.
        files: the files read, for hashing.
    """

    name: str
    layout: str
    edges: Tensor
    node_graph: Tensor
    ptr: Tensor
    graph_labels: Tensor
    label_values: Tensor
    node_labels: Tensor | None = None
    node_attributes: Tensor | None = None
    edge_labels: Tensor | None = None
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.graph_labels)

    @property
    def nodes(self) -> int:
        """Number of nodes of all graphs."""
        return len(self.node_graph)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.label_values)

    @property
    def original_labels(self) -> Tensor:
        """(G,) int64 classes as published."""
        return self.label_values[self.graph_labels]

    def sizes(self) -> Tensor:
        """(G,) int64 nodes of each graph."""
        return self.ptr.diff()

    def one_hot(self) -> Tensor:
        """(N, L) float32 one-hot node labels, L = largest - smallest + 1; L = 0 where the set has none."""
        if self.node_labels is None:
            return torch.zeros(self.nodes, 0)
        return torch.nn.functional.one_hot(self.node_labels - self.node_labels.min()).float()

    def features(self) -> Tensor:
        """(N, d + L) float32: node attributes, then one-hot node labels; no column where the set has neither."""
        parts = [self.one_hot()]
        if self.node_attributes is not None:
            parts.insert(0, self.node_attributes)
        return torch.cat(parts, 1)

    def counts(self) -> dict[str, float]:
        """The counts that ``EXPECTED`` lists; means to two digits."""
        pairs = torch.unique(self.edges.sort(0).values, dim=1)
        once = int((pairs[0] != pairs[1]).sum())
        found = (len(self), self.classes, self.nodes / len(self), once / len(self), self.one_hot().shape[1])
        return {name: round(value, 2) for name, value in zip(_COUNTS, found, strict=True)}

    def origin(self) -> dict[str, str]:
        """File name -> SHA-256 of every file that was read."""
        return {path.name: sha256_file(path) for path in self.files}


def load_tu(folder: Path, name: str) -> TUGraphs:
    """Read one set.

    Args:
        folder: holds the set in one of the layouts above. name: of the set, as in its file names.

    Raises:
        UserError: nothing there, a missing file, or malformed content: says the file, and the line, graph or edge.
    """
    table = _look(folder, name, f"{name}_A.txt")
    if table is not None:
        return _read_tu(table.parent, name)
    single = _look(folder, name, f"{name}.txt")
    if single is not None:
        return _read_dgcnn(single, name)
    raise UserError(f"no graph set {name} in {folder}, expected {name}/{name}_A.txt and its companions, or {name}.txt")


def check_tu(folder: Path, name: str) -> list[str]:
    """Counts of one set beside the expected ones, a line each.

    Raises:
        UserError: the set is missing or malformed.
    """
    graphs = load_tu(folder, name)
    expected = EXPECTED.get(name, {}) | (EXPECTED_DGCNN.get(name, {}) if graphs.layout == "dgcnn" else {})
    if graphs.layout == "dgcnn" and not expected.get("label_width", 1):
        expected["label_width"] = 1  # that layout gives every node of an unlabelled set the same label
    per_class = torch.bincount(graphs.graph_labels).tolist()
    classes = ", ".join(f"{n} of class {v}" for v, n in zip(graphs.label_values.tolist(), per_class, strict=True))
    lines = [f"{name}: {', '.join(path.name for path in graphs.files)}", f"  {classes}"]
    for key, found in graphs.counts().items():
        wanted = expected.get(key)
        off = wanted is not None and abs(found - wanted) > 0.0051
        lines.append(f"  {key:<16}{found:>10g}" + (f"   expected {wanted:g}" if off else ""))
    return lines


# ---- the collection's layout -----------------------------------------------------------------------------------------


def _look(folder: Path, name: str, file: str) -> Path | None:
    places = (folder / name / file, folder / name / "raw" / file, folder / file, folder / "raw" / file)
    return next((path for path in places if path.is_file()), None)


def _table(path: Path, dtype: type, columns: int | None) -> np.ndarray:
    """A file of numbers between commas, (rows, columns); ``columns=None`` takes what the first line has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file
            rows: np.ndarray = np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2, encoding="utf-8")
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; expected numbers between commas") from error
    if not rows.size:
        rows = rows.reshape(0, columns or 0)
    if columns is not None and rows.shape[1] != columns:
        raise UserError(f"{path} has {rows.shape[1]} numbers a line, expected {columns}")
    return rows


def _read_tu(folder: Path, name: str) -> TUGraphs:
    def path(part: str) -> Path:
        return folder / f"{name}_{part}.txt"

    def column(part: str, rows: int) -> np.ndarray | None:
        """One integer a line; None when there is no such file."""
        if not path(part).is_file():
            return None
        values = _table(path(part), np.int64, 1)[:, 0]
        if len(values) != rows:
            raise UserError(f"{path(part)} has {len(values)} lines, expected {rows}")
        return values

    for part in ("graph_indicator", "graph_labels"):
        if not path(part).is_file():
            raise UserError(f"{name}: no file {path(part)}, expected beside {name}_A.txt")
    labels = _table(path("graph_labels"), np.int64, 1)[:, 0]
    node_graph = _table(path("graph_indicator"), np.int64, 1)[:, 0] - 1
    edges = _table(path("A"), np.int64, 2).T - 1
    wrong = (node_graph < 0) | (node_graph >= len(labels))
    if wrong.any():
        line = int(wrong.argmax())
        raise UserError(
            f"{path('graph_indicator')} line {line + 1}: graph {node_graph[line] + 1}, expected 1 to {len(labels)}"
        )
    if (np.diff(node_graph) < 0).any():
        line = int((np.diff(node_graph) < 0).argmax()) + 2
        raise UserError(f"{path('graph_indicator')} line {line}: the graphs are not in order, expected 1, 1, .., 2, ..")
    attributes = None
    files = [path("A"), path("graph_indicator"), path("graph_labels")]
    if path("node_attributes").is_file():
        attributes = _table(path("node_attributes"), np.float64, None)
        if len(attributes) != len(node_graph):
            raise UserError(f"{path('node_attributes')} has {len(attributes)} lines, expected {len(node_graph)}")
    files += [path(part) for part in ("node_labels", "node_attributes", "edge_labels") if path(part).is_file()]
    return _build(
        name,
        "tu",
        edges,
        np.bincount(node_graph, minlength=len(labels)),
        labels,
        column("node_labels", len(node_graph)),
        attributes,
        column("edge_labels", edges.shape[1]),
        tuple(files),
    )


# ---- one file a set --------------------------------------------------------------------------------------------------


def _read_dgcnn(path: Path, name: str) -> TUGraphs:
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error}), expected the graphs of {name}") from error
    while words and not words[-1]:
        words.pop()
    length = np.array([len(row) for row in words], dtype=np.int64)
    start = np.cumsum(length) - length
    try:
        values = np.array([word for row in words for word in row], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path} line {_first_bad(words)}: {error}; expected numbers between spaces") from error
    if not len(words) or length[0] != 1:
        raise UserError(f"{path} line 1 has {length[0] if len(words) else 0} numbers, expected one, how many graphs")

    def whole(position: np.ndarray) -> np.ndarray:
        """The numbers at these positions, which must be integers."""
        taken = values[position]
        wrong = taken != np.floor(taken)
        if wrong.any():
            line = int(np.searchsorted(start, position[int(wrong.argmax())], side="right"))
            raise UserError(f"{path} line {line}: {taken[wrong][0]:g}, expected an integer")
        return taken.astype(np.int64)

    graphs, at = int(whole(np.zeros(1, np.int64))[0]), 1
    heads: list[int] = []
    while len(heads) < graphs:  # each head says where the next one is
        if at >= len(words):
            raise UserError(f"{path} ends within graph {max(1, len(heads))}, expected {graphs} graphs")
        if length[at] != 2:
            raise UserError(f"{path} line {at + 1}: {length[at]} numbers, expected nodes and class of a graph")
        heads.append(at)
        size = int(whole(start[at : at + 1])[0])
        if size < 1:
            raise UserError(f"{path} line {at + 1}: graph {len(heads)} has {size} nodes, expected at least 1")
        at += 1 + size
    if at != len(words):
        last = f"ends within graph {graphs}" if at > len(words) else f"goes on after graph {graphs}"
        raise UserError(f"{path} {last}: {len(words)} lines, expected {at}")

    sizes, labels = whole(start[heads]), whole(start[heads] + 1)
    rows = np.setdiff1d(np.arange(1, len(words)), heads)
    if (length[rows] < 2).any():
        raise UserError(f"{path} line {rows[(length[rows] < 2).argmax()] + 1}: expected a label and a number")
    node_labels, degree = whole(start[rows]), whole(start[rows] + 1)
    width = length[rows] - 2 - degree
    if len(rows) and ((width != width[0]) | (width < 0) | (degree < 0)).any():
        line = rows[((width != width[0]) | (width < 0) | (degree < 0)).argmax()] + 1
        raise UserError(f"{path} line {line}: {length[line - 1]} numbers do not fit its count of neighbours")
    neighbours = whole(_runs(start[rows] + 2, degree))
    graph = np.repeat(np.arange(graphs), sizes)
    source = np.repeat(np.arange(len(rows)), degree)
    wrong = (neighbours < 0) | (neighbours >= sizes[graph[source]])
    if wrong.any():
        edge = int(wrong.argmax())
        number = graph[source[edge]]
        raise UserError(
            f"{path}: graph {number + 1} has neighbour {neighbours[edge]}, expected 0 to {sizes[number] - 1}"
        )
    first = np.cumsum(sizes) - sizes
    edges = np.stack([source, neighbours + first[graph[source]]])
    attributes = None
    if len(rows) and width[0]:
        attributes = values[(start[rows] + 2 + degree)[:, None] + np.arange(width[0])]
    return _build(name, "dgcnn", edges, sizes, labels, node_labels, attributes, None, (path,))


def _runs(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, .. (count[0] numbers), start[1], ..."""
    before = np.cumsum(count) - count
    return np.repeat(start - before, count) + np.arange(count.sum())


def _first_bad(words: list[list[str]]) -> int:
    for number, row in enumerate(words, start=1):
        try:
            np.array(row, dtype=np.float64)
        except ValueError:
            return number
    return 0


# ---- checks of both layouts ------------------------------------------------------------------------------------------


def _build(
    name: str,
    layout: str,
    edges: np.ndarray,
    sizes: np.ndarray,
    labels: np.ndarray,
    node_labels: np.ndarray | None,
    attributes: np.ndarray | None,
    edge_labels: np.ndarray | None,
    files: tuple[Path, ...],
) -> TUGraphs:
    where, nodes = files[0], int(sizes.sum())
    if not len(labels):
        raise UserError(f"{where}: the set has no graph")
    if (sizes < 1).any():
        raise UserError(f"{where}: graph {int((sizes < 1).argmax()) + 1} has no node, expected at least 1")
    graph = np.repeat(np.arange(len(sizes)), sizes)
    wrong = ((edges < 0) | (edges >= nodes)).any(axis=0)
    if wrong.any():
        edge = int(wrong.argmax())
        pair = tuple((edges[:, edge] + 1).tolist())
        raise UserError(f"{where}: edge {edge + 1} is {pair}, expected node numbers 1 to {nodes}")
    source, target = edges
    wrong = graph[source] != graph[target]
    if wrong.any():
        edge = int(wrong.argmax())
        ends = f"{graph[source[edge]] + 1} and {graph[target[edge]] + 1}"
        raise UserError(f"{where}: edge {edge + 1} joins graphs {ends}, expected both ends in one graph")
    there, back = source * nodes + target, target * nodes + source
    if not np.array_equal(np.sort(there), np.sort(back)):
        edge = int((~np.isin(there, back)).argmax())
        number = graph[source[edge]] + 1
        raise UserError(f"{where}: edge {edge + 1} (graph {number}) is listed from one end only, expected from both")
    if attributes is not None and not np.isfinite(attributes).all():
        node = int((~np.isfinite(attributes)).any(axis=1).argmax())
        raise UserError(f"{files[0].parent}: an attribute of node {node + 1} (graph {graph[node] + 1}) is not finite")
    values, classes = np.unique(labels, return_inverse=True)

    def tensor(array: np.ndarray | None, dtype: torch.dtype = torch.int64) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    made = {"edges": edges, "node_graph": graph, "ptr": np.concatenate([[0], np.cumsum(sizes)])}
    made |= {"graph_labels": classes.reshape(-1), "label_values": values}
    return TUGraphs(
        name,
        layout,
        **{key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in made.items()},
        node_labels=tensor(node_labels),
        node_attributes=tensor(attributes, torch.float32),
        edge_labels=tensor(edge_labels),
        files=files,
    )
