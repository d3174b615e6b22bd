"""Which run folder and checkpoint a training begins from, and which settings then hold."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowvram import checkpoint
from lowvram.config import differences, settings_from, settings_values
from lowvram.errors import LowVRAMError
from lowvram.run import Run, newest
from lowvram.settings import ProjectedGanSettings, Settings

# Settings of the invocation: they may differ from the saved ones without a word.
_OF_MACHINE = ("price", "electricity", "carbon", "contributor")
INVOCATION = ("out", "resume", "device", "debug", "recipe", *_OF_MACHINE)


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


def named_run(settings: dict[str, str]) -> Run | None:
    """The run that `resume` names, or `out` with resume=auto, of the settings as typed; None: neither does.

    Raises:
        LowVRAMError: `resume` names something else.
    """
    resume, out = settings.get("resume"), settings.get("out")
    if resume not in (None, "auto", "null"):
        return run_at(Path(resume).expanduser())[0]
    folder = None if resume != "auto" or out is None else Path(out).expanduser()
    return Run.open(folder) if folder is not None and (folder / "recipe.yaml").is_file() else None


def run_at(path: Path) -> tuple[Run, Path | None]:
    """The run in a folder, or the one that a checkpoint is in, and that checkpoint.

    Raises:
        LowVRAMError: it is neither.
    """
    if not path.is_dir():
        raise LowVRAMError(f"resume={path} is not a folder.", "Give a run folder, one of its checkpoints, or auto.")
    if (path / "recipe.yaml").is_file():
        return Run.open(path), None
    home = path.resolve().parent.parent
    if not (home / "recipe.yaml").is_file():
        raise LowVRAMError(
            f"resume={path} is neither a run nor a checkpoint in one.",
            "Give a folder with a recipe.yaml, RUN/checkpoints/step-..., or auto.",
        )
    return Run.open(home), path


def _from_path(path: Path, settings: Settings) -> Start:
    saved, found = run_at(path)
    if settings.out is None or Path(settings.out).expanduser().resolve() == saved.folder.resolve():
        return _continue(saved, found, settings)
    found = found or saved.find_checkpoint()
    merged, messages = merge(saved.settings, settings)
    _check_here(merged)
    run = Run.new(merged)
    return Start(run=run, checkpoint=found, messages=[f"going on from {found} in {run.folder}", *messages])


def _continue(saved: Run, found: Path | None, settings: Settings) -> Start:
    found = found or checkpoint.latest_good(saved.checkpoints)
    merged, messages = merge(saved.settings, settings)
    _check_here(merged)
    if found is None:
        messages.append(f"{saved.folder} has no good checkpoint yet; starting it from the beginning")
    else:
        messages.append(f"resuming {found}")
    return Start(run=Run(saved.folder, merged), checkpoint=found, messages=messages)


def _check_here(settings: Settings) -> None:
    """Raise LowVRAMError where what the run was begun with is not on this machine, and no other place is named."""
    paths = {"data.path": settings.data.path, "data.masks": settings.data.masks}
    if settings.task == "stable_diffusion":  # of others the checkpoints hold all that is needed
        paths["weights"] = settings.weights
    if isinstance(settings, ProjectedGanSettings):
        paths["projection.backbone_weights"] = settings.projection.backbone_weights
    for name, path in paths.items():
        if path in (None, "alpha", "random") or name in settings.overrides or _exists(path):
            continue
        raise LowVRAMError(
            f"{name}={path}, which the run was begun with, is not on this machine.",
            f"Add {name}=... with its place here: with a copy the run goes on as if nothing had happened.",
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name that no file can have, or a home that is not there
        return False


def merge(saved: Settings, given: Settings) -> tuple[Settings, list[str]]:
    """Saved settings with those replaced that the user named, and a line for each difference."""
    values = settings_values(saved)
    messages = []
    for name, (old, new) in differences(saved, given).items():
        by_name = name in given.overrides
        if name in INVOCATION or by_name:
            _set(values, name, new)
        if name in _OF_MACHINE and not by_name and old:
            messages.append(f"{name}={old} was of the session before; name it again if it holds on this machine")
        if name in INVOCATION:
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
