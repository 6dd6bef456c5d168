"""EMO: networks made of one block, the inverted residual mobile block (iRMB) (Zhang et al., ICCV 2023).

The Meta Mobile Block expands, mixes and shrinks with a residual around all three: Y = X + MLP_s(F(MLP_e(X))). The
inverted residual block of MobileNetV2, the feed-forward layer and self-attention are cases of it. iRMB takes for F
window attention whose values are expanded and whose queries and keys are not (EW-MHSA), followed by a depth-wise
convolution with a skip.

Importing this module registers ``emo_1m``, ``emo_2m``, ``emo_5m`` and ``emo_6m`` with ``timm.create_model``. Maps are
(B, C, H, W) in channels-last memory: there a 1 x 1 convolution is a matrix product over pixels, layer norm needs no
copies, and heads are views.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

EPS = 1e-6
"""Of every norm."""

# ---- layers ----------------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each pixel of a map (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda dim: nn.Identity(),
    "bn_2d": lambda dim: nn.BatchNorm2d(dim, eps=EPS),
    "ln_2d": LayerNorm2d,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class Pointwise(nn.Conv2d):
    """1 x 1 convolution; without groups it is a matrix product over the pixels of a channels-last map."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool, groups: int = 1) -> None:
        super().__init__(dim_in, dim_out, 1, bias=bias, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        if self.groups > 1:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvNormAct(nn.Module):
    """Convolution, norm and activation; padding ceil((kernel - stride) / 2)."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: str = "none",
        act: str = "none",
    ) -> None:
        super().__init__()
        if kernel == stride == 1:
            self.conv: nn.Module = Pointwise(dim_in, dim_out, bias, groups)
        else:
            padding = math.ceil((kernel - stride) / 2)
            self.conv = nn.Conv2d(dim_in, dim_out, kernel, stride, padding, groups=groups, bias=bias)
        self.norm = NORMS[norm](dim_out)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        return self.act(self.norm(self.conv(x)))


# ---- expanded-window attention ---------------------------------------------------------------------------------------


def padding(h: int, w: int, window: int) -> tuple[int, int]:
    """Rows and columns that are added below and to the right of a map; none where a window is the whole map (0)."""
    return (-h % window, -w % window) if window > 0 else (0, 0)


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cut a map into dilated windows: the pixels of a window lie as far apart as there are windows on a side.

    Args:
        x: (B, C, H, W), padded with zeros where H or W is not a multiple. window: side of a window; 0: the whole map.

    Returns:
        (B * n1 * n2, C, window, window) in channels-last memory.
    """
    c, h, w = x.shape[1:]
    below, right = padding(h, w, window)
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    rows, columns = (window, window) if window > 0 else (h, w)
    n1, n2 = x.shape[2] // rows, x.shape[3] // columns
    if n1 == n2 == 1:
        return x
    x = x.permute(0, 2, 3, 1).reshape(-1, rows, n1, columns, n2, c)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, c).permute(0, 3, 1, 2)


def from_windows(x: Tensor, h: int, w: int) -> Tensor:
    """The inverse of ``to_windows``: (B * n1 * n2, C, rows, columns) to (B, C, h, w), without the padding."""
    _, c, rows, columns = x.shape
    n1, n2 = -(-h // rows), -(-w // columns)
    if n1 > 1 or n2 > 1:
        x = x.permute(0, 2, 3, 1).reshape(-1, n1, n2, rows, columns, c)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(-1, rows * n1, columns * n2, c).permute(0, 3, 1, 2)
    return x[:, :, :h, :w]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, H, W) to (B, heads, H * W, C / heads); a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, extra: Tensor | None = None, times: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of maps.

    Args:
        q, k: (B, C, H, W); k and v may have another size. v: (B, C', H, W). extra: (C,) a key beside those of k whose
            value is zero and that counts ``times`` times.

    Returns:
        (B, C', H, W), of the size of q.
    """
    h, w = q.shape[2:]
    queries, keys, values = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
    mask = None
    if times and extra is not None:
        n = keys.shape[2]
        mask = F.pad(keys.new_zeros(1, 1, 1, n), (0, 1), value=math.log(times)).expand(1, 1, h * w, -1)
        keys = F.pad(keys, (0, 0, 0, 1)) + F.pad(extra.view(1, heads, 1, -1), (0, 0, n, 0))
        values = F.pad(values, (0, 0, 0, 1))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return out.transpose(1, 2).flatten(2).unflatten(1, (h, w)).permute(0, 3, 1, 2)


# ---- the block -------------------------------------------------------------------------------------------------------

MIXERS = ("both", "attention", "dw", "none", "parallel")
"""What iRMB does in the expanded space: attention then depth-wise convolution, one, neither, or both in parallel."""


class IRMB(nn.Module):
    """Inverted residual mobile block.

    Args:
        dim_in, dim_out: channels. norm_in: normalise the input. has_skip: residual, and skip around the depth-wise
            convolution, where sizes allow. exp_ratio: channels of the expanded space / dim_in. norm_layer: ``bn_2d``
            or ``ln_2d``. act_layer: after the expansion. v_proj: expand at all. dw_ks, stride: of the depth-wise
            convolution. se_ratio: squeeze-excite, 0 without. dim_head: channels of a head of q and k. window_size:
            side of an attention window, 0 for the whole map. attn_s: attention. qkv_bias: biases of the 1 x 1
            convolutions before the shrinking one. drop_path: rate. v_group: expand each head by itself. attn_pre:
            attend before the expansion, as released. mixer: see ``MIXERS``; attention needs ``attn_s`` too, and a
            strided convolution always stays.

    Raises:
        ValueError: dim_in is not divisible by dim_head, an even kernel, an unknown name.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        norm_in: bool = True,
        has_skip: bool = True,
        exp_ratio: float = 1.0,
        norm_layer: str = "bn_2d",
        act_layer: str = "relu",
        v_proj: bool = True,
        dw_ks: int = 3,
        stride: int = 1,
        se_ratio: float = 0.0,
        dim_head: int = 64,
        window_size: int = 7,
        attn_s: bool = True,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        v_group: bool = False,
        attn_pre: bool = True,
        mixer: str = "both",
    ) -> None:
        super().__init__()
        if mixer not in MIXERS or norm_layer not in NORMS or act_layer not in ACTIVATIONS:
            raise ValueError(f"unknown mixer {mixer!r}, norm {norm_layer!r} or activation {act_layer!r}")
        if dw_ks % 2 == 0:
            raise ValueError(f"dw_ks is {dw_ks}, expected an odd kernel")
        mid = int(dim_in * exp_ratio)
        if mid < 1:
            raise ValueError(f"exp_ratio is {exp_ratio}, expected more than 0")
        self.attn_s = attn_s and mixer in ("both", "attention", "parallel")
        if self.attn_s and dim_in % dim_head:
            raise ValueError(f"dim {dim_in} is not divisible by dim_head {dim_head}")
        self.has_skip = has_skip and dim_in == dim_out and stride == 1
        self.parallel = self.attn_s and mixer == "parallel"
        self.local = stride > 1 or mixer in ("both", "dw", "parallel")
        self.heads, self.window_size, self.attn_pre = dim_in // dim_head, window_size, attn_pre
        self.norm = NORMS[norm_layer](dim_in) if norm_in else nn.Identity()
        if self.attn_s:
            self.qk = ConvNormAct(dim_in, 2 * dim_in, bias=qkv_bias)
        groups = self.heads if self.attn_s and v_group else 1
        expand = ConvNormAct(dim_in, mid, groups=groups, bias=qkv_bias, act=act_layer)
        self.v = expand if v_proj or self.attn_s else nn.Identity()
        if self.local:
            self.conv_local = ConvNormAct(mid, mid, dw_ks, stride, groups=mid, norm="bn_2d", act="silu")
        act = ACTIVATIONS[act_layer]
        self.se = SqueezeExcite(mid, rd_ratio=se_ratio, act_layer=act) if se_ratio > 0 else nn.Identity()
        self.proj = ConvNormAct(mid, dim_out)
        self.drop_path = DropPath(drop_path) if drop_path > 0 and self.has_skip else nn.Identity()

    def attend(self, x: Tensor, expanded: Tensor | None = None) -> Tensor:
        """EW-MHSA of a normalised map (B, C, H, W): attention of C channels, values of mid channels.

        ``expanded`` (B, mid, H, W) are values that have been expanded already; then only the attention is done.
        """
        h, w = x.shape[2:]
        below, right = padding(h, w, self.window_size)
        before = self.attn_pre and expanded is None
        if before and (below or right) and h <= self.window_size and w <= self.window_size:
            # One padded window. All padded pixels are one key, the bias, with value zero; no query asks for them.
            q, k = self.qk(x).chunk(2, 1)
            bias = self.qk.conv.bias
            extra = k.new_zeros(k.shape[1]) if bias is None else bias[k.shape[1] :]
            return self.v(attention(q, k, x, self.heads, extra.to(k.dtype), (h + below) * (w + right) - h * w))
        windows = to_windows(x, self.window_size)
        q, k = self.qk(windows).chunk(2, 1)
        if before:  # 1 x 1 convolutions commute with the regrouping: expand afterwards, move the fewer channels
            return self.v(from_windows(attention(q, k, windows, self.heads), h, w))
        values = self.v(windows) if expanded is None else to_windows(expanded, self.window_size)
        return from_windows(attention(q, k, values, self.heads), h, w)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) to (B, dim_out, H', W')."""
        shortcut = x
        x = self.norm(x)
        if self.parallel:
            expanded = self.v(x)
            x = self.attend(x, expanded) + self.se(self.conv_local(expanded))
        else:
            x = self.attend(x) if self.attn_s else self.v(x)  # MLP_e and EW-MHSA
            if self.local:
                mixed = self.se(self.conv_local(x))
                x = x + mixed if self.has_skip else mixed
        x = self.proj(x)  # MLP_s
        return shortcut + self.drop_path(x) if self.has_skip else x


# ---- the network -----------------------------------------------------------------------------------------------------

Spec = dict[str, Any]
COMMON: Spec = {
    "stem_dim": 24,
    "norm_layers": ("bn_2d", "bn_2d", "ln_2d", "ln_2d"),
    "act_layers": ("silu", "silu", "gelu", "gelu"),
    "dw_kss": (3, 3, 5, 5),
    "window_sizes": (7, 7, 7, 7),
    "attn_ss": (False, False, True, True),
    "strides": (2, 2, 2, 2),
}
VARIANTS: dict[str, Spec] = {
    "emo_1m": {
        "depths": (2, 2, 8, 3),
        "embed_dims": (32, 48, 80, 168),
        "exp_ratios": (2.0, 2.5, 3.0, 3.5),
        "dim_heads": (16, 16, 20, 21),
        "drop_path_rate": 0.04036,
    },
    "emo_2m": {
        "depths": (3, 3, 9, 3),
        "embed_dims": (32, 48, 120, 200),
        "exp_ratios": (2.0, 2.5, 3.0, 3.5),
        "dim_heads": (16, 16, 20, 20),
        "drop_path_rate": 0.05,
    },
    "emo_5m": {
        "depths": (3, 3, 9, 3),
        "embed_dims": (48, 72, 160, 288),
        "exp_ratios": (2.0, 3.0, 4.0, 4.0),
        "dim_heads": (24, 24, 32, 32),
        "drop_path_rate": 0.05,
    },
    "emo_6m": {
        "depths": (3, 3, 9, 3),
        "embed_dims": (48, 72, 160, 320),
        "exp_ratios": (2.0, 3.0, 4.0, 5.0),
        "dim_heads": (16, 24, 20, 32),
        "drop_path_rate": 0.05,
    },
    # Not of the paper: for images of 32 pixels on a CPU. Attention sees an 8 x 8 map in windows of 4, then a 4 x 4 one.
    "emo_nano": {
        "stem_dim": 16,
        "depths": (1, 2, 3, 2),
        "embed_dims": (24, 32, 48, 64),
        "exp_ratios": (2.0, 2.5, 3.0, 3.5),
        "dim_heads": (8, 16, 16, 16),
        "window_sizes": (4, 4, 4, 4),
        "strides": (1, 2, 1, 2),
        "drop_path_rate": 0.0,
    },
    "emo_micro": {
        "stem_dim": 16,
        "depths": (1, 2, 3, 2),
        "embed_dims": (16, 24, 32, 48),
        "exp_ratios": (2.0, 2.5, 3.0, 3.5),
        "dim_heads": (8, 8, 16, 16),
        "window_sizes": (4, 4, 4, 4),
        "strides": (2, 1, 1, 2),
        "drop_path_rate": 0.0,
    },
}
"""Networks by name; what they leave out is in ``COMMON``."""

STAGES = ("stage0", "stage1", "stage2", "stage3", "stage4")


class Stem(nn.Module):
    """3 x 3 convolution with stride 2 and a bias, then batch norm."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        conv = nn.Conv2d(dim_in, dim_out, 3, 2, 1)
        self.convs = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(dim_out, eps=EPS))])

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) to (B, dim_out, ceil(H / 2), ceil(W / 2))."""
        return self.convs[0](x)


class EMO(nn.Module):
    """Efficient MOdel: a stem and four stages of iRMB.

    Args:
        num_classes: of the classifier, 0 for none. in_chans: of the images. stem_dim, depths, embed_dims, exp_ratios,
            norm_layers, act_layers, dw_kss, dim_heads, window_sizes, attn_ss, strides: see ``IRMB``; four values each,
            one a stage. drop_path_rate: of the last block, growing from 0. drop_rate: dropout before the classifier.
            global_pool: ``avg``, or empty for the normalised map. attn_pre, v_group, mixer: see ``IRMB``.

    Raises:
        ValueError: says which stage and field.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        embed_dims: tuple[int, ...],
        exp_ratios: tuple[float, ...],
        dim_heads: tuple[int, ...],
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_dim: int = COMMON["stem_dim"],
        norm_layers: tuple[str, ...] = COMMON["norm_layers"],
        act_layers: tuple[str, ...] = COMMON["act_layers"],
        dw_kss: tuple[int, ...] = COMMON["dw_kss"],
        window_sizes: tuple[int, ...] = COMMON["window_sizes"],
        attn_ss: tuple[bool, ...] = COMMON["attn_ss"],
        strides: tuple[int, ...] = COMMON["strides"],
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        attn_pre: bool = True,
        v_group: bool = False,
        mixer: str = "both",
    ) -> None:
        super().__init__()
        per_stage: dict[str, tuple[Any, ...]] = {
            "depths": depths,
            "embed_dims": embed_dims,
            "exp_ratios": exp_ratios,
            "dim_heads": dim_heads,
            "norm_layers": norm_layers,
            "act_layers": act_layers,
            "dw_kss": dw_kss,
            "window_sizes": window_sizes,
            "attn_ss": attn_ss,
            "strides": strides,
        }
        for name, value in per_stage.items():
            if len(value) != 4:
                raise ValueError(f"{name} is {value}, expected four values, one a stage")
        for name in ("depths", "embed_dims", "exp_ratios", "dim_heads", "strides"):
            if min(per_stage[name]) <= 0:
                raise ValueError(f"{name} is {per_stage[name]}, expected values above 0")
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool is {global_pool!r}, expected 'avg' or ''")
        self.in_chans, self.num_features, self.global_pool = in_chans, embed_dims[-1], global_pool
        self.head_hidden_size = self.num_features
        self.grad_checkpointing = False
        self.at_once = 0  # images that an evaluation on a CPU computes together; 0: the whole batch
        stem = {"norm_in": False, "has_skip": False, "v_proj": False, "se_ratio": 1.0, "attn_s": False}
        first = IRMB(stem_dim, stem_dim, norm_layer=norm_layers[0], act_layer=act_layers[0], dw_ks=dw_kss[0], **stem)
        self.stage0 = nn.Sequential(Stem(in_chans, stem_dim), first)
        self.feature_info = [{"num_chs": stem_dim, "reduction": 2, "module": "stage0"}]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        dim, reduction = stem_dim, 2
        for i, (depth, width) in enumerate(zip(depths, embed_dims, strict=True)):
            blocks = []
            for j in range(depth):
                begins = j == 0  # downsamples: twice the expansion, no attention, no skip
                try:
                    block = IRMB(
                        dim,
                        width,
                        has_skip=not begins,
                        exp_ratio=exp_ratios[i] * (2 if begins else 1),
                        norm_layer=norm_layers[i],
                        act_layer=act_layers[i],
                        dw_ks=dw_kss[i],
                        stride=strides[i] if begins else 1,
                        dim_head=dim_heads[i],
                        window_size=window_sizes[i],
                        attn_s=attn_ss[i] and not begins,
                        drop_path=rates[sum(depths[:i]) + j],
                        v_group=v_group,
                        attn_pre=attn_pre,
                        mixer=mixer,
                    )
                except ValueError as error:
                    raise ValueError(f"stage {i + 1}: {error}") from error
                blocks.append(block)
                dim = width
            setattr(self, STAGES[i + 1], nn.Sequential(*blocks))
            reduction *= strides[i]
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": STAGES[i + 1]})
        self.reduction = reduction
        self.norm = NORMS[norm_layers[-1]](dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    # -- what timm asks of a model

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained last layer; none for 0 classes."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        if num_classes > 0:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are matrices and yet have no decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates."""
        blocks = r"^stage([1-4])" if coarse else [(r"^stage([1-4])\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stage0", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping their maps."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the normalised last map (B, C, H / 32, W / 32).

        Raises:
            ValueError: other channels, images smaller than one pixel of the last map, batch norm over a single value.
        """
        b, c, h, w = x.shape
        if c != self.in_chans or min(h, w) < self.reduction:
            raise ValueError(
                f"images are {c} x {h} x {w}, expected {self.in_chans} channels and at least "
                f"{self.reduction} x {self.reduction} pixels"
            )
        if self.training and b == 1 and max(h, w) <= self.reduction:
            raise ValueError(f"one image of {h} x {w} pixels: batch norm cannot train on one value, give more images")
        if 0 < self.at_once < b and not self.training and x.is_cpu and not torch.compiler.is_compiling():
            return torch.cat([self.forward_features(part) for part in x.split(self.at_once)])
        x = x.contiguous(memory_format=torch.channels_last)
        for name in STAGES:
            stage = getattr(self, name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (B, classes); ``pre_logits`` stops before the classifier."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits or not self.global_pool else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


def padded_stages(net: EMO, h: int, w: int) -> list[str]:
    """Remarks on stages whose attention window is larger than their map of images of h x w: legal, and padded."""
    remarks = []
    for info in net.feature_info[1:]:
        rows, columns = (-(-side // info["reduction"]) for side in (h, w))
        block = getattr(net, info["module"])[-1]
        if block.attn_s and block.window_size > min(rows, columns):
            remarks.append(f"{info['module']}: window {block.window_size} on a map of {rows} x {columns} is padded")
    return remarks


# ---- timm ------------------------------------------------------------------------------------------------------------


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stage0.0.convs.0.0",
        "classifier": "head",
        "paper_name": "Rethinking Mobile Block for Efficient Attention-based Models",
        "paper_ids": "arXiv:2301.01146",
        "origin_url": "https://github.com/zhangzjn/EMO",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in list(VARIANTS)[:4]})


def _create(name: str, pretrained: bool, **kwargs: Any) -> EMO:
    feature_cfg = {"out_indices": (1, 2, 3, 4), "feature_cls": "list", "flatten_sequential": False}
    return build_model_with_cfg(
        EMO,
        name,
        pretrained,
        pretrained_filter_fn=lambda content, net: weights_of(content),
        feature_cfg=feature_cfg,
        **{**VARIANTS[name], **kwargs},
    )


def emo_1m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO-1M."""
    return _create("emo_1m", pretrained, **kwargs)


def emo_2m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO-2M."""
    return _create("emo_2m", pretrained, **kwargs)


def emo_5m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO-5M."""
    return _create("emo_5m", pretrained, **kwargs)


def emo_6m(pretrained: bool = False, **kwargs: Any) -> EMO:
    """EMO-6M."""
    return _create("emo_6m", pretrained, **kwargs)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Overwriting emo_")  # this file may be imported under two names
    for _entry in (emo_1m, emo_2m, emo_5m, emo_6m):
        register_model(_entry)
del __all__  # register_model lists the four there; everything here is public  # noqa: F821

# ---- iRMB in other backbones, and those backbones --------------------------------------------------------------------


class ConvViT(nn.Module):
    """DeiT with iRMB in place of its attention and feed-forward layers; positions stay, the class token is a mean.

    Expansion 4, kernel 3 and attention over the whole map give the sizes that are printed for DeiT-Tiny with iRMB.
    """

    def __init__(
        self, image: int, dim: int, depth: int, heads: int, patch: int, num_classes: int, in_chans: int = 3
    ) -> None:
        super().__init__()
        block: Spec = {"exp_ratio": 4.0, "norm_layer": "ln_2d", "act_layer": "gelu", "window_size": 0}
        side = image // patch
        self.patch_embed = nn.Conv2d(in_chans, dim, patch, patch)
        self.positions = nn.Parameter(trunc_normal_(torch.zeros(1, dim, side, side), std=0.02))
        self.blocks = nn.Sequential(*(IRMB(dim, dim, dim_head=dim // heads, **block) for _ in range(depth)))
        self.norm = LayerNorm2d(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, image, image) to logits (B, classes)."""
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last)) + self.positions
        return self.head(self.norm(self.blocks(x)).mean((2, 3)))


def reduction_layer(dim: int, ratio: int) -> nn.Module:
    """PVT's spatial reduction of keys and values: a strided convolution and layer norm."""
    return nn.Sequential(nn.Conv2d(dim, dim, ratio, ratio), LayerNorm2d(dim)) if ratio > 1 else nn.Identity()


class PvtBlock(nn.Module):
    """A block of the Pyramid Vision Transformer: attention on spatially reduced keys and values, then an MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm2d(dim), LayerNorm2d(dim)
        self.reduce = reduction_layer(dim, reduction)
        self.q, self.kv, self.proj = (Pointwise(dim, width, True) for width in (dim, 2 * dim, dim))
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y = self.norm1(x)
        k, v = self.kv(self.reduce(y)).chunk(2, 1)
        x = x + self.proj(attention(self.q(y), k, v, self.heads))
        return x + self.mlp(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReducedIRMB(IRMB):
    """iRMB whose keys and attended values come from a spatially reduced map, as PVT's attention."""

    def __init__(self, dim: int, heads: int, exp_ratio: int, reduction: int) -> None:
        super().__init__(
            dim, dim, exp_ratio=exp_ratio, norm_layer="ln_2d", act_layer="gelu", window_size=0, dim_head=dim // heads
        )
        del self.qk
        self.q, self.k = Pointwise(dim, dim, True), Pointwise(dim, dim, True)
        self.reduce = reduction_layer(dim, reduction)

    def attend(self, x: Tensor, expanded: Tensor | None = None) -> Tensor:
        """EW-MHSA of a map (B, C, H, W) with the keys of the reduced one."""
        reduced = self.reduce(x)
        return self.v(attention(self.q(x), self.k(reduced), reduced, self.heads))


class PVT(nn.Module):
    """Pyramid Vision Transformer; ``irmb`` replaces its blocks. The defaults are PVT-Tiny.

    The class token of the last stage becomes a mean over pixels, with iRMB and without.
    """

    DIMS, HEADS, EXPANSION, REDUCTION = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1)

    def __init__(self, irmb: bool, image: int, num_classes: int, in_chans: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.stages, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        dim, side = in_chans, image
        for i, width in enumerate(self.DIMS):
            patch = 4 if i == 0 else 2
            side //= patch
            if side < self.REDUCTION[i]:
                raise ValueError(f"PVT: images of {image} pixels, expected at least 32")
            self.embed.append(nn.Sequential(nn.Conv2d(dim, width, patch, patch), LayerNorm2d(width)))
            self.positions.append(trunc_normal_(torch.zeros(1, width, side, side), std=0.02))
            block = ReducedIRMB if irmb else PvtBlock
            args = (width, self.HEADS[i], self.EXPANSION[i], self.REDUCTION[i])
            self.stages.append(nn.Sequential(*(block(*args) for _ in range(depth))))
            dim = width
        self.norm = LayerNorm2d(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, image, image) to logits (B, classes)."""
        x = x.contiguous(memory_format=torch.channels_last)
        for embed, position, stage in zip(self.embed, self.positions, self.stages, strict=True):
            x = stage(embed(x) + position)
        return self.head(self.norm(x).mean((2, 3)))


ARMS = (*MIXERS, "deit", "deit_irmb", "pvt", "pvt_irmb")
"""What ``build`` makes: EMO with each mixer, and other backbones with and without iRMB."""
VIT = {False: {"dim": 192, "depth": 12, "heads": 3, "patch": 16}, True: {"dim": 32, "depth": 3, "heads": 2, "patch": 4}}
"""DeiT-Tiny, and one as small as the networks that are not of the paper."""


def build(arm: str, variant: str, num_classes: int, in_chans: int = 3, image: int = 224, **changes: Any) -> nn.Module:
    """A network by name.

    Args:
        arm: one of ``ARMS``; ``both`` is EMO. variant: one of ``VARIANTS``; for other backbones it decides their size.
        image: side of the images. changes: fields of a variant of EMO to change.

    Raises:
        ValueError: unknown name, a size that cannot be.
    """
    if arm not in ARMS or variant not in VARIANTS:
        raise ValueError(
            f"no network {arm!r} of {variant!r}, expected among {', '.join(ARMS)} and {', '.join(VARIANTS)}"
        )
    if arm in MIXERS:
        return EMO(**{**VARIANTS[variant], **changes}, num_classes=num_classes, in_chans=in_chans, mixer=arm)
    if arm.startswith("pvt"):
        return PVT(arm == "pvt_irmb", image, num_classes, in_chans)
    size = VIT[variant in ("emo_nano", "emo_micro")]
    if image % size["patch"]:
        raise ValueError(f"images of {image} pixels are not a multiple of DeiT's patches of {size['patch']}")
    if arm == "deit_irmb":
        return ConvViT(image, **size, num_classes=num_classes, in_chans=in_chans)
    dim, depth, heads, patch = (size[name] for name in ("dim", "depth", "heads", "patch"))
    return VisionTransformer(image, patch, in_chans, num_classes, embed_dim=dim, depth=depth, num_heads=heads)


# ---- counting --------------------------------------------------------------------------------------------------------


def parameters(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def count_flops(net: nn.Module, image: int = 224, in_chans: int = 3) -> dict[str, int]:
    """Operations of one image, counted as fvcore does, which the paper uses: a multiply and an add are one.

    Convolutions, linear layers and the two products of attention; batch norm two a value, layer norm five; biases,
    activations and means nothing.

    Returns:
        by top-level part of the network, and ``total``.
    """
    net = copy.deepcopy(net).to("meta").eval()
    counts: dict[str, int] = {"total": 0}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        part = name.partition(".")[0]

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, number = inputs[0], 0
            if isinstance(module, nn.Conv2d):
                number = module.weight[0].numel() * output.numel()
            elif isinstance(module, nn.Linear):
                number = module.in_features * output.numel()
            elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                number = (2 if isinstance(module, nn.BatchNorm2d) else 5) * x.numel()
            elif isinstance(module, IRMB) and module.attn_s:
                number = attention_flops(module, *x.shape[1:])
            elif isinstance(module, PvtBlock):
                keys = -(-x[0, 0].numel() // reduction_of(module) ** 2)
                number = 2 * x[0].numel() * keys
            elif type(module).__module__.startswith("timm") and type(module).__name__ == "Attention":
                number = 2 * x.shape[1] ** 2 * x.shape[2]
            counts[part] = counts.get(part, 0) + number
            counts["total"] += number

        return count

    handles = [m.register_forward_hook(counter(name)) for name, m in net.named_modules() if name]
    with torch.no_grad():
        net(torch.empty(1, in_chans, image, image, device="meta"))
    for handle in handles:
        handle.remove()
    return counts


def reduction_of(block: nn.Module) -> int:
    """Side by which a block of PVT reduces its keys."""
    return block.reduce[0].stride[0] if isinstance(block.reduce, nn.Sequential) else 1


def attention_flops(block: IRMB, c: int, h: int, w: int) -> int:
    """Multiply-adds of q k^T and of the map times the values, padding included."""
    below, right = padding(h, w, block.window_size)
    pixels = (h + below) * (w + right)
    keys = block.window_size**2 if block.window_size > 0 else pixels
    if isinstance(block, ReducedIRMB):
        keys = -(-keys // reduction_of(block) ** 2)
    values = c if block.attn_pre and not block.parallel else block.proj.conv.in_channels
    return pixels * keys * (c + values)


# ---- inference and checkpoints ---------------------------------------------------------------------------------------


def fold_batchnorm(net: EMO) -> EMO:
    """A copy for inference with batch norms folded into the convolutions before and, without padding between, after.

    On a CPU it computes two images at a time, whose maps are small enough to stay in the cache.
    """
    net = copy.deepcopy(net).eval()
    stem = net.stage0[0].convs[0]
    stem[0], stem[1] = fuse_conv_bn_eval(stem[0], stem[1]), nn.Identity()
    for block in (module for module in net.modules() if isinstance(module, IRMB)):
        if block.local:
            local = block.conv_local
            local.conv, local.norm = fuse_conv_bn_eval(local.conv, local.norm), nn.Identity()
        if isinstance(block.norm, nn.BatchNorm2d) and not block.attn_s and isinstance(block.v, ConvNormAct):
            norm, conv = block.norm, block.v.conv
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            shift = norm.bias - norm.running_mean * scale
            weight = conv.weight.flatten(1)
            bias = weight @ shift if conv.bias is None else weight @ shift + conv.bias
            conv.weight, conv.bias = nn.Parameter(conv.weight * scale.view(1, -1, 1, 1)), nn.Parameter(bias)
            block.norm = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True
    net.at_once = 2
    return net.requires_grad_(False)


def weights_of(content: Mapping[str, Any], ema: bool = True) -> dict[str, Any]:
    """The state dict in the content of an official ``net.pth``; see ``read_checkpoint``."""
    for key in ("net_E", "net") if ema else ("net",):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {name.removeprefix("module."): value for name, value in content.items()}


def read_checkpoint(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """Weights of an official ``net.pth``: a bare state dict, or one with ``net`` and ``net_E`` (averaged).

    Args:
        ema: take the averaged weights, which the paper reports, where there are some.

    Raises:
        ValueError: unreadable, or no weights in it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is no readable checkpoint: {str(error).splitlines()[0]}") from error
    weights = weights_of(content, ema) if isinstance(content, Mapping) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights, expected a state dict or one under 'net' or 'net_E'")
    return weights


def load_weights(net: EMO, weights: Mapping[str, Tensor], reset_head: bool = False) -> None:
    """Put official weights into a network.

    Args:
        weights: from ``read_checkpoint``. reset_head: leave the classifier of the network as it is.

    Raises:
        ValueError: weights that are missing, of another shape, or unexpected; the first ten of each.
    """
    own = net.state_dict()
    head = weights.get("head.weight")
    if not reset_head and head is not None and "head.weight" in own and head.shape != own["head.weight"].shape:
        raise ValueError(
            f"the checkpoint classifies {len(head)} classes, the network {len(own['head.weight'])}: "
            "give --reset-head to train a new classifier"
        )
    given = {name: value for name, value in weights.items() if not (reset_head and name.startswith("head."))}
    kept = {name for name in own if reset_head and name.startswith("head.")}
    wrong = {
        "missing": [name for name in own if name not in given and name not in kept],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [name for name in given if name in own and given[name].shape != own[name].shape],
    }
    if any(wrong.values()):
        lists = [f"{what}: {', '.join(names[:10])} ({len(names)})" for what, names in wrong.items() if names]
        raise ValueError("the checkpoint does not fit: " + "; ".join(lists))
    net.load_state_dict({**{name: own[name] for name in kept}, **given})


def export_onnx(net: nn.Module, path: str | Path, image: int = 224, in_chans: int = 3) -> None:
    """Write a network as ONNX; the batch may have any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of itself, and that sizes of images are constants
        torch.onnx.export(
            net.eval(),
            (torch.zeros(2, in_chans, image, image),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
