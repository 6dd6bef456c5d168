"""EMO as a backbone: RetinaNet and SSDLite for detection, DeepLabv3, PSPNet and Semantic FPN for segmentation.

Detectors are torchvision's with the sizes of the paper's mmdetection configurations; the segmentation heads have the
layers of mmsegmentation's, whose parameter counts the paper prints.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

DETECTORS = ("retinanet", "ssdlite")
SEGMENTERS = ("deeplabv3", "pspnet", "semantic_fpn")
IGNORE = 255
"""Label of pixels that do not count."""


class Features(nn.Module):
    """Maps of some stages of an EMO.

    Args:
        net: the network; its norm and classifier are dropped. indices: stages 0 to 4, in order. frozen: stages up to
            this one are not trained; -1 for none. norm_eval: batch norms keep the statistics they came with.
    """

    def __init__(self, net: Any, indices: tuple[int, ...], frozen: int = -1, norm_eval: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList([net.stage0, net.stage1, net.stage2, net.stage3, net.stage4][: max(indices) + 1])
        self.indices, self.frozen, self.norm_eval = indices, frozen, norm_eval
        self.channels = [net.feature_info[i]["num_chs"] for i in indices]
        self.stages[: frozen + 1].requires_grad_(False)

    def train(self, mode: bool = True) -> Features:
        """Frozen stages, and batch norms where asked, stay in evaluation."""
        super().train(mode)
        self.stages[: self.frozen + 1].eval()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) to maps."""
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.indices:
                maps.append(x)
        return maps


def named(maps: list[Tensor]) -> OrderedDict[str, Tensor]:
    """Maps under the names that torchvision's detectors expect."""
    return OrderedDict((str(i), x) for i, x in enumerate(maps))


# ---- detection -------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Feature pyramid of 256 channels, with two strided levels on the last map where ``extra``."""

    out_channels = 256

    def __init__(self, features: Features, extra: bool) -> None:
        super().__init__()
        self.features = features
        last = LastLevelP6P7(features.channels[-1], self.out_channels) if extra else None
        self.fpn = FeaturePyramidNetwork(features.channels, self.out_channels, last)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images to maps by level."""
        return self.fpn(named(self.features(x)))


def retinanet(net: Any, classes: int, image: int) -> RetinaNet:
    """RetinaNet on stages 2 to 4, first stages frozen; images are resized to a shorter side of ``image`` (800).

    Labels are 0 to classes - 1.
    """
    steps = [2 ** (i / 3) for i in range(3)]
    sizes = tuple(tuple(4 * stride * step for step in steps) for stride in (8, 16, 32, 64, 128))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)  # type: ignore[arg-type]  # real sizes, not whole ones
    return RetinaNet(
        Pyramid(Features(net, (2, 3, 4), frozen=1, norm_eval=True), extra=True),
        classes,
        min_size=image,
        max_size=round(image * 1333 / 800),
        anchor_generator=anchors,
        detections_per_img=100,
    )


class SsdMaps(nn.Module):
    """Stages 3 and 4, and four depth-wise separable strided blocks after them."""

    def __init__(self, features: Features, norm: Any) -> None:
        super().__init__()
        self.features = features
        self.out_channels = [*features.channels, 512, 256, 256, 128]
        blocks = [_extra_block(a, b, norm) for a, b in zip(self.out_channels[1:], self.out_channels[2:], strict=False)]
        self.extra = nn.ModuleList(blocks)
        for module in self.extra.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.03)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images to six maps."""
        maps = self.features(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return named(maps)


def ssdlite(net: Any, classes: int, image: int) -> SSD:
    """SSDLite on images of ``image`` (320) pixels. Labels are 1 to classes; 0 is the background."""
    norm = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    backbone = SsdMaps(Features(net, (3, 4), norm_eval=True), norm)
    anchors = DefaultBoxGenerator(
        [[2, 3]] * 6,
        scales=[side / 320 for side in (48, 100, 150, 202, 253, 304, 320)],
        steps=[round(stride * image / 320) for stride in (16, 32, 64, 107, 160, 320)],
    )
    head = SSDLiteHead(backbone.out_channels, anchors.num_anchors_per_location(), classes + 1, norm)
    return SSD(
        backbone,
        anchors,
        (image, image),
        classes + 1,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        head=head,
        score_thresh=0.02,
        nms_thresh=0.45,
        detections_per_img=200,
        topk_candidates=1000,
    )


# ---- segmentation ----------------------------------------------------------------------------------------------------


def conv_bn(dim_in: int, dim_out: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; keeps the size."""
    conv = nn.Conv2d(dim_in, dim_out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim_out), nn.ReLU())


def classifier(dim: int, classes: int) -> nn.Sequential:
    """Dropout and a 1 x 1 convolution."""
    conv = nn.Conv2d(dim, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(0.1), conv)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class Aspp(nn.Module):
    """DeepLabv3: atrous convolutions of four rates and the mean of the last map, joined by a 3 x 3 convolution."""

    DILATIONS = (1, 12, 24, 36)

    def __init__(self, channels: list[int], classes: int, width: int = 256) -> None:
        super().__init__()
        dim = channels[-1]
        self.branches = nn.ModuleList([conv_bn(dim, width, 1 if rate == 1 else 3, rate) for rate in self.DILATIONS])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn(dim, width, 1))
        self.join = conv_bn(5 * width, width, 3)
        self.classify = classifier(width, classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps to logits (B, classes, h, w)."""
        x = maps[-1]
        parts = [resized(self.pool(x), x), *(branch(x) for branch in self.branches)]
        return self.classify(self.join(torch.cat(parts, 1)))


class Psp(nn.Module):
    """PSPNet: means of the last map over 1, 2, 3 and 6 parts of a side, joined by a 3 x 3 convolution."""

    SCALES = (1, 2, 3, 6)

    def __init__(self, channels: list[int], classes: int, width: int = 256) -> None:
        super().__init__()
        dim = channels[-1]
        pools = [nn.Sequential(nn.AdaptiveAvgPool2d(scale), *conv_bn(dim, width, 1)) for scale in self.SCALES]
        self.pools = nn.ModuleList(pools)
        self.join = conv_bn(dim + len(pools) * width, width, 3)
        self.classify = classifier(width, classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps to logits (B, classes, h, w)."""
        x = maps[-1]
        return self.classify(self.join(torch.cat([x, *(resized(pool(x), x) for pool in self.pools)], 1)))


class SemanticFpn(nn.Module):
    """Semantic FPN: every level of a pyramid is brought to the finest by convolutions and upsampling, then summed."""

    def __init__(self, channels: list[int], classes: int, width: int = 128) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(channels, 256)
        levels = []
        for level in range(len(channels)):
            layers: list[nn.Module] = []
            for i in range(max(1, level)):
                layers.append(conv_bn(256 if i == 0 else width, width, 3))
                if level:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            levels.append(nn.Sequential(*layers))
        self.levels = nn.ModuleList(levels)
        self.classify = classifier(width, classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps to logits (B, classes, h, w)."""
        pyramid = list(self.fpn(named(maps)).values())
        finest = self.levels[0](pyramid[0])
        rest = (resized(level(x), finest) for level, x in zip(self.levels[1:], pyramid[1:], strict=True))
        return self.classify(sum(rest, finest))


HEADS = {"deeplabv3": Aspp, "pspnet": Psp, "semantic_fpn": SemanticFpn}


class Segmenter(nn.Module):
    """A segmentation head on an EMO; DeepLabv3 and PSPNet have a second one on stage 3 that only helps to train."""

    AUXILIARY_WEIGHT = 0.4

    def __init__(self, net: Any, head: str, classes: int) -> None:
        super().__init__()
        self.features = Features(net, (1, 2, 3, 4))
        self.decode = HEADS[head](self.features.channels, classes)
        self.auxiliary = None
        if head != "semantic_fpn":
            self.auxiliary = nn.Sequential(conv_bn(self.features.channels[2], 256, 3), classifier(256, classes))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) to logits (B, classes, H, W), or with labels (B, H, W) to the loss."""
        maps = self.features(images)
        logits = resized(self.decode(maps), images)
        if labels is None:
            return logits
        loss = pixel_loss(logits, labels)
        if self.auxiliary is not None:
            loss = loss + self.AUXILIARY_WEIGHT * pixel_loss(resized(self.auxiliary(maps[2]), images), labels)
        return loss


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of (B, classes, H, W) and (B, H, W), a mean over all pixels; ignored ones count as zero."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


def build_dense(head: str, net: Any, classes: int, image: int) -> nn.Module:
    """A detector or segmenter on an EMO.

    Args:
        head: one of ``DETECTORS`` and ``SEGMENTERS``. image: side of the images (RetinaNet: shorter side).

    Raises:
        ValueError: unknown head.
    """
    if head == "retinanet":
        return retinanet(net, classes, image)
    if head == "ssdlite":
        return ssdlite(net, classes, image)
    if head not in HEADS:
        raise ValueError(f"no head {head!r}, expected one of {', '.join((*DETECTORS, *SEGMENTERS))}")
    return Segmenter(net, head, classes)


# ---- scores ----------------------------------------------------------------------------------------------------------


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """aAcc, mIoU and mAcc of a confusion matrix (truth, prediction); classes that never occur are left out."""
    confusion = confusion.double()
    right, truth, guess = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = truth + guess - right
    return {
        "aAcc": float(right.sum() / truth.sum()),
        "mIoU": float((right / union)[union > 0].mean()),
        "mAcc": float((right / truth)[truth > 0].mean()),
    }


def coco_scores(annotations: str, detections: list[dict[str, Any]]) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm and APl as COCO defines them; zeros where nothing was detected.

    Args:
        annotations: instances file. detections: ``image_id``, ``category_id``, ``bbox`` as x, y, w, h, and ``score``.
    """
    import contextlib
    import io

    from faster_coco_eval import COCO, COCOeval_faster

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    if not detections:
        return dict.fromkeys(names, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        scorer = COCOeval_faster(truth, truth.loadRes(detections), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    # COCO says -1 where there is no box of a size
    return {name: max(0.0, float(value)) for name, value in zip(names, scorer.stats, strict=False)}
