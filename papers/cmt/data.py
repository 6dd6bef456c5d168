"""nuScenes in its official layout with the paper's augmentations, and generated scenes that need both sensors.

Boxes are (x, y, z, d0, d1, d2, yaw, vx, vy) as in model.py, points (N, 5) x, y, z, intensity, seconds, images
(V, 3, H, W) blue-green-red in 0..255 until ``normalise``. Every random number comes from the generator handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json
from shared.unpickle import restricted_load

CLASSES = (
    *("car", "truck", "construction_vehicle", "bus", "trailer"),
    *("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone"),
)
"""nuScenes classes in the authors' order."""
CAMERAS = tuple(f"CAM_{place}" for place in ("FRONT", "FRONT_RIGHT", "FRONT_LEFT", "BACK", "BACK_LEFT", "BACK_RIGHT"))
FRAMES = {"train": 28_130, "val": 6_019}
"""Key frames of the two splits."""
SWEEPS = 10
"""Earlier sweeps that are added to a key frame's."""
SAMPLED = dict(zip(CLASSES, (2, 3, 7, 4, 6, 2, 6, 6, 2, 2), strict=True))
"""Objects of each class up to which ground-truth sampling fills a frame."""
LEAST_POINTS = 5
"""Points that a sampled object has at least."""
MIX = 0.5
"""Share of the pasted patch in ground-truth sampling on images."""


# ---- nuScenes: info files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A camera of a frame: its image, (3, 3) intrinsics and (4, 4) transformation from LiDAR to camera."""

    name: str
    path: Path
    intrinsics: np.ndarray
    lidar2cam: np.ndarray


@dataclass(frozen=True)
class Sweep:
    """An earlier LiDAR sweep: a point p of it lies at ``rotation @ p + translation``, ``seconds`` ago."""

    path: Path
    rotation: np.ndarray
    translation: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Frame:
    """A key frame.

    Attributes:
        token: its name. lidar: file of the sweep. sweeps, views: other sweeps, cameras.
        boxes, labels: (n, 9) and (n,); the label is -1 for what is no class of the detection task.
        points: (n,) LiDAR points in each box, as annotated. visible: (n,) whether any sensor saw the box.
        vehicle: (2,) the vehicle's place in the LiDAR frame, from which ranges of the evaluation count.
    """

    token: str
    lidar: Path
    sweeps: tuple[Sweep, ...]
    views: tuple[View, ...]
    boxes: np.ndarray
    labels: np.ndarray
    points: np.ndarray
    visible: np.ndarray
    vehicle: np.ndarray


def _file(root: Path, name: str, sensor: str) -> Path:
    """Where a file of the data set lies, whatever folder the converter put in front of its name."""
    parts = Path(name).parts
    for start in ("samples", "sweeps"):
        if start in parts:
            return root.joinpath(*parts[parts.index(start) :])
    for folder in (root / "samples" / sensor, root / "sweeps" / sensor):
        if (folder / parts[-1]).is_file():
            return folder / parts[-1]
    return root / parts[-1]


def _need(record: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    lacking = [key for key in keys if key not in record]
    if lacking:
        raise UserError(f"{where}: the record lacks {', '.join(lacking)}; found {', '.join(sorted(record))[:200]}")


def _matrix(record: Mapping[str, Any], key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """A numeric entry of a record as float64, of the given shape."""
    _need(record, (key,), where)
    try:
        found = np.asarray(record[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {key} is not numeric, expected shape {shape}") from error
    if found.shape != shape or not np.isfinite(found).all():
        raise UserError(f"{where}: {key} has shape {found.shape}, expected {shape} and finite numbers")
    return found


def _labels(names: Sequence[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(CLASSES)}
    return np.array([index.get(name, -1) for name in names], dtype=np.int64)


def _old_frame(record: Mapping[str, Any], root: Path, where: str) -> Frame:
    """A record of mmdet3d before 1.1."""
    _need(record, ("token", "lidar_path", "sweeps", "cams", "timestamp"), where)
    views = []
    for name, camera in record["cams"].items():
        here = f"{where}, sample {record['token']}, {name}"
        _need(camera, ("data_path",), here)
        lidar2cam = np.eye(4)
        lidar2cam[:3, :3] = _matrix(camera, "sensor2lidar_rotation", (3, 3), here).T  # the inverse of a rotation
        lidar2cam[:3, 3] = -lidar2cam[:3, :3] @ _matrix(camera, "sensor2lidar_translation", (3,), here)
        intrinsics = _matrix(camera, "cam_intrinsic", (3, 3), here)
        views.append(View(name, _file(root, camera["data_path"], name), intrinsics, lidar2cam))
    sweeps = []
    for i, sweep in enumerate(record["sweeps"]):
        here = f"{where}, sample {record['token']}, sweep {i}"
        _need(sweep, ("data_path", "timestamp"), here)
        turn = _matrix(sweep, "sensor2lidar_rotation", (3, 3), here)
        shift = _matrix(sweep, "sensor2lidar_translation", (3,), here)
        seconds = (record["timestamp"] - sweep["timestamp"]) / 1e6
        sweeps.append(Sweep(_file(root, sweep["data_path"], "LIDAR_TOP"), turn, shift, seconds))
    boxes = np.asarray(record.get("gt_boxes", np.zeros((0, 7))), dtype=np.float64).reshape(-1, 7)
    velocity = np.asarray(record.get("gt_velocity", np.zeros((len(boxes), 2)))).reshape(-1, 2)
    count = np.asarray(record.get("num_lidar_pts", np.ones(len(boxes))))
    seen = count + np.asarray(record.get("num_radar_pts", np.zeros(len(boxes))))
    vehicle = np.zeros(2)
    if "lidar2ego_translation" in record and "lidar2ego_rotation" in record:
        w, x, y, z = record["lidar2ego_rotation"]
        shift = np.asarray(record["lidar2ego_translation"])
        # the vehicle's origin in the LiDAR frame: -R^T t, its x and y
        rows = [
            [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
            [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
        ]
        vehicle = -np.array(rows) @ shift
    return Frame(
        record["token"], _file(root, record["lidar_path"], "LIDAR_TOP"), tuple(sweeps), tuple(views),
        np.concatenate([boxes, np.nan_to_num(velocity)], 1), _labels(list(record.get("gt_names", []))),
        count, seen > 0, vehicle,
    )  # fmt: skip


def _new_frame(record: Mapping[str, Any], root: Path, names: Mapping[int, str], where: str) -> Frame:
    """A record of mmdet3d 1.1 and later."""
    _need(record, ("token", "timestamp", "lidar_points", "images", "instances"), where)
    views = []
    for name, image in record["images"].items():
        here = f"{where}, sample {record['token']}, {name}"
        _need(image, ("img_path",), here)
        intrinsics, lidar2cam = _matrix(image, "cam2img", (3, 3), here), _matrix(image, "lidar2cam", (4, 4), here)
        views.append(View(name, _file(root, image["img_path"], name), intrinsics, lidar2cam))
    sweeps = []
    for i, sweep in enumerate(record.get("lidar_sweeps", [])):
        here = f"{where}, sample {record['token']}, sweep {i}"
        _need(sweep, ("lidar_points", "timestamp"), here)
        _need(sweep["lidar_points"], ("lidar_path",), here)
        back = _matrix(sweep["lidar_points"], "lidar2sensor", (4, 4), here)  # p @ R - t, as mmdet3d reads it
        path = _file(root, sweep["lidar_points"]["lidar_path"], "LIDAR_TOP")
        sweeps.append(Sweep(path, back[:3, :3].T, -back[:3, 3], record["timestamp"] - sweep["timestamp"]))
    rows = record["instances"]
    for i, row in enumerate(rows):
        _need(row, ("bbox_3d", "bbox_label_3d"), f"{where}, sample {record['token']}, instance {i}")
    _need(record["lidar_points"], ("lidar_path",), f"{where}, sample {record['token']}")
    boxes = np.array([row["bbox_3d"] for row in rows], dtype=np.float64).reshape(-1, 7)
    velocity = np.array([row.get("velocity", (0, 0)) for row in rows], dtype=np.float64).reshape(-1, 2)
    count = np.array([row.get("num_lidar_pts", 1) for row in rows])
    seen = count + np.array([row.get("num_radar_pts", 0) for row in rows])
    lidar2ego = np.asarray(record["lidar_points"].get("lidar2ego", np.eye(4)))
    return Frame(
        record["token"], _file(root, record["lidar_points"]["lidar_path"], "LIDAR_TOP"), tuple(sweeps), tuple(views),
        np.concatenate([boxes, np.nan_to_num(velocity)], 1),
        _labels([names.get(int(row["bbox_label_3d"]), "") for row in rows]),
        count, seen > 0, np.linalg.inv(lidar2ego)[:2, 3],
    )  # fmt: skip


def read_infos(path: Path) -> list[Frame]:
    """Read an info file of either generation of mmdet3d's converter; files lie below its folder.

    Raises:
        UserError: no such file, another pickle, keys that are missing (named), a camera that is missing or unknown, or
            a box of no length.
    """
    content = restricted_load(path)
    if not isinstance(content, dict) or not ({"infos", "data_list"} & set(content)):
        got = ", ".join(sorted(map(str, content)))[:120] if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected an info file with 'infos' (mmdet3d < 1.1) or 'data_list' (later), got {got}")
    root = path.parent
    if "infos" in content:
        frames = [_old_frame(record, root, f"{path}, record {i}") for i, record in enumerate(content["infos"])]
    else:
        names = {number: name for name, number in content.get("metainfo", {}).get("categories", {}).items()}
        if not names:
            raise UserError(f"{path}: no metainfo/categories, so the numbers of its classes cannot be read")
        frames = [_new_frame(r, root, names, f"{path}, record {i}") for i, r in enumerate(content["data_list"])]
    for frame in frames:
        missing = sorted(set(CAMERAS) ^ {view.name for view in frame.views})
        if missing:
            raise UserError(f"{path}: sample {frame.token}: {missing[0]} is missing or unknown, expected six cameras")
        flat = (frame.boxes[:, 3:6] <= 0).any(1)
        if flat.any():
            raise UserError(f"{path}: sample {frame.token}: box {int(flat.argmax())} has a length that is not positive")
    return [replace(frame, views=tuple(sorted(frame.views, key=lambda v: CAMERAS.index(v.name)))) for frame in frames]


def locate(folder: Path | None, split: str) -> Path:
    """The info file of a split below ``folder``; a folder with a single pickle serves every split.

    Raises:
        UserError: none is there.
    """
    if folder is None:
        raise UserError("nuScenes needs --data DIR; see Data in README.md")
    for root in (folder, folder / "nuscenes"):
        path = root / f"nuscenes_infos_{split}.pkl"
        if path.is_file():
            return path
    single = sorted(folder.glob("*.pkl"))
    if len(single) == 1:
        return single[0]
    raise UserError(f"{folder}: no nuscenes_infos_{split}.pkl, expected it there or in {folder / 'nuscenes'}")


ATTRIBUTES = (
    *("vehicle.moving", "vehicle.parked", "vehicle.stopped", "cycle.with_rider", "cycle.without_rider"),
    *("pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down"),
)
_AT_REST = ("vehicle.parked", "vehicle.parked", "vehicle.parked", "vehicle.stopped", "vehicle.parked")
_AT_REST += ("", "cycle.without_rider", "cycle.without_rider", "pedestrian.standing", "")
_MOVING = (*("vehicle.moving",) * 5, "", "cycle.with_rider", "cycle.with_rider", "pedestrian.moving", "")


def default_attributes(labels: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Attributes by class and by whether a box is faster than 0.2 m/s, as MMDetection3D has them; (n,), -1 for none."""
    index = {name: i for i, name in enumerate(ATTRIBUTES)} | {"": -1}
    table = np.array([[index[name] for name in row] for row in (_AT_REST, _MOVING)])
    return table[(np.linalg.norm(velocity, axis=1) > 0.2).astype(int), labels]


def read_attributes(folder: Path, frames: Sequence[Frame]) -> list[np.ndarray] | None:
    """Attributes of all frames' boxes from the tables v1.0-*, which info files leave out; ``None`` without tables.

    Raises:
        UserError: tables of another version than the info file.
    """
    tables = sorted(path.parent for path in folder.glob("v1.0-*/sample_annotation.json"))
    if not tables:
        return None
    names = {row["token"]: row["name"] for row in read_json(tables[-1] / "attribute.json", "attributes")}
    found: dict[str, list[int]] = {frame.token: [] for frame in frames}
    for row in read_json(tables[-1] / "sample_annotation.json", "annotations"):
        if row["sample_token"] in found:
            attribute = names[row["attribute_tokens"][0]] if row["attribute_tokens"] else ""
            found[row["sample_token"]].append(ATTRIBUTES.index(attribute) if attribute in ATTRIBUTES else -1)
    for frame in frames:
        if len(found[frame.token]) != len(frame.boxes):
            counts = f"{len(found[frame.token])} annotations of sample {frame.token}, its info has {len(frame.boxes)}"
            raise UserError(f"{tables[-1]}: {counts}; expected tables of the same version")
    return [np.array(found[frame.token], dtype=np.int64) for frame in frames]


def check_nuscenes(folder: Path | None, splits: Sequence[str], sampling: bool) -> list[str]:
    """What is there, in words; every file of the first and last frame of each split is looked for."""
    lines = []
    for split in splits:
        path = locate(folder, split)
        frames = read_infos(path)
        verdict = "as expected" if len(frames) == FRAMES[split] else f"the full split has {FRAMES[split]}"
        boxes = np.concatenate([frame.labels for frame in frames]) if frames else np.zeros(0, dtype=int)
        unknown = int((boxes < 0).sum())
        lines.append(f"{split}: {len(frames)} frames ({verdict}), {len(boxes)} boxes, {unknown} of no class, in {path}")
        for frame in {id(f): f for f in (frames[:1] + frames[-1:])}.values():
            files = [frame.lidar, *(v.path for v in frame.views), *(s.path for s in frame.sweeps[:SWEEPS])]
            lost = [file for file in files if not file.is_file()]
            if lost:
                raise UserError(f"{path}: sample {frame.token} names {lost[0]}, and {len(lost) - 1} more, not there")
            lines.append(f"{split}: sample {frame.token}: {len(frame.views)} images, {len(files) - 6} sweeps found")
    if sampling:
        path = locate(folder, splits[0]).parent / "nuscenes_dbinfos_train.pkl"
        if path.is_file():
            objects = {name: len(rows) for name, rows in ObjectBank(path).rows.items()}
            lines.append(f"objects to sample: {', '.join(f'{name} {count}' for name, count in objects.items())}")
        else:
            lines.append(f"objects to sample: no {path}, training goes without them")
    return lines


# ---- nuScenes: files -----------------------------------------------------------------------------------------------


def read_points(path: Path, columns: int = 5) -> Tensor:
    """Points of a .bin file: (N, columns) float32.

    Raises:
        UserError: no file, or a length that is no multiple of ``columns`` floats.
    """
    try:
        values = np.fromfile(path, dtype=np.float32)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected a LiDAR sweep") from error
    if len(values) == 0 or len(values) % columns or path.stat().st_size % 4:
        raise UserError(f"{path}: {path.stat().st_size} bytes, expected points of {columns} float32 numbers each")
    return torch.from_numpy(values).view(-1, columns)


def read_image(path: Path, whose: str = "") -> Tensor:
    """An image as (3, H, W) float32, blue-green-red, 0..255.

    Args:
        path: its file. whose: what the error says it belongs to.

    Raises:
        UserError: missing or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; expected a camera image {whose}".rstrip()) from error
    return torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1).float()


def read_cloud(frame: Frame, generator: torch.Generator | None = None) -> Tensor:
    """Points of a frame and its earlier sweeps, with the seconds since in the last column: (N, 5).

    Args:
        generator: chooses among more than ten sweeps; ``None`` takes the nearest.
    """
    own = read_points(frame.lidar).clone()
    own[:, 4] = 0
    clouds, sweeps = [own], frame.sweeps
    if len(sweeps) > SWEEPS:
        order = torch.arange(SWEEPS) if generator is None else torch.randperm(len(sweeps), generator=generator)
        sweeps = [sweeps[i] for i in order[:SWEEPS]]
    for sweep in sweeps:
        cloud = read_points(sweep.path).clone()
        turn, shift = (torch.from_numpy(np.asarray(part)).float() for part in (sweep.rotation, sweep.translation))
        cloud[:, :3] = cloud[:, :3] @ turn.T + shift
        cloud[:, 4] = sweep.seconds
        clouds.append(cloud)
    return torch.cat(clouds)


# ---- a sample and its augmentations --------------------------------------------------------------------------------


@dataclass
class Sample:
    """One frame in memory: images (V, 3, H, W), points (N, 5), intrinsics (V, 3, 3) and lidar2cam (V, 4, 4) float64,
    boxes (n, 9), labels (n,)."""

    images: Tensor
    points: Tensor
    intrinsics: Tensor
    lidar2cam: Tensor
    boxes: Tensor
    labels: Tensor

    @property
    def lidar2img(self) -> Tensor:
        """(V, 4, 4): pad4(K) @ lidar2cam."""
        padded = F.pad(self.intrinsics, (0, 1, 0, 1))
        padded[:, 3, 3] = 1
        return padded @ self.lidar2cam


def global_transform(rotation: float, scale: float, shift: Sequence[float], flips: tuple[bool, bool]) -> Tensor:
    """Rotation about z, scaling, translation, then flips of y and of x, as one (4, 4) float64 matrix."""
    out = torch.eye(4, dtype=torch.float64)
    c, s = math.cos(rotation), math.sin(rotation)
    out[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    out[:3, :3] *= scale
    out[:3, 3] = torch.tensor(shift, dtype=torch.float64)
    return torch.diag(torch.tensor([-1.0 if flips[1] else 1.0, -1.0 if flips[0] else 1.0, 1.0, 1.0]).double()) @ out


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Boxes (n, 9) under a similarity that keeps z upright; headings and velocities turn and flip along."""
    matrix = matrix.to(boxes)
    linear = matrix[:3, :3]
    centre = boxes[:, :3] @ linear.T + matrix[:3, 3]
    size = boxes[:, 3:6] * linear.det().abs() ** (1 / 3)
    heading = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], 1) @ linear[:2, :2].T
    yaw = torch.atan2(heading[:, 1], heading[:, 0]).unsqueeze(1)
    return torch.cat([centre, size, yaw, boxes[:, 7:] @ linear[:2, :2].T], 1)


def transform(sample: Sample, matrix: Tensor) -> None:
    """Apply a global transformation to points and boxes, and its inverse to the cameras, so that pixels stay."""
    sample.points[:, :3] = sample.points[:, :3] @ matrix[:3, :3].T.float() + matrix[:3, 3].float()
    sample.boxes = transform_boxes(sample.boxes, matrix)
    sample.lidar2cam = sample.lidar2cam @ matrix.inverse()


class Jitter(NamedTuple):
    """Ranges of the global augmentation: radians, factor, metres, probability of each flip."""

    rotation: float
    scale: float
    shift: float
    flip: float


JITTER = {
    "fusion": Jitter(0.785, 0.1, 0.5, 0.5),
    "lidar": Jitter(0.785, 0.1, 0.5, 0.5),
    "camera": Jitter(0.3925, 0.05, 0.0, 0.0),
}
"""The authors' augmentation by modality."""


def draw_transform(jitter: Jitter, generator: torch.Generator) -> Tensor:
    """A random global transformation."""
    turn, scale = (2 * torch.rand(2, generator=generator) - 1).tolist()
    shift = (jitter.shift * torch.randn(3, generator=generator)).tolist()
    flips = (torch.rand(2, generator=generator) < jitter.flip).tolist()
    return global_transform(jitter.rotation * turn, 1 + jitter.scale * scale, shift, tuple(flips))


def keep_in_range(sample: Sample, pc_range: Sequence[float]) -> None:
    """Drop points outside of the range, boxes whose centre is beside it, and boxes of no class."""
    low, high = torch.tensor(pc_range[:3]), torch.tensor(pc_range[3:])
    points = sample.points[:, :3]
    sample.points = sample.points[((points > low) & (points < high)).all(1)]
    centre = sample.boxes[:, :2]
    keep = ((centre > low[:2]) & (centre < high[:2])).all(1) & (sample.labels >= 0)
    sample.boxes, sample.labels = sample.boxes[keep], sample.labels[keep]


def resize_crop_flip(
    sample: Sample, size: tuple[int, int], zoom: tuple[float, float], generator: torch.Generator | None
) -> None:
    """Resize all images, cut them to ``size`` (the bottom is kept) and flip them, intrinsics along.

    Args:
        size: height and width. zoom: range of the factor beside the one that fits.
        generator: ``None``: no zoom, cut from the middle, no flip.
    """
    height, width = size
    h, w = sample.images.shape[-2:]
    fit = max(height / h, width / w)
    u = torch.rand(3, generator=generator).tolist() if generator is not None else [0.5, 0.5, 1.0]
    scale = fit if generator is None else fit * (zoom[0] + (zoom[1] - zoom[0]) * u[0])
    new_h, new_w = int(h * scale), int(w * scale)
    images = sample.images
    if (new_h, new_w) != (h, w):
        images = F.interpolate(images, (new_h, new_w), mode="bilinear", align_corners=False)
    top, left = new_h - height, int(u[1] * max(0, new_w - width))
    images = F.pad(images, (0, max(0, width - new_w), max(0, -top), 0))
    images = images[..., max(top, 0) :, left : left + width]
    change = torch.eye(3, dtype=torch.float64)
    change[0, 0] = change[1, 1] = scale
    change[0, 2], change[1, 2] = -left, -top
    if u[2] < 0.5:
        images = images.flip(-1)
        change = torch.tensor([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]], dtype=torch.float64) @ change
    sample.images, sample.intrinsics = images, change @ sample.intrinsics


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], multiple: int = 32) -> Tensor:
    """Subtract and divide by channel, then pad with zeros at the right and the bottom to a multiple."""
    images = (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


# ---- ground-truth sampling -----------------------------------------------------------------------------------------


def corners(boxes: Tensor) -> Tensor:
    """(n, 9) -> (n, 8, 3)."""
    signs = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3).to(boxes)
    local = signs * boxes[:, None, 3:6]
    c, s = boxes[:, 6].cos().unsqueeze(1), boxes[:, 6].sin().unsqueeze(1)
    x, y, z = local.unbind(-1)
    return torch.stack([c * x - s * y, s * x + c * y, z], -1) + boxes[:, None, :3]


def overlapping(boxes: Tensor) -> Tensor:
    """Whether boxes overlap on the ground: (n, n), by separating axes."""
    points = corners(boxes)[:, ::2, :2]
    axes = torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin(), -boxes[:, 6].sin(), boxes[:, 6].cos()], 1).view(-1, 2, 2)
    along = torch.einsum("nad,mkd->namk", axes, points)  # box m's corners on box n's axes
    low, high = along.amin(-1), along.amax(-1)
    n = torch.arange(len(boxes))
    own_low, own_high = low[n, :, n].unsqueeze(-1), high[n, :, n].unsqueeze(-1)
    apart = ((low > own_high) | (high < own_low)).any(1)
    return ~(apart | apart.T)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """(N, 3) and (n, 9) -> (N, n) bool."""
    offset = points[:, None, :3] - boxes[:, :3]
    c, s = boxes[:, 6].cos(), boxes[:, 6].sin()
    x, y, z = offset.unbind(-1)
    local = torch.stack([c * x + s * y, c * y - s * x, z], -1)
    return (local.abs() <= boxes[:, 3:6] / 2).all(-1)


class ObjectBank:
    """Objects cut out of training frames (``nuscenes_dbinfos_train.pkl``): points and, for fusion, image patches.

    Raises:
        UserError: not the converter's file.
    """

    def __init__(self, path: Path) -> None:
        content = restricted_load(path)
        if not isinstance(content, dict) or not set(CLASSES) <= set(content):
            raise UserError(f"{path}: expected a list of objects for each of {', '.join(CLASSES)}")
        self.root, self.rows = path.parent, {}
        for name in CLASSES:
            rows = content[name]
            if rows:
                _need(rows[0], ("path", "box3d_lidar", "num_points_in_gt", "difficulty"), f"{path}, {name}")
            usable = [r for r in rows if r["num_points_in_gt"] >= LEAST_POINTS and r["difficulty"] != -1]
            self.rows[name] = usable

    def box(self, row: Mapping[str, Any]) -> Tensor:
        """(9,) of an entry, whose own centre is that of the bottom."""
        box = torch.zeros(9)
        values = torch.as_tensor(np.asarray(row["box3d_lidar"], dtype=np.float32))
        box[: len(values)] = values
        box[2] += box[5] / 2
        return box.nan_to_num()

    def draw(self, boxes: Tensor, labels: Tensor, generator: torch.Generator) -> list[Mapping[str, Any]]:
        """Objects that fill a frame up to ``SAMPLED`` of each class without touching another box."""
        chosen: list[Mapping[str, Any]] = []
        placed = boxes
        for label, (name, most) in enumerate(SAMPLED.items()):
            rows, wanted = self.rows[name], most - int((labels == label).sum())
            if wanted <= 0 or not rows:
                continue
            order = torch.randperm(len(rows), generator=generator)[:wanted].tolist()
            together = torch.cat([placed, torch.stack([self.box(rows[i]) for i in order])])
            collides = overlapping(together)
            collides.fill_diagonal_(False)
            for position, i in enumerate(order, start=len(placed)):
                if collides[position].any():  # its place is free for those after it
                    collides[position], collides[:, position] = False, False
                else:
                    chosen.append({**rows[i], "label": label})
                    placed = torch.cat([placed, together[position : position + 1]])
        return chosen


def paste_objects(sample: Sample, bank: ObjectBank, generator: torch.Generator) -> None:
    """Ground-truth sampling: add objects' points, and their patches to the images they project into, far to near."""
    rows = bank.draw(sample.boxes, sample.labels, generator)
    if not rows:
        return
    boxes = torch.stack([bank.box(row) for row in rows])
    clouds = []
    for row in rows:
        cloud = read_points(bank.root / row["path"]).clone()
        cloud[:, :3] += torch.as_tensor(np.asarray(row["box3d_lidar"][:3], dtype=np.float32))
        clouds.append(cloud)
    outside = ~points_in_boxes(sample.points, boxes).any(1)
    sample.points = torch.cat([sample.points[outside], *clouds])
    count = len(sample.boxes)
    sample.boxes = torch.cat([sample.boxes, boxes])
    sample.labels = torch.cat([sample.labels, torch.tensor([row["label"] for row in rows])])
    if len(sample.images) and all("image_path" in row for row in rows):
        patches = [read_image(bank.root / row["image_path"]) if row["image_path"] else None for row in rows]
        for image, projection in zip(sample.images, sample.lidar2img):
            paste_patches(image, projection, sample.boxes, patches, count)


def paste_patches(
    image: Tensor, projection: Tensor, boxes: Tensor, patches: Sequence[Tensor | None], count: int
) -> None:
    """Mix patches into one image (3, H, W), in place. Real boxes get their own pixels back where they are nearer.

    Args:
        boxes: (n, 9), the first ``count`` real, the others those of ``patches``.
    """
    height, width = image.shape[-2:]
    projected = F.pad(corners(boxes).double(), (0, 1), value=1.0) @ projection.T
    depth = projected[..., 2]
    pixels = projected[..., :2] / depth.unsqueeze(-1)
    limit = torch.tensor([width - 1, height - 1])
    low, high = (torch.minimum(v.trunc().long().clamp(min=0), limit) for v in (pixels.amin(1), pixels.amax(1)))
    usable = (depth > 0).all(1) & (high - low > 1).all(1)
    order = depth.mean(1).argsort(descending=True)
    order = order[usable[order]].tolist()
    windows = {i: (slice(None), slice(*map(int, (low[i, 1], high[i, 1]))), slice(*map(int, (low[i, 0], high[i, 0]))))
               for i in order}  # fmt: skip
    own = {i: image[windows[i]].clone() for i in order if i < count}
    for i in order:
        patch = own.get(i) if i < count else patches[i - count]
        if patch is None:
            continue
        window = image[windows[i]]
        if patch.shape != window.shape:
            patch = F.interpolate(patch[None], window.shape[1:], mode="bilinear", align_corners=False)[0]
        image[windows[i]] = (1 - MIX) * window + MIX * patch


def class_balanced(labels: Sequence[np.ndarray], classes: int, generator: torch.Generator) -> Tensor:
    """CBGS: positions of frames, drawn so that every class gets the same number of frames that show it.

    Args:
        labels: those of each frame.
    """
    holding = [
        torch.tensor([i for i, found in enumerate(labels) if (found == label).any()], dtype=torch.long)
        for label in range(classes)
    ]
    present = [frames for frames in holding if len(frames)]
    if not present:
        raise UserError("class-balanced sampling: no frame has a box of any class")
    each = sum(map(len, present)) // classes
    return torch.cat([rows[torch.randint(len(rows), (max(each, 1),), generator=generator)] for rows in present])


class NuScenes:
    """Frames of a split, read when asked for.

    Args:
        path: info file. modality: fusion, lidar or camera. pc_range, size: LiDAR range, height and width of images.
        zoom: range of the images' zoom in training. bank: objects to paste in training.
    """

    classes = CLASSES

    def __init__(
        self,
        path: Path,
        modality: str,
        pc_range: Sequence[float],
        size: tuple[int, int],
        zoom: tuple[float, float] = (0.94, 1.25),
        bank: ObjectBank | None = None,
    ) -> None:
        self.frames = read_infos(path)
        self.modality, self.pc_range, self.size, self.zoom, self.bank = modality, pc_range, size, zoom, bank

    def __len__(self) -> int:
        return len(self.frames)

    def truth(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (n, 9) and labels (n,) with which a frame is judged: of a class, seen by LiDAR or radar."""
        frame = self.frames[index]
        keep = (frame.labels >= 0) & frame.visible
        return torch.from_numpy(frame.boxes[keep]).float(), torch.from_numpy(frame.labels[keep])

    def raw(self, index: int, generator: torch.Generator | None = None) -> Sample:
        """A frame as it lies on the disk; boxes with LiDAR points only."""
        frame = self.frames[index]
        images = []
        if self.modality != "lidar":
            images = [read_image(view.path, f"of sample {frame.token}, {view.name}") for view in frame.views]
        if len({image.shape for image in images}) > 1:
            raise UserError(f"sample {frame.token}: images of different sizes, expected one size for all cameras")
        keep = frame.points > 0
        return Sample(
            torch.stack(images) if images else torch.zeros(0, 3, *self.size),
            torch.zeros(0, 5) if self.modality == "camera" else read_cloud(frame, generator),
            torch.from_numpy(np.stack([view.intrinsics for view in frame.views])),
            torch.from_numpy(np.stack([view.lidar2cam for view in frame.views])),
            torch.from_numpy(frame.boxes[keep]).float(),
            torch.from_numpy(frame.labels[keep]),
        )

    def sample(
        self,
        index: int,
        generator: torch.Generator | None = None,
        mask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        augment: bool = True,
    ) -> Sample:
        """A frame as the network sees it before normalisation.

        Args:
            generator: of the training augmentations; ``None`` for evaluation. mask: blanks a sensor, in training after
                objects have been pasted. augment: ``False`` leaves geometry and images as they are.
        """
        sample = self.raw(index, generator)
        training = generator is not None and augment
        if training and self.bank is not None:
            paste_objects(sample, self.bank, generator)
        if mask is not None:
            sample.images, sample.points = mask(sample.images, sample.points)
        if training:
            transform(sample, draw_transform(JITTER[self.modality], generator))
        keep_in_range(sample, self.pc_range)
        if training:
            sample.points = sample.points[torch.randperm(len(sample.points), generator=generator)]
        if len(sample.images):
            resize_crop_flip(sample, self.size, self.zoom, generator if training else None)
        return sample


# ---- generated scenes ----------------------------------------------------------------------------------------------

SCENE_CLASSES = ("blue", "green", "red", "yellow")
COLOURS = torch.tensor([[230.0, 60, 40], [40, 200, 60], [40, 50, 225], [40, 215, 225]])
"""Blue-green-red of the classes: the only thing that tells them apart."""
SCENE_SIZE, FOCAL, GROUND, MOST_BOXES = (32, 64), 32.0, -1.5, 6


@dataclass
class Scenes:
    """Generated two-sensor scenes.

    Attributes:
        images: (S, 4, 3, 32, 64) uint8. points: (S, R, 5); hit: (S, R) which of the rays returned.
        boxes: (S, 6, 9). labels: (S, 6). valid: (S, 6).
        intrinsics, lidar2cam: (4, 3, 3) and (4, 4, 4) float64, the same for all scenes.
    """

    images: Tensor
    points: Tensor
    hit: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    intrinsics: Tensor = field(default_factory=lambda: scene_cameras()[0])
    lidar2cam: Tensor = field(default_factory=lambda: scene_cameras()[1])

    classes = SCENE_CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def truth(self, index: int) -> tuple[Tensor, Tensor]:
        """Boxes (n, 9) and labels (n,)."""
        keep = self.valid[index]
        return self.boxes[index][keep], self.labels[index][keep]

    def sample(
        self,
        index: int,
        generator: torch.Generator | None = None,
        mask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        augment: bool = True,
    ) -> Sample:
        """A scene; in training turned by a quarter turn or none, and flipped or not, cameras along."""
        images, points = self.images[index].float(), self.points[index][self.hit[index]].clone()
        if mask is not None:
            images, points = mask(images, points)
        sample = Sample(images, points, self.intrinsics, self.lidar2cam, *self.truth(index))
        if generator is not None and augment:
            turn, flip = torch.randint(0, 4, (2,), generator=generator).tolist()
            transform(sample, global_transform(turn * math.pi / 2, 1.0, (0, 0, 0), (flip % 2 == 1, False)))
        return sample


def scene_cameras() -> tuple[Tensor, Tensor]:
    """Intrinsics (4, 3, 3) and lidar2cam (4, 4, 4) of four cameras at the origin, a quarter turn apart."""
    height, width = SCENE_SIZE
    intrinsics = torch.tensor([[FOCAL, 0, width / 2], [0, FOCAL, height / 2], [0, 0, 1]], dtype=torch.float64)
    views = []
    for turn in range(4):
        c, s = math.cos(turn * math.pi / 2), math.sin(turn * math.pi / 2)
        view = torch.eye(4, dtype=torch.float64)
        view[:3, :3] = torch.tensor([[s, -c, 0], [0, 0, -1], [c, s, 0]], dtype=torch.float64)  # right, down, forward
        views.append(view)
    return intrinsics.expand(4, 3, 3).clone(), torch.stack(views)


def cast_rays(directions: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First box that each ray from the origin meets.

    Args:
        directions: (R, 3). boxes: (S, M, 9). valid: (S, M).

    Returns:
        (S, R) distance in lengths of the direction, infinite where nothing is met; (S, R) box; (S, R) axis of the face.
    """
    c, s = boxes[..., 6].cos(), boxes[..., 6].sin()
    turn = torch.stack([c, s, -s, c], -1).unflatten(-1, (2, 2))
    flat = torch.einsum("smij,rj->smri", turn, directions[:, :2])
    local = torch.cat([flat, directions[:, 2:].expand(*flat.shape[:3], 1)], -1)
    origin = -torch.cat([torch.einsum("smij,smj->smi", turn, boxes[..., :2]), boxes[..., 2:3]], -1).unsqueeze(2)
    half = boxes[..., None, 3:6] / 2
    safe = torch.where(local.abs() < 1e-9, 1e-9, local)
    a, b = (-half - origin) / safe, (half - origin) / safe
    near, axis = torch.minimum(a, b).max(-1)
    far = torch.maximum(a, b).amin(-1)
    distance = torch.where((near < far) & (near > 0) & valid.unsqueeze(-1), near, math.inf)
    nearest, box = distance.min(1)
    return nearest, box, axis.gather(1, box.unsqueeze(1)).squeeze(1)


def _place_boxes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (S, 6, 9), labels and validity: one box in each of six sectors, so that none hides another."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    sector = torch.rand(count, MOST_BOXES, generator=generator).argsort(1) + uniform(-0.155, 0.155, count, MOST_BOXES)
    azimuth = uniform(0, 2 * math.pi, count, 1) + sector * (2 * math.pi / MOST_BOXES)
    distance = uniform(5.5, 11, count, MOST_BOXES)
    centre = torch.stack([azimuth.cos(), azimuth.sin()], -1) * distance.unsqueeze(-1)
    size = torch.stack([uniform(*span, count, MOST_BOXES) for span in ((1.6, 3.0), (1.2, 1.8), (1.2, 2.2))], -1)
    size = size * uniform(0.5, 1.5, count, MOST_BOXES, 1)  # how large a box looks does not tell how far it is,
    height = uniform(-0.8, 0.8, count, MOST_BOXES, 1)  # nor does where it stands: boxes float
    yaw = uniform(-math.pi, math.pi, count, MOST_BOXES, 1)
    boxes = torch.cat([centre, height, size, yaw, torch.zeros(count, MOST_BOXES, 2)], -1)
    labels = torch.randint(len(SCENE_CLASSES), (count, MOST_BOXES), generator=generator)
    number = torch.randint(2, MOST_BOXES + 1, (count, 1), generator=generator)
    return boxes, labels, torch.arange(MOST_BOXES) < number


def _render(boxes: Tensor, labels: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Images (S, 4, 3, 32, 64) uint8: boxes in their class's colour, shaded by face, on ground and sky, with noise."""
    height, width = SCENE_SIZE
    intrinsics, lidar2cam = scene_cameras()
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).double().view(-1, 3)
    rays = torch.einsum("vij,pj->vpi", (intrinsics @ lidar2cam[:, :3, :3]).inverse(), pixels).float()
    distance, box, axis = cast_rays(rays.flatten(0, 1), boxes, valid)
    shade = torch.tensor([1.0, 0.75, 0.55])[axis] * (0.8 + 0.4 * torch.rand(len(boxes), 1, generator=generator))
    colour = COLOURS[labels.gather(1, box)] * shade.unsqueeze(-1)
    below = (rays.flatten(0, 1)[:, 2] < 0).unsqueeze(-1)
    ground = torch.where(below, torch.tensor([95.0, 100, 105]), torch.tensor([190.0, 175, 165]))
    image = torch.where(distance.isfinite().unsqueeze(-1), colour, ground)
    image = image + 12 * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 255).byte().view(len(boxes), 4, height, width, 3).permute(0, 1, 4, 2, 3).contiguous()


def _scan(boxes: Tensor, valid: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """LiDAR points (S, R, 5) and which rays returned: 14 rings of 120 rays; intensity is noise, 3 % are outliers."""
    azimuth = torch.arange(120) * (2 * math.pi / 120)
    slope = torch.linspace(-0.3, 0.3, 14)
    ring, turn = torch.meshgrid(slope, azimuth, indexing="ij")
    rays = torch.stack([turn.cos(), turn.sin(), ring], -1).flatten(0, 1)
    distance, _, _ = cast_rays(rays, boxes, valid)
    ground = torch.where(rays[:, 2] < 0, GROUND / rays[:, 2], math.inf)
    distance = torch.minimum(distance, ground)
    shape = distance.shape
    stray = torch.rand(shape, generator=generator) < 0.03
    distance = torch.where(stray, 2 + 18 * torch.rand(shape, generator=generator), distance)
    distance = distance + 0.02 * torch.randn(shape, generator=generator)
    hit = distance < 22
    place = rays * torch.where(hit, distance, 0.0).unsqueeze(-1)
    intensity = 255 * torch.rand(*shape, 1, generator=generator)
    return torch.cat([place, intensity, torch.zeros(*shape, 1)], -1), hit


def generate_scenes(count: int, generator: torch.Generator, chunk: int = 64) -> Scenes:
    """Scenes in which neither sensor suffices.

    Classes differ by colour only, which LiDAR does not see, and cameras of 32 pixels a height tell distance badly.
    """
    boxes, labels, valid = _place_boxes(count, generator)
    images, points, hits = [], [], []
    for part in torch.arange(count).split(chunk):
        images.append(_render(boxes[part], labels[part], valid[part], generator))
        cloud, hit = _scan(boxes[part], valid[part], generator)
        points.append(cloud)
        hits.append(hit)
    return Scenes(torch.cat(images), torch.cat(points), torch.cat(hits), boxes, labels, valid)
