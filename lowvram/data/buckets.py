"""Images of many shapes in batches of one shape each: aspect-ratio buckets, as described by NovelAI (2022).

Each image belongs to the bucket whose shape loses least of it; a batch is drawn from one bucket. All buckets have
about the same area, so that no batch needs more memory than the square one.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowvram.data.dataset import BadImageError, ImageSet
from lowvram.errors import LowVRAMError


def make_buckets(area_pixels: int, *, multiple: int = 64, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """The shapes (width, height) to train on, from the narrowest to the widest.

    Sides are multiples of `multiple`; no shape has more than `area_pixels` or a longer side above `max_ratio` times
    the shorter. Of these, each shape that could not grow on either side is a bucket, and the largest square.
    Raises LowVRAMError for an area below one square of `multiple`.
    """
    if multiple < 1 or area_pixels < multiple**2:
        raise LowVRAMError(
            f"buckets of area_pixels={area_pixels} and multiple={multiple} hold no shape at all",
            "Use an area of at least multiple * multiple, such as 512 * 512 and 64.",
        )
    if not max_ratio >= 1:
        raise LowVRAMError(f"max_ratio={max_ratio} must be at least 1", "1 gives the square alone; 2 is usual.")
    largest = area_pixels // multiple**2  # area in squares of `multiple`, as are the sides below
    side = math.isqrt(largest)
    shapes = {(side, side)}
    for width in range(1, largest + 1):
        height = largest // width
        grows = (width + 1) * height <= largest
        if not grows and max(width, height) <= max_ratio * min(width, height):
            shapes.add((width, height))
    return [(w * multiple, h * multiple) for w, h in sorted(shapes, key=lambda shape: shape[0] / shape[1])]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How an image becomes a bucket's shape: cut `box` (left, top, right, bottom, in its pixels), resize to `size`.

    lost: share of the image's area that is cut away. scale: of the resize; above 1 the image is enlarged.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    lost: float
    scale: float


def fit(size: tuple[int, int], bucket: tuple[int, int]) -> Fit:
    """The largest centred cut of an image (width, height) in the proportions of a bucket (width, height).

    It spans the image on one side; the other is rounded to whole pixels, so that a resize to the bucket distorts by
    half a pixel at most.
    """
    (width, height), (bucket_width, bucket_height) = size, bucket
    if min(width, height, bucket_width, bucket_height) < 1:
        raise ValueError(f"an image of {width}x{height} cannot become {bucket_width}x{bucket_height}")
    if width * bucket_height > height * bucket_width:  # wider than the bucket: the sides go
        cut_width, cut_height = max(1, round(height * bucket_width / bucket_height)), height
    else:
        cut_width, cut_height = width, max(1, round(width * bucket_height / bucket_width))
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return Fit(
        box=(left, top, left + cut_width, top + cut_height),
        size=bucket,
        lost=1 - cut_width * cut_height / (width * height),
        scale=max(bucket_width / cut_width, bucket_height / cut_height),
    )


def read_sizes(images: ImageSet) -> NDArray[np.int64]:
    """Width and height of each image, int64 [N, 2], from the headers alone; 0, 0 for one that cannot be read."""
    sizes = np.zeros((len(images), 2), np.int64)
    for index in range(len(images)):
        try:
            sizes[index] = images.size(index)
        except BadImageError:  # training finds it again, and says so once
            continue
    return sizes


def assign(sizes: NDArray[np.int64], buckets: Sequence[tuple[int, int]], *, min_images: int = 1) -> NDArray[np.int64]:
    """The number of each image's bucket, int64 [N]: the one that loses least of it, the larger one of two equals.

    sizes: width and height, int64 [N, 2]; 0, 0 counts as a square.
    min_images: a bucket with fewer is given up, the emptiest first, and its images go to the next best. With the
    batch size here, no batch shows an image twice but at the turn of a pass (see `BucketPlan`). One bucket stays.
    """
    if not len(buckets):
        raise LowVRAMError("there are no buckets", "Make some with make_buckets.")
    whole = np.where(sizes > 0, sizes, 1).astype(np.float64)
    ratio = np.where((sizes > 0).all(axis=1), whole[:, 0] / whole[:, 1], 1.0)
    shapes = np.array(buckets, dtype=np.float64)
    # What is kept of an image of ratio r in a bucket of ratio b is min(r / b, b / r): the nearest in log r loses least.
    distance = np.abs(np.log(ratio)[:, None] - np.log(shapes[:, 0] / shapes[:, 1])[None])  # [N, buckets]
    by_area = np.argsort(-shapes.prod(axis=1), kind="stable")
    distance = distance[:, by_area].round(9)
    while True:
        choice = distance.argmin(axis=1)
        counts = np.bincount(choice, minlength=len(buckets)).astype(np.float64)
        counts[counts == 0] = np.inf  # empty already, or given up
        emptiest = int(counts.argmin())
        if counts[emptiest] >= min_images or np.isfinite(counts).sum() <= 1:
            return by_area[choice].astype(np.int64)
        distance[:, emptiest] = np.inf


class BucketPlan:
    """Which images each batch holds, without end: a function of (bucket_of_image, batch, seed) and the batch's number.

    A bucket of n images is an endless row of passes, each a shuffle of all n; its batches are cut from that row one
    after the other, full ones only. By the end of epoch e (from 0) a bucket has given floor((e + 1) * n / batch)
    batches, and the fewer than `batch` images that are left over open its first batch of a later epoch. So:

    - every batch is full, and of one bucket;
    - in the row of a bucket each image comes exactly once in each pass; none is dropped, none preferred;
    - after e + 1 epochs a bucket has shown (e + 1) * n - r images, 0 <= r < batch; where n >= batch, each image was
      shown e or e + 1 times;
    - after any batch, two images of a bucket differ by at most one showing;
    - a batch holds an image twice only where it spans the turn of a pass, or n < batch (see `assign`).

    Within an epoch the buckets take turns at random. An epoch is len(bucket_of_image) / batch batches, give or
    take one for each bucket.
    """

    def __init__(self, bucket_of_image: NDArray[np.int64], *, batch: int, seed: int) -> None:
        if batch < 1:
            raise LowVRAMError(f"batch={batch} must be at least 1", "Use 1 or more.")
        if not len(bucket_of_image):
            raise LowVRAMError("there are no images to plan for", "Give at least one.")
        self.batch = batch
        self.seed = seed
        numbers = np.unique(bucket_of_image).tolist()
        self._members = [np.flatnonzero(bucket_of_image == number).astype(np.int64) for number in numbers]
        self._pass = functools.lru_cache(maxsize=2 * len(numbers))(self._shuffle)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled_epoch)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pass", "_order")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._pass = functools.lru_cache(maxsize=2 * len(self._members))(self._shuffle)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled_epoch)

    def first_batch(self, epoch: int) -> int:
        """The number of the first batch of an epoch: how many batches come before it."""
        return sum(epoch * len(members) // self.batch for members in self._members)

    def epoch_of(self, number: int) -> int:
        """The epoch that batch `number` belongs to."""
        if number < 0:
            raise ValueError(f"batch number {number} must not be negative")
        images = sum(len(members) for members in self._members)
        most = (number + len(self._members)) * self.batch // images + 1
        return bisect.bisect_right(range(most + 1), number, key=self.first_batch) - 1

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch in their order: image indices, int64 [batch] each."""
        return [self._batch(*entry) for entry in self._order(epoch)]

    def images_of(self, number: int) -> NDArray[np.int64]:
        """The images of batch `number` of the whole run: int64 [batch]."""
        epoch = self.epoch_of(number)
        return self._batch(*self._order(epoch)[number - self.first_batch(epoch)])

    def lookup(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The image at each position of the stream that all batches make, one after the other: int64, its shape."""
        numbers, rows = np.divmod(position, self.batch)
        index = np.empty_like(position)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            index[chosen] = self.images_of(number)[rows[chosen]]
        return index

    def _shuffled_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number of the batch in the row of this bucket) of each batch of an epoch."""
        spans = [
            (epoch * len(members) // self.batch, (epoch + 1) * len(members) // self.batch) for members in self._members
        ]
        buckets = np.repeat(np.arange(len(spans)), [stop - start for start, stop in spans])
        # Only whose turn it is gets shuffled: each bucket's own batches stay in the order of its row.
        following = [start for start, _ in spans]
        entries = []
        for bucket in _random(self.seed, epoch, _ORDER).permutation(buckets).tolist():
            entries.append((bucket, following[bucket]))
            following[bucket] += 1
        return entries

    def _batch(self, bucket: int, number: int) -> NDArray[np.int64]:
        members = self._members[bucket]
        position = np.arange(number * self.batch, (number + 1) * self.batch, dtype=np.int64)
        passes, offset = np.divmod(position, len(members))
        rows = [self._pass(bucket, turn)[offset[passes == turn]] for turn in np.unique(passes).tolist()]
        return members[np.concatenate(rows)]

    def _shuffle(self, bucket: int, turn: int) -> NDArray[np.int64]:
        return _random(self.seed, turn, bucket).permutation(len(self._members[bucket])).astype(np.int64)


_ORDER = 0xFFFFFFFF  # no bucket's number


def _random(seed: int, turn: int, bucket: int) -> np.random.RandomState:
    # RandomState keeps its numbers from one numpy to the next, which the newer generators do not promise.
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, turn & 0xFFFFFFFF, (turn >> 32) & 0xFFFFFFFF, bucket]
    return np.random.RandomState(words)
