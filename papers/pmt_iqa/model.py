"""PMT-IQA: a multi-scale descriptor of an image patch, and progressive multi-task learning of its quality.

A trunk (ResNet-50 in the paper) gives four stages of feature maps. The multi-scale module (MS) pools each stage to a
few cells and joins them in one vector, since distortions live at several scales. Two heads share a small perceptron:
one classifies the quality level (ten classes, the easy task), one regresses the score (the hard task). Progressive
multi-task learning (PMT) starts with the first alone and ends with the second alone.

Sizes and order of operations are those of the released network; parts of it are named in place of equations.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
"""Quality levels of the classification head."""
CELLS = (8, 4, 2, 1)
"""Cells along a side to which the four stages are pooled."""
REDUCED = (16, 32, 64)
"""Channels to which the first three stages are reduced."""
BRANCH = 28
"""Numbers that each of the first three stages contributes to the descriptor."""
WIDTH = 112
"""Length of the descriptor; the last stage fills what the others leave."""
HIDDEN = 14
"""Width of what the two heads read."""


# ---- trunks --------------------------------------------------------------------------------------------------------


class TrunkSpec(NamedTuple):
    """What is known of a trunk: channels of its four stages, and the normalisation its weights were trained with."""

    channels: tuple[int, int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TRUNKS = {
    "resnet50": TrunkSpec((256, 512, 1024, 2048), *_IMAGENET),
    "resnet18": TrunkSpec((64, 128, 256, 512), *_IMAGENET),
    "efficientnet_lite0": TrunkSpec((24, 40, 112, 320), (127 / 255,) * 3, (128 / 255,) * 3),
}
"""``resnet50`` is the paper's. ``efficientnet_lite0`` has weights in a package, for runs without downloads."""


class ResNetTrunk(nn.Module):
    """The four stages of a torchvision ResNet under torchvision's names, without its classifier.

    Args:
        name: ``resnet50`` or ``resnet18``. Weights are random.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        import torchvision

        net = getattr(torchvision.models, name)()
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps at 1/4, 1/8, 1/16 and 1/32 of normalised images (B, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return tuple(maps)


class EfficientNetLiteTrunk(nn.Module):
    """EfficientNet-Lite0 of the package efficientnet_lite_pytorch, under its names: last block of four resolutions."""

    LAST_BLOCKS = (2, 4, 10, 15)

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        self._conv_stem, self._bn0, self._swish, self._blocks = net._conv_stem, net._bn0, net._swish, net._blocks

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps at 1/4, 1/8, 1/16 and 1/32 of normalised images (B, 3, H, W)."""
        x = self._swish(self._bn0(self._conv_stem(x)))
        maps = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in self.LAST_BLOCKS:
                maps.append(x)
        return tuple(maps)


def make_trunk(name: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A trunk of ``TRUNKS``, with the weights of ``state`` (its classifier is ignored) or random ones.

    Raises:
        ValueError: unknown name, or a weight of the trunk is missing in ``state`` or has another shape.
    """
    if name not in TRUNKS:
        raise ValueError(f"unknown trunk {name!r}, expected one of {', '.join(TRUNKS)}")
    trunk = EfficientNetLiteTrunk() if name == "efficientnet_lite0" else ResNetTrunk(name)
    if state is not None:
        own = trunk.state_dict()
        for key, value in own.items():
            if key not in state:
                raise ValueError(f"weights lack {key!r} of {name}; were they made for another trunk?")
            if state[key].shape != value.shape:
                raise ValueError(f"{key!r} has shape {tuple(state[key].shape)}, {name} expects {tuple(value.shape)}")
        trunk.load_state_dict({key: state[key] for key in own})
    return trunk


# ---- the multi-scale module ----------------------------------------------------------------------------------------


def pool_to(maps: Tensor, cells: int) -> Tensor:
    """Average (B, C, S, S) over ``cells`` x ``cells`` equal squares; maps of that size already are returned as such.

    Raises:
        ValueError: maps are not square, or their side is no multiple of ``cells``.
    """
    height, width = maps.shape[-2:]
    if height != width or width % cells:
        raise ValueError(
            f"maps of {height} x {width} cannot be pooled to {cells} x {cells} cells; expected square "
            f"patches with a side that is a multiple of 32"
        )
    return maps if width == cells else F.avg_pool2d(maps, width // cells)


def pool_stages(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The four stages pooled to 8, 4, 2 and 1 cells a side: all that the descriptor sees of them."""
    return tuple(pool_to(stage, cells) for stage, cells in zip(maps, CELLS, strict=True))


class MultiScale(nn.Module):
    """MS module: descriptor (B, 112) of four stages.

    A stage goes through a 1x1 convolution without bias (not the last one), is averaged over a few cells, flattened and
    mapped linearly to 28 numbers. Convolution and average commute, so stages are averaged first: 49 times fewer
    multiplications at 224 pixels, and maps that were pooled before (``pool_stages``) give the same descriptor.

    Args:
        channels: channels of the four stages.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(
            nn.Conv2d(into, out, 1, bias=False) for into, out in zip(channels[:3], REDUCED, strict=True)
        )
        flat = [out * cells**2 for out, cells in zip((*REDUCED, channels[3]), CELLS, strict=True)]
        widths = (BRANCH, BRANCH, BRANCH, WIDTH - 3 * BRANCH)
        self.project = nn.ModuleList(nn.Linear(into, out) for into, out in zip(flat, widths, strict=True))
        for layer in (*self.reduce, *self.project):
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Descriptor of maps (B, C_i, S_i, S_i), pooled or not."""
        pooled = pool_stages(maps)
        reduced = [conv(stage) for conv, stage in zip(self.reduce, pooled[:3], strict=True)]
        return torch.cat(
            [linear(x.flatten(1)) for linear, x in zip(self.project, (*reduced, pooled[3]), strict=True)], 1
        )


class LastScale(nn.Module):
    """MS switched off: descriptor (B, 112) of the average of the last stage alone."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.project = nn.Linear(channels[-1], WIDTH)
        nn.init.kaiming_normal_(self.project.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Descriptor of the last of the four maps."""
        return self.project(pool_to(maps[-1], 1).flatten(1))


# ---- heads and networks --------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """Scores (B,), and logits of the quality levels (B, classes) where the network has them."""

    score: Tensor
    level: Tensor | None


class Heads(nn.Module):
    """Shared perceptron 112 - 112 - 14 (LeakyReLU), a linear score, and logits of the levels (14 - 14 - classes)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, HIDDEN), nn.LeakyReLU())
        self.score = nn.Linear(HIDDEN, 1)
        self.level = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, classes))

    def forward(self, descriptor: Tensor) -> Prediction:
        """Both predictions from descriptors (B, 112)."""
        shared = self.shared(descriptor)
        return Prediction(self.score(shared).view(-1), self.level(shared))


class PMTIQA(nn.Module):
    """The whole network: trunk, descriptor, heads.

    Args:
        channels: channels of the four stages.
        trunk: gives the stages of normalised images; ``None`` when the network is called with the stages themselves.
        multi_scale: MS module, or the last stage alone.
        classes: quality levels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        trunk: nn.Module | None = None,
        multi_scale: bool = True,
        classes: int = CLASSES,
    ) -> None:
        super().__init__()
        self.trunk = nn.Identity() if trunk is None else trunk
        self.scales = MultiScale(channels) if multi_scale else LastScale(channels)
        self.heads = Heads(classes)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Prediction:
        """Predictions for images (B, 3, S, S), or for their four maps when there is no trunk."""
        return self.heads(self.scales(self.trunk(x)))


class LinearRegression(nn.Module):
    """The simple baseline: a linear score on the averaged last stage."""

    def __init__(self, channels: Sequence[int], trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Identity() if trunk is None else trunk
        self.score = nn.Linear(channels[-1], 1)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Prediction:
        """Scores for images, or for their four maps when there is no trunk; no levels."""
        return Prediction(self.score(pool_to(self.trunk(x)[-1], 1).flatten(1)).view(-1), None)


class Arm(NamedTuple):
    """A variant: schedule of the two losses, MS on or off, and the linear baseline."""

    schedule: str
    multi_scale: bool = True
    linear: bool = False


ARMS = {
    "pmt_iqa": Arm("progressive"),
    "no_ms": Arm("progressive", multi_scale=False),
    "regression": Arm("regression"),
    "static": Arm("static"),
    "reversed": Arm("reversed"),
    "plain": Arm("regression", multi_scale=False),
    "linear": Arm("regression", multi_scale=False, linear=True),
}
"""The method, its ablations (MS off, PMT off, neither), static and reversed weights, and the linear baseline."""


def build(arm: str, channels: Sequence[int], trunk: nn.Module | None = None) -> PMTIQA | LinearRegression:
    """The network of an arm of ``ARMS``.

    Raises:
        ValueError: unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}, expected one of {', '.join(ARMS)}")
    if ARMS[arm].linear:
        return LinearRegression(channels, trunk)
    return PMTIQA(channels, trunk, ARMS[arm].multi_scale)


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


# ---- labels and losses ---------------------------------------------------------------------------------------------

LEVEL_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "live": lambda score: (score / 10).abs().floor().clamp(max=CLASSES - 1),  # 100 and more belong to 9
    "livec": lambda score: (score / 10).round(),
    "koniq": lambda score: (score / 10).round(),
    "csiq": lambda score: (score * 10).round(),
    "bid": lambda score: (score / 0.5).floor(),
    "tid2013": lambda score: score.floor(),
    "kadid": lambda score: ((score - 1) / 0.4).floor(),
}
"""Quality level of a score, by data set; ``round`` takes halves to the even number, as the official code does.

TID2013 and KADID-10k have no rule there: steps of one, and a tenth of KADID's scale from 1 to 5.
"""


def quality_levels(scores: Tensor, rule: str) -> tuple[Tensor, int]:
    """Levels 0 .. 9 (int64) of scores (N,), and how many lay outside of them and were moved to the nearest.

    Raises:
        ValueError: unknown rule.
    """
    if rule not in LEVEL_RULES:
        raise ValueError(f"unknown data set {rule!r}, expected one of {', '.join(LEVEL_RULES)}")
    levels = LEVEL_RULES[rule](scores.float()).long()
    inside = levels.clamp(0, CLASSES - 1)
    return inside, int((levels != inside).sum())


def loss_weights(
    schedule: str, epoch: int, epochs: int, static: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """Weights of the regression and of the classification loss in an epoch (0 .. epochs - 1).

    ``progressive``: from (0, 1) to (1, 0) in equal steps; ``reversed``: the other way; ``regression``: (1, 0);
    ``static``: as given. With a single epoch the first two are (1, 0).

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in ("progressive", "reversed", "regression", "static"):
        raise ValueError(f"unknown schedule {schedule!r}, expected progressive, reversed, regression or static")
    if schedule == "static":
        return static
    if schedule == "regression" or epochs == 1:
        return 1.0, 0.0
    progress = epoch / (epochs - 1)
    return (progress, 1 - progress) if schedule == "progressive" else (1 - progress, progress)


def multitask_loss(prediction: Prediction, score: Tensor, level: Tensor, weights: tuple[float, float]) -> Tensor:
    """lam1 mean |score - prediction| + lam2 cross entropy of the level.

    Args:
        prediction: of a batch. score: (B,) targets. level: (B,) int64. weights: (lam1, lam2).

    A loss of weight 0 stays in the graph: its head gets a gradient of zeros, as it has in the official code.
    """
    loss = weights[0] * F.l1_loss(prediction.score.float(), score)
    if prediction.level is not None:
        loss = loss + weights[1] * F.cross_entropy(prediction.level.float(), level)
    return loss


def learning_rate(base: float, epoch: int, every: int = 6) -> float:
    """Learning rate of an epoch: after epoch t the released code continues with base / 10^(t // 6).

    So epochs 0 .. 6 run at ``base``, 7 .. 12 at a tenth of it, 13 .. 18 at a hundredth.
    """
    return base / 10 ** (max(epoch - 1, 0) // every)


# ---- evaluation ----------------------------------------------------------------------------------------------------


def _correlation(prediction: Any, target: Any, of: Callable[[np.ndarray, np.ndarray], float]) -> float:
    x, y = (np.asarray(values, dtype=np.float64) for values in (prediction, target))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        warnings.warn("correlation with a constant is undefined and counted as 0", stacklevel=3)
        return 0.0
    return float(of(x, y))


def srcc(prediction: Any, target: Any) -> float:
    """Spearman's rank correlation; 0 with a warning when either side is constant."""
    from scipy import stats

    return _correlation(prediction, target, lambda x, y: stats.spearmanr(x, y).statistic)


def plcc(prediction: Any, target: Any) -> float:
    """Pearson's linear correlation; 0 with a warning when either side is constant."""
    return _correlation(prediction, target, lambda x, y: np.corrcoef(x, y)[0, 1])


def logistic(x: np.ndarray, b1: float, b2: float, b3: float, b4: float, b5: float) -> np.ndarray:
    """The five-parameter logistic curve that image-quality studies fit before PLCC: b1 s(b2 (x - b3)) + b4 x + b5,
    s from -1/2 to 1/2."""
    return b1 * 0.5 * np.tanh(b2 * (x - b3) / 2) + b4 * x + b5


def plcc_logistic(prediction: Any, target: Any) -> float:
    """PLCC after the logistic curve has been fitted to the pairs; plain PLCC where no fit is found or helps."""
    from scipy.optimize import OptimizeWarning, curve_fit

    def fitted(x: np.ndarray, y: np.ndarray) -> float:
        x = (x - x.mean()) / x.std()
        start = (np.ptp(y), 1.0, 0.0, 0.0, y.mean())
        plain = float(np.corrcoef(x, y)[0, 1])
        if len(x) <= len(start):
            return plain
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)
                curve = curve_fit(logistic, x, y, p0=start, maxfev=2000)[0]
        except RuntimeError:
            return plain
        mapped = logistic(x, *curve)
        return plain if np.ptp(mapped) == 0 else max(plain, float(np.corrcoef(mapped, y)[0, 1]))

    return _correlation(prediction, target, fitted)


def correlations(prediction: Any, target: Any) -> dict[str, float]:
    """SRCC, PLCC (as the official code: no curve is fitted) and PLCC after the logistic fit."""
    return {
        "srcc": srcc(prediction, target),
        "plcc": plcc(prediction, target),
        "plcc_logistic": plcc_logistic(prediction, target),
    }


# ---- checkpoints ---------------------------------------------------------------------------------------------------

_OFFICIAL = (
    (r"^res\.lda(\d)_pool\.0\.", lambda m: f"scales.reduce.{int(m[1]) - 1}."),
    (r"^res\.lda(\d)_fc\.", lambda m: f"scales.project.{int(m[1]) - 1}."),
    (r"^res\.", lambda m: "trunk."),
    (r"^fcs\.", lambda m: "heads.shared."),
    (r"^fc_cls\.", lambda m: "heads.level."),
    (r"^fc_mos\.", lambda m: "heads.score."),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of the official ``MultiTaskIQANet`` under the names of ``PMTIQA``; other names are left as they are."""

    def renamed(key: str) -> str:
        for pattern, new in _OFFICIAL:
            key, found = re.subn(pattern, new, key)
            if found:
                break
        return key

    return {renamed(key): value for key, value in state.items()}


def load_weights(net: PMTIQA, state: Mapping[str, Tensor]) -> None:
    """Load a checkpoint of this network or of the official one.

    Raises:
        ValueError: it has other quality levels, another trunk, or lacks weights; both values are named.
    """
    state = from_official(state)
    own = net.state_dict()
    classes = "heads.level.2.weight"
    if classes in state and len(state[classes]) != len(own[classes]):
        raise ValueError(f"the checkpoint has {len(state[classes])} quality levels, this network {len(own[classes])}")
    stages = "scales.project.3.weight" if isinstance(net.scales, MultiScale) else "scales.project.weight"
    if stages in state and state[stages].shape != own[stages].shape:
        names = {spec.channels[-1]: name for name, spec in TRUNKS.items()}
        there, here = (sizes[stages].shape[1] for sizes in (state, own))
        raise ValueError(
            f"the checkpoint's trunk ends in {there} channels ({names.get(there, 'unknown')}), "
            f"this network's in {here} ({names.get(here, 'unknown')})"
        )
    differ = sorted(set(own) ^ set(state))
    if differ:
        where = "the checkpoint lacks" if differ[0] in own else "this network has no"
        raise ValueError(f"{where} {differ[0]!r} ({len(differ)} names differ): another variant or trunk?")
    net.load_state_dict(dict(state))
