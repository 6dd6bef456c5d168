"""Distil a fair student from an unfair teacher: RELIANT beside vanilla distillation and two ablations.

For each framework (CPF, GraphAKD) and teacher (GCN, GraphSAGE) a teacher is trained, then a vanilla student, a RELIANT
student for each fairness metric, and students without the learnable proxy. Reported are test accuracy and the gaps
between the two sensitive groups, Delta_SP and Delta_EO. The default run does this on a generated biased block graph;
the presets named after a data set need --data.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from shared import cli
from shared.cli import Preset
from shared.errors import UserError, user_errors

FRAMEWORKS = ("CPF", "GraphAKD")
TEACHERS = ("GCN", "GraphSAGE")
METRICS = ("sp", "eo")
ARMS = ("vanilla", "reliant", "no_proxy", "fixed_proxy")
DATASETS = ("generated", "recidivism", "credit", "dblp", "dblp-l")
FOLDERS = {"bail": "recidivism", "small": "dblp", "medium": "dblp-l"}
"""The official folder names, accepted as names of the data sets."""


@dataclass(frozen=True)
class Config:
    """What to run; the values here are the paper's (official code)."""

    dataset: str = "generated"
    """generated, recidivism, credit, dblp or dblp-l (bail, small and medium are the official folders' names)."""
    framework: tuple[str, ...] = FRAMEWORKS
    """Distillation frameworks: CPF, GraphAKD."""
    teacher: tuple[str, ...] = TEACHERS
    """Teachers: GCN, GraphSAGE."""
    metric: tuple[str, ...] = METRICS
    """What RELIANT and the ablations are trained for: sp (statistical parity), eo (equal opportunity)."""
    arms: tuple[str, ...] = ("vanilla", "reliant")
    """Students: vanilla (no fairness term), reliant, and for the first metric only the ablations no_proxy (fairness
    term alone) and fixed_proxy (proxy [s, 1-s])."""
    alpha_cpf: float = 1000.0
    """Weight of the fairness term under CPF."""
    alpha_akd: float = 10.0
    """Weight of the fairness term under GraphAKD."""
    alphas: tuple[float, ...] = ()
    """Further weights for RELIANT under CPF, first teacher and first metric."""
    series: Literal["code", "step"] = "code"
    """Polynomial in place of the decision: code: the official one; step: the least-squares fit of the step."""
    eo_labels: Literal["clean", "code"] = "clean"
    """Labels in the fairness term for eo: clean: the teacher's predictions outside of the training nodes; code: the
    true labels everywhere, validation and test nodes included, as the official code does."""
    cpf_replace_last_two: bool = False
    """CPF: the proxy replaces the last two feature columns, as in the official code; otherwise it is appended."""
    cpf_last_proxy: bool = False
    """CPF: test the best student with the mean proxy of the last epoch, as the official code does."""
    akd_eval_dropout: bool = False
    """GraphAKD: validate and test with dropout on, as the official code does."""
    proxy_weight_decay: float | None = None
    """Weight decay of the proxy (default: the student's, as in the official code)."""
    teacher_epochs: int = 1000
    """Epochs of a teacher."""
    teacher_patience: int = 500
    """Stop a teacher after this many epochs below its best validation accuracy."""
    teacher_lr: float = 0.01
    """Teacher: learning rate of Adam."""
    gcn_hidden: int = 64
    """GCN teacher: hidden units."""
    gcn_dropout: float = 0.8
    """GCN teacher: dropout."""
    gcn_weight_decay: float = 1e-3
    """GCN teacher: weight decay."""
    sage_hidden: int = 128
    """GraphSAGE teacher: hidden units; under GraphAKD the critics need those of the student, --akd-hidden."""
    sage_dropout: float = 0.5
    """GraphSAGE teacher: dropout."""
    sage_weight_decay: float = 5e-4
    """GraphSAGE teacher: weight decay."""
    cpf_epochs: int = 1000
    """CPF: epochs of a student."""
    cpf_patience: int = 500
    """CPF: stop after this many epochs below the best validation accuracy."""
    cpf_layers: int | None = None
    """CPF: L, one more than the steps of propagation (default: the paper's for the data set, 10 or 5)."""
    cpf_hidden: int = 64
    """CPF: hidden units of the feature network."""
    cpf_feat_drop: float = 0.8
    """CPF: dropout of features."""
    cpf_attn_drop: float = 0.2
    """CPF: dropout of attention weights."""
    cpf_lr: float | None = None
    """CPF: learning rate of student and proxy (default: the paper's for data set and teacher, 0.01 or 0.001)."""
    cpf_weight_decay: float = 0.01
    """CPF: weight decay of student and proxy."""
    akd_epochs: int = 600
    """GraphAKD: epochs of a student."""
    akd_hidden: int = 64
    """GraphAKD: hidden units of the student, and width of the embeddings that the critics compare."""
    akd_hops: int = 1
    """GraphAKD: propagations of the student's middle layer."""
    akd_dropout: float = 0.5
    """GraphAKD: dropout of the student."""
    akd_lr: float = 0.01
    """GraphAKD: learning rate of critics and proxy; the student's is a tenth of it."""
    akd_weight_decay: float = 5e-4
    """GraphAKD: weight decay of student, critics and proxy."""
    d_critic: int = 1
    """GraphAKD: epochs from one step of the critics to the next."""
    g_critic: int = 1
    """GraphAKD: epochs from one step of the student and the proxy to the next."""
    nodes: int = 2000
    """Generated graph: nodes."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: names the field, its value and what is expected.
        """
        if self.dataset not in (*DATASETS, *FOLDERS):
            raise ValueError(f"--dataset is {self.dataset}, expected one of {', '.join((*DATASETS, *FOLDERS))}")
        for name, known in (("framework", FRAMEWORKS), ("teacher", TEACHERS), ("metric", METRICS), ("arms", ARMS)):
            chosen = getattr(self, name)
            if not chosen or set(chosen) - set(known) or len(set(chosen)) != len(chosen):
                raise ValueError(f"--{name} {' '.join(chosen)}: expected different ones among {', '.join(known)}")
        if self.alphas and ("CPF" not in self.framework or "reliant" not in self.arms):
            raise ValueError("--alphas are weights for RELIANT under CPF: add CPF to --framework and reliant to --arms")
        if len(set(self.alphas)) != len(self.alphas) or self.alpha_cpf in self.alphas:
            raise ValueError(f"--alphas {self.alphas}: expected different ones beside --alpha-cpf {self.alpha_cpf:g}")
        for value in (self.alpha_cpf, self.alpha_akd, *self.alphas):
            if value < 0:
                raise ValueError(f"a weight alpha is {value}, expected at least 0")
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value is None:
                continue
            if field.name.endswith(("dropout", "_drop")) and field.name != "akd_eval_dropout" and not 0 <= value < 1:
                raise ValueError(f"{flag} is {value}, expected 0 <= dropout < 1")
            if field.name.endswith("_lr") and value <= 0:
                raise ValueError(f"{flag} is {value}, expected > 0")
            if field.name.endswith("weight_decay") and value < 0:
                raise ValueError(f"{flag} is {value}, expected >= 0")
            if field.name.endswith(("epochs", "patience", "hidden", "hops", "critic")) and value < 1:
                raise ValueError(f"{flag} is {value}, expected at least 1")
        if self.cpf_layers is not None and self.cpf_layers < 2:
            raise ValueError(f"--cpf-layers is {self.cpf_layers}, expected at least 2")
        if self.nodes < 50:
            raise ValueError(f"--nodes is {self.nodes}, expected at least 50")
        gcn = "GraphAKD" in self.framework and "GCN" in self.teacher
        if gcn and self.gcn_hidden != self.akd_hidden:
            raise ValueError(
                f"--gcn-hidden is {self.gcn_hidden} and --akd-hidden {self.akd_hidden}: GraphAKD compares embeddings, "
                "expected one width"
            )


def name_of(dataset: str) -> str:
    """The paper's name of a data set."""
    return FOLDERS.get(dataset, dataset)


def cpf_setting(config: Config, teacher: str) -> tuple[int, float]:
    """CPF's (L, learning rate) as the official pre.conf.yaml has them, unless the command line says otherwise."""
    dataset = name_of(config.dataset)
    layers = 5 if dataset == "dblp-l" else 10
    rate = 0.001 if dataset in ("dblp", "dblp-l") and teacher == "GCN" else 0.01
    return config.cpf_layers or layers, config.cpf_lr or rate


@dataclass(frozen=True)
class Arm:
    """A student: what it is called in metrics, what it is made fair for, which proxy it gets, and alpha."""

    name: str
    metric: str | None = None
    proxy: Literal["none", "fixed", "learned"] = "none"
    alpha: float = 0.0


def arms(config: Config, framework: str, teacher: str) -> Iterator[Arm]:
    """The students of one framework and teacher."""
    alpha = config.alpha_cpf if framework == "CPF" else config.alpha_akd
    proxies: dict[str, Any] = {"reliant": "learned", "no_proxy": "none", "fixed_proxy": "fixed"}
    for arm in config.arms:
        if arm == "vanilla":
            yield Arm("vanilla")
            continue
        for metric in config.metric if arm == "reliant" else config.metric[:1]:
            yield Arm(f"{arm}_{metric}", metric, proxies[arm], alpha)
    if framework == "CPF" and teacher == config.teacher[0]:
        metric = config.metric[0]
        for alpha in config.alphas:
            yield Arm(f"reliant_{metric}/alpha={alpha:g}", metric, "learned", alpha)


GENERATED = "generated biased block graph"
PAPER = Config(dataset="recidivism")
CODE = {"eo_labels": "code", "cpf_replace_last_two": True, "cpf_last_proxy": True, "akd_eval_dropout": True}
PRESETS = {
    "default": Preset(
        Config(  # CPF's distance grows with the root of the number of nodes, so that alpha does: 1000 / 3
            arms=ARMS,
            alpha_cpf=300.0,
            alpha_akd=20.0,
            alphas=(0.0, 10.0),
            teacher_epochs=200,
            teacher_patience=100,
            cpf_epochs=150,
            cpf_patience=150,
            cpf_feat_drop=0.2,
            akd_epochs=200,
        ),
        seeds=3,
        data=GENERATED,
        hours=0.06,
        why_not_comparable="a generated graph",
    ),
    "smoke": Preset(
        Config(arms=ARMS, nodes=300, teacher_epochs=4, teacher_patience=4, cpf_epochs=3, cpf_patience=3, akd_epochs=3),
        data=GENERATED,
        hours=0.002,
        claims=False,
        why_not_comparable="a generated graph and a few steps",
    ),
    "recidivism": Preset(PAPER, seeds=[42], data="Recidivism (bail/)", hours=0.6, needs_data=True, claims=False),
    "recidivism-code": Preset(
        dataclasses.replace(PAPER, arms=("reliant",), **CODE),
        seeds=[42],
        data="Recidivism (bail/)",
        hours=0.5,
        needs_data=True,
        claims=False,
        note="every choice as in the official code, test labels in the eo term included",
    ),
    "credit": Preset(
        dataclasses.replace(PAPER, dataset="credit"),
        seeds=[42],
        data="Credit (credit/)",
        hours=1.0,
        needs_data=True,
        claims=False,
        why_not_comparable="without the authors' credit_edges.txt the graph is sparser than theirs",
    ),
    "dblp": Preset(
        dataclasses.replace(PAPER, dataset="dblp"),
        seeds=[42],
        data="DBLP (small/)",
        hardware="a GPU of 48 GB",
        hours=3.0,
        needs_data=True,
        claims=False,
    ),
    "dblp-l": Preset(
        dataclasses.replace(PAPER, dataset="dblp-l"),
        seeds=[42],
        data="DBLP-L (medium/)",
        hardware="a GPU of 48 GB",
        hours=5.0,
        needs_data=True,
        claims=False,
    ),
}

if __name__ == "__main__":
    cli.precheck(Config, PRESETS)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from shared import report  # noqa: E402
from shared.run import Run, Unit  # noqa: E402

from data import EXPECTED, FairData, check, generate, load  # noqa: E402
from model import (  # noqa: E402
    GCN,
    PLP,
    SAGE,
    SGC,
    Critics,
    Graph,
    Proxy,
    Seeds,
    Unfairness,
    cpf_loss,
    fairness_gaps,
    frozen,
)

SMALL = 5000
"""Graphs with fewer nodes are trained on one thread."""


class Problem:
    """A data set on the device of the run, its graph, and what every student of it needs."""

    def __init__(self, data: FairData, device: torch.device) -> None:
        data = data.banded()
        self.name = data.name
        self.x, self.labels, self.sens = (part.to(device) for part in (data.features, data.labels, data.sens))
        self.train, self.val, self.test = (part.to(device) for part in (data.train, data.val, data.test))
        self.graph = Graph(data.pairs.to(device), len(data.labels))
        self.seeds = Seeds(self.graph, self.train, self.labels)
        self.everyone = torch.arange(len(data.labels), device=device)

    def accuracy(self, logits: Tensor, index: Tensor) -> float:
        """Share of right predictions on the nodes of ``index``."""
        return float((logits[index].argmax(1) == self.labels[index]).float().mean())

    def score(self, logits: Tensor) -> dict[str, float]:
        """Test accuracy and the two gaps of the predictions on the test nodes."""
        parity, opportunity = fairness_gaps(logits.argmax(1), self.labels, self.sens, self.test)
        return {"test_accuracy": self.accuracy(logits, self.test), "delta_sp": parity, "delta_eo": opportunity}


def build_teacher(config: Config, framework: str, name: str, features: int) -> tuple[torch.nn.Module, float]:
    """A teacher and its weight decay."""
    if name == "GCN":
        return GCN(features, config.gcn_hidden, dropout=config.gcn_dropout), config.gcn_weight_decay
    # As published GraphAKD's critics cannot read a GraphSAGE embedding of 128 units: they have 64 weights.
    hidden = config.sage_hidden if framework == "CPF" else config.akd_hidden
    return SAGE(features, hidden, dropout=config.sage_dropout), config.sage_weight_decay


def build_plp(config: Config, teacher: str, features: int, nodes: int) -> PLP:
    """CPF's student; ``features`` with the columns of the proxy."""
    layers, _ = cpf_setting(config, teacher)
    drop = {"feat_drop": config.cpf_feat_drop, "attn_drop": config.cpf_attn_drop}
    return PLP(features, nodes, layers=layers, hidden=config.cpf_hidden, **drop)


def build_sgc(config: Config, features: int) -> SGC:
    """GraphAKD's student; ``features`` with the columns of the proxy."""
    return SGC(features, config.akd_hidden, hops=config.akd_hops, dropout=config.akd_dropout)


def build_proxy(arm: Arm, problem: Problem) -> Proxy | None:
    """The proxy of a student, if it has one."""
    if arm.proxy == "none":
        return None
    return Proxy(len(problem.x), problem.sens if arm.proxy == "fixed" else None)


def adam(run: Run, parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam with L2 weight decay, one kernel for all parameters where there is one."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=run.device.type in ("cpu", "cuda"))


class Best:
    """The parameters of the best epoch so far, in the unit's state so that a resumed run has them too."""

    def __init__(self, unit: Unit, run: Run, *modules: torch.nn.Module | None) -> None:
        self.live = [p.detach() for module in modules if module is not None for p in module.state_dict().values()]
        self.state = unit.state
        self.state.setdefault("score", float("-inf"))
        self.state.setdefault("waited", 0)
        kept = self.state.get("best", self.live)
        self.state["best"] = [tensor.to(run.device, copy=True) for tensor in kept]

    def update(self, score: float, ties: bool) -> None:
        """Keep the present parameters when ``score`` is higher than before (or as high, with ``ties``)."""
        if score > self.state["score"] or (ties and score == self.state["score"]):
            torch._foreach_copy_(self.state["best"], self.live)
            self.state["score"], self.state["waited"] = score, 0
        else:
            self.state["waited"] += 1

    def restore(self) -> None:
        """Put the best parameters back."""
        torch._foreach_copy_(self.live, self.state["best"])


def fit_teacher(unit: Unit, run: Run, problem: Problem, framework: str, name: str) -> None:
    """Train a teacher on the labels; the epoch of the best validation accuracy counts."""
    config = run.config
    with user_errors():
        model, decay = build_teacher(config, framework, name, problem.x.shape[1])
    model, optimizer = run.setup(model, adam(run, model.parameters(), config.teacher_lr, decay))
    unit.attach(model=model, optimizer=optimizer)
    best = Best(unit, run, model)
    for epoch in unit.steps(config.teacher_epochs):
        unit.state["epochs"] = epoch + 1
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(problem.x, problem.graph)[0][problem.train], problem.labels[problem.train])
        run.backward(loss)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            best.update(problem.accuracy(model(problem.x, problem.graph)[0], problem.val), ties=True)
        unit.log(loss=loss, val_accuracy=best.state["score"])
        if best.state["waited"] == config.teacher_patience:
            break
    best.restore()
    with torch.no_grad():
        model.eval()
        logits, embedding = model(problem.x, problem.graph)
    record(unit, problem, f"{framework}/{name}/teacher", logits, keep={"logits": logits, "embedding": embedding})


def fairness_terms(config: Config, problem: Problem, arm: Arm, sets: list[Tensor], teacher: Tensor) -> list[Unfairness]:
    """The fairness term of an arm on each set of nodes.

    For equal opportunity the positive nodes must be known: outside of the training nodes the teacher says which they
    are, unless the official code's way of reading the labels there is asked for.
    """
    positive = None
    if arm.metric == "eo":
        positive = problem.labels
        if config.eo_labels == "clean":
            positive = teacher.argmax(1)
            positive[problem.train] = problem.labels[problem.train]
    with user_errors():
        where = "the nodes of the fairness term"
        return [Unfairness(problem.sens, index, positive, where, config.series).to(problem.x.device) for index in sets]


def fit_cpf(unit: Unit, run: Run, problem: Problem, name: str, arm: Arm, teacher: dict[str, Tensor]) -> None:
    """CPF: the student's probabilities approach the teacher's on all but the training nodes."""
    config, graph, free = run.config, problem.seeds, problem.seeds.free
    target = teacher["logits"].softmax(1)
    (unfair,) = fairness_terms(config, problem, arm, [free], target)
    proxy = build_proxy(arm, problem)
    x = problem.x
    if proxy is not None and config.cpf_replace_last_two:
        x = x[:, :-2]
    with user_errors():
        model = build_plp(config, name, x.shape[1] + (0 if proxy is None else 2), len(x))
    _, rate = cpf_setting(config, name)
    model, optimizer = run.setup(model, adam(run, model.parameters(), rate, config.cpf_weight_decay))
    proxy, proxy_optimizer = ready(unit, run, proxy, rate, config.cpf_weight_decay, model=model, optimizer=optimizer)
    best = Best(unit, run, model, None if config.cpf_last_proxy else proxy)
    for epoch in unit.steps(config.cpf_epochs):
        unit.state["epochs"] = epoch + 1
        model.train()
        logits = model(x if proxy is None else proxy.neutral(x), graph)
        loss = cpf_loss(logits, target, free)
        if arm.alpha > 0:
            loss = loss + arm.alpha * unfair(logits)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        if proxy_optimizer is not None:
            with frozen(model):
                biased = unfair(model(proxy.biased(x), graph))
                proxy_optimizer.zero_grad()
                run.backward(-arm.alpha * biased)
            proxy_optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(x if proxy is None else proxy.neutral(x), graph)
        best.update(problem.accuracy(logits, problem.val), ties=True)
        unit.log(loss=loss, val_accuracy=best.state["score"])
        if best.state["waited"] == config.cpf_patience:
            break
    best.restore()
    model.eval()
    with torch.no_grad():
        logits = model(x if proxy is None else proxy.neutral(x), graph)
        biased = None if proxy is None else model(proxy.biased(x), graph)
    record(unit, problem, f"CPF/{name}/{arm.name}", logits, biased)


def fit_akd(unit: Unit, run: Run, problem: Problem, name: str, arm: Arm, teacher: dict[str, Tensor]) -> None:
    """GraphAKD: the student learns to pass for the teacher before critics that learn to tell them apart."""
    config, graph, x = run.config, problem.graph, problem.x
    known, labels, train = (teacher["logits"].log_softmax(1), teacher["embedding"]), problem.labels, problem.train
    unfair, unfair_everywhere = fairness_terms(config, problem, arm, [train, problem.everyone], known[0])
    proxy = build_proxy(arm, problem)
    with user_errors():
        model = build_sgc(config, x.shape[1] + (0 if proxy is None else 2))
        critics = Critics(config.akd_hidden)
    rate, decay = config.akd_lr, config.akd_weight_decay
    model, optimizer = run.setup(model, adam(run, model.parameters(), rate / 10, decay))
    critics, critic_optimizer = run.setup(critics, adam(run, critics.parameters(), rate, decay))
    modules = {"model": model, "optimizer": optimizer, "critics": critics, "critic_optimizer": critic_optimizer}
    proxy, proxy_optimizer = ready(unit, run, proxy, rate, decay, **modules)
    best = Best(unit, run, model, proxy)
    for epoch in unit.steps(config.akd_epochs):
        unit.state["epochs"] = epoch + 1
        model.train()
        student = model(x if proxy is None else proxy.neutral(x), graph)
        if epoch % config.d_critic == 0:
            critic_optimizer.zero_grad()
            run.backward(critics.loss(known, student, graph, labels, train))
            critic_optimizer.step()
        if epoch % config.g_critic == 0:
            with frozen(critics):
                loss = critics.student_loss(known, student, graph, labels, train)
            if arm.alpha > 0:
                loss = loss + arm.alpha * unfair(student[0])
            optimizer.zero_grad()
            run.backward(loss)
            optimizer.step()
            if proxy_optimizer is not None:
                with frozen(model):
                    biased = unfair_everywhere(model(proxy.biased(x), graph)[0])
                    proxy_optimizer.zero_grad()
                    run.backward(-arm.alpha * biased)
                proxy_optimizer.step()
        model.train(config.akd_eval_dropout)
        with torch.no_grad():
            logits, _ = model(x if proxy is None else proxy.neutral(x), graph)
            val_loss = F.cross_entropy(logits[problem.val], labels[problem.val])
        best.update(-float(val_loss), ties=False)
        unit.log(val_loss=val_loss)
    best.restore()
    model.train(config.akd_eval_dropout)
    with torch.no_grad():
        logits, _ = model(x if proxy is None else proxy.neutral(x), graph)
        biased = None if proxy is None else model(proxy.biased(x), graph)[0]
    record(unit, problem, f"GraphAKD/{name}/{arm.name}", logits, biased)


def ready(
    unit: Unit, run: Run, proxy: Proxy | None, lr: float, weight_decay: float, **objects: Any
) -> tuple[Proxy | None, torch.optim.Optimizer | None]:
    """Put the proxy on the device with an optimiser of its own, where it is learned, and attach everything."""
    optimizer = None
    if proxy is not None and list(proxy.parameters()):
        decay = run.config.proxy_weight_decay
        decay = weight_decay if decay is None else decay
        proxy, optimizer = run.setup(proxy, adam(run, proxy.parameters(), lr, decay))
        objects |= {"proxy": proxy, "proxy_optimizer": optimizer}
    unit.attach(**objects)
    return proxy, optimizer


def record(
    unit: Unit, problem: Problem, name: str, logits: Tensor, biased: Tensor | None = None, **kwargs: Any
) -> None:
    """Record what the predictions are worth, and the differentiable gaps on all but the training nodes.

    Args:
        biased: logits with the proxy left as it is, not neutralised.
    """
    with user_errors():
        metrics = problem.score(logits)
        for metric, positive in (("sp", None), ("eo", problem.labels)):
            soft = Unfairness(problem.sens, problem.seeds.free, positive, "the evaluation").to(logits.device)
            metrics[f"soft_{metric}"] = float(soft(logits))
            if biased is not None:
                metrics[f"soft_{metric}_biased"] = float(soft(biased))
    unit.finish(
        {f"{problem.name}/{name}/{key}": value for key, value in metrics.items()},
        timings={f"{problem.name}/{name}/epoch_seconds": unit.seconds / unit.state["epochs"]},
        **kwargs,
    )


def problem_of(config: Config, run: Run, seed: int) -> Problem:
    """Read or generate the data of a seed, and record it."""
    if config.dataset == "generated":
        with user_errors():
            data = generate(run.generator("data", seed), config.nodes)
    else:
        data = load(run.data, name_of(config.dataset))
    run.data_used(data.name, kind="generated" if config.dataset == "generated" else "real", spec=data.origin)
    return Problem(data, run.device)


def train(config: Config, run: Run) -> None:
    """Train every teacher and its students for every seed, then decide the claims and draw the figure."""
    threads = torch.get_num_threads()
    for seed in run.seeds:
        problem = problem_of(config, run, seed)
        # A second thread has nothing to do on a small graph but wait for the first; and with one, no sum depends on
        # the machine.
        torch.set_num_threads(1 if len(problem.labels) < SMALL else threads)
        for framework in config.framework:
            fit = fit_cpf if framework == "CPF" else fit_akd
            for name in config.teacher:
                key = (seed, framework, name)
                for unit in run.units([(*key, "teacher")]):
                    fit_teacher(unit, run, problem, framework, name)
                teacher = {part: tensor.to(run.device) for part, tensor in run.kept((*key, "teacher")).items()}
                for arm in arms(config, framework, name):
                    for unit in run.units([(*key, arm.name)]):
                        fit(unit, run, problem, name, arm, teacher)
    torch.set_num_threads(threads)
    complete = {"vanilla", "reliant"} <= set(config.arms) and config.metric == METRICS and bool(config.alphas)
    if run.preset.claims and complete:
        decide(config, run)
    run.figure(draw(config, run))


def decide(config: Config, run: Run) -> None:
    """The paper's statements as comparisons of means over the seeds (thresholds: paper.toml)."""
    means = {name: summary.mean for name, summary in run.metrics.items()}
    dataset = name_of(config.dataset)
    pairs = [f"{framework}/{name}" for framework in config.framework for name in config.teacher]

    def value(pair: str, metric: str) -> float:
        return means[f"{dataset}/{pair}/{metric}"]

    def ratios(metric: str, other: str) -> dict[str, float]:
        """A metric over another one, for each framework and teacher."""
        return {pair: value(pair, metric) / max(value(pair, other), 1e-6) for pair in pairs}

    def average(metric: str) -> float:
        """Mean of a metric over frameworks and teachers."""
        return sum(value(pair, metric) for pair in pairs) / len(pairs)

    def claim(name: str, holds: bool, measured: dict[str, float]) -> None:
        run.claim(name, holds, **{key.replace("/", "_"): number for key, number in measured.items()})

    name = "student_inherits_bias"
    found = ratios("vanilla/delta_sp", "teacher/delta_sp")
    claim(name, min(found.values()) >= run.threshold(name, "share"), found)

    name = "halves_the_parity_gap"
    found = ratios("reliant_sp/delta_sp", "vanilla/delta_sp")
    claim(name, max(found.values()) <= run.threshold(name, "share"), found)

    name = "fairer_than_the_teacher"
    found = ratios("reliant_sp/delta_sp", "teacher/delta_sp")
    claim(name, max(found.values()) <= run.threshold(name, "share"), found)

    name = "lowers_the_opportunity_gap"
    found = {arm: average(f"{arm}/delta_eo") for arm in ("vanilla", "reliant_eo")}
    claim(name, found["reliant_eo"] <= run.threshold(name, "share") * found["vanilla"], found)

    name = "keeps_accuracy"
    found = {arm: average(f"{arm}/test_accuracy") for arm in ("vanilla", "reliant_sp", "reliant_eo")}
    claim(name, found["vanilla"] - min(found.values()) <= run.threshold(name, "points"), found)

    for framework in config.framework:
        name = "proxy_carries_bias" + ("_under_cpf" if framework == "CPF" else "")
        own = [f"{framework}/{teacher}/reliant_sp" for teacher in config.teacher]
        more = {pair: value(pair, "soft_sp_biased") - value(pair, "soft_sp") for pair in own}
        claim(name, min(more.values()) >= run.threshold(name, "margin"), more)

    name = "alpha_lowers_unfairness"
    weights = sorted({*config.alphas, config.alpha_cpf})
    arms_of = {alpha: f"reliant_sp/alpha={alpha:g}" for alpha in config.alphas} | {config.alpha_cpf: "reliant_sp"}
    found = {f"alpha={alpha:g}": value(f"CPF/{config.teacher[0]}", f"{arms_of[alpha]}/soft_sp") for alpha in weights}
    series = list(found.values())
    steps = [after / max(before, 1e-9) for before, after in pairwise(series)]
    claim(name, max(steps) <= run.threshold(name, "share"), found)


def draw(config: Config, run: Run) -> Any:
    """Accuracy and both gaps of teacher and students, for each framework and teacher."""
    figure, axes = report.figure(1, 3, width=4.6)
    dataset, metrics = name_of(config.dataset), run.metrics
    pairs = [f"{framework}/{name}" for framework in config.framework for name in config.teacher]
    titles = {"test_accuracy": "test accuracy", "delta_sp": "parity gap", "delta_eo": "opportunity gap"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        goal = "eo" if metric == "delta_eo" else "sp"
        labels = {"teacher": "teacher", "vanilla": "vanilla student"}
        labels |= {f"{arm}_{goal}": f"{arm.replace('_', ' ')}, for {goal.upper()}" for arm in ARMS[1:]}
        shown = [arm for arm in labels if f"{dataset}/{pairs[0]}/{arm}/{metric}" in metrics]
        for i, arm in enumerate(shown):
            found = [metrics[f"{dataset}/{pair}/{arm}/{metric}"] for pair in pairs]
            places = [k + (i - (len(shown) - 1) / 2) * 0.8 / len(shown) for k in range(len(pairs))]
            heights, errors = [m.mean for m in found], [m.std for m in found]
            axis.bar(places, heights, 0.8 / len(shown), yerr=errors, label=labels[arm], color=report.COLOURS[i])
        axis.set_xticks(range(len(pairs)), labels=[pair.replace("/", "\n") for pair in pairs])
        axis.set(title=f"{dataset}: {title}")
        if metric == "test_accuracy":
            axis.set_ylim(bottom=0.5)
        axis.legend(fontsize=6)
    return figure


def check_data(config: Config, folder: Path | None) -> list[str]:
    """Counts of the data set that the configuration uses; for generated graphs, of every data set in the folder."""
    if folder is None:
        if config.dataset == "generated":
            return ["nothing to check: this preset generates its graph; name a folder with --data to check that"]
        raise UserError("--check-data needs --data DIR, the folder with bail/, credit/, small/ or medium/")
    if config.dataset != "generated":
        return check(folder, name_of(config.dataset))
    lines, good = [], 0
    for name in EXPECTED:
        try:
            lines += check(folder, name)
            good += 1
        except UserError as error:
            lines.append(f"{name}: MISSING or malformed: {error}")
    if not good:
        raise UserError(f"{folder} holds no data set of the paper, expected bail/, credit/, small/ or medium/ there")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.main(Config, PRESETS, train, check_data, argv)


if __name__ == "__main__":
    sys.exit(main())
