"""Average precision of masks and boxes as COCO counts it: mean over IoU .50:.05:.95, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Found(NamedTuple):
    """Detections of one image: scores (n,), labels (n,), masks (n, H, W) bool."""

    scores: Tensor
    labels: Tensor
    masks: Tensor


def boxes_of(masks: Tensor) -> Tensor:
    """(n, H, W) bool -> (n, 4) x, y, width, height of the pixels' hull; zeros for an empty mask."""
    n, h, w = masks.shape
    if n == 0:
        return torch.zeros(0, 4)
    columns, rows = masks.any(1), masks.any(2)
    left, top = columns.int().argmax(1), rows.int().argmax(1)
    right, bottom = w - columns.flip(1).int().argmax(1), h - rows.flip(1).int().argmax(1)
    boxes = torch.stack([left, top, right - left, bottom - top], 1).float()
    return boxes * masks.flatten(1).any(1, keepdim=True)


def _rows(image: int, masks: Tensor, labels: Tensor, first: int, scores: Tensor | None = None) -> list[dict[str, Any]]:
    from faster_coco_eval.core import mask as rle

    runs = rle.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))) if len(masks) else []
    boxes = boxes_of(masks).tolist()
    out = []
    for i, (run, label, box) in enumerate(zip(runs, labels.tolist(), boxes)):
        area = float(masks[i].sum())
        row = {"id": first + i, "image_id": image, "category_id": label + 1, "segmentation": run, "bbox": box}
        row |= {"area": area, "iscrowd": 0} if scores is None else {"score": float(scores[i]), "area": area}
        if scores is None or area:
            out.append(row)
    return out


def tables(
    truth: Sequence[tuple[Tensor, Tensor]], found: Sequence[Found], classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO's two tables: the ground truth as a json would hold it, and the detections.

    Args:
        truth: (masks (n, H, W), labels (n,)) of each image. found: detections of each image. classes: how many.
    """
    images = [{"id": i + 1, "height": m.shape[1], "width": m.shape[2]} for i, (m, _) in enumerate(truth)]
    annotations: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    for i, ((masks, labels), rows) in enumerate(zip(truth, found, strict=True)):
        annotations += _rows(i + 1, masks, labels, len(annotations) + 1)
        guesses += _rows(i + 1, rows.masks, rows.labels, len(guesses) + 1, rows.scores)
    categories = [{"id": i + 1, "name": str(i)} for i in range(classes)]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {}}, guesses


def average_precision(
    truth: Sequence[tuple[Tensor, Tensor]],
    found: Sequence[Found],
    classes: int,
    groups: dict[str, Sequence[int]],
    kinds: Sequence[str] = ("segm", "bbox"),
) -> dict[str, float]:
    """AP of groups of classes (indices), e.g. {"nAP": novel, "bAP": base} -> {"segm_nAP": ..., "bbox_nAP": ...}.

    A group without a ground-truth object is left out, as is AP where nothing was detected: that is 0.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    table, guesses = tables(truth, found, classes)
    present = {row["category_id"] - 1 for row in table["annotations"]}
    out: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(table)
        detected = ground.loadRes(guesses) if guesses else None
        for kind in kinds:
            precision = None
            if detected is not None:
                judge = COCOeval_faster(ground, detected, kind)
                judge.evaluate()
                judge.accumulate()
                precision = judge.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, 100 detections
            for name, labels in groups.items():
                if present & set(labels):
                    rows = np.zeros(1) if precision is None else precision[:, :, list(labels)]
                    out[f"{kind}_{name}"] = float(rows[rows > -1].mean())  # -1: a class without ground truth
    return out
