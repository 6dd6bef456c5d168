"""Click-through data: Criteo, Avazu, iPinYou and MovieLens-100k in their official layouts, and the two metrics.

The text files are larger than memory (Criteo: 11 GB), so they are read in blocks of whole lines, twice: once to count
the levels of each field, once to write the levels' numbers into a cache of plain arrays. The cache is mapped into
memory: a batch is a random access by row, whatever the file's size. Building it can be interrupted at any moment and
goes on where it was; it appears under its final name only when it is complete.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from shared.errors import UserError
from shared.files import cache_folder, disk_error, sync, write_json

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
BLOCK_BYTES = 1 << 26
SAVE_EVERY = 32  # blocks between two saves of the counts

RowMask = Callable[[int, int, Mapping[str, np.ndarray]], np.ndarray]
"""``mask(first_row, n, extras) -> (n,) bool`` for consecutive rows; ``extras`` holds "file" and the layout's own."""


# ---- layouts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A categorical field of the model: the text column it is made of, and the rule that turns text into levels.

    Rules: ``category`` (the text itself, empty = missing), ``log_square`` and ``winner`` (integers, see
    ``log_square_bins`` and ``winner_bins``), ``price`` (integers in the buckets 0, 1-10, 11-50, 51-100, 101+),
    ``hour_of_day`` and ``day`` (of YYMMDDHH).
    """

    name: str
    column: str
    rule: str = "category"


@dataclass(frozen=True)
class Layout:
    """A text layout.

    Attributes:
        name: of the data set. files: names it may have, without ``.gz``; the first one is the official name.
        site: where it comes from. delimiter: between columns. columns: all of them, in order.
        header: whether line 1 names the columns (in any order, further ones allowed). label: the column of 0 and 1.
        rows: the official number of labelled rows, where it is known.
        extras: integer columns to keep beside the fields (rule ``day``).
    """

    name: str
    files: tuple[str, ...]
    site: str
    delimiter: str
    columns: tuple[str, ...]
    header: bool
    label: str
    rows: int | None = None
    extras: tuple[Field, ...] = ()


CRITEO = Layout(
    name="Criteo display advertising",
    files=("train.txt",),
    site="Criteo AI Lab, dac.tar.gz",
    delimiter="\t",
    columns=("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))),
    header=False,
    label="label",
    rows=45_840_617,
)
"""40 tab-separated columns without header; also the layout of CriteoTB's ``day_0`` .. ``day_23``."""

_AVAZU = (
    "id click hour C1 banner_pos site_id site_domain site_category app_id app_domain app_category device_id device_ip "
    "device_model device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
)
AVAZU = Layout(
    name="Avazu",
    files=("train.csv", "train"),
    site="Kaggle, avazu-ctr-prediction",
    delimiter=",",
    columns=tuple(_AVAZU.split()),
    header=True,
    label="click",
    rows=40_428_967,
    extras=(Field("day", "hour", "day"),),
)
"""24 comma-separated columns with header; ``extras["day"]`` is YYMMDD."""

_IPINYOU = (
    "click weekday hour bidid timestamp logtype ipinyouid useragent IP region city adexchange domain url urlid slotid "
    "slotwidth slotheight slotvisibility slotformat slotprice creative bidprice payprice keypage advertiser usertag"
)
IPINYOU = Layout(
    name="iPinYou",
    files=("train.log.txt", "all/train.log.txt"),
    site="github.com/wnzhang/make-ipinyou-data, make all",
    delimiter="\t",
    columns=tuple(_IPINYOU.split()),
    header=True,
    label="click",
)
"""27 tab-separated columns with header, as ``make-ipinyou-data`` writes them; ``test.log.txt`` has the same."""


def criteo_fields(numeric: str = "log_square", integers: int = 13) -> tuple[Field, ...]:
    """The first ``integers`` integer columns under the rule ``numeric``, and the 26 categorical ones."""
    numbers = (Field(f"I{i}", f"I{i}", numeric) for i in range(1, integers + 1))
    return (*numbers, *(Field(f"C{i}", f"C{i}") for i in range(1, 27)))


def avazu_fields(drop: Sequence[str] = ("device_id",), hour: str = "hour_of_day") -> tuple[Field, ...]:
    """Every column except ``id``, ``click`` and those of ``drop``; ``hour`` under the rule given."""
    names = [c for c in AVAZU.columns if c not in ("id", "click", *drop)]
    return tuple(Field(c, c, hour if c == "hour" else "category") for c in names)


def ipinyou_fields() -> tuple[Field, ...]:
    """14 columns as they are, the user agent, and the floor price in five buckets: 16 fields."""
    names = "weekday hour IP region city adexchange domain slotid slotwidth slotheight slotvisibility slotformat"
    plain = (*names.split(), "creative", "advertiser", "useragent")
    return (*(Field(c, c) for c in plain), Field("slotprice", "slotprice", "price"))


# ---- rules ---------------------------------------------------------------------------------------------------------


def log_square_bins(x: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
    """xDeepInt's binning of an integer, floor(ln(x^2 + 1)); a missing one is read as 0."""
    x = np.asarray(x, dtype=np.float64)
    if missing is not None:
        x = np.where(missing, 0.0, x)
    return np.floor(np.log1p(x * x)).astype(np.int64)


def winner_bins(x: np.ndarray) -> np.ndarray:
    """The binning of the "3 idiots": floor(ln(x)^2) for x > 2, else x - 2. Missing values are a level of their own."""
    x = np.asarray(x, dtype=np.int64)
    return np.where(x > 2, np.floor(np.log(np.maximum(x, 3)) ** 2).astype(np.int64), x - 2)


FIXED_LEVELS = {"log_square": 64, "price": 5}
"""Levels of the rules that need no vocabulary."""
RULES = ("category", "log_square", "winner", "price", "hour_of_day", "day")
_PRICES = np.array([0, 10, 50, 100])
NULL = b"NULL"


class _Where:
    """Where a block lies, for error messages."""

    def __init__(self, path: Path, first_line: int) -> None:
        self.path, self.first_line = path, first_line

    def error(self, row: int, text: str) -> UserError:
        return UserError(f"{self.path}, line {self.first_line + row}: {text}")


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def _integers(array: pa.Array, name: str, where: _Where) -> tuple[np.ndarray, np.ndarray]:
    """(values with 0 for missing, missing) of a text column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = pc.equal(array, pa.scalar(b"", array.type)).to_numpy(zero_copy_only=False)
    bad = ~(pc.match_substring_regex(array, rb"^[+-]?[0-9]{1,18}$").to_numpy(zero_copy_only=False) | missing)
    if bad.any():
        row = _first(bad)
        text = array[row].as_py().decode("utf-8", "replace")
        raise where.error(row, f"{name} is {text!r}, expected an integer or nothing")
    filled = pc.if_else(pa.array(missing), pa.scalar(b"0", array.type), array)
    return filled.cast(pa.string()).cast(pa.int64()).to_numpy(zero_copy_only=False), missing


def _levels(array: pa.Array, item: Field, where: _Where) -> pa.Array | np.ndarray:
    """A column's text under the field's rule: text levels (empty = missing), or numbers where the levels are fixed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if item.rule == "category":
        return array
    if item.rule in ("hour_of_day", "day"):
        good = pc.match_substring_regex(array, rb"^[0-9]{8}$").to_numpy(zero_copy_only=False)
        if not good.all():
            row = _first(~good)
            text = array[row].as_py().decode("utf-8", "replace")
            raise where.error(row, f"{item.column} is {text!r}, expected YYMMDDHH")
        if item.rule == "hour_of_day":
            return pc.binary_slice(array, 6, 8)
        return pc.binary_slice(array, 0, 6).cast(pa.string()).cast(pa.int64()).to_numpy(zero_copy_only=False)
    values, missing = _integers(array, item.column, where)
    if item.rule == "log_square":
        return log_square_bins(values, missing)
    if item.rule == "price":
        return np.searchsorted(_PRICES, np.maximum(values, 0), side="left")
    if item.rule == "winner":
        text = pa.array(winner_bins(values)).cast(pa.string()).cast(pa.binary())
        return pc.if_else(pa.array(missing), pa.scalar(NULL, pa.binary()), text)
    raise ValueError(f"unknown rule {item.rule!r} of field {item.name}, expected one of {', '.join(RULES)}")


# ---- reading text --------------------------------------------------------------------------------------------------


def find_files(folder: Path, layout: Layout) -> list[Path]:
    """The data file of a layout in ``folder``, plain or gzipped.

    Raises:
        UserError: none; says which file of which site is expected.
    """
    for name in layout.files:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return [path]
    raise UserError(
        f"{folder} has no {layout.name} data: expected {layout.files[0]} or {layout.files[0]}.gz ({layout.site})"
    )


def _open(path: Path, start: int) -> IO[bytes]:
    """Open at a byte of the (unpacked) text."""
    file: IO[bytes] = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[assignment]
    if start:
        file.seek(start)  # in a gzip file this unpacks and forgets
    return file


def _text_blocks(path: Path, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(end offset, whole lines) of about ``size`` bytes each."""
    try:
        with _open(path, start) as file:
            while data := file.read(size):
                if not data.endswith(b"\n"):
                    data += file.readline()
                start += len(data)
                yield start, data
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}; expected a complete text or gzip file") from error


def count_lines(path: Path) -> int:
    """Lines of a text or gzip file, a last one without newline included."""
    lines, last = 0, b"\n"
    for _, data in _text_blocks(path, 0, BLOCK_BYTES):
        lines, last = lines + data.count(b"\n"), data[-1:]
    return lines + (last != b"\n")


def read_header(path: Path, layout: Layout, needed: Sequence[str]) -> tuple[str, ...]:
    """The names of a file's columns: from line 1, or from the layout where the file has no header.

    Raises:
        UserError: a needed column is missing, or the file is empty.
    """
    if not layout.header:
        return layout.columns
    with _open(path, 0) as file:
        line = file.readline().decode("utf-8", "replace").strip("\r\n").removeprefix("\ufeff")
    names = tuple(line.split(layout.delimiter))
    lacking = [name for name in needed if name not in names]
    if lacking:
        raise UserError(
            f"{path}, line 1: the header lacks {', '.join(lacking)}: "
            f"{len(names)} columns found, expected {len(layout.columns)} of {layout.name}"
        )
    return names


@dataclass
class Block:
    """Some consecutive lines of a file, as text columns.

    Attributes:
        columns: name -> binary array. first_line: of the block, from 1. end: offset behind it in the (unpacked) file.
    """

    columns: dict[str, pa.Array]
    first_line: int
    end: int
    rows: int


def read_blocks(
    path: Path,
    layout: Layout,
    columns: Sequence[str],
    start: int = 0,
    first_line: int = 1,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Block]:
    """Walk through a text file in blocks of whole lines; only one block is in memory at a time.

    Args:
        path: plain text or ``.gz``. layout: of the file. columns: the columns wanted, all as text.
        start, first_line: offset and line to go on from (a ``Block.end`` and the line behind it).
        block_bytes: approximate size of a block.

    Raises:
        UserError: a line with another number of columns (file, line, expected and found), a missing column.
    """
    import pyarrow as pa
    from pyarrow import csv

    names = read_header(path, layout, columns)
    if layout.header and start == 0:
        with _open(path, 0) as file:
            start, first_line = len(file.readline()), 2
    convert = csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict.fromkeys(columns, pa.binary()),
        strings_can_be_null=False,
        null_values=[],
        check_utf8=False,
    )
    # an empty line would give a row of empty texts; left out, it shows in the number of rows
    parse = csv.ParseOptions(
        delimiter=layout.delimiter, quote_char=False, newlines_in_values=False, ignore_empty_lines=True
    )
    for end, data in _text_blocks(path, start, block_bytes):
        where = _Where(path, first_line)
        read = csv.ReadOptions(column_names=list(names), block_size=max(1 << 20, len(data) // 4))
        try:
            table = csv.read_csv(pa.BufferReader(data), read, parse, convert).combine_chunks()
        except pa.ArrowInvalid as error:
            raise _bad_line(data, layout, len(names), where, error) from error
        arrays = {name: _one_array(table.column(name)) for name in columns}
        lines = data.count(b"\n") + (not data.endswith(b"\n"))
        if table.num_rows != lines:
            raise _bad_line(data, layout, len(names), where, ValueError(f"{lines} lines give {table.num_rows} rows"))
        yield Block(arrays, first_line, end, table.num_rows)
        first_line += table.num_rows


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    import pyarrow as pa

    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(column.chunks)


def _bad_line(data: bytes, layout: Layout, expected: int, where: _Where, error: Exception) -> UserError:
    """The first line of a block with the wrong number of columns."""
    delimiter = layout.delimiter.encode()
    for row, line in enumerate(data.splitlines()):
        found = line.count(delimiter) + 1
        if found != expected:
            return where.error(row, f"{found} columns found, expected {expected} of {layout.name}")
    return where.error(0, f"not readable as {layout.name}: {' '.join(str(error).split())[:200]}")


def _labels(array: pa.Array, name: str, where: _Where) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(array, pa.array([b"0", b"1"], array.type)).fill_null(-1).to_numpy(zero_copy_only=False)
    if (found < 0).any():
        row = _first(found < 0)
        text = array[row].as_py().decode("utf-8", "replace")
        raise where.error(row, f"{name} is {text!r}, expected 0 or 1")
    return found.astype(np.uint8)


# ---- the table of numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClickTable:
    """Encoded click data.

    Attributes:
        ids: (N, F) int32, the level of each field, -1 for a missing or rare one; in memory or mapped from a file.
        labels: (N,) uint8. fields: names. levels: C_f of each field.
        extras: (N,) int32 columns such as "day", "file" or "timestamp".
        folder: of the cache, ``None`` for data in memory.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    fields: tuple[str, ...]
    levels: tuple[int, ...]
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``rows`` (B,) -> ids (B, F) int32 and labels (B,) float32."""
        return self.ids.index_select(0, rows), self.labels.index_select(0, rows).float()

    def vocabulary(self, name: str) -> list[str]:
        """The text of each level of a field, in order of the ids.

        Raises:
            UserError: the field has fixed levels, or the table has no cache.
        """
        path = None if self.folder is None else _vocabulary_file(self.folder, self.fields.index(name))
        if path is None or not path.is_file():
            raise UserError(f"field {name} has no vocabulary")
        return path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]


def _vocabulary_file(folder: Path, index: int) -> Path:
    return folder / "vocabulary" / f"{index}.txt"


def _key(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """Name of a cache: what was read (size, both ends) and how."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:20]


def load_clicks(
    files: Sequence[Path],
    layout: Layout,
    fields: Sequence[Field],
    min_count: int = 20,
    *,
    counted: RowMask | None = None,
    counted_name: str = "",
    keep: RowMask | None = None,
    keep_name: str = "",
    cache: Path | None = None,
    block_bytes: int = BLOCK_BYTES,
    say: Callable[[str], None] | None = None,
) -> ClickTable:
    """Read text files into a cache of arrays, or open the cache when it is there already.

    Levels are numbered by falling count, then by their bytes, so the numbers depend on the data only.

    Args:
        files: one after another. layout: theirs. fields: the model's fields.
        min_count: levels met less often are unknown (-1), as missing ones are.
        counted: rows whose levels are counted (the training rows); ``counted_name`` tells it apart in the cache's name.
        keep: rows that are taken at all; ``keep_name`` likewise. Row numbers given to both masks count all lines.
        cache: parent folder of the cache; by default ``$XDG_CACHE_HOME/paper-reproductions/ctr``.
        block_bytes: text in memory at a time (the arrays do not depend on it).
        say: told about progress.

    Raises:
        UserError: anything wrong with the files (file, line, what was expected), a field whose vocabulary is empty, a
            full disk.
    """
    if min_count < 1:
        raise UserError(f"min_count is {min_count}, expected at least 1")
    for path in files:
        if not path.is_file():
            raise UserError(f"no file {path}; expected {layout.name} data ({layout.site})")
    if (counted is None) != (counted_name == "") or (keep is None) != (keep_name == ""):
        raise ValueError("a row mask and its name go together")
    settings = {
        "format": FORMAT,
        "layout": [layout.name, layout.delimiter, list(layout.columns), layout.label],
        "extras": [[e.name, e.column, e.rule] for e in layout.extras],
        "fields": [[f.name, f.column, f.rule] for f in fields],
        "min_count": min_count,
        "counted": counted_name,
        "keep": keep_name,
    }
    parent = cache_folder("ctr") if cache is None else cache
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / _key(files, settings)
    with open(parent / f".{final.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of a torchrun wait here for the first one
        if not (final / "meta.json").is_file():
            builder = _Builder(files, layout, fields, min_count, counted, keep, final, block_bytes, say)
            try:
                builder.build(settings)
            except OSError as error:
                raise disk_error(error, final) from error
    return open_clicks(final)


def open_clicks(folder: Path) -> ClickTable:
    """Open a cache that ``load_clicks`` made.

    Raises:
        UserError: incomplete.
    """
    meta = json.loads((folder / "meta.json").read_text())
    n, names = meta["rows"], meta["fields"]
    sizes = {"ids.i32": n * len(names) * 4, "labels.u8": n, **{f"{e}.i32": 4 * n for e in meta["extras"]}}
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise UserError(f"{folder / name} has {found} bytes, expected {size}; remove {folder} to build it anew")

    def mapped(name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_file(str(folder / name), shared=False, size=count, dtype=dtype)

    return ClickTable(
        ids=mapped("ids.i32", n * len(names), torch.int32).view(n, len(names)),
        labels=mapped("labels.u8", n, torch.uint8),
        fields=tuple(names),
        levels=tuple(meta["levels"]),
        extras={name: mapped(f"{name}.i32", n, torch.int32) for name in meta["extras"]},
        folder=folder,
    )


class _Builder:
    """Builds a cache in ``<final>.partial``: counting, then encoding, both resumable."""

    def __init__(
        self,
        files: Sequence[Path],
        layout: Layout,
        fields: Sequence[Field],
        min_count: int,
        counted: RowMask | None,
        keep: RowMask | None,
        final: Path,
        block_bytes: int,
        say: Callable[[str], None] | None,
    ) -> None:
        self.files, self.layout, self.fields, self.min_count = list(files), layout, list(fields), min_count
        self.counted, self.keep, self.final, self.block_bytes = counted, keep, final, block_bytes
        self.say = say or (lambda text: None)
        self.folder = final.with_name(final.name + ".partial")
        self.extras = ["file", *(e.name for e in layout.extras)]
        self.open_fields = [i for i, f in enumerate(fields) if f.rule not in FIXED_LEVELS]
        wanted = {layout.label, *(f.column for f in fields), *(e.column for e in layout.extras)}
        self.columns = [c for c in layout.columns if c in wanted]

    def build(self, settings: Mapping[str, Any]) -> None:
        """Make the cache complete and give it its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        vocabularies = self._vocabularies()
        rows, positives = self._encode(vocabularies)
        levels = [
            len(vocabularies[i]) if i in vocabularies else FIXED_LEVELS[f.rule] for i, f in enumerate(self.fields)
        ]
        meta = {
            "rows": rows,
            "positives": positives,
            "fields": [f.name for f in self.fields],
            "levels": levels,
            "extras": self.extras,
            "settings": dict(settings),
            "files": [path.name for path in self.files],
        }
        write_json(self.folder / "meta.json", meta)
        (self.folder / "progress.json").unlink(missing_ok=True)
        sync(self.folder)
        if self.final.is_dir():
            shutil.rmtree(self.final)  # left without meta.json by something else
        os.rename(self.folder, self.final)
        self.say(f"{rows:,} rows, {sum(levels):,} levels, cached in {self.final}")

    def _walk(
        self, at: Mapping[str, int]
    ) -> Iterator[tuple[int, int, Block, _Where, np.ndarray, dict[str, np.ndarray]]]:
        """(file number, first row, block, where, rows kept, extras) from a position on."""
        row = at["row"]
        for number in range(at["file"], len(self.files)):
            here = number == at["file"]
            start, line = (at["offset"], at["line"]) if here else (0, 1)
            for block in read_blocks(
                self.files[number], self.layout, self.columns, start, line, block_bytes=self.block_bytes
            ):
                where = _Where(self.files[number], block.first_line)
                extras = {"file": np.full(block.rows, number)}
                for item in self.layout.extras:
                    extras[item.name] = np.asarray(_levels(block.columns[item.column], item, where))
                kept = np.ones(block.rows, bool) if self.keep is None else self.keep(row, block.rows, extras)
                yield number, row, block, where, kept, extras
                row += block.rows

    # -- pass 1

    def _vocabularies(self) -> dict[int, pa.Array]:
        """The levels of each field without fixed ones, in order of their ids."""
        done = self.folder / "vocabulary"
        if not done.is_dir():
            self._count(done)
        import pyarrow as pa

        out = {}
        for i in self.open_fields:
            text = _vocabulary_file(self.folder, i).read_bytes()
            out[i] = pa.array(text.split(b"\n")[:-1], pa.binary())
        return out

    def _count(self, target: Path) -> None:
        import pyarrow as pa

        counts, at = self._saved_counts()
        for blocks, (number, row, block, where, kept, extras) in enumerate(self._walk(at), 1):
            _labels(block.columns[self.layout.label], self.layout.label, where)  # a bad label is told in the first pass
            if self.counted is not None:
                kept = kept & self.counted(row, block.rows, extras)
            mask = None if kept.all() else pa.array(kept)
            for i, item in enumerate(self.fields):
                levels: Any = _levels(block.columns[item.column], item, where)
                if i in counts:
                    counts[i].add(levels if mask is None else levels.filter(mask))
            at = {
                "file": number,
                "offset": block.end,
                "line": block.first_line + block.rows,
                "row": row + block.rows,
            }
            if blocks % SAVE_EVERY == 0:
                self._save_counts(counts, at)
                self.say(f"counted the levels of {at['row']:,} rows")
        if at["row"] == 0:
            raise UserError(f"{self.files[0]} has no rows; expected {self.layout.name} data")
        temporary = target.with_name("vocabulary.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for i in self.open_fields:
            values = counts[i].frequent(self.min_count)
            if not values:
                raise UserError(
                    f"field {self.fields[i].name} of {self.files[0]}: no level occurs at least {self.min_count} times; "
                    "try a lower --min-count"
                )
            path = temporary / f"{i}.txt"
            path.write_bytes(b"".join(value + b"\n" for value in values))
            sync(path)
        os.rename(temporary, target)
        for path in self.folder.glob("counts-*"):
            shutil.rmtree(path)

    def _saved_counts(self) -> tuple[dict[int, _Counts], dict[str, int]]:
        """Counts and position of an interrupted first pass."""
        from pyarrow import feather

        fresh = {i: _Counts() for i in self.open_fields}
        for path in sorted(self.folder.glob("counts-*"), reverse=True):
            if (path / "at.json").is_file():
                for i in self.open_fields:
                    fresh[i].table = feather.read_table(path / f"{i}.feather", memory_map=False)
                return fresh, json.loads((path / "at.json").read_text())
        return fresh, {"file": 0, "offset": 0, "line": 1, "row": 0}

    def _save_counts(self, counts: Mapping[int, _Counts], at: Mapping[str, int]) -> None:
        from pyarrow import feather

        path = self.folder / f"counts-{at['row']:015d}"
        temporary = self.folder / "counts.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for i, value in counts.items():
            feather.write_feather(value.merged(), temporary / f"{i}.feather", compression="lz4")
        write_json(temporary / "at.json", dict(at))
        os.rename(temporary, path)
        for old in self.folder.glob("counts-*"):
            if old != path:
                shutil.rmtree(old)

    # -- pass 2

    def _encode(self, vocabularies: Mapping[int, pa.Array]) -> tuple[int, int]:
        """Write the arrays; (rows, positives)."""
        import pyarrow.compute as pc

        width = len(self.fields)
        row_bytes = {"ids.i32": 4 * width, "labels.u8": 1, **{f"{e}.i32": 4 for e in self.extras}}
        progress = self.folder / "progress.json"
        at = {"file": 0, "offset": 0, "line": 1, "row": 0, "written": 0, "positives": 0}
        if progress.is_file():
            at = json.loads(progress.read_text())
        outputs = {}
        try:
            for name, size in row_bytes.items():
                outputs[name] = open(self.folder / name, "r+b" if (self.folder / name).exists() else "w+b")
                outputs[name].truncate(at["written"] * size)  # what was written behind the last saved position
                outputs[name].seek(0, os.SEEK_END)
            for number, row, block, where, kept, extras in self._walk(at):
                ids = np.empty((block.rows, width), np.int32)
                for i, item in enumerate(self.fields):
                    levels = _levels(block.columns[item.column], item, where)
                    if i in vocabularies:
                        found = pc.index_in(levels, vocabularies[i]).fill_null(-1)
                        ids[:, i] = found.to_numpy(zero_copy_only=False)
                    else:
                        ids[:, i] = levels
                labels = _labels(block.columns[self.layout.label], self.layout.label, where)[kept]
                outputs["ids.i32"].write(ids[kept].tobytes())
                outputs["labels.u8"].write(labels.tobytes())
                for name, values in extras.items():
                    outputs[f"{name}.i32"].write(values[kept].astype(np.int32).tobytes())
                for file in outputs.values():
                    file.flush()
                    os.fsync(file.fileno())
                at = {
                    "file": number,
                    "offset": block.end,
                    "line": block.first_line + block.rows,
                    "row": row + block.rows,
                    "written": at["written"] + int(kept.sum()),
                    "positives": at["positives"] + int(labels.sum()),
                }
                write_json(progress, at)
                self.say(f"encoded {at['row']:,} rows")
        finally:
            for file in outputs.values():
                file.close()
        return at["written"], at["positives"]


class _Counts:
    """How often each level of a field was met; merged when the pieces have grown as large as the whole."""

    def __init__(self) -> None:
        self.table: pa.Table | None = None
        self.pieces: list[pa.Table] = []
        self.pending = 0

    def add(self, levels: pa.Array) -> None:
        """Count an array of levels."""
        import pyarrow as pa

        counted = levels.value_counts()
        piece = pa.table({"level": counted.field("values"), "count": counted.field("counts")})
        self.pieces.append(piece)
        self.pending += piece.num_rows
        if self.pending > max(1 << 20, 0 if self.table is None else self.table.num_rows):
            self.merged()

    def merged(self) -> pa.Table:
        """One row per level."""
        import pyarrow as pa

        parts = ([] if self.table is None else [self.table]) + self.pieces
        if not parts:
            return pa.table({"level": pa.array([], pa.binary()), "count": pa.array([], pa.int64())})
        if len(parts) > 1 or self.table is None:
            grouped = pa.concat_tables(parts).group_by("level").aggregate([("count", "sum")])
            self.table = pa.table({"level": grouped["level"], "count": grouped["count_sum"]}).combine_chunks()
        self.pieces, self.pending = [], 0
        assert self.table is not None
        return self.table

    def frequent(self, least: int) -> list[bytes]:
        """Levels met at least ``least`` times, by falling count, then by their bytes; the empty text is no level."""
        import pyarrow.compute as pc

        table = self.merged()
        table = table.filter(pc.greater_equal(table["count"], least))
        rows = zip(table["level"].to_pylist(), table["count"].to_pylist(), strict=True)
        return [level for level, _ in sorted(((v, n) for v, n in rows if v), key=lambda item: (-item[1], item[0]))]


# ---- MovieLens-100k ------------------------------------------------------------------------------------------------

MOVIELENS_FIELDS = (
    "user",
    "item",
    "age",
    "gender",
    "occupation",
    "zip",
    "decade",
    "genre",
    "hour",
    "weekday",
)
_ATOMIC = {
    "inter": ("user_id", "item_id", "rating", "timestamp"),
    "item": ("item_id", "movie_title", "release_year", "class"),
    "user": ("user_id", "age", "gender", "occupation", "zip_code"),
}


def recbole_movielens() -> Path | None:
    """The MovieLens-100k folder inside the installed wheel ``recbole``, which is looked up and never imported."""
    found = importlib.util.find_spec("recbole")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file():
            return folder
    return None


def read_atomic(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """A RecBole atomic file (tab-separated, header of ``name:type``) as columns of bytes (dtype object).

    Raises:
        UserError: missing, a column lacking, a line with another number of columns.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; expected a RecBole atomic file with {', '.join(needed)}")
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8", "replace").strip("\r\n").split("\t")
    names = {name.split(":")[0]: name for name in header}
    lacking = [name for name in needed if name not in names]
    if lacking:
        raise UserError(f"{path}, line 1: the header lacks {', '.join(lacking)}; expected {', '.join(needed)}")
    layout = Layout("RecBole atomic", (path.name,), "recbole.io", "\t", tuple(header), True, "")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in needed}
    for block in read_blocks(path, layout, [names[name] for name in needed]):
        for name in needed:
            parts[name].append(block.columns[names[name]].to_numpy(zero_copy_only=False))
    return {name: np.concatenate(p) if p else np.empty(0, object) for name, p in parts.items()}


def movielens(folder: Path | None = None, threshold: float = 4.0) -> ClickTable:
    """MovieLens-100k as click data with ten categorical fields; a click is a rating of at least ``threshold``.

    Fields: user, item, age in steps of five years, gender, occupation, first two characters of the zip code, decade of
    the film, its first genre, hour of the day and weekday (UTC). ``extras["timestamp"]`` holds seconds since 1970; rows
    stay in the file's order.

    Args:
        folder: with ``ml-100k.inter``, ``.item`` and ``.user`` as RecBole's atomic files; by default those inside the
            installed wheel ``recbole``.

    Raises:
        UserError: nothing there, or a malformed file.
    """
    where = recbole_movielens() if folder is None else folder
    if where is None:
        raise UserError("no MovieLens-100k: expected the package recbole (read as files) or --data with ml-100k.inter")
    stem = "ml-100k"
    inter = read_atomic(where / f"{stem}.inter", _ATOMIC["inter"])
    item = read_atomic(where / f"{stem}.item", _ATOMIC["item"])
    user = read_atomic(where / f"{stem}.user", _ATOMIC["user"])
    try:
        rating = inter["rating"].astype(np.float64)
        time = inter["timestamp"].astype(np.float64).astype(np.int64)
        age = user["age"].astype(np.int64) // 5
    except ValueError as error:
        raise UserError(f"{where}: rating, timestamp and age have to be numbers ({error})") from error

    def join(key: np.ndarray, keys: np.ndarray, values: np.ndarray, name: str) -> np.ndarray:
        order = np.argsort(keys)
        at = np.minimum(np.searchsorted(keys[order], key), len(keys) - 1)
        at = order[at]
        if (keys[at] != key).any():
            row = _first(keys[at] != key)
            raise UserError(f"{where / stem}.inter, line {row + 2}: {name} {key[row].decode()} is in no {name} file")
        return values[at]

    def of_user(values: np.ndarray) -> np.ndarray:
        return join(inter["user_id"], user["user_id"], values, "user")

    def of_item(values: np.ndarray) -> np.ndarray:
        return join(inter["item_id"], item["item_id"], values, "item")

    columns = {
        "user": inter["user_id"],
        "item": inter["item_id"],
        "age": of_user(age),
        "gender": of_user(user["gender"]),
        "occupation": of_user(user["occupation"]),
        "zip": of_user(np.array([z[:2] for z in user["zip_code"]], object)),
        "decade": of_item(np.array([y[:3] for y in item["release_year"]], object)),
        "genre": of_item(np.array([g.split(b" ")[0] for g in item["class"]], object)),
        "hour": time // 3600 % 24,
        "weekday": (time // 86400 + 3) % 7,  # 1 January 1970 was a Thursday
    }
    ids, levels = [], []
    for name in MOVIELENS_FIELDS:
        values, codes = np.unique(columns[name], return_inverse=True)
        missing = int(values.dtype == object and values[0] == b"")  # the empty text sorts first
        ids.append(codes.astype(np.int32) - missing)
        levels.append(len(values) - missing)
    return ClickTable(
        ids=torch.from_numpy(np.stack(ids, 1)),
        labels=torch.from_numpy((rating >= threshold).astype(np.uint8)),
        fields=MOVIELENS_FIELDS,
        levels=tuple(levels),
        extras={"timestamp": torch.from_numpy(time.astype(np.int32))},
    )


# ---- metrics -------------------------------------------------------------------------------------------------------


def auc(labels: torch.Tensor, scores: torch.Tensor) -> float:
    """Exact area under the ROC curve, ties counted half.

    Args:
        labels: (N,) 0 and 1. scores: (N,), any increasing function of the probability.

    Raises:
        UserError: only one class (the area is not defined), or a score that is not a number.
    """
    y = labels.detach().cpu().numpy().astype(bool)
    s = scores.detach().cpu().double().numpy()
    if np.isnan(s).any():
        raise UserError(f"AUC undefined: {int(np.isnan(s).sum())} of {len(s)} scores are not numbers")
    positives = int(y.sum())
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        raise UserError(f"AUC undefined: only class {int(positives > 0)} present in {len(y)} rows")
    order = np.argsort(s, kind="stable")
    s, y = s[order], y[order]
    first = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    last = np.append(first[1:], len(s))
    ranks = np.repeat((first + 1 + last) / 2, last - first)  # the mean rank of equal scores
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(labels: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean negative log likelihood of ``labels`` (N,) under ``logits`` (N,), computed in float64."""
    x, y = logits.detach().double(), labels.detach().double()
    return float((torch.nn.functional.softplus(x) - x * y.to(x.device)).mean())
