"""The two-stage baselines on the segments of a frozen panoptic detector: IMP, MOTIFS, VCTree, GPSNet, and frequency.

The paper takes them as baselines; their definitions are those of Xu et al. 2017 (IMP), Zellers et al. 2018 (MOTIFS),
Tang et al. 2019 (VCTree) and Lin et al. 2020 (GPSNet), with the sizes and changes of the code released with the paper.

All objects of a batch lie in one list, ordered by image; a pair is two rows of it. Classes are 1 .. C here and 0 is the
background; predicates 1 .. P and 0 is "no relation". M objects, E ordered pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SPATIAL = 27
"""Side of the maps of subject and object boxes."""


@dataclass
class Objects:
    """Segments and pairs of a batch.

    Attributes:
        image: (M,) ascending. features: (M, F). boxes: (M, 4) x1, y1, x2, y2 pixels. sizes: (M, 2) height and width of
        the image. labels: (M,) 1 .. C, true (PredCls) or detected. scores: (M,). pairs: (E, 2) rows.
        union: (E, F) features of the pairs; ``None`` until made.
    """

    image: Tensor
    features: Tensor
    boxes: Tensor
    sizes: Tensor
    labels: Tensor
    scores: Tensor
    pairs: Tensor
    union: Tensor | None = None


def all_pairs(image: Tensor) -> Tensor:
    """(M,) image of each object -> (E, 2) every ordered pair of different objects of one image."""
    same = image[:, None] == image[None]
    same.fill_diagonal_(False)
    return same.nonzero()


def box_code(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(M, 9): w, h, centre and corners in fractions of the image, and the area's share; w = x2 - x1 + 1."""
    h, w = sizes.unbind(1)
    x1, y1, x2, y2 = boxes.unbind(1)
    wide, high = x2 - x1 + 1, y2 - y1 + 1
    parts = [wide / w, high / h, (x1 + wide / 2) / w, (y1 + high / 2) / h, x1 / w, y1 / h, x2 / w, y2 / h]
    return torch.stack([*parts, wide * high / (w * h)], 1)


def box_maps(boxes: Tensor, sizes: Tensor, tail_rect_bug: bool = False) -> Tensor:
    """(M, 2, 27, 27) binary maps of each box as a subject and as an object, the image scaled to 27 x 27.

    ``tail_rect_bug``: the object's columns are compared with (x1, y1) and its rows with (x2, y2), as in the released
    code, whose indices are exchanged.
    """
    scale = SPATIAL / sizes.flip(1).repeat(1, 2)
    x1, y1, x2, y2 = (boxes * scale).unbind(1)
    steps = torch.arange(SPATIAL, device=boxes.device)

    def inside(low: Tensor, high: Tensor) -> Tensor:
        return (steps >= low.floor()[:, None]) & (steps <= high.ceil()[:, None])

    def rectangle(across: Tensor, down: Tensor) -> Tensor:
        return (across[:, None, :] & down[:, :, None]).to(boxes.dtype)

    subject = rectangle(inside(x1, x2), inside(y1, y2))
    object_ = rectangle(inside(x1, y1), inside(x2, y2)) if tail_rect_bug else subject
    return torch.stack([subject, object_], 1)


class SpatialEncoder(nn.Module):
    """Two convolutions with a pooling between, on the maps of a pair.

    The first convolution is linear in the two maps: each object's share is computed once, not once a pair.
    """

    def __init__(self, width: int = 256, momentum: float = 0.01) -> None:
        super().__init__()
        half = width // 2
        self.first = nn.Conv2d(2, half, 7, 2, 3)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.BatchNorm2d(half, momentum=momentum),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(half, width, 3, 1, 1),
            nn.ReLU(),
            nn.BatchNorm2d(width, momentum=momentum),
        )

    def forward(self, maps: Tensor, pairs: Tensor) -> Tensor:
        """(M, 2, 27, 27), (E, 2) -> (E, width, 7, 7)"""
        weight = self.first.weight
        subject = F.conv2d(maps[:, :1], weight[:, :1], self.first.bias, 2, 3)
        object_ = F.conv2d(maps[:, 1:], weight[:, 1:], None, 2, 3)
        return self.rest(subject[pairs[:, 0]] + object_[pairs[:, 1]])


def region_mlp(width: int, hidden: int) -> nn.Sequential:
    """7 x 7 maps through two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(width * 49, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())


class RegionFeatures(nn.Module):
    """RoIAlign on a feature pyramid, for objects and for unions of pairs, which add the spatial maps (paper's size)."""

    def __init__(self, channels: int = 256, hidden: int = 1024, tail_rect_bug: bool = False) -> None:
        super().__init__()
        from torchvision.ops import MultiScaleRoIAlign

        self.align = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=224, canonical_level=4)
        self.objects, self.unions = region_mlp(channels, hidden), region_mlp(channels, hidden)
        self.spatial, self.tail_rect_bug = SpatialEncoder(channels), tail_rect_bug

    def forward(self, maps: dict[str, Tensor], o: Objects, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Maps "0" .. "3" of a batch of padded images of ``shape`` -> (M, hidden), (E, hidden)."""
        images = len(maps["0"])
        subject, object_ = o.boxes[o.pairs[:, 0]], o.boxes[o.pairs[:, 1]]
        low, high = torch.minimum(subject, object_)[:, :2], torch.maximum(subject, object_)[:, 2:]
        shapes = [shape] * images

        def pool(boxes: Tensor, image: Tensor) -> Tensor:
            return self.align(maps, list(boxes.split(image.bincount(minlength=images).tolist())), shapes)

        union = pool(torch.cat([low, high], 1), o.image[o.pairs[:, 0]])
        union = union + self.spatial(box_maps(o.boxes, o.sizes, self.tail_rect_bug), o.pairs)
        return self.objects(pool(o.boxes, o.image)), self.unions(union)


def pooled(features: Tensor, masks: Tensor) -> Tensor:
    """Mean features of masks: (F, h, w), (N, H, W) bool -> (N, F); masks are brought to the features' size."""
    small = F.interpolate(masks[None].float(), features.shape[-2:], mode="area")[0].flatten(1)
    return small @ features.flatten(1).T / small.sum(1, keepdim=True).clamp(min=1e-6)


class PooledFeatures(nn.Module):
    """Frozen features averaged over masks, projected; a pair has the mean of its two and pooled box maps (ours)."""

    def __init__(self, channels: int, hidden: int, tail_rect_bug: bool = False) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU())
        self.spatial, self.tail_rect_bug = SpatialEncoder(16, momentum=0.1), tail_rect_bug
        self.out = nn.Linear(16 * 49, hidden)

    def forward(self, o: Objects) -> tuple[Tensor, Tensor]:
        """(M, channels) features -> (M, hidden), (E, hidden)."""
        x = self.project(o.features)
        spatial = self.spatial(box_maps(o.boxes, o.sizes, self.tail_rect_bug), o.pairs)
        return x, self.out(spatial.flatten(1)) + x[o.pairs].mean(1)


# ---- frequency -------------------------------------------------------------------------------------------------------


def frequency_table(labels: Tensor, relations: Tensor, classes: int, predicates: int, pairs: Tensor) -> Tensor:
    """log(count / sum + 1e-3) of predicates for each pair of classes.

    Args:
        labels: (M,) classes of all training objects. relations: (R, 3) rows of ``labels`` and predicate. pairs: (E, 2)
        all ordered pairs, of which those without a relation count as predicate 0.

    Returns:
        (C + 1, C + 1, P + 1)
    """
    counts = torch.zeros(classes + 1, classes + 1, predicates + 1)
    subject, object_ = labels[pairs].unbind(1)
    one = torch.ones(max(len(pairs), len(relations)))
    counts.index_put_((subject, object_, torch.zeros_like(subject)), one[: len(pairs)], accumulate=True)
    sub, obj, predicate = labels[relations[:, 0]], labels[relations[:, 1]], relations[:, 2]
    counts.index_put_((sub, obj, predicate), one[: len(relations)], accumulate=True)
    held = relations[:, :2].unique(dim=0)
    a, b = labels[held].unbind(1)
    counts.index_put_((a, b, torch.zeros_like(a)), -one[: len(held)], accumulate=True)
    return (counts / counts.sum(-1, keepdim=True).clamp(min=1) + 1e-3).log()


# ---- parts -----------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Where each object of a batch stands in padded sequences: (M,) image and place, (B,) lengths."""

    image: Tensor
    place: Tensor
    lengths: Tensor

    @staticmethod
    def of(image: Tensor, key: Tensor) -> Layout:
        """Objects of each image in descending ``key`` (M,)."""
        by_key = torch.argsort(key, descending=True, stable=True)
        order = by_key[torch.argsort(image[by_key], stable=True)]
        lengths = image.bincount()
        start = lengths.cumsum(0) - lengths
        place = torch.empty_like(image)
        place[order] = torch.arange(len(image), device=image.device) - start[image[order]]
        return Layout(image, place, lengths)

    def pad(self, values: Tensor) -> Tensor:
        """(M, F) -> (B, N, F)"""
        shape = (len(self.lengths), int(self.lengths.max()), *values.shape[1:])
        return values.new_zeros(shape).index_put((self.image, self.place), values)

    def flat(self, padded: Tensor) -> Tensor:
        """(B, N, F) -> (M, F)"""
        return padded[self.image, self.place]


class Sequences(nn.Module):
    """Bidirectional LSTM over the objects of each image."""

    def __init__(self, c_in: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(c_in, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(M, c_in) -> (M, hidden)"""
        lengths = layout.lengths.cpu()
        there = lengths > 0  # an image without objects has no sequence
        row = (there.cumsum(0) - 1).to(x.device)
        packed = pack_padded_sequence(
            layout.pad(x)[there.to(x.device)], lengths[there], batch_first=True, enforce_sorted=False
        )
        y = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
        return self.out(y[row[layout.image], layout.place])


class HighwayCell(nn.Module):
    """LSTM with one parent and a highway gate: h = r o tanh(c) + (1 - r) W x."""

    def __init__(self, c_in: int, hidden: int) -> None:
        super().__init__()
        self.x, self.h, self.skip = nn.Linear(c_in, 5 * hidden), nn.Linear(hidden, 5 * hidden), nn.Linear(c_in, hidden)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(B, c_in) and the parent's (B, hidden) states -> states."""
        i, o, f, r, u = (self.x(x) + self.h(h)).chunk(5, -1)
        c = i.sigmoid() * u.tanh() + f.sigmoid() * c
        r = r.sigmoid()
        return r * o.sigmoid() * c.tanh() + (1 - r) * self.skip(x), c


class UpwardCell(nn.Module):
    """LSTM with two children, each with its own forget gate, and the highway gate."""

    def __init__(self, c_in: int, hidden: int) -> None:
        super().__init__()
        self.x, self.skip = nn.Linear(c_in, 6 * hidden), nn.Linear(c_in, hidden)
        self.left, self.right = nn.Linear(hidden, 6 * hidden), nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, c_in) and the children's states -> states."""
        i, o, f_l, f_r, u, r = (self.x(x) + self.left(left[0]) + self.right(right[0])).chunk(6, -1)
        c = i.sigmoid() * u.tanh() + f_l.sigmoid() * left[1] + f_r.sigmoid() * right[1]
        r = r.sigmoid()
        return r * o.sigmoid() * c.tanh() + (1 - r) * self.skip(x), c


def gathered(states: list[tuple[Tensor, Tensor]], index: Tensor) -> tuple[Tensor, Tensor]:
    """States of nodes ``index`` (B,) in a list of (B, hidden) pairs; -1 gives zeros."""
    if not states:
        raise ValueError("no states to choose from")
    there = (index >= 0).unsqueeze(-1)
    rows = torch.arange(len(index), device=index.device)
    at = index.clamp(0, len(states) - 1)
    h, c = (torch.stack([state[k] for state in states])[at, rows] * there for k in (0, 1))
    return h, c


class LabelDecoder(nn.Module):
    """Classes one after the other, each seeing class and state of its parent: the one before it, or a tree's."""

    def __init__(self, c_in: int, hidden: int, classes: int, embedding: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes + 2, embedding)  # the last one begins
        self.cell, self.out = HighwayCell(c_in + embedding, hidden), nn.Linear(hidden, classes + 1)

    def forward(self, x: Tensor, parent: Tensor, labels: Tensor | None) -> Tensor:
        """(B, N, c_in), (B, N) parent's place or -1, true classes (B, N) when training -> (B, N, C + 1)."""
        batch, many = x.shape[:2]
        zero = x.new_zeros(batch, self.cell.skip.out_features)
        begin = self.embed.num_embeddings - 1
        states, logits, chosen = [], [], []
        for k in range(many):  # a step needs the one before it, as in any recurrent network
            up = parent[:, k]
            h, c = gathered(states, up) if states else (zero, zero)
            before = torch.full_like(up, begin)
            if chosen:
                past = torch.stack(chosen, 1).gather(1, up.clamp(min=0).unsqueeze(1)).squeeze(1)
                before = torch.where(up >= 0, past, before)
            states.append(self.cell(torch.cat([x[:, k], self.embed(before)], -1), h, c))
            logits.append(self.out(states[-1][0]))
            guess = logits[-1][:, 1:].argmax(-1) + 1
            chosen.append(guess if labels is None else labels[:, k])
        return torch.stack(logits, 1)


class Describe(nn.Module):
    """What MOTIFS, VCTree and GPSNet know of an object: features, word of its class, position."""

    def __init__(self, words: Tensor, momentum: float) -> None:
        super().__init__()
        self.word = nn.Embedding.from_pretrained(words.clone(), freeze=False)
        self.position = nn.Sequential(
            nn.Linear(9, 32), nn.BatchNorm1d(32, momentum=momentum), nn.Linear(32, 128), nn.ReLU()
        )

    def forward(self, o: Objects, x: Tensor) -> Tensor:
        """(M, F) -> (M, F + words + 128)"""
        return torch.cat([x, self.word(o.labels), self.position(box_code(o.boxes, o.sizes))], 1)


def fixed_logits(labels: Tensor, classes: int) -> Tensor:
    """PredCls: +1000 for the true class and -1000 elsewhere."""
    return F.one_hot(labels, classes + 1).float() * 2000 - 1000


@dataclass
class Output:
    """Logits: (M, C + 1) of objects, (E, P + 1) of pairs, and further losses by name."""

    objects: Tensor
    relations: Tensor
    extra: dict[str, Tensor]


class Pairwise(nn.Module):
    """End of MOTIFS and VCTree: both ends' states, gated by the union's features."""

    def __init__(self, features: int, hidden: int, pooling: int, predicates: int, relu: bool) -> None:
        super().__init__()
        self.hidden, self.relu = hidden, relu
        self.post = nn.Linear(hidden, 2 * hidden)
        self.cat, self.up, self.out = (
            nn.Linear(2 * hidden, pooling),
            nn.Linear(features, pooling),
            nn.Linear(pooling, predicates + 1),
        )
        nn.init.normal_(self.post.weight, 0, 10 / hidden**0.5)
        nn.init.zeros_(self.post.bias)
        for layer in (self.cat, self.up, self.out):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, d: Tensor, union: Tensor, pairs: Tensor) -> Tensor:
        """(M, hidden), (E, F), (E, 2) -> (E, P + 1)"""
        x = self.post(d)
        x = F.relu(x) if self.relu else x
        head, tail = x.chunk(2, -1)
        # Linear([head, tail]) is the sum of two shares, each computed once an object and not once a pair
        first, second = self.cat.weight.chunk(2, 1)
        both = F.linear(head, first, self.cat.bias)[pairs[:, 0]] + F.linear(tail, second)[pairs[:, 1]]
        return self.out(both * self.up(union))


# ---- the four --------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Common arguments.

    Args:
        classes, predicates: C and P. features: width of object and pair features. words: (C + 1, W) word vectors.
        hidden, pooling: widths. predcls: labels are given. dropout: of the states. frequency: (C + 1, C + 1, P + 1)
        log-frequencies added to the logits (GPSNet: gated), or ``None``. momentum: of the batch norm on box codes.
    """

    def __init__(
        self,
        classes: int,
        predicates: int,
        features: int,
        words: Tensor,
        hidden: int = 512,
        pooling: int = 4096,
        predcls: bool = True,
        dropout: float = 0.2,
        frequency: Tensor | None = None,
        momentum: float = 0.001,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.classes, self.predicates, self.predcls = classes, predicates, predcls
        self.drop = nn.Dropout(dropout)
        self.register_buffer("frequency", frequency)

    def bias(self, o: Objects) -> Tensor | float:
        """(E, P + 1) log-frequencies of the pairs, 0 without a table."""
        return 0.0 if self.frequency is None else self.frequency[o.labels[o.pairs[:, 0]], o.labels[o.pairs[:, 1]]]


class IMP(Head):
    """Iterative message passing between objects and pairs; ``iterations`` = 0: pairs stand alone."""

    def __init__(self, *args: Any, iterations: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        features, hidden = args[2], kwargs.get("hidden", 512)
        self.iterations = iterations
        self.node_in, self.edge_in = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.node_gru, self.edge_gru = nn.GRUCell(hidden, hidden), nn.GRUCell(hidden, hidden)
        self.gates = nn.ModuleList([nn.Linear(2 * hidden, 1) for _ in range(4)])
        self.node_out = nn.Linear(hidden, self.classes + 1)
        self.edge_out = nn.Linear(hidden, self.predicates + 1)

    def forward(self, o: Objects) -> Output:
        """Logits of objects and pairs."""
        sub, obj = o.pairs.unbind(1)
        zero = o.features.new_zeros(())
        h = self.node_gru(self.node_in(o.features), zero.expand(len(o.features), self.node_in.out_features))
        e = self.edge_gru(F.relu(self.edge_in(o.union)), zero.expand(len(sub), self.node_in.out_features))
        for _ in range(self.iterations):
            g = [
                torch.sigmoid(gate(torch.cat([h[end], e], 1)))
                for gate, end in zip(self.gates, (sub, obj, sub, obj), strict=True)
            ]
            to_edge = g[0] * h[sub] + g[1] * h[obj]
            to_node = torch.zeros_like(h).index_add_(0, sub, g[2] * e).index_add_(0, obj, g[3] * e)
            h, e = self.node_gru(to_node, h), self.edge_gru(to_edge, e)  # old values on the right
        objects = fixed_logits(o.labels, self.classes) if self.predcls else self.node_out(h)
        return Output(objects, self.edge_out(e) + self.bias(o), {})


class MOTIFS(Head):
    """LSTMs over the objects from right to left, for their context and for that of their edges."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        features, words = args[2], args[3]
        hidden, pooling = kwargs.get("hidden", 512), kwargs.get("pooling", 4096)
        width = features + words.shape[1] + 128
        self.describe = Describe(words, self.momentum)
        self.objects = Sequences(width, hidden)
        self.decoder = None if self.predcls else LabelDecoder(width + hidden, hidden, self.classes, words.shape[1])
        self.word = nn.Embedding.from_pretrained(words.clone(), freeze=False)
        self.edges = Sequences(words.shape[1] + features + hidden, hidden)
        self.pairwise = Pairwise(features, hidden, pooling, self.predicates, relu=False)

    def forward(self, o: Objects, truth: Tensor | None = None) -> Output:
        """Logits; ``truth``: (M,) true classes, to teach the label decoder."""
        layout = Layout.of(o.image, o.boxes[:, 0] + o.boxes[:, 2])  # descending centre, as released
        x = self.describe(o, o.features)
        c = self.drop(self.objects(x, layout))
        if self.decoder is None:
            logits, labels = fixed_logits(o.labels, self.classes), o.labels
        else:
            parent = torch.arange(-1, int(layout.lengths.max()) - 1, device=x.device)
            taught = None if truth is None else layout.pad(truth)
            padded = layout.pad(torch.cat([x, c], 1))
            logits = layout.flat(self.decoder(padded, parent.expand(len(padded), -1), taught))
            labels = logits[:, 1:].argmax(1) + 1 if truth is None else truth
        d = self.drop(self.edges(torch.cat([self.word(labels), o.features, c], 1), layout))
        return Output(logits, self.pairwise(d, o.union, o.pairs) + self.bias(o), {})


@dataclass
class Tree:
    """Trees of a batch, nodes in the order in which they were attached.

    Attributes:
        order: (B, N) place of the k-th node. parent: (B, N) of the maximum spanning tree. left, right, above: (B, N)
        first child, next sibling and parent in the binary tree. All count nodes in the order of attachment; -1: none.
    """

    order: Tensor
    parent: Tensor
    left: Tensor
    right: Tensor
    above: Tensor


@torch.no_grad()
def spanning_trees(scores: Tensor, lengths: Tensor) -> Tree:
    """Prim's maximum spanning trees from the node of the best mean score, as left-child right-sibling binary trees.

    Args:
        scores: (B, N, N). lengths: (B,) nodes that are not padding.
    """
    batch, many = scores.shape[:2]
    rows = torch.arange(batch, device=scores.device)
    place = torch.arange(many, device=scores.device)
    there = place < lengths[:, None]
    both = there[:, :, None] & there[:, None]
    level = (scores * both).sum(2) / lengths.clamp(min=1)[:, None]
    node = level.masked_fill(~there, -torch.inf).argmax(1)
    outside, rank = there.clone(), torch.full_like(scores[:, 0], -1, dtype=torch.long)
    best = torch.full_like(scores[:, 0], -torch.inf)
    source = torch.full_like(rank, -1)
    order, parent = torch.full_like(rank, -1), torch.full_like(rank, -1)
    for k in range(many):  # all images at once, a node each
        live = k < lengths
        order[:, k] = torch.where(live, node, -1)
        up = source[rows, node]
        parent[:, k] = torch.where(live & (up >= 0), rank[rows, up.clamp(min=0)], -1)
        rank[rows, node] = torch.where(live, k, rank[rows, node])
        outside[rows, node] = False
        reach = scores[rows, node]
        nearer = (reach > best) & outside & live[:, None]
        best, source = torch.where(nearer, reach, best), torch.where(nearer, node[:, None], source)
        node = best.masked_fill(~outside, -torch.inf).argmax(1)
    child = (parent[:, None, :] == place[None, :, None]) & (parent[:, None, :] >= 0)  # [b, node, its child]
    left = torch.where(child.any(2), child.int().argmax(2), -1)
    alike = (parent[:, :, None] == parent[:, None]) & (parent[:, :, None] >= 0)
    later = alike & (place[None, :] > place[:, None])
    right = torch.where(later.any(2), later.int().argmax(2), -1)
    earlier = alike & (place[None, :] < place[:, None])
    sibling = many - 1 - earlier.flip(2).int().argmax(2)
    above = torch.where(earlier.any(2), sibling, parent)
    return Tree(order, parent, left, right, above)


class BiTreeLSTM(nn.Module):
    """From the leaves to the root and back down the binary tree; half of the width each way."""

    def __init__(self, c_in: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = UpwardCell(c_in, hidden // 2), HighwayCell(c_in, hidden // 2)

    def forward(self, x: Tensor, tree: Tree) -> Tensor:
        """(B, N, c_in) in the order of attachment -> (B, N, hidden)"""
        many = x.shape[1]
        zero = x.new_zeros(len(x), self.up.skip.out_features)
        up: list[tuple[Tensor, Tensor]] = []  # of nodes N-1, N-2, ...; children are attached after their parents
        for k in range(many - 1, -1, -1):
            children = [
                gathered(up, torch.where(one[:, k] >= 0, many - 1 - one[:, k], -1)) if up else (zero, zero)
                for one in (tree.left, tree.right)
            ]
            up.append(self.up(x[:, k], children[0], children[1]))
        down: list[tuple[Tensor, Tensor]] = []
        for k in range(many):
            h, c = gathered(down, tree.above[:, k]) if down else (zero, zero)
            down.append(self.down(x[:, k], h, c))
        upward = torch.stack([h for h, _ in up[::-1]], 1)
        return torch.cat([upward, torch.stack([h for h, _ in down], 1)], -1)


def overlaps(o: Objects) -> Tensor:
    """(M, 6): overlapping boxes, summed intersection / image, summed IoU, both divided by the first, area / image."""
    low = torch.maximum(o.boxes[:, None, :2], o.boxes[None, :, :2])
    high = torch.minimum(o.boxes[:, None, 2:], o.boxes[None, :, 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    area = (o.boxes[:, 2:] - o.boxes[:, :2]).clamp(min=0).prod(1)
    same = (o.image[:, None] == o.image[None]) & ~torch.eye(len(area), dtype=torch.bool, device=area.device)
    inner = inner * same
    iou = (inner / (area[:, None] + area[None] - inner).clamp(min=1e-6)).sum(1)
    picture = o.sizes.prod(1)
    many = (inner > 0).sum(1).to(area.dtype)
    per, shared = many.clamp(min=1), inner.sum(1) / picture
    return torch.stack([many, shared, iou, shared / per, iou / per, area / picture], 1)


class VCTree(Head):
    """MOTIFS with LSTMs over a tree of visual context in place of sequences."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        features, words = args[2], args[3]
        hidden, pooling = kwargs.get("hidden", 512), kwargs.get("pooling", 4096)
        width, quarter = features + words.shape[1] + 128, hidden // 4
        self.describe = Describe(words, self.momentum)
        self.quarters = nn.ModuleList([nn.Linear(n, quarter) for n in (features, words.shape[1], 9, 6)])
        self.mix = nn.Linear(4 * quarter, hidden)
        self.sub, self.obj, self.score = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(3 * hidden, 1)
        self.objects = BiTreeLSTM(width, hidden)
        self.decoder = None if self.predcls else LabelDecoder(width + hidden, hidden, self.classes, words.shape[1])
        self.word = nn.Embedding.from_pretrained(words.clone(), freeze=False)
        self.edges = BiTreeLSTM(words.shape[1] + features + hidden, hidden)
        self.pairwise = Pairwise(features, hidden, pooling, self.predicates, relu=True)

    def pair_logits(self, o: Objects, layout: Layout) -> Tensor:
        """(B, N, N) before the sigmoid: how much two objects have to do with each other."""
        parts = (o.features, self.describe.word(o.labels).detach(), box_code(o.boxes, o.sizes), overlaps(o))
        x = F.relu(self.mix(torch.cat([layer(part) for layer, part in zip(self.quarters, parts, strict=True)], 1)))
        sub, obj = layout.pad(F.relu(self.sub(x))), layout.pad(F.relu(self.obj(x)))
        first, second, third = self.score.weight.chunk(3, 1)  # Linear([s o, s, o]) without building the 3d vectors
        product = torch.einsum("bic,bjc->bij", sub * first, obj)
        return product + F.linear(sub, second) + F.linear(obj, third).transpose(1, 2) + self.score.bias

    def forward(self, o: Objects, truth: Tensor | None = None, related: Tensor | None = None) -> Output:
        """Logits; ``truth``: (M,) true classes. ``related``: (R, 2) rows that have a relation, for the tree's loss."""
        layout = Layout.of(o.image, torch.zeros_like(o.boxes[:, 0]))
        logits = self.pair_logits(o, layout)
        tree = spanning_trees(logits.sigmoid(), layout.lengths)
        image, rank = torch.where(tree.order >= 0)
        place = torch.zeros_like(tree.order).index_put((image, tree.order[image, rank]), rank)
        grown = Layout(o.image, place[layout.image, layout.place], layout.lengths)
        x = self.describe(o, o.features)
        c = self.drop(grown.flat(self.objects(grown.pad(x), tree)))
        if self.decoder is None:
            objects, labels = fixed_logits(o.labels, self.classes), o.labels
        else:
            taught = None if truth is None else grown.pad(truth)
            objects = grown.flat(self.decoder(grown.pad(torch.cat([x, c], 1)), tree.above, taught))
            labels = objects[:, 1:].argmax(1) + 1 if truth is None else truth
        padded = grown.pad(torch.cat([self.word(labels), o.features, c], 1))
        d = self.drop(grown.flat(self.edges(padded, tree)))
        extra = {}
        if related is not None:
            target = torch.zeros_like(logits)
            a, b = related.unbind(1)
            for i, j in ((a, b), (b, a)):
                target[layout.image[i], layout.place[i], layout.place[j]] = 1.0
            two = layout.image[o.pairs[:, 0]], layout.place[o.pairs[:, 0]], layout.place[o.pairs[:, 1]]
            extra["tree"] = F.binary_cross_entropy_with_logits(logits[two], target[two])
        return Output(objects, self.pairwise(d, o.union, o.pairs) + self.bias(o), extra)


class GPSNet(Head):
    """Direction-aware message passing and a relation that subtracts.

    ``unsampled``: weight before normalisation of pairs that are not in the list, sigmoid(0) = 0.5 as released.
    """

    def __init__(self, *args: Any, unsampled: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        features, words, hidden = args[2], args[3], kwargs.get("hidden", 512)
        self.unsampled = unsampled
        self.describe = Describe(words, self.momentum)
        self.project = nn.Linear(features + words.shape[1] + 128, features)
        self.ws, self.wo, self.wu = (nn.Linear(features, features) for _ in range(3))
        self.w = nn.Linear(features, 1)
        self.message = nn.Linear(features, features // 2)
        self.trans = nn.Sequential(
            nn.Linear(2 * (features // 2), features // 4),
            nn.LayerNorm(features // 4),
            nn.ReLU(),
            nn.Linear(features // 4, features),
        )
        self.node_out = nn.Linear(features, self.classes + 1)
        self.w1, self.w2, self.w3 = (nn.Linear(features, hidden) for _ in range(3))
        self.out = nn.Linear(hidden, self.predicates + 1)
        self.gate = nn.Linear(features, self.predicates + 1) if self.frequency is not None else None

    def attention(self, x: Tensor, o: Objects, layout: Layout) -> Tensor:
        """(B, N, N), rows sum to 1 where an image has two objects or more; the diagonal is 0."""
        sub, obj = o.pairs.unbind(1)
        coefficient = self.w(self.ws(x)[sub] * self.wo(x)[obj] * self.wu(o.union)).squeeze(1).sigmoid()
        many = int(layout.lengths.max())
        there = torch.arange(many, device=x.device) < layout.lengths[:, None]
        both = (there[:, :, None] & there[:, None]) & ~torch.eye(many, dtype=torch.bool, device=x.device)
        weights = both.to(x.dtype) * self.unsampled
        weights = weights.index_put((layout.image[sub], layout.place[sub], layout.place[obj]), coefficient)
        return weights / weights.sum(2, keepdim=True).clamp(min=1e-9)

    def forward(self, o: Objects) -> Output:
        """Logits of objects and pairs."""
        layout = Layout.of(o.image, torch.zeros_like(o.boxes[:, 0]))
        x = F.relu(self.project(self.describe(o, o.features)))
        a, t = self.attention(x, o, layout), layout.pad(F.relu(self.message(x)))
        context = layout.flat(torch.cat([a @ t, a.transpose(1, 2) @ t], -1))  # both directions
        x = self.drop(F.relu(x + self.trans(context)))
        sub, obj = o.pairs.unbind(1)
        ends = fusion(self.w1(x)[sub], self.w2(x)[obj])
        relations = self.out(fusion(ends, self.w3(o.union)))
        if self.gate is not None:
            relations = relations + self.gate(o.union).sigmoid() * self.bias(o).log_softmax(-1)
        objects = fixed_logits(o.labels, self.classes) if self.predcls else self.node_out(x)
        return Output(objects, relations, {})


def fusion(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b) - (a - b)^2"""
    return F.relu(a + b) - (a - b) ** 2


HEADS: dict[str, type[Head]] = {"imp": IMP, "motifs": MOTIFS, "vctree": VCTree, "gpsnet": GPSNet}


# ---- training and inference ------------------------------------------------------------------------------------------


def sample_pairs(labels: Tensor, image: Tensor, most: int, share: float, generator: torch.Generator) -> Tensor:
    """(E,) bool: pairs of each image that are trained on, positives first up to ``share`` of ``most``, rest background.

    Args:
        labels: (E,) predicates, 0 without a relation. image: (E,). most: pairs of an image. share: of positives.
    """
    noise = torch.rand(len(labels), generator=generator)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    positive = labels > 0
    limit = torch.full_like(image.bincount(minlength=int(image.max()) + 1), int(most * share))
    for kind in (positive, ~positive):
        score = torch.where(kind, noise, -1.0)
        place = Layout.of(image, score).place
        chosen |= kind & (place < limit[image])
        limit = most - torch.zeros_like(limit).index_add_(0, image, chosen.long())
    return chosen


def head_loss(out: Output, truth: Tensor, predicate: Tensor, chosen: Tensor, predcls: bool) -> dict[str, Tensor]:
    """Mean cross entropies of objects (M,) and of the chosen pairs (E,), and what the head adds."""
    terms = {"relation": F.cross_entropy(out.relations[chosen], predicate[chosen])} | out.extra
    if not predcls:
        terms["object"] = F.cross_entropy(out.objects, truth)
    return terms


@torch.no_grad()
def rank_pairs(relations: Tensor, o: Objects, labels: Tensor, image: int, top: int = 100) -> tuple[Tensor, ...]:
    """The best triplets of an image, one predicate a pair (graph constraint).

    Returns:
        pairs (K, 2) as rows of ``o``, predicates (K,), scores (K,): predicate's probability times both objects' scores.
    """
    rows = (o.image[o.pairs[:, 0]] == image).nonzero().squeeze(1)
    best, predicate = relations[rows].softmax(-1)[:, 1:].max(-1)
    pairs = o.pairs[rows]
    score = best * o.scores[pairs].prod(1)
    score, order = score.sort(descending=True, stable=True)
    order, score = order[:top], score[:top]
    return pairs[order], predicate[order] + 1, score


def word_vectors(names: Sequence[str], width: int, seed: int, table: dict[str, Tensor] | None = None) -> Tensor:
    """(C + 1, width): vectors of class names, row 0 for the background.

    With a table a name's own vector, else that of its longest word, else a random one; without a table all random.
    """
    out = torch.randn(len(names) + 1, width, generator=torch.Generator().manual_seed(seed))
    for i, name in enumerate(names if table else (), 1):
        words = [name, *sorted(name.replace("-", " ").split(), key=len, reverse=True)]
        known = next((word for word in words if word in table), None)
        if known is not None:
            out[i] = table[known]
    return out
