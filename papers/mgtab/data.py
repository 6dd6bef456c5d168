"""MGTAB, MGTAB-large and the standardised Cresci-15 in their official layouts, and a generated set with their shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError
from shared.files import sha256_file

RELATIONS = ("followers", "friends", "mention", "reply", "quoted", "url", "hashtag")
"""Names of the relation types 0..6."""
TASKS = {"bot": ("human", "bot"), "stance": ("neutral", "against", "support")}
"""Task -> names of its classes. The README lists the stances in this order; how the files number them is not stated."""
LABEL_FILES = {"stance": "labels_stance.pt", "bot": "labels_bot.pt"}
FILES = ("features.pt", "edge_index.pt", "edge_type.pt", "edge_weight.pt", *LABEL_FILES.values())
FEATURES = 788

COLUMNS = (
    "profile_use_background_image",
    "default_profile",
    "verified",
    "followers_count",
    "default_profile_image",
    "listed_count",
    "statuses_count",
    "friends_count",
    "geo_enabled",
    "favourites_count",
    "created_at",
    "screen_name_length",
    "name_length",
    "description_length",
    "followers_friends_ratios",
    "default_profile_background_color",
    "default_profile_sidebar_fill_color",
    "default_profile_sidebar_border_color",
    "has_URL",
    "profile_background_image_URL",
)
"""Names of the first twenty columns; the tweet embedding follows."""
NUMERIC = (3, 5, 6, 7, 9, 10, 11, 12, 13, 14)

EXPECTED_EDGES = {
    "mgtab": (308_120, 412_575, 114_516, 223_466, 77_631, 263_800, 300_000),
    "mgtab-large": (31_990_488, 49_668_723, 7_135_192, 1_018_834, 182_296, 51_281, 7_950_896),
}
EXPECTED_LABELS = {"stance": (3_776, 3_637, 2_786), "bot": (7_451, 2_748)}
EXPECTED_USERS = {"mgtab": 10_199, "mgtab-large": 410_199}
DOWNLOAD = "https://github.com/GraphDetec/MGTAB (Datasets download)"
FOLDERS = {"mgtab": "MGTAB", "mgtab-large": "MGTAB-large", "cresci-15": "Cresci-15"}
"""Data set -> the folder that its archive makes."""


@dataclass(frozen=True)
class Accounts:
    """Users with features, typed edges and labels.

    Attributes:
        name: name in metrics.
        features: (N, F) float32. edges: (2, E) int64 (source, target). types: (E,) int64. weights: (E,), which no
            network uses.
        labels: task -> (N,) int64; -1 without a label (the additional users of MGTAB-large).
        split: train, val and test ids where the data set fixes them (Cresci-15).
        origin: what identifies the data: hashes of files, or the parameters of the generator.
    """

    name: str
    features: Tensor
    edges: Tensor
    types: Tensor
    weights: Tensor
    labels: Mapping[str, Tensor]
    split: tuple[Tensor, Tensor, Tensor] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what training would stumble over.

        Raises:
            UserError: numbers of users or edges that differ, ids or labels out of range, features not finite.
        """
        users = len(self.features)
        if self.features.ndim != 2 or not users:
            raise UserError(f"{self.name}: features {tuple(self.features.shape)}, expected (users, columns)")
        if not bool(self.features.isfinite().all()):
            row = int((~self.features.isfinite()).any(1).nonzero()[0])
            raise UserError(f"{self.name}: a feature of user {row} is not finite")
        if self.edges.ndim != 2 or self.edges.shape[0] != 2:
            raise UserError(f"{self.name}: edge_index {tuple(self.edges.shape)}, expected (2, edges)")
        for what, values in (("edge_type", self.types), ("edge_weight", self.weights)):
            if values.shape != self.edges.shape[1:]:
                raise UserError(f"{self.name}: {what} {tuple(values.shape)}, expected ({self.edges.shape[1]},)")
        _check_range(self.name, "edge_index names user", self.edges, users)
        _check_range(self.name, "edge_type has relation", self.types, len(RELATIONS))
        for task, labels in self.labels.items():
            if labels.shape != (users,):
                raise UserError(f"{self.name}: {labels.numel()} {task} labels for {users} users in features")
            classes = len(TASKS[task])
            wrong = sorted(set(labels.unique().tolist()) - set(range(-1, classes)))
            if wrong or not bool((labels >= 0).any()):
                raise UserError(f"{self.name}: {task} labels {wrong or 'are all -1'}, expected 0..{classes - 1}")

    def edge_counts(self) -> list[int]:
        """Edges of each relation."""
        return torch.bincount(self.types, minlength=len(RELATIONS)).tolist()

    def splits(self, task: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of the users to train on, to choose the epoch with, and to test on (Sec. 3.1).

        The labelled users in the order that ``sklearn.utils.shuffle(..., random_state=seed)`` gives: 70, 20 and 10 %.
        """
        if self.split is not None:
            return self.split
        users = (self.labels[task] >= 0).nonzero().squeeze(1).numpy()
        np.random.RandomState(seed).shuffle(users)
        ends = [int(0.7 * len(users)), int(0.9 * len(users))]
        train, val, test = (torch.from_numpy(part) for part in np.split(users, ends))
        return train, val, test

    def select(self, relations: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Edges (2, E') and types (E',) of some relations, numbered in the order they are named in.

        Raises:
            UserError: a relation without edges.
        """
        counts = self.edge_counts()
        number = torch.full((len(RELATIONS),), -1)
        for new, old in enumerate(relations):
            if not counts[old]:
                raise UserError(f"{self.name}: relation {old} ({RELATIONS[old]}) has no edges; leave it out")
            number[old] = new
        types = number[self.types]
        keep = types >= 0
        return self.edges[:, keep], types[keep]


def _check_range(where: str, what: str, ids: Tensor, limit: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= limit):
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise UserError(f"{where}: {what} {bad}, expected 0..{limit - 1}")


# ---- official layouts ------------------------------------------------------------------------------------------------


def _numpy_globals() -> list[Any]:
    """What a numpy array inside a torch file names, under the module names of numpy 1 and 2: data, no code."""
    from numpy._core.multiarray import _reconstruct

    dtypes = {type(np.dtype(kind)) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "?")}
    named = [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*named, np.ndarray, np.dtype, *sorted(dtypes, key=lambda dtype: dtype.__name__)]


def read_tensor(path: Path) -> Tensor:
    """One ``.pt`` file that holds a tensor or a numpy array. Nothing else is unpickled: no code in it can run.

    Raises:
        UserError: missing, damaged, or something else inside.
    """
    if not path.is_file():
        raise UserError(f"no file {path.name} in {path.parent}; expected the files of {DOWNLOAD} there")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).partition("\n")[0])
        raise UserError(
            f"{path}: not a file of a plain tensor ({' '.join(reason.split())[:160]}); expected one, write others "
            "again with torch.save(torch.as_tensor(value), path)"
        ) from error
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise UserError(f"{path} holds a {type(value).__name__}, expected a dense tensor")
    return value


def _whole(path: Path) -> Tensor:
    """A tensor of whole numbers as int64; some releases store them as floats."""
    value = read_tensor(path)
    if value.is_floating_point() and not bool((value == value.round()).all()):
        raise UserError(f"{path} has fractions, expected whole numbers")
    return value.long()


def _locate(folder: Path, name: str, file: str) -> Path:
    """The folder with a data set's files: the one named, or the official ``Dataset/<NAME>`` below it."""
    places = [folder, folder / FOLDERS[name], folder / "Dataset" / FOLDERS[name]]
    for place in places:
        if (place / file).is_file():
            return place
    for place in places[1:]:
        if place.is_dir():
            return place
    return folder


def load(folder: Path | None, name: str) -> Accounts:
    """Read a data set from its official files.

    Args:
        folder: holds the files, or ``MGTAB``, ``MGTAB-large``, ``Cresci-15`` or ``Dataset/`` with them.
        name: "mgtab", "mgtab-large" or "cresci-15".

    Raises:
        UserError: unknown name, no folder, a missing or malformed file.
    """
    if name not in FOLDERS:
        raise UserError(f"unknown data set {name!r}, expected one of {', '.join(FOLDERS)}")
    if folder is None:
        raise UserError(f"data set {name} needs --data DIR, the folder with {FOLDERS[name]}")
    return {"mgtab": _load_mgtab, "mgtab-large": _load_large, "cresci-15": _load_cresci}[name](folder)


def _load_mgtab(folder: Path) -> Accounts:
    place = _locate(folder, "mgtab", "features.pt")
    paths = {file: place / file for file in FILES}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"no file {path.name} in {place}; expected the six files of MGTAB there: {DOWNLOAD}")
    return Accounts(
        name="mgtab",
        features=read_tensor(paths["features.pt"]).float(),
        edges=_whole(paths["edge_index.pt"]),
        types=_whole(paths["edge_type.pt"]),
        weights=read_tensor(paths["edge_weight.pt"]),
        labels={task: _whole(paths[file]) for task, file in LABEL_FILES.items()},
        origin={file: sha256_file(path) for file, path in paths.items()},
    )


def _load_large(folder: Path) -> Accounts:
    """``large_features.pt``, a ``large_edge_index<r>.pt`` for each relation, and labels of the first users only."""
    place = _locate(folder, "mgtab-large", "large_features.pt")
    features = read_tensor(place / "large_features.pt").float()
    parts = [_whole(place / f"large_edge_index{r}.pt") for r in range(len(RELATIONS))]
    labels = {}
    for task, file in LABEL_FILES.items():
        known = _whole(place / file)
        if len(known) > len(features):
            raise UserError(f"{place / file}: {len(known)} labels for {len(features)} users in large_features.pt")
        labels[task] = torch.cat([known, known.new_full((len(features) - len(known),), -1)])
    edges = torch.cat(parts, dim=1)
    files = sorted(place.glob("l*.pt"))
    return Accounts(
        name="mgtab-large",
        features=features,
        edges=edges,
        types=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([part.shape[1] for part in parts])),
        weights=torch.ones(edges.shape[1]),
        labels=labels,
        origin={path.name: sha256_file(path) for path in files},
    )


def _load_cresci(folder: Path) -> Accounts:
    """Cresci-15 as the authors standardised it: four blocks of features, two relations, a fixed split."""
    place = _locate(folder, "cresci-15", "label.pt")
    blocks = ("cat_properties_tensor", "num_properties_tensor", "des_tensor", "tweets_tensor")
    features = [read_tensor(place / f"{block}.pt").float() for block in blocks]
    if len({len(block) for block in features}) != 1:
        raise UserError(
            f"{place}: {[len(block) for block in features]} users in {', '.join(blocks)}, expected one number"
        )
    users = len(features[0])
    # The official loader reads the validation ids from test_idx.pt and the other way round.
    split = tuple(_whole(place / f"{part}_idx.pt") for part in ("train", "val", "test"))
    for part, ids in zip(("train", "val", "test"), split, strict=True):
        _check_range("cresci-15", f"{part}_idx names user", ids, users)
        if not ids.numel():
            raise UserError(f"{place / part}_idx.pt is empty, expected ids of users")
    edges = _whole(place / "edge_index.pt")
    names = ("edge_index", "edge_type", "label", *blocks, "train_idx", "val_idx", "test_idx")
    return Accounts(
        name="cresci-15",
        features=torch.cat(features, dim=1),
        edges=edges,
        types=_whole(place / "edge_type.pt"),
        weights=torch.ones(edges.shape[1:]),
        labels={"bot": _whole(place / "label.pt")},
        split=split,
        origin={f"{name}.pt": sha256_file(place / f"{name}.pt") for name in names},
    )


def save(accounts: Accounts, folder: Path) -> None:
    """Write the six files of MGTAB's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "features.pt": accounts.features,
        "edge_index.pt": accounts.edges,
        "edge_type.pt": accounts.types,
        "edge_weight.pt": accounts.weights,
        **{file: accounts.labels[task] for task, file in LABEL_FILES.items()},
    }
    for file, value in values.items():
        torch.save(value, folder / file)


def describe(accounts: Accounts) -> list[str]:
    """Counts beside the published ones, a line each."""

    def line(what: str, found: int, expected: int | None) -> str:
        return f"  {what:<22}{found:>12,}" + ("" if expected in (None, found) else f"   expected {expected:,}")

    name = accounts.name
    out = [f"{name}: {len(accounts.origin)} files"]
    out.append(line("users", len(accounts.features), EXPECTED_USERS.get(name)))
    out.append(line("features", accounts.features.shape[1], FEATURES if name in EXPECTED_USERS else None))
    expected = EXPECTED_EDGES.get(name, (None,) * len(RELATIONS))
    for relation, found, count in zip(RELATIONS, accounts.edge_counts(), expected, strict=True):
        out.append(line(f"{relation} edges", found, count))
    published = EXPECTED_LABELS if name in EXPECTED_USERS else {}
    for task, labels in accounts.labels.items():
        counts = torch.bincount(labels[labels >= 0], minlength=len(TASKS[task])).tolist()
        # The numbering of the stances is not stated: the counts are compared as a set.
        known = sorted(published.get(task, counts))
        for label, count in zip(TASKS[task], counts, strict=True):
            out.append(
                f"  {task + ' ' + label:<22}{count:>12,}" + ("" if count in known else "   not a published count")
            )
    return out


# ---- the generated set -----------------------------------------------------------------------------------------------

DEGREES = (10, 12, 4, 6, 3, 8, 8)
"""Edges a user, by relation."""
BOT_HOMOPHILY = (0.30, 0.35, 0.20, 0.15, 0.15, -0.50, 0.0)
"""Share of edges whose target is drawn from the source's own bot class; negative: from the other one."""
STANCE_HOMOPHILY = (0.30, 0.35, 0.25, 0.15, 0.15, 0.0, 0.0)
"""Share, of the other edges, whose target is drawn from the source's own stance."""


def generate(seed: int, nodes: int = 3000) -> Accounts:
    """A set with MGTAB's columns, labels and relations, in which the relations carry what the benchmark says they do.

    Followers and friends join like to like, url joins bots to humans, hashtag is noise: a network that knows the types
    can use url and leave hashtag out, one that merges all edges cannot. The README has the recipe.

    Args:
        seed: the only source of randomness. nodes: N.

    Raises:
        ValueError: too few users for every class to appear.
    """
    if nodes < 100:
        raise ValueError(f"{nodes} users, expected at least 100")
    rng = np.random.default_rng(seed)
    bot = (rng.random(nodes) < 0.27).astype(np.int64)
    stance = rng.choice(3, nodes, p=(0.370, 0.357, 0.273))
    stance[(bot == 1) & (rng.random(nodes) < 0.3)] = 1

    effect = rng.permutation(np.repeat([-1.0, 0.0, 1.0], (7, 7, 6)))
    sign = 2.0 * bot[:, None] - 1.0
    numeric = np.isin(np.arange(len(COLUMNS)), NUMERIC)
    profile = (rng.random((nodes, len(COLUMNS))) < 0.5 + 0.12 * sign * effect).astype(np.float32)
    mean = 0.45 + 0.05 * sign * effect[numeric]
    profile[:, numeric] = rng.beta(8 * mean, 8 * (1 - mean))
    width = FEATURES - len(COLUMNS)
    directions = rng.standard_normal((5, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    tweet = rng.standard_normal((nodes, width)) + 1.8 * directions[stance] + 1.3 * directions[3 + bot]
    features = np.concatenate([profile, tweet], axis=1).astype(np.float32)

    sources, targets, types, weights = [], [], [], []
    for relation, degree in enumerate(DEGREES):
        count = nodes * degree
        appeal = (rng.permutation(nodes) + 1.0) ** -0.6
        source = rng.choice(nodes, count, p=appeal / appeal.sum())
        by_bot = rng.random(count) < abs(BOT_HOMOPHILY[relation])
        by_stance = ~by_bot & (rng.random(count) < STANCE_HOMOPHILY[relation])
        target = rng.integers(nodes, size=count)
        wanted = bot[source] if BOT_HOMOPHILY[relation] > 0 else 1 - bot[source]
        target[by_bot] = _members(rng, bot, wanted[by_bot])
        target[by_stance] = _members(rng, stance, stance[source[by_stance]])
        keep = source != target
        sources.append(source[keep])
        targets.append(target[keep])
        types.append(np.full(int(keep.sum()), relation))
        counted = RELATIONS[relation] in ("url", "hashtag")
        weights.append(rng.integers(1, 10, int(keep.sum())) if counted else np.ones(int(keep.sum()), dtype=np.int64))
    return Accounts(
        name="generated",
        features=torch.from_numpy(features),
        edges=torch.from_numpy(np.stack([np.concatenate(sources), np.concatenate(targets)])),
        types=torch.from_numpy(np.concatenate(types)),
        weights=torch.from_numpy(np.concatenate(weights)),
        labels={"bot": torch.from_numpy(bot), "stance": torch.from_numpy(stance)},
        origin={"generator": "papers.mgtab.data.generate", "seed": seed, "nodes": nodes},
    )


def _members(rng: np.random.Generator, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted class, a random user of it."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], np.arange(int(labels.max()) + 2))
    size = np.diff(first)
    return order[first[wanted] + np.floor(rng.random(len(wanted)) * size[wanted]).astype(np.int64)]
