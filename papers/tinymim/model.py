"""TinyMIM: distil the token relations of a masked-image-modelling teacher into a small vision transformer.

Ren, Wei, Zhang, Hu: "TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models", CVPR 2023 (arXiv 2301.01296).
Here are the transformer of teacher, student and fine-tuning, the distillation targets that the paper compares (token
relations, features, class token), masked autoencoding (how the teacher and the baseline are trained), and the maps
between checkpoints. Names of parameters are those of the released checkpoints and of timm's ``VisionTransformer``.

The file stands alone: it needs torch only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Size(NamedTuple):
    """Width, depth and heads of a transformer; ``tune_heads`` are the heads of all blocks when it is fine-tuned."""

    width: int
    depth: int
    heads: int
    tune_heads: int


SIZES = {
    "tiny": Size(192, 12, 6, 3),
    "small": Size(384, 12, 6, 6),
    "base": Size(768, 12, 12, 12),
    "large": Size(1024, 24, 16, 16),
    "star": Size(192, 12, 12, 12),
    "w128d6": Size(128, 6, 4, 4),
    "w96d5": Size(96, 5, 4, 4),
    "w64d4": Size(64, 4, 2, 2),
    "w48d4": Size(48, 4, 3, 3),
    "w32d3": Size(32, 3, 4, 4),
    "w24d2": Size(24, 2, 2, 2),
}
"""The paper's sizes by name (``star``: TinyMIM*-T), and small ones (``w128d6``: width 128, 6 blocks)."""

STAR_FEATURES = 1280
"""Width of TinyMIM*-T's extra fully connected layer (released segmentation backbone)."""

RELATIONS = ("qk", "vv", "qq", "kk")
"""Relations by the two sets of vectors that are compared."""

FEATURES = ("output", "attention", "ffn", "q", "k", "v")
"""Features of a block: its output, the outputs of its two branches, its queries, keys and values."""

TARGETS = ("relation", "cls", *FEATURES)
"""What can be distilled."""


def target_block(teacher_depth: int, student_depth: int) -> int:
    """Default target block (1-based): three quarters into a deeper teacher (18 of 24), else the last."""
    return math.ceil(0.75 * teacher_depth) if teacher_depth > student_depth else teacher_depth


# ---- the transformer -------------------------------------------------------------------------------------------------


def sincos_positions(width: int, grid: int, extra: int = 1) -> Tensor:
    """Fixed 2-D sine-cosine position table (extra + grid^2, width); the ``extra`` first rows are zero.

    As in MAE's code, the first half of the width encodes the column, the second half the row.

    Raises:
        ValueError: width not a multiple of four.
    """
    if width % 4:
        raise ValueError(f"width {width}: sine-cosine positions need a multiple of 4")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    one = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, width / 2)
    table = torch.cat([one.repeat(grid, 1), one.repeat_interleave(grid, 0)], 1)
    return torch.cat([table.new_zeros(extra, width), table]).float()


def resize_positions(table: Tensor, grid: int, extra: int = 1) -> Tensor:
    """Resample a position table (1, extra + n^2, D) to another grid, bicubically; the extra rows stay."""
    old = math.isqrt(table.shape[1] - extra)
    if old**2 != table.shape[1] - extra:
        raise ValueError(f"position table of {table.shape[1]} rows is no square grid with {extra} extra tokens")
    if old == grid:
        return table
    image = table[:, extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :extra], image.flatten(2).transpose(1, 2)], 1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, n, C, patch, patch), row by row.

    Raises:
        ValueError: a side is not divisible by the patch size.
    """
    b, c, h, w = images.shape
    if h % patch or w % patch:
        raise ValueError(f"image of {h} x {w} is not divisible into patches of {patch}")
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c, patch, patch)


class DropPath(nn.Module):
    """Stochastic depth: drop a sample's residual branch with probability ``rate`` and rescale the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Attention(nn.Module):
    """Multi-head self-attention. The number of heads does not change the parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, M, N, D / M) of tokens (B, N, D)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Output of the branch (B, N, D); ``bias`` (M, N, N) is added to the scaled products."""
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.attend(*self.project(x))


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def probe(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Features of this block for tokens (B, N, D); what no name asks for is not computed.

        Returns:
            q, k, v as (B, M, N, D / M); attention, ffn, output as (B, N, D).
        """
        q, k, v = self.attn.project(self.norm1(x))
        found = {"q": q, "k": k, "v": v}
        if set(names) - set(found):
            found["attention"] = self.attn.attend(q, k, v)
            x = x + self.drop_path(found["attention"])
            if set(names) - set(found):
                found["ffn"] = self.mlp(self.norm2(x))
                found["output"] = x + self.drop_path(found["ffn"])
        return {name: found[name] for name in names}


class VisionTransformer(nn.Module):
    """Plain ViT with class token and fixed sine-cosine positions: teacher, student and encoder of MAE.

    Args:
        size: width, depth, heads. image, patch: sides in pixels. last_heads: heads of the last block, the paper's
            adaptive block (default: as the others). drop_path: rate of all blocks but the last. distillation_token:
            a second token without position in the image (TinyMIM*).

    Raises:
        ValueError: heads that do not divide the width; an image that is not divisible into patches.
    """

    def __init__(
        self,
        size: Size,
        image: int = 224,
        patch: int = 16,
        last_heads: int | None = None,
        drop_path: float = 0.0,
        distillation_token: bool = False,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"image side {image} is not divisible by patch size {patch}")
        self.width, self.depth, self.patch, self.grid = size.width, size.depth, patch, image // patch
        self.extra = 2 if distillation_token else 1
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, size.width)) if distillation_token else None
        self.pos_embed = nn.Parameter(sincos_positions(size.width, self.grid, self.extra)[None], requires_grad=False)
        heads = [size.heads] * (size.depth - 1) + [last_heads or size.heads]
        rates = [drop_path] * (size.depth - 1) + [0.0]
        self.blocks = nn.ModuleList([self._block(size, h, rate) for h, rate in zip(heads, rates, strict=True)])
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.reset_parameters()

    def _block(self, size: Size, heads: int, drop_path: float) -> Block:
        return Block(size.width, heads, drop_path)

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers and patch projection, N(0, 0.02) tokens, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.detach().view(self.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        if self.dist_token is not None:
            nn.init.normal_(self.dist_token, std=0.02)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    def heads(self, block: int) -> int:
        """Heads of a block (1-based).

        Raises:
            ValueError: no such block.
        """
        if not 1 <= block <= self.depth:
            raise ValueError(f"block {block} is outside 1..{self.depth} of this transformer")
        return self.blocks[block - 1].attn.heads

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, extra + n, D) of images (B, 3, H, W); with ``keep`` (B, k) only of those patches.

        Raises:
            ValueError: images of another size than the transformer was made for.
        """
        if images.shape[-2:] != (self.grid * self.patch,) * 2:
            side = self.grid * self.patch
            raise ValueError(f"images of {tuple(images.shape[-2:])}, this transformer was made for {side} x {side}")
        pixels, position = patchify(images, self.patch).flatten(2), self.pos_embed[:, self.extra :]
        if keep is not None:  # patches that are left out are never embedded
            pixels = pixels.gather(1, keep[..., None].expand(-1, -1, pixels.shape[-1]))
            position = position[0][keep]
        proj = self.patch_embed["proj"]
        x = F.linear(pixels, proj.weight.flatten(1), proj.bias) + position
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        first = torch.cat(tokens, 1) + self.pos_embed[:, : self.extra]
        return torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], 1)

    def probe(self, images: Tensor, block: int, names: Sequence[str], keep: Tensor | None = None) -> dict[str, Tensor]:
        """Features (``Block.probe``) of one block (1-based); the blocks after it are not run.

        Raises:
            ValueError: no such block.
        """
        self.heads(block)
        x = self.embed(images, keep)
        for module in self.blocks[: block - 1]:
            x = module(x)
        return self.blocks[block - 1].probe(x, names)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, extra + n, D) after the last block and the final norm."""
        x = self.embed(images, keep)
        for module in self.blocks:
            x = module(x)
        return self.norm(x)


def freeze(net: nn.Module) -> Any:
    """A teacher: in evaluation mode, no gradient."""
    return net.eval().requires_grad_(False)


# ---- token relations -------------------------------------------------------------------------------------------------


def relation(a: Tensor, b: Tensor) -> Tensor:
    """R^AB = softmax_rows(A B^T / sqrt(D / M)), (B, M, N, N), of vectors (B, M, N, D / M)."""
    return (a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5).softmax(-1)


CHUNK = 1 << 21
"""Entries of one relation map that ``relation_kl`` holds at a time."""


class _RelationKL(torch.autograd.Function):
    """Mean over batch, heads and rows of KL(R_teacher || R_student), without keeping a map for the backward pass.

    The gradient with respect to the student's scaled products is (R_student - R_teacher) / rows, so the gradients of
    the vectors are formed chunk by chunk while the maps are there. Everything in at least float32: the logarithm of a
    softmax that has underflowed would be infinite.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ta: Tensor, tb: Tensor) -> Tensor:
        kinds = a.dtype, b.dtype
        batch, heads, n, d = a.shape
        scale, teacher_scale = d**-0.5, ta.shape[-1] ** -0.5
        rows = batch * heads * n
        grads = any(ctx.needs_input_grad[:2])
        exact = torch.promote_types(a.dtype, torch.float32)
        total = torch.zeros((), device=a.device, dtype=exact)
        da, db = (total.new_empty(batch, heads, n, d) if grads else None for _ in range(2))
        step = max(1, CHUNK // (heads * n * n))
        with torch.autocast(a.device.type, enabled=False):
            for i in range(0, batch, step):
                part = slice(i, i + step)
                sa, sb, xa, xb = (x[part].to(exact) for x in (a, b, ta, tb))
                z = sa @ sb.transpose(-2, -1) * scale
                t = xa @ xb.transpose(-2, -1) * teacher_scale
                for logits in (z, t):
                    logits -= logits.amax(-1, keepdim=True)  # as softmax does: large products would cancel below
                s, r = z.softmax(-1), t.softmax(-1)
                # KL = sum_j r_j (t_j - z_j) - lse(t) + lse(z), and lse(z) = -log max softmax(z) now
                total += (r.amax(-1).log() - s.amax(-1).log()).sum() + torch.dot(r.flatten(), t.sub_(z).flatten())
                if da is not None and db is not None:
                    g = s.sub_(r).mul_(scale / rows)
                    torch.matmul(g, sb, out=da[part])
                    torch.matmul(g.transpose(-2, -1), sa, out=db[part])
        if da is not None and db is not None:
            ctx.save_for_backward(da, db)
            ctx.kinds = kinds
        return total / rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        da, db = ctx.saved_tensors
        return (da * upstream).to(ctx.kinds[0]), (db * upstream).to(ctx.kinds[1]), None, None


def relation_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """KL(R_teacher || R_student), summed over columns, averaged over batch, heads and rows.

    Args:
        student, teacher: the two sets of vectors (B, M, N, width / M) that are related; widths may differ.

    Returns:
        a scalar; gradients reach the student only.

    Raises:
        ValueError: batch, heads or tokens differ.
    """
    for name, axis in (("images", 0), ("heads", 1), ("tokens", 2)):
        a, b = student[0].shape[axis], teacher[0].shape[axis]
        if a != b:
            raise ValueError(f"relations of {a} {name} (student) and {b} {name} (teacher) cannot be compared")
    return _RelationKL.apply(*student, *(x.detach() for x in teacher))


# ---- distillation ----------------------------------------------------------------------------------------------------


def teacher_names(target: str, relations: Sequence[str] = ("qk", "vv")) -> tuple[str, ...]:
    """Features of the teacher's block that a target needs.

    Raises:
        ValueError: unknown target or relation; the valid ones are listed.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}, expected one of {', '.join(TARGETS)}")
    wrong = [name for name in relations if name not in RELATIONS]
    if wrong or not relations:
        raise ValueError(f"relations {tuple(relations)}: expected among {', '.join(RELATIONS)}")
    if target == "relation":
        return tuple(sorted({letter for name in relations for letter in name}))
    return ("output",) if target == "cls" else (target,)


@torch.no_grad()
def teacher_targets(
    teacher: VisionTransformer, images: Tensor, block: int, names: Sequence[str], keep: Tensor | None = None
) -> dict[str, Tensor]:
    """What the student is to imitate: features of the teacher's block ``block`` (1-based)."""
    return teacher.probe(images, block, names, keep)


class Distiller(nn.Module):
    """A student with the loss that ties it to its teacher's block.

    ``relation``: the student's last block gives queries, keys and values only; the rest of that block and the final
    norm take no part (what takes no part is frozen here) and stay at their initial values until fine-tuning. ``cls``
    and the features: a linear map brings the student to the teacher's width.

    Args:
        student: its last block has as many heads as the teacher's target block. width, heads: of that block.
        target: one of ``TARGETS``. relations, weights: the relations and their weights in the sum.
        decoder: adds MAE's reconstruction loss of the student to the sum.

    Raises:
        ValueError: heads differ; unknown names; negative or too few weights.
    """

    def __init__(
        self,
        student: VisionTransformer,
        width: int,
        heads: int,
        target: str = "relation",
        relations: Sequence[str] = ("qk", "vv"),
        weights: Sequence[float] = (1.0, 1.0),
        decoder: MaeDecoder | None = None,
    ) -> None:
        super().__init__()
        self.target, self.relations, self.weights = target, tuple(relations), tuple(weights)
        self.names = teacher_names(target, relations)
        if target == "relation" and (len(self.weights) != len(self.relations) or min(self.weights) < 0):
            raise ValueError(f"weights {self.weights}: expected {len(self.relations)} numbers of at least 0")
        own = student.heads(student.depth)
        if target == "relation" and own != heads:
            raise ValueError(
                f"student's last block has {own} heads, teacher's target block {heads}; set last_heads={heads}"
            )
        self.student, self.decoder = student, decoder
        self.project = None if target == "relation" else nn.Linear(student.width, width)
        last, unused = student.blocks[-1], [student.norm]
        if not {"output", "ffn"} & set(self.names):
            unused += [last.norm2, last.mlp]
            if self.names != ("attention",):
                unused.append(last.attn.proj)
        for module in unused if decoder is None else ():
            module.requires_grad_(False)

    def forward(
        self, images: Tensor, teacher: Mapping[str, Tensor], keep: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of the loss and their weighted sum ``loss``.

        Args:
            images: (B, 3, H, W), the student's view. teacher: ``teacher_targets`` of the teacher's view.
            keep: (B, k) patches that both see (masked input). noise: (B, n) for the mask of the reconstruction.
        """
        found = self.student.probe(images, self.student.depth, self.names, keep)
        if self.student.extra == 2:  # the teacher has no distillation token
            found = {name: torch.cat([x[..., :1, :], x[..., 2:, :]], -2) for name, x in found.items()}
        if self.target == "relation":
            terms = {
                name: relation_kl((found[name[0]], found[name[1]]), (teacher[name[0]], teacher[name[1]]))
                for name in self.relations
            }  # L = sum of w_AB KL(R_teacher^AB || R_student^AB)
            loss = sum(weight * terms[name] for name, weight in zip(self.relations, self.weights, strict=True))
        else:
            assert self.project is not None
            mine, theirs = (_as_tokens(side[self.names[0]]) for side in (found, teacher))
            if mine.shape[1] != theirs.shape[1]:
                raise ValueError(f"student has {mine.shape[1]} tokens, teacher {theirs.shape[1]}: patches must agree")
            if self.target == "cls":
                loss = cls_loss(self.project(mine[:, 0]), theirs[:, 0])
            else:
                loss = feature_loss(self.project(mine), theirs)
            terms = {self.target: loss}
        if self.decoder is not None:
            assert noise is not None
            terms["reconstruction"] = mae_loss(self.student, self.decoder, images, noise)
            loss = loss + terms["reconstruction"]
        return {**terms, "loss": loss}


def _as_tokens(x: Tensor) -> Tensor:
    """Queries, keys or values (B, M, N, d) as tokens (B, N, M d); tokens stay."""
    return x.transpose(1, 2).flatten(2) if x.ndim == 4 else x


def cls_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(c_t) || softmax(c_s)) of class tokens (B, D), averaged over the batch."""
    log_t, log_s = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 (beta 2) between tokens (B, N, D) and the teacher's, whitened by a LayerNorm without parameters."""
    teacher = F.layer_norm(teacher.float(), teacher.shape[-1:])
    return F.smooth_l1_loss(student.float(), teacher, beta=2.0)


# ---- masked autoencoding ---------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """A random mask: indices of kept (B, k) and masked (B, n - k) patches, and where each patch went (B, n)."""

    keep: Tensor
    masked: Tensor
    restore: Tensor


def random_mask(noise: Tensor, ratio: float = 0.75) -> Mask:
    """Keep the patches with the least noise (B, n): int(n (1 - ratio)) of them, at least one.

    Raises:
        ValueError: ratio outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio}, expected a number between 0 and 1")
    order = noise.argsort(1)
    count = max(1, int(noise.shape[1] * (1 - ratio)))
    return Mask(order[:, :count], order[:, count:], order.argsort(1))


class MaeDecoder(nn.Module):
    """MAE's decoder: kept tokens and mask tokens in, pixels of the masked patches out.

    Args:
        encoder: the transformer whose tokens it decodes. width, depth, heads: its own. ratio: share of masked patches.
    """

    def __init__(
        self, encoder: VisionTransformer, width: int = 512, depth: int = 8, heads: int = 16, ratio: float = 0.75
    ) -> None:
        super().__init__()
        self.ratio, self.patch, self.extra = ratio, encoder.patch, encoder.extra
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_positions(width, encoder.grid, encoder.extra)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, 3 * encoder.patch**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, mask: Mask) -> Tensor:
        """Predicted pixels (B, n - k, 3 patch^2) of the masked patches, in the order of ``mask.masked``."""
        x = self.embed(latent)
        fill = self.mask_token.to(x.dtype).expand(len(x), mask.masked.shape[1], -1)
        patches = torch.cat([x[:, self.extra :], fill], 1)
        patches = patches.gather(1, mask.restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, : self.extra], patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        index = (mask.masked + self.extra)[..., None].expand(-1, -1, x.shape[-1])
        return self.pred(self.norm(x.gather(1, index)))  # only masked patches count, so only they are predicted


def mae_target(images: Tensor, patch: int) -> Tensor:
    """Pixels (B, n, 3 patch^2) of each patch, row by row with the channel last, normalised patch by patch."""
    pixels = patchify(images, patch).permute(0, 1, 3, 4, 2).flatten(2)
    mean, var = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
    return (pixels - mean) / (var + 1e-6).sqrt()


def reconstruction_loss(prediction: Tensor, images: Tensor, mask: Mask, patch: int) -> Tensor:
    """Mean squared error of the masked patches' normalised pixels."""
    target = mae_target(images, patch)
    target = target.gather(1, mask.masked[..., None].expand(-1, -1, target.shape[-1]))
    return F.mse_loss(prediction.float(), target.float())


def mae_loss(encoder: VisionTransformer, decoder: MaeDecoder, images: Tensor, noise: Tensor) -> Tensor:
    """MAE's loss of images (B, 3, H, W); ``noise`` (B, n) decides the mask."""
    mask = random_mask(noise, decoder.ratio)
    return reconstruction_loss(decoder(encoder(images, mask.keep), mask), images, mask, encoder.patch)


class Mae(nn.Module):
    """Encoder and decoder in one module: how the teacher and the paper's baseline are trained."""

    def __init__(self, encoder: VisionTransformer, decoder: MaeDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """``loss`` of images (B, 3, H, W) with the mask that ``noise`` (B, n) gives."""
        return {"loss": mae_loss(self.encoder, self.decoder, images, noise)}


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


class Classifier(VisionTransformer):
    """The fine-tuned ViT: the same heads in all blocks, mean of the patch tokens, ``fc_norm``, linear head.

    Args:
        size: ``tune_heads`` are its heads. classes: number of classes. drop_path: rate of the last block, rising
            linearly from 0. star: TinyMIM*-T, with a distillation token and a layer of ``STAR_FEATURES`` before the
            head.
    """

    def __init__(
        self,
        size: Size,
        classes: int,
        image: int = 224,
        patch: int = 16,
        drop_path: float = 0.0,
        star: bool = False,
    ) -> None:
        super().__init__(size._replace(heads=size.tune_heads), image, patch, distillation_token=star)
        del self.norm
        self.pos_embed.requires_grad_(True)
        for i, block in enumerate(self.blocks):
            block.drop_path.rate = drop_path * i / max(1, size.depth - 1)
        features = size.width
        if star:
            features = STAR_FEATURES
            self.conv1x1 = nn.Sequential(nn.LayerNorm(size.width, eps=1e-6), nn.Linear(size.width, features), nn.GELU())
            nn.init.xavier_uniform_(self.conv1x1[1].weight)
            nn.init.zeros_(self.conv1x1[1].bias)
        else:
            self.fc_norm = nn.LayerNorm(size.width, eps=1e-6)
        self.star = star
        self.head = nn.Linear(features, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        x = self.embed(images, keep)
        for module in self.blocks:
            x = module(x)
        patches = x[:, self.extra :]
        pooled = self.conv1x1(patches).mean(1) if self.star else self.fc_norm(patches.mean(1))
        return self.head(pooled)


TOKENS = ("cls_token", "dist_token", "pos_embed")
"""Without weight decay in fine-tuning, as in the official code (in pre-training they have it)."""


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter for the decay of learning rates: 0 embedding, i + 1 block i, depth + 1 the rest."""
    if name.startswith((*TOKENS, "patch_embed")):
        return 0
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) + 1 if found else depth + 1


def parameter_groups(
    net: nn.Module,
    weight_decay: float,
    depth: int = 0,
    layer_decay: float = 1.0,
    prefix: str = "",
    undecayed: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Groups for AdamW: no weight decay on vectors; ``lr_scale`` = layer_decay^(depth + 1 - layer).

    Args:
        depth: blocks of the network. layer_decay: 1 gives every layer the whole learning rate. prefix: stands before
            the transformer's names (``backbone.``). undecayed: more names without weight decay.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix(prefix)
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        decays = parameter.ndim > 1 and name not in undecayed
        group = {"params": [], "lr_scale": scale, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((scale, decays), group)["params"].append(parameter)
    return list(groups.values())


def cosine_lr(epoch: float, peak: float, least: float, warmup: float, epochs: float) -> float:
    """Learning rate at a (fractional) epoch: linear warm-up from 0, then half a cosine down to ``least``."""
    if epoch < warmup:
        return peak * epoch / warmup
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def official_state(checkpoint: Any, pretrained: bool = True) -> dict[str, Tensor]:
    """Weights of an encoder from a checkpoint of MAE, TinyMIM or timm.

    Args:
        checkpoint: ``{"model": state}`` as the official code saves it. pretrained: refuse fine-tuned networks.

    Raises:
        ValueError: no ``model`` in it; a fine-tuned network where a pre-trained one is expected.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("model"), Mapping):
        found = sorted(checkpoint)[:5] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"checkpoint has no key 'model' with the weights, found {found}")
    state = checkpoint["model"]
    if pretrained and "head.weight" in state:
        raise ValueError("checkpoint is of a fine-tuned network (it has head.weight), expected a pre-trained encoder")
    return {k: v for k, v in state.items() if not k.startswith("decoder") and k != "mask_token"}


FRESH = r"pos_embed|(norm|fc_norm|head|conv1x1|fpn\d)\.|.*(relative_position_bias_table|gamma_\d)$"
"""Names that an encoder's checkpoint need not have: positions are known, heads and the like start anew."""


def load_encoder(net: VisionTransformer, state: Mapping[str, Tensor]) -> list[str]:
    """Copy an encoder's weights into ``net``; positions are resampled where the grid differs.

    Returns:
        the names that ``state`` has no value for, and so kept their initial value (``FRESH``).

    Raises:
        ValueError: other tensors are missing, or shapes differ; they are named.
    """
    own = net.state_dict()
    shared = {name: value for name, value in state.items() if name in own}
    if not shared:
        raise ValueError(f"none of the {len(own)} tensors is in the checkpoint, which has {sorted(state)[:3]} ...")
    if "pos_embed" in shared:
        shared["pos_embed"] = resize_positions(shared["pos_embed"].float(), net.grid, net.extra)
    differ = [name for name, value in shared.items() if value.shape != own[name].shape]
    if differ:
        name = differ[0]
        raise ValueError(
            f"{name} is {tuple(shared[name].shape)} in the checkpoint, expected {tuple(own[name].shape)}"
            + (f" ({len(differ)} tensors differ)" if len(differ) > 1 else "")
        )
    missing = sorted(set(own) - set(shared))
    needed = [name for name in missing if not re.match(FRESH, name)]
    if needed:
        raise ValueError(f"checkpoint lacks {len(needed)} tensors: {', '.join(needed[:4])} ...")
    net.load_state_dict(shared, strict=False)
    return missing


def parameters(net: nn.Module) -> int:
    """Number of parameters, position table included."""
    return sum(p.numel() for p in net.parameters())
