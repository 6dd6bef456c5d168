"""Search safety-critical scenarios for self-driving stacks that see through a simulated LiDAR.

Each scene is attacked with every search on every stack; found scenes are checked, replayed with perfect perception,
and used to tune the planner and to train the imitation network again. The default run works on generated traffic,
``argoverse2`` on real logs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import cli
from shared.cli import Preset

STACKS = ("plt-lidar", "plt-perfect", "acc-lidar", "acc-perfect", "il-lidar")
SEARCH_NAMES = ("random", "genetic", "bayesian", "nes", "bandit")


@dataclass(frozen=True)
class Config:
    """Everything that decides a number."""

    source: str = "generated"
    """Where the scenes come from: generated, or argoverse2 (logs below --data)."""
    scenes: int = 12
    """Generated scenes a seed."""
    windows: tuple[float, ...] = (1.0, 3.0, 5.0, 7.0, 9.0, 10.5)
    """Argoverse 2: seconds of a log at which a scene begins."""
    actors: int = 1
    """Actors that are perturbed in a scene, those that come nearest to the expert."""
    knots: int = 5
    """Knots of an actor's perturbation; it has two numbers a knot."""
    acceleration: float = 3.0
    """Largest change of an actor's acceleration, m/s^2."""
    curvature_rate: float = 0.05
    """Largest change of an actor's change of curvature, 1/(m s)."""
    stacks: tuple[str, ...] = ("plt-lidar", "plt-perfect", "acc-lidar")
    """Stacks under test: plt-lidar plt-perfect acc-lidar acc-perfect il-lidar."""
    searches: tuple[str, ...] = ("random", "genetic", "bayesian")
    """Searches: random genetic bayesian nes bandit."""
    budget: int = 40
    """Simulations of a scene a search may use; the first is the scene as recorded."""
    screening: str = "reject"
    """What happens to infeasible candidates: reject (drawn again), nearest (replaced by the nearest feasible one)."""
    replan: int = 5
    """Steps of 0.1 s after which a stack plans anew; 0: open loop, one plan."""
    beams: int = 8
    """Beams of the simulated LiDAR."""
    lowest: float = -12.0
    """Elevation of the lowest beam, degrees."""
    highest: float = 2.0
    """Elevation of the highest beam, degrees."""
    azimuths: int = 360
    """Rays of a beam in a turn."""
    imitation: float = 0.1
    """Weight of the distance from the expert in the adversarial objective."""
    collision: float = 1.0
    """Weight of collisions and near misses in the objective."""
    comfort: float = 0.1
    """Weight of lateral acceleration and jerk in the objective."""
    margin: float = 1.0
    """Metres below which passing an actor is a near miss."""
    plt: tuple[float, ...] = (4.0, 0.5, 0.3, 0.1, 0.05)
    """PLT's cost weights before tuning: collision, progress, deviation, lateral acceleration, jerk. One moment of
    contact (10 times the first) has to cost more than all progress of five seconds at the speed limit (34)."""
    tuning: int = 24
    """Sets of cost weights that tuning tries; 0: no tuning."""
    folds: int = 4
    """Tuning: each part of the scenes is held out once (real scenes: each log)."""
    il_scenes: int = 200
    """Imitation: scenes the network is trained on."""
    il_steps: int = 400
    """Imitation: optimiser steps."""
    il_lr: float = 1e-3
    """Imitation: Adam learning rate."""
    il_found: int = 48
    """Imitation: training scenes that are attacked, to train again with half of every batch from them; 0: none."""
    together: int = 12
    """Scenes that are searched side by side in one process."""
    workers: int = 2
    """Processes that simulate; 1: none besides this one. Numbers do not depend on it."""

    def __post_init__(self) -> None:
        least = {"scenes": 1, "actors": 1, "knots": 2, "budget": 1, "replan": 0, "beams": 1, "azimuths": 8}
        least |= {"tuning": 0, "folds": 2, "il_scenes": 1, "il_steps": 1, "il_found": 0}
        least |= {"together": 1, "workers": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least {value}")
        for name in ("acceleration", "curvature_rate", "imitation", "collision", "comfort", "margin", "il_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more")
        if not (self.margin > 0 and self.il_lr > 0):
            raise ValueError("--margin and --il-lr are to be above 0")
        choices = {"source": ("generated", "argoverse2"), "screening": ("reject", "nearest")}
        choices |= {"stacks": STACKS, "searches": SEARCH_NAMES}
        for name, known in choices.items():
            value = getattr(self, name)
            given = (value,) if isinstance(value, str) else value
            wrong = [word for word in given if word not in known]
            if wrong:
                raise ValueError(f"--{name}: unknown {wrong[0]!r}, expected among {', '.join(known)}")
            if not given or len(set(given)) < len(given):
                raise ValueError(f"--{name} are {value}, expected one or more, each once")
        if not -90 < self.lowest <= self.highest < 90:
            raise ValueError(
                f"--lowest is {self.lowest} and --highest {self.highest}, expected rising degrees below 90"
            )
        if len(self.plt) != 5 or not all(0 <= weight < math.inf for weight in self.plt):
            raise ValueError(f"--plt is {self.plt}, expected five weights of 0 or more")
        if not self.windows:
            raise ValueError("--windows is empty, expected seconds of a log")
        if "bayesian" in self.searches and self.budget < 10:
            raise ValueError(f"--budget is {self.budget}, expected at least the 10 initial points of bayesian")


LOGS = "Argoverse 2 Sensor logs: <split>/<log id>/annotations.feather, ..."
ALL_SEARCHES: Any = ("random", "genetic", "bayesian", "nes", "bandit")
PRESETS = {
    "default": Preset(
        Config(),
        seeds=3,
        data="generated traffic, 12 scenes a seed",
        hours=0.06,
        why_not_comparable="generated traffic; the paper's numbers were not seen",
    ),
    "smoke": Preset(
        Config(
            scenes=2, stacks=("plt-lidar", "acc-lidar"), budget=12, azimuths=90, beams=4, tuning=2, folds=2, workers=1
        ),
        data="generated traffic",
        hours=0.003,
        claims=False,
        why_not_comparable="a few simulations of generated traffic",
    ),
    "argoverse2": Preset(
        Config(source="argoverse2", stacks=STACKS, workers=2),
        seeds=1,
        data=LOGS,
        hours=0.7,
        needs_data=True,
        claims=False,
        why_not_comparable="another data set than the paper's",
    ),
    "argoverse2-open-loop": Preset(
        Config(source="argoverse2", stacks=STACKS, replan=0, screening="nearest"),
        seeds=1,
        data=LOGS,
        hours=0.4,
        needs_data=True,
        claims=False,
        why_not_comparable="another data set than the paper's",
        note="one plan a scene, candidates projected on feasible ones",
    ),
    "paper-like": Preset(
        Config(
            source="argoverse2",
            stacks=STACKS,
            searches=ALL_SEARCHES,
            actors=2,
            budget=150,
            beams=32,
            lowest=-25.0,
            highest=15.0,
            azimuths=720,
            screening="nearest",
            workers=8,
        ),
        seeds=1,
        data=LOGS,
        hardware="8 CPU cores",
        hours=12,
        needs_data=True,
        claims=False,
        why_not_comparable="another data set than the paper's",
        note="two actors, 150 queries, all stacks and searches",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import functools  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from dataclasses import fields, replace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.files import write_json  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.seeds import derive_seed  # noqa: E402

from data import (  # noqa: E402
    GROUND,
    HISTORY,
    STEPS,
    UP_LIDAR,
    VEHICLES,
    Log,
    Recording,
    draw_traffic,
    find_logs,
    read_log,
    read_sweep,
)
from model import (  # noqa: E402
    Attack,
    Autonomy,
    Lidar,
    NotUsable,
    Objective,
    Outcome,
    Scene,
    World,
    actor_boxes,
    edit_sweep,
    ego_boxes,
    evaluate,
    initial_world,
    inside_box,
    make_scene,
    perturb,
    separation,
    signed_distance,
    stack,
    within_limits,
)
from pictures import Shot, animate, as_json, moment, paint  # noqa: E402
from search import SEARCHES, Nearest, Rejecting, attack_scenes  # noqa: E402
from stacks import (  # noqa: E402
    AccPlanner,
    ImitationNet,
    ImitationStack,
    LibraryPlanner,
    LidarPerception,
    PerfectPerception,
    Stack,
    cloning_loss,
    detection_overlap,
    prediction_error,
)

GUIDED = ("genetic", "bayesian", "nes", "bandit")
AT_ONCE = 72
"""Simulations in one batch: more gain nothing in speed and take memory."""
MOMENTS = (0, 10, 20, 30)
"""Steps of a drive at which perception is measured and the imitation network is shown what the expert does."""


# ---- scenes and stacks -----------------------------------------------------------------------------------------


def attack_of(config: Config) -> Attack:
    """The space of perturbations."""
    return Attack(config.knots, config.acceleration, config.curvature_rate)


def objective_of(config: Config) -> Objective:
    """The adversarial objective."""
    return Objective(config.imitation, config.collision, config.comfort, config.margin)


def scene_of(window: Recording, config: Config, clearance: float = 0.0) -> Scene:
    """The scene of a recording.

    Raises:
        NotUsable: it makes none.
    """
    arrays = {
        name: torch.from_numpy(value).to(torch.bool if value.dtype == bool else torch.float32)
        for name, value in vars(window).items()
        if name != "speed_limit"
    }
    space = attack_of(config)
    return make_scene(**arrays, speed_limit=window.speed_limit, actors=config.actors, attack=space, clearance=clearance)


def generate(config: Config, count: int, seed: int) -> Scene:
    """Scenes of generated traffic; a draw that cannot be used is drawn again."""
    rng, scenes = np.random.default_rng(seed), []
    while len(scenes) < count:
        options = draw_traffic(rng)
        if not options:
            continue
        boxes = actor_boxes(*(torch.from_numpy(array)[None] for array in (options[0].tracks, options[0].size)))[0]
        apart = separation(boxes[:, None], boxes[None]).amin(-1) > 0.3
        if not bool((apart | torch.eye(len(boxes), dtype=torch.bool)).all()):
            continue
        for window in options:
            try:
                scenes.append(scene_of(window, config, clearance=0.8))
            except NotUsable:
                continue
            break
    return stack(scenes)


def real_scenes(log: Log, config: Config) -> tuple[dict[str, Scene], dict[str, str]]:
    """The usable windows of a log by name, and why the others are not."""
    scenes, refused = {}, {}
    for second in config.windows:
        name = f"{log.name[:8]}@{second:g}"
        try:
            scenes[name] = scene_of(log.window(second), config)
        except NotUsable as error:
            refused[name] = str(error)
    return scenes, refused


def read_logs(config: Config, folder: Path | None) -> tuple[list[Log], dict[str, Scene], dict[str, str]]:
    """The logs below a folder, their usable scenes, and the windows that are not usable with the reason.

    Raises:
        UserError: no log, a malformed one, or no usable scene.
    """
    logs, scenes, refused = [read_log(path) for path in find_logs(folder)], {}, {}
    for log in logs:
        usable, not_usable = real_scenes(log, config)
        scenes |= usable
        refused |= not_usable
    if not scenes:
        name, why = next(iter(refused.items()))
        raise UserError(
            f"no usable scene in {len(logs)} logs below {folder}, expected one at least; e.g. {name}: {why}"
        )
    return logs, scenes, refused


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says: each log with its frames, tracks, sweeps and usable scenes."""
    if config.source == "generated":
        return [f"generated traffic: {config.scenes} scenes a seed; nothing to look for"]
    logs, scenes, refused = read_logs(config, folder)
    lines = []
    for log in logs:
        usable = [name for name in scenes if name.startswith(log.name[:8])]
        counts = f"{len(log.stamps)} frames, {len(log.tracks)} tracks, {len(log.areas)} drivable areas"
        lines.append(f"{log.name}: {counts}; {len(usable)} of {len(config.windows)} windows usable")
        lines += [f"  {name}: refused, {why}" for name, why in refused.items() if name.startswith(log.name[:8])]
        for stamp, path in log.sweeps.items():
            points, boxes = read_sweep(path)[0], log.boxes[stamp]
            exact = int((boxes.interior(points.numpy().astype(np.float64)) == boxes.points).sum())
            verdict = "as expected" if exact == len(boxes.points) else "EXPECTED all"
            lines.append(
                f"  sweep {stamp}: {len(points)} points, "
                f"counts agree in {exact} of {len(boxes.points)} boxes ({verdict})"
            )
    lines.append(
        f"{len(logs)} logs found (the data set has 700 for training and 150 for validation), {len(scenes)} scenes"
    )
    return lines


def scenes_of(config: Config, run: Run, seed: int) -> tuple[list[str], Scene]:
    """Names and stacked scenes of a seed."""
    if config.source == "generated":
        run.data_used("generated traffic", "generated", spec={"scenes": config.scenes, "seed": seed})
        made = generate(config, config.scenes, derive_seed("scenes", seed))
        return [f"scene {i}" for i in range(len(made))], made
    logs, scenes, refused = read_logs(config, run.data)
    for log, path in zip(logs, find_logs(run.data), strict=True):
        run.data_used(log.name, "real", path=path)
    for name, why in refused.items():
        run.print(f"{name} is not used: {why}")
    return list(scenes), stack(list(scenes.values()))


def perception_of(config: Config) -> LidarPerception:
    """Detection and tracking with the configured LiDAR."""
    return LidarPerception(Lidar(config.beams, config.azimuths, config.lowest, config.highest))


def build_stack(config: Config, name: str, weights: Tensor, net: ImitationNet | None) -> Autonomy:
    """A stack under test by name; ``weights`` are PLT's, ``net`` is the imitation planner's."""
    planner, _, sensor = name.partition("-")
    lidar = perception_of(config)
    if planner == "il":
        assert net is not None
        return ImitationStack(net, lidar, STEPS)
    perception = lidar if sensor == "lidar" else PerfectPerception()
    return Stack(perception, LibraryPlanner(weights, STEPS) if planner == "plt" else AccPlanner(STEPS))


# ---- jobs for the processes that simulate ----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One piece of work for a process: plain arrays, so that it travels.

    Attributes:
        scenes: the fields of a stacked Scene. stack: name. net: weights of the imitation network, where it is needed.
        search, seed: a search over the scenes; without a search, the perturbations to simulate: which (B,),
        delta (B, D), and PLT's weights (B, 5).
    """

    config: Config
    scenes: tuple[np.ndarray, ...]
    stack: str
    net: dict[str, np.ndarray]
    search: str = ""
    seed: int = 0
    which: np.ndarray | None = None
    delta: np.ndarray | None = None
    weights: np.ndarray | None = None


def packed(scenes: Scene) -> tuple[np.ndarray, ...]:
    """The fields of a Scene as arrays."""
    return tuple(getattr(scenes, field.name).numpy() for field in fields(Scene))


def simulate(
    job: Job, scenes: Scene, which: Tensor, delta: Tensor, weights: Tensor | None = None
) -> tuple[Outcome, Tensor]:
    """Simulate in batches that fit into the caches."""
    config, net = job.config, None
    if job.net:
        net = ImitationNet()
        net.load_state_dict({name: torch.from_numpy(value) for name, value in job.net.items()})
    outcomes, paths = [], []
    for part in torch.arange(len(which)).split(AT_ONCE):
        chosen = torch.tensor(config.plt) if weights is None else weights[part]
        tested = build_stack(config, job.stack, chosen, net)
        space, objective = attack_of(config), objective_of(config)
        outcome, path = evaluate(scenes, which[part], delta[part], tested, space, objective, config.replan)
        outcomes.append(outcome)
        paths.append(path)
    return Outcome.join(outcomes), torch.cat(paths)


def run_job(job: Job) -> dict[str, np.ndarray]:
    """Do one piece of work; what a search found, and what came of every simulation asked for."""
    config, scenes = job.config, Scene(*map(torch.from_numpy, job.scenes))
    if not job.search:
        assert job.which is not None and job.delta is not None
        weights = None if job.weights is None else torch.from_numpy(job.weights)
        outcome, path = simulate(job, scenes, torch.from_numpy(job.which), torch.from_numpy(job.delta), weights)
        return outcome_arrays(outcome) | {"path": path.numpy()}
    space = attack_of(config)
    generator = torch.Generator().manual_seed(job.seed)
    search = SEARCHES[job.search](len(scenes), space.size(config.actors), generator)
    screen = Rejecting(scenes, space) if config.screening == "reject" else Nearest(scenes, space, generator)
    found = attack_scenes(
        lambda which, delta: simulate(job, scenes, which, delta)[0].score, search, screen, config.budget
    )
    outcome, path = simulate(job, scenes, torch.arange(len(scenes)), found.delta)
    arrays = {"delta": found.delta, "best": found.score, "curve": found.curve, "rejected": found.rejected, "path": path}
    return {name: value.numpy() for name, value in arrays.items()} | outcome_arrays(outcome)


def outcome_arrays(outcome: Outcome) -> dict[str, np.ndarray]:
    """The fields of an Outcome."""
    return {field.name: getattr(outcome, field.name).numpy() for field in fields(Outcome)}


def outcome_of(tensors: dict[str, Tensor]) -> Outcome:
    """The Outcome among a job's tensors."""
    return Outcome(*(tensors[field.name] for field in fields(Outcome)))


def start_worker() -> None:
    """A process simulates on one thread; Ctrl-C is its parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class Workers:
    """Processes that work off jobs; made when first needed, in the order of the jobs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, jobs: Sequence[Job]) -> Iterator[dict[str, np.ndarray]]:
        """Results of the jobs, one after the other."""
        if self.count == 1:
            return map(run_job, jobs)
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.count, context, start_worker)
        return self.pool.map(run_job, jobs)


def work_off(unit: Unit, workers: Workers, jobs: Sequence[Job]) -> list[dict[str, Tensor]]:
    """Results of a unit's jobs; each is a step of the unit, so that a stopped run goes on with the next."""
    unit.attach()
    done: dict[str, Any] = unit.state.setdefault("done", {})
    results = None
    for step in unit.steps(len(jobs), log_every=1):
        if results is None:
            results = workers.map(jobs[step:])
        with user_errors():
            values = {name: torch.from_numpy(value) for name, value in next(results).items()}
        done[str(step)] = values
        unit.log(score=values["score"].mean())
    return [done[str(step)] for step in range(len(jobs))]


# ---- units of work ---------------------------------------------------------------------------------------------


def recorded(scenes: Scene, config: Config) -> Tensor:
    """The vectors (S, D) that leave the scenes as recorded."""
    return torch.zeros(len(scenes), attack_of(config).size(config.actors))


@functools.cache
def training_scenes(config: Config, seed: int) -> Scene:
    """Generated scenes that the imitation network of a seed is trained on."""
    return generate(config, config.il_scenes, derive_seed("imitation scenes", seed))


Lesson = tuple[World, Tensor, Tensor]
"""Worlds in which the expert drives, and the rasters and speeds that the imitation network sees there."""


def lessons(imitator: ImitationStack, scenes: Scene, delta: Tensor, config: Config) -> list[Lesson]:
    """The expert's drives through perturbed scenes at each of ``MOMENTS``."""
    which = torch.arange(len(scenes))
    world = initial_world(scenes, which, perturb(scenes, which, delta, attack_of(config)))
    world = replace(world, ego=scenes.ego)
    moments = [replace(world, step=HISTORY + moment) for moment in MOMENTS]
    return [(moment, *imitator.inputs(moment)) for moment in moments]


def train_imitation(config: Config, run: Run, unit: Unit, name: str, found: Tensor | None = None) -> None:
    """Clone the expert from what the LiDAR sees, the same network with and without found scenes.

    Args:
        found: (n, D) perturbations of the first n training scenes. Half of every batch is taken from them (section
            3.7); the expert's drive is still the target, which it can be because it stays safe there.
    """
    seed = unit.key[0]
    torch.manual_seed(run.derive_seed("imitation", seed))
    net, scenes = ImitationNet(), training_scenes(config, seed)
    model, optimizer = run.setup(net, torch.optim.Adam(net.parameters(), lr=config.il_lr))
    unit.attach(model=model, optimizer=optimizer)
    imitator = ImitationStack(net, perception_of(config), STEPS)
    sources = [lessons(imitator, scenes, recorded(scenes, config), config)]
    if found is not None:
        sources.append(lessons(imitator, scenes.pick(slice(len(found))), found, config))

    def loss_at(lesson: Lesson, part: Tensor) -> Tensor:
        world, rasters, speed = lesson
        a, u = model(rasters[part].to(run.device), speed[part].to(run.device))
        plan = imitator.decode(world.part(part), (a.cpu(), u.cpu()))
        return cloning_loss(plan, world.ego[part, world.step + 1 :])

    for step in unit.steps(config.il_steps):
        losses = []
        for i, source in enumerate(sources):
            lesson = source[step % len(MOMENTS)]
            order = torch.randperm(len(lesson[2]), generator=run.generator("imitation batch", seed, step, i))
            losses.append(loss_at(lesson, order[: 32 // len(sources)]))
        optimizer.zero_grad()
        loss = torch.cat(losses).mean()
        run.backward(loss)
        optimizer.step()
        unit.log(cloning=loss)
    with torch.no_grad():
        final = torch.cat([loss_at(lesson, torch.arange(len(scenes))) for lesson in sources[0]])
    unit.finish({f"{config.source}/{name}/cloning_loss": float(final.mean())}, keep=net.cpu().state_dict())


def attack_training(config: Config, run: Run, unit: Unit, workers: Workers, net: dict[str, np.ndarray]) -> None:
    """Attack the imitation planner in some of the scenes it was trained on."""
    seed = unit.key[0]
    scenes = training_scenes(config, seed).pick(slice(config.il_found))
    search, parts = attackers(config)[0], torch.arange(len(scenes)).split(config.together)
    seeds = [run.derive_seed("training attack", seed, i) for i in range(len(parts))]
    jobs = [
        Job(config, packed(scenes.pick(part)), "il-lidar", net, search, drawn)
        for part, drawn in zip(parts, seeds, strict=True)
    ]
    results = work_off(unit, workers, jobs)
    crashed = torch.cat([outcome_of(result).crashed() for result in results])
    unit.finish(
        {f"{config.source}/il-lidar/training_scenes_attacked/collision_rate_5s": rate(crashed)},
        keep={"delta": torch.cat([result["delta"] for result in results])},
    )


def search_all(
    config: Config,
    run: Run,
    unit: Unit,
    workers: Workers,
    scenes: Scene,
    stacks: Sequence[str],
    net: dict[str, np.ndarray],
) -> None:
    """Every search on some stacks, and these on the scenes as recorded; ``net`` is the imitation planner's."""
    seed = unit.key[0]
    groups = torch.arange(len(scenes)).split(config.together)
    plan = [(name, search, i) for name in stacks for search in ("", *config.searches) for i in range(len(groups))]
    jobs = []
    for name, search, i in plan:
        part = scenes.pick(groups[i])
        which, delta = np.arange(len(part)), recorded(part, config).numpy()
        drawn = run.derive_seed("search", seed, search, i)
        jobs.append(Job(config, packed(part), name, net if name.startswith("il") else {}, search, drawn, which, delta))
    keep: dict[str, Tensor] = {}
    for (name, search, _), result in zip(plan, work_off(unit, workers, jobs), strict=True):
        for key, value in result.items():
            full = f"{name}/{search or 'original'}/{key}"
            keep[full] = torch.cat([keep[full], value]) if full in keep else value
    metrics: dict[str, float] = {}
    for name in stacks:
        for search in config.searches:
            result = part_of(keep, f"{name}/{search}/")
            tried = f"{config.source}/{name}/{search}"
            metrics[f"{tried}/best_objective"] = float(result["best"].mean())
            metrics[f"{tried}/collision_rate"] = rate(outcome_of(result).crashed())
            metrics[f"{tried}/rejected_queries"] = float(result["rejected"].mean())
            metrics[f"{tried}/feasible"] = rate(audit(config, scenes, result["delta"]))
        best = worst_of(keep, name, attackers(config))
        keep |= {f"{name}/adversarial/{key}": value for key, value in best.items()}
        original = outcome_of(part_of(keep, f"{name}/original/"))
        metrics |= described(f"{config.source}/{name}/original", original)
        metrics |= described(f"{config.source}/{name}/adversarial", outcome_of(best))
        safe = ~original.crashed()
        success = (safe & outcome_of(best).crashed()).sum() / safe.sum().clamp_min(1)
        metrics[f"{config.source}/{name}/attack_success_rate"] = float(success)
    unit.finish(metrics, {f"{config.source}/{unit.key[1]}_seconds": unit.seconds}, keep)


def attackers(config: Config) -> list[str]:
    """The guided searches, whose findings count as adversarial; whatever there is without one."""
    return [search for search in config.searches if search in GUIDED] or list(config.searches)


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def worst_of(tensors: dict[str, Tensor], name: str, searches: Sequence[str]) -> dict[str, Tensor]:
    """What the best of some searches found in each scene."""
    results = [part_of(tensors, f"{name}/{search}/") for search in searches]
    best = torch.stack([result["best"] for result in results]).argmax(0)
    shared = [key for key in results[0] if key not in ("curve", "rejected")]
    rows = torch.arange(len(best))
    return {key: torch.stack([result[key] for result in results])[best, rows] for key in shared}


def rate(flags: Tensor) -> float:
    """Share of true ones."""
    return float(flags.float().mean())


def described(prefix: str, outcome: Outcome) -> dict[str, float]:
    """The metrics of some simulations by name."""
    out = {f"collision_rate_{second}s": rate(outcome.crashed(second)) for second in (1, 3, 5)}
    out["at_fault_rate"] = rate(outcome.at_fault)
    out |= {f"l2_{second}s": float(outcome.l2[:, i].mean()) for i, second in enumerate((1, 3, 5))}
    for name in ("lateral", "jerk", "progress", "gap", "ttc", "score"):
        out[name] = float(getattr(outcome, name).mean())
    return {f"{prefix}/{name}": value for name, value in out.items()}


def audit(config: Config, scenes: Scene, delta: Tensor) -> Tensor:
    """Which of found perturbations (S, D) keep to all limits and leave the expert's drive free of collisions, (S,).

    Looks at the trajectories themselves, not at what the search thought of them.
    """
    space, which = attack_of(config), torch.arange(len(scenes))
    moved = perturb(scenes, which, delta, space)
    rows = which[:, None]
    boxes = actor_boxes(moved[..., :3], scenes.size[rows, scenes.actors])
    clear = signed_distance(boxes, ego_boxes(scenes.ego[:, HISTORY:]).unsqueeze(1)) > 0
    return (within_limits(moved, space.limits, scenes.top) & clear.all(-1)).all(1)


def swap_perception(config: Config, run: Run, unit: Unit, workers: Workers, scenes: Scene) -> None:
    """Replay what was found against PLT with LiDAR on PLT with perfect perception; how much the LiDAR stack sees."""
    kept = run.kept((unit.key[0], "search"))
    found = [part_of(kept, f"plt-lidar/{search}/") for search in attackers(config)]
    delta = torch.cat([result["delta"] for result in found])
    which = torch.arange(len(scenes)).repeat(len(found))
    jobs = [Job(config, packed(scenes), "plt-perfect", {}, which=which.numpy(), delta=delta.numpy())]
    perfect = outcome_of(work_off(unit, workers, jobs)[0]).crashed()
    lidar = torch.cat([outcome_of(result).crashed() for result in found])
    alone = torch.stack([outcome_of(part_of(kept, f"plt-perfect/{name}/")).crashed() for name in attackers(config)])
    prefix = f"{config.source}/perception"
    metrics = {f"{prefix}/failures_with_lidar": rate(lidar), f"{prefix}/failures_with_perfect": rate(perfect)}
    metrics[f"{prefix}/failures_mended"] = float((lidar & ~perfect).sum())
    missed = lidar.view(len(found), -1).any(0) & ~alone.any(0)
    metrics[f"{prefix}/scenes_missed_without_sensors"] = float(missed.sum())
    for label in ("original", "adversarial"):
        drive = part_of(kept, f"plt-lidar/{label}/")
        delta = drive.get("delta", recorded(scenes, config))
        moved = perturb(scenes, torch.arange(len(scenes)), delta, attack_of(config))
        world = initial_world(scenes, torch.arange(len(scenes)), moved)
        world.ego[:, HISTORY:] = drive["path"]
        metrics |= perceived(f"{prefix}/{label}", world, perception_of(config))
    unit.finish(metrics)


def perceived(prefix: str, world: World, sensor: LidarPerception) -> dict[str, float]:
    """Recall of visible vehicles, and how far off predictions of near actors are (ADE), over the moments of drives."""
    moments = [replace(world, step=HISTORY + moment) for moment in MOMENTS]
    overlap = torch.cat([detection_overlap(moment, sensor) for moment in moments])
    out = {f"{prefix}/recall_iou_{limit}": rate(overlap >= limit) for limit in (0.3, 0.5, 0.7) if len(overlap)}
    for name, perception in (("lidar", sensor), ("perfect", PerfectPerception())):
        error = torch.cat([prediction_error(moment, perception(moment)) for moment in moments])
        if len(error):
            out[f"{prefix}/prediction_ade_{name}"] = float(error.mean())
    return out


def tune(config: Config, run: Run, unit: Unit, workers: Workers, names: Sequence[str], scenes: Scene) -> None:
    """Choose PLT's cost weights on some scenes, with and without what was found there, and test them on the others.

    Every set of weights drives every scene once; holding out a part is then a matter of which numbers are averaged.
    """
    seed = unit.key[0]
    kept = run.kept((seed, "search"))
    found = [part_of(kept, f"plt-lidar/{search}/")["delta"] for search in attackers(config)]
    delta = torch.cat([recorded(scenes, config), *found])
    which = torch.arange(len(scenes)).repeat(1 + len(found))
    change = torch.rand(config.tuning, 5, generator=run.generator("weights", seed)) * 2 - 1
    change[0] = 0
    sets = torch.tensor(config.plt) * torch.exp(1.5 * change)
    jobs = []
    for part in sets:
        weights = part.expand(len(which), 5).numpy()
        jobs.append(
            Job(config, packed(scenes), "plt-lidar", {}, which=which.numpy(), delta=delta.numpy(), weights=weights)
        )
    results = [outcome_of(result) for result in work_off(unit, workers, jobs)]
    score, crash, progress = (
        torch.stack([value(result).float() for result in results])
        for value in (lambda r: r.score, lambda r: r.crashed(), lambda r: r.progress)
    )
    fold = folds_of(config, names).repeat(1 + len(found))
    attacked = torch.arange(len(which)) >= len(scenes)
    chosen: dict[str, list[tuple[Tensor, Tensor]]] = {"untuned": [], "original": [], "adversarial": []}
    for held in fold.unique():
        out, inside = fold == held, fold != held
        plain = score[:, inside & ~attacked].mean(1)
        both = (plain + score[:, inside & attacked].mean(1)) / 2  # half recorded, half found
        for name, pick in (("untuned", 0), ("original", int(plain.argmin())), ("adversarial", int(both.argmin()))):
            chosen[name].append((crash[pick, out & attacked], progress[pick, out & ~attacked]))
    metrics = {}
    for name, parts in chosen.items():
        prefix = f"{config.source}/tuned_on_{name}" if name != "untuned" else f"{config.source}/untuned"
        metrics[f"{prefix}/held_out_collision_rate"] = float(torch.cat([crashed for crashed, _ in parts]).mean())
        metrics[f"{prefix}/held_out_progress"] = float(torch.cat([driven for _, driven in parts]).mean())
    unit.finish(metrics)


def folds_of(config: Config, names: Sequence[str]) -> Tensor:
    """The part (S,) of the scenes each belongs to: its log, or one of ``folds`` where all are of one source."""
    logs = sorted({name.partition("@")[0] for name in names})
    if config.source == "generated" or len(logs) == 1:
        return torch.arange(len(names)) % config.folds
    return torch.tensor([logs.index(name.partition("@")[0]) for name in names])


def resimulate(config: Config, run: Run, unit: Unit) -> None:
    """Edit the real sweeps: unchanged scenes, and scenes whose nearest well-seen vehicle stands four metres on."""
    same, emptied, filled, kept = [], [], [], []
    for path in find_logs(run.data):
        log = read_log(path)
        for stamp, file in log.sweeps.items():
            points, laser = read_sweep(file)
            boxes = log.boxes[stamp]
            flat = torch.from_numpy(boxes.flat()).float()
            vertical = torch.from_numpy(np.column_stack([boxes.size[:, 2], boxes.centre[:, 2]])).float()
            seen = torch.tensor([kind in VEHICLES for kind in boxes.category]) & (torch.from_numpy(boxes.points) >= 50)
            if not seen.any():
                continue
            away = flat[:, :2].norm(dim=1).masked_fill(~seen, math.inf)
            i = int(away.argmin())
            before, after, tall = flat[i : i + 1], flat[i : i + 1].clone(), vertical[i : i + 1]
            sensor = torch.tensor(UP_LIDAR)
            unchanged = edit_sweep(points, laser, before, before, tall, sensor, GROUND, run.generator("edit"))
            same.append(float(torch.equal(unchanged.points, points) and torch.equal(unchanged.laser, laser)))
            after[0, :2] += 4 * torch.stack([before[0, 2].cos(), before[0, 2].sin()])
            edited = edit_sweep(points, laser, before, after, tall, sensor, GROUND, run.generator("edit"))
            body = tall[0] * torch.tensor([0.8, 1.0])  # without what touches the ground
            was = int(inside_box(points, before[0], body).sum())
            emptied.append(
                1
                - int((inside_box(edited.points, before[0], body) & ~inside_box(edited.points, after[0], body)).sum())
                / was
            )
            filled.append(int(inside_box(edited.points, after[0], body).sum()) / was)
            kept.append(float((edited.source >= 0).sum()) / len(points))
    if not same:
        raise UserError(
            f"no sweep with a well-seen vehicle below {run.data}, expected sensors/lidar/<ns>.feather in a log"
        )
    values = {"unchanged_is_equal": same, "emptied": emptied, "filled": filled, "kept": kept}
    unit.finish({f"{config.source}/resimulation/{name}": float(np.mean(value)) for name, value in values.items()})


# ---- claims and pictures ---------------------------------------------------------------------------------------


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, over all seeds."""
    from scipy.stats import wilcoxon

    m, limit, source = run.metrics, run.threshold, config.source
    kept = [run.kept((seed, "search")) for seed in run.seeds]

    def mean(name: str) -> float:
        return m[f"{source}/{name}"].mean

    plt = [name for name in config.stacks if name.startswith("plt")]
    before = {name: mean(f"{name}/original/collision_rate_5s") for name in config.stacks}
    after = {name: mean(f"{name}/adversarial/collision_rate_5s") for name in config.stacks}
    claim = "recorded_scenes_are_safe"
    run.claim(claim, max(before[name] for name in plt) <= limit(claim), **{key(name): before[name] for name in plt})
    claim = "attacks_make_collisions"
    rise = {name: after[name] - before[name] for name in config.stacks}
    run.claim(claim, min(rise.values()) >= limit(claim), **{f"{key(name)}_rise": value for name, value in rise.items()})

    for search in [name for name in config.searches if name in ("genetic", "bayesian")]:
        claim = f"{search}_search_beats_random"
        pairs = [
            (part[f"{name}/{search}/best"], part[f"{name}/random/best"]) for part in kept for name in config.stacks
        ]
        guided, blind = (torch.cat(values).numpy() for values in zip(*pairs, strict=True))
        chance = float(wilcoxon(guided, blind, alternative="greater").pvalue) if (guided != blind).any() else 1.0
        wins = float((guided > blind).sum() / max((guided != blind).sum(), 1))
        sure = chance < limit(claim, "p") or wins >= limit(claim, "wins")
        run.claim(claim, guided.mean() >= blind.mean() and sure, gain=guided.mean() - blind.mean(), wins=wins, p=chance)

    claim = "scenarios_stay_solvable"
    shares = [mean(f"{name}/{search}/feasible") for name in config.stacks for search in config.searches]
    run.claim(claim, min(shares) >= limit(claim, "share"), least_share=min(shares))

    claim = "sensors_expose_more"
    lidar, perfect = mean("perception/failures_with_lidar"), mean("perception/failures_with_perfect")
    mended = sum(m[f"{source}/perception/failures_mended"].values)
    missed = sum(m[f"{source}/perception/scenes_missed_without_sensors"].values)
    holds = lidar >= perfect and mended >= limit(claim)
    run.claim(claim, holds, with_lidar=lidar, with_perfect=perfect, mended=mended, missed_without_sensors=missed)

    rates = {
        name: mean(f"{name}/held_out_collision_rate")
        for name in ("untuned", "tuned_on_original", "tuned_on_adversarial")
    }
    driven = mean("tuned_on_adversarial/held_out_progress") / mean("untuned/held_out_progress")
    claim = "training_on_found_scenarios_helps"
    helps = rates["tuned_on_adversarial"] <= (1 - limit(claim, "fall")) * rates["untuned"]
    run.claim(claim, helps and abs(driven - 1) <= limit(claim, "progress"), **rates, progress_ratio=driven)
    claim = "found_scenarios_teach_more_than_recorded_ones"
    more = rates["tuned_on_adversarial"] <= (1 - limit(claim)) * rates["tuned_on_original"]
    run.claim(claim, more, **rates)


def key(name: str) -> str:
    """A stack's name as the name of a measured number."""
    return name.replace("-", "_")


def worst_scenes(run: Run, name: str, count: int = 3) -> list[tuple[int, int]]:
    """(seed, scene) of the most adversarial scenes of a stack over all seeds."""
    scores = [
        (float(value), seed, i)
        for seed in run.seeds
        for i, value in enumerate(run.kept((seed, "search"))[f"{name}/adversarial/best"])
    ]
    return [(seed, i) for _, seed, i in sorted(scores, key=lambda row: (-row[0], row[1:]))[:count]]


def shots(config: Config, run: Run, name: str, source: dict[int, tuple[list[str], Scene]]) -> list[Shot]:
    """The three worst scenes of a stack."""
    out = []
    for seed, i in worst_scenes(run, name):
        names, scenes = source[seed]
        kept = part_of(run.kept((seed, "search")), f"{name}/adversarial/")
        scene = scenes.pick(slice(i, i + 1))
        moved = perturb(scene, torch.zeros(1, dtype=torch.long), kept["delta"][i : i + 1], attack_of(config))
        world = initial_world(scene, torch.zeros(1, dtype=torch.long), moved)
        boxes = actor_boxes(world.tracks, world.size)[0, :, HISTORY:]
        ego, expert = ego_boxes(kept["path"][i]), ego_boxes(scene.ego[0, HISTORY:])
        present, chosen = world.present[0, :, HISTORY:], scene.actors[0].tolist()
        label = f"{names[i]}, seed {seed}" if config.source == "generated" else names[i]
        out.append(
            Shot(label, float(kept["best"][i]), boxes, present, chosen, ego, expert, scene.drivable[0], scene.corner[0])
        )
    return out


def draw(config: Config, run: Run, worst: Sequence[Shot], name: str) -> Any:
    """The figure: progress of the searches, collision rates, what tuning changed, and the worst scenes."""
    figure, axes = report.figure(2, 3, width=3.4, height=3.0)
    m, kept = run.metrics, [run.kept((seed, "search")) for seed in run.seeds]
    for search in config.searches:
        curves = torch.cat([part[f"{stack}/{search}/curve"] for part in kept for stack in config.stacks])
        axes[0, 0].plot(range(1, config.budget + 1), curves.mean(0), label=search)
    axes[0, 0].set(title="best objective so far", xlabel="simulations of a scene")
    axes[0, 0].legend(fontsize=7)
    again = ["il-retrained"] if f"{config.source}/il-retrained/original/collision_rate_5s" in m else []
    tested = [*config.stacks, *again]
    for j, kind in enumerate(("original", "adversarial")):
        bars = [m[f"{config.source}/{name}/{kind}/collision_rate_5s"] for name in tested]
        place = np.arange(len(bars)) + 0.4 * j
        axes[0, 1].bar(place, [bar.mean for bar in bars], 0.4, yerr=[bar.std for bar in bars], label=kind)
    axes[0, 1].set(title="collision rate within 5 s")
    axes[0, 1].set_xticks(np.arange(len(tested)) + 0.2, tested, fontsize=7, rotation=20)
    axes[0, 1].legend(fontsize=7)
    tuned = [
        kind
        for kind in ("untuned", "tuned_on_original", "tuned_on_adversarial")
        if f"{config.source}/{kind}/held_out_collision_rate" in m
    ]
    bars = [m[f"{config.source}/{kind}/held_out_collision_rate"] for kind in tuned]
    axes[0, 2].bar(
        range(len(bars)), [bar.mean for bar in bars], 0.5, yerr=[bar.std for bar in bars], color=report.COLOURS[2]
    )
    axes[0, 2].set_xticks(range(len(bars)), [kind.replace("_", " ") for kind in tuned], fontsize=7, rotation=20)
    axes[0, 2].set(title="collisions, held-out found scenes")
    for axis, shot in zip(axes[1], worst, strict=False):
        paint(axis, shot, moment(shot))
    for axis in axes[1][len(worst) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"{config.source}; below: worst scenes of {name} (blue: ego, dotted: expert, orange: perturbed)", fontsize=9
    )
    return figure


def train(config: Config, run: Run) -> None:
    """Search every seed's scenes, look closer at what was found, then decide the claims and draw."""
    torch.set_num_threads(1)  # many small tensors: a second thread only waits; processes work side by side instead
    source = {seed: scenes_of(config, run, seed) for seed in run.seeds}
    both = {"plt-lidar", "plt-perfect"} <= set(config.stacks)
    with Workers(config.workers) as workers:
        for unit in run.units((seed, part) for seed in run.seeds for part in parts(config, both, len(source[seed][0]))):
            seed, part = unit.key
            names, scenes = source[seed]
            if part == "imitation":
                train_imitation(config, run, unit, "il-lidar")
            elif part == "search":
                net = network(run, seed, "imitation") if "il-lidar" in config.stacks else {}
                search_all(config, run, unit, workers, scenes, config.stacks, net)
            elif part == "training_attack":
                attack_training(config, run, unit, workers, network(run, seed, "imitation"))
            elif part == "retraining":
                train_imitation(config, run, unit, "il-retrained", run.kept((seed, "training_attack"))["delta"])
            elif part == "retrained_search":
                search_all(config, run, unit, workers, scenes, ["il-retrained"], network(run, seed, "retraining"))
            elif part == "perception":
                swap_perception(config, run, unit, workers, scenes)
            elif part == "tuning":
                tune(config, run, unit, workers, names, scenes)
            else:
                resimulate(config, run, unit)
    guided = "random" in config.searches and set(config.searches) & set(GUIDED)
    if run.preset.claims and both and guided and config.tuning and min(len(names) for names, _ in source.values()) > 1:
        decide(config, run)
    found = {name: shots(config, run, name, source) for name in config.stacks}
    if run.is_main:
        write_json(
            run.folder / "scenarios.json", [as_json(name, shot) for name, worst in found.items() for shot in worst]
        )
    name = config.stacks[0]
    animate(run, found[name])
    run.figure(draw(config, run, found[name], name))


def network(run: Run, seed: int, part: str) -> dict[str, np.ndarray]:
    """The imitation network that a unit trained, as arrays."""
    return {name: value.numpy() for name, value in run.kept((seed, part)).items()}


def parts(config: Config, both: bool, scenes: int) -> list[str]:
    """The units of work of a seed: ``both`` PLT stacks are tested, on so many scenes."""
    imitates = "il-lidar" in config.stacks
    again = imitates and config.il_found > 0
    wanted = {
        "imitation": imitates,
        "search": True,
        "training_attack": again,
        "retraining": again,
        "retrained_search": again,
        "perception": both,
        "tuning": "plt-lidar" in config.stacks and config.tuning > 0 and scenes > 1,
        "resimulation": config.source == "argoverse2",
    }
    return [part for part, needed in wanted.items() if needed]


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
