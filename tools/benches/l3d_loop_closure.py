"""Loop closure: descriptor, losses, scores and registration beside the forms of the released scripts, equal values."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from papers.l3d_loop_closure import data, model
from tools.bench import Workload

RADIUS = 2 * math.sqrt(3)


# ---- the released forms


def layered(net: model.DIP, points: Tensor) -> tuple[Tensor, Tensor]:
    """The network layer by layer on padded (K, 3, n) patches."""

    def trunk(part: model.PointNet, x: Tensor) -> Tensor:
        return part.conv3(part.conv2(part.conv1(x))).max(2).values

    tnet = net.stn3d
    turn = tnet.fc3(tnet.fc2(tnet.fc1(trunk(tnet, points)))).view(-1, 3, 3) + torch.eye(3)
    turned = torch.bmm(turn, points)
    return F.normalize(net.fc3(net.fc2(net.fc1(trunk(net, turned)))), dim=1), turned


def stacked_contrastive(f: Tensor, g: Tensor) -> Tensor:
    """Hardest-contrastive loss from (N, N, D) stacks."""
    n = len(f)
    distance = torch.norm(torch.stack([f] * n) - torch.stack([g] * n).transpose(0, 1), dim=2).T + 1e9 * torch.eye(n)
    near = F.relu(torch.norm(f - g, dim=1) - 0.1).square().mean()
    return near + 0.5 * sum(F.relu(1.4 - distance.min(k).values).square().mean() for k in (0, 1))


def dense_chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer distance with a gradient through all squared distances (K, 3, n)."""
    distance = (x.unsqueeze(3) - y.unsqueeze(2)).square().sum(1)
    return 0.5 * (distance.min(2).values.mean() + distance.min(1).values.mean())


def frame_and_patch(tree: Any, cloud: np.ndarray, point: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The patch of one key point, as the released class cuts it."""
    around = cloud[tree.query_ball_point(point, RADIUS)].T
    near = around[:, np.linalg.norm(around - point[:, None], axis=0) > 0]
    values, vectors = np.linalg.eig((near - point[:, None]) @ (near - point[:, None]).T / 3)
    normal = vectors[:, np.argmin(values)]
    z = normal if (normal @ (point[:, None] - near)).sum() > 0 else -normal
    v = (near - point[:, None]) - np.outer(z, (near - point[:, None]).T @ z)
    alpha = (RADIUS - np.linalg.norm(point[:, None] - near, axis=0)) ** 2
    x = v @ (alpha * ((near - point[:, None]).T @ z) ** 2)
    x = x / np.linalg.norm(x)
    patch = (np.stack([x, np.cross(x, z), z]) @ (around - point[:, None])).T / RADIUS
    if len(patch) < size:
        patch = np.concatenate([patch, np.zeros((size - len(patch), 3))])
    return patch[rng.choice(len(patch), size, replace=False)]


def sorted_range_image(points: np.ndarray) -> np.ndarray:
    """Range image through a sort by depth, with the arrays of vertices, intensities and indices beside it."""
    depth = np.linalg.norm(points[:, :3], 2, axis=1)
    keep = (depth > 0) & (depth < 50)
    points, depth = points[keep], depth[keep]
    yaw, pitch = -np.arctan2(points[:, 1], points[:, 0]), np.arcsin(points[:, 2] / depth)
    up, down = math.radians(3), math.radians(-25)
    x = np.clip(np.floor(0.5 * (yaw / np.pi + 1) * 900), 0, 899).astype(np.int32)
    y = np.clip(np.floor((1 - (pitch - down) / (up - down)) * 64), 0, 63).astype(np.int32)
    order = np.argsort(depth)[::-1]
    image, vertex = np.full((64, 900), -1, np.float32), np.full((64, 900, 4), -1, np.float32)
    index, other = np.full((64, 900), -1, np.int32), np.full((64, 900), -1, np.float32)
    image[y[order], x[order]] = depth[order]
    vertex[y[order], x[order]] = points[order]
    index[y[order], x[order]] = np.arange(len(depth))[order]
    other[y[order], x[order]] = points[order, 3]
    return image


def dense_ron(a: Tensor, b: Tensor, descriptors: tuple[Tensor, Tensor], pose: Tensor) -> float:
    """Mutual nearest neighbours from two dense distance matrices, then the share of close pairs."""
    f, g = (x.double() for x in descriptors)
    there, back = torch.cdist(f, g).min(1).indices, torch.cdist(g, f).min(1).indices
    mutual = torch.arange(len(f)) == back[there]
    moved = model.apply(model.inverse(pose), b.double())
    gap = (a.double() - moved[there]).norm(dim=1)
    return float((gap[mutual] < 1).sum() / mutual.sum().clamp_min(1))


def one_by_one(p: np.ndarray, q: np.ndarray, hypotheses: int, threshold: float, rng: np.random.Generator) -> int:
    """RANSAC in a loop over hypotheses."""
    best = 0
    for _ in range(hypotheses):
        triple = rng.integers(len(p), size=3)
        a, b = p[triple], q[triple]
        one, two = (np.linalg.norm(x - np.roll(x, 1, 0), axis=1) for x in (a, b))
        if not ((one >= 0.9 * two) & (two >= 0.9 * one)).all():
            continue
        u, _, vt = np.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
        rotation = vt.T @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ u.T
        moved = (p - a.mean(0)) @ rotation.T + b.mean(0)
        if (np.linalg.norm(moved[triple] - b, axis=1) > threshold).any():
            continue
        best = max(best, int((np.linalg.norm(moved - q, axis=1) <= threshold).sum()))
    return best


# ---- workloads


@functools.cache
def scan(rows: int = 9) -> Tensor:
    """A scan of about 120,000 points: sweeps of a generated street from one place, each turned a little."""
    city = data.generate_city(0)
    draws = torch.Generator().manual_seed(0)
    sweeps = [data.cast_rays(city, 20.0, 0.0, 0.1 * k, 0.02, draws) for k in range(rows)]
    turns = [torch.tensor([0.0, 0, 0, 0, 0, 0.1 * k], dtype=torch.float64) for k in range(rows)]
    return torch.cat([model.apply(model.se3_exp(t).float(), s) for t, s in zip(turns, sweeps, strict=True)])[:120_000]


def network(form: str, patches: int) -> Callable[[], Any]:
    """Descriptors of patches with about 190 neighbours in 256 places, released widths."""
    torch.manual_seed(0)
    net = model.DIP().eval()
    cloud = model.voxel_downsample(scan(), 0.3)
    keys = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(0))[:patches]]
    found = model.local_patches(cloud, keys, RADIUS, 256, torch.Generator().manual_seed(0))
    if form == "ours":
        return lambda: net.describe(found)
    padded = found.points.mT.contiguous()

    def released() -> Tensor:
        with torch.no_grad():
            return torch.cat([layered(net, part)[0] for part in padded.split(500)])

    return released


def training(form: str) -> Callable[[], Any]:
    """One optimiser step: 64 pairs of patches of 256 points, released widths."""
    torch.manual_seed(0)
    net = model.DIP()
    optimiser = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=1e-3)
    x, y = 0.4 * torch.randn(64, 256, 3), 0.4 * torch.randn(64, 256, 3)

    def step() -> None:
        optimiser.zero_grad()
        if form == "ours":
            loss = model.dip_loss(net(x), net(y))
        else:
            (f, a), (g, b) = layered(net, x.mT), layered(net, y.mT)
            loss = stacked_contrastive(f, g) + dense_chamfer(a, b)
        loss.backward()
        optimiser.step()

    return step


def widest(form: str) -> Callable[[], Any]:
    """The widest layer, batch normalisation and maximum over 64 x 256 points, both passes."""
    torch.manual_seed(0)
    net = model.DIP()
    x = torch.randn(64, 256, 512).relu().requires_grad_()
    layer = copy.deepcopy(net.conv3)

    def step() -> None:
        x.grad = None
        if form == "ours":
            conv, norm = net.conv3[0], net.conv3[1]
            model._LinearNormMax.apply(x, conv.weight.squeeze(-1), norm.weight, norm.bias, norm.eps)[0].sum().backward()
        else:
            layer(x.mT).max(2).values.sum().backward()

    return step


def cutting(form: str) -> Callable[[], Any]:
    """Local frames and patches of 1,000 key points of a voxel-0.3 cloud."""
    cloud = model.voxel_downsample(scan(), 0.3)
    keys = cloud[:: len(cloud) // 1000][:1000]
    if form == "ours":
        draws = torch.Generator().manual_seed(0)
        return lambda: model.local_patches(cloud, keys, RADIUS, 256, draws)
    from scipy.spatial import cKDTree

    points, rng = cloud.double().numpy(), np.random.default_rng(0)
    tree = cKDTree(points)
    return lambda: [frame_and_patch(tree, points, key, 256, rng) for key in keys.double().numpy()]


def contrasting(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    """Hardest-contrastive loss of 256 descriptors of 32, forward."""
    torch.manual_seed(0)
    f, g = F.normalize(torch.randn(256, 32)), F.normalize(torch.randn(256, 32))
    return lambda: form(f, g)


def projecting(form: str) -> Callable[[], Any]:
    """Range image of 120,000 points."""
    points = scan().double()
    if form == "ours":
        return lambda: model.range_image(points)
    rows = torch.cat([points, torch.ones(len(points), 1)], 1).numpy()
    return lambda: sorted_range_image(rows)


def overlapping(form: str) -> Callable[[], Any]:
    """Overlap of four candidates with one frame: the frame's image is made once instead of four times."""
    points, pose = scan().double(), model.se3_exp(torch.tensor([1.0, 0, 0, 0, 0, 0.1], dtype=torch.float64))

    def ours() -> list[float]:
        image = model.range_image(points)
        return [model.image_overlap(image, model.range_image(model.apply(pose, points))) for _ in range(4)]

    rows = torch.cat([points, torch.ones(len(points), 1)], 1).numpy()

    def released() -> list[float]:
        out = []
        for _ in range(4):
            current, reference = sorted_range_image(rows), sorted_range_image((pose.numpy() @ rows.T).T)
            close = np.abs(reference[reference > 0] - current[reference > 0]) < 1
            out.append(np.count_nonzero(close) / np.count_nonzero(current > 0))
        return out

    return ours if form == "ours" else released


def matching(form: str) -> Callable[[], Any]:
    """Mutual nearest neighbours and RON of 2,500 x 2,500 descriptors of 32."""
    torch.manual_seed(0)
    f, g = F.normalize(torch.randn(2500, 32)), F.normalize(torch.randn(2500, 32))
    a, b, pose = 20 * torch.randn(2500, 3), 20 * torch.randn(2500, 3), torch.eye(4, dtype=torch.float64)
    if form == "ours":
        return lambda: model.ron(a, b, model.mutual_pairs(f, g), pose)
    return lambda: dense_ron(a, b, (f, g), pose)


def registering(form: str) -> Callable[[], Any]:
    """RANSAC over 2,000 correspondences, a fifth of them right, 5,000 hypotheses."""
    draws = torch.Generator().manual_seed(0)
    p = 20 * torch.randn(2000, 3, generator=draws, dtype=torch.float64)
    q = model.apply(model.se3_exp(torch.tensor([5.0, 1, 0, 0, 0, 1], dtype=torch.float64)), p)
    q[400:] = 20 * torch.randn(1600, 3, generator=draws, dtype=torch.float64)
    if form == "ours":
        return lambda: model.ransac(p, q, 0.5, 5000, draws)
    rng = np.random.default_rng(0)
    return lambda: one_by_one(p.numpy(), q.numpy(), 5000, 0.5, rng)


def describing() -> Callable[[], Any]:
    """All of a scan: thinning, patches and released network at 5,000 key points."""
    torch.manual_seed(0)
    net, points, draws = model.DIP().eval(), scan(), torch.Generator().manual_seed(0)

    def step() -> Tensor:
        cloud = model.voxel_downsample(points, 0.3)
        keys = cloud[torch.randperm(len(cloud), generator=draws)[:5000]]
        return net.describe(model.local_patches(cloud, keys, RADIUS, 256, draws))[0]

    return step


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    layers = "layers on padded patches, as released"
    yield Workload(
        "descriptors of 256 patches, released widths",
        bind(network, "ours", 256),
        bind(network, "released", 256),
        layers,
        target=2.0,
    )
    yield Workload(
        "training step, 64 pairs x 256 points, released widths",
        bind(training, "ours"),
        bind(training, "released"),
        "layers, (N, N, D) stacks, dense Chamfer",
        target=2.0,
    )
    yield Workload(
        "widest layer, normalisation and maximum, 64 x 256 points, both passes",
        bind(widest, "ours"),
        bind(widest, "released"),
        "conv, batch norm, max",
        target=1.5,
    )
    yield Workload(
        "frames and patches of 1,000 key points",
        bind(cutting, "ours"),
        bind(cutting, "released"),
        "loop over key points",
        target=2.0,
    )
    yield Workload(
        "hardest-contrastive loss, 256 x 32",
        bind(contrasting, model.hardest_contrastive),
        bind(contrasting, stacked_contrastive),
        "(N, N, D) stacks",
        target=2.0,
    )
    yield Workload(
        "range image, 120,000 points",
        bind(projecting, "ours"),
        bind(projecting, "released"),
        "sort by depth",
        target=2.0,
    )
    yield Workload(
        "overlaps of one frame with four candidates",
        bind(overlapping, "ours"),
        bind(overlapping, "released"),
        "both scans projected for each pair",
        target=2.0,
    )
    yield Workload(
        "mutual neighbours and RON, 2,500 x 2,500 x 32",
        bind(matching, "ours"),
        bind(matching, "dense"),
        "two dense distance matrices",
        target=2.0,
    )
    yield Workload(
        "RANSAC, 2,000 correspondences, 5,000 hypotheses",
        bind(registering, "ours"),
        bind(registering, "loop"),
        "loop over hypotheses",
        target=2.0,
    )
    yield Workload(
        "5,000 key points of a 120,000-point scan, released widths",
        describing,
        other_name="the limit of 20 s",
        other_seconds=20.0,
        target=1.0,
    )
