"""Dispersion score, single-view reconstruction (SVR) networks and the recognition baselines they are held against.

Zhou, Shen, Yan, Feng, Yang: "A Dataset-Dispersion Perspective on Reconstruction Versus Recognition in Single-View 3D
Reconstruction Networks", 3DV 2021. Sizes and order of operations are those of the authors' released code, which
builds on AtlasNet (Groueix et al. 2018), PSGN (Fan et al. 2017) and FoldingNet (Yang et al. 2018); the implicit
decoder is that of Occupancy Networks (Mescheder et al. 2019).

Notation: N items, K clusters, B images of a batch, n points of a cloud, C numbers of a code.

State dict: ``encoder`` has torchvision's names of ResNet-18; decoders have the authors' names, AtlasNet's primitives
stacked along the first dimension (``from_official`` converts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.vgg import make_layers

CODE, HIDDEN, POINTS = 1024, 512, 2500
IMAGE = 224
"""Pixels along the side of an image at the paper's size."""
TILE, ROWS = 1 << 18, 64
"""Distances of points that are held at once on a CPU, a thread, and rows of such a block: it stays in the cache."""
DEVICE_TILE = 1 << 26
"""Distances held at once on accelerators, where few large blocks are better."""
F_THRESHOLD = 1e-3
"""Squared distance below which a point counts as found."""


# ---- point clouds ----------------------------------------------------------------------------------------------


def _check_clouds(x: Tensor, y: Tensor) -> None:
    for cloud in (x, y):
        if cloud.ndim != 3 or cloud.shape[-1] != 3:
            raise ValueError(f"clouds have shape {tuple(cloud.shape)}, expected (clouds, points, 3)")
        if not cloud.shape[1]:
            raise ValueError("a cloud without points has no nearest point")


def _lifted(points: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, 5) factors whose products are squared distances: [x, |x|^2, 1] . [-2 y, 1, |y|^2] = |x - y|^2."""
    squared, one = points.square().sum(-1, keepdim=True), torch.ones_like(points[..., :1])
    return torch.cat([points, squared, one], -1), torch.cat([-2 * points, one, squared], -1)


def _tile(x: Tensor) -> int:
    """Distances to hold at once where x is."""
    return TILE * torch.get_num_threads() if x.device.type == "cpu" else DEVICE_TILE


def nearest(x: Tensor, y: Tensor) -> Tensor:
    """Position in y of the point that is nearest to each x, the first of equals.

    Args:
        x: (B, n, 3). y: (B, m, 3).

    Returns:
        (B, n) int64. Without a gradient, in float32 whatever the autocast.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        left, right = _lifted(x.detach().float())[0], _lifted(y.detach().float())[1].transpose(1, 2).contiguous()
        rows = max(1, min(x.shape[1], _tile(x) // y.shape[1]))
        squared = left.new_empty(rows, y.shape[1])
        found = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
        for points, others, positions in zip(left, right, found, strict=True):
            for part, out in zip(points.split(rows), positions.split(rows), strict=True):
                out.copy_(_argmin(torch.mm(part, others, out=squared[: len(part)])))
        return found


def _argmin(values: Tensor) -> Tensor:
    """``values.argmin(-1)``; numpy's is several times faster than torch's."""
    return torch.from_numpy(values.numpy().argmin(-1)) if values.device.type == "cpu" else values.argmin(-1)


def squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of every point to the nearest of the other cloud; gradients for the chosen pairs only.

    Args:
        x: (B, n, 3). y: (B, m, 3).

    Returns:
        (B, n) and (B, m).

    Raises:
        ValueError: shapes that do not fit, or a cloud without points.
    """
    _check_clouds(x, y)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} clouds and {len(y)} clouds, expected pairs")
    from_x = (x - y.gather(1, nearest(x, y).unsqueeze(-1).expand(-1, -1, 3))).square().sum(-1)
    from_y = (y - x.gather(1, nearest(y, x).unsqueeze(-1).expand(-1, -1, 3))).square().sum(-1)
    return from_x, from_y


def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Squared Chamfer distance, both directed means summed, per pair of clouds; the training loss is its mean. (B,)."""
    from_x, from_y = squared_distances(x, y)
    return from_x.mean(1) + from_y.mean(1)


def f_score(from_x: Tensor, from_y: Tensor, threshold: float = F_THRESHOLD) -> Tensor:
    """Harmonic mean of the shares of points that are nearer than a threshold, 0 where both shares are. (B,).

    Args:
        from_x, from_y: what ``squared_distances`` gives. threshold: of the squared distance.
    """
    precision, recall = ((d < threshold).to(d.dtype).mean(1) for d in (from_x, from_y))
    return 2 * precision * recall / (precision + recall).clamp_min(1e-12)


@torch.no_grad()
def chamfer_matrix(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared Chamfer distances of all pairs of clouds, in blocks that stay in the cache.

    Args:
        x: (N, n, 3). y: (M, m, 3); ``None`` compares x with itself, each pair once.

    Returns:
        (N, M) float32; symmetric with an exactly zero diagonal without y.

    Raises:
        ValueError: another shape, or clouds without points.
    """
    other = x if y is None else y
    _check_clouds(x, other)
    n, m, count = x.shape[1], other.shape[1], len(other)
    left = _lifted(x.float())[0]
    right = _lifted(other.float())[1].transpose(1, 2).contiguous()  # (M, 5, m)
    tile = _tile(x)
    rows = min(n, ROWS if x.device.type == "cpu" else max(1, tile // m))
    columns = max(1, min(count, tile // (rows * m)))  # clouds; threads share them out, so each keeps to its own cache
    squared = left.new_empty(columns, rows, m)
    from_x, from_y = left.new_empty(columns, n), left.new_empty(columns, -(-n // rows), m)
    out = left.new_zeros(len(x), count)
    for i, cloud in enumerate(left):
        for begin in range(i + 1 if y is None else 0, count, columns):
            block = right[begin : begin + columns]
            width = len(block)
            for j, part in enumerate(cloud.split(rows)):
                held = squared[:width, : len(part)]
                torch.bmm(part.expand(width, -1, -1), block, out=held)
                torch.amin(held, 2, out=from_x[:width, j * rows : j * rows + len(part)])
                torch.amin(held, 1, out=from_y[:width, j])
            to_x = from_y[:width].amin(1).clamp_min_(0)
            out[i, begin : begin + width] = from_x[:width].clamp_min(0).mean(1) + to_x.mean(1)
    return out + out.T if y is None else out


@torch.no_grad()
def iou_distances(grids: Tensor, block: int = 4096) -> Tensor:
    """One minus intersection over union of all pairs of occupancy grids; two empty grids are equal.

    Args:
        grids: (N, ...) bool. block: grids compared with all others at once.

    Returns:
        (N, N) float32.
    """
    flat = grids.flatten(1).float()
    size = flat.sum(1)
    rows = []
    for part in torch.arange(len(flat), device=flat.device).split(block):
        common = flat[part] @ flat.T
        union = size[part].unsqueeze(1) + size - common
        rows.append(torch.where(union > 0, 1 - common / union.clamp_min(1), 0.0))
    return torch.cat(rows)


# ---- images ----------------------------------------------------------------------------------------------------


def pooled_features(images: Tensor, side: int = 16) -> Tensor:
    """Mean colours of a ``side`` x ``side`` grid of patches: image features that need no weights.

    Args:
        images: (B, 3, S, S) in [0, 1].

    Returns:
        (B, 3 * side^2).
    """
    return F.adaptive_avg_pool2d(images, side).flatten(1)


class PerceptualFeatures(nn.Module):
    """VGG-16 up to relu3_3, then the maximum over channels: the authors' image features.

    ``features`` has the names and shapes of torchvision's VGG-16, whose ImageNet weights are meant to be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers([64, 64, "M", 128, 128, "M", 256, 256, 256])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def load_vgg(self, weights: Mapping[str, Tensor]) -> None:
        """Take the layers needed from torchvision's ``vgg16`` weights.

        Raises:
            ValueError: a layer is missing or has another shape.
        """
        wanted = self.state_dict()
        wrong = [name for name, own in wanted.items() if name not in weights or weights[name].shape != own.shape]
        if wrong:
            raise ValueError(
                f"no weights of VGG-16: {wrong[0]} is missing or not of shape {tuple(wanted[wrong[0]].shape)}"
            )
        self.load_state_dict({name: weights[name] for name in wanted})

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) in [0, 1] to (B, 3136)."""
        return self.features((images - self.mean) / self.std).amax(1).flatten(1)


@torch.no_grad()
def feature_distances(features: Tensor, block: int = 4096) -> Tensor:
    """Mean squared differences of all pairs of feature vectors.

    Args:
        features: (N, d). block: rows at once.

    Returns:
        (N, N) of the features' type, symmetric with an exactly zero diagonal.
    """
    centred = (features - features.mean(0)).double()  # a product of large numbers would lose small differences
    squared = centred.square().sum(1)
    parts = torch.arange(len(centred), device=features.device).split(block)
    rows = [(squared[p].unsqueeze(1) + squared - 2 * (centred[p] @ centred.T)).to(features.dtype) for p in parts]
    distance = torch.cat(rows).clamp_min_(0) / features.shape[1]
    distance = (distance + distance.T) / 2
    distance.fill_diagonal_(0)
    return distance


# ---- clustering and the score ----------------------------------------------------------------------------------


class Clusters(NamedTuple):
    """A clustering: ``medoids`` (K,), ``labels`` (N,) and ``inertia``, the summed distance to the own medoid."""

    medoids: np.ndarray
    labels: np.ndarray
    inertia: float


def check_distances(distance: np.ndarray, tolerance: float = 1e-6) -> None:
    """Refuse what is no distance matrix.

    Args:
        distance: expected (N, N), finite, not negative, symmetric within ``tolerance`` of its largest entry.

    Raises:
        ValueError: names the first entry that is wrong.
    """
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"distances have shape {distance.shape}, expected a square matrix")

    size = 128  # tiles of this side and their mirror images lie in the cache together
    starts = range(0, len(distance), size)
    low, high, gap = [0.0], [0.0], [0.0]
    with np.errstate(invalid="ignore"):  # inf - inf
        for i, j in ((i, j) for i in starts for j in starts if i <= j):
            tile, mirror = distance[i : i + size, j : j + size], distance[j : j + size, i : i + size]
            low += [tile.min(), mirror.min()]
            high.append(tile.max())
            gap.append(np.abs(tile - mirror.T).max())
    largest, apart = np.max(high), np.max(gap)
    if not (np.min(low) >= 0 and largest + apart < np.inf):  # a NaN fails both
        _refuse(distance, ~(distance >= 0) | np.isinf(distance), "expected a finite distance of at least 0")
    if apart > tolerance * largest:
        wrong = np.abs(distance - distance.T) > tolerance * largest
        _refuse(distance, wrong, "expected the same as its mirror image")


def _refuse(distance: np.ndarray, wrong: np.ndarray, what: str) -> None:
    i, j = np.unravel_index(int(wrong.argmax()), wrong.shape)
    raise ValueError(f"distance [{i}, {j}] is {distance[i, j]:.6g}: {what}")


def _spread_start(distance: np.ndarray, k: int, random: np.random.RandomState) -> np.ndarray:
    """k-medoids++: a further medoid is the best of 2 + ln K draws, likelier the farther (squared) from those so far."""
    trials = 2 + int(math.log(k))
    medoids = np.empty(k, dtype=np.int64)
    medoids[0] = random.randint(len(distance))
    nearest = distance[medoids[0]] ** 2
    total = nearest.sum()
    for i in range(1, k):
        draws = np.cumsum(nearest, dtype=np.float64).searchsorted(random.random_sample(trials) * total)
        draws.clip(None, len(distance) - 1, out=draws)
        closer = distance[draws]
        closer *= closer
        np.minimum(closer, nearest, out=closer)
        totals = closer.sum(1)
        best = totals.argmin()
        medoids[i], nearest, total = draws[best], closer[best], totals[best]
    return medoids


def within_cluster_costs(distance: np.ndarray, labels: np.ndarray, items: np.ndarray | None = None) -> np.ndarray:
    """Summed distance of items to the members of their own cluster.

    Args:
        distance: (N, N). labels: (N,), 0 to K - 1. items: all members of some clusters; ``None``: all items.

    Returns:
        One number an item.
    """
    n = len(distance)
    items = np.arange(n) if items is None else items
    own = labels[items]
    sizes = np.bincount(own)
    if 6 * int((sizes**2).sum()) > n * n:  # few large clusters: one matrix product reads each entry once
        member = np.zeros((n, len(sizes)), dtype=distance.dtype)
        member[items, own] = 1
        return (distance @ member)[items, own]
    order = own.argsort(kind="stable")  # many small clusters: only pairs within one
    each = sizes[own[order]]
    begin = each.cumsum() - each  # of an item's pairs, among all pairs
    first = (sizes.cumsum() - sizes)[own[order]]  # of its cluster, in order
    partner = np.repeat(first - begin, each) + np.arange(each.sum())
    pairs = np.repeat(items[order] * n, each) + items[order][partner]
    costs = np.empty(len(items))
    costs[order] = np.add.reduceat(distance.ravel().take(pairs), begin)
    return costs


def _best_members(costs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clusters that have members, and the cheapest member of each, the first of equals."""
    order = np.lexsort((costs, labels))
    present, first = np.unique(labels[order], return_index=True)
    return present, order[first]


def k_medoids(distance: np.ndarray, k: int, seed: int = 0, iterations: int = 300) -> Clusters:
    """K-medoids on a distance matrix: k-medoids++ start, then assignment and medoids in turn.

    Draws and updates are those of scikit-learn-extra's ``KMedoids(init="k-medoids++", method="alternate")``, so that
    the authors' scores come out to the last digit.

    Args:
        distance: (N, N), symmetric. k: clusters. seed: of the start. iterations: at most.

    Raises:
        ValueError: ``check_distances`` refuses the matrix, or k is not in 1..N.
    """
    distance = np.asarray(distance)
    check_distances(distance)
    if not 1 <= k <= len(distance):
        raise ValueError(f"{k} clusters of {len(distance)} items: expected 1 to {len(distance)}")
    medoids = _spread_start(distance, k, np.random.RandomState(seed))
    labels, costs = np.full(len(distance), -1), np.empty(len(distance))
    for _ in range(iterations):
        before, labels = labels, distance[medoids].argmin(0)
        moved = labels != before
        if not moved.any():
            break
        changed = np.zeros(k + 1, dtype=bool)  # clusters that won or lost members; the last belongs to label -1
        changed[labels[moved]] = changed[before[moved]] = True
        items = np.flatnonzero(changed[labels])
        costs[items] = within_cluster_costs(distance, labels, items)
        present, best = _best_members(costs, labels)
        current = np.where(labels[medoids[present]] == present, costs[medoids[present]], np.inf)
        better = costs[best] < current
        medoids[present[better]] = best[better]
    to_medoids = distance[medoids]
    return Clusters(medoids, to_medoids.argmin(0), float(to_medoids.min(0).sum()))


def partition_inertia(distance: np.ndarray, labels: np.ndarray) -> float:
    """Summed distance of every item to the best medoid of its cluster, for any clustering."""
    labels = np.unique(labels, return_inverse=True)[1]
    costs = within_cluster_costs(distance, labels)
    return float(costs[_best_members(costs, labels)[1]].sum())


METHODS = ("k-medoids", "affinity-propagation", "hierarchical")
"""Clusterings under which the score is defined; the paper's numbers use the first."""


def dispersion_score(
    distance: np.ndarray, k: int, seed: int = 0, method: str = "k-medoids", percentile: float = 4.0
) -> float:
    """The dispersion score: inertia of a clustering, divided by the number of items.

    Low when the items collapse to K groups.

    Args:
        distance: (N, N). k: clusters (affinity propagation finds its own number). seed: of the clustering.
        method: among ``METHODS``. percentile: of the affinities, the preference of affinity propagation.

    Raises:
        ValueError: a bad matrix, k or method.
    """
    distance = np.asarray(distance)
    if method == "k-medoids":
        return k_medoids(distance, k, seed).inertia / len(distance)
    check_distances(distance)
    if method == "affinity-propagation":
        from sklearn.cluster import AffinityPropagation

        affinity = -np.exp(distance / distance.std())
        np.fill_diagonal(affinity, -1)
        preference = np.percentile(affinity, percentile)
        found = AffinityPropagation(damping=0.75, affinity="precomputed", preference=preference, random_state=seed).fit(
            affinity
        )
    elif method == "hierarchical":
        from sklearn.cluster import AgglomerativeClustering

        if not 1 <= k <= len(distance):
            raise ValueError(f"{k} clusters of {len(distance)} items: expected 1 to {len(distance)}")
        found = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="complete").fit(distance)
    else:
        raise ValueError(f"unknown clustering {method!r}, expected one of {', '.join(METHODS)}")
    return partition_inertia(distance, found.labels_) / len(distance)


# ---- cameras ---------------------------------------------------------------------------------------------------


def camera_rotations(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Rotations from the object's frame into that of a camera which looks at the origin, y up.

    Args:
        azimuth, elevation: (B,) degrees; both 0 put the camera on +x.

    Returns:
        (B, 3, 3) of the angles' type; rows are the camera's unit axes, the third points at the camera.
    """
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    z = torch.stack([e.cos() * a.cos(), e.sin(), e.cos() * a.sin()], -1)
    up = torch.zeros_like(z)
    up[..., 1] = 1
    x = F.normalize(torch.linalg.cross(up, z), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], -2)


def to_viewer(points: Tensor, rotations: Tensor) -> Tensor:
    """Object-centred points (B, n, 3) in the frames of cameras (B, 3, 3)."""
    return points @ rotations.transpose(1, 2)


def to_object(points: Tensor, rotations: Tensor) -> Tensor:
    """Viewer-centred points (B, n, 3) back in the object's frame; the inverse of ``to_viewer``."""
    return points @ rotations


# ---- templates -------------------------------------------------------------------------------------------------


def icosphere(level: int) -> tuple[np.ndarray, np.ndarray]:
    """The unit icosahedron with every triangle cut into four, ``level`` times, and pushed onto the sphere.

    Returns:
        vertices (10 * 4^level + 2, 3) float64 and faces (20 * 4^level, 3) int64.
    """
    g = (1 + math.sqrt(5)) / 2
    corners = [(-1, g, 0), (1, g, 0), (-1, -g, 0), (1, -g, 0), (0, -1, g), (0, 1, g),
               (0, -1, -g), (0, 1, -g), (g, 0, -1), (g, 0, 1), (-g, 0, -1), (-g, 0, 1)]  # fmt: skip
    triangles = [(0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11), (1, 5, 9), (5, 11, 4), (11, 10, 2),
                 (10, 7, 6), (7, 1, 8), (3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9), (4, 9, 5),
                 (2, 4, 11), (6, 2, 10), (8, 6, 7), (9, 8, 1)]  # fmt: skip
    vertices, faces = np.array(corners) / math.sqrt(1 + g * g), np.array(triangles)
    for _ in range(level):
        edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), 1)
        unique, inverse = np.unique(edges, axis=0, return_inverse=True)
        middle = vertices[unique].sum(1)
        ab, bc, ca = (inverse.reshape(-1, 3) + len(vertices)).T
        vertices = np.concatenate([vertices, middle / np.linalg.norm(middle, axis=1, keepdims=True)])
        a, b, c = faces.T
        faces = np.stack([a, ab, ca, ab, b, bc, ca, bc, c, ab, bc, ca], 1).reshape(-1, 3)
    return vertices, faces


def square_grid(points: int) -> Tensor:
    """floor(sqrt(points))^2 points of a regular grid on [0, 1]^2, second coordinate fastest. (m, 2) float32."""
    axis = torch.linspace(0, 1, max(1, math.isqrt(points)), dtype=torch.float64)
    return torch.cartesian_prod(axis, axis).float()


# ---- networks --------------------------------------------------------------------------------------------------


class ResNetEncoder(resnet.ResNet):
    """ResNet-18 without pre-training, its last layer giving the code; convolutions N(0, 2 / (k * k * out))."""

    def __init__(self, code: int = CODE) -> None:
        super().__init__(resnet.BasicBlock, [2, 2, 2, 2], num_classes=code)
        self.to(memory_format=torch.channels_last)  # faster convolutions, same numbers

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) to (B, C).

        Raises:
            ValueError: another size: the 7 x 7 pooling of the authors would not fit.
        """
        if images.shape[1:] != (3, IMAGE, IMAGE):
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, ResNet's 7 x 7 pooling expects (3, {IMAGE}, {IMAGE})"
            )
        return super().forward(images.contiguous(memory_format=torch.channels_last))


class SmallEncoder(nn.Sequential):
    """Four strided convolutions and a linear layer, for small images on a CPU."""

    def __init__(self, code: int = 128, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        layers: list[nn.Module] = []
        for c_in, c_out in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], code))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, C)."""
        return super().forward(images.contiguous(memory_format=torch.channels_last))


class SumBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d and ReLU of ``shared + own`` without the sum: shared is the same for all items, own for all points.

    Over the full grid of items and points mean and variance of a sum are the sums of means and variances, so the
    statistics come from the two small tensors and normalising is folded into them.
    """

    def forward(self, shared: Tensor, own: Tensor) -> Tensor:  # type: ignore[override]
        """shared (1, c, n) and own (B, c) to (B, c, n).

        Raises:
            ValueError: training on a single value a channel.
        """
        dtype = shared.dtype
        wide = torch.promote_types(dtype, torch.float32)  # statistics of half precision are taken in float32
        shared, own = shared.to(wide), own.to(wide)
        if self.training:
            count = len(own) * shared.shape[2]
            if count < 2:
                raise ValueError("batch normalisation needs more than one value a channel to train")
            var_s, mean_s = torch.var_mean(shared, (0, 2), correction=0)
            var_o, mean_o = torch.var_mean(own, 0, correction=0)
            mean, var = mean_s + mean_o, var_s + var_o
            with torch.no_grad():
                assert self.running_mean is not None and self.running_var is not None
                assert self.num_batches_tracked is not None and self.momentum is not None
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        else:
            assert self.running_mean is not None and self.running_var is not None
            mean, var = self.running_mean, self.running_var
        scale = self.weight * (var + self.eps).rsqrt()
        item = ((own - mean) * scale + self.bias).to(dtype)
        return F.relu((shared * scale.unsqueeze(-1)).to(dtype) + item.unsqueeze(-1))


class PointwiseConv(nn.Conv1d):
    """A convolution of length 1; one of a single group is one product of matrices an item, faster on a CPU."""

    def __init__(self, c_in: int, c_out: int, groups: int = 1) -> None:
        super().__init__(c_in, c_out, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, n) to (B, c_out, n)."""
        if self.groups > 1:
            return super().forward(x)
        assert self.bias is not None
        return torch.baddbmm(self.bias.view(1, -1, 1), self.weight[None, :, :, 0].expand(len(x), -1, -1), x)


class AtlasNet(nn.Module):
    """Points of a template, deformed by a perceptron that is given the code: AtlasNet's decoder.

    All primitives are computed at once, each with its own weights.

    Args:
        code: C. hidden: width. template: "sphere" (3-D) or "square" (2-D). primitives: P, each with its own weights.
        points: of a training cloud, over all primitives. level: of the icosphere that is decoded when evaluating.
    """

    regular: Tensor

    def __init__(
        self,
        code: int = CODE,
        hidden: int = HIDDEN,
        template: str = "sphere",
        primitives: int = 1,
        points: int = POINTS,
        level: int = 4,
    ) -> None:
        super().__init__()
        if template not in ("sphere", "square"):
            raise ValueError(f"template {template!r}, expected sphere or square")
        if points < primitives:
            raise ValueError(f"{points} points over {primitives} primitives: expected at least one each")
        self.template, self.primitives, self.points = template, primitives, points // primitives
        if template == "sphere":
            self.dim, regular = 3, torch.tensor(icosphere(level)[0], dtype=torch.float32)
        else:
            self.dim, regular = 2, square_grid(self.points)
        self.register_buffer("regular", regular.T.contiguous(), persistent=False)

        def layer(c_in: int, c_out: int) -> PointwiseConv:
            return PointwiseConv(primitives * c_in, primitives * c_out, primitives)

        self.conv1, self.bn1 = layer(self.dim, code), SumBatchNorm(primitives * code)
        self.conv2, self.bn2 = layer(code, hidden), nn.BatchNorm1d(primitives * hidden)
        self.conv_list = nn.ModuleList([layer(hidden, hidden) for _ in range(2)])
        self.bn_list = nn.ModuleList([nn.BatchNorm1d(primitives * hidden) for _ in range(2)])
        self.last_conv = layer(hidden, 3)

    def sample(self) -> Tensor:
        """Template points (P, d, n): in training random ones, one draw for the whole batch, otherwise regular ones."""
        if not self.training:
            return self.regular.expand(self.primitives, -1, -1)
        shape = (self.primitives, self.dim, self.points)
        if self.template == "square":
            return torch.rand(shape, device=self.regular.device)
        return F.normalize(torch.randn(shape, device=self.regular.device), dim=1)

    def forward(self, code: Tensor, template: Tensor | None = None) -> Tensor:
        """Codes (B, C) and template points (P, d, n), by default ``sample()``, to clouds (B, P * n, 3)."""
        template = self.sample() if template is None else template
        shared = self.conv1(template.reshape(1, -1, template.shape[-1]))
        x = self.bn1(shared, code.repeat(1, self.primitives))  # adding the code equals concatenating it
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        for conv, norm in zip(self.conv_list, self.bn_list, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
        return self.last_conv(x).unflatten(1, (self.primitives, 3)).permute(0, 1, 3, 2).flatten(1, 2)


class Fold(nn.Sequential):
    """One fold: [code, point] -> hidden -> hidden -> 3, batch normalisation and ReLU after the hidden layers.

    The code's part of the first layer is computed once an item and added, instead of copied to every point.
    """

    def __init__(self, base: int, code: int, hidden: int) -> None:
        super().__init__(
            nn.Conv1d(code + base, hidden, 1), SumBatchNorm(hidden), nn.ReLU(),
            nn.Conv1d(hidden, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, 3, 1),
        )  # fmt: skip
        self.code = code

    def forward(self, points: Tensor, code: Tensor) -> Tensor:  # type: ignore[override]
        """points (1, d, n) for all items or (B, d, n), codes (B, C), to (B, 3, n)."""
        first, norm = self[0], self[1]
        own = F.linear(code, first.weight[:, : self.code, 0], first.bias)
        moved = F.conv1d(points, first.weight[:, self.code :])
        if len(points) == 1:
            x = norm(moved, own)
        else:
            x = F.relu(nn.BatchNorm1d.forward(norm, moved + own.unsqueeze(-1)))
        return self[6](F.relu(self[4](self[3](x))))


class FoldNet(nn.Module):
    """A square grid folded twice, batch-normalised: the authors' FoldingNet decoder.

    Args:
        points: rounded down to a square number.
    """

    grid: Tensor

    def __init__(self, code: int = CODE, hidden: int = HIDDEN, points: int = POINTS) -> None:
        super().__init__()
        self.register_buffer("grid", square_grid(points).T.unsqueeze(0).contiguous(), persistent=False)
        self.folding1, self.folding2 = Fold(2, code, hidden), Fold(3, code, hidden)

    def forward(self, code: Tensor) -> Tensor:
        """Codes (B, C) to clouds (B, m, 3)."""
        return self.folding2(self.folding1(self.grid, code), code).transpose(1, 2)


class PointSetDecoder(nn.Module):
    """PSGN: four linear layers straight to the coordinates."""

    def __init__(self, code: int = CODE, hidden: int = HIDDEN, points: int = POINTS) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(code, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm1d(hidden) for _ in range(3))
        self.fc4 = nn.Linear(hidden, 3 * points)

    def forward(self, code: Tensor) -> Tensor:
        """Codes (B, C) to clouds (B, n, 3)."""
        x = F.relu(self.bn1(self.fc1(code)))
        x = F.relu(self.bn2(self.fc2(x)))
        x = F.relu(self.bn3(self.fc3(x)))
        return self.fc4(x).unflatten(1, (3, -1)).transpose(1, 2)


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose scale and shift are linear in the code (identity at the start)."""

    def __init__(self, code: int, channels: int) -> None:
        super().__init__()
        self.conv_gamma, self.conv_beta = nn.Conv1d(code, channels, 1), nn.Conv1d(code, channels, 1)
        self.bn = nn.BatchNorm1d(channels, affine=False)
        for layer, bias in ((self.conv_gamma, 1.0), (self.conv_beta, 0.0)):
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x (B, c, n), code (B, C, 1) to (B, c, n)."""
        return self.conv_gamma(code) * self.bn(x) + self.conv_beta(code)


class ConditionalBlock(nn.Module):
    """Residual block of two layers under ``ConditionalBatchNorm``; the identity at the start."""

    def __init__(self, code: int, channels: int) -> None:
        super().__init__()
        self.bn_0, self.bn_1 = ConditionalBatchNorm(code, channels), ConditionalBatchNorm(code, channels)
        self.fc_0, self.fc_1 = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.fc_1.weight)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x (B, c, n), code (B, C, 1) to (B, c, n)."""
        return x + self.fc_1(F.relu(self.bn_1(self.fc_0(F.relu(self.bn_0(x, code))), code)))


class OccupancyDecoder(nn.Module):
    """Is a point inside? The decoder of Occupancy Networks with conditional batch normalisation and five blocks."""

    def __init__(self, code: int = CODE, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.fc_p = nn.Conv1d(3, hidden, 1)
        self.blocks = nn.ModuleList([ConditionalBlock(code, hidden) for _ in range(5)])
        self.bn = ConditionalBatchNorm(code, hidden)
        self.fc_out = nn.Conv1d(hidden, 1, 1)

    def forward(self, code: Tensor, points: Tensor) -> Tensor:
        """Codes (B, C) and query points (B, n, 3) to logits of occupancy (B, n)."""
        code = code.unsqueeze(-1)
        x = self.fc_p(points.transpose(1, 2))
        for block in self.blocks:
            x = block(x, code)
        return self.fc_out(F.relu(self.bn(x, code))).squeeze(1)


class SingleView(nn.Module):
    """An image encoder and a shape decoder; what follows the images goes to the decoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor, *rest: Tensor) -> Tensor:
        """Images (B, 3, S, S) to clouds (B, n, 3), or with query points (B, n, 3) to logits (B, n)."""
        return self.decoder(self.encoder(images), *rest)


NETWORKS = ("atlasnet-sphere", "atlasnet-squares", "foldnet", "psgn", "occnet")
"""The SVR networks by name; the paper's are the first four."""


def build(
    network: str,
    encoder: str = "resnet18",
    code: int = CODE,
    hidden: int = HIDDEN,
    points: int = POINTS,
    primitives: int = 25,
    level: int = 4,
) -> SingleView:
    """An SVR network by name.

    Args:
        network: among ``NETWORKS``. encoder: "resnet18" or "small". code: C. hidden: width of the decoder.
        points: of an output cloud. primitives: squares of atlasnet-squares. level: icosphere of atlasnet-sphere.

    Raises:
        ValueError: an unknown name, or sizes that do not fit.
    """
    if encoder not in ("resnet18", "small"):
        raise ValueError(f"unknown encoder {encoder!r}, expected resnet18 or small")
    front = ResNetEncoder(code) if encoder == "resnet18" else SmallEncoder(code)
    decoders = {
        "atlasnet-sphere": lambda: AtlasNet(code, hidden, "sphere", 1, points, level),
        "atlasnet-squares": lambda: AtlasNet(code, hidden, "square", primitives, points),
        "foldnet": lambda: FoldNet(code, hidden, points),
        "psgn": lambda: PointSetDecoder(code, hidden, points),
        "occnet": lambda: OccupancyDecoder(code, hidden),
    }
    if network not in decoders:
        raise ValueError(f"unknown network {network!r}, expected one of {', '.join(NETWORKS)}")
    return SingleView(front, decoders[network]())


def build_classifier(clusters: int, encoder: str = "resnet50", hidden: int = 1024) -> nn.Module:
    """The Clustering baseline's network: an image to one of the medoids of the training shapes.

    Args:
        clusters: K. encoder: "resnet50" (the authors', whose ImageNet weights can be loaded) or "small".
        hidden: width between features and classes.
    """
    if encoder == "small":
        return nn.Sequential(SmallEncoder(hidden), nn.ReLU(), nn.Linear(hidden, clusters))
    if encoder != "resnet50":
        raise ValueError(f"unknown encoder {encoder!r}, expected resnet50 or small")
    net = resnet.resnet50(weights=None)
    net.fc = nn.Sequential(nn.Linear(net.fc.in_features, hidden), nn.ReLU(), nn.Linear(hidden, clusters))  # type: ignore[assignment]
    return net


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the authors' networks as a state dict of ``SingleView``.

    AtlasNet's primitives are separate modules there (``decoder.decoder.<i>...``), stacked here; all else has its name.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    prefix = "decoder.decoder."
    out = {name: value for name, value in state.items() if not name.startswith(prefix)}
    stacked: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            stacked.setdefault(rest, {})[int(index)] = value
    for rest, parts in stacked.items():
        ordered = [parts[i] for i in range(len(parts))]
        out[f"decoder.{rest}"] = torch.cat(ordered) if ordered[0].ndim else ordered[0]
    return out


def parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
