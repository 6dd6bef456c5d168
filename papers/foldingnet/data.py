"""Point clouds: generated parametric surfaces, and ModelNet, ShapeNet and voxels in the layouts they are released in.

``load`` gives a data set as points and labels; ``neighbours`` finds the k nearest points of every point; ``CloudSet``
holds a split with its covariances and graphs and cuts batches out of it without a loop over clouds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import cache_folder, replacing, sha256_json, sha256_path
from shared.shapes import (
    check_clouds,
    find_meshes,
    open_tree,
    read_hdf5_clouds,
    read_npz,
    read_packed_voxels,
    sample_meshes,
    sample_surface,
    sample_voxels,
    unit_sphere,
)


@dataclass(frozen=True)
class Split:
    """``points`` (N, n, 3) float32 in the unit sphere and ``labels`` (N,) int64, empty where a set has none."""

    points: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Split:
        """The samples at ``index``."""
        return Split(self.points[index], self.labels[index] if len(self.labels) else self.labels)


# ---- generated surfaces ----------------------------------------------------------------------------------------
#
# A surface maps u, v in [0, 1] and shape parameters p in [0, 1] to (x, y, z). u and v are (V,), p holds (B, 1) columns,
# so one call makes all clouds of a class.

TAU = 2 * math.pi
Triple = tuple[Tensor, Tensor, Tensor]
Surface = Callable[[Tensor, Tensor, Tensor], Triple]
LATTICE = 28


def _revolve(u: Tensor, radius: Tensor, height: Tensor) -> Triple:
    return radius * (TAU * u).cos(), radius * (TAU * u).sin(), height


def _superquadric(u: Tensor, v: Tensor, exponent: Tensor) -> Triple:
    def power(x: Tensor) -> Tensor:
        return x.sign() * x.abs().clamp_min(1e-9) ** exponent

    a, b = TAU * u, math.pi * (v - 0.5)
    return power(b.cos()) * power(a.cos()), power(b.cos()) * power(a.sin()), power(b.sin())


def _tube(x: Tensor, y: Tensor, z: Tensor, u: Tensor, radius: Tensor) -> Triple:
    """A tube around a curve (B, V) that runs along v, the slow index of the lattice."""
    curve = torch.stack(torch.broadcast_tensors(x, y, z), -1)
    along = torch.gradient(curve.view(len(curve), LATTICE, LATTICE, 3), dim=1)[0].reshape_as(curve)
    along = along / along.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    side = torch.linalg.cross(along, torch.tensor([0.31, 0.17, 0.93]).expand_as(along))
    side = side / side.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    up = torch.linalg.cross(along, side)
    angle = (TAU * u).view(1, -1, 1)
    x, y, z = (curve + radius.unsqueeze(-1) * (angle.cos() * side + angle.sin() * up)).unbind(-1)
    return x, y, z


def _bowl(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _revolve(u, (math.pi / 2 * v).sin(), -(0.6 + 0.6 * p[0]) * (math.pi / 2 * v).cos())


def _box(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _superquadric(u, v, 0.1 + 0.1 * p[0])


def _capsule(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    height = 2 * v - 1
    return _revolve(u, 0.45 * (1 - height.abs() ** (4 + 4 * p[0])).clamp_min(0).sqrt(), (1 + p[1]) * height)


def _cone(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _revolve(u, (0.6 + 0.5 * p[0]) * v, -(1 + p[1]) * v)


def _cylinder(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _revolve(u, 0.55 + 0.3 * p[0], (0.8 + p[1]) * (2 * v - 1))


def _dumbbell(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    lobes = (math.pi * v).cos() ** 2 * (math.pi * v).sin().abs().sqrt()
    return _revolve(u, 0.2 + (0.5 + 0.3 * p[0]) * lobes, (1.2 + 0.4 * p[1]) * (2 * v - 1))


def _ellipsoid(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _superquadric(u, v, 0.9 + 0.2 * p[0])


def _helix(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    angle = TAU * (1.5 + p[0]) * v
    return _tube(angle.cos(), angle.sin(), (1.6 + p[1]) * (v - 0.5), u, 0.12 + 0.1 * p[2])


def _hourglass(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    height = 2 * v - 1
    return _revolve(u, 0.15 + (0.5 + 0.4 * p[0]) * height**2, (0.8 + 0.4 * p[1]) * height)


def _moebius(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    across = (0.35 + 0.25 * p[0]) * (2 * u - 1)
    radius = 1 + across * (math.pi * v).cos()
    return radius * (TAU * v).cos(), radius * (TAU * v).sin(), across * (math.pi * v).sin()


def _octahedron(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _superquadric(u, v, 1.8 + 0.3 * p[0])


def _saddle(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    x, y = 2 * u - 1, 2 * v - 1
    return x, y, (0.5 + 0.4 * p[0]) * (x**2 - y**2)


def _star(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return _revolve(u, 0.7 + (0.2 + 0.15 * p[0]) * (5 * TAU * u).cos(), (0.3 + 0.4 * p[1]) * (2 * v - 1))


def _torus(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    thick = 0.25 + 0.2 * p[0]
    return _revolve(u, 1 + thick * (TAU * v).cos(), thick * (TAU * v).sin())


def _trefoil(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    a, wide = TAU * v, 1.6 + 0.8 * p[0]
    return _tube(a.sin() + wide * (2 * a).sin(), a.cos() - wide * (2 * a).cos(), -(3 * a).sin(), u, 0.3 + 0.2 * p[1])


def _wave(u: Tensor, v: Tensor, p: Tensor) -> Triple:
    return 2 * u - 1, 2 * v - 1, (0.2 + 0.2 * p[0]) * (TAU * (1 + p[1]) * u).sin()


SURFACES: dict[str, Surface] = {
    "bowl": _bowl,
    "box": _box,
    "capsule": _capsule,
    "cone": _cone,
    "cylinder": _cylinder,
    "dumbbell": _dumbbell,
    "ellipsoid": _ellipsoid,
    "helix": _helix,
    "hourglass": _hourglass,
    "moebius": _moebius,
    "octahedron": _octahedron,
    "saddle": _saddle,
    "star": _star,
    "torus": _torus,
    "trefoil": _trefoil,
    "wave": _wave,
}
"""Sixteen classes, open and closed, of genus 0 and 1, one of them not orientable."""


def lattice(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """A square lattice of parameters and the triangles of its cells.

    Returns:
        u (fast) and v (slow), (side^2,) in [0, 1], and faces (2 (side - 1)^2, 3) int64.
    """
    v, u = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    index = torch.arange(side * side).view(side, side)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    faces = torch.stack([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)])
    return u.flatten(), v.flatten(), faces.view(-1, 3)


def deform(vertices: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Stretch, taper, twist and bend each shape by its own random amounts, turn it about z and tilt it.

    Args:
        vertices: (B, V, 3), about unit size. strength: 0 leaves the shapes alone.
    """

    def draw(columns: int) -> Tensor:
        return strength * (2 * torch.rand(len(vertices), 1, columns, generator=generator) - 1)

    x, y, z = (vertices * (1 + 0.35 * draw(3))).unbind(-1)
    taper, twist, bend, tilt = draw(4).unbind(-1)
    yaw = math.pi / 4 * draw(1)[..., 0]
    angle, scale = 0.8 * twist * z, 1 + 0.35 * taper * z
    x, y = scale * (angle.cos() * x - angle.sin() * y), scale * (angle.sin() * x + angle.cos() * y)
    x = x + 0.4 * bend * z**2
    x, y = yaw.cos() * x - yaw.sin() * y, yaw.sin() * x + yaw.cos() * y
    y, z = (0.5 * tilt).cos() * y - (0.5 * tilt).sin() * z, (0.5 * tilt).sin() * y + (0.5 * tilt).cos() * z
    return torch.stack([x, y, z], -1)


def generate_surfaces(
    per_class: int, points: int, generator: torch.Generator, noise: float = 0.02, strength: float = 1.0
) -> Split:
    """Clouds of every class of ``SURFACES``: deformed, sampled evenly by area, noisy, in the unit sphere.

    Args:
        per_class: clouds a class. points: points a cloud. noise: standard deviation of the noise on the coordinates,
            in radii of the cloud. strength: of the deformation.
    """
    u, v, faces = lattice(LATTICE)
    clouds = []
    for surface in SURFACES.values():
        p = torch.rand(3, per_class, 1, generator=generator)
        vertices = torch.stack(torch.broadcast_tensors(*surface(u, v, p)), -1).expand(per_class, -1, -1)
        vertices = deform(unit_sphere(vertices), strength, generator)
        clouds.append(unit_sphere(sample_surface(vertices, faces, points, generator)))
    cloud = torch.cat(clouds)
    cloud = unit_sphere(cloud + noise * torch.randn(cloud.shape, generator=generator))
    return Split(cloud, torch.arange(len(SURFACES)).repeat_interleave(per_class))


# ---- data sets of the field ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A data set that ``load`` reads.

    Attributes:
        title, layout: for the reader. classes: number of classes, 0 without labels. counts: samples expected in each
            split. place: file or folder below ``--data``.
    """

    title: str
    classes: int
    counts: dict[str, int]
    place: str
    layout: str


SOURCES = {
    "modelnet10-voxels": Source(
        "ModelNet10 as occupancy grids", 10, {"train": 3964, "test": 901}, "modelnet10_voxels32_packed.npz",
        "X_train, y_train, X_test, y_test; 32^3 cells packed into 4096 bytes",
    ),
    "modelnet10": Source(
        "ModelNet10 meshes", 10, {"train": 3991, "test": 908}, "ModelNet10", "<class>/{train,test}/*.off"
    ),
    "modelnet40": Source(
        "ModelNet40 point clouds", 40, {"train": 9840, "test": 2468}, "modelnet40_ply_hdf5_2048",
        "ply_data_train*.h5 and ply_data_test*.h5 with data (N, 2048, 3) and label (N, 1)",
    ),
    "shapenet": Source(
        "ShapeNet point clouds", 0, {"train": 57448}, "shapenet57448xyzonly.npz", "array data (57448, 2048, 3)"
    ),
    "shapenetpart": Source(
        "ShapeNetPart point clouds", 16, {"train": 14007, "test": 2874}, "shapenet_part_seg_hdf5_data",
        "ply_data_train*.h5, ply_data_val*.h5 (both train here) and ply_data_test*.h5 with data, label, pid",
    ),
    "geometric-shapes": Source(
        "GeometricShapes meshes", 40, {"train": 40, "test": 40}, "raw", "<class>/{train,test}/*.off"
    ),
}  # fmt: skip
"""Data sets by name."""


def locate(name: str, folder: Path | None) -> Path:
    """Where a data set lies: ``folder/<place>``, ``folder/<place>.zip`` for meshes, or ``folder`` itself.

    Raises:
        UserError: not there.
    """
    source = SOURCES[name]
    expected = f"{source.place} ({source.layout})"
    if folder is None:
        raise UserError(f"{name} needs --data DIR that holds {expected}")
    places = [folder / source.place]
    if source.place == folder.name:
        places.append(folder)
    if source.layout.endswith(".off"):
        places.append(folder / f"{source.place}.zip")
    for path in places:
        if path.exists():
            return path
    raise UserError(f"{source.title}: not in {folder}, expected {expected}")


def count_shapes(name: str, folder: Path | None, points: int) -> dict[str, int]:
    """Shapes found in each split; meshes are counted without reading them, all else is read and checked.

    Raises:
        UserError: missing or malformed, see ``load``.
    """
    path, source = locate(name, folder), SOURCES[name]
    if source.layout.endswith(".off"):
        tree = open_tree(path, "" if path.is_dir() else source.place)
        return {split: len(find_meshes(tree, split)[0]) for split in source.counts}
    return {split: len(half.points) for split, half in load(name, folder, points, 0).items()}


def load(name: str, folder: Path | None, points: int, seed: int, clouds_per_mesh: int = 1) -> dict[str, Split]:
    """Read a data set.

    Args:
        name: a key of ``SOURCES``. folder: what ``--data`` named. points: points a cloud; sets stored as clouds give
            their first ones, meshes and voxels are sampled. seed: of that sampling. clouds_per_mesh: samplings of
            each mesh.

    Returns:
        ``{"train": Split, "test": Split}``; ShapeNet has no test split.

    Raises:
        UserError: missing or malformed; names file, sample and what is expected.
    """
    path, source = locate(name, folder), SOURCES[name]
    generator = torch.Generator().manual_seed(seed)
    if name == "shapenet":
        cloud = torch.from_numpy(np.asarray(read_npz(path, ("data",))["data"], dtype=np.float32))
        check_clouds(cloud, f"{path}: data", points)
        return {"train": Split(cloud[:, :points].contiguous(), torch.zeros(0, dtype=torch.long))}
    splits = {}
    if name == "modelnet10-voxels":
        for split, half in read_packed_voxels(path).items():
            wrong = (half.labels < 0) | (half.labels >= source.classes)
            if wrong.any():
                raise UserError(f"{path}: y_{split}[{int(wrong.nonzero()[0])}] is no class of 0..{source.classes - 1}")
            cloud = unit_sphere(sample_voxels(half.grids, points, generator), f"{path} {split}")
            splits[split] = Split(cloud, half.labels)
        return splits
    for split in source.counts:
        if name in ("modelnet40", "shapenetpart"):
            parts = (split, "val") if (name, split) == ("shapenetpart", "train") else (split,)
            files = [file for part in parts for file in sorted(path.glob(f"ply_data_{part}*.h5"))]
            if not files:
                raise UserError(f"{path}: no ply_data_{split}*.h5 there")
            cloud, labels = read_hdf5_clouds(files, source.classes)
            check_clouds(cloud, str(path), points)
            splits[split] = Split(cloud[:, :points].contiguous(), labels)
        else:
            splits[split] = _meshes(name, path, split, points, seed, clouds_per_mesh)
    return splits


def _meshes(name: str, path: Path, split: str, points: int, seed: int, times: int) -> Split:
    source = SOURCES[name]
    files, classes = find_meshes(open_tree(path, "" if path.is_dir() else source.place), split)
    if len(classes) != source.classes:
        raise UserError(f"{path}: {len(classes)} class folders, expected {source.classes}")
    files = [file for file in files for _ in range(times)]

    def sample() -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return sample_meshes(files, points, generator).numpy()

    key = [name, split, points, seed, times, sha256_path(path)]
    cloud = torch.from_numpy(cached(key, sample, len(files) > 500))
    return Split(cloud, torch.tensor([file.label for file in files]))


def cached(key: object, make: Callable[[], np.ndarray], worth_it: bool = True) -> np.ndarray:
    """An array from the cache folder, made and stored there first when it is not there.

    Args:
        key: everything the array depends on, JSON-able. make: makes the array. worth_it: False only makes it.
    """
    if not worth_it:
        return make()
    path = cache_folder("foldingnet") / f"{sha256_json(key)[:32]}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or damaged: made again
        array = make()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    return array


# ---- neighbours and batches ------------------------------------------------------------------------------------

TREE_POINTS = 1 << 17
CACHE_POINTS = 1 << 22


def neighbours(points: Tensor, k: int, where: str = "point clouds") -> Tensor:
    """The k nearest other points of every point of every cloud, nearest first, by k-d trees on all cores.

    Clouds are set apart along x and share a tree, so there is no loop over clouds. Large sets are kept in the cache.

    Args:
        points: (N, n, 3). where: names the source in errors.

    Returns:
        (N, n, k) int16, int32 for clouds of more than 32,767 points.

    Raises:
        UserError: n <= k, or a coordinate that is not finite.
    """
    check_clouds(points, where)
    if points.shape[1] <= k:
        raise UserError(f"{where}: need more than k={k} points, got {points.shape[1]}")
    array = np.ascontiguousarray(points.numpy())

    def search() -> np.ndarray:
        return _neighbours(array, k)

    if points.shape[0] * points.shape[1] < CACHE_POINTS:
        return torch.from_numpy(search())
    import hashlib

    digest = hashlib.sha256(memoryview(array).cast("B")).hexdigest()
    return torch.from_numpy(cached(["neighbours", k, list(array.shape), digest], search))


def _neighbours(array: np.ndarray, k: int) -> np.ndarray:
    from scipy.spatial import cKDTree

    count, n, _ = array.shape
    kind = np.int16 if n <= np.iinfo(np.int16).max else np.int32
    out = np.empty((count, n, k), dtype=kind)
    clouds = max(1, TREE_POINTS // n)
    apart = 8.0 * max(float(np.abs(array).max()), 1e-6)
    own = np.arange(n)[None, :, None]
    for begin in range(0, count, clouds):
        part = array[begin : begin + clouds].astype(np.float64)
        part[..., 0] += apart * np.arange(len(part))[:, None]
        _, found = cKDTree(part.reshape(-1, 3)).query(part.reshape(-1, 3), k=k + 1, workers=-1)
        found = found.reshape(len(part), n, k + 1) - n * np.arange(len(part))[:, None, None]
        other = found != own
        other[other.all(-1), -1] = False  # more than k coinciding points hid the point itself: drop the farthest
        out[begin : begin + clouds] = found[other].reshape(len(part), n, k)
    return out


@dataclass(frozen=True)
class CloudSet:
    """A split ready for the encoder.

    Attributes:
        points: (N, n, 3). labels: (N,) or empty. covariance: (N, n, 9).
        indptr: (N, n + 1) int32, rows of each cloud's own graph. indices: (edges,) small integers, all graphs one
            after the other. starts: (N,) int64, where a cloud's edges begin.
    """

    points: Tensor
    labels: Tensor
    covariance: Tensor
    indptr: Tensor
    indices: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Points (B, n, 3), covariances (B, n, 9) and the graph (indptr, indices) over the B * n points of a batch."""
        b, n = len(index), self.points.shape[1]
        indptr = self.indptr[index].long()
        edges = indptr[:, -1]
        begin = edges.cumsum(0) - edges
        cloud = torch.repeat_interleave(torch.arange(b), edges)
        place = torch.arange(int(edges.sum())) - begin[cloud] + self.starts[index][cloud]
        indices = self.indices[place].int() + n * cloud.int()
        rows = (indptr[:, :-1] + begin.unsqueeze(1)).flatten()
        return self.points[index], self.covariance[index], (torch.cat([rows, edges.sum().view(1)]).int(), indices)

    @staticmethod
    def make(split: Split, near: Tensor, covariance: CovarianceOf, graph: GraphOf, chunk: int = 128) -> CloudSet:
        """Compute covariances and graphs of a split from its neighbours, ``chunk`` clouds at a time.

        Args:
            near: (N, n, k) from ``neighbours``. covariance, graph: ``model.local_covariance``, ``model.union_graph``.
        """
        n = split.points.shape[1]
        covariances, pointers, indices = [], [], []
        for begin in range(0, len(near), chunk):
            part = near[begin : begin + chunk]
            b = len(part)
            covariances.append(covariance(split.points[begin : begin + chunk], part))
            indptr, flat = graph(part)
            rows = indptr.long()[torch.arange(b).unsqueeze(1) * n + torch.arange(n + 1)]
            pointers.append((rows - rows[:, :1]).int())
            indices.append((flat % n).to(near.dtype))
        indptr = torch.cat(pointers)
        edges = indptr[:, -1].long()
        return CloudSet(
            split.points, split.labels, torch.cat(covariances), indptr, torch.cat(indices), edges.cumsum(0) - edges
        )


CovarianceOf = Callable[[Tensor, Tensor], Tensor]
GraphOf = Callable[[Tensor], tuple[Tensor, Tensor]]


def replace_by_noise(points: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of each cloud's points by points uniform in the cloud's bounding cube.

    Args:
        points: (N, n, 3). share: in [0, 1].

    Returns:
        (N, n, 3); the replaced points come first, their order means nothing to the encoder.
    """
    n = points.shape[1]
    count = round(share * n)
    if count == 0:
        return points
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    centre, side = (low + high) / 2, (high - low).amax(-1, keepdim=True)
    noise = centre + side * (torch.rand(len(points), count, 3, generator=generator) - 0.5)
    keep = torch.rand(len(points), n, generator=generator).argsort(1)[:, count:]
    return torch.cat([noise, points.gather(1, keep.unsqueeze(-1).expand(-1, -1, 3))], 1)
