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
class GeneratorSettings:
    """Shape of a generator whose channels follow from the resolution, StyleGAN2's or like it."""

    z_dim: int
    w_dim: int
    mapping_layers: int
    channel_base: int
    channel_max: int
    num_fp16_res: int
    conv_clamp: float | None

    def __post_init__(self) -> None:
        for name in ("z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.num_fp16_res", self.num_fp16_res, 0)


@dataclass(kw_only=True)
class GanOptimizerSettings:
    """Adam, for the generator and the discriminator."""

    lr: float
    lr_d: float | None
    beta1: float
    beta2: float
    eps: float

    def __post_init__(self) -> None:
        for name, usual in (("lr", "0.0025"), ("eps", "1e-8"), ("lr_d", "0.0025, or null for that of lr")):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise LowVRAMError(f"optimizer.{name}={value} must be above 0.", f"Use {usual}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise LowVRAMError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).", "Use 0 and 0.99.")


@dataclass(kw_only=True)
class GanEmaSettings:
    """The averaged generator that samples are drawn from."""

    half_life_kimg: float
    rampup: float | None
    w_avg_beta: float

    def __post_init__(self) -> None:
        at_least("ema.half_life_kimg", self.half_life_kimg, 0)
        fraction("ema.w_avg_beta", self.w_avg_beta)


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
