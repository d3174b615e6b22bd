"""Which run folder and checkpoint a training begins from, and which settings then hold."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowvram import checkpoint
from lowvram.config import differences, settings_from, settings_values
from lowvram.errors import LowVRAMError
from lowvram.run import Run, newest
from lowvram.settings import Settings

# Settings of the invocation: they may differ from the saved ones without a word.
_INVOCATION = ("out", "resume", "device", "debug", "recipe")


@dataclass(kw_only=True)
class Start:
    """Where training begins. checkpoint: None for fresh weights. messages: what the user should be told."""

    run: Run
    checkpoint: Path | None
    messages: list[str]


def find_start(settings: Settings) -> Start:
    """The run that `out` and `resume` ask for.

    Raises:
        LowVRAMError: `out` exists and `resume` is not set, or what `resume` names is not there.
    """
    if settings.resume is None:
        return Start(run=Run.new(settings), checkpoint=None, messages=[])
    if settings.resume == "auto":
        folder = Path(settings.out).expanduser() if settings.out else newest(settings.recipe)
        if folder is None or not (folder / "recipe.yaml").is_file():
            where = f"out={folder}" if folder else f"a run of {settings.recipe} in outputs/"
            run = Run.new(settings)
            return Start(run=run, checkpoint=None, messages=[f"resume=auto found no {where}; starting {run.folder}"])
        return _continue(Run.open(folder), None, settings)
    return _from_path(Path(settings.resume).expanduser(), settings)


def _from_path(path: Path, settings: Settings) -> Start:
    if not path.is_dir():
        raise LowVRAMError(f"resume={path} is not a folder.", "Give a run folder, one of its checkpoints, or auto.")
    is_run = (path / "recipe.yaml").is_file()
    saved = Run.open(path if is_run else path.parent.parent)
    found = saved.find_checkpoint() if is_run else path
    if settings.out is None or Path(settings.out).expanduser().resolve() == saved.folder.resolve():
        return _continue(saved, found, settings)
    merged, messages = merge(saved.settings, settings)
    run = Run.new(merged)
    return Start(run=run, checkpoint=found, messages=[f"going on from {found} in {run.folder}", *messages])


def _continue(saved: Run, found: Path | None, settings: Settings) -> Start:
    found = found or checkpoint.latest_good(saved.checkpoints)
    merged, messages = merge(saved.settings, settings)
    if found is None:
        messages.append(f"{saved.folder} has no good checkpoint yet; starting it from the beginning")
    else:
        messages.append(f"resuming {found}")
    return Start(run=Run(saved.folder, merged), checkpoint=found, messages=messages)


def merge(saved: Settings, given: Settings) -> tuple[Settings, list[str]]:
    """Saved settings with those replaced that the user named, and a line for each difference."""
    values = settings_values(saved)
    messages = []
    for name, (old, new) in differences(saved, given).items():
        by_name = name in given.overrides
        if name in _INVOCATION or by_name:
            _set(values, name, new)
        if name in _INVOCATION:
            continue
        if by_name:
            messages.append(f"{name}: {old} in the saved recipe, now {new}, as named")
        else:
            messages.append(
                f"{name}: {old} in the saved recipe holds, not {new}; name it on the command line to change it"
            )
    values["recipe"] = saved.recipe
    return replace(settings_from(values), overrides=given.overrides), messages


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    for part in path:
        values = values[part]
    values[leaf] = value
