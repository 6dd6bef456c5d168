"""The one exception that is the user's to mend: it becomes a single line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad usage or bad data. The message says what is wrong, where, and what was expected, on one line."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ``ValueError`` of the body into a ``UserError``; for code that checks what the user chose."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
