"""Settings of projected GANs, and the checks that span several of them."""

from dataclasses import dataclass

from lowvram.errors import LowVRAMError
from lowvram.settings.checks import at_least, divisor, fraction, near_multiple, one_of
from lowvram.settings.gan import GanMicroBatchSettings, GanSettings

GENERATORS = ("stylegan2", "fastgan")


@dataclass(kw_only=True)
class ProjectedModelSettings:
    """Shape of the generator. w_dim, mapping_layers and conv_clamp are StyleGAN2's alone."""

    generator: str
    z_dim: int
    w_dim: int
    mapping_layers: int
    channel_base: int
    channel_max: int
    num_fp16_res: int
    conv_clamp: float | None

    def __post_init__(self) -> None:
        one_of("model.generator", self.generator, GENERATORS)
        for name in ("z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.num_fp16_res", self.num_fp16_res, 0)


@dataclass(kw_only=True)
class ProjectionSettings:
    """The frozen network, its random projections, and the heads that judge them (arXiv 2111.01007, section 3)."""

    backbone: str
    backbone_weights: str | None
    size: int | None
    channels: int
    head_channels: int
    group: int

    def __post_init__(self) -> None:
        if self.backbone_weights is not None and self.backbone.startswith("efficientnet_lite"):
            raise LowVRAMError(
                f"projection.backbone_weights={self.backbone_weights} is for backbones of timm, and "
                f"{self.backbone} has weights of its own.",
                "Leave it out, or name the network: projection.backbone=resnet18.",
            )
        at_least("projection.channels", self.channels, 8)
        at_least("projection.head_channels", self.head_channels, 8)
        at_least("projection.group", self.group, 0)
        if self.size is not None and (self.size < 32 or self.size % 32):
            low = max(32, self.size // 32 * 32)
            raise LowVRAMError(
                f"projection.size={self.size} must be a multiple of 32, for the backbone halves images five times.",
                f"Use {low} or {low + 32}.",
            )


@dataclass(kw_only=True)
class ProjectedLossSettings:
    """Beside the hinge loss, what pixels outside of [-1, 1] cost the generator."""

    range_weight: float

    def __post_init__(self) -> None:
        at_least("loss.range_weight", self.range_weight, 0)


@dataclass(kw_only=True)
class ProjectedOptimizerSettings:
    """Adam, for the generator and the heads."""

    lr: float
    lr_d: float | None
    beta1: float
    beta2: float
    eps: float

    def __post_init__(self) -> None:
        for name in ("lr", "eps") + (("lr_d",) if self.lr_d is not None else ()):
            if getattr(self, name) <= 0:
                raise LowVRAMError(f"optimizer.{name}={getattr(self, name)} must be above 0.", "A usual lr is 0.002.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise LowVRAMError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).", "Use 0 and 0.99.")


@dataclass(kw_only=True)
class ProjectedEmaSettings:
    """The averaged generator that samples are drawn from."""

    half_life_kimg: float
    rampup: float | None
    w_avg_beta: float

    def __post_init__(self) -> None:
        at_least("ema.half_life_kimg", self.half_life_kimg, 0)
        fraction("ema.w_avg_beta", self.w_avg_beta)


@dataclass(kw_only=True)
class ProjectedGanSettings(GanSettings):
    """A recipe with `task: projected_gan`; conf/task/projected_gan.yaml explains each setting."""

    model: ProjectedModelSettings
    projection: ProjectionSettings
    loss: ProjectedLossSettings
    optimizer: ProjectedOptimizerSettings
    ema: ProjectedEmaSettings
    micro_batch: GanMicroBatchSettings

    def __post_init__(self) -> None:
        at_least("batch", self.batch, 1)
        group = self.projection.group
        if group and self.batch % group:
            raise LowVRAMError(
                f"batch={self.batch} must be a multiple of projection.group={group}.",
                f"Use batch={near_multiple(self.batch, group)}, or projection.group={divisor(self.batch, group)}.",
            )
        alone = ("model.w_dim", "model.mapping_layers", "model.conv_clamp", "loss.range_weight", "ema.w_avg_beta")
        unused = [name for name in alone if name in self.overrides]
        if unused and self.model.generator == "fastgan":
            raise LowVRAMError(
                f"{unused[0]} is for StyleGAN2's generator, and model.generator=fastgan has no use for it.",
                f"Leave {unused[0]} out, or use model.generator=stylegan2.",
            )
        super().__post_init__()

    def phase_group(self, phase: str) -> int:
        return max(1, self.projection.group)

    def _check_micro_batch(self, phase: str, micro: int | None) -> None:
        group = self.phase_group(phase)
        if micro is not None and 0 < micro < self.batch and micro % group:
            raise LowVRAMError(
                f"micro_batch.{phase}={micro} must be a multiple of projection.group={group}, or the heads "
                "normalise other groups than in the full batch.",
                f"Use {near_multiple(micro, group)}, or projection.group={divisor(micro, group)}.",
            )
        super()._check_micro_batch(phase, micro)

    @property
    def feature_size(self) -> int:
        """Pixels a side that images are resized to for the backbone: as set, or 96 for images below 128, else 224."""
        if self.projection.size is not None:
            return self.projection.size
        return 224 if self.resolution >= 128 else 96
