"""DosCond: oracles of sampling, matching and the networks, peers, loaders, bad input, resume and the claims."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from papers.doscond import data, model
from papers.doscond.model import GCN, PGE, CondensedGraphs, CondensedNodes, DenseGraphs, GraphSet, NodeNet, Sparse
from shared.errors import UserError


@pytest.fixture(scope="module")
def molecules() -> data.GraphData:
    """Generated molecules."""
    return data.generate_graphs(torch.Generator().manual_seed(0), 60, 30, 10)


@pytest.fixture(scope="module")
def graphs(molecules: data.GraphData) -> GraphSet:
    return GraphSet(molecules.x, molecules.edges, molecules.ptr)


def shake(module: torch.nn.Module) -> Any:
    """Move every parameter off its start, so that no bias is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


# ---- discrete structure ----------------------------------------------------------------------------------------------


def test_temperature() -> None:
    found = [model.temperature(k) for k in (0, 50, 100, 150, 200, 900)]
    assert found == pytest.approx([1.0, 0.31623, 0.1, 0.031623, 0.01, 0.01], rel=1e-4)


def test_start_at_real_graphs(graphs: GraphSet) -> None:
    x, adj = graphs.dense(torch.tensor([3, 8]), 30)
    small = CondensedGraphs([1, 1], 30, 7)
    small.start(x, adj)
    assert torch.equal(small.adjacency(), adj)
    assert torch.equal(small.x, x)
    assert torch.sigmoid(small.omega).unique().tolist() == pytest.approx([0.0066929, 0.993307], abs=1e-6)
    share = float(adj.mean())
    assert small.penalty().item() == pytest.approx(0.0066929 - 0.013386 * share, abs=1e-5)
    assert small.penalty().item() > 0


def test_start_at_noise() -> None:
    small = CondensedGraphs([2, 1], 6, 3)
    small.start()
    assert small.omega.abs().max() <= 10
    assert small.labels.tolist() == [0, 0, 1]
    assert 0.3 < float(small.sparsity) < 0.7


def test_samples_are_bernoulli_at_low_temperature() -> None:
    small = CondensedGraphs([1], 5, 2)
    with torch.no_grad():
        small.omega.normal_(0, 1.5)
        small.drawn.fill_(400)
        mean = torch.stack([small.relaxed() for _ in range(3000)]).mean(0)
    chance = torch.sigmoid(small.logits()).detach()
    chance.diagonal(dim1=1, dim2=2).zero_()
    assert (mean - chance).abs().max() < 4 * 0.5 / math.sqrt(3000)
    assert int(small.drawn) == 3400


def test_samples_are_undirected_and_have_a_gradient() -> None:
    small = CondensedGraphs([2], 6, 2)
    small.start()
    adj = small.relaxed()
    assert torch.allclose(adj, adj.transpose(1, 2), rtol=1e-5)
    assert not adj.diagonal(dim1=1, dim2=2).any()
    (adj**2).sum().backward()
    assert small.omega.grad.isfinite().all()
    assert (small.omega.grad[:, ~torch.eye(6, dtype=torch.bool)] != 0).all()
    directed = CondensedGraphs([1], 6, 2, symmetric=False)
    directed.start()
    assert not torch.equal(directed.adjacency(), directed.adjacency().transpose(1, 2))


def test_continuous_structure_stays_in_its_interval() -> None:
    small = CondensedGraphs([1], 4, 2, discrete=False)
    with torch.no_grad():
        small.omega.copy_(torch.linspace(-1, 2, 16).view(1, 4, 4))
    small.clamp()
    assert (small.omega.min(), small.omega.max()) == (0, 1)
    assert small.relaxed() is small.omega


def test_class_counts() -> None:
    labels = torch.tensor([0] * 63 + [1] * 125)
    assert model.class_counts(labels, rate=0.1) == [6, 12]
    assert model.class_counts(labels, ipc=3) == [3, 3]
    with pytest.raises(ValueError, match=r"class 1 has no training member, counts are \[1, 0, 1\]"):
        model.class_counts(torch.tensor([0, 2]), ipc=1)
    with pytest.raises(ValueError, match=r"rate 0.01 of \[63, 125\] leaves 0 for class 1"):
        model.class_counts(labels, rate=0.01)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "instance"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_merged_plain_and_dense_agree(molecules: data.GraphData, graphs: GraphSet, norm: str, pooling: str) -> None:
    """Values and gradients of one network on merged rows, on all rows, and on dense graphs of one size."""
    chosen = (graphs.sizes == graphs.sizes[5]).nonzero().squeeze(1)
    assert len(chosen) > 1
    plain = GraphSet(molecules.x, molecules.edges, molecules.ptr, merge=False)
    dense = DenseGraphs(*graphs.dense(chosen, int(graphs.sizes[5])))
    network = shake(GCN(7, 2, 12, norm=norm, pooling=pooling))
    batches = [graphs.batch(chosen), plain.batch(chosen), dense]
    assert len(batches[0].first) < len(batches[1].first) == int(graphs.sizes[chosen].sum())
    found = []
    for batch in batches:
        out = network(batch)
        loss = model.graph_loss(out, molecules.labels[chosen])
        found.append((out, torch.autograd.grad(loss, list(network.parameters()))))
    for out, gradient in found[1:]:
        assert torch.allclose(out, found[0][0], atol=1e-5)
        for a, b in zip(gradient, found[0][1], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_padding_is_silent_without_biases(graphs: GraphSet) -> None:
    index = torch.tensor([4])
    size = int(graphs.sizes[4])
    network = GCN(7, 2, 8, pooling="sum")
    padded = DenseGraphs(*graphs.dense(index, size + 5))
    assert torch.allclose(network(padded), network(graphs.batch(index)), atol=1e-5)
    mean = GCN(7, 2, 8)
    assert torch.allclose(mean.embed(padded) * (size + 5), mean.embed(graphs.batch(index)) * size, atol=1e-5)


def test_cut_graphs(graphs: GraphSet) -> None:
    x, adj = graphs.dense(torch.tensor([2]), 30)
    cut_x, cut_adj = graphs.dense(torch.tensor([2]), 6)
    assert torch.equal(cut_x, x[:, :6])
    assert torch.equal(cut_adj, adj[:, :6, :6])


def test_networks_side_by_side(molecules: data.GraphData, graphs: GraphSet) -> None:
    """K networks in one pass give what each gives alone, and learn alone."""
    index = torch.arange(8)
    many = shake(GCN(7, 2, 6, copies=3))
    alone = [GCN(7, 2, 6) for _ in range(3)]
    for k, network in enumerate(alone):
        network.load_state_dict({name: value[k] for name, value in many.state_dict().items()})
    batch, labels = graphs.batch(index), molecules.labels[index]
    out = many(batch)
    assert out.shape == (3, 8, 2)
    model.graph_loss(out, labels).sum().backward()
    for k, network in enumerate(alone):
        single = network(batch)
        assert torch.allclose(single, out[k], atol=1e-6)
        model.graph_loss(single, labels).backward()
        for a, b in zip(network.parameters(), many.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad[k], atol=1e-6)


def test_losses() -> None:
    out, labels = torch.randn(5, 3).log_softmax(1), torch.tensor([0, 2, 1, 1, 0])
    assert model.graph_loss(out, labels).item() == pytest.approx(F.nll_loss(out, labels).item(), rel=1e-6)
    logit, target = torch.randn(2, 5, 1), labels.clamp(max=1)
    expected = [F.binary_cross_entropy_with_logits(row[:, 0], target.float()).item() for row in logit]
    assert model.graph_loss(logit, target).tolist() == pytest.approx(expected)


def test_sparse_products() -> None:
    row, col = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([1, 3, 1, 0, 0])
    matrix = Sparse.of(row, col, torch.randn(5), (4, 5))
    dense = torch.zeros(4, 5).index_put((matrix.row, matrix.col), matrix.value, accumulate=True)
    assert torch.equal(matrix.dense(), dense)
    assert torch.allclose(matrix.t.dense(), dense.t())
    assert torch.allclose(matrix.rows(torch.tensor([2, 1, 2])).dense(), dense[[2, 1, 2]])
    h = torch.randn(5, 3)
    assert torch.allclose(matrix @ h, dense @ h, atol=1e-6)
    empty = Sparse.of(row[:0], col[:0], torch.randn(0), (2, 5))
    assert torch.equal(empty @ h, torch.zeros(2, 3))
    double = Sparse(matrix.start, matrix.col, matrix.value.double(), 5)
    z = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda h: (double @ h).sin(), (z,))


def test_gradients_of_gradients() -> None:
    """The matching distance of a network on a 4-node graph, differentiated by features and adjacency."""
    network = shake(GCN(3, 2, 3, layers=2).double())
    fixed = [torch.randn_like(p) for p in network.parameters()]
    labels = torch.tensor([1])

    def matched(x: Tensor, adj: Tensor) -> Tensor:
        loss = model.graph_loss(network(DenseGraphs(x, adj)), labels)
        return model.distance(torch.autograd.grad(loss, list(network.parameters()), create_graph=True), fixed)

    x = torch.rand(1, 4, 3, dtype=torch.float64, requires_grad=True)
    adj = torch.rand(1, 4, 4, dtype=torch.float64).add(0.2).requires_grad_()
    assert torch.autograd.gradcheck(matched, (x, adj))


def test_refuses_bad_graphs() -> None:
    x, ptr = torch.ones(3, 1), torch.tensor([0, 2, 3])
    for edges, at, message in (
        ([[0], [2]], ptr, "an edge leaves graph 0"),
        ([[0], [5]], ptr, "an edge names node 5"),
        ([[0], [1]], torch.tensor([0, 2, 2, 3]), "graph 1 has no node"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphSet(x, torch.tensor(edges), at)


def test_isolated_nodes_and_repeated_edges() -> None:
    edges = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])  # 0 - 1 twice, a loop at 1, node 2 alone
    graphs = GraphSet(torch.eye(3), edges, torch.tensor([0, 3]), layers=1)
    expected = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    assert torch.allclose(graphs.hat.dense(), expected)


# ---- matching --------------------------------------------------------------------------------------------------------


def test_distances() -> None:
    real = [torch.randn(4, 3), torch.randn(4)]
    zero = [torch.zeros_like(g) for g in real]
    for metric in model.METRICS:
        assert model.distance(real, real, metric).item() == pytest.approx(0, abs=1e-5)
    assert model.distance(zero, real).item() == pytest.approx(1)
    twice = [2 * g for g in real]
    assert model.distance(twice, real).item() == pytest.approx(1)
    assert model.distance(twice, real, "cos").item() == pytest.approx(0, abs=1e-5)
    assert model.distance(twice, real, relative=False).item() == pytest.approx(sum((g * g).sum() for g in real).item())
    opposite = [-real[0], real[1]]
    assert model.distance(opposite, real, "ours").item() == pytest.approx(8, abs=1e-4)  # four rows, no bias
    with pytest.raises(ValueError, match="metric is 'l1', expected one of mse, cos, ours"):
        model.distance(real, real, "l1")


def test_equal_sets_are_a_fixed_point(molecules: data.GraphData, graphs: GraphSet) -> None:
    size = graphs.sizes[0]
    index = ((graphs.sizes == size) & (molecules.labels == molecules.labels[0])).nonzero().squeeze(1)
    x, adj = graphs.dense(index, int(size))
    x.requires_grad_()
    network = shake(GCN(7, 2, 16))
    loss = model.match(
        network, (DenseGraphs(x, adj), molecules.labels[index]), (graphs.batch(index), molecules.labels[index])
    )
    assert loss.item() == pytest.approx(0, abs=1e-8)
    loss.backward(inputs=[x])
    assert x.grad.abs().max() < 1e-4


def test_bound() -> None:
    x, adj = torch.randn(2, 5, 3), (torch.rand(2, 5, 5) < 0.4).float()
    dense = DenseGraphs(x, adj)
    norm = (dense.hat @ dense.hat @ dense.hat @ x).sum(1).norm().item()
    expected = 1.5 / 10 * 0.5 / 2 * norm / math.sqrt(2)
    assert model.bound(dense, x, 3, "sum").item() == pytest.approx(expected, rel=1e-5)


# ---- coresets --------------------------------------------------------------------------------------------------------


def test_coresets() -> None:
    rows = torch.randn(20, 4)
    centre, chosen = rows.mean(0), model.herding(rows, 5).tolist()
    for k in range(5):
        best = min(
            (i for i in range(20) if i not in chosen[:k]),
            key=lambda i: (centre - rows[[*chosen[:k], i]].mean(0)).norm().item(),
        )
        assert chosen[k] == best
    chosen = model.k_center(rows, 5).tolist()
    assert chosen[0] == (rows - centre).norm(dim=1).argmin()
    for k in range(1, 5):
        assert chosen[k] == torch.cdist(rows, rows[chosen[:k]]).min(1).values.argmax()
    assert sorted(model.herding(rows, 20).tolist()) == list(range(20))


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyg() -> ModuleType:
    return pytest.importorskip("torch_geometric.nn", reason="torch-geometric is not installed")


def official(pyg: ModuleType, network: GCN, dense: bool) -> list[Any]:
    """Convolutions as the official code takes them from torch-geometric, with the weights of a network."""
    kind, out = (pyg.DenseGCNConv if dense else pyg.GCNConv), []
    for conv in network.convs:
        peer = kind(conv.lin.weight.shape[1], conv.lin.weight.shape[0])
        peer.load_state_dict(conv.state_dict())  # the names agree
        out.append(peer)
    return out


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_peer_networks(pyg: ModuleType, molecules: data.GraphData, graphs: GraphSet, norm: str) -> None:
    network = shake(GCN(7, 2, 10, norm=norm))
    instance = pyg.InstanceNorm(10, affine=False) if norm == "instance" else torch.nn.Identity()
    index = torch.tensor([1, 5, 6])
    nodes = graphs.nodes_of(index)
    place = torch.full((len(molecules.x),), -1)
    place[nodes] = torch.arange(len(nodes))
    edges = place[molecules.edges]
    edges = edges[:, (edges >= 0).all(0)]
    x, batch = molecules.x[nodes], torch.repeat_interleave(torch.arange(3), graphs.sizes[index])
    for conv in official(pyg, network, dense=False):
        x = instance(conv(x, edges)).relu()
    expected = network.lin3(pyg.global_mean_pool(x, batch)).log_softmax(1)
    assert torch.allclose(network(graphs.batch(index)), expected, atol=1e-5)

    small = CondensedGraphs([2, 1], 12, 7)
    small.start()
    adj, x = small.relaxed(), small.x
    found = network(DenseGraphs(x, adj))
    for conv in official(pyg, network, dense=True):
        x = instance(conv(x, adj).flatten(0, 1)).relu().view(3, 12, 10)
    assert torch.allclose(found, network.lin3(x.mean(1)).log_softmax(1), atol=1e-5)


def test_peer_matching_step(pyg: ModuleType, molecules: data.GraphData, graphs: GraphSet) -> None:
    """Loss and gradients of a whole step beside the official procedure on torch-geometric's layers."""
    network, small = shake(GCN(7, 2, 10)), CondensedGraphs([1, 1], 12, 7)
    small.start(*graphs.dense(torch.tensor([0, 1]), 12))
    real = graphs.batch(torch.tensor([1, 3]))
    state = torch.get_rng_state()
    ours = model.match(network, small.of_class(small.sample(), 1), (real, torch.ones(2, dtype=torch.int64)))
    gradients = torch.autograd.grad(ours, [small.omega, small.x])

    small.drawn.zero_()
    torch.set_rng_state(state)
    adj, convs = small.relaxed(), official(pyg, network, dense=True)
    parameters = [p for conv in convs for p in (conv.bias, conv.lin.weight)] + list(network.lin3.parameters())
    x = small.x[1:]
    for conv in convs:
        x = conv(x, adj[1:]).relu()
    loss = F.nll_loss(network.lin3(x.mean(1)).log_softmax(1), torch.tensor([1]))
    of_synthetic = torch.autograd.grad(loss, parameters, create_graph=True)
    parts = [p for conv in network.convs for p in (conv.bias, conv.lin.weight)] + list(network.lin3.parameters())
    of_real = torch.autograd.grad(F.nll_loss(network(real), torch.tensor([1, 1])), parts)
    s, r = (torch.cat([g.flatten() for g in side]) for side in (of_synthetic, of_real))
    expected = ((s - r) ** 2).sum() / (r**2).sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    for a, b in zip(gradients, torch.autograd.grad(expected, [small.omega, small.x]), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


# ---- node variant ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def citations() -> data.NodeData:
    return data.generate_nodes(torch.Generator().manual_seed(0), 200, 4, vocabulary=40, train=5, val=40)


@pytest.fixture(scope="module")
def hat(citations: data.NodeData) -> Sparse:
    return GraphSet(citations.x.to_dense(), citations.edges, torch.tensor([0, 200])).hat


def test_pge_is_an_mlp_on_pairs() -> None:
    pge = PGE(5, 8)
    x = torch.randn(6, 5)
    i, j = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    z = torch.cat([x[i.flatten()], x[j.flatten()]], 1)
    for layer, bn in zip(pge.layers, pge.bns, strict=False):
        z = F.relu(bn(layer(z)))
    z = pge.layers[2](z).view(6, 6)
    expected = torch.sigmoid((z + z.t()) / 2) * (1 - torch.eye(6))
    assert torch.allclose(pge(x), expected, atol=1e-5)


def test_neighbourhood(citations: data.NodeData, hat: Sparse) -> None:
    network = shake(NodeNet(40, 4, 8))
    dense, nodes = hat.dense(), torch.tensor([7, 3, 150])
    full = network(citations.x.to_dense(), [dense, dense])
    ids, hats = model.neighbourhood(hat, nodes, (200, 200))
    assert torch.allclose(network(citations.x.to_dense()[ids], hats), full[nodes], atol=1e-5)
    x = Sparse.of(*citations.x.indices(), citations.x.values(), (200, 40))
    assert torch.allclose(network(x.rows(ids), hats), full[nodes], atol=1e-5)
    sgc = shake(NodeNet(40, 4, 8, kind="sgc"))
    expected = (dense @ dense @ sgc.hidden(citations.x.to_dense(), [])).log_softmax(1)
    assert torch.allclose(sgc(citations.x.to_dense()[ids], hats), expected[nodes], atol=1e-5)

    ids, hats = model.neighbourhood(hat, nodes, (3, 2))
    assert torch.equal(ids[:3], nodes)
    assert len(ids.unique()) == len(ids) == hats[0].width
    assert [len(hats[1]), hats[1].width] == [3, len(hats[0])]
    for step, fanout in ((hats[1], 3), (hats[0], 2)):
        wanted = (dense[ids[: len(step)]] > 0).sum(1).clamp(max=fanout)
        assert torch.equal(step.start.diff(), wanted)
        assert torch.allclose(step.dense()[step.row, step.col], dense[ids[step.row], ids[step.col]])


def test_node_matching(citations: data.NodeData, hat: Sparse) -> None:
    """Classes weigh as their size, the squared difference is not relative, and the gradient reaches x and the PGE."""
    small, network = CondensedNodes([1, 2, 2, 4], 40, 8), shake(NodeNet(40, 4, 8))
    with torch.no_grad():
        small.x.uniform_()
    real = []
    for c in range(4):
        nodes = citations.train[citations.labels[citations.train] == c]
        ids, hats = model.neighbourhood(hat, nodes, (200, 200))
        real.append((citations.x.to_dense()[ids], hats, citations.labels[nodes]))
    loss = model.match_nodes(network, small, real)
    expected, parameters = 0.0, list(network.parameters())
    for c, (x, hats, labels) in enumerate(real):
        r = torch.autograd.grad(F.nll_loss(network(x, hats), labels), parameters)
        out = network(small.x, [small.hat()] * 2)[small.parts[c]]
        s = torch.autograd.grad(F.nll_loss(out, torch.full((len(out),), c)), parameters)
        expected += len(out) / 4 * sum(((a - b) ** 2).sum().item() for a, b in zip(s, r, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward(inputs=[small.x, *small.pge.parameters()])
    assert small.x.grad.abs().max() > 0
    assert small.pge.layers[0].weight.grad.abs().max() > 0
    assert model.match_nodes(network, small, real, "ours").item() > 0


# ---- sizes -----------------------------------------------------------------------------------------------------------

PARAMETERS = {"MUTAG": 34_306, "NCI1": 38_146, "DD": 44_802}


def test_presets_at_full_size(train: ModuleType) -> None:
    seen = set()
    for preset in train.PRESETS.values():
        for name in preset.config.sets:
            s, counts = train.setting(preset.config, name), data.EXPECTED.get(name, {"features": 7, "classes": 2})
            with torch.device("meta"):
                if name in data.NODE_SETS:
                    network = NodeNet(counts["features"], counts["classes"], s.hidden, s.layers, s.dropout, s.kind)
                    CondensedNodes([2] * counts["classes"], counts["features"], s.pge_hidden)
                else:
                    outputs = 1 if name in data.OGB else counts["classes"]
                    network = GCN(counts["features"], outputs, s.hidden, s.layers, s.norm, s.pooling)
                    for ipc in preset.config.ipc:
                        total = [ipc] * counts["classes"]
                        small = CondensedGraphs(total, s.nodes, counts["features"], symmetric=s.symmetric)
                        assert small.omega.shape == (sum(total), s.nodes, s.nodes)
            size = sum(p.numel() for p in network.parameters())
            if name in PARAMETERS:
                assert size == PARAMETERS[name]
            seen.add(name)
    assert seen == set(train.SETS)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_generated_graphs(molecules: data.GraphData) -> None:
    assert molecules.counts() == {"graphs": 60, "features": 7, "classes": 2, "train": 30, "val": 10, "test": 20}
    assert torch.equal(molecules.x.sum(1), torch.ones(len(molecules.x)))
    sizes = molecules.ptr.diff()
    assert (sizes >= 10).all() and (sizes <= 26).all()
    graph = torch.repeat_interleave(torch.arange(60), sizes)
    assert torch.equal(graph[molecules.edges[0]], graph[molecules.edges[1]])
    adj = torch.zeros(len(graph), len(graph))
    adj[molecules.edges[0], molecules.edges[1]] = 1
    assert torch.equal(adj, adj.t())
    reach = torch.linalg.matrix_power(((adj + torch.eye(len(graph))) / 8).double(), 26) > 0
    assert torch.equal(reach, graph[:, None] == graph[None])  # trees: each graph hangs together
    again = data.generate_graphs(torch.Generator().manual_seed(0), 60, 30, 10)
    assert torch.equal(again.x, molecules.x)


def test_generated_nodes(citations: data.NodeData) -> None:
    assert citations.counts()["train"] == 20
    assert torch.bincount(citations.labels[citations.train]).tolist() == [5] * 4
    same = citations.labels[citations.edges[0]] == citations.labels[citations.edges[1]]
    assert 0.65 < same.double().mean() < 0.85
    assert torch.allclose(citations.x.to_dense().sum(1), torch.ones(200))


@pytest.mark.parametrize("name", ["MUTAG", "NCI1", "PROTEINS"])
def test_real_graphs(data_root: Path, name: str) -> None:
    folder = data_root / "tu-graphs"
    if not (folder / f"{name}.txt").is_file():
        pytest.skip(f"{name} is not in {folder}")
    made = data.load_graphs(folder, name)
    assert made.counts() == data.EXPECTED[name]
    assert not any("expected" in line for line in data.check(folder, name))
    other = data.load_graphs(folder, name, split=1)
    assert not torch.equal(made.test, other.test)
    if name == "MUTAG":
        graphs = GraphSet(made.x, made.edges, made.ptr)
        assert len(graphs.first) < len(made.x) / 10  # molecules repeat themselves
        plain = GraphSet(made.x, made.edges, made.ptr, merge=False)
        network = shake(GCN(7, 2))
        with torch.no_grad():
            assert torch.allclose(network(graphs.batch(made.val)), network(plain.batch(made.val)), atol=1e-5)


@pytest.mark.parametrize("name", ["cora", "citeseer"])
def test_real_nodes(data_root: Path, name: str) -> None:
    folder = data_root / "planetoid-geomgcn"
    if not folder.is_dir():
        pytest.skip("planetoid-geomgcn is absent")
    made = data.load_nodes(folder, name)
    assert made.counts() == data.EXPECTED[name]
    total = torch.sparse.sum(made.x, 1).to_dense()
    assert torch.allclose(total[total > 0], torch.ones(()))
    assert not any("expected" in line for line in data.check(folder, name))


def put_ogb(folder: Path, **change: str) -> None:
    """Three molecules of two, one and three atoms; bonds listed from one end."""
    parts = {
        "raw/num-node-list": "2\n1\n3\n",
        "raw/num-edge-list": "1\n0\n2\n",
        "raw/edge": "0,1\n0,1\n1,2\n",
        "raw/node-feat": "".join(f"{i},0,3,4,0,0,1,0,0\n" for i in range(6)),
        "raw/graph-label": "0\n1\n1\n",
        "split/scaffold/train": "0\n1\n",
        "split/scaffold/valid": "2\n",
        "split/scaffold/test": "",
    }
    for name, text in (parts | change).items():
        path = folder / "ogbg_molbace" / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))


def test_ogb_files(tmp_path: Path) -> None:
    put_ogb(
        tmp_path,
        **{
            "raw/num-node-list": "2\n1\n3\n1\n",
            "raw/num-edge-list": "1\n0\n2\n0\n",
            "raw/node-feat": "".join(f"{i},0,3,4,0,0,1,0,0\n" for i in range(7)),
            "raw/graph-label": "0\n1\n1\n0\n",
            "split/scaffold/test": "3\n",
        },
    )
    made = data.load_graphs(tmp_path, "ogbg-molbace")
    assert made.edges.tolist() == [[0, 3, 4, 1, 4, 5], [1, 4, 5, 0, 3, 4]]
    assert made.ptr.tolist() == [0, 2, 3, 6, 7]
    assert made.x[4].tolist() == [4, 0, 3, 4, 0, 0, 1, 0, 0]
    assert (made.metric, made.classes, made.train.tolist(), made.test.tolist()) == ("auc", 2, [0, 1], [3])
    assert "  graphs           4   expected 1513" in data.check(tmp_path, "ogbg-molbace")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "at least one graph each"),
        ({"split/scaffold/test": "7\n"}, "the split names graph 8, there are 3"),
        ({"split/scaffold/test": "1\n"}, "disjoint"),
        ({"raw/edge": "0,1\n0,1\n1,3\n"}, "graph 3 has 3 nodes, an edge names another"),
        ({"raw/edge": "0,1\n0,1\n"}, "6 nodes, 2 edges, 3 labels for counts of 6, 3 and 3 graphs"),
        ({"raw/node-feat": "1,x\n"}, "expected numbers between commas"),
        ({"raw/graph-label": "0\n1\n5\n", "split/scaffold/train": "0\n", "split/scaffold/test": "1\n"}, "has label 5"),
    ],
)
def test_bad_ogb_files(tmp_path: Path, change: dict[str, str], message: str) -> None:
    put_ogb(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        data.load_graphs(tmp_path, "ogbg-molbace")


def test_superpixel_files(tmp_path: Path) -> None:
    folder = tmp_path / "CIFAR10" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "val", "test"):
        rows = [
            {
                "x": torch.rand(3 + c % 2, 3),
                "pos": torch.rand(3 + c % 2, 2),
                "edge_index": torch.tensor([[0, 1], [1, 2]]),
                "edge_attr": torch.rand(2, 1),
                "y": torch.tensor([c]),
            }
            for c in range(10)
        ]
        torch.save(rows, folder / f"CIFAR10_{part}.pt")
    made = data.load_graphs(tmp_path, "CIFAR10")
    assert made.counts() == {"graphs": 30, "features": 5, "classes": 10, "train": 10, "val": 10, "test": 10}
    assert made.edges[:, 2:4].tolist() == [[3, 4], [4, 5]]
    graphs = GraphSet(made.x, made.edges, made.ptr)
    _, adj = graphs.dense(torch.tensor([0]), 4)
    assert adj[0].nonzero().tolist() == [[1, 0], [2, 1]]  # row: the node that is reached
    torch.save([{"x": torch.rand(1, 3)}], folder / "CIFAR10_val.pt")
    with pytest.raises(UserError, match="expected a list of graphs with x, pos, edge_index and y"):
        data.load_graphs(tmp_path, "CIFAR10")
    (folder / "CIFAR10_val.pt").write_bytes(b"no archive")
    with pytest.raises(UserError, match="no readable list of graphs"):
        data.load_graphs(tmp_path, "CIFAR10")
    (folder / "CIFAR10_val.pt").unlink()
    with pytest.raises(UserError, match=r"no file CIFAR10_val\.pt; expected at"):
        data.load_graphs(tmp_path, "CIFAR10")


def put_saint(folder: Path, name: str) -> Path:
    from scipy.sparse import csr_matrix, save_npz

    base = folder / name
    base.mkdir(parents=True)
    save_npz(base / "adj_full.npz", csr_matrix((np.ones(3), ([0, 1, 2], [1, 2, 0])), shape=(6, 6)))
    np.save(base / "feats.npy", np.arange(12.0).reshape(6, 2))
    (base / "role.json").write_text(json.dumps({"tr": [0, 1, 2, 3], "va": [4], "te": [5]}))
    (base / "class_map.json").write_text(json.dumps({str(i): 1 + i % 2 for i in range(6)}))
    return base


def test_saint_files(tmp_path: Path) -> None:
    put_saint(tmp_path, "flickr")
    base = put_saint(tmp_path, "ogbn-arxiv")
    flickr, arxiv = data.load_nodes(tmp_path, "flickr"), data.load_nodes(tmp_path, "ogbn-arxiv")
    assert (flickr.inductive, arxiv.inductive) == (True, False)
    assert flickr.edges.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert arxiv.edges.shape == (2, 6)
    assert flickr.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.allclose(flickr.x[:4].mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(flickr.x[:4].std(0, correction=0), torch.ones(2), atol=1e-6)
    assert "  nodes            6   expected 169343" in data.check(tmp_path, "ogbn-arxiv")
    np.save(base / "feats.npy", np.zeros((5, 2)))
    with pytest.raises(UserError, match=r"feats\.npy has shape \(5, 2\), expected \(6, d\)"):
        data.load_nodes(tmp_path, "ogbn-arxiv")
    (base / "role.json").write_text("{}")
    with pytest.raises(UserError, match="KeyError 'tr'; expected the files of GraphSAINT"):
        data.load_nodes(tmp_path, "ogbn-arxiv")
    (base / "role.json").unlink()
    with pytest.raises(UserError, match=r"no file role\.json; expected at"):
        data.load_nodes(tmp_path, "ogbn-arxiv")


def test_unknown_sets(tmp_path: Path) -> None:
    for load in (data.load_graphs, data.load_nodes):
        with pytest.raises(UserError, match=r"unknown \w+ set 'karate', expected one of"):
            load(tmp_path, "karate")
    with pytest.raises(ValueError, match="expected 2 or more each"):
        data.generate_graphs(torch.Generator(), 10, 9, 1)
    with pytest.raises(ValueError, match="too few"):
        data.generate_nodes(torch.Generator(), 100)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GCN(3, 2, norm="batch"), "norm is 'batch', expected one of none, instance"),
        (lambda: GCN(3, 2, pooling="max"), "pooling is 'max', expected one of mean, sum"),
        (lambda: GCN(3, 2, hidden=0), "0 hidden"),
        (lambda: NodeNet(3, 2, kind="gat"), "kind is 'gat'"),
        (lambda: NodeNet(3, 2, dropout=1.0), "dropout 1.0"),
        (
            lambda: CondensedGraphs([1], 4, 2).start(torch.ones(1, 5, 2), torch.ones(1, 5, 5)),
            r"graphs \(1, 5, 2\) and \(1, 5, 5\), expected \(1, 4, 2\) and \(1, 4, 4\)",
        ),
    ],
)
def test_the_model_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "mutag"], "needs --data"),
        (["--preset", "mutagg"], "did you mean mutag?"),
        (["--sets", "karate"], "--sets karate"),
        (["--arms", "gcond"], "--arms gcond"),
        (["--sets", "cora", "--arms", "continuous"], "nodes have only"),
        (["--ipc", "1", "1"], "--ipc 1 1"),
        (["--rate", "1.5"], "--rate is 1.5"),
        (["--metric", "l1"], "mse"),
        (["--pooling", "max"], "mean"),
        (["--lr-adj", "-1"], "--lr-adj is -1"),
        (["--lr", "0"], "--lr is 0"),
        (["--outer", "0"], "--outer is 0"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--train-graphs", "3"], "--train-graphs is 3"),
        (["--sets", "MUTAG"], "--data"),
        (["--sets", "molecules", "--ipc", "300", "--arms", "random"], "300 training graphs of class 0 asked for"),
        (["--arms", "random", "--sets", "molecules", "--ipc", "0", "--rate", "0.001"], "leaves -1 for class 1"),
        (
            ["--sets", "molecules", "--ipc", "20", "--nodes", "10", "--arms", "doscond"],
            "20 graphs with at most 10 nodes of class 0 asked for, there are",
        ),
    ],
)
def test_the_command_refuses(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


def test_check_data(run_paper: Any, data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "tu-graphs"
    if not folder.is_dir():
        pytest.skip("tu-graphs is absent")
    result = run_paper("doscond", ["--data", str(folder), "--check-data"])
    assert result.code == 0
    assert "DD: MISSING" in result.out
    assert "  train          150" in result.out
    result = run_paper("doscond", ["--preset", "dd", "--data", str(folder), "--check-data"])
    assert (result.code, len(result.errors)) == (2, 1)
    assert "DD_A.txt" in result.err
    assert run_paper("doscond", ["--data", str(tmp_path), "--check-data"]).code == 2
    assert "nothing to check" in run_paper("doscond", ["--check-data"]).out


# ---- training --------------------------------------------------------------------------------------------------------


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_stop_and_resume_within_condensation(run_paper: Any, tmp_path: Path) -> None:
    flags = ["--preset", "smoke", "--sets", "molecules", "--arms", "doscond", "whole", "--iterations", "6"]
    flags += ["--drop-at", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_paper("doscond", [*flags, "--out", str(whole)]).code == 0
    assert run_paper("doscond", [*flags, "--stop-after", "7", "--out", str(parts)]).code == 0
    assert (parts / "checkpoint" / "units").is_dir() and not (parts / "result.json").exists()
    assert run_paper("doscond", ["--resume", str(parts)]).code == 0
    assert result_of(whole)["metrics"] == result_of(parts)["metrics"]
    assert {row["kind"] for row in result_of(whole)["data"]} == {"generated"}


def test_real_presets_run(train: ModuleType, data_root: Path, tmp_path: Path) -> None:
    """Every arm on MUTAG and on Cora, a few steps each."""
    folder = data_root / "tu-graphs"
    if not (folder / "MUTAG.txt").is_file() or not (data_root / "planetoid-geomgcn").is_dir():
        pytest.skip("tu-graphs or planetoid-geomgcn is absent")
    few = ["--iterations", "2", "--outer", "2", "--epochs", "2", "--evaluations", "2", "--seeds", "1"]
    argv = ["--preset", "mutag", "--data", str(folder), "--ipc", "2", "--arms", *train.GRAPH_ARMS, *few]
    assert train.main([*argv, "--out", str(tmp_path / "mutag")]) == 0
    metrics = result_of(tmp_path / "mutag")["metrics"]
    for arm in train.GRAPH_ARMS:
        name = "MUTAG/whole" if arm == "whole" else f"MUTAG/ipc=2/{arm}"
        assert 0 <= metrics[f"{name}/test_accuracy"]["mean"] <= 1
    assert {row["kind"] for row in result_of(tmp_path / "mutag")["data"]} == {"real"}
    argv = ["--preset", "mutag", "--data", str(folder), "--ipc", "0", "--arms", "doscond", *few, "--init", "noise"]
    argv += ["--metric", "ours", "--split", "seed"]
    assert train.main([*argv, "--out", str(tmp_path / "rate")]) == 0
    argv = ["--preset", "cora", "--data", str(data_root / "planetoid-geomgcn"), "--hidden", "16", *few]
    assert train.main([*argv, "--out", str(tmp_path / "cora")]) == 0
    metrics = result_of(tmp_path / "cora")["metrics"]
    assert set(metrics) == {f"cora/{arm}/test_accuracy" for arm in train.NODE_ARMS}


def test_written_molecules_and_flickr_run(train: ModuleType, tmp_path: Path) -> None:
    """One logit with ROC-AUC, one joint batch, the bound; and an inductive node set."""
    sizes = [3 + i % 4 for i in range(24)]
    put_ogb(
        tmp_path,
        **{
            "raw/num-node-list": "".join(f"{n}\n" for n in sizes),
            "raw/num-edge-list": "".join(f"{n - 1}\n" for n in sizes),
            "raw/edge": "".join(f"{i},{i + 1}\n" for n in sizes for i in range(n - 1)),
            "raw/node-feat": "".join(f"{i % 5},0,3,4,0,0,1,0,{i % 3}\n" for i in range(sum(sizes))),
            "raw/graph-label": "".join(f"{i % 2}\n" for i in range(24)),
            "split/scaffold/train": "".join(f"{i}\n" for i in range(12)),
            "split/scaffold/valid": "".join(f"{i}\n" for i in range(12, 18)),
            "split/scaffold/test": "".join(f"{i}\n" for i in range(18, 24)),
        },
    )
    (tmp_path / "ogbg_molhiv").symlink_to(tmp_path / "ogbg_molbace")
    few = ["--iterations", "2", "--outer", "2", "--epochs", "2", "--evaluations", "2", "--seeds", "1", "--hidden", "8"]
    for preset in ("molbace", "molhiv"):
        argv = ["--preset", preset, "--data", str(tmp_path), "--ipc", "1", "--arms", "doscond", "whole", *few]
        argv += ["--whole-batch", "5"]
        assert train.main([*argv, "--out", str(tmp_path / preset)]) == 0
        metrics = result_of(tmp_path / preset)["metrics"]
        assert 0 <= metrics[f"ogbg-{preset}/ipc=1/doscond/test_auc"]["mean"] <= 1
    put_saint(tmp_path, "flickr")
    argv = ["--preset", "flickr", "--data", str(tmp_path), "--rate", "0.5", *few]
    assert train.main([*argv, "--out", str(tmp_path / "f")]) == 0
    assert "flickr/dcg/test_accuracy" in result_of(tmp_path / "f")["metrics"]


SMALL = ["--ipc", "1", "2", "--iterations", "70", "--outer", "10", "--inner", "1", "--epochs", "4", "--hidden", "16"]
SMALL += ["--train-graphs", "40", "--evaluations", "1", "--seed", "0"]


def test_a_broken_method_fails_the_claims(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(name: str) -> dict[str, bool]:
        assert train.main([*SMALL, "--out", str(tmp_path / name)]) == 0
        return {claim["name"]: claim["holds"] for claim in result_of(tmp_path / name)["claims"]}

    good = verdicts("good")
    assert good["matching_loss_falls"]
    assert good["graphs_stay_discrete_and_sparse"]

    right = train.match
    # The distance is measured, but no gradient reaches the condensed graphs.
    monkeypatch.setattr(train, "match", lambda *args: right(*args).detach())
    monkeypatch.setattr(train.CondensedGraphs, "penalty", lambda self: 0.0 * (self.omega.sum() + self.x.sum()))
    # Edges are no longer decided: the probabilities themselves are handed on.
    monkeypatch.setattr(train.CondensedGraphs, "adjacency", lambda self: torch.sigmoid(self.omega.detach()))
    broken = verdicts("broken")
    assert not broken["matching_loss_falls"]
    assert not broken["graphs_stay_discrete_and_sparse"]
