"""Scores and metrics beside the straightforward forms: loops over classes, samples and pairs, and pytorch-ood's KNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papers.ood_detection import evaluation, model, shallow
from tools.bench import Workload


class Data:
    """5,000 training, 1,000 validation and 2,000 scored features of 128 values, 10 classes, and a linear layer."""

    def __init__(self) -> None:
        means = np.random.RandomState(0).rand(10, 128) * 1.2
        torch.manual_seed(0)
        self.net = model.MLP(128, 10, (128, 128))
        parts = []
        for number, count in ((1, 5000), (2, 1000), (3, 2000)):
            random = np.random.RandomState(100 + number)
            y = random.randint(0, 10, count)
            h = np.maximum(means[y] + 0.6 * random.randn(count, 128) - 0.2, 0).astype(np.float32)
            parts.append((torch.from_numpy(h), torch.from_numpy(y)))
        (self.h, self.y), (self.held, _), (self.test, _) = parts
        self.weight, self.bias = (p.detach() for p in (self.net.head.weight, self.net.head.bias))

    def outputs(self, h: Tensor) -> model.Outputs:
        """Logits and features."""
        return model.Outputs(h @ self.weight.T + self.bias, h)


@cache
def made() -> Data:
    """The same for every row."""
    return Data()


def ours(make: Callable[[Data], model.Detector], scored: int = 2000) -> Callable[[], Any]:
    """Fit and score."""
    d = made()
    train, held, test = d.outputs(d.h), d.outputs(d.held), d.outputs(d.test[:scored])
    return lambda: make(d).fit(train, d.y, held).score(test)


def scoring(make: Callable[[Data], model.Detector], scored: int = 2000) -> Callable[[], Any]:
    """Score alone."""
    d = made()
    test = d.outputs(d.test[:scored])
    detector = make(d).fit(d.outputs(d.h), d.y, d.outputs(d.held))
    return lambda: detector.score(test)


def mds_loop(relative: bool) -> Callable[[], Any]:
    """A class at a time, the diagonal of a batch-by-batch matrix, batches of 200."""
    d = made()

    def step() -> Tensor:
        from sklearn.covariance import EmpiricalCovariance

        means = torch.stack([d.h[d.y == c].mean(0) for c in range(10)])
        centred = torch.cat([d.h[d.y == c] - means[c] for c in range(10)])
        estimate = EmpiricalCovariance(assume_centered=False).fit(centred.numpy().astype(np.float32))
        precision = torch.from_numpy(estimate.precision_).float()
        whole, centre = None, d.h.mean(0)
        if relative:
            fit = EmpiricalCovariance(assume_centered=False).fit((d.h - centre).numpy().astype(np.float32))
            whole = torch.from_numpy(fit.precision_).float()
        out = []
        for part in d.test.split(200):
            scores = []
            for c in range(10):
                gap = part - means[c]
                scores.append(-(gap @ precision @ gap.T).diag())
            best = torch.stack(scores, 1).max(1).values
            if whole is not None:
                gap = part - centre
                best = best + (gap @ whole @ gap.T).diag()
            out.append(best)
        return torch.cat(out)

    return step


def gradnorm_loop() -> Callable[[], Any]:
    """Gradients of 100 samples, one at a time."""
    d = made()
    layer = torch.nn.Linear(128, 10)
    layer.load_state_dict(d.net.head.state_dict())

    def step() -> list[float]:
        out = []
        for h in d.test[:100]:
            layer.zero_grad()
            (-layer(h[None]).log_softmax(1).sum()).backward()
            out.append(float(layer.weight.grad.abs().sum()))  # type: ignore[union-attr]
        return out

    return step


def klm_loop() -> Callable[[], Any]:
    """scipy's entropy for each pair of class and one of the first 100 samples."""
    from scipy.stats import entropy

    d = made()
    held = d.outputs(d.held).logits.softmax(1).numpy()
    test = d.outputs(d.test[:100]).logits.softmax(1).numpy()

    def step() -> list[float]:
        typical = [held[held.argmax(1) == c].mean(0) for c in range(10) if (held.argmax(1) == c).any()]
        return [-min(entropy(p, q) for q in typical) for p in test]

    return step


def knn_peer() -> Callable[[], Any]:
    """pytorch-ood's search by scikit-learn."""
    from pytorch_ood.detector import KNN

    d = made()
    peer = KNN(None, k=50).fit_features(d.h, d.y)
    peer.knn.n_jobs = 1
    return lambda: peer.predict_features(d.test)


def vim_plain() -> Callable[[], Any]:
    """General eigenvectors of the covariance by numpy, residual by batches."""
    d = made()
    train, test = d.outputs(d.h), d.outputs(d.test)

    def step() -> Tensor:
        from numpy.linalg import eig, pinv
        from sklearn.covariance import EmpiricalCovariance

        weight, bias = d.weight.numpy(), d.bias.numpy()
        u = -pinv(weight) @ bias
        value, vector = eig(EmpiricalCovariance(assume_centered=True).fit(d.h.numpy() - u).covariance_)
        space = np.ascontiguousarray(vector.T[np.argsort(value * -1)[64:]].T)
        norm = np.linalg.norm((d.h.numpy() - u) @ space, axis=-1)
        alpha = train.logits.numpy().max(-1).mean() / norm.mean()
        out = []
        for part, z in zip(d.test.split(200), test.logits.split(200)):
            out.append(z.logsumexp(1) - torch.from_numpy(np.linalg.norm((part.numpy() - u) @ space, axis=-1) * alpha))
        return torch.cat(out)

    return step


def lof_loop(form: str) -> Callable[[], Any]:
    """Local outlier factor of 1,500 samples of 20 values; "loop": a sample at a time."""
    x = torch.randn(1500, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if form == "ours":
        return lambda: shallow.LOF(20).fit_score(x)

    def step() -> Tensor:
        near = [(x - row).norm(dim=1).topk(21, largest=False) for row in x]
        reach = torch.stack([n.values[-1] for n in near])
        density = torch.stack([1 / torch.maximum(n.values[1:], reach[n.indices[1:]]).mean() for n in near])
        return torch.stack([-density[n.indices[1:]].mean() / density[i] for i, n in enumerate(near)])

    return step


def kde_peer(form: str) -> Callable[[], Any]:
    """Log densities of 1,000 samples of 64 values under 2,000; scikit-learn's trees."""
    from sklearn.neighbors import KernelDensity

    g = torch.Generator().manual_seed(0)
    x, q = (torch.randn(n, 64, dtype=torch.float64, generator=g) for n in (2000, 1000))
    if form == "ours":
        detector = shallow.KDE(3.0).fit(x)
        return lambda: detector.score(q)
    peer = KernelDensity(bandwidth=3.0).fit(x.numpy())
    return lambda: peer.score_samples(q.numpy())


def metrics(form: str) -> Callable[[], Any]:
    """AUROC, both AUPR and FPR95 of 20,000 scores; scikit-learn's functions, one sort each."""
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

    random = np.random.default_rng(0)
    inside, outside = random.normal(1, 1, 10_000), random.normal(0, 1, 10_000)
    if form == "ours":
        return lambda: evaluation.detection(inside, outside)
    scores, truth = np.concatenate([inside, outside]), np.arange(20_000) >= 10_000

    def step() -> tuple[float, ...]:
        fpr, tpr, _ = roc_curve(truth, -scores)
        areas = []
        for positive, value in ((truth, -scores), (~truth, scores)):
            precision, recall, _ = precision_recall_curve(positive, value)
            areas.append(auc(recall, precision))
        return roc_auc_score(truth, -scores), fpr[np.argmax(tpr >= 0.95)], *areas

    return step


def pasting(form: str) -> Callable[[], Any]:
    """CutPaste of 500 images of 28 x 28; "loop": an image at a time."""
    x = torch.rand(500, 784)
    if form == "ours":
        return lambda: shallow.cut_paste(x, (28, 28))
    return lambda: torch.cat([shallow.cut_paste(row[None], (28, 28)) for row in x])


def workloads() -> Iterator[Workload]:
    """The comparisons."""
    sizes = "train 5,000, scored 2,000, d 128, C 10"
    yield Workload(
        f"MDS, fit and score, {sizes}", lambda: ours(lambda d: model.MDS(d.net)), lambda: mds_loop(False),
        "a class at a time, diagonal of a product", target=2,
    )  # fmt: skip
    yield Workload(
        f"RMDS, fit and score, {sizes}", lambda: ours(lambda d: model.RMDS(d.net)), lambda: mds_loop(True),
        "a class at a time, diagonal of a product", target=2,
    )  # fmt: skip
    yield Workload(
        "GradNorm, scored 100, d 128, C 10", lambda: scoring(lambda d: model.GradNorm(d.net), 100), gradnorm_loop,
        "autograd a sample at a time", target=20,
    )  # fmt: skip
    yield Workload(
        "KLM, fit and score, validation 1,000, scored 100, C 10",
        lambda: ours(lambda d: model.KLMatching(d.net), 100), klm_loop,
        "scipy's entropy a pair at a time", target=20,
    )  # fmt: skip
    yield Workload(
        f"KNN k = 50, {sizes}", lambda: scoring(lambda d: model.DeepKNN(d.net, 50)), knn_peer,
        "pytorch-ood", target=1.5,
    )  # fmt: skip
    yield Workload(
        f"ViM, fit and score, {sizes}", lambda: ours(lambda d: model.ViM(d.net, 64)), vim_plain,
        "general eigenvectors by numpy", target=2,
    )  # fmt: skip
    for name, make, other, target in (
        ("LOF, 1,500 samples of 20 values", lof_loop, "a sample at a time", 2),
        ("KDE, 1,000 samples under 2,000 of 64 values", kde_peer, "scikit-learn", 2),
        ("four metrics of 20,000 scores", metrics, "scikit-learn, a sort for each", 2),
        ("CutPaste, 500 images of 28 x 28", pasting, "an image at a time", 2),
    ):
        yield Workload(name, lambda make=make: make("ours"), lambda make=make: make("other"), other, target=target)
