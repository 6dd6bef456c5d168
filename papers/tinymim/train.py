"""Distil the token relations of a masked autoencoder into a small vision transformer, fine-tune it, and compare.

The default run asks, on generated shapes with few labels: is a student that was distilled without labels better than
one trained from scratch, than one pre-trained by masked autoencoding itself, than one that imitated features or the
class token, and than one whose teacher was never trained? The presets named after data sets hold the paper's settings.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.errors import UserError, user_errors


@dataclass(frozen=True)
class Arm:
    """How a student is pre-trained; what is None comes from the Config.

    Attributes:
        how: not at all, as a masked autoencoder, or distilled. target: what is distilled. relations: which ones.
        last_block: the teacher's last block whatever its depth. masked: student and teacher see a quarter of the
            patches. auxiliary: adds MAE's loss. drop_path, teacher_drop_path: stochastic depth of either.
        trained: whether the teacher is. sequential: by way of the Config's assistants.
    """

    how: Literal["scratch", "mae", "distil"] = "distil"
    target: str = "relation"
    relations: tuple[str, ...] | None = None
    last_block: bool = False
    masked: bool = False
    auxiliary: bool = False
    drop_path: float | None = None
    teacher_drop_path: float = 0.0
    trained: bool = True
    sequential: bool = False


ARMS = {
    "scratch": Arm("scratch"),
    "mae": Arm("mae"),
    "tinymim": Arm(),
    "sequential": Arm(sequential=True),
    "untrained_teacher": Arm(trained=False),
    "qk": Arm(relations=("qk",)),
    "vv": Arm(relations=("vv",)),
    "qq": Arm(relations=("qq",)),
    "kk": Arm(relations=("kk",)),
    "qq_kk_vv": Arm(relations=("qq", "kk", "vv")),
    "cls": Arm(target="cls"),
    "feature": Arm(target="output"),
    "feature_attention": Arm(target="attention"),
    "feature_ffn": Arm(target="ffn"),
    "feature_q": Arm(target="q"),
    "feature_k": Arm(target="k"),
    "feature_v": Arm(target="v"),
    "last_block": Arm(last_block=True),
    "masked_input": Arm(masked=True),
    "reconstruction": Arm(auxiliary=True),
    "no_drop_path": Arm(drop_path=0.0),
    "drop_path_0.2": Arm(drop_path=0.2),
    "drop_path_0.3": Arm(drop_path=0.3),
    "teacher_drop_path": Arm(teacher_drop_path=0.1),
}
SIZE_NAMES = ("tiny", "small", "base", "large", "star", "w128d6", "w96d5", "w64d4", "w48d4", "w32d3", "w24d2")
RELATION_NAMES = ("qk", "vv", "qq", "kk")


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the paper's."""

    dataset: Literal["shapes", "cifar10", "imagenet", "ade20k"] = "imagenet"
    """Images: generated shapes, CIFAR-10, ImageNet-1k; ade20k fine-tunes a pre-trained student for segmentation."""
    arms: tuple[str, ...] = ("tinymim",)
    """Ways to pre-train: scratch mae tinymim sequential untrained_teacher qk vv qq kk qq_kk_vv cls feature
    feature_attention feature_ffn feature_q feature_k feature_v last_block masked_input reconstruction no_drop_path
    drop_path_0.2 drop_path_0.3 teacher_drop_path."""
    student: str = "base"
    """Size of the student: tiny small base star, or a small one such as w48d4 (width 48, 4 blocks)."""
    teacher: str = "large"
    """Size of the teacher."""
    teacher_from: str = "mae_pretrain_vit_large.pth"
    """Its weights: a file below --data, 'shipped' (weights/teacher.safetensors) or 'trained' (by this run, first)."""
    teacher_last_heads: int = 0
    """Heads of the teacher's last block, if it was itself distilled; 0: as in its other blocks."""
    block: int = 0
    """Target block of the teacher, from 1; 0: three quarters into a teacher deeper than the student, else the last."""
    assistants: tuple[str, ...] = ()
    """Sizes between teacher and student that the arm 'sequential' distils in turn."""
    relations: tuple[str, ...] = ("qk", "vv")
    """Relations that are distilled: qk vv qq kk."""
    weights: tuple[float, ...] = (1.0, 1.0)
    """Their weights in the loss (arms with other relations: all 1)."""
    pretrained: str = ""
    """File below --data with a pre-trained student to fine-tune instead of pre-training one (see --tune-epochs)."""
    image: int = 224
    """Side of the images (of the crops)."""
    patch: int = 16
    """Side of a patch."""
    geometric: bool = True
    """Random crop and flip in pre-training. Without it the teacher runs once over the images instead of every step."""
    crop_min: float = 0.2
    """ImageNet: least share of the area that a crop in pre-training has."""
    jitter: float = 0.4
    """Brightness, contrast and saturation of the student's view; the teacher's is left alone."""
    drop_path: float = 0.1
    """Stochastic depth of the student in pre-training, the same in all blocks but the last."""
    mask_ratio: float = 0.75
    """Share of masked patches: masked autoencoding, masked input."""
    decoder: tuple[int, int, int] = (512, 8, 16)
    """Width, blocks and heads of the decoder of masked autoencoding."""
    epochs: int = 300
    """Epochs of distillation."""
    mae_epochs: int = 1600
    """Epochs of masked autoencoding of the student (arm mae)."""
    batch: int = 4096
    """Images a step of pre-training, over all processes."""
    blr: float = 1.5e-4
    """Learning rate of pre-training for 256 images a step; scales with the batch."""
    warmup: float = 15
    """Epochs of warm-up of pre-training."""
    weight_decay: float = 0.05
    """Weight decay of pre-training."""
    teacher_epochs: int = 40
    """Teacher trained by this run: epochs of masked autoencoding."""
    teacher_images: int = 0
    """Shapes: images that it sees; other sets: those without labels."""
    teacher_batch: int = 256
    """Its images a step."""
    teacher_blr: float = 1.5e-3
    """Its learning rate for 256 images a step."""
    export: str = ""
    """File to write its weights to (safetensors, half precision); relative to this folder."""
    tune_epochs: int = 100
    """Epochs of fine-tuning; 0: --pretrained is a fine-tuned network, which is tested as it is."""
    tune_batch: int = 1024
    """Images a step of fine-tuning, over all processes."""
    tune_blr: float = 5e-4
    """Learning rate of fine-tuning for 256 images a step."""
    tune_warmup: float = 5
    """Epochs of warm-up of fine-tuning (ade20k: iterations)."""
    tune_weight_decay: float = 0.05
    """Weight decay of fine-tuning."""
    tune_drop_path: float = 0.2
    """Stochastic depth of the last block in fine-tuning; rises linearly from 0 in the first."""
    layer_decay: float = 0.65
    """Learning rate of a layer relative to the next one's in fine-tuning (scratch: 1)."""
    min_lr: float = 1e-6
    """Learning rate at the end of fine-tuning."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.8
    """Mixup; 0: none."""
    cutmix: float = 1.0
    """CutMix; 0: none."""
    policy: str = "rand-m9-mstd0.5-inc1"
    """ImageNet: RandAugment of fine-tuning, in timm's words."""
    erasing: float = 0.25
    """ImageNet: probability of random erasing in fine-tuning."""
    robustness: bool = True
    """ImageNet: test on imagenet-a, imagenet-r and imagenet-c too, those that lie below --data."""
    iterations: int = 160000
    """ade20k: steps."""
    channels: int = 768
    """ade20k: width of UperNet."""
    stride: int = 341
    """ade20k: step of the sliding window in the test."""
    unlabelled: int = 0
    """Images for pre-training; 0: the training set (shapes: needed)."""
    labels: int = 0
    """Labelled images for fine-tuning; 0: the training set (shapes: needed)."""
    test: int = 0
    """Test images; 0: all (shapes: needed)."""
    data_seed: int = 0
    """Seed of generated and of chosen images."""
    micro_batch: int = 0
    """Most images in one forward pass on one device; 0: no limit."""
    workers: int = 8
    """Processes that read image files, on each device."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the flag, its value and what is expected.
        """
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms {' '.join(self.arms)}: expected different ones among {', '.join(ARMS)}")
        if not self.arms and self.teacher_from != "trained":
            raise ValueError("--arms is empty: nothing to do, unless --teacher-from is trained")
        for name, sizes in (
            ("student", (self.student,)),
            ("teacher", (self.teacher,)),
            ("assistants", self.assistants),
        ):
            wrong = [size for size in sizes if size not in SIZE_NAMES]
            if wrong:
                raise ValueError(f"--{name}: unknown size {wrong[0]!r}, expected one of {', '.join(SIZE_NAMES)}")
        if "sequential" in self.arms and not self.assistants:
            raise ValueError("--arms sequential needs --assistants: sizes between teacher and student")
        chain = (*self.assistants, self.student)
        if len(set(chain)) < len(chain):
            raise ValueError(f"--assistants {' '.join(self.assistants)}: expected different sizes, not the student's")
        if not self.relations or set(self.relations) - set(RELATION_NAMES):
            raise ValueError(f"--relations {' '.join(self.relations)}: expected among {', '.join(RELATION_NAMES)}")
        if len(self.weights) != len(self.relations) or min(self.weights) < 0:
            raise ValueError(f"--weights {self.weights}: expected {len(self.relations)} numbers of at least 0")
        for least, names in (
            (1, "epochs mae_epochs batch teacher_epochs teacher_batch tune_batch"),
            (1, "image patch channels iterations stride"),
            (0, "tune_epochs teacher_last_heads block teacher_images unlabelled labels test data_seed"),
            (0, "micro_batch workers warmup tune_warmup weight_decay tune_weight_decay min_lr mixup cutmix"),
        ):
            for name in names.split():
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected at least {least}")
        if self.image % self.patch:
            raise ValueError(f"--image is {self.image}: not divisible by --patch {self.patch}")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"--mask-ratio is {self.mask_ratio}, expected a number between 0 and 1")
        for name in ("drop_path", "tune_drop_path", "jitter", "smoothing", "erasing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected 0 or more and less than 1")
        for name in ("blr", "teacher_blr", "tune_blr", "layer_decay", "crop_min"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected more than 0")
        if self.layer_decay > 1 or self.crop_min > 1:
            raise ValueError(f"--layer-decay {self.layer_decay} and --crop-min {self.crop_min}: expected at most 1")
        width, blocks, heads = self.decoder
        if min(self.decoder) < 1 or width % heads or width % 4:
            raise ValueError(f"--decoder {width} {blocks} {heads}: expected a width divisible by 4 and by the heads")
        if self.dataset == "shapes" and self.arms and not (self.unlabelled and self.labels and self.test):
            raise ValueError("--dataset shapes needs --unlabelled, --labels and --test: how many images to generate")
        if self.pretrained and sum(ARMS[arm].how != "scratch" for arm in self.arms) != 1:
            raise ValueError(f"--pretrained {self.pretrained} is one student: expected one of --arms, besides scratch")
        if self.tune_epochs == 0 and (not self.pretrained or "scratch" in self.arms):
            raise ValueError("--tune-epochs is 0: only for one arm with --pretrained FILE, a fine-tuned network")
        if self.dataset == "ade20k" and not self.pretrained and set(self.arms) != {"scratch"}:
            raise ValueError("--dataset ade20k needs --pretrained FILE: a student pre-trained on ImageNet")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


SMALL: dict[str, Any] = {
    "patch": 4,
    "geometric": False,
    "tune_drop_path": 0.0,
    "layer_decay": 0.75,
    "min_lr": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "workers": 0,
}
SHAPE_SETTINGS: dict[str, Any] = SMALL | {
    "dataset": "shapes",
    "image": 24,
    "student": "w48d4",
    "teacher": "w128d6",
    "teacher_from": "shipped",
    "assistants": ("w96d5",),
    "decoder": (48, 1, 4),
    "epochs": 4,
    "mae_epochs": 8,
    "batch": 16,
    "blr": 0.012,
    "warmup": 0.5,
    "tune_epochs": 15,
    "tune_batch": 16,
    "tune_blr": 0.012,
    "tune_warmup": 1,
    "unlabelled": 3200,
    "labels": 640,
    "test": 3000,
}
CIFAR_SETTINGS: dict[str, Any] = SMALL | {
    "dataset": "cifar10",
    "image": 32,
    "student": "w64d4",
    "teacher": "w128d6",
    "teacher_from": "trained",
    "assistants": ("w96d5",),
    "decoder": (64, 2, 4),
    "epochs": 8,
    "mae_epochs": 16,
    "batch": 64,
    "blr": 0.008,
    "warmup": 0.5,
    "tune_epochs": 10,
    "tune_batch": 64,
    "tune_blr": 0.004,
    "tune_warmup": 1,
    "unlabelled": 4000,
    "labels": 3000,
    "test": 2000,
}
COMPARED = ("scratch", "mae", "untrained_teacher", "cls", "feature", "tinymim")
DEIT: dict[str, Any] = {"tune_epochs": 300, "tune_blr": 2.5e-4, "tune_drop_path": 0.1, "min_lr": 1e-5}
IMAGENET = "train/ and val/ of ImageNet-1k"
GPUS = "32 GPUs of 32 GB"


def _imagenet(student: str, hours: float, note: str = "", needs: str = "", **values: Any) -> Preset:
    return Preset(
        Config(student=student, **values),
        data=f"{IMAGENET}{needs}",
        needs_data=True,
        claims=False,
        hardware=GPUS,
        hours=hours,
        note=note,
    )


def _ade20k(student: str, file: str, note: str = "", **values: Any) -> Preset:
    settings: dict[str, Any] = {
        "tune_batch": 16,
        "tune_blr": 1.6e-3,
        "tune_warmup": 1500,
        "tune_drop_path": 0.1,
        "layer_decay": 0.75,
        "image": 512,
    }
    return Preset(
        Config(dataset="ade20k", student=student, pretrained=file, **(settings | values)),
        data=f"ADEChallengeData2016/, {file}",
        needs_data=True,
        claims=False,
        hardware="8 GPUs of 32 GB",
        hours=24,
        note=note,
    )


PRESETS = {
    "default": Preset(
        Config(**SHAPE_SETTINGS, arms=COMPARED),
        seeds=3,
        data="generated shapes, teacher in weights/",
        hours=0.09,
        why_not_comparable="generated shapes of 24 x 24 pixels, small networks",
    ),
    "smoke": Preset(
        Config(
            **SHAPE_SETTINGS
            | {
                "image": 16,
                "student": "w24d2",
                "teacher": "w32d3",
                "teacher_from": "trained",
                "assistants": ("w32d3",),
                "teacher_images": 40,
                "teacher_batch": 20,
                "teacher_epochs": 1,
                "decoder": (16, 1, 2),
                "epochs": 1,
                "mae_epochs": 1,
                "batch": 20,
                "unlabelled": 40,
                "labels": 40,
                "test": 20,
                "tune_epochs": 1,
                "tune_batch": 20,
            },
            arms=("scratch", "mae", "tinymim", "sequential", "feature", "masked_input", "reconstruction"),
        ),
        data="generated shapes",
        hours=0.002,
        claims=False,
        why_not_comparable="two steps of each phase on generated shapes",
    ),
    "teacher": Preset(
        Config(
            **SHAPE_SETTINGS
            | {
                "teacher_from": "trained",
                "geometric": True,
                "teacher_images": 40000,
                "teacher_epochs": 8,
                "teacher_batch": 64,
                "teacher_blr": 4e-3,
                "decoder": (64, 2, 4),
                "warmup": 1,
                "labels": 2000,
            },
            arms=(),
            export="weights/teacher.safetensors",
        ),
        data="generated shapes",
        hours=0.15,
        claims=False,
        why_not_comparable="trains the teacher that the default uses, and nothing else",
        note="writes weights/teacher.safetensors",
    ),
    "ablation": Preset(
        Config(**SHAPE_SETTINGS, arms=tuple(ARMS)),
        seeds=3,
        data="generated shapes, teacher in weights/",
        hours=0.45,
        claims=True,
        why_not_comparable="generated shapes of 24 x 24 pixels, small networks",
        note="every arm",
    ),
    "cifar10": Preset(
        Config(**CIFAR_SETTINGS, arms=("scratch", "cls", "feature", "tinymim")),
        seeds=3,
        data="cifar-10-batches-bin/ or cifar10-jpeg-mini.tar.xz",
        needs_data=True,
        hours=0.5,
        why_not_comparable="CIFAR-10, small networks; trains its teacher first",
    ),
    "imagenet-base": _imagenet("base", 40, needs=", mae_pretrain_vit_large.pth"),
    "imagenet-small": _imagenet(
        "small",
        25,
        needs=", TinyMIM-PT-B.pth",
        teacher="base",
        teacher_from="TinyMIM-PT-B.pth",
        note="twelve heads in the target block, as released",
    ),
    "imagenet-tiny": _imagenet(
        "tiny",
        20,
        needs=", TinyMIM-PT-S.pth",
        teacher="small",
        teacher_from="TinyMIM-PT-S.pth",
        teacher_last_heads=12,
    ),
    "imagenet-tiny-star": _imagenet(
        "star",
        20,
        needs=", TinyMIM-PT-S.pth",
        teacher="small",
        teacher_from="TinyMIM-PT-S.pth",
        teacher_last_heads=12,
        note="TinyMIM*-T: the network is the released one, its distillation is not described",
    ),
    "imagenet-sequence": _imagenet(
        "tiny",
        120,
        needs=", mae_pretrain_vit_large.pth",
        assistants=("base", "small"),
        arms=("sequential", "tinymim"),
        note="large to base to small to tiny in one run, and large to tiny directly",
    ),
    **{
        f"imagenet-{size}-mae": _imagenet(size, hours, arms=("mae",), warmup=40)
        for size, hours in (("tiny", 45), ("small", 60), ("base", 90))
    },
    **{
        f"imagenet-{size}-scratch": _imagenet(size, hours, note="DeiT's training", arms=("scratch",), **DEIT)
        for size, hours in (("tiny", 15), ("small", 20), ("base", 30))
    },
    "imagenet-ablation": _imagenet(
        "base",
        500,
        needs=", mae_pretrain_vit_large.pth",
        arms=tuple(arm for arm in ARMS if arm not in ("scratch", "mae", "sequential", "untrained_teacher")),
        epochs=100,
        note="100 epochs, as far as known the paper's length for ablations",
    ),
    "ade20k-base": _ade20k("base", "TinyMIM-PT-B.pth"),
    "ade20k-small": _ade20k("small", "TinyMIM-PT-S.pth"),
    "ade20k-tiny": _ade20k("tiny", "TinyMIM-PT-T.pth"),
    "ade20k-tiny-star": _ade20k("star", "TinyMIM-FT-Tstar.pth", layer_decay=0.8),
    "ade20k-tiny-star-light": _ade20k("star", "TinyMIM-FT-Tstar.pth", layer_decay=0.8, channels=192),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import argparse  # noqa: E402
import contextlib  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.files import replacing  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import (  # noqa: E402
    ADE_CLASSES,
    ADE_COUNTS,
    CIFAR_COUNTS,
    CORRUPTIONS,
    IMAGENET_COUNTS,
    ROBUSTNESS_COUNTS,
    SHAPES,
    Ade20k,
    Augmentation,
    Feed,
    FolderImages,
    Images,
    balanced,
    corruption_folders,
    find_cifar10,
    generate_shapes,
    in_order,
    load_cifar10,
    scan_ade20k,
    scan_classes,
    scan_unlabelled,
)
from model import (  # noqa: E402
    SIZES,
    TOKENS,
    Classifier,
    Distiller,
    Mae,
    MaeDecoder,
    VisionTransformer,
    cosine_lr,
    freeze,
    load_encoder,
    official_state,
    parameter_groups,
    random_mask,
    relation,
    set_lr,
    target_block,
    teacher_targets,
)
from segmentation import Backbone, Segmenter, confusion, segmentation_scores, slide  # noqa: E402

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "weights" / "teacher.safetensors"
EVALUATION_BATCH = 256
KEPT_TARGETS = 4
"""How many sets of a teacher's targets are kept: the default's three fit."""
CURVE = 60
"""Points of a loss curve."""


# ---- checkpoints on disk ---------------------------------------------------------------------------------------------


def read_checkpoint(path: Path, pretrained: bool = True) -> dict[str, Tensor]:
    """Weights of an encoder from an official ``.pth`` (key ``model``) or a safetensors file.

    Raises:
        UserError: missing, unreadable, or not what is expected.
    """
    if not path.is_file():
        raise UserError(f"no file {path}, expected weights there")
    try:
        if path.suffix == ".safetensors":
            content: Any = {"model": {name: value.float() for name, value in load_file(path).items()}}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # MAE saves its command line beside
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({str(error).splitlines()[0]})") from error
    except Exception as error:  # pickle's own errors, of which weights_only makes several kinds
        raise UserError(f"{path} is not a checkpoint of weights ({type(error).__name__})") from error
    try:
        return official_state(content, pretrained)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load(net: VisionTransformer, state: dict[str, Tensor], what: str) -> list[str]:
    """``load_encoder`` whose errors name the file."""
    try:
        return load_encoder(net, state)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def export_teacher(config: Config, state: dict[str, Tensor]) -> Path:
    """Write the trained teacher in half precision, with what it was trained on in the file's metadata."""
    path = Path(config.export)
    path = path if path.is_absolute() else HERE / path
    origin = "shapes generated by data.py of this folder" if config.dataset == "shapes" else config.dataset
    about = {
        "paper": "tinymim",
        "what": f"encoder {config.teacher} of a masked autoencoder, patch {config.patch}, images of {config.image}",
        "data": origin,
        "licence": "MIT, as this repository" if config.dataset == "shapes" else f"that of {config.dataset}",
        "command": "uv run train.py --preset teacher",
    }
    tensors = {name: value.half().contiguous() for name, value in state.items() if name != "pos_embed"}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=about)
    return path


# ---- data ------------------------------------------------------------------------------------------------------------


def _folder(run_data: Path | None, dataset: str) -> Path:
    if run_data is None:
        raise UserError(f"--dataset {dataset} needs --data DIR; see Data in README.md")
    return run_data


class Problem:
    """The images of a run, read once: ``unlabelled``, ``train`` and ``test``, and the teacher's targets."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        self.classes = 0
        self.names: list[str] = []
        self._targets: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._teachers: dict[tuple[Any, ...], VisionTransformer] = {}
        self.unlabelled: Any = None
        self.train: Any = None
        self.test: Any = None
        if config.dataset != "ade20k":
            {"shapes": self._shapes, "cifar10": self._cifar, "imagenet": self._imagenet}[config.dataset]()

    def _shapes(self) -> None:
        config, run = self.config, self.run
        sizes = {"unlabelled": config.unlabelled, "train": config.labels, "test": config.test}
        for split, count in sizes.items():
            generator = run.generator("shapes", split, config.data_seed)
            images = generate_shapes(-(-count // len(SHAPES)), config.image, generator)
            setattr(self, split, images.take(torch.arange(count)))
        self.classes = len(SHAPES)
        run.data_used("shapes", "generated", spec={**sizes, "side": config.image, "seed": config.data_seed})

    def _cifar(self) -> None:
        config, run = self.config, self.run
        if config.image != 32:
            raise UserError(f"--image is {config.image}: CIFAR-10 has 32 x 32 pixels")
        sets = load_cifar10(run.data)
        for split, whole, count in (
            ("unlabelled", sets["train"], config.unlabelled),
            ("train", sets["train"], config.labels),
            ("test", sets["test"], config.test),
        ):
            generator = run.generator("cifar10", split, config.data_seed)
            setattr(self, split, whole.take(balanced(whole.labels, count, generator)))
        self.classes = 10
        run.data_used("cifar10", "real", path=find_cifar10(run.data))

    def _imagenet(self) -> None:
        config, run = self.config, self.run
        root = _folder(run.data, "imagenet")
        how = Augmentation(config.image, config.crop_min, config.jitter, config.policy, config.erasing)
        files, labels, self.names = scan_classes(root / ("train" if config.tune_epochs else "val"))
        free = root / "unlabelled"
        sources = {
            "unlabelled": (
                *(scan_unlabelled(free) if free.is_dir() else (files, labels)),
                config.unlabelled,
                "pretrain",
            ),
            "train": (files, labels, config.labels, "tune"),
            "test": (*scan_classes(root / "val", self.names)[:2], config.test, "test"),
        }
        for split, (paths, truth, count, view) in sources.items():
            keep = balanced(torch.tensor(truth), count, run.generator("imagenet", split, config.data_seed)).tolist()
            setattr(self, split, FolderImages([paths[i] for i in keep], [truth[i] for i in keep], view, how))
        self.classes = len(self.names)
        listing = [[str(p.relative_to(root)) for p in source.files] for source in (self.train, self.test)]
        run.data_used("imagenet", "real", spec=listing)  # hashing 150 GB would take an hour: the names stand for it

    @property
    def in_memory(self) -> bool:
        """Whether the images are ``Images``."""
        return isinstance(self.unlabelled, Images)

    # -- teachers

    def teacher(self, arm: Arm, seed: int, stage: int) -> tuple[VisionTransformer, int, tuple[Any, ...]]:
        """The teacher of a stage of an arm, its target block, and a key that tells teachers apart.

        Stage 0 has the first teacher; in stage i of a sequence the student of stage i - 1 teaches.
        """
        config = self.config
        chain = stages(config, arm)
        if stage:
            size, key = chain[stage - 1], (seed, "sequential", f"pretrain-{chain[stage - 1]}")
            heads = self.target_heads(arm, chain)
            block = SIZES[size].depth
        else:
            size, key = config.teacher, ("teacher", "trained" if arm.trained else "untrained", "")
            heads = config.teacher_last_heads
            block = self.target(arm, SIZES[chain[0]].depth)
        key = (*key, arm.teacher_drop_path)
        if key not in self._teachers:
            with user_errors():
                torch.manual_seed(self.run.derive_seed("untrained teacher"))
                star = size == "star"
                net = VisionTransformer(
                    SIZES[size], config.image, config.patch, heads or None, arm.teacher_drop_path, star
                )
            if stage:
                load(net, weights_of(self.run, key[:3]), str(key[:3]))
            elif arm.trained:
                load(net, *self._first_teacher())
            net = freeze(net).to(self.run.device)
            if arm.teacher_drop_path:
                net.train()  # stochastic depth is its only random part
            self._teachers[key] = net
        return self._teachers[key], block, key

    def target(self, arm: Arm, student_depth: int) -> int:
        """Target block of the first teacher."""
        depth = SIZES[self.config.teacher].depth
        block = depth if arm.last_block else self.config.block or target_block(depth, student_depth)
        if block > depth:
            raise UserError(f"--block is {block}: the teacher has {depth} blocks")
        return block

    def target_heads(self, arm: Arm, chain: tuple[str, ...]) -> int:
        """Heads of the first teacher's target block; the last block of every student in the chain has as many."""
        config = self.config
        block = self.target(arm, SIZES[chain[0]].depth)
        last = block == SIZES[config.teacher].depth
        return (config.teacher_last_heads if last else 0) or SIZES[config.teacher].heads

    def _first_teacher(self) -> tuple[dict[str, Tensor], str]:
        config, run = self.config, self.run
        if config.teacher_from == "trained":
            return weights_of(run, ("teacher",)), "teacher trained by this run"
        if config.teacher_from == "shipped":
            return shipped_teacher(), str(SHIPPED)
        path = _folder(run.data, config.dataset) / config.teacher_from
        return read_checkpoint(path), str(path)

    def targets(
        self, teacher: VisionTransformer, block: int, names: tuple[str, ...], key: tuple[Any, ...], fixed: bool
    ) -> Callable[[Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
        """A function of (positions in the set, the teacher's view, kept patches) that gives the teacher's targets.

        ``fixed``: the views of an image never change, so the teacher runs over all images once and what it gave is
        kept in half precision.
        """
        device = self.run.device

        def fresh(index: Tensor, view: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
            with precision(self.run):
                return teacher_targets(teacher, view, block, names, keep)

        if not fixed:
            return fresh
        cache = (key, block, names)
        if cache not in self._targets:
            parts = [
                {name: x.half().cpu() for name, x in fresh(labels, images.to(device), None).items()}
                for images, labels in in_order(self.unlabelled, EVALUATION_BATCH)
            ]
            self._targets[cache] = {name: torch.cat([part[name] for part in parts]) for name in names}
            while len(self._targets) > KEPT_TARGETS:
                del self._targets[next(iter(self._targets))]  # the oldest
        kept = self._targets[cache]
        return lambda index, view, keep: {name: x[index].to(device).float() for name, x in kept.items()}


def precision(run: Run) -> Any:
    """The context in which networks that are not trained compute: as ``--precision`` says."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if run.precision not in kinds:
        return contextlib.nullcontext()
    return torch.autocast(run.device.type, dtype=kinds[run.precision])


def shipped_teacher() -> dict[str, Tensor]:
    """The teacher in ``weights/``.

    Raises:
        UserError: not there, with the command that makes it.
    """
    if not SHIPPED.is_file():
        raise UserError(f"no weights/{SHIPPED.name}: make it with: uv run train.py --preset teacher (10 minutes)")
    return read_checkpoint(SHIPPED)


def stages(config: Config, arm: Arm) -> tuple[str, ...]:
    """Sizes of the students that an arm distils in turn."""
    return (*config.assistants, config.student) if arm.sequential else (config.student,)


def weights_of(run: Run, key: tuple[Any, ...]) -> dict[str, Tensor]:
    """The transformer that a finished unit kept."""
    kept = run.kept(key)
    return {name.removeprefix("net."): value for name, value in kept.items() if name.startswith("net.")}


# ---- one loop for every phase ----------------------------------------------------------------------------------------


def fit(
    run: Run,
    unit: Unit,
    model: nn.Module,
    groups: list[dict[str, Any]],
    feed: Feed,
    schedule: Callable[[int], float],
    loss_of: Callable[[Any, int, tuple[Any, Any], Tensor], dict[str, Tensor]],
    betas: tuple[float, float],
    last: int,
) -> dict[str, Tensor]:
    """Train ``model`` with AdamW for ``feed.total`` steps.

    Args:
        schedule: learning rate of a step. loss_of: terms of the loss, ``loss`` among them, of (model, step, batch,
            positions in the step's batch). last: so many last steps give ``unit.state["final"]``, their mean loss.

    Returns:
        ``curve`` (points, 2) of step and loss.
    """
    on = {"cpu", "cuda"}
    optimizer = torch.optim.AdamW(groups, lr=schedule(0), betas=betas, fused=run.device.type in on)
    wrapped, optimizer = run.setup(model, optimizer)
    unit.attach(model=wrapped, optimizer=optimizer)
    state = unit.state
    state.setdefault("curve", [])
    state.setdefault("final", 0.0)
    every = max(1, feed.total // CURVE)
    wrapped.train()
    for step in unit.steps(feed.total):
        set_lr(optimizer, schedule(step))
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for batch, positions, weight in feed(step):
            moved = tuple(x.to(run.device, non_blocking=True) for x in batch)
            terms = loss_of(wrapped, step, moved, positions)
            run.backward(terms["loss"] * weight)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + weight * value.detach()
        optimizer.step()
        unit.log(**sums)
        if step % every == 0 or step == feed.total - 1:
            state["curve"].append([step, float(run.mean_over_processes(sums["loss"]))])
        if step >= feed.total - last:
            state["final"] += float(run.mean_over_processes(sums["loss"])) / min(last, feed.total)
    return {"curve": torch.tensor(state["curve"], dtype=torch.float64)}


def epochs_of(run: Run, count: int, batch: int, *purpose: Any) -> EpochSampler:
    """The order of the samples; incomplete batches are dropped as in the official code, if there is a complete one."""
    return EpochSampler(count, batch, run.derive_seed("order", *purpose), drop_last=count >= batch)


def pretrain_feed(
    config: Config, run: Run, source: Any, sampler: EpochSampler, unit: Unit, epochs: int, jitter: float
) -> Feed:
    """Pairs of views of images without labels; of images in memory, the second's colours change by ``jitter``."""
    memory = {"geometric": config.geometric, "jitter": jitter} if isinstance(source, Images) else {}
    total = epochs * len(sampler)
    purpose = ("views", *unit.key)
    return Feed(source, "pretrain", lambda s: sampler[s], _share(config, run), purpose, total, config.workers, **memory)


def _share(config: Config, run: Run) -> Callable[[Tensor], list[tuple[Tensor, float]]]:
    return lambda positions: run.shard(positions, config.micro_batch or None)


def mask_noise(run: Run, unit: Unit, step: int, count: int, patches: int, positions: Tensor) -> Tensor:
    """Noise (B, n) from which masks are made, the same for a sample on however many processes."""
    noise = torch.rand(count, patches, generator=run.generator("mask", unit.name, step))
    return noise[positions].to(run.device)


def warmup_cosine(blr: float, batch: int, least: float, warmup: float, epochs: int, steps: int) -> Any:
    """Learning rate of a step, set anew every iteration; the peak is blr x batch / 256."""
    return lambda step: cosine_lr(step / steps, blr * batch / 256, least, warmup, epochs)


def decoder_of(config: Config, encoder: VisionTransformer) -> MaeDecoder:
    """MAE's decoder of the configuration."""
    width, depth, heads = config.decoder
    with user_errors():
        return MaeDecoder(encoder, width, depth, heads, config.mask_ratio)


# ---- phases ----------------------------------------------------------------------------------------------------------


def make_student(config: Config, size: str, last_heads: int | None, drop_path: float) -> VisionTransformer:
    """A student to be pre-trained."""
    with user_errors():
        return VisionTransformer(SIZES[size], config.image, config.patch, last_heads, drop_path, size == "star")


def train_mae(
    config: Config, run: Run, unit: Unit, encoder: VisionTransformer, source: Any, epochs: int, batch: int, blr: float
) -> dict[str, Tensor]:
    """Masked autoencoding of an encoder: the teacher of the small presets, and the arm ``mae``."""
    model = Mae(encoder, decoder_of(config, encoder))
    sampler = epochs_of(run, len(source), batch, *unit.key)
    feed = pretrain_feed(config, run, source, sampler, unit, epochs, 0.0)

    def loss_of(net: Any, step: int, views: tuple[Any, Any], positions: Tensor) -> dict[str, Tensor]:
        noise = mask_noise(run, unit, step, len(sampler[step]), encoder.patches, positions)
        return net(views[0], noise)  # the view without changed colours

    schedule = warmup_cosine(blr, batch, 0.0, config.warmup, epochs, len(sampler))
    groups = parameter_groups(model, config.weight_decay)
    return fit(run, unit, model, groups, feed, schedule, loss_of, (0.9, 0.95), len(sampler))


def teacher_phase(config: Config, run: Run, unit: Unit, problem: Problem) -> None:
    """Train the teacher, probe it, keep it, and write it where ``--export`` says."""
    torch.manual_seed(run.derive_seed("teacher"))
    with user_errors():
        encoder = VisionTransformer(SIZES[config.teacher], config.image, config.patch)
    source = problem.unlabelled
    if config.dataset == "shapes" and config.teacher_images:
        per_class = -(-config.teacher_images // len(SHAPES))
        source = generate_shapes(per_class, config.image, run.generator("shapes", "teacher", config.data_seed))
    keep = train_mae(
        config, run, unit, encoder, source, config.teacher_epochs, config.teacher_batch, config.teacher_blr
    )
    state = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    metrics = {f"{config.dataset}/teacher/loss": unit.state["final"]}
    if problem.in_memory:
        block = target_block(encoder.depth, encoder.depth - 1)
        metrics[f"{config.dataset}/teacher/block_{block}_probe_top1"] = probe(
            run, freeze(encoder), problem.train, problem.test, block
        )
    if config.export and run.is_main:
        run.print(f"wrote {export_teacher(config, state)}")
    unit.finish(metrics, {"teacher/seconds": unit.seconds}, keep | {f"net.{k}": v for k, v in state.items()})


@torch.no_grad()
def probe(run: Run, encoder: VisionTransformer, train: Images, test: Images, block: int) -> float:
    """Top-1 of ridge regression on the mean patch token of a block of a frozen encoder."""

    def features(images: Images) -> Tensor:
        parts = [
            encoder.probe(x.to(run.device), block, ("output",))["output"][:, encoder.extra :].mean(1).double().cpu()
            for x, _ in in_order(images, EVALUATION_BATCH)
        ]
        return torch.cat(parts)

    x, z = features(train), features(test)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-8)
    x, z = ((a - mean) / std for a in (x, z))
    truth = F.one_hot(train.labels, len(train.classes)).double()
    gram = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    scores = z @ torch.linalg.solve(gram, x.T @ (truth - truth.mean(0))) + truth.mean(0)
    return float((scores.argmax(1) == test.labels).double().mean())


def pretrain_phase(config: Config, run: Run, unit: Unit, problem: Problem) -> None:
    """Pre-train a student without labels, as its arm says."""
    seed, name, stage = unit.key
    arm, size, source = ARMS[name], stage.removeprefix("pretrain-"), problem.unlabelled
    chain = stages(config, arm)
    metric = f"{config.dataset}/{size}/{name}/pretrain_loss"
    extra: dict[str, Tensor] = {}
    if arm.how == "mae":
        torch.manual_seed(run.derive_seed("initial weights", seed))
        student = make_student(config, size, None, 0.0)
        keep = train_mae(config, run, unit, student, source, config.mae_epochs, config.batch, config.blr)
    else:
        number = chain.index(size)
        teacher, block, key = problem.teacher(arm, seed, number)
        torch.manual_seed(run.derive_seed("initial weights", seed))  # students of a seed begin alike
        heads = teacher.heads(block)
        rate = config.drop_path if arm.drop_path is None else arm.drop_path
        student = make_student(config, size, heads if arm.target == "relation" else None, rate)
        keep = distil(config, run, unit, problem, student, teacher, block, key)
        if isinstance(source, Images) and arm.target == "relation":
            extra = relation_maps(run, source, teacher, block, student)
    state = {f"net.{k}": v.detach().cpu() for k, v in student.state_dict().items()}
    times = {f"{config.dataset}/{size}/{name}/pretrain_seconds": unit.seconds}
    unit.finish({metric: unit.state["final"]}, times, keep | extra | state)


def distil(
    config: Config,
    run: Run,
    unit: Unit,
    problem: Problem,
    student: VisionTransformer,
    teacher: VisionTransformer,
    block: int,
    key: tuple[Any, ...],
) -> dict[str, Tensor]:
    """Distil the teacher's block into the student."""
    arm, source = ARMS[unit.key[1]], problem.unlabelled
    relations = arm.relations or config.relations
    weights = config.weights if arm.relations is None else (1.0,) * len(relations)
    decoder = decoder_of(config, student) if arm.auxiliary else None
    with user_errors():
        model = Distiller(student, teacher.width, teacher.heads(block), arm.target, relations, weights, decoder)
    fixed = problem.in_memory and not (config.geometric or arm.masked or arm.teacher_drop_path)
    targets = problem.targets(teacher, block, model.names, key, fixed)
    sampler = epochs_of(run, len(source), config.batch, unit.key[0])
    feed = pretrain_feed(config, run, source, sampler, unit, config.epochs, config.jitter)

    def loss_of(net: Any, step: int, views: tuple[Any, Any], positions: Tensor) -> dict[str, Tensor]:
        noise = keep = None
        if arm.masked or arm.auxiliary:
            noise = mask_noise(run, unit, step, len(sampler[step]), student.patches, positions)
        if arm.masked:
            assert noise is not None
            keep = random_mask(noise, config.mask_ratio).keep
        return net(views[1], targets(sampler[step][positions], views[0], keep), keep, noise)

    schedule = warmup_cosine(config.blr, config.batch, 0.0, config.warmup, config.epochs, len(sampler))
    groups = parameter_groups(model, config.weight_decay)
    return fit(run, unit, model, groups, feed, schedule, loss_of, (0.9, 0.95), len(sampler))


@torch.no_grad()
def relation_maps(
    run: Run, source: Images, teacher: VisionTransformer, block: int, student: VisionTransformer
) -> dict[str, Tensor]:
    """For the figure: four images and the R^VV row of their middle patch, mean over heads, of teacher and student."""
    images, _ = source.batch("test", torch.arange(4), 0, geometric=False, jitter=0.0)
    middle = student.extra + student.grid * (student.grid // 2) + student.grid // 2
    out = {"map_images": source.pixels[:4]}
    training = student.training
    student.eval()
    for name, net, at in (("map_teacher", teacher, block), ("map_student", student, student.depth)):
        v = net.probe(images.to(run.device), at, ("v",))["v"]
        row = relation(v, v)[:, :, middle, net.extra :].mean(1)
        out[name] = row.unflatten(1, (net.grid, net.grid)).cpu()
    student.train(training)
    return out


def tune_phase(config: Config, run: Run, unit: Unit, problem: Problem) -> None:
    """Fine-tune a pre-trained student with labels (or train it from scratch) and test it."""
    seed, name, _ = unit.key
    size, scratch = config.student, ARMS[name].how == "scratch"
    torch.manual_seed(run.derive_seed("initial weights", seed))
    with user_errors():
        net = Classifier(
            SIZES[size], problem.classes, config.image, config.patch, config.tune_drop_path, size == "star"
        )
    load_student(config, run, net, unit.key)
    epochs = config.tune_epochs
    sampler = epochs_of(run, len(problem.train), config.tune_batch, seed, "tune")
    memory = {"geometric": True, "jitter": 0.0} if problem.in_memory else {}
    feed = Feed(
        problem.train,
        "tune",
        lambda step: sampler[step],
        _share(config, run),
        ("tune", seed),
        epochs * len(sampler),
        config.workers,
        **memory,
    )
    mix = mixer(config, problem.classes)

    def loss_of(model: Any, step: int, batch: tuple[Any, Any], positions: Tensor) -> dict[str, Tensor]:
        images, labels = mix(*batch)
        smoothing = 0.0 if labels.is_floating_point() else config.smoothing  # mixed labels are smoothed already
        return {"loss": F.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)}

    decay = 1.0 if scratch else config.layer_decay
    groups = parameter_groups(net, config.tune_weight_decay, net.depth, decay, undecayed=TOKENS)
    schedule = warmup_cosine(
        config.tune_blr, config.tune_batch, config.min_lr, config.tune_warmup, epochs, len(sampler)
    )
    keep = fit(run, unit, net, groups, feed, schedule, loss_of, (0.9, 0.999), len(sampler))
    stem = f"{size}/{name}"
    metrics = {f"{config.dataset}/{stem}/top1": accuracy(config, run, net, problem.test)}
    if epochs:
        metrics[f"{config.dataset}/{stem}/train_loss"] = unit.state["final"]
    if config.dataset == "imagenet" and config.robustness:
        metrics |= robustness(config, run, net, problem, stem)
    if config.dataset == "imagenet":
        keep |= {f"net.{k}": v.detach().cpu() for k, v in net.state_dict().items()}
    unit.finish(metrics, {f"{config.dataset}/{stem}/tune_seconds": unit.seconds}, keep)


def load_student(config: Config, run: Run, net: VisionTransformer, key: tuple[Any, ...]) -> None:
    """Weights of the pre-trained student, from its file or from the unit that pre-trained it."""
    seed, name, _ = key
    if ARMS[name].how == "scratch":
        return
    if not config.pretrained:
        load(net, weights_of(run, (seed, name, f"pretrain-{config.student}")), "pre-trained student")
        return
    path = _folder(run.data, config.dataset) / config.pretrained
    state = read_checkpoint(path, pretrained=False)
    tested = config.tune_epochs == 0 and isinstance(net, Classifier)
    missing = load(net, {k: x for k, x in state.items() if tested or not k.startswith("head.")}, str(path))
    if tested and missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: --tune-epochs 0 expects a fine-tuned network")


def mixer(config: Config, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup and CutMix by timm, or nothing."""
    if not (config.mixup or config.cutmix):
        return lambda images, labels: (images, labels)
    from timm.data import Mixup

    made = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:  # it pairs the images of a batch
            images, labels = images[:-1], labels[:-1]
        return made(images, labels)

    return mix


@torch.no_grad()
def accuracy(config: Config, run: Run, net: nn.Module, source: Any, classes: Tensor | None = None) -> float:
    """Top-1; ``classes``: only these logits count."""
    net.eval()
    counts = torch.zeros(2, dtype=torch.float64)  # right, all
    for images, labels in in_order(source, EVALUATION_BATCH, config.workers, run.rank, run.world_size):
        with precision(run):
            logits = net(images.to(run.device)).float().cpu()
        if classes is not None:
            hidden = torch.ones(logits.shape[1], dtype=torch.bool)
            hidden[classes] = False
            logits[:, hidden] = -math.inf
        counts += torch.tensor([int((logits.argmax(1) == labels).sum()), len(labels)], dtype=torch.float64)
    right, count = run.mean_over_processes(counts).tolist()
    return right / count


def robustness(config: Config, run: Run, net: nn.Module, problem: Problem, stem: str) -> dict[str, float]:
    """Top-1 on ImageNet-A and -R, mean error and mCE on ImageNet-C, of those that lie below ``--data``."""
    root = _folder(run.data, "imagenet")
    how = Augmentation(config.image)

    def images(folder: Path) -> FolderImages:
        return FolderImages(*scan_classes(folder, problem.names)[:2], "test", how)

    out = {}
    for name in ROBUSTNESS_COUNTS:
        if (root / name).is_dir():
            source = images(root / name)
            out[f"{name}/{stem}/top1"] = accuracy(config, run, net, source, source.labels.unique())
    if (root / "imagenet-c").is_dir():
        errors = {name: [] for name in CORRUPTIONS}
        for name, folder in corruption_folders(root / "imagenet-c"):
            errors[name].append(1 - accuracy(config, run, net, images(folder)))
        mean = {name: sum(values) / len(values) for name, values in errors.items()}
        out[f"imagenet-c/{stem}/mean_error"] = sum(mean.values()) / len(mean)
        out[f"imagenet-c/{stem}/mce"] = sum(mean[name] / base for name, base in CORRUPTIONS.items()) / len(mean)
    return out


def segment_phase(config: Config, run: Run, unit: Unit) -> None:
    """Fine-tune a pre-trained student with UperNet on ADE20K and test it with a sliding window."""
    seed, name, _ = unit.key
    root = _folder(run.data, "ade20k")
    train = Ade20k(scan_ade20k(root, "training"), config.image)
    test = Ade20k(scan_ade20k(root, "validation"), None)
    run.data_used("ade20k", "real", spec=[[p.name for p, _ in half.pairs] for half in (train, test)])
    torch.manual_seed(run.derive_seed("initial weights", seed))
    net = make_segmenter(config)
    load_student(config, run, net.backbone, unit.key)
    sampler = epochs_of(run, len(train), config.tune_batch, seed, "segment")
    total = config.iterations
    share = _share(config, run)
    feed = Feed(train, "tune", lambda step: sampler[step], share, ("segment", seed), total, config.workers)
    peak = config.tune_blr * config.tune_batch / 256

    def schedule(step: int) -> float:
        """Linear decay to 0, with a linear warm-up."""
        return peak * (1 - step / total) * min(1.0, max(1e-6, step / max(config.tune_warmup, 1)))

    def loss_of(model: Any, step: int, batch: tuple[Any, Any], positions: Tensor) -> dict[str, Tensor]:
        return model(*batch)

    depth = SIZES[config.student].depth
    groups = parameter_groups(net, config.tune_weight_decay, depth, config.layer_decay, "backbone.", TOKENS)
    keep = fit(run, unit, net, groups, feed, schedule, loss_of, (0.9, 0.999), max(1, total // 100))
    counts = evaluate_segmentation(config, run, net, test)
    stem = f"ade20k/{config.student}/{name}"
    metrics = {f"{stem}/{metric}": value for metric, value in segmentation_scores(counts).items()}
    unit.finish(metrics, {f"{stem}/seconds": unit.seconds}, keep)


def make_segmenter(config: Config) -> Segmenter:
    """Backbone and UperNet of the configuration."""
    size, star = config.student, config.student == "star"
    with user_errors():
        channels = config.channels if star else 0
        backbone = Backbone(SIZES[size], config.image, config.patch, config.tune_drop_path, star, channels)
        return Segmenter(backbone, config.channels, ADE_CLASSES)


@torch.no_grad()
def evaluate_segmentation(config: Config, run: Run, net: Segmenter, test: Ade20k) -> Tensor:
    """Confusion matrix over the test images, each at its own size."""
    net.eval()
    counts = torch.zeros(ADE_CLASSES, ADE_CLASSES, dtype=torch.float64)
    for image, truth in in_order(test, 1, config.workers, run.rank, run.world_size):
        with precision(run):
            logits = slide(net, image[0].to(run.device), ADE_CLASSES, config.image, config.stride)
        logits = F.interpolate(logits[None], size=tuple(truth.shape[1:]), mode="bilinear", align_corners=False)
        counts += confusion(logits[0].argmax(0).cpu(), truth[0], ADE_CLASSES)
    return run.mean_over_processes(counts)


# ---- the run ---------------------------------------------------------------------------------------------------------


def units(config: Config, seeds: list[int]) -> Iterator[tuple[Any, ...]]:
    """Every unit of work, in the order in which they depend on each other."""
    arms = {name: ARMS[name] for name in config.arms}
    distilled = any(arm.how == "distil" for arm in arms.values()) and not config.pretrained
    if config.teacher_from == "trained" and (distilled or not arms):
        yield ("teacher",)
    for seed in seeds:
        for name, arm in arms.items():
            if arm.how != "scratch" and not config.pretrained:
                for size in stages(config, arm):
                    yield (seed, name, f"pretrain-{size}")
            yield (seed, name, "tune")


def train(config: Config, run: Run) -> None:
    """Pre-train and fine-tune every arm with every seed, then decide the claims and draw the figure."""
    problem = Problem(config, run)
    if config.teacher_from == "shipped" and any(ARMS[arm].how == "distil" for arm in config.arms):
        shipped_teacher()  # said before anything is computed
    for unit in run.units(units(config, run.seeds)):
        if unit.key == ("teacher",):
            teacher_phase(config, run, unit, problem)
        elif unit.key[2] != "tune":
            pretrain_phase(config, run, unit, problem)
        elif config.dataset == "ade20k":
            segment_phase(config, run, unit)
        else:
            tune_phase(config, run, unit, problem)
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run))


def decide(config: Config, run: Run) -> None:
    """The paper's statements as comparisons of mean top-1 (thresholds: paper.toml), those whose arms were run."""
    top1 = {arm: run.metrics[f"{config.dataset}/{config.student}/{arm}/top1"].mean for arm in config.arms}
    for claim, other in (
        ("beats_scratch", "scratch"),
        ("beats_mae", "mae"),
        ("teacher_matters", "untrained_teacher"),
        ("relations_beat_features", "feature"),
        ("relations_beat_cls", "cls"),
    ):
        if {"tinymim", other} <= set(top1):
            margin = run.threshold(claim)
            run.claim(claim, top1["tinymim"] - top1[other] >= margin, tinymim=top1["tinymim"], **{other: top1[other]})


def draw(config: Config, run: Run) -> Any:
    """Accuracy of the arms, loss curves, and rows of relation maps."""
    figure, axes = report.figure(1, 3, width=4.2, height=3.4)
    bars, curves, maps = axes
    metric = "miou" if config.dataset == "ade20k" else "top1"
    rows = {arm: run.metrics[f"{config.dataset}/{config.student}/{arm}/{metric}"] for arm in config.arms}
    places = range(len(rows))
    bars.barh(places, [row.mean for row in rows.values()], xerr=[row.std for row in rows.values()], color="#0072b2")
    bars.set_yticks(places, list(rows), fontsize=7)
    bars.invert_yaxis()
    bars.set(title=f"{config.dataset}, {config.student}", xlabel=metric)
    maps.set_axis_off()
    for key in units(config, run.seeds[:1]):
        kept = run.kept(key)
        if key == ("teacher",) or key[2] != "tune":
            label = "teacher" if key == ("teacher",) else f"{key[1]} {key[2].removeprefix('pretrain-')}"
            curves.plot(kept["curve"][:, 0], kept["curve"][:, 1], label=label)
        if "map_images" in kept and key[1] == "tinymim":
            maps.imshow(tiles(kept))
            maps.set_title("image, R^VV of teacher and student", fontsize=8)
    curves.set(title="pre-training loss, first seed", xlabel="step", yscale="log")
    if curves.lines:
        curves.legend(fontsize=6)
    return figure


def tiles(kept: dict[str, Tensor]) -> Any:
    """One row an image: the image, the teacher's map, the student's; (rows, columns, 3) in [0, 1]."""
    images = kept["map_images"].float() / 255
    side = images.shape[-1]
    columns = [images]
    for name in ("map_teacher", "map_student"):
        grid = kept[name][:, None] / kept[name].amax((1, 2))[:, None, None, None]
        columns.append(F.interpolate(grid, size=(side, side), mode="nearest").expand(-1, 3, -1, -1))
    rows = torch.cat([F.pad(column, (1, 1, 1, 1), value=1.0) for column in columns], 3)
    return torch.cat(list(rows), 1).permute(1, 2, 0).clamp(0, 1).numpy()


# ---- --check-data ----------------------------------------------------------------------------------------------------


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says: each part that the configuration needs, its counts and what was expected."""
    if config.dataset == "shapes":
        lines = ["shapes: generated; nothing to look for"]
        if config.teacher_from == "shipped":
            shipped_teacher()
            lines.append(f"teacher: weights/{SHIPPED.name}")
        return lines
    root = _folder(folder, config.dataset)
    lines = []
    if config.dataset == "cifar10":
        path = find_cifar10(root)
        expected = CIFAR_COUNTS["cifar-10-batches-bin" if path.is_dir() else path.name]
        for (split, images), count in zip(load_cifar10(root).items(), expected, strict=True):
            lines.append(_counted(f"cifar10 {split}", len(images), count, path))
        return lines
    if config.dataset == "imagenet":
        names: list[str] | None = None
        for split, count in IMAGENET_COUNTS.items():
            if split == "train" and not config.tune_epochs:
                continue
            files, _, names = scan_classes(root / split, names)
            lines.append(_counted(f"imagenet {split}, {len(names)} classes", len(files), count, root / split))
        for name, count in ROBUSTNESS_COUNTS.items():
            if (root / name).is_dir():
                lines.append(_counted(name, len(scan_classes(root / name, names)[0]), count, root / name))
        if (root / "imagenet-c").is_dir():
            lines.append(f"imagenet-c: {len(list(corruption_folders(root / 'imagenet-c')))} folders")
    else:
        for split, count in ADE_COUNTS.items():
            lines.append(_counted(f"ade20k {split}", len(scan_ade20k(root, split)), count, root))
    distilled = any(ARMS[arm].how == "distil" for arm in config.arms) and not config.pretrained
    file = config.teacher_from if distilled and config.teacher_from not in ("shipped", "trained") else config.pretrained
    if file:
        state = read_checkpoint(root / file, pretrained=not config.pretrained)
        lines.append(f"{file}: {len(state)} tensors, {sum(v.numel() for v in state.values())} numbers")
    return lines


def _counted(what: str, found: int, expected: int, path: Path) -> str:
    verdict = "as expected" if found == expected else f"EXPECTED {expected}"
    return f"{what}: {found} images ({verdict}) in {path}"


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
