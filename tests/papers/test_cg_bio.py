"""CG-BiO: oracles beside linear programs, hand values, peers, loaders, exact resume, claims that can fail."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog, minimize, minimize_scalar

from papers.cg_bio import data, model
from shared.cli import Preset
from shared.errors import UserError
from shared.paper import read_paper

FOLDER = Path(__file__).resolve().parents[2] / "papers" / "cg_bio"


@pytest.fixture
def problems(train: ModuleType) -> ModuleType:
    """The paper's problems.py, as train.py sees it."""
    return sys.modules["problems"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run_method(method: Any, steps: int) -> Any:
    while method.k < steps and method.step():
        pass
    return method


# ---- oracles ---------------------------------------------------------------------------------------------------------


def test_oracles_by_hand():
    ball = model.L1Ball(3, 2.0)
    assert ball.minimise(np.array([3.0, -5, 1])).tolist() == [0, 2, 0]
    cut = model.L1Ball(2, 1.0).minimise_cut(np.array([1.0, -2]), np.array([0.0, 1]), 0.5)
    assert np.allclose(cut, [-0.5, 0.5], atol=1e-15) and cut @ [1, -2] == pytest.approx(-1.5)
    assert model.Simplex(3, 2.0).minimise(np.array([3.0, -5, 1])).tolist() == [0, 2, 0]
    columns = model.ColumnL1(2, 2, 3.0).minimise(np.array([1.0, -4, -2, 1]))
    assert columns.reshape(2, 2).tolist() == [[0, 3], [3, 0]]
    assert np.allclose(model.ColumnBalls(2).minimise(np.array([3.0, 4])), [-0.6, -0.8])


def test_cut_oracles_equal_linear_programs():
    draw, n, fewest = rng(), 20, 9
    for trial in range(200):
        c, a = draw.normal(size=(2, n))
        size = draw.uniform(0.5, 3)
        b = draw.uniform(-0.99, 0.3) * size * np.abs(a).max()
        s = model.L1Ball(n, size).minimise_cut(c, a, b)
        rows = np.vstack([np.r_[a, -a], np.ones(2 * n)])
        peer = linprog(np.r_[c, -c], A_ub=rows, b_ub=[b, size], method="highs").fun
        assert c @ s == pytest.approx(peer, abs=1e-9) and a @ s <= b + 1e-12 and np.abs(s).sum() <= size + 1e-12
        assert (s != 0).sum() <= 2
        if trial % 4:
            continue
        b = draw.uniform(a.min(), a.max()) * size
        s = model.Simplex(n, size).minimise_cut(c, a, b)
        peer = linprog(c, A_ub=a[None], b_ub=[b], A_eq=np.ones((1, n)), b_eq=[size], method="highs").fun
        assert c @ s == pytest.approx(peer, abs=1e-9) and a @ s <= b + 1e-12 and model.Simplex(n, size).contains(s)
        fewest = min(fewest, int((s != 0).sum()))
    assert fewest == 1  # some cuts do not bind


def test_ties_and_touching_cuts_of_the_l1_ball():
    ball = model.L1Ball(4, 1.0)
    c, a = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, -1, 0])
    for b in (-1.0, -0.5, 0.0):
        s = ball.minimise_cut(c, a, b)
        peer = linprog(np.r_[c, -c], A_ub=np.vstack([np.r_[a, -a], np.ones(8)]), b_ub=[b, 1], method="highs").fun
        assert c @ s == pytest.approx(peer, abs=1e-12) and a @ s <= b + 1e-12
    assert np.array_equal(ball.minimise_cut(c, 0 * a, 0.0), ball.minimise(c))


def columns_case(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    draw = rng(seed)
    one, two = draw.normal(size=(2, 4, 6))
    if kind == "zero column":
        one[:, 1] = 0
    elif kind == "all zero":
        one[:] = 0
    elif kind == "opposite column":
        one[:, 2] = -0.7 * two[:, 2]
    least, at0 = -np.linalg.norm(two, axis=0).sum(), -float((two * one / 1e9).sum())
    norm = np.linalg.norm(one, axis=0)
    at0 = -float((two * one / np.where(norm > 0, norm, np.inf)).sum())
    share = draw.uniform(0.05, 0.95)
    return one.ravel(), two.ravel(), least + share * (at0 - least)


@pytest.mark.parametrize("kind", ["", "zero column", "all zero", "opposite column"])
def test_cut_ball_columns_meet_the_cut_and_the_dual_bound(kind):
    balls = model.ColumnBalls(4, 6)
    for seed in range(6):
        c, a, b = columns_case(kind, seed)
        s = balls.minimise_cut(c, a, b)
        assert balls.contains(s) and a @ s == pytest.approx(b, abs=1e-9)

        def dual(lam: float, c=c, a=a, b=b) -> float:
            return np.linalg.norm((c + lam * a).reshape(4, 6), axis=0).sum() + lam * b

        best = minimize_scalar(dual, bounds=(0, 200), method="bounded", options={"xatol": 1e-10})
        assert c @ s == pytest.approx(-best.fun, abs=1e-6)  # no lower value exists, by duality
    free = balls.minimise_cut(c, 0 * a, 1.0).reshape(4, 6)
    columns = c.reshape(4, 6)
    norm = np.linalg.norm(columns, axis=0)
    assert np.allclose(free, -columns / np.where(norm > 0, norm, 1))


def test_cut_ball_columns_equal_cvxpy():
    cvxpy = pytest.importorskip("cvxpy", reason="comes with the extra peers")
    for seed, kind in enumerate(["", "zero column", "opposite column"]):
        c, a, b = columns_case(kind, seed)
        s = model.ColumnBalls(4, 6).minimise_cut(c, a, b)
        d = cvxpy.Variable((4, 6))
        cut = cvxpy.sum(cvxpy.multiply(a.reshape(4, 6), d)) <= b
        goal = cvxpy.Minimize(cvxpy.sum(cvxpy.multiply(c.reshape(4, 6), d)))
        best = cvxpy.Problem(goal, [cut, cvxpy.norm(d, 2, axis=0) <= 1]).solve(solver="CLARABEL")
        assert c @ s == pytest.approx(best, abs=1e-5)


def test_products_minimise_each_factor_and_cut_one_or_all():
    draw = rng(3)
    both = model.Product([model.L1Ball(5, 1.0), model.L1Ball(4, 2.0)])
    c, a = draw.normal(size=(2, 9))
    one = a.copy()
    one[5:] = 0
    for vector in (one, a):
        b = 0.5 * float(vector @ both.minimise(vector))
        s = both.minimise_cut(c, vector, b)
        rows = np.zeros((3, 18))
        rows[0, :9], rows[0, 9:] = vector, -vector
        rows[1, [*range(5), *range(9, 14)]], rows[2, [*range(5, 9), *range(14, 18)]] = 1, 1
        peer = linprog(np.r_[c, -c], A_ub=rows, b_ub=[b, 1, 2], method="highs").fun
        assert c @ s == pytest.approx(peer, abs=1e-9) and both.contains(s) and vector @ s <= b + 1e-12
    assert both.diameter == pytest.approx(math.sqrt(4 + 16))
    v = draw.normal(size=9)
    assert np.allclose(both.project(v), np.r_[model.project_l1(v[:5], 1.0), model.project_l1(v[5:], 2.0)])


def test_polytopes_solve_linear_programs_and_project():
    square = model.Polytope(np.vstack([np.eye(2), -np.eye(2)]), np.array([1.0, 2, 0, 0]))
    assert square.minimise(np.array([-1.0, -1])).tolist() == [1, 2] and square.diameter == pytest.approx(math.sqrt(5))
    assert np.allclose(square.minimise_cut(np.array([-1.0, -1]), np.array([0.0, 1]), 0.5), [1, 0.5])
    assert np.allclose(square.project(np.array([3.0, 1])), [1, 1]) and np.allclose(square.project([0.5, 0.5]), 0.5)
    with pytest.raises(ValueError, match="linear program"):
        model.Polytope(np.array([[1.0, 0.0]]), np.array([1.0]))  # unbounded
    with pytest.raises(ValueError, match="linear program"):
        model.Polytope(np.array([[1.0], [-1.0]]), np.array([-1.0, -1.0]))  # empty
    draw = rng(1)
    rows, bounds = np.vstack([draw.normal(size=(9, 4)), np.eye(4), -np.eye(4)]), np.ones(17)
    body = model.Polytope(rows, bounds)
    for _ in range(5):
        v = 3 * draw.normal(size=4)
        peer = minimize(
            lambda x, v=v: ((x - v) ** 2).sum(), np.zeros(4), jac=lambda x, v=v: 2 * (x - v), method="SLSQP",
            constraints={"type": "ineq", "fun": lambda x: bounds - rows @ x}, options={"ftol": 1e-14},
        )  # fmt: skip
        assert np.allclose(body.project(v), peer.x, atol=1e-5) and body.contains(body.project(v))


def test_projections_by_hand_and_by_their_conditions():
    assert np.allclose(model.project_l1(np.array([0.8, -0.6, 0.1]), 1.0), [0.6, -0.4, 0], atol=1e-15)
    draw = rng(2)
    for size in (0.3, 1.0, 4.0):
        table = draw.normal(size=(12, 30))
        together = model.project_l1(table, size)
        for j in range(30):
            v, x = table[:, j], model.project_l1(table[:, j], size)
            assert np.allclose(together[:, j], x, atol=1e-15)
            # x is the projection when no vertex lies beyond the plane through x: (v - x)'(s - x) <= 0
            assert np.abs(x).sum() <= size + 1e-12 and size * np.abs(v - x).max() - (v - x) @ x <= 1e-12
    for _ in range(20):
        v = draw.normal(size=9)
        x = model.Simplex(9, 1.5).project(v)
        assert x.min() >= 0 and x.sum() == pytest.approx(1.5) and 1.5 * (v - x).max() - (v - x) @ x <= 1e-12
    far = model.ColumnBalls(3, 2).project(np.array([3.0, 0.1, 4, 0.2, 0, 0]))
    assert np.allclose(far.reshape(3, 2), [[0.6, 0.1], [0.8, 0.2], [0, 0]])


def test_a_cut_beyond_the_set_is_refused_with_its_shortfall():
    c, a = rng().normal(size=(2, 6))
    for domain in (model.L1Ball(6), model.Simplex(6), model.ColumnBalls(3, 2), model.Product([model.L1Ball(6)])):
        lowest = float(a @ domain.minimise(a))
        assert a @ domain.minimise_cut(c, a, lowest) == pytest.approx(lowest)
        with pytest.raises(model.InfeasibleCut, match=r"b - min a's is -0\.1"):
            domain.minimise_cut(c, a, lowest - 0.1)
    with pytest.raises(model.InfeasibleCut):
        model.Polytope(np.vstack([np.eye(2), -np.eye(2)]), np.ones(4)).minimise_cut(c[:2], np.ones(2), -3.0)
    with pytest.raises(model.InfeasibleCut):
        model.Product([model.L1Ball(6)]).minimise_cut(c, 0 * a, -1.0)


# ---- the method ------------------------------------------------------------------------------------------------------


def test_toy_problem(problems):
    toy = problems.toy()
    start = run_method(model.ConditionalGradient(toy, np.zeros(2), 5e-6, model.harmonic(3.0)), 10_000)
    assert start.k == 631 and np.allclose(start.x, 0.5, atol=1e-5)
    assert np.allclose(toy.upper(np.array([0.5, 0.5]))[1], [0, 0.1])
    for test in ("value", "gap"):
        method = run_method(model.CGBiO(toy, start.x, 1e-5, 1e-5, model.harmonic(3.0), test), 100)
        assert method.k == 3 and np.allclose(method.x, [0.6, 0.4], atol=1e-4)
        assert toy.upper(method.x)[0] + 0.08 <= 1e-5 and toy.lower(method.x)[0] + 1 <= 1e-5


def small_regression(problems: ModuleType, seed: int = 0) -> Any:
    draw = rng(seed)
    a = np.abs(draw.normal(size=(30, 40)))
    a /= np.linalg.norm(a, axis=0)
    exact = a @ (0.8 * draw.dirichlet(np.ones(40)))
    noisy = exact + 0.1 * exact.std() * draw.normal(size=30)
    return problems.Regression((a[18:], noisy[18:]), (a[:18], exact[:18]), 1.0)


def test_iterates_stay_in_z_cuts_keep_solutions_and_the_lower_level_obeys_its_recursion(problems):
    problem = small_regression(problems)
    g_best, f_best = problems.regression_optima(problem)
    solution = problems.minimise_on_l1_ball(
        lambda x: (*problem.lower(x), problem.lower_data[0].T @ problem.lower_data[0]), np.zeros(40), 1.0
    )
    start = run_method(model.ConditionalGradient(problem, np.zeros(40), 5e-5, model.harmonic(3.0)), 10_000)
    assert start.gap <= 5e-5 and problem.lower(start.x)[0] - g_best <= start.gap
    method = model.CGBiO(problem, start.x, 1e-4, 1e-4, model.harmonic(13.0))
    g0, square = problem.lower(start.x)[0], problem.domain.diameter**2
    for _ in range(20_000):
        g, slope = problem.lower(method.x)
        assert problem.domain.contains(method.x, 1e-12)
        assert slope @ (solution - method.x) <= g0 - g + 1e-12
        if not method.step():
            break
        gamma = 2 / (method.k - 1 + 13)
        bound = (1 - gamma) * g + gamma * g0 + gamma**2 * problem.lower_smooth * square / 2
        assert problem.lower_value(method.x) <= bound + 1e-12
    assert method.k < 20_000, "the stopping test was never met"
    assert problem.lower(method.x)[0] - g_best <= 1e-4 and problem.upper(method.x)[0] - f_best <= 1e-4


def quadratic(matrix: np.ndarray, target: np.ndarray) -> Any:
    return lambda x: (0.5 * float(((matrix @ x - target) ** 2).sum()), matrix.T @ (matrix @ x - target))


def test_a_constant_lower_level_gives_plain_conditional_gradient_and_equal_levels_stop_at_once():
    f = quadratic(rng().normal(size=(8, 5)), rng(1).normal(size=8))
    ball, zero = model.L1Ball(5, 2.0), np.zeros(5)
    bilevel = model.Functions(f, lambda x: (3.0, np.zeros(5)), ball)
    plain = model.Functions(f, f, ball)
    one = run_method(model.CGBiO(bilevel, zero, 1e-9, 1.0, model.harmonic()), 50)
    two = run_method(model.ConditionalGradient(plain, zero, 1e-9, model.harmonic()), 50)
    assert one.k == 50 and np.allclose(one.x, two.x, atol=1e-12)
    start = run_method(model.ConditionalGradient(plain, zero, 1e-3, model.harmonic(3.0)), 10_000)
    assert not model.CGBiO(plain, start.x, 1e-3, 2e-3, model.harmonic()).step()


def test_without_the_cut_it_is_conditional_gradient_on_f_and_leaves_the_lower_level(problems):
    problem = small_regression(problems)
    start = run_method(model.ConditionalGradient(problem, np.zeros(40), 5e-5, model.harmonic(3.0)), 10_000)
    ours, free = (model.CGBiO(problem, start.x, 1e-4, 1e-4, model.harmonic(13.0), "none", cut) for cut in (True, False))
    run_method(ours, 800), run_method(free, 800)
    assert problem.lower_value(free.x) > 20 * problem.lower_value(ours.x)
    only = model.Functions(problem.upper, problem.upper, problem.domain)
    plain = run_method(model.ConditionalGradient(only, start.x, 1e-12, model.harmonic(13.0)), 800)
    assert np.allclose(free.x, plain.x, atol=1e-12)


def test_back_tracking_descends_and_needs_no_constant(problems):
    train_rows, _ = data.split_people(data.generate_people(400, rng()), 200, 100, rng())
    problem = problems.FairClassification(*train_rows, 5.0)
    method = model.ConditionalGradient(problem, np.zeros(51), 1e-2, None)
    last = math.inf
    while method.k < 3000 and method.step():
        assert method.g <= last + 1e-12
        last = method.g
    assert method.gap <= 1e-2 and 0 <= problem.lower_value(method.x) - problems.logistic_optimum(problem) <= 1e-2


def test_step_rules():
    assert [model.harmonic()(k) for k in (0, 1, 2)] == [1, 2 / 3, 0.5] and model.harmonic(13.0)(0) == 2 / 13
    assert model.root(0.3)(3) == 0.15 and model.constant(0.2)(7) == 0.2
    problem = model.Functions(None, None, model.L1Ball(3, 0.5), 4.0, 2.0)  # D = 1
    assert model.nonconvex_step(problem, 0.1, 0.04) == pytest.approx(0.02)
    assert model.convex_bound(3.0, 2.0, 5) == 4.0 and model.nonconvex_iterations(1.0, 0.1, 0.5) == 41
    for bad in (
        lambda: model.harmonic(1.9),
        lambda: model.root(0.0),
        lambda: model.root(1.1),
        lambda: model.constant(2),
    ):
        with pytest.raises(ValueError, match="expected"):
            bad()


def test_bad_arguments_are_refused():
    f = quadratic(np.eye(3), np.zeros(3))
    problem, zero = model.Functions(f, f, model.L1Ball(3)), np.zeros(3)
    for radius in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="radius"):
            model.L1Ball(3, radius)
    with pytest.raises(ValueError, match="outside of Z"):
        model.CGBiO(problem, np.ones(3), 1e-3, 1e-3, model.harmonic())
    with pytest.raises(ValueError, match="shape"):
        model.AIRG(problem, np.zeros(4), 1.0, 1.0)
    with pytest.raises(ValueError, match="eps_g is -1"):
        model.CGBiO(problem, zero, 1e-3, -1, model.harmonic())
    with pytest.raises(ValueError, match="test is 'values'"):
        model.CGBiO(problem, zero, 1e-3, 1e-3, model.harmonic(), "values")
    concave = model.Functions(f, lambda x: (-float(x @ x) + 1.0, 100 - 2 * x), model.L1Ball(3))
    method = model.CGBiO(concave, zero, 1e-3, 1e-3, model.constant(0.5), "none")
    method.memory["g0"] = -1000.0  # as if x_0 had been better than anything in Z
    with pytest.raises(ValueError, match=r"iteration 0: the cut misses the set: b - min a's is -9"):
        method.step()


# ---- baselines -------------------------------------------------------------------------------------------------------


def test_baselines_take_the_steps_of_their_papers():
    f, g = quadratic(np.eye(3), np.array([1.0, 0, 0])), quadratic(2 * np.eye(3), np.array([0.0, 3, 0]))
    problem, x = model.Functions(f, g, model.L1Ball(3, 0.7)), np.array([0.1, -0.2, 0.3])
    df, dg = f(x)[1], g(x)[1]
    for offset in (1, 2):
        airg = model.AIRG(problem, x, 0.5, 0.2, offset)
        airg.step()
        moved = x - 0.5 / math.sqrt(offset) * (dg + 0.2 / offset**0.25 * df)
        assert np.allclose(airg.x, model.project_l1(moved, 0.7))
    sam = model.BiGSAM(problem, x, 0.3, 0.1, 0.25)  # alpha_1 = 1/2
    sam.step()
    below = model.project_l1(x - 0.1 * dg, 0.7)
    assert np.allclose(sam.x, 0.5 * (x - 0.3 * df) + 0.5 * below) and np.allclose(sam.feasible(), below)
    lower_only = model.BiGSAM(problem, x, 0.3, 0.1, 1e-300)  # alpha = 0: projected gradient on g
    lower_only.step()
    assert np.array_equal(lower_only.x, below)
    dbgd = model.DBGD(problem, x, 0.1)
    dbgd.step()
    weight = max((min(g(x)[0], dg @ dg) - df @ dg) / (dg @ dg), 0)
    assert weight > 0 and np.allclose(dbgd.x, model.project_l1(x - 0.1 * (df + weight * dg), 0.7))
    upper_only = model.DBGD(problem, x, 0.1, g_hat=1e9)  # w = 0: projected gradient on f
    upper_only.step()
    assert df @ dg > -1e9 and np.allclose(upper_only.x, model.project_l1(x - 0.1 * df, 0.7))


def test_mng_solves_its_quadratic_programs():
    draw = rng(4)
    a = draw.normal(size=(9, 4))
    f, g = quadratic(a, draw.normal(size=9)), quadratic(draw.normal(size=(2, 4)), np.array([0.5, -0.2]))
    problem = model.Functions(f, g, model.L1Ball(4))
    hessian = a.T @ a
    lipschitz = 20.0
    method = model.MNG(problem, hessian, f(np.zeros(4))[1], lipschitz)
    assert np.allclose(f(method.x)[1], 0, atol=1e-10)  # starts at the minimiser of f
    binding = set()
    for _ in range(8):
        x, slope = method.x.copy(), f(method.x)[1]
        mapping = lipschitz * (x - model.project_l1(x - g(x)[1] / lipschitz, 1.0))
        rows = np.stack([-mapping, slope])
        bounds = np.array([0.75 / lipschitz * mapping @ mapping - mapping @ x, slope @ x])
        method.step()
        slack = rows @ method.x - bounds
        assert slack.min() >= -1e-8
        peer = minimize(lambda z: f(z)[0], x, jac=lambda z: f(z)[1], method="SLSQP", options={"ftol": 1e-14},
                        constraints={"type": "ineq", "fun": lambda z, r=rows, b=bounds: r @ z - b,
                                     "jac": lambda z, r=rows: r})  # fmt: skip
        assert f(method.x)[0] == pytest.approx(peer.fun, abs=1e-6)
        binding.add(tuple(slack < 1e-8))
    assert len(binding) > 1
    long = run_method(model.MNG(problem, hessian, f(np.zeros(4))[1], lipschitz), 3000)
    assert problem.lower_value(long.feasible()) < 1e-3
    with pytest.raises(ValueError, match="ridge"):
        model.MNG(problem, np.ones((4, 4)), np.ones(4), 1.0)
    with pytest.raises(ValueError, match="ridge"):
        model.MNG(problem, np.zeros((4, 4)), np.ones(4), 1.0)
    model.MNG(problem, np.ones((4, 4)), np.ones(4), 1.0, ridge=0.1)


def test_state_continues_every_method_exactly(problems):
    problem = small_regression(problems)
    a, b = problem.upper_data
    zero = np.zeros(40)

    def made() -> list[Any]:
        return [
            model.ConditionalGradient(problem, zero, 1e-9, None),
            model.CGBiO(problem, zero, 1e-9, 1e-9, model.harmonic(), "none"),
            model.AIRG(problem, zero, 0.1, 0.1),
            model.BiGSAM(problem, zero, 0.1, 0.1, 10.0),
            model.DBGD(problem, zero, 0.1),
            model.MNG(problem, a.T @ a, -(b @ a), problem.lower_smooth, 1e-3),
        ]

    for first, second, whole in zip(made(), made(), made()):
        run_method(first, 7)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        run_method(second, 15), run_method(whole, 15)
        assert np.array_equal(second.x, whole.x) and np.array_equal(second.feasible(), whole.feasible())


# ---- problems and references -----------------------------------------------------------------------------------------


def all_problems(problems: ModuleType) -> dict[str, Any]:
    rows, _ = data.split_people(data.generate_people(300, rng()), 150, 60, rng())
    samples = data.generate_samples(rng(), 6, 10, 30, 20)
    codes = rng(5).normal(size=(10, 30))
    return {
        "regression": small_regression(problems),
        "fair": problems.FairClassification(*rows, 3.0),
        "dictionary": problems.DictionaryLearning(samples.new, samples.old, codes, 3.0),
        "convex": problems.Quadratics(12, 3, True, rng()),
        "indefinite": problems.Quadratics(12, 3, False, rng()),
    }


def test_gradients_and_constants(problems):
    draw = rng(6)
    for name, problem in all_problems(problems).items():
        n = problem.domain.size
        x, y = (problem.domain.project(draw.normal(size=n)) for _ in range(2))
        f, df, g, dg = problem.both(x)
        assert f == pytest.approx(problem.upper(x)[0], rel=1e-12) and np.allclose(df, problem.upper(x)[1], atol=1e-14)
        assert g == pytest.approx(problem.lower(x)[0], rel=1e-12) and np.allclose(dg, problem.lower(x)[1], atol=1e-12)
        assert problem.lower_value(x) == pytest.approx(g, rel=1e-12)
        for function, slope in ((problem.upper, df), (problem.lower, dg)):
            for _ in range(3):
                way = draw.normal(size=n)
                numeric = (function(x + 1e-5 * way)[0] - function(x - 1e-5 * way)[0]) / 2e-5
                assert numeric == pytest.approx(slope @ way, rel=1e-6, abs=1e-7), name
        gap = np.linalg.norm(x - y)
        assert np.linalg.norm(dg - problem.lower(y)[1]) <= problem.lower_smooth * gap * (1 + 1e-9)
        if name != "dictionary":
            assert np.linalg.norm(df - problem.upper(y)[1]) <= problem.upper_smooth * gap * (1 + 1e-9)
        assert gap <= problem.domain.diameter


def test_the_released_gradient_is_another(problems):
    rows, _ = data.split_people(data.generate_people(300, rng()), 150, 60, rng())
    right, released = (problems.FairClassification(*rows, 3.0, flag) for flag in (False, True))
    x = right.domain.project(rng(1).normal(size=51))
    assert right.upper(x)[0] == released.upper(x)[0]
    assert np.abs(right.upper(x)[1] - released.upper(x)[1]).max() > 1e-2 * np.abs(right.upper(x)[1]).max()


def test_fairness_by_hand(problems):
    assert problems.p_rule(0.1, 0.3) == pytest.approx(1 / 3) and problems.p_rule(0, 0) == 1 == problems.p_rule(1, 1)
    assert problems.p_rule(0.2, 0) == 0
    x, y, s = np.array([[1.0], [1], [-1], [-1]]), np.array([1.0, -1, -1, 1]), np.array([0.0, 0, 1, 1])
    found = problems.fairness(np.ones(1), x, y, s, rng())
    assert found.accuracy == 0.5 and found.p_rule == 0
    assert problems.fairness(np.ones(1), np.abs(x), y, s, rng()).p_rule == 1
    coins = problems.fairness(np.zeros(1), np.ones((4000, 1)), np.ones(4000), np.arange(4000) % 2, rng())
    assert abs(coins.accuracy - 0.5) < 0.05


def test_dictionaries_are_learnt_and_counted(problems):
    samples = data.generate_samples(rng(), 12, 20, 120, 50)
    assert problems.recovery(samples.truth, samples.truth) == 1 == problems.recovery(-samples.truth, samples.truth)
    half = samples.truth.copy()
    half[:, :10] = 0  # zero atoms match nothing and give no NaN
    assert problems.recovery(half, samples.truth) == 0.5
    d, codes = problems.learn_dictionary(samples.old, 16, 3.0, 300, rng())
    assert np.linalg.norm(d, axis=0).max() <= 1 + 1e-9 and np.abs(codes).sum(0).max() <= 3 + 1e-9
    assert np.linalg.norm(samples.old - d @ codes) < 0.3 * np.linalg.norm(samples.old)
    problem = problems.DictionaryLearning(samples.new, samples.old, codes, 3.0)
    x = np.concatenate([d.ravel(), np.zeros(16 * 50)])
    plain = 0.5 * np.linalg.norm(samples.old - d @ codes) ** 2
    assert problem.lower(x)[0] == pytest.approx(plain, rel=1e-9) and problem.upper(x)[0] > 0
    # the first stage leaves D at a minimiser of g for its codes
    slope = problem.lower(x)[1]
    assert -slope @ (problem.domain.minimise(slope) - x) < 1e-3 * plain


def by_slsqp(function: Any, start: np.ndarray, *constraints: Any) -> float:
    """Least value over x >= 0 with constraints; ``function`` returns value and gradient."""
    found = minimize(
        function,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * len(start),
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success, found.message
    return found.fun


def test_reference_optima_equal_scipys(problems):
    draw = rng(8)
    a, up = draw.normal(size=(4, 7)), draw.normal(size=(3, 7))
    target = a @ np.full(7, 0.1)
    problem = problems.Regression((up, draw.normal(size=3)), (a, target), 1.0)

    def split(function: Any, n: int) -> Any:
        """The function of x = u - v, in (u, v) >= 0."""
        turn = np.hstack([np.eye(n), -np.eye(n)])

        def out(z: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = function(turn @ z)
            return value, slope @ turn

        return out

    def within(radius: float) -> dict[str, Any]:
        return {"type": "ineq", "fun": lambda z: radius - z.sum()}

    g_best, f_best = problems.regression_optima(problem)
    same = {"type": "eq", "fun": lambda z: a @ (z[:7] - z[7:]) - target}
    peer = by_slsqp(split(problem.upper, 7), np.full(14, 0.05), within(1.0), same)
    assert g_best < 1e-10 and f_best == pytest.approx(peer, abs=1e-7)
    rows, _ = data.split_people(data.generate_people(300, rng()), 150, 60, rng())
    fair = problems.FairClassification(rows.features[:, :6], rows.labels, rows.sensitive, 2.0)
    peer = by_slsqp(split(fair.lower, 6), np.full(12, 0.05), within(2.0))
    assert problems.logistic_optimum(fair) == pytest.approx(peer, abs=1e-7)
    convex = problems.Quadratics(8, 2, True, rng(2))
    slice_ = {"type": "eq", "fun": lambda x: np.r_[convex.matrix @ x - convex.target, x.sum() - 1]}
    assert convex.optimum() == pytest.approx(by_slsqp(convex.upper, convex.inside, slice_), abs=1e-7)
    bent = problems.Quadratics(8, 2, False, rng(2))
    corners = min(bent.upper(corner)[0] for corner in np.eye(8))
    assert bent.upper_least() <= min(corners, bent.upper(bent.inside)[0])


def test_reference_optima_equal_cvxpys(problems):
    cvxpy = pytest.importorskip("cvxpy", reason="comes with the extra peers")
    problem = small_regression(problems, 3)
    g_best, f_best = problems.regression_optima(problem)
    x = cvxpy.Variable(40)
    (up, target), (a, b) = problem.upper_data, problem.lower_data
    goal = cvxpy.Minimize(cvxpy.sum_squares(up @ x - target) / 2)
    best = cvxpy.Problem(goal, [cvxpy.norm(x, 1) <= 1, a @ x == b]).solve(solver="CLARABEL")
    assert g_best < 1e-10 and f_best == pytest.approx(best, abs=1e-7)
    noisy = problems.Regression(problem.upper_data, (a, 3 * b), 1.0)  # out of the ball's reach: g* > 0
    value = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(a @ x - 3 * b) / 2), [cvxpy.norm(x, 1) <= 1]).solve()
    assert problems.regression_optima(noisy)[0] == pytest.approx(value, rel=1e-6)


def test_rates_keep_to_their_bounds(problems, train):
    problem = problems.Quadratics(12, 3, True, rng())
    best, method = problem.optimum(), model.CGBiO(problem, problem.inside, 1e-9, 1e-9, model.harmonic(), "none")
    for _ in range(600):
        method.step()
        if method.k > 1:
            k, width = method.k - 1, problem.domain.diameter
            assert method.f - best <= model.convex_bound(problem.upper_smooth, width, k)
            assert method.g - method.memory["g0"] <= model.convex_bound(problem.lower_smooth, width, k)
    assert train.tail_slope(1 / np.arange(1.0, 1000)) == pytest.approx(-1, abs=0.01)
    assert train.tail_slope(-np.ones(100)) == 0


# ---- data ------------------------------------------------------------------------------------------------------------


def test_real_adult(data_root, run_paper):
    path = data_root / "adult-disparate-impact" / "adult.npz"
    people = data.read_adult(path)
    assert people.features.shape == (10_000, 50)
    assert (people.labels == 1).sum() == 2_452 and people.sensitive.sum() == 6_754
    train_rows, test_rows = data.split_people(people, 2000, 1000, rng())
    assert train_rows.features.shape == (2000, 51) and test_rows.features.shape == (1000, 51)
    assert train_rows.features.min() == 0 and train_rows.features.max() == 1 and (train_rows.features[:, -1] == 1).all()
    result = run_paper("cg_bio", ["--preset", "fair-adult", "--data", str(data_root), "--check-data"])
    assert result.code == 0 and "2452 positive, 6754 male (as expected)" in result.out


def test_real_bus_and_its_optima(data_root, run_paper, problems):
    table = data.read_bus(data_root / "montevideo-bus" / "montevideo_bus.npz")
    assert table.shape == (675, 744) and table.sum() == 374_595
    a, b = data.outcome_column(table, 320)
    assert a.shape == (675, 740) and np.allclose(np.linalg.norm(a, axis=0), 1) and b @ b == pytest.approx(1)
    train_rows, validation, test_rows = data.split_rows(a, b, rng())
    assert [len(part[1]) for part in (train_rows, validation, test_rows)] == [405, 135, 135]
    result = run_paper("cg_bio", ["--preset", "regression-bus", "--data", str(data_root), "--check-data"])
    assert result.code == 0 and "675 rows x 744 columns (as expected)" in result.out


def adult_arrays(rows: int = 60) -> dict[str, np.ndarray]:
    draw = rng()
    return {
        "X": draw.integers(0, 9, (rows, 4)),
        "y": np.where(np.arange(rows) % 3, -1, 1)[None],
        "x_control": (np.arange(rows) % 2)[None],
    }


def test_adult_in_the_authors_layout(tmp_path):
    from scipy.io import savemat

    arrays = adult_arrays()
    (tmp_path / "fair_classification").mkdir()
    savemat(tmp_path / "fair_classification" / "adult.mat", arrays)
    np.savez(tmp_path / "adult.npz", X=arrays["X"], y=arrays["y"][0], x_control=arrays["x_control"][0])
    one = data.read_adult(data.find(tmp_path, "adult.mat", "adult.npz"))
    two = data.read_adult(tmp_path / "adult.npz")
    for left, right in zip(one, two, strict=True):
        assert np.array_equal(left, right) and left.dtype == np.float64
    assert one.labels.shape == (60,)


def wiki_table(articles: int = 6) -> dict[str, Any]:
    draw = rng()
    table: dict[str, Any] = {"edges": [[0, 1]], "weights": [1], "node_ids": {"a": 0}, "time_periods": 731}
    for day in range(731):
        table[str(day)] = {"y": draw.integers(1, 90, articles).tolist(), "year": 2019, "month": 1, "day": 1}
    return table


def test_wikipedia_in_the_official_layout(tmp_path, run_paper):
    table = wiki_table()
    path = tmp_path / "wikivital_mathematics.json"
    path.write_text(json.dumps(table))
    read = data.read_wiki(path)
    assert read.shape == (6, 731) and read[2, 5] == table["5"]["y"][2]
    argv = ["--preset", "regression-wiki", "--data", str(tmp_path), "--iterations", "20", "--lower-iterations", "20"]
    result = run_paper("cg_bio", [*argv, "--methods", "cg-bio", "big-sam", "--out", str(tmp_path / "run")])
    assert result.code == 0, result.err
    check = run_paper("cg_bio", [*argv, "--check-data"])
    assert "6 rows x 731 columns (EXPECTED (1068, 731))" in check.out


def spoil_wiki(how: str) -> dict[str, Any]:
    table = wiki_table()
    if how == "key":
        del table["time_periods"]
    elif how == "periods":
        table["time_periods"] = 730
    elif how == "day":
        del table["400"]
    elif how == "articles":
        table["9"]["y"] = [1, 2]
    elif how == "text":
        table["9"]["y"] = ["a"] * 6
    return table


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("key", "no key 'time_periods'"),
        ("periods", "time_periods is 730, expected 731"),
        ("day", "no visits of day 400"),
        ("articles", "day 9 does not list"),
        ("text", "not numbers"),
    ],
)
def test_malformed_wikipedia(tmp_path, refuses, how, message):
    (tmp_path / "wikivital_mathematics.json").write_text(json.dumps(spoil_wiki(how)))
    refuses(["--preset", "regression-wiki", "--data", str(tmp_path), "--check-data"], message)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("X", lambda x: x[:-1], "X (59, 4), y (60,), s (60,)"),
        ("X", lambda x: np.where(x == x[0, 0], np.nan, x.astype(float)), "X holds NaN"),
        ("y", lambda y: y * 0 + 1, "y holds the values [1.0], expected both of [-1, 1]"),
        ("y", lambda y: (y + 1) // 2, "y holds the values [0.0, 1.0]"),
        ("x_control", lambda s: s * 0, "s holds the values [0.0]"),
        ("X", lambda x: np.full(x.shape, "a"), "X is not numeric"),
    ],
)
def test_malformed_adult(tmp_path, refuses, name, spoil, message):
    arrays = adult_arrays()
    arrays[name] = spoil(arrays[name])
    np.savez(tmp_path / "adult.npz", **arrays)
    refuses(["--preset", "fair-adult", "--data", str(tmp_path), "--check-data"], message)


def test_other_bad_files(tmp_path, refuses):
    (tmp_path / "adult.mat").write_bytes(b"not a MATLAB file" * 20)
    refuses(["--preset", "fair-adult", "--data", str(tmp_path), "--check-data"], "not a readable MATLAB 5 file")
    refuses(["--preset", "regression-bus", "--data", str(tmp_path), "--check-data"], "no montevideo_bus.npz")
    np.savez(tmp_path / "montevideo_bus.npz", hours=np.ones((3, 3)))
    refuses(["--preset", "regression-bus", "--data", str(tmp_path), "--check-data"], "no array 'inflow'")
    (tmp_path / "wikivital_mathematics.json").write_text("[")
    refuses(["--preset", "regression-wiki", "--data", str(tmp_path)], "not readable JSON")  # when it is run, too


def test_data_that_cannot_be_prepared():
    people = data.generate_people(300, rng())
    with pytest.raises(UserError, match="300 rows, expected at least 250 for training and 100"):
        data.split_people(people, 250, 100, rng())
    with pytest.raises(UserError, match="and 1 for testing"):
        data.split_people(people, 250, 0, rng())
    flat = people._replace(features=np.column_stack([people.features, np.full(300, 7.0)]))
    with pytest.raises(UserError, match="feature column 50 is constant"):
        data.split_people(flat, 100, 50, rng())
    with pytest.raises(UserError, match=r"A \(9, 3\) and b \(8,\)"):
        data.split_rows(np.ones((9, 3)), np.ones(8), rng())
    with pytest.raises(UserError, match="2 rows give an empty part"):
        data.split_rows(np.ones((2, 3)), np.ones(2), rng())
    with pytest.raises(UserError, match="NaN"):
        data.split_rows(np.full((20, 3), np.nan), np.ones(20), rng())
    table = np.array([[1.0, 0, 2], [3, 0, 4]])
    with pytest.raises(UserError, match="--outcome 1"):
        data.outcome_column(table, 1)
    with pytest.raises(UserError, match="--outcome 3"):
        data.outcome_column(table, 3)
    a, b = data.outcome_column(table, 2)  # the all-zero column before it is gone
    assert a.shape == (2, 1) and np.allclose(b, np.array([2, 4]) / math.sqrt(20))


def test_generated_data_are_what_they_say():
    samples = data.generate_samples(rng())
    assert samples.old.shape == (25, 250) and samples.new.shape == (25, 200) and samples.truth.shape == (25, 50)
    assert np.allclose(np.linalg.norm(samples.truth, axis=0), 1)
    quiet = data.generate_samples(rng(), noise=0.0)
    for part, used in ((quiet.old, slice(0, 40)), (quiet.new, slice(29, 50))):
        atoms = quiet.truth[:, used]
        assert np.linalg.matrix_rank(atoms) == min(25, atoms.shape[1])
        if atoms.shape[1] < 25:  # fewer atoms than dimensions: the samples lie in their span
            left = part - atoms @ np.linalg.lstsq(atoms, part, rcond=None)[0]
            assert np.abs(left).max() < 1e-10
    people = data.generate_people(3000, rng())
    rates = [(people.labels[people.sensitive == group] == 1).mean() for group in (0, 1)]
    assert rates[1] > rates[0] + 0.05 and people.features.shape == (3000, 50)
    a = data.unit_columns(data.generate_visits(50, 60, rng()))
    clean, noisy = data.plant_outcome(a, 2.0, 0.1, rng())
    found = linprog(np.ones(2 * a.shape[1]), A_eq=np.hstack([a, -a]), b_eq=clean, method="highs")
    assert found.fun <= 1.6 + 1e-6 and np.abs(noisy - clean).max() > 0


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eps-f", "0"], "--eps-f is 0"),
        (["--radius", "-1"], "--radius is -1"),
        (["--methods", "fw"], "expected cg-bio among them"),
        (["--methods", "cg-bio", "sgd"], "--methods"),
        (["--experiments", "toy", "toy"], "--experiments"),
        (["--shift", "1"], "--shift is 1"),
        (["--fair-step", "2"], "--fair-step is 2"),
        (["--rate-eps", "0.1"], "at least two accuracies"),
        (["--steps", "mine"], "--steps"),
        (["--preset", "regression-bus"], "needs --data"),
    ],
)
def test_bad_usage(refuses, argv, message):
    refuses(argv, message)


def tiny(train: ModuleType, **changes: Any) -> Any:
    """A run of a few seconds in which the claims can be decided."""
    values: dict[str, Any] = {
        "rows": 100,
        "columns": 120,
        "toy_eps": 1e-3,
        "lower_iterations": 3000,
        "iterations": 6000,
        "fair_rows": 3000,
        "fair_train": 1500,
        "fair_test": 1500,
        "fair_step": 5e-3,
        "fair_iterations": 1500,
        "learn_iterations": 3000,
        "dictionary_iterations": 1500,
        "rate_iterations": 3000,
        "rate_eps": (0.2, 0.1, 0.05),
    }
    return train.Config(**(values | changes))


def judged(train: ModuleType, folder: Path, name: str, **changes: Any) -> dict[str, bool]:
    """The verdicts of a small run."""
    preset = Preset(tiny(train, **changes), data="generated", hours=1, why_not_comparable="small")
    train.PRESETS["tiny"] = preset
    out = folder / name
    assert train.main(["--preset", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    return {claim["name"]: claim["holds"] for claim in result["claims"]}


def test_claims_hold_for_the_method_and_fail_for_broken_ones(train, tmp_path, monkeypatch):
    healthy = judged(train, tmp_path, "healthy")
    paper = {claim.name for claim in read_paper(FOLDER).claims}
    failing = {name for name, holds in healthy.items() if not holds}
    assert set(healthy) == paper and failing <= {"regression_big_sam_is_slower"}  # a small table is easy for BiG-SAM
    convex = ("toy", "regression")
    cg_bio = train.CGBiO
    right = cg_bio.__init__
    broken: dict[str, bool] = {}
    with monkeypatch.context() as patch:  # the cut is forgotten
        patch.setattr(cg_bio, "__init__", lambda *args, cut=True, **kwargs: right(*args, cut=False, **kwargs))
        broken |= judged(train, tmp_path, "no cut", experiments=(*convex, "dictionary"))
    assert not any(
        broken[name]
        for name in (
            "lower_level_guarantee",
            "cut_keeps_the_lower_level",
            "regression_baselines_miss_a_level",
            "regression_big_sam_is_slower",
            "dictionary_is_recovered",
            "dictionary_keeps_the_old_samples",
        )
    )

    def ascending(self: Any, problem: Any, *args: Any, **kwargs: Any) -> None:
        right(self, copy.copy(problem), *args, **kwargs)

        def both(x: np.ndarray) -> tuple[float, np.ndarray, float, np.ndarray]:
            f, df, g, dg = problem.both(x)
            return f, -df, g, dg

        self.problem.both = both

    with monkeypatch.context() as patch:  # the upper level is maximised
        patch.setattr(cg_bio, "__init__", ascending)
        upwards = judged(train, tmp_path, "upwards", experiments=(*convex, "fair"))
    assert not any(upwards[name] for name in ("upper_level_guarantee", "fair_upper_is_lower", "fair_p_rule_is_higher"))
    with monkeypatch.context() as patch:  # steps that do not fall
        for rule in ("harmonic", "constant"):
            patch.setattr(train, rule, lambda *_: lambda k: 0.5)
        lame = judged(train, tmp_path, "lame", experiments=("rates",))
    assert not lame["convex_rate"] and not lame["nonconvex_rate"]
    assert broken.keys() | upwards.keys() | lame.keys() == paper


def test_a_run_that_is_stopped_goes_on_exactly(train, tmp_path):
    train.PRESETS["tiny"] = Preset(
        tiny(
            train,
            experiments=("regression", "dictionary"),
            lower_iterations=300,
            dictionary_iterations=60,
            learn_iterations=60,
            iterations=90,
        ),
        data="generated",
        hours=1,
        claims=False,
    )
    argv = ["--preset", "tiny", "--device", "cpu"]
    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    part = ["--resume", str(tmp_path / "part")]
    assert train.main([*argv, "--out", str(tmp_path / "part"), "--stop-after", "70"]) == 0  # inside a unit
    assert not (tmp_path / "part" / "result.json").exists()
    assert train.main([*part, "--stop-after", "133"]) == 0
    assert train.main(part) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "part"))
    assert one["metrics"] == two["metrics"] and one["data"] == two["data"]
