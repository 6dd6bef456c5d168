"""The command line: what is accepted, and one line with exit code 2 for everything else."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, run_folder

BAD = [
    (["--preset", "smoek"], "did you mean smoke"),
    (["--preset"], "--preset"),
    (["--prest", "smoke"], "did you mean --preset"),
    (["--lr", "fast"], "--lr"),
    (["--lr"], "--lr"),
    (["--lr", "-0.1"], "positive"),
    (["--steps", "1.5"], "--steps"),
    (["--steps", "0"], "--steps"),
    (["--seed", "-1"], "at least 0"),
    (["--seeds", "0"], "at least 1"),
    (["--seed", "1", "--seeds", "2"], "contradict"),
    (["--stop-after", "0"], "at least 1"),
    (["--stop-after", "soon"], "--stop-after"),
    (["--device", "tpu"], "tpu"),
    (["--precision", "8"], "8"),
    (["positional"], "positional"),
    (["--data", "/no/such/folder"], "no such folder"),
    (["--preset", "real"], "needs --data"),
    (["--resume", "/no/such/run"], "no run there"),
    (["--no-hidden"], "unknown flag"),
    (["--hidden=many"], "--hidden"),
    (["--help-me"], "unknown flag"),
]


@pytest.mark.parametrize(("argv", "part"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_usage_is_one_line_and_exit_code_2(toy, argv, part):
    done = run_folder(toy, argv)
    assert done.code == 2, done.out + done.err
    assert len(done.errors) == 1 and part in done.errors[0], done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err + done.out
    assert not (toy / "runs").exists()


def test_bad_usage_is_told_before_torch_is_imported(toy):
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--lrr', '3']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=toy, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_list_presets_answers_within_two_seconds(toy):
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", "--list-presets"],
        cwd=toy,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - begin < 2
    assert done.returncode == 0 and all(name in done.stdout for name in ("default", "smoke", "real", "needs --data"))


def test_help_shows_the_docstrings_and_the_preset_values(toy):
    done = run_folder(toy, ["--preset", "smoke", "--help"])
    assert (
        done.code == 0 and "Adam learning rate" in done.out and "default: 4" in done.out and "--stop-after" in done.out
    )


def test_every_config_field_is_a_flag_and_underscores_work(toy, tmp_path):
    done = run_folder(toy, ["--preset=smoke", "--lr=0.5", "--stop_after", "1", "--out", tmp_path / "a"])
    assert done.code == 0, done.err
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["config"]["lr"] == 0.5 and stored["preset"] == "smoke" and stored["code"]


def test_check_data(toy, tmp_path):
    assert "nothing to look for" in run_folder(toy, ["--check-data"]).out
    missing = run_folder(toy, ["--data", tmp_path, "--check-data"])
    assert missing.code == 2 and "data.csv" in missing.errors[0]
    (tmp_path / "data.csv").write_text("0,1,0\n1,0,1\n")
    found = run_folder(toy, ["--data", tmp_path, "--check-data"])
    assert found.code == 0 and "2 rows, expected 1000" in found.out
    (tmp_path / "data.csv").write_text("0,1\n")
    assert "columns" in run_folder(toy, ["--data", tmp_path, "--check-data"]).errors[0]
    (tmp_path / "data.csv").write_text("0,x,1\n")
    assert len(run_folder(toy, ["--data", tmp_path, "--check-data"]).errors) == 1
    a_file = run_folder(toy, ["--data", tmp_path / "data.csv", "--check-data"])
    assert a_file.code == 2 and "is a file" in a_file.errors[0]


def test_real_preset_runs_on_the_given_folder(toy, tmp_path):
    rows = "".join(f"{i % 7},{i % 5},{i % 2}\n" for i in range(40))
    (tmp_path / "data.csv").write_text(rows)
    done = run_folder(toy, ["--preset", "real", "--data", tmp_path, "--steps", "3", "--out", tmp_path / "run"])
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["data"][0]["kind"] == "real" and str(tmp_path) not in json.dumps(result)


def test_out_that_holds_a_run_is_refused(toy, tmp_path):
    assert run_folder(toy, ["--preset", "smoke", "--out", tmp_path / "a"]).code == 0
    again = run_folder(toy, ["--preset", "smoke", "--out", tmp_path / "a"])
    assert again.code == 2 and "--resume" in again.errors[0]
    assert (tmp_path / "a" / "result.json").exists()


def test_run_names_within_one_second_differ(toy, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20240101-000000")
    for _ in range(2):
        assert run_folder(toy, ["--preset", "smoke"]).code == 0
    assert sorted(path.name for path in (toy / "runs").iterdir()) == [
        "smoke-20240101-000000",
        "smoke-20240101-000000-1",
    ]


def test_resume_refuses_another_configuration_and_names_the_fields(toy, tmp_path):
    out = tmp_path / "a"
    run_folder(toy, ["--preset", "smoke", "--lr", "0.2", "--out", out, "--stop-after", "2"])
    for argv, part in (
        (["--lr", "0.3"], "lr is 0.2 there and 0.3 here"),
        (["--preset", "default"], "preset smoke"),
        (["--seed", "7"], "seeds [0]"),
        (["--out", tmp_path / "b"], "contradict"),
        (["--check-data"], "contradict"),
    ):
        done = run_folder(toy, ["--resume", out, *argv])
        assert done.code == 2 and len(done.errors) == 1 and part in done.errors[0], done.err
    assert run_folder(toy, ["--resume", out, "--lr", "0.2"]).code == 0


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c | {"paper": "other"}, "a run of other"),
        (lambda c: c | {"config": c["config"] | {"width": 3}}, "width"),
        (lambda c: {"paper": "toy"}, "lacks"),
        (lambda c: [1], "lacks"),
        (lambda c: c | {"preset": "gone"}, "gone"),
        (lambda c: c | {"config": c["config"] | {"lr": -1}}, "positive"),
    ],
)
def test_resume_refuses_a_foreign_run(toy, tmp_path, change, part):
    out = tmp_path / "a"
    run_folder(toy, ["--preset", "smoke", "--out", out, "--stop-after", "2"])
    path = out / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    done = run_folder(toy, ["--resume", out])
    assert done.code == 2 and len(done.errors) == 1 and part in done.errors[0], done.err


def test_resume_with_changed_code_warns(toy, tmp_path):
    out = tmp_path / "a"
    run_folder(toy, ["--preset", "smoke", "--out", out, "--stop-after", "2"])
    path = toy / "model.py"
    path.write_text(path.read_text() + "\nCHANGED = True\n")
    done = run_folder(toy, ["--resume", out])
    assert done.code == 0 and "code has changed" in done.err


def test_missing_extra_names_the_command(toy):
    path = toy / "paper.toml"
    path.write_text(path.read_text().replace('domain = "example"', 'domain = "example"\nextras = ["mmdet3d"]'))
    train = toy / "train.py"
    text = train.read_text().replace(
        "    for unit in run.units(", "    raise ModuleNotFoundError('no', name='mmcv.ops')\n    for unit in run.units("
    )
    train.write_text(text)
    done = run_folder(toy, ["--preset", "smoke"])
    assert done.code == 2 and "uv sync --extra mmdet3d" in done.errors[0]


def test_two_processes_train_like_one(toy, tmp_path):
    """gloo, the same global batch: the losses are those of one process."""
    argv = ["--steps", "6", "--batch", "7", "--seeds", "1", "--samples", "40", "--device", "cpu"]
    assert run_folder(toy, [*argv, "--out", tmp_path / "one"]).code == 0
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", *argv],
        cwd=toy,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = next((toy / "runs").iterdir())

    def read(folder):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    rows = list(zip(read(tmp_path / "one"), read(two), strict=True))
    assert len(rows) == 12
    for a, b in rows:
        assert (a["unit"], a["step"]) == (b["unit"], b["step"]) and abs(a["loss"] - b["loss"]) < 1e-5
    assert json.loads((two / "result.json").read_text())["processes"] == 2
    assert "global batch 7 = 2 processes" in done.stdout
