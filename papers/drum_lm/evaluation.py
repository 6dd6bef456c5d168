"""The paper's structural evaluation of grooves, and what goes beside it: duplication, form, fills and use of the kit.

Measures are compared as text, as the authors' scripts do: a measure is its lines, with their newlines, joined by
newlines.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

MEASURE = 16
VALID = frozenset(map("".join, itertools.product("-o", repeat=6)))
"""The 64 lines."""


def measures_of(text: str, most: int = 16) -> list[list[str]]:
    """Lines of each measure, with their newlines; the last one may be short."""
    lines = text.splitlines(keepends=True)
    return [lines[i : i + MEASURE] for i in range(0, len(lines), MEASURE)][:most]


def levenshtein(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """(N,) edit distances: one sweep over characters for all pairs together.

    With t[j] = min(d[i-1, j] + 1, d[i-1, j-1] + (a_i != b_j)), the row is d[i, j] = min over k <= j of t[k] + (j - k).
    """
    if not pairs:
        return np.zeros(0, dtype=np.int64)
    first, second = ([np.frombuffer(s.encode("utf-32-le"), dtype=np.uint32) for s in side] for side in zip(*pairs))
    lengths = np.array([[len(a), len(b)] for a, b in zip(first, second)])
    high, wide = lengths.max(0)
    a, b = (np.full((len(pairs), size), fill, np.int64) for size, fill in ((high, -1), (wide, -2)))
    for row, (x, y) in enumerate(zip(first, second)):
        a[row, : len(x)], b[row, : len(y)] = x, y
    steps = np.arange(wide + 1)
    row = np.tile(steps, (len(pairs), 1))
    out = np.where(lengths[:, 0] == 0, lengths[:, 1], 0)
    for i in range(high):
        best = np.concatenate([row[:, :1] + 1, np.minimum(row[:, 1:] + 1, row[:, :-1] + (a[:, i : i + 1] != b))], 1)
        row = np.minimum.accumulate(best - steps, 1) + steps
        ends = lengths[:, 0] == i + 1
        out[ends] = row[ends, lengths[ends, 1]]
    return out


def stabilities(texts: Sequence[str]) -> list[np.ndarray]:
    """For each piece, of its inner measures, the distance to the nearer neighbour ("stability" in the paper)."""
    joined = [["\n".join(measure) for measure in measures_of(text)] for text in texts]
    pairs = [(a, b) for piece in joined for a, b in itertools.pairwise(piece)]
    distance = levenshtein(pairs)
    out, at = [], 0
    for piece in joined:
        count = max(0, len(piece) - 1)
        own = distance[at : at + count]
        at += count
        out.append(np.minimum(own[:-1], own[1:]))
    return out


def two_means(values: np.ndarray) -> tuple[float, float]:
    """Gap between two cluster centres and mean distance to the own centre; 0 and 0 for equal values.

    scikit-learn's k-means with ten starts, as in the authors' evaluation (their script calls these two by each other's
    names).
    """
    if not len(values) or np.ptp(values) == 0:
        return 0.0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(2, n_init=10, random_state=0).fit(values.reshape(-1, 1))
    centres = found.cluster_centers_[:, 0]
    return float(abs(centres[0] - centres[1])), float(np.abs(values - centres[found.labels_]).mean())


def structure(texts: Sequence[str]) -> dict[str, float]:
    """Mean gap, mean distance within a cluster, and mean stability over all inner measures.

    Pieces of fewer than three measures have no inner one and are left out.

    Raises:
        ValueError: no piece has three measures.
    """
    found = [values for values in stabilities(texts) if len(values)]
    if not found:
        raise ValueError("no piece has three measures, expected at least one")
    gaps, within = zip(*(two_means(values) for values in found))
    return {
        "gap": float(np.mean(gaps)),
        "within": float(np.mean(within)),
        "stability": float(np.concatenate(found).mean()),
    }


def profile(texts: Sequence[str], inner: int = 14) -> np.ndarray:
    """(inner,) mean stability by place of the measure, NaN where no piece reaches it."""
    out = np.full((len(texts), inner), np.nan)
    for row, values in zip(out, stabilities(texts)):
        row[: len(values)] = values[:inner]
    seen = ~np.isnan(out).all(0)
    mean = np.full(inner, np.nan)
    mean[seen] = np.nanmean(out[:, seen], 0)
    return mean


def sounding(text: str, most: int | None = None) -> list[str]:
    """The non-empty measures as text."""
    found = ("".join(m) for m in measures_of(text, most or 1 << 30))
    return [measure for measure in found if measure.replace("-", "").replace("\n", "")]


def duplication(texts: Sequence[str], reference: Sequence[str]) -> list[int]:
    """How often each non-empty measure occurs among the measures of a reference."""
    known = Counter("".join(m) for text in reference for m in measures_of(text, 1 << 30))
    return [known[measure] for text in texts for measure in sounding(text)]


def form(texts: Sequence[str]) -> dict[str, float]:
    """Share of lines that are valid, and share of neighbouring measures that are equal, over pieces."""
    lines = [line for text in texts for line in text.splitlines()]
    equal = [a == b for text in texts for a, b in zip(measures_of(text), measures_of(text)[1:]) if len(b) == MEASURE]
    return {
        "valid_lines": float(np.mean([line in VALID for line in lines])) if lines else 0.0,
        "repeated": float(np.mean(equal)) if equal else 0.0,
    }


def kit(texts: Sequence[str]) -> np.ndarray:
    """(6,) share of each drum among all hits; equal shares where there is none."""
    hits = np.zeros(6)
    for text in texts:
        rows = [[c == "o" for c in line] for line in text.splitlines() if line in VALID]
        hits += np.array(rows, dtype=float).reshape(-1, 6).sum(0)
    return hits / hits.sum() if hits.sum() else np.full(6, 1 / 6)


def kit_distance(texts: Sequence[str], reference: Sequence[str]) -> float:
    """Total variation between the drums' shares of two sets of pieces: 0 equal, 1 disjoint."""
    return float(np.abs(kit(texts) - kit(reference)).sum() / 2)


def fills(values: np.ndarray, least: float = 8.0) -> np.ndarray:
    """Which inner measures of a piece are fills: the far cluster, if its centre is ``least`` away (ours)."""
    gap, _ = two_means(values)
    if gap < least:
        return np.zeros(len(values), dtype=bool)
    centre = (values.min() + values.max()) / 2
    for _ in range(50):
        high = values > centre
        centre = (values[high].mean() + values[~high].mean()) / 2
    return values > centre


def patterns(texts: Sequence[str]) -> dict[str, float]:
    """Mean number of different measures in a piece, and share of pieces with a fill."""
    different = [len({"".join(m) for m in measures_of(text)}) for text in texts]
    with_fill = [bool(fills(values).any()) for values in stabilities(texts) if len(values)]
    return {"patterns": float(np.mean(different)), "with_fill": float(np.mean(with_fill)) if with_fill else 0.0}
