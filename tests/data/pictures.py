"""Images made on the spot, as the bytes of files."""

import io

import numpy as np
from PIL import Image


def encode(colour: tuple[int, int, int] | np.ndarray, size: tuple[int, int] = (16, 16), format: str = "PNG") -> bytes:
    """A plain image, or an array, as the bytes of a file."""
    image = Image.fromarray(colour) if isinstance(colour, np.ndarray) else Image.new("RGB", size, colour)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def numbered(index: int) -> bytes:
    """A 16x16 image whose colour says its number, and whose left half is darker, so that a mirror shows."""
    pixels = np.full((16, 16, 3), 100 + index, np.uint8)
    pixels[:, :8, 0] = 0
    return encode(pixels)


def number_of(image: np.ndarray) -> int:
    """The index of an image made by `numbered`, from uint8 [3, R, R]."""
    return int(image[1, 0, 0]) - 100
