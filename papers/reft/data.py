"""COCO instances with the few-shot split of base and novel classes, and generated scenes of textured shapes.

A *scene* is an image (3, H, W) float in 0..1 with masks (n, H, W) bool and labels (n,), indices of ``Dataset.classes``.
Category ids of files (1..90) become those indices in one place, ``read_coco``. Crowds are neither targets nor supports.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json

NOVEL = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat", "bird", "cat", "dog", "horse"),
    *("sheep", "cow", "bottle", "chair", "couch", "potted plant", "dining table", "tv"),
)
"""The 20 classes of COCO that PASCAL VOC has too: novel; the other 60 are base."""
NOVEL_IDS = (1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72)
SEEDS = 10
"""Shot lists of the TFA protocol."""
TRAIN, TEST = "datasets/cocosplit/datasplit/trainvalno5k.json", "datasets/cocosplit/datasplit/5k.json"


class Scene(NamedTuple):
    """One image and its objects."""

    image: Tensor
    masks: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Instance:
    """An object: its annotation id, the image's index, the class index, area in pixels."""

    annotation: int
    image: int
    label: int
    area: float


@dataclass
class Dataset:
    """Images, objects and how to read them.

    Attributes:
        classes: names. images: id of each image, in order. instances: objects without crowds.
        read: (image index) -> image (3, H, W) in 0..1. mask: (instance) -> (H, W) bool.
    """

    classes: tuple[str, ...]
    images: list[int]
    instances: list[Instance]
    read: Callable[[int], Tensor]
    mask: Callable[[Instance], Tensor]
    by_image: dict[int, list[Instance]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_image = {i: [] for i in range(len(self.images))}
        for row in self.instances:
            self.by_image[row.image].append(row)

    def __len__(self) -> int:
        return len(self.images)

    def scene(self, index: int) -> Scene:
        """Read one image with its objects; those whose mask is empty are left out."""
        image = self.read(index)
        rows = [(self.mask(row), row.label) for row in self.by_image[index]]
        for mask, _ in rows:
            if mask.shape != image.shape[1:]:
                raise UserError(
                    f"image {self.images[index]} is {tuple(image.shape[1:])} and a mask of it {tuple(mask.shape)}, "
                    "expected equal sizes (height, width)"
                )
        rows = [(mask, label) for mask, label in rows if mask.any()]
        masks = torch.stack([mask for mask, _ in rows]) if rows else torch.zeros(0, *image.shape[1:], dtype=torch.bool)
        return Scene(image, masks, torch.tensor([label for _, label in rows], dtype=torch.int64))

    def only(self, labels: Sequence[int], drop_empty: bool = False) -> Dataset:
        """The same images with objects of these classes alone; without images that have none, if ``drop_empty``."""
        wanted = set(labels)
        rows = [row for row in self.instances if row.label in wanted]
        return self._with(rows, drop_empty)

    def _with(self, rows: Sequence[Instance], drop_empty: bool) -> Dataset:
        kept = sorted({row.image for row in rows}) if drop_empty else list(range(len(self.images)))
        new = {old: i for i, old in enumerate(kept)}
        read, mask = self.read, self.mask
        return Dataset(
            self.classes,
            [self.images[i] for i in kept],
            [replace(row, image=new[row.image]) for row in rows],
            lambda i: read(kept[i]),
            lambda row: mask(replace(row, image=kept[row.image])),
        )

    def take(self, rows: Sequence[Instance]) -> Dataset:
        """The images of these objects, with these objects alone: a few-shot training set."""
        return self._with(rows, drop_empty=True)


def split_classes(classes: Sequence[str], novel: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the base and of the novel classes.

    Raises:
        ValueError: an unknown name (near matches are listed), one given twice, or no class left as base.
    """
    for name in novel:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.4)
            hint = f"near: {', '.join(near)}" if near else f"known: {', '.join(classes[:8])} ..."
            raise ValueError(f"unknown class {name!r}; {hint}")
    if len(set(novel)) < len(novel):
        raise ValueError(f"a novel class is named twice: {', '.join(novel)}")
    new = [i for i, name in enumerate(classes) if name in novel]
    base = [i for i, name in enumerate(classes) if name not in novel]
    if not base or not new:
        raise ValueError(f"{len(base)} base and {len(new)} novel classes, expected at least one of each")
    return base, new


def sample_shots(
    data: Dataset, labels: Sequence[int], shots: int, generator: torch.Generator, least: float = 0
) -> list:
    """``shots`` objects of each class, of at least ``least`` pixels.

    Raises:
        ValueError: fewer than 1 shot, or a class with too few objects.
    """
    if shots < 1:
        raise ValueError(f"{shots} shots a class requested, expected at least 1")
    pools: dict[int, list[Instance]] = {label: [] for label in labels}
    for row in data.instances:
        if row.label in pools and row.area >= max(least, 1):
            pools[row.label].append(row)
    out = []
    for label, pool in pools.items():
        if len(pool) < shots:
            count = f"{len(pool)} usable instance{'' if len(pool) == 1 else 's'}"
            raise ValueError(f"class {data.classes[label]!r} has {count}, {shots} shots requested")
        out += [pool[i] for i in torch.randperm(len(pool), generator=generator)[:shots].tolist()]
    return out


# ---- COCO ------------------------------------------------------------------------------------------------------------


def decode(segmentation: Any, height: int, width: int, where: str) -> Tensor:
    """Polygons or run lengths of a COCO annotation -> (H, W) bool."""
    from faster_coco_eval.core import mask as rle

    try:
        if isinstance(segmentation, list):
            runs = rle.merge(rle.frPyObjects([[float(x) for x in polygon] for polygon in segmentation], height, width))
        elif isinstance(segmentation["counts"], list):
            runs = rle.frPyObjects(segmentation, height, width)
        else:
            runs = segmentation
        found = rle.decode(runs)
    except Exception as error:
        raise UserError(f"{where}: segmentation is neither polygons nor run lengths ({error})") from error
    return torch.from_numpy(np.ascontiguousarray(found)).bool()


def read_image(source: Path | bytes, where: str) -> Tensor:
    """An image file -> (3, H, W) float in 0..1."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{where}: not a readable image ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _fields(rows: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(rows, list):
        raise UserError(f"{where}: expected a list, found {type(rows).__name__}")
    for i, row in enumerate(rows):
        lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacking:
            raise UserError(f"{where}[{i}] has no {lacking[0]!r}; expected {', '.join(keys)}")


def find_image(root: Path, name: str, folders: Sequence[str]) -> Path:
    """An image of COCO wherever the layout puts it."""
    for folder in folders:
        if (root / folder / name).is_file():
            return root / folder / name
    raise UserError(f"no image {name} in {', '.join(folders)} below {root}")


IMAGE_FOLDERS = (
    *("train2017", "val2017", "datasets/coco/trainval2014", "datasets/coco/train2014", "datasets/coco/val2014"),
    *("images/train2017", "images/val2017"),
)


def read_coco(path: Path, root: Path | None = None) -> Dataset:
    """Read an ``instances_*.json`` (or a file of the TFA split, which has the same form).

    Args:
        path: the file. root: the folder below which the images lie.

    Raises:
        UserError: missing or malformed, an annotation without ``segmentation``, of an unknown image or category.
    """
    content = read_json(path, "annotations")
    for key, fields in (
        ("images", ("id", "file_name", "height", "width")),
        ("annotations", ("id", "image_id", "category_id", "segmentation")),
        ("categories", ("id", "name")),
    ):
        _fields(content.get(key) if isinstance(content, dict) else None, fields, f"{path}: {key}")
    categories = sorted(content["categories"], key=lambda row: row["id"])
    index = {row["id"]: i for i, row in enumerate(categories)}
    images = sorted(content["images"], key=lambda row: row["id"])
    place = {row["id"]: i for i, row in enumerate(images)}
    instances, shapes = [], {}
    for row in content["annotations"]:
        for key, known in (("image_id", place), ("category_id", index)):
            if row[key] not in known:
                raise UserError(f"{path}: annotation {row['id']} has {key} {row[key]}, which the file does not list")
        if row.get("iscrowd"):
            continue
        area = float(row.get("area", 1.0))
        instances.append(Instance(row["id"], place[row["image_id"]], index[row["category_id"]], area))
        shapes[row["id"]] = row["segmentation"]

    def mask(row: Instance) -> Tensor:
        image = images[row.image]
        return decode(shapes[row.annotation], image["height"], image["width"], f"{path}: annotation {row.annotation}")

    def read(i: int) -> Tensor:
        name = images[i]["file_name"]
        file = find_image(root or path.parent.parent, name, IMAGE_FOLDERS)
        image = read_image(file, str(file))
        if tuple(image.shape[1:]) != (images[i]["height"], images[i]["width"]):
            expected = f"{images[i]['height']} x {images[i]['width']}"
            raise UserError(f"{file} has {image.shape[1]} x {image.shape[2]} pixels, {path.name} says {expected}")
        return image

    return Dataset(tuple(row["name"] for row in categories), [row["id"] for row in images], instances, read, mask)


def coco_file(root: Path | None, split: str) -> Path:
    """The annotations of "train" or "test": the TFA split's, else those of 2017.

    Raises:
        UserError: neither is there; both places are named.
    """
    if root is None:
        raise UserError(
            "--data: the folder of COCO is needed (datasets/cocosplit/... or annotations/instances_*2017.json)"
        )
    names = (
        [TRAIN, "annotations/instances_train2017.json"]
        if split == "train"
        else [TEST, "annotations/instances_val2017.json"]
    )
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"no annotations in {root}: expected {names[0]} or {names[1]}")


def shot_file(root: Path, name: str, shots: int, seed: int) -> Path:
    """Where TFA keeps the shots of a class; seed 0 lies in the folder itself, 1..9 in ``seed<n>``."""
    folder = root / "datasets" / "cocosplit"
    return (folder / f"seed{seed}" if seed else folder) / f"full_box_{shots}shot_{name}_trainval.json"


def read_shots(root: Path, data: Dataset, labels: Sequence[int], shots: int, seed: int) -> list[Instance]:
    """The shots of a seed's list, as instances of ``data``.

    Raises:
        UserError: a file is missing (the pattern is named), has another number of annotations than ``shots``, or one of
            another class.
    """
    known = {(data.images[row.image], row.annotation): row for row in data.instances}
    out = []
    for label in labels:
        path = shot_file(root, data.classes[label], shots, seed)
        if not path.is_file():
            raise UserError(
                f"no shot list {path}; expected datasets/cocosplit/[seed<1-9>/]full_box_<K>shot_<class>_trainval.json, "
                "or --shot-lists sampled"
            )
        rows = read_json(path, "shot list").get("annotations")
        _fields(rows, ("id", "image_id", "category_id", "segmentation"), f"{path}: annotations")
        if len(rows) != shots:
            raise UserError(f"{path} has {len(rows)} annotations, expected {shots}")
        for row in rows:
            if (row["image_id"], row["id"]) not in known:
                raise UserError(f"{path}: annotation {row['id']} of image {row['image_id']} is not in the training set")
            found = known[row["image_id"], row["id"]]
            if found.label != label:
                shown, asked = data.classes[found.label], data.classes[label]
                raise UserError(f"{path}: annotation {row['id']} shows a {shown}, expected a {asked}")
            out.append(found)
    return out


def check_coco(root: Path | None, novel: Sequence[str]) -> list[str]:
    """What ``--check-data`` says of COCO."""
    lines = []
    for split, expected in (("train", (117_264, 118_287)), ("test", (5_000, 5_000))):
        path = coco_file(root, split)
        data = read_coco(path, root)
        base, new = split_classes(data.classes, novel)
        count = Counter(row.label for row in data.instances)
        lines.append(
            f"{path}: {len(data)} images (expected {expected[0]:,} or {expected[1]:,}), "
            f"{sum(count[i] for i in base)} instances of {len(base)} base classes, "
            f"{sum(count[i] for i in new)} of {len(new)} novel ones"
        )
        if len(data):
            file = data.read(0)
            lines.append(f"  first image: {file.shape[1]} x {file.shape[2]}")
    assert root is not None
    lists = len(list((root / "datasets" / "cocosplit").glob("**/full_box_*shot_*_trainval.json")))
    return [
        *lines,
        f"{lists} shot lists of the TFA protocol" + ("" if lists else ": --shot-lists sampled draws its own"),
    ]


# ---- COCO images with panoptic masks, in one archive -----------------------------------------------------------------

ARCHIVE = "coco-panoptic-mini.tar"
ARCHIVE_COUNTS = {"train2017": (100, 740), "val2017": (100, 707)}
"""Images and non-crowd things of the archive."""


def panoptic_file(root: Path | None) -> Path:
    """The archive in ``root`` or ``root/coco-panoptic-mini``, or ``root`` itself where it is that file."""
    if root is None:
        raise UserError(f"--data: the folder of {ARCHIVE} is needed")
    for path in (root, root / ARCHIVE, root / "coco-panoptic-mini" / ARCHIVE):
        if path.is_file():
            return path
    raise UserError(f"no {ARCHIVE} in {root} or {root / 'coco-panoptic-mini'}")


def read_panoptic(path: Path, split: str) -> Dataset:
    """Things of a panoptic split ("train2017", "val2017") in a tar archive of COCO's folders.

    Raises:
        UserError: not a tar archive, a member is missing, the json is malformed.
    """
    try:
        with tarfile.open(path) as archive:
            members = {m.name.removeprefix("./"): archive.extractfile(m) for m in archive if m.isfile()}
            wanted = (f"{split}/", f"panoptic_{split}/", f"annotations/panoptic_{split}.json")
            files = {name: file.read() for name, file in members.items() if file and name.startswith(wanted)}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable tar archive ({error})") from error
    name = f"annotations/panoptic_{split}.json"
    if name not in files:
        raise UserError(f"{path} has no member {name}")
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise UserError(f"{path}: {name} is not JSON ({error})") from error
    for key, fields in (
        ("images", ("id", "file_name")),
        ("annotations", ("image_id", "file_name", "segments_info")),
        ("categories", ("id", "name", "isthing")),
    ):
        _fields(content.get(key), fields, f"{path}: {name}: {key}")
    things = sorted((row for row in content["categories"] if row["isthing"]), key=lambda row: row["id"])
    index = {row["id"]: i for i, row in enumerate(things)}
    images = sorted(content["images"], key=lambda row: row["id"])
    place = {row["id"]: i for i, row in enumerate(images)}
    drawn: dict[int, bytes] = {}
    instances = []
    for row in content["annotations"]:
        file = f"panoptic_{split}/{row['file_name']}"
        if row["image_id"] not in place or file not in files:
            raise UserError(f"{path}: {file} or its image {row['image_id']} is missing")
        drawn[place[row["image_id"]]] = files[file]
        _fields(row["segments_info"], ("id", "category_id", "iscrowd", "area"), f"{path}: {file}: segments_info")
        for part in row["segments_info"]:
            if part["category_id"] in index and not part["iscrowd"]:
                label = index[part["category_id"]]
                instances.append(Instance(part["id"], place[row["image_id"]], label, float(part["area"])))
    cache: dict[int, Tensor] = {}

    def mask(row: Instance) -> Tensor:
        if row.image not in cache:
            rgb = (
                (read_image(drawn[row.image], f"{path}: masks of image {images[row.image]['id']}") * 255).round().int()
            )
            cache[row.image] = rgb[0] + 256 * rgb[1] + 65536 * rgb[2]
        return cache[row.image] == row.annotation

    def read(i: int) -> Tensor:
        file = f"{split}/{images[i]['file_name']}"
        if file not in files:
            raise UserError(f"{path} has no member {file}")
        return read_image(files[file], f"{path}: {file}")

    return Dataset(tuple(row["name"] for row in things), [row["id"] for row in images], instances, read, mask)


def check_panoptic(root: Path | None, novel: Sequence[str]) -> list[str]:
    """What ``--check-data`` says of the archive."""
    path = panoptic_file(root)
    lines = []
    for split, (images, things) in ARCHIVE_COUNTS.items():
        data = read_panoptic(path, split)
        _, new = split_classes(data.classes, novel)
        count = sum(row.label in new for row in data.instances)
        lines.append(
            f"{path}: {split}: {len(data)} images (expected {images}), {len(data.instances)} things without crowds "
            f"(expected {things}), {count} of them novel"
        )
    return lines


# ---- geometry: sizes, jitter, batches --------------------------------------------------------------------------------


def resize(scene: Scene, height: int, width: int) -> Scene:
    """Image bilinearly (smoothed when shrinking), masks by nearest pixel."""
    image = F.interpolate(scene.image[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    masks = scene.masks
    if len(masks):
        masks = F.interpolate(masks[None].float(), (height, width), mode="nearest-exact")[0].bool()
    else:
        masks = masks.new_zeros(0, height, width)
    return Scene(image, masks, scene.labels)


def fit(scene: Scene, size: int) -> Scene:
    """Shrink or enlarge so that the longer side is ``size``, and pad right and below to a square (grey)."""
    h, w = scene.image.shape[1:]
    scale = size / max(h, w)
    out = resize(scene, max(1, round(h * scale)), max(1, round(w * scale)))
    return _window(out, 0, 0, size)


def _window(scene: Scene, top: int, left: int, size: int) -> Scene:
    """Cut a square; what lies outside is grey and without masks."""
    image, masks = (x[..., top : top + size, left : left + size] for x in (scene.image, scene.masks))
    pad = (0, size - image.shape[2], 0, size - image.shape[1])
    return Scene(F.pad(image, pad, value=0.5), F.pad(masks, pad), scene.labels)


def jitter(scene: Scene, size: int, low: float, high: float, generator: torch.Generator) -> Scene:
    """Horizontal flip and large-scale jitter: resize by a random factor of what fits, cut a random square.

    Objects that vanish are left out.
    """
    flip, scale, y, x = torch.rand(4, generator=generator).tolist()
    if flip < 0.5:
        scene = Scene(scene.image.flip(-1), scene.masks.flip(-1), scene.labels)
    h, w = scene.image.shape[1:]
    factor = (low + (high - low) * scale) * size / max(h, w)
    out = resize(scene, max(1, round(h * factor)), max(1, round(w * factor)))
    h, w = out.image.shape[1:]
    out = _window(out, int(y * max(0, h - size + 1)), int(x * max(0, w - size + 1)), size)
    seen = out.masks.flatten(1).any(1)
    return Scene(out.image, out.masks[seen], out.labels[seen])


# ---- generated scenes ------------------------------------------------------------------------------------------------

SHAPES, TEXTURES = ("disk", "square", "triangle", "cross"), ("stripes", "checker", "dots")
SHAPE_CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
NOVEL_SHAPES = ("checker disk", "dots square", "stripes triangle", "checker cross")
"""Every shape and every texture occurs among the base classes too."""


def _inside(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Which points of objects' own coordinates, (n, H, W), lie in shapes (n,)."""
    disk = x**2 + y**2 < 1
    square = (x.abs() < 0.85) & (y.abs() < 0.85)
    triangle = (y < 0.75) & (y > 1.8 * x.abs() - 1.0)
    cross = ((x.abs() < 0.34) & (y.abs() < 1)) | ((y.abs() < 0.34) & (x.abs() < 1))
    every = torch.stack([disk, square, triangle, cross])
    return every[shape, torch.arange(len(shape))]


def _pattern(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Brightness 0 or 1 of textures (n,) at pixels (n, H, W) of objects' turned coordinates."""
    stripes = (y / 4).floor() % 2
    checker = ((x / 5).floor() + (y / 5).floor()) % 2
    dots = (((x % 7 - 3.5) ** 2 + (y % 7 - 3.5) ** 2) < 5.0).float()
    return torch.stack([stripes, checker, dots])[texture, torch.arange(len(texture))]


def _hue(h: Tensor) -> Tensor:
    """(n,) in 0..1 -> (n, 3) saturated colours."""
    return (0.5 + 0.5 * torch.cos(2 * math.pi * (h[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3])))).clamp(0, 1)


def generate(
    count: int, generator: torch.Generator, size: int = 64, most: int = 4, chances: Mapping[int, float] | None = None,
    labels: Sequence[int] | None = None,
) -> Dataset:  # fmt: skip
    """Scenes of shapes with textures; hue, size, place and turn say nothing of the class; later objects hide others.

    Args:
        count: scenes. size: side in pixels. most: objects a scene has at most, at least 1.
        chances: relative frequency of classes, 1 for those not named. labels: instead, a scene of one object each.
    """
    weight = torch.ones(len(SHAPE_CLASSES))
    for label, chance in (chances or {}).items():
        weight[label] = chance
    images = torch.empty(count, 3, size, size)
    kept: list[Tensor] = []
    rows: list[Instance] = []
    grid = torch.arange(size) + 0.5
    for i in range(count):  # a scene at a time: a data set is made once
        n = 1 if labels is not None else int(torch.randint(1, most + 1, (1,), generator=generator))
        if labels is not None:
            kind = torch.tensor([labels[i]])
        else:
            kind = torch.multinomial(weight, n, replacement=True, generator=generator)
        shape, texture = kind // len(TEXTURES), kind % len(TEXTURES)
        u = torch.rand(n, 7, generator=generator)
        radius = (9 + 7 * u[:, 0]) * size / 64
        centre = radius[:, None] + (size - 2 * radius[:, None]) * u[:, 1:3]
        turn = 2 * math.pi * u[:, 3]
        x, y = (grid[None, None] - centre[:, 0, None, None]), (grid[None, :, None] - centre[:, 1, None, None])
        cos, sin = turn.cos().view(-1, 1, 1), turn.sin().view(-1, 1, 1)
        x, y = cos * x + sin * y, cos * y - sin * x
        inside = _inside(shape, x / radius.view(-1, 1, 1), y / radius.view(-1, 1, 1))
        light = _pattern(texture, x, y)[:, None]
        colours = _hue(u[:, 4])[:, :, None, None] * (0.25 + 0.75 * light)
        coarse = torch.rand(3, 6, 6, generator=generator)
        image = 0.25 + 0.5 * F.interpolate(coarse[None], (size, size), mode="bilinear", align_corners=False)[0]
        covered = torch.zeros(n, size, size, dtype=torch.bool)
        for j in range(n):  # painting order
            image = torch.where(inside[j], colours[j], image)
            covered[:j] &= ~inside[j]
            covered[j] = inside[j]
        images[i] = (image + 0.06 * torch.randn(3, size, size, generator=generator)).clamp(0, 1)
        for j in range(n):
            area = int(covered[j].sum())
            if area >= 12:
                rows.append(Instance(len(kept), i, int(kind[j]), float(area)))
                kept.append(covered[j].clone())
    masks = torch.stack(kept)
    return Dataset(SHAPE_CLASSES, list(range(count)), rows, lambda i: images[i], lambda row: masks[row.annotation])
