"""Tests of papers/foldingnet. References are written from the definitions, in numpy and one point at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from papers.foldingnet import data, model
from shared.errors import UserError

SMALL = {"code": 12, "hidden": 10, "side": 5, "widths": (7, 6, 8, 9, 11), "fc_hidden": (13, 14), "fc_points": 20}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(b: int = 3, n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    points = torch.randn(b, n, 3, generator=gen(seed), dtype=dtype)
    return points / points.norm(dim=-1).amax(1).view(-1, 1, 1)


# ---- references


def np_graph(points: np.ndarray, k: int) -> tuple[list[set[int]], np.ndarray]:
    """Adjacency as sets and covariances (n, 9) of one cloud, as the authors' preparation defines them."""
    from sklearn.neighbors import KDTree

    near = KDTree(points, leaf_size=30).query(points, k=k + 1, return_distance=False)[:, 1:]
    adjacent: list[set[int]] = [set() for _ in points]
    covariance = np.zeros((len(points), 9))
    for i, row in enumerate(near):
        covariance[i] = np.cov(points[row].T).reshape(-1)
        for j in row:
            adjacent[i].add(int(j))
            adjacent[int(j)].add(i)
    return adjacent, covariance


def np_weights(layer: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def np_linear(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    w, b = np_weights(layer)
    return x @ w.T + b


def np_encoder(net: model.Encoder, points: np.ndarray, k: int) -> np.ndarray:
    """The codeword of one cloud, layer by layer."""
    adjacent, covariance = np_graph(points, k)
    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    pool = lambda v: np.stack([v[sorted(a)].max(0) for a in adjacent]) if net.graph else v  # noqa: E731
    x = np.concatenate([points, covariance], 1) if net.covariance else points
    for layer in (net.point1, net.point2, net.point3):
        x = relu(np_linear(x, layer))
    x = pool(x)
    x = pool(relu(np_linear(x, net.point4)))
    x = np_linear(x, net.point5).max(0)
    return np_linear(relu(np_linear(x, net.code1)), net.code2)


def np_fold(fold: model.Fold, base: np.ndarray, code: np.ndarray) -> np.ndarray:
    x = np.concatenate([base, np.tile(code, (len(base), 1))], 1)
    x = np.maximum(np_linear(x, fold.hidden1), 0)
    x = np.maximum(np_linear(x, fold.hidden2), 0)
    return np_linear(x, fold.out)


def np_chamfer(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    distance = np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1) + 1e-6)
    squared = ((x[:, None] - y[None]) ** 2).sum(-1)
    return distance.min(1).mean(), distance.min(0).mean(), squared.min(1).mean() + squared.min(0).mean()


# ---- sizes (section by section of the official layer lists)


def test_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        encoder, folding, full = model.Encoder(), model.FoldingDecoder(), model.FullyConnectedDecoder()
    counts = [
        model.parameters(getattr(encoder, name))
        for name in ("point1", "point2", "point3", "point4", "point5", "code1", "code2")
    ]
    assert counts == [832, 4160, 4160, 8320, 132096, 524800, 262656]
    assert model.parameters(encoder) == 937_024
    assert model.parameters(folding) == 1_056_262
    assert model.parameters(full) == 15_213_568
    assert round(model.parameters(folding) / model.parameters(full), 5) == 0.06943


@pytest.mark.parametrize(
    ("variant", "encoder", "decoder", "points"),
    [
        ("foldingnet", 937_024, 1_056_262, 2025),
        ("orthorot", 937_024, 1_056_262, 2025),
        ("randrot", 937_024, 1_056_262, 2025),
        ("nogm", 937_024, 1_056_262, 2025),
        ("nocov", 936_448, 1_056_262, 2025),
        ("nogmcov", 936_448, 1_056_262, 2025),
        ("grid3d", 937_024, 1_056_774, 2197),
        ("denser", 937_024, 1_056_262, 2500),
        ("rnn", 937_024, 528_387, 2025),
        ("sphere", 937_024, 1_056_774, 2025),
        ("gaussian", 937_024, 1_056_774, 2025),
        ("fc", 937_024, 15_213_568, 2048),
    ],
)
def test_variants_at_the_papers_size(variant, encoder, decoder, points) -> None:
    with torch.device("meta"):
        net = model.build(variant)
        assert model.parameters(net.encoder) == encoder
        assert model.parameters(net.decoder) == decoder
        assert net.decoder(torch.zeros(2, 512)).points.shape == (2, points, 3)


def test_every_preset_builds_at_full_size(train) -> None:
    for name, preset in train.PRESETS.items():
        c = preset.config
        for arm in c.arms:
            with torch.device("meta"):
                net = train.make(c, arm)
                train.make_optimizer(net, c)
            if c.code == 512:
                assert model.parameters(net.encoder) == (936_448 if "cov" in arm else 937_024), name
        assert set(c.arms) <= set(model.VARIANTS)
    assert tuple(train.ARMS) == model.VARIANTS


def test_initialisation_is_caffes_xavier() -> None:
    torch.manual_seed(0)
    layer = model.FullyConnectedDecoder(64, (512, 512), 8).hidden2
    bound = math.sqrt(3 / 512)
    assert float(layer.weight.detach().abs().max()) <= bound
    assert float(layer.weight.detach().std()) == pytest.approx(1 / math.sqrt(512), rel=0.02)
    assert not layer.bias.any()


# ---- graph and covariance


def test_neighbours_agree_with_a_tree_and_leave_the_point_out() -> None:
    from sklearn.neighbors import KDTree

    points = clouds(3, 60)
    tree = data.neighbours(points, 16)
    assert tree.dtype == torch.int16 and tree.shape == (3, 60, 16)
    direct = model.nearest_neighbours(points, 16)
    assert torch.equal(tree.long(), direct)
    for cloud, near in zip(points.numpy(), tree.numpy(), strict=True):
        assert np.array_equal(near, KDTree(cloud).query(cloud, k=17, return_distance=False)[:, 1:])
    assert (tree != torch.arange(60).view(1, 60, 1)).all()


def test_coinciding_points_are_never_their_own_neighbours() -> None:
    points = clouds(2, 40)
    points[0, :30] = points[0, 0]
    near = data.neighbours(points, 16)
    assert (near != torch.arange(40).view(1, 40, 1)).all()
    assert ((near >= 0) & (near < 40)).all()
    assert (model.nearest_neighbours(points, 16) != torch.arange(40).view(1, 40, 1)).all()


def test_neighbours_do_not_depend_on_where_the_trees_are_cut(monkeypatch) -> None:
    points = clouds(7, 30)
    whole = data.neighbours(points, 5)
    monkeypatch.setattr(data, "TREE_POINTS", 60)
    assert torch.equal(whole, data.neighbours(points, 5))


def test_large_sets_are_cached(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "CACHE_POINTS", 10)
    points = clouds(2, 30)
    first = data.neighbours(points, 5)
    files = list(tmp_path.rglob("*.npy"))
    assert len(files) == 1
    monkeypatch.setattr(data, "_neighbours", lambda *_: pytest.fail("was cached"))
    assert torch.equal(first, data.neighbours(points, 5))
    files[0].write_bytes(b"damaged")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "CACHE_POINTS", 10)
    assert torch.equal(first, data.neighbours(points, 5))


def test_graph_and_covariance_match_the_official_preparation() -> None:
    points = clouds(3, 50, seed=1)
    prepared = model.prepare(points, 16)
    graph = prepared.graph
    for c in range(3):
        adjacent, covariance = np_graph(points[c].double().numpy(), 16)
        for i in range(50):
            row = graph.indices[graph.indptr[c * 50 + i] : graph.indptr[c * 50 + i + 1]] - c * 50
            assert row.tolist() == sorted(adjacent[i])
        np.testing.assert_allclose(prepared.covariance[c].numpy(), covariance, atol=1e-6)


def test_covariance_identities() -> None:
    flat = clouds(1, 60)
    flat[..., 2] = 0.25
    c = model.prepare(flat).covariance.view(60, 3, 3)
    assert c[:, 2].abs().max() < 1e-12 and c[:, :, 2].abs().max() < 1e-12
    axis = torch.arange(-2.0, 3)
    lattice = torch.cartesian_prod(axis, axis, axis).unsqueeze(0)
    centre = 62
    six = model.local_covariance(lattice, model.nearest_neighbours(lattice, 6))[0, centre].view(3, 3)
    torch.testing.assert_close(six, torch.eye(3) * 2 / 5)
    moved = model.prepare(flat + 5)
    torch.testing.assert_close(moved.covariance, model.prepare(flat).covariance, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("draw", [model.orthogonal_rotations, model.random_rotations])
def test_rotating_clouds_rotates_covariances(draw) -> None:
    prepared = model.prepare(clouds(4, 40))
    rotation = draw(4, gen(3))
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).expand(4, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(4))
    turned = model.rotate(prepared, rotation)
    again = model.prepare(turned.points)
    torch.testing.assert_close(turned.covariance, again.covariance, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(turned.graph, again.graph, strict=True))
    for i in range(4):  # vec(R^T C R) = vec(C) kron(R^T, R^T)^T, row by row
        r = rotation[i].double().numpy()
        expected = prepared.covariance[i].double().numpy() @ np.kron(r.T, r.T).T
        np.testing.assert_allclose(turned.covariance[i].numpy(), expected, atol=1e-6)
        np.testing.assert_allclose(turned.points[i].numpy(), prepared.points[i].double().numpy() @ r, atol=1e-6)


def test_axis_rotations_match_rodrigues_and_their_frequencies() -> None:
    from scipy.spatial.transform import Rotation

    axis, turns = torch.arange(6).repeat_interleave(4), torch.arange(4).repeat(6)
    ours = model.axis_rotations(axis, turns)
    units = np.concatenate([np.eye(3), -np.eye(3)])[axis.numpy()]
    expected = Rotation.from_rotvec(units * turns.numpy()[:, None] * math.pi / 2).as_matrix()
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)
    assert set(ours.unique().tolist()) <= {-1.0, 0.0, 1.0}
    many = model.orthogonal_rotations(6000, gen())
    assert float((many == torch.eye(3)).flatten(1).all(1).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert len(many.unique(dim=0)) == 10


def test_graph_pooling_equals_scatter_and_peers() -> None:
    b, n, c = 2, 30, 5
    graph = model.union_graph(model.nearest_neighbours(clouds(b, n), 6))
    x = torch.randn(b, n, c, generator=gen(1), requires_grad=True)
    ours = model.neighbour_max(x, graph)
    row = torch.repeat_interleave(torch.arange(b * n), graph.indptr.diff().long())
    gathered = x.reshape(-1, c)[graph.indices.long()]
    expected = torch.full((b * n, c), -math.inf).scatter_reduce(0, row[:, None].expand(-1, c), gathered, "amax")
    torch.testing.assert_close(ours.flatten(0, 1), expected)
    out = torch.randn(b, n, c, generator=gen(2))
    gradients = [torch.autograd.grad(y, x, out.view_as(y), retain_graph=True)[0] for y in (ours, expected)]
    torch.testing.assert_close(*gradients)
    bags = model._bag_max(x.reshape(-1, c), graph)  # what accelerators run
    torch.testing.assert_close(bags, expected)
    torch.testing.assert_close(torch.autograd.grad(bags, x, out.view_as(bags))[0], gradients[0])
    half = model.neighbour_max(x.detach().bfloat16(), graph)
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.detach().bfloat16().view(b, n, c))
    geometric = pytest.importorskip("torch_geometric.nn")
    peer = geometric.MaxAggregation()(gathered.detach(), row, dim_size=b * n)
    torch.testing.assert_close(peer, expected.detach())


def test_on_a_complete_graph_each_point_sees_the_maximum_of_the_others() -> None:
    n = 9
    graph = model.union_graph(model.nearest_neighbours(clouds(1, n), n - 1))
    x = torch.randn(1, n, 4)
    others = torch.stack([torch.cat([x[0, :i], x[0, i + 1 :]]).amax(0) for i in range(n)])
    torch.testing.assert_close(model.neighbour_max(x, graph)[0], others)


@pytest.mark.parametrize("n", [1, 7, 48, 200])
def test_linear_max_equals_the_dense_form(n) -> None:
    layer = torch.nn.Linear(6, 17)
    x = torch.randn(3, n, 6, requires_grad=True)
    ours, dense = model.linear_max(x, layer), layer(x).amax(1)
    torch.testing.assert_close(ours, dense)
    inputs = (x, layer.weight, layer.bias)
    for a, b in zip(
        torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(dense.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


# ---- networks


@pytest.mark.parametrize("variant", ["foldingnet", "nocov", "nogm", "nogmcov"])
def test_encoder_matches_the_official_layers(variant) -> None:
    torch.manual_seed(1)
    net = model.build(variant, **SMALL).encoder
    points = clouds(3, 50, seed=2)
    with torch.no_grad():
        ours = net(*model.prepare(points, 16))
    for c in range(3):
        np.testing.assert_allclose(
            ours[c].numpy(), np_encoder(net, points[c].double().numpy(), 16), atol=1e-5, rtol=1e-4
        )


def test_the_order_of_points_means_nothing_to_the_encoder() -> None:
    net = model.build("foldingnet", **SMALL).encoder
    points = clouds(2, 50)
    order = torch.randperm(50, generator=gen())
    with torch.no_grad():
        torch.testing.assert_close(
            net(*model.prepare(points)), net(*model.prepare(points[:, order])), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("variant", ["foldingnet", "grid3d", "denser", "rnn", "sphere", "gaussian"])
def test_folding_equals_tiling_the_codeword(variant) -> None:
    torch.manual_seed(2)
    net = model.build(variant, **SMALL).decoder
    code = torch.randn(3, 12)
    with torch.no_grad():
        out = net(code)
    second = net.fold1 if net.shared else net.fold2
    for c in range(3):
        first = np_fold(net.fold1, net.grid.double().numpy(), code[c].double().numpy())
        np.testing.assert_allclose(out.first[c].numpy(), first, atol=1e-5)
        np.testing.assert_allclose(out.points[c].numpy(), np_fold(second, first, code[c].double().numpy()), atol=1e-5)


def test_gradients_of_a_fold_equal_those_of_tiling() -> None:
    fold = model.Fold(2, 12, 10).double()
    base, code = torch.randn(7, 2, dtype=torch.double), torch.randn(3, 12, dtype=torch.double, requires_grad=True)
    tiled = torch.cat([base.expand(3, 7, 2), code.unsqueeze(1).expand(3, 7, 12)], -1)
    plain = fold.out(fold.hidden2(fold.hidden1(tiled).relu()).relu())
    inputs = [code, *fold.parameters()]
    for a, b in zip(
        torch.autograd.grad(fold(base, code).sin().sum(), inputs),
        torch.autograd.grad(plain.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_grid() -> None:
    grid = model.plane_grid((45, 45))
    x, y = np.meshgrid(np.linspace(-0.3, 0.3, 45), np.linspace(-0.3, 0.3, 45))
    np.testing.assert_allclose(grid.numpy(), np.stack([x.ravel(), y.ravel()], 1), atol=1e-7)
    assert grid[0].tolist() == pytest.approx([-0.3, -0.3]) and grid[-1].tolist() == pytest.approx([0.3, 0.3])
    assert float(grid[1, 0] - grid[0, 0]) == pytest.approx(0.6 / 44, rel=1e-4)
    cube = model.plane_grid((3, 4, 5))
    official = np.meshgrid(*[np.linspace(-0.3, 0.3, n) for n in (3, 4, 5)])
    np.testing.assert_allclose(cube.numpy(), np.stack([a.ravel() for a in official], 1), atol=1e-7)
    lifted = model.plane_grid((4, 4, 1))
    assert (lifted[:, 2] == torch.tensor(-0.3)).all()
    assert torch.equal(model.FoldingDecoder(8, 8).grid, grid)


def test_without_a_codeword_all_reconstructions_are_one() -> None:
    out = model.build("foldingnet", **SMALL).decoder(torch.zeros(4, 12)).points
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-6)


def test_any_grid_can_be_folded_after_training() -> None:
    net = model.build("foldingnet", **SMALL).decoder
    code = torch.randn(2, 12)
    dense = net(code, model.plane_grid((9, 9))).points.view(2, 9, 9, 3)
    torch.testing.assert_close(dense[:, ::2, ::2].reshape(2, 25, 3), net(code).points)


# ---- distance


def test_chamfer_by_hand() -> None:
    points = clouds(1, 20)
    assert float(model.chamfer(points, points)) == pytest.approx(0.001, abs=1e-6)
    origin = torch.zeros(1, 1, 3)
    assert float(model.chamfer(origin, torch.tensor([[[3.0, 4.0, 0.0]]]))) == pytest.approx(5.0000001, abs=1e-6)
    two = torch.tensor([[[1.0, 0, 0], [3.0, 0, 0]]])
    forward, backward, squared = model.chamfer_parts(origin, two)
    assert [float(v) for v in (forward, backward, squared)] == pytest.approx([1, 2, 1 + 5], abs=1e-5)
    assert float(model.chamfer(origin, two)) == pytest.approx(2, abs=1e-5)
    assert float(model.chamfer_squared(origin, two)) == pytest.approx(6, abs=1e-5)


def test_chamfer_against_brute_force_and_a_tree() -> None:
    from scipy.spatial import cKDTree

    x, y = clouds(4, 70, seed=1), clouds(4, 50, seed=2)
    parts = model.chamfer_parts(x, y)
    for c in range(4):
        a, b = x[c].double().numpy(), y[c].double().numpy()
        np.testing.assert_allclose([float(p[c]) for p in parts], np_chamfer(a, b), rtol=1e-5)
        tree = np.sqrt(cKDTree(b).query(a)[0] ** 2 + 1e-6).mean()
        assert float(parts[0][c]) == pytest.approx(tree, rel=1e-5)
    torch.testing.assert_close(model.chamfer(x, y), torch.maximum(parts[0], parts[1]))
    torch.testing.assert_close(model.chamfer(x, y), model.chamfer(y, x))


def test_chamfer_gradient_equals_that_of_the_full_matrix() -> None:
    x, y = clouds(3, 30, seed=1), clouds(3, 20, seed=2).requires_grad_()
    full = ((x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1) + 1e-6).sqrt()
    expected = torch.maximum(full.amin(2).mean(1), full.amin(1).mean(1)).mean()
    torch.testing.assert_close(model.chamfer(x, y).mean(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, y)[0] for v in (model.chamfer(x, y).mean(), expected)))


def test_chamfer_is_smooth_at_coinciding_points() -> None:
    x = clouds(2, 10, dtype=torch.double)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.chamfer(x, y).sum(), y)
    assert torch.isfinite(gradient).all()
    x, y = clouds(2, 6, dtype=torch.double), clouds(2, 5, seed=4, dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch.stack(model.chamfer_parts(x, v)), (y,))


def test_autocast_does_not_touch_the_neighbour_search() -> None:
    x, y = clouds(2, 200, seed=1), clouds(2, 200, seed=2)
    plain = model.nearest_pairs(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, model.nearest_pairs(x, y), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model.prepare(torch.zeros(1, 16, 3)), "need more than k=16 points, got 16"),
        (lambda: model.prepare(torch.zeros(1, 16, 2)), "expected \\(clouds, points, 3\\)"),
        (lambda: model.chamfer(torch.zeros(1, 4, 3), torch.zeros(2, 4, 3)), "expected \\(B, n, 3\\)"),
        (lambda: model.build("foldignnet"), "unknown variant"),
        (lambda: model.build(code=0), "at least 1"),
        (lambda: model.Encoder(8, (1, 2, 3)), "five widths"),
        (
            lambda: model.FoldingDecoder(8, 8, 2024),
            "no square grid has 2024 points: expected a square number such as 1936",
        ),
        (lambda: model.FoldingDecoder(8, 8, shared=True), "need a grid in 3-D"),
        (lambda: model.plane_grid((0, 3)), "at least one point"),
    ],
)
def test_bad_arguments(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_another_codes_checkpoint_lists_both_sizes() -> None:
    with pytest.raises(RuntimeError, match=r"torch.Size\(\[12, 12\]\).*torch.Size\(\[16, 16\]\)"):
        model.build("foldingnet", **{**SMALL, "code": 16}).load_state_dict(
            model.build("foldingnet", **SMALL).state_dict()
        )


# ---- data


def test_batches_of_a_set_equal_preparing_their_clouds() -> None:
    points = clouds(9, 40)
    split = data.Split(points, torch.arange(9))
    clouds_set = data.CloudSet.make(
        split, data.neighbours(points, 8), model.local_covariance, model.union_graph, chunk=4
    )
    index = torch.tensor([7, 0, 7, 3])
    got, covariance, graph = clouds_set.batch(index)
    expected = model.prepare(points[index], 8)
    assert torch.equal(got, expected.points)
    torch.testing.assert_close(covariance, expected.covariance)
    assert torch.equal(graph[0], expected.graph.indptr) and torch.equal(graph[1], expected.graph.indices)


def test_surfaces() -> None:
    split = data.generate_surfaces(3, 80, gen())
    assert len(data.SURFACES) == 16 and split.points.shape == (48, 80, 3)
    assert split.labels.tolist() == [i // 3 for i in range(48)]
    torch.testing.assert_close(split.points.norm(dim=-1).amax(1), torch.ones(48))
    torch.testing.assert_close(split.points.mean(1), torch.zeros(48, 3), atol=1e-5, rtol=0)
    assert torch.equal(split.points, data.generate_surfaces(3, 80, gen()).points)
    assert not torch.equal(split.points, data.generate_surfaces(3, 80, gen(1)).points)


def test_plain_surfaces_lie_on_their_equations() -> None:
    split = data.generate_surfaces(2, 400, gen(), noise=0.0, strength=0.0)
    names = list(data.SURFACES)

    def cloud(name: str) -> torch.Tensor:
        return split.points[2 * names.index(name)]

    radius = cloud("cylinder")[:, :2].norm(dim=1)
    assert float(radius.std() / radius.mean()) < 0.06
    points = cloud("torus")
    ring = points[:, :2].norm(dim=1)
    middle = (ring.max() + ring.min()) / 2
    tube = torch.stack([ring - middle, points[:, 2]], 1).norm(dim=1)
    assert float(tube.std() / tube.mean()) < 0.08
    x, y, z = cloud("saddle").T
    design = torch.stack([x**2 - y**2, x, y, torch.ones_like(x)], 1)
    residual = z - design @ torch.linalg.lstsq(design, z.unsqueeze(1)).solution[:, 0]
    assert float(residual.std() / z.std()) < 0.05


def test_noise_points_replace_a_share() -> None:
    points = clouds(3, 50)
    noisy = data.replace_by_noise(points, 0.2, gen())
    assert noisy.shape == points.shape
    kept = (noisy.unsqueeze(2) == points.unsqueeze(1)).all(-1).any(2).sum(1)
    assert kept.tolist() == [40, 40, 40]
    assert torch.equal(data.replace_by_noise(points, 0.0, gen()), points)


def write_sources(folder: Path) -> None:
    """A tiny data set in each official layout."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)

    def hdf5(path: Path, count: int, classes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["data"] = rng.normal(size=(count, 48, 3)).astype(np.float32)
            file["label"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
            file["pid"] = np.zeros((count, 48), np.uint8)

    for part in ("train0", "train1", "test0"):
        hdf5(folder / "modelnet40_ply_hdf5_2048" / f"ply_data_{part}.h5", 40, 40)
    for part in ("train0", "val0", "test0"):
        hdf5(folder / "shapenet_part_seg_hdf5_data" / f"ply_data_{part}.h5", 16, 16)
    np.savez(folder / "shapenet57448xyzonly.npz", data=rng.normal(size=(24, 48, 3)).astype(np.float32))
    cube = "OFF\n4 4 6\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    for i in range(10):
        for split in ("train", "test"):
            path = folder / "ModelNet10" / f"class{i}" / split
            path.mkdir(parents=True)
            (path / f"class{i}_0001.off").write_text(cube)


def test_loaders_read_the_official_layouts(tmp_path) -> None:
    write_sources(tmp_path)
    sizes = {"modelnet40": (80, 40), "shapenetpart": (32, 16), "shapenet": (24, None), "modelnet10": (10, 10)}
    for name, (train, test) in sizes.items():
        splits = data.load(name, tmp_path, 32, 0)
        assert splits["train"].points.shape == (train, 32, 3) and splits["train"].points.dtype == torch.float32
        assert (test is None and "test" not in splits) or splits["test"].points.shape == (test, 32, 3)
    direct = data.load("modelnet40", tmp_path / "modelnet40_ply_hdf5_2048", 48, 0)
    assert torch.equal(direct["train"].points[:, :32], data.load("modelnet40", tmp_path, 32, 0)["train"].points)
    assert data.load("modelnet10", tmp_path, 32, 0, clouds_per_mesh=2)["train"].labels.tolist() == [
        i // 2 for i in range(20)
    ]


def test_real_voxels(data_root) -> None:
    splits = data.load("modelnet10-voxels", data_root / "modelnet10-voxels32", 32, 0)
    for split, count in data.SOURCES["modelnet10-voxels"].counts.items():
        assert splits[split].points.shape == (count, 32, 3)
        torch.testing.assert_close(splits[split].points.norm(dim=-1).amax(1), torch.ones(count))


def test_real_meshes_in_their_zip(data_root) -> None:
    splits = data.load("geometric-shapes", data_root / "geometric-shapes", 64, 0, clouds_per_mesh=2)
    assert splits["train"].points.shape == (80, 64, 3) and len(splits["test"].labels.unique()) == 40


def test_damaged_data(tmp_path) -> None:
    with pytest.raises(UserError, match=r"expected shapenet57448xyzonly\.npz"):
        data.load("shapenet", tmp_path, 32, 0)
    with pytest.raises(UserError, match="needs --data DIR"):
        data.load("modelnet40", None, 32, 0)
    array = np.zeros((3, 40, 3), np.float32)
    array[2, 5, 1] = np.nan
    np.savez(tmp_path / "shapenet57448xyzonly.npz", data=array)
    with pytest.raises(UserError, match="sample 2 holds NaN"):
        data.load("shapenet", tmp_path, 32, 0)
    np.savez(tmp_path / "shapenet57448xyzonly.npz", data=np.ones((3, 40, 3), np.float32))
    with pytest.raises(UserError, match="40 points a cloud, expected at least 64"):
        data.load("shapenet", tmp_path, 64, 0)
    np.savez(tmp_path / "shapenet57448xyzonly.npz", points=array)
    with pytest.raises(UserError, match="no array 'data'"):
        data.load("shapenet", tmp_path, 32, 0)
    (tmp_path / "modelnet40_ply_hdf5_2048").mkdir()
    with pytest.raises(UserError, match=r"no ply_data_train\*\.h5"):
        data.load("modelnet40", tmp_path, 32, 0)
    with pytest.raises(UserError, match="need more than k=16 points, got 10"):
        data.neighbours(clouds(1, 10), 16, "here")
    full = np.full((2, 4096), 255, np.uint8)
    labels = {"y_train": np.array([0, 10], np.uint8), "y_test": np.array([0, 1], np.uint8)}
    np.savez(tmp_path / "modelnet10_voxels32_packed.npz", X_train=full, X_test=full, **labels)
    with pytest.raises(UserError, match=r"y_train\[1\] is no class of 0\.\.9"):
        data.load("modelnet10-voxels", tmp_path, 32, 0)


# ---- the command


def test_helpers_of_training(train) -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    chosen = train.stratified(labels, 8, gen())
    assert labels[chosen].bincount().tolist() == [3, 3, 2] and len(chosen.unique()) == 8
    few = train.labelled_share(labels, 0.01, gen())
    assert sorted(labels[few].tolist()) == [0, 1, 2]
    half = train.labelled_share(labels, 0.5, gen())
    assert len(half.unique()) == 8 and len(labels[half].unique()) == 3
    assert len(train.labelled_share(labels, 1.0, gen()).unique()) == 16
    pairs = train.different_pairs(labels, 5, gen())
    assert pairs.shape == (5, 2) and (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
    assert round(train.paper_decoder_ratio(), 4) == 0.0694


def metrics(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())["metrics"]


def test_stopping_and_resuming_changes_nothing(run_paper, tmp_path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_paper("foldingnet", ["--preset", "smoke", "--out", str(a)]).code == 0
    assert run_paper("foldingnet", ["--preset", "smoke", "--stop-after", "2", "--out", str(b)]).code == 0
    assert run_paper("foldingnet", ["--resume", str(b)]).code == 0
    assert metrics(a) == metrics(b)
    assert (b / "figure.png").stat().st_size > 10_000


SIZES = [
    "--k", "8", "--side", "8", "--code", "32", "--hidden", "48", "--widths", "16", "16", "16", "32", "64",
    "--fc-hidden", "64", "128", "--snapshots", "2",
]  # fmt: skip
TINY = [
    *SIZES,
    "--points",
    "64",
    "--per-class",
    "20",
    "--test-per-class",
    "10",
    "--epochs",
    "24",
    "--lr",
    "0.002",
    "--seeds",
    "1",
]


def test_claims_fail_for_folds_that_ignore_the_codeword(tmp_path) -> None:
    from tests.conftest import run_folder

    # So short a training does not reach the thresholds on every CPU: of the intact network only what is far from
    # a threshold is asked, and that it is ahead of the broken one.
    verdicts, measured = {}, {}
    for name, old, new in (("intact", "", ""), ("broken", "F.linear(code, from_code", "F.linear(0 * code, from_code")):
        folder = tmp_path / name / "foldingnet"
        shutil.copytree(Path(data.__file__).parent, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
        source = (folder / "model.py").read_text()
        assert old in source
        (folder / "model.py").write_text(source.replace(old, new) if old else source)
        result = run_folder(folder, [*TINY, "--out", str(tmp_path / name / "run")])
        assert result.code == 0, result.err
        claims = json.loads((tmp_path / name / "run" / "result.json").read_text())["claims"]
        verdicts[name] = {claim["name"]: claim["holds"] for claim in claims}
        measured[name] = {key: value for claim in claims for key, value in claim["measured"].items()}
    assert verdicts["intact"]["interpolation_is_smooth"]
    assert measured["intact"]["trained"] > measured["intact"]["untrained"] > measured["broken"]["trained"] + 0.05
    assert measured["intact"]["after"] < 0.9 * measured["broken"]["after"]
    assert not verdicts["broken"]["codewords_are_learned"]
    assert not verdicts["broken"]["few_parameters_discriminate"]
    assert not verdicts["broken"]["reconstruction_is_learned"]
    assert not verdicts["broken"]["interpolation_is_smooth"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--points", "16"], "need more than k=16 points"),
        (["--arms", "foldingnet", "noCov"], "unknown variant 'noCov'"),
        (["--arms", "fc", "fc"], "each once"),
        (["--transfer", "shapenet"], "'shapenet' has no labelled splits"),
        (["--widths", "1", "2"], "expected 5 numbers"),
        (["--label-shares", "2"], "between 0 and 1"),
        (["--lr", "0"], "positive"),
        (["--noise", "-1"], "0 or more"),
        (["--preset", "modelnet40"], "needs --data"),
        (["--preset", "modelnet40", "--data", ".", "--check-data"], "expected modelnet40_ply_hdf5_2048"),
        (["--train-on", "modelnet40", "--check-data"], "needs --data"),
        (["--train-on", "mnist"], "mnist"),
    ],
)
def test_bad_usage_is_one_line(run_paper, argv, message) -> None:
    result = run_paper("foldingnet", argv)
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert message in result.errors[0]


def test_check_data_counts(run_paper, tmp_path) -> None:
    write_sources(tmp_path)
    result = run_paper(
        "foldingnet", ["--preset", "shapenet", "--points", "40", "--data", str(tmp_path), "--check-data"]
    )
    assert result.code == 0, result.err
    assert "shapenet train: 24 shapes (EXPECTED 57448)" in result.out
    assert "modelnet10 test: 10" in result.out
    assert "nothing to look for" in run_paper("foldingnet", ["--check-data"]).out


def test_training_on_one_set_and_transferring_to_another(run_paper, tmp_path) -> None:
    write_sources(tmp_path / "data")
    argv = [*SIZES, "--preset", "shapenet", "--data", str(tmp_path / "data"), "--points", "40", "--epochs", "2"]
    argv += ["--arms", "orthorot", "randrot", "--interpolations", "2", "--out", str(tmp_path / "run")]
    result = run_paper("foldingnet", argv)
    assert result.code == 0, result.err
    found = metrics(tmp_path / "run")
    assert {"modelnet40/orthorot/svm_accuracy", "modelnet10/randrot/svm_accuracy"} <= set(found)
    row = next(r for r in json.loads((tmp_path / "run" / "result.json").read_text())["reported"] if r["value"] == 0.884)
    assert row["metric"] == "modelnet40/orthorot/svm_accuracy"


def test_two_processes_share_the_batch(tmp_path) -> None:
    folder = Path(data.__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = ["train.py", "--preset", "smoke", "--arms", "foldingnet", "--device", "cpu", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641"]
    two = subprocess.run(
        [*launch, *argv, str(tmp_path / "two")], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )
    assert two.returncode == 0, two.stderr[-2000:]
    one = subprocess.run(
        [sys.executable, *argv, str(tmp_path / "one")], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )
    assert one.returncode == 0, one.stderr[-2000:]
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert set(a) == set(b)
    for name in a:
        if "chamfer" in name:
            assert a[name]["mean"] == pytest.approx(b[name]["mean"], rel=1e-4), name
