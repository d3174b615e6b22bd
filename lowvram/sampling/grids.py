"""Pictures in files, one in each or beside each other in one."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.marks.mark import Mark

FORMATS = ("png", "jpg", "webp")
QUALITY = 95  # of those that lose something

_BLANK = 255  # white, as paper: an unfinished last row reads as empty


def grid_shape(n: int) -> tuple[int, int]:
    """(rows, columns) for n pictures: exactly full where a shape up to twice as wide as high is, else nearly square."""
    if n < 1:
        raise LowVRAMError(f"a grid of n={n} images can't be made.", "Use n=1 or more.")
    narrowest = math.isqrt(n - 1) + 1  # the square root, rounded up
    for columns in range(narrowest, 2 * narrowest):
        if n % columns == 0 and columns <= 2 * (n // columns):
            return n // columns, columns
    return math.ceil(n / narrowest), narrowest


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Put images side by side, row by row from the top left; missing ones are white.

    images: uint8 [N, C, H, W] with 1 or 3 channels. columns: as `grid_shape` says, unless given.
    Returns uint8 [C, rows * H, columns * W].
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or not len(images):
        raise LowVRAMError(
            f"a grid can't be made of {images.dtype} {list(images.shape)}.",
            "Pass uint8 images [N, 3, H, W] or [N, 1, H, W].",
        )
    n, channels, height, width = images.shape
    if columns is None:
        rows, columns = grid_shape(n)
    else:
        if columns < 1:
            raise LowVRAMError(f"columns={columns} is too small.", "Use 1 or more.")
        rows = math.ceil(n / columns)
    cells = images.new_full((rows * columns, channels, height, width), _BLANK)
    cells[:n] = images
    cells = cells.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)  # [C, rows, H, columns, W]
    return cells.reshape(channels, rows * height, columns * width)


def save_grid(
    images: Tensor,
    path: str | Path,
    columns: int | None = None,
    *,
    format: str = "png",
    quality: int = QUALITY,
    mark: Mark | None = None,
) -> None:
    """Write images [N, C, H, W] (see `make_grid`) as one picture. The rest is as of `save_image`."""
    save_image(make_grid(images, columns), path, format=format, quality=quality, mark=mark)


def save_png(image: Tensor, path: str | Path, mark: Mark | None = None) -> None:
    """Write one image as PNG, see `save_image`."""
    save_image(image, path, mark=mark)


def save_image(
    image: Tensor, path: str | Path, *, format: str = "png", quality: int = QUALITY, mark: Mark | None = None
) -> None:
    """Write a uint8 image [3, H, W] or [1, H, W], under a temporary name first: no reader sees half a file.

    format: of FORMATS. quality: of jpg and webp, 1 to 100. mark: what the file says of where the image comes from.

    Raises:
        OSError: the disk says no. LowVRAMError: the mark can't be made, see `Mark.check`.
    """
    from PIL import Image

    path = Path(path)
    pixels = image.detach().cpu().permute(1, 2, 0)  # [H, W, C]
    if pixels.shape[2] == 1:
        pixels = pixels.squeeze(2)
    array, arguments = pixels.contiguous().numpy(), _arguments(format, quality)
    if mark is not None:
        array, arguments = mark.pixels(array), arguments | mark.arguments(format)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(array).save(partial, **arguments)
        if mark is not None:
            mark.finish(partial, format)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _arguments(format: str, quality: int) -> dict[str, Any]:
    if format == "png":
        return {"format": "PNG"}
    return {"format": {"jpg": "JPEG", "webp": "WEBP"}[format], "quality": quality}
