"""Found scenes for people and other programs: from above, as an animation, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shared import report
from shared.files import replacing
from shared.run import Run

from data import CELL, DT, STEPS
from model import corners, signed_distance


@dataclass(frozen=True)
class Shot:
    """A found scene as it is shown: boxes of actors (N, T + 1, 5), of the ego and its expert (T + 1, 5), the road."""

    name: str
    score: float
    boxes: Tensor
    present: Tensor
    chosen: list[int]
    ego: Tensor
    expert: Tensor
    road: Tensor
    corner: Tensor


def as_json(stack_name: str, shot: Shot) -> dict[str, Any]:
    """A found scene for other programs: x, y, heading of every box a tenth of a second, metres and radians."""

    def states(boxes: Tensor, present: Tensor | None = None) -> list[Any]:
        rows = [[round(value, 3) for value in row] for row in boxes[:, :3].tolist()]
        return (
            rows
            if present is None
            else [row if there else None for row, there in zip(rows, present.tolist(), strict=True)]
        )

    actors = [
        {
            "size": [round(v, 2) for v in boxes[0, 3:].tolist()],
            "perturbed": i in shot.chosen,
            "states": states(boxes, there),
        }
        for i, (boxes, there) in enumerate(zip(shot.boxes, shot.present, strict=True))
        if bool(there.any())
    ]
    ego = {
        "size": [round(v, 2) for v in shot.ego[0, 3:].tolist()],
        "driven": states(shot.ego),
        "expert": states(shot.expert),
    }
    return {
        "scene": shot.name,
        "stack": stack_name,
        "objective": round(shot.score, 3),
        "dt": DT,
        "ego": ego,
        "actors": actors,
    }


def paint(axis: Any, shot: Shot, step: int, span: float = 26.0) -> None:
    """One moment of a found scene from above."""
    from matplotlib.collections import PolyCollection

    side = len(shot.road) * CELL
    left, low = shot.corner.tolist()
    axis.imshow(
        shot.road.numpy(), origin="lower", extent=(left, left + side, low, low + side), cmap="Greys", vmin=0, vmax=5
    )
    there = shot.present[:, step]
    for i in there.nonzero()[:, 0].tolist():
        colour = report.COLOURS[1] if i in shot.chosen else "0.55"
        axis.add_collection(
            PolyCollection([corners(shot.boxes[i, step]).numpy()], facecolor=colour, edgecolor="white", lw=0.4)
        )
    for i in shot.chosen:
        axis.plot(*shot.boxes[i, : step + 1, :2].T.numpy(), color=report.COLOURS[1], lw=1)
    axis.plot(*shot.expert[:, :2].T.numpy(), color=report.COLOURS[2], lw=0.8, ls=":")
    axis.plot(*shot.ego[: step + 1, :2].T.numpy(), color=report.COLOURS[0], lw=1)
    axis.add_collection(
        PolyCollection([corners(shot.ego[step]).numpy()], facecolor=report.COLOURS[0], edgecolor="white", lw=0.4)
    )
    x, y = shot.ego[step, :2].tolist()
    axis.set(xlim=(x - span, x + span), ylim=(y - span, y + span), aspect="equal", xticks=[], yticks=[])
    axis.grid(False)
    axis.set_title(f"{shot.name}, {step * DT:.1f} s", fontsize=8)


def animate(run: Run, worst: Sequence[Shot], every: int = 2) -> None:
    """``worst.gif``: the worst scenes side by side, as long as a frame of it is 200 milliseconds."""
    from PIL import Image

    frames = []
    for step in range(0, STEPS + 1, every):
        figure, axes = report.figure(1, len(worst), width=2.4, height=2.6, squeeze=False)
        for axis, shot in zip(axes[0], worst, strict=True):
            paint(axis, shot, step)
        figure.set_dpi(80)
        figure.canvas.draw()
        frame = Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba()))
        frames.append(frame.convert("RGB").quantize(32, dither=Image.Dither.NONE))
    with replacing(run.folder / "worst.gif") as temporary:
        frames[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=every * 100,
            loop=0,
            optimize=True,
        )


def moment(shot: Shot) -> int:
    """The step at which the ego is nearest to a perturbed actor."""
    return int(signed_distance(shot.ego[None], shot.boxes[shot.chosen]).amin(0).argmin())
