"""Scans and poses: a generated city for the default run, and the files of KITTI, the authors and others as released.

Points are (n, 3) float32 in the sensor's frame, metres; poses (n, 4, 4) float64 lead from the sensor to the world.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json, write_text
from shared.shapes import read_npz


@dataclass(frozen=True)
class Drive:
    """A sequence of scans.

    Attributes:
        name: for metrics and messages. poses: (n, 4, 4) true poses of the sensor. scan: reads the points of a frame.
        path: files it was read from, ``None`` for generated ones. spec: what a generated one depends on.
    """

    name: str
    poses: Tensor
    scan: Callable[[int], Tensor]
    path: Path | None = None
    spec: Any = None


# ---- generated city ----------------------------------------------------------------------------------------------
#
# Streets run along the lines of a square grid; each side of a block gets buildings, bays and sheds, poles, trees,
# bushes and parked cars at random. Local coordinates of a side: t along it, d inwards from the block's edge.

BLOCK, STREET = 48.0, 14.0
SENSOR_HEIGHT = 1.73
BEAMS, COLUMNS, REACH = 32, 450, 50.0
FOV = (3.0, -25.0)


@dataclass(frozen=True)
class City:
    """``boxes`` (b, 7): centre, half sizes, yaw; ``cylinders`` (c, 4): x, y, radius, height from the ground;
    ``spheres`` (s, 4): centre, radius."""

    boxes: Tensor
    cylinders: Tensor
    spheres: Tensor


def generate_city(seed: int, blocks: int = 4) -> City:
    """A city of ``blocks`` x ``blocks`` blocks around the crossings (0, 0) to (blocks - 2, blocks - 2)."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(blocks) - 0.5
    centre = BLOCK * torch.cartesian_prod(index, index).repeat_interleave(4, 0)
    turn = torch.arange(4).repeat(blocks * blocks) * (math.pi / 2)
    half = (BLOCK - STREET) / 2
    sides = len(turn)

    def draw(count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(sides, count, generator=generator)

    def place(t: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """World coordinates (sides, count) of places on the sides."""
        out = half - d
        c, s = turn.cos().unsqueeze(1), turn.sin().unsqueeze(1)
        return centre[:, :1] + c * t - s * out, centre[:, 1:] + s * t + c * out

    def boxes(t: Tensor, d: Tensor, size: Sequence[Tensor], bottom: float, share: float) -> Tensor:
        """Boxes of half sizes (along, across) and full height; a ``share`` of them exists."""
        x, y = place(t, d)
        along, across, height = size
        yaw = turn.unsqueeze(1) + draw(t.shape[1], -0.06, 0.06)
        rows = torch.stack([x, y, bottom + height / 2, along, across, height / 2, yaw], -1)
        return rows[torch.rand(t.shape, generator=generator) < share]

    slots = torch.tensor([-11.0, 0.0, 11.0])
    depth, setback = draw(3, 2.5, 4.0), draw(3, 0.5, 4.5)
    buildings = boxes(slots + draw(3, -1.5, 1.5), setback + depth, (draw(3, 3, 5.5), depth, draw(3, 4, 14)), 0, 0.85)
    bays = boxes(
        draw(5, -half, half), draw(5, 0.2, 4.5), (draw(5, 0.3, 1.6), draw(5, 0.2, 0.9), draw(5, 0.8, 4.5)), 0, 0.8
    )
    t, d = draw(2, -half, half), -draw(2, 2.2, 2.9)
    parked = torch.rand(sides, 2, generator=generator) < 0.6
    length, width = draw(2, 1.9, 2.4), draw(2, 0.8, 0.95)
    body = boxes(t, d, (length, width, draw(2, 0.8, 1.0)), 0.25, 2)[parked.flatten()]
    cabin = boxes(t, d, (0.5 * length, 0.9 * width, draw(2, 1.3, 1.7)), 0.25, 2)[parked.flatten()]
    x, y = place(draw(2, -half, half), draw(2, -1.0, 0.0))
    poles = torch.stack([x, y, draw(2, 0.06, 0.25), draw(2, 3, 8)], -1).flatten(0, 1)
    x, y = place(draw(2, -half, half), draw(2, -0.8, 2.0))
    stem, crown = draw(2, 2.0, 4.5), draw(2, 0.9, 2.3)
    trunks = torch.stack([x, y, draw(2, 0.12, 0.35), stem], -1).flatten(0, 1)
    crowns = torch.stack([x, y, stem + 0.7 * crown, crown], -1).flatten(0, 1)
    x, y = place(draw(3, -half, half), draw(3, 0.0, 4.0))
    bushes = torch.stack([x, y, draw(3, 0.0, 0.5), draw(3, 0.4, 1.1)], -1).flatten(0, 1)
    return City(torch.cat([buildings, bays, body, cabin]), torch.cat([poles, trunks]), torch.cat([crowns, bushes]))


def cast_rays(
    city: City, x: float, y: float, yaw: float, noise: float, generator: torch.Generator, cars: int = 4
) -> Tensor:
    """Points (n, 3) that a level spinning scanner at (x, y) sees, in its own frame.

    A vertical plane of rays meets the outline of an object between two horizontal distances; only those planes and
    objects are followed up for each beam.

    Args:
        yaw: heading, radians. noise: standard deviation of a range, metres. generator: of the noise, of the
            rotation's start and of the cars that drive by. cars: number of those.
    """
    boxes = torch.cat([city.boxes, _traffic(x, y, yaw, generator, cars)])
    start = torch.rand((), generator=generator)
    azimuth = (torch.arange(COLUMNS) + start) * (2 * math.pi / COLUMNS)
    ray = torch.stack([(azimuth + yaw).cos(), (azimuth + yaw).sin()], 1)
    slope = torch.linspace(math.radians(FOV[0]), math.radians(FOV[1]), BEAMS).tan()
    here = torch.tensor([x, y])

    c, s = boxes[:, 6].cos(), boxes[:, 6].sin()
    to_box = torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], 1)  # (b, 2, 2)
    origin = -(to_box @ (boxes[:, :2] - here).unsqueeze(2)).squeeze(2)
    heading = torch.einsum("bij,cj->cbi", to_box, ray)
    heading = torch.where(heading.abs() < 1e-9, 1e-9, heading)
    near, far = (
        (-origin - boxes[:, 3:5].copysign(heading)) / heading,
        (-origin + boxes[:, 3:5].copysign(heading)) / heading,
    )
    hits = [_prism(near.amax(2), far.amin(2), boxes[:, 2] - boxes[:, 5], boxes[:, 2] + boxes[:, 5], slope)]

    along, reach = _circles(city.cylinders[:, :2] - here, city.cylinders[:, 2], ray)
    zero = torch.zeros(len(city.cylinders))
    hits.append(_prism(along - reach, along + reach, zero, city.cylinders[:, 3], slope))

    along, reach = _circles(city.spheres[:, :2] - here, city.spheres[:, 3], ray)
    column, ball = ((reach == reach) & (along > 0)).nonzero(as_tuple=True)
    a, h = along[column, ball].unsqueeze(1), (city.spheres[ball, 2] - SENSOR_HEIGHT).unsqueeze(1)
    square = 1 + slope.square()  # |p - centre|^2 = reach^2 in the plane of the ray, solved for the horizontal distance
    middle = (a + slope * h) / square
    root = (middle.square() - (a.square() + h.square() - reach[column, ball].square().unsqueeze(1)) / square).sqrt()
    hits.append((column, middle - root))

    distance = torch.full((COLUMNS, BEAMS), math.inf)
    distance[:, slope < 0] = -SENSOR_HEIGHT / slope[slope < 0]
    for column, found in hits:
        found = torch.where(found > 0.5, found, math.inf).nan_to_num(nan=math.inf)
        distance.scatter_reduce_(0, column.unsqueeze(1).expand(-1, BEAMS), found, "amin")
    length = distance * (1 + slope.square()).sqrt()
    length = length + noise * torch.randn(length.shape, generator=generator)
    direction = torch.stack(
        [
            azimuth.cos().unsqueeze(1).expand(-1, BEAMS),
            azimuth.sin().unsqueeze(1).expand(-1, BEAMS),
            slope.expand(COLUMNS, -1),
        ],
        -1,
    )
    direction = direction / direction.norm(dim=-1, keepdim=True)
    seen = length < REACH
    return (length.unsqueeze(-1) * direction)[seen]


def _traffic(x: float, y: float, yaw: float, generator: torch.Generator, cars: int) -> Tensor:
    """Cars on the road around the scanner, different at each call: boxes (cars, 7)."""
    ahead = torch.empty(cars).uniform_(6, 30, generator=generator)
    ahead *= torch.randint(2, (cars,), generator=generator) * 2 - 1
    side = torch.empty(cars).uniform_(1.8, 2.6, generator=generator)
    c, s = math.cos(yaw), math.sin(yaw)
    size = torch.tensor([2.1, 0.9, 0.7]).expand(cars, 3)
    centre = torch.stack([x + c * ahead - s * side, y + s * ahead + c * side, torch.full((cars,), 0.9)], 1)
    return torch.cat([centre, size, torch.full((cars, 1), yaw)], 1)


def _circles(centre: Tensor, radius: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays from the origin pass circles: distance to the middle of the chord and half its length, NaN if none."""
    along = ray @ centre.T
    across = ray[:, :1] * centre[:, 1] - ray[:, 1:] * centre[:, 0]
    return along, (radius.square() - across.square()).sqrt()


def _prism(near: Tensor, far: Tensor, bottom: Tensor, top: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal distance at which each beam enters vertical prisms.

    Args:
        near, far: (columns, objects) between which a plane of rays is inside the outline. bottom, top: (objects,).

    Returns:
        column (p,) and distances (p, beams), infinite where a beam misses.
    """
    column, thing = ((near < far) & (far > 0)).nonzero(as_tuple=True)
    low, high = (bottom[thing] - SENSOR_HEIGHT).unsqueeze(1), (top[thing] - SENSOR_HEIGHT).unsqueeze(1)
    one, two = low / slope, high / slope
    enter = torch.maximum(near[column, thing].unsqueeze(1), torch.minimum(one, two))
    leave = torch.minimum(far[column, thing].unsqueeze(1), torch.maximum(one, two))
    return column, torch.where(enter < leave, enter, math.inf)


ROUTE = ((0, 0), (2, 0), (2, 1), (0, 1), (0, 0), (1, 0), (1, 2), (0, 2), (0, 1), (1, 1))
"""Crossings of the default drive: a lap of six blocks' length, then two old streets, one in the other direction, and
four new ones close by, which a drifting pose may take for old."""


def drive_route(route: Sequence[tuple[int, int]], step: float, seed: int) -> Tensor:
    """Places (n, 3) as x, y, heading along streets, a lane's width to the right, shifted anew on each street."""
    generator = torch.Generator().manual_seed(seed)
    corner = BLOCK * torch.tensor(route, dtype=torch.float64)
    leg = corner[1:] - corner[:-1]
    length = leg.norm(dim=1)
    end = length.cumsum(0)
    at = torch.arange(0, float(end[-1]), step, dtype=torch.float64)
    which = torch.searchsorted(end, at, right=True)
    forward = leg[which] / length[which].unsqueeze(1)
    shift = torch.empty(len(leg), dtype=torch.float64).uniform_(-1.5, 0.5, generator=generator)[which].unsqueeze(1)
    place = corner[which] + forward * (at - end[which] + length[which]).unsqueeze(1)
    place = place + shift * torch.stack([-forward[:, 1], forward[:, 0]], 1)
    return torch.cat([place, torch.atan2(forward[:, 1:], forward[:, :1])], 1)


def city_drive(places: Tensor, seed: int, noise: float = 0.02, tilt: float = 0.5, blocks: int = 4) -> Drive:
    """Scans of a generated city along places (n, 3).

    Args:
        seed: of the city and of what differs between scans. noise: of ranges, metres. tilt: standard deviation of
            roll and pitch of the vehicle, degrees.
    """
    city = generate_city(seed, blocks)
    generator = torch.Generator().manual_seed(seed + 1)
    lean = math.radians(tilt) * torch.randn(len(places), 2, generator=generator, dtype=torch.float64)
    level = torch.eye(4, dtype=torch.float64).repeat(len(places), 1, 1)
    c, s = places[:, 2].cos(), places[:, 2].sin()
    level[:, :2, :2] = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
    level[:, :2, 3], level[:, 2, 3] = places[:, :2], SENSOR_HEIGHT
    turn = torch.zeros(len(places), 4, 4, dtype=torch.float64)
    turn[:, 0, 2], turn[:, 2, 0], turn[:, 1, 2], turn[:, 2, 1] = lean[:, 1], -lean[:, 1], -lean[:, 0], lean[:, 0]
    turn = torch.linalg.matrix_exp(turn)

    def scan(frame: int) -> Tensor:
        draws = torch.Generator().manual_seed(seed * 100003 + frame)
        x, y, yaw = (float(v) for v in places[frame])
        points = cast_rays(city, x, y, yaw, noise, draws)
        return points @ turn[frame, :3, :3].float()  # the vehicle leans: seen from the sensor, the world leans back

    spec = {"seed": seed, "noise": noise, "tilt": tilt, "blocks": blocks, "places": places.tolist()}
    return Drive("city", level @ turn, scan, spec=spec)


def noisy_odometry(poses: Tensor, share: float, degrees: float, seed: int) -> Tensor:
    """Relative motions (n - 1, 4, 4) with errors that grow with the distance.

    Args:
        share: error of the position, metres a metre. degrees: error of the rotation, degrees a metre.
    """
    generator = torch.Generator().manual_seed(seed)
    relative = torch.linalg.inv(poses[:-1]) @ poses[1:]
    length = relative[:, :3, 3].norm(dim=1, keepdim=True)
    error = torch.randn(len(relative), 6, generator=generator, dtype=torch.float64)
    x, y, z = (error[:, 3:] * math.radians(degrees) * length).unbind(1)
    move = torch.zeros(len(relative), 4, 4, dtype=torch.float64)
    move[:, 0, 1], move[:, 0, 2], move[:, 1, 2] = -z, y, -x
    move[:, 1, 0], move[:, 2, 0], move[:, 2, 1] = z, -y, x
    move[:, :3, 3] = error[:, :3] * share * length
    return relative @ torch.linalg.matrix_exp(move)


# ---- files ---------------------------------------------------------------------------------------------------------

KITTI_TR = (
    (4.276802385584e-04, -9.999672484946e-01, -8.084491683471e-03, -1.198459927713e-02),
    (-7.210626507497e-03, 8.081198471645e-03, -9.999413164504e-01, -5.403984729748e-02),
    (9.999738645903e-01, 4.859485810390e-04, -7.206933692422e-03, -2.921968648686e-01),
)
"""``Tr`` of KITTI sequences 00 to 02, velodyne to camera 0, for poses that come without a calib.txt."""


def _lines(path: Path, what: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no file {path}, expected {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as {what} ({error})") from error


def _numbers(path: Path, what: str, columns: int) -> np.ndarray:
    """A text file of rows of numbers, each of ``columns``; empty lines and comments (#) are skipped."""
    rows = []
    for number, line in enumerate(_lines(path, what), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}, expected {columns} numbers") from error
        if len(row) != columns:
            raise UserError(f"{path} line {number}: {len(row)} numbers, expected {columns} ({what})")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty, expected {what}")
    return np.array(rows)


def read_bin(path: Path, columns: int = 4) -> Tensor:
    """Points of a binary scan: float32 rows, KITTI x, y, z, reflectance (4), nuScenes x, y, z, intensity, ring (5).

    Raises:
        UserError: missing, empty, a size that is no multiple of a row, or a coordinate that is not finite.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read scan {path}: {error.strerror}, expected float32 rows of {columns}") from error
    if not raw or len(raw) % (4 * columns):
        raise UserError(f"scan {path} has {len(raw)} bytes, expected a positive multiple of {4 * columns}")
    return _checked(np.frombuffer(raw, dtype="<f4").reshape(-1, columns)[:, :3], path)


def _checked(points: np.ndarray, path: Path) -> Tensor:
    bad = ~np.isfinite(points).all(1)
    if not len(points):
        raise UserError(f"scan {path} holds no point")
    if bad.any():
        raise UserError(f"scan {path}: point {int(bad.argmax())} has a NaN or infinite coordinate")
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))


def read_feather(path: Path) -> Tensor:
    """Points of an Argoverse 2 sweep: columns x, y, z, in the vehicle's frame.

    Raises:
        UserError: missing, no feather file, a column is absent, or a coordinate is not finite.
    """
    from pyarrow import ArrowInvalid, feather

    try:
        table = feather.read_table(path, columns=["x", "y", "z"])
    except (OSError, ArrowInvalid, ValueError, KeyError) as error:
        raise UserError(f"sweep {path} is not a readable feather file with x, y, z ({error})") from error
    return _checked(np.stack([table[name].to_numpy() for name in ("x", "y", "z")], 1).astype(np.float32), path)


def read_ply(path: Path) -> Tensor:
    """Vertices of a PLY file, ASCII or binary little-endian, with scalar vertex properties that include x, y, z.

    Raises:
        UserError: missing, another form, truncated, or a coordinate that is not finite.
    """
    kinds = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1"}
    kinds |= {"char": "i1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4", "int32": "<i4"}
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}, expected a PLY point cloud") from error
    head, mark, body = raw.partition(b"end_header")
    words = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not mark or not words or words[0] != ["ply"]:
        raise UserError(f"{path} is no PLY file: expected a header from 'ply' to 'end_header'")
    elements = [line for line in words if line[:1] == ["element"]]
    if not elements or elements[0][1:2] != ["vertex"] or not elements[0][-1].isdigit():
        raise UserError(f"{path}: the first element is not 'vertex' with its number")
    count, form = int(elements[0][-1]), next((line[1] for line in words if line[:1] == ["format"]), "")
    begin = words.index(elements[0])
    stop = words.index(elements[1]) if len(elements) > 1 else len(words)
    fields = [line for line in words[begin:stop] if line[:1] == ["property"]]
    if any(line[1] not in kinds for line in fields) or not {"x", "y", "z"} <= {line[2] for line in fields}:
        raise UserError(f"{path}: vertex properties must be scalars that include x, y and z")
    body = body[body.index(b"\n") + 1 :]
    try:
        if form == "ascii":
            rows = np.array([line.split()[: len(fields)] for line in body.decode().splitlines()[:count]], dtype=float)
            table = {line[2]: rows[:, i] for i, line in enumerate(fields)}
        elif form == "binary_little_endian":
            dtype = np.dtype([(line[2], kinds[line[1]]) for line in fields])
            table = np.frombuffer(body, dtype=dtype, count=count)
        else:
            raise ValueError(f"format {form!r}")
        points = np.stack([table[name] for name in ("x", "y", "z")], 1)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {count} vertices announced, not readable as such ({error})") from error
    return _checked(points, path)


def read_poses(path: Path, calibration: Path | None = None) -> Tensor:
    """LiDAR poses of a KITTI sequence: camera poses (12 numbers a line) times ``Tr``.

    Args:
        path: the poses. calibration: the sequence's calib.txt; without it ``Tr`` of sequences 00 to 02.

    Raises:
        UserError: missing, a line without 12 numbers, or a calib.txt without ``Tr:``.
    """
    rows = torch.from_numpy(_numbers(path, "a KITTI pose file, 12 numbers a line", 12)).view(-1, 3, 4)
    tr = torch.tensor(KITTI_TR, dtype=torch.float64)
    if calibration is not None:
        lines = [line for line in _lines(calibration, "a KITTI calibration") if line.startswith("Tr")]
        values = lines[0].partition(":")[2].split() if lines else []
        if len(values) != 12:
            raise UserError(f"{calibration}: no line 'Tr:' with 12 numbers (velodyne to camera 0)")
        tr = torch.tensor([float(value) for value in values], dtype=torch.float64).view(3, 4)
    return _square(rows) @ _square(tr.unsqueeze(0))


def _square(rows: Tensor) -> Tensor:
    """(n, 3, 4) as (n, 4, 4)."""
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=rows.dtype).expand(len(rows), 1, 4)
    return torch.cat([rows, last], 1)


def read_covariance(path: Path) -> Tensor:
    """Covariances of the position in the plane, (n, 2, 2), from OverlapNet's covariance.txt (36 numbers a line)."""
    rows = _numbers(path, "6 x 6 covariances, 36 numbers a line", 36)
    return torch.from_numpy(rows).view(-1, 6, 6)[:, :2, :2].contiguous()


def kitti_drive(folder: Path, sequence: str = "00") -> Drive:
    """A KITTI odometry sequence: ``sequences/<s>/velodyne``, ``sequences/<s>/calib.txt``, ``poses/<s>.txt``.

    The authors' archive ``kitti00`` is taken too: ``velodyne`` beside the poses, calibration optional.

    Raises:
        UserError: a part is missing, or there are fewer poses than scans.
    """
    base = next((b for b in (folder / "sequences" / sequence, folder / "kitti00") if b.is_dir()), folder)
    scans = base / "velodyne"
    scans = scans / sequence if (scans / sequence).is_dir() else scans
    places = (folder / "poses" / f"{sequence}.txt", base / "poses.txt")
    poses = next((place for place in places if place.is_file()), places[0])
    calibration = base / "calib.txt"
    found = {int(file.stem): file for file in sorted(scans.glob("*.bin")) if file.stem.isdigit()}
    if not found:
        raise UserError(f"no scans *.bin in {scans}, expected KITTI sequence {sequence}")
    motion = read_poses(poses, calibration if calibration.is_file() else None)
    if max(found) >= len(motion):
        raise UserError(f"{poses} has {len(motion)} poses, scan {found[max(found)].name} needs {max(found) + 1}")

    def scan(frame: int) -> Tensor:
        if frame not in found:
            raise UserError(f"no scan {scans / f'{frame:06d}.bin'}")
        return read_bin(found[frame])

    return Drive(f"kitti{sequence}", motion, scan, scans)


def argoverse_drive(log: Path) -> Drive:
    """Sweeps of an Argoverse 2 log in the vehicle's frame: ``sensors/lidar``, ``city_SE3_egovehicle.feather``.

    Raises:
        UserError: no sweep, or a sweep without a pose.
    """
    from pyarrow import ArrowInvalid, feather

    path = log / "city_SE3_egovehicle.feather"
    sweeps = sorted((log / "sensors" / "lidar").glob("*.feather"))
    if not sweeps:
        raise UserError(f"no sensors/lidar/*.feather in {log}, expected an Argoverse 2 log")
    names = ["tx_m", "ty_m", "tz_m", "qx", "qy", "qz", "qw"]
    try:
        table = feather.read_table(path, columns=["timestamp_ns", *names])
    except (OSError, ArrowInvalid, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable feather file with timestamp_ns, {', '.join(names)}") from error
    row = {int(stamp): i for i, stamp in enumerate(table["timestamp_ns"].to_pylist())}
    lacking = [sweep for sweep in sweeps if int(sweep.stem) not in row]
    if lacking:
        raise UserError(f"{path} has no pose for sweep {lacking[0].name}")
    rows = np.stack([table[name].to_numpy() for name in names], 1)[[row[int(sweep.stem)] for sweep in sweeps]]
    return Drive(log.name[:8], poses_of(torch.from_numpy(rows)), lambda frame: read_feather(sweeps[frame]), log)


def read_descriptors(path: Path) -> tuple[Tensor, Tensor]:
    """The authors' stored descriptors of a scan: indices (n,) of key points in the raw scan, descriptors (n, D).

    Raises:
        UserError: missing, no npz, or arrays of another shape.
    """
    arrays = read_npz(path, ("inds", "pcd1_desc"))
    index, descriptor = arrays["inds"].reshape(-1), arrays["pcd1_desc"]
    if descriptor.ndim != 2 or len(descriptor) != len(index):
        raise UserError(f"{path}: pcd1_desc is {descriptor.shape}, expected ({len(index)}, dim) as many as inds")
    return torch.from_numpy(index.astype(np.int64)), torch.from_numpy(descriptor.astype(np.float32))


def read_results(path: Path, keys: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Result files of the authors: for each frame the candidate pairs and values for each of them.

    Args:
        path: JSON, frame -> {"indices_pairs": [[reference, current], ...], key: [value of each pair, ...]}.
        keys: values wanted.

    Returns:
        pairs (m, 2) and each key's values (m,), by frame; frames without candidates leave no trace.

    Raises:
        UserError: missing, no JSON, a key is lacking (those there are listed), or as many values as pairs are not.
    """
    content = read_json(path, "results")
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise UserError(f"{path}: expected a JSON object, frame -> {{indices_pairs, {', '.join(keys)}}}")
    pairs: list[Any] = []
    values: dict[str, list[float]] = {key: [] for key in keys}
    for frame, row in content.items():
        lacking = [key for key in ("indices_pairs", *keys) if key not in row]
        if lacking:
            raise UserError(f"{path}: frame {frame} has no {lacking[0]!r}, there are {', '.join(sorted(row))}")
        pairs += row["indices_pairs"]
        for key in keys:
            if len(row[key]) != len(row["indices_pairs"]):
                raise UserError(
                    f"{path}: frame {frame} has {len(row['indices_pairs'])} pairs and {len(row[key])} {key}"
                )
            values[key] += row[key]
    try:
        out = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        return torch.tensor(pairs, dtype=torch.int64).view(-1, 2), out
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: pairs must be two frame numbers each, values numbers ({error})") from error


@dataclass(frozen=True)
class IrisResults:
    """LiDAR-Iris: ``score`` (n,), minus the distance; ``hit`` (n,) bool; ``loops``: number of frames with a loop."""

    score: Tensor
    hit: Tensor
    loops: int


def read_lidar_iris(folder: Path, sequence: str) -> IrisResults:
    """Shipped results of LiDAR-Iris: ``test_res<s>.txt`` (frame, match, distance, right) and ``gt<s>.txt``.

    A frame counts as a loop when its list of near frames holds one at least 300 frames earlier, as the matches do.

    Raises:
        UserError: missing or malformed; a row whose last column contradicts the ground truth.
    """
    rows = _numbers(folder / f"test_res{sequence}.txt", "frame, match, distance, 0 or 1", 4)
    path = folder / f"gt{sequence}.txt"
    near: dict[int, set[int]] = {}
    for number, line in enumerate(_lines(path, "frame and near frames"), 1):
        if not line.split():
            continue
        try:
            frame, *others = (int(word) for word in line.split())
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}, expected frame numbers") from error
        near[frame] = set(others)
    for frame, match, _, right in rows:
        if (int(match) in near.get(int(frame), set())) != bool(right):
            raise UserError(f"{path}: frame {int(frame)} and match {int(match)} contradict test_res{sequence}.txt")
    loops = sum(any(other <= frame - IRIS_GAP for other in near.get(frame, ())) for frame in rows[:, 0].astype(int))
    return IrisResults(torch.from_numpy(-rows[:, 2].copy()), torch.from_numpy(rows[:, 3] > 0), loops)


IRIS_GAP = 300
"""LiDAR-Iris matches frames at least this far back."""


# ---- 3DMatch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FragmentPair:
    """Two fragments of a scene and the HDF5 data set of their correspondences."""

    first: Path
    second: Path
    store: Path
    key: str


def find_fragments(folder: Path) -> list[FragmentPair]:
    """Training pairs of 3DMatch as DIP prepares them.

    ``3DMatch_train/<scene>/01_Data/cloud_bin_N.ply`` and ``3DMatch_train_pre/correspondences/<scene>.hdf5`` with a data
    set ``"i,j"`` of index pairs for each pair of fragments.

    Raises:
        UserError: nothing there, an unreadable file, or a fragment is missing.
    """
    import h5py

    pairs = []
    stores = sorted((folder / "3DMatch_train_pre" / "correspondences").glob("*.hdf5"))
    for store in stores:
        scene = folder / "3DMatch_train" / store.stem / "01_Data"
        try:
            with h5py.File(store, "r") as file:
                keys = sorted(file)
        except OSError as error:
            raise UserError(f"{store} is not a readable HDF5 file ({error})") from error
        for key in keys:
            numbers = key.split(",")
            if len(numbers) != 2 or not all(n.strip().isdigit() for n in numbers):
                raise UserError(f"{store}: data set {key!r}, expected names such as '0,1'")
            first, second = (scene / f"cloud_bin_{int(n)}.ply" for n in numbers)
            if not (first.is_file() and second.is_file()):
                raise UserError(f"{store}: data set {key!r} needs {first} and {second.name}, not both are there")
            pairs.append(FragmentPair(first, second, store, key))
    if not pairs:
        raise UserError(f"no correspondences in {folder}, expected 3DMatch_train_pre/correspondences/<scene>.hdf5")
    return pairs


def read_fragments(pair: FragmentPair) -> tuple[Tensor, Tensor, Tensor]:
    """Points of both fragments and their correspondences (m, 2).

    Raises:
        UserError: unreadable, or an index beyond the points.
    """
    import h5py

    first, second = read_ply(pair.first), read_ply(pair.second)
    with h5py.File(pair.store, "r") as file:
        index = np.asarray(file[pair.key])
    if index.ndim != 2 or index.shape[1] != 2 or not len(index):
        raise UserError(f"{pair.store}: {pair.key!r} is {index.shape}, expected (m, 2) indices")
    if index.min() < 0 or (index.max(0) >= (len(first), len(second))).any():
        raise UserError(f"{pair.store}: {pair.key!r} points beyond the {len(first)} and {len(second)} points")
    return first, second, torch.from_numpy(index.astype(np.int64))


def read_info(path: Path) -> Tensor:
    """Pose (4, 4) of a 3DMatch fragment: ``cloud_bin_N.info.txt``, a line of names and four rows.

    Raises:
        UserError: missing or malformed.
    """
    rows = [line.split() for line in _lines(path, "a header and a 4 x 4 pose")[1:5]]
    if [len(row) for row in rows] != [4, 4, 4, 4]:
        raise UserError(f"{path}: expected a header line and four rows of four numbers")
    return torch.tensor([[float(word) for word in row] for row in rows], dtype=torch.float64)


# ---- TUM RGB-D -----------------------------------------------------------------------------------------------------

TUM_CAMERAS = {
    "fr1": (517.3, 516.5, 318.6, 255.3),
    "fr2": (520.9, 521.0, 325.1, 249.7),
    "fr3": (535.4, 539.2, 320.1, 247.6),
    "icl": (481.2, -480.0, 319.5, 239.5),
}
"""fx, fy, cx, cy of the depth images; ICL-NUIM's y axis points up."""


def tum_drive(folder: Path, camera: str, every: int, stride: int = 2, reach: float = 4.0) -> Drive:
    """Key frames of a TUM RGB-D or ICL-NUIM sequence as clouds: ``depth/*.png`` and ``groundtruth.txt``.

    Args:
        camera: a key of ``TUM_CAMERAS``. every: depth images from one key frame to the next. stride: pixels from one
            point to the next. reach: metres, farther points are left out.

    Raises:
        UserError: a part is missing, or no depth image has a pose within 20 ms.
    """
    truth = _numbers(folder / "groundtruth.txt", "t tx ty tz qx qy qz qw", 8)
    images = sorted((folder / "depth").glob("*.png"), key=lambda file: float(file.stem))
    if not images:
        raise UserError(f"no depth/*.png in {folder}, expected a TUM RGB-D sequence")
    stamp = np.array([float(file.stem) for file in images])
    index = np.abs(truth[:, :1] - stamp).argmin(0)
    keep = np.flatnonzero(np.abs(truth[index, 0] - stamp) < 0.02)[::every]
    if not len(keep):
        raise UserError(f"{folder}: no depth image has a pose in groundtruth.txt within 20 ms")
    fx, fy, cx, cy = TUM_CAMERAS[camera]

    def scan(frame: int) -> Tensor:
        from PIL import Image

        path = images[keep[frame]]
        try:
            with Image.open(path) as image:
                depth = np.asarray(image, dtype=np.float32)[::stride, ::stride] / 5000
        except OSError as error:
            raise UserError(f"{path} is not a readable image ({error})") from error
        v, u = np.nonzero((depth > 0) & (depth < reach))
        z = depth[v, u]
        # Forward, left, up, as laser scanners have it; a camera looks along z with y down.
        return _checked(np.stack([z, -(u * stride - cx) / fx * z, -(v * stride - cy) / fy * z], 1), path)

    forward = torch.zeros(4, 4, dtype=torch.float64)
    forward[2, 0], forward[0, 1], forward[1, 2], forward[3, 3] = 1, -1, -1, 1
    return Drive(folder.name, poses_of(torch.from_numpy(truth[index[keep], 1:])) @ forward, scan, folder)


def poses_of(rows: Tensor) -> Tensor:
    """Poses (n, 4, 4) of rows (n, 7) x, y, z, qx, qy, qz, qw."""
    q = rows[:, 3:] / rows[:, 3:].norm(dim=1, keepdim=True)
    x, y, z, w = q.unbind(1)
    rotation = torch.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
            *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
            *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
        ],
        1,
    ).view(-1, 3, 3)
    return _square(torch.cat([rotation, rows[:, :3].unsqueeze(2)], 2))


# ---- g2o -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class G2O:
    """A pose graph as in a g2o file: ``vertices`` (n, 7) and ``measurements`` (e, 7) as x, y, z, qx, qy, qz, qw;
    ``edges`` (e, 2) positions in ``vertices``; ``information`` (e, 6, 6), translation first."""

    vertices: Tensor
    edges: Tensor
    measurements: Tensor
    information: Tensor


_UPPER = np.triu_indices(6)


def read_g2o(path: Path) -> G2O:
    """Read ``VERTEX_SE3:QUAT`` and ``EDGE_SE3:QUAT`` lines; ``FIX`` is skipped, vertices are ordered by number.

    Raises:
        UserError: missing, another kind of line, a wrong number of values, or an edge to a vertex that is not there.
    """
    vertices: dict[int, list[float]] = {}
    edges: list[tuple[int, int]] = []
    values: list[list[float]] = []
    for number, line in enumerate(_lines(path, "a g2o pose graph"), 1):
        tag, *words = line.split() or [""]
        if tag in ("", "FIX") or tag.startswith("#"):
            continue
        expected = {"VERTEX_SE3:QUAT": (1, 7), "EDGE_SE3:QUAT": (2, 28)}.get(tag)
        if expected is None:
            raise UserError(f"{path} line {number}: {tag}, expected VERTEX_SE3:QUAT or EDGE_SE3:QUAT")
        try:
            names, row = [int(w) for w in words[: expected[0]]], [float(w) for w in words[expected[0] :]]
        except ValueError as error:
            raise UserError(f"{path} line {number}: {error}") from error
        if len(names) + len(row) != sum(expected) or not np.isfinite(row).all() or not any(row[3:7]):
            raise UserError(
                f"{path} line {number}: expected {sum(expected)} finite numbers behind {tag}, quaternion not 0"
            )
        if len(names) == 1:
            vertices[names[0]] = row
        else:
            edges.append((names[0], names[1]))
            values.append(row)
    if not vertices or not edges:
        raise UserError(f"{path}: {len(vertices)} vertices and {len(edges)} edges, expected some of both")
    order = {name: place for place, name in enumerate(sorted(vertices))}
    lacking = sorted({name for edge in edges for name in edge} - set(order))
    if lacking:
        raise UserError(f"{path}: an edge names vertex {lacking[0]}, which is not there")
    table = np.array(values)
    information = np.zeros((len(edges), 6, 6))
    information[:, _UPPER[0], _UPPER[1]] = information[:, _UPPER[1], _UPPER[0]] = table[:, 7:]
    return G2O(
        torch.tensor([vertices[name] for name in order], dtype=torch.float64),
        torch.tensor([[order[i], order[j]] for i, j in edges]),
        torch.from_numpy(table[:, :7].copy()),
        torch.from_numpy(information),
    )


def write_g2o(path: Path, graph: G2O) -> None:
    """Write a pose graph as a g2o file, numbers to the last digit."""

    def text(row: Any) -> str:
        return " ".join(repr(float(value)) for value in row)

    lines = [f"VERTEX_SE3:QUAT {i} {text(row)}" for i, row in enumerate(graph.vertices.tolist())]
    upper = graph.information[:, _UPPER[0], _UPPER[1]].tolist()
    for (i, j), row, matrix in zip(graph.edges.tolist(), graph.measurements.tolist(), upper, strict=True):
        lines.append(f"EDGE_SE3:QUAT {i} {j} {text(row)} {text(matrix)}")
    write_text(path, "\n".join(lines) + "\n")
