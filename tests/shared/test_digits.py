"""Digits: idx and npz files written here, malformed ones, the packaged sets, and the real files where they are."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import digits
from shared.errors import UserError

REAL = Path(os.environ.get("REPRO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_idx_files_are_read_plain_and_compressed(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    write_idx(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([7, 0, 9]))
    read = digits.load_idx(tmp_path, "test")
    assert read.images.shape == (3, 4, 5) and read.labels.tolist() == [7, 0, 9] and len(read) == 3
    assert read.images[2, 3, 4] == pytest.approx(59 / 255)
    assert sorted(read.origin) == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]


def test_malformed_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no t10k-images"):
        digits.load_idx(tmp_path, "test")
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((3, 2, 2)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(2))
    with pytest.raises(UserError, match=r"3 images and .* 2 labels"):
        digits.load_idx(tmp_path, "test")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([1, 2, 10]))
    with pytest.raises(UserError, match="expected classes 0 to 9"):
        digits.load_idx(tmp_path, "test")
    whole = (tmp_path / "t10k-images-idx3-ubyte").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="holds 11 bytes, expected 12"):
        digits.load_idx(tmp_path, "test")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"P5 2 2 255" * 4)
    with pytest.raises(UserError, match="expected 2051"):
        digits.load_idx(tmp_path, "test")


def test_npz_files_are_read_and_malformed_ones_named(tmp_path: Path) -> None:
    x = np.full((2, 16, 16), -1000, dtype=np.int16)
    x[1, 0, 0] = 500
    np.savez(tmp_path / "usps.npz", x_train=x, y_train=np.array([3, 4], dtype=np.uint8))
    read = digits.load_usps(tmp_path, "train")
    assert read.images[0].max() == 0 and read.images[1, 0, 0] == 0.75 and read.labels.tolist() == [3, 4]
    with pytest.raises(UserError, match="has no x_test"):
        digits.load_usps(tmp_path, "test")
    with pytest.raises(UserError, match=r"no semeion\.npz"):
        digits.load_semeion(tmp_path)
    bits = np.zeros((1, 256), dtype=np.uint8)
    bits[0, 17] = 1
    np.savez(tmp_path / "semeion.npz", x=np.packbits(bits, axis=1), y=np.array([5], dtype=np.uint8))
    read = digits.load_semeion(tmp_path)
    assert read.images.nonzero().tolist() == [[0, 1, 1]] and read.labels.tolist() == [5]
    np.savez(tmp_path / "semeion.npz", x=bits, y=np.array([5], dtype=np.uint8))
    with pytest.raises(UserError, match=r"expected uint8 \(1, 32\)"):
        digits.load_semeion(tmp_path)
    (tmp_path / "semeion.npz").write_bytes(b"no npz")
    with pytest.raises(UserError, match="not a readable npz"):
        digits.load_semeion(tmp_path)


def test_packaged_sets_have_their_counts() -> None:
    mnist, optical = digits.packaged_mnist(), digits.packaged_optical()
    assert mnist.images.shape == (5000, 28, 28) and torch.bincount(mnist.labels).tolist() == [500] * 10
    assert optical.images.shape == (1797, 8, 8) and optical.images.max() == 1


def test_resizing_crops_first_and_keeps_what_fits() -> None:
    images = torch.zeros(1, 6, 6)
    images[0, 1:5, 1:5] = 1
    assert torch.equal(digits.resized(images, 4, crop=4), torch.ones(1, 4, 4))
    assert digits.resized(images, 6) is images
    assert digits.resized(images, 3).shape == (1, 3, 3)


@pytest.mark.skipif(not (REAL / "mnist-t10k").is_dir(), reason="real digits are not at hand ($REPRO_DATA)")
def test_real_files_have_the_published_counts() -> None:
    assert len(digits.load_idx(REAL, "test")) == digits.COUNTS["mnist-test"]
    for part in ("train", "test"):
        assert len(digits.load_usps(REAL, part)) == digits.COUNTS[f"usps-{part}"]
    semeion = digits.load_semeion(REAL)
    assert len(semeion) == digits.COUNTS["semeion"] and semeion.images.mean() == pytest.approx(0.3286, abs=1e-4)
