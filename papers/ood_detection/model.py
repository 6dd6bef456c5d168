"""Detectors on trained classifiers and objectives that train for detection, in the terms of the survey of generalised
out-of-distribution detection (Yang, Zhou, Li, Liu, IJCV 2024, arXiv 2110.11334v3, sec. 3 to 5).

One interface: ``fit(x, y)`` and ``score(x)``, where a **higher score means more in-distribution**. Detectors of this
file take a classifier's ``Outputs`` (logits z, features h of the layer before the last), so that one pass over the data
serves all of them; ``shallow.py`` holds those that take vectors. The survey states no equation for a method: lines
name the definition in the paper that brought the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("classification", "density", "distance", "reconstruction")
"""The four families of the survey (fig. 3)."""

# ---- networks --------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A classifier ``head(pool(maps(x)))``; subclasses make ``maps``.

    Attributes:
        head: the last linear layer. width: features before it.
    """

    head: nn.Linear
    width: int

    def maps(self, x: Tensor) -> Tensor:
        """(B, width, ...) activations before pooling."""
        raise NotImplementedError

    def pool(self, maps: Tensor) -> Tensor:
        """(B, width) means over positions."""
        return maps.flatten(2).mean(2) if maps.ndim > 2 else maps

    def features(self, x: Tensor) -> Tensor:
        """(B, width) penultimate features h."""
        return self.pool(self.maps(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) logits z = W h + b."""
        return self.head(self.features(x))


class MLP(Network):
    """Perceptron with two hidden layers.

    Args:
        inputs: pixels. classes: C. hidden: widths. dropout: rate after each hidden layer.
    """

    def __init__(self, inputs: int, classes: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip((inputs, *hidden[:-1]), hidden):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.body = nn.Sequential(*layers)
        self.width = hidden[-1]
        self.head = nn.Linear(self.width, classes)

    def maps(self, x: Tensor) -> Tensor:
        """(B, width): a perceptron has no positions."""
        return self.body(x)


class LeNet(Network):
    """LeNet-5 for 32 x 32 images: 6, 16 and 120 maps of 5 x 5 convolutions, then 84 units."""

    def __init__(self, classes: int, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten(),
            nn.Linear(120, 84), nn.ReLU(),
        )  # fmt: skip
        self.width = 84
        self.head = nn.Linear(84, classes)

    def maps(self, x: Tensor) -> Tensor:
        """(B, 84) from (B, channels, 32, 32); 28 x 28 images are padded."""
        return self.body(F.pad(x, (2, 2, 2, 2)) if x.shape[-1] == 28 else x)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) to (B, after, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(Network):
    """ResNet-18 for 32 x 32 images: a 3 x 3 stem and no max pooling.

    Args:
        classes: C. channels: of the images. planes: maps of the first stage (64 in OpenOOD); width is 8 times that.
    """

    def __init__(self, classes: int, channels: int = 3, planes: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes), nn.ReLU())
        blocks, before = [], planes
        for stage in range(4):
            after = planes * 2**stage
            blocks += [BasicBlock(before, after, 2 if stage else 1), BasicBlock(after, after, 1)]
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.width = before
        self.head = nn.Linear(before, classes)

    def maps(self, x: Tensor) -> Tensor:
        """(B, 8 planes, H / 8, W / 8)."""
        return self.blocks(self.stem(x))


def parameters(net: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in net.parameters())


# ---- what a classifier says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """A classifier on N samples.

    Attributes:
        logits: (N, C). features: (N, D). maps: (N, D, H, W) before pooling, where a network has positions.
        inputs: (N, ...) the samples, for detectors that disturb them.
    """

    logits: Tensor
    features: Tensor
    maps: Tensor | None = None
    inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits)

    def part(self, chosen: Tensor | slice) -> Outputs:
        """Some of the samples."""
        rest = (None if value is None else value[chosen] for value in (self.maps, self.inputs))
        return Outputs(self.logits[chosen], self.features[chosen], *rest)


@torch.no_grad()
def outputs(net: Network, x: Tensor, batch: int = 500, keep_maps: bool = False) -> Outputs:
    """One pass of a classifier, in evaluation mode, over samples (N, ...)."""
    was, device = net.training, net.head.weight.device
    net.eval()
    rows: list[tuple[Tensor, Tensor]] = []
    kept = []
    for part in x.split(batch):
        maps = net.maps(part.to(device))
        features = net.pool(maps)
        rows.append((net.head(features).cpu(), features.cpu()))
        if keep_maps and maps.ndim > 2:
            kept.append(maps.cpu())
    net.train(was)
    logits, features = (torch.cat(column) for column in zip(*rows))
    return Outputs(logits, features, torch.cat(kept) if kept else None, x)


class Detector:
    """Anything that scores samples. ``family`` is the survey's; ``needs`` says what ``fit`` is to be given.

    ``fit(x, y)``: x are ID training samples and y their labels (``None`` where none are needed); ``validation`` are
    held-out ID samples of the same form. ``score(x)``: (N,), higher = more ID.
    """

    family: ClassVar[str] = "classification"
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, net: Network | None = None) -> None:
        self.net = net

    def outputs(self, x: Outputs | Tensor) -> Outputs:
        """Outputs as they are, or those of this detector's network.

        Raises:
            ValueError: samples, and no network.
        """
        if isinstance(x, Outputs):
            return x
        if self.net is None:
            raise ValueError(f"{type(self).__name__}: samples were given and no network, expected Outputs")
        return outputs(self.net, x, keep_maps=True)

    def fit(self, x: Outputs | Tensor, y: Tensor | None = None, validation: Outputs | Tensor | None = None) -> Detector:
        """Estimate what the score needs.

        Raises:
            ValueError: labels or validation samples are needed and missing.
        """
        if "labels" in self.needs and y is None:
            raise ValueError(f"{type(self).__name__} needs labels: fit(x, y)")
        if "validation" in self.needs and validation is None:
            raise ValueError(f"{type(self).__name__} needs held-out samples: fit(x, y, validation)")
        inside = self.outputs(x)
        if y is not None and len(y) != len(inside):
            raise ValueError(f"{type(self).__name__}: {len(inside)} samples and {len(y)} labels")
        self.prepare(inside, y, None if validation is None else self.outputs(validation))
        self.fitted_width = inside.features.shape[1]
        return self

    def score(self, x: Outputs | Tensor) -> Tensor:
        """(N,) scores, higher = more ID.

        Raises:
            ValueError: not fitted, other width than in ``fit``, or a score that is not a number.
        """
        inside = self.outputs(x)
        width = getattr(self, "fitted_width", None)
        if width is None:
            raise ValueError(f"{type(self).__name__} is not fitted: call fit first")
        if inside.features.shape[1] != width:
            raise ValueError(
                f"{type(self).__name__}: features have {inside.features.shape[1]} values, it was fitted on {width}"
            )
        values = self.rate(inside)
        if bool(values.isnan().any()):
            raise ValueError(f"{type(self).__name__}: a score is not a number")
        return values

    def predict(self, x: Outputs | Tensor, threshold: float) -> Tensor:
        """(N,) the class, or -1 where the score is below ``threshold``."""
        inside = self.outputs(x)
        return torch.where(self.score(inside) >= threshold, inside.logits.argmax(1), -1)

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        """What a subclass estimates; nothing by default."""

    def rate(self, x: Outputs) -> Tensor:
        """What a subclass scores."""
        raise NotImplementedError

    def head(self) -> tuple[Tensor, Tensor]:
        """W (C, D) and b (C,) of the last layer, on the CPU.

        Raises:
            ValueError: there is no network.
        """
        if self.net is None:
            raise ValueError(f"{type(self).__name__} needs the network's last layer: give net")
        return self.net.head.weight.detach().cpu(), self.net.head.bias.detach().cpu()


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T log sum exp(z / T) (Liu et al. 2020, eq. 4, with its sign changed)."""
    return temperature * torch.logsumexp(logits / temperature, 1)


# ---- classification: logits and probabilities ------------------------------------------------------------------------


class MSP(Detector):
    """Maximum softmax probability (Hendrycks & Gimpel 2017)."""

    def rate(self, x: Outputs) -> Tensor:
        return x.logits.double().softmax(1).amax(1)  # double: float32 rounds confident samples to ties at 1


class MaxLogit(Detector):
    """Maximum logit, MLS (Hendrycks et al. 2022)."""

    def rate(self, x: Outputs) -> Tensor:
        return x.logits.amax(1)


class Energy(Detector):
    """Energy-based OOD detection, EBO (Liu et al. 2020)."""

    def __init__(self, net: Network | None = None, temperature: float = 1.0) -> None:
        super().__init__(net)
        self.temperature = temperature

    def rate(self, x: Outputs) -> Tensor:
        return energy(x.logits, self.temperature)


class GEN(Detector):
    """Generalised entropy (Liu et al. 2023): -sum over the M largest p of p^g (1 - p)^g."""

    def __init__(self, net: Network | None = None, gamma: float = 0.1, top: int = 100) -> None:
        super().__init__(net)
        self.gamma, self.top = gamma, top

    def rate(self, x: Outputs) -> Tensor:
        p = x.logits.double().softmax(1)
        p = p.topk(min(self.top, p.shape[1]), 1).values
        return -(p**self.gamma * (1 - p) ** self.gamma).sum(1)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [1e-3, 1e3] with the least negative log likelihood of softmax(z / T).

    It is convex in 1 / T: Newton's method, with bisection where a step leaves the bracket of the minimum.
    """
    z = logits.double()
    target = z.gather(1, labels[:, None])[:, 0]
    low, high, beta = 1e-3, 1e3, 1.0
    for _ in range(200):
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        slope = float((mean - target).mean())
        bend = float(((p * z.square()).sum(1) - mean.square()).mean())
        low, high = (beta, high) if slope < 0 else (low, beta)
        new = beta - slope / max(bend, 1e-12)
        if not low < new < high:
            new = math.sqrt(low * high)
        if abs(new - beta) < 1e-10 * beta:
            break
        beta = new
    return 1 / beta


class TempScale(Detector):
    """MSP at the temperature that fits the labels of the validation samples best (Guo et al. 2017)."""

    needs = ("validation",)

    def __init__(self, net: Network | None = None, labels: Tensor | None = None) -> None:
        """``labels``: (M,) of the validation samples."""
        super().__init__(net)
        self.labels = labels

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        if self.labels is None or validation is None or len(self.labels) != len(validation):
            raise ValueError("TempScale needs the labels of the validation samples: TempScale(labels=...)")
        self.temperature = best_temperature(validation.logits, self.labels)

    def rate(self, x: Outputs) -> Tensor:
        return (x.logits.double() / self.temperature).softmax(1).amax(1)


class ODIN(Detector):
    """Temperature and a step on the input that raises the confidence (Liang et al. 2018, eq. 2).

    Args:
        temperature: T. epsilon: size of the step, in units of the input before it was divided by ``std``.
        std: deviation that each channel was divided by.
    """

    def __init__(
        self, net: Network, temperature: float = 1000.0, epsilon: float = 0.0014, std: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__(net)
        self.temperature, self.epsilon, self.std = temperature, epsilon, std

    def rate(self, x: Outputs) -> Tensor:
        if self.net is None or x.inputs is None:
            raise ValueError("ODIN needs the network and the inputs")
        net, device = self.net, self.net.head.weight.device
        was = net.training
        net.eval()
        out = []
        for part in x.inputs.split(500):
            part = part.to(device).clone().requires_grad_(True)
            logits = net(part) / self.temperature
            loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
            (slope,) = torch.autograd.grad(loss, part)
            scale = torch.tensor(self.std, device=device).view(1, -1, *[1] * (part.ndim - 2))
            with torch.no_grad():
                moved = part - self.epsilon * slope.sign() / scale
                out.append((net(moved).double() / self.temperature).softmax(1).amax(1).cpu())
        net.train(was)
        return torch.cat(out)


class KLMatching(Detector):
    """Distance to the typical probabilities of a class (Hendrycks et al. 2022): -min_c KL(p || mean p predicted c).

    Classes that are predicted for no validation sample have no typical probabilities and are left out.
    """

    needs = ("validation",)

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        assert validation is not None
        p = validation.logits.double().softmax(1)
        hit = F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
        found = hit.sum(0) > 0
        typical = (hit.T @ p)[found] / hit.sum(0)[found, None]
        self.log_typical = typical.clamp_min(1e-300).log()

    def rate(self, x: Outputs) -> Tensor:
        p = x.logits.double().softmax(1)
        divergence = torch.xlogy(p, p).sum(1, keepdim=True) - p @ self.log_typical.T  # all pairs in one product
        return -divergence.amin(1)


class GradNorm(Detector):
    """L1 norm of the last layer's gradient of the cross entropy to uniform targets (Huang et al. 2021).

    In closed form: dL/dW = (C p - 1) h', whose norm is |h|_1 sum_c |C p_c - 1|.
    """

    def rate(self, x: Outputs) -> Tensor:
        p = x.logits.double().softmax(1)
        return x.features.double().abs().sum(1) * (p.shape[1] * p - 1).abs().sum(1)


def fit_weibull(tails: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum likelihood of Weibull distributions without shift, all rows at once.

    Args:
        tails: (C, T) positive values.

    Returns:
        shape (C,) and scale (C,).
    """
    x = tails.double()
    top = x.amax(1, keepdim=True)
    log = (x / top).clamp_min(1e-12).log()
    shape = torch.full((len(x), 1), 1.0, dtype=torch.float64)
    for _ in range(200):  # root of sum x^k log x / sum x^k - 1 / k - mean log x, which rises with k
        weight = (shape * log).softmax(1)
        first = (weight * log).sum(1, keepdim=True)
        gap = first - 1 / shape - log.mean(1, keepdim=True)
        slope = (weight * log.square()).sum(1, keepdim=True) - first.square() + shape.square().reciprocal()
        shape = (shape - gap / slope).clamp(shape / 2, shape * 2).clamp(1e-3, 1e6)
    scale = top * ((shape * log).exp().mean(1, keepdim=True)) ** (1 / shape)
    return shape[:, 0], scale[:, 0]


class OpenMax(Detector):
    """Recalibrated softmax with an unknown class (Bendale & Boult 2016, alg. 2); the score is minus its probability.

    Args:
        tail: largest distances to the class's mean logit that the Weibull distribution is fitted to. alpha: classes
            of a sample that are recalibrated.
    """

    needs = ("labels",)

    def __init__(self, net: Network | None = None, tail: int = 20, alpha: int = 3) -> None:
        super().__init__(net)
        self.tail, self.alpha = tail, alpha

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        assert y is not None
        self.means = typical_of(x.logits, x.logits, y)
        distance = (x.logits - self.means[y]).norm(dim=1)
        use = x.logits.argmax(1) == y
        tails = []
        for c in range(x.logits.shape[1]):
            rows = distance[use & (y == c)] if int((use & (y == c)).sum()) > 1 else distance[y == c]
            tails.append(rows.topk(min(self.tail, len(rows))).values.double())
        tails = [torch.cat([row, row.new_full((self.tail - len(row),), float(row.mean()))]) for row in tails]
        stacked = torch.stack(tails)
        self.shift = stacked.amin(1) - 1  # tails begin at 1, as libMR's
        self.shape, self.scale = fit_weibull(stacked - self.shift[:, None])

    def unknown(self, x: Outputs) -> tuple[Tensor, Tensor]:
        """(N, C) recalibrated logits and (N,) the unknown class's."""
        z = x.logits.double()
        n, classes = z.shape
        top = z.topk(min(self.alpha, classes), 1).indices
        weight = torch.zeros_like(z)
        rank = (self.alpha - torch.arange(top.shape[1], dtype=z.dtype)) / self.alpha
        weight.scatter_(1, top, rank.expand(n, -1))
        distance = torch.cdist(z, self.means.double()) - self.shift
        outlying = 1 - torch.exp(-((distance.clamp_min(0) / self.scale) ** self.shape))
        kept = z * (1 - weight * outlying)
        return kept, (z - kept).sum(1)

    def rate(self, x: Outputs) -> Tensor:
        kept, removed = self.unknown(x)
        return -torch.cat([kept, removed[:, None]], 1).softmax(1)[:, -1]


# ---- classification: activations -------------------------------------------------------------------------------------


class ReAct(Detector):
    """Energy with features clipped at a percentile of the ID validation features (Sun et al. 2021)."""

    needs = ("validation",)

    def __init__(self, net: Network, percentile: float = 90.0) -> None:
        super().__init__(net)
        self.percentile = percentile

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        assert validation is not None
        self.threshold = float(np.percentile(validation.features.numpy(), self.percentile))

    def rate(self, x: Outputs) -> Tensor:
        return energy(F.linear(x.features.clamp_max(self.threshold), *self.head()))


class DICE(Detector):
    """Energy with the weights that contribute most on training data (Sun & Li 2022): mean h * W above a percentile."""

    def __init__(self, net: Network, percentile: float = 90.0) -> None:
        super().__init__(net)
        self.percentile = percentile

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        weight, self.bias = self.head()
        contribution = x.features.mean(0) * weight
        self.weight = weight * (contribution > float(np.percentile(contribution.numpy(), self.percentile)))

    def rate(self, x: Outputs) -> Tensor:
        return energy(F.linear(x.features, self.weight, self.bias))


class ASH(Detector):
    """Energy after shaping the last maps (Djurisic et al. 2023): the smallest ``percentile`` % of a sample become 0.

    Args:
        rule: "p" only prunes; "s" scales what is left by exp(sum before / sum after); "b" sets all that is left to
            (sum before) / (number left).
    """

    def __init__(self, net: Network, percentile: float = 65.0, rule: str = "b") -> None:
        super().__init__(net)
        if rule not in ("p", "s", "b"):
            raise ValueError(f"ASH has rules p, s and b, got {rule!r}")
        self.percentile, self.rule = percentile, rule

    def shape(self, maps: Tensor) -> Tensor:
        """(N, D, ...) to the same."""
        flat = maps.flatten(1)
        n = flat.shape[1]
        left = max(1, n - round(n * self.percentile / 100))
        value, place = flat.topk(left, 1)
        before = flat.sum(1, keepdim=True)
        if self.rule == "b":
            value = (before / left).expand_as(value)
        elif self.rule == "s":
            after = value.sum(1, keepdim=True)
            value = value * torch.exp(before / after.where(after > 0, torch.ones_like(after)))
        return torch.zeros_like(flat).scatter_(1, place, value).view_as(maps)

    def rate(self, x: Outputs) -> Tensor:
        shaped = self.shape(x.features if x.maps is None else x.maps)
        pooled = shaped if x.maps is None else shaped.flatten(2).mean(2)
        return energy(F.linear(pooled, *self.head()))


# ---- distance: features ----------------------------------------------------------------------------------------------


def typical_of(values: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """(C, D) means of (N, D) values over the correctly classified samples of each class.

    A class without any takes all of its samples. Raises ``ValueError`` for a class without samples.
    """
    classes = logits.shape[1]
    count = y.bincount(minlength=classes)
    if bool((count == 0).any()):
        raise ValueError(f"classes without training samples: {(count == 0).nonzero().flatten().tolist()}")
    right = logits.argmax(1) == y
    use = right | (y[right].bincount(minlength=classes) == 0)[y]
    hit = F.one_hot(y[use], classes).to(values.dtype)
    return hit.T @ values[use] / hit.sum(0)[:, None]


def class_means(features: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(C, D) means and (N, D) deviations from them, in float64.

    Raises:
        ValueError: a class with fewer than two samples.
    """
    count = y.bincount(minlength=classes)
    if int(count.min()) < 2:
        few = (count < 2).nonzero().flatten().tolist()
        raise ValueError(f"classes with fewer than two training samples: {few}")
    h = features.double()
    means = F.one_hot(y, classes).to(h.dtype).T @ h / count[:, None]
    return means, h - means[y]


def whitening(deviations: Tensor) -> Tensor:
    """(D, R) A with A A' the pseudo-inverse of the covariance of (N, D) deviations (rank R)."""
    value, vector = torch.linalg.eigh(deviations.T @ deviations / len(deviations))
    keep = value > value[-1].clamp_min(1e-300) * len(value) * 1e-12
    return vector[:, keep] / value[keep].sqrt()


def square_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) squared Euclidean distances by one matrix product."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


class MDS(Detector):
    """Mahalanobis distance to the nearest class mean, one covariance for all classes (Lee et al. 2018, eq. 2)."""

    family = "distance"
    needs = ("labels",)

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        assert y is not None
        means, deviations = class_means(x.features, y, x.logits.shape[1])
        self.white = whitening(deviations)
        self.means = means @ self.white

    def rate(self, x: Outputs) -> Tensor:
        return -square_distances(x.features.double() @ self.white, self.means).amin(1)


class RMDS(MDS):
    """Mahalanobis distance relative to that of one Gaussian for all classes (Ren et al. 2021)."""

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        super().prepare(x, y, validation)
        h = x.features.double()
        self.centre = h.mean(0)
        self.background = whitening(h - self.centre)

    def rate(self, x: Outputs) -> Tensor:
        whole = ((x.features.double() - self.centre) @ self.background).square().sum(1)
        return super().rate(x) + whole


class DeepKNN(Detector):
    """Squared distance to the k-th neighbour among normalised training features (Sun et al. 2022)."""

    family = "distance"

    def __init__(self, net: Network | None = None, k: int = 50, block: int = 512) -> None:
        super().__init__(net)
        self.k, self.block = k, block

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        if self.k > len(x):
            raise ValueError(f"DeepKNN: k is {self.k}, there are {len(x)} training samples")
        self.bank = F.normalize(x.features, dim=1)

    def rate(self, x: Outputs) -> Tensor:
        rows = F.normalize(x.features, dim=1).split(self.block)
        near = [(row @ self.bank.T).topk(self.k, 1).values[:, -1] for row in rows]
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b; a feature of zeros has norm 0 and distance 1
        return -(2 - 2 * torch.cat(near)).clamp_min(0)


class ViM(Detector):
    """Energy minus the scaled residual of the features outside of their principal space (Wang et al. 2022).

    Args:
        dimensions: of the principal space; D / 2 where it is D or more. ``None``: D / 2.
    """

    family = "distance"

    def __init__(self, net: Network, dimensions: int | None = None) -> None:
        super().__init__(net)
        self.dimensions = dimensions

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        weight, bias = (value.double() for value in self.head())
        self.origin = -torch.linalg.pinv(weight) @ bias
        h = x.features.double() - self.origin
        wide = h.shape[1]
        size = wide // 2 if self.dimensions is None or self.dimensions > wide else self.dimensions
        vectors = torch.linalg.eigh(h.T @ h / len(h)).eigenvectors  # ascending
        self.residual = vectors[:, : wide - size]
        norm = (h @ self.residual).norm(dim=1).mean()
        self.alpha = float(x.logits.amax(1).mean() / norm) if size < wide else 0.0  # ViM, eq. 5

    def rate(self, x: Outputs) -> Tensor:
        norm = ((x.features.double() - self.origin) @ self.residual).norm(dim=1)
        return energy(x.logits.double()) - self.alpha * norm


class SHE(Detector):
    """Inner product with the mean feature of the predicted class (Zhang et al. 2023)."""

    family = "distance"
    needs = ("labels",)

    def prepare(self, x: Outputs, y: Tensor | None, validation: Outputs | None) -> None:
        assert y is not None
        self.patterns = typical_of(x.features, x.logits, y)

    def rate(self, x: Outputs) -> Tensor:
        return (x.features * self.patterns[x.logits.argmax(1)]).sum(1)


# ---- several passes --------------------------------------------------------------------------------------------------


@torch.no_grad()
def dropout_probabilities(net: Network, x: Tensor, passes: int, generator_seed: int) -> Tensor:
    """(N, C) mean softmax of passes with dropout on (Gal & Ghahramani 2016); batch norms stay in evaluation mode."""
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    device = net.head.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_seed)
        total = sum(net(x.to(device)).double().softmax(1) for _ in range(passes))
    net.eval()
    assert isinstance(total, Tensor)
    return (total / passes).cpu()


@torch.no_grad()
def ensemble_probabilities(nets: Sequence[nn.Module], x: Tensor) -> Tensor:
    """(N, C) mean softmax of several networks (Lakshminarayanan et al. 2017)."""
    out = torch.stack([net.eval()(x.to(next(net.parameters()).device)).double().softmax(1).cpu() for net in nets])
    return out.mean(0)


# ---- objectives that train for detection -----------------------------------------------------------------------------


class Objective(nn.Module):
    """A way to train a network; holds what it adds to it.

    ``loss(net, x, y, outliers, progress)``: mean over the batch; ``progress`` in [0, 1] is the share of training that
    is done. ``logits(net, x)``: (N, C) for accuracy and, unless ``score`` says otherwise, the MSP.
    """

    needs_outliers: ClassVar[bool] = False

    def __init__(self, width: int, classes: int, **options: Any) -> None:
        super().__init__()
        self.width, self.classes = width, classes

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(net(x), y)

    def logits(self, net: Network, x: Tensor) -> Tensor:
        """(N, C) of samples."""
        return net(x)

    def score(self, net: Network, x: Tensor) -> Tensor:
        """(N,) scores of samples, the MSP by default."""
        with torch.no_grad():
            return self.logits(net, x).double().softmax(1).amax(1)

    def outliers_of(self, outliers: Tensor | None) -> Tensor:
        """The outliers.

        Raises:
            ValueError: there are none.
        """
        if outliers is None or not len(outliers):
            raise ValueError(f"{type(self).__name__} needs outliers to train with")
        return outliers


class OutlierExposure(Objective):
    """Cross entropy + 0.5 times the cross entropy of outliers to the uniform distribution (Hendrycks et al. 2019)."""

    needs_outliers = True

    def __init__(self, width: int, classes: int, weight: float = 0.5, **options: Any) -> None:
        super().__init__(width, classes)
        self.weight = weight

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        z = net(torch.cat([x, self.outliers_of(outliers)]))
        inside, outside = z[: len(x)], z[len(x) :]
        return F.cross_entropy(inside, y) + self.weight * uniform_cross_entropy(outside)


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Mean of logsumexp(z) - mean z: log C for uniform logits."""
    return (torch.logsumexp(logits, 1) - logits.mean(1)).mean()


class LogitNorm(Objective):
    """Cross entropy of logits of length 1 / tau (Wei et al. 2022, eq. 5): it does not change with their scale."""

    def __init__(self, width: int, classes: int, tau: float = 0.04, **options: Any) -> None:
        super().__init__(width, classes)
        self.tau = tau

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        return F.cross_entropy(F.normalize(net(x), dim=1, eps=1e-7) / self.tau, y)


class Mixup(Objective):
    """Mean of two losses on a mixture of two samples (Zhang et al. 2018), mixing share from Beta(a, a)."""

    def __init__(self, width: int, classes: int, beta: float = 1.0, **options: Any) -> None:
        super().__init__(width, classes)
        self.beta = torch.distributions.Beta(beta, beta)

    def mix(self, x: Tensor, other: Tensor) -> tuple[Tensor, float]:
        """Mixture and the share of the first."""
        share = float(self.beta.sample())
        return share * x + (1 - share) * other, share

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        order = torch.randperm(len(x)).to(x.device)
        mixed, share = self.mix(x, x[order])
        z = net(mixed)
        return share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[order])


class CutMix(Mixup):
    """As mixup, but a box of one image is pasted into another (Yun et al. 2019); images (B, C, H, W)."""

    def mix(self, x: Tensor, other: Tensor) -> tuple[Tensor, float]:
        """Mixture and the share of pixels of the first."""
        height, width = x.shape[-2:]
        side = math.sqrt(1 - float(self.beta.sample()))
        half = round(height * side) // 2, round(width * side) // 2
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        rows = slice(max(0, row - half[0]), min(height, row + half[0]))
        columns = slice(max(0, column - half[1]), min(width, column + half[1]))
        mixed = x.clone()
        mixed[..., rows, columns] = other[..., rows, columns]
        return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


class GODIN(Objective):
    """Generalised ODIN (Hsu et al. 2020): z = h(f) / g(f), h a cosine, g a sigmoid; the score is max h.

    ``score`` disturbs the input by ``epsilon`` towards a larger score. The network's own last layer is not used.
    """

    def __init__(self, width: int, classes: int, epsilon: float = 0.0025, **options: Any) -> None:
        super().__init__(width, classes)
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.gate = nn.Sequential(nn.Linear(width, 1), nn.BatchNorm1d(1), nn.Sigmoid())

    def parts(self, net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, C) and g (N, 1)."""
        features = net.features(x)
        return F.normalize(features, dim=1) @ F.normalize(self.weight, dim=1).T, self.gate(features)

    def logits(self, net: Network, x: Tensor) -> Tensor:
        """h / g."""
        top, bottom = self.parts(net, x)
        return top / bottom

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        return F.cross_entropy(self.logits(net, x), y)

    def score(self, net: Network, x: Tensor) -> Tensor:
        """max h after the disturbance."""
        x = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.parts(net, x)[0].amax(1).sum(), x)
        with torch.no_grad():
            return self.parts(net, x + self.epsilon * slope.sign())[0].amax(1)


class ConfBranch(Objective):
    """A learned confidence c (DeVries & Taylor 2018): p' = c p + (1 - c) y for half of the batch, budgeted -log c."""

    def __init__(self, width: int, classes: int, budget: float = 0.3, weight: float = 0.1, **options: Any) -> None:
        super().__init__(width, classes)
        self.budget = budget
        self.confidence = nn.Linear(width, 1)
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        features = net.features(x)
        p = net.head(features).softmax(1)
        c = torch.sigmoid(self.confidence(features)).clamp(1e-12, 1 - 1e-6)
        hint = (torch.rand(len(x), 1) < 0.5).to(x.device)
        mixed = torch.where(hint, c * p + (1 - c) * F.one_hot(y, self.classes), p)
        penalty = -c.log().mean()
        loss = F.nll_loss(mixed.clamp_min(1e-12).log(), y) + float(self.weight) * penalty
        self.weight *= 1.01 if float(penalty.detach()) > self.budget else 1 / 1.01
        return loss

    def score(self, net: Network, x: Tensor) -> Tensor:
        """The confidence c."""
        with torch.no_grad():
            return self.confidence(net.features(x)).double()[:, 0]  # rises with sigmoid(c), without its ties


class MCD(Objective):
    """Maximum classifier discrepancy (Yu & Aizawa 2019): two heads that must differ in entropy on outliers.

    After ``begin`` of the training: + max(0, margin - mean (H(p1) - H(p2))) on outliers. The score is minus the L1
    distance of both heads' probabilities.
    """

    needs_outliers = True

    def __init__(
        self, width: int, classes: int, margin: float = 1.2, begin: float = 0.9, weight: float = 0.1, **options: Any
    ) -> None:
        super().__init__(width, classes)
        self.margin, self.begin, self.weight = margin, begin, weight
        self.second = nn.Linear(width, classes)

    def heads(self, net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both."""
        features = net.features(x)
        return net.head(features), self.second(features)

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        aside = self.outliers_of(outliers)
        first, second = self.heads(net, torch.cat([x, aside]))
        n = len(x)
        loss = F.cross_entropy(first[:n], y) + F.cross_entropy(second[:n], y)
        if progress >= self.begin:
            gap = entropy(first[n:]) - entropy(second[n:])
            loss = loss + self.weight * F.relu(self.margin - gap.mean())
        return loss

    def logits(self, net: Network, x: Tensor) -> Tensor:
        """Sum of both heads."""
        first, second = self.heads(net, x)
        return first + second

    def score(self, net: Network, x: Tensor) -> Tensor:
        """Minus the discrepancy."""
        with torch.no_grad():
            first, second = (z.double().softmax(1) for z in self.heads(net, x))
        return -(first - second).abs().sum(1)


def entropy(logits: Tensor) -> Tensor:
    """(N,) entropy over classes."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class VOS(Objective):
    """Virtual outliers (Du et al. 2022): the least likely of many draws from class Gaussians of features.

    A queue of features of each class; with full queues and after ``begin`` of the training, logistic loss on the
    energies of ID features and virtual outliers. The score is the energy.
    """

    def __init__(
        self, width: int, classes: int, queue: int = 100, draws: int = 1000, select: int = 1, weight: float = 0.1,
        begin: float = 0.4, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(width, classes)
        self.draws, self.select, self.weight, self.begin = draws, select, weight, begin
        self.register_buffer("queue", torch.zeros(classes, queue, width))
        self.register_buffer("filled", torch.zeros(classes, dtype=torch.long))
        self.scale, self.classify = nn.Parameter(torch.ones(classes)), nn.Linear(1, 2)

    def energy(self, logits: Tensor) -> Tensor:
        """log sum_c relu(w_c) exp(z_c)."""
        return torch.logsumexp(logits + F.relu(self.scale).clamp_min(1e-6).log(), 1)

    @torch.no_grad()
    def push(self, features: Tensor, y: Tensor) -> None:
        """Newest features of each class into its ring, all classes at once."""
        size = self.queue.shape[1]
        order = y.argsort(stable=True)
        count = y.bincount(minlength=self.classes)
        rank = torch.empty_like(y)
        rank[order] = torch.arange(len(y), device=y.device) - (count.cumsum(0) - count)[y[order]]
        self.queue[y, (self.filled[y] + rank) % size] = features
        self.filled += count

    @torch.no_grad()
    def virtual(self) -> Tensor:
        """(C select, D) outliers."""
        means = self.queue.mean(1)
        deviations = (self.queue - means[:, None]).flatten(0, 1)
        covariance = deviations.T @ deviations / len(deviations)
        factor = torch.linalg.cholesky(covariance + 1e-4 * torch.eye(self.width, device=means.device))
        noise = torch.randn(self.draws, self.width).to(means.device)
        least = noise.square().sum(1).topk(self.select).indices  # density falls with the whitened length
        return (means[:, None] + noise[least] @ factor.T).flatten(0, 1)

    def loss(self, net: Network, x: Tensor, y: Tensor, outliers: Tensor | None, progress: float) -> Tensor:
        features = net.features(x)
        z = net.head(features)
        loss = F.cross_entropy(z, y)
        self.push(features.detach(), y)
        if progress >= self.begin and int(self.filled.min()) >= self.queue.shape[1]:
            both = torch.cat([self.energy(z), self.energy(net.head(self.virtual()))])
            target = (torch.arange(len(both), device=x.device) < len(z)).long()
            loss = loss + self.weight * F.cross_entropy(self.classify(both[:, None]), target)
        return loss

    def score(self, net: Network, x: Tensor) -> Tensor:
        """Energy of the logits."""
        with torch.no_grad():
            return energy(net(x).double())


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "ce": Objective,
    "oe": OutlierExposure,
    "logitnorm": LogitNorm,
    "mixup": Mixup,
    "cutmix": CutMix,
    "godin": GODIN,
    "confbranch": ConfBranch,
    "mcd": MCD,
    "vos": VOS,
    "dropout": Objective,
    "ensemble": Objective,
}
