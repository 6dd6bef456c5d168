"""What the tools share: the repository's folders, and the way a tool fails (one line, exit code 2)."""

from __future__ import annotations

import argparse
import difflib
import fcntl
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from shared.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class _Parser(argparse.ArgumentParser):
    """argparse, with an error of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the tool's docstring."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def tool(
    parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parse and run a tool; what the user can mend becomes ``error: ...`` on stderr and exit code 2."""
    try:
        return body(parser.parse_args(argv))
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def papers(root: Path = ROOT) -> list[str]:
    """Slugs of all paper folders, sorted: found, never listed."""
    return sorted(path.parent.name for path in (root / "papers").glob("*/train.py"))


def paper_folder(slug: str, root: Path = ROOT) -> Path:
    """The folder of a paper.

    Raises:
        UserError: no such paper; the nearest is named.
    """
    known = papers(root)
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known) or 'none yet'}"
        raise UserError(f"no paper {slug!r} under papers/{hint}")
    return root / "papers" / slug


def block(text: str, name: str, content: str, where: str) -> str:
    """``text`` with the block between ``<!-- name:begin -->`` and ``<!-- name:end -->`` replaced.

    Raises:
        UserError: the markers are not there exactly once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{where} has no single pair of markers {begin} and {end}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    middle = f"\n{content.strip()}\n" if content.strip() else "\n"
    return pattern.sub(lambda _: f"{begin}{middle}{end}", text)


@contextmanager
def machine_lock(what: str) -> Iterator[float]:
    """Hold the one lock of this machine for measurements; yields the load average at the start.

    Raises:
        UserError: another measurement is running.
    """
    with open(Path(tempfile.gettempdir()) / "paper-reproductions.measure.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{what}: another measurement holds this machine; try again when it has ended") from error
        yield os.getloadavg()[0]
