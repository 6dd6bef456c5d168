"""GMoE and SF-MoE: sparse layers beside the dense one of equal active size, and beside straightforward dispatch.

The straightforward forms give the same outputs: tokens scattered by one-hot tensors (tokens, experts, capacity), as the
first version does it; padded to capacity with ranks by cumulative sums over one-hot choices; a loop over experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.sf_moe import model
from tools.bench import Workload

SMALL: dict[str, Any] = {
    "image": 16,
    "patch": 4,
    "channels": 1,
    "classes": 10,
    "width": 64,
    "depth": 4,
    "heads": 4,
}


# ---- straightforward forms


def one_hot_dispatch(x: Tensor, routes: model.Routes, experts: model.Experts) -> Tensor:
    """Dispatch and combine by (T, N, C) tensors."""
    n, k = len(experts.w1), routes.expert.shape[1]
    keep = torch.ones_like(routes.expert, dtype=torch.bool) if routes.keep is None else routes.keep
    queue = F.one_hot(routes.expert.T.reshape(-1), n) * keep.T.reshape(-1, 1)  # (k T, N)
    place = ((queue.cumsum(0) - 1) * queue).sum(1)
    room = int(queue.sum(0).max())
    slots = F.one_hot(place.clamp_min(0), room).to(x.dtype)
    combine = queue[:, :, None].to(x.dtype) * slots[:, None]
    combine = (combine * routes.gate.T.reshape(-1, 1, 1)).view(k, len(x), n, room).sum(0)
    inputs = torch.einsum("td,tnc->ncd", x, (combine > 0).to(x.dtype))
    return torch.einsum("tnc,ncd->td", combine, padded_experts(inputs, experts))


def padded_experts(inputs: Tensor, experts: model.Experts) -> Tensor:
    """(N, C, d) -> the same, with all of the padding."""
    h = inputs @ experts.w1.mT
    h = experts.dropout(experts.activation(h if experts.b1 is None else h + experts.b1[:, None]))
    y = h @ experts.w2.mT
    return y if experts.b2 is None else y + experts.b2[:, None]


def padded_dispatch(x: Tensor, routes: model.Routes, experts: model.Experts) -> Tensor:
    """Places by cumulative sums over one-hot choices, experts padded to the capacity of 1.5 equal shares."""
    n = len(experts.w1)
    choice = routes.expert[:, 0]
    place = (F.one_hot(choice, n).cumsum(0) - 1).gather(1, routes.expert[:, :1])[:, 0]
    room = max(int(place.max()) + 1, model.capacity_of(len(x), n, 1, 1.5))
    slot = choice * room + place
    inputs = x.new_zeros(n * room, x.shape[1]).index_copy(0, slot, x).view(n, room, -1)
    return padded_experts(inputs, experts).flatten(0, 1)[slot] * routes.gate


# ---- workloads


def both_passes(net: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], Any]:
    """Forward and backward."""
    x = x.requires_grad_()
    direction = torch.randn_like(x)

    def step() -> None:
        x.grad = None
        for p in parameters:
            p.grad = None
        net(x).backward(direction)

    return step


def tokens(count: int, width: int) -> Tensor:
    """Random tokens."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def layer(count: int, width: int, experts: int, form: str) -> Callable[[], Any]:
    """Router, balance loss and experts, or the dense layer; capacity off, so that no token is left out."""
    torch.manual_seed(0)
    if form == "dense":
        dense = model.Mlp(width, 4 * width)
        return both_passes(dense, tokens(count, width), list(dense.parameters()))
    sparse = model.SparseMoE(width, 4 * width, experts, dropout=0.0, capacity_factor=None)
    nn.init.normal_(sparse.router.embedding)  # type: ignore[arg-type]

    def forward(x: Tensor) -> Tensor:
        y = sparse(x)
        assert sparse.balance is not None
        return y + 0.0 * sparse.balance

    return both_passes(forward, tokens(count, width), list(sparse.parameters()))


def dispatching(count: int, width: int, experts: int, form: str) -> Callable[[], Any]:
    """Dispatch alone, with choices that are about balanced."""
    torch.manual_seed(0)
    body = model.Experts(experts, width, 4 * width)
    routes = model.route(torch.randn(count, experts), 1)
    how = {"ours": model.dispatch, "one-hot": one_hot_dispatch, "padded": padded_dispatch}[form]
    return both_passes(lambda x: how(x, routes, body), tokens(count, width), list(body.parameters()))


def group_layer(form: str) -> Callable[[], Any]:
    """SF-MoE's layer on 8 images of 198 tokens; one-hot: (images, tokens, experts, capacity) tensors."""
    torch.manual_seed(0)
    net = model.GroupMoE(384, 4)
    if form == "ours":
        return both_passes(net, tokens(8 * 198, 384).view(8, 198, 384), list(net.parameters()))

    def forward(x: Tensor) -> Tensor:
        b, n, d = x.shape
        routes = model.route(x.reshape(-1, d) @ net.gate, 2)
        room = model.group_capacity(n, 4, 1.25)
        first, second = (F.one_hot(routes.expert[:, j], 4).view(b, n, 4) for j in (0, 1))
        second = second * (torch.rand(b, n, 1) < routes.gate[:, 1].view(b, n, 1) / 0.2)
        place = (first.cumsum(1) - 1) * first
        first = first * (place < room)
        later = (second.cumsum(1) - 1 + first.sum(1, keepdim=True)) * second
        second = second * (later < room)
        gate = routes.gate.view(b, n, 2)
        combine = x.new_zeros(b, n, 4, room)
        for chosen, where, g in ((first, place, gate[..., :1]), (second, later, gate[..., 1:])):
            slot = F.one_hot((where * chosen).sum(2).clamp(0, room - 1), room)
            combine = combine + (g * chosen)[..., None] * slot[:, :, None]
        inputs = torch.einsum("bnd,bnec->ebcd", x, (combine > 0).to(x.dtype)).flatten(1, 2)
        out = padded_experts(inputs, net.experts).view(4, b, room, d)
        return torch.einsum("ebcd,bnec->bnd", out, combine)

    return both_passes(forward, tokens(8 * 198, 384).view(8, 198, 384), list(net.parameters()))


def training(name: str) -> Callable[[], Any]:
    """One step of Adam on 96 images of 16 x 16."""
    torch.manual_seed(0)
    net = model.VisionTransformer(**SMALL) if name == "vit" else model.gmoe("FSFS", **SMALL)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    x, y = torch.randn(96, 1, 16, 16), torch.arange(96) % 10

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        balance = model.total_balance(net)
        (loss if balance is None else loss + 0.01 * balance).backward()
        optimizer.step()

    return step


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    for count, experts in ((1576, 6), (1576, 12), (6304, 6)):
        yield Workload(
            f"sparse layer of {experts} experts, {count} tokens of width 384, both passes",
            bind(layer, count, 384, experts, "ours"),
            bind(layer, count, 384, experts, "dense"),
            "the dense layer of equal active size, at most 1.3 times faster",
            target=1 / 1.3,
        )
    yield Workload(
        "dispatch to 6 experts, 1576 tokens of width 384, both passes",
        bind(dispatching, 1576, 384, 6, "ours"),
        bind(dispatching, 1576, 384, 6, "one-hot"),
        "(tokens, experts, capacity) tensors",
        target=2.0,
    )
    yield Workload(
        "dispatch to 6 experts, 3264 tokens of width 64, both passes",
        bind(dispatching, 3264, 64, 6, "ours"),
        bind(dispatching, 3264, 64, 6, "one-hot"),
        "(tokens, experts, capacity) tensors",
        target=2.0,
    )
    yield Workload(
        "dispatch to 6 experts, 1632 tokens of width 64, both passes, beside padding",
        bind(dispatching, 1632, 64, 6, "ours"),
        bind(dispatching, 1632, 64, 6, "padded"),
        "padded to the capacity",
        target=1.2,
    )
    yield Workload(
        "SF-MoE's layer, 8 images of 198 tokens of width 384, both passes",
        bind(group_layer, "ours"),
        bind(group_layer, "one-hot"),
        "(images, tokens, experts, capacity) tensors",
        target=1.3,
    )
    yield Workload(
        "small GMoE, training step, 96 images",
        bind(training, "gmoe"),
        bind(training, "vit"),
        "the dense transformer of equal active size",
    )
