"""Train point-cloud auto-encoders without labels, then judge their codewords with a linear SVM.

The default run compares FoldingNet with a fully connected decoder and with an encoder without graph pooling on
generated surfaces; the presets hold the paper's settings for ShapeNet, ModelNet and ShapeNetPart.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared import cli
from shared.cli import Preset


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the paper's sizes."""

    train_on: str = "surfaces"
    """Data set whose training split the auto-encoders see (never its labels): surfaces shapenet modelnet40 modelnet10
    modelnet10-voxels shapenetpart geometric-shapes."""
    transfer: tuple[str, ...] = ()
    """Labelled data sets for the linear SVM (default: train_on). The first one's test split chooses the snapshot."""
    arms: tuple[str, ...] = ("foldingnet",)
    """Variants to train: foldingnet nocov nogm nogmcov orthorot randrot grid3d denser rnn sphere gaussian fc."""
    points: int = 2048
    """Points a cloud."""
    k: int = 16
    """Neighbours of a point, itself not counted."""
    code: int = 512
    """Length of the codeword."""
    widths: tuple[int, ...] = (64, 64, 64, 128, 1024)
    """Channels of the five per-point layers of the encoder."""
    hidden: int = 512
    """Width of the folds."""
    side: int = 45
    """Points along a side of the grid (45: 2,025 points)."""
    fc_hidden: tuple[int, ...] = (1024, 2048)
    """Hidden widths of the fully connected decoder."""
    epochs: int = 300
    """Passes over the training split."""
    batch: int = 16
    """Clouds a step, over all processes."""
    micro_batch: int = 0
    """Most clouds in one forward pass on one device; 0: no limit."""
    lr: float = 1e-4
    """Adam learning rate, constant."""
    weight_decay: float = 1e-6
    """L2 penalty on weights; biases have none."""
    snapshots: int = 100
    """How many times in a run the test reconstruction is measured; the best snapshot is kept, as the authors did."""
    train_clouds: int = 0
    """Use this many training clouds, the same number of each class as far as they go; 0: all."""
    per_class: int = 80
    """Generated surfaces: training clouds a class."""
    test_per_class: int = 40
    """Generated surfaces: test clouds a class."""
    noise: float = 0.02
    """Generated surfaces: standard deviation of the coordinates' noise, in radii of the cloud."""
    deformation: float = 1.0
    """Generated surfaces: strength of stretching, bending, twisting, tapering and turning."""
    clouds_per_mesh: int = 1
    """Meshes: how many clouds are sampled from each."""
    data_seed: int = 0
    """Seed of generated, sampled and subsampled data."""
    rotation_seed: int = 127482
    """Seed of the rotations of orthorot and randrot."""
    label_shares: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Shares of the labels with which the SVM is trained besides all of them."""
    noise_shares: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Robustness: shares of the test points replaced by uniform noise."""
    interpolations: int = 20
    """Pairs of test clouds between whose codewords is interpolated."""
    svm_iterations: int = 20000
    """Most iterations of the linear SVM."""

    def __post_init__(self) -> None:
        for name in ("points", "k", "code", "hidden", "side", "epochs", "batch", "snapshots", "per_class"):
            _at_least(name, getattr(self, name), 1)
        for name in ("test_per_class", "clouds_per_mesh", "interpolations", "svm_iterations"):
            _at_least(name, getattr(self, name), 1)
        for name in ("micro_batch", "train_clouds", "data_seed", "rotation_seed"):
            _at_least(name, getattr(self, name), 0)
        if self.points <= self.k:
            raise ValueError(f"--points is {self.points}: need more than k={self.k} points")
        if not self.lr > 0 or math.isinf(self.lr):
            raise ValueError(f"--lr is {self.lr}, expected a positive number")
        for name in ("weight_decay", "noise", "deformation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more")
        for name in ("label_shares", "noise_shares"):
            if not all(0 < share < 1 for share in getattr(self, name)):
                raise ValueError(
                    f"--{name.replace('_', '-')} are {getattr(self, name)}, expected numbers between 0 and 1"
                )
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms are {self.arms}, expected one or more variants, each once")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"--arms: unknown variant {unknown[0]!r}, expected among {', '.join(ARMS)}")
        if self.train_on not in (*LABELLED, "shapenet"):
            known = ", ".join((*LABELLED, "shapenet"))
            raise ValueError(f"--train-on: unknown data set {self.train_on!r}, expected one of {known}")
        wrong = [name for name in transfer_sets(self) if name not in LABELLED]
        if wrong:
            raise ValueError(f"--transfer: {wrong[0]!r} has no labelled splits, expected among {', '.join(LABELLED)}")
        for name, count in (("widths", 5), ("fc_hidden", 2)):
            value = getattr(self, name)
            if len(value) != count or min(value) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {count} numbers of at least 1")


def transfer_sets(config: Config) -> tuple[str, ...]:
    """The labelled data sets on which codewords are judged."""
    return config.transfer or (config.train_on,)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


ARMS = (
    *("foldingnet", "nocov", "nogm", "nogmcov", "orthorot", "randrot"),
    *("grid3d", "denser", "rnn", "sphere", "gaussian", "fc"),
)
LABELLED = ("surfaces", "modelnet10-voxels", "modelnet10", "modelnet40", "shapenetpart", "geometric-shapes")

SMALL: dict[str, Any] = {
    "points": 256,
    "code": 128,
    "hidden": 128,
    "side": 16,
    "widths": (32, 32, 32, 64, 256),
    "fc_hidden": (256, 512),
}
MEDIUM: dict[str, Any] = {
    "points": 512,
    "code": 256,
    "hidden": 256,
    "side": 23,
    "widths": (64, 64, 64, 128, 512),
    "fc_hidden": (512, 1024),
}
GPU = "1 GPU of 12 GB"
SHAPENET = "shapenet57448xyzonly.npz, modelnet40_ply_hdf5_2048/, ModelNet10/"
TRANSFER = ("modelnet40", "modelnet10")
PRESETS = {
    "default": Preset(
        Config(arms=("foldingnet", "fc", "nogm"), **SMALL, epochs=12, lr=2e-3, snapshots=6),
        seeds=3,
        data="generated surfaces, 16 classes",
        hours=0.06,
        why_not_comparable="generated surfaces, small networks",
    ),
    "smoke": Preset(
        Config(
            arms=("foldingnet", "fc"),
            points=64,
            k=8,
            code=16,
            hidden=16,
            side=6,
            widths=(8, 8, 8, 16, 32),
            fc_hidden=(16, 32),
            per_class=3,
            test_per_class=2,
            epochs=1,
            snapshots=2,
            interpolations=3,
            label_shares=(0.5,),
            noise_shares=(0.1,),
        ),
        data="generated surfaces",
        hours=0.002,
        claims=False,
        why_not_comparable="a few steps on generated data",
    ),
    "modelnet10-voxels": Preset(
        Config(
            train_on="modelnet10-voxels",
            arms=("foldingnet", "fc", "nogm", "nocov", "orthorot"),
            **MEDIUM,
            epochs=8,
            lr=1e-3,
            snapshots=8,
        ),
        data="modelnet10_voxels32_packed.npz",
        hours=0.2,
        needs_data=True,
        claims=False,
        why_not_comparable="surface points of 32^3 voxels, small networks, 8 epochs, trained on ModelNet10 itself",
    ),
    "geometric-shapes": Preset(
        Config(
            train_on="geometric-shapes",
            arms=("foldingnet", "fc"),
            **MEDIUM,
            clouds_per_mesh=8,
            epochs=30,
            lr=5e-4,
            snapshots=5,
        ),
        data="raw/ or raw.zip: meshes of 40 shapes",
        hours=0.05,
        needs_data=True,
        claims=False,
        why_not_comparable="another data set: one mesh a class and split",
    ),
    "modelnet10": Preset(
        Config(train_on="modelnet10", arms=("foldingnet", "fc"), epochs=400),
        data="ModelNet10/: OFF meshes",
        hardware=GPU,
        hours=12,
        needs_data=True,
        claims=False,
        why_not_comparable="the paper trains on ShapeNet",
    ),
    "modelnet40": Preset(
        Config(train_on="modelnet40", arms=("foldingnet", "nogmcov"), epochs=400),
        data="modelnet40_ply_hdf5_2048/",
        hardware=GPU,
        hours=25,
        needs_data=True,
        claims=False,
        why_not_comparable="the paper trains on ShapeNet",
        note="ModelNet40Train_FoldingNet and _noGMCov of the authors",
    ),
    "shapenet": Preset(
        Config(train_on="shapenet", transfer=TRANSFER, arms=("orthorot",), epochs=330),
        data=SHAPENET,
        hardware=GPU,
        hours=40,
        needs_data=True,
        claims=False,
        note="the paper's main result",
    ),
    "shapenet-plain": Preset(
        Config(train_on="shapenet", transfer=TRANSFER, arms=("foldingnet", "fc"), epochs=300),
        data=SHAPENET,
        hardware=GPU,
        hours=70,
        needs_data=True,
        claims=False,
        note="without rotations, and the fully connected baseline",
    ),
    "shapenet-ablation": Preset(
        Config(train_on="shapenet", transfer=TRANSFER, arms=("foldingnet", "nocov", "nogm", "nogmcov"), epochs=300),
        data=SHAPENET,
        hardware=GPU,
        hours=130,
        needs_data=True,
        claims=False,
    ),
    "shapenet-rotations": Preset(
        Config(train_on="shapenet", transfer=TRANSFER, arms=("orthorot", "randrot"), epochs=330),
        data=SHAPENET,
        hardware=GPU,
        hours=80,
        needs_data=True,
        claims=False,
    ),
    "shapenet-decoders": Preset(
        Config(
            train_on="shapenet",
            transfer=TRANSFER,
            arms=("grid3d", "denser", "rnn", "sphere", "gaussian", "fc"),
            epochs=300,
        ),
        data=SHAPENET,
        hardware=GPU,
        hours=220,
        needs_data=True,
        claims=False,
        why_not_comparable="the paper states no number for these decoders",
    ),
    "shapenetpart": Preset(
        Config(
            train_on="shapenetpart", transfer=("modelnet40",), arms=("foldingnet", "orthorot", "nogmcov"), epochs=330
        ),
        data="shapenet_part_seg_hdf5_data/, modelnet40_ply_hdf5_2048/",
        hardware=GPU,
        hours=30,
        needs_data=True,
        claims=False,
        why_not_comparable="the paper trains on ShapeNet",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import (  # noqa: E402
    SOURCES,
    SURFACES,
    CloudSet,
    Split,
    count_shapes,
    generate_surfaces,
    load,
    locate,
    neighbours,
    replace_by_noise,
)
from model import (  # noqa: E402
    ROTATIONS,
    AutoEncoder,
    Clouds,
    FoldingDecoder,
    FullyConnectedDecoder,
    Graph,
    build,
    chamfer,
    chamfer_parts,
    local_covariance,
    parameters,
    plane_grid,
    rotate,
    union_graph,
)

EVALUATION_BATCH = 64
TRAIN_SAMPLE = 1000
"""Training clouds on which the training reconstruction is measured."""
STEPS_BETWEEN = 9
"""Codewords between the two ends of an interpolation."""


# ---- data ------------------------------------------------------------------------------------------------------


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says: each data set that the configuration needs, its counts and what was expected."""
    lines, missing = [], []
    for name in dict.fromkeys((config.train_on, *transfer_sets(config))):
        if name == "surfaces":
            sizes = f"{config.per_class} training and {config.test_per_class} test clouds a class"
            lines.append(f"surfaces: generated, {len(SURFACES)} classes, {sizes}; nothing to look for")
            continue
        try:
            path, found = locate(name, folder), count_shapes(name, folder, config.points)
        except UserError as error:
            missing.append(str(error))
            continue
        for split, expected in SOURCES[name].counts.items():
            verdict = "as expected" if found[split] == expected else f"EXPECTED {expected}"
            lines.append(f"{name} {split}: {found[split]} shapes ({verdict}) in {path}")
    if missing:
        raise UserError("; ".join(lines + missing))
    return lines


def stratified(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of ``count`` samples: as many of each class as far as they go, in ascending order."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(labels)) - first[labels[by_class]]
    return by_class[rank.argsort(stable=True)[:count]].sort().values


class Data:
    """The splits of a run, each prepared once: covariances and graphs."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        self._splits: dict[str, dict[str, Split]] = {}
        self._sets: dict[tuple[str, str], CloudSet] = {}
        for name in dict.fromkeys((config.train_on, *transfer_sets(config))):
            if name == "surfaces":
                spec = {
                    key: getattr(config, key)
                    for key in ("points", "per_class", "test_per_class", "noise", "deformation")
                }
                run.data_used("surfaces", "generated", spec={**spec, "seed": config.data_seed})
            else:
                run.data_used(name, "real", path=locate(name, run.data))

    def split(self, name: str, split: str) -> Split:
        """Points and labels."""
        config = self.config
        if name not in self._splits:
            if name == "surfaces":
                self._splits[name] = {
                    part: generate_surfaces(
                        count,
                        config.points,
                        self.run.generator("surfaces", part, config.data_seed),
                        config.noise,
                        config.deformation,
                    )
                    for part, count in (("train", config.per_class), ("test", config.test_per_class))
                }
            else:
                self._splits[name] = load(name, self.run.data, config.points, config.data_seed, config.clouds_per_mesh)
        return self._splits[name][split]

    def get(self, name: str, split: str, noise: float = 0.0) -> CloudSet:
        """A split ready for the encoder; ``noise`` replaces that share of its points first."""
        key = (name, f"{split}+{noise}" if noise else split)
        if key not in self._sets:
            raw = self.split(name, split)
            if noise:
                generator = self.run.generator("noise points", name, noise, self.config.data_seed)
                raw = Split(replace_by_noise(raw.points, noise, generator), raw.labels)
            near = neighbours(raw.points, self.config.k, f"{name} {split}")
            self._sets[key] = CloudSet.make(raw, near, local_covariance, union_graph)
        return self._sets[key]

    def training(self) -> tuple[CloudSet, Tensor]:
        """The set to train on and the positions of the clouds that are used."""
        clouds = self.get(self.config.train_on, "train")
        count = self.config.train_clouds
        if not count or count >= len(clouds):
            return clouds, torch.arange(len(clouds))
        labels = clouds.labels if len(clouds.labels) else torch.zeros(len(clouds), dtype=torch.long)
        return clouds, stratified(labels, count, self.run.generator("training clouds", self.config.data_seed))


def cut(clouds: CloudSet, index: Tensor, device: torch.device) -> Clouds:
    """A batch on the device."""
    points, covariance, graph = clouds.batch(index)
    return Clouds(points, covariance, Graph(*graph)).to(device)


# ---- evaluation ------------------------------------------------------------------------------------------------


@torch.no_grad()
def codewords(net: AutoEncoder, clouds: CloudSet, device: torch.device) -> Tensor:
    """Codewords (N, C) of a split, on the CPU."""
    parts = torch.arange(len(clouds)).split(EVALUATION_BATCH)
    return torch.cat([net.encoder(*cut(clouds, part, device)).cpu() for part in parts])


@torch.no_grad()
def reconstruction(
    net: AutoEncoder, clouds: CloudSet, device: torch.device, index: Tensor | None = None
) -> dict[str, float]:
    """Mean distances of clouds and their reconstructions: max form, squared form, and max form after the first fold."""
    rows = []
    for part in (torch.arange(len(clouds)) if index is None else index).split(EVALUATION_BATCH):
        batch = cut(clouds, part, device)
        out = net(*batch)
        forward, backward, squared = chamfer_parts(batch.points, out.points)
        first = chamfer(batch.points, out.first)
        rows.append(torch.stack([torch.maximum(forward, backward), squared, first], 1).double().cpu())
    values = torch.cat(rows).mean(0)
    return dict(zip(("chamfer", "chamfer_squared", "first_fold_chamfer"), values.tolist(), strict=True))


@dataclass
class LinearSvm:
    """scikit-learn's LinearSVC with C = 1 and random_state = 0, as the authors call it, on raw codewords.

    ``standardise`` divides out the codewords' scale first: a linear SVM with C = 1 is regularised more the smaller they
    are, and codewords of a short training are small.
    """

    iterations: int
    standardise: bool = False

    def fit(self, codes: Tensor, labels: Tensor) -> LinearSvm:
        """Train on codewords (N, C) and labels (N,)."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC

        self._mean, self._std = codes.mean(0), codes.std(0).clamp_min(1e-8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy does not depend on the last digits
            warnings.filterwarnings("ignore", message="The number of unique classes")  # few labels are meant
            self._svm = LinearSVC(random_state=0, max_iter=self.iterations).fit(self._scaled(codes), labels.numpy())
        return self

    def accuracy(self, codes: Tensor, labels: Tensor) -> float:
        """Share of right answers."""
        return float(self._svm.score(self._scaled(codes), labels.numpy()))

    def _scaled(self, codes: Tensor) -> np.ndarray:
        return ((codes - self._mean) / self._std if self.standardise else codes).double().numpy()


def labelled_share(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Positions of a random share of the samples, at least one of every class."""
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    one_each = by_class[(sizes.cumsum(0) - sizes)[sizes > 0]]
    rest = order[~torch.isin(order, one_each)]
    return torch.cat([one_each, rest])[: max(len(one_each), round(share * len(labels)))]


@torch.no_grad()
def interpolate(
    net: AutoEncoder, codes: Tensor, pairs: Tensor, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Decode straight lines between codewords and measure how the surfaces change along them.

    Args:
        codes: (N, C). pairs: (P, 2) positions of the ends.

    Returns:
        reconstructions (P, T, M, 3), and the mean over pairs of: the share of steps that bring the surface nearer to
        the far end, the rank correlation of t with the distance from the near end, and the largest step in units of
        the distance between the ends.
    """
    t = torch.linspace(0, 1, STEPS_BETWEEN + 2).view(1, -1, 1)
    lines = (1 - t) * codes[pairs[:, 0]].unsqueeze(1) + t * codes[pairs[:, 1]].unsqueeze(1)
    p, steps, c = lines.shape
    flat = [net.decoder(part.to(device)).points.cpu() for part in lines.reshape(-1, c).split(EVALUATION_BATCH)]
    shapes = torch.cat(flat).unflatten(0, (p, steps))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return chamfer(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])).view(p, -1)

    from_near = distance(shapes, shapes[:, :1].expand_as(shapes))
    to_far = distance(shapes, shapes[:, -1:].expand_as(shapes))
    step = distance(shapes[:, 1:], shapes[:, :-1])
    rank = from_near.argsort(1).argsort(1).double()
    order = torch.arange(steps, dtype=torch.double).expand_as(rank)
    gap = (rank - order).square().sum(1)
    return shapes, {
        "interpolation_approach": float((to_far.diff(dim=1) < 0).double().mean()),
        "interpolation_rank_correlation": float((1 - 6 * gap / (steps * (steps**2 - 1))).mean()),
        "interpolation_largest_step": float((step.amax(1) / from_near[:, -1]).mean()),
    }


def different_pairs(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` pairs (count, 2) of samples of different classes."""
    first, second = (torch.randint(len(labels), (64 * count,), generator=generator) for _ in range(2))
    return torch.stack([first, second], 1)[labels[first] != labels[second]][:count]


# ---- training --------------------------------------------------------------------------------------------------


def make(config: Config, arm: str) -> AutoEncoder:
    """The auto-encoder of an arm at the configuration's sizes."""
    with user_errors():
        return build(arm, config.code, config.hidden, config.side, config.widths, config.fc_hidden, config.points)


def make_optimizer(net: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam with an L2 penalty on weights only, as in the authors' Caffe layers (decay_mult 0 for biases)."""
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.Adam(groups, lr=config.lr, fused=next(net.parameters()).device.type != "meta")


def train_arm(config: Config, run: Run, unit: Unit, data: Data) -> None:
    """Train and evaluate one arm with one seed."""
    seed, arm = unit.key
    device, chosen_on = run.device, transfer_sets(config)[0]
    clouds, index = data.training()
    test = data.get(chosen_on, "test")
    torch.manual_seed(run.derive_seed("initial weights", seed))  # arms of a seed begin with the same encoder
    net = make(config, arm).to(device)
    model, optimizer = run.setup(net, make_optimizer(net, config))
    unit.attach(model=model, optimizer=optimizer)
    state = unit.state
    if "initial" not in state:
        state["initial"] = {"chamfer_at_initialisation": reconstruction(net, test, device)["chamfer"]}
        for name in transfer_sets(config):
            codes = [codewords(net, data.get(name, split), device) for split in ("train", "test")]
            state["initial"] |= svm_metrics(config, data, name, codes, "untrained_")
        state |= {"curve": [], "best": math.inf, "best_step": 0, "seconds": 0.0}

    sampler = EpochSampler(len(index), config.batch, run.derive_seed("order", seed))
    total = config.epochs * len(sampler)
    marks = {round((i + 1) * total / config.snapshots) for i in range(config.snapshots)}
    for step in unit.steps(total):
        begin = time.perf_counter()
        batch = index[sampler[step]]
        rotations = None
        if arm in ROTATIONS:
            rotations = ROTATIONS[arm](len(batch), run.generator("rotation", config.rotation_seed, seed, step))
        optimizer.zero_grad()
        mean = torch.zeros((), device=device)
        for part, weight in run.shard(torch.arange(len(batch)), config.micro_batch or None):
            inputs = cut(clouds, batch[part], device)
            if rotations is not None:
                inputs = rotate(inputs, rotations[part].to(device))
            loss = weight * chamfer(inputs.points, model(*inputs).points).mean()
            run.backward(loss)
            mean += loss.detach()
        optimizer.step()
        unit.log(chamfer=mean)
        state["seconds"] += time.perf_counter() - begin
        if step + 1 in marks:
            value = reconstruction(net, test, device)["chamfer"]
            state["curve"].append([step + 1, value])
            if value < state["best"]:
                weights = {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}
                state |= {"best": value, "best_step": step + 1, "best_weights": weights}
    evaluate(config, run, unit, data, net, total)


def svm_metrics(config: Config, data: Data, name: str, codes: list[Tensor], prefix: str) -> dict[str, float]:
    """Accuracy of the SVM on raw and on standardised codewords of a data set's train and test split."""
    train_labels, test_labels = (data.get(name, split).labels for split in ("train", "test"))
    out = {}
    for suffix, standardise in (("", False), ("_standardised", True)):
        svm = LinearSvm(config.svm_iterations, standardise).fit(codes[0], train_labels)
        out[f"{prefix}svm_accuracy{suffix}@{name}"] = svm.accuracy(codes[1], test_labels)
    return out


def evaluate(config: Config, run: Run, unit: Unit, data: Data, net: AutoEncoder, steps: int) -> None:
    """Everything that is measured of a trained arm: the kept snapshot, and the last one beside it."""
    seed, arm = unit.key
    device, first_set = run.device, transfer_sets(config)[0]
    clouds, index = data.training()
    test = data.get(first_set, "test")

    def both(name: str) -> list[Tensor]:
        return [codewords(net, data.get(name, split), device) for split in ("train", "test")]

    last = {"last_test_chamfer": reconstruction(net, test, device)["chamfer"]}
    last_is_kept = unit.state["best_step"] == steps
    if not last_is_kept:
        for name in transfer_sets(config):
            last |= svm_metrics(config, data, name, both(name), "last_")
    net.load_state_dict(unit.state["best_weights"])

    kept = reconstruction(net, test, device)
    if len(index) > TRAIN_SAMPLE:
        index = index[torch.randperm(len(index), generator=run.generator("train sample"))[:TRAIN_SAMPLE]]
    out = {**unit.state["initial"], "train_chamfer": reconstruction(net, clouds, device, index)["chamfer"]}
    out |= {"test_chamfer": kept["chamfer"], "test_chamfer_squared": kept["chamfer_squared"]}
    if isinstance(net.decoder, FoldingDecoder):
        out["test_chamfer_first_fold"] = kept["first_fold_chamfer"]
    out |= {"encoder_parameters": parameters(net.encoder), "decoder_parameters": parameters(net.decoder)}
    if arm == "fc":
        with torch.device("meta"):
            out["folding_parameter_ratio"] = parameters(make(config, "foldingnet").decoder) / parameters(net.decoder)
    keep: dict[str, Tensor] = {"curve": torch.tensor(unit.state["curve"], dtype=torch.float64)}
    for name in transfer_sets(config):
        labels = data.get(name, "train").labels
        codes = both(name)
        scores = svm_metrics(config, data, name, codes, "")
        if last_is_kept:
            last |= {f"last_{metric}": value for metric, value in scores.items()}
        out |= scores
        for share in config.label_shares:
            chosen = labelled_share(labels, share, run.generator("labels", name, share, seed))
            svm = LinearSvm(config.svm_iterations).fit(codes[0][chosen], labels[chosen])
            out[f"svm_accuracy_{share:g}_of_labels@{name}"] = svm.accuracy(codes[1], data.get(name, "test").labels)
        svm = LinearSvm(config.svm_iterations).fit(codes[0], labels)
        for share in config.noise_shares:
            noisy = data.get(name, "test", share)
            out[f"svm_accuracy_{share:g}_noise@{name}"] = svm.accuracy(codewords(net, noisy, device), noisy.labels)
        if name == first_set:
            pairs = different_pairs(test.labels, config.interpolations, run.generator("pairs", name))
            shapes, smoothness = interpolate(net, codes[1], pairs, device)
            out |= smoothness
            keep |= show(net, test, codes[1], pairs, shapes, device)
    metrics = {}
    for metric, value in (out | last).items():  # "metric@data set" -> "data set/arm/metric"
        stem, _, name = metric.partition("@")
        metrics[f"{name or first_set}/{arm}/{stem}"] = value
    unit.finish(metrics, {f"{config.train_on}/{arm}/step_seconds": unit.state["seconds"] / max(steps, 1)}, keep)


@torch.no_grad()
def show(
    net: AutoEncoder, test: CloudSet, codes: Tensor, pairs: Tensor, shapes: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Tensors for the figure: a cloud, its folds, a finer grid folded, and an interpolation."""
    code = codes[pairs[0, :1]].to(device)
    out = net.decoder(code)
    kept = {"cloud": test.points[pairs[0, 0]], "final": out.points[0], "line": shapes[0, :: max(1, STEPS_BETWEEN // 3)]}
    if isinstance(net.decoder, FoldingDecoder) and net.decoder.grid.shape[1] == 2:
        fine = plane_grid((100, 100)).to(device)
        kept |= {
            "grid": net.decoder.grid,
            "first": out.first[0],
            "fine_grid": fine,
            "fine": net.decoder(code, fine).points[0],
        }
    return {name: value.cpu().clone() for name, value in kept.items()}


def paper_decoder_ratio() -> float:
    """Parameters of the folding decoder in those of the fully connected one, at the paper's sizes."""
    with torch.device("meta"):
        return parameters(FoldingDecoder()) / parameters(FullyConnectedDecoder())


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, on the means over seeds."""
    m, name, limit = run.metrics, transfer_sets(config)[0], run.threshold

    def mean(metric: str, arm: str = "foldingnet") -> float:
        return m[f"{name}/{arm}/{metric}"].mean

    trained, untrained = mean("svm_accuracy"), mean("untrained_svm_accuracy")
    scaled = mean("svm_accuracy_standardised") - mean("untrained_svm_accuracy_standardised")
    claim = "codewords_are_learned"
    holds = trained - untrained >= limit(claim) and scaled >= limit(claim, "standardised_margin")
    run.claim(claim, holds, trained=trained, untrained=untrained, standardised_gain=scaled)

    before, after = mean("chamfer_at_initialisation"), mean("test_chamfer")
    claim = "reconstruction_is_learned"
    run.claim(claim, after <= limit(claim, "ratio") * before, before=before, after=after)

    share, distance = paper_decoder_ratio(), after / mean("test_chamfer", "fc")
    gain = trained - mean("svm_accuracy", "fc")
    claim = "few_parameters_reconstruct"
    holds = round(share, 4) == limit(claim, "parameters") and distance <= limit(claim, "chamfer")
    run.claim(claim, holds, decoder_parameter_ratio=share, chamfer_ratio=distance)
    claim = "few_parameters_discriminate"
    run.claim(claim, gain >= -limit(claim, "accuracy"), accuracy_gain=gain)

    first = mean("test_chamfer_first_fold")
    claim = "second_fold_refines"
    run.claim(claim, after <= limit(claim, "ratio") * first, first=first, second=after)

    correlation, step = mean("interpolation_rank_correlation"), mean("interpolation_largest_step")
    claim = "interpolation_is_smooth"
    holds = correlation >= limit(claim, "correlation") and step <= limit(claim, "step")
    run.claim(claim, holds, rank_correlation=correlation, largest_step=step)

    shares = sorted(config.label_shares)
    curve = [*(mean(f"svm_accuracy_{share:g}_of_labels") for share in shares), trained]
    claim = "more_labels_help"
    holds = all(after - before >= limit(claim) for before, after in pairwise(curve))
    run.claim(claim, holds, **{f"at_{share:g}": value for share, value in zip([*shares, 1.0], curve, strict=True)})

    share = sorted(config.noise_shares)[len(config.noise_shares) // 2]
    noisy = f"svm_accuracy_{share:g}_noise"
    drop, without = trained - mean(noisy), mean("svm_accuracy", "nogm") - mean(noisy, "nogm")
    claim = "graph_pooling_is_robust"
    run.claim(claim, without - drop >= limit(claim), drop_with_graph=drop, drop_without=without)


def draw(config: Config, run: Run) -> Any:
    """The figure: folds and an interpolation of the first arm that has a grid, curves of all arms."""
    figure, axes = report.figure(3, 5, width=2.6, height=2.5)
    seed, name = run.seeds[0], transfer_sets(config)[0]
    kept = {arm: run.kept((seed, arm)) for arm in config.arms}
    chosen = next((arm for arm in config.arms if "grid" in kept[arm]), config.arms[0])
    shown = kept[chosen]

    def scatter(axis: Any, points: Tensor, title: str, colour: Tensor | None = None) -> None:
        flat = points if points.shape[1] == 2 else points @ torch.tensor([[0.86, -0.25], [-0.5, -0.43], [0.0, 0.87]])
        paint = {"color": "0.3"} if colour is None else {"c": colour.numpy(), "cmap": "viridis"}
        axis.scatter(*flat.T.numpy(), s=2, linewidths=0, **paint)
        axis.set(title=title, aspect="equal")
        axis.set_axis_off()

    if "grid" in shown:
        across, fine = shown["grid"].sum(1), shown["fine_grid"].sum(1)
        panels = [("grid", across), ("first", across), ("final", across), ("fine", fine)]
        titles = {"grid": "grid", "first": "after fold 1", "final": "after fold 2", "fine": "100 x 100 grid, folded"}
    else:
        panels, titles = [("final", None)], {"final": "reconstruction"}
    scatter(axes[0, 0], shown["cloud"], f"test cloud ({name})")
    for axis, (key, colour) in zip(axes[0, 1:], panels, strict=False):
        scatter(axis, shown[key], titles[key], colour)
    for axis in axes[0, 1 + len(panels) :]:
        axis.set_axis_off()
    line = shown["line"]
    for i, axis in enumerate(axes[1]):
        if i < len(line):
            scatter(
                axis, line[i], f"interpolation {i + 1}/{len(line)}", shown["grid"].sum(1) if "grid" in shown else None
            )
        else:
            axis.set_axis_off()
    m = run.metrics
    curves, distances, accuracy, few, noisy = axes[2]
    full = 1.0
    for i, arm in enumerate(config.arms):
        colour = report.COLOURS[i % len(report.COLOURS)]
        curves.plot(*kept[arm]["curve"].T.numpy(), color=colour, label=arm)
        distances.bar(i, m[f"{name}/{arm}/test_chamfer"].mean, yerr=m[f"{name}/{arm}/test_chamfer"].std, color=colour)
        accuracy.bar(i, m[f"{name}/{arm}/svm_accuracy"].mean, yerr=m[f"{name}/{arm}/svm_accuracy"].std, color=colour)
        accuracy.plot([i - 0.4, i + 0.4], [m[f"{name}/{arm}/untrained_svm_accuracy"].mean] * 2, color="black", lw=1)
        shares = [*sorted(config.label_shares), full]
        values = [m[f"{name}/{arm}/svm_accuracy_{share:g}_of_labels"].mean for share in shares[:-1]]
        few.semilogx(shares, [*values, m[f"{name}/{arm}/svm_accuracy"].mean], "o-", ms=3, color=colour)
        parts = sorted(config.noise_shares)
        values = [m[f"{name}/{arm}/svm_accuracy_{share:g}_noise"].mean for share in parts]
        noisy.plot([0, *parts], [m[f"{name}/{arm}/svm_accuracy"].mean, *values], "o-", ms=3, color=colour)
    curves.set(title="test Chamfer (max form)", xlabel="step")
    curves.legend(fontsize=7)
    distances.set(title="kept snapshot")
    accuracy.set(title="linear SVM (line: untrained)")
    few.set(title="SVM, few labels", xlabel="share of labels")
    noisy.set(title="SVM, noise points", xlabel="share of noise")
    for axis in (distances, accuracy):
        axis.set_xticks(range(len(config.arms)), config.arms, rotation=60, fontsize=7)
    return figure


def train(config: Config, run: Run) -> None:
    """Train every arm with every seed, then decide the claims and draw the figure."""
    data = Data(config, run)
    for unit in run.units((seed, arm) for seed in run.seeds for arm in config.arms):
        train_arm(config, run, unit, data)
    if run.preset.claims and {"foldingnet", "fc", "nogm"} <= set(config.arms):
        decide(config, run)
    run.figure(draw(config, run))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
