"""Data of the reproduction: a generated set that needs no files, and the loader of the real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

EXPECTED_ROWS = 1000


def generate(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles with noise: not linearly separable, which is what the claim is about.

    Returns:
        x (n, 2) float32 and labels (n,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    angle = torch.rand(n, generator=generator) * torch.pi
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x[labels == 1] = torch.tensor([1.0, 0.4]) - x[labels == 1]
    return x + 0.1 * torch.randn(n, 2, generator=generator), labels


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """Read ``folder/data.csv``: two columns and a label a line, comma-separated, no header.

    Raises:
        UserError: missing or malformed; names the file and what is expected.
    """
    path = folder / "data.csv"
    if not path.is_file():
        raise UserError(f"no file {path}, expected the data set's data.csv there")
    try:
        rows = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if rows.shape[1] != 3:
        raise UserError(f"{path} has {rows.shape[1]} columns, expected 3")
    return torch.from_numpy(rows[:, :2]).float(), torch.from_numpy(rows[:, 2]).long()
