"""How well scores tell ID from OOD samples: AUROC, AUPR, FPR95, F1, OSCR and CCR.

OOD is the positive class and a higher score means more ID, everywhere. Equal scores count as scikit-learn counts them:
they pass a threshold together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def _checked(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside, outside = (np.asarray(values, dtype=np.float64).ravel() for values in (inside, outside))
    if not len(inside) or not len(outside):
        raise ValueError(f"AUROC needs both: {len(inside)} ID and {len(outside)} OOD samples")
    if np.isnan(inside).any() or np.isnan(outside).any():
        raise ValueError("a score is not a number")
    return inside, outside


@dataclass(frozen=True)
class Curve:
    """Counts at every distinct threshold t, from the lowest score upwards.

    Attributes:
        caught: OOD samples with a score <= t. flagged: ID samples with a score <= t. thresholds: the t.
    """

    thresholds: np.ndarray
    caught: np.ndarray
    flagged: np.ndarray

    @staticmethod
    def of(inside: np.ndarray, outside: np.ndarray) -> Curve:
        """One sort serves all metrics.

        Raises:
            ValueError: no ID or no OOD samples, or a score that is not a number.
        """
        inside, outside = _checked(inside, outside)
        scores = np.concatenate([inside, outside])
        order = np.argsort(scores, kind="stable")
        scores = scores[order]
        last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
        caught = np.cumsum(order >= len(inside))[last]
        return Curve(scores[last], caught, last + 1 - caught)

    def auroc(self) -> float:
        """Share of (ID, OOD) pairs in which the ID sample scores higher, equal ones count half."""
        tpr = np.concatenate([[0], self.caught / self.caught[-1]])
        fpr = np.concatenate([[0], self.flagged / self.flagged[-1]])
        return float(np.trapezoid(tpr, fpr))

    def fpr(self, recall: float = 0.95) -> float:
        """Share of ID samples that are flagged when at least ``recall`` of the OOD samples are caught."""
        first = int(np.argmax(self.caught / self.caught[-1] >= recall))
        return float(self.flagged[first] / self.flagged[-1])

    def aupr_out(self) -> float:
        """Area under precision against recall by trapezoids, OOD positive."""
        return _area(self.caught, self.flagged)

    def aupr_in(self) -> float:
        """The same with ID positive: thresholds are passed from the highest score downwards."""
        inside = self.flagged[-1] - np.concatenate([[0], self.flagged[:-1]])
        outside = self.caught[-1] - np.concatenate([[0], self.caught[:-1]])
        return _area(inside[::-1], outside[::-1])


def _area(right: np.ndarray, wrong: np.ndarray) -> float:
    recall = np.concatenate([[0], right / right[-1]])
    precision = np.concatenate([[1], right / (right + wrong)])
    return float(np.trapezoid(precision, recall))


def detection(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """AUROC, AUPR with ID and with OOD positive, and FPR95 of two sets of scores."""
    curve = Curve.of(inside, outside)
    return {
        "auroc": curve.auroc(), "aupr_in": curve.aupr_in(), "aupr_out": curve.aupr_out(), "fpr95": curve.fpr(),
    }  # fmt: skip


def f1(inside: np.ndarray, outside: np.ndarray, threshold: float) -> float:
    """F1 of "score < threshold means OOD"."""
    inside, outside = _checked(inside, outside)
    right, wrong = float((outside < threshold).sum()), float((inside < threshold).sum())
    return 2 * right / (right + wrong + len(outside))


def ccr(inside: np.ndarray, outside: np.ndarray, correct: np.ndarray, fpr: float) -> float:
    """Share of ID samples that are correctly classified and score above the ceil(fpr n)-th largest OOD score.

    At ``fpr`` 1 that is the lowest OOD score.
    """
    inside, outside = _checked(inside, outside)
    if not 0 < fpr <= 1:
        raise ValueError(f"fpr is {fpr}, expected more than 0 and at most 1")
    place = math.ceil(fpr * len(outside)) - 1
    threshold = -np.partition(-outside, place)[place]
    return float(((inside > threshold) & np.asarray(correct)).mean())


def oscr(inside: np.ndarray, outside: np.ndarray, correct: np.ndarray) -> float:
    """Area under the correct classification rate against the share of accepted OOD samples (Dhamija et al. 2018)."""
    inside, outside = _checked(inside, outside)
    right = np.sort(inside[np.asarray(correct, dtype=bool)])
    threshold = np.unique(np.concatenate([inside, outside]))[::-1]  # accepted: score >= threshold
    accepted = (len(outside) - np.searchsorted(np.sort(outside), threshold, side="left")) / len(outside)
    rate = (len(right) - np.searchsorted(right, threshold, side="left")) / len(inside)
    return float(np.trapezoid(np.concatenate([[0], rate]), np.concatenate([[0], accepted])))
