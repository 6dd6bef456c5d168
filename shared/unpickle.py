"""Reading pickles that others published, without letting them run code.

A pickle is a program: ``pickle.load`` calls whatever it names. The loader here resolves only the names of an allow list
(numpy arrays, scipy sparse matrices, plain containers) and refuses everything else before it is imported. It guards
against code; a file made to exhaust memory, or to hand numpy a nonsensical dtype, is not what it can stop.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import IO, Any

from shared.errors import UserError

CONTAINERS: frozenset[str] = frozenset(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in (
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"),
        *("set", "slice", "str", "tuple", "long", "unicode", "xrange"),
    )
) | {
    "collections.OrderedDict",
    "collections.Counter",
    "collections.defaultdict",
    "collections.deque",
    "copy_reg._reconstructor",
    "copyreg._reconstructor",
    "_codecs.encode",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
}
"""Python's own containers and numbers, under the names that Python 2 and 3 write."""

NUMPY: frozenset[str] = frozenset(
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in (
        "multiarray._reconstruct",
        "multiarray.scalar",
        "numeric._frombuffer",
    )
) | {
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.matrix",
    "numpy.matrixlib.defmatrix.matrix",
    "numpy.bool",
    "numpy.bool_",
    "numpy.ma.core.MaskedArray",
    "numpy.ma.core._mareconstruct",
    *(f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(f"numpy.float{bits}" for bits in (16, 32, 64)),
    *(f"numpy.complex{bits}" for bits in (64, 128)),
}
"""Arrays, dtypes and scalars. An array of dtype object holds further pickled objects, held to the same list."""

SCIPY_SPARSE: frozenset[str] = frozenset(
    f"scipy.sparse.{module}.{form}_{kind}"
    for form in ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
    for module in (form, f"_{form}")
    for kind in ("matrix", "array")
)
"""Sparse matrices and arrays, under the module names before and after SciPy 1.8."""

DEFAULT_ALLOWED: frozenset[str] = CONTAINERS | NUMPY | SCIPY_SPARSE
"""What ``restricted_load`` permits unless it is told otherwise. None of these runs code of the file's choosing."""

# Python 2 spells some names otherwise; SciPy moved its sparse classes in 1.8, NumPy its core in 2.0.
_RENAMED = {
    "copy_reg": "copyreg",
    "__builtin__": "builtins",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    **{f"scipy.sparse.{form}": f"scipy.sparse._{form}" for form in ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")},
}
_RENAMED_NAMES = {"long": "int", "unicode": "str", "xrange": "range"}


class _ForbiddenError(Exception):
    """A pickle named something that is not on the list; carries the full name."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that resolves the names of ``allowed`` only.

    Args:
        file: binary file.
        allowed: full names such as ``"numpy.ndarray"``.
        encoding: how the byte strings of a Python 2 pickle are read; ``"latin1"`` keeps their numpy arrays intact.
    """

    def __init__(self, file: IO[bytes], allowed: Iterable[str] = DEFAULT_ALLOWED, encoding: str = "latin1") -> None:
        super().__init__(file, encoding=encoding)
        self._allowed = frozenset(allowed)

    def find_class(self, module: str, name: str) -> Any:
        """Resolve ``module.name``, or refuse it before anything is imported."""
        # Protocol 4 permits dotted names ("os" "path.join"); no name on the list has one.
        full = f"{module}.{name}"
        if "." in name or full not in self._allowed:
            raise _ForbiddenError(full if full.isprintable() else ascii(full))
        if module in ("builtins", "__builtin__"):
            name = _RENAMED_NAMES.get(name, name)
        return super().find_class(_RENAMED.get(module, module), name)

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside of the file."""
        raise _ForbiddenError(f"the external object {pid!r}")


def restricted_load(
    path_or_file: str | PathLike[str] | IO[bytes],
    allowed: Iterable[str] = DEFAULT_ALLOWED,
    encoding: str = "latin1",
) -> Any:
    """Unpickle a file that was published by somebody else.

    Args:
        path_or_file: path, or a binary file positioned at the pickle.
        allowed: full names of the classes and functions the pickle may use. ``DEFAULT_ALLOWED | {"package.Class"}``
            adds to the default; anything that is added here can be called by the file with arguments of its choosing.
        encoding: of the byte strings in a Python 2 pickle.

    Returns:
        The unpickled object.

    Raises:
        UserError: the file is missing, truncated or no pickle, or names something that is not allowed (which is then
            neither imported nor called).
    """
    if not isinstance(path_or_file, str | PathLike):
        return _load(path_or_file, str(getattr(path_or_file, "name", "pickle")), allowed, encoding)
    path = Path(path_or_file)
    try:
        with open(path, "rb") as file:
            return _load(file, str(path), allowed, encoding)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; expected a pickle file") from error


def _load(file: IO[bytes], where: str, allowed: Iterable[str], encoding: str) -> Any:
    allowed = frozenset(allowed)
    try:
        return RestrictedUnpickler(file, allowed, encoding).load()
    except _ForbiddenError as error:
        expected = "numpy arrays, scipy.sparse matrices and plain containers only"
        extra = sorted(allowed - DEFAULT_ALLOWED)
        if extra:
            expected = f"{expected[:-5]} and {', '.join(extra)} only"
        raise UserError(f"{where}: the pickle asks for {error}, which is not allowed; expected {expected}") from error
    except (OSError, UserError):
        raise
    except EOFError as error:
        raise UserError(f"{where}: the pickle is truncated; expected a complete file, download it again") from error
    except Exception as error:  # a damaged pickle can raise nearly anything: ValueError, KeyError, MemoryError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not a readable pickle ({reason}); expected a complete file as published") from error
