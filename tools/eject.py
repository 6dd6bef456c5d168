"""Copy one paper out of this repository, with the shared modules, dependencies and lock it needs, and nothing else.

uv run tools/eject.py ggcn ../ggcn-standalone        a folder that runs on its own: uv run train.py
uv run tools/eject.py ggcn ../mine --model-only      model.py alone, the licence in its head
"""

from __future__ import annotations

import argparse
import ast
import json
import posixpath
import re
import shutil
import sys
import tomllib
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.errors import UserError
from shared.fingerprint import imported_modules
from tools.common import ROOT, arguments, paper_folder, tool

DISTRIBUTIONS = {
    "PIL": "pillow",
    "curvlinops": "curvlinops-for-pytorch",
    "cv2": "opencv-python-headless",
    "mpl_toolkits": "matplotlib",
    "open_clip": "open-clip-torch",
    "ot": "pot",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Modules that are not called as the distribution they come in (with ``_`` for ``-``)."""

IMPLIED = {"torch.utils.tensorboard": "tensorboard"}
"""Modules that need another distribution than the one they belong to."""

IMPORTING = ("import_module", "__import__")
LOOKING = ("find_spec", "distribution", "files")
"""Functions of importlib that are given a module or distribution by name; the latter read a wheel's files."""

DROPPED_UV_KEYS = ("default-groups", "package", "workspace")
FILTERED_UV_KEYS = ("dependency-metadata", "extra-build-dependencies", "extra-build-variables", "sources")


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# Which modules do the files name?


@dataclass(frozen=True)
class Imported:
    """A module that a file names; ``optional`` when the file goes on without it."""

    module: str
    where: str
    optional: bool

    @property
    def top(self) -> str:
        """The first part of the dotted name."""
        return self.module.split(".")[0]


def _survives_absence(node: ast.Try) -> bool:
    names = {"ImportError", "ModuleNotFoundError", "Exception"}
    for handler in node.handlers:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if any(kind is None or (isinstance(kind, ast.Name) and kind.id in names) for kind in kinds):
            return True
    return False


def imports(path: Path) -> list[Imported]:
    """All imports of a file, those inside of functions and ``importlib.import_module("...")`` included."""
    found: list[Imported] = []

    def visit(node: ast.AST, optional: bool) -> None:
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.extend(Imported(alias.name, path.name, optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append(Imported(node.module, path.name, optional))
            found.extend(Imported(f"{node.module}.{alias.name}", path.name, optional) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in (*IMPORTING, *LOOKING) and isinstance(node.args[0].value, str):
                found.append(Imported(node.args[0].value, path.name, optional or called in LOOKING))
        guarded = node.body if isinstance(node, ast.Try) and _survives_absence(node) else []
        for child in children:
            visit(child, optional or child in guarded)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


# Which distributions bring them?


@dataclass(frozen=True)
class Requirement:
    """A dependency as pyproject.toml states it. ``group`` or ``extra`` tell where, both empty for the project's own."""

    name: str
    text: str
    group: str = ""
    extra: str = ""


def stated(pyproject: dict[str, Any]) -> list[Requirement]:
    """All requirements of pyproject.toml: the project's own, then those of groups, then those of extras."""
    project = pyproject["project"]
    found: list[Requirement] = []

    def add(texts: list[Any], group: str = "", extra: str = "") -> None:
        for text in texts:
            if isinstance(text, str):  # a table includes another group, which is read by itself
                match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", text)
                assert match is not None, f"a requirement begins with a name: {text!r}"
                found.append(Requirement(normalised(match[0]), text, group, extra))

    add(project.get("dependencies", []))
    for group, texts in pyproject.get("dependency-groups", {}).items():
        add(texts, group=group)
    for extra, texts in project.get("optional-dependencies", {}).items():
        add(texts, extra=extra)
    return found


def declared(pyproject: dict[str, Any]) -> dict[str, Requirement]:
    """The requirements by name; where one is stated twice, the project's own win over groups, groups over extras."""
    return {requirement.name: requirement for requirement in reversed(stated(pyproject))}


def distribution(module: str) -> str:
    """The distribution that brings a module, by its top-level name."""
    return DISTRIBUTIONS.get(module, normalised(module))


@dataclass
class Needs:
    """What an ejected paper depends on: requirements of its own, whole extras, names nobody declares."""

    base: dict[str, Requirement] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    undeclared: list[Imported] = field(default_factory=list)


def needs(files: list[Path], paper: dict[str, Any], pyproject: dict[str, Any]) -> Needs:
    """The dependencies of the copied ``files`` of a paper.

    Raises:
        UserError: a file needs an extra that paper.toml does not name, or paper.toml names what does not exist.
    """
    known = declared(pyproject)
    local = {path.stem for path in files} | {"shared"}
    extras = tuple(paper.get("extras", []))
    available = pyproject["project"].get("optional-dependencies", {})
    for extra in extras:
        if extra not in available:
            raise UserError(
                f"paper.toml names the extra {extra!r}; pyproject.toml has {', '.join(available) or 'none'}"
            )
    result = Needs(extras=extras)
    for wheel in paper.get("data_wheels", []):
        if normalised(wheel) not in known:
            raise UserError(f"paper.toml names the data wheel {wheel!r}, which pyproject.toml does not declare")
        result.base[normalised(wheel)] = known[normalised(wheel)]
    for imported in (found for path in files for found in imports(path)):
        if imported.module in IMPLIED:
            result.base.setdefault(IMPLIED[imported.module], known[IMPLIED[imported.module]])
        if imported.top in local or imported.top in sys.stdlib_module_names:
            continue
        requirement = known.get(distribution(imported.top))
        if requirement is None:
            if not imported.optional:
                result.undeclared.append(imported)
        elif not requirement.extra:
            result.base[requirement.name] = requirement
        elif requirement.extra not in extras and not imported.optional:
            raise UserError(
                f"{imported.where} imports {imported.top} of the extra {requirement.extra!r}; "
                f"expected it in extras of paper.toml, which has {list(extras)}"
            )
    return result


# uv.lock, cut down to what those need


def _inline(value: Any) -> str:
    """A value as uv writes it in the lock: inline tables and one-line arrays."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _array(key: str, items: list[dict[str, Any]], always_tall: bool = True) -> str:
    if len(items) == 1 and not always_tall:
        return f"{key} = {_inline(items)}\n"
    return f"{key} = [\n" + "".join(f"    {_inline(item)},\n" for item in items) + "]\n"


class Lock:
    """The text of a uv.lock, by package; packages are parsed only when they are reached.

    Raises:
        UserError: the lock is missing, unreadable or does not belong to the project.
    """

    def __init__(self, path: Path, root: str) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; expected the project's uv.lock") from error
        self.path = path
        self.preamble, *blocks = re.split(r"(?m)^\[\[package\]\]\n", text)
        self.blocks: dict[tuple[str, str], str] = {}
        self.versions: dict[str, list[str]] = defaultdict(list)
        self.parsed: dict[tuple[str, str], dict[str, Any]] = {}
        for block in blocks:
            name = re.search(r'(?m)^name = "(.*)"$', block)
            version = re.search(r'(?m)^version = "(.*)"$', block)
            if name is None:
                raise UserError(f"{path} has a package without a name; expected a lock that uv wrote")
            key = (name[1], version[1] if version else "")
            self.blocks[key] = block
            self.versions[name[1]].append(key[1])
        if root not in self.versions:
            raise UserError(f"{path} does not lock {root}; run uv lock")
        self.root = self.package((root, self.versions[root][0]))

    def package(self, key: tuple[str, str]) -> dict[str, Any]:
        """The parsed table of a package."""
        if key not in self.parsed:
            self.parsed[key] = tomllib.loads(self.blocks[key].replace("[package.", "["))
        return self.parsed[key]

    def keys(self, entry: dict[str, Any]) -> list[tuple[str, str]]:
        """The packages that a dependency entry can mean."""
        versions = [entry["version"]] if "version" in entry else self.versions[entry["name"]]
        return [(entry["name"], version) for version in versions]

    def closure(self, entries: list[dict[str, Any]]) -> dict[tuple[str, str], set[str]]:
        """All packages that ``entries`` lead to under any marker, with the extras of them that are asked for."""
        reached: dict[tuple[str, str], set[str]] = {}
        todo = list(entries)
        while todo:
            entry = todo.pop()
            extras = set(entry.get("extra", []))
            for key in self.keys(entry):
                table = self.package(key)
                if key not in reached:
                    reached[key] = set()
                    todo += table.get("dependencies", [])
                for extra in extras - reached[key]:
                    todo += table.get("optional-dependencies", {}).get(extra, [])
                reached[key] |= extras
        return reached

    def entries(self, requirement: Requirement) -> list[dict[str, Any]]:
        """What the root package of the lock resolved a requirement to (one entry a fork)."""
        if requirement.extra:
            where = self.root.get("optional-dependencies", {}).get(requirement.extra, [])
        elif requirement.group:
            where = self.root.get("dev-dependencies", {}).get(requirement.group, [])
        else:
            where = self.root.get("dependencies", [])
        found = [entry for entry in where if entry["name"] == requirement.name]
        if not found:
            raise UserError(f"{self.path} does not lock {requirement.text!r} of pyproject.toml; run uv lock")
        return found

    def metadata(self, requirement: Requirement) -> dict[str, Any]:
        """The root package's statement of a requirement."""
        metadata = self.root["metadata"]
        if requirement.group:
            rows = metadata.get("requires-dev", {}).get(requirement.group, [])
        else:
            rows = metadata.get("requires-dist", [])
        wanted = f"extra == '{requirement.extra}'" if requirement.extra else ""
        for row in rows:
            marker = row.get("marker", "")
            if row["name"] == requirement.name and (wanted in marker if wanted else "extra ==" not in marker):
                return dict(row)
        raise UserError(f"{self.path} has no metadata of {requirement.text!r}; run uv lock")

    def _kept(self, key: tuple[str, str], extras: set[str]) -> str:
        """A package's text without the extras that nobody asks for any more."""
        block = self.blocks[key]
        unused = set(self.package(key).get("optional-dependencies", {})) - extras
        for extra in unused:
            block = re.sub(rf"(?m)^{re.escape(extra)} = \[(?:\]|\n(?:    .*\n)*\])\n", "", block)
        return re.sub(r"(?m)^\[package\.optional-dependencies\]\n(?:\n|\Z)", "", block)

    def pruned(self, name: str, version: str, base: list[Requirement], extras: dict[str, list[Requirement]]) -> str:
        """The lock of a virtual project ``name`` that depends on ``base``, and on ``extras`` where asked for."""
        own = [entry for requirement in base for entry in self.entries(requirement)]
        optional = {e: [x for requirement in rows for x in self.entries(requirement)] for e, rows in extras.items()}
        reached = self.closure([*own, *(entry for entries in optional.values() for entry in entries)])

        def by_name(row: dict[str, Any]) -> tuple[str, str]:
            return row["name"], row.get("version", "")

        root = f'name = "{name}"\nversion = "{version}"\nsource = {{ virtual = "." }}\n'
        if own:
            root += _array("dependencies", sorted(own, key=by_name))
        if optional:
            root += "\n[package.optional-dependencies]\n"
            root += "".join(_array(extra, sorted(optional[extra], key=by_name)) for extra in sorted(optional))
        rows = [self.metadata(r) for r in [*base, *(r for rows in extras.values() for r in rows)]]
        root += "\n[package.metadata]\n" + _array("requires-dist", sorted(rows, key=by_name), always_tall=False)
        if optional:
            root += f"provides-extras = {_inline(sorted(optional))}\n"

        blocks = {key: self._kept(key, reached[key]) for key in self.blocks if key in reached}
        blocks[(name, version)] = root
        texts = [f"[[package]]\n{blocks[key].rstrip()}\n" for key in sorted(blocks, key=lambda key: key[0])]
        return self._preamble({key[0] for key in reached}) + "\n".join(texts)

    def _preamble(self, names: set[str]) -> str:
        """Header and manifest, with the stated metadata of the packages that are still there."""
        head, *stated = re.split(r"(?m)^\[\[manifest\.dependency-metadata\]\]\n", self.preamble)
        kept = [text for text in stated if tomllib.loads(text)["name"] in names]
        if not kept and re.search(r"(?m)^\[manifest\]\n\Z", head.rstrip("\n") + "\n"):
            head = head.rstrip("\n").removesuffix("[manifest]")
        parts = [head.rstrip("\n"), *(f"[[manifest.dependency-metadata]]\n{text}".rstrip("\n") for text in kept)]
        return "\n\n".join(parts) + "\n\n"


# pyproject.toml, README.md


def _toml(value: Any) -> str:
    """A value in TOML, tall when it is a list of some length."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        line = "[" + ", ".join(_toml(item) for item in value) + "]"
        return line if len(line) < 100 else "[\n" + "".join(f"    {_toml(item)},\n" for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def project_text(
    name: str, title: str, pyproject: dict[str, Any], base: list[str], extras: dict[str, list[str]], names: set[str]
) -> str:
    """The ejected pyproject.toml; ``names`` are the locked packages, which decide what of [tool.uv] still matters."""
    project = pyproject["project"]
    lines = [
        f"# Taken out of {project['name']} {project['version']} by its tools/eject.py.",
        "[project]",
        f"name = {_toml(name)}",
        f"version = {_toml(project['version'])}",
        f"description = {_toml(title)}",
        'readme = "README.md"',
        *(f"{key} = {_toml(project[key])}" for key in ("license", "license-files") if key in project),
        f"requires-python = {_toml(project['requires-python'])}",
        "dependencies = [",
        *(f"    {_toml(text)}," for text in base),
        "]",
    ]
    if extras:
        lines += ["", "[project.optional-dependencies]"]
        lines += [f"{_key(extra)} = {_toml(texts)}" for extra, texts in extras.items()]
    uv = pyproject.get("tool", {}).get("uv", {})
    lines += ["", "[tool.uv]", "package = false"]
    for key, value in uv.items():
        if key not in DROPPED_UV_KEYS and key not in FILTERED_UV_KEYS:
            lines.append(f"{key} = {_toml(value)}")
    for key in FILTERED_UV_KEYS:
        value = uv.get(key)
        if isinstance(value, dict):
            value = {package: item for package, item in value.items() if normalised(package) in names}
            if value:
                lines += ["", f"[tool.uv.{key}]", *(f"{_key(k)} = {_toml(item)}" for k, item in value.items())]
        elif isinstance(value, list):
            for table in value:
                if normalised(table["name"]) in names:
                    lines += ["", f"[[tool.uv.{key}]]", *(f"{_key(k)} = {_toml(item)}" for k, item in table.items())]
    return "\n".join(lines) + "\n"


def readme_text(text: str, slug: str, copied: set[str], repository: str) -> str:
    """The paper's README for a folder of its own: no ``cd papers/...``, no links that lead out of it.

    Links to files of the repository that do not come along point to ``repository`` when it is known, else only their
    text stays.
    """

    def mend(match: re.Match[str]) -> str:
        image, label, target = match[1], match[2], match[3]
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z][a-z0-9+.-]*:|/", path):
            return match[0]
        full = posixpath.normpath(posixpath.join("papers", slug, path))
        inside = posixpath.relpath(full, posixpath.join("papers", slug))
        if any(name == inside or name.startswith(inside.rstrip("/") + "/") for name in copied):
            return match[0]
        if full.startswith("shared") and full in copied:
            return f"{image}[{label}]({full}{mark}{anchor})"
        return f"{image}[{label}]({repository}/blob/main/{full}{mark}{anchor})" if repository else label

    text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", mend, text)
    return re.sub(rf"(?m)^\s*cd papers/{re.escape(slug)}/?[ \t]*\n", "", text)


# The command


def _files(folder: Path) -> Iterator[Path]:
    """What of a paper's folder is the paper, relative to it: never runs, caches or hidden files."""
    yield from (path.relative_to(folder) for path in sorted(folder.glob("*.py")))
    for name in ("README.md", "paper.toml"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; expected README.md and paper.toml beside train.py")
        yield Path(name)
    for name in ("weights", "results"):
        for path in sorted((folder / name).rglob("*")):
            relative = path.relative_to(folder)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in relative.parts):
                yield relative


def eject(slug: str, dest: Path, root: Path = ROOT, model_only: bool = False) -> None:
    """Write the paper to ``dest``, which appears complete or not at all.

    Args:
        slug: folder name below ``root / "papers"``.
        dest: must not exist, or be an empty folder.
        root: the repository.
        model_only: only model.py.

    Raises:
        UserError: unknown paper, ``dest`` in use, or a paper that imports what pyproject.toml does not declare.
    """
    folder = paper_folder(slug, root)
    dest = dest.resolve()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} is in use; expected a folder that does not exist or is empty")
    if dest.is_relative_to(folder) or dest.is_relative_to(root / "shared"):
        raise UserError(f"{dest} lies inside of what is copied; choose a folder elsewhere")
    temporary = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        if model_only:
            _write_model(folder, temporary, root)
        else:
            _write_all(folder, temporary, root)
        if dest.exists():
            dest.rmdir()
        temporary.rename(dest)
    except OSError as error:
        raise UserError(f"cannot write {dest}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(folder: Path, out: Path, root: Path) -> None:
    """model.py with the licence as comments: both notices have to go along with the code."""
    licence = (root / "LICENSE").read_text(encoding="utf-8").strip().splitlines()
    head = [f"# papers/{folder.name}/model.py of {_read_toml(root / 'pyproject.toml')['project']['name']}.", "#"]
    head += [f"# {line}".rstrip() for line in licence]
    source = (folder / "model.py").read_text(encoding="utf-8")
    (out / "model.py").write_text("\n".join(head) + "\n\n" + source, encoding="utf-8")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _check_syntax(path: Path) -> None:
    try:
        ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not valid Python: {error}") from error


def _write_all(folder: Path, out: Path, root: Path) -> None:
    pyproject, paper = _read_toml(root / "pyproject.toml"), _read_toml(folder / "paper.toml")
    own = list(_files(folder))
    sources = [folder / path for path in own if path.suffix == ".py" and len(path.parts) == 1]
    for path in sources:
        _check_syntax(path)
    package = root / "shared"
    modules = imported_modules(sources, package)
    if modules:
        parents = {
            parent / "__init__.py" for path in modules for parent in path.parents if parent.is_relative_to(package)
        }
        modules = sorted({*modules, *(path for path in parents if path.is_file())})

    wanted = needs([*sources, *modules], paper, pyproject)
    lock = Lock(root / "uv.lock", normalised(pyproject["project"]["name"]))
    base = sorted(wanted.base.values(), key=lambda requirement: requirement.name)
    extras = {extra: [r for r in stated(pyproject) if r.extra == extra] for extra in wanted.extras}
    name = f"{normalised(folder.name)}-reproduction"
    every = [*base, *(requirement for rows in extras.values() for requirement in rows)]
    entries = [entry for requirement in every for entry in lock.entries(requirement)]
    names = {key[0] for key in lock.closure(entries)}
    for imported in wanted.undeclared:  # a module of a dependency's dependency is as good, any other is a mistake
        if distribution(imported.top) not in names:
            raise UserError(f"{imported.where} imports {imported.top}, which pyproject.toml does not declare")

    for path in own:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, out / path)
    for path in modules:
        target = out / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for extra_file in ("LICENSE", ".python-version"):
        if (root / extra_file).is_file():
            shutil.copyfile(root / extra_file, out / extra_file)
    copied = {path.as_posix() for path in own} | {path.relative_to(root).as_posix() for path in modules} | {"LICENSE"}
    repository = next((v for k, v in pyproject["project"].get("urls", {}).items() if k.lower() == "repository"), "")
    readme = readme_text((out / "README.md").read_text(encoding="utf-8"), folder.name, copied, repository.rstrip("/"))
    (out / "README.md").write_text(readme, encoding="utf-8")
    text = project_text(
        name,
        f"{paper.get('title', folder.name)}: a reproduction",
        pyproject,
        [requirement.text for requirement in base],
        {extra: [requirement.text for requirement in rows] for extra, rows in extras.items()},
        names,
    )
    (out / "pyproject.toml").write_text(text, encoding="utf-8")
    (out / "uv.lock").write_text(lock.pruned(name, pyproject["project"]["version"], base, extras), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("slug", metavar="SLUG", help="a folder of papers/")
    parser.add_argument("dest", metavar="DEST", type=Path, help="must not exist, or be empty")
    parser.add_argument("--model-only", action="store_true", help="copy model.py alone, with the licence in its head")

    def body(options: argparse.Namespace) -> int:
        eject(options.slug, options.dest, ROOT, options.model_only)
        then = "" if options.model_only else f"; next: cd {options.dest} && uv run train.py"
        print(f"{'model.py of ' * options.model_only}{options.slug} is in {options.dest}{then}")
        return 0

    return tool(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
