"""Algorithms of domain generalisation around a network, by DomainBed's contract.

``update`` takes a mini-batch of each training domain and makes one optimiser step, ``predict`` gives logits. The sum of
the sparse layers' balance losses, times 0.01, is added to the loss of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = Sequence[tuple[Tensor, Tensor]]


class Algorithm(nn.Module):
    """What all share; subclasses say what they minimise in ``objective``.

    Args:
        network: images to logits, with ``features`` and ``classify`` where an algorithm asks for them.
        domains: training domains. lr, weight_decay: of Adam. balance: of a network -> sum of balance losses or None.
        balance_weight: its factor.
    """

    def __init__(
        self,
        network: nn.Module,
        domains: int,
        lr: float,
        weight_decay: float = 0.0,
        balance: Callable[[nn.Module], Tensor | None] | None = None,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__()
        self.network, self.domains, self.lr, self.weight_decay = network, domains, lr, weight_decay
        self.balance, self.balance_weight = balance, balance_weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.count: Tensor
        self.optimizer = self._adam(network)

    def _adam(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), self.lr, weight_decay=self.weight_decay, fused=True)

    def objective(self, minibatches: Batches) -> dict[str, Tensor]:
        """Scalars; ``loss`` is minimised, beside the balance losses."""
        raise NotImplementedError

    def forward(self, minibatches: Batches) -> dict[str, Tensor]:
        """``objective`` with balance losses, in one call, so that a wrapper around the module sees the whole of it."""
        logs = self.objective(minibatches)
        extra = self.balance(self.network) if self.balance is not None else None
        if extra is not None:
            logs = logs | {"loss": logs["loss"] + self.balance_weight * extra, "balance": extra}
        return logs

    def update(
        self,
        minibatches: Batches,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        forward: Callable[[Batches], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """One optimiser step.

        Args:
            minibatches: one a training domain. backward: called with the loss. forward: a wrapper of this module.

        Raises:
            ValueError: another number of mini-batches than training domains.
        """
        self._check(minibatches)
        self.optimizer.zero_grad()
        logs = (forward or self)(minibatches)
        backward(logs["loss"])
        self.optimizer.step()
        self.count += 1
        return {name: value.detach() for name, value in logs.items()}

    def _check(self, minibatches: Batches) -> None:
        if len(minibatches) != self.domains:
            raise ValueError(f"{len(minibatches)} mini-batches, expected one for each of {self.domains} domains")

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.network(x)


class ERM(Algorithm):
    """Cross-entropy on all mini-batches together."""

    def objective(self, minibatches: Batches) -> dict[str, Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches))
        return {"loss": F.cross_entropy(self.network(x), y)}


class IRM(Algorithm):
    """Invariant risk minimisation: IRMv1's penalty, which comes in at its weight after ``anneal`` steps.

    Args:
        penalty: weight. anneal: steps with weight 1; Adam starts anew after them.
    """

    def __init__(self, *args: Any, penalty: float = 100.0, anneal: int = 500, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalty, self.anneal = penalty, anneal

    def update(self, minibatches: Batches, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """See ``Algorithm``."""
        if int(self.count) == self.anneal:
            self.optimizer.state.clear()
        return super().update(minibatches, *args, **kwargs)

    def objective(self, minibatches: Batches) -> dict[str, Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches))
        logits = self.network(x).split([len(part) for _, part in minibatches])
        risk = torch.stack([F.cross_entropy(z, t) for z, (_, t) in zip(logits, minibatches)]).mean()
        penalty = torch.stack([irm_penalty(z, t) for z, (_, t) in zip(logits, minibatches)]).mean()
        weight = self.penalty if int(self.count) >= self.anneal else 1.0
        return {"loss": risk + weight * penalty, "penalty": penalty}


def irm_penalty(logits: Tensor, y: Tensor) -> Tensor:
    """Product of the gradients by a scale of the logits on both halves of a batch, written out.

    d/dw CE(w z, y) at w = 1 is the mean of sum_k softmax(z)_k z_k - z_y.
    """
    slope = (logits.softmax(1) * logits).sum(1) - logits.gather(1, y[:, None])[:, 0]
    return slope[::2].mean() * slope[1::2].mean()


class _Aligned(Algorithm):
    """Cross-entropy and a distance between the features of every two domains.

    Args:
        gamma: weight of the mean distance.
    """

    def __init__(self, *args: Any, gamma: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma = gamma

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Between (n, d) and (m, d) features."""
        raise NotImplementedError

    def objective(self, minibatches: Batches) -> dict[str, Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches))
        z = self.network.features(x)  # type: ignore[operator]
        risk = F.cross_entropy(self.network.classify(z), y)  # type: ignore[operator]
        parts = z.split([len(part) for _, part in minibatches])
        pairs = [(i, j) for i in range(len(parts)) for j in range(i)]
        if not pairs:
            return {"loss": risk}
        penalty = torch.stack([self.distance(parts[i], parts[j]) for i, j in pairs]).mean()
        return {"loss": risk + self.gamma * penalty, "penalty": penalty}


class CORAL(_Aligned):
    """Means and covariances of the domains' features are made alike."""

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        covariance = (a.T.cov() - b.T.cov()).square().mean()
        return (a.mean(0) - b.mean(0)).square().mean() + covariance


class MMD(_Aligned):
    """Maximum mean discrepancy with Gaussian kernels of widths 10^-3 .. 10^3."""

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return _kernel(a, a) + _kernel(b, b) - 2 * _kernel(a, b)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    square = (a[:, None] - b[None]).square().sum(2)
    scales = torch.tensor([10.0**p for p in range(-3, 4)], device=a.device)
    return torch.exp(-scales[:, None, None] * square).sum(0).mean()


class Fish(Algorithm):
    """Gradient matching by inner steps, one a domain, and a step of the weights towards where they led.

    Args:
        meta: share of the way. The inner Adam keeps its state between steps.
    """

    def __init__(self, *args: Any, meta: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meta = meta

    def objective(self, minibatches: Batches) -> dict[str, Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches))
        return {"loss": F.cross_entropy(self.network(x), y)}

    def update(
        self,
        minibatches: Batches,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        forward: Callable[[Batches], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """One inner step on each domain in turn, then the outer one."""
        self._check(minibatches)
        start = [p.detach().clone() for p in self.network.parameters()]
        for batch in minibatches:
            self.optimizer.zero_grad()
            logs = (forward or self)([batch])
            backward(logs["loss"])
            self.optimizer.step()
        with torch.no_grad():
            for p, old in zip(self.network.parameters(), start, strict=True):
                p.copy_(old.lerp(p, self.meta))
        self.count += 1
        return {name: value.detach() for name, value in logs.items()}


ALGORITHMS: dict[str, type[Algorithm]] = {"erm": ERM, "irm": IRM, "coral": CORAL, "mmd": MMD, "fish": Fish}


def make_algorithm(name: str, network: nn.Module, domains: int, lr: float, **settings: Any) -> Algorithm:
    """An algorithm by its name; it trains ``network`` itself.

    Raises:
        ValueError: no such algorithm, or one that needs features of a network with two heads.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"no algorithm {name!r}, expected one of {', '.join(ALGORITHMS)}")
    if issubclass(ALGORITHMS[name], _Aligned) and getattr(network, "distilled", False):
        raise ValueError(f"{name} aligns the features of one head, SF-MoE has two: take erm, irm or fish")
    return ALGORITHMS[name](network, domains, lr, **settings)
