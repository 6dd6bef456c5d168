"""DosCond: one drawn network of condensation, an epoch of evaluation and the making of a batch, on the paper's graphs.

Beside them the official code's way of doing it (torch-geometric's layers, batches collated anew), run here where
torch-geometric is installed, and its seconds measured apart. The real graphs are read from $REPRO_DATA or
../shared/data; without them generated ones of about the same size stand in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.doscond import data, model
from tools.bench import Workload

ROOT = Path(__file__).resolve().parents[2]
Step = Callable[[], Any]
NODES = {"MUTAG": 18, "NCI1": 30}
LR = {"MUTAG": 0.1, "NCI1": 1.0}
# Least seconds of the official code on two threads of a machine that other jobs used too.
OFFICIAL = {"MUTAG": 0.028, "NCI1": 0.204}
OFFICIAL_EPOCH = {"MUTAG": 0.0143, "NCI1": 0.093}
OFFICIAL_COLLATE = {"MUTAG": 0.0015, "NCI1": 0.0051}


@cache
def problem(name: str) -> tuple[data.GraphData, model.GraphSet]:
    """The graphs of a workload."""
    folder = Path(os.environ.get("REPRO_DATA") or ROOT.parent / "shared" / "data") / "tu-graphs"
    if (folder / f"{name}.txt").is_file():
        made = data.load_graphs(folder, name)
    else:
        counts = data.EXPECTED[name]
        sizes = (counts["graphs"], counts["train"], counts["val"], counts["features"])
        made = data.generate_graphs(torch.Generator().manual_seed(0), *sizes)
    return made, model.GraphSet(made.x, made.edges, made.ptr)


def members(made: data.GraphData) -> list[Tensor]:
    """Training graphs of each class."""
    return [made.train[made.labels[made.train] == c] for c in range(made.classes)]


def condensed(name: str, ipc: int) -> tuple[model.CondensedGraphs, list[torch.optim.Optimizer]]:
    """Condensed graphs at their start, with the two optimisers."""
    made, graphs = problem(name)
    torch.manual_seed(0)
    small = model.CondensedGraphs([ipc] * made.classes, NODES[name], made.x.shape[1])
    fitting = [own[graphs.sizes[own] <= NODES[name]][:ipc] for own in members(made)]
    small.start(*graphs.dense(torch.cat(fitting), NODES[name]))
    return small, [
        torch.optim.Adam([small.omega], lr=LR[name], fused=True),
        torch.optim.Adam([small.x], lr=0.01, fused=True),
    ]


def update(small: model.CondensedGraphs, optimizers: list[torch.optim.Optimizer], loss: Tensor) -> None:
    """Both Adam steps."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    (loss + 0.1 * small.penalty()).backward(inputs=[small.omega, small.x])
    for optimizer in optimizers:
        optimizer.step()


def iteration(name: str, ipc: int) -> Step:
    """One drawn network, as in train.py."""
    made, graphs = problem(name)
    small, optimizers = condensed(name, ipc)
    network = model.GCN(made.x.shape[1], made.classes)
    classes = members(made)
    fixed = {c: (graphs.batch(own), made.labels[own]) for c, own in enumerate(classes) if len(own) <= 256}

    def real(c: int) -> tuple[model.Batch, Tensor]:
        if c in fixed:
            return fixed[c]
        index = classes[c][torch.randperm(len(classes[c]))[:256]]
        return graphs.batch(index), made.labels[index]

    def step() -> Any:
        network.reset()
        sampled = small.sample()
        loss = sum(model.match(network, small.of_class(sampled, c), real(c)) for c in range(made.classes))
        update(small, optimizers, loss)
        return loss

    return step


def pyg_graphs(name: str) -> list[Any]:
    """The graphs as torch-geometric's objects."""
    from torch_geometric.data import Data

    made, _ = problem(name)
    graph = torch.repeat_interleave(torch.arange(len(made.labels)), made.ptr.diff())
    order = graph[made.edges[0]].argsort(stable=True)
    edges = made.edges[:, order]
    count = torch.bincount(graph[edges[0]], minlength=len(made.labels))
    parts = zip(
        made.ptr[:-1].tolist(), made.x.split(made.ptr.diff().tolist()), edges.split(count.tolist(), 1), strict=True
    )
    return [
        Data(x=x, edge_index=own - first, y=label[None])
        for (first, x, own), label in zip(parts, made.labels, strict=True)
    ]


class Twin(torch.nn.Module):
    """The network with torch-geometric's layers, sparse or dense."""

    def __init__(self, features: int, dense: bool) -> None:
        super().__init__()
        from torch_geometric.nn import DenseGCNConv, GCNConv

        kind = DenseGCNConv if dense else GCNConv
        self.convs = torch.nn.ModuleList(kind(i, 128) for i in (features, 128, 128))
        self.lin3 = torch.nn.Linear(128, 2)

    def forward(self, batch: Any, adj: Tensor | None = None) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = batch if adj is not None else batch.x
        for conv in self.convs:
            x = conv(x, batch.edge_index if adj is None else adj).relu()
        x = x.mean(1) if adj is not None else global_mean_pool(x, batch.batch)
        return self.lin3(x).log_softmax(1)


def pyg_iteration(name: str, ipc: int) -> Step:
    """The same, as the official code does it: two fresh networks, every class batch collated anew."""
    from torch_geometric.data import Batch

    made, _ = problem(name)
    small, optimizers = condensed(name, ipc)
    graphs, classes = pyg_graphs(name), members(made)

    def step() -> Any:
        dense, sparse = Twin(made.x.shape[1], True), Twin(made.x.shape[1], False)
        sparse.load_state_dict(dense.state_dict())
        adj, loss = small.relaxed(), 0.0
        for c, part in enumerate(small.parts):
            index = classes[c][torch.randperm(len(classes[c]))[:256]]
            batch = Batch.from_data_list([graphs[i] for i in index.tolist()])
            real = torch.autograd.grad(F.nll_loss(sparse(batch), batch.y), list(sparse.parameters()))
            out = F.nll_loss(dense(small.x[part], adj[part]), small.labels[part])
            synthetic = torch.autograd.grad(out, list(dense.parameters()), create_graph=True)
            s, r = (torch.cat([g.flatten() for g in side]) for side in (synthetic, real))
            loss = loss + ((s - r) ** 2).sum() / (r**2).sum()
        update(small, optimizers, loss)
        return loss

    return step


def epoch(name: str, ipc: int, copies: int | None) -> Step:
    """An epoch of training on condensed graphs and its validation."""
    made, graphs = problem(name)
    small, _ = condensed(name, ipc)
    network = model.GCN(made.x.shape[1], made.classes, copies=copies)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    training, validation, labels = small.graphs(), graphs.batch(made.val), made.labels[made.val]

    def step() -> Any:
        optimizer.zero_grad()
        model.graph_loss(network(training), small.labels).sum().backward()
        optimizer.step()
        with torch.no_grad():
            return (network(validation).argmax(-1) == labels).double().mean(-1)

    return step


def pyg_epoch(name: str, ipc: int, repeats: int) -> Step:
    """The same as the official code does it, ``repeats`` networks one after the other, validation collated anew."""
    from torch_geometric.data import Batch, Data

    made, _ = problem(name)
    small, _ = condensed(name, ipc)
    graphs, adj = pyg_graphs(name), small.adjacency()
    training = [
        Data(x=x, edge_index=a.nonzero().t(), y=y[None]) for x, a, y in zip(small.x.detach(), adj, small.labels)
    ]
    networks = [Twin(made.x.shape[1], False) for _ in range(repeats)]
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in networks]

    def step() -> Any:
        for network, optimizer in zip(networks, optimizers, strict=True):
            batch = Batch.from_data_list(training)
            optimizer.zero_grad()
            F.nll_loss(network(batch), batch.y).backward()
            optimizer.step()
            batch = Batch.from_data_list([graphs[i] for i in made.val.tolist()])
            with torch.no_grad():
                score = (network(batch).argmax(1) == batch.y).double().mean()
        return score

    return step


def collate(name: str) -> Step:
    """A batch of up to 256 graphs of one class."""
    made, graphs = problem(name)
    own = members(made)[1]
    return lambda: graphs.batch(own[torch.randperm(len(own))[:256]])


def real_gradient(name: str, merge: bool) -> Step:
    """Gradient of 256 real graphs, with equal nodes computed once or not."""
    made, graphs = problem(name)
    if not merge:
        graphs = model.GraphSet(made.x, made.edges, made.ptr, merge=False)
    own = members(made)[1][:256]
    batch, labels = graphs.batch(own), made.labels[own]
    network = model.GCN(made.x.shape[1], made.classes)
    return lambda: torch.autograd.grad(model.graph_loss(network(batch), labels), list(network.parameters()))


def structure(pairs: bool) -> Step:
    """Edges of 70 condensed nodes of Cora and their gradient; ``pairs``: the MLP on all pairs of features."""
    torch.manual_seed(0)
    pge, x = model.PGE(1433), torch.rand(70, 1433)
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(70), torch.arange(70), indexing="ij"))

    def on_pairs() -> Tensor:
        z = torch.cat([x[i], x[j]], 1)
        for layer, bn in zip(pge.layers, pge.bns, strict=False):
            z = F.relu(bn(layer(z)))
        z = pge.layers[2](z).view(70, 70)
        return torch.sigmoid((z + z.t()) / 2)

    def step() -> Any:
        adj = on_pairs() if pairs else pge(x)
        return torch.autograd.grad(adj.sum(), list(pge.parameters()))

    return step


def workloads() -> Iterator[Workload]:
    """Against the official code's seconds, the official procedure run here, and straightforward forms."""
    apart = "official code, measured apart"
    for name, ipc in (("MUTAG", 1), ("NCI1", 10)):
        sizes = f"{name}, {ipc} per class"
        title = f"{sizes}: condensation iteration"
        yield Workload(title, lambda n=name, i=ipc: iteration(n, i), None, apart, OFFICIAL[name], 2.0)
        title = f"{sizes}: evaluation epoch"
        yield Workload(title, lambda n=name, i=ipc: epoch(n, i, None), None, apart, OFFICIAL_EPOCH[name], 2.0)
        title = f"{name}: batch of up to 256 graphs of a class"
        yield Workload(title, lambda n=name: collate(n), None, apart, OFFICIAL_COLLATE[name], 2.0)
        title = f"{name}: gradient of up to 256 real graphs"
        plain = "every node a row of its own"
        yield Workload(
            title, lambda n=name: real_gradient(n, True), lambda n=name: real_gradient(n, False), plain, target=1.5
        )
    title = "70 nodes of Cora: edges and their gradient"
    yield Workload(title, lambda: structure(False), lambda: structure(True), "MLP on all pairs", target=3.0)
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        return
    way = "torch-geometric, as the official code"
    for name, ipc in (("MUTAG", 1), ("NCI1", 10)):
        title = f"{name}, {ipc} per class: condensation iteration beside torch-geometric"
        yield Workload(
            title, lambda n=name, i=ipc: iteration(n, i), lambda n=name, i=ipc: pyg_iteration(n, i), way, target=2.0
        )
        title = f"{name}, {ipc} per class: evaluation epoch of ten networks"
        yield Workload(
            title, lambda n=name, i=ipc: epoch(n, i, 10), lambda n=name, i=ipc: pyg_epoch(n, i, 10), way, target=2.0
        )
