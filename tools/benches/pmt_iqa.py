"""PMT-IQA: the multi-scale module, training steps, patches and scores beside the official way or a peer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from papers.pmt_iqa import data, model
from tools.bench import Workload

CHANNELS = model.TRUNKS["resnet50"].channels


# ---- the official way


def convolve_first(module: model.MultiScale, maps: list[Tensor]) -> Tensor:
    """The descriptor as the released network computes it: convolutions before averages, the first one three times."""

    def reduced(i: int) -> Tensor:
        return F.avg_pool2d(module.reduce[i](maps[i]), 7).flatten(1)

    unused = [reduced(0), reduced(0)]
    parts = [reduced(0), reduced(1), reduced(2), F.avg_pool2d(maps[3], 7).flatten(1)]
    del unused
    return torch.cat([linear(part) for linear, part in zip(module.project, parts, strict=True)], 1)


def official_forward(net: model.PMTIQA, x: Tensor) -> model.Prediction:
    """The released forward pass with the weights of ``net``."""
    return net.heads(convolve_first(net.scales, net.trunk(x)))


# ---- workloads


def first_stage(form: str) -> Callable[[], Any]:
    """Reduction and averages of the first stage, twelve patches, forward."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(256, 16, 1, bias=False)
    x = torch.randn(12, 256, 56, 56).requires_grad_()
    if form == "ours":
        return lambda: conv(model.pool_to(x, 8))
    return lambda: [F.avg_pool2d(conv(x), 7) for _ in range(3)]


def descriptor(form: str) -> Callable[[], Any]:
    """The whole multi-scale module, twelve patches, both passes, gradient of the stages included."""
    torch.manual_seed(0)
    module = model.MultiScale(CHANNELS)
    maps = [torch.randn(12, c, s, s).requires_grad_() for c, s in zip(CHANNELS, (56, 28, 14, 7), strict=True)]

    def step() -> None:
        for leaf in (*maps, *module.parameters()):
            leaf.grad = None
        (module(maps) if form == "ours" else convolve_first(module, maps)).sum().backward()

    return step


def training(form: str) -> Callable[[], Any]:
    """One optimiser step of the whole network on four patches of 224 pixels."""
    torch.manual_seed(0)
    ours = form == "ours"
    net = model.PMTIQA(CHANNELS, model.make_trunk("resnet50"))
    x, score, level = torch.randn(4, 3, 224, 224), torch.rand(4), torch.tensor([0, 3, 6, 9])
    if ours:
        net = net.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, weight_decay=5e-4, fused=ours)
    log: list[float] = []

    def step() -> None:
        optimizer.zero_grad()
        out = net(x) if ours else official_forward(net, x)
        loss = model.multitask_loss(out, score, level, (0.5, 0.5))
        if not ours:
            log.extend([*out.score.tolist(), *out.level.flatten().tolist(), loss.item()])
        loss.backward()
        optimizer.step()

    return step


def frozen_training(form: str) -> Callable[[], Any]:
    """One optimiser step of the default run: 16 images with two patches, trunk frozen."""
    torch.manual_seed(0)
    spec = model.TRUNKS["efficientnet_lite0"]
    trunk = model.make_trunk("efficientnet_lite0").eval().requires_grad_(False)
    patches = data.normalise(torch.randint(256, (32, 3, 128, 128), dtype=torch.uint8), spec.mean, spec.std)
    with torch.no_grad():
        stages = model.pool_stages(trunk(patches))
    net = model.PMTIQA(spec.channels, None if form == "ours" else trunk)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3, fused=form == "ours")
    score, level = torch.rand(32), torch.randint(10, (32,))

    def step() -> None:
        optimizer.zero_grad()
        model.multitask_loss(net(stages if form == "ours" else patches), score, level, (0.5, 0.5)).backward()
        optimizer.step()

    return step


@functools.cache
def pictures() -> data.ImageSet:
    """Twelve PNG files of 512 x 384, the size of CSIQ and LIVE."""
    folder = Path(mkdtemp())
    photograph = data.packaged_photographs(1)["skimage/data/astronaut.png"].resize((512, 384))
    rng = np.random.default_rng(0)
    paths = []
    for i in range(12):
        path = folder / f"{i}.png"
        data.distort(photograph, "noise", 4 + i, rng).save(path)
        paths.append(path)
    return data.ImageSet.make("csiq", paths, np.arange(12) / 12, list(range(12)), folder)


def reading(form: str) -> Callable[[], Any]:
    """A batch of twelve images with four patches each, ready for the network."""
    images, spec = pictures(), model.TRUNKS["resnet50"]
    index = torch.arange(12)
    if form == "ours":
        reader = data.PatchReader(images, 224, 4, True, 0, workers=2)
        return lambda: data.normalise(reader(index, 0), spec.mean, spec.std)
    from PIL import Image
    from torchvision import transforms as T

    each = [T.RandomHorizontalFlip(), T.RandomCrop(224), T.ToTensor(), T.Normalize(spec.mean, spec.std)]
    transform = T.Compose(each)
    return lambda: torch.stack([transform(Image.open(path).convert("RGB")) for path in images.images for _ in range(4)])


def similarity(form: str) -> Callable[[], Any]:
    """SSIM of 25 pairs of 192 x 192."""
    x = 255 * torch.rand(25, 192, 192, generator=torch.Generator().manual_seed(0))
    y = (x + 20 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    if form == "ours":
        return lambda: data.ssim_parts(x, y)
    from skimage.metrics import structural_similarity

    kind = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = list(zip(x.numpy(), y.numpy(), strict=True))
    return lambda: [structural_similarity(a, b, **kind) for a, b in pairs]


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    yield Workload(
        "first stage to 16 x 8 x 8, 12 patches, forward",
        bind(first_stage, "ours"),
        bind(first_stage, "official"),
        "convolution before the average, three times, as the official network",
        target=2.0,
    )
    yield Workload(
        "multi-scale module, 12 patches of 224, both passes",
        bind(descriptor, "ours"),
        bind(descriptor, "official"),
        "convolutions before averages, as the official network",
        target=1.5,
    )
    yield Workload(
        "training step, ResNet-50, 4 patches of 224",
        bind(training, "ours"),
        bind(training, "official"),
        "the official step (NCHW, looped Adam, predictions as lists)",
        target=1.3,
    )
    yield Workload(
        "training step, frozen trunk, 32 patches of 128",
        bind(frozen_training, "ours"),
        bind(frozen_training, "each step"),
        "the trunk in every step",
        target=2.0,
    )
    yield Workload(
        "12 images of 512 x 384 with four patches of 224",
        bind(reading, "ours"),
        bind(reading, "official"),
        "an image decoded for each patch, as the official loaders",
        target=2.0,
    )
    yield Workload(
        "SSIM of 25 pairs of 192 x 192",
        bind(similarity, "ours"),
        bind(similarity, "skimage"),
        "scikit-image structural_similarity",
    )
