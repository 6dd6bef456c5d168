"""Worst-group scaling: a ladder as one stack beside a loop over its networks, metrics and composites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from papers.worst_group_scaling import data, model
from tools.bench import Workload

WIDTHS = (8, 16, 32, 64, 128, 256, 512)
COUNTS = torch.tensor([855, 45, 45, 855])


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """64 images of 3 x 14 x 14, labels and groups."""
    torch.manual_seed(0)
    return torch.rand(64, 3, 14, 14), torch.arange(64) % 2, torch.arange(64) % 4


def alone(networks: list[nn.Module]) -> Callable[[], Any]:
    """One step of each network, one after the other, as scripts do that train one model a run."""
    x, y, _ = batch()
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in networks]

    def step() -> None:
        for net, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    return step


def stacked(network: nn.Module) -> Callable[[], Any]:
    """One step of all networks of a stack."""
    minibatch = model.Minibatch(*batch())
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    erm = model.ERM(network, optimizer, COUNTS)
    return lambda: erm.update([minibatch])


def perceptron(width: int, depth: int = 1) -> nn.Module:
    """An ordinary perceptron."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(588, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def accuracies(form: str) -> Callable[[], Any]:
    """Accuracy of seven networks in each of six groups of 60,000 samples."""
    torch.manual_seed(0)
    guess, y, group = torch.randint(3, (7, 60000)), torch.randint(3, (60000,)), torch.randint(6, (60000,))
    if form == "ours":
        return lambda: model.group_accuracy(guess, y, group, 6)

    def plain() -> list[list[float]]:
        return [
            [float((row[group == g] == y[group == g]).double().mean()) for g in range(6)] for row in guess
        ]  # fmt: skip

    return plain


def dro(form: str) -> Callable[[], Any]:
    """Group DRO's losses of seven networks, four groups, 128 samples."""
    losses, group = torch.rand(7, 128), torch.arange(128) % 4
    if form == "ours":
        return lambda: model.group_means(losses, group, 4)
    return lambda: [[row[group == g].mean() for g in range(4)] for row in losses]


def composites(form: str) -> Callable[[], Any]:
    """2,000 digits on patches of photographs."""
    masks, background = torch.rand(2000, 28, 28), torch.arange(2000) % 2
    pictures = torch.rand(2, 3, 427, 640)
    if form == "ours":
        return lambda: data.composite(masks, background, pictures, torch.Generator().manual_seed(0))

    def plain() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        out = []
        for mask, number in zip(masks, background, strict=True):
            top = int(torch.randint(400, (1,), generator=generator))
            left = int(torch.randint(613, (1,), generator=generator))
            patch = pictures[number, :, top : top + 28, left : left + 28]
            out.append(patch * (1 - mask) + 0.5 * mask)
        return torch.stack(out)

    return plain


def workloads() -> Iterator[Workload]:
    """The comparisons."""
    yield Workload(
        "ERM step of seven perceptrons, widths 8 to 512",
        lambda: stacked(model.WidthLadder(588, WIDTHS, 2)),
        lambda: alone([perceptron(width) for width in WIDTHS]),
        "a loop over the networks",
    )
    yield Workload(
        "ERM step of 21 perceptrons, widths 8 to 64",
        lambda: stacked(model.WidthLadder(588, [8, 16, 64] * 7, 2)),
        lambda: alone([perceptron(width) for width in (8, 16, 64) * 7]),
        "a loop over the networks",
        target=2,
    )
    yield Workload(
        "ERM step of perceptrons with 1 to 4 hidden layers of 64",
        lambda: stacked(model.DepthLadder(588, (1, 2, 3, 4), 64, 2)),
        lambda: alone([perceptron(64, depth) for depth in (1, 2, 3, 4)]),
        "a loop over the networks",
        target=2,
    )
    for name, make, other in (
        ("group accuracies, 7 networks, 6 groups, 60,000 samples", accuracies, "a mask for each group and network"),
        ("group DRO's group losses, 7 networks, 128 samples", dro, "a mask for each group and network"),
        ("2,000 digits on photographs", composites, "a loop over the images"),
    ):
        yield Workload(name, lambda make=make: make("ours"), lambda make=make: make("other"), other, target=2)
