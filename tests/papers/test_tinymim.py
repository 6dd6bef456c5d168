"""TinyMIM: oracles of the relations, peers (timm, transformers), loaders, bad input, resume and the claims."""

from __future__ import annotations

import argparse
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from papers.tinymim import data, model
from papers.tinymim.model import SIZES, Classifier, Distiller, Size, VisionTransformer, relation, relation_kl
from shared.errors import UserError

NET = Size(24, 3, 3, 3)


def shake(net: nn.Module, scale: float = 0.2) -> Any:
    """Move every parameter off its start, so that no term is trivial."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += scale * torch.randn_like(parameter)
    return net


def vectors(batch: int = 2, heads: int = 3, tokens: int = 5, width: int = 4, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(batch, heads, tokens, width)


def plain_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """As the formula is written: softmax, logarithm, sum over columns, mean over the rest."""
    t, s = relation(*teacher), relation(*student)
    return (t * (t.log() - s.log())).sum(-1).mean()


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder", "classifier"),
    [
        ("tiny", 5_524_416, 5_717_416),
        ("small", 21_665_664, 22_050_664),
        ("base", 85_798_656, 86_567_656),
        ("large", 303_301_632, 304_326_632),
    ],
)
def test_parameters_of_the_paper(name: str, encoder: int, classifier: int) -> None:
    with torch.device("meta"):
        assert model.parameters(VisionTransformer(SIZES[name])) == encoder
        assert model.parameters(VisionTransformer(SIZES[name], last_heads=16 if name != "tiny" else 12)) == encoder
        assert model.parameters(Classifier(SIZES[name], 1000)) == classifier


def test_star_has_the_papers_size() -> None:
    with torch.device("meta"):
        net = Classifier(SIZES["star"], 1000, star=True)
        without_head = model.parameters(net) - model.parameters(net.head)
    assert round(without_head / 1e6, 1) == 5.8
    assert net.pos_embed.shape[1] == 198 and {block.attn.heads for block in net.blocks} == {12}


def test_every_preset_builds_at_full_size(train: ModuleType) -> None:
    assert tuple(model.SIZES) == train.SIZE_NAMES and model.RELATIONS == train.RELATION_NAMES
    tables = {"tiny": 37_824, "small": 75_648, "base": 151_296}
    without = {"tiny": 5_486_592, "small": 21_590_016, "base": 85_647_360}
    for name, preset in train.PRESETS.items():
        c = preset.config
        if c.dataset == "ade20k":
            continue  # test_segmenters_at_full_size
        with torch.device("meta"):
            teacher = VisionTransformer(SIZES[c.teacher], c.image, c.patch, c.teacher_last_heads or None)
            for arm_name in c.arms:
                arm = train.ARMS[arm_name]
                chain = train.stages(c, arm)
                block = (
                    teacher.depth
                    if arm.last_block
                    else c.block or model.target_block(teacher.depth, SIZES[chain[0]].depth)
                )
                heads = teacher.heads(block)
                for size in chain:
                    student = train.make_student(c, size, heads if arm.target == "relation" else None, c.drop_path)
                    if arm.how == "distil":
                        relations = arm.relations or c.relations
                        Distiller(student, teacher.width, heads, arm.target, relations, (1.0,) * len(relations))
                    if size in tables and c.image == 224:
                        assert model.parameters(student) - tables[size] == without[size], name
                assert model.parameters(Classifier(SIZES[c.student], 1000, c.image, c.patch, star=c.student == "star"))


def test_paper_configuration(train: ModuleType) -> None:
    c = train.PRESETS["imagenet-base"].config
    assert (c.batch, c.epochs, c.blr * c.batch / 256, c.warmup) == (4096, 300, pytest.approx(2.4e-3), 15)
    assert (c.tune_epochs, c.tune_batch, c.tune_blr, c.layer_decay, c.tune_drop_path) == (100, 1024, 5e-4, 0.65, 0.2)
    assert model.target_block(24, 12) == 18 and model.target_block(12, 12) == 12 and model.target_block(6, 4) == 5
    scratch = train.PRESETS["imagenet-tiny-scratch"].config  # DeiT: 5e-4 for 512 images a step
    assert (scratch.tune_epochs, scratch.tune_blr * 2, scratch.tune_warmup) == (300, 5e-4, 5)
    masked = train.PRESETS["imagenet-tiny-mae"].config
    assert (masked.mae_epochs, masked.warmup, masked.decoder, masked.mask_ratio) == (1600, 40, (512, 8, 16), 0.75)
    seg = train.PRESETS["ade20k-base"].config
    assert seg.tune_blr * seg.tune_batch / 256 == pytest.approx(1e-4) and seg.iterations == 160_000


def test_learning_rates() -> None:
    peak = 1.5e-4 * 4096 / 256
    assert model.cosine_lr(15, peak, 0.0, 15, 300) == pytest.approx(2.4e-3)
    assert model.cosine_lr(157.5, peak, 0.0, 15, 300) == pytest.approx(1.2e-3)
    assert model.cosine_lr(7.5, peak, 0.0, 15, 300) == pytest.approx(1.2e-3)
    assert model.cosine_lr(300, peak, 1e-6, 15, 300) == pytest.approx(1e-6)


def test_layer_decay_is_the_rule_of_beit() -> None:
    net = Classifier(SIZES["w48d4"], 10, 24, 4)
    groups = model.parameter_groups(net, 0.05, 4, 0.75, undecayed=model.TOKENS)
    where = {id(p): group for group in groups for p in group["params"]}
    assert len(where) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        layer = 0 if name.startswith(("cls", "pos", "patch")) else 5
        if name.startswith("blocks"):
            layer = int(name.split(".")[1]) + 1
        assert where[id(p)]["lr_scale"] == pytest.approx(0.75 ** (5 - layer)), name
        decays = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert where[id(p)]["weight_decay"] == (0.05 if decays else 0.0), name
    optimizer = torch.optim.AdamW(groups, 1.0)
    model.set_lr(optimizer, 2.0)
    assert max(group["lr"] for group in optimizer.param_groups) == 2.0


# ---- the transformer -------------------------------------------------------------------------------------------------


def test_positions_are_those_of_mae() -> None:
    width, grid = 16, 3
    table = model.sincos_positions(width, grid).double().numpy()
    assert not table[0].any()
    for row in range(grid):
        for column in range(grid):
            omega = [10000 ** -(i / 4) for i in range(4)]
            expected = []
            for place in (column, row):  # the column first, as in MAE's code
                expected += [math.sin(place * w) for w in omega] + [math.cos(place * w) for w in omega]
            np.testing.assert_allclose(table[1 + row * grid + column], expected, atol=1e-6)
    assert table[1].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4
    with pytest.raises(ValueError, match="multiple of 4"):
        model.sincos_positions(18, 3)


def test_positions_are_resampled() -> None:
    table = model.sincos_positions(16, 4)[None]
    assert model.resize_positions(table, 4) is table
    bigger = model.resize_positions(table, 6)
    assert bigger.shape == (1, 37, 16) and torch.equal(bigger[:, 0], table[:, 0])
    with pytest.raises(ValueError, match="no square grid"):
        model.resize_positions(table[:, :-1], 6)


def test_initialisation() -> None:
    net = VisionTransformer(SIZES["w128d6"], 32, 4)
    bound = math.sqrt(6 / (48 + 128))
    patches = net.patch_embed["proj"].weight.detach()
    assert float(patches.abs().max()) <= bound and float(patches.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not net.blocks[0].attn.qkv.bias.any() and float(net.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not net.pos_embed.requires_grad


def test_embedding_kept_patches_is_embedding_all_and_choosing() -> None:
    net = shake(VisionTransformer(NET, 16, 4))
    images = torch.randn(2, 3, 16, 16)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    whole, part = net.embed(images), net.embed(images, keep)
    expected = torch.stack([torch.cat([w[:1], w[1:][k]]) for w, k in zip(whole, keep, strict=True)])
    torch.testing.assert_close(part, expected)
    convolved = net.patch_embed["proj"](images).flatten(2).transpose(1, 2) + net.pos_embed[:, 1:]
    torch.testing.assert_close(whole[:, 1:], convolved)


def test_probe_gives_the_parts_of_a_block() -> None:
    net = shake(VisionTransformer(NET, 16, 4)).eval()
    images = torch.randn(2, 3, 16, 16)
    found = net.probe(images, 2, ("q", "attention", "ffn", "output"))
    x = net.blocks[0](net.embed(images))
    torch.testing.assert_close(found["output"], net.blocks[1](x))
    torch.testing.assert_close(x + found["attention"] + found["ffn"], found["output"])
    with pytest.raises(ValueError, match=r"block 4 is outside 1\.\.3"):
        net.probe(images, 4, ("q",))
    with pytest.raises(ValueError, match="made for 16 x 16"):
        net.embed(torch.randn(2, 3, 20, 20))
    with pytest.raises(ValueError, match="not divisible by patch size 4"):
        VisionTransformer(NET, 18, 4)
    with pytest.raises(ValueError, match="not divisible by 5 heads"):
        VisionTransformer(NET, 16, 4, last_heads=5)


def test_drop_path_is_constant_but_for_the_last_block() -> None:
    net = VisionTransformer(NET, 16, 4, drop_path=0.1)
    assert [block.drop_path.rate for block in net.blocks] == [0.1, 0.1, 0.0]
    tuned = Classifier(NET, 5, 16, 4, drop_path=0.2)
    assert [block.drop_path.rate for block in tuned.blocks] == pytest.approx([0, 0.1, 0.2])
    out = model.DropPath(0.3)(torch.ones(20_000, 2))
    assert float(out.mean()) == pytest.approx(1, abs=0.02) and torch.equal(out[:, 0], out[:, 1])
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_attention_maps_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = shake(model.Attention(24, 3), 0.5)
    theirs = timm.Attention(24, 3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 24)
    q, k, v = ours.project(x)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.fused_attn = False
    seen: list[Tensor] = []
    theirs.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    theirs(x)
    torch.testing.assert_close(relation(q, k), seen[0])
    eye = torch.eye(7).expand(2, 3, 7, 7)
    torch.testing.assert_close(relation(q, k), F.scaled_dot_product_attention(q, k, eye))
    torch.testing.assert_close(relation(v, v), F.scaled_dot_product_attention(v, v, eye))


def test_classifier_is_timms() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = shake(Classifier(NET, 7, 16, 4), 0.1).eval()
    theirs = timm.VisionTransformer(
        16, 4, num_classes=7, embed_dim=24, depth=3, num_heads=3, global_pool="avg", norm_layer=_norm
    ).eval()
    theirs.load_state_dict(ours.state_dict())  # same names, all of them
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-4)
    back = Classifier(NET, 7, 16, 4)
    assert model.load_encoder(back, theirs.state_dict()) == []
    torch.testing.assert_close(back.eval()(images), theirs(images), atol=1e-5, rtol=1e-4)


def _norm(width: int, **where: Any) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, **where)


# ---- relations -------------------------------------------------------------------------------------------------------


def test_hand_examples() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]]).view(1, 1, 2, 2)  # rows 0.75, 0.25
    eye = math.sqrt(2) * torch.eye(2).view(1, 1, 2, 2)
    zero = torch.zeros(1, 1, 2, 2)
    assert float(relation_kl((zero, zero), (logits, eye))) == pytest.approx(0.1308, abs=5e-5)
    n = 197
    one_hot = torch.full((1, 1, n, n), 0.0)
    one_hot[..., 5] = 1e4
    flat = torch.zeros(1, 1, n, 3)
    uniform = relation(flat, flat)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / n))
    identity = math.sqrt(n) * torch.eye(n).view(1, 1, n, n)
    assert float(relation_kl((flat, flat), (one_hot, identity))) == pytest.approx(math.log(n), abs=1e-4)
    assert float(relation_kl((flat, flat), (flat, flat))) == 0


@pytest.mark.parametrize("chunk", [1, 80, 1 << 21])
def test_value_and_gradients_are_those_of_the_plain_form(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "CHUNK", chunk)
    a, b = (vectors(3).requires_grad_() for _ in range(2))
    ta, tb = vectors(3, width=7), vectors(3, width=7)
    for student, teacher in (((a, b), (ta, tb)), ((a, a), (ta, ta))):  # Q-K; V-V, one tensor on both sides
        ours, plain = relation_kl(student, teacher), plain_kl(student, teacher)
        torch.testing.assert_close(ours, plain)
        inputs = list(dict.fromkeys(student))
        for g, p in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, inputs), strict=True):
            torch.testing.assert_close(g, p, atol=1e-6, rtol=1e-4)


def test_no_map_is_kept_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    a = vectors(2, 3, 40, 4).requires_grad_()

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        relation_kl((a, a), (vectors(2, 3, 40, 4),) * 2)
    assert saved and all(x.shape[-2:] == (40, 4) for x in saved)


def test_large_logits_stay_finite() -> None:
    a = torch.tensor([[[[200.0], [0.0], [-200.0]]]]).requires_grad_()
    loss = relation_kl((a, a), (-a.detach(), torch.ones_like(a)))
    loss.backward()
    assert loss.isfinite() and a.grad is not None and a.grad.isfinite().all()
    half = a.detach().bfloat16().requires_grad_()
    relation_kl((half, half), (half.detach(), half.detach())).backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_symmetries() -> None:
    q, k, v = (vectors().double() for _ in range(3))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.double)).Q
    torch.testing.assert_close(relation(q @ rotation, k @ rotation), relation(q, k))
    torch.testing.assert_close(relation(v @ rotation, v @ rotation), relation(v, v))
    logits = v @ v.transpose(-2, -1)
    torch.testing.assert_close(logits, logits.transpose(-2, -1))
    assert not torch.allclose(relation(v, v), relation(v, v).transpose(-2, -1))
    loss = relation_kl((q, k), (k, v))
    twice = relation_kl((torch.cat([q, q]), torch.cat([k, k])), (torch.cat([k, k]), torch.cat([v, v])))
    heads = relation_kl((torch.cat([q, q], 1), torch.cat([k, k], 1)), (torch.cat([k, k], 1), torch.cat([v, v], 1)))
    torch.testing.assert_close(loss, twice)
    torch.testing.assert_close(loss, heads)


def test_scale_is_that_of_the_head() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 5, 192)
    maps = {}
    for heads in (3, 6, 12):
        torch.manual_seed(2)
        attention = model.Attention(192, heads)
        q, k, _ = attention.project(x)
        expected = (q @ k.transpose(-2, -1) / math.sqrt(192 / heads)).softmax(-1)
        torch.testing.assert_close(relation(q, k), expected)
        maps[heads] = relation(q, k).mean(1)
    assert not torch.allclose(maps[3], maps[6]) and not torch.allclose(maps[6], maps[12])


def test_each_relation_depends_on_its_own_vectors() -> None:
    net = shake(VisionTransformer(NET, 16, 4)).eval()
    images = torch.randn(1, 3, 16, 16)

    def maps() -> tuple[Tensor, Tensor]:
        f = net.probe(images, 3, ("q", "k", "v"))
        return relation(f["q"], f["k"]), relation(f["v"], f["v"])

    qk, vv = maps()
    weight = net.blocks[2].attn.qkv.weight
    with torch.no_grad():
        weight[48:] += 1
        after = maps()
        assert torch.equal(after[0], qk) and not torch.allclose(after[1], vv)
        weight[:48] += torch.randn(48, 24)
        assert not torch.allclose(maps()[0], qk) and torch.equal(maps()[1], after[1])


# ---- distillation ----------------------------------------------------------------------------------------------------


def pair(**options: Any) -> tuple[VisionTransformer, Distiller, Tensor]:
    """A teacher of four heads, a student of three with an adaptive last block, and images."""
    teacher = model.freeze(shake(VisionTransformer(Size(32, 4, 4, 4), 16, 4)))
    heads = None if options.get("target", "relation") != "relation" else 4
    student = shake(VisionTransformer(NET, 16, 4, last_heads=heads))
    return teacher, Distiller(student, 32, 4, **options), torch.randn(2, 3, 16, 16)


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    net = shake(VisionTransformer(NET, 16, 4)).eval()
    student = VisionTransformer(NET, 16, 4)
    model.load_encoder(student, net.state_dict())
    distiller = Distiller(student.eval(), 24, 3)
    images = torch.randn(2, 3, 16, 16)
    out = distiller(images, model.teacher_targets(net, images, 3, distiller.names))
    assert all(abs(float(value.detach())) < 1e-6 for value in out.values())
    out["loss"].backward()
    for parameter in student.parameters():
        assert parameter.grad is None or float(parameter.grad.abs().max()) < 1e-6


def test_loss_is_the_sum_over_relations() -> None:
    teacher, distiller, images = pair(relations=("qk", "vv", "qq"), weights=(1.0, 2.0, 0.5))
    out = distiller(images, model.teacher_targets(teacher, images, 3, distiller.names))
    mine = distiller.student.probe(images, 3, ("q", "k", "v"))
    theirs = teacher.probe(images, 3, ("q", "k", "v"))
    parts = [plain_kl((mine[a], mine[b]), (theirs[a], theirs[b])) for a, b in ("qk", "vv", "qq")]
    torch.testing.assert_close(out["loss"], parts[0] + 2 * parts[1] + 0.5 * parts[2])
    torch.testing.assert_close(out["qk"], parts[0])


def test_what_takes_no_part_has_no_gradient() -> None:
    teacher, distiller, images = pair()
    distiller(images, model.teacher_targets(teacher, images, 3, distiller.names))["loss"].backward()
    silent = ("blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp", "norm.", "pos_embed")
    for name, parameter in distiller.student.named_parameters():
        if name.startswith(silent):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training


@pytest.mark.parametrize("target", model.TARGETS)
def test_every_parameter_that_may_learn_gets_a_gradient(target: str) -> None:
    teacher, distiller, images = pair(target=target)
    distiller(images, model.teacher_targets(teacher, images, 3, distiller.names))["loss"].backward()
    lost = [name for name, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost  # DistributedDataParallel would wait for them


def test_features_and_class_token() -> None:
    teacher, distiller, images = pair(target="ffn")
    targets = model.teacher_targets(teacher, images, 3, distiller.names)
    theirs = targets["ffn"]
    white = (theirs - theirs.mean(-1, keepdim=True)) / (theirs.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    difference = distiller.project(distiller.student.probe(images, 3, ("ffn",))["ffn"]) - white
    expected = torch.where(difference.abs() < 2, difference**2 / 4, difference.abs() - 1).mean()
    torch.testing.assert_close(distiller(images, targets)["loss"], expected)
    teacher, distiller, images = pair(target="cls")
    targets = model.teacher_targets(teacher, images, 3, distiller.names)
    c_s = distiller.project(distiller.student.probe(images, 3, ("output",))["output"][:, 0]).softmax(-1)
    c_t = targets["output"][:, 0].softmax(-1)
    torch.testing.assert_close(distiller(images, targets)["loss"], (c_t * (c_t.log() - c_s.log())).sum(-1).mean())


def test_masked_input_and_reconstruction() -> None:
    teacher, distiller, images = pair()
    mask = model.random_mask(torch.rand(2, 16))
    targets = model.teacher_targets(teacher, images, 3, distiller.names, mask.keep)
    assert targets["q"].shape == (2, 4, 5, 8)
    assert distiller(images, targets, mask.keep)["loss"].isfinite()
    student = shake(VisionTransformer(NET, 16, 4, last_heads=4))
    both = Distiller(student, 32, 4, decoder=model.MaeDecoder(student, 16, 1, 2))
    noise = torch.rand(2, 16)
    out = both(images, model.teacher_targets(teacher, images, 3, both.names), noise=noise)
    torch.testing.assert_close(out["loss"], out["qk"] + out["vv"] + out["reconstruction"])
    out["loss"].backward()
    assert not [n for n, p in both.named_parameters() if p.requires_grad and p.grad is None]


def test_a_distillation_token_is_left_out_of_the_relations() -> None:
    teacher, _, images = pair()
    student = VisionTransformer(NET, 16, 4, last_heads=4, distillation_token=True)
    distiller = Distiller(student, 32, 4)
    out = distiller(images, model.teacher_targets(teacher, images, 3, distiller.names))
    f = student.probe(images, 3, ("v",))["v"][:, :, [0, *range(2, 18)]]
    v = teacher.probe(images, 3, ("v",))["v"]
    torch.testing.assert_close(out["vv"], plain_kl((f, f), (v, v)))


def test_bad_arguments_of_distillation() -> None:
    student = VisionTransformer(NET, 16, 4)
    with pytest.raises(ValueError, match="last block has 3 heads, teacher's target block 12; set last_heads=12"):
        Distiller(student, 32, 12)
    with pytest.raises(ValueError, match="unknown target 'attn', expected one of relation, cls, output"):
        Distiller(student, 32, 3, target="attn")
    with pytest.raises(ValueError, match="expected among qk, vv, qq, kk"):
        Distiller(student, 32, 3, relations=("qv",))
    with pytest.raises(ValueError, match="expected 2 numbers of at least 0"):
        Distiller(student, 32, 3, weights=(1.0, -1.0))
    with pytest.raises(ValueError, match=r"5 tokens \(student\) and 6 tokens \(teacher\)"):
        relation_kl((vectors(), vectors()), (vectors(tokens=6), vectors(tokens=6)))
    with pytest.raises(ValueError, match="mask ratio 1"):
        model.random_mask(torch.rand(2, 4), 1.0)


# ---- masked autoencoding ---------------------------------------------------------------------------------------------


def test_masks() -> None:
    mask = model.random_mask(torch.rand(3, 196), 0.75)
    assert mask.keep.shape == (3, 49) and mask.masked.shape == (3, 147)
    together = torch.cat([mask.keep, mask.masked], 1)
    assert torch.equal(together.sort(1).values, torch.arange(196).expand(3, -1))
    assert torch.equal(together.gather(1, mask.restore), torch.arange(196).expand(3, -1))


def test_predicting_the_target_has_no_loss() -> None:
    images = torch.randn(2, 3, 16, 16)
    mask = model.random_mask(torch.rand(2, 16))
    target = model.mae_target(images, 4)
    exact = target.gather(1, mask.masked[..., None].expand(-1, -1, 48))
    assert float(model.reconstruction_loss(exact, images, mask, 4)) == 0
    assert float(model.reconstruction_loss(exact + 1, images, mask, 4)) == pytest.approx(1, abs=1e-5)


def test_masked_autoencoder_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=16, patch_size=4,
        decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    encoder = shake(VisionTransformer(NET, 16, 4), 0.05)
    ours = model.Mae(encoder, shake(model.MaeDecoder(encoder, 16, 2, 2), 0.05)).eval()
    theirs.load_state_dict(_named_as_in_transformers(ours))
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        expected = theirs(images, noise=noise).loss
        torch.testing.assert_close(ours(images, noise)["loss"], expected, atol=1e-5, rtol=1e-4)


def _named_as_in_transformers(mae: model.Mae) -> dict[str, Tensor]:
    """Our weights under transformers' names."""
    ours = {f"vit.{k}": v for k, v in mae.encoder.state_dict().items()}
    ours |= {f"decoder.{k}": v for k, v in mae.decoder.state_dict().items()}
    renamed = {}
    for name, value in ours.items():
        for old, new in (
            ("vit.cls_token", "vit.embeddings.cls_token"),
            ("vit.pos_embed", "vit.embeddings.position_embeddings"),
            ("vit.patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            ("vit.norm.", "vit.layernorm."),
            ("vit.blocks", "vit.layers"),
            ("decoder.blocks", "decoder.decoder_layers"),
            ("decoder.embed", "decoder.decoder_embed"),
            ("decoder.pos_embed", "decoder.decoder_pos_embed"),
            ("decoder.norm", "decoder.decoder_norm"),
            ("decoder.pred", "decoder.decoder_pred"),
            (".norm1.", ".layernorm_before."),
            (".norm2.", ".layernorm_after."),
            (".attn.proj.", ".attention.o_proj."),
        ):
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
        else:
            renamed[name] = value
    return renamed


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_mae_load() -> None:
    net = shake(VisionTransformer(NET, 16, 4))
    state = net.state_dict()
    released = {"model": {**state, "mask_token": torch.zeros(1), "decoder_blocks.0.x": torch.zeros(1)}}
    other = VisionTransformer(NET, 16, 4, last_heads=12)  # the heads are not in the weights
    assert model.load_encoder(other, model.official_state(released)) == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
    tuned = Classifier(NET, 5, 24, 4)  # another grid
    missing = model.load_encoder(tuned, model.official_state(released))
    assert missing == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    torch.testing.assert_close(tuned.pos_embed.detach(), model.resize_positions(state["pos_embed"], 6))


def test_bad_checkpoints() -> None:
    net = VisionTransformer(NET, 16, 4)
    state = net.state_dict()
    with pytest.raises(ValueError, match=r"no key 'model' with the weights, found \['epoch', 'state_dict'\]"):
        model.official_state({"state_dict": state, "epoch": 3})
    with pytest.raises(ValueError, match="fine-tuned network"):
        model.official_state({"model": {**state, "head.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match="none of the"):
        model.load_encoder(net, {"a.b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lacks 12 tensors: blocks\.1"):
        model.load_encoder(net, {k: v for k, v in state.items() if not k.startswith("blocks.1")})
    with pytest.raises(ValueError, match=r"cls_token is \(1, 1, 32\) in the checkpoint, expected \(1, 1, 24\)"):
        model.load_encoder(net, {**state, "cls_token": torch.zeros(1, 1, 32)})


def test_checkpoint_files(train: ModuleType, tmp_path: Path) -> None:
    net = VisionTransformer(NET, 16, 4)
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(epochs=1)}, tmp_path / "mae.pth")
    assert set(train.read_checkpoint(tmp_path / "mae.pth")) == set(net.state_dict())
    with pytest.raises(UserError, match="no file"):
        train.read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    torch.save({"model": print}, tmp_path / "code.pth")
    for name in ("text.pth", "cut.safetensors", "code.pth"):
        with pytest.raises(UserError, match="checkpoint"):
            train.read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=r"mae\.pth: .*cls_token is"):
        train.load(VisionTransformer(SIZES["w32d3"], 16, 4), train.read_checkpoint(tmp_path / "mae.pth"), "mae.pth")


def test_the_shipped_teacher(train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with safe_open(str(train.SHIPPED), "pt") as file:
        about = file.metadata()
    assert about["licence"].startswith("MIT") and "generated" in about["data"] and "teacher" in about["command"]
    c = train.PRESETS["default"].config
    net = VisionTransformer(SIZES[c.teacher], c.image, c.patch)
    assert model.load_encoder(net, train.shipped_teacher()) == ["pos_embed"]
    monkeypatch.setattr(train, "SHIPPED", tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match=r"make it with: uv run train\.py --preset teacher"):
        train.shipped_teacher()


# ---- data ------------------------------------------------------------------------------------------------------------


def shapes(per_class: int = 4, seed: int = 0) -> data.Images:
    return data.generate_shapes(per_class, 24, torch.Generator().manual_seed(seed))


def test_shapes() -> None:
    made, again, other = shapes(), shapes(), shapes(seed=1)
    assert torch.equal(made.pixels, again.pixels) and not torch.equal(made.pixels, other.pixels)
    assert made.pixels.shape == (40, 3, 24, 24) and made.labels.bincount().tolist() == [4] * 10
    assert made.pixels.float().std() > 30
    axis = torch.linspace(-1.2, 1.2, 121)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    areas = {name: float((shape(x[None], y[None]) < 0).float().mean()) for name, shape in data.SHAPES.items()}
    assert all(0.05 < area < 0.5 for area in areas.values()), areas
    assert data._ring(torch.zeros(1), torch.zeros(1)) > 0 and data._disc(torch.zeros(1), torch.zeros(1)) < 0


def test_views_share_the_crop_and_only_the_students_colours_change() -> None:
    made = shapes(20)
    index = torch.arange(60)
    theirs, mine = made.batch("pretrain", index, 3, geometric=True, jitter=0.4)
    plain, same = made.batch("pretrain", index, 3, geometric=True, jitter=0.0)
    assert torch.equal(theirs, plain) and torch.equal(plain, same) and not torch.allclose(theirs, mine)
    contrast = torch.corrcoef(torch.stack([theirs.mean(1).flatten(), mine.mean(1).flatten()]))[0, 1]
    assert contrast > 0.5  # the same places
    fixed, _ = made.batch("pretrain", index, 3, geometric=False, jitter=0.4)
    torch.testing.assert_close(fixed, made.batch("test", index, 0, geometric=False, jitter=0.0)[0])
    torch.testing.assert_close(fixed, made.normalised(made.pixels[index].float() / 255))


def test_flip_and_shift_moves_images() -> None:
    images = torch.arange(36.0).view(1, 1, 6, 6).expand(200, 3, 6, 6)
    out = data.flip_and_shift(images, 1, torch.Generator().manual_seed(0))
    padded = F.pad(images[:1], (1,) * 4, mode="replicate")
    crops = [padded[0, :, t : t + 6, s : s + 6] for t in range(3) for s in range(3)]
    crops += [crop.flip(-1) for crop in crops]
    mirrored = F.pad(images[:1].flip(-1), (1,) * 4, mode="replicate")
    crops += [mirrored[0, :, t : t + 6, s : s + 6] for t in range(3) for s in range(3)]
    found = {next(i for i, crop in enumerate(crops) if torch.equal(crop, image)) for image in out}
    assert len(found) > 10


def test_colour_jitter_is_torchvisions() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(3, 3, 5, 5)
    ours = data.colour_jitter(images, 0.4, torch.Generator().manual_seed(0))
    factors = 0.6 + 0.8 * torch.rand(3, 3, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        x = functional.adjust_brightness(images[i], float(factors[0, i]))
        x = functional.adjust_contrast(x, float(factors[1, i]))
        torch.testing.assert_close(ours[i], functional.adjust_saturation(x, float(factors[2, i])), atol=2e-3, rtol=0)


def test_balanced() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    chosen = data.balanced(labels, 30, torch.Generator().manual_seed(0))
    assert labels[chosen].bincount().tolist() in ([14, 3, 13], [13, 3, 14])
    assert len(data.balanced(labels, 0, torch.Generator())) == 103


def write_binary_cifar(folder: Path, rows: int = 20) -> Path:
    path = folder / "cifar-10-batches-bin"
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        table = rng.integers(0, 256, (rows, data.CIFAR_ROW), dtype=np.uint8)
        table[:, 0] = np.arange(rows) % 10
        table.tofile(path / name)
    return path


def test_binary_cifar(tmp_path: Path) -> None:
    path = write_binary_cifar(tmp_path)
    sets = data.load_cifar10(tmp_path)
    assert (len(sets["train"]), len(sets["test"])) == (40, 20)
    raw = np.fromfile(path / "test_batch.bin", dtype=np.uint8).reshape(20, -1)
    assert sets["test"].labels.tolist() == (np.arange(20) % 10).tolist()
    assert sets["test"].pixels[3, 1, 2, 5] == raw[3, 1 + 1024 + 2 * 32 + 5]
    bad = np.fromfile(path / "test_batch.bin", dtype=np.uint8)
    bad[data.CIFAR_ROW] = 11
    bad.tofile(path / "test_batch.bin")
    with pytest.raises(UserError, match=r"label 11 of image 1, expected 0\.\.9"):
        data.load_cifar10(tmp_path)
    (path / "test_batch.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="has 3 bytes, expected a multiple of 3073"):
        data.load_cifar10(tmp_path)
    (path / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"no test_batch\.bin there"):
        data.load_cifar10(tmp_path)
    with pytest.raises(UserError, match="not in"):
        data.load_cifar10(tmp_path / "elsewhere")


def save_image(path: Path, side: int = 40, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(path)
    return path


def test_cifar_archive(tmp_path: Path) -> None:
    def pack(members: dict[str, Path]) -> None:
        with tarfile.open(tmp_path / data.CIFAR_JPEG, "w:xz") as archive:
            for name, file in members.items():
                archive.add(file, name)

    good = tmp_path / "a.jpg"
    Image.new("RGB", (32, 32), (200, 10, 10)).save(good)
    members = {f"{split}/{name}/0000.jpg": good for split in ("train", "test") for name in ("cat", "truck")}
    pack(members)
    sets = data.load_cifar10(tmp_path)
    assert sets["train"].labels.tolist() == [3, 9] and sets["test"].pixels.shape == (2, 3, 32, 32)
    assert int(sets["train"].pixels[0, 0].min()) > 150
    pack({**members, "train/cow/0.jpg": good})
    with pytest.raises(UserError, match="of no class of CIFAR-10"):
        data.load_cifar10(tmp_path)
    pack({**members, "train/cat/1.jpg": save_image(tmp_path / "big.jpg")})
    with pytest.raises(UserError, match="48 x 40, expected 32 x 32"):
        data.load_cifar10(tmp_path)
    pack({name: file for name, file in members.items() if name.startswith("train")})
    with pytest.raises(UserError, match="no test/<class>"):
        data.load_cifar10(tmp_path)
    (tmp_path / data.CIFAR_JPEG).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable tar archive"):
        data.load_cifar10(tmp_path)


@pytest.mark.slow
def test_real_cifar(data_root: Path, run_paper: Any) -> None:
    if not (data_root / "cifar10-jpeg-mini").is_dir():
        pytest.skip("no cifar10-jpeg-mini")
    out = run_paper("tinymim", ["--preset", "cifar10", "--data", str(data_root), "--check-data"]).out
    assert "train: 15000 images (as expected)" in out and "test: 3000 images (as expected)" in out


def write_imagenet(root: Path, side: int = 40, a_class: int = 4) -> list[str]:
    """Three classes in ImageNet's layout; returns their names."""
    names = ["n01440764", "n01443537", "n01484850"]
    for i, name in enumerate(names):
        for j in range(a_class):
            save_image(root / "train" / name / f"{name}_{j}.JPEG", side, 10 * i + j)
        for j in range(2):
            save_image(root / "val" / name / f"ILSVRC2012_val_{i}{j}.JPEG", side, 100 + 10 * i + j)
    return names


def test_folders_of_imagenet(tmp_path: Path) -> None:
    names = write_imagenet(tmp_path)
    files, labels, found = data.scan_classes(tmp_path / "train")
    assert found == names and labels == [0] * 4 + [1] * 4 + [2] * 4
    part = tmp_path / "imagenet-a" / names[2]
    save_image(part / "x.jpg")
    assert data.scan_classes(tmp_path / "imagenet-a", names)[1] == [2]
    how = data.Augmentation(16)
    pairs = data.FolderImages(files, labels, "pretrain", how)
    before = torch.get_rng_state()
    theirs, mine = pairs[(3, 17)]
    assert torch.equal(before, torch.get_rng_state())  # the global generators are left as they were
    again = pairs[(3, 17)]
    assert torch.equal(theirs, again[0]) and torch.equal(mine, again[1]) and not torch.equal(theirs, pairs[(3, 18)][0])
    assert theirs.shape == (3, 16, 16) and not torch.allclose(theirs, mine)
    image, label = data.FolderImages(files, labels, "tune", how)[(5, 1)]
    assert image.shape == (3, 16, 16) and int(label) == 1
    test = data.FolderImages(files, labels, "test", how)
    assert torch.equal(test[(0, 0)][0], test[(0, 9)][0])
    with pytest.raises(UserError, match="no class folders"):
        data.scan_classes(tmp_path / "train" / names[0])
    with pytest.raises(UserError, match=r"no such class among the 1"):
        data.scan_classes(tmp_path / "train", names[:1])
    flat, _ = data.scan_unlabelled(tmp_path / "train" / names[0])
    assert len(flat) == 4  # pre-training needs no classes
    with pytest.raises(UserError, match="no images in"):
        data.scan_unlabelled(tmp_path / "nowhere")
    files[0].write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(UserError, match="not a readable image"):
        test[(0, 0)]


def test_real_imagenet_pictures(data_root: Path, tmp_path: Path) -> None:
    archive = data_root / "imagenet-one-per-class-mini" / "imagenet-one-per-class-mini.tar"
    if not archive.is_file():
        pytest.skip("no imagenet-one-per-class-mini")
    with tarfile.open(archive) as opened:
        members = [m for m in opened.getmembers() if m.isfile()]
        assert len(members) == 1000
        opened.extractall(tmp_path, members[::400], filter="data")
    files, labels, names = data.scan_classes(tmp_path)
    images = data.FolderImages(files, labels, "test", data.Augmentation(224))
    batch = torch.stack([images[(i, 0)][0] for i in range(len(files))])
    with torch.no_grad():
        logits = Classifier(SIZES["tiny"], 1000).eval()(batch)
    assert len(names) == 3 and logits.shape == (3, 1000) and logits.isfinite().all()


def test_a_feed_is_a_function_of_the_step(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    files, labels, _ = data.scan_classes(tmp_path / "train")
    order = [torch.arange(12)[i * 4 : i * 4 + 4].flip(0) for i in range(3)]

    def share(positions: Tensor) -> list[tuple[Tensor, float]]:
        return [(part, len(part) / len(positions)) for part in positions.tensor_split(2)]

    def feed(source: Any, **options: Any) -> data.Feed:
        return data.Feed(source, "pretrain", lambda step: order[step], share, ("views", 0), 3, **options)

    for source, options in (
        (data.FolderImages(files, labels, "pretrain", data.Augmentation(16)), {}),
        (shapes(2), {"geometric": True, "jitter": 0.4}),
    ):
        whole, late = feed(source, **options), feed(source, **options)
        steps = [whole(step) for step in range(3)]
        resumed = late(2)
        assert [len(parts) for parts in steps] == [2, 2, 2]
        for a, b in zip(steps[2], resumed, strict=True):
            assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[0][1], b[0][1]) and torch.equal(a[1], b[1])
        assert not torch.equal(steps[1][0][0][0], steps[2][0][0][0])


def test_corruptions(tmp_path: Path) -> None:
    assert len(data.CORRUPTIONS) == 15 and np.mean(list(data.CORRUPTIONS.values())) == pytest.approx(0.79, abs=0.02)
    for name in data.CORRUPTIONS:
        for severity in range(1, 6):
            (tmp_path / name / str(severity)).mkdir(parents=True)
    assert len(list(data.corruption_folders(tmp_path))) == 75
    (tmp_path / "snow" / "4").rmdir()
    with pytest.raises(UserError, match=r"no .*snow/4, expected 15 corruptions"):
        list(data.corruption_folders(tmp_path))


def write_ade20k(root: Path) -> None:
    for split, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            base = root / "ADEChallengeData2016"
            save_image(base / "images" / split / f"ADE_{i}.jpg", 40, i)
            truth = np.zeros((40, 48), dtype=np.uint8)
            truth[:, 10:] = 1 + i
            truth[20:] = 150
            (base / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(truth).save(base / "annotations" / split / f"ADE_{i}.png")


def test_ade20k(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    pairs = data.scan_ade20k(tmp_path, "training")
    train = data.Ade20k(pairs, 64)
    image, truth = train[(1, 5)]
    assert image.shape == (3, 64, 64) and truth.shape == (64, 64)
    assert set(truth.unique().tolist()) <= {1, 149, 255}  # 0 is ignored, the others move down by one
    again = train[(1, 5)]
    assert torch.equal(image, again[0]) and torch.equal(truth, again[1])
    shown, labels = data.Ade20k(pairs, None)[(0, 0)]
    assert shown.shape == (3, 512, 614) and labels.shape == (40, 48) and int(labels[0, 0]) == 255
    assert data._rescaled(300, 400, 1.0) == (512, 683) and data._rescaled(100, 1000, 1.0) == (205, 2048)
    Image.fromarray(np.full((40, 48), 151, dtype=np.uint8)).save(pairs[0][1])
    with pytest.raises(UserError, match="labels up to 151"):
        train[(0, 0)]
    pairs[2][1].unlink()
    with pytest.raises(UserError, match=r"1 annotations are missing"):
        data.scan_ade20k(tmp_path, "training")


# ---- segmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def segmentation(train: ModuleType) -> ModuleType:
    import sys

    return sys.modules["segmentation"]


@pytest.mark.parametrize("extra", [1, 2])
def test_relative_positions(segmentation: ModuleType, extra: int) -> None:
    grid = 3
    index = segmentation.relative_index(grid, extra)
    offsets = (2 * grid - 1) ** 2
    for a in range(grid**2):
        for b in range(grid**2):
            rows, columns = a // grid - b // grid + grid - 1, a % grid - b % grid + grid - 1
            assert int(index[extra + a, extra + b]) == rows * (2 * grid - 1) + columns
    last = offsets + 3 * extra
    assert index[0, 1:].eq(last - 3).all() and index[1:, 0].eq(last - 2).all() and int(index[0, 0]) == last - 1
    if extra == 2:
        assert int(index[1, 1]) == offsets + 2 and index[1, 2:].eq(offsets).all() and index[2:, 1].eq(offsets + 1).all()


def test_backbone_without_bias_is_the_classifiers_transformer(segmentation: ModuleType) -> None:
    size = Size(24, 12, 3, 3)
    net = segmentation.Backbone(size, 64, 16, 0.0).eval()
    encoder = shake(VisionTransformer(size, 64, 16), 0.05)
    missing = model.load_encoder(net, encoder.state_dict())
    assert any("relative_position_bias_table" in name for name in missing) and any("gamma_1" in n for n in missing)
    images = torch.randn(2, 3, 64, 64)
    x = encoder.embed(images)
    for block in encoder.blocks:
        x = block(x)
    maps = net(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 16, 16), (24, 8, 8), (24, 4, 4), (24, 2, 2)]
    expected = F.max_pool2d(x[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), 2)
    torch.testing.assert_close(maps[3], expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        net.blocks[0].attn.relative_position_bias_table += 1.0  # a constant disappears in the softmax
    torch.testing.assert_close(net(images)[3], maps[3], atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        net.blocks[0].attn.relative_position_bias_table += torch.randn(52, 3)
    assert not torch.allclose(net(images)[3], maps[3], atol=1e-3)


def test_segmenters_at_full_size(train: ModuleType) -> None:
    for name, preset in train.PRESETS.items():
        if preset.config.dataset == "ade20k":
            with torch.device("meta"):
                net = train.make_segmenter(preset.config)
            assert net.decode_head.classifier[1].out_channels == 150, name
            groups = model.parameter_groups(net, 0.05, 12, preset.config.layer_decay, "backbone.", model.TOKENS)
            scales = {round(group["lr_scale"], 6) for group in groups}
            assert len(scales) == 14 and max(scales) == 1


def test_sliding_window(segmentation: ModuleType) -> None:
    def pixelwise(x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], 2 * x[:, 1]], 1)

    for size in ((50, 83), (20, 40), (32, 32)):
        image = torch.randn(3, *size)
        out = segmentation.slide(pixelwise, image, 2, crop=32, stride=21)
        torch.testing.assert_close(out, pixelwise(image[None])[0])


def test_segmentation_scores(segmentation: ModuleType) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, guess = torch.randint(0, 5, (400,)), torch.randint(0, 5, (400,))
    truth[:50] = 255
    counts = segmentation.confusion(guess, truth, 5)
    valid = truth < 255
    t, g = truth[valid].numpy(), guess[valid].numpy()
    scores = segmentation.segmentation_scores(counts)
    assert scores["miou"] == pytest.approx(metrics.jaccard_score(t, g, average="macro"))
    assert scores["macc"] == pytest.approx(metrics.balanced_accuracy_score(t, g))
    assert scores["aacc"] == pytest.approx(metrics.accuracy_score(t, g))


# ---- the command -----------------------------------------------------------------------------------------------------

TOY_FLAGS = (
    "--image 16 --student w24d2 --teacher w32d3 --teacher-from trained --assistants w32d3 --teacher-images 60 "
    "--teacher-batch 20 --teacher-epochs 1 --decoder 16 1 2 --epochs 2 --mae-epochs 1 --batch 20 --unlabelled 40 "
    "--labels 40 --test 100 --tune-epochs 2 --tune-batch 20 --seeds 1"
)
TOY = TOY_FLAGS.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arms tinymim clip", "expected different ones among scratch, mae, tinymim"),
        ("--student giant", "--student: unknown size 'giant'"),
        ("--relations qk qv", "expected among qk, vv, qq, kk"),
        ("--weights 1 -1", "expected 2 numbers of at least 0"),
        ("--mask-ratio 1", "--mask-ratio is 1.0, expected a number between 0 and 1"),
        ("--image 25", "--image is 25: not divisible by --patch 4"),
        ("--drop-path 1", "--drop-path is 1.0, expected 0 or more and less than 1"),
        ("--epochs 0", "--epochs is 0, expected at least 1"),
        ("--decoder 30 1 4", "--decoder 30 1 4: expected a width divisible by 4 and by the heads"),
        ("--arms sequential --assistants w48d4", "expected different sizes, not the student's"),
        ("--teacher-from trained --teacher w32d3 --block 5", "--block is 5: the teacher has 3 blocks"),
        ("--dataset imagenet", "--dataset imagenet needs --data DIR"),
        ("--preset imagenet-tiny", "needs --data DIR"),
        ("--dataset ade20k", "needs --pretrained FILE"),
        ("--blr nan", "--blr is nan, expected more than 0"),
        ("--pretrained x.pth", "--pretrained x.pth is one student: expected one of --arms"),
        ("--tune-epochs 0", "only for one arm with --pretrained FILE, a fine-tuned network"),
    ],
)
def test_bad_usage(words: str, message: str, refuses: Callable[..., None]) -> None:
    toy = f"{TOY_FLAGS} --arms tinymim " if "--block" in words else ""
    refuses((toy + words).split(), message)


def test_bad_data(refuses: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = write_imagenet(folder)
    torch.save({"state_dict": {}}, folder / "TinyMIM-PT-S.pth")
    refuses(["--preset", "imagenet-tiny", "--data", str(folder), "--check-data"], "has no key 'model'")
    refuses(["--preset", "cifar10", "--data", str(folder)], "expected cifar-10-batches-bin/data_batch_*.bin")
    refuses(["--preset", "ade20k-base", "--data", str(folder), "--check-data"], "images/training")
    for image in (folder / "val" / names[0]).iterdir():
        image.unlink()
    (folder / "val" / "other").mkdir()
    refuses(["--preset", "imagenet-tiny", "--data", str(folder), "--check-data"], "no such class among the 3")


def test_imagenet_from_folders(run_paper: Any, tmp_path: Path) -> None:
    """Distil from an official checkpoint, fine-tune with mixup, test on the robustness sets; resume gives the same."""
    folder = tmp_path / "in"
    names = write_imagenet(folder, 36)
    save_image(folder / "imagenet-a" / names[1] / "a.jpg", 36)
    for name in data.CORRUPTIONS:
        for severity in range(1, 6):
            save_image(folder / "imagenet-c" / name / str(severity) / names[0] / "c.JPEG", 36)
    teacher = VisionTransformer(SIZES["w32d3"], 32, 16)
    torch.save({"model": teacher.state_dict()}, folder / "t.pth")
    words = (
        "--preset imagenet-tiny --student w24d2 --teacher w32d3 --teacher-last-heads 0 --teacher-from t.pth --image 32"
    )
    words += " --batch 6 --micro-batch 2 --epochs 1 --tune-epochs 1 --tune-batch 6 --workers 0 --device cpu --data"
    argv = [*words.split(), str(folder)]
    whole = run_paper("tinymim", [*argv, "--out", str(tmp_path / "whole")])
    assert whole.code == 0, whole.err
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    metrics = result["metrics"]
    assert {"imagenet/w24d2/tinymim/top1", "imagenet-a/w24d2/tinymim/top1"} <= set(metrics)
    assert metrics["imagenet-a/w24d2/tinymim/top1"]["mean"] == 1  # one class is there, so it is the answer
    errors = metrics["imagenet-c/w24d2/tinymim/mean_error"]["mean"]
    assert errors in (0, 1) and metrics["imagenet-c/w24d2/tinymim/mce"]["mean"] == pytest.approx(
        errors * np.mean([1 / base for base in data.CORRUPTIONS.values()])
    )
    part = tmp_path / "part"
    assert run_paper("tinymim", [*argv, "--out", str(part), "--stop-after", "3"]).code == 0
    assert run_paper("tinymim", ["--resume", str(part)]).code == 0
    assert json.loads((part / "result.json").read_text())["metrics"] == metrics


def test_tuned_weights_are_tested_as_they_are(run_paper: Any, refuses: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = write_imagenet(folder)
    words = "--preset imagenet-tiny --student w24d2 --pretrained ft.pth --tune-epochs 0 --image 32 --workers 0 --data"
    argv = [*words.split(), str(folder)]
    net = Classifier(SIZES["w24d2"], len(names), 32, 16)
    torch.save({"model": VisionTransformer(SIZES["w24d2"], 32, 16).state_dict()}, folder / "ft.pth")
    refuses(argv, "head.weight: --tune-epochs 0 expects a fine-tuned network")
    with torch.no_grad():
        net.head.bias[1] = 9.0  # always the second class
    torch.save({"model": net.state_dict()}, folder / "ft.pth")
    out = tmp_path / "tested"
    done = run_paper("tinymim", [*argv, "--out", str(out)])
    assert done.code == 0, done.err
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    assert metrics["imagenet/w24d2/tinymim/top1"]["mean"] == pytest.approx(1 / 3)
    assert not [name for name in metrics if "loss" in name]


def test_ade20k_from_folders(run_paper: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_ade20k(folder)
    student = VisionTransformer(SIZES["tiny"], 32, 16)
    torch.save({"model": student.state_dict()}, folder / "TinyMIM-PT-T.pth")
    words = "--preset ade20k-tiny --image 32 --channels 8 --tune-batch 2 --iterations 2 --stride 600 --workers 0 --data"
    argv = [*words.split(), str(folder)]
    assert "training: 3 images (EXPECTED 20210)" in run_paper("tinymim", [*argv, "--check-data"]).out
    done = run_paper("tinymim", [*argv, "--out", str(tmp_path / "run")])
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert 0 <= metrics["ade20k/tiny/tinymim/miou"]["mean"] <= 1


def test_targets_of_fixed_views_are_those_computed_anew(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    fresh = train.Problem.targets

    def compared(self: Any, teacher: Any, block: int, names: Any, key: Any, fixed: bool) -> Any:
        cached, plain = (fresh(self, teacher, block, names, key, how) for how in (fixed, False))

        def both(index: Tensor, view: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
            a, b = cached(index, view, keep), plain(index, view, keep)
            for name in names:
                torch.testing.assert_close(a[name], b[name], atol=3e-3, rtol=3e-3)
            calls.append(fixed)
            return a

        return both

    monkeypatch.setattr(train.Problem, "targets", compared)
    argv = [*TOY, "--arms", "tinymim", "masked_input", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert set(calls) == {True, False}


@pytest.mark.slow
def test_a_broken_method_fails_its_claims(train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the shipped teacher: claims hold, and fail with a relation loss that has no gradient."""

    def run(name: str, epochs: int) -> tuple[dict[str, bool], dict[str, Any]]:
        sizes = f"--unlabelled 1600 --epochs {epochs} --tune-epochs 8 --test 1000 --seeds 1"
        argv = [*sizes.split(), "--arms", "scratch", "untrained_teacher", "tinymim", "--out", str(tmp_path / name)]
        assert train.main(argv) == 0
        result = json.loads((tmp_path / name / "result.json").read_text())
        return {claim["name"]: claim["holds"] for claim in result["claims"]}, result["metrics"]

    claims, _ = run("sound", 4)
    assert claims == {"beats_scratch": True, "teacher_matters": True}
    module = train.Distiller.__init__.__globals__
    right = module["relation_kl"]
    monkeypatch.setitem(module, "relation_kl", lambda s, t: right(tuple(x.detach() for x in s), t) + 0 * s[0].sum())
    claims, broken = run("broken", 1)  # weights decay and nothing else: more epochs would not help
    assert broken["shapes/w48d4/tinymim/top1"] == broken["shapes/w48d4/untrained_teacher/top1"]
    assert claims["teacher_matters"] is False


def test_a_loss_that_is_not_finite_names_the_term(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = train.Distiller.__init__.__globals__
    right = module["relation_kl"]
    monkeypatch.setitem(module, "relation_kl", lambda s, t: right(s, t) * (math.nan if s[0] is s[1] else 1))
    assert train.main([*TOY, "--arms", "tinymim", "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "vv is nan at step 0 of 0/tinymim/pretrain-w24d2" in lines[0]


def test_claims_read_their_margins(train: ModuleType) -> None:
    """Each claim compares the arms that it names, and fails just below its margin."""
    from types import SimpleNamespace

    from shared.paper import read_paper

    paper = read_paper(train.HERE)
    c = train.PRESETS["default"].config
    others = {"beats_scratch": "scratch", "beats_mae": "mae", "teacher_matters": "untrained_teacher"}
    others |= {"relations_beat_features": "feature", "relations_beat_cls": "cls"}
    assert set(others) == {claim.name for claim in paper.claims}
    for gap, expected in ((1e-6, True), (-1e-6, False)):
        margins = {other: paper.claim(name).thresholds["margin"] for name, other in others.items()}
        values = {"tinymim": 0.7} | {other: 0.7 - margin - gap for other, margin in margins.items()}
        metrics = {f"shapes/w48d4/{arm}/top1": SimpleNamespace(mean=value) for arm, value in values.items()}
        said: dict[str, bool] = {}
        run = SimpleNamespace(
            metrics=metrics,
            threshold=lambda name: paper.claim(name).thresholds["margin"],
            claim=lambda name, holds, said=said, **_: said.update({name: bool(holds)}),
        )
        train.decide(c, run)
        assert said == dict.fromkeys(others, expected)


def test_the_teacher_is_exported(train: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "made" / "teacher.safetensors"
    argv = ["--preset", "teacher", *TOY, "--export", str(path), "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    net = VisionTransformer(SIZES["w32d3"], 16, 4)
    assert model.load_encoder(net, train.read_checkpoint(path)) == ["pos_embed"]
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert 0 <= metrics["shapes/teacher/block_3_probe_top1"]["mean"] <= 1
