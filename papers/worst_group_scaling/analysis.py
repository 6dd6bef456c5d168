"""Trends of an accuracy over model sizes, with bootstrap intervals over seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class Trend:
    """Statistics of the mean curve, each with the ends of its 95 per cent bootstrap interval.

    Attributes:
        difference: largest minus smallest size. slope: per doubling of the parameters.
        spearman: rank correlation of size and accuracy, 0 for a constant curve.
    """

    difference: float
    slope: float
    spearman: float
    difference_interval: tuple[float, float]
    slope_interval: tuple[float, float]
    spearman_interval: tuple[float, float]


def spearman(curves: np.ndarray) -> np.ndarray:
    """Rank correlation of each curve with its positions, (..., sizes) -> (...); 0 where a curve is constant."""
    ranks = rankdata(curves, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    position = np.arange(ranks.shape[-1]) - (ranks.shape[-1] - 1) / 2
    norm = np.sqrt((ranks**2).sum(-1) * (position @ position))
    return ranks @ position / np.where(norm > 0, norm, 1)


def trend(parameters: list[int], values: np.ndarray, draws: int = 1000, seed: int = 0) -> Trend:
    """Trend of ``values`` over ``parameters``.

    Args:
        parameters: of each size, rising. values: (seeds, sizes). draws: bootstrap samples of the seeds.

    Raises:
        ValueError: fewer than two sizes or two seeds: there is no trend or no interval then.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(parameters):
        raise ValueError(f"values of shape {values.shape}, expected (seeds, {len(parameters)})")
    if len(parameters) < 2 or len(values) < 2:
        raise ValueError(f"{len(parameters)} sizes and {len(values)} seeds: a trend needs at least 2 of each")
    x = np.log2(np.asarray(parameters, dtype=np.float64))
    x = x - x.mean()

    def statistics(curves: np.ndarray) -> np.ndarray:
        slope = curves @ x / (x @ x)
        return np.stack([curves[:, -1] - curves[:, 0], slope, spearman(curves)])

    picked = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    center = statistics(values.mean(0)[None])[:, 0]
    low, high = np.percentile(statistics(values[picked].mean(1)), [2.5, 97.5], axis=1)
    ends = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Trend(float(center[0]), float(center[1]), float(center[2]), *ends)


def informed(average: np.ndarray, least: float) -> np.ndarray:
    """Which sizes have learned the task at all: (sizes,) bool from (seeds, sizes) average accuracies.

    A network that has learned nothing is near chance in every group, and so looks good in its worst one.
    """
    return np.asarray(average).mean(0) >= least
