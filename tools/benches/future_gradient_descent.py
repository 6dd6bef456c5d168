"""Future gradient descent: gradients of many models, the generator's step, a recommender's step, and ASMG's cells.

The straightforward forms have the same values: autograd for one model and domain at a time, gradients kept as vectors,
one backward pass a domain, weights tiled over the rows of a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from papers.future_gradient_descent import data, model
from tools.bench import Workload

HIDDEN = (32, 32)


def batch(domains: int, size: int, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ids (domains, size, F) of the fused tables and labels (domains, size)."""
    g = torch.Generator().manual_seed(0)
    first = torch.tensor(levels).cumsum(0) - torch.tensor(levels)
    ids = torch.stack([torch.randint(0, n, (domains, size), generator=g) for n in levels], -1) + first
    return ids, (torch.rand(domains, size, generator=g) < 0.3).float()


def models(kind: str, levels: tuple[int, ...], size: int, count: int) -> model.Parameters:
    """Models with values."""
    return model.init_recommender(kind, levels, size, HIDDEN, torch.Generator().manual_seed(0), count)


SMALL = (21,) * 6
LARGE = (2000,) * 39


def many_gradients(
    kind: str, levels: tuple[int, ...], size: int, count: int, rows: int, form: str
) -> Callable[[], Any]:
    """(count, 4, P): gradients of several models on four domains, as a round of the generator needs them."""
    p = models(kind, levels, size, count)
    ids, labels = batch(4, rows, levels)
    if form == "ours":
        return lambda: model.domain_gradients(p, ids, labels)

    def looped() -> Tensor:
        out = []
        for m in range(count):
            one = {name: value[m : m + 1] for name, value in p.items()}
            out += [model.gradients(one, ids[d : d + 1], labels[d : d + 1]) for d in range(4)]
        return torch.cat(out)

    return looped


def generator_step(form: str) -> Callable[[], Any]:
    """A step of the generator on 16 DeepFMs; "vectors": the gradients are combined, the mini-batch is read whole."""
    ids, labels = batch(4, 512, SMALL)
    grads = model.domain_gradients(models("deepfm", SMALL, 8, 16), ids, labels)
    torch.manual_seed(0)
    net = model.MFGG(SMALL, 3)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    k, c, square = (value.mean(0) for value in model.gram(grads[:, :3], grads[:, 3]))
    summary, scale = model.summarise(ids[:3], sum(SMALL)), grads[:, 3].square().sum(1)

    def ours() -> None:
        sgd.zero_grad()
        model.forecast_error(net(None, summary), k, c, square).backward()
        sgd.step()

    def vectors() -> None:
        sgd.zero_grad()
        e = net.embedding(ids[:3]).mean(1).flatten(1)
        forecast = torch.einsum("i,mip->mp", net.combine(e), grads[:, :3])
        ((forecast - grads[:, 3]).square().sum(1) / scale).mean().backward()
        sgd.step()

    return ours if form == "ours" else vectors


def recommender_step(form: str) -> Callable[[], Any]:
    """A step of DeepFM on mini-batches of three domains; "domains": one backward pass each, combined and then taken."""
    stream = data.seasonal(0, 3, 4096)
    index = torch.stack([stream.day(t)[:128] for t in range(3)])
    p = {name: value.requires_grad_() for name, value in models("deepfm", SMALL, 8, 1).items()}
    adam = torch.optim.Adam(list(p.values()), lr=0.0, fused=form == "ours", foreach=False)
    a = torch.tensor([0.2, 0.3, 0.5])

    def ours() -> None:
        ids, labels = stream.rows(index)
        adam.zero_grad()
        model.weighted_loss(p, ids, labels, a).backward()
        adam.step()

    def domains() -> None:
        total = [torch.zeros_like(value) for value in p.values()]
        for i in range(3):
            ids, labels = stream.rows(index[i : i + 1])
            found = torch.autograd.grad(model.losses(p, ids, labels).sum(), list(p.values()))
            total = [t + a[i] * g for t, g in zip(total, found, strict=True)]
        for value, g in zip(p.values(), total, strict=True):
            value.grad = g
        adam.step()

    return ours if form == "ours" else domains


def tiled(net: model.MetaGenerator, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """ASMG's generation with the weights of a table's cells tiled over its rows and a product a gate."""
    made = {}
    for kind, read in values.items():
        rows = read.shape[1]
        w_in, w_h, w_out, shift = (getattr(net, f"{kind}_{part}") for part in ("input", "recurrent", "output", "shift"))
        u = w_in[:, :, 0].permute(0, 2, 1)[:, None, :, None].expand(-1, rows, -1, -1, -1).contiguous()
        w = w_h[:, :, :, 0].permute(0, 3, 2, 1)[:, None].expand(-1, rows, -1, -1, -1).contiguous()
        out = w_out[:, 0].t()[None, :, :, None].expand(rows, -1, -1, -1).contiguous()
        h, each = torch.zeros(rows, read.shape[2], 1, net.hidden), []
        for x in read[..., None, None]:
            z, r = ((x @ u[i] + h @ w[i]).sigmoid() for i in (0, 1))
            h = (1 - z) * h + z * (x @ u[2] + (r * h) @ w[2]).tanh()
            each.append((h @ out)[..., 0, 0] + shift)
        made[kind] = torch.stack(each)
    return made


def meta_generator(form: str) -> Callable[[], Any]:
    """Both passes of ASMG's generator on three DeepFMs."""
    torch.manual_seed(0)
    net = model.MetaGenerator(model.recommender_shapes("deepfm", SMALL, 8, HIDDEN))
    p = models("deepfm", SMALL, 8, 3)
    packed = net.pack(p)

    def ours() -> None:
        net.zero_grad()
        made, _ = net(p, net.start())
        model.flatten(made).square().sum().backward()

    def official() -> None:
        net.zero_grad()
        made = net.unpack(**tiled(net, packed))
        model.flatten(made).square().sum().backward()

    return ours if form == "ours" else official


def workloads() -> Iterator[Workload]:
    """Everything that is timed."""
    bind = functools.partial
    one = "autograd for one model and domain at a time"
    for name, args, target in (
        ("gradients of 16 FMs on 4 domains of 512 rows", ("fm", SMALL, 8, 16, 512), 2.0),
        ("gradients of 16 DeepFMs on 4 domains of 512 rows", ("deepfm", SMALL, 8, 16, 512), 1.2),
        ("gradients of 4 FMs on 4 domains of 256 rows, 78,000 levels", ("fm", LARGE, 16, 4, 256), 2.0),
    ):
        yield Workload(
            name, bind(many_gradients, *args, "ours"), bind(many_gradients, *args, "looped"), one, target=target
        )
    for name, make, other, target in (
        ("step of the generator, 16 DeepFMs", generator_step, "gradients combined as vectors", 2.0),
        ("step of DeepFM on three domains", recommender_step, "one backward pass a domain", 1.5),
        ("ASMG's generator on three DeepFMs, both passes", meta_generator, "weights tiled, a product a gate", 2.0),
    ):
        yield Workload(name, bind(make, "ours"), bind(make, "other"), other, target=target)
