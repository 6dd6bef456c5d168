"""A run: exact resume however it was stopped, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from shared import run as run_module
from shared.cli import Preset
from shared.errors import UserError
from shared.paper import read_paper
from shared.run import Run, Stopped, Summary, pick_device, unwrap
from tests.conftest import ROOT, run_folder


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@dataclass(frozen=True)
class Config:
    a: int = 1


def make_run(toy: Path, folder: Path, **options) -> Run:
    values = {
        "paper": read_paper(toy),
        "paper_folder": toy,
        "config": Config(),
        "preset": Preset(Config()),
        "preset_name": "default",
        "seeds": [0],
        "folder": folder,
        "data": None,
        "device": "cpu",
    }
    return Run(**(values | options))


SHORT = ["--steps", "12", "--batch", "8", "--seeds", "2", "--samples", "60", "--device", "cpu"]


@pytest.fixture
def whole(toy, tmp_path) -> dict:
    """The uninterrupted run."""
    done = run_folder(toy, [*SHORT, "--out", tmp_path / "whole"])
    assert done.code == 0, done.err
    return result(tmp_path / "whole")


def test_result_has_all_that_was_promised(whole):
    needed = "paper preset seeds device data metrics reported claims timings seconds peak_memory_mib"
    for key in [*needed.split(), "steps_per_second", "versions", "command", "code"]:
        assert key in whole, key
    assert whole["data"][0]["kind"] == "generated" and len(whole["data"][0]["sha256"]) == 64
    metric = whole["metrics"]["halfcircles/perceptron/test_accuracy"]
    assert len(metric["values"]) == 2 and metric["mean"] == pytest.approx(sum(metric["values"]) / 2)
    assert whole["command"] == "uv run train.py --steps 12 --batch 8 --seeds 2 --samples 60 --device cpu"


@pytest.mark.parametrize("stops", [[1], [5], [12], [13], [17, 9], [40]])
def test_stop_and_resume_equals_uninterrupted(toy, tmp_path, whole, stops):
    """In the middle of an epoch, at the end of a unit, between seeds, and several times."""
    out = tmp_path / "part"
    first = run_folder(toy, [*SHORT, "--out", out, "--stop-after", stops[0]])
    assert first.code == 0 and not (out / "result.json").exists()
    for stop in stops[1:]:
        assert run_folder(toy, ["--resume", out, "--stop-after", stop]).code == 0
    assert run_folder(toy, ["--resume", out]).code == 0
    assert result(out)["metrics"] == whole["metrics"]
    assert result(out)["claims"] == whole["claims"]
    assert result(out)["command"] == whole["command"]


def losses(folder: Path) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["unit"], row["step"], row["loss"]) for row in rows]


def test_resumed_log_has_every_step_once(toy, tmp_path):
    run_folder(toy, [*SHORT, "--out", tmp_path / "a"])
    run_folder(toy, [*SHORT, "--out", tmp_path / "b", "--stop-after", "7"])
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:  # lines written after the last checkpoint
        file.write('{"unit": "0/perceptron", "step": 7, "loss": 9.0}\n')
    run_folder(toy, ["--resume", tmp_path / "b"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_process_resumes_exactly(toy, tmp_path, wait_for, number):
    argv = ["--steps", "3000", "--seeds", "1", "--samples", "60", "--device", "cpu"]
    code = (
        "import sys, runpy; import shared.run as r; r.CHECKPOINT_SECONDS = 0.05;"
        f"sys.path.insert(0, {str(toy)!r}); sys.argv = ['train.py', *{argv!r}, '--out', {str(tmp_path / 'killed')!r}];"
        f"runpy.run_path({str(toy / 'train.py')!r}, run_name='__main__')"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list((tmp_path / "killed" / "checkpoint").glob("last-*"))) >= 2, 120)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), err
    assert not (tmp_path / "killed" / "result.json").exists()
    assert run_folder(toy, ["--resume", tmp_path / "killed"]).code == 0
    assert run_folder(toy, [*argv, "--out", tmp_path / "whole"]).code == 0
    assert result(tmp_path / "killed")["metrics"] == result(tmp_path / "whole")["metrics"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(toy, tmp_path, whole, monkeypatch):
    out = tmp_path / "part"
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)  # after every step
    run_folder(toy, [*SHORT, "--out", out, "--stop-after", "7"])
    monkeypatch.undo()
    newest = sorted((out / "checkpoint").glob("last-*"))[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    resumed = run_folder(toy, ["--resume", out])
    assert resumed.code == 0 and "truncated" in resumed.err
    assert result(out)["metrics"] == whole["metrics"]


def test_no_usable_checkpoint_is_an_error(toy, tmp_path):
    out = tmp_path / "part"
    run_folder(toy, [*SHORT, "--out", out, "--stop-after", "7"])
    for state in (out / "checkpoint").glob("last-*/state.pt"):
        state.write_bytes(b"x" * state.stat().st_size)
    resumed = run_folder(toy, ["--resume", out])
    assert resumed.code == 2 and len(resumed.errors) == 1 and "altered" in resumed.errors[0]


def test_finished_run_shows_its_result_again(toy, tmp_path):
    run_folder(toy, ["--preset", "smoke", "--out", tmp_path / "a"])
    before = (tmp_path / "a" / "result.json").read_bytes()
    again = run_folder(toy, ["--resume", tmp_path / "a"])
    assert again.code == 0 and "is finished" in again.out
    assert (tmp_path / "a" / "result.json").read_bytes() == before


def test_two_processes_in_one_folder_are_refused(toy, tmp_path):
    first = make_run(toy, tmp_path / "r")
    first.begin()
    second = make_run(toy, tmp_path / "r")
    with pytest.raises(Exception, match="another process"):
        second.begin()
    first.end()
    second.end()


def test_non_finite_loss_stops_with_advice(toy, tmp_path):
    done = run_folder(toy, ["--preset", "smoke", "--lr", "1e30", "--steps", "50", "--out", tmp_path / "a"])
    assert done.code == 2 and len(done.errors) == 1
    assert "at step" in done.errors[0] and "last finite value" in done.errors[0] and "learning rate" in done.errors[0]


def test_divergence_that_paper_toml_names_is_recorded_and_the_run_goes_on(toy, tmp_path):
    begun = []

    def train(config: Config, run: Run) -> None:
        for unit in run.units(["a", "b", "c"]):
            begun.append(unit.name)
            for step in unit.steps(3):
                unit.log(loss=float("nan") if unit.name != "a" and step == 1 else 1.0)
            unit.finish({"done": 1.0})

    (toy / "paper.toml").open("a").write('\n[[may_diverge]]\nunit = "[bc]"\nmetric = "lost"\nwhy = "it is so"\n')
    named = make_run(toy, tmp_path / "named")
    named.begin()
    named.train(train)
    named.end()
    assert begun == ["a", "b", "c"]  # each once: what is finished or lost is not begun again
    assert named.metrics == {"done": Summary.of([1.0]), "lost": Summary.of([1.0, 1.0])}
    other = make_run(toy, tmp_path / "other", paper=replace(named.paper, may_diverge=()))
    other.begin()
    with pytest.raises(UserError, match="loss is nan at step 1 of b"):
        other.train(train)
    other.end()


def test_check_exits_with_one_when_a_verdict_is_unexpected(toy, tmp_path):
    text = (toy / "paper.toml").read_text().replace("margin = 0.05", "margin = 5.0")
    (toy / "paper.toml").write_text(text)
    done = run_folder(toy, [*SHORT, "--check", "--out", tmp_path / "a"])
    assert done.code == 1 and "beats_linear" in done.err
    explained = text.replace(
        'name = "beats_linear"', 'name = "beats_linear"\nexpected = "fails"\nexplanation = "too far"'
    )
    (toy / "paper.toml").write_text(explained)
    assert run_folder(toy, [*SHORT, "--check", "--out", tmp_path / "b"]).code == 0


def test_full_disk_is_one_line_and_loses_nothing(toy, tmp_path, monkeypatch):
    out = tmp_path / "part"
    run_folder(toy, [*SHORT, "--out", out, "--stop-after", "15"])  # the first unit is finished, the second has begun
    units = sorted((out / "checkpoint" / "units").glob("*.json"))
    assert len(units) == 1
    import errno

    from shared import checkpoint

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    stopped = run_folder(toy, ["--resume", out, "--stop-after", "3"])
    assert stopped.code == 2 and len(stopped.errors) == 1 and "No space left" in stopped.errors[0]
    monkeypatch.undo()
    assert not list((out / "checkpoint").glob(".*tmp"))
    assert run_folder(toy, ["--resume", out]).code == 0
    run_folder(toy, [*SHORT, "--out", tmp_path / "whole"])
    assert result(out)["metrics"] == result(tmp_path / "whole")["metrics"]


def test_units_demand_a_record_and_distinct_keys(toy, tmp_path):
    run = make_run(toy, tmp_path / "r")
    run.begin()
    with pytest.raises(RuntimeError, match="finish"):
        for _ in run.units([(0, "a"), (0, "b")]):
            pass
    run.end()
    run = make_run(toy, tmp_path / "s")
    run.begin()
    with pytest.raises(ValueError, match="twice"):
        for unit in run.units([0, 0]):
            unit.finish({"x": 1.0})
    run.end()


def test_kept_tensors_and_timings_survive(toy, tmp_path):
    run = make_run(toy, tmp_path / "r")
    run.begin()
    for unit in run.units(["teacher", "student"]):
        unit.finish({"m": 2.0}, timings={"t": 3.0}, keep={"w": torch.arange(3.0)})
    run.end()
    again = make_run(toy, tmp_path / "r")
    again.begin()
    assert [unit.name for unit in again.units(["teacher", "student"])] == []
    assert again.kept("teacher")["w"].tolist() == [0, 1, 2]
    assert again.metrics["m"] == Summary(2.0, 0.0, (2.0, 2.0)) and again.timings["t"].mean == 3.0
    with pytest.raises(ValueError, match="kind"):
        again.data_used("x", "made up")
    with pytest.raises(KeyError):
        again.claim("no_such_claim", True)
    again.end()


def test_non_finite_metric_is_refused(toy, tmp_path):
    run = make_run(toy, tmp_path / "r")
    run.begin()
    with pytest.raises(Exception, match="metric m"):
        for unit in run.units(["a"]):
            unit.finish({"m": float("nan")})
    run.end()


def test_unit_state_and_random_states_are_restored(toy, tmp_path):
    """Early stopping state and the generators' states are those of the step."""

    def work(run: Run) -> list:
        seen = []
        for unit in run.units(["a"]):
            model = torch.nn.Linear(2, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            unit.attach(model=model, optimizer=optimizer)
            unit.state.setdefault("best", 1e9)
            for step in unit.steps(6):
                import random

                import numpy as np

                seen.append((step, random.random(), float(np.random.rand()), float(torch.rand(()))))
                unit.state["best"] = min(unit.state["best"], seen[-1][3])
            unit.finish({"best": unit.state["best"]})
        return seen

    run = make_run(toy, tmp_path / "a")
    run.begin()
    whole = work(run)
    best = run.metrics["best"]
    run.end()
    first = make_run(toy, tmp_path / "b", stop_after=2)
    first.begin()
    with pytest.raises(Stopped):
        work(first)
    first.end()
    second = make_run(toy, tmp_path / "b")
    second.begin()
    rest = work(second)
    second.end()
    assert rest == whole[2:] and second.metrics["best"] == best


def test_checkpoint_that_does_not_fit_lists_both(toy, tmp_path):
    def work(run: Run, width: int, **more) -> None:
        for unit in run.units(["a"]):
            unit.attach(model=torch.nn.Linear(width, 1), **more)
            for _ in unit.steps(4):
                pass
            unit.finish()

    first = make_run(toy, tmp_path / "a", stop_after=2)
    first.begin()
    with pytest.raises(Stopped):
        work(first, 2)
    first.end()
    second = make_run(toy, tmp_path / "a")
    second.begin()
    with pytest.raises(Exception, match="size mismatch"):
        work(second, 3)
    second.end()
    third = make_run(toy, tmp_path / "a")
    third.begin()
    with pytest.raises(Exception, match=r"\['model'\].*\['model', 'other'\]"):
        work(third, 2, other=torch.nn.Linear(1, 1))
    third.end()


def test_second_signal_leaves_at_once(toy, tmp_path, capsys):
    run = make_run(toy, tmp_path / "r")
    run._on_signal(signal.SIGINT, None)
    assert "SIGINT" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run._on_signal(signal.SIGINT, None)


def test_shard_weights_make_the_global_mean(toy, tmp_path, capsys):
    run = make_run(toy, tmp_path / "r")
    x = torch.randn(10, 3)
    parts = run.shard(torch.arange(10), 4)
    assert [len(part) for part, _ in parts] == [4, 3, 3]
    torch.testing.assert_close(sum(w * x[p].mean() for p, w in parts), x.mean())
    run.world_size, run.rank = 3, 2
    assert [part.tolist() for part, _ in run.shard(torch.arange(2))] == [[0]]  # nothing left: a sample of weight 0
    assert run.shard(torch.arange(2))[0][1] == 0.0
    total = 0.0
    for run.rank in range(3):
        total += sum(float(w * x[p].mean()) for p, w in run.shard(torch.arange(10), 2)) / 3
    assert total == pytest.approx(float(x.mean()), rel=1e-5)


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(Exception, match="mps"):
        pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_unwrap_sees_through_compile():
    model = torch.nn.Linear(1, 1)
    assert unwrap(torch.compile(model)) is model


def test_command_hides_folders_of_the_machine(toy, tmp_path):
    argv = ["--preset", "real", "--data", "/somewhere", "--out=/else", "--lr", "0.1", "--stop-after", "3"]
    assert make_run(toy, tmp_path, argv=argv).command() == "uv run train.py --preset real --data DIR --lr 0.1"
    assert make_run(toy, tmp_path, argv=["--data=/x"]).command() == "uv run train.py --data DIR"


def test_reported_rows(toy, tmp_path):
    text = (toy / "paper.toml").read_text().replace("reported_none = ", "# ")
    rows = "".join(
        f'[[reported]]\nmetric = "{metric}"\nvalue = {value}\nsource = "Table 1"\n{more}\n'
        for metric, value, more in (
            ("m", 0.5, "std = 0.1"),
            ("n", 0.6, 'analogue = "m"'),
            ("o", 0.7, ""),
            ("p", 1.0, ""),
        )
    )
    (toy / "paper.toml").write_text(text.replace("[headline]", '[headline]\nreported = "p"') + rows)

    def reported(why):
        folder = tmp_path / str(why)
        run = make_run(toy, folder, preset=Preset(None, why_not_comparable=why))
        run.begin()
        for unit in run.units(["a"]):
            unit.finish({"m": 0.4})
        run.end()
        return {row["metric"]: row for row in run.reported()}

    real, generated = reported(None), reported("generated data")
    assert sorted(real) == ["m", "n", "p"]
    assert real["m"]["comparable"] and real["m"]["std"] == 0.1
    assert not real["n"]["comparable"] and real["n"]["measured"] == "m"
    assert not generated["m"]["comparable"] and generated["m"]["reason"] == "generated data"
    assert not real["p"]["comparable"] and "measured" not in real["p"]
