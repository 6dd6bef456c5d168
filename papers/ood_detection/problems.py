"""The five problems of the survey as Task objects that answer its four questions, and the data of one instance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

QUESTIONS = (
    "Which shift is to be detected?",
    "How many ID classes are there?",
    "Must ID samples be classified?",
    "Is all data given at once?",
)
"""The questions that tell the problems apart (survey, fig. 2 and sec. 2)."""


@dataclass(frozen=True)
class Task:
    """A problem.

    Attributes:
        name: short name. title: the survey's. shift: "covariate" (P(X) changes and P(Y) does not), "semantic" (new
            classes) or "any". classes: "one", "several", or "majority" (of the given data). classify: ID samples must
            be classified. transductive: all data is given at once and there is no separate test set.
    """

    name: str
    title: str
    shift: str
    classes: str
    classify: bool
    transductive: bool

    def answers(self) -> tuple[str, str, str, str]:
        """To ``QUESTIONS``, in their order."""
        return (
            self.shift,
            self.classes,
            "yes" if self.classify else "no",
            "yes (transductive)" if self.transductive else "no (inductive)",
        )


TASKS = {
    task.name: task
    for task in (
        Task("sensory_ad", "sensory anomaly detection", "covariate", "one", False, False),
        Task("one_class_nd", "semantic AD, one-class novelty detection", "semantic", "one", False, False),
        Task("multi_class_nd", "multi-class novelty detection", "semantic", "several", False, False),
        Task("osr", "open set recognition", "semantic", "several", True, False),
        Task("ood", "out-of-distribution detection", "semantic", "several", True, False),
        Task("od", "outlier detection", "any", "majority", False, True),
    )
}


def taxonomy() -> str:
    """The tasks and their answers as a table."""
    header = ("task", "shift", "ID classes", "classifies", "transductive")
    rows = [header, *((task.title, *task.answers()) for task in TASKS.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


@dataclass(frozen=True)
class Problem:
    """Data of one instance of a task.

    Attributes:
        task: which. x, y: (N, ...) training samples and (N,) labels (``None`` where the task has none).
        test, test_y: ID test samples and labels. unknown: name -> OOD test samples; near, far: which of them are close
            to or far from ID. shifted: ID samples of the same classes under a covariate shift. outliers: OOD samples
            to train with. mark: transductive tasks: (N,) True for the outliers among x.

    Raises:
        ValueError: a part that the task does not allow, or one that it lacks.
    """

    task: Task
    x: Tensor
    y: Tensor | None = None
    test: Tensor | None = None
    test_y: Tensor | None = None
    unknown: Mapping[str, Tensor] = field(default_factory=dict)
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    shifted: Tensor | None = None
    outliers: Tensor | None = None
    mark: Tensor | None = None

    def __post_init__(self) -> None:
        name = self.task.name
        if self.task.transductive:
            if self.test is not None or self.unknown:
                raise ValueError(f"{name} is transductive: all data is given at once, a separate test set has no place")
            if self.mark is None or self.mark.all() or not self.mark.any():
                raise ValueError(f"{name} needs both: a mark of outliers and of inliers among the samples")
            return
        if self.test is None or not len(self.test) or not self.unknown:
            raise ValueError(f"{name} needs ID test samples and OOD test samples")
        empty = [key for key, value in self.unknown.items() if not len(value)]
        if empty:
            raise ValueError(f"{name}: no OOD samples in {', '.join(empty)}")
        if self.task.classify:
            if self.y is None or self.test_y is None:
                raise ValueError(f"{name} needs labels: ID samples are to be classified")
            absent = sorted(set(self.test_y.unique().tolist()) - set(self.y.unique().tolist()))
            if absent:
                raise ValueError(f"{name}: known classes without training samples: {absent}")
        if self.task.classes == "one" and self.y is not None:
            raise ValueError(f"{name} has one ID class and no labels")
        strange = sorted({*self.near, *self.far} - set(self.unknown))
        if strange:
            raise ValueError(f"{name}: no OOD samples called {', '.join(strange)}")


def split_classes(y: Tensor, known: list[int], unknown: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of known and of unknown classes, and the known rows' labels 0 .. len(known) - 1.

    Raises:
        ValueError: a class on both sides, or a known class without samples: they are listed.
    """
    both = sorted(set(known) & set(unknown))
    if both:
        raise ValueError(f"known and unknown classes overlap: {both}")
    absent = sorted(set(known) - set(y.unique().tolist()))
    if absent:
        raise ValueError(f"known classes without samples: {absent}")
    table = y.new_full((int(max(int(y.max()), *known, *unknown)) + 1,), -1)
    table[known] = y.new_tensor(range(len(known)))
    aside = y.new_zeros(len(table), dtype=y.dtype)
    aside[unknown] = 1
    inside = (table[y] >= 0).nonzero().flatten()
    return inside, (aside[y] == 1).nonzero().flatten(), table[y[inside]]
