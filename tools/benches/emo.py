"""EMO: inference, training steps and their parts beside the straightforward forms, and latency beside networks of timm.

The straightforward form has the same weights and gives the same values: maps as (B, C, H, W), layer norm by two
permuted copies, copies into windows before and after all of the attention and the expansion, separate products around a
softmax, windows padded in full, batch norms left where they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.emo import data, model
from tools.bench import Workload

NANO = {
    "depths": (1, 2, 3, 2),
    "stem_dim": 16,
    "embed_dims": (24, 32, 48, 64),
    "exp_ratios": (2.0, 2.5, 3.0, 3.5),
    "dim_heads": (8, 16, 16, 16),
    "window_sizes": (7, 7, 4, 4),
    "num_classes": 10,
}
"""The small network at 64 pixels whose windows are larger than the maps of its last stages."""
PEERS = {
    "emo_1m": ("edgenext_xx_small", "mobilevit_xxs", "mobilenetv3_small_100"),
    "emo_2m": ("edgenext_x_small", "mobilevit_xs", "mobilenetv3_large_075"),
    "emo_5m": ("edgenext_small", "mobilevit_s", "mobilenetv3_large_100"),
}


# ---- the straightforward forms


class PlainNorm(model.LayerNorm2d):
    """Layer norm by two permuted copies."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1).contiguous())
        return y.permute(0, 3, 1, 2).contiguous()


class PlainPointwise(model.Pointwise):
    """1 x 1 convolution as a convolution."""

    forward = nn.Conv2d.forward  # type: ignore[assignment]  # under another name of the argument


class PlainBlock(model.IRMB):
    """Attention in full windows: copies before and after, expansion inside, softmax between two products."""

    def attend(self, x: Tensor, expanded: Tensor | None = None) -> Tensor:
        b, c, h, w = x.shape
        below, right = model.padding(h, w, self.window_size)
        x = F.pad(x, (0, right, 0, below))
        side = self.window_size or max(h, w)
        n1, n2 = x.shape[2] // side, x.shape[3] // side
        x = x.view(b, c, side, n1, side, n2).permute(0, 3, 5, 1, 2, 4).reshape(-1, c, side, side)
        qk = self.qk(x).view(-1, 2, self.heads, c // self.heads, side * side).permute(1, 0, 2, 4, 3).contiguous()
        scores = (qk[0] @ qk[1].transpose(-2, -1)) * (c // self.heads) ** -0.5
        values = x.view(-1, self.heads, c // self.heads, side * side).transpose(-2, -1).contiguous()
        mixed = (scores.softmax(-1) @ values).transpose(-2, -1).reshape(-1, c, side, side)
        y = self.v(mixed)
        y = y.view(b, n1, n2, -1, side, side).permute(0, 3, 4, 1, 5, 2).reshape(b, -1, side * n1, side * n2)
        return y[:, :, :h, :w].contiguous()


class PlainNet(model.EMO):
    """EMO on maps as they are."""

    def forward_features(self, x: Tensor) -> Tensor:
        for name in model.STAGES:
            x = getattr(self, name)(x)
        return self.norm(x)


def plain(net: nn.Module) -> nn.Module:
    """A copy of a network or block in the straightforward form."""
    net = copy.deepcopy(net)
    forms = {
        model.LayerNorm2d: PlainNorm,
        model.Pointwise: PlainPointwise,
        model.IRMB: PlainBlock,
        model.EMO: PlainNet,
    }
    for module in net.modules():
        module.__class__ = forms.get(type(module), type(module))
    return net


# ---- workloads


@functools.cache
def network(name: str) -> model.EMO:
    """A network with the same weights for every row."""
    torch.manual_seed(0)
    return model.EMO(**NANO) if name == "nano" else model.build("both", name, 1000)  # type: ignore[arg-type,return-value]


def images(batch: int, side: int) -> Tensor:
    """Random images."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def logits(net: nn.Module, x: Tensor, compiled: bool) -> Callable[[], Any]:
    """Forward without gradients."""
    net = torch.compile(net) if compiled else net  # type: ignore[assignment]

    def step() -> Tensor:
        with torch.inference_mode():
            return net(x)

    return step


def inference(name: str, batch: int, form: str) -> Callable[[], Any]:
    """Logits of a batch: ours has its batch norms folded."""
    net = plain(network(name)).eval() if form == "plain" else model.fold_batchnorm(network(name))
    return logits(net, images(batch, 224), form == "compiled")


def peer(name: str, compiled: bool) -> Callable[[], Any]:
    """Logits of one image by a network as timm makes it, in channels-last memory, batch norms where they are."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in no stub
    return logits(net, images(1, 224).contiguous(memory_format=torch.channels_last), compiled)


def training(name: str, batch: int, side: int, form: str) -> Callable[[], Any]:
    """One optimiser step with smoothed labels."""
    net = (plain(network(name)) if form == "plain" else copy.deepcopy(network(name))).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=form == "ours")
    x = images(batch, side)
    y = torch.arange(batch) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
        optimizer.step()

    return step


def both_passes(net: nn.Module, x: Tensor, channels_last: bool) -> Callable[[], Any]:
    """Forward and backward."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout).requires_grad_()
    direction = torch.ones_like(net(x)).contiguous(memory_format=layout)

    def step() -> None:
        x.grad = None
        net.zero_grad()
        net(x).backward(direction)

    return step


def one_block(form: str) -> Callable[[], Any]:
    """A block of stage 3 of EMO-1M with attention."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"exp_ratio": 3.0, "norm_layer": "ln_2d", "act_layer": "gelu", "dw_ks": 5}
    net = model.IRMB(80, 80, dim_head=20, window_size=7, **sizes)
    return both_passes(net if form == "ours" else plain(net), torch.randn(16, 80, 14, 14), form == "ours")


def depthwise(form: str) -> Callable[[], Any]:
    """The 5 x 5 depth-wise convolution of that block."""
    net = nn.Conv2d(240, 240, 5, padding=2, groups=240, bias=False)
    return both_passes(net, torch.randn(16, 240, 14, 14), form == "ours")


def canvases(form: str) -> Callable[[], Any]:
    """Training canvases of 64 digits among clutter; "looped": one at a time."""
    digits = data.Digits(2, 1, 0)
    index, everything = torch.arange(64), torch.arange(64)
    if form == "ours":
        return lambda: digits.train(index, everything, 1)
    return lambda: [digits.train(index, part, 1) for part in everything.split(1)]


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    straightforward = "copies, separate products, batch norms unfolded"
    for batch in (8, 1):
        yield Workload(
            f"EMO-1M, inference, batch {batch}, 224 x 224",
            bind(inference, "emo_1m", batch, "ours"),
            bind(inference, "emo_1m", batch, "plain"),
            straightforward,
            target=1.3,
        )
    yield Workload(
        "EMO-1M, inference compiled, batch 8, 224 x 224",
        bind(inference, "emo_1m", 8, "compiled"),
        bind(inference, "emo_1m", 8, "plain"),
        straightforward,
        target=2.0,
    )
    yield Workload(
        "EMO-1M, training step, batch 8, 224 x 224",
        bind(training, "emo_1m", 8, 224, "ours"),
        bind(training, "emo_1m", 8, 224, "plain"),
        "copies, separate products",
        target=1.2,
    )
    yield Workload(
        "small network, windows larger than the map, training step, batch 64, 64 x 64",
        bind(training, "nano", 64, 64, "ours"),
        bind(training, "nano", 64, 64, "plain"),
        "windows padded in full",
        target=1.4,
    )
    yield Workload(
        "block of stage 3, 16 x 80 x 14 x 14, both passes",
        bind(one_block, "ours"),
        bind(one_block, "plain"),
        "copies, separate products",
        target=1.5,
    )
    yield Workload(
        "depth-wise 5 x 5 convolution, 16 x 240 x 14 x 14, both passes",
        bind(depthwise, "ours"),
        bind(depthwise, "plain"),
        "maps as (B, C, H, W)",
        target=1.3,
    )
    yield Workload(
        "64 canvases of digits among clutter",
        bind(canvases, "ours"),
        bind(canvases, "looped"),
        "one canvas at a time",
        target=2.0,
    )
    for variant, names in PEERS.items():
        for name in names:
            for compiled in (False, True):
                how = "compiled" if compiled else "eager"
                yield Workload(
                    f"{variant}, {how}, batch 1, 224 x 224, beside {name}",
                    bind(peer, variant, compiled),
                    bind(peer, name, compiled),
                    f"timm's {name}, {how}, another network",
                )
