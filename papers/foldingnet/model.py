"""FoldingNet: a graph encoder for point clouds and a decoder that folds a plane grid twice into their surface.

Yang, Feng, Shen, Tian: "FoldingNet: Point Cloud Auto-encoder via Deep Grid Deformation", CVPR 2018. Sizes,
order of operations and initialisation are those of the authors' released Caffe networks (files named in README.md).

Notation: B clouds of n points, k neighbours, a codeword of C numbers, M grid points.

State dict: ``encoder.point1 .. point5`` (per-point layers), ``encoder.code1, code2``; folding decoders
``decoder.fold1.{hidden1,hidden2,out}`` and ``decoder.fold2...`` (input order: base point, then codeword) with the
buffer ``decoder.grid``; fully connected decoder ``decoder.hidden1, hidden2, out``. All are ``weight`` and ``bias``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS, NEIGHBOURS, CODE = 2048, 16, 512
GRID_RANGE = 0.3
DISTANCE_SHIFT = 1e-6
"""Added under the root of every distance, so that coincident points have a gradient."""


# ---- graph -----------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """An undirected graph over the B * n points of a batch, as compressed sparse rows.

    Attributes:
        indptr: (B * n + 1,) int32. indices: (edges,) int32; the neighbours of point i are
            ``indices[indptr[i]:indptr[i + 1]]``. Points of different clouds are never neighbours.
    """

    indptr: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Graph:
        """The graph on another device."""
        return Graph(self.indptr.to(device), self.indices.to(device))


class Clouds(NamedTuple):
    """What the encoder reads: ``points`` (B, n, 3), ``covariance`` (B, n, 9) and the neighbour ``graph``."""

    points: Tensor
    covariance: Tensor
    graph: Graph

    def to(self, device: torch.device) -> Clouds:
        """The batch on another device."""
        return Clouds(self.points.to(device), self.covariance.to(device), self.graph.to(device))


def nearest_neighbours(points: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The k nearest other points of every point, by Euclidean distance.

    Args:
        points: (B, n, 3).

    Returns:
        (B, n, k) int64, nearest first; a point is never its own neighbour.

    Raises:
        ValueError: n <= k.
    """
    n = points.shape[1]
    if n <= k:
        raise ValueError(f"need more than k={k} points, got {n}")
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return distance.topk(k, dim=2, largest=False).indices


def local_covariance(points: Tensor, neighbours: Tensor) -> Tensor:
    """Unbiased covariance (divided by k - 1) of the coordinates of each point's k neighbours, itself left out.

    Args:
        points: (B, n, 3). neighbours: (B, n, k) integer.

    Returns:
        (B, n, 9), the 3 x 3 matrices row by row.
    """
    b, n, k = neighbours.shape
    around = points.gather(1, neighbours.reshape(b, n * k, 1).long().expand(-1, -1, 3)).view(b, n, k, 3)
    centred = around - around.mean(2, keepdim=True)
    return (centred.transpose(2, 3) @ centred / (k - 1)).flatten(2)


def union_graph(neighbours: Tensor) -> Graph:
    """The undirected graph in which i and j are neighbours if either is among the k nearest of the other.

    Args:
        neighbours: (B, n, k) integer, positions within the cloud, no point its own neighbour.

    Returns:
        a ``Graph`` over B * n points; the neighbours of a point ascend.
    """
    b, n, k = neighbours.shape
    total = b * n
    source = torch.arange(total, device=neighbours.device).repeat_interleave(k)
    target = (neighbours.long() + n * torch.arange(b, device=neighbours.device).view(b, 1, 1)).flatten()
    edges = torch.cat([source * total + target, target * total + source]).unique()  # sorted, each edge both ways once
    degree = torch.bincount(edges // total, minlength=total)
    indptr = F.pad(degree.cumsum(0), (1, 0))
    return Graph(indptr.int(), (edges % total).int())


def prepare(points: Tensor, k: int = NEIGHBOURS) -> Clouds:
    """Covariances and graph of raw clouds computed on the points' device.

    Args:
        points: (B, n, 3), expected in the unit sphere.

    Raises:
        ValueError: another shape, or n <= k.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points have shape {tuple(points.shape)}, expected (clouds, points, 3)")
    neighbours = nearest_neighbours(points, k)
    return Clouds(points, local_covariance(points, neighbours), union_graph(neighbours))


def neighbour_max(x: Tensor, graph: Graph) -> Tensor:
    """Graph max pooling: each point takes the channel-wise maximum of its neighbours, itself not included.

    Args:
        x: (B, n, c). graph: over the B * n points, no point without neighbours.

    Returns:
        (B, n, c). The gradient goes to the neighbour that gave the maximum (one of them where several did).
    """
    flat = x.reshape(-1, x.shape[-1])
    pool = _sparse_max if flat.device.type == "cpu" else _bag_max
    return pool(flat, graph).view_as(x)


def _sparse_max(x: Tensor, graph: Graph) -> Tensor:
    """On the CPU: several times faster, forward and backward, than any form that gathers (edges, c) rows."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    ones, size = wide.new_ones(len(graph.indices)), (len(x), len(x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(*graph, ones, size=size, check_invariants=False)  # int32: half the time
    return torch.sparse.mm(matrix, wide, "amax").to(x.dtype)


def _bag_max(x: Tensor, graph: Graph) -> Tensor:
    """On accelerators, where the sparse reduction does not exist: a fused gather and maximum."""
    return F.embedding_bag(graph.indices, x, graph.indptr, mode="max", include_last_offset=True)


def linear_max(x: Tensor, layer: nn.Linear) -> Tensor:
    """The maximum over points of a linear layer: ``layer(x).amax(1)``, with a backward pass that costs nearly nothing.

    Only the winning point of a channel has a gradient, so the winners are found without a graph and their values
    computed again from the (B, c_out, c_in) rows that won, instead of multiplying by (B, n, c_out) zeros.

    Args:
        x: (B, n, c_in). layer: c_in -> c_out.

    Returns:
        (B, c_out).
    """
    b, n, c = x.shape
    with torch.no_grad():
        y = F.linear(x, layer.weight)
        # Two levels: a maximum with its index across a strided dimension is ten times slower than without.
        block = max(size for size in (64, 32, 16, 8, 4, 2, 1) if n % size == 0)
        start = y.view(b, n // block, block, -1).amax(2).max(1).indices * block
        inside = start.unsqueeze(1) + torch.arange(block, device=x.device).view(1, block, 1)
        winner = start + y.gather(1, inside).max(1).indices
    rows = x.gather(1, winner.unsqueeze(-1).expand(-1, -1, c))
    return (rows * layer.weight).sum(-1) + layer.bias


# ---- distance --------------------------------------------------------------------------------------------------


def nearest_pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Position in y of each x's nearest point, and position in x of each y's nearest.

    Args:
        x: (B, n, 3). y: (B, m, 3).

    Returns:
        (B, n) and (B, m) int64. Without a gradient, in float32 whatever the autocast.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, y = x.detach().float(), y.detach().float()
        xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
        # |x - y|^2 = [x, |x|^2, 1] . [-2 y, 1, |y|^2]: one matrix product, no (B, n, m, 3) differences
        left = torch.cat([x, xx, torch.ones_like(xx)], -1)
        right = torch.cat([-2 * y, torch.ones_like(yy), yy], -1)
        squared = left @ right.transpose(1, 2)
        return squared.min(2).indices, squared.min(1).indices


def _rows(points: Tensor, index: Tensor) -> Tensor:
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))


def chamfer_parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two directed mean distances, and the squared form that other papers use.

    Nearest neighbours are found first; distances, and so gradients, exist for the n + m chosen pairs only.

    Args:
        x: (B, n, 3). y: (B, m, 3).

    Returns:
        mean over x of min over y of sqrt(|x - y|^2 + 1e-6), the same from y, and the sum of the two means of
        squared distances; (B,) each.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or y.ndim != 3 or x.shape[-1] != 3 or y.shape[-1] != 3 or len(x) != len(y):
        raise ValueError(f"clouds of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (B, n, 3) and (B, m, 3)")
    to_y, to_x = nearest_pairs(x, y)
    from_x = (x - _rows(y, to_y)).square().sum(-1)
    from_y = (y - _rows(x, to_x)).square().sum(-1)
    forward = (from_x + DISTANCE_SHIFT).sqrt().mean(1)
    backward = (from_y + DISTANCE_SHIFT).sqrt().mean(1)
    return forward, backward, from_x.mean(1) + from_y.mean(1)


def chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Extended Chamfer distance: the larger of the two directed mean distances (not squared), per cloud.

    Args:
        x: (B, n, 3). y: (B, m, 3).

    Returns:
        (B,); the training loss is its mean.
    """
    forward, backward, _ = chamfer_parts(x, y)
    return torch.maximum(forward, backward)


def chamfer_squared(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the two directed means of squared distances: the form of other papers, for comparison only. (B,)."""
    return chamfer_parts(x, y)[2]


# ---- rotations -------------------------------------------------------------------------------------------------


def axis_rotations(axis: Tensor, quarter_turns: Tensor) -> Tensor:
    """Rotations by multiples of 90 degrees about signed coordinate axes, with exact entries.

    Args:
        axis: (B,) in 0..5 for +x, +y, +z, -x, -y, -z. quarter_turns: (B,) in 0..3.

    Returns:
        (B, 3, 3) float32: I + sin K + (1 - cos) K^2 with K the cross-product matrix of the axis.
    """
    sign = 1 - 2 * (axis >= 3).long()
    unit = F.one_hot(axis % 3, 3) * sign.unsqueeze(1)
    x, y, z = unit.unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    sine = torch.tensor([0, 1, 0, -1], device=axis.device)[quarter_turns].view(-1, 1, 1)
    versine = torch.tensor([0, 1, 2, 1], device=axis.device)[quarter_turns].view(-1, 1, 1)
    square = (cross.unsqueeze(3) * cross.unsqueeze(1)).sum(2)
    return (torch.eye(3, dtype=torch.long, device=axis.device) + sine * cross + versine * square).float()


def orthogonal_rotations(count: int, generator: torch.Generator | None = None) -> Tensor:
    """The OrthoRot augmentation: a signed axis and one of four quarter turns, both uniform. (count, 3, 3)."""
    axis = torch.randint(6, (count,), generator=generator)
    return axis_rotations(axis, torch.randint(4, (count,), generator=generator))


def random_rotations(count: int, generator: torch.Generator | None = None) -> Tensor:
    """The RandRot augmentation: rotations uniform over SO(3), from uniform unit quaternions. (count, 3, 3)."""
    q = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, 1).view(-1, 3, 3).float()


def rotate(clouds: Clouds, rotation: Tensor) -> Clouds:
    """Turn clouds: x R, and with them the covariances, R^T C R; neighbours stay neighbours.

    Args:
        rotation: (B, 3, 3).
    """
    b, n, _ = clouds.points.shape
    turn = rotation.unsqueeze(1)
    covariance = turn.transpose(2, 3) @ clouds.covariance.view(b, n, 3, 3) @ turn
    return Clouds(clouds.points @ rotation, covariance.flatten(2), clouds.graph)


# ---- networks --------------------------------------------------------------------------------------------------


def initialise(module: nn.Module) -> None:
    """Caffe's "xavier" filler, which the authors used: weights U(-a, a) with a = sqrt(3 / fan-in), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(3 / layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)


def plane_grid(resolution: Sequence[int]) -> Tensor:
    """The fixed points that are folded: a regular lattice in [-0.3, 0.3]^d, first coordinate fastest in 2-D.

    Args:
        resolution: points along each axis, e.g. (45, 45) or (13, 13, 13); an axis of 1 point lies at -0.3.

    Returns:
        (product of the resolution, d) float32, in the order of ``numpy.meshgrid``.

    Raises:
        ValueError: an axis without points.
    """
    if not resolution or min(resolution) < 1:
        raise ValueError(f"grid resolution {tuple(resolution)}: expected at least one point along each axis")
    axes = [torch.linspace(-GRID_RANGE, GRID_RANGE, steps, dtype=torch.float64) for steps in resolution]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="xy")], 1).float()


def square_side(points: int) -> int:
    """Side of a square grid of so many points.

    Raises:
        ValueError: not a square number.
    """
    side = math.isqrt(max(points, 0))
    if side < 1 or side * side != points:
        raise ValueError(f"no square grid has {points} points: expected a square number such as {max(side, 1) ** 2}")
    return side


def sphere_grid(points: int) -> Tensor:
    """Points spread evenly over the unit sphere (a Fibonacci lattice), in place of the plane. (points, 3)."""
    i = torch.arange(points, dtype=torch.float64)
    z = 1 - (2 * i + 1) / points
    radius, angle = (1 - z * z).sqrt(), math.pi * (3 - math.sqrt(5)) * i
    return torch.stack([radius * angle.cos(), radius * angle.sin(), z], 1).float()


def gaussian_grid(points: int, seed: int = 0) -> Tensor:
    """Fixed draws of N(0, I) in place of the plane. (points, 3)."""
    return torch.randn(points, 3, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Module):
    """Cloud to codeword: per-point layers, graph max pooling twice, a maximum over points, two layers.

    Args:
        code: length C of the codeword.
        widths: channels after point1, point2, point3, point4 and point5.
        covariance: read the local covariances beside the coordinates (False: variant noCov).
        graph: pool over neighbours (False: variant noGM; without both it is a PointNet).
    """

    def __init__(
        self,
        code: int = CODE,
        widths: Sequence[int] = (64, 64, 64, 128, 1024),
        covariance: bool = True,
        graph: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 5 or min(widths) < 1 or code < 1:
            raise ValueError(
                f"encoder widths {tuple(widths)} and code {code}: expected five widths and a code, all >= 1"
            )
        self.covariance, self.graph = covariance, graph
        self.point1 = nn.Linear(12 if covariance else 3, widths[0])
        self.point2 = nn.Linear(widths[0], widths[1])
        self.point3 = nn.Linear(widths[1], widths[2])
        self.point4 = nn.Linear(widths[2], widths[3])
        self.point5 = nn.Linear(widths[3], widths[4])
        self.code1 = nn.Linear(widths[4], code)
        self.code2 = nn.Linear(code, code)
        initialise(self)

    def forward(self, points: Tensor, covariance: Tensor, graph: Graph) -> Tensor:
        """Codewords (B, C) of clouds as ``Clouds`` holds them."""
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f"points have shape {tuple(points.shape)}, expected (clouds, points, 3)")
        x = torch.cat([points, covariance], -1) if self.covariance else points
        x = self.point1(x).relu_()
        x = self.point2(x).relu_()
        x = self.point3(x).relu()
        if self.graph:
            x = neighbour_max(x, graph)
        x = self.point4(x).relu()
        if self.graph:
            x = neighbour_max(x, graph)
        x = linear_max(x, self.point5)  # no ReLU between this layer and the maximum over points
        return self.code2(self.code1(x).relu())


class Fold(nn.Module):
    """One folding operation: a perceptron on [base point, codeword], shared by all points of all clouds.

    The first layer acts on the concatenation of a base point and the codeword, which is the same for a whole cloud:
    W [g, c] + b = W_g g + (W_c c + b). The bracket is computed once a cloud, so no codeword is ever tiled.

    Args:
        base: coordinates of a base point. code: length of the codeword. hidden: width of both hidden layers.
    """

    def __init__(self, base: int, code: int, hidden: int) -> None:
        super().__init__()
        self.base = base
        self.hidden1 = nn.Linear(base + code, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 3)

    def forward(self, base: Tensor, code: Tensor) -> Tensor:
        """Folded points (B, M, 3) from base points (M, d) or (B, M, d) and codewords (B, C)."""
        from_base, from_code = self.hidden1.weight.split([self.base, self.hidden1.in_features - self.base], 1)
        cloud = F.linear(code, from_code, self.hidden1.bias).unsqueeze(1)
        x = (F.linear(base, from_base) + cloud).relu_()
        return self.out(self.hidden2(x).relu_())


class Reconstruction(NamedTuple):
    """What a decoder makes of codewords: ``points`` and, after one fold, ``first``; both (B, M, 3)."""

    points: Tensor
    first: Tensor


class FoldingDecoder(nn.Module):
    """Codeword to surface: the grid is folded, and the result folded again.

    Args:
        code: length of the codeword. hidden: width of the folds. grid: (M, d) base points, fixed; or M, the points of
            a square plane grid. shared: both folds use the same weights (the authors' recurrent variant), which needs
            a grid in 3-D.
    """

    grid: Tensor

    def __init__(self, code: int = CODE, hidden: int = 512, grid: Tensor | int = 2025, shared: bool = False) -> None:
        super().__init__()
        if isinstance(grid, int):
            grid = plane_grid([square_side(grid)] * 2)
        if shared and grid.shape[1] != 3:
            raise ValueError(f"folds that share weights need a grid in 3-D, got {grid.shape[1]}-D")
        self.register_buffer("grid", grid, persistent=False)
        self.fold1 = Fold(grid.shape[1], code, hidden)
        if not shared:
            self.fold2 = Fold(3, code, hidden)
        self.shared = shared
        initialise(self)

    def forward(self, code: Tensor, grid: Tensor | None = None) -> Reconstruction:
        """Fold ``grid`` (M, d) instead of the decoder's own where one is given: any density works after training."""
        first = self.fold1(self.grid if grid is None else grid, code)
        second = self.fold1 if self.shared else self.fold2
        return Reconstruction(second(first, code), first)


class FullyConnectedDecoder(nn.Module):
    """The baseline: all coordinates at once from a perceptron C - hidden[0] - hidden[1] - 3 M.

    Args:
        code: length of the codeword. hidden: widths of the two hidden layers. points: M.
    """

    def __init__(self, code: int = CODE, hidden: Sequence[int] = (1024, 2048), points: int = POINTS) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(code, hidden[0])
        self.hidden2 = nn.Linear(hidden[0], hidden[1])
        self.out = nn.Linear(hidden[1], 3 * points)
        initialise(self)

    def forward(self, code: Tensor) -> Reconstruction:
        """Points (B, M, 3) from codewords (B, C)."""
        x = self.hidden2(self.hidden1(code).relu_()).relu_()
        points = self.out(x).unflatten(1, (-1, 3))
        return Reconstruction(points, points)


class AutoEncoder(nn.Module):
    """Encoder and decoder, trained together on ``chamfer(points, reconstruction).mean()``.

    Args:
        encoder, decoder: modules of this file (or others of the same signatures).
    """

    def __init__(self, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = Encoder() if encoder is None else encoder
        self.decoder = FoldingDecoder() if decoder is None else decoder

    def forward(self, points: Tensor, covariance: Tensor, graph: Graph) -> Reconstruction:
        """Reconstruct clouds as ``Clouds`` holds them (``model(*clouds)``)."""
        return self.decoder(self.encoder(points, covariance, graph))


VARIANTS = (
    *("foldingnet", "nocov", "nogm", "nogmcov", "orthorot", "randrot"),
    *("grid3d", "denser", "rnn", "sphere", "gaussian", "fc"),
)
"""Arms by name: the authors' ablations and augmentations, three grids of others, and the fully connected baseline."""


def build(
    variant: str = "foldingnet",
    code: int = CODE,
    hidden: int = 512,
    side: int = 45,
    widths: Sequence[int] = (64, 64, 64, 128, 1024),
    fc_hidden: Sequence[int] = (1024, 2048),
    fc_points: int = POINTS,
) -> AutoEncoder:
    """The auto-encoder of a variant; the defaults are the paper's sizes.

    Args:
        variant: one of ``VARIANTS``. ``orthorot`` and ``randrot`` differ in training only (see ``ROTATIONS``).
        code, hidden, side: codeword, fold width, points along a side of the grid (45: 2,025 points). The denser grid
            has 50/45 and the 3-D grid 13^3 / 45^2 of the points per side or in all.
        widths: encoder widths. fc_hidden, fc_points: the baseline's widths and points.

    Raises:
        ValueError: unknown variant, or sizes that no network has.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    if min(code, hidden, side, fc_points, *fc_hidden) < 1:
        raise ValueError("code, hidden, side, fc_hidden and fc_points must be at least 1")
    encoder = Encoder(code, widths, variant not in ("nocov", "nogmcov"), variant not in ("nogm", "nogmcov"))
    if variant == "fc":
        return AutoEncoder(encoder, FullyConnectedDecoder(code, fc_hidden, fc_points))
    if variant == "grid3d":
        grid = plane_grid([max(1, round(13 * (side / 45) ** (2 / 3)))] * 3)
    elif variant == "denser":
        grid = plane_grid([round(50 * side / 45)] * 2)
    elif variant == "rnn":
        grid = plane_grid((side, side, 1))
    elif variant == "sphere":
        grid = sphere_grid(side * side)
    elif variant == "gaussian":
        grid = gaussian_grid(side * side)
    else:
        grid = plane_grid((side, side))
    return AutoEncoder(encoder, FoldingDecoder(code, hidden, grid, shared=variant == "rnn"))


ROTATIONS = {"orthorot": orthogonal_rotations, "randrot": random_rotations}
"""The augmentation that a variant trains with."""


def parameters(module: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in module.parameters())
