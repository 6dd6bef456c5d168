"""Scenes for AdvSim: generated traffic (the offline default) and logs of the Argoverse 2 Sensor data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json

DT, HISTORY, STEPS = 0.1, 5, 50
"""Seconds of a step, recorded steps before a scene, and simulated steps; DT, HISTORY and CELL are those of model.py."""
LENGTH = HISTORY + STEPS + 1
CELL, RASTER = 0.4, 400
"""Metres of a cell of the drivable raster, and cells along its side."""
ROUTE = (10, 180)
"""Points of a route behind the ego and in all, a metre apart."""


# ---- what both sources share -----------------------------------------------------------------------------------


def route_along(path: np.ndarray, now: int, heading: float) -> np.ndarray:
    """The route (P, 4) x, y, heading, curvature along a driven path (n, 2); it goes straight on at both ends.

    Args:
        now: where in the path the ego is. heading: its heading, for a path that leads nowhere.
    """
    step = np.linalg.norm(np.diff(path, axis=0), axis=1)
    keep = np.concatenate([[True], step > 0.02])
    s = np.concatenate([[0.0], np.cumsum(np.where(step > 0.02, step, 0))])
    s, path = s - s[now], path[keep]
    here, s = path[-1], s[keep]
    ends = [np.array([math.cos(heading), math.sin(heading)])] * 2
    if s[-1] - s[0] > 2:
        inner = (s >= s[-1] - 2, s <= s[0] + 2)
        tail, head = (path[part][-1] - path[part][0] for part in inner)
        ends = [v / np.linalg.norm(v) if np.linalg.norm(v) > 0.1 else ends[0] for v in (head, tail)]
    wanted = np.arange(ROUTE[1], dtype=np.float64) - ROUTE[0]
    xy = np.stack([np.interp(wanted, s, path[:, k]) for k in (0, 1)], 1) if len(s) > 1 else np.tile(here, (ROUTE[1], 1))
    before, after = np.minimum(wanted - s[0], 0), np.maximum(wanted - s[-1], 0)
    xy += before[:, None] * ends[0] + after[:, None] * ends[1]
    inner = np.gradient(xy, axis=0)
    turn = np.unwrap(np.arctan2(inner[:, 1], inner[:, 0]))
    turn = np.convolve(np.pad(turn, 2, mode="edge"), np.ones(5) / 5, "valid")
    return np.column_stack([xy, turn, np.gradient(turn)])


@dataclass(frozen=True)
class Recording:
    """A window of recorded traffic, before it is known whether it can be attacked.

    Attributes:
        ego: (L, 5) states. tracks: (N, L, 3); present: (N, L) bool; size: (N, 3); movable: (N,) vehicles and cyclists.
        route: (P, 4). drivable: (G, G) bool; corner: (2,). speed_limit: m/s.
    """

    ego: np.ndarray
    tracks: np.ndarray
    present: np.ndarray
    size: np.ndarray
    movable: np.ndarray
    route: np.ndarray
    drivable: np.ndarray
    corner: np.ndarray
    speed_limit: float


def raster(draw: Callable[[np.ndarray], np.ndarray], centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The drivable raster around a place: ``draw`` says of points (..., 2) which are drivable; raster and corner."""
    corner = centre - RASTER * CELL / 2
    middle = (np.arange(RASTER) + 0.5) * CELL
    return draw(np.stack(np.meshgrid(corner[0] + middle, corner[1] + middle), -1)), corner


# ---- generated traffic -----------------------------------------------------------------------------------------

LANE = 3.5
TOWN = 11.0
"""Speed limit of generated roads, m/s."""
SIDE = 2.4
"""Width of the strips for parked cars."""
ACCELERATIONS = (0.5, 0.0, -0.5, -1.0)
"""What an ego does that nothing forces to brake, m/s^2, the brisk ones first."""
GAP = 3.0
"""Seconds a vehicle of the cross street leaves free before and after the ego: it has no right of way and takes a gap
of some seconds only. A second or two counts as a conflict, which everyday traffic hardly ever has, and a stack may be
there a second before the expert."""
BEYOND = round(GAP / DT)
"""Steps after a recording's end that are looked at for such gaps."""


@dataclass(frozen=True)
class Road:
    """A road of constant curvature, in coordinates s (along) and d (to the left); the ego's lane is around d = 0.

    Attributes:
        curvature: 1/m. right: d of the right edge of the rightmost lane. crossing: s of a cross street, or None.
        place: (3,) x, y and heading of s = d = 0.
    """

    curvature: float
    right: float
    crossing: float | None
    place: np.ndarray

    def world(self, s: np.ndarray, d: np.ndarray, heading: np.ndarray | float = 0.0) -> np.ndarray:
        """x, y, heading (..., 3) of places on the road; ``heading`` is relative to its direction."""
        angle = self.curvature * s
        x, y = (
            np.sin(angle) / self.curvature - d * np.sin(angle),
            (1 - np.cos(angle)) / self.curvature + d * np.cos(angle),
        )
        cos, sin = math.cos(self.place[2]), math.sin(self.place[2])
        x, y = self.place[0] + x * cos - y * sin, self.place[1] + x * sin + y * cos
        return np.stack(np.broadcast_arrays(x, y, angle + heading + self.place[2]), -1)

    def drivable(self, points: np.ndarray) -> np.ndarray:
        """Which points (..., 2) of the world lie on the road, its strips or the cross street."""
        offset = points - self.place[:2]
        cos, sin = math.cos(self.place[2]), math.sin(self.place[2])
        x, y = offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin
        radius, sign = 1 / self.curvature, math.copysign(1, self.curvature)
        s = np.arctan2(sign * x, sign * (radius - y)) * radius
        d = radius - sign * np.hypot(x, radius - y)
        on = (d >= self.right - SIDE) & (d <= 1.5 * LANE + SIDE)
        return on if self.crossing is None else on | (np.abs(s - self.crossing) <= LANE + 0.5)


CAR = (4.5, 1.9, 1.6)
VAN = (6.2, 2.2, 2.6)
EGO = (-1.1, 3.8, 1.0)
"""Metres from the rear axle to the ego's rear and front, and to its sides."""


def gap_between(ego: np.ndarray, lane: float, d: np.ndarray) -> float:
    """Least seconds between the ego and a car of the cross street being where their ways cross; infinity for never.

    Args:
        ego: (T,) s of the ego's rear axle. lane: s of the car's lane. d: (T,) where the car is across the road.
    """
    rear, front, side = EGO
    length, width, _ = CAR
    here = np.flatnonzero((ego + front > lane - width / 2) & (ego + rear < lane + width / 2))
    there = np.flatnonzero(np.abs(d) < side + length / 2)
    return float(np.abs(here[:, None] - there).min()) * DT if len(here) and len(there) else math.inf


def draw_traffic(rng: np.random.Generator) -> list[Recording]:
    """Draw a piece of traffic: an ego that follows its lane, moving actors of several kinds, and parked cars.

    The recordings differ in the ego's constant acceleration only, the brisk ones first; whoever uses them takes the
    first in which nobody touches anybody. There are none in which a vehicle of the cross street leaves less than
    ``GAP`` between itself and the ego.
    """
    curvature = rng.choice([-1, 1]) * rng.uniform(0.0005, 0.008)
    right = -LANE * rng.choice([0.5, 1.5])
    crossing = rng.uniform(22, 45) if rng.random() < 0.7 else None
    road = Road(curvature, right, crossing, np.array([*rng.uniform(-50, 50, 2), rng.uniform(-math.pi, math.pi)]))
    time = (np.arange(LENGTH + BEYOND) - HISTORY) * DT
    speed = rng.uniform(6, 11)
    kinds = ["lead", "oncoming", "oncoming"]
    kinds += ["neighbour", "neighbour"] if right < -LANE else []
    kinds += ["from right", "from left", "from right"] if crossing is not None else []
    tracks, sizes, moving, crossers = [], [], [], []

    def add(
        s: np.ndarray | float, d: np.ndarray | float, heading: float, size: tuple[float, float, float], moves: bool
    ) -> None:
        tracks.append(road.world(s + 0 * time, d + 0 * time, heading)[:LENGTH])
        sizes.append(np.array(size) * rng.uniform(0.95, 1.05, 3))
        moving.append(moves)

    for kind in rng.choice(kinds, size=min(int(rng.integers(2, 5)), len(kinds)), replace=False):
        way = rng.uniform(-0.3, 0.3) * time**2 / 2
        if kind == "lead":
            add(rng.uniform(16, 32) + speed * rng.uniform(0.75, 1.1) * time + way, 0.0, 0.0, CAR, True)
        elif kind == "neighbour":
            add(rng.uniform(-6, 16) + speed * rng.uniform(0.85, 1.15) * time + way, -LANE, 0.0, CAR, True)
        elif kind == "oncoming":
            add(rng.uniform(25, 75) - rng.uniform(5, 10) * time - way, LANE, math.pi, CAR, True)
        else:
            side = 1 if kind == "from right" else -1
            s, d = crossing + side * LANE / 2, side * (rng.uniform(3, 8) * time + way - rng.uniform(12, 36))
            crossers.append((s, d))
            add(s, d, side * math.pi / 2, CAR, True)
    for side in (right - SIDE / 2, 1.5 * LANE + SIDE / 2):
        for s in np.arange(-20, 70, 7.5):
            clear = crossing is None or abs(s - crossing) > LANE + 4
            if clear and rng.random() < 0.5:
                add(s + rng.uniform(-0.5, 0.5), side, 0.0, VAN if rng.random() < 0.35 else CAR, False)

    tracks, size = np.stack(tracks), np.stack(sizes)
    drivable, corner = raster(road.drivable, road.world(np.array(40.0), np.array(0.0))[:2])
    path = road.world(np.arange(-20.0, 200.0), np.zeros(220))
    route = route_along(path[:, :2], 20, float(path[20, 2]))
    present, movable = np.ones(tracks.shape[:2], dtype=bool), np.array(moving)
    out = []
    for a in ACCELERATIONS:
        v = np.where(time < 0, speed, np.clip(speed + a * time, 0, TOWN))
        s = np.concatenate([[0], np.cumsum(v[:-1] * DT)])
        s -= s[HISTORY]
        if any(gap_between(s, *crosser) < GAP for crosser in crossers):
            continue
        ego = np.column_stack([road.world(s, 0 * s), v, np.full(len(s), curvature)])[:LENGTH]
        out.append(Recording(ego, tracks, present, size, movable, route, drivable, corner, TOWN))
    return out


# ---- Argoverse 2 Sensor ----------------------------------------------------------------------------------------

VEHICLES = frozenset(
    {
        *("REGULAR_VEHICLE", "LARGE_VEHICLE", "BUS", "BOX_TRUCK", "TRUCK", "TRUCK_CAB", "SCHOOL_BUS"),
        *("ARTICULATED_BUS", "MOTORCYCLE", "BICYCLE", "BICYCLIST", "MOTORCYCLIST", "WHEELED_DEVICE", "WHEELED_RIDER"),
    }
)
"""Categories that may be perturbed: vehicles and cyclists."""
ANNOTATION_COLUMNS = (
    *("timestamp_ns", "track_uuid", "category", "length_m", "width_m", "height_m"),
    *("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m", "num_interior_pts"),
)
POSE_COLUMNS = ("timestamp_ns", "qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")
SWEEP_COLUMNS = ("x", "y", "z", "laser_number")
UP_LIDAR = (1.350, 0.0, 1.640)
"""Where the upper of the two LiDARs is in the ego frame, metres."""
GROUND = -0.33
"""z of the ground in the ego frame, whose origin is the rear axle."""


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (n, 3, 3) of unit quaternions (n, 4) w, x, y, z."""
    w, x, y, z = quaternions.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def yaw_of(matrices: np.ndarray) -> np.ndarray:
    """Heading in the plane of rotation matrices (..., 3, 3)."""
    return np.arctan2(matrices[..., 1, 0], matrices[..., 0, 0])


@dataclass(frozen=True)
class Boxes:
    """Annotations of one moment, ego frame: rotation (n, 3, 3), centre (n, 3), size (n, 3), counted points (n,)."""

    rotation: np.ndarray
    centre: np.ndarray
    size: np.ndarray
    points: np.ndarray
    category: tuple[str, ...]

    def interior(self, points: np.ndarray) -> np.ndarray:
        """How many of (P, 3) lie in each box, (n,)."""
        local = np.einsum("npi,nij->npj", points[None] - self.centre[:, None], self.rotation)
        return (np.abs(local) <= self.size[:, None] / 2).all(-1).sum(1)

    def flat(self) -> np.ndarray:
        """Upright boxes (n, 5) x, y, heading, length, width."""
        return np.column_stack([self.centre[:, :2], yaw_of(self.rotation), self.size[:, :2]])


@dataclass(frozen=True)
class Log:
    """A recorded log in its city frame, F frames at 10 Hz.

    Attributes:
        name: the log id. stamps: (F,) ns. ego: (F, 3) x, y, heading of the rear axle. tracks: (N, F, 3) x, y, heading;
        present: (N, F). size: (N, 3). movable: (N,). areas: drivable polygons (n, 2). sweeps: their files by ns.
        boxes: the annotations of the moments that have a sweep, by ns.
    """

    name: str
    stamps: np.ndarray
    ego: np.ndarray
    tracks: np.ndarray
    present: np.ndarray
    size: np.ndarray
    movable: np.ndarray
    areas: tuple[np.ndarray, ...]
    sweeps: dict[int, Path]
    boxes: dict[int, Boxes]

    def window(self, second: float, steps: int = STEPS) -> Recording:
        """The window whose first simulated step is at this second of the log.

        Raises:
            UserError: it begins before or ends after the log.
        """
        now = round(second / DT)
        begin, end = now - HISTORY, now + steps + 1
        if begin < 0 or end > len(self.stamps):
            last = (len(self.stamps) - steps - 1) * DT
            expected = f"expected between {HISTORY * DT:g} and {last:.1f}"
            raise UserError(f"log {self.name}: no window at {second:g} s in {len(self.stamps)} frames, {expected}")
        origin = self.ego[now, :2]
        here = np.array([*origin, 0])
        part = slice(begin, end)
        there = self.present[:, part]
        away = np.linalg.norm(self.tracks[:, part, :2] - self.ego[None, part, :2], axis=-1)
        near = np.where(there, away, math.inf).min(1) < 70
        ego = self.ego[part] - here
        step = np.diff(self.ego[:, :2], axis=0, append=self.ego[-1:, :2])[part]
        v = np.linalg.norm(step, axis=1) / DT
        if end == len(self.stamps):
            v[-1] = v[-2]
        turn = np.gradient(np.unwrap(ego[:, 2])) / DT
        kappa = np.clip(np.where(v >= 0.5, turn / np.maximum(v, 0.5), 0), -0.2, 0.2)
        kappa = np.convolve(np.pad(kappa, 2, mode="edge"), np.ones(5) / 5, "valid")
        route = route_along(self.ego[:, :2] - origin, now, float(self.ego[now, 2]))
        drivable, corner = raster(self.drivable(origin), route[ROUTE[0] + 20, :2])
        tracks = np.where(there[near][..., None], self.tracks[near][:, part] - here, 0)
        states = np.column_stack([ego, v, kappa])
        size, movable = self.size[near], self.movable[near]
        return Recording(states, tracks, there[near], size, movable, route, drivable, corner, 13.4)

    def drivable(self, origin: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Which points of a raster, relative to ``origin``, lie in a drivable area."""

        def draw(points: np.ndarray) -> np.ndarray:
            from PIL import Image, ImageDraw

            corner = points[0, 0] + origin
            image = Image.new("1", points.shape[1::-1])
            pen = ImageDraw.Draw(image)
            for area in self.areas:
                pen.polygon([tuple(place) for place in ((area - corner) / CELL).tolist()], fill=1)
            return np.array(image)

        return draw


def read_table(path: Path, columns: tuple[str, ...], log: str) -> Any:
    """A feather file as a pandas table.

    Raises:
        UserError: missing, unreadable, or without one of the columns.
    """
    import pandas as pd
    from pyarrow import feather

    if not path.is_file():
        raise UserError(f"log {log}: no {path.name}, expected the Argoverse 2 Sensor layout in {path.parent}")
    try:
        table: pd.DataFrame = feather.read_feather(path)
    except (OSError, ValueError) as error:
        raise UserError(f"log {log}: {path.name} is not a readable feather file ({error})") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UserError(f"log {log}: {path.name} has no column {missing[0]}, expected {', '.join(columns)}")
    return table


def quaternions_of(table: Any, log: str, what: str) -> np.ndarray:
    """The rotations (n, 3, 3) of a table.

    Raises:
        UserError: a quaternion is not of length 1.
    """
    q = table[["qw", "qx", "qy", "qz"]].to_numpy(np.float64)
    wrong = ~(np.abs(np.linalg.norm(q, axis=1) - 1) <= 1e-3)
    if wrong.any():
        row = int(wrong.argmax())
        length, stamp = np.linalg.norm(q[row]), table["timestamp_ns"].iloc[row]
        raise UserError(f"log {log}: quaternion of {what} at {stamp} has length {length:.4g}, expected 1")
    return rotations(q)


def read_log(folder: Path) -> Log:
    """Read one log of the Argoverse 2 Sensor data set.

    ``annotations_with_ego.feather`` of the scenario-mining task is taken where ``annotations.feather`` is missing.

    Raises:
        UserError: something is missing or malformed: names the log, the file and the timestamp.
    """
    name = folder.name
    path = folder / "annotations.feather"
    if not path.is_file() and (folder / "annotations_with_ego.feather").is_file():
        path = folder / "annotations_with_ego.feather"
    table = read_table(path, ANNOTATION_COLUMNS, name)
    table = table[table["category"] != "EGO_VEHICLE"].reset_index(drop=True)
    if not len(table):
        raise UserError(f"log {name}: {path.name} has no boxes")
    size = table[["length_m", "width_m", "height_m"]].to_numpy(np.float64)
    if not (size > 0).all():
        row = int((~(size > 0)).any(1).argmax())
        which = f"track {table['track_uuid'].iloc[row]} at {table['timestamp_ns'].iloc[row]}"
        raise UserError(f"log {name}: {which} has size {size[row].tolist()}, expected positive metres")
    twice = table.duplicated(["timestamp_ns", "track_uuid"])
    if twice.any():
        row = int(twice.argmax())
        which = f"track {table['track_uuid'].iloc[row]} at {table['timestamp_ns'].iloc[row]}"
        raise UserError(f"log {name}: {which} stands twice, expected one box a track and time")
    rotation = quaternions_of(table, name, "a box")
    stamps, frame = np.unique(table["timestamp_ns"].to_numpy(np.int64), return_inverse=True)
    ids, track = np.unique(table["track_uuid"].to_numpy(str), return_inverse=True)

    poses = read_table(folder / "city_SE3_egovehicle.feather", POSE_COLUMNS, name).drop_duplicates("timestamp_ns")
    at = poses.set_index("timestamp_ns").index.get_indexer(stamps)
    if (at < 0).any():
        raise UserError(f"log {name}: no ego pose at {stamps[(at < 0).argmax()]} in city_SE3_egovehicle.feather")
    poses = poses.iloc[at]
    turn, place = quaternions_of(poses, name, "the ego pose"), poses[["tx_m", "ty_m", "tz_m"]].to_numpy(np.float64)

    centre = table[["tx_m", "ty_m", "tz_m"]].to_numpy(np.float64)
    city = np.einsum("nij,nj->ni", turn[frame], centre) + place[frame]  # p_city = R_ego p + t_ego
    tracks, present = np.zeros((len(ids), len(stamps), 3)), np.zeros((len(ids), len(stamps)), dtype=bool)
    tracks[track, frame, :2] = city[:, :2]
    tracks[track, frame, 2] = yaw_of(turn[frame] @ rotation)
    present[track, frame] = True
    sizes = np.zeros((len(ids), 3))
    sizes[track] = size
    movable = np.zeros(len(ids), dtype=bool)
    movable[track] = table["category"].isin(sorted(VEHICLES)).to_numpy()

    sweeps = {int(path.stem): path for path in sorted((folder / "sensors" / "lidar").glob("*.feather"))}
    boxes = {}
    for stamp in sweeps:
        rows = (table["timestamp_ns"] == stamp).to_numpy()
        counted = table["num_interior_pts"].to_numpy()[rows]
        kinds = tuple(table["category"][rows])
        boxes[stamp] = Boxes(rotation[rows], centre[rows], size[rows], counted, kinds)
    ego = np.column_stack([place[:, :2], yaw_of(turn)])
    return Log(name, stamps, ego, tracks, present, sizes, movable, read_areas(folder), sweeps, boxes)


def read_areas(folder: Path) -> tuple[np.ndarray, ...]:
    """The drivable areas of a log's map, polygons (n, 2) in the city frame.

    Raises:
        UserError: no map, or one without drivable areas.
    """
    found = sorted((folder / "map").glob("log_map_archive_*.json"))
    if not found:
        raise UserError(f"log {folder.name}: no map/log_map_archive_*.json, expected the log's vector map")
    content = read_json(found[0], f"log {folder.name}")
    try:
        areas = [area["area_boundary"] for area in content["drivable_areas"].values()]
        out = tuple(np.array([[point["x"], point["y"]] for point in area], dtype=np.float64) for area in areas)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"log {folder.name}: {found[0].name} has no drivable_areas with area_boundary x, y") from error
    if not out:
        raise UserError(f"log {folder.name}: {found[0].name} has no drivable areas, expected at least one")
    return out


def read_sweep(path: Path) -> tuple[Tensor, Tensor]:
    """Points (P, 3) in the ego frame and laser rows (P,) of one sweep.

    Raises:
        UserError: unreadable, or without a column.
    """
    table = read_table(path, SWEEP_COLUMNS, path.parents[2].name)
    points = torch.tensor(table[["x", "y", "z"]].to_numpy(np.float32))
    return points, torch.tensor(table["laser_number"].to_numpy(np.uint8))


def find_logs(folder: Path | None) -> list[Path]:
    """The logs below a folder (itself, its sub-folders or those of a split), by name.

    Raises:
        UserError: there is none.
    """
    if folder is None:
        raise UserError("no --data DIR: expected a folder with logs of the Argoverse 2 Sensor data set")
    marker = "city_SE3_egovehicle.feather"
    annotations = "annotations*.feather"
    levels = (folder.glob(f"{'*/' * depth}{file}") for depth in range(3) for file in (marker, annotations))
    found = sorted({path.parent for level in levels for path in level}, key=lambda path: path.name)
    if not found:
        raise UserError(f"no log below {folder}, expected <log id>/annotations.feather and {marker}")
    return found


def read_nuscenes_sweep(path: Path) -> tuple[Tensor, Tensor]:
    """Points (P, 3) in the sensor's frame and laser rows (P,) of a nuScenes sweep (LIDAR_TOP ``.pcd.bin``).

    Raises:
        UserError: missing, or not five float32 a point.
    """
    try:
        values = np.fromfile(path, dtype=np.float32)
    except OSError as error:
        raise UserError(f"{path}: no readable sweep, expected five float32 a point") from error
    if not len(values) or len(values) % 5:
        raise UserError(f"{path}: {len(values)} float32, expected five a point")
    points = torch.from_numpy(values.reshape(-1, 5))
    return points[:, :3].contiguous(), points[:, 4].to(torch.uint8)
