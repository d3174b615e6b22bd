"""Looping animations: WebP through Pillow, MP4 through imageio (the extra `video`)."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.marks.mark import Mark

FORMATS = ("webp", "mp4")
QUALITY = 90  # of a WebP
_WEBP_LARGEST_SIDE = 16383
# Pillow gathers all frames of a WebP before it writes the first one.
_WEBP_LARGEST_BYTES = 2 * 2**30


def check_animation(format: str, frames: int, height: int, width: int) -> None:
    """Refuse what can't be written, before any frame is made. height and width in pixels.

    Raises LowVRAMError: an unknown format, a WebP too large for its format or for memory, MP4 without its extra.
    """
    if format not in FORMATS:
        raise LowVRAMError(f"format={format} is not known.", f"Use one of {', '.join(FORMATS)}.")
    if format == "mp4":
        _imageio()
        return
    size_bytes = frames * height * width * 3
    if max(height, width) > _WEBP_LARGEST_SIDE:
        raise LowVRAMError(
            f"a WebP of {width}x{height} pixels is over the format's {_WEBP_LARGEST_SIDE}.", "Use a smaller n."
        )
    if size_bytes > _WEBP_LARGEST_BYTES:
        raise LowVRAMError(
            f"a WebP of {frames} frames of {width}x{height} needs {size_bytes / 2**30:.1f} GiB of memory.",
            "Use format=mp4, which is written as it is made, or a smaller n, fps or seconds.",
        )


def save_animation(
    frames: Iterable[Tensor],
    path: Path,
    *,
    format: str,
    fps: float,
    quality: int = QUALITY,
    mark: Mark | None = None,
) -> None:
    """Write frames, each uint8 [3, H, W], as an endlessly looping WebP or as an MP4.

    Written under a temporary name first. quality: of a WebP, 1 to 100. mark: what the file says of where it comes from;
    a watermark is in each frame. Raises LowVRAMError where imageio is missing, OSError where the disk says no.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.{format}")
    pixels = (frame.permute(1, 2, 0).contiguous().numpy() for frame in frames)  # [H, W, 3]
    marked = pixels if mark is None else (mark.pixels(frame) for frame in pixels)
    try:
        if format == "webp":
            _save_webp(marked, partial, fps, quality, {} if mark is None else mark.arguments("webp"))
        else:
            _save_mp4(marked, partial, fps)
        if mark is not None:
            mark.finish(partial, format)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _save_webp(frames: Iterator[Any], path: Path, fps: float, quality: int, metadata: dict[str, Any]) -> None:
    from PIL import Image

    pictures: Iterator[Any] = map(Image.fromarray, frames)
    first = next(pictures)
    # Durations are whole milliseconds: rounding the running time instead of each frame keeps the length right.
    rest = list(pictures)
    ends = [round((i + 1) * 1000 / fps) for i in range(len(rest) + 1)]
    durations = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    many = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    first.save(path, format="WEBP", quality=quality, method=4, **many, **metadata)


def _save_mp4(frames: Iterator[Any], path: Path, fps: float) -> None:
    writer = _imageio().get_writer(path, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)
    try:
        for frame in frames:
            writer.append_data(frame)
    finally:
        writer.close()


def _imageio() -> Any:
    try:
        import imageio.v2 as imageio

        import_module("imageio_ffmpeg")  # the encoder, which imageio itself loads only at the first frame
    except ImportError as error:
        raise LowVRAMError(
            f"format=mp4 needs the package {(error.name or 'imageio').replace('_', '-')}, which is not installed.",
            'Install it with pip install "lowvram[video]", or use format=webp.',
        ) from error
    return imageio
