"""Tests of papers/cmt. References are written from the definitions, or taken from other implementations."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.cmt import backbones, data, evaluation, model
from shared.errors import UserError

FULL = model.ARCHITECTURES["fusion-vov"]
SMALL = model.ARCHITECTURES["small"]
TINY = replace(
    SMALL, width=16, heads=2, layers=2, ffn=24, queries=12, depth_bins=5, head_width=6, dn_groups=3, quick_start=False
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def detector(a: model.Architecture) -> model.CMT:
    return model.CMT(a, *backbones.branches(a))


def cameras(samples: int = 1, size: tuple[int, int] = (32, 64)) -> model.Cameras:
    intrinsics, lidar2cam = data.scene_cameras()
    projection = F.pad(intrinsics, (0, 1, 0, 1))
    projection[:, 3, 3] = 1
    return model.Cameras.of((projection @ lidar2cam).expand(samples, -1, -1, -1), size, torch.device("cpu"))


def some_targets(samples: int = 3, classes: int = 4, seed: int = 0) -> model.Targets:
    boxes, labels = [], []
    for i in range(samples):
        n = 2 + i
        centre = 20 * torch.rand(n, 3, generator=gen(seed + i)) * torch.tensor([1, 1, 0.1]) - torch.tensor([10, 10, 1])
        rest = torch.rand(n, 6, generator=gen(seed + i + 9))
        boxes.append(torch.cat([centre, 1 + 3 * rest[:, :3], 6 * rest[:, 3:4] - 3, rest[:, 4:]], 1))
        labels.append(torch.randint(classes, (n,), generator=gen(seed + i)))
    return model.Targets.pad(boxes, labels)


def head_inputs(a: model.Architecture, samples: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    bev = torch.randn(samples, a.width, 4, 4, generator=gen(seed))
    image = torch.randn(samples, 4, a.width, 3, 6, generator=gen(seed + 1))
    return bev, image, cameras(samples).forward.double()


# ---- sizes


def test_parameters_of_the_full_head() -> None:
    with torch.device("meta"):
        head = model.CMTHead(FULL)
    count = model.parameters
    assert count(head.shared_conv) == 1_180_160
    assert head.reference_points.numel() == 2_700
    assert count(head.encoding.bev_embedding) == 197_120
    assert count(head.encoding.rv_embedding) == 460_032
    assert {count(layer) for layer in head.layers} == {1_053_440}
    assert count(head.layers) + count(head.post_norm) == 6_321_152
    assert count(head.task_head) == 602_232
    assert count(head) == 8_763_396


def test_every_preset_builds_at_the_papers_size(train) -> None:
    heads = {"fusion-vov": 8_763_396, "fusion-r50": 8_763_396, "camera": 8_763_396 - 1_180_160}
    heads["lidar"] = 8_763_396 - 460_032 + 2 * (589_824 + 7_680)  # no rays; kernels of 3 in the task heads
    for name, preset in train.PRESETS.items():
        for arm in preset.config.arms:
            with torch.device("meta"):
                net = train.make(preset.config, arm)
                groups = train.make_optimizer(net, preset.config).param_groups
            assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
            if name in heads:
                assert model.parameters(net.head) == heads[name]
    assert set(train.SIZES) == set(model.ARCHITECTURES)
    assert model.ARCHITECTURES["fusion-vov"].grid == (1440, 1440, 40)
    assert (
        model.ARCHITECTURES["fusion-r50"].grid[:2] == model.ARCHITECTURES["fusion-r50-official"].grid[:2] == (1024,) * 2
    )


@pytest.mark.parametrize("name", ["fusion-vov", "fusion-r50", "lidar", "camera"])
def test_one_training_step_at_full_width_and_depth(name) -> None:
    """On the smallest input: 16 voxels across the narrowest grid, images of two tokens across."""
    a = model.ARCHITECTURES[name]
    half = 16 * a.voxel[0]
    a = replace(a, pc_range=(-half, -half, -5.0, half, half, 3.0), queries=40, dn_groups=2)
    net = detector(a).train()
    torch.manual_seed(1)
    points = [torch.rand(60, 5) * torch.tensor([2 * half, 2 * half, 6, 255, 0.5]) - torch.tensor([half, half, 4, 0, 0])]
    projection = torch.eye(4).repeat(1, 6, 1, 1)
    images = torch.randn(1, 6, 3, 32, 64)
    batch = model.Batch(
        None if a.modality == "lidar" else images, None if a.modality == "camera" else points, projection
    )
    targets = model.Targets(
        torch.tensor([[[0.5, 0.3, 0, 4, 2, 1.5, 0.3, 0, 0]]]), torch.zeros(1, 1).long(), torch.ones(1, 1) > 0
    )
    loss = sum(model.losses(net(batch, targets), targets).values())
    loss.backward()
    assert loss.isfinite()
    learns = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    silent = {name for name, _ in net.named_parameters()} - learns
    # dying units; the content of queries is zero before the first layer, so nothing passes its self-attention
    idle = ("stages", "layers.0.self_attention", "layers.0.norms.0.weight")
    assert not [name for name in silent if not any(part in name for part in idle)]


# ---- coordinates encoding


def test_embedding_by_hand() -> None:
    expected = torch.tensor([0, -1, 0.8660, -0.5, 1, 0, 0.8660, 0.5])
    torch.testing.assert_close(model.embed_bev(torch.tensor([0.25, 0.5]), 4), expected, atol=1e-4, rtol=0)


def ray_points(encoding: model.CoordinatesEncoding, cams: model.Cameras, pixels: Tensor) -> Tensor:
    """The points of rays one by one, normalised: (B, V, n, D, 3)."""
    depth = encoding.depths.view(-1, 1)
    points = F.pad(pixels.unsqueeze(-2) * depth, (0, 1), value=1.0)
    back = torch.einsum("bvndo,bvco->bvndc", points.expand(*cams.inverse.shape[:2], *points.shape[-3:]), cams.inverse)
    return (back[..., :3] - encoding.low) / encoding.span


def test_image_position_input_by_hand() -> None:
    encoding = model.CoordinatesEncoding(replace(FULL, width=8))
    identity = model.Cameras.of(torch.eye(4).view(1, 1, 4, 4), (320, 800), torch.device("cpu"))
    assert encoding.depths[0] == 1 and encoding.depths[63] == 53.171875
    direction, origin = encoding.rays(identity, encoding.pixels(20, 50, (320, 800)))
    torch.testing.assert_close((direction + origin)[0, 0, 0], torch.tensor([0.5, 0.5, 0.75]))


def test_position_encodings_equal_the_plain_form() -> None:
    """Sums over depth bins and axes are folded into the first layers: same numbers as multiplying them out."""
    a = replace(TINY, bev_position=True)
    encoding, cams = model.CoordinatesEncoding(a), cameras(2)
    pixels = encoding.pixels(4, 8, (32, 64))
    plain = encoding.rv_embedding(ray_points(encoding, cams, pixels).flatten(-2)).flatten(1, 2)
    torch.testing.assert_close(encoding.tokens(cams, 4, 8), plain, atol=1e-5, rtol=1e-4)
    axis = (torch.arange(5) + 0.5) / 5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = model.embed_bev(torch.stack([x, y], -1).flatten(0, 1), a.width)
    torch.testing.assert_close(encoding.cells(5), encoding.bev_embedding(grid), atol=1e-5, rtol=1e-4)


def test_a_point_on_a_tokens_ray_is_encoded_like_the_token() -> None:
    """The alignment that the paper rests on."""
    a = replace(TINY, bev_position=False)
    encoding, cams = model.CoordinatesEncoding(a), cameras()
    pixels, tokens = encoding.pixels(4, 8, (32, 64)), encoding.tokens(cams, 4, 8).view(4, 32, -1)
    for view, token, depth in ((0, 13, 4.0), (1, 19, 9.0), (3, 21, 2.5)):
        direction, origin = encoding.rays(cams, pixels)
        reference = direction[0, view, token] * depth + origin[0, view, 0]
        assert ((reference > 0) & (reference < 1)).all()
        got = encoding.queries(reference.view(1, 1, 3), cams)[0, 0]
        torch.testing.assert_close(got, tokens[view, token], atol=1e-4, rtol=1e-3)


def test_a_quick_start_attends_to_cells_and_rays_alike() -> None:
    """Encodings of both sensors begin with zero mean and one spread; queries and keys with equal projections."""
    torch.manual_seed(0)
    head = model.CMTHead(model.ARCHITECTURES["small"], 64)
    cells, tokens = head.encoding.cells(16).detach(), head.encoding.tokens(cameras(), 4, 8)[0].detach()
    for encodings in (cells, tokens):
        assert 6 < float(encodings.std(0).norm()) < 18 and float(encodings.mean(0).norm()) < 6
    assert float(cells.mean(0).norm()) < 1e-4
    for layer in head.layers:
        queries, keys, _ = layer.cross_attention.in_proj_weight.chunk(3)
        assert torch.equal(queries, keys)


def test_queries_sum_over_the_views_that_see_them() -> None:
    encoding, cams = model.CoordinatesEncoding(TINY), cameras(2)
    reference = torch.rand(2, 20, 3, generator=gen())
    points = F.pad(reference * encoding.span + encoding.low, (0, 1), value=1.0)
    out = encoding.bev_embedding(model.embed_bev(reference[..., :2], TINY.width))
    for b, n, v in itertools.product(range(2), range(20), range(4)):
        q = cams.forward[b, v] @ points[b, n]
        pixel = q[:3] / (q[2] + (1e-6 if q[2] > 0 else -1e-6))
        if q[2] > 0 and 0 <= pixel[0] < 64 and 0 <= pixel[1] < 32:
            one = model.Cameras(cams.forward[b : b + 1, v : v + 1], cams.inverse[b : b + 1, v : v + 1], (32, 64))
            out[b, n] += encoding.rv_embedding(ray_points(encoding, one, pixel.view(1, 3)).flatten())
    torch.testing.assert_close(encoding.queries(reference, cams), out, atol=1e-4, rtol=1e-3)


def test_the_order_of_views_and_tokens_means_nothing() -> None:
    head = model.CMTHead(TINY, TINY.width).eval()
    bev, image, projection = head_inputs(TINY)
    with torch.no_grad():
        first = head(bev, image, projection, (32, 64))
        other = head(bev, image[:, [2, 0, 3, 1]], projection[:, [2, 0, 3, 1]], (32, 64))
        torch.testing.assert_close(first.codes, other.codes, atol=1e-4, rtol=1e-4)
        key, value = torch.randn(2, 3, 50, TINY.width, generator=gen())
        x, position = torch.randn(2, 3, 7, TINY.width, generator=gen(1))
        order = torch.randperm(50, generator=gen(2))
        layer = head.layers[0]
        torch.testing.assert_close(
            layer(x, position, key, value, None), layer(x, position, key[:, order], value[:, order], None)
        )


def test_cameras_shared_by_all_samples_equal_their_copies() -> None:
    head = model.CMTHead(TINY, TINY.width).eval()
    bev, image, projection = head_inputs(TINY)
    with torch.no_grad():
        a, b = head(bev, image, projection, (32, 64)), head(bev, image, projection[:1], (32, 64))
    torch.testing.assert_close(a.codes, b.codes)


def test_attention_equals_torch() -> None:
    ours, peer = model.Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    peer.load_state_dict(ours.state_dict())
    q, k, v = torch.randn(3, 2, 9, 16, generator=gen())
    allowed = model.denoising_mask(4, 2, 5, torch.device("cpu"))
    torch.testing.assert_close(ours(q, k, v, allowed), peer(q, k, v, attn_mask=~allowed)[0], atol=1e-6, rtol=1e-5)


# ---- task heads and boxes


class OfficialBranch(nn.Module):
    """One of the authors' branches: grouped 1-D convolutions over the queries, a layer norm for each group."""

    def __init__(self, width: int, hidden: int, size: int, layers: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width * layers, hidden * layers, kernel, padding=kernel // 2, groups=layers, bias=False)
        self.weight, self.bias = (nn.Parameter(torch.randn(hidden * layers)) for _ in range(2))
        self.last = nn.Conv1d(hidden * layers, size * layers, kernel, padding=kernel // 2, groups=layers)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        n, b, q, c = x.shape
        y = self.first(x.permute(1, 0, 3, 2).reshape(b, n * c, q)).view(b, n, -1, q)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        y = y.flatten(1, 2) * self.weight.view(1, -1, 1) + self.bias.view(1, -1, 1)
        return self.last(y.relu()).view(b, n, -1, q).permute(1, 0, 3, 2)

    def entries(self, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}.0.weight": self.first.weight, f"{prefix}.1.weight": self.weight, f"{prefix}.1.bias": self.bias,
            f"{prefix}.3.weight": self.last.weight, f"{prefix}.3.bias": self.last.bias,
        }  # fmt: skip


@pytest.mark.parametrize("kernel", [1, 3])
def test_fused_task_heads_equal_the_authors_grouped_convolutions(kernel) -> None:
    torch.manual_seed(3)
    head = model.TaskHead(16, 3, 4, 6, kernel)
    peers = {name: OfficialBranch(16, 6, size, 3, kernel) for name, size in zip(model.BRANCHES, head.sizes)}
    state = {}
    for name, peer in peers.items():
        state |= peer.entries(f"pts_bbox_head.task_heads.0.{name}")
    loaded = model._official_task_head(state, head)
    head.load_state_dict({name.removeprefix("head.task_head."): value for name, value in loaded.items()})
    x = torch.randn(3, 2, 7, 16)
    out = head(x)
    for name, peer in peers.items():
        torch.testing.assert_close(out[name], peer(x), atol=1e-5, rtol=1e-4)
    assert model.parameters(head) == sum(model.parameters(peer) for peer in peers.values())


def test_box_code_goes_there_and_back() -> None:
    boxes = some_targets().boxes[2]
    code = model.box_code(boxes)
    torch.testing.assert_close(model.code_box(code), boxes)
    row, (x, y, z, d0, d1, d2, yaw, vx, vy) = code[0], boxes[0].tolist()
    expected = [x, y, math.log(d0), math.log(d1), z, math.log(d2), math.sin(yaw), math.cos(yaw), vx, vy]
    torch.testing.assert_close(row, torch.tensor(expected))


def test_channel_orders() -> None:
    """The bounded output is the height; in the authors' order it stands where the log of the first length is learnt."""
    torch.manual_seed(0)
    head = model.CMTHead(TINY, TINY.width).eval()
    bev, image, projection = head_inputs(TINY)
    with torch.no_grad():
        ours = head(bev, image, projection, (32, 64)).codes
        head.architecture = replace(TINY, official_channel_order=True)
        theirs = head(bev, image, projection, (32, 64)).codes
    assert ((ours[..., 4] >= -2) & (ours[..., 4] <= 2)).all()
    torch.testing.assert_close(theirs[..., [0, 1, 3, 4, 2, 5, 6, 7, 8, 9]], ours)


def test_a_quick_start_looks_near_and_predicts_reference_points() -> None:
    torch.manual_seed(0)
    for quick in (False, True):
        head = model.CMTHead(replace(SMALL, quick_start=quick), SMALL.width).eval()
        with torch.no_grad():
            place = head.encoding.cells(12)
            weights = head.layers[0].cross_attention.in_proj_weight.chunk(3)[:2]
            q, k = (F.linear(place, weight).unflatten(-1, (4, 16)) for weight in weights)
            attention = (torch.einsum("qhd,khd->hqk", q, k) / 4).softmax(-1)
            cell = torch.cartesian_prod(*[torch.arange(12.0)] * 2)
            away = (attention * torch.cdist(cell, cell)).sum(-1).mean()
            bev, image, projection = head_inputs(SMALL)
            codes = head(bev, image, projection, (32, 64)).codes
            centre = head.reference_points[:, :2] * head.encoding.span[:2] + head.encoding.low[:2]
            moved = (codes[..., :2] - centre).norm(dim=-1).median()
        assert (away < 3.5 and moved < 1) if quick else (away > 6 and moved > 3), quick


# ---- denoising, matching, losses


def test_denoising_queries() -> None:
    targets = some_targets()
    a = replace(SMALL, queries=40, dn_groups=3)
    noise = 2 * torch.rand(3, 3, 4, 3, generator=gen()) - 1
    dn = model.denoising_queries(targets, a, noise)
    assert dn.reference.shape == (3, 12, 3) and dn.group == 4
    low, span = torch.tensor([-12.0, -12, -2]), torch.tensor([24.0, 24, 4])
    for b, g, m in itertools.product(range(3), range(3), range(4)):
        place = 4 * g + m
        if not targets.valid[b, m]:
            assert not dn.reference[b, place].any() and not dn.valid[b, place]
            continue
        box = targets.boxes[b, m]
        centre = ((box[:3] + noise[b, g, m] * box[3:6] / 2 - low) / span).clamp(0, 1)
        torch.testing.assert_close(dn.reference[b, place], centre)
        kept = noise[b, g, m].norm() <= 0.75
        assert dn.labels[b, place] == (targets.labels[b, m] if kept else 4)
    many = model.Targets(torch.ones(1, 1, 9), torch.zeros(1, 1).long(), torch.ones(1, 1) > 0)
    draws = model.denoising_queries(many, SMALL, 2 * torch.rand(1, 200_000, 1, 3, generator=gen()) - 1)
    assert float((draws.labels == 0).float().mean()) == pytest.approx(math.pi / 6 * 0.75**3, abs=0.003)


def test_groups_are_as_many_as_fit() -> None:
    targets = some_targets()
    assert model.denoising_queries(targets, replace(SMALL, queries=9, dn_groups=3)).reference.shape[1] == 2 * 4
    with pytest.warns(UserWarning, match="4 boxes a sample and 3 queries"):
        assert model.denoising_queries(targets, replace(SMALL, queries=3)).reference.shape[1] == 4
    nothing = model.Targets.pad([torch.zeros(0, 9)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    assert model.denoising_queries(nothing, SMALL) is None


def test_denoising_queries_are_isolated() -> None:
    head = model.CMTHead(TINY, TINY.width).eval()
    bev, image, projection = head_inputs(TINY)
    targets = some_targets()
    dn = model.denoising_queries(targets, TINY, 2 * torch.rand(3, 2, 4, 3, generator=gen()) - 1)
    with torch.no_grad():
        alone = head(bev, image, projection, (32, 64))
        first = head(bev, image, projection, (32, 64), dn)
        moved = dn._replace(reference=torch.cat([dn.reference[:, :4].flip(-1), dn.reference[:, 4:]], 1))
        second = head(bev, image, projection, (32, 64), moved)
    torch.testing.assert_close(first.codes, alone.codes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.codes, first.codes)
    torch.testing.assert_close(second.dn_codes[:, :, 4:], first.dn_codes[:, :, 4:])
    assert not torch.allclose(second.dn_codes[:, :, :4], first.dn_codes[:, :, :4])


def test_matching_is_the_cheapest() -> None:
    from scipy.optimize import linear_sum_assignment

    targets = some_targets()
    codes = torch.randn(2, 3, 6, 10, generator=gen(1)) * 3
    logits = torch.randn(2, 3, 6, 4, generator=gen(2))
    found = model.match(codes, logits, targets)
    assert len(found.layer) == 2 * int(targets.valid.sum())
    weight = torch.tensor([2, 2, 1, 1, 1, 1, 1, 1])
    for layer, b in itertools.product(range(2), range(3)):
        n = int(targets.valid[b].sum())
        cost = torch.zeros(6, n)
        for q, m in itertools.product(range(6), range(n)):
            p = logits[layer, b, q, targets.labels[b, m]].sigmoid()
            focal = -p.log() * 0.25 * (1 - p) ** 2 + (1 - p).log() * 0.75 * p**2
            gap = (codes[layer, b, q, :8] - model.box_code(targets.boxes[b, m])[:8]).abs() * weight
            cost[q, m] = 2 * focal + 0.25 * gap.sum()
        ours = model.matching_cost(codes, logits, targets)[layer, b, :, :n]
        torch.testing.assert_close(ours, cost, atol=1e-4, rtol=1e-4)
        rows = (found.layer == layer) & (found.sample == b)
        best = min(sum(cost[q, m] for m, q in enumerate(p)) for p in itertools.permutations(range(6), n))
        assert float(cost[found.query[rows], found.box[rows]].sum()) == pytest.approx(float(best), rel=1e-5)
        assert sorted(found.query[rows].tolist()) == sorted(linear_sum_assignment(cost.numpy())[0].tolist())


def test_matching_survives_overflow() -> None:
    targets = some_targets()
    codes = torch.randn(1, 3, 6, 10, generator=gen())
    codes[0, 0, 2] = math.nan
    codes[0, 1, 3] = math.inf
    found = model.match(codes, torch.zeros(1, 3, 6, 4), targets)
    assert 2 not in found.query[found.sample == 0] and 3 not in found.query[found.sample == 1]


def test_focal_loss_equals_torchvision() -> None:
    peer = pytest.importorskip("torchvision.ops").sigmoid_focal_loss
    logits, labels = torch.randn(2, 3, 7, 4, generator=gen()), torch.randint(5, (2, 3, 7), generator=gen())
    target = F.one_hot(labels, 5)[..., :4].float()
    expected = peer(logits, target, alpha=0.25, gamma=2).flatten(1).sum(1)
    torch.testing.assert_close(model.focal_loss(logits, labels), expected)


def test_losses_are_normalised_as_the_authors_do() -> None:
    targets = some_targets()
    head = model.CMTHead(TINY, TINY.width)
    dn = model.denoising_queries(targets, TINY, 2 * torch.rand(3, 2, 4, 3, generator=gen()) - 1)
    out = head(*head_inputs(TINY), (32, 64), dn)
    got = model.losses(out, targets)
    positive, total = int(targets.valid.sum()), 3 * TINY.queries
    weight = torch.tensor(model.CODE_WEIGHTS)
    expected = dict.fromkeys(("cls", "box", "dn_cls", "dn_box"), 0.0)
    found = model.match(out.codes, out.logits, targets)
    for layer in range(TINY.layers):
        labels = torch.full((3, TINY.queries), TINY.classes)
        for b, q, m in zip(*(part[found.layer == layer].tolist() for part in found[1:])):
            labels[b, q] = targets.labels[b, m]
            gap = (out.codes[layer, b, q] - model.box_code(targets.boxes[b, m])).abs() * weight
            expected["box"] += 0.25 * float(gap.detach().sum()) / positive
        focal = float(model.focal_loss(out.logits[layer : layer + 1].detach(), labels[None]))
        expected["cls"] += 2 * focal / (positive + 0.1 * (total - positive))
        rows = dn.valid
        focal = float(model.focal_loss(out.dn_logits[layer][rows][None].detach(), dn.labels[rows][None]))
        expected["dn_cls"] += 2 * focal / max(int(rows.sum()) * 0.2208932, 1)
        gap = (out.dn_codes[layer][rows] - model.box_code(dn.boxes[rows])).abs() * weight
        expected["dn_box"] += 0.25 * float(gap.detach().sum()) / int(rows.sum())
    for name, value in expected.items():
        assert float(got[name].detach()) == pytest.approx(value, rel=1e-4), name


def test_a_batch_without_boxes_trains() -> None:
    nothing = model.Targets.pad([torch.zeros(0, 9)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    net = detector(TINY)
    scenes = data.generate_scenes(2, gen())
    batch = model.Batch(scenes.images.float(), list(scenes.points), cameras(2).forward.double())
    loss = model.losses(net(batch, nothing), nothing)
    assert loss["box"] == 0 and loss["cls"] > 0 and "dn_cls" not in loss
    sum(loss.values()).backward()


def test_detections_are_the_best_pairs() -> None:
    codes = torch.zeros(2, 1, 3, 10)
    codes[-1, 0, :, 0] = torch.tensor([1.0, 2.0, 99.0])
    logits = torch.full((2, 1, 3, 4), -9.0)
    logits[-1, 0, 0, 2], logits[-1, 0, 1, 1], logits[-1, 0, 1, 3], logits[-1, 0, 2, 0] = 1.0, 3.0, 2.0, 5.0
    found = model.detect(model.Predictions(codes, logits), most=4)[0]
    assert found.labels.tolist() == [1, 3, 2] and found.boxes[:, 0].tolist() == [2.0, 2.0, 1.0]  # 99 m is out of range
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())


def test_masked_modalities() -> None:
    images, points = torch.ones(2, 3, 4, 4), torch.ones(5, 5)
    for draw, expected in ((0.1, (1, 1)), (0.5, (1, 1)), (0.6, (1, 0)), (0.75, (1, 0)), (0.76, (0, 1)), (1.0, (0, 1))):
        got = model.mask_sensor(images, points, draw)
        assert tuple(float(x.mean()) for x in got) == expected, draw
        assert got[1].shape == points.shape


# ---- branches


def random_sites(shape=(7, 9, 11), batch=2, share=0.2, channels=3, seed=0) -> tuple[backbones.Sites, Tensor, Tensor]:
    """Sites, features and the dense grid (B, C, z, y, x) of both."""
    mask = torch.rand(batch, *shape, generator=gen(seed)) < share
    keys = mask.flatten().nonzero().squeeze(1)
    x = torch.randn(len(keys), channels, generator=gen(seed + 1))
    dense = torch.zeros(mask.numel(), channels).index_copy(0, keys, x).view(batch, *shape, channels)
    return backbones.Sites.of(keys, shape, batch), x, dense.permute(0, 4, 1, 2, 3)


def test_submanifold_convolution_equals_a_dense_one_at_its_sites() -> None:
    sites, x, dense = random_sites()
    x, weight = x.requires_grad_(), torch.randn(3, 3, 3, 3, 5, generator=gen(3)).requires_grad_()
    out = backbones.sparse_conv(x, weight, backbones.submanifold_rules(sites))
    dense = dense.clone().requires_grad_()
    expected = (
        F.conv3d(dense, weight.permute(4, 3, 0, 1, 2), padding=1).permute(0, 2, 3, 4, 1).reshape(-1, 5)[sites.keys]
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    seed = torch.randn(out.shape, generator=gen(4))
    ours = torch.autograd.grad((out * seed).sum(), (x, weight))
    theirs = torch.autograd.grad((expected * seed).sum(), (dense, weight))
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ours[0], theirs[0].permute(0, 2, 3, 4, 1).reshape(-1, 3)[sites.keys], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 2, 2), (0, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0))],
)
def test_strided_convolution_equals_a_dense_one(kernel, stride, padding) -> None:
    sites, x, dense = random_sites(share=0.1)
    weight = torch.randn(*kernel, 3, 5, generator=gen(3))
    after, rules = backbones.strided_rules(sites, kernel, stride, padding)
    out = backbones.sparse_conv(x, weight, rules)
    expected = F.conv3d(dense, weight.permute(4, 3, 0, 1, 2), stride=stride, padding=padding)
    assert after.shape == tuple(expected.shape[2:])
    reached = F.conv3d(
        (dense != 0).any(1, keepdim=True).float(), torch.ones(1, 1, *kernel), stride=stride, padding=padding
    )
    assert torch.equal(reached.flatten().nonzero().squeeze(1), after.keys)  # an output exists where an input reaches
    flat = expected.permute(0, 2, 3, 4, 1).reshape(-1, 5)
    torch.testing.assert_close(out, flat[after.keys], atol=1e-5, rtol=1e-4)


def test_sparse_encoder_equals_dense_convolutions() -> None:
    torch.manual_seed(0)
    encoder = backbones.SparseEncoder().eval()
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean.normal_(std=0.1)
            norm.weight.data.uniform_(0.5, 1.5)
    sites, x, dense = random_sites((41, 16, 16), 2, 0.03, 5)
    mask = (dense != 0).any(1, keepdim=True).float()

    def conv(x: Tensor, layer: backbones.SparseConv, norm: nn.BatchNorm1d, mask: Tensor, stride=1, padding=1) -> Tensor:
        y = F.conv3d(x, layer.weight.permute(4, 3, 0, 1, 2), stride=stride, padding=padding)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps) * mask

    y = conv(dense, *encoder.conv_input, mask).relu()
    for i, stage in enumerate(encoder.encoder_layers.values()):
        for block in stage[:2]:
            hidden = conv(y, block.conv1, block.bn1, mask).relu()
            y = (conv(hidden, block.conv2, block.bn2, mask) + y).relu()
        if len(stage) == 3:
            padding = (0, 1, 1) if i == 2 else 1
            mask = (F.conv3d(mask, torch.ones(1, 1, 3, 3, 3), stride=2, padding=padding) > 0).float()
            y = conv(y, *stage[2], mask, 2, padding).relu()
    mask = (F.conv3d(mask, torch.ones(1, 1, 3, 1, 1), stride=(2, 1, 1)) > 0).float()
    y = conv(y, *encoder.conv_out, mask, (2, 1, 1), 0).relu()
    with torch.no_grad():
        out = encoder(x, sites)
    assert out.shape == (2, 256, 2, 2)
    torch.testing.assert_close(out, y.flatten(1, 2), atol=1e-4, rtol=1e-3)


def test_voxels_hold_the_mean_of_their_first_points() -> None:
    a = replace(FULL, pc_range=(-4.0, -4.0, -1.0, 4.0, 4.0, 1.0), voxel=(0.5, 0.5, 0.5), max_points=3)
    clouds = [
        torch.rand(n, 5, generator=gen(n)) * torch.tensor([10, 10, 3, 1, 1]) - torch.tensor([5, 5, 1.5, 0, 0])
        for n in (900, 500)
    ]
    features, sites = backbones.voxelise(clouds, a, 10**6)
    found = {tuple(cell): row for cell, row in zip(sites.cells.tolist(), features)}
    expected: dict[tuple, list] = {}
    for b, cloud in enumerate(clouds):
        for point in cloud:
            x, y, z = ((point[:3] - torch.tensor([-4.0, -4, -1])) / 0.5).floor().int().tolist()
            if 0 <= x < 16 and 0 <= y < 16 and 0 <= z < 4:
                expected.setdefault((b, z, y, x), []).append(point)
    assert set(found) == set(expected) and sites.shape == (5, 16, 16)
    for cell, points in expected.items():
        torch.testing.assert_close(found[cell], torch.stack(points[:3]).mean(0))
    few, some = backbones.voxelise(clouds[:1], a, 20)
    first = list(dict.fromkeys(cell for cell in expected if cell[0] == 0))[:20]
    assert {tuple(cell) for cell in some.cells.tolist()} == set(first) and len(few) == 20
    assert torch.equal(some.keys, some.keys.sort().values)
    with pytest.raises(ValueError, match="sample 1: none of 2 points is inside"):
        backbones.voxelise([clouds[0], torch.full((2, 5), 99.0)], a, 10)


def test_zeroed_points_still_pass() -> None:
    net = backbones.PillarBranch(TINY)
    assert net([torch.zeros(4, 5), torch.rand(9, 5)]).shape == (2, 16, 12, 12)
    a = replace(FULL, pc_range=(-1.2, -1.2, -5.0, 1.2, 1.2, 3.0))
    features, sites = backbones.voxelise([torch.zeros(50, 5)], a, 100)
    assert len(features) == 1 and sites.cells.tolist() == [[0, 25, 16, 16]]


def test_second_and_its_pyramid_equal_mmdet3d() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = pytest.importorskip("mmdet3d.models.backbones.second")
        neck = pytest.importorskip("mmdet3d.models.necks.second_fpn")
        encoder = pytest.importorskip("mmdet3d.models.middle_encoders.sparse_encoder")
    norm, conv = {"type": "BN", "eps": 0.001, "momentum": 0.01}, {"type": "Conv2d", "bias": False}
    peers = nn.ModuleList(
        [
            second.SECOND(256, [128, 256], [5, 5], [1, 2], norm, conv),
            neck.SECONDFPN([128, 256], [256, 256], [1, 2], norm, {"type": "deconv", "bias": False}, conv, True),
        ]
    ).eval()
    ours = nn.ModuleList([backbones.Second(), backbones.SecondFPN()]).eval()
    ours.load_state_dict(peers.state_dict())
    x = torch.randn(1, 256, 8, 8, generator=gen())
    with torch.no_grad():
        torch.testing.assert_close(ours[1](ours[0](x)), peers[1](peers[0](x))[0])
    peer = encoder.SparseEncoder(
        5, [41, 1440, 1440], output_channels=128, block_type="basicblock",
        encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, [0, 1, 1]), (0, 0)),
    )  # fmt: skip
    shapes = {name: tuple(value.shape) for name, value in backbones.SparseEncoder().state_dict().items()}
    assert {name: tuple(value.shape) for name, value in peer.state_dict().items()} == shapes


def test_image_backbones() -> None:
    torch.manual_seed(0)
    net = backbones.ImageBranch("vovnet99", 256).train()
    assert not any(m.training for m in net.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        maps = net.eval().backbone(torch.randn(1, 3, 64, 96))
        assert [tuple(m.shape) for m in maps] == [(1, 768, 4, 6), (1, 1024, 2, 3)]
        assert net(torch.randn(1, 2, 3, 64, 96)).shape == (1, 2, 256, 4, 6)
    vision = pytest.importorskip("torchvision.models.feature_extraction")
    from torchvision.models import resnet50

    peer, ours = resnet50(weights=None).eval(), backbones.ResNet50().eval()
    ours.load_state_dict(peer.state_dict(), strict=False)
    extract = vision.create_feature_extractor(peer, ["layer3", "layer4"])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(ours(x), extract(x).values(), strict=True):
            torch.testing.assert_close(a, b)


def test_one_shot_block_equals_timm() -> None:
    vovnet = pytest.importorskip("timm.models.vovnet")
    torch.manual_seed(0)
    peer = vovnet.OsaBlock(32, 16, 32, layer_per_block=5, residual=True, attn="ese").eval()
    ours = backbones.OneShotBlock(32, 16, 32, identity=True).eval()
    names = {"conv_concat": "concat", "conv_mid": "layers", "attn.fc": "ese", "conv.": "0.", "bn.": "1."}
    state = {}
    for name, value in peer.state_dict().items():
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)
        state[name] = value
    ours.load_state_dict(state)
    x = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer(x), atol=1e-5, rtol=1e-4)


def test_grid_mask_keeps_half_in_bars() -> None:
    masks = torch.stack([backbones.grid_mask(48, 96, gen(i)) for i in range(300)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert 0.6 < float(masks.mean()) < 0.85  # bars in both directions cover about three quarters
    one = masks[0]
    rows, columns = one.all(1), one.all(0)
    assert torch.equal(one, (rows.unsqueeze(1) | columns).float())


def test_grid_mask_goes_with_the_large_fusion_models() -> None:
    with torch.device("meta"):
        masked = {name: backbones.branches(a)[0] for name, a in model.ARCHITECTURES.items()}
    assert {name for name, branch in masked.items() if branch is not None and branch.masked} == {
        "fusion-vov", "fusion-r50", "fusion-r50-official"
    }  # fmt: skip


def test_grid_mask_hides_pixels_in_training(monkeypatch) -> None:
    branch = backbones.ImageBranch("small", 8, masked=True).train()
    seen = []
    monkeypatch.setattr(branch.backbone, "forward", lambda x: [seen.append(x) or x])
    for _ in range(60):
        branch(torch.ones(1, 2, 3, 24, 24))
    hidden = [float((x == 0).float().mean()) for x in seen]
    assert 0.5 < sum(share > 0 for share in hidden) / 60 < 0.9  # seven tenths of the batches
    assert all(torch.equal(x[0, 0], x[i, c]) for x in seen for i in range(2) for c in range(3))  # same in all views
    branch.eval()(torch.ones(1, 2, 3, 24, 24))
    assert seen[-1].all()


# ---- the authors' checkpoints


def official_names(a: model.Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dict, written out from their modules."""
    out: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int, counted: bool = True) -> None:
        for entry in ("weight", "bias") + (("running_mean", "running_var") if counted else ()):
            out[f"{name}.{entry}"] = (channels,)
        if counted:
            out[f"{name}.num_batches_tracked"] = ()

    def linear(name: str, inputs: int, outputs: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for i, (inputs, outputs) in enumerate(((3, 64), (64, 64), (64, 128)), 1):
        out[f"img_backbone.stem.stem_{i}/conv.weight"] = (outputs, inputs, 3, 3)
        norm(f"img_backbone.stem.stem_{i}/norm", outputs)
    before = 128
    for stage, (hidden, outputs, blocks) in enumerate(((128, 256, 1), (160, 512, 3), (192, 768, 9), (224, 1024, 3)), 2):
        for block in range(1, blocks + 1):
            start = f"img_backbone.stage{stage}.OSA{stage}_{block}"
            inner = f"OSA{stage}_{block}"
            for layer in range(5):
                out[f"{start}.layers.{layer}.{inner}_{layer}/conv.weight"] = (hidden, hidden if layer else before, 3, 3)
                norm(f"{start}.layers.{layer}.{inner}_{layer}/norm", hidden)
            out[f"{start}.concat.{inner}_concat/conv.weight"] = (outputs, before + 5 * hidden, 1, 1)
            norm(f"{start}.concat.{inner}_concat/norm", outputs)
            out[f"{start}.ese.fc.weight"], out[f"{start}.ese.fc.bias"] = (outputs, outputs, 1, 1), (outputs,)
            before = outputs
    for i, channels in enumerate((768, 1024)):
        out[f"img_neck.lateral_convs.{i}.conv.weight"] = (256, channels, 1, 1)
        out[f"img_neck.lateral_convs.{i}.conv.bias"] = (256,)
    out["img_neck.fpn_convs.0.conv.weight"], out["img_neck.fpn_convs.0.conv.bias"] = (256, 256, 3, 3), (256,)

    lidar = "pts_middle_encoder"
    out[f"{lidar}.conv_input.0.weight"] = (16, 3, 3, 3, 5)
    norm(f"{lidar}.conv_input.1", 16)
    for stage, (channels, after) in enumerate(((16, 32), (32, 64), (64, 128), (128, 0)), 1):
        for block, i in itertools.product(range(2), (1, 2)):
            name = f"{lidar}.encoder_layers.encoder_layer{stage}.{block}"
            out[f"{name}.conv{i}.weight"] = (channels, 3, 3, 3, channels)
            norm(f"{name}.bn{i}", channels)
        if after:
            out[f"{lidar}.encoder_layers.encoder_layer{stage}.2.0.weight"] = (after, 3, 3, 3, channels)
            norm(f"{lidar}.encoder_layers.encoder_layer{stage}.2.1", after)
    out[f"{lidar}.conv_out.0.weight"] = (128, 3, 1, 1, 128)
    norm(f"{lidar}.conv_out.1", 128)
    for stage, (inputs, outputs) in enumerate(((256, 128), (128, 256))):
        for i in range(6):
            out[f"pts_backbone.blocks.{stage}.{3 * i}.weight"] = (outputs, outputs if i else inputs, 3, 3)
            norm(f"pts_backbone.blocks.{stage}.{3 * i + 1}", outputs)
    out["pts_neck.deblocks.0.0.weight"], out["pts_neck.deblocks.1.0.weight"] = (256, 128, 1, 1), (256, 256, 2, 2)
    for i in range(2):
        norm(f"pts_neck.deblocks.{i}.1", 256)

    head = "pts_bbox_head"
    out[f"{head}.shared_conv.conv.weight"] = (256, 512, 3, 3)
    norm(f"{head}.shared_conv.bn", 256)
    out[f"{head}.reference_points.weight"] = (a.queries, 3)
    linear(f"{head}.bev_embedding.0", 512, 256)
    linear(f"{head}.bev_embedding.2", 256, 256)
    linear(f"{head}.rv_embedding.0", 192, 1024)
    linear(f"{head}.rv_embedding.2", 1024, 256)
    for layer in range(6):
        name = f"{head}.transformer.decoder.layers.{layer}"
        for i in range(2):
            out[f"{name}.attentions.{i}.attn.in_proj_weight"] = (768, 256)
            out[f"{name}.attentions.{i}.attn.in_proj_bias"] = (768,)
            linear(f"{name}.attentions.{i}.attn.out_proj", 256, 256)
        linear(f"{name}.ffns.0.layers.0.0", 256, 1024)
        linear(f"{name}.ffns.0.layers.1", 1024, 256)
        for i in range(3):
            norm(f"{name}.norms.{i}", 256, False)
    norm(f"{head}.transformer.decoder.post_norm", 256, False)
    for branch, size in zip(model.BRANCHES, (2, 1, 3, 2, 2, 10)):
        name = f"{head}.task_heads.0.{branch}"
        out[f"{name}.0.weight"] = (384, 256, 1)
        out[f"{name}.1.weight"], out[f"{name}.1.bias"] = (384,), (384,)
        out[f"{name}.3.weight"], out[f"{name}.3.bias"] = (6 * size, 64, 1), (6 * size,)
    return out


def test_the_authors_checkpoint_fits() -> None:
    a = replace(FULL, official_channel_order=True)
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(official_names(a).items())}
    name = "pts_middle_encoder.encoder_layers.encoder_layer1.2.0.weight"
    state[name] = torch.randn(state[name].shape)
    net = detector(a)
    assert sum(v.numel() for v in state.values()) == sum(v.numel() for v in net.state_dict().values())
    model.load_official(net, state)
    ours = net.state_dict()
    torch.testing.assert_close(
        ours["lidar.encoder.encoder_layers.encoder_layer1.2.0.weight"], state[name].permute(1, 2, 3, 4, 0)
    )
    for here, there in {
        "image.backbone.stages.2.8.layers.4.0.weight": "img_backbone.stage4.OSA4_9.layers.4.OSA4_9_4/conv.weight",
        "image.backbone.stages.1.0.concat.1.bias": "img_backbone.stage3.OSA3_1.concat.OSA3_1_concat/norm.bias",
        "image.backbone.stem.2.0.weight": "img_backbone.stem.stem_3/conv.weight",
        "head.layers.3.cross_attention.in_proj_bias": "pts_bbox_head.transformer.decoder.layers.3"
        ".attentions.1.attn.in_proj_bias",
        "head.layers.5.ffn.2.weight": "pts_bbox_head.transformer.decoder.layers.5.ffns.0.layers.1.weight",
        "head.encoding.rv_embedding.2.bias": "pts_bbox_head.rv_embedding.2.bias",
    }.items():
        assert torch.equal(ours[here], state[there]), here
    lost = {name: value for name, value in state.items() if name != "pts_bbox_head.bev_embedding.0.weight"}
    with pytest.raises(ValueError, match=r"1 entries are missing, first head\.encoding\.bev_embedding\.0\.weight"):
        model.load_official(net, lost)
    with pytest.raises(ValueError, match=r"left over, first pts_bbox_head\.surprise"):
        model.load_official(net, state | {"pts_bbox_head.surprise": torch.zeros(1)})
    image = {name.removeprefix("img_backbone."): value for name, value in state.items() if "img_backbone" in name}
    model.load_image_backbone(net, image)
    frozen = {name: value for name, value in image.items() if "num_batches_tracked" not in name}
    model.load_image_backbone(net, frozen)  # frozen batch norms count nothing
    with pytest.raises(ValueError, match=r"no stem.0.0.weight of shape \(64, 3, 3, 3\)"):
        model.load_image_backbone(net, {"conv1.weight": torch.zeros(1)})


# ---- evaluation


def random_detections(seed: int, samples: int = 12) -> tuple[list, list]:
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> np.ndarray:
        return np.concatenate(
            [
                rng.uniform(-40, 40, (n, 3)),
                rng.uniform(0.5, 4, (n, 3)),
                rng.uniform(-7, 7, (n, 1)),
                rng.normal(size=(n, 2)),
            ],
            1,
        )

    truth, found = [], []
    for _ in range(samples):
        n = int(rng.integers(0, 25))
        labels = rng.integers(0, 10, n)
        real = evaluation.Boxes(boxes(n), labels, None, rng.integers(-1, 8, n))
        kept = rng.random(n) < 0.8
        near = real.boxes[kept] + rng.normal(size=(kept.sum(), 9)) * 0.4 * np.array([1, 1, 1, 0, 0, 0, 1, 1, 1])
        near[:, 3:6] *= rng.uniform(0.7, 1.4, (len(near), 3))
        extra = int(rng.integers(0, 30))
        guessed = np.concatenate([near, boxes(extra)])
        names = np.where(rng.random(len(guessed)) < 0.9, np.concatenate([labels[kept], rng.integers(0, 10, extra)]), 0)
        scores = np.round(rng.random(len(guessed)), 2)
        truth.append(real)
        found.append(evaluation.Boxes(guessed, names, scores, rng.integers(0, 8, len(guessed))))
    return truth, found


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_those_of_the_devkit(seed) -> None:
    pytest.importorskip("nuscenes.eval.detection.evaluate")
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
    from nuscenes.eval.detection.constants import TP_METRICS
    from nuscenes.eval.detection.data_classes import DetectionBox, DetectionMetrics
    from pyquaternion import Quaternion

    truth, found = random_detections(seed)
    vehicle = np.array([0.3, -0.5])
    config = config_factory("detection_cvpr_2019")
    assert config.class_range == evaluation.RANGES

    def theirs(side: list) -> EvalBoxes:
        out = EvalBoxes()
        for i, part in enumerate(side):
            rows = []
            for j, box in enumerate(part.boxes):
                name = data.CLASSES[part.labels[j]]
                if np.linalg.norm(box[:2] - vehicle) >= config.class_range[name]:
                    continue
                attribute = "" if part.attributes[j] < 0 else data.ATTRIBUTES[part.attributes[j]]
                rows.append(
                    DetectionBox(
                        sample_token=str(i), translation=tuple(box[:3]), size=tuple(box[3:6]), velocity=tuple(box[7:9]),
                        rotation=tuple(Quaternion(axis=(0, 0, 1), radians=box[6]).elements), detection_name=name,
                        detection_score=-1.0 if part.scores is None else float(part.scores[j]),
                        attribute_name=attribute,
                    )
                )  # fmt: skip
            out.add_boxes(str(i), rows)
        return out

    real, guess, metrics = theirs(truth), theirs(found), DetectionMetrics(config)
    for name in config.class_names:
        curves = {}
        for distance in config.dist_ths:
            curves[distance] = accumulate(real, guess, name, config.dist_fcn_callable, distance)
            metrics.add_label_ap(name, distance, calc_ap(curves[distance], config.min_recall, config.min_precision))
        for what in TP_METRICS:
            undefined = evaluation.UNDEFINED.get(name, ())
            short = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}[
                what
            ]
            value = np.nan if short in undefined else calc_tp(curves[config.dist_th_tp], config.min_recall, what)
            metrics.add_label_tp(name, what, value)
    sides = [[evaluation.within_range(part, data.CLASSES, vehicle) for part in side] for side in (truth, found)]
    ours = evaluation.evaluate(*sides, data.CLASSES)
    assert ours["mAP"] > 0.1
    assert ours["mAP"] == pytest.approx(metrics.mean_ap, abs=1e-9)
    assert ours["NDS"] == pytest.approx(metrics.nd_score, abs=1e-9)
    for what, value in metrics.tp_errors.items():
        key = {"trans_err": "mATE", "scale_err": "mASE", "orient_err": "mAOE", "vel_err": "mAVE", "attr_err": "mAAE"}[
            what
        ]
        assert ours[key] == pytest.approx(value, abs=1e-9), what


def test_perfect_detections_score_one() -> None:
    truth, _ = random_detections(3, 30)
    truth = [evaluation.Boxes(p.boxes, p.labels, None, np.abs(p.attributes)) for p in truth]
    found = [evaluation.Boxes(p.boxes, p.labels, np.ones(len(p.labels)), p.attributes) for p in truth]
    scores = evaluation.evaluate(truth, found, data.CLASSES)
    assert scores["mAP"] == pytest.approx(1) and scores["NDS"] == pytest.approx(1)
    assert all(scores[f"m{name}"] == pytest.approx(0, abs=1e-9) for name in evaluation.ERRORS)
    assert evaluation.recall(truth, found) == 1
    nothing = [p.chosen(np.zeros(len(p.labels), bool)) for p in found]
    assert evaluation.evaluate(truth, nothing, data.CLASSES)["NDS"] == 0 == evaluation.recall(truth, nothing)


# ---- data: augmentation


def test_pixels_stay_under_global_transformations() -> None:
    scenes = data.generate_scenes(1, gen())
    before = scenes.sample(0)
    after = scenes.sample(0)
    for seed in range(5):
        matrix = data.draw_transform(data.JITTER["fusion"], gen(seed))
        data.transform(after, matrix)
        old, new = (
            torch.einsum(
                "vij,nj->vni", s.lidar2img, F.pad(data.corners(s.boxes).flatten(0, 1).double(), (0, 1), value=1.0)
            )
            for s in (before, after)
        )
        # corners of a mirrored box come in another order: compare as sets by their sums, and centres one by one
        torch.testing.assert_close(
            old.unflatten(1, (-1, 8)).mean(2), new.unflatten(1, (-1, 8)).mean(2), atol=1e-2, rtol=1e-3
        )
        torch.testing.assert_close(
            old.unflatten(1, (-1, 8)).sort(2).values, new.unflatten(1, (-1, 8)).sort(2).values, atol=1e-2, rtol=1e-3
        )
        inside = [data.points_in_boxes(s.points, s.boxes).sum(0) for s in (before, after)]
        assert (inside[0] - inside[1]).abs().max() <= 2  # points on a face


def test_boxes_turn_and_flip() -> None:
    box = torch.tensor([[1.0, 2, 3, 4, 2, 1, 0.3, 1, 0]])
    turned = data.transform_boxes(box, data.global_transform(math.pi / 2, 2.0, (1, 0, 0), (False, False)))[0]
    expected = torch.tensor([-3.0, 2, 6, 8, 4, 2, 0.3 + math.pi / 2, 0, 2])
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    flips = [
        data.transform_boxes(box, data.global_transform(0, 1, (0, 0, 0), f))[0] for f in ((True, False), (False, True))
    ]
    torch.testing.assert_close(flips[0][[1, 6]], torch.tensor([-2.0, -0.3]))
    torch.testing.assert_close(flips[1][[0, 6, 7]], torch.tensor([-1.0, math.pi - 0.3, -1.0]))


def test_images_and_intrinsics_change_together() -> None:
    """A bright pixel is found where the changed projection says."""
    point = torch.tensor([3.0, 0.4, 10.0, 1.0]).double()
    intrinsics = torch.tensor([[60.0, 0, 80], [0, 60, 45], [0, 0, 1]]).double()
    for seed in range(6):
        images = torch.zeros(1, 3, 90, 160)
        u, v = (intrinsics @ point[:3] / point[2])[:2].tolist()
        images[:, :, round(v) - 1 : round(v) + 2, round(u) - 1 : round(u) + 2] = 1
        eye = torch.eye(4).double()[None]
        sample = data.Sample(images, torch.zeros(1, 5), intrinsics[None], eye, torch.zeros(0, 9), torch.zeros(0).long())
        data.resize_crop_flip(sample, (64, 160), (0.94, 1.25), gen(seed) if seed else None)
        assert sample.images.shape == (1, 3, 64, 160)
        q = sample.lidar2img[0] @ point
        if not (2 < q[0] / q[2] < 157 and 2 < q[1] / q[2] < 61):
            continue
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(160), indexing="ij")
        weight = sample.images[0, 0] / sample.images[0, 0].sum()
        assert float((weight * columns).sum()) == pytest.approx(float(q[0] / q[2]), abs=1.5)
        assert float((weight * rows).sum()) == pytest.approx(float(q[1] / q[2]), abs=1.5)


def test_overlap_on_the_ground() -> None:
    boxes = torch.tensor(
        [[0, 0, 0, 4, 2, 1, 0, 0, 0], [0, 1.9, 0, 4, 2, 1, 0, 0, 0], [0, 2.1, 0, 4, 2, 1, 0, 0, 0],
         [3.2, 0, 0, 4, 2, 1, math.pi / 2, 0, 0], [2.9, 0, 0, 4, 2, 1, math.pi / 2, 0, 0],
         [2.9, 2.0, 0, 2, 2, 1, math.pi / 4, 0, 0]]
    )  # fmt: skip
    row = data.overlapping(boxes)[0].tolist()
    assert row == [True, True, False, False, True, False]
    assert torch.equal(data.overlapping(boxes), data.overlapping(boxes).T)


# ---- data: files

CAMERA_FILE = "samples/{name}/{name}.jpg"


def write_old(folder: Path, frames: int = 3, sweeps: int = 2) -> Path:
    """A data set in the layout of mmdet3d before 1.1, with files, and the objects to sample."""
    from PIL import Image

    rng = np.random.default_rng(0)
    infos = []
    for i in range(frames):
        cams = {}
        for j, name in enumerate(data.CAMERAS):
            path = folder / "samples" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (90, 160, 3), dtype=np.uint8)).save(path)
            c, s = np.cos(j * np.pi / 3), np.sin(j * np.pi / 3)
            turn = np.array([[s, 0, c], [-c, 0, s], [0, -1, 0]])  # columns: right, down, forward
            cams[name] = {
                "data_path": f"./data/nuscenes/samples/{name}/{i}.jpg", "sensor2lidar_rotation": turn, "timestamp": 0,
                "sensor2lidar_translation": np.array([0.5, 0.0, -0.3]),
                "cam_intrinsic": np.array([[80.0, 0, 80], [0, 80, 45], [0, 0, 1]]),
            }  # fmt: skip
        others = []
        for j in range(sweeps + 1):
            place = "samples" if j == 0 else "sweeps"
            path = folder / place / "LIDAR_TOP" / f"{i}_{j}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            cloud = np.concatenate(
                [rng.uniform(-20, 20, (300, 2)), rng.uniform(-2, 1, (300, 1)), rng.uniform(0, 255, (300, 2))], 1
            )
            cloud.astype(np.float32).tofile(path)
            if j:
                turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
                others.append({
                    "data_path": f"./data/nuscenes/sweeps/LIDAR_TOP/{i}_{j}.bin", "timestamp": 10**6 - 50_000 * j,
                    "sensor2lidar_rotation": turn, "sensor2lidar_translation": np.array([1.0, 2.0, 0.0]),
                })  # fmt: skip
        infos.append({
            "token": f"token{i}", "lidar_path": f"./data/nuscenes/samples/LIDAR_TOP/{i}_0.bin", "sweeps": others,
            "cams": cams, "timestamp": 10**6,
            "lidar2ego_translation": [0.9, 0.0, 1.8], "lidar2ego_rotation": [1, 0, 0, 0],
            "gt_boxes": np.array([[5.0, 3, -1, 4, 2, 1.5, 0.2], [-6, 2, -1, 1, 1, 1.7, 0], [2, 9, 0, 1, 1, 1, 0]]),
            "gt_names": np.array(["car", "pedestrian", "animal"]),
            "gt_velocity": np.array([[1.0, 0], [np.nan, 0], [0, 0]]),
            "num_lidar_pts": np.array([9, 3, 0]), "num_radar_pts": np.array([0, 0, 1]),
        })  # fmt: skip
    for split in ("train", "val"):
        with open(folder / f"nuscenes_infos_{split}.pkl", "wb") as file:
            pickle.dump({"infos": infos, "metadata": {"version": "v1.0-mini"}}, file)
    bank: dict[str, list] = {name: [] for name in data.CLASSES}
    (folder / "nuscenes_gt_database").mkdir()
    for i in range(6):
        rng.uniform(0.05, 0.4, (8, 5)).astype(np.float32).tofile(folder / "nuscenes_gt_database" / f"{i}.bin")
        Image.fromarray(np.full((20, 20, 3), 250, np.uint8)).save(folder / "nuscenes_gt_database" / f"{i}.png")
        bank["bus"].append({
            "path": f"nuscenes_gt_database/{i}.bin", "image_path": f"nuscenes_gt_database/{i}.png", "difficulty": 0,
            "box3d_lidar": np.array([9.0 - 5 * i, -8, -1.5, 3, 2, 2, 0.1, 0, 0]),
            "num_points_in_gt": 8 if i else 4,
        })  # fmt: skip
    with open(folder / "nuscenes_dbinfos_train.pkl", "wb") as file:
        pickle.dump(bank, file)
    return folder


def test_infos_of_the_older_layout(tmp_path) -> None:
    write_old(tmp_path)
    frames = data.read_infos(tmp_path / "nuscenes_infos_train.pkl")
    frame = frames[1]
    assert frame.lidar == tmp_path / "samples/LIDAR_TOP/1_0.bin" and frame.lidar.is_file()
    assert [view.name for view in frame.views] == list(data.CAMERAS) and all(
        view.path.is_file() for view in frame.views
    )
    assert frame.labels.tolist() == [0, 8, -1] and frame.boxes[1, 7:].tolist() == [0, 0]
    np.testing.assert_allclose(frame.vehicle, [-0.9, 0])
    view = frame.views[0]  # a point one metre before the camera lies at depth one
    ahead = np.array([0.5 + 1, 0, -0.3, 1])
    np.testing.assert_allclose(view.lidar2cam @ ahead, [0, 0, 1, 1], atol=1e-9)
    cloud = data.read_cloud(frame)
    assert cloud.shape == (900, 5)
    assert [round(float(t), 3) for t in cloud[::300, 4]] == [0.0, 0.05, 0.1]
    raw = data.read_points(frame.sweeps[0].path)
    expected = torch.stack([1 - raw[:, 1], 2 + raw[:, 0], raw[:, 2]], 1)
    torch.testing.assert_close(cloud[300:600, :3], expected, atol=1e-5, rtol=1e-5)


def test_training_samples_with_pasted_objects(tmp_path) -> None:
    write_old(tmp_path)
    bank = data.ObjectBank(tmp_path / "nuscenes_dbinfos_train.pkl")
    assert [len(rows) for rows in bank.rows.values()] == [0, 0, 0, 5, 0, 0, 0, 0, 0, 0]  # one has four points only
    args = (tmp_path / "nuscenes_infos_train.pkl", "fusion", (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0), (64, 160))
    source = data.NuScenes(*args, bank=bank)
    raw = source.raw(0)
    before = raw.images.clone()
    data.paste_objects(raw, bank, gen())
    pasted = raw.boxes[2:]
    assert 1 <= len(pasted) <= 4 and (raw.labels[2:] == 3).all()
    torch.testing.assert_close(pasted[:, 2], torch.full((len(pasted),), -0.5))  # from the bottom's centre to the middle
    assert not data.overlapping(raw.boxes).fill_diagonal_(False).any()
    assert (raw.images != before).any()
    inside = data.points_in_boxes(raw.points, raw.boxes)
    assert inside[-8 * len(pasted) :].any(1).all() and not inside[: -8 * len(pasted), 2:].any()
    first, second = (source.sample(1, gen(4)) for _ in range(2))
    assert torch.equal(first.points, second.points) and torch.equal(first.images, second.images)
    assert first.images.shape == (6, 3, 64, 160) and first.labels.min() >= 0
    blank = source.sample(1, gen(4), lambda images, points: model.mask_sensor(images, points, 0.9))
    assert not blank.images.any() and torch.equal(blank.points, first.points)
    assert source.sample(0).points.shape[1] == 5 and len(source.truth(0)[0]) == 2


def test_class_balanced_resampling() -> None:
    labels = [np.array([0])] * 90 + [np.array([0, 1])] * 9 + [np.array([2])]
    index = data.class_balanced(labels, 3, gen())
    shows = torch.tensor([[(labels[i] == c).any() for c in range(3)] for i in index.tolist()])
    assert len(index) == 3 * (109 // 3)
    assert shows[:, 2].sum() == 36 and shows[:, 1].sum() >= 36
    with pytest.raises(UserError, match="no frame has a box"):
        data.class_balanced([np.array([-1])], 3, gen())


def test_images_are_padded_for_their_backbone(train) -> None:
    sample = data.Sample(
        torch.zeros(2, 3, 90, 150), torch.zeros(4, 5), torch.eye(3).double().repeat(2, 1, 1),
        torch.eye(4).double().repeat(2, 1, 1), torch.zeros(0, 9), torch.zeros(0, dtype=torch.long),
    )  # fmt: skip
    for name, size in (("fusion-r50", (96, 160)), ("frame", (96, 152))):
        batch, _ = train.collate([sample], train.ARCHITECTURES[name])
        assert batch.images.shape[-2:] == size and batch.points is not None
        assert not batch.images[..., 90:, :].any() and batch.images[..., :90, :150].all()


def test_attributes_come_from_the_tables(tmp_path) -> None:
    write_old(tmp_path)
    frames = data.read_infos(tmp_path / "nuscenes_infos_val.pkl")
    assert data.read_attributes(tmp_path, frames) is None
    tables = tmp_path / "v1.0-mini"
    tables.mkdir()
    (tables / "attribute.json").write_text(json.dumps([{"token": "a", "name": "vehicle.parked"}]))
    rows = [
        {"sample_token": f"token{i}", "attribute_tokens": ["a"] if j == 0 else []} for i in range(3) for j in range(3)
    ]
    (tables / "sample_annotation.json").write_text(json.dumps(rows))
    assert [row.tolist() for row in data.read_attributes(tmp_path, frames)] == [[1, -1, -1]] * 3
    (tables / "sample_annotation.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(UserError, match="2 annotations of sample token2, its info has 3"):
        data.read_attributes(tmp_path, frames)
    speed = np.array([[1.0, 0], [0, 0], [0, 0], [1, 0]])
    names = [data.ATTRIBUTES[i] if i >= 0 else "" for i in data.default_attributes(np.array([0, 3, 8, 5]), speed)]
    assert names == ["vehicle.moving", "vehicle.stopped", "pedestrian.standing", ""]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda info: info.pop("cams"), "record 0: the record lacks cams"),
        (lambda info: info["cams"].pop("CAM_BACK"), "sample token0: CAM_BACK is missing"),
        (
            lambda info: info["gt_boxes"].__setitem__((1, 4), 0.0),
            "sample token0: box 1 has a length that is not positive",
        ),
        (
            lambda info: info["cams"]["CAM_BACK"].pop("cam_intrinsic"),
            "sample token0, CAM_BACK: the record lacks cam_intrinsic",
        ),
        (
            lambda info: info["cams"]["CAM_FRONT"].update(cam_intrinsic=np.eye(4)),
            r"sample token0, CAM_FRONT: cam_intrinsic has shape \(4, 4\), expected \(3, 3\)",
        ),
        (
            lambda info: info["sweeps"][1].update(sensor2lidar_translation="nowhere"),
            "sample token0, sweep 1: sensor2lidar_translation is not numeric",
        ),
    ],
)
def test_damaged_infos(tmp_path, damage, message) -> None:
    path = write_old(tmp_path, 1) / "nuscenes_infos_train.pkl"
    content = pickle.loads(path.read_bytes())
    damage(content["infos"][0])
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        data.read_infos(path)


def test_damaged_files(tmp_path, run_paper, refuses) -> None:
    write_old(tmp_path, 1)
    words = ["--preset", "fusion-vov", "--check-data", "--data", str(tmp_path)]
    done = run_paper("cmt", words)
    assert done.code == 0 and "train: 1 frames (the full split has 28130), 3 boxes, 1 of no class" in done.out
    assert "bus 5" in done.out
    (tmp_path / "samples/CAM_BACK/0.jpg").unlink()
    refuses(words, "CAM_BACK/0.jpg")
    source = data.NuScenes(data.locate(tmp_path, "train"), "camera", FULL.pc_range, (64, 160))
    with pytest.raises(UserError, match="expected a camera image of sample token0, CAM_BACK"):
        source.raw(0)
    (tmp_path / "samples/LIDAR_TOP/0_0.bin").write_bytes(b"\0" * 44)
    with pytest.raises(UserError, match=r"0_0\.bin: 44 bytes, expected points of 5 float32"):
        data.read_points(tmp_path / "samples/LIDAR_TOP/0_0.bin")
    (tmp_path / "nuscenes_infos_val.pkl").write_bytes(pickle.dumps({"something": 1}))
    with pytest.raises(UserError, match=r"'infos' .* or 'data_list' .*, got something"):
        data.read_infos(tmp_path / "nuscenes_infos_val.pkl")
    with pytest.raises(UserError, match=r"no nuscenes_infos_train\.pkl"):
        data.locate(tmp_path / "samples", "train")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--architecture", "fusion-vow"], "unknown 'fusion-vow'"),
        (["--arms", "lidar", "lidar"], "each once"),
        (["--source", "nuscenes"], "do not go together"),
        (["--zoom", "1.2", "0.9"], "the smaller one first"),
        (["--epochs", "0"], "nothing to train"),
        (["--preset", "lidar"], "needs --data"),
    ],
)
def test_bad_usage_is_one_line(refuses, argv, message) -> None:
    refuses(argv, message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(FULL, voxel=(0.07, 0.075, 0.2)), "holds 1542.86 x 1440.00 x 40.00 voxels"),
        (lambda: replace(FULL, cells=1024), "cells is 1024, but pc_range and voxel give 1440"),
        (lambda: replace(FULL, voxel=(0.1, 0.1, 0.2)), "its side a multiple of 16"),
        (lambda: replace(FULL, modality="radar"), "expected one of fusion, lidar, camera"),
        (lambda: replace(FULL, heads=7), "no multiple of the 7 heads"),
        (
            lambda: model.Cameras.of(torch.zeros(2, 6, 4, 4), (1, 1), torch.device("cpu")),
            "sample 0, view 0 is singular",
        ),
        (
            lambda: model.Cameras.of(torch.zeros(6, 4, 4), (1, 1), torch.device("cpu")),
            r"expected \(samples, views, 4, 4\)",
        ),
        (lambda: model.CMTHead(TINY, 16)(None, None), "modality fusion was given nothing"),
        (lambda: model.Targets.pad([torch.zeros(1, 9)], [torch.zeros(1).long()]), "sample 0: a box has a length"),
        (
            lambda: evaluation.evaluate([], [random_detections(0)[1][0]], ("a",)),
            "1 samples with detections, expected 0",
        ),
    ],
)
def test_bad_arguments(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- generated scenes


def test_scenes_are_consistent() -> None:
    scenes = data.generate_scenes(20, gen())
    assert scenes.images.shape == (20, 4, 3, 32, 64) and int(scenes.valid.sum(1).min()) >= 2
    again = data.generate_scenes(20, gen())
    assert torch.equal(scenes.images, again.images) and torch.equal(scenes.points, again.points)
    right = total = hits = 0
    for i in range(20):
        sample = scenes.sample(i)
        grown = sample.boxes.clone()
        grown[:, 3:6] += 0.2
        hits += int(data.points_in_boxes(sample.points, grown).any(0).sum())
        assert not data.overlapping(sample.boxes).fill_diagonal_(False).any()
        for box, label in zip(sample.boxes, sample.labels):
            q = sample.lidar2img @ F.pad(box[:3].double(), (0, 1), value=1.0)
            for view in range(4):
                u, v = (q[view, :2] / q[view, 2]).tolist()
                if q[view, 2] > 0 and 0 <= u < 64 and 0 <= v < 32:
                    pixel = sample.images[view, :, int(v), int(u)]
                    shade = F.normalize(pixel - pixel.min() / 2, dim=0) @ F.normalize(data.COLOURS, dim=1).T
                    right, total = right + int(shade.argmax() == label), total + 1
    assert total > 50 and right / total > 0.95  # no box hides another; noise may change a hue
    assert hits == int(scenes.valid.sum())


def test_rays_meet_the_nearest_box() -> None:
    boxes = torch.tensor([[[6.0, 0, 0, 2, 2, 2, 0, 0, 0], [3.0, 0, 0, 1, 1, 1, math.pi / 4, 0, 0]]])
    rays = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [1.0, 0.15, 0.12]])
    distance, box, _ = data.cast_rays(rays, boxes, torch.ones(1, 2) > 0)
    assert box[0, 0] == 1 and float(distance[0, 0]) == pytest.approx(3 - math.sqrt(0.5), abs=1e-4)
    assert math.isinf(distance[0, 1])
    hidden, box, _ = data.cast_rays(rays, boxes, torch.tensor([[True, False]]))
    assert float(hidden[0, 0]) == pytest.approx(5) and box[0, 0] == 0


# ---- the real frame


@pytest.fixture(scope="module")
def frame_folder(data_root: Path) -> Path:
    folder = data_root / "nuscenes-one-frame"
    if not folder.is_dir():
        pytest.skip(f"no nuScenes frame at {folder}")
    return folder


def test_the_real_frame(frame_folder, run_paper) -> None:
    (frame,) = data.read_infos(data.locate(frame_folder, "train"))
    assert len(frame.boxes) == 69 and (frame.labels < 0).sum() == 1
    names = {data.CLASSES[label]: int((frame.labels == label).sum()) for label in range(10)}
    assert names == {
        "car": 8, "truck": 2, "construction_vehicle": 1, "bus": 1, "trailer": 0, "barrier": 22, "motorcycle": 0,
        "bicycle": 1, "pedestrian": 30, "traffic_cone": 3,
    }  # fmt: skip
    points = data.read_cloud(frame)
    assert points.shape == (34_688, 5) and not points[:, 4].any()
    counts = data.points_in_boxes(points.double(), torch.from_numpy(frame.boxes)).sum(0).numpy()
    assert (counts == frame.points).sum() >= 61
    source = data.NuScenes(
        data.locate(frame_folder, "val"), "fusion", (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0), (900, 1600)
    )
    raw = source.raw(0)
    q = torch.einsum("vij,nj->vni", raw.lidar2img, F.pad(points[:, :3].double(), (0, 1), value=1.0))
    u, v = q[..., 0] / q[..., 2], q[..., 1] / q[..., 2]
    seen = ((q[..., 2] > 1) & (u > 0) & (u < 1600) & (v > 0) & (v < 900)).sum(1).tolist()
    counts = (3067, 3079, 3704, 4826, 4097, 3379)  # in the order of CAMERAS, from the frame's description
    assert max(abs(n - m) for n, m in zip(seen, counts, strict=True)) <= 3
    assert len(source.sample(0).boxes) <= 54
    done = run_paper("cmt", ["--preset", "frame", "--check-data", "--data", frame_folder])
    assert done.code == 0 and "1 frames" in done.out and "69 boxes, 1 of no class" in done.out


def test_the_frame_preset_runs(frame_folder, run_paper, tmp_path) -> None:
    done = run_paper("cmt", ["--preset", "frame", "--data", frame_folder, "--epochs", "2", "--out", tmp_path / "run"])
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {"nuscenes/frame/masked/recall_2m", "nuscenes/frame/masked/NDS_without_lidar"} <= set(metrics)


# ---- runs


def test_claims_fail_for_a_broken_method(train, tmp_path, monkeypatch) -> None:
    """Masked-modal training that masks nothing is plain training: what it is said to bring is not there."""
    monkeypatch.setattr(train, "UNMASKED", tuple(train.ARMS))
    words = [
        "--epochs",
        "1",
        "--train-scenes",
        "8",
        "--test-scenes",
        "3",
        "--seed",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    assert train.main(words) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    verdict = {claim["name"]: claim for claim in result["claims"]}
    for name in ("masked_training_survives_without_lidar", "masked_training_survives_without_cameras"):
        assert not verdict[name]["holds"]
        assert verdict[name]["measured"]["masked"] == verdict[name]["measured"]["vanilla"]


def test_claims_fail_for_a_fusion_that_uses_one_sensor(train) -> None:
    """A fused model that has learned one sensor only has that sensor's scores with it and nothing without it."""
    from types import SimpleNamespace

    from shared.paper import read_paper

    folder = Path(train.__file__).parent
    recorded = json.loads((folder / "results" / "scenes-long.json").read_text())["metrics"]
    paper = read_paper(folder)

    def verdicts(**masked: float) -> dict[str, bool]:
        found: dict[str, bool] = {}
        means = {name: value["mean"] for name, value in recorded.items()}
        means |= {f"scenes/small/masked/{name}": value for name, value in masked.items()}
        run = SimpleNamespace(
            metrics={name: SimpleNamespace(mean=value) for name, value in means.items()},
            threshold=lambda claim, key="margin": float(paper.claim(claim).thresholds[key]),
            claim=lambda name, holds, **_: found.update({name: bool(holds)}),
        )
        train.decide(train.PRESETS["scenes-long"].config, run)
        return found

    assert all(verdicts().values())
    for sensor, lost in (("camera", "cameras"), ("lidar", "lidar")):
        alone = recorded[f"scenes/small/{sensor}/mAP"]["mean"]
        without = {f"mAP_without_{lost}": 0.0, f"AP_class_agnostic_without_{lost}": 0.0}
        found = verdicts(mAP=alone, **without)
        assert not found["fusion_beats_single_sensors"]
        assert not found[f"masked_training_survives_without_{lost}"]
        assert not found["one_model_nears_the_single_sensor_models"]


def test_the_cycle_of_the_learning_rate(train) -> None:
    config = train.PRESETS["fusion-vov"].config
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": list(net.parameters()), "scale": 0.01}], lr=1e-4)
    for progress, rate, beta in ((0, 1, 0.9), (0.2, 4.5, (0.9 + 0.8052632) / 2), (0.4, 8, 0.8052632), (1, 1e-4, 0.9)):
        train.set_cycle(optimizer, config, progress)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6 * rate)
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(beta, abs=1e-6)


# ---- mmdet3d


def write_tables(folder: Path, info: dict) -> None:
    """The least of v1.0-mini's tables that the devkit's evaluation reads, around one frame."""
    from PIL import Image
    from pyquaternion import Quaternion

    record = info["data_list"][0]
    token, names = record["token"], {v: k for k, v in info["metainfo"]["categories"].items()}
    general = {"car": "vehicle.car", "truck": "vehicle.truck", "bus": "vehicle.bus.rigid",
               "barrier": "movable_object.barrier",
               "construction_vehicle": "vehicle.construction", "bicycle": "vehicle.bicycle",
               "pedestrian": "human.pedestrian.adult", "traffic_cone": "movable_object.trafficcone"}  # fmt: skip
    lidar2global = np.array(record["ego2global"]) @ np.array(record["lidar_points"]["lidar2ego"])
    empty = ("attribute", "visibility", "instance", "sample_annotation")
    tables: dict[str, list] = {name: [] for name in empty}
    tables["log"] = [{"token": "log"}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "filename": "maps/map.png", "category": "semantic_prior"}]
    (folder / "maps").mkdir()
    Image.new("L", (4, 4)).save(folder / "maps" / "map.png")
    tables["category"] = [{"token": f"c{name}", "name": value} for name, value in general.items()]
    tables["sensor"] = [{"token": "lidar", "channel": "LIDAR_TOP", "modality": "lidar"}]
    tables["calibrated_sensor"] = [
        {
            "token": "cs",
            "sensor_token": "lidar",
            "translation": [0, 0, 0],
            "rotation": [1, 0, 0, 0],
            "camera_intrinsic": [],
        }
    ]
    ego = np.array(record["ego2global"])
    turn = Quaternion(matrix=np.linalg.qr(ego[:3, :3])[0] @ np.diag(np.sign(np.diag(np.linalg.qr(ego[:3, :3])[1]))))
    tables["ego_pose"] = [
        {"token": "ego", "translation": ego[:3, 3].tolist(), "rotation": turn.elements.tolist(), "timestamp": 0}
    ]
    tables["scene"] = [{"token": "scene", "name": "scene-0103", "log_token": "log", "first_sample_token": token}]
    tables["sample"] = [{"token": token, "scene_token": "scene", "timestamp": 0, "prev": "", "next": ""}]
    tables["sample_data"] = [
        {"token": "sd", "sample_token": token, "ego_pose_token": "ego", "calibrated_sensor_token": "cs",
         "is_key_frame": True,
         "timestamp": 0, "filename": "", "fileformat": "pcd", "prev": "", "next": ""}
    ]  # fmt: skip
    for i, row in enumerate(record["instances"]):
        name = names.get(row["bbox_label_3d"])
        if name is None:
            continue
        x, y, z, length, width, height, yaw = row["bbox_3d"]
        heading = lidar2global[:3, :3] @ np.array([np.cos(yaw), np.sin(yaw), 0])
        rotation = Quaternion(axis=(0, 0, 1), radians=float(np.arctan2(heading[1], heading[0])))
        tables["instance"].append({"token": f"i{i}", "category_token": f"c{name}"})
        tables["sample_annotation"].append({
            "token": f"a{i}", "sample_token": token, "instance_token": f"i{i}", "attribute_tokens": [],
            "visibility_token": "",
            "translation": (lidar2global @ (x, y, z, 1))[:3].tolist(), "size": [width, length, height],
            "rotation": rotation.elements.tolist(), "num_lidar_pts": int(row["num_lidar_pts"]),
            "num_radar_pts": int(row["num_radar_pts"]), "prev": "", "next": "",
        })  # fmt: skip
    (folder / "v1.0-mini").mkdir()
    for name, rows in tables.items():
        (folder / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))


def test_mmdet3d_trains_and_tests_on_the_real_frame(frame_folder, tmp_path, monkeypatch, train) -> None:
    """Through mmengine's Runner with mmdet3d's data set, loading, and NuScenesMetric; perfect boxes then score one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mmdet3d.models.detectors")
        from mmengine import Config
        from mmengine.runner import Runner

        import mmdet3d_plugin
    info = pickle.loads(data.locate(frame_folder, "train").read_bytes())
    for split in ("train", "val"):
        (tmp_path / f"nuscenes_infos_{split}.pkl").write_bytes(pickle.dumps(info))
    (tmp_path / "samples" / "LIDAR_TOP").mkdir(parents=True)
    for path in frame_folder.glob("*__*"):
        sensor = path.name.split("__")[1]
        (tmp_path / "samples" / sensor).mkdir(exist_ok=True)
        (tmp_path / "samples" / sensor / path.name).symlink_to(path)
    write_tables(tmp_path, info)

    config = Config.fromfile(Path(train.__file__).parent / "mmdet3d_config.py")
    config.merge_from_dict({"work_dir": str(tmp_path / "work"), "train_cfg.max_epochs": 2, "train_cfg.val_interval": 2})
    config.launcher, config.log_level = "none", "ERROR"
    config.model.architecture = "frame"
    config.model.data_preprocessor.pad_size_divisor = 16
    config.param_scheduler = []
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        inner = loader.dataset.dataset if loader.dataset.type == "CBGSDataset" else loader.dataset
        inner.update(data_root=f"{tmp_path}/", metainfo={"classes": list(data.CLASSES), "version": "v1.0-mini"})
        for step in inner.pipeline:
            if step["type"] == "CMTSample":
                step.update(architecture="frame", size=(224, 400))
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    config.train_dataloader.dataset = config.train_dataloader.dataset.dataset
    for judge in (config.val_evaluator, config.test_evaluator):
        judge.update(data_root=str(tmp_path), ann_file=str(tmp_path / "nuscenes_infos_val.pkl"))
    runner = Runner.from_cfg(config)
    runner.train()
    scores = runner.test()
    assert 0 <= scores["NuScenes metric/pred_instances_3d_NuScenes/NDS"] < 1

    source = data.NuScenes(data.locate(frame_folder, "val"), "lidar", (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0), (224, 400))
    boxes, labels = source.truth(0)
    perfect = model.Detections(boxes, torch.ones(len(boxes)), labels)
    monkeypatch.setattr(mmdet3d_plugin, "detect", lambda predictions: [perfect])
    scores = runner.test()
    every = evaluation.Boxes(boxes.numpy(), labels.numpy())
    own = evaluation.within_range(every, data.CLASSES, source.frames[0].vehicle)
    present = len(np.unique(own.labels))
    assert scores["NuScenes metric/pred_instances_3d_NuScenes/mAP"] == pytest.approx(present / 10, abs=1e-3)
    for error in ("mATE", "mASE"):  # nothing for the classes that are there, one for the others
        got = scores[f"NuScenes metric/pred_instances_3d_NuScenes/{error}"]
        assert got == pytest.approx(1 - present / 10, abs=1e-3)
