"""Checks of what was chosen on the command line, for ``Config.__post_init__``.

Each raises ``ValueError`` whose text names the flag, what it was, and what is expected; ``shared.cli`` turns it into
the one line that a user sees.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def flag(name: str) -> str:
    """``weight_decay`` -> ``--weight-decay``."""
    return "--" + name.replace("_", "-")


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a value below ``least``, infinite, or not a number."""
    if not least <= value < math.inf:
        raise ValueError(f"{flag(name)} is {value}, expected at least {least}")


def above(name: str, value: float, bound: float) -> None:
    """Refuse a value that is not greater than ``bound``, infinite, or not a number."""
    if not bound < value < math.inf:
        raise ValueError(f"{flag(name)} is {value}, expected more than {bound}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside of ``[low, high]`` and what is not a number."""
    if not low <= value <= high:
        raise ValueError(f"{flag(name)} is {value}, expected from {low} to {high}")


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Refuse a word that is not among ``known``."""
    if value not in known:
        raise ValueError(f"{flag(name)} is {value!r}, expected one of {', '.join(known)}")


def among(name: str, values: Sequence[str], known: Collection[str]) -> None:
    """Refuse an empty list, a word that is not among ``known``, and a word given twice."""
    if not values or len(set(values)) < len(values) or any(value not in known for value in values):
        words = " ".join(map(str, values)) or "empty"
        raise ValueError(f"{flag(name)} is {words}, expected one or more of {', '.join(known)}, each once")
