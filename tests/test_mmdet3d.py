"""The installed mmdet3d and compiled mmcv do on the CPU what the detection papers rely on.

Both come with ``uv sync --extra mmdet3d``; without that extra the module is skipped.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REASON = "the extra mmdet3d is not installed (uv sync --extra mmdet3d)"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mmcv.ops", reason=REASON)
    pytest.importorskip("mmdet3d.structures", reason=REASON)

POINTS = 34_688
RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


@pytest.fixture(scope="module")
def frame(data_root: Path) -> Path:
    """The folder of the real key frame."""
    folder = data_root / "nuscenes-one-frame"
    if not folder.is_dir():
        pytest.skip(f"no nuScenes frame at {folder}")
    return folder


@pytest.fixture(scope="module")
def info(frame: Path) -> dict[str, Any]:
    """The frame's annotation record."""
    from shared.unpickle import restricted_load

    return restricted_load(next(frame.glob("n015-*.pkl")))


@pytest.fixture(scope="module")
def points(frame: Path) -> np.ndarray:
    """(34688, 5) float32: x, y, z, intensity, ring."""
    return np.fromfile(next(frame.glob("*LIDAR_TOP*.pcd.bin")), dtype=np.float32).reshape(-1, 5)


def test_boxes_stand_on_their_bottom_centre() -> None:
    from mmdet3d.structures import LiDARInstance3DBoxes

    yaw = 0.3
    box = LiDARInstance3DBoxes(torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.0, 1.5, yaw]]))
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    expected = sorted(
        (*(np.array([1.0, 2.0]) + turn @ (dx * 2.0, dy * 1.0)), 3.0 + dz)
        for dx in (-1, 1)
        for dy in (-1, 1)
        for dz in (0.0, 1.5)
    )
    corners = sorted(map(tuple, box.corners[0].tolist()))
    np.testing.assert_allclose(corners, expected, atol=1e-5)
    assert box.volume.item() == pytest.approx(4.0 * 2.0 * 1.5)
    np.testing.assert_allclose(box.gravity_center[0], (1.0, 2.0, 3.75))


def test_a_centre_in_the_middle_is_moved_to_the_bottom() -> None:
    from mmdet3d.structures import LiDARInstance3DBoxes

    box = LiDARInstance3DBoxes(torch.tensor([[0.0, 0.0, 1.0, 4.0, 2.0, 3.0, 0.0]]), origin=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(box.bottom_center[0], (0.0, 0.0, -0.5))
    np.testing.assert_allclose(box.gravity_center[0], (0.0, 0.0, 1.0))


def check_voxels(points: np.ndarray, size: tuple[float, float, float], most: int) -> None:
    """Voxels of mmcv's compiled operator against a count in numpy."""
    from mmcv.ops import Voxelization

    low, high = np.array(RANGE[:3], dtype=np.float32), np.array(RANGE[3:], dtype=np.float32)
    # Both in float32, as the operator computes: a point on a border must fall on the same side.
    cell = np.floor((points[:, :3] - low) / np.array(size, dtype=np.float32)).astype(np.int64)
    grid = np.round((high - low) / np.array(size)).astype(np.int64)
    inside = ((cell >= 0) & (cell < grid)).all(axis=1)
    cells, counts = np.unique(cell[inside], axis=0, return_counts=True)

    operator = Voxelization(list(size), list(RANGE), max_num_points=most, max_voxels=len(cells) + 1)
    voxels, coordinates, occupied = operator(torch.from_numpy(points))
    assert voxels.shape == (len(cells), most, points.shape[1])
    assert occupied.sum().item() == np.minimum(counts, most).sum()
    found = {tuple(zyx[::-1]): number for zyx, number in zip(coordinates.tolist(), occupied.tolist())}
    assert found == dict(zip(map(tuple, cells.tolist()), np.minimum(counts, most).tolist()))
    filled = torch.arange(most) < occupied[:, None]
    assert not voxels[~filled].any(), "unused places are zero"
    if counts.max() <= most:
        order = np.lexsort(points[inside].T)
        kept = voxels[filled].numpy()
        np.testing.assert_array_equal(kept[np.lexsort(kept.T)], points[inside][order])


def test_voxels_of_generated_points() -> None:
    generator = np.random.default_rng(0)
    points = generator.uniform(-60, 60, size=(5_000, 4)).astype(np.float32)
    points[:, 2] = generator.uniform(-6, 4, size=5_000)
    check_voxels(points, (0.5, 0.5, 8.0), most=64)
    check_voxels(points, (4.0, 4.0, 2.0), most=2)


def test_voxels_of_the_real_sweep(points: np.ndarray) -> None:
    assert points.shape == (POINTS, 5)
    check_voxels(points, (0.5, 0.5, 8.0), most=20)
    check_voxels(points, (0.25, 0.25, 0.5), most=256)


def test_dataset_reads_the_real_frame(frame: Path, info: dict[str, Any], points: np.ndarray) -> None:
    from mmdet3d.datasets import NuScenesDataset
    from mmdet3d.datasets.transforms import LoadAnnotations3D, LoadPointsFromFile, Pack3DDetInputs

    dataset = NuScenesDataset(
        data_root=str(frame),
        ann_file=next(frame.glob("n015-*.pkl")).name,
        pipeline=[
            LoadPointsFromFile(coord_type="LIDAR", load_dim=5, use_dim=5),
            LoadAnnotations3D(with_bbox_3d=True, with_label_3d=True),
            Pack3DDetInputs(keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
        ],
        data_prefix={"pts": "", "sweeps": ""},
        modality={"use_lidar": True, "use_camera": False},
        box_type_3d="LiDAR",
    )
    assert len(dataset) == 1
    assert dataset.metainfo["categories"] == info["metainfo"]["categories"]
    item = dataset[0]
    assert item["inputs"]["points"].shape == (POINTS, 5)
    np.testing.assert_array_equal(item["inputs"]["points"].numpy(), points)

    instances = info["data_list"][0]["instances"]
    assert len(instances) == 69
    seen = [instance for instance in instances if instance["num_lidar_pts"] > 0]  # the dataset's own filter
    truth = item["data_samples"].gt_instances_3d
    labels = truth.labels_3d.tolist()
    assert labels == [instance["bbox_label_3d"] for instance in seen]
    assert len(labels) == 66
    names = dataset.metainfo["classes"]
    assert {names[label]: labels.count(label) for label in sorted(set(labels)) if label >= 0} == {
        "car": 8,
        "truck": 2,
        "bus": 1,
        "construction_vehicle": 1,
        "bicycle": 1,
        "pedestrian": 27,
        "traffic_cone": 3,
        "barrier": 22,
    }
    written = np.array([instance["bbox_3d"] for instance in seen])
    np.testing.assert_allclose(truth.bboxes_3d.gravity_center, written[:, :3], atol=1e-5)
    np.testing.assert_allclose(truth.bboxes_3d.dims, written[:, 3:6], atol=1e-5)
    np.testing.assert_allclose(truth.bboxes_3d.yaw, written[:, 6], atol=1e-5)
    velocity = np.nan_to_num([instance["velocity"] for instance in seen])  # unknown velocities are read as zero
    np.testing.assert_allclose(truth.bboxes_3d.tensor[:, 7:], velocity, atol=1e-5)


def test_boxes_hold_the_points_that_the_annotators_counted(info: dict[str, Any], points: np.ndarray) -> None:
    """Box frame, yaw direction and vertical origin are right together, or the counts are far off."""
    from mmcv.ops import points_in_boxes_cpu
    from mmdet3d.structures import LiDARInstance3DBoxes

    instances = info["data_list"][0]["instances"]
    boxes = LiDARInstance3DBoxes(torch.tensor([i["bbox_3d"] for i in instances]), origin=(0.5, 0.5, 0.5))
    inside = points_in_boxes_cpu(torch.from_numpy(points[None, :, :3]), boxes.tensor[None])[0].sum(dim=0).numpy()
    counted = np.array([instance["num_lidar_pts"] for instance in instances])
    assert (inside == counted).sum() >= 60
    assert np.abs(inside - counted).sum() <= 0.05 * counted.sum()
