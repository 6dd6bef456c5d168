"""RELIANT: the fairness term, both frameworks beside numbers of the official code, loaders, bad input, the claims."""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from papers.reliant import data, model
from papers.reliant.model import GCN, PLP, SAGE, SGC, Critics, Graph, Pattern, Proxy, Seeds, Unfairness
from shared.errors import UserError

METAS = ("recidivism", "recidivism-code", "credit", "dblp", "dblp-l")


# A graph of twelve nodes that the official code was run on as well.
NODES = 12
IDS = torch.arange(NODES)
PAIRS = torch.tensor(
    [[0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 1, 2], [1, 5, 2, 6, 4, 9, 8, 7, 10, 11, 11, 9, 10, 11, 7, 8]]
)
X = (torch.arange(NODES * 5.0) * 1.7).sin().view(NODES, 5).abs()
LABELS, SENS = (IDS * 7 % 5 < 2).long(), IDS // 2 % 2
TRAIN, FREE = IDS[::3], IDS[IDS % 3 > 0]
TEACHER = (torch.arange(NODES * 2.0) * 0.9).cos().view(NODES, 2)
EMBEDDING = (torch.arange(NODES * 4.0) * 0.43).sin().view(NODES, 4)
START = ((torch.arange(NODES * 2.0) * 0.61).sin().view(NODES, 2) + 1) / 2


def official_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Weights 0.8 cos(0.37 k), numbered through the names in sorted order."""
    out, k = {}, 0
    for name, value in sorted(module.state_dict().items()):
        count = value.numel()
        out[name] = (0.8 * (0.37 * torch.arange(k, k + count).float()).cos()).view(value.shape)
        k += count
    return out


def small() -> tuple[Graph, Seeds, Proxy]:
    graph, proxy = Graph(PAIRS, NODES), Proxy(NODES)
    proxy.load_state_dict({"values": START})
    return graph, Seeds(graph, TRAIN, LABELS), proxy


def dense(graph: Graph) -> Tensor:
    """A + I."""
    out = torch.zeros(graph.nodes, graph.nodes)
    out[graph.pattern.row, graph.pattern.col] = 1.0
    return out


# ---- the fairness term -----------------------------------------------------------------------------------------------


def test_soft_decision() -> None:
    points = torch.tensor([0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0])
    expected = torch.tensor([0.074219, 0.205739, 0.327589, 0.5, 0.672411, 0.794261, 0.925781])
    assert torch.allclose(model.soft_decision(points), expected, atol=2e-6)
    p = torch.linspace(0, 1, 501, dtype=torch.float64)
    phi = model.soft_decision(p)
    assert torch.allclose(phi + phi.flip(0), torch.ones_like(phi))
    assert (phi.diff() > 0).all()
    series = [0.5, 0.5, 0, -1 / 8, 0, 1 / 16, 0, -5 / 128, 0, 7 / 256]
    assert np.allclose(phi.numpy(), np.polynomial.legendre.legval(2 * p.numpy() - 1, series))
    powers = model.decision_coefficients()
    assert np.allclose(powers, [0.5, 0.957428, 0, -2.615356, 0, 6.033142, 0, -6.546021, 0, 2.596588], atol=1e-6)
    step = model.soft_decision(torch.tensor(0.6), model.decision_coefficients("step"))
    assert step.item() == pytest.approx(1.028, abs=1e-3)  # the least-squares series overshoots
    grid = np.linspace(-1, 1, 20001)
    fit = np.polynomial.legendre.legfit(grid, (grid > 0).astype(float), 9)
    ours = np.polynomial.legendre.poly2leg(model.decision_coefficients("step"))
    assert np.allclose(fit, ours, atol=2e-3)


def test_unfairness() -> None:
    logits = torch.randn(NODES, 2)
    unfair = Unfairness(SENS, FREE)
    p = logits.softmax(1)[:, 1]
    groups = [model.soft_decision(p[FREE[SENS[FREE] == s]]).mean() for s in (0, 1)]
    assert unfair(logits).item() == pytest.approx(2 * float(groups[0] - groups[1]) ** 2, rel=1e-4)
    assert Unfairness(1 - SENS, FREE)(logits).item() == pytest.approx(unfair(logits).item(), rel=1e-5)
    members = FREE[SENS[FREE] == 0]
    shuffled = logits.clone()
    shuffled[members] = logits[members.roll(1)]
    assert unfair(shuffled).item() == pytest.approx(unfair(logits).item(), rel=1e-4)
    same = logits.clone()
    zero, one = FREE[SENS[FREE] == 0], FREE[SENS[FREE] == 1]
    same[one] = logits[zero][: len(one)]
    assert len(zero) == len(one)
    assert unfair(same).item() == pytest.approx(0.0, abs=1e-12)
    opportunity = Unfairness(SENS, FREE, LABELS)
    changed = logits.clone()
    changed[LABELS == 0] += 1.0  # only positives count
    assert torch.equal(opportunity(changed), opportunity(logits))
    assert not torch.equal(opportunity(logits), unfair(logits))


def test_gaps_of_hard_predictions() -> None:
    prediction, labels, sens = (
        torch.tensor(values) for values in ([1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1])
    )
    parity, opportunity = model.fairness_gaps(prediction, labels, sens, torch.arange(6))
    assert parity == pytest.approx(1 / 3)
    assert opportunity == 0.0
    assert model.fairness_gaps(prediction, labels, sens, torch.tensor([0, 2, 3])) == (0.5, 0.5)


def test_undefined_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="group s=1 has no node in the index set"):
        Unfairness(SENS, IDS[SENS == 0])
    with pytest.raises(ValueError, match="group s=0 has no positive node in the index set"):
        Unfairness(SENS, IDS, (LABELS == 1) & (SENS == 1))
    with pytest.raises(ValueError, match="in the test set"):
        model.fairness_gaps(LABELS, LABELS, SENS, IDS[:2])
    with pytest.raises(ValueError, match="expected 'code' or 'step'"):
        model.decision_coefficients("sign")  # type: ignore[arg-type]


# ---- graph and teachers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [True, False])
def test_sparse_products(kernels: bool) -> None:
    pattern = Pattern(torch.tensor([0, 0, 2, 2, 3]), torch.tensor([0, 2, 0, 2, 1]), (4, 3))
    pattern.kernels = pattern.t.kernels = kernels
    values = torch.arange(1.0, 6.0)
    matrix = torch.zeros(4, 3)
    matrix[pattern.row, pattern.col] = values
    for width in (1, 3, 8):
        h, a = torch.randn(3, width, requires_grad=True), torch.randn(4, width, requires_grad=True)
        weight = torch.randn(4, width)
        out = model.edge_sum(pattern, h, values)
        assert torch.allclose(out, matrix @ h, atol=1e-6)
        (to_h,) = torch.autograd.grad((out * weight).sum(), h)
        assert torch.allclose(to_h, matrix.t() @ weight, atol=1e-6)
        dots = model.edge_dot(pattern, a, h)
        expected = (a @ h.t())[pattern.row, pattern.col]
        assert torch.allclose(dots, expected, atol=1e-6)
        ours = torch.autograd.grad((dots * values).sum(), (a, h))
        theirs = torch.autograd.grad((expected * values).sum(), (a, h))
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(ours, theirs, strict=True))
    assert torch.allclose(model.edge_sum(pattern, torch.ones(3, 2)), (matrix > 0).float() @ torch.ones(3, 2))


def test_operators_of_the_graph() -> None:
    graph = small()[0]
    loops = dense(graph)
    assert torch.equal(loops, loops.t())
    degree = loops.sum(1)
    x = torch.randn(NODES, 5, requires_grad=True)
    hat = degree.rsqrt()[:, None] * loops * degree.rsqrt()
    mean = (loops + torch.eye(NODES)) / (degree + 1)[:, None]
    for operator, matrix in ((graph.propagate, hat), (graph.average, mean)):
        assert torch.allclose(operator(x), matrix @ x, atol=1e-6)
        weight = torch.randn(NODES, 5)
        (gradient,) = torch.autograd.grad((operator(x) * weight).sum(), x)
        assert torch.allclose(gradient, matrix.t() @ weight, atol=1e-6)


def test_kept_features_follow_their_tensor() -> None:
    graph, x = small()[0], torch.randn(NODES, 5)
    first = graph.propagate_features(x)
    assert torch.equal(first, graph.propagate(x))
    assert graph.propagate_features(x) is first  # made once for a tensor that stays
    x.mul_(2)
    assert torch.equal(graph.propagate_features(x), graph.propagate(x))
    other = torch.randn(NODES, 5, requires_grad=True)
    assert graph.propagate_features(other).requires_grad


@pytest.mark.parametrize("features", [5, 11])
def test_teachers_are_dense_algebra(features: int) -> None:
    graph = small()[0]
    loops, x = dense(graph), torch.randn(NODES, features)
    degree = loops.sum(1)
    hat = degree.rsqrt()[:, None] * loops * degree.rsqrt()
    mean = (loops + torch.eye(NODES)) / (degree + 1)[:, None]
    for network, matrix in ((GCN(features, 7).eval(), hat), (SAGE(features, 7).eval(), mean)):
        h, hidden = x, []
        for layer in network.layers:
            h = matrix @ (h if layer is network.layers[0] else h.relu()) @ layer.weight.t() + layer.bias
            hidden.append(h)
        logits, embedding = network(x, graph)
        assert torch.allclose(logits, hidden[-1], atol=1e-5)
        first = hidden[0].relu() if isinstance(network, GCN) else hidden[0]
        assert torch.allclose(embedding, first, atol=1e-5)


def test_dropout() -> None:
    mask = model.dropout_mask((700, 501), 0.3, torch.device("cpu"))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)
    x = torch.randn(3, 4)
    assert model.dropout(x, 0.5, False) is x
    assert model.dropout(x, 0.0, True) is x
    h = torch.randn(400, 300, requires_grad=True)
    out = model.rectify(h, 0.4, True)
    kept = out > 0
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(out, torch.where(kept, h / 0.6, 0.0))
    assert not (kept & (h <= 0)).any()
    (slope,) = torch.autograd.grad(out.sum(), h)
    assert torch.allclose(slope, torch.where(kept, 1 / 0.6, 0.0))
    assert torch.equal(model.rectify(h, 0.4, False), h.relu())


# ---- CPF -------------------------------------------------------------------------------------------------------------


def plain_plp(plp: PLP, x: Tensor, graph: Graph) -> Tensor:
    """The student step by step with a softmax over each node's neighbours, without dropout."""
    energy = x @ plp.attention[0]
    scores = torch.where(dense(graph) > 0, energy[None, :], -torch.inf)
    attention = scores.softmax(1)
    own = plp.out(plp.hidden(x).relu())
    h = torch.full((NODES, 2), 0.5)
    labels = torch.nn.functional.one_hot(LABELS, 2).float()
    h[TRAIN] = labels[TRAIN]
    for _ in range(plp.steps):
        h = (plp.mix.sigmoid() * (attention @ h) + (-plp.mix).sigmoid() * own).relu()
        h[TRAIN] = labels[TRAIN]
    return h


def test_propagation() -> None:
    graph, seeds, _ = small()
    plp = PLP(5, NODES, layers=4, hidden=8, feat_drop=0.0, attn_drop=0.0)
    plp.load_state_dict(official_state(plp))
    for mode in (True, False):
        out = plp.train(mode)(X, seeds)
        assert torch.allclose(out, plain_plp(plp, X, graph), atol=1e-6)
        assert torch.equal(out[TRAIN], torch.nn.functional.one_hot(LABELS, 2).float()[TRAIN])
    weight = plp.weight(X)
    total = model.edge_sum(seeds.pattern, weight)
    rows = model.edge_sum(seeds.pattern, torch.ones(NODES, 1), weight[seeds.pattern.col, 0]) / total
    assert torch.allclose(rows, torch.ones(len(FREE), 1))


def test_limits_of_the_mixture() -> None:
    graph, seeds, _ = small()
    plp = PLP(5, NODES, layers=2, hidden=8).eval()
    with torch.no_grad():
        plp.mix.fill_(-40.0)
        assert torch.allclose(plp(X, seeds)[FREE], plp.own(X)[0][FREE].relu(), atol=1e-6)
        plp.mix.fill_(40.0)
        plp.attention.zero_()
        loops = dense(graph)
        assert torch.allclose(plp(X, seeds)[FREE], (loops / loops.sum(1, keepdim=True) @ seeds.start)[FREE], atol=1e-6)


def test_extreme_attention_stays_finite() -> None:
    _, seeds, _ = small()
    plp = PLP(5, NODES, feat_drop=0.0)
    with torch.no_grad():
        plp.attention.fill_(1e4)
    out = plp(X, seeds)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in plp.parameters())


def test_dropout_of_the_student_has_the_mean_of_evaluation() -> None:
    """One step without features' dropout: attention dropout leaves the expected sum unchanged."""
    _, seeds, _ = small()
    plp = PLP(5, NODES, layers=2, hidden=8, feat_drop=0.0, attn_drop=0.4)
    with torch.no_grad():
        plp.mix.fill_(40.0)
        mean = torch.stack([plp(X, seeds) for _ in range(800)]).mean(0)
        assert torch.allclose(mean, plp.eval()(X, seeds), atol=0.05)
        assert not torch.equal(plp.train()(X, seeds), plp(X, seeds))


def largest_storage(function: Any) -> int:
    """Bytes of the largest tensor that a call makes."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    with Watch():
        function()
    return largest


def test_no_tensor_of_edges() -> None:
    """Without attention dropout nothing in a training step of CPF grows with the number of edges."""
    nodes = 400
    graph = Graph(torch.triu_indices(nodes, nodes, 1), nodes)
    index = torch.arange(nodes)
    seeds = Seeds(graph, index[:100], index % 2)
    plp = PLP(4, nodes, layers=4, hidden=8, attn_drop=0.0)
    x = torch.rand(nodes, 4)
    assert largest_storage(lambda: plp(x, seeds).sum().backward()) < len(graph.pattern)


# ---- the official code -----------------------------------------------------------------------------------------------
# Its classes and its loop gave these numbers with the weights of ``official_state``, no dropout, alpha 10: (losses of
# three epochs), then sums over the logits of the neutral input and over the proxy after them.

CPF_LOG = {
    "sp": (
        [(0.783664, 0.0141399, 0.0401954), (0.645362, 0.0073863, 0.0311665), (0.633180, 0.0020336, 0.0223638)],
        11.012415,
        12.831133,
    ),
    "eo": (
        [(0.783664, 0.0497371, 0.0358970), (0.670164, 0.0143641, 0.0088994), (0.643238, 0.0012481, 0.0020261)],
        10.987967,
        12.613563,
    ),
}
AKD_LOG = {
    "sp": (
        1,
        [(5.585059, 6.135677, 2.79942e-5), (5.578486, 6.104095, 2.90221e-5), (5.572127, 6.072971, 3.02184e-5)],
        -23.997166,
        12.329651,
    ),
    "eo": (
        2,
        [(5.585064, 6.132056, 8.20894e-5), (5.578604, 6.102537, 8.74226e-5), (5.572340, 6.073129, 9.24477e-5)],
        -24.000690,
        12.544621,
    ),
}


def adam(module: torch.nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=lr, weight_decay=decay)


@pytest.mark.parametrize("metric", ["sp", "eo"])
def test_cpf_follows_the_official_code(metric: str) -> None:
    _, seeds, proxy = small()
    plp = PLP(7, NODES, layers=4, hidden=8, feat_drop=0.0, attn_drop=0.0)
    plp.load_state_dict(official_state(plp))
    unfair = Unfairness(SENS, FREE, LABELS if metric == "eo" else None)
    optimizer, proxy_optimizer = adam(plp, 0.01, 0.01), adam(proxy, 0.01, 0.01)
    log = []
    for _ in range(3):
        logits = plp(proxy.neutral(X), seeds)
        distance, gap = model.cpf_loss(logits, TEACHER.softmax(1), FREE), unfair(logits)
        optimizer.zero_grad()
        (distance + 10 * gap).backward()
        before = proxy.values.detach().clone()
        assert proxy.values.grad is None or not proxy.values.grad.any()
        optimizer.step()
        assert torch.equal(before, proxy.values)  # the student step leaves the proxy as it is
        weights = [p.detach().clone() for p in plp.parameters()]
        with model.frozen(plp):
            biased = unfair(plp(proxy.biased(X), seeds))
            proxy_optimizer.zero_grad()
            (-10 * biased).backward()
        proxy_optimizer.step()
        proxy_optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(weights, plp.parameters(), strict=True))
        log.append((distance.item(), gap.item(), biased.item()))
    expected, logits_sum, proxy_sum = CPF_LOG[metric]
    assert np.allclose(log, expected, rtol=2e-4, atol=1e-6)
    assert plp(proxy.neutral(X), seeds).sum().item() == pytest.approx(logits_sum, abs=1e-4)
    assert proxy.values.sum().item() == pytest.approx(proxy_sum, abs=1e-4)


@pytest.mark.parametrize("metric", ["sp", "eo"])
def test_graphakd_follows_the_official_code(metric: str) -> None:
    graph, _, proxy = small()
    hops, expected, logits_sum, proxy_sum = AKD_LOG[metric]
    sgc, critics = SGC(7, 4, hops=hops, dropout=0.0), Critics(4)
    for module in (sgc, critics):
        module.load_state_dict(official_state(module))
    positive = LABELS if metric == "eo" else None
    unfair, everywhere = Unfairness(SENS, TRAIN, positive), Unfairness(SENS, IDS, positive)
    known = (TEACHER.log_softmax(1), EMBEDDING)
    optimizer, proxy_optimizer, critic_optimizer = (
        adam(sgc, 1e-3, 5e-4),
        adam(proxy, 0.01, 5e-4),
        adam(critics, 0.01, 5e-4),
    )
    log = []
    for _ in range(3):
        student = sgc(proxy.neutral(X), graph)
        loss = critics.loss(known, student, graph, LABELS, TRAIN)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        with model.frozen(critics):
            fooling = critics.student_loss(known, student, graph, LABELS, TRAIN)
        optimizer.zero_grad()
        (fooling + 10 * unfair(student[0])).backward()
        optimizer.step()
        with model.frozen(sgc):
            biased = everywhere(sgc(proxy.biased(X), graph)[0])
            proxy_optimizer.zero_grad()
            (-10 * biased).backward()
        proxy_optimizer.step()
        log.append((loss.item(), fooling.item(), biased.item()))
    assert np.allclose(log, expected, rtol=1e-4)
    assert sgc(proxy.neutral(X), graph)[0].sum().item() == pytest.approx(logits_sum, abs=1e-3)
    assert proxy.values.sum().item() == pytest.approx(proxy_sum, abs=1e-4)
    assert critics.edge.weight.sum().item() == pytest.approx(1.764931, abs=2e-5)
    assert critics.glob.scale.item() == pytest.approx(-0.250382, abs=1e-5)


def test_the_proxy_step_raises_unfairness() -> None:
    graph, _, proxy = small()
    sgc = SGC(7, 6).eval()
    unfair = Unfairness(SENS, IDS)
    before = unfair(sgc(proxy.biased(X), graph)[0])
    (slope,) = torch.autograd.grad(before, proxy.values)
    direction = slope / slope.norm()
    with torch.no_grad():
        proxy.values += 1e-3 * direction
    after = unfair(sgc(proxy.biased(X), graph)[0])
    assert after > before
    assert (after - before).item() / 1e-3 == pytest.approx(slope.norm().item(), rel=0.05)


def test_proxies() -> None:
    fixed = Proxy(NODES, SENS)
    assert torch.equal(fixed.biased(X)[:, 5:], torch.stack([SENS, 1 - SENS], 1).float())
    assert not list(fixed.parameters())
    learned = Proxy(NODES)
    assert learned.values.min() >= 0 and learned.values.max() < 1
    neutral = learned.neutral(X)
    assert not neutral.requires_grad
    assert torch.equal(neutral[:, :5], X)
    assert torch.allclose(neutral[:, 5:], learned.values.mean(0).expand(NODES, 2))


# ---- sizes -----------------------------------------------------------------------------------------------------------


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_on_recidivism(train: ModuleType) -> None:
    config = train.PRESETS["recidivism"].config
    with torch.device("meta"):
        assert count(train.build_teacher(config, "CPF", "GCN", 18)[0]) == 5506
        assert count(train.build_teacher(config, "CPF", "GraphSAGE", 18)[0]) == 35714
        plp = train.build_plp(config, "GCN", 18, 18876)
        assert count(plp.hidden) + count(plp.out) == 1346
        assert (plp.attention.numel(), plp.mix.numel()) == (18, 18876)
        assert count(train.build_sgc(config, 20)) == 5634
        critics = Critics(config.akd_hidden)
    assert [count(part) for part in (critics.logit, critics.edge, critics.glob)] == [12, 65, 65]


@pytest.mark.parametrize("preset", METAS)
def test_presets_have_the_paper_s_sizes(train: ModuleType, preset: str) -> None:
    config = train.PRESETS[preset].config
    expected = data.EXPECTED[config.dataset]
    nodes, features = expected["nodes"], expected.get("features", 1000)
    with torch.device("meta"):
        for teacher in train.TEACHERS:
            layers, rate = train.cpf_setting(config, teacher)
            assert layers == (5 if config.dataset == "dblp-l" else 10)
            assert rate == (0.001 if config.dataset.startswith("dblp") and teacher == "GCN" else 0.01)
            plp = train.build_plp(config, teacher, features + 2, nodes)
            assert count(plp) == 65 * (features + 2) + 64 + 130 + nodes
            critic_width = train.build_teacher(config, "GraphAKD", teacher, features)[0].layers[0].out_features
            assert critic_width == 64
    assert (config.teacher_epochs, config.teacher_patience) == (1000, 500)
    assert (config.cpf_epochs, config.akd_epochs, config.alpha_cpf, config.alpha_akd) == (1000, 600, 1e3, 10.0)
    combinations = [arm for f in config.framework for t in config.teacher for arm in train.arms(config, f, t)]
    assert len([arm for arm in combinations if arm.proxy == "learned"]) == 8


# ---- data ------------------------------------------------------------------------------------------------------------


def test_similar_pairs() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 6, size=(60, 3)).astype(float)
    distance = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    similarity = 1 / (1 + distance)
    wanted = set()
    for i in range(60):  # the official construction, node by node
        largest = np.sort(similarity[i])[-2]
        wanted |= {(min(i, j), max(i, j)) for j in np.where(similarity[i] > 0.6 * largest)[0] if j != i}
    for block in (7, 60, 1000):
        assert set(map(tuple, data.similar_pairs(x, 0.6, block).T.tolist())) == wanted


def test_generator() -> None:
    made = data.generate(torch.Generator().manual_seed(1), 1500)
    again = data.generate(torch.Generator().manual_seed(1), 1500)
    assert torch.equal(made.pairs, again.pairs) and torch.equal(made.features, again.features)
    low, high = made.pairs
    assert (low < high).all()
    assert len(low) * 2 / 1500 == pytest.approx(14.4, rel=0.1)
    within = (made.sens[low] == made.sens[high]).float().mean()
    assert within.item() == pytest.approx(5 / 6, abs=0.03)
    rates = [made.labels[made.sens == s].float().mean().item() for s in (0, 1)]
    assert rates == pytest.approx([0.45, 0.6], abs=0.06)
    assert len(made.train) + len(made.val) + len(made.test) == 1500
    with pytest.raises(ValueError, match="expected at least 50"):
        data.generate(torch.Generator(), 10)


def test_renumbering_changes_nothing_but_numbers() -> None:
    made = data.generate(torch.Generator().manual_seed(1), 200)
    moved = made.banded()
    order = {tuple(row): i for i, row in enumerate(made.features.tolist())}
    back = torch.tensor([order[tuple(row)] for row in moved.features.tolist()])
    assert torch.equal(made.labels[back], moved.labels) and torch.equal(made.sens[back], moved.sens)
    assert set(map(tuple, back[moved.pairs].sort(0).values.t().tolist())) == set(map(tuple, made.pairs.t().tolist()))
    for part in data.PARTS:
        assert set(back[getattr(moved, part)].tolist()) == set(getattr(made, part).tolist())


def write_bail(root: Path, rows: int = 60, **changes: Any) -> Path:
    """A small bail/ in the official layout: csv, edges as two floats a line, splits."""
    generator = np.random.default_rng(0)
    folder = root / "bail"
    (folder / "split").mkdir(parents=True, exist_ok=True)
    names = ["WHITE", "RECID", "AGE", "PRIORS", "TIME", "FILE"]
    table = generator.integers(0, 9, size=(rows, 6))
    table[:, 0], table[:, 1] = np.arange(rows) % 2, np.arange(rows) // 2 % 2
    for name, values in changes.items():
        if name in names:
            table[:, names.index(name)] = values
    names = [name for name in names if name != changes.get("without")]
    text = ",".join(names) + "\n" + "\n".join(",".join(map(str, row[: len(names)])) for row in table) + "\n"
    (folder / "bail.csv").write_text(text)
    edges = changes.get("edges", generator.integers(0, rows, size=(200, 2)))
    np.savetxt(folder / "bail_edges.txt", edges)
    order = changes.get("order", generator.permutation(rows))
    for part, index in zip(data.PARTS, np.split(order, [rows // 3, rows // 2]), strict=True):
        np.save(folder / "split" / f"{part}_split.npy", index)
    return root


def test_official_layout_of_bail(tmp_path: Path) -> None:
    edges = np.array([[0, 1], [1, 0], [2, 2], [3, 59], [0, 1]])
    made = data.load(write_bail(tmp_path, edges=edges), "bail")
    assert made.name == "recidivism"
    assert made.pairs.tolist() == [[0, 3], [1, 59]]
    assert made.features.shape == (60, 5)
    assert torch.allclose(made.features.sum(1), torch.ones(60))
    assert made.labels[:4].tolist() == [0, 0, 1, 1] and made.sens[:4].tolist() == [0, 1, 0, 1]
    assert [len(part) for part in (made.train, made.val, made.test)] == [20, 10, 30]
    assert set(made.origin) == {"bail.csv", "bail_edges.txt", "train_split.npy", "val_split.npy", "test_split.npy"}
    for path in (tmp_path / "bail" / "split").iterdir():
        path.unlink()
    (tmp_path / "bail" / "bail_edges.txt").unlink()
    built = data.load(tmp_path / "bail", "recidivism")  # the folder itself; graph and split are made
    assert built.pairs.shape[1] > 60
    assert [len(part) for part in (built.train, built.val, built.test)] == [18, 12, 30]


def test_official_layout_of_dblp(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    ids = np.arange(40)
    np.savez(folder / "X.npz", data=np.ones(40), row=ids, col=ids % 7, shape=np.array([40, 7]))
    np.savetxt(folder / "labels.txt", np.stack([ids, ids % 4], 1))
    np.savetxt(folder / "sens.txt", np.stack([ids, ids % 3], 1))
    np.savetxt(folder / "edgelist.txt", np.stack([ids, (ids + 1) % 40], 1), fmt="%d")
    made = data.load(tmp_path, "dblp")
    assert made.features.shape == (40, 7) and made.features.sum() == 40
    assert torch.equal(made.labels, (torch.arange(40) % 4 == 3).long())
    assert torch.equal(made.sens, (torch.arange(40) % 3 == 2).long())
    assert made.pairs.shape == (2, 40)
    assert [len(part) for part in (made.train, made.val, made.test)] == [20, 9, 11]
    (folder / "edgelist.txt").write_text("0 1\n3 40\n")
    with pytest.raises(UserError, match=r"edgelist.txt line 2: edge \(3, 40\), expected node ids 0..39"):
        data.load(tmp_path, "dblp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "FILE", "RECID": 2}, "the label takes the values \\[2\\], expected 0 and 1"),
        ({"WHITE": 1}, "the sensitive attribute takes the values \\[1\\]"),
        ({"edges": [[0, 1], [2, 60]]}, r"bail_edges.txt line 2: edge \(2, 60\), expected node ids 0\.\.59"),
        ({"edges": [[0, 1], [2, 3.5]]}, "3.5 stands where whole numbers are expected"),
        ({"order": np.append(np.arange(59), 60)}, "the test split names node 60, expected 0..59"),
        ({"order": np.append(np.arange(59), 0)}, "the split files name 59 of 60 nodes"),
        ({"order": np.append(np.arange(60), 0)}, "node 0 is in the test split and once more"),
    ],
)
def test_malformed_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.load(write_bail(tmp_path, **changes), "bail")


def test_missing_columns_and_files(tmp_path: Path) -> None:
    path = write_bail(tmp_path) / "bail" / "bail.csv"
    path.write_text(path.read_text().replace("WHITE", "BLACK"))
    with pytest.raises(UserError, match="no column WHITE, only BLACK, RECID"):
        data.load(tmp_path, "bail")
    path.write_text("WHITE,RECID\n0,one\n")
    with pytest.raises(UserError, match=r"bail\.csv: .*one.*expected lines of numbers"):
        data.load(tmp_path, "bail")
    (tmp_path / "bail" / "split" / "val_split.npy").unlink()
    write_bail(tmp_path)
    (tmp_path / "bail" / "split" / "val_split.npy").unlink()
    with pytest.raises(UserError, match=r"no file val_split\.npy"):
        data.load(tmp_path, "bail")
    with pytest.raises(UserError, match=r"no file X\.npz"):
        data.load(tmp_path, "dblp")
    with pytest.raises(UserError, match="unknown data set 'pokec'"):
        data.load(tmp_path, "pokec")
    with pytest.raises(UserError, match="needs --data DIR"):
        data.load(None, "credit")


@pytest.fixture(scope="module")
def fair_graphs(data_root: Path) -> Path:
    folder = data_root / "fair-graphs-bail-credit"
    if not folder.is_dir():
        pytest.skip("fair-graphs-bail-credit is absent")
    return folder


def test_real_files(fair_graphs: Path) -> None:
    bail = data.load(fair_graphs, "recidivism")
    assert bail.counts() == data.EXPECTED["recidivism"]
    assert len(Graph(bail.pairs, 18876).pattern) == 642616
    rates = [bail.labels[bail.sens == s].float().mean().item() for s in (0, 1)]
    assert rates == pytest.approx([0.414, 0.339], abs=5e-4)
    made = data.class_split(bail.labels.numpy(), 0.3, 0.5)  # the official split is this rule's
    for part in data.PARTS:
        assert np.array_equal(np.sort(made[part]), np.sort(getattr(bail, part).numpy()))
    credit = data.load(fair_graphs, "credit")
    counts = credit.counts()
    assert {key: counts[key] for key in ("nodes", "features", "edges")} == {
        "nodes": 30000,
        "features": 13,
        "edges": 304754,
    }
    assert [len(part) for part in (credit.train, credit.val, credit.test)] == [1000, 7500, 7500]
    assert credit.features.unique().tolist() == [0.0, 1.0]


def test_the_real_graph_is_rebuilt(fair_graphs: Path) -> None:
    """From the features of Recidivism, pair for pair, in blocks that stay far below the whole matrix (2.8 GB)."""
    path = fair_graphs / "bail" / "bail.csv"
    header = path.read_text().partition("\n")[0].split(",")
    raw = np.delete(np.loadtxt(path, delimiter=",", skiprows=1), header.index("RECID"), axis=1)
    tracemalloc.start()
    pairs = data.similar_pairs(raw, 0.6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(torch.from_numpy(pairs), data.load(fair_graphs, "bail").pairs)
    assert peak < 2**29


def test_check_data(run_paper: Any, fair_graphs: Path, tmp_path: Path) -> None:
    result = run_paper("reliant", ["--data", str(fair_graphs), "--check-data"])
    assert result.code == 0
    assert "recidivism: bail/bail.csv" in result.out
    assert "dblp: MISSING" in result.out
    assert "expected 2873716" in result.out  # the authors' credit graph is denser
    result = run_paper("reliant", ["--preset", "dblp", "--data", str(fair_graphs), "--check-data"])
    assert (result.code, len(result.errors)) == (2, 1)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GCN(0), "features is 0"),
        (lambda: SAGE(5, hidden=0), "hidden is 0"),
        (lambda: GCN(5, dropout=1.0), r"dropout is 1\.0"),
        (lambda: PLP(5, 10, layers=1), "L layers are L - 1 steps"),
        (lambda: PLP(5, 10, attn_drop=-0.1), "dropout is -0.1"),
        (lambda: SGC(5, hops=0), "hops is 0"),
        (lambda: Critics(0), "hidden is 0"),
        (lambda: Graph(torch.tensor([[0], [9]]), 3), "names node 9"),
        (lambda: Graph(torch.tensor([[1], [1]]), 3), "joins a node to itself"),
        (lambda: Graph(torch.tensor([[0, 1], [1, 0]]), 3), "stands more than once"),
        (lambda: Graph(torch.zeros(3, 2), 3), r"expected \(2, M\) integers"),
        (lambda: Seeds(Graph(PAIRS, NODES), IDS, LABELS), "expected some and not all"),
    ],
)
def test_the_model_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "recidivism"], "needs --data"),
        (["--dataset", "pokec"], "--dataset is pokec"),
        (["--framework", "cpf"], "expected different ones among CPF, GraphAKD"),
        (["--teacher", "GAT"], "expected different ones among GCN, GraphSAGE"),
        (["--metric", "dp"], "expected different ones among sp, eo"),
        (["--arms", "vanilla", "vanilla"], "--arms vanilla vanilla"),
        (["--alpha-cpf", "-1"], "expected at least 0"),
        (["--alphas", "-1"], "expected at least 0"),
        (["--framework", "GraphAKD"], "add CPF to --framework"),
        (["--series", "sign"], "--series"),
        (["--eo-labels", "true"], "--eo-labels"),
        (["--cpf-feat-drop", "1"], "--cpf-feat-drop is 1.0"),
        (["--sage-dropout", "-0.5"], "--sage-dropout is -0.5"),
        (["--teacher-lr", "0"], "--teacher-lr is 0.0"),
        (["--akd-weight-decay", "-1"], "--akd-weight-decay is -1.0"),
        (["--cpf-epochs", "0"], "--cpf-epochs is 0"),
        (["--d-critic", "0"], "--d-critic is 0"),
        (["--cpf-layers", "1"], "--cpf-layers is 1"),
        (["--nodes", "10"], "--nodes is 10"),
        (["--gcn-hidden", "32"], "GraphAKD compares embeddings"),
    ],
)
def test_the_command_refuses(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


def test_an_empty_folder_is_named(refuses: Any, tmp_path: Path) -> None:
    for argv in (["--check-data"], ["--preset", "credit"]):
        refuses(["--data", str(tmp_path), *argv], str(tmp_path))


# ---- training --------------------------------------------------------------------------------------------------------

TINY = ["--nodes", "120", "--teacher-epochs", "3", "--cpf-epochs", "3", "--akd-epochs", "3", "--seed", "0"]


def metrics_of(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "result.json").read_text())["metrics"]


@pytest.mark.parametrize("stop", [5, 11])
def test_stop_and_resume(run_paper: Any, tmp_path: Path, stop: int) -> None:
    """Stopped in a student of CPF and in one of GraphAKD."""
    argv = ["--preset", "smoke", "--teacher", "GCN", "--arms", "reliant", "--metric", "sp", "--d-critic", "2", *TINY]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_paper("reliant", [*argv, "--out", str(whole)]).code == 0
    assert run_paper("reliant", [*argv, "--stop-after", str(stop), "--out", str(parts)]).code == 0
    assert not (parts / "result.json").exists()
    assert run_paper("reliant", ["--resume", str(parts)]).code == 0
    assert metrics_of(whole) == metrics_of(parts)


def test_alpha_zero_without_proxy_is_vanilla(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and parameters for the same seed: the fairness term is all that the ablation adds."""
    from shared import run

    monkeypatch.setattr(run, "derive_seed", lambda *purpose: 7)
    argv = [
        "--arms",
        "vanilla",
        "no_proxy",
        "--alphas",
        "--alpha-cpf",
        "0",
        "--alpha-akd",
        "0",
        "--teacher",
        "GCN",
        *TINY,
    ]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    metrics = metrics_of(tmp_path / "run")
    for framework in train.FRAMEWORKS:
        for key in ("test_accuracy", "delta_sp", "soft_sp", "soft_eo"):
            name = f"generated/{framework}/GCN"
            assert metrics[f"{name}/vanilla/{key}"] == metrics[f"{name}/no_proxy_sp/{key}"]
    assert train.main([*argv, "--alpha-cpf", "1e6", "--alpha-akd", "1e6", "--out", str(tmp_path / "fair")]) == 0
    metrics = metrics_of(tmp_path / "fair")
    for framework in train.FRAMEWORKS:
        name = f"generated/{framework}/GCN"
        assert metrics[f"{name}/vanilla/soft_sp"] != metrics[f"{name}/no_proxy_sp/soft_sp"]


def test_true_labels_of_the_test_nodes_stay_unseen(train: ModuleType) -> None:
    """By default the term for equal opportunity does not read labels outside of the training nodes."""
    made = data.generate(torch.Generator().manual_seed(0), 200)
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
    hidden = made.labels.clone()
    hidden[made.test] = 1 - hidden[made.test]
    guess = torch.nn.functional.one_hot(torch.randint(2, (200,)), 2).float()
    arm = train.Arm("reliant_eo", "eo", "learned", 1.0)
    terms = {}
    for labels in ("clean", "code"):
        config = train.Config(eo_labels=labels)
        for i, known in enumerate((made.labels, hidden)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(data.FairData, "banded", lambda self: self)
                problem = train.Problem(data.FairData(**(fields | {"labels": known})), torch.device("cpu"))
            (term,) = train.fairness_terms(config, problem, arm, [problem.everyone], guess)
            terms[labels, i] = term.weights
    assert torch.equal(terms["clean", 0], terms["clean", 1])
    assert not torch.equal(terms["code", 0], terms["code", 1])


def test_the_official_switches_run_on_written_files(train: ModuleType, tmp_path: Path) -> None:
    root, out = write_bail(tmp_path / "data", rows=90), tmp_path / "run"
    short = ["--teacher-epochs", "3", "--cpf-epochs", "3", "--akd-epochs", "3"]
    assert train.main(["--preset", "recidivism-code", "--data", str(root), *short, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    rows = {row["metric"]: row["comparable"] for row in result["reported"]}
    for framework in train.FRAMEWORKS:
        for teacher in train.TEACHERS:
            for arm in ("teacher", "reliant_sp", "reliant_eo"):
                assert rows[f"recidivism/{framework}/{teacher}/{arm}/delta_eo"]
    assert {row["kind"] for row in result["data"]} == {"real"}
    assert all(math.isfinite(value["mean"]) for value in result["metrics"].values())


ONE = ["--framework", "CPF", "--teacher", "GCN", "--seed", "0", "--nodes", "500"]


def test_a_broken_method_fails_the_claims(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(name: str) -> dict[str, bool]:
        argv = [*ONE, "--arms", "vanilla", "reliant", "--cpf-epochs", "100", "--out", str(tmp_path / name)]
        assert train.main(argv) == 0
        claims = json.loads((tmp_path / name / "result.json").read_text())["claims"]
        return {claim["name"]: claim["holds"] for claim in claims}

    good = verdicts("good")
    assert good["halves_the_parity_gap"] and good["alpha_lowers_unfairness"] and good["lowers_the_opportunity_gap"]
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    terms = train.fairness_terms

    def of_wrong_groups(config: Any, problem: Any, *rest: Any) -> Any:
        """Groups that have nothing to do with the sensitive attribute."""
        wrong = copy.copy(problem)
        wrong.sens = problem.sens[shuffled]
        return terms(config, wrong, *rest)

    monkeypatch.setattr(train, "fairness_terms", of_wrong_groups)
    broken = verdicts("broken")
    assert not broken["halves_the_parity_gap"]
    assert not broken["alpha_lowers_unfairness"] and not broken["lowers_the_opportunity_gap"]
