"""new_paper, reproduce, gallery and bench, on a house with one small paper."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shared import fingerprint
from tests.conftest import ROOT
from tools import bench, common, gallery, new_paper, reproduce


@pytest.fixture
def house(toy, monkeypatch):
    """The root of a house that holds the scaffold alone."""
    root = toy.parent.parent
    (root / "README.md").write_text("# House\n<!-- gallery:begin -->\n<!-- gallery:end -->\n")
    for module in (common, reproduce):
        monkeypatch.setattr(module, "ROOT", root)
    for module in (reproduce, bench):
        monkeypatch.setattr(module, "paper_folder", lambda slug: common.paper_folder(slug, root))
        monkeypatch.setattr(module, "papers", lambda: common.papers(root))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(root))
    monkeypatch.setattr("tempfile.tempdir", str(root))
    return root


def test_reproduce_writes_results_and_gallery_shows_them(house, capsys, monkeypatch):
    folder = house / "papers" / "toy"
    assert reproduce.main(["toy", "--preset", "smoke", "--jobs", "2"]) == 0
    assert reproduce.main(["--all"]) == 0
    result = json.loads((folder / "results" / "default.json").read_text())
    assert result["claims"][0]["holds"] and result["machine"]["cores"] and (folder / "results" / "figure.png").exists()
    assert (folder / "results" / "smoke-figure.png").exists()
    assert str(house) not in json.dumps(result)
    assert gallery.main(["--check"], root=house) == 1
    assert gallery.main([], root=house) == 0 and gallery.main(["--check"], root=house) == 0
    page, top = (folder / "README.md").read_text(), (house / "README.md").read_text()
    assert "### `default`" in page and "**holds**" in page and "halfcircles/perceptron/test_accuracy" in page
    assert page.index("`default`") < page.index("`smoke`") and "Stale" not in page
    assert "A Toy" in top and "generated" in top

    # taken as it is when nothing has changed; marked stale, then measured again, when the code has
    stamp = (folder / "runs" / "reproduce-smoke" / "result.json").stat().st_mtime_ns
    assert reproduce.main(["toy", "--preset", "smoke"]) == 0
    assert (folder / "runs" / "reproduce-smoke" / "result.json").stat().st_mtime_ns == stamp
    (folder / "model.py").write_text((folder / "model.py").read_text() + "\nCHANGED = 1\n")
    assert gallery.main([], root=house) == 0
    assert (folder / "README.md").read_text().count("**Stale:**") == 2
    assert reproduce.main(["toy", "--preset", "smoke"]) == 0
    assert (folder / "runs" / "reproduce-smoke" / "result.json").stat().st_mtime_ns != stamp


def test_reproduce_goes_on_with_an_interrupted_run(house):
    folder = house / "papers" / "toy"
    run = folder / "runs" / "reproduce-smoke"
    words = [sys.executable, "train.py", "--preset", "smoke", "--out", str(run), "--stop-after", "5"]
    assert subprocess.run(words, cwd=folder, capture_output=True).returncode == 0
    assert list((run / "checkpoint" / "units").glob("*.json"))
    assert reproduce.main(["toy", "--preset", "smoke"]) == 0
    assert (folder / "results" / "smoke.json").exists()


def test_confirm_repeats_a_part_of_what_is_recorded(house, capsys):
    folder = house / "papers" / "toy"
    path = folder / "results" / "smoke.json"
    assert reproduce.main(["toy", "--preset", "smoke", "--seeds", "2"]) == 0
    recorded = json.loads(path.read_text())
    model = (folder / "model.py").read_text()
    (folder / "model.py").write_text(model + "\nCHANGED = 1\n")
    words = ["toy", "--preset", "smoke", "--confirm", "--seeds 1"]
    assert reproduce.main(words) == 0
    confirmed = json.loads(path.read_text())
    assert confirmed.pop("confirmed") == {
        "code": fingerprint.of_paper(folder),
        "words": "--seeds 1",
        "numbers": len(recorded["metrics"]),
    }
    assert confirmed == recorded  # with the fingerprint of the code that was measured
    assert gallery.main([], root=house) == 0
    page = (folder / "README.md").read_text()
    assert "`--seeds 1`" in page and "Stale" not in page

    # other numbers are told, and nothing is written
    (folder / "model.py").write_text(model.replace("nn.ReLU()", "nn.Threshold(9.0, 0.0)"))
    assert (folder / "model.py").read_text() != model
    before = path.read_bytes()
    assert reproduce.main(words) == 1
    assert "recorded are" in capsys.readouterr().err and path.read_bytes() == before
    assert gallery.main([], root=house) == 0 and "**Stale:**" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["tov"], "did you mean toy"),
        ([], "name the papers"),
        (["toy", "--all"], "name the papers"),
        (["--presets", "x"], "unrecognized"),
        (["toy", "--seeds", "many"], "invalid int"),
        (["toy", "--jobs", "0"], "at least 1"),
    ],
)
def test_reproduce_bad_usage(house, capsys, argv, part):
    assert reproduce.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err


def test_reproduce_tells_what_failed_and_keeps_old_results(house, capsys):
    results = house / "papers" / "toy" / "results"
    (results / "real.json").write_text("{}")
    assert reproduce.main(["toy", "--preset", "real"]) == 1
    assert "toy/real" in capsys.readouterr().err and (results / "real.json").read_text() == "{}"


def test_one_measurement_at_a_time(house, capsys):
    with common.machine_lock("first"):
        assert reproduce.main(["toy", "--preset", "smoke"]) == 2
        assert "another measurement" in capsys.readouterr().err


def test_gallery_needs_its_markers(house, capsys):
    (house / "README.md").write_text("# House\n")
    assert gallery.main([], root=house) == 2
    assert "gallery:begin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["My-Paper"], "identifier"),
        (["class"], "identifier"),
        (["toy"], "already"),
        (["ok", "--title", 'a"b'], "quotes"),
    ],
)
def test_new_paper_bad_usage(house, capsys, monkeypatch, argv, part):
    make = new_paper.make
    monkeypatch.setattr(new_paper, "make", lambda slug, title: make(slug, title, root=house))
    assert new_paper.main(argv) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1


def test_new_paper_is_complete_and_its_tests_pass(house, monkeypatch, capsys):
    make = new_paper.make
    monkeypatch.setattr(new_paper, "make", lambda slug, title: make(slug, title, root=house))
    monkeypatch.setattr(new_paper, "ROOT", house)
    assert new_paper.main(["fresh", "--title", "Fresh Air"]) == 0
    folder = house / "papers" / "fresh"
    assert all((folder / name).exists() for name in new_paper.FILES)
    assert "__" not in (folder / "paper.toml").read_text() and "Fresh Air" in (folder / "README.md").read_text()
    words = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(folder)]
    assert subprocess.run(words, capture_output=True).returncode == 0


def test_bench_compares_both_sides_in_one_run(house, monkeypatch, capsys):
    import torch

    def workloads():
        x = torch.randn(64, 64)
        yield bench.Workload("product", lambda: lambda: x @ x, lambda: lambda: (x @ x, x @ x), "twice", target=1.0)
        yield bench.Workload("alone", lambda: lambda: x.sum(), other_name="published", other_seconds=1.0)

    monkeypatch.setattr(bench, "load_workloads", lambda slug: workloads())
    monkeypatch.setattr(bench, "peak_memory", lambda slug, name: 12)
    (house / "papers" / "toy" / "results").mkdir(exist_ok=True)
    assert bench.main(["toy", "--rounds", "3"]) == 0
    content = json.loads((house / "papers" / "toy" / "results" / "bench.json").read_text())
    first, second = content["rows"]
    assert first["ratio"] > 1.2 and first["matmul_share"] > 0 and first["peak_mib"] == 12
    assert second["ratio"] == pytest.approx(1.0 / second["seconds"]) and second["matmul_share"] is None
    gallery.main([], root=house)
    assert "### Speed" in (house / "papers" / "toy" / "README.md").read_text()
    assert bench.main(["toy", "--only", "alone", "--dry", "--rounds", "1"]) == 0
    assert bench.main([]) == 2 and bench.main(["toy", "--rounds", "0"]) == 2
    monkeypatch.undo()
    assert bench.main(["nothing"]) == 2
