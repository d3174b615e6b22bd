"""What was trained, in the words of the settings, and the command that does it again."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

from lowvram.config import load_recipe, recipe_names, settings_values
from lowvram.errors import LowVRAMError
from lowvram.pages.folder import MOST_TEXT, Content
from lowvram.pages.words import UNFIT, plain
from lowvram.settings import flatten

TASKS = {
    "stylegan2": "StyleGAN2, a generative adversarial network",
    "projected_gan": "a projected GAN, which learns through a network that knows pictures already",
    "r3gan": "R3GAN, a generative adversarial network",
    "autoencoder": "an autoencoder, for latent diffusion",
    "diffusion": "a latent diffusion model",
    "stable_diffusion": "Stable Diffusion, fine-tuned",
}
# Of one call, not of what is trained.
_INVOCATION = ("recipe", "task", "out", "resume", "debug", "price", "electricity", "carbon", "contributor")
_OF_A_SESSION = {"price": "null", "electricity": "null", "carbon": "null", "contributor": '""'}
_BY_FILE = ("lora.rank", "lora.alpha", "lora.dora")  # which lora.begin has: said too, they must be its own
_MOST_WORDS = 60
_BARE = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*|[0-9]+[KMGT]?i?B")
_KEYWORDS = ("null", "true", "false", "inf", "nan")


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
    """What to type to train the same again, from a shell in any folder and with as many cards."""
    cards = content.receipt.sessions[-1].cards if content.receipt.sessions else 1
    start = ["accelerate", "launch", "--num_processes", str(cards)] if cards > 1 else ["python"]
    differing, usual = changed(content), usual_settings(content.text("recipe"))
    whole = differing is not None and usual is not None and len(differing) <= _MOST_WORDS
    if not whole or differing is None or not all(_can_be_typed(value) for value in differing.values()):
        return _from_file(content, [*start, "-m", "lowvram.train"])
    left_out = _BY_FILE if content.settings.get("lora.begin") is not None else ()
    words = [
        f"{name}={hydra_value(value)}"
        for name, value in differing.items()
        if name in (usual or {}) and name not in left_out
    ]
    return shlex.join([*start, "-m", "lowvram.train", f"recipe={content.text('recipe')}", *words])


def _from_file(content: Content, start: list[str]) -> str:
    """With the run's recipe.yaml, without what held for one call. Texts with ${ are said: of a file they are read."""
    path, copy = content.folder.absolute() / "recipe.yaml", "again.yaml"
    before = ""
    if not re.fullmatch(r"[A-Za-z0-9_/.+-]*", str(path)):  # a comma parts two recipes, and a quote opens a text
        before, path = f"{shlex.join(['cp', str(path), copy])} && ", Path(f"./{copy}")
    words = [f"recipe={path}", "out=again", "resume=null"]
    words += [f"{name}={none}" for name, none in _OF_A_SESSION.items() if content.settings.get(name)]
    words += ["mark.certificate=null", "mark.key=null"] if content.signed else []
    words += [
        f"{name}={hydra_value(value)}"
        for name, value in content.settings.items()
        if name not in _INVOCATION and "${" in str(value) and _can_be_typed(value)
    ]
    return before + shlex.join([*start, *words])


def _can_be_typed(value: Any) -> bool:
    """Whether a page can show it as it is: whole, and without characters that no page may hold."""
    if isinstance(value, list):
        return all(_can_be_typed(entry) for entry in value)
    if isinstance(value, str):
        return len(value) < MOST_TEXT and "\r" not in value and not UNFIT.search(value)
    return value is None or isinstance(value, bool | int | float)


def hydra_value(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, so that what it reads, and OmegaConf after it, is the same value.

    Texts have quotes unless they can't be anything else than text: not 2024_01, true or 1e3.
    """
    if isinstance(value, list):
        return f"[{','.join(hydra_value(entry) for entry in value)}]"
    if value is None or isinstance(value, bool | int | float):
        return plain(value)
    text = str(value)
    if _BARE.fullmatch(text) and text.lower() not in _KEYWORDS:
        return text
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)  # ${x} would be another setting's value
    text = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), text)
    return f'"{text}"'
