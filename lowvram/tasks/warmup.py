"""A step size that grows over the first images."""

from collections.abc import Iterable

import torch


class Warmup:
    """Raises the step size of optimizers linearly from 1 / steps of its value to all of it over `kimg`."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], kimg: float, batch: int) -> None:
        self._full = [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
        self.steps = max(1, round(kimg * 1000 / batch))
        self.set(0)

    def set(self, step: int) -> None:
        """For the step with this number, counted from 0."""
        part = min(1.0, (step + 1) / self.steps)
        for optimizer, lr in self._full:
            for group in optimizer.param_groups:
                group["lr"] = lr * part
