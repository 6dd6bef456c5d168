"""Networks of the paper: tiny ones for devices, their teacher, waveform networks, and small ones for a CPU.

All of them are ``Staged``: stages, a head that makes the feature, a linear classifier. Nothing here is pre-trained;
``load_backbone`` reads official weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet50
from torchvision.ops import Conv2dNormActivation as ConvBNAct


class Parts(NamedTuple):
    """Logits (B, C), maps of the stages, feature (B, F)."""

    logits: Tensor
    maps: list[Tensor]
    feature: Tensor


class Staged(nn.Module):
    """Stages, head, classifier.

    Args:
        stages: map to map; the first is the stem. head: the last map to (B, features).
        features: of the classifier's input. classes: of its output.
        mix_after: numbers of the stages after which ``mixer`` (MixStyle, EFDMix) is applied when it is set.
    """

    def __init__(
        self, stages: Sequence[nn.Module], head: nn.Module, features: int, classes: int, mix_after: Sequence[int]
    ) -> None:
        super().__init__()
        self.stages, self.head = nn.ModuleList(stages), head
        self.classifier = nn.Linear(features, classes)
        self.mix_after = frozenset(mix_after)
        self.mixer: nn.Module | None = None

    def forward(self, x: Tensor, parts: bool = False) -> Any:
        """Logits, or all parts."""
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if self.mixer is not None and i in self.mix_after:
                x = self.mixer(x)
            maps.append(x)
        feature = self.head(x)
        logits = self.classifier(feature)
        return Parts(logits, maps, feature) if parts else logits


def pool() -> nn.Module:
    """Global average of a map, flattened."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class InvertedBlock(nn.Module):
    """Expansion, depth-wise convolution, projection, each with batch norm; ReLU6; a residual where shapes allow it.

    Args:
        middle: channels of the depth-wise convolution. residual: ``None`` adds the input where it fits.
    """

    def __init__(
        self, c_in: int, c_out: int, middle: int, kernel: int = 3, stride: int = 1, residual: bool | None = None
    ) -> None:
        super().__init__()
        fits = stride == 1 and c_in == c_out
        self.residual = fits if residual is None else residual
        self.body = nn.Sequential(
            ConvBNAct(c_in, middle, 1, activation_layer=nn.ReLU6),
            ConvBNAct(middle, middle, kernel, stride, groups=middle, activation_layer=nn.ReLU6),
            ConvBNAct(middle, c_out, 1, activation_layer=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.residual else y


def _stem(channels: int, width: int, out: int) -> nn.Module:
    """Strided convolution and a depth-wise separable one."""
    return nn.Sequential(
        ConvBNAct(channels, width, 3, 2, activation_layer=nn.ReLU6),
        ConvBNAct(width, width, 3, groups=width, activation_layer=nn.ReLU6),
        ConvBNAct(width, out, 1, activation_layer=None),
    )


def eighth(value: float) -> int:
    """The nearest multiple of 8, at least 8 and not below 0.9 of the value."""
    out = max(8, int(value + 4) // 8 * 8)
    return out + 8 if out < 0.9 * value else out


def mobilenet_v2_tiny(classes: int, channels: int = 3) -> Staged:
    """MobileNetV2 of width 0.35 with a head block to 112 and 448 features (NetAug's MobileNetV2-Tiny)."""
    c = eighth(0.35 * 16)
    stages: list[nn.Module] = [_stem(channels, eighth(0.35 * 32), c)]
    for width, blocks, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2)):
        out, layers = eighth(0.35 * width), []
        for i in range(blocks):
            layers.append(InvertedBlock(c, out, eighth(6 * c), 3, 1 if i else stride, residual=i > 0))
            c = out
        stages.append(nn.Sequential(*layers))
    block = InvertedBlock(c, 112, 6 * c, residual=False)
    head = nn.Sequential(block, ConvBNAct(112, 448, 1, activation_layer=nn.ReLU6), pool())
    return Staged(stages, head, 448, classes, (1, 2))


MCUNET = (
    (16, (3, 5, 5, 4), (7, 3, 7, 5), 2),
    (24, (5, 5, 5), (5, 5, 5), 2),
    (40, (5, 6, 4), (3, 7, 5), 2),
    (48, (5, 5, 5), (5, 7, 3), 1),
    (96, (6, 5, 4), (3, 7, 3), 2),
)
"""Width, expansion and kernel of each block, stride of the first, of each stage."""


def mcunet(classes: int, channels: int = 3) -> Staged:
    """MCUNet's searched network, 160 features."""
    c = 8
    stages: list[nn.Module] = [_stem(channels, 16, c)]
    for width, expansions, kernels, stride in MCUNET:
        layers = []
        for i, (expansion, kernel) in enumerate(zip(expansions, kernels, strict=True)):
            layers.append(InvertedBlock(c, width, c * expansion, kernel, 1 if i else stride, residual=i > 0))
            c = width
        stages.append(nn.Sequential(*layers))
    head = nn.Sequential(InvertedBlock(c, 160, 480, 7, residual=False), pool())
    return Staged(stages, head, 160, classes, (1, 2))


def mobilenet_small(classes: int, channels: int = 3) -> Staged:
    """MobileNetV3-Small up to its last 1 x 1 convolution of 576 channels; every layer is a stage."""
    layers = mobilenet_v3_small(weights=None).features
    if channels != 3:
        layers[0][0] = nn.Conv2d(channels, 16, 3, 2, 1, bias=False)
    return Staged(list(layers), pool(), 576, classes, (1, 2))


def resnet(classes: int, channels: int = 3) -> Staged:
    """ResNet-50, 2048 features: the teacher."""
    net = resnet50(weights=None)
    if channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
    return Staged([stem, net.layer1, net.layer2, net.layer3, net.layer4], pool(), 2048, classes, (1, 2))


def _conv1d(c_in: int, c_out: int, first: bool = False) -> nn.Sequential:
    conv = nn.Conv1d(c_in, c_out, 80, 4, 42) if first else nn.Conv1d(c_in, c_out, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm1d(c_out), nn.ReLU())


def _waveform(groups: Sequence[Sequence[int]], classes: int, channels: int) -> Staged:
    """Groups of convolutions with a max pool of 4 between them, global average."""
    stages: list[nn.Module] = []
    c = channels
    for i, widths in enumerate(groups):
        layers: list[nn.Module] = [nn.MaxPool1d(4)] if i else []
        for j, width in enumerate(widths):
            layers.append(_conv1d(c, width, first=i == j == 0))
            c = width
        stages.append(nn.Sequential(*layers))
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return Staged(stages, head, c, classes, range(min(2, len(groups) - 1)))


def m3(classes: int, channels: int = 1, divide: int = 1) -> Staged:
    """Two convolutions on raw waveforms, widths over ``divide`` (Dai et al. 2017): the student for speech."""
    width = 256 // divide
    return _waveform(((width,), (width,)), classes, channels)


def m11(classes: int, channels: int = 1, divide: int = 1) -> Staged:
    """Ten convolutions on raw waveforms, widths over ``divide`` (Dai et al. 2017): the teacher for speech."""
    w = 64 // divide
    groups = ((w,), (w, w), (2 * w, 2 * w), (4 * w, 4 * w, 4 * w), (8 * w, 8 * w))
    return _waveform(groups, classes, channels)


def _small(widths: Sequence[int], classes: int, channels: int) -> Staged:
    """3 x 3 convolutions, batch norm, ReLU; 2 x 2 max pools after the first two; flattened, for 16 x 16 images."""
    stages, c = [], channels
    for i, width in enumerate(widths):
        layers: list[nn.Module] = [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if i < 2 else [])))
        c = width
    return Staged(stages, nn.Flatten(), c * 16, classes, range(min(2, len(widths) - 1)))


def small_teacher(classes: int, channels: int = 1) -> Staged:
    """Convolutions 32-64-128."""
    return _small((32, 64, 128), classes, channels)


def small_student(classes: int, channels: int = 1) -> Staged:
    """Convolutions 4-8."""
    return _small((4, 8), classes, channels)


def _perceptron(widths: Sequence[int], classes: int, channels: int) -> Staged:
    """Hidden layers with ReLU on 16 x 16 images; the image itself is the only map, so statistics are mixed there."""
    layers: list[nn.Module] = [nn.Flatten()]
    c = channels * 256
    for width in widths:
        layers += [nn.Linear(c, width), nn.ReLU()]
        c = width
    return Staged([nn.Identity()], nn.Sequential(*layers), c, classes, (0,))


def mlp_teacher(classes: int, channels: int = 1) -> Staged:
    """Hidden layers of 512 and 256."""
    return _perceptron((512, 256), classes, channels)


def mlp_student(classes: int, channels: int = 1) -> Staged:
    """A hidden layer of 24."""
    return _perceptron((24,), classes, channels)


def m3_quarter(classes: int, channels: int = 1) -> Staged:
    """``m3`` of a quarter of its width."""
    return m3(classes, channels, 4)


def m11_quarter(classes: int, channels: int = 1) -> Staged:
    """``m11`` of a quarter of its width."""
    return m11(classes, channels, 4)


NETWORKS = {
    "mobilenet_v3_small": mobilenet_small,
    "mobilenet_v2_tiny": mobilenet_v2_tiny,
    "mcunet": mcunet,
    "resnet50": resnet,
    "m3": m3,
    "m11": m11,
    "m3_quarter": m3_quarter,
    "m11_quarter": m11_quarter,
    "mlp_student": mlp_student,
    "mlp_teacher": mlp_teacher,
    "small_student": small_student,
    "small_teacher": small_teacher,
}


def build(name: str, classes: int, channels: int) -> Staged:
    """A network by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in NETWORKS:
        raise ValueError(f"network is {name!r}, expected one of {', '.join(NETWORKS)}")
    return NETWORKS[name](classes, channels)


def parameters(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def load_backbone(net: Staged, state: dict[str, Tensor]) -> None:
    """Official ImageNet weights into everything but the classifier, tensor after tensor.

    The files of torchvision (ResNet-50, MobileNetV3-Small) and of NetAug (MobileNetV2-Tiny, MCUNet) hold the layers in
    the order of these networks and end in their own classifier, so names are not needed; shapes are compared.

    Raises:
        ValueError: a tensor of another shape, or too few.
    """
    own = [(key, value) for key, value in net.state_dict().items() if not key.startswith("classifier.")]
    given = list(state.items())
    if len(given) < len(own):
        raise ValueError(f"weights have {len(given)} tensors, expected at least {len(own)} of another network")
    renamed = dict(net.state_dict())
    for (key, value), (name, other) in zip(own, given, strict=False):
        if value.shape != other.shape:
            raise ValueError(f"weights: {name} has shape {tuple(other.shape)}, expected {tuple(value.shape)} for {key}")
        renamed[key] = other
    net.load_state_dict(renamed)
