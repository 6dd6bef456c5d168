"""Detect loops between scans with local 3D descriptors, RON and the scores beside it, then close them in a pose graph.

The default run trains a small DIP on generated streets, scores candidate pairs of a drive through another generated
city in two set-ups (loop closure with a drifting pose, relocalisation without), and optimises a pose graph with the
loops that RON accepts. The other presets read real scans, the authors' files, training fragments or a pose graph.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shared import cli
from shared.cli import Preset


@dataclass(frozen=True)
class Config:
    """Everything that decides a number. The defaults are the released networks and scripts."""

    source: Literal["city", "samples", "results", "kitti", "tum", "3dmatch", "eth", "g2o"] = "city"
    """What to work on: city (generated), or the files of samples, results, kitti, tum, 3dmatch, eth, g2o."""
    arms: tuple[str, ...] = ("dip", "fpfh")
    """Descriptors: dip, fpfh; stored takes those that the authors computed (KITTI). Others than the first are tried in
    the first set-up only."""
    setups: tuple[str, ...] = ("loop", "reloc")
    """Candidates: loop (inside the ellipse of the pose's uncertainty), reloc (without a pose)."""
    weights: str = ""
    """Checkpoint of a DIP (released final_chkpt.pth, or a unit's .safetensors of a run); empty: train one."""
    dim: int = 32
    """Length of a descriptor."""
    widths: tuple[int, int, int] = (256, 512, 1024)
    """Channels of the layers on points."""
    hidden: tuple[int, int] = (512, 256)
    """Widths of the layers behind the maximum."""
    dropout: float = 0.3
    """Dropout before the last batch normalisation."""
    patch: int = 256
    """Points of a patch."""
    radius: float = 2.0 * math.sqrt(3)
    """Radius of a patch and of FPFH, metres."""
    voxel: float = 0.3
    """Side of the cells that scans are thinned with, metres."""
    keypoints: int = 5000
    """Random key points of a scan."""
    fpfh_neighbours: int = 0
    """FPFH: use at most so many neighbours of a point, evenly spread; 0: all."""
    quality: float = 0.0
    """Leave out this share of the descriptors, those with the lowest rho (DIP's demos: 0.05)."""
    optimiser: Literal["sgd", "adam"] = "sgd"
    """Optimiser of DIP: SGD with momentum 0.9 as released, or Adam for short trainings."""
    lr: float = 1e-3
    """Learning rate, divided by ten every 15 epochs."""
    weight_decay: float = 1e-3
    """L2 penalty on the weights."""
    epochs: int = 40
    """Passes over the training pairs."""
    batch: int = 256
    """Correspondences of a training pair, by farthest-point sampling; one pair a step."""
    match_distance: float = 0.3
    """Training: mutual nearest points at most this far apart correspond, metres (scans; 3DMatch comes with its own)."""
    train_pairs: int = 16
    """City: pairs of scans to train on."""
    ransac_distance: float = 0.1
    """RANSAC: distance of an inlier, metres."""
    hypotheses: int = 20000
    """RANSAC: triples drawn."""
    ron_distance: float = 1.0
    """RON: largest distance of a mutual pair after registration, metres."""
    share: float = 0.5
    """Random share of the descriptors for the mutual nearest neighbours."""
    replacement: bool = False
    """Draw that share with replacement, as the released script does: duplicates break mutual pairs."""
    loop_overlap: float = 0.3
    """A pair is a loop when the scans' true overlap is larger."""
    gap: int = 100
    """Candidates are at least this many frames back."""
    travelled: float = 50.0
    """Loop set-up: candidates lie at least this much travelled distance back, metres."""
    candidate_step: int = 4
    """Loop set-up: score every so many candidates of a frame."""
    reloc_every: int = 20
    """Relocalisation: every so many earlier frames are candidates."""
    query_every: int = 1
    """Ask for loops at every so many frames."""
    step: float = 6.0
    """City: metres from one scan to the next."""
    blocks: int = 4
    """City: blocks along a side."""
    frames: int = 0
    """Use the first so many frames of a drive; 0: all."""
    camera: Literal["fr1", "fr2", "fr3", "icl"] = "fr1"
    """TUM RGB-D: the camera's intrinsics."""
    every: int = 20
    """TUM RGB-D: depth images from one key frame to the next."""
    drift: float = 0.01
    """Error of the odometry's steps, metres a metre."""
    drift_degrees: float = 0.2
    """Error of the odometry's rotations, degrees a metre."""
    graph_iterations: int = 20
    """Most Gauss-Newton steps of the pose graph."""
    data_seed: int = 0
    """Seed of the generated cities (the run's seed is added)."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the flag, its value and what is expected.
        """
        least = {"dim": 1, "patch": 4, "keypoints": 3, "epochs": 1, "batch": 2, "train_pairs": 1, "hypotheses": 1}
        least |= {"gap": 1, "candidate_step": 1, "reloc_every": 1, "query_every": 1, "blocks": 4, "every": 1}
        least |= {"frames": 0, "fpfh_neighbours": 0, "graph_iterations": 1, "data_seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected at least {value}")
        for name in ("radius", "voxel", "lr", "match_distance", "ransac_distance", "ron_distance", "step"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected a positive number")
        for name in ("weight_decay", "travelled", "drift", "drift_degrees"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected 0 or more")
        for name in ("dropout", "quality"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected at least 0 and below 1")
        for name in ("share", "loop_overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected above 0 and at most 1")
        for name, known in (("arms", ("dip", "fpfh", "stored")), ("setups", ("loop", "reloc"))):
            chosen = getattr(self, name)
            if not chosen or set(chosen) - set(known) or len(set(chosen)) < len(chosen):
                raise ValueError(f"{_flag(name)} {' '.join(chosen)}: expected different ones among {', '.join(known)}")
        if "stored" in self.arms and self.source != "kitti":
            raise ValueError(f"--arms stored needs --source kitti, the source is {self.source}")
        if min(*self.widths, *self.hidden) < 1:
            raise ValueError(f"--widths {self.widths} and --hidden {self.hidden}: expected sizes of at least 1")
        if self.source in ("kitti", "tum", "eth") and "dip" in self.arms and not self.weights:
            raise ValueError(f"--source {self.source} with the arm dip needs --weights FILE, a trained DIP")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


SMALL: dict[str, Any] = {
    "widths": (32, 64, 128),
    "hidden": (128, 64),
    "dropout": 0.0,
    "patch": 64,
    "batch": 64,
    "optimiser": "adam",
    "lr": 3e-3,
    "weight_decay": 0.0,
    "match_distance": 0.4,
}
CITY: dict[str, Any] = {
    "voxel": 0.5,
    "keypoints": 2000,
    "fpfh_neighbours": 24,
    "ransac_distance": 0.6,
    "hypotheses": 50000,
    "gap": 15,
    "candidate_step": 1,
    "reloc_every": 4,
    "drift_degrees": 0.3,
}
SAMPLES = "kitti-loop-closure-sample/, argoverse2-sensor-sample/, nuscenes-one-frame/"
ARCHIVE = "KITTI odometry 00 or the authors' kitti00/ (velodyne, dip, results), poses/00.txt"
GPU = "1 GPU of 12 GB"
PRESETS = {
    "default": Preset(
        Config(**SMALL, **CITY, epochs=20),
        seeds=3,
        data="generated streets",
        hours=0.08,
        why_not_comparable="generated scans, a small DIP",
    ),
    "smoke": Preset(
        Config(
            **(SMALL | {"widths": (8, 16, 16), "hidden": (16, 16), "patch": 32, "batch": 16}),
            **(CITY | {"keypoints": 60, "hypotheses": 300, "step": 12.0, "gap": 8, "query_every": 5}),
            train_pairs=3,
            epochs=2,
        ),
        data="generated streets",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated scans",
    ),
    "samples": Preset(
        Config(
            source="samples",
            arms=("dip",),
            **SMALL,
            epochs=15,
            train_pairs=8,
            ransac_distance=0.5,
            hypotheses=50000,
        ),
        data=SAMPLES,
        hours=0.05,
        needs_data=True,
        claims=False,
        note="overlaps, range image and LiDAR-Iris curves exact; pairs with a small DIP",
    ),
    "kitti00-curves": Preset(
        Config(source="results"),
        data="the authors' kitti00/results/*.json",
        hours=0.01,
        needs_data=True,
        claims=False,
        note="Figures 2 and 3 from the authors' stored scores",
    ),
    "kitti00-loop": Preset(
        Config(source="kitti", arms=("stored",), setups=("loop",), hypotheses=1000000),
        data=ARCHIVE + ", covariance.txt or results/pair_indices.json",
        hours=40,
        needs_data=True,
        claims=False,
        note="--arms dip --weights FILE computes the descriptors: about 20 s a scan on 2 cores",
    ),
    "kitti00-reloc": Preset(
        Config(source="kitti", arms=("stored",), setups=("reloc",), candidate_step=1, hypotheses=1000000),
        data=ARCHIVE,
        hours=300,
        needs_data=True,
        claims=False,
    ),
    "dip-3dmatch": Preset(
        Config(source="3dmatch", radius=0.3 * math.sqrt(3), voxel=0.01),
        data="3DMatch_train/, 3DMatch_train_pre/correspondences/",
        hardware=GPU,
        hours=60,
        needs_data=True,
        claims=False,
        why_not_comparable="trains the descriptor; its benchmark is another paper's",
    ),
    "eth": Preset(
        Config(
            source="eth",
            arms=("fpfh",),
            radius=0.6 * math.sqrt(3),
            voxel=0.06,
            quality=0.05,
            hypotheses=50000,
            ransac_distance=0.05,
        ),
        data="eth_pair/*.ply (two scans)",
        hours=0.05,
        needs_data=True,
        claims=False,
        why_not_comparable="the demo states no number",
        note="the released demo's settings; --arms dip fpfh --weights FILE with a trained DIP",
    ),
    "tum": Preset(
        Config(
            source="tum",
            arms=("fpfh",),
            radius=0.3 * math.sqrt(3),
            voxel=0.02,
            ransac_distance=0.05,
            ron_distance=0.1,
            gap=20,
            travelled=1.0,
        ),
        data="a TUM RGB-D or ICL-NUIM sequence: depth/, groundtruth.txt",
        hours=1.0,
        needs_data=True,
        claims=False,
        why_not_comparable="drifting ground truth in the place of RESLAM's odometry",
    ),
    "g2o": Preset(
        Config(source="g2o"),
        data="*.g2o",
        hours=0.01,
        needs_data=True,
        claims=False,
        why_not_comparable="another pose graph",
        note="reads, optimises and writes SE(3) pose graphs",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.files import replacing  # noqa: E402
from shared.run import Run, Unit  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import (  # noqa: E402
    BEAMS,
    COLUMNS,
    FOV,
    G2O,
    ROUTE,
    Drive,
    FragmentPair,
    argoverse_drive,
    city_drive,
    drive_route,
    find_fragments,
    kitti_drive,
    noisy_odometry,
    poses_of,
    read_bin,
    read_covariance,
    read_descriptors,
    read_fragments,
    read_g2o,
    read_info,
    read_lidar_iris,
    read_ply,
    read_results,
    tum_drive,
    write_g2o,
)
from model import (  # noqa: E402
    DIP,
    KITTI,
    Keys,
    Patches,
    PoseGraph,
    Sensor,
    add_loops,
    apply,
    correspondences,
    dip_loss,
    farthest_points,
    fpfh,
    graph_error,
    icp,
    image_overlap,
    inverse,
    kabsch,
    local_patches,
    nearest_descriptors,
    odometry_graph,
    optimise,
    pose_error,
    quaternion,
    range_image,
    ransac,
    score_pair,
    trajectory_error,
    voxel_downsample,
)
from protocol import (  # noqa: E402
    best_candidates,
    drift_covariance,
    every_nth,
    loop_candidates,
    precision_recall,
    relocalisation_candidates,
)

SCORES = ("ron", "overlap", "mnn", "fitness")
TABLE = ("truth", *SCORES)
"""Columns of a table of pairs; the estimated pose follows, row by row."""
LEAST_NEIGHBOURS = 10
STREETS = Sensor(BEAMS, COLUMNS, *FOV)
INDOORS = Sensor(64, 450, 25.0, -25.0, 10.0)


# ---- data ------------------------------------------------------------------------------------------------------


def samples(folder: Path) -> tuple[Drive, list[Drive], Drive]:
    """The small real scans: KITTI, Argoverse logs (the first with two sweeps), nuScenes."""
    kitti = kitti_drive(folder / "kitti-loop-closure-sample")
    logs = sorted(path.parent.parent for path in (folder / "argoverse2-sensor-sample").glob("*/sensors/lidar"))
    argoverse = [argoverse_drive(log) for log in logs]
    argoverse.sort(key=lambda drive: -len(drive.poses))
    sweeps = sorted((folder / "nuscenes-one-frame").glob("*LIDAR_TOP*.pcd.bin"))
    if not argoverse or len(argoverse[0].poses) < 2 or not sweeps:
        raise UserError(f"{folder}: expected {SAMPLES} with two sweeps of one log and one nuScenes sweep")
    nuscenes = Drive("nuscenes", torch.eye(4, dtype=torch.float64)[None], lambda _: read_bin(sweeps[0], 5), sweeps[0])
    return kitti, argoverse, nuscenes


def drive_of(config: Config, folder: Path | None, seed: int) -> Drive:
    """The drive in which loops are looked for."""
    if config.source == "city":
        places = drive_route(ROUTE, config.step, config.data_seed + seed)
        return city_drive(places[: config.frames or None], 2 * (config.data_seed + seed), blocks=config.blocks)
    assert folder is not None
    if config.source == "kitti":
        drive = kitti_drive(folder)
    else:
        drive = tum_drive(folder, config.camera, config.every)
    count = config.frames or len(drive.poses)
    return Drive(drive.name, drive.poses[:count], drive.scan, drive.path)


def archive(folder: Path) -> Path:
    """The authors' archive: ``kitti00`` in the folder, or the folder itself."""
    return folder / "kitti00" if (folder / "kitti00").is_dir() else folder


def result_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Stored scores of the authors: set-up and method -> file and key in it."""
    root = archive(folder) / "results"
    names = {
        "loop": ("overlapnet_gt_est_result.json", "iris_result.json", "dip_overlap_result.json"),
        "reloc": (
            *("overlapnet_gt_est_reloc_result_20.json", "iris_reloc_result_20.json"),
            "dip_overlap_reloc_result_20.json",
        ),
    }
    out = {}
    for setup, (overlapnet, iris, dip) in names.items():
        out[f"{setup}/overlapnet"] = root / overlapnet, "overlapnet"
        out[f"{setup}/lidar_iris"] = root / iris, "iris_score"
        for score, key in zip(SCORES, ("dip_ron", "dip_overlap", "dip_mnn", "fitness"), strict=True):
            out[f"{setup}/dip_{score}"] = root / dip, key
    return out


def graphs_in(folder: Path) -> list[Path]:
    """The g2o files of a folder."""
    paths = sorted(folder.glob("*.g2o"))
    if not paths:
        raise UserError(f"no *.g2o in {folder}, expected an SE(3) pose graph")
    return paths


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says.

    Raises:
        UserError: something that is needed is missing or malformed.
    """
    if config.source == "city":
        return [f"generated: {len(drive_of(config, None, 0).poses)} scans a seed; nothing to look for"]
    if folder is None:
        raise UserError(f"--check-data needs --data DIR for {config.source}")
    if config.source == "samples":
        kitti, argoverse, nuscenes = samples(folder)
        counts = [f"{len(kitti.scan(frame))} points in scan {frame}" for frame in (94, 95, 198, 199)]
        sweeps = sum(len(drive.poses) for drive in argoverse)
        verdict = "as expected" if len(kitti.poses) == 4541 else "EXPECTED 4541"
        return [
            f"KITTI 00: {len(kitti.poses)} poses ({verdict}), " + ", ".join(counts),
            f"Argoverse: {len(argoverse)} logs with {sweeps} sweeps (3 expected)",
            f"nuScenes: {len(nuscenes.scan(0))} points (34688 expected)",
            *(f"LiDAR-Iris {s}: {len(read_lidar_iris(iris_folder(folder), s).score)} frames" for s in IRIS),
        ]
    if config.source == "results":
        rows = [(name, *read_results(path, (key,))) for name, (path, key) in result_files(folder).items()]
        return [f"{name}: {len(pairs)} candidate pairs" for name, pairs, _ in rows]
    if config.source == "3dmatch":
        pairs = find_fragments(folder)
        first, second, match = read_fragments(pairs[0])
        poses = [read_info(path.parent.parent / f"{path.stem}.info.txt") for path in (pairs[0].first, pairs[0].second)]
        gap = apply(poses[0], first[match[:, 0]].double()) - apply(poses[1], second[match[:, 1]].double())
        apart = f"{float(gap.norm(dim=1).mean()):.3f} m apart under the stored poses"
        return [f"3DMatch: {len(pairs)} pairs of fragments; {len(match)} correspondences in the first, {apart}"]
    if config.source == "eth":
        return [f"{path.name}: {len(read_ply(path))} points" for path in eth_pair(folder)]
    if config.source == "g2o":
        found = [(path.name, read_g2o(path)) for path in graphs_in(folder)]
        return [f"{name}: {len(graph.vertices)} poses, {len(graph.edges)} edges" for name, graph in found]
    drive = drive_of(config, folder, 0)
    return [f"{drive.name}: {len(drive.poses)} poses in {drive.path}; {len(drive.scan(0))} points in the first scan"]


def eth_pair(folder: Path) -> list[Path]:
    """The two clouds of the released demo."""
    base = next(
        (b for b in (folder / "kitti-loop-closure-sample" / "eth_pair", folder / "eth_pair") if b.is_dir()), folder
    )
    paths = sorted(base.glob("*.ply"))
    if len(paths) != 2:
        raise UserError(f"{len(paths)} *.ply in {base}, expected the two clouds of the ETH pair")
    return paths


IRIS = ("00", "05", "08")


def iris_folder(folder: Path) -> Path:
    """Where the shipped results of LiDAR-Iris lie among the samples."""
    return folder / "kitti-loop-closure-sample" / "lidar_iris_results"


# ---- training of the descriptor ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two clouds to cut patches from, their corresponding points (m, 3) and the radius of a patch."""

    clouds: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    radius: float


def aligned_pair(current: Tensor, reference: Tensor, pose: Tensor, voxel: float, radius: float, near: float) -> Pair:
    """A training pair of two scans whose pose is known."""
    a, b = voxel_downsample(current, voxel), voxel_downsample(reference, voxel)
    match = correspondences(a, b, pose, near)
    return Pair((a, b), (a[match[:, 0]], b[match[:, 1]]), radius)


def city_pairs(config: Config, seed: int) -> list[Pair]:
    """Pairs of consecutive scans in a city that is not the one tested on."""
    places = drive_route(((0, 0), (2, 0), (2, 2), (0, 2)), 4.0, config.data_seed + seed)
    drive = city_drive(places, 2 * (config.data_seed + seed) + 1, blocks=config.blocks)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(places) - 1, generator=generator)[: config.train_pairs].tolist()
    settings = config.voxel, config.radius, config.match_distance
    return [
        aligned_pair(drive.scan(i), drive.scan(i + 1), inverse(drive.poses[i + 1]) @ drive.poses[i], *settings)
        for i in first
    ]


def fragment_pair(config: Config, pair: FragmentPair) -> Pair:
    """A training pair of 3DMatch: key points among all points, patches from the thinned clouds."""
    first, second, match = read_fragments(pair)
    clouds = voxel_downsample(first, config.voxel), voxel_downsample(second, config.voxel)
    return Pair(clouds, (first[match[:, 0]], second[match[:, 1]]), config.radius)


def align_eth(folder: Path, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The ETH pair and its pose, found by FPFH on thinned clouds and refined by ICP."""
    first, second = (read_ply(path) for path in eth_pair(folder))
    coarse = [voxel_downsample(cloud, 0.3) for cloud in (first, second)]
    features = [fpfh(cloud, torch.arange(len(cloud)), 1.5) for cloud in coarse]
    there = nearest_descriptors(*features)
    pose = ransac(coarse[0], coarse[1][there], 0.3, 50000, generator).pose
    fine = [voxel_downsample(cloud, 0.1) for cloud in (first, second)]
    for distance in (0.6, 0.2):
        pose = icp(*fine, pose, distance)
    return first, second, pose


def sample_pairs(config: Config, folder: Path, seed: int) -> list[Pair]:
    """Training pairs of the samples: KITTI scans 94 and 95, the ETH pair at its own scale, generated streets."""
    kitti, _, _ = samples(folder)
    pose = inverse(kitti.poses[95]) @ kitti.poses[94]
    near = aligned_pair(kitti.scan(94), kitti.scan(95), pose, config.voxel, config.radius, config.match_distance)
    first, second, pose = align_eth(folder, torch.Generator().manual_seed(seed))
    eth = aligned_pair(first, second, pose, 0.1, 0.6 * math.sqrt(3), 0.1)
    return [*(near,) * 4, *(eth,) * 2, *city_pairs(config, seed)]  # real pairs about as often as generated ones


def build(config: Config) -> DIP:
    """The network that the configuration describes."""
    return DIP(config.dim, config.widths, config.hidden, config.dropout)


def check_neighbours(patches: Patches, config: Config, where: str) -> float:
    """Mean number of points within the radius.

    Raises:
        UserError: the mean number is below ``LEAST_NEIGHBOURS``.
    """
    mean = float(patches.count.double().mean())
    if mean < LEAST_NEIGHBOURS:
        raise UserError(
            f"{where}: {mean:.1f} points within --radius {config.radius:g} m on average, expected at least "
            f"{LEAST_NEIGHBOURS} (50 are good): raise --radius or lower --voxel"
        )
    return mean


def training_batch(pair: Pair, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches (k, patch, 3) of corresponding points, spread by farthest-point sampling; those without a frame go."""
    if len(pair.keys[0]) < config.batch:
        raise UserError(f"a training pair has {len(pair.keys[0])} correspondences, --batch asks for {config.batch}")
    chosen = farthest_points(pair.keys[0], config.batch, generator)
    a, b = (
        local_patches(cloud, keys[chosen], pair.radius, config.patch, generator)
        for cloud, keys in zip(pair.clouds, pair.keys, strict=True)
    )
    check_neighbours(a, config, "training pair")
    both = a.valid & b.valid
    return a.points[both], b.points[both]


def fit(unit: Unit, run: Run, pairs: list[Callable[[], Pair]], name: str) -> None:
    """Train DIP: hardest-contrastive and Chamfer loss, one pair of clouds a step."""
    config, seed = run.config, unit.key[0]
    with user_errors():
        model = build(config)
    if config.optimiser == "sgd":
        optimiser: Any = torch.optim.SGD(model.parameters(), config.lr, 0.9, weight_decay=config.weight_decay)
    else:
        optimiser = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    model, optimiser = run.setup(model, optimiser)
    unit.attach(model=model, optimiser=optimiser)
    sampler = EpochSampler(len(pairs), 1, run.derive_seed("pairs", seed))
    tenth = max(1, config.epochs * len(sampler) // 10)
    unit.state.setdefault("losses", [])
    model.train()
    for step in unit.steps(config.epochs * len(sampler)):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * 0.1 ** (sampler.epoch(step) // 15)
        generator = run.generator("patches", seed, step)
        optimiser.zero_grad()
        for part, weight in run.shard(sampler[step]):
            a, b = training_batch(pairs[int(part[0])](), config, generator)
            loss = dip_loss(model(a.to(run.device)), model(b.to(run.device)))
            run.backward(loss * weight)
        optimiser.step()
        unit.state["losses"].append(float(loss.detach()))
        unit.log(loss=loss)
    losses = torch.tensor(unit.state["losses"])
    first, last = float(losses[:tenth].mean()), float(losses[-tenth:].mean())
    state = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
    unit.finish({f"{name}/dip/first_loss": first, f"{name}/dip/last_loss": last}, keep=state)


def load_dip(run: Run, seed: int) -> DIP:
    """The DIP of ``--weights``, else the one that this run trained."""
    config = run.config
    with user_errors():
        net = build(config)
    if config.weights:
        state = read_weights(Path(config.weights))
    else:
        state = run.kept((seed, "train"))
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"--weights {config.weights}: not of this network ({reason}); see --widths, --hidden"
        ) from error
    return net.to(run.device).eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint: safetensors, or a state_dict saved by torch."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--weights {path}: no readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights {path}: expected a state_dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


# ---- description and scoring of pairs ------------------------------------------------------------------------------


class Describer:
    """Described key points and range images of a drive's scans; those of real scans are kept in the run's folder."""

    def __init__(self, run: Run, drive: Drive, arm: str, net: DIP | None, sensor: Sensor, seed: int) -> None:
        self.run, self.drive, self.arm, self.net, self.sensor, self.seed = run, drive, arm, net, sensor, seed
        self.scan = lru_cache(256)(drive.scan)
        self.keys = lru_cache(256)(self._keys)
        self.image = lru_cache(256)(lambda frame: range_image(self.scan(frame), sensor))

    def _keys(self, frame: int) -> Keys:
        if self.drive.path is None:  # generated scans are few and quickly described
            return self._describe(frame)
        stored = self.run.folder / "descriptors" / f"{self.arm}-{frame:06d}.pt"
        if not stored.is_file():
            with replacing(stored) as temporary:
                torch.save(tuple(self._describe(frame)), temporary)
        return Keys(*torch.load(stored, weights_only=True))

    def _describe(self, frame: int) -> Keys:
        generator = self.run.generator("keypoints", self.drive.name, self.seed, frame)
        if self.arm == "stored":
            assert self.run.data is not None
            index, descriptors = read_descriptors(archive(self.run.data) / "dip" / f"{frame:06d}.npz")
            points = self.scan(frame)
            if len(index) and int(index.max()) >= len(points):
                raise UserError(f"dip/{frame:06d}.npz: index {int(index.max())} of a scan of {len(points)} points")
            return Keys(points[index], descriptors)
        return describe(self.scan(frame), self.run, self.arm, self.net, generator, f"{self.drive.name} frame {frame}")

    def overlap(self, current: int, reference: int, pose: Tensor) -> float:
        """Overlap of two frames under a pose."""
        moved = apply(inverse(pose), self.scan(reference).double())
        return image_overlap(self.image(current), range_image(moved, self.sensor), self.run.config.ron_distance)


def describe(points: Tensor, run: Run, arm: str, net: DIP | None, generator: torch.Generator, where: str) -> Keys:
    """Random key points of a thinned scan with their descriptors.

    Raises:
        UserError: too few neighbours for a frame.
    """
    config = run.config
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(run.precision, torch.float32)
    cloud = voxel_downsample(points, config.voxel)
    index = torch.randperm(len(cloud), generator=generator)[: config.keypoints]
    if arm == "fpfh":
        return Keys(cloud[index], fpfh(cloud, index, config.radius, config.fpfh_neighbours))
    assert net is not None
    patches = local_patches(cloud, cloud[index], config.radius, config.patch, generator)
    mean = check_neighbours(patches, config, where)
    descriptor, rho = net.describe(patches, dtype)
    if config.quality:
        descriptor[rho <= rho[patches.valid].quantile(config.quality)] = math.nan
    described = int(descriptor.isfinite().all(1).sum())
    if described < 3:
        run.print(f"warning: {where} has {described} descriptors, its pairs score 0")
    if where.endswith("frame 0"):
        run.print(f"{where}: {mean:.0f} points within {config.radius:.2f} m of a key point on average")
    return Keys(cloud[index], descriptor)


def score(run: Run, current: Keys, reference: Keys, *purpose: object) -> Any:
    """Scores of a pair with the settings of the run."""
    config = run.config
    with user_errors():
        return score_pair(
            current,
            reference,
            run.generator("pair", *purpose),
            config.ransac_distance,
            config.hypotheses,
            config.share,
            config.replacement,
            config.ron_distance,
        )


def score_pairs(unit: Unit, run: Run, describer: Describer, pairs: Tensor, scored: Tensor) -> Tensor:
    """Table (m, 5 + 16) of candidate pairs (reference, current): true overlap, scores, estimated pose.

    Candidates that are not ``scored`` keep zeros, as in the released scripts.
    """
    poses = describer.drive.poses
    table = unit.state.setdefault("table", torch.zeros(len(pairs), len(TABLE) + 16, dtype=torch.float64))
    for k in unit.steps(len(pairs)):
        reference, current = pairs[k].tolist()
        truth = describer.overlap(current, reference, inverse(poses[reference]) @ poses[current])
        table[k, 0] = truth
        if scored[k]:
            found = score(run, describer.keys(current), describer.keys(reference), *unit.key, reference, current)
            overlap = describer.overlap(current, reference, found.pose)
            table[k, 1:5] = torch.tensor([found.ron, overlap, found.mnn, found.fitness])
            table[k, 5:] = found.pose.flatten()
            unit.log(ron=found.ron, truth=truth)
    return table


STORED_PAIRS = {"loop": "pair_indices.json", "reloc": "overlapnet_gt_est_reloc_result_20.json"}
"""Files of the authors that hold candidate pairs, taken where they are there."""


def candidate_pairs(run: Run, drive: Drive, setup: str, seed: int) -> tuple[Tensor, Tensor]:
    """Candidate pairs (reference, current) of a set-up, and which of them are scored."""
    config = run.config
    stored = None if run.data is None else archive(run.data) / "results" / STORED_PAIRS[setup]
    covariances = None if run.data is None else run.data / "covariance.txt"
    if stored is not None and stored.is_file():
        pairs, _ = read_results(stored, ())
        pairs = pairs[pairs.amax(1) < len(drive.poses)]
    elif setup == "reloc":
        pairs = relocalisation_candidates(len(drive.poses), config.reloc_every, config.gap)
    elif covariances is not None and covariances.is_file():
        covariance = read_covariance(covariances)[: len(drive.poses)]
        pairs = loop_candidates(drive.poses[:, :3, 3], covariance, config.gap, config.travelled)
    else:
        positions = odometry_graph(odometry(config, drive, seed)).poses[:, :3, 3]
        covariance = drift_covariance(positions, config.drift, config.drift_degrees)
        pairs = loop_candidates(positions, covariance, config.gap, config.travelled)
    pairs = pairs[pairs[:, 1] % config.query_every == 0]
    if not len(pairs):
        raise UserError(f"{drive.name}: no candidate pair in the set-up {setup}; see --gap, --travelled, --drift")
    return pairs, every_nth(pairs, config.candidate_step if setup == "loop" else 1)


def odometry(config: Config, drive: Drive, seed: int) -> Tensor:
    """Drifting relative motions of a drive."""
    return noisy_odometry(drive.poses, config.drift, config.drift_degrees, seed)


def curve_metrics(name: str, frame: Tensor, value: Tensor, truth: Tensor, threshold: float) -> dict[str, float]:
    """Numbers of a precision-recall curve by frame and by candidate; none where there is no loop to be found."""
    if not (truth > threshold).any():
        return {}
    by_frame, by_candidate = best_candidates(frame, value, truth, threshold).curves()
    return {
        f"{name}/auc": by_frame.area(),
        f"{name}/f1_max": by_frame.f1_max(),
        f"{name}/recall_at_full_precision": by_frame.recall_at_full_precision(),
        f"{name}/candidate_auc": by_candidate.area(),
        f"{name}/candidate_f1_max": by_candidate.f1_max(),
    }


def table_metrics(
    name: str, drive: Drive, pairs: Tensor, scored: Tensor, table: Tensor, threshold: float
) -> dict[str, float]:
    """What a table of pairs says: curves of all scores, and how often the estimated pose is right."""
    truth, frame = table[:, 0], pairs[:, 1]
    positives = best_candidates(frame, truth, truth, threshold).frame_hit
    metrics = {f"{name}/pairs": len(pairs), f"{name}/frames": len(positives), f"{name}/loops": int(positives.sum())}
    for column, label in enumerate(SCORES, 1):
        metrics |= curve_metrics(f"{name}_{label}", frame, table[:, column], truth, threshold)
    poses = table[:, 5:].view(-1, 4, 4)
    right = []
    for (reference, current), pose in zip(pairs.tolist(), poses, strict=True):
        metres, degrees = pose_error(pose, inverse(drive.poses[reference]) @ drive.poses[current])
        right.append(metres < 2 and degrees < 5)
    success = torch.tensor(right, dtype=torch.float64)
    for label, low, high in (("large", 0.5, 1.1), ("small", threshold, 0.5)):
        inside = scored & (truth > low) & (truth <= high)
        if inside.any():
            metrics[f"{name}/pose_success_{label}_overlap"] = float(success[inside].mean())
    apart = scored & (truth < 0.1)
    for column, label in enumerate(SCORES, 1):
        for kind, mask in (("loops", scored & (truth > threshold)), ("others", apart)):
            if mask.any():
                metrics[f"{name}_{label}/mean_of_{kind}"] = float(table[mask, column].mean())
    return metrics


# ---- pose graph --------------------------------------------------------------------------------------------------


def as_g2o(graph: PoseGraph, poses: Tensor) -> G2O:
    """A pose graph with these poses in the form of a file."""

    def rows(motion: Tensor) -> Tensor:
        return torch.cat([motion[:, :3, 3], quaternion(motion[:, :3, :3])], 1)

    edges = torch.stack([graph.start, graph.end], 1)
    return G2O(rows(poses), edges, rows(graph.relative), graph.information)


def from_g2o(content: G2O) -> PoseGraph:
    """The pose graph of a file; edges between consecutive poses are odometry, the others robust."""
    start, end = content.edges.unbind(1)
    relative = poses_of(content.measurements)
    return PoseGraph(poses_of(content.vertices), start, end, relative, content.information, (end - start).abs() != 1)


def close_loops(
    run: Run, drive: Drive, pairs: Tensor, table: Tensor, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Pose graphs without loops, with those that RON accepts, and with a false one; errors and trajectories.

    The threshold on RON is the lowest that no false pair of half of the frames reaches; the other half's loops are
    used. All pairs count and not only each frame's best: few frames are without a loop, so few best ones are false.
    """
    config = run.config
    _, group = pairs[:, 1].unique(return_inverse=True)
    ron, truth = table[:, 1], table[:, 0]
    best = torch.full((int(group.max()) + 1,), -1.0, dtype=ron.dtype).scatter_reduce_(0, group, ron, "amax")
    chosen = (ron == best[group]) & (ron > 0)
    fit_half, use_half = group % 2 == 0, group % 2 == 1
    wrong = ron[fit_half & (truth <= config.loop_overlap)]
    threshold = float(wrong.max()) if len(wrong) else 0.0
    accepted = (chosen & use_half & (ron > threshold)).nonzero().squeeze(1)
    poses = table[:, 5:].view(-1, 4, 4)
    distance = (drive.poses[pairs[:, 0], :3, 3] - drive.poses[pairs[:, 1], :3, 3]).norm(dim=1)
    false = torch.where(ron > 0, distance, -1.0).argmax().unsqueeze(0)  # the scored pair farthest apart
    chain = odometry_graph(odometry(config, drive, seed))
    graphs = {
        "none": chain,
        "loops": add_loops(chain, pairs[accepted], poses[accepted]),
        "false": add_loops(chain, pairs[both := torch.cat([accepted, false])], poses[both]),
    }
    with user_errors():
        found = {name: optimise(graph, config.graph_iterations) for name, graph in graphs.items()}
    if run.is_main:
        for stage, estimate in (("before", graphs["loops"].poses), ("after", found["loops"])):
            write_g2o(run.folder / f"graph-{seed}-{stage}.g2o", as_g2o(graphs["loops"], estimate))
    truth_at = drive.poses[:, :3, 3]
    name = f"{drive.name}/slam"
    metrics = {f"{name}/ate_{kind}": trajectory_error(est[:, :3, 3], truth_at) for kind, est in found.items()}
    metrics |= {
        f"{name}/accepted": len(accepted),
        f"{name}/threshold": threshold,
        f"{name}/accepted_right": float((truth[accepted] > config.loop_overlap).double().mean())
        if len(accepted)
        else 0.0,
    }
    return metrics, {kind: est[:, :3, 3] for kind, est in found.items()} | {"truth": truth_at}


# ---- what a source does ----------------------------------------------------------------------------------------


def setups_of(config: Config, arm: str) -> tuple[str, ...]:
    """The first descriptor is tried in every set-up, the others in the first one."""
    return config.setups if arm == config.arms[0] else config.setups[:1]


def find_loops(config: Config, run: Run) -> None:
    """Score the candidates of a drive in each set-up with each descriptor, then close the loops."""
    trained = "dip" in config.arms and not config.weights
    parts: list[tuple[str, ...]] = [("train",)] if trained else []
    parts += [(arm, setup) for arm in config.arms for setup in setups_of(config, arm)]
    if "loop" in config.setups:
        parts.append(("slam",))
    sensor = {"city": STREETS, "kitti": KITTI, "tum": INDOORS}[config.source]
    drives: dict[int, Drive] = {}
    describers: dict[tuple[int, str], Describer] = {}

    def drive_at(seed: int) -> Drive:
        if seed not in drives:
            drives.clear()
            drives[seed] = drive_of(config, run.data, seed)
        return drives[seed]

    for seed in run.seeds:
        drive = drive_at(seed)
        if drive.path is None:
            run.data_used(f"city {seed}", "generated", spec=drive.spec)
    if run.data is not None:
        run.data_used(config.source, "real", path=drive_at(run.seeds[0]).path)
    for unit in run.units((seed, *part) for seed in run.seeds for part in parts):
        seed, part, *rest = unit.key
        if part == "train":
            ready = [lambda pair=pair: pair for pair in city_pairs(config, seed)]
            fit(unit, run, ready, "city")
            continue
        drive = drive_at(seed)
        if part == "slam":
            kept = run.kept((seed, config.arms[0], "loop"))
            metrics, tracks = close_loops(run, drive, kept["pairs"], kept["table"], seed)
            unit.finish(metrics, keep=tracks)
            continue
        if (seed, part) not in describers:
            describers.clear()
            net = load_dip(run, seed) if part == "dip" else None
            describers[seed, part] = Describer(run, drive, part, net, sensor, seed)
        pairs, scored = candidate_pairs(run, drive, rest[0], seed)
        table = score_pairs(unit, run, describers[seed, part], pairs, scored)
        metrics = table_metrics(f"{drive.name}/{rest[0]}/{part}", drive, pairs, scored, table, config.loop_overlap)
        unit.finish(metrics, keep={"pairs": pairs, "table": table, "scored": scored})
    draw(run)
    if run.preset.claims:
        claims(run)


def score_samples(config: Config, run: Run) -> None:
    """Exact numbers of the real samples, then real pairs with a small DIP."""
    assert run.data is not None
    for name in ("kitti-loop-closure-sample", "argoverse2-sensor-sample", "nuscenes-one-frame"):
        run.data_used(name, "real", path=run.data / name)
    for unit in run.units([("exact",), *((seed, part) for seed in run.seeds for part in ("train", "pairs"))]):
        if unit.key == ("exact",):
            unit.finish(exact_metrics(run.data))
        elif unit.key[1] == "train":
            fit(unit, run, [lambda pair=pair: pair for pair in sample_pairs(config, run.data, unit.key[0])], "samples")
        else:
            unit.finish(real_pairs(config, run, unit.key[0]))


def exact_metrics(folder: Path) -> dict[str, float]:
    """Range image, overlaps and LiDAR-Iris curves, which no training touches."""
    import numpy as np

    kitti, _, _ = samples(folder)
    demo = folder / "kitti-loop-closure-sample" / "overlapnet_demo"
    image = range_image(read_bin(demo / "000000.bin"))
    official = torch.from_numpy(np.load(demo / "depth_000000.npy", allow_pickle=False))
    metrics = {
        "overlapnet/range_image/largest_difference": float((image - official).abs().max()),
        "overlapnet/range_image/valid_pixels": int((image > 0).sum()),
    }
    still = torch.eye(4, dtype=torch.float64)
    for a, b in ((94, 95), (198, 199), (94, 198)):
        true = inverse(kitti.poses[b]) @ kitti.poses[a]
        current = range_image(kitti.scan(a))
        for label, pose in (("true_pose", true), ("identity", still)):
            moved = apply(inverse(pose), kitti.scan(b).double())
            metrics[f"kitti00/overlap_{label}/{a}-{b}"] = image_overlap(current, range_image(moved))
    for sequence in IRIS:
        iris = read_lidar_iris(iris_folder(folder), sequence)
        curve = precision_recall(iris.score, iris.hit, iris.loops)
        name = f"kitti{sequence}/lidar_iris"
        metrics[f"{name}/loops"] = iris.loops
        metrics[f"{name}/f1_max"] = curve.f1_max()
        metrics[f"{name}/recall_at_full_precision"] = curve.recall_at_full_precision()
        metrics[f"{name}/auc"] = curve.area()
    return metrics


def real_pairs(config: Config, run: Run, seed: int) -> dict[str, float]:
    """RON and pose errors of held-out real pairs, loops and others."""
    assert run.data is not None
    kitti, argoverse, nuscenes = samples(run.data)
    net = load_dip(run, seed)
    scans = {f"kitti{frame}": (kitti, frame) for frame in (94, 95, 198, 199)}
    scans |= {"argoverse0": (argoverse[0], 0), "argoverse1": (argoverse[0], 1), "nuscenes": (nuscenes, 0)}
    keys = {
        name: describe(drive.scan(frame), run, "dip", net, run.generator("keypoints", name, seed), name)
        for name, (drive, frame) in scans.items()
    }
    metrics = {}
    pairs = {
        "loop": (("kitti198", "kitti199"), ("argoverse0", "argoverse1")),
        "other": (("kitti94", "kitti198"), ("kitti95", "kitti199"), ("kitti198", "nuscenes")),
    }
    for kind, chosen in pairs.items():
        for a, b in chosen:
            found = score(run, keys[a], keys[b], seed, a, b)
            name = f"samples/{kind}/{a}-{b}"
            metrics |= {f"{name}/ron": found.ron, f"{name}/mnn": found.mnn, f"{name}/fitness": found.fitness}
            if kind == "loop":
                (drive, i), (_, j) = scans[a], scans[b]
                metres, degrees = pose_error(found.pose, inverse(drive.poses[j]) @ drive.poses[i])
                metrics |= {f"{name}/pose_metres": metres, f"{name}/pose_degrees": degrees}
    return metrics


def score_results(config: Config, run: Run) -> None:
    """Curves of the authors' stored scores."""
    assert run.data is not None
    files = result_files(run.data)
    for path in sorted({path for path, _ in files.values()}):
        run.data_used(path.stem, "real", path=path)
    for unit in run.units(files):
        path, key = files[unit.name]
        truth_path, _ = files[unit.name.split("/")[0] + "/overlapnet"]
        pairs, truth = read_results(truth_path, ("gt",))
        own, values = read_results(path, (key,))
        if not torch.equal(pairs, own):
            raise UserError(f"{path} and {truth_path} hold different candidate pairs")
        metrics = curve_metrics(f"kitti00/{unit.name}", pairs[:, 1], values[key], truth["gt"], config.loop_overlap)
        unit.finish(metrics)


def train_fragments(config: Config, run: Run) -> None:
    """Train DIP on 3DMatch."""
    assert run.data is not None
    pairs = find_fragments(run.data)
    run.data_used("3dmatch", "real", path=run.data / "3DMatch_train_pre")
    for unit in run.units((seed, "train") for seed in run.seeds):
        fit(unit, run, [lambda pair=pair: fragment_pair(config, pair) for pair in pairs], "3dmatch")


def register_eth(config: Config, run: Run) -> None:
    """Register the two clouds of DIP's demo and say how far ICP moves the result."""
    assert run.data is not None
    paths = eth_pair(run.data)
    run.data_used("eth", "real", path=paths[0].parent)
    for unit in run.units((seed, arm) for seed in run.seeds for arm in config.arms):
        seed, arm = unit.key
        clouds = [read_ply(path) for path in paths]
        net = load_dip(run, seed) if arm == "dip" else None
        keys = [
            describe(cloud, run, arm, net, run.generator("keypoints", path.stem, seed), path.name)
            for cloud, path in zip(clouds, paths, strict=True)
        ]
        found = score(run, *keys, seed, arm)
        fine = [voxel_downsample(cloud, 0.1) for cloud in clouds]
        with user_errors():
            refined = icp(*fine, icp(*fine, found.pose, 0.6), 0.2)
        metres, degrees = pose_error(found.pose, refined)
        name = f"eth/{arm}"
        unit.finish(
            {
                f"{name}/ron": found.ron,
                f"{name}/mnn": found.mnn,
                f"{name}/fitness": found.fitness,
                f"{name}/icp_moves_metres": metres,
                f"{name}/icp_turns_degrees": degrees,
            }
        )


def optimise_graphs(config: Config, run: Run) -> None:
    """Optimise the pose graphs of g2o files and write them into the run's folder."""
    assert run.data is not None
    paths = {path.stem: path for path in graphs_in(run.data)}
    for path in paths.values():
        run.data_used(path.stem, "real", path=path)
    for unit in run.units(paths):
        graph = from_g2o(read_g2o(paths[unit.name]))
        with user_errors():
            poses = optimise(graph, config.graph_iterations)
        if run.is_main:
            write_g2o(run.folder / f"{unit.name}-optimised.g2o", as_g2o(graph, poses))
        metrics = {f"{unit.name}/poses": len(poses), f"{unit.name}/edges": len(graph.start)}
        metrics |= {
            f"{unit.name}/error_{k}": graph_error(graph, p) for k, p in (("before", graph.poses), ("after", poses))
        }
        unit.finish(metrics)


WORK: dict[str, Callable[[Config, Run], None]] = {
    "city": find_loops,
    "kitti": find_loops,
    "tum": find_loops,
    "samples": score_samples,
    "results": score_results,
    "3dmatch": train_fragments,
    "eth": register_eth,
    "g2o": optimise_graphs,
}


def train(config: Config, run: Run) -> None:
    """Do the work of the source."""
    if max(config.widths) < 512:
        torch.set_num_threads(1)  # small networks gain nothing from threads, and sums keep their order
    if config.source != "city" and run.data is None:
        raise UserError(f"--source {config.source} needs --data DIR")
    WORK[config.source](config, run)


# ---- claims and figure ---------------------------------------------------------------------------------------------


def claims(run: Run) -> None:
    """Hold the scores against one another, and the trajectories."""
    m = run.metrics

    def mean(name: str) -> float:
        return m[f"city/{name}"].mean

    for rival in ("overlap", "mnn", "fitness"):
        name = f"ron_beats_{rival}"
        gain = {setup: mean(f"{setup}/dip_ron/auc") - mean(f"{setup}/dip_{rival}/auc") for setup in ("loop", "reloc")}
        numbers = {f"{s}_{k}": mean(f"{s}/dip_{k}/auc") for s in gain for k in ("ron", rival)}
        run.claim(name, min(gain.values()) >= run.threshold(name), **numbers)
    areas = {setup: mean(f"{setup}/dip_ron/auc") for setup in ("loop", "reloc")}
    run.claim("ron_finds_loops", min(areas.values()) >= run.threshold("ron_finds_loops", "auc"), **areas)
    for name, size in (("poses_are_right", "large"), ("small_overlaps_register", "small")):
        success = {setup: mean(f"{setup}/dip/pose_success_{size}_overlap") for setup in ("loop", "reloc")}
        run.claim(name, min(success.values()) >= run.threshold(name, "success"), **success)
    none, loops, false = (mean(f"slam/ate_{kind}") for kind in ("none", "loops", "false"))
    name = "loops_lower_trajectory_error"
    run.claim(name, loops <= run.threshold(name, "share") * none, without_loops=none, with_loops=loops)
    name = "one_false_loop_hurts"
    run.claim(name, false >= run.threshold(name, "factor") * loops, with_loops=loops, with_false_loop=false)


def draw(run: Run) -> None:
    """Precision over recall in each set-up, scores against true overlap, and the trajectories of the first seed."""
    config, seed = run.config, run.seeds[0]
    figure, axes = report.figure(1, 4, width=3.4, squeeze=False)
    arm = config.arms[0]
    titles = {"loop": "loop closure", "reloc": "relocalisation"}
    for axis, setup in zip(axes[0], config.setups, strict=False):
        rows = [(arm, label) for label in SCORES]
        rows += [(other, "ron") for other in config.arms[1:] if setup in setups_of(config, other)]
        for kind, label in rows:
            _curve(axis, run.kept((seed, kind, setup)), SCORES.index(label) + 1, f"{kind} {label}", config.loop_overlap)
        axis.set(xlabel="recall", ylabel="precision", ylim=(0, 1.05), title=titles[setup])
        if axis.get_lines():
            axis.legend(fontsize=7)
    if "loop" in config.setups:
        kept, tracks = run.kept((seed, arm, "loop")), run.kept((seed, "slam"))
        table = kept["table"][kept["scored"]]
        for column, label in ((1, "RON"), (2, "overlap, estimated pose")):
            axes[0, 2].plot(table[:, 0], table[:, column], ".", markersize=4, label=label)
        axes[0, 2].set(xlabel="true overlap", ylabel="score", title="candidate pairs")
        axes[0, 2].legend(fontsize=7)
        for kind, style in (("truth", "k-"), ("none", "--"), ("loops", "-")):
            x, y, _ = _onto(tracks[kind], tracks["truth"]).unbind(1)
            axes[0, 3].plot(x, y, style, label={"none": "odometry", "loops": "with loops"}.get(kind, kind), linewidth=1)
        axes[0, 3].set(title="trajectory, metres", aspect="equal")
        axes[0, 3].legend(fontsize=7)
    run.figure(figure)


def _curve(axis: Any, kept: dict[str, Tensor], column: int, label: str, threshold: float) -> None:
    """One precision-recall curve."""
    truth = kept["table"][:, 0]
    if (truth > threshold).any():
        curve, _ = best_candidates(kept["pairs"][:, 1], kept["table"][:, column], truth, threshold).curves()
        style = "--" if label.endswith("fitness") else "-"  # often on top of RON
        axis.plot(curve.recall, curve.precision, style, label=label)


def _onto(track: Tensor, truth: Tensor) -> Tensor:
    """A trajectory aligned with the true one."""
    return apply(kabsch(track, truth), track)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
