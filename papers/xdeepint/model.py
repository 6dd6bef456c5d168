"""xDeepInt (Yan & Li, DLP-KDD 2020): the polynomial interaction network, its optimisers, the eleven models beside it.

Everything here takes ``ids``: integers of shape (B, F), the level of each of F categorical fields, counted from 0 in
each field, and -1 for a missing or unknown level, which contributes a zero vector. Every model returns logits (B,).

Equations are numbered as in the README's method map: 1 embedding, 2 sub-spaces, 3 interaction layer, 4 un-stacking,
5 output, 6 G-FTRL, 7 FTRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "linear": None,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "swish": F.silu,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),  # TensorFlow's default slope
    "elu": F.elu,
    "selu": F.selu,
}
"""The activations of Table 4."""


# ---- embedding -----------------------------------------------------------------------------------------------------


def coalesce(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, sorted, and the sum of the values of each, added in the order of the entries.

    Args:
        rows: (n,) int64, not negative. values: (n, K).

    Returns:
        (R,) int64 and (R, K).
    """
    n = len(rows)
    if n == 0:
        return rows, values
    if rows.device.type == "cpu":  # one sort of (row, entry) keys: NumPy's vector instructions make it the fastest here
        bits = n.bit_length()
        keys = torch.from_numpy(np.sort(((rows << bits) | torch.arange(n)).numpy()))
        ordered, order = keys >> bits, keys & ((1 << bits) - 1)
    else:
        ordered, order = torch.sort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    return distinct, F.embedding_bag(order, values, counts.cumsum(0) - counts, mode="sum")


class _Lookup(torch.autograd.Function):
    """Rows of a table on the CPU. The last row is the one of unknown levels and gets no gradient.

    PyTorch's dense embedding gradient walks through all entries for each thread, its sparse one leaves duplicates to
    the optimiser; adding rows directly is several times faster.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, sparse: bool) -> Tensor:
        """table (C + 1, K), rows of any shape -> rows' shape + (K,)."""
        ctx.save_for_backward(rows)
        ctx.shape, ctx.sparse = table.shape, sparse
        return table.index_select(0, rows.reshape(-1)).view(*rows.shape, table.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the table: dense, or sparse with each row once."""
        (rows,), (count, size) = ctx.saved_tensors, ctx.shape
        rows, g = rows.reshape(-1), g.reshape(-1, size)
        if not ctx.sparse:
            dense = g.new_zeros(count, size).index_add_(0, rows, g)
            dense[-1] = 0
            return dense, None, None
        distinct, summed = coalesce(rows, g)
        known = len(distinct) - int(len(distinct) > 0 and distinct[-1] == count - 1)
        index = distinct[:known].unsqueeze(0)
        return (
            torch.sparse_coo_tensor(index, summed[:known], (count, size), is_coalesced=True, check_invariants=False),
            None,
            None,
        )


class FieldEmbedding(nn.Module):
    """The embedding tables of all fields as one matrix (eq. 1), so that a batch is one gather and one sparse gradient.

    Row ``offset[f] + i`` belongs to level ``i`` of field ``f``; one more row at the end is zero, is never trained, and
    stands for unknown levels.

    Args:
        levels: C_f, the number of levels of each field.
        size: K, numbers per level.
        sparse: give the table a sparse gradient (rows of the batch only) instead of one of the table's size.
        std: standard deviation of the truncated normal initial values, by default 1/sqrt(K) (TensorFlow's embedding
            columns); 0 gives zeros.

    Raises:
        ValueError: no field, a field without levels, or a size below 1.
    """

    def __init__(self, levels: Sequence[int], size: int, sparse: bool = False, std: float | None = None) -> None:
        super().__init__()
        if not levels or min(levels) < 1:
            raise ValueError(f"every field needs at least one level, got {list(levels)}")
        if size < 1:
            raise ValueError(f"embedding size is {size}, expected at least 1")
        self.levels, self.size = tuple(int(n) for n in levels), size
        rows = sum(self.levels)
        weight = torch.zeros(rows + 1, size)
        std = size**-0.5 if std is None else std
        if std > 0:
            nn.init.trunc_normal_(weight[:rows], std=std, a=-2 * std, b=2 * std)
        self.table = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=rows, sparse=sparse)
        offset = torch.tensor([0, *accumulate(self.levels)][:-1], dtype=torch.int64)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("count", torch.tensor(self.levels, dtype=torch.int64), persistent=False)

    @property
    def fields(self) -> int:
        """F."""
        return len(self.levels)

    def rows(self, ids: Tensor) -> Tensor:
        """Row of the table for each entry of ``ids`` (B, F), int64; the zero row for -1.

        Raises:
            ValueError: another number of fields, or (checked on the CPU only) a level the field does not have.
        """
        if ids.ndim != 2 or ids.shape[1] != self.fields:
            raise ValueError(f"ids have shape {tuple(ids.shape)}, expected (batch, {self.fields})")
        ids = ids.long()
        check = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if check and bool((ids >= self.count).any()):
            field = int((ids >= self.count).any(0).nonzero()[0])
            found = int(ids[:, field].max())
            raise ValueError(f"field {field} has levels 0..{self.levels[field] - 1} (or -1), got {found}")
        return torch.where(ids < 0, self.table.num_embeddings - 1, ids + self.offset)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> X_0 (B, F, K)."""
        return self._lookup(self.rows(ids))

    def fields_first(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> (F, B, K), the order in which ``PIN`` and the pairwise layers need no copy."""
        return self._lookup(self.rows(ids).t())

    def _lookup(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Lookup.apply(self.table.weight, rows, self.table.sparse)
        return self.table(rows)

    @torch.no_grad()
    def load_tables(self, tables: Sequence[Tensor]) -> None:
        """Copy one (C_f, K) matrix per field (the way other libraries keep them) into the fused table.

        Raises:
            ValueError: another number of fields or another shape.
        """
        shapes = [tuple(t.shape) for t in tables]
        expected = [(n, self.size) for n in self.levels]
        if shapes != expected:
            raise ValueError(f"tables have shapes {shapes}, expected {expected}")
        self.table.weight[:-1] = torch.cat([torch.as_tensor(t) for t in tables]).to(self.table.weight)

    def field(self, index: int) -> Tensor:
        """The (C_f, K) part of the table that belongs to one field (a view)."""
        start = sum(self.levels[:index])
        return self.table.weight[start : start + self.levels[index]]


# ---- the polynomial interaction network ----------------------------------------------------------------------------


def stack_subspaces(x: Tensor, subspaces: int) -> Tensor:
    """Cut the K bits into h parts and lay them under one another: (B, F, K) -> (B, h*F, K/h) (eq. 2).

    Row ``s*F + f`` holds bits ``s*K/h .. (s+1)*K/h`` of field ``f``.

    Raises:
        ValueError: h does not divide K.
    """
    batch, fields, size = x.shape
    part = _part(size, subspaces)
    return x.view(batch, fields, subspaces, part).transpose(1, 2).reshape(batch, subspaces * fields, part)


def unstack_subspaces(x: Tensor, subspaces: int) -> Tensor:
    """The inverse of ``stack_subspaces``: (B, h*R, d) -> (B, R, h*d) (eq. 4).

    Raises:
        ValueError: h does not divide the number of rows.
    """
    batch, rows, part = x.shape
    if rows % subspaces:
        raise ValueError(f"{rows} rows cannot be split into {subspaces} sub-spaces")
    return x.reshape(batch, subspaces, rows // subspaces, part).transpose(1, 2).reshape(batch, -1, subspaces * part)


def _part(size: int, subspaces: int) -> int:
    if subspaces < 1:
        raise ValueError(f"number of sub-spaces is {subspaces}, expected at least 1")
    if size % subspaces:
        raise ValueError(f"embedding size {size} is not divisible by {subspaces} sub-spaces")
    return size // subspaces


class _LinearProducts(torch.autograd.Function):
    """u = v X_L with X_l = X_{l-1} o (1 + W_l X_0), for (R, N) matrices: the gradient without autograd's temporaries.

    Passes of memory, not multiplications, are what a small PIN costs: this is a third faster than the plain form.
    """

    @staticmethod
    def forward(ctx: Any, x0: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """x0 (R, N), weight (L, R, R) with L > 0, v (R,) -> (N,)."""
        maps = (weight.flatten(0, 1) @ x0).view(len(weight), *x0.shape)
        products = torch.empty_like(maps)
        x = x0
        for a, out in zip(maps, products, strict=True):
            x = torch.addcmul(x, x, a, out=out)  # eq. 3
        ctx.save_for_backward(x0, weight, v, maps, products)
        return torch.mv(x.t(), v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g (N,) -> gradients of x0, weight and v."""
        x0, weight, v, maps, products = ctx.saved_tensors
        gx = torch.mul(v.unsqueeze(1), g)
        gmaps = torch.empty_like(maps)
        for index in reversed(range(len(weight))):
            torch.mul(gx, products[index - 1] if index else x0, out=gmaps[index])
            gx.addcmul_(gx, maps[index])
        flat = gmaps.flatten(0, 1)
        gweight = (flat @ x0.t()).view_as(weight)
        return gx.addmm_(weight.flatten(0, 1).t(), flat), gweight, torch.mv(products[-1], g)


class PIN(nn.Module):
    """The Polynomial Interaction Network: X_l = X_{l-1} o (1 + act(W_l X_0)), l = 1..L, and its linear output.

    The products are taken with the fields first, (F*h, B*K/h): then the maps of all layers, which all read X_0, are
    one matrix product without any transposition inside.

    Args:
        fields: F. size: K, embedding size.
        layers: L; 0 is logistic regression.
        subspaces: h; 1 is vector-wise, K fully bit-wise.
        activation: of ``W_l X_0``, a name of ``ACTIVATIONS``.
        residual: ``False`` is the official code's other form, X_l = X_{l-1} o act(W_l X_0), in which all of X_0..X_L
            are given to the output.
        dropout: rate, applied to X_0 in front of each W_l.
        join: how the non-residual form with h > 1 hands its layers to the output. ``"code"`` as the official code does:
            the layers' rows are concatenated first and all of them cut into h blocks, which are then not sub-spaces.
            ``"layer"`` un-stacks each layer by itself.

    Parameters: ``weight`` (L, F*h, F*h), where ``weight[l]`` multiplies from the left (a Keras kernel is its
    transpose); ``output`` (F,) or (F*(L+1),); ``bias`` (1,), which counts once per bit (eq. 5).

    Raises:
        ValueError: an impossible size, an unknown activation.
    """

    def __init__(
        self,
        fields: int,
        size: int,
        layers: int,
        subspaces: int = 1,
        activation: str = "linear",
        residual: bool = True,
        dropout: float = 0.0,
        join: str = "code",
    ) -> None:
        super().__init__()
        if fields < 1 or layers < 0:
            raise ValueError(f"a PIN needs at least 1 field and 0 layers, got {fields} and {layers}")
        _part(size, subspaces)
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if join not in ("code", "layer"):
            raise ValueError(f"join is {join!r}, expected 'code' or 'layer'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, expected at least 0 and below 1")
        self.fields, self.size, self.layers, self.subspaces = fields, size, layers, subspaces
        self.activation, self.residual, self.dropout, self.join = activation, residual, dropout, join
        rows = fields * subspaces
        weight = nn.Parameter(torch.empty(layers, rows, rows)) if layers else None
        self.register_parameter("weight", weight)  # without layers there is nothing that would get a gradient
        self.output = nn.Parameter(torch.empty(fields if residual else fields * (layers + 1)))
        self.bias = nn.Parameter(torch.zeros(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform kernels, zero bias."""
        if self.weight is not None:
            bound = math.sqrt(6 / (2 * self.weight.shape[1]))
            nn.init.uniform_(self.weight, -bound, bound)
        bound = math.sqrt(6 / (len(self.output) + 1))
        nn.init.uniform_(self.output, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X_0 (B, F, K) -> logits (B,)."""
        return self.fields_first(x.transpose(0, 1))

    def fields_first(self, x: Tensor) -> Tensor:
        """X_0 as (F, B, K) -> logits (B,)."""
        rows, v = self._stack(x), self._output_rows()
        # eq. 5: the sum over the bits commutes with un-stacking (eq. 4), so only W_out is laid out like the rows
        if self._is_plain(x):
            per_bit = _LinearProducts.apply(rows, self.weight, v)
        else:
            per_bit = (v.unsqueeze(0) @ self._interact(rows)).to(v.dtype)
        return per_bit.view(x.shape[1], -1).sum(1) + self.size * self.bias

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the hand-written gradient applies: the paper's best model, in full precision."""
        if self.weight is None or self.activation != "linear" or not self.residual:
            return False
        return not (self.dropout > 0 and self.training) and not torch.is_autocast_enabled(x.device.type)

    def interactions(self, x: Tensor) -> Tensor:
        """X_0 (B, F, K) -> X_L (B, F, K); without the residual connection X_0..X_L as (B, F*(L+1), K)."""
        batch = x.shape[0]
        rows = self._interact(self._stack(x.transpose(0, 1)))
        rows = rows.view(len(rows), batch, -1).transpose(0, 1)
        if self.residual or self.join == "code":
            return unstack_subspaces(rows, self.subspaces)
        layers = rows.view(batch, self.layers + 1, -1, rows.shape[-1])
        return torch.cat([unstack_subspaces(layer, self.subspaces) for layer in layers.unbind(1)], 1)

    def _stack(self, x: Tensor) -> Tensor:
        """(F, B, K) -> (h*F, B*K/h), eq. 2 with the fields first; no copy when h = 1."""
        fields, batch, size = x.shape
        if fields != self.fields or size != self.size:
            raise ValueError(f"X_0 has {fields} fields of {size} numbers, expected {self.fields} of {self.size}")
        parts = x.reshape(fields, batch, self.subspaces, size // self.subspaces)
        return parts.permute(2, 0, 1, 3).reshape(self.subspaces * fields, -1)

    def _interact(self, x0: Tensor) -> Tensor:
        """X'_0 (F*h, N) -> X'_L (F*h, N), or all of X'_0..X'_L under one another."""
        x, seen = x0, [x0]
        for a in self._maps(x0):
            x = torch.addcmul(x, x, a) if self.residual else x * a  # eq. 3
            seen.append(x)
        return x if self.residual else torch.cat(seen)

    def _maps(self, x0: Tensor) -> Sequence[Tensor]:
        """act(W_l X'_0) of every layer, each (F*h, N)."""
        if self.weight is None:
            return ()
        if self.dropout > 0 and self.training:
            a = torch.stack([w @ F.dropout(x0, self.dropout) for w in self.weight.unbind(0)])
        else:
            a = (self.weight.flatten(0, 1) @ x0).view(self.layers, *x0.shape)
        function = ACTIVATIONS[self.activation]
        return (a if function is None else function(a)).to(x0.dtype).unbind(0)

    def _output_rows(self) -> Tensor:
        """W_out repeated so that entry r multiplies row r of the stacked result."""
        if self.residual or self.join == "code":
            return self.output.repeat(self.subspaces)
        per_layer = self.output.view(self.layers + 1, 1, self.fields)
        return per_layer.expand(-1, self.subspaces, -1).reshape(-1)

    @torch.no_grad()
    def load_keras(self, kernels: Sequence[Any], output_kernel: Any, output_bias: Any) -> None:
        """Copy the arrays of the official TensorFlow model.

        Its layers multiply the fields from the right, so every kernel (F*h, F*h) is the transpose of W_l.

        Args:
            kernels: one array per layer. output_kernel: (F, 1) or (F*(L+1), 1). output_bias: (1,).

        Raises:
            ValueError: another number of layers.
        """
        if len(kernels) != self.layers:
            raise ValueError(f"got {len(kernels)} kernels, expected {self.layers}")
        for index, kernel in enumerate(kernels):
            self.weight[index] = torch.as_tensor(kernel).t()
        self.output.copy_(torch.as_tensor(output_kernel).reshape(-1))
        self.bias.copy_(torch.as_tensor(output_bias).reshape(-1))


# ---- the models of Table 1 -----------------------------------------------------------------------------------------


def mlp(inputs: int, widths: Sequence[int], outputs: int | None = 1, dropout: float = 0.0) -> nn.Sequential:
    """Linear-ReLU layers of the given widths and, unless ``outputs`` is ``None``, a linear one behind them."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        inputs = width
    if outputs is not None:
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def pairs(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right members, each (P, B, K), of the P = F(F-1)/2 pairs of fields of ``x`` (F, B, K)."""
    return x.index_select(0, index[0]), x.index_select(0, index[1])


class _PairSum(torch.autograd.Function):
    """Sum over i < j of <x_i, x_j> in O(F K), with the gradient (sum of x) - x_i written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(B, F, K) -> (B,)."""
        total = x.sum(1)
        ctx.save_for_backward(x, total)
        flat = x.flatten(1)
        return 0.5 * (total.square().sum(1) - torch.linalg.vecdot(flat, flat))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """(B,) -> (B, F, K)."""
        x, total = ctx.saved_tensors
        return (total.unsqueeze(1) - x).mul_(g.view(-1, 1, 1))


def fm_second_order(x: Tensor) -> Tensor:
    """Sum over i < j of <x_i, x_j>: (B, F, K) -> (B,)."""
    return _PairSum.apply(x)


class CTRModel(nn.Module):
    """What the models share: the fused embedding (eq. 1), and a linear part where they have one.

    Args:
        levels: C_f, the number of levels of each field. size: K. sparse: sparse gradients of the tables.
        linear: add sum_f w_f[id_f] + b to the logit.
    """

    def __init__(self, levels: Sequence[int], size: int, sparse: bool = False, linear: bool = False) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(levels, size, sparse)
        self.linear = FieldEmbedding(levels, 1, sparse, std=0.0) if linear else None
        self.bias = nn.Parameter(torch.zeros(1)) if linear else None

    @property
    def fields(self) -> int:
        """F."""
        return self.embedding.fields

    def first_order(self, ids: Tensor) -> Tensor:
        """The linear part's logit (B,)."""
        assert self.linear is not None and self.bias is not None
        return self.linear(ids).sum((1, 2)) + self.bias


class LR(nn.Module):
    """Logistic regression on the one-hot fields.

    Args:
        levels: C_f of each field. size: not used; every model takes it. sparse: sparse gradients.
    """

    def __init__(self, levels: Sequence[int], size: int = 1, sparse: bool = False) -> None:
        super().__init__()
        self.linear = FieldEmbedding(levels, 1, sparse, std=0.0)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        return self.linear(ids).sum((1, 2)) + self.bias


class FM(CTRModel):
    """Factorisation machine (Rendle 2010): linear part + inner products of all pairs."""

    def __init__(self, levels: Sequence[int], size: int = 16, sparse: bool = False) -> None:
        super().__init__(levels, size, sparse, linear=True)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        return self.first_order(ids) + fm_second_order(self.embedding(ids))


class DNN(CTRModel):
    """A feed-forward network on the concatenated embeddings; ``wide`` adds a linear part (Wide & Deep, Cheng 2016)."""

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        wide: bool = False,
    ) -> None:
        super().__init__(levels, size, sparse, linear=wide)
        self.net = mlp(self.fields * size, hidden, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        logit = self.net(self.embedding(ids).flatten(1)).squeeze(1)
        return logit if self.linear is None else logit + self.first_order(ids)


class DeepFM(CTRModel):
    """DeepFM (Guo 2017): a factorisation machine and a feed-forward network on the same embeddings, logits added."""

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(levels, size, sparse, linear=True)
        self.net = mlp(self.fields * size, hidden, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding(ids)
        return self.first_order(ids) + fm_second_order(x) + self.net(x.flatten(1)).squeeze(1)


class DeepCrossing(CTRModel):
    """Deep Crossing (Shan 2016): residual units relu(x + W_2 relu(W_1 x + b_1) + b_2) on all embeddings in a row."""

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(levels, size, sparse)
        inputs = self.fields * size
        self.units = nn.ModuleList(mlp(inputs, (width,), inputs, dropout) for width in hidden)
        self.output = nn.Linear(inputs, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding(ids).flatten(1)
        for unit in self.units:
            x = F.relu(x + unit(x))
        return self.output(x).squeeze(1)


class CrossNet(nn.Module):
    """The cross network of DCN (Wang 2017): x_{l+1} = x_0 <w_l, x_l> + b_l + x_l.

    Args:
        inputs: length of x. layers: number of crosses.
    """

    def __init__(self, inputs: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, inputs))
        self.bias = nn.Parameter(torch.zeros(layers, inputs))
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x0: Tensor) -> Tensor:
        """(B, D) -> (B, D).

        Every x_l is a_l x_0 + c_l with a number a_l for each sample and c_l = b_0 + .. + b_{l-1} for all of them, so
        one matrix product gives all <w_l, x_0>, and the crosses themselves cost one number a sample.
        """
        c = self.bias.cumsum(0)
        earlier = torch.cat([torch.zeros_like(c[:1]), c[:-1]])
        inner, offset = x0 @ self.weight.t(), (self.weight * earlier).sum(1)
        a = torch.ones_like(inner[:, 0])
        for s, o in zip(inner.unbind(1), offset.unbind(0), strict=True):
            a = torch.addcmul(a + o, a, s)
        return torch.addcmul(c[-1], a.unsqueeze(1), x0)


class DCN(CTRModel):
    """Deep & Cross Network (Wang 2017): a cross network and a feed-forward network side by side, one linear output."""

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        crosses: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(levels, size, sparse)
        inputs = self.fields * size
        self.cross = CrossNet(inputs, crosses)
        self.net = mlp(inputs, hidden, None, dropout)
        self.output = nn.Linear(inputs + (hidden[-1] if hidden else inputs), 1)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding(ids).flatten(1)
        return self.output(torch.cat([self.cross(x), self.net(x)], 1)).squeeze(1)


class PNN(CTRModel):
    """Product-based network (Qu 2016): inner and outer products of all pairs beside the embeddings, then layers.

    Args:
        product: ``"inner"`` <x_i, x_j>, ``"outer"`` x_i^T M_ij x_j with a matrix for each pair, or ``"both"``.
    """

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        product: str = "both",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(levels, size, sparse)
        if product not in ("inner", "outer", "both"):
            raise ValueError(f"product is {product!r}, expected 'inner', 'outer' or 'both'")
        self.product = product
        self.register_buffer("index", torch.triu_indices(self.fields, self.fields, 1), persistent=False)
        count = self.index.shape[1]
        self.kernel = nn.Parameter(torch.empty(count, size, size)) if product != "inner" else None
        if self.kernel is not None:
            nn.init.uniform_(self.kernel, -math.sqrt(3 / size), math.sqrt(3 / size))
        self.net = mlp(self.fields * size + count * (2 if product == "both" else 1), hidden, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding.fields_first(ids)
        left, right = pairs(x, self.index)
        parts = [x.transpose(0, 1).flatten(1)]
        if self.product != "outer":
            parts.append((left * right).sum(2).t())
        if self.kernel is not None:
            parts.append((torch.bmm(left, self.kernel) * right).sum(2).t())
        return self.net(torch.cat(parts, 1)).squeeze(1)


class CIN(nn.Module):
    """Compressed Interaction Network (Lian 2018): x^k_n = sum_{f,m} W^k_{n,fm} x^0_f o x^{k-1}_m, pooled over the bits.

    Args:
        fields: F. widths: feature maps of each layer. All maps of every layer go to the output, without activation.
    """

    def __init__(self, fields: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = [fields, *widths]
        self.maps = nn.ModuleList(nn.Linear(fields * i, width) for i, width in zip(inputs[:-1], widths, strict=True))
        self.output = nn.Linear(sum(widths), 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, K) -> (B,)."""
        x0 = x.transpose(1, 2).contiguous()  # one matrix product a layer, over the rows (sample, bit)
        xk, pooled = x0, []
        for layer in self.maps:
            xk = layer((x0.unsqueeze(3) * xk.unsqueeze(2)).flatten(2))
            pooled.append(xk.sum(1))
        return self.output(torch.cat(pooled, 1)).squeeze(1)


class XDeepFM(CTRModel):
    """xDeepFM (Lian 2018): linear part + CIN + feed-forward network, logits added."""

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        maps: Sequence[int] = (128, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(levels, size, sparse, linear=True)
        self.cin = CIN(self.fields, maps)
        self.net = mlp(self.fields * size, hidden, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding(ids)
        return self.first_order(ids) + self.cin(x) + self.net(x.flatten(1)).squeeze(1)


class AutoInt(CTRModel):
    """AutoInt (Song 2019): layers of multi-head self-attention over the fields, relu(attention + W_res x).

    Args:
        attention: width of a layer, all heads together. layers, heads: as in the paper of AutoInt 3 and 2.

    Raises:
        ValueError: ``heads`` does not divide ``attention``.
    """

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        attention: int = 32,
        layers: int = 3,
        heads: int = 2,
    ) -> None:
        super().__init__(levels, size, sparse)
        if attention % heads:
            raise ValueError(f"attention width {attention} is not divisible by {heads} heads")
        self.heads = heads
        widths = [size] + [attention] * layers
        # query, key, value and residual of a layer are one matrix product
        self.maps = nn.ModuleList(nn.Linear(width, 4 * attention, bias=False) for width in widths[:-1])
        self.output = nn.Linear(self.fields * widths[-1], 1)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding(ids)
        for layer in self.maps:
            q, k, v, residual = layer(x).chunk(4, 2)
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # AutoInt does not divide by sqrt(d)
            x = F.relu(mixed.transpose(1, 2).flatten(2) + residual)
        return self.output(x.flatten(1)).squeeze(1)


class FiBiNET(CTRModel):
    """FiBiNET (Huang 2019): field weights (SENET), bilinear products of all pairs with and without them, then layers.

    Args:
        reduction: the squeeze of SENET has max(1, F // reduction) units.
    """

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        reduction: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(levels, size, sparse, linear=True)
        self.register_buffer("index", torch.triu_indices(self.fields, self.fields, 1), persistent=False)
        count, squeeze = self.index.shape[1], max(1, self.fields // reduction)
        self.senet = nn.Sequential(
            nn.Linear(self.fields, squeeze, bias=False),
            nn.ReLU(),
            nn.Linear(squeeze, self.fields, bias=False),
            nn.ReLU(),
        )
        self.bilinear = nn.Parameter(torch.empty(2, count, size, size))
        nn.init.normal_(self.bilinear, std=size**-0.5)
        self.net = mlp(2 * count * size, hidden, dropout=dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding.fields_first(ids)
        weighted = x * self.senet(x.mean(2).t()).t().unsqueeze(2)
        products = []
        for member, kernel in zip((x, weighted), self.bilinear.unbind(0), strict=True):
            left, right = pairs(member, self.index)
            products.append((torch.bmm(left, kernel) * right).transpose(0, 1).flatten(1))
        return self.first_order(ids) + self.net(torch.cat(products, 1)).squeeze(1)


class XDeepInt(CTRModel):
    """xDeepInt: the embedding (eq. 1) and a PIN on it; ``hidden`` adds the logit of a network on X_0 (xDeepInt+).

    Args:
        levels: C_f of each field. size: K. sparse: sparse gradients of the table.
        layers, subspaces, activation, residual, dropout, join: of the ``PIN``.
        hidden: widths of xDeepInt+'s network; empty is xDeepInt.
    """

    def __init__(
        self,
        levels: Sequence[int],
        size: int = 16,
        sparse: bool = False,
        layers: int = 3,
        subspaces: int = 4,
        activation: str = "linear",
        residual: bool = True,
        dropout: float = 0.0,
        join: str = "code",
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__(levels, size, sparse)
        self.pin = PIN(self.fields, size, layers, subspaces, activation, residual, dropout, join)
        self.net = mlp(self.fields * size, hidden) if hidden else None

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, F) -> logits (B,)."""
        x = self.embedding.fields_first(ids)
        logit = self.pin.fields_first(x)
        return logit if self.net is None else logit + self.net(x.transpose(0, 1).flatten(1)).squeeze(1)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(embedding tables, everything else): the two sets that xDeepInt trains with two optimisers."""
    tables = [m.table.weight for m in model.modules() if isinstance(m, FieldEmbedding)]
    known = {id(p) for p in tables}
    return tables, [p for p in model.parameters() if id(p) not in known]


def count_parameters(model: nn.Module) -> int:
    """Trained numbers: the zero rows of unknown levels are left out."""
    zero_rows = sum(m.size for m in model.modules() if isinstance(m, FieldEmbedding))
    return sum(p.numel() for p in model.parameters()) - zero_rows


def sparsity(model: XDeepInt) -> dict[str, float]:
    """The ratios of Table 6 and the official code's two others.

    Returns:
        ``feature_sparse_ratio``: levels whose vector is all zero. ``weight_sparse_ratio``: zeros in the PIN's
        parameters. ``embedding_sparse_ratio``: zeros in the tables. ``total_sparse_ratio``: zeros in all of them.
    """
    table = model.embedding.table.weight.detach()[:-1]
    rest = [p.detach() for p in model.pin.parameters()]
    zeros, size = float((table == 0).sum()), table.numel()
    rest_zeros, rest_size = float(sum((p == 0).sum() for p in rest)), sum(p.numel() for p in rest)
    return {
        "feature_sparse_ratio": float((table == 0).all(1).float().mean()),
        "weight_sparse_ratio": rest_zeros / rest_size,
        "embedding_sparse_ratio": zeros / size,
        "total_sparse_ratio": (zeros + rest_zeros) / (size + rest_size),
    }


# ---- optimisers ----------------------------------------------------------------------------------------------------

BLOCK = 1 << 16  # elements worked on at a time, so that a step's temporaries stay in the cache


class _RowOptimizer(torch.optim.Optimizer):
    """What G-FTRL and FTRL share: dense gradients block by block, sparse ones on their rows only.

    In both, weights are a function of the state, so a row whose gradient is zero keeps its weights, except that a row
    without any gradient so far becomes zero at the first step. ``dense_updates`` chooses what happens to the rows of a
    sparse gradient's table that have not been met yet.
    """

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        """Make the state of a parameter."""
        raise NotImplementedError

    def _update(self, w: Tensor, g: Tensor, *state: Tensor, group: dict[str, Any]) -> None:
        """One step in place on rows of a parameter and its state."""
        raise NotImplementedError

    def _state_tensors(self, state: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(state[name] for name in self.slots)

    slots: tuple[str, ...] = ("n", "z")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                first = not state
                if first:
                    self._start(p, state)
                if p.grad.is_sparse:
                    self._sparse(p, p.grad, state, group, first)
                else:
                    self._dense(p, p.grad, state, group)
        return loss

    def _dense(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        tensors = [p, g, *self._state_tensors(state)]
        if p.ndim < 2 or not all(t.is_contiguous() for t in tensors):
            self._update(*tensors, group=group)
            return
        if self.row_wise:
            tensors = [t.view(len(p), -1) for t in tensors]
        else:
            tensors = [t.view(-1, 1) for t in tensors]
        rows = max(1, BLOCK // max(1, tensors[0].shape[1]))
        for start in range(0, len(tensors[0]), rows):
            self._update(*(t[start : start + rows] for t in tensors), group=group)

    row_wise: bool = False

    def _sparse(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], first: bool) -> None:
        touched, values = g._indices()[0], g._values()
        # autograd forgets that a gradient is coalesced; looking is cheaper than sorting again
        if not (g.is_coalesced() or (g.device.type == "cpu" and bool((touched[1:] > touched[:-1]).all()))):
            touched, values = coalesce(touched, values)
        before = p
        if first and self._forgets(group):  # as the first dense step does to every row without a gradient
            before = p.clone()
            if self._remembers(group):
                state["initial"] = before
            p.zero_()
        initial = state.get("initial")
        tensors = self._state_tensors(state)
        size = max(1, BLOCK // max(1, p[0].numel()))
        for rows, gradient in zip(touched.split(size), values.split(size), strict=True):
            w = before.index_select(0, rows)
            parts = [t.index_select(0, rows) for t in tensors]
            if initial is not None:
                untouched = parts[0].sum(1, keepdim=True) == 0  # n is a sum of squares
                if w.device.type != "cpu" or bool(untouched.any()):
                    w = torch.where(untouched, initial.index_select(0, rows), w)
            self._update(w, gradient, *parts, group=group)
            for whole, part in zip((p, *tensors), (w, *parts), strict=True):
                whole.index_copy_(0, rows, part)

    def _forgets(self, group: dict[str, Any]) -> bool:
        """Whether a sparse first step sets the rows it does not touch to zero."""
        raise NotImplementedError

    def _remembers(self, group: dict[str, Any]) -> bool:
        """Whether their initial values then wait for the rows' first step."""
        return False


class GFTRL(_RowOptimizer):
    """Group-lasso FTRL for embedding tables (eq. 6): a row is zero unless its accumulated gradient is large enough.

    For a row of width d: sigma = (sqrt(n + g^2) - sqrt(n)) / alpha; n += g^2; z += g - sigma w;
    w = 0 if ||z|| <= lambda1 sqrt(d), else z (lambda1 sqrt(d) / ||z|| - 1) / ((beta + sqrt(n)) / alpha + lambda2).

    The thresholds belong to a loss that is summed over the mini-batch.

    Args:
        params: matrices (C, d) or groups of them.
        alpha, beta, lambda1, lambda2: as above; the paper's code has 0.02, 1, 10, 10.
        sigma: ``"formula"``, or ``"none"`` for the update that the released code computes: it reads n after having
            overwritten it, so the term sigma w vanishes and the initial values never enter.
        dense_updates: what becomes of the rows that a *sparse* gradient has not touched so far. ``False``: they read
            as zero, and a row's random initial value enters the sigma w term of its first step. ``True``: exactly the
            dense algorithm, in which such rows are set to zero by the first step and forget where they began. The work
            of a step is proportional to the touched rows in both. A dense gradient always updates every row.

    Raises:
        ValueError: a negative threshold, alpha not above 0, an unknown ``sigma``, or a parameter that is no matrix.
    """

    row_wise = True

    def __init__(
        self,
        params: Iterable[Any],
        alpha: float = 0.02,
        beta: float = 1.0,
        lambda1: float = 10.0,
        lambda2: float = 10.0,
        *,
        sigma: str = "formula",
        dense_updates: bool = False,
    ) -> None:
        if alpha <= 0 or beta < 0:
            raise ValueError(f"G-FTRL needs alpha > 0 and beta >= 0, got {alpha} and {beta}")
        if lambda1 < 0 or lambda2 < 0:
            raise ValueError(f"G-FTRL's thresholds must not be negative, got lambda1 {lambda1} and lambda2 {lambda2}")
        if sigma not in ("formula", "none"):
            raise ValueError(f"sigma is {sigma!r}, expected 'formula' or 'none'")
        defaults = {
            "alpha": alpha,
            "beta": beta,
            "lambda1": lambda1,
            "lambda2": lambda2,
            "sigma": sigma,
            "dense_updates": dense_updates,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"G-FTRL is for matrices of rows, got a parameter of shape {tuple(p.shape)}")

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        state["n"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        state["z"] = torch.zeros_like(p, memory_format=torch.contiguous_format)

    def _forgets(self, group: dict[str, Any]) -> bool:
        return True

    def _remembers(self, group: dict[str, Any]) -> bool:
        return group["sigma"] == "formula" and not group["dense_updates"]

    def _update(self, w: Tensor, g: Tensor, *state: Tensor, group: dict[str, Any]) -> None:
        n, z = state
        alpha, threshold = group["alpha"], group["lambda1"] * math.sqrt(w.shape[1])
        z.add_(g)
        if group["sigma"] == "formula":
            before = n.sqrt()
            n.addcmul_(g, g)
            root = n.sqrt()
            z.addcmul_(torch.sub(root, before, out=before), w, value=-1 / alpha)
        else:
            n.addcmul_(g, g)
            root = n.sqrt()
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min_(torch.finfo(z.dtype).tiny)
        shrink = norm.reciprocal_().mul_(threshold).sub_(1).clamp_max_(0).mul_(alpha)  # 0 at or below the threshold
        denominator = root.add_(group["beta"] + alpha * group["lambda2"])
        torch.div(z, denominator, out=w).mul_(shrink)  # eq. 6


class FTRL(_RowOptimizer):
    """FTRL-proximal in TensorFlow's form (eq. 7), for the PIN's weights and for LR and FM.

    n' = n + g^2; z += g - (n'^-p - n^-p) / lr w; w = 0 if |z| <= l1, else (sign(z) l1 - z) / (n'^-p / lr + 2 l2),
    with p = ``lr_power``.

    Args:
        params: parameters or groups of them.
        lr, l1, l2: as above; the paper's code has 0.02, 0.1, 0.1.
        lr_power: p, at most 0.
        initial_accumulator: n at the start.
        dense_updates: what becomes of the rows that a *sparse* gradient has not touched so far. ``False``: they keep
            their initial values, as TensorFlow's sparse update leaves them. ``True``: zero, as a dense step makes them.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        l1: float = 0.1,
        l2: float = 0.1,
        *,
        lr_power: float = -0.5,
        initial_accumulator: float = 0.1,
        dense_updates: bool = False,
    ) -> None:
        if lr <= 0 or lr_power > 0:
            raise ValueError(f"FTRL needs lr > 0 and lr_power <= 0, got {lr} and {lr_power}")
        if l1 < 0 or l2 < 0 or initial_accumulator < 0:
            raise ValueError(
                f"FTRL's l1, l2 and first accumulator must not be negative: {l1}, {l2}, {initial_accumulator}"
            )
        defaults = {
            "lr": lr,
            "l1": l1,
            "l2": l2,
            "lr_power": lr_power,
            "initial_accumulator": initial_accumulator,
            "dense_updates": dense_updates,
        }
        super().__init__(params, defaults)

    def _start(self, p: Tensor, state: dict[str, Any]) -> None:
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        state["n"] = torch.full_like(p, group["initial_accumulator"], memory_format=torch.contiguous_format)
        state["z"] = torch.zeros_like(p, memory_format=torch.contiguous_format)

    def _forgets(self, group: dict[str, Any]) -> bool:
        return group["dense_updates"]

    def _update(self, w: Tensor, g: Tensor, *state: Tensor, group: dict[str, Any]) -> None:
        n, z = state
        lr, l2, power = group["lr"], group["l2"], group["lr_power"]
        before = n.sqrt() if power == -0.5 else n.pow(-power)
        n.addcmul_(g, g)
        root = n.sqrt() if power == -0.5 else n.pow(-power)
        z.add_(g)
        z.addcmul_(torch.sub(root, before, out=before), w, value=-1 / lr)
        denominator = root.mul_(-1 / lr).sub_(2 * l2)
        torch.div(F.softshrink(z, group["l1"]), denominator, out=w)  # eq. 7: sign(z) l1 - z is -softshrink(z, l1)


MODELS: dict[str, type[nn.Module]] = {
    "lr": LR,
    "fm": FM,
    "dnn": DNN,
    "wide_deep": DNN,
    "deepfm": DeepFM,
    "deep_crossing": DeepCrossing,
    "dcn": DCN,
    "pnn": PNN,
    "xdeepfm": XDeepFM,
    "autoint": AutoInt,
    "fibinet": FiBiNET,
    "xdeepint": XDeepInt,
    "xdeepint_plus": XDeepInt,
}
"""The rows of Table 1, and xDeepInt+ of Table 7."""
