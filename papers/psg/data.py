"""The PSG data set in its official layout, COCO panoptic images with relations by rule, and generated scenes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.errors import UserError

PREDICATES = (
    "over",
    "in front of",
    "beside",
    "on",
    "in",
    "attached to",
    "hanging from",
    "on back of",
    "falling off",
    "going down",
    "painted on",
    "walking on",
    "running on",
    "crossing",
    "standing on",
    "lying on",
    "sitting on",
    "flying over",
    "jumping over",
    "jumping from",
    "wearing",
    "holding",
    "carrying",
    "looking at",
    "guiding",
    "kissing",
    "eating",
    "drinking",
    "feeding",
    "biting",
    "catching",
    "picking",
    "playing with",
    "chasing",
    "climbing",
    "cleaning",
    "playing",
    "touching",
    "pushing",
    "pulling",
    "opening",
    "cooking",
    "talking to",
    "throwing",
    "slicing",
    "driving",
    "riding",
    "parked on",
    "driving on",
    "about to hit",
    "kicking",
    "swinging",
    "entering",
    "exiting",
    "enclosing",
    "leaning on",
)
"""The 56 predicates in the order of psg.json."""
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Picture:
    """An image with its scene graph.

    Attributes:
        name: for messages. image: (3, H, W) uint8. labels: (N,) classes from 0. masks: (N, H, W) bool, disjoint.
        relations: (R, 3) subject, object, predicate 1 .. P.
    """

    name: str
    image: Tensor
    labels: Tensor
    masks: Tensor
    relations: Tensor


def mask_boxes(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> (N, 4) x1, y1, x2, y2 with x2 and y2 beyond the last pixel; zeros for empty masks."""
    out = []
    for axis in (1, 2):
        line = masks.any(axis)  # over rows: columns, and the other way round
        size = line.shape[1]
        first, last = line.int().argmax(1), size - line.flip(1).int().argmax(1)
        out.append(torch.where(line.any(1)[:, None], torch.stack([first, last], 1), 0))
    (x, y) = out
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).float()


# ---- reading files ---------------------------------------------------------------------------------------------------


def read_json_file(path: Path) -> Any:
    """A json file.

    Raises:
        UserError: missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: no such file; name the folder that holds it with --data") from error
    except ValueError as error:
        raise UserError(f"{path} is not json: {error}") from error


def decode_panoptic(content: Any, where: str, size: tuple[int, int], segments: Sequence[int]) -> Tensor:
    """A panoptic PNG (R + 256 G + 65536 B) as masks in the order of ``segments``: (N, H, W) bool.

    Args:
        content: path or file object. size: (H, W) that the annotation states. segments: ids of segments_info.

    Raises:
        UserError: another mode or size, ids that segments_info lacks, or the reverse.
    """
    try:
        with Image.open(content) as image:
            if image.mode != "RGB":
                raise UserError(f"{where} has mode {image.mode}, expected RGB (segment id = R + 256 G + 65536 B)")
            if image.size != (size[1], size[0]):
                raise UserError(f"{where} is {image.size[0]} x {image.size[1]}, expected {size[1]} x {size[0]}")
            pixels = np.asarray(image, dtype=np.int64)
    except OSError as error:
        raise UserError(f"{where} cannot be read as a PNG, expected panoptic masks below --data") from error
    ids = torch.from_numpy(pixels @ np.array([1, 256, 65536]))
    wanted = torch.tensor(list(segments), dtype=torch.int64)
    there = ids.unique()
    there = there[there != 0]
    for name, left, right in (("absent from segments_info", there, wanted), ("absent from the PNG", wanted, there)):
        extra = left[~torch.isin(left, right)]
        if len(extra):
            raise UserError(f"{where}: segment id {int(extra[0])} is {name}")
    return ids[None] == wanted[:, None, None]


def decode_image(content: Any, where: str) -> Tensor:
    """A picture as (3, H, W) uint8.

    Raises:
        UserError: missing or malformed.
    """
    try:
        with Image.open(content) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except OSError as error:
        raise UserError(f"{where} is missing or no picture, expected COCO's images below --data") from error


# ---- PSG -------------------------------------------------------------------------------------------------------------


def check_record(record: dict[str, Any], predicates: int, classes: int) -> None:
    """Check one record of psg.json.

    Raises:
        UserError: names image_id and what is wrong.
    """
    try:
        where, segments = f"image_id {record['image_id']}", record["segments_info"]
        many = len(segments)
        for row in record["relations"]:
            subject, object_, predicate = row
            if not (0 <= subject < many and 0 <= object_ < many):
                raise UserError(f"{where}: relation {row} names a segment outside of 0 .. {many - 1}")
            if not 0 <= predicate < predicates:
                raise UserError(f"{where}: relation {row} has a predicate outside of 0 .. {predicates - 1}")
            if subject == object_:
                raise UserError(f"{where}: relation {row} is of a segment with itself")
        for segment in segments:
            if not 0 <= segment["category_id"] < classes:
                raise UserError(
                    f"{where}: segment {segment['id']} has category {segment['category_id']}, expected below {classes}"
                )
        _ = record["file_name"], record["pan_seg_file_name"], record["height"], record["width"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"image_id {record.get('image_id', '?')}: malformed record ({error!r})") from error


class PSG:
    """psg.json with COCO's images and panoptic PNGs.

    Below ``folder``: ``psg/psg.json`` (or ``psg.json``), and under ``coco/`` (or beside it) what file_name and
    pan_seg_file_name say. Segments keep the order of segments_info; predicates become 1 .. 56.

    Args:
        split: "train" or "test" (the images of test_image_ids). Images without a relation are left out.

    Raises:
        UserError: another file, a malformed record, an unknown test id, a split without relations.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.path = next((p for p in (folder / "psg" / "psg.json", folder / "psg.json") if p.is_file()), None)
        if self.path is None:
            raise UserError(f"{folder}: neither psg/psg.json nor psg.json there, expected the PSG annotations")
        table = read_json_file(self.path)
        keys = ("data", "thing_classes", "stuff_classes", "predicate_classes", "test_image_ids")
        lacking = [key for key in keys if not isinstance(table, dict) or key not in table]
        if lacking:
            raise UserError(f"{self.path} has no {lacking[0]!r}: not a PSG file")
        self.root = folder / "coco" if (folder / "coco").is_dir() else folder
        self.classes = [*table["thing_classes"], *table["stuff_classes"]]
        self.predicates = list(table["predicate_classes"])
        for record in table["data"]:
            check_record(record, len(self.predicates), len(self.classes))
        test = {str(number) for number in table["test_image_ids"]}
        unknown = test - {str(record["image_id"]) for record in table["data"]}
        if unknown:
            raise UserError(f"{self.path}: test_image_ids has {sorted(unknown)[0]}, which is not among the data")
        chosen = [record for record in table["data"] if (str(record["image_id"]) in test) == (split == "test")]
        self.found = len(chosen)
        self.records = [record for record in chosen if record["relations"]]
        if not self.records:
            raise UserError(f"{self.path}: the {split} split has no image with a relation")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Picture:
        """One image, read from disk."""
        record = self.records[index]
        paths = [self.root / record[key] for key in ("file_name", "pan_seg_file_name")]
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path} is missing, expected COCO's images and panoptic PNGs below --data")
        size = (int(record["height"]), int(record["width"]))
        ids = [segment["id"] for segment in record["segments_info"]]
        masks = decode_panoptic(paths[1], str(paths[1]), size, ids)
        labels = torch.tensor([segment["category_id"] for segment in record["segments_info"]])
        relations = torch.tensor(record["relations"]).view(-1, 3) + torch.tensor([0, 0, 1])
        image = decode_image(paths[0], str(paths[0]))
        if tuple(image.shape[1:]) != size:
            raise UserError(f"{paths[0]} is {tuple(image.shape[1:])}, expected {size} as its annotation states")
        return Picture(str(record["image_id"]), image, labels, masks, relations)

    def coco_id(self, index: int) -> int:
        """COCO's number of an image."""
        return int(self.records[index].get("coco_image_id") or Path(self.records[index]["file_name"]).stem)


# ---- COCO panoptic images, relations by rule -------------------------------------------------------------------------

RULES = ("over", "in front of", "beside", "on")
"""Predicates 1 .. 4 of the rules (all among PSG's)."""


def rule_relations(masks: Tensor, thing: Tensor) -> Tensor:
    """Relations that follow from the masks; they are geometric, and not PSG's annotations.

    Touching: the subject dilated by 2 pixels meets the object in at least 4. The first rule that applies counts.
    Thing and stuff: *on* when at least half of the rim of the subject's lowest quarter is the object, else
    *in front of* when 60 % of the whole rim is. Two things: *in front of*, *on*, *beside* by boxes; two stuffs: *over*,
    *beside*, *in front of* by centroids and boxes.

    Args:
        masks: (N, H, W) bool. thing: (N,) bool.

    Returns:
        (R, 3) subject, object, predicate 1 .. 4.
    """
    n, height, width = masks.shape
    if n < 2:
        return torch.zeros((0, 3), dtype=torch.long)
    m = masks.float()
    grown = F.max_pool2d(m[:, None], 5, 1, 2)[:, 0]
    rim = grown * (1 - m)
    x1, y1, x2, y2 = mask_boxes(masks).unbind(1)
    w, h = x2 - x1, y2 - y1
    rows = torch.arange(height)
    low = rim * (rows[None, :, None] >= (y2 - h / 4)[:, None, None])
    flat = m.flatten(1)
    touch = grown.flatten(1) @ flat.T >= 4
    lowest = (low.flatten(1) @ flat.T) / low.sum((1, 2)).clamp(min=1)[:, None]
    around = (rim.flatten(1) @ flat.T) / rim.sum((1, 2)).clamp(min=1)[:, None]
    area = flat.sum(1).clamp(min=1)
    centre = (m.sum(2) * rows).sum(1) / area

    def a(v: Tensor) -> Tensor:
        return v[:, None]

    across = (torch.minimum(a(x2), x2) - torch.maximum(a(x1), x1)).clamp(min=0)
    down = (torch.minimum(a(y2), y2) - torch.maximum(a(y1), y1)).clamp(min=0)
    across_share, down_share = across / torch.minimum(a(w), w), down / torch.minimum(a(h), h)
    inside = across * down / a(w * h)
    gap = torch.maximum(a(x1), x1) - torch.minimum(a(x2), x2)
    first = torch.arange(n)[:, None] < torch.arange(n)
    two_things, two_stuffs = a(thing) & thing, ~a(thing) & ~thing
    mixed = a(thing) & ~thing
    near = (across_share <= 0.1) & (gap <= 0.1 * width) & (down_share >= 0.5) & first
    level = ((a(centre) - centre).abs() <= 0.1 * height) & (across_share <= 0.4) & first
    smaller = (a(w * h) < 0.3 * (w * h)) & (inside >= 0.9)
    over, front, beside, on = 1, 2, 3, 4
    rules = (  # in the order in which they are tried
        (mixed & touch & (lowest >= 0.5), on),
        (mixed & touch & (around >= 0.6), front),
        (two_things & touch & (inside >= 0.5) & (a(y2) > y2 + 0.02 * height), front),
        (two_things & touch & (across_share >= 0.3) & (a(y2) <= y1 + 0.35 * h), on),
        (two_things & near, beside),
        (two_stuffs & touch & (centre - a(centre) > 0.2 * height) & (across_share >= 0.3), over),
        (two_stuffs & touch & level, beside),
        (two_stuffs & touch & smaller, front),
    )
    predicate = torch.zeros((n, n), dtype=torch.long)
    for holds, number in rules:
        predicate = torch.where((predicate == 0) & holds, number, predicate)
    predicate.fill_diagonal_(0)
    subject, object_ = predicate.nonzero(as_tuple=True)
    return torch.stack([subject, object_, predicate[subject, object_]], 1)


class Files:
    """A folder, or the tar file in it, read alike."""

    def __init__(self, folder: Path) -> None:
        archives = sorted(folder.glob("*.tar"))
        self.folder, self.tar = folder, None
        if not (folder / "annotations").is_dir():
            if len(archives) != 1:
                raise UserError(f"{folder}: neither annotations/ nor one .tar there, expected COCO panoptic files")
            try:
                self.tar = tarfile.open(archives[0])
                self.members = set(self.tar.getnames())
            except (OSError, tarfile.TarError) as error:
                raise UserError(f"{archives[0]} is not a tar file") from error

    def open(self, name: str) -> io.BytesIO:
        """The content of a file.

        Raises:
            UserError: not there.
        """
        if self.tar is None:
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing, expected COCO panoptic files below --data")
            return io.BytesIO(path.read_bytes())
        if name not in self.members:
            raise UserError(f"{self.folder}: the archive lacks {name}, expected COCO panoptic files")
        return io.BytesIO(self.tar.extractfile(name).read())  # type: ignore[union-attr]


class CocoPanoptic:
    """COCO's panoptic images (``annotations/panoptic_<split>2017.json``, ``panoptic_<split>2017/``, ``<split>2017/``).

    Segments that are no crowd and cover at least 0.2 % of the image; relations by ``rule_relations``.

    Args:
        split: "train" or "test" (COCO's val).
    """

    predicates = RULES

    def __init__(self, folder: Path, split: str) -> None:
        self.files, self.name = Files(folder), f"{'train' if split == 'train' else 'val'}2017"
        try:
            table = json.load(self.files.open(f"annotations/panoptic_{self.name}.json"))
            self.categories = table["categories"]
            self.index = {row["id"]: i for i, row in enumerate(self.categories)}
            self.thing = torch.tensor([bool(row["isthing"]) for row in self.categories])
            self.classes = [row["name"] for row in self.categories]
            images = {row["id"]: row for row in table["images"]}
            self.rows = [(images[row["image_id"]], row) for row in table["annotations"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: panoptic_{self.name}.json is not COCO panoptic json ({error!r})") from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Picture:
        """One image with its relations."""
        info, row = self.rows[number]
        segments, where = row["segments_info"], f"panoptic_{self.name}/{row['file_name']}"
        size = (info["height"], info["width"])
        masks = decode_panoptic(self.files.open(where), where, size, [segment["id"] for segment in segments])
        where = f"{self.name}/{info['file_name']}"
        image = decode_image(self.files.open(where), where)
        crowd = torch.tensor([bool(segment["iscrowd"]) for segment in segments])
        keep = ~crowd & (masks.sum((1, 2)) >= 0.002 * size[0] * size[1])
        labels = torch.tensor([self.index[segment["category_id"]] for segment in segments])[keep]
        masks = masks[keep]
        relations = rule_relations(masks, self.thing[labels])
        return Picture(info["file_name"], image, labels, masks, relations)

    def coco_id(self, index: int) -> int:
        """COCO's number of an image."""
        return int(self.rows[index][0]["id"])


# ---- generated scenes ------------------------------------------------------------------------------------------------

SCENE_CLASSES = ("red disc", "red square", "blue disc", "blue square", "green disc", "green square")
SCENE_STUFF = ("sky", "wall", "grass", "sand")
SCENE_PREDICATES = ("over", "on", "beside", "touching")
SCENE_THINGS = 4


class Scenes:
    """Generated scenes whose relations are decided by geometry.

    An upper and a lower band (stuff), and two to four things, plain discs and striped squares, that fly above the lower
    band or stand on it. Relations:
    *over*, the upper band and every flying thing over the lower band; *on*, a thing that stands on the lower band;
    *touching*, two things that meet (the larger one is the subject); *beside*, a thing and the nearest other one, where
    that is at its height, close and not touching. Which thing is nearest depends on all of them. Classes say nothing
    about which of two predicates holds.

    Args:
        count: scenes. seed: of the generator. side: pixels.
    """

    classes = (*SCENE_CLASSES, *SCENE_STUFF)
    predicates = SCENE_PREDICATES

    def __init__(self, count: int, seed: int, side: int = 64) -> None:
        g = np.random.default_rng(seed)
        s, slots = side, SCENE_THINGS
        self.thing = torch.arange(len(self.classes)) < len(SCENE_CLASSES)
        grid = np.arange(s)
        y, x = grid[None, :, None], grid[None, None, :]
        horizon = g.integers(int(0.45 * s), int(0.65 * s), count)
        upper, lower = g.integers(6, 8, count), g.integers(8, 10, count)
        ids = np.where(y < horizon[:, None, None], 0, 1) * np.ones((1, 1, s), dtype=np.int64)
        things = g.integers(2, slots + 1, count)
        kinds = g.integers(0, 6, (count, slots))
        radius = g.integers(int(0.1 * s), int(0.16 * s), (count, slots))
        flies = g.random((count, slots)) < 0.5
        cx = g.integers(int(0.1 * s), int(0.9 * s), (count, slots))
        close = g.random((count, slots)) < 0.25
        gap = g.integers(2, int(0.2 * s), (count, slots))
        low = np.minimum(horizon[:, None] + g.integers(2, int(0.2 * s), (count, slots)), s - 2)
        high = np.maximum(horizon[:, None] - g.integers(3, int(0.2 * s), (count, slots)), 2 * radius + 1)
        high = np.minimum(high, horizon[:, None] - 2)
        for k in range(1, slots):  # a neighbour of the one before, at its height
            flies[:, k] = np.where(close[:, k], flies[:, k - 1], flies[:, k])
            beside = cx[:, k - 1] + (radius[:, k - 1] + radius[:, k] + gap[:, k]) * np.where(
                cx[:, k - 1] < s // 2, 1, -1
            )
            cx[:, k] = np.where(close[:, k], np.clip(beside, 3, s - 4), cx[:, k])
            for line in (low, high):
                line[:, k] = np.where(close[:, k], line[:, k - 1], line[:, k])
        bottom = np.where(flies, high, low)
        for k in range(slots):
            r, middle = radius[:, k, None, None], (bottom[:, k] - radius[:, k])[:, None, None]
            dx, dy = np.abs(x - cx[:, k, None, None]), np.abs(y - middle)
            disc = dx**2 + dy**2 <= r**2
            shape = np.where((kinds[:, k] % 2 == 0)[:, None, None], disc, (dx <= r * 0.9) & (dy <= r * 0.9))
            there = shape & (k < things)[:, None, None]
            ids = np.where(there, k + 2, ids)
        colours = np.array(
            [[200, 60, 60], [200, 60, 60], [60, 60, 200], [60, 60, 200], [50, 170, 60], [50, 170, 60]]
            + [[150, 190, 220], [170, 150, 140], [130, 160, 60], [210, 190, 120]]
        )
        table = np.concatenate([upper[:, None], lower[:, None], kinds], 1)
        of_pixel = np.take_along_axis(table, ids.reshape(count, -1), 1).reshape(ids.shape)
        striped = (of_pixel < len(SCENE_CLASSES)) & (of_pixel % 2 == 1) & (y // 2 % 2 == 0)
        shade = np.where(striped, 0.55, 1.0)[..., None]
        image = colours[of_pixel] * shade + g.normal(0, 12, (*ids.shape, 3)) + g.normal(0, 15, (count, 1, 1, 3))
        self.images = torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        ids_t = torch.from_numpy(ids)
        self._masks = torch.stack([ids_t == k for k in range(slots + 2)], 1)
        self._labels, self._flies = torch.from_numpy(table), torch.from_numpy(flies)
        self._alive = self._masks.sum((2, 3)) >= 0.008 * s * s
        self._related = self._relations()

    def _relations(self) -> Tensor:
        """(count, slots + 2, slots + 2) predicate of each ordered pair, 0 for none."""
        masks, alive = self._masks, self._alive
        n, k, s, _ = masks.shape
        out = torch.zeros((n, k, k), dtype=torch.long)
        flat = masks.flatten(2).float()
        grown = F.max_pool2d(masks.float(), 3, 1, 1).flatten(2)
        boxes = mask_boxes(masks.flatten(0, 1)).view(n, k, 4)
        both = alive[:, :, None] & alive[:, None]
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2
        thing = torch.arange(k) >= 2
        pair = thing[:, None] & thing & ~torch.eye(k, dtype=torch.bool) & both
        area = flat.sum(2) - 0.5 * torch.arange(k) / k  # of two equal ones the first
        larger = area[:, :, None] > area[:, None]
        touch = ((grown @ flat.transpose(1, 2)) >= 3) & pair
        low = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
        down = (low - torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2]))[..., 1]
        gap = -(low - torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2]))[..., 0]
        tall = boxes[..., 3] - boxes[..., 1]
        level = down >= 0.5 * torch.minimum(tall[:, :, None], tall[:, None])
        distance = (centre[:, :, None] - centre[:, None]).square().sum(-1).masked_fill(~pair, torch.inf)
        nearest = F.one_hot(distance.argmin(2), k).bool() & pair
        out[nearest & level & (gap <= 0.25 * s) & ~touch] = 3
        out[touch & larger] = 4
        out[:, 2:, 1] = torch.where(self._flies, 1, 2) * both[:, 2:, 1]
        out[:, 0, 1] = 1 * both[:, 0, 1]
        return out

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Picture:
        """One scene."""
        alive = self._alive[index]
        place = alive.cumsum(0) - 1
        subject, object_ = self._related[index].nonzero(as_tuple=True)
        relations = torch.stack([place[subject], place[object_], self._related[index][subject, object_]], 1)
        return Picture(
            f"scene {index}", self.images[index], self._labels[index][alive], self._masks[index][alive], relations
        )


# ---- segments that a model found -------------------------------------------------------------------------------------

_NO_THING = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_STUFF = (92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151)
_STUFF += (154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181)
COCO_IDS = (*(i for i in range(1, 91) if i not in _NO_THING), *_STUFF, *range(184, 201))
"""COCO's numbers of the 133 panoptic categories, in their order, which is PSG's."""


@dataclass
class Segments:
    """What is detected in an image.

    Attributes:
        labels: (N,) classes from 0. scores: (N,) mean probability. masks: (N, H, W) bool, disjoint.
    """

    labels: Tensor
    scores: Tensor
    masks: Tensor


class PanopticResults:
    """A panoptic model's results in COCO's format, for graphs of what was detected (SGDet).

    A json whose ``annotations`` have ``image_id``, ``file_name`` and ``segments_info`` (``id``, ``category_id`` of COCO
    and, where the model gives one, ``score``), and the PNGs in the folder that has the json's name without its ending.

    Args:
        path: of the json.

    Raises:
        UserError: missing or malformed.
    """

    def __init__(self, path: Path) -> None:
        table, self.path = read_json_file(path), path
        index = {number: i for i, number in enumerate(COCO_IDS)}
        self.rows: dict[int, tuple[str, list[tuple[int, int, float]]]] = {}
        try:
            for row in table["annotations"]:
                parts = [
                    (int(part["id"]), index[part["category_id"]], float(part.get("score", 1.0)))
                    for part in row["segments_info"]
                ]
                self.rows[int(row["image_id"])] = (row["file_name"], parts)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no json of COCO panoptic results ({error!r})") from error

    def find(self, image_id: int, size: tuple[int, int]) -> Segments:
        """Segments of the image with this COCO number, (H, W) large.

        Raises:
            UserError: no results for it, or a PNG that does not fit.
        """
        if image_id not in self.rows:
            raise UserError(f"{self.path} has no results for image {image_id}, expected one row for every image")
        name, parts = self.rows[image_id]
        where = self.path.with_suffix("") / name
        masks = decode_panoptic(where, str(where), size, [number for number, _, _ in parts])
        labels = torch.tensor([label for _, label, _ in parts], dtype=torch.long)
        return Segments(labels, torch.tensor([score for _, _, score in parts]), masks)


def match_segments(found: Segments, picture: Picture) -> tuple[Tensor, Tensor]:
    """What found segments are in truth: of the true one of their class with the best box IoU above one half.

    Returns:
        (M,) classes from 1, 0 for those without a true one; (R, 3) relations among found segments, one for every pair
        of segments that has the ends of a true relation.
    """
    from torchvision.ops import box_iou

    iou = box_iou(mask_boxes(found.masks), mask_boxes(picture.masks)) * (found.labels[:, None] == picture.labels)
    iou = F.pad(iou, (0, 1))  # a last column that nothing overlaps, so that there is one
    best, owner = iou.max(1)
    owner = torch.where(best > 0.5, owner, -1)
    ends = [owner[:, None] == picture.relations[:, end] for end in (0, 1)]
    a, b, r = (ends[0][:, None] & ends[1][None]).nonzero(as_tuple=True)
    return torch.where(owner >= 0, found.labels + 1, 0), torch.stack([a, b, picture.relations[r, 2]], 1)


# ---- preparation -----------------------------------------------------------------------------------------------------


def normalised(image: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> float, ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (image.float() / 255 - mean) / std


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) bool -> (N, *size), by nearest neighbour."""
    return F.interpolate(masks[None].float(), size, mode="nearest")[0] > 0.5


def resize_to(picture: Picture, size: tuple[int, int]) -> Picture:
    """Resized to (H, W); masks by nearest neighbour."""
    image = F.interpolate(picture.image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
    masks = resize_masks(picture.masks, size)
    return Picture(picture.name, image[0].round().clamp(0, 255).byte(), picture.labels, masks, picture.relations)


def short_side(size: tuple[int, int], side: int, longest: int = 1333) -> tuple[int, int]:
    """Size with this shorter side, the longer one at most ``longest``."""
    scale = min(side / min(size), longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def flip(picture: Picture) -> Picture:
    """Mirrored from left to right."""
    image, masks = picture.image.flip(2), picture.masks.flip(2)
    return Picture(picture.name, image, picture.labels, masks, picture.relations)


def without_segments(picture: Picture, keep: Tensor) -> Picture:
    """Only the segments of ``keep`` (N,) bool, and the relations among them."""
    place = keep.cumsum(0) - 1
    ends = picture.relations[:, :2]
    kept = picture.relations[keep[ends].all(1)]
    relations = torch.cat([place[kept[:, :2]], kept[:, 2:]], 1)
    return Picture(picture.name, picture.image, picture.labels[keep], picture.masks[keep], relations)


def augment(picture: Picture, generator: torch.Generator) -> Picture:
    """DETR's: flip; shorter side to 480 .. 800, in half of the cases after a crop that keeps a relation."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    if draw(2):
        picture = flip(picture)
    side = 480 + 32 * draw(11)
    if draw(2):
        resized = resize_to(picture, short_side(tuple(picture.image.shape[1:]), (400, 500, 600)[draw(3)]))
        height, width = resized.image.shape[1:]
        for _ in range(10):  # tries, until one keeps a relation
            h, w = (min(384 + draw(217), n) for n in (height, width))
            top, left = draw(height - h + 1), draw(width - w + 1)
            rows, columns = slice(top, top + h), slice(left, left + w)
            cut = Picture(
                picture.name, resized.image[:, rows, columns], resized.labels, resized.masks[:, rows, columns],
                resized.relations,
            )  # fmt: skip
            cut = without_segments(cut, cut.masks.any((1, 2)))
            if len(cut.relations):
                picture = cut
                break
    return resize_to(picture, short_side(tuple(picture.image.shape[1:]), side))


def one_predicate(relations: Tensor, generator: torch.Generator) -> Tensor:
    """One random predicate of each ordered pair that has several."""
    order = torch.randperm(len(relations), generator=generator)
    shuffled = relations[order]
    key = shuffled[:, 0] * 100_000 + shuffled[:, 1]
    sorted_key, place = key.sort(stable=True)
    first = torch.ones_like(sorted_key, dtype=torch.bool)
    first[1:] = sorted_key[1:] != sorted_key[:-1]
    return shuffled[place[first]]


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_psg(folder: Path | None) -> list[str]:
    """What ``--check-data`` says of PSG."""
    if folder is None:
        raise UserError("--check-data of psg needs --data DIR with psg/psg.json and coco/")
    lines = []
    for split, expected in (("train", 46_572), ("test", 2_177)):
        part = PSG(folder, split)
        names = [record[key] for record in part.records for key in ("file_name", "pan_seg_file_name")]
        missing = [name for name in names if not (part.root / name).is_file()]
        lines.append(
            f"{split}: {part.found} images (expected {expected}), {len(part)} with relations, "
            f"{sum(len(record['relations']) for record in part.records)} relations, {len(missing)} files missing"
            + (f", the first is {part.root / missing[0]}" if missing else "")
        )
    part[0]
    return [
        *lines,
        f"{len(part.classes)} object classes (expected 133), {len(part.predicates)} predicates (expected 56)",
    ]


def check_coco(folder: Path | None) -> list[str]:
    """What ``--check-data`` says of COCO panoptic images; reads every one."""
    if folder is None:
        raise UserError("--check-data of coco needs --data DIR with annotations/panoptic_train2017.json")
    lines = []
    for split in ("train", "test"):
        part = CocoPanoptic(folder, split)
        pictures = [part[i] for i in range(len(part))]
        predicates = torch.cat([picture.relations[:, 2] for picture in pictures]).bincount(minlength=5)[1:].tolist()
        counts = ", ".join(f"{name} {count}" for name, count in zip(RULES, predicates, strict=True))
        lines.append(
            f"{part.name}: {len(part)} images, {sum(len(p.labels) for p in pictures)} segments, "
            f"relations by rule: {counts}"
        )
    return lines
