"""Workloads of MGTAB: one optimiser step (forward, loss, backward, AdamW) beside the layers of the official code.

Features are normal, edges and types uniform, as in the official code's measurement: 3,000 users with 22 edges each in
two relations or 51 in seven; and the published size, 10,199 users and the number of edges of two or of all relations.
An epoch is a step and an evaluation pass, as in the scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.mgtab import data, model
from tools.bench import Workload

SIZES = {  # users, edges, relations
    "small, 2 relations": (3_000, 66_000, 2),
    "small, 7 relations": (3_000, 153_000, 7),
    "published, 2 relations": (10_199, sum(data.EXPECTED_EDGES["mgtab"][:2]), 2),
    "published, 7 relations": (10_199, sum(data.EXPECTED_EDGES["mgtab"]), 7),
}


@cache
def problem(size: str) -> tuple[Tensor, Tensor, Tensor, Tensor, model.RelationGraph]:
    """x, edges, types, labels and the graph."""
    users, edges, relations = SIZES[size]
    random = np.random.RandomState(0)
    x = torch.from_numpy(random.standard_normal((users, data.FEATURES)).astype(np.float32))
    pairs = torch.from_numpy(random.randint(users, size=(2, edges)))
    types = torch.from_numpy(random.randint(relations, size=edges))
    labels = torch.from_numpy(random.randint(2, size=users))
    return x, pairs, types, labels, model.RelationGraph(pairs, types, users, relations)


def epoch(size: str, make: Callable[[int], nn.Module], peer: bool, evaluate: bool) -> Callable[[], Any]:
    """A step of a network, and an evaluation pass after it; peers are called with edges and types."""
    x, pairs, types, labels, graph = problem(size)
    torch.manual_seed(0)
    network = make(SIZES[size][2])
    rest = (pairs, types) if peer else (graph,)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=5e-4, fused=True)

    def step() -> Any:
        network.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x, *rest), labels)
        loss.backward()
        optimizer.step()
        if evaluate:
            network.eval()
            with torch.no_grad():
                network(x, *rest)
        return loss

    return step


class Peer(nn.Module):
    """Linear, LeakyReLU, a layer, dropout, a layer, Linear: the official arrangement around torch-geometric's layers.

    Args:
        layers: one (applied twice) or two. typed: whether they are called with the edges' types.
    """

    def __init__(self, hidden: int, layers: list[nn.Module], typed: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(data.FEATURES, hidden), nn.Linear(hidden, 2)
        self.layers, self.typed = nn.ModuleList(layers), typed

    def forward(self, x: Tensor, edges: Tensor, types: Tensor) -> Tensor:
        rest = (edges, types) if self.typed else (edges,)
        x = self.layers[0](F.leaky_relu(self.into(x)), *rest)
        return self.out(self.layers[-1](F.dropout(x, 0.3, self.training), *rest))


class PeerRGT(nn.Module):
    """A TransformerConv for each relation, gated, and semantic attention head by head."""

    def __init__(self, hidden: int, relations: int) -> None:
        super().__init__()
        from torch_geometric.nn import TransformerConv

        self.convs = nn.ModuleList(
            TransformerConv(hidden, hidden, heads=4, concat=False, dropout=0.5) for _ in range(relations)
        )
        self.gate = nn.Linear(2 * hidden, hidden)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 128), nn.Tanh(), nn.Linear(128, 1, bias=False)) for _ in range(4)
        )

    def forward(self, x: Tensor, edges: Tensor, types: Tensor) -> Tensor:
        found = []
        for relation, conv in enumerate(self.convs):
            u = conv(x, edges[:, types == relation])
            gate = torch.sigmoid(self.gate(torch.cat([u, x], dim=1)))
            found.append(torch.tanh(u) * gate + x * (1 - gate))
        z = torch.stack(found, dim=1)
        return sum((head(z).mean(0).softmax(0) * z).sum(1) for head in self.heads) / len(self.heads)


class PeerHGT(nn.Module):
    """HGTConv with one type of node, called with edges and types."""

    def __init__(self, hidden: int, relations: int) -> None:
        super().__init__()
        from torch_geometric.nn import HGTConv

        self.kinds = [("user", str(relation), "user") for relation in range(relations)]
        self.conv = HGTConv(hidden, hidden, (["user"], self.kinds))

    def forward(self, x: Tensor, edges: Tensor, types: Tensor) -> Tensor:
        by_kind = {kind: edges[:, types == i] for i, kind in enumerate(self.kinds)}
        return self.conv({"user": x}, by_kind)["user"]


def peers(hidden: int) -> dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]]:
    """Name -> our network and the peer, made for a number of relations."""
    from torch_geometric.nn import GATConv, GCNConv, RGCNConv, SAGEConv

    def ours(kind: Any, **options: Any) -> Callable[[int], nn.Module]:
        return lambda relations: kind(data.FEATURES, hidden, 2, relations, **options)

    h = hidden
    return {
        "GCN": (ours(model.GCN), lambda r: Peer(h, [GCNConv(h, h), GCNConv(h, h)], False)),
        "GraphSAGE": (ours(model.SAGE), lambda r: Peer(h, [SAGEConv(h, h), SAGEConv(h, h)], False)),
        "GAT": (ours(model.GAT), lambda r: Peer(h, [GATConv(h, h // 8, heads=8), GATConv(h, h)], False)),
        "RGCN": (ours(model.RGCN), lambda r: Peer(h, [RGCNConv(h, h, r)], True)),
        "HGT": (ours(model.HGT, linear=h, out=32, same_layer=True), lambda r: Peer(h, [PeerHGT(h, r)], True)),
        "RGT": (ours(model.RGT, out=32), lambda r: Peer(h, [PeerRGT(h, r)], True)),
    }


# Seconds of a step of the official code with two threads on the machine this was developed on.
OFFICIAL = {
    "small, 2 relations": {
        "GCN": 0.026,
        "GAT": 0.039,
        "GraphSAGE": 0.019,
        "RGCN": 0.019,
        "BotRGCN": 0.021,
        "S-HGN": 0.335,
        "RGT": 0.392,
        "HGT": 0.054,
    },
    "small, 7 relations": {
        "GCN": 0.039,
        "GAT": 0.071,
        "GraphSAGE": 0.030,
        "RGCN": 0.034,
        "BotRGCN": 0.035,
        "S-HGN": 0.918,
        "HGT": 0.231,
    },
    "published, 2 relations": {"GCN": 2.09, "RGCN": 1.37},
}


def networks(hidden: int) -> dict[str, Callable[[int], nn.Module]]:
    """The networks of ``OFFICIAL`` with the widths they were measured with."""
    sizes: dict[str, tuple[Any, dict[str, Any]]] = {
        "GCN": (model.GCN, {}),
        "GAT": (model.GAT, {}),
        "GraphSAGE": (model.SAGE, {}),
        "RGCN": (model.RGCN, {}),
        "BotRGCN": (model.BotRGCN, {}),
        "S-HGN": (model.SHGN, {"linear": hidden, "out": 32}),
        "RGT": (model.RGT, {"out": 32}),
        "HGT": (model.HGT, {"linear": hidden, "out": 32}),
    }

    def maker(kind: Any, options: dict[str, Any]) -> Callable[[int], nn.Module]:
        return lambda relations: kind(data.FEATURES, hidden, 2, relations, dropout=0.3, **options)

    return {name: maker(kind, options) for name, (kind, options) in sizes.items()}


def workloads() -> Iterator[Workload]:
    """Ours beside the official code's measured seconds, and beside torch-geometric's layers."""
    for size, seconds in OFFICIAL.items():
        hidden = 64 if size.startswith("small") else 256
        for name, official in seconds.items():
            make = networks(hidden)[name]
            yield Workload(
                f"{name}, {size}, {hidden} hidden: train step",
                lambda size=size, make=make: epoch(size, make, False, False),
                other_name="official code, measured apart",
                other_seconds=official,
                target=2.0,
            )
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        return
    cases = [(size, name) for size in ("small, 2 relations", "small, 7 relations") for name in peers(64)]
    cases += [("published, 2 relations", name) for name in ("GCN", "RGCN")] + [("published, 7 relations", "RGCN")]
    for size, name in cases:
        hidden = 64 if size.startswith("small") else 256
        ours, peer = peers(hidden)[name]
        yield Workload(
            f"{name}, {size}, {hidden} hidden: epoch",
            lambda size=size, make=ours: epoch(size, make, False, True),
            lambda size=size, make=peer: epoch(size, make, True, True),
            "the official arrangement of torch-geometric's layers",
            target=2.0,
        )
