"""Tests of shared/shapes.py."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch

from shared import shapes
from shared.errors import UserError

CUBE = """OFF
# a cube of side 2 as six squares
8 6 12
-1 -1 -1
1 -1 -1
1 1 -1
-1 1 -1
-1 -1 1
1 -1 1
1 1 1
-1 1 1
4 0 3 2 1
4 4 5 6 7
4 0 1 5 4
4 1 2 6 5
4 2 3 7 6
4 3 0 4 7
"""


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- clouds


def test_unit_sphere_centres_and_scales() -> None:
    points = torch.randn(4, 50, 3) * 7 + 3
    out = shapes.unit_sphere(points)
    torch.testing.assert_close(out.mean(1), torch.zeros(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.norm(dim=-1).amax(1), torch.ones(4))
    torch.testing.assert_close(shapes.unit_sphere(out), out, atol=1e-6, rtol=1e-6)


def test_unit_sphere_refuses_coinciding_points() -> None:
    points = torch.randn(3, 5, 3)
    points[1] = 4.2
    with pytest.raises(UserError, match="sample 1 coincide"):
        shapes.unit_sphere(points, "file")


def test_check_clouds_names_the_sample() -> None:
    points = torch.zeros(3, 5, 3)
    points[2, 0, 0] = math.nan
    with pytest.raises(UserError, match="here: sample 2 holds NaN"):
        shapes.check_clouds(points, "here")
    with pytest.raises(UserError, match=r"shape \(3, 5, 2\)"):
        shapes.check_clouds(torch.zeros(3, 5, 2), "here")
    with pytest.raises(UserError, match="5 points a cloud, expected at least 6"):
        shapes.check_clouds(torch.zeros(3, 5, 3), "here", 6)


# ---- voxels


def test_surface_voxels_against_erosion() -> None:
    from scipy.ndimage import binary_erosion

    grids = torch.rand(5, 9, 9, 9, generator=gen()) < 0.8
    cross = np.zeros((3, 3, 3), bool)
    cross[1, 1, :] = cross[1, :, 1] = cross[:, 1, 1] = True
    expected = np.stack([g & ~binary_erosion(g, cross) for g in grids.numpy()])
    assert np.array_equal(shapes.surface_voxels(grids).numpy(), expected)


def test_sampled_voxels_lie_in_surface_cells() -> None:
    grids = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    grids[0, 1:7, 1:7, 1:7] = True
    grids[1, 3, 4, 5] = True
    points = shapes.sample_voxels(grids, 500, gen())
    assert points.shape == (2, 500, 3)
    cells = points.round().long()
    assert shapes.surface_voxels(grids)[0][tuple(cells[0].T)].all()
    assert (cells[1] == torch.tensor([3, 4, 5])).all()
    assert torch.equal(points, shapes.sample_voxels(grids, 500, gen()))
    counts = torch.unique(cells[0], dim=0).shape[0]
    assert counts > 130  # 152 surface cells, 500 draws: nearly all are hit
    with pytest.raises(ValueError, match="grid 0 is empty"):
        shapes.sample_voxels(torch.zeros_like(grids), 5, gen())


def save_voxels(path, width: int = 4096, empty: bool = False, keys=("X_train", "y_train", "X_test", "y_test")) -> None:
    x = np.full((3, width), 255, np.uint8)
    if empty:
        x[1] = 0
    arrays = {"X_train": x, "y_train": np.arange(3, dtype=np.uint8), "X_test": x[:1], "y_test": np.zeros(1, np.uint8)}
    np.savez(path, **{key: arrays[key] for key in keys})


def test_packed_voxels(tmp_path) -> None:
    save_voxels(tmp_path / "a.npz")
    out = shapes.read_packed_voxels(tmp_path / "a.npz")
    assert out["train"].grids.shape == (3, 32, 32, 32) and out["train"].grids.all()
    assert out["train"].labels.tolist() == [0, 1, 2] and len(out["test"].labels) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 512}, r"expected uint8 \(N, 4096\)"),
        ({"empty": True}, r"X_train\[1\] is an empty grid"),
        ({"keys": ("X_train", "y_train")}, "no array 'X_test'"),
    ],
)
def test_bad_packed_voxels(tmp_path, kwargs, message) -> None:
    save_voxels(tmp_path / "a.npz", **kwargs)
    with pytest.raises(UserError, match=message):
        shapes.read_packed_voxels(tmp_path / "a.npz")


def test_unreadable_npz(tmp_path) -> None:
    with pytest.raises(UserError, match="no file"):
        shapes.read_npz(tmp_path / "none.npz", ("data",))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="not a readable npz"):
        shapes.read_npz(tmp_path / "text.npz", ("data",))
    np.savez(tmp_path / "ok.npz", data=np.zeros((64, 2)))
    broken = (tmp_path / "ok.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(broken[: len(broken) // 2])
    with pytest.raises(UserError, match="not a readable npz"):
        shapes.read_npz(tmp_path / "cut.npz", ("data",))
    np.savez(tmp_path / "pickled.npz", data=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="not a readable npz"):
        shapes.read_npz(tmp_path / "pickled.npz", ("data",))


def test_real_voxels(data_root) -> None:
    out = shapes.read_packed_voxels(data_root / "modelnet10-voxels32" / "modelnet10_voxels32_packed.npz")
    assert out["train"].grids.shape == (3964, 32, 32, 32)
    assert out["train"].labels.bincount().tolist() == [94, 514, 889, 200, 200, 465, 200, 680, 379, 343]
    assert out["test"].labels.bincount().tolist() == [50, 100, 100, 85, 86, 100, 86, 100, 94, 100]
    grids = out["test"].grids[:50]
    points = shapes.sample_voxels(grids, 64, gen())
    cells = points.round().long()
    assert grids[torch.arange(50).unsqueeze(1), cells[..., 0], cells[..., 1], cells[..., 2]].all()


# ---- meshes


def test_off_polygons_become_fans() -> None:
    mesh = shapes.parse_off(CUBE)
    assert mesh.vertices.shape == (8, 3) and mesh.faces.shape == (12, 3)
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    assert float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum()) / 2 == pytest.approx(24.0)


def test_off_dialects_agree() -> None:
    triangles = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n"
    plain = shapes.parse_off("OFF\n4 2 0\n" + triangles)
    glued = shapes.parse_off("OFF4 2 0\n" + triangles)
    coloured = shapes.parse_off("COFF\n\n4 2 0 # counts\n" + triangles.replace("2\n", "2 255 0 0\n"))
    mixed = shapes.parse_off("OFF\n4 2 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n4 0 1 2 3\n")
    for other in (glued, coloured):
        assert torch.equal(plain.vertices, other.vertices) and torch.equal(plain.faces, other.faces)
    assert sorted(map(tuple, mixed.faces.tolist())) == [(0, 1, 2), (0, 1, 2), (0, 2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an OFF header"),
        ("ply\n", "expected an OFF header"),
        ("OFF\nx y\n", "no vertex and face counts"),
        ("OFF\n3 1 0\n0 0 0\n", "expected 3 vertices and 1 faces"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "outside 0..2"),
        ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n2 0 1\n", "malformed"),
        ("OFF\n3 1 0\n0 0 0\n1 0\n0 1 0\n3 0 1 2\n", "malformed"),
        ("OFF\n3 1 0\n0 0 nan\n1 0 0\n0 1 0\n3 0 1 2\n", "three finite numbers"),
    ],
)
def test_bad_off(text, message) -> None:
    with pytest.raises(UserError, match=message):
        shapes.parse_off(text, "file.off")


def test_surface_points_follow_area_and_lie_on_the_faces() -> None:
    mesh = shapes.parse_off(CUBE)
    points = shapes.sample_surface(mesh.vertices, mesh.faces, 60_000, gen())
    assert torch.allclose(points.abs().amax(1), torch.ones(60_000), atol=1e-6)
    side = points.abs().argmax(1) * 2 + (points.gather(1, points.abs().argmax(1, True)) > 0).long()[:, 0]
    share = side.bincount(minlength=6) / 60_000
    torch.testing.assert_close(share, torch.full((6,), 1 / 6), atol=0.01, rtol=0)
    stretched = mesh.vertices * torch.tensor([1.0, 1.0, 3.0])  # the four long sides have 6/7 of the area
    points = shapes.sample_surface(stretched, mesh.faces, 60_000, gen())
    long = (points[:, :2].abs().amax(1) > 1 - 1e-6).float().mean()
    assert float(long) == pytest.approx(6 / 7, abs=0.01)


def test_a_batch_of_meshes_is_sampled_like_each_alone() -> None:
    mesh = shapes.parse_off(CUBE)
    batch = torch.stack([mesh.vertices, 2 * mesh.vertices])
    points = shapes.sample_surface(batch, mesh.faces, 1000, gen())
    assert points.shape == (2, 1000, 3)
    assert torch.allclose(points.abs().amax(-1), torch.tensor([[1.0], [2.0]]).expand(2, 1000), atol=1e-5)
    with pytest.raises(ValueError, match="mesh 1 has no area"):
        shapes.sample_surface(batch * torch.tensor([1.0, 0.0]).view(2, 1, 1), mesh.faces, 5, gen())


def test_trimesh_gives_the_same_area_and_moments() -> None:
    trimesh = pytest.importorskip("trimesh")
    mesh = shapes.parse_off(CUBE)
    peer = trimesh.Trimesh(mesh.vertices.numpy() * [1, 2, 3], mesh.faces.numpy(), process=False)
    ours = shapes.sample_surface(torch.from_numpy(np.asarray(peer.vertices)).float(), mesh.faces, 40_000, gen())
    theirs, _ = trimesh.sample.sample_surface(peer, 40_000, seed=0)
    np.testing.assert_allclose(ours.numpy().mean(0), theirs.mean(0), atol=0.04)
    np.testing.assert_allclose(np.cov(ours.numpy().T), np.cov(theirs.T), atol=0.08)


def write_meshes(root, classes=("b", "a")) -> None:
    for name in classes:
        for split in ("train", "test"):
            folder = root / name / split
            folder.mkdir(parents=True)
            for i in (1, 0):
                (folder / f"{name}_{i}.off").write_text(CUBE)


def test_mesh_folders_and_zips(tmp_path) -> None:
    write_meshes(tmp_path / "raw")
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for path in sorted((tmp_path / "raw").rglob("*.off")):
            archive.write(path, path.relative_to(tmp_path).as_posix())
    folder = shapes.find_meshes(shapes.open_tree(tmp_path / "raw"), "train")
    archive_files = shapes.find_meshes(shapes.open_tree(tmp_path / "raw.zip", "raw"), "train")
    assert [f.name for f in folder[0]] == [f.name for f in archive_files[0]] == [
        "a/train/a_0.off", "a/train/a_1.off", "b/train/b_0.off", "b/train/b_1.off",
    ]  # fmt: skip
    assert [f.label for f in folder[0]] == [0, 0, 1, 1] and folder[1] == ["a", "b"]
    same = shapes.sample_meshes(folder[0], 32, gen()), shapes.sample_meshes(archive_files[0], 32, gen())
    assert same[0].shape == (4, 32, 3) and torch.equal(*same)
    with pytest.raises(UserError, match="no mesh at"):
        shapes.find_meshes(shapes.open_tree(tmp_path / "raw"), "val")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UserError, match="neither a folder nor"):
        shapes.open_tree(tmp_path / "text.zip")


def test_real_meshes(data_root) -> None:
    files, classes = shapes.find_meshes(shapes.open_tree(data_root / "geometric-shapes" / "raw.zip", "raw"), "train")
    assert len(files) == len(classes) == 40
    assert shapes.sample_meshes(files, 128, gen()).shape == (40, 128, 3)


def test_classic_meshes_load(data_root) -> None:
    meshes = sorted((data_root / "meshes-trimesh").rglob("*.off"))
    if not meshes:
        pytest.skip("no OFF among the classic meshes")
    for path in meshes:
        assert len(shapes.read_off(path).faces)


# ---- HDF5


def save_h5(path, data=None, label=None) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        if data is not None:
            file["data"] = data
        if label is not None:
            file["label"] = label


def test_hdf5_clouds(tmp_path) -> None:
    save_h5(tmp_path / "a.h5", np.ones((2, 5, 3), np.float32), np.array([[3], [1]], np.uint8))
    save_h5(tmp_path / "b.h5", np.zeros((1, 5, 3), np.float64), np.array([2]))
    points, labels = shapes.read_hdf5_clouds([tmp_path / "a.h5", tmp_path / "b.h5"], 4)
    assert points.shape == (3, 5, 3) and points.dtype == torch.float32 and labels.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("data", "label", "message"),
    [
        (None, [[1]], "no data set 'data', it holds label"),
        (np.zeros((1, 5, 3)), None, "no data set 'label'"),
        (np.zeros((1, 5, 2)), [[1]], r"expected \(clouds, points, 3\)"),
        (np.full((1, 5, 3), np.inf), [[1]], "sample 0 holds NaN or infinite"),
        (np.zeros((2, 5, 3)), [[1]], "2 clouds and 1 labels"),
        (np.zeros((2, 5, 3)), [[1], [4]], r"label 4 of sample 1 is out of range 0\.\.3"),
    ],
)
def test_bad_hdf5(tmp_path, data, label, message) -> None:
    save_h5(tmp_path / "a.h5", data, label)
    with pytest.raises(UserError, match=message):
        shapes.read_hdf5_clouds([tmp_path / "a.h5"], 4)


def test_unreadable_hdf5(tmp_path) -> None:
    (tmp_path / "a.h5").write_text("no hdf5")
    with pytest.raises(UserError, match="not a readable HDF5"):
        shapes.read_hdf5_clouds([tmp_path / "a.h5"])
    with pytest.raises(UserError, match="no HDF5 file"):
        shapes.read_hdf5_clouds([])
