"""What Stable Diffusion XL is told of an image's size and cut (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvram.data.bucketed import BucketedSet
from lowvram.data.buckets import fit, read_sizes
from lowvram.data.dataset import DerivedSet, ImageSet
from lowvram.data.image_cache import cache_root
from lowvram.data.latent_files import Variants, digest_of
from lowvram.data.latents import _cut


def size_ids(images: ImageSet, *, variants: Variants, larger: int | None = None) -> NDArray[np.int64]:
    """Six numbers for each variant of each image, int64 [N, variants, 6]: height and width of the original; top and
    left of the cut, in pixels of the image as it was resized for it; height and width of the cut.

    images: squares, or a BucketedSet; or what is derived from these, image for image, such as their latents.
    variants: in the order of `Variants.number`. A mirrored picture is one cut from the mirrored image.
    larger: the resolution that all crops but the first are cut from; for variants.crops > 1.

    The original's size is of the upright image. An image whose header cannot be read counts as one of the size of its
    cut.
    """
    sizes = original_sizes(images)
    pictures = _picture_sizes(images)
    out = np.empty((len(images), variants.count, 6), np.int64)
    for index, (original, picture) in enumerate(zip(sizes.tolist(), pictures.tolist(), strict=True)):
        for crop in range(variants.crops):
            for mirrored in (False, True) if variants.mirror else (False,):
                ids = _ids(tuple(original), tuple(picture), index, crop, mirrored, larger)
                out[index, variants.number(mirrored, crop)] = ids
    return out


def original_sizes(images: ImageSet) -> NDArray[np.int64]:
    """Width and height of each image before it was cut, int64 [N, 2], from the headers; kept on disk.

    0, 0 for an image whose header cannot be read.
    """
    while isinstance(images, DerivedSet) and len(images) == len(images.images):
        images = images.images
    file = cache_root() / "sizes" / f"{digest_of([images.fingerprint, images.times()])}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        kept = np.load(file, allow_pickle=False)
        if kept.shape == (len(images), 2) and kept.dtype == np.int64:
            return kept
    sizes = read_sizes(images)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            np.save(handle, sizes)
        temporary.replace(file)
    except OSError:  # a cache that cannot be written costs seconds, and says so where pictures are kept
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return sizes


def _picture_sizes(images: ImageSet) -> NDArray[np.int64]:
    """Width and height of the picture that is made of each image, int64 [N, 2]."""
    inner = images
    while isinstance(inner, DerivedSet) and len(inner) == len(inner.images):
        if isinstance(inner, BucketedSet):
            return inner.picture_sizes
        inner = inner.images
    return np.full((len(images), 2), images.resolution, np.int64)


def _ids(
    original: tuple[int, int], picture: tuple[int, int], index: int, crop: int, mirrored: bool, larger: int | None
) -> list[int]:
    """Of one variant; original, picture: (width, height)."""
    width, height = picture
    if min(original) < 1:
        return [height, width, 0, 0, height, width]
    resized = picture if crop == 0 else (larger or width, larger or height)  # what the picture is cut from
    whole = fit(original, resized)
    left, top, right, bottom = whole.box
    across, down = resized[0] / (right - left), resized[1] / (bottom - top)
    first_column, first_row = round(left * across), round(top * down)
    if crop > 0:
        row, column = _cut_place(resized, picture, index, crop)
        first_row, first_column = first_row + row, first_column + column
    if mirrored:
        first_column = max(0, round(original[0] * across) - first_column - width)
    return [original[1], original[0], first_row, first_column, height, width]


def _cut_place(wide: tuple[int, int], picture: tuple[int, int], index: int, crop: int) -> tuple[int, int]:
    """The row and column where a further crop begins; wide, picture: (width, height)."""
    # Each pixel's own row, and its column: broadcast, they take no memory.
    rows: Any = np.broadcast_to(np.arange(wide[1])[:, None], (wide[1], wide[0]))
    columns: Any = np.broadcast_to(np.arange(wide[0])[None], (wide[1], wide[0]))
    shape = (picture[1], picture[0])
    return int(_cut(rows, shape, index, crop)[0, 0]), int(_cut(columns, shape, index, crop)[0, 0])
