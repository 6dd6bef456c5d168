"""AdvSim: ray casting, planning and searching beside the straightforward forms (same values)."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from papers.advsim import data, model
from tools.bench import Workload

sys.modules["model"] = model  # what stands beside model.py imports it by its bare name
from papers.advsim import search, stacks  # noqa: E402

del sys.modules["model"]

SPACE = model.Attack()


def traffic(count: int, boxes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (count, boxes, 5) of cars around the origin, their heights, and where the sensor stands."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(count, boxes, 5, generator=generator)
    place = place * torch.tensor([120.0, 120.0, 6.28, 1.0, 0.3]) + torch.tensor([-60.0, -60.0, -3.14, 4.0, 1.8])
    return place, torch.full((count, boxes), 1.6), torch.zeros(count, 2)


@functools.cache
def scenes(count: int) -> model.Scene:
    """Scenes of an ego at 8 m/s and six cars beside it."""
    generator = torch.Generator().manual_seed(1)
    time = (torch.arange(data.LENGTH) - data.HISTORY) * model.DT
    metres = torch.arange(data.ROUTE[1]) - float(data.ROUTE[0])
    out = []
    for _ in range(count):
        x, v = 12 + 9 * torch.arange(6) + torch.rand(6, generator=generator), 7 + torch.rand(6, generator=generator)
        y = torch.tensor([3.5, -3.5] * 3)
        tracks = torch.stack([x[:, None] + v[:, None] * time, y[:, None] + 0 * time, torch.zeros(6, len(time))], -1)
        scene = model.make_scene(
            ego=torch.stack([8 * time, 0 * time, 0 * time, 8 + 0 * time, 0 * time], -1),
            tracks=tracks,
            present=torch.ones(6, data.LENGTH, dtype=torch.bool),
            size=torch.tensor([4.5, 1.9, 1.6]).expand(6, 3),
            movable=torch.ones(6, dtype=torch.bool),
            route=torch.stack([metres, 0 * metres, 0 * metres, 0 * metres], -1),
            drivable=torch.ones(data.RASTER, data.RASTER, dtype=torch.bool),
            corner=torch.tensor([-40.0, -80.0]),
            speed_limit=12.0,
            actors=1,
            attack=SPACE,
        )
        out.append(scene)
    return model.stack(out)


def tested() -> stacks.Stack:
    """The sampling planner behind the LiDAR of the default preset."""
    lidar = model.Lidar(beams=8, azimuths=360, lowest=-12, highest=2)
    weights = torch.tensor([4.0, 0.5, 0.3, 0.1, 0.05])
    return stacks.Stack(stacks.LidarPerception(lidar), stacks.LibraryPlanner(weights))


# ---- workloads


def casting(beams: int, azimuths: int, boxes: int, form: str) -> Callable[[], Any]:
    """Ranges and ids of one sweep."""
    lidar = model.Lidar(beams=beams, azimuths=azimuths)
    place, height, origin = traffic(1, boxes)
    if form == "ours":
        there = torch.ones(1, boxes, dtype=torch.bool)
        return lambda: lidar.ranges(origin, place, height, there)
    azimuth, elevation = lidar.angles()
    a, e = (part.reshape(-1) for part in torch.meshgrid(azimuth, elevation, indexing="ij"))
    rays = torch.stack([a.cos() * e.cos(), a.sin() * e.cos(), e.sin()], -1)
    sensor = torch.tensor([0.0, 0.0, model.SENSOR_HEIGHT])
    return lambda: model.cast_dense(sensor, rays, place[0], height[0])


def colliding(form: str) -> Callable[[], Any]:
    """Collision cost of 117 trajectories of 25 moments in 24 simulations with 8 objects each."""
    place, _, _ = traffic(24, 8)
    objects = stacks.Objects(place, torch.full((24, 8), 5.0), torch.zeros(24, 8), torch.ones(24, 8, dtype=torch.bool))
    states = torch.rand(24, 117, 25, 5, generator=torch.Generator().manual_seed(2)) * 30
    planner = tested().planner
    assert isinstance(planner, stacks.LibraryPlanner)
    if form == "ours":
        return lambda: planner.collisions(states, objects)

    def full() -> Tensor:
        predicted = objects.predict(25, 0.2).movedim(1, 2)[:, None]
        gap = model.separation(model.ego_boxes(states).unsqueeze(3), predicted).amin(-1)
        gap = gap - 0.02 * torch.arange(1, 26)
        return torch.where(gap > 0, torch.exp(-gap / 0.5), 10.0).sum(-1)

    return full


def simulating(count: int, at_once: int) -> Callable[[], Any]:
    """Closed-loop simulations of five seconds each, so many in a batch."""
    world, stack = scenes(count), tested()
    delta = 0.2 * torch.randn(count, 10, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)

    def run() -> None:
        for part in torch.arange(count).split(at_once):
            model.evaluate(world, part, delta[part], stack, SPACE, model.Objective())

    return run


def ranking(problems: int, at_once: int) -> Callable[[], Any]:
    """Fit Gaussian processes to 30 queries each and rank candidates by expected improvement."""
    generator = torch.Generator().manual_seed(4)
    x = 2 * torch.rand(problems, 30, 10, generator=generator) - 1
    y = -(x - 0.3).square().sum(-1)

    def run() -> None:
        for part in torch.arange(problems).split(at_once):
            method = search.Bayesian(len(part), 10, torch.Generator().manual_seed(0))
            method.tell(x[part], y[part])
            method.ask(0)

    return run


def screening(count: int, at_once: int) -> Callable[[], Any]:
    """Feasibility of candidates."""
    world = scenes(12)
    which = torch.arange(12).repeat(math.ceil(count / 12))[:count]
    delta = 0.3 * (2 * torch.rand(count, 10, generator=torch.Generator().manual_seed(5)) - 1)

    def run() -> None:
        for part in torch.arange(count).split(at_once):
            model.feasible(world, which[part], delta[part], SPACE)

    return run


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    for beams, azimuths, boxes in ((64, 720, 60), (8, 360, 20)):
        yield Workload(
            f"sweep, {beams} beams x {azimuths} azimuths, {boxes} boxes and ground",
            bind(casting, beams, azimuths, boxes, "ours"),
            bind(casting, beams, azimuths, boxes, "dense"),
            "every ray against every box",
            target=2.0,
        )
    yield Workload(
        "collision cost, 24 x 117 trajectories x 25 moments x 8 objects",
        bind(colliding, "ours"),
        bind(colliding, "full"),
        "every pair of boxes",
        target=2.0,
    )
    yield Workload(
        "24 closed-loop simulations, LiDAR",
        bind(simulating, 24, 24),
        bind(simulating, 24, 1),
        "one simulation at a time",
        target=2.0,
    )
    yield Workload(
        "screening of 240 candidates",
        bind(screening, 240, 240),
        bind(screening, 240, 1),
        "one candidate at a time",
        target=2.0,
    )
    yield Workload(
        "Bayesian search, fit and rank, 12 scenes",
        bind(ranking, 12, 12),
        bind(ranking, 12, 1),
        "one scene at a time",
        target=2.0,
    )
