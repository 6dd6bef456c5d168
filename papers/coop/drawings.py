"""Generated pictures: simple drawings of things that ImageNet knows as photographs, in colour or as pencil sketches.

They stand for a data set of another domain than the one the image tower was trained on: it recognises some of them, and
what is common to all of them (flat colours, plain ground) is what a learnt context can adapt to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

CANVAS = 256
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


class Pen:
    """Draws on a transparent canvas in coordinates from -1 to 1, y upwards."""

    def __init__(self, draw: random.Random) -> None:
        self.random = draw
        self.image = Image.new("RGBA", (CANVAS, CANVAS))
        self.canvas = ImageDraw.Draw(self.image)

    def tint(self, colour: Colour, spread: int = 30) -> Colour:
        """A colour nearby."""
        return tuple(min(255, max(0, c + self.random.randint(-spread, spread))) for c in colour)  # type: ignore

    def _to(self, points: Points) -> list[tuple[float, float]]:
        return [((x + 1) * CANVAS / 2, (1 - y) * CANVAS / 2) for x, y in points]

    def polygon(self, points: Points, fill: Colour | None, edge: Colour = (30, 30, 30), width: int = 2) -> None:
        """A closed shape."""
        self.canvas.polygon(self._to(points), fill=fill, outline=edge, width=width)

    def line(self, points: Points, fill: Colour = (30, 30, 30), width: float = 3) -> None:
        """A line through points."""
        self.canvas.line(self._to(points), fill=fill, width=round(width), joint="curve")

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour | None,
        edge: Colour | None = (30, 30, 30),
        turn: float = 0.0,
    ) -> None:
        """An ellipse around (x, y), turned by an angle."""
        self.polygon(arc(x, y, rx, ry, 0, 360, turn), fill, edge or fill or (0, 0, 0))


def arc(x: float, y: float, rx: float, ry: float, begin: float, end: float, turn: float = 0.0) -> Points:
    """Points along an ellipse, angles in degrees, the ellipse turned by ``turn`` degrees."""
    t, out = math.radians(turn), []
    for i in range(41):
        a = math.radians(begin + (end - begin) * i / 40)
        u, v = rx * math.cos(a), ry * math.sin(a)
        out.append((x + u * math.cos(t) - v * math.sin(t), y + u * math.sin(t) + v * math.cos(t)))
    return out


def _shade(p: Pen, colour: Colour, x: float, y: float, r: float) -> None:
    """A ball: disks that get lighter towards the light."""
    for i in range(8):
        light: Colour = tuple(min(255, round(c * (0.72 + 0.05 * i))) for c in colour)  # type: ignore
        p.oval(x - 0.03 * i * r, y + 0.03 * i * r, r * (1 - i / 10), r * (1 - i / 10), light, light)


def ladybug(p: Pen) -> None:
    """A ladybug from above."""
    p.oval(0, 0.62, 0.32, 0.26, (20, 20, 20))
    for s in (-1, 1):
        p.line([(0.12 * s, 0.8), (0.3 * s, 0.98)], width=4)
        for y in (-0.4, 0.0, 0.35):
            p.line([(0.5 * s, y), (0.9 * s, y + p.random.uniform(-0.15, 0.1))], width=5)
    p.oval(0, -0.05, 0.66, 0.72, p.tint((205, 30, 25)))
    p.line([(0, 0.66), (0, -0.77)], width=5)
    for s in (-1, 1):
        for x, y in ((0.28, 0.35), (0.4, -0.1), (0.22, -0.45)):
            p.oval(s * x, y, 0.12, 0.13, (20, 20, 20))


def daisy(p: Pen) -> None:
    """A daisy on its stalk."""
    p.line([(0, 0), (p.random.uniform(-0.2, 0.2), -1)], (40, 120, 40), 9)
    count, start = p.random.randint(13, 19), p.random.uniform(0, 360)
    for i in range(count):
        a = start + 360 * i / count
        x, y = 0.48 * math.cos(math.radians(a)), 0.48 * math.sin(math.radians(a))
        p.oval(x, y, 0.34, 0.1, (250, 250, 248), (200, 200, 205), a)
    _shade(p, (245, 200, 30), 0, 0, 0.24)


def starfish(p: Pen) -> None:
    """A starfish with dots along its arms."""
    colour, deep = p.tint((215, 110, 50)), p.random.uniform(0.3, 0.4)
    corners = [(r * math.sin(math.pi * i / 5), r * math.cos(math.pi * i / 5)) for i, r in enumerate([0.95, deep] * 5)]
    p.polygon(corners, colour, (130, 60, 30), 6)
    for i in range(5):
        for k in range(1, 7):
            x, y = 0.12 * k * math.sin(2 * math.pi * i / 5), 0.12 * k * math.cos(2 * math.pi * i / 5)
            p.oval(x, y, 0.035, 0.035, (250, 200, 150), (180, 100, 60))


def mushroom(p: Pen) -> None:
    """A mushroom with a dotted cap."""
    p.polygon([(-0.2, 0.05), (0.2, 0.05), (0.28, -0.9), (-0.28, -0.9)], (240, 228, 205), (150, 130, 100), 3)
    p.oval(0, 0.0, 0.75, 0.14, (215, 190, 150), (140, 110, 80))
    p.polygon(
        arc(0, 0.0, 0.85, 0.75, 0, 180), p.tint(p.random.choice([(190, 40, 30), (150, 100, 60)])), (90, 50, 30), 3
    )
    for x, y in ((-0.45, 0.2), (-0.1, 0.45), (0.3, 0.28), (0.05, 0.15), (0.55, 0.12)):
        p.oval(x, y, 0.09, 0.07, (245, 238, 225), None)


def traffic_light(p: Pen) -> None:
    """A traffic light, one of its lamps lit."""
    p.polygon([(-0.06, -0.6), (0.06, -0.6), (0.06, -1), (-0.06, -1)], (70, 70, 70))
    p.polygon([(-0.36, 0.95), (0.36, 0.95), (0.36, -0.7), (-0.36, -0.7)], p.tint((35, 40, 38), 12), (10, 10, 10), 4)
    lit = p.random.randrange(3)
    for i, (on, off) in enumerate(
        (((255, 50, 40), (90, 25, 20)), ((255, 210, 50), (95, 80, 20)), ((60, 235, 110), (20, 80, 40)))
    ):
        p.oval(0, 0.62 - 0.52 * i, 0.23, 0.23, on if i == lit else off, (10, 10, 10))
        p.line(arc(0, 0.64 - 0.52 * i, 0.27, 0.25, 20, 160), (12, 12, 12), 7)


def analog_clock(p: Pen) -> None:
    """A clock that shows any time."""
    p.oval(0, 0, 0.95, 0.95, p.tint((90, 60, 40)))
    p.oval(0, 0, 0.82, 0.82, (248, 246, 238))
    for i in range(60):
        a, inner = math.pi * i / 30, 0.66 if i % 5 == 0 else 0.74
        ends = [(r * math.sin(a), r * math.cos(a)) for r in (inner, 0.79)]
        p.line(ends, width=5 if i % 5 == 0 else 1)
    for length, width in ((0.42, 7), (0.65, 5)):
        a = p.random.uniform(0, 6.3)
        p.line([(0, 0), (length * math.sin(a), length * math.cos(a))], width=width)
    p.oval(0, 0, 0.05, 0.05, (20, 20, 20))


def spider_web(p: Pen) -> None:
    """A web of threads around its middle."""
    light = p.tint((225, 228, 232), 15)
    angles = [math.pi * (i + p.random.uniform(-0.15, 0.15)) / 7 for i in range(14)]
    for a in angles:
        p.line([(0, 0), (1.3 * math.sin(a), 1.3 * math.cos(a))], light, 2)
    for k in range(1, 11):
        r = 0.1 * k
        ring = []
        for i, a in enumerate(angles):
            b = angles[(i + 1) % 14] + (2 * math.pi if i == 13 else 0)
            ring += [
                (r * math.sin(a), r * math.cos(a)),
                (0.9 * r * math.sin((a + b) / 2), 0.9 * r * math.cos((a + b) / 2)),
            ]
        p.line([*ring, ring[0]], light, 2)


def crossword(p: Pen) -> None:
    """A crossword puzzle, partly filled in."""
    n = p.random.randint(8, 12)
    step = 1.9 / n
    for i in range(n):
        for k in range(n):
            x, y = -0.95 + step * i, -0.95 + step * k
            dark = p.random.random() < 0.3
            box = [(x, y), (x + step, y), (x + step, y + step), (x, y + step)]
            p.polygon(box, (15, 15, 15) if dark else (250, 250, 248), (60, 60, 60), 2)
            if not dark and p.random.random() < 0.5:
                p.canvas.text(
                    p._to([(x + 0.3 * step, y + 0.85 * step)])[0], p.random.choice("AEIRSTNLO"), fill=(20, 20, 30)
                )


def honeycomb(p: Pen) -> None:
    """A honeycomb that fills the picture."""
    side = p.random.uniform(0.13, 0.2)
    for i in range(-8, 9):
        for k in range(-8, 9):
            x, y = side * math.sqrt(3) * (i + 0.5 * (k % 2)), 1.5 * side * k
            cell = [
                (x + 0.95 * side * math.sin(math.pi * j / 3), y + 0.95 * side * math.cos(math.pi * j / 3))
                for j in range(6)
            ]
            p.polygon(cell, p.tint((190, 125, 30), 40), (240, 190, 80), 4)
            p.oval(x, y, 0.5 * side, 0.5 * side, p.tint((120, 70, 15), 25), None)


def umbrella(p: Pen) -> None:
    """An open umbrella."""
    colours = p.random.choice(
        [((205, 40, 45), (205, 40, 45)), ((40, 70, 170), (240, 240, 240)), ((235, 190, 40), (200, 50, 50))]
    )
    p.line([(0, 0.1), (0, -0.75)], (90, 60, 40), 7)
    p.line(arc(-0.13, -0.75, 0.13, 0.17, 0, -180), (90, 60, 40), 7)
    for i in range(6):
        left, right = -0.95 + 1.9 * i / 6, -0.95 + 1.9 * (i + 1) / 6
        low = arc((left + right) / 2, 0.08, (right - left) / 2, 0.1, 180, 0)
        p.polygon(
            [(left, 0.08), *low, (right, 0.08), (right * 0.6, 0.62), (0, 0.85), (left * 0.6, 0.62)], colours[i % 2]
        )
    p.line([(0, 0.85), (0, 0.98)], width=5)


def balloon(p: Pen) -> None:
    """A hot-air balloon with its basket."""
    first, second = (
        p.tint(p.random.choice([(210, 40, 40), (50, 90, 200), (240, 190, 40), (60, 150, 70)])) for _ in range(2)
    )
    p.polygon([*arc(0, 0.28, 0.68, 0.68, -30, 210), (-0.16, -0.55), (0.16, -0.55)], first)
    for s in (-0.75, -0.25, 0.25, 0.75):
        width = 0.12
        sides = [(0.68 * (s - width) * math.cos(a), 0.28 + 0.67 * math.sin(a)) for a in (1.4, 0.9, 0.4, 0, -0.4)]
        back = [(0.68 * (s + width) * math.cos(a), 0.28 + 0.67 * math.sin(a)) for a in (-0.4, 0, 0.4, 0.9, 1.4)]
        p.polygon([*sides, (0.2 * s, -0.55), *back], second, second, 1)
    for s in (-1, 1):
        p.line([(0.14 * s, -0.55), (0.1 * s, -0.78)], width=2)
    p.polygon([(-0.12, -0.78), (0.12, -0.78), (0.1, -0.97), (-0.1, -0.97)], (150, 100, 50))


def basketball(p: Pen) -> None:
    """A basketball."""
    _shade(p, p.tint((225, 115, 45), 15), 0, 0, 0.88)
    p.oval(0, 0, 0.88, 0.88, None)
    p.line([(-0.88, 0), (0.88, 0)], width=5)
    p.line([(0, -0.88), (0, 0.88)], width=5)
    for s in (-1, 1):
        p.line(arc(s * 1.0, 0, 0.62, 0.75, 90 if s > 0 else -90, 270 if s > 0 else 90), width=5)


def soccer_ball(p: Pen) -> None:
    """A soccer ball."""
    _shade(p, (250, 250, 250), 0, 0, 0.88)
    p.oval(0, 0, 0.88, 0.88, None)

    def patch(x: float, y: float, r: float, turn: float) -> Points:
        return [
            (x + r * math.sin(turn + 2 * math.pi * i / 5), y + r * math.cos(turn + 2 * math.pi * i / 5))
            for i in range(5)
        ]

    p.polygon(patch(0, 0, 0.27, 0), (20, 20, 20))
    for i in range(5):
        a = 2 * math.pi * i / 5
        p.line([(0.27 * math.sin(a), 0.27 * math.cos(a)), (0.52 * math.sin(a), 0.52 * math.cos(a))], width=4)
        b = a + math.pi / 5
        p.line([(0.52 * math.sin(a), 0.52 * math.cos(a)), (0.6 * math.sin(b), 0.6 * math.cos(b))], width=4)
        p.line(
            [(0.52 * math.sin(a), 0.52 * math.cos(a)), (0.6 * math.sin(b - 1.257), 0.6 * math.cos(b - 1.257))], width=4
        )
        p.polygon(patch(0.7 * math.sin(b), 0.7 * math.cos(b), 0.16, b + math.pi), (20, 20, 20))


def tennis_ball(p: Pen) -> None:
    """A tennis ball."""
    _shade(p, p.tint((200, 225, 60), 12), 0, 0, 0.88)
    for s in (-1, 1):
        p.line(arc(s * 0.95, 0, 0.55, 0.75, 100 if s > 0 else -80, 260 if s > 0 else 80), (245, 245, 240), 10)


def envelope(p: Pen) -> None:
    """A closed envelope from behind."""
    colour = p.tint(p.random.choice([(240, 232, 210), (215, 180, 130), (245, 245, 245)]), 10)
    p.polygon([(-0.95, 0.6), (0.95, 0.6), (0.95, -0.6), (-0.95, -0.6)], colour, (110, 95, 80), 4)
    p.line([(-0.95, -0.6), (-0.1, 0.05)], (150, 130, 110), 3)
    p.line([(0.95, -0.6), (0.1, 0.05)], (150, 130, 110), 3)
    p.polygon([(-0.95, 0.6), (0, -0.1), (0.95, 0.6)], p.tint(colour, 8), (110, 95, 80), 3)


def zebra(p: Pen) -> None:
    """A zebra's stripes, close by."""
    p.polygon([(-1.3, -1.3), (1.3, -1.3), (1.3, 1.3), (-1.3, 1.3)], (240, 238, 230), (240, 238, 230))
    count, sway = p.random.randint(6, 9), p.random.uniform(0.05, 0.15)
    for i in range(-1, count + 1):
        x = -1 + 2 * (i + p.random.uniform(-0.15, 0.15)) / count
        wave = [(x + sway * math.sin(3 * t + i * 0.4), t) for t in (-1.2, -0.8, -0.4, 0, 0.4, 0.8, 1.2)]
        p.line(wave, (22, 20, 20), p.random.uniform(0.4, 0.6) * CANVAS / count)


THINGS: dict[str, Callable[[Pen], None]] = {
    thing.__name__.replace("_", " "): thing
    for thing in (
        *(ladybug, daisy, starfish, mushroom, traffic_light, analog_clock, spider_web, crossword),
        *(honeycomb, umbrella, balloon, basketball, soccer_ball, tennis_ball, envelope, zebra),
    )
}
STYLES = ("colour", "sketch")


def _ground(draw: random.Random) -> Image.Image:
    """A plain ground with a slope of brightness."""
    base, slope = np.array([draw.randint(50, 250) for _ in range(3)]), draw.uniform(-60, 60)
    rows = np.clip(base + np.linspace(-1, 1, CANVAS)[:, None, None] * slope, 0, 255)
    return Image.fromarray(np.broadcast_to(rows, (CANVAS, CANVAS, 3)).astype(np.uint8))


def _blurred(picture: Image.Image, draw: random.Random, few: int, side: int) -> np.ndarray:
    """The picture through ``few`` pixels, with noise, as (side, side, 3) uint8."""
    small = np.asarray(picture.resize((few, few), Image.Resampling.BOX)).astype(np.float64)
    noise = np.random.default_rng(draw.randrange(2**32)).normal(0, draw.uniform(5, 25), small.shape)
    rough = Image.fromarray(np.clip(small + noise, 0, 255).astype(np.uint8))
    return np.asarray(rough.resize((side, side), Image.Resampling.BICUBIC))


def render(name: str, draw: random.Random, side: int, style: str = "colour") -> np.ndarray:
    """A picture (side, side, 3) uint8 of a thing: turned, on a plain ground, blurred, with noise.

    Three in ten of the coloured ones have another hue. ``sketch`` keeps the edges, dark on white, and is less blurred.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}, expected one of {', '.join(STYLES)}")
    pen = Pen(draw)
    THINGS[name](pen)
    thing = pen.image.rotate(draw.uniform(-40, 40), resample=Image.Resampling.BICUBIC)
    size = round(CANVAS * draw.uniform(0.3, 0.9))
    thing = thing.resize((size, size), Image.Resampling.LANCZOS)
    picture = _ground(draw) if style == "colour" else Image.new("RGB", (CANVAS, CANVAS), (250, 250, 250))
    picture.paste(thing, tuple(draw.randint(0, CANVAS - size) for _ in range(2)), thing)
    few = draw.randint(40, 80)
    if style == "sketch":
        few *= 2
        edges = ImageOps.invert(picture.convert("L").filter(ImageFilter.FIND_EDGES)).filter(ImageFilter.MinFilter(3))
        picture = edges.crop((4, 4, CANVAS - 4, CANVAS - 4)).convert("RGB")  # the filter marks the border
        return _blurred(picture, draw, few, side)
    if draw.random() < 0.3:
        hue, saturation, value = picture.convert("HSV").split()
        turn = draw.randrange(256)
        picture = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
    return _blurred(picture, draw, few, side)


def make(style: str, part: str, count: int, side: int, seed: int = 0) -> tuple[list[np.ndarray], Tensor]:
    """``count`` pictures of each thing and labels (N,); a picture depends on seed, part and number only."""
    pictures = [
        render(name, random.Random(f"{seed}/{style}/{part}/{name}/{i}"), side, style)
        for name in THINGS
        for i in range(count)
    ]
    return pictures, torch.arange(len(THINGS)).repeat_interleave(count)
