"""Data of the experiments: generated tables for the default, and the files of the authors and of their data sets.

Real: ``adult.mat`` (or the same matrix as ``adult.npz``) for fair classification; for regression
``wikivital_mathematics.json`` (Wikipedia Math Essentials, PyTorch Geometric Temporal) or ``montevideo_bus.npz``.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError, user_errors
from shared.files import read_json
from shared.shapes import read_npz

Vector = NDArray[np.float64]
ADULT_ROWS, ADULT_COLUMNS, ADULT_POSITIVE, ADULT_MALE = 10_000, 50, 2_452, 6_754
WIKI_DAYS, WIKI_ARTICLES = 731, 1_068
BUS_SHAPE = (675, 744)


class People(NamedTuple):
    """Rows of fair classification: features X (m, n), labels y (m,) in {-1, 1}, sensitive s (m,) in {0, 1}."""

    features: Vector
    labels: Vector
    sensitive: Vector


class Samples(NamedTuple):
    """Dictionary learning: old (m, n_old) and new (m, n_new) samples, and the true atoms (m, p), unit columns."""

    old: Vector
    new: Vector
    truth: Vector


def check_finite(**arrays: Vector) -> None:
    """Raise ValueError for the first array that holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinite values")


def check_people(features: Vector, labels: Vector, sensitive: Vector) -> None:
    """Raise ValueError for shapes that do not fit, NaN, labels besides -1 and 1, or one class or group only."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or sensitive.shape != labels.shape:
        shapes = f"X {features.shape}, y {labels.shape}, s {sensitive.shape}"
        raise ValueError(f"{shapes}: expected (rows, features), (rows,), (rows,)")
    check_finite(X=features, y=labels, s=sensitive)
    for name, array, known in (("y", labels, (-1, 1)), ("s", sensitive, (0, 1))):
        found = np.unique(array)
        if not np.array_equal(found, known):
            raise ValueError(
                f"{name} holds the values {found[:5].tolist()}, expected both of {list(known)} and no other"
            )


# ---- real files ------------------------------------------------------------------------------------------------------


def find(folder: Path, *names: str) -> Path:
    """The first of the files, in the folder itself or one level below it.

    Raises:
        UserError: none is there.
    """
    for name in names:
        for path in [folder / name, *sorted(folder.glob(f"*/{name}"))]:
            if path.is_file():
                return path
    raise UserError(f"{folder}: no {' or '.join(names)} there or one folder below")


def read_adult(path: Path) -> People:
    """Adult as the authors stored it: X (m, n), y and x_control with m entries each.

    Raises:
        UserError: not readable, an array is missing, or its shape or values are wrong.
    """
    keys = ("X", "y", "x_control")
    if path.suffix == ".mat":
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        try:
            stored = loadmat(path, variable_names=list(keys))
        except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
            raise UserError(f"{path} is not a readable MATLAB 5 file ({' '.join(str(error).split())})") from error
        lacking = [key for key in keys if key not in stored]
        if lacking:
            raise UserError(f"{path}: no array {lacking[0]!r}, expected {', '.join(keys)}")
    else:
        stored = read_npz(path, keys)
    for key in keys:
        if np.asarray(stored[key]).dtype.kind not in "biuf":
            raise UserError(f"{path}: {key} is not numeric")
    x, y, s = (np.asarray(stored[key], dtype=np.float64) for key in keys)
    try:
        check_people(x, y.ravel(), s.ravel())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return People(x, y.ravel(), s.ravel())


def read_bus(path: Path) -> Vector:
    """Hourly passengers (stops, hours) of montevideo_bus.npz."""
    return _counts(read_npz(path, ("inflow",))["inflow"], path)


def read_wiki(path: Path) -> Vector:
    """Daily visits (articles, 731) of wikivital_mathematics.json: one column a day.

    Raises:
        UserError: a key is missing, there are not 731 periods, or the days differ in their number of articles.
    """
    table = read_json(path, "Wikipedia Math Essentials")
    if not isinstance(table, dict) or "time_periods" not in table:
        raise UserError(f"{path}: no key 'time_periods', expected the file of PyTorch Geometric Temporal")
    if table["time_periods"] != WIKI_DAYS:
        raise UserError(f"{path}: time_periods is {table['time_periods']}, expected {WIKI_DAYS}")
    days = []
    for day in range(WIKI_DAYS):
        row = table.get(str(day))
        if not isinstance(row, dict) or "y" not in row:
            raise UserError(f"{path}: no visits of day {day}, expected key '{day}' with 'y'")
        if not isinstance(row["y"], list) or (days and len(row["y"]) != len(days[0])):
            raise UserError(f"{path}: day {day} does not list the visits of {len(days[0]) if days else 'all'} articles")
        days.append(row["y"])
    try:
        return _counts(np.array(days, dtype=np.float64).T, path)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: visits are not numbers ({error})") from error


def _counts(table: NDArray, path: Path) -> Vector:
    if table.ndim != 2 or min(table.shape) < 2 or table.dtype.kind not in "iuf":
        raise UserError(f"{path}: shape {table.shape} of {table.dtype}, expected a numeric table (places, times)")
    table = table.astype(np.float64)
    if not np.isfinite(table).all():
        raise UserError(f"{path}: NaN or infinite values in the table")
    return table


# ---- preparation -----------------------------------------------------------------------------------------------------


def scale_features(features: Vector) -> Vector:
    """Min-max scaling of each column over all rows, then a column of ones: (m, n) -> (m, n + 1).

    Raises:
        UserError: a constant column, which cannot be scaled.
    """
    low, high = features.min(0), features.max(0)
    if (high == low).any():
        column = int(np.flatnonzero(high == low)[0])
        raise UserError(f"feature column {column} is constant ({low[column]:g}), expected at least two values to scale")
    return np.column_stack([(features - low) / (high - low), np.ones(len(features))])


def split_people(people: People, train: int, test: int, rng: np.random.Generator) -> tuple[People, People]:
    """Random rows for training and others for testing, scaled together over all rows as released.

    Raises:
        UserError: fewer rows than asked for, no test rows, or one class or group only in a part.
    """
    if test < 1 or train + test > len(people.labels):
        raise UserError(
            f"{len(people.labels)} rows, expected at least {train} for training and {max(test, 1)} for testing"
        )
    features = scale_features(people.features)
    order = rng.permutation(len(people.labels))
    parts = []
    for rows in (order[:train], order[train : train + test]):
        with user_errors():
            check_people(features[rows], people.labels[rows], people.sensitive[rows])
        parts.append(People(features[rows], people.labels[rows], people.sensitive[rows]))
    return parts[0], parts[1]


def unit_columns(table: Vector) -> Vector:
    """Columns scaled to unit Euclidean norm; those that are all zero are left out."""
    norm = np.linalg.norm(table, axis=0)
    return table[:, norm > 0] / norm[norm > 0]


def outcome_column(table: Vector, outcome: int) -> tuple[Vector, Vector]:
    """A (m, n - 1) and b (m,) of a scaled table: ``outcome`` is the column of b, counted before any is left out.

    Raises:
        UserError: there is no such column, or it is all zero.
    """
    if not 0 <= outcome < table.shape[1] or not table[:, outcome].any():
        raise UserError(f"--outcome {outcome}: no such column with values, the table has {table.shape[1]} columns")
    keep = table.any(0)
    index = int(keep[:outcome].sum())
    scaled = unit_columns(table)
    return np.delete(scaled, index, axis=1), scaled[:, index]


def split_rows(a: Vector, b: Vector, rng: np.random.Generator) -> list[tuple[Vector, Vector]]:
    """Random 60, 20 and 20 per cent of the rows: training, validation, test.

    Raises:
        UserError: rows of A and b differ, or a part has none.
    """
    if len(a) != len(b):
        raise UserError(f"A {a.shape} and b {b.shape}: expected the same number of rows")
    with user_errors():
        check_finite(A=a, b=b)
    order, train = rng.permutation(len(a)), round(0.6 * len(a))
    ends = [0, train, train + round(0.2 * len(a)), len(a)]
    if min(np.diff(ends)) < 1:
        raise UserError(f"{len(a)} rows give an empty part of 60, 20 and 20 per cent, expected at least 5")
    parts = [order[i:j] for i, j in pairwise(ends)]
    return [(np.ascontiguousarray(a[rows]), b[rows]) for rows in parts]


# ---- generated -------------------------------------------------------------------------------------------------------


def generate_visits(rows: int, columns: int, rng: np.random.Generator, patterns: int = 12) -> Vector:
    """Counts (rows, columns) of places over time: popularity times a mixture of smooth daily patterns, Poisson."""
    time = np.arange(columns)
    phase, width = rng.uniform(0, 24, patterns), rng.uniform(1.5, 5.0, patterns)
    away = np.abs((time[:, None] - phase) % 24)
    shape = np.exp(-0.5 * (np.minimum(away, 24 - away) / width) ** 2) + 0.05
    trend = np.exp(np.cumsum(rng.normal(0, 0.05, (columns, patterns)), axis=0))
    mixture = rng.dirichlet(np.full(patterns, 0.3), rows)
    popularity = np.exp(rng.normal(1.0, 1.0, rows))
    return rng.poisson(popularity[:, None] * (mixture @ (shape * trend).T)).astype(np.float64)


def plant_outcome(a: Vector, radius: float, noise: float, rng: np.random.Generator) -> tuple[Vector, Vector]:
    """An outcome with many exact solutions inside the ball.

    Args:
        a: (m, n). radius: of the l1 ball. noise: standard deviation of the noise, a share of that of the outcome.

    Returns:
        b (m,) without and with noise: b = A x for a non-negative x with |x|_1 = 0.8 radius.
    """
    x = np.zeros(a.shape[1])
    chosen = rng.choice(a.shape[1], min(20, a.shape[1]), replace=False)
    x[chosen] = 0.8 * radius * rng.dirichlet(np.ones(len(chosen)))
    b = a @ x
    return b, b + noise * b.std() * rng.standard_normal(len(b))


def generate_people(rows: int, rng: np.random.Generator) -> People:
    """Rows like Adult's: six groups of binary columns, five numeric ones of which two are mostly zero with a long tail.

    A latent score drives the columns; the sensitive group (two thirds are 1) shifts it, and two of the groups tell it.
    Min-max scaling squeezes the long tails, so that the lower level needs large weights and is ill-conditioned.
    """
    sensitive = (rng.random(rows) < 0.675).astype(np.float64)
    skill = rng.standard_normal(rows) + 0.5 * sensitive
    score = 1.3 * skill + 0.5 * sensitive - 2.2 + rng.logistic(size=rows)
    columns = [np.round(10 + 2.5 * (0.6 * skill + rng.standard_normal(rows))), np.round(rng.gamma(5.0, 8.0, rows))]
    columns.append(np.round(40 + 10 * (0.3 * skill + 0.3 * sensitive + rng.standard_normal(rows))))
    for share, tail in ((0.08, 8.0), (0.05, 7.0)):  # capital gain and loss
        has = rng.random(rows) < np.where(score > 0, 2.5 * share, 0.5 * share)
        columns.append(np.round(has * np.exp(rng.normal(tail, 1.2, rows))))
    blocks = [np.stack(columns, 1)]
    for number, size in enumerate((8, 7, 14, 6, 5, 5)):
        taste = rng.normal(0, 0.7, size) * skill[:, None] + rng.normal(0, 1.5, size)
        if number in (1, 3):  # as relationship and occupation do
            taste = taste + np.outer(sensitive, rng.normal(0, 1.5, size))
        choice = (taste + rng.gumbel(size=(rows, size))).argmax(1)
        choice[:size] = np.arange(size)  # no column is constant
        blocks.append(np.eye(size)[choice])
    return People(np.hstack(blocks), np.where(score > 0, 1.0, -1.0), sensitive)


def generate_samples(
    rng: np.random.Generator, rows: int = 25, atoms: int = 50, old: int = 250, new: int = 200, noise: float = 0.01
) -> Samples:
    """Samples as released: each of 5 atoms, in the old of the first 4/5 of the atoms, in the new of the last 2/5.

    Coefficients are uniform in +-[.2, 1]; the new samples use the atoms from number 3/5 p on, counted from one.
    """
    truth = rng.standard_normal((rows, atoms))
    truth /= np.linalg.norm(truth, axis=0)
    parts = []
    for count, first, last in ((old, 0, round(4 * atoms / 5)), (new, round(3 * atoms / 5) - 1, atoms)):
        used = first + rng.random((count, last - first)).argsort(1)[:, : min(5, last - first)]
        codes = np.zeros((count, atoms))
        values = rng.uniform(0.2, 1.0, used.shape) * rng.choice([-1.0, 1.0], used.shape)
        np.put_along_axis(codes, used, values, axis=1)
        parts.append(truth @ codes.T + noise * rng.standard_normal((rows, count)))
    return Samples(parts[0], parts[1], truth)
