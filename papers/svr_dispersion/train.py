"""Train single-view reconstruction networks on more and less dispersed data; measure how dispersed their outputs are.

The default run trains AtlasNet on generated images and shapes between a sphere and a cube, and repeats the authors'
2-D demonstration of the score; the presets hold the paper's experiments on the authors' files and on ShapeNet.
"""

from __future__ import annotations

import operator
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared import cli
from shared.cli import Preset

EXPERIMENTS = ("metric_demo", "synthetic", "more_imgs", "more_shapes", "nviews", "baselines")
SOURCES = {
    "spherecube": ("metric_demo", "synthetic"),
    "cubesphere": ("synthetic",),
    "modelnet10": ("more_imgs", "more_shapes", "nviews", "baselines"),
    "shapenet": ("more_imgs", "more_shapes", "nviews", "baselines"),
    "clusters": ("metric_demo",),
}
"""Where data comes from, and the experiments that it allows."""
NETWORKS = ("atlasnet-sphere", "atlasnet-squares", "foldnet", "psgn", "occnet")
CLASSES = {
    "modelnet10": (
        *("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet"),
    ),
    "shapenet": (
        *("airplane", "bench", "cabinet", "car", "chair", "display", "lamp", "loudspeaker"),
        *("rifle", "sofa", "table", "telephone", "vessel"),
    ),
}
WITH_OCCUPANCY = ("spherecube", "modelnet10")


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the paper's sizes."""

    source: str = "spherecube"
    """Where images and shapes come from: spherecube (generated), cubesphere (the authors' files of it), shapenet,
    modelnet10 (voxels), clusters (the authors' 2-D demo)."""
    experiments: tuple[str, ...] = ("synthetic",)
    """What to measure: metric_demo synthetic more_imgs more_shapes nviews baselines."""
    networks: tuple[str, ...] = ("atlasnet-sphere",)
    """Networks to train: atlasnet-sphere atlasnet-squares foldnet psgn occnet."""
    frames: tuple[str, ...] = ("oc", "vc")
    """more_shapes and baselines: object-centred and viewer-centred shapes."""
    image_sizes: tuple[int, ...] = (1, 5, 10, 15, 20, 25, 30, 35)
    """synthetic: widths of the clusters of images, in hundredths, while the clusters of shapes stay the tightest."""
    shape_sizes: tuple[int, ...] = (1, 5, 10, 15, 20, 25, 30, 35)
    """synthetic: widths of the clusters of shapes while those of images stay the widest."""
    yaw_ranges: tuple[int, ...] = (0, 15, 30, 45, 60, 75, 90)
    """more_imgs: largest yaw of the training images, in degrees; all are tested on the last."""
    views: tuple[int, ...] = (1, 3, 6, 9, 12, 15, 18)
    """nviews: training images of a shape."""
    classes: tuple[str, ...] = ()
    """shapenet, modelnet10: classes to use (default: all)."""
    encoder: str = "resnet18"
    """Image encoder: resnet18 (images of 224 pixels) or small."""
    image_side: int = 224
    """Pixels along a side of an image."""
    code: int = 1024
    """Numbers in the code between encoder and decoder."""
    hidden: int = 512
    """Width of the decoder."""
    points: int = 2500
    """Points of a training cloud and of an output cloud."""
    primitives: int = 25
    """Squares of atlasnet-squares."""
    icosphere: int = 4
    """Subdivisions of the sphere that atlasnet-sphere deforms when it is evaluated (4: 2,562 points)."""
    resolution: int = 32
    """occnet: cells along a side of the grid on which it is evaluated."""
    epochs: int = 1199
    """Passes over the training set."""
    decays: tuple[int, ...] = (800, 1000, 1100)
    """After how many epochs the learning rate falls to a tenth; Adam begins anew, as in the authors' code."""
    batch: int = 8
    """Images a step, over all processes."""
    micro_batch: int = 0
    """Most images in one forward pass on one device; 0: no limit."""
    lr: float = 1e-3
    """Adam learning rate."""
    clusters: int = 2
    """K of the dispersion score (the paper: 2 for the synthetic study, 500 for ShapeNet)."""
    method: str = "k-medoids"
    """Clustering of the score: k-medoids affinity-propagation hierarchical."""
    cluster_seed: int = 1
    """Seed of that clustering."""
    image_features: str = "vgg"
    """Features whose differences are the distance of images: vgg (relu3_3 of ImageNet's VGG-16; its weights lie in
    --data) or pooled (mean colours of 16 x 16 patches)."""
    score_points: int = 2500
    """Points a cloud when the dispersion of training shapes is scored."""
    score_items: int = 0
    """Score at most so many items of a set, evenly chosen; 0: all."""
    stored_points: int = 2000
    """spherecube, modelnet10: points kept of a shape, from which training clouds are drawn."""
    train_shapes: int = 1000
    """modelnet10: most training shapes."""
    test_shapes: int = 200
    """spherecube, modelnet10: test shapes (modelnet10: at most)."""
    classifier_epochs: int = 30
    """baselines: passes over the training set of the Clustering baseline's classifier; the learning rate falls to a
    tenth after each third."""
    classifier_batch: int = 32
    """baselines: images a step of that classifier."""
    data_seed: int = 0
    """Seed of generated, sampled and subsampled data."""

    def __post_init__(self) -> None:
        _among("source", (self.source,), tuple(SOURCES))
        _among("experiments", self.experiments, SOURCES[self.source])
        _among("networks", self.networks, NETWORKS)
        _among("frames", self.frames, ("oc", "vc"))
        _among("encoder", (self.encoder,), ("resnet18", "small"))
        _among("method", (self.method,), ("k-medoids", "affinity-propagation", "hierarchical"))
        _among("image-features", (self.image_features,), ("vgg", "pooled"))
        if self.classes:
            _among("classes", self.classes, CLASSES.get(self.source, ()))
        for name in ("image_sizes", "shape_sizes", "yaw_ranges", "views"):
            _numbers(name, getattr(self, name), *{"yaw_ranges": (0, 90), "views": (1, 23)}.get(name, (1, 38)))
        for name in (
            *("code", "hidden", "points", "primitives", "icosphere", "resolution", "epochs", "batch", "clusters"),
            *("score_points", "stored_points", "train_shapes", "test_shapes", "classifier_epochs", "classifier_batch"),
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("micro_batch", "score_items", "data_seed", "cluster_seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("image_side", self.image_side, 16)
        if self.encoder == "resnet18" and self.image_side != 224:
            raise ValueError(
                f"--image-side is {self.image_side}: ResNet's 7 x 7 pooling expects 224 (or --encoder small)"
            )
        if self.image_features == "vgg" and self.image_side != 224 and self.experiments != ("metric_demo",):
            raise ValueError(f"--image-side is {self.image_side}: VGG features expect 224 (or --image-features pooled)")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr is {self.lr}, expected a positive number")
        if list(self.decays) != sorted(set(self.decays)) or (self.decays and self.decays[0] < 1):
            raise ValueError(f"--decays are {self.decays}, expected ascending numbers of epochs")
        if "occnet" in self.networks and self.source not in WITH_OCCUPANCY:
            raise ValueError(f"--networks: occnet needs to know what is inside, --source {self.source} has points only")


def _among(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    wrong = [value for value in values if value not in known]
    if wrong or not values or len(set(values)) < len(values):
        raise ValueError(
            f"--{name} is {' '.join(values) or 'empty'}, expected one or more of {', '.join(known)}, each once"
        )


def _numbers(name: str, values: tuple[int, ...], low: int, high: int) -> None:
    flag = "--" + name.replace("_", "-")
    if not values or list(values) != sorted(set(values)) or values[0] < low or values[-1] > high:
        raise ValueError(f"{flag} is {values}, expected ascending numbers between {low} and {high}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


SMALL: dict[str, Any] = {
    "encoder": "small",
    "image_features": "pooled",
    "image_side": 32,
    "code": 128,
    "hidden": 128,
    "points": 400,
    "icosphere": 2,
    "score_points": 2000,
}
SHAPENET: dict[str, Any] = {
    "source": "shapenet",
    "epochs": 120,
    "decays": (90, 110, 115),
    "batch": 64,
    "clusters": 500,
}
GPU = "1 GPU of 24 GB"
SHAPENET_DATA = "ShapeNetV1PointCloud/, ShapeNetV1Renderings/, vgg16-397923af.pth"
NOT_SEEN = "the paper's table was not seen"
PRESETS = {
    "default": Preset(
        Config(
            experiments=("metric_demo", "synthetic"),
            image_sizes=(1, 12, 24, 35),
            shape_sizes=(12, 24, 35),
            **SMALL | {"image_side": 64},
            epochs=167,
            decays=(112, 140, 154),
        ),
        seeds=3,
        data="generated: the 2-D demo, shapes between a sphere and a cube",
        hours=0.08,
        why_not_comparable="generated images and shapes, small network",
    ),
    "smoke": Preset(
        Config(
            experiments=("metric_demo", "synthetic"),
            image_sizes=(1, 35),
            shape_sizes=(35,),
            **SMALL | {"code": 16, "hidden": 16, "points": 64, "icosphere": 1, "score_points": 100},
            stored_points=100,
            test_shapes=12,
            epochs=2,
            decays=(1,),
        ),
        data="generated",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated data",
    ),
    "metric-demo": Preset(
        Config(source="clusters", experiments=("metric_demo",), cluster_seed=0),
        data="the authors' dim2_ncls8_side25_nsample200_seed2_std*.npz and scores",
        hours=0.002,
        needs_data=True,
        claims=False,
    ),
    "modelnet10-voxels": Preset(
        Config(
            source="modelnet10",
            experiments=("more_imgs", "more_shapes", "baselines"),
            networks=("atlasnet-sphere", "psgn", "foldnet", "occnet"),
            yaw_ranges=(0, 45, 90),
            classes=("chair", "table", "toilet"),
            **SMALL | {"icosphere": 3, "score_points": 400},
            resolution=24,
            train_shapes=640,
            epochs=60,
            decays=(45, 55, 58),
            batch=32,
            clusters=20,
        ),
        data="modelnet10_voxels32_packed.npz",
        hours=0.3,
        needs_data=True,
        claims=False,
        why_not_comparable="depth images of 32^3 voxels, three classes, small networks",
    ),
    "synthetic": Preset(
        Config(source="cubesphere"),
        seeds=[1, 2, 3],
        data="cubesphere_1000/, vgg16-397923af.pth",
        hardware=GPU,
        hours=12,
        needs_data=True,
        claims=False,
        note="16 training sets",
    ),
    "more-imgs": Preset(
        Config(experiments=("more_imgs",), **SHAPENET),
        seeds=[1, 2, 3],
        data="ShapeNetV1PointCloud/, ShapeNetV1RenderingAnglelimit/, vgg16-397923af.pth",
        hardware=GPU,
        hours=300,
        needs_data=True,
        claims=False,
        why_not_comparable=NOT_SEEN,
        note="7 yaw ranges",
    ),
    "more-shapes": Preset(
        Config(
            experiments=("more_shapes",),
            networks=("atlasnet-sphere", "atlasnet-squares", "foldnet", "psgn"),
            **SHAPENET,
        ),
        seeds=[1, 2, 3],
        data=SHAPENET_DATA,
        hardware=GPU,
        hours=350,
        needs_data=True,
        claims=False,
        why_not_comparable=NOT_SEEN,
        note="object- and viewer-centred, 4 networks",
    ),
    "nviews": Preset(
        Config(experiments=("nviews",), **SHAPENET),
        seeds=[1, 2, 3],
        data=SHAPENET_DATA,
        hardware=GPU,
        hours=900,
        needs_data=True,
        claims=False,
        why_not_comparable=NOT_SEEN,
        note="1 to 18 views, viewer-centred",
    ),
    "baselines": Preset(
        Config(experiments=("baselines",), **SHAPENET),
        seeds=[1],
        data=f"{SHAPENET_DATA}, resnet50-0676ba61.pth",
        hardware=GPU,
        hours=20,
        needs_data=True,
        claims=False,
        why_not_comparable=NOT_SEEN,
        note="Clustering with a ResNet-50 classifier, and Oracle NN",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402
from shared.shapes import sample_voxels  # noqa: E402

from data import (  # noqa: E402
    CROP,
    CUBESPHERE,
    DEMO_CLUSTERS,
    DEMO_SPREADS,
    SHAPENET_CLOUDS,
    SHAPENET_COUNTS,
    VOXELS,
    MemoryViews,
    ShapeNetViews,
    Shapes,
    Views,
    cluster_values,
    cubesphere_entries,
    cubesphere_list,
    depth_images,
    generate_blobs,
    load_blobs,
    load_cubesphere,
    load_demo_scores,
    load_modelnet,
    read_modelnet,
    shapenet_renderings,
    sphere_cube_views,
    test_values,
)
from model import (  # noqa: E402
    PerceptualFeatures,
    build,
    build_classifier,
    camera_rotations,
    chamfer,
    chamfer_matrix,
    dispersion_score,
    f_score,
    feature_distances,
    iou_distances,
    k_medoids,
    pooled_features,
    squared_distances,
    to_object,
    to_viewer,
)

EVALUATION_BATCH = 64
VGG_WEIGHTS, RESNET50_WEIGHTS = "vgg16-397923af.pth", "resnet50-0676ba61.pth"
ELEVATIONS = (20.0, 30.0)
ROUNDING = 1e-6
"""Scores below are those of equal clouds: what is left is the rounding of their distances."""


# ---- experiments -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One thing to train and measure.

    Attributes:
        name: in metrics. model: among ``NETWORKS``, or "clustering" or "oracle". train, test: keys of sets.
        viewer: shapes are in the frame of the camera.
    """

    name: str
    model: str
    train: str
    test: str
    viewer: bool = False


def arms(config: Config) -> list[Arm]:
    """Everything that the experiments of a configuration train, in order."""
    out = []
    one_view = f"views-{config.views[0]:02d}"
    if "synthetic" in config.experiments:
        keys = [f"image-{size:02d}" for size in config.image_sizes] + [
            f"shape-{size:02d}" for size in config.shape_sizes
        ]
        out += [Arm(key, config.networks[0], key, "test") for key in keys]
    if "more_imgs" in config.experiments:
        keys = [f"yaw-{yaw:03d}" for yaw in config.yaw_ranges]
        out += [Arm(key, config.networks[0], key, keys[-1]) for key in keys]
    if "more_shapes" in config.experiments:
        pairs = [(frame, network) for frame in config.frames for network in config.networks]
        out += [Arm(f"{frame}-{network}", network, one_view, one_view, frame == "vc") for frame, network in pairs]
    if "nviews" in config.experiments:
        keys = [f"views-{count:02d}" for count in config.views]
        out += [Arm(key, config.networks[0], key, key, True) for key in keys]
    if "baselines" in config.experiments:
        pairs = [(frame, model) for frame in config.frames for model in ("clustering", "oracle")]
        out += [Arm(f"{frame}-{model}", model, one_view, one_view, frame == "vc") for frame, model in pairs]
    return out


@dataclass
class Sets:
    """Training and test sets of a run, each made once."""

    config: Config
    run: Run
    made: dict[tuple[str, str], Views] = field(default_factory=dict)
    shapes: dict[str, Shapes] = field(default_factory=dict)

    def get(self, key: str, split: str) -> Views:
        """A set by key: ``image-05``, ``shape-05``, ``test``, ``yaw-045`` or ``views-03``."""
        if (key, split) not in self.made:
            make = {"spherecube": self._spherecube, "cubesphere": self._cubesphere, "modelnet10": self._modelnet}
            self.made[key, split] = make.get(self.config.source, self._shapenet)(key, split)
        return self.made[key, split]

    def _spherecube(self, key: str, split: str) -> Views:
        config = self.config
        if split == "test":
            images = shapes = test_values(config.test_shapes)
        else:
            kind, _, size = key.partition("-")
            images = cluster_values(int(size) if kind == "image" else config.image_sizes[-1])
            shapes = cluster_values(int(size) if kind == "shape" else config.image_sizes[0])
        generator = self.run.generator("sphere to cube", key, split, config.data_seed)
        return sphere_cube_views(images, shapes, config.image_side, config.stored_points, generator)

    def _cubesphere(self, key: str, split: str) -> Views:
        return load_cubesphere(self.run.data, key, self.config.image_side)

    def _modelnet(self, key: str, split: str) -> Views:
        config, run = self.config, self.run
        if split not in self.shapes:
            count = config.train_shapes if split == "train" else config.test_shapes
            generator = run.generator("modelnet10", split, config.data_seed)
            names = config.classes or CLASSES["modelnet10"]
            self.shapes[split] = load_modelnet(run.data, split, names, count, config.stored_points, generator)
        shapes = self.shapes[split]
        kind, _, number = key.partition("-")
        repeat = int(number) if kind == "views" and split == "train" else 1
        which = torch.arange(len(shapes.clouds)).repeat_interleave(repeat)
        draw = torch.rand(2, len(which), generator=run.generator("cameras", split, config.data_seed))
        yaw = (2 * draw[0] - 1) * (180.0 if kind == "views" else float(number))
        rotations = camera_rotations(yaw, ELEVATIONS[0] + (ELEVATIONS[1] - ELEVATIONS[0]) * draw[1])
        clouds = shapes.clouds[which]
        pictures = depth_images(to_viewer(clouds, rotations), config.image_side)

        def inside(index: Tensor, points: Tensor) -> Tensor:
            return shapes.inside(which[index], points)

        return MemoryViews(pictures, clouds, rotations, shapes.labels[which], inside)

    def _shapenet(self, key: str, split: str) -> Views:
        found = shapenet_renderings(self.run.data, key, split, self.config.classes or CLASSES["shapenet"])
        angles = torch.tensor([[item.azimuth, item.elevation] for item in found])
        crop = 0 if key.startswith("yaw") else CROP
        return ShapeNetViews(found, camera_rotations(*angles.unbind(1)), self.config.image_side, crop)


def describe_data(config: Config, run: Run) -> None:
    """Tell the run what it reads."""
    if config.source == "spherecube":
        fields = ("image_sizes", "shape_sizes", "image_side", "stored_points", "test_shapes", "data_seed")
        run.data_used("spherecube", "generated", spec={name: getattr(config, name) for name in fields})
    elif run.data is None:
        raise UserError(f"--source {config.source} needs --data DIR")
    elif config.source == "modelnet10":
        run.data_used("modelnet10", "real", path=run.data / VOXELS)
    elif config.source == "shapenet":  # too large to be read for a hash: names and sizes tell the versions apart
        folder = run.data / SHAPENET_CLOUDS
        files = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in sorted(folder.rglob("*.npy"))]
        run.data_used("shapenet", "real", spec=files)
    else:
        run.data_used(config.source, "real", path=run.data)


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says: sets found, their counts, and what was expected."""
    lines = []
    every = arms(config)
    used = dict.fromkeys([(arm.train, "train") for arm in every] + [(arm.test, "test") for arm in every])
    if config.source == "spherecube":
        return [f"spherecube: generated, {len(used)} sets of images and shapes; nothing to look for"]
    if config.source == "clusters":
        for spread in DEMO_SPREADS:
            lines.append(f"clusters, deviation {spread}: {len(load_blobs(folder, spread))} points (200 expected)")
        assert folder is not None
        lines.append(f"the authors' scores: {len(load_demo_scores(folder))} x {len(DEMO_CLUSTERS)} (8 x 50 expected)")
        return lines
    if config.source == "modelnet10":
        voxels = read_modelnet(folder)
        for split, expected in (("train", 3964), ("test", 901)):
            lines.append(f"modelnet10 {split}: {len(voxels[split].labels)} shapes ({expected} expected)")
        return lines
    for key, split in used:
        if config.source == "cubesphere":
            found_list = cubesphere_entries(folder, key)
            wanted = "20 expected" if split == "train" else "disjoint from training"
            lines.append(f"{CUBESPHERE}/{cubesphere_list(key)}: {len(found_list)} pairs ({wanted})")
        else:
            names = config.classes or CLASSES["shapenet"]
            found_views = shapenet_renderings(folder, key, split, names)
            shapes = len({item.cloud for item in found_views})
            verdict = f"{SHAPENET_COUNTS[split]} shapes expected" if not config.classes else "of the classes chosen"
            lines.append(f"shapenet {key} {split}: {len(found_views)} images of {shapes} shapes ({verdict})")
    if config.image_features == "vgg":
        lines.append(f"{weights_file(folder, VGG_WEIGHTS)}: found")
    return lines


def weights_file(folder: Path | None, name: str) -> Path:
    """A file of pre-trained weights in the data folder.

    Raises:
        UserError: not there.
    """
    path = (folder or Path(".")) / name
    if folder is None or not path.is_file():
        raise UserError(
            f"no {name} in {folder or '--data'}: torchvision's ImageNet weights of that name are needed there"
        )
    return path


def load_weights(folder: Path | None, name: str) -> dict[str, Tensor]:
    """Pre-trained weights by name.

    Raises:
        UserError: missing or unreadable.
    """
    path = weights_file(folder, name)
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise UserError(f"{path}: not readable weights ({type(error).__name__})") from error
    return state


# ---- scores ----------------------------------------------------------------------------------------------------


def scored(config: Config, count: int) -> Tensor:
    """Positions of the items of a set whose dispersion is measured."""
    limit = config.score_items or count
    return torch.arange(count) if count <= limit else torch.linspace(0, count - 1, limit).round().long()


def score(config: Config, distance: Tensor) -> float:
    """The dispersion score of a distance matrix with the configuration's clustering."""
    with user_errors():
        return dispersion_score(distance.cpu().numpy(), config.clusters, config.cluster_seed, config.method)


def image_features(config: Config, run: Run, views: Views, index: Tensor) -> Tensor:
    """Features of some images of a set, (N, d)."""
    if config.image_features == "pooled":
        return torch.cat([pooled_features(views.images(part)) for part in index.split(EVALUATION_BATCH)])
    encoder = PerceptualFeatures()
    with user_errors():
        encoder.load_vgg(load_weights(run.data, VGG_WEIGHTS))
    encoder.to(run.device).eval()
    return torch.cat([encoder(views.images(part).to(run.device)).cpu() for part in index.split(EVALUATION_BATCH)])


def score_inputs(config: Config, run: Run, unit: Unit, sets: Sets) -> None:
    """Dispersion of a training set's images and shapes, in each frame in which it is used."""
    key = unit.key[1]
    views = sets.get(key, "train")
    index = scored(config, len(views))
    features = image_features(config, run, views, index)
    out = {f"{config.source}/{key}/image_ds": score(config, feature_distances(features))}
    generator = run.generator("scored points", config.data_seed)
    clouds = torch.cat(
        [views.clouds(part, config.score_points, generator) for part in index.split(EVALUATION_BATCH)]
    ).to(run.device)
    for viewer in sorted({arm.viewer for arm in arms(config) if arm.train == key}):
        turned = to_viewer(clouds, views.rotations[index].to(run.device)) if viewer else clouds
        name = "shape_ds_vc" if viewer else "shape_ds"
        out[f"{config.source}/{key}/{name}"] = score(config, chamfer_matrix(turned))
    unit.finish(out)


def metric_demo(config: Config, run: Run, unit: Unit) -> None:
    """The score of the 2-D blobs for 2 to 100 clusters, and how much it depends on the seed of the clustering."""
    out, curves, points = {}, [], []
    for spread in DEMO_SPREADS:
        blobs = load_blobs(run.data, spread) if config.source == "clusters" else generate_blobs(spread)
        distance = np.square(blobs[:, None] - blobs).sum(-1)
        curves.append([dispersion_score(distance, k, 0) for k in DEMO_CLUSTERS])
        points.append(blobs)
        for k in (2, 8, 100):
            out[f"demo/std{spread}/k{k}/ds"] = curves[-1][DEMO_CLUSTERS.index(k)]
        restarts = [k_medoids(distance, 2, seed).inertia for seed in range(5)]
        out[f"demo/std{spread}/k2/largest_over_smallest_of_5_seeds"] = max(restarts) / min(restarts)
    if config.source == "clusters":
        assert run.data is not None
        published = np.array([load_demo_scores(run.data)[spread] for spread in DEMO_SPREADS])
        out["demo/largest_relative_difference"] = float(np.abs(np.array(curves) / published - 1).max())
    unit.finish(out, keep={"curves": np.array(curves), "points": np.array(points)})


# ---- training --------------------------------------------------------------------------------------------------


def make(config: Config, network: str) -> nn.Module:
    """A network at the configuration's sizes."""
    sizes = (config.code, config.hidden, config.points, config.primitives, config.icosphere)
    with user_errors():
        return build(network, config.encoder, *sizes)


def make_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(net.parameters(), config.lr, fused=next(net.parameters()).device.type in ("cpu", "cuda"))


def restart(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Begin anew with another learning rate: the authors make a new Adam at each decay, whose moments are zero."""
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.state.clear()
    for group in inner.param_groups:
        group["lr"] = lr


def begin_unit(config: Config, run: Run, unit: Unit, net: nn.Module) -> tuple[Any, Any]:
    """Model and optimiser on the device, restored where the unit was interrupted."""
    net = net.to(run.device)
    model, optimizer = run.setup(net, make_optimizer(net, config))
    unit.attach(model=model, optimizer=optimizer)
    return model, optimizer


def batch_loss(
    config: Config,
    arm: Arm,
    model: nn.Module,
    views: Views,
    index: Tensor,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """The loss of some samples: Chamfer distance, for occnet cross entropy of occupancy at random points."""
    images = views.images(index).to(device)
    rotations = views.rotations[index]
    if arm.model == "occnet":
        queries = 2 * torch.rand(len(index), config.points, 3, generator=generator) - 1
        assert views.inside is not None
        wanted = views.inside(index, to_object(queries, rotations) if arm.viewer else queries)
        return F.binary_cross_entropy_with_logits(model(images, queries.to(device)), wanted.to(device).float())
    clouds = views.clouds(index, config.points, generator)
    target = to_viewer(clouds, rotations) if arm.viewer else clouds
    return chamfer(target.to(device), model(images)).mean()


def train_network(config: Config, run: Run, unit: Unit, sets: Sets, arm: Arm) -> None:
    """Train and evaluate one network with one seed."""
    seed = unit.key[0]
    views = sets.get(arm.train, "train")
    torch.manual_seed(run.derive_seed("initial weights", seed))  # arms of a seed begin with the same network
    model, optimizer = begin_unit(config, run, unit, make(config, arm.model))
    sampler = EpochSampler(len(views), config.batch, run.derive_seed("order", seed))
    decays = {epoch * len(sampler): config.lr / 10 ** (i + 1) for i, epoch in enumerate(config.decays)}
    unit.state.setdefault("seconds", 0.0)
    model.train()
    for step in unit.steps(config.epochs * len(sampler)):
        begin = time.perf_counter()
        if step in decays:
            restart(optimizer, decays[step])
        index = sampler[step]
        generator = run.generator("points", seed, step)
        optimizer.zero_grad()
        mean = torch.zeros((), device=run.device)
        for part, weight in run.shard(index, config.micro_batch or None):
            loss = weight * batch_loss(config, arm, model, views, part, run.device, generator)
            run.backward(loss)
            mean += loss.detach()
        optimizer.step()
        unit.log(loss=mean)
        unit.state["seconds"] += time.perf_counter() - begin
    steps = config.epochs * len(sampler)
    model.eval()
    predict = predict_occupancy if arm.model == "occnet" else predict_clouds
    test = sets.get(arm.test, "test")
    clouds, grids = predict(config, run, arm, model, test)
    timings = {f"{config.source}/{arm.name}/step_seconds": unit.state["seconds"] / steps}
    finish(config, run, unit, arm, test, clouds, timings, grids)


Prediction = tuple[Tensor, Tensor | None]
"""Clouds (N, m, 3) in the object's frame and, from occnet, occupancy grids (N, R, R, R)."""


@torch.no_grad()
def predict_clouds(config: Config, run: Run, arm: Arm, model: nn.Module, test: Views) -> Prediction:
    """Output clouds of a test set, turned back into the object's frame."""
    out = []
    for part in torch.arange(len(test)).split(EVALUATION_BATCH):
        clouds = model(test.images(part).to(run.device)).float()
        out.append(to_object(clouds, test.rotations[part].to(run.device)) if arm.viewer else clouds)
    return torch.cat(out), None


@torch.no_grad()
def predict_occupancy(config: Config, run: Run, arm: Arm, model: nn.Module, test: Views) -> Prediction:
    """Occupancy on a grid in the object's frame, and points of its surface.

    The cell with the highest logit counts as occupied, so that no shape is empty.
    """
    size = config.resolution
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    queries = torch.cartesian_prod(axis, axis, axis).unsqueeze(0)
    grids = []
    for part in torch.arange(len(test)).split(8):
        points = queries.expand(len(part), -1, -1)
        points = to_viewer(points, test.rotations[part]) if arm.viewer else points
        logits = model(test.images(part).to(run.device), points.to(run.device)).cpu()
        grids.append(logits >= logits.amax(1, keepdim=True).clamp_max(0))
    occupied = torch.cat(grids).view(-1, size, size, size)
    cells = sample_voxels(occupied, config.points, run.generator("surface", config.data_seed))
    return (((cells + 0.5) / size * 2 - 1).to(run.device), occupied)


def finish(
    config: Config,
    run: Run,
    unit: Unit,
    arm: Arm,
    test: Views,
    clouds: Tensor,
    timings: dict[str, float] | None = None,
    grids: Tensor | None = None,
) -> None:
    """Dispersion of the outputs, and their distance to the truth."""
    generator = run.generator("truth", config.data_seed)
    distances, scores = [], []
    for part in torch.arange(len(test)).split(EVALUATION_BATCH):
        truth = test.clouds(part, config.points, generator).to(clouds.device)
        from_truth, from_output = squared_distances(truth, clouds[part])
        distances.append(from_truth.mean(1) + from_output.mean(1))
        scores.append(f_score(from_truth, from_output))
    index = scored(config, len(test))
    matrix = chamfer_matrix(clouds[index]).cpu()
    prefix = f"{config.source}/{arm.name}"
    metrics = {
        f"{prefix}/output_ds": score(config, matrix),
        f"{prefix}/test_chamfer": float(torch.cat(distances).mean()),
        f"{prefix}/test_f_score": float(torch.cat(scores).mean()),
    }
    if grids is not None:
        metrics[f"{prefix}/output_ds_iou"] = score(config, iou_distances(grids[index]))
    order = test.order[index].argsort(stable=True)
    shown = order[torch.linspace(0, len(order) - 1, 100).round().long().unique()]
    unit.finish(metrics, timings, {"matrix": matrix[shown][:, shown]})


# ---- recognition baselines -------------------------------------------------------------------------------------


def framed_clouds(config: Config, run: Run, arm: Arm, views: Views, purpose: str) -> Tensor:
    """All clouds of a set in the arm's frame, (N, points, 3) on the device."""
    generator = run.generator(purpose, config.data_seed)
    parts = torch.arange(len(views)).split(EVALUATION_BATCH)
    clouds = torch.cat([views.clouds(part, config.points, generator) for part in parts])
    return (to_viewer(clouds, views.rotations) if arm.viewer else clouds).to(run.device)


def finish_recognised(config: Config, run: Run, unit: Unit, arm: Arm, test: Views, clouds: Tensor) -> None:
    """Measure training shapes that were given as answers, turned back into the object's frame."""
    finish(config, run, unit, arm, test, to_object(clouds, test.rotations.to(clouds.device)) if arm.viewer else clouds)


def oracle(config: Config, run: Run, unit: Unit, sets: Sets, arm: Arm) -> None:
    """Oracle NN: the training shape that is nearest to the truth."""
    test = sets.get(arm.test, "test")
    known = framed_clouds(config, run, arm, sets.get(arm.train, "train"), "known shapes")
    truth = framed_clouds(config, run, arm, test, "oracle")
    finish_recognised(config, run, unit, arm, test, known[chamfer_matrix(truth, known).argmin(1)])


def clustering(config: Config, run: Run, unit: Unit, sets: Sets, arm: Arm) -> None:
    """Clustering: the training shapes' medoids, one of which a classifier chooses for an image."""
    seed = unit.key[0]
    views, test = sets.get(arm.train, "train"), sets.get(arm.test, "test")
    known = framed_clouds(config, run, arm, views, "known shapes")
    with user_errors():
        found = k_medoids(chamfer_matrix(known).cpu().numpy(), config.clusters, config.cluster_seed)
    labels, medoids = torch.from_numpy(found.labels), torch.from_numpy(found.medoids)
    torch.manual_seed(run.derive_seed("initial weights", seed))
    net = build_classifier(config.clusters, "small" if config.encoder == "small" else "resnet50")
    if config.encoder != "small":
        pretrained = load_weights(run.data, RESNET50_WEIGHTS)
        net.load_state_dict({k: v for k, v in pretrained.items() if not k.startswith("fc.")}, strict=False)
    model, optimizer = begin_unit(config, run, unit, net)
    sampler = EpochSampler(len(views), config.classifier_batch, run.derive_seed("order", seed))
    third = max(1, config.classifier_epochs // 3) * len(sampler)
    model.train()
    for step in unit.steps(config.classifier_epochs * len(sampler)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr / 10 ** (step // third)
        optimizer.zero_grad()
        mean = torch.zeros((), device=run.device)
        for part, weight in run.shard(sampler[step], config.micro_batch or None):
            logits = model(views.images(part).to(run.device))
            loss = weight * F.cross_entropy(logits, labels[part].to(run.device))
            run.backward(loss)
            mean += loss.detach()
        optimizer.step()
        unit.log(cross_entropy=mean)
    model.eval()
    with torch.no_grad():
        parts = torch.arange(len(test)).split(EVALUATION_BATCH)
        chosen = torch.cat([model(test.images(part).to(run.device)).argmax(1).cpu() for part in parts])
    finish_recognised(config, run, unit, arm, test, known[medoids[chosen].to(known.device)])


# ---- claims and figure -----------------------------------------------------------------------------------------


def rank_correlation(values: list[float]) -> float:
    """Spearman's correlation of a sequence with its order, 0 where all values are equal."""
    from scipy.stats import spearmanr

    return float(spearmanr(range(len(values)), values).statistic) if len(set(values)) > 1 else 0.0


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, on the means over seeds."""
    limit = run.threshold

    def means(keys: list[str], metric: str) -> list[float]:
        return [run.metrics[f"{config.source}/{key}/{metric}"].mean for key in keys]

    image_keys = [f"image-{size:02d}" for size in config.image_sizes]
    shape_keys = [image_keys[-1]] + [f"shape-{size:02d}" for size in config.shape_sizes]

    claim = "inputs_are_dispersed_as_meant"
    images, same, shapes = means(image_keys, "image_ds"), means(image_keys, "shape_ds"), means(shape_keys, "shape_ds")
    rising = min(b / a for values in (images, shapes) for a, b in pairwise(values))
    constant = (max(same) - min(same)) / max(shapes[-1] - shapes[0], 1e-12)  # equal shapes: another sampling only
    holds = rising >= limit(claim, "growth") and constant <= limit(claim, "constant")
    run.claim(claim, holds, least_growth=rising, spread_of_equal_over_rise=constant)

    for claim, keys, within in (
        ("dispersed_images_lead_to_recognition", image_keys, operator.le),
        ("dispersed_shapes_lead_to_reconstruction", shape_keys, operator.ge),
    ):
        outputs = [max(value, ROUNDING) for value in means(keys, "output_ds")]
        ratio, correlation = outputs[-1] / outputs[0], rank_correlation(outputs)
        holds = within(ratio, limit(claim, "ratio")) and within(correlation, limit(claim, "correlation"))
        run.claim(claim, holds, ratio=ratio, rank_correlation=correlation)

    claim = "score_equals_the_published_one"
    published = {row.metric: row.value for row in run.paper.reported if row.metric.startswith("demo/")}
    off = max(abs(run.metrics[name].mean / value - 1) for name, value in published.items())
    run.claim(claim, off <= limit(claim, "difference"), largest_relative_difference=off, values=len(published))


def draw(config: Config, run: Run) -> Any:
    """The figure: the demo, input against output dispersion, and distance matrices of outputs."""
    panels = []
    if "metric_demo" in config.experiments:
        panels += [draw_blobs, draw_demo]
    if arms(config):
        panels += [draw_scores, *(draw_matrix(arm) for arm in shown_arms(config))]
    columns = min(3, len(panels))
    figure, axes = report.figure(-(-len(panels) // columns), columns, width=3.0, height=2.8, squeeze=False)
    flat = axes.ravel()
    for axis, panel in zip(flat, panels, strict=False):
        panel(config, run, axis)
    for axis in flat[len(panels) :]:
        axis.set_axis_off()
    return figure


def shown_arms(config: Config) -> list[Arm]:
    """Arms whose distance matrices are drawn: ends of the synthetic study, else the first few."""
    every = {arm.name: arm for arm in arms(config)}
    ends = [
        f"image-{config.image_sizes[0]:02d}",
        f"image-{config.image_sizes[-1]:02d}",
        f"shape-{config.shape_sizes[-1]:02d}",
    ]
    return [every[name] for name in ends if name in every] or list(every.values())[:9]


def draw_blobs(config: Config, run: Run, axis: Any) -> None:
    """The tightest and the widest 2-D blobs."""
    points = run.kept((0, "demo"))["points"]
    axis.scatter(*points[-1].T.numpy(), s=4, label=f"std {DEMO_SPREADS[-1]}", color=report.COLOURS[1])
    axis.scatter(*points[0].T.numpy(), s=4, label=f"std {DEMO_SPREADS[0]}", color=report.COLOURS[0])
    axis.set(title="2-D demo: eight blobs")
    axis.legend(fontsize=7)


def draw_demo(config: Config, run: Run, axis: Any) -> None:
    """Score against the number of clusters."""
    for i, curve in enumerate(run.kept((0, "demo"))["curves"]):
        axis.semilogy(DEMO_CLUSTERS, curve.numpy(), lw=1, color=report.COLOURS[i], label=f"std {DEMO_SPREADS[i]}")
    axis.set(title="dispersion score", xlabel="clusters")
    axis.legend(fontsize=5, ncols=2)


def draw_scores(config: Config, run: Run, axis: Any) -> None:
    """Output dispersion of every arm."""
    names = [arm.name for arm in arms(config)]
    summaries = [run.metrics[f"{config.source}/{name}/output_ds"] for name in names]
    means, spreads = [s.mean for s in summaries], [s.std for s in summaries]
    axis.bar(
        range(len(names)), means, yerr=spreads, color=[report.COLOURS[n.startswith(("shape", "vc"))] for n in names]
    )
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set(title="output dispersion score")


def draw_matrix(arm: Arm) -> Any:
    """A panel with the distances of an arm's outputs on the test set, sorted by the true shape."""

    def panel(config: Config, run: Run, axis: Any) -> None:
        axis.imshow(run.kept((run.seeds[0], arm.name))["matrix"].numpy(), cmap="viridis")
        axis.set(title=f"{arm.name}: outputs' distances")
        axis.set_axis_off()

    return panel


def train(config: Config, run: Run) -> None:
    """Score the training sets, train every arm with every seed, decide the claims and draw the figure."""
    if run.device.type == "cpu" and config.encoder == "small":
        torch.set_num_threads(1)  # small tensors: a second thread brings little and waits badly beside another process
    describe_data(config, run)
    sets = Sets(config, run)
    demo = ["demo"] if "metric_demo" in config.experiments else []
    for unit in run.units((0, key) for key in demo):
        metric_demo(config, run, unit)
    for unit in run.units(("inputs", key) for key in dict.fromkeys(arm.train for arm in arms(config))):
        score_inputs(config, run, unit, sets)
    by_name = {arm.name: arm for arm in arms(config)}
    for unit in run.units((seed, name) for seed in run.seeds for name in by_name):
        arm = by_name[unit.key[1]]
        work = {"oracle": oracle, "clustering": clustering}.get(arm.model, train_network)
        work(config, run, unit, sets, arm)
    if run.preset.claims and {"metric_demo", "synthetic"} <= set(config.experiments):
        decide(config, run)
    run.figure(draw(config, run))


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
