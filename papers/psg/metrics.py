"""Recall and mean recall of scene graphs, R@K and mR@K, by the masks of both ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def bits(masks: Tensor) -> np.ndarray:
    """Boolean masks (M, H, W) as words of 64 pixels (M, W'), the last one filled up with zeros."""
    rows = np.packbits(masks.flatten(1).numpy(), axis=1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))).view(np.uint64)


def pair_iou(a: Tensor, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """IoU of chosen pairs of masks, counted 64 pixels at a time.

    Args:
        a, b: (M, H, W) and (N, H, W) bool. row, column: of one shape, indices into ``a`` and ``b``.

    Returns:
        Of the shape of ``row``, float64; 0 for two empty masks.
    """
    x, y = bits(a), bits(b)
    area = [np.bitwise_count(part).sum(1, dtype=np.int64) for part in (x, y)]
    i, j = row.flatten().numpy(), column.flatten().numpy()
    inner = np.bitwise_count(x[i] & y[j]).sum(1, dtype=np.int64)
    union = area[0][i] + area[1][j] - inner
    return torch.from_numpy(inner / np.maximum(union, 1)).view(row.shape)


@dataclass
class Truth:
    """What an image shows.

    Attributes:
        labels: (N,) classes. masks: (N, H, W) bool. relations: (R, 3) subject, object, predicate 1 .. P.
    """

    labels: Tensor
    masks: Tensor
    relations: Tensor


def first_hits(found: Any, truth: Truth, overlap: float = 0.5, phrase: bool = False) -> Tensor:
    """The rank (from 0) of the first prediction that hits each relation, a large number where there is none.

    A prediction hits when the three labels are equal and both masks have an IoU of at least ``overlap`` with the true
    ones. ``phrase``: the unions of both masks are compared instead. One prediction may hit several relations.
    ``found`` is a ``model.Triplets``, or anything with its attributes.

    Returns:
        (R,) int64.
    """
    never = torch.iinfo(torch.int64).max
    relations = truth.relations
    if not len(found.score) or not len(relations):
        return torch.full((len(relations),), never)
    sub, obj, predicate = relations.unbind(1)
    hit = found.predicate[:, None] == predicate
    hit &= (found.subject[:, None] == truth.labels[sub]) & (found.object[:, None] == truth.labels[obj])
    which, edge = hit.nonzero(as_tuple=True)  # masks are compared only where the labels are equal
    if not len(which):
        return torch.full((len(relations),), never)
    mine, theirs = found.pairs[which], relations[edge, :2]
    if phrase:
        (a, b), (c, d) = mine.unbind(1), theirs.unbind(1)
        every = torch.arange(len(which))
        near = pair_iou(found.masks[a] | found.masks[b], truth.masks[c] | truth.masks[d], every, every) >= overlap
    else:
        used, row = mine.unique(return_inverse=True)
        known, column = theirs.unique(return_inverse=True)
        near = pair_iou(found.masks[used], truth.masks[known], row, column).ge(overlap).all(1)
    hit[which, edge] = near
    return torch.where(hit.any(0), hit.int().argmax(0), never)


class Recall:
    """R@K and mR@K over images.

    Args:
        predicates: P. ks: the K. skip_empty: leave images without a prediction out of the mean, as the released code
        does, which inflates it; otherwise they count 0. phrase: of phrases.

    Raises:
        ValueError: a K below 1.
    """

    def __init__(
        self,
        predicates: int = 56,
        ks: Sequence[int] = (20, 50, 100),
        skip_empty: bool = False,
        phrase: bool = False,
    ) -> None:
        if not ks or min(ks) < 1:
            raise ValueError(f"K is {tuple(ks)}, expected positive numbers")
        self.predicates, self.ks, self.skip_empty, self.phrase = predicates, tuple(ks), skip_empty, phrase
        self._rows: list[Tensor] = []
        self._by_predicate: list[tuple[Tensor, Tensor]] = []

    def add(self, found: Any, truth: Truth) -> None:
        """Count one image; relations that occur twice count once, an image without any is left out."""
        relations = truth.relations.unique(dim=0) if len(truth.relations) else truth.relations
        if not len(relations) or (self.skip_empty and not len(found.score)):
            return
        ranks = first_hits(found, Truth(truth.labels, truth.masks, relations), phrase=self.phrase)
        hits = (ranks[:, None] < torch.tensor(self.ks)).double()  # (R, K)
        self._rows.append(hits.mean(0))
        predicate = relations[:, 2] - 1
        many = torch.zeros(self.predicates, dtype=torch.float64).index_add_(
            0, predicate, torch.ones(len(predicate), dtype=torch.float64)
        )
        total = torch.zeros(self.predicates, len(self.ks), dtype=torch.float64).index_add_(0, predicate, hits)
        self._by_predicate.append((total / many.clamp(min=1)[:, None], many > 0))

    def result(self) -> dict[str, float]:
        """``R@K``, ``mR@K`` (mean over all P predicates, absent ones count 0) and ``present`` predicates.

        Raises:
            ValueError: no image with a relation was added.
        """
        if not self._rows:
            raise ValueError("no image with a relation was counted")
        recall = torch.stack(self._rows).mean(0)
        parts, there = (torch.stack(column) for column in zip(*self._by_predicate))
        images = there.sum(0).clamp(min=1)[:, None]
        mean = (parts.sum(0) / images).sum(0) / self.predicates
        out = {}
        for i, k in enumerate(self.ks):
            out[f"R@{k}"], out[f"mR@{k}"] = float(recall[i]), float(mean[i])
        out["present"] = float(there.any(0).sum())
        return out
