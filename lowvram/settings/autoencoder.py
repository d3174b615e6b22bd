"""Settings of the KL autoencoder of latent diffusion."""

from dataclasses import dataclass, replace

from lowvram.errors import LowVRAMError
from lowvram.settings.base import Settings
from lowvram.settings.checks import at_least, one_of
from lowvram.settings.common import AdamSettings, AverageSettings, check_widths

PERCEPTUAL = ("efficientnet", "lpips", "none")


@dataclass(kw_only=True)
class AutoencoderModelSettings:
    """Shape of the autoencoder and of the discriminator that it is trained against."""

    channels: list[int]
    layers: int
    latent_channels: int
    norm_groups: int
    attention: bool
    discriminator_channels: int
    discriminator_layers: int

    def __post_init__(self) -> None:
        check_widths("model.channels", self.channels, self.norm_groups)
        for name in ("layers", "latent_channels", "norm_groups", "discriminator_channels", "discriminator_layers"):
            at_least(f"model.{name}", getattr(self, name), 1)


@dataclass(kw_only=True)
class AutoencoderLossSettings:
    """What a reconstruction is judged by (arXiv 2112.10752, section 3.1 and appendix G)."""

    perceptual: str
    perceptual_weight: float
    kl_weight: float
    adversarial_weight: float
    adversarial_start_kimg: float

    def __post_init__(self) -> None:
        one_of("loss.perceptual", self.perceptual, PERCEPTUAL)
        for name in ("perceptual_weight", "kl_weight", "adversarial_weight", "adversarial_start_kimg"):
            at_least(f"loss.{name}", getattr(self, name), 0)


@dataclass(kw_only=True)
class AutoencoderMicroBatchSettings:
    """Images of one process in memory at a time, for each phase; None is the whole batch."""

    autoencoder: int | None
    discriminator: int | None


@dataclass(kw_only=True)
class AutoencoderSettings(Settings):
    """A recipe with `task: autoencoder`; conf/task/autoencoder.yaml explains each setting."""

    model: AutoencoderModelSettings
    loss: AutoencoderLossSettings
    optimizer: AdamSettings
    ema: AverageSettings
    micro_batch: AutoencoderMicroBatchSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % self.factor:
            raise LowVRAMError(
                f"model.channels of {len(self.model.channels)} levels make latents {self.factor} times smaller, which "
                f"resolution={self.resolution} can't be.",
                "Use fewer levels.",
            )

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images, in width and height."""
        factor: int = 2 ** (len(self.model.channels) - 1)
        return factor

    def at_full_cost(self) -> "AutoencoderSettings":
        """The discriminator costs nothing before it joins in."""
        return replace(self, loss=replace(self.loss, adversarial_start_kimg=0))

    def phase_names(self) -> list[str]:
        return ["autoencoder", *(["discriminator"] if self.loss.adversarial_weight else [])]
