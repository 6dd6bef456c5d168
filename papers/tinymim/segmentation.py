"""ADE20K with a TinyMIM backbone: ViT with relative positions and layer scale, UperNet heads, sliding test, mIoU.

The backbone is the released one (BEiT's and MAE's recipe for segmentation); UperNet's heads are those of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import STAR_FEATURES, Attention, Block, Size, VisionTransformer

TAPS = (4, 6, 8, 12)
"""Blocks (1-based) whose outputs feed UperNet."""


def relative_index(grid: int, extra: int = 1) -> Tensor:
    """Row of the bias table for each pair of tokens, (extra + grid^2, extra + grid^2).

    Pairs of patches share a row by their offset. Three more rows are for pairs with the class token (class to token,
    token to class, class to class), and with ``extra`` 2 three before them for the distillation token.
    """
    axis = torch.arange(grid)
    place = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None, :] + grid - 1
    index = torch.zeros((grid**2 + extra,) * 2, dtype=torch.long)
    index[extra:, extra:] = offset[0] * (2 * grid - 1) + offset[1]
    offsets = (2 * grid - 1) ** 2
    for token in reversed(range(extra)):  # the class token is written last: it decides where both meet
        first = offsets + 3 * (extra - 1 - token)
        index[token, :], index[:, token], index[token, token] = first, first + 1, first + 2
    return index


class RelativeAttention(Attention):
    """Attention with a learned bias by relative position."""

    def __init__(self, width: int, heads: int, grid: int, extra: int) -> None:
        super().__init__(width, heads)
        rows = (2 * grid - 1) ** 2 + 3 * extra
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("relative_position_index", relative_index(grid, extra), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return self.attend(*self.project(x), bias=bias.to(x.dtype))


class ScaledBlock(Block):
    """Block with relative positions and a learned scale of each branch (initially 1)."""

    def __init__(self, width: int, heads: int, grid: int, extra: int) -> None:
        super().__init__(width, heads)
        self.attn = RelativeAttention(width, heads, grid, extra)
        self.gamma_1 = nn.Parameter(torch.ones(width))
        self.gamma_2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class Backbone(VisionTransformer):
    """ViT that gives four maps of strides 4, 8, 16, 32 (for patches of 16).

    Args:
        size: ``tune_heads`` are its heads. image: side of a crop. drop_path: of the last block, rising linearly. star:
            TinyMIM*-T, with a distillation token, its extra layer, and maps of ``channels``.
    """

    def __init__(
        self, size: Size, image: int = 512, patch: int = 16, drop_path: float = 0.1, star: bool = False,
        channels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(size._replace(heads=size.tune_heads), image, patch, distillation_token=star)
        del self.norm
        self.pos_embed.requires_grad_(True)
        for i, block in enumerate(self.blocks):
            block.drop_path.rate = drop_path * i / max(1, size.depth - 1)
        d = size.width
        if not star:
            self.channels = d
            self.fpn1 = nn.Sequential(_up(d, d), nn.BatchNorm2d(d), nn.GELU(), _up(d, d))
            self.fpn2 = nn.Sequential(_up(d, d))
            self.fpn3: nn.Module = nn.Identity()
            self.fpn4: nn.Module = nn.MaxPool2d(2, 2)
        else:
            self.channels = c = channels or 4 * d
            self.conv1x1 = nn.Sequential(nn.LayerNorm(d, eps=1e-6), nn.Linear(d, STAR_FEATURES), nn.GELU())
            self.fpn1 = nn.Sequential(_up(d, 2 * d), nn.BatchNorm2d(2 * d), nn.GELU(), _up(2 * d, c))
            self.fpn2 = nn.Sequential(_up(d, c))
            self.fpn3 = nn.Conv2d(d, c, 1)
            self.fpn4 = nn.Sequential(nn.Conv2d(STAR_FEATURES, c, 3, stride=2, padding=1))
        self.star = star

    def _block(self, size: Size, heads: int, drop_path: float) -> Block:
        return ScaledBlock(size.width, heads, self.grid, self.extra)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:  # type: ignore[override]
        """Four maps (B, C, S / 4, S / 4) ... (B, C, S / 32, S / 32)."""
        x = self.embed(images, keep)
        maps = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in TAPS:
                tap = self.conv1x1(x) if self.star and number == TAPS[-1] else x
                maps.append(tap[:, self.extra :].transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        return [fpn(m) for fpn, m in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps, strict=True)]


def _up(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 2, 2)


class Segmenter(nn.Module):
    """Backbone, UperNet head and auxiliary FCN head (on the third map).

    Args:
        channels: width of the head. classes: number of classes.
    """

    def __init__(self, backbone: Backbone, channels: int = 768, classes: int = 150, dropout: float = 0.1) -> None:
        super().__init__()
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        config = UperNetConfig(
            hidden_size=channels,
            pool_scales=[1, 2, 3, 6],
            auxiliary_channels=256,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
            auxiliary_in_channels=backbone.channels,
            num_labels=classes,
        )
        maps = [backbone.channels] * 4
        self.backbone = backbone
        self.decode_head = UperNetHead(config, maps)
        self.auxiliary_head = UperNetFCNHead(config, maps)
        for head in (self.decode_head, self.auxiliary_head):  # the official heads drop channels before the classifier
            head.classifier = nn.Sequential(nn.Dropout2d(dropout), head.classifier)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Logits (B, classes, S, S); with ``labels`` (B, S, S) the terms of the loss instead."""
        maps = self.backbone(images)
        if labels is None:
            return _resized(self.decode_head(maps), images.shape[-2:])
        main, auxiliary = (
            F.cross_entropy(_resized(head(maps), labels.shape[-2:]), labels, ignore_index=255)
            for head in (self.decode_head, self.auxiliary_head)
        )
        return {"main": main, "auxiliary": auxiliary, "loss": main + 0.4 * auxiliary}


def _resized(logits: Tensor, size: Any) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def slide(net: Any, image: Tensor, classes: int, crop: int = 512, stride: int = 341) -> Tensor:
    """Logits (classes, H, W) of one image (3, H, W): mean over crops that overlap; small images are padded."""
    _, height, width = image.shape
    image = F.pad(image, (0, max(0, crop - width), 0, max(0, crop - height)))
    total = image.new_zeros(classes, *image.shape[1:])
    count = image.new_zeros(image.shape[1:])
    starts = []
    for side in image.shape[1:]:
        steps = math.ceil((side - crop) / stride) + 1
        starts.append([min(i * stride, side - crop) for i in range(steps)])
    for top in starts[0]:
        for left in starts[1]:
            window = (slice(top, top + crop), slice(left, left + crop))
            total[:, window[0], window[1]] += net(image[None, :, window[0], window[1]])[0]
            count[window] += 1
    return (total / count)[:, :height, :width]


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes) of (truth, prediction); truth of ``classes`` or more is left out."""
    valid = truth < classes
    return (truth[valid] * classes + prediction[valid]).bincount(minlength=classes**2).view(classes, classes)


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """miou, macc (means over the classes that occur) and aacc (over all pixels) of a confusion matrix."""
    counts = counts.double()
    hit, truth, guessed = counts.diag(), counts.sum(1), counts.sum(0)
    union = truth + guessed - hit
    return {
        "miou": float((hit / union)[union > 0].mean()),
        "macc": float((hit / truth)[truth > 0].mean()),
        "aacc": float(hit.sum() / counts.sum()),
    }
