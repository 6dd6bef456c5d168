"""Sparse experts: routing by hand and by loops, counts, DeiT against timm, algorithms, loaders, resume, claims."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from papers.sf_moe import algorithms, data, model
from shared.errors import UserError
from shared.paper import read_paper
from shared.run import Summary

FOLDER = Path(__file__).resolve().parents[2] / "papers" / "sf_moe"
TINY: dict[str, Any] = {"image": 8, "patch": 4, "channels": 1, "classes": 3, "width": 16, "depth": 4, "heads": 2}


def close(a: Tensor, b: Any, atol: float = 1e-5) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), atol=atol)


def filled(layer: nn.Module) -> Any:
    """Weights large enough for differences to show."""
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def copied(layer: model.SparseMoE, width: int, hidden: int) -> model.Mlp:
    """A dense layer whose copies are the experts."""
    mlp = filled(model.Mlp(width, hidden))
    layer.experts.copy_from(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return mlp


def looped(layer: Any, x: Tensor, routes: model.Routes) -> Tensor:
    """Every expert on the tokens that chose it, one after the other."""
    e = layer.experts
    out = torch.zeros(len(x), e.w2.shape[1], dtype=x.dtype)
    for i in range(len(e.w1)):
        for j in range(routes.expert.shape[1]):
            mine = routes.expert[:, j] == i
            if routes.keep is not None:
                mine = mine & routes.keep[:, j]
            h = F.linear(x[mine], e.w1[i], None if e.b1 is None else e.b1[i])
            y = F.linear(e.activation(h), e.w2[i], None if e.b2 is None else e.b2[i])
            out[mine] = out[mine] + routes.gate[mine, j, None] * y
    return out


# ---- routing ---------------------------------------------------------------------------------------------------------


def test_cosine_logits_by_hand() -> None:
    u, s = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    logits = model.cosine_logits(u, s, torch.tensor(math.log(2.0)))
    assert close(logits, [[1.2, 1.6]]) and close(logits.softmax(1), [[0.40131, 0.59869]])
    assert close(model.cosine_logits(7 * u, s * torch.tensor([3.0, 0.1]), torch.tensor(math.log(2.0))), logits)
    assert close(model.cosine_logits(u, s, torch.tensor(50.0)), [[60.0, 80.0]], 1e-3)  # scale is at most 100


def test_importance_loss_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    assert float(model.importance_loss(p)) == pytest.approx(0.18, abs=1e-5)
    assert float(model.importance_loss(torch.full((5, 4), 0.25))) == pytest.approx(0, abs=1e-9)
    assert float(model.importance_loss(F.one_hot(torch.zeros(7).long(), 6).float())) == pytest.approx(6, abs=1e-4)
    assert float(model.importance_loss(torch.ones(3, 1))) == 0


def test_load_loss_by_hand() -> None:
    p, threshold = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]), torch.tensor([0.5, 0.6])
    phi = lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2)))  # noqa: E731
    load = [sum(phi((float(p[t, i]) - float(threshold[t])) / 0.4) for t in range(2)) for i in range(3)]
    mean = sum(load) / 3
    expected = sum((v - mean) ** 2 for v in load) / 2 / mean**2
    assert float(model.load_loss(p, threshold, 0.4)) == pytest.approx(expected, rel=1e-4)
    assert float(model.load_loss(torch.full((4, 3), 1 / 3), torch.full((4,), 1 / 3), 0.4)) == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="needs gate noise"):
        model.load_loss(p, threshold, 0.0)


def test_the_load_losses_threshold_is_of_probabilities_unless_asked() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    routes = model.route(logits, 1)
    p = logits.softmax(1)
    half = model.importance_loss(p)
    for literal, threshold in ((False, p.amax(1)), (True, logits.amax(1))):
        expected = (half + model.load_loss(p, threshold, 0.3)) / 2
        assert float(model.balance_loss(routes, 0.3, literal)) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(model.balance_loss(routes, 0.3) - model.balance_loss(routes, 0.3, True))) > 1e-2


def test_gates_are_raw_for_one_and_renormalised_for_two() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    p = logits.softmax(1)[0]
    one, two = model.route(logits, 1), model.route(logits, 2)
    assert close(one.gate[0], p[1:2]) and one.expert.tolist() == [[1]]
    assert close(two.gate[0], torch.stack((p[1], p[0])) / (p[0] + p[1])) and two.expert.tolist() == [[1, 0]]


def test_noise_moves_the_choice_and_not_the_probabilities_of_the_loss() -> None:
    logits = torch.zeros(4000, 4)
    routes = model.route(logits, 1, 0.25)
    assert close(routes.probability, torch.full((4000, 4), 0.25))
    assert float(routes.logits.std()) == pytest.approx(0.25, rel=0.05)
    share = torch.bincount(routes.expert[:, 0], minlength=4) / 4000
    assert float((share - 0.25).abs().max()) < 0.05


def test_capacities_by_hand() -> None:
    assert model.capacity_of(197 * 96, 6, 1, 1.5) == 4728 and model.capacity_of(10, 6, 1, 1.5) == 3
    assert model.capacity_of(10, 6, 2, 1.5) == 6
    assert model.group_capacity(198, 4, 1.25) == 61 and model.group_capacity(198, 4, 2.0) == 99
    assert model.group_capacity(5, 4, 1.25) == 4


def test_the_most_certain_are_admitted_first() -> None:
    queue, sure = torch.zeros(4, 1, dtype=torch.int64), torch.tensor([0.6, 0.9, 0.5, 0.8])
    assert model.admit(queue, 2, 2, sure)[:, 0].tolist() == [False, True, False, True]
    assert model.admit(queue, 2, 2)[:, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("seed", range(4))
def test_admission_is_a_queue(seed: int) -> None:
    """By a loop: all first choices in order of priority, then all second choices; those that ask for none wait not."""
    g = torch.Generator().manual_seed(seed)
    queue = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(30)])
    priority = torch.rand(30, generator=g)
    keep = model.admit(queue, 3, 5, priority)
    taken, expected = [0] * 3, torch.zeros(30, 2, dtype=torch.bool)
    for j in range(2):
        for t in priority.argsort(descending=True).tolist():
            q = int(queue[t, j])
            if q < 3 and taken[q] < 5:
                taken[q] += 1
                expected[t, j] = True
    assert torch.equal(keep, expected) and not keep.all()


# ---- dispatch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width,hidden", [(8, 16), (5, 7)])  # with the grouped kernel, and padded
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("full", [False, True])
def test_dispatch_is_a_loop_over_experts_and_so_are_its_gradients(
    width: int, hidden: int, top_k: int, full: bool
) -> None:
    experts = filled(model.Experts(4, width, hidden, out=width))
    layer = type("Layer", (), {"experts": experts})
    logits = torch.randn(23, 4)
    logits[:, 2] -= 50  # nobody's first choice
    x = torch.randn(23, width, requires_grad=True)
    logits.requires_grad_()

    def outputs(how: Any) -> tuple[Tensor, list[Tensor]]:
        routes = model.route(logits, top_k)
        if full:
            keep = model.admit(routes.expert, 4, 6, routes.noisy.detach().amax(1))
            routes = model.Routes(routes.expert, routes.gate, routes.probability, routes.noisy, routes.logits, keep)
            assert not keep.all()
        y = how(routes)
        return y, list(torch.autograd.grad((y * torch.arange(23)[:, None]).sum(), [x, logits, *experts.parameters()]))

    a, grads = outputs(lambda r: model.dispatch(x, r, experts))
    b, others = outputs(lambda r: looped(layer, x, r))
    assert close(a, b, 1e-4)
    for g, o in zip(grads, others, strict=True):
        assert close(g, o, 1e-3 * float(o.abs().max() + 1))


def test_the_grouped_product_in_both_forms() -> None:
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([5, 0, 7])
    assert torch.autograd.gradcheck(lambda x, w, b: model.grouped_linear(x, w, b, counts), (x, w, bias))
    ends = counts.cumsum(0).to(torch.int32)
    x, w, direction = x.detach().float().requires_grad_(), w.detach().float().requires_grad_(), torch.randn(12, 4)
    forms = []
    for y in (model.grouped_linear(x, w, None, counts), model._GroupedProduct.apply(x, w, ends)):
        forms.append([y, *torch.autograd.grad(y, (x, w), direction)])
    for blocks, kernel in zip(*forms, strict=True):
        torch.testing.assert_close(blocks, kernel)


def test_copies_of_one_layer_are_that_layer() -> None:
    x = torch.randn(3, 5, 8)
    one = model.SparseMoE(8, 16, 4, 1).eval()
    dense = copied(one, 8, 16)
    p = one.router(x.view(15, 8)).softmax(1).amax(1).view(3, 5, 1)
    assert close(one(x), p * dense(x))
    for router in ("cosine", "linear"):
        every = model.SparseMoE(8, 16, 4, 4, router=router).eval()
        dense = copied(every, 8, 16)
        assert close(every(x), dense(x))
    single = model.SparseMoE(8, 16, 1, 1, dropout=0.0, capacity_factor=None)
    dense = copied(single, 8, 16)
    assert close(single(x), dense(x)) and float(single.balance) == 0  # type: ignore[arg-type]


def test_overflowing_tokens_get_nothing() -> None:
    layer = model.SparseMoE(8, 16, 4, 1, capacity_factor=1.0, dropout=0.0, gate_noise=1e-9)
    filled(layer.experts)
    x = torch.randn(1, 8).expand(16, 8) * torch.linspace(1, 2, 16)[:, None]
    with torch.no_grad():
        layer.router.project.bias.zero_()  # equal angles: all ask for one expert
    y = layer(x)
    assert int((y.abs().sum(1) > 0).sum()) == 4
    layer.eval()
    assert int((layer(x).abs().sum(1) > 0).sum()) == 16


def test_order_of_tokens_does_not_matter_and_evaluation_is_deterministic() -> None:
    layer = filled(model.SparseMoE(8, 16, 4, 2)).eval()
    x, order = torch.randn(20, 8), torch.randperm(20)
    assert close(layer(x)[order], layer(x[order]))
    assert torch.equal(layer(x), layer(x)) and layer.balance is None


def test_the_router_learns_from_the_gate_and_from_the_balance_loss() -> None:
    for router in ("cosine", "linear"):
        layer = filled(model.SparseMoE(8, 16, 4, 1, router=router))
        y = layer(torch.randn(20, 8))
        by_gate = torch.autograd.grad(y.sum(), list(layer.router.parameters()), retain_graph=True)
        by_balance = torch.autograd.grad(layer.balance, list(layer.router.parameters()), allow_unused=True)
        assert all(float(g.abs().max()) > 0 for g in by_gate)
        assert all(g is not None and float(g.abs().max()) > 0 for g in by_balance)


def test_training_on_the_balance_loss_balances() -> None:
    layer = model.SparseMoE(8, 16, 4, 1, dropout=0.0)
    nn.init.normal_(layer.router.embedding)
    x = torch.randn(200, 8) + 2
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    shares = []
    for _ in range(200):
        optimizer.zero_grad()
        layer(x)
        shares.append(float(model.usage([layer.chosen], 4).max()))
        layer.balance.backward()  # type: ignore[union-attr]
        optimizer.step()
    assert shares[-1] - 0.25 < 0.5 * (shares[0] - 0.25), shares[:: len(shares) - 1]


# ---- SF-MoE ----------------------------------------------------------------------------------------------------------


def test_gshard_loss_by_hand() -> None:
    p = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.0, 1.0]]])
    first = torch.tensor([[0, 0], [1, 1]])
    assert float(model.gshard_loss(p, first)) == pytest.approx(4 * (0.625 + 0.875) / 4)


def test_group_layer_is_a_loop_over_images_and_experts() -> None:
    layer = filled(model.GroupMoE(8, 4)).eval()
    x = torch.randn(3, 40, 8)
    y = layer(x)
    for image, out in zip(x, y):
        routes = model.route(image @ layer.gate, 2)
        room = model.group_capacity(40, 4, 2.0)
        taken, keep = [0] * 4, torch.zeros(40, 2, dtype=torch.bool)
        for j in range(2):
            for t in range(40):
                e = int(routes.expert[t, j])
                if (j == 0 or float(routes.gate[t, 1].detach()) > 0.2) and taken[e] < room:
                    taken[e] += 1
                    keep[t, j] = True
        routes = model.Routes(routes.expert, routes.gate, routes.probability, routes.noisy, routes.logits, keep)
        assert close(out, looped(layer, image, routes), 1e-4)
    assert close(layer(x[1:2])[0], y[1], 1e-4)  # an image does not depend on the others


def test_second_experts_are_kept_at_random_in_training() -> None:
    layer = filled(model.GroupMoE(8, 4))
    x = torch.randn(2, 30, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.random_eval = True
    assert not torch.equal(layer(x), layer(x))
    assert layer.experts.b1 is None
    fresh = model.GroupMoE(16, 4)
    assert float(fresh.experts.w1.detach().abs().max()) <= 64**-0.5 < 0.3 < 16**-0.5 * 1.3
    assert float(fresh.experts.w2.abs().max()) == pytest.approx(16**-0.5, rel=0.05)


# ---- transformers ----------------------------------------------------------------------------------------------------


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_and_macs_of_the_paper() -> None:
    with torch.device("meta"):
        assert parameters(model.VisionTransformer()) == 22_050_664
        assert parameters(model.Mlp(384, 1536)) == 1_181_568
        sparse = model.gmoe()
        assert parameters(sparse) == 34_066_538
        dense = model.VisionTransformer()
        distilled = model.VisionTransformer(distilled=True)
        assert parameters(distilled) == 22_050_664 + 384 + 384 + 385_000
    extra = 2 * 197 * (384 * 256 + 256 * 6)
    assert model.active_macs(sparse) - model.active_macs(dense) == extra
    assert model.active_macs(dense) / 1e9 == pytest.approx(4.6, abs=0.05)
    assert [i for i, b in enumerate(sparse.blocks) if isinstance(b.mlp, model.SparseMoE)] == [8, 10]


def test_dense_transformers_are_timms() -> None:
    import timm

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    ours: dict[str, Any] = {"image": 32, "width": 24, "depth": 3, "heads": 3, "classes": 5}
    x = torch.randn(2, 3, 32, 32)
    for distilled in (False, True):
        name = "deit_small_distilled_patch16_224" if distilled else "deit_small_patch16_224"
        peer = filled(timm.create_model(name, **sizes)).eval()
        net = model.VisionTransformer(distilled=distilled, **ours).eval()
        model.load_dense(net, {"model": peer.state_dict()})
        assert close(net(x), peer(x), 2e-3 * float(peer(x).abs().max()))


def test_experts_start_as_copies_of_a_trained_block() -> None:
    dense = filled(model.VisionTransformer(**TINY)).eval()
    every = model.gmoe("FSFS", experts=3, top_k=3, **TINY).eval()
    model.load_dense(every, dense.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert close(every(x), dense(x), 1e-3 * float(dense(x).abs().max()))
    again = model.gmoe("FSFS", experts=3, top_k=3, **TINY).eval()
    model.load_dense(again, every.state_dict())
    assert close(again(x), every(x))
    other = model.gmoe("FSFS", classes=7, **{k: v for k, v in TINY.items() if k != "classes"})
    model.load_dense(other, dense.state_dict())  # another head stays as it was
    assert close(other.blocks[1].mlp.experts.w1[2], dense.blocks[1].mlp.fc1.weight)
    from_v1 = model.sf_moe("FSFS", **TINY)
    model.load_dense(from_v1, dense.state_dict())
    assert close(from_v1.blocks[0].mlp.fc1.weight, dense.blocks[0].mlp.fc1.weight)


def test_weights_that_do_not_fit_are_named() -> None:
    state = model.VisionTransformer(**TINY).state_dict()
    net = model.gmoe("FSFS", experts=3, **TINY)
    with pytest.raises(ValueError, match=r"block 3 is sparse and the weights lack blocks\.3\.mlp\.fc1\.weight"):
        model.load_dense(net, {k: v for k, v in state.items() if not k.startswith("blocks.3.mlp")})
    with pytest.raises(ValueError, match=r"block 1 has experts \(3, 64, 16\).*\(4, 64, 16\)"):
        model.load_dense(net, model.gmoe("FSFS", experts=4, **TINY).state_dict())
    with pytest.raises(ValueError, match=r"weights of norm\.weight: expected \(16,\), found none"):
        model.load_dense(net, {k: v for k, v in state.items() if k != "norm.weight"})


def test_named_layers() -> None:
    assert model.parse_layers("last-two", 12) == [8, 10] and model.parse_layers("alternate", 12) == [5, 11]
    assert model.parse_layers("every-two", 12) == [1, 3, 5, 7, 9, 11] and model.parse_layers("FSFS", 4) == [1, 3]
    for text in ("FSF", "FSFX"):
        with pytest.raises(ValueError, match="4 letters F"):
            model.parse_layers(text, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model.VisionTransformer(width=10, heads=4), "width of 10 does not divide into 4 heads"),
        (lambda: model.VisionTransformer(image=30, patch=16), "side 30 does not divide into patches of side 16"),
        (lambda: model.SparseMoE(8, 8, 2, 3), "top_k is 3 of 2 experts"),
        (lambda: model.SparseMoE(8, 8, 2, capacity_factor=0.0), "capacity factor of 0.0 leaves no room"),
        (lambda: model.SparseMoE(8, 8, 2, gate_noise=0.0), "gate_noise is 0.0"),
        (lambda: model.SparseMoE(8, 8, 2, router="hash"), "no router 'hash'"),
        (lambda: model.GroupMoE(8, 1), "got 1"),
        (lambda: model.VisionTransformer(**TINY)(torch.zeros(1, 1, 12, 8)), "expected sides of 8"),
        (lambda: model.ResNet(34, 2), "no ResNet of depth 34"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_router_that_overflows_names_its_block() -> None:
    net = model.gmoe("FSFS", **TINY)
    net.blocks[3].mlp.router.project.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="block 3"):
        net(torch.randn(1, 1, 8, 8))


def test_resnet_keeps_its_statistics() -> None:
    net = model.ResNet(18, 3)
    net.train()
    before = net.trunk.bn1.running_mean.clone()
    net(torch.randn(2, 3, 32, 32) + 3)
    assert torch.equal(before, net.trunk.bn1.running_mean)


# ---- algorithms ------------------------------------------------------------------------------------------------------


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 1, 8, 8), torch.arange(n) % 3) for _ in range(2)]


@pytest.mark.parametrize("name", list(algorithms.ALGORITHMS))
def test_every_algorithm_learns_and_keeps_the_contract(name: str) -> None:
    net, x = model.gmoe("FSFS", experts=3, dropout=0.0, drop_path=0.0, **TINY), batches()
    settings = {"balance": model.total_balance, "weight_decay": 1e-6}
    algorithm = algorithms.make_algorithm(name, net, 2, 3e-3, **settings)
    first = algorithm.update(x)
    for _ in range(25):
        logs = algorithm.update(x)
    assert logs["loss"] < first["loss"] and {"loss", "balance"} <= set(logs) and int(algorithm.count) == 26
    assert algorithm.predict(x[0][0]).shape == (6, 3)
    with pytest.raises(ValueError, match="1 mini-batches, expected one for each of 2"):
        algorithm.update(x[:1])


def test_balance_losses_are_added_with_their_weight() -> None:
    net, x = model.gmoe("FSFS", experts=3, **TINY), batches()
    made = [algorithms.make_algorithm("erm", net, 2, 1e-3, balance=b) for b in (None, model.total_balance)]
    losses = []
    for algorithm in made:
        torch.manual_seed(5)
        losses.append(algorithm(x))
    assert "balance" not in losses[0]
    expected = losses[0]["loss"] + 0.01 * losses[1]["balance"]
    assert close(losses[1]["loss"], expected) and float(losses[1]["balance"]) > 0


def test_penalties_by_hand() -> None:
    logits = torch.randn(8, 3, requires_grad=True)
    y = torch.arange(8) % 3
    w = torch.ones((), requires_grad=True)
    halves = [torch.autograd.grad(F.cross_entropy(w * logits[i::2], y[i::2]), w)[0] for i in (0, 1)]
    assert close(algorithms.irm_penalty(logits, y), halves[0] * halves[1])
    a, b = torch.randn(7, 4), torch.randn(9, 4) + 1
    settings: dict[str, Any] = {"network": model.SmallCNN(1, 3), "domains": 2, "lr": 1e-3}
    coral, mmd = algorithms.CORAL(**settings), algorithms.MMD(**settings)
    gap = (a.mean(0) - b.mean(0)).square().mean() + (torch.cov(a.T) - torch.cov(b.T)).square().mean()
    assert close(coral.distance(a, b), gap) and float(coral.distance(a, a)) == 0
    assert float(mmd.distance(a, a)) == pytest.approx(0, abs=1e-6) and float(mmd.distance(a, b)) > 0.1


def test_fish_goes_half_of_the_way_of_its_inner_steps() -> None:
    torch.manual_seed(1)
    net, inner = (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2))
    inner.load_state_dict(net.state_dict())
    before, x = [p.detach().clone() for p in net.parameters()], batches()
    optimizer = torch.optim.Adam(inner.parameters(), 1e-2)
    for images, labels in x:
        optimizer.zero_grad()
        F.cross_entropy(inner(images), labels).backward()
        optimizer.step()
    algorithms.make_algorithm("fish", net, 2, 1e-2).update(x)
    for old, new, led in zip(before, net.parameters(), inner.parameters()):
        assert close(new, (old + led) / 2, 1e-4)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_conditional_statements_shift_attributes_only() -> None:
    parts = data.conditional(0, 4000, 4000)
    for name, expected in (("train", data.FREQUENCIES), ("id", data.FREQUENCIES), ("ood", [1 / 6] * 6)):
        share = torch.bincount(parts[name].attribute, minlength=6) / 4000
        assert close(share, expected, 0.03)
    a, b = (parts[name] for name in ("train", "ood"))
    for k in range(3):  # a linear fit of one attribute's rule in one part is as good in the other
        xa, ya, xb, yb = (t[p.attribute == k] for p in (a, b) for t in (p.x, p.y))
        fit = torch.linalg.lstsq(torch.cat((xa, torch.ones(len(xa), 1)), 1), ya).solution
        errors = [((torch.cat((x, torch.ones(len(x), 1)), 1) @ fit - y) ** 2).mean() for x, y in ((xa, ya), (xb, yb))]
        assert float(errors[1] / errors[0]) == pytest.approx(1, abs=0.2)
    assert torch.equal(data.conditional(0, 50, 20)["train"].x, data.conditional(0, 50, 20)["train"].x)
    assert not torch.equal(data.conditional(0, 50, 20)["train"].x, data.conditional(1, 50, 20)["train"].x)


def test_styles_share_no_digit_with_the_pretext() -> None:
    problem = data.load("styles", None, 0)
    assert problem.names == ("plain", "thick", "slanted", "optical") and problem.kind == "generated"
    assert [len(d) for d in problem.domains] == [1250, 1250, 1250, 1797]
    assert problem.pretext is not None and problem.pretext[0].shape == (1250, 1, 16, 16)
    rows = {tuple(v.flatten().tolist()) for v in problem.pretext[0][:200]}
    assert not rows & {tuple(v.flatten().tolist()) for v in problem.domains[0].images}
    assert "plain: 1250 images (1, 16, 16)" in "\n".join(data.describe(problem))


def test_real_digits(data_root: Path) -> None:
    problem = data.load("digits4", data_root, 0)
    assert {d.name: len(d) for d in problem.domains} == {
        "mnist": 10000,
        "usps": 9298,
        "semeion": 1593,
        "optical": 1797,
    }
    assert problem.kind == "real" and problem.pretext is not None and len(problem.pretext[1]) == 5000


@pytest.fixture
def pacs(tmp_path: Path) -> Path:
    """A few pictures in the layout of PACS."""
    for number, env in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        for label in ("dog", "guitar"):
            folder = tmp_path / "set" / "PACS" / env / label
            folder.mkdir(parents=True)
            for i in range(4):
                colour = (40 * number, 200 * (label == "dog"), 30 * i)
                Image.new("RGB", (20 + i, 18), colour).save(folder / f"pic_{i:03d}.jpg")
    return tmp_path / "set"


def test_pictures_are_read_in_the_official_layout(pacs: Path) -> None:
    problem = data.load("pacs", pacs, 0, side=32)
    assert problem.names == ("art_painting", "cartoon", "photo", "sketch") and problem.classes == 2
    x, y = problem.domains[1].batch(torch.tensor([0, 5]), 3)
    assert x.shape == (2, 3, 32, 32) and y.tolist() == [0, 1]
    assert torch.equal(x, problem.domains[1].batch(torch.tensor([0, 5]), 3)[0])
    (images, labels), *_ = problem.domains[0].look(torch.arange(8))
    assert images.shape == (8, 3, 32, 32) and labels.tolist() == [0] * 4 + [1] * 4
    assert "PACS" not in data.describe(problem)[0] and "art_painting: 8 images" in data.describe(problem)[0]


# ---- the command -----------------------------------------------------------------------------------------------------

CUT = ["--preset", "smoke", "--device", "cpu"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "smoke", "--top-k", "7"], "--top-k is 7, expected at most the 6 of --experts"),
        (["--preset", "smoke", "--width", "30"], "--width is 30, expected a multiple of the 4"),
        (["--preset", "smoke", "--moe-layers", "FSF"], "--moe-layers is 'FSF'"),
        (["--preset", "smoke", "--capacity-factor", "0"], "--capacity-factor is 0.0, expected more than 0"),
        (["--preset", "smoke", "--gate-noise", "0"], "--gate-noise is 0"),
        (["--preset", "smoke", "--arms", "cosine:1"], "--arms: 'cosine:1'"),
        (["--preset", "smoke", "--test-envs", "sketch"], "--test-envs sketch: styles has plain"),
        (
            ["--preset", "smoke", "--weights", "random", "--networks", "resnet18"],
            "three channels, styles has 1",
        ),
        (["--preset", "smoke", "--weights", "nowhere.pt", "--parts", "domains"], "nowhere.pt is not a file of weights"),
        (["--preset", "digits4"], "needs --data DIR"),
        (["--preset", "smoke", "--patch", "5", "--parts", "domains"], "does not divide into patches of side 5"),
    ],
)
def test_bad_usage_is_one_line(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


def test_bad_folders_are_one_line(refuses: Any, pacs: Path) -> None:
    refuses(["--preset", "vlcs", "--data", str(pacs), "--check-data"], "vlcs: no folder")
    for path in sorted((pacs / "PACS" / "photo" / "dog").iterdir()):
        path.unlink()
    (pacs / "PACS" / "photo" / "dog").rmdir()
    refuses(["--preset", "pacs", "--data", str(pacs), "--check-data"], "other classes than art_painting: ['dog']")


def test_broken_pictures_are_named(pacs: Path) -> None:
    (pacs / "PACS" / "cartoon" / "dog" / "pic_000.jpg").write_bytes(b"no picture")
    problem = data.load("pacs", pacs, 0, side=32)
    with pytest.raises(UserError, match=r"pic_000\.jpg is not a readable image"):
        problem.domains[1].batch(torch.tensor([0]))


def test_stopped_and_resumed_is_uninterrupted(train: ModuleType, tmp_path: Path) -> None:
    """Stopped inside the study, inside the pretext, and inside and at the end of fine-tuning."""
    whole = tmp_path / "whole"
    assert train.main([*CUT, "--out", str(whole)]) == 0
    parts = tmp_path / "parts"
    assert train.main([*CUT, "--out", str(parts), "--stop-after", "5"]) == 0
    for more in (2, 3, 1):
        assert train.main(["--resume", str(parts), "--stop-after", str(more)]) == 0
    assert train.main(["--resume", str(parts)]) == 0
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (whole, parts))
    assert a["metrics"] == b["metrics"] and len(a["metrics"]) > 8


def test_fixed_sources_and_other_networks(train: ModuleType, tmp_path: Path) -> None:
    """Single-source training of SF-MoE and the CNN with Fish, on real loops."""
    out = tmp_path / "run"
    argv = [*CUT, "--parts", "domains", "--networks", "sf_moe", "cnn", "--test-envs", "--train-envs", "plain"]
    assert train.main([*argv, "--algorithm", "fish", "--out", str(out)]) == 0
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    for domain in ("plain", "thick", "slanted", "optical"):
        assert f"styles/from=plain/{domain}/sf_moe+fish/test_accuracy" in metrics
        assert f"styles/from=plain/{domain}/cnn+fish/test_accuracy" in metrics


def test_pictures_train_from_the_command(train: ModuleType, pacs: Path, tmp_path: Path) -> None:
    argv = ["--preset", "pacs", "--data", str(pacs), "--weights", "random", "--image", "32", "--width", "24"]
    argv += ["--depth", "3", "--heads", "3", "--steps", "2", "--batch", "2", "--workers", "0", "--test-envs", "sketch"]
    out = tmp_path / "run"
    assert train.main([*argv, "--seeds", "1", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert "pacs/sketch/gmoe/test_accuracy" in result["metrics"] and result["data"][0]["kind"] == "real"


def test_every_preset_makes_the_networks_of_the_paper(train: ModuleType) -> None:
    dense = {
        "pacs": 7,
        "vlcs": 5,
        "office_home": 65,
        "terra_incognita": 10,
        "domain_net": 345,
        "sviro": 7,
        "cub_dg": 200,
    }
    seen = 0
    for key, preset in train.PRESETS.items():
        config = preset.config
        assert key not in train.DATASET_NAMES or config.dataset == key
        classes = dense.get(config.dataset, 10)
        picture = config.dataset in dense
        problem = data.Problem(config.dataset, [], classes, "real", None, 3 if picture else 1, 224 if picture else 16)
        for name in config.networks:
            with torch.device("meta"):
                count = parameters(train.network(name, config, problem))
            if picture and name in ("vit", "gmoe"):
                base = 22_050_664 if name == "vit" else 34_066_538
                assert count == base - 385 * (1000 - classes)
                seen += 1
    assert seen >= 12


def test_one_step_at_full_width_and_depth() -> None:
    net = model.gmoe(image=32, classes=7)
    algorithm = algorithms.make_algorithm("erm", net, 1, 3e-5, balance=model.total_balance)
    before = net.blocks[8].mlp.experts.w1.detach().clone()
    logs = algorithm.update([(torch.randn(4, 3, 32, 32), torch.arange(4))])
    assert math.isfinite(float(logs["loss"])) and not torch.equal(before, net.blocks[8].mlp.experts.w1)


# ---- claims ----------------------------------------------------------------------------------------------------------


def summaries(**changes: float) -> dict[str, Summary]:
    """Metrics under which every claim holds, with changes."""
    good = {
        "study/dense:32/ood_error": 0.54,
        "study/dense:32/id_error": 0.36,
        "study/dense:128/ood_error": 0.42,
        "study/cosine:2/ood_error": 0.44,
        "study/cosine:4/ood_error": 0.35,
        "study/cosine:4/id_error": 0.27,
        "study/cosine:4/purity": 0.6,
        "study/cosine:6/purity": 0.6,
        "styles/average/gmoe/test_accuracy": 0.9,
        "styles/average/vit/test_accuracy": 0.9,
        "styles/plain/gmoe/least_share": 0.05,
    }
    return {name: Summary.of([value]) for name, value in (good | changes).items()}


def threshold(claim: str, key: str = "margin") -> float:
    return read_paper(FOLDER).claim(claim).thresholds[key]


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("experts_beat_dense_of_equal_active_size", {"study/cosine:4/ood_error": 0.45}),
        ("experts_beat_dense_of_equal_total_size", {"study/dense:128/ood_error": 0.34}),
        ("benefit_grows_with_experts", {"study/cosine:2/ood_error": 0.36}),
        ("gain_is_larger_out_of_distribution", {"study/cosine:4/id_error": 0.17}),
        ("experts_specialise_on_attributes", {"study/cosine:6/purity": 0.4}),
        ("costs_nothing_on_digits", {"styles/average/gmoe/test_accuracy": 0.88}),
        ("routing_does_not_collapse", {"styles/plain/gmoe/least_share": 0.0}),
    ],
)
def test_each_claim_can_fail(train: ModuleType, claim: str, change: dict[str, float]) -> None:
    assert {c.name for c in read_paper(FOLDER).claims} == set(train.verdicts(summaries(), threshold, "styles"))
    assert all(holds for holds, _ in train.verdicts(summaries(), threshold, "styles").values())
    assert not train.verdicts(summaries(**change), threshold, "styles")[claim][0]


def test_experts_chosen_blindly_do_not_specialise(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study itself with routes that do not look at their sample: claims of error and purity fail."""
    route = train.sparse_layers.__globals__["route"]

    def blind(logits: Tensor, top_k: int, noise: float = 0.0) -> Any:
        return route(logits[torch.randperm(len(logits))], top_k, noise)

    def study(name: str) -> dict[str, Any]:
        argv = ["--preset", "default", "--parts", "study", "--arms", "dense:32", "dense:128", "cosine:2", "cosine:4"]
        argv += ["cosine:6", "--study-steps", "150", "--seeds", "1", "--out", str(tmp_path / name), "--device", "cpu"]
        assert train.main(argv) == 0
        return {c["name"]: c for c in json.loads((tmp_path / name / "result.json").read_text())["claims"]}

    sound = study("sound")["experts_specialise_on_attributes"]["measured"]
    monkeypatch.setitem(train.sparse_layers.__globals__, "route", blind)
    claims = study("blind")
    broken = claims["experts_specialise_on_attributes"]["measured"]
    assert max(broken.values()) < min(sound.values())  # after equally few steps
    for name in (
        "experts_beat_dense_of_equal_active_size",
        "experts_beat_dense_of_equal_total_size",
        "benefit_grows_with_experts",
        "experts_specialise_on_attributes",
    ):
        assert not claims[name]["holds"], claims[name]


def test_one_expert_for_all_collapses(train: ModuleType) -> None:
    """A router that sends every token to one expert leaves the others without."""
    net = model.gmoe("FSFS", **TINY).eval()
    for layer in model.sparse_layers(net):
        layer.router.project.weight.data.zero_()
        layer.router.project.bias.data.fill_(1.0)
        layer.router.embedding.data.copy_(torch.randn(256, 1) + torch.linspace(0.1, 3, 6))
    net(torch.randn(4, 1, 8, 8))
    share = float(torch.stack([model.usage([m.chosen], 6) for m in model.sparse_layers(net)]).min())
    changed = summaries(**{"styles/plain/gmoe/least_share": share})
    assert not train.verdicts(changed, threshold, "styles")["routing_does_not_collapse"][0]
