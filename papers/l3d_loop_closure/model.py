"""Loop closure detection with local 3D descriptors: DIP, registration, RON and the scores beside it, pose graphs.

A pair of scans is described by DIP (patches in local reference frames through a PointNet), registered by RANSAC over
nearest descriptors, and scored by RON, the share of mutually nearest descriptors whose points lie close together
after registration. Points are (n, 3) in metres; a pose is a (4, 4) rigid motion; geometry is computed in float64.
A pose of a pair maps the current scan to the reference. Sections: RA-L 7(3) 2022 (arXiv 2111.00440) for the scores,
ICPR 2020 (arXiv 2009.00258) for the descriptor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor, nn

# ---- rigid motions ---------------------------------------------------------------------------------------------


def apply(pose: Tensor, points: Tensor) -> Tensor:
    """Points (..., n, 3) moved by a pose (..., 4, 4)."""
    return points @ pose[..., :3, :3].mT + pose[..., None, :3, 3]


def inverse(pose: Tensor) -> Tensor:
    """Inverse of rigid motions (..., 4, 4)."""
    rotation = pose[..., :3, :3].mT
    return rigid(rotation, -(rotation @ pose[..., :3, 3:]).squeeze(-1))


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotation (..., 3, 3) and translation (..., 3) as (..., 4, 4)."""
    top = torch.cat([rotation, translation.unsqueeze(-1)], -1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], -2)


def check_rigid(pose: Tensor) -> None:
    """Refuse a matrix that is no rigid motion.

    Raises:
        ValueError: another shape, or a rotation part that is not orthonormal with determinant 1 (stated).
    """
    if pose.shape[-2:] != (4, 4):
        raise ValueError(f"a pose has shape {tuple(pose.shape)}, expected (4, 4)")
    rotation = pose[..., :3, :3].to(torch.float64)
    determinant = torch.linalg.det(rotation)
    off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax((-2, -1))
    wrong = ~((determinant - 1).abs() < 1e-3) | ~(off < 1e-3)
    if wrong.any():
        raise ValueError(f"a pose is not rigid: determinant {float(determinant[wrong].reshape(-1)[0]):.6g}, expected 1")


def hat(vector: Tensor) -> Tensor:
    """Skew-symmetric matrices (..., 3, 3) of vectors (..., 3)."""
    x, y, z = vector.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4) as x, y, z, w with w >= 0 of rotations (..., 3, 3); exact at half turns too."""
    m = rotation
    d = torch.diagonal(m, dim1=-2, dim2=-1)
    trace = d.sum(-1, keepdim=True)
    square = torch.cat([1 + 2 * d - trace, 1 + trace], -1)  # 4 x^2, 4 y^2, 4 z^2, 4 w^2
    best = square.argmax(-1)
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    sx, sy, sz, sw = square.unbind(-1)
    products = torch.stack([sx, xy, xz, wx, xy, sy, yz, wy, xz, yz, sz, wz, wx, wy, wz, sw], -1).unflatten(-1, (4, 4))
    q = products.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., 3:] < 0, -q, q)


def rotation_of(q: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of quaternions (..., 4) x, y, z, w of any length but 0."""
    q = q / q.norm(dim=-1, keepdim=True)
    v = hat(q[..., :3])
    return torch.eye(3, dtype=q.dtype) + 2 * q[..., 3, None, None] * v + 2 * v @ v


def se3_exp(twist: Tensor) -> Tensor:
    """Exponential of twists (..., 6), translation first; (..., 4, 4)."""
    generator = torch.zeros(*twist.shape[:-1], 4, 4, dtype=twist.dtype)
    generator[..., :3, :3] = hat(twist[..., 3:])
    generator[..., :3, 3] = twist[..., :3]
    return torch.linalg.matrix_exp(generator)


def se3_log(pose: Tensor) -> Tensor:
    """Logarithm of poses (..., 4, 4): twists (..., 6), translation first, angle in [0, pi]."""
    q = quaternion(pose[..., :3, :3])
    half = q[..., :3].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(half, q[..., 3:])
    omega = q[..., :3] * torch.where(half > 1e-9, angle / half.clamp_min(1e-12), torch.full_like(half, 2.0))
    w = hat(omega)
    a = angle.unsqueeze(-1)
    # Inverse of the left Jacobian of SO(3); the last factor tends to 1/12 at angle 0.
    factor = (1 - 0.5 * a / torch.tan(0.5 * a.clamp_min(1e-6))) / a.clamp_min(1e-6).square()
    factor = torch.where(a > 1e-4, factor, torch.full_like(a, 1 / 12))
    translation = pose[..., :3, 3:] - 0.5 * w @ pose[..., :3, 3:] + factor * w @ (w @ pose[..., :3, 3:])
    return torch.cat([translation.squeeze(-1), omega], -1)


def kabsch(source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Rigid motion that moves points onto their partners with least squares.

    Args:
        source, target: (..., n, 3). weight: (..., n), at least one positive.

    Returns:
        (..., 4, 4) float64.
    """
    p, q = source.to(torch.float64), target.to(torch.float64)
    w = torch.ones(p.shape[:-1], dtype=p.dtype) if weight is None else weight.to(p.dtype)
    w = (w / w.sum(-1, keepdim=True)).unsqueeze(-1)
    p0, q0 = (w * p).sum(-2), (w * q).sum(-2)
    u, _, vt = torch.linalg.svd((w * (p - p0.unsqueeze(-2))).mT @ (q - q0.unsqueeze(-2)))
    sign = torch.ones_like(p0)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()  # a reflection fits better when points are coplanar
    rotation = vt.mT @ (sign.unsqueeze(-1) * u.mT)
    return rigid(rotation, q0 - (rotation @ p0.unsqueeze(-1)).squeeze(-1))


def pose_error(estimate: Tensor, truth: Tensor) -> tuple[float, float]:
    """Distance in metres and angle in degrees between two poses."""
    difference = inverse(truth.to(torch.float64)) @ estimate.to(torch.float64)
    q = quaternion(difference[:3, :3])
    angle = 2 * math.degrees(math.atan2(float(q[:3].norm()), float(q[3])))
    return float((estimate[:3, 3] - truth[:3, 3]).norm()), angle


# ---- neighbours, local reference frames and patches ---------------------------------------------------------------


def voxel_downsample(points: Tensor, size: float) -> Tensor:
    """Mean point of each occupied cubic cell.

    Args:
        points: (n, 3). size: side of a cell in metres, > 0.

    Returns:
        (m, 3), m <= n, ordered by cell.
    """
    cell = ((points - points.amin(0)) / size).floor().to(torch.int64)
    shape = cell.amax(0) + 1
    _, inverse_index, count = torch.unique(
        (cell[:, 0] * shape[1] + cell[:, 1]) * shape[2] + cell[:, 2], return_inverse=True, return_counts=True
    )
    order = inverse_index.argsort(stable=True)
    return torch.segment_reduce(points[order], "mean", lengths=count, axis=0)


class Neighbours(NamedTuple):
    """Pairs of a query ``row`` (M,), ascending, and a near point ``column`` (M,); ``count`` (K,) of each query."""

    row: Tensor
    column: Tensor
    count: Tensor

    @property
    def rank(self) -> Tensor:
        """(M,) place of each pair among those of its query."""
        return torch.arange(len(self.row)) - (self.count.cumsum(0) - self.count)[self.row]

    def thinned(self, most: int) -> Neighbours:
        """At most ``most`` pairs of each query, evenly spread over the order of the cloud."""
        stride = (self.count + most - 1) // most
        keep = self.rank % stride[self.row].clamp_min(1) == 0
        row = self.row[keep]
        return Neighbours(row, self.column[keep], torch.bincount(row, minlength=len(self.count)))


def radius_neighbours(queries: Tensor, cloud: Tensor, radius: float) -> Neighbours:
    """All pairs of a query (K, 3) and a point of the cloud (n, 3) at most ``radius`` apart, ordered by both indices."""
    a, b = (cKDTree(x.detach().to(torch.float64).numpy()) for x in (queries, cloud))
    found = a.sparse_distance_matrix(b, radius, output_type="ndarray")
    key = np.sort(found["i"].astype(np.int64) * len(cloud) + found["j"])
    row = torch.from_numpy(key // len(cloud))
    return Neighbours(row, torch.from_numpy(key % len(cloud)), torch.bincount(row, minlength=len(queries)))


def local_frames(offsets: Tensor, near: Neighbours, radius: float) -> tuple[Tensor, Tensor]:
    """Local reference frame of each key point (DIP, sec. III-A; Gojcic et al. 2019, eq. 3 to 5).

    z is the direction of least spread, on the side away from the neighbours; x is the mean direction in the tangent
    plane, weighted towards near neighbours and large heights. y = x cross z makes the frame left-handed, as released.

    Args:
        offsets: (M, 3) float64, neighbour minus key point; the key point itself adds nothing. near: the pairs.
            radius: of the neighbourhood, metres.

    Returns:
        frames (K, 3, 3) with columns x, y, z, and valid (K,) bool: at least three neighbours that are not all in one
        plane (x is undefined there). Frames that are not valid are NaN.
    """

    def total(values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=near.count, axis=0, initial=0.0)

    covariance = total((offsets.unsqueeze(2) * offsets.unsqueeze(1)).flatten(1)).view(-1, 3, 3)  # eq. 3
    normal = torch.linalg.eigh(covariance).eigenvectors[..., 0]
    side = (normal * total(-offsets)).sum(1, keepdim=True)
    z = torch.where(side > 0, normal, -normal)  # eq. 4
    height = (offsets * z[near.row]).sum(1, keepdim=True)
    distance = offsets.norm(dim=1, keepdim=True)
    alpha, beta = (radius - distance).square(), height.square()
    tangent = offsets - height * z[near.row]
    x = total(alpha * beta * tangent)  # eq. 5
    length = x.norm(dim=1, keepdim=True)
    others = total((distance > 0).to(offsets.dtype)).squeeze(1)
    valid = (others >= 3) & (length.squeeze(1) > 1e-10 * others * radius**5)
    x = x / length
    frames = torch.stack([x, torch.linalg.cross(x, z), z], -1)
    frames[~valid] = math.nan
    return frames, valid


class Patches(NamedTuple):
    """``points`` (K, size, 3) float32 in their frames, zeros behind the last point; ``count`` (K,) neighbours found
    within the radius, the key point included; ``valid`` (K,) bool; ``frames`` (K, 3, 3)."""

    points: Tensor
    count: Tensor
    valid: Tensor
    frames: Tensor


def local_patches(cloud: Tensor, keypoints: Tensor, radius: float, size: int, generator: torch.Generator) -> Patches:
    """Patches around key points: neighbours in the local frame, divided by the radius, a random subset of ``size``.

    Args:
        cloud: (n, 3). keypoints: (K, 3). radius: metres. size: points of a patch. generator: of the subset.

    Raises:
        ValueError: radius or size not positive.
    """
    if radius <= 0 or size < 1:
        raise ValueError(f"a patch has radius {radius} m and {size} points, expected a positive radius and size")
    near = radius_neighbours(keypoints, cloud, radius)
    offsets = cloud.to(torch.float64)[near.column] - keypoints.to(torch.float64)[near.row]
    frames, valid = local_frames(offsets, near, radius)
    # Ordering by row plus a number in [0, 1) shuffles each row; its first ones are a subset without replacement.
    order = (near.row + torch.rand(len(near.row), generator=generator, dtype=torch.float64)).argsort()
    keep = (near.rank < size) & valid[near.row]
    row, chosen = near.row[keep], order[keep]
    points = torch.zeros(len(keypoints), size, 3)
    points[row, near.rank[keep]] = ((offsets[chosen].unsqueeze(1) @ frames[row]).squeeze(1) / radius).float()
    return Patches(points, near.count, valid, frames)


def correspondences(current: Tensor, reference: Tensor, pose: Tensor, distance: float) -> Tensor:
    """Pairs (m, 2) of indices of points that are each other's nearest after ``pose`` and at most ``distance`` apart."""
    moved, fixed = apply(pose, current.to(torch.float64)).numpy(), reference.to(torch.float64).numpy()
    gap, there = cKDTree(fixed).query(moved, distance_upper_bound=distance)
    _, back = cKDTree(moved).query(fixed, distance_upper_bound=distance)
    index = np.flatnonzero(np.isfinite(gap))
    index = index[back[there[index]] == index]
    return torch.from_numpy(np.stack([index, there[index]], 1))


def farthest_points(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of points chosen one by one, each the farthest from those before; the first one is random.

    Raises:
        ValueError: fewer points than asked for.
    """
    if count > len(points):
        raise ValueError(f"{count} farthest points of {len(points)}")
    chosen = torch.empty(count, dtype=torch.int64)
    chosen[0] = torch.randint(len(points), (), generator=generator)
    gap = torch.full((len(points),), math.inf, dtype=points.dtype)
    for i in range(1, count):  # each choice depends on the one before
        gap = torch.minimum(gap, (points - points[chosen[i - 1]]).square().sum(1))
        chosen[i] = gap.argmax()
    return chosen


# ---- the descriptor (DIP) -------------------------------------------------------------------------------------------


class _LinearNormMax(torch.autograd.Function):
    """Maximum over points of batch-normalised linear outputs, which are never stored.

    With batch statistics from the mean and covariance of the inputs, only the points that win a maximum and products
    of the size of the input remain in both passes. The linear bias cancels in the normalisation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
        k, n, _ = x.shape
        flat = x.flatten(0, 1)
        mean = flat.mean(0)
        covariance = flat.T @ flat / len(flat) - mean.outer(mean)
        mu = weight @ mean
        var = ((weight @ covariance) * weight).sum(1).clamp_min(0)
        sign = torch.where(gamma < 0, -1.0, 1.0).to(x.dtype)
        signed = (weight * sign.unsqueeze(1)).T
        step = max(1, CHUNK // (n * len(weight)))
        parts = [(part.flatten(0, 1) @ signed).view(len(part), n, -1).max(1) for part in x.split(step)]
        best, index = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
        scale = (var + eps).rsqrt()
        normal = (best * sign - mu) * scale
        ctx.save_for_backward(x, weight, gamma, mean, covariance, scale, normal, index)
        ctx.mark_non_differentiable(mu, var)
        return normal * gamma + beta, mu, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, mean, covariance, scale, normal, index = ctx.saved_tensors
        k, n, _ = x.shape
        flat = x.flatten(0, 1)
        by_normal = grad * gamma
        to_mu = -(by_normal * scale).sum(0)
        to_var = -0.5 * scale.square() * (by_normal * normal).sum(0)
        # The winners' part is a sparse matrix (points, channels) with one entry for each patch and channel.
        at = index + n * torch.arange(k, device=x.device).unsqueeze(1)
        value, size = by_normal * scale, (len(flat), weight.shape[0])
        channel = torch.arange(size[1], device=x.device).repeat_interleave(k)
        by_channel = torch.sparse_coo_tensor(
            torch.stack([channel, at.T.flatten()]),
            value.T.flatten(),
            size[::-1],
            is_coalesced=True,
            check_invariants=False,
        )
        order = at.flatten().argsort(stable=True)
        by_point = torch.sparse_coo_tensor(
            torch.stack([at.flatten()[order], order % size[1]]),
            value.flatten()[order],
            size,
            is_coalesced=True,
            check_invariants=False,
        )
        to_weight = by_channel @ flat + to_mu.outer(mean) + 2 * to_var.unsqueeze(1) * (weight @ covariance)
        spread = (weight.T * to_var) @ weight * (2 / len(flat))
        to_x = torch.addmm((to_mu @ weight) / len(flat) - mean @ spread, flat, spread) + by_point @ weight
        return to_x.view_as(x), to_weight, (grad * normal).sum(0), grad.sum(0), None


CHUNK = 1 << 21
"""Activations (points x channels) that are held at a time; a few times this many bytes should fit the cache."""


class PointNet(nn.Module):
    """Shared layers on the points, a maximum over points, layers on the maximum (DIP, fig. 2).

    Args:
        outputs: length of the output. widths: of the three layers on points. hidden: of the two layers behind the
            maximum. dropout: before the last batch normalisation. Names of parameters are those of the released code.
    """

    def __init__(
        self, outputs: int, widths: tuple[int, int, int], hidden: tuple[int, int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        a, b, c = widths
        self.conv1 = nn.Sequential(nn.Conv1d(3, a, 1), nn.BatchNorm1d(a), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU())
        self.conv3 = nn.Sequential(nn.Conv1d(b, c, 1), nn.BatchNorm1d(c))
        drop = [nn.Dropout(dropout)] if dropout else []
        self.fc1 = nn.Sequential(nn.Linear(c, hidden[0]), nn.BatchNorm1d(hidden[0]), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(hidden[0], hidden[1]), *drop, nn.BatchNorm1d(hidden[1]), nn.ReLU())
        self.fc3 = nn.Sequential(nn.Linear(hidden[1], outputs))

    def pool(self, points: Tensor) -> Tensor:
        """Largest activation of each channel over the points (K, n, 3); (K, widths[-1])."""
        x = points
        for layer in (self.conv1, self.conv2):
            x = _linear_norm(layer, x, self.training).relu()
        if not self.training:
            return _linear_norm(self.conv3, x, False).amax(1)
        conv, norm = self.conv3[0], self.conv3[1]
        with torch.autocast(x.device.type, enabled=False):  # sums over all points need the digits
            weight = conv.weight.squeeze(-1)
            pooled, mu, var = _LinearNormMax.apply(x.to(weight.dtype), weight, norm.weight, norm.bias, norm.eps)
        with torch.no_grad():
            count = x.shape[0] * x.shape[1]
            norm.running_mean.lerp_(mu + conv.bias, norm.momentum)
            norm.running_var.lerp_(var * (count / max(1, count - 1)), norm.momentum)
            norm.num_batches_tracked += 1
        return pooled

    def head(self, pooled: Tensor) -> Tensor:
        """The layers behind the maximum, (K, widths[-1]) to (K, outputs)."""
        out: Tensor = self.fc3(self.fc2(self.fc1(pooled)))
        return out


def _linear_norm(layer: nn.Module, x: Tensor, training: bool) -> Tensor:
    """A layer on points (..., C): linear and batch normalisation; one product where the statistics are fixed."""
    conv, norm = layer[0], layer[1]  # type: ignore[index]
    weight = conv.weight.squeeze(-1)
    if training:
        return norm(F.linear(x.flatten(0, -2), weight, conv.bias)).view(*x.shape[:-1], -1)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.linear(x, weight * scale.unsqueeze(1), (conv.bias - norm.running_mean) * scale + norm.bias)


class Described(NamedTuple):
    """Output of ``DIP``: unit ``descriptor`` (K, dim); ``points`` (K, n, 3), the patches turned by ``turn`` (K, 3, 3);
    ``pooled`` (K, widths[-1]), whose norm is rho, the quality of a descriptor."""

    descriptor: Tensor
    points: Tensor
    turn: Tensor
    pooled: Tensor


class DIP(PointNet):
    """Distinctive 3D local deep descriptor (DIP, sec. III-B): a PointNet that first turns its patch.

    The defaults are the released network, whose checkpoint ``load_state_dict`` takes as it is.

    Raises:
        ValueError: a size below 1, or a dropout outside of [0, 1).
    """

    def __init__(
        self,
        dim: int = 32,
        widths: tuple[int, int, int] = (256, 512, 1024),
        hidden: tuple[int, int] = (512, 256),
        dropout: float = 0.3,
    ) -> None:
        if min(dim, *widths, *hidden) < 1 or not 0 <= dropout < 1:
            raise ValueError(f"dim {dim}, widths {widths}, hidden {hidden} and dropout {dropout}: expected sizes >= 1")
        super().__init__(dim, widths, hidden, dropout)
        self.stn3d = PointNet(9, widths, hidden)

    def forward(self, points: Tensor) -> Described:
        """Describe patches.

        Args:
            points: (K, n, 3) float32 in local frames; more than one patch in training.
        """
        identity = torch.eye(3, dtype=points.dtype, device=points.device)
        turn = self.stn3d.head(self.stn3d.pool(points)).view(-1, 3, 3) + identity
        turned = points @ turn.mT
        pooled = self.pool(turned)
        return Described(F.normalize(self.head(pooled), dim=1), turned, turn, pooled)

    @torch.no_grad()
    def describe(self, patches: Patches, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Descriptors of a scan's patches in evaluation mode.

        Patches of similar size go together and lose the zeros that all of them end with but one, which changes no
        maximum. ``dtype`` float16 or bfloat16 computes under autocast: faster, about two digits.

        Returns:
            descriptors (K, dim) and rho (K,), NaN where a patch has no frame; on the CPU.
        """
        training, device = self.training, self.fc3[0].weight.device
        self.eval()
        size, channels = patches.points.shape[1], self.fc3[0].out_features
        descriptor = torch.full((len(patches.points), channels), math.nan)
        rho = torch.full((len(patches.points),), math.nan)
        usable = patches.valid.nonzero().squeeze(1)
        usable = usable[patches.count[usable].argsort(stable=True)]
        step = max(1, CHUNK // (size * self.conv3[0].out_channels))
        for part in usable.split(step) if len(usable) else ():
            length = min(size, int(patches.count[part[-1]]) + 1)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = self(patches.points[part, :length].to(device))
            descriptor[part], rho[part] = out.descriptor.float().cpu(), out.pooled.float().norm(dim=1).cpu()
        self.train(training)
        return descriptor, rho


def hardest_contrastive(f: Tensor, g: Tensor, positive: float = 0.1, negative: float = 1.4) -> Tensor:
    """Hardest-contrastive loss of matching descriptors (DIP, sec. III-C).

    Args:
        f, g: (K, D), row i of one matches row i of the other; K >= 2. positive, negative: margins.
    """
    with torch.no_grad():
        distance = torch.cdist(f, g)
        distance.fill_diagonal_(math.inf)
        to_g, to_f = distance.argmin(1), distance.argmin(0)
    near = F.relu((f - g).norm(dim=1) - positive).square().mean()
    far_f = F.relu(negative - (f - g[to_g]).norm(dim=1)).square().mean()
    far_g = F.relu(negative - (f[to_f] - g).norm(dim=1)).square().mean()
    return near + 0.5 * (far_f + far_g)


def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance to the nearest point of the other patch, both ways averaged; patches (K, n, 3)."""
    with torch.no_grad():
        square = x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)
        distance = torch.baddbmm(square, x, y.mT, alpha=-2)
        to_y, to_x = distance.argmin(2), distance.argmin(1)

    def gap(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        return (a - b.gather(1, index.unsqueeze(2).expand(-1, -1, 3))).square().sum(2).mean()

    return 0.5 * (gap(x, y, to_y) + gap(y, x, to_x))


def dip_loss(f: Described, g: Described) -> Tensor:
    """Training loss of DIP: hardest contrastive on descriptors and Chamfer distance on the turned patches."""
    return hardest_contrastive(f.descriptor, g.descriptor) + chamfer(f.points, g.points)


# ---- the handcrafted descriptor (FPFH) --------------------------------------------------------------------------


def normals(points: Tensor, cloud: Tensor, near: Neighbours) -> Tensor:
    """Unit normals (K, 3) by principal components, oriented towards the sensor at the origin.

    Args:
        points: (K, 3). cloud: (n, 3). near: neighbours of each point in the cloud.
    """
    points = points.to(torch.float64)
    offsets = cloud.to(torch.float64)[near.column] - points[near.row]
    sums = torch.cat([offsets, (offsets.unsqueeze(2) * offsets.unsqueeze(1)).flatten(1)], 1)
    mean = torch.segment_reduce(sums, "mean", lengths=near.count, axis=0, initial=0.0)
    covariance = mean[:, 3:].view(-1, 3, 3) - mean[:, :3].unsqueeze(2) * mean[:, :3].unsqueeze(1)
    normal = torch.linalg.eigh(covariance).eigenvectors[..., 0]
    away = (normal * points).sum(1, keepdim=True) > 0
    return torch.where(away, -normal, normal)


def fpfh(cloud: Tensor, keypoints: Tensor, radius: float, most: int = 0) -> Tensor:
    """Fast point feature histograms of points of the cloud (Rusu et al., ICRA 2009) in Open3D's form.

    FPFH(p) = SPFH(p) + 1/k sum_k SPFH(p_k) / w_k with w_k a distance "in a given metric space". Open3D and PCL take the
    squared distance, and scale the sum to 100 in place of dividing it by k; PCL leaves SPFH(p) out.

    Args:
        cloud: (n, 3). keypoints: (K,) indices into it. radius: metres. most: neighbours of a point that are used,
            evenly spread; 0: all.

    Returns:
        (K, 33) float32: histograms of theta, alpha and phi, each summing to 200 (0 without neighbours).
    """
    points = cloud.to(torch.float64)

    def around(index: Tensor) -> Neighbours:
        near = radius_neighbours(points[index], points, radius)
        return near.thinned(most) if most else near

    parts = torch.arange(len(points)).split(1024)  # bounds the memory for pairs in dense clouds
    near = [around(part) for part in parts]
    direction = torch.cat([normals(points[i], points, pairs) for i, pairs in zip(parts, near, strict=True)])
    simple = torch.cat([_simple_histograms(i, pairs, points, direction) for i, pairs in zip(parts, near, strict=True)])
    row, column, _ = around(keypoints)
    square = (points[column] - points[keypoints[row]]).square().sum(1)
    other = square > 0
    weights = torch.sparse_coo_tensor(
        torch.stack([row[other], column[other]]),
        square[other].reciprocal(),
        (len(keypoints), len(points)),
        check_invariants=False,
    )
    weighted = (weights @ simple).view(-1, 3, 11)
    total = weighted.sum(2, keepdim=True)
    weighted = torch.where(total > 0, 100 * weighted / total, torch.zeros_like(weighted))
    return (weighted.view(-1, 33) + simple[keypoints]).float()


def _simple_histograms(index: Tensor, near: Neighbours, points: Tensor, direction: Tensor) -> Tensor:
    """SPFH (K, 33) of the points ``index`` (K,): histograms of theta, alpha and phi over pairs with their neighbours.

    Args:
        near: neighbours of each of them. points: (n, 3) float64. direction: (n, 3) normals.
    """
    other = index[near.row] != near.column
    row, column = near.row[other], near.column[other]
    line = points[column] - points[index[row]]
    distance = line.norm(dim=1)
    line = line / distance.clamp_min(1e-12).unsqueeze(1)
    a, b = direction[index[row]], direction[column]
    # The frame stands on the point whose normal makes the smaller angle with the line.
    cos_a, cos_b = (a * line).sum(1), (b * line).sum(1)
    swap = (cos_a.abs() < cos_b.abs()).unsqueeze(1)
    u, w, line = torch.where(swap, b, a), torch.where(swap, a, b), torch.where(swap, -line, line)
    phi = torch.where(swap.squeeze(1), -cos_b, cos_a)
    v = torch.linalg.cross(line, u)
    length = v.norm(dim=1, keepdim=True)
    v = v / length.clamp_min(1e-12)
    alpha = (v * w).sum(1)
    theta = torch.atan2((torch.linalg.cross(u, v) * w).sum(1), (u * w).sum(1))
    places = torch.stack([(theta / math.pi), alpha, phi], 1)
    places[(length.squeeze(1) < 1e-12) | (distance == 0)] = 0  # no frame: the middle bin, as Open3D does
    bins = (5.5 * (places + 1)).floor().clamp(0, 10).to(torch.int64) + torch.tensor([0, 11, 22])
    counts = torch.bincount((row.unsqueeze(1) * 33 + bins).flatten(), minlength=33 * len(index)).view(-1, 33)
    return 100 * counts.double() / torch.bincount(row, minlength=len(index)).clamp_min(1).unsqueeze(1)


# ---- registration ---------------------------------------------------------------------------------------------------


def nearest_descriptors(a: Tensor, b: Tensor) -> Tensor:
    """Of each row of ``a`` (n, D) the nearest row of ``b`` (m, D): indices (n,).

    Raises:
        ValueError: descriptors of different length.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"descriptors of length {a.shape[1]} and {b.shape[1]} cannot be compared")
    size = -0.5 * b.square().sum(1)
    step = max(1, CHUNK // (8 * len(b)))  # a tile of the distance matrix at a time, small enough for the cache
    return torch.cat([torch.addmm(size, part, b.T).argmax(1) for part in a.split(step)])


class Registration(NamedTuple):
    """``pose`` (4, 4) float64, current to reference; ``fitness``: share of correspondences that it brings within the
    threshold; ``tested``: hypotheses that passed the checks."""

    pose: Tensor
    fitness: float
    tested: int


def ransac(
    source: Tensor,
    target: Tensor,
    threshold: float,
    hypotheses: int,
    generator: torch.Generator,
    edge: float = 0.9,
) -> Registration:
    """Rigid registration from correspondences, hypotheses in batches (the pair registration of sec. III).

    Three correspondences make a hypothesis. It is dropped when an edge of one triangle is shorter than ``edge`` times
    the other's, or when a corner stays farther than ``threshold`` from its partner. The one with most inliers (then
    with the least error) is fitted again to its inliers.

    Args:
        source, target: (n, 3) corresponding points. threshold: metres. hypotheses: triples drawn.

    Returns:
        the identity with fitness 0 when fewer than three correspondences are given or no hypothesis passes.
    """
    p, q = source.to(torch.float64), target.to(torch.float64)
    nothing = Registration(torch.eye(4, dtype=torch.float64), 0.0, 0)
    if len(p) < 3:
        return nothing
    triple = torch.randint(len(p), (hypotheses, 3), generator=generator)
    for i, j in ((0, 1), (1, 2), (2, 0)):  # edge by edge: few triples get as far as the last one
        one, two = ((x[triple[:, i]] - x[triple[:, j]]).norm(dim=1) for x in (p, q))
        triple = triple[(one >= edge * two) & (two >= edge * one) & (torch.minimum(one, two) > 0)]
    a, b = p[triple], q[triple]
    poses = kabsch(a, b)
    poses = poses[((apply(poses, a) - b).norm(dim=2) <= threshold).all(1)]
    if not len(poses):
        return nothing
    counts, errors = zip(
        *(_inliers(part, p, q, threshold) for part in poses.split(max(1, CHUNK // len(p)))), strict=True
    )
    count, error = torch.cat(counts), torch.cat(errors)
    best = torch.where(count == count.max(), error, math.inf).argmin()
    inside = (apply(poses[best], p) - q).norm(dim=1) <= threshold
    candidates = torch.stack([poses[best], kabsch(p[inside], q[inside])])
    count, error = _inliers(candidates, p, q, threshold)
    again = int((count[1] > count[0]) | ((count[1] == count[0]) & (error[1] < error[0])))
    return Registration(candidates[again], float(count[again]) / len(p), len(poses))


def _inliers(poses: Tensor, p: Tensor, q: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Number of inliers of each pose (h, 4, 4), and the sum of their squared distances.

    |R p + t - q|^2 is linear in R, R^T t, t and |t|^2, so one matrix product serves all hypotheses and correspondences.
    """
    rotation, shift = poses[:, :3, :3], poses[:, :3, 3]
    back = (rotation.mT @ shift.unsqueeze(2)).squeeze(2)
    one = torch.ones(len(poses), 1, dtype=p.dtype)
    unknown = torch.cat([-2 * rotation.flatten(1), 2 * back, -2 * shift, shift.square().sum(1, keepdim=True), one], 1)
    size = (p.square() + q.square()).sum(1, keepdim=True)
    known = torch.cat([(q.unsqueeze(2) * p.unsqueeze(1)).flatten(1), p, q, torch.ones_like(size), size], 1)
    square = (unknown @ known.T).clamp_min(0)
    inside = square <= threshold**2
    return inside.sum(1), (square * inside).sum(1)


def icp(source: Tensor, target: Tensor, pose: Tensor, distance: float, iterations: int = 30) -> Tensor:
    """Point-to-point iterative closest point from ``pose``; neighbours farther than ``distance`` are left out.

    Raises:
        ValueError: fewer than three points have a neighbour.
    """
    p, q = source.to(torch.float64), target.to(torch.float64)
    tree = cKDTree(q.numpy())
    for _ in range(iterations):
        gap, index = tree.query(apply(pose, p).numpy(), distance_upper_bound=distance)
        near = torch.from_numpy(np.isfinite(gap))
        if int(near.sum()) < 3:
            raise ValueError(f"{int(near.sum())} points have a neighbour within {distance} m, expected at least 3")
        before, pose = pose, kabsch(p[near], q[torch.from_numpy(index)[near]])
        if (pose - before).abs().max() < 1e-6:
            break
    return pose


# ---- scores of a pair -------------------------------------------------------------------------------------------


class Sensor(NamedTuple):
    """Size and field of view of a range image; the defaults are those for KITTI's scanner (OverlapNet)."""

    height: int = 64
    width: int = 900
    fov_up: float = 3.0
    """Degrees above the horizon."""
    fov_down: float = -25.0
    """Degrees, negative below the horizon."""
    max_range: float = 50.0
    """Points at this distance or farther are left out."""


KITTI = Sensor()
"""The range images of OverlapNet."""


def range_image(points: Tensor, sensor: Sensor = KITTI) -> Tensor:
    """Spherical projection of a scan (n, 3): distance of the nearest point of each pixel, -1 without one.

    Returns:
        (height, width) float32.
    """
    xyz = points[:, :3].to(torch.float64)
    depth = xyz.norm(dim=1)
    seen = (depth > 0) & (depth < sensor.max_range)
    xyz, depth = xyz[seen], depth[seen]
    up, down = math.radians(sensor.fov_up), math.radians(sensor.fov_down)
    yaw, pitch = -torch.atan2(xyz[:, 1], xyz[:, 0]), torch.asin(xyz[:, 2] / depth)
    column = (0.5 * (yaw / math.pi + 1) * sensor.width).floor().clamp(0, sensor.width - 1)
    row = ((1 - (pitch - down) / (up - down)) * sensor.height).floor().clamp(0, sensor.height - 1)
    image = torch.full((sensor.height * sensor.width,), math.inf, dtype=torch.float64)
    image.scatter_reduce_(0, (row * sensor.width + column).long(), depth, "amin")
    image[image.isinf()] = -1
    return image.view(sensor.height, sensor.width).float()


def image_overlap(current: Tensor, reference: Tensor, tolerance: float = 1.0) -> float:
    """Share of the current range image's pixels at which the reference's differs by less than ``tolerance`` metres."""
    agree = (reference > 0) & ((reference - current).abs() < tolerance)
    return float(agree.sum()) / max(1, int((current > 0).sum()))


def overlap(current: Tensor, reference: Tensor, pose: Tensor, sensor: Sensor = KITTI) -> float:
    """Overlap of two scans (n, 3) and (m, 3) under a pose from current to reference (OverlapNet).

    Raises:
        ValueError: the pose is not rigid.
    """
    check_rigid(pose)
    moved = apply(inverse(pose.to(torch.float64)), reference[:, :3].to(torch.float64))
    return image_overlap(range_image(current, sensor), range_image(moved, sensor))


def mutual_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Pairs (k, 2) of rows of ``a`` (n, D) and ``b`` (m, D) that are each other's nearest."""
    there, back = nearest_descriptors(a, b), nearest_descriptors(b, a)
    index = torch.arange(len(a))
    index = index[back[there] == index]
    return torch.stack([index, there[index]], 1)


def ron(current: Tensor, reference: Tensor, pairs: Tensor, pose: Tensor, threshold: float = 1.0) -> float:
    """Ratio of overlapping nearest neighbours: share of mutual pairs whose points lie close together under the pose.

    Args:
        current, reference: (n, 3) and (m, 3) key points. pairs: (k, 2) mutual nearest descriptors. pose: current to
            reference. threshold: metres.

    Returns:
        0 without pairs.

    Raises:
        ValueError: the pose is not rigid.
    """
    check_rigid(pose)
    moved = apply(inverse(pose.to(torch.float64)), reference.to(torch.float64))  # the reference moves, as released
    gap = (current.to(torch.float64)[pairs[:, 0]] - moved[pairs[:, 1]]).norm(dim=1)
    return float((gap < threshold).sum()) / max(1, len(pairs))


class Keys(NamedTuple):
    """Described key points of a scan: ``points`` (n, 3) and ``descriptors`` (n, D), NaN where there is none."""

    points: Tensor
    descriptors: Tensor

    def finite(self) -> Keys:
        """The key points that have a descriptor."""
        good = self.descriptors.isfinite().all(1)
        return Keys(self.points[good], self.descriptors[good])

    def sample(self, share: float, generator: torch.Generator, replacement: bool = False) -> Keys:
        """A random share of the key points; ``replacement`` draws some twice, as the released script does."""
        n = len(self.points)
        count = int(share * n)
        if replacement:
            index = torch.randint(n, (count,), generator=generator)
        else:
            index = torch.randperm(n, generator=generator)[:count]
        return Keys(self.points[index], self.descriptors[index])


class PairScores(NamedTuple):
    """A pair's estimated pose (4, 4), current to reference, and its scores that need key points only."""

    pose: Tensor
    fitness: float
    mnn: float
    ron: float


def score_pair(
    current: Keys,
    reference: Keys,
    generator: torch.Generator,
    distance: float = 0.1,
    hypotheses: int = 20000,
    share: float = 0.5,
    replacement: bool = False,
    threshold: float = 1.0,
) -> PairScores:
    """Register a pair over all descriptors, then score it over a random share of them.

    Args:
        current, reference: key points, at least three of each with a descriptor, otherwise all scores are 0.
        generator: of RANSAC and of the share. distance: RANSAC's threshold. threshold: of RON, metres.

    Raises:
        ValueError: descriptors of different length.
    """
    if current.descriptors.shape[1] != reference.descriptors.shape[1]:
        lengths = current.descriptors.shape[1], reference.descriptors.shape[1]
        raise ValueError(f"descriptors of length {lengths[0]} and {lengths[1]} cannot be compared")
    current, reference = current.finite(), reference.finite()
    if min(len(current.points), len(reference.points)) < 3:
        return PairScores(torch.eye(4, dtype=torch.float64), 0.0, 0.0, 0.0)
    there = nearest_descriptors(current.descriptors, reference.descriptors)
    found = ransac(current.points, reference.points[there], distance, hypotheses, generator)
    a, b = (keys.sample(share, generator, replacement) for keys in (current, reference))
    pairs = mutual_pairs(a.descriptors, b.descriptors)
    mnn = len(pairs) / min(len(a.points), len(b.points))
    return PairScores(found.pose, found.fitness, mnn, ron(a.points, b.points, pairs, found.pose, threshold))


# ---- pose graph -------------------------------------------------------------------------------------------------


class PoseGraph(NamedTuple):
    """``poses`` (n, 4, 4); edges from ``start`` to ``end`` (e,) with ``relative`` motion (e, 4, 4) = inv(X_i) X_j and
    ``information`` (e, 6, 6) on (translation, rotation vector); ``robust`` (e,) bool: Huber instead of squares."""

    poses: Tensor
    start: Tensor
    end: Tensor
    relative: Tensor
    information: Tensor
    robust: Tensor


def odometry_graph(relative: Tensor, weight: float = 100.0) -> PoseGraph:
    """A chain of poses from odometry (n - 1, 4, 4) of a vehicle that begins at the identity."""
    poses = [torch.eye(4, dtype=torch.float64)]
    for step in relative:  # each pose rests on the one before
        poses.append(poses[-1] @ step)
    n = len(poses)
    information = weight * torch.eye(6, dtype=torch.float64).expand(n - 1, 6, 6)
    chain = torch.arange(n - 1)
    return PoseGraph(torch.stack(poses), chain, chain + 1, relative, information, torch.zeros(n - 1, dtype=torch.bool))


def add_loops(graph: PoseGraph, pairs: Tensor, current_to_reference: Tensor, weight: float = 100.0) -> PoseGraph:
    """A graph with loop edges: pairs (m, 2) of (reference, current) and the motion found for each, (m, 4, 4)."""
    information = weight * torch.eye(6, dtype=torch.float64).expand(len(pairs), 6, 6)
    return graph._replace(
        start=torch.cat([graph.start, pairs[:, 0]]),
        end=torch.cat([graph.end, pairs[:, 1]]),
        relative=torch.cat([graph.relative, current_to_reference]),
        information=torch.cat([graph.information, information]),
        robust=torch.cat([graph.robust, torch.ones(len(pairs), dtype=torch.bool)]),
    )


def _adjoint(pose: Tensor) -> Tensor:
    """Adjoint (..., 6, 6) of poses, translation first."""
    rotation = pose[..., :3, :3]
    top = torch.cat([rotation, hat(pose[..., :3, 3]) @ rotation], -1)
    return torch.cat([top, torch.cat([torch.zeros_like(rotation), rotation], -1)], -2)


def _inverse_right_jacobian(twist: Tensor) -> Tensor:
    """Inverse right Jacobian of SE(3) at twists (..., 6): series to the fourth power of the bracket."""
    rho, omega = hat(twist[..., :3]), hat(twist[..., 3:])
    bracket = torch.cat([torch.cat([omega, rho], -1), torch.cat([torch.zeros_like(omega), omega], -1)], -2)
    square = bracket @ bracket
    return torch.eye(6, dtype=twist.dtype) + bracket / 2 + square / 12 - square @ square / 720


def graph_error(graph: PoseGraph, poses: Tensor) -> float:
    """Sum over all edges of the squared error weighted by its information, without the robust loss."""
    between = inverse(poses[graph.start]) @ poses[graph.end]
    error = se3_log(inverse(graph.relative.to(torch.float64)) @ between)
    return float((error.unsqueeze(1) @ graph.information @ error.unsqueeze(2)).sum())


def optimise(graph: PoseGraph, iterations: int = 20, huber: float = 1.0) -> Tensor:
    """Poses (n, 4, 4) of least error: Gauss-Newton on SE(3), the first pose fixed.

    Args:
        iterations: most. huber: error, in standard deviations, beyond which a robust edge counts linearly.

    Raises:
        ValueError: the graph is not connected, so that poses are not determined.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import spsolve

    poses, n = graph.poses.to(torch.float64), len(graph.poses)
    ends = graph.start.numpy(), graph.end.numpy()
    parts, _ = connected_components(coo_matrix((np.ones(len(ends[0])), ends), shape=(n, n)), directed=False)
    if parts > 1:
        raise ValueError(f"the pose graph falls into {parts} parts: edges have to connect all poses")
    back = inverse(graph.relative.to(torch.float64))
    six = torch.arange(6)
    for _ in range(iterations):
        between = inverse(poses[graph.start]) @ poses[graph.end]
        error = se3_log(back @ between)
        to_end = _inverse_right_jacobian(error)
        to_start = -to_end @ _adjoint(inverse(between))
        size = (error.unsqueeze(1) @ graph.information @ error.unsqueeze(2)).flatten().clamp_min(1e-24).sqrt()
        weight = torch.where(graph.robust, (huber / size).clamp(max=1), torch.ones_like(size))
        scaled = weight[:, None, None] * graph.information
        blocks, rows, columns, gradient = [], [], [], torch.zeros(n, 6, dtype=torch.float64)
        for jacobian, index in ((to_start, graph.start), (to_end, graph.end)):
            gradient.index_add_(0, index, (jacobian.mT @ scaled @ error.unsqueeze(2)).squeeze(2))
            for other, at in ((to_start, graph.start), (to_end, graph.end)):
                blocks.append(jacobian.mT @ scaled @ other)
                rows.append((6 * index[:, None, None] + six[:, None]).expand(-1, 6, 6))
                columns.append((6 * at[:, None, None] + six).expand(-1, 6, 6))
        triples = (torch.cat([x.flatten() for x in part]).numpy() for part in (blocks, rows, columns))
        value, row, column = triples
        normal = coo_matrix((value, (row, column)), shape=(6 * n, 6 * n)).tocsc()[6:, 6:]
        step = torch.from_numpy(-spsolve(normal, gradient.flatten().numpy()[6:])).view(-1, 6)
        poses = torch.cat([poses[:1], poses[1:] @ se3_exp(step)])
        if step.abs().max() < 1e-9:
            break
    return poses


def trajectory_error(estimate: Tensor, truth: Tensor) -> float:
    """Absolute trajectory error: RMSE of positions (n, 3), metres, after rigid alignment without scale (Umeyama)."""
    moved = apply(kabsch(estimate, truth), estimate.to(torch.float64))
    return float((moved - truth.to(torch.float64)).square().sum(1).mean().sqrt())
