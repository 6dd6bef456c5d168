"""Stacks under test: perception on LiDAR returns or perfect, a sampling planner, cruise control, imitation.

Shapes and states are those of ``model.py``: ``B`` simulations, ``M`` objects that a stack believes in, ``C``
candidate trajectories. Every stack has ``plan(world)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DT, EGO_CENTRE, EGO_SIZE, Lidar, Sweep, World, box_iou, ego_boxes, in_frame, separation, wrap

# ---- perception ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objects:
    """What a stack believes to be there: boxes (B, M, 5), speed and turn rate (B, M), and which rows count (B, M)."""

    boxes: Tensor
    speed: Tensor
    turn: Tensor
    mask: Tensor

    def predict(self, steps: int, dt: float) -> Tensor:
        """Boxes (B, M, steps, 5) at constant speed and turn rate, from ``dt`` on."""
        heading = self.boxes[..., 2:3] + self.turn[..., None] * dt * torch.arange(steps + 1)
        middle = (heading[..., 1:] + heading[..., :-1]) / 2
        travelled = self.speed[..., None, None] * dt * torch.stack([middle.cos(), middle.sin()], -1).cumsum(-2)
        size = self.boxes[:, :, None, 3:].expand(*middle.shape, 2)
        return torch.cat([self.boxes[:, :, None, :2] + travelled, heading[..., 1:, None], size], -1)


def nearest_first(objects: Objects, ego: Tensor, most: int) -> Objects:
    """At most ``most`` objects a simulation, those nearest to the ego."""
    away = (objects.boxes[..., :2] - ego[:, None, :2]).norm(dim=-1).masked_fill(~objects.mask, math.inf)
    index = away.argsort(1)[:, :most]
    rows = torch.arange(len(index)).unsqueeze(1)
    return Objects(*(getattr(objects, field.name)[rows, index] for field in fields(Objects)))


@dataclass(frozen=True)
class PerfectPerception:
    """The true boxes within reach, with their true speed and turn rate."""

    reach: float = 60.0

    def __call__(self, world: World) -> Objects:
        """Objects around the ego now."""
        before, now = world.tracks[:, :, world.step - 1], world.tracks[:, :, world.step]
        there = world.present[:, :, world.step]
        known = there & world.present[:, :, world.step - 1]
        speed = torch.where(known, (now - before)[..., :2].norm(dim=-1) / DT, 0)
        turn = torch.where(known, wrap(now[..., 2] - before[..., 2]) / DT, 0)
        near = (now[..., :2] - world.now[:, None, :2]).norm(dim=-1) <= self.reach
        return Objects(world.boxes(world.step), speed, turn, there & near)


@dataclass(frozen=True)
class LidarPerception:
    """Detection and tracking on the last two sweeps.

    Returns above the ground are put on a grid; connected cells are an object; the rectangle whose border fits it best
    grows to a car's size away from the sensor. Objects that are each other's nearest in the two sweeps give a velocity;
    one that was not seen before stands still.

    Attributes:
        lidar: the sensor. gap: steps between the sweeps. reach: metres. cell: metres of a grid cell. bridge: cells
        that may lie between two of an object. gate: most metres between an object and itself a sweep earlier.
        prior: length and width of a car. small: largest extent of what is taken for a person. slowest: m/s below
        which a velocity is noise. most: objects kept.
    """

    lidar: Lidar
    gap: int = 3
    reach: float = 60.0
    cell: float = 0.5
    bridge: int = 2
    gate: float = 4.5
    prior: tuple[float, float] = (4.5, 1.9)
    small: float = 0.9
    slowest: float = 2.5
    most: int = 24

    def __call__(self, world: World) -> Objects:
        """Objects around the ego now."""
        now, before = (self.detect(self.sense(world, step)) for step in (world.step, world.step - self.gap))
        return self.track(now, before)

    def sense(self, world: World, step: int) -> Sweep:
        """The sweep of a step, from where the ego is then in this simulation."""
        boxes = world.boxes(step)
        origin = ego_boxes(world.ego[:, step])[:, :2]
        return self.lidar.sweep(origin, boxes, world.size[..., 2], world.present[:, :, step], frame=step)

    def detect(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """Boxes (B, M, 5), nearest first, and which of them count (B, M)."""
        away = sweep.points[..., :2] - sweep.origin[:, None]
        high = sweep.valid & (sweep.points[..., 2] > 0.3) & (away.norm(dim=-1) <= self.reach)
        batch = high.nonzero()[:, 0]
        points = away[high]
        label, owner = self.components(points, batch)
        boxes = self.fit(points, label, len(owner))
        boxes[:, :2] += sweep.origin[owner]
        order = (boxes[:, :2] - sweep.origin[owner]).norm(dim=-1).argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]
        boxes, owner = boxes[order], owner[order]
        rank = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        out = torch.zeros(len(sweep.points), self.most, 5)
        mask = torch.zeros(out.shape[:2], dtype=torch.bool)
        fits = rank < self.most
        out[owner[fits], rank[fits]] = boxes[fits]
        mask[owner[fits], rank[fits]] = True
        return out, mask

    def components(self, points: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Connected components of the grid: the label of each point (P,) and the simulation of each label (C,)."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        side = 2 * math.ceil(self.reach / self.cell) + 4 * self.bridge  # wide enough that rows do not touch
        place = ((points + self.reach) / self.cell).long() + 2 * self.bridge
        key = (batch * side + place[:, 1]) * side + place[:, 0]
        cells, cell_of = key.unique(return_inverse=True)
        if not len(cells):
            return cell_of, cells
        span = torch.arange(-self.bridge, self.bridge + 1)
        shift = (span[:, None] * side + span).reshape(-1)
        wanted = cells + shift[shift > 0, None]  # (shifts, cells): each pair once
        found = torch.searchsorted(cells, wanted).clamp_max(max(len(cells) - 1, 0))
        shifted, first = (cells[found] == wanted).nonzero(as_tuple=True)
        pair = (first.numpy(), found[shifted, first].numpy())
        links = coo_matrix(([True] * len(first), pair), shape=(len(cells), len(cells)))
        count, label = connected_components(links, directed=False)
        cell_label = torch.from_numpy(label).long()
        owner = torch.zeros(count, dtype=torch.long)
        owner[cell_label] = cells // side**2
        return cell_label[cell_of], owner

    def fit(self, points: Tensor, label: Tensor, count: int) -> Tensor:
        """Boxes (C, 5) around the points of each label, relative to the sensor at the origin."""
        angle = torch.arange(0, 90, 7.5).deg2rad()
        turned = torch.stack(in_frame(points[:, None], angle.expand(len(points), -1)), -1)
        low = torch.full((count, len(angle), 2), math.inf).index_reduce(0, label, turned, "amin")
        high = torch.full((count, len(angle), 2), -math.inf).index_reduce(0, label, turned, "amax")
        extent = high - low
        # points are on the two sides that face the sensor: the best rectangle has them near its border
        border = torch.minimum(turned - low[label], high[label] - turned).amin(-1)
        best = torch.zeros(count, len(angle)).index_add(0, label, border).argmin(1)
        rows = torch.arange(count)
        low, high, extent, heading = low[rows, best], high[rows, best], extent[rows, best], angle[best]
        longest = extent.amax(1)
        # a side longer than a car is wide is its flank, a shorter one its front or rear
        along_x = (extent[:, 0] >= extent[:, 1]) == (longest > self.prior[1] + 0.4)
        length, width = self.prior
        prior = torch.where(along_x[:, None], torch.tensor([length, width]), torch.tensor([width, length]))
        prior = torch.where(longest[:, None] < self.small, torch.tensor(self.small), prior)
        size = torch.maximum(extent, prior)
        # the sensor is at 0: the near face is where it was seen, the box grows behind it
        middle = torch.where(low > 0, low + size / 2, torch.where(high < 0, high - size / 2, (low + high) / 2))
        cos, sin = heading.cos(), heading.sin()
        x, y = middle[:, 0] * cos - middle[:, 1] * sin, middle[:, 0] * sin + middle[:, 1] * cos
        heading = torch.where(along_x, heading, heading + math.pi / 2)
        size = torch.where(along_x[:, None], size, size.flip(1))
        return torch.cat([torch.stack([x, y, heading], -1), size], -1)

    def track(self, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> Objects:
        """Velocities from objects that are each other's nearest in both sweeps, within the gate."""
        boxes, mask = now
        old, old_mask = before
        away = torch.cdist(boxes[..., :2], old[..., :2])
        away = away.masked_fill(~(mask[:, :, None] & old_mask[:, None]), math.inf)
        nearest, partner = away.min(2)
        mutual = away.argmin(1).gather(1, partner) == torch.arange(boxes.shape[1])
        matched = mutual & (nearest <= self.gate)
        shift = boxes[..., :2] - old[..., :2].gather(1, partner.unsqueeze(-1).expand(-1, -1, 2))
        speed = torch.where(matched, shift.norm(dim=-1) / (self.gap * DT), 0)
        moving = speed >= self.slowest
        course = torch.atan2(shift[..., 1], shift[..., 0])
        heading = torch.where(moving, course, boxes[..., 2])
        boxes = torch.cat([boxes[..., :2], heading.unsqueeze(-1), boxes[..., 3:]], -1)
        return Objects(boxes, torch.where(moving, speed, 0), torch.zeros_like(speed), mask)


# ---- stacks under test -----------------------------------------------------------------------------------------


def project(route: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distance along a route of metre steps, offset to its left, heading there and curvature, of points.

    Args:
        route: (B, P, 4). points: (B, ..., 2).
    """
    flat = points.reshape(len(points), -1, 2)
    near = torch.cdist(flat, route[..., :2]).argmin(-1)
    foot = route.gather(1, near.unsqueeze(-1).expand(-1, -1, 4))
    along, left = in_frame(flat - foot[..., :2], foot[..., 2])
    shape = points.shape[:-1]
    return (near + along).view(shape), left.view(shape), foot[..., 2].view(shape), foot[..., 3].view(shape)


def along_route(route: Tensor, s: Tensor) -> Tensor:
    """(x, y, heading, curvature) of the route (B, P, 4) at distances (B, ...), linear between its points."""
    flat = s.reshape(len(s), -1).clamp(0, route.shape[1] - 1.001)
    low = flat.long()
    share = (flat - low).unsqueeze(-1)
    rows = torch.arange(len(s)).unsqueeze(1)
    a, b = route[rows, low], route[rows, low + 1]
    step = b - a
    step = torch.cat([step[..., :2], wrap(step[..., 2:3]), step[..., 3:]], -1)
    return (a + share * step).view(*s.shape, 4)


FOLLOW = 0.12
"""1 / metres: how hard a planned path turns back to the route (critically damped in distance)."""


@dataclass(frozen=True)
class Path:
    """Trajectories in a route's own coordinates, all (B, C, T): distance, offset to the left, heading relative to the
    route, speed, and curvature besides the route's."""

    s: Tensor
    left: Tensor
    turned: Tensor
    v: Tensor
    added: Tensor

    def at(self, index: Any) -> Path:
        """Some of them."""
        return Path(*(getattr(self, field.name)[index] for field in fields(self)))

    def states(self, route: Tensor) -> Tensor:
        """States (B, C, T, 5) in the world."""
        x, y, heading, curvature = along_route(route, self.s).unbind(-1)
        x, y = x - self.left * heading.sin(), y + self.left * heading.cos()
        return torch.stack([x, y, heading + self.turned, self.v, curvature + self.added], -1)


def follow(route: Tensor, state: Tensor, acceleration: Tensor, extra: Tensor, limit: Tensor) -> Path:
    """Drive along the route: a bicycle in the route's own coordinates, the next T steps.

    Args:
        route: (B, P, 4). state: (B, 5). acceleration, extra: (B, C, T), extra curvature. limit: (B,) speed limit, m/s.
    """
    s, left, heading, _ = project(route, state[:, None, :2])
    shape = torch.broadcast_shapes(acceleration.shape, extra.shape)[1:2]
    turned = wrap(state[:, None, 2] - heading).expand(-1, *shape)
    s, left, v = s.expand(-1, *shape), left.expand(-1, *shape), state[:, 3, None].expand(-1, *shape)
    top, path = torch.maximum(limit[:, None], v), []
    for a, u in zip(acceleration.unbind(-1), extra.unbind(-1), strict=True):
        add = (u - FOLLOW**2 * left - 2 * FOLLOW * turned).clamp(-0.2, 0.2)
        way = v * DT
        s, left, turned = s + way * turned.cos(), left + way * turned.sin(), turned + way * add
        v = torch.minimum((v + a * DT).clamp_min(0), top)
        path.append((s, left, turned, v, add))
    return Path(*(torch.stack(parts, -1) for parts in zip(*path, strict=True)))


@dataclass(frozen=True)
class LibraryPlanner:
    """PLT-style planner: the cheapest of 13 x 9 trajectories (13 curvature offsets, 9 accelerations).

    An offset is reached in a second, held for one and gone after another; the path then returns to the route.

    Attributes:
        weights: costs of collision, progress, deviation, lateral acceleration and jerk; (5,) or (B, 5).
        horizon: steps. stride: steps between two at which costs are taken. most: objects looked at.
        cutoff: metres beyond which an object costs nothing.
    """

    weights: Tensor
    horizon: int = 50
    stride: int = 2
    most: int = 8
    cutoff: float = 3.0

    def plan(self, world: World, objects: Objects) -> Tensor:
        """States (B, horizon, 5) of the cheapest trajectory, from the next step on."""
        state = world.now
        seconds = torch.arange(self.horizon) * DT
        shape = torch.minimum(seconds, 3 - seconds).clamp(0, 1)
        offsets = torch.linspace(-0.06, 0.06, 13).repeat_interleave(9)
        rates = torch.tensor([-6.0, -4, -2, -1, 0, 0.5, 1, 1.5, 2]).repeat(13)
        # it begins with the curvature that is driven now, so that a new plan goes on with what the last one began
        _, left, heading, curvature = project(world.route, state[:, None, :2])
        begun = state[:, 4:5] - curvature + FOLLOW**2 * left + 2 * FOLLOW * wrap(state[:, 2:3] - heading)
        extra = offsets[:, None] * shape + (begun * (1 - seconds).clamp_min(0))[:, None]
        path = follow(world.route, state, rates[None, :, None].expand(1, -1, self.horizon), extra, world.speed_limit)
        looked = path.at((..., slice(self.stride - 1, None, self.stride)))
        states = looked.states(world.route)
        change = rates - (state[:, 3:4] - world.ego[:, world.step - 1, 3:4]) / DT
        collision = self.collisions(states, nearest_first(objects, state, self.most))
        terms = torch.stack([collision, *self.comfort(states, looked.left, change)], -1)
        best = (terms * self.weights.expand(len(state), 5)[:, None]).sum(-1).argmin(1)
        return path.at((torch.arange(len(state)), best)).at((slice(None), None)).states(world.route)[:, 0]

    def comfort(self, states: Tensor, left: Tensor, change: Tensor) -> list[Tensor]:
        """Progress, deviation, lateral acceleration and jerk (B, C) of trajectories (B, C, T', 5)."""
        v, kappa = states[..., 3], states[..., 4]
        step = self.stride * DT
        lateral = (v.square() * kappa / 3).square()
        return [
            -step * v.cumsum(-1).sum(-1) / 10,
            left.abs().sum(-1) / 2,
            lateral.sum(-1),
            (change / step / 4).square(),
        ]

    def collisions(self, states: Tensor, objects: Objects) -> Tensor:
        """Soft collision cost (B, C) with boxes that were predicted and grow by 0.1 m a second."""
        steps = states.shape[2]
        mine = ego_boxes(states)
        theirs = objects.predict(steps, self.stride * DT).movedim(1, 2)  # (B, T', M, 5)
        reach = self.cutoff + (math.hypot(*EGO_SIZE[:2]) + theirs[..., 3:].norm(dim=-1)) / 2
        away = (mine[..., None, 0] - theirs[:, None, ..., 0]).square()
        away += (mine[..., None, 1] - theirs[:, None, ..., 1]).square()
        close = (away < reach.square()[:, None]) & objects.mask[:, None, None]
        b, c, t, m = close.nonzero(as_tuple=True)
        gap = separation(mine[b, c, t], theirs[b, t, m]) - 0.1 * self.stride * DT * (t + 1)
        place = (b * states.shape[1] + c) * steps + t
        nearest = torch.full((states[..., 0].numel(),), math.inf).index_reduce(0, place, gap, "amin")
        return torch.where(nearest > 0, torch.exp(-nearest / 0.5), 10.0).view(states.shape[:3]).sum(-1)


@dataclass(frozen=True)
class AccPlanner:
    """Adaptive cruise control: stay on the route, keep the IDM's distance from what is predicted to be in the way.

    Attributes:
        horizon: steps. headway: seconds. standstill: metres. throttle, brake: m/s^2 of the IDM. most: objects seen.
    """

    horizon: int = 50
    headway: float = 1.5
    standstill: float = 2.0
    throttle: float = 1.5
    brake: float = 2.0
    most: int = 8

    def plan(self, world: World, objects: Objects) -> Tensor:
        """States (B, horizon, 5), from the next step on."""
        state = world.now
        near = nearest_first(objects, state, self.most)
        predicted = near.predict(self.horizon, DT)
        s, left, heading, _ = project(world.route, predicted[..., :2])
        begin, own_left, _, _ = project(world.route, state[:, None, :2])
        ahead = begin + EGO_CENTRE + EGO_SIZE[0] / 2  # the front bumper, (B, 1)
        inside = (left - own_left[..., None]).abs() < 1.2 + near.boxes[..., 4, None] / 2
        inside &= near.mask[..., None]
        rear = s - near.boxes[..., 3, None] / 2
        pace = near.speed[..., None] * (predicted[..., 2] - heading).cos()
        v, front, out = state[:, 3], ahead[:, 0], []
        for t in range(self.horizon):
            there = inside[:, :, t] & (s[:, :, t] > front[:, None] - EGO_SIZE[0])
            gap, lead = (rear[:, :, t] - front[:, None]).masked_fill(~there, math.inf).min(1)
            a = self.idm(v, world.speed_limit, gap, pace[:, :, t].gather(1, lead[:, None])[:, 0])
            out.append(a)
            front, v = front + v * DT, (v + a * DT).clamp_min(0)
        acceleration = torch.stack(out, -1)[:, None]
        path = follow(world.route, state, acceleration, torch.zeros_like(acceleration), world.speed_limit)
        return path.states(world.route)[:, 0]

    def idm(self, v: Tensor, wanted: Tensor, gap: Tensor, lead: Tensor) -> Tensor:
        """Acceleration (B,) of the intelligent driver model at ``gap`` metres behind a vehicle of speed ``lead``."""
        closing = v * (v - lead) / (2 * math.sqrt(self.throttle * self.brake))
        space = (self.standstill + self.headway * v + torch.where(gap.isinf(), 0, closing)).clamp_min(0)
        a = self.throttle * (1 - (v / wanted) ** 4 - (space / gap.clamp_min(0.1)).square())
        return a.clamp(-6, 2)


@dataclass(frozen=True)
class Stack:
    """Perception and a planner."""

    perception: PerfectPerception | LidarPerception
    planner: LibraryPlanner | AccPlanner

    def plan(self, world: World) -> Tensor:
        """States (B, horizon, 5) of the ego, from the next step on."""
        return self.planner.plan(world, self.perception(world))


class ImitationNet(nn.Module):
    """From bird's-eye rasters and the speed to acceleration and extra curvature in ten half seconds.

    Args:
        channels: of the first convolution. side: cells of a raster, a metre each. frames: sweeps that are seen.
    """

    def __init__(self, channels: int = 16, side: int = 64, frames: int = 5) -> None:
        super().__init__()
        self.side, self.frames = side, frames
        c = channels
        self.features = nn.Sequential(
            nn.Conv2d(frames + 1, c, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(c, 2 * c, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * c, 2 * c, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * c, 2 * c, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(2 * c * math.ceil(side / 16) ** 2 + 1, 64), nn.ReLU(), nn.Linear(64, 20), nn.Tanh()
        )

    def forward(self, rasters: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        """Acceleration in m/s^2 and extra curvature in 1/m, both (B, 10), of (B, frames + 1, side, side) and (B,)."""
        out = self.head(torch.cat([self.features(rasters), speed[:, None] / 10], 1)).view(-1, 2, 10)
        return 4 * out[:, 0], 0.06 * out[:, 1]

    def rasterise(self, points: Tensor, valid: Tensor, state: Tensor) -> Tensor:
        """Occupied cells (B, side, side) of points (B, R, >= 2); a quarter of the raster lies behind the ego."""
        ahead, left = in_frame(points[..., :2] - state[:, None, :2], state[:, None, 2])
        column, row = (ahead + self.side / 4).floor().long(), (left + self.side / 2).floor().long()
        inside = valid & (column >= 0) & (column < self.side) & (row >= 0) & (row < self.side)
        b, r = inside.nonzero(as_tuple=True)
        out = torch.zeros(len(points), self.side, self.side)
        out[b, row[b, r], column[b, r]] = 1
        return out


@dataclass(frozen=True)
class ImitationStack:
    """LiDAR to plan through one network, without objects between."""

    net: ImitationNet
    perception: LidarPerception
    horizon: int = 50

    def inputs(self, world: World) -> tuple[Tensor, Tensor]:
        """Rasters (B, frames + 1, side, side) of the last sweeps, newest first, and of the route; the speed (B,)."""
        layers = []
        for step in range(world.step, world.step - self.net.frames, -1):
            sweep = self.perception.sense(world, step)
            high = sweep.valid & (sweep.points[..., 2] > 0.3)
            layers.append(self.net.rasterise(sweep.points, high, world.now))
        everywhere = torch.ones(world.route.shape[:2], dtype=torch.bool)
        layers.append(self.net.rasterise(world.route, everywhere, world.now))
        return torch.stack(layers, 1), world.now[:, 3]

    def decode(self, world: World, out: tuple[Tensor, Tensor]) -> Tensor:
        """States (B, horizon, 5) that the network's controls lead to."""
        hold = -(-self.horizon // out[0].shape[1])
        a, u = (part.repeat_interleave(hold, 1)[:, None, : self.horizon] for part in out)
        return follow(world.route, world.now, a, u, world.speed_limit).states(world.route)[:, 0]

    def plan(self, world: World) -> Tensor:
        """States (B, horizon, 5) of the ego, from the next step on."""
        return self.decode(world, self.net(*self.inputs(world)))


def cloning_loss(plan: Tensor, expert: Tensor) -> Tensor:
    """Smooth L1 (B,) of waypoints every half second of a plan and an expert's drive (B, T, 5), as far as that goes."""
    points = [states[:, 4 : expert.shape[1] : 5, :2] for states in (plan, expert)]
    return F.smooth_l1_loss(*points, reduction="none").sum(-1).mean(1)


# ---- how well a stack perceives --------------------------------------------------------------------------------


def detection_overlap(world: World, perception: LidarPerception, least: int = 5) -> Tensor:
    """Intersection over union of each visible vehicle (at least ``least`` returns) with the object that fits it best.

    The share above a limit is the recall at that limit.
    """
    sweep = perception.sense(world, world.step)
    hit = (sweep.valid & (sweep.ids >= 0)).float()
    counts = torch.zeros(world.size.shape[:2]).scatter_add(1, sweep.ids.clamp_min(0), hit)
    visible = (counts >= least) & (world.size[..., 0] > 3)
    objects = perception(world)
    overlap = box_iou(world.boxes(world.step)[:, :, None], objects.boxes[:, None])
    return overlap.masked_fill(~objects.mask[:, None], 0).amax(-1)[visible]


def prediction_error(world: World, objects: Objects, reach: float = 30.0, gate: float = 2.0) -> Tensor:
    """Mean distance of the predicted from the true places (ADE) of each detected actor near the ego, metres.

    Args:
        world: with the actors' true future. objects: what a stack believes in. reach: metres from the ego within
        which an actor is near. gate: metres between an actor and its object at most.
    """
    now, future = world.tracks[:, :, world.step, :2], world.tracks[:, :, world.step + 1 :, :2]
    offset = torch.cdist(now, objects.boxes[..., :2]).masked_fill(~objects.mask[:, None], math.inf)
    closest, match = offset.min(2)
    near = (now - world.now[:, None, :2]).norm(dim=-1) <= reach
    detected = near & (closest <= gate) & world.present[:, :, world.step]
    steps = future.shape[2]
    predicted = objects.predict(steps, DT)[..., :2]
    predicted = predicted.gather(1, match[..., None, None].expand(-1, -1, steps, 2))
    known = world.present[:, :, world.step + 1 :]
    error = ((predicted - future).norm(dim=-1) * known).sum(-1) / known.sum(-1).clamp_min(1)
    return error[detected & known.any(-1)]
