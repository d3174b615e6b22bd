"""Settings of fine-tuning published Stable Diffusion weights: what is trained of them, and on which words."""

import math
from dataclasses import dataclass, replace

from lowvram.errors import LowVRAMError
from lowvram.settings.base import Settings
from lowvram.settings.checks import at_least, fraction, one_of
from lowvram.settings.common import AdamSettings
from lowvram.settings.diffusion import DiffusionMicroBatchSettings, LatentSettings, SamplingSettings, check_buckets

TRAINED = ("full", "lora", "textual_inversion")
FAMILIES = {"sd1": 4, "sd2": 4, "sdxl": 3}  # levels of the published UNets
BASES = ("auto", "fp32", "fp16", "bf16", "nf4")


@dataclass(kw_only=True)
class LoraSettings:
    """The low-rank weights that are trained in place of the network's own."""

    rank: int
    alpha: float | None
    targets: list[str]
    text_targets: list[str]
    dropout: float
    dora: bool
    begin: str | None = None  # run folders from before there were such files mean none, here and below
    stack: str | None = None
    stack_scale: str | None = None

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        fraction("lora.dropout", self.dropout)
        if self.alpha is not None and self.alpha <= 0:
            raise LowVRAMError(f"lora.alpha={self.alpha} must be above 0.", "A usual value is lora.rank.")
        if not self.targets:
            raise LowVRAMError("lora.targets is empty.", "Use lora.targets=[attention].")
        stack_scales(self.stack, self.stack_scale)


def stack_scales(stack: str | None, scale: str | None) -> list[float]:
    """How much each file of `lora.stack` counts; raises LowVRAMError for what is no number for each."""
    count = len([name for name in (stack or "").split("|") if name.strip()])
    if scale is not None and not count:
        raise LowVRAMError(f"lora.stack_scale={scale} without lora.stack.", "Name files too, or leave it out.")
    return scales("lora.stack_scale", scale, count)


def scales(name: str, text: str | None, count: int) -> list[float]:
    """Numbers with | between, one for each of `count` LoRA files; one alone counts for all, and none means 1.

    Raises LowVRAMError for another count, or what is no number.
    """
    words = "1" if text is None else str(text)
    try:
        values = [float(word) for word in words.split("|")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) for value in values):
        raise LowVRAMError(f"{name}={text} is no number.", f"Use {name}=0.8, or with | between one for each LoRA.")
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise LowVRAMError(
            f"{name}={text} has {len(values)} numbers, for {count} LoRA file{'' if count == 1 else 's'}.",
            "Give one for each, in their order, or one for all.",
        )
    return values


@dataclass(kw_only=True)
class EmbeddingSettings:
    """The word that textual inversion learns."""

    token: str
    vectors: int
    initial: str
    templates: str = "none"  # run folders from before there were any mean none

    def __post_init__(self) -> None:
        at_least("embedding.vectors", self.vectors, 1)
        for name in ("token", "initial"):
            if not getattr(self, name).strip():
                raise LowVRAMError(
                    f"embedding.{name} is empty.", "Use embedding.token='<mine>' embedding.initial=face."
                )


@dataclass(kw_only=True)
class PromptSettings:
    """The words that go with each image."""

    prompt: str | None
    prefix: str
    suffix: str
    shuffle: bool
    keep: int
    tag_dropout: float
    variants: int | None
    missing: str
    skip: int
    dtype: str
    train: bool
    lr: float | None = None  # run folders from before there was a choice mean optimizer.lr

    def __post_init__(self) -> None:
        at_least("text.keep", self.keep, 0)
        if self.lr is not None and self.lr <= 0:
            raise LowVRAMError(f"text.lr={self.lr} must be above 0.", "A usual one is half of optimizer.lr.")
        if self.lr is not None and not self.train:
            raise LowVRAMError(
                f"text.lr={self.lr} with text.train=false, which trains no text encoder.", "Use text.train=true."
            )
        at_least("text.skip", self.skip, 0)
        fraction("text.tag_dropout", self.tag_dropout)
        one_of("text.missing", self.missing, ("unconditional", "error"))
        one_of("text.dtype", self.dtype, ("auto", "fp32", "fp16", "bf16"))
        if self.variants is not None:
            at_least("text.variants", self.variants, 1)
            if self.variants == 1 and (self.shuffle or self.tag_dropout):
                raise LowVRAMError(
                    "text.variants=1 with tags that are shuffled or dropped: each caption would be drawn once.",
                    "Leave text.variants out, which makes 8, or use more than 1.",
                )


@dataclass(kw_only=True)
class PriorSettings:
    """Images of the class, made by the weights before training, that are trained on beside one's own (DreamBooth)."""

    prompt: str | None
    images: int
    weight: float
    folder: str | None

    def __post_init__(self) -> None:
        at_least("prior.images", self.images, 1)
        at_least("prior.weight", self.weight, 0)


@dataclass(kw_only=True)
class FineTuneLossSettings:
    """The objective: as the weights were trained, unless said otherwise."""

    predict: str
    zero_terminal_snr: bool | None
    min_snr_gamma: float | None
    offset_noise: float
    condition_dropout: float
    unmasked_weight: float

    def __post_init__(self) -> None:
        one_of("loss.predict", self.predict, ("auto", "eps", "v"))
        fraction("loss.condition_dropout", self.condition_dropout)
        fraction("loss.unmasked_weight", self.unmasked_weight)
        at_least("loss.offset_noise", self.offset_noise, 0)
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise LowVRAMError(f"loss.min_snr_gamma={self.min_snr_gamma} must be above 0.", "A usual value is 5.")


@dataclass(kw_only=True)
class PromptedSamplingSettings(SamplingSettings):
    """How grids are sampled, and on which prompts; none: captions of the data."""

    prompts: list[str]
    negative: str | None


@dataclass(kw_only=True)
class FineTuneAverageSettings:
    """The averaged weights that samples are drawn from, where there are such."""

    enabled: bool
    half_life_kimg: float
    rampup: float | None

    def __post_init__(self) -> None:
        at_least("ema.half_life_kimg", self.half_life_kimg, 0)
        if self.rampup is not None:
            at_least("ema.rampup", self.rampup, 0)


@dataclass(kw_only=True)
class StableDiffusionSettings(Settings):
    """A recipe with `task: stable_diffusion`; conf/task/stable_diffusion.yaml explains each setting.

    family, levels, latent.channels, latent.factor, and loss.predict and loss.zero_terminal_snr where the user left
    them open, are those of `weights`, once those are known.
    """

    train: str
    family: str
    levels: int | None
    base: str
    condition: str
    latent: LatentSettings
    lora: LoraSettings
    embedding: EmbeddingSettings
    text: PromptSettings
    prior: PriorSettings
    loss: FineTuneLossSettings
    sampling: PromptedSamplingSettings
    optimizer: AdamSettings
    ema: FineTuneAverageSettings
    micro_batch: DiffusionMicroBatchSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("train", self.train, TRAINED)
        one_of("family", self.family, tuple(FAMILIES))
        one_of("base", self.base, BASES)
        one_of("condition", self.condition, ("text",))
        if self.weights is None or self.levels is not None:  # else the shape is not known yet
            self._check_shape()
        self._check_trained()

    def _check_shape(self) -> None:
        grain = self.latent.factor * self.grain
        if self.resolution % grain:
            raise LowVRAMError(
                f"resolution={self.resolution} is not a multiple of {grain}, which these weights need.",
                f"Use {max(1, round(self.resolution / grain)) * grain}.",
            )
        if self.data.buckets:
            check_buckets(self.resolution, self.latent, self.grain, f"family={self.family}")

    def check_resolution(self) -> None:
        if not 16 <= self.resolution <= 4096:
            raise LowVRAMError(f"resolution={self.resolution} must lie between 16 and 4096.", "Use 512 or 1024.")

    def _check_trained(self) -> None:
        if self.train == "full" and self.base == "nf4":
            raise LowVRAMError(
                "base=nf4 with train=full: weights of 4 bits can't be trained.", "Use train=lora, or leave base out."
            )
        if self.train == "full" and self.text.train and self.text.dtype not in ("auto", "fp32"):
            raise LowVRAMError(
                f"text.dtype={self.text.dtype} with text.train=true: text encoders that are trained whole are fp32.",
                "Leave text.dtype out, or use train=lora.",
            )
        if "embedding.templates" in self.overrides and self.train != "textual_inversion":
            raise LowVRAMError(
                f"embedding.templates={self.embedding.templates} with train={self.train}: no new word is trained.",
                "Use train=textual_inversion, or leave it out.",
            )
        for name in ("begin", "stack"):
            if getattr(self.lora, name) is not None and self.train != "lora":
                raise LowVRAMError(
                    f"lora.{name}={getattr(self.lora, name)} with train={self.train}: no low-rank weights are trained.",
                    f"Use train=lora, or leave lora.{name} out.",
                )
        if self.latent.recipe is not None:
            raise LowVRAMError(
                f"latent.recipe={self.latent.recipe}: the weights have an autoencoder of their own.",
                "Leave it out; latent.path names another one.",
            )
        if self.train == "textual_inversion" and self.text.train:
            raise LowVRAMError(
                "text.train=true with train=textual_inversion: there the word alone is trained.",
                "Leave text.train out, or use train=lora.",
            )
        named = [name for name in ("text.prompt", "embedding.templates") if name in self.overrides]
        if len(named) == 2 and self.text.prompt is not None and self.embedding.templates != "none":
            raise LowVRAMError(
                f"text.prompt={self.text.prompt!r} and embedding.templates={self.embedding.templates} both serve "
                "images without a caption.",
                "Leave one of them out.",
            )
        if self.prior.prompt is not None and self.text.prompt is None and not self.templated:
            raise LowVRAMError(
                f"prior.prompt={self.prior.prompt!r} stands against no prompt of your own images.",
                "Give text.prompt too, such as text.prompt='a photo of sks dog' prior.prompt='a photo of a dog'.",
            )

    def at_full_cost(self) -> "StableDiffusionSettings":
        """Each step of sampling takes the memory of the others: two are enough to see it."""
        return replace(self, sampling=replace(self.sampling, steps=2))

    @property
    def templated(self) -> bool:
        """Whether images without a caption take a template round the new word."""
        wanted = self.train == "textual_inversion" and self.embedding.templates != "none"
        return wanted and self.text.prompt is None

    @property
    def live_text(self) -> bool:
        """Whether text encoders run in each step, rather than once for each caption."""
        return self.text.train or self.train == "textual_inversion"

    @property
    def latent_size(self) -> int:
        """Width and height of a latent."""
        return self.resolution // self.latent.factor

    @property
    def grain(self) -> int:
        """What the width and height of a latent must be a multiple of."""
        return int(2 ** ((self.levels or FAMILIES[self.family]) - 1))
