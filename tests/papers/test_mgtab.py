"""MGTAB: sparse products, the layers' oracles, the official code's numbers, peers, loaders, bad input and claims."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.mgtab import data, model
from papers.mgtab.model import GAT, GCN, HGT, RGCN, RGT, SAGE, SHGN, BotRGCN, Pattern, RelationGraph
from shared.errors import UserError


def random_graph(nodes: int = 30, edges: int = 250, relations: int = 3) -> tuple[Tensor, Tensor, RelationGraph]:
    """Edges, types and graph; a few edges stand twice, some are loops."""
    pairs, types = torch.randint(nodes, (2, edges)), torch.randint(relations, (edges,))
    pairs, types = torch.cat([pairs, pairs[:, :9]], 1), torch.cat([types, types[:9]])
    pairs[1, :3] = pairs[0, :3]
    return pairs, types, RelationGraph(pairs, types, nodes, relations)


def shake(module: Any) -> Any:
    """Move every parameter off its start, so that no term is trivial."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


# ---- sparse products -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["bag", "csr", "gather"])
def pattern(request: pytest.FixtureRequest) -> Pattern:
    """Six entries of a 4 x 3 matrix, one pair twice, one row empty."""
    made = Pattern(torch.tensor([0, 0, 0, 2, 2, 3]), torch.tensor([0, 2, 2, 2, 0, 1]), (4, 3))
    made.route = request.param
    return made


def dense(pattern: Pattern, values: Tensor) -> Tensor:
    return values.new_zeros(pattern.shape).index_put((pattern.row, pattern.col), values, accumulate=True)


def test_products(pattern: Pattern) -> None:
    values = torch.arange(1.0, 7.0)
    matrix = dense(pattern, values)
    assert pattern.crow.tolist() == [0, 3, 3, 5, 6]
    assert torch.equal(dense(pattern.t, values[pattern.perm]), matrix.t())
    for width in (1, 3, 8, 13):
        h, a = torch.randn(3, width), torch.randn(4, width)
        assert torch.allclose(model.edge_sum(pattern, values, h), matrix @ h, atol=1e-5)
        assert torch.allclose(model.edge_dot(pattern, a, h), (a @ h.t())[pattern.row, pattern.col], atol=1e-5)


def test_softmax_counts_an_entry_as_often_as_it_stands(pattern: Pattern) -> None:
    score, count = torch.tensor([0.3, -1.0, 90.0, 2.0, 2.0, -80.0]), torch.tensor([1.0, 2, 1, 3, 1, 5])
    alpha = model.edge_softmax(pattern, score, count)
    assert torch.allclose(pattern.row_sums(alpha), torch.tensor([1.0, 0, 1, 1]))
    assert torch.allclose(alpha[3:5], torch.tensor([0.75, 0.25]))
    assert alpha.isfinite().all()


def test_attention_is_softmax_then_sum(pattern: Pattern) -> None:
    score, count = torch.tensor([0.3, -1.0, 90.0, 2.0, 2.0, -80.0]), torch.tensor([1.0, 2, 1, 3, 1, 5])
    h = torch.randn(3, 4)
    expected = model.edge_sum(pattern, model.edge_softmax(pattern, score, count), h)
    out = model.edge_attend(pattern, score, count, h)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.equal(out[1], torch.zeros(4))  # a row without entries


def test_attention_with_dropout_keeps_its_mean() -> None:
    nodes = 200
    grid = torch.arange(nodes * nodes)
    full = Pattern(grid // nodes, grid % nodes, (nodes, nodes))
    torch.manual_seed(0)
    out = model.edge_attend(full, torch.zeros(len(full)), torch.ones(len(full)), torch.ones(nodes, 1), 0.5)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)  # the total is taken before, not after the dropout
    assert out.std().item() == pytest.approx(1 / math.sqrt(nodes), rel=0.2)


def test_stacked_pattern_is_block_diagonal(pattern: Pattern) -> None:
    values = torch.arange(1.0, 7.0)
    twice = dense(pattern.stacked(2), torch.cat([values, -values]))
    assert torch.equal(twice, torch.block_diag(dense(pattern, values), -dense(pattern, values)))


def test_gradients_of_the_products(pattern: Pattern) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    count = torch.tensor([1.0, 2, 1, 3, 1, 5], dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda v, h: model.edge_sum(pattern, v, h), (make(6), make(3, 2)))
    assert check(lambda a, b: model.edge_dot(pattern, a, b), (make(4, 2), make(3, 2)))
    assert check(lambda s: model.edge_softmax(pattern, s, count), (make(6),))
    assert check(lambda s, h: model.edge_attend(pattern, s, count, h), (make(6), make(3, 2)))
    assert check(lambda a, b: model.edge_add(pattern, a, b), (make(4, 2), make(3, 2)))

    def dropped(s: Tensor, h: Tensor) -> Tensor:
        torch.manual_seed(0)
        return model.edge_attend(pattern, s, count, h, 0.4)

    assert check(dropped, (make(6), make(3, 2)))


def test_no_edges() -> None:
    empty = Pattern(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), (4, 3))
    assert torch.equal(model.edge_sum(empty, torch.empty(0), torch.randn(3, 2)), torch.zeros(4, 2))
    assert model.edge_dot(empty, torch.randn(4, 8), torch.randn(3, 8)).shape == (0,)


def test_half_precision_is_widened(pattern: Pattern) -> None:
    out = model.edge_sum(pattern, torch.ones(6).bfloat16(), torch.randn(3, 2).bfloat16())
    assert out.dtype == torch.float32


def test_dropout_keeps_the_mean() -> None:
    dropped = model.dropout(torch.ones(400, 500), 0.3, True)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    x = torch.ones(3)
    assert model.dropout(x, 0.3, False) is x


# ---- the graph -------------------------------------------------------------------------------------------------------


def dense_relations(edges: Tensor, types: Tensor, nodes: int, relations: int) -> Tensor:
    """(R, N, N) how often each edge stands: row = target."""
    out = torch.zeros(relations, nodes, nodes)
    return out.index_put_((types, edges[1], edges[0]), torch.ones(len(types)), accumulate=True)


def test_operators_are_their_dense_matrices() -> None:
    edges, types, graph = random_graph()
    each = dense_relations(edges, types, 30, 3)
    x, z = torch.randn(30, 5), torch.randn(30, 8)
    mean = each / each.sum(2, keepdim=True).clamp_min(1)
    assert torch.allclose(graph.mean.gather(x), torch.cat([a @ x for a in mean], 1), atol=1e-5)
    blocks = z.chunk(4, dim=1)
    expected = sum(a @ block for a, block in zip(mean, blocks)) + blocks[3]
    assert torch.allclose(graph.mean.combine(z), expected, atol=1e-5)
    total = each.sum(0)
    merged = total / total.sum(1, keepdim=True).clamp_min(1)
    assert torch.allclose(graph.merged.mean.gather(x), merged @ x, atol=1e-5)
    looped = total - torch.diag(total.diagonal()) + torch.eye(30)
    scale = looped.sum(1).rsqrt()
    assert torch.allclose(graph.symmetric.gather(x), scale[:, None] * looped @ (scale[:, None] * x), atol=1e-5)
    for relation, (pattern, count) in enumerate(graph.by_relation):
        assert torch.equal(dense(pattern, count), each[relation])
    assert graph.merged.merged is graph.merged
    moved = graph.to("cpu")
    assert torch.equal(moved.mean.gather(x), graph.mean.gather(x))


# ---- oracles of the networks -----------------------------------------------------------------------------------------


def test_rgcn_of_one_relation_is_sage() -> None:
    _, _, graph = random_graph(relations=1)
    networks = [RGCN(6, 8, 3, 1).eval(), SAGE(6, 8, 3, 1).eval()]
    shake(networks[0])
    state = networks[0].state_dict()
    twice = {key.replace("convs.0", "convs.1"): value for key, value in state.items() if key.startswith("convs.0")}
    networks[1].load_state_dict(state | twice)
    x = torch.randn(30, 6)
    assert torch.allclose(networks[0](x, graph), networks[1](x, graph), atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_rgcn_does_not_depend_on_the_order_of_relations(training: bool) -> None:
    edges, types, graph = random_graph()
    network, x = shake(RGCN(6, 8, 3, 3, dropout=0.0)).train(training), torch.randn(30, 6)
    before = network(x, graph)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        weight = network.convs[0].weight
        moved = weight.clone()
        moved[order] = weight[:3]
        moved[3] = weight[3]
        weight.copy_(moved)
    assert torch.allclose(network(x, RelationGraph(edges, order[types], 30, 3)), before, atol=1e-5)


def test_without_in_edges_only_the_root_term_is_left() -> None:
    graph = RelationGraph(torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1]), 3, 2)
    convolution, x = shake(model.LinearConvolution(4, 5, 3)), torch.randn(3, 4)
    out = convolution(x, graph.mean)
    assert torch.allclose(out[2], x[2] @ convolution.weight[2] + convolution.bias, atol=1e-6)
    assert not torch.allclose(out[0], x[0] @ convolution.weight[2] + convolution.bias, atol=1e-2)


@pytest.mark.parametrize("terms", [1, 4])
def test_a_linear_map_after_a_convolution_can_join_it(terms: int) -> None:
    _, _, graph = random_graph()
    operator = graph.symmetric if terms == 1 else graph.mean
    convolution, x = shake(model.LinearConvolution(16, 16, terms)), torch.randn(30, 16)
    for width in (2, 40):  # narrower and wider than what comes in
        then = torch.randn(16, width)
        assert torch.allclose(convolution(x, operator, then), convolution(x, operator) @ then, atol=1e-4)


def test_training_and_evaluation_agree_without_dropout() -> None:
    """Two orders of the same products."""
    _, _, graph = random_graph()
    x = torch.randn(30, 788)
    for make in (GCN, SAGE, RGCN, BotRGCN):
        network = shake(make(788, 16, 3, 3, dropout=0.0))
        network.dropout = 1e-12  # takes the training pass's order and drops nothing
        assert torch.allclose(network.train()(x, graph), network.eval()(x, graph), rtol=1e-4, atol=1e-3)


def test_shgn_attention() -> None:
    _, _, graph = random_graph()
    layer, x = shake(model.SimpleHGNLayer(6, 4, 3, rel_dim=5, beta=0.3)), torch.randn(30, 6)
    out, alpha = layer(x, graph)
    has = torch.bincount(graph.pattern.row, minlength=30) > 0
    assert torch.allclose(graph.pattern.row_sums(alpha), has.float(), atol=1e-5)
    before = torch.rand(len(graph.pattern))
    mixed, kept = layer(x, graph, before)
    assert torch.allclose(kept, 0.7 * alpha + 0.3 * before, atol=1e-6)
    h = layer.W(x)
    expected = F.elu(dense(graph.pattern, kept) @ h + layer.W_res(x))
    assert torch.allclose(mixed, expected, atol=1e-5)
    layer.plain = True  # the official code: the mixture is handed on and not used
    plain, kept = layer(x, graph, before)
    assert torch.allclose(plain, out, atol=1e-6)
    assert torch.allclose(kept, 0.7 * alpha + 0.3 * before, atol=1e-6)
    layer.plain, layer.beta = False, 0.0
    assert torch.allclose(layer(x, graph, before)[0], out, atol=1e-6)
    layer.final = True
    assert torch.allclose(layer(x, graph)[0].norm(dim=1), torch.ones(30), atol=1e-5)


def test_shgn_scores_of_one_edge() -> None:
    """The three parts of the score, edge by edge, for two in-edges of one user."""
    graph = RelationGraph(torch.tensor([[1, 2], [0, 0]]), torch.tensor([1, 0]), 3, 2)
    layer, x = shake(model.SimpleHGNLayer(4, 3, 2, rel_dim=5)), torch.randn(3, 4)
    scores = []
    for source, relation in ((1, 1), (2, 0)):
        parts = [layer.W(x[0]), layer.W(x[source]), layer.W_r(layer.rel_emb.weight[relation])]
        scores.append(F.leaky_relu(layer.a(torch.cat(parts)), 0.2))
    assert torch.allclose(layer(x, graph)[1], torch.cat(scores).softmax(0), atol=1e-6)


def test_rgt_semantic_attention() -> None:
    attention = shake(model.SemanticAttention(6, heads=3, hidden=4))
    z = torch.randn(2, 10, 6)
    weights = attention.weights(z)
    assert weights.shape == (2, 3)
    assert torch.allclose(weights.sum(0), torch.ones(3))
    hidden = torch.tanh(z @ attention.layer.weight[:4].t() + attention.layer.bias[:4])
    assert torch.allclose(weights[:, 0], (hidden @ attention.query[0]).mean(1).softmax(0), atol=1e-6)
    assert torch.allclose(attention(z[:1]), z[0], atol=1e-6)  # one relation
    assert torch.allclose(attention(z[:1].expand(3, -1, -1)), z[0], atol=1e-6)  # equal ones


def test_rgt_uses_every_relation_unless_told_otherwise() -> None:
    edges, types, graph = random_graph()
    x = torch.randn(30, 6)
    other = RelationGraph(edges[:, types < 2], types[types < 2], 30, 3)  # the third relation is empty
    for limit, same in ((None, False), (2, True)):
        network = shake(RGT(6, 8, 3, 3, out=8, heads=2, limit=limit)).eval()
        assert torch.allclose(network(x, graph), network(x, other), atol=1e-6) is same
    one = shake(RGT(6, 8, 3, 1, out=8, heads=2)).eval()
    assert one(x, RelationGraph(edges, torch.zeros_like(types), 30, 1)).isfinite().all()


def test_hgt_without_edges_keeps_its_gate() -> None:
    graph = RelationGraph(torch.empty(2, 0, dtype=torch.long), torch.empty(0, dtype=torch.long), 5, 2)
    layer, x = model.HGTLayer(6, 6, 2), torch.randn(5, 6)
    share = torch.sigmoid(torch.tensor(1.0))
    assert torch.allclose(layer(x, graph), share * layer.out.bias + (1 - share) * x, atol=1e-6)


def test_botrgcn_columns() -> None:
    assert data.NUMERIC == model.NUMERIC
    assert sorted(model.NUMERIC + model.CATEGORICAL) == list(range(20)) == list(range(len(data.COLUMNS)))
    assert [data.COLUMNS[i] for i in model.NUMERIC[:4]] == [
        "followers_count",
        "listed_count",
        "statuses_count",
        "friends_count",
    ]
    _, _, graph = random_graph()
    network, x = shake(BotRGCN(788, 16, 2, 3)).eval(), torch.randn(30, 788)
    parts = [network.tweet(x[:, 20:]), network.numeric(x[:, [3, 5, 6, 7, *range(9, 15)]])]
    parts.append(network.categorical(x[:, [0, 1, 2, 4, 8, *range(15, 20)]]))
    expected = F.leaky_relu(network.into(F.leaky_relu(torch.cat(parts, 1))))
    assert torch.allclose(network.encode(x), expected, atol=1e-6)
    assert network.tweet.weight.shape == (12, 768)


def test_memory_is_linear_in_the_edges() -> None:
    """A training step never makes a tensor of E x h entries."""
    nodes, edges, hidden = 400, 40_000, 32
    pairs, types = torch.randint(nodes, (2, edges)), torch.randint(2, (edges,))
    graph = RelationGraph(pairs, types, nodes, 2)
    x = torch.randn(nodes, 788)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor) and value.layout is torch.strided:
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    for make in (GCN, GAT, SAGE, RGCN, BotRGCN, SHGN, HGT, RGT):
        network = make(788, hidden, 2, 2)
        with Watch():
            network(x, graph).sum().backward()
    assert len(graph.pattern) > 0.8 * edges
    assert largest < 4 * edges * hidden / 2


# ---- the official code -----------------------------------------------------------------------------------------------

MAKERS: dict[str, Any] = {
    "GCN": lambda features: GCN(features, 16, 3, 3),
    "GAT": lambda features: GAT(features, 16, 3, 3),
    "SAGE": lambda features: SAGE(features, 16, 3, 3),
    "RGCN": lambda features: RGCN(features, 16, 3, 3),
    "BotRGCN": lambda features: BotRGCN(
        788, 16, 3, 3, numeric=(4, 6, 7, 8, *range(10, 16)), categorical=(1, 2, 3, 5, 9, *range(16, 21))
    ),
    "SHGN": lambda features: SHGN(
        features, 16, 3, 3, linear=16, out=8, rel_dim=5, beta=0.3, same_layer=True, plain=True
    ),
    "HGT": lambda features: HGT(features, 16, 3, 3, linear=16, out=8, same_layer=True),
    "RGT": lambda features: RGT(features, 16, 3, 3, out=8, heads=3, semantic_heads=2, limit=2),
}
# Logits of users 0 and 3, and the sum over all, that the official networks give with the weights of ``weights`` (in
# evaluation mode, torch 2.13 and torch-geometric 2.8), each weight at the place that ``from_official`` says is its own.
OFFICIAL = {
    "GCN": ([8.5308, 1.0498, -6.5665, 7.0461, 0.246, -6.5846], 9.57),
    "GAT": ([14.3104, 7.5054, -0.2763, 14.4318, 7.6311, -0.1627], 130.015),
    "SAGE": ([-40.36, -55.7083, -63.7894, -39.1453, -54.6259, -62.9804], -948.105),
    "RGCN": ([-129.8284, -144.0284, -139.4398, -97.6485, -105.1698, -98.9718], -1779.949),
    "BotRGCN": ([192.6265, 28.4801, -139.3839, 103.0144, -15.3972, -131.8022], 791.699),
    "SHGN": ([-5.6649, 7.8731, -8.9671, -3.088, 4.9626, -5.8186], -33.654),
    "HGT": ([49.6111, -33.906, 15.855, 103.9601, -55.9004, 4.7715], 144.665),
    "RGT": ([0.5121, 0.4009, 0.3085, 0.513, 0.3989, 0.3115], 7.324),
}
EDGES = torch.tensor([[0, 0, 1, 2, 2, 3, 4, 4, 5, 1, 3, 0, 0, 2], [1, 2, 0, 2, 3, 4, 0, 5, 3, 0, 4, 5, 5, 1]])
TYPES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 0, 0, 1])


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights 0.5 cos(0.37 k), numbered through the names in sorted order."""
    out, k = {}, 0
    for name, value in sorted(state.items()):
        numbers = torch.arange(k, k + value.numel(), dtype=torch.float64)
        out[name] = ((numbers * 0.37).cos() * 0.5).reshape(value.shape).float()
        k += value.numel()
    return out


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name: str) -> None:
    expected, total = OFFICIAL[name]
    width = 788 if name == "BotRGCN" else 7
    network = MAKERS[name](width).eval()
    network.load_state_dict(weights(network.state_dict()))
    x = (torch.arange(6.0 * width) * 1.7).sin().reshape(6, width)
    with torch.no_grad():
        out = network(x, RelationGraph(EDGES, TYPES, 6, 3))
    assert torch.allclose(out[[0, 3]].flatten(), torch.tensor(expected), rtol=1e-5, atol=2e-4)
    assert out.sum().item() == pytest.approx(total, rel=1e-5, abs=1e-3)


# Parameters of the official classes for bots (h = 256; RGT 128), with 2 and with 7 relations, and those of the blocks
# they declare and that do nothing: a Linear(h, h); a second convolution where the first is applied twice.
SPARE = 256 * 256 + 256
PARAMETERS = {
    "gcn": (399_874, 399_874, SPARE, SPARE),
    "gat": (400_898, 400_898, SPARE, SPARE),
    "sage": (530_946, 530_946, SPARE, SPARE),
    "rgcn": (662_018, 1_317_378, SPARE + 196_864, SPARE + 524_544),
    "botrgcn": (477_314, 804_994, SPARE, SPARE),
    "hgt": (912_232, 1_731_442, 0, 0),
    "shgn": (481_538, 483_538, 0, 0),
    "rgt": (638_146, 1_711_426, 2 * 512, 7 * 512),  # the keys' biases
}


def test_presets_at_full_size(train: ModuleType) -> None:
    """Every network of every preset is built on the meta device; the sizes are those of the official classes."""
    seen = set()
    for preset in train.PRESETS.values():
        for job in train.jobs(preset.config):
            if job.relations is None:
                assert job.method in model.CLASSIFIERS
                continue
            made = train.setting(preset.config, job.method)
            classes = len(data.TASKS[job.task])
            with torch.device("meta"):
                network = train.build(job.method, made, 788, classes, len(job.relations))
            size = sum(p.numel() for p in network.parameters())
            assert size > 0
            if preset.config.dataset == "mgtab" and not preset.config.defects and len(job.relations) in (2, 7):
                column = 0 if len(job.relations) == 2 else 1
                last = network.out2 if hasattr(network, "out2") else network.out
                third = last.weight.shape[1] + 1 if classes == 3 else 0
                assert size + PARAMETERS[job.method][2 + column] == PARAMETERS[job.method][column] + third, job
                seen.add((job.method, column, classes))
    assert {(name, 0, classes) for name in PARAMETERS for classes in (2, 3)} <= seen
    assert ("rgcn", 1, 2) in seen
    assert train.CLASSIFIERS == model.CLASSIFIERS


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyg() -> ModuleType:
    return pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")


def linears(**shapes: tuple[int, int]) -> nn.Module:
    """A module with linear layers under the official names."""
    made = nn.Module()
    for name, (into, out) in shapes.items():
        layer = nn.Linear(into, out)
        made.add_module(name, nn.Sequential(layer) if name.startswith("linear_relu") else layer)
    return made


def ours_with(official: nn.Module, network: nn.Module) -> nn.Module:
    network.load_state_dict(model.from_official(official.state_dict(), network))
    return network.eval()


CONVOLUTIONS = {
    "gcn": lambda pyg, i: pyg.GCNConv(16, 16),
    "gat": lambda pyg, i: pyg.GATConv(16, 2, heads=8) if i == 1 else pyg.GATConv(16, 16),
    "sage": lambda pyg, i: pyg.SAGEConv(16, 16),
    "rgcn": lambda pyg, i: pyg.RGCNConv(16, 16, 3),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_peer_convolutions(pyg: ModuleType, train: ModuleType, name: str) -> None:
    edges, types, graph = random_graph()
    twin = linears(linear_relu_input=(6, 16), linear_relu_output1=(16, 16), linear_output2=(16, 3))
    for i in (1, 2):
        twin.add_module(f"{name}{i}", CONVOLUTIONS[name](pyg, i))
    shake(twin)
    first = getattr(twin, f"{name}1")
    second = first if name == "rgcn" else getattr(twin, f"{name}2")
    extra = (edges, types) if name == "rgcn" else (edges,)
    x = torch.randn(30, 6)
    expected = twin.linear_output2(second(first(F.leaky_relu(twin.linear_relu_input(x)), *extra), *extra))
    networks = {"gcn": GCN, "gat": GAT, "sage": SAGE, "rgcn": RGCN}
    network = ours_with(twin, networks[name](6, 16, 3, 3, dropout=0.0))
    assert torch.allclose(network(x, graph), expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    network(x, graph).square().sum().backward()
    gradients = {k: p.grad if p.grad is not None else torch.zeros_like(p) for k, p in twin.named_parameters()}
    for key, wanted in model.from_official(gradients, network).items():
        found = network.get_parameter(key).grad
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-4), key


def test_peer_hgt(pyg: ModuleType) -> None:
    edges, types, graph = random_graph()
    kinds = [("user", name, "user") for name in ("url", "followers", "quoted")]
    twin = linears(linear1=(6, 16), out1=(8, 8), out2=(8, 3))
    twin.HGT_layer1 = pyg.HGTConv(16, 16, (["user"], kinds))
    twin.HGT_layer2 = pyg.HGTConv(16, 8, (["user"], kinds))
    shake(twin)
    by_kind = {kind: edges[:, types == i] for i, kind in enumerate(kinds)}
    x = torch.randn(30, 6)
    h = twin.HGT_layer1({"user": F.leaky_relu(twin.linear1(x))}, by_kind)
    expected = twin.out2(F.leaky_relu(twin.out1(twin.HGT_layer2(h, by_kind)["user"])))
    network = ours_with(twin, HGT(6, 16, 3, 3, linear=8, out=8))
    assert torch.allclose(network(x, graph), expected, rtol=1e-4, atol=1e-4)


def test_peer_relation_attention(pyg: ModuleType) -> None:
    """The attention along a relation is torch-geometric's TransformerConv, the mean of its heads."""
    edges, types, graph = random_graph()
    layer = shake(model.RelationAttention(6, 5, heads=3, dropout=0.4)).eval()
    peer = pyg.TransformerConv(6, 5, heads=3, concat=False, dropout=0.4).eval()
    peer.lin_key.weight.data.copy_(layer.key.flatten(0, 1))  # its bias stays what it is: no score depends on it
    for name in ("query", "value", "skip"):
        getattr(peer, f"lin_{name}").load_state_dict(getattr(layer, name).state_dict())
    x = torch.randn(30, 6)
    expected = peer(x, edges[:, types == 1])
    assert torch.allclose(layer(x, *graph.by_relation[1]), expected, atol=1e-5)
    expected.square().sum().backward()
    layer(x, *graph.by_relation[1]).square().sum().backward()
    assert torch.allclose(layer.key.grad.flatten(0, 1), peer.lin_key.weight.grad, rtol=1e-3, atol=1e-4)
    assert torch.allclose(layer.query.weight.grad, peer.lin_query.weight.grad, rtol=1e-3, atol=1e-4)
    assert torch.allclose(layer.value.bias.grad, peer.lin_value.bias.grad, rtol=1e-3, atol=1e-3)
    assert peer.lin_key.bias.grad.abs().max() < 1e-3


def test_from_official_names_what_is_lacking() -> None:
    with pytest.raises(ValueError, match=r"no official parameter for out\.weight, out\.bias, convs\.0\.weight"):
        model.from_official({"linear1.weight": torch.ones(1), "linear1.bias": torch.ones(1)}, RGCN(6, 8, 2, 1))


# ---- protocol and scores ---------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    labels, prediction = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    found = model.scores(prediction, labels)
    assert found == pytest.approx({"accuracy": 0.75, "precision": 5 / 6, "recall": 0.75, "f1": (2 / 3 + 0.8) / 2})
    exchanged = model.scores(prediction, labels, swapped=True)
    assert exchanged == pytest.approx(found | {"precision": 0.75, "recall": 5 / 6})


def labelled(labels: Tensor) -> data.Accounts:
    """Users with labels for bots, without edges, every feature 0."""
    none = torch.empty(0, dtype=torch.long)
    return data.Accounts("mgtab", torch.zeros(len(labels), 788), none.view(2, 0), none, none, {"bot": labels})


def test_the_splits_are_those_of_sklearn() -> None:
    from sklearn.utils import shuffle

    users, made = 10_199, labelled(torch.zeros(10_199, dtype=torch.long))
    for seed in (0, 3):
        parts = made.splits("bot", seed)
        assert [len(part) for part in parts] == [7139, 2040, 1020]
        assert np.array_equal(torch.cat(parts).numpy(), shuffle(np.arange(users), random_state=seed))


def test_published_counts() -> None:
    assert sum(data.EXPECTED_EDGES["mgtab"]) == 1_700_108
    assert [sum(counts) for counts in data.EXPECTED_LABELS.values()] == [10_199, 10_199]


def test_classifiers() -> None:
    made = data.generate(0, nodes=120)
    x, y = made.features.numpy(), made.labels["stance"].numpy()
    assert model.classifier("svm", 0).C == 10
    assert model.classifier("logistic", 0).C == 0.1
    assert model.classifier("knn", 0).n_neighbors == 7
    assert model.classifier("adaboost", 3).random_state == 3
    forest = model.classifier("forest", 0)
    assert (forest.n_estimators, forest.fit(x, y).predict(x).tolist()) == (100, y.tolist())
    pytest.importorskip("xgboost")
    boosted = model.classifier("xgboost", 0)
    assert (boosted.n_estimators, boosted.max_depth, boosted.colsample_bytree) == (200, 5, 0.8)
    with pytest.raises(ValueError, match="unknown classifier 'cart'"):
        model.classifier("cart", 0)


def test_settings(train: ModuleType) -> None:
    config = train.Config(networks=("gcn",))
    rows = {name: train.setting(config, name) for name in train.NETWORKS}
    assert {(s.hidden, s.dropout, s.lr, s.weight_decay) for n, s in rows.items() if n in train.CONVOLUTIONAL} == {
        (256, 0.3, 1e-3, 5e-4)
    }
    assert (rows["rgt"].hidden, rows["rgt"].dropout, rows["rgt"].weight_decay) == (128, 0.5, 5e-3)
    assert rows["shgn"].options == {"linear": 128, "out": 32, "rel_dim": 200, "beta": 0.05, "plain": False}
    faulty = train.Config(networks=("gcn",), defects=tuple(train.DEFECTS))
    assert train.setting(faulty, "hgt").options["linear"] == 256
    assert train.setting(faulty, "shgn").options["plain"] is True
    assert train.setting(faulty, "rgt").options["limit"] == 2
    columns = train.setting(faulty, "botrgcn").options
    assert columns["numeric"] == tuple(i + 1 for i in model.NUMERIC)
    assert columns["categorical"] == tuple(i + 1 for i in model.CATEGORICAL)
    small = train.setting(train.Config(networks=("gcn",), hidden=16), "hgt")
    assert small.options == {"linear": 8, "out": 16}


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accounts() -> data.Accounts:
    return data.generate(1, nodes=1500)


def test_generated_set(accounts: data.Accounts) -> None:
    users = 1500
    assert accounts.features.shape == (users, 788)
    assert (accounts.edges[0] != accounts.edges[1]).all()
    counts = np.array(accounts.edge_counts()) / users
    assert np.allclose(counts, data.DEGREES, rtol=0.01)
    bot, stance = accounts.labels["bot"], accounts.labels["stance"]
    assert bot.double().mean().item() == pytest.approx(0.27, abs=0.03)
    against = (stance[bot == 1] == 1).double().mean().item()
    assert against == pytest.approx(0.3 + 0.7 * 0.357, abs=0.07)
    for relation, (by_bot, by_stance) in enumerate(zip(data.BOT_HOMOPHILY, data.STANCE_HOMOPHILY, strict=True)):
        source, target = accounts.edges[:, accounts.types == relation]
        base = torch.bincount(bot).double() / users
        same = (bot[source] == bot[target]).double().mean().item()
        by_chance = float(base[bot[source]].mean())
        expected = by_chance * (1 - abs(by_bot)) + max(by_bot, 0)
        # targets of the same stance are of the same bot class a little more often than by chance
        assert same == pytest.approx(expected, abs=0.05), relation
        share = (stance[source] == stance[target]).double().mean().item()
        assert share == pytest.approx(0.35 + 0.65 * by_stance * (1 - abs(by_bot)), abs=0.06), relation
        weights = accounts.weights[accounts.types == relation]
        assert (weights.min(), weights.max()) == ((1, 9) if relation > 4 else (1, 1))
    degree = torch.bincount(accounts.edges[0], minlength=users).double()
    assert degree.max() > 3 * degree.mean()
    binary = [i for i in range(20) if i not in data.NUMERIC]
    assert set(accounts.features[:, binary].unique().tolist()) == {0.0, 1.0}
    numeric = accounts.features[:, list(data.NUMERIC)]
    assert numeric.min() >= 0 and numeric.max() <= 1
    again = data.generate(1, nodes=1500)
    assert torch.equal(again.features, accounts.features) and torch.equal(again.edges, accounts.edges)
    assert not torch.equal(data.generate(2, nodes=1500).labels["bot"], bot)
    with pytest.raises(ValueError, match="50 users"):
        data.generate(0, nodes=50)


def test_relations_are_numbered_anew(accounts: data.Accounts) -> None:
    edges, types = accounts.select((2, 0))
    counts = accounts.edge_counts()
    assert torch.bincount(types).tolist() == [counts[2], counts[0]]
    assert torch.equal(edges[:, types == 0], accounts.edges[:, accounts.types == 2])
    assert torch.equal(edges[:, types == 1], accounts.edges[:, accounts.types == 0])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A small MGTAB in the official layout."""
    folder = tmp_path / "Dataset" / "MGTAB"
    data.save(data.generate(0, nodes=120), folder)
    return folder


def test_official_layout(files: Path) -> None:
    expected = data.generate(0, nodes=120)
    for root in (files, files.parent, files.parents[1]):
        found = data.load(root, "mgtab")
        assert found.name == "mgtab"
        for name in ("features", "edges", "types", "weights"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert all(torch.equal(found.labels[task], expected.labels[task]) for task in ("bot", "stance"))
        assert set(found.origin) == set(data.FILES)


def test_arrays_and_floats_are_read(files: Path) -> None:
    """Some releases hold edge_index as an array of floats, features as float64; old files have no zip inside."""
    expected = data.load(files, "mgtab")
    torch.save(expected.edges.double().numpy(), files / "edge_index.pt")
    torch.save(expected.features.double(), files / "features.pt", _use_new_zipfile_serialization=False)
    torch.save(expected.types.int().numpy(), files / "edge_type.pt", _use_new_zipfile_serialization=False)
    found = data.load(files, "mgtab")
    assert torch.equal(found.edges, expected.edges) and found.edges.dtype == torch.int64
    assert torch.equal(found.types, expected.types) and found.types.dtype == torch.int64
    assert torch.equal(found.features, expected.features) and found.features.dtype == torch.float32


class Evil:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_code_in_a_file_runs(files: Path, tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(Evil(tmp_path / "touched"), files / "labels_bot.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match=r"labels_bot\.pt: not a file of a plain tensor"):
            data.load(files, "mgtab")
    (files / "labels_bot.pt").write_bytes(pickle.dumps(Evil(tmp_path / "touched")))
    with pytest.raises(UserError, match="not a file of a plain tensor"):
        data.load(files, "mgtab")
    assert not (tmp_path / "touched").exists()


def test_malformed_files(files: Path) -> None:
    good = data.load(files, "mgtab")
    cases: list[tuple[str, Any, str]] = [
        ("edge_index", good.edges[:1], r"edge_index \(1, \d+\), expected \(2, edges\)"),
        ("edge_index", good.edges + 100, r"edge_index names user \d+, expected 0\.\.119"),
        ("edge_index", good.edges + 0.5, "has fractions"),
        ("edge_type", good.types - 1, r"edge_type has relation -1, expected 0\.\.6"),
        ("edge_type", good.types[1:], "edge_type"),
        ("edge_weight", good.weights[1:], "edge_weight"),
        ("labels_bot", good.labels["bot"] + 1, r"bot labels \[2\], expected 0\.\.1"),
        ("labels_stance", good.labels["stance"][1:], "119 stance labels for 120 users"),
        ("labels_stance", torch.full((120,), -1), "are all -1"),
        ("features", good.features[:, 0], r"features \(120,\), expected \(users, columns\)"),
        ("features", good.features.index_fill(0, torch.tensor([7]), math.nan), "a feature of user 7 is not finite"),
        ("features", {"x": good.features}, "holds a dict, expected a dense tensor"),
        ("features", [1.0, 2.0], "holds a list"),
    ]
    for name, value, message in cases:
        path = files / f"{name}.pt"
        kept = path.read_bytes()
        torch.save(value, path)
        with pytest.raises(UserError, match=message):
            data.load(files, "mgtab")
        path.write_bytes(kept)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(UserError, match="not a file of a plain tensor"):
        data.load(files, "mgtab")


def test_missing_files_and_names(files: Path, tmp_path: Path) -> None:
    (files / "edge_weight.pt").unlink()
    with pytest.raises(UserError, match=r"no file edge_weight\.pt in .*MGTAB; expected the six files .*github"):
        data.load(files, "mgtab")
    with pytest.raises(UserError, match=r"no file large_features\.pt"):
        data.load(tmp_path, "mgtab-large")
    with pytest.raises(UserError, match="unknown data set"):
        data.load(tmp_path, "twibot")
    with pytest.raises(UserError, match="needs --data DIR"):
        data.load(None, "mgtab")


def test_large_layout(files: Path) -> None:
    small = data.load(files, "mgtab")
    folder = files.parent / "MGTAB-large"
    folder.mkdir()
    torch.save(torch.cat([small.features, torch.ones(30, 788)]), folder / "large_features.pt")
    for relation in range(7):
        torch.save(small.edges[:, small.types == relation], folder / f"large_edge_index{relation}.pt")
    for name in ("labels_bot.pt", "labels_stance.pt"):
        (folder / name).write_bytes((files / name).read_bytes())
    large = data.load(files.parent, "mgtab-large")
    assert len(large.features) == 150
    assert large.edge_counts() == small.edge_counts()
    assert large.labels["bot"][120:].tolist() == [-1] * 30
    assert torch.equal(torch.cat(large.splits("bot", 0)), torch.cat(small.splits("bot", 0)))
    assert any("expected 410,199" in line for line in data.describe(large))
    torch.save(torch.zeros(151), folder / "labels_bot.pt")
    with pytest.raises(UserError, match="151 labels for 150 users"):
        data.load(files.parent, "mgtab-large")


def write_cresci(folder: Path) -> None:
    folder.mkdir()
    made = data.generate(3, nodes=120)
    keep = made.types < 2
    values = {"edge_index": made.edges[:, keep], "edge_type": made.types[keep], "label": made.labels["bot"]}
    for name, width in (("cat", 1), ("num", 5)):
        values[f"{name}_properties_tensor"] = torch.rand(120, width)
    values |= {f"{name}_tensor": torch.rand(120, 768) for name in ("des", "tweets")}
    values |= {"train_idx": torch.arange(80), "val_idx": torch.arange(80, 110), "test_idx": torch.arange(110, 120)}
    for name, value in values.items():
        torch.save(value, folder / f"{name}.pt")


def test_cresci_layout(tmp_path: Path, run_paper: Any) -> None:
    folder = tmp_path / "Cresci-15"
    write_cresci(folder)
    found = data.load(tmp_path, "cresci-15")
    assert found.features.shape == (120, 1 + 5 + 768 + 768)
    assert [len(part) for part in found.splits("bot", 0)] == [80, 30, 10]  # the official loader exchanges the last two
    argv = ["--preset", "cresci-15", "--data", str(tmp_path), "--epochs", "1", "--hidden", "8", "--seeds", "1"]
    result = run_paper("mgtab", [*argv, "--out", str(tmp_path / "run")])
    assert result.code == 0, result.err
    assert "cresci-15/bot/gat/test_accuracy" in result.out
    torch.save(torch.tensor([120]), folder / "val_idx.pt")
    with pytest.raises(UserError, match=r"val_idx names user 120, expected 0\.\.119"):
        data.load(tmp_path, "cresci-15")
    torch.save(torch.empty(0), folder / "val_idx.pt")
    with pytest.raises(UserError, match="is empty"):
        data.load(tmp_path, "cresci-15")


def test_check_data(run_paper: Any, files: Path) -> None:
    result = run_paper("mgtab", ["--data", str(files), "--check-data"])
    assert result.code == 0
    assert "followers edges" in result.out and "expected 308,120" in result.out
    assert "expected 10,199" in result.out and "not a published count" in result.out
    published = torch.cat([torch.full((n,), i) for i, n in enumerate(data.EXPECTED_LABELS["bot"])])
    whole = labelled(published)
    lines = [line for line in data.describe(whole) if "edges" not in line]
    assert not any("expected" in line or "not a" in line for line in lines)
    assert run_paper("mgtab", ["--check-data"]).code == 0


# ---- runs ------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_a_run_on_the_official_files(run_paper: Any, files: Path, tmp_path: Path) -> None:
    """The paper's protocol on files in the official layout, with every network, and again with every defect."""
    every = ["gcn", "gat", "sage", "rgcn", "botrgcn", "hgt", "shgn", "rgt"]
    argv = ["--preset", "convolutional", "--networks", *every, "--hidden", "8", "--heads", "1", "--epochs", "2"]
    argv += ["--tasks", "stance", "--relations", "5", "2", "0", "--data", str(files), "--seed", "1"]
    runs = {}
    defects = ["columns", "dropout_validation", "test_selection", "same_layer", "plain_softmax", "two_relations"]
    for name, extra in (("clean", []), ("official", ["--defects", *defects, "swapped_scores"])):
        result = run_paper("mgtab", [*argv, *extra, "--out", str(tmp_path / name)])
        assert result.code == 0, result.err
        runs[name] = read(tmp_path / name)["metrics"]
    scores = ("accuracy", "precision", "recall", "f1")
    assert set(runs["clean"]) == {f"mgtab/stance/{name}/test_{score}" for name in every for score in scores}
    assert runs["clean"] != runs["official"]
    assert {row["kind"] for row in read(tmp_path / "clean")["data"]} == {"real"}
    rows = {row["metric"] for row in read(tmp_path / "clean")["reported"] if row.get("comparable")}
    assert "mgtab/stance/rgt/test_f1" in rows


def test_each_defect_changes_its_network(train: ModuleType) -> None:
    _, _, graph = random_graph(relations=3)
    x = torch.randn(30, 788)
    for network, defect in (("botrgcn", "columns"), ("shgn", "plain_softmax"), ("rgt", "two_relations")):
        outputs = []
        for defects in ((), (defect,)):
            made = train.setting(train.Config(networks=(network,), hidden=8, beta=0.5, defects=defects), network)
            torch.manual_seed(1)
            outputs.append(train.build(network, made, 788, 2, 3).eval()(x, graph))
        assert not torch.allclose(*outputs, atol=1e-4), defect
    for network in ("hgt", "shgn"):
        made = train.setting(train.Config(networks=(network,), defects=("same_layer",)), network)
        assert len(train.build(network, made, 788, 2, 3).layers) == 1


def test_the_epoch_is_chosen_by_validation(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept scores are those of the first epoch with the best validation accuracy; a defect asks the test users."""
    logged: list[dict[str, float]] = []
    kept: list[dict[str, float]] = []
    original, log = train.scores, train.Unit.log

    def score(*words: Any) -> dict[str, float]:
        kept.append(original(*words))
        return kept[-1]

    def spy(self: Any, **scalars: Any) -> None:
        logged.append(scalars)
        log(self, **scalars)

    monkeypatch.setattr(train, "scores", score)
    monkeypatch.setattr(train.Unit, "log", spy)
    argv = [
        "--networks",
        "hgt",
        "--classifiers",
        "--each-relation",
        "--all-relations",
        "--merged-relations",
        "--tasks",
        "bot",
        "--seeds",
        "1",
    ]
    argv += ["--nodes", "200", "--epochs", "12", "--hidden", "8", "--lr", "0.02"]
    for name, extra in (("val", []), ("test", ["--defects", "test_selection"])):
        logged.clear()
        kept.clear()
        assert train.main([*argv, *extra, "--out", str(tmp_path / name)]) == 0
        found = read(tmp_path / name)["metrics"]["generated/bot/hgt/test_accuracy"]["mean"]
        chosen = [row["val_accuracy"] for row in logged]
        rises = [v for i, v in enumerate(chosen) if v > max(chosen[:i], default=-1.0)]
        assert len(kept) == len(rises) > 1
        assert found == kept[-1]["accuracy"]
        assert name == "val" or found == max(chosen)


def test_a_broken_method_fails_the_claims(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RGCN without the edges' types, and in its place a network that merges all edges."""
    argv = ["--seeds", "1", "--nodes", "2000", "--epochs", "60", "--hidden", "32", "--lr", "0.003", "--tasks", "bot"]
    argv += ["--classifiers", "--networks", "--each-relation", "--all-relations", "gcn", "rgcn"]
    whole = train.RelationGraph
    verdicts = {}
    for name in ("intact", "untyped", "replaced"):
        with monkeypatch.context() as patch:
            if name == "untyped":
                patch.setattr(train, "RelationGraph", lambda edges, types, *rest: whole(edges, 0 * types, *rest))
            if name == "replaced":
                patch.setitem(train.CLASSES, "rgcn", train.GCN)
            assert train.main([*argv, "--out", str(tmp_path / name)]) == 0
        verdicts[name] = {claim["name"]: claim["holds"] for claim in read(tmp_path / name)["claims"]}
    # The other claims compare methods that were left out.
    assert verdicts["intact"] == {"types_beat_merged_edges": True, "types_themselves_help": True}
    assert not verdicts["untyped"]["types_themselves_help"]
    assert verdicts["replaced"] == {"types_beat_merged_edges": False, "types_themselves_help": False}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GCN(0, 8, 2, 1), "features is 0"),
        (lambda: GCN(5, 0, 2, 1), "hidden is 0"),
        (lambda: GCN(5, 8, 1, 1), "classes is 1, expected at least 2"),
        (lambda: RGCN(5, 8, 2, 0), "relations is 0"),
        (lambda: GCN(5, 8, 2, 1, dropout=1.0), "dropout is 1.0"),
        (lambda: GAT(5, 12, 2, 1), "multiple of its 8 heads"),
        (lambda: BotRGCN(787, 8, 2, 1), r"needs 20 \+ 768 features, the data have 787"),
        (lambda: BotRGCN(788, 12, 2, 1), "multiple of 8"),
        (lambda: SHGN(5, 8, 2, 1, beta=1.5), "beta is 1.5"),
        (lambda: SHGN(5, 8, 2, 1, linear=4, same_layer=True), "needs linear = hidden, got 4 and 8"),
        (lambda: HGT(5, 8, 2, 1, linear=4, same_layer=True), "needs linear = hidden"),
        (lambda: HGT(5, 8, 2, 1, out=0), "out is 0"),
        (lambda: RGT(5, 8, 2, 1, heads=0), "heads is 0"),
        (lambda: RelationGraph(torch.zeros(3, 2).long(), torch.zeros(2).long(), 3, 1), r"expected \(2, E\) integers"),
        (lambda: RelationGraph(torch.zeros(2, 2), torch.zeros(2).long(), 3, 1), r"expected \(2, E\) integers"),
        (lambda: RelationGraph(torch.tensor([[0], [9]]), torch.tensor([0]), 3, 1), r"names user 9, expected 0\.\.2"),
        (lambda: RelationGraph(torch.tensor([[0], [1]]), torch.tensor([-1]), 3, 1), "has relation -1"),
        (lambda: Pattern(torch.tensor([1, 0]), torch.tensor([0, 0]), (2, 2)), "sorted by row"),
        (lambda: Pattern(torch.tensor([2]), torch.tensor([0]), (2, 2)), "outside of its shape"),
    ],
)
def test_the_model_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "attention"], "needs --data"),
        (["--preset", "bots"], "unknown preset"),
        (["--tasks", "age"], "--tasks age"),
        (["--tasks"], "--tasks"),
        (["--networks", "gin"], "--networks gin"),
        (["--networks", "gcn", "gcn"], "--networks gcn gcn"),
        (["--classifiers", "cart"], "--classifiers cart"),
        (["--defects", "none"], "--defects none"),
        (["--relations", "7"], "--relations 7: expected different ones among 0..6"),
        (["--relations", "1", "1"], "--relations 1 1"),
        (["--relations"], "--relations"),
        (
            ["--networks", "--classifiers", "--all-relations", "--merged-relations", "--each-relation"],
            "nothing to train",
        ),
        (["--epochs", "0"], "--epochs is 0"),
        (["--hidden", "12"], "--hidden is 12, expected a multiple of 8"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--lr", "0"], "--lr is 0"),
        (["--weight-decay", "-1"], "--weight-decay is -1"),
        (["--heads", "0"], "--heads is 0"),
        (["--semantic-heads", "0"], "--semantic-heads is 0"),
        (["--rel-dim", "0"], "--rel-dim is 0"),
        (["--beta", "2"], "--beta is 2"),
        (["--nodes", "50"], "--nodes is 50"),
        (["--dataset", "cresci-15"], "--tasks bot"),
        (["--dataset", "mgtab"], "--data"),
        (["--dataset", "cresci-15", "--tasks", "bot", "--networks", "gcn", "--all-relations", "gcn"], "0 and 1 only"),
        (["--seeds", "0"], "--seeds is 0"),
    ],
)
def test_the_command_refuses(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


def test_data_errors_are_one_line(run_paper: Any, files: Path, tmp_path: Path) -> None:
    narrow = data.load(files, "mgtab").features[:, :100]
    cases = [
        (["--data", str(tmp_path)], "generates its data"),
        (["--preset", "features", "--data", str(files / "features.pt")], "is a file"),
        (["--preset", "features", "--check-data"], "needs --data"),
    ]
    torch.save(narrow, files / "features.pt")
    torch.save(data.load(files, "mgtab").types.clamp_max(5), files / "edge_type.pt")
    some = ["--preset", "convolutional", "--data", str(files), "--networks"]
    cases.append(([*some, "botrgcn"], "BotRGCN needs"))
    cases.append(([*some, "gcn", "--relations", "0", "6"], "relation 6 (hashtag) has no edges"))
    for i, (argv, message) in enumerate(cases):
        result = run_paper("mgtab", [*argv, "--out", str(tmp_path / f"run{i}")])
        assert (result.code, len(result.errors)) == (2, 1), result.err
        assert message in result.errors[0]
