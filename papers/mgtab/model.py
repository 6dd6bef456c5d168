"""The networks of the MGTAB benchmark for graphs with typed edges, and its feature-only classifiers.

Every network maps the users' features and a graph to logits::

    graph = RelationGraph(edges, types, nodes, relations=2)   # edges (source, target); types 0..R-1
    model = RGCN(features=788, hidden=256, classes=2, relations=2)
    logits = model(x, graph)                                  # x (N, F) -> (N, C)

GCN, GraphSAGE, RGCN and BotRGCN are linear between their first layer and their output, so the last convolution and the
output layer are one matrix: what travels along the edges of the last convolution are C numbers a user and relation, not
h. Attention networks keep one number an edge and a head; queries, keys and messages are made a user (and relation) at a
time and meet on the edges in sparse products. Nothing of the size E x h is ever made.

Section numbers are those of Shi et al., "MGTAB" (arXiv 2301.01123); where it leaves something open, the official code
decides. Names: N users, E edges, R relations, F features, C classes, h hidden units.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PROPERTIES = 20
"""Columns of a user's profile; a tweet embedding follows."""
TWEET = 768
"""Width of the tweet embedding (LaBSE)."""
NUMERIC = (3, 5, 6, 7, 9, 10, 11, 12, 13, 14)
"""Columns with counts, lengths and ages."""
CATEGORICAL = (0, 1, 2, 4, 8, 15, 16, 17, 18, 19)
"""Columns that are true or false."""


# ---- sparse products -------------------------------------------------------------------------------------------------


class Pattern:
    """Where the entries of a sparse (n, m) matrix are, row by row (CSR); a pair may stand several times.

    As papers.ggcn.model.Pattern, which wants distinct pairs. A vector of E values on the entries is the matrix.

    Args:
        row, col: (E,) int64, rows not falling. shape: (n, m).

    Raises:
        ValueError: pairs out of range, rows unsorted.
    """

    def __init__(self, row: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
        n, m = shape
        if row.numel() and (min(row.min(), col.min()) < 0 or row.max() >= n or col.max() >= m):
            raise ValueError(f"a sparse matrix has entries outside of its shape {n} x {m}")
        if bool((row.diff() < 0).any()):
            raise ValueError("entries of a sparse matrix must be sorted by row")
        self.row, self.col, self.shape = row, col, shape
        ends = torch.bincount(row, minlength=n).cumsum(0)
        self.crow = torch.cat([ends.new_zeros(1), ends])
        self.route = {"cpu": "bag", "cuda": "csr"}.get(row.device.type, "gather")
        """How sums are made: embedding bags (the fastest that torch has on a CPU), CSR kernels, or gathered rows."""

    @cached_property
    def perm(self) -> Tensor:
        """(E,) entry e of the transposed matrix is entry ``perm[e]`` here."""
        return self.col.argsort(stable=True)

    @cached_property
    def t(self) -> Pattern:
        """The pattern of the transposed matrix."""
        turned = Pattern(self.col[self.perm], self.row[self.perm], self.shape[::-1])
        turned.route = self.route
        return turned

    def __len__(self) -> int:
        """Number of entries, E."""
        return self.row.numel()

    def _csr(self, values: Tensor) -> Tensor:
        with warnings.catch_warnings():  # torch says once a process that its CSR layout is in beta
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(self.crow, self.col, values, self.shape, check_invariants=False)

    def sums(self, values: Tensor, h: Tensor) -> Tensor:
        """sum_j values_ij h_j without a gradient: (E,), (m, d) -> (n, d)."""
        if self.route == "bag" and len(self):
            # A bag is a row, its words are the columns.
            return torch.embedding_bag(h, self.col, self.crow, False, 0, False, values, True)[0]
        if self.route == "csr" and len(self):
            return self._csr(values) @ h
        messages = values[:, None] * h.index_select(0, self.col)
        return h.new_zeros(self.shape[0], h.shape[1]).index_add_(0, self.row, messages)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """<a_i, b_j> at each entry without a gradient: (n, d), (m, d) -> (E,)."""
        if self.route == "gather" or not len(self):
            return (a.index_select(0, self.row) * b.index_select(0, self.col)).sum(1)
        if a.shape[1] % 8:  # widths that do not fill a vector register take ten times as long
            a, b = (F.pad(side, (0, -side.shape[1] % 8)) for side in (a, b))
        out = self._csr(a.new_zeros(len(self)))
        return torch.sparse.sampled_addmm(out, a, b.t(), beta=0.0, out=out).values()

    def row_sums(self, values: Tensor, order: Tensor | None = None) -> Tensor:
        """(E,) -> (n,), or (E, k) -> (n, k), of the entries in an ``order`` (E,), without a gradient."""
        if self.route == "bag" and values.ndim == 2 and len(self):
            order = torch.arange(len(self)) if order is None else order
            return torch.embedding_bag(values, order, self.crow, False, 0, False, None, True)[0]
        values = values if order is None else values.index_select(0, order)
        if self.route == "bag":
            return torch.segment_reduce(values, "sum", offsets=self.crow)
        return values.new_zeros(self.shape[0], *values.shape[1:]).index_add_(0, self.row, values)

    def row_maxima(self, values: Tensor) -> Tensor:
        """(E,) -> (n,) without a gradient; -inf for a row without entries."""
        if self.route == "bag":
            return torch.segment_reduce(values, "max", offsets=self.crow)
        return values.new_full((self.shape[0],), -math.inf).scatter_reduce_(0, self.row, values, "amax")

    def stacked(self, times: int) -> Pattern:
        """The block diagonal matrix of so many copies of this one, one for each attention head."""
        n, m = self.shape
        copy = torch.arange(times, device=self.row.device)[:, None]
        made = Pattern((copy * n + self.row).flatten(), (copy * m + self.col).flatten(), (times * n, times * m))
        made.route = self.route
        return made


class _EdgeSum(torch.autograd.Function):
    """Sparse times dense, with gradients for both."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, h: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(values, h if ctx.needs_input_grad[0] else None)
        return pattern.sums(values, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (values, h), pattern, grad = ctx.saved_tensors, ctx.pattern, grad.contiguous()
        to_values = pattern.dots(grad, h) if h is not None else None
        to_h = pattern.t.sums(values.index_select(0, pattern.perm), grad) if ctx.needs_input_grad[1] else None
        return to_values, to_h, None


class _EdgeAdd(torch.autograd.Function):
    """A number of the row and a number of the column at each entry, for k heads at once."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        return a.index_select(0, pattern.row).add_(b.index_select(0, pattern.col))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pattern, grad = ctx.pattern, grad.contiguous()
        return pattern.row_sums(grad), pattern.t.row_sums(grad, pattern.perm), None


class _EdgeDot(torch.autograd.Function):
    """Dense times dense at the entries of a pattern, with gradients for both."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(a, b)
        return pattern.dots(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, b), pattern = ctx.saved_tensors, ctx.pattern
        return pattern.sums(grad, b), pattern.t.sums(grad.index_select(0, pattern.perm), a), None


def _exponentials(pattern: Pattern, score: Tensor, count: Tensor) -> Tensor:
    """``count exp(score)``, scaled in each row so that none overflows and the largest is its count."""
    return (score - pattern.row_maxima(score).index_select(0, pattern.row)).exp_().mul_(count)


class _EdgeSoftmax(torch.autograd.Function):
    """Softmax over the entries of each row; an entry with count c counts as c entries."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, count: Tensor, pattern: Pattern) -> Tensor:
        weight = _exponentials(pattern, score, count)
        weight /= pattern.row_sums(weight).index_select(0, pattern.row)
        ctx.pattern = pattern
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,), pattern = ctx.saved_tensors, ctx.pattern
        along = weight * grad
        return torch.addcmul(along, weight, pattern.row_sums(along).index_select(0, pattern.row), value=-1), None, None


class _EdgeAttend(torch.autograd.Function):
    """Softmax and weighted sum in one: a row is divided by its total once, not each of its entries."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, count: Tensor, h: Tensor, keep: Tensor | None, pattern: Pattern) -> Tensor:
        weight = _exponentials(pattern, score, count)
        used = weight if keep is None else weight * keep
        total = pattern.row_sums(weight).clamp_(min=1.0)[:, None]  # below 1 only where a row has no entries
        out = pattern.sums(used, h).div_(total)
        ctx.pattern = pattern
        ctx.save_for_backward(weight, used, keep, h, total, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        (weight, used, keep, h, total, out), pattern = ctx.saved_tensors, ctx.pattern
        grad = grad / total
        along = pattern.dots(grad, h)
        if keep is not None:
            along *= keep
        along -= (grad * out).sum(1).index_select(0, pattern.row)
        to_h = pattern.t.sums(used.index_select(0, pattern.perm), grad)
        return along.mul_(weight), None, to_h, None, None


def _wide(x: Tensor) -> Tensor:
    """The sparse kernels have no half precision, and want rows that lie together."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).contiguous()


@torch.compiler.disable
def edge_sum(pattern: Pattern, values: Tensor, h: Tensor) -> Tensor:
    """Weighted sums over the entries of each row: ``out_i = sum_j values_ij h_j``.

    Args:
        pattern: of an (n, m) matrix with E entries. values: (E,). h: (m, d).

    Returns:
        (n, d), differentiable in ``values`` and ``h``.
    """
    return _EdgeSum.apply(_wide(values), _wide(h), pattern)


@torch.compiler.disable
def edge_add(pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    """Sums at the entries: ``out_ij = a_i + b_j``.

    Args:
        pattern: of an (n, m) matrix with E entries. a: (n, k). b: (m, k).

    Returns:
        (E, k), differentiable in ``a`` and ``b``.
    """
    return _EdgeAdd.apply(_wide(a), _wide(b), pattern)


@torch.compiler.disable
def edge_dot(pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    """Inner products at the entries: ``out_ij = <a_i, b_j>``.

    Args:
        pattern: of an (n, m) matrix with E entries. a: (n, d). b: (m, d).

    Returns:
        (E,), differentiable in ``a`` and ``b``.
    """
    return _EdgeDot.apply(_wide(a), _wide(b), pattern)


@torch.compiler.disable
def edge_softmax(pattern: Pattern, score: Tensor, count: Tensor) -> Tensor:
    """Attention weights: softmax of ``score`` over the entries of each row.

    Args:
        pattern: of a matrix with E entries. score: (E,). count: (E,) how many edges an entry stands for.

    Returns:
        (E,) that sum to 1 in each row with entries, differentiable in ``score``.
    """
    return _EdgeSoftmax.apply(_wide(score), count, pattern)


@torch.compiler.disable
def edge_attend(pattern: Pattern, score: Tensor, count: Tensor, h: Tensor, drop: float = 0.0) -> Tensor:
    """Attention: ``out_i = sum_j a_ij h_j``, ``a`` the softmax of ``score`` over the entries of each row.

    Args:
        pattern: of an (n, m) matrix with E entries. score: (E,). count: (E,) how many edges an entry stands for.
        h: (m, d). drop: dropout of ``a``.

    Returns:
        (n, d), zero in rows without entries, differentiable in ``score`` and ``h``.
    """
    keep = dropout_mask(count, drop) if drop > 0.0 else None
    return _EdgeAttend.apply(_wide(score), count, _wide(h), keep, pattern)


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Zeros with probability p and 1 / (1 - p) otherwise, float32, in the shape of ``like``.

    As in papers.reliant.model. On a CPU one 64-bit number serves four entries (p rounded to 2^-16), several times
    faster than ``F.dropout``.
    """
    if like.device.type != "cpu":
        return F.dropout(torch.ones_like(like, dtype=torch.float32), p)
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    mask = bits[: like.numel()].float().ge_(round(p * 2**16) - 2**15)
    return mask.mul_(1.0 / (1.0 - p)).view(like.shape)


@torch.compiler.disable
def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout."""
    return x * dropout_mask(x, p) if training and p > 0.0 else x


# ---- the graph -------------------------------------------------------------------------------------------------------


class Operator:
    """R linear maps x -> A_r x of the users, and the identity as one more where ``root`` is set.

    Kept as one sparse matrix with a row for each (user, relation) and one with a column for each: the first serves wide
    features, which are then mixed by one matrix product, the second narrow ones that were mixed before.

    Args:
        rows: pattern (N R, N) and its values. columns: pattern (N, N R) and its values.
        relations: R. root: whether the identity belongs to it.
    """

    def __init__(
        self, rows: tuple[Pattern, Tensor], columns: tuple[Pattern, Tensor], relations: int, root: bool
    ) -> None:
        self.rows, self.columns, self.relations, self.root = rows, columns, relations, root

    def gather(self, x: Tensor) -> Tensor:
        """(N, d) -> (N, R d): A_1 x, ..., A_R x side by side."""
        return edge_sum(*self.rows, x).view(len(x), -1)

    def combine(self, z: Tensor) -> Tensor:
        """(N, T c) -> (N, c): sum_r A_r z_r, plus the last block of ``z`` for the identity; T = R + root."""
        width = z.shape[1] // (self.relations + self.root)
        sent = z[:, : self.relations * width].reshape(-1, width)
        out = edge_sum(*self.columns, sent)
        return out + z[:, -width:] if self.root else out


class RelationGraph:
    """Users and typed, directed edges; every form that a network asks for is made once, vectorised, and kept.

    A user gathers over its in-edges, as in torch-geometric. An edge that stands several times counts several times.

    Args:
        edges: (2, E) integers (source, target). types: (E,) integers 0..R-1. nodes: N. relations: R.

    Raises:
        ValueError: shapes that do not fit, user or relation ids out of range.
    """

    def __init__(self, edges: Tensor, types: Tensor, nodes: int, relations: int) -> None:
        if edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point() or types.shape != edges.shape[1:]:
            raise ValueError(
                f"edges {tuple(edges.shape)} {edges.dtype}, types {tuple(types.shape)}, expected (2, E) integers, (E,)"
            )
        for name, ids, limit in (("an edge names user", edges, nodes), ("an edge has relation", types, relations)):
            if ids.numel() and (ids.min() < 0 or ids.max() >= limit):
                bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
                raise ValueError(f"{name} {bad}, expected 0..{limit - 1}")
        self.nodes, self.relations = nodes, relations
        key, count = torch.unique((edges[1].long() * nodes + edges[0]) * relations + types, return_counts=True)
        self.type = key % relations
        self.count = count.float()
        pair = key.div_(relations, rounding_mode="floor")
        self.pattern = Pattern(pair // nodes, pair % nodes, (nodes, nodes))
        """Row = target, column = source; ``type`` (E,) and ``count`` (E,) belong to its entries."""

    def to(self, device: torch.device | str) -> RelationGraph:
        """The same graph on a device."""
        moved = object.__new__(RelationGraph)
        moved.nodes, moved.relations = self.nodes, self.relations
        moved.type, moved.count = self.type.to(device), self.count.to(device)
        moved.pattern = Pattern(self.pattern.row.to(device), self.pattern.col.to(device), self.pattern.shape)
        return moved

    @cached_property
    def merged(self) -> RelationGraph:
        """The same edges without their types: edges of several relations between two users count several times."""
        if self.relations == 1:
            return self
        row, col = self.pattern.row, self.pattern.col
        key, place = torch.unique(row * self.nodes + col, return_inverse=True)
        made = object.__new__(RelationGraph)
        made.nodes, made.relations = self.nodes, 1
        made.type = torch.zeros_like(key)
        made.count = self.count.new_zeros(len(key)).index_add_(0, place, self.count)
        made.pattern = Pattern(key // self.nodes, key % self.nodes, self.pattern.shape)
        return made

    @cached_property
    def typed(self) -> Pattern:
        """The entries of ``pattern`` with a column for each (source, relation): (N, N R)."""
        return Pattern(
            self.pattern.row, self.pattern.col * self.relations + self.type, (self.nodes, self.nodes * self.relations)
        )

    @cached_property
    def by_relation(self) -> list[tuple[Pattern, Tensor]]:
        """Pattern (N, N) and counts of each relation."""
        out = []
        for relation in range(self.relations):
            at = (self.type == relation).nonzero().squeeze(1)
            out.append((Pattern(self.pattern.row[at], self.pattern.col[at], self.pattern.shape), self.count[at]))
        return out

    @cached_property
    def mean(self) -> Operator:
        """Means over the in-edges of each relation, and the identity (RGCN; with one relation, GraphSAGE)."""
        row = self.pattern.row * self.relations + self.type
        cells = self.nodes * self.relations
        values = self.count / self.count.new_zeros(cells).index_add_(0, row, self.count)[row]
        order = row.argsort(stable=True)
        rows = Pattern(row[order], self.pattern.col[order], (cells, self.nodes))
        return Operator((rows, values[order]), (self.typed, values), self.relations, root=True)

    @cached_property
    def looped(self) -> tuple[Pattern, Tensor]:
        """Pattern (N, N) and counts of the merged edges, with one loop at every user in the place of all others."""
        merged = self.merged
        row, col = merged.pattern.row, merged.pattern.col
        keep = row != col
        loop = torch.arange(self.nodes, device=row.device)
        row, col = torch.cat([row[keep], loop]), torch.cat([col[keep], loop])
        count = torch.cat([merged.count[keep], torch.ones_like(loop, dtype=merged.count.dtype)])
        order = (row * self.nodes + col).argsort()
        return Pattern(row[order], col[order], (self.nodes, self.nodes)), count[order]

    def heads(self, count: int) -> tuple[Pattern, Tensor]:
        """``looped`` for each of so many attention heads: pattern (heads N, heads N) and counts."""
        if count == 1:
            return self.looped
        if count not in self._heads:
            pattern, edges = self.looped
            self._heads[count] = pattern.stacked(count), edges.repeat(count)
        return self._heads[count]

    @cached_property
    def _heads(self) -> dict[int, tuple[Pattern, Tensor]]:
        return {}

    @cached_property
    def symmetric(self) -> Operator:
        """D^-1/2 (A + I) D^-1/2 of the merged edges, D the in-degrees of A + I (GCN)."""
        pattern, count = self.looped
        scale = pattern.row_sums(count).rsqrt()
        weighted = pattern, count * scale[pattern.row] * scale[pattern.col]
        return Operator(weighted, weighted, 1, root=False)


# ---- layers ----------------------------------------------------------------------------------------------------------


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def _glorot(*shape: int) -> nn.Parameter:
    """Uniform within sqrt(6 / (last two widths))."""
    return _uniform(*shape, bound=math.sqrt(6.0 / (shape[-2] + shape[-1])))


def kaiming(into: int, out: int, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer with weights uniform within sqrt(6 / in); the bias as torch has it, or zero (Sec. 3.2)."""
    layer = nn.Linear(into, out, bias=bias)
    nn.init.kaiming_uniform_(layer.weight)
    if bias and zero:
        nn.init.zeros_(layer.bias)
    return layer


class LinearConvolution(nn.Module):
    """``sum_r A_r x W_r + b``, the identity being the last A_r where the operator has a root.

    GCN: D^-1/2 (A + I) D^-1/2. GraphSAGE: mean of all neighbours, and root. RGCN: mean of each relation's, and root.

    Args:
        into, out: widths. terms: how many A_r. glorot: as RGCN and GCN begin, with no bias; otherwise uniform within
            1 / sqrt(in), as GraphSAGE.
    """

    def __init__(self, into: int, out: int, terms: int, glorot: bool = True) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(into)
        self.weight = _glorot(terms, into, out) if glorot else _uniform(terms, into, out, bound=bound)
        self.bias = nn.Parameter(torch.zeros(out)) if glorot else _uniform(out, bound=bound)

    def projection(self, then: Tensor) -> Tensor:
        """The weights with a further linear map after them: (out, c) -> (in, terms c)."""
        return (self.weight @ then).transpose(0, 1).flatten(1)

    def forward(self, x: Tensor, operator: Operator, then: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, out), or (N, c) with a linear map ``then`` (out, c) after it.

        Features are gathered before or after they are mixed, whichever is narrower.
        """
        terms, into, out = self.weight.shape
        bias = self.bias if then is None else self.bias @ then
        if then is not None and terms * then.shape[1] < operator.relations * into:
            return operator.combine(x @ self.projection(then)) + bias
        weight = self.weight if then is None else self.weight @ then
        gathered = operator.gather(x)
        out = torch.addmm(bias, gathered, weight[: operator.relations].flatten(0, 1))
        return torch.addmm(out, x, weight[-1]) if operator.root else out


class GATConvolution(nn.Module):
    """Attention of Velickovic et al. 2018 over the merged edges and a loop at every user.

    ``alpha_ij = softmax_j LeakyReLU(<a_t, W x_i> + <a_s, W x_j>)``, heads side by side.

    Args:
        into, out: widths, ``out`` of one head. heads: how many.
    """

    def __init__(self, into: int, out: int, heads: int = 1, slope: float = 0.2) -> None:
        super().__init__()
        self.weight = _uniform(heads, out, into, bound=math.sqrt(6.0 / (into + heads * out)))
        self.source, self.target = _glorot(heads, out), _glorot(heads, out)
        self.bias = nn.Parameter(torch.zeros(heads * out))
        self.slope = slope

    def forward(self, x: Tensor, graph: RelationGraph, then: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, heads out), or (N, c) with a linear map ``then`` (out, c) after it (one head)."""
        heads, _, into = self.weight.shape
        weight = self.weight if then is None else then.t() @ self.weight
        bias = self.bias if then is None else self.bias @ then
        asking = torch.stack([self.target, self.source])[:, :, None] @ self.weight
        asks, asked = F.linear(x, asking.reshape(-1, into)).chunk(2, dim=1)  # (N, heads)
        score = F.leaky_relu(edge_add(graph.looped[0], asks, asked), self.slope)
        # A head's scores and messages lie together: what follows is one sparse matrix with a block for each head.
        pattern, count = graph.heads(heads)
        score = score.t().flatten()
        messages = F.linear(x, weight.flatten(0, 1)).unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)
        out = edge_attend(pattern, score, count, messages)
        return out.unflatten(0, (heads, -1)).transpose(0, 1).flatten(1) + bias


class SimpleHGNLayer(nn.Module):
    """Attention with a learned vector for each relation (Lv et al. 2021), as the benchmark uses it.

    ``a_ij = softmax_j LeakyReLU(w . [W x_i ; W x_j ; W_r e_r])`` over all in-edges of a user, whatever their type; with
    the attention of an earlier layer, ``(1 - beta) a + beta a_before``; ``out = ELU(sum_j a_ij W x_j + W_res x_i)``.

    Args:
        into, out: widths. relations: R. rel_dim: width of e_r. beta: share of the earlier attention.
        final: divide each row of the output by its norm.
        plain: the official code's sum, in which the earlier attention does not count.
    """

    def __init__(
        self,
        into: int,
        out: int,
        relations: int,
        rel_dim: int = 200,
        beta: float = 0.05,
        final: bool = False,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.W, self.W_r = kaiming(into, out, bias=False), kaiming(rel_dim, out, bias=False)
        self.a = kaiming(3 * out, 1, bias=False)
        self.W_res = kaiming(into, out, bias=False)
        self.rel_emb = nn.Embedding(relations, rel_dim)
        self.beta, self.final, self.plain = beta, final, plain

    def forward(self, x: Tensor, graph: RelationGraph, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, in), attention of the layer before (E,) -> (N, out), attention of this layer (E,) without gradient."""
        pattern = graph.pattern
        h = self.W(x)
        target, source, relation = self.a.weight.view(3, -1)
        # w . [..] is a sum of three numbers: one of the user, one of the neighbour, one of the relation.
        score = (h @ target).index_select(0, pattern.row) + (h @ source).index_select(0, pattern.col)
        score = score + self.W_r(self.rel_emb.weight).mv(relation).index_select(0, graph.type)
        alpha = edge_softmax(pattern, F.leaky_relu(score, 0.2), graph.count)
        mixed = alpha if before is None else (1 - self.beta) * alpha + self.beta * before
        out = F.elu(edge_sum(pattern, alpha if self.plain else mixed, h) + self.W_res(x))
        return (F.normalize(out, dim=1) if self.final else out), mixed.detach()


class HGTLayer(nn.Module):
    """Heterogeneous graph transformer (Hu et al. 2020) for one type of node and one head.

    ``score = <q_i, K_r k_j> p_r / sqrt(out)``, softmax over all in-edges; ``out = s Linear(GELU(sum_j a_ij V_r v_j)) +
    (1 - s) x`` with s a learned gate, and without x where the widths differ.

    Args:
        into, out: widths. relations: R.
    """

    def __init__(self, into: int, out: int, relations: int) -> None:
        super().__init__()
        self.kqv, self.out = nn.Linear(into, 3 * out), nn.Linear(out, out)
        bound = 1.0 / math.sqrt(out)
        self.k_rel = _uniform(relations, out, out, bound=bound)
        self.v_rel = _uniform(relations, out, out, bound=bound)
        self.p_rel, self.skip = nn.Parameter(torch.ones(relations)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, in) -> (N, out)."""
        relations, _, width = self.k_rel.shape
        k, q, v = self.kqv(x).chunk(3, dim=1)
        scaled = self.k_rel * (self.p_rel / math.sqrt(width))[:, None, None]
        keys = (k @ scaled.transpose(0, 1).flatten(1)).view(-1, width)  # a row for each (user, relation)
        sent = (v @ self.v_rel.transpose(0, 1).flatten(1)).view(-1, width)
        heard = edge_attend(graph.typed, edge_dot(graph.typed, q, keys), graph.count, sent)
        out = self.out(F.gelu(heard))
        if out.shape != x.shape:
            return out
        share = self.skip.sigmoid()
        return share * out + (1 - share) * x


class RelationAttention(nn.Module):
    """Dot-product attention among the edges of one relation (Shi et al. 2021), the mean of some heads, and a root term.

    ``alpha_ij = softmax_j <q_i, W_k x_j + b_k> / sqrt(out)`` with ``q_i = W_q x_i + b_q``; ``out_i = mean_heads sum_j
    alpha_ij (W_v x_j + b_v) + W_s x_i + b_s``. Keys are never made: ``<q_i, W_k x_j> = <W_k^T q_i, x_j>``. The official
    code's b_k is left out: what depends on i alone drops out of a softmax.

    Args:
        into, out: widths. heads: how many. dropout: of alpha.
    """

    def __init__(self, into: int, out: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(into, heads * out), nn.Linear(into, heads * out)
        self.key = _uniform(heads, out, into, bound=1.0 / math.sqrt(into))
        self.skip = nn.Linear(into, out)
        self.dropout = dropout

    def forward(self, x: Tensor, pattern: Pattern, count: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        heads, width, into = self.key.shape
        scaled = self.key.transpose(1, 2) / math.sqrt(width)
        weight = scaled @ self.query.weight.unflatten(0, (heads, width))  # (heads, in, in)
        bias = scaled @ self.query.bias.view(heads, width, 1)
        out = self.skip(x)
        values = F.linear(x, self.value.weight / heads, self.value.bias / heads).chunk(heads, dim=1)
        for head, value in enumerate(values):
            ask = F.linear(x, weight[head], bias[head].squeeze(1))
            score = edge_dot(pattern, ask, x)
            out = out + edge_attend(pattern, score, count, value, self.dropout if self.training else 0.0)
        return out


class SemanticAttention(nn.Module):
    """How much each relation counts, the same for all users: heads with a hidden layer of tanh units.

    For a head, ``w_r = mean_users q . tanh(W z_r + b)`` and ``beta = softmax_r w``; the heads' beta are averaged.

    Args:
        into: width of z. heads: how many. hidden: units of a head.
    """

    def __init__(self, into: int, heads: int, hidden: int = 128) -> None:
        super().__init__()
        self.layer = kaiming(into, heads * hidden, zero=True)
        self.query = _uniform(heads, hidden, bound=math.sqrt(6.0 / hidden))

    def weights(self, z: Tensor) -> Tensor:
        """(R, N, d) -> (R, heads), each head's sum to 1."""
        hidden = torch.tanh(self.layer(z)).mean(1)  # the mean and the product with q change places
        return (hidden.unflatten(-1, self.query.shape) * self.query).sum(-1).softmax(0)

    def forward(self, z: Tensor) -> Tensor:
        """(R, N, d) -> (N, d): sum_r mean_heads beta_r z_r."""
        return torch.tensordot(self.weights(z).mean(1), z, dims=1)


class RGTLayer(nn.Module):
    """Relational graph transformer (Feng et al. 2022).

    For each relation ``u_r`` = attention along it, ``g = sigmoid(Linear([u_r ; x]))`` and ``z_r = tanh(u_r) g +
    x (1 - g)``; then semantic attention over the relations.

    Args:
        width: of input and output. relations: R. heads: of the attention along a relation. semantic_heads: over the
            relations. dropout: of the attention. limit: use only so many relations (2: as the official code does).
    """

    def __init__(
        self, width: int, relations: int, heads: int, semantic_heads: int, dropout: float, limit: int | None = None
    ) -> None:
        super().__init__()
        self.along = nn.ModuleList(RelationAttention(width, width, heads, dropout) for _ in range(relations))
        self.gate = kaiming(2 * width, width, zero=True)
        self.semantic = SemanticAttention(width, semantic_heads)
        self.limit = limit

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, width) -> (N, width)."""
        from_u, from_x = self.gate.weight.chunk(2, dim=1)
        own = F.linear(x, from_x, self.gate.bias)  # the part of the gate that all relations share
        z = []
        for attention, edges in list(zip(self.along, graph.by_relation, strict=True))[: self.limit]:
            u = attention(x, *edges)
            z.append(torch.lerp(x, torch.tanh(u), torch.sigmoid(own + F.linear(u, from_u))))
        return self.semantic(torch.stack(z))


# ---- networks --------------------------------------------------------------------------------------------------------


def _check(**sizes: float) -> None:
    """Refuse sizes that make no network."""
    for name, value in sizes.items():
        least = 2 if name == "classes" else 1
        if name == "dropout":
            if not 0.0 <= value < 1.0:
                raise ValueError(f"dropout is {value}, expected 0 <= dropout < 1")
        elif value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")


class TwoConvolutions(nn.Module):
    """Sec. 3.3: LeakyReLU(Linear), convolution, dropout, convolution, Linear; no non-linearity in between.

    Raises:
        ValueError: sizes that make no network.
    """

    def __init__(self, features: int, hidden: int, classes: int, relations: int, dropout: float = 0.3) -> None:
        super().__init__()
        _check(features=features, hidden=hidden, classes=classes, relations=relations, dropout=dropout)
        self.into = kaiming(features, hidden)
        self.out = kaiming(hidden, classes)
        self.dropout = dropout
        self.convs = nn.ModuleList(self.convolutions(hidden, relations))

    def convolutions(self, hidden: int, relations: int) -> list[LinearConvolution]:
        """The two convolutions, or the one that is applied twice."""
        raise NotImplementedError

    def operator(self, graph: RelationGraph) -> Operator:
        """What the convolutions gather with."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, h)."""
        return F.leaky_relu(self.into(x))

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, F) -> logits (N, C)."""
        operator, x = self.operator(graph), self.encode(x)
        first, second = self.convs[0], self.convs[-1]
        last = second.projection(self.out.weight.t())  # second convolution and output layer in one matrix
        if self.training and self.dropout:
            z = dropout(first(x, operator), self.dropout, True) @ last
        else:
            z = first(x, operator, last)  # without dropout the first convolution joins them
        return operator.combine(z) + F.linear(second.bias, self.out.weight, self.out.bias)


class GCN(TwoConvolutions):
    """Two graph convolutions (Kipf and Welling 2017) over all edges, whatever their type."""

    def convolutions(self, hidden: int, relations: int) -> list[LinearConvolution]:
        """Two, of one operator without root."""
        return [LinearConvolution(hidden, hidden, 1) for _ in range(2)]

    def operator(self, graph: RelationGraph) -> Operator:
        """The symmetrically normalised edges."""
        return graph.symmetric


class SAGE(TwoConvolutions):
    """Two mean convolutions with a root term (Hamilton et al. 2017) over all edges, whatever their type."""

    def convolutions(self, hidden: int, relations: int) -> list[LinearConvolution]:
        """Two, of the mean of all neighbours and the root."""
        return [LinearConvolution(hidden, hidden, 2, glorot=False) for _ in range(2)]

    def operator(self, graph: RelationGraph) -> Operator:
        """Means over all in-edges."""
        return graph.merged.mean


class RGCN(TwoConvolutions):
    """One relational convolution (Schlichtkrull et al. 2018) applied twice: its weights are shared."""

    def convolutions(self, hidden: int, relations: int) -> list[LinearConvolution]:
        """One, of the mean of each relation's neighbours and the root."""
        return [LinearConvolution(hidden, hidden, relations + 1)]

    def operator(self, graph: RelationGraph) -> Operator:
        """Means over the in-edges of each relation."""
        return graph.mean


class BotRGCN(RGCN):
    """Feng et al. 2021: tweet, numeric and categorical columns have a first layer of their own, then as RGCN.

    Args:
        numeric, categorical: ten columns each, among the ``PROPERTIES`` first and the tweet embedding after them.

    Raises:
        ValueError: another width than 788, or a hidden width that eight does not divide.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        relations: int,
        dropout: float = 0.3,
        numeric: tuple[int, ...] = NUMERIC,
        categorical: tuple[int, ...] = CATEGORICAL,
    ) -> None:
        if features != PROPERTIES + TWEET:
            raise ValueError(f"BotRGCN needs {PROPERTIES} + {TWEET} features, the data have {features}")
        if hidden % 8:
            raise ValueError(f"hidden is {hidden}, BotRGCN needs a multiple of 8")
        super().__init__(hidden, hidden, classes, relations, dropout)
        self.tweet = kaiming(TWEET, hidden * 3 // 4)
        self.numeric = kaiming(len(numeric), hidden // 8)
        self.categorical = kaiming(len(categorical), hidden // 8)
        self.columns = [list(numeric), list(categorical)]

    def encode(self, x: Tensor) -> Tensor:
        """(N, 788) -> (N, h)."""
        numeric, categorical = (x[:, columns] for columns in self.columns)
        parts = self.tweet(x[:, -TWEET:]), self.numeric(numeric), self.categorical(categorical)
        return super().encode(F.leaky_relu(torch.cat(parts, dim=1)))


class GAT(nn.Module):
    """LeakyReLU(Linear), eight attention heads of h / 8, dropout, one head of h, Linear; types are not used."""

    def __init__(
        self, features: int, hidden: int, classes: int, relations: int, dropout: float = 0.3, heads: int = 8
    ) -> None:
        super().__init__()
        _check(features=features, hidden=hidden, classes=classes, relations=relations, dropout=dropout)
        if hidden % heads:
            raise ValueError(f"hidden is {hidden}, GAT needs a multiple of its {heads} heads")
        self.into, self.out = kaiming(features, hidden), kaiming(hidden, classes)
        self.first, self.second = GATConvolution(hidden, hidden // heads, heads), GATConvolution(hidden, hidden)
        self.dropout = dropout

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, F) -> logits (N, C)."""
        x = self.first(F.leaky_relu(self.into(x)), graph)
        x = dropout(x, self.dropout, self.training)
        return self.second(x, graph, self.out.weight.t()) + self.out.bias


class _TwoLayers(nn.Module):
    """What S-HGN, HGT and RGT share: a first linear layer before and two linear layers after the graph layers."""

    def __init__(
        self, features: int, hidden: int, classes: int, relations: int, dropout: float, linear: int, out: int
    ) -> None:
        super().__init__()
        _check(features=features, hidden=hidden, classes=classes, relations=relations, dropout=dropout)
        _check(linear=linear, out=out)
        self.into = kaiming(features, hidden, zero=True)
        self.out1, self.out2 = kaiming(linear, out, zero=True), kaiming(out, classes, zero=True)
        self.dropout = dropout

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of LeakyReLU."""
        return dropout(F.leaky_relu(x), self.dropout, self.training)


def _linear_width(hidden: int, linear: int, same_layer: bool) -> int:
    if same_layer and linear != hidden:
        raise ValueError(f"the same layer twice needs linear = hidden, got {linear} and {hidden}")
    return linear


class SHGN(_TwoLayers):
    """Two Simple-HGN layers, the second with the attention of the first mixed in.

    Args:
        linear: width after the second layer. out: width before the last one. rel_dim, beta: see ``SimpleHGNLayer``.
        same_layer: apply the first layer twice, as the official code. plain: see ``SimpleHGNLayer``.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        relations: int,
        dropout: float = 0.5,
        linear: int = 128,
        out: int = 32,
        rel_dim: int = 200,
        beta: float = 0.05,
        same_layer: bool = False,
        plain: bool = False,
    ) -> None:
        linear = _linear_width(hidden, linear, same_layer)
        super().__init__(features, hidden, classes, relations, dropout, linear, out)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta is {beta}, expected 0 to 1")
        self.layers = nn.ModuleList([SimpleHGNLayer(hidden, hidden, relations, rel_dim, beta, plain=plain)])
        if not same_layer:
            self.layers.append(SimpleHGNLayer(hidden, linear, relations, rel_dim, beta, final=True, plain=plain))

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, F) -> logits (N, C)."""
        x, attention = self.layers[0](self.drop(self.into(x)), graph)
        x, _ = self.layers[-1](x, graph, attention)
        return self.out2(self.drop(self.out1(x)))


class HGT(_TwoLayers):
    """Two heterogeneous graph transformer layers.

    Args:
        linear: width after the second layer. out: width before the last one.
        same_layer: apply the first layer twice, as the official code.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        relations: int,
        dropout: float = 0.3,
        linear: int = 128,
        out: int = 32,
        same_layer: bool = False,
    ) -> None:
        linear = _linear_width(hidden, linear, same_layer)
        super().__init__(features, hidden, classes, relations, dropout, linear, out)
        self.layers = nn.ModuleList([HGTLayer(hidden, hidden, relations)])
        if not same_layer:
            self.layers.append(HGTLayer(hidden, linear, relations))

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, F) -> logits (N, C)."""
        x = self.layers[-1](self.layers[0](self.drop(self.into(x)), graph), graph)
        return self.out2(F.leaky_relu(self.out1(x)))


class RGT(_TwoLayers):
    """One relational graph transformer layer applied twice.

    Args:
        out: width before the last layer. heads, semantic_heads, limit: see ``RGTLayer``.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        relations: int,
        dropout: float = 0.5,
        out: int = 64,
        heads: int = 4,
        semantic_heads: int = 4,
        limit: int | None = None,
    ) -> None:
        super().__init__(features, hidden, classes, relations, dropout, hidden, out)
        _check(heads=heads, semantic_heads=semantic_heads)
        self.layer = RGTLayer(hidden, relations, heads, semantic_heads, dropout, limit)

    def forward(self, x: Tensor, graph: RelationGraph) -> Tensor:
        """(N, F) -> logits (N, C)."""
        x = self.drop(self.into(x))
        for _ in range(2):
            x = F.leaky_relu(self.layer(x, graph))
        return self.out2(self.drop(self.out1(x)))


def from_official(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """State dict for a network here from that of its twin in the official code (torch-geometric 2.6 and later).

    Blocks that the official classes declare and never use have no place here and are left out.

    Raises:
        ValueError: a parameter of the network is not among them.
    """
    plain = {
        "linear_relu_input.0": "into",
        "linear1": "into",
        "linear_output2": "out",
        "out1": "out1",
        "out2": "out2",
        "linear_relu_tweet.0": "tweet",
        "linear_relu_num_prop.0": "numeric",
        "linear_relu_cat_prop.0": "categorical",
        "RGT_layer1.gate.0": "layer.gate",
    }
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        part, _, kind = key.rpartition(".")
        if part in plain:
            found[f"{plain[part]}.{kind}"] = value
        elif part.startswith("HGN_layer"):
            layer, _, name = part.removeprefix("HGN_layer").partition(".")
            found[f"layers.{int(layer) - 1}.{name}.{kind}"] = value
    for i in (1, 2):
        conv, layer = f"convs.{i - 1}", f"HGT_layer{i}"
        if f"gcn{i}.bias" in state:
            found |= {f"{conv}.weight": state[f"gcn{i}.lin.weight"].t()[None], f"{conv}.bias": state[f"gcn{i}.bias"]}
        if f"sage{i}.lin_l.bias" in state:
            both = [state[f"sage{i}.lin_{side}.weight"].t() for side in "lr"]
            found |= {f"{conv}.weight": torch.stack(both), f"{conv}.bias": state[f"sage{i}.lin_l.bias"]}
        if f"gat{i}.bias" in state:
            target = state[f"gat{i}.att_dst"][0]
            weight = state[f"gat{i}.lin.weight"].unflatten(0, target.shape)
            name = ("first", "second")[i - 1]
            found |= {f"{name}.weight": weight, f"{name}.target": target, f"{name}.source": state[f"gat{i}.att_src"][0]}
            found[f"{name}.bias"] = state[f"gat{i}.bias"]
        if f"{layer}.skip.user" in state:
            place = f"layers.{i - 1}"
            for kind in ("weight", "bias"):
                found[f"{place}.kqv.{kind}"] = state[f"{layer}.kqv_lin.lins.user.{kind}"]
                found[f"{place}.out.{kind}"] = state[f"{layer}.out_lin.lins.user.{kind}"]
            found |= {f"{place}.{name}": state[f"{layer}.{name}.weight"] for name in ("k_rel", "v_rel")}
            found[f"{place}.skip"] = state[f"{layer}.skip.user"]
            found[f"{place}.p_rel"] = torch.cat([v.flatten() for k, v in state.items() if f"{layer}.p_rel." in k])
    for name in ("rgcn", "rgcn1"):
        if f"{name}.root" in state:
            found["convs.0.weight"] = torch.cat([state[f"{name}.weight"], state[f"{name}.root"][None]])
            found["convs.0.bias"] = state[f"{name}.bias"]
    heads, along = "RGT_layer1.semantic_attention.att_layers", "RGT_layer1.transformer_list"
    if f"{heads}.0.2.weight" in state:
        count = sum(key.startswith(heads) and key.endswith("2.weight") for key in state)
        for kind in ("weight", "bias"):
            found[f"layer.semantic.layer.{kind}"] = torch.cat([state[f"{heads}.{k}.0.{kind}"] for k in range(count)])
        found["layer.semantic.query"] = torch.cat([state[f"{heads}.{k}.2.weight"] for k in range(count)])
        for r in range(sum(key.startswith(along) and key.endswith("skip.bias") for key in state)):
            for name in ("query", "value", "skip"):
                for kind in ("weight", "bias"):
                    found[f"layer.along.{r}.{name}.{kind}"] = state[f"{along}.{r}.lin_{name}.{kind}"]
            width = len(state[f"{along}.{r}.lin_skip.bias"])
            found[f"layer.along.{r}.key"] = state[f"{along}.{r}.lin_key.weight"].unflatten(0, (-1, width))
    wanted = list(network.state_dict())
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise ValueError(f"no official parameter for {', '.join(lacking)}")
    return {name: found[name] for name in wanted}


# ---- feature-only classifiers and scores -----------------------------------------------------------------------------

CLASSIFIERS = ("adaboost", "forest", "tree", "xgboost", "svm", "logistic", "bayes", "knn", "mlp")
"""Sec. 3.4, and a perceptron, which the official scripts do not have."""


def classifier(name: str, seed: int) -> Any:
    """An untrained scikit-learn (or xgboost) classifier with the official script's settings.

    AdaBoost is SAMME: SAMME.R, which the script asks for, was removed from scikit-learn. The SVM gives no
    probabilities, which its predictions do not depend on.

    Raises:
        ValueError: unknown name.
    """
    from sklearn import ensemble, linear_model, naive_bayes, neighbors, neural_network, svm, tree

    if name == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(
            learning_rate=0.1, n_estimators=200, max_depth=5, colsample_bytree=0.8, random_state=seed, n_jobs=1
        )
    makers: dict[str, Any] = {
        "adaboost": lambda: ensemble.AdaBoostClassifier(n_estimators=50, learning_rate=1.0, random_state=seed),
        "forest": lambda: ensemble.RandomForestClassifier(n_estimators=100, random_state=seed, n_jobs=-1),
        "tree": lambda: tree.DecisionTreeClassifier(random_state=seed),
        "svm": lambda: svm.SVC(C=10.0, random_state=seed),
        "logistic": lambda: linear_model.LogisticRegression(C=0.1, max_iter=500, random_state=seed),
        "bayes": naive_bayes.GaussianNB,
        "knn": lambda: neighbors.KNeighborsClassifier(n_neighbors=7),
        "mlp": lambda: neural_network.MLPClassifier((256,), early_stopping=True, random_state=seed),
    }
    if name not in makers:
        raise ValueError(f"unknown classifier {name!r}, expected one of {', '.join(CLASSIFIERS)}")
    return makers[name]()


def scores(prediction: Tensor, labels: Tensor, swapped: bool = False) -> dict[str, float]:
    """Accuracy and the means over classes of precision, recall and F1 (Sec. 3.1), as fractions.

    Args:
        prediction, labels: (n,) integers. swapped: hand them over in the wrong order, as some official scripts do:
            precision and recall change places.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    true, found = labels.cpu().numpy(), prediction.cpu().numpy()
    if swapped:
        true, found = found, true
    precision, recall, f1, _ = precision_recall_fscore_support(true, found, average="macro", zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(true, found)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }
