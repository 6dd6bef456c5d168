"""Out-of-distribution generalisation by the expansion of features (Ye et al., NeurIPS 2021).

Three parts, each usable alone: how a feature varies between domains and what it says about the class (section 3 of
the paper), the expansion function and the rule that picks a model by it (sections 3 and 5), and the training algorithms
whose models are picked from, in the form DomainBed gave them: ``update(minibatches) -> dict`` and ``predict(x)``.

Everywhere E is the number of domains, K of classes, d of features, G of grid points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- densities, variation, informativeness ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Densities:
    """Class-conditional densities of each feature in each domain, on one grid.

    Attributes:
        values: (d, E, K, G) float32. count: (E, K) samples of each cell; an empty cell has density 0.
        grid: (G,) in units of ``scale``. step: what a sum over the grid is multiplied with.
        scale: the mean standard deviation that the features were divided by. bandwidth: of the kernel, after that.
    """

    values: Tensor
    count: Tensor
    grid: Tensor
    step: float
    scale: float
    bandwidth: float


@dataclass(frozen=True)
class Ruler:
    """Scale, bandwidth and grid: the same for all features, domains and classes, as in the official estimator.

    Attributes:
        scale, bandwidth, low, high: see ``Densities``; the grid goes from low to high.
    """

    scale: float
    bandwidth: float
    low: float
    high: float


def cells(features: Tensor, domain: Tensor, label: Tensor, domains: int, classes: int) -> tuple[Tensor, Tensor]:
    """The cell e K + y of each sample, and the samples of each cell.

    Returns:
        (n,) and (E, K) int64.

    Raises:
        ValueError: shapes do not fit, a number is out of range, a feature is not finite.
    """
    if features.dim() != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected (samples, features)")
    if domain.shape != features.shape[:1] or label.shape != features.shape[:1]:
        raise ValueError(f"{len(features)} samples, but {len(domain)} domains and {len(label)} labels")
    for name, value, bound in (("domain", domain, domains), ("label", label, classes)):
        if len(value) and not 0 <= int(value.min()) <= int(value.max()) < bound:
            raise ValueError(f"{name} from {int(value.min())} to {int(value.max())}, expected 0 to {bound - 1}")
    wrong = ~features.isfinite()
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0, 0])
        columns = int(wrong.any(0).sum())
        raise ValueError(
            f"{columns} feature(s) are not finite, first in domain {int(domain[row])}, class {int(label[row])}"
        )
    cell = domain * classes + label
    return cell, torch.bincount(cell, minlength=domains * classes).view(domains, classes)


class ConstantFeatures(ValueError):
    """A network that answers the same to everything of a class: there is no density to estimate."""


def measure(
    features: Tensor, cell: Tensor, count: Tensor, margin: float = 4.0, official_padding: bool = False
) -> Ruler:
    """Scale and bandwidth by the rule of thumb 1.06 n^(-1/5), from the mean deviation inside cells.

    Args:
        features: (n, d). cell: (n,). count: (E, K).
        margin: bandwidths that the grid reaches beyond the data on either side, so that a density integrates to 1.
        official_padding: cells shorter than the largest are filled with zeros first, which then count in the standard
            deviations and the range, as in the official code; and the grid ends with the data.

    Raises:
        ValueError: no cell has two samples. ConstantFeatures: all features are constant within every cell.
    """
    n = count.flatten().to(features.dtype)
    largest = int(count.max())
    first = torch.zeros(len(n), features.shape[1], dtype=features.dtype, device=features.device)
    first.index_add_(0, cell, features)
    low, high = float(features.min()), float(features.max())
    if official_padding:
        # deviations around the mean of all largest entries of a cell; each of the zeros adds one mean squared
        mean = first / largest
        square = torch.zeros_like(first).index_add_(0, cell, (features - mean[cell]) ** 2)
        square += (largest - n)[:, None] * mean**2
        deviation = (square / max(largest - 1, 1)).sqrt()
        if int(count.min()) < largest:
            low, high = min(low, 0.0), max(high, 0.0)
        margin = 0.0
    else:
        mean = first / n.clamp_min(1)[:, None]
        square = torch.zeros_like(first).index_add_(0, cell, (features - mean[cell]) ** 2)
        deviation = (square / (n - 1).clamp_min(1)[:, None]).sqrt()[n > 1]
    if not len(deviation):
        raise ValueError("no domain has two samples of a class: there is no density to estimate")
    scale = float(deviation.mean())
    # rounding leaves a constant feature a deviation of about 1e-7 of its size
    if scale <= 1e-6 * max(abs(low), abs(high)):
        raise ConstantFeatures(f"all {features.shape[1]} features are constant within every domain and class")
    bandwidth = 1.06 * largest**-0.2  # times the mean deviation of the scaled features, which is 1
    return Ruler(scale, bandwidth, low / scale - margin * bandwidth, high / scale + margin * bandwidth)


def densities(
    features: Tensor,
    domain: Tensor,
    label: Tensor,
    domains: int,
    classes: int,
    points: int = 512,
    method: str = "binned",
    official_padding: bool = False,
    ruler: Ruler | None = None,
) -> Densities:
    """Kernel density estimates of every feature in every domain and class (section 5, released estimator).

    Args:
        features: (n, d). domain, label: (n,) int64.
        points: of the grid; the official code has 10,000.
        method: "binned" shares each sample between its two nearest grid points and convolves all cells of all features
            with the kernel by one Fourier transform, O(n d + E K d G log G); "direct" sums kernels, O(n d G).
        official_padding: see ``measure``; also the official step, range / G, with which a density integrates to
            (G - 1) / G.
        ruler: scale, bandwidth and range from elsewhere, to put other samples on the same grid.

    Raises:
        ValueError: see ``cells`` and ``measure``; fewer than two points; no such method.
    """
    if points < 2 or method not in ("binned", "direct"):
        raise ValueError(f"{points} points by {method!r}, expected two or more by 'binned' or 'direct'")
    cell, count = cells(features, domain, label, domains, classes)
    ruler = ruler or measure(features, cell, count, official_padding=official_padding)
    x = features / ruler.scale
    grid = torch.linspace(ruler.low, ruler.high, points, dtype=x.dtype, device=x.device)
    width = (ruler.high - ruler.low) / (points - 1)
    if method == "binned":
        values = _binned(x, cell, len(count.flatten()), ruler, points, width)
    else:
        values = _direct(x, cell, len(count.flatten()), ruler, grid)
    values /= count.flatten().clamp_min(1)[None, :, None]
    step = width * (points - 1) / points if official_padding else width
    shape = (features.shape[1], domains, classes, points)
    return Densities(values.view(shape), count, grid, step, ruler.scale, ruler.bandwidth)


def _binned(x: Tensor, cell: Tensor, many: int, ruler: Ruler, points: int, width: float) -> Tensor:
    """(d, cells, G) sums of kernels by linear binning and a Fourier transform."""
    d = x.shape[1]
    place = ((x - ruler.low) / width).clamp(0, points - 1)
    left = place.floor().clamp_max(points - 2)
    right_share = place - left
    row = (torch.arange(d, device=x.device) * many + cell[:, None]) * points + left.long()
    mass = x.new_zeros(d * many * points)
    mass.index_add_(0, row.flatten(), (1 - right_share).flatten())
    mass.index_add_(0, (row + 1).flatten(), right_share.flatten())
    reach = min(points - 1, math.ceil(8 * ruler.bandwidth / width))  # the kernel is below 1e-14 beyond
    offset = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) * width
    kernel = torch.exp(-0.5 * (offset / ruler.bandwidth) ** 2) / (ruler.bandwidth * math.sqrt(2 * math.pi))
    length = points + 2 * reach
    length = 1 << (length - 1).bit_length()
    out = torch.empty(d * many, points, dtype=x.dtype, device=x.device)
    kernel_f = torch.fft.rfft(kernel, length)
    for rows, target in zip(mass.view(d * many, points).split(4096), out.split(4096)):  # bounds the memory
        target.copy_(torch.fft.irfft(torch.fft.rfft(rows, length) * kernel_f, length)[:, reach : reach + points])
    return out.clamp_min_(0).view(d, many, points)


def _direct(x: Tensor, cell: Tensor, many: int, ruler: Ruler, grid: Tensor) -> Tensor:
    """(d, cells, G) sums of kernels, a block of features at a time."""
    n, d = x.shape
    out = x.new_zeros(d, many, len(grid))
    block = max(1, 2**24 // (n * len(grid)))  # 64 MiB of kernels
    norm = ruler.bandwidth * math.sqrt(2 * math.pi)
    for start in range(0, d, block):
        part = x[:, start : start + block].T[:, :, None]
        kernels = torch.exp(-0.5 * ((part - grid) / ruler.bandwidth) ** 2) / norm
        out[start : start + block].index_add_(1, cell, kernels)
    return out


def total_variation(p: Densities, between: str) -> Tensor:
    """Total variation 1/2 ∫|p - q| of all pairs (section 3: rho), by one L1 distance matrix a feature.

    Args:
        between: "domains" gives (d, K, E, E), "classes" gives (d, E, K, K). A pair with an empty cell is NaN.
    """
    values = p.values.transpose(1, 2) if between == "domains" else p.values
    there = (p.count.T if between == "domains" else p.count) > 0
    d, a, b, points = values.shape
    rho = torch.cdist(values.reshape(d * a, b, points), values.reshape(d * a, b, points), p=1) * (p.step / 2)
    both = there[:, :, None] & there[:, None, :]
    return rho.view(d, a, b, b).masked_fill(~both, torch.nan).clamp_max(1)


def variation(p: Densities, among: Sequence[int]) -> Tensor:
    """V(h_j, E): the largest distance of a class between two of the domains ``among``, (d,) in [0, 1] (definition 3.1).

    Raises:
        ValueError: fewer than two domains, or no class that two of them share.
    """
    if len(among) < 2:
        raise ValueError(f"variation needs two or more domains, got {list(among)}")
    chosen = torch.as_tensor(list(among), device=p.values.device)
    rho = total_variation(p, "domains")[:, :, chosen][:, :, :, chosen]
    upper = rho[:, :, *torch.triu_indices(len(among), len(among), 1)]  # (d, K, pairs)
    if upper.isnan().all(0).all():
        raise ValueError("no class has samples in two of the domains")
    return upper.nan_to_num(nan=-1.0).amax((1, 2))


def informativeness(p: Densities, among: Sequence[int], over_pairs: str = "mean") -> Tensor:
    """I(h_j, E): the distance of two classes in the domain where they are closest, (d,) in [0, 1] (definition 3.2).

    Args:
        over_pairs: "mean" over the unordered pairs of classes (paper), or "max".

    Raises:
        ValueError: no domain, fewer than two classes, or no pair of classes that is seen in any domain.
    """
    if not len(among) or p.count.shape[1] < 2:
        raise ValueError("informativeness needs at least one domain and two classes")
    if over_pairs not in ("mean", "max"):
        raise ValueError(f"over pairs {over_pairs!r}, expected 'mean' or 'max'")
    k = p.count.shape[1]
    rho = total_variation(p, "classes")[:, torch.as_tensor(list(among), device=p.values.device)]
    upper = rho[:, :, *torch.triu_indices(k, k, 1)]  # (d, E, pairs)
    closest = upper.nan_to_num(nan=torch.inf).amin(1)
    seen = closest[0].isfinite() if len(closest) else closest.new_zeros(closest.shape[1], dtype=torch.bool)
    if not seen.any():
        raise ValueError("no domain has samples of two classes")
    return closest[:, seen].mean(1) if over_pairs == "mean" else closest[:, seen].amax(1)


@dataclass(frozen=True)
class Features:
    """What is known of each of d features of one model.

    Attributes:
        available: (d,) V over the domains that were trained on. everywhere: (d,) V over all (for reports only: it
            takes the labels of the domain left out). informative: (d,) I over the domains that were trained on.
    """

    available: Tensor
    everywhere: Tensor
    informative: Tensor


def examine(
    features: Tensor,
    domain: Tensor,
    label: Tensor,
    domains: int,
    classes: int,
    train: Sequence[int],
    points: int = 512,
    block: int = 64,
    **options: Any,
) -> Features:
    """V and I of every feature of a model.

    Args:
        features: (n, d). domain, label: (n,). train: numbers of the domains trained on.
        block: features whose densities are held at once. options: see ``densities``.

    Raises:
        ValueError: see ``densities``, ``variation``, ``informativeness``.
    """
    cell, count = cells(features, domain, label, domains, classes)
    ruler = measure(features, cell, count, official_padding=bool(options.get("official_padding")))
    parts = []
    for columns in features.split(block, dim=1):
        p = densities(columns, domain, label, domains, classes, points, ruler=ruler, **options)
        parts.append((variation(p, train), variation(p, range(domains)), informativeness(p, train)))
    return Features(*(torch.cat(column) for column in zip(*parts)))


def directions(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Features along ``count`` random unit vectors beside the axes, (n, d + count).

    ``examine`` on them bounds the vector forms: its largest V is at most V_sup, its smallest I at least I_inf
    (section 4). The distances of single coordinates alone bound neither.
    """
    beta = torch.randn(features.shape[1], count, generator=generator).to(features)
    return torch.cat((features, features @ (beta / beta.norm(dim=0))), 1)


# ---- expansion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expansion:
    """The smallest monotone s with s(V_avail) >= V_all and s(x) >= x over a cloud of features (definition 3.3, fig. 1).

    Attributes:
        x: (m,) increasing variations where s rises. y: (m,) its value from there on.
    """

    x: Tensor
    y: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """s(x), any shape: never below x; below the first feature of the cloud it is x itself."""
        if not len(self.x):
            return x
        place = torch.searchsorted(self.x, x.contiguous(), right=True)
        reached = torch.cat((self.y.new_full((1,), -torch.inf), self.y))[place]
        return torch.maximum(reached, x)


def expansion(available: Tensor, everywhere: Tensor) -> Expansion:
    """Learn s from features of any number of models, by a running maximum.

    Args:
        available, everywhere: (m,) V over available and over all domains.

    Raises:
        ValueError: shapes differ.
    """
    if available.shape != everywhere.shape or available.dim() != 1:
        raise ValueError(f"shapes {tuple(available.shape)} and {tuple(everywhere.shape)}, expected two equal lists")
    x, order = available.sort()
    y = torch.maximum(everywhere[order], x).cummax(0).values if len(x) else x
    last = torch.ones(len(x), dtype=torch.bool)  # of equal x the last one holds the maximum
    last[:-1] = x[1:] > x[:-1]
    return Expansion(x[last], y[last])


def learnable(features: Features, s: Callable[[Tensor], Tensor], delta: float) -> bool:
    """Whether a problem's features keep to (s, delta): V_all <= s(V_avail) for all with I >= delta (definition 3.4)."""
    chosen = features.informative >= delta
    return bool((features.everywhere[chosen] <= s(features.available[chosen]) + 1e-6).all())


def unexpanded(features: Features, delta: float, jump: float = 0.2) -> float:
    """Share of the features with I >= delta whose variation grows by no more than ``jump``; NaN without any."""
    chosen = features.informative >= delta
    grows = features.everywhere[chosen] > features.available[chosen] + jump
    return float("nan") if not chosen.any() else 1 - float(grows.float().mean())


# ---- picking a model -------------------------------------------------------------------------------------------------


def mean_variation(features: Features, delta: float) -> float:
    """V_f: mean V over the training domains of the features with I >= delta (Algorithm 1 has delta 0); NaN: none."""
    chosen = features.informative >= delta
    return float(features.available[chosen].mean()) if chosen.any() else float("nan")


@dataclass(frozen=True)
class Choice:
    """What the rules pick among m models.

    Attributes:
        by_accuracy, by_variation, by_criterion: numbers of the models with the best validation accuracy, the smallest
            variation, and the best Acc - r V. weight: r. scores: (m,) Acc - r V, NaN where V is. kept: (m,) bool.
    """

    by_accuracy: int
    by_variation: int
    by_criterion: int
    weight: float
    scores: Tensor
    kept: Tensor


def choose(accuracy: Tensor, variation: Tensor, slack: float = 0.1, restrict_to_kept: bool = False) -> Choice:
    """Algorithm 1: argmax Acc_f - r V_f with r = Std(Acc) / Std(V) over the models within ``slack`` of the best.

    Where all kept models vary alike, r is not defined and accuracy decides. Models without an informative feature
    (V is NaN) can be picked by accuracy only. The first of equals wins; among equal criteria the more accurate.

    Args:
        accuracy, variation: (m,) float. restrict_to_kept: pick among the models that r was estimated on (the released
            code picks among all).

    Raises:
        ValueError: fewer than two models, or no model with a variation.
    """
    if accuracy.shape != variation.shape or accuracy.dim() != 1 or len(accuracy) < 2:
        raise ValueError(f"shapes {tuple(accuracy.shape)} and {tuple(variation.shape)}, expected two or more models")
    acc, v = accuracy.double(), variation.double()
    valid = ~v.isnan()
    if not valid.any():
        raise ValueError("no model has an informative feature: lower the threshold on informativeness")
    kept = valid & (acc > acc[valid].max() - slack)
    spread = float(v[kept].std(correction=0))
    weight = float(acc[kept].std(correction=0)) / spread if spread > 1e-12 else 0.0
    scores = acc - weight * v
    open_to = kept if restrict_to_kept else valid
    best = scores.masked_fill(~open_to, -torch.inf)
    ties = best >= best.max() - 1e-12
    return Choice(
        by_accuracy=int(acc.argmax()),
        by_variation=int(v.masked_fill(~valid, torch.inf).argmin()),
        by_criterion=int(acc.masked_fill(~ties, -torch.inf).argmax()),
        weight=weight,
        scores=scores,
        kept=kept,
    )


# ---- networks --------------------------------------------------------------------------------------------------------


class MLP(nn.Sequential):
    """One hidden layer of d ReLU units on flattened images; the features are its activations."""

    def __init__(self, inputs: int, features: int = 64) -> None:
        super().__init__(nn.Flatten(), nn.Linear(inputs, features), nn.ReLU())
        self.features = features


class SmallCNN(nn.Sequential):
    """Two 3 x 3 convolutions (16, 32), each with a pool of 2, and a layer of d ReLU units, for images of 16 x 16."""

    def __init__(self, channels: int = 1, side: int = 16, features: int = 64) -> None:
        super().__init__(
            *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(32 * (side // 4) ** 2, features), nn.ReLU()),
        )
        self.features = features


class MNISTCNN(nn.Sequential):
    """DomainBed's network for coloured MNIST: four 3 x 3 convolutions with group norm, averaged to 128 features."""

    def __init__(self, channels: int = 2) -> None:
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(((channels, 64), (64, 128), (128, 128), (128, 128))):
            layers += [nn.Conv2d(a, b, 3, stride=2 if i == 1 else 1, padding=1), nn.ReLU(), nn.GroupNorm(8, b)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = 128


class ResNet(nn.Module):
    """torchvision's ResNet-18 or -50 without its classifier, batch norm frozen; 512 or 2,048 features."""

    def __init__(self, depth: int = 50, weights: Any = None) -> None:
        super().__init__()
        import torchvision

        if depth not in (18, 50):
            raise ValueError(f"depth is {depth}, expected 18 or 50")
        self.trunk = getattr(torchvision.models, f"resnet{depth}")(weights=weights)
        self.features = self.trunk.fc.in_features
        self.trunk.fc = nn.Identity()
        self.train()

    def train(self, mode: bool = True) -> ResNet:
        """Batch norm stays as it was trained, whatever ``mode`` is."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, d)."""
        return self.trunk(x)


def make_featurizer(name: str, channels: int, side: int, features: int = 64) -> nn.Module:
    """A feature extractor with an attribute ``features``: mlp, cnn, mnist_cnn, resnet18 or resnet50.

    Raises:
        ValueError: no such network.
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLP(channels * side * side, features),
        "cnn": lambda: SmallCNN(channels, side, features),
        "mnist_cnn": lambda: MNISTCNN(channels),
        "resnet18": lambda: ResNet(18),
        "resnet50": lambda: ResNet(50),
    }
    if name not in makers:
        raise ValueError(f"no network {name!r}, expected one of {', '.join(makers)}")
    return makers[name]()


# ---- algorithms ------------------------------------------------------------------------------------------------------

Batches = Sequence[tuple[Tensor, Tensor]]
"""One (x, y) a training domain: (B, ...) and (B,) int64."""


class Algorithm(nn.Module):
    """DomainBed's contract: ``update`` takes a mini-batch of each training domain, ``predict`` gives logits.

    Subclasses say what they minimise in ``loss``.

    Args:
        featurizer: network with an attribute ``features``. classes, domains: numbers of classes and training domains.
        lr: of Adam.
    """

    def __init__(self, featurizer: nn.Module, classes: int, domains: int, lr: float) -> None:
        super().__init__()
        self.featurizer, self.classes, self.domains, self.lr = featurizer, classes, domains, lr
        self.classifier = nn.Linear(int(featurizer.features), classes)  # type: ignore[arg-type]
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.count: Tensor
        self.optimizer = torch.optim.Adam((*featurizer.parameters(), *self.classifier.parameters()), lr=lr)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """What a checkpoint has to hold beside this module."""
        return {"optimizer": self.optimizer}

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        """Scalars; ``loss`` is minimised."""
        raise NotImplementedError

    def forward(self, minibatches: Batches) -> dict[str, Tensor]:
        """``loss``, so that a wrapper around the module (mixed precision, several devices) sees the whole of it."""
        return self.loss(minibatches)

    def update(
        self,
        minibatches: Batches,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        forward: Callable[[Batches], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """One optimiser step.

        Args:
            minibatches: one a training domain. backward: called with the loss. forward: a wrapper of this module.

        Raises:
            ValueError: another number of mini-batches than training domains.
        """
        if len(minibatches) != self.domains:
            raise ValueError(f"{len(minibatches)} mini-batches, expected one for each of {self.domains} domains")
        self.optimizer.zero_grad()
        logs = (forward or self)(minibatches)
        backward(logs["loss"])
        self.optimizer.step()
        self.count += 1
        return {name: value.detach() for name, value in logs.items()}

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.classifier(self.featurizer(x))

    def together(self, minibatches: Batches) -> tuple[list[Tensor], list[Tensor]]:
        """Features and logits of each domain, by one forward pass over all."""
        sizes = [len(y) for _, y in minibatches]
        z = self.featurizer(torch.cat([x for x, _ in minibatches]))
        return list(z.split(sizes)), list(self.classifier(z).split(sizes))


class ERM(Algorithm):
    """Cross-entropy on all mini-batches together."""

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        _, logits = self.together(minibatches)
        return {"loss": F.cross_entropy(torch.cat(logits), torch.cat([y for _, y in minibatches]))}


def irm_penalty(logits: Tensor, y: Tensor) -> Tensor:
    """IRMv1's squared gradient of a scale w at 1, unbiased: the product of the gradients on two halves.

    d/dw CE(w z, y) at w = 1 is the mean over samples of sum_k softmax(z)_k z_k - z_y, written out so that the graph is
    one pass deep. A batch of one has no second half: 0.
    """
    slope = (logits.softmax(1) * logits).sum(1) - logits.gather(1, y[:, None])[:, 0]
    if len(slope) < 2:
        return slope.sum() * 0
    return slope[0::2].mean() * slope[1::2].mean()


class IRM(Algorithm):
    """Invariant risk minimisation. Adam forgets its moments when the penalty comes in (``anneal`` steps)."""

    def __init__(
        self, featurizer: nn.Module, classes: int, domains: int, lr: float, penalty: float = 1.0, anneal: int = 1000
    ) -> None:
        super().__init__(featurizer, classes, domains, lr)
        self.penalty, self.anneal = penalty, anneal

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        _, logits = self.together(minibatches)
        if int(self.count) == self.anneal:
            self.optimizer.state.clear()
        weight = self.penalty if int(self.count) >= self.anneal else 1.0
        ys = [y for _, y in minibatches]
        nll = torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, ys)]).mean()
        penalty = torch.stack([irm_penalty(z, y) for z, y in zip(logits, ys)]).mean()
        return {"loss": nll + weight * penalty, "penalty": penalty}


class GroupDRO(Algorithm):
    """Weights of domains that grow exponentially with their losses."""

    def __init__(self, featurizer: nn.Module, classes: int, domains: int, lr: float, eta: float = 0.01) -> None:
        super().__init__(featurizer, classes, domains, lr)
        self.eta = eta
        self.register_buffer("q", torch.full((domains,), 1 / domains))
        self.q: Tensor

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        _, logits = self.together(minibatches)
        losses = torch.stack([F.cross_entropy(z, y) for z, (_, y) in zip(logits, minibatches)])
        with torch.no_grad():
            q = self.q * (self.eta * losses).exp()
            self.q.copy_(q / q.sum())
        return {"loss": losses @ self.q}


class Mixup(Algorithm):
    """Mixtures of the mini-batches of random pairs of domains, and of their losses."""

    def __init__(self, featurizer: nn.Module, classes: int, domains: int, lr: float, alpha: float = 0.2) -> None:
        super().__init__(featurizer, classes, domains, lr)
        self.alpha = alpha

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        order = torch.randperm(self.domains).tolist()
        beta = torch.distributions.Beta(self.alpha, self.alpha)
        mixed, pairs = [], []
        for a, b in zip(order, order[1:] + order[:1]):
            (x, y), (x2, y2) = minibatches[a], minibatches[b]
            n, share = min(len(y), len(y2)), float(beta.sample())
            mixed.append(share * x[:n] + (1 - share) * x2[:n])
            pairs.append((y[:n], y2[:n], share))
        logits = self.predict(torch.cat(mixed)).split([len(x) for x in mixed])
        losses = [s * F.cross_entropy(z, y) + (1 - s) * F.cross_entropy(z, y2) for z, (y, y2, s) in zip(logits, pairs)]
        return {"loss": torch.stack(losses).mean()}


class _Matching(Algorithm):
    """Mean cross-entropy and gamma times the mean distance of the features of two domains."""

    def __init__(self, featurizer: nn.Module, classes: int, domains: int, lr: float, gamma: float = 1.0) -> None:
        super().__init__(featurizer, classes, domains, lr)
        self.gamma = gamma

    def distances(self, z: Sequence[Tensor]) -> Tensor:
        """(E, E) distances of the features (n_e, d) of E domains."""
        raise NotImplementedError

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        z, logits = self.together(minibatches)
        nll = torch.stack([F.cross_entropy(part, y) for part, (_, y) in zip(logits, minibatches)]).mean()
        if len(z) < 2:
            return {"loss": nll}
        upper = torch.triu_indices(len(z), len(z), 1)
        penalty = self.distances(z)[upper[0], upper[1]].mean()
        return {"loss": nll + self.gamma * penalty, "penalty": penalty}


class CORAL(_Matching):
    """Mean squared differences of the means and of the covariances of the features."""

    def distances(self, z: Sequence[Tensor]) -> Tensor:
        means = torch.stack([part.mean(0) for part in z])
        covariances = torch.stack([torch.cov(part.T) for part in z]).flatten(1)
        return sum((x[:, None] - x).square().mean(-1) for x in (means, covariances))  # type: ignore[return-value]


class MMD(_Matching):
    """Maximum mean discrepancy with a sum of Gaussian kernels of seven widths."""

    GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)

    def distances(self, z: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(z))
        square = x.square().sum(1)
        square = (square[:, None] + square - 2 * x @ x.T).clamp_min(0)
        kernel = torch.exp(-square * x.new_tensor(self.GAMMAS)[:, None, None]).sum(0)
        share = torch.block_diag(*[x.new_full((1, len(part)), 1 / len(part)) for part in z])  # (E, n)
        mean = share @ kernel @ share.T
        return mean.diagonal()[:, None] + mean.diagonal() - 2 * mean


class DANN(Algorithm):
    """Features that a discriminator cannot tell the domain from; both are trained at each step, with reversed gradient.

    DomainBed alternates steps of the two; reversing the gradient is the method's own form and takes one pass.
    """

    def __init__(self, featurizer: nn.Module, classes: int, domains: int, lr: float, weight: float = 1.0) -> None:
        super().__init__(featurizer, classes, domains, lr)
        self.weight = weight
        d = int(featurizer.features)  # type: ignore[arg-type]
        self.discriminator = nn.Sequential(nn.Linear(d, 64), nn.ReLU(), nn.Linear(64, domains))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def loss(self, minibatches: Batches) -> dict[str, Tensor]:
        z, logits = self.together(minibatches)
        nll = F.cross_entropy(torch.cat(logits), torch.cat([y for _, y in minibatches]))
        domain = torch.cat([torch.full_like(y, e) for e, (_, y) in enumerate(minibatches)])
        told = self.discriminator(_Reverse.apply(torch.cat(z), self.weight))
        adversary = F.cross_entropy(told, domain)
        return {"loss": nll + adversary, "adversary": adversary}


class _Reverse(torch.autograd.Function):
    """Identity forward, gradient times -weight backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


ALGORITHMS: dict[str, type[Algorithm]] = {
    "erm": ERM,
    "irm": IRM,
    "group_dro": GroupDRO,
    "mixup": Mixup,
    "coral": CORAL,
    "mmd": MMD,
    "dann": DANN,
}


def make_algorithm(
    name: str, featurizer: nn.Module, classes: int, domains: int, lr: float, **setting: Any
) -> Algorithm:
    """An algorithm by its name.

    Raises:
        ValueError: no such algorithm, or no such setting of it.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r}, expected one of {', '.join(ALGORITHMS)}")
    try:
        return ALGORITHMS[name](featurizer, classes, domains, lr, **setting)
    except TypeError as error:
        raise ValueError(f"{name} has no setting among {', '.join(setting)}: {error}") from error
