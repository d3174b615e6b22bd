"""What was trained, in the words of the settings, and the command that does it again."""

import functools
import shlex
from typing import Any

from lowvram.config import load_recipe, recipe_names, settings_values
from lowvram.errors import LowVRAMError
from lowvram.pages.folder import Content
from lowvram.pages.words import plain
from lowvram.settings import flatten

TASKS = {
    "stylegan2": "StyleGAN2, a generative adversarial network",
    "autoencoder": "an autoencoder, for latent diffusion",
    "diffusion": "a latent diffusion model",
    "stable_diffusion": "Stable Diffusion, fine-tuned",
}
# Of one call, not of what is trained.
_INVOCATION = ("recipe", "task", "out", "resume", "debug", "price", "electricity", "carbon", "contributor")
_MOST_WORDS = 60


@functools.lru_cache(maxsize=8)
def usual_settings(recipe: str) -> dict[str, Any] | None:
    """Settings of a built-in recipe, dotted; None for another name. A file that a run names is never read."""
    if recipe not in recipe_names():
        return None
    try:
        return flatten(settings_values(load_recipe(recipe)))
    except LowVRAMError:
        return None


def changed(content: Content) -> dict[str, Any] | None:
    """Settings that are not as the recipe has them; None where its recipe is not one of the built-in ones."""
    usual = usual_settings(content.text("recipe"))
    if usual is None or usual.get("task") != content.settings.get("task"):
        return None
    return {
        name: value
        for name, value in content.settings.items()
        if name not in _INVOCATION and (name not in usual or usual[name] != value)
    }


def command(content: Content) -> str:
    """What to type to train the same again, from a shell in any folder."""
    differing = changed(content)
    usual = usual_settings(content.text("recipe"))
    if differing is None or usual is None or len(differing) > _MOST_WORDS:
        return shlex.join(["python", "-m", "lowvram.train", f"recipe={content.folder / 'recipe.yaml'}", "out=again"])
    words = [f"{name}={hydra_value(value)}" for name, value in differing.items() if name in usual]
    return shlex.join(["python", "-m", "lowvram.train", f"recipe={content.text('recipe')}", *words])


def hydra_value(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, list):
        return f"[{','.join(hydra_value(entry) for entry in value)}]"
    if value is None or isinstance(value, bool | int | float):
        return plain(value)
    said = "".join(c if c.isprintable() else " " for c in str(value))
    if said and all(c.isalnum() or c in "_-./%@" for c in said):
        return said
    escaped = said.replace("\\", "\\\\") if said.endswith("\\") else said
    return '"' + escaped.replace('"', '\\"') + '"'
