"""A two-layer perceptron and a linear classifier: replace them by the paper's method and its baseline.

This file imports torch and field libraries only, so that it can be copied alone into another project.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Perceptron(nn.Module):
    """A perceptron with one hidden layer, the method (PAPER, sec. 3).

    Args:
        inputs: width of a sample. hidden: hidden units; 0 gives the linear baseline. classes: number of classes.

    Raises:
        ValueError: a width below its least value.
    """

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        if inputs < 1 or hidden < 0 or classes < 2:
            raise ValueError(f"expected inputs >= 1, hidden >= 0, classes >= 2, got {inputs}, {hidden}, {classes}")
        if hidden:
            self.net: nn.Module = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        else:
            self.net = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: (N, inputs).

        Returns:
            (N, classes) logits.
        """
        out: Tensor = self.net(x)  # eq. 1
        return out


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest logit is the label's; logits (N, C), labels (N,)."""
    return float((logits.argmax(1) == labels).to(torch.float64).mean())
