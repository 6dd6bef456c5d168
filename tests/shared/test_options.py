"""Checks of options: what passes, what is refused, and that the text names flag, value and what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from shared import options


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (options.at_least, (3, 3)),
        (options.above, (0.1, 0)),
        (options.between, (1.0, 0, 1)),
        (options.one_of, ("adam", ("sgd", "adam"))),
        (options.among, (("b", "a"), ("a", "b", "c"))),
    ],
)
def test_what_is_allowed_passes(check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    check("some_name", *arguments)


@pytest.mark.parametrize(
    ("check", "arguments", "said"),
    [
        (options.at_least, (2, 3), "is 2, expected at least 3"),
        (options.at_least, (math.nan, 0), "is nan, expected at least 0"),
        (options.at_least, (math.inf, 0), "is inf, expected at least 0"),
        (options.above, (0.0, 0), "is 0.0, expected more than 0"),
        (options.above, (math.nan, 0), "is nan, expected more than 0"),
        (options.between, (1.5, 0, 1), "is 1.5, expected from 0 to 1"),
        (options.between, (math.nan, 0, 1), "is nan, expected from 0 to 1"),
        (options.one_of, ("adm", ("sgd", "adam")), "is 'adm', expected one of sgd, adam"),
        (options.among, (("a", "d"), ("a", "b")), "is a d, expected one or more of a, b, each once"),
        (options.among, (("a", "a"), ("a", "b")), "is a a, expected"),
        (options.among, ((), ("a", "b")), "is empty, expected"),
    ],
)
def test_what_is_not_is_refused_with_the_flag(
    check: Callable[..., None], arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check("some_name", *arguments)
    assert str(caught.value).startswith(f"--some-name {said}")
