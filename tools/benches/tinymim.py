"""TinyMIM: distillation steps and their parts beside the straightforward forms and peers (same weights and sizes)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.tinymim import data, model
from papers.tinymim.model import SIZES, Distiller, Size, VisionTransformer
from tools.bench import Workload

# ---- the straightforward forms: every map of relations and attention stands in memory


def plain_block(block: model.Block, x: Tensor, relations: bool = False) -> Any:
    """A block with explicit attention; with ``relations`` softmax(Q K^T) and softmax(V V^T) of it instead."""
    attention = block.attn
    b, n, d = x.shape
    qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.heads, d // attention.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scale = (d // attention.heads) ** -0.5
    weights = (q @ k.transpose(-2, -1) * scale).softmax(-1)
    if relations:
        return weights, (v @ v.transpose(-2, -1) * scale).softmax(-1)
    x = x + block.drop_path(attention.proj((weights @ v).transpose(1, 2).reshape(b, n, d)))
    return x + block.drop_path(block.mlp(block.norm2(x)))


def plain_relations(net: VisionTransformer, images: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Relations of a block, patches embedded by a convolution."""
    x = net.patch_embed["proj"](images).flatten(2).transpose(1, 2) + net.pos_embed[:, 1:]
    first = (net.cls_token + net.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([first, x], 1)
    for module in net.blocks[: block - 1]:
        x = plain_block(module, x)
    return plain_block(net.blocks[block - 1], x, relations=True)


def plain_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Logarithm of the student's softmax, KL entry by entry, summed over columns."""
    kl = nn.KLDivLoss(reduction="none")
    return sum(kl(s.log(), t).sum(-1).mean() for s, t in zip(student, teacher, strict=True))  # type: ignore[return-value]


# ---- workloads


@functools.cache
def setting(name: str) -> tuple[VisionTransformer, VisionTransformer, Tensor, Tensor, int]:
    """Teacher, student, the two views and the target block."""
    torch.manual_seed(0)
    if name == "small":
        teacher, block = VisionTransformer(SIZES["w128d6"], 32, 4), 5
        student = VisionTransformer(SIZES["w64d4"], 32, 4, last_heads=4, drop_path=0.1)
        shape = (128, 3, 32, 32)
    else:
        teacher, block = VisionTransformer(SIZES["small"], last_heads=12), 12
        student = VisionTransformer(SIZES["tiny"], last_heads=12, drop_path=0.1)
        shape = (4, 3, 224, 224)
    return model.freeze(teacher), student, torch.randn(shape), torch.randn(shape), block


def distillation(name: str, form: str) -> Callable[[], Any]:
    """A step: teacher's targets, student forward and backward, AdamW. ``fixed``: targets are at hand, in half."""
    teacher, student, theirs, mine, block = setting(name)
    distiller = Distiller(student, teacher.width, teacher.heads(block))
    groups = model.parameter_groups(distiller, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-5, betas=(0.9, 0.95), fused=form != "plain")
    kept = {k: v.half() for k, v in model.teacher_targets(teacher, theirs, block, distiller.names).items()}

    def loss() -> Tensor:
        if form == "plain":
            with torch.no_grad():
                targets = plain_relations(teacher, theirs, block)
            return plain_loss(plain_relations(student, mine, student.depth), targets)
        if form == "fixed":
            return distiller(mine, {name: x.float() for name, x in kept.items()})["loss"]
        return distiller(mine, model.teacher_targets(teacher, theirs, block, distiller.names))["loss"]

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def teaching(form: str) -> Callable[[], Any]:
    """The teacher's part of the small step."""
    teacher, _, theirs, _, block = setting("small")
    if form == "ours":
        return lambda: model.teacher_targets(teacher, theirs, block, ("k", "q", "v"))
    return torch.no_grad()(lambda: plain_relations(teacher, theirs, block))


def relating(form: str) -> Callable[[], Any]:
    """Both relations of 8 images, 12 heads, 197 tokens, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(8, 12, 197, 16, generator=generator).requires_grad_() for _ in range(3)]
    teacher = [torch.randn(8, 12, 197, 32, generator=generator) for _ in range(3)]

    def maps(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return model.relation(q, k), model.relation(v, v)

    def step() -> None:
        for leaf in student:
            leaf.grad = None
        if form == "ours":
            (q, k, v), (tq, tk, tv) = student, teacher
            loss = model.relation_kl((q, k), (tq, tk)) + model.relation_kl((v, v), (tv, tv))
        else:
            loss = plain_loss(maps(*student), maps(*teacher))
        loss.backward()

    return step


def masking(form: str) -> Callable[[], Any]:
    """A step of masked autoencoding: width 128, six blocks, decoder 64 wide with two blocks, 32 images of 32 x 32."""
    torch.manual_seed(0)
    size = Size(128, 6, 4, 4)
    if form == "ours":
        encoder = VisionTransformer(size, 32, 4)
        net: Any = model.Mae(encoder, model.MaeDecoder(encoder, 64, 2, 4))
    else:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        net = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=32,
                patch_size=4, decoder_num_attention_heads=4, decoder_hidden_size=64, decoder_num_hidden_layers=2,
                decoder_intermediate_size=256, norm_pix_loss=True,
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, fused=form == "ours")
    images, noise = torch.randn(32, 3, 32, 32), torch.rand(32, 64)

    def step() -> None:
        optimizer.zero_grad()
        loss = net(images, noise)["loss"] if form == "ours" else net(images, noise=noise).loss
        loss.backward()
        optimizer.step()

    return step


def tuning(form: str) -> Callable[[], Any]:
    """A step of fine-tuning: width 64, four blocks, 64 images of 32 x 32."""
    torch.manual_seed(0)
    if form == "ours":
        net: Any = model.Classifier(SIZES["w64d4"], 10, 32, 4)
        groups: Any = model.parameter_groups(net, 0.05, 4, 0.75)
    else:
        from timm.models.vision_transformer import VisionTransformer as Timm
        from timm.optim import param_groups_layer_decay

        net = Timm(32, 4, num_classes=10, embed_dim=64, depth=4, num_heads=2, global_pool="avg")
        groups = param_groups_layer_decay(net, 0.05, layer_decay=0.75)
    optimizer = torch.optim.AdamW(groups, 1e-5, fused=form == "ours")
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels, label_smoothing=0.1).backward()
        optimizer.step()

    return step


def jittering(form: str) -> Callable[[], Any]:
    """Both views of 128 images of 32 x 32: crop, flip, changed colours."""
    pixels = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = data.Images(pixels, torch.zeros(128, dtype=torch.long), ("x",), data.CIFAR_MEAN, data.CIFAR_STD)
    if form == "ours":
        return lambda: images.batch("pretrain", torch.arange(128), 0, geometric=True, jitter=0.4)
    from torchvision import transforms as T

    common = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip()])
    end = [T.ToTensor(), T.Normalize(data.CIFAR_MEAN, data.CIFAR_STD)]
    theirs, mine = T.Compose(end), T.Compose([T.ColorJitter(0.4, 0.4, 0.4), *end])
    pictures = [T.functional.to_pil_image(image) for image in pixels]

    def step() -> list[Tensor]:
        crops = [common(picture) for picture in pictures]
        return [torch.stack([view(crop) for crop in crops]) for view in (theirs, mine)]

    return step


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    maps = "explicit attention, softmax and its logarithm, as the official code"
    small = "distillation step, 128 x 32 x 32 (65 tokens), width 128 to 64"
    yield Workload(
        f"{small}, fixed views", bind(distillation, "small", "fixed"), bind(distillation, "small", "plain"),
        f"{maps}; its teacher runs every step", target=2.0,
    )  # fmt: skip
    yield Workload(
        f"{small}, new views", bind(distillation, "small", "ours"), bind(distillation, "small", "plain"), maps
    )
    large = "distillation step, 4 x 224 x 224 (197 tokens), width 384 to 192, 12 blocks"
    yield Workload(
        f"{large}, fixed views", bind(distillation, "large", "fixed"), bind(distillation, "large", "plain"),
        f"{maps}; its teacher runs every step", target=2.0,
    )  # fmt: skip
    yield Workload(
        f"{large}, new views", bind(distillation, "large", "ours"), bind(distillation, "large", "plain"), maps
    )
    yield Workload("teacher's part of a step, 128 x 32 x 32", bind(teaching, "ours"), bind(teaching, "plain"), maps)
    yield Workload(
        "relation loss Q-K and V-V, 8 x 12 heads x 197 tokens, both passes",
        bind(relating, "ours"),
        bind(relating, "plain"),
        "softmax, logarithm, KLDivLoss",
        target=1.5,
    )
    yield Workload(
        "masked autoencoding step, 32 x 32 x 32, width 128",
        bind(masking, "ours"),
        bind(masking, "transformers"),
        "transformers ViTMAEForPreTraining",
    )
    yield Workload(
        "fine-tuning step, 64 x 32 x 32, width 64", bind(tuning, "ours"), bind(tuning, "timm"), "timm VisionTransformer"
    )
    yield Workload(
        "both views of 128 images of 32 x 32",
        bind(jittering, "ours"),
        bind(jittering, "torchvision"),
        "torchvision on PIL images, one by one",
        target=2.0,
    )
