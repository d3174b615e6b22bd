"""Settings that all generative adversarial networks share."""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lowvram.errors import LowVRAMError
from lowvram.settings.base import Settings
from lowvram.settings.checks import at_least, fraction, one_of

AUGMENT_MODES = ("none", "fixed", "ada")
PIPELINES = ("blit", "geom", "color", "filter", "noise", "cutout", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc", "diff")

Self = TypeVar("Self", bound="GanSettings")


@dataclass(kw_only=True)
class AugmentSettings:
    """Augmentation of what a discriminator sees (ADA, arXiv 2006.06676; "diff": arXiv 2006.10738)."""

    mode: str
    pipeline: str
    p: float
    target: float
    interval: int
    adjust_kimg: float

    def __post_init__(self) -> None:
        one_of("augment.mode", self.mode, AUGMENT_MODES)
        one_of("augment.pipeline", self.pipeline, PIPELINES)
        fraction("augment.p", self.p)
        fraction("augment.target", self.target)
        at_least("augment.interval", self.interval, 1)
        if self.adjust_kimg <= 0:
            raise LowVRAMError(f"augment.adjust_kimg={self.adjust_kimg} must be above 0.", "The paper uses 500.")


@dataclass(kw_only=True)
class GanMicroBatchSettings:
    """Images of one process in memory at a time, for each phase; None is the whole batch."""

    G: int | None
    D: int | None


@dataclass(kw_only=True)
class GanSettings(Settings):
    """What the recipes of GANs have beside their networks' shapes.

    model, optimizer and ema: each task's own.
    """

    model: Any
    optimizer: Any
    ema: Any
    augment: AugmentSettings

    def at_full_cost(self: Self) -> Self:
        """Augmentation that starts at p = 0 costs nothing at first; its cost comes when p has grown."""
        return replace(self, augment=replace(self.augment, p=self.augment.p or 0.5))
