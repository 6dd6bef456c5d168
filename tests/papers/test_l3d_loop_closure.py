"""Loop closure with local 3D descriptors: hand values, plain forms, peers, files, claims that can fail."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from papers.l3d_loop_closure import data, model, protocol
from shared.errors import UserError
from shared.paper import read_paper

SLUG = "l3d_loop_closure"
FOLDER = Path(__file__).resolve().parents[2] / "papers" / SLUG
EYE = torch.eye(4, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pose(seed: int = 0, scale: float = 1.0) -> Tensor:
    twist = torch.randn(6, generator=generator(seed), dtype=torch.float64)
    return model.se3_exp(scale * twist)


def blob(n: int = 400, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, generator=generator(seed), dtype=torch.float64)


# ---- rigid motions -------------------------------------------------------------------------------------------------


def test_log_and_quaternion_agree_with_scipy_up_to_half_turns():
    from scipy.spatial.transform import Rotation

    vectors = torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    vectors *= (
        torch.rand(50, 1, generator=generator(1), dtype=torch.float64) * math.pi / vectors.norm(dim=1, keepdim=True)
    )
    vectors[0], vectors[1], vectors[2] = 0, vectors[1] * 1e-9, torch.tensor([math.pi, 0, 0])
    twist = torch.cat([torch.randn(50, 3, generator=generator(2), dtype=torch.float64), vectors], 1)
    poses = model.se3_exp(twist)
    peer = Rotation.from_rotvec(vectors.numpy())
    assert np.allclose(poses[:, :3, :3], peer.as_matrix(), atol=1e-12)
    q = model.quaternion(poses[:, :3, :3])
    assert np.allclose(np.abs((q.numpy() * peer.as_quat()).sum(1)), 1)
    assert torch.allclose(model.se3_exp(model.se3_log(poses)), poses, atol=1e-9)
    assert torch.allclose(model.se3_log(poses)[3:], twist[3:], atol=1e-7)
    assert torch.allclose(data.poses_of(torch.cat([poses[:, :3, 3], q], 1)), poses, atol=1e-12)


def test_kabsch_recovers_a_motion_from_three_points_and_never_mirrors():
    pose, points = random_pose(3), blob(3, 4)
    assert torch.allclose(model.kabsch(points, model.apply(pose, points)), pose, atol=1e-9)
    flat = torch.cat([blob(20)[:, :2], torch.zeros(20, 1, dtype=torch.float64)], 1)
    found = model.kabsch(flat, flat * torch.tensor([1.0, 1, -1]))
    assert torch.linalg.det(found[:3, :3]) > 0.99
    weight = torch.ones(20)
    weight[0] = 0
    moved = model.apply(pose, flat)
    moved[0] += 5
    assert torch.allclose(model.kabsch(flat, moved, weight), pose, atol=1e-9)


def test_a_pose_that_is_not_rigid_is_refused_with_its_determinant():
    bad = EYE.clone()
    bad[0, 0] = -1
    with pytest.raises(ValueError, match="determinant -1"):
        model.overlap(blob(), blob(), bad)
    with pytest.raises(ValueError, match="determinant 8"):
        model.ron(blob(), blob(), torch.zeros(0, 2, dtype=torch.long), 2 * EYE)
    with pytest.raises(ValueError, match="shape"):
        model.check_rigid(torch.eye(3))


# ---- frames and patches --------------------------------------------------------------------------------------------


def released_frame(cloud: np.ndarray, point: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """The frame of one key point and its patch, step by step."""
    distance = np.linalg.norm(cloud - point, axis=1)
    around = cloud[distance <= radius] - point
    spread = around[distance[distance <= radius] > 0]
    normal = np.linalg.eigh(spread.T @ spread)[1][:, 0]
    z = normal if (-spread @ normal).sum() > 0 else -normal
    height = spread @ z
    weight = (radius - np.linalg.norm(spread, axis=1)) ** 2 * height**2
    x = ((spread - height[:, None] * z) * weight[:, None]).sum(0)
    with np.errstate(invalid="ignore"):  # a plane
        x /= np.linalg.norm(x)
    frame = np.stack([x, np.cross(x, z), z], 1)
    return frame, around @ frame / radius


def test_frames_and_patches_equal_the_step_by_step_form():
    cloud = blob(500) * torch.tensor([2.0, 1.5, 0.5])
    patches = model.local_patches(cloud, cloud[:40], 1.2, 512, generator())
    for i in range(40):
        frame, patch = released_frame(cloud.numpy(), cloud[i].numpy(), 1.2)
        assert patches.count[i] == len(patch)
        if patches.valid[i]:
            assert np.allclose(patches.frames[i], frame, atol=1e-9)
            ours = patches.points[i, : len(patch)].numpy()
            assert np.allclose(ours[np.lexsort(ours.T)], patch[np.lexsort(patch.T)], atol=1e-6)
        assert (patches.points[i, len(patch) :] == 0).all()
    assert patches.valid.sum() > 30


def test_patches_do_not_change_when_the_scan_moves():
    cloud, pose = blob(300), random_pose(5, 2.0)
    one = model.local_patches(cloud, cloud[:50], 0.9, 64, generator())
    two = model.local_patches(model.apply(pose, cloud), model.apply(pose, cloud[:50]), 0.9, 64, generator())
    assert one.valid.any() and torch.equal(one.count, two.count)
    assert torch.allclose(one.points, two.points, atol=1e-6)


def test_z_turns_away_from_the_neighbours():
    bowl = torch.cat([blob(200)[:, :2], torch.zeros(200, 1, dtype=torch.float64)], 1)
    bowl[:, 2] = 0.3 * bowl[:, :2].square().sum(1)
    for sign in (1.0, -1.0):
        turned = bowl * torch.tensor([1, 1, sign])
        frame = model.local_patches(turned, torch.zeros(1, 3, dtype=torch.float64), 0.8, 64, generator()).frames[0]
        assert float(frame[2, 2]) * sign < -0.9


def test_planes_and_lonely_points_have_no_frame():
    plane = torch.cat([blob(200)[:, :2], torch.zeros(200, 1, dtype=torch.float64)], 1)
    lonely = torch.tensor([[50.0, 0, 0], [50.1, 0, 0], [50.2, 0.1, 0]], dtype=torch.float64)
    cloud = torch.cat([plane, lonely])
    patches = model.local_patches(cloud, cloud[[0, 200]], 1.0, 32, generator())
    assert not patches.valid.any() and (patches.points == 0).all()
    descriptor, rho = model.DIP(4, (4, 4, 4), (4, 4)).describe(patches)
    assert descriptor.isnan().all() and rho.isnan().all()


def test_a_patch_is_a_subset_without_replacement():
    cloud = blob(600)
    patches = model.local_patches(cloud, cloud[:5], 5.0, 100, generator())
    assert len(patches.points[0].unique(dim=0)) == 100
    other = model.local_patches(cloud, cloud[:5], 5.0, 100, generator(1))
    assert not torch.equal(patches.points, other.points)
    with pytest.raises(ValueError, match="radius"):
        model.local_patches(cloud, cloud[:5], 0.0, 100, generator())


def test_voxels_average_their_points():
    points = torch.tensor([[0.0, 0, 0], [0.2, 0, 0], [0.9, 0, 0], [5.0, 5, 5]])
    assert torch.allclose(model.voxel_downsample(points, 0.5), torch.tensor([[0.1, 0, 0], [0.9, 0, 0], [5.0, 5, 5]]))


def test_correspondences_and_farthest_points():
    cloud, pose = blob(200), random_pose(1)
    match = model.correspondences(cloud, model.apply(pose, cloud)[50:], pose, 0.05)
    assert torch.equal(match[:, 0], match[:, 1] + 50) and len(match) == 150
    line = torch.arange(10.0).unsqueeze(1) * torch.tensor([1.0, 0, 0])
    assert {0, 9} <= set(model.farthest_points(line, 4, generator()).tolist())
    with pytest.raises(ValueError, match="farthest"):
        model.farthest_points(line, 11, generator())


# ---- the network ---------------------------------------------------------------------------------------------------


def plain(net: model.DIP, points: Tensor) -> tuple[Tensor, Tensor]:
    """The network as a stack of its layers on (K, 3, n): the form of the released code."""

    def trunk(part: torch.nn.Module, x: Tensor) -> Tensor:
        return part.conv3(part.conv2(part.conv1(x))).amax(2)

    x, tnet = points.mT, net.stn3d
    turn = tnet.fc3(tnet.fc2(tnet.fc1(trunk(tnet, x)))).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
    turned = turn @ x
    out = net.fc3(net.fc2(net.fc1(trunk(net, turned))))
    return torch.nn.functional.normalize(out, dim=1), turned.mT


def small_net(dropout: float = 0.0) -> model.DIP:
    net = model.DIP(8, (12, 16, 24), (16, 8), dropout).double()
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm1d):  # scales of both signs: the maximum turns into a minimum
            torch.nn.init.normal_(part.weight)
            torch.nn.init.normal_(part.bias)
            torch.nn.init.normal_(part.running_mean)
            part.running_var.uniform_(0.5, 2)
    return net


def test_parameters_are_those_of_the_released_network():
    with torch.device("meta"):
        net = model.DIP()
    tnet = sum(p.numel() for p in net.stn3d.parameters())
    total = sum(p.numel() for p in net.parameters())
    assert (tnet, total - tnet, total) == (1_321_481, 1_327_392, 2_648_873)
    names = set(net.state_dict())
    assert {"stn3d.conv1.0.weight", "conv3.1.running_var", "fc2.2.weight", "stn3d.fc2.1.bias", "fc3.0.bias"} <= names


def test_every_preset_builds_its_network_on_meta(train):
    sizes = {}
    for name, preset in train.PRESETS.items():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in train.build(preset.config).parameters())
    full = {"kitti00-loop", "kitti00-reloc", "dip-3dmatch", "eth", "tum"}
    assert {sizes[name] for name in full} == {2_648_873}
    assert sizes["smoke"] < sizes["default"] == sizes["samples"] < 100_000


def test_training_passes_equal_the_plain_layers():
    ours, other = small_net(), None
    other = copy.deepcopy(ours)
    x, y = blob(6 * 20, 1).view(6, 20, 3), blob(6 * 20, 2).view(6, 20, 3)
    a, b = ours(x), ours(y)
    f, turned_f = plain(other, x)
    g, turned_g = plain(other, y)
    assert torch.allclose(a.descriptor, f, atol=1e-10) and torch.allclose(b.points, turned_g, atol=1e-10)
    distance = torch.cdist(f, g) + 1e9 * torch.eye(6, dtype=f.dtype)
    contrast = torch.relu((f - g).norm(dim=1) - 0.1).square().mean()
    contrast += 0.5 * sum(torch.relu(1.4 - distance.amin(k)).square().mean() for k in (0, 1))
    between = torch.cdist(turned_f, turned_g).square()
    loss = contrast + 0.5 * (between.amin(1).mean() + between.amin(2).mean())
    ours_loss = model.dip_loss(a, b)
    assert torch.allclose(ours_loss, loss, atol=1e-9)
    loss.backward()
    ours_loss.backward()
    for (name, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("conv3.0.bias"):  # it cancels in the normalisation: no gradient here, rounding there
            assert torch.allclose(p.grad, q.grad, atol=1e-8), name
    for p, q in zip(ours.buffers(), other.buffers(), strict=True):
        assert torch.allclose(p.double(), q.double(), atol=1e-10)


def test_evaluation_equals_the_plain_layers_and_padding_is_free():
    net = small_net(0.3).eval()
    cloud = blob(300)
    patches = model.local_patches(cloud, cloud[:30], 0.7, 64, generator())
    with torch.no_grad():
        expected, _ = plain(net, patches.points.double())
    descriptor, rho = net.float().describe(patches)
    good = patches.valid
    assert good.any() and torch.allclose(descriptor[good], expected[good].float(), atol=1e-4)
    assert descriptor[~good].isnan().all() and (rho[good] > 0).all()
    assert not net.training


def test_one_step_of_the_released_network(train):
    net = train.build(train.PRESETS["dip-3dmatch"].config)
    optimiser = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=1e-3)
    before = net.conv3[0].weight.clone()
    loss = model.dip_loss(net(torch.randn(3, 8, 3)), net(torch.randn(3, 8, 3)))
    loss.backward()
    optimiser.step()
    assert loss.isfinite() and not torch.equal(before, net.conv3[0].weight)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="expected sizes"):
        model.DIP(widths=(0, 1, 1))


def test_hardest_contrastive_on_orthonormal_descriptors():
    f = torch.eye(5)
    assert model.hardest_contrastive(f, f) == 0  # positives at 0; negatives at sqrt 2 > 1.4
    moved = f.roll(1, 0)
    expected = (math.sqrt(2) - 0.1) ** 2 + 1.4**2  # every negative at distance 0
    assert float(model.hardest_contrastive(f, moved)) == pytest.approx(expected, rel=1e-6)


# ---- FPFH ----------------------------------------------------------------------------------------------------------


def test_fpfh_sums_and_does_not_depend_on_the_heading():
    cloud = torch.rand(600, 3, generator=generator(), dtype=torch.float64) * torch.tensor([3.0, 3, 1.5])
    cloud[:, 0] += 4
    found = model.fpfh(cloud, torch.arange(50), 0.8)
    assert torch.allclose(found.sum(1), torch.tensor(600.0), atol=1e-2)
    pose = random_pose(7)
    pose[:3, 3] = 0  # about the sensor, which the normals face
    assert torch.allclose(found, model.fpfh(model.apply(pose, cloud), torch.arange(50), 0.8), atol=1e-2)
    few = model.fpfh(cloud, torch.arange(50), 0.8, most=8)
    assert not torch.allclose(few, found) and torch.nn.functional.cosine_similarity(few, found).mean() > 0.7


def test_fpfh_equals_a_loop_over_pairs_with_inverse_squared_distances():
    cloud, radius = blob(60) + torch.tensor([4.0, 0, 0]), 1.2
    normal = model.normals(cloud, cloud, model.radius_neighbours(cloud, cloud, radius)).numpy()
    points = cloud.numpy()
    gap = np.linalg.norm(points[:, None] - points, axis=2)
    simple = np.zeros((60, 3, 11))
    for i in range(60):
        near = np.flatnonzero((gap[i] <= radius) & (gap[i] > 0))
        for j in near:
            line, one, two = (points[j] - points[i]) / gap[i, j], normal[i], normal[j]
            if abs(one @ line) < abs(two @ line):
                line, one, two = -line, two, one
            v = np.cross(line, one)
            v /= np.linalg.norm(v)
            angle = math.atan2(np.cross(one, v) @ two, one @ two) / math.pi
            for k, value in enumerate((angle, v @ two, one @ line)):
                simple[i, k, min(10, int(5.5 * (value + 1)))] += 100 / len(near)
    expected = simple.copy()
    for i in range(60):
        near = np.flatnonzero((gap[i] <= radius) & (gap[i] > 0))
        if len(near):
            around = (simple[near] / gap[i, near, None, None] ** 2).sum(0)
            expected[i] += 100 * around / around.sum(1, keepdims=True)
    assert np.allclose(model.fpfh(cloud, torch.arange(60), radius), expected.reshape(60, 33), atol=1e-3)


def test_fpfh_equals_open3d():
    o3d = pytest.importorskip("open3d", exc_type=ImportError)
    cloud = blob(400) + torch.tensor([4.0, 0, 0])
    peer = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud.numpy()))
    peer.normals = o3d.utility.Vector3dVector(
        model.normals(cloud, cloud, model.radius_neighbours(cloud, cloud, 1.0)).numpy()
    )
    search = o3d.geometry.KDTreeSearchParamRadius(1.0)
    expected = np.asarray(o3d.pipelines.registration.compute_fpfh_feature(peer, search).data).T
    ours = model.fpfh(cloud, torch.arange(400), 1.0).numpy()
    assert np.median(np.abs(ours - expected)) < 1e-4  # values on the edge of a bin may fall to either side
    assert np.abs(ours - expected).mean() < 0.05


# ---- registration --------------------------------------------------------------------------------------------------


def test_nearest_descriptors_in_tiles_equal_all_distances(monkeypatch):
    a, b = torch.randn(70, 8, generator=generator()), torch.randn(50, 8, generator=generator(1))
    monkeypatch.setattr(model, "CHUNK", 400)
    distance = torch.cdist(a, b)
    assert torch.equal(model.nearest_descriptors(a, b), distance.argmin(1))
    assert torch.equal(model.nearest_descriptors(b, a), distance.argmin(0))
    with pytest.raises(ValueError, match="length 8 and 7"):
        model.nearest_descriptors(a, b[:, :7])


def test_ransac_finds_the_motion_among_outliers():
    pose, points = random_pose(2), 10 * blob(300)
    target = model.apply(pose, points) + 0.01 * blob(300, 9)
    target[:200] = 10 * blob(200, 3)
    found = model.ransac(points, target, 0.1, 20000, generator())
    metres, degrees = model.pose_error(found.pose, pose)
    assert metres < 0.02 and degrees < 0.2 and 0.3 < found.fitness < 0.36 and found.tested > 0
    nothing = model.ransac(points, 10 * blob(300, 8), 0.001, 50, generator())
    assert nothing.fitness == 0 and torch.equal(nothing.pose, EYE)
    assert model.ransac(points[:2], target[:2], 0.1, 10, generator()).fitness == 0


def test_inliers_of_all_hypotheses_equal_those_of_each():
    poses = torch.stack([random_pose(seed, 0.3) for seed in range(6)])
    p, q = 3 * blob(80), 3 * blob(80) + 0.3 * blob(80, 1)
    count, error = model._inliers(poses, p, q, 1.5)
    square = (model.apply(poses, p) - q).square().sum(2)
    inside = square <= 1.5**2
    assert count.tolist() == inside.sum(1).tolist() and 0 < count.sum() < 480
    assert torch.allclose(error, (square * inside).sum(1))


def test_ransac_agrees_with_open3d():
    o3d = pytest.importorskip("open3d", exc_type=ImportError)
    pose, points = random_pose(2), 10 * blob(200)
    target = model.apply(pose, points)
    target[:100] = 10 * blob(100, 3)
    cloud = [o3d.geometry.PointCloud(o3d.utility.Vector3dVector(x.numpy())) for x in (points, target)]
    same = o3d.utility.Vector2iVector(np.stack([np.arange(200)] * 2, 1))
    registration = o3d.pipelines.registration
    peer = registration.registration_ransac_based_on_correspondence(
        *cloud, same, 0.1, registration.TransformationEstimationPointToPoint(False), 3
    )
    found = model.ransac(points, target, 0.1, 5000, generator())
    assert np.allclose(found.pose, peer.transformation, atol=1e-6)
    assert found.fitness == pytest.approx(peer.fitness, abs=0.02)


def test_icp_refines():
    cloud, pose = blob(500), random_pose(1, 0.03)
    found = model.icp(cloud, model.apply(pose, cloud), EYE, 1.0, 60)
    assert torch.allclose(found, pose, atol=1e-5)
    with pytest.raises(ValueError, match="neighbour"):
        model.icp(cloud, cloud + 100, EYE, 1.0)


# ---- scores --------------------------------------------------------------------------------------------------------


def test_ron_by_hand():
    points = torch.tensor([[0.0, 0, 0], [10, 0, 0]])
    descriptors = torch.eye(2)
    swapped = model.mutual_pairs(descriptors, descriptors.flip(0))
    assert swapped.tolist() == [[0, 1], [1, 0]] and model.ron(points, points, swapped, EYE) == 0
    right = model.mutual_pairs(descriptors, descriptors)
    assert model.ron(points, points, right, EYE) == 1
    off = EYE.clone()
    off[0, 3] = 2
    assert model.ron(points, points, right, off) == 0
    assert model.ron(points, points, right[:0], EYE) == 0  # no mutual pair


def test_the_pose_maps_current_to_reference():
    pose, points = random_pose(4, 2.0), 10 * blob(200)
    keys = model.Keys(points, torch.nn.functional.normalize(torch.randn(200, 16, generator=generator())))
    moved = model.Keys(model.apply(pose, points), keys.descriptors)
    found = model.score_pair(keys, moved, generator(), hypotheses=500, share=1.0)
    assert torch.allclose(found.pose, pose, atol=1e-6)
    assert (found.ron, found.mnn, found.fitness) == (1, 1, 1)
    pairs = torch.arange(200).unsqueeze(1).expand(-1, 2)
    assert model.ron(keys.points, moved.points, pairs, model.inverse(pose)) < 0.1


def test_random_descriptors_have_few_mutual_pairs_and_replacement_breaks_more():
    def keys(seed: int) -> model.Keys:
        return model.Keys(20 * blob(400, seed), torch.randn(400, 32, generator=generator(seed)))

    found = model.score_pair(keys(1), keys(2), generator(), hypotheses=200)
    assert found.ron < 0.1 and found.mnn < 0.6
    same = keys(1)
    whole = model.score_pair(same, same, generator(), hypotheses=200, share=1.0)
    with_replacement = model.score_pair(same, same, generator(), hypotheses=200, share=1.0, replacement=True)
    assert whole.mnn == 1 and with_replacement.mnn < 0.6


def test_scans_with_next_to_no_descriptor_score_nothing():
    empty = model.Keys(torch.zeros(5, 3), torch.full((5, 4), math.nan))
    good = model.Keys(blob(5).float(), torch.randn(5, 4))
    found = model.score_pair(empty, good, generator())
    assert (found.fitness, found.mnn, found.ron) == (0, 0, 0) and torch.equal(found.pose, EYE)
    with pytest.raises(ValueError, match="length 4 and 3"):
        model.score_pair(empty, model.Keys(good.points, torch.randn(5, 3)), generator())


def test_range_image_by_hand():
    sensor = model.Sensor(height=2, width=4, fov_up=45, fov_down=-45, max_range=10)
    points = torch.tensor([[2.0, 0.1, 0.1], [3.0, 0.1, 0.1], [0.1, 4.0, -0.1], [20.0, 0, 0], [0, 0, 0]])
    image = model.range_image(points, sensor)
    # yaw runs from +pi on the left, the nearest point of a pixel wins, far ones and the origin are left out.
    assert float(image[0, 1]) == pytest.approx(math.sqrt(4.02)) and float(image[1, 1 - 1]) == -1
    assert int((image > 0).sum()) == 2 and float(image.max()) == pytest.approx(math.sqrt(16.02))
    assert model.overlap(points, points, EYE, sensor) == 1


# ---- precision and recall ------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand():
    curve = protocol.precision_recall(torch.tensor([0.6, 0.9, 0.7, 0.8]), torch.tensor([True, True, True, False]))
    assert torch.allclose(curve.precision, torch.tensor([1, 0.5, 2 / 3, 0.75], dtype=torch.float64))
    assert torch.allclose(curve.recall, torch.tensor([1, 1, 2, 3], dtype=torch.float64) / 3)
    assert curve.f1_max() == pytest.approx(6 / 7) and curve.recall_at_full_precision() == pytest.approx(1 / 3)
    assert curve.threshold.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    area = 1 / 3 + (0.5 + 2 / 3) / 6 + (2 / 3 + 0.75) / 6
    assert curve.area() == pytest.approx(area)


def test_equal_scores_are_accepted_together_and_no_loop_is_an_error():
    hits = torch.tensor([True, False, True, False])
    curve = protocol.precision_recall(torch.zeros(4), hits)
    assert curve.precision.tolist() == [0.5] and curve.recall.tolist() == [1]
    assert protocol.precision_recall(torch.arange(4.0), hits, positives=4).recall[-1] == 0.5
    with pytest.raises(ValueError, match="no curve"):
        protocol.precision_recall(torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_a_frame_can_be_right_for_the_wrong_candidate():
    frame = torch.tensor([7, 7, 9, 9, 4])
    score = torch.tensor([0.9, 0.2, 0.5, 0.1, 0.4])
    truth = torch.tensor([0.1, 0.8, 0.6, 0.0, 0.2])
    frames = protocol.best_candidates(frame, score, truth)
    assert torch.allclose(frames.score, torch.tensor([0.4, 0.9, 0.5]))  # frames 4, 7, 9
    assert frames.frame_hit.tolist() == [False, True, True]
    assert frames.candidate_hit.tolist() == [False, False, True]
    by_frame, by_candidate = frames.curves()
    assert by_frame.f1_max() == 1 and by_candidate.f1_max() < 1


# ---- candidates ----------------------------------------------------------------------------------------------------


def test_candidates_equal_a_loop_over_frames():
    positions = torch.stack([torch.arange(60.0).mul(0.2).cos(), torch.arange(60.0).mul(0.2).sin()], 1) * 10
    covariance = torch.diag_embed(torch.rand(60, 2, generator=generator()) * 4 + 0.1)
    pairs = protocol.loop_candidates(positions, covariance, gap=10, distance=15.0)
    along = protocol.travelled(positions)
    expected = []
    for i in range(60):
        for j in range(60):
            apart = (positions[i] - positions[j]).double()
            inside = float(apart @ torch.linalg.inv(covariance[i].double()) @ apart) < 9
            if j <= i - 10 and along[i] - along[j] > 15 and inside:
                expected.append([j, i])
    assert pairs.tolist() == expected and expected
    assert protocol.relocalisation_candidates(50, 20, 10).tolist()[:2] == [[0, 10], [0, 11]]
    assert {int(j) for j in protocol.relocalisation_candidates(50, 20, 10)[:, 0]} == {0, 20}
    some = torch.tensor([[1, 5], [2, 5], [3, 5], [4, 5], [5, 5], [1, 6], [2, 6]])
    assert protocol.every_nth(some, 4).tolist() == [True, False, False, False, True, True, False]


def test_drift_covariance_is_that_of_many_drives():
    places = data.drive_route(((0, 0), (1, 0), (1, 1)), 6.0, 0)
    poses = data.city_drive(places, 0, tilt=0.0).poses
    ends = torch.stack(
        [model.odometry_graph(data.noisy_odometry(poses, 0.02, 0.1, s)).poses[-1, :2, 3] for s in range(300)]
    )
    start = model.inverse(poses[:1]) @ poses
    expected = protocol.drift_covariance(start[:, :2, 3], 0.02, 0.1)[-1]
    measured = torch.cov(ends.T)
    assert torch.allclose(measured, expected, rtol=0.3, atol=0.1 * float(expected.trace()))


# ---- pose graphs ---------------------------------------------------------------------------------------------------


def looped_graph(n: int = 20) -> tuple[model.PoseGraph, Tensor]:
    step = model.se3_exp(torch.tensor([1.0, 0, 0, 0, 0.05, 0.3], dtype=torch.float64))
    truth = [EYE]
    for _ in range(n - 1):
        truth.append(truth[-1] @ step)
    poses = torch.stack(truth)
    noise = model.se3_exp(0.05 * torch.randn(n - 1, 6, generator=generator(), dtype=torch.float64))
    graph = model.odometry_graph(model.inverse(poses[:-1]) @ poses[1:] @ noise)
    pairs = torch.tensor([[0, n - 1], [2, n - 3], [5, 15]])
    motion = model.inverse(poses[pairs[:, 0]]) @ poses[pairs[:, 1]]
    wobble = model.se3_exp(0.02 * torch.randn(3, 6, generator=generator(1), dtype=torch.float64))
    return model.add_loops(graph, pairs, motion @ wobble), poses


def test_loops_bring_a_drive_back():
    graph, truth = looped_graph()
    poses = model.optimise(graph)
    assert torch.equal(poses[0], graph.poses[0])
    before, after = (model.trajectory_error(p[:, :3, 3], truth[:, :3, 3]) for p in (graph.poses, poses))
    assert after < 0.5 * before
    assert model.graph_error(graph, poses) < 0.1 * model.graph_error(graph, graph.poses)
    wrong = model.add_loops(graph, torch.tensor([[1, 11]]), EYE.unsqueeze(0))
    assert model.trajectory_error(model.optimise(wrong)[:, :3, 3], truth[:, :3, 3]) > 1.2 * after
    chain = graph._replace(**{name: getattr(graph, name)[1:19] for name in graph._fields[1:]})
    with pytest.raises(ValueError, match="2 parts"):
        model.optimise(chain)  # nothing leads to the first pose


def test_jacobian_of_the_logarithm():
    twist = 0.3 * torch.randn(6, generator=generator(), dtype=torch.float64)
    pose = model.se3_exp(twist)

    def moved(step: Tensor) -> Tensor:
        return model.se3_log(pose @ model.se3_exp(step))

    columns = [(moved(e) - moved(-e)) / 2e-6 for e in 1e-6 * torch.eye(6, dtype=torch.float64)]
    assert torch.allclose(torch.stack(columns, 1), model._inverse_right_jacobian(twist), atol=1e-5)


def test_pose_graph_equals_gtsam():
    gtsam = pytest.importorskip("gtsam")
    graph, _ = looped_graph()
    poses = model.optimise(graph, 50)
    factors, values = gtsam.NonlinearFactorGraph(), gtsam.Values()
    square = gtsam.noiseModel.Isotropic.Precision(6, 100.0)
    robust = gtsam.noiseModel.Robust.Create(gtsam.noiseModel.mEstimator.Huber.Create(1.0), square)
    factors.add(gtsam.PriorFactorPose3(0, gtsam.Pose3(), gtsam.noiseModel.Isotropic.Precision(6, 1e10)))
    for i, pose in enumerate(graph.poses):
        values.insert(i, gtsam.Pose3(pose.numpy()))
    for i, j, motion, loose in zip(graph.start, graph.end, graph.relative, graph.robust, strict=True):
        noise = robust if loose else square
        factors.add(gtsam.BetweenFactorPose3(int(i), int(j), gtsam.Pose3(motion.numpy()), noise))
    found = gtsam.LevenbergMarquardtOptimizer(factors, values).optimize()
    expected = np.stack([found.atPose3(i).matrix() for i in range(len(poses))])
    assert np.allclose(poses, expected, atol=1e-3)


def test_trajectory_error_ignores_where_the_world_begins():
    truth = blob(30)
    assert model.trajectory_error(model.apply(random_pose(6), truth), truth) < 1e-9
    noisy = truth + 0.1 * blob(30, 1)
    assert model.trajectory_error(model.apply(random_pose(6), noisy), truth) == pytest.approx(
        model.trajectory_error(noisy, truth)
    )
    assert model.trajectory_error(2 * truth, truth) > 0.5  # no scale


def test_trajectory_error_equals_evo():
    metrics = pytest.importorskip("evo.core.metrics")
    from evo.core.trajectory import PosePath3D

    truth, noisy = blob(30), model.apply(random_pose(6), blob(30) + 0.1 * blob(30, 1))
    quaternions = np.tile([1.0, 0, 0, 0], (30, 1))
    reference, estimate = (PosePath3D(x.numpy(), quaternions) for x in (truth, noisy))
    estimate.align(reference, correct_scale=False)
    ape = metrics.APE(metrics.PoseRelation.translation_part)
    ape.process_data((reference, estimate))
    assert model.trajectory_error(noisy, truth) == pytest.approx(ape.get_statistic(metrics.StatisticsType.rmse))


# ---- generated city ------------------------------------------------------------------------------------------------


def test_rays_meet_what_stands_there():
    city = data.City(
        torch.tensor([[10.0, 0, 2, 1, 2, 2, 0.0]]),
        torch.tensor([[0.0, 8.0, 0.5, 3.0]]),
        torch.tensor([[-9.0, 0.0, 1.0, 2.0]]),
    )
    points = data.cast_rays(city, 0.0, 0.0, 0.0, 0.0, generator(), cars=0) + torch.tensor([0, 0, data.SENSOR_HEIGHT])
    ground = points[:, 2].abs() < 1e-4
    assert ground.any() and (points[:, 2] > -1e-4).all()

    def inside(x: float, y: float, radius: float) -> Tensor:
        return points[~ground & ((points[:, :2] - torch.tensor([x, y])).norm(dim=1) < radius)]

    box, pole, ball = inside(10, 0, 2.4), inside(0, 8, 0.7), inside(-9, 0, 2.2)
    assert len(box) > 10 and torch.allclose(box[:, 0].amin(), torch.tensor(9.0), atol=1e-4)
    assert len(pole) and torch.allclose(
        (pole[:, :2] - torch.tensor([0, 8.0])).norm(dim=1), torch.tensor(0.5), atol=1e-4
    )
    assert len(ball) and torch.allclose((ball - torch.tensor([-9.0, 0, 1])).norm(dim=1), torch.tensor(2.0), atol=1e-3)


def test_a_drive_repeats_and_scans_fit_their_poses():
    places = data.drive_route(data.ROUTE, 6.0, 0)
    one, two = data.city_drive(places, 0), data.city_drive(places, 0)
    assert torch.equal(one.scan(3), two.scan(3)) and not torch.equal(one.scan(3)[:50], one.scan(4)[:50])
    model.check_rigid(one.poses)
    world = [model.apply(one.poses[i], one.scan(i).double()) for i in (3, 4)]
    gap = torch.cdist(world[0][::20].float(), world[1].float()).amin(1)
    assert gap.median() < 0.5
    assert (world[0][:, 2] > -0.3).all()
    assert not torch.equal(data.generate_city(0).boxes, data.generate_city(1).boxes)


# ---- files ---------------------------------------------------------------------------------------------------------


def write_bin(path: Path, points: Tensor, columns: int = 4) -> None:
    rows = torch.zeros(len(points), columns)
    rows[:, :3] = points
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows.numpy().tobytes())


def write_kitti(folder: Path, frames: int = 3, poses: int = 3) -> None:
    for frame in range(frames):
        write_bin(folder / f"sequences/00/velodyne/{frame:06d}.bin", blob(50, frame).float())
    row = "1 0 0 0 0 1 0 0 0 0 1 "
    (folder / "poses").mkdir()
    (folder / "poses/00.txt").write_text("".join(f"{row}{i}\n" for i in range(poses)))
    (folder / "sequences/00/calib.txt").write_text("P0: 1 0\nTr: 0 -1 0 0 0 0 -1 0 1 0 0 0.5\n")


def test_kitti_layout(tmp_path):
    write_kitti(tmp_path)
    drive = data.kitti_drive(tmp_path)
    assert drive.poses.shape == (3, 4, 4) and torch.equal(drive.scan(1), blob(50, 1).float())
    assert drive.poses[2, :3, 3].tolist() == [0, 0, 2.5]  # camera pose times Tr
    (tmp_path / "covariance.txt").write_text(" ".join(map(str, range(36))) + "\n")
    assert data.read_covariance(tmp_path / "covariance.txt").tolist() == [[[0, 1], [6, 7]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "sequences/00/velodyne/000001.bin").write_bytes(b"12345"), "5 bytes"),
        (lambda f: (f / "sequences/00/velodyne/000001.bin").write_bytes(b""), "0 bytes"),
        (lambda f: write_bin(f / "sequences/00/velodyne/000001.bin", torch.tensor([[0.0, math.nan, 0]])), "NaN"),
        (lambda f: (f / "poses/00.txt").write_text("1 2 3\n"), "3 numbers, expected 12"),
        (lambda f: (f / "poses/00.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 x\n"), "line 1"),
        (lambda f: (f / "poses/00.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n"), "1 poses"),
        (lambda f: (f / "poses/00.txt").unlink(), "no file"),
        (lambda f: (f / "sequences/00/calib.txt").write_text("P0: 1\n"), "Tr:"),
    ],
)
def test_malformed_kitti_is_named(tmp_path, change, message):
    write_kitti(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        data.kitti_drive(tmp_path).scan(1)


def test_ply_in_both_forms(tmp_path):
    properties = "property float x\nproperty float y\nproperty uchar r\nproperty float z\n"
    header = "ply\nformat {}\nelement vertex 2\n" + properties + "end_header\n"
    rows = np.array([(1, 2, 9, 3), (4, 5, 9, 6)], dtype=[("x", "<f4"), ("y", "<f4"), ("r", "u1"), ("z", "<f4")])
    binary, text = tmp_path / "b.ply", tmp_path / "a.ply"
    binary.write_bytes(header.format("binary_little_endian 1.0").encode() + rows.tobytes())
    text.write_text(header.format("ascii 1.0") + "1 2 9 3\n4 5 9 6\n")
    assert data.read_ply(binary).tolist() == data.read_ply(text).tolist() == [[1, 2, 3], [4, 5, 6]]
    binary.write_bytes(binary.read_bytes()[:-3])
    with pytest.raises(UserError, match="2 vertices announced"):
        data.read_ply(binary)
    text.write_text("solid")
    with pytest.raises(UserError, match="no PLY"):
        data.read_ply(text)


def write_results(folder: Path, name: str, **values: list[float]) -> None:
    content = {
        "150": {"indices_pairs": [[3, 150], [7, 150]], **{k: v[:2] for k, v in values.items()}},
        "151": {"indices_pairs": [], **{k: [] for k in values}},
        "152": {"indices_pairs": [[9, 152]], **{k: v[2:] for k, v in values.items()}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def test_results_of_the_authors(tmp_path):
    write_results(tmp_path, "r.json", gt=[0.1, 0.5, 0.2], dip_ron=[0.3, 0.2, 0.1])
    pairs, values = data.read_results(tmp_path / "r.json", ("gt", "dip_ron"))
    assert pairs.tolist() == [[3, 150], [7, 150], [9, 152]] and values["dip_ron"].tolist() == [0.3, 0.2, 0.1]
    with pytest.raises(UserError, match="no 'fitness', there are dip_ron, gt, indices_pairs"):
        data.read_results(tmp_path / "r.json", ("fitness",))
    np.savez(tmp_path / "000001.npz", inds=np.arange(3), pcd1_desc=np.ones((3, 32)))
    assert data.read_descriptors(tmp_path / "000001.npz")[1].shape == (3, 32)
    np.savez(tmp_path / "000002.npz", inds=np.arange(2), pcd1_desc=np.ones((3, 32)))
    with pytest.raises(UserError, match="as many as inds"):
        data.read_descriptors(tmp_path / "000002.npz")


def test_3dmatch_layout(tmp_path, train):
    import h5py

    properties = "property float x\nproperty float y\nproperty float z\n"
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 300\n" + properties + "end_header\n"
    scene = tmp_path / "3DMatch_train/kitchen/01_Data"
    scene.mkdir(parents=True)
    for i in (0, 1):
        (scene / f"cloud_bin_{i}.ply").write_bytes(header.encode() + blob(300).float().numpy().tobytes())
    for i in (0, 1):
        pose = f"kitchen {i}\n1 0 0 0\n0 1 0 0\n0 0 1 {2 + i}\n0 0 0 1\n"
        (scene.parent / f"cloud_bin_{i}.info.txt").write_text(pose)
    store = tmp_path / "3DMatch_train_pre/correspondences"
    store.mkdir(parents=True)
    with h5py.File(store / "kitchen.hdf5", "w") as file:
        file["0,1"] = np.stack([np.arange(300)] * 2, 1)
    (pair,) = data.find_fragments(tmp_path)
    assert data.read_info(scene.parent / "cloud_bin_0.info.txt")[2, 3] == 2
    config = train.Config(source="3dmatch", radius=2.5, voxel=0.05, batch=20, patch=32)
    a, b = train.training_batch(train.fragment_pair(config, pair), config, generator())
    assert a.shape == b.shape and a.shape[1:] == (32, 3) and len(a) > 10
    (line,) = train.check_data(config, tmp_path)
    assert "300 correspondences" in line and "1.000 m apart" in line
    (scene / "cloud_bin_1.ply").unlink()
    with pytest.raises(UserError, match="not both are there"):
        data.find_fragments(tmp_path)


def test_tum_layout(tmp_path):
    from PIL import Image

    (tmp_path / "depth").mkdir()
    depth = np.full((480, 640), 10000, dtype=np.uint16)  # two metres
    Image.fromarray(depth).save(tmp_path / "depth/1.000000.png")
    Image.fromarray(depth).save(tmp_path / "depth/9.000000.png")
    (tmp_path / "groundtruth.txt").write_text("# t tx ty tz qx qy qz qw\n1.001 1 2 3 0 0 0 1\n")
    drive = data.tum_drive(tmp_path, "fr1", 1)
    assert len(drive.poses) == 1
    points = drive.scan(0)
    assert torch.allclose(points[:, 0], torch.tensor(2.0))  # forward
    world = model.apply(drive.poses[0], points.double())
    assert torch.allclose(world[:, 2], torch.tensor(5.0, dtype=torch.float64))  # the camera looks along z
    (tmp_path / "groundtruth.txt").write_text("5 1 2 3 0 0 0 1\n")
    with pytest.raises(UserError, match="20 ms"):
        data.tum_drive(tmp_path, "fr1", 1)


def test_g2o_round_trip_and_errors(tmp_path, train):
    graph, _ = looped_graph()
    path = tmp_path / "a.g2o"
    data.write_g2o(path, train.as_g2o(graph, graph.poses))
    again = train.from_g2o(data.read_g2o(path))
    for one, two in zip(graph, again, strict=True):
        assert torch.allclose(one.double(), two.double(), atol=1e-12)
    text = path.read_text()
    for changed, message in (
        (text + "EDGE_SE2 1 2\n", "EDGE_SE2"),
        (text + "VERTEX_SE3:QUAT 50 1 2\n", "8 finite numbers"),
        (text.replace("VERTEX_SE3:QUAT 3 ", "VERTEX_SE3:QUAT 99 "), "vertex 3"),
        ("", "0 vertices"),
    ):
        path.write_text(changed)
        with pytest.raises(UserError, match=message):
            data.read_g2o(path)


def test_lidar_iris_layout(tmp_path):
    (tmp_path / "gt00.txt").write_text("400 50\n401 399\n402 60 61\n")
    (tmp_path / "test_res00.txt").write_text("400 50 0.2 1\n401 3 0.4 0\n402 9 0.3 0\n")
    iris = data.read_lidar_iris(tmp_path, "00")
    assert iris.loops == 2 and iris.hit.tolist() == [True, False, False]
    (tmp_path / "test_res00.txt").write_text("400 51 0.2 1\n")
    with pytest.raises(UserError, match="contradict"):
        data.read_lidar_iris(tmp_path, "00")


# ---- real files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(data_root) -> Path:
    path = data_root / "kitti-loop-closure-sample"
    if not path.is_dir():
        pytest.skip(f"no {path.name} among the small real data")
    return path


def test_range_image_and_overlap_of_real_scans(sample):
    scan = data.read_bin(sample / "overlapnet_demo/000000.bin")
    image = model.range_image(scan)
    official = np.load(sample / "overlapnet_demo/depth_000000.npy")
    assert np.abs(image.numpy() - official).max() < 1e-5 and int((image > 0).sum()) == 44950
    drive = data.kitti_drive(sample)
    assert len(drive.poses) == 4541

    def overlap(a: int, b: int, pose: Tensor | None = None) -> float:
        true = model.inverse(drive.poses[b]) @ drive.poses[a]
        return model.overlap(drive.scan(a), drive.scan(b), true if pose is None else pose)

    assert overlap(94, 95) == pytest.approx(0.856, abs=5e-4)
    assert overlap(198, 199) == pytest.approx(0.829, abs=5e-4)
    assert overlap(199, 198) == pytest.approx(0.836, abs=5e-4)
    assert overlap(94, 198) == pytest.approx(0.004, abs=5e-4)
    assert overlap(94, 198, EYE) == pytest.approx(0.438, abs=5e-4)  # the ground alone
    assert overlap(94, 94, EYE) == 1


@pytest.mark.parametrize(
    ("sequence", "loops", "f1", "full", "area"),
    [("00", 791, 0.9649, 0.9279, 0.9602), ("05", 437, 0.9570, 0.9176, 0.9489), ("08", 332, 0.6678, 0.4548, 0.6862)],
)
def test_curves_of_lidar_iris(sample, sequence, loops, f1, full, area):
    iris = data.read_lidar_iris(sample / "lidar_iris_results", sequence)
    curve = protocol.precision_recall(iris.score, iris.hit, iris.loops)
    assert iris.loops == loops
    assert curve.f1_max() == pytest.approx(f1, abs=5e-5)
    assert curve.recall_at_full_precision() == pytest.approx(full, abs=5e-5)
    assert curve.area() == pytest.approx(area, abs=5e-5)


def test_argoverse_nuscenes_and_eth_files(data_root, sample, train):
    kitti, argoverse, nuscenes = train.samples(data_root)
    assert len(kitti.scan(94)) == 121618 and len(nuscenes.scan(0)) == 34688
    assert len(argoverse[0].poses) == 2 and len(argoverse[0].scan(0)) > 90000
    motion = model.inverse(argoverse[0].poses[1]) @ argoverse[0].poses[0]
    assert 0.01 < float(motion[:3, 3].norm()) < 3
    assert len(data.read_ply(train.eth_pair(data_root)[0])) == 109672


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--radius", "-1"], "--radius is -1.0"),
        (["--arms", "sift"], "sift"),
        (["--arms", "stored"], "--source kitti"),
        (["--source", "kitti"], "--weights"),
        (["--share", "0"], "--share"),
        (["--preset", "samples"], "needs --data"),
        (["--preset", "samples", "--data", "EMPTY", "--check-data"], "no scans"),
        (["--preset", "kitti00-curves", "--data", "EMPTY", "--check-data"], "no file"),
        (["--preset", "dip-3dmatch", "--data", "EMPTY", "--check-data"], "no correspondences"),
        (["--preset", "eth", "--data", "EMPTY", "--check-data"], "0 *.ply"),
        (["--preset", "g2o", "--data", "EMPTY", "--check-data"], "no *.g2o"),
        (["--preset", "tum", "--data", "EMPTY", "--check-data"], "groundtruth.txt"),
        (["--preset", "smoke", "--radius", "0.2"], "points within --radius"),
    ],
)
def test_mistakes_are_one_line(refuses, tmp_path, argv, message):
    refuses([str(tmp_path) if word == "EMPTY" else word for word in argv], message)


def test_authors_results_and_pose_graphs_as_runs(run_paper, tmp_path, train):
    folder = tmp_path / "kitti00/results"
    for end in ("", "_20"):
        setup = "_reloc" if end else ""
        write_results(
            folder, f"overlapnet_gt_est{setup}_result{end}.json", gt=[0.1, 0.5, 0.2], overlapnet=[0.2, 0.9, 0.1]
        )
        write_results(folder, f"iris{setup}_result{end}.json", iris_score=[0.1, 0.1, 0.9])
        scores = {key: [0.1, 0.8, 0.1] for key in ("fitness", "dip_overlap", "dip_mnn", "dip_ron")}
        write_results(folder, f"dip_overlap{setup}_result{end}.json", **scores)
    result = run_paper(SLUG, ["--preset", "kitti00-curves", "--data", str(tmp_path), "--out", str(tmp_path / "curves")])
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "curves/result.json").read_text())["metrics"]
    assert metrics["kitti00/loop/dip_ron/f1_max"]["mean"] == 1
    assert metrics["kitti00/reloc/lidar_iris/f1_max"]["mean"] == pytest.approx(2 / 3)

    graph, _ = looped_graph()
    (tmp_path / "graphs").mkdir()
    data.write_g2o(tmp_path / "graphs/ring.g2o", train.as_g2o(graph, graph.poses))
    result = run_paper(SLUG, ["--preset", "g2o", "--data", str(tmp_path / "graphs"), "--out", str(tmp_path / "g2o")])
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "g2o/result.json").read_text())["metrics"]
    assert metrics["ring/error_after"]["mean"] < 0.1 * metrics["ring/error_before"]["mean"]
    assert len(data.read_g2o(tmp_path / "g2o/ring-optimised.g2o").vertices) == 20


def test_two_clouds_as_a_run(run_paper, tmp_path):
    drive = data.city_drive(data.drive_route(((0, 0), (1, 0)), 4.0, 0), 0)
    header = "ply\nformat binary_little_endian 1.0\nelement vertex {}\n"
    header += "property float x\nproperty float y\nproperty float z\nend_header\n"
    (tmp_path / "eth_pair").mkdir()
    for frame in (0, 1):
        points = drive.scan(frame)
        content = header.format(len(points)).encode() + points.numpy().tobytes()
        (tmp_path / f"eth_pair/{frame}.ply").write_bytes(content)
    argv = ["--preset", "eth", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--voxel", "0.5"]
    argv += ["--radius", "2.5", "--keypoints", "1500", "--ransac-distance", "0.5", "--hypotheses", "20000"]
    result = run_paper(SLUG, argv)
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert metrics["eth/fpfh/icp_moves_metres"]["mean"] < 1 and metrics["eth/fpfh/ron"]["mean"] > 0.05


def test_stopped_in_the_middle_of_scoring_and_resumed(run_paper, tmp_path):
    tiny = ["--preset", "smoke", "--epochs", "1", "--train-pairs", "2", "--arms", "dip", "--keypoints", "40"]
    tiny += ["--setups", "loop"]
    assert run_paper(SLUG, [*tiny, "--out", str(tmp_path / "whole")]).code == 0
    for stop in ("1", "5"):
        assert run_paper(SLUG, [*tiny, "--stop-after", stop, "--out", str(tmp_path / stop)]).code == 0
        assert run_paper(SLUG, ["--resume", str(tmp_path / stop)]).code == 0
        one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", stop))
        assert one["metrics"] == two["metrics"]


# ---- claims can fail -----------------------------------------------------------------------------------------------


def judged(train) -> dict[str, bool]:
    """Verdicts on the claims for two laps, the second with another heading, and twelve frames elsewhere.

    Scans see landmarks whose descriptors are known but for noise; the overlap of range images says little. Elsewhere
    stands the mirror image: descriptors match there, and no rigid motion brings the landmarks together.
    """
    frames, laps = 60, 48
    world = 60 * torch.rand(1500, 3, generator=generator(), dtype=torch.float64)
    mirror = torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    away = torch.tensor([260.0, 200, 200], dtype=torch.float64)
    world = torch.cat([world, world * mirror + away])
    features = torch.nn.functional.normalize(torch.randn(1500, 16, generator=generator(1))).repeat(2, 1)
    angle = torch.arange(frames, dtype=torch.float64) * (4 * math.pi / laps)
    heading = angle + (torch.arange(frames) >= laps // 2) * (math.pi / 2)
    poses = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    poses[:, 0, 0] = poses[:, 1, 1] = heading.cos()
    poses[:, 1, 0], poses[:, 0, 1] = heading.sin(), -heading.sin()
    poses[:, :3, 3] = torch.stack([30 + 20 * angle.sin(), 30 - 20 * angle.cos(), torch.full_like(angle, 30)], 1)
    poses[laps:, :3, 3] = poses[laps:, :3, 3] * mirror + away
    seen = [((world - pose[:3, 3]).norm(dim=1) < 18).nonzero().squeeze(1) for pose in poses]

    def keys(i: int) -> model.Keys:
        noise = torch.randn(len(seen[i]), 16, generator=generator(100 + i))
        points = train.apply(train.inverse(poses[i]), world[seen[i]])
        return train.Keys(points, features[seen[i]] + 0.05 * noise)

    pairs = train.relocalisation_candidates(frames, 1, 12)
    pairs = pairs[train.every_nth(pairs, 3)]
    table = torch.zeros(len(pairs), 21, dtype=torch.float64)
    for k, (j, i) in enumerate(pairs.tolist()):
        found = train.score_pair(keys(i), keys(j), generator(k), 0.3, 300)
        truth = float(torch.isin(seen[i], seen[j]).double().mean())
        overlap = 0.4 + 0.1 * math.sin(k) + 0.05 * truth
        table[k, :5] = torch.tensor([truth, found.ron, overlap, found.mnn, found.fitness])
        table[k, 5:] = found.pose.flatten()
    drive = train.Drive("city", poses, lambda _: torch.zeros(0, 3))
    scored = torch.ones(len(pairs), dtype=torch.bool)
    metrics: dict[str, float] = {}
    for setup in ("loop", "reloc"):
        metrics |= train.table_metrics(f"city/{setup}/dip", drive, pairs, scored, table, 0.3)
    near = pairs[:, 1] < laps
    run = SimpleNamespace(config=train.Config(drift_degrees=0.3, gap=12), is_main=False)
    metrics |= train.close_loops(run, train.Drive("city", poses[:laps], drive.scan), pairs[near], table[near], 0)[0]
    paper, verdicts = read_paper(FOLDER), {}
    run.metrics = {name: SimpleNamespace(mean=value) for name, value in metrics.items()}
    run.threshold = lambda name, key="margin": paper.claim(name).thresholds[key]
    run.claim = lambda name, holds, **_: verdicts.__setitem__(name, bool(holds))
    train.claims(run)
    assert set(verdicts) == {claim.name for claim in paper.claims}
    return verdicts


def test_a_broken_method_fails_its_claims(train, monkeypatch):
    healthy = judged(train)
    assert [name for name, holds in healthy.items() if not holds] in ([], ["ron_beats_fitness"])  # both are perfect
    inside = train.score_pair.__globals__
    right, found = inside["ron"], inside["ransac"]
    with monkeypatch.context() as patch:  # the pose applied the wrong way round
        patch.setitem(inside, "ron", lambda a, b, pairs, pose, t: right(a, b, pairs, train.inverse(pose), t))
        assert not judged(train)["ron_finds_loops"]
    with monkeypatch.context() as patch:  # no pair is ever found close
        patch.setitem(inside, "ron", lambda *_: 0.0)
        assert not judged(train)["ron_beats_overlap"]
    with monkeypatch.context() as patch:  # distances are not looked at: all mutual pairs count
        patch.setitem(inside, "ron", lambda a, b, pairs, *_: len(pairs) / min(len(a), len(b)))
        assert not judged(train)["ron_beats_mnn"]
    with monkeypatch.context() as patch:  # a pose graph that is left as it is
        patch.setattr(train, "optimise", lambda graph, *_: graph.poses)
        broken = judged(train)
        assert not broken["loops_lower_trajectory_error"] and not broken["one_false_loop_hurts"]
    with monkeypatch.context() as patch:  # correspondences turned round: no registration
        patch.setitem(inside, "ransac", lambda a, b, *rest: found(a, b.flip(0), *rest))
        broken = judged(train)
        for name in ("poses_are_right", "small_overlaps_register", "loops_lower_trajectory_error"):
            assert not broken[name], name
