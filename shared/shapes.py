"""Three-dimensional shapes: occupancy grids, OFF meshes and HDF5 point clouds, and points on their surfaces.

Everything works on whole batches; random numbers come from the ``torch.Generator`` that is handed in.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import UserError

Tree = Path | zipfile.Path
"""A folder on disk or inside a zip archive; both walk alike."""


# ---- point clouds ----------------------------------------------------------------------------------------------


def check_clouds(points: torch.Tensor, where: str, least: int = 1) -> None:
    """Refuse what is not a batch of finite point clouds.

    Args:
        points: expected (N, n, 3). where: names the source in the error. least: smallest n allowed.

    Raises:
        UserError: another shape, fewer points, or a coordinate that is NaN or infinite (the sample is named).
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise UserError(f"{where}: shape {tuple(points.shape)}, expected (clouds, points, 3)")
    if points.shape[1] < least:
        raise UserError(f"{where}: {points.shape[1]} points a cloud, expected at least {least}")
    bad = ~torch.isfinite(points).flatten(1).all(1)
    if bad.any():
        raise UserError(f"{where}: sample {int(bad.nonzero()[0])} holds NaN or infinite coordinates")


def unit_sphere(points: torch.Tensor, where: str = "point clouds") -> torch.Tensor:
    """Centre each cloud on its mean and scale it so that its farthest point lies at distance 1.

    Args:
        points: (..., n, 3) float. where: names the source in the error.

    Returns:
        (..., n, 3) of the same type.

    Raises:
        UserError: all points of a cloud coincide, so there is no scale; the sample is named.
    """
    centred = points - points.mean(-2, keepdim=True)
    scale = centred.norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
    tiny = scale <= 1e-6 * points.abs().amax((-1, -2), keepdim=True)
    if tiny.any():
        raise UserError(f"{where}: all points of sample {int(tiny.flatten().nonzero()[0])} coincide, it has no scale")
    return centred / scale


# ---- occupancy grids -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voxels:
    """One split of a voxel data set: ``grids`` (N, R, R, R) bool and ``labels`` (N,) int64."""

    grids: torch.Tensor
    labels: torch.Tensor


def read_packed_voxels(path: Path, resolution: int = 32) -> dict[str, Voxels]:
    """Read bit-packed occupancy: npz with ``X_train``, ``y_train``, ``X_test``, ``y_test``.

    Args:
        path: the npz; ``X_*`` are (N, resolution^3 / 8) uint8 in the bit order of ``numpy.packbits``.
        resolution: cells along a side.

    Returns:
        ``{"train": Voxels, "test": Voxels}``.

    Raises:
        UserError: no such file, a key is missing, the width is not resolution^3 / 8, or a grid is empty (named).
    """
    width = resolution**3 // 8
    arrays = read_npz(path, ("X_train", "y_train", "X_test", "y_test"))
    out = {}
    for split in ("train", "test"):
        packed, labels = arrays[f"X_{split}"], arrays[f"y_{split}"]
        if packed.ndim != 2 or packed.shape[1] != width or packed.dtype != np.uint8:
            raise UserError(
                f"{path}: X_{split} is {packed.dtype} {packed.shape}, expected uint8 (N, {width}): "
                f"{resolution}^3 cells packed into bytes"
            )
        if len(labels) != len(packed):
            raise UserError(f"{path}: {len(packed)} grids in X_{split}, {len(labels)} labels in y_{split}")
        empty = ~packed.any(1)
        if empty.any():
            raise UserError(f"{path}: X_{split}[{int(empty.nonzero()[0][0])}] is an empty grid")
        grids = np.unpackbits(packed, axis=1).reshape(-1, resolution, resolution, resolution).view(bool)
        out[split] = Voxels(torch.from_numpy(grids), torch.from_numpy(labels.astype(np.int64)))
    return out


def surface_voxels(grids: torch.Tensor) -> torch.Tensor:
    """Occupied cells with at least one free face neighbour; beyond the border all is free.

    Args:
        grids: (N, R, R, R) bool.

    Returns:
        (N, R, R, R) bool.
    """
    size = grids.shape[-1]
    enclosed = torch.ones_like(grids)
    for axis in (1, 2, 3):  # a cell at the border has a free neighbour beyond it
        enclosed.narrow(axis, 0, 1).zero_()
        enclosed.narrow(axis, size - 1, 1).zero_()
        enclosed.narrow(axis, 1, size - 1).logical_and_(grids.narrow(axis, 0, size - 1))
        enclosed.narrow(axis, 0, size - 1).logical_and_(grids.narrow(axis, 1, size - 1))
    return grids & ~enclosed


def sample_voxels(grids: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Points on the surface of occupancy grids: a surface cell drawn with replacement, then a place in it.

    Args:
        grids: (N, R, R, R) bool, none empty. count: points a grid. generator: on the CPU.

    Returns:
        (N, count, 3) float32, in cells: the centre of cell (i, j, k) is (i, j, k), jitter is U(-0.5, 0.5).

    Raises:
        ValueError: an empty grid.
    """
    cells = surface_voxels(grids).nonzero()  # sorted by grid
    per_grid = torch.bincount(cells[:, 0], minlength=len(grids))
    if (per_grid == 0).any():
        raise ValueError(f"grid {int((per_grid == 0).nonzero()[0])} is empty: no surface to sample")
    first = per_grid.cumsum(0) - per_grid
    draw = torch.rand(len(grids), count, generator=generator, dtype=torch.float64)
    chosen = first.unsqueeze(1) + (draw * per_grid.unsqueeze(1)).long()
    jitter = torch.rand(len(grids), count, 3, generator=generator) - 0.5
    return cells[chosen][..., 1:].float() + jitter


# ---- meshes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh: ``vertices`` (V, 3) float32 and ``faces`` (F, 3) int64, indices into the vertices."""

    vertices: torch.Tensor
    faces: torch.Tensor


def parse_off(text: str, where: str = "OFF text") -> Mesh:
    """Parse an OFF mesh; polygons become fans of triangles.

    Accepts comments, blank lines, the counts on the header's line (``OFF490 518 0``, as in ModelNet) and colours
    after a vertex or face.

    Raises:
        UserError: no OFF header, truncated, a face without three corners or with a corner that does not exist.
    """
    lines = [line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line]
    head = lines[0].removeprefix("C") if lines else ""
    if not head.startswith("OFF"):
        raise UserError(f"{where}: begins with {lines[0][:20] if lines else ''!r}, expected an OFF header")
    rest = head[3:].strip()
    body = lines[1:] if not rest else [rest, *lines[1:]]
    try:
        v, f = (int(token) for token in body[0].split()[:2])
    except (IndexError, ValueError) as error:
        raise UserError(f"{where}: no vertex and face counts after the OFF header") from error
    if len(body) < 1 + v + f or v < 3 or f < 1:
        raise UserError(f"{where}: {len(body) - 1} lines follow, expected {v} vertices and {f} faces")
    try:
        vertices = _rows(body[1 : 1 + v])[:, :3].astype(np.float32)
        faces = _triangles(body[1 + v : 1 + v + f])
    except (ValueError, IndexError) as error:
        raise UserError(f"{where}: a vertex or face is malformed ({error})") from error
    if vertices.shape[1] != 3 or not np.isfinite(vertices).all():
        raise UserError(f"{where}: a vertex is not three finite numbers")
    if not len(faces) or faces.min() < 0 or faces.max() >= v:
        raise UserError(f"{where}: faces use vertices outside 0..{v - 1}, or there are no faces")
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))


def _rows(lines: Sequence[str]) -> np.ndarray:
    """Lines of equally many numbers as a matrix."""
    flat = np.array(" ".join(lines).split(), dtype=np.float64)
    if len(flat) % len(lines):
        raise ValueError("lines of different length")
    return flat.reshape(len(lines), -1)


def _triangles(lines: Sequence[str]) -> np.ndarray:
    """Face lines ``n i_1 ... i_n [colour]`` as triangles (F, 3)."""
    flat = np.array(" ".join(lines).split())
    if len(flat) == 4 * len(lines) and (flat[::4] == "3").all():  # nearly every file
        return flat.reshape(-1, 4)[:, 1:].astype(np.int64)
    words = [line.split() for line in lines]
    corners = np.array([int(row[0]) for row in words])
    if corners.min() < 3:
        raise ValueError(f"a face with {corners.min()} corners")
    fans = []
    for n in np.unique(corners):
        rows = np.array([row[1 : n + 1] for row, c in zip(words, corners, strict=True) if c == n], dtype=np.int64)
        fans.append(np.stack([np.repeat(rows[:, :1], n - 2, 1), rows[:, 1:-1], rows[:, 2:]], -1).reshape(-1, 3))
    return np.concatenate(fans)


def read_off(path: Tree) -> Mesh:
    """Read one OFF file.

    Raises:
        UserError: see ``parse_off``; the file is named.
    """
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read the mesh {path}: {error.strerror}") from error
    return parse_off(text, str(path))


def sample_surface(vertices: torch.Tensor, faces: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Points spread evenly over triangle meshes: a triangle by its area, then a point of it.

    Args:
        vertices: (..., V, 3): one mesh, or a batch of meshes with the same faces. faces: (F, 3) int64.
        count: points a mesh. generator: on the CPU.

    Returns:
        (..., count, 3) of the vertices' type.

    Raises:
        ValueError: a mesh without area.
    """
    batch = vertices.shape[:-2]
    flat = vertices.reshape(-1, *vertices.shape[-2:])
    a, b, c = flat[:, faces].unbind(-2)  # (B, F, 3) each
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1).double()
    total = area.cumsum(-1)
    if not (total[:, -1] > 0).all():
        raise ValueError(f"mesh {int((total[:, -1] <= 0).nonzero()[0])} has no area to sample")
    draw = torch.rand(len(flat), count, generator=generator, dtype=torch.float64) * total[:, -1:]
    chosen = torch.searchsorted(total, draw, right=True).clamp_max(faces.shape[0] - 1)
    root, second = torch.rand(2, len(flat), count, 1, generator=generator, dtype=flat.dtype).unbind(0)
    root = root.sqrt()  # uniform in a triangle: Osada et al. 2002, eq. 1
    index = chosen.unsqueeze(-1).expand(-1, -1, 3)
    corner = [corners.gather(1, index) for corners in (a, b, c)]
    points = (1 - root) * corner[0] + root * (1 - second) * corner[1] + root * second * corner[2]
    return points.reshape(*batch, count, 3)


@dataclass(frozen=True)
class MeshFile:
    """Where a mesh of a labelled collection lies."""

    path: Tree
    label: int
    name: str


def find_meshes(root: Tree, split: str, suffix: str = ".off") -> tuple[list[MeshFile], list[str]]:
    """The meshes of ``<root>/<class>/<split>/*.off``, classes and files in sorted order.

    Args:
        root: a folder, or a folder inside a zip archive (see ``open_tree``). split: "train" or "test".

    Returns:
        (files, class names); a label is the position of the class among *all* classes of the root.

    Raises:
        UserError: no class folder with that split.
    """
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = []
    for label, name in enumerate(classes):
        folder = root / name / split
        entries = sorted((e for e in folder.iterdir()), key=lambda e: e.name) if folder.is_dir() else []
        files += [MeshFile(e, label, f"{name}/{split}/{e.name}") for e in entries if e.name.endswith(suffix)]
    if not files:
        raise UserError(f"{root}: no mesh at <class>/{split}/*{suffix} there")
    return files, classes


def open_tree(path: Path, inside: str = "") -> Tree:
    """A folder as it is; a zip archive as the folder it holds, entered at ``inside``."""
    if path.is_dir():
        return path / inside if inside else path
    try:
        tree: Tree = zipfile.Path(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: neither a folder nor a readable zip archive") from error
    return tree / inside if inside else tree


def sample_meshes(files: Sequence[MeshFile], count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` surface points of each mesh file, centred and scaled to the unit sphere, (N, count, 3) float32.

    Raises:
        UserError: an unreadable mesh or one without area, named.
    """

    def clouds() -> Iterator[torch.Tensor]:
        for file in files:  # meshes differ in size: one file at a time
            mesh = read_off(file.path)
            try:
                points = sample_surface(mesh.vertices, mesh.faces, count, generator)
            except ValueError as error:
                raise UserError(f"{file.name}: {error}") from error
            yield unit_sphere(points, file.name)

    return torch.stack(list(clouds()))


# ---- files of arrays -------------------------------------------------------------------------------------------


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The named arrays of an npz file; nothing pickled is read.

    Raises:
        UserError: no such file, not an npz, a key is missing, or an array is truncated or pickled.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            lacking = [key for key in keys if key not in archive.files]
            if lacking:
                raise UserError(f"{path}: no array {lacking[0]!r}, it holds {', '.join(archive.files) or 'nothing'}")
            return {key: archive[key] for key in keys}
    except FileNotFoundError as error:
        raise UserError(f"no file {path}, expected an npz with {', '.join(keys)}") from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz file ({error})") from error


def read_hdf5_clouds(files: Sequence[Path], classes: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Point clouds and labels of the HDF5 files of ModelNet40 and ShapeNetPart, one after the other.

    Args:
        files: each with ``data`` (N, n, 3) and ``label`` (N, 1) or (N,). classes: number of classes, checked.

    Returns:
        points (N, n, 3) float32 and labels (N,) int64.

    Raises:
        UserError: a file without ``data`` or ``label``, not HDF5, of another shape, NaN, or a label out of range.
    """
    import h5py

    points: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for path in files:
        try:
            with h5py.File(path, "r") as file:
                lacking = [key for key in ("data", "label") if key not in file]
                if lacking:
                    raise UserError(
                        f"{path}: no data set {lacking[0]!r}, it holds {', '.join(sorted(file)) or 'nothing'}"
                    )
                cloud = torch.from_numpy(np.asarray(file["data"], dtype=np.float32))
                label = torch.from_numpy(np.asarray(file["label"], dtype=np.int64).reshape(-1))
        except OSError as error:
            raise UserError(f"{path} is not a readable HDF5 file ({error})") from error
        check_clouds(cloud, str(path))
        if len(label) != len(cloud):
            raise UserError(f"{path}: {len(cloud)} clouds and {len(label)} labels")
        if points and cloud.shape[1] != points[0].shape[1]:
            raise UserError(f"{path}: {cloud.shape[1]} points a cloud, {files[0]} has {points[0].shape[1]}")
        wrong = (label < 0) | (label >= (classes if classes is not None else 2**31))
        if wrong.any():
            where = int(wrong.nonzero()[0])
            raise UserError(
                f"{path}: label {int(label[where])} of sample {where} is out of range 0..{(classes or 2**31) - 1}"
            )
        points.append(cloud)
        labels.append(label)
    if not points:
        raise UserError("no HDF5 file of point clouds to read")
    return torch.cat(points), torch.cat(labels)
