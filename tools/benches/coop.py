"""Workloads of prompt learning, each beside the way of the official code.

The official way: whole prompts of 77 positions, put together with a loop over classes where the name stands in the
middle or in front, through a plain text tower; the image tower runs at every step; the probe fits all of its
classifiers anew.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.coop import model
from tools.bench import Workload

NAMES = [f"class {i}" for i in range(10)]
BATCH = 32
MINI = model.Sizes(64, (1,), 64, 8, 1, resolution=32, text_width=128, text_layers=3, text_heads=4)
"""A text tower of three layers, 128 wide, and a ViT of one layer on 32 pixels."""


@cache
def clip_of(name: str) -> model.CLIP:
    """A CLIP with random weights."""
    torch.manual_seed(0)
    sizes = MINI if name == "mini" else model.BACKBONES[name]
    return sizes.build().freeze()


@cache
def tokenizer() -> model.Tokenizer:
    """CLIP's vocabulary."""
    return model.Tokenizer()


def pictures(clip: model.CLIP) -> tuple[Tensor, Tensor]:
    """A batch of noise and labels."""
    generator = torch.Generator().manual_seed(0)
    side = clip.resolution
    pixels = torch.randint(256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(len(NAMES), (BATCH,), generator=generator)


# ---- the official way ------------------------------------------------------------------------------------------------


class WholePrompts(nn.Module):
    """Prompts of the whole context, put together class by class, through every position of every layer."""

    def __init__(self, clip: model.CLIP, names: list[str], context: int, position: str) -> None:
        super().__init__()
        self.clip, self.position = clip, position
        words = tokenizer()
        texts = [" ".join(["X"] * context) + f" {name}." for name in names]
        ids = words.tokenize(texts, clip.text.context)
        embedding = clip.text.token_embedding(ids).detach()
        self.ctx = nn.Parameter(0.02 * torch.randn(context, clip.text.width))
        self.lengths = [len(words.encode(name)) for name in names]
        self.register_buffer("start", embedding[:, :1])
        self.register_buffer("rest", embedding[:, 1 + context :])
        self.register_buffer("last", ids.argmax(1))
        layer = nn.TransformerEncoderLayer
        length = clip.text.context
        self.register_buffer("mask", torch.full((length, length), -math.inf).triu(1))
        self.blocks = nn.ModuleList()
        for block in clip.text.transformer.resblocks:
            peer = layer(clip.text.width, block.attn.heads, 4 * clip.text.width, 0.0, quick_gelu, norm_first=True)
            state = {
                "self_attn.in_proj_weight": block.attn.in_proj_weight,
                "self_attn.in_proj_bias": block.attn.in_proj_bias,
                "self_attn.out_proj.weight": block.attn.out_proj.weight,
                "self_attn.out_proj.bias": block.attn.out_proj.bias,
                **{f"linear1.{k}": v for k, v in block.mlp.c_fc.state_dict().items()},
                **{f"linear2.{k}": v for k, v in block.mlp.c_proj.state_dict().items()},
                **{f"norm1.{k}": v for k, v in block.ln_1.state_dict().items()},
                **{f"norm2.{k}": v for k, v in block.ln_2.state_dict().items()},
            }
            peer.load_state_dict(state)
            self.blocks.append(peer.requires_grad_(False))

    def prompts(self) -> Tensor:
        """(C, 77, D)."""
        count = len(self.rest)
        if self.position == "end":
            return torch.cat([self.start, self.ctx.expand(count, -1, -1), self.rest], 1)
        half = len(self.ctx) // 2 if self.position == "middle" else 0
        rows = []
        for c, length in enumerate(self.lengths):
            parts = [self.start[c], self.ctx[:half], self.rest[c, :length], self.ctx[half:], self.rest[c, length:]]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, C), the image tower run anew."""
        images = self.clip.encode_image(pixels)
        x = (self.prompts() + self.clip.text.positional_embedding).transpose(0, 1)
        for block in self.blocks:
            x = block(x, src_mask=self.mask)
        x = self.clip.text.ln_final(x.transpose(0, 1))
        texts = x[torch.arange(len(x)), self.last] @ self.clip.text.text_projection
        return self.clip.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def step_of(net: nn.Module, ctx: nn.Parameter, inputs: Tensor, labels: Tensor) -> Callable[[], Any]:
    """Forward, cross entropy, backward to the context, SGD."""
    optimizer = torch.optim.SGD([ctx], lr=0.002, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

    return step


def our_step(name: str, context: int, position: str, cached: bool) -> Callable[[], Any]:
    """Prompts with a shared front; image features at hand, or the image tower run anew as random crops need it."""
    clip = clip_of(name)
    learner = model.PromptLearner(clip.text, tokenizer(), NAMES, context, position)
    coop = model.CoOp(clip, learner)
    pixels, labels = pictures(clip)
    if cached:
        return step_of(coop, learner.ctx, clip.encode_image(pixels), labels)

    class Whole(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return coop(clip.encode_image(pixels))

    return step_of(Whole(), learner.ctx, pixels, labels)


def official_step(name: str, context: int, position: str) -> Callable[[], Any]:
    """Whole prompts, image tower at every step."""
    clip = clip_of(name)
    net = WholePrompts(clip, NAMES, context, position)
    return step_of(net, net.ctx, *pictures(clip))


# ---- text features of many classes -----------------------------------------------------------------------------------


def our_classes(count: int) -> Callable[[], Any]:
    """Text features of many classes and the gradient of the context."""
    clip = clip_of("mini")
    learner = model.PromptLearner(clip.text, tokenizer(), [f"class {i}" for i in range(count)], 16)
    coop = model.CoOp(clip, learner)
    return lambda: torch.autograd.grad(coop.text_features().sin().sum(), learner.ctx)


def plain_classes(count: int) -> Callable[[], Any]:
    """The same with every prompt computed whole, up to the longest."""
    clip = clip_of("mini")
    learner = model.PromptLearner(clip.text, tokenizer(), [f"class {i}" for i in range(count)], 16)

    def run() -> Any:
        features = F.normalize(clip.text.encode(learner.prompts(), learner.last), dim=-1)
        return torch.autograd.grad(features.sin().sum(), learner.ctx)

    return run


# ---- the probe -------------------------------------------------------------------------------------------------------


@cache
def samples(classes: int, features: int, shots: int) -> tuple[Tensor, ...]:
    """Training and validation samples around a centre a class."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, features, generator=generator)
    y, y_val = torch.arange(classes).repeat(shots), torch.arange(classes).repeat(min(shots, 4))
    x, x_val = (centres[labels] + 2 * torch.randn(len(labels), features, generator=generator) for labels in (y, y_val))
    return x, y, x_val, y_val


def our_probe(*sizes: int) -> Callable[[], Any]:
    """The search without repetitions, in the space of the samples."""
    return lambda: model.linear_probe(*samples(*sizes))


def official_probe(*sizes: int) -> Callable[[], Any]:
    """Seven values, then two fits in each of eight steps, on all features."""
    from sklearn.linear_model import LogisticRegression

    x, y, x_val, y_val = (part.numpy() for part in samples(*sizes))

    def fit(log_c: float) -> float:
        net = LogisticRegression(C=10**log_c, max_iter=1000).fit(x, y)
        return float((net.predict(x_val) == y_val).mean())

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peak = max((6, 4, 2, 0, -2, -4, -6), key=fit)
            left, right = peak - 1.0, peak + 1.0
            for _ in range(8):
                if fit(left) < fit(right):
                    left = (left + right) / 2
                else:
                    right = (left + right) / 2

    return run


def workloads() -> Iterator[Workload]:
    """Ours beside the official way."""
    whole = "whole prompts, image tower at every step"
    for context, position in ((16, "end"), (16, "middle"), (16, "front"), (4, "end")):
        yield Workload(
            f"mini CLIP, 10 classes, M={context}, {position}: step, image features at hand",
            lambda context=context, position=position: our_step("mini", context, position, True),
            lambda context=context, position=position: official_step("mini", context, position),
            whole,
            target=2.0,
        )
    yield Workload(
        "mini CLIP, 10 classes, M=16, end: step with the image tower",
        lambda: our_step("mini", 16, "end", False),
        lambda: official_step("mini", 16, "end"),
        whole,
        target=2.0,
    )
    yield Workload(
        "mini CLIP, 200 classes, M=16, end: text features and gradient",
        lambda: our_classes(200),
        lambda: plain_classes(200),
        "the front of every prompt computed anew",
        target=1.5,
    )
    yield Workload(
        "linear probe, 6 classes x 24 features, 4 shots: whole search",
        lambda: our_probe(6, 24, 4),
        lambda: official_probe(6, 24, 4),
        "every classifier fitted anew",
        target=1.2,
    )
    yield Workload(
        "linear probe, 16 classes x 1,280 features, 4 shots: whole search",
        lambda: our_probe(16, 1280, 4),
        lambda: official_probe(16, 1280, 4),
        "every classifier fitted anew",
        target=2.0,
    )
    yield Workload(
        "ViT-B/32, 32 pictures, 10 classes, M=16, end: step, image features at hand",
        lambda: our_step("ViT-B/32", 16, "end", True),
        lambda: official_step("ViT-B/32", 16, "end"),
        whole,
        target=2.0,
    )
    yield Workload(
        "ViT-B/32, 32 pictures, 10 classes, M=16, end: step with the image tower",
        lambda: our_step("ViT-B/32", 16, "end", False),
        lambda: official_step("ViT-B/32", 16, "end"),
        whole,
    )
