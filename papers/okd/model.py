"""Out-of-distribution knowledge distillation (OKD) and what it is compared with, for image and waveform classifiers.

Zhou et al., On-Device Domain Generalization, arXiv 2209.07521. An algorithm has ``update(minibatches) -> dict`` (one
optimiser step; one minibatch for every source domain) and ``predict(x)``. A network is any module with

* ``net(x) -> logits (B, C)``,
* ``net(x, parts=True) -> Output``: logits, the map of each stage, the pooled feature,
* ``net.classifier``, the layer from feature to logits.

Shapes: images are (B, channels, H, W), waveforms (B, 1, samples); labels y are (B,) int64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 4.0
GENERATORS = ("fusion", "cutmix", "mixup", "noise", "jigsaw", "adv", "mask", "identity")
"""Makers of out-of-distribution data: six of the paper for images; for speech mixup, noise and mask. ``identity``
returns the input: the control that has OKD's third term and no new data."""


class Minibatch(NamedTuple):
    """Samples of one source domain. ``index`` (B,): their places in the training set, where a method needs them."""

    x: Tensor
    y: Tensor
    index: Tensor | None = None


class Output(NamedTuple):
    """What a network computes: logits (B, C), maps of the stages, feature (B, F)."""

    logits: Tensor
    maps: list[Tensor]
    feature: Tensor


def distillation(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """D(s, t) = T^2 KL(softmax(t / T) || softmax(s / T)), summed over classes, mean over the batch; logits (B, C)."""
    log_s, log_t = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


# ---- generators of out-of-distribution data --------------------------------------------------------------------------


def partners(x: Tensor) -> Tensor:
    """A random permutation of the batch.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(x) < 2:
        raise ValueError(f"mixing needs at least two images in a batch, got {len(x)}")
    return torch.randperm(len(x), device=x.device)


def shares(x: Tensor) -> Tensor:
    """One l ~ Beta(1, 1), which is uniform, for each sample: (B, 1, ...)."""
    return torch.rand([len(x)] + [1] * (x.ndim - 1), device=x.device, dtype=x.dtype)


def mixup(x: Tensor) -> Tensor:
    """l x + (1 - l) x[perm], l for each sample."""
    return torch.lerp(x[partners(x)], x, shares(x))


def cut_box(height: int, width: int, l: float, cy: int, cx: int) -> tuple[int, int, int, int]:
    """Rows and columns (top, bottom, left, right) of CutMix's box: side sqrt(1 - l) of the image, clipped to it."""
    half_h, half_w = int(height * math.sqrt(1 - l)) // 2, int(width * math.sqrt(1 - l)) // 2
    return max(cy - half_h, 0), min(cy + half_h, height), max(cx - half_w, 0), min(cx + half_w, width)


def cutmix(x: Tensor, inplace: bool = False) -> Tensor:
    """Paste one box of x[perm] into x; one l ~ Beta(1, 1) and one centre for the batch.

    Args:
        inplace: write into ``x``, as the released code does, so that the "in-distribution" pass sees the box too.
    """
    height, width = x.shape[2:]
    order = partners(x)
    share = float(torch.rand(()))
    cy, cx = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom, left, right = cut_box(height, width, share, cy, cx)
    box = x[order, :, top:bottom, left:right]
    out = x if inplace else x.clone()
    out[:, :, top:bottom, left:right] = box
    return out


def fusion(x: Tensor, inplace: bool = False) -> Tensor:
    """l mixup(x) + (1 - l) cutmix(x), l for each image: the paper's generator."""
    mixed = mixup(x)
    return torch.lerp(cutmix(x, inplace), mixed, shares(x))


ORDERS = torch.tensor([order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)])
"""The 23 orders of four tiles that move one."""


def jigsaw(x: Tensor) -> Tensor:
    """The 2 x 2 tiles of each image in a random order of its own, never the one they had.

    Raises:
        ValueError: a side is odd.
    """
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"jigsaw cuts images in halves, expected even sides, got {h} x {w}")
    order = ORDERS.to(x.device)[torch.randint(len(ORDERS), (b,), device=x.device)]
    tiles = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(b, 4, c, h // 2, w // 2)
    tiles = tiles[torch.arange(b, device=x.device)[:, None], order]
    return tiles.view(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def mask(x: Tensor) -> Tensor:
    """Waveforms with a random run of 10 to 90 % of their samples set to zero."""
    n = x.shape[-1]
    length = torch.randint(int(0.1 * n), int(0.9 * n), (len(x), 1, 1), device=x.device)
    start = (torch.rand(len(x), 1, 1, device=x.device) * (n - length)).long()
    place = torch.arange(n, device=x.device)
    return x * ((place < start) | (place >= start + length))


@contextmanager
def fixed(*nets: nn.Module) -> Any:
    """No gradients for the parameters of these networks; what was fixed before stays so."""
    parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def frozen(net: nn.Module) -> Any:
    """No gradients for the parameters and no new running statistics; everything is put back as it was."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms if norm.num_batches_tracked is not None]
    try:
        for norm in norms:
            norm.momentum = 0.0
        with fixed(net):
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        tracked = [norm for norm in norms if norm.num_batches_tracked is not None]
        for norm, count in zip(tracked, counts, strict=True):
            norm.num_batches_tracked.copy_(count)


def adversarial(net: nn.Module, x: Tensor, y: Tensor, low: Tensor, high: Tensor, step: float = 0.001) -> Tensor:
    """Fast gradient sign: x + eps sign(grad of the student's cross-entropy), eps = step (high - low), then clamped.

    Args:
        low, high: legal values of each channel, broadcastable to x (after normalisation).
    """
    with frozen(net), torch.enable_grad():
        probe = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(probe), y), probe)
    return (x + step * (high - low) * gradient.sign()).clamp(low, high).to(x.dtype)


class Generator:
    """Makes x~ = A(x).

    Args:
        kind: one of ``GENERATORS``. low, high: legal values of a channel, for ``adv``. noise_std: for ``noise``.
        official_inplace: let cutmix and fusion change their argument, as the released code does.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(
        self,
        kind: str = "fusion",
        low: Tensor | float = 0.0,
        high: Tensor | float = 1.0,
        noise_std: float = 0.15,
        official_inplace: bool = False,
    ) -> None:
        if kind not in GENERATORS:
            raise ValueError(f"generator is {kind!r}, expected one of {', '.join(GENERATORS)}")
        self.kind, self.noise_std, self.official_inplace = kind, noise_std, official_inplace
        self.low, self.high = torch.as_tensor(low), torch.as_tensor(high)

    @property
    def changes_input(self) -> bool:
        """Whether a call writes into its argument."""
        return self.official_inplace and self.kind in ("cutmix", "fusion")

    def __call__(self, x: Tensor, y: Tensor, student: nn.Module) -> Tensor:
        """x~ of the shape of x; ``student`` is asked by ``adv`` only."""
        if self.kind == "adv":
            return adversarial(student, x, y, self.low.to(x.device), self.high.to(x.device))
        if self.kind == "cutmix":
            return cutmix(x, self.official_inplace)
        if self.kind == "fusion":
            return fusion(x, self.official_inplace)
        if self.kind == "noise":
            return x + self.noise_std * torch.randn_like(x)
        return {"mixup": mixup, "jigsaw": jigsaw, "mask": mask, "identity": lambda x: x}[self.kind](x)


# ---- mixing of feature statistics ------------------------------------------------------------------------------------


class _FeatureMix(nn.Module):
    """Mixes the statistics of samples with those of random partners, in training, with probability p."""

    def __init__(self, p: float = 0.5, alpha: float = 0.1) -> None:
        super().__init__()
        self.p, self.alpha = p, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, ...) of the same shape."""
        if not self.training or float(torch.rand(())) >= self.p:
            return x
        order = torch.randperm(len(x), device=x.device)
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(x),)).to(x.device, x.dtype)
        return self.mix(x, order, share.view([-1] + [1] * (x.ndim - 1)))

    def mix(self, x: Tensor, order: Tensor, share: Tensor) -> Tensor:
        raise NotImplementedError


class MixStyle(_FeatureMix):
    """Mean and deviation of each channel, mixed (Zhou et al., ICLR 2021)."""

    def mix(self, x: Tensor, order: Tensor, share: Tensor) -> Tensor:
        """x normalised, times the mixed deviation, plus the mixed mean; statistics carry no gradient."""
        axes = tuple(range(2, x.ndim))
        var, mu = torch.var_mean(x.detach(), axes, keepdim=True)
        sig = (var + 1e-6).sqrt()
        mixed_sig, mixed_mu = torch.lerp(sig[order], sig, share), torch.lerp(mu[order], mu, share)
        return (x - mu) / sig * mixed_sig + mixed_mu


class EFDMix(_FeatureMix):
    """All values of each channel: exact feature distribution mixing (Zhang et al., CVPR 2022)."""

    def mix(self, x: Tensor, order: Tensor, share: Tensor) -> Tensor:
        """x + (1 - l) (the partner's sorted values in x's rank order - x without gradient)."""
        values, place = x.detach().flatten(2).sort(-1)
        matched = torch.empty_like(values).scatter_(-1, place, values[order]).view_as(x)
        return x + (1 - share) * (matched - x.detach())


MIXERS = {"mixstyle": MixStyle, "efdmix": EFDMix}

# ---- hints: distillation of more than logits -------------------------------------------------------------------------


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps, the larger averaged to the size of the smaller."""
    if a.shape[2] > b.shape[2]:
        return F.adaptive_avg_pool2d(a, b.shape[2:]), b
    if a.shape[2] < b.shape[2]:
        return a, F.adaptive_avg_pool2d(b, a.shape[2:])
    return a, b


def middle(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """The maps without the first and the last; without the first where there are two."""
    return maps[1:-1] or maps[1:]


class FitNet(nn.Module):
    """Squared error between the teacher's map of stage 2 and a regression from the student's (Romero et al. 2015)."""

    beta = 1.0

    def __init__(self, student: Output, teacher: Output, samples: int) -> None:
        super().__init__()
        self.stages = min(2, len(student.maps) - 1), min(2, len(teacher.maps) - 1)
        s, t = student.maps[self.stages[0]], teacher.maps[self.stages[1]]
        side, other = s.shape[2], t.shape[2]
        conv: nn.Module
        if side == 2 * other:
            conv = nn.Conv2d(s.shape[1], t.shape[1], 3, stride=2, padding=1)
        elif 2 * side == other:
            conv = nn.ConvTranspose2d(s.shape[1], t.shape[1], 4, stride=2, padding=1)
        elif side >= other:
            conv = nn.Conv2d(s.shape[1], t.shape[1], (1 + side - other, 1 + s.shape[3] - t.shape[3]))
        else:
            raise ValueError(f"no regression from a map of side {side} to one of {other}")
        self.regressor = nn.Sequential(conv, nn.BatchNorm2d(t.shape[1]), nn.ReLU())

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        return F.mse_loss(self.regressor(student.maps[self.stages[0]]), teacher.maps[self.stages[1]])


class Attention(nn.Module):
    """Squared distance of normalised channel means of f^2, mean over pixels (Zagoruyko and Komodakis 2017)."""

    beta = 1.0

    def __init__(self, student: Output, teacher: Output, samples: int) -> None:
        super().__init__()

    @staticmethod
    def attention(maps: Tensor) -> Tensor:
        return F.normalize(maps.pow(2).mean(1).flatten(1))

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        pairs = zip(middle(student.maps), middle(teacher.maps), strict=False)
        sized = (same_size(s, t) for s, t in pairs)
        return torch.stack([(self.attention(s) - self.attention(t)).pow(2).mean() for s, t in sized]).sum()


class Similarity(nn.Module):
    """Row-normalised Gram matrices of the last maps, squared Frobenius distance over B^2 (Tung and Mori 2019)."""

    beta = 0.1

    def __init__(self, student: Output, teacher: Output, samples: int) -> None:
        super().__init__()

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        grams = [F.normalize(f @ f.T) for f in (student.maps[-1].flatten(1), teacher.maps[-1].flatten(1))]
        return (grams[0] - grams[1]).pow(2).mean()


class VID(nn.Module):
    """Negative Gaussian log-likelihood of the teacher's maps, learned mean and variance (Ahn et al. 2019)."""

    beta = 1.0

    def __init__(self, student: Output, teacher: Output, samples: int, variance: float = 5.0) -> None:
        super().__init__()
        self.means, self.scales = nn.ModuleList(), nn.ParameterList()
        for s, t in zip(middle(student.maps), middle(teacher.maps), strict=False):
            c, d = s.shape[1], t.shape[1]
            layers: list[nn.Module] = [nn.Conv2d(c, d, 1, bias=False), nn.ReLU(), nn.Conv2d(d, d, 1, bias=False)]
            self.means.append(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(d, d, 1, bias=False)))
            self.scales.append(nn.Parameter(torch.full((d,), math.log(math.expm1(variance - 1e-5)))))

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        total = student.logits.new_zeros(())
        pairs = zip(middle(student.maps), middle(teacher.maps), strict=False)
        for (s, t), mean, scale in zip(pairs, self.means, self.scales, strict=True):
            s, t = same_size(s, t)
            variance = (F.softplus(scale) + 1e-5).view(1, -1, 1, 1)
            total = total + 0.5 * ((mean(s) - t).pow(2) / variance + variance.log()).mean()
        return total


class RKD(nn.Module):
    """Relations of features: distances over their mean, and angles of all triplets (Park et al. 2019)."""

    beta = 1.0

    def __init__(self, student: Output, teacher: Output, samples: int) -> None:
        super().__init__()

    @staticmethod
    def distances(f: Tensor) -> Tensor:
        """(B, B) over their mean, diagonal 0."""
        square = f.pow(2).sum(1)
        squared = (square[:, None] + square - 2 * f @ f.T).clamp_min(1e-12)
        apart = ~torch.eye(len(f), dtype=torch.bool, device=f.device)
        d = squared.sqrt() * apart
        return d / d[apart].mean()

    @staticmethod
    def angles(f: Tensor) -> Tensor:
        """Cosines of (j - i) and (k - i) for every i: (B, B, B)."""
        toward = F.normalize(f[None] - f[:, None], dim=2)
        return toward @ toward.transpose(1, 2)

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        s, t = student.feature, teacher.feature
        distance = F.smooth_l1_loss(self.distances(s), self.distances(t))
        return 25 * distance + 50 * F.smooth_l1_loss(self.angles(s), self.angles(t))


class PKT(nn.Module):
    """Cosine similarities mapped to [0, 1] as conditional probabilities, KL (Passalis and Tefas 2018)."""

    beta = 0.1

    def __init__(self, student: Output, teacher: Output, samples: int) -> None:
        super().__init__()

    @staticmethod
    def probabilities(f: Tensor) -> Tensor:
        unit = f / (f.norm(dim=1, keepdim=True) + 1e-7)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        s, t = self.probabilities(student.feature), self.probabilities(teacher.feature)
        return (t * ((t + 1e-7) / (s + 1e-7)).log()).mean()


class CRD(nn.Module):
    """Contrastive representation distillation with a memory of all training samples (Tian et al. 2020).

    Args:
        samples: N, samples of the training set. labels: (N,), negatives are of other classes; set with ``label``.
        negatives: K for each sample, drawn with replacement.
    """

    beta = 0.1
    positions: Tensor
    start: Tensor
    count: Tensor
    student_memory: Tensor
    teacher_memory: Tensor
    scale: Tensor

    def __init__(
        self,
        student: Output,
        teacher: Output,
        samples: int,
        negatives: int = 16_384,
        size: int = 128,
        temperature: float = 0.1,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.embed_student = nn.Linear(student.feature.shape[1], size)
        self.embed_teacher = nn.Linear(teacher.feature.shape[1], size)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        bound = 1 / math.sqrt(size / 3)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(samples, size).uniform_(-bound, bound))
        self.register_buffer("scale", torch.zeros(2))  # normalisation constants, set by the first batch
        self.label(torch.arange(samples))

    def label(self, labels: Tensor) -> None:
        """Say the classes of the training samples (N,), from which negatives are drawn."""
        self.positions = labels.argsort(stable=True)
        self.count = labels.bincount()
        self.start = self.count.cumsum(0) - self.count

    def draw(self, y: Tensor) -> Tensor:
        """(B, K) training samples of other classes."""
        n, count, start = len(self.positions), self.count.to(y.device)[y], self.start.to(y.device)[y]
        place = (torch.rand(len(y), self.negatives, device=y.device) * (n - count)[:, None]).long()
        place += (place >= start[:, None]) * count[:, None]
        return self.positions.to(y.device)[place]

    def forward(self, student: Output, teacher: Output, batch: Minibatch) -> Tensor:
        assert batch.index is not None, "CRD needs the places of the samples in the training set"
        v = F.normalize(self.embed_student(student.feature)), F.normalize(self.embed_teacher(teacher.feature))
        y = batch.y if len(self.count) < len(self.positions) else batch.index
        contrast = torch.cat([batch.index[:, None], self.draw(y)], 1)
        memories = self.teacher_memory, self.student_memory  # each side is compared with the other's memory
        loss = student.logits.new_zeros(())
        noise = self.negatives / len(self.positions)
        for side in (0, 1):
            score = (v[side] @ memories[side].clone().T / self.temperature).exp()  # against all N, then picked
            score = score.gather(1, contrast)
            if self.scale[side] == 0:
                self.scale[side] = score.detach().mean() * len(self.positions)
            p = score / self.scale[side].clone()
            positive = (p[:, :1] / (p[:, :1] + noise + 1e-7)).log().sum()
            negative = (noise / (p[:, 1:] + noise + 1e-7)).log().sum()
            loss = loss - (positive + negative) / len(p)
        with torch.no_grad():
            for memory, value in ((self.student_memory, v[0]), (self.teacher_memory, v[1])):
                moved = self.momentum * memory[batch.index] + (1 - self.momentum) * value
                memory[batch.index] = F.normalize(moved).to(memory.dtype)
        return loss


HINTS: dict[str, Any] = {
    "fitnet": FitNet,
    "at": Attention,
    "sp": Similarity,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "crd": CRD,
}

# ---- algorithms ------------------------------------------------------------------------------------------------------

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def merge(minibatches: Sequence[Minibatch]) -> Minibatch:
    """The minibatches of all domains as one."""
    if len(minibatches) == 1:
        return minibatches[0]
    index = None if minibatches[0].index is None else torch.cat([b.index for b in minibatches])  # type: ignore[misc]
    return Minibatch(torch.cat([b.x for b in minibatches]), torch.cat([b.y for b in minibatches]), index)


class ERM:
    """Cross-entropy on all source data.

    Args:
        net: the network to train. make_optimizer: an optimiser of parameters.
        backward: differentiates a loss. sync: called with the modules after it, to average over processes.
    """

    def __init__(
        self,
        net: nn.Module,
        make_optimizer: MakeOptimizer,
        backward: Callable[[Tensor], None] = Tensor.backward,
        sync: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.net, self.make_optimizer = net, make_optimizer
        self.backward, self.sync = backward, sync
        self.trained: dict[str, nn.Module] = {"net": net}
        self.optimizers = {"net": make_optimizer(net.parameters())}

    def modules(self) -> dict[str, nn.Module]:
        """Everything with a state, by name."""
        return dict(self.trained)

    def train(self) -> None:
        """Put what is trained into training mode."""
        for module in self.trained.values():
            module.train()

    def set_lr(self, lr: float) -> None:
        """Learning rate of all optimisers."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self, loss: Tensor, *names: str) -> None:
        """One step of the optimisers of these modules."""
        for name in names:
            self.optimizers[name].zero_grad()
        self.backward(loss)
        for name in names:
            if self.sync is not None:
                self.sync(self.trained[name])
            self.optimizers[name].step()

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        """The terms; their sum is minimised."""
        return {"cross_entropy": F.cross_entropy(self.net(batch.x), batch.y)}

    def update(self, minibatches: Sequence[Minibatch]) -> dict[str, Tensor]:
        """One optimiser step on one minibatch of each domain; the loss and its terms."""
        terms = self.loss(merge(minibatches))
        loss = torch.stack(list(terms.values())).sum()
        self.step(loss, *self.optimizers)
        return {"loss": loss.detach()} | {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, C) in evaluation mode; the network goes back to its mode."""
        mode = self.net.training
        self.net.eval()
        logits = self.net(x)
        self.net.train(mode)
        return logits


class RSC(ERM):
    """Representation self-challenging (Huang et al., ECCV 2020): the features that matter most are muted.

    Args:
        drop_features, drop_samples: shares of features of a sample, and of samples, that are muted.
    """

    def __init__(self, *args: Any, drop_features: float = 0.1, drop_samples: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_features, self.drop_samples = drop_features, drop_samples

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        out = self.net(batch.x, parts=True)
        classifier: Any = self.net.classifier
        logits, feature = classifier(out.feature).float(), out.feature.float()
        chosen = logits.gather(1, batch.y[:, None])
        (g,) = torch.autograd.grad(chosen.sum(), out.feature, retain_graph=True)  # RSC eq. 1
        g = g.float()
        muted = g >= g.quantile(1 - self.drop_features, dim=1, keepdim=True)  # RSC eq. 2
        muted &= torch.tensor(self.drop_features > 0, device=muted.device)
        with torch.no_grad():
            again = classifier(feature * ~muted)  # RSC eq. 3 and 4
            before, after = (z.softmax(1).gather(1, batch.y[:, None]) for z in (logits, again))
            fall = (before - after)[:, 0]
            samples = fall >= fall.quantile(1 - self.drop_samples)  # RSC section 3.3
            keep = ~(muted & samples[:, None]) if self.drop_samples > 0 else torch.ones_like(muted)
        return {"cross_entropy": F.cross_entropy(classifier(out.feature * keep), batch.y)}  # RSC eq. 5


class DoTNet(nn.Module):
    """Domain transformation of DDAIG: residual blocks at full size, global context, one tanh map per channel.

    Args:
        channels: of the images. width: of the maps. blocks: residual blocks.
    """

    def __init__(self, channels: int, width: int = 64, blocks: int = 3) -> None:
        super().__init__()

        def conv(a: int, b: int) -> nn.Conv2d:
            return nn.Conv2d(a, b, 3, padding=1, padding_mode="reflect", bias=False)

        def norm() -> nn.Module:
            return nn.GroupNorm(width, width, affine=False)  # instance normalisation, in one fused pass

        self.stem = nn.Sequential(conv(channels, width), norm(), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width, width), norm(), nn.ReLU(), conv(width, width), norm()) for _ in range(blocks)
        )
        self.fuse = nn.Conv2d(2 * width, width, 1, bias=False)
        self.fused = nn.Sequential(norm(), nn.ReLU())
        self.out = nn.Conv2d(width, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The perturbation, (B, channels, H, W) in (-1, 1)."""
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        own, context = self.fuse.weight.flatten(1).chunk(2, 1)  # of the maps, and of their means over the image
        h = pointwise(own, h) + F.linear(h.mean((2, 3)), context)[:, :, None, None]
        return (pointwise(self.out.weight.flatten(1), self.fused(h)) + self.out.bias[:, None, None]).tanh()


def pointwise(weight: Tensor, x: Tensor) -> Tensor:
    """A 1 x 1 convolution (out, in) of maps (B, in, H, W), as a product: several times faster for few channels."""
    return torch.einsum("oc,bchw->bohw", weight, x)


class DDAIG(ERM):
    """Deep domain-adversarial image generation (Zhou et al., AAAI 2020): images whose domain is hidden, class is not.

    Args:
        domain_net: a network that tells source domains apart. transform: ``DoTNet``.
        strength: lambda of x + lambda G(x). alpha: weight of the changed images. warmup: updates without them.

    Raises:
        ValueError: (by ``update``) fewer than two source domains.
    """

    def __init__(
        self,
        *args: Any,
        domain_net: nn.Module,
        transform: nn.Module,
        strength: float = 0.3,
        alpha: float = 0.5,
        warmup: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.domain_net, self.transform = domain_net, transform
        self.strength, self.alpha, self.warmup = strength, alpha, warmup
        self.trained |= {"domain_net": domain_net, "transform": transform}
        for name in ("domain_net", "transform"):
            self.optimizers[name] = self.make_optimizer(self.trained[name].parameters())
        self.updates = 0

    def update(self, minibatches: Sequence[Minibatch]) -> dict[str, Tensor]:
        if len(minibatches) < 2:
            raise ValueError(f"DDAIG tells source domains apart, expected at least two, got {len(minibatches)}")
        batch = merge(minibatches)
        sizes = torch.tensor([len(b.y) for b in minibatches], device=batch.y.device)
        domain = torch.repeat_interleave(torch.arange(len(sizes), device=batch.y.device), sizes)
        with fixed(self.net, self.domain_net):
            changed = batch.x + self.strength * self.transform(batch.x)
            generated = F.cross_entropy(self.net(changed), batch.y) - F.cross_entropy(self.domain_net(changed), domain)
        self.step(generated, "transform")  # DDAIG: keep the label, hide the domain
        loss = F.cross_entropy(self.net(batch.x), batch.y)
        if self.updates >= self.warmup:
            with torch.no_grad():
                changed = batch.x + self.strength * self.transform(batch.x)  # by the network just updated
            loss = (1 - self.alpha) * loss + self.alpha * F.cross_entropy(self.net(changed), batch.y)
        self.step(loss, "net")
        told = F.cross_entropy(self.domain_net(batch.x), domain)
        self.step(told, "domain_net")
        self.updates += 1
        return {"loss": loss.detach(), "domain": told.detach(), "generated": generated.detach()}


class KD(ERM):
    """Knowledge distillation: gamma CE(y, f_S(x)) + alpha D(f_S(x), f_T(x)), and a hint with its own weight.

    Args:
        teacher: trained, frozen, in evaluation mode. gamma, alpha: 0.1 and 0.9.
        hint: one of ``HINTS``, built here. beta: its weight, its own by default.
        cached: the teacher's logits (N, C) of the training samples; right only where samples are not augmented.

    Raises:
        ValueError: a teacher in training mode, or of another number of classes (found by ``check_teacher``).
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module,
        gamma: float = 0.1,
        alpha: float = 0.9,
        temperature: float = TEMPERATURE,
        hint: nn.Module | None = None,
        cached: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if teacher.training:
            raise ValueError("the teacher is in training mode, expected teacher.eval()")
        self.teacher, self.gamma, self.alpha, self.temperature = teacher, gamma, alpha, temperature
        self.hint, self.cached = hint, cached
        if hint is not None:
            self.trained["hint"] = hint
            if any(True for _ in hint.parameters()):
                self.optimizers["hint"] = self.make_optimizer(hint.parameters())

    def teach(self, x: Tensor) -> Tensor:
        """The teacher's logits (B, C), without gradient."""
        with torch.no_grad():
            return self.teacher(x)

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        if self.hint is None:
            logits = self.net(batch.x)
            known = self.cached is not None and batch.index is not None
            taught = self.cached[batch.index] if known else self.teach(batch.x)  # type: ignore[index]
            return self.terms(batch, logits, taught)
        student = self.net(batch.x, parts=True)
        with torch.no_grad():
            teacher = self.teacher(batch.x, parts=True)
        terms = self.terms(batch, student.logits, teacher.logits)
        beta: Any = self.hint.beta
        return terms | {"hint": beta * self.hint(student, teacher, batch)}

    def terms(self, batch: Minibatch, logits: Tensor, taught: Tensor) -> dict[str, Tensor]:
        """The two terms on x."""
        return {
            "cross_entropy": self.gamma * F.cross_entropy(logits, batch.y),
            "distillation": self.alpha * distillation(logits, taught, self.temperature),
        }


class OKD(KD):
    """gamma CE(y, f_S(x)) + alpha D(f_S(x), f_T(x)) + beta D(f_S(x~), f_T(x~)), x~ = A(x): the method.

    The student sees x and x~ in separate passes, so that batch normalisation keeps them apart. So does the teacher: one
    pass over both would give the same numbers, and takes a third longer with ResNet-50 on a CPU.

    Args:
        generator: A. beta: weight of the distillation on x~ (0.9 in the released code).
    """

    def __init__(self, *args: Any, generator: Generator, beta: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generator, self.beta = generator, beta

    def loss(self, batch: Minibatch) -> dict[str, Tensor]:
        x = batch.x.clone() if self.generator.changes_input else batch.x
        shifted = self.generator(x, batch.y, self.net)
        logits, shifted_logits = self.net(x), self.net(shifted)
        if self.cached is not None and batch.index is not None and not self.generator.changes_input:
            taught = self.cached[batch.index]
            taught_shifted = taught if self.generator.kind == "identity" else self.teach(shifted)
        else:
            taught, taught_shifted = self.teach(x), self.teach(shifted)
        terms = self.terms(batch, logits, taught)
        return terms | {"ood": self.beta * distillation(shifted_logits, taught_shifted, self.temperature)}


def make_hint(
    kind: str, student: nn.Module, teacher: nn.Module, probe: Tensor, labels: Tensor, negatives: int = 16_384
) -> nn.Module:
    """A hint for two networks, sized with a batch of at least two.

    Raises:
        ValueError: unknown kind; maps that are no images.
    """
    if kind not in HINTS:
        raise ValueError(f"hint is {kind!r}, expected one of {', '.join(HINTS)}")
    if probe.ndim != 4 and kind in ("fitnet", "at", "vid"):
        raise ValueError(f"{kind} compares maps of images, got inputs of shape {tuple(probe.shape)}")
    with torch.no_grad(), frozen(student):
        s, t = student(probe, parts=True), teacher(probe, parts=True)
    if kind != "crd":
        return HINTS[kind](s, t, len(labels))
    hint = CRD(s, t, len(labels), negatives)
    hint.label(labels)
    return hint


def check_teacher(teacher: nn.Module, probe: Tensor, classes: int) -> None:
    """Refuse a teacher of other classes.

    Raises:
        ValueError: says both numbers.
    """
    with torch.no_grad():
        predicted = teacher(probe).shape[1]
    if predicted != classes:
        raise ValueError(f"teacher predicts {predicted} classes, data set has {classes}")
