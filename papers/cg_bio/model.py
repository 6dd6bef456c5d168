"""CG-BiO: conditional gradient for simple bilevel problems (Jiang, Abolfazli, Mokhtari, Hamedani, AISTATS 2023).

    minimise f(x)  over the minimisers of a convex g on a compact convex set Z

Three parts, in this order: sets Z with their linear minimisation oracles, alone and cut by a half-space; CG-BiO with
its step sizes and stopping tests; the baselines a-IRG, BiG-SAM, DBGD and MNG. Everything is float64 and works on flat
vectors of length n.

Alg. 1 is the algorithm of the paper: a point x_0 that conditional gradient on g reaches, then

    H_k = {s : grad g(x_k)'(s - x_k) <= g(x_0) - g(x_k)}            the cutting plane: it keeps all minimisers of g
    s_k = argmin of grad f(x_k)'s over Z and H_k                     the linear subproblem
    x_{k+1} = (1 - gamma_k) x_k + gamma_k s_k
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import linprog, nnls

Vector = NDArray[np.float64]
Step = Callable[[int], float]
"""Step size gamma_k in (0, 1] of iteration k = 0, 1, ..."""
TINY = 1e-12
"""Relative tolerance of the oracles."""


# ---- sets and their linear minimisation oracles ----------------------------------------------------------------------


class InfeasibleCut(ValueError):
    """The half-space does not meet the set; ``shortfall`` is b - min a's (negative)."""

    def __init__(self, shortfall: float) -> None:
        super().__init__(f"the cut misses the set: b - min a's is {shortfall:.3g}, expected at least 0")
        self.shortfall = shortfall


class Domain:
    """A compact convex set Z in R^n.

    Attributes:
        size: n. diameter: largest Euclidean distance of two points, D of the paper (or an upper bound).
    """

    size: int
    diameter: float

    def minimise(self, c: Vector) -> Vector:
        """A point of Z that minimises c's: the linear minimisation oracle."""
        raise NotImplementedError

    def project(self, v: Vector) -> Vector:
        """The point of Z nearest to v (Euclidean). For the baselines: CG-BiO never projects."""
        raise NotImplementedError

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        """Whether x lies in Z."""
        raise NotImplementedError

    def minimise_cut(self, c: Vector, a: Vector, b: float) -> Vector:
        """A point that minimises c's over Z and {s : a's <= b}.

        This general form needs ``minimise`` only and is exact for polytopes: the answer lies on an edge between a
        minimiser of c + mu a on each side of the cut.

        Raises:
            InfeasibleCut: the half-space does not meet Z.
        """
        best = self.minimise(c)
        if a @ best <= b:
            return best

        def support(mu: float) -> tuple[float, float, Vector]:
            s = self.minimise(c + mu * a)
            return float(c @ s), float(a @ s), s

        lowest = self.minimise(a)
        low = (float(c @ lowest), float(a @ lowest), lowest)
        if _misses(low[1], b, a @ best):
            return lowest
        s, t, share = edge_search(support, low, (float(c @ best), float(a @ best), best), b)
        return share * t + (1 - share) * s


def _misses(least: float, b: float, most: float) -> bool:
    """Whether the cut only touches Z, up to rounding.

    Raises:
        InfeasibleCut: it misses Z by more than rounding.
    """
    if least > b + 1e-9 * (abs(least) + abs(b) + abs(most - least)):
        raise InfeasibleCut(b - least)
    return bool(least >= b)


def edge_search(
    support: Callable[[float], tuple[float, float, Any]],
    low: tuple[float, float, Any],
    high: tuple[float, float, Any],
    b: float,
) -> tuple[Any, Any, float]:
    """The two vertices whose mixture solves min p(s) subject to q(s) <= b, where p = c's and q = a's.

    The dual function mu -> min_s p(s) + mu (q(s) - b) is piecewise linear and concave. Its cutting-plane search takes
    the multiplier at which both ends are level, asks for a better vertex there, and puts it in the place of the end
    on its side. It ends after finitely many vertices, when no vertex is better: then the mixture is optimal.

    Args:
        support: mu -> (p, q, vertex) of a minimiser of p + mu q. low: a vertex with q <= b. high: the minimiser of p,
            with q > b.

    Returns:
        vertex below, vertex above the cut, and the share of the one above that makes q = b.
    """
    for _ in range(1000):
        mu = (low[0] - high[0]) / (high[1] - low[1])
        level = high[0] + mu * high[1]
        new = support(mu)
        scale = abs(high[0]) + abs(low[0]) + mu * (abs(high[1]) + abs(low[1]))
        if new[0] + mu * new[1] >= level - TINY * scale:
            break
        if new[1] <= b:
            low = new
        else:
            high = new
    return low[2], high[2], (b - low[1]) / (high[1] - low[1])


def project_l1(v: Vector, radius: float) -> Vector:
    """Project onto {|x|_1 <= radius} by soft thresholding; each column of a matrix (n, m) for itself."""
    size = np.abs(v)
    if v.ndim == 1:
        if size.sum() <= radius:
            return v.copy()
        return np.sign(v) * np.maximum(size - _threshold(size[:, None], radius)[0], 0)
    far = size.sum(0) > radius
    if not far.any():
        return v.copy()
    out = v.copy()
    part = size[:, far]
    out[:, far] = np.sign(v[:, far]) * np.maximum(part - _threshold(part, radius), 0)
    return out


def _threshold(u: Vector, radius: float) -> Vector:
    """t (m,) with sum of (u - t)+ equal to radius in each column of u (n, m), where the sum of u is larger."""
    down = -np.sort(-u, axis=0)
    excess = np.cumsum(down, axis=0) - radius
    rank = np.arange(1, len(u) + 1)[:, None]
    last = len(u) - 1 - np.argmax((down * rank > excess)[::-1], axis=0)
    return np.take_along_axis(excess, last[None], 0)[0] / (last + 1)


class L1Ball(Domain):
    """{x in R^n : |x|_1 <= radius}. Vertices are +-radius e_i; with a cut the answer has two non-zeros at most."""

    def __init__(self, size: int, radius: float = 1.0) -> None:
        _positive(size=size, radius=radius)
        self.size, self.radius, self.diameter = size, float(radius), 2.0 * radius

    def _vertex(self, w: Vector) -> tuple[int, float]:
        i = int(np.abs(w).argmax())
        return i, -math.copysign(self.radius, w[i])

    def _dense(self, *parts: tuple[tuple[int, float], float]) -> Vector:
        s = np.zeros(self.size)
        for (i, value), share in parts:
            s[i] += share * value
        return s

    def minimise(self, c: Vector) -> Vector:
        return self._dense((self._vertex(c), 1.0))

    def minimise_cut(self, c: Vector, a: Vector, b: float) -> Vector:
        def at(vertex: tuple[int, float]) -> tuple[float, float, tuple[int, float]]:
            i, value = vertex
            return float(c[i]) * value, float(a[i]) * value, vertex

        high = at(self._vertex(c))
        if high[1] <= b:
            return self._dense((high[2], 1.0))
        low = at(self._vertex(a))
        if _misses(low[1], b, high[1]):
            return self._dense((low[2], 1.0))
        s, t, share = edge_search(lambda mu: at(self._vertex(c + mu * a)), low, high, b)
        return self._dense((s, 1 - share), (t, share))

    def project(self, v: Vector) -> Vector:
        return project_l1(v, self.radius)

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        return bool(np.abs(x).sum() <= self.radius * (1 + tolerance))


class Simplex(Domain):
    """{x >= 0 : sum x = total} in R^n. Vertices are total e_i."""

    def __init__(self, size: int, total: float = 1.0) -> None:
        _positive(size=size, total=total)
        self.size, self.total, self.diameter = size, float(total), math.sqrt(2.0) * total

    def minimise(self, c: Vector) -> Vector:
        s = np.zeros(self.size)
        s[int(c.argmin())] = self.total
        return s

    def project(self, v: Vector) -> Vector:
        shifted = v - v.min() + self.total  # any shift along (1, ..., 1) has the same projection
        return np.maximum(shifted - _threshold(shifted[:, None], self.total)[0], 0)

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        return bool(x.min() >= -tolerance * self.total and abs(x.sum() - self.total) <= tolerance * self.total)


class ColumnBalls(Domain):
    """Matrices (rows, columns), flat in C order, whose columns have Euclidean norm <= radius; one column: a ball.

    With a cut the subproblem has one dual variable: the columns of the answer are -(c_i + lam a_i) / |.|, and lam >= 0
    solves one scalar equation in the column norms |c_i|^2, c_i'a_i, |a_i|^2.
    """

    def __init__(self, rows: int, columns: int = 1, radius: float = 1.0) -> None:
        _positive(rows=rows, columns=columns, radius=radius)
        self.shape, self.size, self.radius = (rows, columns), rows * columns, float(radius)
        self.diameter = 2.0 * radius * math.sqrt(columns)

    def _columns(self, w: Vector) -> Vector:
        w = w.reshape(self.shape)
        norm = np.sqrt(np.einsum("ij,ij->j", w, w))
        norm[norm == 0] = np.inf
        return w * (-self.radius / norm)

    def minimise(self, c: Vector) -> Vector:
        return self._columns(c).ravel()

    def minimise_cut(self, c: Vector, a: Vector, b: float) -> Vector:
        one, two = c.reshape(self.shape), a.reshape(self.shape)
        cc, ca, aa = (np.einsum("ij,ij->j", u, v) for u, v in ((one, one), (one, two), (two, two)))
        use = aa > 0  # the other columns do not meet the cut
        cc, ca, aa = cc[use], ca[use], aa[use]
        turn, length_a = -ca / aa, np.sqrt(aa)  # |c_i + lam a_i|^2 = apart_i + aa_i (lam - turn_i)^2
        apart = np.maximum(cc + ca * turn, 0.0)
        parallel = apart <= 1e-13 * cc
        apart[parallel] = 0.0
        bound, least = b / self.radius, -float(length_a.sum())

        def excess(lam: float, keep: Any = slice(None)) -> tuple[float, float]:
            """a's of the minimiser of c + lam a (radius 1) above its least value, and its derivative in lam."""
            away = lam - turn
            square = apart + aa * away * away + 1e-300
            length = np.sqrt(square)
            cosine, share = length_a * away / length, apart / square
            value = length_a * np.where(cosine > 0, share / np.maximum(1 + cosine, 1.0), 1 - cosine)  # 1 - cosine
            return float(value[keep].sum()), -float((share * (aa / length)).sum())

        e, de = excess(0.0)
        if e + least <= bound:
            return self._columns(one).ravel()
        if _misses(least, bound, e + least):
            return self._columns(two).ravel()
        for lam in np.unique(turn[parallel & (turn >= 0)]):  # columns with c_i = -lam a_i turn round: free in between
            here = parallel & (np.abs(turn - lam) <= 1e-12 * lam)
            jump = float(length_a[here].sum())
            rest = excess(lam, ~here)[0] + least + jump
            if abs(bound - rest) <= jump:
                s, free = self._columns(one + lam * two), np.flatnonzero(use)[here]
                s[:, free] = (rest - bound) / jump * self._columns(two)[:, free]
                return s.ravel()
        lam = self._root(excess, e, de, bound - least, math.sqrt(cc.sum() / aa.sum()), 1e-13 * (abs(bound) - least))
        return self._columns(one + lam * two).ravel()

    @staticmethod
    def _root(
        excess: Callable[[float], tuple[float, float]], e: float, de: float, goal: float, scale: float, tolerance: float
    ) -> float:
        """lam > 0 at which the excess is ``goal``, in a bracket, by Newton steps on excess^(-1/2).

        The excess falls as 1 / lam^2 in the end, which makes that function almost straight.
        """
        low, high, lam, fast = 0.0, math.inf, 0.0, True
        for _ in range(400):
            newton = lam + 2 * e * (math.sqrt(e / goal) - 1) / -de if de < 0 < e else math.inf
            if high == math.inf:
                following = newton if low < newton < math.inf and fast else 10 * low + scale
            elif low < newton < high and fast:
                following = newton
            elif low == 0:
                following = 1e-2 * high
            else:
                following = math.sqrt(low * high) if high > 4 * low else (low + high) / 2
            if abs(following - lam) <= 4e-16 * lam:
                break  # as near as rounding lets it be
            lam, before = following, abs(e - goal)
            e, de = excess(lam)
            fast = abs(e - goal) <= before / 2  # else the bracket is halved next
            if abs(e - goal) <= min(tolerance, 1e-6 * goal):
                break
            if e > goal:
                low = lam
            else:
                high = lam
        return lam

    def project(self, v: Vector) -> Vector:
        v = v.reshape(self.shape)
        norm = np.sqrt(np.einsum("ij,ij->j", v, v))
        return (v * (self.radius / np.maximum(norm, self.radius))).ravel()

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        return bool(np.linalg.norm(x.reshape(self.shape), axis=0).max() <= self.radius * (1 + tolerance))


class ColumnL1(Domain):
    """Matrices (rows, columns), flat in C order, whose columns have |.|_1 <= radius."""

    def __init__(self, rows: int, columns: int, radius: float) -> None:
        _positive(rows=rows, columns=columns, radius=radius)
        self.shape, self.size, self.radius = (rows, columns), rows * columns, float(radius)
        self.diameter = 2.0 * radius * math.sqrt(columns)
        self._index = np.arange(columns)

    def minimise(self, c: Vector) -> Vector:
        c = c.reshape(self.shape)
        row = np.abs(c).argmax(0)
        s = np.zeros(self.shape)
        s[row, self._index] = -self.radius * np.sign(c[row, self._index])
        return s.ravel()

    def project(self, v: Vector) -> Vector:
        return project_l1(v.reshape(self.shape), self.radius).ravel()

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        return bool(np.abs(x.reshape(self.shape)).sum(0).max() <= self.radius * (1 + tolerance))


class Product(Domain):
    """Z = Z_1 x Z_2 x ...; a cut may bind one factor, the others are minimised as they are."""

    def __init__(self, factors: Sequence[Domain]) -> None:
        self.factors = list(factors)
        ends = np.cumsum([0] + [factor.size for factor in self.factors])
        self._slices = [slice(int(i), int(j)) for i, j in pairwise(ends)]
        self.size = int(ends[-1])
        self.diameter = math.sqrt(sum(factor.diameter**2 for factor in self.factors))

    def _each(self, name: str, v: Vector) -> Vector:
        return np.concatenate([getattr(z, name)(v[part]) for z, part in zip(self.factors, self._slices, strict=True)])

    def minimise(self, c: Vector) -> Vector:
        return self._each("minimise", c)

    def minimise_cut(self, c: Vector, a: Vector, b: float) -> Vector:
        bound = [i for i, part in enumerate(self._slices) if a[part].any()]
        if len(bound) > 1:
            return super().minimise_cut(c, a, b)
        if not bound and b < 0:
            raise InfeasibleCut(b)
        return np.concatenate(
            [
                z.minimise_cut(c[part], a[part], b) if i in bound else z.minimise(c[part])
                for i, (z, part) in enumerate(zip(self.factors, self._slices, strict=True))
            ]
        )

    def project(self, v: Vector) -> Vector:
        return self._each("project", v)

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        return all(z.contains(x[part], tolerance) for z, part in zip(self.factors, self._slices, strict=True))


class Polytope(Domain):
    """{x : rows x <= bounds}, bounded and not empty; its oracles are linear programs that HiGHS solves.

    Raises:
        ValueError: empty or unbounded.
    """

    def __init__(self, rows: Vector, bounds: Vector) -> None:
        self.rows, self.bounds = np.asarray(rows, float), np.asarray(bounds, float)
        if self.rows.ndim != 2 or self.bounds.shape != self.rows.shape[:1]:
            raise ValueError(f"shapes {self.rows.shape} and {self.bounds.shape}, expected (m, n) and (m,)")
        self.size = self.rows.shape[1]
        eye = np.eye(self.size)
        box = [-(e @ self.minimise(-e)) + e @ self.minimise(e) for e in eye]
        self.diameter = float(np.linalg.norm(box))

    def _solve(self, c: Vector, rows: Vector, bounds: Vector) -> Any:
        found = linprog(c, A_ub=rows, b_ub=bounds, bounds=(None, None), method="highs")
        if found.status == 3 or (found.status == 2 and rows is self.rows):
            raise ValueError(f"linear program over the polytope: {found.message}")
        return found

    def minimise(self, c: Vector) -> Vector:
        return self._solve(c, self.rows, self.bounds).x

    def minimise_cut(self, c: Vector, a: Vector, b: float) -> Vector:
        found = self._solve(c, np.vstack([self.rows, a]), np.append(self.bounds, b))
        if found.x is not None:
            return found.x
        lowest = self.minimise(a)
        _misses(float(a @ lowest), b, float(a @ self.minimise(c)))
        return lowest

    def project(self, v: Vector) -> Vector:
        """By least-distance programming: a non-negative least squares problem (Lawson, Hanson, ch. 23)."""
        target = self.rows @ v - self.bounds
        if (target <= 0).all():
            return v.copy()
        matrix = np.vstack([-self.rows.T, target])
        goal = np.append(np.zeros(self.size), 1.0)
        residual = matrix @ nnls(matrix, goal)[0] - goal
        return v - residual[:-1] / residual[-1]

    def contains(self, x: Vector, tolerance: float = 1e-9) -> bool:
        return bool((self.rows @ x - self.bounds <= tolerance * (1 + np.abs(self.bounds))).all())


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a positive number")


# ---- problems --------------------------------------------------------------------------------------------------------


class Bilevel:
    """min f over the minimisers of g on Z. Subclasses give ``upper``, ``lower`` and, where they share work, ``both``.

    Attributes:
        domain: Z. upper_smooth, lower_smooth: Lipschitz constants L_f, L_g of the gradients on Z (or upper bounds).
    """

    domain: Domain
    upper_smooth: float = math.nan
    lower_smooth: float = math.nan

    def upper(self, x: Vector) -> tuple[float, Vector]:
        """f(x) and its gradient (n,)."""
        raise NotImplementedError

    def lower(self, x: Vector) -> tuple[float, Vector]:
        """g(x) and its gradient (n,)."""
        raise NotImplementedError

    def lower_value(self, x: Vector) -> float:
        """g(x)."""
        return self.lower(x)[0]

    def both(self, x: Vector) -> tuple[float, Vector, float, Vector]:
        """f(x), its gradient, g(x), its gradient."""
        return *self.upper(x), *self.lower(x)


class Functions(Bilevel):
    """A bilevel problem from two functions that return value and gradient."""

    def __init__(
        self,
        upper: Callable[[Vector], tuple[float, Vector]],
        lower: Callable[[Vector], tuple[float, Vector]],
        domain: Domain,
        upper_smooth: float = math.nan,
        lower_smooth: float = math.nan,
    ) -> None:
        self._upper, self._lower, self.domain = upper, lower, domain
        self.upper_smooth, self.lower_smooth = upper_smooth, lower_smooth

    def upper(self, x: Vector) -> tuple[float, Vector]:
        return self._upper(x)

    def lower(self, x: Vector) -> tuple[float, Vector]:
        return self._lower(x)


# ---- step sizes ------------------------------------------------------------------------------------------------------


def harmonic(shift: float = 2.0) -> Step:
    """gamma_k = 2 / (k + shift), for convex f. The theory has shift 2, the released regression 13.

    Raises:
        ValueError: shift below 2, which gives steps above 1.
    """
    if not 2 <= shift < math.inf:
        raise ValueError(f"shift is {shift}, expected at least 2")
    return lambda k: 2.0 / (k + shift)


def root(first: float) -> Step:
    """gamma_k = first / sqrt(k + 1): the released steps for non-convex f."""
    if not 0 < first <= 1:
        raise ValueError(f"first step is {first}, expected above 0 and at most 1")
    return lambda k: first / math.sqrt(k + 1)


def constant(size: float) -> Step:
    """gamma_k = size."""
    if not 0 < size <= 1:
        raise ValueError(f"step is {size}, expected above 0 and at most 1")
    return lambda k: size


def nonconvex_step(problem: Bilevel, eps_f: float, eps_g: float) -> float:
    """min(eps_f / (L_f D^2), eps_g / (L_g D^2), 1): the constant step for non-convex f."""
    _positive(eps_f=eps_f, eps_g=eps_g, upper_smooth=problem.upper_smooth, lower_smooth=problem.lower_smooth)
    square = problem.domain.diameter**2
    return min(eps_f / (problem.upper_smooth * square), eps_g / (problem.lower_smooth * square), 1.0)


def convex_bound(smooth: float, diameter: float, k: int) -> float:
    """2 L D^2 / (k + 1): bounds f(x_k) - f* and g(x_k) - g(x_0) for k >= 1 with steps 2/(k+2), each with its L.

    One step gives h_{k+1} <= (1 - gamma) h_k + gamma^2 L D^2 / 2 for both: for f because the cut keeps a solution, for
    g because s_k lies below the cut.
    """
    return 2.0 * smooth * diameter**2 / (k + 1)


def nonconvex_iterations(drop: float, step: float, eps_f: float) -> int:
    """Iterations within which the test on f is met with the constant step; ``drop`` is f(x_0) - min f or more.

    Summing the descent steps, the mean gap over K of them is at most drop / (K gamma) + gamma L_f D^2 / 2.
    """
    return math.ceil(2.0 * drop / (step * eps_f)) + 1


# ---- conditional gradient and CG-BiO ---------------------------------------------------------------------------------


class Method:
    """An iterative method: ``x`` is the iterate of index ``k``; ``step()`` moves on, or returns False at its stop.

    Attributes:
        f, g: objective values at the point that the last ``step()`` started from. gap: its conditional-gradient gap.
    """

    def __init__(self, problem: Bilevel, start: Vector) -> None:
        """Raises ValueError where ``start`` (n,) does not fit or does not lie in Z."""
        start = np.array(start, dtype=np.float64)
        if start.shape != (problem.domain.size,):
            raise ValueError(f"start has shape {start.shape}, expected ({problem.domain.size},)")
        self._check(problem, start)
        self.problem, self.x, self.k = problem, start, 0
        self.f = self.g = self.gap = math.nan
        self.memory: dict[str, float] = {}

    def _check(self, problem: Bilevel, start: Vector) -> None:
        if not (np.isfinite(start).all() and problem.domain.contains(start)):
            raise ValueError("the start lies outside of Z, expected a point of it")

    def step(self) -> bool:
        """One iteration. False, without a move, when the stopping test is met."""
        raise NotImplementedError

    def feasible(self) -> Vector:
        """The point of Z that the method offers: the iterate, or a projected one beside it."""
        return self.x

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as plain types."""
        return {"x": self.x.tolist(), "k": self.k, "memory": dict(self.memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self.x, self.k, self.memory = np.array(state["x"]), int(state["k"]), dict(state["memory"])


class ConditionalGradient(Method):
    """Conditional gradient on g: the start of CG-BiO.

    Stops when the gap grad g(x)'(x - s), an upper bound of g(x) - g*, is at most ``tolerance`` (eps_g / 2).

    Args:
        step: step sizes; None: adaptive back-tracking on a local Lipschitz constant M (released fair classification):
            M shrinks to 0.9 M and doubles until the quadratic upper bound holds.
    """

    def __init__(self, problem: Bilevel, start: Vector, tolerance: float, step: Step | None) -> None:
        super().__init__(problem, start)
        _positive(tolerance=tolerance)
        self.tolerance, self.rule = tolerance, step

    def step(self) -> bool:
        self.g, slope = self.problem.lower(self.x)
        direction = self.problem.domain.minimise(slope) - self.x
        self.gap = -float(slope @ direction)
        if self.gap <= self.tolerance:
            return False
        gamma = self._search(slope, direction) if self.rule is None else self.rule(self.k)
        self.x = self.x + gamma * direction
        self.k += 1
        return True

    def _search(self, slope: Vector, direction: Vector) -> float:
        square = float(direction @ direction)
        if "M" in self.memory:
            local = 0.9 * self.memory["M"]
        else:
            change = self.problem.lower(self.x + 1e-4 * direction)[1] - slope
            local = max(float(np.linalg.norm(change)) / (1e-4 * math.sqrt(square)), 1e-12)
        while True:
            gamma = min(self.gap / (local * square), 1.0)
            bound = self.g - gamma * self.gap + gamma**2 * local * square / 2
            if self.problem.lower_value(self.x + gamma * direction) <= bound + 1e-15 * abs(self.g) or local > 1e300:
                break
            local *= 2
        self.memory["M"] = local
        return gamma


class CGBiO(Method):
    """CG-BiO (Alg. 1) from a point x_0 with g(x_0) - g* <= eps_g / 2, e.g. the end of ``ConditionalGradient``.

    Args:
        eps_f, eps_g: accuracies of the two levels. step: step sizes.
        test: "value" stops when grad f'(x - s) <= eps_f and g(x) - g(x_0) <= eps_g / 2, "gap" puts
            grad g'(x - s) <= eps_g in the place of the second, "none" never stops.
        cut: False leaves out the half-space: conditional gradient on f alone.
    """

    def __init__(
        self,
        problem: Bilevel,
        start: Vector,
        eps_f: float,
        eps_g: float,
        step: Step,
        test: Literal["value", "gap", "none"] = "value",
        cut: bool = True,
    ) -> None:
        super().__init__(problem, start)
        _positive(eps_f=eps_f, eps_g=eps_g)
        if test not in ("value", "gap", "none"):
            raise ValueError(f"test is {test!r}, expected value, gap or none")
        self.eps_f, self.eps_g, self.rule, self.test, self.cut = eps_f, eps_g, step, test, cut
        self.memory["g0"] = problem.lower_value(self.x)

    def step(self) -> bool:
        domain = self.problem.domain
        self.f, df, self.g, dg = self.problem.both(self.x)
        excess = self.g - self.memory["g0"]
        try:
            s = domain.minimise_cut(df, dg, float(dg @ self.x) - excess) if self.cut else domain.minimise(df)
        except InfeasibleCut as error:
            raise ValueError(f"iteration {self.k}: {error}; is g convex and was x_0 in Z?") from error
        away = self.x - s
        self.gap = float(df @ away)
        below = excess <= self.eps_g / 2 if self.test == "value" else float(dg @ away) <= self.eps_g
        if self.test != "none" and self.gap <= self.eps_f and below:
            return False
        gamma = self.rule(self.k)
        self.x = (1 - gamma) * self.x + gamma * s
        self.k += 1
        return True


# ---- baselines -------------------------------------------------------------------------------------------------------


class AIRG(Method):
    """a-IRG (Kaushik, Yousefian 2021): x <- P_Z(x - gamma_k (grad g + eta_k grad f)).

    gamma_k = gamma / sqrt(k + offset), eta_k = eta / (k + offset)^(1/4), k = 0, 1, ...
    """

    def __init__(self, problem: Bilevel, start: Vector, gamma: float, eta: float, offset: int = 1) -> None:
        super().__init__(problem, start)
        _positive(gamma=gamma, eta=eta, offset=offset)
        self.gamma, self.eta, self.offset = gamma, eta, offset

    def step(self) -> bool:
        self.f, df, self.g, dg = self.problem.both(self.x)
        index = self.k + self.offset
        move = self.gamma / math.sqrt(index) * (dg + self.eta / index**0.25 * df)
        self.x = self.problem.domain.project(self.x - move)
        self.k += 1
        return True


class _BesideZ(Method):
    """A method whose iterates need not lie in Z; it offers the point that its last step projected on Z."""

    _inside: Vector

    def feasible(self) -> Vector:
        return self._inside

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"inside": self._inside.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._inside = np.array(state["inside"])


class BiGSAM(_BesideZ):
    """BiG-SAM (Sabach, Shtern 2017): x <- alpha (x - eta_f grad f) + (1 - alpha) P_Z(x - eta_g grad g).

    alpha_k = min(2 gamma / k, 1), k = 1, 2, ... The iterate need not lie in Z; ``feasible`` is the projected point.
    """

    def __init__(self, problem: Bilevel, start: Vector, eta_f: float, eta_g: float, gamma: float) -> None:
        super().__init__(problem, start)
        _positive(eta_f=eta_f, eta_g=eta_g, gamma=gamma)
        self.eta_f, self.eta_g, self.gamma, self._inside = eta_f, eta_g, gamma, self.x

    def step(self) -> bool:
        self.f, df, self.g, dg = self.problem.both(self.x)
        alpha = min(2 * self.gamma / (self.k + 1), 1.0)
        self._inside = self.problem.domain.project(self.x - self.eta_g * dg)
        self.x = alpha * (self.x - self.eta_f * df) + (1 - alpha) * self._inside
        self.k += 1
        return True


class DBGD(Method):
    """Dynamic barrier gradient descent (Gong, Liu, Liu 2021): x <- P_Z(x - step (grad f + w grad g)).

    w = max((phi - grad f'grad g) / |grad g|^2, 0), phi = min(alpha (g - g_hat), beta |grad g|^2). The released code
    has g_hat = 0.
    """

    def __init__(
        self, problem: Bilevel, start: Vector, step: float, alpha: float = 1.0, beta: float = 1.0, g_hat: float = 0.0
    ) -> None:
        super().__init__(problem, start)
        _positive(step=step, alpha=alpha, beta=beta)
        self.size, self.alpha, self.beta, self.g_hat = step, alpha, beta, g_hat

    def step(self) -> bool:
        self.f, df, self.g, dg = self.problem.both(self.x)
        square = float(dg @ dg)
        phi = min(self.alpha * (self.g - self.g_hat), self.beta * square)
        weight = max((phi - float(df @ dg)) / square, 0.0) if square > 0 else 0.0
        self.x = self.problem.domain.project(self.x - self.size * (df + weight * dg))
        self.k += 1
        return True


class MNG(_BesideZ):
    """Minimal norm gradient (Beck, Sabach 2014) for a strongly convex quadratic f = z'Hz/2 + h'z + const.

    With G = M (x - y), y = P_Z(x - grad g / M):  x <- argmin f(z) subject to G'(x - z) >= 3/(4M) |G|^2 and
    grad f(x)'(z - x) >= 0. It starts at the minimiser of f. The program with two half-spaces is solved in closed form
    in the metric of H, one product with H^-1 an iteration.

    Args:
        hessian, linear: H (n, n), positive definite with the ridge, and h (n,). lipschitz: M = L_g.
        ridge: added to H's diagonal, where H alone is singular (fewer samples than unknowns).

    Raises:
        ValueError: H is not positive definite.
    """

    def __init__(self, problem: Bilevel, hessian: Vector, linear: Vector, lipschitz: float, ridge: float = 0.0) -> None:
        _positive(lipschitz=lipschitz)
        eye = np.eye(len(hessian))
        try:
            factor = cho_factor(hessian + ridge * eye)
            least, most = np.diag(factor[0]).min(), np.diag(factor[0]).max()
        except np.linalg.LinAlgError:
            least, most = 0.0, 1.0
        if least <= 1e-7 * most:
            raise ValueError("MNG needs a strongly convex f: its Hessian is singular, give a ridge")
        self.lipschitz, self.ridge, self.inverse = lipschitz, ridge, cho_solve(factor, eye)
        self.best = -cho_solve(factor, linear)
        super().__init__(problem, self.best)
        self._inside = problem.domain.project(self.x)

    def _check(self, problem: Bilevel, start: Vector) -> None:
        """The minimiser of f may lie anywhere."""

    def step(self) -> bool:
        self.f, df, self.g, dg = self.problem.both(self.x)
        self._inside = self.problem.domain.project(self.x - dg / self.lipschitz)
        mapping = self.lipschitz * (self.x - self._inside)
        # z = best - u mu_1 + w mu_2 with u = H^-1 G, w = H^-1 grad f = x - best: both constraints in two multipliers
        u, w = self.inverse @ mapping, self.x - self.best
        df = df + self.ridge * self.x
        gram = np.array([[mapping @ u, -(mapping @ w)], [-(df @ u), df @ w]])
        need = np.array(
            [
                0.75 / self.lipschitz * (mapping @ mapping)
                - mapping @ w,  # G'(x - z) - this >= 0 at mu = 0: -need >= 0
                df @ w,
            ]
        )
        mu = _two_multipliers(gram, need)
        self.x = self.best - u * mu[0] + w * mu[1]
        self.k += 1
        return True


def _two_multipliers(gram: Vector, need: Vector) -> Vector:
    """mu >= 0 (2,) with gram mu >= need and equality where mu > 0; gram (2, 2) is positive semi-definite."""
    scale = np.abs(need).max() + 1e-300
    if (need <= 0).all():
        return np.zeros(2)
    for i, j in ((0, 1), (1, 0)):
        if need[i] > 0 and gram[i, i] > 0:
            mu = need[i] / gram[i, i]
            if gram[j, i] * mu >= need[j] - 1e-12 * scale:
                return np.array([mu, 0.0] if i == 0 else [0.0, mu])
    return np.maximum(np.linalg.lstsq(gram, need, rcond=None)[0], 0)
