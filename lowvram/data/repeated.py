"""Sets that show some images more often than others in an epoch, and two sets as one.

Both are lists of which item is where: nothing is decoded, encoded or kept twice. They go over pictures, and over
latents that were made of the plain images.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvram.data.dataset import DerivedSet, Fetched, ImageSet, Item, Picture, SkipLog
from lowvram.data.images import FileSet
from lowvram.data.latent_files import Variants, digest_of
from lowvram.data.latents import LatentSet
from lowvram.errors import LowVRAMError

__all__ = ["JoinedSet", "RepeatedSet", "repeats_of_folders"]

MOST_REPEATS = 10_000
_PREFIX = re.compile(r"(\d+)_")


def repeats_of_folders(images: ImageSet) -> list[int]:
    """How often an epoch shows each image, by its folder's name: 10 for "10_name/1.png", as other trainers have it.

    The nearest folder whose name begins with a number and "_" counts; without one, and for what lies in no folder, it
    is 1.
    Raises LowVRAMError for a folder's number of 0, or one above 10,000, which is rather a date.
    """
    while isinstance(images, DerivedSet) and len(images) == len(images.images):
        images = images.images
    if not isinstance(images, FileSet):
        return [1] * len(images)
    of_folder: dict[str, int] = {}
    out = []
    for file in images.files:
        folder = str(PurePosixPath(file).parent)
        if folder not in of_folder:
            of_folder[folder] = _repeats_of(folder, images)
        out.append(of_folder[folder])
    return out


def _repeats_of(folder: str, images: FileSet) -> int:
    for part in reversed(PurePosixPath(folder).parts):
        found = _PREFIX.match(part)
        if found is None:
            continue
        repeats = int(found[1][:20])
        if not 1 <= repeats <= MOST_REPEATS:
            raise LowVRAMError(
                f"the folder {part!r} of {images.name} asks for its images {repeats:,} times in each epoch",
                f"Let its name begin with 1_ to {MOST_REPEATS}_, or otherwise than with a number and _.",
            )
        return repeats
    return 1


class _View(ImageSet):
    """Items of other sets.

    parts: the sets. part_of, row_of: of each item the set, and the index in it, int64 [N]. What a set puts in the place
    of a bad image is of that set, with its label.
    """

    def __init__(
        self,
        parts: Sequence[ImageSet],
        part_of: NDArray[np.int64],
        row_of: NDArray[np.int64],
        *,
        name: str,
        labels: NDArray[np.int64] | None,
        class_names: list[str],
        skip_log: SkipLog,
    ) -> None:
        # By name, since for latents the next class in line is another.
        ImageSet.__init__(
            self,
            name=name,
            resolution=parts[0].resolution,
            labels=labels,
            class_names=class_names,
            on_bad_file=parts[0].on_bad_file,
            bad_file_limit=skip_log.limit,
        )
        self.parts = list(parts)
        self.skip_log = skip_log
        self.crops = min(part.crops for part in parts)
        self.item_dtype = parts[0].item_dtype
        self._part_of = part_of
        self._row_of = row_of

    def _place(self, index: int) -> tuple[ImageSet, int]:
        return self.parts[self._part_of[index]], int(self._row_of[index])

    def __len__(self) -> int:
        return len(self._row_of)

    def load(self, index: int) -> Picture:
        part, row = self._place(index)
        return part.load(row)

    def fetch(self, index: int) -> Fetched:
        part, row = self._place(index)
        return part.fetch(row)

    def read(self, index: int, *, mirrored: bool = False, crop: int = 0) -> Item:
        part, row = self._place(index)
        return part.read(row, mirrored=mirrored, crop=crop)

    def file_name(self, index: int) -> str:
        part, row = self._place(index)
        return part.file_name(row)

    def size(self, index: int) -> tuple[int, int]:
        part, row = self._place(index)
        return part.size(row)

    def times(self) -> list[str]:
        return [time for part in self.parts for time in part.times()]

    @property
    def item_shape(self) -> tuple[int, ...]:
        return self.parts[0].item_shape


class RepeatedSet(_View, DerivedSet):
    """A set of which an epoch shows image i `repeats[i]` times, one after the other before they are shuffled.

    Of latents (LatentSet) it is a set of latents. File names, labels and the log of bad files are those of `images`.

    Args:
        images: the plain set, `self.images`.
        repeats: 1 or more for each image, as `repeats_of_folders` gives them.

    Raises:
        LowVRAMError: there are more or fewer of them than images, or one is below 1.
    """

    def __new__(cls, images: ImageSet | None = None, *_: Any, **__: Any) -> RepeatedSet:
        """Of latents, the kind that a loader takes for latents. Without arguments for pickle, which knows the kind."""
        return object.__new__(_RepeatedLatents if cls is RepeatedSet and isinstance(images, LatentSet) else cls)

    def __init__(self, images: ImageSet, repeats: Sequence[int]) -> None:
        counts = np.asarray(repeats, np.int64)
        if counts.shape != (len(images),):
            raise LowVRAMError(f"{len(counts)} repeats for the {len(images)} images of {images.name}", "Give one each.")
        if counts.min() < 1:
            at = int(counts.argmin())
            raise LowVRAMError(
                f"{images.file_name(at)} of {images.name} is to be shown {counts[at]} times in each epoch",
                "Use 1 or more, or remove the image.",
            )
        # The index in `images` of each item, int64 [N].
        self.sources: NDArray[np.int64] = np.repeat(np.arange(len(images), dtype=np.int64), counts)
        super().__init__(
            [images],
            np.zeros_like(self.sources),
            self.sources,
            name=images.name,
            labels=None if images.labels is None else images.labels[self.sources],
            class_names=images.class_names,
            skip_log=images.skip_log,
        )
        self.images = images
        self._repeats_digest = digest_of(counts.tolist())

    def identity(self) -> list[str]:
        return [self.images.fingerprint, self._repeats_digest]


class JoinedSet(_View):
    """The items of two sets, as prior preservation has one's own images beside images of their class.

    A label is the index of the item's image in one list: the images of `first`, then those of `second`; so captions of
    both, one list behind the other, go with it. Of a RepeatedSet the plain images count. Where some latents have masks,
    the others count whole.

    Args:
        first, second: pictures of one resolution, or latents of one autoencoder.
        balance: the smaller set is repeated until both have the same count in an epoch; images at its beginning may be
            shown once more than the others.

    Attributes:
        own: how many images `first` has; labels below it are of `first`.

    Raises:
        LowVRAMError: the items of the two sets are of different kinds or sizes.
    """

    def __new__(cls, first: ImageSet | None = None, *_: Any, **__: Any) -> JoinedSet:
        """As `RepeatedSet.__new__`."""
        return object.__new__(_JoinedLatents if cls is JoinedSet and isinstance(first, LatentSet) else cls)

    def __init__(self, first: ImageSet, second: ImageSet, balance: bool = True) -> None:
        _check_alike(first, second)
        most = max(len(first), len(second))
        parts, rows = [], []
        offset = 0
        for images in (first, second):
            plain, sources = _plain(images)
            # A copy with labels of its own: an image that takes the place of a bad one brings its own along.
            part = copy.copy(plain)
            part.labels = np.arange(offset, offset + len(plain), dtype=np.int64)
            part.class_names = []
            parts.append(part)
            rows.append(np.resize(sources, most) if balance else sources)
            offset += len(plain)
        self.own = len(parts[0])
        part_of = np.repeat(np.arange(2, dtype=np.int64), [len(row) for row in rows])
        row_of = np.concatenate(rows)
        log = SkipLog(limit=first.bad_file_limit + second.bad_file_limit, set_name=f"{first.name} and {second.name}")
        log.lines = list(dict.fromkeys([*first.skip_log.lines, *second.skip_log.lines]))  # said already
        super().__init__(
            parts,
            part_of,
            row_of,
            name=log.set_name,
            labels=np.where(part_of == 0, row_of, row_of + self.own),
            class_names=[],
            skip_log=log,
        )
        self.images = first
        self._made_of = [first.fingerprint, second.fingerprint, str(balance)]

    def identity(self) -> list[str]:
        return self._made_of


def _plain(images: ImageSet) -> tuple[ImageSet, NDArray[np.int64]]:
    """The set without repeats, and the index in it of each item, int64 [N]."""
    if isinstance(images, RepeatedSet):
        plain, sources = _plain(images.images)
        return plain, sources[images.sources]
    return images, np.arange(len(images), dtype=np.int64)


def _check_alike(first: ImageSet, second: ImageSet) -> None:
    different = None
    if isinstance(first, LatentSet) != isinstance(second, LatentSet) or first.item_dtype != second.item_dtype:
        different = "one has latents, the other pictures"
    elif first.resolution != second.resolution:
        different = f"one is of {first.resolution} pixels, the other of {second.resolution}"
    elif isinstance(first, LatentSet) and isinstance(second, LatentSet):
        channels = [found.shape_of(0)[0] - found.masked for found in (first, second)]
        if channels[0] != channels[1]:
            different = f"one has {channels[0]} channels of latents, the other {channels[1]}"
    if different is not None:
        raise LowVRAMError(
            f"{first.name} and {second.name} can't be read as one: {different}", "Open both in the same way."
        )


class _LatentView(_View, LatentSet):
    """A view that is latents itself: it has all that a LatentSet has."""

    parts: list[LatentSet]  # type: ignore[assignment]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        kept = [part.variants for part in self.parts]
        self.variants = Variants(mirror=all(each.mirror for each in kept), crops=self.crops)
        self.masked = any(part.masked for part in self.parts)
        self.folder = self.parts[0].folder
        self._item_of = [np.full(len(part), -1, np.int64) for part in self.parts]  # the first that shows an image
        for number, first in enumerate(self._item_of):
            items = np.flatnonzero(self._part_of == number)
            rows, place = np.unique(self._row_of[items], return_index=True)
            first[rows] = items[place]

    def __getstate__(self) -> dict[str, object]:
        return dict(self.__dict__)  # it has no file open itself

    def _latents(self, index: int) -> tuple[LatentSet, int]:
        return self.parts[self._part_of[index]], int(self._row_of[index])

    def shape_of(self, index: int) -> tuple[int, ...]:
        part, row = self._latents(index)
        channels, height, width = part.shape_of(row)
        return channels + (self.masked and not part.masked), height, width

    @property
    def item_shape(self) -> tuple[int, ...]:
        shapes = {self.shape_of(index) for index in range(len(self))}
        if len(shapes) > 1:
            raise LowVRAMError(
                f"the latents of {self.name} are of {len(shapes)} shapes", "Draw batches of one shape, from buckets."
            )
        return next(iter(shapes))

    def resolve(self, index: int) -> tuple[int, list[str]]:
        part, row = self._latents(index)
        at, skipped = part.resolve(row)
        return int(self._item_of[self._part_of[index]][at]), skipped

    def moments(self, index: int, mirrored: bool = False, crop: int = 0) -> NDArray[np.float16]:
        part, row = self._latents(index)
        return part.moments(row, mirrored, crop)

    def mask(self, index: int, mirrored: bool = False, crop: int = 0) -> NDArray[np.float16]:
        part, row = self._latents(index)
        return part.mask(row, mirrored, crop)

    def read(self, index: int, *, mirrored: bool = False, crop: int = 0) -> Item:
        part, row = self._latents(index)
        item = part.read(row, mirrored=mirrored, crop=crop)
        if self.masked and not part.masked:
            whole = np.concatenate([item.array, np.ones_like(item.array[:1])])
            item = item._replace(array=whole)
        return item


class _RepeatedLatents(RepeatedSet, _LatentView):
    pass


class _JoinedLatents(JoinedSet, _LatentView):
    pass
