"""The Triton kernels of `bias_act`, each one pass, as torch operations on dense tensors in either layout.

An image is a matrix as it lies in memory: [C, pixels], or [pixels, C] in channels last. Of bias and noise the one adds
a term to each row, the other to each column, so that one kernel serves both layouts. The sums that a backward wants are
sums along rows and columns; each program stores its own share, and these are added up in a fixed order: no atomics.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram.kernels.dispatch import jit_for_any, launch, register, tl, wide

_TILE = 2048  # elements at a time: 128 threads each load 16 of an operand, in 16 bits by two instructions of 16 bytes
_TILE_ROW_BYTES = 512  # what a warp loads by one of them: the sum along a row stays within the warp
_MOST_TILES = 16  # that a program takes one after the other: it stores its sums by column once for them all
_PROGRAMS = 64  # or more for each image that has so many tiles, to keep a card busy with a few images


class _Tiles(NamedTuple):
    """How `images` matrices [rows, columns] are shared out: a program takes `tiles` tiles, one below the other.

    An image's shape alone decides, so that what a backward allocates is proportional to the batch, as plans suppose.
    """

    images: int
    rows: int
    columns: int
    channels_last: bool
    tile_rows: int
    tile_columns: int
    tiles: int

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // (self.tile_rows * self.tiles))

    @property
    def column_blocks(self) -> int:
        return -(-self.columns // self.tile_columns)

    @property
    def grid(self) -> tuple[int]:
        return (self.images * self.row_blocks * self.column_blocks,)


def _tiles(x: Tensor) -> _Tiles:
    images, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    channels_last = is_channels_last(x)
    if x.ndim == 2:  # vectors are the pixels of one image
        images, pixels, channels_last = 1, len(x), True
    rows, columns = (pixels, channels) if channels_last else (channels, pixels)
    tile_columns = min(_power_of_2(columns), _TILE_ROW_BYTES // x.element_size())
    tile_rows = min(_power_of_2(rows), _TILE // tile_columns)
    down, across = -(-rows // tile_rows), -(-columns // tile_columns)
    tiles = 1
    while 2 * tiles <= min(_MOST_TILES, down, down * across // _PROGRAMS):
        tiles *= 2
    return _Tiles(images, rows, columns, channels_last, tile_rows, tile_columns, tiles)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()  # the next from n on


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, ...] is dense in channels last, and not in the usual layout too."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.ndim])


@jit_for_any("rows", "row_blocks", "column_blocks")
def _forward_kernel(
    x,
    y,
    row_terms,
    column_terms,
    scale,
    row_terms_step,  # from one image's terms to the next one's; 0: they are the same
    column_terms_step,
    rows,
    columns,
    row_blocks,
    column_blocks,
    gain,
    clamp,
    SLOPE: tl.constexpr,
    CLAMPED: tl.constexpr,
    SCALE_BY_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Reads and writes an element for each of y, which may be x."""
    above = tl.program_id(0) // column_blocks
    image = (above // row_blocks).to(tl.int64)
    first_row = above % row_blocks * (ROWS * TILES)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    has_column = column < columns
    for tile in range(TILES):
        row = first_row + tile * ROWS + tl.arange(0, ROWS)
        has_row = row < rows
        at = (image * rows + row)[:, None] * columns + column[None, :]
        inside = has_row[:, None] & has_column[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
        if scale is not None:
            if SCALE_BY_ROW:
                v *= tl.load(scale + image * rows + row, mask=has_row, other=0.0).to(WIDE)[:, None]
            else:
                v *= tl.load(scale + image * columns + column, mask=has_column, other=0.0).to(WIDE)[None, :]
        if row_terms is not None:
            v += tl.load(row_terms + image * row_terms_step + row, mask=has_row, other=0.0).to(WIDE)[:, None]
        if column_terms is not None:
            at_column = image * column_terms_step + column
            v += tl.load(column_terms + at_column, mask=has_column, other=0.0).to(WIDE)[None, :]
        v = tl.where(v > 0, v, v * SLOPE) * gain
        if CLAMPED:  # by comparisons, which leave NaN as it is: it tells the trainer of a failed step
            v = tl.where(v > clamp, clamp, tl.where(v < -clamp, -clamp, v))
        tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@jit_for_any("rows", "row_blocks", "column_blocks")
def _backward_kernel(
    dy,
    y,
    dx,
    row_terms,
    column_terms,
    scale,
    row_sums,  # of g, the gradient by the activation's argument: [images, column_blocks, rows]
    column_sums,  # [images, row_blocks, columns]
    scale_sums,  # of g * scale * x: like row_sums or column_sums, whichever way the scale lies
    row_terms_step,
    column_terms_step,
    rows,
    columns,
    row_blocks,
    column_blocks,
    gain,
    clamp,
    SLOPE: tl.constexpr,
    CLAMPED: tl.constexpr,
    SCALE_BY_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Reads 2, writes 1 element for each of y; the sums are some hundred times smaller."""
    above = tl.program_id(0) // column_blocks
    image = (above // row_blocks).to(tl.int64)
    row_block, column_block = above % row_blocks, tl.program_id(0) % column_blocks
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    has_column = column < columns
    if column_sums is not None:
        g_above = tl.zeros((ROWS, COLUMNS), WIDE)
    if scale_sums is not None and not SCALE_BY_ROW:
        product_above = tl.zeros((ROWS, COLUMNS), WIDE)
    for tile in range(TILES):
        row = (row_block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        has_row = row < rows
        at = (image * rows + row)[:, None] * columns + column[None, :]
        inside = has_row[:, None] & has_column[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        v = tl.load(y + at, mask=inside, other=0.0).to(WIDE)
        if CLAMPED:
            d = tl.where(tl.abs(v) >= clamp, 0.0, d)
        g = tl.where(v > 0, d, d * SLOPE) * gain
        at_row = (image * column_blocks + column_block) * rows + row
        if row_sums is not None:
            tl.store(row_sums + at_row, tl.sum(g, 1), mask=has_row)
        if column_sums is not None:
            g_above += g
        if scale_sums is not None:
            # The activation is positively homogeneous, so g * argument is dy * y; less its terms that is g * scale * x.
            product = d * v
            if row_terms is not None:
                at_term = image * row_terms_step + row
                product -= g * tl.load(row_terms + at_term, mask=has_row, other=0.0).to(WIDE)[:, None]
            if column_terms is not None:
                at_term = image * column_terms_step + column
                product -= g * tl.load(column_terms + at_term, mask=has_column, other=0.0).to(WIDE)[None, :]
            if SCALE_BY_ROW:
                tl.store(scale_sums + at_row, tl.sum(product, 1), mask=has_row)
            else:
                product_above += product
        if scale is not None:
            if SCALE_BY_ROW:
                g *= tl.load(scale + image * rows + row, mask=has_row, other=0.0).to(WIDE)[:, None]
            else:
                g *= tl.load(scale + image * columns + column, mask=has_column, other=0.0).to(WIDE)[None, :]
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)
    at_column = (image * row_blocks + row_block) * columns + column
    if column_sums is not None:
        tl.store(column_sums + at_column, tl.sum(g_above, 0), mask=has_column)
    if scale_sums is not None and not SCALE_BY_ROW:
        tl.store(scale_sums + at_column, tl.sum(product_above, 0), mask=has_column)


def _terms(t: _Tiles, b: Tensor | None, noise: Tensor | None) -> tuple[Any, ...]:
    """What is added by row and by column, and the step of each from image to image."""
    pixels = t.rows if t.channels_last else t.columns
    b = None if b is None else b.contiguous()
    noise = None if noise is None else noise.contiguous()
    noise_step = pixels if noise is not None and noise.ndim == 4 else 0
    return (noise, b, noise_step, 0) if t.channels_last else (b, noise, 0, noise_step)


def _options(t: _Tiles, x: Tensor, slope: float, clamp: float | None) -> dict[str, Any]:
    return {
        "SLOPE": slope,
        "CLAMPED": clamp is not None,
        "SCALE_BY_ROW": not t.channels_last,
        "WIDE": wide(x),
        "ROWS": t.tile_rows,
        "COLUMNS": t.tile_columns,
        "TILES": t.tiles,
    }


def _forward_into(
    y: Tensor,
    x: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    slope: float,
    gain: float,
    clamp: float | None,
) -> None:
    t = _tiles(x)
    row_terms, column_terms, *steps = _terms(t, b, noise)
    scale = None if scale is None else scale.contiguous()
    numbers = (*steps, t.rows, t.columns, t.row_blocks, t.column_blocks, gain, clamp or 0.0)
    launch(_forward_kernel, t.grid, x, y, row_terms, column_terms, scale, *numbers, **_options(t, x, slope, clamp))


_ARGUMENTS = "Tensor? b, Tensor? scale, Tensor? noise, float slope, float gain, float? clamp"


@register(f"bias_act(Tensor x, {_ARGUMENTS}) -> Tensor", fake=lambda x, *_: torch.empty_like(x))
def forward_triton(x: Tensor, *arguments: Any) -> Tensor:
    """clamp(gain * act(scale * x + noise + b)); act multiplies what is below zero by `slope`."""
    y = torch.empty_like(x)
    _forward_into(y, x, *arguments)
    return y


@register(f"bias_act_(Tensor(a!) x, {_ARGUMENTS}) -> ()", fake=lambda x, *_: None)
def forward_triton_(x: Tensor, *arguments: Any) -> None:
    """The same, written over x."""
    _forward_into(x, x, *arguments)


_Backward = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty_gradients(
    dy: Tensor,
    y: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    slope: float,
    gain: float,
    clamp: float | None,
    needs_b: bool,
    needs_scale: bool,
    needs_noise: bool,
) -> _Backward:
    t = _tiles(y)
    by_row, by_column = (t.images, t.column_blocks, t.rows), (t.images, t.row_blocks, t.columns)
    channels, pixels = (by_column, by_row) if t.channels_last else (by_row, by_column)
    sums = torch.promote_types(y.dtype, torch.float32)
    return (
        torch.empty_like(y),
        y.new_empty(channels if needs_b else (0,), dtype=sums),
        y.new_empty(channels if needs_scale else (0,), dtype=sums),
        y.new_empty(pixels if needs_noise else (0,), dtype=sums),
    )


@register(
    f"bias_act_backward(Tensor dy, Tensor y, {_ARGUMENTS}, bool needs_b, bool needs_scale, bool needs_noise)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_gradients,
)
def backward_triton(
    dy: Tensor,
    y: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    slope: float,
    gain: float,
    clamp: float | None,
    needs_b: bool,
    needs_scale: bool,
    needs_noise: bool,
) -> _Backward:
    """dx, and shares of three sums, fp32 at least, each to be added up along dimension 1 (empty if not needed).

    The sums, g being the gradient by the activation's argument: g by channel and g * scale * x by channel, both
    [N, shares, C], and g by pixel [N, shares, H * W]. dy: laid out as y. An x [N, C] counts as one image.
    """
    needed = (needs_b, needs_scale, needs_noise)
    made = _empty_gradients(dy, y, b, scale, noise, slope, gain, clamp, *needed)
    dx, channel_sums, scale_sums, pixel_sums = (m if n else None for m, n in zip(made, (True, *needed), strict=True))
    t = _tiles(y)
    row_terms, column_terms, *steps = _terms(t, b, noise) if needs_scale else (None, None, 0, 0)
    row_sums, column_sums = (pixel_sums, channel_sums) if t.channels_last else (channel_sums, pixel_sums)
    scale = None if scale is None else scale.contiguous()
    numbers = (*steps, t.rows, t.columns, t.row_blocks, t.column_blocks, gain, clamp or 0.0)
    tensors = (dy, y, dx, row_terms, column_terms, scale, row_sums, column_sums, scale_sums)
    launch(_backward_kernel, t.grid, *tensors, *numbers, **_options(t, y, slope, clamp))
    return made
