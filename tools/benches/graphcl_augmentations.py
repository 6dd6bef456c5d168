"""Workloads of graph contrastive learning: augmentations, optimiser steps and an epoch, each beside the usual form.

The usual form is a graph at a time in Python (dense adjacency, a clean-up loop over nodes and edges) and the layers of
torch-geometric; sentences as dictionaries of edges and batches padded to the longest. The real sets are read from
$REPRO_DATA or ../shared/data; without them generated ones of like size stand in.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papers.graphcl_augmentations import data, model, probe
from tools.bench import Workload

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("REPRO_DATA") or ROOT.parent / "shared" / "data")
BATCH = 128
PENALTIES = (0.001, 0.01, 0.1, 1, 10, 100, 1000)


@cache
def graph_set(name: str) -> model.Graphs:
    """A graph set with the official loops."""
    if (DATA / "tu-graphs").is_dir():
        made = data.load_graphs(DATA / "tu-graphs", name)
    else:
        made = data.generate_graphs("folds" if name == "PROTEINS" else "groups", 1113, torch.Generator().manual_seed(0))
    return model.with_loops(model.Graphs.build(made.x, made.edges, made.ptr))


@cache
def sentences(count: int) -> tuple[model.Texts, int]:
    """The first sentences of Subjectivity, and the size of the vocabulary."""
    folder = DATA / "subjectivity"
    if folder.is_dir():
        corpus = data.load_sentences(folder)
    else:
        corpus = data.generate_corpus(count, torch.Generator().manual_seed(0))
    texts = model.Texts(corpus.words, corpus.ptr)
    return texts.select(torch.arange(count)), len(corpus.vocabulary) - 1


# ---- a graph at a time -----------------------------------------------------------------------------------------------


class Separate:
    """The graphs of a set one by one, as a data loader would hand them out; ``walk`` as for ``model.subgraph``."""

    def __init__(self, graphs: model.Graphs, walk: str = "code") -> None:
        self.walk = walk
        self.items = []
        for i in range(len(graphs)):
            one = graphs.select(torch.tensor([i]))
            self.items.append((one.x, torch.stack([one.col, one.row])))
        self.random = np.random.default_rng(0)

    def view(self, x: Tensor, edges: Tensor) -> Tensor:
        """Edges of a random2 view: of a dense adjacency, rows and columns of the lost nodes are cleared."""
        n = len(x)
        if self.random.integers(2):
            lost = self.random.choice(n, n // 10, replace=False)
        else:
            taken = {int(self.random.integers(n))}
            source, target = edges.numpy()
            near = set(target[source == next(iter(taken))])
            tries = 0
            while len(taken) <= n // 5 and near and tries < n:
                tries += 1
                node = int(self.random.choice(list(near)))
                if node not in taken:
                    taken.add(node)
                    if self.walk == "grow":
                        near |= set(target[source == node])
            lost = [node for node in range(n) if node not in taken]
        matrix = torch.zeros(n, n)
        matrix[edges[0], edges[1]] = 1
        matrix[lost, :] = 0
        matrix[:, lost] = 0
        return matrix.nonzero().t()

    def batch(self, index: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, edges, edges of the views and graph numbers of some graphs, put together."""
        xs, plain, views, owner, shift = [], [], [], [], 0
        for place, i in enumerate(index):
            x, edges = self.items[i]
            xs.append(x)
            plain.append(edges + shift)
            views.append(self.view(x, edges) + shift)
            owner.append(torch.full((len(x),), place))
            shift += len(x)
        return torch.cat(xs), torch.cat(plain, 1), torch.cat(views, 1), torch.cat(owner)


def clean_up(x: Tensor, edges: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Renumber the nodes that have an edge and drop loops, in loops over nodes and edges."""
    pairs = edges.numpy()
    present = [node for node in range(len(x)) if node in pairs[0] or node in pairs[1]]
    number = {node: i for i, node in enumerate(present)}
    kept = [[number[a], number[b]] for a, b in pairs.T if a != b]
    return x[present], torch.tensor(kept).t(), owner[present]


class PeerEncoder(nn.Module):
    """The encoder of the graph sets from torch-geometric's layers."""

    def __init__(self, features: int, hidden: int = 32, layers: int = 5) -> None:
        super().__init__()
        from torch_geometric.nn import GINConv

        widths = [features] + [hidden] * (layers - 1)
        self.convs = nn.ModuleList(GINConv(model.two_layers(width, hidden, norm=False)) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers))
        self.width = hidden * layers

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        from torch_geometric.nn import global_add_pool

        x, edges, owner = batch
        out = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, edges).relu())
            out.append(global_add_pool(x, owner, BATCH))
        return torch.cat(out, 1)


def stepper(net: nn.Module, fused: bool = True) -> Callable[[Any, Any], Tensor]:
    """An optimiser step on two views."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, fused=fused)

    def step(first: Any, second: Any) -> Tensor:
        optimizer.zero_grad()
        loss = net(first, second)
        loss.backward()
        optimizer.step()
        return loss

    return step


def our_view(name: str, walk: str) -> Callable[[], Any]:
    graphs, generator = graph_set(name).select(torch.arange(BATCH)), torch.Generator().manual_seed(0)
    return lambda: model.augment(graphs, "random2", generator, walk=walk)


def loop_view(name: str, walk: str) -> Callable[[], Any]:
    separate = Separate(graph_set(name).select(torch.arange(BATCH)), walk)

    def run() -> Any:
        x, _, views, owner = separate.batch(range(BATCH))
        return clean_up(x, views, owner)

    return run


def our_step(name: str) -> Callable[[], Any]:
    graphs = graph_set(name).select(torch.arange(BATCH))
    view = model.augment(graphs, "random2", torch.Generator().manual_seed(0), walk="code")
    step = stepper(model.build("graphcl", model.Encoder(graphs.x.shape[1]), "graphs"))
    return lambda: step(graphs, view)


def peer_step(name: str) -> Callable[[], Any]:
    graphs = graph_set(name).select(torch.arange(BATCH))
    view = model.augment(graphs, "random2", torch.Generator().manual_seed(0), walk="code")
    step = stepper(model.build("graphcl", PeerEncoder(graphs.x.shape[1]), "graphs"), fused=False)
    first, second = ((g.x, torch.stack([g.col, g.row]), g.owner) for g in (graphs, view))
    return lambda: step(first, second)


def our_epoch(name: str) -> Callable[[], Any]:
    graphs, generator = graph_set(name), torch.Generator().manual_seed(0)
    step = stepper(model.build("graphcl", model.Encoder(graphs.x.shape[1]), "graphs"))

    def run() -> None:
        for part in torch.arange(len(graphs) // BATCH * BATCH).split(BATCH):
            step(*model.contrast_views(graphs.select(part), "random2", generator, walk="code"))

    return run


def peer_epoch(name: str) -> Callable[[], Any]:
    graphs = graph_set(name)
    separate = Separate(graphs)
    step = stepper(model.build("graphcl", PeerEncoder(graphs.x.shape[1]), "graphs"), fused=False)

    def run() -> None:
        for start in range(0, len(graphs) // BATCH * BATCH, BATCH):
            x, edges, views, owner = separate.batch(range(start, start + BATCH))
            step((x, edges, owner), clean_up(x, views, owner))

    return run


# ---- sentences -------------------------------------------------------------------------------------------------------


def lists(texts: model.Texts) -> list[list[int]]:
    """Sentences as lists of word numbers."""
    return [part.tolist() for part in texts.words.split(texts.ptr.diff().tolist())]


def slow_word_graph(words: list[int], window: int = 2) -> Any:
    """One graph of words: a dictionary of edges, then a scipy matrix."""
    import scipy.sparse as sp

    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    master = len(number)
    edges: dict[tuple[int, int], float] = {}
    for i, word in enumerate(words):
        for j in range(i + 1, min(i + window, len(words))):
            pair = (number[word], number[words[j]])
            edges[pair] = edges.get(pair, 0.0) + 1 / (j - i)
        edges[number[word], master] = edges[master, number[word]] = 1.0
    source, target = zip(*edges, strict=True)
    matrix = sp.csr_matrix((list(edges.values()), (target, source)), shape=(master + 1, master + 1))
    return sp.diags(1 / np.asarray(matrix.sum(1)).ravel()) @ matrix


def our_word_graphs() -> Callable[[], Any]:
    texts, _ = sentences(1024)
    return lambda: model.word_graphs(texts)


def loop_word_graphs() -> Callable[[], Any]:
    rows = lists(sentences(1024)[0])
    return lambda: [slow_word_graph(row) for row in rows]


def our_words(name: str) -> Callable[[], Any]:
    graphs, generator = model.word_graphs(sentences(1024)[0]), torch.Generator().manual_seed(0)
    return lambda: model.augment_words(graphs, name, 0.1, generator)


def loop_words(name: str) -> Callable[[], Any]:
    """A dense matrix of each sentence, changed and made sparse again."""
    import scipy.sparse as sp

    made = [slow_word_graph(row) for row in lists(sentences(1024)[0])]
    random = np.random.default_rng(0)

    def run() -> list[Any]:
        out = []
        for matrix in made:
            dense = matrix.toarray()
            n = len(dense)
            if name == "n":
                for node in random.integers(n, size=n // 10):
                    dense[node] = 0
                    dense[:, node] = 0
            else:
                kept = np.diagonal(dense).copy()
                steps = int(np.ceil(0.1 * dense.sum()))
                np.fill_diagonal(dense, 0)
                walk = [int(random.integers(n))]
                while len(walk) <= steps and len(near := np.nonzero(dense[walk[-1]])[0]):
                    walk.append(int(random.choice(near)))
                for a, b in itertools.pairwise(walk):
                    dense[a, b] = 0
                np.fill_diagonal(dense, kept)
            out.append(sp.csr_matrix(dense))
        return out

    return run


def document_step(aggregator: str) -> Callable[[], Any]:
    """SimSiam on one batch, packed and masked."""
    texts, words = sentences(1024)
    graphs = model.word_graphs(texts.select(torch.arange(BATCH)))
    vectors = data.random_vectors(words, 300, torch.Generator().manual_seed(0))
    step = stepper(model.build("simsiam", model.MPAD(vectors, aggregator=aggregator), "documents"))
    return lambda: step(graphs, graphs)


class Padded(nn.Module):
    """The same network on a batch padded to its longest sentence: one matrix over all nodes, sparse or dense."""

    width = 64

    def __init__(self, net: model.MPAD, aggregator: str) -> None:
        super().__init__()
        self.net = net
        if aggregator == "gcn":
            from torch_geometric.nn import DenseGCNConv

            self.convs = nn.ModuleList(DenseGCNConv(64, 64) for _ in net.blocks)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        matrix, words = batch
        x = torch.nn.functional.dropout(self.net.vectors[words], self.net.dropout, self.training)
        out = []
        for i, (block, readout) in enumerate(zip(self.net.blocks, self.net.readouts, strict=True)):
            x = block.first(x)
            m = block.second(matrix @ x if matrix.is_sparse else self.convs[i](x, matrix)[0])
            u1, v1, u2, v2, u3, v3 = block.gates
            z, r = torch.sigmoid(u1(m) + v1(x)), torch.sigmoid(u2(m) + v2(x))
            x = (1 - z) * x + z * torch.tanh(u3(m) + v3(r * x))
            each = x.view(BATCH, -1, 64)
            share = torch.tanh(readout.score(torch.tanh(readout.inner(each))))[:, :-1].softmax(1)
            out.append(torch.cat([readout.out((share * each[:, :-1]).sum(1)).relu(), each[:, -1]], 1))
        return self.net.out(self.net.norm(torch.cat(out, 1))).relu()


def padded_step(aggregator: str) -> Callable[[], Any]:
    """SimSiam on the same batch in the padded form."""
    texts, words = sentences(1024)
    graphs = model.pad_words(model.word_graphs(texts.select(torch.arange(BATCH))))
    vectors = data.random_vectors(words, 300, torch.Generator().manual_seed(0))
    matrix = torch.sparse_coo_tensor(
        torch.stack([graphs.row, graphs.col]), graphs.weight, (graphs.nodes, graphs.nodes), check_invariants=False
    ).coalesce()
    if aggregator == "gcn":
        matrix = matrix.to_dense()
    net = model.build("simsiam", Padded(model.MPAD(vectors), aggregator), "documents")
    step = stepper(net, fused=False)
    return lambda: step((matrix, graphs.x), (matrix, graphs.x))


@cache
def embeddings(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Standardised embeddings of an untrained encoder, and labels -1 and 1 (generated sets: by the number of nodes)."""
    graphs = graph_set(name)
    torch.manual_seed(0)
    with torch.no_grad():
        z = model.Encoder(graphs.x.shape[1], 32, 5, "gin").eval()(graphs).double().numpy()
    if (DATA / "tu-graphs").is_dir():
        large = data.load_graphs(DATA / "tu-graphs", name).labels.numpy() == 1
    else:
        large = np.diff(graphs.ptr.numpy()) > np.median(np.diff(graphs.ptr.numpy()))
    return (z - z.mean(0)) / np.maximum(z.std(0), 1e-12), np.where(large, 1.0, -1.0)


def our_probe() -> Callable[[], Any]:
    """A linear SVM for each C of the grid."""
    x, sign = embeddings("PROTEINS")
    return lambda: [probe.LinearSVM(penalty).fit(x, sign) for penalty in PENALTIES]


def liblinear_probe() -> Callable[[], Any]:
    """The same by scikit-learn, which stops at its limit of iterations with the larger C."""
    from sklearn.svm import LinearSVC

    x, sign = embeddings("PROTEINS")

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for penalty in PENALTIES:
                LinearSVC(C=penalty, dual="auto", random_state=0).fit(x, sign)

    return fit


def workloads() -> Iterator[Workload]:
    """Ours beside the usual form."""
    loop = "a graph at a time in Python"
    for name, walk, least in (("MUTAG", "code", 3.0), ("PROTEINS", "code", 3.0), ("PROTEINS", "grow", 2.0)):
        kind = "the released subgraph" if walk == "code" else "a subgraph that grows"
        ours = lambda name=name, walk=walk: our_view(name, walk)  # noqa: E731
        other = lambda name=name, walk=walk: loop_view(name, walk)  # noqa: E731
        title = f"{name}, {BATCH} graphs: random2 views with {kind} and clean-up"
        yield Workload(title, ours, other, loop, target=least)
    title = "Subjectivity, 1,024 sentences: graphs of words"
    yield Workload(title, our_word_graphs, loop_word_graphs, "dictionaries and scipy", target=2.0)
    for name, what in (("n", "nodes lose their edges"), ("s", "edges of a walk vanish")):
        title = f"Subjectivity, 1,024 graphs of words: {what}"
        yield Workload(title, lambda name=name: our_words(name), lambda name=name: loop_words(name), loop, target=2.0)
    yield Workload(
        f"Subjectivity, {BATCH} sentences: SimSiam step",
        lambda: document_step("original"),
        lambda: padded_step("original"),
        "padded batch, sparse matrix",
        target=2.0,
    )
    title = "PROTEINS, 1,113 embeddings: linear SVM for seven C"
    yield Workload(title, our_probe, liblinear_probe, "scikit-learn's LinearSVC", target=2.0)
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        return
    yield Workload(
        f"Subjectivity, {BATCH} sentences: SimSiam step, GCN",
        lambda: document_step("gcn"),
        lambda: padded_step("gcn"),
        "padded batch, one dense matrix",
        target=2.0,
    )
    for name, least in (("MUTAG", 1.2), ("PROTEINS", 1.5)):
        title = f"{name}, {BATCH} graphs: GraphCL step"
        ours, peer = (lambda name=name: our_step(name)), (lambda name=name: peer_step(name))
        yield Workload(title, ours, peer, "torch-geometric", target=least)
    for name, least in (("MUTAG", 2.0), ("PROTEINS", 3.0)):
        title = f"{name}: an epoch of GraphCL"
        ours, peer = (lambda name=name: our_epoch(name)), (lambda name=name: peer_epoch(name))
        yield Workload(title, ours, peer, f"{loop}, torch-geometric", target=least)
