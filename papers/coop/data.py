"""The paper's eleven data sets and ImageNet's four shifted test sets in their official layout, and a part of CIFAR-10.

Real sets lie below one folder, as DATASETS.md of the official repository lays them out, with the authors' split files
where they have one. The pictures of the default run are generated: drawings.py.
"""

from __future__ import annotations

import io
import math
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json, write_json

Row = tuple[str, int, str]
"""Path below the pictures' folder, label, class name."""
PHOTO = "a photo of a {}."
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Part:
    """Pictures, as files or as arrays (h, w, 3) uint8, and their labels (N,) int64."""

    pictures: Sequence[Path | np.ndarray]
    labels: Tensor

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pictures)


@dataclass(frozen=True)
class ImageSet:
    """A data set: class names in the order of the labels, the hand-written template, three parts."""

    name: str
    names: list[str]
    template: str
    train: Part
    val: Part
    test: Part

    def spec(self) -> dict[str, Any]:
        """What identifies it: names and, of every part, files (or the sum of the pixels) and labels."""
        out: dict[str, Any] = {"name": self.name, "names": self.names}
        for key in ("train", "val", "test"):
            part: Part = getattr(self, key)
            shown = [p.name if isinstance(p, Path) else int(p.sum(dtype=np.int64)) for p in part.pictures]
            out[key] = [shown, part.labels.tolist()]
        return out


@dataclass(frozen=True)
class Source:
    """Where a real data set lies.

    ``folder`` below --data, ``pictures`` below that; ``split`` is the authors' split file; ``counts`` are the usual
    numbers of classes, training, validation and test pictures (0: not fixed); ``make`` reads the set where the split
    file is missing, or always where there is none.
    """

    folder: str
    pictures: str
    template: str
    counts: tuple[int, int, int, int]
    make: Callable[[Path, Source], tuple[list[Row], list[Row], list[Row]]]
    split: str = ""


# ---- reading the official layouts ------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _folders(path: Path, ignored: Iterable[str] = ()) -> list[str]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder, expected one folder a class there")
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    names = [name for name in names if name not in ignored]
    if not names:
        raise UserError(f"{path}: empty, expected one folder a class")
    return names


def _files(path: Path) -> list[str]:
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if not names:
        raise UserError(f"{path}: no pictures there")
    return names


def _cut(names: list[str], shares: Sequence[float], draw: random.Random) -> list[list[str]]:
    """Shuffled and cut into parts of these shares, the rest last."""
    names = names[:]
    draw.shuffle(names)
    out, begin = [], 0
    for share in shares:
        size = round(len(names) * share)
        out.append(names[begin : begin + size])
        begin += size
    return [*out, names[begin:]]


def _by_folder(ignored: Iterable[str] = (), renamed: dict[str, str] | None = None) -> Callable[..., Any]:
    """One folder a class: half for training, a fifth for validation, the rest for testing."""

    def make(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
        draw, parts = random.Random(0), ([], [], [])
        folder = root / source.pictures
        for label, name in enumerate(_folders(folder, ignored)):
            for part, files in zip(parts, _cut(_files(folder / name), (0.5, 0.2), draw), strict=True):
                part.extend((f"{name}/{file}", label, (renamed or {}).get(name, name)) for file in files)
        return parts

    return make


def _with_validation(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """A fifth of each class becomes the validation part."""
    draw, train, val = random.Random(0), [], []
    for label in sorted({row[1] for row in rows}):
        own = [row for row in rows if row[1] == label]
        draw.shuffle(own)
        count = round(len(own) * 0.2)
        val += own[:count]
        train += own[count:]
    return train, val


def _pets(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    def read(name: str) -> list[Row]:
        rows = []
        for line in _lines(root / "annotations" / name):
            words = line.split()
            if len(words) != 4 or not words[1].isdigit():
                raise UserError(f"{root / 'annotations' / name}: {line!r}, expected: picture label species breed")
            rows.append((f"{words[0]}.jpg", int(words[1]) - 1, words[0].rpartition("_")[0].lower()))
        return rows

    return *_with_validation(read("trainval.txt")), read("test.txt")


def _matlab(path: Path, key: str) -> Any:
    """The row vector ``key`` of a MATLAB file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return loadmat(path)[key][0]
    except (KeyError, ValueError, MatReadError) as error:
        raise UserError(f"{path}: no MATLAB file with {key!r}") from error


def _cars(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    names = []
    for entry in _matlab(root / "devkit" / "cars_meta.mat", "class_names"):
        *words, year = str(entry[0]).split(" ")
        names.append(" ".join([year, *words]))

    def read(folder: str, path: Path) -> list[Row]:
        rows = []
        for entry in _matlab(path, "annotations"):
            label = int(entry["class"][0, 0]) - 1
            rows.append((f"{folder}/{entry['fname'][0]}", label, names[label]))
        return rows

    train, val = _with_validation(read("cars_train", root / "devkit" / "cars_train_annos.mat"))
    return train, val, read("cars_test", root / "cars_test_annos_withlabels.mat")


def _flowers(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    labels = _matlab(root / "imagelabels.mat", "labels").astype(int)
    names = read_json(root / "cat_to_name.json", "names of flowers")
    draw, parts = random.Random(0), ([], [], [])
    for label in sorted(set(labels.tolist())):
        files = [f"image_{i + 1:05d}.jpg" for i in np.nonzero(labels == label)[0]]
        for part, own in zip(parts, _cut(files, (0.5, 0.2), draw), strict=True):
            part.extend((file, label - 1, names[str(label)]) for file in own)
    return parts


def _aircraft(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    number = {name: i for i, name in enumerate(_lines(root / "variants.txt"))}

    def read(part: str) -> list[Row]:
        rows = []
        for line in _lines(root / f"images_variant_{part}.txt"):
            picture, _, name = line.partition(" ")
            if name not in number:
                raise UserError(f"{root / f'images_variant_{part}.txt'}: {name!r} is not in variants.txt")
            rows.append((f"{picture}.jpg", number[name], name))
        return rows

    return read("train"), read("val"), read("test")


def _sun(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    number = {line[1:]: i for i, line in enumerate(_lines(root / "ClassName.txt"))}

    def read(name: str) -> list[Row]:
        rows = []
        for line in _lines(root / name):
            place = line[1:].rpartition("/")[0]
            if place not in number:
                raise UserError(f"{root / name}: {place!r} is not in ClassName.txt")
            rows.append(
                (line[1:], number[place], " ".join(reversed(place.split("/")[1:])))
            )  # abbey/outdoor: "outdoor abbey"
        return rows

    return *_with_validation(read("Training_01.txt")), read("Testing_01.txt")


def _ucf(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    lists = root / "ucfTrainTestlist"
    number = {line.split()[1]: int(line.split()[0]) - 1 for line in _lines(lists / "classInd.txt")}

    def read(name: str) -> list[Row]:
        rows = []
        for line in _lines(lists / name):
            action, _, film = line.split()[0].partition("/")
            if action not in number:
                raise UserError(f"{lists / name}: {action!r} is not in classInd.txt")
            words = "_".join(re.findall("[A-Z][^A-Z]*", action))
            rows.append((f"{words}/{Path(film).stem}.jpg", number[action], words))
        return rows

    return *_with_validation(read("trainlist01.txt")), read("testlist01.txt")


def _class_names(root: Path) -> dict[str, str]:
    """Folder -> class name of ImageNet, in the order of the file."""
    names = dict(line.split(" ", 1) for line in _lines(root / "classnames.txt") if " " in line)
    if not names:
        raise UserError(f"{root / 'classnames.txt'}: expected lines such as 'n01440764 tench'")
    return names


def _imagenet_rows(root: Path, pictures: str, numbered: bool = False) -> list[Row]:
    """Pictures of folders named by synset, or by class number where ``numbered``."""
    names, folder = _class_names(root), root / pictures
    found = _folders(folder)
    if numbered:
        found, order = sorted(found, key=lambda f: int(f) if f.isdigit() else -1), list(names.values())
        bad = [f for f in found if not f.isdigit() or int(f) >= len(order)]
    else:
        bad = [f for f in found if f not in names]
    if bad:
        raise UserError(f"{folder}: folder {bad[0]!r} has no class name in {root / 'classnames.txt'}")
    return [
        (f"{f}/{file}", label, order[int(f)] if numbered else names[f])
        for label, f in enumerate(found)
        for file in _files(folder / f)
    ]


def _imagenet(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
    train, test = (
        [(f"{part}/{path}", label, name) for path, label, name in _imagenet_rows(root, f"{source.pictures}/{part}")]
        for part in ("train", "val")
    )
    return train, test, test  # the authors have no other validation set


def _shifted(numbered: bool = False) -> Callable[..., Any]:
    def make(root: Path, source: Source) -> tuple[list[Row], list[Row], list[Row]]:
        return [], [], _imagenet_rows(root, source.pictures, numbered)

    return make


EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
CALTECH = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
_caltech = _by_folder(("BACKGROUND_Google", "Faces_easy"), CALTECH)
_V2 = "imagenetv2-matched-frequency-format-val"
SOURCES = {
    "imagenet": Source("imagenet", "images", PHOTO, (1000, 1281167, 50000, 50000), _imagenet),
    "caltech101": Source(
        "caltech-101", "101_ObjectCategories", PHOTO, (100, 4128, 1649, 2465), _caltech, "split_zhou_Caltech101.json"
    ),
    "oxford_pets": Source(
        "oxford_pets",
        "images",
        "a photo of a {}, a type of pet.",
        (37, 2944, 736, 3669),
        _pets,
        "split_zhou_OxfordPets.json",
    ),
    "stanford_cars": Source("stanford_cars", "", PHOTO, (196, 6509, 1635, 8041), _cars, "split_zhou_StanfordCars.json"),
    "oxford_flowers": Source(
        "oxford_flowers",
        "jpg",
        "a photo of a {}, a type of flower.",
        (102, 4093, 1633, 2463),
        _flowers,
        "split_zhou_OxfordFlowers.json",
    ),
    "food101": Source(
        "food-101",
        "images",
        "a photo of {}, a type of food.",
        (101, 50500, 20200, 30300),
        _by_folder(),
        "split_zhou_Food101.json",
    ),
    "fgvc_aircraft": Source(
        "fgvc_aircraft", "images", "a photo of a {}, a type of aircraft.", (100, 3334, 3333, 3333), _aircraft
    ),
    "sun397": Source("sun397", "SUN397", PHOTO, (397, 15880, 3970, 19850), _sun, "split_zhou_SUN397.json"),
    "dtd": Source(
        "dtd", "images", "{} texture.", (47, 2820, 1128, 1692), _by_folder(), "split_zhou_DescribableTextures.json"
    ),
    "eurosat": Source(
        "eurosat",
        "2750",
        "a centered satellite photo of {}.",
        (10, 13500, 5400, 8100),
        _by_folder(renamed=EUROSAT),
        "split_zhou_EuroSAT.json",
    ),
    "ucf101": Source(
        "ucf101",
        "UCF-101-midframes",
        "a photo of a person doing {}.",
        (101, 7639, 1898, 3783),
        _ucf,
        "split_zhou_UCF101.json",
    ),
    "imagenetv2": Source("imagenetv2", _V2, PHOTO, (1000, 0, 0, 10000), _shifted(numbered=True)),
    "imagenet_sketch": Source("imagenet-sketch", "images", PHOTO, (1000, 0, 0, 50889), _shifted()),
    "imagenet_a": Source("imagenet-adversarial", "imagenet-a", PHOTO, (200, 0, 0, 7500), _shifted()),
    "imagenet_r": Source("imagenet-rendition", "imagenet-r", PHOTO, (200, 0, 0, 30000), _shifted()),
}
TEMPLATE_OF = {name: source.template for name, source in SOURCES.items()} | {
    "drawings": "a drawing of a {}.",
    "sketches": "a sketch of a {}.",
    "cifar10_mini": PHOTO,
}


def _read_split(path: Path) -> tuple[list[Row], ...]:
    """The three parts of a split file.

    Raises:
        UserError: not such a file.
    """
    split = read_json(path, "split")
    parts = []
    for key in ("train", "val", "test"):
        if not isinstance(split, dict) or key not in split:
            raise UserError(f"{path}: no {key!r}, expected train, val and test")
        try:
            parts.append([(str(picture), int(label), str(name)) for picture, label, name in split[key]])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {key} has a row that is not [picture, label, class name]") from error
    return tuple(parts)


def _names_of(rows: Iterable[Row], where: Path) -> list[str]:
    """Class names in the order of the labels.

    Raises:
        UserError: labels are not 0 .. n - 1, or one label has two names.
    """
    names: dict[int, str] = {}
    for _, label, name in rows:
        if names.setdefault(label, name) != name:
            raise UserError(f"{where}: label {label} is {names[label]!r} and {name!r}")
    if sorted(names) != list(range(len(names))):
        missing = [label for label in range(len(names)) if label not in names]
        raise UserError(f"{where}: labels are not 0 to {len(names) - 1}, {missing[0]} is missing")
    return [names[label] for label in range(len(names))]


def select_classes(rows: list[Row], count: int, classes: str) -> list[Row]:
    """Pictures of all classes, of the first half (``base``, rounded up) or of the rest (``new``), labelled from 0."""
    if classes == "all":
        return rows
    half = math.ceil(count / 2)
    if classes == "base":
        return [row for row in rows if row[1] < half]
    return [(picture, label - half, name) for picture, label, name in rows if label >= half]


def load(name: str, data: Path | None, classes: str = "all") -> ImageSet:
    """A real data set. A missing split file is made by the authors' rule (with a fixed seed) and saved, as they do.

    Raises:
        UserError: the data set, a file of it or a picture is missing, or something is malformed.
    """
    source = SOURCES[name]
    if data is None:
        raise UserError(f"{name} needs --data DIR, the folder that holds {source.folder}/")
    root = data / source.folder
    if not root.is_dir():
        raise UserError(f"{name}: no folder {root}; see Data in README.md")
    split = root / source.split if source.split else None
    if split is not None and split.is_file():
        parts = _read_split(split)
    else:
        parts = source.make(root, source)
        if split is not None:
            write_json(split, dict(zip(("train", "val", "test"), parts, strict=True)))
    names = _names_of((row for part in parts for row in part), split or root)
    folder = root / source.pictures
    made = []
    for rows in parts:
        rows = select_classes(rows, len(names), classes)
        made.append(Part([folder / row[0] for row in rows], torch.tensor([row[1] for row in rows], dtype=torch.long)))
    absent = [path for part in made for path in part.pictures if not path.is_file()]  # type: ignore[union-attr]
    if absent:
        shown = ", ".join(str(path) for path in absent[:5])
        raise UserError(f"{name}: {len(absent)} pictures are missing: {shown}{' ...' if len(absent) > 5 else ''}")
    if classes != "all":
        half = math.ceil(len(names) / 2)
        names = names[:half] if classes == "base" else names[half:]
    return ImageSet(name, names, source.template, *made)


def check(name: str, data: Path | None) -> list[str]:
    """Lines about a data set: classes and pictures found, beside the usual numbers."""
    found = load(name, data)
    numbers = (len(found.names), len(found.train), len(found.val), len(found.test))
    lines = []
    for what, count, usual in zip(("classes", "train", "val", "test"), numbers, SOURCES[name].counts, strict=True):
        verdict = "as usual" if count == usual else f"USUALLY {usual}"
        lines.append(f"{name} {what}: {count}" + (f" ({verdict})" if usual else ""))
    return lines


# ---- a part of CIFAR-10 ----------------------------------------------------------------------------------------------


def cifar10_mini(data: Path | None, test: int) -> ImageSet:
    """A balanced part of CIFAR-10 as JPEG files: train|test/<class>/<number>.jpg, in a folder or in its archive.

    The last 20 training pictures of a class are for validation; ``test`` of each class are tested on (0: all).

    Raises:
        UserError: nothing there, a class without pictures, a damaged archive.
    """
    if data is None:
        raise UserError("cifar10_mini needs --data DIR with cifar10-jpeg-mini.tar.xz or train/ and test/")
    archive, found = data / "cifar10-jpeg-mini.tar.xz", {}
    if archive.is_file():
        try:
            with tarfile.open(archive, "r:xz") as tar:
                for member in tar:
                    words = member.name.split("/")
                    if member.isfile() and len(words) == 3:
                        file = tar.extractfile(member)
                        found.setdefault(tuple(words[:2]), {})[words[2]] = io.BytesIO(file.read())  # type: ignore
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(f"{archive}: not a readable tar.xz archive ({error})") from error
    else:
        for path in sorted(data.glob("*/*/*.jpg")):
            found.setdefault(path.parts[-3:-1], {})[path.name] = path
    parts: dict[str, tuple[list[Any], list[int]]] = {"train": ([], []), "val": ([], []), "test": ([], [])}
    for label, name in enumerate(CIFAR10):
        for part in ("train", "test"):
            files = found.get((part, name))
            if not files or (part == "train" and len(files) < 40):
                raise UserError(f"{data}: no {part}/{name}/ with enough pictures, in the folder or in {archive.name}")
            own = [files[key] for key in sorted(files)]
            cuts = {"train": own[:-20], "val": own[-20:]} if part == "train" else {"test": own[: test or None]}
            for key, chosen in cuts.items():
                parts[key][0].extend(chosen)
                parts[key][1].extend([label] * len(chosen))
    made = [Part([_decode(file) for file in files], torch.tensor(labels)) for files, labels in parts.values()]
    return ImageSet("cifar10_mini", list(CIFAR10), TEMPLATE_OF["cifar10_mini"], *made)


def _decode(file: Any) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UserError(f"a picture cannot be read: {error}") from error


# ---- few shots and pictures ------------------------------------------------------------------------------------------


def few_shot(train: Tensor, val: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of K training and min(K, 4) validation samples of each class; a class with fewer gives all it has.

    Drawn as the official code draws with this seed, class by class in the order of their first picture, so that the
    same split file gives the same pictures.
    """
    draw, out = random.Random(seed), []
    for labels, count in ((train, shots), (val, min(shots, 4))):
        by_class: dict[int, list[int]] = {}
        for i, label in enumerate(labels.tolist()):
            by_class.setdefault(label, []).append(i)
        chosen = [draw.sample(own, count) if len(own) >= count else own for own in by_class.values()]
        out.append(torch.tensor([i for own in chosen for i in own], dtype=torch.long))
    return out[0], out[1]


def _open(picture: Path | np.ndarray) -> Image.Image:
    try:
        return Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)
    except OSError as error:
        raise UserError(f"{picture}: cannot be read as a picture") from error


def _random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """A part of 8 to 100 % of the area, with a ratio of sides between 3/4 and 4/3."""
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _view(picture: Path | np.ndarray, side: int, draw: random.Random | None) -> np.ndarray:
    """(side, side, 3), bicubic: the centre, the shorter side fitted; with ``draw`` a random crop, flipped or not."""
    with _open(picture) as opened:
        try:
            image = opened.convert("RGB")
        except OSError as error:
            raise UserError(f"{picture}: cannot be read as a picture ({error})") from error
    bicubic = Image.Resampling.BICUBIC
    if draw is not None:
        image = image.crop(_random_box(*image.size, draw)).resize((side, side), bicubic)
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)
    scale = side / min(image.size)
    size = tuple(max(side, int(length * scale)) for length in image.size)
    image = image.resize(size, bicubic) if size != image.size else image
    left, top = (round((length - side) / 2) for length in size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def views(part: Part, index: Tensor, side: int, seed: str | None = None, workers: int = 4) -> Tensor:
    """Pictures (B, 3, side, side) uint8 at positions ``index``: the test view, or with a seed the training view.

    A training view depends on the seed and the picture's position only, not on how a batch is shared out.
    """
    draws = [None if seed is None else random.Random(f"{seed}/{i}") for i in index.tolist()]
    chosen = [part.pictures[i] for i in index.tolist()]
    if workers > 1 and any(isinstance(picture, Path) for picture in chosen):
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(_view, chosen, [side] * len(chosen), draws))
    else:
        made = [_view(picture, side, draw) for picture, draw in zip(chosen, draws, strict=True)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
