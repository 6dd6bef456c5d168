"""Download the data sets of the papers: resumable, checked by SHA-256, unpacked without trusting the archive.

uv run tools/fetch_data.py --list
uv run tools/fetch_data.py texas cora --dest data
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import http.client
import lzma
import os
import posixpath
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.catalogue import CATALOGUE, DataSet, File, Unpack
from shared.errors import UserError
from shared.files import sha256_file
from tools.common import ROOT, arguments, tool

CHUNK = 1 << 18
ATTEMPTS = 4
WAIT = 2.0
"""Seconds between two attempts."""
MAX_MEMBERS = 1_000_000
RETRIED = (408, 425, 429)
JUNK = ("__MACOSX", ".DS_Store")


class ResumingDownloader:
    """A downloader for ``pooch.retrieve`` that goes on where an earlier attempt stopped.

    The bytes gather in ``part``, which survives a lost connection and a killed process; the next call asks the server
    for the rest (HTTP Range, tied to the same version of the file by If-Range where the server names one).

    Args:
        part: where the incomplete file lies.
        size: expected bytes, None when unknown.
        check: called with the complete file before pooch sees it; raises ``ValueError`` when it is not the right one.
        trust_part: whether a checksum will catch a part that belongs to another version of the file. Without one, a
            part is only continued when the server can say that it is still the same file.
        attempts: connections to try.
        wait: seconds between two of them.
        timeout: seconds without a byte after which a connection counts as lost.
    """

    def __init__(
        self,
        part: Path,
        size: int | None = None,
        check: Callable[[Path], None] | None = None,
        trust_part: bool = True,
        attempts: int = 4,
        wait: float = 2.0,
        timeout: float = 60.0,
    ) -> None:
        self.part = part
        self.tag = part.with_name(part.name + ".tag")
        self.size = size
        self.check = check
        self.trust_part = trust_part
        self.attempts = attempts
        self.wait = wait
        self.timeout = timeout
        self.resumed = False

    def __call__(
        self, url: str, output_file: str | os.PathLike[str], pooch: Any, check_only: bool = False
    ) -> bool | None:
        """Fetch ``url`` completely, then move it to ``output_file``. The signature is pooch's."""
        if check_only:
            raise NotImplementedError("only downloads")
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait)
            try:
                complete, problem = self._attempt(url)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in RETRIED:
                    raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
                complete, problem = False, f"the server answers {error.code} {error.reason}"
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                complete, problem = False, f"no connection: {getattr(error, 'reason', error)}"
            if complete:
                if self.check is not None:
                    self.check(self.part)
                self.part.replace(output_file)
                self.tag.unlink(missing_ok=True)
                return None
        kept = f"; {_bytes(self.have())} are kept, run the command again to resume" if self.have() else ""
        raise UserError(f"{url}: {problem} ({self.attempts} attempts){kept}")

    def have(self) -> int:
        """Bytes that lie in ``part``."""
        return self.part.stat().st_size if self.part.exists() else 0

    def forget(self) -> None:
        """Remove what an earlier attempt left."""
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)

    def _attempt(self, url: str) -> tuple[bool, str]:
        tag = self.tag.read_text(encoding="utf-8") if self.tag.exists() else ""
        if not (self.trust_part or tag) or (self.size is not None and self.have() > self.size):
            self.forget()
        have = self.have()
        if have and have == self.size:
            self.resumed = True
            return True, ""
        headers = {"User-Agent": "paper-reproductions", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if tag:
                headers["If-Range"] = tag
        try:
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not have:
                raise
            self.forget()  # the part is not a beginning of what the server has now
            return False, "the server has another file than the one that was begun"
        with response:
            if have and response.status == 206 and _range_start(response.headers) == have:
                self.resumed = True
            elif have:
                self.forget()
                have = 0
                if response.status == 206:
                    return False, "the server sent another range than asked for"
            length = response.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else self.size
            if total is not None and self.size is not None and total != self.size:
                self.forget()
                raise UserError(f"{url}: the server has {_bytes(total)}, expected {_bytes(self.size)}")
            _need_space(self.part.parent, (total or have) - have)
            if not have:
                with _disk_errors(self.part):
                    self.tag.write_text(_strong_tag(response.headers), encoding="utf-8")
            return self._receive(response, have, total, url)

    def _receive(self, response: Any, have: int, total: int | None, url: str) -> tuple[bool, str]:
        from tqdm import tqdm

        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=self.part.stem, disable=None, leave=False)
        with _disk_errors(self.part):
            file = open(self.part, "ab")
        with bar, file:
            while chunk := response.read(CHUNK):
                have += len(chunk)
                if self.size is not None and have > self.size:
                    file.close()
                    self.forget()
                    raise UserError(f"{url}: the server sends more than the expected {_bytes(self.size)}")
                with _disk_errors(self.part):
                    file.write(chunk)
                bar.update(len(chunk))
            with _disk_errors(self.part):
                file.flush()
        if total is not None and have < total:
            return False, f"the transfer was cut off at {_bytes(have)} of {_bytes(total)}"
        return True, ""


def _range_start(headers: Any) -> int | None:
    unit, _, rest = headers.get("Content-Range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _strong_tag(headers: Any) -> str:
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


def _bytes(number: int) -> str:
    return f"{number:,} bytes"


def _need_space(folder: Path, more: int) -> None:
    free = shutil.disk_usage(folder).free
    if more > free:
        raise UserError(f"no space in {folder}: {_bytes(more)} are needed, {_bytes(free)} are free")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os.strerror(error.errno or 0)
        raise UserError(f"cannot write {path}: {reason}; make room and run the command again") from error


def git_blob(path: Path) -> str:
    """The id git gives the content of ``path``: SHA-1 over ``blob <size>`` and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def matches(path: Path, checksum: str | None) -> bool:
    """Whether the file has the checksum of the catalogue; True when the catalogue has none."""
    if checksum is None:
        return True
    kind, _, value = checksum.partition(":")
    return (sha256_file(path) if kind == "sha256" else git_blob(path)) == value


def download(file: File, url: str, target: Path) -> None:
    """Fetch one file to ``target``, which appears only when it is complete and has the right checksum.

    Raises:
        UserError: no connection, cut off, wrong checksum (the bad file is removed), no space.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")

    def check_git(path: Path) -> None:
        if file.checksum is not None and file.checksum.startswith("git:") and not matches(path, file.checksum):
            raise ValueError(f"git id {git_blob(path)}")

    known = file.checksum if file.checksum is not None and file.checksum.startswith("sha256:") else None
    downloader = ResumingDownloader(
        target.with_name(target.name + ".part"),
        size=file.size,
        check=check_git,
        trust_part=file.checksum is not None,
        attempts=ATTEMPTS,
        wait=WAIT,
    )
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        downloader.resumed = False
        try:
            pooch.retrieve(url, known_hash=known, fname=target.name, path=target.parent, downloader=downloader)
        except ValueError as error:  # pooch and check_git: the checksum differs
            downloader.forget()
            if downloader.resumed:  # the part may be of an older version of the file: once more from the start
                continue
            raise UserError(
                f"{url}: wrong checksum, expected {file.checksum}; the file was removed. It is not the one this "
                "catalogue was written for, or was damaged on the way"
            ) from error
        return


class Extraction:
    """The rules that every member of an archive has to pass, and the folder that the accepted ones are written to.

    Nothing is written outside of ``folder``, no link is ever made (a link to a file of the archive becomes a copy),
    modes are not taken over, and the sum of the declared sizes is bounded.
    """

    def __init__(self, archive: Path, folder: Path, rule: Unpack) -> None:
        self.archive = archive
        self.folder = folder
        self.rule = rule
        self.total = 0
        self.members = 0
        self.links: dict[str, str] = {}

    def refuse(self, name: str, why: str) -> NoReturn:
        """Stop: the archive is not what an honest one looks like."""
        shown = name if name.isprintable() else ascii(name)
        raise UserError(f"{self.archive}: refused, member {shown!r} {why}; nothing was unpacked")

    def normal(self, name: str) -> str:
        """The member's path in the archive, normalised; refused when it points anywhere else than below the root."""
        if "\\" in name or "\0" in name or name.startswith("/") or PurePosixPath(name).parts[:1] == ("~",):
            self.refuse(name, "has an absolute or foreign path")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or (parts and parts[0].endswith(":")):
            self.refuse(name, "leads outside of the folder")
        return "/".join(parts)

    def place(self, name: str) -> Path | None:
        """Where a member goes, None for what the layout leaves out."""
        parts = self.normal(name).split("/")
        if any(part in JUNK for part in parts):
            return None
        if self.rule.strip:
            if parts[0] != self.rule.strip:
                return None
            parts = parts[1:]
        return self.folder.joinpath(*parts)

    def count(self, name: str, size: int) -> None:
        """Add a member's declared size; refused beyond the limit, an error when the disk cannot hold it."""
        self.members += 1
        self.total += size
        if self.total > self.rule.limit or self.members > MAX_MEMBERS:
            self.refuse(name, f"takes the unpacked size beyond the limit of {_bytes(self.rule.limit)}")
        _need_space(self.folder, size)

    def directory(self, name: str) -> None:
        """A folder of the archive."""
        path = self.place(name)
        self.count(name, 0)
        if path is not None:
            with self._writing(name, path):
                path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, size: int, source: IO[bytes]) -> None:
        """A regular file of ``size`` bytes."""
        path = self.place(name)
        self.count(name, size)
        if path is None:
            return
        with self._writing(name, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                shutil.copyfileobj(source, file, CHUNK)
                if file.tell() != size:
                    raise EOFError(f"{name} is cut off")

    def link(self, name: str, target: str, symbolic: bool) -> None:
        """A link, kept for ``resolve_links``; refused when it leads outside."""
        self.count(name, 0)
        if not target or target.startswith("/") or "\\" in target or "\0" in target:
            self.refuse(name, f"links to {target!r} outside of the folder")
        base = posixpath.dirname(self.normal(name)) if symbolic else ""
        resolved = posixpath.normpath(posixpath.join(base, target))
        if resolved.split("/")[0] == "..":
            self.refuse(name, f"links to {target!r} outside of the folder")
        if self.normal(name) in self.links:
            self.refuse(name, "appears twice")
        self.links[self.normal(name)] = resolved

    def resolve_links(self) -> None:
        """Turn every link into a copy of the file it leads to."""
        for name, target in self.links.items():
            seen = {name}
            while target in self.links and target not in seen:
                seen.add(target)
                target = self.links[target]
            path, source = self.place(name), self.place(target)
            if path is None:
                continue
            if source is None or not source.is_file():
                self.refuse(name, f"links to {target!r}, which is no file of the archive")
            size = source.stat().st_size
            with open(source, "rb") as file:
                self.file(name, size, file)

    @contextmanager
    def _writing(self, name: str, path: Path) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            self.refuse(name, "appears twice, or as a file and a folder")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left to unpack {self.archive}; make room and run the command again"
                ) from error
            if error.errno == errno.ENAMETOOLONG:
                self.refuse(name, "has too long a name")
            raise


def _unpack_zip(archive: Path, extraction: Extraction) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        declared = sum(member.file_size for member in members)
        if declared > extraction.rule.limit:
            extraction.refuse(members[0].filename, f"and the others unpack to {_bytes(declared)}, beyond the limit")
        for member in members:
            mode = member.external_attr >> 16
            kind = stat.S_IFMT(mode)
            if member.flag_bits & 1:
                extraction.refuse(member.filename, "is encrypted")
            if stat.S_ISLNK(mode):
                if member.file_size > 4096:
                    extraction.refuse(member.filename, "is a link of absurd length")
                extraction.link(member.filename, opened.read(member).decode("utf-8", "replace"), symbolic=True)
            elif member.is_dir():
                extraction.directory(member.filename)
            elif kind not in (0, stat.S_IFREG):
                extraction.refuse(member.filename, "is a device or another special file")
            else:
                with opened.open(member) as source:
                    extraction.file(member.filename, member.file_size, source)


def _decompressed(archive: Path) -> IO[bytes]:
    """The stream inside of a gzip, bzip2 or xz file, or the file itself; unlike tarfile's own it checks checksums."""
    import bz2
    import gzip

    with open(archive, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(archive)  # type: ignore[return-value]
    if start.startswith(b"BZh"):
        return bz2.open(archive)
    return lzma.open(archive) if start == b"\xfd7zXZ\x00" else open(archive, "rb")


def _unpack_tar(archive: Path, extraction: Extraction) -> None:
    # A stream, read once: a member's size is checked before a byte of it is written.
    with _decompressed(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as opened:
        for member in opened:
            if member.isdir():
                extraction.directory(member.name)
            elif member.issym() or member.islnk():
                extraction.link(member.name, member.linkname, symbolic=member.issym())
            elif member.isreg() and not member.issparse():
                source = opened.extractfile(member)
                assert source is not None, "a regular file has content"
                extraction.file(member.name, member.size, source)
            else:
                extraction.refuse(member.name, "is a device or another special file")
        trailing = 0
        while chunk := stream.read(CHUNK):  # to the end, where the checksum of the compressed stream stands
            trailing += len(chunk)
            if trailing > extraction.rule.limit:
                raise UserError(f"{archive}: refused, it goes on beyond the limit of {_bytes(extraction.rule.limit)}")


def _unpack_gz(archive: Path, target: Path, rule: Unpack) -> None:
    import gzip

    written = 0
    with gzip.open(archive, "rb") as source, open(target, "xb") as file:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > rule.limit:
                raise UserError(f"{archive}: refused, it unpacks to more than the limit of {_bytes(rule.limit)}")
            with _disk_errors(target):
                file.write(chunk)
    if not written:
        raise EOFError("empty")


def unpack(archive: Path, rule: Unpack, dest: Path, holds: tuple[str, ...] = ()) -> None:
    """Unpack ``archive`` to ``dest / rule.to``, which appears at once and complete or not at all.

    Args:
        archive: zip, tar (any compression) or a single gzipped file.
        rule: kind, target, leading folder to drop, limit of the unpacked size.
        dest: an existing folder.
        holds: glob patterns relative to ``dest`` that the result must match.

    Raises:
        UserError: damaged, hostile or another archive than expected; no space; the target exists.
    """
    target = dest / rule.to
    if target.exists():
        raise UserError(f"{target} exists and is incomplete, expected {', '.join(holds)}; move it away and run again")
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if rule.kind == "gz":
            _unpack_gz(archive, temporary, rule)
        else:
            with _disk_errors(temporary):
                temporary.mkdir()
            extraction = Extraction(archive, temporary, rule)
            (_unpack_zip if rule.kind == "zip" else _unpack_tar)(archive, extraction)
            extraction.resolve_links()
            missing = _lacks(tuple(pattern.removeprefix(rule.to + "/") for pattern in holds), temporary)
            if missing is not None:
                raise UserError(f"{archive} is not the expected archive: it holds no {missing}")
        with _disk_errors(target):
            temporary.replace(target)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        UnicodeError,
        OSError,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{archive}: damaged or not a {rule.kind} archive ({reason}); nothing was unpacked") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _lacks(patterns: tuple[str, ...], folder: Path) -> str | None:
    """The first pattern that nothing below ``folder`` matches."""
    return next((pattern for pattern in patterns if next(folder.glob(pattern), None) is None), None)


def _result_of(file: File, entry: DataSet) -> tuple[str, ...]:
    """The patterns of ``entry.holds`` that unpacking ``file`` satisfies."""
    if file.unpack is None:
        return ()
    return tuple(p for p in entry.holds if p == file.unpack.to or p.startswith(file.unpack.to + "/"))


def complete(entry: DataSet, dest: Path) -> bool:
    """Whether everything a loader needs lies below ``dest`` (checksums of plain files included)."""
    if _lacks(entry.holds, dest) is not None:
        return False
    plain = [file for file in entry.files if file.unpack is None]
    return all((dest / file.path).is_file() and matches(dest / file.path, file.checksum) for file in plain)


def fetch(entry: DataSet, dest: Path, base_url: str | None = None) -> None:
    """Bring one data set below ``dest``; what is there already is left as it is.

    Args:
        entry: of the catalogue.
        dest: made when missing.
        base_url: a mirror that has the files under their catalogue paths.

    Raises:
        UserError: see ``download`` and ``unpack``; or the set has to be fetched by hand, after the steps were printed.
    """
    if complete(entry, dest):
        print(f"{entry.name}: complete; use it with --data {dest / entry.folder}")
        return
    print(f"{entry.name}: {entry.title} ({entry.download}); {entry.licence}; {entry.home}")
    if entry.note:
        print(f"{entry.name}: {entry.note}")
    with _disk_errors(dest):
        dest.mkdir(parents=True, exist_ok=True)
    for file in entry.files:
        path = dest / file.path
        result = _result_of(file, entry)
        if file.unpack is not None and _lacks(result or (file.unpack.to,), dest) is None:
            continue
        fetched = False
        if path.exists():
            if not matches(path, file.checksum):
                raise UserError(f"{path} is not the published file ({file.checksum}); move it away and run again")
        else:
            url = f"{base_url.rstrip('/')}/{file.path}" if base_url else file.url
            if url is None:
                _by_hand(entry, dest, file.path)
            download(file, url, path)
            fetched = True
        if file.checksum is None:
            print(f"{entry.name}: {path} has sha256 {sha256_file(path)} (unverified: the catalogue knows none)")
        if file.unpack is not None:
            try:
                unpack(path, file.unpack, dest, result)
            except UserError:
                if fetched and not (dest / file.unpack.to).exists():
                    path.unlink(missing_ok=True)
                raise
            if fetched:
                path.unlink()
    missing = _lacks(entry.holds, dest)
    if missing is not None:
        _by_hand(entry, dest, missing)
    print(f"{entry.name}: complete; use it with --data {dest / entry.folder}")


def _by_hand(entry: DataSet, dest: Path, lacks: str) -> NoReturn:
    for number, step in enumerate(entry.by_hand, 1):
        print(f"  {number}. {step.format(dest=dest)}")
    raise UserError(
        f"{entry.name} has to be fetched by hand under its licence (steps on standard output): {dest} holds no {lacks}"
    )


def find(name: str) -> DataSet:
    """The entry called ``name``.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(CATALOGUE)}"
    raise UserError(f"no data set is called {name!r}; {hint}")


def table() -> str:
    """The catalogue, a line an entry."""
    rows = [("name", "download", "how", "papers", "licence")]
    for entry in CATALOGUE.values():
        how = "by hand" if entry.by_hand else "direct"
        rows.append((entry.name, entry.download, how, ", ".join(entry.papers), entry.licence))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*(f"{row[c]:<{widths[c]}}" for c in range(4)), row[4]]) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="data sets of --list")
    parser.add_argument("--dest", type=Path, default=ROOT / "data", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the catalogue")
    parser.add_argument("--base-url", metavar="URL", help="a mirror that has the files under their paths below DIR")

    def body(options: argparse.Namespace) -> int:
        if options.list:
            print(table())
            return 0
        if not options.names:
            raise UserError("no NAME given; --list prints the data sets")
        if options.base_url and urllib.parse.urlsplit(options.base_url).scheme not in ("http", "https"):
            raise UserError(f"--base-url is {options.base_url!r}; expected http:// or https://")
        for entry in [find(name) for name in options.names]:
            fetch(entry, options.dest, options.base_url)
        return 0

    return tool(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
