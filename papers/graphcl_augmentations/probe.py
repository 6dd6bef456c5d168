"""The linear probe of graph benchmarks: LinearSVC's objective, solved to its minimum."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from sklearn.base import BaseEstimator, ClassifierMixin

Array = np.ndarray[Any, np.dtype[Any]]


def squared_hinge(x: Array, sign: Array, penalty: float, steps: int = 200) -> Array:
    """Weights w that minimise w'w / 2 + C sum_i max(0, 1 - s_i w'x_i)^2.

    The sum is quadratic as long as the set of margins below 1 stays the same, so Newton's method ends after a handful
    of steps at the exact minimum. liblinear needs hundreds where x is ill-conditioned, and may stop before.

    Args:
        x: (n, d) inputs.
        sign: (n,) labels, -1 or 1.
        penalty: C > 0.
        steps: at most so many Newton steps.

    Returns:
        (d,) weights.
    """
    x = x * sign[:, None]
    w, margin = np.zeros(x.shape[1]), np.zeros(len(x))
    value = penalty * len(x)
    for _ in range(steps):
        active = margin < 1
        rows = x[active]
        gradient = w - 2 * penalty * (rows.T @ (1 - margin[active]))
        curvature = 2 * penalty * (rows.T @ rows)
        curvature[np.diag_indices_from(curvature)] += 1
        step = -cho_solve(cho_factor(curvature), gradient)
        slope, ahead = gradient @ step, x @ step
        if slope > -1e-12 * max(value, 1):
            break
        length = 1.0
        while True:  # a whole step overshoots where many margins cross 1
            new = w + length * step
            reached = margin + length * ahead
            lower = new @ new / 2 + penalty * (np.maximum(1 - reached, 0) ** 2).sum()
            if lower <= value + 1e-4 * length * slope or length < 1e-8:
                break
            length /= 2
        w, margin, value = new, reached, lower
        if length == 1 and np.array_equal(margin < 1, active):
            break
    return w


class LinearSVM(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn's ``LinearSVC`` to its minimum: squared hinge, l2 (the intercept too), one against the rest."""

    def __init__(self, C: float = 1.0) -> None:
        self.C = C

    def fit(self, x: Array, y: Array) -> Self:
        """Train on inputs (n, d) and labels (n,)."""
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise ValueError("the labels have one class, expected two or more")
        x = np.hstack([x, np.ones((len(x), 1))])
        positive = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        self.weights_ = np.stack([squared_hinge(x, np.where(y == c, 1.0, -1.0), self.C) for c in positive])
        return self

    def decision_function(self, x: Array) -> Array:
        """Signed margins: (n,) with two classes, (n, classes) with more."""
        score = x @ self.weights_[:, :-1].T + self.weights_[:, -1]
        return score[:, 0] if len(self.classes_) == 2 else score

    def predict(self, x: Array) -> Array:
        """Classes of inputs (n, d)."""
        score = self.decision_function(x)
        chosen: Array = self.classes_[(score > 0).astype(int) if score.ndim == 1 else score.argmax(1)]
        return chosen
