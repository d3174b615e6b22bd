"""Settings of projected GANs, and the checks that span several of them."""

from dataclasses import dataclass

from lowvram.errors import LowVRAMError
from lowvram.settings.checks import at_least, divisor, near_multiple, one_of
from lowvram.settings.gan import (
    GanEmaSettings,
    GanMicroBatchSettings,
    GanOptimizerSettings,
    GanSettings,
    GeneratorSettings,
)

GENERATORS = ("stylegan2", "fastgan")


@dataclass(kw_only=True)
class ProjectedModelSettings(GeneratorSettings):
    """Shape of the generator. w_dim, mapping_layers and conv_clamp are StyleGAN2's alone."""

    generator: str

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("model.generator", self.generator, GENERATORS)


@dataclass(kw_only=True)
class ProjectionSettings:
    """The frozen network, its random projections, and the heads that judge them (arXiv 2111.01007, section 3)."""

    backbone: str
    backbone_weights: str | None
    size: int | None
    channels: int
    head_channels: int
    group: int
    pixels: int = 0

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
        at_least("projection.pixels", self.pixels, 0)
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
class ProjectedGanSettings(GanSettings):
    """A recipe with `task: projected_gan`; conf/task/projected_gan.yaml explains each setting."""

    model: ProjectedModelSettings
    projection: ProjectionSettings
    loss: ProjectedLossSettings
    optimizer: GanOptimizerSettings
    ema: GanEmaSettings
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
        pixels = self.projection.pixels
        if pixels and (pixels < 8 or self.resolution % pixels):
            raise LowVRAMError(
                f"projection.pixels={pixels} is not the resolution of {self.resolution}, or that halved to 8 at least.",
                f"Use projection.pixels={min(16, self.resolution)}, or 0 for no such head.",
            )

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
