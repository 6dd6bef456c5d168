"""Train xDeepInt and the models it is compared with, arm by arm, and report AUC and log loss on the test rows.

An arm is a data set and a model, for example ``criteo/xdeepint`` or ``criteo/xdeepint:layers=2,subspaces=1``; behind
the colon stand flags that differ for this arm. The default run plants interactions of known order and lets the models
find them, compares all models on MovieLens-100k, and looks at the sparsity that group-lasso FTRL leaves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from shared import cli
from shared.cli import Preset

TABLE_1 = (
    "lr",
    "fm",
    "dnn",
    "wide_deep",
    "deepfm",
    "deep_crossing",
    "dcn",
    "pnn",
    "xdeepfm",
    "autoint",
    "fibinet",
    "xdeepint",
)
MODEL_NAMES = (*TABLE_1, "xdeepint_plus", "bayes")
DATASET_NAMES = ("pairs", "triples", "noise", "ml100k", "frappe", "criteo", "avazu", "ipinyou")
ACTIVATION_NAMES = ("linear", "tanh", "sigmoid", "softplus", "swish", "relu", "leaky_relu", "elu", "selu")


@dataclass(frozen=True)
class Config:
    """What to train, and how."""

    arms: tuple[str, ...] = ("criteo/xdeepint",)
    """Arms to train: DATA/MODEL or DATA/MODEL:flag=value,flag=value."""
    per_data: tuple[str, ...] = ()
    """DATA:flag=value,... for every arm of that data set; goes before the flags and behind the arm's own."""
    embedding_size: int = 16
    """K, numbers per level."""
    layers: int = 4
    """L, interaction layers of xDeepInt (also crosses of DCN)."""
    subspaces: int = 16
    """h, sub-spaces of xDeepInt; divides the embedding size."""
    activation: Literal["linear", "tanh", "sigmoid", "softplus", "swish", "relu", "leaky_relu", "elu", "selu"] = (
        "linear"
    )
    """Activation of xDeepInt's maps (Table 4)."""
    residual: bool = True
    """The paper's X_l = X_{l-1} o (1 + W_l X_0); without it the official code's other form."""
    join: Literal["code", "layer"] = "code"
    """How the form without residual connections concatenates its layers when h > 1."""
    dropout: float = 0.0
    """Dropout in front of xDeepInt's maps and behind the layers of the feed-forward networks."""
    hidden: tuple[int, ...] = (400, 400, 400)
    """Widths of the feed-forward networks (and number of residual units of Deep Crossing)."""
    product: Literal["inner", "outer", "both"] = "both"
    """Products of PNN."""
    maps: tuple[int, ...] = (128, 128)
    """Feature maps of the CIN of xDeepFM."""
    attention: int = 32
    """Width of AutoInt's layers, its two heads together."""
    optimizer: Literal["paper", "adam", "ftrl", "gftrl"] = "paper"
    """paper: G-FTRL on tables and FTRL on the rest for xDeepInt, FTRL for LR and FM, Adam for the others."""
    adam_lr: float = 1e-3
    """Learning rate of Adam."""
    l2: float = 1e-4
    """L2 penalty on the dense layers under Adam."""
    gftrl_alpha: float = 0.01
    """Learning rate of G-FTRL."""
    gftrl_beta: float = 1.0
    """beta of G-FTRL."""
    gftrl_lambda1: float = 10.0
    """Group-lasso threshold of G-FTRL, for a loss summed over the mini-batch."""
    gftrl_lambda2: float = 10.0
    """L2 term of G-FTRL."""
    sigma: Literal["formula", "none"] = "formula"
    """G-FTRL as published, or without the sigma w term, as the released code computes it."""
    ftrl_lr: float = 0.01
    """Learning rate of FTRL."""
    ftrl_l1: float = 0.1
    """l1 of FTRL."""
    ftrl_l2: float = 0.1
    """l2 of FTRL."""
    sparse: bool = False
    """Sparse gradients of the tables: a step costs the levels of its batch, not those of the table."""
    dense_updates: bool = False
    """With sparse gradients: levels not met so far become zero at the first step, as in a dense update."""
    batch: int = 4096
    """Global batch size."""
    micro_batch: int = 0
    """Rows in one forward pass on one device; 0 takes the whole share."""
    epochs: int = 10
    """Most passes through the training rows."""
    eval_every: int = 2000
    """Steps between two evaluations on the validation rows; 0 evaluates once an epoch."""
    patience: int = 3
    """Evaluations without a better validation log loss after which training stops; 0 never stops early."""
    eval_batch: int = 16384
    """Rows in one forward pass of an evaluation."""
    shuffle: bool = True
    """Visit the training rows in a new random order each epoch."""
    planted_rows: int = 60_000
    """Training rows of the generated data sets."""
    min_count: int = 20
    """Levels met less often in the training rows are treated as missing."""
    split: Literal["random", "modulo"] = "random"
    """70/10/20 at random, or the official code's row % 1000 <= 800 without validation."""
    split_seed: int = 0
    """Seed of the random division of Criteo, Avazu and iPinYou."""
    numeric: Literal["xdeepint", "winner"] = "xdeepint"
    """Binning of Criteo's integers: floor(ln(x^2 + 1)), or floor(ln(x)^2) as the winners of the challenge did."""
    official_columns: bool = False
    """Leave out Criteo's I13, as the official script does."""
    cache: str = ""
    """Folder for the encoded text data; empty takes the user's cache folder."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: names the flag and what is expected.
        """
        least = {
            "embedding_size": 1,
            "layers": 0,
            "subspaces": 1,
            "attention": 2,
            "batch": 1,
            "micro_batch": 0,
            "epochs": 1,
            "eval_every": 0,
            "patience": 0,
            "eval_batch": 1,
            "planted_rows": 100,
            "min_count": 1,
            "split_seed": 0,
            "l2": 0,
            "gftrl_beta": 0,
            "gftrl_lambda1": 0,
            "gftrl_lambda2": 0,
            "ftrl_l1": 0,
            "ftrl_l2": 0,
            "dropout": 0,
        }
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least {bound}")
        for name in ("adam_lr", "gftrl_alpha", "ftrl_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a number above 0")
        if self.dropout >= 1:
            raise ValueError(f"--dropout is {self.dropout}, expected below 1")
        if self.embedding_size % self.subspaces:
            raise ValueError(f"embedding size {self.embedding_size} is not divisible by {self.subspaces} sub-spaces")
        for name in ("hidden", "maps"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected widths of at least 1")
        for item in self.per_data:
            data, _, options = item.partition(":")
            if data not in DATASET_NAMES or not options:
                raise ValueError(
                    f"--per-data {item!r}: expected DATA:flag=value with DATA of {', '.join(DATASET_NAMES)}"
                )
            _options(options, item)
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("--arms names an arm twice")
        for arm in self.arms:
            parse_arm(arm, self)


def parse_arm(arm: str, config: Config) -> tuple[str, str, Config]:
    """(data set, model, its Config) of an arm.

    Raises:
        ValueError: unknown data set, model or flag, or a bad value.
    """
    name, _, options = arm.partition(":")
    data, _, model = name.partition("/")
    if data not in DATASET_NAMES:
        raise ValueError(f"arm {arm!r}: unknown data set {data!r}, expected one of {', '.join(DATASET_NAMES)}")
    if model not in MODEL_NAMES:
        raise ValueError(f"arm {arm!r}: unknown model {model!r}, expected one of {', '.join(MODEL_NAMES)}")
    if model == "bayes" and data not in DATASET_NAMES[:3]:
        raise ValueError(f"arm {arm!r}: the generating model is known for {', '.join(DATASET_NAMES[:3])} only")
    values: dict[str, Any] = {}
    for item in config.per_data:
        if item.partition(":")[0] == data:
            values |= _options(item.partition(":")[2], item)
    values |= _options(options, arm)
    try:
        return data, model, dataclasses.replace(config, arms=(), per_data=(), **values)
    except ValueError as error:
        raise ValueError(f"arm {arm!r}: {error}") from error


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """What each flag may be, where it is one of a few words."""
    return {name: get_args(hint) for name, hint in get_type_hints(Config).items()}


def _options(text: str, where: str) -> dict[str, Any]:
    """``layers=3,hidden=64x32`` as values of the Config's types."""
    known = {f.name: f for f in dataclasses.fields(Config) if f.name not in ("arms", "per_data")}
    out: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, sign, value = pair.partition("=")
        name = name.replace("-", "_")
        if name not in known or not sign:
            raise ValueError(f"{where!r}: {pair!r} is not flag=value with a flag of --help")
        default = known[name].default
        choices = _choices()[name] if isinstance(default, str) else ()
        try:
            if isinstance(default, bool):
                out[name] = {"true": True, "false": False}[value.lower()]
            elif isinstance(default, tuple):
                out[name] = tuple(int(part) for part in value.split("x"))
            else:
                out[name] = type(default)(value)
        except (ValueError, KeyError):
            raise ValueError(f"{where!r}: {value!r} is no value for {name}") from None
        if choices and out[name] not in choices:
            raise ValueError(f"{where!r}: {name} is {value!r}, expected one of {', '.join(choices)}")
    return out


PAIRS = (
    "bayes",
    "lr",
    "fm",
    "xdeepint:layers=0",
    "xdeepint:layers=1,subspaces=1",
    "xdeepint:layers=1,subspaces=2",
    "xdeepint:layers=1,subspaces=4",
)
TRIPLES = ("bayes", "lr", "fm", "xdeepint:layers=1", "xdeepint:layers=2", "xdeepint:layers=3")
MOVIELENS = (*TABLE_1, "xdeepint_plus", "xdeepint:optimizer=adam")
NOISE = ("xdeepint:optimizer=adam", "xdeepint:optimizer=gftrl", "xdeepint:optimizer=gftrl,ftrl_l1=3")
DEFAULT = Config(
    arms=(
        *(f"pairs/{model}" for model in PAIRS),
        *(f"triples/{model}" for model in TRIPLES),
        *(f"ml100k/{model}" for model in MOVIELENS),
        *(f"noise/{model}" for model in NOISE),
    ),
    per_data=(
        "ml100k:embedding_size=8,subspaces=8,hidden=64x64,maps=16x16,adam_lr=0.005,epochs=10,patience=2,"
        "gftrl_alpha=0.05,gftrl_lambda1=3,gftrl_lambda2=10,ftrl_lr=0.05,ftrl_l1=0.1,ftrl_l2=0.1",
        "noise:layers=1,gftrl_lambda1=6,gftrl_lambda2=1,ftrl_l1=0.1,ftrl_l2=0.1",
    ),
    embedding_size=4,
    layers=2,
    subspaces=4,
    adam_lr=0.01,
    gftrl_alpha=0.2,
    gftrl_lambda1=0,
    gftrl_lambda2=0,
    ftrl_lr=0.1,
    ftrl_l1=0,
    ftrl_l2=0,
    batch=512,
    epochs=6,
    eval_every=0,
)
PAPER = Config(sparse=True)
AVAZU = dataclasses.replace(PAPER, layers=3, subspaces=4)
BASES = {"criteo": PAPER, "avazu": AVAZU, "ipinyou": AVAZU}
SOURCES = {
    "criteo": "Criteo train.txt (Kaggle display advertising)",
    "avazu": "Avazu train.csv (Kaggle)",
    "ipinyou": "iPinYou train.log.txt (make-ipinyou-data)",
}
HOURS = {"criteo": 1.5, "avazu": 0.5, "ipinyou": 0.3}
STUDIES = {
    "models": ("Table 1", TABLE_1),
    # the cell L = 3, h = 1 stands in Tables 2 and 3 with different numbers; the order of the options tells them apart
    "depth": ("Table 2", tuple(f"xdeepint:subspaces=1,layers={n}" for n in range(6))),
    "subspaces": ("Table 3", tuple(f"xdeepint:layers=3,subspaces={n}" for n in (1, 2, 4, 8, 16))),
    "activation": ("Table 4", tuple(f"xdeepint:activation={name}" for name in ACTIVATION_NAMES)),
    "optimizer": ("Table 5", ("xdeepint:optimizer=gftrl", "xdeepint:optimizer=adam")),
    "plus": ("Table 7", ("xdeepint", "xdeepint_plus")),
}


def _paper_presets() -> Iterator[tuple[str, Preset]]:
    for data, base in BASES.items():
        common = {"data": SOURCES[data], "hardware": "1 GPU, 16 GB", "needs_data": True, "claims": False}
        one, hours = dataclasses.replace(base, arms=(f"{data}/xdeepint",)), HOURS[data]
        yield data, Preset(one, hours=hours, note="Tables 1 and 6", **common)
        if data == "criteo":
            code = dataclasses.replace(
                one,
                gftrl_alpha=0.02,
                ftrl_lr=0.02,
                min_count=21,
                split="modulo",
                official_columns=True,
                shuffle=False,
                epochs=1,
                patience=0,
                dense_updates=True,
            )
            note = "settings of the released code; --sigma none for its update"
            yield "criteo-code", Preset(code, hours=hours, note=note, **common)
        for study, (table, models) in STUDIES.items():
            if study == "activation" and data != "criteo":
                continue
            arms = dataclasses.replace(base, arms=tuple(f"{data}/{model}" for model in models))
            yield f"{data}-{study}", Preset(arms, hours=hours * len(models), note=table, **common)


PRESETS = {
    "default": Preset(
        DEFAULT,
        seeds=3,
        data="planted interactions; MovieLens-100k of the package recbole",
        hours=0.07,
        why_not_comparable="planted interactions and MovieLens-100k, not the paper's data sets",
    ),
    "smoke": Preset(
        dataclasses.replace(
            DEFAULT,
            arms=("pairs/fm", "pairs/xdeepint", "noise/xdeepint:optimizer=gftrl,sparse=true"),
            planted_rows=4096,
            epochs=1,
        ),
        data="planted interactions",
        hours=0.003,
        claims=False,
        why_not_comparable="a few steps on generated data",
    ),
    "frappe": Preset(
        Config(
            arms=tuple(f"frappe/{model}" for model in TABLE_1),
            layers=3,
            gftrl_alpha=0.05,
            gftrl_lambda1=1.0,
            ftrl_lr=0.05,
            batch=4096,
            epochs=40,
            eval_every=0,
        ),
        data="Frappe in libFM format (frappe.train.libfm, ...)",
        hours=1.0,
        needs_data=True,
        claims=False,
        why_not_comparable="not a data set of the paper",
    ),
    **dict(_paper_presets()),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)  # bad usage, --help and --list-presets are answered before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from shared import report  # noqa: E402
from shared.ctr import ClickTable, auc, log_loss  # noqa: E402
from shared.errors import UserError, user_errors  # noqa: E402
from shared.run import Run, Unit, unwrap  # noqa: E402
from shared.sampling import EpochSampler  # noqa: E402

from data import NEEDS_FOLDER, Split, check, frappe, load_text, movielens, planted, planted_spec, sources  # noqa: E402
from model import (  # noqa: E402
    ACTIVATIONS,
    FTRL,
    GFTRL,
    MODELS,
    XDeepInt,
    count_parameters,
    sparsity,
    split_parameters,
)

assert tuple(ACTIVATIONS) == ACTIVATION_NAMES


def check_data(config: Config, folder: Path | None) -> list[str]:
    """What is there for the data sets of the arms.

    Raises:
        UserError: a file is missing or malformed.
    """
    names = dict.fromkeys(parse_arm(arm, config)[0] for arm in config.arms)
    return [line for name in names for line in check(name, folder, config.numeric, config.official_columns)]


def load(name: str, config: Config, run: Run, seed: int) -> Split:
    """The data set of an arm. Generated data and MovieLens are drawn and divided anew for each seed."""
    if name == "ml100k":
        return movielens(run.data, run.derive_seed("split", seed) % 2**31)
    if name not in NEEDS_FOLDER:
        return planted(name, run.derive_seed("planted", seed), config.planted_rows)
    if run.data is None:
        raise UserError(f"{name} needs --data DIR; see Data in README.md")
    if name == "frappe":
        return frappe(run.data)
    return load_text(
        name,
        run.data,
        min_count=config.min_count,
        split=config.split,
        split_seed=config.split_seed,
        numeric=config.numeric,
        official_columns=config.official_columns,
        cache=Path(config.cache) if config.cache else None,
        say=run.print,
    )


def build(name: str, levels: Sequence[int], config: Config, sparse: bool = False) -> torch.nn.Module:
    """A model of Table 1 under the arm's options.

    Raises:
        ValueError: sizes that do not fit together.
    """
    common: dict[str, Any] = {"levels": levels, "size": config.embedding_size, "sparse": sparse}
    deep = {"hidden": config.hidden, "dropout": config.dropout}
    options: dict[str, dict[str, Any]] = {
        "lr": {},
        "fm": {},
        "dnn": deep,
        "wide_deep": deep | {"wide": True},
        "deepfm": deep,
        "deep_crossing": deep,
        "dcn": deep | {"crosses": config.layers},
        "pnn": deep | {"product": config.product},
        "xdeepfm": deep | {"maps": config.maps},
        "autoint": {"attention": config.attention},
        "fibinet": deep,
    }
    pin = {
        "layers": config.layers,
        "subspaces": config.subspaces,
        "activation": config.activation,
        "residual": config.residual,
        "dropout": config.dropout,
        "join": config.join,
    }
    options |= {"xdeepint": pin, "xdeepint_plus": pin | {"hidden": config.hidden}}
    return MODELS[name](**common, **options[name])


def make_optimizers(model: torch.nn.Module, name: str, config: Config) -> tuple[list[torch.optim.Optimizer], bool]:
    """The optimisers of an arm, and whether their loss is the sum over the mini-batch (FTRL) or its mean (Adam)."""
    kind = config.optimizer
    if kind == "paper":
        kind = {"lr": "ftrl", "fm": "ftrl", "xdeepint": "gftrl", "xdeepint_plus": "gftrl"}.get(name, "adam")
    tables, rest = split_parameters(model)
    if kind == "adam":
        matrices = [p for p in rest if p.ndim > 1]
        vectors = [p for p in rest if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.l2}, {"params": vectors}]
        if config.sparse:
            lazy = torch.optim.SparseAdam(tables, lr=config.adam_lr)
            return [lazy, torch.optim.Adam([g for g in groups if g["params"]], lr=config.adam_lr, fused=True)], False
        groups.append({"params": tables})
        return [torch.optim.Adam([g for g in groups if g["params"]], lr=config.adam_lr, fused=True)], False
    ftrl = {"lr": config.ftrl_lr, "l1": config.ftrl_l1, "l2": config.ftrl_l2, "dense_updates": config.dense_updates}
    if kind == "ftrl":
        return [FTRL([*tables, *rest], **ftrl)], True
    group_lasso = GFTRL(
        tables,
        alpha=config.gftrl_alpha,
        beta=config.gftrl_beta,
        lambda1=config.gftrl_lambda1,
        lambda2=config.gftrl_lambda2,
        sigma=config.sigma,
        dense_updates=config.dense_updates,
    )
    return [group_lasso, FTRL(rest, **ftrl)], True


@torch.no_grad()
def predict(model: torch.nn.Module, table: ClickTable, rows: torch.Tensor, batch: int, run: Run) -> torch.Tensor:
    """Logits (N,) of ``rows``, on the CPU; under torchrun each process computes its share and all get all of them."""
    model.eval()
    share = -(-len(rows) // run.world_size)
    mine = rows[run.rank * share : (run.rank + 1) * share]
    out = torch.zeros(share, device=run.device)
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        ids = table.ids.index_select(0, part).to(run.device)
        out[start : start + len(part)] = unwrap(model)(ids).float()
    model.train()
    if run.world_size > 1:
        every = [torch.empty_like(out) for _ in range(run.world_size)]
        torch.distributed.all_gather(every, out)
        out = torch.cat(every)[: len(rows)]
    return out.cpu()


def scores(table: ClickTable, rows: torch.Tensor, logits: torch.Tensor, what: str) -> tuple[float, float]:
    """(AUC, log loss) of logits for ``rows``.

    Raises:
        UserError: only one class among them.
    """
    labels = table.labels.index_select(0, rows)
    try:
        return auc(labels, logits), log_loss(labels, logits)
    except UserError as error:
        raise UserError(f"{what} rows: {error}") from error


def fit(unit: Unit, name: str, arm: str, config: Config, run: Run, split: Split, seed: int) -> None:
    """Train one arm to its best validation log loss and record its test scores."""
    table = split.table
    if len(split.train) == 0 or len(split.test) == 0:
        raise UserError(
            f"{arm}: {len(split.train)} training and {len(split.test)} test rows, expected at least one each"
        )
    # gloo reduces sparse gradients, NCCL does not
    sparse = config.sparse and not (run.world_size > 1 and run.device.type == "cuda")
    config = dataclasses.replace(config, sparse=sparse)
    with user_errors():
        model = build(name, table.levels, config, sparse)
    optimizers, summed = make_optimizers(model, name, config)
    run.print(f"{unit.name}: {count_parameters(model):,} parameters, {len(split.train):,} training rows")
    model, *optimizers = run.setup(model, *optimizers)
    unit.attach(model=model, **{f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)})
    unit.state.setdefault("best", math.inf)
    unit.state.setdefault("worse", 0)
    sampler = EpochSampler(len(split.train), config.batch, run.derive_seed("order", seed), shuffle=config.shuffle)
    total = config.epochs * len(sampler)
    every = config.eval_every or len(sampler)
    before, done = unit.seconds, 0
    for step in unit.steps(total):
        index = split.train[sampler[step]]
        for optimizer in optimizers:
            optimizer.zero_grad()
        mean_loss, largest = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
        for rows, weight in run.shard(index, config.micro_batch or None):
            ids, labels = (t.to(run.device, non_blocking=True) for t in table.batch(rows))
            logits = model(ids)
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            # FTRL's thresholds are meant for the sum over the mini-batch, Adam for the mean
            run.backward(loss * (weight * len(index) if summed else weight))
            mean_loss += loss.detach() * weight
            largest = torch.maximum(largest, logits.detach().abs().max())
        for optimizer in optimizers:
            optimizer.step()
        done += len(index)
        try:
            unit.log(loss=mean_loss)
        except UserError as error:
            hint = "try a lower learning rate or fewer layers"
            raise UserError(f"{error}; the largest |logit| of the step is {float(largest):.4g}: {hint}") from error
        if len(split.valid) and ((step + 1) % every == 0 or step + 1 == total):
            logits = predict(model, table, split.valid, config.eval_batch, run)
            _, valid_loss = scores(table, split.valid, logits, f"{arm}: validation")
            if valid_loss < unit.state["best"]:
                weights = {k: v.detach().cpu().clone() for k, v in unwrap(model).state_dict().items()}
                unit.state.update(best=valid_loss, worse=0, weights=weights)
            else:
                unit.state["worse"] += 1
            if config.patience and unit.state["worse"] >= config.patience:
                break
    seconds = unit.seconds - before
    if "weights" in unit.state:
        unwrap(model).load_state_dict(unit.state["weights"])
    logits = predict(model, table, split.test, config.eval_batch, run)
    area, loss = scores(table, split.test, logits, f"{arm}: test")
    metrics = {f"{arm}/test_auc": area, f"{arm}/test_logloss": loss}
    inner = unwrap(model)
    if isinstance(inner, XDeepInt) and any(group.get("lambda1") for o in optimizers for group in o.param_groups):
        ratios = sparsity(inner)
        metrics |= {f"{arm}/{key}": ratios[key] for key in ("feature_sparse_ratio", "weight_sparse_ratio")}
    if name.startswith("xdeepint") and arm.startswith("noise/"):
        zero = [(inner.embedding.field(f) == 0).all(1).float().mean().item() for f in (8, 9)]
        metrics[f"{arm}/noise_sparse_ratio"] = sum(zero) / 2
    unit.finish(metrics, timings={f"{arm}/rows_per_second": done / max(seconds, 1e-9)} if done else None)


def train(config: Config, run: Run) -> None:
    """Every seed and arm in turn, then the claims and the figure."""
    arms = {arm: parse_arm(arm, config) for arm in config.arms}
    for name in dict.fromkeys(data for data, _, _ in arms.values()):
        if name in NEEDS_FOLDER or name == "ml100k":
            for path in sources(name, run.data):
                run.data_used(name, kind="real", path=path)
        else:
            run.data_used(name, kind="generated", spec=planted_spec(name, config.planted_rows))
    loaded: tuple[Any, Split] | None = None
    for unit in run.units((seed, arm) for seed in run.seeds for arm in config.arms):
        seed, arm = unit.key
        data, model, options = arms[arm]
        key = (data, seed, options.planted_rows, options.min_count, options.split, options.split_seed, options.numeric)
        key += (options.official_columns, options.cache)
        if loaded is None or loaded[0] != key:
            loaded = None  # let go of the previous data set before the next one is read
            loaded = (key, load(data, options, run, seed))
        split = loaded[1]
        if model == "bayes":
            assert split.bayes is not None
            area, loss = scores(split.table, split.test, split.bayes[split.test], f"{arm}: test")
            unit.finish({f"{arm}/test_auc": area, f"{arm}/test_logloss": loss})
        else:
            fit(unit, model, arm, options, run, split, seed)
    if run.preset.claims:
        decide(run)
    draw(run)


def decide(run: Run) -> None:
    """The claims of paper.toml, as far as the arms of this run have something to say to them."""
    m = {name: summary.mean for name, summary in run.metrics.items()}

    def claim(name: str, verdict: Any, **metrics: str) -> None:
        if all(metric in m for metric in metrics.values()):
            values = {key: m[metric] for key, metric in metrics.items()}
            run.claim(name, verdict(**values), **values)

    def at(name: str, key: str = "margin") -> float:
        return run.threshold(name, key)

    auc_of = "{}/test_auc".format
    h1, h2, h4 = (auc_of(f"pairs/xdeepint:layers=1,subspaces={h}") for h in (1, 2, 4))
    name = "zero_layers_is_logistic_regression"
    claim(
        name,
        lambda pin, lr, name=name: abs(pin - lr) < at(name),
        pin=auc_of("pairs/xdeepint:layers=0"),
        lr=auc_of("pairs/lr"),
    )
    name = "interactions_matter"
    claim(name, lambda fm, lr, name=name: fm > lr + at(name), fm=auc_of("pairs/fm"), lr=auc_of("pairs/lr"))
    name = "subspaces_add_bitwise_interactions"
    claim(
        name,
        lambda h1, h2, h4, name=name: h2 >= h1 + at(name) and h4 >= h2 + at(name),
        h1=h1,
        h2=h2,
        h4=h4,
    )
    name = "beats_fm_on_bitwise_interactions"
    claim(name, lambda xdeepint, fm, name=name: xdeepint > fm + at(name), xdeepint=h4, fm=auc_of("pairs/fm"))
    l1, l2, l3 = (auc_of(f"triples/xdeepint:layers={n}") for n in (1, 2, 3))
    name = "depth_bounds_the_order"
    claim(
        name,
        lambda l1, l2, l3, name=name: l2 > l1 + at(name) and l3 > l2 - at(name, "loss_of_third_layer"),
        l1=l1,
        l2=l2,
        l3=l3,
    )
    name = "beats_fm_on_third_order"
    claim(name, lambda xdeepint, fm, name=name: xdeepint > fm + at(name), xdeepint=l2, fm=auc_of("triples/fm"))
    name = "movielens_beats_lr_and_keeps_up_with_fm"
    claim(
        name,
        lambda xdeepint, lr, fm, name=name: (
            xdeepint > lr + at(name, "over_lr") and xdeepint > fm - at(name, "below_fm")
        ),
        xdeepint=auc_of("ml100k/xdeepint"),
        lr=auc_of("ml100k/lr"),
        fm=auc_of("ml100k/fm"),
    )
    others = {model: auc_of(f"ml100k/{model}") for model in TABLE_1[:-1]}
    name = "best_of_table_1_on_movielens"
    claim(
        name,
        lambda xdeepint, name=name, **rest: xdeepint > max(rest.values()) + at(name),
        xdeepint=auc_of("ml100k/xdeepint"),
        **others,
    )
    name = "group_lasso_ftrl_beats_adam"
    claim(
        name,
        lambda gftrl, adam, name=name: gftrl > adam + at(name),
        gftrl=auc_of("ml100k/xdeepint"),
        adam=auc_of("ml100k/xdeepint:optimizer=adam"),
    )
    name = "a_network_beside_it_does_not_help"
    claim(
        name,
        lambda xdeepint, xdeepint_plus, name=name: xdeepint_plus < xdeepint + at(name),
        xdeepint=auc_of("ml100k/xdeepint"),
        xdeepint_plus=auc_of("ml100k/xdeepint_plus"),
    )
    adam, weak, strong = (f"noise/{model}" for model in NOISE)
    name = "group_lasso_removes_noise_features"
    claim(
        name,
        lambda noise, gftrl, adam, name=name: noise > at(name, "ratio") and gftrl > adam - at(name, "auc"),
        noise=f"{weak}/noise_sparse_ratio",
        gftrl=auc_of(weak),
        adam=auc_of(adam),
    )
    name = "l1_makes_weights_sparse"
    claim(
        name,
        lambda weak, strong, name=name: strong > weak + at(name),
        weak=f"{weak}/weight_sparse_ratio",
        strong=f"{strong}/weight_sparse_ratio",
    )


def draw(run: Run) -> None:
    """Test AUC of every arm, one panel for each data set; what G-FTRL set to zero stands in the labels."""
    metrics = run.metrics
    names = list(dict.fromkeys(arm.partition("/")[0] for arm in run.config.arms))
    figure, axes = report.figure(1, len(names), width=3.8, height=3.8, squeeze=False)
    for axis, data in zip(axes[0], names, strict=True):
        arms = [arm for arm in run.config.arms if arm.startswith(f"{data}/")]
        labels = []
        for row, arm in enumerate(arms):
            value = metrics[f"{arm}/test_auc"]
            colour = report.COLOURS[1] if "xdeepint" in arm else report.COLOURS[0]
            axis.plot(value.values, [row] * len(value.values), "|", color=colour, alpha=0.6, markersize=9)
            axis.plot(value.mean, row, "o", color=colour, markersize=5)
            label = arm.partition("/")[2].replace(":", " ")
            for long, short in (("layers=", "L="), ("subspaces=", "h="), ("optimizer=", ""), ("ftrl_l1=", "l1=")):
                label = label.replace(long, short)
            ratio = metrics.get(f"{arm}/feature_sparse_ratio")
            labels.append(label + (f"\n{ratio.mean:.0%} of levels zero" if ratio and len(arms) < 6 else ""))
        axis.set_yticks(range(len(arms)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("test AUC")
        axis.set_title(data)
    run.figure(figure)


def main(argv: list[str] | None = None) -> int:
    """Run ``train.py`` with these words; returns the exit code."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
