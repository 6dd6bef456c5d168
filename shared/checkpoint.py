"""Checkpoints that survive a crash at any moment: written beside the previous one, renamed, then the oldest removed.

A checkpoint is a folder ``<name>-<number>`` with ``weights.safetensors`` (the modules' tensors), ``state.pt`` (plain
types and tensors, loadable with ``weights_only=True``) and ``manifest.json`` (sizes and SHA-256 of both). The two
newest of a name are kept, so that a damaged one does not cost the run.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.files import disk_error, read_json, sha256_file, sync, write_json

FORMAT = 1
KEEP = 2


@dataclass
class Checkpoint:
    """What a checkpoint holds: named tensors, and state of plain types and tensors."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    folder: Path


def assert_plain(value: Any, where: str = "state") -> None:
    """Refuse anything that ``torch.load(weights_only=True)`` would not read back.

    Raises:
        TypeError: names the place and the type.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int, float, bool, tuple)):
                raise TypeError(f"{where} has a key of type {type(key).__name__}")
            assert_plain(item, f"{where}[{key!r}]")
        return
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            assert_plain(item, f"{where}[{i}]")
        return
    raise TypeError(f"{where} is a {type(value).__name__}: checkpoints hold plain types and tensors only")


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as safetensors (not atomic by itself). Tied tensors are stored once for each name."""
    seen: set[int] = set()
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        out[name] = tensor.clone() if pointer in seen or not whole else tensor
        seen.add(pointer)
    save_file(out, str(path))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``<run>/checkpoint``.
        owner: the paper's slug, so that a foreign checkpoint is recognised.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self.folder, self.owner = folder, owner

    def generations(self, name: str) -> list[tuple[int, Path]]:
        """(number, folder) of the complete checkpoints called ``name``, oldest first."""
        found = []
        for path in self.folder.glob(f"{name}-*") if self.folder.is_dir() else ():
            match = re.fullmatch(re.escape(name) + r"-(\d+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
        return sorted(found)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint; when this returns it is complete on disk, and until then the previous one is.

        Raises:
            TypeError: the state is not of plain types.
            UserError: the disk is full.
        """
        assert_plain(state)
        generations = self.generations(name)
        number = generations[-1][0] + 1 if generations else 1
        target = self.folder / f"{name}-{number:06d}"
        temporary = self.folder / f".{name}-{uuid.uuid4().hex[:8]}.tmp"
        try:
            temporary.mkdir(parents=True)
            save_tensors(temporary / "weights.safetensors", tensors)
            torch.save(dict(state), temporary / "state.pt")
            files = {}
            for file in ("weights.safetensors", "state.pt"):
                path = temporary / file
                sync(path)
                files[file] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            write_json(temporary / "manifest.json", {"format": FORMAT, "owner": self.owner, "files": files})
            sync(temporary)
            os.rename(temporary, target)
            sync(self.folder)
        except UserError:
            raise
        except (OSError, RuntimeError) as error:  # torch and safetensors wrap a failed write in a RuntimeError
            cause = error if isinstance(error, OSError) else _errno_of(error)
            if cause is None:
                raise
            raise disk_error(cause, target) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for _, old in generations[: max(0, len(generations) + 1 - KEEP)]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def load(self, name: str) -> Checkpoint | None:
        """The newest good checkpoint called ``name``, or ``None`` where there is none at all.

        A damaged or foreign one is left out with a line on stderr that says why, and the one before it is used.

        Raises:
            UserError: there are checkpoints, but none is good.
        """
        reasons = []
        for _, path in reversed(self.generations(name)):
            try:
                return self.read(path)
            except UserError as error:
                reasons.append(str(error))
                print(f"warning: {error}; going back to the checkpoint before it", file=sys.stderr)
        if reasons:
            raise UserError(f"no usable checkpoint in {self.folder}: {reasons[0]}")
        return None

    def read(self, path: Path) -> Checkpoint:
        """Read one checkpoint folder.

        Raises:
            UserError: truncated, altered, of another paper or of another format.
        """
        manifest = read_json(path / "manifest.json", "checkpoint manifest")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path} is of another checkpoint format, expected {FORMAT}")
        if manifest.get("owner") != self.owner:
            raise UserError(f"{path} belongs to {manifest.get('owner')!r}, expected {self.owner!r}")
        for file, entry in manifest.get("files", {}).items():
            part = path / file
            size = part.stat().st_size if part.is_file() else -1
            if size != entry["bytes"]:
                raise UserError(f"{part} is truncated: {max(size, 0)} bytes, expected {entry['bytes']}")
            if sha256_file(part) != entry["sha256"]:
                raise UserError(f"{part} was altered: its SHA-256 is not the one in manifest.json")
        state = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        return Checkpoint(load_file(str(path / "weights.safetensors")), state, path)


def _errno_of(error: BaseException) -> OSError | None:
    """The ``OSError`` behind an exception that torch or safetensors raised while writing, if that is what it was."""
    text = str(error)
    if isinstance(error.__cause__ or error.__context__, OSError):
        found = error.__cause__ or error.__context__
        return found if isinstance(found, OSError) else None
    for code in (28, 122, 30):  # no space, quota, read-only
        if os.strerror(code).lower() in text.lower() or f"os error {code}" in text.lower():
            return OSError(code, os.strerror(code))
    if "pytorchstreamwriter failed" in text.lower():
        return OSError(28, os.strerror(28))
    return None
