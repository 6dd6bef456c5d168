"""Drum grooves as text for language models: the text itself, networks with and without pre-training, and simpler
continuations, as in "Language Models are Drummers" (Zhang, Callison-Burch 2023, arXiv 2301.01162).

A groove is a sequence of lines, one for each sixteenth note; a line has six characters, `o` for a hit and `-` for a
rest, for crash, ride, snare, kick, hi-hat and toms. In memory a line is a number from 0 to 63 (crash is the highest
bit), and a piece is a vector of such numbers in which ``SEP`` ends a measure and ``END`` the piece. The paper has no
numbered equations; lines name what they implement in its words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DRUMS = ("crash", "ride", "snare", "kick", "hi-hat", "toms")
"""The columns of a line."""
MEASURE = 16
"""Lines of a measure (4/4)."""
LINES = 64
SEP, END = 64, 65
WORDS = 66
PROMPT_MEASURES = 2

# ---- text ------------------------------------------------------------------------------------------------------------


def line_text(word: int) -> str:
    """A number as the six characters of its line, or as ``SEP`` or ``END``.

    Raises:
        ValueError: not in [0, 66).
    """
    if not 0 <= word < WORDS:
        raise ValueError(f"{word} is no line, expected a number from 0 to {WORDS - 1}")
    return {SEP: "SEP", END: "END"}.get(word) or "".join("-o"[word >> (5 - k) & 1] for k in range(6))


TEXTS = tuple(line_text(word) for word in range(WORDS))
_NUMBERS = {text: number for number, text in enumerate(TEXTS)}


def to_text(words: Sequence[int] | np.ndarray | Tensor) -> str:
    """The lines of a piece, each with its newline."""
    return "".join(TEXTS[int(word)] + "\n" for word in words)


def from_text(text: str, separators: bool = False) -> np.ndarray:
    """The numbers of valid lines.

    Args:
        text: lines. separators: allow ``SEP`` and ``END``.

    Raises:
        ValueError: a line is not six characters of ``-`` and ``o``: its number, what it is and the first fault.
    """
    words = []
    for number, line in enumerate(text.splitlines(), 1):
        word = _NUMBERS.get(line)
        if word is None or (word >= LINES and not separators):
            raise ValueError(f"line {number} is {line!r}: {_fault(line)}")
        words.append(word)
    return np.array(words, dtype=np.int64)


def _fault(line: str) -> str:
    wrong = next((i for i, c in enumerate(line) if c not in "-o"), None)
    if wrong is not None:
        return f"character {wrong + 1} is {line[wrong]!r}, expected - or o"
    return f"it has {len(line)} characters, expected 6"


def with_separators(lines: np.ndarray) -> np.ndarray:
    """Lines with ``SEP`` after each full measure."""
    full = len(lines) // MEASURE * MEASURE
    blocks = lines[:full].reshape(-1, MEASURE)
    marked = np.concatenate([blocks, np.full((len(blocks), 1), SEP, blocks.dtype)], 1).reshape(-1)
    return np.concatenate([marked, lines[full:]])


@dataclass(frozen=True)
class Pair:
    """What a model is given and what it is to write.

    Attributes:
        name: of the piece. prompt: two measures, each followed by ``SEP``. completion: the other measures with ``SEP``
            between them and ``END`` at the end.
    """

    name: str
    prompt: np.ndarray
    completion: np.ndarray

    @property
    def words(self) -> np.ndarray:
        """Prompt and completion."""
        return np.concatenate([self.prompt, self.completion])

    @property
    def lines(self) -> np.ndarray:
        """Prompt and completion without marks."""
        return self.words[self.words < LINES]

    @property
    def texts(self) -> tuple[str, str]:
        """Prompt and completion as in the files for fine-tuning: no newline after ``END``."""
        return to_text(self.prompt), to_text(self.completion).removesuffix("\n")

    def window(self, measures: int) -> Pair:
        """The first measures, the prompt's included; a piece that goes on does not end with ``END``."""
        length = (MEASURE + 1) * (measures - PROMPT_MEASURES)
        if length >= len(self.completion):
            return self
        return Pair(self.name, self.prompt, self.completion[:length])


def make_pair(name: str, lines: np.ndarray) -> Pair | None:
    """The pair of a piece, ``None`` for one that is too short.

    Leading measures whose first four lines are empty are dropped; 128 lines or fewer are too short.
    """
    starts = lines[: len(lines) // MEASURE * MEASURE].reshape(-1, MEASURE)[:, :4].any(1)
    first = int(starts.argmax()) if starts.any() else len(starts)
    lines = lines[first * MEASURE :]
    if len(lines) <= 128:
        return None
    words = with_separators(lines)
    cut = PROMPT_MEASURES * (MEASURE + 1)
    completion = words[cut:]
    completion = completion[:-1] if completion[-1] == SEP else completion
    return Pair(name, words[:cut], np.append(completion, END))


# ---- a pre-trained language model on this text -----------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer writes the 66 possible lines: only its few tokens that occur are kept (exact, see ``of``).

    Attributes:
        pieces: for each line its tokens, numbered from 0 in the reduced vocabulary. kept: the tokenizer's own numbers.
        texts: the reduced vocabulary as text.
    """

    pieces: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    texts: tuple[str, ...]

    @staticmethod
    def of(encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]) -> Spelling:
        """From a tokenizer.

        A tokenizer that splits text at newlines writes a line in the same way wherever it stands, so lines can be
        written one by one. That is checked here on all pairs of neighbours.

        Raises:
            ValueError: the tokenizer joins neighbouring lines.
        """
        own = [tuple(encode(text + "\n" if text != "END" else text)) for text in TEXTS]
        every = "".join(TEXTS[a] + "\n" + TEXTS[b] + "\n" for a in range(WORDS - 1) for b in range(WORDS - 1))
        alone = [t for a in range(WORDS - 1) for b in range(WORDS - 1) for t in (*own[a], *own[b])]
        if list(encode(every)) != alone:
            raise ValueError("this tokenizer joins neighbouring lines, expected one that splits at newlines")
        kept = tuple(sorted({token for tokens in own for token in tokens}))
        place = {token: i for i, token in enumerate(kept)}
        return Spelling(
            tuple(tuple(place[t] for t in tokens) for tokens in own), kept, tuple(decode([t]) for t in kept)
        )

    def encode(self, words: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (T,) of a piece, and for each the index of the word that it belongs to."""
        tokens = [self.pieces[int(word)] for word in words]
        counts = torch.tensor([len(t) for t in tokens])
        flat = torch.tensor([t for group in tokens for t in group])
        return flat, torch.arange(len(tokens)).repeat_interleave(counts)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        return "".join(self.texts[t] for t in tokens)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from interleaved to half-split rotary pairs.

    llama.cpp keeps rotary pairs as neighbours (2i, 2i + 1), transformers as (i, i + half).
    """
    out, inputs = weight.shape
    return weight.view(heads, out // heads // 2, 2, inputs).transpose(1, 2).reshape(out, inputs)


_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], tuple[list[str], list[str]]]:
    """A Llama in llama.cpp's format: arguments of ``LlamaConfig``, dequantised weights, and tokens and merges.

    Raises:
        ValueError: not such a file, or of another architecture.
    """
    import gguf  # slow to import, and only needed here

    reader = gguf.GGUFReader(str(path))
    field = {name: value.contents() for name, value in reader.fields.items()}
    if field.get("general.architecture") != "llama":
        raise ValueError(f"{path}: architecture {field.get('general.architecture')}, expected llama")
    heads, shared = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    config = {
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"],
        "max_position_embeddings": field["llama.context_length"],
        "tie_word_embeddings": True,
    }
    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if tensor.name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = value
        elif tensor.name == "output_norm.weight":
            weights["model.norm.weight"] = value
        else:
            _, number, part, _ = tensor.name.split(".")
            if part in ("attn_q", "attn_k"):
                value = half_split(value, heads if part == "attn_q" else shared)
            weights[f"model.layers.{number}.{_LAYER[part]}.weight"] = value
    return config, weights, (field["tokenizer.ggml.tokens"], field["tokenizer.ggml.merges"])


def byte_bpe(tokens: Sequence[str], merges: Sequence[str]) -> Any:
    """The tokenizer of GPT-2's kind that a gguf file carries; digits are split one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def reduce_vocabulary(weights: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """Weights with the rows of tokens that occur only: the logits of these stay what they were."""
    rows = {"model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"}
    index = torch.tensor(kept)
    return {name: value[index] if name in rows else value for name, value in weights.items()}


class LanguageModel(nn.Module):
    """A causal language model that writes grooves token by token.

    Args:
        net: of transformers, with the reduced vocabulary. spelling: how lines are written.
    """

    def __init__(self, net: nn.Module, spelling: Spelling) -> None:
        super().__init__()
        self.net, self.spelling = net, spelling

    def batch(self, pieces: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Tokens (B, T), padded with 0 at the end, and word of each (B, T), -1 for padding."""
        rows = [self.spelling.encode(words) for words in pieces]
        tokens = nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
        return tokens, nn.utils.rnn.pad_sequence([of for _, of in rows], batch_first=True, padding_value=-1)

    def nll(self, pieces: Sequence[np.ndarray]) -> Tensor:
        """(B, W) negative log likelihood in nats of each word given those before, 0 for padding and the first token."""
        tokens, of = self.batch(pieces)
        tokens, of = tokens.to(self.device), of.to(self.device)
        mask = (of >= 0).long()
        logits = self.net(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view(len(tokens), -1) * mask[:, 1:]
        width = max(len(words) for words in pieces)
        return loss.new_zeros(len(pieces), width).scatter_add_(1, of[:, 1:].clamp_min(0), loss)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def write(self, prompts: Sequence[np.ndarray], measures: int, temperature: float, most: int = 1000) -> list[str]:
        """Text that follows each prompt, up to ``END``, ``measures`` measures or ``most`` tokens.

        The measures end with so many ``SEP`` lines, or after as many lines as they have together with these. Sampling
        uses torch's global generator. Prompts of several lengths are padded at their beginning.
        """
        ends = ["\n" in text for text in self.spelling.texts]
        rows = [self.spelling.encode(words)[0] for words in prompts]
        width = max(len(row) for row in rows)
        tokens = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows]).to(self.device)
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows]).to(self.device)
        end, stop = self.spelling.pieces[END], self.spelling.pieces[SEP]
        written: list[list[int]] = [[] for _ in rows]
        done = torch.zeros(len(rows), dtype=torch.bool)
        separators, lines = [0] * len(rows), [0] * len(rows)
        cache = None
        position = (mask.cumsum(1) - 1).clamp_min(0)
        for _ in range(most):
            out = self.net(
                input_ids=tokens, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            p = (out.logits[:, -1].float() / temperature).softmax(1).cpu()
            chosen = torch.multinomial(p, 1)
            for i, token in enumerate(chosen[:, 0].tolist()):
                if done[i]:
                    continue
                written[i].append(token)
                lines[i] += ends[token]
                if tuple(written[i][-len(end) :]) == end:
                    del written[i][-len(end) :]
                    done[i] = True
                elif tuple(written[i][-len(stop) :]) == stop:
                    separators[i] += 1
                    done[i] = separators[i] >= measures
                done[i] |= lines[i] >= measures * (MEASURE + 1)
            if bool(done.all()):
                break
            tokens = chosen.to(self.device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            position = position[:, -1:] + 1
        return [self.spelling.decode(row) for row in written]


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of low rank (Hu et al. 2022): W + (alpha / r) B A."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def add_lora(net: nn.Module, rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Freeze a network and give its linear layers, but not the last, an update of low rank; returns what is trained."""
    net.requires_grad_(False)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            parent = net.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LoRA(module, rank, 2.0 * rank if alpha is None else alpha))
    return [p for p in net.parameters() if p.requires_grad]


def merge_lora(net: nn.Module) -> None:
    """Add the updates of low rank to their linear layers and take them away: the same function, faster."""
    for name, module in list(net.named_modules()):
        if isinstance(module, LoRA):
            with torch.no_grad():
                module.linear.weight += module.scale * module.up @ module.down
            setattr(net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module.linear)


# ---- without pre-training --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, width) after ``past`` keys and values, which are returned with the new ones."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=past is None)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, t, width)))
        return x + self.drop(self.feed(self.norm2(x))), (k, v)


class LineTransformer(nn.Module):
    """A Transformer from scratch with one token a line: 64 lines, ``SEP`` and ``END`` (its settings are ours).

    Args:
        width, layers, heads, dropout. context: most words of a piece. words: size of the vocabulary.
    """

    def __init__(
        self,
        width: int = 256,
        layers: int = 6,
        heads: int = 8,
        dropout: float = 0.2,
        context: int = 288,
        words: int = WORDS,
    ) -> None:
        super().__init__()
        self.context = context
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, words: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, list[Any]]:
        """(B, T) words to (B, T, 66) logits and the cache.

        Raises:
            ValueError: more words than the context.
        """
        begin = 0 if past is None else past[0][0].shape[2]
        if begin + words.shape[1] > self.context:
            raise ValueError(f"{begin + words.shape[1]} words, the context has {self.context}")
        places = torch.arange(begin, begin + words.shape[1], device=words.device)
        x = self.drop(self.words(words) + self.places(places))
        cache = []
        for number, block in enumerate(self.blocks):
            x, kept = block(x, None if past is None else past[number])
            cache.append(kept)
        return F.linear(self.norm(x), self.words.weight), cache

    def nll(self, pieces: Sequence[np.ndarray]) -> Tensor:
        """As ``LanguageModel.nll``."""
        device = self.words.weight.device
        words = nn.utils.rnn.pad_sequence([torch.as_tensor(p) for p in pieces], batch_first=True, padding_value=-1)
        words = words.to(device)
        logits, _ = self(words[:, :-1].clamp_min(0))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), words[:, 1:].flatten(), reduction="none", ignore_index=-1)
        return F.pad(loss.view(len(words), -1), (1, 0))

    @torch.no_grad()
    def write(self, prompts: Sequence[np.ndarray], measures: int, temperature: float, most: int = 1000) -> list[str]:
        """As ``LanguageModel.write``; prompts have equal lengths."""
        words = torch.as_tensor(np.stack(prompts)).to(self.words.weight.device)
        most = min(most, self.context - words.shape[1], measures * (MEASURE + 1))
        cache, rows = None, []
        for _ in range(most):
            logits, cache = self(words, cache)
            words = torch.multinomial((logits[:, -1].float() / temperature).softmax(1).cpu(), 1).to(words.device)
            rows.append(words.cpu())
        out = torch.cat(rows, 1).numpy() if rows else np.zeros((len(prompts), 0), np.int64)
        return [to_text(row[: int((row == END).argmax())] if (row == END).any() else row) for row in out]


class AsLanguageModel(nn.Module):
    """A small Transformer called as those of transformers are, so that ``LanguageModel`` works without that library.

    Args:
        net: over the tokens of a spelling.
    """

    def __init__(self, net: LineTransformer) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
    ) -> SimpleNamespace:
        """Logits (B, T, vocabulary) and the cache; padding may only follow a piece, where causal attention ignores it.

        Raises:
            ValueError: padding at the beginning.
        """
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("prompts of several lengths, expected equal ones")
        logits, cache = self.net(input_ids, past_key_values)
        return SimpleNamespace(logits=logits, past_key_values=cache)


class NGram:
    """Counts with back-off: a line given the line before and the same line of the measure before.

    Each distribution is the counts of its context plus ``weight`` times the next shorter one: both lines, the measure
    before, the line before, all lines, uniform.
    """

    def __init__(self, weight: float = 4.0) -> None:
        self.weight = weight

    def fit(self, pieces: Sequence[np.ndarray]) -> NGram:
        """Count lines of pieces (without ``SEP``), from the second measure on."""
        now = np.concatenate([p[MEASURE:] for p in pieces])
        before = np.concatenate([p[MEASURE - 1 : -1] for p in pieces])
        above = np.concatenate([p[:-MEASURE] for p in pieces])

        def smooth(context: np.ndarray, size: int, back: np.ndarray) -> np.ndarray:
            count = np.bincount(context * LINES + now, minlength=size * LINES).reshape(size, LINES).astype(float)
            return (count + self.weight * back) / (count.sum(1, keepdims=True) + self.weight)

        order0 = smooth(np.zeros_like(now), 1, np.full((1, LINES), 1 / LINES))
        line = smooth(before, LINES, order0)
        measure = smooth(above, LINES, order0)
        both = np.repeat(measure, LINES, 0)  # context above * 64 + before
        self.table = smooth(above * LINES + before, LINES * LINES, (both + np.tile(line, (LINES, 1))) / 2)
        return self

    def nll(self, lines: np.ndarray, skip: int) -> np.ndarray:
        """Nats of the lines after the first ``skip`` (at least 16)."""
        context = lines[skip - MEASURE : -MEASURE] * LINES + lines[skip - 1 : -1]
        return -np.log(self.table[context, lines[skip:]])

    def write(self, prompts: np.ndarray, measures: int, seed: int) -> np.ndarray:
        """(N, measures 16) lines that follow (N, 32) lines."""
        rng = np.random.default_rng(seed)
        out = np.asarray(prompts)
        cumulated = self.table.cumsum(1)
        for _ in range(measures * MEASURE):
            p = cumulated[out[:, -MEASURE] * LINES + out[:, -1]]
            out = np.column_stack([out, (rng.random((len(out), 1)) * p[:, -1:] > p).sum(1)])
        return out[:, prompts.shape[1] :]


def repeat_measure(lines: np.ndarray, measures: int = 16) -> np.ndarray:
    """The first measure, then the second one repeated: what the paper calls naive repetition."""
    return np.concatenate([lines[:MEASURE], np.tile(lines[MEASURE : 2 * MEASURE], measures - 1)])


def coin_flips(measures: int, rng: np.random.Generator) -> np.ndarray:
    """Lines of fair coins."""
    return rng.integers(LINES, size=measures * MEASURE)


# ---- loss ------------------------------------------------------------------------------------------------------------


def weighted_loss(nll: Tensor, pieces: Sequence[Pair], prompt_weight: float) -> Tensor:
    """Mean over a batch of completion losses, words of the prompt counting ``prompt_weight``.

    Args:
        nll: (B, W) of each word. pieces: the pairs. prompt_weight: 0.01 in OpenAI's fine-tuning.
    """
    lengths = torch.tensor([[len(p.prompt), len(p.words)] for p in pieces], device=nll.device)
    place = torch.arange(nll.shape[1], device=nll.device)
    weight = torch.where(place < lengths[:, :1], prompt_weight, 1.0) * (place < lengths[:, 1:])
    return (nll * weight).sum() / weight.sum()


def bits_per_line(nll: Tensor, pieces: Sequence[Pair]) -> tuple[float, int]:
    """Sum in bits over the completions' lines, and their number; ``SEP`` and ``END`` do not count."""
    bits, count = 0.0, 0
    for row, pair in zip(nll, pieces, strict=True):
        words = pair.words
        chosen = (words < LINES) & (np.arange(len(words)) >= len(pair.prompt))
        bits += float(row[: len(words)].cpu()[torch.as_tensor(chosen)].double().sum()) / math.log(2)
        count += int(chosen.sum())
    return bits, count


def uniform_bits() -> float:
    """Bits a line of a model that knows nothing: log2 64."""
    return math.log2(LINES)


__all__ = [
    "DRUMS", "END", "LINES", "MEASURE", "PROMPT_MEASURES", "SEP", "TEXTS", "WORDS", "AsLanguageModel", "Block",
    "LanguageModel", "LineTransformer", "LoRA", "NGram", "Pair", "Spelling", "add_lora", "bits_per_line",
    "byte_bpe", "coin_flips", "from_text", "half_split", "make_pair", "merge_lora", "read_gguf", "reduce_vocabulary",
    "repeat_measure", "to_text", "uniform_bits", "weighted_loss", "with_separators",
]  # fmt: skip
