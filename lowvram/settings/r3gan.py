"""Settings of R3GAN, and the checks that span several of them."""

from dataclasses import dataclass

from lowvram.errors import LowVRAMError
from lowvram.settings.checks import at_least, check_resolution, divisor, fraction
from lowvram.settings.common import AverageSettings
from lowvram.settings.gan import GanSettings


def check_stages(resolution: int, widths: list[int], blocks: list[int], groups: list[int], expansion: int) -> None:
    """Raise LowVRAMError unless there is one of each for every resolution from 4x4 on, and groups divide the widths."""
    check_resolution(resolution)
    at_least("model.expansion", expansion, 1)
    stages = resolution.bit_length() - 2
    for name, values in {"widths": widths, "blocks": blocks, "groups": groups}.items():
        if len(values) != stages:
            raise LowVRAMError(
                f"model.{name}={values} has {len(values)} numbers, and resolution={resolution} has {stages} stages, "
                f"4x4 to {resolution}x{resolution}.",
                f"Give {stages} numbers, that of 4x4 first.",
            )
        for value in values:
            at_least(f"model.{name}", value, 1)
    for width, count in zip(widths, groups, strict=True):
        if width * expansion % count:
            raise LowVRAMError(
                f"model.groups={groups}: {count} does not divide the {width * expansion} channels within a block "
                f"(model.widths={width} times model.expansion={expansion}).",
                f"Use {divisor(width * expansion, count)} there, or another width.",
            )


@dataclass(kw_only=True)
class R3GANModelSettings:
    """Shape of the networks (arXiv 2501.05441, section 4): widths, blocks and groups of each stage, 4x4 first."""

    z_dim: int
    embed_dim: int
    widths: list[int]
    blocks: list[int]
    groups: list[int]
    expansion: int
    num_fp16_res: int

    def __post_init__(self) -> None:
        for name in ("z_dim", "embed_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.num_fp16_res", self.num_fp16_res, 0)


@dataclass(kw_only=True)
class R3GANLossSettings:
    """The objective: relativistic logistic loss, R1 and R2 (arXiv 2501.05441, section 2)."""

    gamma: float
    penalty_every: int

    def __post_init__(self) -> None:
        _above_zero("loss.gamma", self.gamma, "Without the penalties this loss does not converge; see the recipe.")
        at_least("loss.penalty_every", self.penalty_every, 1)


@dataclass(kw_only=True)
class R3GANOptimizerSettings:
    """Adam, for the generator and the discriminator alike."""

    lr: float
    beta1: float
    beta2: float
    eps: float

    def __post_init__(self) -> None:
        _above_zero("optimizer.lr", self.lr, "A usual value is 0.0002.")
        _above_zero("optimizer.eps", self.eps, "A usual value is 1e-8.")
        for name in ("beta1", "beta2"):
            _beta(f"optimizer.{name}", getattr(self, name))


@dataclass(kw_only=True)
class ScheduleSettings:
    """What settings come to over the first `kimg` of training; None: they stay as they are."""

    kimg: float
    lr: float | None
    gamma: float | None
    beta2: float | None
    half_life_kimg: float | None
    augment_p: float | None

    def __post_init__(self) -> None:
        at_least("schedule.kimg", self.kimg, 0)
        for name in ("lr", "gamma"):
            if getattr(self, name) is not None:
                _above_zero(f"schedule.{name}", getattr(self, name), "Use null, and it stays as it is.")
        if self.beta2 is not None:
            _beta("schedule.beta2", self.beta2)
        if self.half_life_kimg is not None:
            at_least("schedule.half_life_kimg", self.half_life_kimg, 0)
        if self.augment_p is not None:
            fraction("schedule.augment_p", self.augment_p)


@dataclass(kw_only=True)
class R3GANMicroBatchSettings:
    """Images of one process in memory at a time, for each phase; None is the whole batch."""

    G: int | None
    D: int | None
    penalty: int | None


@dataclass(kw_only=True)
class R3GANSettings(GanSettings):
    """A recipe with `task: r3gan`; conf/task/r3gan.yaml explains each setting."""

    model: R3GANModelSettings
    loss: R3GANLossSettings
    optimizer: R3GANOptimizerSettings
    schedule: ScheduleSettings
    ema: AverageSettings
    micro_batch: R3GANMicroBatchSettings

    def __post_init__(self) -> None:
        model = self.model
        check_stages(self.resolution, model.widths, model.blocks, model.groups, model.expansion)
        super().__post_init__()

    def phase_names(self) -> list[str]:
        return [name for name in self.micro_batches() if name != "penalty" or self.loss.penalty_every > 1]


def _above_zero(name: str, value: float, remedy: str) -> None:
    if value <= 0:
        raise LowVRAMError(f"{name}={value} must be above 0.", remedy)


def _beta(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise LowVRAMError(f"{name}={value} must lie in [0, 1).", "Use beta1 = 0, and beta2 = 0.9 to 0.99.")
