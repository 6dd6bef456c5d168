"""GGCN (signed messages, degree correction, decaying aggregation) and the networks it is compared with.

Every network maps features ``x`` and a graph to log-probabilities::

    graph = Adjacency.from_edges(edges, nodes)            # A_hat = D^-1/2 (A + I) D^-1/2, rows are sources
    model = GGCN(features, layers=2, hidden=16, classes=5)
    log_probability = model(x, graph)                     # (N, C); x a dense tensor or a SparseMatrix

The main form works on edges: cosines are a sampled dense product and messages a sparse product, both on one CSR
pattern, so time and memory are O(E h). ``use_sparse=False`` is the N x N form of the same network, for small graphs.

Equations are those of Yan et al., "Two Sides of the Same Coin" (ICDM 2022, arXiv 2102.06462); where the paper leaves
something open, the official code decides. Names: N nodes, E edges, F features, C classes, h hidden units, L layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-9


# ---- sparse matrices -------------------------------------------------------------------------------------------------


class Pattern:
    """Where the entries of a sparse (n, m) matrix are: CSR, and the transpose of it.

    Entries are numbered in row-major order; a vector of E values on them is the matrix.

    Args:
        row, col: (E,) int64, distinct pairs in row-major order.
        shape: (n, m).

    Raises:
        ValueError: pairs out of range, repeated or unsorted.
    """

    def __init__(self, row: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
        n, m = shape
        if row.numel() and (min(row.min(), col.min()) < 0 or row.max() >= n or col.max() >= m):
            raise ValueError(f"a sparse matrix has entries outside of its shape {n} x {m}")
        if not bool(((row * m + col).diff() > 0).all()):
            raise ValueError("entries of a sparse matrix must be distinct and in row-major order")
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

    @staticmethod
    def of(row: Tensor, col: Tensor, shape: tuple[int, int]) -> Pattern:
        """The pattern of pairs in any order; a repeated pair counts once."""
        key = torch.unique(row * shape[1] + col)
        return Pattern(key // shape[1], key % shape[1], shape)

    def __len__(self) -> int:
        """Number of entries, E."""
        return self.row.numel()

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern on a device."""
        return Pattern(self.row.to(device), self.col.to(device), self.shape)

    def block_diagonal(self, blocks: int) -> Pattern:
        """This pattern ``blocks`` times along the diagonal of a larger matrix; entries block by block."""
        n, m = self.shape
        block = torch.arange(blocks, device=self.row.device)[:, None]
        return Pattern((self.row + block * n).flatten(), (self.col + block * m).flatten(), (blocks * n, blocks * m))

    @cached_property
    def _zeros(self) -> dict[torch.dtype, Tensor]:
        return {}

    def sums(self, values: Tensor, h: Tensor) -> Tensor:
        """sum_j values_ij h_j without a gradient: (E,), (m, d) -> (n, d)."""
        if self.kernels and len(self):
            # A bag is a row, its words are the columns: the fastest weighted sum of rows that torch has on a CPU.
            return torch.embedding_bag(h, self.col, self.crow, False, 0, False, values, True)[0]
        messages = values[:, None] * h.index_select(0, self.col)
        return h.new_zeros(self.shape[0], h.shape[1]).index_add_(0, self.row, messages)

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """<a_i, b_j> at each entry without a gradient: (n, d), (m, d) -> (E,)."""
        if not (self.kernels and len(self)):
            return (a.index_select(0, self.row) * b.index_select(0, self.col)).sum(1)
        if a.dtype not in self._zeros:
            with warnings.catch_warnings():  # torch says once a process that its CSR layout is in beta
                warnings.simplefilter("ignore")
                zeros = a.new_zeros(len(self))
                self._zeros[a.dtype] = torch.sparse_csr_tensor(self.crow, self.col, zeros, self.shape)
        if a.shape[1] % 8:  # widths that do not fill a vector register take ten times as long
            a, b = (F.pad(side, (0, -side.shape[1] % 8)) for side in (a, b))
        return torch.sparse.sampled_addmm(self._zeros[a.dtype], a, b.t(), beta=0.0).values()


class _EdgeSum(torch.autograd.Function):
    """Sparse times dense, with gradients for both."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, h: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(values, h)
        return pattern.sums(values, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, h = ctx.saved_tensors
        pattern = ctx.pattern
        to_values = edge_dot(pattern, grad, h) if ctx.needs_input_grad[0] else None
        to_h = edge_sum(pattern.t, values.index_select(0, pattern.perm), grad) if ctx.needs_input_grad[1] else None
        return to_values, to_h, None


class _EdgeDot(torch.autograd.Function):
    """Dense times dense at the entries of a pattern, with gradients for both."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(a, b)
        return pattern.dots(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        pattern = ctx.pattern
        to_a = edge_sum(pattern, grad, b) if ctx.needs_input_grad[0] else None
        to_b = edge_sum(pattern.t, grad.index_select(0, pattern.perm), a) if ctx.needs_input_grad[1] else None
        return to_a, to_b, None


class _EdgeCosine(torch.autograd.Function):
    """Cosines of rows at the entries of a square pattern; one pass back instead of autograd's chain of divisions."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, pattern: Pattern) -> Tensor:
        inverse = h.square().sum(1, keepdim=True).clamp_min(EPS * EPS).rsqrt()
        unit = h * inverse
        ctx.pattern = pattern
        ctx.save_for_backward(unit, inverse)
        return pattern.dots(unit, unit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, inverse = ctx.saved_tensors
        pattern = ctx.pattern
        to_unit = pattern.sums(grad, unit) + pattern.t.sums(grad.index_select(0, pattern.perm), unit)
        along = (to_unit * unit).sum(1, keepdim=True)
        return torch.addcmul(to_unit, along, unit, value=-1).mul_(inverse), None


def _wide(x: Tensor) -> Tensor:
    """The sparse kernels have no half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@torch.compiler.disable
def edge_sum(pattern: Pattern, values: Tensor, h: Tensor) -> Tensor:
    """Weighted sums over the entries of each row: ``out_i = sum_j values_ij h_j``.

    Args:
        pattern: of an (n, m) matrix with E entries. values: (E,). h: (m, d).

    Returns:
        (n, d), differentiable (twice too) in ``values`` and ``h``.
    """
    return _EdgeSum.apply(_wide(values), _wide(h).contiguous(), pattern)


@torch.compiler.disable
def edge_dot(pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    """Inner products at the entries: ``out_ij = <a_i, b_j>``.

    Args:
        pattern: of an (n, m) matrix with E entries. a: (n, d). b: (m, d).

    Returns:
        (E,), differentiable (twice too) in ``a`` and ``b``.
    """
    return _EdgeDot.apply(_wide(a).contiguous(), _wide(b).contiguous(), pattern)


@torch.compiler.disable
def edge_cosine(pattern: Pattern, h: Tensor) -> Tensor:
    """Cosines at the entries: ``out_ij = <h_i, h_j> / (|h_i| |h_j|)``, 0 where a row is zero.

    Args:
        pattern: of an (n, n) matrix with E entries. h: (n, d).

    Returns:
        (E,), differentiable once in ``h``; the gradient stays finite at a zero row.
    """
    return _EdgeCosine.apply(_wide(h).contiguous(), pattern)


class SparseMatrix:
    """A constant matrix that is mostly zeros, such as bag-of-words features: a pattern and its (E,) values."""

    def __init__(self, pattern: Pattern, values: Tensor) -> None:
        self.pattern, self.values = pattern, values

    @staticmethod
    def of(dense: Tensor) -> SparseMatrix:
        """The non-zero entries of a dense (n, m) tensor, or the entries of a torch sparse one."""
        if dense.layout is not torch.strided:
            coo = dense.to_sparse_coo().coalesce()
            row, col = coo.indices().clone()  # copies: views of a sparse tensor trouble torch.compile
            return SparseMatrix(Pattern(row, col, tuple(coo.shape)), coo.values().clone())
        row, col = dense.nonzero(as_tuple=True)
        return SparseMatrix(Pattern(row, col, tuple(dense.shape)), dense[row, col])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.pattern.shape

    def to(self, device: torch.device | str) -> SparseMatrix:
        """The same matrix on a device."""
        return SparseMatrix(self.pattern.to(device), self.values.to(device))

    def __matmul__(self, h: Tensor) -> Tensor:
        """(n, m) times dense (m, d), differentiable in ``h``."""
        return edge_sum(self.pattern, self.values, h)

    def dense(self) -> Tensor:
        """(n, m) tensor."""
        out = self.values.new_zeros(self.shape)
        out[self.pattern.row, self.pattern.col] = self.values
        return out


Features = Tensor | SparseMatrix


def dropout(x: Any, p: float, training: bool) -> Any:
    """Inverted dropout of a tensor or of the entries of a ``SparseMatrix`` (its zeros stay zeros either way).

    Uniform numbers and a comparison: torch draws them several times faster on a CPU than Bernoulli variables.
    """
    if not training or p == 0.0:
        return x
    if isinstance(x, SparseMatrix):
        return SparseMatrix(x.pattern, dropout(x.values, p, training))
    return x * torch.rand_like(x).ge_(p).mul_(1.0 / (1.0 - p))


def linear(x: Features, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as ``F.linear``, for dense and sparse ``x`` (N, F); weight (d, F), bias (d,)."""
    if isinstance(x, Tensor):
        return F.linear(x, weight, bias)
    out = x @ weight.t()
    return out if bias is None else out + bias


# ---- the graph -------------------------------------------------------------------------------------------------------


class Adjacency:
    """The normalised adjacency matrix with self-loops, in the forms that the networks ask for.

    Each form is made when it is first used, vectorised, and kept.

    Args:
        hat: A_hat, (N, N). Build it with ``from_edges`` or ``from_matrix``.
    """

    def __init__(self, hat: SparseMatrix) -> None:
        if hat.shape[0] != hat.shape[1]:
            raise ValueError(f"an adjacency matrix must be square, got {hat.shape[0]} x {hat.shape[1]}")
        self.hat = hat
        self.nodes = hat.shape[0]

    @staticmethod
    def from_edges(edges: Tensor, nodes: int, normalization: str = "symmetric") -> Adjacency:
        """Sec. 3.1: A_hat of directed edges, not symmetrised.

        Args:
            edges: (2, E) int64, distinct pairs (source, target): row and column of A. An undirected edge stands twice,
                a self-loop of A once (A + I then has a 2 on the diagonal).
            nodes: N. normalization: ``"symmetric"``: D^-1/2 (A + I) D^-1/2; ``"row"``: D^-1 (A + I). D are row sums.

        Raises:
            ValueError: node ids out of range, repeated edges, unknown normalization.
        """
        if normalization not in ("symmetric", "row"):
            raise ValueError(f"normalization is {normalization!r}, expected 'symmetric' or 'row'")
        if edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
            raise ValueError(f"edges have shape {tuple(edges.shape)} and type {edges.dtype}, expected (2, E) integers")
        if edges.numel() and (edges.min() < 0 or edges.max() >= nodes):
            raise ValueError(f"an edge names node {int(edges.max())}, expected 0..{nodes - 1}")
        loops = torch.arange(nodes, device=edges.device).expand(2, -1)
        key, count = torch.unique(
            (torch.cat([edges, loops], 1) * edges.new_tensor([[nodes], [1]])).sum(0), return_counts=True
        )
        row, col = key // nodes, key % nodes
        repeated = count > 1 + (row == col).long()
        if bool(repeated.any()):
            raise ValueError(f"edge {(int(row[repeated][0]), int(col[repeated][0]))} stands more than once")
        value = count.to(torch.float64)
        degree = value.new_zeros(nodes).index_add_(0, row, value)
        if normalization == "row":
            value = value / degree[row]
        else:
            value = value * degree[row].rsqrt() * degree[col].rsqrt()
        return Adjacency(SparseMatrix(Pattern(row, col, (nodes, nodes)), value.float()))

    @staticmethod
    def from_matrix(hat: Tensor | SparseMatrix) -> Adjacency:
        """From A_hat itself: dense, torch sparse, or a ``SparseMatrix``."""
        return Adjacency(hat if isinstance(hat, SparseMatrix) else SparseMatrix.of(hat))

    def to(self, device: torch.device | str) -> Adjacency:
        """The same graph on a device."""
        return Adjacency(self.hat.to(device))

    @cached_property
    def diagonal(self) -> Tensor:
        """(N,) diagonal of A_hat."""
        pattern = self.hat.pattern
        loop = pattern.row == pattern.col
        return self.hat.values.new_zeros(self.nodes).index_copy_(0, pattern.row[loop], self.hat.values[loop])

    @cached_property
    def relative(self) -> Tensor:
        """(E,) R at the entries of A_hat: A_hat_ii / A_hat_ij - 1 = sqrt((d_j + 1) / (d_i + 1)) - 1 (eq. 8)."""
        return self.diagonal[self.hat.pattern.row] / self.hat.values.clamp_min(EPS) - 1

    @cached_property
    def off_diagonal(self) -> tuple[SparseMatrix, Tensor]:
        """A_hat without its diagonal, and R at those entries."""
        pattern = self.hat.pattern
        keep = pattern.row != pattern.col
        rest = SparseMatrix(Pattern(pattern.row[keep], pattern.col[keep], pattern.shape), self.hat.values[keep])
        return rest, self.relative[keep]

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """A_hat and R as (N, N) tensors; R is 0 where there is no edge, so nothing overflows there."""
        return self.hat.dense(), SparseMatrix(self.hat.pattern, self.relative).dense()

    @cached_property
    def propagation(self) -> SparseMatrix:
        """The operator of GPRGNN: ones at the entries of A_hat, normalised by in-degree, summed at the targets."""
        pattern = self.hat.pattern
        degree = torch.bincount(pattern.col, minlength=self.nodes).to(self.hat.values.dtype)
        return SparseMatrix(pattern.t, degree[pattern.t.row].rsqrt() * degree[pattern.t.col].rsqrt())

    @cached_property
    def _heads(self) -> dict[int, Pattern]:
        return {}

    def heads(self, heads: int) -> Pattern:
        """The pattern of A_hat once a head, block-diagonal."""
        if heads not in self._heads:
            self._heads[heads] = self.hat.pattern.block_diagonal(heads)
        return self._heads[heads]


def as_adjacency(graph: Adjacency | Tensor) -> Adjacency:
    """Accept A_hat as a tensor too; an ``Adjacency`` is made once and kept, so prefer it in a loop."""
    return graph if isinstance(graph, Adjacency) else Adjacency.from_matrix(graph)


# ---- GGCN ------------------------------------------------------------------------------------------------------------


class GGCNLayer(nn.Module):
    """One layer (Sec. 3.2): ``out = softplus(alpha) (b0 relu(M) H - b1 relu(-M) H + b2 H)``, H = x W^T + b.

    M_ij = cos(H_i, H_j) A_hat_ij T_ij off the diagonal; T_ij = softplus(lambda0 R_ij + lambda1); b = softmax(beta).
    State: ``fcn.weight``, ``fcn.bias``, ``deg_coeff`` = (lambda0, lambda1), ``coeff`` = beta (3), ``scale`` = alpha.

    Args:
        in_features, out_features: widths.
        use_degree: degree (structure-based) correction T; otherwise T = 1.
        use_sign: signed (feature-based) messages; otherwise ``out = (A_hat * T) H`` with the diagonal.
        use_decay: with it alpha starts at 2 and lambda0 at 0.5; without, at ``scale_init`` and ``deg_intercept_init``.
        use_sparse: edge form, O(E h); otherwise N x N matrices.
        absolute: |cos| in place of cos: all of the signed form but the sign (an ablation, not in the paper).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_degree: bool = True,
        use_sign: bool = True,
        use_decay: bool = True,
        scale_init: float = 0.5,
        deg_intercept_init: float = 0.5,
        use_sparse: bool = True,
        absolute: bool = False,
    ) -> None:
        super().__init__()
        self.fcn = nn.Linear(in_features, out_features)
        self.use_degree, self.use_sign, self.use_sparse = use_degree, use_sign, use_sparse
        self.absolute = absolute
        if use_degree:
            self.deg_coeff = nn.Parameter(torch.tensor([0.5 if use_decay else deg_intercept_init, 0.0]))
        if use_sign:
            self.coeff = nn.Parameter(torch.zeros(3))
            self.scale = nn.Parameter(torch.full((1,), 2.0 if use_decay else scale_init))

    def forward(self, x: Features, graph: Adjacency | Tensor) -> Tensor:
        """Features (N, in) and the graph -> (N, out)."""
        return self.propagate(linear(x, self.fcn.weight, self.fcn.bias), as_adjacency(graph))

    def degree_correction(self, relative: Tensor) -> Tensor:
        """T of R, any shape (eq. 8)."""
        slope, intercept = self.deg_coeff.unbind()
        return F.softplus(slope * relative + intercept)

    def message_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """softplus(alpha) times (b0, b1, b2): of positive messages, of negative ones, of the node itself."""
        return (F.softplus(self.scale) * self.coeff.softmax(0)).unbind()

    def _similarity(self, cosine: Tensor) -> Tensor:
        return cosine.abs() if self.absolute else cosine

    def propagate(self, h: Tensor, graph: Adjacency) -> Tensor:
        """The layer after its linear map: H (N, out) -> (N, out)."""
        if not self.use_sparse:
            return self._propagate_dense(h, graph)
        if not self.use_sign:
            weight = graph.hat.values
            if self.use_degree:
                weight = weight * self.degree_correction(graph.relative)
            return edge_sum(graph.hat.pattern, weight, h)
        hat, relative = graph.off_diagonal
        message = self._similarity(edge_cosine(hat.pattern, h)) * hat.values  # S * A_hat, once an edge
        if self.use_degree:
            message = message * self.degree_correction(relative)
        positive, negative, own = self.message_weights()
        # b0 relu(M) - b1 relu(-M) is M times one of two numbers: one product serves both signs.
        weight = message * torch.where(message > 0, positive, negative)
        return torch.addcmul(edge_sum(hat.pattern, weight, h), own, h)

    def _propagate_dense(self, h: Tensor, graph: Adjacency) -> Tensor:
        """The same with (N, N) matrices."""
        matrix, relative = graph.dense
        if self.use_degree:
            matrix = matrix * self.degree_correction(relative)
        if not self.use_sign:
            return matrix @ h
        unit = F.normalize(h, eps=EPS)
        message = self._similarity((unit @ unit.t()).fill_diagonal_(0.0)) * matrix
        positive, negative, own = self.message_weights()
        return (message * torch.where(message > 0, positive, negative)) @ h + own * h


def decay(layer: int, eta: float = 1.0, exponent: float = 3.0) -> float:
    """Decaying aggregation: ``ln(eta / l^k + 1)``, the weight of layer l >= 3 (Sec. 3.3; l = 2 counts in full)."""
    return math.log(eta / layer**exponent + 1.0)


class GGCN(nn.Module):
    """The network of Sec. 3.3, also with each of its parts off (the ablations).

    State: ``fcn.{weight,bias}``, ``convs.<i>.`` as in ``GGCNLayer``, ``norms.<i>.`` with a normalisation: the official
    code's names, so its checkpoints load.

    Args:
        features, layers, hidden, classes: F, L >= 2, h, C.
        dropout: on the input and before each later layer.
        decay_rate, exponent: eta > 0 and k >= 0 of ``decay``.
        use_degree, use_sign, use_sparse, scale_init, deg_intercept_init, absolute: see ``GGCNLayer``.
        use_decay: decaying aggregation; otherwise every layer adds with weight 1.
        use_bn, use_ln: batch or layer normalisation before the activation, only without decay.

    Raises:
        ValueError: a value out of range, or a normalisation together with decay.
    """

    def __init__(
        self,
        features: int,
        layers: int = 2,
        hidden: int = 16,
        classes: int = 2,
        dropout: float = 0.5,
        decay_rate: float = 1.0,
        exponent: float = 3.0,
        use_degree: bool = True,
        use_sign: bool = True,
        use_decay: bool = True,
        use_sparse: bool = True,
        scale_init: float = 0.5,
        deg_intercept_init: float = 0.5,
        use_bn: bool = False,
        use_ln: bool = False,
        absolute: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout)
        if use_decay and (decay_rate <= 0 or exponent < 0):
            raise ValueError(f"decay_rate is {decay_rate} and exponent {exponent}, expected > 0 and >= 0")
        if (use_bn or use_ln) and use_decay:
            raise ValueError("batch or layer normalisation works only without decay: set use_decay to False")
        if use_bn and use_ln:
            raise ValueError("use_bn and use_ln are both set, expected at most one")
        widths = [features, *[hidden] * (layers - 1), classes]
        self.convs = nn.ModuleList(
            GGCNLayer(i, o, use_degree, use_sign, use_decay, scale_init, deg_intercept_init, use_sparse, absolute)
            for i, o in pairwise(widths)
        )
        self.fcn = nn.Linear(features, hidden)
        if use_bn or use_ln:
            kind = nn.BatchNorm1d if use_bn else nn.LayerNorm
            self.norms = nn.ModuleList(kind(hidden) for _ in range(layers - 1))
        self.norm = use_bn or use_ln
        self.dropout = dropout
        self.weights = [1.0, *(decay(i, decay_rate, exponent) if use_decay else 1.0 for i in range(3, layers + 1))]
        """Weight of each layer's output in the running sum, layer 2 first."""

    def forward(self, x: Features, graph: Adjacency | Tensor) -> Tensor:
        """Features (N, F) and the graph (or A_hat as a tensor) -> log-probabilities (N, C)."""
        graph = as_adjacency(graph)
        x = dropout(x, self.dropout, self.training)
        first = self.convs[0].fcn  # both first maps see the same x: one product
        both = linear(x, torch.cat([self.fcn.weight, first.weight]), torch.cat([self.fcn.bias, first.bias]))
        previous, h = both.split([self.fcn.out_features, first.out_features], dim=1)
        previous = F.elu(previous)
        z = self.convs[0].propagate(h.contiguous(), graph)
        for i, conv in enumerate(self.convs[1:]):
            if self.norm:
                z = self.norms[i](z)
            z = dropout(F.elu(z), self.dropout, self.training)
            previous = torch.add(previous, z, alpha=self.weights[i])
            z = conv(previous, graph)
        return F.log_softmax(z, dim=1)


def check_sizes(features: int, layers: int, hidden: int, classes: int, dropout: float, least: int = 2) -> None:
    """Refuse sizes that no network here has.

    Raises:
        ValueError: names the first value that is out of range.
    """
    for name, value, low in (("features", features, 1), ("layers", layers, least), ("hidden", hidden, 1)):
        if value < low:
            raise ValueError(f"{name} is {value}, expected at least {low}")
    if classes < 2:
        raise ValueError(f"classes is {classes}, expected at least 2")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected 0 <= dropout < 1")


# ---- baselines -------------------------------------------------------------------------------------------------------
# As the official code trains them beside GGCN; each takes and returns what GGCN does.


class MLP(nn.Module):
    """Linear layers with ELU and dropout before each; the graph is not looked at. State: ``fcs.0/1``, ``convs.<i>``."""

    def __init__(
        self, features: int, layers: int = 2, hidden: int = 16, classes: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout)
        self.fcs = nn.ModuleList([nn.Linear(features, hidden), nn.Linear(hidden, classes)])
        self.convs = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 2))
        self.dropout = dropout

    def forward(self, x: Features, graph: Adjacency | Tensor | None = None) -> Tensor:
        """(N, F) -> log-probabilities (N, C)."""
        x = dropout(x, self.dropout, self.training)
        z = F.elu(linear(x, self.fcs[0].weight, self.fcs[0].bias))
        for conv in self.convs:
            z = F.elu(conv(dropout(z, self.dropout, self.training)))
        return F.log_softmax(self.fcs[1](dropout(z, self.dropout, self.training)), dim=1)


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class GCNConvolution(nn.Module):
    """``A_hat (x W) + b``; W (in, out) and b start uniform within 1 / sqrt(out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(out_features)
        self.weight = _uniform(in_features, out_features, bound=bound)
        self.bias = _uniform(out_features, bound=bound)

    def forward(self, x: Features, graph: Adjacency, propagate: bool = True) -> Tensor:
        """(N, in) -> (N, out); without ``propagate`` the graph is left out."""
        h = x @ self.weight
        return (graph.hat @ h if propagate else h) + self.bias


class GCN(nn.Module):
    """Kipf and Welling's network: ReLU and dropout after each convolution but the last; none on the input."""

    def __init__(
        self, features: int, layers: int = 2, hidden: int = 16, classes: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout)
        widths = [features, *[hidden] * (layers - 1), classes]
        self.convs = nn.ModuleList(GCNConvolution(i, o) for i, o in pairwise(widths))
        self.dropout = dropout

    def forward(self, x: Features, graph: Adjacency | Tensor, last: bool = True) -> Tensor:
        """(N, F) -> log-probabilities (N, C). ``last=False`` leaves out the last layer's propagation: what the
        representation before it says of each node alone (Sec. 3.5)."""
        graph = as_adjacency(graph)
        for conv in self.convs[:-1]:
            x = dropout(F.relu(conv(x, graph)), self.dropout, self.training)
        return F.log_softmax(self.convs[-1](x, graph, last), dim=1)


class _Matrix(nn.Module):
    """A weight matrix in a module of its own, for the official code's names."""

    def __init__(self, *shape: int, bound: float) -> None:
        super().__init__()
        self.weight = _uniform(*shape, bound=bound)


class GCNII(nn.Module):
    """Chen et al. 2020: initial residual (``alpha``) and identity mapping (``theta_l = ln(lamda / l + 1)``).

    Args:
        variant: GCNII*, with separate weights for the propagated and the initial representation.
    """

    def __init__(
        self,
        features: int,
        layers: int = 64,
        hidden: int = 64,
        classes: int = 2,
        dropout: float = 0.5,
        lamda: float = 0.5,
        alpha: float = 0.5,
        variant: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout, least=1)
        bound = 1.0 / math.sqrt(hidden)
        self.convs = nn.ModuleList(_Matrix(hidden * (1 + variant), hidden, bound=bound) for _ in range(layers))
        self.fcs = nn.ModuleList([nn.Linear(features, hidden), nn.Linear(hidden, classes)])
        self.dropout, self.lamda, self.alpha, self.variant = dropout, lamda, alpha, variant

    def forward(self, x: Features, graph: Adjacency | Tensor) -> Tensor:
        """(N, F) -> log-probabilities (N, C)."""
        graph = as_adjacency(graph)
        x = dropout(x, self.dropout, self.training)
        z = initial = F.relu(linear(x, self.fcs[0].weight, self.fcs[0].bias))
        share = self.alpha * initial
        identity = torch.eye(initial.shape[1], device=initial.device)
        for l, conv in enumerate(self.convs, start=1):
            theta = math.log(self.lamda / l + 1.0)
            z = graph.hat @ dropout(z, self.dropout, self.training)
            # theta (m W) + (1 - theta) m = m (theta W + (1 - theta) I), m = (1 - alpha) A_hat z + alpha z_0
            if self.variant:  # W has a half for each summand of m
                own, first = (theta * conv.weight).chunk(2)
                z = z @ (own + (1 - theta) * (1 - self.alpha) * identity)
                z = torch.addmm(z, initial, first + (1 - theta) * self.alpha * identity)
            else:
                z = torch.add(share, z, alpha=1 - self.alpha) @ (theta * conv.weight + (1 - theta) * identity)
            z = F.relu(z)
        return F.log_softmax(self.fcs[1](dropout(z, self.dropout, self.training)), dim=1)


class PairNormGCN(nn.Module):
    """GCN with PairNorm (Zhao and Akoglu 2020, mode "PN", scale 1) before each ReLU; dropout before each layer."""

    def __init__(
        self, features: int, layers: int = 2, hidden: int = 64, classes: int = 2, dropout: float = 0.6
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout)
        widths = [features, *[hidden] * (layers - 1)]
        self.hidden_layers = nn.ModuleList(GCNConvolution(i, o) for i, o in pairwise(widths))
        self.out_layer = GCNConvolution(hidden, classes)
        self.dropout = dropout

    @staticmethod
    def pair_norm(x: Tensor) -> Tensor:
        """Subtract the mean node, divide by the root mean square norm of a node: (N, d) -> (N, d)."""
        x = x - x.mean(0)
        return x * (1e-6 + x.square().sum(1).mean()).rsqrt()

    def forward(self, x: Features, graph: Adjacency | Tensor) -> Tensor:
        """(N, F) -> log-probabilities (N, C)."""
        graph = as_adjacency(graph)
        for layer in self.hidden_layers:
            x = F.relu(self.pair_norm(layer(dropout(x, self.dropout, self.training), graph)))
        return F.log_softmax(self.out_layer(dropout(x, self.dropout, self.training), graph), dim=1)


class _Gamma(nn.Module):
    """The K + 1 weights of GPRGNN, started at personalised PageRank."""

    def __init__(self, steps: int, alpha: float) -> None:
        super().__init__()
        gamma = alpha * (1.0 - alpha) ** torch.arange(steps + 1, dtype=torch.float64)
        gamma[-1] = (1.0 - alpha) ** steps
        self.temp = nn.Parameter(gamma.float())


class GPRGNN(nn.Module):
    """Chien et al. 2021: an MLP F-h-C, then ``sum_k gamma_k P^k`` with learned gamma, K = ``layers``."""

    def __init__(
        self,
        features: int,
        layers: int = 10,
        hidden: int = 64,
        classes: int = 2,
        dropout: float = 0.5,
        dprate: float = 0.5,
        alpha: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout, least=1)
        if not (0.0 <= dprate < 1.0 and 0.0 <= alpha <= 1.0):
            raise ValueError(f"dprate is {dprate} and alpha {alpha}, expected 0 <= dprate < 1 and 0 <= alpha <= 1")
        self.lin1, self.lin2 = nn.Linear(features, hidden), nn.Linear(hidden, classes)
        self.prop1 = _Gamma(layers, alpha)
        self.dropout, self.dprate = dropout, dprate

    def forward(self, x: Features, graph: Adjacency | Tensor) -> Tensor:
        """(N, F) -> log-probabilities (N, C)."""
        step = as_adjacency(graph).propagation
        z = F.relu(linear(dropout(x, self.dropout, self.training), self.lin1.weight, self.lin1.bias))
        z = self.lin2(dropout(z, self.dropout, self.training))
        z = dropout(z, self.dprate, self.training)
        gamma = self.prop1.temp.unbind()
        out = gamma[0] * z
        for weight in gamma[1:]:
            z = step @ z
            out = torch.addcmul(out, weight, z)
        return F.log_softmax(out, dim=1)


class GATLayer(nn.Module):
    """Attention heads side by side: ``sum_j a_ij W x_j``, a = softmax_j LeakyReLU(<a1, W x_i> + <a2, W x_j>).

    Args:
        negative: the official edge form differs from its dense one: a = softmax_j -LeakyReLU(...), dropout before the
            normalisation, normal instead of uniform initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int,
        dropout: float,
        slope: float = 0.2,
        negative: bool = False,
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(heads, in_features, out_features))
        self.a = nn.Parameter(torch.empty(heads, 2 * out_features))
        init = nn.init.xavier_normal_ if negative else nn.init.xavier_uniform_
        for head in range(heads):  # fans of one head
            init(self.W.data[head], gain=1.414)
            init(self.a.data[head].unsqueeze(1), gain=1.414)
        self.dropout, self.slope, self.negative = dropout, slope, negative

    def forward(self, x: Features, graph: Adjacency) -> Tensor:
        """(N, in) -> (N, heads * out), before the activation."""
        heads, width, out = self.W.shape
        pattern = graph.heads(heads)
        h = linear(x, self.W.transpose(1, 2).reshape(heads * out, width))
        h = h.view(-1, heads, out).transpose(0, 1).contiguous()  # (heads, N, out)
        asks, asked = torch.bmm(h, self.a.view(heads, 2, out).transpose(1, 2)).view(-1, 2).t().contiguous()
        score = asks.index_select(0, pattern.row) + asked.index_select(0, pattern.col)  # <a1, W x_i> + <a2, W x_j>
        score = F.leaky_relu(score, self.slope)
        score = -score if self.negative else score
        top = torch.full_like(asks, -math.inf).scatter_reduce(0, pattern.row, score.detach(), "amax")
        weight = (score - top.index_select(0, pattern.row)).exp()
        kept = dropout(weight, self.dropout, self.training)
        total = torch.zeros_like(asks).index_add(0, pattern.row, kept if self.negative else weight)
        message = edge_sum(pattern, kept, h.view(-1, out)) * total.clamp_min(EPS).reciprocal()[:, None]
        return message.view(heads, -1, out).transpose(0, 1).reshape(-1, heads * out)


class GAT(nn.Module):
    """Velickovic et al. 2018: ``heads`` heads of ``hidden`` units with ELU; one output head, with ELU too.

    ``from_official`` turns an official state dict into one of this class.
    """

    def __init__(
        self,
        features: int,
        layers: int = 2,
        hidden: int = 8,
        classes: int = 2,
        dropout: float = 0.6,
        heads: int = 8,
        slope: float = 0.2,
        negative: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(features, layers, hidden, classes, dropout)
        widths = [features, *[hidden * heads] * (layers - 1)]
        self.att_layers = nn.ModuleList(
            GATLayer(width, hidden, heads, dropout, slope, negative) for width in widths[:-1]
        )
        self.out_att = GATLayer(widths[-1], classes, 1, dropout, slope, negative)
        self.dropout = dropout

    def forward(self, x: Features, graph: Adjacency | Tensor) -> Tensor:
        """(N, F) -> log-probabilities (N, C)."""
        graph = as_adjacency(graph)
        for layer in (*self.att_layers, self.out_att):
            x = F.elu(layer(dropout(x, self.dropout, self.training), graph))
        return F.log_softmax(x, dim=1)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a network here from that of its twin in the official code.

    GGCN, MLP, GCN and GCNII have the same names; PairNorm's biases lose an axis, GPRGNN's weights are float64 there,
    GAT's heads (``attention_<layer>_<head>``, both of its forms) are stacked.
    """
    out: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        part, _, name = key.rpartition(".")
        if part.startswith("attention_") or part == "out_att":
            layer, head = part.split("_")[1:3] if part != "out_att" else ("out", "0")
            place = "out_att" if layer == "out" else f"att_layers.{layer}"
            heads.setdefault(f"{place}.{name}", {})[int(head)] = value.flatten() if name == "a" else value
        elif name == "bias":
            out[key] = value.flatten()
        else:
            out[key] = value.float() if value.dtype == torch.float64 else value
    return out | {key: torch.stack([rows[head] for head in sorted(rows)]) for key, rows in heads.items()}


# ---- node-level analysis ---------------------------------------------------------------------------------------------


def relative_degree(edges: Tensor, nodes: int) -> Tensor:
    """r_i = mean over neighbours j of sqrt((d_i + 1) / (d_j + 1)) (Sec. 3.6); NaN without neighbours.

    Args:
        edges: (2, E) int64 pairs (node, neighbour). nodes: N.
    """
    degree = torch.bincount(edges[0], minlength=nodes).double()
    ratio = ((degree[edges[0]] + 1) / (degree[edges[1]] + 1)).sqrt()
    return ratio.new_zeros(nodes).index_add_(0, edges[0], ratio) / degree


def degree_groups(degree: Tensor, groups: int = 5) -> Tensor:
    """Equal bins of log2(degree) between the smallest and the largest positive degree (Sec. 3.5).

    Args:
        degree: (N,) non-negative.

    Returns:
        (N,) int64 bin of each node; -1 for nodes without neighbours.

    Raises:
        ValueError: no node has a neighbour, or ``groups`` < 1.
    """
    some = degree > 0
    if groups < 1 or not bool(some.any()):
        raise ValueError(f"{groups} groups of {int(some.sum())} nodes with neighbours, expected at least one of each")
    log = degree.double().clamp_min(1).log2()
    ends = torch.linspace(float(log[some].min()), float(log[some].max()), groups + 1, dtype=torch.float64)
    return torch.where(some, torch.bucketize(log, ends[1:-1].to(log.device), right=True), -1)


def node_analysis(
    prediction: Tensor, before: Tensor, labels: Tensor, edges: Tensor, test: Tensor, groups: int = 5
) -> dict[str, Tensor]:
    """Accuracy against degree (Sec. 3.5), over the test nodes of each degree group.

    Args:
        prediction: (N,) predicted classes. before: (N,) classes predicted without the last propagation.
        labels: (N,) true classes. edges: (2, E) pairs (node, neighbour) of A. test: (N,) bool.

    Returns:
        ``count``, ``accuracy``, ``homophily`` (share of neighbours of the same class that ``before`` gets right) and
        ``original_homophily`` (share of neighbours of the same class): (groups,) float64 each, NaN in an empty group.
    """
    node, neighbour = edges
    degree = torch.bincount(node, minlength=len(labels))
    group = degree_groups(degree, groups)
    chosen = test & (group >= 0)
    same = (labels[node] == labels[neighbour]).double()
    right = same * (before == labels)[neighbour]
    zeros = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    rows = torch.stack(
        [
            torch.ones_like(zeros),
            (prediction == labels).double(),
            zeros.index_add(0, node, right) / degree.clamp_min(1),
            zeros.index_add(0, node, same) / degree.clamp_min(1),
        ]
    )
    total = rows.new_zeros(4, groups).index_add_(1, group[chosen], rows[:, chosen])
    count = total[0]
    return {"count": count} | {
        name: total[i] / torch.where(count > 0, count, math.nan)
        for i, name in enumerate(("accuracy", "homophily", "original_homophily"), start=1)
    }
