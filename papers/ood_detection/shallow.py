"""Detectors on vectors: density, distance and reconstruction, and small networks that learn from one class.

``fit(x)`` and ``score(x)`` as in ``model.py``: x is (N, D), a higher score means more in-distribution. ``fit_score(x)``
scores the samples that are fitted themselves, for outlier detection: a sample is no neighbour of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 1024
"""Rows of a distance matrix that are held at once."""


class Detector:
    """Same interface as ``model.Detector`` on (N, D) vectors; works in float64 unless it says otherwise."""

    family: ClassVar[str] = "distance"

    def fit(self, x: Tensor, y: Tensor | None = None) -> Detector:
        """Estimate what the score needs; labels are not used.

        Raises:
            ValueError: not (N, D) with at least two samples, or not finite.
        """
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{type(self).__name__} expects (N, D) with at least 2 samples, got {tuple(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{type(self).__name__}: a training value is not finite")
        self.width = x.shape[1]
        self.prepare(x.double())
        return self

    def score(self, x: Tensor) -> Tensor:
        """(N,) scores.

        Raises:
            ValueError: not fitted, another width, or a score that is not a number.
        """
        width = getattr(self, "width", None)
        if width is None:
            raise ValueError(f"{type(self).__name__} is not fitted: call fit first")
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"{type(self).__name__}: got {tuple(x.shape)}, it was fitted on vectors of {width} values")
        return self._numbers(self.rate(x.double()))

    def fit_score(self, x: Tensor) -> Tensor:
        """(N,) scores of the samples that are fitted."""
        return self.fit(x).score(x)

    def _numbers(self, values: Tensor) -> Tensor:
        if bool(values.isnan().any()):
            raise ValueError(f"{type(self).__name__}: a score is not a number")
        return values

    def prepare(self, x: Tensor) -> None:
        """What a subclass estimates."""
        raise NotImplementedError

    def rate(self, x: Tensor) -> Tensor:
        """What a subclass scores."""
        raise NotImplementedError


def square_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and squared Euclidean distances to all of b, block by block: one matrix product each."""
    squares = b.square().sum(1)
    for begin in range(0, len(a), BLOCK):
        rows = slice(begin, min(begin + BLOCK, len(a)))
        part = a[rows]
        yield rows, torch.addmm(part.square().sum(1)[:, None] + squares, part, b.T, alpha=-2).clamp_min_(0)


def neighbours(a: Tensor, b: Tensor, k: int, own: bool = False) -> tuple[Tensor, Tensor]:
    """Distances (N, k), ascending, and places (N, k) of the nearest rows of b; ``own``: a is b, leave itself out."""
    if k > len(b) - own:
        raise ValueError(f"k is {k}, there are {len(b) - own} other samples")
    distance, place = a.new_empty(len(a), k), torch.empty(len(a), k, dtype=torch.long)
    for rows, squares in square_distances(a, b):
        if own:
            index = torch.arange(rows.start, rows.stop)
            squares[index - rows.start, index] = math.inf
        near = squares.topk(k, 1, largest=False)
        place[rows] = near.indices
        # the product loses digits of small distances: those of the neighbours are taken again
        distance[rows] = (a[rows][:, None] - b[near.indices]).norm(dim=2) if k <= 64 else near.values.sqrt()
    return distance, place


# ---- distance --------------------------------------------------------------------------------------------------------


class Centre(Detector):
    """Distance to the mean of the training samples."""

    def prepare(self, x: Tensor) -> None:
        self.mean = x.mean(0)

    def rate(self, x: Tensor) -> Tensor:
        return -(x - self.mean).norm(dim=1)


class KNN(Detector):
    """Distance to the k-th nearest training sample; ``normalise``: of vectors of length 1."""

    def __init__(self, k: int = 5, normalise: bool = False) -> None:
        self.k, self.normalise = k, normalise

    def _vectors(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) if self.normalise else x

    def prepare(self, x: Tensor) -> None:
        self.bank = self._vectors(x)

    def rate(self, x: Tensor) -> Tensor:
        return -neighbours(self._vectors(x), self.bank, self.k)[0][:, -1]

    def fit_score(self, x: Tensor) -> Tensor:
        self.fit(x)
        return self._numbers(-neighbours(self.bank, self.bank, self.k, own=True)[0][:, -1])


class LOF(Detector):
    """Local outlier factor (Breunig et al. 2000), as scikit-learn computes it."""

    def __init__(self, k: int = 20) -> None:
        self.k = k

    def prepare(self, x: Tensor) -> None:
        self.bank = x
        k = min(self.k, len(x) - 1)
        distance, place = neighbours(x, x, k, own=True)
        self.reach = distance[:, -1]
        self.density = self._density(distance, place)
        self.own = self.density[place].mean(1) / self.density

    def _density(self, distance: Tensor, place: Tensor) -> Tensor:
        return 1 / (torch.maximum(distance, self.reach[place]).mean(1) + 1e-10)  # finite where samples repeat

    def rate(self, x: Tensor) -> Tensor:
        distance, place = neighbours(x, self.bank, min(self.k, len(self.bank) - 1))
        return -self.density[place].mean(1) / self._density(distance, place)

    def fit_score(self, x: Tensor) -> Tensor:
        self.fit(x)
        return self._numbers(-self.own)


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the mean; ``shrink``: covariance of Ledoit and Wolf (2004), else empirical."""

    def __init__(self, shrink: bool = True) -> None:
        self.shrink = shrink

    def prepare(self, x: Tensor) -> None:
        self.mean = x.mean(0)
        centred = x - self.mean
        covariance = centred.T @ centred / len(x)
        if self.shrink:
            covariance = ledoit_wolf(centred, covariance)
        value, vector = torch.linalg.eigh(covariance)
        keep = value > value[-1].clamp_min(1e-300) * len(value) * 1e-12
        self.white = vector[:, keep] / value[keep].sqrt()

    def rate(self, x: Tensor) -> Tensor:
        return -((x - self.mean) @ self.white).square().sum(1)


def ledoit_wolf(centred: Tensor, covariance: Tensor) -> Tensor:
    """(1 - s) S + s mu I, s from the spread of the outer products x x' about S (Ledoit & Wolf 2004, lemma 3.3)."""
    n, d = centred.shape
    mu = covariance.diagonal().mean()
    squares = centred.square()
    delta = (covariance.square().sum() - 2 * mu * covariance.trace() + d * mu**2) / d
    beta = ((squares.T @ squares).sum() / n - covariance.square().sum()) / (n * d)
    share = 0.0 if delta <= 0 else float(min(beta, delta) / delta)
    return (1 - share) * covariance + share * mu * torch.eye(d, dtype=covariance.dtype)


# ---- density ---------------------------------------------------------------------------------------------------------


class KDE(Detector):
    """Log density of Gaussian kernels of one bandwidth."""

    family = "density"

    def __init__(self, bandwidth: float = 3.0) -> None:
        self.bandwidth = bandwidth

    def prepare(self, x: Tensor) -> None:
        self.bank = x

    def rate(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x))
        for rows, squares in square_distances(x, self.bank):
            out[rows] = torch.logsumexp(squares * (-0.5 / self.bandwidth**2), 1)
        norm = math.log(len(self.bank)) + 0.5 * self.width * math.log(2 * math.pi * self.bandwidth**2)
        return out - norm


class GMM(Detector):
    """Log likelihood of a Gaussian mixture on the first principal components (scikit-learn's EM)."""

    family = "density"

    def __init__(self, components: int = 5, dimensions: int = 40, seed: int = 0) -> None:
        self.components, self.dimensions, self.seed = components, dimensions, seed

    def prepare(self, x: Tensor) -> None:
        from sklearn.mixture import GaussianMixture

        self.mean, self.axes = principal(x, self.dimensions)
        self.model = GaussianMixture(self.components, random_state=self.seed, reg_covar=1e-3)
        self.model.fit(((x - self.mean) @ self.axes).numpy())

    def rate(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.model.score_samples(((x - self.mean) @ self.axes).numpy()))


class HBOS(Detector):
    """Sum of log2 densities of one histogram a column (Goldstein & Dengel 2012).

    Args:
        bins: of each column. alpha: added to densities. tolerance: a value outside by at most this share of a bin
            counts to the outermost bin, else it has the column's least density.
    """

    family = "density"

    def __init__(self, bins: int = 10, alpha: float = 0.1, tolerance: float = 0.5) -> None:
        self.bins, self.alpha, self.tolerance = bins, alpha, tolerance

    def prepare(self, x: Tensor) -> None:
        self.low, high = x.amin(0), x.amax(0)
        flat = high == self.low  # a constant column: numpy's range of width 1 about the value
        self.low = torch.where(flat, self.low - 0.5, self.low)
        self.step = (torch.where(flat, high + 0.5, high) - self.low) / self.bins
        place = self._place(x)
        count = torch.zeros(self.width, self.bins, dtype=x.dtype)
        count.scatter_add_(1, place.T, torch.ones_like(x.T))
        self.density = count / (len(x) * self.step[:, None])

    def _place(self, x: Tensor) -> Tensor:
        return ((x - self.low) / self.step).floor().clamp(0, self.bins - 1).long()

    def rate(self, x: Tensor) -> Tensor:
        value = torch.log2(self.density.gather(1, self._place(x).T) + self.alpha)
        high = self.low + self.bins * self.step
        beyond = (x < self.low - self.tolerance * self.step) | (x > high + self.tolerance * self.step)
        least = torch.log2(self.density.amin(1) + self.alpha)
        return torch.where(beyond.T, least[:, None], value).sum(0)


# ---- reconstruction --------------------------------------------------------------------------------------------------


def principal(x: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the first principal axes (D, k) of (N, D); k is at most the rank."""
    mean = x.mean(0)
    k = min(dimensions, *x.shape)
    if len(x) < x.shape[1]:
        return mean, torch.linalg.svd(x - mean, full_matrices=False).Vh[:k].T
    return mean, torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.flip(1)[:, :k]


class PCA(Detector):
    """Distance to the space of the first principal components."""

    family = "reconstruction"

    def __init__(self, dimensions: int = 40) -> None:
        self.dimensions = dimensions

    def prepare(self, x: Tensor) -> None:
        self.mean, self.axes = principal(x, self.dimensions)

    def rate(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        return -(centred - (centred @ self.axes) @ self.axes.T).norm(dim=1)


# ---- classification of one class, by scikit-learn --------------------------------------------------------------------


class OCSVM(Detector):
    """One-class support vector machine (Schoelkopf et al. 2001) with an RBF kernel, by scikit-learn.

    Args:
        nu: share of outliers allowed. standardise: columns of deviation 1 first.
    """

    family = "classification"

    def __init__(self, nu: float = 0.1, standardise: bool = False) -> None:
        self.nu, self.standardise = nu, standardise

    def prepare(self, x: Tensor) -> None:
        from sklearn.svm import OneClassSVM

        self.mean = x.mean(0) if self.standardise else torch.zeros(self.width, dtype=x.dtype)
        std = x.std(0, correction=0) if self.standardise else torch.ones(self.width, dtype=x.dtype)
        self.std = torch.where(std > 1e-12, std, torch.ones_like(std))
        self.model = OneClassSVM(nu=self.nu).fit(((x - self.mean) / self.std).numpy())

    def rate(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.model.decision_function(((x - self.mean) / self.std).numpy()))


class IForest(Detector):
    """Isolation forest (Liu et al. 2008), by scikit-learn."""

    family = "classification"

    def __init__(self, trees: int = 100, seed: int = 0) -> None:
        self.trees, self.seed = trees, seed

    def prepare(self, x: Tensor) -> None:
        from sklearn.ensemble import IsolationForest

        self.model = IsolationForest(n_estimators=self.trees, random_state=self.seed).fit(x.numpy().astype(np.float32))

    def rate(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.model.score_samples(x.numpy().astype(np.float32)))


# ---- small networks that learn from one class ------------------------------------------------------------------------


class Learned(Detector):
    """A network trained in ``fit`` by Adam, in float32; subclasses say what is learned.

    Args:
        epochs, batch, lr, weight_decay: of Adam; the rate falls by 10 after ``milestone`` of the epochs.
        seed: of weights and batches. hidden, code: units.
    """

    weight_decay = 0.0

    def __init__(
        self, epochs: int = 40, batch: int = 64, lr: float = 1e-3, milestone: float = 0.75, seed: int = 0,
        hidden: int = 128, code: int = 32,
    ) -> None:  # fmt: skip
        self.epochs, self.batch, self.lr, self.milestone, self.seed = epochs, batch, lr, milestone, seed
        self.hidden, self.code = hidden, code

    def build(self, x: Tensor) -> nn.Module:
        """The network for (N, D) samples; other state may be set here."""
        raise NotImplementedError

    def loss(self, x: Tensor) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """(N,) scores in evaluation mode."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> None:
        x = x.float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = self.build(x)
            optimizer = torch.optim.Adam(
                self.net.parameters(), self.lr, weight_decay=self.weight_decay, fused=True
            )  # fmt: skip
            for epoch in range(self.epochs):
                if epoch == round(self.milestone * self.epochs):
                    optimizer.param_groups[0]["lr"] = self.lr / 10
                for index in torch.randperm(len(x)).split(self.batch):
                    optimizer.zero_grad()
                    self.loss(x[index]).backward()
                    optimizer.step()
            self.net.eval()
            self.after(x)

    def after(self, x: Tensor) -> None:
        """What is estimated when the network is trained."""

    @torch.no_grad()
    def rate(self, x: Tensor) -> Tensor:
        return self.values(x.float()).double()


class AE(Learned):
    """Squared error of an autoencoder."""

    family = "reconstruction"

    def build(self, x: Tensor) -> nn.Module:
        d, h, c = self.width, self.hidden, self.code
        return nn.Sequential(
            nn.Linear(d, h), nn.ReLU(), nn.Linear(h, c), nn.ReLU(), nn.Linear(c, h), nn.ReLU(), nn.Linear(h, d)
        )  # fmt: skip

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x).square().sum(1).mean()

    def values(self, x: Tensor) -> Tensor:
        return -(self.net(x) - x).square().sum(1)


class VAE(Learned):
    """Evidence lower bound of a variational autoencoder (Kingma & Welling 2014), Gaussian with deviation 0.1 * sqrt(5).

    Scores take the mean code, so that they are the same each time.
    """

    family = "density"
    variance = 0.05

    def build(self, x: Tensor) -> nn.Module:
        d, h, c = self.width, self.hidden, self.code
        self.encoder = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, 2 * c))
        self.decoder = nn.Sequential(nn.Linear(c, h), nn.ReLU(), nn.Linear(h, d))
        return nn.Sequential(self.encoder, self.decoder)

    def bound(self, x: Tensor, noise: bool) -> Tensor:
        """(N,) log p(x | z) - KL(q(z | x) || p(z)), up to a constant."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if noise else mean
        fit = (self.decoder(code) - x).square().sum(1) / (2 * self.variance)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return -fit - divergence

    def loss(self, x: Tensor) -> Tensor:
        return -self.bound(x, True).mean()

    def values(self, x: Tensor) -> Tensor:
        return self.bound(x, False)


class DeepSVDD(Learned):
    """Squared distance to a fixed centre after a network without biases (Ruff et al. 2018, eq. 4).

    The centre is the mean first output, its small entries moved to +-0.1. The milestone is in epochs, not steps.
    """

    family = "distance"
    weight_decay = 5e-7

    def build(self, x: Tensor) -> nn.Module:
        net = nn.Sequential(
            nn.Linear(self.width, self.hidden, bias=False), nn.LeakyReLU(0.1),
            nn.Linear(self.hidden, self.code, bias=False),
        )  # fmt: skip
        with torch.no_grad():
            centre = net(x).mean(0)
        sign = torch.where(centre < 0, -1.0, 1.0)
        self.centre = torch.where(centre.abs() < 0.1, 0.1 * sign, centre)
        return net

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - self.centre).square().sum(1).mean()

    def values(self, x: Tensor) -> Tensor:
        return -(self.net(x) - self.centre).square().sum(1)


def cut_paste(x: Tensor, side: tuple[int, int]) -> Tensor:
    """Images (N, H W) with a random box copied to another place in each (Li et al. 2021), all at once.

    Boxes have 2 % to 15 % of the pixels and aspect ratios of 0.3 to 3.3.
    """
    n, (height, width) = len(x), side
    area = (0.02 + 0.13 * torch.rand(n)) * height * width
    ratio = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * torch.rand(n))
    tall = (area * ratio).sqrt().round().clamp(1, height - 1)
    wide = (area / ratio).sqrt().round().clamp(1, width - 1)
    corner = torch.rand(4, n)
    top, to_top = (corner[:2] * (height - tall)).round()
    left, to_left = (corner[2:] * (width - wide)).round()
    row = torch.arange(height).view(1, -1, 1) - to_top.view(-1, 1, 1)
    column = torch.arange(width).view(1, 1, -1) - to_left.view(-1, 1, 1)
    inside = (row >= 0) & (row < tall.view(-1, 1, 1)) & (column >= 0) & (column < wide.view(-1, 1, 1))
    source = (row + top.view(-1, 1, 1)).clamp(0, height - 1) * width + (column + left.view(-1, 1, 1)).clamp(
        0, width - 1
    )
    moved = x.gather(1, source.flatten(1).long())
    return torch.where(inside.flatten(1), moved, x)


class CutPaste(Learned):
    """A Gaussian on features that tell images from images with a moved box (Li et al. 2021).

    Args:
        side: height and width of the images that the vectors are.
    """

    family = "reconstruction"

    def __init__(self, side: tuple[int, int], **options: Any) -> None:
        super().__init__(**options)
        self.side = side

    def build(self, x: Tensor) -> nn.Module:
        if math.prod(self.side) != self.width:
            raise ValueError(f"CutPaste: images of {self.side} pixels, vectors of {self.width} values")
        self.body = nn.Sequential(
            nn.Linear(self.width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.code), nn.ReLU()
        )
        self.head = nn.Linear(self.code, 1)
        return nn.Sequential(self.body, self.head)

    def loss(self, x: Tensor) -> Tensor:
        both = torch.cat([x, cut_paste(x, self.side)])
        target = (torch.arange(len(both)) >= len(x)).float()
        return F.binary_cross_entropy_with_logits(self.net(both)[:, 0], target)

    def after(self, x: Tensor) -> None:
        with torch.no_grad():
            self.density = Mahalanobis().fit(self.body(x))

    def values(self, x: Tensor) -> Tensor:
        return self.density.score(self.body(x))


DETECTORS: dict[str, Callable[..., Detector]] = {
    "centre": Centre,
    "knn": KNN,
    "lof": LOF,
    "mahalanobis": Mahalanobis,
    "deep_svdd": DeepSVDD,
    "kde": KDE,
    "gmm": GMM,
    "hbos": HBOS,
    "vae": VAE,
    "pca": PCA,
    "ae": AE,
    "cutpaste": CutPaste,
    "ocsvm": OCSVM,
    "iforest": IForest,
}
