"""The origin of what a run makes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.errors import LowVRAMError
from lowvram.marks import digests
from lowvram.marks.mark import Mark, make_mark
from lowvram.marks.origin import COMPOSITE, DRAWN, GENERATED, Origin

if TYPE_CHECKING:
    from lowvram.settings import Settings


def check_grid(settings: "Settings") -> None:
    """Raise LowVRAMError unless the sample grids of a training can be marked as its settings say."""
    from lowvram.sampling.grids import grid_shape

    mark = make_mark(settings.mark, Origin())
    if mark is not None:
        rows, columns = grid_shape(settings.grid)
        mark.check(columns * settings.resolution, rows * settings.resolution)


def run_mark(
    settings: "Settings", networks: Iterable[str], checkpoint: Path | None, images: int, progress: tuple[int, int]
) -> Mark | None:
    """The mark of a training's sample grid, see `origin_of_run`."""
    if not settings.mark.enabled:
        return None
    origin = replace(origin_of_run(settings, networks, checkpoint, progress), seed=settings.seed, images=images)
    return make_mark(settings.mark, origin)


def data_mark(settings: "Settings", images: int) -> Mark | None:
    """The mark of pictures of the data set. What a user's own are is not ours to say: None."""
    if not settings.mark.enabled or settings.data.path is not None:
        return None
    return Mark(origin=Origin(source=DRAWN, images=images))


def origin_of_run(
    settings: "Settings", networks: Iterable[str], checkpoint: Path | None, progress: tuple[int, int] = (0, 0)
) -> Origin:
    """What is sampled from a checkpoint of a run, or with None from networks that none was written of.

    networks: the names of those that sampling uses. What an autoencoder gives back are images that it was shown.
    progress: (step, images seen) without a checkpoint.
    """
    origin = Origin(
        source=COMPOSITE if settings.task == "autoencoder" else GENERATED,
        recipe=settings.recipe,
        weights=None if settings.weights is None else names_of([settings.weights]),
    )
    if checkpoint is None:
        return replace(origin, step=progress[0], images_seen=progress[1])
    try:
        step, images_seen = digests.progress_of(checkpoint)
        hashed = digests.of_checkpoint(checkpoint, networks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LowVRAMError(
            f"checkpoint {checkpoint} can't be read: {error}.", "Use another one, or resume=auto."
        ) from error
    return replace(origin, checkpoint=hashed, step=step, images_seen=images_seen)


def origin_of_weights(weights: Sequence[str], base: str | None = None) -> Origin:
    """What is sampled from files: their names, and the hash of all of them. They are read whole for it.

    Of a folder with a pipeline, those that are read of it are named and hashed, and not what else is there, such as
    the same weights in another precision.

    Raises:
        LowVRAMError: they can't be read.
    """
    given = [*weights, *([base] if base else [])]
    files: list[tuple[str, Path]] = []
    names = []
    for name in given:
        path = Path(name.strip()).expanduser()
        within = _read_of(path) if path.is_dir() else {}
        files += within.items() or ([(path.name, path)] if path.exists() else [])  # "random" is none
        names.append(names_of([name]) + (f" ({', '.join(within)})" if within else ""))
    try:
        hashed = digests.of_files(files) if files else None
    except OSError as error:
        raise LowVRAMError(f"weights can't be read: {error}.", "Give files that can be read.") from error
    return Origin(checkpoint=hashed, weights=" | ".join(names))


def _read_of(folder: Path) -> dict[str, Path]:
    """The files that a folder's pipeline is read from, by their names in it, or in its one snapshot."""
    from lowvram.weights.pipeline import open_pipeline
    from lowvram.weights.pipeline_folder import snapshot

    files = sorted(open_pipeline(folder).files())
    return {path.relative_to(snapshot(folder)).as_posix(): path for path in files}


def names_of(paths: Sequence[str]) -> str:
    """Files without the folders that they lie in, which are the user's own affair."""
    return " | ".join(Path(path.strip()).name for path in paths)
