"""nuScenes detection score: average precision by centre distance, true-positive errors and NDS.

The protocol is that of nuscenes-devkit (configuration detection_cvpr_2019); its numbers are the same. Boxes may be in
any frame whose z axis points up, all of a sample in the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DISTANCES = (0.5, 1.0, 2.0, 4.0)
"""Metres between centres, on the ground, below which a detection matches."""
ERROR_DISTANCE, MINIMUM = 2.0, 0.1
"""Distance at which true-positive errors are taken; least recall and precision that count."""
MAP_WEIGHT = 5
ERRORS = ("ATE", "ASE", "AOE", "AVE", "AAE")
"""Translation, scale, orientation, velocity and attribute error."""
UNDEFINED = {"traffic_cone": ("AOE", "AVE", "AAE"), "barrier": ("AVE", "AAE")}
"""Errors that make no sense for a class."""
RANGES = {
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0),
    **dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0),
    **dict.fromkeys(("traffic_cone", "barrier"), 30.0),
}
"""Metres from the vehicle up to which a class counts."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one sample.

    Attributes:
        boxes: (n, 9) x, y, z, d0, d1, d2, yaw, vx, vy. labels: (n,). scores: (n,), of detections.
        attributes: (n,) integers, -1 where the truth has none; ``None``: nothing is known.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    attributes: np.ndarray | None = None

    def chosen(self, keep: np.ndarray) -> Boxes:
        """A part of the boxes, by a mask or positions."""
        parts = (None if part is None else part[keep] for part in (self.scores, self.attributes))
        return Boxes(self.boxes[keep], self.labels[keep], *parts)


def within_range(boxes: Boxes, classes: Sequence[str], vehicle: np.ndarray) -> Boxes:
    """The boxes that are nearer to the ``vehicle`` (2,) than their class's range."""
    limit = np.array([RANGES[name] for name in classes])[boxes.labels]
    return boxes.chosen(np.linalg.norm(boxes.boxes[:, :2] - vehicle, axis=1) < limit)


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    out = np.full((len(rows), max((len(row) for row in rows), default=0), width), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def match_by_distance(truth: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> np.ndarray:
    """Give each detection, best first, the nearest truth that is still free, for every threshold.

    All samples advance together: the first round matches each sample's best detection, the second its second.

    Args:
        truth, found: for each sample centres (n, 2); those of detections by falling score.

    Returns:
        (4, samples, most detections) position of the matched truth, -1 for none.
    """
    centres, candidates = _padded(truth, 2), _padded(found, 2)
    samples, most = candidates.shape[:2]
    free = np.repeat(~np.isnan(centres[None, :, :, 0]), len(DISTANCES), axis=0)
    matched = np.full((len(DISTANCES), samples, most), -1)
    if centres.shape[1] == 0:
        return matched
    threshold = np.array(DISTANCES)[:, None]
    row, column = np.meshgrid(np.arange(len(DISTANCES)), np.arange(samples), indexing="ij")
    for rank in range(most):
        distance = np.linalg.norm(candidates[:, rank, None] - centres, axis=2)
        open_ = np.where(free & ~np.isnan(distance), distance, np.inf)
        nearest = open_.argmin(2)
        hit = np.take_along_axis(open_, nearest[..., None], 2)[..., 0] < threshold
        free[row[hit], column[hit], nearest[hit]] = False
        matched[:, :, rank] = np.where(hit, nearest, -1)
    return matched


def _errors(truth: Boxes, found: Boxes, period: float) -> np.ndarray:
    """The five errors of matched boxes: (5, n)."""
    a, b = truth.boxes, found.boxes
    smaller = np.minimum(a[:, 3:6], b[:, 3:6]).prod(1)
    iou = smaller / (a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - smaller)
    turn = (a[:, 6] - b[:, 6] + period / 2) % period - period / 2
    attribute = np.full(len(a), np.nan)
    if truth.attributes is not None and found.attributes is not None:
        attribute = np.where(truth.attributes < 0, np.nan, (truth.attributes != found.attributes).astype(float))
    velocity = np.linalg.norm(a[:, 7:9] - b[:, 7:9], axis=1)
    return np.stack([np.linalg.norm(a[:, :2] - b[:, :2], axis=1), 1 - iou, np.abs(turn), velocity, attribute])


def _running_mean(x: np.ndarray) -> np.ndarray:
    """Mean of the known values so far; ones when none is known."""
    known = ~np.isnan(x)
    if not known.any():
        return np.ones(len(x))
    return np.nancumsum(x) / np.maximum(known.cumsum(), 1)


def _together(parts: Sequence[Boxes]) -> Boxes:
    def cat(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    return Boxes(cat("boxes"), cat("labels"), cat("scores"), cat("attributes"))


def score_class(
    truth: Sequence[Boxes], found: Sequence[Boxes], period: float = 2 * np.pi
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and errors of one class.

    Args:
        truth, found: the class's boxes of each sample. period: of the yaw.

    Returns:
        (4,) average precision by distance, and (5,) errors, 1 where nothing was matched.
    """
    precision, errors = np.zeros(len(DISTANCES)), np.ones(len(ERRORS))
    positives = sum(len(part.boxes) for part in truth)
    detections = sum(len(part.boxes) for part in found)
    if positives == 0 or detections == 0:
        return precision, errors
    every = _together(found)
    sample = np.repeat(np.arange(len(found)), [len(part.boxes) for part in found])
    order = np.lexsort((np.arange(detections), every.scores))[::-1]
    every, sample = every.chosen(order), sample[order]
    inside = np.argsort(sample, kind="stable")
    first = np.searchsorted(sample[inside], np.arange(len(found)))
    rank = np.empty(detections, dtype=int)
    rank[inside] = np.arange(detections) - first[sample[inside]]
    ordered = [every.boxes[sample == i, :2] for i in range(len(found))]
    matched = match_by_distance([part.boxes[:, :2] for part in truth], ordered)[:, sample, rank]

    start = np.cumsum([0, *(len(part.boxes) for part in truth)])
    all_truth = _together(truth)
    levels = np.linspace(0, 1, 101)
    skip = round(100 * MINIMUM) + 1
    for i, distance in enumerate(DISTANCES):
        hit = matched[i] >= 0
        if not hit.any():
            continue
        right = hit.cumsum()
        recall, raw = right / positives, right / np.arange(1, detections + 1)
        curve = np.interp(levels, recall, raw, right=0)
        precision[i] = np.maximum(curve[skip:] - MINIMUM, 0).mean() / (1 - MINIMUM)
        if distance != ERROR_DISTANCE:
            continue
        confidence = np.interp(levels, recall, every.scores, right=0)
        last = int(np.flatnonzero(confidence).max(initial=0))
        if last < skip:
            continue
        pairs = _errors(all_truth.chosen(start[sample[hit]] + matched[i][hit]), every.chosen(hit), period)
        for j, row in enumerate(pairs):
            mean = np.interp(confidence[::-1], every.scores[hit][::-1], _running_mean(row)[::-1])[::-1]
            errors[j] = mean[skip : last + 1].mean()
    return precision, errors


def evaluate(truth: Sequence[Boxes], found: Sequence[Boxes], classes: Sequence[str]) -> dict[str, float]:
    """The score of detections.

    Returns:
        ``mAP``, ``NDS``, the mean errors ``mATE`` ... ``mAAE``, and ``AP/<class>``.

    Raises:
        ValueError: another number of samples.
    """
    if len(truth) != len(found):
        raise ValueError(f"{len(found)} samples with detections, expected {len(truth)}")
    precisions, errors = [], []
    for label, name in enumerate(classes):
        period = np.pi if name == "barrier" else 2 * np.pi
        parts = ([part.chosen(part.labels == label) for part in side] for side in (truth, found))
        precision, error = score_class(*parts, period)
        error[[ERRORS.index(what) for what in UNDEFINED.get(name, ())]] = np.nan
        precisions.append(precision.mean())
        errors.append(error)
    mean_errors = np.array([column[~np.isnan(column)].mean() for column in np.stack(errors, 1)])
    mean = float(np.mean(precisions))
    nds = (MAP_WEIGHT * mean + np.maximum(1 - mean_errors, 0).sum()) / (MAP_WEIGHT + len(ERRORS))
    out = {"mAP": mean, "NDS": float(nds)} | {f"m{what}": float(e) for what, e in zip(ERRORS, mean_errors)}
    return out | {f"AP/{name}": float(value) for name, value in zip(classes, precisions)}


def without_classes(side: Sequence[Boxes]) -> list[Boxes]:
    """All boxes as one class, for class-agnostic precision.

    A query gives its box once for every class; only the first, which is the best of detections, counts here.
    """
    out = []
    for part in side:
        part = part.chosen(np.sort(np.unique(part.boxes, axis=0, return_index=True)[1]))
        out.append(Boxes(part.boxes, np.zeros_like(part.labels), part.scores, part.attributes))
    return out


def recall(truth: Sequence[Boxes], found: Sequence[Boxes], least: float = 0.0) -> float:
    """Share of true boxes that a detection of their class with a score of at least ``least`` matches at 2 m."""
    at, hits, total = DISTANCES.index(ERROR_DISTANCE), 0, 0
    for real, guess in zip(truth, found, strict=True):
        sure = guess.chosen(np.argsort(-guess.scores, kind="stable"))
        sure = sure.chosen(sure.scores >= least)
        for label in np.unique(real.labels):
            boxes = [side.boxes[side.labels == label, :2] for side in (real, sure)]
            hits += int((match_by_distance(boxes[:1], boxes[1:])[at] >= 0).sum())
        total += len(real.boxes)
    return hits / max(total, 1)
