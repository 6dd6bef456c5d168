"""Click data: official layouts in blocks, vocabularies, resumable caches, errors with line numbers, metrics."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import ctr
from shared.errors import UserError


def criteo_rows(rows: int = 500, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(rows):
        numbers = [("" if rng.random() < 0.2 else str(int(rng.integers(-2, 3000)))) for _ in range(13)]
        words = [("" if rng.random() < 0.1 else f"{int(rng.geometric(0.1)):08x}") for _ in range(26)]
        out.append([str(int(rng.random() < 0.3)), *numbers, *words])
    return out


def write(path: Path, rows: list[list[str]], delimiter: str = "\t") -> Path:
    text = "".join(delimiter.join(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def by_hand(rows: list[list[str]], column: int, least: int, counted=lambda i: True) -> tuple[list[str], list[int]]:
    """Vocabulary and ids of a column, with a Counter."""
    counts = Counter(row[column] for i, row in enumerate(rows) if counted(i))
    levels = sorted((v for v, n in counts.items() if n >= least and v), key=lambda v: (-counts[v], v))
    return levels, [levels.index(row[column]) if row[column] in levels else -1 for row in rows]


# ---- rules ---------------------------------------------------------------------------------------------------------


def test_binning():
    x = np.array([0, 1, 2, -2, 100, 7])
    missing = np.array([False, False, False, False, False, True])
    assert ctr.log_square_bins(x, missing).tolist() == [0, 0, 1, 1, 9, 0]
    assert ctr.winner_bins(np.array([-3, 0, 1, 2, 3, 4, 100])).tolist() == [-5, -2, -1, 0, 1, 1, 21]
    assert int(ctr.log_square_bins(np.array([10**9]))[0]) == 41 < ctr.FIXED_LEVELS["log_square"]


# ---- encoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_criteo_by_hand_and_independent_of_the_block(tmp_path, name):
    rows = criteo_rows()
    path = write(tmp_path / name, rows)
    assert ctr.find_files(tmp_path, ctr.CRITEO) == [path] and ctr.count_lines(path) == 500
    fields = ctr.criteo_fields()
    table = ctr.load_clicks([path], ctr.CRITEO, fields, 5, cache=tmp_path / "a")
    assert table.ids.shape == (500, 39) and table.ids.dtype == torch.int32
    assert table.labels.tolist() == [int(row[0]) for row in rows]
    for column in (14, 30, 39):
        levels, ids = by_hand(rows, column, 5)
        assert table.ids[:, column - 1].tolist() == ids and table.levels[column - 1] == len(levels)
        assert table.vocabulary(table.fields[column - 1]) == levels
    expected = [int(np.floor(np.log(int(row[3] or 0) ** 2 + 1))) for row in rows]
    assert table.ids[:, 2].tolist() == expected and table.levels[2] == 64
    ids, labels = table.batch(torch.tensor([7, 3, 499]))
    assert torch.equal(ids, table.ids[[7, 3, 499]]) and labels.dtype == torch.float32
    small = ctr.load_clicks([path], ctr.CRITEO, fields, 5, cache=tmp_path / "b", block_bytes=1500)
    assert torch.equal(small.ids, table.ids) and small.levels == table.levels
    with pytest.raises(UserError, match="field I1 has no vocabulary"):
        table.vocabulary("I1")


def test_winner_rule_has_a_level_for_missing_values(tmp_path):
    rows = criteo_rows()
    path = write(tmp_path / "train.txt", rows)
    table = ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields("winner"), 1, cache=tmp_path / "c")
    levels = table.vocabulary("I1")
    assert "NULL" in levels and (table.ids[:, 0] >= 0).all()
    for row, i in zip(rows, table.ids[:, 0].tolist(), strict=True):
        v = row[1]
        text = "NULL" if v == "" else str(int(np.floor(np.log(int(v)) ** 2)) if int(v) > 2 else int(v) - 2)
        assert levels[i] == text


def test_several_files_masks_and_extras(tmp_path):
    """Levels counted on the first file only, every third row left out: what online learning needs."""
    rows = criteo_rows(300), criteo_rows(200, seed=1)
    paths = [write(tmp_path / f"day_{i}", r) for i, r in enumerate(rows)]
    both = rows[0] + rows[1]
    table = ctr.load_clicks(
        paths,
        ctr.CRITEO,
        ctr.criteo_fields(),
        3,
        counted=lambda first, n, extras: extras["file"] == 0,
        counted_name="first file",
        keep=lambda first, n, extras: np.arange(first, first + n) % 3 != 0,
        keep_name="two of three",
        cache=tmp_path / "cache",
        block_bytes=4000,
    )
    kept = [i for i in range(500) if i % 3]
    levels, ids = by_hand(both, 20, 3, counted=lambda i: i < 300 and i % 3 != 0)
    assert table.ids[:, 19].tolist() == [ids[i] for i in kept] and table.levels[19] == len(levels)
    assert table.extras["file"].tolist() == [int(i >= 300) for i in kept]
    with pytest.raises(ValueError, match="go together"):
        ctr.load_clicks(paths, ctr.CRITEO, ctr.criteo_fields(), 3, keep_name="x", cache=tmp_path / "cache")


def avazu_rows(rows: int = 60) -> list[list[str]]:
    rng = np.random.default_rng(2)
    out = [list(ctr.AVAZU.columns)]
    for i in range(rows):
        hour = f"1410{21 + i // 30}{i % 24:02d}"
        out.append([str(10**18 + i), str(i % 2), hour, *(f"{int(v):x}" for v in rng.integers(0, 3, 21))])
    return out


def test_avazu(tmp_path):
    rows = avazu_rows()
    write(tmp_path / "train.gz", rows, ",")  # the name Kaggle gives it
    path = ctr.find_files(tmp_path, ctr.AVAZU)[0]
    fields = ctr.avazu_fields()
    assert len(fields) == 21 and "device_id" not in [f.name for f in fields]
    assert len(ctr.avazu_fields(drop=())) == 22
    table = ctr.load_clicks([path], ctr.AVAZU, fields, 1, cache=tmp_path / "c", block_bytes=700)
    assert table.extras["day"].tolist() == [int(row[2][:6]) for row in rows[1:]]
    hours = table.vocabulary("hour")
    assert [hours[i] for i in table.ids[:, 0].tolist()] == [row[2][6:] for row in rows[1:]]
    order = list(reversed(range(24)))  # a header in another order is followed by name
    write(tmp_path / "other.csv", [[row[i] for i in order] for row in rows], ",")
    other = ctr.load_clicks([tmp_path / "other.csv"], ctr.AVAZU, fields, 1, cache=tmp_path / "d")
    assert torch.equal(other.ids, table.ids)


def test_ipinyou(tmp_path):
    rng = np.random.default_rng(3)
    rows = [list(ctr.IPINYOU.columns)]
    prices = ["0", "1", "10", "11", "50", "51", "100", "101", "300", ""]
    for i in range(40):
        row = [f"{c}{int(rng.integers(0, 2))}" for c in ctr.IPINYOU.columns]
        row[0], row[ctr.IPINYOU.columns.index("slotprice")] = str(i % 5 // 4), prices[i % 10]
        rows.append(row)
    write(tmp_path / "train.log.txt", rows)
    table = ctr.load_clicks(
        ctr.find_files(tmp_path, ctr.IPINYOU), ctr.IPINYOU, ctr.ipinyou_fields(), 1, cache=tmp_path / "c"
    )
    assert len(table.fields) == 16 and table.fields[-1] == "slotprice"
    assert table.ids[:10, -1].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 0] and table.levels[-1] == 5


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = criteo_rows(400)
    path = write(tmp_path / "train.txt", rows)
    fields = ctr.criteo_fields()
    whole = ctr.load_clicks([path], ctr.CRITEO, fields, 2, cache=tmp_path / "whole")
    monkeypatch.setattr(ctr, "SAVE_EVERY", 2)
    starts = []
    original = ctr.read_blocks

    def spy(file, layout, columns, start=0, first_line=1, **options):
        starts.append(start)
        return original(file, layout, columns, start, first_line, **options)

    monkeypatch.setattr(ctr, "read_blocks", spy)
    calls = 0

    def interrupt(text: str) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 6):  # once while counting, once while encoding
            raise KeyboardInterrupt

    cache, table = tmp_path / "part", None
    for _ in range(3):
        try:
            table = ctr.load_clicks([path], ctr.CRITEO, fields, 2, cache=cache, block_bytes=9000, say=interrupt)
        except KeyboardInterrupt:
            assert not list(cache.glob("*/meta.json")), "a cache in the making has no final name"
    assert table is not None and torch.equal(table.ids, whole.ids) and torch.equal(table.labels, whole.labels)
    assert sum(start > 0 for start in starts) == 2, starts  # both passes went on behind what was done
    assert not list(cache.glob("*.partial"))
    starts.clear()
    ctr.load_clicks([path], ctr.CRITEO, fields, 2, cache=cache)
    assert not starts, "a finished cache is opened, not built"
    for other in ({"min_count": 3}, {"fields": ctr.criteo_fields(integers=12)}):
        options = {"fields": fields, "min_count": 2} | other
        again = ctr.load_clicks([path], ctr.CRITEO, cache=cache, **options)
        assert again.folder != table.folder


def test_a_damaged_cache_is_told(tmp_path):
    path = write(tmp_path / "train.txt", criteo_rows(50))
    table = ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 1, cache=tmp_path / "c")
    (table.folder / "labels.u8").write_bytes(b"\0" * 7)
    with pytest.raises(UserError, match="has 7 bytes, expected 50"):
        ctr.open_clicks(table.folder)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Blocks are of the size asked for, so the text in memory does not depend on the file."""
    path = write(tmp_path / "train.txt", criteo_rows(600))
    sizes = [len(data) for _, data in ctr._text_blocks(path, 0, 5000)]
    assert len(sizes) > 20 and max(sizes) < 5000 + 1000 and sum(sizes) == path.stat().st_size
    table = ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 1, cache=tmp_path / "c", block_bytes=5000)
    assert table.ids.untyped_storage().nbytes() == 600 * 39 * 4
    assert (table.folder / "ids.i32").stat().st_size == 600 * 39 * 4


# ---- what is wrong with a file -------------------------------------------------------------------------------------


def spoiled(tmp_path: Path, line: int, row: list[str]) -> Path:
    rows = criteo_rows(60)
    rows[line - 1] = row
    return write(tmp_path / "train.txt", rows)


@pytest.mark.parametrize(
    ("line", "row", "message"),
    [
        (31, ["1", "2"], "line 31: 2 columns found, expected 40"),
        (12, ["0"] * 41, "line 12: 41 columns found, expected 40"),
        (2, [""], "line 2: 1 columns found, expected 40"),
        (60, ["x", *["1"] * 39], "line 60: label is 'x', expected 0 or 1"),
        (44, ["1", *["1"] * 12, "1.5", *["1"] * 26], "line 44: I13 is '1.5', expected an integer"),
    ],
)
@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_bad_criteo_lines(tmp_path, line, row, message, block):
    path = spoiled(tmp_path, line, row)
    with pytest.raises(UserError, match=message) as caught:
        ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 1, cache=tmp_path / "c", block_bytes=block)
    assert str(path) in str(caught.value)


def test_bad_avazu_files(tmp_path):
    rows = avazu_rows(5)
    without = [i for i, c in enumerate(rows[0]) if c != "site_id"]
    path = write(tmp_path / "a.csv", [[row[i] for i in without] for row in rows], ",")
    with pytest.raises(UserError, match=r"line 1: the header lacks site_id: 23 columns found, expected 24"):
        ctr.load_clicks([path], ctr.AVAZU, ctr.avazu_fields(), 1, cache=tmp_path / "c")
    rows[3][2] = "yesterday"
    path = write(tmp_path / "b.csv", rows, ",")
    with pytest.raises(UserError, match="line 4: hour is 'yesterday', expected YYMMDDHH"):
        ctr.load_clicks([path], ctr.AVAZU, ctr.avazu_fields(), 1, cache=tmp_path / "c")
    path = write(tmp_path / "c.csv", rows[:1], ",")
    with pytest.raises(UserError, match="has no rows"):
        ctr.load_clicks([path], ctr.AVAZU, ctr.avazu_fields(), 1, cache=tmp_path / "c")


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"expected train\.txt or train\.txt\.gz \(Criteo AI Lab"):
        ctr.find_files(tmp_path, ctr.CRITEO)
    path = write(tmp_path / "train.txt", criteo_rows(30))
    with pytest.raises(
        UserError, match=r"field C\d+ of .*: no level occurs at least 25 times; try a lower --min-count"
    ):
        ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 25, cache=tmp_path / "c")
    with pytest.raises(UserError, match="min_count is 0"):
        ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 0, cache=tmp_path / "c")
    with pytest.raises(UserError, match="no file"):
        ctr.load_clicks([tmp_path / "absent"], ctr.CRITEO, ctr.criteo_fields(), 1, cache=tmp_path / "c")
    whole = gzip.compress(path.read_bytes())
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*cut\.txt\.gz"):
        ctr.load_clicks([tmp_path / "cut.txt.gz"], ctr.CRITEO, ctr.criteo_fields(), 1, cache=tmp_path / "c")


# ---- real rows -----------------------------------------------------------------------------------------------------


def test_real_rows(data_root, tmp_path):
    folder = data_root / "ctr-raw-samples"
    if not folder.is_dir():
        pytest.skip("no ctr-raw-samples")
    path = folder / "criteo_train_8000.txt.gz"
    table = ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 20, cache=tmp_path, block_bytes=300_000)
    assert len(table) == 8000 and int(table.labels.sum()) == 1728
    with gzip.open(path, "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    for column in range(14, 40):
        assert table.ids[:, column - 1].tolist() == by_hand(rows, column, 20)[1]
    path = folder / "avazu_train_8999.csv.gz"
    table = ctr.load_clicks([path], ctr.AVAZU, ctr.avazu_fields(), 20, cache=tmp_path, block_bytes=300_000)
    assert len(table) == 8999 and int(table.labels.sum()) == 1563
    assert set(table.extras["day"].tolist()) == {141021} and table.levels[0] == 1


def test_movielens_of_the_wheel(tmp_path):
    if ctr.recbole_movielens() is None:
        pytest.skip("the wheel recbole is not installed")
    table = ctr.movielens()
    assert table.ids.shape == (100_000, 10) and sum(table.levels) == 2833
    assert abs(float(table.labels.float().mean()) - 0.554) < 0.001
    assert table.levels[:4] == (943, 1682, 14, 2)
    assert int(table.extras["timestamp"].min()) == 874724710
    assert int(table.ids[:, 2:].min()) >= -1 and (table.ids[:, :2] >= 0).all()


def atomic(folder: Path) -> None:
    """Three ratings in RecBole's layout."""
    (folder / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t3\t4\t86400\n7\t4\t3.5\t0\n9\t3\t5\t864000\n"
    )
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "3\tToy Story\t1995\tAnimation Comedy\n4\tOld One\t1941\tDrama\n"
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "7\t24\tM\ttechnician\t85711\n9\t53\tF\tother\t94043\n"
    )


def test_movielens_as_atomic_files(tmp_path):
    atomic(tmp_path)
    table = ctr.movielens(tmp_path)
    assert table.labels.tolist() == [1, 0, 1] and table.levels == (2, 2, 2, 2, 2, 2, 2, 2, 1, 3)
    weekdays = table.ids[:, -1].tolist()  # 2 January 1970 was a Friday, the 1st a Thursday, the 11th a Sunday
    assert weekdays == [1, 0, 2]
    text = (tmp_path / "ml-100k.inter").read_text()
    (tmp_path / "ml-100k.inter").write_text(text + "8\t3\t4\t0\n")
    with pytest.raises(UserError, match=r"ml-100k\.inter, line 5: user 8 is in no user file"):
        ctr.movielens(tmp_path)
    (tmp_path / "ml-100k.inter").write_text(text + "8\t3\n")
    with pytest.raises(UserError, match="line 5: 2 columns found, expected 4"):
        ctr.movielens(tmp_path)
    with pytest.raises(UserError, match="no file"):
        ctr.movielens(tmp_path / "nowhere")


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_equal_sklearn():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    for decimals in (12, 1):  # with and without ties
        logits = np.round(rng.standard_normal(1000) * 2, decimals)
        labels = (rng.random(1000) < 1 / (1 + np.exp(-logits))).astype(np.int64)
        x, y = torch.from_numpy(logits), torch.from_numpy(labels)
        assert ctr.auc(y, x) == pytest.approx(metrics.roc_auc_score(labels, logits), abs=1e-12)
        expected = metrics.log_loss(labels, 1 / (1 + np.exp(-logits)))
        assert ctr.log_loss(y, x) == pytest.approx(expected, rel=1e-9)
    assert ctr.log_loss(torch.tensor([1.0, 0.0]), torch.tensor([-500.0, 0.0])) == pytest.approx((500 + np.log(2)) / 2)


@pytest.mark.parametrize("label", [0, 1])
def test_auc_of_one_class_is_undefined(label):
    with pytest.raises(UserError, match=f"AUC undefined: only class {label} present in 4 rows"):
        ctr.auc(torch.full((4,), label), torch.randn(4))
    with pytest.raises(UserError, match="1 of 2 scores are not numbers"):
        ctr.auc(torch.tensor([0, 1]), torch.tensor([0.1, float("nan")]))


def test_cache_says_what_it_is_of(tmp_path):
    path = write(tmp_path / "train.txt", criteo_rows(40))
    said: list[str] = []
    table = ctr.load_clicks([path], ctr.CRITEO, ctr.criteo_fields(), 1, cache=tmp_path / "c", say=said.append)
    meta = json.loads((table.folder / "meta.json").read_text())
    assert meta["rows"] == 40 and meta["positives"] == int(table.labels.sum()) and meta["files"] == ["train.txt"]
    assert "40 rows" in said[-1]
