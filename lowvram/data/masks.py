"""Masks: how much each pixel of an image counts in the loss, from files beside the images or from their own alpha."""

from __future__ import annotations

import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lowvram.data.buckets import fit
from lowvram.data.dataset import BadImageError, DerivedSet, ImageSet
from lowvram.data.decode import MAX_FILE_BYTES, MAX_PIXELS
from lowvram.data.images import FileSet
from lowvram.data.latent_files import digest_of
from lowvram.data.open import open_dataset
from lowvram.errors import LowVRAMError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

__all__ = ["ALPHA", "Masks", "open_masks", "to_latent_pixels"]

log = logging.getLogger(__name__)

ALPHA = "alpha"  # in place of a path: the images' own transparency
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP"]
_SHOWN = 3


class Masks(ABC):
    """A mask for each image of a set."""

    @abstractmethod
    def identity(self) -> str:
        """What stays while the masks stay, for the key of what is cached with them."""

    @abstractmethod
    def load(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The mask of image `index`, cut and resized as the image is to `size` (width, height): uint8 [height, width],
        255 where the image counts whole. Raises LowVRAMError, naming the file, for a mask that cannot be used."""


class _FileMasks(Masks):
    """Masks in the files of a folder or zip."""

    def __init__(self, images: FileSet, masks: FileSet) -> None:
        self.images = images
        self.masks = masks
        self.files = _matched(images, masks)
        self._said_black = False

    def identity(self) -> str:
        return digest_of([self.masks.identity(), self.masks.times()])

    def load(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        file = self.files[index]
        if file is None:
            return _whole(size)
        try:
            mask = _decoded(self.masks.read_file(file, MAX_FILE_BYTES), file, alpha=False)
            width, height = self.images.size(index)
        except BadImageError as bad:
            raise self._unusable(bad) from bad
        # Of the image's proportions, to a pixel of the coarser one; else nobody knows which part of it is meant.
        if abs(mask.width * height - width * mask.height) > max(width, height, *mask.size):
            raise self._unusable(
                BadImageError(file, f"{mask.width}x{mask.height}, and its image is {width}x{height}: other proportions")
            )
        cut = _cut(mask, size)
        if not cut.any() and not self._said_black:
            self._said_black = True
            log.warning("the mask %s is black throughout: nothing of its image counts (said once)", file)
        return cut

    def _unusable(self, bad: BadImageError) -> LowVRAMError:
        return LowVRAMError(
            f"a mask of {self.masks.name} cannot be used: {bad}",
            "Mend it; or remove it, and all of its image counts.",
        )


class _AlphaMasks(Masks):
    """The alpha channels of the images themselves."""

    def __init__(self, images: FileSet) -> None:
        self.images = images
        without = [index for index in range(len(images)) if not self._has_alpha(index)]
        if len(without) == len(images):
            raise LowVRAMError(
                f"data.masks={ALPHA}, and no image of {images.name} has an alpha channel.",
                "Give a folder of masks, or leave data.masks out.",
            )
        if without:
            _say_missing(images, without, "alpha channel")

    def _has_alpha(self, index: int) -> bool:
        """By the header. A file that cannot be read passes: it is reported where the image is decoded."""
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with (
                    self.images._open(self.images.files[index]) as handle,
                    Image.open(handle, formats=_FORMATS) as image,
                ):
                    return image.has_transparency_data
        except Exception:  # what a parser makes of damaged bytes is not limited to a few kinds
            return True

    def identity(self) -> str:
        return ALPHA  # they change with the images

    def load(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        file = self.images.files[index]
        try:
            return _cut(_decoded(self.images.read_file(file, MAX_FILE_BYTES), file, alpha=True), size)
        except BadImageError as bad:
            raise LowVRAMError(
                f"the alpha channel of an image of {self.images.name} cannot be used: {bad}",
                "Mend or remove the image.",
            ) from bad


def open_masks(images: ImageSet, source: str | Path) -> Masks:
    """The masks of a set of images: white counts whole, black not at all, grey in between.

    source: "alpha" takes the images' own alpha channels; else a folder or zip that has a mask for "a/1.png" under that
    name or with another suffix. A mask is a grey picture of its image's proportions, of any size (of colours their
    brightness counts; what is transparent is black). An image without a mask counts whole; how many are is logged.

    Raises:
        LowVRAMError: the images are no files; there are no masks, none that belongs to an image, or several that
            belong to one; or the masks lie among the images.
    """
    while isinstance(images, DerivedSet) and len(images) == len(images.images):
        images = images.images
    if not isinstance(images, FileSet):
        raise LowVRAMError(
            f"data.masks={source} is for images in a folder or zip, and {images.name} are not.", "Leave it out."
        )
    if str(source) == ALPHA:
        return _AlphaMasks(images)
    place = Path(source).expanduser().absolute()
    if place.resolve().is_relative_to(images.path.resolve()):
        raise LowVRAMError(
            f"data.masks={source} lies within data.path={images.path}: the masks would be trained on.",
            "Move them to a folder beside the images.",
        )
    if not place.exists():
        raise LowVRAMError(f"data.masks={source} does not exist.", f"Give a folder or zip of masks, or {ALPHA}.")
    masks = open_dataset(place, resolution=images.resolution)
    assert isinstance(masks, FileSet)
    return _FileMasks(images, masks)


def to_latent_pixels(masks: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Masks uint8 [n, H, W] averaged over the pixels of each latent pixel: [n, 1, h, w] in [0, 1], h x w = shape."""
    count, height, width = masks.shape
    h, w = shape
    blocks = masks.reshape(count, 1, h, height // h, w, width // w)
    return blocks.mean(axis=(3, 5), dtype=np.float32) / np.float32(255)


def _whole(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.full((size[1], size[0]), 255, np.uint8)


def _matched(images: FileSet, masks: FileSet) -> list[str | None]:
    """The file of each image's mask. A folder that holds everything, as archives often have, is no part of a name."""
    beyond = masks.other_files()[0]
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in masks.files:
        by_stem[_stem(file.removeprefix(beyond))].append(file)
    prefix = images.other_files()[0]
    found: list[str | None] = []
    for file in images.files:
        own = file.removeprefix(prefix)
        candidates = by_stem.get(_stem(own), [])
        exact = [mask for mask in candidates if mask.removeprefix(beyond) == own]
        if len(exact or candidates) > 1:
            raise LowVRAMError(
                f"data.masks={masks.path} has several masks for {file}: {', '.join(candidates)}.", "Leave one."
            )
        found.extend(exact or candidates or [None])
    used = {file for file in found if file is not None}
    if not used:
        raise LowVRAMError(
            f"none of the {len(masks)} masks of {masks.path}, such as {masks.files[0]}, belongs to an image of "
            f"{images.name}, such as {images.files[0]}.",
            "Give each mask the name of its image; the suffix may differ.",
        )
    without = [index for index, file in enumerate(found) if file is None]
    if without:
        _say_missing(images, without, "mask")
    if len(used) < len(masks):
        log.warning("%d masks of %s belong to no image and are not used", len(masks) - len(used), masks.name)
    return found


def _say_missing(images: FileSet, without: list[int], what: str) -> None:
    shown = ", ".join(images.files[at] for at in without[:_SHOWN]) + (", ..." if len(without) > _SHOWN else "")
    log.warning(
        "%d of %d images of %s have no %s and count whole: %s", len(without), len(images), images.name, what, shown
    )


def _stem(file: str) -> str:
    return str(PurePosixPath(file).with_suffix(""))


def _decoded(data: bytes, file: str, *, alpha: bool) -> PILImage:
    """The grey picture in a file, or its alpha channel, upright. Raises BadImageError."""
    from PIL import Image, ImageFile, ImageOps

    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # which others switch on for the whole process
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(file, f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
                grey = _alpha_of(image) if alpha else _grey(image, file)
                grey.info.update({name: image.info[name] for name in ("exif",) if name in image.info})
                return ImageOps.exif_transpose(grey)
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(file, "not a PNG, JPEG, WebP or BMP image") from None
    except Exception as error:  # what a decoder makes of damaged bytes is not limited to a few kinds
        raise BadImageError(file, f"damaged ({error})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _alpha_of(image: PILImage) -> PILImage:
    from PIL import Image

    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _grey(image: PILImage, file: str) -> PILImage:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bit, which PIL would clip
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        over_black = Image.new("RGBA", image.size, "black")
        over_black.alpha_composite(image.convert("RGBA"))
        return over_black.convert("L")
    grey = image.convert("L")
    brightest = int(np.asarray(grey).max())
    if 0 < brightest <= 2:
        raise BadImageError(file, f"nearly black: its brightest pixel is {brightest} of 255; write 255 for what counts")
    return grey


def _cut(mask: PILImage, size: tuple[int, int]) -> NDArray[np.uint8]:
    """As `decode_to` cuts an image: uint8 [height, width]."""
    from PIL import Image

    cut = mask.crop(fit(mask.size, size).box)
    return np.asarray(cut.resize(size, Image.Resampling.BILINEAR), dtype=np.uint8)
