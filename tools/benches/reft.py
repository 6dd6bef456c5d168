"""RefT: deformable attention, the loss at the paper's size and cached supports beside plain forms and a peer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from papers.reft import model
from tools.bench import Workload

SHAPES = [(8, 8), (16, 16), (32, 32)]


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    s = sum(h * w for h, w in SHAPES)
    value = torch.randn(1, s, 8, 32, generator=g)
    locations = torch.rand(1, s, 8, 3, 4, 2, generator=g)
    return value, locations, torch.rand(1, s, 8, 3, 4, generator=g)


def per_point(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """One point after the other, for all queries and heads, with four reads each."""
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


def deformable(form: str) -> Callable[[], Any]:
    """Forward and backward of one layer's sampling."""
    value, locations, weights = _inputs()
    value.requires_grad_()
    function = model.deformable_attention if form == "ours" else per_point

    def step() -> None:
        value.grad = None
        function(value, SHAPES, locations, weights).sum().backward()

    return step


def _case() -> tuple[Tensor, Tensor, model.Targets]:
    """Predictions of 10 layers with 100 queries for two images of 512 pixels with 8 objects."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 2, 100, 81, generator=g)
    masks = F.interpolate(torch.randn(20, 100, 16, 16, generator=g), (128, 128), mode="bilinear").view(
        10, 2, 100, 128, 128
    )
    truth = F.interpolate(torch.randn(2, 8, 8, 8, generator=g), (512, 512), mode="bilinear") > 0.5
    labels = torch.randint(80, (2, 8), generator=g)
    return logits, masks, model.Targets(truth.float(), labels, torch.ones(2, 8) > 0)


def loss(form: str) -> Callable[[], Any]:
    """Mask2Former's loss with 12,544 points, forward and backward."""
    logits, masks, targets = _case()
    logits.requires_grad_()
    masks.requires_grad_()
    if form == "ours":

        def step() -> None:
            logits.grad = masks.grad = None
            out = model.Output(logits, masks, logits, ())
            torch.stack(list(model.losses(out, targets).values())).sum().backward()

        return step
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = Mask2FormerConfig(num_labels=80)
    judge = Mask2FormerLoss(config, {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0})

    def peer() -> None:
        logits.grad = masks.grad = None
        others = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(masks[:-1], logits[:-1])]
        found = judge(masks[-1], logits[-1], list(targets.masks), list(targets.labels), others)
        torch.stack(list(found.values())).sum().backward()

    return peer


def detection(form: str) -> Callable[[], Any]:
    """Inference on one image with 12 classes of 5 shots."""
    torch.manual_seed(0)
    net = model.RefT(model.SMALL, model.SmallResNet(), model.SmallResNet.channels, 12).eval().requires_grad_(False)
    images, labels = torch.rand(60, 3, 64, 64), torch.arange(12).repeat(5)
    masks = torch.zeros(60, 64, 64)
    masks[:, 16:40, 16:40] = 1
    with torch.inference_mode():
        kept, _ = net.reference(images, masks, labels)

    def step() -> Any:
        with torch.inference_mode():
            reference = kept if form == "ours" else net.reference(images, masks, labels)[0]
            return model.detect(net(images[:1], reference), (64, 64), 30)

    return step


def pooling(form: str) -> Callable[[], Any]:
    """Class centres of 80 classes with 5 shots at 32 x 32."""
    x = torch.randn(400, 256, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(400, 128, 128)
    masks[:, 20:90, 30:100] = 1
    labels = torch.arange(80).repeat_interleave(5)
    if form == "ours":
        return lambda: model.mean_by_class(model.mask_pool(x, masks), labels, 80)

    def looped() -> Tensor:
        rows = []
        for c in range(80):
            shots = []
            for i in (labels == c).nonzero()[:, 0].tolist():
                weight = F.interpolate(masks[i][None, None], (32, 32), mode="area")[0]
                shots.append((x[i] * weight).sum((1, 2)) / weight.sum())
            rows.append(torch.stack(shots).mean(0))
        return torch.stack(rows)

    return looped


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    yield Workload(
        f"deformable attention, {sum(math.prod(s) for s in SHAPES)} tokens, 3 levels x 4 points, both passes",
        bind(deformable, "ours"),
        bind(deformable, "plain"),
        "point by point, four reads each",
        target=2.0,
    )
    yield Workload(
        "loss of 10 layers x 100 queries, 12,544 points, 2 images of 512 x 512 with 8 objects, both passes",
        bind(loss, "ours"),
        bind(loss, "peer"),
        "Mask2FormerLoss of transformers",
        target=1.3,
    )
    yield Workload(
        "inference on one image, 12 classes x 5 shots",
        bind(detection, "ours"),
        bind(detection, "again"),
        "supports encoded for every image",
        target=5.0,
    )
    yield Workload(
        "class centres, 80 classes x 5 shots, 256 x 32 x 32",
        bind(pooling, "ours"),
        bind(pooling, "looped"),
        "a loop over classes and shots",
        target=1.2,
    )
