"""Train CMT with both sensors or one, then take a sensor away and see what is left.

The default run compares fusion with single sensors, and masked-modal with plain training, on generated scenes that need
both sensors; the presets hold the authors' four nuScenes configurations and an over-fit of one real frame.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import cli
from shared.cli import Preset


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are those of the authors' best model."""

    source: str = "nuscenes"
    """Data: nuscenes, or scenes (generated)."""
    architecture: str = "fusion-vov"
    """Sizes: fusion-vov fusion-r50 fusion-r50-official lidar camera small frame."""
    arms: tuple[str, ...] = ("masked",)
    """Variants to train: masked vanilla lidar camera no-denoising no-bev-position no-ray-position no-position."""
    epochs: int = 20
    """Passes over the (resampled) training frames; 0 evaluates --weights."""
    sampling_epochs: int = 15
    """Epochs that begin with ground-truth sampling; the rest goes without."""
    balance: bool = True
    """Resample frames so that every class is shown as often (CBGS)."""
    augment: bool = True
    """Random global transformations, and zoom, cut and flip of images."""
    frames: int = 0
    """Use this many frames of each split only; 0: all."""
    batch: int = 16
    """Samples a step, over all processes."""
    micro_batch: int = 0
    """Most samples in one forward pass on one device; 0: no limit."""
    lr: float = 1e-4
    """AdamW learning rate at the start."""
    peak: float = 8.0
    """The learning rate rises to this many times --lr over 40 % of the run, then falls to a ten-thousandth."""
    weight_decay: float = 0.01
    """Weight decay; the large image backbones have five times as much."""
    backbone_lr: float = 0.01
    """Factor on the image backbone's learning rate, for backbones that come pre-trained."""
    neck_lr: float = 0.1
    """Factor on the image neck's learning rate."""
    clip: float = 35.0
    """Largest norm of the gradient."""
    height: int = 640
    """Image height in pixels (nuScenes)."""
    width: int = 1600
    """Image width in pixels (nuScenes)."""
    zoom: tuple[float, float] = (0.94, 1.25)
    """Range of the images' random zoom."""
    train_scenes: int = 1024
    """Generated: training scenes."""
    test_scenes: int = 200
    """Generated: test scenes."""
    data_seed: int = 0
    """Seed of the generated scenes and of class-balanced resampling."""
    image_weights: str = ""
    """Checkpoint of the image backbone to start from (FCOS3D VoVNet, nuImages ResNet)."""
    weights: str = ""
    """Checkpoint of the authors' whole detector to start from."""
    loaders: int = 4
    """Threads that read frames ahead (nuScenes); 0: none."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("height", 32), ("width", 32), ("train_scenes", 1), ("test_scenes", 1)):
            _at_least(name, getattr(self, name), least)
        for name in ("epochs", "sampling_epochs", "frames", "micro_batch", "data_seed", "loaders"):
            _at_least(name, getattr(self, name), 0)
        for name in ("lr", "peak", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected a positive number")
        for name in ("weight_decay", "backbone_lr", "neck_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more")
        if self.source not in ("nuscenes", "scenes"):
            raise ValueError(f"--source is {self.source!r}, expected nuscenes or scenes")
        if self.architecture not in SIZES:
            known = ", ".join(SIZES)
            raise ValueError(f"--architecture: unknown {self.architecture!r}, expected one of {known}")
        if (self.source == "scenes") != (self.architecture == "small"):
            raise ValueError(f"--source {self.source} and --architecture {self.architecture} do not go together")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms are {self.arms}, expected one or more of {', '.join(ARMS)}, each once")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"--zoom is {self.zoom}, expected two positive numbers, the smaller one first")
        if self.epochs == 0 and not self.weights:
            raise ValueError("--epochs is 0 and there are no --weights: nothing to train and nothing to evaluate")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


SIZES = ("fusion-vov", "fusion-r50", "fusion-r50-official", "lidar", "camera", "small", "frame")
ARMS: dict[str, dict[str, Any]] = {
    "masked": {},
    "vanilla": {},
    "lidar": {"modality": "lidar"},
    "camera": {"modality": "camera"},
    "no-denoising": {"dn_groups": 0},
    "no-bev-position": {"bev_position": False},
    "no-ray-position": {"ray_position": False},
    "no-position": {"bev_position": False, "ray_position": False},
}
"""Variants and what they change in the architecture. All but vanilla and the single sensors train masked-modal."""
UNMASKED = ("vanilla", "lidar", "camera")
CONDITIONS = {"": None, "_without_cameras": 1.0, "_without_lidar": 0.6}
"""Suffix of a metric, and the draw of masked-modal training that blanks the sensor."""
SMALL: dict[str, Any] = {"source": "scenes", "architecture": "small", "batch": 8, "backbone_lr": 1.0, "neck_lr": 1.0}
GPUS = "8 GPUs of 40 GB"
NUSCENES = "nuscenes/: samples, sweeps, nuscenes_infos_{train,val}.pkl, nuscenes_dbinfos_train.pkl"
PRESETS = {
    "default": Preset(
        Config(**SMALL, arms=("masked", "vanilla", "lidar", "camera"), epochs=10, lr=4e-4, peak=2.0),
        seeds=1,
        data="generated scenes of two sensors, 4 classes",
        hours=0.08,
        why_not_comparable="generated scenes, small networks",
        note="one seed takes minutes: scenes-seeds has three",
    ),
    "scenes-seeds": Preset(
        Config(**SMALL, arms=("masked", "vanilla", "lidar", "camera"), epochs=10, lr=4e-4, peak=2.0),
        seeds=3,
        data="generated scenes of two sensors, 4 classes",
        hours=0.25,
        why_not_comparable="generated scenes, small networks",
        note="the default with three seeds",
    ),
    "scenes-long": Preset(
        Config(**SMALL, arms=("masked", "vanilla", "lidar", "camera"), epochs=30, lr=4e-4, peak=2.0),
        data="generated scenes of two sensors, 4 classes",
        hours=0.25,
        why_not_comparable="generated scenes, small networks",
        note="the default with three times its steps",
    ),
    "smoke": Preset(
        Config(**SMALL, arms=("masked", "lidar"), epochs=1, train_scenes=24, test_scenes=4),
        data="generated scenes",
        hours=0.005,
        claims=False,
        why_not_comparable="a few steps on generated scenes",
    ),
    "frame": Preset(
        Config(
            architecture="frame", arms=("vanilla", "masked"), epochs=300, frames=1, batch=1, balance=False,
            augment=False, lr=4e-4, peak=4.0, backbone_lr=1.0, neck_lr=1.0, height=224, width=400, sampling_epochs=0,
            loaders=0,
        ),
        data="one frame: an info file with its images and its sweep",
        hours=0.1,
        needs_data=True,
        claims=False,
        why_not_comparable="one frame, over-fitted and tested on itself, small networks",
    ),
    "fusion-vov": Preset(
        Config(),
        data=NUSCENES,
        hardware=GPUS,
        hours=60,
        needs_data=True,
        claims=False,
        note="the paper's best model; start from --image-weights",
    ),
    "fusion-r50": Preset(
        Config(architecture="fusion-r50", batch=32, lr=1.4e-4, peak=6.0, height=320, width=800),
        data=NUSCENES,
        hardware=GPUS,
        hours=25,
        needs_data=True,
        claims=False,
        note="range 51.2 m, where the authors' grid of 1024 cells of 0.1 m ends; start from --image-weights",
    ),
    "lidar": Preset(
        Config(architecture="lidar", arms=("lidar",), peak=6.0),
        data=NUSCENES,
        hardware=GPUS,
        hours=25,
        needs_data=True,
        claims=False,
    ),
    "camera": Preset(
        Config(architecture="camera", arms=("camera",), sampling_epochs=0),
        data=NUSCENES,
        hardware=GPUS,
        hours=50,
        needs_data=True,
        claims=False,
        note="start from --image-weights",
    ),
    "fusion-vov-ablation": Preset(
        Config(arms=("masked", "vanilla", "no-denoising", "no-bev-position", "no-ray-position", "no-position")),
        data=NUSCENES,
        hardware=GPUS,
        hours=360,
        needs_data=True,
        claims=False,
    ),
}  # fmt: skip

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import copy  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from concurrent.futures import Future, ThreadPoolExecutor  # noqa: E402
from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from backbones import branches  # noqa: E402
from data import (  # noqa: E402
    NuScenes,
    ObjectBank,
    Sample,
    Scenes,
    check_nuscenes,
    class_balanced,
    default_attributes,
    generate_scenes,
    locate,
    normalise,
    read_attributes,
)
from evaluation import Boxes, evaluate, recall, within_range, without_classes  # noqa: E402
from model import (  # noqa: E402
    ARCHITECTURES,
    CMT,
    IMAGE_MEAN,
    IMAGE_STD,
    Architecture,
    Batch,
    Detections,
    Targets,
    detect,
    load_image_backbone,
    load_official,
    losses,
    mask_sensor,
)

# ---- data ------------------------------------------------------------------------------------------------------


def splits_of(config: Config, folder: Path | None) -> tuple[str, ...]:
    """The splits that are read: one info file serves both when only a part of its frames is used."""
    same = config.frames and folder is not None and locate(folder, "train") == locate(folder, "val")
    return ("train",) if same else ("train", "val")


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if config.source == "scenes":
        sizes = f"{config.train_scenes} training and {config.test_scenes} test scenes"
        return [f"scenes: generated, {sizes}; nothing to look for"]
    return check_nuscenes(folder, splits_of(config, folder), config.sampling_epochs > 0)


class Data:
    """The two splits of a run, and how its samples are drawn."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        if config.source == "scenes":
            spec = {name: getattr(config, name) for name in ("train_scenes", "test_scenes", "data_seed")}
            run.data_used("scenes", "generated", spec=spec)
            self.scenes = {
                split: generate_scenes(count, run.generator("scenes", split, config.data_seed))
                for split, count in (("train", config.train_scenes), ("test", config.test_scenes))
            }
        else:
            for split in splits_of(config, run.data):
                run.data_used(f"nuscenes {split}", "real", path=locate(run.data, split))

    def get(self, split: str, architecture: Architecture) -> NuScenes | Scenes:
        """The training or test split ("train", "test")."""
        config = self.config
        if config.source == "scenes":
            return self.scenes[split]
        path, bank = locate(self.run.data, "train" if split == "train" else "val"), None
        if split == "train" and config.augment and config.sampling_epochs and architecture.modality != "camera":
            objects = path.parent / "nuscenes_dbinfos_train.pkl"
            if objects.is_file():
                bank = ObjectBank(objects)
            else:
                self.run.print(f"no {objects.name}: training without ground-truth sampling")
        size = (config.height, config.width)
        found = NuScenes(path, architecture.modality, architecture.pc_range, size, config.zoom, bank)
        if config.frames:
            found.frames = found.frames[: config.frames]
        return found

    def order(self, source: NuScenes | Scenes) -> Tensor:
        """Frames of one epoch, before they are shuffled."""
        if not self.config.balance or isinstance(source, Scenes):
            return torch.arange(len(source))
        labels = [frame.labels for frame in source.frames]  # boxes without a LiDAR point count here
        return class_balanced(labels, len(source.classes), self.run.generator("balance", self.config.data_seed))


def collate(samples: Sequence[Sample], architecture: Architecture) -> tuple[Batch, Targets]:
    """A batch of samples, images normalised and padded."""
    images = points = lidar2img = None
    if architecture.modality != "lidar":
        shapes = {tuple(sample.images.shape) for sample in samples}
        if len(shapes) > 1:
            raise UserError(f"images of shapes {sorted(shapes)} in one batch, expected one shape for all views")
        stacked = torch.stack([sample.images for sample in samples])
        images = normalise(stacked, IMAGE_MEAN, IMAGE_STD, architecture.image_multiple)
        lidar2img = torch.stack([sample.lidar2img for sample in samples])
    if architecture.modality != "camera":
        points = [sample.points for sample in samples]
    with user_errors():
        targets = Targets.pad([sample.boxes for sample in samples], [sample.labels for sample in samples])
    return Batch(images, points, lidar2img), targets


class Loader:
    """Training samples as a pure function of (step, position), read one step ahead by threads."""

    def __init__(self, config: Config, run: Run, source: NuScenes | Scenes, order: Tensor, seed: int, masked: bool):
        self.config, self.run, self.source, self.order, self.masked = config, run, source, order, masked
        self.seed, self.clean = seed, source
        if isinstance(source, NuScenes):
            self.clean = copy.copy(source)
            self.clean.bank = None
        self.sampler = EpochSampler(len(order), config.batch, run.derive_seed("order", seed))
        self._pool = ThreadPoolExecutor(config.loaders) if config.loaders and config.source == "nuscenes" else None
        self._ahead: dict[tuple[int, int], Future[Sample]] = {}

    @property
    def total(self) -> int:
        """Optimiser steps of the run."""
        return self.config.epochs * len(self.sampler)

    def positions(self, step: int) -> list[tuple[Tensor, float]]:
        """This process's parts of a step's batch and their weights."""
        return self.run.shard(torch.arange(len(self.sampler[step])), self.config.micro_batch or None)

    def _load(self, step: int, position: int, index: int) -> Sample:
        generator = self.run.generator("augment", self.seed, step, position)
        draw = float(torch.rand(1, generator=generator))
        mask = (lambda images, points: mask_sensor(images, points, draw)) if self.masked else None
        source = self.source if step < self.config.sampling_epochs * len(self.sampler) else self.clean
        return source.sample(index, generator, mask, self.config.augment)

    def get(self, step: int, part: Tensor) -> list[Sample]:
        """The samples of a part of a step."""
        index = self.order[self.sampler[step]].tolist()
        out = []
        for position in part.tolist():
            waiting = self._ahead.pop((step, position), None)
            out.append(self._load(step, position, index[position]) if waiting is None else waiting.result())
        return out

    def look_ahead(self, step: int) -> None:
        """Begin to read a step's samples."""
        if self._pool is None or step >= self.total:
            return
        index = self.order[self.sampler[step]].tolist()
        for part, _ in self.positions(step):
            for position in part.tolist():
                self._ahead[step, position] = self._pool.submit(self._load, step, position, index[position])

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


# ---- training --------------------------------------------------------------------------------------------------


def architecture_of(config: Config, arm: str) -> Architecture:
    """The architecture of an arm; weights of the authors come with their order of channels."""
    order = {"official_channel_order": True} if config.weights else {}
    with user_errors():
        return replace(ARCHITECTURES[config.architecture], **order, **ARMS[arm])


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a published checkpoint.

    Raises:
        UserError: missing, damaged, or more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"cannot read the checkpoint {path}: {reason}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors")
    return state


def make(config: Config, arm: str) -> CMT:
    """The detector of an arm, with the weights that the configuration names."""
    architecture = architecture_of(config, arm)
    net = CMT(architecture, *branches(architecture))
    with user_errors():
        if config.image_weights and net.image is not None:
            load_image_backbone(net, read_checkpoint(Path(config.image_weights)))
        if config.weights:
            load_official(net, read_checkpoint(Path(config.weights)))
    return net


def make_optimizer(net: CMT, config: Config) -> torch.optim.Optimizer:
    """AdamW; the image backbone and neck learn more slowly, large backbones decay five times as fast."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in net.named_parameters():
        part = ".".join(name.split(".")[:2])
        scale = {"image.backbone": config.backbone_lr, "image.neck": config.neck_lr}.get(part, 1.0)
        decay = 5.0 if name.startswith("image.backbone") and net.architecture.image_backbone != "small" else 1.0
        groups.setdefault((scale, decay), []).append(parameter)
    rows = [
        {"params": parameters, "scale": scale, "weight_decay": config.weight_decay * decay}
        for (scale, decay), parameters in groups.items()
    ]
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(rows, lr=config.lr, fused=fused)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (math.cos(math.pi * share) + 1) / 2


def set_cycle(optimizer: torch.optim.Optimizer, config: Config, progress: float) -> None:
    """One cycle of learning rate and first momentum: up to the peak over 40 % of the run, then down."""
    rising, share = progress < 0.4, progress / 0.4 if progress < 0.4 else (progress - 0.4) / 0.6
    rate = _cosine(1, config.peak, share) if rising else _cosine(config.peak, 1e-4, share)
    low = 0.9 * 0.8947368421052632
    beta = _cosine(0.9, low, share) if rising else _cosine(low, 0.9, share)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["scale"] * rate
        group["betas"] = (beta, 0.999)


def train_arm(config: Config, run: Run, unit: Unit, data: Data) -> None:
    """Train and evaluate one arm with one seed."""
    seed, arm = unit.key
    torch.manual_seed(run.derive_seed("initial weights", seed))
    net = make(config, arm).to(run.device)
    torch.manual_seed(run.derive_seed("noise", seed, run.rank))
    architecture = net.architecture
    model, optimizer = run.setup(net, make_optimizer(net, config))
    unit.attach(model=model, optimizer=optimizer)
    unit.state.setdefault("curve", [])
    unit.state.setdefault("seconds", 0.0)
    source = data.get("train", architecture)
    loader = Loader(config, run, source, data.order(source), seed, masked=arm not in UNMASKED)
    model.train()
    for step in unit.steps(loader.total):
        begin = time.perf_counter()
        set_cycle(optimizer, config, step / loader.total)
        optimizer.zero_grad()
        mean = torch.zeros((), device=run.device)
        parts = loader.positions(step)
        samples = [loader.get(step, part) for part, _ in parts]
        loader.look_ahead(step + 1)
        for rows, (_, weight) in zip(samples, parts, strict=True):
            batch, targets = collate(rows, architecture)
            targets = targets.to(run.device)
            with user_errors():  # calibration that cannot be inverted, a cloud without a point in range
                predictions = model(batch.to(run.device), targets)
            loss = sum(losses(predictions, targets).values()) * weight
            run.backward(loss)
            mean += loss.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimizer.step()
        unit.log(loss=mean)
        unit.state["curve"].append(float(mean))
        unit.state["seconds"] += time.perf_counter() - begin
    loader.close()
    metrics, keep = measure(config, run, data, net, seed, arm)
    keep["curve"] = torch.tensor(unit.state["curve"])
    seconds = unit.state["seconds"] / max(loader.total, 1)
    unit.finish(metrics, {f"{config.source}/{config.architecture}/{arm}/step_seconds": seconds}, keep)


# ---- evaluation ------------------------------------------------------------------------------------------------


@torch.no_grad()
def detections(config: Config, run: Run, net: CMT, source: NuScenes | Scenes, draw: float | None) -> list[Detections]:
    """Detections in all frames of a split, on the CPU; under torchrun every process takes its share.

    Args:
        draw: blanks a sensor as masked-modal training does; ``None`` leaves both.
    """
    net.eval()
    mask = None if draw is None else lambda images, points: mask_sensor(images, points, draw)
    size = 16 if isinstance(source, Scenes) else 1
    out: dict[int, Detections] = {}
    for part in torch.arange(len(source))[run.rank :: run.world_size].split(size):
        batch, _ = collate([source.sample(int(i), None, mask) for i in part], net.architecture)
        with user_errors():
            found = detect(net(batch.to(run.device)))
        out |= {int(i): Detections(*(x.cpu() for x in rows)) for i, rows in zip(part, found, strict=True)}
    if run.world_size > 1:
        gathered: list[Any] = [None] * run.world_size
        torch.distributed.all_gather_object(gathered, out)
        out = {index: rows for share in gathered for index, rows in share.items()}
    return [out[index] for index in range(len(source))]


def as_boxes(
    source: NuScenes | Scenes, found: Sequence[Detections], attributes: list[np.ndarray] | None
) -> tuple[list[Boxes], list[Boxes]]:
    """Truth and detections for ``evaluate``; on nuScenes within the classes' ranges, with attributes if known."""
    truth, guesses = [], []
    for index, rows in enumerate(found):
        boxes, labels = (x.numpy() for x in source.truth(index))
        real = Boxes(boxes, labels)
        guess = Boxes(rows.boxes.numpy(), rows.labels.numpy(), rows.scores.numpy())
        if isinstance(source, NuScenes):
            frame = source.frames[index]
            known = np.full(len(frame.boxes), -1) if attributes is None else attributes[index]
            real = replace(real, attributes=known[(frame.labels >= 0) & frame.visible])
            guess = replace(guess, attributes=default_attributes(guess.labels, guess.boxes[:, 7:9]))
            real, guess = (within_range(side, source.classes, frame.vehicle) for side in (real, guess))
        truth.append(real)
        guesses.append(guess)
    return truth, guesses


def measure(
    config: Config, run: Run, data: Data, net: CMT, seed: int, arm: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scores with all sensors and, for fusion, without either; the first frame's detections for the figure."""
    source = data.get("test", net.architecture)
    attributes = None
    if isinstance(source, NuScenes):
        attributes = read_attributes(locate(run.data, "val").parent, source.frames)
    metrics: dict[str, float] = {}
    keep: dict[str, Tensor] = {}
    for suffix, draw in CONDITIONS.items():
        if draw is not None and net.architecture.modality != "fusion":
            continue
        found = detections(config, run, net, source, draw)
        truth, guesses = as_boxes(source, found, attributes)
        scores = evaluate(truth, guesses, source.classes)
        chosen = {"mAP": scores["mAP"]}
        if config.source == "scenes":
            chosen["AP_class_agnostic"] = evaluate(*map(without_classes, (truth, guesses)), ("any",))["mAP"]
        else:
            chosen |= {name: scores[name] for name in ("NDS", "mATE", "mASE", "mAOE", "mAVE", "mAAE")}
            chosen["recall_2m"] = recall(truth, guesses)
        metrics |= {f"{config.source}/{config.architecture}/{arm}/{name}{suffix}": v for name, v in chosen.items()}
        keep |= {f"{name}{suffix}": getattr(found[0], name)[:100] for name in ("boxes", "scores", "labels")}
    return metrics, keep


# ---- claims and figure -----------------------------------------------------------------------------------------


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, on the means over seeds."""
    m, limit = run.metrics, run.threshold

    def mean(arm: str, metric: str = "mAP") -> float:
        return m[f"{config.source}/{config.architecture}/{arm}/{metric}"].mean

    fused, lidar, camera = mean("masked"), mean("lidar"), mean("camera")
    name = "fusion_beats_single_sensors"
    holds = fused - max(lidar, camera) >= limit(name)
    run.claim(name, holds, fusion=fused, lidar_only=lidar, camera_only=camera)

    name = "masked_training_survives_without_lidar"
    masked, vanilla = (mean(arm, "mAP_without_lidar") for arm in ("masked", "vanilla"))
    run.claim(name, masked - vanilla >= limit(name), masked=masked, vanilla=vanilla)

    name = "masked_training_survives_without_cameras"
    masked, vanilla = (mean(arm, "AP_class_agnostic_without_cameras") for arm in ("masked", "vanilla"))
    run.claim(name, masked - vanilla >= limit(name), masked=masked, vanilla=vanilla)

    name = "masked_training_costs_little"
    run.claim(name, mean("vanilla") - fused <= limit(name), masked=fused, vanilla=mean("vanilla"))

    name = "one_model_nears_the_single_sensor_models"
    gap_lidar = mean("lidar", "AP_class_agnostic") - mean("masked", "AP_class_agnostic_without_cameras")
    gap_camera = camera - mean("masked", "mAP_without_lidar")
    holds = max(gap_lidar, gap_camera) <= limit(name)
    run.claim(name, holds, gap_to_lidar_only=gap_lidar, gap_to_camera_only=gap_camera)


def _outline(axis: Any, boxes: Tensor, colour: str, **kwargs: Any) -> None:
    """Boxes from above, with a line to the front."""
    for x, y, _, length, width, _, yaw in boxes[:, :7].tolist():
        turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
        corner = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1], [1, 1], [1, 0], [0, 0]]) * (length / 2, width / 2)
        axis.plot(*(corner @ turn.T + (x, y)).T, color=colour, **kwargs)


def draw(config: Config, run: Run, data: Data) -> Any:
    """The figure: a test frame's cameras, its LiDAR and detections with each sensor, scores, and training curves."""
    arm, seed = config.arms[0], run.seeds[0]
    kept = run.kept((seed, arm))
    architecture = architecture_of(config, arm)
    sample = data.get("test", replace(architecture, modality="fusion")).sample(0)
    shown = [suffix for suffix in CONDITIONS if f"boxes{suffix}" in kept]
    figure, axes = report.figure(2, 3, width=3.4, height=3.0)
    (axis, *views), (bars, curves, last) = axes
    strip = torch.cat(list(sample.images[:3].flip(1) / 255), -1).permute(1, 2, 0)
    axis.imshow(strip.clamp(0, 1).numpy())
    axis.set(title="three cameras")
    axis.set_axis_off()
    for panel, suffix in zip((*views, last), (*shown, *[None] * 3)):
        if suffix is None:
            panel.set_axis_off()
            continue
        points = sample.points[torch.arange(0, len(sample.points), max(1, len(sample.points) // 3000))]
        panel.scatter(*points[:, :2].T.numpy(), s=0.5, color="0.75", linewidths=0)
        _outline(panel, sample.boxes, report.COLOURS[2], lw=1.6)
        sure = kept[f"boxes{suffix}"][kept[f"scores{suffix}"] > 0.3]
        _outline(panel, sure, report.COLOURS[1], lw=0.9)
        low, high = architecture.pc_range[0], architecture.pc_range[3]
        title = suffix.replace("_", " ").strip() or "all sensors"
        panel.set(title=f"{arm}: {title}", aspect="equal", xlim=(low, high), ylim=(low, high))
    metrics = run.metrics
    for i, name in enumerate(config.arms):
        for j, suffix in enumerate(CONDITIONS):
            value = metrics.get(f"{config.source}/{config.architecture}/{name}/mAP{suffix}")
            if value is not None:
                bars.bar(i + 0.27 * (j - 1), value.mean, 0.25, yerr=value.std, color=report.COLOURS[j])
        curve = run.kept((seed, name))["curve"]
        block = max(1, len(curve) // 50)
        smooth = curve[: len(curve) // block * block].view(-1, block).mean(1)
        curves.plot(np.arange(len(smooth)) * block, smooth.numpy(), color=report.COLOURS[i], label=name)
    labels = ["all sensors", "without cameras", "without LiDAR"]
    handles = [bars.bar(0, 0, color=report.COLOURS[j]) for j in range(3)]
    bars.legend(handles, labels, fontsize=7)
    bars.set(title="mAP")
    bars.set_xticks(range(len(config.arms)), config.arms, rotation=20)
    curves.set(title="training loss", xlabel="step", yscale="log")
    curves.legend(fontsize=7)
    return figure


def train(config: Config, run: Run) -> None:
    """Train every arm with every seed, then decide the claims and draw the figure."""
    if run.precision == "16-mixed":
        raise UserError("--precision 16-mixed: gradients are clipped, which loss scaling forbids; take bf16-mixed")
    if ARCHITECTURES[config.architecture].lidar_backbone == "pillars":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads cost more than they bring
    data = Data(config, run)
    for unit in run.units((seed, arm) for seed in run.seeds for arm in config.arms):
        train_arm(config, run, unit, data)
    if run.preset.claims and {"masked", "vanilla", "lidar", "camera"} <= set(config.arms):
        decide(config, run)
    run.figure(draw(config, run, data))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
