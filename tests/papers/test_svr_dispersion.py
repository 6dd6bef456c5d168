"""Tests of papers/svr_dispersion. References are written from the definitions, in numpy or layer by layer."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from papers.svr_dispersion import data, model
from shared.errors import UserError
from shared.paper import read_paper

FOLDER = Path(data.__file__).parent


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(count: int, points: int, seed: int = 0) -> Tensor:
    return torch.randn(count, points, 3, generator=gen(seed)) * 0.5


def distances(count: int, dim: int = 3, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(count, dim))
    return np.square(points[:, None] - points).sum(-1)


# ---- references


def np_chamfer(x: Tensor, y: Tensor) -> float:
    squared = torch.cdist(x.double(), y.double()).square()
    return float(squared.amin(1).mean() + squared.amin(0).mean())


def slow_k_medoids(distance: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, float]:
    """Start and alternating updates one cluster at a time."""
    random = np.random.RandomState(seed)
    trials = 2 + int(np.log(k))
    medoids = [random.randint(len(distance))]
    nearest = distance[medoids[0]] ** 2
    for _ in range(k - 1):
        draws = np.searchsorted(np.cumsum(nearest), random.random_sample(trials) * nearest.sum())
        options = [np.minimum(nearest, distance[min(d, len(distance) - 1)] ** 2) for d in draws]
        best = int(np.argmin([option.sum() for option in options]))
        medoids.append(int(draws[best]))
        nearest = options[best]
    for _ in range(300):
        before = list(medoids)
        labels = distance[medoids].argmin(0)
        for cluster in range(k):
            members = np.flatnonzero(labels == cluster)
            if not len(members):
                continue
            costs = distance[np.ix_(members, members)].sum(1)
            own = costs[np.argmax(members == medoids[cluster])]
            if costs.min() < own:
                medoids[cluster] = int(members[costs.argmin()])
        if medoids == before:
            break
    return np.array(medoids), float(distance[medoids].min(0).sum())


class PlainMapping(nn.Module):
    """One primitive of AtlasNet, layer by layer: the code is added to the first layer's output."""

    def __init__(self, dim: int, code: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, code, 1), nn.Conv1d(code, hidden, 1)
        self.conv_list = nn.ModuleList([nn.Conv1d(hidden, hidden, 1) for _ in range(2)])
        self.last_conv = nn.Conv1d(hidden, 3, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(code), nn.BatchNorm1d(hidden)
        self.bn_list = nn.ModuleList([nn.BatchNorm1d(hidden) for _ in range(2)])

    def forward(self, points: Tensor, code: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(points.unsqueeze(0)) + code.unsqueeze(2)))
        x = F.relu(self.bn2(self.conv2(x)))
        for conv, norm in zip(self.conv_list, self.bn_list, strict=True):
            x = F.relu(norm(conv(x)))
        return self.last_conv(x).transpose(1, 2)


class PlainAtlasNet(nn.Module):
    """The authors' arrangement: a list of primitives."""

    def __init__(self, dim: int, code: int, hidden: int, primitives: int) -> None:
        super().__init__()
        self.decoder = nn.ModuleList([PlainMapping(dim, code, hidden) for _ in range(primitives)])

    def forward(self, code: Tensor, template: Tensor) -> Tensor:
        return torch.cat([net(points, code) for net, points in zip(self.decoder, template, strict=True)], 1)


def plain_fold(fold: model.Fold, points: Tensor, code: Tensor) -> Tensor:
    """A fold that copies the code to every point and concatenates, code first."""
    x = torch.cat([code.unsqueeze(2).expand(-1, -1, points.shape[2]), points.expand(len(code), -1, -1)], 1)
    x = F.relu(nn.BatchNorm1d.forward(fold[1], fold[0](x)))
    return fold[6](F.relu(fold[4](fold[3](x))))


# ---- sizes


def test_parameters_of_the_paper() -> None:
    counts = {"atlasnet-sphere": 1_060_867, "foldnet": 1_584_646, "psgn": 4_900_684, "atlasnet-squares": 26_496_075}
    points = {"atlasnet-sphere": 2562, "foldnet": 2500, "psgn": 2500, "atlasnet-squares": 2500}
    with torch.device("meta"):
        from torchvision.models import resnet18

        assert model.parameters(resnet18(num_classes=1024)) == 11_701_824
        for name, count in counts.items():
            net = model.build(name).eval()
            assert model.parameters(net.encoder) == 11_701_824
            assert model.parameters(net.decoder) == count
            assert net(torch.zeros(2, 3, 224, 224)).shape == (2, points[name], 3)
        sphere = model.build("atlasnet-sphere")
        assert model.parameters(sphere) == 12_762_691
        assert sphere(torch.zeros(2, 3, 224, 224)).shape == (2, 2500, 3)
        assert model.build("occnet")(torch.zeros(2, 3, 224, 224), torch.zeros(2, 7, 3)).shape == (2, 7)
        classifier = model.build_classifier(500)
        assert model.parameters(classifier) == 25_557_032 - 2_049_000 + 2048 * 1024 + 1024 + 1024 * 500 + 500


def test_every_preset_builds(train) -> None:
    assert train.NETWORKS == model.NETWORKS
    assert train.CLASSES["modelnet10"] == data.MODELNET_CLASSES
    assert train.CLASSES["shapenet"] == tuple(data.SHAPENET_CLASSES)
    names = {}
    for name, preset in train.PRESETS.items():
        config = preset.config
        names[name] = [arm.name for arm in train.arms(config)]
        with torch.device("meta"):
            for arm in train.arms(config):
                if arm.model in model.NETWORKS:
                    net = train.make(config, arm.model)
                    train.make_optimizer(net, config)
    assert len(names["synthetic"]) == 16 and names["metric-demo"] == []
    assert names["more-imgs"] == [f"yaw-{yaw:03d}" for yaw in range(0, 91, 15)]
    assert len(names["more-shapes"]) == 8 and names["more-shapes"][4] == "vc-atlasnet-sphere"
    assert names["nviews"][-1] == "views-18" and "vc-oracle" in names["baselines"]
    assert len(names["default"]) == 7


@pytest.mark.parametrize("name", ["atlasnet-sphere", "atlasnet-squares", "foldnet", "psgn", "occnet"])
def test_one_training_step_at_full_width(name) -> None:
    net = model.build(name, points=100)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    images = torch.rand(2, 3, 224, 224, generator=gen())
    if name == "occnet":
        loss = F.binary_cross_entropy_with_logits(net(images, clouds(2, 20)), torch.ones(2, 20))
    else:
        loss = model.chamfer(clouds(2, 60), net(images)).mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_initialisation_of_the_encoder() -> None:
    torch.manual_seed(0)
    encoder = model.ResNetEncoder(8)
    for conv in (encoder.conv1, encoder.layer4[1].conv2):
        wanted = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert float(conv.weight.std()) == pytest.approx(wanted, rel=0.02)
    assert bool((encoder.layer2[0].bn1.weight == 1).all()) and not bool(encoder.layer2[0].bn1.bias.any())


# ---- networks


def test_normalising_a_sum_without_the_sum() -> None:
    ours, plain = model.SumBatchNorm(6), nn.BatchNorm1d(6)
    with torch.no_grad():
        for norm in (ours, plain):
            norm.weight.copy_(torch.linspace(-1, 2, 6))
            norm.bias.copy_(torch.linspace(1, -1, 6))
    shared, own = torch.randn(1, 6, 9, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(4, 6, 9)
    for _ in range(2):
        a, b = ours(shared, own), F.relu(plain(shared + own.unsqueeze(2)))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        inputs = (shared, own)
        gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (a, b)]
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    for x, y in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(ours.eval()(shared, own), F.relu(plain.eval()(shared + own.unsqueeze(2))))
    with pytest.raises(ValueError, match="more than one value"):
        ours.train()(shared[..., :1], own[:1])


@pytest.mark.parametrize(("template", "dim", "primitives"), [("sphere", 3, 1), ("square", 2, 3)])
def test_atlasnet_equals_the_plain_form_from_official_weights(template, dim, primitives) -> None:
    torch.manual_seed(1)
    plain = PlainAtlasNet(dim, 7, 5, primitives)
    ours = model.SingleView(nn.Identity(), model.AtlasNet(7, 5, template, primitives, 30, 1))
    official = {f"module.decoder.{name}": value for name, value in plain.state_dict().items()}
    ours.load_state_dict(model.from_official(official))
    code = torch.randn(4, 7)
    for _ in range(2):
        points = ours.decoder.sample()
        assert points.shape == (primitives, dim, 30 // primitives)
        torch.testing.assert_close(ours(code, points), plain(code, points), atol=1e-5, rtol=1e-5)
    ours.eval(), plain.eval()
    points = ours.decoder.sample()
    torch.testing.assert_close(ours(code), plain(code, points), atol=1e-5, rtol=1e-5)
    assert points.shape[2] == (42 if template == "sphere" else 9)


def test_adding_the_code_equals_concatenating_it() -> None:
    decoder = model.AtlasNet(6, 5, "sphere", 1, 11).eval()
    code, template = torch.randn(2, 6), torch.randn(1, 3, 11)
    wide = torch.cat([decoder.conv1.weight[:, :, 0], torch.eye(6)], 1)
    both = torch.cat([template.expand(2, -1, -1), code.unsqueeze(2).expand(-1, -1, 11)], 1)
    x = F.relu(F.batch_norm(wide @ both + decoder.conv1.bias.view(-1, 1), torch.zeros(6), torch.ones(6)))
    torch.testing.assert_close(decoder.bn1(decoder.conv1(template), code), x)


def test_foldnet_equals_the_plain_form() -> None:
    net = model.FoldNet(7, 5, 17)
    assert net.grid.shape == (1, 2, 16)
    assert net.grid[0, :, 1].tolist() == pytest.approx([0, 1 / 3])  # second coordinate fastest
    code = torch.randn(4, 7)
    for mode in (True, False):
        net.train(mode)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        ours = net(code)
        net.load_state_dict(state)
        plain = plain_fold(net.folding2, plain_fold(net.folding1, net.grid, code), code).transpose(1, 2)
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_psgn_lays_coordinates_out_as_the_authors_do() -> None:
    net = model.PointSetDecoder(4, 6, 5).eval()
    code = torch.randn(3, 4)
    x = code
    for fc, norm in ((net.fc1, net.bn1), (net.fc2, net.bn2), (net.fc3, net.bn3)):
        x = F.relu(norm(fc(x)))
    torch.testing.assert_close(net(code), net.fc4(x).view(3, 3, 5).transpose(1, 2))


def test_occupancy_decoder_layer_by_layer() -> None:
    net = model.OccupancyDecoder(4, 6)
    code, points = torch.randn(3, 4), torch.randn(3, 10, 3)
    assert model.parameters(net) == 4 * 6 + 11 * 2 * (4 * 6 + 6) + 10 * (6 * 6 + 6) + 7
    plain = net.fc_out(F.relu(net.bn.bn(net.fc_p(points.transpose(1, 2))))).squeeze(1)
    torch.testing.assert_close(net(code, points), plain)  # blocks are identities at the start
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    net.eval()
    x = net.fc_p(points.transpose(1, 2))

    def conditional(norm: model.ConditionalBatchNorm, value: Tensor) -> Tensor:
        gamma = code @ norm.conv_gamma.weight[..., 0].T + norm.conv_gamma.bias
        beta = code @ norm.conv_beta.weight[..., 0].T + norm.conv_beta.bias
        return gamma.unsqueeze(2) * value / math.sqrt(1 + 1e-5) + beta.unsqueeze(2)

    for block in net.blocks:
        inner = block.fc_0(F.relu(conditional(block.bn_0, x)))
        x = x + block.fc_1(F.relu(conditional(block.bn_1, inner)))
    plain = net.fc_out(F.relu(conditional(net.bn, x))).squeeze(1)
    torch.testing.assert_close(net(code, points), plain, atol=1e-4, rtol=1e-4)


def test_networks_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"images are \(3, 128, 128\), ResNet.* expects \(3, 224, 224\)"):
        model.ResNetEncoder(4)(torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match="unknown network 'pix2mesh'"):
        model.build("pix2mesh", "small")
    with pytest.raises(ValueError, match="unknown encoder"):
        model.build("psgn", "resnet34")
    with pytest.raises(ValueError, match="expected at least one each"):
        model.build("atlasnet-squares", "small", points=10)
    with pytest.raises(ValueError, match="expected sphere or square"):
        model.AtlasNet(template="cube")
    with pytest.raises(ValueError, match="unknown encoder"):
        model.build_classifier(3, "resnet18")


def test_icosphere_is_that_of_trimesh() -> None:
    trimesh = pytest.importorskip("trimesh")
    for level in (0, 3):
        vertices, faces = model.icosphere(level)
        peer = trimesh.creation.icosphere(subdivisions=level)
        assert vertices.shape == peer.vertices.shape and faces.shape == peer.faces.shape
        ordered = [a[np.lexsort(a.round(6).T)] for a in (vertices, np.asarray(peer.vertices))]
        np.testing.assert_allclose(ordered[0], ordered[1], atol=1e-6)
        corners = vertices[faces]
        outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert ((outward * corners.mean(1)).sum(1) > 0).all()
    assert len(model.icosphere(4)[0]) == 2562


# ---- distances


def test_chamfer_hand_cases() -> None:
    zero, one = torch.zeros(1, 1, 3), torch.tensor([[[1.0, 0, 0]]])
    assert float(model.chamfer(zero, one)) == 2
    x, y = clouds(3, 50), clouds(3, 37, 1)
    assert not model.chamfer(x, x).any()
    torch.testing.assert_close(model.chamfer(x, y), model.chamfer(y, x))
    wanted = torch.tensor([np_chamfer(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(model.chamfer(x, y), wanted, rtol=1e-5, atol=1e-7)


def test_chamfer_agrees_with_a_tree_and_its_gradient_with_the_full_matrix() -> None:
    from scipy.spatial import cKDTree

    x, y = clouds(2, 90).requires_grad_(), clouds(2, 77, 1).requires_grad_()
    from_x, _ = model.squared_distances(x, y)
    for i in range(2):
        found, _ = cKDTree(y[i].detach().numpy()).query(x[i].detach().numpy())
        np.testing.assert_allclose(from_x[i].detach().numpy(), found**2, rtol=1e-4, atol=1e-7)
    squared = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    full = squared.amin(2).mean(1) + squared.amin(1).mean(1)
    gradients = [torch.autograd.grad(loss.sum(), (x, y), retain_graph=True) for loss in (model.chamfer(x, y), full)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("tile", "rows"), [(20, 64), (60, 4), (400, 5), (1 << 18, 64)])
def test_distance_matrix_equals_pairs_wherever_it_is_cut(tile, rows, monkeypatch) -> None:
    monkeypatch.setattr(model, "TILE", tile)
    monkeypatch.setattr(model, "ROWS", rows)
    x, y = clouds(7, 23), clouds(5, 31, 1)
    squared = (x[:5].unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    assert torch.equal(model.nearest(x[:5], y), squared.argmin(2))
    assert torch.equal(model.nearest(y, x[:5]), squared.argmin(1))
    wanted = torch.stack([model.chamfer(x, cloud.expand(7, -1, -1)) for cloud in y], 1)
    torch.testing.assert_close(model.chamfer_matrix(x, y), wanted, atol=1e-6, rtol=1e-5)
    own = model.chamfer_matrix(x)
    assert torch.equal(own, own.T) and not own.diagonal().any()
    wanted = torch.stack([model.chamfer(x, cloud.expand(7, -1, -1)) for cloud in x], 1)
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-5)


def test_chamfer_refuses_empty_clouds() -> None:
    for function in (model.chamfer, model.chamfer_matrix):
        with pytest.raises(ValueError, match="without points"):
            function(torch.zeros(2, 3, 3), torch.zeros(2, 0, 3))
    with pytest.raises(ValueError, match=r"expected \(clouds, points, 3\)"):
        model.chamfer_matrix(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected pairs"):
        model.chamfer(torch.zeros(2, 3, 3), torch.zeros(3, 3, 3))


def test_f_score_counts_points_within_the_threshold() -> None:
    near, far = torch.tensor([[0.0, 1e-4, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.0, 0.5]])
    assert float(model.f_score(near, far)) == pytest.approx(2 * 0.5 * 0.75 / 1.25)
    assert float(model.f_score(torch.ones(1, 2), torch.ones(1, 3))) == 0


def test_intersection_over_union() -> None:
    grids = torch.rand(6, 4, 4, 4, generator=gen()) < 0.3
    grids[5] = grids[4] = False
    ours = model.iou_distances(grids, block=4)
    for i in range(6):
        for j in range(6):
            union = float((grids[i] | grids[j]).sum())
            wanted = 1 - float((grids[i] & grids[j]).sum()) / union if union else 0.0
            assert float(ours[i, j]) == pytest.approx(wanted, abs=1e-6)


def test_image_distances() -> None:
    features = torch.rand(7, 30, generator=gen()) + 100
    wanted = (features.unsqueeze(1) - features).double().square().mean(-1)
    torch.testing.assert_close(model.feature_distances(features, block=3).double(), wanted, atol=1e-7, rtol=1e-4)
    patches = model.pooled_features(torch.rand(2, 3, 32, 32))
    assert patches.shape == (2, 3 * 16 * 16)


def test_vgg_features_are_torchvisions_with_imagenet_statistics() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    whole = make_layers(cfgs["D"])
    ours = model.PerceptualFeatures()
    ours.load_vgg({f"features.{name}": value for name, value in whole.state_dict().items()})
    images = torch.rand(1, 3, 224, 224)
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        for layer in whole[:16]:
            x = layer(x)
    features = ours(images)
    assert features.shape == (1, 3136)
    torch.testing.assert_close(features, x.amax(1).flatten(1))
    with pytest.raises(ValueError, match=r"features\.0\.weight is missing"):
        ours.load_vgg({})


# ---- the score


def test_score_hand_case() -> None:
    line = np.array([0.0, 1, 10, 11])
    distance = np.square(line[:, None] - line)
    assert model.k_medoids(distance, 2, 0).inertia == 2
    assert model.dispersion_score(distance, 2) == 0.5
    assert model.dispersion_score(distance, 4) == 0


def test_score_identities() -> None:
    distance = distances(60)
    assert model.dispersion_score(distance, 1) == pytest.approx(distance.mean(1).min())
    assert model.dispersion_score(distance, 60) == 0
    assert model.dispersion_score(7 * distance, 5) == pytest.approx(7 * model.dispersion_score(distance, 5))
    order = np.random.default_rng(1).permutation(60)
    moved = distance[order][:, order]
    best = [min(model.dispersion_score(d, 3, seed) for seed in range(20)) for d in (distance, moved)]
    assert best[0] == pytest.approx(best[1])
    scores = [min(model.dispersion_score(distance, k, seed) for seed in range(5)) for k in (1, 2, 4, 8, 16, 32)]
    assert scores == sorted(scores, reverse=True)
    two = np.repeat([0.0, 5.0], [7, 9])
    assert model.dispersion_score(np.abs(two[:, None] - two), 2) == 0  # pure recognition
    spread = 0.01 * np.random.default_rng(2).normal(size=16)
    tight = np.square(two + spread - (two + spread)[:, None])
    assert model.dispersion_score(tight, 2) < 5e-4 < 1e-2 * model.dispersion_score(tight, 1)
    assert model.dispersion_score(np.zeros((5, 5)), 3) == 0


@pytest.mark.parametrize(("count", "k"), [(40, 3), (40, 20), (150, 2), (150, 60), (7, 7)])
def test_k_medoids_takes_the_steps_of_the_plain_form(count, k) -> None:
    for seed in range(3):
        distance = distances(count, seed=seed)
        medoids, inertia = slow_k_medoids(distance, k, seed)
        ours = model.k_medoids(distance, k, seed)
        assert ours.medoids.tolist() == medoids.tolist()
        assert ours.inertia == inertia
        assert ours.labels.tolist() == distance[medoids].argmin(0).tolist()


def test_k_medoids_comes_near_a_better_algorithm() -> None:
    kmedoids = pytest.importorskip("kmedoids")
    distance = distances(200)
    for k in (2, 10):
        best = kmedoids.fasterpam(distance, k, random_state=0).loss
        ours = min(model.k_medoids(distance, k, seed).inertia for seed in range(10))
        assert 0.97 * best <= ours <= 1.1 * best


@pytest.mark.parametrize("k", [2, 30])
def test_costs_within_clusters(k) -> None:
    distance = distances(120)
    labels = np.random.default_rng(0).integers(0, k, 120)
    wanted = [distance[i, labels == labels[i]].sum() for i in range(120)]
    np.testing.assert_allclose(model.within_cluster_costs(distance, labels), wanted)
    items = np.flatnonzero(labels < 2)
    np.testing.assert_allclose(model.within_cluster_costs(distance, labels, items), np.array(wanted)[items])


def test_other_clusterings() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    blobs = data.generate_blobs(1)
    distance = np.square(blobs[:, None] - blobs).sum(-1)
    labels = fcluster(linkage(squareform(distance), "complete"), 8, "maxclust")
    wanted = sum(distance[np.ix_(labels == c, labels == c)].sum(1).min() for c in np.unique(labels)) / 200
    assert model.dispersion_score(distance, 8, method="hierarchical") == pytest.approx(wanted)
    assert model.partition_inertia(distance, labels) / 200 == pytest.approx(wanted)
    affinity = model.dispersion_score(distance, 8, method="affinity-propagation")
    assert 0 < affinity < model.dispersion_score(distance, 1)
    with pytest.raises(ValueError, match="unknown clustering"):
        model.dispersion_score(distance, 8, method="optics")
    with pytest.raises(ValueError, match="0 clusters of 200"):
        model.dispersion_score(distance, 0, method="hierarchical")


def test_bad_distances_are_named() -> None:
    good = distances(6)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"{k} clusters of 6 items: expected 1 to 6"):
            model.k_medoids(good, k)
    with pytest.raises(ValueError, match="expected a square matrix"):
        model.k_medoids(good[:3], 1)
    for value, message in (
        (np.nan, r"\[2, 4\] is nan: expected a finite"),
        (-1.0, r"\[2, 4\] is -1: expected a finite distance of at least 0"),
        (np.inf, r"\[2, 4\] is inf"),
        (good[2, 4] + 1, r"\[2, 4\] .* mirror image"),
    ):
        bad = good.copy()
        bad[2, 4] = value
        with pytest.raises(ValueError, match=message):
            model.k_medoids(bad, 2)
    large = distances(150)
    for value in (np.nan, -1.0, np.inf):  # in a tile below the diagonal
        bad = large.copy()
        bad[140, 3] = value
        with pytest.raises(ValueError, match=r"\[140, 3\] is .*: expected a finite"):
            model.k_medoids(bad, 2)
    nearly = good.copy()
    nearly[1, 3] += 1e-8
    assert model.k_medoids(nearly, 2).inertia > 0


def test_published_scores_come_out_exactly(data_root) -> None:
    folder = data_root / "dispersion-score-cluster-demo"
    published = data.load_demo_scores(folder)
    for spread in data.DEMO_SPREADS:
        blobs = data.load_blobs(folder, spread)
        assert np.array_equal(blobs, data.generate_blobs(spread))
        distance = np.square(blobs[:, None] - blobs).sum(-1)
        ours = [model.dispersion_score(distance, k) for k in data.DEMO_CLUSTERS]
        np.testing.assert_allclose(ours, published[spread], rtol=1e-12)


def test_reported_numbers_are_the_published_ones(data_root) -> None:
    published = data.load_demo_scores(data_root / "dispersion-score-cluster-demo")
    rows = [row for row in read_paper(FOLDER).reported if row.metric.startswith("demo/")]
    assert len(rows) == 24
    for row in rows:
        spread, k = (int(number) for number in re.findall(r"\d+", row.metric))
        assert row.value == pytest.approx(published[spread][data.DEMO_CLUSTERS.index(k)], rel=1e-3)


# ---- cameras


def test_cameras() -> None:
    azimuth, elevation = 360 * torch.rand(20, generator=gen()).double(), 60 * torch.rand(20, generator=gen(1)).double()
    rotation = model.camera_rotations(azimuth, elevation)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).double().expand(20, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20).double())
    front = model.camera_rotations(torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(front[0, 2], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(front[0, 1], torch.tensor([0.0, 1, 0]))
    for a, e, matrix in zip(np.deg2rad(azimuth), np.deg2rad(elevation), rotation.numpy(), strict=True):
        z = 1.7 * np.array([np.cos(e) * np.cos(a), np.sin(e), np.cos(e) * np.sin(a)])
        x = np.cross([0, 1, 0], z)
        y = np.cross(z, x)
        np.testing.assert_allclose(matrix, [v / np.linalg.norm(v) for v in (x, y, z)], atol=1e-12)
    points = clouds(20, 9).double()
    viewed = model.to_viewer(points, rotation)
    torch.testing.assert_close(viewed[3, 4], rotation[3] @ points[3, 4])
    torch.testing.assert_close(model.to_object(viewed, rotation), points)


# ---- sphere to cube


def test_ends_of_the_interpolation() -> None:
    ends = data.sphere_cube_clouds(torch.tensor([0.0, 1.0]), 4000, gen())
    torch.testing.assert_close(ends[0].norm(dim=-1), torch.ones(4000))  # not moved by the points that were drawn
    side = ends[1].abs().amax(-1)
    torch.testing.assert_close(side, torch.full((4000,), 1 / math.sqrt(3)))
    face = (ends[1] / side.max()).abs().sort(-1).values
    corners = ((face[:, 0] > 0.5) & (face[:, 1] > 0.5)).double().mean()
    assert float(corners) == pytest.approx(0.25, abs=0.03)  # even by area
    inside = data.sphere_cube_inside(torch.tensor([0.0, 1.0]))
    points = torch.tensor([[0.9, 0.0, 0.0], [0.55, 0.55, 0.55]]).expand(2, 2, 3)
    assert inside(torch.tensor([0, 1]), points).tolist() == [[True, True], [False, True]]


def test_normals_are_the_gradient_of_the_surface() -> None:
    values = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
    directions = F.normalize(torch.randn(3, 50, 3, dtype=torch.float64, generator=gen()), dim=-1)
    points = (directions * data._radius(directions, values).unsqueeze(-1)).requires_grad_()
    length = points.norm(dim=-1)
    level = length - data._radius(points / length.unsqueeze(-1), values)
    (gradient,) = torch.autograd.grad(level.sum(), points)
    torch.testing.assert_close(data._normals(directions, values), F.normalize(gradient, dim=-1), atol=1e-8, rtol=1e-6)


def test_images_show_the_shapes() -> None:
    images = data.sphere_cube_images(torch.tensor([0.0, 0.5, 1.0]), 96)
    assert images.shape == (3, 3, 96, 96) and float(images.min()) == 0 and float(images.max()) <= 1
    share = (images[:, 0] > 0).double().mean((1, 2)) * (2 * data.EXTENT) ** 2
    hexagon = math.sqrt(3) * (2 / math.sqrt(3)) ** 2  # a cube of this side, seen along its diagonal
    assert share[[0, 2]].tolist() == pytest.approx([math.pi, hexagon], rel=0.05)
    light = F.normalize(torch.tensor(data.LIGHT), dim=0)
    faces, pixels = images[2, 0][images[2, 0] > 0].mul(1e3).round().unique(return_counts=True)
    three = faces[pixels.argsort()[-3:]].sort().values
    assert sorted((200 + 800 * light).round().tolist()) == three.tolist()  # three faces, three shades


def test_clusters_and_test_values() -> None:
    for size in (1, 12, 35):
        values = data.cluster_values(size)
        assert len(values.unique()) == 20
        assert float(values[9] - values[0]) == pytest.approx(size / 100, abs=1e-3)
        torch.testing.assert_close(values * 1000, (values * 1000).round(), atol=1e-3, rtol=0)
        assert not torch.isin((values * 1e4).round(), (data.test_values(200) * 1e4).round()).any()
    widest = data.cluster_values(35)
    assert float(widest[10] - widest[9]) == pytest.approx(0.03, abs=1e-6)  # the clusters almost touch
    views = data.sphere_cube_views(data.cluster_values(35), data.cluster_values(1), 16, 50, gen())
    assert len(views) == 20 and views.images(torch.arange(4)).shape == (4, 3, 16, 16)
    drawn = views.clouds(torch.tensor([3, 3]), 20, gen())
    assert drawn.shape == (2, 20, 3) and len(drawn[0].unique(dim=0)) == 20 and not torch.equal(drawn[0], drawn[1])
    assert views.clouds(torch.tensor([3]), 60, gen()).shape == (1, 60, 3)
    with pytest.raises(UserError, match="2 images and 3 shapes"):
        data.MemoryViews(torch.zeros(2, 3, 4, 4), torch.zeros(3, 5, 3), torch.zeros(3, 3, 3), torch.zeros(3))


# ---- files in the authors' layouts


def write_picture(path: Path, size: int, mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size, size, len(mode)), dtype=np.uint8)
    Image.fromarray(array, mode).save(path)


def write_cubesphere(root: Path, side: int = 16, keys: tuple[str, ...] = ("image-01", "image-35", "test")) -> Path:
    folder = root / data.CUBESPHERE
    numbers = range(100, 110)
    for number in numbers:
        place = folder / "CubeSphere_interp_1000" / f"instance_{number}"
        write_picture(place / "Isometric.png", side, seed=number)
        points = torch.randn(300, 3, generator=gen(number)).double().numpy()
        np.save(place / ("pt_1024.npy" if number == 105 else "pt_30000.npy"), points)
    rows = [
        {
            "shapekey_value": number / 1000,
            "isometric_path": f"CubeSphere_interp_1000/instance_{image}/Isometric.png",
            "ptcloud_path": f"CubeSphere_interp_1000/instance_{number}/pt_1024.npy",
        }
        for number, image in zip(numbers, reversed(numbers), strict=True)
    ]
    for key in keys:
        (folder / data.cubesphere_list(key)).write_text(json.dumps(rows[::-1]))
    return folder


def test_cubesphere_files(tmp_path) -> None:
    folder = write_cubesphere(tmp_path)
    views = data.load_cubesphere(tmp_path, "image-35", 16)
    assert views.order.tolist() == pytest.approx([number / 1000 for number in range(100, 110)])
    shown = np.asarray(Image.open(folder / "CubeSphere_interp_1000/instance_109/Isometric.png"))
    picture = views.images(torch.tensor([0]))[0]
    np.testing.assert_allclose(picture.permute(1, 2, 0).numpy()[..., ::-1] * 255, shown, atol=1e-4)  # BGR
    torch.testing.assert_close(views.stored.norm(dim=-1).amax(1), torch.ones(10))
    assert data.load_cubesphere(folder, "test", 16).stored.shape == (10, 300, 3)


def test_damaged_cubesphere_files(tmp_path) -> None:
    with pytest.raises(UserError, match="no folder cubesphere_1000"):
        data.load_cubesphere(tmp_path, "test", 16)
    with pytest.raises(UserError, match="needs --data"):
        data.load_cubesphere(None, "test", 16)
    folder = write_cubesphere(tmp_path)
    with pytest.raises(UserError, match="16 x 16 pixels, the encoder expects 224 x 224"):
        data.load_cubesphere(tmp_path, "test", 224)
    with pytest.raises(UserError, match=r"no file .*cltsize07\.json"):
        data.load_cubesphere(tmp_path, "image-07", 16)
    for number in range(101, 108):
        (folder / f"CubeSphere_interp_1000/instance_{number}/Isometric.png").unlink()
    with pytest.raises(UserError, match="7 files are missing, the first: ") as caught:
        data.load_cubesphere(tmp_path, "test", 16)
    assert str(caught.value).count("Isometric.png") == 5
    (folder / data.cubesphere_list("test")).write_text('[{"shapekey_value": 1}]')
    with pytest.raises(UserError, match="entry 0 has no isometric_path"):
        data.load_cubesphere(tmp_path, "test", 16)


def write_shapenet(root: Path, classes: tuple[str, ...] = ("bench", "chair"), yaws: tuple[int, ...] = (0, 90)) -> None:
    """Five shapes a class: 137-pixel RGBA renderings with metadata, and one image a shape and yaw range."""
    for label, name in enumerate(classes):
        synset = data.SHAPENET_CLASSES[name]
        for number in range(5):
            seed = 10 * label + number
            cloud = root / data.SHAPENET_CLOUDS / synset / f"shape{number}.points.ply.npy"
            cloud.parent.mkdir(parents=True, exist_ok=True)
            np.save(cloud, torch.randn(200, 6, generator=gen(seed)).numpy())
            cameras = np.random.default_rng(seed).uniform(0, 60, (24, 5))
            place = root / data.SHAPENET_RENDERINGS / synset / f"shape{number}" / "rendering"
            for view in range(3):
                write_picture(place / f"{view:02d}.png", 137, "RGBA", seed + 100 * view)
            np.savetxt(place / "rendering_metadata.txt", cameras)
            for yaw in yaws:
                part = f"ShapeNetV1RenderingSampleYaw{yaw:03d}/image/{synset}/shape{number}/easy"
                place = root / data.SHAPENET_YAW / part
                write_picture(place / "00.png", 32, "RGBA", seed)
                np.savetxt(place / "rendering_metadata.txt", cameras[:1])


def test_shapenet_files(tmp_path) -> None:
    write_shapenet(tmp_path)
    classes = ("bench", "chair")
    found = data.shapenet_renderings(tmp_path, "views-02", "train", classes)
    assert len(found) == 2 * 4 * 2 and [item.image.name for item in found[:2]] == ["01.png", "02.png"]
    test = data.shapenet_renderings(tmp_path, "views-02", "test", classes)
    assert [(item.image.name, item.cloud.name[:6], item.label) for item in test] == [
        ("00.png", "shape4", 0),
        ("00.png", "shape4", 1),
    ]
    assert len(data.shapenet_renderings(tmp_path, "yaw-090", "train", classes)) == 8
    angles = torch.tensor([[item.azimuth, item.elevation] for item in found])
    views = data.ShapeNetViews(found, model.camera_rotations(*angles.unbind(1)), 224, data.CROP)
    picture = views.images(torch.tensor([1, 5]))
    with Image.open(found[1].image) as image:
        wanted = image.crop((5, 5, 132, 132)).resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(picture[0].permute(1, 2, 0).numpy() * 255, np.asarray(wanted)[..., :3], atol=1e-4)
    drawn = views.clouds(torch.tensor([0, 1, 2]), 300, gen())
    assert drawn.shape == (3, 300, 3) and float(drawn.norm(dim=-1).max()) <= 1 + 1e-5
    assert len(drawn[0].unique(dim=0)) < 200  # with replacement


def test_damaged_shapenet_files(tmp_path) -> None:
    with pytest.raises(UserError, match="no folder ShapeNetV1PointCloud"):
        data.shapenet_renderings(tmp_path, "views-01", "train")
    write_shapenet(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*02691156"):
        data.shapenet_renderings(tmp_path, "views-01", "train")
    with pytest.raises(UserError, match="8 images are missing"):
        data.shapenet_renderings(tmp_path, "views-03", "train", ("bench", "chair"))
    place = tmp_path / data.SHAPENET_RENDERINGS / data.SHAPENET_CLASSES["chair"] / "shape2" / "rendering"
    np.savetxt(place / "rendering_metadata.txt", np.zeros((23, 5)))
    with pytest.raises(UserError, match="23 rows of 5 numbers, expected 24 rows"):
        data.shapenet_renderings(tmp_path, "views-01", "train", ("chair",))
    (place / "rendering_metadata.txt").unlink()
    with pytest.raises(UserError, match=r"no camera metadata .*viewer-centred shapes need it"):
        data.shapenet_renderings(tmp_path, "views-01", "train", ("chair",))
    cloud = tmp_path / data.SHAPENET_CLOUDS / data.SHAPENET_CLASSES["bench"] / "shape0.points.ply.npy"
    for array, message in ((np.zeros((0, 3)), "at least one point"), (np.full((5, 3), np.nan), "NaN")):
        np.save(cloud, array)
        with pytest.raises(UserError, match=message):
            data._read_cloud(cloud)


def test_real_voxels(data_root) -> None:
    folder = data_root / "modelnet10-voxels32"
    shapes = data.load_modelnet(folder, "test", ("chair", "table"), 60, 300, gen())
    assert shapes.clouds.shape == (60, 300, 3) and set(shapes.labels.tolist()) == {2, 8}
    torch.testing.assert_close(shapes.clouds.norm(dim=-1).amax(1), torch.ones(60))
    every = torch.arange(60)
    within = shapes.inside(every, shapes.clouds).double().mean()
    assert float(within) > 0.999  # the points lie in occupied cells, up to rounding at their walls
    assert not bool(shapes.inside(every, torch.full((60, 1, 3), 3.0)).any())
    tables = shapes.clouds[shapes.labels == 8]
    assert float(tables[..., 1].median()) > 0.02  # y is up: most of a table is its top
    images = data.depth_images(tables, 24)
    assert images.shape == (len(tables), 3, 24, 24) and float(images.max()) <= 1 and float(images.min()) == 0


def test_depth_images_by_hand() -> None:
    points = torch.tensor([[[0.9, 0.9, -0.5], [0.9, 0.9, 0.5], [-0.9, -0.9, 1.0]]])
    image = data.depth_images(points, 4)[0, 0]
    assert float(image[0, 3]) == pytest.approx(2 / 2.5) and float(image[3, 0]) == 1 and int((image > 0).sum()) == 2


def test_damaged_demo_files(tmp_path) -> None:
    with pytest.raises(UserError, match="no file"):
        data.load_blobs(tmp_path, 1)
    with pytest.raises(UserError, match="needs --data"):
        data.load_blobs(None, 1)
    with pytest.raises(UserError, match="expected the authors' scores"):
        data.load_demo_scores(tmp_path)
    np.save(tmp_path / data.DEMO_SCORES, np.zeros(3))
    with pytest.raises(UserError, match="expected 50 scores"):
        data.load_demo_scores(tmp_path)
    (tmp_path / data.DEMO_SCORES).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable npy file"):
        data.load_demo_scores(tmp_path)


# ---- the command


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


TINY = ["--preset", "smoke", "--experiments", "synthetic", "--image-sizes", "1", "--shape-sizes", "35"]


def test_stopping_and_resuming_changes_nothing(run_paper, tmp_path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_paper("svr_dispersion", [*TINY, "--out", str(a)]).code == 0
    assert run_paper("svr_dispersion", [*TINY, "--stop-after", "7", "--out", str(b)]).code == 0  # after the decay
    assert not (b / "result.json").exists()
    assert run_paper("svr_dispersion", ["--resume", str(b)]).code == 0
    assert result_of(a)["metrics"] == result_of(b)["metrics"]
    assert (b / "figure.png").stat().st_size > 5_000


def test_restarting_is_a_new_adam(train) -> None:
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.Adam(net.parameters(), 0.1) for net in nets]
    for step in range(4):
        if step == 2:
            train.restart(optimizers[0], 0.01)
            optimizers[1] = torch.optim.Adam(nets[1].parameters(), 0.01)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.full((1, 3), 1.0 + step)).square().sum().backward()
            optimizer.step()
    assert torch.equal(nets[0].weight, nets[1].weight)


BRIEF = ["--epochs", "1", "--decays", "1", "--seed", "0", "--test-shapes", "12", "--image-side", "16",
         "--icosphere", "1", "--image-sizes", "1", "35", "--shape-sizes", "35", "--score-points", "1000"]  # fmt: skip


def verdicts(train, folder: Path) -> dict[str, bool]:
    assert train.main([*BRIEF, "--out", str(folder)]) == 0
    return {claim["name"]: claim["holds"] for claim in result_of(folder)["claims"]}


def test_claims_fail_for_a_network_that_does_not_look(train, monkeypatch, tmp_path) -> None:
    class Blind(model.SingleView):
        def forward(self, images: Tensor, *rest: Tensor) -> Tensor:
            return super().forward(0 * images, *rest)

    def blind(*sizes: object) -> nn.Module:
        net = model.build(*sizes)
        return Blind(net.encoder, net.decoder)

    monkeypatch.setattr(train, "build", blind)
    found = verdicts(train, tmp_path)
    assert found["score_equals_the_published_one"] and found["inputs_are_dispersed_as_meant"]
    assert not found["dispersed_images_lead_to_recognition"]
    assert not found["dispersed_shapes_lead_to_reconstruction"]


def test_claims_fail_for_another_score_and_for_equal_inputs(train, monkeypatch, tmp_path) -> None:
    score = train.dispersion_score
    monkeypatch.setattr(train, "dispersion_score", lambda d, k, seed=0, *rest: score(d, k, seed + 1, *rest))
    monkeypatch.setattr(train, "cluster_values", lambda size: data.cluster_values(10))
    found = verdicts(train, tmp_path)
    assert not found["score_equals_the_published_one"]  # another seed is another score
    assert not found["inputs_are_dispersed_as_meant"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source", "cubsphere"], "cubsphere"),
        (["--experiments", "nviews"], "expected one or more of metric_demo, synthetic"),
        (["--networks", "psgn", "psgn"], "each once"),
        (["--image-sizes", "5", "1"], "ascending numbers"),
        (["--image-sizes", "60"], "between 1 and 38"),
        (["--clusters", "0"], "--clusters is 0, expected at least 1"),
        (["--lr", "0"], "positive"),
        (["--encoder", "resnet18"], "224"),
        (["--image-features", "vgg"], "VGG features expect 224"),
        (["--decays", "3", "2"], "ascending"),
        (["--source", "cubesphere", "--experiments", "synthetic", "--networks", "occnet"], "occnet"),
        (["--preset", "synthetic"], "needs --data"),
        (["--preset", "synthetic", "--data", ".", "--check-data"], "no folder cubesphere_1000"),
        (["--preset", "more-shapes", "--data", ".", "--check-data"], "no folder ShapeNetV1PointCloud"),
        (["--preset", "modelnet10-voxels", "--data", ".", "--check-data"], "modelnet10_voxels32_packed.npz"),
        (["--preset", "metric-demo", "--data", ".", "--check-data"], "nsample200_seed2_std1.npz"),
        (["--preset", "modelnet10-voxels", "--classes", "sphere", "--data", "."], "sphere"),
        ([*TINY, "--clusters", "21"], "error: 21 clusters of 20 items: expected 1 to 20"),
    ],
)
def test_bad_usage_is_one_line(refuses, argv, message) -> None:
    refuses(argv, message)


def test_check_data_counts(run_paper, data_root, tmp_path) -> None:
    demo = run_paper(
        "svr_dispersion",
        ["--preset", "metric-demo", "--data", str(data_root / "dispersion-score-cluster-demo"), "--check-data"],
    )
    assert "deviation 8: 200 points (200 expected)" in demo.out and "8 x 50 (8 x 50 expected)" in demo.out
    voxels = ["--preset", "modelnet10-voxels", "--data", str(data_root / "modelnet10-voxels32"), "--check-data"]
    found = run_paper("svr_dispersion", voxels)
    assert "train: 3964 shapes (3964 expected)" in found.out and "test: 901 shapes (901 expected)" in found.out
    write_shapenet(tmp_path)
    argv = ["--preset", "more-shapes", "--classes", "bench", "chair", "--data", str(tmp_path), "--check-data"]
    missing = run_paper("svr_dispersion", argv)
    assert missing.code == 2 and "no vgg16-397923af.pth" in missing.errors[0]
    found = run_paper("svr_dispersion", [*argv, "--encoder", "small", "--image-features", "pooled"])
    assert "views-01 train: 8 images of 8 shapes" in found.out and "views-01 test: 2 images" in found.out
    assert "nothing to look for" in run_paper("svr_dispersion", ["--check-data"]).out


def test_demo_preset_equals_the_authors_files(run_paper, data_root, tmp_path) -> None:
    folder = data_root / "dispersion-score-cluster-demo"
    done = run_paper(
        "svr_dispersion", ["--preset", "metric-demo", "--data", str(folder), "--out", str(tmp_path / "run")]
    )
    assert done.code == 0, done.err
    result = result_of(tmp_path / "run")
    assert result["metrics"]["demo/largest_relative_difference"]["mean"] < 1e-12
    assert len([row for row in result["reported"] if row["comparable"]]) == 24


QUICK = ["--encoder", "small", "--image-features", "pooled", "--code", "8", "--hidden", "8", "--points", "32",
         "--clusters", "3", "--epochs", "1", "--decays", "1", "--icosphere", "1", "--resolution", "6",
         "--score-points", "32", "--primitives", "4"]  # fmt: skip


def test_every_shapenet_experiment_runs_on_files(run_paper, tmp_path) -> None:
    write_shapenet(tmp_path / "data", ("bench", "chair", "lamp"), (0, 90))
    for index, (preset, extra) in enumerate(
        [
            ("more-shapes", ["--image-side", "16"]),
            ("more-imgs", ["--yaw-ranges", "0", "90", "--image-side", "32"]),
            ("nviews", ["--views", "1", "2", "--image-side", "16"]),
            ("baselines", ["--classifier-epochs", "2", "--image-side", "16", "--frames", "vc"]),
        ]
    ):
        argv = ["--preset", preset, "--classes", "bench", "chair", "lamp", "--data", str(tmp_path / "data"), *QUICK]
        out = tmp_path / str(index)
        done = run_paper("svr_dispersion", [*argv, *extra, "--seed", "1", "--out", str(out)])
        assert done.code == 0, done.err
        metrics = result_of(out)["metrics"]
        if preset == "more-shapes":
            assert {"shapenet/vc-psgn/output_ds", "shapenet/views-01/shape_ds", "shapenet/views-01/shape_ds_vc"} <= set(
                metrics
            )
        if preset == "baselines":  # three test shapes, three clusters
            assert metrics["shapenet/vc-clustering/output_ds"]["mean"] == 0


def test_voxel_experiments(run_paper, data_root, tmp_path) -> None:
    argv = ["--preset", "modelnet10-voxels", "--data", str(data_root / "modelnet10-voxels32"), *QUICK]
    argv += ["--networks", "atlasnet-squares", "occnet", "--yaw-ranges", "0", "90", "--train-shapes", "24"]
    argv += ["--test-shapes", "10", "--stored-points", "800", "--classifier-epochs", "1"]
    argv += ["--out", str(tmp_path / "run")]
    done = run_paper("svr_dispersion", argv)
    assert done.code == 0, done.err
    metrics = {name: value["mean"] for name, value in result_of(tmp_path / "run")["metrics"].items()}
    assert metrics["modelnet10/yaw-000/image_ds"] < metrics["modelnet10/yaw-090/image_ds"]
    assert metrics["modelnet10/views-01/shape_ds"] < metrics["modelnet10/views-01/shape_ds_vc"]
    assert {"modelnet10/vc-occnet/output_ds_iou", "modelnet10/oc-clustering/output_ds"} <= set(metrics)
    oracle, blind = metrics["modelnet10/oc-oracle/test_chamfer"], metrics["modelnet10/oc-clustering/test_chamfer"]
    assert metrics["modelnet10/oc-clustering/output_ds"] < 1e-6  # three answers, three clusters
    assert oracle < blind  # nothing that answers with training shapes is nearer than the nearest


def test_readme_example(train, capsys) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) >= 0
