"""The bilevel problems of the experiments, their measures, and reference optima by an interior-point method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve, null_space

from data import check_finite, check_people
from model import Bilevel, ColumnBalls, ColumnL1, Domain, Functions, L1Ball, Polytope, Product, Simplex, Vector

# ---- toy -------------------------------------------------------------------------------------------------------------

TOY_ROWS = np.array([[1.0, 1.0], [4.0, 6.0], [-1.0, 0.0], [0.0, -1.0]])
TOY_BOUNDS = np.array([1.0, 5.0, 0.0, 0.0])
TOY_SOLUTION = np.array([0.6, 0.4])


def toy() -> Functions:
    """f = x1^2/2 - x1/2 + x2/10, g = -(x1 + x2) on a polygon; g* = -1 on a segment, solution (.6, .4), f* = -.08."""
    return Functions(
        lambda x: (0.5 * x[0] ** 2 - 0.5 * x[0] + 0.1 * x[1], np.array([x[0] - 0.5, 0.1])),
        lambda x: (-float(x.sum()), -np.ones(2)),
        Polytope(TOY_ROWS, TOY_BOUNDS),
        upper_smooth=1.0,
    )


# ---- over-parametrised regression ------------------------------------------------------------------------------------


class Regression(Bilevel):
    """f = |A_up x - b_up|^2 / 2 on validation rows, g = |A_lo x - b_lo|^2 / 2 on training rows, |x|_1 <= radius.

    Args:
        upper: (A_up (p, n), b_up (p,)). lower: (A_lo (q, n), b_lo (q,)).

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """

    def __init__(self, upper: tuple[Vector, Vector], lower: tuple[Vector, Vector], radius: float = 1.0) -> None:
        for name, (a, b) in (("upper", upper), ("lower", lower)):
            if a.ndim != 2 or b.shape != a.shape[:1] or len(b) == 0:
                raise ValueError(f"{name} level: A {a.shape} and b {b.shape}, expected (rows, n) and (rows,)")
            check_finite(**{f"A of the {name} level": a, f"b of the {name} level": b})
        if upper[0].shape[1] != lower[0].shape[1]:
            raise ValueError(f"A {upper[0].shape} and {lower[0].shape}: expected the same number of columns")
        self.upper_data, self.lower_data = upper, lower
        self.domain: L1Ball = L1Ball(upper[0].shape[1], radius)
        self.upper_smooth, self.lower_smooth = (float(np.linalg.norm(a, 2)) ** 2 for a, _ in (upper, lower))

    def upper(self, x: Vector) -> tuple[float, Vector]:
        return _squares(*self.upper_data, x)

    def lower(self, x: Vector) -> tuple[float, Vector]:
        return _squares(*self.lower_data, x)

    def lower_value(self, x: Vector) -> float:
        residual = self.lower_data[0] @ x - self.lower_data[1]
        return 0.5 * float(residual @ residual)


def _squares(a: Vector, b: Vector, x: Vector) -> tuple[float, Vector]:
    residual = a @ x - b
    return 0.5 * float(residual @ residual), residual @ a


def regression_optima(problem: Regression) -> tuple[float, float]:
    """g* and f*: first the lower level, then f over {x in the ball : A_lo x = A_lo x_g}."""
    a, b = problem.lower_data
    gram = a.T @ a

    def lower(x: Vector) -> tuple[float, Vector, Vector]:
        return *_squares(a, b, x), gram

    x_g = minimise_on_l1_ball(lower, np.zeros(a.shape[1]), problem.domain.radius)
    up, target = problem.upper_data
    hessian = up.T @ up

    def upper(x: Vector) -> tuple[float, Vector, Vector]:
        return *_squares(up, target, x), hessian

    x_f = minimise_on_l1_ball(upper, x_g, problem.domain.radius, null_space(a))
    return problem.lower_value(x_g), problem.upper(x_f)[0]


# ---- fair classification ---------------------------------------------------------------------------------------------


class FairClassification(Bilevel):
    """f = (covariance of the sensitive attribute with the predicted probability)^2, not convex; g = logistic loss.

    Args:
        features: X (m, n), with a column of ones. labels: y (m,) in {-1, 1}. sensitive: s (m,) in {0, 1}.
        radius: |x|_1 <= radius. released_gradient: e / (1 + e^2) in the place of e / (1 + e)^2, as the released code.

    Raises:
        ValueError: one class or group only, other values, shapes that do not fit, values that are not finite.
    """

    def __init__(
        self, features: Vector, labels: Vector, sensitive: Vector, radius: float, released_gradient: bool = False
    ) -> None:
        check_people(features, labels, sensitive)
        self.features, self.labels = np.ascontiguousarray(features, dtype=np.float64), labels.astype(np.float64)
        self.centred = sensitive - sensitive.mean()
        self.released_gradient = released_gradient
        m, n = features.shape
        self.domain: L1Ball = L1Ball(n, radius)
        norm, spread = float(np.linalg.norm(self.features, 2)), float(np.linalg.norm(self.centred))
        self.lower_smooth = norm**2 / (4 * m)
        slope = norm * spread / (4 * m)  # |grad cov|; |sigma''| <= 1 / (6 sqrt 3), |cov| <= mean |s - mean s| / 2
        bend = np.abs(self.centred).mean() / 2 * norm**2 * np.abs(self.centred).max() / (6 * math.sqrt(3) * m)
        self.upper_smooth = float(2 * (slope**2 + bend))

    def both(self, x: Vector) -> tuple[float, Vector, float, Vector]:
        z = self.features @ x
        size = np.abs(z)
        e = np.exp(-size)
        probability = np.where(z >= 0, 1.0, e) / (1 + e)
        bell = e / (1 + e * e) if self.released_gradient else e / (1 + e) ** 2
        m = len(z)
        covariance = float(self.centred @ probability) / m
        sides = np.stack([2 * covariance * self.centred * bell, probability - (self.labels + 1) / 2])
        df, dg = sides @ self.features / m
        return covariance**2, df, self._loss(z, size, e), dg

    def _loss(self, z: Vector, size: Vector, e: Vector) -> float:
        return float((np.log1p(e) + 0.5 * (size - self.labels * z)).mean())

    def upper(self, x: Vector) -> tuple[float, Vector]:
        return self.both(x)[:2]

    def lower(self, x: Vector) -> tuple[float, Vector]:
        z = self.features @ x
        size = np.abs(z)
        e = np.exp(-size)
        wrong = np.where(z >= 0, 1.0, e) / (1 + e) - (self.labels + 1) / 2
        return self._loss(z, size, e), wrong @ self.features / len(z)

    def lower_value(self, x: Vector) -> float:
        z = self.features @ x
        size = np.abs(z)
        return self._loss(z, size, np.exp(-size))


def logistic_optimum(problem: FairClassification) -> float:
    """g* of fair classification."""

    def lower(x: Vector) -> tuple[float, Vector, Vector]:
        value, slope = problem.lower(x)
        e = np.exp(-np.abs(problem.features @ x))
        weight = e / (1 + e) ** 2 / len(e)
        return value, slope, (problem.features.T * weight) @ problem.features

    x = minimise_on_l1_ball(lower, np.zeros(problem.domain.size), problem.domain.radius)
    return problem.lower_value(x)


class Fairness(NamedTuple):
    """Accuracy and p%-rule on test rows, both as fractions."""

    accuracy: float
    p_rule: float


def fairness(x: Vector, features: Vector, labels: Vector, sensitive: Vector, rng: np.random.Generator) -> Fairness:
    """Accuracy and min(q1/q0, q0/q1), q_s the share predicted +1 in group s (1 where both are 0).

    A score of exactly 0 is given a random sign, as released.
    """
    score = features @ x
    predicted = np.where(score == 0, rng.choice([-1.0, 1.0], len(score)), np.sign(score))
    shares = [float((predicted[sensitive == group] == 1).mean()) for group in (0, 1)]
    return Fairness(float((predicted == labels).mean()), p_rule(*shares))


def p_rule(q0: float, q1: float) -> float:
    """min(q1/q0, q0/q1) of two shares, 1 where both are 0."""
    return 1.0 if max(q0, q1) == 0 else min(q0, q1) / max(q0, q1)


# ---- dictionary learning ---------------------------------------------------------------------------------------------


class DictionaryLearning(Bilevel):
    """f = |A_new - D X|^2 / 2 over dictionary and codes, not convex; g = |A_old - D X_old|^2 / 2 over the dictionary.

    The unknowns are D (m, p) and X (p, n_new), flat and joined. Columns of D lie in the unit ball, those of X have
    |.|_1 <= delta.

    Args:
        new: A_new (m, n_new). old: A_old (m, n_old). codes: X_old (p, n_old). delta: bound on the codes.
    """

    def __init__(self, new: Vector, old: Vector, codes: Vector, delta: float) -> None:
        if len(new) != len(old) or codes.shape[1] != old.shape[1]:
            raise ValueError(
                f"A_new {new.shape}, A_old {old.shape}, X_old {codes.shape}: expected (m, n), (m, k), (p, k)"
            )
        check_finite(A_new=new, A_old=old, X_old=codes)
        self.new, self.shape_d, self.shape_x = new, (len(new), len(codes)), (len(codes), new.shape[1])
        self.domain: Domain = Product([ColumnBalls(*self.shape_d), ColumnL1(*self.shape_x, delta)])
        self._split = self.shape_d[0] * self.shape_d[1]
        self._gram, self._cross, self._square = codes @ codes.T, old @ codes.T, float((old * old).sum())
        self.lower_smooth, self.old_samples = float(np.linalg.norm(self._gram, 2)), old.shape[1]

    def parts(self, x: Vector) -> tuple[Vector, Vector]:
        """D (m, p) and X (p, n_new) of the flat unknowns."""
        return x[: self._split].reshape(self.shape_d), x[self._split :].reshape(self.shape_x)

    def upper(self, x: Vector) -> tuple[float, Vector]:
        d, codes = self.parts(x)
        residual = d @ codes - self.new
        slope = np.concatenate([(residual @ codes.T).ravel(), (d.T @ residual).ravel()])
        return 0.5 * float(np.vdot(residual, residual)), slope

    def lower(self, x: Vector) -> tuple[float, Vector]:
        d = x[: self._split].reshape(self.shape_d)
        product = d @ self._gram
        slope = np.zeros(len(x))
        slope[: self._split] = (product - self._cross).ravel()
        return 0.5 * (float(np.vdot(product, d)) + self._square) - float(np.vdot(self._cross, d)), slope

    def lower_value(self, x: Vector) -> float:
        return self.lower(x)[0]


def learn_dictionary(
    samples: Vector, atoms: int, delta: float, iterations: int, rng: np.random.Generator, joint=1e-6, alone=1e-10
) -> tuple[Vector, Vector]:
    """The first stage: a dictionary of the old samples by conditional gradient.

    Dictionary and codes together with steps 1/sqrt(k) until the gap is below ``joint``, then the dictionary alone with
    exact line search until it is below ``alone``; at most ``iterations`` of each.

    Args:
        samples: (m, n). atoms: columns of the dictionary. delta: bound on |.|_1 of a code.

    Returns:
        dictionary (m, atoms), codes (atoms, n).
    """
    m, n = samples.shape
    balls, codes_set = ColumnBalls(m, atoms), ColumnL1(atoms, n, delta)
    d = rng.standard_normal((m, atoms))
    d /= np.linalg.norm(d, axis=0)
    x = np.zeros((atoms, n))
    for k in range(iterations):
        residual = d @ x - samples
        slope_d, slope_x = residual @ x.T, d.T @ residual
        to_d = balls.minimise(slope_d.ravel()).reshape(d.shape) - d
        to_x = codes_set.minimise(slope_x.ravel()).reshape(x.shape) - x
        gap = -float(np.vdot(slope_d, to_d) + np.vdot(slope_x, to_x))
        gamma = 1 / math.sqrt(k + 1)
        d, x = d + gamma * to_d, x + gamma * to_x
        if gap < joint:
            break
    gram, cross = x @ x.T, samples @ x.T
    for _ in range(iterations):
        slope = d @ gram - cross
        to_d = balls.minimise(slope.ravel()).reshape(d.shape) - d
        gap = -float(np.vdot(slope, to_d))
        curvature = float(np.vdot(to_d @ gram, to_d))
        if curvature > 0:
            d = d + min(gap / curvature, 1.0) * to_d
        if gap < alone or curvature <= 0:
            break
    return d, x


def recovery(dictionary: Vector, truth: Vector, threshold: float = 0.9) -> float:
    """Share of true atoms (m, p), unit columns, that some column correlates with by more than the threshold."""
    norm = np.linalg.norm(dictionary, axis=0)
    unit = dictionary / np.where(norm > 0, norm, np.inf)  # a zero atom matches nothing
    return float((np.abs(unit.T @ truth).max(0) > threshold).mean())


# ---- rates -----------------------------------------------------------------------------------------------------------


class Quadratics(Functions):
    """f = x'Qx/2 + q'x and g = |Bx - Bx_0|^2 / 2 on the simplex: g* = 0 on a slice, x_0 (n,) a point of it.

    Args:
        size: n. rank: rows of B. convex: Q positive semi-definite, else indefinite.
    """

    def __init__(self, size: int, rank: int, convex: bool, rng: np.random.Generator) -> None:
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
        values = rng.uniform(0.0, 1.0, size) if convex else np.linspace(-1.0, 1.0, size)
        self.hessian, self.linear = (basis * values) @ basis.T, 0.3 * rng.standard_normal(size)
        self.matrix, self.inside = rng.standard_normal((rank, size)), rng.dirichlet(np.ones(size))
        self.target = self.matrix @ self.inside

        def upper(x: Vector) -> tuple[float, Vector]:
            product = self.hessian @ x
            return float(0.5 * (product @ x) + self.linear @ x), product + self.linear

        super().__init__(
            upper,
            lambda x: _squares(self.matrix, self.target, x),
            Simplex(size),
            float(np.abs(values).max()),
            float(np.linalg.norm(self.matrix, 2)) ** 2,
        )

    def upper_least(self) -> float:
        """A lower bound of f on the simplex: every entry of the quadratic part and of the linear part at its least."""
        return float(0.5 * self.hessian.min() + self.linear.min())

    def optimum(self) -> float:
        """f* of a convex f: over {x in the simplex : Bx = Bx_0}."""

        def upper(x: Vector) -> tuple[float, Vector, Vector]:
            return *self.upper(x), self.hessian

        moves = null_space(np.vstack([self.matrix, np.ones(len(self.linear))]))
        return self.upper(minimise_positive(upper, self.inside, moves))[0]


# ---- reference optima ------------------------------------------------------------------------------------------------

Smooth = Callable[[Vector], tuple[float, Vector, Vector]]
"""x -> value, gradient (n,), Hessian (n, n)."""
LAST_BARRIER = 1e-13


def minimise_on_l1_ball(objective: Smooth, start: Vector, radius: float, moves: Vector | None = None) -> Vector:
    """Minimise a smooth convex function over {|x|_1 <= radius}, from a start inside, by a log-barrier Newton method.

    With y >= |x| the ball is {|x_i| <= y_i, sum y <= radius}; y is eliminated from each Newton system.

    Args:
        moves: (n, k) orthonormal columns: x stays in start + their span. None: everywhere.

    Returns:
        x (n,), within (2 n + 1) 1e-13 of the optimum up to rounding.
    """
    n = len(start)
    slack = radius - float(np.abs(start).sum())
    if slack <= 0:
        raise ValueError(f"|start|_1 is {radius - slack}, expected below the radius {radius}")
    x, y = start.astype(float), np.abs(start) + slack / (n + 1)

    def barrier(x: Vector, y: Vector, mu: float) -> float:
        inside = np.concatenate([y - x, y + x, [radius - y.sum()]])
        return objective(x)[0] - mu * float(np.log(inside).sum()) if inside.min() > 0 else math.inf

    mu = max(1.0, abs(objective(x)[0])) / n
    while True:
        for _ in range(50):
            _, slope, hessian = objective(x)
            p, q, r = 1 / (y - x), 1 / (y + x), 1 / (radius - y.sum())
            gx, gy = slope + mu * (p - q), mu * (r - p - q)
            s = p * p + q * q
            t, weight = (q * q - p * p) / s, r * r / (1 + r * r * (1 / s).sum())
            over = gy / s - weight / s * float((gy / s).sum())  # (diag(s) + r^2 11')^-1 gy
            system = hessian + mu * (np.diag(4 * p * p * q * q / s) + weight * np.outer(t, t))
            dx = _newton(system, -(gx - t * s * over), moves)
            right = gy / mu + t * s * dx
            dy = -(right / s - weight / s * float((right / s).sum()))
            decrement = -float(gx @ dx + gy @ dy)
            if decrement <= 1e-3 * mu:
                break
            ahead = np.concatenate([(dx - dy) * p, -(dx + dy) * q, [dy.sum() * r]])
            size, here = min(1.0, 0.99 / max(float(ahead.max()), 1e-300)), barrier(x, y, mu)
            while barrier(x + size * dx, y + size * dy, mu) > here - 0.1 * size * decrement and size > 1e-10:
                size /= 2
            if size <= 1e-10:
                break
            x, y = x + size * dx, y + size * dy
        if mu <= LAST_BARRIER:
            return x
        mu = max(mu / 10, LAST_BARRIER)


def minimise_positive(objective: Smooth, start: Vector, moves: Vector) -> Vector:
    """Minimise a smooth convex function over {x >= 0} within start + span of ``moves``; start > 0; same method."""
    x, mu = start.astype(float), 1.0 / len(start)

    def barrier(x: Vector, mu: float) -> float:
        return objective(x)[0] - mu * float(np.log(x).sum()) if x.min() > 0 else math.inf

    while True:
        for _ in range(50):
            _, slope, hessian = objective(x)
            slope = slope - mu / x
            dx = _newton(hessian + np.diag(mu / x**2), -slope, moves)
            decrement = -float(slope @ dx)
            if decrement <= 1e-3 * mu:
                break
            size, here = min(1.0, 0.99 / max(float((-dx / x).max()), 1e-300)), barrier(x, mu)
            while barrier(x + size * dx, mu) > here - 0.1 * size * decrement and size > 1e-10:
                size /= 2
            if size <= 1e-10:
                break
            x = x + size * dx
        if mu <= LAST_BARRIER:
            return x
        mu = max(mu / 10, LAST_BARRIER)


def _newton(system: Vector, right: Vector, moves: Vector | None) -> Vector:
    if moves is None:
        return cho_solve(cho_factor(system), right)
    return moves @ cho_solve(cho_factor(moves.T @ system @ moves), moves.T @ right)
