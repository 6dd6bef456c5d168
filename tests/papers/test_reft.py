"""Tests of papers/reft. References are written from the definitions, or taken from other implementations."""

from __future__ import annotations

import io
import itertools
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.reft import data, evaluation, model
from shared.errors import UserError

TINY = replace(model.SMALL, width=32, queries=6, layers=2, ffn=32)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(a: model.Architecture = TINY, classes: int = 3, seed: int = 0) -> model.RefT:
    torch.manual_seed(seed)
    return model.RefT(a, model.SmallResNet(), model.SmallResNet.channels, classes).eval()


def supports(count: int = 6, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.rand(count, 3, 64, 64, generator=gen(1))
    masks = torch.zeros(count, 64, 64)
    for i in range(count):
        masks[i, 4 * i : 4 * i + 20, 10:40] = 1
    return images, masks, torch.arange(count) % classes


IMAGES = torch.rand(2, 3, 64, 64, generator=gen(2))


def some_targets(b: int = 2, classes: int = 3, size: int = 64) -> model.Targets:
    masks, labels = [], []
    for i in range(b):
        n = 1 + i
        m = torch.zeros(n, size, size)
        for j in range(n):
            m[j, 8 * j : 8 * j + 24, 16 * j : 16 * j + 30] = 1
        masks.append(m)
        labels.append(torch.arange(n) % classes)
    return model.Targets.pad(masks, labels)


# ---- class centres


def test_mask_pooling_by_hand() -> None:
    constant = torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 4, 4)
    mask = torch.zeros(1, 16, 16)
    mask[0, 3:9, 2:14] = 1
    torch.testing.assert_close(model.mask_pool(constant, mask)[0], torch.arange(5.0))
    features = torch.randn(2, 5, 4, 4, generator=gen())
    one = torch.zeros(2, 4, 4)
    one[0, 1, 2] = one[1, 3, 0] = 1
    expected = torch.stack([features[0, :, 1, 2], features[1, :, 3, 0]])
    torch.testing.assert_close(model.mask_pool(features, one), expected)
    torch.testing.assert_close(model.mask_pool(features, torch.ones(2, 64, 64)), features.mean((2, 3)))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(1, 8, 8), "empty"),
        (torch.full((1, 8, 8), 0.5), "0 and 1"),
        (torch.ones(2, 8, 8), "one mask each"),
    ],
)
def test_mask_pooling_refuses(masks, message) -> None:
    with pytest.raises(ValueError, match=message):
        model.mask_pool(torch.zeros(1, 2, 4, 4), masks)


def test_centres_under_permutation_and_duplication() -> None:
    x, labels = torch.randn(6, 7, generator=gen()), torch.tensor([0, 0, 2, 2, 2, 0])
    centres = model.mean_by_class(x, labels, 3)
    order = torch.randperm(6, generator=gen(1))
    torch.testing.assert_close(model.mean_by_class(x[order], labels[order], 3), centres)
    torch.testing.assert_close(model.mean_by_class(torch.cat([x, x]), labels.repeat(2), 3), centres)
    torch.testing.assert_close(model.mean_by_class(x, 2 - labels, 3), centres.flip(0))
    assert not centres[1].any()


# ---- deformable attention


def direct(value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> Tensor:
    """One bilinear read at a time."""
    b, _, heads, c = value.shape
    out = torch.zeros(b, locations.shape[1], heads, c, dtype=value.dtype)
    for i, q, h in itertools.product(range(b), range(locations.shape[1]), range(heads)):
        start = 0
        for level, (height, width) in enumerate(shapes):
            grid = value[i, start : start + height * width, h].view(height, width, c)
            start += height * width
            for p in range(locations.shape[4]):
                x, y = (locations[i, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
                for row, column in itertools.product(
                    (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
                ):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column))
                        out[i, q, h] += weights[i, q, h, level, p] * share * grid[row, column]
    return out.flatten(2)


def deformable_inputs(shapes: list, b: int = 2, q: int = 3, heads: int = 2, c: int = 4, points: int = 2) -> tuple:
    s = sum(h * w for h, w in shapes)
    value = torch.randn(b, s, heads, c, generator=gen(), dtype=torch.float64)
    locations = 1.4 * torch.rand(b, q, heads, len(shapes), points, 2, generator=gen(1), dtype=torch.float64) - 0.2
    weights = torch.rand(b, q, heads, len(shapes), points, generator=gen(2), dtype=torch.float64)
    return value, locations, weights


def test_deformable_attention_equals_reading_point_by_point() -> None:
    shapes = [(2, 3), (4, 5)]
    value, locations, weights = deformable_inputs(shapes)
    out = model.deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(out, direct(value, shapes, locations, weights))


def test_deformable_attention_equals_mmcv() -> None:
    ops = pytest.importorskip("mmcv.ops.multi_scale_deform_attn", exc_type=ImportError)
    shapes = [(2, 3), (4, 5), (7, 6)]
    value, locations, weights = deformable_inputs(shapes, q=9)
    expected = ops.multi_scale_deformable_attn_pytorch(value, torch.tensor(shapes), locations, weights)
    torch.testing.assert_close(model.deformable_attention(value, shapes, locations, weights), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_deformable_attention_equals_the_operator_on_a_gpu() -> None:
    ops = pytest.importorskip("mmcv.ops.multi_scale_deform_attn", exc_type=ImportError)
    shapes = [(4, 6), (8, 10)]
    value, locations, weights = (x.float().to("cuda") for x in deformable_inputs(shapes, c=32))
    sizes = torch.tensor(shapes, device="cuda")
    starts = torch.tensor([0, 24], device="cuda")
    expected = ops.MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    torch.testing.assert_close(
        model.deformable_attention(value, shapes, locations, weights), expected, atol=1e-4, rtol=1e-4
    )


# ---- the peer: transformers


@pytest.fixture(scope="module")
def peer() -> tuple:
    """A pixel decoder, transformer decoder and class head of transformers, and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former import modeling_mask2former as theirs

    config = transformers.Mask2FormerConfig(
        feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=48, encoder_layers=2,
        decoder_layers=5, dim_feedforward=56, num_attention_heads=8, num_queries=7, dropout=0.0, num_labels=4,
        feature_strides=[4, 8, 16, 32], common_stride=4,
    )  # fmt: skip
    torch.manual_seed(0)
    channels = [8, 12, 16, 20]
    pixel, decoder = theirs.Mask2FormerPixelDecoder(config, channels), theirs.Mask2FormerTransformerModule(64, config)
    classes = nn.Linear(64, 5)
    for module in (pixel, decoder, classes):
        for p in module.parameters():
            nn.init.normal_(p, std=0.15)
    a = model.Architecture(
        width=64,
        queries=7,
        layers=4,
        ffn=56,
        pixel_layers=2,
        pixel_ffn=48,
        feature_reference=False,
        query_reference=False,
    )
    ours = model.RefT(a, nn.Identity(), channels, 4).eval()
    state = {}

    def take(prefix: str, module: nn.Module) -> None:
        state.update({f"{prefix}.{k}": v for k, v in module.state_dict().items()})

    p = "pixel_decoder"
    for i in range(3):
        take(f"{p}.projections.{i}", pixel.input_projections[i])
    state[f"{p}.level"] = pixel.level_embed
    for i, layer in enumerate(pixel.encoder.layers):
        here, at = f"{p}.layers.{i}", layer.self_attn
        for name, part in (
            ("attention.offsets", at.sampling_offsets), ("attention.weights", at.attention_weights),
            ("attention.value", at.value_proj), ("attention.output", at.output_proj),
            ("norm1", layer.self_attn_layer_norm),
            ("norm2", layer.final_layer_norm), ("fc1", layer.fc1), ("fc2", layer.fc2),
        ):  # fmt: skip
            take(f"{here}.{name}", part)
    take(f"{p}.lateral", pixel.adapter_1)
    take(f"{p}.last", pixel.layer_1)
    take(f"{p}.mask", pixel.mask_projection)
    take("query_feature", decoder.queries_features)
    take("query_position", decoder.queries_embedder)
    take("level", decoder.level_embed)
    take("norm", decoder.decoder.layernorm)
    take("classifier", classes)
    mlp = decoder.decoder.mask_predictor.mask_embedder
    for i, part in zip((0, 2, 4), [m for m in mlp.modules() if isinstance(m, nn.Linear)]):
        take(f"mask_head.{i}", part)
    for i, layer in enumerate(decoder.decoder.layers):
        here = f"layers.{i}"
        for j, key in enumerate(("q", "k", "v")):
            state[f"{here}.cross.{key}.weight"] = layer.cross_attn.in_proj_weight.chunk(3)[j]
            state[f"{here}.cross.{key}.bias"] = layer.cross_attn.in_proj_bias.chunk(3)[j]
            take(f"{here}.self_attention.{key}", getattr(layer.self_attn, f"{key}_proj"))
        take(f"{here}.cross.out", layer.cross_attn.out_proj)
        take(f"{here}.self_attention.out", layer.self_attn.out_proj)
        norms = (layer.cross_attn_layer_norm, layer.self_attn_layer_norm, layer.final_layer_norm)
        for j, part in enumerate(norms):
            take(f"{here}.norms.{j}", part)
        take(f"{here}.fc1", layer.fc1)
        take(f"{here}.fc2", layer.fc2)
    ours.load_state_dict(state)
    return pixel.eval(), decoder.eval(), classes, ours, channels, theirs, config


def test_mask2former_equals_transformers(peer) -> None:
    pixel, decoder, classes, ours, channels, _, _ = peer
    maps = [torch.randn(2, c, 64 // s, 96 // s, generator=gen(c)) for c, s in zip(channels, (2, 4, 8, 16))]
    with torch.no_grad():
        found = pixel(maps)
        features, mask_features, _ = ours.pixel_decoder(maps)
        for mine, other in zip((*features, mask_features), (*found.multi_scale_features, found.mask_features)):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
        out = decoder(multi_scale_features=found.multi_scale_features, mask_features=found.mask_features)
        result = ours.train()(maps)
        ours.eval()
        assert len(result.masks) == len(out.masks_queries_logits) == 5
        for i in range(5):
            torch.testing.assert_close(result.masks[i], out.masks_queries_logits[i], atol=2e-3, rtol=1e-3)
            logits = classes(out.intermediate_hidden_states[i].transpose(0, 1))
            torch.testing.assert_close(result.logits[i], logits, atol=2e-3, rtol=1e-3)


def test_loss_terms_equal_transformers(peer) -> None:
    theirs = peer[5]
    x, t = 3 * torch.randn(5, 40, generator=gen()), (torch.rand(3, 40, generator=gen(1)) > 0.5).float()
    torch.testing.assert_close(model.pairwise_dice(x, t), theirs.pair_wise_dice_loss(x, t))
    torch.testing.assert_close(model.pairwise_bce(x, t), theirs.pair_wise_sigmoid_cross_entropy_loss(x, t))
    torch.testing.assert_close(model.dice_loss(x[:3], t).sum(), theirs.dice_loss(x[:3], t, 1))


def test_whole_loss_equals_transformers(peer, monkeypatch) -> None:
    """Where every point reads the same place the random draw does not matter."""
    theirs, config = peer[5], peer[6]
    targets = some_targets(2, 4, 32)
    logits = torch.randn(3, 2, 7, 5, generator=gen())
    masks = torch.randn(3, 2, 7, 8, 8, generator=gen(1))
    place = torch.tensor([0.3, 0.6])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: place.expand(*size).clone())
    config.train_num_points = 16
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    judge = theirs.Mask2FormerLoss(config, weights)
    auxiliary = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(masks[:-1], logits[:-1])]
    mine = [targets.masks[i][targets.valid[i]] for i in range(2)]
    names = [targets.labels[i][targets.valid[i]] for i in range(2)]
    found = judge(masks[-1], logits[-1], mine, names, auxiliary)
    ours = model.losses(model.Output(logits, masks, logits, ()), targets, 16, config.no_object_weight)
    for name, key in (("class", "cross_entropy"), ("mask", "mask"), ("dice", "dice")):
        total = sum(v for k, v in found.items() if key in k) * weights[f"loss_{key}"]
        torch.testing.assert_close(ours[name], total, atol=1e-4, rtol=1e-4)


# ---- references


def test_zero_output_projections_give_mask2former() -> None:
    a = replace(TINY, zero_init=True, class_embedding=True)
    net, plain = small(a), small(replace(a, feature_reference=False, query_reference=False))
    plain.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        reference, _ = net.reference(*supports())
        mine, other = net(IMAGES, reference), plain(IMAGES)
    torch.testing.assert_close(mine.logits, other.logits)
    torch.testing.assert_close(mine.masks, other.masks)
    broken = replace(a, zero_init=False)
    with torch.no_grad():
        torch.manual_seed(0)
        net = small(broken)
        plain.load_state_dict(net.state_dict(), strict=False)
        assert not torch.allclose(net(IMAGES, net.reference(*supports())[0]).logits, plain(IMAGES).logits, atol=1e-3)


def test_one_class_adds_the_same_everywhere() -> None:
    block = model.FeatureReference(32, 4, zero=False)
    x = torch.randn(2, 32, 3, 5, generator=gen())
    added = block(x, torch.randn(1, 32, generator=gen(1)), torch.ones(1) > 0) - x
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-5, rtol=1e-4)


def test_references_do_not_depend_on_the_order_of_classes() -> None:
    order = torch.tensor([2, 0, 1])
    z, present = torch.randn(3, 32, generator=gen()), torch.tensor([True, False, True])
    x = torch.randn(2, 32, 3, 5, generator=gen(1))
    block = model.FeatureReference(32, 4, zero=False)
    torch.testing.assert_close(block(x, z[order], present[order]), block(x, z, present))
    e = torch.randn(3, 32, generator=gen(2))
    assert not torch.allclose(block(x, z[order], present[order], e), block(x, z, present, e), atol=1e-4)
    link = model.QueryReference(32, 4, zero=False)
    q, s = torch.randn(2, 6, 32, generator=gen(3)), torch.randn(3, 2, 32, generator=gen(4))
    torch.testing.assert_close(link(q, s[order], present[order], e[order]), link(q, s, present, e))


def test_an_absent_class_has_no_influence() -> None:
    present = torch.tensor([True, False, True])
    z, s, e = (torch.randn(3, *n, 32, generator=gen(i)) for i, n in enumerate(((), (1,), ())))
    x, q = torch.randn(2, 32, 3, 5, generator=gen(3)), torch.randn(2, 6, 32, generator=gen(4))
    block, link = model.FeatureReference(32, 4, zero=False), model.QueryReference(32, 4, zero=False)
    before = block(x, z, present), link(q, s, present, e)
    z[1], s[1], e[1] = 9, 9, 9
    for a, b in zip(before, (block(x, z, present), link(q, s, present, e))):
        torch.testing.assert_close(a, b)


def test_query_reference_equals_attention_written_out() -> None:
    torch.manual_seed(1)
    link = model.QueryReference(8, 2, zero=False)
    q, s, codes = torch.randn(1, 3, 8), torch.randn(2, 2, 8), F.normalize(torch.randn(2, 8), dim=-1)
    out = link(q, s, torch.ones(2) > 0, codes)
    at, rows = link.attention, s.flatten(0, 1)
    expected = torch.zeros(3, 8)
    for n in range(3):
        mixed, by_class = torch.zeros(8), torch.zeros(2)
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            keys = torch.cat([at.k(rows), at.k(link.nothing)[None]])[:, part]
            weight = (keys @ at.q(q[0, n])[part] / 2).softmax(0)
            mixed[part] = weight[:4] @ at.v(rows)[:, part]
            by_class += weight[:4].view(2, 2).sum(1) / 2
        expected[n] = at.out(mixed) + link.strength * by_class @ codes
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mean", [True, False])
def test_a_cached_reference_equals_recomputation_and_batches_equal_single_images(mean) -> None:
    net = small(replace(TINY, mean_over_shots=mean, support_queries=2))
    with torch.no_grad():
        first, _ = net.reference(*supports())
        again, _ = net.reference(*supports())
        assert first.queries.shape == (3, 1 if mean else 4, 32)
        both = net(IMAGES, first)
        torch.testing.assert_close(both.logits, net(IMAGES, again).logits)
        for i in range(2):
            one = net(IMAGES[i : i + 1], first)
            torch.testing.assert_close(one.logits[:, 0], both.logits[:, i], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.masks[:, 0], both.masks[:, i], atol=1e-3, rtol=1e-3)
        images, masks, labels = supports()
        order = torch.randperm(6, generator=gen(5))
        shuffled, _ = net.reference(images[order], masks[order], labels[order])
        for a, b in zip(shuffled.centres, first.centres):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_matched_support_queries_are_those_of_the_mask() -> None:
    net = small()
    target = torch.zeros(1, 64, 64)
    target[0, 16:48, 16:48] = 1
    masks = torch.full((1, 1, 6, 16, 16), -9.0)
    masks[0, 0, 4, 4:12, 4:12] = 9
    queries, logits = torch.randn(1, 6, 32, generator=gen()), torch.zeros(1, 1, 6, 4)
    out = model.Output(logits, masks, queries, ())
    assert torch.equal(net.select(queries, out, target, torch.tensor([1]))[0, 0], queries[0, 4])
    logits[0, 0, 2, 1] = 9
    net.architecture = replace(TINY, selection="class")
    assert torch.equal(net.select(queries, out, target, torch.tensor([1]))[0, 0], queries[0, 2])


def test_a_net_that_refers_wants_a_fitting_reference() -> None:
    net = small()
    with pytest.raises(ValueError, match="give it"):
        net(IMAGES)
    images, masks, labels = supports()
    reference, _ = net.reference(images, masks, labels)
    net.grow(torch.randn(2, 32))
    with pytest.raises(ValueError, match="3 classes for 5"):
        net(IMAGES, reference)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        net.reference(images, masks, labels + 3)
    with pytest.raises(ValueError, match=r"masks of \(32, 32\)"):
        net.reference(images, masks[:, ::2, ::2], labels)


# ---- classifier, distillation


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_growing_leaves_old_logits(kind) -> None:
    head = model.Classifier(16, 4, kind)
    q = torch.randn(9, 16, generator=gen())
    before = head(q)
    head.grow(torch.randn(3, 16, generator=gen(1)))
    after = head(q)
    assert head.classes == 7
    torch.testing.assert_close(after[:, :4], before[:, :4])
    torch.testing.assert_close(after[:, -1], before[:, -1])


def test_cosine_classifier() -> None:
    head = model.Classifier(16, 4, "cosine", tau=20.0)
    q = torch.randn(9, 16, generator=gen())
    before = head(q)
    assert before.abs().max() <= 20
    torch.testing.assert_close(head(5 * q), before)
    with torch.no_grad():
        head.weight[1] *= 5
    torch.testing.assert_close(head(q), before)


def test_distillation_of_equals_is_zero_and_leaves_the_teacher() -> None:
    net = small(replace(TINY, feature_reference=False, query_reference=False))
    other = small(replace(TINY, feature_reference=False, query_reference=False), seed=1)
    own = net(IMAGES)
    assert float(model.distillation(own, own).detach()) == pytest.approx(0, abs=1e-6)
    theirs = other(IMAGES)
    theirs.logits.retain_grad()
    loss = model.distillation(own, theirs, threshold=0.0)
    loss.backward()
    assert loss.detach() > 0
    assert net.pixel_decoder.projections[0][0].weight.grad.any()
    assert all(p.grad is None for p in other.parameters())
    grown = own._replace(logits=F.pad(own.logits.detach(), (0, 2)))  # more classes after the base ones: not compared
    same = own._replace(logits=own.logits.detach())
    first = float(model.distillation(grown, theirs).detach())
    assert first == pytest.approx(
        float(model.distillation(same._replace(logits=F.pad(same.logits, (0, 2))), theirs).detach())
    )


# ---- matching and loss


def test_matching_equals_brute_force() -> None:
    targets = some_targets(2, 4)
    targets = targets._replace(masks=(torch.rand(2, 2, 30, generator=gen()) > 0.5).float())
    logits, masks = torch.randn(2, 2, 5, 5, generator=gen(1)), torch.randn(2, 2, 5, 30, generator=gen(2))
    found = model.match(logits, masks, targets)
    chance = logits.softmax(-1)
    for layer, image in itertools.product(range(2), range(2)):
        n = int(targets.valid[image].sum())

        def cost(q: int, j: int, layer: int = layer, image: int = image) -> float:
            x, t = masks[layer, image, q], targets.masks[image, j]
            bce = F.binary_cross_entropy_with_logits(x, t)
            dice = model.dice_loss(x[None], t[None])[0]
            return float(5 * bce + 5 * dice - 2 * chance[layer, image, q, targets.labels[image, j]])

        best = min(itertools.permutations(range(5), n), key=lambda order: sum(cost(q, j) for j, q in enumerate(order)))
        assert found[layer, image, :n].tolist() == list(best)
        assert (found[layer, image, n:] == -1).all()
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = model.match(logits[:, :, order], masks[:, :, order], targets)
    assert torch.equal(torch.where(moved >= 0, order[moved.clamp_min(0)], moved), found)


def test_more_objects_than_queries() -> None:
    targets = some_targets(3)
    out = model.Output(torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 16, 16), torch.zeros(1), ())
    assert (
        model.match(out.logits, out.masks.flatten(3), targets._replace(masks=targets.masks[..., ::4, ::4].flatten(2)))[
            :, 2
        ]
        >= 0
    ).sum() == 4
    assert all(x.isfinite() for x in model.losses(out, targets, 0).values())


def test_dice_by_hand() -> None:
    x, t = torch.tensor([[40.0, -40, -40, -40]]), torch.tensor([[1.0, 1, 0, 0]])
    assert float(model.dice_loss(x, t)) == pytest.approx(0.25)
    assert float(model.dice_loss(80 * t - 40, t)) == pytest.approx(0)


def test_perfect_predictions_cost_nothing() -> None:
    targets = some_targets(2, 3)
    logits = torch.full((1, 2, 5, 4), -30.0)
    masks = torch.full((1, 2, 5, 16, 16), -30.0)
    for i in range(2):
        for j in range(int(targets.valid[i].sum())):
            logits[0, i, 3 - j, targets.labels[i, j]] = 30
            masks[0, i, 3 - j] = 60 * targets.masks[i, j, ::4, ::4] - 30
    logits[..., 3] = torch.where(logits[..., :3].amax(-1) > 0, -30.0, 30.0)
    aligned = targets._replace(masks=targets.masks[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2))
    found = model.losses(model.Output(logits, masks, logits, ()), aligned, 0)
    assert all(float(x) < 1e-3 for x in found.values())


def test_an_empty_batch_of_objects_gives_a_finite_loss() -> None:
    targets = model.Targets.pad([torch.zeros(0, 64, 64)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    out = model.Output(torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 16, 16), torch.zeros(1), ())
    for points in (0, 12):
        found = model.losses(out, targets, points)
        assert found["class"] > 0 and found["mask"] == found["dice"] == 0


def test_an_empty_mask_lets_a_query_look_everywhere() -> None:
    masks = torch.full((1, 2, 8, 8), -1.0)
    masks[0, 0, :4, :4] = 1
    allowed = model.attention_mask(masks, (2, 2))[0, 0]
    assert allowed[0].tolist() == [True, False, False, False] and allowed[1].all()


def test_detections_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0, 0], [0, 0, 5]]]).log_softmax(-1)[None]
    masks = torch.full((1, 1, 2, 4, 4), -20.0)
    masks[0, 0, 0, :2, :2] = 20
    out = model.detect(model.Output(logits, masks, logits, ()), (4, 4), 1)
    assert out.labels.tolist() == [[0]] and int(out.masks.sum()) == 4
    assert float(out.scores) == pytest.approx(math.exp(2) / (math.exp(2) + 2), rel=1e-5)


# ---- sizes and steps of the presets


# of torchvision's classifiers, as its documentation lists them
COUNTS = {"r50": 25_557_032, "r101": 44_549_160, "swin-t": 28_288_354, "swin-s": 49_606_258, "swin-b": 87_768_224}


def test_every_preset_builds_at_full_size(train) -> None:
    for preset in train.PRESETS.values():
        config = preset.config
        if config.task == "centres":
            continue
        for arm in dict.fromkeys(arm.removesuffix("-no-distillation") for arm in config.arms):
            with torch.device("meta"):
                a = train.architecture_of(config, arm)
                body = model.SmallResNet() if config.source == "shapes" else nn.Identity()
                net = model.RefT(a, body, train.backbones.CHANNELS[config.backbone], 60)
            if config.source == "coco":
                assert (a.width, a.queries, a.layers, a.ffn, a.pixel_layers, a.pixel_ffn) == (
                    256,
                    100,
                    9,
                    2048,
                    6,
                    1024,
                )
                assert model.parameters(net.layers) == 9 * 1_578_752  # two attentions, FFN, three norms
                assert model.parameters(net.pixel_decoder.layers) == 6 * 732_192
                references = model.parameters(net.feature_reference)
                assert references == (3 * (263_168 + 512) if a.feature_reference else 0)


@pytest.mark.parametrize("name", COUNTS)
def test_backbones_are_those_of_torchvision(train, name) -> None:
    """Without the classifier, with a norm for each map of a Swin transformer in the place of its last one."""
    import torchvision

    with torch.device("meta"):
        ours = train.backbones.build(name).body
        theirs = getattr(
            torchvision.models, {"r50": "resnet50", "r101": "resnet101"}.get(name, name.replace("-", "_"))
        )()
    assert model.parameters(theirs) == COUNTS[name]
    gone = ("fc.",) if name.startswith("r") else ("head.", "norm.")
    left = {
        n: v.shape
        for n, v in theirs.state_dict().items()
        if not n.startswith(gone) and not n.endswith("num_batches_tracked")
    }
    assert {n: v.shape for n, v in ours.net.state_dict().items()} == left
    channels = train.backbones.CHANNELS[name]
    last = channels[-1]
    whole = COUNTS[name] - (1000 * last + 1000) - (0 if name.startswith("r") else 2 * last)
    learned = model.parameters(ours.net)
    if name.startswith("r"):  # batch norms are frozen: their weights and biases are buffers
        learned += sum(v.numel() for n, v in ours.net.named_buffers() if n.endswith((".weight", ".bias")))
    else:
        assert model.parameters(ours.norms) == 2 * sum(channels)
    assert learned == whole


@pytest.mark.parametrize("name", ["r50", "swin-t", "efficientnet-lite0"])
def test_one_training_step_at_full_width_and_depth(train, name) -> None:
    torch.manual_seed(0)
    body = train.backbones.build(name, pretrained=False)
    net = model.RefT(model.Architecture(zero_init=False), body, train.backbones.CHANNELS[name], 3).train()
    images, masks, labels = (x[:2] for x in supports())
    maps = body(images)
    assert [tuple(x.shape) for x in maps] == [
        (2, c, 64 // s, 64 // s) for c, s in zip(train.backbones.CHANNELS[name], (4, 8, 16, 32))
    ]
    reference, _ = net.reference(images, masks, labels)
    loss = torch.stack(list(model.losses(net(IMAGES[:1], reference), some_targets(1), 64).values())).sum()
    loss.backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # queries are equal until the first cross-attention
    allowed = (
        "backbone",
        "fc",
        "attention.k.bias",
        "cross.k.bias",
        "self_attention.k.bias",
        "class_embedding",
        "mask_head",
        "pixel_decoder.level",  # offsets begin as constants
    )
    assert loss.isfinite() and not [n for n in silent if not any(part in n for part in allowed)], silent


# ---- evaluation


def random_case(seed: int = 0) -> tuple[list, list]:
    truth, found = [], []
    for i in range(12):
        n = int(torch.randint(0, 5, (1,), generator=gen(seed + i)))
        masks = torch.rand(n, 6, 6, generator=gen(seed + i + 50)).repeat_interleave(8, 1).repeat_interleave(8, 2) > 0.6
        masks[:, :8, :8] = True
        labels = torch.randint(0, 4, (n,), generator=gen(seed + i + 99))
        truth.append((masks, labels))
        wrong = torch.rand(n, 48, 48, generator=gen(seed + i + 7)) < 0.15
        extra = torch.rand(2, 48, 48, generator=gen(seed + i + 8)) < 0.5
        guess = torch.cat([masks ^ wrong, extra])
        labels = torch.cat([labels, torch.randint(0, 4, (2,), generator=gen(i))])
        found.append(evaluation.Found(torch.rand(n + 2, generator=gen(seed + i + 9)), labels, guess))
    return truth, found


def test_average_precision_equals_pycocotools(capsys) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    truth, found = random_case()
    groups = {"nAP": [1, 3], "bAP": [0, 2]}
    mine = evaluation.average_precision(truth, found, 4, groups)
    table, guesses = evaluation.tables(truth, found, 4)
    ground = coco.COCO()
    ground.dataset = table
    ground.createIndex()
    detected = ground.loadRes(guesses)
    for kind, (name, labels) in itertools.product(("segm", "bbox"), groups.items()):
        judge = COCOeval(ground, detected, kind)
        judge.params.catIds = [i + 1 for i in labels]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert 0.05 < mine[f"{kind}_{name}"] < 1
        assert mine[f"{kind}_{name}"] == pytest.approx(judge.stats[0], abs=1e-9)


def test_truth_as_detections_has_full_precision() -> None:
    truth, found = random_case()
    perfect = [evaluation.Found(torch.ones(len(y)), y, m) for m, y in truth]
    groups = {"nAP": [1, 3], "bAP": [0, 2]}
    assert set(evaluation.average_precision(truth, perfect, 4, groups).values()) == {1.0}
    without_base = [evaluation.Found(*(x[(f.labels == 1) | (f.labels == 3)] for x in f)) for f in found]
    a = evaluation.average_precision(truth, found, 4, groups)["segm_nAP"]
    b = evaluation.average_precision(truth, without_base, 4, groups)
    assert b["segm_nAP"] == a and b["segm_bAP"] == 0
    nothing = [evaluation.Found(*(x[:0] for x in f)) for f in found]
    assert set(evaluation.average_precision(truth, nothing, 4, groups).values()) == {0.0}


def test_boxes_of_masks() -> None:
    masks = torch.zeros(2, 6, 8) > 1
    masks[0, 1:4, 2:7] = True
    assert evaluation.boxes_of(masks).tolist() == [[2, 1, 5, 3], [0, 0, 0, 0]]


# ---- COCO in its layouts


CATEGORIES = [
    {"id": 1, "name": "person"},
    {"id": 3, "name": "car"},
    {"id": 13, "name": "stop sign"},
    {"id": 90, "name": "toothbrush"},
]
UNUSED = [{"id": 200 + i, "name": name} for i, name in enumerate(data.NOVEL) if name not in ("person", "car")]


def write_coco(root: Path, per_class: int = 3, categories: list = CATEGORIES) -> None:
    """Both splits in the layout of the TFA protocol, with shot lists of two seeds; categories that have objects."""
    from PIL import Image

    (root / "datasets/cocosplit/datasplit").mkdir(parents=True)
    (root / "datasets/cocosplit/seed1").mkdir()
    (root / "datasets/coco/trainval2014").mkdir(parents=True)
    for split, first in (("trainvalno5k", 1), ("5k", 100)):
        images, rows = [], []
        for i in range(per_class):
            name = f"COCO_{first + i:012d}.jpg"
            pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "datasets/coco/trainval2014" / name)
            images.append({"id": first + i, "file_name": name, "height": 40, "width": 60})
            for j, category in enumerate(categories):
                x, y, tall = 5 + 12 * j, 4 + 2 * i, 12
                if len(categories) > len(CATEGORIES):
                    x, y, tall = 12 * (j % 5), 7 * (j // 5) + i, 6
                polygon = [x, y, x + 10, y, x + 10, y + tall, x, y + tall]
                row = {"id": 100 * (first + i) + j, "image_id": first + i, "category_id": category["id"], "area": 120.0}
                rows.append(row | {"segmentation": [polygon], "bbox": [x, y, 10, tall], "iscrowd": 0})
        runs = {"size": [40, 60], "counts": [0, 100, 2300]}
        crowd = {"id": 99999 + first, "image_id": first, "category_id": 1, "area": 100.0}
        rows.append(crowd | {"segmentation": runs, "bbox": [0, 0, 3, 40], "iscrowd": 1})
        content = {"images": images, "annotations": rows, "categories": CATEGORIES + UNUSED}
        (root / f"datasets/cocosplit/datasplit/{split}.json").write_text(json.dumps(content))
        if split == "5k":
            continue
        for seed, k, category in itertools.product((0, 1), (1, 2), categories):
            mine = [row for row in rows if row["category_id"] == category["id"] and not row["iscrowd"]]
            chosen = mine[seed : seed + k]
            path = data.shot_file(root, category["name"], k, seed)
            path.write_text(json.dumps({"images": images, "annotations": chosen, "categories": CATEGORIES}))


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    write_coco(root)
    return root


def test_coco_loader(coco) -> None:
    found = data.read_coco(data.coco_file(coco, "train"), coco)
    assert found.classes[:4] == ("person", "car", "stop sign", "toothbrush") and len(found) == 3
    assert len(found.instances) == 12  # the crowd is not among them
    scene = found.scene(1)
    assert (
        scene.image.shape == (3, 40, 60) and scene.masks.shape == (4, 40, 60) and scene.labels.tolist() == [0, 1, 2, 3]
    )
    assert scene.masks[1, 7:17, 18:26].all() and not scene.masks[1, :, 30:].any()
    base, novel = data.split_classes(found.classes, data.NOVEL)
    assert base == [2, 3] and novel[:2] == [0, 1]
    novel = novel[:2]
    only = found.only(base)
    assert len(only) == 3 and {row.label for row in only.instances} == {2, 3}
    for seed, k in itertools.product((0, 1), (1, 2)):
        rows = data.read_shots(coco, found, novel, k, seed)
        assert sorted(row.label for row in rows) == sorted(novel * k)
    assert data.read_shots(coco, found, novel, 1, 0) != data.read_shots(coco, found, novel, 1, 1)


def test_the_layout_of_2017_and_run_lengths(coco, tmp_path) -> None:
    root = tmp_path / "2017"
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").symlink_to(coco / "datasets/coco/trainval2014")
    content = json.loads((coco / "datasets/cocosplit/datasplit/trainvalno5k.json").read_text())
    runs = {"size": [40, 60], "counts": [40 * 20, 80, 2400 - 880]}  # two columns
    content["annotations"] = [content["annotations"][0] | {"segmentation": runs}]
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    found = data.read_coco(data.coco_file(root, "train"), root)
    mask = found.scene(0).masks[0]
    assert mask[:, 20:22].all() and int(mask.sum()) == 80


def test_novel_classes_of_coco(data_root) -> None:
    assert len(set(data.NOVEL)) == len(set(data.NOVEL_IDS)) == 20
    path = data.panoptic_file(data_root)
    found = data.read_panoptic(path, "train2017")
    assert len(found.classes) == 80
    base, novel = data.split_classes(found.classes, data.NOVEL)
    assert len(base) == 60 and len(novel) == 20
    with tarfile.open(path) as archive:
        content = json.loads(archive.extractfile("annotations/panoptic_train2017.json").read())
    names = {row["name"]: row["id"] for row in content["categories"]}
    assert {names[name] for name in data.NOVEL} == set(data.NOVEL_IDS)


def test_panoptic_archive(data_root) -> None:
    path = data.panoptic_file(data_root)
    for split, counts in (("train2017", (354, 386)), ("val2017", (407, 300))):
        found = data.read_panoptic(path, split)
        base, novel = data.split_classes(found.classes, data.NOVEL)
        assert len(found) == 100
        assert tuple(sum(row.label in group for row in found.instances) for group in (novel, base)) == counts
    scene = found.scene(0)
    assert scene.masks.shape[1:] == scene.image.shape[1:]
    assert [int(m.sum()) for m in scene.masks] == [int(row.area) for row in found.by_image[0]]
    assert not any(row.label in novel for row in found.only(base).instances)


def test_check_data(coco, run_paper, data_root) -> None:
    result = run_paper("reft", ["--preset", "gfsis-r50", "--check-data", "--data", coco])
    assert result.code == 0 and "3 images" in result.out and "16 shot lists" in result.out, result.err
    result = run_paper("reft", ["--preset", "coco-panoptic-mini", "--check-data", "--data", data_root])
    assert result.code == 0 and "407 of them novel" in result.out
    assert "generated" in run_paper("reft", ["--check-data"]).out


# ---- the few-shot protocols


def test_shots_and_supports(train) -> None:
    made = data.generate(60, gen())
    base, novel = data.split_classes(made.classes, data.NOVEL_SHAPES)
    for k in (1, 2):
        rows = data.sample_shots(made, novel, k, gen(1))
        assert sorted(row.label for row in rows) == sorted(novel * k)
        taken = made.take(rows)
        assert len(taken.instances) == 4 * k and {r.label for r in taken.instances} == set(novel)
        for row in taken.instances:
            assert taken.mask(row).shape == (64, 64) and int(taken.mask(row).sum()) == row.area
    drawer = train.Supports(SimpleNamespace(config=SimpleNamespace(source="shapes")), made, 4)
    for seed in range(10):
        index = torch.randperm(60, generator=gen(seed))[:4]
        chosen = drawer.draw(index, gen(seed))
        here = {row.label for i in index.tolist() for row in made.by_image[i]}
        assert here <= {row.label for row in chosen} and len({row.label for row in chosen}) == len(chosen)
        assert not {row.image for row in chosen} & set(index.tolist())


def test_generated_scenes() -> None:
    made = data.generate(40, gen(), chances=dict.fromkeys(range(6), 0.0))
    again = data.generate(40, gen(), chances=dict.fromkeys(range(6), 0.0))
    assert torch.equal(made.read(7), again.read(7)) and made.instances == again.instances
    assert {row.label for row in made.instances} <= set(range(6, 12))
    for i in range(40):
        scene = made.scene(i)
        assert (
            1 <= len(scene.labels) <= 4
            and scene.masks.sum(0).max() == 1
            and 0 <= scene.image.min() <= scene.image.max() <= 1
        )
    alone = data.generate(3, gen(), labels=[4, 0, 11])
    assert [row.label for row in alone.instances] == [4, 0, 11]
    base, novel = data.split_classes(data.SHAPE_CLASSES, data.NOVEL_SHAPES)
    words = [set(data.SHAPE_CLASSES[i].split()) for i in base]
    assert all(any({word} <= some for some in words) for word in (*data.SHAPES, *data.TEXTURES)) and len(novel) == 4


def test_geometry() -> None:
    image = torch.zeros(3, 20, 40)
    masks = torch.zeros(1, 20, 40) > 1
    image[:, 5:15, 10:30], masks[:, 5:15, 10:30] = 1, True
    out = data.fit(data.Scene(image, masks, torch.zeros(1).long()), 64)
    assert out.image.shape == (3, 64, 64) and int(out.masks.sum()) == 16 * 32 and out.masks[0, 8:24, 16:48].all()
    for seed in range(6):
        out = data.jitter(data.Scene(image, masks, torch.zeros(1).long()), 64, 0.5, 2.0, gen(seed))
        assert out.image.shape == (3, 64, 64) and out.masks.shape[1:] == (64, 64) and len(out.masks) == len(out.labels)
        if len(out.masks):
            assert (out.image[:, out.masks[0]] > 0.5).float().mean() > 0.9  # image and mask move together


def test_merging_references(train) -> None:
    old = model.Reference((torch.ones(2, 4),), torch.ones(2, 1, 4), torch.tensor([True, True]))
    new = model.Reference((2 * torch.ones(3, 4),), 2 * torch.ones(3, 1, 4), torch.tensor([False, True, True]))
    out = train.merge(new, old)
    assert out.present.all() and out.centres[0][:, 0].tolist() == out.queries[:, 0, 0].tolist() == [1, 2, 2]


# ---- the command


def test_shipped_nets_lose_their_classes_with_swapped_supports(train, tmp_path) -> None:
    """The query-level reference decides what an object is called: another class's supports, another name."""
    config = replace(train.PRESETS["default"].config, train_scenes=60, test_scenes=40)
    run = SimpleNamespace(
        device=torch.device("cpu"), paper_folder=Path(train.__file__).parent, data_used=lambda *_, **__: None,
        generator=lambda *key: gen(len(repr(key))),
    )  # fmt: skip
    known = train.Data(config, run)
    kinds = sorted({row.label for row in known.base_set.instances})
    rows = train.sets.sample_shots(known.base_set, kinds, 1, gen(1))
    for arm in ("query", "reft"):
        net = train.make(config, arm, len(known.base))
        train.load(net, train.base_state(config, run, arm, len(known.base)), arm)
        net.eval()
        right = train.cache(net, known, known.base_set, rows)
        swapped = right._replace(queries=right.queries.roll(1, 0))
        ap = [
            train.judge(config, run, known, net, reference, {"bAP": range(len(known.base))})["segm_bAP"]
            for reference in (right, swapped)
        ]
        assert ap[0] > 0.1 and ap[1] < 0.5 * ap[0], (arm, ap)


def test_permuted_names_are_for_the_last_layer_and_come_from_the_supports() -> None:
    """With permuted names only the last layer's classes change, and only by the codes of the query reference."""
    net = small(replace(TINY, feature_reference=False, query_reference=True, zero_init=False))
    torch.manual_seed(0)
    images, masks = torch.rand(3, 3, 64, 64), torch.zeros(3, 64, 64)
    masks[:, 8:40, 8:40] = 1
    order = torch.tensor([1, 2, 0])
    reference, _ = net.reference(images, masks, torch.arange(3))
    net.train()
    plain, named = net(images, reference), net(images, reference, order)
    torch.testing.assert_close(plain.logits[:-1], named.logits[:-1])
    assert not torch.allclose(plain.logits[-1], named.logits[-1], atol=1e-3)
    torch.testing.assert_close(net(images, reference, torch.arange(3)).logits, plain.logits)
    targets = model.Targets(torch.rand(3, 2, 64, 64).round(), torch.tensor([[0, 1]] * 3), torch.ones(3, 2) > 0)
    same = model.losses(plain, targets, 0, order=torch.arange(3))
    torch.testing.assert_close(same, model.losses(plain, targets, 0))
    renamed = model.Targets(targets.masks, order[targets.labels], targets.valid)
    ours = model.losses(plain, targets, 0, order=order, last_only=True)
    torch.testing.assert_close(ours, model.losses(plain, renamed, 0, last_only=True))


@pytest.fixture
def tiny_base(train, tmp_path) -> Path:
    """Untrained base nets in a folder."""
    from safetensors.torch import save_file

    folder = tmp_path / "weights"
    folder.mkdir()
    for arm in train.REFERENCES:
        torch.manual_seed(0)
        net = train.make(train.PRESETS["default"].config, arm, 8)
        save_file({n: v.contiguous() for n, v in net.state_dict().items()}, folder / f"{arm}.safetensors")
    return folder


def test_protocols_run_and_resume_exactly(run_paper, tiny_base, tmp_path) -> None:
    """iFSIS with distillation, FSIS: stopped after every few steps, the numbers are the same."""
    words = [
        "--base-weights",
        tiny_base,
        "--tune-steps",
        "2",
        "--shots",
        "1",
        "--test-scenes",
        "6",
        "--train-scenes",
        "60",
    ]
    words += ["--tune-batch", "2", "--arms", "reft", "query", "reft-no-distillation", "--protocols", "ifsis", "fsis"]
    words += ["--seed", "0", "--device", "cpu"]
    whole = run_paper("reft", [*words, "--out", tmp_path / "whole"])
    assert whole.code == 0, whole.err
    part = tmp_path / "part"
    assert run_paper("reft", [*words, "--out", part, "--stop-after", "3"]).code == 0
    assert not (part / "result.json").exists()
    assert run_paper("reft", ["--resume", part]).code == 0
    a, b = (json.loads((p / "result.json").read_text())["metrics"] for p in (tmp_path / "whole", part))
    assert a == b and {name.split("/")[1] for name in a} == {"ifsis", "fsis"}
    assert not any("fsis/small/reft/1-shot/segm_bAP" in name and "/fsis/" in name for name in a)
    logs = [json.loads(line) for line in (part / "metrics.jsonl").read_text().splitlines()]
    distilled = {row["unit"] for row in logs if "distillation" in row}
    assert {name for name in distilled if "no-distillation" in name} == set() and any(
        "ifsis" in name for name in distilled
    )


def test_smoke_trains_and_resumes(run_paper, tmp_path) -> None:
    words = ["--preset", "smoke", "--device", "cpu"]
    whole = run_paper("reft", [*words, "--out", tmp_path / "whole"])
    assert whole.code == 0, whole.err
    part = tmp_path / "part"
    for stop in (["--stop-after", "4"], ["--stop-after", "3"], []):
        done = run_paper("reft", [*words, "--out", part, *stop] if not part.exists() else ["--resume", part, *stop])
        assert done.code == 0, done.err
    a, b = (json.loads((p / "result.json").read_text())["metrics"] for p in (tmp_path / "whole", part))
    assert a == b and (part / "figure.png").stat().st_size < 300_000


def test_coco_trains_on_files_in_its_layout(run_paper, coco, tmp_path) -> None:
    """Base training and fine-tuning on shot lists, with a small net."""
    words = [
        "--preset",
        "gfsis-r50",
        "--data",
        coco,
        "--backbone",
        "efficientnet-lite0",
        "--width",
        "32",
        "--layers",
        "1",
    ]
    words += [
        "--queries",
        "8",
        "--size",
        "64",
        "--points",
        "32",
        "--base-steps",
        "1",
        "--tune-steps",
        "1",
        "--shots",
        "1",
    ]
    words += ["--batch", "2", "--tune-batch", "2", "--arms", "reft", "--seed", "1", "--device", "cpu"]
    words += ["--out", tmp_path / "run", "--jitter", "0.9", "1.1", "--tune-jitter", "0.9", "1.1"]
    result = run_paper("reft", words)
    assert result.code == 2 and "no shot list" in result.err  # of a class without a file
    result = run_paper("reft", [*words[:-8], "--out", tmp_path / "other", "--shot-lists", "sampled", "--seed", "1"])
    assert result.code == 2 and "0 usable instances, 1 shots requested" in result.err


def test_coco_from_files_to_average_precision(run_paper, tmp_path) -> None:
    """Base training, fine-tuning on the shot lists of a seed, evaluation of both groups of classes."""
    root = tmp_path / "coco"
    write_coco(root, categories=CATEGORIES + UNUSED)
    words = ["--preset", "gfsis-r50", "--data", root, "--backbone", "efficientnet-lite0", "--width", "32"]
    words += ["--layers", "1", "--queries", "24", "--size", "64", "--points", "32", "--base-steps", "2"]
    words += ["--tune-steps", "2", "--shots", "1", "--batch", "2", "--tune-batch", "2", "--arms", "reft"]
    words += ["--protocols", "gfsis", "fsis", "--seed", "1", "--device", "cpu", "--support-classes", "2"]
    words += ["--jitter", "0.9", "1.1", "--tune-jitter", "0.9", "1.1"]
    result = run_paper("reft", [*words, "--out", tmp_path / "run"])
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert {row["kind"] for row in found["data"]} == {"real"}
    names = {f"coco/{p}/efficientnet-lite0/reft/1-shot/{kind}_{group}" for p in ("gfsis", "fsis")
             for kind in ("segm", "bbox") for group in ("nAP", "bAP") if (p, group) != ("fsis", "bAP")}  # fmt: skip
    assert set(found["metrics"]) == names
    assert all(0 <= row["mean"] <= 1 for row in found["metrics"].values())
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["unit"].split("/")[0] for row in logs} == {"base", "1"} and all(row["loss"] > 0 for row in logs)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].pop("segmentation"), "has no 'segmentation'"),
        (lambda c: c["annotations"][0].update(category_id=77), "category_id 77"),
        (lambda c: c["annotations"][0].update(image_id=5), "image_id 5"),
        (lambda c: c.pop("images"), "expected a list"),
    ],
)
def test_malformed_annotations(coco, change, message) -> None:
    path = coco / "datasets/cocosplit/datasplit/trainvalno5k.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        data.read_coco(path, coco)


def test_malformed_masks_images_and_shots(coco) -> None:
    path = coco / "datasets/cocosplit/datasplit/trainvalno5k.json"
    content = json.loads(path.read_text())
    content["images"][0]["height"] = 41
    content["annotations"][4]["segmentation"] = "nonsense"
    path.write_text(json.dumps(content))
    found = data.read_coco(path, coco)
    with pytest.raises(UserError, match="says 41 x 60"):
        found.scene(0)
    with pytest.raises(UserError, match="neither polygons"):
        found.scene(1)
    (coco / "datasets/coco/trainval2014/COCO_000000000003.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        found.read(2)
    (coco / "datasets/coco/trainval2014/COCO_000000000003.jpg").unlink()
    with pytest.raises(UserError, match="no image COCO_000000000003"):
        found.read(2)
    with pytest.raises(UserError, match=r"full_box_<K>shot_<class>"):
        data.read_shots(coco, found, [0], 1, 7)
    shots = data.shot_file(coco, "car", 2, 0)
    shots.write_text(data.shot_file(coco, "car", 1, 0).read_text())
    with pytest.raises(UserError, match="has 1 annotations, expected 2"):
        data.read_shots(coco, found, [1], 2, 0)
    other = data.shot_file(coco, "car", 1, 0)
    other.write_text(data.shot_file(coco, found.classes[0], 1, 0).read_text())
    with pytest.raises(UserError, match=f"shows a {found.classes[0]}, expected a car"):
        data.read_shots(coco, found, [found.classes.index("car")], 1, 0)
    odd = replace_mask(found)
    with pytest.raises(UserError, match="expected equal sizes"):
        odd.scene(1)


def replace_mask(found: data.Dataset) -> data.Dataset:
    return data.Dataset(found.classes, found.images, found.instances, found.read, lambda row: torch.ones(3, 3) > 0)


def test_bad_class_lists_and_shots() -> None:
    made = data.generate(6, gen(), chances=dict.fromkeys(range(1, 12), 0.0), most=1)
    with pytest.raises(ValueError, match="class 'stripes disk' has 6 usable instances, 9 shots requested"):
        data.sample_shots(made, [0], 9, gen())
    with pytest.raises(ValueError, match="at least 1"):
        data.sample_shots(made, [0], 0, gen())
    with pytest.raises(ValueError, match="near: dots disk"):
        data.split_classes(made.classes, ("dot disk",))
    with pytest.raises(ValueError, match="named twice"):
        data.split_classes(made.classes, ("dots disk", "dots disk"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shots", "0"], "--shots is 0"),
        (["--arms", "reft", "mean"], "--arms"),
        (["--backbone", "vgg"], "--backbone is 'vgg'"),
        (["--size", "50"], "multiple of 32"),
        (["--source", "coco"], "do not go together"),
        (["--preset", "gfsis-r50"], "--data"),
        (["--preset", "coco-panoptic-mini", "--data", "."], "no coco-panoptic-mini.tar"),
        (["--base-weights", "nowhere", "--train-scenes", "60", "--test-scenes", "2"], "no file"),
        (["--preset", "coco-panoptic-mini-centres", "--arms", "reft"], "--arms"),
        (["--jitter", "2", "1"], "--jitter"),
    ],
)
def test_bad_usage(refuses, argv, message) -> None:
    refuses(argv, message)


def test_weights_of_other_sizes_are_refused(run_paper, tiny_base, tmp_path) -> None:
    words = ["--base-weights", tiny_base, "--width", "32", "--train-scenes", "60", "--test-scenes", "2", "--seed", "0"]
    result = run_paper("reft", [*words, "--out", tmp_path / "run"])
    assert result.code == 2 and "of another shape" in result.errors[0]


def test_weights_of_other_classes_are_refused(run_paper, train, tmp_path) -> None:
    """Fine-tuning itself adds the novel classes; weights that know any others than the base classes are refused."""
    from safetensors.torch import save_file

    net = train.make(train.PRESETS["default"].config, "full", 12)
    save_file({n: v.contiguous() for n, v in net.state_dict().items()}, tmp_path / "full.safetensors")
    words = ["--base-weights", tmp_path, "--arms", "full", "--train-scenes", "60", "--test-scenes", "2", "--seed", "0"]
    result = run_paper("reft", [*words, "--out", tmp_path / "run"])
    assert result.code == 2 and "has 13 rows in its classifier, expected 8 base classes" in result.errors[0]


def test_a_damaged_archive(tmp_path) -> None:
    path = tmp_path / data.ARCHIVE
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="not a readable tar"):
        data.read_panoptic(path, "val2017")
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("val2017/a.jpg"), io.BytesIO())
    with pytest.raises(UserError, match="has no member annotations"):
        data.read_panoptic(path, "val2017")


# ---- claims fail for a broken method


class Recorder:
    """What ``decide`` asks of a run."""

    def __init__(self, metrics: dict[str, float]) -> None:
        from shared.paper import read_paper

        self.metrics = {name: SimpleNamespace(mean=value) for name, value in metrics.items()}
        self.paper = read_paper(Path(__file__).resolve().parents[2] / "papers" / "reft")
        self.verdicts: dict[str, bool] = {}

    def threshold(self, name: str) -> float:
        return self.paper.claim(name).thresholds["margin"]

    def claim(self, name: str, holds: bool, **_: float) -> None:
        self.verdicts[name] = bool(holds)


def test_claims_can_hold_and_fail(train) -> None:
    config = train.PRESETS["default"].config
    good = {
        "gfsis/small/reft/5-shot/segm_nAP": 0.3, "gfsis/small/full/5-shot/segm_nAP": 0.2,
        "gfsis/small/feature/5-shot/segm_nAP": 0.25, "gfsis/small/query/5-shot/segm_nAP": 0.25,
        "gfsis/small/reft/5-shot/segm_bAP": 0.5, "gfsis/small/full/5-shot/segm_bAP": 0.5,
        "ifsis/small/reft/5-shot/segm_bAP": 0.5, "ifsis/small/reft-no-distillation/5-shot/segm_bAP": 0.4,
    }  # fmt: skip
    run = Recorder({f"shapes/{k}": v for k, v in good.items()})
    train.decide(config, run)
    assert set(run.verdicts) == {claim.name for claim in run.paper.claims} and all(run.verdicts.values())
    worse = {
        "reft_beats_full_finetuning": ("gfsis/small/full/5-shot/segm_nAP", 0.29),
        "base_classes_are_kept": ("gfsis/small/reft/5-shot/segm_bAP", 0.47),
        "both_references_contribute": ("gfsis/small/query/5-shot/segm_nAP", 0.3),
        "distillation_keeps_base_classes": ("ifsis/small/reft-no-distillation/5-shot/segm_bAP", 0.49),
    }
    for name, (metric, value) in worse.items():
        run = Recorder({f"shapes/{k}": v for k, v in (good | {metric: value}).items()})
        train.decide(config, run)
        assert not run.verdicts[name]


def test_support_queries_of_other_classes_break_the_claim(train, monkeypatch, tmp_path) -> None:
    """The shipped base nets, briefly fine-tuned: with every class's support queries under the name of the next class
    RefT finds far less of the novel classes than full fine-tuning with the right ones."""
    cache = train.cache

    def misled(net: nn.Module, *rest) -> model.Reference:
        reference = cache(net, *rest)
        return reference._replace(queries=reference.queries.roll(1, 0)) if net.refers else reference

    monkeypatch.setattr(train, "cache", misled)
    words = ["--arms", "full", "reft", "--protocols", "gfsis", "--tune-steps", "1", "--tune-batch", "2", "--seed", "0"]
    words += ["--test-scenes", "24", "--train-scenes", "40", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert train.main(words) == 0
    found = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    found = {name: row["mean"] for name, row in found.items()}
    full, broken = (found[f"shapes/gfsis/small/{arm}/5-shot/segm_nAP"] for arm in ("full", "reft"))
    assert full > 0.05 and broken < 0.5 * full
    rest = {f"shapes/gfsis/small/{arm}/5-shot/segm_nAP": 0.0 for arm in ("feature", "query")}
    rest |= {f"shapes/ifsis/small/{arm}/5-shot/segm_bAP": 0.0 for arm in ("reft", "reft-no-distillation")}
    run = Recorder(rest | found)
    train.decide(train.PRESETS["default"].config, run)
    assert not run.verdicts["reft_beats_full_finetuning"]


def test_the_query_reference_learns_to_name_new_classes() -> None:
    """Episodes of random classes: queries are named by the supports alone, unless these stand under other names."""
    torch.manual_seed(0)
    link, codes = model.QueryReference(32, 4, zero=False), torch.eye(6, 32)
    optimizer = torch.optim.Adam(link.parameters(), lr=3e-3)
    names, present = torch.arange(6), torch.ones(6) > 0

    def episode(roll: int = 0) -> Tensor:
        kinds = F.normalize(torch.randn(6, 32), dim=-1) * 32**0.5
        support = (kinds + 0.3 * torch.randn(6, 32)).roll(roll, 0).unsqueeze(1)
        return 5 * link(kinds[None] + 0.3 * torch.randn(1, 6, 32), support, present, codes)[0] @ codes.T

    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(episode(), names).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (
            float(torch.stack([(episode(r).argmax(1) == names).float().mean() for _ in range(50)]).mean())
            for r in (0, 1)
        )
    assert right > 0.8 and wrong < 0.1, (right, wrong)
