"""Expansion of features: estimators against closed forms and scipy, rules by hand, algorithms, loaders, claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import gaussian_kde, norm
from torch import Tensor

from papers.ood_expansion import data, model
from papers.ood_expansion.model import Features
from shared.errors import UserError


def two_normals(n: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One feature, one class, two domains: N(0, 1) and N(distance, 1)."""
    x = torch.randn(2 * n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    domain = torch.arange(2).repeat_interleave(n)
    return x + distance * domain[:, None], domain, torch.zeros(2 * n, dtype=torch.int64)


def random_cells(n: int = 60, d: int = 5, domains: int = 3, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Features that shift with domain and class, n of each cell."""
    domain = torch.arange(domains).repeat_interleave(n * classes)
    label = torch.arange(classes).repeat_interleave(n).repeat(domains)
    x = torch.randn(n * domains * classes, d, dtype=torch.float64) * torch.linspace(0.5, 2, d)
    return (
        x + 0.4 * domain[:, None] * torch.linspace(0, 1, d) + 0.7 * label[:, None] * torch.linspace(1, 0, d),
        domain,
        label,
    )


# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["binned", "direct"])
def test_densities_are_scipys(method: str) -> None:
    x, domain, label = random_cells()
    p = model.densities(x, domain, label, 3, 4, points=4001, method=method)
    for feature, e, y in ((0, 0, 0), (3, 2, 1), (4, 1, 3)):
        cell = x[(domain == e) & (label == y), feature].numpy() / p.scale
        peer = gaussian_kde(cell, bw_method=p.bandwidth / cell.std(ddof=1))(p.grid.numpy())
        assert p.values[feature, e, y].numpy() == pytest.approx(peer, abs=1e-6 if method == "direct" else 2e-5)
    assert p.values.sum(-1).mul(p.step) == pytest.approx(torch.ones(5, 3, 4), abs=2e-4)


def test_both_methods_agree_in_single_precision_and_by_blocks() -> None:
    x, domain, label = random_cells()
    direct = model.examine(x.float(), domain, label, 3, 4, [0, 1], 512, method="direct")
    binned = model.examine(x.float(), domain, label, 3, 4, [0, 1], 512, block=2)
    for a, b in zip(vars(direct).values(), vars(binned).values()):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_distance_of_two_normals(distance: float) -> None:
    """rho = 2 Phi(D / 2) - 1 of the smoothed normals: variance grows by the square of the bandwidth."""
    n = 20000
    x, domain, label = two_normals(n, distance)
    p = model.densities(x, domain, label, 2, 1, points=2000)
    smooth = math.sqrt(1 + (p.bandwidth * p.scale) ** 2)
    assert p.bandwidth == pytest.approx(1.06 * n**-0.2)
    expected = 2 * norm.cdf(distance / (2 * smooth)) - 1
    assert float(model.variation(p, [0, 1])) == pytest.approx(expected, abs=0.012)


def test_distances_of_what_is_alike_and_what_is_far_apart() -> None:
    x, domain, label = two_normals(200, 0.0)
    x[200:] = x[:200]
    assert float(model.variation(model.densities(x, domain, label, 2, 1), [0, 1])) == 0
    far = torch.cat((x[:200], x[:200] + 500))
    assert float(model.variation(model.densities(far, domain, label, 2, 1, 10000), [0, 1])) == pytest.approx(
        1, abs=1e-3
    )
    line = torch.linspace(0, 1, 20000, dtype=torch.float64)[:, None]
    half = model.densities(
        torch.cat((line, line + 0.5)), torch.arange(2).repeat_interleave(20000), torch.zeros(40000).long(), 2, 1
    )
    assert float(model.variation(half, [0, 1])) == pytest.approx(0.5, abs=0.02)


def test_finite_samples_have_a_floor() -> None:
    """Two samples of one normal: .107 for 50, .037 for 1,000, on average."""
    for n, expected in ((50, 0.107), (1000, 0.037)):
        found = [float(model.variation(model.densities(*two_normals(n, 0.0, s), 2, 1), [0, 1])) for s in range(60)]
        assert np.mean(found) == pytest.approx(expected, rel=0.15)


def test_what_changes_nothing() -> None:
    x, domain, label = random_cells()
    base = model.examine(x, domain, label, 3, 4, [0, 1], 512)
    order = torch.randperm(len(x))
    again = model.examine(x[order], domain[order], label[order], 3, 4, [1, 0], 512)
    moved = model.examine(3.5 * x - 20, domain, label, 3, 4, [0, 1], 512)
    renamed = model.examine(x, 2 - domain, label, 3, 4, [2, 1], 512)
    for other in (again, moved, renamed):
        for a, b in zip(vars(base).values(), vars(other).values()):
            assert torch.allclose(a, b, atol=1e-6)
    assert (base.available <= base.everywhere + 1e-12).all()
    for value in vars(base).values():
        assert (value >= 0).all() and (value <= 1).all()
    assert base.available[4] > base.available[0] and base.informative[0] > base.informative[4]  # as they were made


def test_a_constant_feature_says_nothing() -> None:
    x, domain, label = random_cells()
    x[:, 2] = 7.0
    found = model.examine(x, domain, label, 3, 4, [0, 1], 512)
    assert found.informative[2] == 0 and found.available[2] == 0


def test_an_empty_cell_is_left_out() -> None:
    x, domain, label = random_cells()
    keep = ~((domain == 1) & (label == 2))
    p = model.densities(x[keep], domain[keep], label[keep], 3, 4)
    rho = model.total_variation(p, "domains")
    assert rho[:, 2, 0, 1].isnan().all() and rho[:, 2, 0, 2].isfinite().all()
    q = model.densities(
        x, domain, label, 3, 4, ruler=model.Ruler(p.scale, p.bandwidth, float(p.grid[0]), float(p.grid[-1]))
    )
    others = [y for y in range(4) if y != 2]
    by_hand = model.total_variation(q, "domains")[:, others, 0, 1].amax(1)
    assert torch.allclose(model.variation(p, [0, 1]), by_hand, atol=1e-6)


def test_variation_and_informativeness_by_loops() -> None:
    x, domain, label = random_cells()
    p = model.densities(x, domain, label, 3, 4)
    rho = lambda a, b: float((a - b).abs().sum() * p.step / 2)  # noqa: E731
    for j in range(5):
        v = max(rho(p.values[j, a, y], p.values[j, b, y]) for y in range(4) for a in (0, 2) for b in (0, 2))
        i = np.mean(
            [min(rho(p.values[j, e, y], p.values[j, e, z]) for e in (0, 2)) for y in range(4) for z in range(y)]
        )
        assert float(model.variation(p, [0, 2])[j]) == pytest.approx(v, abs=1e-6)
        assert float(model.informativeness(p, [0, 2])[j]) == pytest.approx(i, abs=1e-6)
        most = max(min(rho(p.values[j, e, y], p.values[j, e, z]) for e in (0, 2)) for y in range(4) for z in range(y))
        assert float(model.informativeness(p, [0, 2], "max")[j]) == pytest.approx(most, abs=1e-6)


def test_official_padding_differs_with_unequal_cells_only() -> None:
    x, domain, label = random_cells()
    cell, count = model.cells(x, domain, label, 3, 4)
    ours, theirs = (model.measure(x, cell, count, margin=0, official_padding=flag) for flag in (False, True))
    assert ours == pytest.approx(theirs) if isinstance(ours, tuple) else vars(ours) == pytest.approx(vars(theirs))
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[:50] = False
    cell, count = model.cells(x[keep], domain[keep], label[keep], 3, 4)
    padded = torch.zeros(3, 4, 60, 5, dtype=torch.float64)
    for e in range(3):
        for y in range(4):
            rows = x[keep][(domain[keep] == e) & (label[keep] == y)]
            padded[e, y, : len(rows)] = rows
    ruler = model.measure(x[keep], cell, count, official_padding=True)
    assert ruler.scale == pytest.approx(float(padded.std(2).mean()))
    assert ruler.low * ruler.scale == pytest.approx(float(padded.min()))
    p = model.densities(x, domain, label, 3, 4, 100, official_padding=True)
    assert p.step == pytest.approx(float(p.grid[-1] - p.grid[0]) / 100)


def test_colour_of_coloured_mnist_varies_as_its_flips() -> None:
    """A pure colour feature: 0.1 between flips of 0.1 and 0.2, 0.8 between 0.1 and 0.9."""
    n = 4000
    domain, label = torch.arange(3).repeat_interleave(n), torch.arange(3 * n) % 2
    flips = torch.tensor(data.FLIPS)[domain]
    place = (torch.arange(3 * n) // 2) % (n // 2) / (n // 2)
    colour = (label ^ (place < flips).long()).double()[:, None]
    p = model.densities(colour, domain, label, 3, 2, 4000)
    assert float(model.variation(p, [0, 1])) == pytest.approx(0.1, abs=0.02)
    assert float(model.variation(p, [0, 1, 2])) == pytest.approx(0.8, abs=0.02)


def test_directions_keep_the_axes_first() -> None:
    x = torch.randn(20, 3)
    more = model.directions(x, 4, torch.Generator().manual_seed(0))
    assert more.shape == (20, 7) and torch.equal(more[:, :3], x)
    beta = torch.linalg.lstsq(x, more[:, 3:]).solution
    assert torch.allclose(beta.norm(dim=0), torch.ones(4), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, d, y: (x[:, 0], d, y), r"expected \(samples, features\)"),
        (lambda x, d, y: (x, d[1:], y), "domains and"),
        (lambda x, d, y: (x, d + 1, y), "domain from 1 to 3, expected 0 to 2"),
        (lambda x, d, y: (x, d, y - 1), "label from -1"),
        (lambda x, d, y: (x * 0, d, y), "features are constant"),
        (lambda x, d, y: (x.masked_fill(torch.arange(len(x))[:, None] == 250, math.nan), d, y), "domain 1, class 0"),
    ],
)
def test_bad_features_are_named(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.densities(*change(*random_cells()), 3, 4)


def test_too_few_domains_or_classes_are_named() -> None:
    p = model.densities(*random_cells(), 3, 4)
    with pytest.raises(ValueError, match="two or more domains"):
        model.variation(p, [1])
    with pytest.raises(ValueError, match="at least one domain and two classes"):
        model.informativeness(p, [])


# ---- expansion and choice --------------------------------------------------------------------------------------------


def test_expansion_is_a_running_maximum() -> None:
    s = model.expansion(torch.tensor([0.4, 0.1, 0.2]), torch.tensor([0.6, 0.3, 0.25]))
    asked = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.39, 0.4, 0.9])
    assert s(asked).tolist() == pytest.approx([0.05, 0.3, 0.3, 0.3, 0.39, 0.6, 0.9])
    twice = model.expansion(torch.tensor([0.1, 0.1]), torch.tensor([0.5, 0.3]))
    assert float(twice(torch.tensor(0.1))) == 0.5
    assert model.expansion(torch.zeros(0), torch.zeros(0))(torch.tensor(0.3)) == pytest.approx(0.3)


def test_learnable_and_unexpanded_look_at_informative_features_only() -> None:
    f = Features(torch.tensor([0.0, 0.1, 0.3]), torch.tensor([0.9, 0.15, 0.3]), torch.tensor([0.1, 0.4, 0.5]))
    identity = lambda x: x  # noqa: E731
    assert model.learnable(f, lambda x: 2 * x, 0.3) and not model.learnable(f, identity, 0.3)
    assert not model.learnable(f, lambda x: 2 * x, 0.0)  # nothing varies in training and much elsewhere: unlearnable
    assert model.unexpanded(f, 0.0) == pytest.approx(2 / 3) and model.unexpanded(f, 0.3) == 1
    assert math.isnan(model.unexpanded(f, 0.9)) and math.isnan(model.mean_variation(f, 0.9))
    assert model.mean_variation(f, 0.3) == pytest.approx(0.2)


def test_choice_by_hand() -> None:
    acc, v = torch.tensor([0.95, 0.945, 0.94, 0.80]), torch.tensor([0.30, 0.10, 0.20, 0.02])
    c = model.choose(acc, v)
    assert c.weight == pytest.approx(0.05, rel=1e-3) and c.kept.tolist() == [True, True, True, False]
    assert c.scores.tolist() == pytest.approx([0.935, 0.940, 0.930, 0.799], abs=1e-5)
    assert (c.by_accuracy, c.by_variation, c.by_criterion) == (0, 3, 1)
    assert model.choose(acc, v, restrict_to_kept=True).by_variation == 3


def test_ties_missing_and_equal_variations() -> None:
    acc = torch.tensor([0.90, 0.92, 0.94])
    assert model.choose(acc, 2 * acc).by_criterion == 2  # scores tie: the most accurate
    flat = model.choose(acc, torch.full((3,), 0.2))
    assert flat.weight == 0 and flat.by_criterion == 2
    missing = model.choose(acc, torch.tensor([0.1, 0.2, math.nan]))
    assert missing.by_accuracy == 2 and missing.by_criterion in (0, 1)
    with pytest.raises(ValueError, match="no model has an informative feature"):
        model.choose(acc, torch.full((3,), math.nan))
    with pytest.raises(ValueError, match="two or more models"):
        model.choose(acc[:1], acc[:1])


# ---- algorithms ------------------------------------------------------------------------------------------------------


def batches(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 1, 4, 4), torch.arange(n) % 3) for _ in range(3)]


def made(name: str, **setting: Any) -> model.Algorithm:
    torch.manual_seed(0)
    return model.make_algorithm(name, model.MLP(16, 8), 3, 3, 1e-2, **setting)


def same(a: model.Algorithm, b: model.Algorithm) -> bool:
    """Whether two algorithms' networks are equal."""
    return all(torch.allclose(p, q, atol=1e-6) for p, q in zip(a.featurizer.parameters(), b.featurizer.parameters()))


@pytest.mark.parametrize("name", list(model.ALGORITHMS))
def test_every_algorithm_learns_and_keeps_the_contract(name: str) -> None:
    algorithm, x = made(name), batches()
    first = algorithm.update(x)["loss"]
    for _ in range(60):
        logs = algorithm.update(x)
    assert logs["loss"] < first and set(logs) >= {"loss"} and int(algorithm.count) == 61
    assert algorithm.predict(x[0][0]).shape == (8, 3)
    with pytest.raises(ValueError, match="2 mini-batches, expected one for each of 3"):
        algorithm.update(x[:2])


@pytest.mark.parametrize(
    ("name", "setting"), [("group_dro", {"eta": 1e-9}), ("coral", {"gamma": 1e-12}), ("mmd", {"gamma": 1e-12})]
)
def test_without_their_term_they_are_erm(name: str, setting: dict[str, float]) -> None:
    x = batches()
    a, b = made("erm"), made(name, **setting)
    for _ in range(3):
        a.update(x)
        b.update(x)
    assert same(a, b)


def test_irm_penalty_is_the_product_of_two_gradients() -> None:
    logits, y = torch.randn(9, 3), torch.arange(9) % 3
    w = torch.ones((), requires_grad=True)
    halves = [torch.autograd.grad(F.cross_entropy(w * logits[i::2], y[i::2]), w)[0] for i in (0, 1)]
    assert model.irm_penalty(logits, y) == pytest.approx(float(halves[0] * halves[1]), abs=1e-6)
    assert float(model.irm_penalty(logits[:1], y[:1])) == 0


def test_irm_forgets_its_moments_when_the_penalty_comes_in() -> None:
    algorithm, x = made("irm", penalty=10.0, anneal=2), batches()
    steps = []
    for _ in range(4):
        algorithm.update(x)
        steps.append(float(next(iter(algorithm.optimizer.state.values()))["step"]))
    assert steps == [1, 2, 1, 2]


def test_group_dro_weights_grow_with_the_loss() -> None:
    algorithm, x = made("group_dro", eta=1.0), batches()
    losses = torch.stack([F.cross_entropy(algorithm.predict(a), b) for a, b in x]).detach()
    algorithm.update(x)
    assert torch.allclose(algorithm.q, losses.softmax(0), atol=1e-6)


def test_coral_and_mmd_by_definition() -> None:
    a, b = torch.randn(7, 4), torch.randn(6, 4) + 1
    coral, mmd = made("coral"), made("mmd")
    centred = [z - z.mean(0) for z in (a, b)]
    cov = [z.T @ z / (len(z) - 1) for z in centred]
    by_hand = ((a.mean(0) - b.mean(0)) ** 2).mean() + ((cov[0] - cov[1]) ** 2).mean()
    assert torch.allclose(coral.distances([a, b])[0, 1], by_hand, atol=1e-5)  # type: ignore[operator]
    assert float(mmd.distances([a, a])[0, 1]) == pytest.approx(0, abs=1e-5)  # type: ignore[operator]
    kernel = lambda u, v: sum(math.exp(-g * float((u - v).square().sum())) for g in model.MMD.GAMMAS)  # noqa: E731
    mean = lambda p, q: np.mean([kernel(u, v) for u in p for v in q])  # noqa: E731
    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert float(mmd.distances([a, b])[0, 1]) == pytest.approx(expected, abs=1e-4)  # type: ignore[operator]


def test_dann_turns_the_discriminators_gradient_round() -> None:
    x = batches()
    gradients = []
    for weight in (1.0, -1.0):
        algorithm = made("dann", weight=weight)
        algorithm.loss(x)["adversary"].backward()
        gradients.append((algorithm.featurizer[1].weight.grad, algorithm.discriminator[0].weight.grad))  # type: ignore
    assert torch.allclose(gradients[0][0], -gradients[1][0], atol=1e-6)
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6)


def test_mixup_of_one_class_is_erm_on_mixtures() -> None:
    x = [(a, torch.zeros(8, dtype=torch.int64)) for a, _ in batches()]
    x = [(x[0][0], y) for _, y in x]  # all domains alike: a mixture is the image itself
    a, b = made("erm"), made("mixup", alpha=0.3)
    a.update(x)
    b.update(x)
    assert same(a, b)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no algorithm 'fish'"):
        made("fish")
    with pytest.raises(ValueError, match="no setting among gamma"):
        made("erm", gamma=1.0)
    with pytest.raises(ValueError, match="no network"):
        model.make_featurizer("vgg", 3, 32)


@pytest.mark.parametrize(
    ("name", "channels", "side", "count", "features"),
    [
        ("resnet50", 3, 224, 23508032, 2048),
        ("resnet18", 3, 224, 11176512, 512),
        ("mnist_cnn", 2, 28, 371840 - 96 * 2, 128),
    ],
)
def test_networks_of_the_paper_at_full_size(name: str, channels: int, side: int, count: int, features: int) -> None:
    with torch.device("meta"):
        net = model.make_featurizer(name, channels, side)
        out = net(torch.empty(2, channels, side, side))
    assert out.shape == (2, features) and net.features == features
    if name.startswith("resnet"):
        assert sum(p.numel() for p in net.parameters()) == count


def test_a_step_of_the_papers_network_leaves_batch_norm_frozen() -> None:
    algorithm = model.make_algorithm("coral", model.make_featurizer("resnet50", 3, 64), 7, 2, 5e-5, gamma=1.0)
    algorithm.train()
    norms = [m for m in algorithm.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    logs = algorithm.update([(torch.randn(2, 3, 32, 32), torch.tensor([0, 6])) for _ in range(2)])
    assert logs["loss"].isfinite() and len(norms) == 53
    assert all(torch.equal(a, m.running_mean) and not m.training for a, m in zip(before, norms))


# ---- data ------------------------------------------------------------------------------------------------------------


def test_coloured_digits_agree_as_they_should() -> None:
    problem = data.load("coloured-digits", None, 0)
    assert problem.names == ("agree=0.9", "agree=0.75", "agree=0.6", "unseen") and problem.test == (3,)
    shares = [float((d.hue == d.labels).float().mean()) for d in problem.domains]
    for share, p in zip(shares, (0.9, 0.75, 0.6)):
        assert share == pytest.approx(p + (1 - p) / 10, abs=0.04)
    assert shares[3] == 0
    first = problem.domains[0]
    assert first.images.shape == (1250, 3, 14, 14)
    assert torch.allclose(first.images[5], first.grey[5] * data.hue_table()[first.hue[5]][:, None, None])
    again = data.load("coloured-digits", None, 0).domains[3]
    assert torch.equal(again.images, problem.domains[3].images)
    other = data.repaint(first, 0.4, torch.Generator().manual_seed(1))
    assert float((other.hue != first.hue).float().mean()) == pytest.approx(0.4 * 0.9, abs=0.05)
    assert torch.equal(other.labels, first.labels)
    with pytest.raises(ValueError, match="has no colours"):
        data.repaint(data.load("styles", None, 0).domains[0], 0.1, torch.Generator())


def test_styles_are_four_domains_of_different_digits() -> None:
    problem = data.load("styles", None, 0)
    assert problem.names == ("plain", "thick", "slanted", "optical") and problem.test == (0, 1, 2, 3)
    assert [len(d) for d in problem.domains] == [1667, 1667, 1666, 1797]
    ink = [float(d.images.mean()) for d in problem.domains]
    assert ink[1] > 1.5 * ink[0] and ink[2] == pytest.approx(ink[0], rel=0.1)


def test_real_digits(data_root: Path) -> None:
    problem = data.load("digits4", data_root, 0)
    assert [len(d) for d in problem.domains] == [10000, 9298, 1593, 1797]
    assert all(
        d.images.shape[1:] == (1, 16, 16) and 0 <= d.images.min() <= d.images.max() <= 1 for d in problem.domains
    )
    mnist = data.load("colored_mnist", data_root, 0)
    assert [len(d) for d in mnist.domains] == [3334, 3333, 3333] and mnist.test == (2,)
    for d, flip in zip(mnist.domains, data.FLIPS):
        colour = d.images[:, 1].flatten(1).any(1).long()
        assert float((colour != d.labels).float().mean()) == pytest.approx(flip, abs=0.02)
    assert len(data.load("coloured-t10k", data_root, 0).domains[0]) == 2500


def write_pictures(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        for label, word in enumerate(("dog", "elephant")):
            folder = root / "PACS" / name / word
            folder.mkdir(parents=True)
            for k in range(10):
                pixels = np.clip(rng.normal(90 + 60 * label + 10 * number, 20, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"pic_{k:03d}.png")
    return root


def test_pictures_are_augmented_by_their_seed_alone(tmp_path: Path) -> None:
    problem = data.load("pacs", write_pictures(tmp_path), 0, side=32)
    domain = problem.domains[2]
    index = torch.tensor([3, 11])
    x, y = domain.batch(index, 5)
    state = torch.get_rng_state()
    again, _ = domain.batch(index, 5)
    assert torch.equal(x, again) and torch.equal(state, torch.get_rng_state())
    assert x.shape == (2, 3, 32, 32) and y.tolist() == [0, 1]
    assert not torch.equal(x, domain.batch(index, 6)[0])
    looked = torch.cat([part for part, _ in domain.look(torch.arange(20))])
    assert looked.shape == (20, 3, 32, 32) and torch.equal(
        looked, torch.cat([p for p, _ in domain.look(torch.arange(20))])
    )
    ahead = data.BatchStream(data.PictureDomain(domain.environment, 32, 1), torch.arange(20), 4, 7, 2, 5)
    here = data.BatchStream(domain, torch.arange(20), 4, 7, 0, 5)
    for step in (2, 3, 4):
        assert torch.equal(ahead[step][0], here[step][0])


def test_pictures_train_resume_and_are_checked(tmp_path: Path, run_paper: Any) -> None:
    folder = write_pictures(tmp_path / "data")
    small = [
        *("--preset", "pacs", "--data", str(folder), "--network", "resnet18", "--weights", "random", "--image", "32"),
        *(
            "--pool",
            "erm",
            "coral:gamma=1",
            "--lrs",
            "1e-3",
            "--repeats",
            "1",
            "--steps",
            "3",
            "--checkpoint-every",
            "1",
        ),
        *("--batch", "4", "--grid", "64", "--workers", "0", "--test-envs", "photo", "--info-threshold", "0"),
    ]
    whole = run_paper("ood_expansion", [*small, "--out", str(tmp_path / "a")])
    assert whole.code == 0, whole.err
    stopped = run_paper("ood_expansion", [*small, "--stop-after", "2", "--out", str(tmp_path / "b")])
    assert stopped.code == 0, stopped.err
    assert run_paper("ood_expansion", ["--resume", str(tmp_path / "b")]).code == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in "ab"]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert "pacs/photo/picked/by_criterion/test_accuracy" in results[0]["metrics"]
    checked = run_paper("ood_expansion", ["--preset", "pacs", "--data", str(folder), "--check-data"])
    assert checked.code == 0 and "80 images in all, published: 9991; 2 classes, published: 7" in checked.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--datasets", "pax"], "--datasets is pax, expected one or more of"),
        (["--pool", "fish"], "no algorithm 'fish'"),
        (["--pool", "mixup:gamma=1"], "expected mixup:alpha=<positive number>"),
        (["--pool", "erm:recolour=0.1", "--datasets", "styles"], "no colours"),
        (
            ["--pool", "irm:penalty=1", "--anneal", "400", "--datasets", "coloured-digits"],
            "no checkpoint after --anneal",
        ),
        (["--checkpoint-every", "700"], "expected less than the"),
        (["--test-envs", "photo"], "coloured-digits has agree=1.0"),
        (["--agree", "0.5"], "expected two or more shares"),
        (["--info-threshold", "1.0", "--datasets", "coloured-digits"], "no model has an informative feature"),
        (["--preset", "pacs"], "--data"),
        (["--preset", "digits4", "--data", "/nowhere"], "/nowhere"),
        (["--holdout", "1"], "--holdout is 1"),
        (["--network", "resnet18", "--datasets", "styles"], "takes pictures of three channels"),
    ],
)
def test_bad_usage_is_one_line(refuses: Callable[..., None], argv: list[str], message: str) -> None:
    quick = ["--steps", "5", "--checkpoint-every", "2"]
    if not {"--checkpoint-every", "--anneal", "--preset"} & set(argv):
        argv = [*argv, *quick, *([] if "--pool" in argv else ["--pool", "erm"])]
    if "--anneal" in argv:
        argv = [*argv, *quick]
    refuses(argv, message)


def test_a_broken_picture_is_named(tmp_path: Path, refuses: Callable[..., None]) -> None:
    folder = write_pictures(tmp_path)
    (folder / "PACS" / "photo" / "dog" / "pic_003.png").write_bytes(b"not a picture")
    argv = ["--preset", "pacs", "--data", str(folder), "--network", "resnet18", "--weights", "random", "--image", "32"]
    argv += [
        "--pool",
        "erm",
        "--lrs",
        "1e-3",
        "--steps",
        "3",
        "--checkpoint-every",
        "1",
        "--workers",
        "0",
        "--batch",
        "4",
    ]
    refuses(argv, "pic_003.png is not a readable image")


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def features_of_a_pool() -> tuple[Tensor, Tensor, list[Features]]:
    """Models that rely on a feature that varies by a known share: validation, accuracy elsewhere, features."""
    reliance = torch.linspace(0, 1, 20)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(20, generator=generator)
    found = [
        Features(
            0.1 + 0.4 * r + 0.02 * torch.rand(30, generator=generator),
            0.15 + 0.8 * r + 0.02 * torch.rand(30, generator=generator),
            0.2 + 0.3 * torch.rand(30, generator=generator),
        )
        for r in reliance
    ]
    return 0.94 + 0.01 * noise, 0.9 - 0.3 * reliance, found


def test_the_rule_finds_what_varies_least(features_of_a_pool: Any) -> None:
    validation, test, found = features_of_a_pool
    v = torch.tensor([model.mean_variation(f, 0.3) for f in found])
    choice = model.choose(validation, v)
    assert test[choice.by_criterion] > test[choice.by_accuracy] + 0.015
    assert float(torch.corrcoef(torch.stack((v, test)))[0, 1]) < -0.9


def claims_of(train: ModuleType, pool: tuple[Tensor, Tensor, list[Features]]) -> dict[str, bool]:
    """Verdicts of ``decide_claims`` on metrics that ``pick`` makes of a pool."""
    validation, test, found = pool
    config = train.DEFAULT
    metrics: dict[str, float] = {}
    unit = type("U", (), {"finish": staticmethod(lambda m, **_: metrics.update(m))})
    read = train.Pool(validation, test, found, torch.zeros(len(test), dtype=torch.bool))
    train.read_pool, keep = (lambda run, keys: read), train.read_pool
    problem = data.Problem(
        "coloured-digits",
        [data.Domain(n, torch.zeros(0), torch.zeros(0)) for n in "abcd"],
        10,
        (3,),
        "generated",
        None,
        3,
        14,
    )
    try:
        train.pick(unit, None, config, problem, 3, [])
    finally:
        train.read_pool = keep
    out: dict[str, bool] = {}

    class FakeRun:
        seeds = (0,)
        metrics: Any = None

        def threshold(self, claim: str, key: str) -> float:
            return {
                "correlation": 0.4,
                "margin": {"variation_says_more_than_validation": 0.0}.get(claim, 0.015),
                "gap": 0.03,
            }[key]  # type: ignore[return-value]

        def claim(self, name: str, holds: Any, **_: float) -> None:
            out[name] = bool(holds)

    fake = FakeRun()
    fake.metrics = {k: type("S", (), {"mean": v}) for k, v in metrics.items()}
    train.decide_claims(config, fake, {}, {(0, "coloured-digits"): problem})
    return out


def test_claims_fail_when_variation_is_measured_wrongly(train: ModuleType, features_of_a_pool: Any) -> None:
    assert all(claims_of(train, features_of_a_pool).values())
    validation, test, found = features_of_a_pool
    broken = claims_of(train, (validation, test, found[::-1]))  # the features of the model at the other end
    assert not any(broken.values())


def test_variation_between_random_parts_of_the_images_says_nothing() -> None:
    """The control: colour varies between the domains, and no longer when images are given to domains at random."""
    problem = data.load("coloured-digits", None, 0, agree=(1.0, 0.85, 0.7))
    shown = [d.images.flatten(2).amax(-1) for d in problem.domains[:3]]
    domain = torch.arange(3).repeat_interleave(1250)
    label = torch.cat([d.labels for d in problem.domains[:3]])
    shuffled = domain[torch.randperm(len(domain), generator=torch.Generator().manual_seed(0))]
    real, control = (model.examine(torch.cat(shown), e, label, 3, 10, [0, 1, 2], 256) for e in (domain, shuffled))
    assert float(real.available.min()) > float(control.available.max()) + 0.05


def test_smoke_writes_a_figure_and_all_rules(run_paper: Any, tmp_path: Path) -> None:
    result = run_paper("ood_expansion", ["--preset", "smoke", "--out", str(tmp_path / "run")])
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    rules = ("by_accuracy", "by_variation", "by_criterion", "by_criterion_all_features", "oracle", "mean")
    assert {f"coloured-digits/unseen/picked/{rule}/test_accuracy" for rule in rules} <= set(metrics)
    assert {f"styles/average/picked/{rule}/test_accuracy" for rule in rules[:-1]} <= set(metrics)
    left_out = [metrics[f"styles/{name}/picked/oracle/test_accuracy"]["mean"] for name in data.STYLES]
    assert metrics["styles/average/picked/oracle/test_accuracy"]["mean"] == pytest.approx(np.mean(left_out))
    assert (tmp_path / "run" / "figure.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="needs --data"):
        data.load("digits4", None, 0)


def test_a_collapsed_network_does_not_end_the_run(train: ModuleType, monkeypatch: Any, tmp_path: Path) -> None:
    right, calls = train.examine, []

    def collapsed(features: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(features))
        return right(features * 0 if len(calls) <= 2 else features, *args, **kwargs)

    monkeypatch.setattr(train, "examine", collapsed)
    argv = ["--preset", "smoke", "--datasets", "coloured-digits", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0 and len(calls) > 4
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 <= result["metrics"]["coloured-digits/unseen/picked/by_criterion/test_accuracy"]["mean"] <= 1
