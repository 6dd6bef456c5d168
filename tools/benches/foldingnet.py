"""FoldingNet: training steps and their parts beside the straightforward forms (same weights, same values)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papers.foldingnet import data, model
from tools.bench import Workload

SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "default: 16 x 256 points, codeword 128": (
        16,
        256,
        {"code": 128, "hidden": 128, "side": 16, "widths": (32, 32, 32, 64, 256)},
    ),
    "16 x 512 points, codeword 256": (
        16,
        512,
        {"code": 256, "hidden": 256, "side": 23, "widths": (64, 64, 64, 128, 512)},
    ),
    "paper: 4 x 2,048 points, codeword 512": (4, 2048, {}),
}


# ---- the straightforward forms


def padded_table(graph: model.Graph) -> Tensor:
    """Neighbours as a table (points, largest degree), -1 where there are fewer."""
    degree = graph.indptr.diff().long()
    row = torch.repeat_interleave(torch.arange(len(degree)), degree)
    column = torch.arange(len(graph.indices)) - graph.indptr[:-1].long()[row]
    table = torch.full((len(degree), int(degree.max())), -1)
    table[row, column] = graph.indices.long()
    return table


def padded_max(x: Tensor, table: Tensor) -> Tensor:
    """Graph max pooling over gathered rows."""
    gathered = x.reshape(-1, x.shape[-1])[table.clamp_min(0)]
    return gathered.masked_fill((table < 0).unsqueeze(-1), float("-inf")).amax(1).view_as(x)


def per_cloud_max(x: Tensor, table: Tensor) -> Tensor:
    """The same in a loop over clouds."""
    n = x.shape[1]
    out = []
    for i, cloud in enumerate(x):
        part = table[i * n : (i + 1) * n]
        near = cloud[(part - i * n).clamp_min(0)]
        out.append(near.masked_fill((part < 0).unsqueeze(-1), float("-inf")).amax(1))
    return torch.stack(out)


def tiled_fold(fold: model.Fold, base: Tensor, code: Tensor) -> Tensor:
    """A fold that tiles the codeword and concatenates."""
    b, m = len(code), base.shape[-2]
    x = torch.cat([base.expand(b, m, -1), code.unsqueeze(1).expand(b, m, -1)], -1)
    return fold.out(fold.hidden2(fold.hidden1(x).relu()).relu())


def cdist_chamfer(x: Tensor, y: Tensor) -> Tensor:
    """Chamfer with a gradient through the whole distance matrix."""
    d = (torch.cdist(x, y).square() + 1e-6).sqrt()
    return torch.maximum(d.amin(2).mean(1), d.amin(1).mean(1))


def plain(net: model.AutoEncoder, batch: model.Clouds, table: Tensor, pool: Callable[..., Tensor]) -> Tensor:
    """The auto-encoder, layer by layer as written in the paper."""
    e, d = net.encoder, net.decoder
    x = torch.cat([batch.points, batch.covariance], -1)
    for layer in (e.point1, e.point2, e.point3):
        x = layer(x).relu()
    x = pool(e.point4(pool(x, table)).relu(), table)
    code = e.code2(e.code1(e.point5(x).amax(1)).relu())
    return tiled_fold(d.fold2, tiled_fold(d.fold1, d.grid, code), code)


def official(cloud: np.ndarray) -> None:
    """Preparation of one cloud as the released script does it: a tree, then loops over points and neighbours."""
    from sklearn.neighbors import KDTree

    found = KDTree(cloud, leaf_size=30).query(cloud, k=17, return_distance=False)
    covariance, adjacent = np.zeros((len(cloud), 9)), {}
    for i, row in enumerate(found):
        covariance[i] = np.cov(cloud[row[1:]].T).reshape(-1)
        for j in row[1:]:
            adjacent[(i, int(j))] = adjacent[(int(j), i)] = 1


# ---- workloads


@functools.cache
def clouds(count: int, n: int) -> tuple[Tensor, model.Clouds, Tensor]:
    """Generated clouds, ready for the encoder, and their padded neighbour table."""
    points = data.generate_surfaces(-(-count // 16), n, torch.Generator().manual_seed(0)).points[:count]
    near = data.neighbours(points, 16)
    batch = model.Clouds(points, model.local_covariance(points, near), model.union_graph(near))
    return points, batch, padded_table(batch.graph)


def training(size: str, form: str) -> Callable[[], Any]:
    """One optimiser step."""
    b, n, sizes = SIZES[size]
    points, batch, table = clouds(b, n)
    torch.manual_seed(0)
    net = model.build("foldingnet", **sizes)
    optimizer = torch.optim.Adam(net.parameters(), 1e-5, fused=form == "ours")

    def step() -> None:
        optimizer.zero_grad()
        if form == "ours":
            loss = model.chamfer(points, net(*batch).points).mean()
        else:
            loss = cdist_chamfer(
                points, plain(net, batch, table, padded_max if form == "padded" else per_cloud_max)
            ).mean()
        loss.backward()
        optimizer.step()

    return step


def both_passes(loss: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Any]:
    """Forward and backward of a scalar."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return step


def pooling(form: str) -> Callable[[], Any]:
    """Graph max pooling of 16 x 512 points with 64 channels."""
    _, batch, table = clouds(16, 512)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 512, 64, generator=generator).relu_().requires_grad_()
    weight = torch.randn(16, 512, 64, generator=generator)
    if form == "ours":
        return both_passes(lambda: (model.neighbour_max(x, batch.graph) * weight).sum(), x)
    if form == "geometric":
        from torch_geometric.nn import MaxAggregation

        row = torch.repeat_interleave(torch.arange(16 * 512), batch.graph.indptr.diff().long())
        peer, near = MaxAggregation(), batch.graph.indices.long()
        flat = 16 * 512
        return both_passes(lambda: (peer(x.view(flat, 64)[near], row, dim_size=flat).view_as(x) * weight).sum(), x)
    pool = padded_max if form == "padded" else per_cloud_max
    return both_passes(lambda: (pool(x, table) * weight).sum(), x)


def distance(form: Callable[..., Tensor]) -> Callable[[], Any]:
    """Chamfer of 16 x 512 and 16 x 529 points."""
    points, _, _ = clouds(16, 512)
    y = (0.5 * torch.randn(16, 529, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    return both_passes(lambda: form(points, y).mean(), y)


def folding(form: str) -> Callable[[], Any]:
    """One fold of four codewords at the paper's size."""
    torch.manual_seed(0)
    fold, base, code = model.Fold(2, 512, 512), model.plane_grid((45, 45)), torch.randn(4, 512).requires_grad_()
    run = fold if form == "ours" else functools.partial(tiled_fold, fold)
    return both_passes(lambda: run(base, code).sum(), code, *fold.parameters())


def widest(form: str) -> Callable[[], Any]:
    """The last per-point layer and the maximum over points, four clouds at the paper's size."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 1024), torch.randn(4, 2048, 128).relu_().requires_grad_()
    if form == "ours":
        return both_passes(lambda: model.linear_max(x, layer).sum(), x, *layer.parameters())
    return both_passes(lambda: layer(x).amax(1).sum(), x, *layer.parameters())


def searching(form: str) -> Callable[[], Any]:
    """Sixteen nearest neighbours of 128 x 512 points; "official": the whole preparation of 16 of the clouds."""
    points, _, _ = clouds(128, 512)
    arrays = list(points.numpy())
    if form == "scipy":
        from scipy.spatial import cKDTree

        return lambda: [cKDTree(cloud).query(cloud, k=17)[1] for cloud in arrays]
    return {
        "ours": lambda: data.neighbours(points, 16),
        "torch": lambda: [model.nearest_neighbours(part, 16) for part in points.split(16)],
        "official": lambda: [official(cloud) for cloud in arrays[:16]],
    }[form]


def sixteen() -> Callable[[], Any]:
    """Neighbours, covariances and graphs of 16 x 512 points."""
    points = clouds(128, 512)[0][:16]
    split = data.Split(points, torch.zeros(0, dtype=torch.long))
    return lambda: data.CloudSet.make(split, data.neighbours(points, 16), model.local_covariance, model.union_graph)


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    for size in SIZES:
        name = f"training step, {size}"
        straightforward = "padded gather, tiled codeword, dense maximum, Chamfer through cdist"
        yield Workload(name, bind(training, size, "ours"), bind(training, size, "padded"), straightforward, target=2.0)
        looped = f"the same with pooling in a loop over clouds, {size}"
        yield Workload(
            looped, bind(training, size, "ours"), bind(training, size, "loop"), "loop over clouds", target=2.0
        )
    for form, label in (
        ("padded", "gather over a padded table and amax"),
        ("loop", "loop over clouds"),
        ("geometric", "torch_geometric MaxAggregation"),
    ):
        name = f"graph max pooling, 16 x 512 x 64, both passes, beside {form}"
        yield Workload(name, bind(pooling, "ours"), bind(pooling, form), label, target=2.0)
    yield Workload(
        "Chamfer, 16 x 512 x 529 points, both passes",
        bind(distance, model.chamfer),
        bind(distance, cdist_chamfer),
        "cdist with the full gradient",
        target=2.0,
    )
    yield Workload(
        "one fold, 4 x 2,025 points x 512, both passes",
        bind(folding, "ours"),
        bind(folding, "tiled"),
        "tiled codeword",
        target=1.3,
    )
    yield Workload(
        "widest layer and maximum over points, 4 x 2,048 x 1,024, both passes",
        bind(widest, "ours"),
        bind(widest, "dense"),
        "dense backward",
        target=2.0,
    )
    yield Workload(
        "16 neighbours, 128 x 512 points",
        bind(searching, "ours"),
        bind(searching, "scipy"),
        "scipy cKDTree, cloud by cloud",
    )
    yield Workload(
        "16 neighbours, 128 x 512 points, beside torch",
        bind(searching, "ours"),
        bind(searching, "torch"),
        "torch cdist and topk",
        target=2.0,
    )
    yield Workload(
        "neighbours, covariances and graphs, 16 x 512 points",
        sixteen,
        bind(searching, "official"),
        "loops over points, as the official preparation",
        target=2.0,
    )
