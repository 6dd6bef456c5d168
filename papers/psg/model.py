"""Panoptic scene graphs in one stage: PSGTR and PSGFormer, their matching and losses, and inference.

Yang, Ang, Guo, Zhou, Zhang, Liu: Panoptic Scene Graph Generation, ECCV 2022 (https://arxiv.org/abs/2207.11247). The
paper numbers few of its equations; lines are named by section where there is no number. Both networks stand on DETR
(Carion et al., 2020). Where the released code decides what the paper leaves open, the docstring says so.

Notation: B images, Q queries, N segments, R relations, L decoder layers, d width. Object classes are 0 .. C-1 and C is
the background; predicates are 1 .. P and 0 is "no relation". Boxes are (cx, cy, w, h) in fractions of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

PSGTR_COST = {"sub_cls": 1.0, "obj_cls": 1.0, "rel_cls": 2.0, "l1": 5.0, "giou": 2.0}
"""Weights of PSGTR's matching costs; classes together have a further factor 1.2 / 3, boxes 1 / 2."""
PSGTR_LOSS = {"sub_cls": 1.0, "obj_cls": 1.0, "rel_cls": 2.0, "l1": 5.0, "giou": 2.0, "dice": 2.0}
PSGFORMER_COST = {"cls": 4.0, "l1": 3.0, "giou": 2.0}
PSGFORMER_LOSS = {"cls": 4.0, "l1": 3.0, "giou": 2.0, "focal": 1.0, "dice": 1.0, "rel_cls": 2.0, "id": 2.0}
BACKGROUND = 0.02
"""Weight of "no relation" (and of PSGFormer's background) in the cross entropies."""

# ---- targets and outputs ---------------------------------------------------------------------------------------------


@dataclass
class Targets:
    """Padded truth of a batch.

    Attributes:
        labels: (B, N) object classes. boxes: (B, N, 4). masks: (B, N, h, w) bool, at the size of the mask loss.
        relations: (B, R, 3) subject index, object index, predicate 1 .. P. segments, edges: (B,) true N and R.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor
    relations: Tensor
    segments: Tensor
    edges: Tensor

    def to(self, device: torch.device) -> Targets:
        """On another device."""
        return Targets(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass
class Triplets:
    """Predicted triplets of an image, best first.

    Attributes:
        subject, predicate, object: (K,) classes, predicates 1 .. P. score: (K,) what they are ranked by.
        masks: (M, H, W) bool. pairs: (K, 2) rows of ``masks``.
    """

    subject: Tensor
    predicate: Tensor
    object: Tensor
    score: Tensor
    masks: Tensor
    pairs: Tensor


# ---- boxes and costs -------------------------------------------------------------------------------------------------


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes x1, y1, x2, y2 (..., 4), broadcast (Rezatofighi et al., 2019)."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def box_cost(predicted: Tensor, true: Tensor, weights: dict[str, float]) -> Tensor:
    """(..., Q, 4) and (..., T, 4) -> (..., Q, T); L1 on corners, as released (DETR: on centre and size)."""
    a, b = corners(predicted).unsqueeze(-2), corners(true).unsqueeze(-3)
    return weights["l1"] * (a - b).abs().sum(-1) - weights["giou"] * giou(a, b)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each target's class: (..., Q, C) and (..., T) -> (..., Q, T)."""
    index = labels.unsqueeze(-2).expand(*logits.shape[:-1], labels.shape[-1])
    return -logits.softmax(-1).gather(-1, index)


@torch.no_grad()
def hungarian(cost: Tensor, counts: Tensor) -> Tensor:
    """Optimal assignment.

    Args:
        cost: (L, B, Q, T). counts: (B,) targets that are not padding.

    Returns:
        (L, B, T) the query of each target, -1 for padding and for targets beyond the number of queries.
    """
    costs, many = cost.detach().float().cpu().numpy(), counts.tolist()
    out = torch.full((cost.shape[0], cost.shape[1], cost.shape[3]), -1)
    for layer in range(cost.shape[0]):
        for image, count in enumerate(many):  # scipy solves one at a time
            if count:
                rows, columns = linear_sum_assignment(costs[layer, image, :, :count])
                out[layer, image, torch.from_numpy(columns)] = torch.from_numpy(rows)
    return out.to(cost.device)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(M, h, w) logits and masks -> (M,): 1 - (2 sum p t + 1) / (sum p + sum t + 1)."""
    p, t = logits.sigmoid().flatten(1), targets.flatten(1).to(logits.dtype)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """(M, h, w) -> (M,): mean over pixels of the focal loss (Lin et al., 2017)."""
    x, t = logits.flatten(1), targets.flatten(1).to(logits.dtype)
    p = x.sigmoid()
    right = p * t + (1 - p) * (1 - t)
    weight = alpha * t + (1 - alpha) * (1 - t)
    return (weight * (1 - right) ** gamma * F.binary_cross_entropy_with_logits(x, t, reduction="none")).mean(1)


def weighted_ce(logits: Tensor, labels: Tensor, background: int) -> Tensor:
    """Cross entropy of each layer with weight 0.02 for one class: (L, B, Q, C), (L, B, Q) -> scalar.

    Each layer is divided by its number of targets + 0.02 times the rest (at least 1); layers are summed.
    """
    weight = torch.where(labels == background, BACKGROUND, 1.0)
    ce = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels) * weight
    return (ce.sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)).sum()


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (L, B, Q, F) by (L, B, T) -> (L, B, T, F); negative indices give row 0."""
    return values.gather(2, index.clamp(min=0).unsqueeze(-1).expand(*index.shape, values.shape[-1]))


def box_loss(boxes: Tensor, true: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU of (L, B, T, 4), each layer divided by its number of targets, layers summed."""
    many = valid.sum((1, 2)).clamp(min=1)
    l1 = ((boxes - true).abs().sum(-1) * valid).sum((1, 2)) / many
    overlap = ((1 - giou(corners(boxes), corners(true))) * valid).sum((1, 2)) / many
    return l1.sum(), overlap.sum()


# ---- trunks ----------------------------------------------------------------------------------------------------------


class ResNetTrunk(nn.Module):
    """ResNet-50 or 101 of torchvision; batch norms frozen, stem and first stage without gradient.

    Args:
        depth: 50 or 101. weights: a torchvision state dict to begin with, or ``None``.
    """

    channels = (256, 512, 1024, 2048)

    def __init__(self, depth: int = 50, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        from torchvision.models import resnet50, resnet101

        if depth not in (50, 101):
            raise ValueError(f"depth is {depth}, expected 50 or 101")
        net = (resnet50 if depth == 50 else resnet101)(weights=None)
        if weights is not None:
            net.load_state_dict(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        for module in (self.stem, self.stages[0]):
            module.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNetTrunk:
        """Batch norms keep the statistics they came with."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> C2 .. C5 at strides 4, 8, 16, 32."""
        x, out = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out


class TinyTrunk(nn.Module):
    """Four stages at strides 4, 4, 8, 8 for images of 48 to 96 pixels (ours)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.channels = (width, width, 2 * width, 2 * width)

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.GroupNorm(8, c_out), nn.ReLU(inplace=True))

        first, last = stage(3, width, 2), 2 * width
        self.stages = nn.ModuleList(
            [nn.Sequential(first, stage(width, width, 2)), stage(width, width, 1), stage(width, last, 2)]
            + [stage(last, last, 1)]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps."""
        x, out = images, []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out


# ---- DETR's parts ----------------------------------------------------------------------------------------------------


def sine_positions(padding: Tensor, d: int, temperature: float = 10_000.0) -> Tensor:
    """Sine encoding of rows and columns, normalised to 2 pi over what is not padding.

    Args:
        padding: (B, h, w) bool. d: width, half of it for each axis.

    Returns:
        (B, h w, d)
    """
    inside = (~padding).float()
    exponent = 2 * (torch.arange(d // 2, device=padding.device) // 2) / (d // 2)
    out = []
    for axis in (1, 2):
        place = inside.cumsum(axis)
        place = place / (place.select(axis, -1).unsqueeze(axis) + 1e-6) * (2 * math.pi)
        angle = place.unsqueeze(-1) / temperature**exponent
        out.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2))
    return torch.cat(out, -1).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention; positions are added to queries and keys, not to values."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
        """(B, n, d), (B, m, d), (B, m, d) -> (B, n, d); ``allowed``: (B, 1, 1, m) bool."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        x = F.scaled_dot_product_attention(q, k, v, allowed, self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """Linear, ReLU, Linear."""

    def __init__(self, d: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, d))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, norms after the residuals."""

    def __init__(self, d: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(d, heads, dropout), FeedForward(d, hidden, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(2)])
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, m, d) -> (B, m, d)"""
        placed = x + positions
        x = self.norms[0](x + self.drop(self.attention(placed, placed, x, allowed)))
        return self.norms[1](x + self.drop(self.ffn(x)))


class DecoderLayer(nn.Module):
    """Self-attention of queries, attention to the memory, feed-forward."""

    def __init__(self, d: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.itself, self.cross = Attention(d, heads, dropout), Attention(d, heads, dropout)
        self.ffn = FeedForward(d, hidden, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(3)])
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, placed: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, Q, d) -> (B, Q, d)"""
        asking = x + query
        x = self.norms[0](x + self.drop(self.itself(asking, asking, x)))
        x = self.norms[1](x + self.drop(self.cross(x + query, placed, memory, allowed)))
        return self.norms[2](x + self.drop(self.ffn(x)))


class Decoder(nn.Module):
    """Layers whose every output is normalised by one shared norm."""

    def __init__(self, layers: int, d: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(d, heads, hidden, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(d)

    def forward(self, query: Tensor, memory: Tensor, positions: Tensor, allowed: Tensor | None) -> Tensor:
        """(Q, d) embeddings of the queries -> (L, B, Q, d)"""
        query = query.expand(len(memory), -1, -1)
        x, placed, out = torch.zeros_like(query), memory + positions, []
        for layer in self.layers:
            x = layer(x, query, memory, placed, allowed)
            out.append(x)
        return self.norm(torch.stack(out))


def box_mlp(d: int) -> nn.Sequential:
    """Three layers to four numbers, before the sigmoid."""
    return nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 4))


class AttentionMap(nn.Module):
    """Where a query looks: softmax over heads and pixels together (DETR's panoptic head)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, query: Tensor, memory: Tensor, image: Tensor, padding: Tensor) -> Tensor:
        """(M, d) queries, (B, h w, d) memory, (M,) image of each query, (B, h, w) bool -> (M, heads, h, w)."""
        q = self.q(query).unflatten(-1, (self.heads, -1))
        k = self.k(memory).unflatten(-1, (self.heads, -1))[image]
        scores = torch.einsum("mnc,mpnc->mnp", q, k) * q.shape[-1] ** -0.5
        hidden = padding.flatten(1)[image].unsqueeze(1)
        scores = scores.masked_fill(hidden, -math.inf)
        return scores.flatten(1).softmax(-1).view(len(query), self.heads, *padding.shape[1:])


def norm_groups(channels: int) -> int:
    """8 as in DETR; fewer where a group would be a single channel, whose mean says how large a mask is."""
    return 8 if channels >= 16 and channels % 8 == 0 else math.gcd(2, channels)


class MaskHead(nn.Module):
    """Small convolutional FPN from attention maps to masks (DETR's panoptic head), for the queries that are asked for.

    The first convolution acts on projected features, the same for all queries of an image, beside attention maps. It is
    linear: the share of the features is computed once an image and added to that of each query's maps.

    Args:
        d, heads: of the transformer. skips: channels of three trunk maps, small to large. width: that its channels
        follow (width / 2 down to width / 16), 0: ``d`` as in DETR.
    """

    def __init__(self, d: int, heads: int, skips: Sequence[int], width: int = 0) -> None:
        super().__init__()
        w = width or d
        widths = [d + heads, w // 2, w // 4, w // 8, w // 16]
        channels = [d + heads, *widths]
        self.d = d
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, widths, strict=False)])
        self.norms = nn.ModuleList([nn.GroupNorm(norm_groups(b), b) for b in widths])
        self.adapters = nn.ModuleList([nn.Conv2d(c, w, 1) for c, w in zip(skips, widths[1:4], strict=True)])
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for conv in [*self.convs, *self.adapters, self.last]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor, attention: Tensor, skips: Sequence[Tensor], image: Tensor) -> Tensor:
        """(B, d, h, w), (M, heads, h, w), three maps of growing size, (M,) -> (M, 4h, 4w) or the last skip's size."""
        first = self.convs[0]
        shared = F.conv2d(features, first.weight[:, : self.d], first.bias, padding=1)[image]
        x = shared + F.conv2d(attention, first.weight[:, self.d :], padding=1)
        x = F.relu(self.norms[0](x))
        x = F.relu(self.norms[1](self.convs[1](x)))
        for conv, norm, adapter, skip in zip(self.convs[2:], self.norms[2:], self.adapters, skips, strict=True):
            x = adapter(skip)[image] + F.interpolate(x, skip.shape[-2:], mode="nearest")
            x = F.relu(norm(conv(x)))
        return self.last(x).squeeze(1)


@dataclass
class Encoded:
    """What both decoders and mask heads read."""

    maps: list[Tensor]
    features: Tensor
    memory: Tensor
    positions: Tensor
    padding: Tensor
    allowed: Tensor | None


class OneStage(nn.Module):
    """Trunk, projection and encoder that both networks share.

    Args:
        trunk: gives four maps, has ``channels``. classes, predicates: C and P. d, heads, hidden: width, heads, width of
        the feed-forward. encoder, decoder: layers. queries: Q. dropout: rate. mask_width: of ``MaskHead``.

    Raises:
        ValueError: a width that the heads or the position encoding do not divide, or no query.
    """

    def __init__(
        self,
        trunk: nn.Module,
        classes: int = 133,
        predicates: int = 56,
        d: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        encoder: int = 6,
        decoder: int = 6,
        queries: int = 100,
        dropout: float = 0.1,
        mask_width: int = 0,
    ) -> None:
        super().__init__()
        if d % heads or d % 16 or queries < 1 or min(encoder, decoder) < 1:
            raise ValueError(f"width {d}, {heads} heads, {queries} queries: expected a width that 16 and heads divide")
        self.trunk, self.classes, self.predicates, self.d, self.queries = trunk, classes, predicates, d, queries
        self.input_proj = nn.Conv2d(trunk.channels[-1], d, 1)
        self.encoder = nn.ModuleList([EncoderLayer(d, heads, hidden, dropout) for _ in range(encoder)])
        self.size, self.mask_width = (decoder, d, heads, hidden, dropout), mask_width

    def encode(self, images: Tensor, padding: Tensor | None) -> Encoded:
        """(B, 3, H, W) and (B, H, W) bool, true where padded."""
        maps = self.trunk(images)
        features = self.input_proj(maps[-1])
        shape = features.shape[-2:]
        if padding is None:
            small = torch.zeros((len(images), *shape), dtype=torch.bool, device=images.device)
            allowed = None
        else:
            small = F.interpolate(padding.unsqueeze(1).float(), shape).squeeze(1).bool()
            allowed = ~small.flatten(1)[:, None, None]
        positions = sine_positions(small, self.d).to(features.dtype)
        memory = features.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            memory = layer(memory, positions, allowed)
        return Encoded(maps, features, memory, positions, small, allowed)

    def masks(self, attention: AttentionMap, head: MaskHead, queries: Tensor, image: Tensor, seen: Encoded) -> Tensor:
        """Mask logits of chosen queries: (M, d), (M,) image of each -> (M, h, w)."""
        shape = seen.features.shape[-2:]
        memory = seen.memory
        maps = attention(queries, memory, image, seen.padding)
        assert maps.shape[-2:] == shape
        return head(seen.features, maps, [seen.maps[2], seen.maps[1], seen.maps[0]], image)

    def parameter_groups(self, lr: float, trunk: float = 0.1, masks: bool = False) -> list[dict[str, Any]]:
        """Parameter groups: the rest, and the trunk (``masks``: with the mask heads) at ``lr`` times ``trunk``."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        heads = ("sub_mask.", "obj_mask.") if masks else ()
        slow = [p for name, p in named if self.is_slow(name) or name.startswith(heads)]
        fast = [p for name, p in named if not (self.is_slow(name) or name.startswith(heads))]
        return [{"params": fast, "lr": lr}, {"params": slow, "lr": lr * trunk}]

    def is_slow(self, name: str) -> bool:
        """Whether a parameter has the lower learning rate."""
        return name.startswith("trunk.")


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(M, h, w) -> (M, *size), bilinear."""
    return F.interpolate(logits.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def ranked(logits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best triplets of an image by their predicate's probability alone, as released.

    Args:
        logits: (Q, P + 1). top: how many.

    Returns:
        (K,) scores, (K,) queries, (K,) predicates 1 .. P. The probability of every predicate of every query is ranked,
        but the predicate reported is the query's best, so a query may come more than once with the same triplet.
    """
    p = logits.softmax(-1)[:, 1:]
    scores, index = p.flatten().topk(min(top, p.numel()))
    query = index // p.shape[1]
    return scores, query, p.argmax(1)[query] + 1


# ---- PSGTR -----------------------------------------------------------------------------------------------------------


class PSGTR(OneStage):
    """One query, one triplet: subject, object and predicate are read from the same decoder output."""

    def __init__(self, trunk: nn.Module, **kwargs: Any) -> None:
        super().__init__(trunk, **kwargs)
        d, heads = self.d, self.size[2]
        self.decoder = Decoder(*self.size)
        self.query = nn.Embedding(self.queries, d)
        self.sub_cls, self.obj_cls = nn.Linear(d, self.classes + 1), nn.Linear(d, self.classes + 1)
        self.sub_box, self.obj_box = box_mlp(d), box_mlp(d)
        self.rel_cls = nn.Linear(d, self.predicates + 1)
        self.sub_attention, self.obj_attention = AttentionMap(d, heads), AttentionMap(d, heads)
        skips = trunk.channels[2::-1]
        self.sub_mask, self.obj_mask = (MaskHead(d, heads, skips, self.mask_width) for _ in range(2))

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        """Decode; masks are made on demand (``triplet_masks``).

        Args:
            images: (B, 3, H, W), normalised. padding: (B, H, W) bool, true where padded.

        Returns:
            ``sub_cls``, ``obj_cls`` (L, B, Q, C + 1), ``rel_cls`` (L, B, Q, P + 1), ``sub_box``, ``obj_box``
            (L, B, Q, 4), ``last`` (B, Q, d), ``seen``.
        """
        seen = self.encode(images, padding)
        h = self.decoder(self.query.weight, seen.memory, seen.positions, seen.allowed)
        return {
            "sub_cls": self.sub_cls(h),
            "obj_cls": self.obj_cls(h),
            "rel_cls": self.rel_cls(h),
            "sub_box": self.sub_box(h).sigmoid(),
            "obj_box": self.obj_box(h).sigmoid(),
            "last": h[-1],
            "seen": seen,
        }

    def triplet_masks(self, out: dict[str, Any], image: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (M, h, w) of subject and object of chosen queries, (M,) image and (M,) query."""
        h = out["last"][image, query]
        sub = self.masks(self.sub_attention, self.sub_mask, h, image, out["seen"])
        obj = self.masks(self.obj_attention, self.obj_mask, h, image, out["seen"])
        return sub, obj

    def match(self, out: dict[str, Any], targets: Targets) -> Tensor:
        """Triplet matching: (L, B, R) query of each relation, -1 for padding."""
        sub, obj, predicate = targets.relations.unbind(-1)
        w, cost = PSGTR_COST, 0.0
        for name, segment in (("sub", sub), ("obj", obj)):
            label = targets.labels.gather(1, segment).expand(len(out["rel_cls"]), -1, -1)
            box = targets.boxes.gather(1, segment.unsqueeze(-1).expand(-1, -1, 4))
            cost = cost + 0.4 * w[f"{name}_cls"] * class_cost(out[f"{name}_cls"], label)
            cost = cost + 0.5 * box_cost(out[f"{name}_box"], box.expand(len(label), -1, -1, -1), w)
        labels = predicate.expand(len(out["rel_cls"]), -1, -1)
        cost = cost + 0.4 * w["rel_cls"] * class_cost(out["rel_cls"], labels)
        return hungarian(cost, targets.edges)

    def loss(self, out: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Loss terms, weighted and summed over layers.

        Subjects and objects have a class loss only where a query is matched; predicates everywhere. Masks of the last
        layer's matched queries are the only ones that are computed.
        """
        layers, batch, queries = out["rel_cls"].shape[:3]
        match = self.match(out, targets)
        valid = match >= 0
        many = valid.sum((1, 2)).clamp(min=1)
        sub, obj, predicate = targets.relations.unbind(-1)
        w, terms = PSGTR_LOSS, {}
        for name, segment in (("sub", sub), ("obj", obj)):
            label = targets.labels.gather(1, segment).expand_as(match)
            chosen = pick(out[f"{name}_cls"], match)
            ce = F.cross_entropy(chosen.flatten(0, 2), label.flatten(), reduction="none").view_as(match)
            terms[f"{name}_cls"] = w[f"{name}_cls"] * ((ce * valid).sum((1, 2)) / many).sum()
            true = targets.boxes.gather(1, segment.unsqueeze(-1).expand(-1, -1, 4)).expand(layers, -1, -1, -1)
            l1, overlap = box_loss(pick(out[f"{name}_box"], match), true, valid)
            terms[f"{name}_l1"], terms[f"{name}_giou"] = w["l1"] * l1, w["giou"] * overlap
        labels = torch.zeros((layers, batch, queries + 1), dtype=torch.long, device=match.device)
        labels.scatter_(2, torch.where(valid, match, queries), predicate.expand_as(match))
        terms["rel_cls"] = w["rel_cls"] * weighted_ce(out["rel_cls"], labels[..., :-1], 0)

        image, edge = valid[-1].nonzero(as_tuple=True)
        if len(image):
            masks = self.triplet_masks(out, image, match[-1, image, edge])
        else:  # every parameter takes part, whatever the batch
            nothing = torch.zeros(1, dtype=torch.long, device=match.device)
            masks = self.triplet_masks(out, nothing, nothing)
        for name, segment, logits in (("sub", sub, masks[0]), ("obj", obj, masks[1])):
            if len(image):
                true = targets.masks[image, segment[image, edge]]
                dice = dice_loss(resized(logits, true.shape[-2:]), true).sum() / len(image)
            else:
                dice = logits.sum() * 0
            terms[f"{name}_dice"] = w["dice"] * dice
        return terms

    @torch.no_grad()
    def predict(
        self, out: dict[str, Any], sizes: Sequence[tuple[int, int]], top: int = 100, threshold: float = 0.85
    ) -> list[Triplets]:
        """Triplets of each image, without those that repeat a better one.

        Args:
            out: of ``forward``. sizes: (H, W) of each image. top: most triplets. threshold: of masks.
        """
        found = []
        for number, size in enumerate(sizes):
            score, query, predicate = ranked(out["rel_cls"][-1, number], top)
            used, row = query.unique(return_inverse=True)
            sub, obj = self.triplet_masks(out, torch.full_like(used, number), used)
            masks = resized(torch.cat([sub, obj]), size).sigmoid() > threshold
            subject = out["sub_cls"][-1, number, :, :-1].argmax(-1)[query]
            object_ = out["obj_cls"][-1, number, :, :-1].argmax(-1)[query]
            pairs = torch.stack([row, row + len(used)], 1)
            found.append(without_repeats(Triplets(subject, predicate, object_, score, masks, pairs)))
        return found


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boolean masks (M, ...) and (N, ...) by one matrix product: (M, N); 0 of two empty ones."""
    x, y = a.flatten(1).float(), b.flatten(1).float()
    inner = x @ y.T
    union = x.sum(1, keepdim=True) + y.sum(1) - inner
    return inner / union.clamp(min=1)


def without_repeats(t: Triplets, overlap: float = 0.5) -> Triplets:
    """Leave out, best first, a triplet with the labels of a kept one and both mask IoUs above ``overlap``."""
    iou = mask_iou(t.masks, t.masks)
    labels = torch.stack([t.subject, t.predicate, t.object], 1)
    same = (labels[:, None] == labels[None]).all(-1)
    for part in t.pairs.unbind(1):
        near = iou[part][:, part] > overlap
        alike = (part[:, None] == part[None]) | near
        same = same & alike
    better = same.tril(-1)
    keep = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    while True:  # a fixed point is what going through them one by one gives
        new = ~(better & keep).any(1)
        if torch.equal(new, keep):
            break
        keep = new
    return Triplets(t.subject[keep], t.predicate[keep], t.object[keep], t.score[keep], t.masks, t.pairs[keep])


# ---- DETR ------------------------------------------------------------------------------------------------------------


class DETR(OneStage):
    """Panoptic DETR: object queries with a class, a box and a mask. The paper's networks begin with its weights."""

    def __init__(self, trunk: nn.Module, **kwargs: Any) -> None:
        super().__init__(trunk, **kwargs)
        d, heads = self.d, self.size[2]
        self.object_decoder, self.object_query = Decoder(*self.size), nn.Embedding(self.queries, d)
        self.cls, self.box = nn.Linear(d, self.classes + 1), box_mlp(d)
        self.attention, self.mask = AttentionMap(d, heads), MaskHead(d, heads, trunk.channels[2::-1], self.mask_width)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        """Decode; masks are made on demand (``object_masks``).

        Returns:
            ``cls`` (L, B, Q, C + 1), ``box`` (L, B, Q, 4), ``last`` (B, Q, d), ``seen``.
        """
        seen = self.encode(images, padding)
        h = self.object_decoder(self.object_query.weight, seen.memory, seen.positions, seen.allowed)
        return {"cls": self.cls(h), "box": self.box(h).sigmoid(), "last": h[-1], "seen": seen}

    def object_masks(self, out: dict[str, Any], image: Tensor, query: Tensor) -> Tensor:
        """Mask logits (M, h, w) of chosen object queries."""
        return self.masks(self.attention, self.mask, out["last"][image, query], image, out["seen"])

    @torch.no_grad()
    def panoptic(
        self, out: dict[str, Any], size: tuple[int, int], number: int, score: float = 0.6, overlap: float = 0.5
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Disjoint segments of one image, for two-stage methods on a DETR.

        A query that repeats a surer one of its class is left out; a pixel belongs to the query that is surest of it; a
        segment that keeps less than ``overlap`` of its mask to
        itself is dropped.

        Args:
            out: of ``forward``. size: (H, W). number: of the image. score: least probability of a class.

        Returns:
            (M,) classes, (M,) scores, (M, H, W) masks.
        """
        sure, label = out["cls"][-1, number].softmax(-1).max(-1)
        query = ((label != self.classes) & (sure >= score)).nonzero().squeeze(1)
        sure, label = sure[query], label[query]
        if not len(query):
            return label, sure, torch.zeros((0, *size), dtype=torch.bool, device=label.device)
        order = sure.argsort(descending=True)
        query, sure, label = query[order], sure[order], label[order]
        p = resized(self.object_masks(out, torch.full_like(query, number), query), size).sigmoid()
        again = (mask_iou(p >= 0.5, p >= 0.5) > 0.5) & (label[:, None] == label)  # a repeat of a surer query
        first = ~again.tril(-1).any(1)
        p, sure, label = p[first], sure[first], label[first]
        best = (p * sure[:, None, None]).argmax(0)
        whole = p >= 0.5
        own = whole & (best == torch.arange(len(p), device=best.device)[:, None, None])
        keep = own.sum((1, 2)) >= (overlap * whole.sum((1, 2))).clamp(min=1)
        return label[keep], sure[keep], own[keep]

    def match_objects(self, out: dict[str, Any], targets: Targets) -> Tensor:
        """(L, B, N) object query of each segment, -1 for padding."""
        layers = len(out["cls"])
        labels = targets.labels.expand(layers, -1, -1)
        cost = PSGFORMER_COST["cls"] * class_cost(out["cls"], labels)
        boxes = targets.boxes.expand(layers, -1, -1, -1)
        return hungarian(cost + box_cost(out["box"], boxes, PSGFORMER_COST), targets.segments)

    def object_loss(self, out: dict[str, Any], targets: Targets, match: Tensor) -> dict[str, Tensor]:
        """Terms of classes, boxes (all layers) and masks (the last), given ``match_objects``."""
        layers, batch, queries = out["cls"].shape[:3]
        w, terms = PSGFORMER_LOSS, {}
        valid = match >= 0
        labels = torch.full((layers, batch, queries + 1), self.classes, device=match.device)
        labels.scatter_(2, torch.where(valid, match, queries), targets.labels.expand_as(match))
        terms["cls"] = w["cls"] * weighted_ce(out["cls"], labels[..., :-1], self.classes)
        true = targets.boxes.expand(layers, -1, -1, -1)
        l1, overlap = box_loss(pick(out["box"], match), true, valid)
        terms["l1"], terms["giou"] = w["l1"] * l1, w["giou"] * overlap
        image, segment = valid[-1].nonzero(as_tuple=True)
        if len(image):
            shapes = targets.masks[image, segment]
            logits = resized(self.object_masks(out, image, match[-1, image, segment]), shapes.shape[-2:])
            terms["dice"] = w["dice"] * dice_loss(logits, shapes).sum() / len(image)
            terms["focal"] = w["focal"] * focal_loss(logits, shapes).sum() / len(image)
        else:  # every parameter takes part, whatever the batch
            nothing = torch.zeros(1, dtype=torch.long, device=match.device)
            terms["dice"] = self.object_masks(out, nothing, nothing).sum() * 0
        return terms

    def loss(self, out: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Loss terms of panoptic segmentation, weighted as PSGFormer's; relations are not looked at."""
        return self.object_loss(out, targets, self.match_objects(out, targets))


# ---- PSGFormer -------------------------------------------------------------------------------------------------------


class PSGFormer(DETR):
    """DETR's object queries and relation queries of a second decoder, joined by similarity as in prompting.

    Args:
        temperature: of the cosine. official_layout: hold the third MLP of the released model, which nothing uses.
    """

    def __init__(
        self, trunk: nn.Module, temperature: float = 0.1, official_layout: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(trunk, **kwargs)
        d, self.temperature = self.d, temperature
        self.relation_decoder, self.relation_query = Decoder(*self.size), nn.Embedding(self.queries, d)
        self.rel_cls = nn.Linear(d, self.predicates + 1)

        def update(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, d), nn.ReLU(), nn.Linear(d, d))

        self.sub_update, self.obj_update = update(d), update(d)
        if official_layout:
            self.sop_update = update(2 * d).requires_grad_(False)

    def is_slow(self, name: str) -> bool:
        """All but the relation decoder, its queries, the predicate head and the two MLPs."""
        return not name.startswith(("relation_decoder.", "relation_query.", "rel_cls.", "sub_update.", "obj_update."))

    def forward(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Any]:
        """Decode; masks are made on demand (``object_masks``).

        Returns:
            ``cls`` (L, B, Q, C + 1), ``box`` (L, B, Q, 4), ``rel_cls`` (L, B, Q, P + 1), ``sub_id``, ``obj_id``
            (B, Q, Q) similarity of relation query and object query, ``last`` (B, Q, d), ``seen``.
        """
        out = super().forward(images, padding)
        seen = out["seen"]
        r = self.relation_decoder(self.relation_query.weight, seen.memory, seen.positions, seen.allowed)
        asked = F.normalize(r[-1], dim=-1)
        similar = [
            asked
            @ F.normalize(update(out["last"]), dim=-1).transpose(1, 2)
            / self.temperature  # cosine over the temperature
            for update in (self.sub_update, self.obj_update)
        ]
        return {**out, "rel_cls": self.rel_cls(r), "sub_id": similar[0], "obj_id": similar[1]}

    def identities(self, scores: Tensor, objects: Tensor) -> Tensor:
        """Log-probability of each segment, softmax over the object queries that are matched.

        Args:
            scores: (B, Q, Q) of relation queries and object queries. objects: (B, N) query of each segment or -1.

        Returns:
            (B, Q, N), finite; padding has a very small value.
        """
        index = objects.clamp(min=0).unsqueeze(1).expand(-1, scores.shape[1], -1)
        chosen = scores.gather(2, index).masked_fill((objects < 0).unsqueeze(1), -1e4)
        return chosen.log_softmax(-1)

    def loss(self, out: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Loss terms, weighted and summed over layers; works for any batch (the released one for one image)."""
        layers, batch, queries = out["rel_cls"].shape[:3]
        w, match = PSGFORMER_LOSS, self.match_objects(out, targets)
        valid, terms = match >= 0, self.object_loss(out, targets, match)
        sub, obj, predicate = targets.relations.unbind(-1)
        both = [self.identities(out[name], match[-1]) for name in ("sub_id", "obj_id")]
        spread = [log_p.gather(2, part.unsqueeze(1).expand(-1, queries, -1)) for log_p, part in zip(both, (sub, obj))]
        cost = -(spread[0].exp() + spread[1].exp()) + class_cost(out["rel_cls"], predicate.expand(layers, -1, -1))
        edges = hungarian(cost, targets.edges)
        there = edges >= 0
        labels = torch.zeros((layers, batch, queries + 1), dtype=torch.long, device=match.device)
        labels.scatter_(2, torch.where(there, edges, queries), predicate.expand_as(edges))
        terms["rel_cls"] = w["rel_cls"] * weighted_ce(out["rel_cls"], labels[..., :-1], 0)
        last, many = edges[-1].clamp(min=0).unsqueeze(1), there[-1].sum().clamp(min=1)
        known = valid[-1].gather(1, sub) & valid[-1].gather(1, obj) & there[-1]
        for name, log_p in zip(("sub_id", "obj_id"), spread):
            terms[name] = -w["id"] * (log_p.gather(1, last).squeeze(1) * known).sum() / many
        return terms

    @torch.no_grad()
    def predict(
        self, out: dict[str, Any], sizes: Sequence[tuple[int, int]], top: int = 100, threshold: float = 0.85
    ) -> list[Triplets]:
        """Triplets of each image; repeats stay, as released. Arguments as for PSGTR."""
        found = []
        for number, size in enumerate(sizes):
            score, query, predicate = ranked(out["rel_cls"][-1, number], top)
            ends = torch.stack([out[name][number].argmax(-1)[query] for name in ("sub_id", "obj_id")], 1)
            used, pairs = ends.unique(return_inverse=True)
            logits = self.object_masks(out, torch.full_like(used, number), used)
            masks = resized(logits, size).sigmoid() > threshold
            label = out["cls"][-1, number, :, :-1].argmax(-1)
            found.append(Triplets(label[ends[:, 0]], predicate, label[ends[:, 1]], score, masks, pairs))
        return found


# ---- beginning with DETR ---------------------------------------------------------------------------------------------


def begin_with_detr(net: PSGTR | PSGFormer, state: dict[str, Tensor]) -> list[str]:
    """Copy what fits of a panoptic DETR's weights, as both networks of the paper begin.

    PSGTR takes the decoder and its queries for triplets; both of its class, box and mask heads begin as DETR's.

    Args:
        net: changed in place. state: of ``DETR`` (also ``from_released_detr``).

    Returns:
        Names of the parameters that nothing in ``state`` fits by name and shape.
    """
    given = dict(state)
    if isinstance(net, PSGTR):
        heads = {"cls": "cls", "box": "box", "attention": "attention", "mask": "mask"}
        parts = {"object_decoder": ["decoder"], "object_query": ["query"]}
        parts |= {old: [f"sub_{new}", f"obj_{new}"] for old, new in heads.items()}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            for part in parts.get(first, []):
                given[f"{part}.{rest}"] = value
    own = net.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    net.load_state_dict(fitting, strict=False)
    return [name for name, _ in net.named_parameters() if name not in fitting]


RELEASED_NAMES = {
    "detr.transformer.encoder.layers.": "encoder.",
    "detr.transformer.decoder.layers.": "object_decoder.layers.",
    "detr.transformer.decoder.norm.": "object_decoder.norm.",
    "detr.query_embed.": "object_query.",
    "detr.class_embed.": "cls.",
    "detr.input_proj.": "input_proj.",
    "detr.bbox_embed.layers.0.": "box.0.",
    "detr.bbox_embed.layers.1.": "box.2.",
    "detr.bbox_embed.layers.2.": "box.4.",
    "detr.backbone.0.body.conv1.": "trunk.stem.0.",
    "detr.backbone.0.body.bn1.": "trunk.stem.1.",
    **{f"detr.backbone.0.body.layer{k + 1}.": f"trunk.stages.{k}." for k in range(4)},
    "bbox_attention.q_linear.": "attention.q.",
    "bbox_attention.k_linear.": "attention.k.",
    **{f"mask_head.lay{k + 1}.": f"mask.convs.{k}." for k in range(5)},
    **{f"mask_head.gn{k + 1}.": f"mask.norms.{k}." for k in range(5)},
    **{f"mask_head.adapter{k + 1}.": f"mask.adapters.{k}." for k in range(3)},
    "mask_head.out_lay.": "mask.last.",
}
"""Prefixes of facebookresearch/detr's panoptic checkpoints (``detr-r50-panoptic``), and what they are here."""
_LAYER_NAMES = {
    "linear1.": "ffn.0.",
    "linear2.": "ffn.3.",
    **{f"norm{k + 1}.": f"norms.{k}." for k in range(3)},
}


def from_released_detr(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of facebookresearch/detr's panoptic model as that of ``DETR`` with a ``ResNetTrunk``.

    Joint projections of queries, keys and values are split. Their class head has COCO's category numbers (251 rows) and
    stays as it is; ``begin_with_detr`` leaves it out where the number of classes differs.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix = next((p for p in RELEASED_NAMES if name.startswith(p)), None)
        if prefix is None:
            continue
        rest = name[len(prefix) :]
        if prefix.endswith("coder.layers."):
            layer, _, rest = rest.partition(".")
            kind, _, leaf = rest.partition(".")
            if kind in ("self_attn", "multihead_attn"):
                attention = "cross" if kind == "multihead_attn" else "itself" if "decoder" in prefix else "attention"
                stem = f"{RELEASED_NAMES[prefix]}{layer}.{attention}."
                if leaf.startswith("in_proj_"):
                    for part, piece in zip("qkv", value.chunk(3), strict=True):
                        out[f"{stem}{part}.{leaf.removeprefix('in_proj_')}"] = piece
                else:
                    out[stem + leaf.replace("out_proj", "out")] = value
                continue
            rest = f"{layer}." + _LAYER_NAMES[f"{kind}."] + leaf
        out[RELEASED_NAMES[prefix] + rest] = value
    return out
