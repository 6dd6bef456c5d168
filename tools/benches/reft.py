"""RefT: deformable attention, the loss, class centres and cached supports beside plain forms and a peer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from papers.reft import model
from tools.bench import Workload

SHAPES = [(4, 4), (8, 8), (16, 16)]


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    s = sum(h * w for h, w in SHAPES)
    value = torch.randn(1, s, 8, 32, generator=g)
    locations = torch.rand(1, s, 8, 3, 4, 2, generator=g)
    return value, locations, torch.rand(1, s, 8, 3, 4, generator=g)


def per_point(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """One point of every query and head at a time, with four reads each by index."""
    b, _, heads, c = value.shape
    out = value.new_zeros(b, locations.shape[1], heads, c)
    image, head = torch.arange(b).view(-1, 1, 1), torch.arange(heads).view(1, 1, -1)
    start = 0
    for level, (h, w) in enumerate(shapes):
        for p in range(locations.shape[4]):
            place = locations[:, :, :, level, p] * value.new_tensor([w, h]) - 0.5
            low = place.floor()
            for dy in (0, 1):
                for dx in (0, 1):
                    at = low + value.new_tensor([dx, dy])
                    share = (1 - (place - at).abs()).prod(-1)
                    inside = ((at >= 0) & (at < value.new_tensor([w, h]))).all(-1)
                    x, y = at[..., 0].clamp(0, w - 1).long(), at[..., 1].clamp(0, h - 1).long()
                    read = value[image, start + y * w + x, head]
                    out = out + (share * inside * weights[:, :, :, level, p]).unsqueeze(-1) * read
        start += h * w
    return out.flatten(2)


def per_query(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """A loop over queries, levels and points, the reads of all heads at once."""
    b, _, heads, c = value.shape
    image, head = torch.arange(b).view(-1, 1), torch.arange(heads).view(1, -1)
    rows = []
    for q in range(locations.shape[1]):
        total, start = value.new_zeros(b, heads, c), 0
        for level, (h, w) in enumerate(shapes):
            for p in range(locations.shape[4]):
                x, y = (locations[:, q, :, level, p] * value.new_tensor([w, h]) - 0.5).unbind(-1)
                left, top = x.floor(), y.floor()
                for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                    for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
                        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
                        at = start + row.clamp(0, h - 1).long() * w + column.clamp(0, w - 1).long()
                        share = down * across * inside * weights[:, q, :, level, p]
                        total = total + share.unsqueeze(-1) * value[image, at, head]
            start += h * w
        rows.append(total)
    return torch.stack(rows, 1).flatten(2)


def per_level(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """One grid_sample a level, as the official operator falls back to: samples stacked, weighted, summed."""
    b, _, heads, c = value.shape
    grids, sampled = 2 * locations - 1, []
    for i, level in enumerate(value.split([h * w for h, w in shapes], 1)):
        maps = level.flatten(2).transpose(1, 2).reshape(b * heads, c, *shapes[i])
        grid = grids[:, :, :, i].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid, align_corners=False))
    share = weights.transpose(1, 2).reshape(b * heads, 1, locations.shape[1], -1)
    out = (torch.stack(sampled, -2).flatten(-2) * share).sum(-1)
    return out.view(b, heads * c, -1).transpose(1, 2)


SAMPLING = {"ours": model.deformable_attention, "point": per_point, "query": per_query, "level": per_level}


def deformable(form: str, backward: bool) -> Callable[[], Any]:
    """One layer's sampling."""
    value, locations, weights = _inputs()
    function = SAMPLING[form]
    if not backward:
        return torch.no_grad()(lambda: function(value, SHAPES, locations, weights))
    leaves = [x.requires_grad_() for x in (value, locations, weights)]

    def step() -> None:
        for x in leaves:
            x.grad = None
        function(value, SHAPES, locations, weights).sum().backward()

    return step


def _case(layers: int, queries: int, side: int) -> tuple[Tensor, Tensor, model.Targets]:
    """Predictions for two images of side x side pixels with 8 objects."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, 2, queries, 81, generator=g)
    masks = F.interpolate(torch.randn(2 * layers, queries, 8, 8, generator=g), (side // 4,) * 2, mode="bilinear")
    truth = F.interpolate(torch.randn(2, 8, 8, 8, generator=g), (side,) * 2, mode="bilinear") > 0.5
    labels = torch.randint(80, (2, 8), generator=g)
    masks = masks.view(layers, 2, queries, side // 4, side // 4)
    return logits, masks, model.Targets(truth.float(), labels, torch.ones(2, 8) > 0)


LAYERS, QUERIES, SIDE, POINTS = 4, 50, 128, 1024


def loss(form: str) -> Callable[[], Any]:
    """Mask2Former's loss, forward and backward."""
    logits, masks, targets = _case(LAYERS, QUERIES, SIDE)
    logits.requires_grad_()
    masks.requires_grad_()
    if form == "ours":

        def step() -> None:
            logits.grad = masks.grad = None
            out = model.Output(logits, masks, logits, ())
            torch.stack(list(model.losses(out, targets, POINTS).values())).sum().backward()

        return step
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(num_labels=80, train_num_points=POINTS)
    judge = Mask2FormerLoss(config, {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0})

    def peer() -> None:
        logits.grad = masks.grad = None
        others = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(masks[:-1], logits[:-1])]
        found = judge(masks[-1], logits[-1], list(targets.masks), list(targets.labels), others)
        torch.stack(list(found.values())).sum().backward()

    return peer


@torch.no_grad()
def matching(form: str) -> Callable[[], Any]:
    """The matches of every layer and image from mask logits at 1,024 points."""
    logits, _, _ = _case(LAYERS, QUERIES, SIDE)
    g = torch.Generator().manual_seed(1)
    masks = torch.randn(LAYERS, 2, QUERIES, POINTS, generator=g)
    truth = (torch.rand(2, 8, POINTS, generator=g) > 0.7).float()
    labels = torch.randint(80, (2, 8), generator=g)
    targets = model.Targets(truth, labels, torch.ones(2, 8) > 0)
    if form == "ours":
        return lambda: model.match(logits, masks, targets)

    @torch.no_grad()
    def pairs() -> Tensor:
        found = torch.empty(LAYERS, 2, 8, dtype=torch.int64)
        for layer in range(LAYERS):
            for i in range(2):
                cost = torch.empty(QUERIES, 8)
                chance = logits[layer, i].softmax(-1)
                for j in range(8):
                    t = truth[i, j].expand(QUERIES, -1)
                    bce = F.binary_cross_entropy_with_logits(masks[layer, i], t, reduction="none").mean(1)
                    cost[:, j] = 5 * bce + 5 * model.dice_loss(masks[layer, i], t) - 2 * chance[:, labels[i, j]]
                rows, columns = linear_sum_assignment(cost.numpy())
                found[layer, i, torch.from_numpy(columns)] = torch.from_numpy(rows)
        return found

    return pairs


def _supports() -> tuple[model.RefT, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    net = model.RefT(model.SMALL, model.SmallResNet(), model.SmallResNet.channels, 12).eval().requires_grad_(False)
    masks = torch.zeros(60, 64, 64)
    masks[:, 16:40, 16:40] = 1
    return net, torch.rand(60, 3, 64, 64), masks, torch.arange(12).repeat(5)


def detection(form: str) -> Callable[[], Any]:
    """Inference on one image with 12 classes of 5 shots: Z and Q_s kept, or computed again."""
    net, images, masks, labels = _supports()
    with torch.inference_mode():
        kept, _ = net.reference(images, masks, labels)

    def step() -> Any:
        with torch.inference_mode():
            reference = kept if form == "ours" else net.reference(images, masks, labels)[0]
            return model.detect(net(images[:1], reference), (64, 64), 30)

    return step


def episode(form: str) -> Callable[[], Any]:
    """Both passes of 8 images with 12 supports, encoded once for the batch or once for each image."""
    net, images, masks, labels = _supports()
    net.requires_grad_(True)

    def run(query: Tensor) -> None:
        out = net(query, net.reference(images[:12], masks[:12], labels[:12])[0])
        (out.logits.mean() + out.masks.mean()).backward()

    def step() -> None:
        net.zero_grad(set_to_none=True)
        for part in images[12:20].split(8 if form == "ours" else 1):
            run(part)

    return step


def pooling(form: str) -> Callable[[], Any]:
    """Class centres of 80 classes with 5 shots from maps of 64 x 16 x 16."""
    x = torch.randn(400, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(400, 64, 64)
    masks[:, 10:45, 15:50] = 1
    labels = torch.arange(80).repeat_interleave(5)
    if form == "ours":
        return lambda: model.mean_by_class(model.mask_pool(x, masks), labels, 80)

    def looped() -> Tensor:
        rows = []
        for c in range(80):
            shots = []
            for i in (labels == c).nonzero()[:, 0].tolist():
                weight = F.interpolate(masks[i][None, None], (16, 16), mode="area")[0]
                shots.append((x[i] * weight).sum((1, 2)) / weight.sum())
            rows.append(torch.stack(shots).mean(0))
        return torch.stack(rows)

    return looped


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    sampling = f"{sum(math.prod(s) for s in SHAPES)} tokens, 3 levels x 4 points"
    for form, name, backward, target in (
        ("query", "a loop over queries, levels and points", False, 2.0),
        ("point", "a loop over levels and points, four indexed reads each", True, 2.0),
        ("level", "grid_sample of each level as the official fallback has it", True, None),
    ):
        yield Workload(
            f"deformable attention, {sampling}, {'both passes' if backward else 'forward'}, by {form}",
            bind(deformable, "ours", backward),
            bind(deformable, form, backward),
            name,
            target=target,
        )
    size = f"{LAYERS} layers x {QUERIES} queries, {POINTS:,} points, 2 images with 8 objects"
    yield Workload(
        f"loss of {size}, both passes",
        bind(loss, "ours"),
        bind(loss, "peer"),
        "Mask2FormerLoss of transformers",
        target=1.3,
    )
    yield Workload(
        f"matching of {size}",
        bind(matching, "ours"),
        bind(matching, "pairs"),
        "costs of one object at a time",
        target=2.0,
    )
    yield Workload(
        "inference on one image, 12 classes x 5 shots",
        bind(detection, "ours"),
        bind(detection, "again"),
        "supports encoded for every image",
        target=5.0,
    )
    yield Workload(
        "training pass, 8 images with 12 supports",
        bind(episode, "ours"),
        bind(episode, "each"),
        "supports encoded once for each image",
        target=2.0,
    )
    yield Workload(
        "class centres, 80 classes x 5 shots, 64 x 16 x 16",
        bind(pooling, "ours"),
        bind(pooling, "looped"),
        "a loop over classes and shots",
        target=2.0,
    )
