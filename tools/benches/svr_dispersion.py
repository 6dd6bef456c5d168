"""Dispersion score: networks, distances and clustering beside the straightforward forms (same weights, same values)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.svr_dispersion import data, model
from tools.bench import Workload

# ---- the straightforward forms, as in the official code


def plain_atlasnet(net: model.AtlasNet, code: Tensor) -> Tensor:
    """The code added to the first layer's output for every point, then batch normalisation of the sum."""
    convolve = nn.Conv1d.forward  # the general convolution, not the model's product of matrices
    x = convolve(net.conv1, net.sample()) + code.unsqueeze(2)
    x = F.relu(nn.BatchNorm1d.forward(net.bn1, x))
    x = F.relu(net.bn2(convolve(net.conv2, x)))
    for conv, norm in zip(net.conv_list, net.bn_list, strict=True):
        assert isinstance(conv, nn.Conv1d)
        x = F.relu(norm(convolve(conv, x)))
    return convolve(net.last_conv, x).transpose(1, 2)


def plain_foldnet(net: model.FoldNet, code: Tensor) -> Tensor:
    """The code copied to every point and concatenated, for both folds."""
    copies = code.unsqueeze(2).repeat(1, 1, net.grid.shape[2])
    x = net.grid.expand(len(code), -1, -1)
    for fold in (net.folding1, net.folding2):
        norm = fold[1]
        assert isinstance(norm, nn.BatchNorm1d)
        x = F.relu(nn.BatchNorm1d.forward(norm, fold[0](torch.cat([copies, x], 1))))
        x = fold[6](F.relu(fold[4](fold[3](x))))
    return x.transpose(1, 2)


def plain_distances(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """All pairs in float64, minima and their positions in separate passes, the full matrix kept for the gradient."""
    x, y = x.double(), y.double()
    products = torch.bmm(x, y.transpose(1, 2))
    squared = (x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)) - 2 * products
    return (
        torch.min(squared, 2)[0].float(),
        torch.min(squared, 1)[0].float(),
        torch.min(squared, 2)[1].int(),
        torch.min(squared, 1)[1].int(),
    )


def plain_chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer distance a pair of clouds."""
    from_x, from_y, _, _ = plain_distances(x, y)
    return from_x.mean(1) + from_y.mean(1)


def plain_matrix(clouds: Tensor, batch: int = 32) -> Tensor:
    """A loop over rows; the row's cloud is copied for every batch of others."""
    n = len(clouds)
    out = torch.zeros(n, n)
    with torch.no_grad():
        for i in range(n):
            for begin in range(i + 1, n, batch):
                others = clouds[begin : begin + batch]
                losses = plain_chamfer(clouds[[i]].expand(len(others), -1, -1).contiguous(), others)
                out[i, begin : begin + batch] = losses
                out[begin : begin + batch, i] = losses
    return out


def plain_k_medoids(distance: np.ndarray, k: int, seed: int = 0) -> float:
    """A loop over clusters for every update, a sub-matrix gathered for each; the library's checks of its input."""
    finite = [np.isfinite(distance.sum()) for _ in range(3)]  # fit, pairwise_distances and transform look again
    if not all(finite) or distance.min() < 0:
        raise ValueError("expected finite distances of at least 0")
    random = np.random.RandomState(seed)
    trials = 2 + int(np.log(k))
    medoids = np.empty(k, dtype=int)
    medoids[0] = random.randint(len(distance))
    nearest = distance[medoids[0], :] ** 2
    total = nearest.sum()
    for i in range(1, k):
        draws = np.searchsorted(np.cumsum(nearest), random.random_sample(trials) * total)
        squared = distance[draws.clip(None, len(distance) - 1), :] ** 2
        best_total = None
        for trial in range(trials):
            closer = np.minimum(nearest, squared[trial])
            if best_total is None or closer.sum() < best_total:
                best, best_total, best_nearest = draws[trial], closer.sum(), closer
        medoids[i], total, nearest = best, best_total, best_nearest
    for _ in range(300):
        before = medoids.copy()
        labels = np.argmin(distance[medoids, :], axis=0)
        for cluster in range(k):
            members = np.where(labels == cluster)[0]
            if len(members) == 0:
                continue
            costs = np.sum(distance[members, members[:, np.newaxis]], axis=1)
            if costs.min() < costs[np.argmax(members == medoids[cluster])]:
                medoids[cluster] = members[np.argmin(costs)]
        if np.all(before == medoids):
            break
    return float(distance[medoids].min(0).sum())


# ---- workloads


@functools.cache
def clouds(count: int, points: int) -> Tensor:
    """Generated shapes between a sphere and a cube."""
    return data.sphere_cube_clouds(torch.linspace(0, 1, count), points, torch.Generator().manual_seed(0))


def both_passes(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], Any]:
    """Forward and backward of a scalar."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return step


def full_step(form: str) -> Callable[[], Any]:
    """AtlasNet-sphere at the paper's size: 8 images of 224 pixels, 2,500 points, loss, Adam."""
    torch.manual_seed(0)
    net = model.build("atlasnet-sphere")
    decoder = net.decoder
    assert isinstance(decoder, model.AtlasNet)
    if form == "plain":
        from torchvision.models import resnet18

        net.encoder = resnet18(num_classes=model.CODE)
    images, truth = torch.rand(8, 3, 224, 224), clouds(8, 2500)
    optimizer = torch.optim.Adam(net.parameters(), 1e-5, fused=form == "ours")

    def step() -> None:
        optimizer.zero_grad()
        if form == "ours":
            loss = model.chamfer(truth, net(images)).mean()
        else:
            loss = plain_chamfer(truth, plain_atlasnet(decoder, net.encoder(images))).mean()
        loss.backward()
        optimizer.step()

    return step


def small_step(form: str) -> Callable[[], Any]:
    """A small decoder alone: codes (8, 128), hidden 128, 400 points, loss, Adam."""
    torch.manual_seed(0)
    net = model.AtlasNet(128, 128, points=400)
    codes, truth = torch.randn(8, 128), clouds(8, 400)
    optimizer = torch.optim.Adam(net.parameters(), 1e-5, fused=form == "ours")

    def step() -> None:
        optimizer.zero_grad()
        if form == "ours":
            loss = model.chamfer(truth, net(codes)).mean()
        else:
            loss = plain_chamfer(truth, plain_atlasnet(net, codes)).mean()
        loss.backward()
        optimizer.step()

    return step


def decoding(make: Callable[[], nn.Module], form: Callable[..., Tensor] | None) -> Callable[[], Any]:
    """Forward and backward of a decoder for 8 codes."""
    torch.manual_seed(0)
    net = make()
    codes = torch.randn(8, model.CODE).requires_grad_()
    run = net if form is None else functools.partial(form, net)
    return both_passes(lambda: run(codes).square().mean(), codes)


def loss(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    """Chamfer distance of 8 x 2,500 and 2,500 points."""
    truth = clouds(8, 2500)
    output = (
        truth.flip(0) + 0.05 * torch.randn(8, 2500, 3, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    return both_passes(lambda: form(truth, output).mean(), output)


def clustering(form: Callable[[np.ndarray, int], Any], k: int) -> Callable[[], Any]:
    """K-medoids of 2,000 items."""
    points = np.random.default_rng(0).normal(size=(2000, 3))
    distance = np.square(points[:, None] - points).sum(-1)
    return lambda: form(distance, k)


def demo(form: Callable[[np.ndarray, int], Any]) -> Callable[[], Any]:
    """All 400 scores of the authors' 2-D demo."""
    blobs = [data.generate_blobs(spread) for spread in data.DEMO_SPREADS]
    matrices = [np.square(points[:, None] - points).sum(-1) for points in blobs]
    return lambda: [form(distance, k) for distance in matrices for k in data.DEMO_CLUSTERS]


def fasterpam(distance: np.ndarray, k: int) -> Any:
    """The ``kmedoids`` package's default algorithm: better optima at another cost."""
    import kmedoids

    return kmedoids.fasterpam(distance, k, random_state=0)


def workloads() -> Iterator[Workload]:
    """What tools/bench.py times."""
    bind = functools.partial
    official = "straightforward form, as the official code"
    yield Workload(
        "training step, AtlasNet-sphere at the paper's size, 8 images, 2,500 points",
        bind(full_step, "ours"),
        bind(full_step, "plain"),
        official,
        target=2.0,
    )
    yield Workload(
        "AtlasNet decoder, 8 x 2,500 points, both passes",
        bind(decoding, model.AtlasNet, None),
        bind(decoding, model.AtlasNet, plain_atlasnet),
        official,
        target=1.2,
    )
    yield Workload(
        "FoldNet decoder, 8 x 2,500 points, both passes",
        bind(decoding, model.FoldNet, None),
        bind(decoding, model.FoldNet, plain_foldnet),
        official,
        target=1.5,
    )
    yield Workload(
        "Chamfer, 8 x 2,500 x 2,500 points, both passes",
        bind(loss, model.chamfer),
        bind(loss, plain_chamfer),
        official,
        target=2.0,
    )
    yield Workload(
        "training step, decoder alone: codes of 128, 8 x 400 points",
        bind(small_step, "ours"),
        bind(small_step, "plain"),
        official,
        target=2.0,
    )
    yield Workload(
        "distance matrix, 40 clouds of 400 points",
        lambda: bind(model.chamfer_matrix, clouds(40, 400)),
        lambda: bind(plain_matrix, clouds(40, 400)),
        official,
        target=2.0,
    )
    yield Workload(
        "distance matrix, 100 clouds of 1,000 points (a hundredth of the pairs of 1,000 clouds)",
        lambda: bind(model.chamfer_matrix, clouds(100, 1000)),
        None,
        "two minutes for all of 1,000 clouds",
        other_seconds=1.2,
        target=1.0,
    )
    yield Workload(
        "distance matrix (intersection over union), 250 grids of 32^3 (a sixteenth of the pairs of 1,000 grids)",
        lambda: bind(
            model.iou_distances, torch.rand(250, 32, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.1
        ),
        None,
        "two minutes for all of 1,000 grids",
        other_seconds=7.5,
        target=1.0,
    )
    for k in (2, 20, 500):
        yield Workload(
            f"k-medoids, 2,000 items, {k} clusters",
            bind(clustering, model.k_medoids, k),
            bind(clustering, plain_k_medoids, k),
            "loops over clusters, as scikit-learn-extra",
            target=1.0,
        )
    yield Workload(
        "k-medoids, 2,000 items, 20 clusters, beside a package",
        bind(clustering, model.k_medoids, 20),
        bind(clustering, fasterpam, 20),
        "kmedoids.fasterpam",
    )
    yield Workload(
        "all 400 scores of the 2-D demo",
        bind(demo, model.k_medoids),
        bind(demo, plain_k_medoids),
        "loops over clusters, as scikit-learn-extra",
        target=2.0,
    )
