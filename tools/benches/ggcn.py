"""Workloads of GGCN: one optimiser step (forward, loss, backward, Adam) on the graphs of the paper, one split.

The real graphs are read from $REPRO_DATA or ../shared/data; without them a generated graph of the same size stands in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from papers.ggcn import data, model
from tools.bench import Workload

ROOT = Path(__file__).resolve().parents[2]
# layers, hidden, weight decay, dropout, decay rate of the published scripts; nodes, mean degree, features of a stand-in
SETTINGS = {
    "texas": (2, 16, 1e-3, 0.4, 1.0, 183, 3, 1703),
    "chameleon": (5, 32, 1e-2, 0.3, 0.8, 2277, 30, 2325),
    "cora": (32, 16, 1e-3, 0.5, 0.9, 2708, 4, 1433),
    "squirrel": (2, 32, 4e-3, 0.5, 1.0, 5201, 80, 2089),
    "actor": (4, 32, 7e-3, 0.0, 1.2, 7600, 8, 932),
}


@cache
def problem(name: str) -> tuple[data.NodeData, model.SparseMatrix, model.Adjacency]:
    """The graph of a workload."""
    folder = Path(os.environ.get("REPRO_DATA") or ROOT.parent / "shared" / "data") / "planetoid-geomgcn"
    if folder.is_dir():
        made = data.load(folder, name, 1)
    else:
        *_, nodes, degree, features = SETTINGS[name]
        generator = torch.Generator().manual_seed(0)
        made = data.generate(0.2, generator, nodes=nodes, degree=float(degree), vocabulary=features)
    return made, model.SparseMatrix.of(made.features), model.Adjacency.from_edges(made.edges, len(made.labels))


def train_step(
    name: str, make: Callable[[int, int], torch.nn.Module], decay: float, dense: bool = False, graph: Any = None
) -> Callable[[], Any]:
    """One optimiser step of a network; ``graph`` replaces what it is called with after x."""
    made, x, adjacency = problem(name)
    torch.manual_seed(0)
    network = make(x.shape[1], made.classes).train()
    given = x.dense() if dense else x
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, weight_decay=decay, fused=True)
    train, labels = made.train[0].nonzero().squeeze(1), made.labels[made.train[0]]
    second = adjacency if graph is None else graph

    def step() -> Any:
        optimizer.zero_grad()
        loss = F.nll_loss(network(given, second)[train], labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def ggcn(name: str, sparse: bool) -> Callable[[], Callable[[], Any]]:
    """GGCN with the published settings: edge form with sparse features, or N x N form with dense ones."""
    layers, hidden, decay, dropout, rate = SETTINGS[name][:5]

    def make(features: int, classes: int) -> torch.nn.Module:
        return model.GGCN(features, layers, hidden, classes, dropout, rate, use_sparse=sparse)

    return lambda: train_step(name, make, decay, dense=not sparse)


class PeerGCN(torch.nn.Module):
    """Two GCNConv of torch-geometric, normalisation cached."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(features, 16, cached=True), GCNConv(16, classes, cached=True)

    def forward(self, x: Any, edges: Any) -> Any:
        z = F.dropout(self.first(x, edges).relu(), 0.5, self.training)
        return self.second(z, edges).log_softmax(1)


class PeerGAT(torch.nn.Module):
    """Eight heads of eight units, then one, with torch-geometric's GATConv."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv

        self.first = GATConv(features, 8, heads=8, dropout=0.6)
        self.second = GATConv(64, classes, dropout=0.6)

    def forward(self, x: Any, edges: Any) -> Any:
        z = F.elu(self.first(F.dropout(x, 0.6, self.training), edges))
        return F.elu(self.second(F.dropout(z, 0.6, self.training), edges)).log_softmax(1)


class PeerGCN2(torch.nn.Module):
    """GCNII with torch-geometric's GCN2Conv."""

    def __init__(self, features: int, classes: int, layers: int = 64) -> None:
        super().__init__()
        from torch_geometric.nn import GCN2Conv

        self.into, self.out = torch.nn.Linear(features, 64), torch.nn.Linear(64, classes)
        self.convs = torch.nn.ModuleList(GCN2Conv(64, 0.2, 0.5, l, cached=True) for l in range(1, layers + 1))

    def forward(self, x: Any, edges: Any) -> Any:
        z = first = self.into(F.dropout(x, 0.5, self.training)).relu()
        for conv in self.convs:
            z = conv(F.dropout(z, 0.5, self.training), first, edges).relu()
        return self.out(F.dropout(z, 0.5, self.training)).log_softmax(1)


class PeerAPPNP(torch.nn.Module):
    """The MLP and ten steps of propagation of GPRGNN, with torch-geometric's APPNP (its weights are not learned)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        from torch_geometric.nn import APPNP

        self.into, self.out = torch.nn.Linear(features, 64), torch.nn.Linear(64, classes)
        self.steps = APPNP(10, 0.1, cached=True)

    def forward(self, x: Any, edges: Any) -> Any:
        z = self.into(F.dropout(x, 0.5, self.training)).relu()
        z = F.dropout(self.out(F.dropout(z, 0.5, self.training)), 0.5, self.training)
        return self.steps(z, edges).log_softmax(1)


def workloads() -> Iterator[Workload]:
    """Our edge form beside our N x N form, the official code's measured seconds, and torch-geometric."""
    for name, least in (("texas", 1.0), ("chameleon", 5.0), ("squirrel", 3.0), ("actor", 3.0)):
        layers, hidden = SETTINGS[name][:2]
        title = f"{name}, {layers} layers, {hidden} hidden: train step"
        yield Workload(title, ggcn(name, True), ggcn(name, False), "N x N form, dense features", target=least)
    # Seconds of the official code on two threads of the machine this was developed on.
    for name, kind, seconds in (("texas", "N x N", 0.0065), ("chameleon", "edge", 0.316), ("cora", "edge", 1.10)):
        layers, hidden = SETTINGS[name][:2]
        title = f"{name}, {layers} layers, {hidden} hidden: train step against the official code"
        other = f"official {kind} form, measured apart"
        yield Workload(title, ggcn(name, True), other_name=other, other_seconds=seconds, target=2.0)
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        return
    peers: list[tuple[str, Any, Any, float]] = [
        ("GCN, 2 layers", lambda f, c: model.GCN(f, 2, 16, c), PeerGCN, 1.0),
        ("GAT, 2 layers of 8 heads", lambda f, c: model.GAT(f, 2, 8, c), PeerGAT, 1.0),
        ("GCNII, 64 layers", lambda f, c: model.GCNII(f, 64, 64, c, alpha=0.2), PeerGCN2, 1.0),
        ("GPRGNN, 10 steps", lambda f, c: model.GPRGNN(f, 10, 64, c), PeerAPPNP, 1.0),
    ]
    for title, ours, peer, least in peers:
        yield Workload(
            f"cora, {title}: train step",
            lambda ours=ours: train_step("cora", ours, 5e-4),
            lambda peer=peer: train_step("cora", peer, 5e-4, dense=True, graph=problem("cora")[0].edges),
            "torch-geometric, dense features",
            target=least,
        )
