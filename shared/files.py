"""Writing files so that a crash or a full disk never leaves half of one, and hashing them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; renamed over it when the body ends well, removed otherwise.

    Raises:
        UserError: the disk is full; what stood at ``path`` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; ``what`` names it in the error.

    Raises:
        UserError: missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} is not readable JSON ({error})") from error


def sync(path: Path) -> None:
    """Push a file's (or folder's entries') content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> Exception:
    """A full or read-only disk is the user's to mend; any other ``OSError`` is returned as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return UserError(f"cannot write {path}: {os.strerror(error.errno)}; what was finished before is intact")
    return error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative file names and contents in sorted order."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for entry in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{entry.relative_to(path).as_posix()}\0{sha256_file(entry)}\n".encode())
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def cache_folder(name: str) -> Path:
    """The folder for derived data that may be deleted at any time: ``$XDG_CACHE_HOME/paper-reproductions/<name>``."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "paper-reproductions" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
