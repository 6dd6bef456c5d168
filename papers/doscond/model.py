"""DosCond: condense many graphs into a few by matching gradients at freshly drawn weights.

Graph classification::

    graphs = GraphSet(x, edges, ptr)                                   # the real graphs
    small = CondensedGraphs([1, 1], nodes=18, features=7)              # one graph for each of two classes
    small.start(*graphs.dense(chosen, 18))                             # from real graphs
    model = GCN(7, 2)
    model.reset()                                                      # theta_0: one step, no inner training
    sampled = small.sample()
    for c, members in enumerate(of_class):
        match(model, small.of_class(sampled, c), (graphs.batch(members), labels[members]))   # summed: the loss

One network serves both sides: real graphs are a ``Batch``, synthetic ones ``DenseGraphs``, and both offer the few
operations that a GCN needs. The node-classification variant stands at the end: ``NodeNet``, ``CondensedNodes``.

Jin et al., "Condensing Graphs via One-Step Gradient Matching" (KDD 2022, arXiv 2206.07746); where the paper leaves
something open, the official code decides. Names: G graphs, n nodes of a graph, N nodes in all, d features, h hidden
units, C classes, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

METRICS = ("mse", "cos", "ours")
POOLINGS = ("mean", "sum")
NORMS = ("none", "instance")
EPS = 1e-6


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed ones.

    Raises:
        ValueError: lists them.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


# ---- sparse products -------------------------------------------------------------------------------------------------


def runs(start: Tensor, count: Tensor) -> Tensor:
    """start[0], start[0] + 1, .. (count[0] numbers), start[1], ..: positions of ragged rows, int64."""
    before = count.cumsum(0) - count
    total = torch.arange(int(count.sum()), device=count.device)
    return torch.repeat_interleave(start - before, count) + total


@dataclass(frozen=True)
class Sparse:
    """A constant sparse matrix by rows (CSR); ``matrix @ h`` multiplies a dense h, any number of times differentiable.

    Attributes:
        start: (rows + 1,) int64, where each row begins. col: (E,) int64. value: (E,). width: number of columns.
    """

    start: Tensor
    col: Tensor
    value: Tensor
    width: int

    @staticmethod
    def of(row: Tensor, col: Tensor, value: Tensor, shape: tuple[int, int]) -> Sparse:
        """From entries in any order; entries at one place add up."""
        order = row.argsort(stable=True)
        ends = torch.bincount(row, minlength=shape[0]).cumsum(0)
        return Sparse(torch.cat([ends.new_zeros(1), ends]), col[order], value[order], shape[1])

    def __len__(self) -> int:
        return len(self.start) - 1

    @cached_property
    def row(self) -> Tensor:
        """(E,) int64 row of each entry."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.col.device), self.start.diff())

    @cached_property
    def t(self) -> Sparse:
        """The transposed matrix."""
        return Sparse.of(self.col, self.row, self.value, (self.width, len(self)))

    def rows(self, index: Tensor) -> Sparse:
        """The matrix of these rows."""
        count = self.start[index + 1] - self.start[index]
        place = runs(self.start[index], count)
        start = torch.cat([count.new_zeros(1), count.cumsum(0)])
        return Sparse(start, self.col[place], self.value[place], self.width)

    def dense(self) -> Tensor:
        """The matrix as a dense tensor."""
        out = self.value.new_zeros(len(self), self.width)
        return out.index_put((self.row, self.col), self.value, accumulate=True)

    def sums(self, h: Tensor) -> Tensor:
        """The product without a gradient: (width, k) -> (rows, k)."""
        h = h.to(self.value.dtype).contiguous()  # half precision is widened
        if h.device.type == "cpu" and len(self.col):
            # A bag is a row, its words are the columns: the fastest weighted sum of rows that torch has on a CPU.
            return torch.embedding_bag(h, self.col, self.start, False, 0, False, self.value, True)[0]
        return h.new_zeros(len(self), h.shape[1]).index_add(0, self.row, self.value[:, None] * h[self.col])

    def __matmul__(self, h: Tensor) -> Tensor:
        return _Product.apply(self, h)


class _Product(torch.autograd.Function):
    """A constant sparse matrix times a dense one; the gradient is a product of the same kind."""

    @staticmethod
    def forward(ctx: Any, matrix: Sparse, h: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix.sums(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix.t @ grad


# ---- graphs as a GCN sees them ---------------------------------------------------------------------------------------


class Graphs(Protocol):
    """What a GCN asks of a set of graphs. Rows of layer l are what layer l computes; layer 0 has ``first``."""

    first: Tensor
    """(rows, d): A_hat X, the input of the first layer after its propagation."""

    def propagate(self, layer: int, h: Tensor) -> Tensor:
        """A_hat h for layer 1, 2, ..: rows of the layer before -> rows of this layer."""

    def pool(self, h: Tensor, pooling: str) -> Tensor:
        """Rows of the last layer -> (G, width), the mean or sum over a graph's nodes."""

    def share(self, layer: int) -> Tensor:
        """(rows, 1): the share of all nodes that a row of a layer stands for."""


@dataclass(frozen=True)
class Batch:
    """Some graphs of a ``GraphSet``, disjoint in one; nodes that a GCN cannot tell apart are one row."""

    first: Tensor
    steps: tuple[Sparse, ...]
    readout: Sparse
    sizes: Tensor
    counts: tuple[Tensor, ...]

    def propagate(self, layer: int, h: Tensor) -> Tensor:
        """See ``Graphs``."""
        return self.steps[layer - 1] @ h

    def pool(self, h: Tensor, pooling: str) -> Tensor:
        """See ``Graphs``."""
        total = self.readout @ h
        return total / self.sizes[:, None] if pooling == "mean" else total

    def share(self, layer: int) -> Tensor:
        """See ``Graphs``."""
        return (self.counts[layer] / self.sizes.sum())[:, None]


class DenseGraphs:
    """Graphs of n nodes each, as features and (possibly weighted) adjacency; gradients reach both.

    Args:
        x: (G, n, d). adj: (G, n, n), row i holds what reaches node i; the diagonal counts as 1.
    """

    def __init__(self, x: Tensor, adj: Tensor) -> None:
        loop = torch.eye(adj.shape[1], dtype=torch.bool, device=adj.device)
        adj = adj.masked_fill(loop, 1.0)
        scale = adj.sum(2).clamp(min=1).rsqrt()
        self.hat = scale[:, :, None] * adj * scale[:, None, :]
        self.first = (self.hat @ x).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.hat)

    def __getitem__(self, part: slice | Tensor) -> DenseGraphs:
        """Some of the graphs."""
        out = object.__new__(DenseGraphs)
        out.hat = self.hat[part]
        out.first = self.first.view(len(self), -1, self.first.shape[1])[part].flatten(0, 1)
        return out

    def propagate(self, layer: int, h: Tensor) -> Tensor:
        """See ``Graphs``."""
        return (self.hat @ h.view(len(self), -1, h.shape[1])).flatten(0, 1)

    def pool(self, h: Tensor, pooling: str) -> Tensor:
        """See ``Graphs``; nodes without edges count too."""
        h = h.view(len(self), -1, h.shape[1])
        return h.mean(1) if pooling == "mean" else h.sum(1)

    def share(self, layer: int) -> Tensor:
        """See ``Graphs``."""
        return self.first.new_full((len(self.first), 1), 1 / len(self.first))


class GraphSet:
    """Real graphs, prepared once so that batches are cheap.

    After l layers a GCN gives two nodes the same row when their l-hop neighbourhoods agree (features, degrees, and how
    often each occurs). Such nodes are found once by colour refinement and computed once; in sets of molecules that
    leaves a fraction of the rows. Features with nearly as many values as nodes are left as they are.

    Args:
        x: (N, d) float. edges: (2, E) int64 pairs (source, target); loops and repeated pairs count once.
        ptr: (G + 1,) int64; graph g has the nodes ``ptr[g] .. ptr[g + 1] - 1``. layers: convolutions of the GCN.
        merge: compute equal nodes once; ``False`` gives every node a row of its own.

    Raises:
        ValueError: a graph without nodes, or an edge outside of its graph.
    """

    def __init__(self, x: Tensor, edges: Tensor, ptr: Tensor, layers: int = 3, merge: bool = True) -> None:
        self.x, self.ptr, self.sizes = x, ptr, ptr.diff()
        nodes = len(x)
        if (self.sizes < 1).any():
            raise ValueError(f"graph {int((self.sizes < 1).nonzero()[0])} has no node")
        graph = torch.repeat_interleave(torch.arange(len(self), device=x.device), self.sizes)
        if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= nodes):
            raise ValueError(f"an edge names node {int(edges.max())}, expected 0 to {nodes - 1}")
        wrong = graph[edges[0]] != graph[edges[1]]
        if wrong.any():
            raise ValueError(f"an edge leaves graph {int(graph[edges[0]][wrong][0])}")
        source, target = edges[:, edges[0] != edges[1]]
        own = torch.arange(nodes, device=x.device)
        pair = torch.unique(torch.cat([target * nodes + source, own * (nodes + 1)]))  # A + I, by rows
        target, source = pair // nodes, pair % nodes
        degree = torch.bincount(target, minlength=nodes)
        scale = degree.to(x.dtype).rsqrt()
        self.hat = Sparse.of(target, source, scale[target] * scale[source], (nodes, nodes))
        colour = _ids(_hash_rows(x) + _random(int(degree.max()) + 1, x.device)[degree])
        self.colours: list[Tensor] = []
        steps: list[Sparse] = []
        for _ in range(layers):
            before, colour = colour, self._refine(colour, degree) if merge else own
            example = torch.empty(int(colour.max()) + 1, dtype=torch.int64, device=x.device)
            example[colour] = own
            step = self.hat.rows(example)
            steps.append(step if not self.colours else Sparse(step.start, before[step.col], step.value, len(steps[-1])))
            self.colours.append(colour)
        self.first = steps[0] @ x
        self.steps = steps[1:]

    def _refine(self, colour: Tensor, degree: Tensor) -> Tensor:
        """Colours of one more hop: degree, and the multiset of the neighbours' colours, as a sum of random numbers."""
        count = int(colour.max()) + 1
        if count > len(self.x) // 2:
            return torch.arange(len(self.x), device=colour.device)
        seen = _random(count, colour.device, 1)[colour][self.hat.col]
        key = _random(int(degree.max()) + 1, colour.device)[degree].index_add(0, self.hat.row, seen)
        return _ids(key)

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def nodes_of(self, index: Tensor) -> Tensor:
        """Nodes of these graphs, graph by graph, int64."""
        return runs(self.ptr[index], self.sizes[index])

    def batch(self, index: Tensor) -> Batch:
        """These graphs for a GCN."""
        nodes = self.nodes_of(index)
        steps, counts = [], []
        last = torch.empty(0)
        for layer, colours in enumerate(self.colours):
            colour = colours[nodes]
            count = torch.bincount(colour)
            present = count.nonzero().squeeze(1)
            place = (count > 0).cumsum(0) - 1
            if layer == 0:
                first = self.first[present]
            else:
                step = self.steps[layer - 1].rows(present)
                steps.append(Sparse(step.start, last[step.col], step.value, len(counts[-1])))
            counts.append(count[present].to(self.x.dtype))
            last = place
        sizes = self.sizes[index]
        start = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        readout = Sparse(start, last[colour], self.x.new_ones(len(nodes)), len(counts[-1]))
        return Batch(first, tuple(steps), readout, sizes.to(self.x.dtype), tuple(counts))

    def dense(self, index: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """These graphs padded, or cut, to ``nodes`` nodes: features (G, nodes, d) and adjacency (G, nodes, nodes)."""
        members = self.nodes_of(index)
        part = self.hat.rows(members)
        graph = torch.repeat_interleave(torch.arange(len(index), device=members.device), self.sizes[index])
        place = members - self.ptr[index][graph]
        x = self.x.new_zeros(len(index), nodes, self.x.shape[1])
        keep = place < nodes
        x[graph[keep], place[keep]] = self.x[members[keep]]
        of = graph[part.row]
        target, source = place[part.row], part.col - self.ptr[index][of]
        keep = (target < nodes) & (source < nodes) & (target != source)
        adj = x.new_zeros(len(index), nodes, nodes)
        adj[of[keep], target[keep], source[keep]] = 1.0
        return x, adj


def _random(count: int, device: torch.device, stream: int = 0) -> Tensor:
    """(count,) int64, the same in every process: sums of them tell multisets apart."""
    generator = torch.Generator().manual_seed(stream)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator).to(device)


def _hash_rows(x: Tensor) -> Tensor:
    """(N, d) -> (N,) int64: equal rows have equal numbers."""
    out = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for column, factor in zip(x.float().t(), _random(x.shape[1], x.device, 2).tolist(), strict=True):
        mixed = column.contiguous().view(torch.int32).long() * (factor | 1)
        out += (mixed ^ (mixed >> 29)) * (factor | 1)  # round numbers end in many zero bits
    return out


def _ids(key: Tensor) -> Tensor:
    """Number the distinct values: (N,) -> (N,) int64 from 0."""
    return torch.unique(key, return_inverse=True)[1]


# ---- the network -----------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """x W^T (+ b) for one network, or for K networks at once, whose columns stand side by side.

    Args:
        copies: () or (K,). The input has the columns of all K, or those of one that all share.
    """

    def __init__(self, inputs: int, outputs: int, copies: tuple[int, ...] = (), bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*copies, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(*copies, outputs)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        """(rows, inputs) or (rows, K inputs) -> (rows, K outputs)."""
        *copies, outputs, inputs = self.weight.shape
        if h.shape[1] == inputs:
            out = h @ self.weight.view(-1, inputs).t()
        else:
            side_by_side = h.view(len(h), -1, inputs).transpose(0, 1)
            out = torch.bmm(side_by_side, self.weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        return out if self.bias is None else out + self.bias.flatten()


class Convolution(nn.Module):
    """A_hat X W^T + b; Glorot weights, zero bias."""

    def __init__(self, inputs: int, outputs: int, copies: tuple[int, ...]) -> None:
        super().__init__()
        self.lin = Linear(inputs, outputs, copies)
        self.bias = nn.Parameter(torch.empty(*copies, outputs))

    def forward(self, graphs: Graphs, layer: int, h: Tensor) -> Tensor:
        """Rows of the layer before -> rows of this one."""
        z = self.lin(h)
        return (graphs.propagate(layer, z) if layer else z) + self.bias.flatten()  # first = A_hat X already


class GCN(nn.Module):
    """GCN layers with ReLU, a readout over nodes, one linear layer.

    The state dict has the official names (``convs.0.lin.weight``, ``convs.0.bias``, .., ``lin3.weight``).

    Args:
        features, classes: d and C; ``classes=1`` gives one logit. hidden, layers: h and L. norm: "none", or "instance":
            each channel over all nodes of the batch. pooling: "mean" or "sum".
        copies: K networks with weights of their own, trained and evaluated in one pass.

    Raises:
        ValueError: an unknown norm or pooling, or a size below 1.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        hidden: int = 128,
        layers: int = 3,
        norm: str = "none",
        pooling: str = "mean",
        copies: int | None = None,
    ) -> None:
        super().__init__()
        check_one_of("norm", norm, NORMS)
        check_one_of("pooling", pooling, POOLINGS)
        if min(features, classes, hidden, layers, copies or 1) < 1:
            raise ValueError(
                f"{features} features, {classes} classes, {hidden} hidden, {layers} layers: expected at least 1 each"
            )
        self.norm, self.pooling, self.copies = norm, pooling, copies
        many = () if copies is None else (copies,)
        widths = [features] + [hidden] * layers
        self.convs = nn.ModuleList(Convolution(i, o, many) for i, o in pairwise(widths))
        self.lin3 = Linear(hidden, classes, many, bias=True)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw theta_0 ~ P(theta_0)."""
        for conv in self.convs:
            outputs, inputs = conv.lin.weight.shape[-2:]
            bound = math.sqrt(6 / (inputs + outputs))
            conv.lin.weight.uniform_(-bound, bound)
            conv.bias.zero_()
        bound = 1 / math.sqrt(self.lin3.weight.shape[-1])
        self.lin3.weight.uniform_(-bound, bound)
        self.lin3.bias.uniform_(-bound, bound)

    def embed(self, graphs: Graphs) -> Tensor:
        """Pooled representations (G, h), or (G, K h)."""
        h = graphs.first
        for layer, conv in enumerate(self.convs):
            h = conv(graphs, layer, h)
            if self.norm == "instance":
                share = graphs.share(layer)
                h = h - (share * h).sum(0)
                h = h * (1e-5 + (share * h * h).sum(0)).rsqrt()
            h = F.relu(h)
        return graphs.pool(h, self.pooling)

    def forward(self, graphs: Graphs) -> Tensor:
        """Log-probabilities (G, C), or logits (G, 1) with one class; (K, G, C) with copies."""
        out = self.lin3(self.embed(graphs))
        if self.copies is not None:
            out = out.view(len(out), self.copies, -1).transpose(0, 1)
        return out if out.shape[-1] == 1 else out.log_softmax(-1)


def graph_loss(out: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood, or binary cross-entropy of one logit: (.., G, C), (G,) -> (..)."""
    if out.shape[-1] == 1:
        target = labels.to(out.dtype).expand(out.shape[:-1])
        return F.binary_cross_entropy_with_logits(out[..., 0], target, reduction="none").mean(-1)
    return -out.gather(-1, labels.expand(out.shape[:-1])[..., None])[..., 0].mean(-1)


# ---- gradient matching -------------------------------------------------------------------------------


def distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: str = "mse", relative: bool = True) -> Tensor:
    """D(g_S, g_T), the distance of two gradients.

    Args:
        synthetic, real: one tensor a parameter; matrices are (outputs, inputs).
        metric: "mse": squared difference of all entries, with ``relative`` divided by ``||g_T||^2``; "cos": 1 - cosine
            of all entries; "ours": 1 - cosine of each output's weights, summed, without the biases.

    Raises:
        ValueError: an unknown metric.
    """
    check_one_of("metric", metric, METRICS)
    if metric == "ours":
        pairs = [(s, r) for s, r in zip(synthetic, real, strict=True) if r.dim() == 2]
        return sum((1 - _cosine(s, r)).sum() for s, r in pairs)
    s, r = (torch.cat([g.flatten() for g in side]) for side in (synthetic, real))
    if metric == "cos":
        return 1 - _cosine(s, r)
    squared = (s - r).square().sum()
    return squared / r.square().sum() if relative else squared


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPS)


def match(
    model: GCN,
    synthetic: tuple[Graphs, Tensor],
    real: tuple[Graphs, Tensor],
    metric: str = "mse",
) -> Tensor:
    """D(grad l(S; theta), grad l(T; theta)) at the model's weights; gradients reach the synthetic graphs only.

    Args:
        synthetic, real: graphs and their labels (G,) int64.
    """
    parameters = list(model.parameters())
    of_real = torch.autograd.grad(graph_loss(model(real[0]), real[1]), parameters)
    of_synthetic = torch.autograd.grad(graph_loss(model(synthetic[0]), synthetic[1]), parameters, create_graph=True)
    return distance(of_synthetic, of_real, metric)


# ---- condensed graphs -------------------------------------------------------------------------------------


def class_counts(labels: Tensor, ipc: int = 0, rate: float = 0.0) -> list[int]:
    """Condensed graphs (or nodes) of each class: ``ipc``, or with ``ipc=0`` a share ``rate`` of its members.

    By rate, classes get ``max(int(n_c rate), 1)`` in the order of their size, and the largest what is left of
    ``int(n rate)``.

    Raises:
        ValueError: a class without members, or nothing left for one: names class and counts.
    """
    members = torch.bincount(labels).tolist()
    if 0 in members:
        raise ValueError(f"class {members.index(0)} has no training member, counts are {members}")
    if ipc:
        return [ipc] * len(members)
    order = sorted(range(len(members)), key=lambda c: members[c])
    counts = [max(int(n * rate), 1) for n in members]
    counts[order[-1]] = int(sum(members) * rate) - sum(counts[c] for c in order[:-1])
    if counts[order[-1]] < 1:
        raise ValueError(
            f"rate {rate} of {members} leaves {counts[order[-1]]} for class {order[-1]}, expected 1 or more"
        )
    return counts


def temperature(drawn: int) -> float:
    """tau after ``drawn`` samples: 1 falling to 0.01 at 200, then constant."""
    return max(0.01, 0.01 ** (drawn / 200))


class CondensedGraphs(nn.Module):
    """Synthetic graphs: a logit for every possible edge (independent Bernoulli variables), features, fixed labels.

    Args:
        counts: graphs of each class. nodes: n of every graph. features: d.
        discrete: edges are Bernoulli; otherwise the adjacency itself is learned, with entries in [0, 1].
        symmetric: undirected graphs.
    """

    def __init__(
        self, counts: Sequence[int], nodes: int, features: int, discrete: bool = True, symmetric: bool = True
    ) -> None:
        super().__init__()
        total = sum(counts)
        self.omega = nn.Parameter(torch.zeros(total, nodes, nodes))
        self.x = nn.Parameter(torch.zeros(total, nodes, features))
        self.register_buffer("labels", torch.tensor([c for c, count in enumerate(counts) for _ in range(count)]))
        self.register_buffer("sparsity", torch.zeros(()))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        self.parts = [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
        self.discrete, self.symmetric = discrete, symmetric

    @torch.no_grad()
    def start(self, x: Tensor | None = None, adj: Tensor | None = None) -> None:
        """Begin at padded real graphs, (G, n, d) and (G, n, n) with entries 0 and 1; without them, at noise.

        Raises:
            ValueError: other shapes than those of this module.
        """
        if x is None or adj is None:
            self.x.uniform_()
            self.omega.uniform_()
            self.sparsity.copy_(self.omega.mean())
            if self.discrete:
                self.omega.copy_(torch.logit(self.omega).clamp(-10, 10))
            return
        if x.shape != self.x.shape or adj.shape != self.omega.shape:
            shapes = f"{tuple(x.shape)} and {tuple(adj.shape)}"
            raise ValueError(f"graphs {shapes}, expected {tuple(self.x.shape)} and {tuple(self.omega.shape)}")
        self.x.copy_(x)
        self.sparsity.copy_(adj.mean())  # epsilon
        self.omega.copy_(10 * adj - 5 if self.discrete else adj)

    def logits(self) -> Tensor:
        """Omega (G, n, n), made symmetric for undirected graphs."""
        return (self.omega + self.omega.transpose(1, 2)) / 2 if self.symmetric else self.omega

    def relaxed(self) -> Tensor:
        """(G, n, n) adjacency with a gradient: a binary concrete sample at the current temperature, zero diagonal."""
        if not self.discrete:
            return self.omega
        tau = temperature(int(self.drawn))
        self.drawn += 1
        noise = torch.rand_like(self.omega).clamp(1e-7, 1 - 1e-7).triu()
        noise = noise + noise.triu(1).transpose(1, 2)  # one number for (i, j) and (j, i)
        adj = torch.sigmoid((torch.logit(noise) + self.logits()) / tau)
        return adj - torch.diag_embed(adj.diagonal(dim1=1, dim2=2))

    def sample(self) -> DenseGraphs:
        """A relaxed sample of all graphs."""
        return DenseGraphs(self.x, self.relaxed())

    @torch.no_grad()
    def adjacency(self) -> Tensor:
        """(G, n, n) float: the edges that are more likely there than not; the learned weights if not discrete."""
        adj = (self.logits() > 0).to(self.omega.dtype) if self.discrete else self.omega.clone()
        adj.diagonal(dim1=1, dim2=2).zero_()
        return adj

    def graphs(self) -> DenseGraphs:
        """The condensed graphs, for training a network on them."""
        return DenseGraphs(self.x.detach(), self.adjacency())

    def of_class(self, graphs: DenseGraphs, label: int) -> tuple[DenseGraphs, Tensor]:
        """The graphs of one class, and their labels."""
        return graphs[self.parts[label]], self.labels[self.parts[label]]

    def penalty(self) -> Tensor:
        """max(mean edge probability - epsilon, 0); times beta in the loss."""
        return F.relu(torch.sigmoid(self.omega).mean() - self.sparsity)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep a continuous adjacency in [0, 1]; call it after each step."""
        if not self.discrete:
            self.omega.clamp_(0, 1)


def bound(graphs: DenseGraphs, x: Tensor, layers: int, pooling: str, classes: int = 2) -> Tensor:
    """The term of the generalisation bound that depends on the graphs (Theorem 1): the norm of pooled A_hat^L X.

    Args:
        graphs: sampled graphs. x: (G, n, d) their features.
    """
    z = graphs.first
    for layer in range(1, layers):
        z = graphs.propagate(layer, z)
    norm = graphs.pool(z, pooling).norm()
    return 1.5 / math.sqrt(100) * (classes - 1) / classes / len(x) * norm / math.sqrt(2)


# ---- coresets --------------------------------------------------------------------------------------------------------


def herding(embedding: Tensor, count: int) -> Tensor:
    """Greedily the ``count`` members whose running mean stays nearest to the mean of all: (M, h) -> (count,) int64."""
    mean, total = embedding.mean(0), torch.zeros_like(embedding[0])
    free = torch.zeros(len(embedding), device=embedding.device)
    chosen = []
    for k in range(1, count + 1):
        gap = (k * mean - total - embedding).norm(dim=1) + free
        chosen.append(gap.argmin())
        free[chosen[-1]] = math.inf
        total = total + embedding[chosen[-1]]
    return torch.stack(chosen)


def k_center(embedding: Tensor, count: int) -> Tensor:
    """The member nearest to the mean, then always the one farthest from those chosen: (M, h) -> (count,) int64."""
    chosen = [(embedding - embedding.mean(0)).norm(dim=1).argmin()]
    nearest = torch.full((len(embedding),), math.inf, device=embedding.device)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (embedding - embedding[chosen[-1]]).norm(dim=1))
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


# ---- node classification (one graph, condensed into a few nodes) -----------------------------------------------------


class NodeNet(nn.Module):
    """GCN, or SGC ("sgc": all linear layers, then all propagations), for nodes; U(-1/sqrt(in), 1/sqrt(in)) start.

    Args:
        features, classes, hidden, layers: sizes. dropout: after each hidden layer. kind: "gcn" or "sgc".
    """

    def __init__(
        self,
        features: int,
        classes: int,
        hidden: int = 256,
        layers: int = 2,
        dropout: float = 0.0,
        kind: str = "gcn",
    ) -> None:
        super().__init__()
        check_one_of("kind", kind, ("gcn", "sgc"))
        if min(features, classes, hidden, layers) < 1 or not 0 <= dropout < 1:
            sizes = f"{features} features, {classes} classes, {hidden} hidden, {layers} layers"
            raise ValueError(f"{sizes}, dropout {dropout}: expected at least 1 each, and 0 <= dropout < 1")
        widths = [features, *[hidden] * (layers - 1), classes]
        self.weights = nn.ParameterList(torch.empty(i, o) for i, o in pairwise(widths))
        self.biases = nn.ParameterList(torch.empty(o) for o in widths[1:])
        self.dropout, self.kind = dropout, kind
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw theta_0."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            limit = 1 / math.sqrt(weight.shape[0])
            weight.uniform_(-limit, limit)
            bias.uniform_(-limit, limit)

    def hidden(self, x: Tensor | Sparse, hats: Sequence[Tensor | Sparse]) -> Tensor:
        """Scores (N, C) before the softmax; see ``forward``."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight
            x = (hats[layer] @ x if self.kind == "gcn" else x) + bias
            if layer < len(self.weights) - 1:
                x = F.dropout(F.relu(x), self.dropout, self.training)
        if self.kind == "sgc":
            for hat in hats:
                x = hat @ x
        return x

    def forward(self, x: Tensor | Sparse, hats: Sequence[Tensor | Sparse]) -> Tensor:
        """Log-probabilities (rows of the last hat, C).

        Args:
            x: (rows, d) dense or sparse. hats: one normalised adjacency a layer, the first one first.
        """
        return self.hidden(x, hats).log_softmax(1)


class PGE(nn.Module):
    """A'_ij = sigmoid of an MLP on [x_i; x_j], made symmetric, without a diagonal (the node variant's structure).

    The MLP's first layer is linear in both halves, so n rows are multiplied rather than n^2.

    Args:
        features: d. hidden: width of the two hidden layers, each with batch normalisation over all n^2 pairs.
    """

    def __init__(self, features: int, hidden: int = 128) -> None:
        super().__init__()
        widths = [2 * features, hidden, hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm1d(hidden, track_running_stats=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, n) weights in (0, 1), zero diagonal."""
        n, d = x.shape
        first = self.layers[0]
        left, right = x @ first.weight[:, :d].t() + first.bias, x @ first.weight[:, d:].t()
        z = (left[:, None] + right).flatten(0, 1)
        z = self.layers[1](F.relu(self.bns[0](z)))
        z = self.layers[2](F.relu(self.bns[1](z))).view(n, n)
        adj = torch.sigmoid((z + z.t()) / 2)
        return adj - adj.diag().diag()


class CondensedNodes(nn.Module):
    """Synthetic nodes: features, fixed labels, and a PGE that gives their edges.

    Args:
        counts: nodes of each class. features: d. hidden: of the PGE.
    """

    def __init__(self, counts: Sequence[int], features: int, hidden: int = 128) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(sum(counts), features))
        self.pge = PGE(features, hidden)
        self.register_buffer("labels", torch.tensor([c for c, count in enumerate(counts) for _ in range(count)]))
        self.parts = [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
        self.weights = [count / max(counts) for count in counts]

    def hat(self) -> Tensor:
        """(n, n) normalised adjacency."""
        return normalized(self.pge(self.x))


def normalized(adj: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2 of a dense (n, n) adjacency without diagonal."""
    adj = adj + torch.eye(len(adj), device=adj.device)
    scale = adj.sum(1).rsqrt()
    return scale[:, None] * adj * scale


def neighbourhood(hat: Sparse, nodes: Tensor, fanouts: Sequence[int]) -> tuple[Tensor, list[Sparse]]:
    """Sample what the prediction for some nodes depends on: at most ``fanouts[k]`` entries of a row at k hops.

    Args:
        hat: (N, N) normalised adjacency with loops, which are entries like others. nodes: (B,) distinct node ids.

    Returns:
        ids of the nodes whose features are needed, and a matrix for each layer, the first one first; rows of the last
        are ``nodes``. Entries keep their weights.
    """
    steps: list[Sparse] = []
    for fanout in fanouts:
        part = hat.rows(nodes)
        order = (part.row + torch.rand(len(part.row), dtype=torch.float64, device=nodes.device)).argsort()
        rank = torch.arange(len(order), device=nodes.device) - part.start[part.row]  # rows stay together
        kept = order[rank < fanout]
        row, col = part.row[kept], part.col[kept]
        rest = torch.unique(col)
        rest = rest[~torch.isin(rest, nodes)]
        nodes = torch.cat([nodes, rest])
        place = torch.empty(hat.width, dtype=torch.int64, device=nodes.device)
        place[nodes] = torch.arange(len(nodes), device=nodes.device)
        steps.append(Sparse.of(row, place[col], part.value[kept], (len(part), len(nodes))))
    return nodes, steps[::-1]


def match_nodes(
    model: NodeNet,
    condensed: CondensedNodes,
    real: Sequence[tuple[Tensor | Sparse, Sequence[Sparse], Tensor]],
    metric: str = "mse",
) -> Tensor:
    """sum_c n_c / max n_c D(grad l(S_c), grad l(T_c)); "mse" is not relative here.

    Args:
        real: of each class the features, the propagations and the labels of a sampled neighbourhood.
    """
    parameters = list(model.parameters())
    hat = condensed.hat()
    out = model(condensed.x, [hat] * len(real[0][1]))
    total = out.new_zeros(())
    for part, weight, (x, hats, labels) in zip(condensed.parts, condensed.weights, real, strict=True):
        of_real = torch.autograd.grad(F.nll_loss(model(x, hats), labels), parameters)
        loss = F.nll_loss(out[part], condensed.labels[part])
        of_synthetic = torch.autograd.grad(loss, parameters, create_graph=True)
        sides = [[g.t() for g in side] for side in (of_synthetic, of_real)]  # (outputs, inputs)
        total = total + weight * distance(*sides, metric, relative=False)
    return total
