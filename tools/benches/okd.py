"""OKD: training steps and their parts beside the straightforward forms, with equal networks and sizes.

The straightforward step runs the teacher on x and on x~ separately, makes and mixes one-hot labels that nothing reads,
and reads every loss back; its jigsaw goes image by image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.okd import model, networks
from tools.bench import Workload


def sgd(parameters: Any, fused: bool = True) -> torch.optim.Optimizer:
    """The paper's optimiser."""
    return torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=5e-4, fused=fused)


def plain_mix(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """CutMix and MixUp fused, labels and all."""
    hot = torch.zeros(len(y), classes).scatter_(1, y[:, None], 1)
    order, share = torch.randperm(len(x)), torch.distributions.Beta(1.0, 1.0).sample((len(x), 1, 1, 1))
    mixed = x * share + x[order] * (1 - share)
    hot = hot * share.view(-1, 1) + hot[order] * (1 - share.view(-1, 1))
    cut = model.cutmix(x)
    share = torch.distributions.Beta(1.0, 1.0).sample((len(x), 1, 1, 1))
    return mixed * share + cut * (1 - share)


def training(
    student: str, teacher: str, shape: tuple[int, ...], classes: int, kind: str, form: str
) -> Callable[[], Any]:
    """One step; ``cached``: the teacher's logits of x are known."""
    torch.manual_seed(0)
    net, large = networks.build(student, classes, shape[1]), networks.build(teacher, classes, shape[1]).eval()
    large.requires_grad_(False)
    x, y = torch.randn(shape), torch.arange(shape[0]) % classes
    if form != "plain":
        cached = large(x) if form == "cached" else None
        algorithm = model.OKD(net, sgd, teacher=large, generator=model.Generator(kind), cached=cached)
        batch = model.Minibatch(x, y, torch.arange(len(y)))
        return lambda: algorithm.update([batch])
    optimizer = sgd(net.parameters(), False)

    def distil(s: Tensor, t: Tensor) -> Tensor:
        p, q = (F.softmax(z / 4, 1) for z in (t, s))
        return 16 * (p * (p.log() - q.log())).sum(1).mean()

    def step() -> float:
        shifted = plain_mix(x, y, classes) if kind == "fusion" else x + 0.15 * torch.randn(x.shape)
        logits = net(x)
        with torch.no_grad():
            taught = large(x)
        ce, d = F.cross_entropy(logits, y), distil(logits, taught)
        logits = net(shifted)
        with torch.no_grad():
            taught = large(shifted)
        ood = distil(logits, taught)
        loss = 0.1 * ce + 0.9 * d + 0.9 * ood
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return ce.item() + d.item() + ood.item()

    return step


def tiles(form: str) -> Callable[[], Any]:
    """Jigsaw of 32 images."""
    x = torch.randn(32, 3, 96, 96)
    if form == "ours":
        return lambda: model.jigsaw(x)

    def looped() -> Tensor:
        out = []
        for image in x:
            order = torch.randperm(4)
            while bool((order == torch.arange(4)).all()):
                order = torch.randperm(4)
            parts = [part for row in image.split(48, 1) for part in row.split(48, 2)]
            a, b, c, d = (parts[int(i)] for i in order)
            out.append(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1))
        return torch.stack(out)

    return looped


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    small, large = (32, 1, 16, 16), (32, 3, 96, 96)
    for kind in ("fusion", "noise"):
        sizes: Any = ("small_student", "small_teacher", small, 10, kind)
        yield Workload(
            f"OKD {kind}, small convolutional networks, 32 x 1 x 16 x 16, known logits of x",
            bind(training, *sizes, "cached"),
            bind(training, *sizes, "plain"),
            "teacher twice, labels mixed",
            target=1.5,
        )
    sizes = ("mobilenet_v3_small", "resnet50", large, 7, "fusion")
    yield Workload(
        "OKD fusion, MobileNetV3-Small and ResNet-50, 32 x 3 x 96 x 96",
        bind(training, *sizes, "ours"),
        bind(training, *sizes, "plain"),
        "teacher twice, labels mixed",
        target=1.0,
    )
    yield Workload("jigsaw, 32 x 3 x 96 x 96", bind(tiles, "ours"), bind(tiles, "looped"), "image by image", target=2.0)
