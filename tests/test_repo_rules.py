"""What every folder keeps to, found by looking: there is no list of papers anywhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared import fingerprint
from shared.cli import parse
from shared.errors import UserError
from shared.paper import read_paper
from tests.conftest import ROOT, run_folder
from tools import gallery
from tools.common import papers

SLUGS = papers()
each_paper = pytest.mark.parametrize("slug", SLUGS)
HEADINGS = [
    "Claim",
    "Run",
    "Results",
    "Method map",
    "Data",
    "Paper vs. official code",
    "Your own data",
    "Citation",
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folder_of(slug: str) -> Path:
    return ROOT / "papers" / slug


def tracked() -> list[Path]:
    """Files that git tracks, or would: what a reader of the repository gets."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.splitlines() if (path := ROOT / name).is_file()]


def imports(path: Path) -> set[str]:
    """Top-level names that a module imports, anywhere in it; "." for a relative import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
    return found


def names(requirements: list) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements if isinstance(text, str)}


CORE = names(PYPROJECT["project"]["dependencies"])
GROUPS = {group: names(rows) for group, rows in PYPROJECT["dependency-groups"].items()}
EXTRAS = {extra: names(rows) for extra, rows in PYPROJECT["project"]["optional-dependencies"].items()}


# ---- the house -------------------------------------------------------------------------------------------------------


def test_there_are_papers():
    assert SLUGS


def test_extras_are_only_the_two():
    assert set(EXTRAS) == {"mmdet3d", "peers"}
    assert set(PYPROJECT["dependency-groups"]) == set(PYPROJECT["tool"]["uv"]["default-groups"])


def test_declared_dependencies_are_imported_and_imported_ones_declared():
    where = packages_distributions()
    files = [p for p in tracked() if p.suffix == ".py" and p.parts[len(ROOT.parts)] in ("papers", "shared", "tools")]
    own = {"shared", "tools", "model", "data", "papers", "."} | {p.stem for p in files}
    used: set[str] = set()
    for path in files:
        if "template" in path.parts or "benches" in path.parts:
            continue
        for module in imports(path) - own - set(sys.stdlib_module_names) - {"__future__"}:
            dists = {canonicalize_name(name) for name in where.get(module, [])}
            allowed = CORE | set().union(*(GROUPS[g] for g in GROUPS if g != "dev"))
            if path.parts[len(ROOT.parts)] == "papers":
                for extra in read_paper(folder_of(path.parts[len(ROOT.parts) + 1])).extras:
                    allowed |= EXTRAS[extra]
            assert dists & allowed, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare"
            used |= dists
    idle = CORE - used
    assert not idle, f"declared in [project] dependencies and imported nowhere: {sorted(idle)}"


def test_no_file_is_large():
    for path in tracked():
        size, name = path.stat().st_size, path.relative_to(ROOT).as_posix()
        if name == "uv.lock":
            continue
        limit = 300_000
        if "/weights/" in name and path.suffix == ".safetensors":
            limit = 3_000_000
        elif "/results/" in name and path.suffix == ".gif":
            limit = 1_000_000
        assert size <= limit, f"{name} has {size} bytes, at most {limit}"


def test_no_path_of_a_machine_and_no_unfinished_words():
    pattern = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|mnt|data\d*)/\w")
    for path in tracked():
        if path.suffix in (".py", ".md", ".toml", ".json", ".cff", ".yaml", "") and path.name != "uv.lock":
            text = path.read_text(encoding="utf-8")
            found = pattern.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found and text[found.start() : found.end() + 40]!r}"
            if path != Path(__file__):
                assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path.relative_to(ROOT)


def test_blocks_are_fresh():
    for path, text in gallery.pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: run tools/gallery.py"


def test_nothing_lists_the_papers():
    """A paper is found by its folder; no tool, test or shared module names one."""
    for path in tracked():
        top = path.relative_to(ROOT).parts[0]
        if path.suffix != ".py" or top not in ("shared", "tools", "tests") or "benches" in path.parts:
            continue
        if top == "tests" and "papers" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        together = [slug for slug in SLUGS if re.search(rf"[\"']{slug}[\"']", text)]
        assert len(together) < 3 or path.name == "catalogue.py", f"{path.relative_to(ROOT)} lists papers: {together}"


# ---- one paper -------------------------------------------------------------------------------------------------------


@each_paper
def test_files_are_there(slug):
    folder = folder_of(slug)
    assert slug.isidentifier()
    for name in ("README.md", "paper.toml", "model.py", "data.py", "train.py", "results/default.json"):
        assert (folder / name).is_file(), name
    assert (ROOT / "tests" / "papers" / f"test_{slug}.py").is_file()


@each_paper
def test_model_is_self_contained(slug):
    found = imports(folder_of(slug) / "model.py")
    assert not found & {"shared", "papers", "data", "train", "tools", "."}, found


@each_paper
def test_no_import_across_papers_and_no_network(slug):
    for path in folder_of(slug).glob("*.py"):
        found = imports(path)
        assert not found & {"papers", "tools", "tests", "."}, path
        assert not found & {"requests", "urllib", "http", "pooch", "huggingface_hub", "wget", "gdown"}, path


@each_paper
def test_no_device_is_assumed_and_no_pickle_is_loaded(slug):
    for path in folder_of(slug).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ".cuda(" not in text and "pickle.load" not in text and "weights_only=False" not in text, path
        assert "allow_pickle=True" not in text, path


def config_and_presets(slug):
    """Config and PRESETS of a paper, without running it."""
    folder, name = folder_of(slug), "train_of_" + slug
    beside = [path.stem for path in folder.glob("*.py")]
    kept = {other: sys.modules.pop(other) for other in beside if other in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / "train.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # Config's annotations are looked up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for other in beside:
            sys.modules.pop(other, None)
        sys.modules.update(kept)
    return module.Config, module.PRESETS, folder


@each_paper
def test_every_config_field_is_read(slug):
    """A flag that changes nothing is a lie."""
    config, _, folder = config_and_presets(slug)
    read = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                for child in ast.walk(node):
                    child._in_config = True  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and not getattr(node, "_in_config", False):
                read.add(node.attr)
    unread = sorted({f.name for f in dataclasses.fields(config)} - read)
    assert not unread, f"fields of Config that nothing reads: {unread}"
    assert config.__dataclass_params__.frozen


@each_paper
def test_presets_are_described(slug):
    _, presets, _ = config_and_presets(slug)
    assert {"default", "smoke"} <= set(presets)
    for name, preset in presets.items():
        assert preset.data and preset.hardware and preset.hours > 0, name
    for name in ("default", "smoke"):
        assert not presets[name].needs_data, name
    assert not presets["smoke"].claims, "smoke asserts nothing"


@each_paper
def test_list_presets_answers_within_two_seconds(slug):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    best = 99.0
    for _ in range(2):
        begin = time.monotonic()
        words = [sys.executable, "train.py", "--list-presets"]
        done = subprocess.run(words, cwd=folder_of(slug), capture_output=True, text=True, env=env)
        best = min(best, time.monotonic() - begin)
        assert done.returncode == 0, done.stderr
    assert best < 2


@each_paper
def test_reported_numbers_have_a_source_and_claims_a_reason(slug):
    paper = read_paper(folder_of(slug))
    assert paper.slug == slug and paper.summary and paper.bibtex and 1 <= paper.rung <= 5
    assert paper.reported_none or len(paper.reported) >= 3
    assert len({row.metric for row in paper.reported}) == len(paper.reported), "a metric is reported twice"
    for row in paper.reported:
        assert row.source.strip(), row
    assert paper.claims
    for claim in paper.claims:
        assert claim.statement and claim.why, claim.name
    if paper.headline.reported:
        assert paper.headline.reported in {row.metric for row in paper.reported}


@each_paper
def test_committed_results_are_of_this_code_and_as_expected(slug):
    folder, paper = folder_of(slug), read_paper(folder_of(slug))
    code = fingerprint.of_paper(folder)
    default = json.loads((folder / "results" / "default.json").read_text(encoding="utf-8"))
    assert default["code"] == code, f"measure again: uv run tools/reproduce.py {slug}"
    if default["shared"] != fingerprint.of_shared(folder, ROOT / "shared"):
        print(f"note: shared modules have changed since results/default.json of {slug} was measured")
    assert {claim["name"] for claim in default["claims"]} == {claim.name for claim in paper.claims}
    for claim in default["claims"]:
        assert claim["holds"] == (paper.claim(claim["name"]).expected == "holds"), claim["name"]
        assert claim["thresholds"] == paper.claim(claim["name"]).thresholds, "thresholds changed after the run"
    assert default["seconds"] <= 600
    assert (folder / "results" / "figure.png").is_file()
    if paper.rung >= 3:
        assert any(claim["holds"] for claim in default["claims"])
    if paper.rung >= 4:
        rows = []
        for path in (folder / "results").glob("*.json"):
            result = json.loads(path.read_text(encoding="utf-8"))
            rows += [(result["metrics"], row) for row in result.get("reported", []) if row["comparable"]]
        near = [
            row["metric"]
            for metrics, row in rows
            if "std" in row and abs(metrics[row["measured"]]["mean"] - row["value"]) <= row["std"]
        ]
        assert near, "rung 4 needs a comparable number within the reported standard deviation"


@each_paper
def test_no_generated_number_is_comparable(slug):
    for path in (folder_of(slug) / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if any(row["kind"] == "generated" for row in result.get("data", [])):
            assert not any(row["comparable"] for row in result["reported"]), path.name


def commands(text: str) -> list[list[str]]:
    """Words after ``uv run train.py`` of the commands in a README's fenced blocks and code spans."""
    import shlex

    out = []
    for line in re.findall(r"uv run (?:torchrun [^\n`]*?)?train\.py([^\n`#]*)", text):
        words = shlex.split(line.replace("<", "").replace(">", ""))
        out.append(words)
    return out


@each_paper
def test_readme(slug, tmp_path):
    folder = folder_of(slug)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    config, presets, _ = config_and_presets(slug)
    found = commands(text.partition("<!-- results:begin -->")[0] + text.partition("<!-- results:end -->")[2])
    assert found, "the README shows no command"
    for words in found:
        shown = [str(tmp_path) if word in ("DIR", "PATH") else word for word in words]
        for flag in ("--data", "--out"):
            if flag in shown:
                shown[shown.index(flag) + 1] = str(tmp_path)
        if "--resume" in shown:
            continue
        if "--out" in shown:
            shown[shown.index("--out") + 1] = str(tmp_path / "out")
        try:
            parse(config, presets, shown, folder)
        except UserError as error:
            pytest.fail(f"README command {' '.join(words)}: {error}")
        if "--list-presets" in shown:
            assert run_folder(folder, shown).code == 0
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (folder / target).exists(), f"README links to {target}"


@each_paper
def test_readme_snippet_runs(slug, monkeypatch, capsys):
    folder = folder_of(slug)
    text = (folder / "README.md").read_text(encoding="utf-8")
    section = re.search(r"Use it in your code.*?```python\n(.*?)```", text, re.DOTALL)
    assert section, "no python block under 'Use it in your code'"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    beside = [path.stem for path in folder.glob("*.py")]
    kept = {name: sys.modules.pop(name) for name in beside if name in sys.modules}
    try:
        exec(compile(section[1], f"{slug}/README.md", "exec"), {"__name__": "snippet"})
    finally:
        for name in beside:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


@each_paper
def test_model_can_be_copied_alone(slug, tmp_path, monkeypatch):
    package = tmp_path / "lifted_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text((folder_of(slug) / "model.py").read_text(encoding="utf-8"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    module = importlib.import_module("lifted_project.model")
    assert module.__doc__
    for name in ("lifted_project", "lifted_project.model"):
        sys.modules.pop(name, None)


@each_paper
def test_smoke_stop_and_resume(slug, tmp_path):
    """A process with one hash seed, and a stopped and resumed run with another, give the same numbers."""
    folder = folder_of(slug)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    words = [sys.executable, "train.py", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "whole")]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "part"
    first = run_folder(folder, ["--preset", "smoke", "--device", "cpu", "--out", out, "--stop-after", "2"])
    assert first.code == 0 and not (out / "result.json").exists(), first.err
    second = run_folder(folder, ["--resume", out, "--stop-after", "1"])
    assert second.code == 0, second.err
    third = run_folder(folder, ["--resume", out])
    assert third.code == 0, third.err
    whole, part = (json.loads((p / "result.json").read_text()) for p in (tmp_path / "whole", out))
    assert whole["metrics"] == part["metrics"]
    assert whole["metrics"] and whole["data"] and (out / "figure.png").is_file()
