"""A path -> the images there."""

from __future__ import annotations

import zipfile
from pathlib import Path

from lowvram.data.dataset import ImageSet
from lowvram.errors import LowVRAMError


def open_dataset(
    path: str | Path | None,
    *,
    resolution: int,
    labels: bool = False,
    max_images: int | None = None,
    on_bad_file: str = "skip",
    bad_file_limit: int = 100,
    builtin_count: int = 10_000,
) -> ImageSet:
    """Open a folder (read recursively), a zip, or for None the built-in drawn faces.

    resolution: each image is centre-cropped and resized to this many pixels a side.
    labels: also read class labels, from dataset.json, or else from the names of the first-level folders.
    max_images: use a fixed random choice of this many.
    on_bad_file: "skip" puts the next good image in the place of one that cannot be used, up to `bad_file_limit`
    distinct files; "error" stops at the first.
    Raises LowVRAMError for a path that is missing, empty, no zip, or unsafe, and for labels that do not fit.
    """
    _check_settings(resolution, max_images, on_bad_file, bad_file_limit, builtin_count)
    if path is None:
        from lowvram.data.peeps import PeepsSet

        count = builtin_count if max_images is None else min(builtin_count, max_images)
        return PeepsSet(resolution=resolution, count=count, labels=labels)

    from lowvram.data.images import FolderSet, ZipSet

    if not str(path).strip():
        raise LowVRAMError("data.path is empty", "Leave it out to train on the built-in drawn faces.")
    place = Path(path).expanduser()
    try:
        there = place.exists()
    except OSError as error:
        raise LowVRAMError(
            f"data.path={path} cannot be looked at: {error.strerror or error}", "Check its name and permissions."
        ) from error
    if not there:
        raise LowVRAMError(
            f"data.path={path} does not exist" + (f" (looked in {Path.cwd()})" if not place.is_absolute() else ""),
            "Give a folder or a zip of images, or leave data.path out to train on the built-in drawn faces.",
        )
    if not place.is_dir() and not (place.is_file() and _looks_like_zip(place)):
        raise LowVRAMError(
            f"data.path={path} is a file, but not a zip archive",
            "Give a folder or a zip of images; other archives must be unpacked, or packed again as zip.",
        )
    kind = FolderSet if place.is_dir() else ZipSet
    return kind(
        place,
        resolution=resolution,
        labels=labels,
        max_images=max_images,
        on_bad_file=on_bad_file,
        bad_file_limit=bad_file_limit,
    )


def _looks_like_zip(file: Path) -> bool:
    """Whether to open a file as zip: by its suffix, since a cut-off zip no longer looks like one, or by content."""
    return file.suffix.lower() == ".zip" or zipfile.is_zipfile(file)


def _check_settings(
    resolution: int, max_images: int | None, on_bad_file: str, bad_file_limit: int, builtin_count: int
) -> None:
    if resolution < 1:
        raise LowVRAMError(f"resolution={resolution} must be at least 1", "Use a power of two, such as 256.")
    if max_images is not None and max_images < 1:
        raise LowVRAMError(f"data.max_images={max_images} must be at least 1", "Leave it out to use every image.")
    if on_bad_file not in ("skip", "error"):
        raise LowVRAMError(f"data.on_bad_file={on_bad_file} is neither skip nor error", "Use one of the two.")
    if bad_file_limit < 0:
        raise LowVRAMError(f"data.bad_file_limit={bad_file_limit} must not be negative", "Use 0 to allow none.")
    if builtin_count < 1:
        raise LowVRAMError(f"data.builtin_count={builtin_count} must be at least 1", "Use 10000, the default.")
