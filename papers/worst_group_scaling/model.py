"""Worst-group generalisation against model size: groups, objectives, networks by size, and random features.

Pham et al., "The Effect of Model Size on Worst-Group Generalization" (arXiv 2112.04094), measure plain empirical risk
minimisation (ERM) over ladders of growing networks. Groups, metrics, width-varied ResNets and the simulation are those
of Sagawa et al., "Distributionally Robust Neural Networks" (ICLR 2020, "DRO" below) and "An Investigation of Why
Overparameterization Exacerbates Spurious Correlations" (ICML 2020, "SRKL" below).

Every network here gives logits of K networks at once, shape (K, B, C): a ladder of small perceptrons is trained as one
stack, a ResNet or BERT is a stack of one. Objectives treat the K networks apart, so that a network in a stack follows
the path that it would follow alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARMS = ("erm", "reweight", "resample", "undersample", "group_dro")
"""ERM, and the objectives that know the groups."""


# ---- groups and metrics (DRO) ---------------------------------------------------------------------------


def group_index(label: Tensor, attribute: Tensor, attributes: int = 2) -> Tensor:
    """Number of the group (y, a).

    Args:
        label: (n,) classes. attribute: (n,) values 0 .. attributes-1 of the spurious attribute.

    Returns:
        (n,) int64, ``y * attributes + a``.

    Raises:
        ValueError: an attribute out of range, or other lengths.
    """
    if label.shape != attribute.shape:
        raise ValueError(f"{len(label)} labels and {len(attribute)} attributes, expected as many")
    if len(label) and not (attribute.min() >= 0 and attribute.max() < attributes and label.min() >= 0):
        raise ValueError(f"expected labels of 0 or more and attributes from 0 to {attributes - 1}")
    return label.long() * attributes + attribute.long()


def group_counts(group: Tensor, groups: int) -> Tensor:
    """(groups,) int64 samples in each group; every group must have one.

    Raises:
        ValueError: a group is empty, so that its accuracy is undefined.
    """
    counts = torch.bincount(group, minlength=groups)
    if len(counts) > groups:
        raise ValueError(f"group {int(group.max())}, expected numbers below {groups}")
    if int(counts.min()) == 0:
        empty = int(counts.argmin())
        raise ValueError(f"group {empty} has no sample: worst-group accuracy is undefined")
    return counts


def group_accuracy(prediction: Tensor, label: Tensor, group: Tensor, groups: int) -> Tensor:
    """Accuracy in each group.

    Args:
        prediction: (K, n) or (n,) predicted classes. label, group: (n,).

    Returns:
        (K, groups) or (groups,) float64.
    """
    counts = group_counts(group, groups).to(torch.float64)
    correct = (prediction == label).to(torch.float64)
    total = torch.zeros(*correct.shape[:-1], groups, dtype=torch.float64, device=correct.device)
    total.index_add_(-1, group, correct)
    return total / counts


def worst_group(accuracy: Tensor) -> Tensor:
    """min_g acc_g over the last dimension."""
    return accuracy.amin(-1)


def adjusted_average(accuracy: Tensor, train_counts: Tensor) -> Tensor:
    """sum_g pi_g acc_g with the groups' shares of the (skewed) training set (DRO).

    Where the test part is balanced over the attribute, the plain average would belong to another distribution than
    the one that was trained on.
    """
    share = train_counts.to(accuracy.dtype) / train_counts.sum()
    return (accuracy * share).sum(-1)


# ---- which samples make a mini-batch -------------------------------------------------------------------------------


class GroupSampler:
    """Indices of the mini-batch of each step, a pure function of ``(groups, rule, batch, seed, step)``.

    Rules: ``shuffle`` takes every sample once an epoch; ``resample`` draws with replacement so that each group has the
    same expected share (weights 1 / n_g); ``undersample`` keeps as many samples of each group as the smallest has, the
    same ones throughout, and shuffles these.

    Args:
        group: (n,) group of each training sample. groups: how many.

    Raises:
        ValueError: unknown rule, batch below 1, an empty group.
    """

    def __init__(self, group: Tensor, groups: int, rule: str, batch: int, seed: int) -> None:
        if rule not in ("shuffle", "resample", "undersample") or batch < 1:
            raise ValueError(
                f"rule {rule!r} and batch {batch}: expected shuffle, resample or undersample, and 1 or more"
            )
        self.rule, self.batch, self.seed = rule, batch, seed
        self.index = torch.arange(len(group))
        counts = group_counts(group, groups)
        self.weight = (1.0 / counts.double())[group]
        if rule == "undersample":
            shuffled = torch.randperm(len(group), generator=self._generator(-1))
            order = shuffled[torch.argsort(group[shuffled], stable=True)]  # by group, at random inside of one
            first = torch.cumsum(counts, 0) - counts
            rank = torch.arange(len(group)) - first[group[order]]
            self.index = order[rank < counts.min()].sort().values
        self.steps_per_epoch = -(-len(self.index) // batch)
        self._epoch, self._order = -1, self.index

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed + 1 + epoch) % 2**63)

    def __getitem__(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = self._generator(epoch)
            if self.rule == "resample":
                self._order = torch.multinomial(self.weight, len(self.index), replacement=True, generator=generator)
            else:
                self._order = self.index[torch.randperm(len(self.index), generator=generator)]
            self._epoch = epoch
        return self._order[position * self.batch : (position + 1) * self.batch]


# ---- objectives: update(minibatches) -> dict, predict(x) -----------------------------------------------------------


class Minibatch(NamedTuple):
    """x: (B, ...) inputs. y, group: (B,) int64. weight: of this part in the gradient of a step."""

    x: Tensor
    y: Tensor
    group: Tensor
    weight: float = 1.0


class Algorithm:
    """Empirical risk minimisation, and what the other objectives share.

    Args:
        network: gives (K, B, C) logits. optimizer: of its parameters.
        train_counts: (G,) samples of each training group.
        scheduler: stepped after each update. clip: largest norm of the gradient, 0: none.
        backward: what is called instead of ``loss.backward()``.
    """

    rule = "shuffle"
    """How mini-batches are drawn (``GroupSampler``)."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_counts: Tensor,
        scheduler: Any = None,
        clip: float = 0.0,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self.network, self.optimizer, self.scheduler = network, optimizer, scheduler
        self.clip, self.backward = clip, backward
        self.groups = len(train_counts)
        counts = train_counts.double()
        self.group_weight = (counts.sum() / (self.groups * counts)).float()

    def objective(self, losses: Tensor, group: Tensor) -> Tensor:
        """(K,) loss of each network from (K, B) losses of the samples; ERM: their mean, groups unused."""
        return losses.mean(-1)

    def update(self, minibatches: Sequence[Minibatch]) -> dict[str, Tensor]:
        """One optimiser step on the parts of a mini-batch; gradients of parts are added with their weights.

        Returns:
            ``loss``: mean over the K networks.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for x, y, group, weight in minibatches:
            per_network = self.objective(sample_losses(self.network(x), y), group)
            self.backward(weight * per_network.sum())  # networks share no parameter: the sum keeps them apart
            total = total.to(x.device) + weight * per_network.detach().mean()
        self._step()
        return {"loss": total}

    def _step(self) -> None:
        if self.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """(K, B, C) logits in evaluation mode."""
        mode = self.network.training
        self.network.eval()
        out: Tensor = self.network(x)
        self.network.train(mode)
        return out

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beyond network and optimiser."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""


class ERM(Algorithm):
    """Minimise the mean loss over samples; groups are not known."""


class Reweighted(Algorithm):
    """Each sample's loss times n / (G n_g): every group has the same share of the loss (SRKL)."""

    def objective(self, losses: Tensor, group: Tensor) -> Tensor:
        """(K,) weighted mean; the weights average 1 over the training set."""
        return (losses * self.group_weight.to(losses.device)[group]).mean(-1)


class Resampled(Algorithm):
    """ERM on mini-batches drawn so that each group has the same expected share."""

    rule = "resample"


class Undersampled(Algorithm):
    """ERM on a subset with as many samples of each group as the smallest has (SRKL)."""

    rule = "undersample"


class GroupDRO(Algorithm):
    """Online group DRO (DRO): q_g *= exp(step * loss_g), normalised; loss = sum_g q_g loss_g.

    Groups that are absent from a mini-batch have loss 0 there, as in the official code.
    """

    def __init__(self, *args: Any, step_size: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_size = step_size
        self.q: Tensor | None = None

    def objective(self, losses: Tensor, group: Tensor) -> Tensor:
        """(K,) sum of the groups' mean losses, weighted by q of shape (K, G), which is moved first."""
        means = group_means(losses, group, self.groups)
        if self.q is None:
            self.q = torch.full_like(means, 1 / self.groups)
        q = self.q.to(means.device) * torch.exp(self.step_size * means.detach())
        self.q = q / q.sum(-1, keepdim=True)
        return (self.q * means).sum(-1)

    def update(self, minibatches: Sequence[Minibatch]) -> dict[str, Tensor]:
        """As the base class, on the whole mini-batch at once: a group's loss is one mean."""
        whole = Minibatch(*(torch.cat([part[i] for part in minibatches]) for i in range(3)))  # type: ignore[misc]
        out = super().update([whole])
        assert self.q is not None
        return out | {"largest_q": self.q.max()}

    def state_dict(self) -> dict[str, Any]:
        """The weights of the groups."""
        return {} if self.q is None else {"q": self.q.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.q = state.get("q")


ALGORITHMS: dict[str, type[Algorithm]] = dict(
    zip(ARMS, (ERM, Reweighted, Resampled, Undersampled, GroupDRO), strict=True)
)


def sample_losses(logits: Tensor, y: Tensor) -> Tensor:
    """(K, B) cross-entropy of (K, B, C) logits and (B,) labels."""
    networks, batch, classes = logits.shape
    flat = F.cross_entropy(logits.reshape(-1, classes), y.repeat(networks), reduction="none")
    return flat.view(networks, batch)


def group_means(losses: Tensor, group: Tensor, groups: int) -> Tensor:
    """(K, G) mean loss of each group in a mini-batch, 0 where it has no sample."""
    member = F.one_hot(group, groups).to(losses.dtype)
    return losses @ member / member.sum(0).clamp(min=1)


# ---- ladders of perceptrons, all sizes in one stack ----------------------------------------------------------------


def _uniform(shape: Sequence[int], inputs: int) -> nn.Parameter:
    """Weights as ``nn.Linear`` draws them: uniform within 1 / sqrt(inputs)."""
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class WidthLadder(nn.Module):
    """K perceptrons with one hidden layer of different widths as one.

    The hidden layers stand side by side in one matrix product; the readout is block-diagonal, so no unit reaches the
    logits of another network and none gets its gradient.

    Args:
        inputs: numbers of a sample. widths: hidden units of each network. classes: logits.
    """

    block: Tensor

    def __init__(self, inputs: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        _positive(widths)
        self.widths, self.classes = tuple(widths), classes
        self.hidden = nn.Linear(inputs, sum(widths))
        owner = torch.tensor([k for k, width in enumerate(widths) for _ in range(width)])
        self.register_buffer("block", F.one_hot(owner, len(widths)).T.float(), persistent=False)  # (K, sum of widths)
        self.new_readout(classes)

    def new_readout(self, classes: int) -> None:
        """Replace the last layers by fresh ones (fine-tuning on another task)."""
        self.classes = classes
        bounds = torch.tensor([width**-0.5 for width in self.widths for _ in range(width)])
        device = self.hidden.weight.device
        weight = torch.empty(classes, sum(self.widths)).uniform_(-1, 1) * bounds
        bias = (
            torch.empty(len(self.widths), classes).uniform_(-1, 1) * torch.tensor(self.widths).float()[:, None].rsqrt()
        )
        self.readout, self.bias = nn.Parameter(weight.to(device)), nn.Parameter(bias.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (K, B, C)."""
        h = F.relu(self.hidden(x.flatten(1)))
        blocks = (self.block[:, None] * self.readout).flatten(0, 1)  # (K C, sum of widths)
        logits = F.linear(h, blocks, self.bias.flatten())
        return logits.view(len(x), len(self.widths), self.classes).transpose(0, 1)

    def sizes(self) -> list[int]:
        """Parameters of each network."""
        return [w * (self.hidden.in_features + 1) + (w + 1) * self.classes for w in self.widths]


class DepthLadder(nn.Module):
    """K perceptrons of one width with different numbers of hidden layers, as batched matrix products.

    Args:
        inputs: numbers of a sample. depths: hidden layers of each network, rising. width: of every hidden layer.
    """

    def __init__(self, inputs: int, depths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        _positive((*depths, width))
        if list(depths) != sorted(depths):
            raise ValueError(f"depths {list(depths)}, expected them to rise")
        self.inputs, self.depths, self.width, self.classes = inputs, tuple(depths), width, classes
        self.hidden = nn.Linear(inputs, width * len(depths))
        deeper = [sum(d > layer for d in depths) for layer in range(1, max(depths))]
        self.weights = nn.ParameterList(_uniform((k, width, width), width) for k in deeper)
        self.biases = nn.ParameterList(_uniform((k, 1, width), width) for k in deeper)
        self.new_readout(classes)

    def new_readout(self, classes: int) -> None:
        """Replace the last layers by fresh ones."""
        self.classes, networks = classes, len(self.depths)
        device = self.hidden.weight.device
        self.readout = _uniform((networks, self.width, classes), self.width).to(device)
        self.readout = nn.Parameter(self.readout.detach())
        self.bias = nn.Parameter(_uniform((networks, 1, classes), self.width).detach().to(device))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (K, B, C)."""
        h = F.relu(self.hidden(x.flatten(1))).view(len(x), len(self.depths), self.width).transpose(0, 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):  # the deepest networks stand last
            k = len(h) - len(weight)
            h = torch.cat([h[:k], F.relu(torch.baddbmm(bias, h[k:], weight))])
        return torch.baddbmm(self.bias, h, self.readout)

    def sizes(self) -> list[int]:
        """Parameters of each network."""
        first, last = self.width * (self.inputs + 1), (self.width + 1) * self.classes
        return [first + (d - 1) * self.width * (self.width + 1) + last for d in self.depths]


def _positive(sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes {list(sizes)}, expected one or more of at least 1")


class One(nn.Module):
    """A network of its own as a stack of one: (B, C) logits become (1, B, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (1, B, C)."""
        return self.network(x)[None]

    def sizes(self) -> list[int]:
        """Its parameters."""
        return [parameters(self.network)]


class Tokens(nn.Module):
    """A text classifier of transformers that takes one tensor.

    Args:
        encoder: e.g. ``BertForSequenceClassification``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, L) token numbers, mask and segment numbers -> (B, C)."""
        ids, mask, segment = x.unbind(1)
        out: Tensor = self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=segment).logits
        return out


# ---- ResNets of any width (SRKL) ---------------------------------------------------------------------------

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width; a projected shortcut where shapes change."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * (4 if bottleneck else 1)
        if bottleneck:
            plan = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            plan = [(inputs, width, 3, stride), (width, width, 3, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in plan:
            layers += [_conv(a, b, kernel, step), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        return F.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


class VariableWidthResNet(nn.Module):
    """ResNet-10, 18, 34 or 50 whose four stages have widths w, 2w, 4w, 8w (w = 64 is the usual network).

    Args:
        depth: 10, 18, 34 (3x3 blocks) or 50 (bottlenecks). width: w. classes: logits.

    Raises:
        ValueError: another depth, width below 1.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"ResNet of depth {depth}, expected one of {', '.join(map(str, BLOCKS))}")
        _positive((width,))
        self.stem = nn.Sequential(_conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for stage, count in enumerate(BLOCKS[depth]):
            blocks = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(ResidualBlock(inputs, width << stage, stride, depth == 50))
                inputs = (width << stage) * (4 if depth == 50 else 1)
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, C)."""
        return self.classifier(self.stages(self.pool(self.stem(x))).mean((2, 3)))


def parameters(network: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in network.parameters())


# ---- the simulation (SRKL): logistic regression on random features --------------------------------------


@dataclass(frozen=True)
class Simulated:
    """x: (n, 2 d) float64, first d numbers carry the label, the others the spurious attribute. y, a: (n,) -1 or 1."""

    x: np.ndarray
    y: np.ndarray
    a: np.ndarray

    def group(self) -> Tensor:
        """(n,) group (y, a) with 0 for -1."""
        return group_index(torch.from_numpy(self.y > 0).long(), torch.from_numpy(self.a > 0).long())


def simulate(
    n: int,
    majority: float,
    seed: int,
    d: int = 100,
    core_variance: float = 100.0,
    spurious_variance: float = 1.0,
) -> Simulated:
    """Draw the simulation's data: x_core ~ N(y 1, 100 I), x_spurious ~ N(a 1, I) (SRKL).

    Args:
        n: samples, half of each label. majority: share with a = y in each label; 0.5 for a balanced test part.

    Raises:
        ValueError: a group would be empty.
    """
    large = round(n / 2 * majority)  # int() would floor 149.99...
    small = n // 2 - large
    if min(large, small) < 1:
        raise ValueError(f"{n} samples with a majority of {majority} leave a group empty")
    rng = np.random.default_rng(seed)
    y = np.repeat([1.0, -1.0], large + small)
    a = np.concatenate([np.full(large, 1.0), np.full(small, -1.0), np.full(large, -1.0), np.full(small, 1.0)])
    core = y[:, None] + math.sqrt(core_variance) * rng.standard_normal((len(y), d))
    spurious = a[:, None] + math.sqrt(spurious_variance) * rng.standard_normal((len(y), d))
    return Simulated(np.concatenate([core, spurious], 1), y, a)


def random_features(inputs: int, number: int, seed: int) -> np.ndarray:
    """(inputs, number) Gaussian matrix whose rows have norm 1, as in the official code; features are relu(x W)."""
    w = np.random.default_rng(seed).standard_normal((inputs, number))
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def features(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """relu(x W), (n, N)."""
    return np.maximum(x @ w, 0)


def fit_logistic(
    phi: np.ndarray, y: np.ndarray, weight: np.ndarray, l2: float = 1e-9, iterations: int = 300
) -> np.ndarray:
    """Weighted logistic regression without intercept, by L-BFGS from zero.

    Minimises sum_i weight_i log(1 + exp(-y_i phi_i w)) / n + l2 |w|^2 / 2.

    Args:
        phi: (n, N) features. y: (n,) -1 or 1. weight: (n,) of the samples, mean 1. iterations: at most.

    Returns:
        (N,) weights.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    scale = weight / len(phi)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = y * (phi @ w)
        value = float(scale @ np.logaddexp(0, -margin)) + 0.5 * l2 * float(w @ w)
        return value, phi.T @ (-scale * y * expit(-margin)) + l2 * w

    start = np.zeros(phi.shape[1])
    options = {"maxiter": iterations, "gtol": 1e-6, "ftol": 64 * np.finfo(float).eps, "maxls": 50}
    found: np.ndarray = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return found


def simulation_errors(train: Simulated, test: Simulated, number: int, arm: str, seed: int) -> dict[str, float]:
    """Fit one model of the simulation and give its errors.

    Args:
        number: random features N. arm: erm, reweight or undersample. seed: of features and subset.

    Returns:
        worst-group and balanced error on the test part, worst-group error on all training samples.

    Raises:
        ValueError: another arm.
    """
    if arm not in ("erm", "reweight", "undersample"):
        raise ValueError(f"arm {arm!r}, expected erm, reweight or undersample")
    w = random_features(train.x.shape[1], number, seed)
    phi, group = features(train.x, w), train.group()
    counts = group_counts(group, 4)
    rows, weight = np.arange(len(phi)), np.ones(len(phi))
    if arm == "reweight":
        weight = (len(phi) / (4 * counts.double()))[group].numpy()
    elif arm == "undersample":
        rows = GroupSampler(group, 4, "undersample", len(phi), seed).index.numpy()
        weight = np.ones(len(rows))
    fitted = fit_logistic(phi[rows], train.y[rows], weight)

    def errors(phi: np.ndarray, data: Simulated) -> Tensor:
        guess = torch.from_numpy((phi @ fitted > 0).astype(np.int64))
        return 1 - group_accuracy(guess, torch.from_numpy((data.y > 0).astype(np.int64)), data.group(), 4)

    on_test = errors(features(test.x, w), test)
    return {
        "worst_error": float(on_test.max()),
        "balanced_error": float(on_test.mean()),
        "train_worst_error": float(errors(phi, train).max()),
    }
