"""Graph contrastive learning with generic and with content-aware augmentations, and the checks that tell them apart.

Three kinds of data become batches of graphs: published graph sets, sentences (graphs of words) and images (graphs of
superpixels). Generic augmentations act on the graph, content-aware ones on the sentence or image before it becomes a
graph. Everything acts on a whole batch at once::

    graphs = with_loops(Graphs.build(x, edges, ptr))                # the batch, in CSR
    first, second = contrast_views(graphs, "random2", generator)    # the graph itself and an augmented copy
    model = build("graphcl", Encoder(x.shape[1]), "graphs")         # or simclr, simsiam, byol, infograph
    loss = model(first, second)

The method is that of Trivedi et al., "Augmentations in Graph Contrastive Learning" (WWW 2022, arXiv 2111.03220); sizes
and the order of operations are those of the official code. N nodes, E edges, G graphs, F features.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- a batch of graphs -----------------------------------------------------------------------------------------------


def runs(start: Tensor, count: Tensor) -> Tensor:
    """start[0], start[0] + 1, .. (count[0] numbers), start[1], .. -> (sum of count,) int64."""
    before = count.cumsum(0) - count
    return torch.repeat_interleave(start - before, count) + torch.arange(int(count.sum()), device=start.device)


def offsets(count: Tensor) -> Tensor:
    """(n,) sizes -> (n + 1,) positions where each part begins."""
    return F.pad(count.cumsum(0), (1, 0))


class Graphs:
    """Graphs side by side in one sparse matrix; ``Graphs.build`` makes one from edges in any order.

    Args:
        x: (N, F) node features, or (N,) int64 word numbers. row, col: (E,) int64 target and source of each edge, rows
            in ascending order. ptr: (G + 1,) int64, nodes ``ptr[g] .. ptr[g + 1] - 1`` are those of graph g.
        weight: (E,) edge weights, or ``None`` for ones. symmetric: each edge stands from both ends, with equal weights.
    """

    def __init__(
        self, x: Tensor, row: Tensor, col: Tensor, ptr: Tensor, weight: Tensor | None = None, symmetric: bool = False
    ) -> None:
        self.x, self.row, self.col, self.ptr, self.weight, self.symmetric = x, row, col, ptr, weight, symmetric

    def having(self, **changes: Any) -> Graphs:
        """The same graphs with some attributes exchanged."""
        now = {"x": self.x, "row": self.row, "col": self.col, "ptr": self.ptr}
        return Graphs(**(now | {"weight": self.weight, "symmetric": self.symmetric} | changes))

    @staticmethod
    def build(x: Tensor, edges: Tensor, ptr: Tensor, weight: Tensor | None = None) -> Graphs:
        """Sort and check edges.

        Args:
            x: (N, F). edges: (2, E) int64 pairs (source, target) over all graphs. ptr: (G + 1,). weight: (E,).

        Raises:
            ValueError: a graph without nodes, an edge outside of its graph (the graph's number is said).
        """
        sizes, nodes = ptr.diff(), len(x)
        if int(ptr[0]) or int(ptr[-1]) != nodes:
            raise ValueError(f"ptr goes from {int(ptr[0])} to {int(ptr[-1])}, expected 0 to {nodes} nodes")
        if bool((sizes < 1).any()):
            raise ValueError(f"graph {int((sizes < 1).nonzero()[0])} has no node")
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        source, target = edges
        wrong = (edges < 0).any(0) | (edges >= nodes).any(0)
        if bool(wrong.any()):
            inside = edges[:, wrong][:, 0]
            known = inside[(inside >= 0) & (inside < nodes)]
            of = f" of graph {int(owner[known[0]])}" if len(known) else ""
            raise ValueError(f"edge {tuple(inside.tolist())}{of} names a node outside of 0..{nodes - 1}")
        wrong = owner[source] != owner[target]
        if bool(wrong.any()):
            first = edges[:, wrong][:, 0]
            raise ValueError(f"edge {tuple(first.tolist())} leaves graph {int(owner[first[0]])}")
        key, order = (target * nodes + source).sort(stable=True)
        back, other = (source * nodes + target).sort(stable=True)
        same = weight is None or torch.equal(weight[order], weight[other])
        made = None if weight is None else weight[order]
        return Graphs(x, target[order], source[order], ptr, made, torch.equal(key, back) and same)

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.ptr) - 1

    @property
    def nodes(self) -> int:
        """Number of nodes of all graphs."""
        return len(self.x)

    @cached_property
    def sizes(self) -> Tensor:
        """(G,) nodes of each graph."""
        return self.ptr.diff()

    @cached_property
    def owner(self) -> Tensor:
        """(N,) the graph of each node."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.ptr.device), self.sizes)

    @cached_property
    def crow(self) -> Tensor:
        """(N + 1,) positions where the edges into each node begin."""
        return offsets(torch.bincount(self.row, minlength=self.nodes))

    @cached_property
    def transposed(self) -> Graphs:
        """The graphs with every edge turned round."""
        if self.symmetric:
            return self
        order = self.col.argsort(stable=True)
        weight = None if self.weight is None else self.weight[order]
        return self.having(row=self.col[order], col=self.row[order], weight=weight)

    @cached_property
    def master(self) -> Tensor:
        """(G,) the last node of each graph: the master node of a graph of words."""
        return self.ptr[1:] - 1

    def select(self, index: Tensor) -> Graphs:
        """The graphs of these numbers, in this order."""
        sizes = self.sizes[index]
        ptr = offsets(sizes)
        first, last = self.crow[self.ptr[index]], self.crow[self.ptr[index + 1]]
        edges = runs(first, last - first)
        shift = torch.repeat_interleave(ptr[:-1] - self.ptr[index], last - first)
        weight = None if self.weight is None else self.weight[edges]
        x = self.x[runs(self.ptr[index], sizes)]
        return Graphs(x, self.row[edges] + shift, self.col[edges] + shift, ptr, weight, self.symmetric)

    def without(self, edges: Tensor, nodes: Tensor | None = None, symmetric: bool = False) -> Graphs:
        """The graphs less some edges, and less some nodes with all edges at them.

        Args:
            edges: (E,) bool, True leaves out. nodes: (N,) bool. symmetric: what is left still has both directions.
        """
        if nodes is not None:
            edges = edges | nodes[self.row] | nodes[self.col]
        stay = (~edges).nonzero().squeeze(1)
        weight = None if self.weight is None else self.weight[stay]
        row, col = self.row[stay], self.col[stay]
        if nodes is None:
            return Graphs(self.x, row, col, self.ptr, weight, symmetric)
        number = offsets((~nodes).long())
        return Graphs(self.x[~nodes], number[row], number[col], number[self.ptr], weight, symmetric)

    def to(self, device: torch.device | str) -> Graphs:
        """The same graphs on a device."""
        if self.x.device == torch.device(device):
            return self
        weight = None if self.weight is None else self.weight.to(device)
        moved = (tensor.to(device) for tensor in (self.x, self.row, self.col, self.ptr))
        return Graphs(*moved, weight, self.symmetric)


def _row_sums(graphs: Graphs, h: Tensor) -> Tensor:
    if h.device.type == "cpu":  # a bag is a row, its words are the columns: torch's fastest sum of chosen rows on a CPU
        return torch.embedding_bag(h, graphs.col, graphs.crow, False, 0, False, graphs.weight, True)[0]
    message = h.index_select(0, graphs.col)
    message = message if graphs.weight is None else message * graphs.weight[:, None]
    return h.new_zeros(graphs.nodes, h.shape[1]).index_add_(0, graphs.row, message)


class _NeighbourSum(torch.autograd.Function):
    """A h, or h + A h; back through the transposed matrix instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, graphs: Graphs, own: bool) -> Tensor:
        ctx.graphs, ctx.own = graphs, own
        out = _row_sums(graphs, h)
        return out.add_(h) if own else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        out = _row_sums(ctx.graphs.transposed, grad)
        return out.add_(grad) if ctx.own else out, None, None


class _Pool(torch.autograd.Function):
    """Sums over the nodes of each graph; back by copying a graph's gradient to its nodes."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, graphs: Graphs) -> Tensor:
        ctx.owner = graphs.owner
        if h.device.type == "cpu":
            every = torch.arange(len(h))
            return torch.embedding_bag(h, every, graphs.ptr, False, 0, False, None, True)[0]
        return h.new_zeros(len(graphs), h.shape[1]).index_add_(0, graphs.owner, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.owner), None


@torch.compiler.disable
def neighbour_sum(graphs: Graphs, h: Tensor, own: bool = False) -> Tensor:
    """(N, d) -> (N, d): weighted sums over the sources of the edges into each node, and the node itself if ``own``."""
    return _NeighbourSum.apply(h.float().contiguous(), graphs, own)


@torch.compiler.disable
def pool(graphs: Graphs, h: Tensor) -> Tensor:
    """(N, d) -> (G, d): sums over the nodes of each graph."""
    return _Pool.apply(h.float().contiguous(), graphs)


def with_loops(graphs: Graphs) -> Graphs:
    """Add a self-loop to each node but the last that has an edge (and those after it), as the official loader does.

    The loops stay in the first view and at evaluation, so that GIN counts a node twice there.
    """
    owner = graphs.owner
    last = torch.full((len(graphs),), -1, device=owner.device)
    last = last.scatter_reduce(0, owner[graphs.row], torch.maximum(graphs.row, graphs.col), "amax")
    node = torch.arange(graphs.nodes, device=owner.device)
    loop = node[node < last[owner]]
    row, order = torch.cat([graphs.row, loop]).sort(stable=True)
    return graphs.having(row=row, col=torch.cat([graphs.col, loop])[order])


# ---- generic (domain-agnostic) augmentations of a graph --------------------------------------------------------------

AUGMENTATIONS = ("none", "drop_nodes", "permute_edges", "mask_nodes", "subgraph", "random2", "random3", "random4")
RANDOM = {
    "random2": ("drop_nodes", "subgraph"),
    "random3": ("drop_nodes", "permute_edges", "subgraph"),
    "random4": ("drop_nodes", "permute_edges", "subgraph", "mask_nodes"),
}
WALKS = ("grow", "code")


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64)


def choose(count: Tensor, ptr: Tensor, generator: torch.Generator) -> Tensor:
    """``count[g]`` elements of each part ``ptr[g] .. ptr[g + 1] - 1``, uniformly without replacement -> (N,) bool."""
    sizes = ptr.diff()
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    order = (owner + _uniform(len(owner), generator)).argsort()
    rank = torch.arange(len(owner)) - ptr[owner]  # sorting keeps the parts where they are
    out = torch.zeros(len(owner), dtype=torch.bool)
    out[order[rank < count[owner]]] = True
    return out


def _share(sizes: Tensor, ratio: float | Tensor) -> Tensor:
    """floor(ratio n), with 0.1 x 10 = 1 in spite of rounding."""
    return (sizes * ratio + 1e-9).floor().long()


def drop_nodes(graphs: Graphs, ratio: float | Tensor, generator: torch.Generator) -> Tensor:
    """(N,) bool: floor(ratio n) nodes of each graph to drop; ``ratio`` one number or (G,)."""
    return choose(_share(graphs.sizes, ratio), graphs.ptr, generator)


def permute_edges(graphs: Graphs, ratio: float | Tensor, generator: torch.Generator) -> Tensor:
    """(E,) bool: floor(ratio E) directed entries of each graph to leave out. None is added (official code)."""
    ptr = graphs.crow[graphs.ptr]
    return choose(_share(ptr.diff(), ratio), ptr, generator)


def mask_nodes(graphs: Graphs, ratio: float | Tensor, generator: torch.Generator) -> Tensor:
    """(N, F) features with those of floor(ratio n) nodes of each graph replaced by draws from N(0.5, 0.5^2)."""
    chosen = choose(_share(graphs.sizes, ratio), graphs.ptr, generator)
    noise = torch.normal(0.5, 0.5, graphs.x.shape, generator=generator)
    return torch.where(chosen[:, None], noise, graphs.x)


def subgraph(
    graphs: Graphs, keep: float, walk: str, generator: torch.Generator, wanted: Tensor | None = None
) -> Tensor:
    """(N,) bool: the nodes of a connected subgraph, a random start and about ``keep`` n nodes more.

    Args:
        walk: ``"grow"``: each time a random node beside those taken. ``"code"``: as released, only neighbours of the
            start are ever taken (their set is not extended), in at most n draws with repeats.
        wanted: (G,) bool; of the other graphs every node is taken.
    """
    wanted = torch.ones(len(graphs), dtype=torch.bool) if wanted is None else wanted
    target = torch.where(wanted, _share(graphs.sizes, keep), 0)
    start = graphs.ptr[:-1] + (_uniform(len(graphs), generator) * graphs.sizes).long()
    taken = ~wanted[graphs.owner]
    taken[start] = True
    return (_grow if walk == "grow" else _beside)(graphs, taken, start, target, generator)


def _grow(graphs: Graphs, taken: Tensor, start: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """One node a graph and round, all graphs at once; ``heap[ptr[g]:]`` holds the frontier of graph g."""
    crow, col, ptr = graphs.crow, graphs.col, graphs.ptr
    seen, heap = taken.clone(), torch.empty(graphs.nodes, dtype=torch.int64)
    height, added = torch.zeros_like(target), torch.zeros_like(target)

    def push(graph: Tensor, node: Tensor) -> None:
        degree = crow[node + 1] - crow[node]
        near, at = col[runs(crow[node], degree)], torch.repeat_interleave(torch.arange(len(node)), degree)
        fresh = ~seen[near]
        near, at = near[fresh], at[fresh]
        seen[near] = True
        count = torch.bincount(at, minlength=len(graph))
        heap[runs(ptr[graph] + height[graph], count)] = near
        height[graph] += count

    active = (target > 0).nonzero().squeeze(1)
    push(active, start[active])
    while len(active := active[(added[active] < target[active]) & (height[active] > 0)]):
        top = height[active]
        slot = ptr[active] + (_uniform(len(active), generator) * top).long()
        node = heap[slot]
        heap[slot] = heap[ptr[active] + top - 1]
        height[active] -= 1
        taken[node] = True
        added[active] += 1
        push(active, node)
    return taken


def _beside(graphs: Graphs, taken: Tensor, start: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """The first ``target`` different neighbours of the start among n draws with replacement."""
    crow, col = graphs.crow, graphs.col
    degree = crow[start + 1] - crow[start]
    first = offsets(degree)
    owner = torch.repeat_interleave(torch.arange(len(start)), graphs.sizes)  # n draws a graph
    draw = (_uniform(len(owner), generator) * degree[owner]).long()
    possible = degree[owner] > 0
    rank = torch.arange(len(owner)) - graphs.ptr[owner]
    never = graphs.nodes
    when = torch.full((int(first[-1]),), never)
    when.scatter_reduce_(0, (first[:-1][owner] + draw)[possible], rank[possible], "amin")
    near = col[runs(crow[start], degree)]
    at = torch.repeat_interleave(torch.arange(len(start)), degree)
    when[near == start[at]] = never  # drawing the start again through its loop is a wasted draw
    order = (at * (never + 1) + when).argsort()
    place = torch.arange(len(order)) - first[at]
    good = (place < target[at]) & (when[order] < never)
    taken[near[order[good]]] = True
    return taken


def tidy(graphs: Graphs) -> Graphs:
    """What the official training loop does to a view: nodes without any edge vanish, then all loops are removed.

    A graph that would lose its last node keeps its first one, so that both views have the same number of graphs.
    """
    alone = torch.ones(graphs.nodes, dtype=torch.bool)
    alone[graphs.row] = False
    alone[graphs.col] = False
    left = torch.zeros(len(graphs), dtype=torch.int64).index_add_(0, graphs.owner, (~alone).long())
    alone[graphs.ptr[:-1][left == 0]] = False
    return graphs.without(graphs.row == graphs.col, alone, graphs.symmetric)


def augment(
    graphs: Graphs,
    name: str,
    generator: torch.Generator,
    ratio: float = 0.1,
    keep: float = 0.2,
    walk: str = "grow",
) -> Graphs:
    """The augmented view of each graph (``random2/3/4`` choose an augmentation for each graph anew).

    Args:
        graphs: with loops (``with_loops``). ratio: share of nodes or edges changed. keep: share of the nodes that
            ``subgraph`` takes. walk: see ``subgraph``.

    Raises:
        ValueError: unknown augmentation or walk, a share outside [0, 1).
    """
    if name not in AUGMENTATIONS or walk not in WALKS:
        raise ValueError(f"augmentation {name!r} with walk {walk!r}, expected {', '.join(AUGMENTATIONS)}; grow, code")
    for what, value in (("ratio", ratio), ("keep", keep)):
        if not 0 <= value < 1:
            raise ValueError(f"{what} is {value}, expected 0 <= {what} < 1")
    if name == "none":
        return graphs
    options = RANDOM.get(name, (name,))
    drawn = torch.randint(len(options), (len(graphs),), generator=generator)
    asked = {option: drawn == i for i, option in enumerate(options)}
    gone = torch.zeros(len(graphs.row), dtype=torch.bool)
    x, symmetric = graphs.x, graphs.symmetric
    if "drop_nodes" in asked:
        dropped = drop_nodes(graphs, ratio * asked["drop_nodes"].double(), generator)
        gone |= dropped[graphs.row] | dropped[graphs.col]
    if "permute_edges" in asked:
        gone |= permute_edges(graphs, ratio * asked["permute_edges"].double(), generator)
        symmetric = False
    if "subgraph" in asked:
        outside = ~subgraph(graphs, keep, walk, generator, asked["subgraph"])
        gone |= outside[graphs.row] | outside[graphs.col]
    if "mask_nodes" in asked:
        x = mask_nodes(graphs, ratio * asked["mask_nodes"].double(), generator)
    out = graphs.having(x=x).without(gone, symmetric=symmetric)
    # The official loop tidies up after these only; alone, permuted edges and masked features keep their loops.
    return out if name in ("permute_edges", "mask_nodes") else tidy(out)


def contrast_views(graphs: Graphs, name: str, generator: torch.Generator, **options: Any) -> tuple[Graphs, Graphs]:
    """The graphs as they are (with loops) and their augmented view, the official pair. ``options`` as ``augment``."""
    return graphs, augment(graphs, name, generator, **options)


# ---- sentences: graphs of words, their generic and their content-aware augmentations ---------------------------------


@dataclass(frozen=True)
class Texts:
    """Sentences as word numbers: words (T,) int64 from 1, ptr (D + 1,)."""

    words: Tensor
    ptr: Tensor

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.ptr) - 1

    @cached_property
    def owner(self) -> Tensor:
        """(T,) the sentence of each word."""
        return torch.repeat_interleave(torch.arange(len(self)), self.ptr.diff())

    def select(self, index: Tensor) -> Texts:
        """The sentences of these numbers."""
        sizes = self.ptr.diff()[index]
        return Texts(self.words[runs(self.ptr[index], sizes)], offsets(sizes))


@dataclass(frozen=True)
class Synonyms:
    """For each word the words it may be replaced by: those of word w are ``words[ptr[w]:ptr[w + 1]]``."""

    words: Tensor
    ptr: Tensor


def word_graphs(texts: Texts, window: int = 2) -> Graphs:
    """One graph a sentence (MPAD): its distinct words in order of appearance, and last a master node (number 0).

    For i < j < i + window the edge word_i -> word_j gains 1 / (j - i); the master node is joined to every word both
    ways with weight 1. Messages run along the edges and the weights into a node sum to 1. A sentence without words is
    a lone master node.

    Raises:
        ValueError: window below 2.
    """
    if window < 2:
        raise ValueError(f"window is {window}, expected at least 2: 2 joins adjacent words")
    words, doc, docs = texts.words, texts.owner, len(texts)
    width = int(words.max()) + 1 if len(words) else 1
    key, order = (doc * width + words).sort(stable=True)
    new = torch.ones(len(key), dtype=torch.bool)
    new[1:] = key[1:] != key[:-1]
    first = order[new]  # where each distinct word appears first
    rank = torch.empty_like(first)
    by_place = first.argsort()
    rank[by_place] = torch.arange(len(first))
    node = torch.empty_like(words)
    node[order] = rank[new.cumsum(0) - 1]
    distinct = torch.bincount(doc[first], minlength=docs)
    ptr = offsets(distinct + 1)
    node = node + doc  # one master node for each sentence before
    x = torch.zeros(int(ptr[-1]), dtype=torch.int64)
    x[node] = words
    word = (x > 0).nonzero().squeeze(1)
    master = torch.repeat_interleave(ptr[1:] - 1, distinct)
    parts = [(word, master, 1.0), (master, word, 1.0)]
    for step in range(1, window):
        together = (doc[step:] == doc[:-step]).nonzero().squeeze(1)
        parts.append((node[together], node[together + step], 1.0 / step))
    source, target = (torch.cat([part[side] for part in parts]) for side in (0, 1))
    weight = torch.cat([torch.full((len(part[0]),), part[2]) for part in parts])
    pair, index = torch.unique(target * len(x) + source, return_inverse=True)
    weight = torch.zeros(len(pair)).index_add_(0, index, weight)
    row, col = pair // len(x), pair % len(x)
    return Graphs(x, row, col, ptr, weight / torch.zeros(len(x)).index_add_(0, row, weight)[row])


WORD_AUGMENTATIONS = ("n", "e", "s")


def augment_words(graphs: Graphs, name: str, ratio: float, generator: torch.Generator) -> Graphs:
    """Generic augmentation of graphs of words; no weight is normalised again.

    Args:
        name: ``"n"``: floor(ratio n) nodes, drawn with replacement, the master node too, lose all edges.
            ``"e"``: floor(ratio n) random pairs: both directions vanish if one weighs at least 0.5, else both get the
            same weight from U(0, 1) (so do most edges that are there).
            ``"s"``: the edges of a random walk of ceil(ratio sum(A)) steps vanish; loops are never walked.

    Raises:
        ValueError: unknown name, ratio outside [0, 1).
    """
    if name not in WORD_AUGMENTATIONS or not 0 <= ratio < 1:
        raise ValueError(f"word augmentation {name!r} with ratio {ratio}, expected n, e or s and 0 <= ratio < 1")
    if name == "s":
        return graphs.without(_walked(graphs, ratio, generator))
    count = _share(graphs.sizes, ratio)
    owner = torch.repeat_interleave(torch.arange(len(graphs)), count)

    def node() -> Tensor:
        return graphs.ptr[owner] + (_uniform(len(owner), generator) * graphs.sizes[owner]).long()

    if name == "n":
        lost = torch.zeros(graphs.nodes, dtype=torch.bool)
        lost[node()] = True
        return graphs.without(lost[graphs.row] | lost[graphs.col])
    one, two, fresh = node(), node(), torch.rand(len(owner), generator=generator)
    n = graphs.nodes
    there = graphs.row * n + graphs.col
    key, index = torch.unique(torch.cat([there, one * n + two, two * n + one]), return_inverse=True)
    at_edge, at_one, at_two = index.split([len(there), len(owner), len(owner)])
    weight = torch.zeros(len(key))
    weight[at_edge] = graphs.weight
    turn = torch.arange(len(owner)) - offsets(count)[owner]
    for i in range(int(count.max()) if len(count) else 0):  # a later pair of a graph meets what an earlier one did
        now = (turn == i).nonzero().squeeze(1)
        a, b = at_one[now], at_two[now]
        value = torch.where((weight[a] >= 0.5) | (weight[b] >= 0.5), 0.0, fresh[now])
        weight[a] = value
        weight[b] = value
    left = weight > 0
    return Graphs(graphs.x, key[left] // n, key[left] % n, graphs.ptr, weight[left])


def _walked(graphs: Graphs, ratio: float, generator: torch.Generator) -> Tensor:
    """(E,) bool: edges of one random walk in each graph."""
    usable = (graphs.row != graphs.col).nonzero().squeeze(1)
    crow = offsets(torch.bincount(graphs.row[usable], minlength=graphs.nodes))
    total = torch.zeros(len(graphs)).index_add_(0, graphs.owner[graphs.row], graphs.weight)
    steps = (ratio * total - 1e-5).ceil().long()
    at = graphs.ptr[:-1] + (_uniform(len(graphs), generator) * graphs.sizes).long()
    walked = torch.zeros(len(graphs.row), dtype=torch.bool)
    for i in range(int(steps.max()) if len(steps) else 0):
        degree = crow[at + 1] - crow[at]
        going = (i < steps) & (degree > 0)
        at, degree, steps = at[going], degree[going], steps[going]
        edge = usable[crow[at] + (_uniform(len(at), generator) * degree).long()]
        walked[edge] = True
        at = graphs.col[edge]
    return walked


TEXT_AUGMENTATIONS = ("synonym", "insert", "swap", "delete")


def augment_text(
    texts: Texts,
    synonyms: Synonyms,
    generator: torch.Generator,
    operations: Sequence[str] = ("synonym", "insert"),
    alpha: float = 0.1,
) -> Texts:
    """Content-aware augmentation of sentences before they become graphs (easy data augmentation, EDA).

    Each sentence gets one operation at random, applied max(1, floor(alpha length)) times: ``synonym`` replaces
    different words (every occurrence) by a random synonym, ``insert`` puts a synonym of a random word somewhere,
    ``swap`` exchanges two random places, ``delete`` leaves each word out with probability alpha, all but one at most.

    Raises:
        ValueError: unknown operation, alpha outside (0, 1).
    """
    if not operations or set(operations) - set(TEXT_AUGMENTATIONS) or not 0 < alpha < 1:
        expected = ", ".join(TEXT_AUGMENTATIONS)
        raise ValueError(f"operations {tuple(operations)}, alpha {alpha}: expected among {expected} and 0 < alpha < 1")
    drawn = torch.randint(len(operations), (len(texts),), generator=generator)
    out = texts
    for i, operation in enumerate(operations):
        length = out.ptr.diff()
        count = torch.where((drawn == i) & (length > 0), _share(length, alpha).clamp_min(1), 0)
        out = _EDA[operation](out, synonyms, count, alpha, generator)
    return out


def _synonym_of(words: Tensor, synonyms: Synonyms, generator: torch.Generator) -> Tensor:
    first, last = synonyms.ptr[words], synonyms.ptr[words + 1]
    return synonyms.words[first + (_uniform(len(words), generator) * (last - first)).long()]


def _eligible(texts: Texts, synonyms: Synonyms, count: Tensor) -> tuple[Tensor, Tensor]:
    """Places of words that have synonyms in sentences with ``count`` > 0 -> places (T',), positions of sentences."""
    has = synonyms.ptr[texts.words + 1] > synonyms.ptr[texts.words]
    place = (has & (count[texts.owner] > 0)).nonzero().squeeze(1)
    return place, offsets(torch.bincount(texts.owner[place], minlength=len(texts)))


def _eda_synonym(texts: Texts, synonyms: Synonyms, count: Tensor, alpha: float, generator: torch.Generator) -> Texts:
    place, _ = _eligible(texts, synonyms, count)
    width = len(synonyms.ptr)
    key, where = torch.unique(texts.owner[place] * width + texts.words[place], return_inverse=True)
    of = key // width
    chosen = choose(count, offsets(torch.bincount(of, minlength=len(texts))), generator)
    word = key % width
    word[chosen] = _synonym_of(word[chosen], synonyms, generator)
    words = texts.words.clone()
    words[place] = word[where]
    return Texts(words, texts.ptr)


def _eda_insert(texts: Texts, synonyms: Synonyms, count: Tensor, alpha: float, generator: torch.Generator) -> Texts:
    place, ptr = _eligible(texts, synonyms, count)
    count = torch.where(ptr.diff() > 0, count, 0)
    owner = torch.repeat_interleave(torch.arange(len(texts)), count)
    source = place[ptr[owner] + (_uniform(len(owner), generator) * ptr.diff()[owner]).long()]
    new = _synonym_of(texts.words[source], synonyms, generator)
    before = texts.ptr[owner] + (_uniform(len(owner), generator) * texts.ptr.diff()[owner]).long()
    order = torch.cat([torch.arange(len(texts.words)) * 2, before * 2 - 1]).argsort(stable=True)
    return Texts(torch.cat([texts.words, new])[order], offsets(texts.ptr.diff() + count))


def _eda_swap(texts: Texts, synonyms: Synonyms, count: Tensor, alpha: float, generator: torch.Generator) -> Texts:
    words, length = texts.words.clone(), texts.ptr.diff()
    for i in range(int(count.max()) if len(count) else 0):
        now = ((count > i) & (length > 1)).nonzero().squeeze(1)
        one = (_uniform(len(now), generator) * length[now]).long()
        two = (one + 1 + (_uniform(len(now), generator) * (length[now] - 1)).long()) % length[now]
        one, two = texts.ptr[now] + one, texts.ptr[now] + two
        words[one], words[two] = words[two], words[one]
    return Texts(words, texts.ptr)


def _eda_delete(texts: Texts, synonyms: Synonyms, count: Tensor, alpha: float, generator: torch.Generator) -> Texts:
    spared = choose(torch.ones_like(count), texts.ptr, generator)  # one word of each sentence stays
    gone = (_uniform(len(texts.words), generator) < alpha) & (count[texts.owner] > 0) & ~spared
    return Texts(texts.words[~gone], offsets(torch.bincount(texts.owner[~gone], minlength=len(texts))))


_EDA = {"synonym": _eda_synonym, "insert": _eda_insert, "swap": _eda_swap, "delete": _eda_delete}


def pad_words(graphs: Graphs) -> Graphs:
    """Nodes of word 0 without edges before each master node, until all graphs are as large as the largest.

    The official batches are padded like this without a mask: padding takes part in attention and batch norm.
    """
    lacking = graphs.sizes.max() - graphs.sizes
    shift = offsets(lacking)[:-1]
    number = torch.arange(graphs.nodes) + shift[graphs.owner]
    number[graphs.master] += lacking
    ptr = offsets(graphs.sizes + lacking)
    x = torch.zeros(int(ptr[-1]), dtype=torch.int64)
    x[number] = graphs.x
    return Graphs(x, number[graphs.row], number[graphs.col], ptr, graphs.weight, graphs.symmetric)


# ---- images: content-aware augmentations, graphs of superpixels ------------------------------------------------------

IMAGE_VIEWS = ("colour", "crop")
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


def random_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 30 degrees, shift by up to a tenth of the side, shear by up to 0.2 degrees; nearest pixel.

    Args:
        images: (B, H, W) float.
    """
    count, height, width = images.shape

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle = torch.deg2rad(draw(-30, 30))
    shift = [torch.round(draw(-0.1, 0.1) * side) for side in (width, height)]
    shear = [torch.tan(torch.deg2rad(draw(0, 0.2))) for _ in range(2)]
    cos, sin = angle.cos(), angle.sin()
    # From a pixel of the result back to one of the image; both axes in pixels from the centre.
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    lean = torch.stack(
        [torch.stack([torch.ones(count), shear[0]], 1), torch.stack([shear[1], torch.ones(count)], 1)], 1
    )
    matrix = lean @ turn
    move = -(matrix @ torch.stack(shift, 1)[..., None])
    side = torch.tensor([width, height]) / 2
    theta = torch.cat([matrix * side / side[:, None], move / side[:, None]], 2)
    grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    return F.grid_sample(images[:, None], grid, mode="nearest", align_corners=False)[:, 0]


def augment_images(images: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Content-aware augmentation of grey images before they become graphs.

    Args:
        images: (B, H, W) float in 0..1, background 0.
        name: ``"colour"``: random affine map, then with probability 0.7 a random colour in place of white.
            ``"crop"``: random affine map, with probability 0.7 the centre (10 of 28 pixels) enlarged, half mirrored.

    Returns:
        (B, H, W, 3) in 0..1.

    Raises:
        ValueError: unknown name.
    """
    if name not in IMAGE_VIEWS:
        raise ValueError(f"image view {name!r}, expected one of {', '.join(IMAGE_VIEWS)}")
    count, height, width = images.shape
    images = random_affine(images, generator)
    chosen = torch.rand(count, generator=generator) < 0.7
    if name == "colour":
        colour = torch.randint(50, 255, (count, 3), generator=generator) / 255
        colour = torch.where(chosen[:, None], colour, 1.0)
        return images[..., None] * colour[:, None, None]
    inner = [round(side * 10 / 28) for side in (height, width)]
    top, left = ((side - part) // 2 for side, part in zip((height, width), inner, strict=True))
    centre = images[:, None, top : top + inner[0], left : left + inner[1]]
    large = F.interpolate(centre, (height, width), mode="bilinear", align_corners=False)[:, 0]
    images = torch.where(chosen[:, None, None], large, images)
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None], images.flip(2), images)
    return images[..., None].expand(-1, -1, -1, 3)


def superpixels(images: Tensor, segments: int = 75, neighbours: int = 8) -> Graphs:
    """Graphs of superpixels: SLIC segments, each joined from its nearest neighbours, itself among them.

    Args:
        images: (B, H, W, 3) in 0..1; normalised as the official code does before they are segmented.

    Returns:
        graphs with (N, 5) features: mean colour, and mean column and row in units of the width and height.
    """
    from skimage.segmentation import slic

    count, height, width, _ = images.shape
    pixels = ((images - MNIST_MEAN) / MNIST_STD).double()
    options: dict[str, Any] = {"n_segments": segments, "enforce_connectivity": True, "convert2lab": True}
    label = torch.stack([torch.from_numpy(slic(image, start_label=0, **options)) for image in pixels.numpy()])
    sizes = label.flatten(1).amax(1) + 1
    ptr = offsets(sizes)
    node = (label + ptr[:-1, None, None]).flatten()
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([across / width, down / height], 2).double().expand(count, -1, -1, 2)
    x = torch.zeros(int(ptr[-1]), 5, dtype=torch.float64)
    x.index_add_(0, node, torch.cat([pixels, place], 3).flatten(0, 2))
    x = (x / torch.bincount(node, minlength=len(x))[:, None]).float()
    return Graphs.build(x, nearest(x[:, 3:] * torch.tensor([width, height]), ptr, neighbours), ptr)


def nearest(places: Tensor, ptr: Tensor, k: int) -> Tensor:
    """(2, E) edges from the ``k`` nearest nodes of the same graph, itself among them, to each node.

    Args:
        places: (N, d) coordinates. ptr: (G + 1,).
    """
    sizes = ptr.diff()
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    rank = torch.arange(len(places)) - ptr[owner]
    padded = places.new_full((len(sizes), int(sizes.max()), places.shape[1]), math.inf)
    padded[owner, rank] = places
    distance = torch.cdist(padded.nan_to_num(posinf=1e9), padded.nan_to_num(posinf=1e9))
    distance[~torch.isfinite(padded[..., 0])[:, None].expand_as(distance)] = math.inf
    found = distance.topk(min(k, distance.shape[1]), largest=False)
    good = torch.isfinite(found.values[owner, rank])
    source = (found.indices[owner, rank] + ptr[owner, None])[good]
    return torch.stack([source, torch.arange(len(places))[:, None].expand_as(good)[good]])


# ---- encoders --------------------------------------------------------------------------------------------------------


def xavier(module: nn.Module) -> nn.Module:
    """Xavier-uniform weights and zero biases in every linear layer of a module."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def _check_batch(module: nn.Module, graphs: Graphs) -> None:
    if module.training and len(graphs) < 2:
        raise ValueError(f"a batch of {len(graphs)} graph in training: need at least 2 graphs")


def two_layers(width_in: int, width: int, norm: bool) -> nn.Sequential:
    """Linear, batch norm if asked for, ReLU, Linear."""
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(width_in, width), *middle, nn.ReLU(inplace=True), nn.Linear(width, width))


class Encoder(nn.Module):
    """The encoder of the graph sets: layers of GIN or GCN, each ReLU then batch norm; sums over nodes, concatenated.

    Args:
        features: F. hidden: width h. layers: L. conv: ``"gin"``: MLP(x_i + sum_j x_j), or ``"gcn"``.

    Raises:
        ValueError: sizes below 1, unknown conv.
    """

    def __init__(self, features: int, hidden: int = 32, layers: int = 5, conv: str = "gin") -> None:
        super().__init__()
        if min(features, hidden, layers) < 1 or conv not in ("gin", "gcn"):
            raise ValueError(
                f"features {features}, hidden {hidden}, layers {layers}, conv {conv!r}: expected at least 1 "
                "of each and gin or gcn"
            )
        self.conv, self.width = conv, hidden * layers
        widths = [features] + [hidden] * (layers - 1)
        self.maps = nn.ModuleList(
            two_layers(width, hidden, norm=False) if conv == "gin" else nn.Linear(width, hidden) for width in widths
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers))
        xavier(self)

    def layers(self, graphs: Graphs) -> list[Tensor]:
        """(N, h) node features after each layer."""
        _check_batch(self, graphs)
        if self.conv == "gcn":
            degree = torch.bincount(graphs.row, minlength=graphs.nodes) + 1.0
            root = degree.rsqrt()
            graphs = graphs.having(weight=root[graphs.row] * root[graphs.col])
            loop = (1 / degree)[:, None]
        x, out = graphs.x, []
        for apply, norm in zip(self.maps, self.norms, strict=True):
            if self.conv == "gin":
                near = neighbour_sum(graphs, x, own=True)
            else:
                near = neighbour_sum(graphs, x) + x * loop
            x = norm(apply(near).relu_())
            out.append(x)
        return out

    def forward(self, graphs: Graphs) -> Tensor:
        """(G, L h) embeddings."""
        return torch.cat([pool(graphs, x) for x in self.layers(graphs)], 1)


class SuperpixelEncoder(nn.Module):
    """Linear, then GIN layers without a non-linearity between them; means over nodes of every level, concatenated."""

    def __init__(self, features: int = 5, hidden: int = 110, layers: int = 4) -> None:
        super().__init__()
        self.width = hidden * (layers + 1)
        self.into = nn.Linear(features, hidden)
        self.maps = nn.ModuleList(two_layers(hidden, hidden, norm=True) for _ in range(layers))

    def forward(self, graphs: Graphs) -> Tensor:
        """(G, (L + 1) h) embeddings."""
        _check_batch(self, graphs)
        x = self.into(graphs.x)
        levels = [x]
        for apply in self.maps:
            x = apply(neighbour_sum(graphs, x, own=True))
            levels.append(x)
        return torch.cat([pool(graphs, x) / graphs.sizes[:, None] for x in levels], 1)


AGGREGATORS = ("original", "gcn", "sage", "gin")


class MessagePassing(nn.Module):
    """A block of MPAD: MLP, messages, MLP, gated update."""

    def __init__(self, width_in: int, hidden: int, aggregator: str) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.first, self.second = two_layers(width_in, hidden, norm=True), two_layers(hidden, hidden, norm=True)
        self.gates = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(6))
        if aggregator == "gcn":
            self.lin = nn.Linear(hidden, hidden, bias=False)
            self.bias = nn.Parameter(torch.zeros(hidden))
        elif aggregator == "sage":
            self.near, self.root = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden)
        elif aggregator == "gin":
            self.mlp = nn.Sequential(two_layers(hidden, hidden, norm=False), nn.ReLU())

    def aggregate(self, graphs: Graphs, x: Tensor) -> Tensor:
        """(N, h) -> (N, h) messages; the last three are the dense layers of torch-geometric on a sparse matrix."""
        if self.aggregator == "original":
            return neighbour_sum(graphs, x)
        weight = graphs.weight
        if self.aggregator == "gin":
            return self.mlp(neighbour_sum(graphs, x, own=True))
        if self.aggregator == "sage":
            total = x.new_zeros(graphs.nodes).index_add_(0, graphs.row, weight)
            return self.near(neighbour_sum(graphs, x) / total.clamp_min(1)[:, None]) + self.root(x)
        weight = weight.masked_fill(graphs.row == graphs.col, 0.0)  # the diagonal is set to 1, whatever stood there
        root = x.new_ones(graphs.nodes).index_add_(0, graphs.row, weight).clamp_min(1).rsqrt()
        scaled = graphs.having(weight=root[graphs.row] * weight * root[graphs.col])
        x = self.lin(x)
        return neighbour_sum(scaled, x) + root.square()[:, None] * x + self.bias

    def forward(self, graphs: Graphs, x: Tensor) -> Tensor:
        """(N, d) -> (N, h)."""
        x = self.first(x)
        m = self.second(self.aggregate(graphs, x))
        u1, v1, u2, v2, u3, v3 = self.gates
        z, r = torch.sigmoid(u1(m) + v1(x)), torch.sigmoid(u2(m) + v2(x))
        return (1 - z) * x + z * torch.tanh(u3(m) + v3(r * x))


class Attention(nn.Module):
    """Readout of a block: words weighted by attention, beside the master node."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner, self.score, self.out = (
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1, False),
            nn.Linear(hidden, hidden),
        )

    def forward(self, graphs: Graphs, x: Tensor) -> Tensor:
        """(N, h) -> (G, 2 h)."""
        share = torch.tanh(self.score(torch.tanh(self.inner(x)))).exp()  # scores lie in -1..1: no maximum to subtract
        share = share.index_fill(0, graphs.master, 0.0)
        sums = pool(graphs, torch.cat([share * x, share.expand(-1, 8)], 1))  # one sum for both, of a width that is fast
        words = sums[:, : x.shape[1]] / sums[:, -1:].clamp_min(1e-12)  # without words: 0
        return torch.cat([self.out(words).relu(), x[graphs.master]], 1)


class MPAD(nn.Module):
    """Message passing attention network for sentences, without its classifier.

    Args:
        vectors: (V + 1, d) word vectors, frozen; row 0 is the master node's. hidden, layers, penultimate: sizes.
        dropout: on the word vectors. aggregator: of ``AGGREGATORS``.
        mask_padding: ``False`` pads every batch without a mask, as the official code does.

    Raises:
        ValueError: unknown aggregator.
    """

    def __init__(
        self,
        vectors: Tensor,
        hidden: int = 64,
        layers: int = 2,
        penultimate: int = 64,
        dropout: float = 0.5,
        aggregator: str = "original",
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator {aggregator!r}, expected one of {', '.join(AGGREGATORS)}")
        self.register_buffer("vectors", vectors, persistent=False)
        self.dropout, self.mask_padding, self.width = dropout, mask_padding, penultimate
        widths = [vectors.shape[1]] + [hidden] * (layers - 1)
        self.blocks = nn.ModuleList(MessagePassing(width, hidden, aggregator) for width in widths)
        self.readouts = nn.ModuleList(Attention(hidden) for _ in range(layers))
        self.norm = nn.BatchNorm1d(2 * layers * hidden)
        self.out = nn.Linear(2 * layers * hidden, penultimate)

    def forward(self, graphs: Graphs) -> Tensor:
        """(G, penultimate) embeddings."""
        _check_batch(self, graphs)
        if not self.mask_padding:
            graphs = pad_words(graphs)
        x = F.dropout(self.vectors[graphs.x], self.dropout, self.training)
        out = []
        for block, readout in zip(self.blocks, self.readouts, strict=True):
            x = block(graphs, x)
            out.append(readout(graphs, x))
        return self.out(self.norm(torch.cat(out, 1))).relu()


# ---- contrastive frameworks ------------------------------------------------------------------------------------------

FRAMEWORKS = ("graphcl", "simclr", "simsiam", "byol", "infograph")
DOMAINS = ("graphs", "documents", "superpixels")


def graphcl_loss(x: Tensor, other: Tensor, temperature: float = 0.2) -> Tensor:
    """Mean over i of -log( S_ii / (sum_j S_ij - S_ii) ), S_ij = exp(cos(x_i, x'_j) / T); may be negative.

    Args:
        x, other: (B, d) projections of the two views, B > 1.
    """
    cosine = F.normalize(x, dim=1) @ F.normalize(other, dim=1).t() / temperature
    own = cosine.diagonal()
    rest = cosine.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -math.inf)
    return (rest.logsumexp(1) - own).mean()


def nt_xent(x: Tensor, other: Tensor, temperature: float = 0.5) -> Tensor:
    """Symmetric loss with the positive inside of the softmax and negatives within and across the views (as GRACE's).

    Args:
        x, other: (B, d).
    """
    both = F.normalize(torch.cat([x, other]), dim=1)
    cosine = (both @ both.t() / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(both), device=x.device).roll(len(x))
    return F.cross_entropy(cosine, partner)


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-mean cos(p, z); no gradient into ``target``."""
    return -F.cosine_similarity(prediction, target.detach(), dim=-1).mean()


def target_decay(step: float, steps: int, base: float = 4e-3) -> float:
    """Decay of BYOL's target network: 1 - base (cos(pi k / K) + 1) / 2, .996 at the start and 1 at the end."""
    return 1 - base * (math.cos(math.pi * step / steps) + 1) / 2


def infograph_loss(nodes: Tensor, codes: Tensor, owner: Tensor) -> Tensor:
    """Jensen-Shannon bound between nodes and graphs: own pairs are positive, all others negative.

    Args:
        nodes: (N, d). codes: (G, d). owner: (N,) graph of each node.
    """
    score = nodes @ codes.t()
    own = score.gather(1, owner[:, None]).squeeze(1)
    negative = F.softplus(score).sum() - F.softplus(own).sum()  # E-(t) + log 2 = softplus(-t) + t = softplus(t)
    pairs = len(nodes) * (len(codes) - 1)
    positive = math.log(2) - F.softplus(-own).mean()  # E+
    return negative / pairs - math.log(2) - positive


class Siamese(nn.Module):
    """Two views through encoder, neck and predictor; ``forward(view, other)`` is the loss.

    Args:
        objective: ``"graphcl"`` or ``"simclr"``: contrast between predictor outputs; ``"simsiam"``: each view's
            prediction is drawn to the other view's output of the neck.
    """

    def __init__(self, encoder: nn.Module, neck: nn.Module, predictor: nn.Module, objective: str) -> None:
        super().__init__()
        self.encoder, self.neck, self.predictor, self.objective = encoder, neck, predictor, objective

    def targets(self, view: Any, other: Any, z: Tensor, z_other: Tensor) -> tuple[Tensor, Tensor]:
        """What the two views are drawn to."""
        return z, z_other

    def forward(self, view: Any, other: Any) -> Tensor:
        """Scalar loss of two views of the same samples."""
        z, z_other = self.neck(self.encoder(view)), self.neck(self.encoder(other))
        p, p_other = self.predictor(z), self.predictor(z_other)
        if self.objective != "simsiam":
            return (graphcl_loss if self.objective == "graphcl" else nt_xent)(p, p_other)
        t, t_other = self.targets(view, other, z, z_other)
        return (negative_cosine(p, t_other) + negative_cosine(p_other, t)) / 2

    def update(self, step: int, steps: int) -> None:
        """After optimiser step number ``step`` (from 1) of ``steps``."""


class BYOL(Siamese):
    """SimSiam with a slowly moving copy of encoder and neck as the target."""

    def __init__(self, encoder: nn.Module, neck: nn.Module, predictor: nn.Module) -> None:
        super().__init__(encoder, neck, predictor, "simsiam")
        self.target = copy.deepcopy(nn.Sequential(encoder, neck)).requires_grad_(False)

    def targets(self, view: Any, other: Any, z: Tensor, z_other: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the target network."""
        with torch.no_grad():
            return self.target(view), self.target(other)

    @torch.no_grad()
    def update(self, step: int, steps: int) -> None:
        """Move the target towards the online network; buffers (batch statistics) are its own."""
        online = [*self.encoder.parameters(), *self.neck.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), online, 1 - target_decay(step, steps))


class InfoGraph(nn.Module):
    """Nodes against graphs instead of two views."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.local, self.whole = _Discriminator(encoder.width), _Discriminator(encoder.width)
        xavier(self)

    def forward(self, view: Graphs, other: Graphs | None = None) -> Tensor:
        """Scalar loss; the second view is not looked at."""
        nodes = torch.cat(self.encoder.layers(view), 1)
        return infograph_loss(self.local(nodes), self.whole(pool(view, nodes)), view.owner)

    def update(self, step: int, steps: int) -> None:
        """Nothing to do."""


class _Discriminator(nn.Module):
    """Three layers beside a linear shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [part for _ in range(3) for part in (nn.Linear(width, width), nn.ReLU())]
        self.block, self.short = nn.Sequential(*layers), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.short(x)


def projector(width: int) -> nn.Sequential:
    """Linear, ReLU, Linear of one width."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))


def bottleneck(width: int, inner: int, norm: bool, bias: bool) -> nn.Sequential:
    """The predictor: Linear (bias as asked), batch norm if asked for, ReLU, Linear."""
    middle = [nn.BatchNorm1d(inner)] if norm else []
    return nn.Sequential(nn.Linear(width, inner, bias=bias), *middle, nn.ReLU(), nn.Linear(inner, width))


def build(framework: str, encoder: Any, domain: str) -> Any:
    """A framework around an encoder, with the heads that the official code gives it in a domain.

    Raises:
        ValueError: unknown framework or domain, or one that the domain does not have.
    """
    if framework not in FRAMEWORKS or domain not in DOMAINS:
        raise ValueError(
            f"framework {framework!r} for {domain!r}: expected {', '.join(FRAMEWORKS)}; {', '.join(DOMAINS)}"
        )
    if framework in ("graphcl", "infograph") and domain != "graphs":
        raise ValueError(f"framework {framework!r} is for graphs, not for {domain}")
    if framework == "infograph":
        return InfoGraph(encoder)
    width = encoder.width
    if domain == "graphs":
        neck: nn.Module = projector(width)
        predictor: nn.Module = bottleneck(width, 64, norm=True, bias=True)
        if framework in ("graphcl", "simclr"):
            predictor = nn.Identity()
        xavier(neck)
    elif domain == "documents":
        neck, predictor = nn.BatchNorm1d(width), bottleneck(width, 30, norm=True, bias=False)
    else:
        neck, predictor = nn.Identity(), bottleneck(width, 128, norm=False, bias=False)
    if framework == "byol":
        return BYOL(encoder, neck, predictor)
    return Siamese(encoder, neck, predictor, framework)


class Classifier(nn.Module):
    """An encoder and a linear layer on its embeddings, the supervised model."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder, self.out = encoder, nn.Linear(encoder.width, classes)
        xavier(self.out)

    def forward(self, graphs: Graphs) -> Tensor:
        """(G, C) logits."""
        return self.out(self.encoder(graphs))


# ---- what embeddings are judged by -----------------------------------------------------------------------------------


def class_similarity(embeddings: Tensor, labels: Tensor) -> Tensor:
    """(C, C) mean cosine over all pairs of different samples of two classes, in closed form.

    Args:
        embeddings: (N, d). labels: (N,) classes 0..C-1, each at least twice.

    Raises:
        ValueError: a class with fewer than two samples has no pair.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    member = F.one_hot(labels).double()
    sums, count = member.t() @ unit, member.sum(0)
    if bool((count < 2).any()):
        raise ValueError(f"class {int(count.argmin())} has {int(count.min())} sample(s), expected at least two of each")
    own = torch.diag((member * unit.square().sum(1, keepdim=True)).sum(0))
    return ((sums @ sums.t() - own) / (count[:, None] * count - torch.diag(count))).float()


def separability(similarity: Tensor) -> float:
    """Mean cosine within a class less the mean cosine between classes, from ``class_similarity``."""
    within = similarity.diagonal().mean()
    between = (similarity.sum() - similarity.trace()) / max(1, similarity.numel() - len(similarity))
    return float(within - between)


def invariance(embeddings: Tensor, views: Tensor) -> float:
    """Mean cosine of each sample's embedding and that of its augmented view, both (N, d)."""
    return float(F.cosine_similarity(embeddings, views, dim=1).mean())


def spread(embeddings: Tensor) -> float:
    """Mean over dimensions of the standard deviation of unit embeddings; far below 1 / sqrt(d) they have collapsed."""
    return float(F.normalize(embeddings, dim=1).std(0, correction=0).mean())


def knn_predict(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int, temperature: float = 0.1
) -> Tensor:
    """Weighted vote of the k nearest of a bank by cosine, weights exp(cos / T).

    Args:
        bank: (M, d). labels: (M,). queries: (Q, d).

    Returns:
        (Q,) predicted classes.

    Raises:
        ValueError: k larger than the bank. A bank of one class is warned about.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, expected 1 to {len(bank)}, the size of the bank")
    if len(labels.unique()) < 2:
        warnings.warn("the bank has a single class: every query is given that class", stacklevel=2)
    cosine = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).t()
    weight, index = cosine.topk(k, dim=1)
    votes = torch.zeros(len(queries), classes).scatter_add_(1, labels[index], (weight / temperature).exp())
    return votes.argmax(1)
