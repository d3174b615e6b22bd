"""The bytes of an image file -> RGB pixels of a given size."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from lowvram.data.buckets import fit
from lowvram.data.dataset import BadImageError, Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.Image import Transpose

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"})
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP"]

# Beyond these, a file is taken for an attack or a mistake: 2^27 pixels are 400 MB of RGB, and more than a full-frame
# camera gives; no sane compression makes them need a file of 1 GiB.
MAX_PIXELS = 2**27
MAX_FILE_BYTES = 2**30

_ORIENTATION_TAG = 0x0112


def decode_square(data: bytes, *, file: str, resolution: int) -> Picture:
    """Decode, turn upright, put over white, crop the centre square and resize (antialiased) to uint8 [R, R, 3].

    data: a PNG, JPEG, WebP or BMP file. Grey, palette, CMYK and 16-bit images become 8-bit RGB; of an animation the
    first frame is taken. Raises BadImageError, with the reason, for anything that cannot be decoded in full.
    """
    return decode_to(data, file=file, size=(resolution, resolution))


def decode_to(data: bytes, *, file: str, size: tuple[int, int]) -> Picture:
    """As `decode_square`, but cut to the proportions of `size` (width, height) by `fit`: uint8 [height, width, 3]."""
    from PIL import Image, ImageFile

    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        # Other libraries switch this on for the whole process; a half-grey image must never reach training.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                return _fitted(image, size, file)
    except (BadImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(file, "not a PNG, JPEG, WebP or BMP image") from None
    except Image.DecompressionBombError:
        raise BadImageError(file, f"a decompression bomb: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # what a decoder makes of damaged bytes is not limited to a few kinds
        raise BadImageError(file, f"damaged ({error})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _fitted(image: PILImage, size: tuple[int, int], file: str) -> Picture:
    from PIL import Image

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(
            file, f"a decompression bomb: the header says {width}x{height}, more than {MAX_PIXELS:,} pixels"
        )
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 size, far faster; twice the target keeps the resize below antialiased.
    # The longer side for both: the tag that turns an image is not yet read.
    image.draft(None, (2 * max(size), 2 * max(size)))
    image.load()
    orientation = _orientation(image)
    if orientation in _sideways():
        size = (size[1], size[0])
    upright = _to_rgb(image)

    # Cropped first: the `box` of a resize with a reducing gap lets in pixels from beyond its edge.
    upright = upright.crop(fit(upright.size, size).box)
    if upright.size != size:
        upright = upright.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if orientation is not None:  # of the small picture: a centre crop and a turn commute
        upright = upright.transpose(orientation)
    return Picture(np.asarray(upright, dtype=np.uint8), enlarged=fit((width, height), size).scale > 1)


def _orientation(image: PILImage) -> Transpose | None:
    """The turn that makes the image upright (a PIL Transpose), by its EXIF tag; None where there is nothing to do."""
    from PIL.Image import Transpose

    try:
        tag = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata beside good pixels
        return None
    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(tag)


def _sideways() -> tuple[Transpose, ...]:
    """The turns that swap width and height."""
    from PIL.Image import Transpose

    return (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)


def _to_rgb(image: PILImage) -> PILImage:
    """Any mode -> RGB over white. 16-bit grey is divided by 257 (65535 / 255), where PIL itself would clip it."""
    from PIL import Image

    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over_white = Image.new("RGBA", image.size, "white")
        over_white.alpha_composite(image.convert("RGBA"))
        return over_white.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
