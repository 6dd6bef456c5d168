"""Tests of papers/coop. References are written from the definitions, one prompt and one position at a time."""

from __future__ import annotations

import functools
import io
import json
import math
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from papers.coop import data, model
from papers.coop.model import CLIP, CoOp, PromptLearner, Sizes, TextTower, Tokenizer
from shared.errors import UserError

NAMES = ["banana", "golden_retriever", "traffic light", "jack-o'-lantern", "St. Bernard"]
TINY = Sizes(24, (2,), 64, 16, 1, resolution=32, context=32, text_width=16, text_layers=2, text_heads=2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    made = TINY.build()
    for weight in made.text.parameters():
        if weight.ndim > 1:  # far from the start of training, so that every word matters
            weight.data.normal_(std=weight.shape[-1] ** -0.5)
    return made.freeze()


def plain_text(text: TextTower, embeddings: Tensor, last: Tensor) -> Tensor:
    """The text tower on whole prompts (C, L, D), every position of every layer."""
    x = embeddings + text.positional_embedding[: embeddings.shape[1]]
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    for block in text.transformer.resblocks:
        h = block.ln_1(x)
        q, k, v = F.linear(h, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        heads = []
        for part in range(block.attn.heads):
            size = x.shape[-1] // block.attn.heads
            cut = slice(part * size, (part + 1) * size)
            scores = q[..., cut] @ k[..., cut].transpose(1, 2) / size**0.5 + mask
            heads.append(scores.softmax(-1) @ v[..., cut])
        x = x + block.attn.out_proj(torch.cat(heads, -1))
        h = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(h / (1 + torch.exp(-1.702 * h)))
    return text.ln_final(x)[torch.arange(len(x)), last] @ text.text_projection


def plain_prompts(learner: PromptLearner, text: TextTower, tokenizer: Tokenizer, names: Sequence[str]) -> Tensor:
    """Prompts put together class by class, as Sec. 3.2 describes them, padded with token 0 to the whole context."""
    out = []
    words = text.token_embedding.weight
    for c, name in enumerate(names):
        ctx = learner.ctx[c] if learner.class_specific else learner.ctx
        name = name.replace("_", " ")
        ids = tokenizer.encode(name + ".")
        count = len(tokenizer.encode(name))
        half = {"end": len(ctx), "middle": len(ctx) // 2, "front": 0}[learner.position]
        head, tail = ids[:count], [*ids[count:], tokenizer.eos]
        parts = [words[[tokenizer.sos]], ctx[:half], words[head], ctx[half:], words[tail]]
        if learner.position == "end":
            parts = [words[[tokenizer.sos]], ctx, words[[*ids, tokenizer.eos]]]
        row = torch.cat(parts)
        out.append(torch.cat([row, words[[0]].expand(text.context - len(row), -1)]))
    return torch.stack(out)


# ---- words


def test_tokens_equal_those_of_open_clip(tokenizer) -> None:
    peer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    texts = [template.format(name.replace("_", " ")) for template in model.TEMPLATES for name in NAMES]
    texts += ["", "it's  2 o'clock!!", "naïve café &amp; 中文 don't", "a_b__c", "HELLO World 1234", "x" * 40, "U.S.."]
    for text in texts:
        assert tokenizer.encode(text) == peer.encode(" ".join(text.split())), text
    assert len(tokenizer) == 49408 and (tokenizer.sos, tokenizer.eos) == (49406, 49407)
    assert tokenizer.decode(tokenizer.encode("a photo of a café.")).strip() == "a photo of a café ."
    assert torch.equal(tokenizer.tokenize(["a dog."], 77), peer(["a dog."], 77))


def test_a_small_vocabulary_keeps_the_order(tokenizer) -> None:
    kept = sorted({*tokenizer.full_ids("a photo of a dog."), tokenizer.sos, tokenizer.eos})
    small = Tokenizer(kept=kept)
    assert [kept[i] for i in small.encode("a dog.")] == tokenizer.encode("a dog.")
    assert (small.sos, small.eos) == (len(kept) - 2, len(kept) - 1)
    with pytest.raises(ValueError, match="does not know the token 'cat</w>'"):
        small.encode("a cat.")
    with pytest.raises(ValueError, match="lack start or end"):
        Tokenizer(kept=kept[:-1])


def test_a_vocabulary_of_transformers_is_read(tmp_path, tokenizer) -> None:
    import gzip

    with gzip.open(model.vocabulary_file(), "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()[: 49152 - 256 - 2 + 1]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    assert Tokenizer(tmp_path / "merges.txt").encode("golden retriever") == tokenizer.encode("golden retriever")
    (tmp_path / "other.txt").write_text("one\ntwo three four\n")
    with pytest.raises(ValueError, match="not a list of BPE merges"):
        Tokenizer(tmp_path / "other.txt")


def test_texts_that_are_too_long(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"needs 12 tokens, the limit is 8"):
        tokenizer.tokenize(["one two three four five six seven eight nine ten"], 8)


# ---- CLIP


@pytest.mark.parametrize(
    ("name", "count"),
    [("RN50", 102_007_137), ("RN101", 119_688_033), ("ViT-B/32", 151_277_313), ("ViT-B/16", 149_620_737)],
)
def test_parameters_of_the_released_models(name, count) -> None:
    with torch.device("meta"):
        made = model.BACKBONES[name].build()
    assert sum(p.numel() for p in made.parameters()) == count


def test_every_preset_builds_at_full_size(train) -> None:
    made: dict[Any, int] = {}
    tokenizer = sys_model(train).Tokenizer()
    for name, preset in train.PRESETS.items():
        config = preset.config
        if config.backbone in ("small", "untrained"):
            continue
        assert preset.needs_data and name.split("-")[0] in "shift " + " ".join(data.SOURCES).replace("_", "-")
        classes = data.SOURCES[config.dataset].counts[0]
        for arm in (*config.arms, *config.more_arms):
            if arm in train.BASELINES or (config.backbone, classes, arm) in made:
                continue
            sizes = model.BACKBONES[config.backbone]
            kind = train.parse_arm(arm)
            with torch.device("meta"):
                text = TextTower(49408, 77, sizes.text_width, 1, 8, sizes.out)
            names = [f"c {i}" for i in range(classes)]
            learner = PromptLearner(text, tokenizer, names, *kind[:3], config.phrase if kind.phrase else None)
            made[config.backbone, classes, arm] = learner.ctx.numel()
    for (_, classes, arm), count in made.items():
        kind = train.parse_arm(arm)
        assert count == kind.context * 512 * (classes if kind.class_specific else 1)
    assert made["RN50", 1000, "m16-end"] == 8192
    assert made["RN50", 1000, "m16-end-csc"] == 8_192_000
    assert made["RN50", 10, "m16-end-csc"] == 81_920


def sys_model(train: ModuleType) -> Any:
    import sys

    return sys.modules["model"]


def same_as_openai(peer: Any, made: CLIP, tokenizer: Tokenizer) -> None:
    """Image and text features of a peer in OpenAI's naming and of ours."""
    pixels = torch.rand(2, 3, made.resolution, made.resolution)
    ids = tokenizer.tokenize(["a photo of a dog.", "a cat sits on the red sofa."], made.text.context)
    with torch.no_grad():
        torch.testing.assert_close(made.visual(pixels), peer.encode_image(pixels), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(made.text(ids, tokenizer.eos), peer.encode_text(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_features_equal_those_of_open_clip(tower, tokenizer) -> None:
    peers = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    vision: dict[str, Any] = {"layers": 2, "width": 128, "patch_size": 16, "image_size": 64}
    if tower == "resnet":
        vision = {"layers": [1, 2, 1, 1], "width": 64, "patch_size": None, "image_size": 64}
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    peer = peers.CLIP(32, peers.CLIPVisionCfg(**vision), peers.CLIPTextCfg(**text), quick_gelu=True).eval()
    state = {k: v for k, v in peer.state_dict().items() if k != "attn_mask"}
    made = model.from_state(state).eval()
    assert made.logit_scale.item() == pytest.approx(peer.logit_scale.item())
    same_as_openai(peer, made, tokenizer)


def test_weights_of_transformers(tmp_path, tokenizer) -> None:
    peers = pytest.importorskip("transformers.models.clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = peers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "max_position_embeddings": 20, "eos_token_id": 49407},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    peer = peers.CLIPModel(config).eval()
    peer.save_pretrained(tmp_path)
    made = model.load_clip(tmp_path)
    assert made.text.transformer.resblocks[0].attn.heads == 4 and made.resolution == 32
    pixels = torch.rand(2, 3, 32, 32)
    ids = tokenizer.tokenize(["a photo of a dog.", "a cat"], 20)
    with torch.no_grad():
        images, texts = (
            out if isinstance(out, Tensor) else out.pooler_output
            for out in (peer.get_image_features(pixel_values=pixels), peer.get_text_features(input_ids=ids))
        )
        torch.testing.assert_close(made.visual(pixels), images, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made.text(ids, tokenizer.eos), texts, atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in made.parameters()) and not made.training
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "gelu"}}))
    with pytest.raises(ValueError, match="activation 'gelu'"):
        model.load_clip(tmp_path)


def openai_names(made: CLIP) -> dict[str, Tensor]:
    return {name.removeprefix("text."): value.clone() for name, value in made.state_dict().items()}


def test_weights_as_openai_publishes_them(tmp_path, clip) -> None:
    state = {name: value.half() for name, value in openai_names(clip).items()}
    torch.save(state, tmp_path / "plain.pt")

    class Holder(torch.nn.Module):
        def __init__(self, values: dict[str, Tensor]) -> None:
            super().__init__()
            for name, value in values.items():
                *path, last = name.split(".")
                place = self
                for part in path:
                    if not hasattr(place, part):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.register_buffer(last, value)

        def forward(self, x: Tensor) -> Tensor:
            return x

    extra = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(32),
        "vocab_size": torch.tensor(49408),
    }
    torch.jit.script(Holder(state | extra)).save(str(tmp_path / "script.pt"))
    for name in ("plain.pt", "script.pt"):
        made = model.load_clip(tmp_path / name, TINY)
        for key, value in clip.state_dict().items():
            torch.testing.assert_close(made.state_dict()[key], value.half().float())
        pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
        assert torch.isfinite(made.encode_image(pixels)).all()


def test_checkpoints_of_the_authors(tmp_path) -> None:
    """Their trainer saves the schedule of the warm-up, which holds the cosine schedule and its optimiser as objects."""
    ctx = torch.nn.Parameter(torch.randn(4, 16))
    optimizer = torch.optim.SGD([ctx], lr=0.002, momentum=0.9)
    ctx.sum().backward()
    optimizer.step()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0)
    state = {"ctx": ctx.detach(), "token_prefix": torch.zeros(3, 1, 16), "token_suffix": torch.zeros(3, 72, 16)}
    whole = {"state_dict": state, "epoch": 50, "optimizer": optimizer.state_dict(), "val_result": None}
    torch.save({**whole, "scheduler": {"successor": cosine, "warmup_epoch": 1}}, tmp_path / "model.pth.tar-50")
    assert torch.equal(model.read_tensors(tmp_path / "model.pth.tar-50")["ctx"], ctx)
    torch.save({**whole, "scheduler": {"successor": Sizes}}, tmp_path / "strange")
    with pytest.raises(ValueError, match=r"neither weights nor .* \(UnpicklingError\)"):
        model.read_tensors(tmp_path / "strange")


def test_weights_that_do_not_fit(tmp_path, clip) -> None:
    state = openai_names(clip)
    with pytest.raises(ValueError, match="no tensor 'text_projection'"):
        model.from_state({"visual.proj": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"visual.proj has shape \(64, 24\), expected"):
        model.from_state(state, model.BACKBONES["ViT-B/32"])
    with pytest.raises(ValueError, match=r"ln_final\.bias is missing"):
        model.from_state({name: value for name, value in state.items() if name != "ln_final.bias"})
    for name in ("bad.pt", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=f"{name}: neither weights nor a TorchScript archive"):
            model.load_clip(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        model.load_clip(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"pictures have size \(48, 48\), the image tower expects \(32, 32\)"):
        clip.encode_image(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))


# ---- prompts

KINDS = [(m, position, csc) for m in (1, 4, 5) for position in model.POSITIONS for csc in (False, True)]


@pytest.mark.parametrize(("context", "position", "csc"), KINDS)
def test_prompts_and_features_equal_the_plain_form(clip, tokenizer, context, position, csc) -> None:
    learner = PromptLearner(clip.text, tokenizer, NAMES, context, position, csc)
    learner.ctx.data.normal_(std=0.5)
    with torch.no_grad():
        expected = plain_prompts(learner, clip.text, tokenizer, NAMES)
        made = learner.prompts()
    length = made.shape[1]
    used = torch.arange(length) <= learner.last.unsqueeze(1)
    torch.testing.assert_close(made[used], expected[:, :length][used])
    ids = tokenizer.tokenize([" ".join(["x"] * context + [n.replace("_", " ") + "."]) for n in NAMES], 32)
    assert torch.equal(learner.last, ids.argmax(1)), "the end token stands where the official code looks for it"
    whole = PromptLearner(clip.text, tokenizer, NAMES, context, position, csc, truncate=False)
    whole.load_context(learner.ctx)
    assert whole.prompts().shape[1] == 32
    ends = whole.prompts().detach().sort(1).values
    other = PromptLearner(clip.text, tokenizer, NAMES, context, "end", csc, truncate=False)
    other.load_context(learner.ctx)
    torch.testing.assert_close(ends, other.prompts().detach().sort(1).values)
    gradients = []
    for kind, chunk in ((learner, 0), (learner, 2), (whole, 0)):
        found = CoOp(clip, kind, chunk).text_features()
        gradients.append((found.detach(), *torch.autograd.grad(found.sin().sum(), kind.ctx)))
    plain = F.normalize(
        plain_text(clip.text, plain_prompts(learner, clip.text, tokenizer, NAMES), learner.last), dim=-1
    )
    gradients.append((plain.detach(), *torch.autograd.grad(plain.sin().sum(), learner.ctx)))
    for found, gradient in gradients[:-1]:
        torch.testing.assert_close(found, gradients[-1][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, gradients[-1][1], atol=1e-4, rtol=1e-3)
    assert gradient.flatten(0, -2).norm(dim=1).min() > 0


def test_a_context_of_words_is_the_sentence(clip, tokenizer) -> None:
    """Hence CoOp before training is zero-shot CLIP with that template."""
    learner = PromptLearner(clip.text, tokenizer, NAMES, 4, phrase="a photo of a")
    coop = CoOp(clip, learner)
    sentence = model.zero_shot(clip.text, tokenizer, NAMES, ["a photo of a {}."])
    torch.testing.assert_close(coop.text_features(), sentence, atol=1e-6, rtol=1e-5)
    values, words = model.nearest_words(learner.ctx.detach(), clip.text.token_embedding.weight)
    assert words[:, 0].tolist() == tokenizer.encode("a photo of a") and values[:, 0].max() < 1e-2


def test_identical_class_specific_contexts_are_one_context(clip, tokenizer) -> None:
    one = PromptLearner(clip.text, tokenizer, NAMES, 4, "middle")
    each = PromptLearner(clip.text, tokenizer, NAMES, 4, "middle", class_specific=True)
    each.load_context(one.ctx.detach().expand(len(NAMES), -1, -1))
    features, labels = torch.randn(6, 24), torch.tensor([0, 1, 2, 3, 4, 0])
    gradients = []
    for learner in (one, each):
        loss = F.cross_entropy(CoOp(clip, learner)(features), labels)
        gradients.append(torch.autograd.grad(loss, learner.ctx)[0])
    torch.testing.assert_close(gradients[1].sum(0), gradients[0], atol=1e-5, rtol=1e-4)


def test_only_the_context_learns(clip, tokenizer) -> None:
    learner = PromptLearner(clip.text, tokenizer, NAMES, 16)
    coop = CoOp(clip, learner)
    assert [name for name, p in coop.named_parameters() if p.requires_grad] == ["learner.ctx"]
    assert list(learner.state_dict()) == ["ctx"]
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    optimizer = torch.optim.SGD([learner.ctx], lr=0.1)
    F.cross_entropy(coop(torch.randn(4, 24)), torch.tensor([0, 1, 2, 3])).backward()
    assert (learner.ctx.grad.norm(dim=1) > 0).all()
    start = learner.ctx.detach().clone()
    optimizer.step()
    assert not torch.equal(start, learner.ctx)
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())


def test_logits_are_scaled_cosines(clip, tokenizer) -> None:
    coop = CoOp(clip, PromptLearner(clip.text, tokenizer, NAMES, 2))
    features = torch.randn(7, 24)
    logits = coop(features)
    assert logits.abs().max() <= coop.scale * (1 + 1e-5)
    torch.testing.assert_close(coop(3.5 * features), logits)
    assert torch.tensor([30.0, 20.0]).softmax(0)[0].item() == pytest.approx(0.99995, abs=1e-5)


def test_what_stands_behind_the_end_changes_nothing(clip, tokenizer) -> None:
    ids = tokenizer.tokenize(["a dog."], 12)
    padded = torch.cat([ids, torch.randint(1000, (1, 20))], 1)
    padded[0, 8:] = torch.randint(1000, (24,))
    torch.testing.assert_close(clip.text(padded, tokenizer.eos), clip.text(ids, tokenizer.eos))


def test_ensembling_averages_normalised_features(clip, tokenizer) -> None:
    each = torch.stack([model.zero_shot(clip.text, tokenizer, NAMES, [t]) for t in model.TEMPLATES])
    together = model.zero_shot(clip.text, tokenizer, NAMES, model.TEMPLATES, chunk=3)
    torch.testing.assert_close(together, F.normalize(each.mean(0), dim=-1), atol=1e-6, rtol=1e-5)
    assert all(template.count("{}") == 1 for template in (*model.TEMPLATES, *data.TEMPLATE_OF.values()))
    with pytest.raises(ValueError, match="exactly once"):
        model.zero_shot(clip.text, tokenizer, NAMES, ["a {} and a {}."])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 0}, "M is 0, expected at least one"),
        ({"position": "left"}, "unknown position 'left', expected one of end, middle, front"),
        ({"class_specific": True, "phrase": "a"}, "class-specific context starts from random vectors"),
        ({"context": 4, "phrase": "a picture of refrigeratorology"}, "tokens, expected M=4"),
        ({"names": ["dog", " "]}, "class names must not be empty"),
        ({"names": []}, "class names must not be empty"),
        ({"context": 30}, "needs 34 tokens with M=30, the limit is 32"),
    ],
)
def test_prompts_that_cannot_be_made(clip, tokenizer, values, message) -> None:
    given = {"names": ["dog", "cat"], **values}
    with pytest.raises(ValueError, match=message):
        PromptLearner(clip.text, tokenizer, **given)


def test_contexts_of_another_shape_and_equal_names(clip, tokenizer) -> None:
    learner = PromptLearner(clip.text, tokenizer, NAMES, 16)
    with pytest.raises(ValueError, match=r"shape \(4, 16\), this learner's \(16, 16\)"):
        learner.load_context(torch.zeros(4, 16))
    with pytest.warns(UserWarning, match="occur twice"):
        PromptLearner(clip.text, tokenizer, ["dog", "dog"], 2)


def test_a_context_is_learnt(clip, tokenizer) -> None:
    """Pictures that lie where a hidden context puts their classes: the learnt context finds its way there."""
    torch.manual_seed(0)
    hidden = PromptLearner(clip.text, tokenizer, NAMES, 4)
    hidden.ctx.data.normal_()
    with torch.no_grad():
        target = CoOp(clip, hidden).text_features()
    labels = torch.arange(5).repeat(8)
    features = target[labels] + 0.02 * torch.randn(40, 24)
    learner = PromptLearner(clip.text, tokenizer, NAMES, 4)
    coop = CoOp(clip, learner)
    optimizer = torch.optim.SGD([learner.ctx], lr=0.2, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(coop(features), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# ---- schedule, probe, small functions


def test_schedule(train) -> None:
    presets = train.PRESETS
    passes = [train.epochs_of(presets["dtd"].config, shots) for shots in (1, 2, 4, 8, 16)]
    assert passes == [50, 100, 100, 200, 200] and train.epochs_of(presets["imagenet"].config, 16) == 50
    paper = presets["dtd"].config
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.batch, paper.warm_lr) == (0.002, 0.9, 5e-4, 32, 1e-5)
    assert paper.augment and paper.recount and presets["dtd"].seed_list() == [1, 2, 3]
    rates = [model.learning_rate(e, 10, 0.002) for e in range(10)]
    assert rates[0] == 1e-5 and rates[1] == 0.002 and rates[-1] == pytest.approx(1.91e-4, abs=1e-6)
    assert model.learning_rate(49, 50, 0.002) == pytest.approx(7.9e-6, abs=1e-7)
    off = [model.learning_rate(e, n, 0.002, recount=False) for e, n in ((9, 10), (49, 50))]
    assert off == pytest.approx([4.9e-5, 2.0e-6], abs=1e-6)


def probe_data() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    centres = torch.randn(6, 24)
    y, y_val = torch.arange(6).repeat(4), torch.arange(6).repeat(3)
    return centres[y] + torch.randn(24, 24), y, centres[y_val] + torch.randn(18, 24), y_val


def plain_probe(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor, steps: int) -> tuple[Any, float, int]:
    """The search as it is published: every classifier is fitted anew."""
    from sklearn.linear_model import LogisticRegression

    fits = 0

    def fit(log_c: float) -> tuple[Any, float]:
        nonlocal fits
        fits += 1
        net = LogisticRegression(C=10**log_c, max_iter=1000).fit(x.numpy(), y.numpy())
        return net, float((net.predict(x_val.numpy()) == y_val.numpy()).mean())

    grid = [6, 4, 2, 0, -2, -4, -6]
    peak = grid[int(np.argmax([fit(c)[1] for c in grid]))]
    left, right = peak - 1.0, peak + 1.0
    for _ in range(steps):
        (net_left, low), (net_right, high) = fit(left), fit(right)
        if low < high:
            net, chosen, left = net_right, right, (left + right) / 2
        else:
            net, chosen, right = net_left, left, (left + right) / 2
    return net, chosen, fits


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_linear_probe_equals_the_published_search() -> None:
    x, y, x_val, y_val = probe_data()
    made = model.linear_probe(x, y, x_val, y_val, steps=4)
    net, chosen, fits = plain_probe(x, y, x_val, y_val, 4)
    assert made.log_c == pytest.approx(chosen) and -7 <= made.log_c <= 7
    assert fits == 7 + 2 * 4 and made.fits < fits
    new = torch.randn(50, 24)
    found = torch.from_numpy(net.predict_proba(new.numpy()))
    torch.testing.assert_close(made.logits(new).softmax(1), found.to(new.dtype), atol=5e-3, rtol=0)
    two = model.linear_probe(x[y < 2], y[y < 2], x_val[y_val < 2], y_val[y_val < 2], steps=1)
    assert two.logits(new).shape == (50, 2)
    with pytest.raises(ValueError, match="at least two classes"):
        model.linear_probe(x[:1], y[:1], x_val, y_val)


def test_expected_relu6() -> None:
    mean, std = torch.tensor([-1.0, 0.5, 7.0]), torch.tensor([0.5, 2.0, 1.5])
    samples = (mean + std * torch.randn(200_000, 3)).clamp(0, 6).mean(0)
    torch.testing.assert_close(model.expected_relu6(mean, std), samples, atol=0.02, rtol=0.02)


# ---- data


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_folders(root: Path, classes: Sequence[str], count: int = 10) -> None:
    for name in classes:
        for i in range(count):
            picture(root / name / f"{i}.jpg")


def write_imagenet(root: Path, pictures: Sequence[str], folders: Sequence[str], names: dict[str, str]) -> None:
    for part in pictures:
        write_folders(root / part, folders, 2)
    (root / "classnames.txt").write_text("".join(f"{key} {name}\n" for key, name in names.items()))


def write_official(root: Path, name: str) -> dict[str, Any]:
    """A tiny set in the official layout without split file; returns class names and numbers of the parts."""
    from scipy.io import savemat

    source = data.SOURCES[name]
    folder = root / source.folder
    pictures = folder / source.pictures
    halves = {"sizes": (10, 4, 6), "names": ["a b", "c"]}
    if name in ("dtd", "food101", "eurosat", "caltech101"):
        classes, shown = {
            "eurosat": (["AnnualCrop", "SeaLake"], ["Annual Crop Land", "Sea or Lake"]),
            "caltech101": (["BACKGROUND_Google", "Faces", "Faces_easy", "ant"], ["face", "ant"]),
        }.get(name, (["a b", "c"], ["a b", "c"]))
        write_folders(pictures, classes)
        return {"sizes": (10, 4, 6), "names": shown}
    if name == "oxford_pets":
        rows = [f"Great_Pyrenees_{i} 1 2 1" for i in range(5)] + [f"Bengal_{i} 2 1 1" for i in range(5)]
        for part in ("trainval", "test"):
            (folder / "annotations").mkdir(parents=True, exist_ok=True)
            (folder / "annotations" / f"{part}.txt").write_text("\n".join(rows))
        for row in rows:
            picture(pictures / f"{row.split()[0]}.jpg")
        return {"sizes": (8, 2, 10), "names": ["great_pyrenees", "bengal"]}
    if name == "stanford_cars":
        (folder / "devkit").mkdir(parents=True)
        names = np.array([["Audi TT Coupe 2012", "BMW X5 2007"]], dtype=object)
        savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
        rows = np.zeros((1, 10), dtype=[("class", object), ("fname", object)])
        for i in range(10):
            rows[0, i] = (np.array([[i % 2 + 1]]), f"{i:05d}.jpg")
            for part in ("cars_train", "cars_test"):
                picture(folder / part / f"{i:05d}.jpg")
        savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": rows})
        savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": rows})
        return {"sizes": (8, 2, 10), "names": ["2012 Audi TT Coupe", "2007 BMW X5"]}
    if name == "oxford_flowers":
        folder.mkdir(parents=True)
        savemat(folder / "imagelabels.mat", {"labels": np.array([[1] * 10 + [2] * 10])})
        (folder / "cat_to_name.json").write_text(json.dumps({"1": "a b", "2": "c"}))
        for i in range(20):
            picture(pictures / f"image_{i + 1:05d}.jpg")
        return halves
    if name == "fgvc_aircraft":
        folder.mkdir(parents=True)
        (folder / "variants.txt").write_text("a b\nc\n")
        for k, part in enumerate(("train", "val", "test")):
            (folder / f"images_variant_{part}.txt").write_text(f"{k}1 a b\n{k}2 c\n")
            for i in (1, 2):
                picture(pictures / f"{k}{i}.jpg")
        return {"sizes": (2, 2, 2), "names": ["a b", "c"]}
    if name == "sun397":
        folder.mkdir(parents=True)
        (folder / "ClassName.txt").write_text("/a/abbey\n/c/church/outdoor\n")
        rows = [f"/{place}/{i}.jpg" for place in ("a/abbey", "c/church/outdoor") for i in range(5)]
        for part in ("Training_01.txt", "Testing_01.txt"):
            (folder / part).write_text("\n".join(rows))
        for row in rows:
            picture(pictures / row[1:])
        return {"sizes": (8, 2, 10), "names": ["abbey", "outdoor church"]}
    if name == "ucf101":
        (folder / "ucfTrainTestlist").mkdir(parents=True)
        (folder / "ucfTrainTestlist" / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
        rows = [f"{a}/v_{a}_{i}.avi" for a in ("ApplyEyeMakeup", "Archery") for i in range(5)]
        (folder / "ucfTrainTestlist" / "trainlist01.txt").write_text("\n".join(f"{row} 1" for row in rows))
        (folder / "ucfTrainTestlist" / "testlist01.txt").write_text("\n".join(rows))
        for i in range(5):
            picture(pictures / "Apply_Eye_Makeup" / f"v_ApplyEyeMakeup_{i}.jpg")
            picture(pictures / "Archery" / f"v_Archery_{i}.jpg")
        return {"sizes": (8, 2, 10), "names": ["Apply_Eye_Makeup", "Archery"]}
    names = {"n01": "tench", "n02": "gold fish", "n03": "great white shark"}
    if name == "imagenet":
        write_imagenet(folder, ("images/train", "images/val"), list(names), names)
        return {"sizes": (6, 6, 6), "names": list(names.values())}
    folders = ["0", "1", "2"] if name == "imagenetv2" else ["n01", "n03"]
    write_imagenet(folder, (source.pictures,), folders, names)
    shown = list(names.values()) if name == "imagenetv2" else ["tench", "great white shark"]
    return {"sizes": (0, 0, 2 * len(shown)), "names": shown}


@pytest.mark.parametrize("name", list(data.SOURCES))
def test_official_layouts(name, tmp_path) -> None:
    expected = write_official(tmp_path, name)
    found = data.load(name, tmp_path)
    assert found.names == expected["names"]
    assert (len(found.train), len(found.val), len(found.test)) == expected["sizes"]
    assert found.test.labels.unique().tolist() == list(range(len(found.names)))
    source = data.SOURCES[name]
    if source.split:  # written once, read afterwards
        split = tmp_path / source.folder / source.split
        assert split.is_file() and data.load(name, tmp_path).spec() == found.spec()
        rows = json.loads(split.read_text())
        assert not {tuple(r) for r in rows["train"]} & {tuple(r) for r in rows["val"]}
    assert f"{name} classes: {len(found.names)}" in data.check(name, tmp_path)[0]
    half = data.load(name, tmp_path, "base")
    rest = data.load(name, tmp_path, "new")
    assert half.names + rest.names == found.names and len(half.names) == math.ceil(len(found.names) / 2)
    assert len(half.test) + len(rest.test) == len(found.test) and int(rest.test.labels.min()) == 0


def write_split(root: Path, split: Any) -> None:
    write_official(root, "dtd")
    (root / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": [], "val": []}, "no 'test', expected train, val and test"),
        ({"train": [["c/1.jpg", "x", "c"]], "val": [], "test": []}, "a row that is not [picture, label, class name]"),
        ({"train": [["c/1.jpg", 1, "c"]], "val": [], "test": []}, "labels are not 0 to 0, 0 is missing"),
        ({"train": [["c/1.jpg", 0, "c"], ["c/2.jpg", 0, "d"]], "val": [], "test": []}, "label 0 is 'c' and 'd'"),
        ({"train": [[f"c/x{i}.jpg", 0, "c"] for i in range(7)], "val": [], "test": []}, "7 pictures are missing: "),
    ],
)
def test_malformed_splits(split, message, tmp_path) -> None:
    write_split(tmp_path, split)
    with pytest.raises(UserError) as caught:
        data.load("dtd", tmp_path)
    assert message in str(caught.value) and str(caught.value).count("x6.jpg") == 0


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("oxford_pets", lambda f: (f / "annotations/test.txt").write_text("a b\n"), "expected: picture label species"),
        ("fgvc_aircraft", lambda f: (f / "variants.txt").write_text("a b\n"), "'c' is not in variants.txt"),
        ("sun397", lambda f: (f / "ClassName.txt").write_text("/a/abbey\n"), "is not in ClassName.txt"),
        ("ucf101", lambda f: (f / "ucfTrainTestlist/classInd.txt").write_text("2 Archery\n"), "is not in classInd.txt"),
        ("imagenet", lambda f: (f / "classnames.txt").write_text("n01 tench\n"), "folder 'n02' has no class name"),
        ("imagenet_a", lambda f: (f / "classnames.txt").write_text("tench\n"), "expected lines such as"),
        (
            "stanford_cars",
            lambda f: (f / "devkit/cars_meta.mat").write_bytes(b"no"),
            "no MATLAB file with 'class_names'",
        ),
        ("oxford_flowers", lambda f: (f / "imagelabels.mat").unlink(), "imagelabels.mat: no such file"),
        ("food101", lambda f: (f / "images/c").rename(f / "images/.c"), ""),
    ],
)
def test_malformed_layouts(name, spoil: Callable[[Path], Any], message, tmp_path) -> None:
    write_official(tmp_path, name)
    spoil(tmp_path / data.SOURCES[name].folder)
    if not message:  # hidden folders are no classes
        assert data.load(name, tmp_path).names == ["a b"]
        return
    with pytest.raises(UserError) as caught:
        data.load(name, tmp_path)
    assert message in str(caught.value)


def test_few_shots_are_drawn_as_officially() -> None:
    draw = random.Random(3)
    train = [draw.randrange(5) for _ in range(60)] + [5, 5]
    val = [draw.randrange(6) for _ in range(60)]
    for shots in (1, 4, 8):
        found = data.few_shot(torch.tensor(train), torch.tensor(val), shots, 2)
        random.seed(2)
        for labels, count, index in ((train, shots, found[0]), (val, min(shots, 4), found[1])):
            groups: dict[int, list[int]] = {}
            for i, label in enumerate(labels):
                groups.setdefault(label, []).append(i)
            expected = []
            for own in groups.values():
                expected += random.sample(own, count) if len(own) >= count else own
            assert index.tolist() == expected
        counts = torch.tensor(train)[found[0]].bincount()
        assert counts[:5].tolist() == [shots] * 5 and counts[5] == min(shots, 2)
    again = data.few_shot(torch.tensor(train), torch.tensor(val), 4, 2)
    other = data.few_shot(torch.tensor(train), torch.tensor(val), 4, 3)
    assert not torch.equal(again[0], other[0])


def test_views(tmp_path) -> None:
    for i, size in enumerate(((40, 20), (20, 40), (16, 16), (300, 10))):
        picture(tmp_path / f"{i}.jpg", i, size)
    part = data.Part([tmp_path / f"{i}.jpg" for i in range(4)], torch.zeros(4))
    index = torch.arange(4)
    still = data.views(part, index, 16)
    assert still.shape == (4, 3, 16, 16) and still.dtype == torch.uint8
    with Image.open(tmp_path / "2.jpg") as opened:
        assert np.array_equal(still[2].permute(1, 2, 0).numpy(), np.asarray(opened.convert("RGB")))
    with Image.open(tmp_path / "0.jpg") as opened:
        middle = np.asarray(opened.convert("RGB").resize((32, 16), Image.Resampling.BICUBIC))[:, 8:24]
    assert np.array_equal(still[0].permute(1, 2, 0).numpy(), middle)
    moved = [data.views(part, index, 16, seed, workers) for seed, workers in (("a", 1), ("a", 4), ("b", 4))]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])
    shared = [data.views(part, own, 16, "a") for own in index.split(3)]
    assert torch.equal(torch.cat(shared), moved[0]), "micro-batches and processes see the pictures of the whole batch"
    shares = []
    for seed in range(300):
        left, top, right, bottom = data._random_box(100, 80, random.Random(seed))
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 80
        assert 0.7 < (right - left) / (bottom - top) < 1.4
        shares.append((right - left) * (bottom - top) / 8000)
    assert 0.07 < min(shares) < 0.12 and 0.7 < max(shares) <= 1
    (tmp_path / "bad.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.jpg: cannot be read"):
        data.views(data.Part([tmp_path / "bad.jpg"], torch.zeros(1)), torch.zeros(1, dtype=torch.long), 16)


def test_cifar10_in_both_forms(tmp_path) -> None:
    folder = tmp_path / "folder"
    for name in data.CIFAR10:
        for part, count in (("train", 41), ("test", 3)):
            for i in range(count):
                picture(folder / part / name / f"{i:04d}.jpg", i, (8, 8))
    found = data.cifar10_mini(folder, 2)
    assert (len(found.train), len(found.val), len(found.test)) == (210, 200, 20)
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar10-jpeg-mini.tar.xz", "w:xz") as tar:
        for part in ("train", "test"):
            tar.add(folder / part, part)
    assert data.cifar10_mini(packed, 2).spec() == found.spec()
    (packed / "cifar10-jpeg-mini.tar.xz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"not a readable tar\.xz"):
        data.cifar10_mini(packed, 2)
    with pytest.raises(UserError, match="no train/airplane/ with enough pictures"):
        data.cifar10_mini(tmp_path, 2)


@pytest.mark.slow
def test_the_real_part_of_cifar10(data_root) -> None:
    folder = data_root / "cifar10-jpeg-mini"
    if not folder.is_dir():
        pytest.skip("no cifar10-jpeg-mini")
    found = data.cifar10_mini(folder, 0)
    assert (len(found.train), len(found.val), len(found.test)) == (14800, 200, 3000)
    assert all(one.shape == (32, 32, 3) for one in found.test.pictures)
    assert found.names == list(data.CIFAR10) and found.test.labels.bincount().tolist() == [300] * 10


def test_real_pictures_in_the_layout_of_imagenet(data_root, tmp_path, train) -> None:
    """The loader, the image tower's centre and its class rows on photographs."""
    archive = data_root / "imagenet-one-per-class-mini" / "imagenet-one-per-class-mini.tar"
    if not archive.is_file():
        pytest.skip("no imagenet-one-per-class-mini")
    names, _ = train.tower.imagenet_texts()
    synsets = []
    with tarfile.open(archive) as tar:
        members = [m for m in sorted(tar.getmembers(), key=lambda m: m.name) if m.isfile()]
        assert len(members) == 1000
        for place in range(0, 1000, 25):
            member = members[place]
            raw = tar.extractfile(member).read()
            synset = member.name.split("/")[-2]
            synsets.append((place, synset))
            for part in ("train", "val"):
                path = tmp_path / "imagenet" / "images" / part / synset / "0.jpg"
                path.parent.mkdir(parents=True)
                with Image.open(io.BytesIO(raw)) as opened:
                    opened.save(path)
    text = "".join(f"{synset} {names[place][0]}\n" for place, synset in synsets)
    (tmp_path / "imagenet" / "classnames.txt").write_text(text)
    found = data.load("imagenet", tmp_path)
    assert len(found.train) == len(found.test) == 40 and found.names[0] == names[0][0]
    net = train.tower.network()
    made = train.tower.image_tower(net)
    pixels = data.views(found.test, torch.arange(40), train.tower.SIDE).float()
    with torch.no_grad():
        features = made((pixels / 255 - train.tower.PIXEL_MEAN[0]) / train.tower.PIXEL_STD[0])
    assert F.cosine_similarity(features.mean(0) + made.mean, made.mean, dim=0) > 0.9
    cosines = F.normalize(features, dim=-1) @ train.tower.class_rows(net).T
    places = torch.tensor([place for place, _ in synsets])
    assert (cosines.argmax(1) == places).double().mean() > 0.4


def test_drawings(train) -> None:
    things = train.drawings
    pictures, labels = things.make("colour", "test", 2, 64)
    assert len(pictures) == len(labels) == 2 * len(things.THINGS) and pictures[0].shape == (64, 64, 3)
    again, _ = things.make("colour", "test", 1, 64)
    assert np.array_equal(again[0], pictures[0]) and not np.array_equal(pictures[0], pictures[1])
    grey, _ = things.make("sketch", "test", 1, 64)
    assert np.median(grey[0]) > 200
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        things.render("daisy", random.Random(0), 64, "oil")


# ---- the small text tower


def test_texts_of_the_small_tower(train, tokenizer) -> None:
    tower = train.tower
    names, definitions = tower.imagenet_texts()
    assert len(names) == len(definitions) == 1000 and names[0][0] == "tench"
    whole = sys_model(train).Tokenizer()
    kept = tower.kept_tokens(whole, names, definitions)
    assert kept == sorted(set(kept)) and len(kept) < 5000
    small = sys_model(train).Tokenizer(kept=kept)
    for text in (*data.CIFAR10, *train.drawings.THINGS, *(n for group in names for n in group)):
        small.encode(f"a photo of a {text}.")
    assert len(tower.templates()) >= 8
    batch = tower.Sentences(small, 0).batch(list(range(0, 1000, 20)))
    assert batch.shape[1] <= tower.CONTEXT and ((batch == small.eos).sum(1) == 1).all()
    weights = 12 * tower.WIDTH**2 * tower.LAYERS + (len(kept) + tower.CONTEXT + tower.FEATURES) * tower.WIDTH
    assert 2 * weights < 2_900_000, "the file must stay below 3 MB in half precision"


def test_texts_of_like_length_go_together(train, clip, tokenizer) -> None:
    texts = ["a dog.", "one two three four five six seven", "cat", "a photo of a large banana.", "a", "b c d e"]
    ids = tokenizer.tokenize(texts, 16)
    found = train.tower.encode(clip.text, ids, tokenizer.eos)
    torch.testing.assert_close(found, clip.text(ids, tokenizer.eos), atol=1e-5, rtol=1e-4)


def test_the_small_tower_is_written_and_read(train, tmp_path, capsys) -> None:
    out = tmp_path / "tower.safetensors"
    assert train.tower.main(["--steps", "2", "--batch", "4", "--out", str(out)]) == 0
    assert out.stat().st_size < 3_000_000
    clip, small = train.tower.load(out)
    names = list(train.drawings.THINGS)
    features = model.zero_shot(clip.text, small, names, ["a photo of a {}."])
    assert features.shape == (len(names), 1280) and torch.isfinite(features).all()
    assert train.tower.main(["--steps", "2", "--batch", "4", "--out", str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    out.write_bytes(b"no")
    with pytest.raises(UserError, match=r"not a text tower that tower\.py wrote"):
        train.tower.load(out)
    assert train.tower.main(["--steps", "0"]) == 2 and "error: --steps" in capsys.readouterr().err


def test_the_untrained_tower_is_the_same_in_every_process(train) -> None:
    config = train.PRESETS["smoke"].config
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        clip, _ = train.read_clip(config, None, torch.Generator().manual_seed(5))
        states.append(clip.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ---- the command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "m0-end"], "unknown arm 'm0-end'"),
        (["--arms", "m4-left"], "unknown arm 'm4-left'"),
        (["--arms", "m4-end", "--more-arms", "m4-end"], "name an arm twice"),
        (["--more-arms", "zero-shot"], "--more-arms takes contexts only"),
        (["--dataset", "mnist"], "--dataset: unknown set 'mnist'"),
        (["--targets", "mnist"], "--targets: unknown set 'mnist'"),
        (["--shots", "0"], "expected different numbers of at least 1"),
        (["--shots", "32"], "--pool draws only 24 pictures a class"),
        (["--lr", "-1"], "--lr is -1.0, expected a positive number"),
        (["--momentum", "1"], "--momentum is 1.0"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--backbone", "RN50"], "the small CLIP goes with"),
        (["--classes", "base"], "halves are for the real data sets"),
        (["--preset", "smoke", "--phrase", "a photo of"], "is 3 tokens, expected M=4"),
        (["--preset", "smoke", "--arms", "m30-end"], "the limit is 32"),
        (["--preset", "dtd"], "needs --data DIR"),
    ],
)
def test_bad_usage(argv, message, refuses) -> None:
    refuses(argv, message)


def test_bad_data(refuses, tmp_path) -> None:
    refuses(["--preset", "dtd", "--data", str(tmp_path), "--check-data"], "no folder")
    write_official(tmp_path, "dtd")
    refuses(
        ["--preset", "dtd", "--data", str(tmp_path), "--check-data"], "RN50.pt: no such file; expected OpenAI's weights"
    )
    refuses(["--preset", "cifar10-mini", "--data", str(tmp_path), "--check-data"], "no train/airplane/")
    torch.save({"text_projection": torch.zeros(2, 2)}, tmp_path / "w.pt")
    refuses(["--preset", "dtd", "--data", str(tmp_path), "--weights", str(tmp_path / "w.pt")], "the weights do not fit")


def test_a_missing_tower_is_one_line(train, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(train.tower, "WEIGHTS", tmp_path / "none.safetensors")
    monkeypatch.setattr(train.tower.load, "__defaults__", (tmp_path / "none.safetensors",))
    assert train.main(["--out", str(tmp_path / "run")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "`uv run tower.py`" in lines[0]


def released(tmp_path: Path, train: ModuleType, monkeypatch: pytest.MonkeyPatch, clip: CLIP) -> list[str]:
    """A data set in the official layout, weights in OpenAI's naming, and a backbone of their size."""
    write_official(tmp_path, "dtd")
    (tmp_path / "clip").mkdir()
    torch.save(openai_names(clip), tmp_path / "clip" / "ViT-B-32.pt")
    monkeypatch.setitem(train.SIZES, "ViT-B/32", sys_model(train).Sizes(**vars(TINY)))
    return ["--data", str(tmp_path), "--preset", "dtd-vit-b32", "--seed", "1", "--epochs", "2", "--shots", "2"]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_the_papers_setting_runs_on_released_weights(train, monkeypatch, tmp_path, clip) -> None:
    """Crops at every step, trained context given back, micro-batches of a step."""
    argv = released(tmp_path, train, monkeypatch, clip)
    arms = ["--arms", "zero-shot", "ensemble", "linear-probe", "m4-end", "--lr", "0.05", "--batch", "4"]
    assert train.main([*argv, *arms, "--out", str(tmp_path / "whole")]) == 0
    metrics = result(tmp_path / "whole")["metrics"]
    name = "dtd/ViT-B-32/m4-end/shots=2/accuracy"
    assert name in metrics and "dtd/ViT-B-32/ensemble/accuracy" in metrics
    kept = next((tmp_path / "whole" / "checkpoint" / "units").glob("*m4-end.safetensors"))
    argv = [*argv, "--arms", "m4-end", "--context-from", str(kept)]
    assert train.main([*argv, "--out", str(tmp_path / "again")]) == 0
    assert result(tmp_path / "again")["metrics"][name] == metrics[name]
    assert train.main([*argv[:-2], "--check-data"]) == 0
    assert train.main([*argv, "--arms", "m16-end", "--out", str(tmp_path / "other")]) == 2


def test_only_imagenet_has_seven_templates(train, monkeypatch) -> None:
    """The official class adds the template of every other set, ImageNet's shifted versions among them."""
    empty = data.Part([], torch.zeros(0, dtype=torch.long))
    one = data.Part([Path("a")], torch.zeros(1, dtype=torch.long))
    sets = {
        name: data.ImageSet(name, ["a"], "own {}.", empty, empty, one) for name in ("imagenet", "imagenet_r", "dtd")
    }
    used: list[list[str]] = []

    def count(text: Any, tokenizer: Any, names: Any, templates: list[str]) -> Tensor:
        used.append(list(templates))
        return torch.ones(1, 2)

    monkeypatch.setattr(train, "zero_shot", count)
    world = type("W", (), {"clip": type("C", (), {"text": None}), "tokenizer": None})()
    world.tests = lambda: {name: (one, torch.ones(1, 2)) for name, one in sets.items()}
    world.metric = lambda test, arm: f"{test}/{arm}"
    unit = type("U", (), {"finish": lambda self, out: None})()
    for arm, expected in (("zero-shot", [1, 1, 1]), ("ensemble", [7, 8, 8])):
        used.clear()
        train.hand_written(world, unit, arm)
        assert [len(templates) for templates in used] == expected
        assert all((templates[-1] == "own {}.") == (len(templates) != 7) for templates in used)


def test_a_target_with_fewer_classes_is_judged_on_its_own(train, tmp_path) -> None:
    """As ImageNet-A is: prompts for its classes only, and a probe restricted to them."""
    made = train.Probe(torch.eye(3), torch.zeros(3), torch.arange(3), 0.0, 1)
    features = torch.tensor([[0.1, 5.0, 0.3], [0.1, 5.0, 0.3]])
    part = data.Part([Path("a"), Path("b")], torch.tensor([0, 1]))
    empty = data.Part([], torch.zeros(0))
    target = data.ImageSet("t", ["c", "a"], "{}", empty, empty, part)
    assert train.probe_accuracy(made, ["a", "b", "c"], target, features) == 0.5
    strange = data.ImageSet("t", ["c", "z"], "{}", empty, empty, part)
    assert train.probe_accuracy(made, ["a", "b", "c"], strange, features) is None


SMALL = [
    "--shots",
    "2",
    "16",
    "--pool",
    "16",
    "--val-pool",
    "4",
    "--test-pictures",
    "10",
    "--epochs",
    "25",
    "--seed",
    "7",
]


@pytest.mark.slow
def test_a_broken_method_fails_the_claims(train, tmp_path, monkeypatch) -> None:
    """A context that does not learn: everything else of the method is in place."""
    if not train.tower.WEIGHTS.is_file():
        pytest.skip("weights/text_tower.safetensors is not there: uv run tower.py makes it")
    known: dict[Any, Tensor] = {}
    embed = train.World.embed

    def remembered(world: Any, part: Any, index: Tensor, seed: str | None = None) -> Tensor:
        key = (id(part), *index.tolist())
        if key not in known:
            known[key] = embed(world, part, index, seed)
        return known[key]

    monkeypatch.setattr(train, "read_set", functools.cache(train.read_set))  # the pictures are the same in both runs
    monkeypatch.setattr(train.World, "embed", remembered)

    def verdicts(name: str) -> dict[str, bool]:
        argv = [*SMALL, "--probe-steps", "1", "--out", str(tmp_path / name)]
        assert train.main(argv) == 0
        return {claim["name"]: claim["holds"] for claim in result(tmp_path / name)["claims"]}

    assert verdicts("intact")["learnt_context_beats_hand_written_prompts"]
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1e-12)
    broken = verdicts("broken")
    assert not broken["learnt_context_beats_hand_written_prompts"] and not broken["more_shots_help"]
