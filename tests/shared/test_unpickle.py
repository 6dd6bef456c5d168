"""Pickles of others: what is allowed loads as numpy and scipy write it, everything else is refused before it runs."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from shared.errors import UserError
from shared.unpickle import DEFAULT_ALLOWED, restricted_load


class Command:
    """Pickles to a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


class Record:
    """A class that is on no list unless a caller adds it."""

    def __init__(self, value: int) -> None:
        self.value = value


def dump(path: Path, value: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_and_numpy_values_survive_every_protocol(tmp_path: Path, protocol: int) -> None:
    graph = collections.defaultdict(list, {0: [1, 2], 1: [0]})
    value = {
        "array": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "objects": np.array([{"a": 1}, None], dtype=object),
        "scalar": np.float64(0.5),
        "dtype": np.dtype([("x", "<i4"), ("y", "<f8")]),
        "graph": graph,
        "ordered": collections.OrderedDict(b=1, a=2),
        "plain": [1, 2.5, "text", b"bytes", (True, None), {3}, frozenset({4}), 1j, range(3), slice(1, 2)],
    }
    loaded = restricted_load(dump(tmp_path / "value.pkl", value, protocol))
    np.testing.assert_array_equal(loaded["array"], value["array"])
    np.testing.assert_array_equal(loaded["fortran"], value["fortran"])
    assert loaded["array"].dtype == np.float32
    assert loaded["objects"].tolist() == [{"a": 1}, None]
    assert loaded["scalar"] == 0.5 and loaded["dtype"] == value["dtype"]
    assert loaded["graph"] == graph and loaded["graph"].default_factory is list
    assert list(loaded["ordered"]) == ["b", "a"]
    assert loaded["plain"] == value["plain"]


@pytest.mark.parametrize("form", ["bsr", "coo", "csc", "csr", "dia", "dok", "lil"])
@pytest.mark.parametrize("kind", ["matrix", "array"])
def test_sparse_matrices(tmp_path: Path, form: str, kind: str) -> None:
    dense = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    matrix = getattr(sp, f"{form}_{kind}")(dense)
    loaded = restricted_load(dump(tmp_path / "matrix.pkl", matrix))
    assert type(loaded) is type(matrix)
    np.testing.assert_array_equal(loaded.toarray(), dense)


def test_names_of_python_2_and_of_older_numpy_and_scipy(tmp_path: Path) -> None:
    modern = pickle.dumps([np.arange(3), sp.csr_matrix(np.eye(2))], protocol=0)
    old = (
        modern.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        .replace(b"scipy.sparse._csr", b"scipy.sparse.csr")
        .replace(b"copyreg", b"copy_reg")
    )
    assert old != modern
    (tmp_path / "old.pkl").write_bytes(old)
    array, matrix = restricted_load(tmp_path / "old.pkl")
    np.testing.assert_array_equal(array, [0, 1, 2])
    np.testing.assert_array_equal(matrix.toarray(), np.eye(2))


def test_byte_strings_of_python_2_are_read_as_latin1(tmp_path: Path) -> None:
    (tmp_path / "bytes.pkl").write_bytes(b"U\x02\xe9\xff.")  # SHORT_BINSTRING
    assert restricted_load(tmp_path / "bytes.pkl") == "éÿ"
    assert restricted_load(tmp_path / "bytes.pkl", encoding="bytes") == b"\xe9\xff"


def test_a_binary_file_is_read_where_it_stands() -> None:
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps([2]))
    assert restricted_load(file) == 1
    assert restricted_load(file) == [2]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_command_is_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    path = dump(tmp_path / "evil.pkl", {"x": Command(f"touch {witness}")}, protocol)
    with pytest.raises(UserError) as caught:
        restricted_load(path)
    assert not witness.exists()
    message = str(caught.value)
    assert message.count("\n") == 0
    assert str(path) in message and f"{os.system.__module__}.system" in message and "expected numpy arrays" in message
    pickle.loads(path.read_bytes())  # the same file does run it in an ordinary unpickler
    assert witness.exists()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"cbuiltins\neval\n(S'1'\ntR.", id="eval"),
        pytest.param(b"c__builtin__\neval\n(S'1'\ntR.", id="python-2-eval"),
        pytest.param(b"(S'1'\ni__builtin__\nexec\n.", id="inst-opcode"),
        pytest.param(b"(cbuiltins\ngetattr\nclist\nx\no.", id="obj-opcode"),
        pytest.param(b"\x80\x04\x8c\x08builtins\x8c\x0clist.__add__\x93.", id="dotted-name"),
        pytest.param(b"\x80\x04\x8c\x05numpy\x8c\x10f2py.compile_mod\x93.", id="through-a-package"),
        pytest.param(b"cnumpy.testing._private.utils\nrunstring\n(S'1'\nd.", id="numpy-runstring"),
        pytest.param(b"Pexternal\n.", id="persistent-id"),
    ],
)
def test_other_ways_to_reach_a_name_are_refused(payload: bytes) -> None:
    with pytest.raises(UserError, match="which is not allowed"):
        restricted_load(io.BytesIO(payload))


def test_the_default_list_names_no_module_function_that_runs_text() -> None:
    last_names = {name.rsplit(".", 1)[1] for name in DEFAULT_ALLOWED}
    assert not last_names & {"eval", "exec", "compile", "open", "getattr", "setattr", "__import__", "system", "apply"}


def test_a_caller_may_allow_a_class_of_its_own(tmp_path: Path) -> None:
    path = dump(tmp_path / "record.pkl", Record(3))
    name = f"{Record.__module__}.Record"
    with pytest.raises(UserError, match="Record"):
        restricted_load(path)
    assert restricted_load(path, allowed=DEFAULT_ALLOWED | {name}).value == 3
    other = dump(tmp_path / "command.pkl", Command("true"))
    with pytest.raises(UserError) as caught:
        restricted_load(other, allowed=DEFAULT_ALLOWED | {name})
    assert name in str(caught.value)


def test_truncated_and_damaged_files_give_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps({"x": np.arange(100), "text": "a" * 50})
    path = tmp_path / "cut.pkl"
    for end in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError) as caught:
            restricted_load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "expected" in str(caught.value)
    path.write_bytes(b"<!DOCTYPE html>\n<html>not found</html>\n")
    with pytest.raises(UserError, match="not a readable pickle"):
        restricted_load(path)


def test_flipped_bytes_never_escape_as_another_exception(tmp_path: Path) -> None:
    whole = bytearray(pickle.dumps([{"x": [1, 2.5, "text"]}, collections.OrderedDict(a=(1, None)), {3}]))
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(generator.integers(2, len(whole)))] = int(generator.integers(0, 128))
        try:
            list(pickletools.genops(bytes(damaged)))  # a length of many gigabytes would only test the memory
        except Exception:
            continue
        with contextlib.suppress(UserError):
            restricted_load(io.BytesIO(bytes(damaged)))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(UserError, match="expected a pickle file"):
            restricted_load(path)


@pytest.mark.parametrize(
    ("name", "nodes", "features", "classes"), [("cora", 2708, 1433, 7), ("citeseer", 3327, 3703, 6)]
)
def test_the_published_planetoid_files(data_root: Path, name: str, nodes: int, features: int, classes: int) -> None:
    folder = data_root / "planetoid-geomgcn" / "planetoid"
    if not folder.is_dir():
        pytest.skip(f"no Planetoid files in {folder}")
    names = ("x", "y", "tx", "ty", "allx", "ally", "graph")
    parts = {part: restricted_load(folder / f"ind.{name}.{part}") for part in names}
    for part in ("x", "tx", "allx"):
        assert sp.issparse(parts[part]) and parts[part].shape[1] == features
    for part in ("y", "ty", "ally"):
        assert parts[part].shape[1] == classes
    assert isinstance(parts["graph"], collections.defaultdict) and len(parts["graph"]) == nodes
