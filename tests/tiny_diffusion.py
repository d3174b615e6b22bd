"""Settings that make the recipes of latent diffusion small enough for seconds: 32x32 images, latents of 8x8."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from omegaconf import OmegaConf

from lowvram import Trainer, load_recipe
from lowvram.config import settings_from, settings_values
from lowvram.models.autoencoder import Autoencoder
from lowvram.settings import Settings
from lowvram.tasks.autoencoder import save

_COMMON = (
    "resolution=32",
    "batch=8",
    "data.builtin_count=64",
    "data.workers=0",
    "data.mirror=true",
    "grid=4",
    "log_kimg=0.016",
    "optimizer.warmup_kimg=0",
    "ema.half_life_kimg=0.02",
    "ema.rampup=null",
    "device=cpu",
)

# The discriminator from the first step; without the perceptual loss, whose network is the slowest part.
TINY_VAE = (
    *_COMMON,
    "model.channels=[8,16,16]",
    "model.norm_groups=4",
    "model.discriminator_channels=8",
    "model.discriminator_layers=2",
    "loss.perceptual=none",
    "loss.adversarial_weight=0.1",
    "loss.adversarial_start_kimg=0",
)

TINY_LDM = (
    *_COMMON,
    "unet.channels=[16,32]",
    "unet.attention=[false,true]",
    "unet.head_channels=8",
    "unet.norm_groups=4",
    "dit.dim=32",
    "dit.depth=2",
    "dit.heads=2",
    "text.buckets=512",
    "text.dim=16",
    "text.depth=1",
    "text.heads=2",
    "sampling.steps=2",
)

UNET_CLASSES = ("condition=class", "data.labels=true")
DIT_WORDS = ("network=dit", "condition=text")


# As in test_golden.py: a large eps, or rounding decides the signs of gradients near zero, and those Adam's first steps.
CALM = ("optimizer.eps=0.01", "optimizer.lr=0.02")
MODELS = {"unet": UNET_CLASSES, "dit": DIT_WORDS}


@cache
def _values(recipe: str) -> dict[str, object]:
    return settings_values(load_recipe(recipe))


def settings_of(recipe: str, words: Sequence[str]) -> Settings:
    """`load_recipe`, but for Hydra's composition only once: that takes longer than some steps of training."""
    changed = OmegaConf.merge(OmegaConf.create(_values(recipe)), OmegaConf.from_dotlist(list(words)))
    return settings_from({**OmegaConf.to_container(changed), "overrides": [word.split("=")[0] for word in words]})


def vae_recipe(out: Path, *overrides: str) -> Settings:
    """A tiny autoencoder and its discriminator, to train in `out`."""
    return settings_of("faces64_vae", [*TINY_VAE, f"out={out}", *overrides])


def ldm_recipe(out: Path, vae: Path, *overrides: str) -> Settings:
    """A tiny denoiser of the latents of `vae`, to train in `out`: a UNet without conditions, unless overridden."""
    return settings_of("faces64_ldm", [*TINY_LDM, f"latent.path={vae}", f"out={out}", *overrides])


def steps(trainer: Trainer, n: int | None = None) -> list[dict[str, float]]:
    """The losses of the next n steps, or of all that are left."""
    losses = []
    for result in trainer:
        losses.append(result.losses)
        if len(losses) == n:
            break
    return losses


def write_vae_recipe(folder: Path, *, kimg: float = 0.016) -> Path:
    """tiny_vae.yaml, the recipe TINY_VAE as a file, for `latent.recipe`."""
    lines = ["defaults:", "  - faces64_vae", "  - _self_", f"kimg: {kimg}"]
    nested: dict[str, list[str]] = {}
    for word in TINY_VAE:
        name, value = word.split("=", 1)
        section, _, leaf = name.rpartition(".")
        nested.setdefault(section, []).append(f"{leaf}: {value}")
    lines += nested.pop("")
    for section, values in nested.items():
        lines += [f"{section}:", *(f"  {value}" for value in values)]
    path = folder / "tiny_vae.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def save_vae(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """An autoencoder that was never trained, as a `vae` folder: any will do to train a denoiser on its latents."""
    settings = {"latent_channels": 4, "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    torch.manual_seed(seed)
    network = Autoencoder(**{**settings, "mid_block_add_attention": False, "scaling_factor": 3.7, **changes})
    if network.quant_conv is not None:
        network.quant_conv.bias.data[network.latent_channels :] = -6  # the log variance: latents are not mere noise
    save(network, folder)
    return folder
