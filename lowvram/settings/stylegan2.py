"""Settings of StyleGAN2, and the checks that span several of them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from lowvram.errors import LowVRAMError
from lowvram.settings.checks import at_least, divisor, fraction, near_multiple, one_of
from lowvram.settings.gan import GanEmaSettings, GanOptimizerSettings, GanSettings, GeneratorSettings

PUBLISHED_MAPPING_LR = 0.01  # that published weights are stored for (arXiv 1812.04948, appendix C)
R1_KINDS = ("exact", "finite_difference")


@dataclass(kw_only=True)
class ModelSettings(GeneratorSettings):
    """Shape of the StyleGAN2 networks."""

    mbstd_group_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("model.mbstd_group_size", self.mbstd_group_size, 1)


@dataclass(kw_only=True)
class LossSettings:
    """The objective: logistic loss, lazy R1, lazy path length (arXiv 1912.04958)."""

    r1_gamma: float | None
    r1_every: int
    path_length_weight: float
    path_length_every: int
    path_length_batch_shrink: int
    path_length_decay: float
    style_mixing: float
    r1_kind: str = "exact"  # defaults, because runs from before these two settings have none in their recipe
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        for name in ("r1_every", "path_length_every"):
            at_least(f"loss.{name}", getattr(self, name), 0)
        at_least("loss.path_length_batch_shrink", self.path_length_batch_shrink, 1)
        at_least("loss.path_length_weight", self.path_length_weight, 0)
        fraction("loss.style_mixing", self.style_mixing)
        fraction("loss.path_length_decay", self.path_length_decay)
        if self.r1_gamma is not None:
            at_least("loss.r1_gamma", self.r1_gamma, 0)
        one_of("loss.r1_kind", self.r1_kind, R1_KINDS)
        if not 0 < self.r1_sigma <= 1:
            raise LowVRAMError(
                f"loss.r1_sigma={self.r1_sigma} must lie in (0, 1]: images lie in [-1, 1].", "A usual value is 0.01."
            )


@dataclass(kw_only=True)
class OptimizerSettings(GanOptimizerSettings):
    """Adam, for the generator and the discriminator.

    mapping_lr: of the mapping network, relative to the generator's other layers.
    """

    mapping_lr: float = PUBLISHED_MAPPING_LR  # run folders from before there was a choice mean this

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-6 <= self.mapping_lr <= 1:
            raise LowVRAMError(
                f"optimizer.mapping_lr={self.mapping_lr} must lie in [0.000001, 1].",
                "0.01 is usual; with less the mapping stays nearer to what it was, 0.0001 all but still.",
            )


@dataclass(kw_only=True)
class MicroBatchSettings:
    """Images of one process in memory at a time, for each phase; None is the whole batch."""

    G: int | None
    path_length: int | None
    D: int | None
    R1: int | None


@dataclass(kw_only=True)
class StyleGAN2Settings(GanSettings):
    """A recipe with `task: stylegan2`; conf/task/stylegan2.yaml explains each setting."""

    model: ModelSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    ema: GanEmaSettings
    micro_batch: MicroBatchSettings
    freeze_d: int = 0

    def __post_init__(self) -> None:
        at_least("freeze_d", self.freeze_d, 0)
        group = self.model.mbstd_group_size
        at_least("batch", self.batch, 1)
        if self.batch % group:
            raise LowVRAMError(
                f"batch={self.batch} must be a multiple of model.mbstd_group_size={group}.",
                f"Use batch={near_multiple(self.batch, group)}, "
                f"or model.mbstd_group_size={divisor(self.batch, group)}.",
            )
        shrink = self.loss.path_length_batch_shrink
        if self.batch // shrink < 1:
            raise LowVRAMError(
                f"loss.path_length_batch_shrink={shrink} leaves nothing of batch={self.batch}.",
                f"Use a value up to {self.batch}.",
            )
        super().__post_init__()

    def phase_names(self) -> list[str]:
        loss = self.loss
        used = {
            "path_length": loss.path_length_every and loss.path_length_weight,
            "R1": loss.r1_every and self.r1_gamma,
        }
        return [name for name in self.micro_batches() if used.get(name, True)]

    def phase_batch(self, phase: str) -> int:
        return self.batch // self.loss.path_length_batch_shrink if phase == "path_length" else self.batch

    def phase_group(self, phase: str) -> int:
        return 1 if phase == "path_length" else self.model.mbstd_group_size

    def _check_micro_batch(self, phase: str, micro: int | None) -> None:
        group = self.phase_group(phase)
        if micro is not None and 0 < micro < self.phase_batch(phase) and micro % group:
            raise LowVRAMError(
                f"micro_batch.{phase}={micro} must be a multiple of model.mbstd_group_size={group}, or the "
                "discriminator sees other groups than in the full batch.",
                f"Use {near_multiple(micro, group)}, or model.mbstd_group_size={divisor(micro, group)}.",
            )
        super()._check_micro_batch(phase, micro)

    @property
    def r1_gamma(self) -> float:
        """The R1 weight: as set, or the usual 0.0002 * resolution^2 / batch."""
        if self.loss.r1_gamma is not None:
            return self.loss.r1_gamma
        return 0.0002 * self.resolution**2 / self.batch

    def changed(self, allow: Collection[str]) -> Iterator[tuple["StyleGAN2Settings", tuple[str, ...]]]:
        settings: StyleGAN2Settings = self
        changes: tuple[str, ...] = ()
        for name in allow:
            loss = settings.loss
            if name == "pl_shrink":
                loss = replace(loss, path_length_batch_shrink=min(self.batch, 2 * loss.path_length_batch_shrink))
                said = f"loss.path_length_batch_shrink={loss.path_length_batch_shrink}"
            elif name == "fd_r1":
                loss = replace(loss, r1_kind="finite_difference")
                said = "loss.r1_kind=finite_difference"
            else:
                continue
            settings = replace(settings, loss=loss)
            changes = (*changes, said)
            yield settings, changes
