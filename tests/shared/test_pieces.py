"""Small pieces of shared/: checkpoints, fingerprints, sampling, seeds, paper.toml, files, the report."""

from __future__ import annotations

import errno
import functools
import json
import operator

import numpy as np
import pytest
import torch

from shared import fingerprint, report
from shared.checkpoint import Checkpoints, assert_plain, save_tensors
from shared.errors import UserError, user_errors
from shared.files import cache_folder, disk_error, read_json, replacing, sha256_path, write_json
from shared.paper import read_paper
from shared.sampling import EpochSampler
from shared.seeds import derive_seed, rng_state, seed_everything, set_rng_state


def test_checkpoints_keep_two_and_read_back(tmp_path):
    store = Checkpoints(tmp_path / "c", "toy")
    assert store.load("last") is None
    for i in range(4):
        store.save("last", {"w": torch.full((2,), float(i))}, {"step": i, "nested": {"a": [1, None, "x"]}})
    assert [number for number, _ in store.generations("last")] == [3, 4]
    loaded = store.load("last")
    assert loaded is not None and loaded.state["step"] == 3 and loaded.tensors["w"].tolist() == [3.0, 3.0]


def test_checkpoint_of_another_paper_or_format_is_refused(tmp_path):
    path = Checkpoints(tmp_path, "one").save("last", {"w": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="belongs to 'one'"):
        Checkpoints(tmp_path, "two").load("last")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format"):
        Checkpoints(tmp_path, "one").read(path)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest"):
        Checkpoints(tmp_path, "one").read(path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch, error):
    store = Checkpoints(tmp_path, "toy")
    store.save("last", {"w": torch.zeros(1)}, {"step": 1})

    def full(*_):
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        store.save("last", {"w": torch.ones(1)}, {"step": 2})
    monkeypatch.undo()
    assert store.load("last").state["step"] == 1 and not list(tmp_path.glob(".*"))


def test_state_must_be_plain(tmp_path):
    for value in (object(), {"a": {1, 2}}, [np.zeros(2)], {object(): 1}):
        with pytest.raises(TypeError):
            assert_plain(value)
    with pytest.raises(TypeError, match=r"state\['a'\]\[0\]"):
        Checkpoints(tmp_path, "toy").save("last", {}, {"a": [object()]})


def test_tied_and_sliced_tensors_are_saved_whole(tmp_path):
    from safetensors.torch import load_file

    base = torch.arange(6.0)
    save_tensors(tmp_path / "w.safetensors", {"a": base, "b": base, "c": base[2:4], "d": base.view(2, 3).T})
    back = load_file(str(tmp_path / "w.safetensors"))
    assert back["b"].tolist() == base.tolist() and back["c"].tolist() == [2, 3] and back["d"].shape == (3, 2)


def test_sampler_is_a_pure_function_of_the_step():
    sampler = EpochSampler(10, 4, seed=3)
    whole = [sampler[step].tolist() for step in range(9)]
    assert len(sampler) == 3 and [len(batch) for batch in whole[:3]] == [4, 4, 2]
    assert sorted(functools.reduce(operator.iadd, whole[:3], [])) == list(range(10)) and whole[:3] != whole[3:6]
    fresh = EpochSampler(10, 4, seed=3)
    assert [fresh[step].tolist() for step in (7, 2, 5)] == [whole[7], whole[2], whole[5]]
    assert EpochSampler(10, 4, seed=4)[0].tolist() != whole[0] and sampler.epoch(5) == 1
    assert EpochSampler(10, 4, 0, drop_last=True, shuffle=False)[2].tolist() == [0, 1, 2, 3]
    for bad in ((0, 1, 0), (3, 0, 0)):
        with pytest.raises(ValueError, match="at least one"):
            EpochSampler(*bad)
    with pytest.raises(ValueError, match="larger than"):
        EpochSampler(3, 4, 0, drop_last=True)


def test_seeds_are_separate_and_states_come_back():
    assert derive_seed("data", 0) == derive_seed("data", 0) != derive_seed("model", 0)
    assert derive_seed("1") != derive_seed(1) and 0 <= derive_seed("x") < 2**63
    seed_everything(5)
    state = rng_state(torch.device("cpu"))
    first = (np.random.rand(), torch.rand(2).tolist(), __import__("random").random())
    set_rng_state(state, torch.device("cpu"))
    assert first == (np.random.rand(), torch.rand(2).tolist(), __import__("random").random())


def test_fingerprint_sees_code_and_not_layout():
    one = 'x = f"{a + 1:>{w}} b"\ndef f(a, b):\n    """Doc."""\n    return a  # why\n'
    two = 'x = f"{a + 1:>{w}} b"\n\n\ndef f(\n    a, b\n):\n    # other\n    return a\n'
    assert fingerprint.of_source(one) == fingerprint.of_source(two)
    assert fingerprint.of_source(one) != fingerprint.of_source(one.replace("a + 1", "a + 2"))
    assert fingerprint.of_source(one) != fingerprint.of_source(one.replace("return a", "return b"))
    nested = "y = f\"{f'{z}'}\"\n"
    assert fingerprint.of_source(nested) != fingerprint.of_source(nested.replace("z", "q"))
    with_attribute_doc = 'class A:\n    x: int = 1\n    """What x is."""\n'
    assert fingerprint.of_source(with_attribute_doc) == fingerprint.of_source("class A:\n    x: int = 1\n")
    # the same under every Python: this digest was computed under 3.11 and is recomputed by whatever runs the test
    assert fingerprint.of_source('print(f"{x!r:>10} and {y}")\n')[:16] == "1a21f6bc67d3179a"


def test_imported_modules_follow_one_another(tmp_path):
    package = tmp_path / "shared"
    package.mkdir()
    (package / "a.py").write_text("from shared.b import x\n")
    (package / "b.py").write_text("def f():\n    import shared.c\n")
    (package / "c.py").write_text("")
    (package / "d.py").write_text("")
    (tmp_path / "train.py").write_text("from shared import a\n")
    found = fingerprint.imported_modules([tmp_path / "train.py"], package)
    assert [path.stem for path in found] == ["a", "b", "c"]


def test_paper_toml_is_checked(toy):
    path = toy / "paper.toml"
    good = path.read_text()
    assert read_paper(toy).claim("beats_linear").thresholds == {"margin": 0.05}
    for text, part in (
        (good.replace("venue", "venu"), "venu"),
        (good + "\n[[reported]]\nmetric = 'a'\nvalue = 1.0\n", "source"),
        (good + "\nthis is not toml", "paper.toml"),
        (good.replace("why = ", 'expected = "maybe"\nwhy = '), "maybe"),
        (good.replace("why = ", 'expected = "fails"\nwhy = '), "no explanation"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=part):
            read_paper(toy)
    path.unlink()
    with pytest.raises(UserError, match=r"paper\.toml"):
        read_paper(toy)


def test_files(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json", "it") == {"x": 1}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json", "it") == {"x": 1}
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(UserError, match="it"):
            read_json(tmp_path / name, "it")
    with pytest.raises(UserError, match="Read-only"), replacing(tmp_path / "c") as temporary:
        temporary.write_text("x")
        raise OSError(errno.EROFS, "Read-only file system")
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".*"))
    assert isinstance(disk_error(OSError(errno.EBADF, "x"), tmp_path), OSError)
    before = sha256_path(tmp_path)
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert sha256_path(tmp_path) != before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder("knn").is_dir()


def test_user_errors_turns_value_errors():
    with pytest.raises(UserError, match="width"), user_errors():
        raise ValueError("width is 0")


RESULT = {
    "paper": "toy",
    "preset": "default",
    "seeds": [0, 1],
    "device": "cpu",
    "metrics": {
        "a": {"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]},
        "b": {"mean": 3.0, "std": 0.0, "values": [3.0]},
    },
    "reported": [
        {"metric": "a", "value": 0.6, "std": 0.2, "source": "Table 1", "measured": "a", "comparable": True},
        {"metric": "z", "value": 0.9, "source": "T2", "measured": "b", "comparable": False, "reason": "generated"},
        {"metric": "y", "value": 0.9, "source": "T2", "comparable": False, "reason": "not measured"},
    ],
    "claims": [
        {"name": "c", "statement": "A | B", "measured": {"a": 0.5}, "holds": True, "expected": "holds"},
        {"name": "d", "statement": "D", "measured": {"a": 0.5}, "holds": False, "expected": "fails"},
        {"name": "e", "statement": "E", "measured": {"a": 0.5}, "holds": True, "expected": "fails"},
    ],
    "seconds": 1.0,
    "peak_memory_mib": 5,
    "steps_per_second": 2.0,
}


def test_report_never_puts_a_generated_number_in_the_papers_row():
    rows = {row[0]: row for row in report.rows(RESULT)}
    assert rows["a"][1:] == ("0.6 ± 0.2", "0.5 ± 0.1", "Table 1")
    assert rows["z | b"][3] == "not comparable: generated" and rows["y"][2] == "-" and rows["b"][2] == "3"
    text = report.terminal(RESULT)
    assert "claim c: holds" in text and "DOES NOT HOLD (as expected)" in text and "holds (unexpected)" in text
    assert "A \\| B" in report.markdown(RESULT) and report.number(123456.0) == "123,456"


def test_house_figure_draws(tmp_path):
    figure, axes = report.figure(1, 2)
    axes[0].plot([1, 2])
    figure.savefig(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
