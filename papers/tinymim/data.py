"""Images: generated shapes, CIFAR-10, ImageNet with its robustness sets, and ADE20K, each in its published layout.

``Images`` holds small images in memory and augments whole batches; ``FolderImages`` and ``Ade20k`` read files in
worker processes. Every random number comes from a seed that is made of the step and the sample, so a resumed run sees
the same views.
"""

from __future__ import annotations

import io
import math
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.errors import UserError
from shared.seeds import derive_seed, rng_state, seed_everything, set_rng_state

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
View = Literal["pretrain", "tune", "test"]

# ---- generated shapes ------------------------------------------------------------------------------------------------
#
# A shape is a signed distance (negative inside) on the plane; x and y are (N, H, W) in units of the shape's radius.

Distance = Callable[[Tensor, Tensor], Tensor]


def _box(x: Tensor, y: Tensor, half_x: float, half_y: float) -> Tensor:
    return torch.maximum(x.abs() - half_x, y.abs() - half_y)


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.85


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.75, 0.75)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = 0.866 * x.abs() - 0.5 * y
    return torch.maximum(side, y) - 0.5


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.2


def _frame(x: Tensor, y: Tensor) -> Tensor:
    return (torch.maximum(x.abs(), y.abs()) - 0.65).abs() - 0.18


def _star(x: Tensor, y: Tensor) -> Tensor:
    return 0.7 * (torch.hypot(x, y) - 0.65 - 0.3 * (5 * torch.atan2(x, y)).cos())


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.9, 0.7 - torch.hypot(x - 0.5, y))


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 1.0, 0.3)


def _angle(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x + 0.5, y, 0.28, 0.85), _box(x, y - 0.57, 0.78, 0.28))


SHAPES: dict[str, Distance] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "plus": _plus,
    "ring": _ring,
    "frame": _frame,
    "star": _star,
    "crescent": _crescent,
    "bar": _bar,
    "angle": _angle,
}
"""Ten classes by name; a class is what the outline is, whatever its colours, texture, place, size and tilt."""


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _surface(count: int, base: Tensor, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Colour (N, 3, H, W) of a surface: a base colour (N, 3), a linear shade and a grating."""
    angle, phase = (_uniform(generator, 0, 2 * math.pi, count, 1, 1) for _ in range(2))
    frequency = _uniform(generator, 2, 7, count, 1, 1)
    slope = _uniform(generator, -0.12, 0.12, count, 2, 1, 1)
    height = _uniform(generator, 0, 0.12, count, 1, 1)
    shade = slope[:, 0] * x + slope[:, 1] * y + height * (frequency * (angle.cos() * x + angle.sin() * y) + phase).sin()
    return base[:, :, None, None] + shade[:, None]


def generate_shapes(per_class: int, side: int, generator: torch.Generator) -> Images:
    """Images of every class of ``SHAPES``: a textured figure on a textured ground, with a blot behind it and noise.

    Args:
        per_class: images a class. side: of an image, in pixels.
    """
    pixels = []
    axis = torch.linspace(-1, 1, side)
    y, x = (a[None] for a in torch.meshgrid(axis, axis, indexing="ij"))
    for shape in SHAPES.values():
        n = per_class
        radius, tilt = _uniform(generator, 0.5, 0.75, n, 1, 1), _uniform(generator, -0.6, 0.6, n, 1, 1)
        place = (1 - radius)[:, None] * _uniform(generator, -1, 1, n, 2, 1, 1)
        u, v = (x - place[:, 0]) / radius, (y - place[:, 1]) / radius
        u, v = tilt.cos() * u + tilt.sin() * v, tilt.cos() * v - tilt.sin() * u
        ground = torch.rand(n, 3, generator=generator)
        figure = (ground + _uniform(generator, 0.25, 0.75, n, 3)) % 1.0  # differs by at least a quarter a channel
        blot_at, blot_size = _uniform(generator, -1, 1, n, 2, 1, 1), _uniform(generator, 0.15, 0.35, n, 1, 1)
        image = _surface(n, ground, x, y, generator)
        soft = 0.5 * side  # a signed distance of one pixel is 2 / side: edges are one pixel wide
        for distance, base in (
            (torch.hypot(x - blot_at[:, 0], y - blot_at[:, 1]) - blot_size, torch.rand(n, 3, generator=generator)),
            (shape(u, v) * radius, figure),
        ):
            cover = (0.5 - soft * distance).clamp(0, 1)[:, None]
            image = (1 - cover) * image + cover * _surface(n, base, x, y, generator)
        image += 0.04 * torch.randn(image.shape, generator=generator)
        pixels.append((image.clamp(0, 1) * 255).round().byte())
    order = torch.randperm(per_class * len(SHAPES), generator=generator)
    labels = torch.arange(len(SHAPES)).repeat_interleave(per_class)
    return Images(torch.cat(pixels)[order], labels[order], tuple(SHAPES), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


# ---- small images in memory ------------------------------------------------------------------------------------------


def flip_and_shift(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (B, 3, S, S) and move each by up to ``shift`` pixels; edges are repeated."""
    b, side = len(images), images.shape[-1]
    flip = torch.rand(b, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if shift == 0:
        return images
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    top, left = torch.randint(2 * shift + 1, (2, b, 1), generator=generator) + torch.arange(side)
    return padded[torch.arange(b)[:, None, None], :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


def colour_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of images (B, 3, H, W) in [0, 1], each by a factor in 1 +- ``strength``."""
    if strength == 0:
        return images
    bright, contrast, colour = _uniform(generator, 1 - strength, 1 + strength, 3, len(images), 1, 1, 1)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    images = (images * bright).clamp(0, 1)
    grey = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (grey + contrast * (images - grey)).clamp(0, 1)
    grey = (images * weights).sum(1, keepdim=True)
    return (grey + colour * (images - grey)).clamp(0, 1)


@dataclass(frozen=True)
class Images:
    """Small images in memory.

    Attributes:
        pixels: (N, 3, S, S) uint8. labels: (N,) int64. classes: their names. mean, std: for normalising.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Tensor) -> Images:
        """The images at ``index``."""
        return Images(self.pixels[index], self.labels[index], self.classes, self.mean, self.std)

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as a network takes them."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def batch(self, view: View, index: Tensor, seed: int, geometric: bool, jitter: float) -> tuple[Tensor, Tensor]:
        """A batch for one purpose.

        Args:
            view: ``pretrain`` gives (teacher's view, student's view), the same crop, colours changed for the student
                only; ``tune`` and ``test`` give (images, labels). seed: of the augmentation. geometric: mirror and
                shift (``pretrain``; ``tune`` always does). jitter: strength of the change of colours.
        """
        generator = torch.Generator().manual_seed(seed)
        images = self.pixels[index].float() / 255
        if view == "tune" or (view == "pretrain" and geometric):
            images = flip_and_shift(images, max(1, images.shape[-1] // 8), generator)
        if view == "pretrain":
            return self.normalised(images), self.normalised(colour_jitter(images, jitter, generator))
        return self.normalised(images), self.labels[index]


def balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of ``count`` samples with as many of each class as far as they go, in ascending order; 0: all."""
    if count == 0 or count >= len(labels):
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return by_class[rank.argsort(stable=True)[:count]].sort().values


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR_BINARY, CIFAR_JPEG = "cifar-10-batches-bin", "cifar10-jpeg-mini.tar.xz"
CIFAR_COUNTS = {CIFAR_BINARY: (50_000, 10_000), CIFAR_JPEG: (15_000, 3_000)}
CIFAR_ROW = 1 + 3 * 32 * 32


def find_cifar10(folder: Path | None) -> Path:
    """The folder of the binary version, or the archive of JPEGs, below or at ``folder``.

    Raises:
        UserError: neither is there.
    """
    if folder is None:
        raise UserError(f"CIFAR-10 needs --data DIR that holds {CIFAR_BINARY}/ or {CIFAR_JPEG}")
    places = [folder / CIFAR_BINARY, folder / CIFAR_JPEG, folder / "cifar10-jpeg-mini" / CIFAR_JPEG]
    if folder.name == CIFAR_BINARY:
        places.insert(0, folder)
    for path in places:
        if path.exists():
            return path
    raise UserError(f"CIFAR-10: not in {folder}, expected {CIFAR_BINARY}/data_batch_*.bin or {CIFAR_JPEG}")


def load_cifar10(folder: Path | None) -> dict[str, Images]:
    """Training and test images: the official binary files, or ``train|test/<class>/*.jpg`` in a tar archive.

    Raises:
        UserError: missing or malformed; names the file and what is expected.
    """
    path = find_cifar10(folder)
    read = _read_binary_cifar if path.is_dir() else _read_cifar_archive
    out = {}
    for split, (pixels, labels) in read(path).items():
        wrong = (labels > 9).nonzero()
        if len(wrong):
            raise UserError(f"{path} {split}: label {int(labels[wrong[0]])} of image {int(wrong[0])}, expected 0..9")
        out[split] = Images(pixels, labels, CIFAR_CLASSES, CIFAR_MEAN, CIFAR_STD)
    return out


def _read_binary_cifar(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    out = {}
    for split, pattern in (("train", "data_batch_*.bin"), ("test", "test_batch.bin")):
        files = sorted(path.glob(pattern))
        if not files:
            raise UserError(f"{path}: no {pattern} there")
        rows = []
        for file in files:
            raw = np.fromfile(file, dtype=np.uint8)
            if len(raw) == 0 or len(raw) % CIFAR_ROW:
                raise UserError(f"{file} has {len(raw)} bytes, expected a multiple of {CIFAR_ROW} (label and pixels)")
            rows.append(raw.reshape(-1, CIFAR_ROW))
        table = torch.from_numpy(np.concatenate(rows))
        out[split] = (table[:, 1:].reshape(-1, 3, 32, 32).clone(), table[:, 0].long())
    return out


def _read_cifar_archive(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    try:
        with tarfile.open(path) as archive:
            for member in archive:  # once, in order: an xz archive has no random access
                parts = Path(member.name).parts
                if not member.isfile() or len(parts) != 3 or parts[0] not in found:
                    continue
                if parts[1] not in CIFAR_CLASSES:
                    raise UserError(f"{path}: {member.name} is of no class of CIFAR-10")
                file = archive.extractfile(member)
                assert file is not None
                image = _decode(file.read(), f"{path}: {member.name}")
                if image.size != (32, 32):
                    raise UserError(f"{path}: {member.name} is {image.size[0]} x {image.size[1]}, expected 32 x 32")
                pixels, labels = found[parts[0]]
                pixels.append(np.asarray(image))
                labels.append(CIFAR_CLASSES.index(parts[1]))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable tar archive ({error})") from error
    for split, (pixels, _) in found.items():
        if not pixels:
            raise UserError(f"{path}: no {split}/<class>/*.jpg in it")
    return {
        split: (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))
        for split, (pixels, labels) in found.items()
    }


def _decode(source: bytes | Path, name: str) -> Image.Image:
    """An RGB image.

    Raises:
        UserError: not readable.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{name} is not a readable image") from error


# ---- folders of images: ImageNet and its robustness sets -------------------------------------------------------------

ENDINGS = (".jpeg", ".jpg", ".png")
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
ROBUSTNESS_COUNTS = {"imagenet-a": 7_500, "imagenet-r": 30_000}
CORRUPTIONS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Corruptions of ImageNet-C with AlexNet's errors, by which the benchmark's authors divide (github.com/hendrycks)."""


def scan_classes(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of ``<class>/*.JPEG`` below a folder.

    Args:
        classes: names that give the labels (of ImageNet, for sets with some of its classes); default: those found.

    Raises:
        UserError: no such folder, no class folder, or one that ``classes`` does not know.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}, expected <class>/*.JPEG in it")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise UserError(f"{folder} has no class folders, expected <class>/*.JPEG in it")
    known = list(classes or found)
    position = {name: i for i, name in enumerate(known)}
    unknown = [name for name in found if name not in position]
    if unknown:
        raise UserError(f"{folder / unknown[0]}: no such class among the {len(known)} of the training set")
    files, labels = [], []
    for name in found:
        here = _images_in(folder / name)
        files += here
        labels += [position[name]] * len(here)
    if not files:
        raise UserError(f"{folder}: the class folders hold no {' '.join(ENDINGS)}")
    return files, labels, known


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def scan_unlabelled(folder: Path) -> tuple[list[Path], list[int]]:
    """Files for pre-training: class folders, or images side by side (labels are 0 then and never read).

    Raises:
        UserError: no image there.
    """
    if folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
        files, labels, _ = scan_classes(folder)
        return files, labels
    files = _images_in(folder) if folder.is_dir() else []
    if not files:
        raise UserError(f"no images in {folder}, expected {' '.join(ENDINGS)} in it or in class folders")
    return files, [0] * len(files)


@dataclass(frozen=True)
class Augmentation:
    """Views of ImageNet. ``policy``, ``erasing``: RandAugment and random erasing of fine-tuning (timm's names)."""

    image: int
    crop_min: float = 0.2
    jitter: float = 0.4
    policy: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25


class FolderImages(Dataset[Any]):
    """Images of files, transformed when they are asked for; keys are (position, seed)."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int], view: View, how: Augmentation) -> None:
        from torchvision import transforms as T

        self.files, self.labels, self.view = list(files), torch.tensor(labels), view
        bicubic = T.InterpolationMode.BICUBIC
        end = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        if view == "pretrain":
            self.common = T.Compose(
                [T.RandomResizedCrop(how.image, (how.crop_min, 1.0), interpolation=bicubic), T.RandomHorizontalFlip()]
            )
            self.plain = T.Compose(end)
            self.changed = T.Compose([T.ColorJitter(how.jitter, how.jitter, how.jitter), *end])
        elif view == "tune":
            from timm.data import create_transform

            self.plain = create_transform(
                how.image,
                is_training=True,
                auto_augment=how.policy or None,
                color_jitter=None,
                interpolation="bicubic",
                re_prob=how.erasing,
                re_mode="pixel",
                re_count=1,
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
            )
        else:
            enlarged = int(how.image / (224 / 256)) if how.image <= 224 else how.image
            self.plain = T.Compose([T.Resize(enlarged, interpolation=bicubic), T.CenterCrop(how.image), *end])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        """(teacher's view, student's view) for ``pretrain``, else (image, label)."""
        index, seed = key
        image = _decode(self.files[index], str(self.files[index]))
        with seeded(seed):
            if self.view != "pretrain":
                return self.plain(image), self.labels[index]
            crop = self.common(image)
            return self.plain(crop), self.changed(crop)


class seeded:
    """Context in which the global generators start from ``seed``; their state comes back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = rng_state(torch.device("cpu"))
        seed_everything(self.seed)

    def __exit__(self, *_: object) -> None:
        set_rng_state(self.before, torch.device("cpu"))


def corruption_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """(corruption, folder of one severity) of ImageNet-C: ``<corruption>/<1..5>``.

    Raises:
        UserError: a corruption or severity is missing.
    """
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            path = folder / name / str(severity)
            if not path.is_dir():
                raise UserError(f"no {path}, expected {len(CORRUPTIONS)} corruptions with severities 1..5")
            yield name, path


# ---- ADE20K ----------------------------------------------------------------------------------------------------------

ADE_CLASSES, ADE_IGNORED = 150, 255
ADE_COUNTS = {"training": 20_210, "validation": 2_000}
ADE_SCALE = (2048, 512)


def scan_ade20k(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, annotation) of ``images/<split>/*.jpg`` and ``annotations/<split>/*.png``.

    Raises:
        UserError: a folder or an annotation is missing.
    """
    root = folder / "ADEChallengeData2016"
    root = root if root.is_dir() else folder
    images = root / "images" / split
    if not images.is_dir():
        raise UserError(f"no folder {images}, expected ADEChallengeData2016/images/{split}/*.jpg")
    pairs = [(path, root / "annotations" / split / f"{path.stem}.png") for path in sorted(images.glob("*.jpg"))]
    if not pairs:
        raise UserError(f"{images} holds no .jpg")
    lost = [truth for _, truth in pairs if not truth.is_file()]
    if lost:
        raise UserError(f"no {lost[0]} ({len(lost)} annotations are missing)")
    return pairs


def _rescaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Size within ``ratio`` times 2048 x 512, in the same proportions."""
    long, short = (round(ratio * side) for side in ADE_SCALE)
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, round(factor * height)), max(1, round(factor * width))


class Ade20k(Dataset[Any]):
    """ADE20K; keys are (position, seed). Training: a crop and its labels. Test: the image at short side 512, labels
    at their own size. Labels are 0..149, 255 where there is none."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], crop: int | None) -> None:
        self.pairs, self.crop = list(pairs), crop

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import functional as TF

        index, seed = key
        path, truth_path = self.pairs[index]
        image = torch.from_numpy(np.array(_decode(path, str(path)))).permute(2, 0, 1)
        try:
            with Image.open(truth_path) as opened:
                raw = torch.from_numpy(np.array(opened)).long()
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{truth_path} is not a readable image") from error
        if raw.shape != image.shape[1:] or int(raw.max()) > ADE_CLASSES:
            raise UserError(f"{truth_path}: {tuple(raw.shape)} with labels up to {int(raw.max())}, expected "
                            f"{tuple(image.shape[1:])} and at most {ADE_CLASSES}")  # fmt: skip
        truth = torch.where(raw == 0, ADE_IGNORED, raw - 1)
        draw = random.Random(seed)
        ratio = 1.0 if self.crop is None else draw.uniform(0.5, 2.0)
        size = list(_rescaled(*raw.shape, ratio))
        image = TF.resize(image, size, antialias=True)
        if self.crop is None:
            return self._normalised(image), truth
        truth = TF.resize(truth[None], size, interpolation=TF.InterpolationMode.NEAREST)[0]
        image, truth = self._cropped(image, truth, draw)
        if draw.random() < 0.5:
            image, truth = image.flip(-1), truth.flip(-1)
        image = self._normalised(self._distorted(image, draw))
        missing = [0, self.crop - image.shape[2], 0, self.crop - image.shape[1]]
        return F.pad(image, missing), F.pad(truth, missing, value=ADE_IGNORED)

    @staticmethod
    def _normalised(image: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (image.float() / 255 - mean) / std

    def _cropped(self, image: Tensor, truth: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
        """A crop of which no class covers more than three quarters, if ten tries find one."""
        assert self.crop is not None
        for _ in range(10):
            top, left = (draw.randint(0, max(0, side - self.crop)) for side in truth.shape)
            window = (slice(top, top + self.crop), slice(left, left + self.crop))
            counts = truth[window].flatten().bincount(minlength=ADE_IGNORED + 1)[:ADE_IGNORED]
            if int((counts > 0).sum()) > 1 and int(counts.max()) < 0.75 * int(counts.sum()):
                break
        return image[:, window[0], window[1]], truth[window]

    @staticmethod
    def _distorted(image: Tensor, draw: random.Random) -> Tensor:
        """Brightness, contrast, saturation and hue, each changed half of the time."""
        from torchvision.transforms.v2 import functional as TF

        contrast_last = draw.random() < 0.5
        changes: list[tuple[Callable[..., Tensor], float]] = [
            (lambda x, amount: (x.float() + amount).clamp(0, 255).byte(), draw.uniform(-32, 32)),
            (TF.adjust_saturation, draw.uniform(0.5, 1.5)),
            (TF.adjust_hue, draw.uniform(-0.1, 0.1)),
        ]
        changes.insert(len(changes) if contrast_last else 1, (TF.adjust_contrast, draw.uniform(0.5, 1.5)))
        for change, amount in changes:
            if draw.random() < 0.5:
                image = change(image, amount)
        return image


# ---- batches as a function of the step -------------------------------------------------------------------------------


class Feed:
    """Batches of consecutive steps, whether the images lie in memory or in files.

    Args:
        source: ``Images`` (then ``options`` go to ``Images.batch``), or a data set with keys (position, seed).
        index: samples (B,) of a step. share: of a batch (B,), parts of positions with their weights (``Run.shard``).
        purpose: what the augmentation's seeds are derived from. total: steps. workers: processes that read files.
    """

    def __init__(
        self,
        source: Images | Dataset[Any],
        view: View,
        index: Callable[[int], Tensor],
        share: Callable[[Tensor], list[tuple[Tensor, float]]],
        purpose: tuple[Any, ...],
        total: int,
        workers: int = 0,
        **options: Any,
    ) -> None:
        self.source, self.view, self.index, self.share = source, view, index, share
        self.purpose, self.total, self.workers, self.options = purpose, total, workers, options
        self._loaded: Iterator[Any] | None = None

    def __call__(self, step: int) -> list[tuple[tuple[Any, Any], Tensor, float]]:
        """This process's parts of a step: (batch, positions in the step's batch, weight). Steps must follow in turn."""
        parts = self.share(torch.arange(len(self.index(step))))
        if isinstance(self.source, Images):
            seed = derive_seed(*self.purpose, step)
            whole = self.source.batch(self.view, self.index(step), seed, **self.options)
            return [((whole[0][part], whole[1][part]), part, weight) for part, weight in parts]
        if self._loaded is None:
            self._loaded = iter(_loader(self.source, _Keys(self, step), self.workers))
        return [(tuple(next(self._loaded)), part, weight) for part, weight in parts]


class _Keys:
    """The keys of each part of each step from ``first`` on, made as they are needed."""

    def __init__(self, feed: Feed, first: int) -> None:
        self.feed, self.first = feed, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        feed = self.feed
        for step in range(self.first, feed.total):
            index = feed.index(step)
            for part, _ in feed.share(torch.arange(len(index))):
                yield [(i, derive_seed(*feed.purpose, step, i)) for i in index[part].tolist()]


def in_order(
    source: Images | Dataset[Any], batch: int, workers: int = 0, first: int = 0, every: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images with their labels, batch by batch; of the batches only ``first``, ``first + every``, ..."""
    count = len(source)  # type: ignore[arg-type]
    parts = torch.arange(count).split(batch)[first::every]
    if isinstance(source, Images):
        for part in parts:
            yield source.batch("test", part, 0, geometric=False, jitter=0.0)
        return
    yield from _loader(source, [[(i, 0) for i in part.tolist()] for part in parts], workers)


def _loader(source: Dataset[Any], keys: Any, workers: int) -> DataLoader[Any]:
    """A loader that draws nothing from the global generator: a resumed run must find it as it was."""
    return DataLoader(source, batch_sampler=keys, num_workers=workers, generator=torch.Generator())
