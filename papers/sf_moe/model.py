"""Sparse mixture-of-experts layers in vision transformers: GMoE, the earlier SF-MoE, and their dense baselines.

Li et al., "Sparse Mixture-of-Experts are Domain Generalizable Learners", ICLR 2023 (GMoE); its first version, arXiv
2206.04046v1, is "Sparse Fusion Mixture-of-Experts are Domain Generalizable Learners" (SF-MoE).

* ``route``/``admit``/``dispatch``: top-k choice, capacity, and tokens sorted by expert, one product for each
  expert's block of rows (one kernel for all on a GPU). No tensor is larger than (tokens, experts) or (tokens, width).
* ``SparseMoE``: the layer of GMoE: cosine router, noise, importance and load losses, batch-prioritised capacity.
* ``GroupMoE``: the layer of SF-MoE: two experts a token, the second at random, capacity image by image.
* ``VisionTransformer``: DeiT with dense or sparse blocks; ``load_dense`` starts experts as copies of a trained block.
* ``SmallCNN``, ``make_resnet``: convolutional baselines. ``ExpertRegressor``: the networks of the synthetic study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_SCALE = math.log(100.0)
"""Bound on the logarithm of the cosine router's scale."""


# ---- routing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routes:
    """Which experts a token goes to.

    Attributes:
        expert: (T, k) int64, in order of preference. gate: (T, k) weights of their outputs. probability: (T, N) without
            noise. noisy: (T, N) the probabilities that the choice was made from. logits: (T, N) with noise.
        keep: (T, k) bool, whether the expert had room, or None when all had.
    """

    expert: Tensor
    gate: Tensor
    probability: Tensor
    noisy: Tensor
    logits: Tensor
    keep: Tensor | None = None


def cosine_logits(u: Tensor, experts: Tensor, log_scale: Tensor) -> Tensor:
    """Scaled cosine similarity of projected tokens and expert embeddings.

    Args:
        u: (T, m) projected tokens. experts: (m, N). log_scale: (), bounded by ln 100.

    Returns:
        (T, N) logits.
    """
    scale = log_scale.clamp(max=MAX_SCALE).exp()
    return scale * F.normalize(u, dim=1) @ F.normalize(experts, dim=0)


def route(logits: Tensor, top_k: int, noise: float = 0.0) -> Routes:
    """Choose experts by noisy probabilities.

    Args:
        logits: (T, N). top_k: experts of a token. noise: standard deviation of what is added to the logits.

    Returns:
        gates are the noisy probabilities; renormalised to sum 1 only with more than one expert, since with one the
        router would get no gradient.
    """
    noisy_logits = logits + noise * torch.randn_like(logits) if noise else logits
    noisy = noisy_logits.softmax(1)
    gate, expert = noisy.topk(top_k, dim=1)
    if top_k > 1:
        gate = gate / gate.sum(1, keepdim=True).clamp_min(1e-9)
    probability = logits.softmax(1) if noise else noisy
    return Routes(expert, gate, probability, noisy, noisy_logits)


def capacity_of(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Tokens that an expert takes in GMoE: k int(factor ceil(T / N))."""
    return top_k * int(factor * -(-tokens // experts))


def admit(queue: Tensor, queues: int, capacity: int, priority: Tensor | None = None) -> Tensor:
    """Which choices find room, every queue taking the first ``capacity`` of those that ask for it.

    All first choices stand before all second choices; within a choice, tokens stand in order of priority.

    Args:
        queue: (T, k) number of the queue asked for; ``queues`` for a choice that asks for none.
        queues: how many. capacity: of each. priority: (T,) the highest first; None: in order of position.

    Returns:
        (T, k) bool.
    """
    tokens, k = queue.shape
    order = torch.arange(tokens, device=queue.device)
    if priority is not None:
        order = priority.argsort(descending=True, stable=True)
    asked = queue[order].T.reshape(-1)  # (k T,) first choices, then second choices
    by_queue = asked.argsort(stable=True)
    start = torch.searchsorted(asked[by_queue], asked[by_queue])  # where the queue of each begins
    place = torch.empty_like(asked).index_copy_(0, by_queue, torch.arange(len(asked), device=queue.device) - start)
    room = ((place < capacity) & (asked < queues)).view(k, tokens).T
    return torch.empty_like(room).index_copy_(0, order, room)


def coefficient_of_variation(x: Tensor) -> Tensor:
    """Squared coefficient of variation of a vector, by the unbiased variance."""
    return x.var() / (x.mean() ** 2 + 1e-10)


def importance_loss(probability: Tensor) -> Tensor:
    """CV^2 of the experts' summed probabilities (T, N); 0 for a single expert."""
    if probability.shape[1] == 1:
        return probability.new_zeros(())
    return coefficient_of_variation(probability.sum(0))


def load_loss(probability: Tensor, threshold: Tensor, noise: float) -> Tensor:
    """CV^2 of the experts' expected loads: how probable it is that new noise lifts each over the last one chosen.

    Args:
        probability: (T, N) without noise. threshold: (T,) the k-th chosen entry. noise: standard deviation.

    Raises:
        ValueError: no noise: the load is then a step function without gradient.
    """
    if noise <= 0:
        raise ValueError(f"the load loss needs gate noise, got a standard deviation of {noise}")
    if probability.shape[1] == 1:
        return probability.new_zeros(())
    load = torch.special.ndtr((probability - threshold[:, None]) / noise).sum(0)
    return coefficient_of_variation(load)


def balance_loss(routes: Routes, noise: float, tutel_threshold: bool = False) -> Tensor:
    """(L_importance + L_load) / 2.

    Args:
        routes: of the batch. noise: standard deviation of the logits' noise.
        tutel_threshold: take the load's threshold from the noisy logits, as the released code does (it is compared
            with probabilities), and not from the noisy probabilities.
    """
    source = routes.logits if tutel_threshold else routes.noisy
    threshold = source.gather(1, routes.expert[:, -1:])[:, 0]
    return (importance_loss(routes.probability) + load_loss(routes.probability, threshold, noise)) / 2


# ---- experts ---------------------------------------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Rows times the matrix of their group, plus its bias.

    Args:
        x: (R, d) rows sorted by group. weight: (N, m, d). bias: (N, m) or None. counts: (N,) rows of each group.

    Returns:
        (R, m).
    """
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    fits = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])  # strides that the kernel takes
    if x.is_cuda and fits and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and len(x):
        y = _GroupedProduct.apply(x, weight, counts.cumsum(0).to(torch.int32))
        if bias is None:
            return y
        group = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=len(x))
        return torch.addmm(y, F.one_hot(group, len(counts)).to(x.dtype), bias)  # a thin product, and so its gradient
    return _Blocks.apply(x, weight, bias, counts.tolist())


class _GroupedProduct(torch.autograd.Function):
    """One kernel for all groups, ``grouped_mm``, whose gradient may lie in memory in any way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = F.grouped_mm(gradient, weight, offs=ends) if ctx.needs_input_grad[0] else None
        to_weight = F.grouped_mm(gradient.mT, x.contiguous(), offs=ends) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None


class _Blocks(torch.autograd.Function):
    """One product for each group's block of rows, written to where it belongs: on a CPU the fastest form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(len(x), weight.shape[1])
        blocks = zip(x.split(counts), weight, y.split(counts), strict=True)
        for i, (rows, matrix, out) in enumerate(blocks):
            if bias is None:
                torch.mm(rows, matrix.T, out=out)
            else:
                torch.addmm(bias[i], rows, matrix.T, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        parts = gradient.split(ctx.counts)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(x)
            for part, matrix, out in zip(parts, weight, to_x.split(ctx.counts), strict=True):
                torch.mm(part, matrix, out=out)
        if ctx.needs_input_grad[1]:
            to_weight = torch.empty_like(weight)
            for part, rows, out in zip(parts, x.split(ctx.counts), to_weight, strict=True):
                torch.mm(part.T, rows, out=out)
        if ctx.needs_input_grad[2]:
            to_bias = torch.stack([part.sum(0) for part in parts])
        return to_x, to_weight, to_bias, None


class _Gather(torch.autograd.Function):
    """Rows of a table, whose gradient is gathered too: ``back`` says where each row of the table went, -1 nowhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.everywhere = len(index) == back.numel()
        return x[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        if not ctx.everywhere:  # a last row of zeros for what went nowhere
            gradient = torch.cat((gradient, gradient.new_zeros(1, gradient.shape[1])))
        if back.shape[1] == 1:
            return gradient[back[:, 0]], None, None
        return gradient[back].sum(1), None, None


class Experts(nn.Module):
    """N two-layer networks with weights side by side: E_i(x) = W2_i drop(act(W1_i x + b1_i)) + b2_i.

    Args:
        experts: how many. width: of the input. hidden: of the middle. out: of the output.
        activation: between. dropout: after it. bias: whether there are b1 and b2.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        out: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        out = out or width
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(experts, out, hidden))
        self.b1 = nn.Parameter(torch.zeros(experts, hidden)) if bias else None
        self.b2 = nn.Parameter(torch.zeros(experts, out)) if bias else None
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=0.02)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(R, width) sorted by expert, (N,) rows of each -> (R, out)."""
        h = self.activation(grouped_linear(rows, self.w1, self.b1, counts))
        return grouped_linear(self.dropout(h), self.w2, self.b2, counts)

    @torch.no_grad()
    def copy_from(self, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
        """Make every expert a copy of one two-layer network, weights as those of ``nn.Linear``."""
        for mine, other in zip((self.w1, self.b1, self.w2, self.b2), (w1, b1, w2, b2), strict=True):
            if mine is not None and other is not None:
                mine.copy_(other.expand_as(mine))


def dispatch(x: Tensor, routes: Routes, experts: Experts) -> Tensor:
    """Each token's gated sum of its experts' outputs; an expert that had no room gives 0.

    The choices are sorted by expert, so that every expert sees its tokens as one block.

    Args:
        x: (T, d).

    Returns:
        (T, out).
    """
    tokens, k = routes.expert.shape
    n = len(experts.w1)
    choice = routes.expert if routes.keep is None else routes.expert.masked_fill(~routes.keep, n)
    group, order = choice.reshape(-1).sort(stable=True)
    counts = torch.bincount(group, minlength=n + 1)[:n]
    if routes.keep is not None:
        kept = int(counts.sum())
        order = order[:kept]
    slot = torch.full((tokens * k,), -1, dtype=torch.int64, device=x.device)
    slot[order] = torch.arange(len(order), device=x.device)
    slot = slot.view(tokens, k)
    y = experts(_Gather.apply(x, order // k if k > 1 else order, slot), counts)
    y = y * routes.gate.reshape(-1)[order, None].to(y.dtype)
    if k == 1 and routes.keep is None:
        return _Gather.apply(y, slot[:, 0], order[:, None])
    out = y.new_zeros(tokens, y.shape[1])
    return out.index_add(0, order // k, y)


# ---- the layer of GMoE -----------------------------------------------------------------------------------------------


class CosineRouter(nn.Module):
    """logit_i = exp(min(tau, ln 100)) cos(W x + b, S_i), in single precision.

    Args:
        width: of tokens. experts: N. dim: of the space where angles are taken.
    """

    def __init__(self, width: int, experts: int, dim: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.embedding = nn.Parameter(torch.randn(dim, experts) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor([math.log(2.0)]))  # temperature 0.5
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, width) -> (T, N)."""
        with torch.autocast(x.device.type, enabled=False):
            return cosine_logits(self.project(x.float()), self.embedding, self.log_scale)


class LinearRouter(nn.Module):
    """logit = W x, in single precision."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        nn.init.trunc_normal_(self.gate.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(T, width) -> (T, N)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.gate(x.float())


class SparseMoE(nn.Module):
    """The sparse layer of GMoE over all tokens of a batch.

    After a forward pass in training, ``balance`` is the balance loss; ``chosen`` (T, k) always says which experts.

    Args:
        width, hidden, out: of the experts. experts: N. top_k: experts of a token.
        router: "cosine" or "linear". router_dim: of the space where angles are taken.
        capacity_factor: in training; None: no expert is ever full.
        eval_capacity_factor: the same in evaluation, where a limit makes outputs depend on the rest of the batch.
        gate_noise: the logits' noise has the standard deviation gate_noise / N, in training only.
        load: whether the balance loss has the load's part; otherwise it is the importance loss.
        tutel_threshold: see ``balance_loss``. name: for messages.

    Raises:
        ValueError: more experts for a token than there are, no room, or a load loss without noise.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int = 6,
        top_k: int = 1,
        *,
        out: int | None = None,
        router: str = "cosine",
        router_dim: int = 256,
        capacity_factor: float | None = 1.5,
        eval_capacity_factor: float | None = None,
        gate_noise: float = 1.0,
        load: bool = True,
        tutel_threshold: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        dropout: float = 0.1,
        name: str = "sparse layer",
    ) -> None:
        super().__init__()
        check_routing(experts, top_k, capacity_factor, eval_capacity_factor)
        if router not in ("cosine", "linear"):
            raise ValueError(f"no router {router!r}, expected cosine or linear")
        if gate_noise < 0 or (load and gate_noise == 0 and experts > 1):
            raise ValueError(f"gate_noise is {gate_noise}: the load loss is a probability under noise, expected > 0")
        self.experts = Experts(experts, width, hidden, out, activation, dropout)
        cosine = router == "cosine"
        self.router = CosineRouter(width, experts, router_dim) if cosine else LinearRouter(width, experts)
        self.top_k, self.load, self.tutel_threshold, self.name = top_k, load, tutel_threshold, name
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.noise = gate_noise / experts
        self.balance: Tensor | None = None
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., out).

        Raises:
            FloatingPointError: a logit of the router is NaN or infinite; says in which layer.
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        if not bool(torch.isfinite(logits.detach().sum())):
            raise FloatingPointError(f"{self.name}: a logit of the router is not finite; try a lower learning rate")
        n = logits.shape[1]
        noise = self.noise if self.training and n > 1 else 0.0
        routes = route(logits, self.top_k, noise)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            capacity = capacity_of(len(tokens), n, self.top_k, factor)
            keep = admit(routes.expert, n, capacity, routes.noisy.detach().amax(1))  # batch-prioritised routing
            routes = Routes(*(getattr(routes, f) for f in ("expert", "gate", "probability", "noisy", "logits")), keep)
        self.chosen = routes.expert.detach()
        self.balance = self._balance(routes, noise) if self.training else None
        return dispatch(tokens, routes, self.experts).view(*x.shape[:-1], -1)

    def _balance(self, routes: Routes, noise: float) -> Tensor:
        if routes.probability.shape[1] == 1:
            return routes.probability.new_zeros(())  # one expert has no variance
        if self.load:
            return balance_loss(routes, noise, self.tutel_threshold)
        return importance_loss(routes.probability)


def check_routing(experts: int, top_k: int, *factors: float | None) -> None:
    """Refuse sizes that no router can have.

    Raises:
        ValueError: names both numbers.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k} of {experts} experts, expected from 1 to {experts}")
    for factor in factors:
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"a capacity factor of {factor} leaves no room, expected a positive one or none at all")


# ---- the layer of SF-MoE ---------------------------------------------------------------------------------------------


def group_capacity(tokens: int, experts: int, factor: float) -> int:
    """Tokens of one image that an expert takes in SF-MoE: max(4, int(n factor / N)), at most n before the maximum."""
    return max(4, min(tokens, int(tokens * factor / experts)))


def gshard_loss(probability: Tensor, first: Tensor) -> Tensor:
    """N^2 mean over images and experts of mean_t p times the share of first choices.

    Args:
        probability: (B, n, N). first: (B, n) the best expert of each token.
    """
    n = probability.shape[2]
    share = F.one_hot(first, n).to(probability.dtype).mean(1)
    return n * n * (probability.mean(1) * share).mean()


class GroupMoE(nn.Module):
    """The sparse layer of SF-MoE: two experts without biases, capacity and balance image by image.

    Args:
        width: of tokens; the experts' middle is four times as wide. experts: N.
        capacity_factor, eval_capacity_factor: in training and evaluation.
        random_eval: keep second experts at random in evaluation too, as the released code does; otherwise those whose
            weight is above ``second_threshold``.
    """

    second_threshold = 0.2

    def __init__(
        self,
        width: int,
        experts: int = 4,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        random_eval: bool = False,
        name: str = "sparse layer",
    ) -> None:
        super().__init__()
        check_routing(experts, min(2, experts), capacity_factor, eval_capacity_factor)
        if experts < 2:
            raise ValueError(f"SF-MoE chooses two experts, got {experts}")
        self.experts = Experts(experts, width, 4 * width, bias=False)
        for weight in (self.experts.w1, self.experts.w2):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)  # 1 / sqrt(outputs)
        self.gate = nn.Parameter(torch.randn(width, experts))
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.random_eval, self.name = random_eval, name
        self.balance: Tensor | None = None
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, width) -> the same."""
        images, tokens, width = x.shape
        n = self.gate.shape[1]
        logits = x.reshape(-1, width).float() @ self.gate
        if not bool(torch.isfinite(logits.detach().sum())):
            raise FloatingPointError(f"{self.name}: a logit of the router is not finite; try a lower learning rate")
        routes = route(logits, 2)
        second = routes.gate[:, 1].detach()
        if self.training or self.random_eval:
            wanted = torch.rand_like(second) < second / self.second_threshold
        else:
            wanted = second > self.second_threshold
        image = torch.arange(images, device=x.device).repeat_interleave(tokens)[:, None]
        queue = image * n + routes.expert
        queue = torch.stack((queue[:, 0], queue[:, 1].masked_fill(~wanted, images * n)), 1)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        keep = admit(queue, images * n, group_capacity(tokens, n, factor))
        self.chosen = routes.expert.detach()
        probability = routes.probability.view(images, tokens, n)
        self.balance = gshard_loss(probability, routes.expert[:, 0].view(images, tokens)) if self.training else None
        routes = Routes(routes.expert, routes.gate, routes.probability, routes.noisy, routes.logits, keep)
        return dispatch(x.reshape(-1, width), routes, self.experts).view_as(x)


# ---- the vision transformer ------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """The dense feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, width) -> the same."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """x + DP(MHA(LN(x))), then x + DP(FFN or MoE(LN(x))); DP drops the branch of an image in training."""

    def __init__(self, width: int, heads: int, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp, self.drop_path = Attention(width, heads), mlp, drop_path

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * (torch.rand(len(x), 1, 1, device=x.device, dtype=x.dtype) < keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, width) -> the same."""
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, patches, width)."""
        return self.proj(x).flatten(2).transpose(1, 2)


def parse_layers(text: str, depth: int) -> list[int]:
    """Numbers of the sparse blocks.

    Args:
        text: "last-two" (the last two even blocks: 8 and 10 of 12), "every-two" (1, 3, 5, ...), "alternate" (those of
            SF-MoE: 5 and 11 of 12), or a letter a block: F for dense, S for sparse.
        depth: blocks.

    Raises:
        ValueError: other letters, or not as many as blocks.
    """
    last = (depth - 1) // 2 * 2
    named = {
        "last-two": [i for i in (last - 2, last) if i >= 0],
        "every-two": list(range(1, depth, 2)),
        "alternate": sorted({depth // 2 - 1, depth - 1} - {-1}),
    }
    if text in named:
        return named[text]
    if len(text) != depth or set(text) - set("SF"):
        raise ValueError(
            f"moe_layers is {text!r}, expected {', '.join(named)}, or {depth} letters F (dense) and S (sparse)"
        )
    return [i for i, letter in enumerate(text) if letter == "S"]


class VisionTransformer(nn.Module):
    """DeiT with some feed-forward layers sparse; parameters of dense parts are called as in timm.

    Args:
        image, patch, channels, classes: of the problem. width, depth, heads, mlp_ratio: of the network.
        drop_path: of the last block; it grows linearly from 0.
        sparse: number of a block -> the layer in place of its feed-forward one.
        distilled: a second special token and head; logits are the mean of both heads'.

    Raises:
        ValueError: sizes that do not divide, or a sparse block that is not there.
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 1000,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: int = 4,
        drop_path: float = 0.1,
        sparse: Mapping[int, nn.Module] | None = None,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        if image % patch:
            raise ValueError(f"an image of side {image} does not divide into patches of side {patch}")
        sparse = dict(sparse or {})
        if any(not 0 <= i < depth for i in sparse):
            raise ValueError(f"sparse blocks {sorted(sparse)} of a network with {depth} blocks")
        self.image, self.width, self.distilled = image, width, distilled
        self.patch_embed = PatchEmbed(channels, patch, width)
        tokens = (image // patch) ** 2 + 1 + distilled
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(width, heads, sparse[i] if i in sparse else Mlp(width, mlp_ratio * width), rates[i])
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.head_dist = nn.Linear(width, classes) if distilled else None
        kept = {id(m) for layer in sparse.values() for m in layer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module) not in kept:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for tensor in (self.cls_token, self.dist_token, self.pos_embed):
            if tensor is not None:
                nn.init.trunc_normal_(tensor, std=0.02)

    @property
    def features_width(self) -> int:
        """Width of ``features``."""
        return self.width

    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, n, width), normalised tokens after the last block."""
        if tuple(x.shape[2:]) != (self.image, self.image):
            raise ValueError(f"images of {tuple(x.shape[2:])}, expected sides of {self.image}")
        x = self.patch_embed(x)
        special = [t for t in (self.cls_token, self.dist_token) if t is not None]
        x = torch.cat([t.expand(len(x), -1, -1) for t in special] + [x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width): the class token, and with a second token the mean of both."""
        tokens = self.tokens(x)
        return tokens[:, :2].mean(1) if self.distilled else tokens[:, 0]

    def classify(self, z: Tensor) -> Tensor:
        """Features -> logits; only for one head, where logits are a function of ``features``."""
        return self.head(z)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        tokens = self.tokens(x)
        logits = self.head(tokens[:, 0])
        return logits if self.head_dist is None else (logits + self.head_dist(tokens[:, 1])) / 2


def sparse_layers(net: nn.Module) -> list[SparseMoE | GroupMoE]:
    """The sparse layers of a network, in order."""
    return [m for m in net.modules() if isinstance(m, SparseMoE | GroupMoE)]


def total_balance(net: nn.Module) -> Tensor | None:
    """Sum of the layers' balance losses in the last training pass; None without any."""
    losses = [m.balance for m in sparse_layers(net) if m.balance is not None]
    return torch.stack(losses).sum() if losses else None


def gmoe(
    moe_layers: str = "last-two",
    *,
    experts: int = 6,
    top_k: int = 1,
    router: str = "cosine",
    router_dim: int = 256,
    capacity_factor: float | None = 1.5,
    eval_capacity_factor: float | None = None,
    gate_noise: float = 1.0,
    tutel_threshold: bool = False,
    dropout: float = 0.1,
    width: int = 384,
    depth: int = 12,
    mlp_ratio: int = 4,
    **sizes: Any,
) -> VisionTransformer:
    """GMoE; by default GMoE-S/16 with 6 experts in blocks 8 and 10. For arguments see the classes."""
    layers: dict[int, nn.Module] = {
        i: SparseMoE(
            width,
            mlp_ratio * width,
            experts,
            top_k,
            router=router,
            router_dim=router_dim,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            gate_noise=gate_noise,
            tutel_threshold=tutel_threshold,
            dropout=dropout,
            name=f"block {i}",
        )
        for i in parse_layers(moe_layers, depth)
    }
    return VisionTransformer(width=width, depth=depth, mlp_ratio=mlp_ratio, sparse=layers, **sizes)


def sf_moe(
    moe_layers: str = "alternate",
    *,
    experts: int = 4,
    random_eval: bool = False,
    width: int = 384,
    depth: int = 12,
    **sizes: Any,
) -> VisionTransformer:
    """SF-MoE of the paper's first version: distilled DeiT with 4 experts in blocks 5 and 11."""
    layers: dict[int, nn.Module] = {
        i: GroupMoE(width, experts, random_eval=random_eval, name=f"block {i}") for i in parse_layers(moe_layers, depth)
    }
    return VisionTransformer(width=width, depth=depth, sparse=layers, distilled=True, **sizes)


def load_dense(net: VisionTransformer, state: Mapping[str, Tensor]) -> None:
    """Start from a trained dense network: every expert of GMoE becomes a copy of its block's feed-forward layer.

    SF-MoE's experts, which have no biases, and heads of other sizes keep their own start. A state of the same sparse
    network is taken as it is.

    Args:
        state: names as in timm; also ``{"model": state}`` as DeiT's files have it.

    Raises:
        ValueError: a weight is missing or has another shape: names block and sizes.
    """
    state = state.get("model", state)  # type: ignore[assignment]
    own = dict(net.state_dict())
    taken: dict[str, Tensor] = {}
    for i, block in enumerate(net.blocks):
        if isinstance(block.mlp, Mlp):
            continue
        prefix = f"blocks.{i}.mlp."
        sparse = f"{prefix}experts.w1"
        inside = [name for name in own if name.startswith(prefix)]
        if sparse in state:
            if state[sparse].shape != own[sparse].shape:
                raise ValueError(
                    f"block {i} has experts {tuple(own[sparse].shape)} (experts, hidden, width), "
                    f"the weights have {tuple(state[sparse].shape)}"
                )
            missing = [name for name in inside if name not in state]
            if missing:
                raise ValueError(f"block {i}: the weights lack {missing[0]}")
            taken |= {name: state[name] for name in inside}
            continue
        if isinstance(block.mlp, GroupMoE):
            taken |= {name: own[name] for name in inside}
            continue
        names = [f"{prefix}{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"block {i} is sparse and the weights lack {missing[0]}, which its experts start from")
        hidden, width = own[sparse].shape[1:]
        if state[names[0]].shape != (hidden, width):
            raise ValueError(
                f"block {i} has experts of {hidden} x {width}, the weights {tuple(state[names[0]].shape)} in {names[0]}"
            )
        block.mlp.experts.copy_from(*(state[name] for name in names))
        taken |= {name: value for name, value in net.state_dict().items() if name in inside}
    for name, value in own.items():
        if name in taken:
            continue
        given = state.get(name)
        if given is None and name.startswith(("head", "dist_token")):
            given = value
        if given is not None and name.startswith("head") and given.shape != value.shape:
            given = value
        if given is not None and name == "pos_embed" and net.distilled and given.shape[1] + 1 == value.shape[1]:
            given = torch.cat((given[:, :1], value[:, 1:2], given[:, 1:]), 1)  # a network without the second token
        if given is None or given.shape != value.shape:
            found = "none" if given is None else str(tuple(given.shape))
            raise ValueError(f"weights of {name}: expected {tuple(value.shape)}, found {found}")
        taken[name] = given
    net.load_state_dict(taken)


def active_macs(net: VisionTransformer) -> int:
    """Multiplications and additions of one image in evaluation; of a sparse layer those of the chosen experts.

    Products only: norms, activations and the sorting of tokens are left out, as usual.
    """
    n, d = net.pos_embed.shape[1:]
    special = 2 if net.distilled else 1
    total = (n - special) * net.patch_embed.proj.weight.numel()
    total += sum(head.weight.numel() for head in (net.head, net.head_dist) if head is not None)
    for block in net.blocks:
        total += 4 * n * d * d + 2 * n * n * d
        layer = block.mlp
        if isinstance(layer, Mlp):
            total += n * (layer.fc1.weight.numel() + layer.fc2.weight.numel())
            continue
        experts = layer.experts
        k = layer.top_k if isinstance(layer, SparseMoE) else 2
        total += n * k * (experts.w1[0].numel() + experts.w2[0].numel())
        if isinstance(layer, GroupMoE):
            total += n * layer.gate.numel()
        elif isinstance(layer.router, CosineRouter):
            total += n * (layer.router.project.weight.numel() + layer.router.embedding.numel())
        else:
            total += n * layer.router.gate.weight.numel()
    return total


# ---- convolutional baselines -----------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """Three convolutions with group norm, and the mean over positions.

    Args:
        channels, classes: of the problem. width: of the last convolution.
    """

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        sizes = (channels, width // 2, width, width)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.ReLU())
                for a, b, stride in zip(sizes, sizes[1:], (1, 2, 2))
            )
        )
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        return self.body(x).mean((2, 3))

    def classify(self, z: Tensor) -> Tensor:
        """Features -> logits."""
        return self.head(z)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.head(self.features(x))


class ResNet(nn.Module):
    """torchvision's ResNet as DomainBed fine-tunes it: batch norms keep their statistics.

    Args:
        depth: 50 or 101. classes: of the head. weights: name of torchvision's weights or None.
    """

    def __init__(self, depth: int, classes: int, weights: str | None = None) -> None:
        super().__init__()
        from torchvision import models

        if depth not in (18, 50, 101):
            raise ValueError(f"no ResNet of depth {depth} here, expected 18, 50 or 101")
        self.trunk = getattr(models, f"resnet{depth}")(weights=weights)
        width = self.trunk.fc.in_features
        self.trunk.fc = nn.Identity()
        self.head = nn.Linear(width, classes)

    def train(self, mode: bool = True) -> ResNet:
        """As usual, but batch norms stay in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width)."""
        return self.trunk(x)

    def classify(self, z: Tensor) -> Tensor:
        """Features -> logits."""
        return self.head(z)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return self.head(self.features(x))


# ---- the synthetic study ---------------------------------------------------------------------------------------------


class ExpertRegressor(nn.Module):
    """Networks of the study of conditional statements: one network of ReLUs, or N that start as copies of one.

    Args:
        inputs, hidden, outputs: widths. experts: N; 1 without a router is the dense network. router: "cosine" or
            "linear". gate_noise: see ``SparseMoE``.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        experts: int = 1,
        router: str = "cosine",
        router_dim: int = 256,
        gate_noise: float = 1.0,
    ) -> None:
        super().__init__()
        first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.sparse = experts > 1
        if not self.sparse:
            self.net: nn.Module = nn.Sequential(first, nn.ReLU(), second)
            return
        layer = SparseMoE(
            inputs,
            hidden,
            experts,
            out=outputs,
            router=router,
            router_dim=router_dim,
            capacity_factor=None,
            gate_noise=gate_noise,
            load=False,
            activation=F.relu,
            dropout=0.0,
        )
        layer.experts.copy_from(first.weight, first.bias, second.weight, second.bias)
        self.net = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        return self.net(x)


def purity(expert: Tensor, attribute: Tensor, experts: int, attributes: int) -> tuple[float, Tensor]:
    """How far experts hold whole attributes.

    Args:
        expert: (T,) who a sample went to. attribute: (T,) what it shows.

    Returns:
        share of samples whose attribute is their expert's most frequent one; (experts, attributes) counts.
    """
    table = torch.bincount(expert * attributes + attribute, minlength=experts * attributes).view(experts, attributes)
    return float(table.amax(1).sum() / table.sum()), table


def usage(chosen: Sequence[Tensor], experts: int) -> Tensor:
    """(N,) share of first choices that each expert got; ``chosen`` are (T, k) of several batches."""
    first = torch.cat([c[:, 0] for c in chosen])
    return torch.bincount(first, minlength=experts).double() / max(len(first), 1)
