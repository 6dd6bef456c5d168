"""RELIANT: fair knowledge distillation of graph networks, with its teachers, its two frameworks and its baselines.

A *teacher* (``GCN`` or ``SAGE``) maps features and a graph to logits and an embedding. A *student* learns from it in
one of two frameworks: CPF (``PLP``, label propagation mixed with a small network) or GraphAKD (``SGC`` and the
discriminators of ``Critics``). RELIANT adds to either a learnable ``Proxy`` of bias, two more feature columns, and
the differentiable ``Unfairness`` of the student::

    student step   logits of [X | mean proxy], minimise  distillation + alpha * unfairness    over the student
    proxy step     logits of [X | proxy],      minimise               - alpha * unfairness    over the proxy
    prediction     logits of [X | mean proxy]

Names: N nodes, M undirected pairs, d features, C classes, y label, s sensitive attribute. The paper's equations were
read from the official code, so they are named by their place in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ---- fairness --------------------------------------------------------------------------------------------------------

INTEGRALS = {1: 1 / 2, 3: -1 / 8, 5: 1 / 16, 7: -5 / 128, 9: 7 / 256}
"""Integral of the Legendre polynomial P_n over [0, 1]; the even ones after P_0 vanish."""


def decision_coefficients(series: Literal["code", "step"] = "code") -> list[float]:
    """Coefficients c_0 .. c_9 of phi in powers of x = 2p - 1.

    Args:
        series: ``"code"``: 1/2 + sum_n INTEGRALS[n] P_n, what the official code computes; ``"step"``: each term times
            2n + 1 over 2, the least-squares fit of the unit step (which overshoots 1).
    """
    if series not in ("code", "step"):
        raise ValueError(f"series is {series!r}, expected 'code' or 'step'")
    total, before, current = [0.0] * 10, [1.0] + [0.0] * 9, [0.0, 1.0] + [0.0] * 8  # P_0 = 1, P_1 = x
    total[0] = 0.5
    for n in range(1, 10):
        factor = INTEGRALS.get(n, 0.0) * ((2 * n + 1) / 2 if series == "step" else 1.0)
        total = [t + factor * c for t, c in zip(total, current, strict=True)]
        times_x = [0.0, *current[:-1]]
        following = [((2 * n + 1) * a - n * b) / (n + 1) for a, b in zip(times_x, before, strict=True)]
        before, current = current, following
    return total


def soft_decision(p: Tensor, coefficients: list[float] | None = None) -> Tensor:
    """phi(p), a polynomial in place of the decision 1[p > 1/2] (``approx_func``); any shape."""
    c = decision_coefficients() if coefficients is None else coefficients
    x = 2 * p - 1
    square = x * x
    inner = c[9] * square + c[7]  # Horner; beside the constant only odd powers occur
    for n in (5, 3, 1):
        inner = inner * square + c[n]
    return inner * x + c[0]


def group_weights(sens: Tensor, index: Tensor, positive: Tensor | None = None, where: str = "the index set") -> Tensor:
    """(N,) float64 w with <w, v> = mean of v over the group s=0 minus mean over s=1, among the nodes of ``index``.

    Args:
        sens: (N,) of 0 and 1. index: node ids. positive: (N,) of 0 and 1; only its ones count (equal opportunity).
        where: names the index set in the error.

    Raises:
        ValueError: a group without a node.
    """
    chosen = torch.zeros_like(sens, dtype=torch.bool)
    chosen[index] = True
    if positive is not None:
        chosen &= positive == 1
    weights = torch.zeros(len(sens), dtype=torch.float64, device=sens.device)
    for group, sign in ((0, 1.0), (1, -1.0)):
        members = chosen & (sens == group)
        count = int(members.sum())
        if not count:
            kind = "node" if positive is None else "positive node"
            raise ValueError(f"group s={group} has no {kind} in {where}: its share of positives is undefined")
        weights[members] = sign / count
    return weights


class Unfairness(nn.Module):
    """L_fair, the differentiable parity gap (``approx_loss``, ``approx_loss_eo``): one gap a class column, squared.

    Args:
        sens, index, positive, where: see ``group_weights``; ``positive`` makes it equal opportunity.
        series: see ``decision_coefficients``.
    """

    def __init__(
        self,
        sens: Tensor,
        index: Tensor,
        positive: Tensor | None = None,
        where: str = "the index set",
        series: Literal["code", "step"] = "code",
    ) -> None:
        super().__init__()
        self.coefficients = decision_coefficients(series)
        self.register_buffer("weights", group_weights(sens, index, positive, where).float())

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (N, C) -> scalar >= 0."""
        gap = self.weights @ soft_decision(logits.softmax(1), self.coefficients)
        return gap.square().sum()


def fairness_gaps(prediction: Tensor, labels: Tensor, sens: Tensor, index: Tensor) -> tuple[float, float]:
    """(Delta_SP, Delta_EO) of hard predictions (N,) on the nodes of ``index``.

    Raises:
        ValueError: a group has no node, or no positive one, in ``index``.
    """
    value = (prediction == 1).double()
    parity = group_weights(sens, index, None, "the test set") @ value
    opportunity = group_weights(sens, index, labels, "the test set") @ value
    return abs(float(parity)), abs(float(opportunity))


# ---- sparse products (Pattern as in papers.ggcn.model) ---------------------------------------------------------------


class Pattern:
    """Where the entries of a sparse (n, m) matrix are: CSR, and the transpose of it.

    Entries are numbered in row-major order; a vector of E values on them is the matrix.

    Args:
        row, col: (E,) int64, distinct pairs in row-major order. shape: (n, m).
    """

    def __init__(self, row: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
        n, m = shape
        order = (col * n + row).argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        self._fill(row, col, shape, order)
        self.t = object.__new__(Pattern)
        """Pattern of the transposed matrix: its entry e is entry ``perm[e]`` here."""
        self.t._fill(col[order], row[order], (m, n), back)
        self.t.t = self

    def _fill(self, row: Tensor, col: Tensor, shape: tuple[int, int], perm: Tensor) -> None:
        self.row, self.col, self.shape, self.perm = row, col, shape, perm
        ends = torch.bincount(row, minlength=shape[0]).cumsum(0)
        self.crow = torch.cat([ends.new_zeros(1), ends])
        self.kernels = row.device.type == "cpu"
        """Use the CPU's sparse kernels; otherwise gather rows and add them up, on any device."""

    def __len__(self) -> int:
        """Number of entries, E."""
        return self.row.numel()

    def sums(self, values: Tensor | None, h: Tensor) -> Tensor:
        """sum_j values_ij h_j without a gradient (ones where ``values`` is None): (E,), (m, k) -> (n, k)."""
        if self.kernels and len(self):
            # A bag is a row, its words are the columns: the fastest weighted sum of rows that torch has on a CPU.
            return torch.embedding_bag(h, self.col, self.crow, False, 0, False, values, True)[0]
        messages = h.index_select(0, self.col)
        if values is not None:
            messages = messages * values[:, None]
        return h.new_zeros(self.shape[0], h.shape[1]).index_add_(0, self.row, messages)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """<a_i, b_j> at each entry without a gradient: (n, k), (m, k) -> (E,)."""
        if not (self.kernels and len(self)):
            return (a.index_select(0, self.row) * b.index_select(0, self.col)).sum(1)
        if a.shape[1] % 8:  # widths that do not fill a vector register take ten times as long
            a, b = (F.pad(side, (0, -side.shape[1] % 8)) for side in (a, b))
        with warnings.catch_warnings():  # torch says once a process that its CSR layout is in beta
            warnings.simplefilter("ignore")
            zeros = torch.sparse_csr_tensor(self.crow, self.col, a.new_zeros(len(self)), self.shape)
        return torch.sparse.sampled_addmm(zeros, a, b.t(), beta=0.0).values()


class _Sums(torch.autograd.Function):
    """Constant sparse times dense; ``swapped`` are the values in the transposed order, gathered when not given."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, pattern: Pattern, values: Tensor | None, swapped: Tensor | None) -> Tensor:
        ctx.pattern, ctx.values, ctx.swapped = pattern, values, swapped
        return pattern.sums(values, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        swapped = ctx.swapped
        if swapped is None and ctx.values is not None:
            swapped = ctx.values.index_select(0, ctx.pattern.perm)
        return ctx.pattern.t.sums(swapped, grad.contiguous()), None, None, None


class _Dots(torch.autograd.Function):
    """Dense times dense at the entries of a pattern."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(a, b)
        return pattern.dots(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        pattern, grad = ctx.pattern, grad.contiguous()
        to_a = pattern.sums(grad, b) if ctx.needs_input_grad[0] else None
        to_b = pattern.t.sums(grad.index_select(0, pattern.perm), a) if ctx.needs_input_grad[1] else None
        return to_a, to_b, None


def _wide(x: Tensor) -> Tensor:
    """The sparse kernels have no half precision."""
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).contiguous()


@torch.compiler.disable
def edge_sum(pattern: Pattern, h: Tensor, values: Tensor | None = None, swapped: Tensor | None = None) -> Tensor:
    """``out_i = sum_j values_ij h_j``, differentiable in ``h``.

    Args:
        pattern: of an (n, m) matrix with E entries. h: (m, k). values: (E,) constants, ones when None.
        swapped: ``values[pattern.perm]`` where it is known, else it is gathered on the way back.

    Returns:
        (n, k).
    """
    return _Sums.apply(_wide(h), pattern, values, swapped)


@torch.compiler.disable
def edge_dot(pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    """``out_ij = <a_i, b_j>`` at the entries: (n, k), (m, k) -> (E,), differentiable in both."""
    return _Dots.apply(_wide(a), _wide(b), pattern)


class Graph:
    """An undirected graph with one self-loop a node, in the forms that the networks ask for.

    Args:
        pairs: (2, M) int64, each undirected edge once, no loops, on the device where it is used.
        nodes: N.

    Raises:
        ValueError: node ids out of range, a loop, or a repeated edge.
    """

    def __init__(self, pairs: Tensor, nodes: int) -> None:
        if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.is_floating_point():
            raise ValueError(f"pairs have shape {tuple(pairs.shape)} and type {pairs.dtype}, expected (2, M) integers")
        if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= nodes):
            raise ValueError(f"an edge names node {int(pairs.max())}, expected 0..{nodes - 1}")
        low, high = pairs.amin(0), pairs.amax(0)
        key = (low * nodes + high).sort().values
        if bool((key[1:] == key[:-1]).any()) or bool((low == high).any()):
            raise ValueError("an edge stands more than once or joins a node to itself, expected distinct pairs")
        self.nodes = nodes
        self.upper = Pattern(key // nodes, key % nodes, (nodes, nodes))
        """The M pairs as the upper triangle of the adjacency matrix."""
        loops = torch.arange(nodes, device=pairs.device)
        both = torch.cat([key, key % nodes * nodes + key // nodes, loops * (nodes + 1)]).sort().values
        self.pattern = Pattern(both // nodes, both % nodes, (nodes, nodes))
        """A + I."""
        degree = self.pattern.crow.diff().float()
        row, col = self.pattern.row, self.pattern.col
        self.hat = (degree[row] * degree[col]).rsqrt()
        """Values of D^-1/2 (A + I) D^-1/2; symmetric, so transposed they are the same."""
        # DGL's "gcn" aggregator averages the neighbours and the node itself; the graph's loop makes it count twice.
        self.mean = (1.0 + (row == col).float()) / (degree[row] + 1.0)
        self.mean_swapped = self.mean[self.pattern.perm]
        self._kept: tuple[Tensor, int, Tensor] | None = None

    def propagate(self, h: Tensor) -> Tensor:
        """D^-1/2 (A + I) D^-1/2 h: (N, k) -> (N, k)."""
        return edge_sum(self.pattern, h, self.hat, self.hat)

    def propagate_features(self, x: Tensor) -> Tensor:
        """``propagate`` of node features: kept for as long as the same tensor is handed over, epoch after epoch."""
        if x.requires_grad:
            return self.propagate(x)
        if self._kept is None or self._kept[0] is not x or self._kept[1] != x._version:
            self._kept = x, x._version, self.propagate(x)
        return self._kept[2]

    def average(self, h: Tensor) -> Tensor:
        """((A + I) h + h) / (degree + 1), degrees with the loop: (N, k) -> (N, k)."""
        return edge_sum(self.pattern, h, self.mean, self.mean_swapped)


@torch.compiler.disable
def dropout_mask(shape: torch.Size | tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Zeros with probability p and 1/(1-p) otherwise, float32.

    On a CPU one 64-bit number serves four entries (p rounded to 2^-16), several times faster than ``F.dropout``.
    """
    if device.type != "cpu":
        return F.dropout(torch.ones(shape, device=device), p)
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return bits.float().ge_(round(p * 2**16) - 2**15).mul_(1.0 / (1.0 - p)).view(shape)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout."""
    return x * dropout_mask(x.shape, p, x.device) if training and p > 0 else x


class _RectifiedDropout(torch.autograd.Function):
    """ReLU and dropout in one tensor: where the output is positive, it was kept, and 1/(1-p) is its slope."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, p: float) -> Tensor:
        out = dropout_mask(h.shape, p, h.device).mul_(h).relu_()
        ctx.save_for_backward(out)
        ctx.scale = 1.0 / (1.0 - p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0.0).mul_(ctx.scale), None


@torch.compiler.disable
def rectify(h: Tensor, p: float, training: bool) -> Tensor:
    """ReLU, then dropout."""
    return _RectifiedDropout.apply(h.float(), p) if training and p > 0 else h.relu()


# ---- teachers --------------------------------------------------------------------------------------------------------


def check_sizes(dropout: float = 0.0, **sizes: int) -> None:
    """Refuse sizes that no network has.

    Raises:
        ValueError: names the first value that is out of range.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected 0 <= dropout < 1")


def xavier(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer with DGL's start: Xavier uniform weights, bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def convolve(layer: nn.Linear, h: Tensor, spread: Any) -> Tensor:
    """``spread(h) W^T + b``; the linear map goes first where it makes h narrower."""
    if layer.in_features > layer.out_features:
        return spread(F.linear(h, layer.weight)) + layer.bias
    return layer(spread(h))


class GCN(nn.Module):
    """Teacher: three graph convolutions d-h-h-C, dropout before the second and third.

    Args:
        features, hidden, classes: d, h, C. dropout: its probability.
    """

    def __init__(self, features: int, hidden: int = 64, classes: int = 2, dropout: float = 0.8) -> None:
        super().__init__()
        check_sizes(dropout, features=features, hidden=hidden, classes=classes)
        widths = [features, hidden, hidden, classes]
        self.layers = nn.ModuleList(xavier(i, o) for i, o in pairwise(widths))
        self.dropout = dropout

    def forward(self, x: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """x (N, d) -> logits (N, C), embedding (N, h): the first layer after its ReLU."""
        embedding = convolve(self.layers[0], x, graph.propagate_features).relu()
        h = convolve(self.layers[1], dropout(embedding, self.dropout, self.training), graph.propagate)
        h = convolve(self.layers[2], rectify(h, self.dropout, self.training), graph.propagate)
        return h, embedding


class SAGE(nn.Module):
    """Teacher: four GraphSAGE layers d-h-h-h-C with the "gcn" aggregator, dropout on the input and after each ReLU.

    Args:
        features, hidden, classes: d, h, C. dropout: its probability.
    """

    def __init__(self, features: int, hidden: int = 128, classes: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        check_sizes(dropout, features=features, hidden=hidden, classes=classes)
        widths = [features, hidden, hidden, hidden, classes]
        gain = nn.init.calculate_gain("relu")
        self.layers = nn.ModuleList(xavier(i, o, gain) for i, o in pairwise(widths))
        self.dropout = dropout

    def forward(self, x: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """x (N, d) -> logits (N, C), embedding (N, h): the first layer before its ReLU."""
        h = embedding = convolve(self.layers[0], dropout(x, self.dropout, self.training), graph.average)
        for layer in self.layers[1:]:
            h = convolve(layer, rectify(h, self.dropout, self.training), graph.average)
        return h, embedding


# ---- the proxy -------------------------------------------------------------------------------------------------------


class Proxy(nn.Module):
    """The proxy of bias P (N, 2): trained to carry as much bias as it can, neutralised to its mean for the student.

    Args:
        nodes: N. sens: (N,) of 0 and 1 makes the fixed proxy [s, 1 - s] of the ablation; None the learnable one,
            which starts uniform in [0, 1).
    """

    def __init__(self, nodes: int, sens: Tensor | None = None) -> None:
        super().__init__()
        if sens is None:
            self.values = nn.Parameter(torch.rand(nodes, 2))
        else:
            self.register_buffer("values", torch.stack([sens, 1 - sens], 1).float())

    def biased(self, x: Tensor) -> Tensor:
        """[X | P]: x (N, d) -> (N, d + 2)."""
        return torch.cat([x, self.values], 1)

    def neutral(self, x: Tensor) -> Tensor:
        """[X | mean of P in every row], no gradient to P: x (N, d) -> (N, d + 2)."""
        return torch.cat([x, self.values.detach().mean(0).expand(len(x), 2)], 1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient to the module's parameters inside: the proxy step asks only for that of the proxy."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


# ---- CPF -------------------------------------------------------------------------------------------------------------


class Seeds:
    """What CPF's student propagates: one-hot labels of the training nodes, over the edges into all other nodes.

    Args:
        graph: the graph. train: ids of the training nodes. labels: (N,), read at the training nodes only.
        classes: C.

    Raises:
        ValueError: no training node, or none besides.
    """

    def __init__(self, graph: Graph, train: Tensor, labels: Tensor, classes: int = 2) -> None:
        free = torch.ones(graph.nodes, dtype=torch.bool, device=train.device)
        free[train] = False
        self.free = free.nonzero().squeeze(1)
        """Ids of the other nodes, F of them."""
        if not len(train) or not len(self.free):
            raise ValueError(f"{len(train)} training nodes of {graph.nodes}, expected some and not all")
        rank = free.long().cumsum(0) - 1
        whole = graph.pattern
        into = free[whole.row]  # what flows into a training node is overwritten by its label
        self.pattern = Pattern(rank[whole.row[into]], whole.col[into], (len(self.free), graph.nodes))
        """(F, N): A + I without the rows of the training nodes."""
        self.start = torch.full((graph.nodes, classes), 1.0 / classes, device=train.device)
        """(N, C) one-hot labels at the training nodes, 1/C elsewhere."""
        self.start[train] = F.one_hot(labels[train], classes).float()


class PLP(nn.Module):
    """Student of CPF: L - 1 steps of attention-weighted label propagation, each mixed with a small network.

    e_u = <dropout(x_u), a>;  w_uv = softmax over the neighbours u of v of e_u, with attention dropout;
    H_v <- ReLU( sigmoid(b_v) sum_u w_uv H_u + sigmoid(-b_v) f(x_v) ); training nodes keep their one-hot labels.
    All steps share a, b and f.

    As e_u depends on the source alone, sum_u w_uv H_u = (A exp(e) H)_v / (A exp(e))_v: one sparse product a step and
    no tensor of weights an edge. Attention dropout draws the ones and zeros of A.

    Args:
        features, nodes, classes: d (proxy columns included), N, C. layers: L >= 2. hidden: width of f.
        feat_drop: dropout of x in e and of both layers of f. attn_drop: dropout of w.
    """

    def __init__(
        self,
        features: int,
        nodes: int,
        classes: int = 2,
        layers: int = 10,
        hidden: int = 64,
        feat_drop: float = 0.8,
        attn_drop: float = 0.2,
    ) -> None:
        super().__init__()
        for p in (feat_drop, attn_drop):
            check_sizes(p, features=features, nodes=nodes, classes=classes, hidden=hidden)
        if layers < 2:
            raise ValueError(f"layers is {layers}, expected at least 2: L layers are L - 1 steps of propagation")
        self.attention = nn.Parameter(torch.empty(1, features))
        nn.init.xavier_normal_(self.attention, nn.init.calculate_gain("relu"))
        self.mix = nn.Parameter(torch.zeros(nodes, 1))
        self.hidden, self.out = nn.Linear(features, hidden), nn.Linear(hidden, classes)
        self.steps, self.feat_drop, self.attn_drop = layers - 1, feat_drop, attn_drop

    def forward(self, x: Tensor, seeds: Seeds) -> Tensor:
        """x (N, d) -> logits (N, C); rows of training nodes are their one-hot labels."""
        own, weight = self.own(x[seeds.free]), self.weight(x)
        total = edge_sum(seeds.pattern, weight)  # (F, S): the softmax's denominators of all steps at once
        mix = self.mix[seeds.free]
        spread_share, own = mix.sigmoid(), (-mix).sigmoid() * own
        h = seeds.start
        for step in range(self.steps):
            k = step if self.training else 0  # without dropout all steps have the same weights and the same f
            kept = None
            if self.training and self.attn_drop > 0:
                kept = dropout_mask((len(seeds.pattern),), self.attn_drop, x.device)
            spread = edge_sum(seeds.pattern, weight[:, k : k + 1] * h, kept) / total[:, k : k + 1]
            h = seeds.start.index_copy(0, seeds.free, torch.addcmul(own[k], spread_share, spread).relu())
        return h

    def draws(self, x: Tensor) -> Tensor:
        """(S, *x.shape) with a dropout of its own for each step; S = L - 1 in training, else 1."""
        draws = self.steps if self.training else 1
        return dropout(x.expand(draws, *x.shape), self.feat_drop, self.training)

    def weight(self, x: Tensor) -> Tensor:
        """exp(e) over its maximum, (N, S). Below e^-60 of the maximum it is cut, so that no sum is 0."""
        energy = (self.draws(x) @ self.attention[0]).t()
        return (energy - energy.detach().amax(0)).clamp_min(-60.0).exp()

    def own(self, x: Tensor) -> Tensor:
        """f(x), (F, d) -> (S, F, C)."""
        return self.out(rectify(self.hidden(self.draws(x)), self.feat_drop, self.training))


def cpf_loss(logits: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
    """Distance of the probabilities to the teacher's (N, C) on the nodes of ``index``: Frobenius norm, no mean."""
    return (logits[index].softmax(1) - teacher[index]).norm()


# ---- GraphAKD --------------------------------------------------------------------------------------------------------


class SGC(nn.Module):
    """Student of GraphAKD: linear maps of propagated features, d-h-h-C, with ReLU and dropout between.

    Args:
        features, hidden, classes: d (proxy columns included), h, C. hops: propagations of the middle layer.
        dropout: before the second and third layer.
    """

    def __init__(self, features: int, hidden: int = 64, classes: int = 2, hops: int = 1, dropout: float = 0.5) -> None:
        super().__init__()
        check_sizes(dropout, features=features, hidden=hidden, classes=classes, hops=hops)
        widths = [features, hidden, hidden, classes]
        self.layers = nn.ModuleList(xavier(i, o) for i, o in pairwise(widths))
        self.hops, self.dropout = hops, dropout

    def forward(self, x: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """x (N, d) -> logits (N, C), embedding (N, h): the second layer after its ReLU."""
        h = rectify(convolve(self.layers[0], x, graph.propagate_features), self.dropout, self.training)
        for _ in range(self.hops - 1):
            h = graph.propagate(h)
        embedding = convolve(self.layers[1], h, graph.propagate).relu()
        h = dropout(embedding, self.dropout, self.training)
        return convolve(self.layers[2], h, graph.propagate), embedding


class LogitCritic(nn.Module):
    """D_logit(z) = Lin2( ReLU(z + Lin1(z)) ): C class scores, then real (teacher) or fake (student)."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(classes, classes), nn.Linear(classes, classes + 1, bias=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, C) -> class scores (N, C), real-or-fake score (N,)."""
        out = self.outer((z + self.inner(z)).relu())
        return out[:, :-1], out[:, -1]


class EmbeddingCritic(nn.Module):
    """Scores c <diag(w) a, b> of embeddings with normalised rows; D_edge and D_glob are one each."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.full((1,), 0.5))

    def edges(self, embedding: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """Scores of the edges: (N, h) -> those of the pairs (M,) and of the self-loops (N,)."""
        unit = F.normalize(embedding)
        left = unit * (self.weight * self.scale)
        return edge_dot(graph.upper, left, unit), (left * unit).sum(1)

    def nodes(self, embedding: Tensor, summary: Tensor) -> Tensor:
        """Scores of nodes against a summary vector (h,): (N, h) -> (N,)."""
        return F.normalize(embedding) @ (self.weight * self.scale * summary)


def summarise(embedding: Tensor) -> Tensor:
    """sigmoid of the mean row: (N, h) -> (h,)."""
    return embedding.mean(0).sigmoid()


def called(score: Tensor, real: bool) -> Tensor:
    """Mean cross-entropy of calling every score real (or fake)."""
    return F.softplus(-score if real else score).mean()


def edges_called(scores: tuple[Tensor, Tensor], real: bool) -> Tensor:
    """The same over all directed edges: the score of a pair is that of both directions, a loop stands once."""
    pairs, loops = (F.softplus(-part if real else part) for part in scores)
    return (2 * pairs.sum() + loops.sum()) / (2 * len(pairs) + len(loops))


Knowledge = tuple[Tensor, Tensor]
"""Logits (N, C) and embedding (N, h) of a teacher or a student."""


class Critics(nn.Module):
    """The three discriminators of GraphAKD and the losses of both sides.

    The teacher's logits are log-probabilities; both embeddings have the same width h.

    Args:
        hidden, classes: h, C.
    """

    def __init__(self, hidden: int = 64, classes: int = 2) -> None:
        super().__init__()
        check_sizes(hidden=hidden, classes=classes)
        self.logit, self.edge, self.glob = LogitCritic(classes), EmbeddingCritic(hidden), EmbeddingCritic(hidden)

    def loss(self, teacher: Knowledge, student: Knowledge, graph: Graph, labels: Tensor, train: Tensor) -> Tensor:
        """What the discriminators minimise: tell the teacher (real) from the student (fake, detached)."""
        fake_logits, fake = student[0].detach(), student[1].detach()
        total = 0.0
        for logits, real in ((teacher[0], True), (fake_logits, False)):
            classes, score = self.logit(logits)
            total = total + 0.5 * (called(score, real) + F.cross_entropy(classes[train], labels[train]))
        total = total + edges_called(self.edge.edges(teacher[1], graph), True)
        total = total + edges_called(self.edge.edges(fake, graph), False)
        of_teacher, of_student = summarise(teacher[1]), summarise(fake)
        total = total + called(self.glob.nodes(teacher[1], of_teacher), True)
        total = total + called(self.glob.nodes(fake, of_teacher), False)
        total = total + called(self.glob.nodes(fake, of_student), True)
        return total + called(self.glob.nodes(teacher[1], of_student), False)

    def student_loss(
        self, teacher: Knowledge, student: Knowledge, graph: Graph, labels: Tensor, train: Tensor
    ) -> Tensor:
        """What the student minimises: labels, the teacher's logits, and to pass for the teacher."""
        logits, embedding = student
        classes, score = self.logit(logits)
        total = F.cross_entropy(logits[train], labels[train])
        total = total + 0.5 * (F.cross_entropy(classes[train], labels[train]) + called(score, True))
        total = total + (logits - teacher[0]).abs().sum() / len(logits)
        total = total + edges_called(self.edge.edges(embedding, graph), True)
        total = total + called(self.glob.nodes(embedding, summarise(teacher[1])), True)
        own = summarise(embedding)
        total = total + called(self.glob.nodes(embedding, own), True)
        return total + called(self.glob.nodes(teacher[1], own), False)
