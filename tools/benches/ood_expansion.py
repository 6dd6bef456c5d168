"""Expansion of features: density estimates beside the released way of doing it, and the vectorised penalties.

The straightforward form has the released estimator's order of work: cells of equal size in one tensor, ten grid points
at a time, full tables of pairs of domains and of classes. It gives the same variation and informativeness.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from papers.ood_expansion import model
from tools.bench import Workload


def cells(domains: int, classes: int, n: int, d: int) -> Tensor:
    """(E, K, n, d) normal features that shift by 0.1 a domain and 0.3 a class."""
    x = torch.randn(domains, classes, n, d, generator=torch.Generator().manual_seed(0))
    return x + 0.1 * torch.arange(domains).view(-1, 1, 1, 1) + 0.3 * torch.arange(classes).view(1, -1, 1, 1)


def by_chunks(x: Tensor, points: int, train: int) -> tuple[Tensor, Tensor, Tensor]:
    """V over the first ``train`` domains, V over all, and I, ten grid points at a time."""
    e, k, n, d = x.shape
    x = x / x.std(2).mean()
    width = 1.06 * n**-0.2 * float(x.std(2).mean())
    low, high = float(x.min()), float(x.max())
    grid, step = torch.linspace(low, high, points), (high - low) / points
    across, between = torch.zeros(e, e, k, d), torch.zeros(e, k, k, d)
    for chunk in grid.split(10):
        distance = (x.unsqueeze(-1) - chunk) / width  # (E, K, n, d, 10)
        p = torch.pow(math.e, -0.5 * distance**2).sum(2) / (n * width * math.sqrt(2 * math.pi))
        across += (p[:, None] - p[None]).abs().sum(-1)
        between += (p[:, :, None] - p[:, None]).abs().sum(-1)
    across, between = across * step / 2, between * step / 2
    upper = torch.triu_indices(k, k, 1)
    informative = between[:train].amin(0)[upper[0], upper[1]].mean(0)
    return across[:train, :train].amax((0, 1, 2)), across.amax((0, 1, 2)), informative


def examine(x: Tensor, points: int, method: str) -> Callable[[], model.Features]:
    """Ours on the same cells."""
    e, k, n, d = x.shape
    domain = torch.arange(e).repeat_interleave(k * n)
    label = torch.arange(k).repeat_interleave(n).repeat(e)
    flat = x.reshape(-1, d)
    return lambda: model.examine(flat, domain, label, e, k, range(e - 1), points, method=method, official_padding=True)


def agreeing(x: Tensor, points: int, method: str) -> Callable[[], Any]:
    """Ours, after its numbers were seen to be those of the straightforward form."""
    run = examine(x, points, method)
    for ours, theirs in zip(vars(run()).values(), by_chunks(x, points, len(x) - 1)):
        assert torch.allclose(ours, theirs, atol=2e-3), float((ours - theirs).abs().max())
    return run


def step(name: str, plain: bool, **setting: float) -> Callable[[], Any]:
    """A training step on three domains of 32 coloured digits' size."""
    torch.manual_seed(0)
    kinds = {"mmd": PlainMMD, "irm": PlainIRM}
    kind = kinds[name] if plain else model.ALGORITHMS[name]
    algorithm = kind(model.MLP(588), 10, 3, 1e-3, **setting)  # type: ignore[arg-type]
    batches = [(torch.randn(32, 3, 14, 14), torch.arange(32) % 10) for _ in range(3)]
    return lambda: algorithm.update(batches)


class PlainMMD(model.MMD):
    """A kernel table for each pair of domains and each width."""

    def distances(self, z: Any) -> Tensor:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            square = torch.cdist(a, b).square()
            return sum(torch.exp(-gamma * square) for gamma in self.GAMMAS)  # type: ignore[return-value]

        rows = [
            torch.stack([kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean() for b in z]) for a in z
        ]
        return torch.stack(rows)


class PlainIRM(model.IRM):
    """The penalty by differentiating twice."""

    def loss(self, minibatches: model.Batches) -> dict[str, Tensor]:
        _, logits = self.together(minibatches)
        ys = [y for _, y in minibatches]
        nll = torch.stack([torch.nn.functional.cross_entropy(z, y) for z, y in zip(logits, ys)]).mean()
        penalty = torch.zeros(())
        for z, y in zip(logits, ys):
            scale = torch.ones((), requires_grad=True)
            halves = [torch.nn.functional.cross_entropy(scale * z[i::2], y[i::2]) for i in (0, 1)]
            a, b = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
            penalty = penalty + a * b / len(ys)
        return {"loss": nll + self.penalty * penalty, "penalty": penalty}


def workloads() -> Iterator[Workload]:
    """Rows of the table."""
    chunks = "ten grid points at a time, all pairs"
    for sizes, points in (((4, 10, 120, 64), 400), ((4, 7, 100, 32), 2000)):
        for method in ("binned", "direct"):
            e, k, n, d = sizes
            yield Workload(
                f"variation and informativeness, {method}: E={e} K={k} n={n} d={d} G={points}",
                functools.partial(agreeing, cells(*sizes), points, method),
                lambda s=sizes, p=points: lambda: by_chunks(cells(*s), p, s[0] - 1),
                chunks,
                target=2.0,
            )
    yield Workload(
        "variation and informativeness, binned: E=4 K=7 n=100 d=512 G=10000",
        lambda: examine(cells(4, 7, 100, 512), 10_000, "binned"),
        lambda: lambda: by_chunks(cells(4, 7, 100, 16), 10_000, 3),
        f"{chunks}, a 32nd of the features",
        target=2.0,
    )
    for name, other, setting in (
        ("mmd", "a kernel table for each pair and width", {"gamma": 1.0}),
        ("irm", "penalty by differentiating twice", {"penalty": 1.0, "anneal": 0}),
    ):
        yield Workload(
            f"training step, {name}",
            functools.partial(step, name, False, **setting),
            functools.partial(step, name, True, **setting),
            other,
        )
