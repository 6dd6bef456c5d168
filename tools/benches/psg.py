"""PSG: the metric, the one-stage heads and the trees of VCTree beside the straightforward forms, written for this.

The straightforward forms give the same values: masks of all queries (or of all six decoder outputs), features repeated
for every query, pixels counted pair by pair, trees grown one image and one node at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.psg import metrics, model, twostage
from tools.bench import Workload


@functools.cache
def scored() -> list[tuple[model.Triplets, metrics.Truth]]:
    """Three images of 480 x 640 with 12 segments, 6 relations and 100 triplets; masks cover 30 % at random."""
    r = np.random.RandomState(0)
    out = []
    for _ in range(3):
        masks = torch.from_numpy(r.rand(12, 480, 640) < 0.3)
        ends = torch.from_numpy(np.stack([r.choice(12, 2, replace=False) for _ in range(6)]))
        relations = torch.cat([ends, torch.from_numpy(r.randint(1, 57, (6, 1)))], 1)
        truth = metrics.Truth(torch.from_numpy(r.randint(0, 133, 12)), masks, relations)
        pairs = torch.from_numpy(r.randint(0, 12, (100, 2)))
        pairs[:6] = ends
        labels = truth.labels[pairs]
        predicate = torch.from_numpy(r.randint(1, 57, 100))
        predicate[:6] = relations[:, 2]
        found = model.Triplets(labels[:, 0], predicate, labels[:, 1], torch.linspace(1, 0, 100), masks, pairs)
        out.append((found, truth))
    return out


def metric(ours: bool) -> Callable[[], Any]:
    """R@K and mR@K of three images."""
    data = scored()

    def quick() -> dict[str, float]:
        recall = metrics.Recall()
        for found, truth in data:
            recall.add(found, truth)
        return recall.result()

    def pair_by_pair() -> list[float]:
        out = []
        for found, truth in data:
            first = np.full(6, 10**6)
            for k in range(100):
                a, b = found.pairs[k].tolist()
                for r, (s, o, p) in enumerate(truth.relations.tolist()):
                    same = (int(found.subject[k]), int(found.object[k]), int(found.predicate[k])) == (
                        int(truth.labels[s]), int(truth.labels[o]), p,
                    )  # fmt: skip
                    if not same:
                        continue
                    ious = []
                    for x, y in ((found.masks[a], truth.masks[s]), (found.masks[b], truth.masks[o])):
                        ious.append(float((x & y).sum()) / float((x | y).sum()))
                    if min(ious) >= 0.5:
                        first[r] = min(first[r], k)
            out += [float((first < k).mean()) for k in (20, 50, 100)]
        return out

    return quick if ours else pair_by_pair


class PlainMaskHead(model.MaskHead):
    """A copy of the features for every query."""

    def forward(self, features: Tensor, attention: Tensor, skips: Any, image: Tensor) -> Tensor:
        x = torch.cat([features[image], attention], 1)
        x = F.relu(self.norms[0](self.convs[0](x)))
        x = F.relu(self.norms[1](self.convs[1](x)))
        for conv, norm, adapter, skip in zip(self.convs[2:], self.norms[2:], self.adapters, skips, strict=True):
            x = adapter(skip[image]) + F.interpolate(x, skip.shape[-2:], mode="nearest")
            x = F.relu(norm(conv(x)))
        return self.last(x).squeeze(1)


class Maps(nn.Module):
    """Random maps in place of a trunk, as the head alone is timed."""

    channels = (16, 32, 48, 64)

    def __init__(self) -> None:
        super().__init__()
        self.maps = [torch.randn(2, c, 128 // s, 128 // s) for c, s in zip(self.channels, (4, 8, 16, 32), strict=True)]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


@functools.cache
def problem(cls: type) -> tuple[Any, model.Targets]:
    """A head with 50 queries, width 128, six decoder layers, two images of 128 pixels with four relations."""
    torch.manual_seed(0)
    net = cls(Maps(), d=128, hidden=512, queries=50, dropout=0.0)
    boxes = torch.cat([0.3 + 0.4 * torch.rand(2, 6, 2), 0.1 + 0.3 * torch.rand(2, 6, 2)], -1)
    relations = torch.tensor([[0, 1, 3], [2, 1, 5], [4, 0, 9], [3, 5, 1]]).expand(2, -1, -1)
    many, masks = torch.tensor([6, 6]), torch.rand(2, 6, 64, 64) > 0.7
    return net, model.Targets(torch.randint(133, (2, 6)), boxes, masks, relations, many, torch.tensor([4, 4]))


def head(cls: type, ours: bool, loss_only: bool = False) -> Callable[[], Any]:
    """Forward, losses and backward; the other form makes the masks of every query and layer, and loses none of them."""
    net, truth = problem(cls)
    images = torch.zeros(2, 3, 128, 128)
    with torch.no_grad():
        done = net(images)

    def make(plain: bool) -> Tensor:
        out = done if loss_only else net(images)
        loss = sum(net.loss(out, truth).values())
        if plain:
            layers, batch, queries = out["rel_cls"].shape[:3]
            image = torch.arange(batch).repeat_interleave(queries)
            query = torch.arange(queries).repeat(batch)
            if cls is model.PSGTR:
                masks = torch.cat(net.triplet_masks(out, image, query))
            else:
                masks = net.object_masks(out, image, query)
            big = model.resized(masks, (64, 64))
            chosen = truth.masks[:, 0].repeat_interleave(len(big) // 2, 0)
            for _ in range(layers):  # of which the last is used
                dice = model.dice_loss(big, chosen)
            loss = loss + 0 * dice.sum()
        return loss

    def step() -> None:
        heads = [m for m in net.modules() if isinstance(m, model.MaskHead)]
        for m in heads:
            m.__class__ = model.MaskHead if ours else PlainMaskHead
        net.zero_grad()
        make(not ours).backward()

    return step


def trees(ours: bool) -> Callable[[], Any]:
    """Maximum spanning trees of 16 images with 24 segments."""
    torch.manual_seed(0)
    scores = torch.rand(16, 24, 24)
    lengths = torch.full((16,), 24)

    def one_by_one() -> list[list[tuple[int, int]]]:
        out = []
        for part in scores:
            root = int(part.mean(1).argmax())
            inside, edges = [root], []
            while len(inside) < 24:
                best = max(
                    ((float(part[i, j]), i, j) for i in inside for j in range(24) if j not in inside),
                    key=lambda row: row[0],
                )
                inside.append(best[2])
                edges.append(best[1:])
            out.append(edges)
        return out

    return (lambda: twostage.spanning_trees(scores, lengths)) if ours else one_by_one


def spatial(ours: bool) -> Callable[[], Any]:
    """Box maps of 380 pairs of 20 segments through the spatial features, both passes."""
    torch.manual_seed(0)
    low = 300 * torch.rand(20, 2)
    boxes, sizes = torch.cat([low, low + 20 + 100 * torch.rand(20, 2)], 1), torch.full((20, 2), 480.0)
    pairs = twostage.all_pairs(torch.zeros(20, dtype=torch.long))
    net = twostage.SpatialEncoder(64)

    def step() -> None:
        maps = twostage.box_maps(boxes, sizes)
        if ours:
            y = net(maps, pairs)
        else:
            y = net.rest(net.first(torch.stack([maps[pairs[:, 0], 0], maps[pairs[:, 1], 1]], 1)))
        y.sum().backward()

    return step


def workloads() -> Iterator[Workload]:
    """Every comparison."""

    def bind(make: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return functools.partial(make, *args)

    yield Workload(
        "recall of 3 images of 480 x 640, 6 relations, 100 triplets",
        bind(metric, True),
        bind(metric, False),
        "one pair and one mask at a time",
        target=2.0,
    )
    for cls in (model.PSGTR, model.PSGFormer):
        yield Workload(
            f"{cls.__name__} head, forward, losses and backward, 2 images, 50 queries",
            bind(head, cls, True),
            bind(head, cls, False),
            "masks of all queries, features copied for each",
            target=2.0,
        )
    yield Workload(
        "spanning trees of 16 images with 24 segments", bind(trees, True), bind(trees, False), "loops", target=2.0
    )
    yield Workload(
        "spatial features of 380 pairs, both passes", bind(spatial, True), bind(spatial, False), "pair by pair",
        target=1.2,
    )  # fmt: skip
