"""Reference Twice: Mask2Former whose features and object queries refer to support examples by cross-attention.

What could be seen of the paper describes the references in words and figures; the formulas here are this project's
reading of them (README, "Paper vs. official code"), in the order of the network:

    1  z_c^l = 1/K sum_k sum_p M_ck(p) F^l_ck(p) / sum_p M_ck(p)      dynamic class centre of class c at scale l
    2  F^l <- F^l + MHA(LN(F^l) + position, Z^l + e, Z^l)             feature-level reference
    3  Q <- LN(Q + MHA(LN(Q), Q_s, Q_s))                              query-level reference
    4  tau <w_c, q> / (|w_c| |q|)                                     cosine classifier
    5  mean_p w(p) |P(x)(p) - P_T(x)(p)|^2 + KL(teacher || student)   class-enhanced distillation of the base classes

Mask2Former (Cheng et al., CVPR 2022): pixel decoder with multi-scale deformable attention (Zhu et al., ICLR 2021),
decoder with masked attention, loss on points. Images are (B, 3, H, W), masks of targets (B, N, H, W) in {0, 1}.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Sizes and variants; the defaults are Mask2Former's for COCO instances.

    Attributes:
        width, heads, queries, layers, ffn: of the transformer decoder. pixel_decoder: "deformable" or "fpn".
        pixel_layers, pixel_ffn, points: of the pixel decoder. groups: of its group norms.
        feature_reference, query_reference: the two references. class_embedding: e of eq. 2.
        mask_feature_reference: refer to the mask features as well, through a linear map.
        class_code: values of eq. 3 carry the direction of their class in the classifier.
        classifier: "linear" or "cosine" (eq. 4), tau: its initial scale.
        selection: object queries that a support image contributes: "matched" to its mask, or the ``support_queries``
            most probable of its "class". mean_over_shots: average them over the shots of a class.
        zero_init: output projections of the references start at 0, that is, at Mask2Former.
    """

    width: int = 256
    heads: int = 8
    queries: int = 100
    layers: int = 9
    ffn: int = 2048
    pixel_decoder: str = "deformable"
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    points: int = 4
    groups: int = 32
    feature_reference: bool = True
    query_reference: bool = True
    class_embedding: bool = True
    mask_feature_reference: bool = False
    class_code: bool = True
    classifier: str = "linear"
    tau: float = 20.0
    selection: str = "matched"
    support_queries: int = 1
    mean_over_shots: bool = True
    zero_init: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("pixel_decoder", ("deformable", "fpn")),
            ("classifier", ("linear", "cosine")),
            ("selection", ("matched", "class")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.width % self.heads or self.width % 4 or self.width % self.groups:
            raise ValueError(f"width {self.width} must be a multiple of 4, of heads {self.heads}, groups {self.groups}")
        if min(self.queries, self.layers, self.support_queries) < 1:
            raise ValueError("queries, layers and support_queries must be at least 1")


class Targets(NamedTuple):
    """Objects of a batch: masks (B, N, H, W) float in [0, 1], labels (B, N) int64, valid (B, N) bool."""

    masks: Tensor
    labels: Tensor
    valid: Tensor

    @staticmethod
    def pad(masks: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
        """Targets of images of one size with different numbers of objects: (n, H, W) and (n,) each."""
        if len(masks) != len(labels) or any(len(m) != len(y) for m, y in zip(masks, labels)):
            raise ValueError("every image needs as many masks as labels")
        counts = torch.tensor([len(y) for y in labels])
        most = max(1, int(counts.max()))
        padded = torch.stack([F.pad(m.float(), (0, 0, 0, 0, 0, most - len(m))) for m in masks])
        ids = torch.stack([F.pad(y, (0, most - len(y))) for y in labels])
        return Targets(padded, ids, torch.arange(most) < counts[:, None])

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(*(x.to(device) for x in self))


class Reference(NamedTuple):
    """What the support set contributes, computed once for any number of query images.

    Attributes:
        centres: one (C, d) a scale and, last, of the mask features: Z. queries: (C, n, d): Q_s. present: (C,) bool.
    """

    centres: tuple[Tensor, ...]
    queries: Tensor
    present: Tensor


class Output(NamedTuple):
    """Predictions after every layer: logits (L, B, Q, C + 1), masks (L, B, Q, H/4, W/4); queries (B, Q, d) before the
    query-level reference; projected: input projections of the backbone's maps, low to high resolution."""

    logits: Tensor
    masks: Tensor
    queries: Tensor
    projected: tuple[Tensor, ...]


# ---- multi-scale deformable attention --------------------------------------------------------------------------------


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of values that are sampled bilinearly, zero outside (Zhu et al. 2021, eq. 3).

    Args:
        value: (B, S, heads, c), the levels one after another, S = sum of H W. shapes: (H, W) of each level.
        locations: (B, Q, heads, levels, points, 2), x and y in units of the level's size. weights: the same without 2.

    Returns:
        (B, Q, heads * c).
    """
    b, _, heads, _ = value.shape
    grid = 2 * locations.permute(0, 2, 3, 1, 4, 5).flatten(0, 1) - 1  # (B heads, levels, Q, points, 2)
    levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], -1)
    sampled = [
        F.grid_sample(level.unflatten(-1, shape), grid[:, i], "bilinear", "zeros", align_corners=False)
        for i, (level, shape) in enumerate(zip(levels, shapes))
    ]  # (B heads, c, Q, points) each
    strength = weights.permute(0, 2, 1, 3, 4).flatten(3).flatten(0, 1).unsqueeze(1)  # (B heads, 1, Q, levels points)
    out = (torch.cat(sampled, -1) * strength).sum(-1)  # (B heads, c, Q)
    return out.unflatten(0, (b, heads)).permute(0, 3, 1, 2).flatten(2)


class DeformableAttention(nn.Module):
    """Each token looks at ``points`` places of every level around itself."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ring = torch.stack([angle.cos(), angle.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1).view(1, 1, -1, 1)
        with torch.no_grad():
            for layer in (self.offsets, self.weights):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.offsets.bias.copy_((ring.view(heads, 1, 1, 2) * steps).expand(-1, levels, -1, -1).flatten())
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, position: Tensor, places: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """x (B, S, d), position (S, d), places (S, 2) in [0, 1] -> (B, S, d)."""
        b, s, _ = x.shape
        query, split = x + position, (self.heads, self.levels, self.points)
        size = x.new_tensor([(w, h) for h, w in shapes]).view(1, 1, 1, -1, 1, 2)
        locations = places.view(1, s, 1, 1, 1, 2) + self.offsets(query).view(b, s, *split, 2) / size
        weights = self.weights(query).view(b, s, self.heads, -1).softmax(-1).view(b, s, *split)
        value = self.value(x).view(b, s, self.heads, -1)
        return self.output(deformable_attention(value, shapes, locations, weights))


# ---- Mask2Former -----------------------------------------------------------------------------------------------------


def sine_position(h: int, w: int, width: int, device: torch.device | None = None) -> Tensor:
    """(H W, d) sine encoding of the place, y before x, over the whole map."""
    frequency = 10000 ** (2 * (torch.arange(width // 2, device=device) // 2) / (width // 2))

    def axis(n: int) -> Tensor:
        angle = 2 * math.pi * torch.arange(1, n + 1, device=device)[:, None] / (n + 1e-6) / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    y, x = axis(h)[:, None].expand(-1, w, -1), axis(w)[None].expand(h, -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention on (B, n, d)."""

    def __init__(self, width: int, heads: int, zero: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        for layer in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if zero:
            nn.init.zeros_(self.out.weight)

    def split(self, x: Tensor) -> Tensor:
        """(B, n, d) -> (B, heads, n, d / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """``allowed`` is broadcastable to (B, heads, n, m), True where a query may look."""
        q, k, v = self.split(self.q(query)), self.split(self.k(key)), self.split(self.v(value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward layer, post-norm."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.attention = DeformableAttention(a.width, a.heads, 3, a.points)
        self.norm1, self.norm2 = nn.LayerNorm(a.width), nn.LayerNorm(a.width)
        self.fc1, self.fc2 = nn.Linear(a.width, a.pixel_ffn), nn.Linear(a.pixel_ffn, a.width)

    def forward(self, x: Tensor, position: Tensor, places: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.attention(x, position, places, shapes))
        return self.norm2(x + self.fc2(self.fc1(x).relu()))


class PixelDecoder(nn.Module):
    """Backbone maps at strides 4, 8, 16, 32 -> features at strides 32, 16, 8 and mask features at stride 4."""

    def __init__(self, a: Architecture, channels: Sequence[int]) -> None:
        super().__init__()
        d, self.kind = a.width, a.pixel_decoder

        def norm() -> nn.Module:
            return nn.GroupNorm(a.groups, d)

        self.projections = nn.ModuleList(nn.Sequential(nn.Conv2d(c, d, 1), norm()) for c in list(channels)[:0:-1])
        for projection in self.projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        self.layers = nn.ModuleList(EncoderLayer(a) for _ in range(a.pixel_layers if self.kind == "deformable" else 0))
        if self.kind == "deformable":
            self.level = nn.Parameter(torch.randn(3, d))
        else:
            self.smooth = nn.ModuleList(
                nn.Sequential(nn.Conv2d(d, d, 3, padding=1, groups=d), nn.Conv2d(d, d, 1), norm(), nn.ReLU())
                for _ in range(2)
            )
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], d, 1, bias=False), norm())
        self.last = nn.Sequential(nn.Conv2d(d, d, 3, padding=1, bias=False), norm(), nn.ReLU())
        self.mask = nn.Conv2d(d, d, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
        """Maps of rising stride -> (features at strides 32, 16, 8; mask features; input projections)."""
        projected = tuple(p(x) for p, x in zip(self.projections, list(maps)[:0:-1]))
        features = list(projected)
        if self.kind == "deformable":
            shapes = [(x.shape[2], x.shape[3]) for x in projected]
            device, d = projected[0].device, projected[0].shape[1]
            position = torch.cat([sine_position(h, w, d, device) + self.level[i] for i, (h, w) in enumerate(shapes)])
            places = torch.cat(
                [
                    torch.stack(
                        torch.meshgrid(
                            (torch.arange(w, device=device) + 0.5) / w,
                            (torch.arange(h, device=device) + 0.5) / h,
                            indexing="xy",
                        ),
                        -1,
                    ).flatten(0, 1)
                    for h, w in shapes
                ]
            )
            tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in projected], 1)
            for layer in self.layers:
                tokens = layer(tokens, position, places, shapes)
            parts = tokens.split([h * w for h, w in shapes], 1)
            features = [x.transpose(1, 2).unflatten(-1, shape) for x, shape in zip(parts, shapes)]
        else:
            for i, smooth in enumerate(self.smooth):
                up = F.interpolate(features[i], projected[i + 1].shape[-2:], mode="nearest")
                features[i + 1] = smooth(projected[i + 1] + up)
        fine = self.lateral(maps[0])
        fine = fine + F.interpolate(features[-1], fine.shape[-2:], mode="bilinear", align_corners=False)
        return features, self.mask(self.last(fine)), projected


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward layer, post-norm."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.cross, self.self_attention = Attention(a.width, a.heads), Attention(a.width, a.heads)
        self.norms = nn.ModuleList(nn.LayerNorm(a.width) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(a.width, a.ffn), nn.Linear(a.ffn, a.width)

    def forward(self, x: Tensor, place: Tensor, memory: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        """x (B, Q, d), place (Q, d), memory (B, S, d), position (S, d), allowed (B, 1, Q, S)."""
        x = self.norms[0](x + self.cross(x + place, memory + position, memory, allowed))
        x = self.norms[1](x + self.self_attention(x + place, x + place, x))
        return self.norms[2](x + self.fc2(self.fc1(x).relu()))


def attention_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (B, Q, h, w) -> (B, 1, Q, S) bool: where a mask is at least one half; everywhere if it is empty."""
    small = F.interpolate(masks.detach(), size, mode="bilinear", align_corners=False).flatten(2)
    allowed = small >= 0
    return (allowed | ~allowed.any(-1, keepdim=True)).unsqueeze(1)


class Classifier(nn.Module):
    """Class logits of object queries, the last one for "no object"; grows by classes."""

    def __init__(self, width: int, classes: int, kind: str = "linear", tau: float = 20.0) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(classes + 1, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if kind == "linear":
            self.bias = nn.Parameter(torch.zeros(classes + 1))
        else:
            self.tau = nn.Parameter(torch.tensor(float(tau)))

    @property
    def classes(self) -> int:
        """Classes without "no object"."""
        return len(self.weight) - 1

    def directions(self) -> Tensor:
        """(C, d) unit vectors of the classes."""
        return F.normalize(self.weight[:-1], dim=-1)

    def forward(self, q: Tensor) -> Tensor:
        """(..., d) -> (..., C + 1)."""
        if self.kind == "linear":
            return F.linear(q, self.weight, self.bias)
        return self.tau * F.linear(F.normalize(q, dim=-1), F.normalize(self.weight, dim=-1))  # eq. 4

    @torch.no_grad()
    def grow(self, rows: Tensor) -> None:
        """Add classes between the old ones and "no object".

        Args:
            rows: (n, d) directions of the new classes, e.g. class centres; they get the old rows' mean length.
        """
        length = self.weight[:-1].norm(dim=-1).mean()
        new = F.normalize(rows.to(self.weight), dim=-1) * length
        self.weight = nn.Parameter(torch.cat([self.weight[:-1], new, self.weight[-1:]]))
        if self.kind == "linear":
            start = self.bias[:-1].mean().expand(len(rows))
            self.bias = nn.Parameter(torch.cat([self.bias[:-1], start, self.bias[-1:]]))


# ---- the two references ----------------------------------------------------------------------------------------------


def mask_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Mean feature inside a mask (the inner sum of eq. 1).

    Args:
        features: (S, d, h, w). masks: (S, H, W) in {0, 1}, resized by area.

    Returns:
        (S, d).

    Raises:
        ValueError: sizes do not fit, a mask is empty or has other values than 0 and 1.
    """
    if masks.dim() != 3 or len(masks) != len(features):
        raise ValueError(f"{tuple(masks.shape)} masks for {tuple(features.shape)} features: expected one mask each")
    masks = masks.to(features.dtype)
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError("support masks must hold 0 and 1 only")
    if not masks.flatten(1).any(1).all():
        raise ValueError("a support mask is empty")
    weight = F.interpolate(masks[:, None], features.shape[-2:], mode="area").flatten(2)  # (S, 1, h w)
    return (features.flatten(2) @ weight.transpose(1, 2))[..., 0] / weight.sum(-1)


def mean_by_class(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the rows (S, ...) of each class -> (C, ...); 0 for a class without rows (the outer sum of eq. 1)."""
    out = x.new_zeros(classes, *x.shape[1:]).index_add(0, labels, x)
    count = torch.bincount(labels, minlength=classes).clamp_min(1).to(x.dtype)
    return out / count.view(-1, *[1] * (x.dim() - 1))


class FeatureReference(nn.Module):
    """Eq. 2: every place of a feature map looks at the class centres."""

    def __init__(self, width: int, heads: int, zero: bool = True) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, zero)

    def forward(self, features: Tensor, centres: Tensor, present: Tensor, embedding: Tensor | None = None) -> Tensor:
        """features (B, d, h, w), centres (C, d), present (C,) bool, embedding (C, d) -> (B, d, h, w)."""
        b, d, h, w = features.shape
        x = features.flatten(2).transpose(1, 2)
        key = centres if embedding is None else centres + embedding
        query = self.norm(x) + sine_position(h, w, d, x.device)
        added = self.attention(query, key.expand(b, -1, -1), centres.expand(b, -1, -1), present[None])
        return (x + added).transpose(1, 2).unflatten(-1, (h, w))


class QueryReference(nn.Module):
    """Eq. 3 without the outer norm: object queries look at those of the support images, or at nothing (a learned key).

    With ``code`` a value carries, beside the support query, the direction of its class in the classifier, with a
    learned strength: attention to a class is then evidence for it, for later classes as for those trained on.
    """

    def __init__(self, width: int, heads: int, zero: bool = True, code: bool = True) -> None:
        super().__init__()
        self.attention = Attention(width, heads, zero)
        self.nothing = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.strength = nn.Parameter(torch.tensor(0.0 if zero else 0.5 * math.sqrt(width))) if code else None

    def forward(self, q: Tensor, support: Tensor, present: Tensor, codes: Tensor) -> Tensor:
        """q (B, Q, d), support (C, n, d), present (C,) bool, codes (C, d) -> what is added to the queries."""
        c, n, d = support.shape
        rows = support.flatten(0, 1)
        at = self.attention
        keys = at.split(at.k(torch.cat([rows, self.nothing[None]]))[None])
        values = at.split(F.pad(at.v(rows), (0, 0, 0, 1))[None])
        allowed = F.pad(present.repeat_interleave(n), (0, 1), value=True)
        scores = at.split(at.q(q)) @ keys.transpose(-2, -1) / math.sqrt(d // at.heads)
        weight = scores.masked_fill(~allowed, -math.inf).softmax(-1)  # (B, heads, Q, C n + 1)
        added = at.out((weight @ values).transpose(1, 2).flatten(2))
        if self.strength is not None:
            by_class = weight.mean(1)[..., :-1].unflatten(-1, (c, n)).sum(-1)
            added = added + self.strength * by_class @ codes
        return added


class RefT(nn.Module):
    """Mask2Former with the references of the architecture; with neither it is Mask2Former.

    Args:
        a: sizes and variants. backbone: (B, 3, H, W) -> four maps at strides 4, 8, 16, 32. channels: of those maps.
        classes: number of classes.
    """

    def __init__(self, a: Architecture, backbone: nn.Module, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.architecture, self.backbone, d = a, backbone, a.width
        self.pixel_decoder = PixelDecoder(a, channels)
        self.query_feature, self.query_position = nn.Embedding(a.queries, d), nn.Embedding(a.queries, d)
        self.level = nn.Embedding(3, d)
        self.layers = nn.ModuleList(DecoderLayer(a) for _ in range(a.layers))
        self.norm = nn.LayerNorm(d)
        self.mask_head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
        self.classifier = Classifier(d, classes, a.classifier, a.tau)
        scales = 3 + a.mask_feature_reference
        references = scales if a.feature_reference else 0
        self.feature_reference = nn.ModuleList(FeatureReference(d, a.heads, a.zero_init) for _ in range(references))
        embedded = a.feature_reference and a.class_embedding
        self.class_embedding = nn.Parameter(0.02 * torch.randn(classes, d)) if embedded else None
        self.mask_linear = nn.Linear(d, d) if a.feature_reference and a.mask_feature_reference else None
        self.query_reference = QueryReference(d, a.heads, a.zero_init, a.class_code) if a.query_reference else None

    @property
    def refers(self) -> bool:
        """Whether forward needs a reference."""
        return bool(len(self.feature_reference)) or self.query_reference is not None

    def grow(self, rows: Tensor) -> None:
        """Add a class for each of the rows (n, d), see ``Classifier.grow``; its class embedding starts at 0."""
        self.classifier.grow(rows)
        if self.class_embedding is not None:
            new = torch.zeros(len(rows), rows.shape[1], device=self.class_embedding.device)
            self.class_embedding = nn.Parameter(torch.cat([self.class_embedding.detach(), new]))

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
        """Backbone and pixel decoder."""
        return self.pixel_decoder(self.backbone(images))

    def refer_features(
        self, features: list[Tensor], mask_features: Tensor, centres: Sequence[Tensor], present: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Eq. 2 on every scale, and on the mask features where the architecture says so."""
        if not self.feature_reference:
            return features, mask_features
        e = self.class_embedding
        features = [r(x, z, present, e) for r, x, z in zip(self.feature_reference, features, centres)]
        if self.mask_linear is not None:
            more = self.feature_reference[3](mask_features, centres[3], present, e) - mask_features
            mask_features = mask_features + self.mask_linear(more.movedim(1, -1)).movedim(-1, 1)
        return features, mask_features

    def decode(
        self, features: list[Tensor], mask_features: Tensor, every: bool = True
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Transformer decoder.

        Returns:
            queries (B, Q, d) before the last norm; class logits and mask logits before and after each layer, except
            after the last one; of the class logits nothing when not ``every``.
        """
        b, d = len(mask_features), mask_features.shape[1]
        flat = [x.flatten(2).transpose(1, 2) + self.level.weight[i] for i, x in enumerate(features)]
        sizes = [(x.shape[2], x.shape[3]) for x in features]
        position = [sine_position(*size, d, mask_features.device) for size in sizes]
        x, place = self.query_feature.weight.expand(b, -1, -1), self.query_position.weight
        logits, masks = [], []
        for i, layer in enumerate(self.layers):
            normed = self.norm(x)
            mask = self.masks(normed, mask_features)
            masks.append(mask)
            if every:
                logits.append(self.classifier(normed))
            scale = i % 3
            x = layer(x, place, flat[scale], position[scale], attention_mask(mask, sizes[scale]))
        return x, logits, masks

    def masks(self, queries: Tensor, mask_features: Tensor) -> Tensor:
        """Mask logits <mlp(q), E>."""
        return (self.mask_head(queries) @ mask_features.flatten(2)).unflatten(-1, mask_features.shape[-2:])

    def reference(
        self, images: Tensor, masks: Tensor, labels: Tensor, classes: int | None = None
    ) -> tuple[Reference, Output]:
        """Encode a support set: each image with one instance.

        Args:
            images: (S, 3, H, W). masks: (S, H, W) in {0, 1}. labels: (S,) in 0 .. C-1; every class that occurs must
                occur equally often when the architecture keeps the shots apart.

        Returns:
            the reference, and the predictions on the support images.

        Raises:
            ValueError: see ``mask_pool``; a label out of range; numbers of shots that differ.
        """
        a, classes = self.architecture, classes or self.classifier.classes
        if masks.shape[-2:] != images.shape[-2:]:
            raise ValueError(f"masks of {tuple(masks.shape[-2:])} for images of {tuple(images.shape[-2:])}")
        if len(labels) == 0 or int(labels.max()) >= classes or int(labels.min()) < 0:
            raise ValueError(f"labels of supports must lie in 0..{classes - 1}")
        features, mask_features, projected = self.encode(images)
        scales = [*features, mask_features][: max(3, len(self.feature_reference))]
        centres = tuple(mean_by_class(mask_pool(x, masks), labels, classes) for x in scales)  # eq. 1
        count = torch.bincount(labels, minlength=classes)
        present = count > 0
        features, mask_features = self.refer_features(features, mask_features, centres, present)
        x, logits, predicted = self.decode(features, mask_features)
        normed = self.norm(x)
        logits.append(self.classifier(normed))
        predicted.append(self.masks(normed, mask_features))
        out = Output(torch.stack(logits), torch.stack(predicted), x, projected)
        chosen = self.select(normed, out, masks, labels)  # (S, k_s, d)
        if a.mean_over_shots:
            queries = mean_by_class(chosen.mean(1), labels, classes).unsqueeze(1)
        else:
            shots = int(count.max())
            if not ((count == shots) | (count == 0)).all():
                raise ValueError(f"classes have {count.tolist()} supports, expected equal numbers")
            order = labels.argsort(stable=True)
            rows = chosen[order].view(int(present.sum()), shots * chosen.shape[1], -1)
            queries = rows.new_zeros(classes, *rows.shape[1:]).index_copy(0, present.nonzero()[:, 0], rows)
        return Reference(centres, queries, present), out

    def select(self, queries: Tensor, out: Output, masks: Tensor, labels: Tensor) -> Tensor:
        """The object queries (S, k_s, d) of the support instances: by mask and class, or by class alone."""
        with torch.no_grad():
            chance = out.logits[-1].softmax(-1)
            score = chance.gather(-1, labels.view(-1, 1, 1).expand(-1, chance.shape[1], 1))[..., 0]  # (S, Q)
            if self.architecture.selection == "matched":
                small = F.interpolate(masks[:, None].float(), out.masks.shape[-2:], mode="area").flatten(1)
                score = score - pairwise_dice(out.masks[-1].flatten(2), small[:, None])[..., 0] * 2.5
            best = score.topk(self.architecture.support_queries, 1).indices
        return queries.gather(1, best.unsqueeze(-1).expand(-1, -1, queries.shape[-1]))

    def forward(self, images: Tensor, reference: Reference | None = None, order: Tensor | None = None) -> Output:
        """Predictions for (B, 3, H, W) images, sides multiples of 32.

        Args:
            reference: what ``reference`` gave. order: (C,) a permutation of classes: the query-level reference names
                class c as ``order[c]``, see ``losses``.

        Raises:
            ValueError: the architecture refers and there is no reference, or one of another number of classes.
        """
        features, mask_features, projected = self.encode(images)
        if self.refers:
            if reference is None:
                raise ValueError("this network refers to supports: give it net.reference(...)")
            if len(reference.present) != self.classifier.classes:
                raise ValueError(
                    f"a reference of {len(reference.present)} classes for {self.classifier.classes} of the network"
                )
            features, mask_features = self.refer_features(features, mask_features, reference.centres, reference.present)
        x, logits, masks = self.decode(features, mask_features, self.training)
        last = x
        if self.query_reference is not None and reference is not None:
            codes = self.classifier.directions()
            codes = codes if order is None else codes[order]
            last = x + self.query_reference(self.norm(x), reference.queries, reference.present, codes)
        normed = self.norm(last)  # eq. 3
        logits.append(self.classifier(normed))
        masks.append(self.masks(normed, mask_features))
        if not self.training:
            masks = masks[-1:]
        return Output(torch.stack(logits), torch.stack(masks), x, projected)


# ---- matching and loss -----------------------------------------------------------------------------------------------


def pairwise_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 p t + 1) / (p + t + 1) of (..., Q, P) logits and (..., N, P) targets -> (..., Q, N)."""
    p = logits.sigmoid()
    both = p @ targets.transpose(-2, -1)
    return 1 - (2 * both + 1) / (p.sum(-1)[..., None] + targets.sum(-1)[..., None, :] + 1)


def pairwise_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of every pair: softplus(x) - x t, so that one product gives all of them."""
    return (F.softplus(logits).sum(-1)[..., None] - logits @ targets.transpose(-2, -1)) / logits.shape[-1]


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(M, P) logits and targets -> (M,)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (M, C, h, w) at (M, P, 2) points in [0, 1], x before y -> (M, C, P)."""
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


@torch.no_grad()
def match(
    logits: Tensor, masks: Tensor, targets: Targets, weights: tuple[float, float, float] = (2.0, 5.0, 5.0)
) -> Tensor:
    """Hungarian matching of every layer and image.

    Args:
        logits: (L, B, Q, C + 1). masks: (L, B, Q, P) logits at points. targets: with masks (B, N, P) at those
            points; labels (B, N) or, where layers have their own, (L, B, N).
        weights: of class, binary cross-entropy and dice.

    Returns:
        (L, B, N) the query of each object, -1 for none (padding, or more objects than queries).
    """
    chance = logits.softmax(-1)
    labels = targets.labels.expand(len(logits), *targets.labels.shape[-2:])  # (L, B, N)
    index = labels.unsqueeze(2).expand(-1, -1, logits.shape[2], -1)
    cost = -weights[0] * chance.gather(-1, index)
    cost = cost + weights[1] * pairwise_bce(masks, targets.masks) + weights[2] * pairwise_dice(masks, targets.masks)
    table, counts = cost.double().cpu().numpy(), targets.valid.sum(1).tolist()
    found = np.full(tuple(labels.shape), -1)
    for layer in range(len(table)):  # scipy solves one matrix at a time
        for image, n in enumerate(counts):
            rows, columns = linear_sum_assignment(table[layer, image, :, :n])
            found[layer, image, columns] = rows
    return torch.from_numpy(found).to(logits.device)


@torch.no_grad()
def uncertain_points(maps: Tensor, count: int, oversample: float = 3.0, share: float = 0.75) -> Tensor:
    """Points (M, P, 2) of which ``share`` are the least certain of ``oversample`` times as many random ones."""
    m, many, sure = len(maps), int(count * oversample), int(count * share)
    points = torch.rand(m, many, 2, device=maps.device)
    doubt = -sample_points(maps[:, None], points)[:, 0].abs()
    best = doubt.topk(sure, 1).indices
    chosen = points.gather(1, best.unsqueeze(-1).expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(m, count - sure, 2, device=maps.device)], 1)


def losses(
    out: Output,
    targets: Targets,
    points: int = 12544,
    no_object: float = 0.1,
    weights: tuple[float, float, float] = (2.0, 5.0, 5.0),
    last_only: bool = False,
    order: Tensor | None = None,
) -> dict[str, Tensor]:
    """Mask2Former's loss, summed over the layers, which are all matched and sampled together.

    Args:
        points: at which masks are compared; 0: every pixel of the predicted masks. no_object: weight of that class.
        weights: of class, binary cross-entropy and dice. last_only: without deep supervision. order: (C,)
            what the last layer has to call each class, when the references' names were permuted. It can know these
            names from the supports alone, so a net that is trained so has to look at them.

    Returns:
        weighted "class", "mask" and "dice".
    """
    logits, masks = (out.logits[-1:], out.masks[-1:]) if last_only else (out.logits, out.masks)
    layers, b, q, h, w = masks.shape
    truth = targets.masks.float()
    if points:
        places = torch.rand(b, points, 2, device=masks.device)
        seen = sample_points(masks.detach().transpose(0, 1).flatten(1, 2), places).unflatten(1, (layers, q))
        seen = seen.transpose(0, 1)
        at = sample_points(truth, places)
    else:
        at = F.interpolate(truth, (h, w), mode="area").flatten(2)
        seen = masks.detach().flatten(3)
    labels = targets.labels.repeat(layers, 1, 1)
    if order is not None:
        labels[-1] = order[targets.labels]
    found = match(logits.detach(), seen, Targets(at, labels, targets.valid), weights)

    classes = logits.shape[-1] - 1
    wanted = torch.full((layers, b, q + 1), classes, device=logits.device)
    place = torch.where(found >= 0, found, q)  # the last column takes what is not matched
    wanted.scatter_(2, place, labels)
    weight = torch.ones(classes + 1, device=logits.device)
    weight[-1] = no_object
    wanted = wanted[..., :q]
    # a mean in each layer, as Mask2Former has it, in one pass: per-element losses over per-layer sums of weights
    each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none").view(layers, -1)
    loss_class = (each.sum(1) / weight[wanted].flatten(1).sum(1)).sum()

    total = targets.valid.sum().clamp_min(1)
    image, which = (found >= 0).any(0).nonzero(as_tuple=True)  # matched objects are the same in number in every layer
    if not len(image):
        zero = masks.sum() * 0
        return {"class": weights[0] * loss_class, "mask": zero, "dice": zero}
    layer = torch.arange(layers, device=logits.device)[:, None]
    kept = found[:, image, which]  # (L, M)
    usable = (kept >= 0).to(masks.dtype).flatten()
    chosen = masks[layer, image, kept.clamp_min(0)]  # (L, M, h, w)
    m = len(image)
    if points:
        flat = chosen.flatten(0, 1)
        spots = uncertain_points(flat.detach(), points)
        predicted = sample_points(flat[:, None], spots)[:, 0]
        grouped = spots.view(layers, m, points, 2).transpose(0, 1).flatten(1, 2)  # one copy of a mask serves all layers
        expected = sample_points(truth[image, which].unsqueeze(1), grouped)[:, 0]
        expected = expected.view(m, layers, points).transpose(0, 1).flatten(0, 1)
    else:
        predicted = chosen.flatten(2).flatten(0, 1)
        expected = at[image, which].expand(layers, -1, -1).flatten(0, 1)
    bce = F.binary_cross_entropy_with_logits(predicted, expected, reduction="none").mean(1)
    return {
        "class": weights[0] * loss_class,
        "mask": weights[1] * (bce * usable).sum() / total,
        "dice": weights[2] * (dice_loss(predicted, expected) * usable).sum() / total,
    }


def distillation(
    student: Output, teacher: Output, features: float = 1.0, classes: float = 1.0, threshold: float = 0.3
) -> Tensor:
    """Eq. 5: the input projections and base-class probabilities of a net that was trained on the base classes.

    Places count by how surely the teacher sees a base class there. Base classes are the teacher's. No gradient reaches
    the teacher.
    """
    base = teacher.logits.shape[-1] - 1
    with torch.no_grad():
        logits = teacher.logits[-1]
        sure = logits.softmax(-1)[..., :base].amax(-1)  # (B, Q)
        where = (sure[..., None, None] * teacher.masks[-1].sigmoid()).amax(1, keepdim=True)  # (B, 1, h, w)
    loss = student.logits.new_zeros(())
    for ours, theirs in zip(student.projected, teacher.projected):
        weight = F.interpolate(where, ours.shape[-2:], mode="area")
        loss = (
            loss + features * (weight * (ours - theirs.detach()).square().sum(1, keepdim=True)).mean() / ours.shape[1]
        )
    p = logits[..., :base].log_softmax(-1)
    q = student.logits[-1][..., :base].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    chosen = (sure > threshold).to(divergence.dtype)
    return loss + classes * (divergence * chosen).sum() / chosen.sum().clamp_min(1)


# ---- inference -------------------------------------------------------------------------------------------------------


class Detections(NamedTuple):
    """Of a batch: scores (B, n), labels (B, n), masks (B, n, H, W) bool."""

    scores: Tensor
    labels: Tensor
    masks: Tensor


@torch.no_grad()
def detect(out: Output, size: tuple[int, int], top: int = 100) -> Detections:
    """The ``top`` pairs of query and class by probability; scores are that times the mean of the mask inside itself."""
    chance = out.logits[-1].softmax(-1)[..., :-1]
    classes = chance.shape[-1]
    scores, index = chance.flatten(1).topk(min(top, chance[0].numel()), 1)
    query, labels = index // classes, index % classes
    masks = F.interpolate(out.masks[-1], size, mode="bilinear", align_corners=False).sigmoid()
    inside = masks > 0.5
    quality = (masks * inside).flatten(2).sum(-1) / inside.flatten(2).sum(-1).clamp_min(1)
    row = torch.arange(len(index), device=index.device)[:, None]
    return Detections(scores * quality[row, query], labels, inside[row, query])


def nearest_centre(centres: Tensor, x: Tensor) -> Tensor:
    """Class (n,) of the centre (C, d) with the greatest cosine to each row (n, d)."""
    return (F.normalize(x, dim=-1) @ F.normalize(centres, dim=-1).T).argmax(-1)


# ---- a small backbone ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut."""

    def __init__(self, c: int, d: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d))
        self.shortcut = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.shortcut(x)).relu()


class SmallResNet(nn.Module):
    """Four residual stages after a stem of stride 2: maps at strides 4, 8, 16, 32."""

    channels = (16, 32, 48, 64)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = (16, *self.channels)
        self.stages = nn.ModuleList(Residual(c, d, 2) for c, d in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


SMALL = Architecture(
    width=64, heads=4, queries=16, layers=3, ffn=64, pixel_decoder="fpn", pixel_layers=0, groups=8, zero_init=False
)
"""The network for generated scenes of 64 pixels."""


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
