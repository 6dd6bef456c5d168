"""CoOp: context vectors learnt in the word-embedding space of a frozen CLIP, with CLIP itself and the baselines.

The text tower works on embeddings, so that a prompt may be words, learnt vectors, or both. What all classes share at
the front of their prompts is computed once, positions behind the longest prompt not at all, and of the last layer only
the row that is read; the result is that of the plain computation. The paper is arXiv 2109.01134.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import itertools
import json
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
POSITIONS = ("end", "middle", "front")
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven templates of prompt ensembling."""


# ---- words -----------------------------------------------------------------------------------------------------------


def vocabulary_file() -> Path:
    """CLIP's merges as the open-clip-torch wheel carries them; the package is looked up, not imported.

    Raises:
        ValueError: open-clip-torch is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise ValueError("CLIP's vocabulary comes with open-clip-torch: install it, or name a merges file")


@cache
def _byte_letters() -> tuple[str, ...]:
    """A printable letter for each byte value, in the order of CLIP's first 256 token ids, and by byte value."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return (*(letters[b] for b in shown + hidden), *(letters[b] for b in range(256)))


@cache
def _read_merges(path: Path) -> tuple[tuple[str, str], ...]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    pairs = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # the file lists more than CLIP uses
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path}: not a list of BPE merges, expected two pieces on every line after the first")
    return tuple(pairs)  # type: ignore[return-value]


class Tokenizer:
    """CLIP's byte-pair encoding.

    Args:
        merges: merges file (open_clip's or a transformers folder's merges.txt); by default open-clip-torch's.
        kept: ascending BPE ids that a small text tower knows; a token's number is then its place among them.

    Raises:
        ValueError: no vocabulary; a text with a piece that is not among ``kept``.
    """

    WORDS = re.compile(
        r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE
    )

    def __init__(self, merges: Path | None = None, kept: Sequence[int] | None = None) -> None:
        pairs = _read_merges(merges or vocabulary_file())
        letters = _byte_letters()[:256]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in pairs)]
        pieces += ["<start_of_text>", "<end_of_text>"]
        self._rank = {pair: i for i, pair in enumerate(pairs)}
        self._full = {piece: i for i, piece in enumerate(pieces)}
        self.pieces = pieces if kept is None else [pieces[i] for i in kept]
        self._number = {piece: i for i, piece in enumerate(self.pieces)}
        self._byte_letters = _byte_letters()[256:]
        self._known: dict[str, list[str]] = {}
        if kept is not None and not {"<start_of_text>", "<end_of_text>"} <= set(self.pieces):
            raise ValueError("the kept tokens lack start or end of text")
        self.sos, self.eos = self._number["<start_of_text>"], self._number["<end_of_text>"]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    def _split(self, word: str) -> list[str]:
        """The pieces of one word: the pair of lowest rank is merged until none is known."""
        if word not in self._known:
            parts = [*word[:-1], word[-1] + "</w>"]
            while len(parts) > 1:
                best = min(itertools.pairwise(parts), key=lambda pair: self._rank.get(pair, math.inf))
                if best not in self._rank:
                    break
                merged, i = [], 0
                while i < len(parts):
                    pair = i + 1 < len(parts) and (parts[i], parts[i + 1]) == best
                    merged.append(parts[i] + parts[i + 1] if pair else parts[i])
                    i += 2 if pair else 1
                parts = merged
            self._known[word] = parts
        return self._known[word]

    def split(self, text: str) -> list[str]:
        """The pieces of a text. HTML entities are read, white space is joined, letters are lowered."""
        plain = " ".join(html.unescape(html.unescape(text)).split()).lower()
        words = ("".join(self._byte_letters[b] for b in word.encode()) for word in self.WORDS.findall(plain))
        return [piece for word in words for piece in self._split(word)]

    def full_ids(self, text: str) -> list[int]:
        """Ids in CLIP's whole vocabulary, whatever was kept."""
        return [self._full[piece] for piece in self.split(text)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end."""
        pieces = self.split(text)
        unknown = [piece for piece in pieces if piece not in self._number]
        if unknown:
            raise ValueError(f"{text!r}: this text tower does not know the token {unknown[0]!r}")
        return [self._number[piece] for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        value = {letter: b for b, letter in enumerate(self._byte_letters)}
        joined = "".join(self.pieces[i] for i in ids).replace("</w>", " ")
        return bytes(b for c in joined for b in ([value[c]] if c in value else c.encode())).decode(errors="replace")

    def tokenize(self, texts: Sequence[str], context: int) -> Tensor:
        """(N, context) int64: start, tokens, end, zeros.

        Raises:
            ValueError: a text is longer than the context.
        """
        out = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(out, texts, strict=True):
            ids = [self.sos, *self.encode(text), self.eos]
            if len(ids) > context:
                raise ValueError(f"{text!r} needs {len(ids)} tokens, the limit is {context}")
            row[: len(ids)] = torch.tensor(ids)
        return out


# ---- towers ----------------------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x * torch.sigmoid(1.702 * x)


KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention, optionally causal, behind a past that all samples share."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(
        self, x: Tensor, causal: bool, past: KeysValues | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Attend.

        Args:
            x: (N, L, D). causal: a position sees only what stands before it. past: keys and values (1, H, P, d) that
                stand before x. rows: (N,) the one query that is wanted of each sample.

        Returns:
            (N, L, D), or (N, 1, D) with rows; keys and values (N, H, P + L, d).
        """
        n, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(n, -1, self.heads, width // self.heads).transpose(1, 2)

        if rows is None:
            query, key, value = (heads(y) for y in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        else:
            one = x[torch.arange(n, device=x.device), rows].unsqueeze(1)
            query = heads(F.linear(one, self.in_proj_weight[:width], self.in_proj_bias[:width]))
            both = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
            key, value = (heads(y) for y in both.chunk(2, -1))
        before = 0
        if past is not None:
            before = past[0].shape[2]
            key = torch.cat([past[0].to(key.dtype).expand(n, -1, -1, -1), key], 2)
            value = torch.cat([past[1].to(value.dtype).expand(n, -1, -1, -1), value], 2)
        mask = None
        if causal and rows is not None:
            mask = (torch.arange(before + length, device=x.device) <= (before + rows).unsqueeze(1)).view(n, 1, 1, -1)
        elif causal and before:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=x.device).tril(before)
        plain = causal and mask is None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=plain)
        return self.out_proj(out.transpose(1, 2).reshape(n, -1, width)), (key, value)


class Block(nn.Module):
    """Pre-norm transformer block; the names are those of the released weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, causal: bool = False, past: KeysValues | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        """As ``Attention.forward``."""
        out, kept = self.attn(self.ln_1(x), causal, past, rows)
        if rows is not None:
            x = x[torch.arange(len(x), device=x.device), rows].unsqueeze(1)
        x = x + out
        return x + self.mlp(self.ln_2(x)), kept


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        for block in self.resblocks:  # CLIP's initialisation
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, x: Tensor, rows: Tensor, causal: bool = False, prefix: Tensor | None = None) -> Tensor:
        """One row of each sample after the last block.

        Args:
            x: (N, L, D). rows: (N,) position in x of the row that is read. prefix: (P, D) what stands before every
                sample; in a causal stack it does not see what follows, so it is computed once for all samples.

        Returns:
            (N, D).
        """
        shared = None if prefix is None or not len(prefix) else prefix.unsqueeze(0)
        past = None
        for i, block in enumerate(self.resblocks):
            if shared is not None:
                shared, past = block(shared, causal)
            x, _ = block(x, causal, past, rows if i == len(self.resblocks) - 1 else None)
        return x.squeeze(1)


class TextTower(nn.Module):
    """CLIP's text encoder on token ids or on embeddings."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, out))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def context(self) -> int:
        """Most positions of a text."""
        return len(self.positional_embedding)

    @property
    def width(self) -> int:
        """Length of a word embedding."""
        return self.positional_embedding.shape[1]

    def encode(self, rest: Tensor, last: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Text features of embeddings (Sec. 3.1).

        Args:
            rest: (C, L, D) embeddings of each text. last: (C,) position of the end token, the prefix counted.
            prefix: (P, D) embeddings that stand before each ``rest``.

        Returns:
            (C, E), not normalised.
        """
        before = 0 if prefix is None else len(prefix)
        if before + rest.shape[1] > self.context:
            raise ValueError(f"a text has {before + rest.shape[1]} positions, the limit is {self.context}")
        x = rest + self.positional_embedding[before : before + rest.shape[1]]
        if prefix is not None:
            prefix = prefix + self.positional_embedding[:before]
        x = self.transformer(x, last - before, causal=True, prefix=prefix)
        return self.ln_final(x) @ self.text_projection

    def forward(self, ids: Tensor, eos: int) -> Tensor:
        """(N, L) token ids -> (N, E). Positions behind the last end token are left out: nothing sees them."""
        last = (ids == eos).int().argmax(1)
        ids = ids[:, : int(last.max()) + 1]
        return self.encode(self.token_embedding(ids), last)


class Bottleneck(nn.Module):
    """Residual block of CLIP's ResNet: strides are average pools."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            layers = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inputs, 4 * width, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * width)),
            ]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, 4 width, h / stride, w / stride)."""
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(self.avgpool(out)))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class AttentionPool(nn.Module):
    """Attention of the mean position over all positions."""

    def __init__(self, side: int, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, out)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, out)."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        query, key, value = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        return self.c_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1))


class ResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average-pooled strides, attention pooling."""

    def __init__(self, layers: Sequence[int], width: int, heads: int, resolution: int, out: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inputs = width
        for i, count in enumerate(layers):
            stage = []
            for k in range(count):
                stage.append(Bottleneck(inputs, width * 2**i, 2 if i and not k else 1))
                inputs = 4 * width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(resolution // 32, inputs, heads, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, out)."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return self.attnpool(x)


class VisionTransformer(nn.Module):
    """CLIP's ViT: patches, a class token, a norm before and behind the blocks, a projection."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn((resolution // patch) ** 2 + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, out)."""
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.positional_embedding
        rows = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.ln_post(self.transformer(self.ln_pre(x), rows)) @ self.proj


class PooledFeatures(nn.Module):
    """Pooled features of a convolutional network less their mean, as an image tower.

    Args:
        body: (B, 3, S, S) normalised pixels -> (B, D, h, w). mean: (D,) subtracted from the pooled features.
    """

    def __init__(self, body: Callable[[Tensor], Tensor], mean: Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D)."""
        return self.body(x).mean((2, 3)) - self.mean


def expected_relu6(mean: Tensor, std: Tensor) -> Tensor:
    """E[min(max(X, 0), 6)] of X ~ N(mean, std^2): what a batch norm says about the features behind it."""
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    low, high = -mean / std, (6 - mean) / std

    def density(x: Tensor) -> Tensor:
        return normal.log_prob(x).exp()

    inside = normal.cdf(high) - normal.cdf(low)
    return mean * inside + std * (density(low) - density(high)) + 6 * (1 - normal.cdf(high))


# ---- CLIP ------------------------------------------------------------------------------------------------------------


class CLIP(nn.Module):
    """Image tower, text tower, temperature.

    Args:
        visual: normalised pixels -> (B, E). text: the text tower. scale: logarithm of the temperature's inverse.
        pixel_mean, pixel_std: of the pixels in [0, 1], as the image tower expects them. resolution: their side.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: TextTower,
        scale: float = math.log(1 / 0.07),
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
        resolution: int = 224,
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(float(scale)))
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self.resolution = resolution

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, E), not normalised.

        Raises:
            ValueError: another size than the image tower's.
        """
        if pixels.shape[-2:] != (self.resolution, self.resolution):
            found = tuple(pixels.shape[-2:])
            raise ValueError(f"pictures have size {found}, the image tower expects {(self.resolution,) * 2}")
        return self.visual((pixels.float() / 255 - self.pixel_mean) / self.pixel_std)

    def freeze(self) -> CLIP:
        """Evaluation mode, no gradient for any weight (Sec. 3.2: the entire pre-trained parameters are kept fixed)."""
        return self.eval().requires_grad_(False)


@dataclass(frozen=True)
class Sizes:
    """What a CLIP consists of. ``layers``: a ResNet's four stages or a ViT's depth; ``patch``: 0 for a ResNet."""

    out: int
    layers: tuple[int, ...]
    width: int
    patch: int
    heads: int
    resolution: int = 224
    context: int = 77
    vocabulary: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8

    def build(self) -> CLIP:
        """A CLIP with random weights."""
        if self.patch:
            visual: nn.Module = VisionTransformer(
                self.resolution, self.patch, self.width, self.layers[0], self.heads, self.out
            )
        else:
            visual = ResNet(self.layers, self.width, self.heads, self.resolution, self.out)
        text = TextTower(self.vocabulary, self.context, self.text_width, self.text_layers, self.text_heads, self.out)
        return CLIP(visual, text, resolution=self.resolution)


BACKBONES = {
    "RN50": Sizes(1024, (3, 4, 6, 3), 64, 0, 32),
    "RN101": Sizes(512, (3, 4, 23, 3), 64, 0, 32),
    "ViT-B/32": Sizes(512, (12,), 768, 32, 12),
    "ViT-B/16": Sizes(512, (12,), 768, 16, 12),
}


def sizes_of(state: dict[str, Tensor], heads: tuple[int, int] | None = None) -> Sizes:
    """The sizes that weights in OpenAI's naming have; heads (image, text) are width / 64 unless given.

    Raises:
        ValueError: a tensor that every CLIP has is missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"not the weights of a CLIP: no tensor {name!r}")
        return state[name].shape

    def count(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.match(pattern, name))})

    (text_width, out), (context, _) = shape("text_projection"), shape("positional_embedding")
    text = {
        "out": out,
        "context": context,
        "vocabulary": shape("token_embedding.weight")[0],
        "text_width": text_width,
        "text_layers": count(r"transformer\.resblocks\.(\d+)\."),
        "text_heads": heads[1] if heads else max(1, text_width // 64),
    }
    if "visual.proj" in state:
        width, _, patch, _ = shape("visual.conv1.weight")
        side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
        layers = (count(r"visual\.transformer\.resblocks\.(\d+)\."),)
        image_heads = heads[0] if heads else max(1, width // 64)
        return Sizes(layers=layers, width=width, patch=patch, heads=image_heads, resolution=side * patch, **text)
    layers = tuple(count(rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    width = shape("visual.layer1.0.conv1.weight")[0]
    side = math.isqrt(shape("visual.attnpool.positional_embedding")[0] - 1)
    return Sizes(layers=layers, width=width, patch=0, heads=width * 32 // 64, resolution=side * 32, **text)


def from_state(state: dict[str, Tensor], sizes: Sizes | None = None) -> CLIP:
    """A CLIP with weights in OpenAI's naming, in float32.

    Raises:
        ValueError: tensors are missing or have other shapes than ``sizes`` (by default: those of the weights) says.
    """
    text = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    named = {}
    for name, tensor in state.items():
        if name in ("input_resolution", "context_length", "vocab_size"):
            continue
        named["text." + name if name.split(".")[0] in text else name] = tensor
    with torch.device("meta"):
        clip = (sizes or sizes_of(state)).build()
    own = clip.state_dict()
    batches = {name for name in own if name.endswith("num_batches_tracked")}
    wrong = [
        f"{name} has shape {tuple(named[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in named and own[name].shape != named[name].shape
    ]
    wrong += [f"{name} is missing" for name in own if name not in named and name not in batches]
    wrong += [f"{name} is unknown" for name in named if name not in own]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights do not fit: {'; '.join(wrong[:5])}{more}")
    full = {name: named[name].float() if name in named else torch.zeros((), dtype=torch.long) for name in own}
    clip.load_state_dict(full, assign=True)
    clip.pixel_mean, clip.pixel_std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return clip


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' ``CLIPModel`` in OpenAI's naming (image towers: ViT only)."""
    names = {
        r"text_model\.embeddings\.token_embedding\.": "token_embedding.",
        r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
        r"text_model\.encoder\.layers\.": "transformer.resblocks.",
        r"text_model\.final_layer_norm\.": "ln_final.",
        r"vision_model\.embeddings\.class_embedding": "visual.class_embedding",
        r"vision_model\.embeddings\.patch_embedding\.": "visual.conv1.",
        r"vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
        r"vision_model\.pre_layrnorm\.": "visual.ln_pre.",
        r"vision_model\.encoder\.layers\.": "visual.transformer.resblocks.",
        r"vision_model\.post_layernorm\.": "visual.ln_post.",
        r"\.self_attn\.": ".attn.",
        r"\.layer_norm(\d)\.": r".ln_\1.",
        r"\.mlp\.fc1\.": ".mlp.c_fc.",
        r"\.mlp\.fc2\.": ".mlp.c_proj.",
    }
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):
            continue
        for pattern, new in names.items():
            name = re.sub(pattern, new, name)
        if match := re.match(r"(.*)\.([qkv])_proj\.(weight|bias)$", name):
            parts.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        elif name in ("text_projection.weight", "visual_projection.weight"):
            out["text_projection" if name.startswith("text") else "visual.proj"] = tensor.T
        else:
            out[name] = tensor
    return out | {name: torch.cat([three[k] for k in "qkv"]) for name, three in parts.items()}


class _LeftOut:
    """What is not needed of a checkpoint: the authors' hold the schedule as an object, with its optimiser."""


def _emptied(kind: type) -> dict[Any, Any]:
    return {}


_LEFT_OUT: list[Any] = [
    (_LeftOut, "torch.optim.sgd.SGD"),
    (_LeftOut, "torch.optim.lr_scheduler.CosineAnnealingLR"),
    (_emptied, "collections.defaultdict"),
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, a state dict, the authors' checkpoints or one of OpenAI's TorchScript archives.

    Raises:
        ValueError: none of these.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        with zipfile.ZipFile(path) as archive:
            script = any("/code/" in name for name in archive.namelist())
        if script:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated; it is what the weights were published in
                return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
        with torch.serialization.safe_globals([dict, *_LEFT_OUT]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: neither weights nor a TorchScript archive ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors")
    return state


def load_clip(path: Path, sizes: Sizes | None = None) -> CLIP:
    """CLIP from OpenAI's file (RN50.pt ...), a state dict, or a folder that transformers saved.

    Args:
        sizes: what is expected; the weights decide otherwise.

    Raises:
        ValueError: missing, malformed, or of another architecture than ``sizes``.
    """
    heads = None
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no readable config.json, expected a folder saved by transformers") from error
        for part in ("vision_config", "text_config"):
            act = config.get(part, {}).get("hidden_act", "quick_gelu")
            if act != "quick_gelu":
                raise ValueError(f"{path}: {part} has activation {act!r}, CLIP's is quick_gelu")
        heads = (
            config.get("vision_config", {}).get("num_attention_heads", 12),
            config.get("text_config", {}).get("num_attention_heads", 8),
        )
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no model.safetensors and no pytorch_model.bin")
        path = found[0]
    state = read_tensors(path)
    if any(name.startswith("text_model.") for name in state):
        state = from_transformers(state)
    try:
        clip = from_state(state, sizes or sizes_of(state, heads))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return clip.freeze()


# ---- prompts ---------------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """A class name as it stands in a prompt."""
    return name.replace("_", " ")


class PromptLearner(nn.Module):
    """Prompts [start] v_1 ... v_M [class name] . [end] with learnt v (eq. 2), or v around (eq. 4) or behind the name.

    Args:
        text: the frozen text tower. tokenizer: its tokenizer. names: class names.
        context: M, number of context vectors. position: where the class name stands: end, middle, front.
        class_specific: one context for each class instead of one for all. phrase: words to start from, M of them.
        truncate: leave out the positions behind the longest prompt, which nothing reads.

    Raises:
        ValueError: M below 1, unknown position, class-specific context with a phrase, a phrase that is not M tokens,
            an empty class name, a prompt longer than the text tower's context.
    """

    def __init__(
        self,
        text: TextTower,
        tokenizer: Tokenizer,
        names: Sequence[str],
        context: int = 16,
        position: str = "end",
        class_specific: bool = False,
        phrase: str | None = None,
        truncate: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if context < 1:
            raise ValueError(f"M is {context}, expected at least one context vector")
        if position not in POSITIONS:
            raise ValueError(f"unknown position {position!r}, expected one of {', '.join(POSITIONS)}")
        if class_specific and phrase is not None:
            raise ValueError("a class-specific context starts from random vectors: leave out the phrase, or share")
        if not names or any(not name.strip() for name in names):
            raise ValueError("class names must not be empty")
        if len(set(names)) < len(names):
            warnings.warn("some class names occur twice; their prompts are equal", stacklevel=2)
        names = [plain(name) for name in names]
        self.context, self.position, self.class_specific = context, position, class_specific
        count, width, device = len(names), text.width, text.positional_embedding.device
        if phrase is None:
            shape = (count, context, width) if class_specific else (context, width)
            start = torch.empty(shape, device=device if generator is None else "cpu")
            start.normal_(std=0.02, generator=generator)
        else:
            ids = tokenizer.encode(plain(phrase))
            if len(ids) != context:
                raise ValueError(f"phrase {phrase!r} is {len(ids)} tokens, expected M={context}: name one word a token")
            start = text.token_embedding(torch.tensor(ids, device=device)).detach()
        self.ctx = nn.Parameter(start.to(device).clone())

        endings = [tokenizer.encode(f"{name}.") for name in names]
        needed = [2 + context + len(ending) for ending in endings]
        if max(needed) > text.context:
            worst = max(range(count), key=lambda c: needed[c])
            raise ValueError(
                f"class {names[worst]!r} needs {needed[worst]} tokens with M={context}, the limit is {text.context}"
            )
        length = max(needed) if truncate else text.context
        # Position of each of a prompt's parts: start, context vectors, tokens of the name, what follows.
        ids, slots = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, context, dtype=torch.long)
        ids[:, 0] = tokenizer.sos
        head = {"end": context, "middle": context // 2, "front": 0}[position]
        for c, (name, ending) in enumerate(zip(names, endings, strict=True)):
            words = len(tokenizer.encode(name))
            slots[c] = torch.arange(1, context + 1)
            slots[c, head:] += words if head < context else 0
            free = torch.ones(length, dtype=torch.bool)
            free[0] = free[slots[c]] = False
            row = torch.tensor([*ending, tokenizer.eos])
            ids[c, free.nonzero().squeeze(1)[: len(row)]] = row
        frozen = text.token_embedding(ids.to(device)).detach()
        self.head = 0 if class_specific else head
        """Context vectors at the front that all classes share."""
        self.register_buffer("frozen", frozen, persistent=False)
        self.register_buffer("slots", slots.to(device), persistent=False)
        self.register_buffer("last", torch.tensor([n - 1 for n in needed], device=device), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embeddings that stand before every class (1 + shared, D), and those of each class behind them (C, L, D)."""
        start = self.frozen[0, :1]
        prefix = torch.cat([start, self.ctx[: self.head]]) if self.head else start
        rest = self.frozen[:, len(prefix) :]
        if self.head < self.context:
            count = len(rest)
            own = self.ctx if self.class_specific else self.ctx[self.head :].expand(count, -1, -1)
            rows = torch.arange(count, device=rest.device).unsqueeze(1)
            rest = rest.index_put((rows, self.slots[:, self.head :] - len(prefix)), own)
        return prefix, rest

    def prompts(self) -> Tensor:
        """Whole prompts (C, L, D), as the paper writes them."""
        prefix, rest = self()
        return torch.cat([prefix.expand(len(rest), -1, -1), rest], 1)

    def load_context(self, ctx: Tensor) -> None:
        """Take trained context vectors; a checkpoint's embeddings of class names are of no use here.

        Raises:
            ValueError: another M, width or number of classes.
        """
        if ctx.shape != self.ctx.shape:
            raise ValueError(
                f"the checkpoint's context has shape {tuple(ctx.shape)}, this learner's {tuple(self.ctx.shape)}: "
                "M, width and, with class-specific context, the number of classes must be equal"
            )
        with torch.no_grad():
            self.ctx.copy_(ctx)


class CoOp(nn.Module):
    """p(c|x) = softmax_c(exp(s) cos(f(x), g(t_c))) with learnt prompts t_c (eq. 1 and 3).

    Args:
        clip: frozen. learner: its prompts. chunk: most classes in one pass of the text tower, recomputed in the
            backward pass to save memory; 0: all at once.
    """

    def __init__(self, clip: CLIP, learner: PromptLearner, chunk: int = 0) -> None:
        super().__init__()
        self.text, self.learner, self.chunk = clip.text, learner, chunk
        self.register_buffer("scale", clip.logit_scale.detach().exp(), persistent=False)

    def text_features(self) -> Tensor:
        """(C, E), of length one."""
        prefix, rest = self.learner()
        last = self.learner.last
        if not self.chunk or self.chunk >= len(rest):
            return F.normalize(self.text.encode(rest, last, prefix), dim=-1)
        parts = [
            checkpoint(self.text.encode, part, end, prefix, use_reentrant=False)
            for part, end in zip(rest.split(self.chunk), last.split(self.chunk), strict=True)
        ]
        return F.normalize(torch.cat(parts), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Image features (B, E) of any length -> logits (B, C)."""
        return self.scale * F.normalize(features, dim=-1) @ self.text_features().T  # eq. 3, the softmax is in the loss


@torch.no_grad()
def zero_shot(
    text: TextTower, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], chunk: int = 256
) -> Tensor:
    """Text features (C, E) of hand-written prompts; of several templates the normalised mean of normalised features.

    Raises:
        ValueError: a template without exactly one {}.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} needs {{}} exactly once")
    texts = [template.format(plain(name)) for name in names for template in templates]
    ids = tokenizer.tokenize(texts, text.context).to(text.positional_embedding.device)
    features = torch.cat([F.normalize(text(part, tokenizer.eos), dim=-1) for part in ids.split(chunk)])
    return F.normalize(features.view(len(names), len(templates), -1).mean(1), dim=-1)


def nearest_words(ctx: Tensor, table: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Euclidean distances (M, k) and token ids (M, k) of the embeddings nearest to context vectors (Sec. 4.3)."""
    found = torch.cdist(ctx.float(), table.float()).topk(k, largest=False)
    return found.values, found.indices


def learning_rate(epoch: int, epochs: int, base: float, warm: float = 1e-5, recount: bool = True) -> float:
    """Learning rate of an epoch (from 0): ``warm`` in the first, then a cosine over ``epochs``.

    ``recount`` starts the cosine anew behind the first epoch, as the official configuration does, so that it does not
    come to its end; without it the cosine has run for one epoch already.
    """
    if epoch == 0:
        return warm
    return base * (1 + math.cos(math.pi * (epoch - recount) / epochs)) / 2


# ---- linear probe ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A linear classifier: weights (C, D), bias (C,), classes (C,).

    ``log_c`` is the decimal logarithm of its C, ``fits`` how many classifiers were made to find it.
    """

    weights: Tensor
    bias: Tensor
    classes: Tensor
    log_c: float
    fits: int

    def logits(self, features: Tensor) -> Tensor:
        """(B, C)."""
        return features @ self.weights.T + self.bias


def linear_probe(
    x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, steps: int = 8, max_iterations: int = 1000
) -> Probe:
    """Logistic regression on image features, its C chosen on a validation set (Sec. 4.1): seven values, then halving.

    The features are turned into the space that the training samples span, which changes nothing about the solution: a
    penalised weight vector has no part outside it. No C is fitted twice.

    Raises:
        ValueError: fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(y.unique()) < 2:
        raise ValueError("a linear probe needs at least two classes")
    basis = torch.linalg.svd(x.double(), full_matrices=False).Vh  # (r, D), r <= samples
    inside, inside_val = (x.double() @ basis.T).numpy(), (x_val.double() @ basis.T).numpy()
    fitted: dict[float, tuple[float, LogisticRegression]] = {}

    def fit(log_c: float) -> float:
        log_c = round(log_c, 9)
        if log_c not in fitted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                net = LogisticRegression(C=10**log_c, max_iter=max_iterations).fit(inside, y.numpy())
            fitted[log_c] = float((net.predict(inside_val) == y_val.numpy()).mean()), net
        return fitted[log_c][0]

    grid = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)
    peak = max(grid, key=fit)
    left, right = peak - 1, peak + 1
    best = left
    for _ in range(steps):
        middle = (left + right) / 2
        if fit(left) < fit(right):
            best, left = right, middle
        else:
            best, right = left, middle
    net = fitted[round(best, 9)][1]
    coef, bias = torch.from_numpy(net.coef_), torch.from_numpy(net.intercept_)
    if len(coef) == 1:  # two classes: scikit-learn keeps the difference
        coef, bias = torch.cat([-coef, coef]) / 2, torch.cat([-bias, bias]) / 2
    weights = (coef @ basis).to(x.dtype)
    return Probe(weights, bias.to(x.dtype), torch.from_numpy(net.classes_), best, len(fitted))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is their label's."""
    return float((logits.argmax(1) == labels).double().mean())


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size``."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))
