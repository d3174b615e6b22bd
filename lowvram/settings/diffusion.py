"""Settings of latent diffusion: what is denoised, by which network, under which conditions."""

from dataclasses import dataclass, replace

from lowvram.errors import LowVRAMError
from lowvram.settings.base import Settings
from lowvram.settings.checks import at_least, fraction, one_of
from lowvram.settings.common import AdamSettings, AverageSettings, check_widths

NETWORKS = ("unet", "dit")
CONDITIONS = ("none", "class", "text")
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # dim, depth, heads
PREDICTIONS = ("eps", "v", "x0", "flow")
SCHEDULES = ("scaled_linear", "linear", "cosine", "flow")
SAMPLERS = ("euler", "heun", "dpmpp_2m", "ddim", "euler_ancestral")
SPACINGS = ("karras", "uniform", "trailing")


@dataclass(kw_only=True)
class UNetSettings:
    """The shape of the UNet of Stable Diffusion, level by level."""

    channels: list[int]
    attention: list[bool]
    layers: int
    head_channels: int
    depth: int
    norm_groups: int

    def __post_init__(self) -> None:
        check_widths("unet.channels", self.channels, self.norm_groups)
        if len(self.attention) != len(self.channels):
            raise LowVRAMError(
                f"unet.attention={self.attention} has {len(self.attention)} values for {len(self.channels)} levels.",
                "Give true or false for each of unet.channels.",
            )
        for name in ("layers", "head_channels", "depth"):
            at_least(f"unet.{name}", getattr(self, name), 1)
        for width in self.channels:
            if width % self.head_channels:
                raise LowVRAMError(
                    f"unet.head_channels={self.head_channels} does not divide the {width} of unet.channels.",
                    "Use a divisor of every width.",
                )


@dataclass(kw_only=True)
class DiTSettings:
    """The shape of the transformer."""

    size: str | None
    patch: int
    dim: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        if self.size is not None:
            one_of("dit.size", self.size, tuple(DIT_SIZES))
            self.dim, self.depth, self.heads = DIT_SIZES[self.size]
        for name in ("patch", "dim", "depth", "heads"):
            at_least(f"dit.{name}", getattr(self, name), 1)
        if self.dim % (4 * self.heads):
            raise LowVRAMError(
                f"dit.dim={self.dim} does not give {self.heads} heads a multiple of 4 channels each.",
                "Rotary positions need that: use dit.dim=384 with dit.heads=6, or the like.",
            )


@dataclass(kw_only=True)
class LatentSettings:
    """The latents: whose, and of what shape."""

    recipe: str | None
    path: str | None
    channels: int
    factor: int
    crops: int
    folder: str | None

    def __post_init__(self) -> None:
        at_least("latent.channels", self.channels, 1)
        at_least("latent.crops", self.crops, 1)
        one_of("latent.factor", str(self.factor), ("1", "2", "4", "8", "16", "32"))


@dataclass(kw_only=True)
class TextSettings:
    """The captions, and the encoder that reads them."""

    clip: str | None
    length: int
    buckets: int
    dim: int
    depth: int
    heads: int
    missing: str

    def __post_init__(self) -> None:
        for name in ("length", "buckets", "dim", "depth", "heads"):
            at_least(f"text.{name}", getattr(self, name), 1)
        if self.dim % self.heads:
            raise LowVRAMError(f"text.heads={self.heads} does not divide text.dim={self.dim}.", "Use a divisor.")
        one_of("text.missing", self.missing, ("unconditional", "error"))


@dataclass(kw_only=True)
class DiffusionLossSettings:
    """The objective: what the network predicts, at which noise levels, and how much each counts."""

    predict: str
    schedule: str
    zero_terminal_snr: bool
    logit_mean: float
    logit_std: float
    shift: float
    min_snr_gamma: float | None
    offset_noise: float
    condition_dropout: float

    def __post_init__(self) -> None:
        one_of("loss.predict", self.predict, PREDICTIONS)
        one_of("loss.schedule", self.schedule, SCHEDULES)
        fraction("loss.condition_dropout", self.condition_dropout)
        at_least("loss.offset_noise", self.offset_noise, 0)
        for name in ("logit_std", "shift", *(("min_snr_gamma",) if self.min_snr_gamma is not None else ())):
            if getattr(self, name) <= 0:
                raise LowVRAMError(f"loss.{name}={getattr(self, name)} must be above 0.", "A usual value is 1.")
        if (self.predict == "flow") != (self.schedule == "flow"):
            raise LowVRAMError(
                f"loss.predict={self.predict} does not go with loss.schedule={self.schedule}.",
                "Use flow for both, or for neither.",
            )


@dataclass(kw_only=True)
class SamplingSettings:
    """How grids are sampled, and what `lowvram.sample` does unless told otherwise."""

    sampler: str
    steps: int
    spacing: str
    guidance: float

    def __post_init__(self) -> None:
        one_of("sampling.sampler", self.sampler, SAMPLERS)
        one_of("sampling.spacing", self.spacing, SPACINGS)
        at_least("sampling.steps", self.steps, 1)
        at_least("sampling.guidance", self.guidance, 0)


@dataclass(kw_only=True)
class DiffusionMicroBatchSettings:
    """Latents of one process in memory at a time; None is the whole batch."""

    denoiser: int | None


@dataclass(kw_only=True)
class DiffusionSettings(Settings):
    """A recipe with `task: diffusion`; conf/task/diffusion.yaml explains each setting."""

    network: str
    condition: str
    latent: LatentSettings
    unet: UNetSettings
    dit: DiTSettings
    text: TextSettings
    loss: DiffusionLossSettings
    sampling: SamplingSettings
    optimizer: AdamSettings
    ema: AverageSettings
    micro_batch: DiffusionMicroBatchSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("network", self.network, NETWORKS)
        one_of("condition", self.condition, CONDITIONS)
        if self.latent.recipe is None and self.latent.path is None:
            raise LowVRAMError(
                "latent.recipe and latent.path are both null, and latents need an autoencoder.",
                "Give latent.path=FOLDER for one that is trained, or latent.recipe=faces256_vae.",
            )
        if self.condition == "class" and not self.data.labels:
            raise LowVRAMError("condition=class needs class labels.", "Add data.labels=true.")
        if self.resolution % (self.latent.factor * self.grain):
            raise LowVRAMError(
                f"resolution={self.resolution} gives latents of {self.resolution / self.latent.factor:g} a side, and "
                f"network={self.network} needs a multiple of {self.grain}.",
                "Use a higher resolution, a smaller latent.factor, or fewer levels.",
            )
        if self.data.buckets:
            check_buckets(self.resolution, self.latent, self.grain, f"network={self.network}")

    def at_full_cost(self) -> "DiffusionSettings":
        """Each step of sampling takes the memory of the others: two are enough to see it."""
        return replace(self, sampling=replace(self.sampling, steps=2))

    @property
    def latent_size(self) -> int:
        """Width and height of a latent."""
        return self.resolution // self.latent.factor

    @property
    def grain(self) -> int:
        """What the width and height of a latent must be a multiple of."""
        return self.dit.patch if self.network == "dit" else int(2 ** (len(self.unet.channels) - 1))


def check_buckets(resolution: int, latent: LatentSettings, grain: int, network: str) -> None:
    """Raise LowVRAMError unless images of several shapes can be learned from.

    grain: what the network needs sides of latents to be multiples of.
    """
    if latent.crops > 1:
        raise LowVRAMError(
            f"data.buckets=true does not go with latent.crops={latent.crops}: images are hardly cut.",
            "Use latent.crops=1, or leave data.buckets out.",
        )
    multiple = latent.factor * grain
    if resolution < 3 * multiple:
        raise LowVRAMError(
            f"data.buckets=true leaves nothing but the square at resolution={resolution}: sides are multiples of "
            f"{multiple}, latent.factor={latent.factor} times the {grain} of {network}.",
            "Use a higher resolution, a smaller latent.factor, fewer levels, or leave data.buckets out.",
        )
