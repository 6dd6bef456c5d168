"""Fixtures of the whole suite."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Result:
    """Exit code, stdout and stderr of a command; ``errors`` are the lines that begin with ``error: ``."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run_folder(folder: Path, argv: Sequence[str], module: str = "train.py") -> Result:
    """Run ``python train.py ARGV`` of a paper folder in this process, as ``__main__``, with its own ``model``."""
    names = [path.stem for path in folder.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    old_argv, old_path = sys.argv, sys.path[:]
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [module, *map(str, argv)]
    sys.path.insert(0, str(folder))
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(folder / module), run_name="__main__")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.argv, sys.path[:] = old_argv, old_path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the small real data: ``$REPRO_DATA``, else ``../shared/data``; skips where there is none."""
    path = Path(os.environ.get("REPRO_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no small real data at {path} (set REPRO_DATA)")
    return path


@pytest.fixture(scope="session")
def run_paper() -> Callable[..., Result]:
    """``run_paper(slug, argv)`` runs ``train.py`` of ``papers/<slug>`` in this process."""

    def run(slug: str, argv: Sequence[str]) -> Result:
        return run_folder(ROOT / "papers" / slug, argv)

    return run


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """A small complete paper folder (the scaffold of tools/new_paper.py) in a temporary place."""
    from tools.new_paper import make

    yield make("toy", "A Toy", root=tmp_path / "house")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests reach this machine only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool], float], None]:
    """``wait_for(condition, seconds)`` polls until the condition is true."""

    def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.02)

    return wait
