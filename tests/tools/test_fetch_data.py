"""``tools/fetch_data.py`` against a server on this machine: resume, checksums, hostile archives, one-line errors."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.catalogue import CATALOGUE, DataSet, File, Unpack
from tools import fetch_data

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Server:
    """What the test server does, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    cut: list[int] = field(default_factory=list)
    """The first answers stop after so many bytes, though they announced the whole."""
    ranges: bool = True
    status: list[int] = field(default_factory=list)
    """The first answers are these errors."""
    extra: bytes = b""
    announce: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            if state.status:
                self.send_error(state.status.pop(0))
                return
            body = state.files.get(self.path.lstrip("/"))
            if body is None:
                self.send_error(404)
                return
            start = 0
            if wanted and state.ranges and self.headers.get("If-Range", state.etag) == state.etag:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            rest = body[start:] + state.extra
            if state.announce:
                self.send_header("Content-Length", str(len(rest)))
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(rest[: state.cut.pop(0)] if state.cut else rest)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up early is part of some tests."""

    running = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{running.server_address[1]}"
    monkeypatch.setattr(fetch_data, "WAIT", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield state
    running.shutdown()
    running.server_close()
    thread.join(5)


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch, server: Server) -> Callable[..., None]:
    """``add(content, ...)`` puts a data set called toy into the catalogue and its file on the server."""

    def put(content: bytes, checksum: str | None = "right", size: bool = True, **rest: Any) -> None:
        rest.setdefault("path", "toy.bin")
        path, unpack, holds = rest.pop("path"), rest.pop("unpack", None), rest.pop("holds", None)
        server.files[path] = content
        url = rest.pop("url", f"{server.url}/{path}")
        known = sha256(content) if checksum == "right" else checksum
        file = File(path, url, known, len(content) if size else None, unpack)
        entry = DataSet(
            "toy", "Toy", "MIT", "https://example.org", ("toy",), "1 MiB", holds or (path,), (file,), **rest
        )
        monkeypatch.setitem(CATALOGUE, "toy", entry)

    return put


def zip_bytes(members: dict[str, bytes], mode: dict[str, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or {}).get(name, 0o100644) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def tar_bytes(members: list[tuple[str, bytes | None, dict[str, Any]]], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content, attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def nothing_but(folder: Path, *names: str) -> None:
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert left == sorted(names)


def test_a_file_is_fetched_verified_and_not_fetched_twice(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT, path="deep/toy.bin")
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "deep" / "toy.bin").read_bytes() == CONTENT
    nothing_but(tmp_path, "deep/toy.bin")
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert server.asked == [("/deep/toy.bin", None)]
    captured = capsys.readouterr()
    assert "toy: complete" in captured.out
    assert captured.err == ""


def test_the_git_id_is_checked_where_only_that_is_known(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    add(CONTENT, checksum=f"git:{right}", size=False)
    assert fetch_data.main(["toy", "--dest", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    add(CONTENT, checksum=f"git:{'0' * 40}", size=False)
    assert fetch_data.main(["toy", "--dest", str(tmp_path / "b")]) == 2
    assert "wrong checksum" in one_error(capsys)
    nothing_but(tmp_path / "b")


def test_a_part_of_an_earlier_attempt_is_resumed(add: Callable[..., None], server: Server, tmp_path: Path) -> None:
    add(CONTENT)
    (tmp_path / "toy.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "toy.bin.part.tag").write_text(server.etag)
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert server.asked == [("/toy.bin", "bytes=1000-")]
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT
    nothing_but(tmp_path, "toy.bin")


def test_a_part_that_was_complete_needs_no_connection(add: Callable[..., None], server: Server, tmp_path: Path) -> None:
    add(CONTENT)
    (tmp_path / "toy.bin.part").write_bytes(CONTENT)
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert server.asked == []


def test_a_cut_transfer_is_continued_at_once(add: Callable[..., None], server: Server, tmp_path: Path) -> None:
    add(CONTENT)
    server.cut = [300_000, 500_000]
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert [wanted for _, wanted in server.asked] == [None, "bytes=300000-", "bytes=800000-"]
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT


def test_a_transfer_that_stays_cut_keeps_the_part(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT)
    server.cut = [100, 0, 0, 0]
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    message = one_error(capsys)
    assert "cut off at 100 bytes of 1,048,576 bytes" in message
    assert "resume" in message
    nothing_but(tmp_path, "toy.bin.part", "toy.bin.part.tag")
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert server.asked[-1] == ("/toy.bin", "bytes=100-")


def test_a_part_of_another_version_is_given_up(add: Callable[..., None], server: Server, tmp_path: Path) -> None:
    add(CONTENT)
    (tmp_path / "toy.bin.part").write_bytes(b"old" * 10)
    (tmp_path / "toy.bin.part.tag").write_text('"zero"')  # If-Range: the server sends the whole new file
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT
    (tmp_path / "toy.bin").unlink()
    (tmp_path / "toy.bin.part").write_bytes(b"old" * 10)  # no tag: only the checksum notices
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT
    (tmp_path / "toy.bin").unlink()
    (tmp_path / "toy.bin.part").write_bytes(b"x" * (len(CONTENT) + 5))  # longer than the file
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT


def test_without_checksum_an_untagged_part_is_not_trusted(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT, checksum=None, size=False)
    (tmp_path / "toy.bin.part").write_bytes(b"old" * 10)
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT
    assert server.asked == [("/toy.bin", None)]
    out = capsys.readouterr().out
    assert hashlib.sha256(CONTENT).hexdigest() in out
    assert "unverified" in out


def test_a_server_without_ranges_sends_it_all_again(add: Callable[..., None], server: Server, tmp_path: Path) -> None:
    add(CONTENT)
    server.ranges, server.cut = False, [1000]
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "toy.bin").read_bytes() == CONTENT


def test_wrong_checksum_removes_the_file(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT, checksum=sha256(b"another"))
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    message = one_error(capsys)
    assert "wrong checksum" in message
    assert sha256(b"another") in message
    nothing_but(tmp_path)


def test_a_file_that_is_not_the_published_one_is_left_alone(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT)
    (tmp_path / "toy.bin").write_bytes(b"mine")
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "move it away" in one_error(capsys)
    assert (tmp_path / "toy.bin").read_bytes() == b"mine"
    assert server.asked == []


def test_size_announced_or_sent_beyond_the_known_one(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT)
    server.extra = b"more"
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "expected 1,048,576 bytes" in one_error(capsys)
    server.announce = False
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "sends more than" in one_error(capsys)
    nothing_but(tmp_path)


def test_http_errors(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(CONTENT)
    server.status = [503, 429]
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "toy.bin").unlink()
    server.status, server.asked = [403], []
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "403" in one_error(capsys)
    assert len(server.asked) == 1
    server.status = [500] * 10
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "500" in one_error(capsys)


def test_no_connection(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(CONTENT, url="http://127.0.0.1:9/toy.bin")
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "no connection" in one_error(capsys)


def test_no_space(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))  # type: ignore[attr-defined]
        assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    message = one_error(capsys)
    assert "no space" in message
    assert "1,048,576 bytes are needed, 5 bytes are free" in message

    real = open

    class Full:
        """A file on a full disk."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *rest: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None:
            """Nothing was written."""

        def close(self) -> None:
            self.file.close()

    def full(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = real(path, mode, *rest, **options)
        return Full(file) if mode == "ab" else file

    monkeypatch.setattr(fetch_data, "open", full, raising=False)
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "no space left" in one_error(capsys)


ZIP = Unpack("zip", "toy", strip="inner", limit=1 << 20)
TAR = Unpack("tar", "toy", limit=1 << 20)
LINK = 0o120777


def test_zip_and_tar_become_the_layout(add: Callable[..., None], tmp_path: Path) -> None:
    members = {"inner/": b"", "inner/a.txt": b"A", "inner/deep/b.txt": b"B", "__MACOSX/inner/._a.txt": b"x", "top": b""}
    members |= {"inner/deep/link.txt": b"../a.txt", "inner/deep/.DS_Store": b"x"}
    content = zip_bytes(members, {"inner/deep/link.txt": LINK})
    add(content, checksum=None, path="toy.zip", unpack=ZIP, holds=("toy/a.txt", "toy/deep/*.txt"))
    assert fetch_data.main(["toy", "--dest", str(tmp_path / "zip")]) == 0
    nothing_but(tmp_path / "zip", "toy/a.txt", "toy/deep/b.txt", "toy/deep/link.txt")
    link = tmp_path / "zip" / "toy" / "deep" / "link.txt"
    assert link.read_bytes() == b"A"
    assert not link.is_symlink()
    assert fetch_data.main(["toy", "--dest", str(tmp_path / "zip")]) == 0

    entries: list[tuple[str, bytes | None, dict[str, Any]]] = [
        ("./", None, {"type": tarfile.DIRTYPE}),
        ("./a.txt", b"A", {"mode": 0o4777}),
        ("deep/hard.txt", None, {"type": tarfile.LNKTYPE, "linkname": "./a.txt"}),
        ("deep/soft.txt", None, {"type": tarfile.SYMTYPE, "linkname": "hard.txt"}),
    ]
    for mode in ("w:gz", "w:xz", "w"):
        add(tar_bytes(entries, mode), path="toy.tar", unpack=TAR, holds=("toy/a.txt",))
        dest = tmp_path / mode.replace(":", "")
        assert fetch_data.main(["toy", "--dest", str(dest)]) == 0
        nothing_but(dest, "toy/a.txt", "toy/deep/hard.txt", "toy/deep/soft.txt")
        assert (dest / "toy" / "deep" / "soft.txt").read_bytes() == b"A"
        assert not (dest / "toy" / "a.txt").stat().st_mode & 0o4111


HOSTILE = {
    "zip-parent": (ZIP, zip_bytes({"inner/a": b"A", "inner/../../evil": b"x"}), "outside"),
    "zip-absolute": (ZIP, zip_bytes({"/tmp/evil": b"x"}), "absolute"),
    "zip-backslash": (ZIP, zip_bytes({"inner\\..\\..\\evil": b"x"}), "absolute or foreign"),
    "zip-drive": (ZIP, zip_bytes({"C:/evil": b"x"}), "outside"),
    "zip-symlink": (ZIP, zip_bytes({"inner/l": b"../../evil"}, {"inner/l": LINK}), "outside"),
    "zip-symlink-absolute": (ZIP, zip_bytes({"inner/l": b"/etc/passwd"}, {"inner/l": LINK}), "outside"),
    "zip-symlink-then-file": (
        ZIP,
        zip_bytes({"inner/l": b"../..", "inner/l/evil": b"x"}, {"inner/l": LINK}),
        "outside",
    ),
    "zip-fifo": (ZIP, zip_bytes({"inner/f": b""}, {"inner/f": 0o010644}), "special file"),
    "zip-bomb": (ZIP, zip_bytes({f"inner/{i}": bytes(1 << 19) for i in range(3)}), "limit"),
    "zip-twice": (ZIP, zip_bytes({"inner/a": b"A", "inner//a": b"B"}), "twice"),
    "zip-file-and-folder": (ZIP, zip_bytes({"inner/a": b"A", "inner/a/b": b"B"}), "twice"),
    "tar-parent": (TAR, tar_bytes([("a", b"A", {}), ("../evil", b"x", {})]), "outside"),
    "tar-absolute": (TAR, tar_bytes([("/tmp/evil", b"x", {})]), "absolute"),
    "tar-symlink": (TAR, tar_bytes([("l", None, {"type": tarfile.SYMTYPE, "linkname": "../evil"})]), "outside"),
    "tar-symlink-absolute": (
        TAR,
        tar_bytes([("l", None, {"type": tarfile.SYMTYPE, "linkname": "/etc"}), ("l/evil", b"x", {})]),
        "outside",
    ),
    "tar-hardlink": (
        TAR,
        tar_bytes([("d/l", None, {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"})]),
        "outside",
    ),
    "tar-link-to-nothing": (TAR, tar_bytes([("l", None, {"type": tarfile.SYMTYPE, "linkname": "m"})]), "no file"),
    "tar-link-circle": (
        TAR,
        tar_bytes([(a, None, {"type": tarfile.SYMTYPE, "linkname": b}) for a, b in (("l", "m"), ("m", "l"))]),
        "no file",
    ),
    "tar-link-then-file": (
        TAR,
        tar_bytes([("a", b"A", {}), ("l", None, {"type": tarfile.SYMTYPE, "linkname": "a"}), ("l", b"x", {})]),
        "twice",
    ),
    "tar-device": (
        TAR,
        tar_bytes([("null", None, {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})]),
        "special",
    ),
    "tar-fifo": (TAR, tar_bytes([("pipe", None, {"type": tarfile.FIFOTYPE})]), "special file"),
    "tar-bomb": (TAR, tar_bytes([("a", bytes(1 << 19), {}), ("b", bytes((1 << 19) + 1), {})]), "limit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing(
    name: str, add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule, content, reason = HOSTILE[name]
    add(content, path="toy.bin", unpack=rule, holds=("toy/a",))
    dest = tmp_path / "outer" / "dest"
    assert fetch_data.main(["toy", "--dest", str(dest)]) == 2
    message = one_error(capsys)
    assert "refused" in message
    assert reason in message
    nothing_but(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_a_link_copied_many_times_counts_every_time(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links: list[tuple[str, bytes | None, dict[str, Any]]] = [("a", bytes(1 << 18), {})]
    links += [(f"l{i}", None, {"type": tarfile.LNKTYPE, "linkname": "a"}) for i in range(10)]
    add(tar_bytes(links), unpack=TAR, holds=("toy/a",))
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "limit" in one_error(capsys)
    nothing_but(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar", "gz"])
def test_a_damaged_archive(
    kind: str, add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = hashlib.shake_256(b"noise").digest(20_000)
    whole = {
        "zip": zip_bytes({"inner/a": noise}),
        "tar": tar_bytes([("a", noise, {})]),
        "gz": gzip.compress(noise),
    }[kind]
    flipped = bytearray(whole)
    flipped[5000] ^= 0xFF
    rule = {"zip": ZIP, "tar": TAR, "gz": Unpack("gz", "toy/a")}[kind]
    for content in (whole[:10_000], bytes(flipped), b"<html>not found</html>" * 100, b""):
        add(content, checksum=None, unpack=rule, holds=("toy/a",))
        assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
        assert "nothing was unpacked" in one_error(capsys)
        nothing_but(tmp_path)  # the next call fetches it anew


def test_an_archive_of_something_else(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(zip_bytes({"inner/readme.txt": b"?"}), checksum=None, unpack=ZIP, holds=("toy/*.h5",))
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "not the expected archive: it holds no *.h5" in one_error(capsys)
    nothing_but(tmp_path)


def test_a_gzipped_table_and_its_bomb(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(gzip.compress(CONTENT), unpack=Unpack("gz", "toy/t.csv", limit=len(CONTENT)), holds=("toy/t.csv",))
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    assert (tmp_path / "toy" / "t.csv").read_bytes() == CONTENT
    capsys.readouterr()
    add(gzip.compress(CONTENT + b"!"), unpack=Unpack("gz", "toy/t.csv", limit=len(CONTENT)), holds=("toy/t.csv",))
    assert fetch_data.main(["toy", "--dest", str(tmp_path / "b")]) == 2
    assert "refused" in one_error(capsys)
    nothing_but(tmp_path / "b")


def test_what_must_be_fetched_by_hand(
    add: Callable[..., None], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tar_bytes([("train.txt", b"1\n", {})])
    steps = ("accept the terms", "save it as {dest}/dac.tar.gz")
    add(content, url=None, path="dac.tar.gz", checksum=None, unpack=TAR, holds=("toy/train.txt",), by_hand=steps)
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: toy has to be fetched by hand")
    assert captured.err.count("\n") == 1
    assert f"save it as {tmp_path}/dac.tar.gz" in captured.out
    assert server.asked == []
    (tmp_path / "dac.tar.gz").write_bytes(content)
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 0
    nothing_but(tmp_path, "dac.tar.gz", "toy/train.txt")  # what a user brought is not deleted


def test_an_incomplete_folder_in_the_way(
    add: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(zip_bytes({"inner/a": b"A"}), unpack=ZIP, holds=("toy/a",))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "b").write_bytes(b"mine")
    assert fetch_data.main(["toy", "--dest", str(tmp_path)]) == 2
    assert "move it away" in one_error(capsys)
    assert (tmp_path / "toy" / "b").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["texs"], "did you mean texas?"),
        (["MODELNET-40"], "did you mean modelnet40?"),
        (["qqqqqq"], "expected one of cora"),
        ([], "no NAME given"),
        (["cora", "--no-such-flag"], "unrecognized arguments"),
        (["cora", "--base-url", "file:///etc"], "expected http"),
        (["cora", "texs"], "did you mean texas?"),
    ],
)
def test_bad_usage(argv: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_data.main([*argv, "--dest", str(tmp_path / "d")]) == 2
    assert expected in one_error(capsys)
    assert not (tmp_path / "d").exists()


def test_the_catalogue_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_data.main(["--list"]) == 0
    listed = capsys.readouterr().out
    owners: dict[str, str] = {}
    for name, entry in CATALOGUE.items():
        assert name in listed
        assert entry.name == name
        assert entry.holds
        assert entry.licence
        assert entry.by_hand or all(file.url for file in entry.files)
        for step in entry.by_hand:
            step.format(dest="x")
        for file in entry.files:
            assert owners.setdefault(file.path, name) == name, f"{file.path} belongs to two entries"
            assert file.url is None or file.url.startswith("https://")
            kind, _, value = (file.checksum or "sha256:" + "0" * 64).partition(":")
            assert len(value) == {"sha256": 64, "git": 40}[kind]
            assert not Path(file.path).is_absolute()
    for name in ("cora", "citeseer", "pubmed"):
        assert len(CATALOGUE[name].files) == 18
    for name in ("texas", "wisconsin", "cornell", "film", "chameleon", "squirrel"):
        assert len(CATALOGUE[name].files) == 12
    assert [len(CATALOGUE[f"{name}"].files) for name in ("cornell_fixed", "squirrel_directed")] == [1, 1]


@pytest.mark.parametrize("name", ["cora", "texas", "film", "cornell_fixed", "squirrel_directed"])
def test_the_published_files_pass_their_checksums(
    name: str, data_root: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mirror with the small real data is as good as the first source, and one flipped bit is noticed."""
    mirror = data_root / "planetoid-geomgcn"
    if not mirror.is_dir():
        pytest.skip(f"no graphs in {mirror}")
    for file in CATALOGUE[name].files:
        server.files[file.path] = (mirror / file.path).read_bytes()
    assert fetch_data.main([name, "--dest", str(tmp_path / "a"), "--base-url", server.url + "/"]) == 0
    assert "unverified" not in capsys.readouterr().out
    nothing_but(tmp_path / "a", *(file.path for file in CATALOGUE[name].files))
    last = CATALOGUE[name].files[-1].path
    server.files[last] = server.files[last][:-1] + bytes([server.files[last][-1] ^ 1])
    assert fetch_data.main([name, "--dest", str(tmp_path / "b"), "--base-url", server.url]) == 2
    assert "wrong checksum" in one_error(capsys)
    assert not (tmp_path / "b" / last).exists()
