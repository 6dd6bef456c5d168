"""AdvSim: bicycle-model attacks on recorded traffic, LiDAR re-simulation, closed-loop simulation and objective.

Everything works on many simulations at once: ``S`` scenes, ``Q`` candidates a scene, ``B = S * Q`` simulations,
``N`` actors, ``L = HISTORY + T + 1`` time steps of ``DT`` seconds (index ``HISTORY`` is now), ``K`` knots.
A state is (x, y, heading, speed, curvature); a box is (x, y, heading, length, width) of its centre. The ground is the
plane z = 0, boxes stand on it. The ego's state is that of its rear axle.

The stacks that are tested stand in ``stacks.py``, the searches in ``search.py``; nothing here needs them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", message=r"index_reduce\(\) is in beta")

DT = 0.1
"""Seconds of a simulation step."""
HISTORY = 5
"""Recorded steps before the first simulated one."""
EGO_SIZE = (4.877, 2.0, 1.473)
"""Length, width and height of the ego box in metres (Argoverse 2's EGO_VEHICLE rows)."""
EGO_CENTRE = 1.35
"""Metres from the rear axle, where the ego's state is, forward to the centre of its box."""
SENSOR_HEIGHT = 1.97
"""Metres from the ground up to the LiDAR, which is above the centre of the ego box."""


# ---- geometry --------------------------------------------------------------------------------------------------


def wrap(angle: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def in_frame(offset: Tensor, heading: Tensor) -> tuple[Tensor, Tensor]:
    """How far forward and how far to the left vectors (..., 2) point, seen along a heading (...)."""
    cos, sin = heading.cos(), heading.sin()
    return offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin


def ego_boxes(states: Tensor) -> Tensor:
    """Boxes (..., 5) of ego states (..., >= 3)."""
    x, y, heading = states[..., 0], states[..., 1], states[..., 2]
    size = torch.tensor(EGO_SIZE[:2], dtype=states.dtype).expand(*x.shape, 2)
    centre = torch.stack([x + EGO_CENTRE * heading.cos(), y + EGO_CENTRE * heading.sin(), heading], -1)
    return torch.cat([centre, size], -1)


def corners(boxes: Tensor) -> Tensor:
    """Corners (..., 4, 2) of boxes (..., 5), counter-clockwise from the front left."""
    signs = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=boxes.dtype)
    along, across = (signs * boxes[..., None, 3:5] / 2).unbind(-1)
    cos, sin = boxes[..., 2:3].cos(), boxes[..., 2:3].sin()
    return torch.stack([boxes[..., 0:1] + along * cos - across * sin, boxes[..., 1:2] + along * sin + across * cos], -1)


def separation(a: Tensor, b: Tensor) -> Tensor:
    """Largest gap of two boxes over their four axes: below 0 iff they overlap, and then minus the penetration depth.

    For disjoint boxes it is a lower bound of their distance, exact unless corner meets corner.

    Args:
        a, b: boxes (..., 5), broadcast.
    """
    dx, dy, turn = b[..., 0] - a[..., 0], b[..., 1] - a[..., 1], b[..., 2] - a[..., 2]
    cos_a, sin_a, cos_b, sin_b = a[..., 2].cos(), a[..., 2].sin(), b[..., 2].cos(), b[..., 2].sin()
    c, s = turn.cos().abs(), turn.sin().abs()
    la, wa, lb, wb = a[..., 3] / 2, a[..., 4] / 2, b[..., 3] / 2, b[..., 4] / 2
    gap = (dx * cos_a + dy * sin_a).abs() - (la + lb * c + wb * s)
    gap = torch.maximum(gap, (dy * cos_a - dx * sin_a).abs() - (wa + lb * s + wb * c))
    gap = torch.maximum(gap, (dx * cos_b + dy * sin_b).abs() - (lb + la * c + wa * s))
    return torch.maximum(gap, (dy * cos_b - dx * sin_b).abs() - (wb + la * s + wa * c))


def point_distance(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances of points (..., 2) from boxes (..., 5), 0 inside; broadcast."""
    along, across = in_frame(points - boxes[..., :2], boxes[..., 2])
    along, across = along.abs() - boxes[..., 3] / 2, across.abs() - boxes[..., 4] / 2
    return torch.hypot(along.clamp_min(0), across.clamp_min(0))


def signed_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance of two boxes (..., 5) that are disjoint, minus the penetration depth of two that overlap."""
    a, b = torch.broadcast_tensors(a, b)
    apart = torch.minimum(
        point_distance(corners(a), b.unsqueeze(-2)).amin(-1), point_distance(corners(b), a.unsqueeze(-2)).amin(-1)
    )
    gap = separation(a, b)
    return torch.where(gap < 0, gap, apart)


def box_iou(a: Tensor, b: Tensor, side: int = 24) -> Tensor:
    """Intersection over union of boxes (..., 5), the intersection from ``side`` squared sample points of ``a``."""
    unit = (torch.arange(side, dtype=a.dtype) + 0.5) / side - 0.5
    along, across = torch.meshgrid(unit, unit, indexing="ij")
    along, across = along.reshape(-1) * a[..., 3:4], across.reshape(-1) * a[..., 4:5]
    cos, sin = a[..., 2:3].cos(), a[..., 2:3].sin()
    points = torch.stack([a[..., 0:1] + along * cos - across * sin, a[..., 1:2] + along * sin + across * cos], -1)
    share = (point_distance(points, b.unsqueeze(-2)) == 0).to(a.dtype).mean(-1)
    both = share * a[..., 3] * a[..., 4]
    return both / (a[..., 3] * a[..., 4] + b[..., 3] * b[..., 4] - both)


# ---- actors that keep to a kinematic bicycle -------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What an actor can do: m/s^2, 1/m, 1/(m s), m/s^2; top speed is ``factor * recorded maximum + extra``."""

    brake: float = 6.0
    throttle: float = 4.0
    curvature: float = 0.2
    curvature_rate: float = 0.2
    lateral: float = 5.0
    factor: float = 1.3
    extra: float = 3.0

    def top_speed(self, recorded: Tensor) -> Tensor:
        """Top speed of an actor that was recorded at this speed at most."""
        return self.factor * recorded + self.extra


def bicycle(start: Tensor, controls: Tensor, limits: Limits | None = None, top: Tensor | None = None) -> Tensor:
    """Integrate the kinematic bicycle, position first (explicit Euler).

    All limits hold at once after every step: curvature may only change at its rate, and where it cannot fall fast
    enough for the lateral limit the speed stays behind instead.

    Args:
        start: states (..., 5). controls: (..., T, 2), acceleration and change of curvature a second.
        limits: ``None`` integrates as given, but for a speed of at least 0. top: (...) top speed, with ``limits``.

    Returns:
        States (..., T + 1, 5), the start included.
    """
    x, y, heading, v, kappa = start.unbind(-1)
    states = [start]
    for a, u in zip(controls[..., 0].unbind(-1), controls[..., 1].unbind(-1), strict=True):
        if limits is not None:
            a, u = a.clamp(-limits.brake, limits.throttle), u.clamp(-limits.curvature_rate, limits.curvature_rate)
        x, y = x + v * heading.cos() * DT, y + v * heading.sin() * DT
        heading, next_kappa, next_v = heading + v * kappa * DT, kappa + u * DT, (v + a * DT).clamp_min(0)
        if limits is not None:
            if top is not None:
                next_v = torch.minimum(next_v, torch.maximum(top, v - limits.brake * DT))
            most = (limits.lateral / next_v.square().clamp_min(1e-6)).clamp_max(limits.curvature)
            change, wanted = limits.curvature_rate * DT, torch.clamp(next_kappa, -most, most)
            next_kappa = torch.clamp(wanted, kappa - change, kappa + change)
            next_v = torch.minimum(next_v, (limits.lateral / next_kappa.abs().clamp_min(1e-6)).sqrt())
        v, kappa = next_v, next_kappa
        states.append(torch.stack([x, y, heading, v, kappa], -1))
    return torch.stack(states, -2)


def within_limits(states: Tensor, limits: Limits, top: Tensor, tolerance: float = 2e-3) -> Tensor:
    """Whether trajectories (..., T + 1, 5) keep to every limit; (...) bool. ``top`` is (...)."""
    v, kappa = states[..., 3], states[..., 4]
    a, u = v.diff(dim=-1) / DT, kappa.diff(dim=-1) / DT
    slack = 1 + tolerance
    top = torch.maximum(top, v[..., 0])
    ok = (a >= -limits.brake * slack - tolerance).all(-1) & (a <= limits.throttle * slack + tolerance).all(-1)
    ok &= (u.abs() <= limits.curvature_rate * slack + tolerance).all(-1) & (v >= 0).all(-1)
    ok &= (kappa.abs() <= limits.curvature * slack).all(-1) & (v <= top.unsqueeze(-1) * slack).all(-1)
    return ok & (v.square() * kappa.abs() <= limits.lateral * slack).all(-1)


def fit_bicycle(track: Tensor, limits: Limits, window: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bicycle controls that reproduce recorded tracks.

    Below 0.5 m/s a track is taken as straight: its heading is noise and its curvature a division by nothing.

    Args:
        track: (N, L, 3) recorded boxes' x, y, heading. window: samples of the Savitzky-Golay filter; 1: none.

    Returns:
        start (N, 5) and controls (N, T, 2) from ``HISTORY`` on, top speeds (N,), and the largest distance (N,) in
        metres between the recording and what the controls give within the limits.
    """
    from scipy.signal import savgol_filter

    raw = track.double()
    smooth = raw if window == 1 else torch.from_numpy(savgol_filter(raw.numpy(), window, 2, axis=1))
    step = smooth[:, 1:, :2] - smooth[:, :-1, :2]
    v = step.norm(dim=-1) / DT
    course, moving = torch.atan2(step[..., 1], step[..., 0]), v >= 0.5
    course = torch.where(moving, course, raw[:, :-1, 2])
    for t in range(1, course.shape[1]):  # a slow actor keeps its heading; angles are unwrapped on the way
        turn = torch.where(moving[:, t], wrap(course[:, t] - course[:, t - 1]), 0)
        course[:, t] = course[:, t - 1] + turn
    if window > 1:
        course = torch.from_numpy(savgol_filter(course.numpy(), window, 2, axis=1))
    kappa = torch.where(moving[:, :-1], course.diff(dim=1) / (v[:, :-1].clamp_min(0.5) * DT), 0)
    kappa = F.pad(kappa, (0, 1))
    most = (limits.lateral / v.square().clamp_min(1e-6)).clamp_max(limits.curvature)
    kappa = torch.maximum(torch.minimum(kappa, most), -most)
    place, course, v, kappa = smooth[:, HISTORY:, :2], course[:, HISTORY:], v[:, HISTORY:], kappa[:, HISTORY:]
    top = limits.top_speed(v.amax(1))
    start = torch.cat([place[:, 0], torch.stack([course[:, 0], v[:, 0], kappa[:, 0]], -1)], -1)
    state, controls, states = start, [], [start]
    for t in range(v.shape[1]):  # follow the recording: what noise or a limit took away is steered back
        after = min(t + 1, v.shape[1] - 1)
        ahead, left = in_frame(place[:, t] - state[:, :2], state[:, 2])
        wanted = kappa[:, after] + 0.09 * left + 0.6 * wrap(course[:, t] - state[:, 2])
        u = (torch.where(state[:, 3] >= 0.5, wanted, 0) - state[:, 4]) / DT
        a = (v[:, after] - state[:, 3]) / DT + ahead
        control = torch.stack([a.clamp(-limits.brake, limits.throttle), u], -1)
        control[:, 1].clamp_(-limits.curvature_rate, limits.curvature_rate)
        state = bicycle(state, control[:, None], limits, top)[:, 1]
        controls.append(control)
        states.append(state)
    error = (torch.stack(states, 1)[..., :2] - raw[:, HISTORY:, :2]).norm(dim=-1).amax(1)
    return start.to(track), torch.stack(controls, 1).to(track), top.to(track), error.to(track)


@dataclass(frozen=True)
class Scene:
    """A recorded scene; stacked scenes have a leading dimension ``S`` in every tensor.

    Attributes:
        ego: (L, 5) the expert's states. tracks: (N, L, 3) actors' x, y, heading; present: (N, L) bool.
        size: (N, 3) length, width, height. route: (P, 4) x, y, heading, curvature every metre along the ego's path.
        drivable: (G, G) bool raster, indexed [row of y, column of x]; corner: (2,) its lower left x and y.
        speed_limit: () m/s. actors: (m,) indices of the actors to perturb, with their fitted start (m, 5),
        controls (m, T, 2) and top speed (m,).
    """

    ego: Tensor
    tracks: Tensor
    present: Tensor
    size: Tensor
    route: Tensor
    drivable: Tensor
    corner: Tensor
    speed_limit: Tensor
    actors: Tensor
    start: Tensor
    controls: Tensor
    top: Tensor

    def pick(self, index: Tensor | slice) -> Scene:
        """Some of the stacked scenes."""
        return Scene(*(getattr(self, field.name)[index] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.ego)


CELL = 0.4
"""Metres of a cell of the drivable raster."""


def stack(scenes: Sequence[Scene]) -> Scene:
    """Scenes as one, with actors padded to the largest number; padding is never present."""
    most = max(scene.tracks.shape[0] for scene in scenes)

    def padded(scene: Scene) -> Scene:
        missing = most - scene.tracks.shape[0]

        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

        return replace(scene, tracks=pad(scene.tracks), present=pad(scene.present), size=pad(scene.size))

    full = [padded(scene) for scene in scenes]
    return Scene(*(torch.stack([getattr(scene, field.name) for scene in full]) for field in fields(Scene)))


@dataclass(frozen=True)
class Attack:
    """How a vector in [-1, 1]^D becomes actors' trajectories: knots a second apart, largest changes, limits."""

    knots: int = 5
    acceleration: float = 3.0
    curvature_rate: float = 0.05
    limits: Limits = Limits()

    def size(self, actors: int) -> int:
        """Length D of the vector for this many actors."""
        return actors * 2 * self.knots


def perturb(scenes: Scene, which: Tensor, delta: Tensor, attack: Attack) -> Tensor:
    """Trajectories (B, m, T + 1, 5) of the perturbed actors.

    Args:
        which: (B,) index of each simulation's scene. delta: (B, D) in [-1, 1].

    Raises:
        ValueError: delta of another length, or outside [-1, 1].
    """
    actors, steps = scenes.controls.shape[1:3]
    if delta.shape[-1] != attack.size(actors):
        raise ValueError(f"delta has {delta.shape[-1]} numbers, expected {attack.size(actors)} for {actors} actors")
    if len(delta) and not delta.abs().max() <= 1:
        raise ValueError(f"delta reaches {delta.abs().max():.3g}, expected numbers in [-1, 1]")
    knots = delta.view(-1, 2, attack.knots)
    at = torch.linspace(0, attack.knots - 1, steps)
    low = at.long().clamp_max(max(attack.knots - 2, 0))
    high = (low + 1).clamp_max(attack.knots - 1)
    values = knots[..., low] + (at - low) * (knots[..., high] - knots[..., low])
    values = values.view(len(delta), actors, 2, steps).movedim(2, -1)
    scale = torch.tensor([attack.acceleration, attack.curvature_rate])
    controls = scenes.controls[which] + scale * values
    return bicycle(scenes.start[which], controls, attack.limits, scenes.top[which])


def world_tracks(scenes: Scene, which: Tensor, moved: Tensor) -> Tensor:
    """All actors' tracks (B, N, L, 3), the perturbed ones (B, m, T + 1, 5) from now on in place of the recorded."""
    tracks = scenes.tracks[which].clone()
    rows = torch.arange(len(which)).unsqueeze(1)
    tracks[rows, scenes.actors[which], HISTORY:] = moved[..., :3]
    return tracks


def actor_boxes(tracks: Tensor, size: Tensor) -> Tensor:
    """Boxes (B, N, L, 5) of tracks (B, N, L, 3) and sizes (B, N, 3)."""
    return torch.cat([tracks, size[:, :, None, :2].expand(*tracks.shape[:3], 2)], -1)


def on_road(scenes: Scene, which: Tensor, boxes: Tensor) -> Tensor:
    """Whether all corners of boxes (B, ..., 5) are on the drivable raster of their scene; (B, ...) bool."""
    shape = (-1,) + (1,) * (boxes.dim() - 1)
    points = corners(boxes)
    column = ((points[..., 0] - scenes.corner[which, 0].view(shape)) / CELL).floor().long()
    row = ((points[..., 1] - scenes.corner[which, 1].view(shape)) / CELL).floor().long()
    side = scenes.drivable.shape[-1]
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    flat = (which.view(shape) * side + row.clamp(0, side - 1)) * side + column.clamp(0, side - 1)
    return (scenes.drivable.reshape(-1)[flat] & inside).all(-1)


def feasible(scenes: Scene, which: Tensor, delta: Tensor, attack: Attack, clearance: float = 0.0) -> Tensor:
    """Which perturbations leave a plausible and solvable scene; (B,) bool.

    The perturbed actors stay on the road (at most a fifth of the frames more outside than recorded), touch no other
    actor, and keep more than ``clearance`` metres from the expert's ego: its recorded drive stays a safe solution.
    """
    moved = perturb(scenes, which, delta, attack)
    rows, chosen = torch.arange(len(which)).unsqueeze(1), scenes.actors[which]
    tracks, size, present = world_tracks(scenes, which, moved), scenes.size[which], scenes.present[which]
    boxes = actor_boxes(tracks, size)[:, :, HISTORY:]
    mine = boxes[rows, chosen]
    now = actor_boxes(scenes.tracks[which], size)[rows, chosen, HISTORY:]
    outside = (~on_road(scenes, which, mine)).float().mean(-1) - (~on_road(scenes, which, now)).float().mean(-1)
    expert = ego_boxes(scenes.ego[which, HISTORY:])
    clear = (signed_distance(mine, expert.unsqueeze(1)) > clearance).all(-1)
    ok = ((outside <= 0.2) & clear).all(1)
    others = separation(mine.unsqueeze(2), boxes.unsqueeze(1)) > 0  # (B, m, N, T + 1)
    itself = chosen.unsqueeze(-1) == torch.arange(boxes.shape[1])
    others |= itself.unsqueeze(-1) | ~present[:, None, :, HISTORY:]
    return ok & others.all(-1).all(-1).all(-1)


class NotUsable(ValueError):
    """A recording that makes no scene; says why."""


def make_scene(
    ego: Tensor,
    tracks: Tensor,
    present: Tensor,
    size: Tensor,
    movable: Tensor,
    route: Tensor,
    drivable: Tensor,
    corner: Tensor,
    speed_limit: float,
    actors: int,
    attack: Attack,
    clearance: float = 0.0,
    error: float = 0.3,
    reach: float = 40.0,
) -> Scene:
    """The scene of a recording: the actors that come nearest to the expert are fitted with a bicycle.

    Args:
        ego ... speed_limit: as of ``Scene``. movable: (N,) bool, vehicles and cyclists.
        actors: how many to perturb. clearance: metres that the expert must keep from everybody in the recording.
        error: metres up to which a fit must give the recording. reach: metres within which an actor must come.

    Raises:
        NotUsable: the expert collides in the recording, or too few actors can be perturbed; says why of each.
    """
    gap = signed_distance(ego_boxes(ego)[None], actor_boxes(tracks[None], size[None])[0]).masked_fill(~present, 1e3)
    if float(gap[:, HISTORY:].min()) <= clearance:
        raise NotUsable("the expert touches an actor in the recording")
    known = present[:, : HISTORY + 21].all(1)
    travelled = (tracks[:, 1:, :2] - tracks[:, :-1, :2]).norm(dim=-1) * (present[:, 1:] & present[:, :-1])
    tracks, extended = continue_tracks(tracks, present), present.clone()
    extended[:, HISTORY:] |= known[:, None]
    nearest = gap[:, HISTORY:].amin(1)
    start, controls, top, wrong = fit_bicycle(tracks, attack.limits)
    reasons = {
        "not a vehicle or cyclist": ~movable,
        "too short": ~known,
        "too slow": travelled.sum(1) < 2,
        "too far": nearest > reach,
        "no bicycle fits": ~(wrong < error),
    }
    refused = torch.stack(list(reasons.values()))
    possible = (~refused.any(0)).nonzero()[:, 0]
    chosen: list[int] = []
    failed = 0

    def scene(members: list[int]) -> Scene:
        index, shown = torch.tensor(members), present.clone()
        shown[index] = extended[index]
        return Scene(
            ego=ego,
            tracks=tracks,
            present=shown,
            size=size,
            route=route,
            drivable=drivable,
            corner=corner,
            speed_limit=torch.tensor(speed_limit),
            actors=index,
            start=start[index],
            controls=controls[index],
            top=top[index],
        )

    for i in possible[nearest[possible].argsort()].tolist():
        tried = stack([scene([*chosen, i])])
        zero = torch.zeros(1, attack.size(len(chosen) + 1))
        if bool(feasible(tried, torch.zeros(1, dtype=torch.long), zero, attack)):
            chosen.append(i)
        else:
            failed += 1
        if len(chosen) == actors:
            return scene(chosen)
    first = refused.int().argmax(0)[refused.any(0)]
    counts = {name: int((first == k).sum()) for k, name in enumerate(reasons)} | {"touches another": failed}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none there"
    raise NotUsable(f"{len(chosen)} of {actors} actors can be perturbed ({said})")


def continue_tracks(tracks: Tensor, present: Tensor) -> Tensor:
    """Tracks (N, L, 3) that end inside the window, continued at constant velocity."""
    index = torch.arange(tracks.shape[1])
    last = (present * index).amax(1)  # 0 where never present
    rows = torch.arange(len(tracks))
    end = tracks[rows, last]
    speed = torch.where((last > 0)[:, None], end[:, :2] - tracks[rows, (last - 1).clamp_min(0)][:, :2], 0)
    after = (index - last[:, None]).clamp_min(0)
    ahead = torch.cat(
        [end[:, None, :2] + after[..., None] * speed[:, None], end[:, None, 2:].expand(-1, len(index), 1)], -1
    )
    return torch.where((after > 0)[..., None], ahead, tracks)


# ---- LiDAR -----------------------------------------------------------------------------------------------------


def ray_box(origin: Tensor, direction: Tensor, centre: Tensor, yaw: Tensor, half: Tensor, exit: bool = False) -> Tensor:
    """Range at which rays enter boxes, infinity where they miss; 0 from inside, or the way out with ``exit``.

    Args:
        origin: (..., 3). direction: (..., 3). centre: (..., 3). yaw: (...). half: (..., 3) half sizes. Broadcast.
    """
    cos, sin = yaw.cos(), yaw.sin()

    def turned(vector: Tensor) -> Tensor:
        x, y, z = vector.unbind(-1)
        return torch.stack([x * cos + y * sin, y * cos - x * sin, z.expand_as(x * cos)], -1)

    o, d = turned(origin - centre), turned(direction)
    d = torch.where(d.abs() < 1e-12, torch.full_like(d, 1e-12), d)
    t1, t2 = (-half - o) / d, (half - o) / d
    enter, leave = torch.minimum(t1, t2).amax(-1), torch.maximum(t1, t2).amin(-1)
    hit = leave >= enter.clamp_min(0)
    inside = leave if exit else torch.zeros_like(enter)
    return torch.where(hit, torch.where(enter > 0, enter, inside), math.inf)


def cast_dense(origin: Tensor, direction: Tensor, boxes: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges and ids of every ray against every upright box and the ground: the formula, term by term.

    Args:
        origin: (3,). direction: (R, 3) unit. boxes: (N, 5). height: (N,).

    Returns:
        ranges (R,), infinity where nothing is hit, and the box hit (R,), -1 for the ground or nothing.
    """
    half = torch.stack([boxes[:, 3] / 2, boxes[:, 4] / 2, height / 2], -1)
    centre = torch.cat([boxes[:, :2], height[:, None] / 2], -1)
    hits = ray_box(origin, direction.unsqueeze(1), centre, boxes[:, 2], half)
    ground = torch.where(direction[:, 2] < 0, -origin[2] / direction[:, 2], math.inf)
    nearest, index = torch.cat([ground.unsqueeze(1), hits], 1).min(1)
    return nearest, index - 1


@dataclass(frozen=True)
class Sweep:
    """Simulated returns of B sweeps of R = azimuths x beams rays.

    Attributes:
        points: (B, R, 3) in the world. valid: (B, R) bool. ids: (B, R) the actor hit, -1 for the ground or nothing.
        origin: (B, 2) where the sensor stood.
    """

    points: Tensor
    valid: Tensor
    ids: Tensor
    origin: Tensor


@dataclass(frozen=True)
class Lidar:
    """A spinning LiDAR: beams at elevations between two angles in degrees, azimuths a turn, metres, drop rate."""

    beams: int = 32
    azimuths: int = 720
    lowest: float = -25.0
    highest: float = 15.0
    reach: float = 80.0
    noise: float = 0.02
    drop: float = 0.05
    seed: int = 0

    def angles(self) -> tuple[Tensor, Tensor]:
        """Azimuths (A,), symmetric about 0, and elevations (E,) in radians."""
        azimuth = (torch.arange(self.azimuths) + 0.5) / self.azimuths * 2 * math.pi - math.pi
        return azimuth, torch.linspace(self.lowest, self.highest, self.beams).deg2rad()

    def ranges(self, origin: Tensor, boxes: Tensor, height: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges along the rays and ids of the boxes hit, both (B, A, E); what ``cast_dense`` gives, but faster.

        Boxes stand upright, so that a ray crosses their outline in the plane (A x N tests) and their height apart:
        beams are looked at only where the outline is hit.

        Args:
            origin: (B, 2). boxes: (B, N, 5). height: (B, N). present: (B, N) bool.
        """
        azimuth, elevation = self.angles()
        dx, dy = boxes[..., 0] - origin[:, None, 0], boxes[..., 1] - origin[:, None, 1]
        cos, sin = boxes[..., 2].cos().unsqueeze(1), boxes[..., 2].sin().unsqueeze(1)
        ray_x, ray_y = azimuth.cos()[:, None], azimuth.sin()[:, None]
        along, across = ray_x * cos + ray_y * sin, ray_y * cos - ray_x * sin  # (B, A, N)
        far = torch.tensor(1e9)
        inverse_x, inverse_y = torch.clamp(1 / along, -far, far), torch.clamp(1 / across, -far, far)
        mid_x = (dx.unsqueeze(1) * cos + dy.unsqueeze(1) * sin) * inverse_x
        mid_y = (dy.unsqueeze(1) * cos - dx.unsqueeze(1) * sin) * inverse_y
        half_x, half_y = (boxes[:, None, :, 3] / 2) * inverse_x.abs(), (boxes[:, None, :, 4] / 2) * inverse_y.abs()
        enter = torch.maximum(mid_x - half_x, mid_y - half_y).clamp_min(0)
        leave = torch.minimum(mid_x + half_x, mid_y + half_y)
        b, a, n = ((leave >= enter) & (enter <= self.reach) & present.unsqueeze(1)).nonzero(as_tuple=True)
        slope = elevation.tan()
        slope = torch.where(slope.abs() < 1e-9, 1e-9, slope)
        z1, z2 = -SENSOR_HEIGHT / slope, (height[b, n, None] - SENSOR_HEIGHT) / slope  # (E,), (pairs, E)
        inside = torch.maximum(enter[b, a, n, None], torch.minimum(z1, z2))
        hit = inside <= torch.minimum(leave[b, a, n, None], torch.maximum(z1, z2))
        level = torch.where(hit, inside, math.inf)
        ground = torch.where(slope < 0, z1, math.inf).repeat(len(boxes) * self.azimuths, 1)
        ray = b * self.azimuths + a
        nearest = ground.index_reduce(0, ray, level, "amin")
        ids = torch.full(nearest.shape, -1)
        pair, beam = (hit & (level == nearest[ray])).nonzero(as_tuple=True)
        ids[ray[pair], beam] = n[pair]
        shape = (len(boxes), self.azimuths, self.beams)
        return (nearest / elevation.cos()).view(shape), ids.view(shape)

    def sweep(self, origin: Tensor, boxes: Tensor, height: Tensor, present: Tensor, frame: int = 0) -> Sweep:
        """Simulated sweeps. Noise and drop-outs depend on ``frame`` only, so that a simulation can be repeated."""
        distance, ids = (x.flatten(1) for x in self.ranges(origin, boxes, height, present))
        azimuth, elevation = self.angles()
        flat = torch.stack(
            [
                (azimuth.cos()[:, None] * elevation.cos()).reshape(-1),
                (azimuth.sin()[:, None] * elevation.cos()).reshape(-1),
                elevation.sin().repeat(self.azimuths),
            ],
            -1,
        )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + frame)
        jitter = self.noise * torch.randn(distance.shape[1], generator=generator)
        kept = torch.rand(distance.shape[1], generator=generator) >= self.drop
        valid = (distance <= self.reach) & kept
        measured = torch.where(valid, distance + jitter, 0)
        sensor = torch.cat([origin, torch.full_like(origin[:, :1], SENSOR_HEIGHT)], -1)
        points = sensor.unsqueeze(1) + measured.unsqueeze(-1) * flat
        return Sweep(points, valid, ids, origin)


@dataclass(frozen=True)
class EditedSweep:
    """A real sweep of a changed scene: points (P', 3), their laser rows (P',), and where each one comes from.

    ``source`` (P',) is the index of the original return, or -1 for a return that was computed.
    """

    points: Tensor
    laser: Tensor
    source: Tensor


def inside_box(points: Tensor, box: Tensor, vertical: Tensor) -> Tensor:
    """Which points (P, 3) lie inside an upright box (5,) of height and centre's z ``vertical`` (2,)."""
    level = (points[:, 2] - vertical[1]).abs() <= vertical[0] / 2
    return (point_distance(points[:, :2], box) == 0) & level


class Cells:
    """The view of a spinning LiDAR in cells of azimuth x laser row.

    Args:
        points: (P, 3) measured. laser: (P,) rows. sensor: (3,). degrees: width of a cell.
    """

    def __init__(self, points: Tensor, laser: Tensor, sensor: Tensor, degrees: float) -> None:
        self.sensor, self.bins = sensor, round(360 / degrees)
        self.rows = int(laser.max()) + 1
        elevation = torch.atan2(points[:, 2] - sensor[2], (points - sensor)[:, :2].norm(dim=-1))
        blank = torch.zeros(self.rows)
        self.elevation = blank.index_reduce(0, laser.long(), elevation, "mean", include_self=False)

    def row(self, points: Tensor) -> Tensor:
        """The laser row whose elevation is nearest."""
        offset = points - self.sensor
        elevation = torch.atan2(offset[:, 2], offset[:, :2].norm(dim=-1))
        return (elevation[:, None] - self.elevation).abs().argmin(1)

    def address(self, points: Tensor, laser: Tensor) -> Tensor:
        """The cell of each point."""
        offset = points - self.sensor
        turn = (torch.atan2(offset[:, 1], offset[:, 0]) + math.pi) / (2 * math.pi)
        return laser.long() * self.bins + (turn * self.bins).long().clamp_max(self.bins - 1)

    def depth(self, points: Tensor) -> Tensor:
        """Distances from the sensor."""
        return (points - self.sensor).norm(dim=-1)

    def nearest(self, points: Tensor, laser: Tensor) -> Tensor:
        """Depth of the nearest point of each cell, infinity in empty ones."""
        blank = torch.full((self.rows * self.bins,), math.inf)
        return blank.index_reduce(0, self.address(points, laser), self.depth(points), "amin")

    def rays(self) -> Tensor:
        """Unit direction (cells, 3) through the middle of each cell."""
        azimuth = (torch.arange(self.bins) + 0.5) / self.bins * 2 * math.pi - math.pi
        flat, up = self.elevation.cos()[:, None], self.elevation.sin()[:, None]
        return torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), up.expand(-1, self.bins)], -1).reshape(-1, 3)


def edit_sweep(
    points: Tensor,
    laser: Tensor,
    before: Tensor,
    after: Tensor,
    vertical: Tensor,
    sensor: Tensor,
    ground: float,
    generator: torch.Generator,
    carry: int = 50,
    degrees: float = 0.2,
    reach: float = 80.0,
    noise: float = 0.02,
) -> EditedSweep:
    """Re-simulate a real sweep after some actors moved; where nothing changed it stays as it was measured.

    Returns of a moved actor are taken out and their rays end on the ground instead. At its new place the actor gets
    its own returns, moved along, when it has ``carry`` or more, else rays cast at its box. Cells that now see an actor
    lose the returns behind it, and an actor loses what stands behind others.

    Args:
        points: (P, 3) in the ego frame. laser: (P,) rows of the LiDAR. before, after: (m, 5) boxes.
        vertical: (m, 2) height of each box and z of its centre. sensor: (3,). ground: z of the ground.
        degrees: azimuth of a cell. reach: metres up to which the ground returns. noise: of cast ranges, metres.
    """
    moved = ((before - after).abs().amax(-1) > 0).nonzero()[:, 0].tolist()
    everything = torch.arange(len(points))
    if not moved:
        return EditedSweep(points, laser, everything)
    cells = Cells(points, laser, sensor, degrees)
    own = {i: inside_box(points, before[i], vertical[i]) for i in moved}
    gone = torch.stack([own[i] for i in moved]).any(0)
    left = points[~gone], laser[~gone]
    rays, behind = cells.rays(), cells.nearest(*left)
    direction = (points[gone] - sensor) / cells.depth(points[gone])[:, None]
    fall = torch.where(direction[:, 2] < 0, (ground - sensor[2]) / direction[:, 2], math.inf)
    freed = fall <= reach
    added = [(sensor + fall[freed, None] * direction[freed], laser[gone][freed])]
    cover = torch.full_like(behind, math.inf)
    for i in moved:
        centre = torch.cat([after[i, :2], vertical[i, 1:]])
        half = torch.cat([after[i, 3:], vertical[i, :1]]) / 2
        surface = ray_box(sensor, rays, centre, after[i, 2], half)
        cover = torch.minimum(cover, surface)
        if int(own[i].sum()) < carry:
            seen = (surface < behind).nonzero()[:, 0]
            depth = surface[seen] + noise * torch.randn(len(seen), generator=generator)
            added.append((sensor + depth[:, None] * rays[seen], (seen // cells.bins).to(laser)))
            continue
        placed = carried(points[own[i]], before[i], after[i])
        row = cells.row(placed)
        cell, depth = cells.address(placed, row), cells.depth(placed)
        # the near side hides the far side: its first return of a cell, at most half a length behind the surface
        front = (depth == cells.nearest(placed, row)[cell]) & (depth <= surface[cell] + after[i, 3] / 2)
        seen = front & (depth < behind[cell])
        added.append((placed[seen], row[seen].to(laser)))
    extra, rows = torch.cat([a for a, _ in added]), torch.cat([b for _, b in added])
    is_actor = torch.arange(len(extra)) >= len(added[0][0])
    visible = is_actor | (cells.depth(extra) <= cover[cells.address(extra, rows)])
    kept = everything[~gone][cells.depth(left[0]) <= cover[cells.address(*left)]]
    extra, rows = extra[visible], rows[visible]
    source = torch.cat([kept, torch.full((len(extra),), -1)])
    return EditedSweep(torch.cat([points[kept], extra]), torch.cat([laser[kept], rows]), source)


def carried(points: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Points (P, 3) moved rigidly with a box from one pose to another."""
    turn = after[2] - before[2]
    x, y = (points[:, :2] - before[:2]).unbind(-1)
    return torch.stack(
        [after[0] + x * turn.cos() - y * turn.sin(), after[1] + x * turn.sin() + y * turn.cos(), points[:, 2]], -1
    )


# ---- simulation and objective ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What B simulations look like so far.

    Attributes:
        ego: (B, L, 5) states, valid up to now. tracks: (B, N, L, 3); present: (B, N, L) bool; size: (B, N, 3).
        route: (B, P, 4). speed_limit: (B,). step: index of now.
    """

    ego: Tensor
    tracks: Tensor
    present: Tensor
    size: Tensor
    route: Tensor
    speed_limit: Tensor
    step: int

    def boxes(self, step: int) -> Tensor:
        """Actors' boxes (B, N, 5) at a step."""
        return torch.cat([self.tracks[:, :, step], self.size[..., :2]], -1)

    @property
    def now(self) -> Tensor:
        """The ego's state (B, 5)."""
        return self.ego[:, self.step]

    def part(self, index: Tensor) -> World:
        """Some of the simulations."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "step"}
        return replace(self, **{name: tensor[index] for name, tensor in tensors.items()})


NEVER = 10**6
"""The step of a collision that does not happen."""


class Autonomy(Protocol):
    """A stack under test: anything that plans."""

    def plan(self, world: World) -> Tensor:
        """States (B, horizon, 5) of the ego from the next step on; ``world`` is known up to ``world.step``."""


def initial_world(scenes: Scene, which: Tensor, moved: Tensor) -> World:
    """The worlds (B) in which perturbed actors will drive as ``moved``; the ego's future is not known yet."""
    ego = scenes.ego[which].clone()
    ego[:, HISTORY + 1 :] = math.nan
    tracks = world_tracks(scenes, which, moved)
    route, limit = scenes.route[which], scenes.speed_limit[which]
    return World(ego, tracks, scenes.present[which], scenes.size[which], route, limit, HISTORY)


@torch.no_grad()
def drive(world: World, stack: Autonomy, replan: int = 5) -> Tensor:
    """Let a stack drive; the ego's states (B, T + 1, 5) from now on.

    Args:
        replan: steps after which the stack plans anew from where it is (closed loop); 0: one plan (open loop).
    """
    steps = world.ego.shape[1] - HISTORY - 1
    every = replan or steps
    for begin in range(HISTORY, HISTORY + steps, every):
        plan = stack.plan(replace(world, step=begin))
        count = min(every, HISTORY + steps - begin)
        world.ego[:, begin + 1 : begin + 1 + count] = plan[:, :count]
    return world.ego[:, HISTORY:]


@dataclass(frozen=True)
class Objective:
    """Weights of the adversarial objective (imitation, collision, comfort) and the margin of a near miss in metres."""

    imitation: float = 0.1
    collision: float = 1.0
    comfort: float = 0.1
    margin: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What came of B simulations of T steps; everything (B,) unless said.

    Attributes:
        score: the adversarial objective. collision: first step of a collision, ``NEVER`` for none. at_fault: if the
        ego moved into it (not struck from behind). l2: (B, 3) metres from the expert after 1, 3 and 5 s.
        lateral, jerk: means of absolute values. progress: metres driven. gap: least distance from any actor.
        ttc: least time to collision, at most 5 s.
    """

    score: Tensor
    collision: Tensor
    at_fault: Tensor
    l2: Tensor
    lateral: Tensor
    jerk: Tensor
    progress: Tensor
    gap: Tensor
    ttc: Tensor

    def crashed(self, seconds: float = math.inf) -> Tensor:
        """Whether there was a collision within so many seconds, (B,) bool."""
        return self.collision * DT <= min(seconds, NEVER * DT / 2) + 1e-6

    @staticmethod
    def join(parts: Sequence[Outcome]) -> Outcome:
        """Several as one."""
        return Outcome(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Outcome)))


def judge(world: World, expert: Tensor, ego: Tensor, objective: Objective) -> Outcome:
    """The adversarial objective and the metrics of what the ego did.

    A stopped ego that is struck from behind is not blamed: such contact counts as nothing.

    Args:
        expert, ego: (B, T + 1, 5).
    """
    mine = ego_boxes(ego)
    boxes = actor_boxes(world.tracks, world.size)[:, :, HISTORY:]
    gap = signed_distance(mine.unsqueeze(1), boxes)
    along = (boxes[..., :2] - mine[:, None, :, :2]) * torch.stack([mine[..., 2].cos(), mine[..., 2].sin()], -1)[:, None]
    behind = along.sum(-1) < -EGO_SIZE[0] / 2
    blameless = behind & (ego[..., 3] < 0.5).unsqueeze(1)
    struck = (blameless & (gap < 0)).cummax(-1).values  # and whatever it does after that
    gap = gap.masked_fill(~world.present[:, :, HISTORY:] | blameless | struck, 1e3)
    nearest, actor = gap.min(1)  # (B, T + 1)
    touch = nearest < 0
    first = torch.where(touch.any(1), touch.int().argmax(1), NEVER)
    rows, at = torch.arange(len(ego)), first.clamp_max(ego.shape[1] - 1)
    blamed = (first < NEVER) & ~behind[rows, actor[rows, at], at] & (ego[rows, at, 3] >= 0.5)

    lateral = (ego[..., 3].square() * ego[..., 4]).abs()
    jerk = (ego[..., 3].diff(dim=1) / DT).diff(dim=1).abs() / DT
    distance = (ego[:, 1:, :2] - expert[:, 1:, :2]).norm(dim=-1)
    imitation = F.smooth_l1_loss(ego[:, 1:, :2], expert[:, 1:, :2], reduction="none").sum(-1).mean(1)
    near = ((objective.margin - nearest[:, 1:]) / objective.margin).clamp(0, 2).sum(1) + 5 * (first < NEVER)
    rough = (lateral[:, 1:] / 3).clamp_max(1).sum(1) + (jerk / 5).clamp_max(1).sum(1)
    score = objective.imitation * imitation + objective.collision * near + objective.comfort * rough
    closing = (gap[..., :-1] - gap[..., 1:]).clamp_min(1e-3) / DT
    ttc = (gap[..., :-1].clamp_min(0) / closing).clamp_max(5).amin((1, 2))
    marks = torch.tensor([min(round(second / DT), distance.shape[1]) - 1 for second in (1, 3, 5)])
    progress = (ego[:, 1:, :2] - ego[:, :-1, :2]).norm(dim=-1).sum(1)
    l2, least = distance[:, marks], nearest.amin(1)
    return Outcome(score, first, blamed, l2, lateral.mean(1), jerk.mean(1), progress, least, ttc)


def evaluate(
    scenes: Scene,
    which: Tensor,
    delta: Tensor,
    stack: Autonomy,
    attack: Attack,
    objective: Objective,
    replan: int = 5,
) -> tuple[Outcome, Tensor]:
    """Simulate perturbed scenes; what came of it and the ego's states (B, T + 1, 5)."""
    world = initial_world(scenes, which, perturb(scenes, which, delta, attack))
    ego = drive(world, stack, replan)
    return judge(world, scenes.ego[which, HISTORY:], ego, objective), ego
