"""LoRA files that a training stands on: the one that it goes on from, and those that stay frozen under it.

A run keeps copies of them, so that it can be moved, resumed and sampled when the files themselves are gone.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lowvram import standin
from lowvram.adapters import lora, lora_files
from lowvram.adapters.lora import Adapters
from lowvram.adapters.lora_files import LoraFile
from lowvram.adapters.stack import Stack
from lowvram.errors import LowVRAMError
from lowvram.settings import StableDiffusionSettings
from lowvram.settings.stable_diffusion import stack_scales

_BEGIN = "lora_begin.safetensors"  # the copies, in the run's folder
_STACKED = "lora_stack_{}.safetensors"


def settled(settings: StableDiffusionSettings) -> StableDiffusionSettings:
    """The recipe with rank, alpha and kind of the file that training goes on from.

    Raises:
        LowVRAMError: it can't be read, or contradicts what the user set.
    """
    if settings.lora.begin is None:
        return settings
    file = _read(settings.lora.begin)
    alone = replace(settings.lora, rank=file.rank, alpha=file.alpha, dora=file.dora)
    has: dict[str, list[Any]] = {
        "rank": sorted({rank.rank for rank in file.ranks}),
        "alpha": sorted({rank.alpha for rank in file.ranks}),
        "dora": [file.dora],
    }
    for name, values in has.items():
        wanted = getattr(settings.lora, name)
        if f"lora.{name}" in settings.overrides and wanted is not None and [wanted] != values:
            told = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
            raise LowVRAMError(
                f"lora.{name}={wanted} is not that of lora.begin={settings.lora.begin}, which has {told}.",
                f"Leave lora.{name} out, or begin from another file.",
            )
    return replace(settings, lora=alone)


def begin_of(settings: StableDiffusionSettings, folder: Path | None) -> LoraFile | None:
    """The file that training goes on from. folder: of the run, where its copy counts.

    Raises:
        LowVRAMError: it can't be read, or is another one than the run was begun with.
    """
    if settings.lora.begin is None:
        return None
    return _read(_copy_of("lora.begin", settings.lora.begin, _BEGIN, settings, folder))


def stack_of(settings: StableDiffusionSettings, folder: Path | None) -> Stack:
    """The files that stay frozen. folder, errors: as of `begin_of`; or what they hold can't be put together."""
    names = _stacked(settings)
    paths = [_copy_of("lora.stack", name, copy, settings, folder) for name, copy in names]
    files = [_read(path) for path in paths]
    for file in files[1:]:
        if file.dora:
            raise LowVRAMError(
                f"lora.stack={settings.lora.stack}: {file.path} is DoRA, which has the norms of weights without the "
                "files before it.",
                "Name it first.",
            )
    return Stack(files, stack_scales(settings.lora.stack, settings.lora.stack_scale))


def text_options(stack: Stack) -> dict[str, Any]:
    """Options of `PipelineText` that put a stack into text encoders."""
    if not stack.text_parts:
        return {}
    digests = [f"{_digest(file.path)} {scale!r}" for file, scale in stack.files if set(file.parts) - {"unet"}]
    return {"changing": lambda part, network: stack.merge_into(network, part), "key": " ".join(digests)}


def add(
    settings: StableDiffusionSettings, network: nn.Module, part: str, targets: list[str], begin: LoraFile | None
) -> Adapters:
    """The low-rank weights to be trained in a part: those of a file, or new ones where it has none for this part.

    Raises:
        LowVRAMError: the file is for another network, or for other layers than the user named.
    """
    said = settings.lora
    if begin is None or part not in begin.parts:
        rank, alpha, dora = said.rank, said.alpha, said.dora
        return lora.add(network, rank=rank, alpha=alpha, targets=targets, dropout=said.dropout, dora=dora, name=part)
    name = "lora.targets" if part == "unet" else "lora.text_targets"
    wanted = set(lora.find_targets(network, targets)) if name in settings.overrides else None
    values = not standin.active()
    adapters = lora_files.add_from_file(network, part, begin, name=part, dropout=said.dropout, values=values)
    if wanted is not None and wanted != set(adapters.layers):
        raise LowVRAMError(
            f"{name}={targets} means {len(wanted)} layers of {part}, and lora.begin={said.begin} has "
            f"{len(adapters.layers)}, {min(wanted ^ set(adapters.layers))} not in both.",
            f"Leave {name} out, or begin from another file.",
        )
    return adapters


def check(settings: StableDiffusionSettings, parts: dict[str, Adapters], begin: LoraFile | None, stack: Stack) -> None:
    """Refuse what would be lost, or mean another thing when it is merged. parts: what is trained."""
    lost = [] if begin is None else [part for part in begin.parts if part not in parts]
    if lost:
        text = all(part.startswith("text_encoder") for part in lost) and not settings.text.train
        raise LowVRAMError(
            f"lora.begin={settings.lora.begin} has low-rank weights of {' and '.join(lost)} too, and "
            + ("text.train=false trains none there." if text else f"weights={settings.weights} have no such part."),
            "Use text.train=true." if text else "Use a file that was made for this family of models.",
        )
    if stack.files and any(adapters.dora for adapters in parts.values()):
        raise LowVRAMError(
            f"DoRA trains norms of the published weights, which lora.stack={settings.lora.stack} changes.",
            "Use lora.dora=false, or convert weights and stack to a pipeline first, and train on that.",
        )


def write_beside(settings: StableDiffusionSettings, folder: Path) -> None:
    """Copy the files into a run's folder, those that are not there yet."""
    named = _stacked(settings)
    if settings.lora.begin is not None:
        named.append((settings.lora.begin, _BEGIN))
    for name, copy in named:
        if not (folder / copy).is_file():
            partial = folder / f".{copy}.partial"
            shutil.copyfile(_kept(copy, settings, folder) or Path(name).expanduser(), partial)
            partial.replace(folder / copy)


def _stacked(settings: StableDiffusionSettings) -> list[tuple[str, str]]:
    """Each file of the stack as it is named, and the name of its copy."""
    return [(name, _STACKED.format(number)) for number, name in enumerate(_names(settings.lora.stack))]


def _names(text: str | None) -> Iterator[str]:
    for name in (text or "").split("|"):
        if name.strip():
            yield name.strip()


def _copy_of(setting: str, name: str, copy: str, settings: StableDiffusionSettings, folder: Path | None) -> str | Path:
    """What to read for a file: the run's copy, where there is one."""
    kept = _kept(copy, settings, folder)
    if kept is None:
        return name
    given = Path(name).expanduser()
    if setting in settings.overrides and given.is_file() and _digest(given) != _digest(kept):
        raise LowVRAMError(
            f"{setting}: {name} is not the file that the run in {kept.parent} was begun with.",
            f"Leave {setting} out, or begin a new run.",
        )
    return kept


def _kept(copy: str, settings: StableDiffusionSettings, folder: Path | None) -> Path | None:
    """A copy in the run's folder, or in that of the run or checkpoint which it goes on from."""
    folders = [] if folder is None else [folder]
    if settings.resume not in (None, "auto"):
        earlier = Path(settings.resume).expanduser()
        folders += [earlier, earlier.parent.parent]
    return next((place / copy for place in folders if (place / copy).is_file()), None)


def _read(path: str | Path) -> LoraFile:
    with standin.real():
        return lora_files.read(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
