"""Graph contrastive learning: batched augmentations against plain loops, peers, losses, loaders, errors, claims."""

from __future__ import annotations

import gzip
import json
import math
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.graphcl_augmentations import data, model, probe
from papers.graphcl_augmentations.model import (
    BYOL,
    MPAD,
    Encoder,
    Graphs,
    Siamese,
    SuperpixelEncoder,
    Synonyms,
    Texts,
    augment,
    augment_text,
    augment_words,
    build,
    class_similarity,
    graphcl_loss,
    knn_predict,
    neighbour_sum,
    nt_xent,
    pool,
    with_loops,
    word_graphs,
)
from shared.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 30, name: str = "groups", loops: bool = True) -> Graphs:
    """Generated graphs."""
    made = data.generate_graphs(name, count, generator())
    graphs = Graphs.build(made.x, made.edges, made.ptr)
    return with_loops(graphs) if loops else graphs


def directed(nodes: int = 9) -> Graphs:
    """Two graphs with weights, not symmetric."""
    edges = torch.tensor([[0, 1, 2, 3, 0, 5, 6, 8, 7], [1, 2, 3, 0, 2, 6, 7, 5, 7]])
    return Graphs.build(torch.randn(nodes, 4), edges, torch.tensor([0, 5, nodes]), torch.rand(9) + 0.1)


def dense(graphs: Graphs) -> Tensor:
    """(N, N) matrix; rows are targets."""
    out = torch.zeros(graphs.nodes, graphs.nodes)
    out[graphs.row, graphs.col] = torch.ones(len(graphs.row)) if graphs.weight is None else graphs.weight
    return out


def shake(module: Any) -> Any:
    """Move every parameter off its start, so that no term is trivial."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [directed, batch])
def test_sums_are_matrix_products(make: Any) -> None:
    graphs = make()
    matrix = dense(graphs)
    h = torch.randn(graphs.nodes, 8, requires_grad=True)
    for own in (False, True):
        product = matrix @ h + (h if own else 0)
        weight = torch.randn_like(product)
        assert torch.allclose(neighbour_sum(graphs, h, own), product, atol=1e-5)
        (expected,) = torch.autograd.grad((product * weight).sum(), h)
        (found,) = torch.autograd.grad((neighbour_sum(graphs, h, own) * weight).sum(), h)
        assert torch.allclose(found, expected, atol=1e-5)
    member = F.one_hot(graphs.owner, len(graphs)).float()
    assert torch.allclose(pool(graphs, h), member.t() @ h, atol=1e-4)
    (found,) = torch.autograd.grad(pool(graphs, h).square().sum(), h)
    assert torch.allclose(found, 2 * member @ (member.t() @ h), atol=1e-3)


def test_select_and_transpose() -> None:
    graphs = directed()
    whole = graphs.select(torch.tensor([1, 0, 1]))
    matrix = dense(graphs)
    assert torch.equal(dense(whole), torch.block_diag(matrix[5:, 5:], matrix[:5, :5], matrix[5:, 5:]))
    assert torch.equal(whole.x, torch.cat([graphs.x[5:], graphs.x[:5], graphs.x[5:]]))
    assert torch.equal(dense(graphs.transposed), matrix.t())
    assert not graphs.symmetric
    assert batch().symmetric


def test_gin_is_that_of_torch_geometric() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    graphs = batch()
    encoder = shake(Encoder(3, 8, 3)).eval()
    edges, x, out = torch.stack([graphs.col, graphs.row]), graphs.x, []
    for apply, norm in zip(encoder.maps, encoder.norms, strict=True):
        x = norm(geometric.GINConv(apply)(x, edges).relu())
        out.append(geometric.global_add_pool(x, graphs.owner))
    assert torch.allclose(encoder(graphs), torch.cat(out, 1), rtol=1e-4, atol=1e-3)


def test_gcn_is_that_of_torch_geometric() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    graphs = batch(loops=False)
    encoder = shake(Encoder(3, 8, 1, conv="gcn")).eval()
    conv = geometric.GCNConv(3, 8)
    conv.lin.weight, conv.bias = encoder.maps[0].weight, encoder.maps[0].bias
    # A bias added before or after propagation differs by the row sums of the normalised matrix.
    with torch.no_grad():
        encoder.maps[0].bias.zero_()
    expected = encoder.norms[0](conv(graphs.x, torch.stack([graphs.col, graphs.row])).relu())
    assert torch.allclose(encoder.layers(graphs)[0], expected, atol=1e-5)


def test_superpixel_encoder_is_that_of_torch_geometric() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    graphs = directed()
    encoder = shake(SuperpixelEncoder(4, 6, 2)).eval()
    edges, x = torch.stack([graphs.col, graphs.row]), encoder.into(graphs.x)
    graphs = graphs.having(weight=None)
    levels = [geometric.global_mean_pool(x, graphs.owner)]
    for apply in encoder.maps:
        x = geometric.GINConv(apply)(x, edges)
        levels.append(geometric.global_mean_pool(x, graphs.owner))
    assert torch.allclose(encoder(graphs), torch.cat(levels, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: Encoder(7), 10_080),
        (lambda: Encoder(3), 9_952),
        (lambda: Encoder(37), 11_040),
        (lambda: model.projector(160), 51_520),
        (lambda: build("graphcl", Encoder(7), "graphs"), 61_600),
        (lambda: SuperpixelEncoder(), 99_220),
        (lambda: model.bottleneck(550, 128, norm=False, bias=False), 141_350),
        (lambda: MPAD(torch.zeros(100, 300)), 132_544),
        (lambda: build("simsiam", MPAD(torch.zeros(100, 300)), "documents"), 136_636),
    ],
)
def test_parameters_of_the_paper_s_networks(make: Any, count: int) -> None:
    with torch.device("meta"):
        assert parameters(make()) == count


def test_every_preset_builds(train: ModuleType) -> None:
    """Each configuration at its size, on the meta device."""
    features = {"MUTAG": 7, "PROTEINS": 3, "NCI1": 37, "PTC_MR": 18, "DD": 89, "IMDB-BINARY": 1, "REDDIT-BINARY": 1}
    for preset in train.PRESETS.values():
        config = preset.config
        with torch.device("meta"):
            for name in config.graphs:
                width = features.get(name, 3)
                for framework in config.frameworks:
                    encoder = train.Encoder(width, config.hidden, config.layers, config.conv)
                    train.build(framework, encoder, "graphs")
                    if config.hidden == 32 and config.layers == 5 and config.conv == "gin":
                        assert parameters(encoder) == 9_856 + 32 * width
            for framework in config.document_frameworks:
                vectors = torch.zeros(50, config.vector_size)
                sizes = (config.document_hidden, config.document_layers, config.document_hidden)
                train.build(framework, train.MPAD(vectors, *sizes, config.dropout, config.aggregator), "documents")
            for framework in set(config.digit_frameworks) - {"supervised"}:
                assert parameters(train.build(framework, train.SuperpixelEncoder(), "superpixels")) == 240_570


# ---- generic augmentations of graphs ---------------------------------------------------------------------------------


def per_graph(graphs: Graphs, mask: Tensor) -> Tensor:
    """How many nodes (or edges) of each graph a mask holds."""
    owner = graphs.owner if len(mask) == graphs.nodes else graphs.owner[graphs.row]
    return torch.zeros(len(graphs), dtype=torch.int64).index_add_(0, owner, mask.long())


def test_dropping_and_permuting_count_exactly() -> None:
    graphs = batch(50)
    draws = generator()
    torch.randint(1, (50,), generator=draws)  # what ``augment`` draws first: which augmentation each graph gets
    dropped = model.drop_nodes(graphs, 0.1, draws)
    assert torch.equal(per_graph(graphs, dropped), graphs.sizes // 10)
    edges = per_graph(graphs, torch.ones(len(graphs.row)))
    removed = model.permute_edges(graphs, 0.1, generator())
    assert torch.equal(per_graph(graphs, removed), edges // 10)
    view = augment(graphs, "drop_nodes", generator())  # the same draws
    stay, _ = slow_tidy(graphs.without(dropped[graphs.row] | dropped[graphs.col]))
    assert not bool(dropped[stay].any())
    assert torch.equal(view.x, graphs.x[stay])
    view = augment(graphs, "permute_edges", generator())
    assert (len(view.row), view.nodes) == (len(graphs.row) - int((edges // 10).sum()), graphs.nodes)
    assert not view.symmetric


def test_masking_changes_a_tenth_of_the_nodes() -> None:
    graphs = batch(400)
    view = augment(graphs, "mask_nodes", generator())
    changed = (view.x != graphs.x).any(1)
    assert torch.equal(per_graph(graphs, changed), graphs.sizes // 10)
    assert torch.equal(view.row, graphs.row)
    drawn = view.x[changed]
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["drop_nodes", "permute_edges", "mask_nodes"])
def test_ratio_zero_changes_nothing_but_loops(name: str) -> None:
    graphs = batch()
    view = augment(graphs, name, generator(), ratio=0.0)
    kept = graphs.row != graphs.col if name == "drop_nodes" else torch.ones(len(graphs.row), dtype=torch.bool)
    assert torch.equal(view.row, graphs.row[kept])
    assert torch.equal(view.x, graphs.x)


def components(graphs: Graphs, members: Tensor) -> list[int]:
    """Connected components of the members of each graph."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    inside = members[graphs.row] & members[graphs.col]
    pairs = (graphs.row[inside].numpy(), graphs.col[inside].numpy())
    matrix = coo_matrix((np.ones(len(pairs[0])), pairs), shape=(graphs.nodes, graphs.nodes))
    label = connected_components(matrix, directed=False)[1]
    owner = graphs.owner.numpy()
    return [len(set(label[(owner == g) & members.numpy()])) for g in range(len(graphs))]


def test_a_growing_subgraph_is_connected_and_of_its_size() -> None:
    graphs = batch(40, "folds")
    members = model.subgraph(graphs, 0.2, "grow", generator())
    assert torch.equal(per_graph(graphs, members), (graphs.sizes * 0.2).long() + 1)  # generated graphs are connected
    assert components(graphs, members) == [1] * 40
    wanted = torch.arange(40) % 2 == 0
    members = model.subgraph(graphs, 0.2, "grow", generator(), wanted)
    assert bool(members[~wanted[graphs.owner]].all())


def test_a_growing_subgraph_chooses_uniformly_beside_what_it_has() -> None:
    """A path of four from its end: 0-1 is certain, and of a star's leaves each is as likely."""
    star = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4]])
    one = Graphs.build(torch.ones(5, 1), torch.cat([star, star.flip(0)], 1), torch.tensor([0, 5]))
    many = one.select(torch.zeros(4000, dtype=torch.int64))
    members = model.subgraph(many, 0.5, "grow", generator()).view(4000, 5)  # start and two more
    assert bool((members.sum(1) == 3).all())
    # Start 0 (1/5): each leaf with 2/4. Start at a leaf (4/5): the centre, then one of the three others.
    expected = (1 / 5) * (2 / 4) + 1 / 5 + (3 / 5) * (1 / 3)
    assert torch.allclose(members[:, 1:].float().mean(0), torch.full((4,), expected), atol=0.03)


def test_the_released_subgraph_stays_beside_its_start() -> None:
    graphs = batch(200)
    members = model.subgraph(graphs, 0.2, "code", generator())
    matrix = dense(graphs) > 0
    for g in range(len(graphs)):
        nodes = (members & (graphs.owner == g)).nonzero().squeeze(1)
        assert len(nodes) <= int(graphs.sizes[g]) // 5 + 1
        assert any(bool((matrix[start, nodes] | (nodes == start)).all()) for start in nodes)
    sizes = per_graph(graphs, members)
    assert len(sizes.unique()) > 2  # few neighbours or wasted draws: not always full


def slow_tidy(graphs: Graphs) -> tuple[list[int], set[tuple[int, int]]]:
    """The official clean-up of a view, node by node."""
    ends = {*graphs.row.tolist(), *graphs.col.tolist()}
    stay = [n for n in range(graphs.nodes) if n in ends]
    number = {n: i for i, n in enumerate(stay)}
    pairs = zip(graphs.col.tolist(), graphs.row.tolist(), strict=True)
    return stay, {(number[a], number[b]) for a, b in pairs if a != b}


def test_tidying_is_the_official_clean_up() -> None:
    graphs = batch(20)
    gone = torch.rand(len(graphs.row), generator=generator()) < 0.5
    view = graphs.without(gone)
    stay, pairs = slow_tidy(view)
    found = model.tidy(view)
    assert torch.equal(found.x, graphs.x[stay])
    assert set(zip(found.col.tolist(), found.row.tolist(), strict=True)) == pairs
    assert torch.equal(found.ptr, torch.searchsorted(torch.tensor(stay), graphs.ptr))


def test_a_graph_never_vanishes() -> None:
    graphs = batch(20)
    everything = torch.ones(len(graphs.row), dtype=torch.bool)
    assert torch.equal(model.tidy(graphs.without(everything)).sizes, torch.ones(20, dtype=torch.int64))


def test_loops_miss_the_last_node() -> None:
    edges = torch.tensor([[0, 1, 2, 4, 5, 6], [1, 0, 1, 5, 4, 5]])
    graphs = Graphs.build(torch.ones(8, 1), torch.cat([edges, edges.flip(0)], 1).unique(dim=1), torch.tensor([0, 4, 8]))
    looped = with_loops(graphs)
    assert dense(looped).diagonal().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]  # 2 and 6 are the last with an edge
    assert torch.equal(dense(looped).fill_diagonal_(0), dense(graphs))


def test_random_views_mix_augmentations() -> None:
    graphs = batch(300)
    view = augment(graphs, "random2", generator())
    assert len(view) == 300
    share = view.sizes / graphs.sizes
    assert 0.3 < float((share < 0.6).float().mean()) < 0.7  # about half are subgraphs, the others dropped nodes
    assert bool((view.sizes <= graphs.sizes).all())
    four = augment(graphs, "random4", generator())
    assert len(four) == 300
    assert not four.symmetric
    again = augment(graphs, "random4", generator())
    assert torch.equal(four.x, again.x) and torch.equal(four.row, again.row)


# ---- sentences -------------------------------------------------------------------------------------------------------


def texts(*sentences: list[int]) -> Texts:
    flat = [word for sentence in sentences for word in sentence]
    return Texts(torch.tensor(flat, dtype=torch.int64), model.offsets(torch.tensor([len(s) for s in sentences])))


def slow_word_graph(words: list[int], window: int) -> Tensor:
    """Row-normalised transposed matrix of one sentence, as the official code builds it."""
    order = list(dict.fromkeys(words))
    n = len(order) + 1
    matrix = torch.zeros(n, n)
    for i, word in enumerate(words):
        for j in range(i + 1, min(i + window, len(words))):
            matrix[order.index(word), order.index(words[j])] += 1 / (j - i)
        matrix[order.index(word), -1] = matrix[-1, order.index(word)] = 1
    matrix = matrix.t()
    return matrix / matrix.sum(1, keepdim=True).clamp_min(1e-9)


def test_word_graph_of_a_b_a_c() -> None:
    a, b, c, master = range(4)
    raw = {
        2: {(a, b): 1, (b, a): 1, (a, c): 1},
        4: {(a, b): 1, (b, a): 1, (a, c): 1 + 1 / 3, (a, a): 0.5, (b, c): 0.5},
    }
    for window, pairs in raw.items():
        graphs = word_graphs(texts([7, 3, 7, 9]), window)
        assert graphs.x.tolist() == [7, 3, 9, 0]
        expected = torch.zeros(4, 4)
        for (source, target), weight in pairs.items():
            expected[target, source] = weight
        expected[master, :3] = expected[:3, master] = 1
        assert torch.allclose(dense(graphs), expected / expected.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("window", [2, 4])
def test_word_graphs_are_those_of_a_plain_loop(window: int) -> None:
    rows = [torch.randint(1, 9, (n,), generator=generator(n)).tolist() for n in (12, 1, 0, 5, 20)]
    graphs = word_graphs(texts(*rows), window)
    expected = torch.block_diag(*(slow_word_graph(row, window) for row in rows))
    assert torch.allclose(dense(graphs), expected, atol=1e-6)
    assert graphs.sizes.tolist() == [len(set(row)) + 1 for row in rows]
    assert graphs.x.tolist() == [word for row in rows for word in (*dict.fromkeys(row), 0)]


def word_batch(count: int = 60) -> Graphs:
    return word_graphs(texts(*(torch.randint(1, 40, (25,), generator=generator(i)).tolist() for i in range(count))))


def test_word_nodes_lose_their_edges() -> None:
    graphs = word_batch()
    view = augment_words(graphs, "n", 0.1, generator())
    before, after = dense(graphs), dense(view)
    lost = (after.sum(1) == 0) & (after.sum(0) == 0)
    kept = ~lost[:, None] & ~lost
    assert torch.equal(after[kept], before[kept])
    count = per_graph(graphs, lost)
    assert 60 < int(count.sum()) <= int((graphs.sizes // 10).sum())
    assert torch.equal(view.x, graphs.x)


def test_word_pairs_are_turned_round() -> None:
    graphs = word_batch()
    before, after = dense(graphs), dense(augment_words(graphs, "e", 0.1, generator()))
    changed = (before != after).triu(1) | (before != after).tril(-1).t()
    pairs = changed.nonzero()
    assert 60 < len(pairs) <= int((graphs.sizes // 10).sum())
    one, two = pairs.t()
    gone = (before[one, two] >= 0.5) | (before[two, one] >= 0.5)
    assert bool((after[one, two] == after[two, one]).all())
    assert bool((after[one[gone], two[gone]] == 0).all())
    assert bool((after[one[~gone], two[~gone]] > 0).all())
    assert int(gone.sum()) > 0


def test_a_walk_s_edges_vanish() -> None:
    graphs = word_graphs(texts(*(torch.randint(1, 9, (25,), generator=generator(i)).tolist() for i in range(40))), 4)
    before, after = dense(graphs), dense(augment_words(graphs, "s", 0.3, generator()))
    assert torch.equal(before.diagonal(), after.diagonal())
    assert float(before.diagonal().sum()) > 0
    removed = (before > 0) & (after == 0)
    assert torch.equal(before[~removed], after[~removed])
    steps = (0.3 * torch.zeros(40).index_add_(0, graphs.owner, before.sum(1)) - 1e-5).ceil()
    count = torch.zeros(40).index_add_(0, graphs.owner, removed.sum(1).float())
    assert bool((count <= steps).all()) and bool((count >= 1).all())


TABLE = Synonyms(torch.tensor([11, 12, 13]), torch.tensor([0, 0, 2, 2, 3, *[3] * 20]))
"""Word 1 may be 11 or 12, word 3 may be 13, others nothing."""


def test_synonyms_replace_the_right_number_of_words() -> None:
    rows = [list(range(1, n + 1)) for n in (5, 20, 39)]
    before = texts(*rows)
    table = Synonyms(torch.arange(101, 151), F.pad(torch.ones(160, dtype=torch.int64).cumsum(0).clamp_max(50), (1, 0)))
    after = augment_text(before, table, generator(), ("synonym",), 0.1)
    changed = torch.zeros(3, dtype=torch.int64).index_add_(0, before.owner, (before.words != after.words).long())
    assert changed.tolist() == [1, 2, 3]  # max(1, floor(0.1 n))
    replaced = before.words != after.words
    assert torch.equal(after.words[replaced], before.words[replaced] + 101)  # word w has the synonym 101 + w


def test_words_without_synonyms_stay_and_all_occurrences_go() -> None:
    before = texts([2, 2, 4], [1, 5, 1, 5], [3])
    for seed in range(5):
        after = augment_text(before, TABLE, generator(seed), ("synonym",), 0.5)
        assert after.words[:3].tolist() == [2, 2, 4]
        assert after.words[3].item() in (11, 12) and after.words[5] == after.words[3]
        assert after.words[4] == 5 and after.words[7] == 13


def test_insertion_swap_and_deletion() -> None:
    before = texts([1, 2, 4, 5, 6], [2, 4], [3] * 30)
    inserted = augment_text(before, TABLE, generator(), ("insert",), 0.1)
    assert inserted.ptr.diff().tolist() == [6, 2, 33]
    assert set(inserted.words[:6].tolist()) - {1, 2, 4, 5, 6} <= {11, 12}
    assert [w for w in inserted.words[:6].tolist() if w < 10] == [1, 2, 4, 5, 6]
    assert sorted(inserted.words[8:].tolist()) == [3] * 30 + [13] * 3
    swapped = augment_text(before, TABLE, generator(), ("swap",), 0.1)
    assert sorted(swapped.words[:5].tolist()) == [1, 2, 4, 5, 6]
    assert int((swapped.words[:5] != before.words[:5]).sum()) == 2
    assert swapped.words[5:7].tolist() == [4, 2]
    deleted = augment_text(texts([1] * 2000, [2], []), TABLE, generator(), ("delete",), 0.2)
    assert 1500 < deleted.ptr[1] < 1700
    assert deleted.ptr.diff()[1:].tolist() == [1, 0]


def test_versions_are_deterministic() -> None:
    before = texts(*([1, 2, 3, 4] * 5 for _ in range(20)))
    one, two, other = (augment_text(before, TABLE, generator(seed), model.TEXT_AUGMENTATIONS) for seed in (1, 1, 2))
    assert torch.equal(one.words, two.words) and torch.equal(one.ptr, two.ptr)
    assert not (len(one.words) == len(other.words) and torch.equal(one.words, other.words))


# ---- MPAD ------------------------------------------------------------------------------------------------------------


def slow_mpad(net: MPAD, matrix: Tensor, words: Tensor, graphs: int) -> Tensor:
    """MPAD on equally padded sentences as one dense matrix, without a mask: the official computation."""
    x, out = net.vectors[words], []
    for block, readout in zip(net.blocks, net.readouts, strict=True):
        x = block.first(x)
        m = block.second(matrix @ x)
        u1, v1, u2, v2, u3, v3 = block.gates
        z, r = torch.sigmoid(u1(m) + v1(x)), torch.sigmoid(u2(m) + v2(x))
        x = (1 - z) * x + z * torch.tanh(u3(m) + v3(r * x))
        each = x.view(graphs, -1, x.shape[1])
        share = torch.tanh(readout.score(torch.tanh(readout.inner(each))))[:, :-1].softmax(1)
        out.append(torch.cat([readout.out((share * each[:, :-1]).sum(1)).relu(), each[:, -1]], 1))
    return net.out(net.norm(torch.cat(out, 1))).relu()


def sentences_of_many_lengths() -> Texts:
    return texts(*(torch.randint(1, 30, (n,), generator=generator(n)).tolist() for n in (3, 9, 14, 1)))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mpad_with_padding_is_the_official_one(mode: str) -> None:
    graphs = word_graphs(sentences_of_many_lengths())
    net = shake(MPAD(torch.randn(31, 12), 6, 2, 5, dropout=0.0, mask_padding=False))
    getattr(net, mode)()
    padded = model.pad_words(graphs)
    assert bool((padded.sizes == graphs.sizes.max()).all())
    with torch.no_grad():
        assert torch.allclose(net(graphs), slow_mpad(net, dense(padded), padded.x, 4), atol=1e-5)


def test_a_sentence_does_not_depend_on_its_batch() -> None:
    graphs = word_graphs(sentences_of_many_lengths())
    apart: dict[bool, float] = {}
    for masked in (True, False):
        torch.manual_seed(1)
        net = shake(MPAD(torch.randn(31, 12), 6, 2, 5, mask_padding=masked)).eval()
        together = net(graphs)
        alone = torch.cat([net(graphs.select(torch.tensor([i]))) for i in range(4)])
        apart[masked] = float((together - alone).detach().abs().max())
    assert apart[True] < 1e-5
    assert apart[False] > 1e-3  # the official batches: padding takes part in the attention


@pytest.mark.parametrize("aggregator", ["gcn", "sage", "gin"])
def test_aggregators_are_those_of_torch_geometric(aggregator: str) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    graphs = word_graphs(sentences_of_many_lengths(), 4)
    block = shake(model.MessagePassing(6, 6, aggregator))
    if aggregator == "gcn":
        peer = geometric.DenseGCNConv(6, 6)
        peer.lin.weight, peer.bias = block.lin.weight, block.bias
    elif aggregator == "sage":
        peer = geometric.DenseSAGEConv(6, 6)
        peer.lin_rel, peer.lin_root = block.near, block.root
    else:
        peer = geometric.DenseGINConv(block.mlp)
    x = torch.randn(graphs.nodes, 6)
    assert torch.allclose(block.aggregate(graphs, x), peer(x, dense(graphs))[0], atol=1e-5)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_affine_is_that_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(3, 28, 28)
    draws = [torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.0, 1.0, 0.3]), torch.tensor([0.8, 0.5, 0.2])]
    draws += [torch.zeros(3), torch.zeros(3)]  # without the shear of a fifth of a degree
    queue = iter(draws)
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None: next(queue))
    found = model.random_affine(images, generator())
    for i in range(3):
        shift = [round((-0.1 + 0.2 * float(draws[k][i])) * 28) for k in (1, 2)]
        angle = -30 + 60 * float(draws[0][i])
        expected = functional.affine(images[i : i + 1], angle, shift, 1.0, [0.0, 0.0])[0]
        assert float((found[i] == expected).float().mean()) > 0.98  # ties between two pixels aside


def test_recolouring_keeps_the_background() -> None:
    images = torch.zeros(40, 28, 28)
    images[:, 8:20, 8:20] = 1.0
    views = model.augment_images(images, "colour", generator())
    assert views.shape == (40, 28, 28, 3)
    colour = views.flatten(1, 2).amax(1)
    coloured = (colour < 1).any(1)
    assert 20 <= int(coloured.sum()) <= 36  # seven in ten
    assert bool(((colour[coloured] * 255).round() >= 50).all())
    assert bool((views.amax(3)[:, 0] == 0).all())
    crop = model.augment_images(images, "crop", generator())
    assert bool((crop[..., 0] == crop[..., 2]).all())
    assert float(crop.mean()) > float(images.mean())


def test_superpixels() -> None:
    pytest.importorskip("skimage")
    images = torch.zeros(2, 28, 28, 3)
    images[0, 6:22, 10:18, 0] = 1.0
    graphs = model.superpixels(images, 30)
    assert 15 < int(graphs.sizes.min()) <= int(graphs.sizes.max()) < 50
    assert torch.equal(per_graph(graphs, torch.ones(len(graphs.row))), 8 * graphs.sizes)
    assert bool((graphs.col[graphs.row == 3] == 3).any())  # a segment is its own nearest neighbour
    black = (0 - model.MNIST_MEAN) / model.MNIST_STD
    assert torch.allclose(graphs.x[graphs.owner == 1, :3], torch.tensor(black))
    assert float(graphs.x[graphs.owner == 0, 0].max()) == pytest.approx((1 - model.MNIST_MEAN) / model.MNIST_STD)
    places = graphs.x[:, 3:] * 28
    weighted = places[graphs.owner == 1].mean(0)
    assert torch.allclose(weighted, torch.full((2,), 13.5), atol=1.0)
    for node in (0, graphs.nodes - 1):
        mates = (graphs.owner == graphs.owner[node]).nonzero().squeeze(1)
        distance = (places[mates] - places[node]).norm(dim=1)
        taken = distance[torch.isin(mates, graphs.col[graphs.row == node])]
        assert float(taken.max()) <= float(distance.sort().values[7]) + 1e-5


def test_few_superpixels_have_few_neighbours() -> None:
    edges = model.nearest(torch.randn(5, 2), torch.tensor([0, 3, 5]), 8)
    assert edges.shape == (2, 9 + 4)
    Graphs.build(torch.ones(5, 1), edges, torch.tensor([0, 3, 5]))  # none leaves its graph


# ---- frameworks and losses -------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    basis = torch.eye(2)
    assert float(graphcl_loss(basis, basis, 0.2)) == pytest.approx(-5.0, abs=1e-5)
    assert float(nt_xent(basis, basis)) == pytest.approx(0.239545, abs=1e-5)
    same = torch.ones(128, 7)
    assert float(nt_xent(same, same)) == pytest.approx(5.541264, abs=1e-4)
    assert float(graphcl_loss(same, same)) == pytest.approx(math.log(127), abs=1e-4)


def test_graphcl_loss_is_the_formula() -> None:
    x, other = torch.randn(6, 4), torch.randn(6, 4)
    s = (F.cosine_similarity(x[:, None], other[None], dim=2) / 0.2).exp()
    expected = -(s.diagonal() / (s.sum(1) - s.diagonal())).log().mean()
    assert float(graphcl_loss(x, other)) == pytest.approx(float(expected), rel=1e-5)
    assert float(graphcl_loss(other, x)) != pytest.approx(float(expected), rel=1e-3)  # one direction


def test_nt_xent_is_the_formula() -> None:
    x, other = torch.randn(5, 4), torch.randn(5, 4)
    both = torch.cat([x, other])
    s = (F.cosine_similarity(both[:, None], both[None], dim=2) / 0.5).exp()
    total = 0.0
    for i in range(10):
        positive = s[i, (i + 5) % 10]
        total -= float((positive / (s[i].sum() - s[i, i])).log()) / 10
    assert float(nt_xent(x, other)) == pytest.approx(total, rel=1e-5)


def test_infograph_loss_is_the_formula() -> None:
    nodes, codes, owner = torch.randn(9, 4), torch.randn(3, 4), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    score, total = nodes @ codes.t(), 0.0
    for n in range(9):
        for g in range(3):
            t = score[n, g]
            if owner[n] == g:
                total -= (math.log(2) - F.softplus(-t)) / 9
            else:
                total += (F.softplus(-t) + t - math.log(2)) / (9 * 2)
    assert float(model.infograph_loss(nodes, codes, owner)) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("framework", ["simsiam", "byol"])
def test_no_gradient_flows_into_the_target(framework: str) -> None:
    class Fixed(nn.Module):
        width = 4

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    encoder = Fixed()
    net = (
        BYOL(encoder, nn.Identity(), nn.Linear(4, 4))
        if framework == "byol"
        else Siamese(encoder, nn.Identity(), nn.Linear(4, 4), "simsiam")
    )
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    loss = net(first, second)
    assert -1 <= float(loss.detach()) <= 1
    loss.backward()
    z = [encoder(view).detach() for view in (first, second)]  # a fresh copy of the targets: the same gradients
    found = encoder.lin.weight.grad.clone()
    net.zero_grad()
    p = [net.predictor(encoder(view)) for view in (first, second)]
    cosines = [F.cosine_similarity(p[0], z[1]).mean(), F.cosine_similarity(p[1], z[0]).mean()]
    (-(cosines[0] + cosines[1]) / 2).backward()
    assert torch.allclose(found, encoder.lin.weight.grad, atol=1e-6)
    if framework == "byol":
        assert all(p.grad is None and not p.requires_grad for p in net.target.parameters())
    parallel = torch.randn(5, 4)
    assert float(model.negative_cosine(3 * parallel, parallel)) == pytest.approx(-1.0)


def test_the_target_follows_on_its_schedule() -> None:
    assert model.target_decay(0, 10) == pytest.approx(0.996)
    assert model.target_decay(5, 10) == pytest.approx(0.998)
    assert model.target_decay(10, 10) == 1.0
    net = build("byol", Encoder(3, 4, 2), "graphs")
    before = [p.clone() for p in net.target.parameters()]
    shake(net.encoder), shake(net.neck)
    net.update(3, 10)
    tau = model.target_decay(3, 10)
    online = [*net.encoder.parameters(), *net.neck.parameters()]
    for old, new, source in zip(before, net.target.parameters(), online, strict=True):
        assert torch.allclose(new, tau * old + (1 - tau) * source, atol=1e-6)


@pytest.mark.parametrize("framework", model.FRAMEWORKS)
def test_every_framework_learns(framework: str) -> None:
    graphs = batch(24)
    net = build(framework, Encoder(3, 8, 2), "graphs")
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for step in range(12):
        loss = net(*model.contrast_views(graphs, "random2", generator(step % 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.update(step + 1, 12)
        values.append(float(loss.detach()))
    assert sum(values[-4:]) < sum(values[:4])


# ---- measures --------------------------------------------------------------------------------------------------------


def test_class_similarity_is_the_mean_over_pairs() -> None:
    z, labels = torch.randn(12, 5), torch.arange(12) % 3
    cosine = F.cosine_similarity(z[:, None], z[None], dim=2)
    found = class_similarity(z, labels)
    for a in range(3):
        for b in range(3):
            pairs = [cosine[i, j] for i in range(12) for j in range(12) if i != j and labels[i] == a and labels[j] == b]
            assert float(found[a, b]) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    apart = class_similarity(torch.eye(2).repeat(4, 1), torch.arange(8) % 2)
    assert model.separability(apart) == pytest.approx(1.0)


def test_invariance_and_spread() -> None:
    z = torch.randn(2000, 16)
    assert model.invariance(z, 3 * z) == pytest.approx(1.0, abs=1e-5)
    assert model.spread(z) * 4 == pytest.approx(1.0, abs=0.02)  # spread evenly: 1 / sqrt(d)
    assert model.spread(torch.ones(10, 16)) == pytest.approx(0.0, abs=1e-6)


def test_nearest_neighbours_against_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels, queries = F.normalize(torch.randn(60, 4), dim=1), torch.arange(60) % 3, torch.randn(40, 4)
    plain = KNeighborsClassifier(7).fit(bank.numpy(), labels.numpy())  # Euclidean between unit vectors: cosine
    found = knn_predict(bank, labels, queries, 7, 3, temperature=1e4)  # all weights equal
    near = plain.kneighbors(F.normalize(queries, dim=1).numpy(), return_distance=False)
    votes = F.one_hot(labels[torch.from_numpy(near)], 3).sum(1)
    clear = votes.topk(2, dim=1).values.diff(dim=1).squeeze(1) != 0
    assert torch.equal(found[clear], votes.argmax(1)[clear])
    assert int(clear.sum()) > 20
    one = knn_predict(torch.eye(3), torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.9, 0.9]]), 3, 2, temperature=0.01)
    assert one.tolist() == [0]  # the nearest outweighs the two others


def objective(w: np.ndarray, x: np.ndarray, sign: np.ndarray, penalty: float) -> float:
    return float(w @ w / 2 + penalty * (np.maximum(0, 1 - sign * (x @ w)) ** 2).sum())


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_the_linear_probe_is_at_the_minimum_of_the_squared_hinge(penalty: float) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 6)) * 10.0 ** np.arange(-3, 3)  # ill-conditioned, as sums over nodes are
    sign = np.sign(x[:, 0] * 500 + x[:, 3] + random.normal(size=80))
    w = probe.squared_hinge(x, sign, penalty)
    slack = np.maximum(0, 1 - sign * (x @ w))
    pull, push = w, 2 * penalty * (x * sign[:, None]).T @ slack
    assert np.abs(pull - push).max() < 1e-8 * max(1.0, penalty * np.abs(x).sum())
    for _ in range(50):
        assert objective(w, x, sign, penalty) <= objective(w + random.normal(size=6) * 1e-3, x, sign, penalty)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_linear_probe_agrees_with_liblinear_run_to_its_end(classes: int) -> None:
    from sklearn.svm import LinearSVC

    random = np.random.default_rng(1)
    y = random.integers(classes, size=150) + 5
    x = random.normal(size=(150, 8)) + random.normal(size=(classes, 8))[y - 5]
    for penalty in (0.01, 1.0):
        ours = probe.LinearSVM(C=penalty).fit(x, y)
        peer = LinearSVC(C=penalty, dual=False, tol=1e-10, max_iter=100_000).fit(x, y)
        np.testing.assert_allclose(ours.decision_function(x), peer.decision_function(x), rtol=1e-4, atol=1e-5)
        assert (ours.predict(x) == peer.predict(x)).all()
    with pytest.raises(ValueError, match="one class"):
        probe.LinearSVM().fit(x, np.zeros(len(x)))


# ---- data ------------------------------------------------------------------------------------------------------------


def test_generated_graphs_differ_in_structure_only() -> None:
    made = data.generate_graphs("groups", 400, generator())
    again = data.generate_graphs("groups", 400, generator())
    assert torch.equal(made.edges, again.edges)
    graphs = Graphs.build(made.x, made.edges, made.ptr)  # checks every edge
    kinds = pool(graphs, made.x)
    means = torch.stack([kinds[made.labels == c].mean(0) for c in (0, 1)])
    assert torch.allclose(means[0], means[1], rtol=0.08)  # the same nodes in both classes
    near = neighbour_sum(graphs, made.x)
    pairs = pool(graphs, made.x[:, 1:2] * near[:, 2:3])[:, 0]  # leaves on hosts
    assert float(pairs[made.labels == 1].mean()) > 2 * float(pairs[made.labels == 0].mean())
    folds = data.generate_graphs("folds", 100, generator())
    assert int(folds.ptr.diff().max()) > 40
    assert components(Graphs.build(folds.x, folds.edges, folds.ptr), torch.ones(len(folds.x), dtype=torch.bool))


def test_generated_sentences_have_synonyms() -> None:
    corpus = data.generate_corpus(300, generator())
    assert torch.bincount(corpus.labels).tolist() == [150, 150]
    assert int(corpus.words.min()) >= 1 and int(corpus.words.max()) < len(corpus.vocabulary)
    word = corpus.vocabulary.index("c7b")
    others = corpus.synonym_words[corpus.synonym_ptr[word] : corpus.synonym_ptr[word + 1]]
    assert sorted(corpus.vocabulary[i] for i in others) == [f"c7{form}" for form in "acdefgh"]
    assert corpus.synonym_ptr[corpus.vocabulary.index("f3") :][:2].diff().item() == 0


def test_cleaning_keeps_the_official_backslash() -> None:
    assert data.clean("It's GREAT (really)?  don't, I'll!") == [
        *("it", "'s", "great", "\\(", "really", "\\)", "\\?", "do", "n't", ",", "i", "'ll", "!")
    ]
    assert data.clean(' " -- " ') == []


LINES = ["pos\ta big film .", "neg\the is in a room", "pos\ta large film (again)", "neg\t.", "neg\tin a room"]


def write_sentences(folder: Path, lines: list[str] = LINES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "subjectivity.txt").write_text("\n".join(lines))  # the last line has no newline
    table = "big\tlarge|huge\nhe\tit\nlarge\tbig|very big\nroom\tway\n"
    (folder / "wordnet_synonyms.tsv.gz").write_bytes(gzip.compress(table.encode()))


def test_sentences_in_the_official_layout(tmp_path: Path) -> None:
    write_sentences(tmp_path / "subjectivity")
    corpus = data.load_sentences(tmp_path)
    assert corpus.labels.tolist() == [1, 0, 1, 0, 0]
    assert corpus.ptr.diff().tolist() == [3, 5, 6, 0, 3] and corpus.empty == 1
    words = [corpus.vocabulary[i] for i in corpus.words.tolist()]
    assert words[:3] == ["a", "big", "film"]
    assert words[8:14] == ["a", "large", "film", "\\(", "again", "\\)"]
    big = corpus.vocabulary.index("big")
    found = corpus.synonym_words[corpus.synonym_ptr[big] : corpus.synonym_ptr[big + 1]]
    assert [corpus.vocabulary[i] for i in found] == ["large"]  # "huge" is not in the corpus
    assert int((corpus.synonym_ptr.diff() > 0).sum()) == 2  # big, large; "he" is a stop word, "way" not in the corpus
    assert len(data.load_sentences(tmp_path, limit=2).labels) == 4
    graphs = word_graphs(Texts(corpus.words, corpus.ptr))
    assert graphs.sizes.tolist()[3] == 1  # a lone master node


def test_the_authors_versions(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "subjectivity" / "unique"
    folder.mkdir(parents=True)
    for i, word in enumerate(["big", "large", "huge"]):
        (folder / f"{i}.txt").write_text(f"pos\ta {word} film\nneg\ta room\n")
    (folder / "consolidated.txt").write_text("pos\tunused\n")
    corpus = data.load_sentences(tmp_path)
    assert len(corpus.versions) == 2
    assert [corpus.vocabulary[i] for i in corpus.versions[1][0].tolist()] == ["a", "huge", "film", "a", "room"]
    (folder / "2.txt").write_text("pos\ta huge film\n")
    with pytest.raises(UserError, match=r"2\.txt has 1 sentences"):
        data.load_sentences(tmp_path)


def test_word_vectors(tmp_path: Path) -> None:
    write_sentences(tmp_path)
    corpus = data.load_sentences(tmp_path)
    path = tmp_path / data.WORD2VEC
    rows = {"film": [1.0, 2.0], "unknown": [9.0, 9.0], "room": [3.0, 4.0]}
    body = b"".join(word.encode() + b" " + struct.pack("<2f", *row) + b"\n" for word, row in rows.items())
    path.write_bytes(b"3 2\n" + body)
    vectors, found = data.word2vec_vectors(path, corpus, generator())
    assert found == 2
    assert vectors[corpus.vocabulary.index("room")].tolist() == [3.0, 4.0]
    assert vectors[0].tolist() == [0.0, 0.0]
    rest = vectors[corpus.vocabulary.index("big")]
    assert bool((rest.abs() <= 0.25).all()) and bool((rest != 0).any())
    path.write_bytes((b"3 2\n" + body)[:-6])
    with pytest.raises(UserError, match="ends within the vector"):
        data.word2vec_vectors(path, corpus, generator())
    path.write_bytes(b"no header\n")
    with pytest.raises(UserError, match="expected a word2vec binary file"):
        data.word2vec_vectors(path, corpus, generator())
    made = data.svd_vectors(data.generate_corpus(300, generator()), 20, generator())
    assert torch.allclose(made[1:].norm(dim=1), torch.tensor(2.5 * (20 / 300) ** 0.5), rtol=0.5)
    assert float(made[0].abs().sum()) == 0


def test_vectors_of_the_sentences_know_what_is_said_together() -> None:
    """Two groups of words that never meet in a sentence."""
    group = torch.arange(200) % 2
    words = 1 + torch.randint(6, (200, 10), generator=generator()) + 6 * group[:, None]
    none = torch.zeros(14, dtype=torch.int64)
    names = ("", *"abcdefghijkl")
    corpus = data.Corpus(words.flatten(), torch.arange(0, 2001, 10), group, names, none[:0], none, {})
    made = F.normalize(data.svd_vectors(corpus, 8, generator()), dim=1)
    cosine = made[1:] @ made[1:].t()
    assert float(cosine[:6, :6].mean()) > float(cosine[:6, 6:].abs().mean()) + 0.1


def write_digits(folder: Path, part: str, count: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28)).astype(np.uint8)
    names = data.MNIST_FILES[part]
    (folder / names[0]).write_bytes(struct.pack(">4I", 2051, count, 28, 28) + images.tobytes())
    labels = (np.arange(count) % 10).astype(np.uint8)
    (folder / (names[1] + ".gz")).write_bytes(gzip.compress(struct.pack(">2I", 2049, count) + labels.tobytes()))


def test_digits_in_the_official_layout(tmp_path: Path) -> None:
    write_digits(tmp_path / "MNIST" / "raw", "train")
    digits = data.load_mnist(tmp_path, "train")
    assert digits.images.shape == (40, 28, 28) and float(digits.images.max()) == 1.0
    assert digits.labels.tolist() == list(range(10)) * 4
    with pytest.raises(UserError, match="no t10k-images-idx3-ubyte"):
        data.load_mnist(tmp_path, "test")
    path = tmp_path / "MNIST" / "raw" / data.MNIST_FILES["train"][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="holds 31359 bytes, expected 31360"):
        data.load_mnist(tmp_path, "train")
    path.write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match="begins with 0, expected 2051"):
        data.load_mnist(tmp_path, "train")


def test_packaged_digits() -> None:
    digits = data.packaged_digits()
    assert digits.images.shape == (5000, 28, 28)
    assert digits.labels.bincount().tolist() == [500] * 10


def test_real_graph_sets(data_root: Path) -> None:
    folder = data_root / "tu-graphs"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    sizes = {"MUTAG": (188, 2544, 8122), "PROTEINS": (1113, 7265, 34457)}
    for name, (count, nodes, entries) in sizes.items():
        made = data.load_graphs(folder, name)
        graphs = with_loops(Graphs.build(made.x, made.edges, made.ptr))
        assert len(graphs) == count
        first = graphs.select(torch.arange(128))  # nodes and edge entries with loops of the official loader
        assert (first.nodes, len(first.row)) == (nodes, entries)
    assert data.load_graphs(folder, "IMDB-BINARY").x.unique().tolist() == [1.0]


def test_real_sentences(data_root: Path, run_paper: Any) -> None:
    folder = data_root / "subjectivity"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    result = run_paper("graphcl_augmentations", ["--preset", "subjectivity-svd", "--data", str(folder), "--check-data"])
    assert result.code == 0, result.err
    assert "sentences 10000 (5000 neg, 5000 pos)" in result.out and "expected" not in result.out
    assert "words 21322, mean length 23.35, empty sentences 0" in result.out


def test_real_digits(data_root: Path, run_paper: Any) -> None:
    folder = data_root / "mnist-t10k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    result = run_paper("graphcl_augmentations", ["--preset", "mnist-t10k", "--data", str(folder), "--check-data"])
    assert result.code == 0, result.err
    assert "images 10000;" in result.out and "[980, 1135, 1032" in result.out


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment(batch(), "shuffle", generator()), "augmentation 'shuffle'"),
        (lambda: augment(batch(), "subgraph", generator(), walk="jump"), "walk 'jump'"),
        (lambda: augment(batch(), "drop_nodes", generator(), ratio=1.0), "ratio is 1.0"),
        (lambda: augment(batch(), "subgraph", generator(), keep=-0.1), "keep is -0.1"),
        (lambda: augment_words(word_batch(2), "x", 0.1, generator()), "'x'"),
        (lambda: augment_text(texts([1]), TABLE, generator(), ("rhyme",)), "rhyme"),
        (lambda: augment_text(texts([1]), TABLE, generator(), alpha=0.0), "alpha 0.0"),
        (lambda: model.augment_images(torch.zeros(1, 28, 28), "blur", generator()), "'blur'"),
        (lambda: word_graphs(texts([1]), 1), "window is 1"),
        (lambda: Encoder(3)(batch().select(torch.tensor([0]))), "need at least 2 graphs"),
        (lambda: Encoder(0), "features 0"),
        (lambda: Encoder(3, conv="sage"), "conv 'sage'"),
        (lambda: MPAD(torch.zeros(3, 4), aggregator="max"), "'max'"),
        (lambda: build("moco", Encoder(3), "graphs"), "'moco'"),
        (lambda: build("graphcl", Encoder(3), "documents"), "not for documents"),
        (lambda: knn_predict(torch.ones(3, 2), torch.arange(3), torch.ones(1, 2), 4, 3), "k is 4, expected 1 to 3"),
        (lambda: class_similarity(torch.ones(3, 2), torch.tensor([0, 0, 1])), "class 1 has 1"),
        (
            lambda: Graphs.build(torch.ones(3, 1), torch.tensor([[0], [2]]), torch.tensor([0, 2, 3])),
            r"edge \(0, 2\) leaves graph 0",
        ),
        (
            lambda: Graphs.build(torch.ones(3, 1), torch.tensor([[2], [7]]), torch.tensor([0, 2, 3])),
            r"edge \(2, 7\) of graph 1 names a node outside of 0\.\.2",
        ),
        (
            lambda: Graphs.build(torch.ones(3, 1), torch.zeros(2, 0).long(), torch.tensor([0, 3, 3])),
            "graph 1 has no node",
        ),
        (lambda: Graphs.build(torch.ones(3, 1), torch.zeros(2, 0).long(), torch.tensor([0, 2])), "expected 0 to 3"),
        (lambda: data.generate_graphs("rings", 30, generator()), "'rings'"),
    ],
)
def test_the_model_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bank_of_one_class_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="single class"):
        knn_predict(torch.randn(4, 2), torch.ones(4, dtype=torch.int64), torch.randn(2, 2), 2, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "mutag"], "needs --data"),
        (["--preset", "cora"], "unknown preset"),
        (["--graphs", "MUTAG"], "--graphs MUTAG needs --data"),
        (["--graphs", "karate"], "--graphs karate"),
        (["--studies", "speed"], "--studies speed"),
        (["--augmentation", "shuffle"], "--augmentation is 'shuffle'"),
        (["--ratio", "1"], "--ratio is 1"),
        (["--frameworks", "moco"], "--frameworks moco"),
        (["--generic-pair", "s", "x"], "--generic-pair s x"),
        (["--generic-pair", "s"], "generic"),
        (["--operations", "rhyme"], "--operations rhyme"),
        (["--alpha", "0"], "--alpha is 0"),
        (["--bank-share", "0.5", "--query-share", "0.5"], "leave nothing to train on"),
        (["--batch", "1"], "--batch is 1, expected at least 2"),
        (["--folds", "1"], "--folds is 1"),
        (["--windows", "1"], "--windows"),
        (["--digit-versions", "1"], "--digit-versions is 1"),
        (["--lr", "0"], "--lr is 0"),
        (["--penalties", "0"], "--penalties"),
        (["--weight-decay", "-1"], "--weight-decay is -1"),
        (["--preset", "smoke", "--studies", "documents", "--corpus", "subjectivity"], "--corpus subjectivity needs"),
        (["--preset", "smoke", "--studies", "documents", "--vectors", "word2vec"], "--vectors svd"),
        (
            ["--preset", "smoke", "--studies", "documents", "--neighbours", "30"],
            "--neighbours is 30, expected at most 20",
        ),
        (["--preset", "smoke", "--studies", "superpixels", "--digits", "mnist"], "--digits mnist needs"),
        (["--preset", "smoke", "--studies", "superpixels", "--digit-test", "4"], "--digit-test 4"),
        (["--preset", "smoke", "--studies", "accuracy", "--folds", "30"], "--folds 30"),
        (["--preset", "subjectivity", "--check-data"], "needs --data"),
    ],
)
def test_the_command_refuses(refuses: Any, argv: list[str], message: str) -> None:
    refuses(argv, message)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["pos\tgood", "no label"], "line 2: expected neg or pos, a TAB"),
        (["pos\tgood", "fun\tgood"], "line 2"),
        (["pos\tgood"], "1 sentences of 1 class"),
    ],
)
def test_bad_sentences(run_paper: Any, tmp_path: Path, lines: list[str], message: str) -> None:
    write_sentences(tmp_path, lines)
    argv = ["--preset", "subjectivity-svd", "--data", str(tmp_path)]
    for words in (["--check-data"], ["--out", str(tmp_path / "run")]):
        result = run_paper("graphcl_augmentations", [*argv, *words])
        assert (result.code, len(result.errors)) == (2, 1)
        assert message in result.err


def test_missing_files(run_paper: Any, tmp_path: Path) -> None:
    for preset, message in (
        ("subjectivity-svd", "expected subjectivity.txt"),
        ("mutag", "no graph set MUTAG"),
        ("mnist", "no train-images-idx3-ubyte"),
    ):
        for words in (["--check-data"], ["--out", str(tmp_path / preset)]):
            result = run_paper("graphcl_augmentations", ["--preset", preset, "--data", str(tmp_path), *words])
            assert (result.code, len(result.errors)) == (2, 1)
            assert message in result.err and str(tmp_path) in result.err
    write_sentences(tmp_path)
    result = run_paper("graphcl_augmentations", ["--preset", "subjectivity", "--data", str(tmp_path), "--check-data"])
    assert result.code == 2 and "--vectors svd" in result.err
    (tmp_path / "wordnet_synonyms.tsv.gz").write_bytes(gzip.compress(b"big\tlarge\nhuge\n"))
    result = run_paper(
        "graphcl_augmentations", ["--preset", "subjectivity-svd", "--data", str(tmp_path), "--check-data"]
    )
    assert result.code == 2 and "line 2" in result.err


# ---- training --------------------------------------------------------------------------------------------------------


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())["metrics"]


def test_written_files_run_and_resume(run_paper: Any, tmp_path: Path) -> None:
    """Sentences and digits in the official layout, stopped in the middle of a unit and resumed."""
    words = ["good big film", "a large room", "he is big", "in a room again", "the film is large"]
    lines = [f"{'pos' if i % 2 else 'neg'}\t{words[i % 5]} {words[(i * 7) % 5]}" for i in range(80)]
    write_sentences(tmp_path / "files", lines)
    write_digits(tmp_path / "files", "train")
    write_digits(tmp_path / "files", "test")
    argv = ["--preset", "smoke", "--data", str(tmp_path / "files"), "--studies", "documents", "superpixels"]
    argv += ["--corpus", "subjectivity", "--vectors", "svd", "--document-frameworks", "byol", "--digits", "mnist"]
    argv += ["--document-epochs", "2", "--digit-arms", "graph", "--no-mask-padding"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run_paper("graphcl_augmentations", [*argv, "--out", str(whole)])
    assert result.code == 0, result.err
    assert run_paper("graphcl_augmentations", [*argv, "--out", str(parts), "--stop-after", "5"]).code == 0
    assert not (parts / "result.json").exists()
    assert run_paper("graphcl_augmentations", ["--resume", str(parts)]).code == 0
    found = metrics_of(whole)
    assert found == metrics_of(parts)
    assert "subjectivity/window=2/byol/caa/knn_accuracy" in found and "digits/byol/graph/knn_accuracy" in found
    kinds = {row["kind"] for row in json.loads((whole / "result.json").read_text())["data"]}
    assert kinds == {"real"}


def test_a_written_graph_set_is_comparable(run_paper: Any, tmp_path: Path) -> None:
    """A set in the collection's layout through the label-flip study, whose numbers stand beside the reported ones."""
    made = data.generate_graphs("groups", 60, generator())
    folder = tmp_path / "MUTAG"
    folder.mkdir()
    owner = torch.repeat_interleave(torch.arange(60), made.ptr.diff())
    rows = {
        "A": [f"{a}, {b}" for a, b in (made.edges.t() + 1).tolist()],
        "graph_indicator": (owner + 1).tolist(),
        "graph_labels": (made.labels * 2 - 1).tolist(),
        "node_labels": made.x.argmax(1).tolist(),
    }
    for part, lines in rows.items():
        (folder / f"MUTAG_{part}.txt").write_text("\n".join(map(str, lines)) + "\n")
    loaded = data.load_graphs(tmp_path, "MUTAG")
    assert torch.equal(loaded.x, made.x) and torch.equal(loaded.labels, made.labels)
    out = tmp_path / "run"
    argv = ["--preset", "mutag", "--data", str(tmp_path), "--studies", "flip", "--flip-epochs", "2", "--seeds", "2"]
    result = run_paper("graphcl_augmentations", [*argv, "--out", str(out)])
    assert result.code == 0, result.err
    stored = json.loads((out / "result.json").read_text())
    rows = {row["metric"]: row["comparable"] for row in stored["reported"]}
    assert rows["MUTAG/flip/random2_accuracy"] and rows["MUTAG/flip/train_accuracy"]
    assert len(stored["metrics"]["MUTAG/flip/test_accuracy"]["values"]) == 2


GRAPHS = ["--studies", "accuracy", "flip", "--graphs", "groups", "--generated-graphs", "200", "--frameworks", "graphcl"]
GRAPHS += ["--flip-epochs", "60", "--epochs", "5", "--flip-views", "2"]


def test_broken_methods_fail_the_claims(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(name: str) -> dict[str, bool]:
        assert train.main([*GRAPHS, "--seeds", "1", "--out", str(tmp_path / name)]) == 0
        claims = json.loads((tmp_path / name / "result.json").read_text())["claims"]
        return {claim["name"]: claim["holds"] for claim in claims}

    good = verdicts("good")
    assert good["training_adds_little"] and good["generic_views_change_labels"]
    module = sys.modules["model"]

    def everything(graphs: Any, *_: Any) -> Tensor:
        return torch.ones(graphs.nodes, dtype=torch.bool)

    def alone(graphs: Any, h: Tensor, own: bool = False) -> Tensor:
        return h if own else torch.zeros_like(h)

    monkeypatch.setattr(module, "subgraph", everything)  # a subgraph view that leaves nothing out
    monkeypatch.setattr(module, "neighbour_sum", alone)  # an encoder that sees no edge
    broken = verdicts("broken")
    assert not broken["training_adds_little"]
    assert not broken["generic_views_change_labels"]
