"""Typed settings of a recipe, and the checks that span several of them.

Values and their explanations live in conf/ (one YAML line and comment each); these files give them types and refuse
combinations that can't work. They import neither torch nor Hydra, so that `--help` stays quick.
"""

from lowvram.settings.autoencoder import AutoencoderSettings
from lowvram.settings.base import MEMORY_CHOICES, Settings
from lowvram.settings.checks import check_resolution, flatten, nearest, one_of, parse_bytes
from lowvram.settings.diffusion import DiffusionSettings
from lowvram.settings.projected_gan import ProjectedGanSettings
from lowvram.settings.r3gan import R3GANSettings
from lowvram.settings.stable_diffusion import StableDiffusionSettings
from lowvram.settings.stylegan2 import StyleGAN2Settings

BY_TASK: dict[str, type[Settings]] = {
    "stylegan2": StyleGAN2Settings,
    "projected_gan": ProjectedGanSettings,
    "r3gan": R3GANSettings,
    "autoencoder": AutoencoderSettings,
    "diffusion": DiffusionSettings,
    "stable_diffusion": StableDiffusionSettings,
}

__all__ = [
    "BY_TASK",
    "MEMORY_CHOICES",
    "AutoencoderSettings",
    "DiffusionSettings",
    "ProjectedGanSettings",
    "R3GANSettings",
    "Settings",
    "StableDiffusionSettings",
    "StyleGAN2Settings",
    "check_resolution",
    "flatten",
    "nearest",
    "parse_bytes",
    "settings_class",
]


def settings_class(task: object) -> type[Settings]:
    """The settings of a task. Raises LowVRAMError for one that is not known."""
    one_of("task", str(task), tuple(BY_TASK))
    return BY_TASK[str(task)]
