"""Update a recommender day by day: incremental, batch, SPMF, ASMG, and future gradient descent.

The default run asks on generated streams with a season whether training with a forecast of the next day's gradient
predicts the next day better than training on the last days, and on a stream without a season whether nothing changes.
It also runs the linear generator of the theory and measures its local regret.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.options import above, among, at_least, between

METHODS = ("iu", "ideal", "bu", "spmf", "asmg", "fgd", "fgdrand", "fgdlinear")
ALONE = ("iu", "ideal")
"""Methods that use one day: their arms have no number."""


def parse_arm(arm: str) -> tuple[str, int]:
    """Method and number of days b of an arm: fgd3 -> ("fgd", 3).

    Raises:
        ValueError: no such arm.
    """
    found = re.fullmatch(r"([a-z]+)([1-9]\d*)?", arm)
    method, days = (found[1], found[2]) if found else (arm, None)
    if method not in METHODS or (days is None) != (method in ALONE):
        numbered = " ".join(name for name in METHODS if name not in ALONE)
        raise ValueError(
            f"unknown arm {arm!r}, expected iu, ideal, or one of {numbered} with a number of days, as fgd3"
        )
    return method, int(days or 1)


@dataclass(frozen=True)
class Config:
    """Everything that decides a number."""

    dataset: Literal["seasonal", "movielens", "avazu", "criteotb"] = "seasonal"
    """Stream: generated, MovieLens-100k by time, Avazu by date, or CriteoTB's daily files."""
    models: tuple[str, ...] = ("fm", "deepfm")
    """Recommenders: lr (logistic regression), fm, deepfm."""
    arms: tuple[str, ...] = ("iu", "bu3", "spmf3", "asmg3", "fgd3")
    """Updates: iu, ideal (trains on the next day itself), or bu spmf asmg fgd fgdrand fgdlinear and days, as fgd3."""
    first_only: tuple[str, ...] = ()
    """Further updates, with the first recommender only."""
    control: tuple[str, ...] = ()
    """Updates that are also run, with the first recommender, on a generated stream without a season."""
    regret: tuple[int, ...] = ()
    """Windows w of the local regret that is measured with logistic regression on the generated stream."""
    evaluate: tuple[int, ...] = (16,)
    """Last domains over which scores are averaged; those before the longest are the offline part."""
    domains: int = 24
    """Domains of a generated stream, and of MovieLens in chunks of equal size."""
    span: int = 0
    """MovieLens: days of a domain, in place of chunks of equal size; 0: chunks."""
    rows: int = 3072
    """Rows of a generated domain."""
    period: int = 3
    """Length of the generated season."""
    season: float = 0.7
    """Scale of the generated season."""
    drift: float = 0.1
    """Scale of the generated drift's velocity."""
    vocab: Literal["offline", "all"] = "offline"
    """Real data: count levels on the offline part, or on all rows (which tells of the future)."""
    min_count: int = 10
    """Real data: levels met less often share one id."""
    share: float = 0.1
    """CriteoTB: share of the rows."""
    batch: int = 128
    """Examples of one domain in a mini-batch."""
    lrs: tuple[float, ...] = (0.01, 0.03)
    """Adam learning rates of the recommender; each arm takes its best one on the offline part."""
    moments: Literal["reset", "keep"] = "reset"
    """Adam's moments at a round: zero, or those of the parameters that it begins with."""
    size: int = 8
    """Width of an embedding."""
    hidden: tuple[int, ...] = (32, 32)
    """Widths of DeepFM's perceptron."""
    smooth: int = 1
    """Window w of the smoothed forecast gradient."""
    every: int = 3
    """Iterations between parameters of the buffer."""
    thetas: int = 20
    """Parameters drawn from the buffer for a round of the generator."""
    meta_batch: int = 512
    """Examples of one domain in a mini-batch of the generator."""
    meta_batches: int = 4
    """Such mini-batches in a round; the generator's steps go through them in turn."""
    meta_steps: int = 100
    """Steps of the generator in a round."""
    meta_lr: float = 0.01
    """SGD learning rate of the generator."""
    meta_size: int = 8
    """Width of the generator's embeddings."""
    meta_width: int = 16
    """Width d2 of the generator's attention."""
    meta_hidden: int = 32
    """Hidden width of the generator's perceptron."""
    softmax: bool = True
    """Keep the generator's weights in the simplex."""
    normalise: bool = True
    """Divide the generator's loss by the squared norm of the gradient that it forecasts."""
    eta: float = 5.0
    """Constant c in the rate of the linear generator."""
    delta: float = 0.01
    """Regret: norm of the forecast gradient at which the inner loop ends."""
    descent_step: float = 2.0
    """Regret: step of the inner gradient descent."""
    descent_steps: int = 5000
    """Regret: most steps of the inner loop."""
    regret_days: int = 3
    """Regret: number of days b of the linear generator."""
    asmg_lr: float = 0.01
    """Adam learning rate of ASMG's meta generator."""
    asmg_hidden: int = 4
    """State of a scalar in ASMG's meta generator."""
    spmf_strategy: int = 2
    """SPMF: 1 draws from reservoir and new data, 2 adds a share of the reservoir to the new data."""
    spmf_ratio: float = 0.5
    """SPMF, strategy 2: rows of the reservoir for each new one."""

    def __post_init__(self) -> None:
        for name in ("domains", "rows", "period", "min_count", "batch", "size", "smooth", "every", "thetas"):
            at_least(name, getattr(self, name), 1)
        for name in ("meta_batch", "meta_batches", "meta_steps", "meta_size", "meta_width", "meta_hidden"):
            at_least(name, getattr(self, name), 1)
        for name in ("descent_steps", "regret_days", "asmg_hidden"):
            at_least(name, getattr(self, name), 1)
        for name in ("span", "season", "drift", "eta", "spmf_ratio"):
            at_least(name, getattr(self, name), 0)
        for name in ("meta_lr", "delta", "asmg_lr", "share", "descent_step"):
            above(name, getattr(self, name), 0)
        between("share", self.share, 0, 1)
        between("spmf_strategy", self.spmf_strategy, 1, 2)
        among("models", self.models, ("lr", "fm", "deepfm"))
        if not self.lrs or min(self.lrs) <= 0 or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"--lrs is {self.lrs}, expected one or more positive rates, each once")
        if not self.evaluate or min(self.evaluate) < 1 or len(set(self.evaluate)) < len(self.evaluate):
            raise ValueError(f"--evaluate is {self.evaluate}, expected one or more numbers of domains, each once")
        if min(self.hidden, default=1) < 1:
            raise ValueError(f"--hidden is {self.hidden}, expected widths of at least 1")
        both = (*self.arms, *self.first_only)
        if not self.arms or len(set(both)) < len(both) or len(set(self.control)) < len(self.control):
            raise ValueError(f"--arms is {' '.join(both) or 'empty'}, expected one or more, each once")
        for arm in (*both, *self.control):
            method, days = parse_arm(arm)
            if method.startswith("fgd") and self.smooth > days + 1:
                raise ValueError(f"--smooth is {self.smooth}, expected at most {days + 1} for {arm}")
        if (self.control or self.regret) and self.dataset != "seasonal":
            raise ValueError(f"--control and --regret need --dataset seasonal, not {self.dataset}")
        if len(set(self.regret)) < len(self.regret) or any(not 1 <= w <= self.regret_days for w in self.regret):
            raise ValueError(f"--regret is {self.regret}, expected windows from 1 to --regret-days, each once")
        if self.dataset == "seasonal" or (self.dataset == "movielens" and not self.span):
            check_length(self, self.domains)


def check_length(config: Config, domains: int) -> None:
    """Refuse a stream that is too short for the windows, or for the domains that are evaluated.

    Raises:
        ValueError: says how many there are.
    """
    arms = (*config.arms, *config.first_only, *config.control)
    days = max(parse_arm(arm)[1] for arm in arms)
    if config.regret:
        days = max(days, config.regret_days)
    if domains <= days:
        raise ValueError(f"need more than b={days} domains, got {domains}")
    if max(config.evaluate) >= domains:
        raise ValueError(f"--evaluate {max(config.evaluate)} leaves no offline part of {domains} domains")


GENERATED = "generated stream with a season"
PAPER = Config(
    batch=1024,
    lrs=(1e-2, 1e-3, 1e-4, 1e-5),
    size=24,
    hidden=(400, 400, 400),
    meta_batch=1024,
    meta_batches=200,
    meta_steps=200,
)
DEFAULT = Config(first_only=("fgdrand3", "fgdlinear3", "ideal"), control=("bu3", "fgd3"), regret=(1, 3))
PRESETS = {
    "default": Preset(DEFAULT, seeds=3, data=GENERATED, hours=0.07, why_not_comparable="generated data"),
    "smoke": Preset(
        Config(
            models=("fm",),
            arms=("iu", "spmf2", "asmg2", "fgd2"),
            control=("bu2",),
            regret=(1,),
            evaluate=(3,),
            domains=8,
            rows=192,
            batch=64,
            meta_batch=64,
            meta_batches=2,
            meta_steps=5,
            thetas=2,
            every=1,
            descent_steps=20,
        ),
        data=GENERATED,
        hours=0.003,
        claims=False,
        why_not_comparable="a few small domains",
    ),
    "movielens": Preset(
        replace(
            DEFAULT,
            dataset="movielens",
            arms=("iu", "bu3", "bu5", "spmf3", "asmg3", "fgd3", "fgd5"),
            first_only=(),
            control=(),
            regret=(),
            evaluate=(14,),
            domains=24,
            min_count=1,
        ),
        seeds=3,
        data="MovieLens-100k inside the package recbole, 24 chunks of time",
        hours=0.1,
        why_not_comparable="another data set",
    ),
    "movielens-days": Preset(
        replace(
            DEFAULT,
            dataset="movielens",
            span=1,
            arms=("iu", "bu3", "fgd3"),
            first_only=(),
            control=(),
            regret=(),
            evaluate=(107,),
            min_count=1,
            meta_batches=1,
            meta_steps=20,
        ),
        data="MovieLens-100k inside the package recbole, 213 calendar days",
        hours=0.1,
        claims=False,
        why_not_comparable="another data set",
        note="most days have fewer ratings than a mini-batch of the generator",
    ),
    "season-2": Preset(
        replace(DEFAULT, period=2, arms=("iu", "bu2", "fgd2"), first_only=(), control=(), regret=()),
        seeds=3,
        data=GENERATED + " of two days",
        hours=0.03,
        claims=False,
        why_not_comparable="generated data",
    ),
    "season-strong": Preset(
        replace(DEFAULT, season=1.0, drift=0.0, arms=("iu", "bu3", "fgd3"), first_only=(), control=(), regret=()),
        seeds=3,
        data=GENERATED + ", stronger, no drift",
        hours=0.04,
        claims=False,
        why_not_comparable="generated data",
    ),
    "windows": Preset(
        replace(DEFAULT, arms=("bu2", "bu3", "bu5", "fgd2", "fgd3", "fgd5"), first_only=(), control=(), regret=()),
        seeds=3,
        data=GENERATED,
        hours=0.06,
        claims=False,
        why_not_comparable="generated data",
    ),
}


def _windows(*days: int) -> tuple[str, ...]:
    return ("iu", *(f"{method}{b}" for b in days for method in ("bu", "spmf", "asmg", "fgd")))


for _model, _hours in (("fm", 400), ("deepfm", 700)):
    _criteo = replace(PAPER, dataset="criteotb", models=(_model,), evaluate=(16, 8), every=150)
    for _name, _config, _data, _long, _note in (
        (f"criteotb-{_model}", replace(_criteo, arms=_windows(2, 3, 5)), "CriteoTB: day_0 .. day_23", _hours, ""),
        (
            f"criteotb-buffer-{_model}",
            replace(_criteo, arms=("fgd3", "fgdrand3")),
            "CriteoTB: day_0 .. day_23",
            _hours / 6,
            "random parameters in the buffer",
        ),
        (
            f"avazu-{_model}",
            replace(PAPER, dataset="avazu", models=(_model,), evaluate=(8,), every=50, arms=_windows(2, 3)),
            "Avazu: train or train.csv",
            _hours / 20,
            "",
        ),
    ):
        PRESETS[_name] = Preset(
            _config,
            seeds=3,
            data=_data,
            hardware="1 GPU of 80 GB",
            hours=_long,
            needs_data=True,
            claims=False,
            note=_note,
        )

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.ctr import auc, log_loss  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit  # noqa: E402

import data as streams  # noqa: E402
from model import (  # noqa: E402
    MFGG,
    SPARSE_ROWS,
    TABLES,
    MetaGenerator,
    descend,
    domain_gradients,
    exponentiated_gradient,
    flatten,
    forecast_error,
    gradients,
    gram,
    init_recommender,
    linear_rate,
    linear_slope,
    logits,
    losses,
    rank_weights,
    recency,
    recommender_shapes,
    reservoir_update,
    smooth,
    spmf_rows,
    summarise,
    touched,
    unflatten,
    weighted_loss,
)

EVALUATION_ROWS = 65_536
LARGE_FILE = 1 << 30
READ_STEPS = 16
GRADIENT_NUMBERS = 1 << 27
"""Numbers in the gradients that are in memory at a time."""
State = dict[str, Any]
"""What a checkpoint holds of an arm: plain types and tensors, none of which is changed in place."""


# ---- streams ---------------------------------------------------------------------------------------------------------


def load(config: Config, folder: Path | None, seed: int, say: Callable[[str], None] | None = None) -> streams.Stream:
    """The stream of a configuration, long enough for its windows and evaluations.

    Raises:
        UserError: missing or malformed data, or too few domains.
    """

    def offline(domains: int) -> int:
        with user_errors():
            check_length(config, domains)
        return domains - max(config.evaluate)

    if config.dataset == "seasonal":
        return streams.seasonal(seed, config.domains, config.rows, config.period, config.season, config.drift)
    if config.dataset == "movielens":
        return streams.movielens(folder, config.domains, offline, config.vocab, config.min_count, config.span)
    if folder is None:
        raise UserError(f"{config.dataset} needs --data DIR; see Data in README.md")
    if config.dataset == "avazu":
        return streams.avazu(folder, offline, config.vocab, config.min_count, say)
    return streams.criteo(folder, offline, config.vocab, config.min_count, config.share, say)


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What ``--check-data`` says."""
    if config.dataset in ("avazu", "criteotb"):
        if folder is None:
            raise UserError(f"{config.dataset} needs --data DIR; see Data in README.md")
        return streams.check_text(config.dataset, folder)
    stream = load(config, folder, 0)
    where = f"{stream.files[0]}: " if stream.files else "generated: "
    expected = " (expected 100,000 before the remainder is dropped)" if config.dataset == "movielens" else ""
    clicks = float(stream.labels.float().mean())
    return [
        f"{config.dataset}: {where}{stream.bounds[-1]:,} rows{expected} in {len(stream)} domains, "
        f"{len(stream.levels)} fields, {sum(stream.levels):,} levels, {clicks:.1%} clicks"
    ]


# ---- one arm ---------------------------------------------------------------------------------------------------------


class Updater:
    """One arm on one stream. A domain's number t counts from 0 here; theta_t is deployed on domain t.

    What an arm knows stands in a ``State``: ``history`` (the last models that were trained), ``serving`` (P,),
    ``buffer`` (m, P), and ``phi`` (the generator), ``pools`` (SPMF's reservoirs) or ``asmg`` where the method has them.
    """

    def __init__(self, config: Config, stream: streams.Stream, model: str, arm: str, seed: int, run: Run) -> None:
        self.c, self.stream, self.seed, self.run, self.model = config, stream, seed, run, model
        self.method, self.days = parse_arm(arm)
        self.fgd = self.method.startswith("fgd")
        self.b = self.days if self.fgd or self.method == "bu" else 1  # domains that one update trains on
        with user_errors():
            self.shapes = recommender_shapes(model, stream.levels, config.size, config.hidden)
        self.net: Any = None
        if self.method in ("fgd", "fgdrand"):
            sizes = (config.meta_size, config.meta_width, config.meta_hidden)
            torch.manual_seed(run.derive_seed("generator", seed))
            self.net = run.setup(MFGG(stream.levels, self.days, *sizes, softmax=config.softmax).to(run.device))
        elif self.method == "asmg":
            torch.manual_seed(run.derive_seed("generator", seed))
            self.net = run.setup(MetaGenerator(self.shapes, config.asmg_hidden).to(run.device))
        self.first_phi = self.phi()

    def phi(self) -> Any:
        """A copy of the generator's parameters: of a network, or the weights of the linear one."""
        if self.net is None:
            return torch.full((self.days,), 1 / self.days) if self.method == "fgdlinear" else {}
        return {name: value.detach().clone() for name, value in self.net.state_dict().items()}

    def start(self) -> State:
        """The state before the first domain."""
        g = self.run.generator("initial model", self.seed)
        theta = flatten(init_recommender(self.model, self.stream.levels, self.c.size, self.c.hidden, g))[0]
        theta = theta.to(self.run.device)
        state: State = {"history": [{"theta": theta, "adam": []}], "serving": theta, "buffer": theta[None]}
        state |= {"phi": self.first_phi, "errors": [], "weights": []}
        if self.method == "spmf":
            state["pools"] = [torch.zeros(0, dtype=torch.int64)] * 2
            state["seen"] = [0, 0]
        elif self.method == "asmg":
            state["carried"] = self.net.start()
        return state

    # -- deployment

    def deploy(self, t: int, state: State) -> list[float]:
        """AUC (NaN for a domain of one class) and log loss of the serving model on domain t."""
        labels, scores = [], []
        parameters = unflatten(state["serving"][None].to(self.run.device), self.shapes)
        for rows in self.stream.day(t).split(EVALUATION_ROWS):
            ids, y = self.stream.rows(rows)
            with torch.no_grad():
                scores.append(logits(parameters, ids[None].to(self.run.device))[0].cpu())
            labels.append(y)
        y, out = torch.cat(labels), torch.cat(scores)
        if not bool(out.isfinite().all()):
            raise UserError(f"the model for domain {self.stream.names[t]} is not finite: try lower --lrs")
        one_class = float(y.min()) == float(y.max())
        return [float("nan") if one_class else auc(y, out), log_loss(y, out)]

    # -- the recommender

    def fit(
        self, origin: State, rows: list[Tensor], t: int, lr: float, weigh: Callable[[Tensor], Tensor], state: State
    ) -> State:
        """A single pass over the rows of some domains, one mini-batch of each a step; shorter domains begin again.

        Args:
            origin: entry of ``history`` to begin with. rows: of each domain. weigh: ids (b, B, F) -> weights (b,).

        Returns:
            an entry of ``history``; parameters along the way are left in ``state["buffer"]``.
        """
        c, device = self.c, self.run.device
        g = self.run.generator("order", self.seed, t)
        orders = [part[torch.randperm(len(part), generator=g)] for part in rows]
        n = max(map(len, orders))
        steps = -(-n // c.batch)
        marks = torch.arange(steps)[c.every - 1 :: c.every]
        chosen = {*marks[torch.randperm(len(marks), generator=g)[: c.thetas]].tolist()} if self.fgd else set()
        p = {k: v.clone().requires_grad_() for k, v in unflatten(origin["theta"][None].to(device), self.shapes).items()}
        values = list(p.values())
        adam = torch.optim.Adam(values, lr=lr, fused=True)
        if c.moments == "keep" and origin["adam"]:
            for value, (count, mean, square) in zip(values, origin["adam"], strict=True):
                parts = {"step": count, "exp_avg": mean, "exp_avg_sq": square}
                adam.state[value] = {k: part.to(device, copy=True) for k, part in parts.items()}
        kept, total = [], torch.zeros(len(rows), device=device)
        for i in range(steps):
            if i % READ_STEPS == 0:  # the rows of several steps are read at once
                at = torch.arange(i * c.batch, min((i + READ_STEPS) * c.batch, n))
                ids, labels = self.stream.rows(torch.stack([order[at % len(order)] for order in orders]))
                parts = list(zip(ids.to(device).split(c.batch, 1), labels.to(device).split(c.batch, 1), strict=True))
            ids, labels = parts[i % READ_STEPS]
            a = weigh(ids)
            total += a
            adam.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.run.precision == "bf16-mixed"):
                loss = weighted_loss(p, ids, labels, a)
            loss.backward()
            adam.step()
            if i in chosen:
                kept.append(flatten(p).detach())
        theta = flatten(p).detach()
        if self.fgd:
            state["buffer"] = torch.cat(kept) if kept else theta
            if len(rows) == self.b:
                state["weights"] = [*state["weights"], (total / steps).tolist()]
        moments = []
        if c.moments == "keep":
            moments = [[adam.state[v][k].clone() for k in ("step", "exp_avg", "exp_avg_sq")] for v in values]
        return {"theta": theta[0], "adam": moments}

    def weights(self, state: State) -> Callable[[Tensor], Tensor]:
        """ids (b, B, F) -> weights of m_bar on the domains of a round."""
        c, b = self.c, self.b
        if self.method == "fgdlinear":
            fixed = smooth(state["phi"], c.smooth).to(self.run.device)
            return lambda ids: fixed
        if not self.fgd:
            return lambda ids: torch.full((len(ids),), 1 / b, device=ids.device)
        self.net.load_state_dict(state["phi"])

        def forecast(ids: Tensor) -> Tensor:
            with torch.no_grad():
                return smooth(self.net(ids), c.smooth)

        return forecast

    # -- the generator

    def samples(self, t: int, size: int, count: int) -> tuple[Tensor, Tensor]:
        """Mini-batches of D_{t-b}, ..., D_t: ids (count, b + 1, size, F) and labels; short domains begin again."""
        g = self.run.generator("generator", self.seed, t)
        index = []
        for s in range(t - self.days, t + 1):
            first, n = self.stream.bounds[s], self.stream.size(s)
            index.append(first + torch.randperm(n, generator=g)[torch.arange(size * count) % n])
        return self.stream.rows(torch.stack(index).view(-1, count, size).transpose(0, 1))

    def grams(self, theta: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K (n, b, b), c (n, b) and ||g||^2 (n,) of n mini-batches, means over the parameters theta (m, P).

        The weights depend on the mini-batch alone and the loss is linear in the three, so means over theta are exact.
        """
        b, found = self.days, []
        for x, y in zip(ids, labels, strict=True):  # over mini-batches; within, models and domains at once
            x, y = x.to(self.run.device), y.to(self.run.device)
            tables = sum(math.prod(shape) for name, shape in self.shapes.items() if name in TABLES)
            width = min(theta.shape[1], theta.shape[1] - tables + x.numel() * (self.c.size + 1))
            numbers = (b + 1) * width
            parts = []
            for some in theta.split(max(1, GRADIENT_NUMBERS // numbers)):
                grads = domain_gradients(unflatten(some, self.shapes), x, y)
                parts.append(gram(grads[:, :b], grads[:, b], self.c.normalise))
            found.append([torch.cat(values).mean(0) for values in zip(*parts, strict=True)])
        k, c, square = (torch.stack(values) for values in zip(*found, strict=True))
        return k, c, square

    def learn(self, t: int, state: State) -> None:
        """Train the generator on D_{t-b}, ..., D_{t-1} against D_t, at the parameters that led to theta_t.

        ``errors`` gets the forecast error on D_t before that, and the error of uniform weights.

        Raises:
            UserError: the loss is not finite.
        """
        if self.method == "fgdlinear":
            return self.learn_linear(t, state)
        c, b = self.c, self.days
        theta = state["buffer"].to(self.run.device)
        if self.method == "fgdrand":
            g = self.run.generator("random parameters", self.seed, t)
            made = init_recommender(self.model, self.stream.levels, c.size, c.hidden, g, len(theta))
            theta = flatten(made).to(theta)
        ids, labels = self.samples(t, min(c.meta_batch, self.stream.size(t)), c.meta_batches)
        k, cc, square = self.grams(theta, ids, labels)
        inputs = ids[:, :b].to(self.run.device)
        self.net.load_state_dict(state["phi"])
        with torch.no_grad():
            before = float(forecast_error(self.net(inputs), k, cc, square).mean())
            uniform = float(forecast_error(torch.full_like(cc, 1 / b), k, cc, square).mean())
        dense = sum(self.stream.levels) < SPARSE_ROWS
        sgd = torch.optim.SGD(self.net.parameters(), lr=c.meta_lr, fused=dense)
        summaries = [summarise(x, sum(self.stream.levels)) for x in inputs]
        for step in range(c.meta_steps):
            i = step % len(inputs)
            sgd.zero_grad()  # the MFGG loss in Gram form
            loss = forecast_error(self.net(None, summaries[i]), k[i], cc[i], square[i])
            if not bool(loss.isfinite()):
                raise UserError(
                    f"the generator's loss is {loss.item()} in round {t + 1}, step {step}: try a lower --meta-lr"
                )
            loss.backward()
            sgd.step()
        state["phi"] = self.phi()
        state["errors"] = [*state["errors"], [before, uniform]]

    def learn_linear(self, t: int, state: State) -> None:
        """One step of exponentiated gradient at theta_t, whose gradients are taken on as many rows as fit."""
        a, b = state["phi"], self.days
        size = min(max(map(self.stream.size, range(t - b, t + 1))), EVALUATION_ROWS)
        ids, labels = self.samples(t, size, 1)
        theta = state["history"][-1]["theta"][None].to(self.run.device)
        k, c, square = (value[0].cpu() for value in self.grams(theta, ids, labels))
        error = [float(forecast_error(w, k, c, square)) for w in (a, torch.full_like(a, 1 / b))]
        bound = float(torch.maximum(k.diagonal().max(), square))
        eta = linear_rate(max(b, 2), len(self.stream), bound, self.c.eta)
        state["phi"] = exponentiated_gradient(a, linear_slope(a, k, c, square), eta)
        state["errors"] = [*state["errors"], error]

    # -- baselines

    def by_label(self, t: int) -> tuple[Tensor, Tensor]:
        """Rows of the negatives and of the positives of domain t."""
        rows = self.stream.day(t)
        positive = self.stream.labels[self.stream.bounds[t] : self.stream.bounds[t + 1]] > 0
        return rows[~positive], rows[positive]

    def spmf_fit(self, t: int, lr: float, state: State) -> State:
        """Train on what SPMF draws from its reservoirs and the new domain, then renew the reservoirs."""
        c, g = self.c, self.run.generator("spmf", self.seed, t)
        pools, new = state["pools"], self.by_label(t)
        rows = self.stream.day(t)
        if min(map(len, pools)):
            ranked = torch.cat([pools[1], new[1]]) if c.spmf_strategy == 1 else pools[1]
            parameters = unflatten(state["serving"][None].to(self.run.device), self.shapes)
            scores = []
            for part in ranked.split(EVALUATION_ROWS):
                with torch.no_grad():
                    scores.append(logits(parameters, self.stream.rows(part)[0][None].to(self.run.device))[0].cpu())
            with user_errors():
                pair = (pools[0], pools[1])
                rows = spmf_rows(pair, new, rank_weights(torch.cat(scores)), c.spmf_strategy, c.spmf_ratio, g)
        if t < self.days:  # the reservoirs have the size of b domains: the first b fill them
            state["pools"] = [torch.cat(both) for both in zip(pools, new, strict=True)]
        else:
            triples = zip(pools, new, state["seen"], strict=True)
            state["pools"] = [reservoir_update(pool, some, seen, g) for pool, some, seen in triples]
        state["seen"] = [seen + len(some) for seen, some in zip(state["seen"], new, strict=True)]
        return self.fit(state["history"][-1], [rows], t, lr, self.weights(state), state)

    def asmg_serve(self, t: int, state: State) -> Tensor:
        """Train the meta generator on b models against the domains they were deployed on; generate from the last b.

        The generator and the states that a window begins with are carried from round to round.
        """
        c, b, device = self.c, self.days, self.run.device
        theta = torch.stack([entry["theta"] for entry in state["history"][-b - 1 :]]).to(device)
        carried = {kind: h.to(device) for kind, h in state["carried"].items()}
        window, later = unflatten(theta[:-1], self.shapes), unflatten(theta[1:], self.shapes)
        g = self.run.generator("asmg", self.seed, t)
        orders = [self.stream.day(s)[torch.randperm(self.stream.size(s), generator=g)] for s in range(t - b + 1, t + 1)]
        n, weight, tables = max(map(len, orders)), recency(b).to(device), sum(self.stream.levels)
        self.net.load_state_dict(state["phi"])
        adam = torch.optim.Adam(self.net.parameters(), lr=c.asmg_lr, fused=True)
        for first in range(0, n, c.batch):
            at = torch.arange(first, min(first + c.batch, n))
            ids, labels = self.stream.rows(torch.stack([order[at % len(order)] for order in orders]))
            ids, labels, some, states = ids.to(device), labels.to(device), window, carried
            if tables > ids.numel():  # rows do not depend on each other: generate those that are read
                rows = ids.unique()
                some, ids = touched(window, ids)
                states = carried | {"tables": carried["tables"].index_select(1, rows)}
            adam.zero_grad()
            made, _ = self.net(some, states)
            (weight * losses(made, ids, labels)).sum().backward()
            adam.step()
        with torch.no_grad():
            _, state["carried"] = self.net(window, carried)
            made, _ = self.net(later, state["carried"])
        state["phi"] = self.phi()
        return flatten(made)[-1]

    # -- a round

    def update(self, t: int, lr: float, state: State) -> None:
        """After domain t has arrived: make theta_{t+1}."""
        b, history = self.b, state["history"]
        if self.fgd and t >= b:
            self.learn(t, state)
        if self.method == "spmf":
            entry = self.spmf_fit(t, lr, state)
        elif self.method == "ideal":  # an upper bound: it sees the domain that it is going to be judged on
            entry = self.fit(history[-1], [self.stream.day(t + 1)], t, lr, self.weights(state), state)
        elif b == 1 or t < b:  # rounds 1 .. b of the paper's count: incremental updates
            alone: Callable[[Tensor], Tensor] = lambda ids: torch.ones(1, device=ids.device)  # noqa: E731
            weigh = self.weights(state) if b == 1 else alone
            entry = self.fit(history[-1], [self.stream.day(t)], t, lr, weigh, state)
        else:  # from theta_{t+1-b}: no example is seen twice by a lineage
            days = [self.stream.day(s) for s in range(t + 1 - b, t + 1)]
            entry = self.fit(history[-b], days, t, lr, self.weights(state), state)
        state["history"] = [*history, entry][-max(self.days, b) - 1 :]
        state["serving"] = entry["theta"]
        if self.method == "asmg" and t >= self.days:
            state["serving"] = self.asmg_serve(t, state)


def plan(rates: int, offline: int, domains: int) -> list[tuple[int, int]]:
    """(learning rate, domain) of each step: the offline part with each rate, then the others with the best (-1)."""
    return [(i, t) for i in range(rates) for t in range(offline)] + [(-1, t) for t in range(offline, domains)]


def run_arm(unit: Unit, config: Config, run: Run, stream: streams.Stream, name: str, seed: int, key: Any) -> None:
    """Deploy, evaluate and update, domain by domain; the learning rate is chosen on the offline part."""
    model, arm = key
    updater = Updater(config, stream, model, arm, seed, run)
    offline = len(stream) - max(config.evaluate)
    steps = plan(len(config.lrs), offline, len(stream))
    judged = min(updater.days + 1, offline - 1)
    unit.state.setdefault("best", {"loss": float("inf")})
    unit.state.setdefault("scores", [])
    for step in unit.steps(len(steps), log_every=1):
        (i, t), state = steps[step], unit.state
        if i >= 0 and t == 0:
            state["arm"], state["loss"] = updater.start(), 0.0
        elif i < 0 and t == offline:
            state["arm"] = state["best"].pop("arm")
        lr = config.lrs[i if i >= 0 else state["best"]["rate"]]
        score = updater.deploy(t, state["arm"])
        unit.log(loss=score[1])
        if t + 1 < len(stream):
            updater.update(t, lr, state["arm"])
        if i < 0:
            state["scores"].append(score)
        elif t >= judged:
            state["loss"] += score[1]
        if i >= 0 and t == offline - 1 and state["loss"] < state["best"]["loss"]:
            state["best"] = {"loss": state["loss"], "rate": i, "arm": state["arm"]}
    scores = torch.tensor(unit.state["scores"], dtype=torch.float64)
    prefix, metrics = f"{name}/{model}/{arm}", {}
    for n in config.evaluate:
        last, suffix = scores[-n:], "" if len(config.evaluate) == 1 else str(n)
        metrics[f"{prefix}/auc{suffix}"] = float(last[:, 0].nanmean())
        metrics[f"{prefix}/logloss{suffix}"] = float(last[:, 1].mean())
    metrics[f"{prefix}/rate"] = config.lrs[unit.state["best"]["rate"]]
    errors = torch.tensor(unit.state["arm"]["errors"], dtype=torch.float64).view(-1, 2)
    if len(errors):
        metrics[f"{prefix}/forecast_error"], metrics[f"{prefix}/uniform_error"] = errors.mean(0).tolist()
        for part, rows in (("early", errors[:3]), ("late", errors[-10:])):
            metrics[f"{prefix}/{part}_ratio"] = float(rows[:, 0].sum() / rows[:, 1].sum())
        weights = torch.tensor(unit.state["arm"]["weights"][-max(config.evaluate) :], dtype=torch.float64).mean(0)
        metrics |= {f"{prefix}/weight{i}": float(w) for i, w in enumerate(weights.flip(0))}
    rounds = max(1, len(steps) - 1)
    unit.finish(metrics, {f"{prefix}/round_seconds": unit.seconds / rounds}, {"scores": scores, "errors": errors})


# ---- theory: local regret --------------------------------------------------------------------------------------------


def run_regret(unit: Unit, config: Config, run: Run, stream: streams.Stream, window: int, arm: str) -> None:
    """Local regret R_w = mean ||grad F_{t,w}(theta_t)||^2 with full gradients, beside its bound by the forecast error.

    ``linear`` combines the last b gradients (appendix, Algorithm 1), ``batch`` has m = grad r_{t-w}, which makes m_bar
    the mean gradient of the last w domains.
    """
    b, prefix = config.regret_days, f"regret/{arm}{window}"
    rows = [stream.rows(stream.day(t)) for t in range(len(stream))]
    state = unit.state
    if "rounds" not in state:
        g = run.generator("initial model", 0)
        state["theta"] = init_recommender("lr", stream.levels, 1, (), g)
        state |= {"a": torch.full((b,), 1 / b), "rounds": [], "bound": 0.0, "steps": 0, "norm": 0.0}
        if arm == "batch":
            state["a"] = torch.eye(b)[b - window]

    for t in unit.steps(len(stream) - b + 1):  # t domains after the first b have arrived; all of 1 .. b at t = 0
        now = t + b - 1
        if t > 0:  # deployed on the domain that has just arrived
            days = range(now - b, now + 1)
            ids, labels = (torch.stack(part) for part in zip(*(rows[s] for s in days), strict=True))
            grads = torch.stack([gradients(state["theta"], x[None], y[None])[0] for x, y in zip(ids, labels)])
            k, c, square = (value[0] for value in gram(grads[None, :b], grads[None, b], normalise=False))
            error = max(0.0, float(forecast_error(state["a"], k, c, square)))
            regret = float(grads[b + 1 - window :].mean(0).square().sum())
            limit = 2 * config.delta**2 + 2 / window**2 * error
            state["rounds"].append([regret, error, regret - limit, float(state["norm"] > config.delta)])
            unit.log(regret=regret, forecast_error=error)
            if arm == "linear":
                state["bound"] = max(state["bound"], float(grads.square().sum(1).max()))
                eta = linear_rate(max(b, 2), len(stream), state["bound"], config.eta)
                state["a"] = exponentiated_gradient(state["a"], linear_slope(state["a"], k, c, square), eta)
        if now + 1 < len(stream):
            days = range(now + 1 - b, now + 1)
            ids, labels = (torch.stack(part) for part in zip(*(rows[s] for s in days), strict=True))
            weights = smooth(state["a"], window)
            state["theta"], state["norm"], steps = descend(
                state["theta"], ids, labels, weights, config.descent_step, config.delta, config.descent_steps
            )
            state["steps"] += steps
    rounds = torch.tensor(state["rounds"], dtype=torch.float64)
    metrics = {
        f"{prefix}/local_regret": float(rounds[:, 0].mean()),
        f"{prefix}/forecast_error": float(rounds[:, 1].mean()),
        f"{prefix}/largest_excess": float(rounds[:, 2].max()),
        f"{prefix}/unfinished_rounds": float(rounds[:, 3].sum()),
        f"{prefix}/steps": float(state["steps"]),
    }
    if arm == "linear":
        metrics |= {f"{prefix}/weight{i}": float(w) for i, w in enumerate(state["a"].flip(0))}
    unit.finish(metrics, keep={"rounds": rounds})


# ---- the run ---------------------------------------------------------------------------------------------------------


def keys_of(config: Config, seed: int) -> list[tuple[Any, ...]]:
    """The units of a seed: (seed, stream, recommender, arm), and (seed, "regret", window, arm)."""
    out: list[tuple[Any, ...]] = []
    for i, model in enumerate(config.models):
        arms = (*config.arms, *(config.first_only if i == 0 else ()))
        out += [(seed, config.dataset, model, arm) for arm in arms]
    out += [(seed, "drift", config.models[0], arm) for arm in config.control]
    return out + [(seed, "regret", window, arm) for window in config.regret for arm in ("linear", "batch")]


def train(config: Config, run: Run) -> None:
    """Every unit of every seed, the claims and the figure."""
    if run.world_size > 1:
        raise UserError("the models of a stream are small and follow each other: expected one process, not torchrun")
    if run.precision == "16-mixed":
        raise UserError("--precision 16-mixed needs scaled losses, expected 32 or bf16-mixed")
    cached: dict[str, Any] = {}

    def stream_of(seed: int, name: str) -> streams.Stream:
        key = (seed if config.dataset == "seasonal" else 0, name == "drift")
        if cached.get("key") != key:
            used = replace(config, season=0.0) if name == "drift" else config
            cached["stream"] = load(used, run.data, run.derive_seed("stream", seed), run.print)
            cached["key"] = key
        return cached["stream"]

    keys = [key for seed in run.seeds for key in keys_of(config, seed)]
    if config.dataset == "seasonal":
        spec = {name: getattr(config, name) for name in ("rows", "domains", "period", "season", "drift")}
        run.data_used("seasonal", "generated", spec=spec | {"seeds": run.seeds, "control": bool(config.control)})
    else:
        for path in stream_of(run.seeds[0], config.dataset).files:
            size = path.stat().st_size  # a terabyte is not read once more for its hash
            origin: dict[str, Any] = {"path": path} if size < LARGE_FILE else {"spec": [path.name, size]}
            run.data_used(f"{config.dataset}/{path.name}", "real", **origin)
    for unit in run.units(keys):
        seed, name, *rest = unit.key
        stream = stream_of(seed, name)
        if name == "regret":
            run_regret(unit, config, run, stream, *rest)
        else:
            run_arm(unit, config, run, stream, name, seed, rest)
    if run.preset.claims:
        decide(config, run)
    run.figure(draw(config, run))


def decide(config: Config, run: Run) -> None:
    """The claims of paper.toml, those whose arms were run."""
    m = {name: summary.mean for name, summary in run.metrics.items()}

    def score(model: str, arm: str, kind: str = "auc", stream: str = config.dataset) -> float:
        return m[f"{stream}/{model}/{arm}/{kind}"]

    def beats(model: str, high: str, low: str, margin: float) -> bool:
        better = score(model, high) > score(model, low) + margin
        return better and score(model, high, "logloss") < score(model, low, "logloss")

    arms, first = {*config.arms, *config.first_only}, config.models[0]
    if {"bu3", "fgd3"} <= {*config.arms}:
        name, places = "never_worse", [(config.dataset, model) for model in config.models]
        if {"bu3", "fgd3"} <= {*config.control}:
            places.append(("drift", first))
        measured, holds = {}, True
        for stream, model in places:
            gain = score(model, "fgd3", stream=stream) - score(model, "bu3", stream=stream)
            holds = holds and gain > -run.threshold(name)
            measured[f"{stream}_{model}_gain"] = gain
            if f"{stream}/{model}/iu/logloss" in m:
                less = score(model, "iu", "logloss", stream) - score(model, "fgd3", "logloss", stream)
                holds = holds and less > 0
                measured[f"{stream}_{model}_logloss_below_iu"] = less
        run.claim(name, holds, **measured)
    if config.dataset != "seasonal":
        return  # the other claims are about a season, or about its absence
    for model in config.models:
        if {"bu3", "fgd3"} <= {*config.arms} and model in ("fm", "deepfm"):
            name = f"fgd_beats_batch_{model}"
            measured = {
                f"{arm}_{kind}": score(model, arm, kind) for arm in ("fgd3", "bu3") for kind in ("auc", "logloss")
            }
            run.claim(name, beats(model, "fgd3", "bu3", run.threshold(name)), **measured)
    if {"iu", "bu3"} <= {*config.arms}:
        name = "batch_beats_incremental"
        holds = all(beats(model, "bu3", "iu", run.threshold(name)) for model in config.models)
        run.claim(name, holds, **{f"{mo}_{arm}": score(mo, arm) for mo in config.models for arm in ("bu3", "iu")})
    if {"asmg3", "spmf3", "fgd3"} <= {*config.arms}:
        name = "fgd_beats_asmg_and_spmf"
        measured = {f"{mo}_{arm}": score(mo, arm) for mo in config.models for arm in ("fgd3", "asmg3", "spmf3")}
        holds = all(
            score(mo, "fgd3") > max(score(mo, "asmg3"), score(mo, "spmf3")) + run.threshold(name)
            for mo in config.models
        )
        run.claim(name, holds, **measured)
    if {"bu3", "fgd3"} <= {*config.control}:
        name = "without_season_no_difference"
        fgd, batch = (score(first, arm, stream="drift") for arm in ("fgd3", "bu3"))
        run.claim(name, abs(fgd - batch) < run.threshold(name), fgd3=fgd, bu3=batch)
    if {"fgd3", "fgdrand3"} <= arms:
        name = "trajectory_buffer_suffices"
        fgd, random = score(first, "fgd3"), score(first, "fgdrand3")
        run.claim(name, fgd >= random - run.threshold(name), trajectory=fgd, random=random)
    if "fgd3" in arms:
        name = "forecast_error_falls"
        early, late = (score(first, "fgd3", f"{part}_ratio") for part in ("early", "late"))
        run.claim(name, late < early and late < run.threshold(name, "ratio"), early=early, late=late)
    if 1 in config.regret:
        name = "forecast_lowers_the_regret"
        linear, batch = m["regret/linear1/local_regret"], m["regret/batch1/local_regret"]
        excess = max(m[f"regret/{arm}{w}/largest_excess"] for w in config.regret for arm in ("linear", "batch"))
        holds = linear < run.threshold(name, "ratio") * batch and excess <= 1e-6
        run.claim(name, holds, linear=linear, batch=batch, largest_excess=excess)


def draw(config: Config, run: Run) -> Any:
    """AUC by domain with the first recommender, AUC of every arm, and the forecast error by round."""
    figure, (curves, bars, errors) = report.figure(1, 3, width=4.0)
    first, name = config.models[0], config.dataset
    colours = dict(zip((*config.arms, *config.first_only), report.COLOURS * 3))
    kind = "auc" if len(config.evaluate) == 1 else f"auc{max(config.evaluate)}"
    shown = [arm for arm in config.arms if parse_arm(arm)[0] in ("iu", "bu", "fgd", "asmg")]
    for arm in shown:
        scores = torch.stack([run.kept((seed, name, first, arm))["scores"] for seed in run.seeds]).mean(0)
        x = range(config.domains - len(scores) + 1, config.domains + 1)
        counted = config.dataset == "seasonal" or (config.dataset == "movielens" and not config.span)
        curves.plot(x if counted else range(1, len(scores) + 1), scores[:, 0])
        curves.lines[-1].set(color=colours[arm], label=arm)
    curves.set(title=f"{name}, {first}", xlabel="domain", ylabel="AUC on the next domain")
    curves.legend(fontsize=7)
    labels = []
    for model in config.models:
        for arm in (*config.arms, *(config.first_only if model == first else ())):
            value = run.metrics[f"{name}/{model}/{arm}/{kind}"]
            bars.barh(len(labels), value.mean, xerr=value.std, color=colours[arm])
            labels.append(f"{model} {arm}")
    low = min(run.metrics[f"{name}/{m}/{a}/{kind}"].mean for m in config.models for a in config.arms)
    bars.set_yticks(range(len(labels)), labels, fontsize=7)
    bars.invert_yaxis()
    bars.set(title="AUC, mean over domains", xlim=(low - 0.02, None))
    for arm in (*config.arms, *config.first_only):
        if parse_arm(arm)[0].startswith("fgd"):
            found = torch.stack([run.kept((seed, name, first, arm))["errors"] for seed in run.seeds]).mean(0)
            x = range(parse_arm(arm)[1] + 1, parse_arm(arm)[1] + 1 + len(found))
            errors.plot(x, found[:, 0] / found[:, 1], color=colours[arm], label=arm)
    errors.axhline(1.0, color="0.5", lw=1, ls="--")
    errors.set(title="forecast error / that of uniform weights", xlabel="round")
    for axes in (curves, errors):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if errors.get_legend_handles_labels()[1]:
        errors.legend(fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command; ``argv`` are the words after ``train.py``."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
