"""Tests of papers/advsim. References are written from the definitions, or are shapely's and scikit-learn's."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from papers.advsim import data, model
from shared.errors import UserError

with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "model", model)  # what stands beside model.py imports it by its bare name
    from papers.advsim import search, stacks

ATTACK = model.Attack()
FOLDER = Path(data.__file__).parent


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(x: float = 0, y: float = 0, heading: float = 0, v: float = 0, kappa: float = 0) -> torch.Tensor:
    return torch.tensor([x, y, heading, v, kappa], dtype=torch.float64)


def straight(x: float, y: float, heading: float, v: float) -> torch.Tensor:
    """A track (L, 3) at constant velocity that is at (x, y) now."""
    t = (torch.arange(data.LENGTH) - data.HISTORY) * model.DT
    return torch.stack(
        [x + v * t * math.cos(heading), y + v * t * math.sin(heading), torch.full_like(t, heading)], -1
    ).float()


def simple_scene(tracks: list[torch.Tensor], speed: float = 8.0, wide: bool = True, **kwargs: object) -> model.Scene:
    """An ego on the x axis and cars on given tracks; the road is everywhere, or |y| < 6."""
    ego = torch.cat([straight(0, 0, 0, speed), torch.tensor([[speed, 0.0]]).expand(data.LENGTH, 2)], 1)
    s = torch.arange(data.ROUTE[1]).float() - data.ROUTE[0]
    route = torch.stack([s, 0 * s, 0 * s, 0 * s], -1)
    side = data.RASTER * data.CELL
    row = (torch.arange(data.RASTER) + 0.5) * data.CELL - side / 2
    drivable = ((row.abs() < 6) | wide)[:, None].expand(data.RASTER, data.RASTER)
    many = len(tracks)
    return model.make_scene(
        ego=ego,
        tracks=torch.stack(tracks),
        present=torch.ones(many, data.LENGTH, dtype=torch.bool),
        size=torch.tensor([[4.5, 1.9, 1.6]]).expand(many, 3).clone(),
        movable=torch.ones(many, dtype=torch.bool),
        route=route,
        drivable=drivable.contiguous(),
        corner=torch.tensor([40 - side / 2, -side / 2]),
        speed_limit=12.0,
        **{"actors": 1, "attack": ATTACK, **kwargs},
    )


def one(scene: model.Scene) -> tuple[model.Scene, torch.Tensor]:
    return model.stack([scene]), torch.zeros(1, dtype=torch.long)


def boxes(count: int, seed: int, spread: float = 6.0) -> torch.Tensor:
    place = torch.rand(count, 5, generator=gen(seed), dtype=torch.float64)
    low = torch.tensor([-spread, -spread, -math.pi, 0.5, 0.5])
    return low + place * (torch.tensor([spread, spread, math.pi, 6.0, 3.0]) - low)


def test_constants_of_model_and_data_agree() -> None:
    assert (data.DT, data.HISTORY, data.CELL) == (model.DT, model.HISTORY, model.CELL)


# ---- bicycle


def test_bicycle_drives_lines_and_circles() -> None:
    line = model.bicycle(state(1, 2, 0.5, 8), torch.zeros(50, 2, dtype=torch.float64))
    torch.testing.assert_close(line[-1], state(1 + 40 * math.cos(0.5), 2 + 40 * math.sin(0.5), 0.5, 8))
    circle = model.bicycle(state(v=5, kappa=0.05), torch.zeros(20, 2, dtype=torch.float64))
    chord = 2 * math.sin(0.05 * 5 * 2 / 2) / 0.05
    assert float(circle[-1, :2].norm()) == pytest.approx(chord, rel=1e-3)
    assert float(circle[-1, 2]) == pytest.approx(0.5)
    centre = torch.tensor([0.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(
        (circle[:, :2] - centre).norm(dim=-1), torch.full((21,), 20.0).double(), atol=0.3, rtol=0
    )
    controls = torch.tensor([[2.0, 0.0]]).double().expand(10, 2)
    start = model.bicycle(state(), controls)
    assert float(start[-1, 3]) == pytest.approx(2.0) and float(start[-1, 0]) == pytest.approx(0.9)  # position first
    braking = model.bicycle(state(v=1), -3 * controls)
    assert float(braking[-1, 3]) == 0 and float(braking[:, 3].min()) == 0


def test_limits_hold_together_for_wild_controls() -> None:
    limits, top = model.Limits(), torch.full((500,), 18.0)
    start = torch.zeros(500, 5)
    start[:, 3] = 15 * torch.rand(500, generator=gen())
    most = (limits.lateral / start[:, 3].square()).clamp_max(limits.curvature)
    start[:, 4] = most * (2 * torch.rand(500, generator=gen(1)) - 1)
    controls = torch.randn(500, 50, 2, generator=gen(2)) * torch.tensor([6.0, 0.5])
    assert model.within_limits(model.bicycle(start, controls, limits, top), limits, top).all()
    assert model.within_limits(model.bicycle(start, controls), limits, top).float().mean() < 0.1


def test_fit_reproduces_bicycle_tracks_and_survives_noise() -> None:
    controls = torch.zeros(2, data.LENGTH - 1, 2, dtype=torch.float64)
    controls[0] = torch.tensor([0.5, 0.01])
    controls[1] = torch.tensor([-1.0, -0.02])
    start = torch.stack([state(3, 4, 1, 6), state(0, 0, -2, 9, 0.01)])
    track = model.bicycle(start, controls)[..., :3]
    fitted, found, top, error = model.fit_bicycle(track, model.Limits(), window=1)
    assert error.max() < 0.02
    torch.testing.assert_close(found[:, :-2], controls[:, data.HISTORY : -2], atol=1e-6, rtol=0)
    noisy = track.clone()
    noisy[..., :2] += 0.03 * torch.randn(track.shape[:2] + (2,), generator=gen(), dtype=torch.float64)
    assert model.fit_bicycle(noisy, model.Limits())[3].max() < 0.3
    parked = torch.zeros(1, data.LENGTH, 3, dtype=torch.float64)
    parked[..., :2] = 0.01 * torch.randn(1, data.LENGTH, 2, generator=gen(1), dtype=torch.float64)
    still = model.fit_bicycle(parked, model.Limits())
    assert still[0][0, 4] == 0 and still[3].max() < 0.3  # no curvature from noise


def test_delta_0_is_the_recording_and_wrong_deltas_are_refused() -> None:
    scenes, which = one(simple_scene([straight(20, 4, 0, 7)]))
    moved = model.perturb(scenes, which, torch.zeros(1, 10), ATTACK)
    torch.testing.assert_close(moved[0, 0, :, :3], scenes.tracks[0, 0, data.HISTORY :], atol=1e-3, rtol=0)
    faster = model.perturb(scenes, which, torch.tensor([[1.0] * 5 + [0.0] * 5]), ATTACK)
    assert float(faster[0, 0, 10, 3]) == pytest.approx(10.0, abs=1e-3)  # 3 m/s^2 for a second
    assert float(faster[0, 0, -1, 3]) <= 1.3 * 7 + 3 + 1e-3
    with pytest.raises(ValueError, match="delta has 8 numbers, expected 10"):
        model.perturb(scenes, which, torch.zeros(1, 8), ATTACK)
    with pytest.raises(ValueError, match=r"expected numbers in \[-1, 1\]"):
        model.perturb(scenes, which, torch.full((1, 10), 1.5), ATTACK)


# ---- geometry


def test_box_distances_are_shapelys() -> None:
    shapely = pytest.importorskip("shapely")
    a, b = boxes(300, 0), boxes(300, 1)
    found = model.signed_distance(a, b)
    for i in range(300):
        p, q = (shapely.Polygon(model.corners(box).tolist()) for box in (a[i], b[i]))
        assert max(float(found[i]), 0) == pytest.approx(p.distance(q), abs=1e-9)
        assert (float(found[i]) < 0) == (p.intersection(q).area > 1e-12)
        union = p.intersection(q).area / p.union(q).area
        assert float(model.box_iou(a[i], b[i], side=60)) == pytest.approx(union, abs=0.02)
    assert 30 < int((found < 0).sum()) < 290
    assert (model.separation(a, b) <= found + 1e-9).all()


def test_equal_and_touching_boxes() -> None:
    box = torch.tensor([1.0, 2.0, 0.0, 4.0, 2.0])
    assert float(model.signed_distance(box, box)) == -2.0
    touching = box + torch.tensor([4.0, 0, 0, 0, 0])
    assert float(model.signed_distance(box, touching)) == 0.0
    assert float(model.box_iou(box, box)) == pytest.approx(1)
    ego = model.ego_boxes(state(0, 0, math.pi / 2))
    torch.testing.assert_close(ego, torch.tensor([0, 1.35, math.pi / 2, 4.877, 2.0]).double())


# ---- LiDAR


def test_a_ray_and_a_box() -> None:
    def ray(origin: list[float], direction: list[float], leave: bool = False, yaw: float = 0.0) -> float:
        centre, half = torch.tensor([5.0, 0, 0]), torch.tensor([1.0, 1, 1])
        return float(
            model.ray_box(torch.tensor(origin), torch.tensor(direction), centre, torch.tensor(yaw), half, leave)
        )

    assert ray([0.0, 0, 0], [1.0, 0, 0]) == 4.0
    assert ray([5.0, 0, 0], [1.0, 0, 0]) == 0.0
    assert ray([0.0, 0, 0], [1.0, 0, 0], leave=True) == 4.0
    assert ray([5.0, 0, 0], [1.0, 0, 0], leave=True) == pytest.approx(1.0)
    assert ray([0.0, 2, 0], [1.0, 0, 0]) == math.inf  # parallel, outside
    assert ray([0.0, 0, 0], [-1.0, 0, 0]) == math.inf
    assert ray([0.0, 0, 0], [1.0, 0, 0], yaw=math.pi / 4) == pytest.approx(5 - math.sqrt(2))


def test_sweeps_are_what_dense_casting_gives() -> None:
    lidar = model.Lidar(beams=16, azimuths=180, reach=1e6)
    place = boxes(40, 3, 40.0).float().view(2, 20, 5)
    height = 0.5 + 3 * torch.rand(2, 20, generator=gen(4))
    origin = torch.tensor([[0.0, 0.0], [100.0, 60.0]])
    place[1, :, :2] += origin[1]
    ranges, ids = lidar.ranges(origin, place, height, torch.ones(2, 20, dtype=torch.bool))
    azimuth, elevation = lidar.angles()
    a, e = torch.meshgrid(azimuth, elevation, indexing="ij")
    rays = torch.stack([a.cos() * e.cos(), a.sin() * e.cos(), e.sin()], -1).view(-1, 3)
    for i in range(2):
        start = torch.tensor([*origin[i].tolist(), model.SENSOR_HEIGHT])
        wanted, owner = model.cast_dense(start, rays, place[i], height[i])
        torch.testing.assert_close(ranges[i].view(-1), wanted, atol=2e-3, rtol=1e-4)
        assert (ids[i].view(-1) == owner).float().mean() > 0.999
        assert (owner >= 0).float().mean() > 0.05
    absent = lidar.ranges(origin, place, height, torch.zeros(2, 20, dtype=torch.bool))
    assert (absent[1] == -1).all()


def test_a_wall_hides_what_is_behind_it() -> None:
    lidar = model.Lidar(beams=16, azimuths=720, drop=0.0, noise=0.0)
    wall, car = torch.tensor([5.0, 0, 0, 0.2, 2.0]), torch.tensor([12.0, 0, 0, 1.0, 1.0])
    size, origin = torch.tensor([[2.0, 1.5]]), torch.zeros(1, 2)
    for y, visible in ((0.0, False), (8.0, True)):
        moved = car + torch.tensor([0, y, 0, 0, 0])
        sweep = lidar.sweep(origin, torch.stack([wall, moved])[None], size, torch.ones(1, 2, dtype=torch.bool))
        assert bool((sweep.ids == 1).any()) == visible
        hit = sweep.points[sweep.ids == 0]
        assert hit[:, 0].sub(4.9).abs().max() < 1e-3 or visible
    there = torch.ones(1, 1, dtype=torch.bool)

    def sweep(drop: float) -> model.Sweep:
        return model.Lidar(beams=4, azimuths=90, drop=drop).sweep(origin, wall.view(1, 1, 5), size[:, :1], there, 7)

    assert torch.equal(sweep(0.05).points, sweep(0.05).points)
    assert 0.9 < float(sweep(0.05).valid.sum() / sweep(0.0).valid.sum()) < 0.99


def fake_sweep() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A noiseless real-looking sweep of two cars: points, rows, boxes; z of the ground is -1.64."""
    lidar = model.Lidar(beams=32, azimuths=1800, drop=0.0, noise=0.0, lowest=-15, highest=5)
    cars = torch.tensor([[10.0, 2.0, 0.3, 4.5, 1.9], [18.0, -3.0, 0.0, 4.5, 1.9]])
    sweep = lidar.sweep(torch.zeros(1, 2), cars[None], torch.full((1, 2), 1.6), torch.ones(1, 2, dtype=torch.bool))
    points, rows = sweep.points[0], torch.arange(32).repeat(1800)
    points = points - torch.tensor([0, 0, model.SENSOR_HEIGHT])
    return points[sweep.valid[0]], rows[sweep.valid[0]].to(torch.uint8), cars


@pytest.mark.parametrize("carry", [50, 10**6])
def test_edited_sweeps(carry: int) -> None:
    points, rows, cars = fake_sweep()
    low = -model.SENSOR_HEIGHT
    vertical = torch.tensor([[1.6, low + 0.8]]).expand(2, 2) + torch.tensor([0.02, 0.0])
    grown = cars + torch.tensor([0, 0, 0, 0.02, 0.02])

    def edit(after: torch.Tensor) -> model.EditedSweep:
        return model.edit_sweep(points, rows, grown, after, vertical, torch.zeros(3), low, gen(), carry=carry)

    same = edit(grown)
    assert torch.equal(same.points, points) and torch.equal(same.source, torch.arange(len(points)))
    after = grown.clone()
    after[0, :2] = torch.tensor([10.0, 6.0])
    moved = edit(after)
    body = vertical[0] * torch.tensor([0.8, 1.0])
    assert not model.inside_box(moved.points, grown[0], body).any()
    wide = torch.tensor([0, 0, 0, 0.2, 0.2])  # room for the noise of cast ranges
    there, was = (int(model.inside_box(*p, body).sum()) for p in ((moved.points, after[0] + wide), (points, grown[0])))
    assert 0.5 * was < there < 1.5 * was
    kept = moved.source[moved.source >= 0]
    assert torch.equal(points[kept], moved.points[moved.source >= 0]) and torch.equal(
        rows[kept], moved.laser[moved.source >= 0]
    )
    assert model.inside_box(moved.points, grown[1], body).sum() == model.inside_box(points, grown[1], body).sum()
    azimuth = torch.atan2(points[:, 1], points[:, 0])
    untouched = (azimuth < 0) | (azimuth > 1.2)
    assert torch.isin(untouched.nonzero()[:, 0], kept).all()  # nothing changed over there
    behind = after.clone()
    behind[0, :3] = torch.tensor([36.0, -6.0, 0.0])  # in the shadow of the second car
    hidden = edit(behind)
    assert model.inside_box(hidden.points, behind[0], body).sum() <= 0.02 * was


# ---- feasibility


def test_infeasible_perturbations() -> None:
    scenes, which = one(simple_scene([straight(12, 3.5, 0, 8), straight(24, 3.5, 0, 8)], wide=False))

    def ok(a: float = 0.0, u: float = 0.0) -> bool:
        delta = torch.tensor([[a] * 5 + [u] * 5])
        return bool(model.feasible(scenes, which, delta, ATTACK))

    assert ok() and ok(0.1) and ok(-0.2)
    assert not ok(u=1.0)  # off the road
    assert not ok(1.0)  # into the car ahead
    assert not ok(u=-0.4)  # off its other side
    lead, which = one(simple_scene([straight(9, 0, 0, 8)]))
    braking = torch.tensor([[-1.0] * 5 + [0.0] * 5])
    assert not model.feasible(lead, which, braking, ATTACK).any()  # the expert would run into it
    assert model.feasible(lead, which, -0.5 * braking, ATTACK).all()
    assert torch.equal(scenes.actors, torch.tensor([[0]]))


def test_refused_recordings_say_why() -> None:
    slow, far = straight(20, 4, 0, 0.1), straight(300, 4, 0, 8)
    with pytest.raises(model.NotUsable, match=r"0 of 1 actors .*1 too slow, 1 too far"):
        simple_scene([slow, far])
    with pytest.raises(model.NotUsable, match="the expert touches an actor"):
        simple_scene([straight(2, 0, 0, 8)])
    jump = straight(20, 4, 0, 8)
    jump[30:, 1] += 3
    with pytest.raises(model.NotUsable, match="1 no bicycle fits"):
        simple_scene([jump])


def test_tracks_that_end_are_continued() -> None:
    track = straight(20, 4, 0.1, 8)[None]
    present = torch.arange(data.LENGTH)[None] < 40
    cut = torch.where(present[..., None], track, 0)
    torch.testing.assert_close(model.continue_tracks(cut, present), track, atol=1e-3, rtol=0)


# ---- stacks


def test_the_detector_finds_a_car_and_its_speed() -> None:
    scenes, which = one(simple_scene([straight(15, 3, 0, 6), straight(12, -5, 0, 0)]))
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
    seen = stacks.LidarPerception(model.Lidar(beams=16, azimuths=720, lowest=-12, highest=2))(world)
    iou = model.box_iou(world.boxes(world.step)[0][:, None], seen.boxes[0]).masked_fill(~seen.mask[0], 0)
    best, index = iou.max(1)
    assert (best > 0.5).all() and int(seen.mask.sum()) == 2
    assert float(seen.speed[0, index[0]]) == pytest.approx(6, abs=1) and float(seen.speed[0, index[1]]) == 0
    true = stacks.PerfectPerception()(world)
    torch.testing.assert_close(true.speed[0], torch.tensor([6.0, 0.0]), atol=1e-3, rtol=0)
    nothing = replace(world, present=torch.zeros_like(world.present))
    assert not stacks.LidarPerception(model.Lidar(beams=4, azimuths=90))(nothing).mask.any()


def test_predictions_are_measured_against_the_true_future() -> None:
    scenes, which = one(simple_scene([straight(15, 3, 0, 6), straight(12, -5, 0, 0), straight(50, 3, 0, 6)]))
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
    seen = stacks.PerfectPerception()(world)
    torch.testing.assert_close(stacks.prediction_error(world, seen), torch.zeros(2), atol=2e-3, rtol=0)
    still = replace(seen, speed=0 * seen.speed)
    late = 6 * 0.1 * torch.arange(1, 51).float().mean()  # 6 m/s, left standing
    torch.testing.assert_close(stacks.prediction_error(world, still), torch.tensor([late, 0.0]), atol=2e-3, rtol=0)
    elsewhere = replace(seen, boxes=seen.boxes + torch.tensor([0, 2.5, 0, 0, 0]))
    assert len(stacks.prediction_error(world, elsewhere)) == 0  # nobody is detected
    sensor = stacks.LidarPerception(model.Lidar(beams=16, azimuths=720, lowest=-12, highest=2))
    overlap = stacks.detection_overlap(world, sensor)
    assert len(overlap) == 3 and int((overlap >= 0.5).sum()) >= 2
    blind = replace(sensor, reach=1.0)
    assert stacks.detection_overlap(world, blind).max() == 0


def test_anything_that_plans_can_be_tested() -> None:
    scenes, which = one(simple_scene([straight(20, 8, 0, 8)]))

    class Expert:
        def plan(self, world: model.World) -> torch.Tensor:
            return scenes.ego[:, world.step + 1 :]

    for replan in (0, 5, 7):
        outcome, ego = model.evaluate(scenes, which, torch.zeros(1, 10), Expert(), ATTACK, model.Objective(), replan)
        assert torch.equal(ego, scenes.ego[:, data.HISTORY :]) and float(outcome.l2.max()) == 0


def perfect() -> dict[str, model.Autonomy]:
    plain = torch.tensor([4.0, 0.5, 0.3, 0.1, 0.05])
    return {
        "plt": stacks.Stack(stacks.PerfectPerception(), stacks.LibraryPlanner(plain)),
        "acc": stacks.Stack(stacks.PerfectPerception(), stacks.AccPlanner()),
    }


@pytest.mark.parametrize("name", ["plt", "acc"])
def test_planners_brake_for_what_stands_and_go_where_nothing_is(name: str) -> None:
    scenes, which = one(simple_scene([straight(30, 12, 0, 8)]))

    def outcome(tracks: list[torch.Tensor], size: list[list[float]]) -> model.Outcome:
        world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
        present = torch.ones(1, len(tracks), data.LENGTH, dtype=torch.bool)
        world = replace(world, tracks=torch.stack(tracks)[None], size=torch.tensor([size]), present=present)
        return model.judge(world, scenes.ego[:, data.HISTORY :], model.drive(world, perfect()[name]), model.Objective())

    car, wall = [4.5, 1.9, 1.6], [120.0, 1.0, 2.0]
    free = outcome([straight(30, 12, 0, 8)], [car])
    assert not free.crashed().any() and float(free.progress) > 38
    blocked = outcome([straight(26, 0, 0, 0), straight(40, 2.8, 0, 0), straight(40, -2.8, 0, 0)], [car, wall, wall])
    assert not blocked.crashed().any() and float(blocked.progress) < 20


def test_idm_by_hand() -> None:
    acc = stacks.AccPlanner()
    a = acc.idm(*(torch.tensor([value]) for value in (10.0, 13.4, 20.0, 8.0)))
    space = 2 + 15 + 10 * 2 / (2 * math.sqrt(1.5 * 2))
    assert float(a) == pytest.approx(1.5 * (1 - (10 / 13.4) ** 4 - (space / 20) ** 2), rel=1e-5)
    assert float(acc.idm(*(torch.tensor([value]) for value in (10.0, 13.4, 1.0, 0.0)))) == -6
    free = acc.idm(*(torch.tensor([value]) for value in (0.0, 13.4, math.inf, 0.0)))
    assert float(free) == 1.5


def test_culled_collision_cost_is_the_full_one() -> None:
    scenes, which = one(simple_scene([straight(15, 3, 0, 6), straight(20, -3, 3.1, 5)]))
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
    objects = stacks.PerfectPerception()(world)
    planner = perfect()["plt"].planner
    states = torch.rand(1, 30, 25, 5, generator=gen()) * torch.tensor([40.0, 8.0, 0.5, 1.0, 0.0]) - torch.tensor(
        [0, 4.0, 0, 0, 0]
    )
    predicted = objects.predict(25, 0.2).movedim(1, 2)[:, None]
    gap = model.separation(model.ego_boxes(states).unsqueeze(3), predicted).amin(-1) - 0.02 * torch.arange(1, 26)
    full = torch.where(gap > 0, torch.exp(-gap / 0.5), 10.0).sum(-1)
    torch.testing.assert_close(planner.collisions(states, objects), full, atol=25 * math.exp(-6), rtol=0)


def test_imitation_learns_to_follow_and_has_the_stated_size() -> None:
    with torch.device("meta"):
        net = stacks.ImitationNet()
    assert (
        sum(p.numel() for p in net.parameters())
        == 6 * 25 * 16 + 16 + 16 * 9 * 32 + 32 + 2 * (32 * 9 * 32 + 32) + 513 * 64 + 64 + 64 * 20 + 20
    )
    torch.manual_seed(0)
    net = stacks.ImitationNet(channels=4)
    scenes = model.stack([simple_scene([straight(20, 4, 0, 8)], speed=v) for v in (3.0, 6.0, 9.0)])
    which = torch.arange(3)
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(3, 10), ATTACK))
    stack = stacks.ImitationStack(net, stacks.LidarPerception(model.Lidar(beams=4, azimuths=90)))
    raster, speed = stack.inputs(world)
    assert raster.shape == (3, 6, 64, 64) and (raster[:, -1].sum((1, 2)) > 40).all()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = stacks.cloning_loss(stack.decode(world, net(raster, speed)), scenes.ego[:, data.HISTORY + 1 :]).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert stack.plan(world).shape == (3, 50, 5)


def test_lessons_of_found_scenes_differ_once_the_attack_has_begun(train) -> None:
    scenes = model.stack([simple_scene([straight(12, 3.5, 0, 8)])])
    imitator = stacks.ImitationStack(stacks.ImitationNet(), stacks.LidarPerception(model.Lidar(beams=4, azimuths=360)))
    braking = torch.tensor([[-1.0] * 5 + [0.0] * 5])
    plain, found = (train.lessons(imitator, scenes, delta, train.Config()) for delta in (0 * braking, braking))
    same = [torch.equal(a[1], b[1]) for a, b in zip(plain, found, strict=True)]
    assert same[0] and not any(same[1:])
    for (world, _, speed), moment in zip(found, train.MOMENTS, strict=True):
        assert torch.equal(world.now, scenes.ego[:, data.HISTORY + moment]) and torch.equal(speed, world.now[:, 3])
    expert = scenes.ego[:, data.HISTORY + 31 :]
    with torch.no_grad():
        assert float(stacks.cloning_loss(imitator.plan(found[3][0]), expert)) > 0
    assert (
        float(stacks.cloning_loss(torch.cat([expert, 0 * expert], 1), expert)) == 0
    )  # what is not known costs nothing


def test_stacks_do_not_see_the_future() -> None:
    scenes, which = one(simple_scene([straight(20, 4, 0, 8)]))
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
    assert world.ego[:, data.HISTORY + 1 :].isnan().all()
    blind = replace(world, tracks=world.tracks.clone())
    blind.tracks[:, :, data.HISTORY + 1 :] = 1e6
    for stack in perfect().values():
        torch.testing.assert_close(stack.plan(world), stack.plan(blind))


# ---- objective


def test_the_experts_own_drive_scores_its_comfort_only() -> None:
    scenes, which = one(simple_scene([straight(20, 8, 0, 8)]))
    scenes.ego[0, data.HISTORY :, 4] = 0.03
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
    expert = scenes.ego[:, data.HISTORY :]
    outcome = model.judge(world, expert, expert, model.Objective())
    assert float(outcome.score) == pytest.approx(0.1 * 50 * 8 * 8 * 0.03 / 3, rel=1e-4)
    assert not outcome.crashed().any() and float(outcome.l2.max()) == 0
    late = expert.clone()
    late[:, :, 0] -= 2
    shifted = model.judge(world, expert, late, model.Objective())
    assert float(shifted.score - outcome.score) == pytest.approx(0.1 * 1.5, rel=1e-3)  # smooth L1 of 2 m


def test_who_is_to_blame() -> None:
    scenes, which = one(simple_scene([straight(14, 8, 0, 8)]))
    world = model.initial_world(scenes, which, model.perturb(scenes, which, torch.zeros(1, 10), ATTACK))
    expert = scenes.ego[:, data.HISTORY :]

    def judged(track: torch.Tensor, ego: torch.Tensor) -> model.Outcome:
        return model.judge(replace(world, tracks=track[None, None]), expert, ego, model.Objective())

    rammed = judged(straight(14, 0, 0, 0), expert)
    assert rammed.crashed().all() and rammed.at_fault.all() and int(rammed.collision) == 10
    assert rammed.crashed(1.0).all() and not rammed.crashed(0.9).any()
    standing = expert.clone()
    standing[..., 0], standing[..., 3] = 0.0, 0.0
    assert not judged(straight(-20, 0, 0, 8), standing).crashed().any()  # struck from behind while standing
    slow = judged(straight(-20, 0, 0, 14), expert)
    assert slow.crashed().all() and not slow.at_fault.any()


def test_mirrored_scenes_score_alike() -> None:
    tracks = [straight(18, 3.5, 0, 6), straight(40, -4, math.pi, 5)]
    left = simple_scene(tracks)
    right = simple_scene([track * torch.tensor([1.0, -1, -1]) for track in tracks])
    delta = 0.3 * (2 * torch.rand(6, 10, generator=gen()) - 1)
    which = torch.zeros(6, dtype=torch.long)
    for stack in perfect().values():
        a, _ = model.evaluate(model.stack([left]), which, delta, stack, ATTACK, model.Objective())
        mirrored = torch.cat([delta[:, :5], -delta[:, 5:]], 1)
        b, _ = model.evaluate(model.stack([right]), which, mirrored, stack, ATTACK, model.Objective())
        torch.testing.assert_close(a.score, b.score, atol=1e-2, rtol=1e-3)
    same = model.feasible(model.stack([left]), which, delta, ATTACK)
    assert torch.equal(same, model.feasible(model.stack([right]), which, mirrored, ATTACK))


# ---- search


def test_gaussian_process_is_scikit_learns() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    x = 2 * torch.rand(12, 3, generator=gen(), dtype=torch.float64) - 1
    y = torch.sin(2 * x).sum(-1)
    at = 2 * torch.rand(40, 3, generator=gen(1), dtype=torch.float64) - 1
    gp = search.gaussian_process(x[None], y[None])
    gp.covar_module.outputscale = torch.tensor([2.0]).double()
    gp.covar_module.base_kernel.lengthscale = torch.tensor([[[0.5, 1.0, 2.0]]]).double()
    gp.mean_module.constant.data.zero_()
    with torch.no_grad():
        posterior = gp.eval().posterior(at[:, None, None])
    peer = GaussianProcessRegressor(ConstantKernel(2.0) * Matern([0.5, 1, 2], nu=2.5), alpha=1e-4, optimizer=None)
    mean, std = peer.fit(x.numpy(), y.numpy()).predict(at.numpy(), return_std=True)
    np.testing.assert_allclose(posterior.mean[:, 0, 0, 0].numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(posterior.variance[:, 0, 0, 0].sqrt().numpy(), std, atol=1e-5)


def test_candidates_are_ranked_by_expected_improvement() -> None:
    """(mean - best) Phi(z) + std phi(z), z = (mean - best) / std, of botorch's own posterior."""
    from botorch.acquisition.analytic import LogExpectedImprovement
    from scipy.stats import norm

    searcher = search.Bayesian(2, 3, gen())
    x = searcher.uniform(14)
    searcher.tell(x, -(x - 0.3).square().sum(-1))
    ranked = searcher.rank(most=1200)
    scores = searcher.scores.double()
    y = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    points = ranked.double().transpose(0, 1).unsqueeze(2)
    with torch.no_grad():
        posterior = searcher.model.posterior(points)
        ours = LogExpectedImprovement(searcher.model, best_f=y.amax(1, keepdim=True))(points).exp().numpy()
    mean, std = posterior.mean[..., 0, 0].numpy(), posterior.variance[..., 0, 0].sqrt().numpy()
    z = (mean - y.amax(1).numpy()) / std
    gain = std * (z * norm.cdf(z) + norm.pdf(z))
    np.testing.assert_allclose(ours, gain, rtol=1e-6, atol=1e-12)
    assert (np.diff(gain, axis=0) <= 1e-9).all() and (gain[0] > 2 * gain[600]).all()


class Free:
    """Everything is feasible."""

    def __call__(self, searcher: search.Search, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        asked = searcher.ask(0)[:, :count]
        return asked, asked, torch.ones(asked.shape[:2], dtype=torch.bool)


def optimise(name: str, budget: int, size: int, seed: int = 0) -> search.Found:
    target = torch.tensor([[0.4, -0.3] + [0.5] * (size - 2), [-0.6, 0.2] + [0.1] * (size - 2)])

    def score(which: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return -(delta - target[which]).square().sum(-1)

    return search.attack_scenes(score, search.SEARCHES[name](2, size, gen(seed)), Free(), budget)


def test_bayesian_search_finds_the_top_of_a_bowl() -> None:
    found, again = (optimise("bayesian", 30, 2) for _ in "ab")
    assert found.score.min() > -(0.05**2)
    assert torch.equal(found.delta, again.delta)
    assert (found.curve.diff(dim=1) >= 0).all() and found.curve.shape == (2, 30)


@pytest.mark.parametrize("name", list(search.SEARCHES))
def test_searches_climb_and_repeat(name: str) -> None:
    budget = 25 if name == "bayesian" else 60
    found = optimise(name, budget, 6)
    assert found.curve.shape == (2, budget) and (found.curve.diff(dim=1) >= 0).all()
    assert torch.equal(found.curve[:, -1], found.score)
    if name != "random":
        assert (found.score > 0.8 * found.curve[:, 0]).all()
        blind = torch.stack([optimise("random", budget, 6, seed).score.mean() for seed in range(3)]).mean()
        guided = torch.stack(
            [optimise(name, budget, 6, seed).score.mean() for seed in range(1 if budget < 30 else 3)]
        ).mean()
        assert guided > blind
    assert torch.equal(found.score, optimise(name, budget, 6).score)
    if name == "bayesian":
        with pytest.raises(ValueError, match="expected at least 10"):
            optimise(name, 9, 6)


def test_infeasible_scores_stay_finite() -> None:
    scores = search.RandomSearch(2, 3, gen()).filled(torch.tensor([[1.0, 3.0, -math.inf], [2.0, 2.0, 2.0]]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 2.0]]))


@pytest.mark.parametrize("screening", ["reject", "nearest"])
def test_screening_lets_only_feasible_ones_through(screening: str) -> None:
    scenes = model.stack([simple_scene([straight(12, 3.5, 0, 8), straight(24, 3.5, 0, 8)], wide=False)])
    screen = search.Rejecting(scenes, ATTACK) if screening == "reject" else search.Nearest(scenes, ATTACK, gen(), 30)
    calls = []

    def score(which: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        assert model.feasible(scenes, which, delta, ATTACK).all()
        calls.append(len(delta))
        return delta.sum(-1)

    found = search.attack_scenes(score, search.Genetic(1, 10, gen()), screen, 32)
    assert sum(calls) == 32 - int(found.rejected.sum()) and found.curve.shape == (1, 32)
    assert bool(model.feasible(scenes, torch.zeros(1, dtype=torch.long), found.delta, ATTACK))
    if screening == "nearest":
        member = screen.bank[:, 3:4]
        asked = search.Search(1, 10, gen())
        asked.ask = lambda attempt: member  # type: ignore[method-assign]
        assert torch.equal(screen(asked, 1)[1], member)  # a member is its own nearest


# ---- generated traffic


def test_generated_roads_know_themselves() -> None:
    rng = np.random.default_rng(0)
    for curvature in (0.006, -0.006):
        road = data.Road(curvature, -5.25, 30.0, np.array([3.0, -7.0, 0.8]))
        s, d = rng.uniform(-30, 60, 500), rng.uniform(-12, 12, 500)
        inside = (d >= -5.25 - data.SIDE) & (d <= 5.25 + data.SIDE) | (np.abs(s - 30) <= 4.0)
        assert (road.drivable(road.world(s, d)[:, :2]) == inside).all()
        ahead, here = road.world(np.array(10.01), np.array(2.0)), road.world(np.array(10.0), np.array(2.0))
        course = math.atan2(ahead[1] - here[1], ahead[0] - here[0])
        assert math.remainder(course - here[2], 2 * math.pi) == pytest.approx(0, abs=1e-3)


def test_crossing_vehicles_leave_a_gap() -> None:
    time = np.arange(60) * 0.1
    # the ego is on the lane at 20 m in [2.0, 2.7] s, the car on the ego's way in [3.4, 4.6] s
    assert data.gap_between(8 * time, 20.0, 5 * time - 20) == pytest.approx(0.7)
    assert data.gap_between(8 * time, 20.0, 0 * time - 20) == math.inf
    rng, seen = np.random.default_rng(3), 0
    for window in (window for _ in range(12) for window in data.draw_traffic(rng)[:1]):
        tracks, size, ego = (torch.from_numpy(array) for array in (window.tracks, window.size, window.ego))
        across = (tracks[:, data.HISTORY, 2] - ego[data.HISTORY, 2]).cos().abs() < 0.7
        boxes, mine = model.actor_boxes(tracks[None], size[None])[0, across], model.ego_boxes(ego)
        for late in range(28):
            assert (model.separation(mine[: data.LENGTH - late], boxes[:, late:]) > 0).all()
            assert (model.separation(mine[late:], boxes[:, : data.LENGTH - late]) > 0).all()
        seen += int(across.sum())
    assert seen >= 4


def test_generated_scenes_are_solvable(train) -> None:
    scenes = train.generate(train.Config(), 3, 5)
    zero = torch.zeros(3, 10)
    assert model.feasible(scenes, torch.arange(3), zero, ATTACK).all()
    gap = model.signed_distance(
        model.ego_boxes(scenes.ego)[:, None], model.actor_boxes(scenes.tracks, scenes.size)
    ).masked_fill(~scenes.present, 99)
    assert float(gap.min()) > 0.3
    s, left, *_ = stacks.project(scenes.route, scenes.ego[..., :2])
    assert float(left.abs().max()) < 0.1 and float((s[:, data.HISTORY] - data.ROUTE[0]).abs().max()) < 0.1
    again = train.generate(train.Config(), 3, 5)
    assert all(torch.equal(getattr(scenes, f.name), getattr(again, f.name)) for f in dataclasses.fields(scenes))


# ---- Argoverse 2


def logs_of(data_root: Path) -> list[Path]:
    folder = data_root / "argoverse2-sensor-sample"
    if not folder.is_dir():
        pytest.skip("no argoverse2-sensor-sample in the small real data")
    return data.find_logs(folder)


def test_real_logs_reproduce_their_own_numbers(data_root) -> None:
    """The expert's clearance, with its box at the frame's origin and 1.35 m ahead of it, and the points in boxes."""
    clearance = {"3b3570b4": (0.57, 0.52), "3bffdcff": (0.20, 0.19), "7fab2350": (0.42, 0.52), "adcf7d18": (0.07, 0.36)}
    counts = []
    for path in logs_of(data_root):
        log = data.read_log(path)
        table = data.read_table(next(path.glob("annotations*.feather")), data.ANNOTATION_COLUMNS, log.name)
        table = table[table["category"] != "EGO_VEHICLE"]
        turn = data.quaternions_of(table, log.name, "a box")
        columns = [table[name] for name in ("tx_m", "ty_m", "length_m", "width_m")]
        annotated = torch.from_numpy(np.insert(np.column_stack(columns), 2, data.yaw_of(turn), axis=1))
        tracked = model.actor_boxes(torch.from_numpy(log.tracks)[None], torch.from_numpy(log.size)[None])[0]
        ego = torch.from_numpy(log.ego)
        for wanted, ahead in zip(clearance[log.name[:8]], (0.0, model.EGO_CENTRE), strict=True):
            box = torch.tensor([ahead, 0, 0, *model.EGO_SIZE[:2]], dtype=torch.float64)
            least = float(model.signed_distance(box, annotated).min())
            assert least == pytest.approx(wanted, abs=0.005), log.name
            mine = model.ego_boxes(ego)
            mine[:, :2] += (ahead - model.EGO_CENTRE) * torch.stack([ego[:, 2].cos(), ego[:, 2].sin()], -1)
            gap = model.signed_distance(mine[None], tracked).masked_fill(~torch.from_numpy(log.present), 99)
            # scenes are flat: a box centre 1.2 m up moves sideways by 0.02 m for each degree that the ego rolls
            assert float(gap.min()) == pytest.approx(least, abs=0.025), log.name
        for stamp, file in log.sweeps.items():
            points, _ = data.read_sweep(file)
            found = log.boxes[stamp].interior(points.double().numpy())
            assert (found == log.boxes[stamp].points).all()
            counts.append(len(found))
    assert sorted(counts) == [47, 81, 81]


def test_real_sweeps_are_edited(data_root) -> None:
    path = next(path for path in logs_of(data_root) if path.name.startswith("7fab"))
    log = data.read_log(path)
    stamp, file = next(iter(log.sweeps.items()))
    points, laser = data.read_sweep(file)
    found = log.boxes[stamp]
    flat, tall = (
        torch.from_numpy(found.flat()).float(),
        torch.from_numpy(np.column_stack([found.size[:, 2], found.centre[:, 2]])).float(),
    )
    sensor = torch.tensor(data.UP_LIDAR)
    same = model.edit_sweep(points, laser, flat, flat, tall, sensor, data.GROUND, gen())
    assert torch.equal(same.points, points) and torch.equal(same.source, torch.arange(len(points)))
    i = int(np.argmax(found.points * (np.array(found.category) == "REGULAR_VEHICLE")))
    after = flat.clone()
    after[i, :2] += 3 * torch.stack([flat[i, 2].cos(), flat[i, 2].sin()])
    edited = model.edit_sweep(points, laser, flat, after, tall, sensor, data.GROUND, gen())
    kept = edited.source >= 0
    assert torch.equal(points[edited.source[kept]], edited.points[kept]) and kept.sum() > 0.9 * len(points)
    assert int(model.inside_box(edited.points, after[i], tall[i]).sum()) > 0.3 * found.points[i]


def test_nuscenes_sweeps_can_be_edited_too(data_root) -> None:
    files = sorted((data_root / "nuscenes-one-frame").glob("*LIDAR_TOP*.pcd.bin"))
    if not files:
        pytest.skip("no nuscenes-one-frame in the small real data")
    points, laser = data.read_nuscenes_sweep(files[0])
    assert points.shape == (len(laser), 3) and int(laser.max()) == 31
    before = torch.tensor([[8.0, 4.0, 0.0, 4.5, 2.0]])
    after = before + torch.tensor([4.0, 0, 0, 0, 0])
    tall = torch.tensor([[1.6, -1.0]])
    edited = model.edit_sweep(points, laser, before, after, tall, torch.zeros(3), -1.84, gen())
    assert (edited.source >= 0).float().sum() > 0.9 * len(points)


def test_check_data_on_real_logs(data_root, run_paper) -> None:
    logs_of(data_root)
    folder = str(data_root / "argoverse2-sensor-sample")
    result = run_paper("advsim", ["--preset", "argoverse2", "--data", folder, "--check-data", "--windows", "3", "9"])
    assert result.code == 0, result.err
    assert "4 logs found" in result.out and result.out.count("(as expected)") == 3


def write_log(folder: Path, spoil: str = "") -> Path:
    """A log in the official layout: two cars that pass an ego at 8 m/s, and one sweep."""
    import pandas as pd

    log = folder / "val" / "0b0b0b0b-1111"
    (log / "map").mkdir(parents=True)
    (log / "sensors" / "lidar").mkdir(parents=True)
    stamps = 10**15 + np.arange(80) * 100_000_000
    rows = []
    for i, stamp in enumerate(stamps):
        for track, (x, y, v) in {"a": (15, 3.5, 7.0), "b": (60, -3.5, -6.0)}.items():
            at = {"timestamp_ns": stamp, "track_uuid": track, "category": "REGULAR_VEHICLE", "length_m": 4.5}
            at |= {"width_m": 1.9, "height_m": 1.6, "qw": 1.0, "qx": 0.0, "qy": 0.0, "qz": 0.0}
            rows.append(at | {"tx_m": x + (v - 8) * 0.1 * i, "ty_m": y, "tz_m": 0.5, "num_interior_pts": 0})
    table = pd.DataFrame(rows)
    if spoil == "size":
        table.loc[3, "width_m"] = 0.0
    if spoil == "quaternion":
        table.loc[5, "qw"] = 0.9
    if spoil == "twice":
        table = pd.concat([table, table.iloc[[4]]], ignore_index=True)
    if spoil == "column":
        table = table.drop(columns="height_m")
    if spoil != "annotations":
        table.to_feather(log / "annotations.feather")
    pose = pd.DataFrame(
        {
            "timestamp_ns": stamps,
            "qw": 1.0,
            "qx": 0.0,
            "qy": 0.0,
            "qz": 0.0,
            "tx_m": 100 + 0.8 * np.arange(80),
            "ty_m": 50.0,
            "tz_m": 0.0,
        }
    )
    (pose.drop(index=7) if spoil == "pose" else pose).to_feather(log / "city_SE3_egovehicle.feather")
    square = [{"x": x, "y": y, "z": 0.0} for x, y in ((0, 0), (400, 0), (400, 100), (0, 100))]
    areas = {} if spoil == "areas" else {"1": {"area_boundary": square, "id": 1}}
    if spoil != "map":
        (log / "map" / "log_map_archive_0b0b.json").write_text(
            json.dumps({"drivable_areas": areas, "lane_segments": {}})
        )
    sweep = {name: np.zeros(3, np.float16) for name in "xyz"} | {"laser_number": np.zeros(3, np.uint8)}
    pd.DataFrame(sweep).to_feather(log / "sensors" / "lidar" / f"{stamps[20]}.feather")
    return log


def test_a_log_in_the_official_layout(tmp_path, train) -> None:
    log = data.read_log(write_log(tmp_path))
    assert data.find_logs(tmp_path) == [tmp_path / "val" / "0b0b0b0b-1111"]
    assert log.tracks.shape == (2, 80, 3) and log.present.all() and log.movable.all()
    np.testing.assert_allclose(log.tracks[0, 10], [100 + 15 + 7, 53.5, 0], atol=1e-9)
    scenes, refused = train.real_scenes(log, train.Config(source="argoverse2", windows=(1.0, 2.0)))
    assert list(scenes) == ["0b0b0b0b@1", "0b0b0b0b@2"] and not refused
    scene = scenes["0b0b0b0b@1"]
    assert float(scene.ego[data.HISTORY, 3]) == pytest.approx(8, abs=1e-3) and scene.drivable.all() == False  # noqa: E712
    torch.testing.assert_close(scene.tracks[0, data.HISTORY, :2], torch.tensor([14.0, 3.5]), atol=1e-3, rtol=0)
    with pytest.raises(UserError, match=r"no window at 5 s in 80 frames, expected between 0\.5 and 2\.9"):
        log.window(5.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("annotations", "no annotations.feather"),
        ("map", "no map/log_map_archive"),
        ("areas", "has no drivable areas"),
        ("pose", "no ego pose at 1000000700000000"),
        ("size", "track b at 1000000100000000 has size [4.5, 0.0, 1.6], expected positive"),
        ("quaternion", "quaternion of a box at 1000000200000000 has length 0.9, expected 1"),
        ("twice", "track a at 1000000200000000 stands twice"),
        ("column", "has no column height_m"),
    ],
)
def test_malformed_logs_are_one_line(tmp_path, run_paper, spoil: str, message: str) -> None:
    write_log(tmp_path, spoil)
    result = run_paper("advsim", ["--preset", "argoverse2", "--data", str(tmp_path), "--windows", "1", "--check-data"])
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert message in result.errors[0] and "0b0b0b0b-1111" in result.errors[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stacks", "nmp"], "unknown 'nmp', expected among plt-lidar"),
        (["--searches", "tpe"], "unknown 'tpe', expected among random"),
        (["--searches", "random", "random"], "each once"),
        (["--budget", "9"], "expected at least the 10 initial points of bayesian"),
        (["--screening", "none"], "expected among reject, nearest"),
        (["--plt", "1", "2"], "expected five weights"),
        (["--margin", "0"], "above 0"),
        (["--lowest", "9"], "expected rising degrees"),
        (["--actors", "0"], "expected at least 1"),
        (["--preset", "argoverse2"], "needs --data"),
        (["--preset", "argoverse2", "--data", ".", "--check-data"], "no log below"),
        (["--source", "argoverse2", "--check-data"], "no --data DIR"),
    ],
)
def test_bad_usage_is_one_line(run_paper, argv: list[str], message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_paper("advsim", argv)
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert message in result.errors[0]


def test_windows_and_scenes_that_cannot_be(tmp_path, run_paper) -> None:
    write_log(tmp_path)
    argv = ["--preset", "argoverse2", "--data", str(tmp_path), "--check-data", "--windows"]
    result = run_paper("advsim", [*argv, "9"])
    assert result.code == 2 and "no window at 9 s" in result.errors[0]
    result = run_paper("advsim", [*argv, "1", "--actors", "3"])
    assert result.code == 2 and "no usable scene" in result.errors[0] and "2 of 3 actors" in result.errors[0]


# ---- runs

SMALL = ["--device", "cpu", "--workers", "1", "--azimuths", "180", "--tuning", "2", "--folds", "2"]


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_real_logs_run(data_root, run_paper, tmp_path) -> None:
    logs_of(data_root)
    folder = str(data_root / "argoverse2-sensor-sample")
    argv = ["--preset", "argoverse2", "--data", folder, "--windows", "3", "--searches", "genetic", "--budget", "3"]
    argv += [
        "--stacks",
        "il-lidar",
        "acc-perfect",
        "--il-scenes",
        "3",
        "--il-steps",
        "3",
        "--il-found",
        "2",
        "--tuning",
        "0",
    ]
    result = run_paper("advsim", [*argv, "--out", str(tmp_path / "run"), "--device", "cpu", "--workers", "1"])
    assert result.code == 0, result.err
    found = result_of(tmp_path / "run")["metrics"]
    assert found["argoverse2/resimulation/unchanged_is_equal"]["mean"] == 1
    assert found["argoverse2/resimulation/emptied"]["mean"] > 0.9
    assert found["argoverse2/il-lidar/genetic/feasible"]["mean"] == 1
    assert {"argoverse2/il-retrained/adversarial/collision_rate_5s", "argoverse2/il-retrained/cloning_loss"} <= set(
        found
    )
    shots = json.loads((tmp_path / "run" / "scenarios.json").read_text())
    assert {shot["stack"] for shot in shots} == {"acc-perfect", "il-lidar"}
    assert len(shots[0]["ego"]["driven"]) == 51 and sum(actor["perturbed"] for actor in shots[0]["actors"]) == 1
    assert (tmp_path / "run" / "worst.gif").stat().st_size < 1_000_000


def test_processes_change_no_number(tmp_path) -> None:
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    argv = ["--preset", "smoke", "--device", "cpu", "--searches", "genetic", "--stacks", "plt-perfect", "--budget", "8"]
    found = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        words = [sys.executable, "train.py", *argv, "--workers", workers, "--out", str(out), "--together", "1"]
        done = subprocess.run(words, cwd=FOLDER, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(result_of(out)["metrics"])
    assert found[0] == found[1]


BROKEN = {
    "intact": ("", ""),
    "actors that do not move": (
        "controls = scenes.controls[which] + scale * values",
        "controls = scenes.controls[which] + 0 * values",
    ),
    "expert not protected": ("ok = ((outside <= 0.2) & clear).all(1)", "ok = (outside <= 2).all(1)"),
}


def test_claims_fail_for_a_broken_method(tmp_path) -> None:
    from tests.conftest import run_folder

    verdicts = {}
    for name, (old, new) in BROKEN.items():
        folder = tmp_path / name.replace(" ", "_") / "advsim"
        shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("runs", "__pycache__", "results"))
        source = (folder / "model.py").read_text()
        assert old in source
        (folder / "model.py").write_text(source.replace(old, new) if old else source)
        argv = ["--seed", "40", "--scenes", "6", "--budget", "20", "--searches", "random", "genetic"]
        argv += ["--stacks", "plt-lidar", "plt-perfect", *SMALL, "--out", str(folder.parent / "run")]
        result = run_folder(folder, argv)
        assert result.code == 0, result.err
        verdicts[name] = {claim["name"]: claim["holds"] for claim in result_of(folder.parent / "run")["claims"]}
    intact = verdicts["intact"]
    assert intact["attacks_make_collisions"] and intact["scenarios_stay_solvable"], intact
    still = verdicts["actors that do not move"]
    assert not still["attacks_make_collisions"] and not still["genetic_search_beats_random"]
    assert not verdicts["expert not protected"]["scenarios_stay_solvable"]
