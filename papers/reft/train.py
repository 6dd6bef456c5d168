"""Train a Mask2Former on base classes, with references to supports or without, and fine-tune it on a few shots.

The default fine-tunes shipped base nets on generated scenes and compares RefT with full fine-tuning and with either
reference alone; presets hold FSIS, gFSIS and iFSIS on COCO, and runs on real COCO images that two CPU cores can do.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared import cli, options
from shared.cli import Preset


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are for COCO: Mask2Former's where the paper is silent."""

    source: str = "coco"
    """Data: coco, panoptic (the small archive), or shapes (generated)."""
    task: str = "segment"
    """segment, or centres: classify objects of the archive by the nearest class centre of a frozen backbone."""
    backbone: str = "r50"
    """small r50 r101 swin-t swin-s swin-b efficientnet-lite0."""
    backbone_weights: str = ""
    """Checkpoint of torchvision to start the ResNet or Swin from (ImageNet)."""
    arms: tuple[str, ...] = ("reft",)
    """Variants: full (Mask2Former, full fine-tuning) feature query reft, and reft-no-distillation for ifsis."""
    protocols: tuple[str, ...] = ("gfsis",)
    """fsis (novel shots, novel AP), gfsis (all shots, both), ifsis (novel shots, both)."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Annotated objects a class; none: base training only."""
    shot_lists: str = "tfa"
    """coco: tfa (files of the seeds 0-9) or sampled."""
    classifier: str = "linear"
    """linear or cosine."""
    width: int = 256
    """Width of pixel decoder and transformer decoder."""
    queries: int = 100
    """Object queries."""
    layers: int = 9
    """Layers of the transformer decoder."""
    class_code: bool = True
    """Query-level reference: values carry their class's direction in the classifier."""
    selection: str = "matched"
    """Object queries of a support image: matched (to its mask) or class (the most probable of its class)."""
    support_queries: int = 1
    """Object queries that a support image contributes."""
    mean_over_shots: bool = True
    """Average support queries over the shots of a class."""
    mask_feature_reference: bool = False
    """Feature-level reference on the mask features too."""
    base_weights: str = ""
    """Folder with <arm>.safetensors of base nets ("weights": those that come along); empty: train them."""
    permute: float = 0.0
    """Share of base-training steps in which the query-level reference's names of classes are permuted."""
    backbone_steps: int = 0
    """shapes: steps in which the backbone first learns to classify scenes of one object of a base class."""
    export: str = ""
    """Folder to write the base nets to, in half precision."""
    base_steps: int = 368750
    """Steps of base training."""
    drops: tuple[float, ...] = (0.8889, 0.9628)
    """Shares of base training after which the learning rate falls to a tenth; none: a cosine to 0."""
    batch: int = 16
    """Images a step, over all processes."""
    lr: float = 1e-4
    """AdamW learning rate of base training."""
    backbone_lr: float = 0.1
    """Factor on the backbone's learning rate."""
    weight_decay: float = 0.05
    """Weight decay, 0 for norms and embeddings."""
    clip: float = 0.01
    """Largest norm of the gradient."""
    tune_steps: int = 500
    """Steps of fine-tuning for each shot."""
    tune_batch: int = 8
    """Images a step of fine-tuning."""
    tune_lr: float = 1e-5
    """Learning rate of fine-tuning."""
    tune_new_lr: float = 1e-4
    """The same for the classifier and class embeddings."""
    freeze_backbone: bool = True
    """Fine-tune without the backbone."""
    support_classes: int = 10
    """Support classes of a step beside those in its images, drawn at random."""
    support_loss: float = 0.0
    """Weight of the loss on the support images."""
    distil_features: float = 1.0
    """ifsis: weight of the distillation of input projections."""
    distil_classes: float = 1.0
    """ifsis: weight of the distillation of class probabilities."""
    points: int = 12544
    """Points at which masks are compared; 0: all pixels of the predicted masks."""
    size: int = 1024
    """Side of the square images in pixels, a multiple of 32."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """Range of large-scale jitter in base training (real images)."""
    tune_jitter: tuple[float, float] = (0.5, 2.0)
    """The same in fine-tuning."""
    top: int = 100
    """Detections an image."""
    train_scenes: int = 3000
    """Generated: scenes for base training."""
    test_scenes: int = 200
    """Generated: test scenes."""
    novel_chance: float = 0.1
    """Generated: how often a novel class occurs in a base-training scene, unlabelled, relative to a base class."""
    data_seed: int = 0
    """Seed of generated scenes."""

    def __post_init__(self) -> None:
        options.one_of("source", self.source, ("coco", "panoptic", "shapes"))
        options.one_of("task", self.task, ("segment", "centres"))
        options.one_of("backbone", self.backbone, BACKBONES)
        options.one_of("classifier", self.classifier, ("linear", "cosine"))
        options.one_of("selection", self.selection, ("matched", "class"))
        options.one_of("shot_lists", self.shot_lists, ("tfa", "sampled"))
        options.among("arms", self.arms, CENTRE_ARMS if self.task == "centres" else ARMS)
        options.among("protocols", self.protocols, ("fsis", "gfsis", "ifsis"))
        for name in ("batch", "tune_batch", "queries", "layers", "top", "train_scenes", "test_scenes"):
            options.at_least(name, getattr(self, name), 1)
        options.at_least("support_queries", self.support_queries, 1)
        if self.backbone_steps and (self.source, self.backbone) != ("shapes", "small"):
            raise ValueError("--backbone-steps is for --source shapes with --backbone small")
        for name in ("base_steps", "backbone_steps", "tune_steps", "support_classes", "points", "data_seed"):
            options.at_least(name, getattr(self, name), 0)
        for name in (
            "weight_decay",
            "backbone_lr",
            "support_loss",
            "distil_features",
            "distil_classes",
            "novel_chance",
        ):
            options.at_least(name, getattr(self, name), 0.0)
        for name in ("lr", "clip", "tune_lr", "tune_new_lr"):
            options.above(name, getattr(self, name), 0.0)
        for k in self.shots:
            options.at_least("shots", k, 1)
        options.between("permute", self.permute, 0.0, 1.0)
        for share in self.drops:
            options.between("drops", share, 0.0, 1.0)
        for name in ("jitter", "tune_jitter"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{options.flag(name)} is {low} {high}, expected two positive numbers, the smaller first"
                )
        if self.size % 32 or self.size < 32:
            raise ValueError(f"--size is {self.size}, expected a multiple of 32")
        if self.width % 32:
            raise ValueError(f"--width is {self.width}, expected a multiple of 32")
        if (self.source == "shapes") != (self.backbone == "small"):
            raise ValueError(f"--source {self.source} and --backbone {self.backbone} do not go together")
        if self.task == "centres" and (self.source != "panoptic" or self.backbone != "efficientnet-lite0"):
            raise ValueError("--task centres needs --source panoptic and --backbone efficientnet-lite0")
        if "reft-no-distillation" in self.arms and set(self.protocols) == {"gfsis"}:
            raise ValueError("--arms reft-no-distillation: only --protocols ifsis distils")


BACKBONES = ("small", "r50", "r101", "swin-t", "swin-s", "swin-b", "efficientnet-lite0")
REFERENCES = {"full": (False, False), "feature": (True, False), "query": (False, True), "reft": (True, True)}
"""Base nets: feature-level and query-level reference."""
ARMS = (*REFERENCES, "reft-no-distillation")
CENTRE_ARMS = ("mask", "box", "image")
SHAPES: dict[str, Any] = {
    "source": "shapes", "backbone": "small", "classifier": "cosine", "width": 64, "queries": 16, "layers": 3,
    "points": 0, "size": 64, "top": 30, "lr": 1.5e-3, "backbone_lr": 0.3, "clip": 1.0, "drops": (),
    "base_steps": 0, "shots": (5,),
    "arms": (*REFERENCES, "reft-no-distillation"), "protocols": ("gfsis", "ifsis"), "base_weights": "weights",
    "permute": 0.5, "tune_steps": 10, "tune_lr": 3e-4, "tune_new_lr": 1e-3, "support_classes": 12,
}  # fmt: skip
PANOPTIC: dict[str, Any] = {
    "source": "panoptic", "backbone": "efficientnet-lite0", "classifier": "cosine", "width": 96, "queries": 30,
    "layers": 3, "points": 2048, "size": 192, "top": 50, "lr": 5e-4, "backbone_lr": 0.1, "clip": 1.0, "drops": (),
    "base_steps": 200, "batch": 4, "tune_batch": 4, "arms": ("full", "reft"), "shots": (1,), "shot_lists": "sampled",
    "tune_steps": 50, "tune_lr": 1e-4, "tune_new_lr": 5e-4, "support_classes": 3, "jitter": (0.6, 1.6),
    "tune_jitter": (0.6, 1.6),
}  # fmt: skip
COCO = "COCO 2014 with the TFA split, or 2017: see README, Data"
GPUS = "8 GPUs of 32 GB"
OURS = "schedule: Mask2Former's for COCO; fine-tuning and the references' details are ours"


def _coco(hours: float, note: str = OURS, **change: Any) -> Preset:
    return Preset(
        Config(**change), seeds=10, data=COCO, hardware=GPUS, hours=hours, needs_data=True, claims=False, note=note
    )


PRESETS = {
    "default": Preset(
        Config(**{**SHAPES, "train_scenes": 200, "test_scenes": 150}),
        seeds=3,
        data="generated scenes, 8 base and 4 novel classes",
        hours=0.06,
        why_not_comparable="generated scenes, small networks",
        note="fine-tunes the base nets in weights/; a seed is a shot list",
    ),
    "smoke": Preset(
        Config(**{
            **SHAPES, "arms": ("full", "reft"), "protocols": ("gfsis",), "shots": (1,), "base_weights": "",
            "backbone_steps": 2, "base_steps": 3, "batch": 4, "tune_steps": 2, "tune_batch": 4, "train_scenes": 40,
            "test_scenes": 8,
        }),
        data="generated scenes",
        hours=0.005,
        claims=False,
        why_not_comparable="a few steps on generated scenes",
    ),
    "shapes-base": Preset(
        Config(**{**SHAPES, "arms": tuple(REFERENCES), "base_weights": "", "backbone_steps": 1400, "base_steps": 1000,
                  "shots": ()}),
        data="generated scenes",
        hours=0.35,
        claims=False,
        why_not_comparable="generated scenes, small networks",
        note="makes weights/: --export weights",
    ),
    "shapes-full": Preset(
        Config(**{**SHAPES, "shots": (1, 5, 10)}),
        seeds=3,
        data="generated scenes, 8 base and 4 novel classes",
        hours=0.4,
        claims=False,
        why_not_comparable="generated scenes, small networks",
        note="the default with 1 and 10 shots too",
    ),
    "shapes-linear": Preset(
        Config(**{**SHAPES, "classifier": "linear", "base_weights": "", "backbone_steps": 1400, "base_steps": 1000,
                  "arms": ("full", "reft"), "protocols": ("gfsis",)}),
        seeds=3,
        data="generated scenes, 8 base and 4 novel classes",
        hours=0.3,
        claims=False,
        why_not_comparable="generated scenes, small networks",
        note="ablation: linear in place of the cosine classifier, base nets trained here",
    ),
    "coco-panoptic-mini": Preset(
        Config(**PANOPTIC),
        data="100 + 100 real COCO images at half size (coco-panoptic-mini.tar)",
        hours=0.4,
        needs_data=True,
        claims=False,
        why_not_comparable="100 training images at half size, small decoder",
    ),
    "coco-panoptic-mini-centres": Preset(
        Config(source="panoptic", task="centres", backbone="efficientnet-lite0", arms=CENTRE_ARMS, shots=(1, 5)),
        seeds=10,
        data="100 + 100 real COCO images at half size (coco-panoptic-mini.tar)",
        hours=0.03,
        needs_data=True,
        claims=False,
        why_not_comparable="nearest class centre with a frozen backbone, no detector",
    ),
    "gfsis-r50": _coco(160, arms=("full", "feature", "query", "reft"), note=OURS + "; with the ablations"),
    "gfsis-r101": _coco(60, backbone="r101"),
    "gfsis-swin-t": _coco(60, backbone="swin-t"),
    "gfsis-swin-s": _coco(75, backbone="swin-s"),
    "gfsis-swin-b": _coco(95, backbone="swin-b"),
    "fsis-r50": _coco(95, arms=("full", "reft"), protocols=("fsis",), shots=(5, 10, 30)),
    "ifsis-r50": _coco(60, arms=("reft", "reft-no-distillation"), protocols=("ifsis",), classifier="cosine"),
}  # fmt: skip

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import copy  # noqa: E402
import math  # noqa: E402
from collections.abc import Sequence  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.checkpoint import save_tensors  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

import backbones  # noqa: E402
import data as sets  # noqa: E402
from data import Dataset, Instance, Scene  # noqa: E402
from evaluation import Found, average_precision  # noqa: E402
from model import (  # noqa: E402
    SMALL,
    Architecture,
    Output,
    Reference,
    RefT,
    Targets,
    detect,
    distillation,
    losses,
    mask_pool,
    mean_by_class,
    nearest_centre,
)

# ---- data ------------------------------------------------------------------------------------------------------------


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if config.source == "shapes":
        return [
            f"shapes: generated, {config.train_scenes} base and {config.test_scenes} test scenes; nothing to look for"
        ]
    with user_errors():
        return (sets.check_coco if config.source == "coco" else sets.check_panoptic)(folder, sets.NOVEL)


class Data:
    """The splits of a run. Labels of the nets are base classes first, then novel ones."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        if config.source == "shapes":
            spec = {
                name: getattr(config, name)
                for name in ("train_scenes", "test_scenes", "novel_chance", "data_seed", "size")
            }
            run.data_used("shapes", "generated", spec=spec)
            names, novel = sets.SHAPE_CLASSES, sets.NOVEL_SHAPES
            self.base, self.novel = sets.split_classes(names, novel)
            rare = dict.fromkeys(self.novel, config.novel_chance)
            self.train = sets.generate(config.train_scenes, self._random("train"), config.size, chances=rare)
            self.test = sets.generate(config.test_scenes, self._random("test"), config.size)
            alone = [label for label in range(len(names)) for _ in range(max(20, 2 * max(config.shots, default=1)))]
            self.pool = sets.generate(len(alone), self._random("shots"), config.size, labels=alone)
        else:
            if config.source == "coco":
                paths = [sets.coco_file(run.data, split) for split in ("train", "test")]
                self.train, self.test = (sets.read_coco(path, run.data) for path in paths)
            else:
                paths = [sets.panoptic_file(run.data)]
                self.train, self.test = (sets.read_panoptic(paths[0], split) for split in sets.ARCHIVE_COUNTS)
            for path in paths:
                run.data_used(path.name, "real", path=path)
            with user_errors():
                self.base, self.novel = sets.split_classes(self.train.classes, sets.NOVEL)
            self.pool = self.train
        self.classes = self.train.classes
        self.position = torch.empty(len(self.classes), dtype=torch.int64)
        self.position[torch.tensor([*self.base, *self.novel])] = torch.arange(len(self.classes))
        self.base_set = self.train.only(self.base, drop_empty=config.source != "shapes")  # novel labels never get in

    def _random(self, part: str) -> torch.Generator:
        return self.run.generator("shapes", part, self.config.data_seed)

    def shots(self, labels: Sequence[int], k: int, seed: int) -> list[Instance]:
        """The K objects of each class of a seed's shot list."""
        config = self.config
        if config.source == "coco" and config.shot_lists == "tfa":
            assert self.run.data is not None
            return sets.read_shots(self.run.data, self.pool, labels, k, seed)
        if config.source == "panoptic":  # too few images for every class: those that have enough
            count = torch.bincount(torch.tensor([row.label for row in self.pool.instances if row.area >= 64]),
                                   minlength=len(self.classes))  # fmt: skip
            labels = [label for label in labels if count[label] >= k]
        with user_errors():
            least = 0 if config.source == "shapes" else 64 if config.source == "panoptic" else 32**2
            return sets.sample_shots(self.pool, labels, k, self.run.generator("shots", seed), least)

    def prepare(self, scene: Scene, generator: torch.Generator | None, span: tuple[float, float]) -> Scene:
        """A scene at the run's size; with a generator it is varied: generated ones turned, real ones jittered."""
        if self.config.source != "shapes":
            if generator is None:
                return sets.fit(scene, self.config.size)
            return sets.jitter(scene, self.config.size, *span, generator)
        if generator is None:
            return scene
        turn = int(torch.randint(8, (1,), generator=generator))
        image, masks = (torch.rot90(x, turn % 4, (-2, -1)) for x in (scene.image, scene.masks))
        return Scene(image.flip(-1), masks.flip(-1), scene.labels) if turn > 3 else Scene(image, masks, scene.labels)

    def batch(
        self, source: Dataset, index: Tensor, generator: torch.Generator | None, span: tuple[float, float] = (1.0, 1.0)
    ) -> tuple[Tensor, Targets]:
        """Images and targets with the nets' labels."""
        scenes = [self.prepare(source.scene(int(i)), generator, span) for i in index]
        targets = Targets.pad([s.masks for s in scenes], [self.position[s.labels] for s in scenes])
        return torch.stack([s.image for s in scenes]), targets

    def supports(self, source: Dataset, rows: Sequence[Instance]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (S, 3, H, W), masks (S, H, W) and the nets' labels (S,) of support objects."""
        scenes = []
        for row in rows:
            mask = source.mask(row)
            scene = self.prepare(Scene(source.read(row.image), mask[None], torch.tensor([row.label])), None, (1, 1))
            if not scene.masks.any():
                raise UserError(f"support object {row.annotation} vanishes at --size {self.config.size}")
            scenes.append(scene)
        masks = torch.cat([s.masks for s in scenes]).float()
        return torch.stack([s.image for s in scenes]), masks, self.position[torch.cat([s.labels for s in scenes])]


class Supports:
    """Draws the support objects of a step: one a class, of the classes in the images and of some others."""

    def __init__(self, data: Data, source: Dataset, extra: int) -> None:
        self.data, self.source, self.extra = data, source, extra
        self.rows: dict[int, list[Instance]] = {}
        least = 0 if data.config.source == "shapes" else 64
        for row in source.instances:
            if row.area >= least:
                self.rows.setdefault(row.label, []).append(row)

    def draw(self, index: Tensor, generator: torch.Generator) -> list[Instance]:
        """Objects for the images ``index`` of the source, never one of these images where the class has another."""
        used = set(index.tolist())
        here = {row.label for i in used for row in self.source.by_image[i] if row.label in self.rows}
        others = sorted(set(self.rows) - here)
        order = torch.randperm(len(others), generator=generator).tolist()
        chosen = [*sorted(here), *(others[i] for i in order[: self.extra])]
        out = []
        for label in chosen:
            pool = [row for row in self.rows[label] if row.image not in used] or self.rows[label]
            out.append(pool[int(torch.randint(len(pool), (1,), generator=generator))])
        return out


# ---- nets ------------------------------------------------------------------------------------------------------------


def architecture_of(config: Config, arm: str) -> Architecture:
    """The architecture of a base net."""
    feature, query = REFERENCES[arm.removesuffix("-no-distillation")]
    a = SMALL if config.source == "shapes" else Architecture()
    if config.source == "panoptic":
        a = replace(a, pixel_layers=2, pixel_ffn=4 * config.width, ffn=4 * config.width, zero_init=False)
    return replace(
        a,
        feature_reference=feature,
        query_reference=query,
        class_embedding=config.source == "coco" and "ifsis" not in config.protocols,
        width=config.width,
        queries=config.queries,
        layers=config.layers,
        classifier=config.classifier,
        class_code=config.class_code,
        selection=config.selection,
        support_queries=config.support_queries,
        mean_over_shots=config.mean_over_shots,
        mask_feature_reference=config.mask_feature_reference and feature,
    )


def make(config: Config, arm: str, classes: int) -> RefT:
    """A net of an arm for a number of classes."""
    with user_errors():
        body = backbones.build(config.backbone, config.backbone_weights)
        return RefT(architecture_of(config, arm), body, backbones.CHANNELS[config.backbone], classes)


def make_optimizer(net: RefT, config: Config, tuning: bool) -> torch.optim.Optimizer:
    """AdamW without decay on norms, biases and embeddings; the backbone, or what is new, at its own rate."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if tuning:
            rate = config.tune_new_lr if name.startswith(("classifier", "class_embedding")) else config.tune_lr
        else:
            rate = config.lr * (config.backbone_lr if name.startswith("backbone") else 1.0)
        plain = parameter.dim() < 2 or name.startswith(("query_", "level")) or "embedding" in name
        groups.setdefault((rate, 0.0 if plain else config.weight_decay), []).append(parameter)
    rows = [{"params": p, "lr": rate, "top": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
    return torch.optim.AdamW(rows, fused=next(net.parameters()).device.type in ("cpu", "cuda"))


def set_rate(optimizer: torch.optim.Optimizer, progress: float, drops: tuple[float, ...]) -> None:
    """Rates at a share of the steps: steps down, or a cosine after a short rise."""
    factor = 0.1 ** sum(progress >= share for share in drops)
    if not drops:
        factor = min(1.0, progress / 0.05 + 0.05) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["top"] * factor


class Episode(nn.Module):
    """Query images and supports in one call, so that a wrapper sees one forward pass."""

    def __init__(self, net: RefT) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        images: Tensor,
        supports: tuple[Tensor, Tensor, Tensor] | None,
        cached: Reference | None,
        order: Tensor | None = None,
    ) -> tuple[Output, Output | None]:
        """Predictions on the images and on the supports."""
        if supports is None or not self.net.refers:
            return self.net(images, cached), None
        fresh, out = self.net.reference(*supports)
        return self.net(images, fresh if cached is None else merge(fresh, cached), order), out


def merge(fresh: Reference, cached: Reference) -> Reference:
    """The cached reference where a class is not in the fresh one; it may lack the last classes."""
    more = len(fresh.present) - len(cached.present)

    def rows(new: Tensor, old: Tensor) -> Tensor:
        old = F.pad(old, (0, 0) * (old.dim() - 1) + (0, more))
        return torch.where(fresh.present.view(-1, *[1] * (new.dim() - 1)), new, old)

    centres = tuple(rows(new, old) for new, old in zip(fresh.centres, cached.centres))
    present = fresh.present | F.pad(cached.present, (0, more))
    return Reference(centres, rows(fresh.queries, cached.queries), present)


def to_device(values: Any, device: torch.device) -> Any:
    """Tensors of a tuple on a device."""
    return tuple(x.to(device) for x in values)


@torch.no_grad()
def cache(net: RefT, data: Data, source: Dataset, rows: Sequence[Instance], part: int = 8) -> Reference:
    """The reference of a support set, for any number of query images; shots are encoded in parts of whole classes.

    The net must be in eval mode.
    """
    device = next(net.parameters()).device
    by_class: dict[int, list[Instance]] = {}
    for row in rows:
        by_class.setdefault(row.label, []).append(row)
    labels, found = list(by_class), None
    step = max(1, part // max(len(v) for v in by_class.values()))
    if net.feature_reference:
        step = len(labels)  # support features refer to the centres of all classes
    for start in range(0, len(labels), step):
        some = [row for label in labels[start : start + step] for row in by_class[label]]
        new, _ = net.reference(*to_device(data.supports(source, some), device))
        found = new if found is None else merge(new, found)
    assert found is not None
    return found


# ---- base training ---------------------------------------------------------------------------------------------------


class MapClassifier(nn.Module):
    """Class logits from the largest value of every channel of each map of a backbone."""

    def __init__(self, body: nn.Module, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.body, self.heads = body, nn.ModuleList(nn.Linear(c, classes) for c in channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C) for each map."""
        return [head(x.amax((2, 3))) for head, x in zip(self.heads, self.body(images))]


def train_backbone(config: Config, run: Run, unit: Unit, data: Data) -> None:
    """Classify scenes of one object of a base class from each map; the other backbones come with ImageNet weights."""
    labels = [label for label in data.base for _ in range(300)]
    pool = sets.generate(len(labels), run.generator("shapes", "backbone", config.data_seed), config.size, labels=labels)
    images, kinds = torch.stack([pool.read(i) for i in range(len(pool))]), data.position[torch.tensor(labels)]
    torch.manual_seed(run.derive_seed("backbone"))
    body = backbones.build(config.backbone)
    net = MapClassifier(body, backbones.CHANNELS[config.backbone], len(data.base))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["top"] = group["lr"]
    model, optimizer = run.setup(net, optimizer)
    unit.attach(model=model, optimizer=optimizer)
    sampler = EpochSampler(len(pool), 2 * config.batch, run.derive_seed("order", "backbone"))
    for step in unit.steps(config.backbone_steps):
        set_rate(optimizer, step / config.backbone_steps, ())
        optimizer.zero_grad(set_to_none=True)
        turn = int(torch.randint(4, (1,), generator=run.generator("augment", "backbone", step)))
        for part, weight in run.shard(sampler[step]):
            wanted = kinds[part].to(run.device)
            every = model(torch.rot90(images[part], turn, (-2, -1)).to(run.device))
            loss = torch.stack([F.cross_entropy(logits, wanted) for logits in every]).sum()
            run.backward(loss * weight)
        optimizer.step()
        unit.log(loss=loss)
    unit.finish({}, keep={name: value.detach().cpu() for name, value in body.state_dict().items()})


def train_base(config: Config, run: Run, unit: Unit, data: Data, arm: str) -> None:
    """Train a base net and keep its weights."""
    torch.manual_seed(run.derive_seed("base net"))
    net = make(config, arm, len(data.base)).to(run.device)
    if config.backbone_steps:
        net.backbone.load_state_dict(run.kept(("base", "backbone")))
    most = max(len(rows) for rows in data.base_set.by_image.values())
    if most > config.queries:
        run.print(
            f"warning: an image has {most} objects and there are {config.queries} queries: the rest is not matched"
        )
    torch.manual_seed(run.derive_seed("noise", "base", run.rank))
    model, optimizer = run.setup(Episode(net), make_optimizer(net, config, False))
    unit.attach(model=model, optimizer=optimizer)
    source = data.base_set
    sampler = EpochSampler(len(source), config.batch, run.derive_seed("order", "base"))
    drawer = Supports(data, source, config.support_classes)
    net.train()
    for step in unit.steps(config.base_steps):
        set_rate(optimizer, step / config.base_steps, config.drops)
        step_once(
            config, run, unit, data, model, optimizer, source, drawer, sampler[step], ("base", step), config.jitter,
            permute=config.permute,
        )  # fmt: skip
    state = {name: value.detach().cpu() for name, value in net.state_dict().items()}
    if config.export and run.is_main:
        path = Path(config.export) / f"{arm}.safetensors"
        half = {n: v.half() if v.is_floating_point() else v for n, v in state.items() if "num_batches" not in n}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, half)
    net.eval()
    metrics = {}
    if config.source != "coco":
        rows = sets.sample_shots(source, sorted(drawer.rows), 1, run.generator("judge", "base"))
        metrics = judge(config, run, data, net, cache(net, data, source, rows), {"bAP": range(len(data.base))})
    prefix = f"{config.source}/base/{config.backbone}/{arm}"
    unit.finish({f"{prefix}/{name}": value for name, value in metrics.items()}, keep=state)


def step_once(
    config: Config, run: Run, unit: Unit, data: Data, model: Any, optimizer: torch.optim.Optimizer, source: Dataset,
    drawer: Supports, index: Tensor, key: tuple[Any, ...], span: tuple[float, float], cached: Reference | None = None,
    teacher: tuple[RefT, Reference] | None = None, permute: float = 0.0,
) -> None:  # fmt: skip
    """One optimiser step on images of ``source``, with fresh supports, and a teacher's distillation.

    ``permute``: chance that the query-level reference's names of classes are permuted.
    """
    total: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for part, weight in run.shard(index):
        generator = run.generator("augment", *key, run.rank)
        images, targets = data.batch(source, part, generator, span)
        images, targets = images.to(run.device), targets.to(run.device)
        supports = order = None
        if model.net.refers:
            supports = to_device(data.supports(source, drawer.draw(part, generator)), run.device)
        if permute and model.net.query_reference is not None:
            order = permuted_classes(permute, generator, model.net.classifier.classes, run.device)
        out, own = model(images, supports, cached, order)
        terms = losses(out, targets, config.points, order=order)
        if own is not None and supports is not None and config.support_loss:
            side = losses(own, Targets(supports[1][:, None], supports[2][:, None],
                                       torch.ones_like(supports[2][:, None]) > 0), config.points)  # fmt: skip
            terms["support"] = config.support_loss * torch.stack(list(side.values())).sum()
        if teacher is not None:
            with torch.no_grad():
                known = teacher[0](images, teacher[1])
            terms["distillation"] = distillation(out, known, config.distil_features, config.distil_classes)
        loss = torch.stack(list(terms.values())).sum()
        run.backward(loss * weight)
        total = {name: value.detach() for name, value in terms.items()} | {"loss": loss.detach()}
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    unit.log(**total)


def permuted_classes(share: float, generator: torch.Generator, classes: int, device: torch.device) -> Tensor | None:
    """A random permutation of the classes in a share of the steps, otherwise nothing."""
    if torch.rand((), generator=generator) >= share:
        return None
    return torch.randperm(classes, generator=generator).to(device)


def base_state(config: Config, run: Run, arm: str, classes: int) -> dict[str, Tensor]:
    """Weights of a base net: from a folder, or from this run."""
    arm = arm.removesuffix("-no-distillation")
    if not config.base_weights:
        return run.kept(("base", arm))
    folder = Path(config.base_weights)
    if not folder.is_absolute() and not folder.is_dir():
        folder = run.paper_folder / folder
    path = folder / f"{arm}.safetensors"
    if not path.is_file():
        raise UserError(
            f"--base-weights: no file {path}; uv run train.py --preset shapes-base --export weights makes it"
        )
    state = {n: v.float() if v.is_floating_point() else v for n, v in load_file(str(path)).items()}
    rows = state.get("classifier.weight", torch.empty(0)).shape[0]
    if rows != classes + 1:
        raise UserError(f"{path} has {rows} rows in its classifier, expected {classes} base classes and 1 for none")
    return state


def load(net: RefT, state: dict[str, Tensor], where: str) -> None:
    """Load base weights; counters of batch norms may be missing."""
    wrong = [
        n
        for n, v in net.state_dict().items()
        if "num_batches" not in n and (n not in state or state[n].shape != v.shape)
    ]
    if wrong:
        raise UserError(f"{where}: {wrong[0]} is missing or of another shape; the sizes on the command line differ")
    net.load_state_dict(state, strict=False)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def tune(config: Config, run: Run, unit: Unit, data: Data) -> None:
    """Fine-tune an arm's base net on a shot list and judge it."""
    seed, protocol, shots, arm = unit.key
    labels = [*data.base, *data.novel] if protocol == "gfsis" else data.novel
    rows = data.shots(labels, shots, seed)
    source = data.pool.take(rows)
    if protocol != "gfsis" and {row.label for row in source.instances} & set(data.base):
        raise UserError(f"{protocol} fine-tunes on novel classes only, and its shots hold base annotations")
    net = make(config, arm, len(data.base))
    state = base_state(config, run, arm, len(data.base))
    load(net, state, f"base net {arm}")
    net = net.to(run.device).eval()
    teacher = cached = None
    if protocol != "gfsis":  # what base training leaves behind of its classes
        old = sets.sample_shots(data.base_set, sorted({r.label for r in data.base_set.instances}), 1,
                                run.generator("base reference", seed))  # fmt: skip
        cached = cache(net, data, data.base_set, old)
        if protocol == "ifsis" and not arm.endswith("no-distillation"):
            teacher = (copy.deepcopy(net).requires_grad_(False), cached)
    torch.manual_seed(run.derive_seed("new rows", seed))
    net.grow(torch.randn(len(data.novel), config.width, device=run.device))
    found = cache(net, data, source, source.instances)
    with torch.no_grad():  # new rows of the classifier: the classes' mean object query
        for label in found.present.nonzero()[:, 0].tolist():
            if label >= len(data.base):
                row = net.classifier.weight[label]
                row.copy_(F.normalize(found.queries[label].mean(0), dim=0) * row.norm())
    if config.freeze_backbone:
        net.backbone.requires_grad_(False)
    torch.manual_seed(run.derive_seed("noise", seed, run.rank))
    model, optimizer = run.setup(Episode(net), make_optimizer(net, config, True))
    unit.attach(model=model, optimizer=optimizer)
    net.train()
    net.backbone.eval()  # statistics of batch norms stay as they are
    total = config.tune_steps * shots
    sampler = EpochSampler(len(source), min(config.tune_batch, len(source)), run.derive_seed("order", seed))
    drawer = Supports(data, source, config.support_classes)
    for step in unit.steps(total):
        set_rate(optimizer, step / total, ())
        step_once(config, run, unit, data, model, optimizer, source, drawer, sampler[step], ("tune", seed, step),
                  config.tune_jitter, cached, teacher)  # fmt: skip
    net.eval()
    fresh = cache(net, data, source, source.instances)
    reference = fresh if cached is None else merge(fresh, cached)
    b = len(data.base)
    groups: dict[str, Sequence[int]] = {"nAP": range(b, len(data.classes))}
    if protocol != "fsis":
        groups["bAP"] = range(b)
    keep: dict[str, Tensor] = {}
    metrics = judge(config, run, data, net, reference, groups, keep)
    prefix = f"{config.source}/{protocol}/{config.backbone}/{arm}/{shots}-shot"
    unit.finish({f"{prefix}/{name}": value for name, value in metrics.items()}, keep=keep)


def judge(
    config: Config, run: Run, data: Data, net: RefT, reference: Reference, groups: dict[str, Sequence[int]],
    keep: dict[str, Tensor] | None = None,
) -> dict[str, float]:  # fmt: skip
    """AP of masks and boxes on the test scenes."""
    truth, found = [], []
    for part in torch.arange(len(data.test)).split(20 if config.source == "shapes" else 4):
        images, targets = data.batch(data.test, part, None)
        with torch.inference_mode():
            rows = detect(net(images.to(run.device), reference), (config.size, config.size), config.top)
        for i in range(len(part)):
            valid = targets.valid[i]
            truth.append((targets.masks[i][valid].bool(), targets.labels[i][valid]))
            found.append(Found(rows.scores[i].cpu(), rows.labels[i].cpu(), rows.masks[i].cpu()))
    if keep is not None:
        few = found[: 3 if config.source != "coco" else 1]
        keep |= {f"{name}{i}": getattr(f, name)[:10].to(torch.uint8 if name == "masks" else None).clone()
                 for i, f in enumerate(few) for name in Found._fields}  # fmt: skip
    return average_precision(truth, found, len(data.classes), groups)


# ---- class centres of a frozen backbone ------------------------------------------------------------------------------


@torch.no_grad()
def object_features(data: Data, source: Dataset, body: nn.Module, least: float = 64) -> dict[str, Tensor]:
    """Pooled features of every novel object of a split by mask, box and whole image, and labels."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*CENTRE_ARMS, "label")}
    for i in range(len(source)):
        chosen = [row for row in source.by_image[i] if row.area >= least and row.label in data.novel]
        if not chosen:
            continue
        image = source.read(i)
        h, w = (max(32, int(1.5 * n) // 32 * 32) for n in image.shape[1:])
        masks = torch.stack([source.mask(row) for row in chosen])
        boxes = masks.any(1, keepdim=True) & masks.any(2, keepdim=True)
        scene = sets.resize(Scene(image, torch.cat([masks, boxes]), torch.zeros(0)), h, w)
        features = body(scene.image[None])[-1]
        n = len(chosen)
        for name, pool in (("mask", scene.masks[:n]), ("box", scene.masks[n:]), ("image", torch.ones(n, h, w))):
            seen = pool.flatten(1).any(1)
            pool = torch.where(seen.view(-1, 1, 1), pool.float(), torch.ones(h, w))
            rows[name].append(mask_pool(features.expand(n, -1, -1, -1), pool))
        rows["label"].append(torch.tensor([row.label for row in chosen]))
    return {name: torch.cat(values) for name, values in rows.items()}


def centres(
    config: Config, run: Run, unit: Unit, data: Data, features: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    """Accuracy, mean over classes, of the nearest class centre from K objects a class."""
    train, test = features
    metrics = {}
    for k in config.shots:
        counts = torch.bincount(train["label"], minlength=len(data.classes))
        seen = torch.bincount(test["label"], minlength=len(data.classes)) > 0
        usable = ((counts >= k) & seen).nonzero()[:, 0]
        generator = run.generator("centres", unit.key[0], k)
        index = []
        for label in usable.tolist():
            mine = (train["label"] == label).nonzero()[:, 0]
            index.append(mine[torch.randperm(len(mine), generator=generator)[:k]])
        rows = torch.cat(index)
        owner = torch.arange(len(usable)).repeat_interleave(k)
        asked = torch.isin(test["label"], usable)
        truth = torch.searchsorted(usable, test["label"][asked])
        for arm in config.arms:
            z = mean_by_class(train[arm][rows], owner, len(usable))
            right = (nearest_centre(z, test[arm][asked]) == truth).float()
            metrics[f"panoptic/centres/{arm}/{k}-shot/accuracy"] = float(
                mean_by_class(right, truth, len(usable)).mean()
            )
        metrics[f"panoptic/centres/{k}-shot/chance"] = 1 / len(usable)
    unit.finish(metrics)


# ---- claims and figure -----------------------------------------------------------------------------------------------


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, on means over the shot lists."""
    k = 5 if 5 in config.shots else config.shots[0]

    def mean(arm: str, metric: str = "segm_nAP", protocol: str = "gfsis") -> float:
        return run.metrics[f"{config.source}/{protocol}/{config.backbone}/{arm}/{k}-shot/{metric}"].mean

    reft, full = mean("reft"), mean("full")
    name = "reft_beats_full_finetuning"
    run.claim(name, reft - full >= run.threshold(name), reft=reft, full_finetuning=full)

    name = "base_classes_are_kept"
    kept, plain = mean("reft", "segm_bAP"), mean("full", "segm_bAP")
    run.claim(name, plain - kept <= run.threshold(name), reft=kept, full_finetuning=plain)

    name = "both_references_contribute"
    feature, query = mean("feature"), mean("query")
    holds = reft - max(feature, query) >= run.threshold(name)
    run.claim(name, holds, both=reft, feature_only=feature, query_only=query)

    name = "distillation_keeps_base_classes"
    with_it, without = (mean(arm, "segm_bAP", "ifsis") for arm in ("reft", "reft-no-distillation"))
    run.claim(name, with_it - without >= run.threshold(name), with_distillation=with_it, without=without)


def _picture(axis: Any, image: Tensor, masks: Tensor, names: Sequence[str], title: str) -> None:
    """An image with outlined masks and their names."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    for i, (mask, name) in enumerate(zip(masks, names)):
        if not mask.any():
            continue
        axis.contour(mask.numpy(), levels=[0.5], colors=[report.COLOURS[i % len(report.COLOURS)]], linewidths=1.6)
        y, x = mask.nonzero()[0].tolist()
        axis.text(x, max(0, y - 2), name, fontsize=6, color="white", backgroundcolor="black")
    axis.set(title=title)
    axis.set_axis_off()


def draw(config: Config, run: Run, data: Data) -> Any:
    """The figure: two test images with truth and sure detections, and AP of every arm."""
    figure, axes = report.figure(2, 3, width=3.6, height=3.0)
    order = [*data.base, *data.novel]
    metrics = run.metrics
    keys = keys_of(config, run)
    if config.task == "segment" and keys:
        wanted = next((key for key in keys if key[3] == "reft" and key[1] == "gfsis"), keys[0])
        kept = run.kept(wanted)
        for i in range(2):
            images, targets = data.batch(data.test, torch.tensor([i]), None)
            valid = targets.valid[0]
            names = [data.classes[order[j]] for j in targets.labels[0][valid].tolist()]
            _picture(axes[i][0], images[0], targets.masks[0][valid], names, "truth")
            if f"scores{i}" in kept:
                sure = kept[f"scores{i}"] > 0.3
                names = [data.classes[order[j]] for j in kept[f"labels{i}"][sure].tolist()]
                title = f"{wanted[3]}, {wanted[2]} shots, score > 0.3"
                _picture(axes[i][1], images[0], kept[f"masks{i}"][sure], names, title)
            else:
                axes[i][1].set_axis_off()
    else:
        for axis in axes[:, :2].flat:
            axis.set_axis_off()
    for axis, ending in zip(axes[:, 2], ("nAP", "bAP")):
        rows = {name: value for name, value in metrics.items() if name.endswith((f"segm_{ending}", "accuracy"))}
        for i, value in enumerate(rows.values()):
            axis.barh(i, value.mean, xerr=value.std, color=report.COLOURS[i % len(report.COLOURS)])
        parts = [[x for x in name.split("/")[1:-1] if x != config.backbone] for name in rows]
        axis.set_yticks(range(len(rows)), [" ".join(x) for x in parts], fontsize=6)
        axis.invert_yaxis()
        shown = "accuracy" if config.task == "centres" else f"mask {ending} ({'novel' if ending == 'nAP' else 'base'})"
        axis.set(title=shown)
    return figure


def arms_of(config: Config, protocol: str) -> list[str]:
    """Arms that run in a protocol: the ablations under gfsis and fsis, distillation under ifsis."""
    if protocol == "ifsis" and "gfsis" in config.protocols:
        return [arm for arm in config.arms if arm.startswith("reft")]
    return [arm for arm in config.arms if protocol == "ifsis" or not arm.endswith("no-distillation")]


def keys_of(config: Config, run: Run) -> list[tuple[int, str, int, str]]:
    """(seed, protocol, shots, arm) of every fine-tuning."""
    each = [(p, k, a) for p in config.protocols for k in config.shots for a in arms_of(config, p)]
    return [(seed, *rest) for seed in run.seeds for rest in each]


def train(config: Config, run: Run) -> None:
    """Base training where it is needed, every protocol, number of shots and arm with every seed; claims and figure."""
    if run.precision == "16-mixed":
        raise UserError("--precision 16-mixed: gradients are clipped, which loss scaling forbids; take bf16-mixed")
    data = Data(config, run)
    if config.task == "centres":
        body = backbones.build(config.backbone).eval()
        features: Any = None
        for unit in run.units(run.seeds):
            if features is None:
                features = object_features(data, data.train, body), object_features(data, data.test, body)
            centres(config, run, unit, data, features)
    else:
        nets = dict.fromkeys(arm.removesuffix("-no-distillation") for arm in config.arms)
        base = [("base", arm) for arm in nets] if not config.base_weights else []
        if base and config.backbone_steps:
            base = [("base", "backbone"), *base]
        keys = [
            (s, p, k, a) for s in run.seeds for p in config.protocols for k in config.shots for a in arms_of(config, p)
        ]
        for unit in run.units([*base, *keys]):
            if unit.key == ("base", "backbone"):
                train_backbone(config, run, unit, data)
            elif unit.key[0] == "base":
                train_base(config, run, unit, data, unit.key[1])
            else:
                tune(config, run, unit, data)
        if run.preset.claims and set(ARMS) <= set(config.arms) and {"gfsis", "ifsis"} <= set(config.protocols) and keys:
            decide(config, run)
    run.figure(draw(config, run, data))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
