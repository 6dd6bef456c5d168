"""Mini-batches as a pure function of the step, so that resuming sees the same data in the same order."""

from __future__ import annotations

import torch

from shared.seeds import derive_seed


class EpochSampler:
    """Indices of the mini-batch of each optimiser step; every sample once an epoch, in an order drawn anew each epoch.

    ``sampler[step]`` depends only on ``(n, batch, seed, step)``: there is no position to save and none to get wrong.

    Args:
        n: number of samples.
        batch: global batch size (over all processes).
        seed: seed of the order.
        drop_last: leave out an epoch's incomplete last batch.
        shuffle: ``False`` walks through the samples as they lie.

    Raises:
        ValueError: ``n`` or ``batch`` below 1, or no complete batch with ``drop_last``.
    """

    def __init__(self, n: int, batch: int, seed: int, drop_last: bool = False, shuffle: bool = True) -> None:
        if n < 1 or batch < 1:
            raise ValueError(f"a sampler needs at least one sample and a batch of at least 1, got {n} and {batch}")
        if drop_last and n < batch:
            raise ValueError(f"batch {batch} is larger than the {n} samples and incomplete batches are dropped")
        self.n, self.batch, self.seed, self.shuffle = n, batch, seed, shuffle
        self.steps_per_epoch = n // batch if drop_last else -(-n // batch)
        self._epoch = -1
        self._order = torch.arange(n)

    def __len__(self) -> int:
        """Steps in one epoch."""
        return self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that ``step`` lies in."""
        return step // self.steps_per_epoch

    def __getitem__(self, step: int) -> torch.Tensor:
        """Indices of the samples of ``step``, shape (batch,) or less at the end of an epoch, int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.shuffle and epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
            self._order, self._epoch = torch.randperm(self.n, generator=generator), epoch
        return self._order[position * self.batch : (position + 1) * self.batch]
