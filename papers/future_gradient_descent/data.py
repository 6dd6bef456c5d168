"""Streams of domains: generated seasonal shift, MovieLens-100k by time, Avazu by date, CriteoTB's daily files.

The large text formats are read by ``shared.ctr`` in blocks into a cache of plain arrays that is mapped into memory, so
a stream reads the rows of a mini-batch when it is asked for them, and no day is ever held as a whole. Vocabularies are
counted on the offline days alone: counted on all rows, they would tell of the future.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import ctr
from shared.errors import UserError

DATASETS = ("seasonal", "movielens", "avazu", "criteotb")
FIELDS, LEVELS = 6, 20
"""Of the generated stream."""
SCAN_ROWS = 1 << 24
"""Rows of a mapped column in memory at a time."""


@dataclass(frozen=True)
class Stream:
    """Domains in order of time.

    Attributes:
        ids: (N, F) the level of each field, -1 for a missing, rare or new one; in memory or mapped from a file.
        labels: (N,) 0 or 1. levels: of each field, one more than the vocabulary has: the last stands for -1.
        bounds: (T + 1) first row of each domain, and the end. names: of the domains.
        files: what was read; empty for generated data.
    """

    ids: Tensor
    labels: Tensor
    levels: tuple[int, ...]
    bounds: tuple[int, ...]
    names: tuple[str, ...]
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        """T, the number of domains."""
        return len(self.bounds) - 1

    def size(self, t: int) -> int:
        """Rows of domain t, from 0."""
        return self.bounds[t + 1] - self.bounds[t]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (...) -> ids (..., F) int64, numbering rows of the fused tables, and labels (...) float32."""
        sizes = torch.tensor(self.levels)
        flat = index.flatten()
        ids = self.ids.index_select(0, flat).long()
        ids = torch.where(ids < 0, sizes - 1, ids) + (sizes.cumsum(0) - sizes)
        labels = self.labels.index_select(0, flat).float()
        return ids.view(*index.shape, len(sizes)), labels.view(index.shape)

    def day(self, t: int) -> Tensor:
        """Rows of domain t (n,)."""
        return torch.arange(self.bounds[t], self.bounds[t + 1])


# ---- generated -------------------------------------------------------------------------------------------------------


def seasonal(
    seed: int, domains: int = 30, rows: int = 4096, period: int = 3, season: float = 0.7, drift: float = 0.1
) -> Stream:
    """Six fields of twenty levels; the weights of domain t are w0 + S_{t mod P} + d_t.

    Level frequencies are Dirichlet(2), w0 is N(0, 0.7), the P seasons are N(0, ``season``); the drift d_t is the sum of
    a velocity v <- 0.9 v + ``drift`` e, e normal, over sqrt(domains), so that it moves by the same amount over a stream
    of any length. The logit is 1.5 (sum of the row's weights) / sqrt(6) - 1.
    """
    g = torch.Generator().manual_seed(seed)
    gamma = -(torch.rand(2, FIELDS, LEVELS, generator=g).log()).sum(0)  # Dirichlet(2): sums of two exponentials
    frequency = gamma / gamma.sum(1, keepdim=True)
    w0 = 0.7 * torch.randn(FIELDS, LEVELS, generator=g)
    seasons = season * torch.randn(period, FIELDS, LEVELS, generator=g)
    velocity, d = torch.zeros(FIELDS, LEVELS), torch.zeros(FIELDS, LEVELS)
    ids, labels = [], []
    for t in range(domains):
        velocity = 0.9 * velocity + drift * torch.randn(FIELDS, LEVELS, generator=g)
        d = d + velocity / domains**0.5
        x = torch.multinomial(frequency, rows, replacement=True, generator=g)
        w = (w0 + seasons[t % period] + d).gather(1, x).sum(0)
        y = torch.rand(rows, generator=g) < (1.5 * w / FIELDS**0.5 - 1).sigmoid()
        ids.append(x.t().int())
        labels.append(y)
    bounds = tuple(range(0, domains * rows + 1, rows))
    names = tuple(str(t + 1) for t in range(domains))
    return Stream(torch.cat(ids), torch.cat(labels), (LEVELS + 1,) * FIELDS, bounds, names)


# ---- MovieLens-100k --------------------------------------------------------------------------------------------------


def movielens_folder(folder: Path | None) -> Path:
    """Where MovieLens-100k lies: in ``folder``, else inside the installed package recbole (read as files).

    Raises:
        UserError: nowhere.
    """
    if folder is not None:
        if not (folder / "ml-100k.inter").is_file():
            raise UserError(f"{folder} has no MovieLens-100k: expected ml-100k.inter, ml-100k.item and ml-100k.user")
        return folder
    found = ctr.recbole_movielens()
    if found is None:
        raise UserError("no MovieLens-100k: expected the package recbole, or --data DIR with ml-100k.inter")
    return found


def past_levels(ids: Tensor, levels: Sequence[int], past: int, least: int) -> tuple[Tensor, tuple[int, ...]]:
    """Renumber levels to those that the first ``past`` rows have ``least`` times; others become -1.

    Returns:
        ids (N, F) and the levels that are left of each field.
    """
    columns, left = [], []
    for column, n in zip(ids.t(), levels, strict=True):  # over fields
        seen = column[:past][column[:past] >= 0].long().bincount(minlength=n)
        kept = seen >= least
        number = torch.where(kept, kept.cumsum(0) - 1, -1).int()
        columns.append(torch.where(column < 0, -1, number[column.clamp_min(0).long()]))
        left.append(int(kept.sum()))
    return torch.stack(columns, 1), tuple(left)


def check_times(path: Path) -> None:
    """Every row of a RecBole file of ratings has a time in seconds.

    Raises:
        UserError: file, line and column of the first that has none.
    """
    times = ctr.read_atomic(path, ("timestamp",))["timestamp"]
    good = np.char.isdigit(times.astype(bytes)) if len(times) else np.ones(0, bool)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        text = times[row].decode("utf-8", "replace")
        raise UserError(f"{path}, line {row + 2}: column timestamp is {text!r}, expected seconds since 1970")


def movielens(
    folder: Path | None,
    domains: int,
    offline: Callable[[int], int],
    vocab: str = "offline",
    min_count: int = 1,
    span: int = 0,
) -> Stream:
    """MovieLens-100k by time, a click is a rating of at least 4.

    Args:
        folder: with RecBole's atomic files; ``None`` takes those inside the package recbole.
        domains: chunks of equal size, what is left at the end is dropped. offline, vocab, min_count: as in ``avazu``.
        span: a domain is so many days (UTC) instead, and a span without ratings is none.
    """
    where = movielens_folder(folder)
    files = tuple(where / f"ml-100k.{part}" for part in ("inter", "item", "user"))
    if files[0].is_file():
        check_times(files[0])
    table = ctr.movielens(where)
    times = table.extras["timestamp"].long()
    order = torch.argsort(times, stable=True)
    if span:
        days = times[order] // 86_400
        number, sizes = ((days - days[0]) // span).unique_consecutive(return_counts=True)
        bounds = (0, *sizes.cumsum(0).tolist())
        first = np.datetime64(int(days[0]), "D")
        names = tuple(str(first + span * i) for i in number.tolist())
    else:
        n = len(table) // domains
        if n < 1:
            raise UserError(f"--domains is {domains}, expected at most the {len(table)} rows of MovieLens-100k")
        bounds = tuple(range(0, n * domains + 1, n))
        names = tuple(str(t + 1) for t in range(domains))
    order = order[: bounds[-1]]
    warmup = offline(len(names))
    past = bounds[-1] if vocab == "all" else bounds[warmup]
    ids, levels = past_levels(table.ids[order], table.levels, past, min_count)
    return Stream(ids, table.labels[order], tuple(c + 1 for c in levels), bounds, names, files)


# ---- Avazu and CriteoTB ----------------------------------------------------------------------------------------------


def avazu_days(path: Path) -> dict[int, int]:
    """Dates YYMMDD of an Avazu file and their rows, in the file's order; reads the column ``hour`` block by block.

    Raises:
        UserError: not YYMMDDHH, or a row that is earlier than the one before it (file and line).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    out: dict[int, int] = {}
    last = 0
    for block in ctr.read_blocks(path, ctr.AVAZU, ["hour"]):
        text = block.columns["hour"]
        good = pc.match_substring_regex(text, rb"^[0-9]{8}$").to_numpy(zero_copy_only=False)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise UserError(
                f"{path}, line {block.first_line + row}: hour is {text[row].as_py().decode('utf-8', 'replace')!r}, "
                "expected YYMMDDHH"
            )
        hours = text.cast(pa.string()).cast(pa.int64()).to_numpy(zero_copy_only=False)
        back = np.diff(hours, prepend=last) < 0
        if back.any():
            row = int(np.flatnonzero(back)[0])
            raise UserError(
                f"{path}, line {block.first_line + row}: column hour goes back to {hours[row]}, expected rows by time"
            )
        last = int(hours[-1])
        for day, count in zip(*np.unique(hours // 100, return_counts=True), strict=True):
            out[int(day)] = out.get(int(day), 0) + int(count)
    return out


def from_table(table: ctr.ClickTable, column: str, names: Sequence[str], files: Sequence[Path]) -> Stream:
    """A mapped click table as a stream; a domain is a value of an extra column, which does not fall."""
    values = table.extras[column]
    bounds = [0]
    for start in range(0, len(values) - 1, SCAN_ROWS):
        part = values[start : start + SCAN_ROWS + 1]
        bounds += (1 + start + (part[1:] != part[:-1]).nonzero()[:, 0]).tolist()
    bounds.append(len(values))
    if len(bounds) != len(names) + 1:
        raise UserError(f"{files[0]}: {len(bounds) - 1} of {len(names)} domains have rows, expected rows in each")
    levels = tuple(n + 1 for n in table.levels)
    return Stream(table.ids, table.labels, levels, tuple(bounds), tuple(names), tuple(files))


def avazu(
    folder: Path,
    offline: Callable[[int], int],
    vocab: str = "offline",
    min_count: int = 10,
    say: Callable[[str], None] | None = None,
) -> Stream:
    """Avazu's labelled file (``train`` or ``train.csv``), a domain a date; 22 fields, ``hour`` as the hour of the day.

    Args:
        folder: holds it. offline: number of domains -> those before the first that is evaluated.
        vocab: count levels on the offline days, or on all. min_count: rarer levels share one id.
    """
    files = ctr.find_files(folder, ctr.AVAZU)
    days = list(avazu_days(files[0]))
    masks: dict[str, Any] = {}
    if vocab == "offline":
        end = days[offline(len(days)) - 1]
        masks = {"counted": lambda first, n, extras: extras["day"] <= end, "counted_name": f"days up to {end}"}
    table = ctr.load_clicks(files, ctr.AVAZU, ctr.avazu_fields(drop=()), min_count, say=say, **masks)
    return from_table(table, "day", [str(day) for day in days], files)


def criteo_files(folder: Path) -> list[Path]:
    """CriteoTB's day_0, day_1, ... without a gap, plain or gzipped.

    Raises:
        UserError: none, or a gap; names the missing days.
    """
    numbers = {}
    for path in folder.glob("day_*"):
        number = path.name.removesuffix(".gz").removeprefix("day_")
        if number.isdigit():
            numbers[int(number)] = path
    if not numbers:
        raise UserError(f"{folder} has no CriteoTB data: expected day_0 .. day_23, plain or gzipped (Criteo AI Lab)")
    gap = [f"day_{i}" for i in range(max(numbers) + 1) if i not in numbers]
    if gap:
        raise UserError(f"{folder}: {', '.join(gap)} missing, expected every day up to day_{max(numbers)}")
    return [numbers[i] for i in sorted(numbers)]


def row_uniform(first: int, n: int) -> np.ndarray:
    """``n`` numbers in [0, 1) that depend on the row alone (splitmix64; same as papers.xdeepint.data.row_uniform)."""
    with np.errstate(over="ignore"):
        x = (np.arange(first, first + n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2**53


def criteo(
    folder: Path,
    offline: Callable[[int], int],
    vocab: str = "offline",
    min_count: int = 10,
    share: float = 0.1,
    say: Callable[[str], None] | None = None,
) -> Stream:
    """CriteoTB, a domain a file; 39 fields, integers in the bins of the "3 idiots".

    Args:
        share: of the rows that is kept, at random by row number. offline, vocab, min_count: as in ``avazu``.
    """
    files = criteo_files(folder)
    end = offline(len(files))
    masks: dict[str, Any] = {}
    if share < 1:
        masks |= {"keep": lambda first, n, extras: row_uniform(first, n) < share, "keep_name": f"share {share}"}
    if vocab == "offline":
        masks |= {"counted": lambda first, n, extras: extras["file"] < end, "counted_name": f"files below {end}"}
    table = ctr.load_clicks(files, ctr.CRITEO, ctr.criteo_fields("winner"), min_count, say=say, **masks)
    return from_table(table, "file", [path.name.removesuffix(".gz") for path in files], files)


def check_text(dataset: str, folder: Path) -> list[str]:
    """What ``--check-data`` says of Avazu or CriteoTB: files, rows and columns, without building the cache."""
    if dataset == "avazu":
        path = ctr.find_files(folder, ctr.AVAZU)[0]
        ctr.read_header(path, ctr.AVAZU, ctr.AVAZU.columns)
        days = avazu_days(path)
        found = ", ".join(f"{day}: {rows:,}" for day, rows in days.items())
        return [f"avazu: {path}: {sum(days.values()):,} rows of {len(days)} dates (expected 40,428,967 rows): {found}"]
    files = criteo_files(folder)
    lines = [f"criteotb: {folder}: {len(files)} daily files (expected 24)"]
    for path in files:
        if next(ctr.read_blocks(path, ctr.CRITEO, ["label"], block_bytes=1 << 20), None) is None:
            raise UserError(f"{path} is empty; expected {ctr.CRITEO.name} rows of 40 columns")
        lines.append(f"criteotb: {path.name}: {ctr.count_lines(path):,} rows")
    return lines
