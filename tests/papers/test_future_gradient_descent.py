"""Future gradient descent: oracles of gradients, generator, theory and baselines, streams, errors, resume, claims."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papers.future_gradient_descent import data, model
from shared import ctr
from shared.errors import UserError
from shared.paper import read_paper
from shared.seeds import derive_seed

SLUG = "future_gradient_descent"
LEVELS = (5, 4, 6)
SIZES = {"lr": 1 + 15, "fm": 1 + 15 * 4, "deepfm": 1 + 15 * 4 + 9 * 7 + 7 + 7 + 1}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str = "fm", count: int = 1, seed: int = 0) -> model.Parameters:
    """Models with values in every parameter."""
    shapes = model.recommender_shapes(name, LEVELS, 3, (7,))
    flat = torch.randn(count, sum(math.prod(s) for s in shapes.values()), generator=gen(seed), dtype=torch.float64)
    return model.unflatten(0.5 * flat, shapes)


def examples(*shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """ids (*shape, 3) of the fused tables and labels (*shape)."""
    g = gen(seed)
    first = torch.tensor([0, 5, 9])
    ids = torch.stack([torch.randint(0, n, shape, generator=g) for n in LEVELS], -1) + first
    return ids, (torch.rand(shape, generator=g) < 0.4).double()


# ---- recommenders and their gradients --------------------------------------------------------------------------------


def test_fm_is_the_double_loop_over_pairs() -> None:
    p, (ids, _) = make(), examples(1, 6)
    v = p["embedding"][0][ids[0]]
    pairs = sum((v[:, i] * v[:, j]).sum(1) for i in range(3) for j in range(i))
    torch.testing.assert_close(model.logits(p, ids)[0], p["bias"] + p["linear"][0][ids[0]].sum(1) + pairs)
    plain = {name: p[name] for name in ("bias", "linear")}
    torch.testing.assert_close(model.logits(plain, ids)[0], p["bias"] + p["linear"][0][ids[0]].sum(1))


def test_deepfm_without_values_in_its_layers_is_fm() -> None:
    p, (ids, _) = make("deepfm"), examples(1, 6)
    fm = {name: p[name] for name in ("bias", "linear", "embedding")}
    assert (model.logits(p, ids) - model.logits(fm, ids)).abs().max() > 0.01
    for name in p:
        if name not in fm:
            p[name] = torch.zeros_like(p[name])
    torch.testing.assert_close(model.logits(p, ids), model.logits(fm, ids))


def test_peer_on_equal_weights() -> None:
    """FM and the perceptron of deepctr-torch."""
    layers = pytest.importorskip("deepctr_torch.layers")
    p, (ids, _) = make("deepfm"), examples(1, 6)
    v = p["embedding"][0][ids[0]]
    dnn = layers.DNN(9, (7,), activation="relu").double()
    with torch.no_grad():
        dnn.linears[0].weight.copy_(p["weight0"][0].t())
        dnn.linears[0].bias.copy_(p["shift0"][0, 0])
        deep = dnn(v.flatten(1)) @ p["weight1"][0] + p["shift1"][0]
    expected = p["bias"] + p["linear"][0][ids[0]].sum(1) + layers.FM()(v)[:, 0] + deep[:, 0]
    torch.testing.assert_close(model.logits(p, ids)[0], expected)


def test_flatten_and_its_inverse() -> None:
    for name, size in SIZES.items():
        p = make(name, 2)
        flat = model.flatten(p)
        assert flat.shape == (2, size)
        back = model.unflatten(flat, model.recommender_shapes(name, LEVELS, 3, (7,)))
        assert all(torch.equal(p[key], back[key]) for key in p)


@pytest.mark.parametrize("name", model.MODELS)
def test_gradients_of_many_models_on_many_domains(name: str) -> None:
    """One backward pass gives what autograd gives for each model and domain; nothing is left in ``grad``."""
    p, (ids, labels) = make(name, 2), examples(3, 10)
    leaf = {key: value.clone().requires_grad_() for key, value in p.items()}
    got = model.domain_gradients(leaf, ids % 15, labels)
    rows = ids.unique()
    for m in range(2):
        for d in range(3):
            one = {key: value[m : m + 1].clone().requires_grad_() for key, value in p.items()}
            loss = nn.functional.binary_cross_entropy_with_logits(model.logits(one, ids[d : d + 1])[0], labels[d])
            found = dict(zip(one, torch.autograd.grad(loss, list(one.values())), strict=True))
            parts = [g[0][rows] if key in model.TABLES else g[0] for key, g in found.items()]
            torch.testing.assert_close(got[m, d], torch.cat([part.flatten() for part in parts]))
    assert all(value.grad is None for value in leaf.values())
    stacked = model.gradients(model.repeat(p, 3), ids.repeat(2, 1, 1), labels.repeat(2, 1)).view(2, 3, -1)
    torch.testing.assert_close(stacked.norm(dim=2), got.norm(dim=2))


def test_only_touched_rows_have_gradients() -> None:
    p, (ids, labels) = make("fm", 1), examples(2, 3)
    ids = ids.clamp(max=10)
    small, local = model.touched(p, ids)
    assert small["linear"].shape[1] == len(ids.unique()) < 15
    torch.testing.assert_close(model.logits(small, local[:1]), model.logits(p, ids[:1]))
    assert model.domain_gradients(p, ids, labels).shape[2] == 1 + len(ids.unique()) * 4


def test_weighted_loss_has_the_combined_gradient() -> None:
    p, (ids, labels) = make(), examples(3, 10)
    a = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    leaf = {key: value.clone().requires_grad_() for key, value in p.items()}
    model.weighted_loss(leaf, ids, labels, a).backward()
    each = model.gradients(model.repeat(p, 3), ids, labels)
    combined = torch.cat([leaf[key].grad.flatten() for key in leaf])
    torch.testing.assert_close(combined, a.detach() @ each, rtol=1e-6, atol=1e-9)
    assert a.grad is None  # the weights are constants of the model's update


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="unknown model 'ffm', expected one of lr, fm, deepfm"):
        model.recommender_shapes("ffm", LEVELS, 3, ())
    for args in (((), 3, ()), (LEVELS, 0, ()), (LEVELS, 3, (0,))):
        with pytest.raises(ValueError, match="at least"):
            model.recommender_shapes("deepfm", *args)


# ---- the generator ---------------------------------------------------------------------------------------------------


def test_generator_by_hand() -> None:
    torch.manual_seed(0)
    net = model.MFGG(LEVELS, 3, size=2, width=4, hidden=5).double()
    ids, _ = examples(3, 8)
    e = torch.stack([net.embedding.weight[ids[j]].mean(0).flatten() for j in range(3)])
    w = net.attention.weight
    q, k, v = e @ w[:4].t(), e @ w[4:8].t(), e @ w[8:].t()
    z = torch.softmax(q @ k.t() / 2, 1) @ v
    a = net(ids)
    torch.testing.assert_close(a, torch.softmax(net.mlp(z.flatten()), 0))
    assert a.sum().item() == pytest.approx(1) and (a > 0).all()
    batched = net(torch.stack([ids, ids.flip(0)]))
    torch.testing.assert_close(batched[0], a)
    assert not torch.allclose(batched[1], a)  # the order of the domains matters
    torch.testing.assert_close(net(ids[:, torch.randperm(8)]), a)  # that of the examples does not
    free = model.MFGG(LEVELS, 3, size=2, width=4, hidden=5, softmax=False).double()
    free.load_state_dict(net.state_dict())
    torch.testing.assert_close(free(ids).softmax(0), a)


def test_summary_gives_the_same_weights_and_gradients() -> None:
    torch.manual_seed(0)
    net, (ids, _) = model.MFGG(LEVELS, 3).double(), examples(3, 40)
    summary = model.summarise(ids, 15)
    assert len(summary[0]) <= 3 * 15 and summary[2].sum().item() == pytest.approx(9)
    a, b = net(ids), net(None, (summary[0], summary[1], summary[2].double()))
    torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(x.square().sum(), list(net.parameters())) for x in (a, b)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="at least 1"):
        model.MFGG(LEVELS, 0)


def test_gram_form_is_the_squared_distance() -> None:
    g = gen()
    past, future = torch.randn(4, 3, 50, generator=g), torch.randn(4, 50, generator=g)
    a = torch.tensor([0.1, 0.6, 0.3])
    direct = (torch.einsum("i,mip->mp", a, past) - future).square().sum(1)
    torch.testing.assert_close(model.forecast_error(a, *model.gram(past, future, False)), direct, rtol=1e-5, atol=1e-5)
    scaled = model.forecast_error(a, *model.gram(past, future))
    torch.testing.assert_close(scaled, direct / future.square().sum(1), rtol=1e-5, atol=1e-5)
    k, c, square = model.gram(past, future)
    means = model.forecast_error(a, k.mean(0), c.mean(0), square.mean(0))
    torch.testing.assert_close(means, scaled.mean())


def test_smoothing() -> None:
    a = torch.tensor([0.5, 0.3, 0.2])
    assert torch.equal(model.smooth(a, 1), a)
    torch.testing.assert_close(model.smooth(a, 2), torch.tensor([0.25, 0.15, 0.6]))
    oldest = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(model.smooth(oldest, 3), torch.full((3,), 1 / 3))  # Batch Update
    assert model.smooth(a, 4).sum().item() == pytest.approx(1.0)
    for window in (0, 5):
        with pytest.raises(ValueError, match="from 1 to b \\+ 1 = 4"):
            model.smooth(a, window)


# ---- theory ----------------------------------------------------------------------------------------------------------


def test_exponentiated_gradient_by_hand() -> None:
    a, slope = torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0])
    got = model.exponentiated_gradient(a, slope, 0.5)
    torch.testing.assert_close(got, torch.tensor([0.268941, 0.731059]), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.exponentiated_gradient(a, slope + 7, 0.5), got)
    for _ in range(50):
        got = model.exponentiated_gradient(got, slope, 5.0)
        assert got.sum().item() == pytest.approx(1) and (got >= 0).all()
    assert model.linear_rate(3, 27, 4.0, 2.0) == pytest.approx(2 * math.sqrt(math.log(3) / 27) / 4)


def test_slope_of_the_linear_generator() -> None:
    g = gen()
    past, future = torch.randn(3, 9, generator=g).double(), torch.randn(9, generator=g).double()
    a = torch.tensor([0.2, 0.5, 0.3]).double()
    k, c, square = (value[0] for value in model.gram(past[None], future[None], False))
    difference = future - past
    torch.testing.assert_close(model.linear_slope(a, k, c, square), 2 * difference @ (a @ difference))


def test_exact_season_is_found() -> None:
    """D_t = D_{t-3}: the error of the oldest alone is zero and the linear generator goes there; an index that is one
    off would find another."""
    days = [examples(60, seed=s) for s in range(3)]
    a, p, errors = torch.full((3,), 1 / 3).double(), make(), []
    for t in range(3, 60):
        ids, labels = (torch.stack(part) for part in zip(*(days[s % 3] for s in range(t - 3, t + 1)), strict=True))
        grads = model.domain_gradients(p, ids, labels)
        k, c, square = (value[0] for value in model.gram(grads[:, :3], grads[:, 3]))
        oldest = torch.tensor([1.0, 0, 0]).double()
        assert abs(model.forecast_error(oldest, k, c, square).item()) < 1e-9
        errors.append(model.forecast_error(a, k, c, square).item())
        a = model.exponentiated_gradient(a, model.linear_slope(a, k, c, square), 0.5)
    assert a[0] > 0.95 and errors[-1] < 0.05 * errors[0]


def test_descent_ends_where_the_forecast_gradient_is_small() -> None:
    p, (ids, labels) = make("lr"), examples(3, 40)
    weights = torch.tensor([0.0, 0.3, 0.7]).double()
    found, norm, steps = model.descend(p, ids, labels, weights, 1.0, 0.01, 2000)
    each = model.gradients(model.repeat(found, 3), ids, labels)
    assert norm <= 0.01 and 1 < steps < 2000
    assert (weights @ each).norm().item() == pytest.approx(norm, rel=1e-6)
    _, far, few = model.descend(p, ids, labels, weights, 1.0, 0.01, 3)
    assert few == 3 and far > 0.01


# ---- ASMG and SPMF ---------------------------------------------------------------------------------------------------


def test_meta_generator_on_one_scalar_is_a_gru() -> None:
    torch.manual_seed(0)
    net = model.MetaGenerator(model.recommender_shapes("lr", (1,), 1, ()), hidden=4)
    cell = nn.GRUCell(1, 1)
    one = model.MetaGenerator(model.recommender_shapes("lr", (1,), 1, ()), hidden=1)
    w_in, w_h = one.dense_input.detach().flatten(), one.dense_recurrent.detach().flatten()
    with torch.no_grad():  # torch: h' = (1 - z) n + z h, so its update gate is the complement; order r, z, n
        cell.weight_ih.copy_(torch.stack([w_in[1], -w_in[0], w_in[2]])[:, None])
        cell.weight_hh.copy_(torch.stack([w_h[1], -w_h[0], w_h[2]])[:, None])
        cell.bias_ih.zero_()
        cell.bias_hh.zero_()
    models = {"bias": torch.tensor([0.3, -1.2, 0.8]), "linear": torch.randn(3, 1)}
    made, kept = one(models, one.start())
    h = torch.zeros(1, 1)
    for i, x in enumerate(models["bias"]):
        h = cell(x.view(1, 1), h)
        expected = (h * one.dense_output.flatten() + one.dense_shift).squeeze()
        torch.testing.assert_close(made["bias"][i], expected)
        if i == 0:
            torch.testing.assert_close(kept["dense"].flatten(), h.detach().flatten())
    with torch.no_grad():  # no update, no change: the output is constant
        net.dense_input[0] = -1e4
        net.dense_recurrent[0] = 0
    made, _ = net({"bias": torch.tensor([0.3, 1.2, 0.8]), "linear": torch.randn(3, 1)}, net.start())
    torch.testing.assert_close(made["bias"], net.dense_shift.expand(3))


def test_meta_generator_keeps_scalars_apart() -> None:
    torch.manual_seed(0)
    p = {name: value.float() for name, value in make("deepfm", 3).items()}
    net = model.MetaGenerator(model.recommender_shapes("deepfm", LEVELS, 3, (7,)))
    packed = net.pack(p)
    assert packed["tables"].shape == (3, 15, 4) and packed["dense"].shape == (3, 1, SIZES["deepfm"] - 60)
    assert all(torch.equal(value, p[name]) for name, value in net.unpack(**packed).items())
    before, _ = net(p, net.start())
    changed = {name: value.clone() for name, value in p.items()}
    changed["embedding"][0, 2, 1] += 1
    after, _ = net(changed, net.start())
    differs = {name: (before[name] != after[name]).nonzero()[:, 1:] for name in p}
    assert {tuple(row.tolist()) for row in differs.pop("embedding")} == {(2, 1)}
    assert not any(len(rows) for rows in differs.values())
    assert model.recency(3).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    windows, kept = net(p, net.start())  # a window that begins one later goes on where the first one was
    later, _ = net({name: value[1:] for name, value in p.items()}, kept)
    torch.testing.assert_close(later["linear"], windows["linear"][1:])


def test_ranks_of_spmf() -> None:
    weights = model.rank_weights(torch.tensor([0.1, 0.9, 0.5, -1.0]))
    torch.testing.assert_close(weights, (torch.tensor([2.0, 0.0, 1.0, 3.0]) / 4).exp())


def test_draws_follow_the_weights() -> None:
    weights, g = torch.tensor([1.0, 2.0, 5.0]), gen()
    first = torch.stack([model.draw(weights, 1, g)[0] for _ in range(4000)]).bincount(minlength=3) / 4000
    torch.testing.assert_close(first, weights / 8, rtol=0, atol=0.03)
    assert sorted(model.draw(weights, 3, g).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot draw 4 of 3"):
        model.draw(weights, 4, g)


def test_reservoirs() -> None:
    g = gen()
    pool, new = torch.arange(200), torch.arange(1000, 2000)
    taken = torch.zeros(20)
    for i in range(20):
        out = model.reservoir_update(pool, new, 400, g)
        assert len(out) == len(out.unique()) == 200
        taken[i] = (out >= 1000).sum()
    expected = sum(200 / (400 + n + 1) for n in range(1000))
    assert taken.mean().item() == pytest.approx(min(200.0, expected), abs=8)
    assert set(model.reservoir_update(torch.arange(3), torch.arange(5, 9), 10**9, g).tolist()) == {0, 1, 2}


def test_rows_of_spmf() -> None:
    pools, new = (torch.arange(100), torch.arange(100, 140)), (torch.arange(200, 260), torch.arange(300, 320))
    rows = model.spmf_rows(pools, new, torch.ones(40), 2, 0.5, gen())
    kinds = [
        ((rows >= low) & (rows < high)).sum().item() for low, high in ((0, 100), (100, 140), (200, 260), (300, 320))
    ]
    assert kinds == [30, 10, 60, 20]
    rows = model.spmf_rows(pools, new, torch.ones(60), 1, 0.5, gen())
    assert len(rows) == 80 and (((rows >= 100) & (rows < 140)) | (rows >= 300)).sum() == 20
    heavy = torch.full((40,), 1e-6)
    heavy[:10] = 1e6
    rows = model.spmf_rows(pools, new, heavy, 2, 0.5, gen())
    assert set(rows[(rows >= 100) & (rows < 140)].tolist()) == set(range(100, 110))
    with pytest.raises(ValueError, match="strategy is 3"):
        model.spmf_rows(pools, new, heavy, 3, 0.5, gen())


# ---- rounds ----------------------------------------------------------------------------------------------------------


def toy_stream(days: int = 8, rows: int = 96, **options: Any) -> data.Stream:
    return data.seasonal(0, days, rows, **options)


def updater(train: ModuleType, arm: str, stream: data.Stream | None = None, kind: str = "fm", **options: Any) -> Any:
    """An arm with a small configuration, and no run around it."""
    settings = {"batch": 32, "thetas": 2, "every": 1, "meta_batch": 32, "meta_batches": 2, "meta_steps": 4, "size": 4}
    config = train.Config(**({"hidden": (8,), "domains": 30} | settings | options))
    run = SimpleNamespace(
        device=torch.device("cpu"),
        precision="32",
        derive_seed=derive_seed,
        generator=lambda *purpose: gen(derive_seed(*purpose)),
        setup=lambda net: net,
    )
    return train.Updater(config, stream or toy_stream(), kind, arm, 0, run)


def served(arm: Any, rounds: int = 7) -> list[Tensor]:
    """The serving models of domains 0 .. rounds."""
    state = arm.start()
    out = [state["serving"]]
    for t in range(rounds):
        arm.update(t, 0.01, state)
        out.append(state["serving"])
    return out


def test_one_day_forecast_is_incremental_update(train: ModuleType) -> None:
    for a, b in zip(served(updater(train, "iu")), served(updater(train, "fgd1")), strict=True):
        assert torch.equal(a, b)


def test_frozen_uniform_weights_are_batch_update(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = updater(train, "fgd3")
    monkeypatch.setattr(arm, "weights", lambda state: lambda ids: torch.full((len(ids),), 1 / 3))
    batch = served(updater(train, "bu3"))
    for a, b in zip(served(arm), batch, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(served(updater(train, "fgd3"))[-1], batch[-1])
    assert not torch.equal(served(updater(train, "iu"))[-1], batch[-1])


def test_smoothed_batch_update(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """m = grad r_{t-w} under the smoothing window w = b is Batch Update."""
    arm = updater(train, "fgdlinear3", smooth=3)
    monkeypatch.setattr(arm, "learn", lambda t, state: state.update(phi=torch.tensor([1.0, 0.0, 0.0])))
    for a, b in zip(served(arm), served(updater(train, "bu3")), strict=True):
        torch.testing.assert_close(a, b)


def test_a_single_weight_is_training_on_one_day(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = updater(train, "fgdlinear3")
    monkeypatch.setattr(arm, "learn", lambda t, state: state.update(phi=torch.tensor([0.0, 1.0, 0.0])))
    state = arm.start()
    for t in range(4):
        arm.update(t, 0.01, state)
    base = updater(train, "fgd3")
    real = base.fit

    def one_day(origin: Any, rows: list[Tensor], t: int, lr: float, weigh: Any, left: Any) -> Any:
        return real(
            origin, rows, t, lr, lambda ids: torch.tensor([0.0, 1.0, 0.0]) if len(ids) == 3 else weigh(ids), left
        )

    monkeypatch.setattr(base, "fit", one_day)
    torch.testing.assert_close(served(base, 4)[-1], state["serving"])
    # the other two days have no influence: their labels may be anything
    stream = toy_stream()
    labels = stream.labels.clone()
    for t in (1, 3):
        labels[stream.bounds[t] : stream.bounds[t + 1]] ^= True
    other = data.Stream(stream.ids, labels, stream.levels, stream.bounds, stream.names)
    days = [stream.day(t) for t in (1, 2, 3)]
    fitted = []
    for used in (stream, other):
        arm = updater(train, "fgd3", used)
        begin = {"theta": state["history"][0]["theta"], "adam": []}
        fitted.append(arm.fit(begin, days, 3, 0.01, lambda ids: torch.tensor([0.0, 1.0, 0.0]), arm.start())["theta"])
    torch.testing.assert_close(*fitted)


@pytest.mark.parametrize("name", ["bu3", "fgd3"])
def test_no_lineage_sees_an_example_twice(train: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each round begins with the model of b rounds before; the days that led to a model are all different."""
    arm = updater(train, name, toy_stream(12))
    real, seen, used = arm.fit, {}, []

    def fit(origin: Any, rows: list[Tensor], t: int, *others: Any) -> Any:
        entry = real(origin, rows, t, *others)
        before = seen.get(id(origin["theta"]), [])
        seen[id(entry["theta"])] = before + torch.cat(rows).tolist()
        used.append((entry["theta"], len(before), [int(part[0]) // 96 for part in rows]))
        return entry

    monkeypatch.setattr(arm, "fit", fit)
    served(arm, 11)
    for theta, _, _ in used:
        assert len(seen[id(theta)]) == len(set(seen[id(theta)]))
    assert [days for _, _, days in used] == [[0], [1], [2]] + [[t - 2, t - 1, t] for t in range(3, 11)]
    assert [before // 96 for _, before, _ in used] == [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8]


def test_generator_is_trained_on_the_past(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """At round t: inputs D_{t-b} .. D_{t-1}, target D_t, at the parameters that led to the deployed model."""
    arm = updater(train, "fgd3")
    state, seen = arm.start(), []
    rows, grams = data.Stream.rows, arm.grams

    def spy(self: data.Stream, index: Tensor) -> tuple[Tensor, Tensor]:
        if index.dim() == 3:
            seen.append((index // 96).transpose(0, 1).flatten(1))
        return rows(self, index)

    monkeypatch.setattr(type(arm.stream), "rows", spy)
    last = None
    for t in range(7):
        buffer, serving = state["buffer"], state["serving"]
        monkeypatch.setattr(arm, "grams", lambda theta, ids, y: seen.append(theta) or grams(theta, ids, y))
        arm.update(t, 0.01, state)
        assert len(seen) == (2 if t >= 3 else 0)
        if seen:
            days, theta = seen
            assert [set(day.tolist()) for day in days] == [{t - 3}, {t - 2}, {t - 1}, {t}]
            assert torch.equal(theta, buffer) and len(theta) == 2
            assert last is None or not torch.equal(theta, last)
            assert (theta - serving).norm(dim=1).min() < (theta - arm.start()["serving"]).norm(dim=1).min()
            last = theta
        seen.clear()


def test_no_gradient_reaches_the_recommender(train: ModuleType) -> None:
    arm = updater(train, "fgd3")
    state = arm.start()
    for t in range(3):
        arm.update(t, 0.01, state)
    held = [entry["theta"].clone() for entry in state["history"]]
    buffer, phi = state["buffer"].clone(), {name: value.clone() for name, value in state["phi"].items()}
    arm.learn(3, state)
    assert all(torch.equal(entry["theta"], theta) for entry, theta in zip(state["history"], held, strict=True))
    assert torch.equal(state["buffer"], buffer) and state["buffer"].grad is None
    assert any(not torch.equal(phi[name], value) for name, value in state["phi"].items())


def test_errors_are_as_computed_directly(train: ModuleType) -> None:
    arm = updater(train, "fgd2", meta_batches=1, normalise=False)
    state = arm.start()
    for t in range(2):
        arm.update(t, 0.01, state)
    ids, labels = arm.samples(2, 32, 1)
    with torch.no_grad():
        a = arm.net(ids[0, :2])
    direct = []
    for theta in state["buffer"]:
        p = model.unflatten(theta[None], arm.shapes)
        grads = model.gradients(model.repeat(p, 3), ids[0], labels[0])
        direct.append([(w @ grads[:2] - grads[2]).square().sum() for w in (a, torch.tensor([0.5, 0.5]))])
    arm.learn(2, state)
    expected = torch.tensor(direct).mean(0).tolist()
    assert state["errors"][0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("name", "rounds"), [("fgdlinear3", 14), ("fgd3", 14)])
def test_season_is_found(train: ModuleType, name: str, rounds: int) -> None:
    """The day that is a period before the next one gets most weight; an index that is one off would choose another."""
    stream = toy_stream(15, 512, drift=0.0, season=1.5)
    options = {"meta_batch": 256, "meta_steps": 100, "meta_lr": 0.1, "eta": 20.0}
    arm = updater(train, name, stream, "lr", batch=64, **options)
    state = arm.start()
    for t in range(rounds):
        arm.update(t, 0.03, state)
    weights = torch.tensor(state["weights"][-4:]).mean(0)
    assert weights[0] > 0.55 and weights[0] > 2 * weights[1:].max(), weights


def test_random_buffer_is_random(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    thetas = []
    for name in ("fgd3", "fgdrand3"):
        arm = updater(train, name)
        state, grams = arm.start(), arm.grams
        monkeypatch.setattr(arm, "grams", lambda theta, *others, g=grams: thetas.append(theta) or g(theta, *others))
        for t in range(4):
            arm.update(t, 0.01, state)
    rows = sum(arm.stream.levels)
    assert thetas[0].shape == thetas[1].shape
    assert not thetas[1][:, : 1 + rows].any() and thetas[0][:, : 1 + rows].any()  # fresh linear weights are zero


def test_asmg_windows(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models theta_{t-b+1} .. theta_t are judged where they were deployed; theta_{t+1} is read for serving."""
    arm = updater(train, "asmg2")
    iu = served(updater(train, "iu"))
    read, days = [], []
    forward, rows = arm.net.forward, data.Stream.rows
    monkeypatch.setattr(arm.net, "forward", lambda models, states: read.append(models) or forward(models, states))

    def spy(self: data.Stream, index: Tensor) -> tuple[Tensor, Tensor]:
        days.append(index // 96)
        return rows(self, index)

    state = arm.start()
    monkeypatch.setattr(type(arm.stream), "rows", spy)
    for t in range(4):
        read.clear()
        days.clear()
        arm.update(t, 0.01, state)
        assert torch.equal(state["history"][-1]["theta"], iu[t + 1])
        assert bool(read) == (t >= 2)
    assert torch.equal(model.flatten(read[0]), torch.stack([iu[2], iu[3]]))
    assert torch.equal(model.flatten(read[-1]), torch.stack([iu[3], iu[4]]))
    assert [set(day.tolist()) for day in days[-1]] == [{2}, {3}]
    assert not torch.equal(state["serving"], iu[4])


@pytest.mark.parametrize("strategy", [1, 2])
def test_spmf_rounds(train: ModuleType, monkeypatch: pytest.MonkeyPatch, strategy: int) -> None:
    arm = updater(train, "spmf2", spmf_strategy=strategy)
    stream, real, lengths = arm.stream, arm.fit, []
    monkeypatch.setattr(arm, "fit", lambda o, rows, *others: lengths.append(len(rows[0])) or real(o, rows, *others))
    state = arm.start()
    for t in range(6):
        arm.update(t, 0.01, state)
        negatives, positives = state["pools"]
        filled = min(t + 1, 2) * 96
        assert len(negatives) + len(positives) == filled
        assert not stream.labels[negatives].any() and stream.labels[positives].all()
        assert max(*negatives.tolist(), *positives.tolist()) < (t + 1) * 96
    assert sum(state["seen"]) == 6 * 96 and lengths[0] == 96
    assert all(n == 96 if strategy == 1 else 140 < n <= 144 for n in lengths[1:])


def test_ideal_trains_on_the_next_day(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = updater(train, "ideal")
    real, days = arm.fit, []
    monkeypatch.setattr(
        arm, "fit", lambda o, rows, *others: days.append(int(rows[0][0]) // 96) or real(o, rows, *others)
    )
    served(arm, 3)
    assert days == [1, 2, 3]


def test_moments_of_adam_are_kept_when_asked(train: ModuleType) -> None:
    reset, keep = (served(updater(train, "bu2", moments=how), 4) for how in ("reset", "keep"))
    assert torch.equal(reset[1], keep[1]) and not torch.equal(reset[2], keep[2])
    arm = updater(train, "bu2", moments="keep")
    state = arm.start()
    for t in range(4):
        arm.update(t, 0.01, state)
    assert [float(entry["adam"][0][0]) for entry in state["history"]] == [6.0, 6.0, 9.0]  # 3 steps a pass; b = 2


def test_domains_of_unequal_size(train: ModuleType) -> None:
    """The shorter one begins again; each row of the longest is used once."""
    stream = toy_stream(4)
    uneven = data.Stream(stream.ids, stream.labels, stream.levels, (0, 96, 130, 290, 384), ("a", "b", "c", "d"))
    arm = updater(train, "bu2", uneven)
    counts: list[Tensor] = []
    rows = data.Stream.rows
    uneven.__class__.rows, keep = (lambda self, i: counts.append(i) or rows(self, i)), rows
    try:
        arm.fit(arm.start()["history"][0], [uneven.day(1), uneven.day(2)], 2, 0.01, lambda x: torch.ones(2) / 2, {})
    finally:
        uneven.__class__.rows = keep
    used = torch.cat(counts, 1)
    assert used[1].sort().values.tolist() == list(range(130, 290))
    assert used[0].bincount(minlength=130)[96:130].sort().values.tolist() == [4] * 10 + [5] * 24
    assert set(used[0].tolist()) == set(range(96, 130))


def test_learning_rate_is_chosen_on_the_offline_part(train: ModuleType) -> None:
    assert train.plan(2, 3, 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (-1, 3), (-1, 4)]


def test_a_day_of_one_class_has_no_auc(train: ModuleType) -> None:
    stream = toy_stream(3)
    labels = stream.labels.clone()
    labels[96:192] = False
    arm = updater(train, "iu", data.Stream(stream.ids, labels, stream.levels, stream.bounds, stream.names))
    one, other = (arm.deploy(t, arm.start()) for t in (0, 1))
    assert math.isfinite(one[0]) and math.isnan(other[0]) and math.isfinite(other[1])


def test_what_is_not_finite_stops(train: ModuleType) -> None:
    arm = updater(train, "fgd2")
    state = arm.start()
    for t in range(2):
        arm.update(t, 0.01, state)
    state["buffer"] = state["buffer"] * math.nan
    with pytest.raises(UserError, match="loss is nan in round 3, step 0"):
        arm.learn(2, state)
    state["serving"] = state["serving"] * math.nan
    with pytest.raises(UserError, match="not finite"):
        arm.deploy(3, state)


def test_presets_have_the_papers_sizes(train: ModuleType) -> None:
    """Parameters by hand on made-up vocabularies, without values; and one step at full width."""
    for name, preset in train.PRESETS.items():
        c = preset.config
        levels = {"criteotb": (1000,) * 39, "avazu": (1000,) * 22, "movielens": (50,) * 10}.get(c.dataset, (21,) * 6)
        fields, rows = len(levels), sum(levels)
        for kind in c.models:
            with torch.device("meta"):
                shapes = model.recommender_shapes(kind, levels, c.size, c.hidden)
                parts = {key: torch.empty(1, *shape) for key, shape in shapes.items()}
                net = model.MFGG(levels, 3, c.meta_size, c.meta_width, c.meta_hidden)
                meta = model.MetaGenerator(shapes, c.asmg_hidden)
            fm = 1 + rows * (1 + c.size)
            widths = [fields * c.size, *c.hidden, 1]
            deep = sum(a * b + b for a, b in itertools.pairwise(widths))
            expected = fm + (deep if kind == "deepfm" else 0)
            assert model.flatten(parts).shape == (1, expected), name
            d1, w, h = fields * c.meta_size, c.meta_width, c.meta_hidden
            assert (
                sum(p.numel() for p in net.parameters()) == rows * c.meta_size + 3 * d1 * w + 3 * w * h + h + 3 * h + 3
            )
            cells = (1 + c.size) + 1 + (deep if kind == "deepfm" else 0)
            assert sum(p.numel() for p in meta.parameters()) == cells * (3 * 4 + 3 * 16 + 4 + 1)
    c = train.PRESETS["criteotb-deepfm"].config
    assert (c.size, c.hidden, c.batch, c.every, c.evaluate, c.lrs[-1]) == (24, (400,) * 3, 1024, 150, (16, 8), 1e-5)
    assert set(c.arms) == {"iu", *(f"{m}{b}" for m in ("bu", "spmf", "asmg", "fgd") for b in (2, 3, 5))}
    c = train.PRESETS["avazu-fm"].config
    assert (c.every, c.evaluate, c.models) == (50, (8,), ("fm",)) and "fgd5" not in c.arms
    p = model.init_recommender("deepfm", (4,) * 39, c.size, c.hidden, gen())
    leaf = {key: value.requires_grad_() for key, value in p.items()}
    adam = torch.optim.Adam(list(leaf.values()), lr=1e-3, fused=True)
    ids = torch.randint(0, 4, (3, c.batch, 39), generator=gen()) + 4 * torch.arange(39)
    before = model.flatten(p).detach()
    model.weighted_loss(leaf, ids, torch.ones(3, c.batch), torch.full((3,), 1 / 3)).backward()
    adam.step()
    assert (model.flatten(p) - before).abs().max().item() == pytest.approx(1e-3, rel=0.05)


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_generated_stream() -> None:
    a, b, c = data.seasonal(1, 6, 200), data.seasonal(1, 6, 200), data.seasonal(2, 6, 200)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and not torch.equal(a.labels, c.labels)
    assert len(a) == 6 and a.size(5) == 200 and a.levels == (21,) * 6
    ids, labels = a.rows(a.day(2))
    assert ids.dtype == torch.int64 and labels.dtype == torch.float32
    assert ((ids - torch.arange(0, 126, 21)) == a.ids[400:600]).all() and set(labels.tolist()) == {0.0, 1.0}


def test_season_of_the_generated_stream() -> None:
    """Click rates of a level are alike a period apart, not a day apart; without a season both are."""

    def difference(stream: data.Stream, lag: int) -> float:
        rates = []
        for t in range(len(stream)):
            rows = stream.day(t)
            hits = stream.ids[rows, 0] == torch.arange(20)[:, None]
            rates.append((hits * stream.labels[rows]).sum(1) / hits.sum(1).clamp_min(1))
        stacked = torch.stack(rates)
        return (stacked[lag:] - stacked[:-lag]).square().mean().item()

    season, flat = (data.seasonal(0, 12, 4000, season=s, drift=0.0) for s in (0.7, 0.0))
    assert difference(season, 1) > 2 * difference(season, 3)
    assert difference(flat, 1) < 1.5 * difference(flat, 3)


def test_unknown_levels_share_the_last_id() -> None:
    stream = data.Stream(
        torch.tensor([[0, -1], [2, 1]], dtype=torch.int32), torch.tensor([1, 0]), (4, 3), (0, 1, 2), ("1", "2")
    )
    ids, labels = stream.rows(torch.tensor([[0], [1]]))
    assert ids.tolist() == [[[0, 6]], [[2, 5]]] and labels.tolist() == [[1.0], [0.0]]


def test_levels_are_counted_on_the_past() -> None:
    ids = torch.tensor([[0, 2], [1, 2], [1, -1], [3, 0], [2, 2]], dtype=torch.int32)
    found, levels = data.past_levels(ids, (4, 3), 3, 1)
    assert levels == (2, 1) and found.tolist() == [[0, 0], [1, 0], [1, -1], [-1, -1], [-1, 0]]
    assert data.past_levels(ids, (4, 3), 3, 2)[0].tolist() == [[-1, 0], [0, 0], [0, -1], [-1, -1], [-1, 0]]


def test_movielens_of_the_installed_package() -> None:
    if ctr.recbole_movielens() is None:
        pytest.skip("recbole is not installed")
    stream = data.movielens(None, 24, lambda n: n - 14)
    assert len(stream) == 24 and {stream.size(t) for t in range(24)} == {4166}
    rate = stream.labels.float().mean().item()
    assert rate == pytest.approx(0.55375, abs=0.001)
    past = stream.ids[: 10 * 4166]
    assert (past[:, :2] >= 0).all() and (stream.ids[10 * 4166 :, 0] < 0).float().mean() > 0.5
    assert stream.levels[0] == len(past[:, 0].unique()) + 1
    everything = data.movielens(None, 24, lambda n: n - 14, "all")
    assert everything.levels[0] == len(everything.ids[:, 0].unique()) + 1 > stream.levels[0]
    assert (everything.ids[:, 0] >= 0).all()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def write_avazu(folder: Path, dates: tuple[int, ...] = (141021, 141022, 141023, 141024), rows: int = 40) -> Path:
    """The official layout: header, 24 columns."""
    folder.mkdir(exist_ok=True)
    path = folder / "train"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(ctr.AVAZU.columns)
        for d, date in enumerate(dates):
            for i in range(rows):
                values = [f"{(i + j) % 3:08x}" for j in range(21)]
                values[0] = f"new{d}" if i % 2 else "old"
                writer.writerow([f"{d}{i:04d}", int(i % 3 == 0), f"{date}{i * 4 // rows:02d}", *values])
    return folder


def write_criteo(folder: Path, days: int = 4, rows: int = 60, pack: int = 2) -> Path:
    """The official layout: 40 tab-separated columns, no header, a file a day; day ``pack`` is gzipped."""
    folder.mkdir(exist_ok=True)
    for day in range(days):
        text = io.StringIO()
        for i in range(rows):
            integers = [str((i + j) % 7) if (i + j) % 5 else "" for j in range(13)]
            letters = [f"{(i * j) % 4:08x}" for j in range(26)]
            letters[0] = f"{day:08x}" if i % 2 else "ffffffff"
            text.write("\t".join([str(int(i % 4 == 0)), *integers, *letters]) + "\n")
        if day == pack:
            with gzip.open(folder / f"day_{day}.gz", "wt") as file:
                file.write(text.getvalue())
        else:
            (folder / f"day_{day}").write_text(text.getvalue())
    return folder


def test_avazu_by_date(cache: Path) -> None:
    stream = data.avazu(write_avazu(cache / "raw"), lambda n: n - 2, min_count=5)
    assert stream.names == ("141021", "141022", "141023", "141024") and len(stream.levels) == 22
    assert stream.bounds == (0, 40, 80, 120, 160)
    site = [ctr.avazu_fields(drop=())[i].name for i in range(22)].index("C1")
    assert stream.levels[site] == 3 + 1  # old, new0 and new1: what comes later is unknown
    assert (stream.ids[80:, site] < 0).float().mean() == 0.5 and (stream.ids[:80, site] >= 0).all()
    everything = data.avazu(cache / "raw", lambda n: n - 2, "all", min_count=5)
    assert everything.levels[site] == 5 + 1 and (everything.ids >= 0).all()
    assert stream.labels.float().mean().item() == pytest.approx(14 / 40)


def test_criteo_by_file(cache: Path) -> None:
    stream = data.criteo(write_criteo(cache / "raw"), lambda n: n - 2, min_count=5, share=1.0)
    assert stream.names == ("day_0", "day_1", "day_2", "day_3") and stream.bounds == (0, 60, 120, 180, 240)
    assert len(stream.levels) == 39 and stream.levels[13] == 3 + 1
    half = data.criteo(cache / "raw", lambda n: n - 2, min_count=1, share=0.5)
    kept = data.row_uniform(0, 240) < 0.5
    assert half.bounds[-1] == kept.sum() and half.bounds[1] == kept[:60].sum()
    mapped = data.ctr.open_clicks(next(path for path in (cache / "cache").rglob("meta.json")).parent)
    assert mapped.folder is not None


def test_real_rows_of_criteo(cache: Path, data_root: Path) -> None:
    source = data_root / "ctr-raw-samples" / "criteo_train_8000.txt.gz"
    if not source.is_file():
        pytest.skip(f"no {source.name}")
    (cache / "raw").mkdir()
    lines = gzip.decompress(source.read_bytes()).splitlines(keepends=True)
    for day in range(4):
        (cache / "raw" / f"day_{day}").write_bytes(b"".join(lines[day * 2000 : day * 2000 + 2000]))
    stream = data.criteo(cache / "raw", lambda n: n - 1, share=1.0)
    assert stream.bounds == (0, 2000, 4000, 6000, 8000) and int(stream.labels.sum()) == 1728
    ids, _ = stream.rows(stream.day(3)[:5])
    assert ids.shape == (5, 39) and int(ids.max()) < sum(stream.levels)


def test_real_rows_of_avazu(cache: Path, data_root: Path, refuses: Any) -> None:
    """The sample is of one hour: it is read, and is too short a stream."""
    source = data_root / "ctr-raw-samples" / "avazu_train_8999.csv.gz"
    if not source.is_file():
        pytest.skip(f"no {source.name}")
    (cache / "raw").mkdir()
    (cache / "raw" / "train.csv.gz").write_bytes(source.read_bytes())
    assert data.avazu_days(cache / "raw" / "train.csv.gz") == {141021: 8999}
    assert "8,999 rows of 1 dates" in data.check_text("avazu", cache / "raw")[0]
    refuses(["--preset", "avazu-fm", "--data", str(cache / "raw")], "need more than b=3 domains, got 1")


# ---- the command -----------------------------------------------------------------------------------------------------

TINY = [
    "--models",
    "fm",
    "--size",
    "4",
    "--meta-size",
    "4",
    "--batch",
    "64",
    "--thetas",
    "2",
    "--meta-batch",
    "32",
    "--meta-batches",
    "2",
    "--meta-steps",
    "2",
]


def test_text_streams_end_to_end(cache: Path, run_paper: Any) -> None:
    """Day files to scores: Avazu's columns auc and logloss, CriteoTB's with the number of days."""
    write_avazu(cache / "avazu")
    write_criteo(cache / "criteo")
    options = [*TINY, "--arms", "iu", "fgd2", "--min-count", "3", "--lrs", "0.01"]
    found = {}
    for preset, evaluate in (("avazu-fm", ["2"]), ("criteotb-fm", ["2", "1"])):
        folder = cache / preset.split("-")[0].removesuffix("tb")
        share = ["--share", "1.0"] if preset == "criteotb-fm" else []
        words = ["--preset", preset, "--data", str(folder), *options, *share, "--evaluate", *evaluate, "--seed", "0"]
        result = run_paper(SLUG, [*words, "--out", str(cache / preset)])
        assert result.code == 0, result.err
        found |= json.loads((cache / preset / "result.json").read_text())["metrics"]
    for name in ("avazu/fm/fgd2/auc", "avazu/fm/iu/logloss", "criteotb/fm/fgd2/auc2", "criteotb/fm/iu/logloss1"):
        assert math.isfinite(found[name]["mean"]), name
    assert "avazu/fm/iu/auc2" not in found


def test_bad_settings(train: ModuleType) -> None:
    for options, message in (
        ({"arms": ("sgd3",)}, "unknown arm 'sgd3', expected iu, ideal, or one of bu spmf asmg fgd fgdrand fgdlinear"),
        ({"arms": ("fgd",)}, "unknown arm 'fgd'"),
        ({"arms": ("fgd0",)}, "unknown arm 'fgd0'"),
        ({"arms": ("iu", "iu")}, "each once"),
        ({"arms": ("iu",), "first_only": ("iu",)}, "each once"),
        ({"models": ("ffm",)}, "--models is ffm, expected one or more of lr, fm, deepfm"),
        ({"arms": ("fgd9",), "domains": 9, "evaluate": (1,)}, "need more than b=9 domains, got 9"),
        ({"evaluate": (24,)}, "--evaluate 24 leaves no offline part of 24 domains"),
        ({"evaluate": ()}, "--evaluate is ()"),
        ({"lrs": ()}, "--lrs is ()"),
        ({"lrs": (0.1, -1.0)}, "--lrs is (0.1, -1.0), expected one or more positive rates"),
        ({"smooth": 5}, "--smooth is 5, expected at most 4 for fgd3"),
        ({"share": 2.0}, "--share is 2.0, expected from 0 to 1"),
        ({"hidden": (8, 0)}, "--hidden is (8, 0)"),
        ({"dataset": "movielens", "control": ("bu3",)}, "--control and --regret need --dataset seasonal"),
        ({"regret": (4,)}, "expected windows from 1 to --regret-days"),
    ):
        with pytest.raises(ValueError) as error:
            train.Config(**options)
        assert message in str(error.value)


def test_bad_usage(refuses: Any, cache: Path) -> None:
    refuses(["--arms", "sgd3"], "unknown arm 'sgd3', expected iu, ideal, or one of bu spmf asmg fgd fgdrand fgdlinear")
    refuses(["--preset", "smoke", "--domains", "2", "--evaluate", "1"], "need more than b=3 domains, got 2")
    refuses(["--lrs"], "lrs")
    refuses(["--preset", "criteotb-fm"], "needs --data DIR")
    empty = cache / "empty"
    empty.mkdir()
    for words, message in (
        (["--precision", "16-mixed"], "expected 32 or bf16-mixed"),
        (["--preset", "criteotb-fm", "--data", str(empty)], "expected day_0 .. day_23"),
        (["--preset", "avazu-fm", "--data", str(empty), "--check-data"], "expected train.csv"),
        (["--preset", "movielens", "--data", str(empty)], "expected ml-100k.inter"),
    ):
        refuses(words, message)
        shutil.rmtree(cache / "run", ignore_errors=True)  # a run had begun: its folder is not taken twice


def test_bad_files(refuses: Any, cache: Path) -> None:
    folder = write_criteo(cache / "criteo")
    words = ["--preset", "criteotb-fm", "--data", str(folder), "--check-data"]
    (folder / "day_1").rename(folder / "day_5")
    refuses(words, "day_1, day_4 missing, expected every day up to day_5")
    (folder / "day_5").rename(folder / "day_1")
    text = (folder / "day_1").read_text().splitlines()
    (folder / "day_1").write_text("\n".join([*text[:6], text[6] + "\t1", *text[7:]]) + "\n")
    refuses(words, "day_1, line 7: 41 columns found, expected 40")
    with pytest.raises(UserError, match="day_1, line 7: 41 columns found, expected 40"):
        data.criteo(folder, lambda n: n - 1)
    (folder / "day_1").write_text("\n".join([*text[:6], "2" + text[6][1:], *text[7:]]) + "\n")
    with pytest.raises(UserError, match="day_1, line 7: label is '2', expected 0 or 1"):
        data.criteo(folder, lambda n: n - 1, share=1.0)
    (folder / "day_1").write_text("")
    refuses(words, "day_1 is empty")
    with pytest.raises(UserError, match="3 of 4 domains have rows"):
        data.criteo(folder, lambda n: n - 1, min_count=1, share=1.0)
    folder = write_avazu(cache / "avazu")
    words = ["--preset", "avazu-fm", "--data", str(folder), "--check-data"]
    lines = (folder / "train").read_text().splitlines()
    (folder / "train").write_text("\n".join([*lines[:50], lines[3], *lines[50:]]) + "\n")
    refuses(words, "train, line 51: column hour goes back to 14102100, expected rows by time")
    (folder / "train").write_text("\n".join([*lines[:9], lines[9].replace("141021", "x141021"), *lines[10:]]) + "\n")
    refuses(words, "line 10: hour is 'x14102100', expected YYMMDDHH")
    (folder / "train").write_text("\n".join([*lines[:9], lines[9] + ",1", *lines[10:]]) + "\n")
    refuses(words, "line 10: 25 columns found, expected 24")
    (folder / "train").write_text("\n".join([lines[0].replace("C21", "C22"), *lines[1:]]) + "\n")
    refuses(words, "line 1: the header lacks C21")


def test_check_data(run_paper: Any, cache: Path) -> None:
    folder = write_criteo(cache / "criteo")
    out = run_paper(SLUG, ["--preset", "criteotb-fm", "--data", str(folder), "--check-data"])
    assert out.code == 0 and "4 daily files (expected 24)" in out.out and "day_2.gz: 60 rows" in out.out
    if ctr.recbole_movielens() is not None:
        out = run_paper(SLUG, ["--preset", "movielens", "--check-data"])
        assert "99,984 rows" in out.out and "24 domains, 10 fields" in out.out


@pytest.mark.parametrize("after", ["3", "30", "77"])
def test_exact_resume(train: ModuleType, tmp_path: Path, smoke: dict[str, Any], after: str) -> None:
    """Stopped in a trial of a learning rate, in a later arm, and within the regret."""
    out = str(tmp_path / "part")
    assert train.main(["--preset", "smoke", "--out", out, "--stop-after", after]) == 0
    assert not (tmp_path / "part" / "result.json").exists()
    assert train.main(["--resume", out]) == 0
    assert json.loads((tmp_path / "part" / "result.json").read_text())["metrics"] == smoke["metrics"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, run_paper: Any) -> dict[str, Any]:
    """The result of an uninterrupted smoke run."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    assert run_paper(SLUG, ["--preset", "smoke", "--out", str(out)]).code == 0
    return json.loads((out / "result.json").read_text())


def test_an_arm_does_not_depend_on_the_others(train: ModuleType, tmp_path: Path, smoke: dict[str, Any]) -> None:
    out = tmp_path / "alone"
    words = ["--preset", "smoke", "--arms", "fgd2", "--out", str(out)]
    assert train.main(words) == 0
    alone = json.loads((out / "result.json").read_text())["metrics"]
    assert alone["seasonal/fm/fgd2/auc"] == smoke["metrics"]["seasonal/fm/fgd2/auc"]


# ---- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "less", "holds"), [(-0.001, 0.01, True), (-0.004, 0.01, False), (0.01, -0.01, False)])
def test_what_movielens_decides(train: ModuleType, gain: float, less: float, holds: bool) -> None:
    """One claim alone: not below Batch Update by more than the margin, below Incremental Update's log loss."""
    found, values = {}, {}
    for kind in ("fm", "deepfm"):
        values |= {f"movielens/{kind}/{arm}/auc": 0.7 for arm in ("iu", "bu3", "fgd3")}
        values |= {f"movielens/{kind}/{arm}/logloss": 0.6 for arm in ("iu", "bu3", "fgd3")}
    values["movielens/deepfm/fgd3/auc"] += gain
    values["movielens/fm/fgd3/logloss"] -= less
    values["movielens/deepfm/fgd3/logloss"] -= 0.01
    paper = read_paper(Path(train.__file__).parent)
    run = SimpleNamespace(
        metrics={name: SimpleNamespace(mean=value) for name, value in values.items()},
        threshold=lambda claim, key="margin": paper.claim(claim).thresholds[key],
        claim=lambda name, verdict, **measured: found.update({name: verdict}),
    )
    assert train.PRESETS["movielens"].claims
    train.decide(train.PRESETS["movielens"].config, run)
    assert found == {"never_worse": holds}


SMALL = "--domains 12 --evaluate 6 --rows 512 --lrs 0.03 --size 4 --hidden 8 --batch 32 --season 1.0 --seed 0"
SMALL += " --meta-batch 256 --meta-batches 2 --meta-steps 60 --meta-lr 0.05 --thetas 4 --every 4"
SMALL += " --regret 1 --eta 20 --delta 0.03 --asmg-hidden 1 --first-only fgdrand3"


def claims(train: ModuleType, out: Path, *words: str) -> dict[str, bool]:
    """Verdicts of the default preset at a small size."""
    assert train.main([*SMALL.split(), *words, "--out", str(out)]) == 0
    return {claim["name"]: claim["holds"] for claim in json.loads((out / "result.json").read_text())["claims"]}


def test_claims_fail_for_a_broken_method(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FGD and Batch Update never move, the generator never learns, the linear one goes uphill: each claim falls."""
    held = claims(train, tmp_path / "whole")
    core = {"fgd_beats_batch_fm", "fgd_beats_batch_deepfm", "batch_beats_incremental", "forecast_lowers_the_regret"}
    assert all(held[name] for name in core | {"forecast_error_falls"}), held
    real, run_arm, where = train.Updater.weights, train.run_arm, []

    def still(self: Any, state: Any) -> Any:
        stops = self.method == "fgd" or (self.method == "bu" and where[-1] == "seasonal")
        return (lambda ids: torch.zeros(len(ids))) if stops else real(self, state)

    def named(unit: Any, config: Any, run: Any, stream: Any, name: str, *others: Any) -> None:
        where.append(name)
        run_arm(unit, config, run, stream, name, *others)

    def deaf(a: Tensor, *grams: Tensor) -> Tensor:
        return model.forecast_error(torch.full_like(a, 1 / 3), *grams) + 0 * a.sum()

    uphill = train.exponentiated_gradient
    monkeypatch.setattr(train, "run_arm", named)
    monkeypatch.setattr(train.Updater, "weights", still)
    monkeypatch.setattr(train, "forecast_error", deaf)
    monkeypatch.setattr(train, "exponentiated_gradient", lambda a, slope, eta: uphill(a, -slope, eta))
    broken = claims(train, tmp_path / "broken", "--meta-steps", "4", "--rows", "256")  # it learns nothing
    assert set(broken) == {claim.name for claim in read_paper(Path(train.__file__).parent).claims}
    assert not any(broken.values()), broken
