"""Train the method and its baseline, print the paper's numbers beside the measured ones, decide the claim."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from shared import cli
from shared.cli import Preset


@dataclass(frozen=True)
class Config:
    """Everything that decides a number."""

    hidden: int = 32
    """Hidden units of the method."""
    lr: float = 0.05
    """Adam learning rate."""
    steps: int = 400
    """Optimiser steps."""
    batch: int = 64
    """Global batch size."""
    samples: int = 600
    """Generated samples, half of them for testing."""

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.steps < 1 or self.batch < 1 or self.samples < 4:
            raise ValueError("--hidden, --steps and --batch must be at least 1 and --samples at least 4")
        if self.lr <= 0:
            raise ValueError(f"--lr is {self.lr}, expected a positive number")


PRESETS = {
    "default": Preset(
        Config(), seeds=3, data="generated half circles", hours=0.01, why_not_comparable="generated data"
    ),
    "smoke": Preset(
        Config(steps=4, samples=40, batch=8),
        data="generated half circles",
        hours=0.001,
        claims=False,
        why_not_comparable="a few steps on generated data",
    ),
    "real": Preset(Config(), seeds=3, data="data.csv", hours=0.01, needs_data=True),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage and --list-presets are answered before torch is imported

import torch  # noqa: E402

from shared import report  # noqa: E402
from shared.run import Run  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import EXPECTED_ROWS, generate, load  # noqa: E402
from model import Perceptron, accuracy  # noqa: E402

ARMS = ("perceptron", "linear")


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if folder is None:
        return [f"no --data given: {config.samples} samples are generated, nothing to look for"]
    x, _ = load(folder)
    return [f"{folder / 'data.csv'}: {len(x)} rows, expected {EXPECTED_ROWS}"]


def train(config: Config, run: Run) -> None:
    """Train both arms on every seed, then decide the claim and draw the figure."""
    name = "halfcircles" if run.data is None else "real"
    if run.data is None:
        run.data_used(name, "generated", spec={"samples": config.samples, "seeds": run.seeds})
    else:
        run.data_used(name, "real", path=run.data / "data.csv")
    for unit in run.units((seed, arm) for seed in run.seeds for arm in ARMS):
        seed, arm = unit.key
        x, labels = load(run.data) if run.data else generate(config.samples, run.derive_seed("data", seed))
        half = len(x) // 2
        x, labels = x.to(run.device), labels.to(run.device)
        model = Perceptron(x.shape[1], config.hidden if arm == "perceptron" else 0, 2)
        model, optimizer = run.setup(model, torch.optim.Adam(model.parameters(), lr=config.lr))
        unit.attach(model=model, optimizer=optimizer)
        sampler = EpochSampler(half, config.batch, seed)
        for step in unit.steps(config.steps):
            optimizer.zero_grad()
            total = torch.zeros((), device=run.device)
            for part, weight in run.shard(sampler[step]):
                loss = weight * torch.nn.functional.cross_entropy(model(x[part]), labels[part])
                run.backward(loss)
                total += loss.detach()
            optimizer.step()
            unit.log(loss=total)
        with torch.no_grad():
            score = accuracy(model(x[half:]), labels[half:])
        unit.finish({f"{name}/{arm}/test_accuracy": score})

    metrics = run.metrics
    method, baseline = (metrics[f"{name}/{arm}/test_accuracy"].mean for arm in ARMS)
    if run.preset.claims:
        margin = run.threshold("beats_linear", "margin")
        run.claim("beats_linear", method - baseline >= margin, perceptron=method, linear=baseline)
    figure, axes = report.figure()
    axes.bar(ARMS, [method, baseline])
    axes.set_ylabel("test accuracy")
    run.figure(figure)


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
