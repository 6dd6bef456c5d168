"""Data for xDeepInt: Criteo, Avazu, iPinYou and Frappe in their official layouts, MovieLens-100k, and planted data.

Every data set becomes a ``Split``: a table of level numbers and the rows of its three parts. The text formats are read
by ``shared.ctr``, which streams files larger than memory into a cache; what belongs to this paper is here: which
columns are fields, how the rows are divided, and the generated data with known interactions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared import ctr
from shared.ctr import ClickTable, Field, Layout
from shared.errors import UserError

GENERATED = ("pairs", "triples", "noise")
FROM_TEXT = ("criteo", "avazu", "ipinyou")
DATASETS = (*GENERATED, "ml100k", "frappe", *FROM_TEXT)
EMBEDDING_SIZE = {"pairs": 4, "triples": 4, "noise": 4, "ml100k": 8}
"""K of the small data sets; 16, the paper's, elsewhere."""
NUMERIC = {"xdeepint": "log_square", "winner": "winner"}
NEEDS_FOLDER = ("frappe", *FROM_TEXT)


@dataclass(frozen=True)
class Split:
    """A data set, divided.

    Attributes:
        table: all rows. train, valid, test: row numbers, int64; ``valid`` may be empty.
        bayes: (N,) logits of the generating model, where there is one.
    """

    table: ClickTable
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    bayes: torch.Tensor | None = None


# ---- planted interactions ------------------------------------------------------------------------------------------


PLANTED = {"fields": 8, "levels": 20, "bits": 4, "products": 6, "noise_levels": 200}


def planted_spec(kind: str, train: int) -> dict[str, Any]:
    """What the generated data of a kind is made from, for the record of a run."""
    return {"kind": kind, "train": train, **PLANTED}


def planted(kind: str, seed: int, train: int = 60_000) -> Split:
    """Clicks whose logit has interactions of a known order between the bits of latent vectors.

    Eight fields of 20 equally likely levels; each level has a latent vector e in R^4. The logit is
    ``0.5 linear / sqrt(8) + a pairs + b triples - 1`` with ``linear`` a weight for each level, ``pairs`` the sum over
    i < j of e_i^T M_ij e_j with M_ij from N(0, 1)/4 (it mixes different bits of two fields), ``triples`` the sum of six
    products (u e_i)(v e_j)(w e_k) of random projections, both standardised.

    Args:
        kind: ``"pairs"`` a = 1.5, b = 0; ``"triples"`` a = b = 1; ``"noise"`` as ``pairs``, with two more fields of 200
            levels that have no effect.
        seed: of the latent vectors and of the rows.
        train: number of training rows; there are 2/15 as many for validation and a third as many for testing.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in GENERATED:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(GENERATED)}")
    fields, levels, bits, products = (PLANTED[key] for key in ("fields", "levels", "bits", "products"))
    valid, test = train * 2 // 15, train // 3
    n = train + valid + test
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((fields, levels, bits))
    weight = rng.standard_normal((fields, levels))
    ids = rng.integers(0, levels, (n, fields))
    e = latent[np.arange(fields), ids]  # (n, fields, bits)
    linear = weight[np.arange(fields), ids].sum(1) / np.sqrt(fields)
    left, right = np.triu_indices(fields, 1)
    matrices = rng.standard_normal((len(left), bits, bits)) / 4
    pairs = np.einsum("npk,pkl,npl->n", e[:, left], matrices, e[:, right], optimize=True)
    logit = 0.5 * linear + (1.0 if kind == "triples" else 1.5) * (pairs - pairs.mean()) / pairs.std() - 1
    if kind == "triples":
        members = np.stack([rng.choice(fields, 3, replace=False) for _ in range(products)])
        directions = rng.standard_normal((products, 3, bits))
        triples = np.einsum("ntmk,tmk->ntm", e[:, members], directions).prod(2).sum(1)
        logit = logit + (triples - triples.mean()) / triples.std()
    labels = rng.random(n) < 1 / (1 + np.exp(-logit))
    sizes = [levels] * fields
    if kind == "noise":
        ids = np.concatenate([ids, rng.integers(0, PLANTED["noise_levels"], (n, 2))], 1)
        sizes += [PLANTED["noise_levels"]] * 2
    table = ClickTable(
        ids=torch.from_numpy(ids.astype(np.int32)),
        labels=torch.from_numpy(labels.astype(np.uint8)),
        fields=tuple(f"f{i}" for i in range(len(sizes))),
        levels=tuple(sizes),
    )
    first, second, third = torch.arange(n).split([train, valid, test])
    return Split(table, first, second, third, bayes=torch.from_numpy(logit))


# ---- division of rows ----------------------------------------------------------------------------------------------


def row_uniform(first: int, n: int, seed: int) -> np.ndarray:
    """``n`` numbers in [0, 1) that depend on (seed, row) alone: a random division of a file of unknown length.

    The mixing function is splitmix64.
    """
    with np.errstate(over="ignore"):
        x = np.arange(first, first + n, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2**53


def parts(first: int, n: int, split: str, seed: int) -> np.ndarray:
    """0 train, 1 valid, 2 test for rows ``first .. first+n-1``.

    Args:
        split: ``"random"``: 70/10/20 as in the paper. ``"modulo"``: as the official code, rows with
            ``row % 1000 <= 800`` (801 of 1000) for training, the others for testing, no validation.
        seed: of the random division.
    """
    if split == "modulo":
        return np.where(np.arange(first, first + n) % 1000 <= 800, 0, 2)
    u = row_uniform(first, n, seed)
    return (u >= 0.7).astype(np.int64) + (u >= 0.8)


def divide(n: int, split: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row numbers of train, valid and test among ``n`` rows."""
    part = parts(0, n, split, seed)
    train, valid, test = (torch.from_numpy(np.flatnonzero(part == i)) for i in range(3))
    return train, valid, test


# ---- the paper's data sets -----------------------------------------------------------------------------------------


def text_layout(name: str, numeric: str, official_columns: bool) -> tuple[Layout, tuple[Field, ...]]:
    """Layout and fields of Criteo (39, or the code's 38), Avazu (21 of 22: without ``device_id``) or iPinYou (16)."""
    if name == "criteo":
        # the official script builds its integer columns with range(1, 13), which leaves I13 out
        return ctr.CRITEO, ctr.criteo_fields(NUMERIC[numeric], 12 if official_columns else 13)
    if name == "avazu":
        return ctr.AVAZU, ctr.avazu_fields()
    return ctr.IPINYOU, ctr.ipinyou_fields()


def text_files(name: str, folder: Path) -> list[Path]:
    """The files of a text data set; iPinYou's ``test.log.txt`` is read behind ``train.log.txt`` when it is there."""
    layout, _ = text_layout(name, "xdeepint", False)
    files = ctr.find_files(folder, layout)
    if name == "ipinyou":
        second = files[0].with_name(files[0].name.replace("train", "test"))
        files += [second] if second.is_file() else []
    return files


def load_text(
    name: str,
    folder: Path,
    *,
    min_count: int = 20,
    split: str = "random",
    split_seed: int = 0,
    numeric: str = "xdeepint",
    official_columns: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Split:
    """Criteo, Avazu or iPinYou from the official text files, through a cache of arrays.

    Levels are counted on the training rows only; rarer ones than ``min_count``, and those met first elsewhere, are -1.

    Args:
        name: data set. folder: holds its file. min_count: least count of a level that is kept.
        split, split_seed: see ``parts``. numeric: ``"xdeepint"`` or ``"winner"`` binning of Criteo's integers.
        official_columns: Criteo's first 12 integer columns only. cache: parent folder of the cache. say: progress.

    Raises:
        UserError: a missing or malformed file, a field without levels.
    """
    layout, fields = text_layout(name, numeric, official_columns)
    files = text_files(name, folder)
    table = ctr.load_clicks(
        files,
        layout,
        fields,
        min_count,
        counted=lambda first, n, extras: parts(first, n, split, split_seed) == 0,
        counted_name=f"train of {split} {split_seed}",
        cache=cache,
        say=say,
    )
    return Split(table, *divide(len(table), split, split_seed))


FRAPPE = ("frappe.train.libfm", "frappe.validation.libfm", "frappe.test.libfm")


def frappe(folder: Path) -> Split:
    """Frappe as published in libFM's format (``label id:1 id:1 ...``, ten fields), already divided into three files.

    Raises:
        UserError: a missing file, a line with another number of fields, a label that is not -1, 0 or 1.
    """
    labels, ids = [], []
    for name in FRAPPE:
        path = folder / name
        if not path.is_file():
            raise UserError(f"no file {path}; expected Frappe in libFM format: {', '.join(FRAPPE)}")
        lines = path.read_bytes().splitlines()
        counts = np.array([line.count(b":1") for line in lines])
        expected = 10
        if (counts != expected).any():
            row = int(np.flatnonzero(counts != expected)[0])
            raise UserError(f"{path}, line {row + 1}: {counts[row]} fields found, expected {expected}")
        try:
            numbers = np.array(b" ".join(lines).replace(b":1", b"").split(), dtype=np.float64).reshape(len(lines), -1)
        except ValueError as error:
            raise UserError(f"{path}: not in libFM format, expected 'label id:1 id:1 ...' ({error})") from error
        bad = ~np.isin(numbers[:, 0], (-1, 0, 1))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise UserError(f"{path}, line {row + 1}: label is {numbers[row, 0]:g}, expected -1 (or 0) or 1")
        labels.append(numbers[:, 0] > 0)
        ids.append(numbers[:, 1:].astype(np.int64))
    sizes = np.cumsum([0, *map(len, labels)])
    codes, levels = [], []
    for column in np.concatenate(ids).T:
        values, code = np.unique(column, return_inverse=True)
        codes.append(code.astype(np.int32))
        levels.append(len(values))
    table = ClickTable(
        ids=torch.from_numpy(np.stack(codes, 1)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.uint8)),
        fields=tuple(f"f{i}" for i in range(len(levels))),
        levels=tuple(levels),
    )
    train, valid, test = (torch.arange(a, b) for a, b in pairwise(sizes))
    return Split(table, train, valid, test)


def movielens(folder: Path | None, split_seed: int) -> Split:
    """MovieLens-100k (a rating of at least 4 is a click), divided at random 70/10/20.

    Args:
        folder: with RecBole's atomic files; ``None`` takes those inside the installed package ``recbole``.
    """
    table = ctr.movielens(_movielens_folder(folder))
    return Split(table, *divide(len(table), "random", split_seed))


def _movielens_folder(folder: Path | None) -> Path | None:
    """``folder`` when MovieLens lies there, ``None`` for the one inside the package."""
    return folder if folder is not None and (folder / "ml-100k.inter").is_file() else None


def sources(name: str, folder: Path | None) -> list[Path]:
    """The files that a real data set is read from, for the record of a run.

    Raises:
        UserError: they are not there.
    """
    if name == "ml100k":
        found = _movielens_folder(folder) or ctr.recbole_movielens()
        if found is None:
            raise UserError("no MovieLens-100k: expected the package recbole or --data with ml-100k.inter")
        return [found / f"ml-100k.{part}" for part in ("inter", "item", "user")]
    if folder is None:
        raise UserError(f"{name} needs --data DIR; see Data in README.md")
    return [folder / file for file in FRAPPE] if name == "frappe" else text_files(name, folder)


def check(name: str, folder: Path | None, numeric: str = "xdeepint", official_columns: bool = False) -> list[str]:
    """What ``--check-data`` says about a data set.

    Raises:
        UserError: needed and missing, or malformed at the beginning.
    """
    if name in GENERATED:
        return [f"{name}: generated, no file needed"]
    if name == "ml100k":
        table = movielens(folder, 0).table
        found = f"{len(table):,} rows, {sum(table.levels):,} levels in {len(table.fields)} fields"
        return [f"{name}: {sources(name, folder)[0]}: {found} (expected 100,000 rows)"]
    if folder is None:
        raise UserError(f"{name} needs --data DIR")
    if name == "frappe":
        split = frappe(folder)
        sizes = ", ".join(f"{len(part):,}" for part in (split.train, split.valid, split.test))
        return [f"frappe: {folder}: {sizes} rows in {', '.join(FRAPPE)} (expected 288,609 in all)"]
    layout, fields = text_layout(name, numeric, official_columns)
    lines = []
    for path in text_files(name, folder):
        columns = sorted({f.column for f in fields} | {layout.label})
        first = next(ctr.read_blocks(path, layout, columns, block_bytes=1 << 20), None)
        if first is None:
            raise UserError(f"{path} is empty; expected {layout.name} data ({layout.site})")
        rows = ctr.count_lines(path) - int(layout.header)
        expected = f" (expected {layout.rows:,})" if layout.rows else ""
        lines.append(f"{name}: {path}: {rows:,} rows{expected}, {len(fields)} fields used")
    return lines
