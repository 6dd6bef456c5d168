"""A hash of what code does, not of how it is laid out, equal under every Python version."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from pathlib import Path

_SKIP = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_LAYOUT = {tokenize.INDENT: "\x01", tokenize.DEDENT: "\x02", tokenize.NEWLINE: "\x03"}
_OPEN = {getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)}
_CLOSE = {getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)}


def _tokens(source: str) -> list[tuple[bool, str]]:
    """(is a string, text) of each token; an f-string is one token, as it was before Python 3.12."""
    lines = source.splitlines(keepends=True)
    out: list[tuple[bool, str]] = []
    depth, start = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _OPEN:
            depth += 1
            start = token.start if depth == 1 else start
        elif token.type in _CLOSE:
            depth -= 1
            if depth == 0:
                (r0, c0), (r1, c1) = start, token.end
                rows = lines[r0 - 1 : r1]
                rows[-1] = rows[-1][:c1]
                rows[0] = rows[0][c0:]
                out.append((True, "".join(rows)))
        elif depth == 0 and token.type not in _SKIP:
            text = _LAYOUT.get(token.type, token.string)
            out.append((token.type == tokenize.STRING, text))
    return out


def _without_docstrings(tokens: list[tuple[bool, str]]) -> list[str]:
    """Drop every statement that consists of string literals alone: docstrings and attribute docstrings."""
    kept: list[str] = []
    statement: list[tuple[bool, str]] = []
    for token in tokens:
        if token[1] in ("\x01", "\x02"):
            kept.append(token[1])
        elif token[1] == "\x03":
            if not all(is_string for is_string, _ in statement):
                kept += [text for _, text in statement] + ["\x03"]
            statement = []
        else:
            statement.append(token)
    return kept


def of_source(source: str) -> str:
    """Hex digest of the token stream of one module, without comments, docstrings and layout."""
    return hashlib.sha256("\x00".join(_without_docstrings(_tokens(source))).encode()).hexdigest()


def of_files(files: list[Path]) -> str:
    """Hex digest (16 characters) over several modules, by sorted file name."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        digest.update(f"{path.name}\0{of_source(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def of_paper(folder: Path) -> str:
    """Fingerprint of a paper: all ``.py`` files of its folder."""
    return of_files(sorted(folder.glob("*.py")))


def imported_modules(files: list[Path], package: Path) -> list[Path]:
    """Files of ``package`` (a folder named ``shared``) that ``files`` import, directly or through one another."""
    found: set[Path] = set()
    todo = list(files)
    while todo:
        for node in ast.walk(ast.parse(todo.pop().read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] != package.name or len(parts) < 2:
                    continue
                path = package.joinpath(*parts[1:]).with_suffix(".py")
                if path.is_file() and path not in found:
                    found.add(path)
                    todo.append(path)
    return sorted(found)


def of_shared(folder: Path, package: Path) -> str:
    """Fingerprint of the shared modules that a paper's files import."""
    return of_files(imported_modules(sorted(folder.glob("*.py")), package))
