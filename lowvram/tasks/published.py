"""Published Stable Diffusion weights as a recipe sees them: their shape as settings, and networks made of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lowvram import standin
from lowvram.data.caption_variants import CaptionOptions
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import Autoencoder
from lowvram.models.unet import UNet
from lowvram.noise import Schedule
from lowvram.settings import StableDiffusionSettings
from lowvram.tasks import low_rank
from lowvram.tasks.pipeline_text import PipelineText
from lowvram.weights.pipeline import Pipeline, open_pipeline
from lowvram.weights.random_pipeline import RandomPipeline

RANDOM = "random"  # in place of a path: weights of the published shape, for plans and benchmarks

Source = Pipeline | RandomPipeline

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
_RECIPES = {"sd1": "sd15_lora", "sd2": "sd21_lora", "sdxl": "sdxl_lora"}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def source(settings: StableDiffusionSettings) -> Source:
    """The weights that a recipe stands on; in a plan without any, ones of the published shape.

    Raises:
        LowVRAMError: none are named, or they can't be read.
    """
    if settings.weights is None and not standin.active():
        raise LowVRAMError(
            f"recipe={settings.recipe} fine-tunes weights that exist, and none are named.",
            f"Add weights=PATH: a diffusers folder, or one file. weights={RANDOM} measures cost without any.",
        )
    if settings.weights in (None, RANDOM):
        return RandomPipeline(settings.family)
    with standin.real():
        path = Path(str(settings.weights)).expanduser()
        return open_pipeline(path, prediction_type=prediction_type(settings.loss.predict))


def prediction_type(predict: str | None) -> str | None:
    """What a scheduler_config.json calls eps and v; None: as the weights say."""
    return {ours: theirs for theirs, ours in _PREDICTIONS.items()}.get(predict or "")


def with_shape(settings: StableDiffusionSettings) -> StableDiffusionSettings:
    """The recipe with the family, shape and objective of its weights.

    Raises:
        LowVRAMError: they can't be read, or contradict what the user set.
    """
    pipeline = source(settings)
    if pipeline.family != settings.family and "family" not in settings.overrides:
        raise LowVRAMError(
            f"weights={settings.weights} are of {_NAMES[pipeline.family]}, and recipe={settings.recipe} is for "
            f"{_NAMES[settings.family]}.",
            f"Use a recipe such as {_RECIPES[pipeline.family]}, or add family={pipeline.family} and mind resolution, "
            "batch and optimizer.lr.",
        )
    unet, vae = pipeline.config("unet"), pipeline.config("vae")
    levels, factor = len(unet["block_out_channels"]), 2 ** (len(vae["block_out_channels"]) - 1)
    channels = int(vae.get("latent_channels", 4))
    if int(unet.get("in_channels", 4)) != channels:
        raise LowVRAMError(
            f"weights={settings.weights} take {unet.get('in_channels')} channels, and latents have {channels}: they "
            "are for inpainting, depth or the like.",
            "Use the weights of a text-to-image model.",
        )
    for name, wanted, has in (
        ("family", settings.family, pipeline.family),
        ("levels", settings.levels, levels),
        ("latent.channels", settings.latent.channels, channels),
        ("latent.factor", settings.latent.factor, factor),
    ):
        if name in settings.overrides and wanted != has:
            raise LowVRAMError(f"{name}={wanted} is not the {has} of weights={settings.weights}.", f"Leave {name} out.")
    scheduler = pipeline.config("scheduler")
    trained = str(scheduler.get("prediction_type", "epsilon"))
    loss = settings.loss
    if loss.predict == "auto":
        if trained not in _PREDICTIONS:
            raise LowVRAMError(
                f"weights={settings.weights} predict {trained!r}.", "Say what that is: loss.predict=eps or v."
            )
        loss = replace(loss, predict=_PREDICTIONS[trained])
    if loss.zero_terminal_snr is None:
        loss = replace(loss, zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)))
    latent = replace(settings.latent, channels=channels, factor=factor)
    return low_rank.settled(replace(settings, family=pipeline.family, levels=levels, latent=latent, loss=loss))


def schedule(config: Mapping[str, Any], *, zero_terminal_snr: bool) -> Schedule:
    """The noise levels of a scheduler_config.json.

    Raises:
        LowVRAMError: they are of a kind that is not known.
    """
    betas = str(config.get("beta_schedule", "scaled_linear"))
    kinds = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
    if betas not in kinds or config.get("trained_betas") is not None:
        raise LowVRAMError(
            f"the weights were trained with noise levels of the kind {betas!r}.", f"Known: {', '.join(kinds)}."
        )
    return Schedule.discrete(
        kinds[betas],  # type: ignore[arg-type]
        steps=int(config.get("num_train_timesteps", 1000)),
        beta_start=float(config.get("beta_start", 0.00085)),
        beta_end=float(config.get("beta_end", 0.012)),
        zero_terminal_snr=zero_terminal_snr,
    )


def scheduler_changes(settings: StableDiffusionSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler_config.json, `config` so far, must say of a network that was trained by these settings."""
    changes: dict[str, Any] = {"prediction_type": prediction_type(settings.loss.predict)}
    if settings.loss.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif "rescale_betas_zero_snr" in config:
        changes["rescale_betas_zero_snr"] = False
    return changes


def base_dtype(settings: StableDiffusionSettings, device: torch.device) -> torch.dtype:
    """Of weights that are not trained: as `base` says, 16 bits on a GPU if that leaves it open."""
    if settings.base in _DTYPES:
        return _DTYPES[settings.base]
    if not standin.is_gpu(device) or settings.precision == "fp32":
        return torch.float32
    if settings.precision in _DTYPES:
        return _DTYPES[settings.precision]
    if standin.active() or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def compute_dtype(settings: StableDiffusionSettings, device: torch.device) -> torch.dtype:
    """Of the arithmetic on packed weights: as `base_dtype` would be if they were not."""
    return base_dtype(replace(settings, base="auto"), device)


def text(pipeline: Source, settings: StableDiffusionSettings, device: torch.device, **options: Any) -> PipelineText:
    """What the UNet is told, by the pipeline's text encoders. options: of `PipelineText`."""
    said = settings.text
    varied = CaptionOptions(
        prefix=said.prefix,
        suffix=said.suffix,
        shuffle=said.shuffle,
        keep=said.keep,
        tag_dropout=said.tag_dropout,
        variants=said.variants,
    )
    usual: dict[str, Any] = {
        "dropout": settings.loss.condition_dropout,
        "options": varied,
        "live": settings.live_text,
        "dtype": _text_dtype(settings, device),
        "skip": said.skip,
        "size": (settings.resolution, settings.resolution),
    }
    return PipelineText(cast(Pipeline, pipeline), device, **usual | options)


def _text_dtype(settings: StableDiffusionSettings, device: torch.device) -> torch.dtype:
    """Of the text encoders: fp32 if they are trained whole, else as `text.dtype` says, or as the UNet beside them."""
    if settings.text.train and settings.train == "full":
        return torch.float32
    return _DTYPES.get(settings.text.dtype) or compute_dtype(settings, device)


def unet(pipeline: Source, *, dtype: torch.dtype = torch.float32, load: bool = True) -> UNet:
    """The pipeline's UNet on the host. load: with its weights; else they are to be loaded."""
    made = _empty(pipeline, lambda: UNet.from_config(pipeline.config("unet")), dtype)
    if load and not standin.active():
        pipeline.load("unet", made)
    return made


def autoencoder(pipeline: Source) -> Autoencoder:
    """The pipeline's autoencoder on the host, in fp32: that of SDXL overflows in fp16."""
    made = _empty(pipeline, lambda: Autoencoder.from_config(pipeline.config("vae")), torch.float32)
    if not standin.active():
        pipeline.load("vae", made)
    return made


def _empty(pipeline: Source, make: Any, dtype: torch.dtype) -> Any:
    """A network without initial values, which take long and are overwritten; random weights are made so."""
    if pipeline.layout == RANDOM or standin.active():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same each time, so that what is kept on disk is found again
            network: nn.Module = make()
        return network.to(dtype)
    with torch.device("meta"):
        network = make()
    return network.to(dtype).to_empty(device="cpu")
