"""Drum performances as MIDI and as lines: the Groove MIDI Dataset, files of completions, and grooves made by rules for
the default run. A line, one sixteenth note, is a number from 0 to 63 with a bit for each column of ``NOTES``."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import UserError

SPLITS = {"train": "train", "validation": "dev", "test": "test"}
COLUMNS = ("session", "id", "beat_type", "midi_filename", "split")
EXPECTED = {"train": 373, "dev": 47, "test": 37}
"""Counts of the complete data set."""
MEASURE = 16
NOTES: dict[str, tuple[int, ...]] = {
    "crash": (49, 55, 57, 52),
    "ride": (51, 53, 59),
    "snare": (38, 40, 37),
    "kick": (36,),
    "hi-hat": (42, 46, 22, 26),
    "toms": (50, 48, 47, 45, 43, 58),
}
"""General MIDI and Roland notes of each column; the first is the one that is written."""
IGNORED = (44, 54, 56, 39)
_BITS = np.full(128, -1, dtype=np.int64)
for _k, _notes in enumerate(NOTES.values()):
    _BITS[list(_notes)] = 1 << (5 - _k)
_BITS[list(IGNORED)] = 0


@dataclass(frozen=True)
class Piece:
    """A groove: its name, its part of the data set, its lines (numbers from 0 to 63) and the beats of its measure."""

    name: str
    split: str
    lines: np.ndarray
    beats: int = 4


# ---- MIDI ------------------------------------------------------------------------------------------------------------


def read_midi(content: bytes, name: str = "the file") -> tuple[np.ndarray, int] | None:
    """Lines of the first 16 measures and beats of a measure, ``None`` where a beat is no quarter note.

    A note counts for the nearest sixteenth, halves up; velocities and lengths are dropped.

    Raises:
        UserError: not a MIDI file, without notes, or with a note that belongs to no column.
    """
    import symusic  # here and below: only where MIDI is read or written

    if content[:4] != b"MThd" or len(content) < 14:
        raise UserError(f"{name} is no MIDI file: it begins with {content[:4]!r}, expected b'MThd'")
    if content[8:10] == b"\x00\x02":
        raise UserError(f"{name} is a MIDI file of type 2 (independent patterns), expected type 0 or 1")
    try:
        score = symusic.Score.from_midi(content)
    except Exception as error:
        raise UserError(f"{name} is no readable MIDI file: {error}") from error
    signature = score.time_signatures[-1] if len(score.time_signatures) else None
    beats, unit = (4, 4) if signature is None else (signature.numerator, signature.denominator)
    if unit != 4:
        return None
    tracks = [track for track in score.tracks if len(track.notes)]
    if not tracks:
        raise UserError(f"{name} has no notes")
    arrays = [track.notes.numpy() for track in tracks]
    time = np.concatenate([a["time"] for a in arrays]).astype(np.int64)
    pitch = np.concatenate([a["pitch"] for a in arrays]).astype(np.int64)
    beat = score.ticks_per_quarter
    place = (time + beat // 8) // (beat // 4)
    length = 16 * beats * 4
    inside = place < length
    place, pitch = place[inside], pitch[inside]
    bits = _BITS[pitch]
    if (bits < 0).any():
        wrong = int((bits < 0).argmax())
        raise UserError(
            f"{name}: note {pitch[wrong]} at tick {time[inside][wrong]} is none of the {len(NOTES)} columns' notes"
        )
    lines = np.zeros(length, dtype=np.int64)
    np.bitwise_or.at(lines, place, bits)
    return lines, beats


def write_midi(lines: np.ndarray, path: Path, bpm: float = 120.0, drop_leading_rests: bool = False) -> None:
    """A MIDI file at 480 ticks a beat on the drum channel; a line is 120 ticks.

    ``drop_leading_rests``: begin at the first hit, as the authors' script does.
    """
    import symusic

    lines = np.asarray(lines)
    if drop_leading_rests and lines.any():
        lines = lines[int((lines > 0).argmax()) :]
    score = symusic.Score(480)
    score.tempos.append(symusic.Tempo(0, bpm))
    score.time_signatures.append(symusic.TimeSignature(0, 4, 4))
    track = symusic.Track("drums", program=0, is_drum=True)
    for column, notes in enumerate(NOTES.values()):
        for place in np.flatnonzero(lines >> (5 - column) & 1):
            track.notes.append(symusic.Note(int(place) * 120, 60, notes[0], 100))
    track.notes.sort(key=lambda note: note.time, inplace=True)
    score.tracks.append(track)
    score.dump_midi(str(path))


# ---- the Groove MIDI Dataset -----------------------------------------------------------------------------------------


class _Files:
    """Files of a folder or of a zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip = zipfile.ZipFile(path) if path.is_file() else None
        self.names = set(self.zip.namelist()) if self.zip is not None else set()

    def read(self, name: str) -> bytes:
        """Raises ``UserError`` for a missing file."""
        if self.zip is not None:
            if name not in self.names:
                raise UserError(f"{self.path} has no {name}")
            return self.zip.read(name)
        if not (self.path / name).is_file():
            raise UserError(f"{self.path / name} is missing")
        return (self.path / name).read_bytes()


def groove_path(folder: Path) -> Path:
    """Where the data set lies: a folder with ``groove/info.csv``, or the archive as it is distributed.

    Raises:
        UserError: neither, with what was looked for.
    """
    places = [folder, folder / "groove-midi"]
    for place in places:
        if (place / "groove" / "info.csv").is_file():
            return place
        archives = sorted(place.glob("groove-v*midionly.zip")) if place.is_dir() else []
        if archives:
            return archives[-1]
    raise UserError(f"{folder} holds neither groove/info.csv nor groove-v1.0.0-midionly.zip (Groove MIDI Dataset)")


def groove_rows(files: _Files) -> list[dict[str, str]]:
    """Rows of info.csv that the paper uses: beats (no fills), not of the evaluation sessions.

    Raises:
        UserError: a column is missing or a split unknown.
    """
    rows = list(csv.DictReader(io.StringIO(files.read("groove/info.csv").decode("utf-8"))))
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise UserError(f"{files.path}: info.csv has no column {missing[0]}, expected {', '.join(COLUMNS)}")
    unknown = sorted({row["split"] for row in rows} - set(SPLITS))
    if unknown:
        raise UserError(f"{files.path}: info.csv has the split {unknown[0]!r}, expected {', '.join(SPLITS)}")
    return [row for row in rows if row["beat_type"] == "beat" and not row["session"].endswith("/eval_session")]


def read_groove(folder: Path) -> list[Piece]:
    """All texts of the data set, in the order of info.csv; pieces that are not in quarter notes are left out."""
    files = _Files(groove_path(folder))
    pieces = []
    for row in groove_rows(files):
        name = row["midi_filename"]
        found = read_midi(files.read(f"groove/{name}"), name)
        if found is not None:
            drummer = name.split("/")[0].removeprefix("drummer")
            pieces.append(Piece(f"{drummer}_{Path(name).stem}", SPLITS[row["split"]], *found))
    return pieces


def check(folder: Path | None) -> list[str]:
    """What ``--check-data`` says about the data set and the authors' outputs.

    Raises:
        UserError: the data set is not there or cannot be read.
    """
    if folder is None:
        raise UserError("--dataset groove needs --data DIR")
    pieces = read_groove(folder)
    out = [f"groove: {groove_path(folder)}"]
    for split in ("train", "dev", "test"):
        texts = sum(p.split == split for p in pieces)
        out.append(f"{split}: {texts} pieces in quarter notes, expected {EXPECTED[split]}")
    return out


# ---- texts and completions -------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines, plain or compressed by gzip.

    Raises:
        UserError: missing, or a line that is no object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected JSON lines with name, text and model")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: {error.msg}, expected one JSON object a line") from error
                if not isinstance(value, dict):
                    raise UserError(f"{path}, line {number}: expected an object, got {type(value).__name__}")
                yield value
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_completions(path: Path, split: str) -> dict[str, dict[str, str]]:
    """Model -> name -> text (prompt and completion, without ``SEP`` lines) of what any model wrote.

    Raises:
        UserError: an object lacks name or text.
    """
    out: dict[str, dict[str, str]] = {}
    for number, row in enumerate(json_lines(path), 1):
        if not isinstance(row.get("name"), str) or not isinstance(row.get("text"), str):
            raise UserError(f"{path}, line {number}: expected name and text, got {', '.join(sorted(row))}")
        if row.get("split", split) == split:
            out.setdefault(str(row.get("model", "completions")), {})[row["name"]] = row["text"]
    return out


# ---- grooves made by rules -------------------------------------------------------------------------------------------

STYLES = {
    # probabilities of each sixteenth for kick and snare, the cymbal's grid, its column, and ghost notes
    "rock": ("9000000080010000", "0000900000009000", 2, 1, 0.03),
    "funk": ("9004003000600300", "0000900100009001", 1, 1, 0.12),
    "disco": ("9000900090009000", "0000900000009000", 2, 1, 0.02),
    "swing": ("4000200040002000", "0000300000003001", 4, 4, 0.05),
    "samba": ("9003900390039003", "0030030000300300", 1, 4, 0.08),
    "half-time": ("9000001000100040", "0000000090000000", 2, 1, 0.04),
}
"""Digits are tenths."""


def _pattern(rng: np.random.Generator, style: str) -> np.ndarray:
    """(16, 6) booleans: the measure that a piece repeats."""
    kick, snare, grid, cymbal, ghost = STYLES[style]
    hit = np.zeros((MEASURE, 6), dtype=bool)
    hit[:, 3] = rng.random(MEASURE) < np.array([int(d) for d in kick]) / 10
    hit[:, 2] = rng.random(MEASURE) < np.maximum(np.array([int(d) for d in snare]) / 10, ghost)
    column = 1 if cymbal == 4 or rng.random() < 0.25 else 4
    hit[::grid, column] = True
    hit[:, column] &= rng.random(MEASURE) < 0.97
    return hit


def _varied(rng: np.random.Generator, hit: np.ndarray, rate: float) -> np.ndarray:
    """A measure with some of its kicks, snares and cymbals changed."""
    flip = rng.random(hit.shape) < rate * np.array([0, 0.5, 1, 1, 0.5, 0])
    off_beat = np.arange(MEASURE)[:, None] % 4 > 0  # beats stay
    return hit ^ (flip & off_beat)


def _fill(rng: np.random.Generator, hit: np.ndarray) -> np.ndarray:
    """The last beats of a measure played on snare and toms."""
    out, begin = hit.copy(), int(rng.choice([8, 12]))
    length = MEASURE - begin
    out[begin:] = False
    snare = np.arange(length) < length // 2 if rng.random() < 0.5 else rng.random(length) < 0.5
    strokes = rng.random(length) < 0.85
    out[begin:, 2], out[begin:, 5] = strokes & snare, strokes & ~snare
    out[begin:, 3] = rng.random(length) < 0.2
    return out


def make_groove(seed: tuple[int, ...], measures: int = 16) -> np.ndarray:
    """Lines of a generated piece: a measure with a variant in turns, small changes, fills, and a crash after a fill."""
    rng = np.random.default_rng(seed)
    style = list(STYLES)[int(rng.integers(len(STYLES)))]
    first = _pattern(rng, style)
    second = _varied(rng, first, 0.15) if rng.random() < 0.6 else first
    period, loose = int(rng.choice([4, 8])), float(rng.choice([0.0, 0.01, 0.03]))
    rows, filled = [], False
    for number in range(measures):
        hit = _varied(rng, first if number % 2 == 0 else second, loose)
        if number % period == period - 1 and rng.random() < 0.9:
            hit = _fill(rng, hit)
        if filled or number == 0:
            hit[0, 0] = True
        filled = number % period == period - 1
        rows.append(hit)
    return np.concatenate(rows) @ (1 << np.arange(5, -1, -1))


def generated(counts: dict[str, int], seed: int = 0) -> list[Piece]:
    """Pieces of 16 measures for each part of the data; the parts share no piece."""
    return [
        Piece(f"{split}-{i}", split, make_groove((seed, part, i)))
        for part, split in enumerate(("train", "dev", "test"))
        for i in range(counts[split])
    ]


def read_piece(path: Path) -> np.ndarray | str:
    """A text file as it is, or the lines of a MIDI file, to continue.

    Raises:
        UserError: missing, unreadable, or not in 4/4.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a groove as text or MIDI")
    if path.suffix in (".mid", ".midi"):
        found = read_midi(path.read_bytes(), str(path))
        if found is None or found[1] != 4:
            raise UserError(f"{path} is not in 4/4")
        return found[0]
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}") from error
