"""Future gradient descent: a small network forecasts the gradient on the next domain of a stream of clicks.

Ye et al., "Future Gradient Descent for Adapting the Temporal Shifting Data Distribution in Online Recommendation
Systems", UAI 2022, with the baselines that the paper compares with.

Recommenders here are stacks of N models of one shape: each parameter has a leading dimension N, so the gradients of
many models on many domains are one backward pass. A domain's index t counts from 1 in the comments, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = dict[str, Tensor]
"""Name -> (N, ...): N models of one shape."""
MODELS = ("lr", "fm", "deepfm")
TABLES = ("linear", "embedding")
"""Parameters with one row a level: (N, rows) and (N, rows, size)."""
SPARSE_ROWS = 100_000
"""Levels from which the generator's embedding has sparse gradients."""


# ---- recommenders ----------------------------------------------------------------------------------------------------


def recommender_shapes(
    model: str, levels: Sequence[int], size: int, hidden: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of one model's parameters, without the leading N.

    Args:
        model: lr (logistic regression), fm or deepfm. levels: of each field. size: of an embedding. hidden: widths of
            DeepFM's perceptron.

    Raises:
        ValueError: an unknown model, or a size below one.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}, expected one of {', '.join(MODELS)}")
    if size < 1 or min(levels, default=0) < 1 or min(hidden, default=1) < 1:
        raise ValueError("expected at least one field, and levels, embeddings and layers of at least 1")
    rows = sum(levels)
    out: dict[str, tuple[int, ...]] = {"bias": (), "linear": (rows,)}
    if model != "lr":
        out["embedding"] = (rows, size)
    if model == "deepfm":
        widths = [len(levels) * size, *hidden, 1]
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            out[f"weight{i}"] = (n_in, n_out)
            out[f"shift{i}"] = (1, n_out)
    return out


def init_recommender(
    model: str,
    levels: Sequence[int],
    size: int,
    hidden: Sequence[int],
    generator: torch.Generator,
    count: int = 1,
) -> Parameters:
    """``count`` models: zero biases and linear weights, normal embeddings (0.1), normal layers (Glorot's variance)."""
    out = {}
    for name, shape in recommender_shapes(model, levels, size, hidden).items():
        if name == "embedding" or name.startswith("weight"):
            scale = 0.1 if name == "embedding" else (2 / sum(shape)) ** 0.5
            out[name] = scale * torch.randn(count, *shape, generator=generator)
        else:
            out[name] = torch.zeros(count, *shape)
    return out


def logits(parameters: Parameters, ids: Tensor) -> Tensor:
    """Logits (N, B) of N models on their own examples: ids (N, B, F) number rows of the fused tables."""
    n, rows = parameters["linear"].shape
    flat = ids.flatten() if n == 1 else (ids + rows * torch.arange(n, device=ids.device)[:, None, None]).flatten()
    out = parameters["linear"].reshape(-1).index_select(0, flat).view(ids.shape).sum(2)
    out = out + parameters["bias"][:, None]
    if "embedding" not in parameters:
        return out  # logistic regression
    table = parameters["embedding"]
    v = F.embedding(flat, table.reshape(n * rows, -1)).view(*ids.shape, table.shape[2])
    out = out + 0.5 * (v.sum(2).square() - v.square().sum(2)).sum(2)  # FM: pairs of fields
    layers = sum(name.startswith("weight") for name in parameters)
    if not layers:
        return out
    x = v.flatten(2)
    for i in range(layers):
        x = torch.baddbmm(parameters[f"shift{i}"], x, parameters[f"weight{i}"])
        if i < layers - 1:
            x = x.relu()
    return out + x[..., 0]  # DeepFM: the logits are added


def losses(parameters: Parameters, ids: Tensor, labels: Tensor) -> Tensor:
    """r(theta) (N,): mean log loss of each model on its own examples, ids (N, B, F) and labels (N, B)."""
    return F.binary_cross_entropy_with_logits(logits(parameters, ids), labels, reduction="none").mean(1)


def flatten(parameters: Parameters) -> Tensor:
    """(N, P)."""
    return torch.cat([value.reshape(len(value), -1) for value in parameters.values()], 1)


def unflatten(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> Parameters:
    """The inverse of ``flatten``: (N, P) -> parameters of these ``recommender_shapes``."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()], 1)
    return {name: part.reshape(len(flat), *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def repeat(parameters: Parameters, times: int) -> Parameters:
    """Each model ``times`` times in a row: (N * times, ...)."""
    return {name: value.repeat_interleave(times, 0) for name, value in parameters.items()}


def touched(parameters: Parameters, ids: Tensor) -> tuple[Parameters, Tensor]:
    """The models with the rows that ``ids`` name alone, and the ids renumbered: elsewhere gradients are zero."""
    rows, local = ids.unique(return_inverse=True)
    small = {name: value.index_select(1, rows) if name in TABLES else value for name, value in parameters.items()}
    return small, local


def gradients(parameters: Parameters, ids: Tensor, labels: Tensor) -> Tensor:
    """(N, P): the gradient of each model on its own examples, flattened; no ``grad`` is touched."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(losses(leaves, ids, labels).sum(), list(leaves.values()))
    return torch.cat([g.reshape(len(g), -1) for g in found], 1)


def domain_gradients(parameters: Parameters, ids: Tensor, labels: Tensor) -> Tensor:
    """(N, D, P'): gradients of N models on each of D domains, one backward pass, on the rows that are touched.

    All models read the same examples, so a row of the tables holds the values of all models side by side and the sums
    over fields are taken while it is read; the FM term needs sum v and sum v^2 alone.

    Args:
        parameters: N models. ids: (D, B, F). labels: (D, B).
    """
    small, local = touched(parameters, ids)
    (n, rows), (d, batch, _) = small["linear"].shape, ids.shape
    local = (local + rows * torch.arange(d, device=ids.device)[:, None, None]).flatten(0, 1)
    leaves = {}
    for name, value in small.items():
        if name in TABLES:  # (D, rows, N, ...)
            leaves[name] = value.detach().transpose(0, 1).expand(d, rows, n, *value.shape[2:]).contiguous()
        else:  # (D, N, ...)
            leaves[name] = value.detach().expand(d, *value.shape).contiguous()
        leaves[name].requires_grad_()
    with torch.enable_grad():
        columns = [leaves["linear"].view(d * rows, n)]
        if "embedding" in leaves:
            table = leaves["embedding"].view(d * rows, n, -1)
            columns += [0.5 * table.square().sum(2), table.flatten(1)]
        sums = F.embedding_bag(local, torch.cat(columns, 1), mode="sum").view(d, batch, -1)
        out = sums[..., :n] + leaves["bias"][:, None]
        if "embedding" in leaves:
            v_sum = sums[..., 2 * n :].reshape(d, batch, n, -1)
            out = out + 0.5 * v_sum.square().sum(3) - sums[..., n : 2 * n]
        layers = sum(name.startswith("weight") for name in leaves)
        if layers:
            x = F.embedding(local, table.flatten(1)).view(d, batch, ids.shape[2], n, -1)
            x = x.permute(0, 3, 1, 2, 4).reshape(d * n, batch, -1)
            for i in range(layers):
                x = torch.baddbmm(leaves[f"shift{i}"].flatten(0, 1), x, leaves[f"weight{i}"].flatten(0, 1))
                if i < layers - 1:
                    x = x.relu()
            out = out + x.view(d, n, batch).transpose(1, 2)
        y = labels[..., None].expand_as(out)
        loss = F.binary_cross_entropy_with_logits(out, y, reduction="sum") / batch
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    parts = [(g.permute(2, 0, 1, *range(3, g.dim())) if k in TABLES else g.transpose(0, 1)) for k, g in found.items()]
    return torch.cat([part.reshape(n, d, -1) for part in parts], 2)


def weighted_loss(parameters: Parameters, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """sum_i stop_grad(a_i) r_{t-1-i}(theta) of one model: its gradient is m(theta; phi, t).

    Args:
        ids: (b, B, F) mini-batches of the last b domains, oldest first. labels: (b, B). weights: a (b,).
    """
    out = logits(parameters, ids.flatten(0, 1)[None]).view(labels.shape)
    each = F.binary_cross_entropy_with_logits(out, labels, reduction="none").mean(1)
    return (weights.detach() * each).sum()


# ---- the meta future-gradient generator ------------------------------------------------------------------------------


Summary = tuple[Tensor, Tensor, Tensor]


def summarise(ids: Tensor, rows: int) -> Summary:
    """Distinct levels of each domain and field of a mini-batch, where each bag begins, and the levels' shares.

    Args:
        ids: (b, B, F). rows: of the generator's embedding.
    """
    b, batch, fields = ids.shape
    bag = torch.arange(b * fields, device=ids.device).view(b, 1, fields)
    pairs, counts = (bag * rows + ids).unique(return_counts=True)
    return pairs % rows, torch.searchsorted(pairs, bag.flatten() * rows), counts / batch


class MFGG(nn.Module):
    """a_phi(D_{t-b}, ..., D_{t-1}): weights of the gradients on the last b domains, oldest first.

    Args:
        levels: of each field. domains: b. size: of its own embeddings. width: d2 of the attention. hidden: of the MLP.
        softmax: keep the weights in the simplex.

    Raises:
        ValueError: a size below one.
    """

    def __init__(
        self,
        levels: Sequence[int],
        domains: int,
        size: int = 8,
        width: int = 16,
        hidden: int = 32,
        softmax: bool = True,
    ):
        super().__init__()
        if min(domains, size, width, hidden) < 1:
            raise ValueError("expected domains, size, width and hidden of at least 1")
        self.embedding = nn.Embedding(sum(levels), size, sparse=sum(levels) >= SPARSE_ROWS)
        d1 = len(levels) * size
        self.attention = nn.Linear(d1, 3 * width, bias=False)  # queries, keys and values
        self.mlp = nn.Sequential(nn.Linear(domains * width, hidden), nn.ReLU(), nn.Linear(hidden, domains))
        self.softmax, self.domains = softmax, domains

    def forward(self, ids: Tensor | None, summary: Summary | None = None) -> Tensor:
        """Ids (..., b, B, F) -> a (..., b); or, from the ``summary`` of a mini-batch, the same a (b,) for less work."""
        table = self.embedding
        if summary is not None:
            levels, offsets, shares = summary
            e = F.embedding_bag(
                levels, table.weight, offsets, mode="sum", per_sample_weights=shares, sparse=table.sparse
            )
            return self.combine(e.view(self.domains, -1))
        assert ids is not None
        *lead, batch, _ = ids.shape
        bags = ids.transpose(-1, -2).reshape(-1, batch)  # e_j: mean in place of the paper's sum over examples
        e = F.embedding_bag(bags, table.weight, mode="mean", sparse=table.sparse)
        return self.combine(e.view(*lead, self.attention.in_features))

    def combine(self, e: Tensor) -> Tensor:
        """Domain features e (..., b, d1) -> a (..., b)."""
        q, k, v = self.attention(e).chunk(3, -1)
        z = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        scores = self.mlp(z.flatten(-2))
        return scores.softmax(-1) if self.softmax else scores


def smooth(a: Tensor, window: int) -> Tensor:
    """Weights of m_bar = (m + sum_{i=1}^{w-1} grad r_{t-i}) / w from those of m; a (..., b), oldest first, w - 1 <= b.

    w = 1 gives a; w = b and the oldest domain alone give 1/b: Batch Update.

    Raises:
        ValueError: the window does not fit.
    """
    b = a.shape[-1]
    if not 1 <= window <= b + 1:
        raise ValueError(f"smoothing window is {window}, expected from 1 to b + 1 = {b + 1}")
    recent = torch.arange(b, device=a.device) > b - window
    return (a + recent.to(a.dtype)) / window


def gram(past: Tensor, future: Tensor, normalise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """K = G G^T, c = G g and ||g||^2; each divided by ||g||^2 where ``normalise``.

    Args:
        past: (M, b, P) gradients on the last b domains. future: (M, P) gradient on the domain after them.
    """
    k = past @ past.transpose(1, 2)
    c = (past @ future[..., None])[..., 0]
    square = future.square().sum(-1)
    if normalise:
        scale = square.clamp_min(1e-12)
        return k / scale[:, None, None], c / scale[:, None], square / scale
    return k, c, square


def forecast_error(a: Tensor, k: Tensor, c: Tensor, square: Tensor) -> Tensor:
    """||sum_i a_i g_i - g||^2 = a^T K a - 2 a^T c + ||g||^2; a (..., b), k (..., b, b), c (..., b)."""
    ka = (k @ a[..., None])[..., 0]
    return (a * (ka - 2 * c)).sum(-1) + square


# ---- theory: the linear generator and the local regret ---------------------------------------------------------------


def linear_slope(a: Tensor, k: Tensor, c: Tensor, square: Tensor) -> Tensor:
    """dh/da_i = 2 <g - g_i, sum_j a_j (g - g_j)> for a in the simplex (appendix, Algorithm 1); (b,)."""
    ka, ac = k @ a, a @ c
    return 2 * (square * a.sum() - ac - c * a.sum() + ka)


def exponentiated_gradient(a: Tensor, slope: Tensor, eta: float) -> Tensor:
    """The linear generator's step (appendix, Algorithm 1): a o exp(-eta dh), normalised; a and slope (b,)."""
    return (a.clamp_min(1e-30).log() - eta * slope).softmax(-1)


def linear_rate(domains: int, rounds: int, bound: float, scale: float = 1.0) -> float:
    """eta_phi = c sqrt(log b / (T M^4)) with M^2 = ``bound`` a bound of ||grad||^2."""
    return scale * math.sqrt(math.log(domains) / rounds) / max(bound, 1e-12)


def descend(
    parameters: Parameters, ids: Tensor, labels: Tensor, weights: Tensor, step: float, delta: float, limit: int
) -> tuple[Parameters, float, int]:
    """The generic version: theta <- theta - step m_bar(theta) until ||m_bar|| <= delta.

    (The appendix prints m in the step and m_bar in the stopping rule; m_bar is meant in both.)

    Args:
        parameters: one model. ids: (b, B, F). labels: (b, B). weights: of m_bar (b,). limit: most steps.

    Returns:
        the parameters, the last ||m_bar||, and the steps taken.
    """
    used = weights.nonzero()[:, 0]
    ids, labels, weights = ids[used], labels[used], weights[used]
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    values = list(leaves.values())
    norm, steps = math.inf, 0
    for steps in range(limit + 1):
        found = torch.autograd.grad(weighted_loss(leaves, ids, labels, weights), values)
        norm = math.sqrt(sum(float(g.square().sum()) for g in found))
        if norm <= delta or steps == limit:
            break
        with torch.no_grad():
            torch._foreach_add_(values, found, alpha=-step)
    return {name: value.detach() for name, value in leaves.items()}, norm, steps


# ---- baseline: ASMG --------------------------------------------------------------------------------------------------


class MetaGenerator(nn.Module):
    """ASMG's sequential meta generator: recurrent cells read b models and write b models, all scalars in parallel.

    As released, each scalar of a dense layer has a cell of its own, and all rows of a table share one cell a column,
    with a state each; no bias but at the output.

    Args:
        shapes: of the parameters (``recommender_shapes``). hidden: state of a scalar.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], hidden: int = 4):
        super().__init__()
        self.shapes, self.hidden = dict(shapes), hidden
        rows = shapes["linear"][0]
        columns = sum(math.prod(shape) // rows for name, shape in shapes.items() if name in TABLES)
        scalars = sum(math.prod(shape) for name, shape in shapes.items() if name not in TABLES)
        self.sizes = {"tables": (rows, columns), "dense": (1, scalars)}
        for kind, (_, cells) in self.sizes.items():
            self.register_parameter(f"{kind}_input", uniform(math.sqrt(6 / (1 + hidden)), 3, hidden, 1, cells))
            self.register_parameter(f"{kind}_recurrent", uniform(math.sqrt(3 / hidden), 3, hidden, hidden, 1, cells))
            self.register_parameter(f"{kind}_output", uniform(math.sqrt(6 / (1 + hidden)), hidden, 1, cells))
            self.register_parameter(f"{kind}_shift", nn.Parameter(torch.zeros(cells)))

    def start(self) -> dict[str, Tensor]:
        """Zero states: (hidden, rows, columns) of the tables and (hidden, 1, scalars) of the dense parameters."""
        device = self.dense_shift.device
        return {kind: torch.zeros(self.hidden, *size, device=device) for kind, size in self.sizes.items()}

    def pack(self, models: Parameters) -> dict[str, Tensor]:
        """b models -> tables (b, rows, columns) and dense (b, 1, scalars)."""
        b, rows = models["linear"].shape
        tables = [value.reshape(b, rows, -1) for name, value in models.items() if name in TABLES]
        dense = [value.reshape(b, 1, -1) for name, value in models.items() if name not in TABLES]
        return {"tables": torch.cat(tables, 2), "dense": torch.cat(dense, 2)}

    def unpack(self, tables: Tensor, dense: Tensor) -> Parameters:
        """The inverse of ``pack``."""
        out, b, at = {}, len(tables), {"tables": 0, "dense": 0}
        for name, shape in self.shapes.items():
            kind, value = ("tables", tables) if name in TABLES else ("dense", dense)
            width = math.prod(shape) // self.sizes[kind][0]
            part = value[..., at[kind] : at[kind] + width]
            out[name] = part.reshape(b, part.shape[1], *shape[1:]) if name in TABLES else part.reshape(b, *shape)
            at[kind] += width
        return out

    def forward(self, models: Parameters, states: dict[str, Tensor]) -> tuple[Parameters, dict[str, Tensor]]:
        """Generate.

        Args:
            models: b models, oldest first; some rows of the tables suffice, each has a state of its own.
            states: to begin with, of the same rows.

        Returns:
            b generated models, the last of which serves, and the states behind the first of the b: a window that is one
            later begins with them.
        """
        made, kept = {}, {}
        for kind, values in self.pack(models).items():
            w_in, w_h, w_out, shift = (
                getattr(self, f"{kind}_{part}") for part in ("input", "recurrent", "output", "shift")
            )
            h, out = states[kind], []
            for i, value in enumerate(values):  # over the b models of the window
                x = value * w_in  # (3, hidden, rows, cells)
                update, reset = (x[:2] + (w_h[:2] * h).sum(2)).sigmoid()
                new = (x[2] + (w_h[2] * (reset * h)).sum(1)).tanh()
                h = (1 - update) * h + update * new
                if i == 0:
                    kept[kind] = h.detach()
                out.append((w_out * h).sum(0) + shift)
            made[kind] = torch.stack(out)
        return self.unpack(made["tables"], made["dense"]), kept


def uniform(limit: float, *shape: int) -> nn.Parameter:
    """Uniform in [-limit, limit]."""
    return nn.Parameter(torch.empty(*shape).uniform_(-limit, limit))


def recency(count: int) -> Tensor:
    """ASMG's weights of the b losses, linear in recency: (1, ..., b) / sum."""
    weight = torch.arange(1.0, count + 1)
    return weight / weight.sum()


# ---- baseline: SPMF --------------------------------------------------------------------------------------------------


def rank_weights(scores: Tensor) -> Tensor:
    """exp(rank / N), ranks from 0 by falling score: the positive that the model likes least weighs most; (N,)."""
    rank = torch.empty_like(scores)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores), device=scores.device).to(rank)
    return (rank / len(scores)).exp()


def draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` positions without replacement with chances in proportion to ``weights`` (N,), any N.

    Raises:
        ValueError: more than there are.
    """
    if count > len(weights):
        raise ValueError(f"cannot draw {count} of {len(weights)} without replacement")
    waits = torch.empty(len(weights)).exponential_(generator=generator) / weights.cpu()  # the first to arrive
    return waits.topk(count, largest=False).indices


def reservoir_update(reservoir: Tensor, new: Tensor, seen: int, generator: torch.Generator) -> Tensor:
    """A full reservoir takes new example n with probability R / (seen + n + 1); random old ones make room.

    Args:
        reservoir: (R,) rows. new: (M,) rows that arrive. seen: rows of the class that arrived before.
    """
    chance = len(reservoir) / (seen + torch.arange(len(new)) + 1.0)
    taken = new[torch.rand(len(new), generator=generator) < chance][: len(reservoir)]
    left = torch.randperm(len(reservoir), generator=generator)[: len(reservoir) - len(taken)]
    return torch.cat([reservoir[left], taken])


def spmf_rows(
    pools: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    weights: Tensor,
    strategy: int,
    ratio: float,
    generator: torch.Generator,
) -> Tensor:
    """Rows that SPMF trains on: positives drawn by rank, negatives uniformly, from separate reservoirs.

    Args:
        pools, new: rows of the negatives and of the positives. ratio: of strategy 2.
        weights: ``rank_weights`` of the positives to draw from: pool and new ones (strategy 1), or the pool (2).
        strategy: 1: as many as new ones, from pool and new together; 2: the new ones and ``ratio`` as many of the pool.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in (1, 2):
        raise ValueError(f"strategy is {strategy}, expected 1 or 2")
    out = [] if strategy == 1 else list(new)
    for label in (0, 1):
        source = torch.cat([pools[label], new[label]]) if strategy == 1 else pools[label]
        count = len(new[label]) if strategy == 1 else min(len(source), int(ratio * len(new[label])))
        chances = weights if label else torch.ones(len(source))
        out.append(source[draw(chances, count, generator)])
    return torch.cat(out)
