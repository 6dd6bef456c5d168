"""The sphere-to-cube study (generated, or the authors' files), ShapeNet's layouts, ModelNet10 voxels and the 2-D demo.

Whatever the source, a training or test set is a ``Views``: images, the shapes they show, and the camera of each image.
Shapes are point clouds in the object's frame and in the unit ball.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json
from shared.shapes import Voxels, check_clouds, read_npz, read_packed_voxels, sample_voxels, unit_sphere
from shared.unpickle import restricted_load

CLUSTER_CENTRES = (0.31, 0.69)
PER_CLUSTER = 10
GRID_STEP = 1e-3
"""Training values of the sphere-to-cube study lie on this grid, test values between its points."""
LIGHT = (0.76, 0.28, 0.59)
SUPERSAMPLING = 2
"""Rays a pixel, along each side: without, small images of nearby shapes are equal and then jump."""
EXTENT = 1.02
"""Half the side of the square that an image of the sphere-to-cube study shows, in radii of the unit ball."""
IMAGE_READERS = 8


InsideOf = Callable[[Tensor, Tensor], Tensor]
"""(samples (B,), points (B, n, 3) in the object's frame) to whether they are inside (B, n)."""


class Views(Protocol):
    """Images and the shapes that they show."""

    rotations: Tensor
    """(N, 3, 3) from the object's frame into the camera's."""
    order: Tensor
    """(N,) by which heat maps are sorted: the shape's value, or its class."""
    inside: InsideOf | None
    """Occupancy, where it is known."""

    def __len__(self) -> int: ...

    def images(self, index: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1]."""

    def clouds(self, index: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(B, count, 3): points drawn from each stored cloud."""


def draw_points(stored: Tensor, count: int, generator: torch.Generator, replace: bool = False) -> Tensor:
    """``count`` points of each cloud (B, n, 3); without replacement as far as there are enough."""
    b, n, _ = stored.shape
    if replace or count > n:
        index = torch.randint(n, (b, count), generator=generator)
    else:
        index = torch.rand(b, n, generator=generator).topk(count, dim=1).indices
    return stored.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))


@dataclass(frozen=True)
class MemoryViews:
    """``Views`` in memory.

    Attributes:
        pictures: (N, 3, S, S). stored: (N, n, 3). rotations, order: see ``Views``. inside: where occupancy is known.
    """

    pictures: Tensor
    stored: Tensor
    rotations: Tensor
    order: Tensor
    inside: InsideOf | None = None

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.stored):
            raise UserError(f"{len(self.pictures)} images and {len(self.stored)} shapes, expected pairs")

    def __len__(self) -> int:
        return len(self.stored)

    def images(self, index: Tensor) -> Tensor:
        """See ``Views``."""
        return self.pictures[index]

    def clouds(self, index: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """See ``Views``; drawn without replacement."""
        return draw_points(self.stored[index], count, generator)


def no_rotations(count: int) -> Tensor:
    """Cameras of data without camera information. (count, 3, 3)."""
    return torch.eye(3).expand(count, 3, 3)


# ---- sphere to cube, generated ---------------------------------------------------------------------------------


def _radius(directions: Tensor, values: Tensor) -> Tensor:
    """Distance of the surface along unit directions (..., n, 3) for values (...): a sphere at 0, a cube at 1."""
    t = values.unsqueeze(-1)
    to_cube = 1 / directions.abs().amax(-1)
    return (1 - t + t * to_cube) / (1 - t + t * math.sqrt(3))


def _normals(directions: Tensor, values: Tensor) -> Tensor:
    """Outward unit normals of the surface along unit directions; shapes as in ``_radius``."""
    # The surface is |p| - (1 - t) - t |p| / |p|_inf = 0 before scaling, whose gradient is this, up to a factor.
    t = values.unsqueeze(-1).unsqueeze(-1)
    largest, axis = directions.abs().max(-1, keepdim=True)
    radius = 1 - t + t / largest
    onto_axis = torch.zeros_like(directions).scatter(-1, axis, directions.gather(-1, axis).sign())
    return F.normalize(directions * (1 - t / (radius * largest)) + onto_axis * t / (radius * largest**2), dim=-1)


def sphere_cube_clouds(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points spread evenly by area over shapes between a sphere and a cube, which fill the unit ball.

    The shapes are centred and of unit norm by themselves. Normalising a cloud by its own few points would move and
    scale equal shapes by different amounts, a noise that the authors' 30,000 points do not have.

    Args:
        values: (N,) in [0, 1]. count: points a shape.

    Returns:
        (N, count, 3).
    """
    directions = F.normalize(torch.randn(len(values), 4 * count, 3, generator=generator), dim=-1)
    radius = _radius(directions, values)
    area = radius**2 / (directions * _normals(directions, values)).sum(-1)  # of the surface in a unit of solid angle
    dice = torch.rand(area.shape, generator=generator) * area.amax(1, keepdim=True)
    chosen = (dice >= area).byte().argsort(dim=1, stable=True)[:, :count]  # the accepted ones first: over a third are
    points = directions * radius.unsqueeze(-1)
    return points.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 3))


def sphere_cube_images(values: Tensor, side: int, searches: int = 16, bisections: int = 12) -> Tensor:
    """Isometric views, shaded under one fixed light, black background.

    Args:
        values: (N,). side: pixels. searches: steps towards the deepest point of a ray. bisections: for the surface.

    Returns:
        (N, 3, side, side) in [0, 1], the three channels equal.
    """
    frame = torch.tensor([[1.0, -1.0, 0.0], [-1.0, -1.0, 2.0], [1.0, 1.0, 1.0]])
    right, up, towards = F.normalize(frame, dim=1)
    fine = SUPERSAMPLING * side
    axis = (torch.arange(fine) + 0.5) / fine * 2 - 1
    y, x = torch.meshgrid(-EXTENT * axis, EXTENT * axis, indexing="ij")
    plane = (x.reshape(-1, 1) * right + y.reshape(-1, 1) * up).expand(len(values), -1, -1)

    def gauge(depth: Tensor) -> Tensor:
        points = plane + depth.unsqueeze(-1) * towards
        length = points.norm(dim=-1).clamp_min(1e-9)
        return length / _radius(points / length.unsqueeze(-1), values)  # below 1 inside

    # The shapes are convex, so the gauge has one minimum along a ray: golden section finds it.
    ratio = (math.sqrt(5) - 1) / 2
    near, far = (torch.full(plane.shape[:2], depth) for depth in (EXTENT, -EXTENT))
    a, b = near - ratio * (near - far), far + ratio * (near - far)
    at_a, at_b = gauge(a), gauge(b)
    for _ in range(searches):
        lower = at_a < at_b
        near, far = torch.where(lower, b, near), torch.where(lower, far, a)
        probe = torch.where(lower, near - ratio * (near - far), far + ratio * (near - far))
        at_probe = gauge(probe)
        a, b = torch.where(lower, probe, b), torch.where(lower, a, probe)
        at_a, at_b = torch.where(lower, at_probe, at_b), torch.where(lower, at_a, at_probe)
    inner = (near + far) / 2
    hit = gauge(inner) < 1
    outer = torch.full_like(inner, EXTENT)
    for _ in range(bisections):
        middle = (inner + outer) / 2
        is_in = gauge(middle) < 1
        inner, outer = torch.where(is_in, middle, inner), torch.where(is_in, outer, middle)
    normals = _normals(F.normalize(plane + outer.unsqueeze(-1) * towards, dim=-1), values)
    shade = 0.2 + 0.8 * (normals @ F.normalize(torch.tensor(LIGHT), dim=0)).clamp_min(0)
    image = torch.where(hit, shade, 0.0).view(len(values), 1, fine, fine)
    return F.avg_pool2d(image, SUPERSAMPLING).expand(-1, 3, -1, -1)


def sphere_cube_inside(values: Tensor) -> InsideOf:
    """Occupancy of the generated shapes with these values."""

    def inside(index: Tensor, points: Tensor) -> Tensor:
        length = points.norm(dim=-1).clamp_min(1e-9)
        return length < _radius(points / length.unsqueeze(-1), values[index])

    return inside


def cluster_values(size: int) -> Tensor:
    """Interpolation values of two clusters of ten; ``size`` is their width in hundredths, as in file names. (20,)."""
    spread = torch.linspace(-0.5, 0.5, PER_CLUSTER, dtype=torch.float64) * size / 100
    values = torch.cat([centre + spread for centre in CLUSTER_CENTRES])
    return ((values / GRID_STEP).round() * GRID_STEP).float()


def test_values(count: int) -> Tensor:
    """``count`` values evenly over [0, 1] between the points of the training grid. (count,)."""
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (((even / GRID_STEP).floor() + 0.5) * GRID_STEP).float()


def sphere_cube_views(
    images: Tensor, shapes: Tensor, side: int, stored: int, generator: torch.Generator
) -> MemoryViews:
    """Images of some values paired with shapes of others, rank by rank.

    Args:
        images, shapes: (N,) ascending values. side: pixels. stored: points a shape.
    """
    clouds = sphere_cube_clouds(shapes, stored, generator)
    pictures = sphere_cube_images(images, side)
    return MemoryViews(pictures, clouds, no_rotations(len(shapes)), shapes, sphere_cube_inside(shapes))


# ---- sphere to cube, the authors' files ------------------------------------------------------------------------

CUBESPHERE = "cubesphere_1000"


def cubesphere_list(key: str) -> str:
    """File name of a list: ``image-05`` and ``shape-20`` are training sets, ``test`` and ``val`` the others."""
    kind, _, size = key.partition("-")
    return f"cluster_{kind}_aug_2by10_cltsize{size}.json" if size else f"{key}_interp_1000.json"


def _folder(root: Path | None, name: str, what: str) -> Path:
    if root is None:
        raise UserError(f"{what} needs --data DIR that holds {name}")
    for path in (root / name, root):
        if path.is_dir() and path.name == name:
            return path
    raise UserError(f"{what}: no folder {name} in {root}")


def cubesphere_entries(root: Path | None, key: str) -> list[tuple[float, Path, Path]]:
    """(shape value, image, cloud) of every entry of a list, sorted by the shape's value.

    Raises:
        UserError: no such list, an entry lacks a field, or files are missing (the first five are named).
    """
    folder = _folder(root, CUBESPHERE, "the sphere-to-cube study")
    path = folder / cubesphere_list(key)
    rows = read_json(path, "the sphere-to-cube study")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of entries")
    entries, missing = [], []
    for number, row in enumerate(rows):
        lacking = [field for field in ("shapekey_value", "isometric_path", "ptcloud_path") if field not in row]
        if lacking:
            raise UserError(f"{path}: entry {number} has no {lacking[0]}")
        image, near = folder / row["isometric_path"], (folder / row["ptcloud_path"]).parent
        cloud = next((near / name for name in ("pt_30000.npy", "pt_1024.npy") if (near / name).is_file()), None)
        missing += [str(file.relative_to(folder)) for file in (image,) if not file.is_file()]
        if cloud is None:
            missing.append(str((near / "pt_30000.npy").relative_to(folder)))
        else:
            entries.append((float(row["shapekey_value"]), image, cloud))
    if missing:
        raise UserError(f"{path.name}: {len(missing)} files are missing, the first: {', '.join(missing[:5])}")
    return sorted(entries, key=lambda entry: entry[0])


def load_cubesphere(root: Path | None, key: str, side: int) -> MemoryViews:
    """A list of the authors' study. Images keep the channel order blue, green, red in which the authors read them.

    Raises:
        UserError: see ``cubesphere_entries``; an image of another size than ``side``, an unreadable or bad cloud.
    """
    entries = cubesphere_entries(root, key)
    pictures = torch.stack([_read_image(image, side, crop=0).flip(0) for _, image, _ in entries])
    clouds = torch.stack([_read_cloud(cloud) for _, _, cloud in entries])
    order = torch.tensor([value for value, _, _ in entries])
    return MemoryViews(pictures, clouds, no_rotations(len(order)), order)


def _read_cloud(path: Path) -> Tensor:
    """A stored cloud (n, 3+) as (n, 3) float32 in the unit ball."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable npy file ({error})") from error
    if array.ndim != 2 or array.shape[1] < 3 or not len(array):
        raise UserError(f"{path}: shape {array.shape}, expected (points, 3) with at least one point")
    points = torch.from_numpy(np.ascontiguousarray(array[:, :3], dtype=np.float32)).unsqueeze(0)
    check_clouds(points, str(path))
    return unit_sphere(points, str(path))[0]


def _read_image(path: Path, side: int, crop: int) -> Tensor:
    """An image as (3, side, side) in [0, 1]: the middle ``crop`` pixels enlarged to ``side``; 0 takes it as it is."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = opened if opened.mode in ("RGB", "RGBA") else opened.convert("RGB")
            if crop:
                left, top = (round((length - crop) / 2.0) for length in picture.size)
                picture = picture.crop((left, top, left + crop, top + crop))
                picture = picture.resize((side, side), Image.Resampling.BILINEAR)
            array = np.asarray(picture, dtype=np.uint8)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is not a readable image ({error})") from error
    if array.shape[:2] != (side, side):
        raise UserError(f"{path}: {array.shape[1]} x {array.shape[0]} pixels, the encoder expects {side} x {side}")
    return torch.from_numpy(array[:, :, :3].copy()).permute(2, 0, 1).float() / 255


# ---- ShapeNet --------------------------------------------------------------------------------------------------

SHAPENET_CLOUDS, SHAPENET_RENDERINGS = "ShapeNetV1PointCloud", "ShapeNetV1Renderings"
SHAPENET_YAW = "ShapeNetV1RenderingAnglelimit"
SHAPENET_VIEWS = 24
SHAPENET_CLASSES = {
    "airplane": "02691156", "bench": "02828884", "cabinet": "02933112", "car": "02958343", "chair": "03001627",
    "display": "03211117", "lamp": "03636649", "loudspeaker": "03691459", "rifle": "04090263", "sofa": "04256520",
    "table": "04379243", "telephone": "04401088", "vessel": "04530566",
}  # fmt: skip
SHAPENET_COUNTS = {"train": 35021, "test": 8762}
TRAIN_SHARE = 0.8
CROP = 127


@dataclass(frozen=True)
class Rendering:
    """One image of a shape: the files, the camera's ``azimuth`` and ``elevation`` in degrees, the class ``label``."""

    cloud: Path
    image: Path
    azimuth: float
    elevation: float
    label: int


def read_cameras(path: Path, views: int) -> np.ndarray:
    """``rendering_metadata.txt``: azimuth, elevation, roll, distance, field of view, a line a view. (views, 5).

    Raises:
        UserError: no such file, not numbers, or another number of lines.
    """
    try:
        rows = np.loadtxt(path, ndmin=2)
    except OSError as error:
        raise UserError(f"no camera metadata {path}: viewer-centred shapes need it") from error
    except ValueError as error:
        raise UserError(f"{path}: not rows of numbers ({error})") from error
    if rows.shape[0] != views or rows.shape[1] < 4:
        raise UserError(f"{path}: {rows.shape[0]} rows of {rows.shape[1]} numbers, expected {views} rows of 5")
    return rows


def shapenet_renderings(
    root: Path | None, key: str, split: str, classes: Sequence[str] = tuple(SHAPENET_CLASSES)
) -> list[Rendering]:
    """Images of a split, classes and shapes in sorted order; the first 80 % of a class train.

    Args:
        root: holds the three ShapeNet folders. key: ``views-03``: the standard renderings, views 1 to 3 for training
            and view 0 for testing; ``yaw-045``: one image a shape, yaw within 45 degrees. split: "train" or "test".

    Raises:
        UserError: a folder, an image or camera metadata is missing or malformed.
    """
    clouds = _folder(root, SHAPENET_CLOUDS, "ShapeNet")
    kind, _, number = key.partition("-")
    if kind == "yaw":
        pictures = _folder(root, SHAPENET_YAW, "ShapeNet") / f"ShapeNetV1RenderingSampleYaw{number}" / "image"
        inner, rows, views = "easy", 1, [0]
    else:
        pictures = _folder(root, SHAPENET_RENDERINGS, "ShapeNet")
        inner, rows, views = "rendering", SHAPENET_VIEWS, [0] if split == "test" else list(range(1, int(number) + 1))
    found, missing = [], []
    for label, name in enumerate(classes):
        folder = clouds / SHAPENET_CLASSES[name]
        if not folder.is_dir():
            raise UserError(f"ShapeNet: no folder {folder} ({name})")
        files = sorted(folder.iterdir())
        cut = int(len(files) * TRAIN_SHARE)
        for cloud in files[:cut] if split == "train" else files[cut:]:
            place = pictures / SHAPENET_CLASSES[name] / cloud.name.partition(".")[0] / inner
            cameras = read_cameras(place / "rendering_metadata.txt", rows)
            for view in views:
                image = place / f"{view:02d}.png"
                if image.is_file():
                    found.append(Rendering(cloud, image, float(cameras[view, 0]), float(cameras[view, 1]), label))
                else:
                    missing.append(str(image))
    if missing:
        raise UserError(f"ShapeNet: {len(missing)} images are missing, the first: {', '.join(missing[:5])}")
    if not found:
        raise UserError(f"ShapeNet: no {split} shape in {clouds}")
    return found


class ShapeNetViews:
    """``Views`` of ShapeNet, read from the disk when asked for.

    Args:
        renderings: from ``shapenet_renderings``. rotations: (N, 3, 3) of their cameras. side: pixels handed out.
        crop: middle part of an image that is used; 0: all of it.
    """

    inside: InsideOf | None = None

    def __init__(self, renderings: Sequence[Rendering], rotations: Tensor, side: int, crop: int) -> None:
        self.renderings, self.rotations, self.side, self.crop = list(renderings), rotations, side, crop
        self.order = torch.tensor([item.label for item in self.renderings])

    def __len__(self) -> int:
        return len(self.renderings)

    def images(self, index: Tensor) -> Tensor:
        """See ``Views``."""
        paths = [self.renderings[i].image for i in index.tolist()]
        with ThreadPoolExecutor(IMAGE_READERS) as pool:
            return torch.stack(list(pool.map(lambda path: _read_image(path, self.side, self.crop), paths)))

    def clouds(self, index: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """See ``Views``; drawn with replacement, as the authors do."""
        paths = [self.renderings[i].cloud for i in index.tolist()]
        with ThreadPoolExecutor(IMAGE_READERS) as pool:
            stored = list(pool.map(_read_cloud, paths))
        return torch.cat([draw_points(cloud.unsqueeze(0), count, generator, replace=True) for cloud in stored])


# ---- ModelNet10 voxels -----------------------------------------------------------------------------------------

VOXELS = "modelnet10_voxels32_packed.npz"
MODELNET_CLASSES = ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")


@dataclass(frozen=True)
class Shapes:
    """Occupancy ``grids`` (N, R, R, R) bool, y up, and ``clouds`` (N, n, 3) of their surfaces in the unit ball.

    A point p of the unit ball lies in cell ``round(p * scale + centre)`` of its grid. ``labels`` (N,), ``centre``
    (N, 1, 3), ``scale`` (N, 1, 1).
    """

    grids: Tensor
    clouds: Tensor
    labels: Tensor
    centre: Tensor
    scale: Tensor

    def inside(self, shapes: Tensor, points: Tensor) -> Tensor:
        """Whether points (B, n, 3) of the unit ball lie in occupied cells of these shapes (B,). (B, n)."""
        size = self.grids.shape[-1]
        cell = (points * self.scale[shapes] + self.centre[shapes]).round().long()
        within = ((cell >= 0) & (cell < size)).all(-1)
        i, j, k = cell.clamp(0, size - 1).unbind(-1)
        return within & self.grids[shapes.unsqueeze(1), i, j, k]


def read_modelnet(root: Path | None) -> dict[str, Voxels]:
    """All grids and labels of both splits.

    Raises:
        UserError: missing or malformed, or a label that is no class.
    """
    if root is None:
        raise UserError(f"ModelNet10 needs --data DIR that holds {VOXELS}")
    found = read_packed_voxels(root / VOXELS)
    for split, voxels in found.items():
        wrong = (voxels.labels < 0) | (voxels.labels >= len(MODELNET_CLASSES))
        if wrong.any():
            raise UserError(f"{root / VOXELS}: y_{split}[{int(wrong.nonzero()[0])}] is no class of 0..9")
    return found


def load_modelnet(
    root: Path | None, split: str, classes: Sequence[str], count: int, stored: int, generator: torch.Generator
) -> Shapes:
    """Shapes of some classes of ModelNet10.

    Args:
        root: folder of the npz. split: "train" or "test". count: at most so many, drawn at random. stored: points.

    Raises:
        UserError: missing or malformed.
    """
    voxels = read_modelnet(root)[split]
    wanted = torch.tensor([MODELNET_CLASSES.index(name) for name in classes])
    chosen = torch.isin(voxels.labels, wanted).nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:count]]
    chosen = chosen[voxels.labels[chosen].argsort(stable=True)]
    grids = voxels.grids[chosen].permute(0, 1, 3, 2).flip(3).contiguous()  # z up to y up: a turn about x
    cells = sample_voxels(grids, stored, generator)
    centre = cells.mean(1, keepdim=True)
    scale = (cells - centre).norm(dim=-1, keepdim=True).amax(1, keepdim=True)
    return Shapes(grids, (cells - centre) / scale, voxels.labels[chosen], centre, scale)


def depth_images(points: Tensor, side: int) -> Tensor:
    """Orthographic depth of clouds in the camera's frame: near is bright, the background black.

    Args:
        points: (N, n, 3) in the unit ball; x right, y up, z towards the camera. side: pixels.

    Returns:
        (N, 3, side, side) in [0, 1], the three channels equal.
    """
    pixel = ((points + 1) / 2 * side).long().clamp_(0, side - 1)
    flat = (side - 1 - pixel[..., 1]) * side + pixel[..., 0]
    depth = (points[..., 2] + 1.5) / 2.5
    image = torch.zeros(len(points), side * side).scatter_reduce(1, flat, depth, "amax")
    return image.view(-1, 1, side, side).expand(-1, 3, -1, -1)


# ---- the 2-D demo ----------------------------------------------------------------------------------------------

DEMO_SPREADS = tuple(range(1, 9))
DEMO_CLUSTERS = tuple(range(2, 102, 2))
DEMO_SCORES = "inertia_dic_max100_min2_step2.npy"


def generate_blobs(spread: int, count: int = 200, seed: int = 2) -> np.ndarray:
    """Eight Gaussian blobs as the authors' generator draws them: equal to their files to the last digit. (count, 2)."""
    from sklearn.datasets import make_blobs

    random = np.random.RandomState(seed)
    xs, ys = random.randint(-25, 25, 8), random.randint(-25, 25, 8)
    centres = np.stack([xs, ys], 1)
    points, _ = make_blobs(count, centers=centres, cluster_std=[float(spread)] * 8, random_state=seed)
    return np.asarray(points)


def load_blobs(root: Path | None, spread: int) -> np.ndarray:
    """The authors' file of one spread. (200, 2).

    Raises:
        UserError: missing or malformed.
    """
    if root is None:
        raise UserError("the 2-D demo needs --data DIR with dim2_ncls8_side25_nsample200_seed2_std*.npz")
    path = root / f"dim2_ncls8_side25_nsample200_seed2_std{spread}.npz"
    points = read_npz(path, ("data",))["data"]
    if points.ndim != 2 or not np.isfinite(points).all():
        raise UserError(f"{path}: data of shape {points.shape}, expected finite points (200, 2)")
    return np.asarray(points, dtype=np.float64)


def load_demo_scores(root: Path) -> dict[int, list[float]]:
    """The authors' scores: spread -> one for each number of clusters of ``DEMO_CLUSTERS``.

    Raises:
        UserError: missing, malformed, or of another length.
    """
    path = root / DEMO_SCORES
    table = _object_npy(path)
    if not isinstance(table, dict) or any(len(table.get(spread, ())) != len(DEMO_CLUSTERS) for spread in DEMO_SPREADS):
        raise UserError(f"{path}: expected {len(DEMO_CLUSTERS)} scores for each spread of {DEMO_SPREADS}")
    return {int(spread): [float(value) for value in values] for spread, values in table.items()}


def _object_npy(path: Path) -> Any:
    """The one pickled object of an npy file, read under an allow list."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            _, _, kind = np.lib.format.read_array_header_1_0(file)
            found = restricted_load(file) if kind.hasobject else None
    except FileNotFoundError as error:
        raise UserError(f"no file {path}, expected the authors' scores") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable npy file ({error})") from error
    return found.item() if isinstance(found, np.ndarray) else found
