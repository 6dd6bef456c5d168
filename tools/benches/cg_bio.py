"""CG-BiO: oracles, gradients and iterations beside a linear-programming solver and forms of the released scripts."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy.optimize import brentq, linprog

from papers.cg_bio import data, model
from tools.bench import Workload

COLUMNS = 740


@functools.cache
def problems() -> ModuleType:
    """The paper's problems.py; it imports its neighbours by their bare names."""
    folder = str(Path(model.__file__).parent)
    names = ("model", "data", "problems")
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules |= {"model": model, "data": data}
    sys.path.insert(0, folder)
    try:
        import problems as module
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
    return module


@functools.cache
def regression() -> tuple[Any, np.ndarray]:
    """135 rows above, 405 below, 740 columns, and a start on the lower level."""
    rng = np.random.default_rng(0)
    table = data.unit_columns(data.generate_visits(675, COLUMNS, rng))
    exact, noisy = data.plant_outcome(table, 1.0, 0.2, rng)
    problem = problems().Regression((table[405:540], noisy[405:540]), (table[:405], exact[:405]), 1.0)
    method = model.ConditionalGradient(problem, np.zeros(table.shape[1]), 1e-3, model.harmonic(3.0))
    while method.step():
        pass
    return problem, method.x


def linear_program(c: np.ndarray, a: np.ndarray, b: float, radius: float) -> np.ndarray:
    """The cut l1 ball as a linear program on split variables, as released, solved by HiGHS."""
    n = len(c)
    rows = np.vstack([np.r_[a, -a], np.ones(2 * n)])
    found = linprog(np.r_[c, -c], A_ub=rows, b_ub=[b, radius], method="highs").x
    return found[:n] - found[n:]


def binding() -> tuple[np.ndarray, np.ndarray, float]:
    """A subproblem of regression in which the cut binds."""
    problem, start = regression()
    method = model.CGBiO(problem, start, 1e-4, 1e-4, model.harmonic(13.0), "none")
    for _ in range(200):
        method.step()
    _, c, g, a = problem.both(method.x)
    b = float(a @ method.x) + method.memory["g0"] - g
    assert a @ problem.domain.minimise(c) > b
    return c, a, b


def l1_oracle(form: str) -> Callable[[], Any]:
    """The linear subproblem of regression."""
    c, a, b = binding()
    ball = model.L1Ball(len(c), 1.0)
    ours, theirs = ball.minimise_cut(c, a, b), linear_program(c, a, b, 1.0)
    assert abs(c @ ours - c @ theirs) < 1e-7 * np.abs(c).max()
    return (lambda: ball.minimise_cut(c, a, b)) if form == "ours" else (lambda: linear_program(c, a, b, 1.0))


def upper_iterations(form: str, count: int = 20) -> Callable[[], Any]:
    """Iterations of CG-BiO on regression."""
    problem, start = regression()
    if form == "ours":

        def ours() -> np.ndarray:
            method = model.CGBiO(problem, start, 1e-4, 1e-4, model.harmonic(13.0), "none")
            for _ in range(count):
                method.step()
            return method.x

        return ours
    g0 = problem.lower_value(start)

    def released() -> np.ndarray:
        x = start
        for k in range(count):
            b = problem.lower(x)[1] @ x + g0 - problem.lower_value(x)
            s = linear_program(problem.upper(x)[1], problem.lower(x)[1], b, 1.0)
            _ = problem.upper(x)[1] @ (x - s) <= 1e-4 and problem.lower_value(x) - g0 <= 1e-4 / 2
            gamma = 2 / (k + 13)
            x = (1 - gamma) * x + gamma * s
        return x

    return released


def gradients_alone(count: int = 20) -> Callable[[], Any]:
    """The values and gradients that CG-BiO's iterations need, and nothing else."""
    problem, start = regression()
    return lambda: [problem.both(start) for _ in range(count)]


def lower_iterations(form: str, count: int = 500) -> Callable[[], Any]:
    """Iterations of conditional gradient on the lower level of regression."""
    problem, _ = regression()
    zero = np.zeros(problem.domain.size)
    if form == "ours":

        def ours() -> np.ndarray:
            method = model.ConditionalGradient(problem, zero, 1e-12, model.harmonic(3.0))
            for _ in range(count):
                method.step()
            return method.x

        return ours

    def released() -> np.ndarray:
        x, history = zero, []
        for k in range(count):
            s = problem.domain.minimise(problem.lower(x)[1])
            if problem.lower(x)[1] @ (x - s) <= 1e-12:
                break
            x = (1 - 2 / (k + 3)) * x + 2 / (k + 3) * s
            history.append(problem.lower_value(x))
        return x

    return released


def ball_oracle(form: str) -> Callable[[], Any]:
    """The cut unit-ball columns of dictionary learning, 25 x 50."""
    rng = np.random.default_rng(1)
    c, a = rng.normal(size=(2, 25, 50))
    b = -0.5 * float(np.linalg.norm(a, axis=0).sum())
    balls = model.ColumnBalls(25, 50)

    def at(lam: float) -> np.ndarray:
        moved = c + lam * a
        return -moved / np.linalg.norm(moved, axis=0)

    def released() -> np.ndarray:
        if np.trace(a.T @ at(0.0)) <= b:
            return at(0.0)
        high = 1.0
        while np.trace(a.T @ at(high)) > b:
            high *= 2
        return at(brentq(lambda lam: np.trace(a.T @ at(lam)) - b, 0.0, high, xtol=1e-15))

    assert np.allclose(balls.minimise_cut(c.ravel(), a.ravel(), b), released().ravel(), atol=1e-8)
    return (lambda: balls.minimise_cut(c.ravel(), a.ravel(), b)) if form == "ours" else released


def fair_gradients(form: str) -> Callable[[], Any]:
    """Values and gradients of both levels of fair classification, 2,000 x 51."""
    rng = np.random.default_rng(0)
    rows, _ = data.split_people(data.generate_people(4000, rng), 2000, 1000, rng)
    problem = problems().FairClassification(*rows, 100.0)
    x = problem.domain.project(rng.normal(size=51))
    if form == "ours":
        return lambda: problem.both(x)
    features, y, centred = rows.features, rows.labels, rows.sensitive - rows.sensitive.mean()
    m = len(y)

    def logistic(z: np.ndarray) -> np.ndarray:
        out, positive = np.zeros_like(z), z > 0
        out[positive] = 1 / (1 + np.exp(-z[positive]))
        out[~positive] = np.exp(z[~positive]) / (1 + np.exp(z[~positive]))
        return out

    def log_logistic(z: np.ndarray) -> np.ndarray:
        out, positive = np.zeros_like(z), z > 0
        out[positive] = -np.log(1 + np.exp(-z[positive]))
        out[~positive] = z[~positive] - np.log(1 + np.exp(z[~positive]))
        return out

    def released() -> tuple[Any, ...]:
        covariance = centred @ logistic(features @ x) / m
        e = np.exp(-np.sign(features @ x) * (features @ x))
        df = 2 * (centred @ logistic(features @ x) / m) * features.T @ (centred * e / (1 + e) ** 2) / m
        g = -log_logistic((y[:, None] * features) @ x).mean()
        dg = features.T @ (-y * logistic(-(y[:, None] * features) @ x)) / m
        return covariance**2, df, g, dg

    assert all(np.allclose(one, two) for one, two in zip(problem.both(x), released(), strict=True))
    return released


def column_projection(form: str) -> Callable[[], Any]:
    """Projection of 200 columns of 50 onto l1 balls."""
    table = np.random.default_rng(2).normal(size=(50, 200))
    if form == "ours":
        return lambda: model.project_l1(table, 3.0)

    def one(v: np.ndarray) -> np.ndarray:
        if np.abs(v).sum() <= 3.0:
            return v
        u = np.sort(np.abs(v))[::-1]
        total = np.cumsum(u)
        rho = np.flatnonzero(u > (total - 3.0) / np.arange(1, len(u) + 1))[-1]
        return np.sign(v) * np.maximum(np.abs(v) - (total[rho] - 3.0) / (rho + 1), 0)

    assert np.allclose(model.project_l1(table, 3.0), np.stack([one(v) for v in table.T], 1))
    return lambda: np.stack([one(v) for v in table.T], 1)


def lower_dictionary(form: str) -> Callable[[], Any]:
    """Value and gradient of the lower level of dictionary learning."""
    rng = np.random.default_rng(3)
    samples = data.generate_samples(rng)
    codes = rng.normal(size=(50, 250))
    problem = problems().DictionaryLearning(samples.new, samples.old, codes, 3.0)
    x = problem.domain.project(rng.normal(size=problem.domain.size))
    if form == "ours":
        return lambda: problem.lower(x)
    d = problem.parts(x)[0]

    def released() -> tuple[float, np.ndarray]:
        value = 0.5 * np.linalg.norm(samples.old - d @ codes, "fro") ** 2
        return value, (d @ codes - samples.old) @ codes.T

    assert math.isclose(released()[0], problem.lower(x)[0], rel_tol=1e-9)
    return released


def mng_iterations(form: str, count: int = 5) -> Callable[[], Any]:
    """Iterations of MNG on regression."""
    problem, _ = regression()
    a, target = problem.upper_data
    hessian, linear, lipschitz = a.T @ a, -(target @ a), problem.lower_smooth
    ridge = 1e-6 * problem.upper_smooth
    method = model.MNG(problem, hessian, linear, lipschitz, ridge)

    def ours() -> np.ndarray:
        for _ in range(count):
            method.step()
        return method.x

    if form == "ours":
        return ours
    full = hessian + ridge * np.eye(len(linear))
    best = -np.linalg.solve(full, linear)

    def plain() -> np.ndarray:
        x = best
        for _ in range(count):
            mapping = lipschitz * (x - problem.domain.project(x - problem.lower(x)[1] / lipschitz))
            slope = full @ x + linear
            rows = np.stack([-mapping, slope])
            bounds = np.array([0.75 / lipschitz * mapping @ mapping - mapping @ x, slope @ x])
            for active in ([], [0], [1], [0, 1]):  # each set of active constraints by its own KKT system
                part = rows[active]
                kkt = np.block([[full, -part.T], [part, np.zeros((len(active), len(active)))]])
                try:
                    z = np.linalg.solve(kkt, np.r_[-linear, bounds[active]])
                except np.linalg.LinAlgError:
                    continue
                if (z[len(linear) :] >= -1e-9).all() and (rows @ z[: len(linear)] >= bounds - 1e-9).all():
                    x = z[: len(linear)]
                    break
        return x

    return plain


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    solver = "HiGHS on split variables"
    yield Workload("cut l1 ball, n = 740", bind(l1_oracle, "ours"), bind(l1_oracle, "lp"), solver, target=10.0)
    yield Workload(
        "CG-BiO, 20 iterations, 135 and 405 x 740",
        bind(upper_iterations, "ours"),
        bind(upper_iterations, "released"),
        "HiGHS a step, gradients evaluated again, as released",
        target=2.0,
    )
    yield Workload(
        "CG-BiO, 20 iterations: share of the gradients",
        bind(upper_iterations, "ours"),
        gradients_alone,
        "its values and gradients alone (1 would be no other cost)",
        target=0.5,
    )
    yield Workload(
        "lower level, 500 iterations, 405 x 740",
        bind(lower_iterations, "ours"),
        bind(lower_iterations, "released"),
        "gradient twice and value once more, as released",
        target=2.0,
    )
    yield Workload(
        "cut unit-ball columns, 25 x 50",
        bind(ball_oracle, "ours"),
        bind(ball_oracle, "released"),
        "root of full matrices",
        target=2.0,
    )
    yield Workload(
        "fair classification, both gradients, 2,000 x 51",
        bind(fair_gradients, "ours"),
        bind(fair_gradients, "released"),
        "each function by itself, as released",
        target=2.0,
    )
    yield Workload(
        "projection of 200 columns of 50 onto l1 balls",
        bind(column_projection, "ours"),
        bind(column_projection, "loop"),
        "loop over columns",
        target=2.0,
    )
    yield Workload(
        "lower level of dictionary learning, 25 x 50 and 250 samples",
        bind(lower_dictionary, "ours"),
        bind(lower_dictionary, "released"),
        "residuals twice",
        target=2.0,
    )
    yield Workload(
        "MNG, 5 iterations, n = 740",
        bind(mng_iterations, "ours"),
        bind(mng_iterations, "plain"),
        "a KKT system for each set of active constraints",
        target=2.0,
    )
