"""Workloads of papers/cmt: the head at two sizes, its parts, sparse convolution, scoring, and one real frame.

Both sides have the same weights and, where they are compared in tests, the same results. The straightforward form
multiplies the points of all rays out, runs one grouped convolution for each output, materialises attention, and matches
layer by layer and sample by sample. Rows on the real frame need it at $REPRO_DATA or ../shared/data.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from papers.cmt import backbones, data, evaluation, model
from tools.bench import Workload

SMALL = replace(model.ARCHITECTURES["small"], classes=10, dn_groups=3, pc_range=(-16.0, -16.0, -2.0, 16.0, 16.0, 2.0))
SIZES = {
    "small head (8 samples, 544 tokens)": (SMALL, 64, 8, 16, (6, 12), 4),
    "full head (1 sample, 22,384 tokens)": (model.ARCHITECTURES["fusion-r50"], 512, 1, 128, (20, 50), 6),
}
"""Architecture, LiDAR channels, samples, side of the LiDAR map, rows and columns of an image map, views."""


# ---- straightforward form


def plain_rays(encoding: model.CoordinatesEncoding, cameras: model.Cameras, pixels: Tensor) -> Tensor:
    """All points of all rays, multiplied out, through both layers: (B, V, n, C)."""
    points = F.pad(pixels.unsqueeze(-2) * encoding.depths.view(-1, 1), (0, 1), value=1.0)
    points = points.expand(*cameras.inverse.shape[:2], *points.shape[-3:])
    points = torch.einsum("bvndo,bvco->bvndc", points, cameras.inverse)[..., :3]
    return encoding.rv_embedding(((points - encoding.low) / encoding.span).flatten(-2))


def plain_queries(encoding: model.CoordinatesEncoding, reference: Tensor, cameras: model.Cameras) -> Tensor:
    """Encoding of reference points, every layer for every view."""
    reference = model.inverse_sigmoid(reference).sigmoid()
    out = encoding.bev_embedding(model.embed_bev(reference[..., :2], encoding.architecture.width))
    points = F.pad(reference * encoding.span + encoding.low, (0, 1), value=1.0)
    projected = torch.einsum("bnd,bvcd->bvnc", points, cameras.forward)
    depth = projected[..., 2:3].detach()
    pixels = projected[..., :3] / (depth + torch.where(depth > 0, 1e-6, -1e-6))
    u, v = pixels[..., 0], pixels[..., 1]
    seen = (depth[..., 0] > 0) & (u >= 0) & (u < cameras.size[1]) & (v >= 0) & (v < cameras.size[0])
    return out + (plain_rays(encoding, cameras, pixels) * seen.unsqueeze(-1)).sum(1)


def plain_cells(encoding: model.CoordinatesEncoding, side: int) -> Tensor:
    """Encoding of a grid, cell by cell."""
    axis = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], -1).flatten(0, 1)
    return encoding.bev_embedding(model.embed_bev(grid, encoding.architecture.width))


def plain_attention(
    layer: model.Attention, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None
) -> Tensor:
    """Attention with its scores in memory, and a padding mask of zeros."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases)
    )
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + key.new_zeros(len(key), 1, 1, key.shape[1])
    if blocked is not None:
        scores = scores.masked_fill(blocked, -torch.inf)
    weight = F.dropout(scores.softmax(-1), layer.dropout, layer.training)
    return layer.out_proj((weight @ v).transpose(1, 2).flatten(2))


class GroupedHead(nn.Module):
    """A convolution with groups and a norm for each output, as the authors have it."""

    def __init__(self, a: model.Architecture) -> None:
        super().__init__()
        layers, hidden = a.layers, a.head_width
        self.first, self.last = nn.ModuleList(), nn.ModuleList()
        for size in (2, 1, 3, 2, 2, a.classes):
            self.first.append(nn.Conv1d(a.width * layers, hidden * layers, 1, groups=layers, bias=False))
            self.last.append(nn.Conv1d(hidden * layers, size * layers, 1, groups=layers))
        self.norm = nn.ParameterList(torch.ones(hidden * layers) for _ in self.first)
        self.bias = nn.ParameterList(torch.zeros(hidden * layers) for _ in self.first)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As ``TaskHead``."""
        n, b, q, c = x.shape
        x, out = x.permute(1, 0, 3, 2).reshape(b, n * c, q), {}
        for name, first, last, weight, bias in zip(model.BRANCHES, self.first, self.last, self.norm, self.bias):
            y = first(x).view(b, n, -1, q)
            y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
            y = (y.flatten(1, 2) * weight.view(1, -1, 1) + bias.view(1, -1, 1)).relu()
            out[name] = last(y).view(b, n, -1, q).permute(1, 0, 3, 2)
        return out


def plain_head(
    head: model.CMTHead, bev: Tensor, image: Tensor, matrix: Tensor, size: tuple[int, int], dn: model.Denoising | None
) -> model.Predictions:
    """The head, part by part as described; ``head.task_head`` is a ``GroupedHead``."""
    cameras = model.Cameras.of(matrix, size, bev.device)
    reference, blocked = head.reference_points.expand(len(bev), -1, -1), None
    if dn is not None:
        count = dn.reference.shape[1]
        reference = torch.cat([dn.reference, reference], 1)
        blocked = ~model.denoising_mask(count, dn.group, head.architecture.queries, bev.device)
    tokens = head.shared_conv(bev).flatten(2).transpose(1, 2)
    memory = torch.cat([tokens, image.permute(0, 1, 3, 4, 2).flatten(1, 3)], 1)
    pixels = head.encoding.pixels(*image.shape[-2:], size)
    rays = plain_rays(head.encoding, cameras, pixels).flatten(1, 2)
    position = torch.cat([plain_cells(head.encoding, bev.shape[-1]).expand(len(bev), -1, -1), rays], 1)
    where = plain_queries(head.encoding, reference, cameras)
    x, outputs = torch.zeros_like(where), []
    for layer in head.layers:
        query = x + where
        x = layer.norms[0](x + layer.dropout(plain_attention(layer.self_attention, query, query, x, blocked)))
        cross = plain_attention(layer.cross_attention, x + where, memory + position, memory, None)
        x = layer.norms[1](x + layer.dropout(cross))
        x = layer.norms[2](x + layer.ffn(x))
        outputs.append(head.post_norm(x))
    codes, logits = head.decode_layers(torch.stack(outputs).nan_to_num(), reference)
    if dn is None:
        return model.Predictions(codes, logits)
    return model.Predictions(codes[:, :, count:], logits[:, :, count:], codes[:, :, :count], logits[:, :, :count], dn)


def plain_match(codes: Tensor, logits: Tensor, targets: model.Targets) -> model.Matches:
    """Matching with a copy to the host for every layer and sample."""
    rows = []
    for layer in range(len(codes)):
        for sample in range(codes.shape[1]):
            keep = targets.valid[sample]
            one = model.Targets(
                targets.boxes[sample : sample + 1, keep], targets.labels[sample : sample + 1, keep], keep
            )
            here = (x[layer : layer + 1, sample : sample + 1].detach() for x in (codes, logits))
            cost = model.matching_cost(*here, one)[0, 0].cpu().numpy()
            rows += [(layer, sample, q, m) for q, m in zip(*linear_sum_assignment(cost))]
    return model.Matches(*torch.tensor(rows).unbind(1))


# ---- workloads


@functools.cache
def inputs(size: str) -> tuple[model.CMTHead, Tensor, Tensor, Tensor, tuple[int, int], model.Targets]:
    """A head with random features, cameras around the origin, and two to six boxes a sample."""
    a, channels, samples, side, (rows, columns), views = SIZES[size]
    torch.manual_seed(0)
    head = model.CMTHead(a, channels)
    bev, image = torch.randn(samples, channels, side, side), torch.randn(samples, views, a.width, rows, columns)
    stride = 8 if a.image_backbone == "small" else 16
    pixels = (rows * stride, columns * stride)
    angle = torch.arange(views) * (2 * torch.pi / views)
    zero, one = torch.zeros(views), torch.ones(views)
    turn = torch.stack([angle.sin(), -angle.cos(), zero, zero, zero, -one, angle.cos(), angle.sin(), zero], 1)
    matrix = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    focal = pixels[1] / 2
    k = torch.tensor([[focal, 0, pixels[1] / 2], [0, focal, pixels[0] / 2], [0, 0, 1]], dtype=torch.float64)
    matrix[:, :3, :3] = k @ turn.view(-1, 3, 3).double()
    boxes, labels = [], []
    for sample in range(samples):
        n = 2 + sample % 5
        u = torch.rand(n, 9)
        centre = (u[:, :3] - 0.5) * head.encoding.span * 0.8
        boxes.append(torch.cat([centre, 1 + 3 * u[:, 3:6], 6 * u[:, 6:7] - 3, torch.zeros(n, 2)], 1))
        labels.append(torch.randint(a.classes, (n,)))
    return head, bev, image, matrix.unsqueeze(0), pixels, model.Targets.pad(boxes, labels)


def head_step(size: str, form: str, training: bool) -> Callable[[], Any]:
    """A training step with losses, matching, clipping and AdamW, or a forward pass."""
    import copy

    head, bev, image, matrix, pixels, targets = inputs(size)
    head = copy.deepcopy(head).train(training)
    per_sample = matrix.expand(len(bev), -1, -1, -1)
    run: Callable[..., model.Predictions] = head
    if form == "plain":
        head.task_head = GroupedHead(head.architecture)
        run, matrix = functools.partial(plain_head, head), per_sample
    optimizer = torch.optim.AdamW(head.parameters(), 1e-4, fused=form == "ours")

    def forward() -> None:
        with torch.no_grad():
            run(bev, image, matrix, pixels, None)

    def step() -> None:
        optimizer.zero_grad()
        out = run(bev, image, matrix, pixels, model.denoising_queries(targets, head.architecture))
        matching = model.match
        if form == "plain":
            model.match = plain_match
        try:
            sum(model.losses(out, targets).values()).backward()
        finally:
            model.match = matching
        nn.utils.clip_grad_norm_(head.parameters(), 35)
        optimizer.step()

    return step if training else forward


@torch.no_grad()
def part(name: str, form: str) -> Callable[[], Any]:
    """A part of the full head."""
    head, bev, image, matrix, pixels, _ = inputs("full head (1 sample, 22,384 tokens)")
    encoding, cameras = head.encoding, model.Cameras.of(matrix, pixels, torch.device("cpu"))
    reference, where = head.reference_points.detach().unsqueeze(0), encoding.pixels(20, 50, pixels)
    grouped, hidden = GroupedHead(head.architecture), torch.randn(6, 1, 900, 256)
    steps: dict[str, Callable[[], Any]] = {
        "rays ours": lambda: encoding.tokens(cameras, 20, 50),
        "rays plain": lambda: plain_rays(encoding, cameras, where),
        "queries ours": lambda: encoding.queries(reference, cameras),
        "queries plain": lambda: plain_queries(encoding, reference, cameras),
        "cells ours": lambda: encoding.cells(180),
        "cells plain": lambda: plain_cells(encoding, 180),
        "outputs ours": lambda: head.task_head(hidden),
        "outputs plain": lambda: grouped(hidden),
    }
    return torch.no_grad()(steps[f"{name} {form}"])


def matching(form: str) -> Callable[[], Any]:
    """Matching of 3 layers x 8 samples."""
    _, bev, _, _, _, targets = inputs("small head (8 samples, 544 tokens)")
    codes, logits = torch.randn(3, len(bev), 40, 10), torch.randn(3, len(bev), 40, 10)
    run = model.match if form == "ours" else plain_match
    return lambda: run(codes, logits, targets)


@functools.cache
def sites() -> tuple[backbones.Sites, Tensor]:
    """A shell of about 20,000 voxels in a grid of 41 x 192 x 192."""
    generator = torch.Generator().manual_seed(0)
    ground = 4 + 2 * torch.rand(192, 192, generator=generator)
    z = torch.arange(41).view(-1, 1, 1)
    occupied = ((z - ground).abs() < 0.5) & (torch.rand(192, 192, generator=generator) < 0.6)
    keys = occupied.flatten().nonzero().squeeze(1)
    return backbones.Sites.of(keys, (41, 192, 192), 1), torch.randn(len(keys), 32, generator=generator)


def convolution(form: str) -> Callable[[], Any]:
    """A block of two submanifold convolutions, 32 channels; ours finds the neighbours each time."""
    where, x = sites()
    torch.manual_seed(0)
    block = backbones.SparseBlock(32).eval()
    if form == "ours":
        return torch.no_grad()(lambda: block(x, backbones.submanifold_rules(where)))
    dense = torch.zeros(41 * 192 * 192, 32).index_copy(0, where.keys, x).view(1, 41, 192, 192, 32)
    dense = dense.permute(0, 4, 1, 2, 3).contiguous()
    mask = torch.zeros(41 * 192 * 192).index_fill(0, where.keys, 1).view(1, 1, 41, 192, 192)
    weights = [conv.weight.permute(4, 3, 0, 1, 2).contiguous() for conv in (block.conv1, block.conv2)]

    @torch.no_grad()
    def run() -> Tensor:
        y = F.relu(block.bn1(F.conv3d(dense, weights[0], padding=1).flatten(2)).view_as(dense)) * mask
        y = F.conv3d(y, weights[1], padding=1)
        return F.relu(block.bn2(y.flatten(2)).view_as(dense) + dense) * mask

    return run


def voxels(form: str) -> Callable[[], Any]:
    """Voxelisation of 150,000 points."""
    a = model.ARCHITECTURES["fusion-vov"]
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(150_000, 5, generator=generator) * torch.tensor([20.0, 20, 1, 50, 0.1])
    if form == "ours":
        return lambda: backbones.voxelise([cloud], a, 120_000)
    from mmcv.ops import Voxelization

    layer = Voxelization(list(a.voxel), list(a.pc_range), a.max_points, 120_000)

    def run() -> Tensor:
        table, _, count = layer(cloud)
        return table.sum(1) / count.unsqueeze(1)

    return run


def scoring(form: str) -> Callable[[], Any]:
    """Scores of 100 samples with some 30 boxes and 100 detections each."""
    rng = np.random.default_rng(0)

    def boxes(n: int) -> np.ndarray:
        size = rng.uniform(0.5, 4, (n, 3))
        return np.concatenate(
            [rng.uniform(-25, 25, (n, 3)), size, rng.uniform(-3, 3, (n, 1)), rng.normal(size=(n, 2))], 1
        )

    truth = [evaluation.Boxes(boxes(30), rng.integers(0, 10, 30), None, np.full(30, -1)) for _ in range(100)]
    found = [
        evaluation.Boxes(boxes(100), rng.integers(0, 10, 100), rng.random(100), np.full(100, -1)) for _ in range(100)
    ]
    if form == "ours":
        return lambda: evaluation.evaluate(truth, found, data.CLASSES)
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.algo import accumulate
    from nuscenes.eval.detection.data_classes import DetectionBox

    def converted(side: list[evaluation.Boxes]) -> EvalBoxes:
        out = EvalBoxes()
        for i, part_ in enumerate(side):
            scores = np.full(len(part_.boxes), -1.0) if part_.scores is None else part_.scores
            rows = [
                DetectionBox(
                    str(i), tuple(b[:3]), tuple(b[3:6]), (np.cos(b[6] / 2), 0, 0, np.sin(b[6] / 2)), tuple(b[7:]),
                    detection_name=data.CLASSES[label], detection_score=float(score),
                )
                for b, label, score in zip(part_.boxes, part_.labels, scores)
            ]  # fmt: skip
            out.add_boxes(str(i), rows)
        return out

    real, guess = converted(truth), converted(found)

    def run() -> None:
        for name in data.CLASSES:
            for distance in evaluation.DISTANCES:
                accumulate(real, guess, name, center_distance, distance)

    return run


def frame_folder() -> Path:
    """Where the real frame lies, or would."""
    root = Path(os.environ.get("REPRO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    return root / "nuscenes-one-frame"


@functools.cache
def frame(name: str) -> tuple[model.CMT, model.Batch]:
    """A detector at the paper's size in evaluation, and the real frame as its input."""
    a = model.ARCHITECTURES[name]
    torch.manual_seed(0)
    net = model.CMT(a, *backbones.branches(a)).eval()
    size = (640, 1600) if name == "fusion-vov" else (320, 800)
    source = data.NuScenes(data.locate(frame_folder(), "val"), "fusion", a.pc_range, size)
    sample = source.sample(0)
    images = data.normalise(sample.images.unsqueeze(0), model.IMAGE_MEAN, model.IMAGE_STD)
    return net, model.Batch(images, [sample.points], sample.lidar2img.unsqueeze(0))


def frame_part(name: str, what: str) -> Callable[[], Any]:
    """A forward pass of the real frame or one of its parts."""
    net, batch = frame(name)
    side, (height, width) = net.architecture.bev_cells, batch.images.shape[-2:]
    bev, image = torch.randn(1, 512, side, side), torch.randn(1, 6, 256, height // 16, width // 16)
    steps: dict[str, Callable[[], Any]] = {
        "all": lambda: model.detect(net(batch)),
        "one image": lambda: net.image(batch.images[:, :1]),
        "points": lambda: net.lidar(batch.points),
        "head": lambda: net.head(bev, image, batch.lidar2img, (height, width)),
    }
    return torch.no_grad()(steps[what])


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    small, full = SIZES
    plain, official = "straightforward form", "official code on 2 CPU threads, processor seconds"
    for name, size, training, known in (
        (f"training step, {small}", small, True, 0.196),
        (f"forward, {small}", small, False, 0.073),
        (f"forward, {full}", full, False, 12.4),
    ):
        ours = bind(head_step, size, "ours", training)
        yield Workload(name, ours, bind(head_step, size, "plain", training), plain)
        title = f"{name}, processor seconds"
        yield Workload(title, ours, None, official, other_seconds=known, target=2.0, clock=time.process_time)
    for name, key, target in (
        ("rays of 6,000 image tokens", "rays", None),  # the second layer, the same in both, is the larger part
        ("900 queries in six views", "queries", 2.0),
        ("180 x 180 cells", "cells", 2.0),
        ("outputs of 900 queries, six layers", "outputs", None),
    ):
        yield Workload(name, bind(part, key, "ours"), bind(part, key, "plain"), plain, target=target)
    rays = "rays of 6,000 image tokens, processor seconds"
    yield Workload(
        rays, bind(part, "rays", "ours"), None, official, other_seconds=0.184, target=2.0, clock=time.process_time
    )
    one_by_one = "a copy to the host for each layer and sample"
    yield Workload(
        "matching, 3 layers x 8 samples", bind(matching, "ours"), bind(matching, "plain"), one_by_one, target=2.0
    )
    yield Workload(
        "sparse residual block, 22,000 of 1.5 million cells, 32 channels",
        bind(convolution, "ours"),
        bind(convolution, "dense"),
        "dense conv3d",
        target=2.0,
    )
    yield Workload("voxels of 150,000 points", bind(voxels, "ours"), bind(voxels, "mmcv"), "mmcv Voxelization")
    yield Workload(
        "scores of 100 samples",
        bind(scoring, "ours"),
        bind(scoring, "devkit"),
        "nuscenes-devkit accumulate",
        target=2.0,
    )
    if frame_folder().is_dir():
        for name in ("fusion-r50", "fusion-vov"):
            for what in ("points", "head", "one image", "all"):
                yield Workload(f"real frame, {name}, {what}", bind(frame_part, name, what))
