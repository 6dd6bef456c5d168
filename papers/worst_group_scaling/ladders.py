"""Families of models by size: perceptrons, ResNets, VGGs and BERTs.

A ladder is written ``NAME`` or ``NAME:SIZE,SIZE``, e.g. ``resnet10vw:1,2,4`` or ``bert:tiny,mini``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

FAMILIES: dict[str, tuple[str, ...]] = {
    "mlp-width": ("8", "16", "32", "64", "128", "256", "512"),
    "mlp-depth": ("1", "2", "3", "4"),
    "resnet10vw": ("1", "2", "4", "8", "16", "32", "64", "96"),
    "resnet18vw": ("4", "8", "16", "32", "64"),
    "resnet34vw": ("4", "8", "16", "32", "64"),
    "resnet50vw": ("4", "8", "16", "32", "64"),
    "resnet": ("18", "34", "50", "101", "152"),
    "wide-resnet": ("50",),
    "vgg": ("11", "13", "16", "19"),
    "vgg11vw": ("8", "16", "32", "64"),
    "bert": ("tiny", "mini", "small", "medium", "base"),
}
"""Members of each family, from small to large. ``vw``: variable width."""
BERTS = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
"""Layers and hidden units; google/bert_uncased_L-.._H-.. has the weights of the small ones."""
STACKED = ("mlp-width", "mlp-depth")
"""Families whose members are trained together, as one stack."""


@dataclass(frozen=True)
class Ladder:
    """A family and the sizes that are taken of it."""

    name: str
    sizes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """Whether its networks are trained as one."""
        return self.name in STACKED

    def parts(self) -> list[tuple[str, ...]]:
        """Sizes that are trained together."""
        return [self.sizes] if self.stacked else [(size,) for size in self.sizes]


def parse(text: str) -> Ladder:
    """Read ``NAME`` or ``NAME:SIZE,SIZE``.

    Raises:
        ValueError: unknown family, a size that it cannot have, sizes that do not rise.
    """
    name, colon, rest = text.partition(":")
    if name not in FAMILIES:
        raise ValueError(f"unknown ladder {name!r}, expected one of {', '.join(FAMILIES)}")
    sizes = tuple(rest.split(",")) if colon else FAMILIES[name]
    if name == "bert":
        for size in sizes:
            layers, hidden = bert_shape(size)
            if min(layers, hidden) < 1 or (hidden > 64 and hidden % 64):
                raise ValueError(f"ladder bert: size {size!r} has {hidden} hidden units, expected a multiple of 64")
        return Ladder(name, sizes)
    if name in ("resnet", "vgg", "wide-resnet"):
        unknown = [size for size in sizes if size not in FAMILIES[name]]
        if unknown:
            raise ValueError(f"ladder {name}: size {unknown[0]!r}, expected one of {', '.join(FAMILIES[name])}")
    if any(not size.isdecimal() or int(size) < 1 for size in sizes):
        raise ValueError(f"ladder {name}: sizes {rest!r}, expected whole numbers of at least 1")
    numbers = [int(size) for size in sizes]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"ladder {name}: sizes {','.join(sizes)}, expected them to rise")
    return Ladder(name, sizes)


def bert_shape(size: str) -> tuple[int, int]:
    """(layers, hidden units) of a named BERT or of ``LxH``.

    Raises:
        ValueError: neither.
    """
    if size in BERTS:
        return BERTS[size]
    layers, cross, hidden = size.partition("x")
    if not cross or not layers.isdecimal() or not hidden.isdecimal():
        raise ValueError(f"ladder bert: size {size!r}, expected one of {', '.join(BERTS)} or LAYERSxHIDDEN")
    return int(layers), int(hidden)


def build(
    ladder: Ladder,
    sizes: Sequence[str],
    classes: int,
    inputs: int = 0,
    depth_width: int = 64,
    pretrained: bool = False,
    weights: str = "",
    vocabulary: int = 30522,
) -> nn.Module:
    """Networks of a ladder that are trained together; their forward pass gives (K, B, classes).

    Args:
        sizes: members, all of a stacked family or one of another. inputs: numbers of a sample (perceptrons).
        depth_width: units of a layer of ``mlp-depth``. pretrained: start from ImageNet or BERT's released weights
            (timm, transformers), taken from folder ``weights`` where one is given. vocabulary: BERT's tokens.

    Raises:
        ValueError: pre-trained weights are asked for and cannot be had.
    """
    from model import DepthLadder, One, Tokens, VariableWidthResNet, WidthLadder

    name = ladder.name
    if name == "mlp-width":
        return WidthLadder(inputs, [int(size) for size in sizes], classes)
    if name == "mlp-depth":
        return DepthLadder(inputs, [int(size) for size in sizes], depth_width, classes)
    (size,) = sizes
    if pretrained and name.endswith("vw"):
        raise ValueError(f"ladder {name}: there are no pre-trained weights for variable widths")
    if name == "bert":
        return One(Tokens(_bert(size, classes, pretrained, weights, vocabulary)))
    if name.startswith("resnet") and name.endswith("vw"):
        return One(VariableWidthResNet(int(name[6:8]), int(size), classes))
    return One(_image(name, size, classes, pretrained, weights))


def _image(name: str, size: str, classes: int, pretrained: bool, weights: str) -> nn.Module:
    import timm
    from timm.models.vgg import VGG

    if name == "vgg11vw":
        plan = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
        return VGG(tuple(c if c == "M" else int(c) * int(size) // 64 for c in plan), num_classes=classes)
    timm_name = {"resnet": f"resnet{size}", "vgg": f"vgg{size}", "wide-resnet": "wide_resnet50_2"}[name]
    if not pretrained:
        return timm.create_model(timm_name, num_classes=classes)
    overlay = None
    if weights:
        found = [path for end in ("safetensors", "pth") if (path := Path(weights) / f"{timm_name}.{end}").is_file()]
        if not found:
            raise ValueError(f"--weights {weights} has no {timm_name}.safetensors or .pth")
        overlay = {"file": str(found[0])}
    tag = f"{timm_name}.tv_in1k"  # torchvision's first ImageNet weights, which Sagawa's code takes
    try:
        return timm.create_model(tag, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"ImageNet weights of {tag} cannot be had ({error}); give --weights DIR") from error


def _bert(size: str, classes: int, pretrained: bool, weights: str, vocabulary: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    layers, hidden = bert_shape(size)
    if pretrained:
        source = f"{weights}/{size}" if weights else f"google/bert_uncased_L-{layers}_H-{hidden}_A-{hidden // 64}"
        if not weights and size in ("base", "large"):
            source = f"bert-{size}-uncased"
        try:
            return BertForSequenceClassification.from_pretrained(source, num_labels=classes)
        except OSError as error:
            raise ValueError(f"BERT weights {source} cannot be had; give --weights DIR with a folder {size}") from error
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        intermediate_size=4 * hidden,
        num_labels=classes,
    )
    return BertForSequenceClassification(config)
