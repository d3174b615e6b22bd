"""Step sizes that change over training: a warm-up, then a schedule, both by the number of the step alone."""

import math
from collections.abc import Iterable

import torch

from lowvram.settings.common import AdamSettings


class StepSizes:
    """Sets the step size of optimizers to a share of its value: all of it is what each group of parameters has when
    this is made.

    The share grows linearly from 1 / n to 1 over the n steps of `warmup_kimg`, and then follows `schedule` to
    `final_lr` at the end of training. It depends on nothing but the step, so that a run resumes exactly.
    """

    def __init__(
        self, optimizers: Iterable[torch.optim.Optimizer], settings: AdamSettings, *, kimg: float, batch: int
    ) -> None:
        """kimg: the length of training. batch: images in a step, over all processes."""
        self._full = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        self._settings = settings
        self._warmup = round(settings.warmup_kimg * 1000 / batch)
        self._steps = math.ceil(kimg * 1000 / batch)
        self.set(0)

    def set(self, step: int) -> None:
        """For the step with this number, counted from 0."""
        share = self.share(step)
        for group, lr in self._full:
            group["lr"] = lr * share

    def share(self, step: int) -> float:
        """The share of the step size that a step takes, in (0, 1]; `final_lr` after the last."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        settings = self._settings
        rest = self._steps - self._warmup
        passed = min(1.0, (step - self._warmup) / rest) if rest > 0 else 1.0
        left = _left(passed, settings)
        return settings.final_lr + (1 - settings.final_lr) * left


def _left(passed: float, settings: AdamSettings) -> float:
    """How much of the way down to `final_lr` is left, 1 to 0, when this part of the time has passed."""
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - passed
        case "polynomial":
            return float((1 - passed) ** settings.power)
        case "cosine":  # arXiv 1608.03983, equation 5, with one period
            return (1 + math.cos(math.pi * passed)) / 2
        case "cosine_restarts" if passed < 1:  # the same with several of equal length
            return (1 + math.cos(math.pi * (passed * settings.cycles % 1))) / 2
        case _:
            return 0.0
