"""Environments in DomainBed's layout, hold-outs, leave-one-domain-out and the rules that pick a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared import domains
from shared.domains import Candidate
from shared.errors import UserError


def write_pacs(root: Path, classes: tuple[str, ...] = ("dog", "cat")) -> Path:
    for number, name in enumerate(domains.LAYOUTS["pacs"].environments):
        for word in classes:
            folder = root / "PACS" / name / word
            folder.mkdir(parents=True)
            for k in range(number + 1):
                (folder / f"pic_{k}.jpg").write_bytes(b"")
            (folder / "notes.txt").write_text("not an image")
    return root


def test_environments_and_classes_are_in_sorted_order(tmp_path: Path) -> None:
    root = write_pacs(tmp_path)
    environments, classes = domains.read_environments(root, "pacs")
    assert classes == ("cat", "dog")
    assert [e.name for e in environments] == ["art_painting", "cartoon", "photo", "sketch"]
    assert [len(e) for e in environments] == [2, 4, 6, 8]
    assert environments[1].labels.tolist() == [0, 0, 1, 1]
    assert environments[1].paths[2] == root / "PACS" / "cartoon" / "dog" / "pic_0.jpg"
    again, _ = domains.read_environments(root / "PACS", "pacs")
    assert again[3].paths == environments[3].paths
    lines = domains.describe("pacs", environments, classes)
    assert "20 images in all, published: 9991; 2 classes, published: 7" in lines[-1]


def test_a_broken_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*PACS"):
        domains.read_environments(tmp_path, "pacs")
    with pytest.raises(ValueError, match="no set 'pax'"):
        domains.read_environments(tmp_path, "pax")
    root = write_pacs(tmp_path)
    (root / "PACS" / "photo" / "horse").mkdir()
    with pytest.raises(UserError, match=r"other classes than art_painting.*horse"):
        domains.read_environments(root, "pacs")
    (root / "PACS" / "photo" / "horse").rmdir()
    for path in (root / "PACS" / "sketch").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match="sketch holds no image"):
        domains.read_environments(root, "pacs")
    (root / "PACS" / "sketch").rename(root / "PACS" / "sketches")
    with pytest.raises(UserError, match="has no folder sketch"):
        domains.read_environments(root, "pacs")


def test_a_hold_out_is_a_partition_that_depends_on_its_purpose_only() -> None:
    large, small = domains.hold_out(103, 0.2, 0, "photo")
    assert (len(large), len(small)) == (83, 20)
    assert torch.equal(torch.cat((large, small)).sort().values, torch.arange(103))
    torch.manual_seed(5)
    assert torch.equal(domains.hold_out(103, 0.2, 0, "photo")[1], small)
    assert not torch.equal(domains.hold_out(103, 0.2, 0, "sketch")[1], small)
    with pytest.raises(ValueError, match=r"cannot hold out 0\.2 of 4 samples"):
        domains.hold_out(4, 0.2, 0)


def test_each_environment_is_left_out_once() -> None:
    assert list(domains.leave_one_out(("a", "b", "c"))) == [("a", ("b", "c")), ("b", ("a", "c")), ("c", ("a", "b"))]
    with pytest.raises(ValueError, match="two or more"):
        list(domains.leave_one_out(("a",)))
    with pytest.raises(ValueError, match="two or more"):
        list(domains.leave_one_out(("a", "a")))


def test_rules_pick_by_what_they_may_see() -> None:
    pool = [
        Candidate({"a": 0.9, "b": 0.5}, 0.4),
        Candidate({"a": 0.8, "b": 0.8}, 0.3),
        Candidate({"a": 0.8, "b": 0.8}, 0.6),
    ]
    assert domains.by_training_domains(pool) == 1  # the first of equals
    assert domains.by_oracle(pool) == 2
    assert domains.by_leaving_out([[0.2, 0.9], [0.6, 0.6], [0.1]]) == 1
    with pytest.raises(ValueError, match="at least one candidate"):
        domains.by_training_domains([])
    with pytest.raises(ValueError, match="are numbers"):
        domains.by_oracle([Candidate({"a": 1.0}, float("nan"))])
    with pytest.raises(ValueError, match="at least one score"):
        domains.by_leaving_out([[]])
