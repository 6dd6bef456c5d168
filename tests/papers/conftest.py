"""Fixtures of the papers' tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

PAPERS = Path(__file__).resolve().parents[2] / "papers"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def train(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``train.py`` of the paper that ``test_<slug>.py`` is about, with the ``model`` and ``data`` beside it."""
    folder = str(PAPERS / request.path.stem.removeprefix("test_"))
    names = ("train", "model", "data")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("train")
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
