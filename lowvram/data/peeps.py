"""The built-in data set: drawn heads and shoulders, endless and deterministic.

Picture `i` is the "open-peeps" style (Pablo Stanley, CC0 1.0) drawn by dicebear-core for the seed `str(i)` and
rendered by resvg over white. White is the paper these line drawings were made for: hair and outlines are black, so
that nothing merges with it, and a small network need not spend its first minutes on backgrounds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from importlib.resources import files
from typing import Any

import numpy as np

from lowvram.data.dataset import ImageSet, Picture
from lowvram.data.image_cache import ImageCache, open_cache, png_pixels

# The class of picture i is its clothing colour, i mod 7: seven classes, exactly balanced, clear at 32x32, and known
# without drawing anything. The colours are the style's own.
CLOTHING = {
    "blue": "#8fa7df",
    "green": "#78e185",
    "orange": "#ffcf77",
    "pink": "#e279c7",
    "red": "#e78276",
    "teal": "#9ddadb",
    "yellow": "#fdea6b",
}
_CLASS_NAMES = list(CLOTHING)
_COLOURS = list(CLOTHING.values())

# Raise when `svg` draws anything differently, so that cached pictures are drawn again.
_DRAWING_VERSION = 1


@functools.cache
def _style() -> Any:
    """The parsed style; checking it against its schema takes about half a second, once a process."""
    from dicebear import Style

    return Style(json.loads(files("dicebear_styles").joinpath("open-peeps.json").read_text(encoding="utf-8")))


def _avatar(index: int) -> Any:
    from dicebear import Avatar

    return Avatar(_style(), {"seed": str(index), "clothingColor": [_COLOURS[index % len(_COLOURS)]]})


def svg(index: int) -> str:
    """The drawing as SVG text, square, with a transparent background; about 0.4 ms."""
    text = _avatar(index).to_string()
    # The licence block is text, and the outer clip path cuts at the canvas edge, where the picture ends anyway:
    # without its extra layer resvg takes half the time. Where a later version writes them otherwise, both stay.
    text = re.sub(r"<metadata.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    return re.sub(r'<g clip-path="url\(#clip-[0-9a-f]+\)">', "<g>", text, count=1)


def attributes(index: int) -> dict[str, str]:
    """What is drawn in picture `index`, for captions: `headVariant`, `expressionVariant`, `skinColor` (hex),
    `clothingColor` (hex), `clothingName`, and where drawn `accessoriesVariant`, `facialHairVariant`, `maskVariant`,
    `headContrastColor`."""
    drawn: dict[str, str] = {}
    for key, value in _avatar(index).to_json()["options"].items():
        if key.endswith("Variant") and value:
            drawn[key] = str(value)
        elif key.endswith("Color") and value:
            drawn[key] = str(value[0])
    drawn["clothingName"] = _CLASS_NAMES[index % len(_CLASS_NAMES)]
    return drawn


def render_png(index: int, resolution: int) -> bytes:
    """The drawing as an opaque PNG file, resolution x resolution pixels."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg(index),
            width=resolution,
            height=resolution,
            background="#ffffff",
            skip_system_fonts=True,  # no text is drawn, and looking for fonts takes time
        )
    )


def drawing_key() -> str:
    """Changes whenever the same index may give other pixels: names the folder of cached pictures."""
    versions = [importlib.metadata.version(name) for name in ("dicebear-core", "dicebear-styles", "resvg-py")]
    return "-".join(["peeps", str(_DRAWING_VERSION), *versions])


class PeepsSet(ImageSet):
    """The first `count` drawn faces; drawn when first asked for, then kept on disk."""

    def __init__(self, *, resolution: int, count: int, labels: bool = False) -> None:
        super().__init__(
            name="the built-in faces",
            resolution=resolution,
            labels=np.arange(count, dtype=np.int64) % len(_CLASS_NAMES) if labels else None,
            class_names=list(_CLASS_NAMES) if labels else None,
        )
        self._count = count
        self._cache: ImageCache | None = open_cache(drawing_key(), resolution)

    def __len__(self) -> int:
        return self._count

    def load(self, index: int) -> Picture:
        """Picture `index`, uint8 [R, R, 3]: from the cache, or drawn."""
        if self._cache is not None:
            cached = self._cache.read(index)
            if cached is not None:
                return Picture(cached)
        png = render_png(index, self.resolution)
        pixels = png_pixels(png)
        if self._cache is not None:
            self._cache.write(index, pixels, png)
        return Picture(pixels)

    def attributes(self, index: int) -> dict[str, str]:
        """What is drawn in picture `index`, see `attributes` of this module."""
        return attributes(index)

    def file_name(self, index: int) -> str:
        return f"drawn face {index}"

    def identity(self) -> list[str]:
        return [drawing_key()]
