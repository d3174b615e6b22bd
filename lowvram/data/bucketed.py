"""Images in the shape of their aspect-ratio bucket, rather than as squares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowvram.data.buckets import assign, make_buckets, read_sizes
from lowvram.data.dataset import DerivedSet, ImageSet, Picture
from lowvram.data.decode import MAX_FILE_BYTES, decode_to
from lowvram.data.images import FileSet
from lowvram.data.latent_files import digest_of
from lowvram.data.latents import LatentSet
from lowvram.errors import LowVRAMError


class BucketedSet(DerivedSet):
    """A set of images of which `load` gives each in the shape of its bucket, uint8 [height, width, 3].

    It is for `latents.build`, with `picture_sizes`; batches are read from the latents. Buckets have at most the area
    of the square of `images.resolution`, which is one of them.

    images: a folder or a zip, or else a set of squares. multiple: of the sides of buckets, in pixels.
    min_images: see `assign`. An image whose header cannot be read goes where most others are.
    picture_sizes: width and height of each picture, int64 [N, 2].
    Raises LowVRAMError where the resolution leaves no shape but the square.
    """

    def __init__(self, images: ImageSet, *, multiple: int, min_images: int = 1, max_ratio: float = 2.0) -> None:
        super().__init__(images)
        buckets = make_buckets(images.resolution**2, multiple=multiple, max_ratio=max_ratio)
        if len(buckets) == 1:
            raise LowVRAMError(
                f"buckets whose sides are multiples of {multiple} leave nothing but the square at "
                f"resolution={images.resolution}",
                "Use a higher resolution, or data.buckets=false.",
            )
        sizes = read_sizes(images)
        readable = (sizes > 0).all(axis=1)
        among = assign(sizes[readable] if readable.any() else sizes, buckets, min_images=min_images)
        number = np.full(len(images), np.bincount(among).argmax(), np.int64)
        if readable.any():
            number[readable] = among
        self.picture_sizes = np.array(buckets, np.int64)[number]
        self._lost = _lost(sizes[readable], self.picture_sizes[readable])
        self._lost_by_squares = _lost(sizes[readable], np.ones((int(readable.sum()), 2), np.int64))

    def load(self, index: int) -> Picture:
        width, height = self.picture_sizes[index].tolist()
        if isinstance(self.images, FileSet):
            file = self.images.files[index]
            return decode_to(self.images.read_file(file, MAX_FILE_BYTES), file=file, size=(width, height))
        if (width, height) != (self.resolution, self.resolution):
            raise ValueError(f"{self.images.name} has squares alone, and {width}x{height} is wanted")
        return self.images.load(index)

    def identity(self) -> list[str]:
        return [self.images.fingerprint, digest_of(self.picture_sizes.tolist())]

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of what `read` gives. Raises LowVRAMError where the images are of several shapes."""
        shapes = np.unique(self.picture_sizes, axis=0)
        if len(shapes) > 1:
            raise LowVRAMError(f"the images of {self.name} are of {len(shapes)} shapes", "Read them one by one.")
        return (self.channels, int(shapes[0, 1]), int(shapes[0, 0]))

    def summary(self) -> str:
        """How many shapes there are, and what is lost, in a line for the user."""
        shapes, counts = np.unique(self.picture_sizes, axis=0, return_counts=True)
        each = [f"{w}x{h} ({n:,})" for (w, h), n in zip(shapes.tolist(), counts.tolist(), strict=True)]
        return (
            f"{len(each)} shape{'s' * (len(each) > 1)} (width x height) and their images: {', '.join(each)}; "
            f"{self._lost:.1%} of an image is cut away, by squares {self._lost_by_squares:.1%}"
        )


def shape_numbers(items: ImageSet) -> NDArray[np.int64] | None:
    """The number of each item's shape, int64 [N], where they are latents of several; None where all are alike."""
    if not isinstance(items, LatentSet):
        return None
    numbers: dict[tuple[int, ...], int] = {}
    found = [numbers.setdefault(items.shape_of(index), len(numbers)) for index in range(len(items))]
    return np.array(found, np.int64) if len(numbers) > 1 else None


def _lost(sizes: NDArray[np.int64], shapes: NDArray[np.int64]) -> float:
    """The share of an image that a cut to its shape takes away, the mean over images. Both [N, 2]."""
    if not len(sizes):
        return 0.0
    proportions = (sizes[:, 0] / sizes[:, 1]) / (shapes[:, 0] / shapes[:, 1])
    return float(1 - np.minimum(proportions, 1 / proportions).mean())
