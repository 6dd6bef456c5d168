"""GGCN: the equations' oracles, numbers of the official code, peers, the loaders, bad input and the claims."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from papers.ggcn import data, model
from papers.ggcn.model import (
    GAT,
    GCN,
    GCNII,
    GGCN,
    GPRGNN,
    MLP,
    Adjacency,
    GGCNLayer,
    PairNormGCN,
    Pattern,
    SparseMatrix,
)
from shared import graphs
from shared.errors import UserError


@pytest.fixture(scope="module")
def small() -> tuple[SparseMatrix, Adjacency, data.NodeData]:
    """A generated graph of 120 nodes."""
    made = data.generate(0.3, torch.Generator().manual_seed(0), nodes=120, vocabulary=60)
    return SparseMatrix.of(made.features), Adjacency.from_edges(made.edges, 120), made


def undirected(*pairs: tuple[int, int]) -> Tensor:
    edges = torch.tensor(pairs).t()
    return torch.cat([edges, edges.flip(0)], 1)


STAR = undirected((0, 1), (0, 2), (0, 3))


def shake(module: torch.nn.Module) -> Any:
    """Move every parameter off its start, so that no term of the network is trivial."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


# ---- oracles of the equations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
def test_star(sparse: bool) -> None:
    graph = Adjacency.from_edges(STAR, 4)
    hat, relative = graph.dense
    assert torch.allclose(hat[0], torch.tensor([0.25, 0.35355, 0.35355, 0.35355]), atol=1e-5)
    assert torch.allclose(hat.diagonal(), torch.tensor([0.25, 0.5, 0.5, 0.5]))
    assert relative[0, 1].item() == pytest.approx(-0.2929, abs=1e-4)
    assert relative[1, 0].item() == pytest.approx(0.4142, abs=1e-4)
    assert torch.equal(relative.diagonal(), torch.zeros(4))
    layer = GGCNLayer(2, 2, use_sparse=sparse)
    assert torch.allclose(layer.degree_correction(relative), F.softplus(0.5 * relative))
    h = torch.randn(4, 2)
    unit = F.normalize(h)
    message = (unit @ unit.t() - torch.eye(4)) * hat * F.softplus(0.5 * relative)
    expected = math.log1p(math.exp(2)) / 3 * (message.relu() @ h - (-message).relu() @ h + h)
    assert torch.allclose(layer.propagate(h, graph), expected, atol=1e-6)


def test_row_normalization() -> None:
    hat = Adjacency.from_edges(STAR, 4, "row").hat.dense()
    assert torch.allclose(hat.sum(1), torch.ones(4))
    assert hat[0, 1].item() == 0.25
    assert hat[1, 0].item() == 0.5


def test_directed_edges_and_loops() -> None:
    """Rows are sources, degrees are row sums, and a loop of A makes a 2 on the diagonal of A + I."""
    graph = Adjacency.from_edges(torch.tensor([[0, 1], [1, 1]]), 3)  # degrees of A + I: 2, 2, 1
    assert torch.allclose(graph.hat.dense(), torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]))
    assert torch.allclose(graph.diagonal, torch.tensor([0.5, 1.0, 1.0]))


@pytest.mark.parametrize("sparse", [True, False])
def test_no_neighbours(sparse: bool) -> None:
    graph = Adjacency.from_edges(torch.empty(2, 0, dtype=torch.long), 3)
    h = torch.randn(3, 4)
    assert torch.allclose(GGCNLayer(4, 4, use_sparse=sparse).propagate(h, graph), 0.70898 * h, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_neighbour_of_the_other_sign_becomes_support(sparse: bool) -> None:
    graph = Adjacency.from_edges(undirected((0, 1)), 2)
    layer = GGCNLayer(3, 3, use_sparse=sparse)
    row = torch.tensor([[1.0, -2.0, 0.5]])
    same = layer.propagate(row.repeat(2, 1), graph)
    opposite = layer.propagate(torch.cat([row, -row]), graph)
    assert torch.allclose(same[0], opposite[0])  # b0 = b1 at the start: -b1 relu(-M) (-H) is + b0 relu(M) H
    with torch.no_grad():
        layer.coeff[1] = -9.0  # switch the negative messages off
    assert torch.allclose(layer.propagate(row.repeat(2, 1), graph)[1], 1.5 * same[0], atol=1e-3)
    alone = layer.message_weights()[2] * row[0]
    assert torch.allclose(layer.propagate(torch.cat([row, -row]), graph)[0], alone, atol=1e-3)


def test_decay() -> None:
    for layer, value in ((3, 0.036368), (4, 0.015504), (5, 0.007968), (10, 0.001000)):
        assert model.decay(layer) == pytest.approx(value, abs=6e-7)
    assert model.decay(3, 0.9) == pytest.approx(0.032790, abs=1e-6)
    assert model.decay(4, 0.9) == pytest.approx(0.013965, abs=1e-6)
    assert model.decay(3, 0.02) == pytest.approx(0.000740, abs=1e-6)
    assert GGCN(3, layers=4).weights == [1.0, model.decay(3), model.decay(4)]
    assert GGCN(3, layers=4, use_decay=False).weights == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("sparse", [True, False])
def test_without_its_parts_a_layer_is_a_graph_convolution(small: Any, sparse: bool) -> None:
    _, graph, _ = small
    layer = GGCNLayer(5, 4, use_degree=False, use_sign=False, use_decay=False, use_sparse=sparse)
    assert [name for name, _ in layer.named_parameters()] == ["fcn.weight", "fcn.bias"]
    x = torch.randn(120, 5)
    assert torch.allclose(layer(x, graph), graph.hat.dense() @ layer.fcn(x), atol=1e-6)


def test_absolute_is_signed_where_no_cosine_is_negative(small: Any) -> None:
    _, graph, _ = small
    signed = shake(GGCNLayer(4, 4))
    absolute = GGCNLayer(4, 4, absolute=True)
    absolute.load_state_dict(signed.state_dict())
    h = torch.randn(120, 4)
    assert torch.equal(signed.propagate(h.abs(), graph), absolute.propagate(h.abs(), graph))
    assert not torch.allclose(signed.propagate(h, graph), absolute.propagate(h, graph))


@pytest.mark.parametrize("sparse", [True, False])
def test_scaling_and_permutation(small: Any, sparse: bool) -> None:
    _, graph, made = small
    layer = shake(GGCNLayer(4, 4, use_sparse=sparse))
    h = torch.randn(120, 4)
    out = layer.propagate(h, graph)
    assert torch.allclose(layer.propagate(3.7 * h, graph), 3.7 * out, rtol=1e-4, atol=1e-5)
    order = torch.randperm(120)
    moved = torch.empty(120, 4)
    moved[order] = h
    again = layer.propagate(moved, Adjacency.from_edges(order[made.edges], 120))
    assert torch.allclose(again[order], out, rtol=1e-4, atol=1e-5)


SWITCHES = [
    {"use_degree": degree, "use_sign": sign, "use_decay": decay}
    for degree in (True, False)
    for sign in (True, False)
    for decay in (True, False)
] + [{"use_degree": True, "use_sign": True, "use_decay": False, "absolute": True}]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("-+"[v] for v in s.values()))
def test_dense_is_sparse(small: Any, switches: dict[str, bool]) -> None:
    x, graph, made = small
    networks = [shake(GGCN(60, 4, 6, 5, dropout=0.0, **switches))]
    networks.append(GGCN(60, 4, 6, 5, dropout=0.0, use_sparse=False, **switches))
    networks[1].load_state_dict(networks[0].state_dict())
    out = [networks[0](x, graph), networks[1](x.dense(), graph.hat.dense())]
    assert torch.allclose(out[0], out[1], rtol=1e-4, atol=1e-5)
    for values in out:
        F.nll_loss(values, made.labels).backward()
    for left, right in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.allclose(left.grad, right.grad, rtol=1e-3, atol=1e-6)


def test_gradient_of_the_mixture_sums_to_zero(small: Any) -> None:
    x, graph, made = small
    network = shake(GGCN(60, 3, 6, 5))
    F.nll_loss(network(x, graph), made.labels).backward()
    for conv in network.convs:
        assert conv.coeff.grad.abs().max() > 1e-6
        assert conv.coeff.grad.sum().abs() < 1e-7 + 1e-5 * conv.coeff.grad.abs().max()


def test_a_zero_row_has_a_finite_gradient() -> None:
    graph = Adjacency.from_edges(STAR, 4)
    for sparse in (True, False):
        h = torch.randn(4, 3)
        h[1] = 0.0
        h.requires_grad_()
        out = GGCNLayer(3, 3, use_sparse=sparse).propagate(h, graph)
        out.sum().backward()
        assert torch.equal(out[1], torch.zeros(3))
        assert h.grad.isfinite().all()


def test_large_lambda_does_not_overflow() -> None:
    layer = GGCNLayer(3, 3, use_sparse=False)
    with torch.no_grad():
        layer.deg_coeff.copy_(torch.tensor([1e30, 0.0]))
    h = torch.randn(4, 3)
    assert layer.propagate(h, Adjacency.from_edges(undirected((0, 1), (2, 3)), 4)).isfinite().all()


# ---- sparse products -------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["kernels", "gather"])
def pattern(request: pytest.FixtureRequest) -> Pattern:
    made = Pattern.of(torch.tensor([3, 0, 0, 2, 0, 2]), torch.tensor([1, 2, 0, 2, 2, 0]), (4, 3))
    made.kernels = made.t.kernels = request.param
    return made


def test_pattern(pattern: Pattern) -> None:
    assert pattern.row.tolist() == [0, 0, 2, 2, 3]
    assert pattern.col.tolist() == [0, 2, 0, 2, 1]
    assert pattern.crow.tolist() == [0, 2, 2, 4, 5]
    values = torch.arange(1.0, 6.0)
    dense = SparseMatrix(pattern, values).dense()
    assert torch.equal(SparseMatrix(pattern.t, values[pattern.perm]).dense(), dense.t())
    assert torch.equal(SparseMatrix(pattern.t.t, values).dense(), dense)
    assert torch.equal(SparseMatrix.of(dense).dense(), dense)
    assert torch.equal(SparseMatrix.of(dense.to_sparse_csr()).dense(), dense)
    block = SparseMatrix(pattern.block_diagonal(2), values.repeat(2)).dense()
    assert torch.equal(block, torch.block_diag(dense, dense))
    assert len(pattern) == 5
    for width in (1, 3, 8, 13):
        h = torch.randn(3, width)
        assert torch.allclose(model.edge_sum(pattern, values, h), dense @ h, atol=1e-5)
        a = torch.randn(4, width)
        products = model.edge_dot(pattern, a, h)
        assert torch.allclose(products, (a @ h.t())[pattern.row, pattern.col], atol=1e-5)


def test_gradients_of_the_products(pattern: Pattern) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda v, h: model.edge_sum(pattern, v, h), (make(5), make(3, 2)))
        assert check(lambda a, b: model.edge_dot(pattern, a, b), (make(4, 2), make(3, 2)))
    square = Pattern(pattern.row, pattern.col, (4, 4))
    square.kernels = square.t.kernels = pattern.kernels
    assert torch.autograd.gradcheck(lambda h: model.edge_cosine(square, h), (make(4, 3),))


def test_half_precision_is_widened(pattern: Pattern) -> None:
    h = torch.randn(3, 2).bfloat16()
    out = model.edge_sum(pattern, torch.ones(5).bfloat16(), h)
    assert out.dtype == torch.float32


def test_dropout_keeps_the_mean_and_the_pattern() -> None:
    x = torch.ones(400, 500)
    dropped = model.dropout(x, 0.3, True)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert model.dropout(x, 0.3, False) is x
    sparse = SparseMatrix.of(torch.eye(200))
    thinned = model.dropout(sparse, 0.5, True)
    assert thinned.pattern is sparse.pattern
    assert set(thinned.values.tolist()) == {0.0, 2.0}


def test_memory_is_linear_in_the_edges() -> None:
    """A forward and backward pass never makes a tensor of N x N entries."""
    nodes = 3000
    edges = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    graph = Adjacency.from_edges(edges, nodes)
    x = SparseMatrix.of(torch.eye(nodes, 20))
    network = GGCN(20, 3, 8, 3)
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
        network(x, graph).sum().backward()
    assert largest < 50 * 4 * nodes


# ---- the official code -----------------------------------------------------------------------------------------------

DIRECTED = torch.tensor([[0, 0, 1, 2, 2, 3, 4, 4, 5], [1, 2, 0, 2, 3, 4, 0, 5, 3]])
INPUT = (torch.arange(24.0).reshape(6, 4) * 1.7).sin().relu()
HEADS = {f"attention_0_{head}.{name}": shape for head in range(3) for name, shape in (("W", (4, 2)), ("a", (4, 1)))}
HEADS |= {"out_att.W": (6, 3), "out_att.a": (6, 1)}
# Log-probabilities of nodes 0 and 3, and the sum over all, that the official networks give with the weights of
# ``official_state`` (evaluation mode, torch 2.13). Both of its forms of GGCN give the first row.
OFFICIAL: dict[str, tuple[Any, list[float], float]] = {
    "ggcn": (
        lambda: GGCN(4, 4, 5, 3, decay_rate=0.9),
        [-0.90816, -1.39708, -1.05149, -0.95896, -1.32620, -1.04633],
        -20.0309,
    ),
    "ggcn-unsigned": (
        lambda: GGCN(4, 3, 5, 3, decay_rate=0.9, use_sign=False),
        [-0.75738, -1.11302, -1.59683, -0.81345, -1.09098, -1.51055],
        -20.6978,
    ),
    "ggcn-plain": (
        lambda: GGCN(4, 3, 5, 3, use_sign=False, use_degree=False, use_decay=False),
        [-0.39215, -1.50455, -2.28004, -0.51425, -1.38047, -1.89319],
        -24.0650,
    ),
    "gcn": (lambda: GCN(4, 3, 5, 3), [-0.82655, -1.13727, -1.41985, -0.80092, -1.14156, -1.46204], -20.4015),
    "mlp": (lambda: MLP(4, 3, 5, 3), [-2.82261, -1.24865, -0.42517, -2.85176, -1.24949, -0.42220], -27.5423),
    "gcnii": (
        lambda: GCNII(4, 3, 5, 3, lamda=0.5, alpha=0.2),
        [-1.17528, -1.10313, -1.02322, -1.15208, -1.11771, -1.03004],
        -19.8005,
    ),
    "gcnii-star": (
        lambda: GCNII(4, 4, 5, 3, lamda=0.5, alpha=0.3, variant=True),
        [-1.84938, -0.57389, -1.27535, -1.73757, -0.60451, -1.28118],
        -22.1138,
    ),
    "pairnorm": (
        lambda: PairNormGCN(4, 3, 5, 3),
        [-0.89373, -1.11148, -1.34016, -0.86702, -1.12868, -1.36125],
        -20.1399,
    ),
    "gprgnn": (lambda: GPRGNN(4, 4, 5, 3), [-3.58225, -6.39482, -0.02993, -3.77583, -6.62095, -0.02455], -57.8614),
    "gat": (lambda: GAT(4, 2, 2, 3, heads=3), [-0.99441, -1.12647, -1.18456, -1.0808, -1.11563, -1.09971], -19.8044),
    "gat-edges": (
        lambda: GAT(4, 2, 2, 3, heads=3, negative=True),
        [-0.98366, -1.12875, -1.19526, -1.07341, -1.11591, -1.10702],
        -19.8066,
    ),
}


def official_state(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Weights 0.8 cos(0.37 k), numbered through the official names in sorted order."""
    out, k = {}, 0
    for name, shape in sorted(shapes.items()):
        size = math.prod(shape)
        out[name] = ((torch.arange(k, k + size, dtype=torch.float64) * 0.37).cos() * 0.8).reshape(shape)
        k += size
    return out


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name: str) -> None:
    make, expected, total = OFFICIAL[name]
    network = make().eval()
    shapes = (
        HEADS if name.startswith("gat") else {key: tuple(value.shape) for key, value in network.state_dict().items()}
    )
    network.load_state_dict(model.from_official(official_state(shapes)))
    graph = Adjacency.from_edges(DIRECTED, 6)
    for x in (INPUT, SparseMatrix.of(INPUT)):
        for given in (graph, graph.hat.dense(), graph.hat.dense().to_sparse_coo()):
            with torch.no_grad():
                out = network(x, given)
            assert torch.allclose(out[[0, 3]].flatten(), torch.tensor(expected), atol=2e-5)
            assert out.sum().item() == pytest.approx(total, abs=3e-4)
    if name.startswith("ggcn"):
        for layer in network.convs:
            layer.use_sparse = False
        assert torch.allclose(network(INPUT, graph), out, atol=1e-5)


def test_official_names_of_the_state() -> None:
    network = GGCN(7, 3, 4, 2)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    expected = {"fcn.weight": (4, 7), "fcn.bias": (4,)}
    for i, (into, out) in enumerate(((7, 4), (4, 4), (4, 2))):
        expected |= {f"convs.{i}.fcn.weight": (out, into), f"convs.{i}.fcn.bias": (out,)}
        expected |= {f"convs.{i}.deg_coeff": (2,), f"convs.{i}.coeff": (3,), f"convs.{i}.scale": (1,)}
    assert shapes == expected
    normed = GGCN(7, 3, 4, 2, use_decay=False, use_bn=True, scale_init=0.7, deg_intercept_init=0.4)
    assert "norms.1.running_mean" in normed.state_dict()
    assert normed.convs[1].scale.item() == pytest.approx(0.7)
    assert normed.convs[1].deg_coeff.tolist() == pytest.approx([0.4, 0.0])
    assert network.convs[1].scale.item() == 2.0
    assert network.convs[1].deg_coeff.tolist() == [0.5, 0.0]


PARAMETERS = {
    "texas": 54_625,
    "wisconsin": 55_459,
    "cornell": 55_737,
    "cornell_fixed": 55_737,
    "actor": 62_013,
    "squirrel": 133_937,
    "chameleon": 152_227,
    "citeseer": 645_026,
    "cora": 54_359,
    "pubmed": 35_361,
}


def test_presets_at_full_size(train: ModuleType) -> None:
    """Every network of every preset is built on the meta device; GGCN's sizes are counted by hand."""
    seen = set()
    for preset in train.PRESETS.values():
        for job in train.jobs(preset.config):
            generated = preset.config.study == "homophily"
            counts = graphs.EXPECTED[data.FILES[job.graph]] if not generated else {"features": 500, "classes": 5}
            with torch.device("meta"):
                network = train.build(job.network, job.setting, counts["features"], counts["classes"])
            size = sum(p.numel() for p in network.parameters())
            assert size > 0
            if preset.config.study == "table" and job.network == "ggcn":
                assert size == PARAMETERS[job.graph], job.graph
                seen.add(job.graph)
    assert seen == set(PARAMETERS)


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyg() -> ModuleType:
    return pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, Tensor, Adjacency]:
    """x, an undirected edge list without loops, and its A_hat."""
    made = data.generate(0.5, torch.Generator().manual_seed(1), nodes=60, vocabulary=30)
    return made.features.to_dense(), made.edges, Adjacency.from_edges(made.edges, 60)


def test_peer_gcn(pyg: ModuleType, plain: Any) -> None:
    x, edges, graph = plain
    network = GCN(30, 2, 6, 4).eval()
    peers = [pyg.GCNConv(30, 6), pyg.GCNConv(6, 4)]
    for peer, conv in zip(peers, network.convs, strict=True):
        peer.lin.weight.data.copy_(conv.weight.t())
        peer.bias.data.copy_(conv.bias)
    expected = peers[1](peers[0](x, edges).relu(), edges).log_softmax(1)
    assert torch.allclose(network(x, graph), expected, atol=1e-5)


def test_peer_gcn2(pyg: ModuleType, plain: Any) -> None:
    x, edges, graph = plain
    network = GCNII(30, 3, 6, 4, lamda=0.7, alpha=0.2).eval()
    z = first = network.fcs[0](x).relu()
    for l, conv in enumerate(network.convs, start=1):
        peer = pyg.GCN2Conv(6, alpha=0.2, theta=0.7, layer=l)
        peer.weight1.data.copy_(conv.weight)
        z = peer(z, first, edges).relu()
    assert torch.allclose(network(x, graph), network.fcs[1](z).log_softmax(1), atol=1e-5)


def test_peer_pairnorm(pyg: ModuleType) -> None:
    x = torch.randn(9, 4)
    assert torch.allclose(PairNormGCN.pair_norm(x), pyg.PairNorm(scale=1.0, eps=1e-6)(x), atol=1e-6)


def test_peer_gat(pyg: ModuleType, plain: Any) -> None:
    x, edges, graph = plain
    layer = model.GATLayer(30, 4, 3, dropout=0.0)
    peer = pyg.GATConv(30, 4, heads=3, bias=False)
    peer.lin.weight.data.copy_(layer.W.transpose(1, 2).reshape(12, 30))
    peer.att_dst.data.copy_(layer.a[:, :4][None])
    peer.att_src.data.copy_(layer.a[:, 4:][None])
    assert torch.allclose(layer(x, graph), peer(x, edges), atol=1e-5)


def test_peer_appnp(pyg: ModuleType, plain: Any) -> None:
    """At its start GPRGNN is personalised PageRank."""
    x, edges, graph = plain
    network = GPRGNN(30, 5, 6, 4, alpha=0.3).eval()
    z = network.lin2(network.lin1(x).relu())
    assert torch.allclose(network(x, graph), pyg.APPNP(5, 0.3)(z, edges).log_softmax(1), atol=1e-5)


def test_gpr_sums_at_the_targets_of_directed_edges(pyg: ModuleType) -> None:
    network = GPRGNN(4, 3, 5, 3).eval()
    z = network.lin2(network.lin1(INPUT).relu())
    expected = pyg.APPNP(3, 0.1)(z, DIRECTED).log_softmax(1)
    assert torch.allclose(network(INPUT, Adjacency.from_edges(DIRECTED, 6)), expected, atol=1e-5)


# ---- node-level analysis ---------------------------------------------------------------------------------------------


def test_relative_degree() -> None:
    r = model.relative_degree(STAR, 5)
    assert torch.allclose(r[:4], torch.tensor([2**0.5, 0.5**0.5, 0.5**0.5, 0.5**0.5], dtype=torch.float64))
    assert r[4].isnan()


def test_degree_groups() -> None:
    assert model.degree_groups(torch.tensor([0, 1, 2, 4, 8, 16, 32]), 5).tolist() == [-1, 0, 1, 2, 3, 4, 4]
    assert model.degree_groups(torch.tensor([3, 3, 0]), 4).tolist() == [3, 3, -1]
    with pytest.raises(ValueError, match="0 nodes with neighbours"):
        model.degree_groups(torch.zeros(3))


def test_node_analysis_against_loops() -> None:
    made = data.generate(0.4, torch.Generator().manual_seed(3), nodes=150)
    prediction, before = torch.randint(5, (150,)), torch.randint(5, (150,))
    edges, labels, test = made.edges[:, made.edges[0] != 7], made.labels, made.test[0]
    found = model.node_analysis(prediction, before, labels, edges, test, 3)
    neighbours = [edges[1][edges[0] == i].tolist() for i in range(150)]
    logs = [math.log2(len(n)) for n in neighbours if n]
    ends = np.linspace(min(logs), max(logs), 4)
    ends[-1] += 1
    for group in range(3):
        members = [
            i
            for i in range(150)
            if test[i] and neighbours[i] and ends[group] <= math.log2(len(neighbours[i])) < ends[group + 1]
        ]
        assert found["count"][group] == len(members)
        if not members:
            assert found["accuracy"][group].isnan()
            continue
        same = [[n for n in neighbours[i] if labels[n] == labels[i]] for i in members]
        right = [sum(bool(before[n] == labels[n]) for n in s) / len(neighbours[i]) for s, i in zip(same, members)]
        share = [len(s) / len(neighbours[i]) for s, i in zip(same, members)]
        assert found["accuracy"][group].item() == pytest.approx(
            np.mean([bool(prediction[i] == labels[i]) for i in members])
        )
        assert found["homophily"][group].item() == pytest.approx(np.mean(right))
        assert found["original_homophily"][group].item() == pytest.approx(np.mean(share))


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_generated_family(level: float) -> None:
    made = data.generate(level, torch.Generator().manual_seed(1))
    source, target = made.edges
    assert (made.labels[source] == made.labels[target]).double().mean().item() == pytest.approx(level, abs=0.03)
    assert torch.equal(*(torch.unique(e[0] * 1000 + e[1]) for e in (made.edges, made.edges.flip(0))))
    assert (source != target).all()
    assert torch.allclose(made.features.to_dense().sum(1), torch.ones(1000))
    assert made.labels.bincount().tolist() == [200] * 5
    assert [int(mask.sum()) for mask in (made.train, made.val, made.test)] == [480, 320, 200]
    degree = torch.bincount(source, minlength=1000).double()
    assert degree.max() > 4 * degree.mean()
    again = data.generate(level, torch.Generator().manual_seed(1))
    assert torch.equal(made.edges, again.edges)
    assert torch.equal(made.features.to_dense(), again.features.to_dense())
    assert not torch.equal(made.labels, data.generate(level, torch.Generator().manual_seed(2)).labels)


def test_generator_refuses() -> None:
    with pytest.raises(ValueError, match=r"homophily is 1\.5, expected 0 to 1"):
        data.generate(1.5, torch.Generator())
    with pytest.raises(ValueError, match="expected N >= 10 C"):
        data.generate(0.5, torch.Generator(), nodes=20)


def test_node_data_refuses(small: Any) -> None:
    fields = {name: getattr(small[2], name) for name in small[2].__dataclass_fields__}
    bad = {
        "expected disjoint masks": {"val": small[2].train},
        "the train mask is empty": {"train": torch.zeros(1, 120, dtype=torch.bool)},
        r"val masks \(1, 119\), expected \(1, 120\)": {"val": small[2].val[:, 1:]},
        r"labels 0\.\.4, expected 0\.\.C-1": {"classes": 4},
        "a node without a label is in a train mask": {"labels": torch.where(small[2].train[0], -1, small[2].labels)},
        "a feature of node 0 is not finite": {"features": small[2].features * torch.nan},
    }
    for message, change in bad.items():
        with pytest.raises(UserError, match=message):
            data.NodeData(**(fields | change))


def test_real_graphs(data_root: Path) -> None:
    folder = data_root / "planetoid-geomgcn"
    if not folder.is_dir():
        pytest.skip("planetoid-geomgcn is absent")
    texas = data.load(folder, "texas")
    assert texas.train.sum(1)[0] == 87
    assert torch.allclose(texas.features.to_dense().sum(1), torch.ones(183))
    x, graph = SparseMatrix.of(texas.features), Adjacency.from_edges(texas.edges, 183)
    assert len(graph.hat.pattern) == 325 - 16 + 183
    networks = [shake(GGCN(1703, 2, 16, 5)).eval()]
    networks.append(copy.deepcopy(networks[0]))
    for layer in networks[1].convs:
        layer.use_sparse = False
    assert torch.allclose(networks[0](x, graph), networks[1](x.dense(), graph), rtol=1e-4, atol=1e-5)
    citeseer = data.load(folder, "citeseer", 1)
    assert [int(mask.sum()) for mask in (citeseer.train, citeseer.val, citeseer.test)] == [1586, 1061, 665]
    assert (citeseer.features.to_dense().sum(1) == 0).sum() >= 15
    chameleon = data.load(folder, "chameleon", 1)
    assert len(Adjacency.from_edges(chameleon.edges, 2277).hat.pattern) == 38_328
    assert "film" in data.FILES["actor"]
    lines = data.check(folder, "cora")
    assert not any("expected" in line for line in lines)


def test_check_data(run_paper: Any, data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "planetoid-geomgcn"
    if not folder.is_dir():
        pytest.skip("planetoid-geomgcn is absent")
    result = run_paper("ggcn", ["--data", str(folder), "--check-data"])
    assert result.code == 0
    assert "pubmed: MISSING" in result.out
    assert "cornell_fixed: 1 files, 10 splits" in result.out
    result = run_paper("ggcn", ["--preset", "pubmed", "--data", str(folder), "--check-data"])
    assert (result.code, len(result.errors)) == (2, 1)
    assert "put the eight Planetoid files" in result.err


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GGCN(5, layers=1), "layers is 1, expected at least 2"),
        (lambda: GGCN(5, hidden=0), "hidden is 0"),
        (lambda: GGCN(0), "features is 0"),
        (lambda: GGCN(5, classes=1), "classes is 1"),
        (lambda: GGCN(5, dropout=1.0), "dropout is 1.0"),
        (lambda: GGCN(5, decay_rate=0.0), "decay_rate is 0.0"),
        (lambda: GGCN(5, exponent=-1.0), "exponent -1.0"),
        (lambda: GGCN(5, use_bn=True), "only without decay"),
        (lambda: GGCN(5, use_decay=False, use_bn=True, use_ln=True), "at most one"),
        (lambda: GPRGNN(5, alpha=1.5), "alpha 1.5"),
        (lambda: Adjacency.from_edges(torch.tensor([[0], [9]]), 3), "names node 9"),
        (lambda: Adjacency.from_edges(torch.tensor([[0, 0], [1, 1]]), 3), r"edge \(0, 1\) stands more than once"),
        (lambda: Adjacency.from_edges(torch.tensor([[1, 1], [1, 1]]), 3), r"edge \(1, 1\) stands more than once"),
        (lambda: Adjacency.from_edges(torch.tensor([[0, 1, 1], [0, 2, 2]]), 3), r"edge \(1, 2\) stands more than once"),
        (lambda: Adjacency.from_edges(torch.zeros(3, 2), 3), "expected \\(2, E\\) integers"),
        (lambda: Adjacency.from_edges(STAR, 4, "both"), "normalization is 'both'"),
        (lambda: Adjacency.from_matrix(torch.ones(2, 3)), "must be square"),
        (lambda: Pattern(torch.tensor([1, 0]), torch.tensor([0, 0]), (2, 2)), "row-major order"),
        (lambda: Pattern(torch.tensor([2]), torch.tensor([0]), (2, 2)), "outside of its shape"),
    ],
)
def test_the_model_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "texas"], "needs --data"),
        (["--preset", "karate"], "unknown preset"),
        (["--study", "table", "--graphs", "karate"], "--graphs karate"),
        (["--graphs", "texas", "texas"], "--graphs texas texas"),
        (["--networks", "transformer"], "--networks transformer"),
        (["--layers", "1"], "--layers is 1: a GGCN needs at least 2"),
        (["--hidden", "0"], "--hidden is 0"),
        (["--decay-rate", "0"], "--decay-rate is 0"),
        (["--exponent", "-1"], "--exponent is -1"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--lr", "-0.1"], "--lr is -0.1"),
        (["--weight-decay", "-1"], "--weight-decay is -1"),
        (["--splits", "11"], "--splits is 11"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--patience", "0"], "--patience is 0"),
        (["--depths", "1"], "--depths"),
        (["--use-bn"], "--no-use-decay"),
        (["--no-use-decay", "--use-bn", "--use-ln"], "exclude each other"),
        (["--normalization", "row"], "--no-use-degree"),
        (["--homophily", "0.5", "1.5"], "--homophily"),
        (["--homophily", "0.5", "0.1"], "rising"),
        (["--nodes", "10"], "--nodes is 10"),
        (["--study", "table"], "--data"),
    ],
)
def test_the_command_refuses(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


def test_an_empty_folder_is_named(refuses: Any, tmp_path: Path) -> None:
    for argv in (["--check-data"], ["--preset", "texas"]):
        refuses(["--data", str(tmp_path), *argv], str(tmp_path))


# ---- training --------------------------------------------------------------------------------------------------------


def test_stop_and_resume(run_paper: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_paper("ggcn", ["--preset", "smoke", "--out", str(whole)]).code == 0
    assert run_paper("ggcn", ["--preset", "smoke", "--stop-after", "11", "--out", str(parts)]).code == 0
    assert run_paper("ggcn", ["--resume", str(parts)]).code == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, parts)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert {row["kind"] for row in results[0]["data"]} == {"generated"}


def test_a_table_of_a_written_graph(train: ModuleType, tmp_path: Path) -> None:
    """The table study on files in the official layout, every network, candidates chosen by validation."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "geom_gcn" / "texas"
    folder.mkdir(parents=True)
    labels = np.arange(60) % 3
    chance = 0.2 + 0.5 * (np.arange(8) % 3 == labels[:, None])
    features = (generator.random((60, 8)) < chance).astype(int)
    rows = [f"{i}\t{','.join(map(str, features[i]))}\t{labels[i]}" for i in range(60)]
    (folder / "out1_node_feature_label.txt").write_text("h\n" + "\n".join(rows) + "\n")
    pairs = generator.integers(60, size=(150, 2))
    (folder / "out1_graph_edges.txt").write_text("h\n" + "\n".join(f"{a}\t{b}" for a, b in pairs) + "\n")
    (tmp_path / "splits").mkdir()
    for k in range(2):
        part = generator.permutation(60) % 3
        masks = {f"{name}_mask": (part == i).astype(np.uint8) for i, name in enumerate(("train", "val", "test"))}
        np.savez(tmp_path / "splits" / f"texas_split_0.6_0.2_{k}.npz", **masks)
    out = tmp_path / "run"
    argv = ["--preset", "texas", "--data", str(tmp_path), "--splits", "2", "--epochs", "3", "--depths", "2", "3"]
    assert train.main([*argv, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    metrics = result["metrics"]
    for network in train.NETWORKS:
        assert len(metrics[f"texas/{network}/test_accuracy"]["values"]) == 2
    best = metrics["texas/gcnii/test_accuracy"]["values"]
    assert best in [metrics[f"texas/gcnii/{name}/test_accuracy"]["values"] for name in ("plain", "star")]
    rows = {row["metric"]: row["comparable"] for row in result["reported"]}
    assert rows["texas/ggcn/test_accuracy"]
    assert {row["kind"] for row in result["data"]} == {"real"}
    few = tmp_path / "few"  # chosen on one split, only the chosen candidate is trained on the other
    assert train.main([*argv, "--networks", "gcnii", "--selection-splits", "1", "--out", str(few)]) == 0
    metrics = json.loads((few / "result.json").read_text())["metrics"]
    trained = {name: metrics[f"texas/gcnii/{name}/test_accuracy"]["values"] for name in ("plain", "star")}
    assert sorted(map(len, trained.values())) == [1, 2]
    assert metrics["texas/gcnii/test_accuracy"]["values"] == max(trained.values(), key=len)
    assert train.main([*argv, "--study", "depth", "--networks", "ggcn", "gcnii", "--out", str(tmp_path / "deep")]) == 0
    assert train.main([*argv, "--study", "ablation", "--out", str(tmp_path / "parts")]) == 0


SMALL = ["--homophily", "0.1", "0.6", "0.8", "--nodes", "300", "--epochs", "90", "--depths", "8", "--seed", "0"]


def test_a_broken_method_fails_the_claims(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(name: str) -> dict[str, bool]:
        assert train.main([*SMALL, "--out", str(tmp_path / name)]) == 0
        claims = json.loads((tmp_path / name / "result.json").read_text())["claims"]
        return {claim["name"]: claim["holds"] for claim in claims}

    good = verdicts("good")
    assert good["beats_gcn_under_heterophily"]
    assert good["signed_messages_help_under_heterophily"]
    layer = sys.modules["model"].GGCNLayer

    def unsigned(self: Any, h: Tensor, graph: Any) -> Tensor:
        return graph.hat @ h  # neither signs nor a term of its own: what GCN does

    monkeypatch.setattr(layer, "propagate", unsigned)
    broken = verdicts("broken")
    assert not broken["beats_gcn_under_heterophily"]
    assert not broken["signed_messages_help_under_heterophily"]


def test_losing_the_sign_fails_the_claim_on_it(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--homophily", "0.1", "0.8", "--epochs", "250", "--depths", "3", "--seed", "0"]

    def sign_helps(name: str) -> bool:
        assert train.main([*words, "--out", str(tmp_path / name)]) == 0
        claims = json.loads((tmp_path / name / "result.json").read_text())["claims"]
        return next(claim["holds"] for claim in claims if claim["name"] == "the_sign_itself_helps")

    assert sign_helps("good")
    layer = sys.modules["model"].GGCNLayer
    monkeypatch.setattr(layer, "_similarity", lambda self, cosine: cosine.abs())
    assert not sign_helps("broken")
