"""Latents kept on disk, so that training holds no autoencoder: each image is encoded once, in all its variants.

A cache is a folder named after a hash of what it was made of, so that a stale one is never taken for another. In it
lie shards (safetensors: "moments", float16 [n, variants, 2C, h, w]; with masks their share of each latent pixel is one
more channel, the last) and index.json, which lists of each shard the images, the size and the hash. A shard is written
under another name and renamed, then listed: a build that was interrupted goes on with the shards that are not listed,
and a damaged shard is made again alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowvram.bars import bar
from lowvram.data.dataset import BadImageError, DerivedSet, ImageSet, Item, Picture, too_many_bad_files
from lowvram.data.latent_files import (
    FORMAT_VERSION,
    Index,
    Shard,
    Variants,
    check_space,
    digest_of,
    locked,
    ranges_of,
)
from lowvram.data.masks import Masks, to_latent_pixels
from lowvram.errors import LowVRAMError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LatentSet", "Variants", "build", "hash_weights"]

log = logging.getLogger(__name__)

_SHARD_BYTES = 128 * 2**20  # a shard is put together in memory
_OPEN_SHARDS = 128  # of each process: an open shard holds a file descriptor
_FLOAT16_MAX = 65504.0

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of the names, shapes, types and values of a state dict, for the key of what is made with it."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def build(
    cache_folder: str | Path,
    images: ImageSet,
    encode: Callable[[Tensor], Tensor],
    *,
    key: Mapping[str, Any],
    variants: Variants | None = None,
    larger: ImageSet | None = None,
    picture_sizes: NDArray[np.int64] | None = None,
    masks: Masks | None = None,
    shard_images: int = 1024,
    batch: int = 8,
    progress: bool = True,
) -> LatentSet:
    """The latents of a set of images: those that are kept and whole are used, the others made.

    encode: uint8 [n, 3, H, W] on the CPU, n <= batch, to moments [n, 2C, h, w] of any device and float type; h and w
    are H and W divided by the autoencoder's factor.
    key: what else the latents depend on, as JSON holds it: above all `hash_weights` of the autoencoder. The images
    (also their times of change), resolution and variants are part of the key already.
    larger: the same images opened at a higher resolution, needed for variants.crops > 1: crop 0 is the picture of
    `images`, each further one a cut of that size at a fixed random place of `larger`'s.
    picture_sizes: width and height of the picture that `images.load` gives for each image, int64 [N, 2], where they
    differ (aspect-ratio buckets); None where all are square.
    masks: of the images, see `open_masks`; kept beside the moments, cut and mirrored as they are.
    shard_images: at most this many images in a shard, and 128 MiB.
    A second process waits until the first is done, and then reads what that one made.
    Raises LowVRAMError: where the disk is full or cannot be written, keeping all shards that are complete; for
    moments that are not finite in float16, naming the image; for bad files, as `images` is set.
    """
    variants = variants or Variants()
    _check_larger(images, larger, variants)
    full_key = {
        "version": FORMAT_VERSION,
        "images": images.fingerprint,
        "times": digest_of(images.times()),
        "sizes": None if picture_sizes is None else digest_of(picture_sizes.tolist()),
        "variants": [variants.mirror, variants.crops],
        "larger": larger.resolution if larger is not None and variants.crops > 1 else None,
        "key": dict(key),
    }
    if masks is not None:  # no part of the key without them, so that caches from before there were any are found
        full_key["masks"] = masks.identity()
    folder = Path(cache_folder).expanduser() / f"latents-{digest_of(full_key)}"
    job = _Job(images, encode, variants=variants, larger=larger, masks=masks, batch=batch)
    with locked(folder, images.name):
        index = Index.read(folder, full_key)
        if index is None:
            index = Index(folder=folder, key=full_key, shards=job.plan(picture_sizes, shard_images))
        index.drop_damaged(progress)
        _fill(index, job, progress)
    identity = digest_of([dict(key), full_key["variants"]])
    return LatentSet(images, index, variants, identity=identity, masked=masks is not None)


def _fill(index: Index, job: _Job, progress: bool) -> None:
    """Make the shards that are not there."""
    missing = [shard for shard in index.shards if not shard.complete]
    if not missing:
        return
    index.write()
    check_space(index)
    with bar(sum(len(shard) for shard in missing), f"latents of {job.images.name}", "image", shown=progress) as shown:
        for shard in missing:
            index.add(shard, job.moments(shard, shown.update), job.bad)


def _check_larger(images: ImageSet, larger: ImageSet | None, variants: Variants) -> None:
    if variants.crops == 1:
        return
    if larger is None or larger.resolution <= images.resolution:
        raise LowVRAMError(
            f"crops={variants.crops} needs the images at more than {images.resolution} pixels to cut from",
            f"Open them again at resolution={images.resolution * 9 // 8}, or use crops=1.",
        )
    if len(larger) != len(images) or larger.identity() != images.identity():
        raise LowVRAMError(
            f"crops of {images.name} are to be cut from other images, {larger.name}", "Open the same images for both."
        )


class _Job:
    """What encodes: pictures of `images` in, the moments of a shard out."""

    def __init__(
        self,
        images: ImageSet,
        encode: Callable[[Tensor], Tensor],
        *,
        variants: Variants,
        larger: ImageSet | None,
        masks: Masks | None,
        batch: int,
    ) -> None:
        if batch < 1:
            raise LowVRAMError(f"batch={batch} must be at least 1", "Use 1 or more.")
        self.images = images
        self.encode = encode
        self.variants = variants
        self.larger = larger
        self.masks = masks
        self.batch = batch
        self.bad: dict[int, str] = {}  # image -> "file: reason"

    def plan(self, picture_sizes: NDArray[np.int64] | None, shard_images: int) -> list[Shard]:
        """Shards of one shape each, in the order of the images; one image is encoded to learn how large latents are."""
        if shard_images < 1:
            raise LowVRAMError(f"shard_images={shard_images} must be at least 1", "Use 1024.")
        first = self._first_good()
        height, width = first.shape[:2]
        moments = self._encoded([0], [first])[0]
        if moments.ndim != 3 or height % moments.shape[1] or width % moments.shape[2]:
            raise ValueError(f"encode made {list(moments.shape)} of an image of {width}x{height}, not [2C, h, w]")
        factors = height // moments.shape[1], width // moments.shape[2]
        square = np.full((len(self.images), 2), self.images.resolution, np.int64)
        sizes = square if picture_sizes is None else picture_sizes
        shards: list[Shard] = []
        for size in np.unique(sizes, axis=0).tolist():
            shape = (self.variants.count, moments.shape[0], size[1] // factors[0], size[0] // factors[1])
            members = np.flatnonzero((sizes == size).all(axis=1))
            step = max(1, min(shard_images, _SHARD_BYTES // (2 * math.prod(shape))))
            for start in range(0, len(members), step):
                chosen = members[start : start + step]
                shards.append(Shard(file=f"{len(shards):05d}.safetensors", ranges=ranges_of(chosen), shape=shape))
        return shards

    def _first_good(self) -> NDArray[np.uint8]:
        lines = []
        for index in range(len(self.images)):
            try:
                return self._load(self.images, index).pixels
            except BadImageError as bad:
                lines.append(str(bad))
                self._report(str(bad))
        raise too_many_bad_files(lines, self.images.bad_file_limit, self.images.name)

    def _report(self, line: str) -> None:
        if self.images.on_bad_file == "error":
            raise LowVRAMError(
                f"an image of {self.images.name} cannot be used: {line}",
                "Remove or replace it, or set data.on_bad_file=skip.",
            )
        self.images.skip_log.report([line])

    def moments(self, shard: Shard, advance: Callable[[int], object]) -> NDArray[np.float16]:
        """float16 [n, variants, 2C, h, w] of the shard's images; zeros for a bad image, which `bad` then tells of."""
        members = shard.images.tolist()
        out = np.zeros((len(members), *shard.shape), np.float16)
        starts = range(0, len(members), self.batch)
        chunks = [members[start : start + self.batch] for start in starts]
        # Images are decoded by a thread, a little ahead of the autoencoder.
        with contextlib.closing(_ahead(self._pictures, chunks)) as decoded:
            for start, chunk, pictures in zip(starts, chunks, decoded, strict=True):
                rows = [row for row, found in enumerate(pictures) if not isinstance(found, str)]
                for found in pictures:
                    if isinstance(found, str):
                        self._report(found)
                for variant in range(self.variants.count) if rows else ():
                    pixels = [pictures[row][variant] for row in rows]
                    moments = self._encoded([chunk[row] for row in rows], pixels)
                    if moments.shape[1:] != shard.shape[1:]:
                        raise ValueError(f"encode made {list(moments.shape[1:])}, where {list(shard.shape[1:])} is due")
                    out[[start + row for row in rows], variant] = moments
                advance(len(chunk))
        return out

    def _pictures(self, chunk: list[int]) -> list[Any]:
        """For each image its variants, uint8 [H, W, 3 or 4] each; or "file: reason" where it is bad."""
        return [self._variants_of(index) for index in chunk]

    def _variants_of(self, index: int) -> list[NDArray[np.uint8]] | str:
        try:
            picture = self._load(self.images, index)
            pixels = [picture.pixels]
            if self.larger is not None and self.variants.crops > 1:
                wide = self._load(self.larger, index).pixels
                pixels += [_cut(wide, picture.pixels.shape, index, crop) for crop in range(1, self.variants.crops)]
        except BadImageError as bad:
            self.bad[index] = str(bad)
            return str(bad)
        if picture.enlarged:
            self.images.skip_log.note_enlarged(self.images.file_name(index), self.images.resolution)
        flips = (False, True) if self.variants.mirror else (False,)
        return [crop[:, ::-1] if flip else crop for crop in pixels for flip in flips]

    def _load(self, images: ImageSet, index: int) -> Picture:
        """An image of which a fourth channel is the mask, so that whatever befalls the one befalls the other."""
        picture = images.load(index)
        if self.masks is None:
            return picture
        height, width = picture.pixels.shape[:2]
        mask = self.masks.load(index, (width, height))
        return picture._replace(pixels=np.concatenate([picture.pixels, mask[:, :, None]], axis=2))

    def _encoded(self, indices: list[int], pixels: list[NDArray[np.uint8]]) -> NDArray[np.float16]:
        """float16 [n, 2C or 2C + 1, h, w]: the moments, and the mask where there are masks."""
        import torch

        stacked = np.stack([image.transpose(2, 0, 1) for image in pixels])  # [n, 3 or 4, H, W]
        with torch.no_grad():
            moments = self.encode(torch.from_numpy(stacked[:, :3].copy())).detach().to("cpu", torch.float32).numpy()
        if len(moments) != len(indices):
            raise ValueError(f"encode made {len(moments)} moments of {len(indices)} images")
        peak = np.abs(moments).reshape(len(indices), -1).max(axis=1)
        for index, value in zip(indices, peak.tolist(), strict=True):
            if not value <= _FLOAT16_MAX:
                what = f"a value of {value:.3g}, beyond float16," if math.isfinite(value) else "no finite latents"
                raise LowVRAMError(
                    f"the autoencoder gives {what} for {self.images.file_name(index)} of {self.images.name}",
                    "Encode in float32 (some autoencoders overflow in float16); if it is this image alone, remove it.",
                )
        if self.masks is not None and moments.ndim == 4:
            moments = np.concatenate([moments, to_latent_pixels(stacked[:, 3], moments.shape[2:])], axis=1)
        return moments.astype(np.float16)


def _cut(wide: NDArray[np.uint8], shape: tuple[int, ...], index: int, crop: int) -> NDArray[np.uint8]:
    """A cut of [H, W, 3] at a place of (index, crop) alone."""
    random = np.random.RandomState([index, crop])  # the same numbers with any numpy
    top, left = (int(random.randint(0, wide.shape[axis] - shape[axis] + 1)) for axis in (0, 1))
    return wide[top : top + shape[0], left : left + shape[1]]


def _ahead(function: Callable[[_In], _Out], items: Iterable[_In], depth: int = 2) -> Generator[_Out, None, None]:
    """function(item) of each item in order, computed by one thread up to `depth` items ahead."""
    waiting: deque[Any] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class LatentSet(DerivedSet):
    """The latents of a set of images, as `build` gives them; reads are memory-mapped.

    `read` gives moments (mean and log variance, unscaled), float16 [2C, h, w], and where the set is `masked` the mask
    as one more channel, within [0, 1]; `load`, `fetch` and `[i]` still give the pictures of `images`. The place of a
    bad image is taken by the next good one of the same shape.
    """

    item_dtype = np.float16
    labels_variants = False  # `read` labels what it gives label * variants.count + the variant's number

    def __init__(
        self, images: ImageSet, index: Index, variants: Variants, *, identity: str, masked: bool = False
    ) -> None:
        super().__init__(images)
        self.variants = variants
        self.masked = masked
        self.crops = variants.crops
        self.folder = index.folder
        self._identity = identity
        self._shards = index.shards
        self._shard_of = np.empty(len(images), np.int64)
        self._row_of = np.empty(len(images), np.int64)
        for number, shard in enumerate(index.shards):
            members = shard.images
            self._shard_of[members] = number
            self._row_of[members] = np.arange(len(members))
            self._bad |= shard.bad
        self._open: OrderedDict[int, Any] = OrderedDict()  # shard -> a slice of its file
        if self._bad:
            self._check_bad()

    def _check_bad(self) -> None:
        lines = list(self._bad.values())
        if self.on_bad_file == "error":
            raise LowVRAMError(
                f"an image of {self.name} cannot be used: {lines[0]}",
                "Remove or replace it, or set data.on_bad_file=skip.",
            )
        if len(self._bad) >= len(self):
            raise too_many_bad_files(lines, self.bad_file_limit, self.name)
        self.skip_log.report(lines)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def identity(self) -> list[str]:
        return [self.images.fingerprint, self._identity]

    def shape_of(self, index: int) -> tuple[int, ...]:
        """The shape of what `read` gives for one image, (2C, h, w), or (2C + 1, h, w) with its mask."""
        return self._shards[self._shard_of[index]].shape[1:]

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of what `read` gives. Raises LowVRAMError where the images are of several shapes."""
        shapes = {shard.shape[1:] for shard in self._shards}
        if len(shapes) > 1:
            raise LowVRAMError(
                f"the latents of {self.name} are of {len(shapes)} shapes", "Draw batches of one shape, from buckets."
            )
        return next(iter(shapes))

    def resolve(self, index: int) -> tuple[int, list[str]]:
        """The image that is shown for `index`, and "file: reason" of each bad one on the way to it."""
        skipped: list[str] = []
        for step in range(len(self)):
            at = (index + step) % len(self)
            if step and self.shape_of(at) != self.shape_of(index):
                continue
            if at not in self._bad:
                return at, skipped
            skipped.append(self._bad[at])
        raise LowVRAMError(
            f"all {len(skipped)} images of {self.name} of the shape of {self.file_name(index)} are bad: {skipped[0]}",
            "Remove or replace them.",
        )

    def moments(self, index: int, mirrored: bool = False, crop: int = 0) -> NDArray[np.float16]:
        """Mean and log variance of one image, float16 [2C, h, w], a copy. Raises LowVRAMError for a variant that is
        not kept, and where the files are gone."""
        at, _ = self.resolve(index)
        kept = self._kept(at, mirrored, crop)
        return kept[:-1] if self.masked else kept

    def mask(self, index: int, mirrored: bool = False, crop: int = 0) -> NDArray[np.float16]:
        """How much of each latent pixel of one image counts, float16 [1, h, w] in [0, 1]; ones without masks."""
        at, _ = self.resolve(index)
        kept = self._kept(at, mirrored, crop)
        return kept[-1:] if self.masked else np.ones_like(kept[-1:])

    def _kept(self, at: int, mirrored: bool, crop: int) -> NDArray[np.float16]:
        variant = self.variants.number(mirrored, crop)
        kept: NDArray[np.float16] = self._shard(int(self._shard_of[at]))[int(self._row_of[at]), variant]
        return kept

    def read(self, index: int, *, mirrored: bool = False, crop: int = 0) -> Item:
        """Moments, float16 [2C, h, w] (with a mask [2C + 1, h, w]), and label at `index`."""
        at, skipped = self.resolve(index)
        label = self.label(at)
        if self.labels_variants:
            label = label * self.variants.count + self.variants.number(mirrored, crop)
        return Item(self._kept(at, mirrored, crop), label, skipped, None)

    def _shard(self, number: int) -> Any:
        # A memory map has no position that a forked child could move, so that it may be shared.
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        from safetensors import SafetensorError, safe_open

        shard = self._shards[number]
        path = self.folder / shard.file
        try:
            # Reading a map beyond the end of a file that was cut off would kill the process.
            if path.stat().st_size != shard.bytes:
                raise OSError(f"{path.stat().st_size:,} bytes, not {shard.bytes:,}")
            self._open[number] = safe_open(path, "numpy").get_slice("moments")
        except (OSError, SafetensorError) as error:
            raise LowVRAMError(
                f"the latents in {path} cannot be read: {error}", "Start again: what is damaged is made anew."
            ) from error
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]
