"""Fixtures of the papers' tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PAPERS = Path(__file__).resolve().parents[2] / "papers"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def train(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``train.py`` of the paper that ``test_<slug>.py`` is about, with the modules beside it."""
    folder = str(PAPERS / request.path.stem.removeprefix("test_"))
    names = [path.stem for path in Path(folder).glob("*.py")]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("train")
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture
def refuses(request: pytest.FixtureRequest, run_paper: Any, tmp_path: Path) -> Callable[[Sequence[str], str], None]:
    """``refuses(argv, message)``: the command of the paper ends with exit code 2 and one line that says ``message``."""
    slug = request.path.stem.removeprefix("test_")

    def check(argv: Sequence[str], message: str) -> None:
        words = list(argv) if "--check-data" in argv else [*argv, "--out", str(tmp_path / "run")]
        result = run_paper(slug, words)
        assert (result.code, len(result.errors)) == (2, 1), result.err
        assert message in result.errors[0]

    return check
