"""Language models as drummers: distances between measures, the reduced vocabulary, cached generation and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from papers.drum_lm import data, evaluation, model
from tools.bench import Workload

# ---- the straightforward way


def levenshtein(s1: str, s2: str) -> int:
    """One row of distances after the other, character by character."""
    row = list(range(len(s2) + 1))
    for i, x in enumerate(s1):
        new = [i + 1]
        for j, y in enumerate(s2):
            new.append(row[j] if x == y else 1 + min(row[j], row[j + 1], new[-1]))
        row = new
    return row[-1]


# ---- workloads


def distances(form: str) -> Callable[[], Any]:
    """Stabilities of 37 pieces of 16 measures."""
    texts = [model.to_text(data.make_groove((1, i))) for i in range(37)]

    def plain() -> list[list[int]]:
        out = []
        for text in texts:
            bars = ["\n".join(bar) for bar in evaluation.measures_of(text)]
            triples = zip(bars, bars[1:], bars[2:])
            out.append([min(levenshtein(b, a), levenshtein(b, c)) for a, b, c in triples])
        return out

    return (lambda: evaluation.stabilities(texts)) if form == "ours" else plain


def language_model(vocabulary: int) -> Callable[[], Any]:
    """A training step on 208 tokens of a Llama as wide as SmolLM2, with six of its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True))  # fmt: skip
    ids = torch.randint(13, (1, 208))
    adam = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)

    def step() -> None:
        adam.zero_grad()
        logits = net(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()

    return step


def writing(form: str) -> Callable[[], Any]:
    """Six prompts, seven measures each, the Transformer with one token a line."""
    torch.manual_seed(0)
    net = model.LineTransformer(192, 4, 6, 0.0).eval()
    prompts = [model.with_separators(data.make_groove((2, i))[:32]) for i in range(6)]

    @torch.no_grad()
    def anew() -> torch.Tensor:
        words = torch.as_tensor(np.stack(prompts))
        for _ in range(7 * 17):
            logits, _ = net(words)
            words = torch.cat([words, torch.multinomial((logits[:, -1] / 0.9).softmax(1), 1)], 1)
        return words

    return (lambda: net.write(prompts, 7, 0.9)) if form == "ours" else anew


def counting(form: str) -> Callable[[], Any]:
    """Bits of 37 pieces given counts of 372."""
    train, test = ([data.make_groove((3, part, i)) for i in range(n)] for part, n in enumerate((372, 37)))

    def plain() -> float:
        both: dict[tuple[int, int], dict[int, int]] = {}
        for piece in train:
            lines = piece.tolist()
            for i in range(16, len(lines)):
                row = both.setdefault((lines[i - 16], lines[i - 1]), {})
                row[lines[i]] = row.get(lines[i], 0) + 1
        total = 0.0
        for piece in test:
            lines = piece.tolist()
            for i in range(32, len(lines)):
                row = both.get((lines[i - 16], lines[i - 1]), {})
                total -= math.log((row.get(lines[i], 0) + 4 / 64) / (sum(row.values()) + 4))
        return total

    def ours() -> float:
        counts = model.NGram().fit(train)
        return float(sum(counts.nll(piece, 32).sum() for piece in test))

    return ours if form == "ours" else plain


def workloads() -> Iterator[Workload]:
    """The rows."""
    yield Workload(
        "distances to neighbouring measures, 37 pieces of 16 measures", lambda: distances("ours"),
        lambda: distances("plain"), "a loop over characters, pair by pair", target=2.0,
    )  # fmt: skip
    yield Workload(
        "training step of a language model, 208 tokens, 6 layers: 13 tokens kept", lambda: language_model(13),
        lambda: language_model(49_152), "the whole vocabulary of 49,152", target=2.0,
    )  # fmt: skip
    yield Workload(
        "seven measures for six prompts, with cached keys and values", lambda: writing("ours"),
        lambda: writing("anew"), "all words again for each line", target=2.0,
    )  # fmt: skip
    yield Workload(
        "counts of 372 pieces with four contexts, bits of 37", lambda: counting("ours"), lambda: counting("plain"),
        "dictionaries line by line, one context", target=1.5,
    )  # fmt: skip
