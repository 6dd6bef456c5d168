"""Domain generalisation: image folders by environment, hold-outs, leave-one-domain-out, and rules that pick a model.

The layout is DomainBed's: ``<data>/<set>/<environment>/<class>/<image>``. Environments and classes are the folders in
sorted order, so that a number means the same environment everywhere::

    PACS/{art_painting,cartoon,photo,sketch}/<7 classes>/*
    VLCS/{Caltech101,LabelMe,SUN09,VOC2007}/<5 classes>/*
    office_home/{Art,Clipart,Product,Real World}/<65 classes>/*
    terra_incognita/{location_100,location_38,location_43,location_46}/<10 classes>/*
    domain_net/{clip,info,paint,quick,real,sketch}/<345 classes>/*
    sviro/{aclass,escape,hilux,i3,lexus,tesla,tiguan,tucson,x5,zoe}/<7 classes>/*
    CUB_DG/{Candy,Mosaic,Natural,Udnie}/<200 classes>/*
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import UserError
from shared.seeds import derive_seed

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Layout:
    """What a published set holds.

    Attributes:
        folder: below the data folder.
        environments: folders of the environments, sorted.
        classes: how many.
        images: how many in all, where it is stated; 0 where it is not.
    """

    folder: str
    environments: tuple[str, ...]
    classes: int
    images: int = 0


LAYOUTS = {
    "pacs": Layout("PACS", ("art_painting", "cartoon", "photo", "sketch"), 7, 9991),
    "vlcs": Layout("VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007"), 5, 10729),
    "office_home": Layout("office_home", ("Art", "Clipart", "Product", "Real World"), 65, 15588),
    "terra_incognita": Layout(
        "terra_incognita", ("location_100", "location_38", "location_43", "location_46"), 10, 24788
    ),
    "domain_net": Layout("domain_net", ("clip", "info", "paint", "quick", "real", "sketch"), 345, 586575),
    "sviro": Layout(
        "sviro", ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"), 7, 56000
    ),
    "cub_dg": Layout("CUB_DG", ("Candy", "Mosaic", "Natural", "Udnie"), 200),
}


@dataclass(frozen=True)
class Environment:
    """Images of one environment.

    Attributes:
        name: its folder.
        paths: files in sorted order. labels: (n,) int64, number of the class in sorted order.
    """

    name: str
    paths: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)


def read_environments(data: Path, dataset: str) -> tuple[list[Environment], tuple[str, ...]]:
    """Index a set's images; nothing is decoded.

    Args:
        data: folder above the set's own, or the set's own.
        dataset: a key of ``LAYOUTS``.

    Returns:
        environments in sorted order, and the names of the classes.

    Raises:
        UserError: a folder is missing, the environments' classes differ, or an environment has no image.
        ValueError: no such set.
    """
    if dataset not in LAYOUTS:
        raise ValueError(f"no set {dataset!r}, expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[dataset]
    root = data if data.name == layout.folder else data / layout.folder
    if not root.is_dir():
        raise UserError(f"{dataset}: no folder {root}, expected it with {', '.join(layout.environments)} inside")
    missing = [name for name in layout.environments if not (root / name).is_dir()]
    if missing:
        raise UserError(f"{dataset}: {root} has no folder {', '.join(missing)}")
    classes: tuple[str, ...] = ()
    environments = []
    for name in layout.environments:
        here = tuple(sorted(path.name for path in (root / name).iterdir() if path.is_dir()))
        classes = classes or here
        if here != classes:
            odd = sorted(set(here) ^ set(classes))
            raise UserError(f"{dataset}: {root / name} has other classes than {layout.environments[0]}: {odd[:3]}")
        files = [
            (path, label)
            for label, word in enumerate(classes)
            for path in sorted((root / name / word).iterdir())
            if path.suffix.lower() in IMAGES
        ]
        if not files:
            raise UserError(f"{dataset}: {root / name} holds no image, expected <class>/*.jpg or *.png")
        paths, labels = zip(*files)
        environments.append(Environment(name, tuple(paths), torch.tensor(labels, dtype=torch.int64)))
    return environments, classes


def describe(dataset: str, environments: Sequence[Environment], classes: Sequence[str]) -> list[str]:
    """Lines for ``--check-data``: what was found, and where it differs from what was published."""
    layout = LAYOUTS[dataset]
    total = sum(len(environment) for environment in environments)
    lines = [f"{dataset}: {environment.name}: {len(environment)} images" for environment in environments]
    stated = f", published: {layout.images}" if layout.images else ""
    lines.append(f"{dataset}: {total} images in all{stated}; {len(classes)} classes, published: {layout.classes}")
    return lines


def hold_out(n: int, share: float, *purpose: object) -> tuple[Tensor, Tensor]:
    """Split ``n`` samples at random into a large part and one held out.

    Args:
        share: of the samples that are held out (rounded down, as DomainBed does).
        purpose: seed, environment and whatever else the draw may depend on.

    Returns:
        (n - floor(share n),) and (floor(share n),) int64 numbers of samples.

    Raises:
        ValueError: either part would be empty.
    """
    held = int(n * share)
    if not 0 < held < n:
        raise ValueError(f"cannot hold out {share} of {n} samples, expected both parts to have at least one")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed("hold out", *purpose)))
    return order[held:], order[:held]


def leave_one_out(names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each environment in turn as the one to test on, with those that are left to train on.

    Raises:
        ValueError: fewer than two environments, or a name twice.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"leaving one out needs two or more different environments, got {', '.join(names) or 'none'}")
    for test in names:
        yield test, tuple(name for name in names if name != test)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be picked.

    Attributes:
        validation: accuracy on the held-out part of each training environment.
        test: accuracy in the environment left out of training.
    """

    validation: dict[str, float]
    test: float


def by_training_domains(candidates: Sequence[Candidate]) -> int:
    """Number of the candidate with the best mean accuracy on held-out training data; the first of equals.

    Raises:
        ValueError: no candidate, or one without validation.
    """
    return _best([sum(c.validation.values()) / max(len(c.validation), 1) for c in _some(candidates)])


def by_oracle(candidates: Sequence[Candidate]) -> int:
    """Number of the candidate with the best accuracy in the environment left out; not to be had in practice."""
    return _best([c.test for c in _some(candidates)])


def by_leaving_out(scores: Sequence[Sequence[float]]) -> int:
    """Leave-one-domain-out cross-validation over hyper-parameters.

    Args:
        scores: for each choice of hyper-parameters, accuracies in training environments that its runs left out as well.

    Returns:
        number of the choice with the best mean; the first of equals.

    Raises:
        ValueError: no choice, or one without a score.
    """
    if not scores or any(not row for row in scores):
        raise ValueError("leave-one-domain-out needs at least one choice, each with at least one score")
    return _best([sum(row) / len(row) for row in scores])


def _some(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    if not candidates or any(not candidate.validation for candidate in candidates):
        raise ValueError("picking a model needs at least one candidate, each with a validated environment")
    return candidates


def _best(scores: Sequence[float]) -> int:
    if any(math.isnan(score) for score in scores):
        raise ValueError("picking a model needs scores that are numbers")
    return max(range(len(scores)), key=lambda number: (scores[number], -number))
