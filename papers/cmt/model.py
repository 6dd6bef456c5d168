"""CMT: a DETR-like 3-D detector whose keys are plain image tokens and LiDAR tokens, aligned by their coordinates.

Yan, Liu, Sun, Jia, Li, Wang, Zhang: "Cross Modal Transformer: Towards Fast and Robust 3D Object Detection", ICCV 2023.
Sizes, order of operations and initialisation follow the authors' code (README.md says where this differs).

Notation: B samples, V cameras, C width of the tokens, Q queries, L decoder layers, D depth bins, K classes. Boxes are
(x, y, z, d0, d1, d2, yaw, vx, vy): centre in the middle of the box, metres and radians in the LiDAR frame, d0 along the
heading. Images are (B, V, 3, H, W), blue-green-red, normalised; points are (N, 5): x, y, z, intensity, seconds.

State dict of ``CMT``: ``image.backbone``, ``image.neck``, ``lidar.encoder``, ``lidar.backbone``, ``lidar.neck`` (see
backbones.py) and ``head.{shared_conv, reference_points, encoding, layers, post_norm, task_head}``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE_WEIGHTS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
"""Weights of the ten entries of a box code in the matching cost and in the loss."""
MATCH_CLASS, MATCH_BOX, LOSS_CLASS, LOSS_BOX = 2.0, 0.25, 2.0, 0.25
ALPHA = 0.25
"""Balance of the focal loss; its exponent is 2."""
NOISE_SPLIT = 0.75
"""A denoising query whose noise is longer than this (in half box sizes) has to say background."""
IMAGE_MEAN, IMAGE_STD = (103.530, 116.280, 123.675), (57.375, 57.120, 58.395)
"""Blue, green and red of ImageNet in 0..255."""
POST_RANGE = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
"""Detections outside of this are dropped."""


@dataclass(frozen=True)
class Architecture:
    """What decides the shape of a network. The defaults are the paper's best model.

    Attributes:
        modality: fusion, lidar or camera. image_backbone: vovnet99, resnet50 or small (stride 8).
        lidar_backbone: sparse (voxels, sparse convolutions, SECOND) or pillars (small).
        pc_range: metres, x y z from, x y z to. voxel: metres. max_points: a voxel's first points that count.
        max_voxels: a sample's most voxels in training and in test.
        cells: cells along x and y that are encoded, 0: all. Only the authors' ResNet configuration needs it.
        width, heads, layers, ffn, queries, depth_bins, classes: C, attention heads, L, hidden width, Q, D, K.
        head_width, head_kernel: hidden channels of a task head's branch; its kernel along the queries (1 or 3).
        dn_groups: most groups of denoising queries in training, 0: none. dropout: of the decoder.
        bev_position, ray_position: with the position encoding of LiDAR cells, of camera rays.
        official_channel_order: the authors' heads, where the bounded "height" output learns the log of a length.
        quick_start: begin with boxes at the reference points and attention near them, for training of minutes. The
            authors' models begin with random ones.
    """

    modality: str = "fusion"
    image_backbone: str = "vovnet99"
    lidar_backbone: str = "sparse"
    pc_range: tuple[float, ...] = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
    voxel: tuple[float, float, float] = (0.075, 0.075, 0.2)
    max_points: int = 10
    max_voxels: tuple[int, int] = (120_000, 160_000)
    cells: int = 0
    width: int = 256
    heads: int = 8
    layers: int = 6
    ffn: int = 1024
    queries: int = 900
    depth_bins: int = 64
    classes: int = 10
    head_width: int = 64
    head_kernel: int = 1
    dn_groups: int = 10
    bev_position: bool = True
    ray_position: bool = True
    official_channel_order: bool = False
    dropout: float = 0.1
    quick_start: bool = False

    def __post_init__(self) -> None:
        choices = {
            "modality": ("fusion", "lidar", "camera"),
            "image_backbone": ("vovnet99", "resnet50", "small"),
            "lidar_backbone": ("sparse", "pillars"),
            "head_kernel": (1, 3),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, known))}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of the {self.heads} heads")
        exact = [(high - low) / size for low, high, size in zip(self.pc_range, self.pc_range[3:], self.voxel)]
        if any(abs(cells - round(cells)) > 1e-3 or round(cells) < 1 for cells in exact):
            sizes = " x ".join(f"{cells:.2f}" for cells in exact)
            raise ValueError(f"pc_range {self.pc_range} holds {sizes} voxels of {self.voxel}, expected whole numbers")
        if self.cells and self.cells != round(exact[0]) and not self.official_channel_order:
            raise ValueError(f"cells is {self.cells}, but pc_range and voxel give {round(exact[0])}")
        multiple = 16 if self.lidar_backbone == "sparse" else 2
        if self.grid[0] != self.grid[1] or self.grid[0] % multiple:
            raise ValueError(
                f"grid {self.grid[0]} x {self.grid[1]}: expected a square, its side a multiple of {multiple}"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        x, y, z = (round((high - low) / size) for low, high, size in zip(self.pc_range, self.pc_range[3:], self.voxel))
        return (self.cells or x, self.cells or y, z)

    @property
    def bev_cells(self) -> int:
        """Side of the map of LiDAR tokens."""
        return self.grid[0] // (8 if self.lidar_backbone == "sparse" else 2)

    @property
    def image_multiple(self) -> int:
        """Images are padded to a multiple of this many pixels."""
        return 8 if self.image_backbone == "small" else 32


_SMALL = Architecture(
    image_backbone="small", lidar_backbone="pillars", pc_range=(-12.0, -12.0, -2.0, 12.0, 12.0, 2.0),
    voxel=(1.0, 1.0, 4.0), width=64, heads=4, layers=3, ffn=256, queries=40, depth_bins=16, classes=4, dn_groups=5,
    dropout=0.0, quick_start=True,
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "fusion-vov": Architecture(),
    "fusion-r50": Architecture(
        image_backbone="resnet50", voxel=(0.1, 0.1, 0.2), pc_range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    ),
    "fusion-r50-official": Architecture(
        image_backbone="resnet50", voxel=(0.1, 0.1, 0.2), cells=1024, official_channel_order=True
    ),
    "lidar": Architecture(modality="lidar", head_kernel=3),
    "camera": Architecture(modality="camera"),
    "small": _SMALL,
    "frame": Architecture(
        image_backbone="small", lidar_backbone="pillars", voxel=(1.6875, 1.6875, 8.0), width=64, heads=4, layers=3,
        ffn=256, queries=150, depth_bins=32, dn_groups=3, quick_start=True,
    ),
}  # fmt: skip
"""The authors' four configurations, the ResNet one also as their checkpoint needs it, and two that a CPU trains."""


class Batch(NamedTuple):
    """Input. Either sensor may be ``None``.

    Attributes:
        images: (B, V, 3, H, W), padded. points: B tensors (N, 5). lidar2img: (B, V, 4, 4) float64 on the CPU, pixels of
            the padded image times depth; (1, V, 4, 4) when all samples have the same cameras.
    """

    images: Tensor | None
    points: Sequence[Tensor] | None
    lidar2img: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; the small calibration stays on the CPU, where it is inverted in float64."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        points = None if self.points is None else [p.to(device, non_blocking=True) for p in self.points]
        return Batch(images, points, self.lidar2img)


class Targets(NamedTuple):
    """Ground truth, padded to the most boxes of a sample: ``boxes`` (B, M, 9), ``labels`` (B, M), ``valid`` (B, M)."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    @staticmethod
    def pad(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
        """Pad B lists of boxes (n, 9) and labels (n,).

        Raises:
            ValueError: a box without extent, whose logarithm does not exist.
        """
        for sample, rows in enumerate(boxes):
            if (rows[:, 3:6] <= 0).any():
                raise ValueError(f"sample {sample}: a box has a length that is not positive")
        pad = nn.utils.rnn.pad_sequence
        valid = pad([torch.ones_like(row, dtype=torch.bool) for row in labels], batch_first=True)
        filled = pad(list(boxes), batch_first=True)
        filled[..., 3:6] = torch.where(valid.unsqueeze(-1), filled[..., 3:6], 1.0)
        return Targets(filled, pad(list(labels), batch_first=True), valid)

    def to(self, device: torch.device) -> Targets:
        """The targets on another device."""
        return Targets(*(value.to(device, non_blocking=True) for value in self))


def mask_sensor(images: Tensor, points: Tensor, draw: float) -> tuple[Tensor, Tensor]:
    """Masked-modal training: blank the images when ``draw`` > 0.75, else the points when it is > 0.5.

    Points stay, all at the origin, so that there is something to voxelise. A sensor that is missing at test time is
    simulated in the same way.

    Args:
        images: before normalisation. points: (N, 5). draw: from U(0, 1).
    """
    return images * (draw <= 0.75), points * (not 0.5 < draw <= 0.75)


# ---- coordinates encoding --------------------------------------------------------------------------------------


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of x clamped to [0, 1], finite at both ends."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def embed(p: Tensor, features: int) -> Tensor:
    """Sines and cosines of one normalised coordinate.

    The divisors run from 1 to nearly 3: the authors' code has a temperature that it never uses.

    Args:
        p: (...). features: how many, even.

    Returns:
        (..., features), sine and cosine in turn.
    """
    i = torch.arange(0, features, 2, device=p.device)
    angle = 2 * math.pi * p.unsqueeze(-1) / (1 + i / features)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def embed_bev(p: Tensor, features: int) -> Tensor:
    """Encoding of a bird's-eye position: (..., 2) of x, y in [0, 1] -> (..., 2 * features), that of y first."""
    return torch.cat([embed(p[..., 1], features), embed(p[..., 0], features)], -1)


class Cameras(NamedTuple):
    """Projections of B samples, or of one for all: ``forward``, ``inverse`` (B, V, 4, 4); ``size`` (H, W) in pixels."""

    forward: Tensor
    inverse: Tensor
    size: tuple[int, int]

    @staticmethod
    def of(lidar2img: Tensor, size: tuple[int, int], device: torch.device) -> Cameras:
        """Check and invert, in float64 on the CPU.

        Raises:
            ValueError: not (B, V, 4, 4), or a singular projection (sample and view are named).
        """
        if lidar2img.ndim != 4 or lidar2img.shape[2:] != (4, 4):
            raise ValueError(f"lidar2img has shape {tuple(lidar2img.shape)}, expected (samples, views, 4, 4)")
        matrix = lidar2img.double().cpu()
        inverse, info = torch.linalg.inv_ex(matrix)
        bad = (info != 0) | ~inverse.isfinite().flatten(2).all(2) | (torch.linalg.det(matrix).abs() < 1e-12)
        if bad.any():
            sample, view = bad.nonzero()[0].tolist()
            raise ValueError(f"lidar2img of sample {sample}, view {view} is singular, expected a projection")
        return Cameras(matrix.float().to(device), inverse.float().to(device), size)


class CoordinatesEncoding(nn.Module):
    """Position encodings of LiDAR cells, image tokens and queries from 3-D coordinates (CEM and query generator).

    The D points of a ray are (depth * direction + origin), linear in the depth, so the first layer's product with their
    3 D coordinates is a product with six numbers; the first layer of the cells' encoding falls apart into x and y.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a, width = architecture, architecture.width
        self.architecture = a
        self.bev_embedding = self.rv_embedding = None
        if a.bev_position:
            self.bev_embedding = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        if a.ray_position and a.modality != "lidar":
            hidden = 4 * width
            self.rv_embedding = nn.Sequential(nn.Linear(3 * a.depth_bins, hidden), nn.ReLU(), nn.Linear(hidden, width))
        low, high = torch.tensor(a.pc_range[:3]), torch.tensor(a.pc_range[3:])
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("span", high - low, persistent=False)
        depths = 1 + torch.arange(a.depth_bins) * ((a.pc_range[3] - 1) / a.depth_bins)
        self.register_buffer("depths", depths, persistent=False)

    def cells(self, side: int) -> Tensor:
        """Encoding of the side x side LiDAR tokens, row by row: (side^2, C)."""
        first, relu, second = self.bev_embedding
        axis = (torch.arange(side, device=first.weight.device) + 0.5) / side
        along = embed(axis, first.in_features // 2)
        by_y, by_x = first.weight.chunk(2, 1)
        hidden = (along @ by_y.T).unsqueeze(1) + (along @ by_x.T + first.bias)
        return second(relu(hidden)).flatten(0, 1)

    def _hidden(self, direction: Tensor, origin: Tensor) -> Tensor:
        """First layer of the ray encoding, after its activation; both (..., 3) in units of the range."""
        first = self.rv_embedding[0]
        weight = first.weight.unflatten(1, (len(self.depths), 3))
        slope = torch.einsum("hdc,d->ch", weight, self.depths)
        return F.relu(direction @ slope + (origin @ weight.sum(1).T + first.bias))

    def rays(self, cameras: Cameras, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Rays through homogeneous pixels, in units of the range: a point at depth d is d * direction + origin.

        Args:
            pixels: (B, V, n, 3), or broadcastable.

        Returns:
            direction (B, V, n, 3) and origin (B, V, 1, 3), normalised so that the range is [0, 1].
        """
        direction = pixels @ cameras.inverse[..., :3, :3].transpose(2, 3) / self.span
        return direction, (cameras.inverse[..., None, :3, 3] - self.low) / self.span

    def pixels(self, rows: int, columns: int, size: tuple[int, int]) -> Tensor:
        """Corner pixels (rows * columns, 3) of the image tokens, homogeneous."""
        v = torch.arange(rows, device=self.low.device) * (size[0] / rows)
        u = torch.arange(columns, device=self.low.device) * (size[1] / columns)
        grid = torch.stack(torch.meshgrid(v, u, indexing="ij"), -1).flatten(0, 1)
        return F.pad(grid.flip(1), (0, 1), value=1.0)

    def tokens(self, cameras: Cameras, rows: int, columns: int) -> Tensor:
        """Encoding of image tokens, camera by camera: (B, V * rows * columns, C)."""
        direction, origin = self.rays(cameras, self.pixels(rows, columns, cameras.size))
        return self.rv_embedding[2](self._hidden(direction, origin)).flatten(1, 2)

    def queries(self, reference: Tensor, cameras: Cameras | None) -> Tensor:
        """Encoding of reference points: their cell's, plus that of their rays in all cameras that see them.

        Args:
            reference: (B, T, 3) in [0, 1].

        Returns:
            (B, T, C).
        """
        reference = inverse_sigmoid(reference).sigmoid()
        out = reference.new_zeros(*reference.shape[:2], self.architecture.width)
        if self.architecture.bev_position:
            out = out + self.bev_embedding(embed_bev(reference[..., :2], self.architecture.width))
        if cameras is None or not self.architecture.ray_position:
            return out
        points = F.pad(reference * self.span + self.low, (0, 1), value=1.0)
        projected = points.unsqueeze(1) @ cameras.forward.transpose(2, 3)
        depth = projected[..., 2:3].detach()
        pixels = projected[..., :3] / (depth + torch.where(depth > 0, 1e-6, -1e-6))
        u, v = pixels[..., 0], pixels[..., 1]
        seen = (depth[..., 0] > 0) & (u >= 0) & (u < cameras.size[1]) & (v >= 0) & (v < cameras.size[0])
        last = self.rv_embedding[2]
        weight = seen.unsqueeze(-1).to(out)
        hidden = (self._hidden(*self.rays(cameras, pixels)) * weight).sum(1)
        return out + hidden @ last.weight.T + weight.sum(1) * last.bias  # linear: once on the sum, not for each view


# ---- decoder ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with packed projections, named as in ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """(B, T, C), (B, N, C), (B, N, C), and a (T, N) mask that is true where attention may go -> (B, T, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward network, each followed by its norm.

    Dropout acts inside self-attention and on both attentions' results. It does not act inside cross-attention: the
    authors' wrapper hands it to another argument.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.ReLU(inplace=True), nn.Linear(ffn, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        for layer in (self.self_attention.out_proj, self.cross_attention.out_proj, self.ffn[0], self.ffn[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """Queries (B, T, C) with their positions, memory with and without its positions (B, N, C) -> (B, T, C)."""
        query = x + position
        x = self.norms[0](x + self.dropout(self.self_attention(query, query, x, allowed)))
        x = self.norms[1](x + self.dropout(self.cross_attention(x + position, key, value)))
        return self.norms[2](x + self.ffn(x))


# ---- task heads and box code -----------------------------------------------------------------------------------

BRANCHES = ("center", "height", "dim", "rot", "vel", "cls_logits")


class TaskHead(nn.Module):
    """Two layers for each of six outputs, with weights of their own for each decoder layer.

    All outputs' first layers are one matrix product; their second layers are one product with a matrix that is zero
    between different outputs.

    Args:
        width: C. layers: L. classes: K. hidden: channels between. kernel: 1 or 3, along the queries.
    """

    def __init__(self, width: int, layers: int, classes: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.sizes = (2, 1, 3, 2, 2, classes)
        self.hidden, self.kernel = hidden, kernel
        branches, outputs = len(self.sizes), sum(self.sizes)
        self.weight1 = nn.Parameter(torch.empty(layers, kernel * width, branches * hidden))
        self.norm_weight = nn.Parameter(torch.ones(layers, 1, branches * hidden))
        self.norm_bias = nn.Parameter(torch.zeros(layers, 1, branches * hidden))
        self.weight2 = nn.Parameter(torch.empty(layers, kernel, hidden, outputs))
        self.bias2 = nn.Parameter(torch.zeros(layers, 1, outputs))
        own = torch.block_diag(*(torch.ones(1, size) for size in self.sizes))
        self.register_buffer("own", own.view(1, 1, branches, 1, outputs), persistent=False)
        with torch.no_grad():  # the authors' grouped convolutions: normal by a fan-out that counts all layers
            nn.init.normal_(self.weight1, std=math.sqrt(2 / (layers * hidden * kernel)))
            std = [math.sqrt(2 / (layers * size * kernel)) for size in self.sizes for _ in range(size)]
            self.weight2.normal_().mul_(torch.tensor(std))
            self.bias2[..., -classes:] = -2.19

    def _neighbours(self, x: Tensor) -> Tensor:
        """Beside each query's features those of the one before and after: (..., T, c) -> (..., T, kernel * c)."""
        if self.kernel == 1:
            return x
        padded = F.pad(x, (0, 0, 1, 1))
        return torch.cat([padded[..., i : i + x.shape[-2], :] for i in range(3)], -1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(L, B, T, C) -> for each branch (L, B, T, its size)."""
        layers, samples = x.shape[:2]
        y = self._neighbours(x).flatten(1, 2) @ self.weight1
        y = F.layer_norm(y.unflatten(-1, (-1, self.hidden)), (self.hidden,), eps=1e-6).flatten(-2)
        y = F.relu(y * self.norm_weight + self.norm_bias).unflatten(1, (samples, -1))
        weight = (self.weight2.unsqueeze(2) * self.own).flatten(1, 3)
        out = torch.baddbmm(self.bias2, self._neighbours(y).flatten(1, 2), weight)
        parts = out.unflatten(1, (samples, -1)).split(self.sizes, -1)
        return dict(zip(BRANCHES, parts, strict=True))


def box_code(boxes: Tensor) -> Tensor:
    """Regression target of boxes: (..., 9) -> (..., 10): cx, cy, log d0, log d1, cz, log d2, sin, cos, vx, vy."""
    x, y, z, d0, d1, d2, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, d0.log(), d1.log(), z, d2.log(), yaw.sin(), yaw.cos(), vx, vy], -1)


def code_box(code: Tensor) -> Tensor:
    """Inverse of ``box_code``: (..., 10) -> (..., 9)."""
    x, y, d0, d1, z, d2, sine, cosine, vx, vy = code.unbind(-1)
    return torch.stack([x, y, z, d0.exp(), d1.exp(), d2.exp(), torch.atan2(sine, cosine), vx, vy], -1)


class Denoising(NamedTuple):
    """Denoising queries of a batch, in front of the others: group by group, M places each.

    Attributes:
        reference: (B, G * M, 3) in [0, 1], zero where there is no box. labels: (B, G * M), K for background.
        boxes: (B, G * M, 9). valid: (B, G * M). group: M.
    """

    reference: Tensor
    labels: Tensor
    boxes: Tensor
    valid: Tensor
    group: int


def denoising_queries(targets: Targets, architecture: Architecture, noise: Tensor | None = None) -> Denoising | None:
    """Noisy copies of the ground truth's centres as further queries (point-based query denoising).

    Args:
        noise: (B, G, M, 3) in (-1, 1), in half box sizes along the axes. Drawn when not given, with the architecture's
            number of groups G, or fewer where a sample has many boxes.

    Returns:
        ``None`` when no sample has a box.
    """
    b, m, _ = targets.boxes.shape
    if not m:
        return None
    if noise is None:
        groups = min(architecture.dn_groups, architecture.queries // m)
        if groups == 0:
            warnings.warn(f"{m} boxes a sample and {architecture.queries} queries: one denoising group", stacklevel=2)
        noise = 2 * torch.rand(b, max(groups, 1), m, 3, device=targets.boxes.device) - 1
    groups = noise.shape[1]
    boxes = targets.boxes.unsqueeze(1).expand(-1, groups, -1, -1)
    valid = targets.valid.unsqueeze(1).expand(-1, groups, -1)
    low, high = boxes.new_tensor(architecture.pc_range[:3]), boxes.new_tensor(architecture.pc_range[3:])
    centre = ((boxes[..., :3] + noise * boxes[..., 3:6] / 2 - low) / (high - low)).clamp(0, 1)
    labels = targets.labels.unsqueeze(1).expand(-1, groups, -1)
    labels = torch.where(noise.norm(dim=-1) > NOISE_SPLIT, architecture.classes, labels)
    reference = centre * valid.unsqueeze(-1)
    return Denoising(*(x.flatten(1, 2) for x in (reference, labels, boxes, valid)), m)


def denoising_mask(count: int, group: int, queries: int, device: torch.device) -> Tensor:
    """Where self-attention may go: (T, T), T = count + queries, denoising queries first, in groups of ``group``.

    Queries do not see denoising ones; those see their own group and all queries.
    """
    owner = torch.cat([torch.arange(count, device=device) // group, torch.full((queries,), -1, device=device)])
    return (owner.unsqueeze(1) == owner) | (owner == -1)


class Predictions(NamedTuple):
    """``codes`` (L, B, Q, 10) and ``logits`` (L, B, Q, K); ``dn_...`` the same of the denoising queries ``dn``."""

    codes: Tensor
    logits: Tensor
    dn_codes: Tensor | None = None
    dn_logits: Tensor | None = None
    dn: Denoising | None = None


class CMTHead(nn.Module):
    """Tokens of either sensor or both to boxes.

    Args:
        architecture: sizes and variant. lidar_channels: channels of the LiDAR branch's map.
    """

    def __init__(self, architecture: Architecture, lidar_channels: int = 512) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.shared_conv = None
        if a.modality != "camera":
            conv = nn.Conv2d(lidar_channels, a.width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.shared_conv = nn.Sequential(conv, nn.BatchNorm2d(a.width), nn.ReLU(inplace=True))
        self.reference_points = nn.Parameter(torch.rand(a.queries, 3))
        self.encoding = CoordinatesEncoding(a)
        self.layers = nn.ModuleList(DecoderLayer(a.width, a.heads, a.ffn, a.dropout) for _ in range(a.layers))
        self.post_norm = nn.LayerNorm(a.width)
        self.task_head = TaskHead(a.width, a.layers, a.classes, a.head_width, a.head_kernel)
        if a.quick_start:
            self._start_near()

    @torch.no_grad()
    def _start_near(self) -> None:
        """Small outputs, so that boxes lie at their reference points; equal projections of queries and keys;
        encodings of positions with zero mean and one larger spread, so that a query attends to what is near it,
        cells and rays alike: the sensor to which it attends less would be left unused for a long time."""
        self.task_head.weight2 *= 0.05
        encoding = self.encoding
        if encoding.bev_embedding is not None:
            self._spread(encoding.bev_embedding[2], encoding.cells(16))
        if encoding.rv_embedding is not None:
            azimuth, slope = torch.meshgrid(
                torch.linspace(0, 2 * math.pi, 65)[:-1], torch.linspace(-0.5, 0.5, 5), indexing="ij"
            )
            direction = torch.stack([azimuth.cos(), azimuth.sin(), slope], -1).flatten(0, 1) / encoding.span
            hidden = encoding._hidden(direction, -encoding.low / encoding.span)  # rays from the middle of the range
            self._spread(encoding.rv_embedding[2], encoding.rv_embedding[2](hidden))
        for layer in self.layers:
            queries, keys, _ = layer.cross_attention.in_proj_weight.chunk(3)
            keys.copy_(queries)

    @staticmethod
    def _spread(last: nn.Linear, encodings: Tensor, spread: float = 12.0) -> None:
        """Change the last layer that made these encodings (n, C), so that their mean is zero and their spread given."""
        factor = spread / encodings.std(0).norm()
        last.bias.copy_((last.bias - encodings.mean(0)) * factor)
        last.weight *= factor

    def memory(self, bev: Tensor | None, image: Tensor | None, cameras: Cameras | None) -> tuple[Tensor, Tensor]:
        """Tokens of all sensors with and without their position encodings: two (B, N, C)."""
        a, keys, values = self.architecture, [], []
        if bev is not None:
            tokens = self.shared_conv(bev).flatten(2).transpose(1, 2)
            keys.append(tokens + self.encoding.cells(bev.shape[-1]) if a.bev_position else tokens)
            values.append(tokens)
        if image is not None:
            tokens = image.permute(0, 1, 3, 4, 2).flatten(1, 3)
            keys.append(tokens + self.encoding.tokens(cameras, *image.shape[-2:]) if a.ray_position else tokens)
            values.append(tokens)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def forward(
        self,
        bev: Tensor | None,
        image: Tensor | None,
        lidar2img: Tensor | None = None,
        size: tuple[int, int] = (0, 0),
        dn: Denoising | None = None,
    ) -> Predictions:
        """Detect.

        Args:
            bev: (B, c, S, S) or ``None``. image: (B, V, C, H', W') or ``None``. lidar2img: (B or 1, V, 4, 4).
            size: height and width of the padded images. dn: denoising queries, in training.

        Raises:
            ValueError: a sensor is missing that the modality needs, or a bad ``lidar2img``.
        """
        a = self.architecture
        if (bev is None) != (a.modality == "camera") or (image is None) != (a.modality == "lidar"):
            got = " and ".join(name for name, x in (("LiDAR", bev), ("camera", image)) if x is not None) or "nothing"
            raise ValueError(f"modality {a.modality} was given {got}")
        cameras = None
        if image is not None:
            if lidar2img is None or lidar2img.shape[0] not in (1, len(image)) or lidar2img.shape[1] != image.shape[1]:
                shape = None if lidar2img is None else tuple(lidar2img.shape)
                raise ValueError(f"lidar2img has shape {shape}, expected (1 or {len(image)}, {image.shape[1]}, 4, 4)")
            cameras = Cameras.of(lidar2img, size, image.device)
        samples = len(image if bev is None else bev)
        with torch.autocast(self.reference_points.device.type, enabled=False):
            reference = self.reference_points.expand(samples, -1, -1)
            allowed = None
            if dn is not None:
                reference = torch.cat([dn.reference, reference], 1)
                allowed = denoising_mask(dn.reference.shape[1], dn.group, a.queries, reference.device)
            position = self.encoding.queries(reference, cameras)
            key, value = self.memory(*(None if x is None else x.float() for x in (bev, image)), cameras)
        x, outputs = torch.zeros_like(position), []
        for layer in self.layers:
            x = layer(x, position, key, value, allowed)
            outputs.append(self.post_norm(x))
        with torch.autocast(self.reference_points.device.type, enabled=False):
            codes, logits = self.decode_layers(torch.stack(outputs).float().nan_to_num(), reference)
        if dn is None:
            return Predictions(codes, logits)
        n = dn.reference.shape[1]
        return Predictions(codes[:, :, n:], logits[:, :, n:], codes[:, :, :n], logits[:, :, :n], dn)

    def decode_layers(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Box codes (L, B, T, 10) and logits (L, B, T, K) of the layers' outputs (L, B, T, C)."""
        out, offset = self.task_head(x), inverse_sigmoid(reference)
        low, span = self.encoding.low, self.encoding.span
        centre = (out["center"] + offset[..., :2]).sigmoid() * span[:2] + low[:2]
        height = (out["height"] + offset[..., 2:]).sigmoid() * span[2:] + low[2:]
        parts = [centre, height, out["dim"], out["rot"], out["vel"]]
        if not self.architecture.official_channel_order:  # the bounded output is the height that it was made to be
            parts = [centre, out["dim"][..., :2], height, out["dim"][..., 2:], out["rot"], out["vel"]]
        return torch.cat(parts, -1), out["cls_logits"]


class CMT(nn.Module):
    """The whole detector: two branches that give tokens, and the head.

    Args:
        architecture: one of ``ARCHITECTURES``, or one's own.
        image: (B, V, 3, H, W) -> (B, V, C, H', W'). lidar: B clouds (N, 5) -> (B, ``lidar.channels``, S, S), rows along
            y. ``backbones.branches(architecture)`` makes the paper's; any module with these shapes will do.
    """

    def __init__(self, architecture: Architecture, image: nn.Module | None, lidar: nn.Module | None) -> None:
        super().__init__()
        self.architecture, self.image, self.lidar = architecture, image, lidar
        self.head = CMTHead(architecture, 0 if lidar is None else lidar.channels)

    def forward(self, batch: Batch, targets: Targets | None = None) -> Predictions:
        """Predictions of all decoder layers; with ``targets`` also those of denoising queries.

        Raises:
            ValueError: a sensor is missing, calibration is singular, no point is in range.
        """
        image = bev = None
        size = (0, 0)
        if self.image is not None and batch.images is not None:
            image, size = self.image(batch.images), tuple(batch.images.shape[-2:])
        if self.lidar is not None and batch.points is not None:
            bev = self.lidar(batch.points)
        dn = None
        if targets is not None and self.architecture.dn_groups:
            dn = denoising_queries(targets, self.architecture)
        return self.head(bev, image, batch.lidar2img, size, dn)


# ---- matching and losses ---------------------------------------------------------------------------------------


def matching_cost(codes: Tensor, logits: Tensor, targets: Targets) -> Tensor:
    """Cost of giving query q of each layer and sample to box m: (L, B, Q, M).

    Focal cost of the box's class, and L1 distance of the first eight weighted entries of the code.
    """
    labels = targets.labels.clamp(max=logits.shape[-1] - 1)
    index = labels.view(1, len(labels), 1, -1).expand(len(logits), -1, logits.shape[2], -1)
    chosen = logits.gather(-1, index)
    p = chosen.sigmoid()
    positive = F.softplus(-chosen) * ALPHA * (1 - p).square()
    negative = F.softplus(chosen) * (1 - ALPHA) * p.square()
    weight = codes.new_tensor(CODE_WEIGHTS[:8])
    distance = torch.cdist(codes[..., :8] * weight, box_code(targets.boxes)[..., :8] * weight, p=1)
    return MATCH_CLASS * (positive - negative) + MATCH_BOX * distance


class Matches(NamedTuple):
    """Positions of matched pairs: layer, sample, query, box; (n,) int64 each."""

    layer: Tensor
    sample: Tensor
    query: Tensor
    box: Tensor


@torch.no_grad()
def match(codes: Tensor, logits: Tensor, targets: Targets) -> Matches:
    """Hungarian matching, every layer and sample by itself; all costs go to the CPU in one copy.

    Infinite and undefined costs (half precision overflows) count as large.
    """
    from scipy.optimize import linear_sum_assignment

    cost = matching_cost(codes.float(), logits.float(), targets)
    cost = cost.nan_to_num(1e5, 1e5, -1e5).cpu().numpy()
    rows = []
    for sample, count in enumerate(targets.valid.sum(1).tolist()):
        for layer in range(len(cost)):
            query, box = linear_sum_assignment(cost[layer, sample, :, :count])
            rows += [(layer, sample, q, m) for q, m in zip(query, box)]
    table = torch.tensor(rows, dtype=torch.long).reshape(len(rows), 4).to(codes.device)
    return Matches(*table.unbind(1))


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid focal loss with exponent 2 and balance 0.25, summed over all but the first dimension.

    Args:
        logits: (L, ..., K). labels: (L, ...), K for background.
    """
    target = F.one_hot(labels, logits.shape[-1] + 1)[..., :-1].to(logits)
    p = logits.sigmoid()
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = p + target - 2 * p * target
    balance = (1 - ALPHA) + (2 * ALPHA - 1) * target
    return (balance * wrong.square() * ce).flatten(1).sum(1)


def _box_loss(codes: Tensor, boxes: Tensor) -> Tensor:
    """Weighted L1 of codes and boxes, (n, 10) and (n, 9), summed; boxes without a finite code are left out."""
    target = box_code(boxes)
    finite = target.isfinite().all(-1, keepdim=True)
    return torch.where(finite, (codes - target).abs() * codes.new_tensor(CODE_WEIGHTS), 0.0).sum()


def losses(predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
    """Classification and box losses, of queries and denoising queries, summed over decoder layers.

    Returns:
        ``cls``, ``box`` and, when there are denoising queries, ``dn_cls``, ``dn_box``; the training loss is their sum.
    """
    codes, logits = predictions.codes, predictions.logits
    layers, samples, queries, classes = logits.shape
    found = match(codes, logits, targets)
    labels = torch.full((layers, samples, queries), classes, device=logits.device)
    labels[found[:3]] = targets.labels[found.sample, found.box]
    positive = len(found.layer) / layers
    average = max(positive + 0.1 * (samples * queries - positive), 1)
    box = _box_loss(codes[found[:3]], targets.boxes[found.sample, found.box])
    out = {"cls": LOSS_CLASS * focal_loss(logits, labels).sum() / average, "box": LOSS_BOX * box / max(positive, 1)}
    if predictions.dn is not None:
        dn = predictions.dn
        count = int(dn.valid.sum())
        average = max(count * 3.14159 / 6 * NOISE_SPLIT**3, 1)  # the authors' pi
        out["dn_cls"] = LOSS_CLASS * focal_loss(
            predictions.dn_logits[:, dn.valid], dn.labels[dn.valid].expand(layers, -1)
        ).sum() / average  # fmt: skip
        noisy = _box_loss(predictions.dn_codes[:, dn.valid], dn.boxes[dn.valid].expand(layers, -1, -1))
        out["dn_box"] = LOSS_BOX * noisy / max(count, 1)
    return {name: value.nan_to_num() for name, value in out.items()}


# ---- inference -------------------------------------------------------------------------------------------------


class Detections(NamedTuple):
    """Of one sample, best first: ``boxes`` (n, 9), ``scores`` (n,), ``labels`` (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detect(predictions: Predictions, most: int = 300, keep: Sequence[float] = POST_RANGE) -> list[Detections]:
    """The last layer's best ``most`` pairs of query and class with a centre inside of ``keep``; no suppression."""
    codes, scores = predictions.codes[-1], predictions.logits[-1].sigmoid()
    classes = scores.shape[-1]
    scores, index = scores.flatten(1).topk(min(most, scores[0].numel()), 1)
    boxes = code_box(codes.gather(1, (index // classes).unsqueeze(-1).expand(-1, -1, codes.shape[-1])))
    low, high = boxes.new_tensor(keep[:3]), boxes.new_tensor(keep[3:])
    inside = ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(-1)
    labels = index % classes
    return [Detections(*(x[i][inside[i]] for x in (boxes, scores, labels))) for i in range(len(boxes))]


# ---- the authors' checkpoints ----------------------------------------------------------------------------------

_RENAMED = (
    (r"img_neck\.lateral_convs\.(\d)\.conv\.", r"image.neck.lateral.\1."),
    (r"img_neck\.fpn_convs\.0\.conv\.", r"image.neck.output."),
    (r"img_backbone\.stage(\d)\.OSA\d_(\d+)\.layers\.(\d)\.[^/]+/", r"image.backbone.stages.<\1-2>.<\2-1>.layers.\3."),
    (r"img_backbone\.stage(\d)\.OSA\d_(\d+)\.concat\.[^/]+/", r"image.backbone.stages.<\1-2>.<\2-1>.concat."),
    (r"img_backbone\.stage(\d)\.OSA\d_(\d+)\.ese\.fc\.", r"image.backbone.stages.<\1-2>.<\2-1>.ese."),
    (r"img_backbone\.stem\.stem_(\d)/", r"image.backbone.stem.<\1-1>."),
    (r"img_backbone\.", r"image.backbone."),
    (r"pts_middle_encoder\.", r"lidar.encoder."),
    (r"pts_backbone\.", r"lidar.backbone."),
    (r"pts_neck\.", r"lidar.neck."),
    (r"pts_bbox_head\.shared_conv\.conv\.", r"head.shared_conv.0."),
    (r"pts_bbox_head\.shared_conv\.bn\.", r"head.shared_conv.1."),
    (r"pts_bbox_head\.reference_points\.weight", r"head.reference_points"),
    (r"pts_bbox_head\.(bev|rv)_embedding\.", r"head.encoding.\1_embedding."),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d)\.attentions\.0\.attn\.", r"head.layers.\1.self_attention."),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d)\.attentions\.1\.attn\.", r"head.layers.\1.cross_attention."),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d)\.ffns\.0\.layers\.0\.0\.", r"head.layers.\1.ffn.0."),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d)\.ffns\.0\.layers\.1\.", r"head.layers.\1.ffn.2."),
    (r"pts_bbox_head\.transformer\.decoder\.layers\.(\d)\.norms\.", r"head.layers.\1.norms."),
    (r"pts_bbox_head\.transformer\.decoder\.post_norm\.", r"head.post_norm."),
)
_CONV_BN = {"conv": "0", "norm": "1"}


def rename_official(name: str) -> str:
    """The name here of an entry of the authors' state dict, task heads aside; ``""`` when there is none."""
    for pattern, replacement in _RENAMED:
        found = re.match(pattern, name)
        if found:
            start = re.sub(r"<(\d+)-(\d)>", lambda m: str(int(m[1]) - int(m[2])), found.expand(replacement))
            rest = name[found.end() :]
            if found[0].endswith("/"):  # VoVNet: .../conv.weight
                kind, _, rest = rest.partition(".")
                rest = f"{_CONV_BN[kind]}.{rest}"
            return start + rest
    return ""


def _official_task_head(state: Mapping[str, Tensor], head: TaskHead) -> dict[str, Tensor]:
    """The fused parameters of ``head`` from the authors' grouped convolutions."""
    prefix, layers = "pts_bbox_head.task_heads.0.", len(head.weight1)

    def each(entry: str) -> list[Tensor]:
        return [state[f"{prefix}{branch}.{entry}"].unflatten(0, (layers, -1)) for branch in BRANCHES]

    def entries(weights: list[Tensor]) -> Tensor:  # (L, out, in, kernel) -> (L, kernel, in, all outputs)
        return torch.cat([weight.permute(0, 3, 2, 1) for weight in weights], -1)

    return {
        "head.task_head.weight1": entries(each("0.weight")).flatten(1, 2),
        "head.task_head.norm_weight": torch.cat(each("1.weight"), -1).unsqueeze(1),
        "head.task_head.norm_bias": torch.cat(each("1.bias"), -1).unsqueeze(1),
        "head.task_head.weight2": entries(each("3.weight")),
        "head.task_head.bias2": torch.cat(each("3.bias"), -1).unsqueeze(1),
    }


def load_official(model: CMT, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of the authors' detector, of the same architecture.

    Their boxes are right with ``official_channel_order=True``. Sparse weights are accepted in spconv 2's layout (out
    first) and in mmcv's.

    Raises:
        ValueError: entries are missing, left over or of another shape; the first of them is named.
    """
    expected = model.state_dict()
    found: dict[str, Tensor] = {}
    try:
        found |= _official_task_head(state, model.head.task_head)
    except KeyError as error:
        raise ValueError(f"checkpoint lacks {error.args[0]}; expected a CMT detector of the authors") from error
    left = []
    for name, value in state.items():
        if name.startswith("pts_bbox_head.task_heads.0."):
            continue
        ours = rename_official(name)
        if ours not in expected:
            left.append(name)
            continue
        if value.ndim == 5 and value.shape != expected[ours].shape:
            value = value.permute(1, 2, 3, 4, 0)
        found[ours] = value
    missing = sorted(set(expected) - set(found))
    wrong = sorted(name for name in found if found[name].shape != expected[name].shape)
    for what, names in (("left over", left), ("missing", missing), ("of another shape", wrong)):
        if names:
            raise ValueError(f"checkpoint does not fit: {len(names)} entries are {what}, first {names[0]}")
    model.load_state_dict(found)


def load_image_backbone(model: CMT, state: Mapping[str, Tensor]) -> None:
    """Load a published image backbone (FCOS3D's VoVNet, nuImages' ResNet); other entries of the file are ignored.

    Counters of batches, which frozen batch norms do not have, may be missing.

    Raises:
        ValueError: an entry of the backbone is missing or of another shape; the first is named.
    """
    backbone = model.image.backbone
    plain = {name.removeprefix("img_backbone.").removeprefix("backbone."): value for name, value in state.items()}
    found = {rename_official(f"img_backbone.{name}").removeprefix("image.backbone."): v for name, v in plain.items()}
    expected = backbone.state_dict()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, value)
        if name not in found or found[name].shape != value.shape:
            raise ValueError(f"the image checkpoint has no {name} of shape {tuple(value.shape)}")
    backbone.load_state_dict({name: found[name] for name in expected})


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
