"""A tiny panoptic detector for generated scenes: classes of pixels, and their connected parts as segments (ours).

It stands where the paper's two-stage methods have a Panoptic FPN trained on COCO: it is trained once and then frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn


@dataclass
class Segments:
    """What is detected in an image.

    Attributes:
        labels: (N,) classes from 0. scores: (N,) mean probability. masks: (N, H, W) bool, disjoint.
    """

    labels: Tensor
    scores: Tensor
    masks: Tensor


class PixelDetector(nn.Module):
    """Class logits at full resolution from the trunk's first and last map.

    Args:
        trunk: four maps with ``channels``. classes: C. things: the first ``things`` classes have separate instances.
    """

    def __init__(self, trunk: nn.Module, classes: int, things: int) -> None:
        super().__init__()
        self.trunk, self.things = trunk, things
        self.lateral = nn.Conv2d(trunk.channels[-1], trunk.channels[0], 1)
        self.fine = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU())
        self.out = nn.Conv2d(trunk.channels[0] + 16, classes, 3, 1, 1)
        self.channels = trunk.channels[0] + trunk.channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C, H, W)"""
        maps = self.trunk(images)
        x = maps[0] + F.interpolate(self.lateral(maps[-1]), maps[0].shape[-2:], mode="nearest")
        x = F.interpolate(x, images.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([x, self.fine(images)], 1))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, channels, H / 4, W / 4): first and last map, what the relation heads pool."""
        maps = self.trunk(images)
        return torch.cat([maps[0], F.interpolate(maps[-1], maps[0].shape[-2:], mode="nearest")], 1)

    @torch.no_grad()
    def detect(self, images: Tensor, least: int = 24) -> list[Segments]:
        """Segments of each image: a stuff class is one, a thing class as many as it has connected parts."""
        p = self(images).softmax(1)
        score, label = p.max(1)
        return [self._segments(s, l, p.shape[1], least) for s, l in zip(score, label, strict=True)]

    def _segments(self, score: Tensor, label: Tensor, classes: int, least: int) -> Segments:
        planes = (label[None] == torch.arange(classes)[:, None, None]).numpy()
        within = np.zeros((3, 3, 3), dtype=bool)
        within[1] = ndimage.generate_binary_structure(2, 1)  # parts of one class only
        parts, count = ndimage.label(planes[: self.things], within)
        stuff = np.arange(self.things, classes)
        bands = np.where(planes[self.things :], count + 1 + (stuff - self.things)[:, None, None], 0)
        ids = np.concatenate([parts, bands]).astype(np.int64)
        flat = torch.from_numpy(ids.max(0)).flatten()  # a pixel has one class
        total = count + len(stuff) + 1
        area = flat.bincount(minlength=total)
        mean = torch.zeros(total).index_add_(0, flat, score.flatten()) / area.clamp(min=1)
        kind = torch.zeros(total, dtype=torch.long)
        kind[flat] = label.flatten()
        keep = (area >= least) & (torch.arange(total) > 0)
        numbers = keep.nonzero().squeeze(1)
        return Segments(kind[numbers], mean[numbers], flat.view(label.shape) == numbers[:, None, None])


def pooled(features: Tensor, masks: Tensor) -> Tensor:
    """Mean features of masks: (F, h, w), (N, H, W) bool -> (N, F); masks are brought to the features' size."""
    small = F.interpolate(masks[None].float(), features.shape[-2:], mode="area")[0].flatten(1)
    return small @ features.flatten(1).T / small.sum(1, keepdim=True).clamp(min=1e-6)
