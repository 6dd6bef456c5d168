"""xDeepInt: oracles of the network and its optimisers, peers with equal weights, loaders, errors, processes."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from papers.xdeepint import data, model
from shared import ctr
from shared.errors import UserError

SLUG = "xdeepint"


def make_pin(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> model.PIN:
    torch.manual_seed(seed)
    pin = model.PIN(**({"fields": 3, "size": 4, "layers": 2, "subspaces": 2} | options)).to(dtype)
    with torch.no_grad():
        pin.bias.fill_(0.3)
    return pin


NUMPY_ACTIVATIONS = {
    "linear": lambda x: x,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
}


def numpy_pin(pin: model.PIN, x0: np.ndarray) -> np.ndarray:
    """The logits sample by sample, sub-space by sub-space, from the formulas alone."""
    fields, size, h = pin.fields, pin.size, pin.subspaces
    part, act = size // h, NUMPY_ACTIVATIONS[pin.activation]
    weight = np.zeros((0, 0, 0)) if pin.weight is None else pin.weight.detach().numpy()
    out, bias = pin.output.detach().numpy(), pin.bias.item()
    logits = []
    for x in x0:
        stacked = np.concatenate([x[:, s * part : (s + 1) * part] for s in range(h)], 0)
        layer, layers = stacked, [stacked]
        for w in weight:
            layer = layer * ((1 + act(w @ stacked)) if pin.residual else act(w @ stacked))
            layers.append(layer)
        if pin.residual:
            blocks = [np.concatenate(np.split(layer, h, 0), 1)]
        elif pin.join == "code":  # the layers are glued together first, then cut into h blocks
            blocks = [np.concatenate(np.split(np.concatenate(layers, 0), h, 0), 1)]
        else:
            blocks = [np.concatenate(np.split(one, h, 0), 1) for one in layers]
        final = np.concatenate(blocks, 0)
        assert final.shape == (len(out), size) and fields * h == len(stacked)
        logits.append((out @ final + bias).sum())
    return np.array(logits)


# ---- the network: oracles ------------------------------------------------------------------------------------------


def test_worked_example():
    pin = make_pin(fields=2, size=2, layers=1, subspaces=1)
    with torch.no_grad():
        pin.weight.copy_(torch.tensor([[[0.5, 0.0], [0.0, -1.0]]]))
        pin.output.copy_(torch.tensor([1.0, 0.5]))
        pin.bias.fill_(0.1)
    x0 = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    torch.testing.assert_close(pin.interactions(x0)[0], torch.tensor([[1.5, 4.0], [-6.0, -12.0]], dtype=torch.float64))
    logit = pin(x0)
    assert logit.item() == pytest.approx(-3.3) and torch.sigmoid(logit).item() == pytest.approx(0.0355712, abs=1e-7)


def test_two_subspaces_by_hand():
    x0 = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    assert model.stack_subspaces(x0, 2).flatten().tolist() == [1, 3, 2, 4]
    pin = make_pin(fields=2, size=2, layers=1, subspaces=2)
    with torch.no_grad():
        pin.weight.copy_(torch.eye(4)[None])
    assert pin.interactions(x0)[0].tolist() == [[2, 6], [12, 20]]


def test_stack_and_unstack_are_inverse():
    x = torch.randn(5, 3, 12)
    for h in (1, 2, 3, 4, 6, 12):
        stacked = model.stack_subspaces(x, h)
        assert stacked.shape == (5, 3 * h, 12 // h)
        torch.testing.assert_close(stacked[:, 2 + 3 * (h - 1)], x[:, 2, 12 - 12 // h :])
        torch.testing.assert_close(model.unstack_subspaces(stacked, h), x)
    with pytest.raises(ValueError, match="12 is not divisible by 5"):
        model.stack_subspaces(x, 5)


@pytest.mark.parametrize("activation", sorted(model.ACTIVATIONS))
@pytest.mark.parametrize(("residual", "join"), [(True, "code"), (False, "code"), (False, "layer")])
def test_pin_equals_the_formulas(activation, residual, join):
    for h in (1, 2, 4):
        for layers in (0, 1, 3):
            pin = make_pin(layers=layers, subspaces=h, activation=activation, residual=residual, join=join)
            x0 = torch.randn(6, 3, 4, dtype=torch.float64)
            np.testing.assert_allclose(pin(x0).detach().numpy(), numpy_pin(pin, x0.numpy()), rtol=1e-9, atol=1e-10)
            bits = pin.interactions(x0)
            by_parts = torch.einsum("f,bfk->b", pin.output, bits) + 4 * pin.bias
            torch.testing.assert_close(by_parts, pin(x0))


def test_code_and_layer_join_differ_only_with_subspaces():
    """Section "non-residual with h > 1" of the method map: the released code's blocks are not sub-spaces."""
    x0 = torch.randn(4, 3, 4, dtype=torch.float64)
    for h, same in ((1, True), (2, False)):
        pins = [make_pin(layers=2, subspaces=h, residual=False, join=join) for join in ("code", "layer")]
        assert torch.allclose(pins[0](x0), pins[1](x0)) == same


def test_hand_written_gradient():
    pin = make_pin(layers=3, subspaces=2)
    x0 = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert pin._is_plain(x0)
    assert torch.autograd.gradcheck(lambda x, *_: pin(x), (x0, *pin.parameters()))
    grads = torch.autograd.grad(pin(x0).square().sum(), (x0, *pin.parameters()))
    pin._is_plain = lambda x: False
    for a, b in zip(grads, torch.autograd.grad(pin(x0).square().sum(), (x0, *pin.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_of_keras_are_transposed():
    """The official layer permutes to (B, K/h, F h), multiplies by the kernel from the right and permutes back."""
    rng = np.random.default_rng(0)
    fields, size, h, layers = 3, 4, 2, 2
    kernels = rng.standard_normal((layers, fields * h, fields * h))
    out, bias = rng.standard_normal((fields, 1)), rng.standard_normal(1)
    x0 = rng.standard_normal((5, fields, size))
    x = stacked = np.concatenate(np.split(x0, h, 2), 1)
    for kernel in kernels:
        x = x * (1 + (stacked.transpose(0, 2, 1) @ kernel).transpose(0, 2, 1))
    x = np.concatenate(np.split(x, h, 1), 2)
    expected = ((x.transpose(0, 2, 1) @ out).transpose(0, 2, 1) + bias)[:, 0].sum(1)
    pin = make_pin(fields=fields, size=size, layers=layers, subspaces=h)
    pin.load_keras(kernels, out, bias)
    np.testing.assert_allclose(pin(torch.from_numpy(x0)).detach().numpy(), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="expected 2"):
        pin.load_keras(kernels[:1], out, bias)


def test_block_diagonal_kernel_is_one_subspace():
    one, four = make_pin(subspaces=1), make_pin(subspaces=4)
    with torch.no_grad():
        four.weight.copy_(torch.stack([torch.kron(torch.eye(4, dtype=torch.float64), w) for w in one.weight]))
        four.output.copy_(one.output)
    x0 = torch.randn(7, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(one(x0), four(x0))


def test_without_maps_it_is_logistic_regression():
    x0 = torch.randn(7, 3, 4, dtype=torch.float64)
    zero = make_pin(layers=2)
    nn.init.zeros_(zero.weight)
    for pin in (zero, make_pin(layers=0)):
        expected = (x0.sum(2) * pin.output).sum(1) + 4 * pin.bias
        torch.testing.assert_close(pin(x0), expected)


@pytest.mark.parametrize(("layers", "subspaces"), [(0, 1), (1, 4), (2, 2), (3, 1)])
def test_degree_is_layers_plus_one(layers, subspaces):
    pin = make_pin(layers=layers, subspaces=subspaces)
    nn.init.zeros_(pin.bias)
    x0 = torch.randn(1, 3, 4, dtype=torch.float64)
    t = np.linspace(-1, 1.5, layers + 3)
    y = np.array([pin(x0 * s).item() for s in t])
    powers = t[:, None] ** np.arange(1, layers + 2)  # no constant term
    coefficients, *_ = np.linalg.lstsq(powers[:-1], y[:-1], rcond=None)
    assert powers[-1] @ coefficients == pytest.approx(y[-1], rel=1e-6, abs=1e-9)
    assert abs(coefficients[-1]) > 1e-6


def test_dropout_is_for_training_only():
    pin = make_pin(dropout=0.5)
    x0 = torch.randn(50, 3, 4, dtype=torch.float64)
    assert not torch.allclose(pin(x0), pin(x0))
    pin.eval()
    torch.testing.assert_close(pin(x0), make_pin()(x0))


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        for fields, kernels in ((38, 1_478_656), (39, 1_557_504)):
            made = model.XDeepInt([64] * 12 + [1000] * (fields - 12), 16, layers=4, subspaces=16)
            assert made.pin.weight.numel() == kernels
            expected = kernels + fields + 1 + 16 * (64 * 12 + 1000 * (fields - 12))
            assert model.count_parameters(made) == expected
            assert made.embedding.field(0).numel() == 64 * 16


def test_every_preset_can_be_built(train):
    fields = {
        "pairs": 8,
        "triples": 8,
        "noise": 10,
        "ml100k": 10,
        "frappe": 10,
        "criteo": 39,
        "avazu": 21,
        "ipinyou": 16,
    }
    seen = set()
    for preset in train.PRESETS.values():
        for arm in preset.config.arms:
            where, name, config = train.parse_arm(arm, preset.config)
            key = (where, name, config)
            if name == "bayes" or key in seen:
                continue
            seen.add(key)
            n, k, count = fields[where], config.embedding_size, 50
            with torch.device("meta"):
                made = train.build(name, [count] * n, config, sparse=config.sparse)
            found = train.count_parameters(made)
            if name == "xdeepint":
                rows = n * config.subspaces
                assert found == config.layers * rows**2 + n + 1 + k * n * count
            elif name == "lr":
                assert found == n * count + 1
            elif name == "fm":
                assert found == n * count * (k + 1) + 1
            else:
                assert found > n * count * k
            optimizers, summed = train.make_optimizers(made, name, config)
            assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(list(made.parameters()))
            assert summed == (type(optimizers[0]).__name__ in ("FTRL", "GFTRL"))
    assert len(seen) > 100


# ---- embedding -----------------------------------------------------------------------------------------------------


def test_unknown_levels_are_zero_vectors():
    made = model.XDeepInt([5, 6], 4, layers=1, subspaces=2)
    x = made.embedding(torch.tensor([[-1, 5], [4, -1]]))
    assert (x[0, 0] == 0).all() and (x[1, 1] == 0).all() and (x[0, 1] != 0).any()
    torch.testing.assert_close(x[0, 1], made.embedding.field(1)[5])
    rows = made.pin.interactions(x)
    assert (rows[0, 0] == 0).all() and (rows[1, 1] == 0).all()
    made(torch.tensor([[-1, 5], [4, -1]])).sum().backward()
    assert (made.embedding.table.weight.grad[-1] == 0).all()


def test_initial_embedding_is_a_truncated_normal():
    table = model.FieldEmbedding([20_000], 16).field(0)
    assert table.abs().max() <= 2 * 0.25 and abs(float(table.detach().std()) - 0.25 * 0.8796) < 0.002


def test_fused_table_takes_separate_ones_and_checks_its_ids():
    tables = [torch.randn(n, 3) for n in (4, 2, 5)]
    fused = model.FieldEmbedding([4, 2, 5], 3)
    fused.load_tables(tables)
    ids = torch.stack([torch.randint(0, n, (6,)) for n in (4, 2, 5)], 1)
    expected = torch.stack([t[i] for t, i in zip(tables, ids.t(), strict=True)], 1)
    torch.testing.assert_close(fused(ids), expected)
    torch.testing.assert_close(fused.fields_first(ids), expected.transpose(0, 1))
    with pytest.raises(ValueError, match=r"field 1 has levels 0\.\.1 \(or -1\), got 2"):
        fused(torch.tensor([[0, 2, 0]]))
    with pytest.raises(ValueError, match=r"expected \(batch, 3\)"):
        fused(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="shapes"):
        fused.load_tables(tables[:2])
    with pytest.raises(ValueError, match="at least one level"):
        model.FieldEmbedding([4, 0], 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspaces": 3}, "embedding size 4 is not divisible by 3 sub-spaces"),
        ({"subspaces": 0}, "number of sub-spaces is 0"),
        ({"layers": -1}, "at least 1 field and 0 layers"),
        ({"activation": "cosine"}, "unknown activation 'cosine'"),
        ({"join": "both"}, "join is 'both'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_pins_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_pin(**options)


# ---- G-FTRL and FTRL -----------------------------------------------------------------------------------------------


def numpy_gftrl(w, n, z, g, alpha, beta, lambda1, lambda2, sigma="formula"):
    """One step on every row, from the formula."""
    w, n, z = w.copy(), n + g**2, z.copy()
    if sigma == "formula":
        z += g - (np.sqrt(n) - np.sqrt(n - g**2)) / alpha * w
    else:
        z += g
    threshold = lambda1 * math.sqrt(w.shape[1])
    for row in range(len(w)):
        r = np.linalg.norm(z[row])
        if r <= threshold:
            w[row] = 0
        else:
            w[row] = z[row] * (threshold / r - 1) / ((beta + np.sqrt(n[row])) / alpha + lambda2)
    return w, n, z


def table(rows: int = 7, size: int = 3, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, size))))


def sparse(rows, values, like) -> torch.Tensor:
    index = torch.as_tensor(rows)[None]
    return torch.sparse_coo_tensor(index, torch.as_tensor(values), like.shape, check_invariants=True)


def test_gftrl_by_hand():
    w = nn.Parameter(torch.zeros(2, 4))
    optimizer = model.GFTRL([w], alpha=1, beta=1, lambda1=0.5, lambda2=0)
    w.grad = torch.tensor([[3.0, 0, 0, 4.0], [0.6, 0, 0, 0.8]])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[-0.6, 0, 0, -0.64], [0, 0, 0, 0]]))


@pytest.mark.parametrize("sigma", ["formula", "none"])
@pytest.mark.parametrize("block", [4, 1 << 16])
def test_gftrl_equals_the_formula(sigma, block, monkeypatch):
    monkeypatch.setattr(model, "BLOCK", block)
    rng = np.random.default_rng(1)
    p = table()
    options = {"alpha": 0.3, "beta": 0.7, "lambda1": 0.8, "lambda2": 0.2}
    optimizer = model.GFTRL([p], **options, sigma=sigma)
    w, n, z = p.detach().numpy().copy(), np.zeros((7, 3)), np.zeros((7, 3))
    zeros = 0
    for _ in range(100):
        g = rng.standard_normal((7, 3))
        g[5] *= 0.05
        w, n, z = numpy_gftrl(w, n, z, g, **options, sigma=sigma)
        p.grad = torch.from_numpy(g)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-8, atol=1e-12)
        zeros += int((w == 0).all(1).sum())
    assert zeros > 50 and (p != 0).any()
    np.testing.assert_allclose(optimizer.state[p]["z"].numpy(), z, rtol=1e-8, atol=1e-10)


def test_gftrl_without_penalties_is_adagrad_from_zero_only():
    rng = np.random.default_rng(2)
    for start, equal in ((0.0, True), (0.5, False)):
        a, b = (nn.Parameter(torch.full((4, 3), start, dtype=torch.float64)) for _ in range(2))
        ours = model.GFTRL([a], alpha=0.1, beta=0.4, lambda1=0, lambda2=0)
        theirs = torch.optim.Adagrad([b], lr=0.1, eps=0.4)
        for _ in range(20):
            g = torch.from_numpy(rng.standard_normal((4, 3)) * (rng.random((4, 3)) < 0.7))
            a.grad, b.grad = g, g.clone()
            ours.step()
            theirs.step()
        assert torch.allclose(a, b) == equal


@pytest.mark.parametrize("sigma", ["formula", "none"])
def test_sparse_gftrl_on_touched_rows_is_the_formula_from_their_initial_values(sigma):
    """Rows that were not met read as zero; the first sigma w term of a row has its random initial value."""
    rng = np.random.default_rng(3)
    p = table(rows=9)
    options = {"alpha": 0.3, "beta": 0.7, "lambda1": 0.4, "lambda2": 0.2}
    optimizer = model.GFTRL([p], **options, sigma=sigma)
    w, n, z = p.detach().numpy().copy(), np.zeros((9, 3)), np.zeros((9, 3))
    met: set[int] = set()
    for step in range(40):
        rows = rng.integers(0, min(8, 2 + step), 5)
        values = rng.standard_normal((5, 3))
        distinct = sorted(set(rows.tolist()))
        g = np.stack([values[rows == r].sum(0) for r in distinct])
        w[distinct], n[distinct], z[distinct] = numpy_gftrl(
            w[distinct], n[distinct], z[distinct], g, **options, sigma=sigma
        )
        p.grad = sparse(rows, values, p)
        optimizer.step()
        met |= set(distinct)
        unmet = sorted(set(range(9)) - met)
        np.testing.assert_allclose(p.detach().numpy()[sorted(met)], w[sorted(met)], rtol=1e-8, atol=1e-12)
        assert (p[unmet] == 0).all()
    assert 8 in unmet


@pytest.mark.parametrize("sigma", ["formula", "none"])
def test_dense_updates_are_exactly_the_dense_algorithm(sigma):
    rng = np.random.default_rng(4)
    a, b = table(), table()
    options = {"alpha": 0.3, "beta": 0.7, "lambda1": 0.4, "lambda2": 0.2, "sigma": sigma}
    thrifty, dense = model.GFTRL([a], **options, dense_updates=True), model.GFTRL([b], **options)
    for _ in range(30):
        rows = rng.integers(0, 7, 4)
        a.grad = sparse(rows, rng.standard_normal((4, 3)), a)
        b.grad = a.grad.to_dense()
        thrifty.step()
        dense.step()
        torch.testing.assert_close(a, b)


def numpy_ftrl(w, n, z, g, lr, l1, l2, power=-0.5):
    new = n + g**2
    z = z + g - (new**-power - n**-power) / lr * w
    w = np.where(np.abs(z) <= l1, 0, (np.sign(z) * l1 - z) / (new**-power / lr + 2 * l2))
    return w, new, z


@pytest.mark.parametrize("power", [-0.5, -0.3])
@pytest.mark.parametrize("block", [4, 1 << 16])
def test_ftrl_equals_the_formula(power, block, monkeypatch):
    monkeypatch.setattr(model, "BLOCK", block)
    rng = np.random.default_rng(5)
    params = [nn.Parameter(torch.from_numpy(rng.standard_normal(s))) for s in ((2, 3, 3), (5,), (1,))]
    optimizer = model.FTRL(params, lr=0.2, l1=0.6, l2=0.1, lr_power=power)
    states = [(p.detach().numpy().copy(), np.full(p.shape, 0.1), np.zeros(p.shape)) for p in params]
    zeros = 0
    for _ in range(100):
        for i, p in enumerate(params):
            g = rng.standard_normal(p.shape)
            states[i] = numpy_ftrl(*states[i], g, 0.2, 0.6, 0.1, power)
            p.grad = torch.from_numpy(g)
        optimizer.step()
        for p, (w, _, _) in zip(params, states, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-8, atol=1e-12)
            zeros += int((w == 0).sum())
    assert zeros > 10


def test_ftrl_with_a_large_l1_is_zero_and_leaves_unmet_rows_alone():
    p = table()
    before = p.detach().clone()
    optimizer = model.FTRL([p], l1=1e6)
    p.grad = sparse([1, 4, 1], np.ones((3, 3)), p)
    optimizer.step()
    assert (p[[1, 4]] == 0).all()
    torch.testing.assert_close(p.detach()[[0, 2, 3, 5, 6]], before[[0, 2, 3, 5, 6]])
    q = table()
    strict = model.FTRL([q], l1=0.0, dense_updates=True)
    q.grad = sparse([1], np.ones((1, 3)), q)
    strict.step()
    assert (q[[0, 2, 3, 4, 5, 6]] == 0).all() and (q[1] != 0).all()


def test_coalesce_sums_duplicates():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (400,), generator=generator)
    values = torch.randn(400, 5, generator=generator)
    expected = torch.sparse_coo_tensor(rows[None], values, (60, 5), check_invariants=False).coalesce()
    index, summed = model.coalesce(rows, values)
    assert torch.equal(index, expected.indices()[0])
    torch.testing.assert_close(summed, expected.values())
    assert len(model.coalesce(rows[:0], values[:0])[0]) == 0


def test_lookup_has_the_gradient_of_an_embedding():
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(-1, n, (30,), generator=generator) for n in (4, 6)], 1)
    for sparse_table in (False, True):
        made = model.FieldEmbedding([4, 6], 3, sparse=sparse_table)
        factor = torch.randn(2, 30, 3, generator=generator)
        (made.fields_first(ids) * factor).sum().backward()
        found = made.table.weight.grad
        assert found.is_sparse == sparse_table
        if sparse_table:
            rows = found._indices()[0]
            assert (rows[1:] > rows[:-1]).all(), "every row once"
        made.table.weight.grad = None
        (made.table(made.rows(ids).t()) * factor).sum().backward()
        expected = made.table.weight.grad
        torch.testing.assert_close(found.to_dense(), expected.to_dense())
        assert (found.to_dense()[-1] == 0).all()


def test_a_sparse_step_works_on_the_touched_rows_only():
    """Elements that the second step writes do not grow with the table."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            # an in-place write of rows returns the whole table; what it writes are the rows given to it
            if isinstance(out, torch.Tensor) and "index_copy" not in str(function) and not out.is_sparse:
                self.elements += 0 if out._is_view() else out.numel()
            return out

    counts = []
    for levels in (10_000, 1_000_000):
        made = model.XDeepInt([levels], 8, sparse=True, layers=1, subspaces=1)
        tables, rest = model.split_parameters(made)
        optimizers = [model.GFTRL(tables, lambda1=0.1), model.FTRL(rest)]
        ids = torch.arange(200)[:, None]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with Count() as count:
                made(ids).sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
        counts.append(count.elements)
    assert counts[0] == counts[1] < 200 * 8 * 60


def test_optimisers_resume_from_plain_tensors(tmp_path):
    def fresh():
        p = table(rows=6, seed=8)
        return p, model.GFTRL([p], alpha=0.3, lambda1=0.2, lambda2=0.1)

    gradients = [sparse([i % 5, (i * 3) % 5], np.full((2, 3), 1.0 + i), table(rows=6)) for i in range(8)]
    p, optimizer = fresh()
    for i, g in enumerate(gradients):
        if i == 4:
            torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        p.grad = g
        optimizer.step()
    q, resumed = fresh()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        q.copy_(state["p"])
    resumed.load_state_dict(state["optimizer"])
    for g in gradients[4:]:
        q.grad = g
        resumed.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model.GFTRL([table()], lambda1=-1), "must not be negative"),
        (lambda: model.GFTRL([table()], alpha=0), "alpha > 0"),
        (lambda: model.GFTRL([table()], sigma="maybe"), "sigma is 'maybe'"),
        (lambda: model.GFTRL([nn.Parameter(torch.zeros(3))]), r"shape \(3,\)"),
        (lambda: model.FTRL([table()], l1=-1), "must not be negative"),
        (lambda: model.FTRL([table()], lr=0), "lr > 0"),
    ],
)
def test_bad_optimiser_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sparsity_report():
    made = model.XDeepInt([4, 6], 2, layers=1, subspaces=1)
    with torch.no_grad():
        made.embedding.table.weight[:3] = 0
        made.embedding.table.weight[3, 0] = 0
        made.pin.weight.zero_()
    ratios = model.sparsity(made)
    assert ratios["feature_sparse_ratio"] == pytest.approx(0.3)
    assert ratios["embedding_sparse_ratio"] == pytest.approx(7 / 20)
    assert ratios["weight_sparse_ratio"] == pytest.approx(5 / 7)  # the bias begins at zero
    assert ratios["total_sparse_ratio"] == pytest.approx(12 / 27)


# ---- the other models ----------------------------------------------------------------------------------------------

LEVELS = [7, 5, 9, 4]


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(0, n, (11,), generator=generator) for n in LEVELS], 1)


def test_fm_is_the_double_loop(ids):
    fm = model.FM(LEVELS, 3)
    nn.init.normal_(fm.linear.table.weight[:-1])
    x, expected = fm.embedding(ids), fm.first_order(ids)
    for i in range(4):
        for j in range(i + 1, 4):
            expected = expected + (x[:, i] * x[:, j]).sum(1)
    torch.testing.assert_close(fm(ids), expected)


def test_deepfm_without_its_network_is_fm(ids):
    deep, fm = model.DeepFM(LEVELS, 3, hidden=(4,)), model.FM(LEVELS, 3)
    nn.init.zeros_(deep.net[-1].weight)
    nn.init.zeros_(deep.net[-1].bias)
    fm.load_state_dict({k: v for k, v in deep.state_dict().items() if not k.startswith("net")})
    torch.testing.assert_close(deep(ids), fm(ids))


def test_lr_reaches_the_optimum_of_sklearn(ids):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    generator = torch.Generator().manual_seed(3)
    many = torch.stack([torch.randint(0, n, (400,), generator=generator) for n in LEVELS], 1)
    labels = (torch.rand(400, generator=generator) < torch.where(many[:, 0] < 3, 0.7, 0.3)).float()
    lr = model.LR(LEVELS).double()
    penalty = 0.5
    optimizer = torch.optim.LBFGS(lr.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(lr(many), labels.double(), reduction="sum")
        value = value + 0.5 * penalty * lr.linear.table.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    encoder = OneHotEncoder(categories=[range(n) for n in LEVELS], sparse_output=False)
    fitted = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=2000).fit(encoder.fit_transform(many), labels)
    logits = fitted.decision_function(encoder.transform(many))
    np.testing.assert_allclose(lr(many).detach().numpy(), logits, atol=2e-4)


@pytest.mark.parametrize("name", sorted(model.MODELS))
def test_every_model_trains_on_sparse_and_dense_gradients(name, ids):
    """Both kinds of gradient agree; every parameter gets one (DDP needs that)."""
    size = 1 if name == "lr" else 4
    options = {} if name not in ("xdeepint_plus",) else {"hidden": (5,)}
    grads = []
    for sparse_tables in (False, True):
        torch.manual_seed(0)
        made = model.MODELS[name](LEVELS, size, sparse_tables, **options)
        loss = F.binary_cross_entropy_with_logits(made(ids), torch.ones(11))
        loss.backward()
        assert all(p.grad is not None for p in made.parameters())
        grads.append([p.grad.to_dense() if p.grad.is_sparse else p.grad for p in made.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def logit(p: torch.Tensor) -> torch.Tensor:
    return torch.log(p) - torch.log1p(-p)


@pytest.fixture(scope="module")
def deepctr():
    """deepctr-torch's models with the table sizes of this file and weights large enough to tell mistakes."""
    module = pytest.importorskip("deepctr_torch.models", reason="peer deepctr-torch is not installed")
    inputs = importlib.import_module("deepctr_torch.inputs")
    columns = [inputs.SparseFeat(f"f{i}", n, embedding_dim=4) for i, n in enumerate(LEVELS)]

    def make(name, **options):
        made = getattr(module, name)(columns, columns, **options).double()
        for p in made.parameters():
            nn.init.normal_(p, std=0.3)
        return made

    return make


def copy_tables(ours, theirs):
    tables = [theirs.embedding_dict[f"f{i}"].weight for i in range(len(LEVELS))]
    ours.embedding.load_tables(tables)
    if ours.linear is not None:
        ours.linear.load_tables([theirs.linear_model.embedding_dict[f"f{i}"].weight for i in range(len(LEVELS))])
        ours.bias.data.copy_(theirs.out.bias)
    else:  # our models without linear part: switch the peer's off
        for i in range(len(LEVELS)):
            nn.init.zeros_(theirs.linear_model.embedding_dict[f"f{i}"].weight)


def copy_network(net, theirs):
    """A peer's layers and its output without bias."""
    linears = [m for m in net if isinstance(m, nn.Linear)]
    for mine, other in zip(linears[:-1], theirs.dnn.linears, strict=True):
        mine.load_state_dict(other.state_dict())
    linears[-1].weight.data.copy_(theirs.dnn_linear.weight)
    nn.init.zeros_(linears[-1].bias)


def compare(ours, theirs, ids, extra=0.0):
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids), logit(theirs.eval()(ids.double())).squeeze(1) + extra, rtol=1e-7, atol=1e-9
        )


def test_peer_deepctr_fm_and_deepfm(deepctr, ids):
    theirs = deepctr("DeepFM", dnn_hidden_units=())
    ours = model.FM(LEVELS, 4).double()
    copy_tables(ours, theirs)
    compare(ours, theirs, ids)
    theirs = deepctr("DeepFM", dnn_hidden_units=(6, 5))
    ours = model.DeepFM(LEVELS, 4, hidden=(6, 5)).double()
    copy_tables(ours, theirs)
    copy_network(ours.net, theirs)
    compare(ours, theirs, ids)


def test_peer_deepctr_dcn(deepctr, ids):
    theirs = deepctr("DCN", cross_num=3, dnn_hidden_units=(6, 5))
    ours = model.DCN(LEVELS, 4, hidden=(6, 5), crosses=3).double()
    copy_tables(ours, theirs)
    ours.cross.weight.data.copy_(theirs.crossnet.kernels.squeeze(2))
    ours.cross.bias.data.copy_(theirs.crossnet.bias.squeeze(2))
    for mine, other in zip([m for m in ours.net if isinstance(m, nn.Linear)], theirs.dnn.linears, strict=True):
        mine.load_state_dict(other.state_dict())
    ours.output.weight.data.copy_(theirs.dnn_linear.weight)
    ours.output.bias.data.copy_(theirs.out.bias)
    compare(ours, theirs, ids)


def test_peer_deepctr_wide_deep_and_pnn(deepctr, ids):
    theirs = deepctr("WDL", dnn_hidden_units=(6, 5))
    ours = model.DNN(LEVELS, 4, hidden=(6, 5), wide=True).double()
    copy_tables(ours, theirs)
    copy_network(ours.net, theirs)
    compare(ours, theirs, ids)
    module = importlib.import_module("deepctr_torch.models")
    inputs = importlib.import_module("deepctr_torch.inputs")
    columns = [inputs.SparseFeat(f"f{i}", n, embedding_dim=4) for i, n in enumerate(LEVELS)]
    theirs = module.PNN(columns, dnn_hidden_units=(6, 5), use_inner=True, use_outter=True).double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours = model.PNN(LEVELS, 4, hidden=(6, 5), product="both").double()
    ours.embedding.load_tables([theirs.embedding_dict[f"f{i}"].weight for i in range(4)])
    # theirs sums over the first axis with x_i, ours multiplies x_i from the left
    ours.kernel.data.copy_(theirs.outterproduct.kernel.permute(1, 2, 0))
    copy_network(ours.net, theirs)
    compare(ours, theirs, ids, extra=-theirs.out.bias)


def test_peer_deepctr_xdeepfm_autoint_fibinet(deepctr, ids):
    theirs = deepctr(
        "xDeepFM", dnn_hidden_units=(6, 5), cin_layer_size=(5, 3), cin_split_half=False, cin_activation="linear"
    )
    ours = model.XDeepFM(LEVELS, 4, hidden=(6, 5), maps=(5, 3)).double()
    copy_tables(ours, theirs)
    copy_network(ours.net, theirs)
    previous = 4
    for layer, conv in zip(ours.cin.maps, theirs.cin.conv1ds, strict=True):
        # their channels run over (previous map, field), ours over (field, previous map)
        kernel = conv.weight.squeeze(2).view(-1, previous, 4).transpose(1, 2)
        layer.weight.data.copy_(kernel.reshape(len(kernel), -1))
        layer.bias.data.copy_(conv.bias)
        previous = len(kernel)
    ours.cin.output.weight.data.copy_(theirs.cin_linear.weight)
    nn.init.zeros_(ours.cin.output.bias)
    compare(ours, theirs, ids)

    theirs = deepctr("AutoInt", dnn_hidden_units=(), att_layer_num=2, att_head_num=2)
    ours = model.AutoInt(LEVELS, 4, attention=4, layers=2, heads=2).double()
    copy_tables(ours, theirs)
    for layer, other in zip(ours.maps, theirs.int_layers, strict=True):
        layer.weight.data.copy_(torch.cat([other.W_Query, other.W_key, other.W_Value, other.W_Res], 1).t())
    ours.output.weight.data.copy_(theirs.dnn_linear.weight)
    ours.output.bias.data.copy_(theirs.out.bias)
    compare(ours, theirs, ids)

    theirs = deepctr("FiBiNET", dnn_hidden_units=(6, 5), bilinear_type="interaction")
    ours = model.FiBiNET(LEVELS, 4, hidden=(6, 5)).double()
    copy_tables(ours, theirs)
    ours.senet.load_state_dict(theirs.SE.excitation.state_dict())
    kernel = torch.stack([layer.weight.t() for layer in theirs.Bilinear.bilinear])
    ours.bilinear.data.copy_(torch.stack([kernel, kernel]))  # the peer shares one kernel
    copy_network(ours.net, theirs)
    first = next(m for m in ours.net if isinstance(m, nn.Linear))
    first.weight.data.copy_(torch.cat(theirs.dnn.linears[0].weight.chunk(2, 1)[::-1], 1))  # SENET comes first there
    compare(ours, theirs, ids)


def test_peer_fuxictr_blocks(ids):
    layers = pytest.importorskip("fuxictr.pytorch.layers", reason="peer fuxictr is not installed")
    features = importlib.import_module("fuxictr.features")
    feature_map = features.FeatureMap("test", ".")
    for i, n in enumerate(LEVELS):
        feature_map.features[f"f{i}"] = {"type": "categorical", "vocab_size": n}
    feature_map.num_fields = len(LEVELS)
    inputs = {f"f{i}": ids[:, i] for i in range(len(LEVELS))}
    embed = layers.FeatureEmbedding(feature_map, 4)
    fm_block = layers.FactorizationMachine(feature_map)
    cross, cin = layers.CrossNet(16, 3), layers.CompressedInteractionNet(4, [5, 3])
    mlp = layers.MLP_Block(16, hidden_units=[6, 5], output_dim=1)
    for block in (embed, fm_block, cross, cin, mlp):
        for p in block.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    x = embed(inputs)
    tables = [embed.embedding_layer.embedding_layers[f"f{i}"].weight for i in range(4)]
    fm = model.FM(LEVELS, 4)
    fm.embedding.load_tables(tables)
    linear = fm_block.lr_layer.embedding_layer.embedding_layer.embedding_layers
    fm.linear.load_tables([linear[f"f{i}"].weight for i in range(4)])
    fm.bias.data.copy_(fm_block.lr_layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(fm(ids), fm_block(inputs, x).squeeze(1))
        deepfm = model.DeepFM(LEVELS, 4, hidden=(6, 5))
        deepfm.load_state_dict(fm.state_dict(), strict=False)
        deepfm.net.load_state_dict(mlp.mlp.state_dict())
        torch.testing.assert_close(deepfm(ids), (fm_block(inputs, x) + mlp(x.flatten(1))).squeeze(1))
        dcn = model.DCN(LEVELS, 4, hidden=(6, 5), crosses=3)
        dcn.embedding.load_tables(tables)
        for i, layer in enumerate(cross.cross_net):
            dcn.cross.weight.data[i] = layer.weight.weight[0]
            dcn.cross.bias.data[i] = layer.bias
        hidden = nn.Sequential(*list(mlp.mlp)[:-1])
        dcn.net.load_state_dict(hidden.state_dict())
        both = torch.cat([cross(x.flatten(1)), hidden(x.flatten(1))], 1)
        torch.testing.assert_close(dcn(ids), dcn.output(both).squeeze(1))
        ours = model.CIN(4, (5, 3))
        for mine, other in zip(ours.maps, cin.cin_layer.values(), strict=True):
            mine.weight.data.copy_(other.weight.squeeze(2))
            mine.bias.data.copy_(other.bias)
        ours.output.load_state_dict(cin.fc.state_dict())
        torch.testing.assert_close(ours(x), cin(x).squeeze(1))


# ---- data ----------------------------------------------------------------------------------------------------------


def test_planted_data_have_the_order_they_are_said_to_have():
    pairs, again = data.planted("pairs", 5, 30_000), data.planted("pairs", 5, 30_000)
    assert torch.equal(pairs.table.ids, again.table.ids) and torch.equal(pairs.table.labels, again.table.labels)
    assert [len(p) for p in (pairs.train, pairs.valid, pairs.test)] == [30_000, 4_000, 10_000]
    labels, logits = pairs.table.labels, pairs.bayes
    assert 0.78 < ctr.auc(labels, logits) < 0.86
    assert abs(float(torch.sigmoid(logits).mean()) - float(labels.float().mean())) < 0.01
    noise = data.planted("noise", 5, 3000)
    assert noise.table.levels == (20,) * 8 + (200, 200) and int(noise.table.ids[:, 8:].max()) > 150
    with pytest.raises(ValueError, match="kind is"):
        data.planted("quadruples", 0)


def test_division_of_rows():
    u = data.row_uniform(0, 200_000, 3)
    assert np.array_equal(data.row_uniform(1000, 50, 3), u[1000:1050])  # whatever the block
    assert abs(u.mean() - 0.5) < 0.005 and abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.01
    train, valid, test = data.divide(200_000, "random", 3)
    sizes = [len(part) / 200_000 for part in (train, valid, test)]
    np.testing.assert_allclose(sizes, [0.7, 0.1, 0.2], atol=0.005)
    assert len(torch.cat([train, valid, test]).unique()) == 200_000
    train, valid, test = data.divide(2500, "modulo", 0)
    assert len(valid) == 0 and [r % 1000 for r in test[:2].tolist()] == [801, 802] and len(train) == 801 * 2 + 500
    expected = [i for i in range(2500) if float(i) % 1000.0 / 1000.0 <= 0.80]  # the official script's expression
    assert train.tolist() == expected


def test_movielens_of_the_wheel():
    if ctr.recbole_movielens() is None:
        pytest.skip("the wheel recbole is not installed")
    split = data.movielens(None, 1)
    assert sum(split.table.levels) == 2833 and len(split.table) == 100_000
    assert "recbole" not in sys.modules
    assert [p.name for p in data.sources("ml100k", None)] == ["ml-100k.inter", "ml-100k.item", "ml-100k.user"]


def test_frappe_reader(tmp_path):
    rng = np.random.default_rng(0)
    for name, rows in zip(data.FRAPPE, (30, 5, 8), strict=True):
        lines = []
        for _ in range(rows):
            ids = " ".join(f"{100 * f + rng.integers(0, 4)}:1" for f in range(10))
            lines.append(f"{rng.choice([-1, 1])} {ids}\n")
        (tmp_path / name).write_text("".join(lines))
    split = data.frappe(tmp_path)
    assert [len(p) for p in (split.train, split.valid, split.test)] == [30, 5, 8]
    assert max(split.table.levels) <= 4 and set(split.table.labels.tolist()) == {0, 1}
    (tmp_path / data.FRAPPE[1]).write_text("1 " + "3:1 " * 10 + "\n1 3:1 4:1\n")
    with pytest.raises(UserError, match=r"validation\.libfm, line 2: 2 fields found, expected 10"):
        data.frappe(tmp_path)
    with pytest.raises(UserError, match=r"no file .*frappe\.train\.libfm"):
        data.frappe(tmp_path / "nowhere")


def criteo_file(folder: Path, rows: int = 3000, seed: int = 0) -> None:
    """A file in Criteo's layout whose label depends on two columns."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        numbers = [("" if rng.random() < 0.2 else str(int(rng.integers(-2, 200)))) for _ in range(13)]
        words = [("" if rng.random() < 0.1 else f"{int(rng.integers(0, 12)):08x}") for _ in range(26)]
        label = int(rng.random() < (0.7 if words[0] in ("00000001", "00000002", "00000005") else 0.2))
        lines.append("\t".join([str(label), *numbers, *words]) + "\n")
    (folder / "train.txt").write_text("".join(lines))


def test_criteo_presets_read_the_official_layout(tmp_path, run_paper):
    criteo_file(tmp_path)
    found = run_paper(SLUG, ["--preset", "criteo", "--data", tmp_path, "--check-data"])
    assert found.code == 0 and "3,000 rows (expected 45,840,617), 39 fields" in found.out, found.err
    small = ["--data", tmp_path, "--cache", tmp_path / "cache", "--batch", "256", "--layers", "1", "--subspaces", "2"]
    small += ["--min-count", "5", "--eval-every", "4", "--gftrl-lambda1", "0.5", "--epochs", "1", "--device", "cpu"]
    for preset, fields in (("criteo", 39), ("criteo-code", 38)):
        out = tmp_path / preset
        done = run_paper(SLUG, ["--preset", preset, *small, "--out", out])
        assert done.code == 0, done.err
        result = json.loads((out / "result.json").read_text())
        assert result["data"][0]["kind"] == "real" and "criteo/xdeepint/test_auc" in result["metrics"]
        rows = {row["metric"]: row for row in result["reported"]}
        assert rows["criteo/xdeepint/test_auc"]["comparable"] and rows["criteo/xdeepint/test_auc"]["value"] == 0.8111
        assert "criteo/xdeepint/feature_sparse_ratio" in rows
        metas = [json.loads(p.read_text()) for p in (tmp_path / "cache").glob("*/meta.json")]
        assert fields in {len(meta["fields"]) for meta in metas}


def test_real_rows_of_criteo_and_avazu(data_root, tmp_path, run_paper):
    folder = data_root / "ctr-raw-samples"
    if not folder.is_dir():
        pytest.skip("no ctr-raw-samples")
    for name, source, target, fields in (
        ("criteo", "criteo_train_8000.txt.gz", "train.txt.gz", 39),
        ("avazu", "avazu_train_8999.csv.gz", "train.csv.gz", 21),
    ):
        (tmp_path / target).symlink_to(folder / source)
        split = data.load_text(name, tmp_path, cache=tmp_path / "cache")
        assert len(split.table.fields) == fields
        clicks = {"criteo": (8000, 1728), "avazu": (8999, 1563)}[name]
        assert (len(split.table), int(split.table.labels.sum())) == clicks
    out = tmp_path / "out"
    words = ["--preset", "avazu", "--data", tmp_path, "--cache", tmp_path / "cache", "--out", out, "--device", "cpu"]
    words += ["--batch", "512", "--epochs", "2", "--eval-every", "10", "--gftrl-alpha", "0.1", "--gftrl-lambda1", "0.5"]
    done = run_paper(SLUG, words)
    assert done.code == 0, done.err
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    assert metrics["avazu/xdeepint/test_auc"]["mean"] > 0.55


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--subspaces", "3"], "embedding size 4 is not divisible by 3 sub-spaces"),
        (["--layers", "-1"], "--layers is -1, expected at least 0"),
        (["--gftrl-lambda1", "-2"], "--gftrl-lambda1 is -2.0, expected at least 0"),
        (["--adam-lr", "0"], "--adam-lr is 0.0, expected a number above 0"),
        (["--arms", "criteo/catboost"], "unknown model 'catboost'"),
        (["--arms", "netflix/fm"], "unknown data set 'netflix'"),
        (["--arms", "pairs/fm:colour=red"], "'colour=red' is not flag=value"),
        (["--arms", "pairs/fm:layers=many"], "'many' is no value for layers"),
        (["--arms", "pairs/fm:optimizer=sgd"], "optimizer is 'sgd', expected one of paper"),
        (["--arms", "ml100k/bayes"], "generating model is known for pairs, triples, noise only"),
        (["--arms", "pairs/fm", "pairs/fm"], "names an arm twice"),
        (["--per-data", "pairs"], "expected DATA:flag=value"),
        (["--preset", "criteo"], "needs --data DIR"),
        (["--arms", "criteo/fm"], "criteo needs --data DIR"),
        (["--arms", "pairs/pnn", "--hidden", "0"], "expected widths of at least 1"),
        (["--arms", "pairs/autoint", "--attention", "5"], "attention width 5 is not divisible by 2 heads"),
    ],
)
def test_bad_usage_is_one_line(words, message, run_paper, tmp_path):
    result = run_paper(SLUG, [*words, "--out", tmp_path / "out", "--device", "cpu"])
    assert result.code == 2 and len(result.errors) == 1 and message in result.errors[0], result.err
    assert "Traceback" not in result.err


def bad_criteo(folder: Path, line: int, text: str) -> None:
    criteo_file(folder, 200)
    lines = (folder / "train.txt").read_text().splitlines()
    lines[line - 1] = text
    (folder / "train.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: bad_criteo(d, 17, "1\t2\t3"), "train.txt, line 17: 3 columns found, expected 40"),
        (lambda d: bad_criteo(d, 9, "\t".join(["2", *["1"] * 39])), "line 9: label is '2', expected 0 or 1"),
        (lambda d: bad_criteo(d, 5, "\t".join(["1", "x", *["1"] * 38])), "line 5: I1 is 'x', expected an integer"),
        (lambda d: criteo_file(d, 30), "no level occurs at least 20 times; try a lower --min-count"),
        (lambda d: (d / "other.txt").touch(), "expected train.txt or train.txt.gz (Criteo AI Lab, dac.tar.gz)"),
    ],
)
def test_bad_data_is_one_line(spoil, message, run_paper, tmp_path):
    (tmp_path / "raw").mkdir()
    spoil(tmp_path / "raw")
    words = ["--preset", "criteo", "--data", tmp_path / "raw", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    result = run_paper(SLUG, [*words, "--device", "cpu"])
    assert result.code == 2 and len(result.errors) == 1 and message in result.errors[0], result.err


def test_one_class_only_and_a_diverging_run(run_paper, tmp_path, train, monkeypatch):
    criteo_file(tmp_path, 600)
    text = (tmp_path / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join("0" + line[1:] for line in text) + "\n")
    words = ["--preset", "criteo", "--data", tmp_path, "--cache", tmp_path / "cache", "--min-count", "2"]
    words += ["--batch", "128", "--epochs", "1", "--layers", "1", "--subspaces", "1", "--device", "cpu"]
    result = run_paper(SLUG, [*words, "--out", tmp_path / "one"])
    assert result.code == 2 and "AUC undefined: only class 0 present" in result.errors[0], result.err
    words = ["--preset", "smoke", "--arms", "pairs/xdeepint:optimizer=adam", "--adam-lr", "1e9", "--layers", "3"]
    result = run_paper(SLUG, [*words, "--out", tmp_path / "nan", "--device", "cpu"])
    assert result.code == 2 and "largest |logit|" in result.errors[0] and "fewer layers" in result.errors[0], result.err


def test_a_broken_method_fails_its_claims(train, monkeypatch, tmp_path, capsys):
    """Sub-spaces that are not cut: the claim on bit-wise interactions must fall, in a small version of the default."""
    arms = [f"pairs/{model}" for model in train.PAIRS if "layers=1" in model or model == "fm"]
    words = ["--arms", *arms, "--planted-rows", "40000", "--epochs", "5", "--seeds", "1", "--device", "cpu"]

    def verdicts(out: Path) -> dict[str, bool]:
        assert train.main([*words, "--out", str(out)]) == 0, capsys.readouterr().err
        return {c["name"]: c["holds"] for c in json.loads((out / "result.json").read_text())["claims"]}

    names = {"subspaces_add_bitwise_interactions", "beats_fm_on_bitwise_interactions"}
    healthy = verdicts(tmp_path / "healthy")
    assert set(healthy) == names and all(healthy.values())

    class OneSpace(train.XDeepInt):
        def __init__(self, *args, subspaces, **options):
            super().__init__(*args, subspaces=1, **options)

    monkeypatch.setitem(train.MODELS, "xdeepint", OneSpace)
    assert not any(verdicts(tmp_path / "broken").values())


def test_stop_and_resume_inside_a_sparse_arm(run_paper, tmp_path):
    words = ["--preset", "smoke", "--arms", "noise/xdeepint:sparse=true,optimizer=gftrl", "noise/fm:sparse=true"]
    words += ["--eval-every", "3", "--patience", "1", "--device", "cpu"]
    assert run_paper(SLUG, [*words, "--out", tmp_path / "whole"]).code == 0
    assert run_paper(SLUG, [*words, "--out", tmp_path / "part", "--stop-after", "5"]).code == 0
    assert run_paper(SLUG, ["--resume", tmp_path / "part", "--stop-after", "6"]).code == 0
    assert run_paper(SLUG, ["--resume", tmp_path / "part"]).code == 0
    whole, part = (json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("whole", "part"))
    assert whole == part and len(whole) >= 4


def test_two_processes_take_the_same_steps_as_one(tmp_path, root):
    """Sum loss with sparse tables, mean loss with dense ones: losses of a shared global batch agree to 1e-5."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    words = ["train.py", "--preset", "smoke", "--device", "cpu", "--eval-every", "3"]
    words += ["--arms", "noise/xdeepint:optimizer=gftrl,sparse=true,gftrl_lambda1=1", "pairs/deepfm:hidden=16x16"]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    folder = root / "papers" / SLUG
    runs = {
        "one": [sys.executable, *words, "--micro-batch", "200"],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words],
    }
    losses, metrics = {}, {}
    for name, command in runs.items():
        out = tmp_path / name
        done = subprocess.run(
            [*command, "--out", str(out)], cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        losses[name] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics[name] = json.loads((out / "result.json").read_text())["metrics"]
    assert len(losses["one"]) == 16
    np.testing.assert_allclose(losses["one"], losses["two"], atol=1e-5)
    for name, values in metrics["one"].items():
        assert metrics["two"][name]["mean"] == pytest.approx(values["mean"], abs=1e-4), name
