"""The command line that every paper answers alike: a frozen dataclass and a dictionary of presets.

Nothing here imports torch before the command is known to be good, so bad usage and ``--list-presets`` answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from shared.errors import UserError
from shared.files import read_json, write_json
from shared.paper import read_paper

if TYPE_CHECKING:
    from shared.run import Run


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
        config: the paper's Config. seeds: how many (0, 1, ...) or which. data: the data set, for the reader.
        hardware, hours: what it takes (``hours`` expected on that hardware). needs_data: ``--data`` is required.
        claims: whether the claims of paper.toml are decided by this preset.
        why_not_comparable: why its numbers do not stand beside the paper's; ``None`` when they do.
        note: anything else ``--list-presets`` should say.
    """

    config: Any
    seeds: int | Sequence[int] = 1
    data: str = ""
    hardware: str = "2 CPU cores"
    hours: float = 0.0
    needs_data: bool = False
    claims: bool = True
    why_not_comparable: str | None = None
    note: str = ""

    def seed_list(self) -> list[int]:
        """The seeds as a list."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)


@dataclass(frozen=True)
class House:
    """Options of every paper."""

    preset: str = "default"
    """Configuration to run; --list-presets names them."""
    list_presets: bool = False
    """Print the presets with data set, hardware and expected hours, then stop."""
    data: Path | None = None
    """Folder with the real data in its official layout."""
    check_data: bool = False
    """Say what was found in --data, what is missing and the counts, then stop."""
    seed: int | None = None
    """Run this one seed."""
    seeds: int | None = None
    """Run seeds 0 .. N-1 and report mean and standard deviation."""
    out: Path | None = None
    """Folder of the run (default: runs/<preset>-<time>)."""
    resume: Path | None = None
    """Go on with the run in this folder from its last checkpoint."""
    stop_after: int | None = None
    """Write a checkpoint after this many optimiser steps (or units of work) and stop."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Floating-point precision."""
    compile: bool = False
    """Compile the model with torch.compile."""
    check: bool = False
    """Exit with 1 when the verdict on a claim differs from what paper.toml expects."""


@dataclass(frozen=True)
class Command:
    """A parsed command line. ``given`` are the names of the Config fields that stood on it."""

    house: House
    config: Any
    preset: Preset
    seeds: list[int]
    given: frozenset[str]
    argv: tuple[str, ...] = field(default=())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """(flag with dashes, value after '=' or None) of the words that are flags."""
    out = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, _, value = word.partition("=")
            out.append((name.replace("_", "-"), value if "=" in word else None))
    return out


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag, read ahead of the real parser; the last one counts."""
    found = None
    for i, word in enumerate(argv):
        name, sign, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value if sign else (argv[i + 1] if i + 1 < len(argv) else None)
    return found


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(sorted(known))}"


def _bools(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if f.type in (bool, "bool")}


def _tyro(arguments: type, default: Any, argv: Sequence[str]) -> Any:
    """Parse with tyro; its boxes become one line."""
    import tyro

    if any(word in ("-h", "--help") for word in argv):
        return tyro.cli(arguments, default=default, args=list(argv), prog="train.py")  # prints and exits with 0
    messages = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # one line of a message stays one line
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
            return tyro.cli(arguments, default=default, args=list(argv), prog="train.py")
    except SystemExit:
        text = re.sub(r"\x1b\[[0-9;]*m", "", messages.getvalue())
        lines = [line.strip(" │╭╰─╮╯") for line in text.splitlines()]
        body: list[str] = []
        rules = 0
        for line in lines:
            if line and set(line) <= {"-"}:
                rules += 1
            elif rules == 1 and line:
                body.append(line)
        message = " ".join(body) or " ".join(line for line in lines if line)
        raise UserError(message.removeprefix("Error parsing config: ").removeprefix("Error parsing ")) from None
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def parse(config_type: type, presets: Mapping[str, Preset], argv: Sequence[str], folder: Path) -> Command:
    """Parse and check a command line.

    Raises:
        UserError: anything wrong with it: unknown flag or preset (nearest match named), bad value, contradiction.
    """
    fields = {f.name for f in dataclasses.fields(config_type)}
    house_fields = {f.name for f in dataclasses.fields(House)}
    clash = sorted(fields & house_fields)
    if clash:
        raise TypeError(f"Config field {clash[0]!r} is a flag of the house")
    known = {_flag(name): name for name in fields | house_fields}
    known |= {_flag("no_" + name): name for name in _bools(config_type)}
    given = set()
    for flag, _ in _words(argv):
        if flag == "--help":
            continue
        if flag not in known:
            raise UserError(f"unknown flag {flag}{_nearest(flag, list(known))}")
        if known[flag] in fields:
            given.add(known[flag])

    resume = _value(argv, "--resume")
    name = _value(argv, "--preset") or "default"
    stored: dict[str, Any] | None = None
    if resume is not None:
        stored = _stored(Path(resume), folder)
        if _value(argv, "--preset") not in (None, stored["preset"]):
            raise UserError(f"--preset {name}: the run in {resume} is of preset {stored['preset']}")
        name = stored["preset"]
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{_nearest(name, list(presets))}")
    preset = presets[name]
    default = preset.config if stored is None else _config_from(config_type, stored["config"], Path(resume or ""))

    import tyro

    prefixless = tyro.conf.OmitArgPrefixes
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("house", Annotated[House, tyro.conf.FlagCreatePairsOff, prefixless]),
            ("config", Annotated[config_type, prefixless]),
        ],
        frozen=True,
    )
    arguments.__doc__ = (
        getattr(sys.modules.get(config_type.__module__), "__doc__", None) or config_type.__doc__ or ""
    ).strip()
    try:
        parsed: Any = _tyro(arguments, arguments(House(preset=name), default), argv)
    except ValueError as error:  # raised by Config.__post_init__
        raise UserError(str(error)) from error
    house: House = parsed.house
    config = parsed.config
    if stored is not None:
        differ = [
            f"{f} is {getattr(default, f)!r} there and {getattr(config, f)!r} here"
            for f in sorted(given)
            if getattr(config, f) != getattr(default, f)
        ]
        if differ:
            raise UserError(f"--resume {resume}: the configuration of a run cannot change: {'; '.join(differ)}")
        if house.out is not None:
            raise UserError("--out and --resume contradict each other: a resumed run stays in its folder")
    return _checked(house, config, preset, stored, frozenset(given), tuple(argv))


def _checked(
    house: House,
    config: Any,
    preset: Preset,
    stored: dict[str, Any] | None,
    given: frozenset[str],
    argv: tuple[str, ...],
) -> Command:
    if house.seed is not None and house.seeds is not None:
        raise UserError("--seed and --seeds contradict each other: give one seed, or a number of seeds")
    for flag, value, least in (
        ("--seed", house.seed, 0),
        ("--seeds", house.seeds, 1),
        ("--stop-after", house.stop_after, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} is {value}, expected at least {least}")
    seeds = preset.seed_list()
    if house.seed is not None:
        seeds = [house.seed]
    if house.seeds is not None:
        seeds = list(range(house.seeds))
    if stored is not None:
        if (house.seed is not None or house.seeds is not None) and seeds != stored["seeds"]:
            raise UserError(f"--resume {house.resume}: the run has seeds {stored['seeds']}, asked for {seeds}")
        seeds = stored["seeds"]
        if house.data is None and stored.get("data"):
            house = dataclasses.replace(house, data=Path(stored["data"]))
        for name in ("precision", "device"):
            if f"--{name}" not in {flag for flag, _ in _words(argv)}:
                house = dataclasses.replace(house, **{name: stored[name]})
    if house.data is not None and not house.data.exists():
        raise UserError(f"--data {house.data}: no such folder; expected {preset.data or 'the real data'} there")
    if house.data is not None and not house.data.is_dir():
        raise UserError(f"--data {house.data} is a file, expected the folder that holds {preset.data or 'the data'}")
    if preset.needs_data and house.data is None and not house.list_presets:
        raise UserError(f"preset {house.preset} needs --data DIR with {preset.data}; see Data in README.md")
    if house.out is not None and not house.check_data and not house.list_presets:
        if house.out.exists() and (not house.out.is_dir() or any(house.out.iterdir())):
            raise UserError(
                f"--out {house.out} already holds something; go on with --resume {house.out}, or name another"
            )
    if house.resume is not None and house.check_data:
        raise UserError("--check-data and --resume contradict each other")
    return Command(house, config, preset, seeds, given, argv)


def _stored(run: Path, folder: Path) -> dict[str, Any]:
    """config.json of a run to be resumed, checked."""
    if not (run / "config.json").is_file():
        raise UserError(f"--resume {run}: no run there (no config.json); expected the folder that an earlier run wrote")
    stored = read_json(run / "config.json", "--resume")
    lacking = (
        sorted({"paper", "preset", "seeds", "config", "device", "precision"} - set(stored))
        if isinstance(stored, dict)
        else ["all"]
    )
    if lacking:
        raise UserError(f"--resume {run}: config.json lacks {lacking[0]}; was it written by another program?")
    if stored["paper"] != folder.name and stored["paper"] != read_paper(folder).slug:
        raise UserError(f"--resume {run}: a run of {stored['paper']}, expected one of {folder.name}")
    return stored


def _config_from(config_type: type, stored: dict[str, Any], run: Path) -> Any:
    """The Config of a stored run."""
    fields = {f.name for f in dataclasses.fields(config_type)}
    differ = sorted(fields ^ set(stored))
    if differ:
        raise UserError(f"--resume {run}: Config and config.json differ in {', '.join(differ)}; was the code changed?")
    values = {k: _tuples(v) for k, v in stored.items()}
    try:
        return config_type(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"--resume {run}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def list_presets(presets: Mapping[str, Preset]) -> str:
    """The presets as a table."""
    header = ("preset", "data", "hardware", "hours", "seeds", "")
    body = []
    for name, preset in presets.items():
        hours = f"{preset.hours:.2g}" if preset.hours else "?"
        need = "needs --data" if preset.needs_data else ""
        remark = "; ".join(part for part in (need, preset.why_not_comparable or "", preset.note) if part)
        body.append((name, preset.data, preset.hardware, hours, str(len(preset.seed_list())), remark))
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    rows = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *body]]
    return "\n".join(rows)


def _fail(error: BaseException) -> int:
    rank = os.environ.get("RANK", "0")  # under torchrun every process sees the same mistake: it is told once
    head = "error" if rank == "0" else f"process {rank}"
    print(f"{head}: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def precheck(config_type: type, presets: Mapping[str, Preset], argv: Sequence[str] | None = None) -> None:
    """Answer bad usage, ``--help`` and ``--list-presets`` and exit; return when there is something to run.

    Call it in ``train.py`` between the presets and ``import torch``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    folder = Path(sys.modules[config_type.__module__].__file__ or ".").resolve().parent
    try:
        command = parse(config_type, presets, words, folder)
    except UserError as error:
        raise SystemExit(_fail(error)) from None
    if command.house.list_presets:
        print(list_presets(presets))
        raise SystemExit(0)


def main(
    config_type: type,
    presets: Mapping[str, Preset],
    train: Callable[[Any, Run], None],
    check_data: Callable[[Any, Path | None], list[str]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a paper's command and return its exit code.

    Args:
        config_type: the frozen dataclass. presets: its named values; ``default`` and ``smoke`` are expected.
        train: ``train(config, run)`` does the work: units, claims, figure.
        check_data: ``check_data(config, folder)`` returns the lines of ``--check-data``.
        argv: the words after ``train.py``; ``sys.argv`` by default.

    Returns:
        0; 1 when ``--check`` finds another verdict than expected; 2 for what the user can mend (one ``error:`` line);
        128 + signal number when stopped by one.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    folder = Path(train.__globals__["__file__"]).resolve().parent  # type: ignore[attr-defined]
    try:
        command = parse(config_type, presets, words, folder)
        if command.house.list_presets:
            print(list_presets(presets))
            return 0
        if command.house.check_data:
            print("\n".join(check_data(command.config, command.house.data)))
            return 0
        return _execute(command, folder, train)
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        extra = _extra_of(error.name or "", folder)
        if extra is None:
            raise
        return _fail(UserError(f"{error.name} is not installed; it comes with: uv sync --extra {extra}"))


def _extra_of(module: str, folder: Path) -> str | None:
    """The extra that brings a missing module, where paper.toml names one."""
    extras = read_paper(folder).extras
    return extras[0] if extras and module.split(".")[0] in ("mmcv", "mmdet", "mmdet3d", "mmengine") else None


def _new_folder(command: Command, folder: Path) -> Path:
    """The run's folder, made; run names are unique within a second."""
    if command.house.out is not None:
        command.house.out.mkdir(parents=True, exist_ok=True)
        return command.house.out.resolve()
    stem = f"{command.house.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        path = folder / "runs" / (stem if number == 0 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}; name one with --out") from error
        return path
    raise UserError(f"no free name for a run beside {folder / 'runs' / stem}")


def _execute(command: Command, folder: Path, train: Callable[[Any, Run], None]) -> int:
    from shared import fingerprint, report
    from shared.run import Run, Stopped

    house, argv = command.house, command.argv
    paper = read_paper(folder)
    if house.resume is not None:
        path = house.resume.resolve()
        if (path / "result.json").is_file():
            result = read_json(path / "result.json", "--resume")
            print(f"{path} is finished; its result:\n\n{report.terminal(result)}")
            return _verdict(result, house.check)
        stored = read_json(path / "config.json", "--resume")
        if stored.get("code") != fingerprint.of_paper(folder):
            print("warning: the code has changed since this run began; its numbers may not be exact", file=sys.stderr)
        began = shlex.split(str(stored.get("command", "")))
        argv = tuple(began[3:]) or argv  # the result names the command that began the run
    run = Run(
        paper=paper,
        paper_folder=folder,
        config=command.config,
        preset=command.preset,
        preset_name=house.preset,
        seeds=command.seeds,
        folder=lambda: house.resume.resolve() if house.resume is not None else _new_folder(command, folder),
        data=None if house.data is None else house.data.resolve(),
        device=house.device,
        precision=house.precision,
        compile=house.compile,
        stop_after=house.stop_after,
        argv=argv,
    )
    path = run.folder
    if house.resume is None and run.is_main:
        write_json(
            path / "config.json",
            {
                "paper": paper.slug,
                "preset": house.preset,
                "seeds": command.seeds,
                "config": dataclasses.asdict(command.config),
                "data": None if house.data is None else str(house.data.resolve()),
                "device": house.device,
                "precision": house.precision,
                "processes": run.world_size,
                "code": fingerprint.of_paper(folder),
                "command": run.command(),
            },
        )
    try:
        run.begin()
        run.train(train)
        result = run.write_result()
    except Stopped as stop:
        if run.is_main:
            shown = os.path.relpath(path)
            print(f"stopped by {stop}; go on with: uv run train.py --resume {shown}", file=sys.stderr)
        return stop.code
    finally:
        run.end()
    if not run.is_main:
        return 0
    print("\n" + report.terminal(result))
    print(f"\n{os.path.relpath(path)}/result.json")
    return _verdict(result, house.check)


def _verdict(result: dict[str, Any], check: bool) -> int:
    wrong = [c["name"] for c in result["claims"] if c["holds"] != (c.get("expected", "holds") == "holds")]
    if check and wrong:
        print(f"--check: other verdict than paper.toml expects: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0
