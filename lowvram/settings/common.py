"""Settings that the autoencoder and the denoisers share."""

from dataclasses import dataclass

from lowvram.errors import LowVRAMError
from lowvram.settings.checks import at_least, fraction, one_of

STEP_SCHEDULES = ("constant", "cosine", "linear", "polynomial", "cosine_restarts")


@dataclass(kw_only=True)
class AdamSettings:
    """AdamW, with the gradient's global norm bounded, and a step size that grows at first and then may fall.

    final_lr: share of lr that the schedule ends at. power: of the polynomial. cycles: of cosine_restarts.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float | None
    warmup_kimg: float
    schedule: str = "constant"  # run folders from before there were schedules mean this, here and below
    final_lr: float = 0.0
    power: float = 2.0
    cycles: int = 3

    def __post_init__(self) -> None:
        for name in ("lr", "eps", *(("clip_norm",) if self.clip_norm is not None else ())):
            if getattr(self, name) <= 0:
                raise LowVRAMError(f"optimizer.{name}={getattr(self, name)} must be above 0.", "A usual lr is 0.0001.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise LowVRAMError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).", "Use 0.9 and 0.99.")
        for name in ("weight_decay", "warmup_kimg"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        one_of("optimizer.schedule", self.schedule, STEP_SCHEDULES)
        fraction("optimizer.final_lr", self.final_lr)
        at_least("optimizer.cycles", self.cycles, 1)
        if self.power <= 0:
            raise LowVRAMError(f"optimizer.power={self.power} must be above 0.", "1 falls linearly; 2 is usual.")


@dataclass(kw_only=True)
class AverageSettings:
    """The averaged weights that samples are drawn from."""

    half_life_kimg: float
    rampup: float | None

    def __post_init__(self) -> None:
        at_least("ema.half_life_kimg", self.half_life_kimg, 0)
        if self.rampup is not None:
            at_least("ema.rampup", self.rampup, 0)


def check_widths(name: str, channels: list[int], groups: int) -> None:
    """Raise LowVRAMError unless there are channels, each a multiple of the groups that they are normalised in."""
    if not channels:
        raise LowVRAMError(f"{name}={channels} is empty.", f"Give a width for each level: {name}=[64,128].")
    for width in channels:
        if width < 1 or groups < 1 or width % groups:
            raise LowVRAMError(
                f"{name}={channels}: {width} is not a multiple of model.norm_groups={groups}.",
                "Use multiples of it, or fewer groups.",
            )
