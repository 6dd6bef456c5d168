"""Panoptic scene graphs: counts and oracles of both networks, the heads, metrics, loaders, bad input and the claims."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor, nn

from papers.psg import data, metrics, model, twostage
from papers.psg.model import PSGTR, PSGFormer, Targets, TinyTrunk, Triplets
from papers.psg.twostage import Layout, Objects
from shared.errors import UserError

TINY: dict[str, Any] = {
    "classes": 5,
    "predicates": 3,
    "d": 32,
    "hidden": 48,
    "encoder": 1,
    "decoder": 2,
    "queries": 6,
    "dropout": 0.0,
}
RECORD: dict[str, Any] = {
    "file_name": "train2017/000000417720.jpg",
    "height": 640,
    "width": 480,
    "image_id": "107902",
    "coco_image_id": "417720",
    "pan_seg_file_name": "panoptic_train2017/000000417720.png",
    "segments_info": [
        {"id": i, "category_id": c, "iscrowd": 0, "isthing": int(c < 80), "area": a}
        for i, c, a in (
            (3648962, 0, 42555),
            (3293004, 0, 45880),
            (4470325, 25, 22774),
            (4545879, 116, 48824),
            (7633023, 117, 44811),
            (14079701, 119, 3417),
            (3504233, 125, 97238),
        )
    ],
    "relations": [[0, 1, 2], [0, 6, 14], [1, 2, 21], [1, 6, 14], [4, 3, 1], [5, 3, 0]],
}
"""A record of the real file; only its pixels are made up below."""


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def tiny(cls: type = PSGTR, **kwargs: Any) -> Any:
    return cls(TinyTrunk(8), **{**TINY, **kwargs})


def targets(batch: int = 2, segments: int = 3, edges: int = 2, side: int = 16) -> Targets:
    """Random truth; the last image of a batch has one relation less."""
    boxes = torch.cat([0.3 + 0.4 * torch.rand(batch, segments, 2), 0.1 + 0.3 * torch.rand(batch, segments, 2)], -1)
    relations = torch.tensor([[0, 1, 1], [2, 0, 3]]).expand(batch, -1, -1).clone()[:, :edges]
    many = torch.full((batch,), edges)
    many[-1] -= 1 if edges > 1 else 0
    masks = torch.rand(batch, segments, side, side) > 0.6
    return Targets(torch.randint(5, (batch, segments)), boxes, masks, relations, torch.full((batch,), segments), many)


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_parameter_counts():
    with torch.device("meta"):
        trunk = model.ResNetTrunk(50)
        assert parameters(trunk) == 23_508_032
        psgtr, former = PSGTR(trunk), PSGFormer(trunk, official_layout=True)
    assert parameters(psgtr) == 44_437_695 and parameters(psgtr) - parameters(trunk) == 20_929_663
    assert parameters(former) == 52_895_900 and parameters(former.sop_update) == 197_120
    assert parameters(psgtr.sub_attention) == 131_584 and parameters(psgtr.sub_box) == 132_612
    assert parameters(psgtr.sub_mask) == 1_202_073 and parameters(psgtr.decoder) == 9_473_024
    assert parameters(psgtr.encoder) == 7_890_432
    assert parameters(psgtr.sub_cls) == 34_438 and parameters(psgtr.rel_cls) == 14_649


def test_presets_have_these_nets(train: ModuleType):
    with torch.device("meta"):
        for preset in train.PRESETS.values():
            for name in set(preset.config.sgdet) & set(train.NET_NAMES):
                net = train.make_net(preset.config, name, 133, 56)
                if preset.config.backbone == "r50":
                    assert parameters(net) == {"psgtr": 44_437_695, "psgformer": 52_895_900 - 197_120}[name]
            for name in preset.config.predcls:
                head = train.make_head(preset.config, name, [str(i) for i in range(133)], 56, None, True)
                assert parameters(head) > 0
    assert set(train.PRESETS["psgtr-r50"].config.ks) == {20, 50, 100}


@pytest.mark.parametrize("cls", [PSGTR, PSGFormer])
def test_one_step_at_full_width(cls):
    net = cls(model.ResNetTrunk(50), encoder=1, decoder=1)
    truth = targets(1)
    truth.labels.fill_(132)
    out = net.train()(torch.randn(1, 3, 64, 64))
    sum(net.loss(out, truth).values()).backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in net.trunk.stem.parameters())
    assert not any(m.training for m in net.trunk.modules() if isinstance(m, nn.BatchNorm2d))


# ---- DETR's parts beside transformers --------------------------------------------------------------------------------


def copy_attention(ours: model.Attention, theirs: Any) -> None:
    for a, b in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
        getattr(ours, a).load_state_dict(getattr(theirs, b).state_dict())
    ours.out.load_state_dict(getattr(theirs, "out_proj", None).state_dict() if hasattr(theirs, "out_proj") else {})


def test_attention_layers_are_pytorchs():
    torch.manual_seed(1)
    ours = model.EncoderLayer(32, 4, 48, 0.0).eval()
    theirs = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_bias.normal_()
        for i, layer in enumerate((ours.attention.q, ours.attention.k, ours.attention.v)):
            layer.weight.copy_(theirs.self_attn.in_proj_weight[32 * i : 32 * (i + 1)])
            layer.bias.copy_(theirs.self_attn.in_proj_bias[32 * i : 32 * (i + 1)])
    ours.attention.out.load_state_dict(theirs.self_attn.out_proj.state_dict())
    ours.ffn[0].load_state_dict(theirs.linear1.state_dict())
    ours.ffn[3].load_state_dict(theirs.linear2.state_dict())
    ours.norms[0].load_state_dict(theirs.norm1.state_dict())
    ours.norms[1].load_state_dict(theirs.norm2.state_dict())
    x = torch.randn(2, 7, 32)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[1, 5:] = True
    found = ours(x, torch.zeros_like(x), ~hidden[:, None, None])
    expected = theirs(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :5], expected[1, :5], atol=1e-5, rtol=1e-5)


def test_mask_head_shares_its_first_convolution_exactly():
    head = model.MaskHead(32, 8, (24, 16, 12))
    features, attention = torch.randn(2, 32, 4, 4), torch.rand(5, 8, 4, 4)
    skips = [torch.randn(2, 24, 4, 4), torch.randn(2, 16, 8, 8), torch.randn(2, 12, 16, 16)]
    image = torch.tensor([0, 1, 1, 0, 1])
    x = torch.cat([features[image], attention], 1)  # one copy of the features a query, as DETR has it
    x = F.relu(head.norms[0](head.convs[0](x)))
    x = F.relu(head.norms[1](head.convs[1](x)))
    for i, skip in enumerate(skips):
        x = head.adapters[i](skip)[image] + F.interpolate(x, skip.shape[-2:], mode="nearest")
        x = F.relu(head.norms[i + 2](head.convs[i + 2](x)))
    torch.testing.assert_close(head(features, attention, skips, image), head.last(x)[:, 0], atol=1e-5, rtol=1e-5)


def test_detr_peers():
    modelling = pytest.importorskip("transformers.models.detr.modeling_detr")
    padding = torch.zeros(2, 5, 6, dtype=torch.bool)
    padding[1, :, 4:] = True
    cls = modelling.DetrSinePositionEmbedding
    try:
        sine = cls(16, normalize=True, scale=2 * math.pi)
    except TypeError:
        sine = cls(16, normalize=True)
    try:
        theirs = sine(torch.zeros(2, 32, 5, 6), (~padding).long())
    except TypeError:
        theirs = sine(torch.Size((2, 32, 5, 6)), torch.device("cpu"), torch.float32, ~padding)
    theirs = theirs.flatten(2).transpose(1, 2) if theirs.ndim == 4 else theirs
    torch.testing.assert_close(model.sine_positions(padding, 32), theirs, atol=1e-5, rtol=1e-5)


def test_attention_map_sums_to_one_and_sees_no_padding():
    maps = model.AttentionMap(32, 8)
    padding = torch.zeros(2, 4, 5, dtype=torch.bool)
    padding[1, :, 3:] = True
    found = maps(torch.randn(3, 32), torch.randn(2, 20, 32), torch.tensor([0, 1, 1]), padding)
    torch.testing.assert_close(found.sum((1, 2, 3)), torch.ones(3))
    assert found[1:, :, :, 3:].abs().max() == 0 and found[0, :, :, 3:].min() > 0


# ---- boxes, matching, losses -----------------------------------------------------------------------------------------


def test_giou_by_hand():
    a, b = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    assert float(model.giou(a, b)) == pytest.approx(-1 / 3)
    assert float(model.giou(a, a)) == pytest.approx(1.0)


def perfect(net: PSGTR, truth: Targets, order: Tensor) -> dict[str, Any]:
    """An output of PSGTR that holds the truth in the queries ``order`` (R,), in every layer."""
    b, r = truth.relations.shape[:2]
    out = {
        name: torch.zeros(2, b, 6, width)
        for name, width in (("sub_cls", 6), ("obj_cls", 6), ("rel_cls", 4), ("sub_box", 4), ("obj_box", 4))
    }
    out["sub_box"] += 0.5
    out["obj_box"] += 0.5
    for i in range(b):
        for k in range(r):
            s, o, p = truth.relations[i, k].tolist()
            q = int(order[k])
            out["sub_cls"][:, i, q, truth.labels[i, s]] = 40
            out["obj_cls"][:, i, q, truth.labels[i, o]] = 40
            out["rel_cls"][:, i, q, p] = 40
            out["sub_box"][:, i, q], out["obj_box"][:, i, q] = truth.boxes[i, s], truth.boxes[i, o]
    out["last"], out["seen"] = torch.zeros(b, 6, 32), None
    return out


def test_psgtr_matches_the_truth_wherever_it_stands_and_loses_nothing(monkeypatch):
    net, truth = tiny(), targets()
    for order in (torch.tensor([4, 1]), torch.tensor([0, 5])):
        out = perfect(net, truth, order)
        match = net.match(out, truth)
        assert match[:, 0].tolist() == [order.tolist()] * 2
        assert match[:, 1].tolist() == [[int(order[0]), -1]] * 2  # the second image has one relation
        sub, obj, _ = truth.relations.unbind(-1)

        def right(out, image, query, order=order, sub=sub, obj=obj):
            edge = (query[:, None] == order).int().argmax(1)
            return tuple((truth.masks[image, ends[image, edge]].float() * 2 - 1) * 50 for ends in (sub, obj))

        monkeypatch.setattr(net, "triplet_masks", right)
        terms = net.loss(out, truth)
        for name in ("sub_l1", "obj_l1", "sub_giou", "obj_giou", "sub_dice", "obj_dice", "sub_cls", "obj_cls"):
            assert float(terms[name]) == pytest.approx(0, abs=1e-4), name


def test_psgtr_losses_by_loops():
    net, truth = tiny(), targets()
    out = net(torch.randn(2, 3, 32, 32))
    terms, match = net.loss(out, truth), net.match(out, truth)
    expected = dict.fromkeys(("sub_cls", "sub_l1", "rel_cls"), 0.0)
    for layer in range(2):
        many, weight, ce = 0, 0.0, 0.0
        s_ce = l1 = 0.0
        for i in range(2):
            labels = [0] * 6
            for k in range(int(truth.edges[i])):
                q, (s, _, p) = int(match[layer, i, k]), truth.relations[i, k].tolist()
                labels[q] = p
                s_ce += F.cross_entropy(out["sub_cls"][layer, i, q], truth.labels[i, s]).item()
                l1 += (out["sub_box"][layer, i, q] - truth.boxes[i, s]).abs().sum().item()
                many += 1
            for q, label in enumerate(labels):
                w = 1.0 if label else 0.02
                ce += w * F.cross_entropy(out["rel_cls"][layer, i, q], torch.tensor(label)).item()
                weight += w
        expected["sub_cls"] += s_ce / many
        expected["sub_l1"] += 5 * l1 / many
        expected["rel_cls"] += 2 * ce / weight
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-4), name


def test_psgtr_cost_by_hand():
    net, truth = tiny(), targets(1, edges=1)
    out = net(torch.randn(1, 3, 32, 32))
    s, o, p = truth.relations[0, 0].tolist()
    cost = []
    for q in range(6):
        c = 0.0
        for name, k in (("sub", s), ("obj", o)):
            a, b = model.corners(out[f"{name}_box"][-1, 0, q]), model.corners(truth.boxes[0, k])
            c -= 0.4 * out[f"{name}_cls"][-1, 0, q].softmax(-1)[truth.labels[0, k]]
            c += (5 * (a - b).abs().sum() - 2 * model.giou(a, b)) / 2
        cost.append(float(c - 0.8 * out["rel_cls"][-1, 0, q].softmax(-1)[p]))
    assert int(net.match(out, truth)[-1, 0, 0]) == int(np.argmin(cost))


def released(net: model.DETR) -> dict[str, Tensor]:
    """The state of a DETR under the names of facebookresearch/detr's panoptic checkpoint."""
    out: dict[str, Tensor] = {}
    names = {**{new: old for old, new in model.RELEASED_NAMES.items()}}
    state = net.state_dict()
    for name, value in state.items():
        new = next(prefix for prefix in sorted(names, key=len, reverse=True) if name.startswith(prefix))
        rest = name[len(new) :]
        if new in ("encoder.", "object_decoder.layers."):
            layer, _, rest = rest.partition(".")
            kind, _, leaf = rest.partition(".")
            if kind in ("attention", "itself", "cross"):
                joint = "multihead_attn" if kind == "cross" else "self_attn"
                stem = f"{names[new]}{layer}.{joint}."
                part, _, leaf = leaf.partition(".")
                if part == "out":
                    out[f"{stem}out_proj.{leaf}"] = value
                elif part == "q":
                    whole = [state[name.replace(f"{kind}.q.", f"{kind}.{p}.")] for p in "qkv"]
                    out[f"{stem}in_proj_{leaf}"] = torch.cat(whole)
                continue
            index, _, leaf = leaf.partition(".")
            kind = f"norm{int(index) + 1}" if kind == "norms" else {"0": "linear1", "3": "linear2"}[index]
            rest = f"{layer}.{kind}.{leaf}"
        out[names[new] + rest] = value
    return out


def test_released_detr_is_read_whole():
    torch.manual_seed(2)
    net = model.DETR(model.ResNetTrunk(50), d=32, hidden=48, encoder=2, decoder=2, queries=5)
    state = released(net)
    assert "detr.transformer.decoder.layers.1.multihead_attn.in_proj_weight" in state
    assert "detr.backbone.0.body.layer4.2.bn3.running_var" in state and "mask_head.gn5.weight" in state
    assert state["detr.transformer.encoder.layers.0.self_attn.in_proj_weight"].shape == (96, 32)
    read = model.from_released_detr({**state, "unknown.weight": torch.zeros(1)})
    assert set(read) == set(net.state_dict())
    assert all(torch.equal(value, read[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("cls", [PSGTR, PSGFormer])
def test_both_networks_begin_with_a_detr(cls):
    torch.manual_seed(3)
    detr, net = tiny(model.DETR).eval(), tiny(cls).eval()
    anew = model.begin_with_detr(net, detr.state_dict())
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = detr(image), net(image)
    query = torch.arange(6)
    if cls is PSGTR:  # every triplet query is an object query that says the same of subject and object
        assert anew == ["rel_cls.weight", "rel_cls.bias"]
        for part in ("sub", "obj"):
            torch.testing.assert_close(b[f"{part}_cls"], a["cls"])
            torch.testing.assert_close(b[f"{part}_box"], a["box"])
        masks = net.triplet_masks(b, torch.zeros_like(query), query)
    else:
        assert all(net.is_slow(name) is False for name in anew) and len(anew) > 20
        torch.testing.assert_close(b["cls"], a["cls"])
        masks = [net.object_masks(b, torch.zeros_like(query), query)]
    for mask in masks:
        torch.testing.assert_close(mask, detr.object_masks(a, torch.zeros_like(query), query))
    other = tiny(cls, classes=7)
    assert {"sub_cls.weight", "cls.weight"} & set(model.begin_with_detr(other, detr.state_dict()))


def test_shipped_weights_find_segments(train: ModuleType):
    """What the default begins with is there and was trained on other scenes than these."""
    config, split = train.PRESETS["default"].config, data.Scenes(40, 9)
    net = train.detr_of(config, SimpleNamespace(), split)
    with torch.no_grad():
        out = net(train.collate([split[i] for i in range(40)])[0])
    found = [net.panoptic(out, (64, 64), i)[::2] for i in range(40)]
    assert all(masks.sum(0).max() <= 1 for _, masks in found)
    assert (
        train.found_segments(split, lambda part: found[int(part[0].name.split()[1]) :][: len(part)]) > 0.5
    )  # discs and squares of a colour are mixed up


def test_panoptic_segments_by_hand(monkeypatch):
    net = tiny(model.DETR, classes=2, queries=3)
    sure = torch.full((1, 1, 3, 3), -9.0)
    sure[..., 0, 0], sure[..., 1, 1], sure[..., 2, 2] = 9.0, 3.0, 9.0  # the last one is background
    logits = torch.full((2, 2, 4), -5.0)
    logits[0, :, :3], logits[1, :, 1:] = 5.0, 5.0
    monkeypatch.setattr(net, "object_masks", lambda out, image, query: logits[query])
    labels, scores, masks = net.panoptic({"cls": sure}, (2, 4), 0)
    assert labels.tolist() == [0] and masks[0, 0].tolist() == [True, True, True, False]  # the other keeps a third
    labels, _, masks = net.panoptic({"cls": sure}, (2, 4), 0, overlap=0.3)
    assert labels.tolist() == [0, 1] and masks[1, 1].tolist() == [False, False, False, True]
    assert len(net.panoptic({"cls": sure}, (2, 4), 0, score=1.1)[0]) == 0 and scores[0] > 0.99


@pytest.mark.parametrize("cls", [PSGTR, PSGFormer])
def test_no_relation_leaves_finite_background_terms(cls):
    net, truth = tiny(cls), targets(1)
    truth.edges.zero_()
    terms = net.loss(net(torch.randn(1, 3, 32, 32)), truth)
    assert all(torch.isfinite(value) for value in terms.values())
    assert float(terms["rel_cls"]) > 0
    for name in ("sub_cls", "obj_l1", "sub_dice", "sub_id", "obj_id"):
        if name in terms:
            assert float(terms[name]) == 0, name


def test_psgformer_loss_of_a_batch_is_that_of_its_images():
    """The released code mixes images here; the identities of two images must not touch each other."""
    net = tiny(PSGFormer).eval()
    truth = targets(2)
    truth.segments[1] = 2
    truth.relations[1, 0] = torch.tensor([1, 0, 2])
    images = torch.randn(2, 3, 32, 32)
    both = net.loss(net(images), truth)
    alone = []
    for i in range(2):
        part = Targets(*(getattr(truth, name)[i : i + 1] for name in truth.__dataclass_fields__))
        alone.append(net.loss(net(images[i : i + 1]), part))
    many = truth.edges.tolist()
    for name in ("sub_id", "obj_id"):
        expected = sum(n * terms[name] for n, terms in zip(many, alone)) / sum(many)
        torch.testing.assert_close(both[name], expected, atol=1e-4, rtol=1e-4)


def test_psgformer_similarities_and_identities():
    net = tiny(PSGFormer)
    out = net(torch.randn(1, 3, 32, 32))
    assert float(out["sub_id"].detach().abs().max()) <= 10 + 1e-4
    objects = torch.tensor([[4, 0, -1]])
    log_p = net.identities(out["sub_id"], objects)
    torch.testing.assert_close(log_p[..., :2].exp().sum(-1), torch.ones(1, 6))  # matched object queries only
    torch.testing.assert_close(
        log_p[0, 3, 0] - log_p[0, 3, 1], out["sub_id"][0, 3, 4] - out["sub_id"][0, 3, 0], atol=1e-4, rtol=1e-4
    )


def test_psgformer_learning_rates():
    net = tiny(PSGFormer)
    fast, slow = net.parameter_groups(1.0)
    assert slow["lr"] == 0.1 and len(fast["params"]) + len(slow["params"]) == len(list(net.parameters()))
    assert not net.is_slow("relation_decoder.norm.weight") and net.is_slow("object_decoder.norm.weight")
    assert net.is_slow("encoder.0.norms.0.weight") and not net.is_slow("sub_update.0.weight")


def test_more_triplets_than_queries_is_survived():
    net, truth = tiny(queries=1), targets(1)
    assert (net.match(net(torch.randn(1, 3, 32, 32)), truth)[0, 0] >= 0).sum() == 1


# ---- inference and metrics -------------------------------------------------------------------------------------------


def test_ranking_is_by_predicate_alone_and_reports_the_best_predicate():
    logits = torch.tensor([[0.0, 3.0, 2.9, 0.0], [0.0, 0.0, 0.0, 0.5]])
    score, query, predicate = model.ranked(logits, 3)
    assert query.tolist() == [0, 0, 1] and predicate.tolist() == [1, 1, 3]
    assert score.tolist() == sorted(score.tolist(), reverse=True)


def half(left: int, right: int) -> Tensor:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, left:right] = True
    return mask


def triplets(rows: list[tuple[int, int, int, int, int]], masks: Tensor) -> Triplets:
    """Rows of subject class, predicate, object class, subject mask, object mask."""
    t = torch.tensor(rows).view(-1, 5)
    return Triplets(t[:, 0], t[:, 1], t[:, 2], torch.linspace(1, 0.1, len(t)), masks, t[:, 3:])


def test_repeats_go_as_when_looking_one_by_one():
    torch.manual_seed(3)
    masks = torch.rand(8, 6, 6) > 0.35
    rows = [(0, 1, 0, int(a), int(b)) for a, b in torch.randint(8, (30, 2))]
    t = triplets(rows, masks)
    iou = model.mask_iou(masks, masks)
    kept: list[int] = []
    for k, (_, _, _, a, b) in enumerate(rows):
        near = [
            (a == rows[j][3] or iou[a, rows[j][3]] > 0.5) and (b == rows[j][4] or iou[b, rows[j][4]] > 0.5)
            for j in kept
        ]
        if not any(near):
            kept.append(k)
    assert 1 < len(kept) < 30
    torch.testing.assert_close(model.without_repeats(t).pairs, t.pairs[kept])


def test_recall_by_hand():
    masks = torch.stack([half(0, 2), half(2, 4)])
    truth = metrics.Truth(torch.tensor([0, 1]), masks, torch.tensor([[0, 1, 1], [1, 0, 2]]))
    a, b, x = (0, 1, 1, 0, 1), (1, 2, 0, 1, 0), (4, 1, 1, 0, 1)
    recall = metrics.Recall(56, (1, 3, 4))
    recall.add(triplets([a, x, a, b], masks), truth)
    found = recall.result()
    assert (found["R@1"], found["R@3"], found["R@4"]) == (0.5, 0.5, 1.0)
    assert found["mR@1"] == pytest.approx(1 / 56) and found["mR@4"] == pytest.approx(2 / 56)


def test_an_iou_of_half_hits_and_less_does_not():
    truth = metrics.Truth(torch.tensor([0, 1]), torch.stack([half(0, 2), half(3, 4)]), torch.tensor([[0, 1, 1]]))
    for width, hit in ((1, True), (0, False)):
        masks = torch.stack([half(0, width), half(3, 4)])
        recall = metrics.Recall(56, (20,))
        recall.add(triplets([(0, 1, 1, 0, 1)], masks), truth)
        assert recall.result()["R@20"] == float(hit)


def test_images_without_a_prediction_count_zero_unless_asked():
    masks = torch.stack([half(0, 2), half(2, 4)])
    truth = metrics.Truth(torch.tensor([0, 1]), masks, torch.tensor([[0, 1, 1]]))
    for skip, expected in ((False, 0.5), (True, 1.0)):
        recall = metrics.Recall(56, (20,), skip_empty=skip)
        recall.add(triplets([(0, 1, 1, 0, 1)], masks), truth)
        recall.add(triplets([], masks), truth)
        assert recall.result()["R@20"] == expected


def test_phrase_recall_compares_unions():
    whole = torch.stack([half(0, 2), half(2, 4)])
    truth = metrics.Truth(torch.tensor([0, 0]), whole, torch.tensor([[0, 1, 1]]))
    found = triplets([(0, 1, 0, 1, 0)], whole)  # subject and object exchanged
    for phrase, expected in ((False, 0.0), (True, 1.0)):
        recall = metrics.Recall(1, (1,), phrase=phrase)
        recall.add(found, truth)
        assert recall.result()["R@1"] == expected
    with pytest.raises(ValueError, match="K is"):
        metrics.Recall(56, (0,))


def test_torchmetrics_agrees_on_mask_iou():
    a, b = torch.rand(3, 9, 7) > 0.5, torch.rand(4, 9, 7) > 0.5
    slow = [[float((x & y).sum() / (x | y).sum()) for y in b] for x in a]
    row, column = (
        part.reshape(len(a), len(b))
        for part in torch.meshgrid(torch.arange(len(a)), torch.arange(len(b)), indexing="ij")
    )
    torch.testing.assert_close(metrics.pair_iou(a, b, row, column).float(), torch.tensor(slow))
    torch.testing.assert_close(model.mask_iou(a, b), torch.tensor(slow))


# ---- two-stage heads -------------------------------------------------------------------------------------------------


def objects(counts: tuple[int, ...] = (4, 3), features: int = 16) -> Objects:
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    m = len(image)
    low = 60 * torch.rand(m, 2)
    boxes = torch.cat([low, low + 5 + 30 * torch.rand(m, 2)], 1)
    pairs = twostage.all_pairs(image)
    sizes = torch.tensor([[100.0, 120.0]]).repeat(m, 1)
    labels = torch.randint(1, 6, (m,))
    return Objects(
        image, torch.randn(m, features), boxes, sizes, labels, torch.ones(m), pairs, torch.randn(len(pairs), features)
    )


def head(name: str, **kwargs: Any) -> Any:
    words = torch.randn(6, 8)
    return twostage.HEADS[name](5, 3, 16, words, hidden=16, pooling=24, **kwargs).eval()


def permuted(o: Objects, order: Tensor) -> Objects:
    """The same objects in another order within their images."""
    where = order.argsort()
    parts = {k: getattr(o, k)[order] for k in ("image", "features", "boxes", "sizes", "labels", "scores")}
    return Objects(**parts, pairs=where[o.pairs], union=o.union)


@pytest.mark.parametrize("name", ["imp", "motifs", "vctree", "gpsnet"])
def test_heads_do_not_depend_on_the_order_of_objects_or_on_other_images(name):
    net, o = head(name), objects()
    whole = net(o)
    order = torch.tensor([2, 0, 3, 1, 6, 4, 5])
    torch.testing.assert_close(net(permuted(o, order)).relations, whole.relations, atol=1e-4, rtol=1e-4)
    first = o.image[o.pairs[:, 0]] == 0
    parts = {k: getattr(o, k)[:4] for k in ("image", "features", "boxes", "sizes", "labels", "scores")}
    alone = net(Objects(**parts, pairs=o.pairs[first], union=o.union[first]))
    torch.testing.assert_close(alone.relations, whole.relations[first], atol=1e-4, rtol=1e-4)
    assert whole.objects.argmax(1).equal(o.labels)


def test_imp_without_iterations_sees_the_pair_only_and_one_iteration_by_loops():
    net, o = head("imp", iterations=0), objects()
    other = Objects(**{**vars(o), "features": torch.randn_like(o.features)})
    torch.testing.assert_close(net(o).relations, net(other).relations)
    net.iterations = 1
    assert not torch.allclose(net(o).relations, net(other).relations)
    zero = torch.zeros(1, 16)
    h = [net.node_gru(net.node_in(x[None]), zero) for x in o.features]
    e = [net.edge_gru(F.relu(net.edge_in(x[None])), zero) for x in o.union]

    def gate(k: int, node: Tensor, edge: Tensor) -> Tensor:
        return net.gates[k](torch.cat([node, edge], 1)).sigmoid()

    for k, (i, j) in enumerate(o.pairs.tolist()):
        message = gate(0, h[i], e[k]) * h[i] + gate(1, h[j], e[k]) * h[j]
        torch.testing.assert_close(
            net.edge_out(net.edge_gru(message, e[k]))[0], net(o).relations[k], atol=1e-5, rtol=1e-5
        )


def test_motifs_looks_from_right_to_left():
    o = objects((4,))
    layout = Layout.of(o.image, o.boxes[:, 0] + o.boxes[:, 2])
    centre = layout.pad((o.boxes[:, 0] + o.boxes[:, 2])[:, None])[0, :, 0]
    assert centre.tolist() == sorted(centre.tolist(), reverse=True)
    torch.testing.assert_close(layout.flat(layout.pad(o.features)), o.features)


def test_uniform_frequencies_change_no_ranking():
    o, frequency = objects(), torch.zeros(6, 6, 4) - 1.4
    net = head("motifs", frequency=frequency)
    biased = net(o).relations.softmax(-1)
    net.frequency = torch.zeros(6, 6, 4)
    torch.testing.assert_close(biased, net(o).relations.softmax(-1))


def test_frequency_table_by_hand():
    labels, pairs = torch.tensor([1, 2, 1]), torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [0, 2], [2, 0]])
    table = twostage.frequency_table(labels, torch.tensor([[0, 1, 2], [0, 1, 1]]), 2, 2, pairs)
    torch.testing.assert_close(table[1, 2].exp() - 1e-3, torch.tensor([1 / 3, 1 / 3, 1 / 3]))
    torch.testing.assert_close(table[2, 1].exp() - 1e-3, torch.tensor([1.0, 0, 0]))


def test_spanning_trees_are_maximum_and_keep_every_node_once():
    torch.manual_seed(2)
    scores = torch.rand(3, 7, 7)
    scores = scores + scores.transpose(1, 2)
    lengths = torch.tensor([7, 5, 1])
    tree = twostage.spanning_trees(scores, lengths)
    for b, n in enumerate(lengths.tolist()):
        order = tree.order[b, :n]
        assert sorted(order.tolist()) == list(range(n)) and (tree.order[b, n:] == -1).all()
        part = scores[b, :n, :n]
        assert int(order[0]) == int(part.mean(1).argmax())
        weight = sum(float(part[order[k], order[tree.parent[b, k]]]) for k in range(1, n))
        assert (tree.parent[b, 1:n] >= 0).all() and tree.parent[b, 0] == -1
        if n > 1:
            best = -minimum_spanning_tree(-part.triu(1).numpy()).sum()
            assert weight == pytest.approx(best, abs=1e-5)
        seen, stack = [], [0]
        while stack:  # left child, right sibling
            k = stack.pop()
            seen.append(k)
            for up in (tree.left[b, k], tree.right[b, k]):
                if up >= 0:
                    assert tree.above[b, up] == k
                    stack.append(int(up))
        assert sorted(seen) == list(range(n))


def test_gps_fusion_and_attention():
    a = torch.randn(5, 4)
    torch.testing.assert_close(twostage.fusion(a, a), F.relu(2 * a))
    net, o = head("gpsnet"), objects((4, 3, 1))
    layout = Layout.of(o.image, torch.zeros(8))
    weights = net.attention(torch.randn(8, 16), o, layout)
    torch.testing.assert_close(weights[0].sum(1), torch.ones(4))
    torch.testing.assert_close(weights[1, :3].sum(1), torch.ones(3))
    assert weights.diagonal(dim1=1, dim2=2).abs().max() == 0 and weights[2].abs().max() == 0
    few = Objects(**{**vars(o), "pairs": o.pairs[1:], "union": o.union[1:]})  # pair 0 -> 1 was not sampled
    net.unsampled = 0.0
    assert float(net.attention(torch.randn(8, 16), few, layout)[0, 0, 1]) == 0
    assert torch.isfinite(net(o).relations).all()


def test_box_code_and_maps_by_hand():
    boxes, sizes = torch.tensor([[0.0, 0, 59, 49], [60, 50, 119, 99]]), torch.tensor([[100.0, 120.0]] * 2)
    code = twostage.box_code(boxes, sizes)
    torch.testing.assert_close(code[0], torch.tensor([0.5, 0.5, 0.25, 0.25, 0, 0, 59 / 120, 0.49, 0.25]))
    maps = twostage.box_maps(boxes, sizes)
    assert maps[0, 0, :13, :13].all() and maps[0, 0, 15:].sum() == 0 and maps[1, 1, 14:, 14:].all()
    assert maps[1, 1, :13].sum() == 0
    wrong = twostage.box_maps(boxes, sizes, tail_rect_bug=True)
    assert torch.equal(wrong[:, 0], maps[:, 0]) and not torch.equal(wrong[:, 1], maps[:, 1])
    spatial, pairs = twostage.SpatialEncoder(8).eval(), torch.tensor([[0, 1], [1, 0]])
    both = torch.stack([maps[pairs[:, 0], 0], maps[pairs[:, 1], 1]], 1)
    torch.testing.assert_close(spatial(maps, pairs), spatial.rest(spatial.first(both)), atol=1e-5, rtol=1e-5)


def test_label_decoder_teaches_and_chains():
    net = twostage.LabelDecoder(4, 6, 3, 5).eval()
    x, parent = torch.randn(2, 3, 4), torch.tensor([[-1, 0, 1], [-1, 0, 0]])
    taught = net(x, parent, torch.tensor([[1, 2, 3], [1, 2, 3]]))
    other = net(x, parent, torch.tensor([[2, 2, 3], [1, 3, 3]]))
    torch.testing.assert_close(taught[:, 0], other[:, 0])
    assert not torch.allclose(taught[0, 1], other[0, 1])  # the label of the parent is seen
    torch.testing.assert_close(taught[1, 2], other[1, 2])  # that of a sibling is not


def test_sampling_of_pairs():
    labels = torch.tensor([1] * 6 + [0] * 10 + [0] * 3)
    image = torch.tensor([0] * 16 + [1] * 3)
    chosen = twostage.sample_pairs(labels, image, 8, 0.25, torch.Generator().manual_seed(0))
    assert chosen[:6].sum() == 2 and chosen[6:16].sum() == 6 and chosen[16:].all()
    everything = twostage.sample_pairs(labels, image, 8, 1.0, torch.Generator().manual_seed(0))
    assert everything[:6].all() and everything[6:16].sum() == 2


@pytest.mark.parametrize("name", ["motifs", "vctree"])
def test_sgdet_heads_learn_classes(name):
    net, o = head(name, predcls=False).train(), objects()
    truth = torch.randint(1, 6, (7,))
    related = {"related": o.pairs[:2]} if name == "vctree" else {}
    out = net(o, truth=truth, **related)
    predicate = torch.randint(4, (len(o.pairs),))
    terms = twostage.head_loss(out, truth, predicate, torch.ones(len(predicate), dtype=torch.bool), False)
    assert set(terms) == {"relation", "object", *(["tree"] if name == "vctree" else [])}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_paper_size_features_and_heads_make_a_step():
    o = objects((3,), 0)
    region = twostage.RegionFeatures(256, 64)
    maps = {str(i): torch.randn(1, 256, 32 >> i, 32 >> i) for i in range(4)}
    x, union = region(maps, o, (128, 128))
    assert x.shape == (3, 64) and union.shape == (6, 64)
    net = twostage.HEADS["vctree"](133, 56, 64, torch.randn(134, 200))
    out = net(Objects(**{**vars(o), "features": x, "union": union}))
    out.relations.sum().backward()
    assert region.spatial.first.weight.grad is not None


def test_words(tmp_path: Path, train: ModuleType):
    table = {"wall": torch.ones(4), "dog": torch.zeros(4)}
    found = twostage.word_vectors(["dog", "wall-tile", "zebra"], 4, 0, table)
    assert found[1].sum() == 0 and found[2].sum() == 4 and found[3].abs().sum() > 0
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2 3\ncat 1 2 3\n")
    assert list(train.read_glove(str(path), 3, ["dog"])) == ["dog"]
    with pytest.raises(UserError, match="vectors of 3 numbers, expected --words 4"):
        train.read_glove(str(path), 4, ["dog"])


# ---- data ------------------------------------------------------------------------------------------------------------


def psg_file(folder: Path, change: Callable[[dict[str, Any]], None] | None = None, png: Any = None) -> Path:
    """PSG in its layout: the real record twice (train and test) with pixels that are made up."""
    record = json.loads(json.dumps(RECORD))
    table = {
        "data": [record, {**json.loads(json.dumps(RECORD)), "image_id": "7"}],
        "thing_classes": [f"thing {i}" for i in range(80)],
        "stuff_classes": [f"stuff {i}" for i in range(53)],
        "predicate_classes": list(data.PREDICATES),
        "test_image_ids": ["7"],
    }
    if change is not None:
        change(table)
    coco = folder / "coco"
    for name in ("psg", "coco/train2017", "coco/panoptic_train2017"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "psg" / "psg.json").write_text(json.dumps(table))
    ids = np.array([s["id"] for s in RECORD["segments_info"]]).repeat([100, 100, 100, 100, 100, 40, 100])
    pixels = np.repeat(ids[:, None], 480, 1)
    rgb = np.stack([pixels & 255, pixels >> 8 & 255, pixels >> 16], -1).astype(np.uint8)
    image = Image.fromarray(rgb) if png is None else png(rgb)
    image.save(coco / RECORD["pan_seg_file_name"])
    Image.fromarray(np.zeros((640, 480, 3), np.uint8)).save(coco / RECORD["file_name"])
    return folder


def test_psg_reads_the_real_record(tmp_path: Path, run_paper: Any):
    part = data.PSG(psg_file(tmp_path), "train")
    picture = part[0]
    assert len(part) == 1 and picture.masks.shape == (7, 640, 480) and picture.masks.sum(0).eq(1).all()
    names = [data.PREDICATES[p - 1] for p in picture.relations[:, 2]]
    assert names == ["beside", "standing on", "holding", "standing on", "in front of", "over"]
    assert picture.relations[2].tolist() == [1, 2, 22] and picture.labels.tolist() == [0, 0, 25, 116, 117, 119, 125]
    assert data.mask_boxes(picture.masks)[1].tolist() == [0, 100, 480, 200]
    result = run_paper("psg", ["--preset", "psgtr-r50", "--data", tmp_path, "--check-data"])
    assert result.code == 0 and "train: 1 images (expected 46572), 1 with relations" in result.out
    assert len(data.PREDICATES) == 56 and data.PREDICATES[55] == "leaning on"


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        *keys, last = [int(k) if k.isdigit() else k for k in path.split("/")]
        for key in keys:
            table = table[key]
        if value is None:
            del table[last]
        else:
            table[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data/0/relations/0", [0, 7, 1], "image_id 107902: relation [0, 7, 1] names a segment outside of 0 .. 6"),
        ("data/0/relations/0", [0, 1, 56], "relation [0, 1, 56] has a predicate outside of 0 .. 55"),
        ("data/0/relations/0", [1, 1, 3], "relation [1, 1, 3] is of a segment with itself"),
        ("data/0/segments_info/0/category_id", 133, "has category 133, expected below 133"),
        ("data/0/file_name", None, "image_id 107902: malformed record"),
        ("predicate_classes", None, "has no 'predicate_classes': not a PSG file"),
        ("test_image_ids", ["8"], "test_image_ids has 8, which is not among the data"),
        ("data/0/relations", [], "the train split has no image with a relation"),
        ("data/0/segments_info/0/id", 5, "segment id 3648962 is absent from segments_info"),
        ("data/0/width", 479, "is 480 x 640, expected 479 x 640"),
    ],
)
def test_malformed_psg(tmp_path: Path, path: str, value: Any, message: str):
    with pytest.raises(UserError) as error:
        data.PSG(psg_file(tmp_path, edit(path, value)), "train")[0]
    assert message in str(error.value)


def test_palette_png_and_missing_files(tmp_path: Path, refuses: Any):
    part = data.PSG(psg_file(tmp_path, png=lambda rgb: Image.fromarray(rgb).convert("P")), "train")
    with pytest.raises(UserError, match="has mode P, expected RGB"):
        part[0]
    (tmp_path / "coco" / RECORD["file_name"]).unlink()
    with pytest.raises(UserError, match="is missing, expected COCO's images"):
        part[0]
    (tmp_path / "psg" / "psg.json").write_text("{")
    refuses(["--preset", "psgtr-r50", "--data", str(tmp_path), "--check-data"], "psg.json is not json")
    (tmp_path / "psg" / "psg.json").unlink()
    refuses(["--preset", "psgtr-r50", "--data", str(tmp_path)], "neither psg/psg.json nor psg.json there")


def test_bad_usage(refuses: Any):
    refuses(["--predcls", "psgtr"], "PredCls is defined for two-stage methods only")
    refuses(["--ks", "0"], "--ks is (0,), expected different numbers of at least 1")
    refuses(["--preset", "coco-mini"], "needs --data DIR")
    refuses(["--d", "40"], "--d is 40, expected a multiple of 16")
    refuses(["--glove", "nowhere.txt", "--preset", "smoke"], "--glove nowhere.txt cannot be read")


def test_weights_that_are_not_there(refuses: Any):
    words = ["--preset", "smoke", "--weights", "nowhere.pt", "--sgdet", "psgtr", "--overfit", "psgtr"]
    refuses([*words, "--predcls", "imp"], "--weights nowhere.pt: no such file")


def test_psgtr_trains_on_psg_files(tmp_path: Path, run_paper: Any):
    psg_file(tmp_path / "data")
    words = ["--preset", "psgtr-r50", "--data", tmp_path / "data", "--out", tmp_path / "run", "--epochs", "1"]
    words += ["--d", "16", "--hidden", "16", "--layers", "1", "--queries", "8", "--stop-after", "1", "--side", "96"]
    with torch.random.fork_rng():
        start = PSGTR(model.ResNetTrunk(50), d=16, hidden=16, encoder=1, decoder=1, queries=8).state_dict()
    torch.save({name: value for name, value in start.items() if "norm" not in name}, tmp_path / "data" / "net.pt")
    words += ["--weights", "net.pt"]
    result = run_paper("psg", words)
    assert result.code == 0, result.err


def test_rules_by_hand():
    masks = torch.zeros(4, 40, 60, dtype=torch.bool)
    masks[0, :20], masks[1, 20:] = True, True  # sky above grass
    masks[2, 18:30, 10:18] = True  # stands on the grass
    masks[3, 18:30, 20:28] = True  # beside it
    masks[0] &= ~(masks[2] | masks[3])
    masks[1] &= ~(masks[2] | masks[3])
    found = data.rule_relations(masks, torch.tensor([False, False, True, True]))
    names = {(s, o): data.RULES[p - 1] for s, o, p in found.tolist()}
    assert names == {(0, 1): "over", (2, 1): "on", (3, 1): "on", (2, 3): "beside"}


def test_real_panoptic_images(data_root: Path):
    folder = data_root / "coco-panoptic-mini"
    if not folder.is_dir():
        pytest.skip("no coco-panoptic-mini")
    part = data.CocoPanoptic(folder, "test")
    assert len(part) == 100 and len(part.classes) == 133 and int(part.thing.sum()) == 80
    assert tuple(row["id"] for row in part.categories) == data.COCO_IDS
    picture = part[0]
    assert (
        picture.masks.sum(0).max() == 1
        and len(picture.relations)
        and picture.image.shape[1:] == picture.masks.shape[1:]
    )
    with tarfile.open(next(folder.glob("*.tar"))) as tar:
        row = json.load(tar.extractfile("annotations/panoptic_val2017.json"))["annotations"][0]
    kept = [s for s in row["segments_info"] if not s["iscrowd"] and s["area"] >= 0.002 * picture.masks[0].numel()]
    assert picture.masks.sum((1, 2)).tolist() == [s["area"] for s in kept]
    x1, y1, x2, y2 = data.mask_boxes(picture.masks).unbind(1)
    assert torch.stack([x1, y1, x2 - x1, y2 - y1], 1).int().tolist() == [s["bbox"] for s in kept]


def test_malformed_coco(tmp_path: Path):
    with pytest.raises(UserError, match="neither annotations/ nor one"):
        data.CocoPanoptic(tmp_path, "train")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match=r"panoptic_train2017\.json is missing"):
        data.CocoPanoptic(tmp_path, "train")
    (tmp_path / "annotations" / "panoptic_train2017.json").write_text("{}")
    with pytest.raises(UserError, match="is not COCO panoptic json"):
        data.CocoPanoptic(tmp_path, "train")


@pytest.fixture(scope="module")
def scenes() -> data.Scenes:
    return data.Scenes(60, 5)


def test_scenes_are_what_their_relations_say(scenes: data.Scenes):
    again = data.Scenes(60, 5)
    assert torch.equal(again.images, scenes.images) and not torch.equal(data.Scenes(60, 6).images, scenes.images)
    seen = set()
    for i in range(60):
        p = scenes[i]
        boxes, classes = data.mask_boxes(p.masks), [scenes.classes[c] for c in p.labels]
        assert p.masks.sum(0).max() <= 1 and len(p.relations.unique(dim=0)) == len(p.relations)
        horizon = float(boxes[1, 1])
        for s, o, predicate in p.relations.tolist():
            name = scenes.predicates[predicate - 1]
            seen.add(name)
            if name == "on":
                assert o == 1 and classes[o] in data.SCENE_STUFF and boxes[s, 3] > horizon
            if name == "over" and s:
                assert o == 1 and boxes[s, 3] <= horizon
            if name in ("beside", "touching"):
                assert min(s, o) >= 2
            if name == "touching":  # no word of left and right, so that a mirrored scene has the same relations
                assert p.masks[s].sum() >= p.masks[o].sum()
    assert seen == set(scenes.predicates)


def test_flipping_and_leaving_out_segments(scenes: data.Scenes):
    p = data.flip(scenes[0])
    torch.testing.assert_close(p.masks.flip(2), scenes[0].masks)
    assert torch.equal(p.relations, scenes[0].relations)
    few = data.without_segments(scenes[0], torch.arange(len(p.labels)) != 0)
    assert len(few.labels) == len(p.labels) - 1 and len(few.relations) == (p.relations[:, :2] > 0).all(1).sum()


def test_augmentation_keeps_a_relation_and_one_predicate_a_pair(scenes: data.Scenes):
    p = data.augment(scenes[3], torch.Generator().manual_seed(4))
    assert min(p.image.shape[1:]) >= 480 and len(p.relations) and p.masks.shape[1:] == p.image.shape[1:]
    rows = torch.tensor([[0, 1, 1], [0, 1, 2], [1, 0, 3]])
    picks = {tuple(map(tuple, data.one_predicate(rows, torch.Generator().manual_seed(i)).tolist())) for i in range(20)}
    assert all(len(pick) == 2 for pick in picks) and len({p for pick in picks for p in pick}) == 3


def test_features_are_averaged_over_masks():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2, 2:] = True
    assert twostage.pooled(torch.arange(4.0).view(1, 2, 2), masks).item() == 1.0


def results_file(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """COCO panoptic results that find what ``psg_file`` wrote, but for the last segment, which has another class."""
    ids = data.COCO_IDS
    parts = [{"id": s["id"], "category_id": ids[s["category_id"]], "score": 0.9} for s in RECORD["segments_info"]]
    parts[-1]["category_id"] = ids[0]
    rows = [{"image_id": 417720, "file_name": "000000417720.png", "segments_info": parts}]
    table = {"annotations": rows}
    if change is not None:
        change(table)
    (folder / "panoptic").mkdir(exist_ok=True)
    (folder / "panoptic.json").write_text(json.dumps(table))
    (folder / "panoptic" / "000000417720.png").write_bytes((folder / "coco" / RECORD["pan_seg_file_name"]).read_bytes())


SMALL_HEADS = ["--head-features", "16", "--head-hidden", "16", "--pooling", "16", "--words", "8", "--side", "96"]


def test_two_stage_methods_on_psg_files(tmp_path: Path, run_paper: Any):
    """True segments (PredCls) and those that a detector found (SGDet), through the frozen pyramid."""
    psg_file(tmp_path / "data")
    results_file(tmp_path / "data")
    picture = data.PSG(tmp_path / "data", "train")[0]
    found = data.PanopticResults(tmp_path / "data" / "panoptic.json").find(417720, (640, 480))
    truth, relations = data.match_segments(found, picture)
    assert truth.tolist() == [1, 1, 26, 117, 118, 120, 0] and found.labels[-1] == 0
    left = picture.relations[(picture.relations[:, :2] < 6).all(1)]  # relations with the last segment are lost
    assert sorted(relations.tolist()) == sorted(left.tolist())
    bare = data.without_segments(picture, torch.zeros(7, dtype=torch.bool))
    truth, relations = data.match_segments(found, bare)
    assert not truth.any() and relations.shape == (0, 3)
    words = ["--preset", "sgdet-r50", "--data", tmp_path / "data", "--out", tmp_path / "run", "--head-epochs", "1"]
    result = run_paper("psg", [*words, *SMALL_HEADS, "--predcls", "imp", "--sgdet", "motifs", "vctree"])
    assert result.code == 0, result.err
    metrics_ = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {name.split("/")[2] for name in metrics_ if "/sgdet/" in name} == {"motifs", "vctree"}
    assert metrics_["psg/predcls/frequency/R@100"]["mean"] == 1.0  # both images are one record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("annotations/0/segments_info/0/category_id", 12, "no json of COCO panoptic results"),
        ("annotations/0/image_id", 5, "has no results for image 417720"),
        ("annotations/0/file_name", "no.png", "cannot be read as a PNG"),
        ("annotations/0/segments_info/0/id", 77, "absent from segments_info"),
    ],
)
def test_malformed_results(tmp_path: Path, path: str, value: Any, message: str):
    psg_file(tmp_path)
    results_file(tmp_path, edit(path, value))
    with pytest.raises(UserError, match=message):
        data.PanopticResults(tmp_path / "panoptic.json").find(417720, (640, 480))


# ---- runs and claims -------------------------------------------------------------------------------------------------


def fake_run(train: ModuleType, values: dict[str, float]) -> tuple[Any, dict[str, bool]]:
    from shared.paper import read_paper

    paper, verdicts = read_paper(Path(train.__file__).parent), {}
    run = SimpleNamespace(
        metrics={name: SimpleNamespace(mean=value) for name, value in values.items()},
        threshold=lambda claim, key="margin": float(paper.claim(claim).thresholds[key]),
        claim=lambda name, holds, **_: verdicts.__setitem__(name, bool(holds)),
    )
    return run, verdicts


def good_metrics(train: ModuleType) -> dict[str, float]:
    config = train.PRESETS["default"].config
    values = {}
    for arm, level in (("frequency", 0.2), ("imp", 0.6), ("gpsnet", 0.65), ("motifs", 0.7), ("vctree", 0.7)):
        values |= {f"scenes/predcls/{arm}/{m}@{config.ks[0]}": level for m in ("R", "mR")}
    for arm, level in (("psgtr", 0.95), ("psgformer", 0.95), ("psgformer_blind", 0.2)):
        values[f"scenes/overfit/{arm}/R@20"] = level
    for arm, recall, mean in (("psgtr", 0.6, 0.4), ("psgformer", 0.5, 0.45), ("motifs", 0.4, 0.2)):
        values |= {f"scenes/sgdet/{arm}/R@20": recall, f"scenes/sgdet/{arm}/mR@20": mean}
    return values


@pytest.mark.parametrize(
    ("claim", "metric", "value"),
    [
        ("heads_beat_frequency", "predcls/gpsnet/mR@10", 0.3),
        ("context_beats_imp", "predcls/imp/mR@10", 0.69),
        ("context_beats_gpsnet", "predcls/gpsnet/mR@10", 0.7),
        ("one_stage_nets_fit", "overfit/psgtr/R@20", 0.8),
        ("matching_finds_the_ends", "overfit/psgformer_blind/R@20", 0.9),
        ("psgtr_recalls_most", "sgdet/psgformer/R@20", 0.6),
        ("psgformer_is_less_biased", "sgdet/motifs/mR@20", 0.38),
    ],
)
def test_claims_can_fail(train: ModuleType, claim: str, metric: str, value: float):
    values, config = good_metrics(train), train.PRESETS["default"].config
    run, verdicts = fake_run(train, values)
    train.decide(config, run)
    assert len(verdicts) == 7 and all(verdicts.values())
    run, verdicts = fake_run(train, {**values, f"scenes/{metric}": value})
    train.decide(config, run)
    assert not verdicts[claim]


def ends_found(scenes: data.Scenes, train: ModuleType, blind: bool) -> float:
    """Share of relations whose query points at the object queries of both ends, after learning two scenes."""
    torch.manual_seed(0)
    net = PSGFormer(TinyTrunk(8), **{**TINY, "classes": 10, "predicates": 4, "queries": 12})
    adam = torch.optim.AdamW(net.parameters(), 2e-3)
    images, _, truth = train.collate([scenes[i] for i in (0, 1)])
    for _ in range(60):
        terms = net.loss(net(images), truth)
        adam.zero_grad()
        sum(value for name, value in terms.items() if not (blind and name.endswith("_id"))).backward()
        adam.step()
    with torch.no_grad():
        out = net(images)
        objects = net.match_objects(out, truth)[-1]
        right = many = 0
        for i in range(2):
            ends = [out[name][i].argmax(-1) for name in ("sub_id", "obj_id")]
            for s, o, _ in truth.relations[i, : truth.edges[i]].tolist():
                found = (ends[0] == objects[i, s]) & (ends[1] == objects[i, o])
                right, many = right + int(found.any()), many + 1
    return right / many


def test_psgformer_is_lost_without_its_matching(train: ModuleType, scenes: data.Scenes):
    """The claim on matching holds for the method and fails for the one that is broken."""
    whole, broken = (ends_found(scenes, train, blind) for blind in (False, True))
    config, name = train.PRESETS["default"].config, "matching_finds_the_ends"
    for value, holds in ((whole, True), (broken, False)):
        values = {"scenes/overfit/psgformer/R@20": value, "scenes/overfit/psgformer_blind/R@20": broken}
        run, verdicts = fake_run(train, {**good_metrics(train), **values})
        train.decide(config, run)
        assert verdicts[name] is holds, (whole, broken)


def test_smoke_resumes_exactly(run_paper: Any, tmp_path: Path):
    few = ["--predcls", "vctree", "--sgdet", "psgtr", "motifs", "--overfit", "psgformer", "--test-scenes", "4"]
    words = ["--preset", "smoke", *few]
    assert run_paper("psg", [*words, "--out", tmp_path / "whole"]).code == 0
    assert run_paper("psg", [*words, "--out", tmp_path / "part", "--stop-after", "6"]).code == 0
    assert not (tmp_path / "part" / "result.json").exists()
    assert run_paper("psg", ["--resume", tmp_path / "part", "--stop-after", "2"]).code == 0
    assert run_paper("psg", ["--resume", tmp_path / "part"]).code == 0
    whole, part = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "part"))
    assert whole["metrics"] == part["metrics"] and whole["claims"] == []
    assert (tmp_path / "whole" / "figure.png").stat().st_size < 300_000


def test_real_photographs_make_a_head_step(run_paper: Any, data_root: Path, tmp_path: Path):
    folder = data_root / "coco-panoptic-mini"
    if not folder.is_dir():
        pytest.skip("no coco-panoptic-mini")
    words = ["--preset", "coco-mini", "--data", folder, "--limit", "4", "--head-epochs", "1", "--seeds", "1"]
    result = run_paper("psg", [*words, "--out", tmp_path / "run"])
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {c["name"] for c in found["claims"]} == {"heads_beat_frequency", "context_beats_imp", "context_beats_gpsnet"}
    assert found["data"][0]["kind"] == "real"
