"""CG-BiO beside a-IRG, BiG-SAM, DBGD, MNG and conditional gradient without the cut, on four bilevel problems.

The default run solves the toy problem, over-parametrised regression, fair classification and dictionary learning on
generated data, and measures convergence rates beside the proven ones. Other presets read Adult, Wikipedia or bus data.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from shared import cli
from shared.cli import Preset
from shared.options import above, among, at_least, between

EXPERIMENTS = ("toy", "regression", "fair", "dictionary", "rates")
METHODS = ("cg-bio", "fw", "a-irg", "big-sam", "dbgd", "mng")


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the released settings."""

    experiments: tuple[str, ...] = EXPERIMENTS
    """What to run: toy, regression, fair, dictionary, rates."""
    methods: tuple[str, ...] = METHODS
    """Methods: cg-bio always; fw is conditional gradient on f without the cut; mng in regression only."""
    table: Literal["generated", "wiki", "bus"] = "generated"
    """Regression: generated visits, wikivital_mathematics.json, or montevideo_bus.npz."""
    people: Literal["generated", "adult"] = "generated"
    """Fair classification: generated rows, or the authors' Adult matrix."""
    steps: Literal["released", "theory"] = "released"
    """Step sizes: of the released scripts, or 2/(k+2) for convex and the constant one for non-convex f."""
    test: Literal["value", "gap"] = "value"
    """Second half of CG-BiO's stopping test: g(x) - g(x0) <= eps_g/2, or grad g'(x - s) <= eps_g. Toy does both."""
    eps_f: float = 1e-4
    """Accuracy of the upper level in regression and fair classification."""
    eps_g: float = 1e-4
    """Accuracy of the lower level there."""
    toy_eps: float = 1e-5
    """Both accuracies of the toy problem."""
    lower_iterations: int = 10_000
    """Most iterations of conditional gradient on the lower level."""
    rows: int = 675
    """Rows of the generated visits."""
    columns: int = 744
    """Columns of the generated visits."""
    planted: bool = True
    """Generated visits: an outcome with many exact solutions; else one column of the table, as in the real ones."""
    noise: float = 0.2
    """Noise of the planted outcome on validation and test rows, a share of its standard deviation."""
    outcome: int = 320
    """Column that is the outcome where none is planted."""
    radius: float = 1.0
    """Regression: bound on |x|_1."""
    shift: float = 13.0
    """Regression: CG-BiO's steps are 2/(k + shift), k = 0, 1, ..."""
    iterations: int = 10_000
    """Regression: most iterations of CG-BiO. Other methods get these it took and those of its start."""
    mng_ridge: float = 1e-6
    """MNG: ridge on f, a share of L_f, since f alone is not strongly convex with fewer rows than columns."""
    fair_rows: int = 10_000
    """Rows of the generated people."""
    fair_train: int = 2_000
    """Fair classification: training rows."""
    fair_test: int = 1_000
    """Fair classification: test rows."""
    fair_radius: float = 100.0
    """Fair classification: bound on |x|_1."""
    fair_step: float = 5e-3
    """Fair classification: CG-BiO's steps are this / sqrt(k + 1)."""
    fair_iterations: int = 5_000
    """Fair classification: most iterations of CG-BiO."""
    released_gradient: bool = False
    """Fair classification: the gradient of f with the bracket of the released script, e / (1 + e^2)."""
    dbgd_shift: Literal["zero", "start"] = "zero"
    """DBGD's estimate of g*: 0 as released, or g where CG-BiO starts."""
    atoms: int = 50
    """Dictionary: atoms."""
    codes_radius: float = 3.0
    """Dictionary: bound on |.|_1 of a code."""
    dictionary_step: float = 0.3
    """Dictionary: steps with and without the cut are this / sqrt(k + 1)."""
    learn_iterations: int = 10_000
    """Dictionary: most iterations of each part of the first stage."""
    dictionary_iterations: int = 10_000
    """Dictionary: iterations of every method (released: 39 seconds, at most 50000)."""
    rate_size: int = 40
    """Rates: unknowns."""
    rate_iterations: int = 20_000
    """Rates: iterations with convex f."""
    rate_eps: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125, 0.00625)
    """Rates: accuracies eps_f = eps_g with non-convex f."""
    data_seed: int = 0
    """Seed of the generated data and of the splits (the run's seed is added)."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the flag, its value and what is expected.
        """
        among("experiments", self.experiments, EXPERIMENTS)
        among("methods", self.methods, METHODS)
        if "cg-bio" not in self.methods:
            raise ValueError(f"--methods is {' '.join(self.methods)}, expected cg-bio among them: it sets the budget")
        for name in ("eps_f", "eps_g", "toy_eps", "radius", "mng_ridge", "fair_radius", "codes_radius"):
            above(name, getattr(self, name), 0)
        for name in ("lower_iterations", "iterations", "fair_train", "fair_test", "fair_iterations"):
            at_least(name, getattr(self, name), 1)
        for name in ("learn_iterations", "dictionary_iterations"):
            at_least(name, getattr(self, name), 1)
        at_least("rows", self.rows, 10)
        at_least("columns", self.columns, 30)
        at_least("fair_rows", self.fair_rows, 100)
        at_least("atoms", self.atoms, 10)
        at_least("shift", self.shift, 2)
        at_least("rate_size", self.rate_size, 8)
        at_least("rate_iterations", self.rate_iterations, 100)
        at_least("noise", self.noise, 0)
        at_least("outcome", self.outcome, 0)
        at_least("data_seed", self.data_seed, 0)
        for name in ("fair_step", "dictionary_step"):
            above(name, getattr(self, name), 0)
            between(name, getattr(self, name), 0, 1)
        if len(set(self.rate_eps)) < 2:
            raise ValueError(f"--rate-eps is {' '.join(map(str, self.rate_eps))}, expected at least two accuracies")
        for eps in self.rate_eps:
            above("rate_eps", eps, 0)


GENERATED = "generated data: MATLAB's random numbers cannot be had again"
PRESETS = {
    "default": Preset(
        Config(
            rows=450,
            columns=500,
            lower_iterations=6_000,
            fair_step=2e-3,
            fair_iterations=3_000,
            rate_iterations=10_000,
            rate_eps=(0.1, 0.05, 0.025, 0.0125),
        ),
        seeds=3,
        data="generated",
        hours=0.06,
        why_not_comparable=GENERATED,
        note="dictionary learning as the paper's own generated experiment, by iterations",
    ),
    "smoke": Preset(
        Config(
            lower_iterations=200,
            rows=60,
            columns=80,
            iterations=200,
            fair_rows=400,
            fair_train=200,
            fair_test=100,
            fair_iterations=100,
            atoms=20,
            toy_eps=1e-2,
            learn_iterations=100,
            dictionary_iterations=100,
            rate_size=10,
            rate_iterations=200,
            rate_eps=(0.2, 0.1),
        ),
        data="generated",
        hours=0.002,
        claims=False,
        why_not_comparable="a few steps on generated data",
    ),
    "toy": Preset(
        Config(experiments=("toy",)),
        data="none: two unknowns",
        hours=0.001,
        claims=False,
        note="the paper's toy problem with both stopping tests",
    ),
    "regression-wiki": Preset(
        Config(experiments=("regression",), table="wiki", outcome=730),
        data="wikivital_mathematics.json",
        hours=0.02,
        needs_data=True,
        claims=False,
        why_not_comparable="the outcome day and the scaling of the released matrix were not seen",
    ),
    "regression-bus": Preset(
        Config(experiments=("regression",), table="bus"),
        seeds=3,
        data="montevideo_bus.npz",
        hours=0.03,
        needs_data=True,
        claims=False,
        why_not_comparable="bus stops in the place of Wikipedia articles",
    ),
    "regression-column": Preset(
        Config(experiments=("regression",), planted=False),
        seeds=3,
        data="generated visits, a column as outcome",
        hours=0.03,
        claims=False,
        why_not_comparable=GENERATED,
    ),
    "regression-theory": Preset(
        Config(experiments=("regression",), steps="theory", methods=("cg-bio", "fw")),
        seeds=3,
        data="generated visits",
        hours=0.02,
        claims=False,
        why_not_comparable=GENERATED,
        note="steps 2/(k+2)",
    ),
    "regression-gap-test": Preset(
        Config(experiments=("regression",), test="gap", methods=("cg-bio",)),
        seeds=3,
        data="generated visits",
        hours=0.01,
        claims=False,
        why_not_comparable=GENERATED,
        note="the stopping test of the released toy script",
    ),
    "fair-adult": Preset(
        Config(experiments=("fair",), people="adult"),
        seeds=4,
        data="adult.mat of the repository (or adult.npz)",
        hours=0.03,
        needs_data=True,
        note="same matrix and settings; other splits, iterations in the place of 45 s",
    ),
    "fair-adult-released-gradient": Preset(
        Config(experiments=("fair",), people="adult", released_gradient=True),
        seeds=4,
        data="adult.mat of the repository (or adult.npz)",
        hours=0.03,
        needs_data=True,
        claims=False,
        note="the script's gradient of f",
    ),
    "dictionary": Preset(
        Config(experiments=("dictionary",), dictionary_iterations=50_000),
        seeds=3,
        data="generated, as the paper's",
        hours=0.08,
        claims=False,
        why_not_comparable=GENERATED,
        note="the released cap on iterations",
    ),
    "dictionary-dbgd-start": Preset(
        Config(experiments=("dictionary",), dbgd_shift="start", methods=("cg-bio", "dbgd")),
        seeds=3,
        data="generated, as the paper's",
        hours=0.02,
        claims=False,
        why_not_comparable=GENERATED,
        note="DBGD with g(x0) for g*, in the place of the released 0",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.seeds import derive_seed  # noqa: E402

from data import (  # noqa: E402
    ADULT_COLUMNS,
    ADULT_MALE,
    ADULT_POSITIVE,
    ADULT_ROWS,
    BUS_SHAPE,
    WIKI_ARTICLES,
    WIKI_DAYS,
    People,
    find,
    generate_people,
    generate_samples,
    generate_visits,
    outcome_column,
    plant_outcome,
    read_adult,
    read_bus,
    read_wiki,
    split_people,
    split_rows,
    unit_columns,
)
from model import (  # noqa: E402
    AIRG,
    DBGD,
    MNG,
    BiGSAM,
    Bilevel,
    CGBiO,
    ConditionalGradient,
    Method,
    Step,
    Vector,
    constant,
    convex_bound,
    harmonic,
    nonconvex_iterations,
    nonconvex_step,
    root,
)
from problems import (  # noqa: E402
    TOY_SOLUTION,
    DictionaryLearning,
    FairClassification,
    Quadratics,
    Regression,
    fairness,
    learn_dictionary,
    logistic_optimum,
    recovery,
    regression_optima,
    toy,
)

GUARANTEES: dict[Literal["value", "gap"], float] = {"value": 1.0, "gap": 1.5}
"""Stopping tests, and how far g - g* may be then, in eps_g: half at the start, and what the test allows above it."""
BLOCKS = 50
"""Checkpoints, --stop-after and logs count blocks of a method's iterations: so many make up its budget."""
TRACED = 150
"""Iterations whose values are kept for the figure, evenly spread on a log scale."""


# ---- problems of a seed ----------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A bilevel problem with what belongs to it: test data, and the name that its metrics begin with."""

    name: str
    problem: Any
    test: Any = None


def rng_of(config: Config, seed: int, *purpose: object) -> np.random.Generator:
    """Random numbers of one purpose."""
    return np.random.default_rng(derive_seed("cg_bio", *purpose, config.data_seed + seed))


def table_path(config: Config, folder: Path | None) -> Path:
    """The file with the real table for regression."""
    if folder is None:
        raise UserError(f"--table {config.table} needs --data DIR with its file")
    return find(folder, "wikivital_mathematics.json" if config.table == "wiki" else "montevideo_bus.npz")


def read_table(config: Config, folder: Path | None) -> Vector:
    """The real table for regression (places, times)."""
    path = table_path(config, folder)
    return read_wiki(path) if config.table == "wiki" else read_bus(path)


def adult_path(folder: Path | None) -> Path:
    """The file with the real rows for fair classification."""
    if folder is None:
        raise UserError("--people adult needs --data DIR with adult.mat or adult.npz")
    return find(folder, "adult.mat", "adult.npz")


def regression_task(config: Config, run: Run, seed: int) -> Task:
    """Training rows below, validation rows above, test rows aside."""
    rng = rng_of(config, seed, "regression")
    if config.table == "generated":
        counts = generate_visits(config.rows, config.columns, rng)
    else:
        counts = read_table(config, run.data)
    if config.table == "generated" and config.planted:
        a = unit_columns(counts)
        exact, noisy = plant_outcome(a, config.radius, config.noise, rng)
        order = rng.integers(2**62)
        lower = split_rows(a, exact, np.random.default_rng(order))[0]
        _, upper, test = split_rows(a, noisy, np.random.default_rng(order))
    else:
        lower, upper, test = split_rows(*outcome_column(counts, config.outcome), rng)
    with user_errors():
        problem = Regression(upper, lower, config.radius)
    return Task("regression" if config.table == "generated" else config.table, problem, test)


def fair_task(config: Config, run: Run, seed: int) -> Task:
    """Training rows for both levels, test rows aside."""
    rng = rng_of(config, seed, "fair")
    if config.people == "generated":
        people = generate_people(config.fair_rows, rng)
    else:
        people = read_adult(adult_path(run.data))
    train, test = split_people(people, config.fair_train, config.fair_test, rng)
    with user_errors():
        problem = FairClassification(*train, config.fair_radius, config.released_gradient)
    return Task("fair" if config.people == "generated" else "adult", problem, test)


def dictionary_samples(config: Config, seed: int) -> Any:
    """Old and new samples with the true atoms."""
    return generate_samples(rng_of(config, seed, "dictionary"), config.atoms // 2, config.atoms)


def dictionary_task(config: Config, run: Run, seed: int) -> tuple[Task, Vector]:
    """The problem after the first stage and the common start of all methods."""
    samples, kept = dictionary_samples(config, seed), arrays(run, (seed, "dictionary", "start"))
    with user_errors():
        problem = DictionaryLearning(samples.new, samples.old, kept["codes"], config.codes_radius)
    return Task("dictionary", problem, samples.truth), kept["start"]


def arrays(run: Run, key: tuple[Any, ...]) -> dict[str, Vector]:
    """What a finished unit kept, as arrays."""
    return {name: value.numpy() for name, value in run.kept(key).items()}


# ---- the loop --------------------------------------------------------------------------------------------------------


def iterate(unit: Unit, method: Method, budget: int) -> None:
    """Let a method do at most ``budget`` iterations; the trace and whether it stopped are kept in ``unit.state``."""
    unit.attach(method=method)
    state = unit.state
    state.setdefault("trace", [])
    state.setdefault("stopped", False)
    state.setdefault("seconds", 0.0)
    traced = {0} | {int(k) for k in np.geomspace(1, budget, TRACED)}
    block = math.ceil(budget / BLOCKS)
    for _ in unit.steps(math.ceil(budget / block), log_every=1):
        begin = time.perf_counter()
        for _ in range(min(block, budget - method.k)):
            k = method.k
            state["stopped"] = not method.step()
            if k in traced or state["stopped"]:
                state["trace"].append([float(k), method.f, method.g, method.gap])
            if state["stopped"]:
                break
        state["seconds"] += time.perf_counter() - begin
        level = {"f": method.f} if math.isfinite(method.f) else {}
        unit.log(g=method.g, **level)
        if state["stopped"]:
            break


def reach_lower(config: Config, unit: Unit, task: Task, step: Step | None) -> tuple[ConditionalGradient, Vector]:
    """The start of CG-BiO: conditional gradient on the lower level, from 0."""
    start = np.zeros(task.problem.domain.size)
    method = ConditionalGradient(task.problem, start, config.eps_g / 2, step)
    iterate(unit, method, config.lower_iterations)
    return method, np.array(unit.state["trace"])


def build(config: Config, name: str, task: Task, start: Vector, origin: Vector, g_hat: float) -> Method:
    """A method on regression or fair classification with the released settings.

    Args:
        start: where conditional gradient on g ended. origin: start of the baselines. g_hat: DBGD's estimate of g*.
    """
    problem, fair = task.problem, isinstance(task.problem, FairClassification)
    if name in ("cg-bio", "fw"):
        test = config.test if name == "cg-bio" else "none"
        step = upper_step(config, problem, fair)
        return CGBiO(problem, start, config.eps_f, config.eps_g, step, test, cut=name == "cg-bio")
    if name == "a-irg":
        return AIRG(problem, origin, 5.0, 0.1) if fair else AIRG(problem, origin, 1e-3, 1e-3, offset=2)
    if name == "big-sam":
        if fair:
            return BiGSAM(problem, origin, 0.1, 0.1, 1.0)
        return BiGSAM(problem, origin, 2 / problem.upper_smooth, 1 / problem.lower_smooth, 10.0)
    if name == "dbgd":
        return DBGD(problem, origin, 8e-2 if fair else 1e-4, g_hat=g_hat)
    a, b = problem.upper_data
    return MNG(problem, a.T @ a, -(b @ a), problem.lower_smooth, config.mng_ridge * problem.upper_smooth)


def upper_step(config: Config, problem: Bilevel, nonconvex: bool) -> Step:
    """CG-BiO's steps in the configured regime."""
    if config.steps == "theory":
        return constant(nonconvex_step(problem, config.eps_f, config.eps_g)) if nonconvex else harmonic()
    return root(config.fair_step) if nonconvex else harmonic(config.shift)


# ---- units of work ---------------------------------------------------------------------------------------------------


def toy_unit(config: Config, unit: Unit) -> None:
    """The toy problem with both stopping tests; linear programs by HiGHS."""
    problem, eps = toy(), config.toy_eps
    lower = ConditionalGradient(problem, np.zeros(2), eps / 2, harmonic(3.0))
    while lower.step():
        pass
    metrics, paths = {"toy/lower_iterations": float(lower.k)}, {}
    step = harmonic() if config.steps == "theory" else harmonic(3.0)
    for test, guarantee in GUARANTEES.items():
        method = CGBiO(problem, lower.x, eps, eps, step, test)
        path, stopped = [method.x], False
        while method.k < config.iterations and not stopped:
            stopped = not method.step()
            path.append(method.x)
        x = method.x
        upper, below = problem.upper(x)[0] - problem.upper(TOY_SOLUTION)[0], problem.lower_value(x) + 1.0
        metrics |= {
            f"toy/{test}/iterations": float(method.k),
            f"toy/{test}/stopped": float(stopped),
            f"toy/{test}/upper_gap": upper,
            f"toy/{test}/lower_gap": below,
            f"toy/{test}/distance": float(np.linalg.norm(x - TOY_SOLUTION)),
            f"toy/{test}/upper_share": upper / eps,
            f"toy/{test}/lower_share": below / (guarantee * eps),
        }
        paths[test] = np.array(path)
    unit.finish(metrics, keep=paths)


def regression_start(config: Config, run: Run, unit: Unit, seed: int) -> None:
    """Reference optima, and conditional gradient on the lower level."""
    task = regression_task(config, run, seed)
    method, trace = reach_lower(config, unit, task, harmonic(3.0))
    g_best, f_best = regression_optima(task.problem)
    values = task.problem.lower(method.x)[0]
    metrics = {
        "lower_optimum": g_best,
        "upper_optimum": f_best,
        "start/iterations": method.k,
        "start/lower_gap": values - g_best,
        "start/stopped": float(unit.state["stopped"]),
    }
    keep = {"x": method.x, "optima": np.array([g_best, f_best]), "count": np.array([method.k]), "trace": trace}
    unit.finish({f"{task.name}/{name}": value for name, value in metrics.items()}, keep=keep)


def fair_start(config: Config, run: Run, unit: Unit, seed: int) -> None:
    """Reference optimum of the lower level, and conditional gradient on it with adaptive back-tracking."""
    task = fair_task(config, run, seed)
    method, trace = reach_lower(config, unit, task, None)
    g_best = logistic_optimum(task.problem)
    f, _, g, _ = task.problem.both(method.x)
    metrics = {
        "lower_optimum": g_best,
        "start/iterations": method.k,
        "start/upper": f,
        "start/lower_gap": g - g_best,
        "start/stopped": float(unit.state["stopped"]),
    }
    keep = {"x": method.x, "optima": np.array([g_best]), "count": np.array([method.k]), "trace": trace}
    unit.finish({f"{task.name}/{name}": value for name, value in metrics.items()}, keep=keep)


def dictionary_start(config: Config, run: Run, unit: Unit, seed: int) -> None:
    """First stage: the dictionary of the old samples with 4/5 of the atoms, zero atoms beside them, random codes."""
    samples, rng = dictionary_samples(config, seed), rng_of(config, seed, "first stage")
    used = round(0.8 * config.atoms)
    d, codes = learn_dictionary(samples.old, used, config.codes_radius, config.learn_iterations, rng)
    d = np.hstack([d, np.zeros((len(d), config.atoms - used))])
    codes = np.vstack([codes, np.zeros((config.atoms - used, codes.shape[1]))])
    x = rng.standard_normal((config.atoms, samples.new.shape[1]))  # dense: no column of f's gradient is zero
    x *= config.codes_radius / np.abs(x).sum(0)
    residual = samples.old - d @ codes
    metrics = {
        "start/recovery": recovery(d, samples.truth),
        "start/lower": 0.5 * float(np.vdot(residual, residual)) / samples.old.shape[1],
    }
    keep = {"codes": codes, "start": np.concatenate([d.ravel(), x.ravel()])}
    unit.finish({f"dictionary/{name}": value for name, value in metrics.items()}, keep=keep)


def solve(config: Config, run: Run, unit: Unit, seed: int, experiment: str, name: str) -> None:
    """One method on regression or fair classification."""
    task = (regression_task if experiment == "regression" else fair_task)(config, run, seed)
    started = arrays(run, (seed, experiment, "start"))
    g_best, spent = float(started["optima"][0]), int(started["count"][0])
    origin = np.zeros(task.problem.domain.size)
    g_hat = task.problem.lower_value(started["x"]) if config.dbgd_shift == "start" else 0.0
    with user_errors():
        method = build(config, name, task, started["x"], origin, g_hat)
    budget = config.iterations if experiment == "regression" else config.fair_iterations
    if name != "cg-bio":
        own = int(arrays(run, (seed, experiment, "cg-bio"))["count"][0])
        budget = max(own if name == "fw" else spent + own, 1)
    iterate(unit, method, budget)
    f, _, g, _ = task.problem.both(method.x)
    inside = method.feasible()
    f_in, _, g_in, _ = task.problem.both(inside)
    metrics = {"iterations": method.k, "lower_gap": g - g_best, "inside_lower_gap": g_in - g_best}
    if experiment == "regression":
        f_best = float(started["optima"][1])
        a, b = task.test
        metrics |= {
            "upper_gap": f - f_best,
            "inside_upper_gap": f_in - f_best,
            "deficit": max(min(g, g_in) - g_best, min(f, f_in) - f_best, 0.0),
            "test_error": float(np.linalg.norm(a @ inside - b)),
        }
    else:
        held: People = task.test
        accuracy, rule = fairness(method.x, *held, rng_of(config, seed, "zero scores"))
        metrics |= {"upper": f, "inside_upper": f_in, "accuracy": accuracy, "p_rule": rule}
    if name == "cg-bio":
        metrics["stopped"] = float(unit.state["stopped"])
        if experiment == "regression":
            metrics["lower_share"] = metrics["lower_gap"] / (config.eps_g * GUARANTEES[config.test])
            metrics["upper_share"] = metrics["upper_gap"] / config.eps_f
    keep = {"count": np.array([method.k]), "trace": np.array(unit.state["trace"])}
    each = {f"{task.name}/{name}/iteration_seconds": unit.state["seconds"] / max(method.k, 1)}
    unit.finish({f"{task.name}/{name}/{key}": value for key, value in metrics.items()}, each, keep)


def solve_dictionary(config: Config, run: Run, unit: Unit, seed: int, name: str) -> None:
    """One method on dictionary learning; all start at the same point and have the same number of iterations."""
    task, start = dictionary_task(config, run, seed)
    problem = task.problem
    g0, method = problem.lower_value(start), None
    if name in ("cg-bio", "fw"):
        step = root(config.dictionary_step)
        method = CGBiO(problem, start, config.eps_f, config.eps_g, step, "none", cut=name == "cg-bio")
    elif name == "a-irg":
        method = AIRG(problem, start, 0.01, 1.0)
    elif name == "big-sam":
        method = BiGSAM(problem, start, 0.1, 0.1, 10.0)
    else:
        method = DBGD(problem, start, 0.1, g_hat=g0 if config.dbgd_shift == "start" else 0.0)
    iterate(unit, method, config.dictionary_iterations)
    x = method.feasible()
    new, old = problem.shape_x[1], problem.old_samples
    metrics = {
        "recovery": recovery(problem.parts(x)[0], task.test),
        "upper": problem.upper(x)[0] / new,
        "lower_change": (problem.lower_value(x) - g0) / old,
    }
    each = {f"dictionary/{name}/iteration_seconds": unit.state["seconds"] / max(method.k, 1)}
    keep = {"trace": np.array(unit.state["trace"]), "g0": np.array([g0]), "samples": np.array([new, old])}
    unit.finish({f"dictionary/{name}/{key}": value for key, value in metrics.items()}, each, keep)


def tail_slope(excess: Vector, first: int = 8) -> float:
    """Slope of log sup_{j >= k} excess_j over log k, k = first, 2 first, ... up to a quarter of the range.

    Args:
        excess: (K,) values at k = 1, 2, ...; 0 when nothing of it is positive from ``first`` on.
    """
    tail = np.maximum.accumulate(excess[::-1])[::-1]
    at = [k for k in (first * 2**j for j in range(40)) if k <= len(excess) // 4 and tail[k - 1] > 0]
    if len(at) < 2:
        return 0.0
    return float(np.polyfit(np.log(at), np.log(tail[np.array(at) - 1]), 1)[0])


def convex_unit(config: Config, unit: Unit, seed: int) -> None:
    """Excesses of CG-BiO with steps 2/(k+2) on a convex quadratic over a slice of the simplex, beside their bounds."""
    problem = Quadratics(config.rate_size, config.rate_size // 4, True, rng_of(config, seed, "convex rate"))
    best, method = problem.optimum(), CGBiO(problem, problem.inside, 1e-9, 1e-9, harmonic(), "none")
    f, g = np.empty(config.rate_iterations), np.empty(config.rate_iterations)
    for k in range(config.rate_iterations):
        method.step()
        f[k], g[k] = method.f, method.g
    k = np.arange(1, config.rate_iterations)
    over_f, over_g = f[1:] - best, g[1:] - method.memory["g0"]
    bounds = [np.array([convex_bound(smooth, problem.domain.diameter, int(i)) for i in k])
              for smooth in (problem.upper_smooth, problem.lower_smooth)]  # fmt: skip
    metrics = {
        "upper_bound_share": float((over_f / bounds[0]).max()),
        "lower_bound_share": float((over_g / bounds[1]).max()),
        "upper_slope": tail_slope(over_f),
        "upper_distance_slope": tail_slope(np.abs(over_f)),
        "lower_slope": tail_slope(over_g),
        "upper_gap": float(over_f[-1]),
        "lower_excess": float(over_g[-1]),
    }
    at = np.unique(np.geomspace(1, len(k), TRACED).astype(int)) - 1
    keep = {"trace": np.stack([k[at], np.abs(over_f[at]), over_g[at], bounds[0][at], bounds[1][at]], 1)}
    unit.finish({f"rates/convex/{name}": value for name, value in metrics.items()}, keep=keep)


def nonconvex_unit(config: Config, unit: Unit, seed: int) -> None:
    """Iterations of CG-BiO with the constant step on an indefinite quadratic, over accuracies, beside the bound."""
    problem = Quadratics(config.rate_size, config.rate_size // 4, False, rng_of(config, seed, "nonconvex rate"))
    drop = problem.upper(problem.inside)[0] - problem.upper_least()
    rows, metrics = [], {}
    for eps in config.rate_eps:
        gamma = nonconvex_step(problem, eps, eps)
        limit = nonconvex_iterations(drop, gamma, eps)
        method = CGBiO(problem, problem.inside, eps, eps, constant(gamma), "value")
        worst = 0.0
        while method.k < limit and method.step():
            worst = max(worst, method.g - method.memory["g0"])
        rows.append([eps, method.k, limit, worst / (eps / 2)])
        metrics[f"iterations/eps={eps:g}"] = method.k
    table = np.array(rows)
    metrics |= {
        "iterations_share": float((table[:, 1] / table[:, 2]).max()),
        "lower_share": float(table[:, 3].max()),
        "exponent": -float(np.polyfit(np.log(table[:, 0]), np.log(np.maximum(table[:, 1], 1)), 1)[0]),
    }
    unit.finish({f"rates/nonconvex/{name}": value for name, value in metrics.items()}, keep={"table": table})


def keys(config: Config, seeds: list[int]) -> list[tuple[Any, ...]]:
    """Units of work; the toy problem has no seed."""
    out: list[tuple[Any, ...]] = [("toy",)] if "toy" in config.experiments else []
    ordered = [name for name in METHODS if name in config.methods]  # cg-bio first: it sets the budget of the others
    for seed in seeds:
        for experiment in config.experiments:
            if experiment == "rates":
                out += [(seed, experiment, "convex"), (seed, experiment, "nonconvex")]
            elif experiment != "toy":
                allowed = [name for name in ordered if name != "mng" or experiment == "regression"]
                out += [(seed, experiment, name) for name in ["start", *allowed]]
    return out


def work(config: Config, run: Run, unit: Unit) -> None:
    """Do one unit."""
    if unit.key[0] == "toy":
        return toy_unit(config, unit)
    seed, experiment, part = unit.key
    if experiment == "rates":
        return (convex_unit if part == "convex" else nonconvex_unit)(config, unit, seed)
    if part == "start":
        starts = {"regression": regression_start, "fair": fair_start, "dictionary": dictionary_start}
        return starts[experiment](config, run, unit, seed)
    if experiment == "dictionary":
        return solve_dictionary(config, run, unit, seed, part)
    return solve(config, run, unit, seed, experiment, part)


# ---- claims ----------------------------------------------------------------------------------------------------------


def decide(config: Config, run: Run) -> None:
    """The verdicts on the claims whose experiments were run, with all methods."""
    metrics, done = run.metrics, set(config.experiments)

    def values(name: str) -> Vector:
        return np.array(metrics[name].values)

    def means(task: str, names: tuple[str, ...], quantity: str) -> dict[str, float]:
        return {name: float(values(f"{task}/{name}/{quantity}").mean()) for name in names}

    if {"toy", "regression"} <= done and config.table == "generated":
        prefixes = ("toy/value", "toy/gap", "regression/cg-bio")
        stopped = min(float(values(f"{p}/stopped").min()) for p in prefixes)
        for level in ("lower", "upper"):
            worst = max(float(values(f"{p}/{level}_share").max()) for p in prefixes)
            name = f"{level}_level_guarantee"
            limit = run.threshold(name, "tolerance")
            run.claim(name, stopped == 1 and worst <= limit, worst_share=worst, stopped=stopped)
        deficit = np.maximum(values("regression/cg-bio/deficit"), 1e-12)
        ours = np.maximum(values("regression/cg-bio/lower_gap"), 1e-12)
        ratio = float(np.median(values("regression/fw/lower_gap") / ours))
        name = "cut_keeps_the_lower_level"
        run.claim(name, ratio >= run.threshold(name, "ratio"), ratio=ratio)
        groups = {
            "regression_baselines_miss_a_level": ("a-irg", "dbgd", "mng"),
            "regression_big_sam_is_slower": ("big-sam",),
        }
        for name, others in groups.items():
            ratios = {m: float(np.median(values(f"regression/{m}/deficit") / deficit)) for m in others}
            run.claim(name, min(ratios.values()) >= run.threshold(name, "ratio"), **named(ratios, "ratio"))
    if "fair" in done:
        task, others = "fair" if config.people == "generated" else "adult", ("a-irg", "big-sam", "dbgd")
        every = ("cg-bio", *others)
        upper, gap = means(task, every, "upper"), means(task, every, "lower_gap")
        ratio = min(upper[m] for m in others) / max(upper["cg-bio"], 1e-12)
        behind = gap["cg-bio"] - min(gap[m] for m in others)
        name = "fair_upper_is_lower"
        holds = ratio >= run.threshold(name, "ratio") and behind <= run.threshold(name, "slack")
        run.claim(name, holds, ratio=ratio, lower_gap_behind=behind)
        rule, accuracy = means(task, every, "p_rule"), means(task, every, "accuracy")
        margin = rule["cg-bio"] - max(rule[m] for m in others)
        loss = max(accuracy[m] for m in others) - accuracy["cg-bio"]
        name = "fair_p_rule_is_higher"
        holds = margin >= run.threshold(name) and loss <= run.threshold(name, "accuracy")
        run.claim(name, holds, margin=margin, accuracy_loss=loss)
    if "dictionary" in done:
        found = means("dictionary", ("cg-bio", "fw", "a-irg", "big-sam", "dbgd"), "recovery")
        margin = found["cg-bio"] - max(found[m] for m in ("fw", "a-irg", "big-sam"))
        name = "dictionary_is_recovered"
        holds = found["cg-bio"] >= run.threshold(name, "recovery") and margin >= run.threshold(name)
        run.claim(name, holds, margin=margin, **named(found, "recovery"))
        change = float(np.abs(values("dictionary/cg-bio/lower_change")).max())
        lost = min(float(values(f"dictionary/{m}/lower_change").min()) for m in ("fw", "dbgd"))
        name = "dictionary_keeps_the_old_samples"
        holds = change <= run.threshold(name, "kept") and lost >= run.threshold(name, "lost")
        run.claim(name, holds, change=change, least_lost_by_others=lost)
    if "rates" in done:
        share = max(float(values(f"rates/convex/{level}_bound_share").max()) for level in ("upper", "lower"))
        slope = float(values("rates/convex/lower_slope").mean())
        name = "convex_rate"
        holds = share <= run.threshold(name, "bound") and slope <= run.threshold(name, "slope")
        run.claim(name, holds, bound_share=share, slope=slope)
        shares = [float(values(f"rates/nonconvex/{key}").max()) for key in ("iterations_share", "lower_share")]
        exponent = float(values("rates/nonconvex/exponent").mean())
        name = "nonconvex_rate"
        holds = max(shares) <= run.threshold(name, "bound") and exponent <= run.threshold(name, "exponent")
        run.claim(name, holds, iterations_share=shares[0], lower_share=shares[1], exponent=exponent)


def named(numbers: dict[str, float], what: str) -> dict[str, float]:
    """Method names with a suffix, as names of measured numbers."""
    return {f"{name.replace('-', '_')}_{what}": value for name, value in numbers.items()}


# ---- figure ----------------------------------------------------------------------------------------------------------

COLOURS = dict(zip(METHODS, ("C3", "0.35", "C0", "C2", "C1", "C4"), strict=True))


def draw(config: Config, run: Run) -> Any:
    """Both levels over iterations of the first seed; rates; the toy path where nothing else was run."""
    seed, done = run.seeds[0], [name for name in config.experiments if name != "toy"]
    if not done:
        return draw_toy(run)
    figure, axes = report.figure(2, len(done), width=3.3, height=2.7, squeeze=False)
    for column, name in enumerate(done):
        (draw_rates if name == "rates" else draw_experiment)(config, run, seed, name, axes[0, column], axes[1, column])
    axes[0, 0].legend(fontsize=7)
    return figure


def draw_toy(run: Run) -> Any:
    """The iterates of both tests."""
    figure, axes = report.figure(1, 1, squeeze=False)
    for test in ("value", "gap"):
        path = arrays(run, ("toy",))[test]
        axes[0, 0].plot(path[:, 0], path[:, 1], "o-", label=f"test: {test}", alpha=0.6)
    axes[0, 0].plot(*TOY_SOLUTION, "k*", markersize=12, label="solution")
    axes[0, 0].set(xlabel="$x_1$", ylabel="$x_2$", title="toy: iterates of CG-BiO")
    axes[0, 0].legend()
    return figure


def draw_experiment(config: Config, run: Run, seed: int, experiment: str, above_axis: Any, below_axis: Any) -> None:
    """f above and g below, over iterations counted from the very start."""
    start = arrays(run, (seed, experiment, "start"))
    shift = {"cg-bio": int(start["count"][0]), "fw": int(start["count"][0])} if "count" in start else {}
    g_best = float(start["optima"][0]) if "optima" in start else None
    f_best = float(start["optima"][1]) if experiment == "regression" else 0.0
    for name in METHODS:
        if (seed, experiment, name) not in keys(config, [seed]):
            continue
        kept = arrays(run, (seed, experiment, name))
        k, f, g = kept["trace"][:, 0] + shift.get(name, 0), kept["trace"][:, 1], kept["trace"][:, 2]
        base = g_best if g_best is not None else float(kept["g0"][0])
        many = kept.get("samples", np.ones(2))
        above_axis.semilogy(k, np.abs(f - f_best) / many[0], color=COLOURS[name], label=name, lw=1.2)
        below = np.maximum(np.abs(g - base) / many[1], 1e-17)
        below_axis.semilogy(k, below, color=COLOURS[name], lw=1.2)
    titles = {"regression": ("$|f - f^*|$", "$|g - g^*|$"), "fair": ("$f$", "$g - g^*$")}
    top, bottom = titles.get(experiment, ("$f$ a sample", "$|g - g_0|$ a sample"))
    above_axis.set(title=f"{experiment}: {top}")
    below_axis.set(title=bottom, xlabel="iterations")


def draw_rates(config: Config, run: Run, seed: int, _: str, above_axis: Any, below_axis: Any) -> None:
    """Excesses beside their bounds; iterations over 1/eps beside theirs."""
    k, f, g, _, bound = arrays(run, (seed, "rates", "convex"))["trace"].T
    above_axis.loglog(k, np.maximum(f, 1e-12), color="C3", lw=1.2, label="$|f-f^*|$")  # the bound is on f - f* only
    above_axis.loglog(k, np.maximum(g, 1e-12), color="C0", lw=1.2, label="$g-g_0$")
    above_axis.loglog(k, bound, color="C0", ls=":", lw=1, label="bound on $g-g_0$")
    above_axis.set(title="convex $f$")
    above_axis.legend(fontsize=7)
    table = arrays(run, (seed, "rates", "nonconvex"))["table"]
    below_axis.loglog(1 / table[:, 0], np.maximum(table[:, 1], 1), "o-", color="C3", lw=1.2, label="measured")
    below_axis.loglog(1 / table[:, 0], table[:, 2], ":", color="C3", label="bound")
    below_axis.set(title="non-convex $f$: iterations", xlabel="1 / eps")
    below_axis.set_xticks(1 / table[:, 0], [f"{1 / eps:.0f}" for eps in table[:, 0]])
    below_axis.set_xticks([], minor=True)
    below_axis.legend(fontsize=7)


# ---- the command -----------------------------------------------------------------------------------------------------


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    lines = []
    if "regression" in config.experiments and config.table != "generated":
        table, name = read_table(config, folder), table_path(config, folder).name
        expected = BUS_SHAPE if config.table == "bus" else (WIKI_ARTICLES, WIKI_DAYS)
        verdict = "as expected" if table.shape == expected else f"EXPECTED {expected}"
        lines.append(f"{name}: {table.shape[0]} rows x {table.shape[1]} columns ({verdict})")
        lines.append(f"sum {table.sum():.0f}, columns that are all zero: {int((~table.any(0)).sum())}")
    if "fair" in config.experiments and config.people == "adult":
        path = adult_path(folder)
        people = read_adult(path)
        counts = (*people.features.shape, int((people.labels == 1).sum()), int(people.sensitive.sum()))
        expected = (ADULT_ROWS, ADULT_COLUMNS, ADULT_POSITIVE, ADULT_MALE)
        verdict = "as expected" if counts == expected else f"EXPECTED {expected}"
        found = f"{counts[0]} rows, {counts[1]} features, {counts[2]} positive, {counts[3]} male"
        lines.append(f"{path.name}: {found} ({verdict})")
    return lines or ["generated data; nothing to look for"]


def train(config: Config, run: Run) -> None:
    """Run every unit, decide the claims, draw."""
    torch.set_num_threads(1)  # torch only writes checkpoints here
    note_data(config, run)
    for unit in run.units(keys(config, run.seeds)):
        work(config, run, unit)
    if run.preset.claims and set(config.methods) == set(METHODS):
        decide(config, run)
    run.figure(draw(config, run))


def note_data(config: Config, run: Run) -> None:
    """Record the data of every seed.

    Raises:
        UserError: a real file is not there.
    """
    if "toy" in config.experiments:
        run.data_used("toy", "generated", spec="two unknowns")
    for seed in run.seeds:
        drawn = {"seed": config.data_seed + seed}
        if "regression" in config.experiments and config.table == "generated":
            spec = {"rows": config.rows, "columns": config.columns, "planted": config.planted, "noise": config.noise}
            run.data_used("visits", "generated", spec=spec | drawn)
        elif "regression" in config.experiments:
            run.data_used(config.table, "real", path=table_path(config, run.data))
        if "fair" in config.experiments and config.people == "generated":
            run.data_used("people", "generated", spec={"rows": config.fair_rows} | drawn)
        elif "fair" in config.experiments:
            run.data_used("adult", "real", path=adult_path(run.data))
        if "dictionary" in config.experiments:
            run.data_used("samples", "generated", spec={"atoms": config.atoms} | drawn)
        if "rates" in config.experiments:
            run.data_used("quadratics", "generated", spec={"size": config.rate_size} | drawn)


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
