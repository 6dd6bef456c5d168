"""Protocols of the experiments: candidate pairs of both set-ups, and precision and recall by frame and by candidate.

Needs no descriptor: scores come in, numbers go out. Sections: RA-L 7(3) 2022 (arXiv 2111.00440); candidates and the
frame-wise counting follow OverlapNet and the released scripts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---- precision and recall -----------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Precision and recall at each distinct score, falling; ``threshold`` are the scores."""

    precision: Tensor
    recall: Tensor
    threshold: Tensor

    def f1_max(self) -> float:
        """Largest harmonic mean of precision and recall."""
        return float((2 * self.precision * self.recall / (self.precision + self.recall).clamp_min(1e-12)).max())

    def area(self) -> float:
        """Area under precision over recall by the trapezoid rule, from recall 0 at the first precision."""
        recall = F.pad(self.recall, (1, 0))
        precision = torch.cat([self.precision[:1], self.precision])
        return float(torch.trapezoid(precision, recall))

    def recall_at_full_precision(self) -> float:
        """Largest recall at precision 1, 0 where there is none."""
        return float(torch.where(self.precision == 1, self.recall, 0.0).max())


def precision_recall(scores: Tensor, hits: Tensor, positives: int | None = None) -> Curve:
    """Precision and recall when everything at or above a score is called a loop.

    Args:
        scores: (n,). hits: (n,) bool, whether calling it a loop is right. positives: number to be found (default: the
            hits). Items of equal score are accepted together.

    Raises:
        ValueError: nothing to be found.
    """
    found = int(hits.sum()) if positives is None else positives
    if not len(scores) or found < 1:
        raise ValueError(f"{len(scores)} scores and {found} loops to be found: no curve")
    order = scores.argsort(descending=True, stable=True)
    ranked, true = scores[order], hits[order].to(torch.float64).cumsum(0)
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])
    rank = torch.arange(1, len(scores) + 1)
    return Curve((true / rank)[last], (true / found)[last], ranked[last])


class Frames(NamedTuple):
    """Per query frame with candidates: its best ``score`` (f,), whether the frame is a loop at all (``frame_hit``), and
    whether the chosen candidate is one (``candidate_hit``)."""

    score: Tensor
    frame_hit: Tensor
    candidate_hit: Tensor

    def curves(self) -> tuple[Curve, Curve]:
        """The released protocol's curve (a hit when the frame is a loop), and the one that asks for the candidate."""
        positives = int(self.frame_hit.sum())
        by_frame = precision_recall(self.score, self.frame_hit, positives)
        return by_frame, precision_recall(self.score, self.candidate_hit, positives)


def best_candidates(frame: Tensor, score: Tensor, truth: Tensor, threshold: float = 0.3) -> Frames:
    """Decide each query frame by its candidate of the highest score (sec. IV; frames without candidates do not occur).

    Args:
        frame: (n,) query frame of each candidate pair. score, truth: (n,) score and true overlap of the pair.
            threshold: true overlap above which a pair is a loop.
    """
    _, group = frame.unique(return_inverse=True)
    order = torch.from_numpy(np.lexsort((-score.numpy(), group.numpy())))
    first = F.pad(torch.bincount(group).cumsum(0), (1, 0))[:-1]
    chosen = order[first]
    best = torch.full((len(first),), -math.inf, dtype=truth.dtype).scatter_reduce_(0, group, truth, "amax")
    return Frames(score[chosen], best > threshold, truth[chosen] > threshold)


# ---- candidates -------------------------------------------------------------------------------------------------


def travelled(positions: Tensor) -> Tensor:
    """Distance (n,) along a trajectory of positions (n, 2 or 3)."""
    return F.pad((positions[1:] - positions[:-1]).norm(dim=1).cumsum(0), (1, 0))


def drift_covariance(positions: Tensor, share: float, degrees: float) -> Tensor:
    """Covariance (n, 2, 2) of planar positions from odometry whose errors grow with the distance, to first order.

    Args:
        positions: (n, 2 or more) along the trajectory. share: standard deviation of a step, metres a metre.
            degrees: of its rotation, degrees a metre; an early one moves all that follows.
    """
    xy = positions[:, :2].to(torch.float64)
    step = (xy[1:] - xy[:-1]).norm(dim=1).square()
    lever = xy.unsqueeze(1) - xy[1:]
    turned = torch.stack([-lever[..., 1], lever[..., 0]], -1)
    before = torch.arange(len(xy)).unsqueeze(1) > torch.arange(len(step))
    straight = torch.eye(2, dtype=torch.float64) * share**2
    turning = math.radians(degrees) ** 2 * turned.unsqueeze(3) * turned.unsqueeze(2)
    return ((straight + turning) * (step * before)[..., None, None]).sum(1)


def loop_candidates(
    positions: Tensor, covariance: Tensor, gap: int = 100, distance: float = 50.0, sigmas: float = 3.0
) -> Tensor:
    """Candidate pairs of the loop-closure set-up: the inactive map inside the ellipse of the pose's uncertainty.

    Args:
        positions: (n, 2 or more) estimated positions, the first two are used. covariance: (n, 2, 2) of each position.
            gap: least number of frames between. distance: least distance travelled between, metres. sigmas: size of
            the ellipse.

    Returns:
        (m, 2) pairs (reference, current), by current frame.
    """
    xy = positions[:, :2].to(torch.float64)
    along = travelled(xy)
    index = torch.arange(len(xy))
    apart = xy.unsqueeze(1) - xy.unsqueeze(0)
    # A covariance of zero (the first frames) has no ellipse; the ridge keeps its inverse.
    precision = torch.linalg.inv(covariance.to(torch.float64) + 1e-12 * torch.eye(2, dtype=torch.float64))
    square = torch.einsum("cri,cij,crj->cr", apart, precision, apart)
    old = index.unsqueeze(1) - index >= gap
    far = along.unsqueeze(1) - along > distance
    return (old & far & (square < sigmas**2)).nonzero().flip(1)


def relocalisation_candidates(frames: int, every: int = 20, gap: int = 100) -> Tensor:
    """Candidate pairs (reference, current) without any pose: each ``every``-th frame at least ``gap`` frames back."""
    index = torch.arange(frames)
    return ((index.unsqueeze(1) - index >= gap) & (index % every == 0)).nonzero().flip(1)


def every_nth(pairs: Tensor, step: int) -> Tensor:
    """Of each current frame's candidates the first, the ``step``-th after it, and so on: bool mask (m,)."""
    current = pairs[:, 1]
    _, count = current.unique_consecutive(return_counts=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return (torch.arange(len(pairs)) - first) % step == 0
