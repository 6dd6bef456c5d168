"""Black-box searches over perturbations, the screening of what they propose, and the attack that joins both.

``S`` scenes are searched side by side; a vector has ``D`` numbers in [-1, 1] and is maximised for its score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import Attack, Scene, feasible, perturb


class Search:
    """A black-box maximiser that works on S problems at once.

    ``ask`` proposes, ``tell`` reports. A proposal that turned out infeasible is asked for again with ``attempt`` + 1.

    Args:
        problems: S. size: D. generator: source of all random numbers.
    """

    batch = 12

    def __init__(self, problems: int, size: int, generator: torch.Generator) -> None:
        self.problems, self.size, self.generator = problems, size, generator
        self.deltas = torch.zeros(problems, 0, size)
        self.scores = torch.zeros(problems, 0)

    def uniform(self, count: int) -> Tensor:
        """Random vectors (S, count, D) in [-1, 1]."""
        return 2 * torch.rand(self.problems, count, self.size, generator=self.generator) - 1

    def normal(self, count: int) -> Tensor:
        """Gaussian vectors (S, count, D)."""
        return torch.randn(self.problems, count, self.size, generator=self.generator)

    def ask(self, attempt: int) -> Tensor:
        """Vectors (S, Q, D) in [-1, 1] to try next."""
        return self.uniform(self.batch)

    def tell(self, deltas: Tensor, scores: Tensor) -> None:
        """Scores (S, Q) of vectors (S, Q, D); -inf for what stayed infeasible."""
        self.deltas = torch.cat([self.deltas, deltas], 1)
        self.scores = torch.cat([self.scores, scores], 1)

    def filled(self, scores: Tensor) -> Tensor:
        """Scores (S, n) with the infeasible ones a standard deviation below the worst feasible one."""
        ok = scores.isfinite()
        count = ok.sum(1, keepdim=True).clamp_min(1)
        known = scores.masked_fill(~ok, 0)
        mean = known.sum(1, keepdim=True) / count
        std = (((known - mean) * ok).square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)
        return torch.where(ok, scores, scores.masked_fill(~ok, math.inf).amin(1, keepdim=True).clamp_max(1e6) - std)


class RandomSearch(Search):
    """Uniform vectors."""


class Genetic(Search):
    """A population of 12: tournaments of 3, blend crossover, Gaussian mutation, 2 elites."""

    population, elites = 12, 2

    def ask(self, attempt: int) -> Tensor:
        """The first population, then children of the last one."""
        if self.scores.shape[1] < self.population:
            return self.uniform(self.population - self.scores.shape[1])
        count, scores = self.population - self.elites, self.filled(self.scores)
        shape = (self.problems, 2 * count, 3)
        rivals = torch.randint(self.population, shape, generator=self.generator)
        table = scores[:, None].expand(-1, 2 * count, -1)
        winner = rivals.gather(2, table.gather(2, rivals).argmax(2, keepdim=True))
        parents = self.deltas.gather(1, winner.expand(-1, -1, self.size))
        a, b = parents[:, :count], parents[:, count:]
        low, wide = torch.minimum(a, b), (a - b).abs()
        child = low - 0.5 * wide + 2 * wide * torch.rand(low.shape, generator=self.generator)
        mutate = torch.rand(child.shape, generator=self.generator) < 0.3
        return (child + 0.2 * mutate * self.normal(count)).clamp(-1, 1)

    def tell(self, deltas: Tensor, scores: Tensor) -> None:
        """Children replace all but the elites."""
        if self.scores.shape[1] >= self.population:
            best = self.filled(self.scores).topk(self.elites, 1).indices
            self.deltas = self.deltas.gather(1, best.unsqueeze(-1).expand(-1, -1, self.size))
            self.scores = self.scores.gather(1, best)
        super().tell(deltas, scores)


def gaussian_process(x: Tensor, y: Tensor, noise: float = 1e-4) -> nn.Module:
    """BoTorch's GP with a scaled Matern-5/2 kernel, a length for each dimension, and known noise.

    Args:
        x: (S, n, D). y: (S, n), standardised.
    """
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import Interval
    from gpytorch.kernels import MaternKernel, ScaleKernel

    batch = x.shape[:-2]
    lengths = Interval(0.1, 5.0, initial_value=torch.tensor(1.0))
    matern = MaternKernel(2.5, ard_num_dims=x.shape[-1], batch_shape=batch, lengthscale_constraint=lengths)
    scaled = ScaleKernel(matern, batch_shape=batch, outputscale_constraint=Interval(0.05, 20.0))
    y = y.unsqueeze(-1)
    return SingleTaskGP(x, y, torch.full_like(y, noise), covar_module=scaled, outcome_transform=None)


class Bayesian(Search):
    """Gaussian processes of BoTorch and expected improvement, after ten random points.

    Candidates are 1,000 random points and 10 clouds of 20 around the best ones; their ranking by expected improvement
    is walked down where the first turns out infeasible. Lengths and scale are fitted every five queries.
    """

    initial, candidates, starts, cloud, every = 10, 1000, 10, 20, 5
    model: nn.Module | None = None
    ranked: Tensor

    def ask(self, attempt: int) -> Tensor:
        """Ten points, then one at a time."""
        if self.scores.shape[1] < self.initial:
            return self.uniform(self.initial - self.scores.shape[1])
        if attempt == 0:
            self.ranked = self.rank()
        return self.ranked[:, attempt, None]

    @torch.no_grad()
    def rank(self, most: int = 20) -> Tensor:
        """Candidates (S, most, D) of the highest expected improvement, best first.

        EI = (mean - best) Phi(z) + std phi(z), z = (mean - best) / std; its logarithm ranks alike and cannot vanish.
        """
        from botorch.acquisition.analytic import LogExpectedImprovement

        scores = self.filled(self.scores).double()
        mean, std = scores.mean(1, keepdim=True), scores.std(1, keepdim=True).clamp_min(1e-6)
        y = (scores - mean) / std
        model = self.refit(self.deltas.double(), y)
        top = y.topk(min(self.starts, y.shape[1]), 1).indices
        around = self.deltas.gather(1, top.unsqueeze(-1).expand(-1, -1, self.size)).repeat_interleave(self.cloud, 1)
        around = (around + 0.1 * self.normal(around.shape[1])).clamp(-1, 1)
        x = torch.cat([self.uniform(self.candidates), around], 1)
        gain = LogExpectedImprovement(model, best_f=y.amax(1, keepdim=True))(x.double().transpose(0, 1).unsqueeze(2))
        order = gain.topk(most, 0).indices.T  # of (candidates, S)
        return x.gather(1, order.unsqueeze(-1).expand(-1, -1, self.size))

    def refit(self, x: Tensor, y: Tensor) -> nn.Module:
        """The GP of all points so far; lengths and scale only anew every few queries."""
        from botorch.optim.fit import fit_gpytorch_mll_scipy
        from gpytorch.mlls import ExactMarginalLogLikelihood

        model = gaussian_process(x, y)
        if self.model is not None:
            model.load_state_dict(
                {name: value for name, value in self.model.state_dict().items() if "noise" not in name}, strict=False
            )
        if self.model is None or (x.shape[1] - self.initial) % self.every == 0:
            with torch.enable_grad():
                mll = ExactMarginalLogLikelihood(model.likelihood, model)
                fit_gpytorch_mll_scipy(mll, options={"maxiter": 50})
        self.model = model.eval()
        return model


class Nes(Search):
    """Natural evolution strategy: a gradient from antithetic samples, ascended by its sign."""

    batch, sigma, rate = 6, 0.2, 0.1

    def __init__(self, problems: int, size: int, generator: torch.Generator) -> None:
        super().__init__(problems, size, generator)
        self.centre = torch.zeros(problems, size)

    def ask(self, attempt: int) -> Tensor:
        """Three antithetic pairs around the centre."""
        noise = self.normal(self.batch // 2)
        return (self.centre[:, None] + self.sigma * torch.cat([noise, -noise], 1)).clamp(-1, 1)

    def tell(self, deltas: Tensor, scores: Tensor) -> None:
        """Move the centre along the estimate of the gradient."""
        super().tell(deltas, scores)
        if deltas.shape[1] > 1:
            noise = (deltas - self.centre[:, None]) / self.sigma
            score = self.filled(scores)
            score = score - score.mean(1, keepdim=True)
            gradient = (score.unsqueeze(-1) * noise).mean(1) / self.sigma
            self.centre = (self.centre + self.rate * gradient.sign()).clamp(-1, 1)


class BanditTd(Search):
    """Bandits with a time-dependent prior: two queries a step correct a running estimate of the gradient."""

    batch, reach, explore, prior_rate, rate = 2, 0.1, 0.5, 3.0, 0.05

    def __init__(self, problems: int, size: int, generator: torch.Generator) -> None:
        super().__init__(problems, size, generator)
        self.centre = torch.zeros(problems, size)
        self.prior = torch.zeros(problems, size)

    def ask(self, attempt: int) -> Tensor:
        """centre + reach (prior +- explore u)."""
        step = self.explore * self.normal(1)[:, 0]
        both = torch.stack([self.prior + step, self.prior - step], 1)
        return (self.centre[:, None] + self.reach * both).clamp(-1, 1)

    def tell(self, deltas: Tensor, scores: Tensor) -> None:
        """Exponentiated-gradient step of the prior, then one of the centre along its sign."""
        super().tell(deltas, scores)
        if deltas.shape[1] == 2:
            score = self.filled(scores)
            noise = (deltas[:, 0] - deltas[:, 1]) / (2 * self.reach * self.explore)
            change = self.prior_rate * (score[:, :1] - score[:, 1:]) / (self.reach * self.explore) * noise
            change = change.clamp(-10, 10)
            up, down = (1 + self.prior) * change.exp(), (1 - self.prior) * (-change).exp()
            self.prior = ((up - down) / (up + down)).clamp(-0.999, 0.999)
            self.centre = (self.centre + self.rate * self.prior.sign()).clamp(-1, 1)


SEARCHES: dict[str, type[Search]] = {
    "random": RandomSearch,
    "genetic": Genetic,
    "bayesian": Bayesian,
    "nes": Nes,
    "bandit": BanditTd,
}


@dataclass(frozen=True)
class Found:
    """The result of a search over S scenes: best delta (S, D), its score (S,), and best so far a query (S, budget).

    ``rejected`` (S,) counts the queries for which no feasible candidate was found; they score nothing.
    """

    delta: Tensor
    score: Tensor
    curve: Tensor
    rejected: Tensor


class Rejecting:
    """Solution screening: an infeasible candidate is drawn again, up to ``tries`` times, at no cost."""

    def __init__(self, scenes: Scene, attack: Attack, tries: int = 20) -> None:
        self.scenes, self.attack, self.tries = scenes, attack, tries

    def check(self, delta: Tensor) -> Tensor:
        """Which of (S, Q, D) are feasible, (S, Q)."""
        which = torch.arange(len(delta)).repeat_interleave(delta.shape[1])
        return feasible(self.scenes, which, delta.flatten(0, 1), self.attack).view(delta.shape[:2])

    def __call__(self, search: Search, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """At most ``count`` candidates: what the search proposed, what is simulated, and which of it is feasible."""
        delta = search.ask(0)[:, :count]
        ok = self.check(delta)
        for attempt in range(1, self.tries):
            if ok.all():
                break
            again = search.ask(attempt)[:, :count]
            s, q = (~ok).nonzero(as_tuple=True)
            good = feasible(self.scenes, s, again[s, q], self.attack)
            delta[s[good], q[good]] = again[s[good], q[good]]
            ok[s[good], q[good]] = True
        return delta, delta, ok


class Nearest(Rejecting):
    """Every candidate becomes the nearest (L2 of its trajectory) of ``members`` feasible ones drawn beforehand."""

    def __init__(self, scenes: Scene, attack: Attack, generator: torch.Generator, members: int = 500) -> None:
        super().__init__(scenes, attack)
        draw = Search(len(scenes), attack.size(scenes.actors.shape[1]), generator)
        kept = torch.zeros(len(scenes), 0, draw.size)
        for _ in range(self.tries):
            delta = draw.uniform(members)
            # the recording stands in for what is infeasible; it sorts last
            kept = torch.cat([kept, torch.where(self.check(delta).unsqueeze(-1), delta, 0)], 1)
            order = (kept == 0).all(-1).to(torch.int8).argsort(dim=1, stable=True)[:, :members]
            kept = kept.gather(1, order.unsqueeze(-1).expand(-1, -1, draw.size))
            if not (kept == 0).all(-1).any():
                break
        self.bank = kept
        self.paths = self.path(self.bank)

    def path(self, delta: Tensor) -> Tensor:
        """Positions (S, Q, m T 2) of the perturbed actors."""
        which = torch.arange(len(delta)).repeat_interleave(delta.shape[1])
        moved = perturb(self.scenes, which, delta.flatten(0, 1), self.attack)
        return moved[..., 1:, :2].reshape(*delta.shape[:2], -1)

    def __call__(self, search: Search, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As of ``Rejecting``; everything is feasible."""
        asked = search.ask(0)[:, :count]
        index = torch.cdist(self.path(asked), self.paths).argmin(-1)
        delta = self.bank.gather(1, index.unsqueeze(-1).expand(-1, -1, self.bank.shape[-1]))
        return asked, delta, torch.ones(delta.shape[:2], dtype=torch.bool)


def attack_scenes(score: Callable[[Tensor, Tensor], Tensor], search: Search, screen: Rejecting, budget: int) -> Found:
    """Search the worst feasible perturbation of each of S scenes.

    Query 1 is the scene as recorded. A query is a simulation of the stack; drawing candidates again is free.

    Args:
        score: ``score(which, delta)`` gives (B,) scores of (B,) scenes perturbed by (B, D).

    Raises:
        ValueError: a budget below 1, or below the initial points of Bayesian optimisation.
    """
    least = getattr(search, "initial", 1)
    if budget < least:
        raise ValueError(f"a budget of {budget} queries, expected at least {least} for {type(search).__name__}")
    every = torch.arange(search.problems)
    best = torch.zeros(search.problems, search.size)
    top = score(every, best)
    search.tell(best[:, None].clone(), top[:, None])
    curve, rejected = [top], torch.zeros(search.problems)
    while len(curve) < budget:
        asked, delta, ok = screen(search, budget - len(curve))
        scores = torch.full(ok.shape, -math.inf)
        s, q = ok.nonzero(as_tuple=True)
        if len(s):
            scores[s, q] = score(s, delta[s, q])
        search.tell(asked, scores)
        rejected += (~ok).sum(1)
        for q in range(ok.shape[1]):
            better = scores[:, q] > top
            top = torch.where(better, scores[:, q], top)
            best = torch.where(better[:, None], delta[:, q], best)
            curve.append(top)
    return Found(best, top, torch.stack(curve, 1), rejected)
