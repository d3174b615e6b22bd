"""An autoencoder over large images, tile by tile: memory by the tile, with blended overlaps.

Neighbouring tiles differ a little, since convolutions meet a border there and group norms and attention see their tile
alone. Each tile fades out where the next fades in, so that the difference is spread over the overlap and shows no seam.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError


class Codec(Protocol):
    """What is tiled: an encoder and decoder whose latents are smaller than images by `factor` in each direction."""

    factor: int

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def encode_tiled(model: Codec, images: Tensor, *, tile_pixels: int = 512, overlap: float = 0.25) -> Tensor:
    """`model.encode` of images [B, 3, H, W] in tiles -> moments [B, 2 latent, H / f, W / f].

    The same as `model.encode` where an image fits one tile. Peak memory is that of a tile besides images and moments.

    tile_pixels: side of a tile, a multiple of the factor. overlap: least part of a tile that it shares with the next.
    Raises:
        LowVRAMError: tile_pixels or overlap is out of range, or a side of the images is no multiple of the factor.
    """
    f = model.factor
    height, width = images.shape[2:]
    tile = _tile(tile_pixels, overlap, f)
    if height % f or width % f:
        raise LowVRAMError(
            f"images of {width}x{height} pixels: both sides must be multiples of {f}.", "Crop or resize them."
        )
    if max(height, width) <= tile_pixels:
        return model.encode(images)

    def encode(top: int, left: int, rows: int, columns: int) -> Tensor:
        return model.encode(images[:, :, top * f : (top + rows) * f, left * f : (left + columns) * f])

    return _blend(encode, (height // f, width // f), tile, overlap, scale=1)


def decode_tiled(model: Codec, latents: Tensor, *, tile_pixels: int = 512, overlap: float = 0.25) -> Tensor:
    """`model.decode` of unscaled latents [B, latent, h, w] in tiles -> images [B, 3, f h, f w].

    The same as `model.decode` where the image fits one tile. Otherwise as `encode_tiled`; pixels of the images.
    """
    tile = _tile(tile_pixels, overlap, model.factor)
    height, width = latents.shape[2:]
    if max(height, width) <= tile:
        return model.decode(latents)

    def decode(top: int, left: int, rows: int, columns: int) -> Tensor:
        return model.decode(latents[:, :, top : top + rows, left : left + columns])

    return _blend(decode, (height, width), tile, overlap, scale=model.factor)


def _tile(tile_pixels: int, overlap: float, factor: int) -> int:
    """A tile's side in latent pixels."""
    if tile_pixels < 2 * factor or tile_pixels % factor:
        raise LowVRAMError(
            f"tile_pixels={tile_pixels} must be a multiple, at least twice, of the autoencoder's factor {factor}.",
            f"Use {max(2, round(tile_pixels / factor)) * factor}.",
        )
    if not 0 <= overlap <= 0.75:
        raise LowVRAMError(f"overlap={overlap} of a tile is outside 0 to 0.75.", "Use 0.25.")
    return tile_pixels // factor


def _blend(
    run: Callable[[int, int, int, int], Tensor], size: tuple[int, int], tile: int, overlap: float, *, scale: int
) -> Tensor:
    """Sum of the tiles' outputs, weighed so that the weights of each pixel add up to 1.

    run(top, left, rows, columns): output [B, C, scale rows, scale columns] of a tile; size, tile in latent pixels.
    """
    columns = list(_windows(size[1], tile, overlap, scale))
    out: Tensor | None = None
    for top, rows, row_weights in _windows(size[0], tile, overlap, scale):
        for left, width, column_weights in columns:
            part = run(top, left, rows, width)
            if out is None:
                out = part.new_zeros((*part.shape[:2], size[0] * scale, size[1] * scale))
            weights = (row_weights[:, None] * column_weights).to(part)  # [scale rows, scale columns]
            y, x = top * scale, left * scale
            out[:, :, y : y + rows * scale, x : x + width * scale] += part * weights
            del part  # or it would stay beside the next tile's activations
    assert out is not None
    return out


def _windows(length: int, tile: int, overlap: float, scale: int) -> Iterator[tuple[int, int, Tensor]]:
    """Start and length of each tile along a side, and its weights, float32 [scale * length]; they sum to 1 at a pixel.

    Tiles are of one size, and evenly spread, so that none is a narrow rest; the overlap is at least what was asked.
    """
    if length <= tile:
        yield 0, length, torch.ones(length * scale)
        return
    shared = min(tile - 1, math.ceil(overlap * tile))
    count = math.ceil((length - shared) / (tile - shared))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    ramps = torch.zeros(count, length * scale)
    for i, start in enumerate(starts):
        position = torch.arange(tile * scale) + 0.5
        ramp = torch.ones(tile * scale)
        if i > 0:
            ramp = torch.minimum(ramp, position / max(1, (starts[i - 1] + tile - start) * scale))
        if i < count - 1:
            ramp = torch.minimum(ramp, position.flip(0) / max(1, (start + tile - starts[i + 1]) * scale))
        ramps[i, start * scale : (start + tile) * scale] = ramp
    ramps /= ramps.sum(dim=0)
    for i, start in enumerate(starts):
        yield start, tile, ramps[i, start * scale : (start + tile) * scale]
