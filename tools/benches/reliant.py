"""RELIANT: one epoch of each part on Recidivism beside the official code's seconds, and beside the per-edge forms.

The real graph is read from $REPRO_DATA or ../shared/data; without it a random graph of the same size stands in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.reliant import data, model
from tools.bench import Workload

ROOT = Path(__file__).resolve().parents[2]
NODES, PAIRS, FEATURES = 18876, 311870, 18
Step = Callable[[], Any]


@cache
def recidivism() -> tuple[data.FairData, model.Graph]:
    """Recidivism, or a random graph with its counts."""
    folder = Path(os.environ.get("REPRO_DATA") or ROOT.parent / "shared" / "data") / "fair-graphs-bail-credit"
    if folder.is_dir():
        made = data.load(folder, "recidivism").banded()
        return made, model.Graph(made.pairs, NODES)
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(NODES, (2, 2 * PAIRS), generator=generator)
    low, high = ends.amin(0), ends.amax(0)
    key = torch.unique((low * NODES + high)[low < high])[:PAIRS]
    labels, sens = (torch.rand(2, NODES, generator=generator) < 0.4).long()
    split = {part: torch.from_numpy(index) for part, index in data.class_split(labels.numpy(), 0.3, 0.5).items()}
    pairs, features = torch.stack([key // NODES, key % NODES]), torch.rand(NODES, FEATURES, generator=generator)
    made = data.FairData("recidivism", pairs, features, labels, sens, **split, origin={}).banded()
    return made, model.Graph(made.pairs, NODES)


def adam(*modules: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of the paper's runs."""
    return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=0.01, weight_decay=5e-4, fused=True)


def teacher_epoch(make: Callable[[int], nn.Module], second: Any = None) -> Step:
    """Train step and evaluation of a teacher; ``second`` replaces the graph it is called with."""
    made, graph = recidivism()
    torch.manual_seed(0)
    network, second = make(FEATURES), graph if second is None else second
    optimizer = adam(network)

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        F.cross_entropy(network(made.features, second)[0][made.train], made.labels[made.train]).backward()
        optimizer.step()
        network.eval()
        with torch.no_grad():
            network(made.features, second)

    return step


class PeerGCN(nn.Module):
    """The GCN teacher with torch-geometric's GCNConv, normalisation cached."""

    def __init__(self, features: int) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        widths = ((features, 64), (64, 64), (64, 2))
        self.layers = nn.ModuleList(GCNConv(i, o, cached=True) for i, o in widths)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor]:
        h = self.layers[0](x, edges).relu()
        h = self.layers[1](F.dropout(h, 0.8, self.training), edges).relu()
        return (self.layers[2](F.dropout(h, 0.8, self.training), edges),)


class PerEdgePLP(model.PLP):
    """The same student edge by edge: attention, weights and messages are tensors of edges at every step."""

    def forward(self, x: Tensor, seeds: Any) -> Tensor:
        graph, train, labels = seeds
        row, col = graph.pattern.row, graph.pattern.col
        start = torch.full((len(x), 2), 0.5)
        start[train] = F.one_hot(labels[train], 2).float()
        h = start
        for _ in range(self.steps):
            energy = F.dropout(x, self.feat_drop, self.training) @ self.attention[0]
            score = energy[col]
            top = torch.full((len(x),), -torch.inf).scatter_reduce(0, row, score, "amax")
            weight = (score - top[row]).exp()
            weight = weight / torch.zeros(len(x)).index_add(0, row, weight)[row]
            weight = F.dropout(weight, self.attn_drop, self.training)
            spread = torch.zeros_like(h).index_add(0, row, weight[:, None] * h[col])
            f = self.hidden(F.dropout(x, self.feat_drop, self.training)).relu()
            f = self.out(F.dropout(f, self.feat_drop, self.training))
            h = (self.mix.sigmoid() * spread + (-self.mix).sigmoid() * f).relu().index_copy(0, train, start[train])
        return h


def cpf_epoch(per_edge: bool = False) -> Step:
    """Student step, proxy step and evaluation of RELIANT under CPF."""
    made, graph = recidivism()
    torch.manual_seed(0)
    student = (PerEdgePLP if per_edge else model.PLP)(FEATURES + 2, NODES)
    seeds = model.Seeds(graph, made.train, made.labels)
    second = (graph, made.train, made.labels) if per_edge else seeds
    proxy, unfair = model.Proxy(NODES), model.Unfairness(made.sens, seeds.free)
    target = torch.rand(NODES, 2).softmax(1)
    optimizer, proxy_optimizer = adam(student), adam(proxy)

    def step() -> None:
        student.train()
        logits = student(proxy.neutral(made.features), second)
        optimizer.zero_grad()
        (model.cpf_loss(logits, target, seeds.free) + 1e3 * unfair(logits)).backward()
        optimizer.step()
        with model.frozen(student):
            proxy_optimizer.zero_grad()
            (-1e3 * unfair(student(proxy.biased(made.features), second))).backward()
        proxy_optimizer.step()
        student.eval()
        with torch.no_grad():
            student(proxy.neutral(made.features), second)

    return step


def akd_epoch() -> Step:
    """Critics' step, student step, proxy step and evaluation of RELIANT under GraphAKD."""
    made, graph = recidivism()
    torch.manual_seed(0)
    student, critics, proxy = model.SGC(FEATURES + 2), model.Critics(), model.Proxy(NODES)
    known = (torch.randn(NODES, 2).log_softmax(1), torch.rand(NODES, 64))
    unfair = model.Unfairness(made.sens, made.train)
    everywhere = model.Unfairness(made.sens, torch.arange(NODES))
    optimizer, critic_optimizer, proxy_optimizer = adam(student), adam(critics), adam(proxy)

    def step() -> None:
        student.train()
        out = student(proxy.neutral(made.features), graph)
        critic_optimizer.zero_grad()
        critics.loss(known, out, graph, made.labels, made.train).backward()
        critic_optimizer.step()
        with model.frozen(critics):
            loss = critics.student_loss(known, out, graph, made.labels, made.train)
        optimizer.zero_grad()
        (loss + 10 * unfair(out[0])).backward()
        optimizer.step()
        with model.frozen(student):
            proxy_optimizer.zero_grad()
            (-10 * everywhere(student(proxy.biased(made.features), graph)[0])).backward()
        proxy_optimizer.step()
        student.eval()
        with torch.no_grad():
            student(proxy.neutral(made.features), graph)

    return step


def unfairness(sets: bool) -> Step:
    """The fairness term forward and backward; with ``sets`` the groups are found anew as Python sets."""
    made, graph = recidivism()
    free = model.Seeds(graph, made.train, made.labels).free
    logits = torch.randn(NODES, 2, requires_grad=True)
    term, sens = model.Unfairness(made.sens, free), made.sens.numpy()

    def ours() -> None:
        logits.grad = None
        term(logits).backward()

    def by_sets() -> None:
        logits.grad = None
        inside, phi = set(free.numpy()), model.soft_decision(logits.softmax(1))
        groups = (np.array(list(set(np.flatnonzero(sens == s)) & inside)) for s in (0, 1))
        first, second = (phi[group].mean(0) for group in groups)
        (first - second).square().sum().backward()

    return by_sets if sets else ours


def similarity(rows: int, blocks: bool) -> Step:
    """The graph of similar rows; without ``blocks`` node by node on the whole matrix of similarities."""
    from scipy.spatial import distance_matrix

    generator = np.random.default_rng(0)
    centres = generator.integers(0, 200, size=(rows // 20, FEATURES))  # twenty alike rows each, as in real tables
    x = (centres[np.arange(rows) % len(centres)] + generator.integers(0, 3, size=(rows, FEATURES))).astype(float)

    def node_by_node() -> Any:
        matrix = 1 / (1 + distance_matrix(x, x))
        found = []
        for i in range(rows):
            largest = np.sort(matrix[i])[-2]
            found += [(i, j) for j in np.where(matrix[i] > 0.6 * largest)[0] if j != i]
        return np.array(found)

    return (lambda: data.similar_pairs(x, 0.6)) if blocks else node_by_node


def workloads() -> Iterator[Workload]:
    """Our epochs beside the official code's measured seconds, and beside forms that work edge by edge."""
    # Seconds of the official code (DGL) on two threads of the machine this was developed on.
    official = "official code, measured apart"
    parts: list[tuple[str, Callable[[], Step], float]] = [
        ("GCN teacher", lambda: teacher_epoch(model.GCN), 0.047),
        ("GraphSAGE teacher", lambda: teacher_epoch(model.SAGE), 0.168),
        ("RELIANT under CPF", cpf_epoch, 0.69),
        ("RELIANT under GraphAKD", akd_epoch, 0.33),
    ]
    for title, ours, seconds in parts:
        yield Workload(f"Recidivism, {title}: epoch", ours, other_name=official, other_seconds=seconds, target=2.0)
    yield Workload(
        "Recidivism, RELIANT under CPF: epoch beside the per-edge form",
        cpf_epoch,
        lambda: cpf_epoch(per_edge=True),
        "softmax over edges",
        target=3.0,
    )
    yield Workload(
        "Recidivism, fairness term: forward and backward",
        lambda: unfairness(sets=False),
        lambda: unfairness(sets=True),
        "groups as Python sets",
        target=2.0,
    )
    yield Workload(
        "graph of similar rows, 3,000 rows",
        lambda: similarity(3000, blocks=True),
        lambda: similarity(3000, blocks=False),
        "node by node on the whole matrix",
        target=2.0,
    )
    try:
        import torch_geometric  # noqa: F401
    except ImportError:
        return
    yield Workload(
        "Recidivism, GCN teacher: epoch beside torch-geometric",
        lambda: teacher_epoch(model.GCN),
        lambda: teacher_epoch(PeerGCN, torch.cat([recidivism()[0].pairs, recidivism()[0].pairs.flip(0)], 1)),
        "torch-geometric",
        target=2.0,
    )
