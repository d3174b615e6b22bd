"""Up-sample (zero insertion), pad, FIR filter, down-sample: one linear operation. Shapes: x [N, C, H, W], f [fh, fw].

It is the resampling of StyleGAN2 (arXiv 1912.04958, appendix B) and of ADA (arXiv 2006.06676). As it is linear in x and
the filter is fixed, its derivatives of every order are the same operation again, and none of them keeps an activation.
"""

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram.kernels.dispatch import Impl, jit_for_any, launch, register, runs_triton, tl, triton, wide
from lowvram.kernels.linear_map import no_autocast

Padding = tuple[int, int, int, int]  # left, right, top, bottom, in pixels of the up-sampled image; negative crops
Factor = int | tuple[int, int]  # of both axes, or (vertical, horizontal)

_MOST_TAPS = 64  # of a filter for Triton, whose kernel is unrolled over the taps: 256 would compile for a minute
_FEW_TAPS = 24  # up to which a cell has four pixels without up-sampling


def plain(
    x: Tensor, f: Tensor, up: Factor = 1, down: Factor = 1, padding: Padding = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """The meaning, step by step: zero insertion, padding, true convolution with f, every `down`-th pixel."""
    (up_y, up_x), (down_y, down_x) = _pair(up), _pair(down)
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up_x - 1, 0, 0, 0, up_y - 1]).reshape(n, c, h * up_y, w * up_x)
    x = F.pad(x, list(padding))
    kernel = (f * gain).flip([0, 1]).to(x.dtype).expand(c, 1, -1, -1)  # conv2d correlates: flipped, it convolves
    return F.conv2d(x, kernel, stride=(down_y, down_x), groups=c)


def make_filter(taps: tuple[float, ...] = (1, 3, 3, 1)) -> Tensor:
    """The normalised outer product of taps with themselves: float32 [len(taps), len(taps)], sum 1."""
    row = torch.tensor(taps, dtype=torch.float32)
    f = row.outer(row)
    return f / f.sum()


def _pair(factor: Factor) -> tuple[int, int]:
    return (factor, factor) if isinstance(factor, int) else factor


class _Settings(NamedTuple):
    """What is done to x; up and down are (vertical, horizontal)."""

    up: tuple[int, int]
    down: tuple[int, int]
    padding: Padding
    gain: float
    flip: bool = False  # f turned by half a circle, without a copy of it

    def output_size(self, height: int, width: int, f: Tensor) -> tuple[int, int]:
        """(height, width) of the result; below 1 where the filter does not fit."""
        left, right, top, bottom = self.padding
        return (
            (height * self.up[0] + top + bottom - f.shape[0]) // self.down[0] + 1,
            (width * self.up[1] + left + right - f.shape[1]) // self.down[1] + 1,
        )

    def adjoint(self, height: int, width: int, f: Tensor) -> "_Settings":
        """What leads from the result back to an image of height x width: up and down exchanged, the filter turned."""
        fh, fw = f.shape
        out_height, out_width = self.output_size(height, width, f)
        # It starts where the output's first pixel reached, and must come out at the input's size.
        left, top = fw - 1 - self.padding[0], fh - 1 - self.padding[2]
        right = (width - 1) * self.up[1] + fw - out_width * self.down[1] - left
        bottom = (height - 1) * self.up[0] + fh - out_height * self.down[0] - top
        return _Settings(self.down, self.up, (left, right, top, bottom), self.gain, not self.flip)


# --- Triton: a gather, in which no inserted zero is multiplied ---


@triton.constexpr_function
def _tap(table, i, j, k):
    return table[i][j][k]


@jit_for_any("height", "width", "out_height", "out_width", "cells_y", "cells_x", "blocks", "origin_y", "origin_x")
def _kernel(
    x, f, y, channels, height, width, out_height, out_width, cells_y, cells_x, blocks, origin_y, origin_x,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, REACH_Y: tl.constexpr, REACH_X: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, TAPS: tl.constexpr, GAIN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: a block of an image's lanes; a lane makes one cell, CELL_Y x CELL_X pixels of y in one channel.

    Lanes go on as memory does. The pixels of a cell share the REACH_Y x REACH_X pixels of x that they are made of, each
    loaded once. TAPS[i][j][k]: which tap of f leads from pixel (i, j) of those to pixel k of the cell, or -1 for none.
    """
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    lane = program % blocks * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        channel, cell_x, cell_y = lane % channels, lane // channels % cells_x, lane // channels // cells_x
        pixel_step, channel_step, out_channel_step = channels, 1, 1
    else:
        cell_x, cell_y, channel = lane % cells_x, lane // cells_x % cells_y, lane // cells_x // cells_y
        pixel_step, channel_step, out_channel_step = 1, height * width, out_height * out_width
    inside = lane < channels * cells_y * cells_x

    from_y, from_x = cell_y * STEP_Y + origin_y, cell_x * STEP_X + origin_x
    x += image * channels * height * width
    corner = x + channel * channel_step + (from_y * width + from_x) * pixel_step
    column_exists = ()
    for j in tl.static_range(REACH_X):
        column_exists += ((from_x + j >= 0) & (from_x + j < width),)  # type: ignore[assignment]
    sums = (tl.zeros((BLOCK,), WIDE),) * (CELL_Y * CELL_X)
    for i in tl.static_range(REACH_Y):
        row_exists = inside & (from_y + i >= 0) & (from_y + i < height)
        for j in tl.static_range(REACH_X):
            exists = row_exists & column_exists[j]
            value = tl.load(corner + (i * width + j) * pixel_step, mask=exists, other=0.0).to(WIDE)
            added = ()
            for k in tl.static_range(CELL_Y * CELL_X):
                if _tap(TAPS, i, j, k) < 0:
                    added += (sums[k],)  # type: ignore[assignment]
                else:
                    added += (sums[k] + value * tl.load(f + _tap(TAPS, i, j, k)).to(WIDE),)  # type: ignore[assignment]
            sums = added

    to_y, to_x = cell_y * CELL_Y, cell_x * CELL_X
    y += image * channels * out_height * out_width
    corner = y + channel * out_channel_step + (to_y * out_width + to_x) * pixel_step
    for r in tl.static_range(CELL_Y):
        for c in tl.static_range(CELL_X):
            exists = inside & (to_y + r < out_height) & (to_x + c < out_width)
            result = (sums[r * CELL_X + c] * GAIN).to(y.dtype.element_ty)
            tl.store(corner + (r * out_width + c) * pixel_step, result, mask=exists)


class _Axis(NamedTuple):
    """How the outputs along one axis, in cells of `cell`, meet inputs and taps.

    Output o takes tap k from up-sampled pixel o * down + k - before, so output r of cell q takes tap
    m * up - phase - r * down from input q * step + origin + m, for 0 <= m < reach.
    """

    cells: int
    step: int
    origin: int
    reach: int
    taps: tuple[tuple[int, ...], ...]  # [reach][cell], -1 for none

    @classmethod
    @lru_cache(256)
    def of(cls, cell: int, up: int, down: int, before: int, taps: int, out_size: int, flip: bool) -> "_Axis":
        phase = -before % up
        reach = (taps - 1 + phase + (cell - 1) * down) // up + 1
        met = [[m * up - phase - r * down for r in range(cell)] for m in range(reach)]
        # Convolution turns the filter: tap k is the k-th from its end.
        table = tuple(tuple((k if flip else taps - 1 - k) if 0 <= k < taps else -1 for k in row) for row in met)
        return cls(-(-out_size // cell), cell * down // up, -(before + phase) // up, reach, table)


@lru_cache(256)
def _tap_table(vertical: _Axis, horizontal: _Axis, taps_x: int) -> Any:
    """[reach y][reach x][pixel of the cell]: the tap's number in f [fh, fw], -1 for none."""
    return tuple(
        tuple(tuple(v * taps_x + h if v >= 0 <= h else -1 for v in row for h in column) for column in horizontal.taps)
        for row in vertical.taps
    )


def _cell(up: tuple[int, int], down: tuple[int, int], f: Tensor, channels_last: bool) -> tuple[int, int]:
    """The cell's height and width: periods of the up-sampling; else 4 pixels, to load each input 3 times less often.

    (A 4x4 filter: 25 or 28 loads for 4 pixels of y in place of 64.) In NCHW they are in a column, so that neighbouring
    lanes read and write neighbouring pixels; in channels last neighbouring lanes are channels in any case.
    """
    cell = (up[0] // gcd(up[0], down[0]), up[1] // gcd(up[1], down[1]))
    if cell == (1, 1) and f.numel() <= _FEW_TAPS:
        return (2, 2) if channels_last else (4, 1)
    return cell


def _lanes(cell: tuple[int, int], channels_last: bool) -> int:
    """Lanes of a program of 128 threads: in NCHW two for each; in channels last 8, which are 16 bytes of a 16-bit type.

    (Fewer where cells are large, to hold no more than 32 sums in each thread.)
    """
    if not channels_last:
        return 256
    return max(128, 1 << min(1024, 4096 // (cell[0] * cell[1])).bit_length() - 1)


def _lies_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _empty_result(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], gain: float, flip: bool
) -> Tensor:
    settings = _Settings((up[0], up[1]), (down[0], down[1]), (padding[0], padding[1], padding[2], padding[3]), gain)
    size = settings.output_size(x.shape[2], x.shape[3], f)
    layout = torch.channels_last if _lies_channels_last(x) else torch.contiguous_format
    return torch.empty(*x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=layout)


@register(
    "upfirdn2d(Tensor x, Tensor f, int[2] up, int[2] down, int[4] padding, float gain, bool flip) -> Tensor",
    fake=_empty_result,
)
def _run_triton(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], gain: float, flip: bool
) -> Tensor:
    """x lies in one of the two layouts, f contiguous."""
    y = _empty_result(x, f, up, down, padding, gain, flip)
    channels_last = _lies_channels_last(x)
    (up_y, up_x), (down_y, down_x), (left, _, top, _), (taps_y, taps_x) = up, down, padding, f.shape
    cell = _cell((up_y, up_x), (down_y, down_x), f, channels_last)
    block = _lanes(cell, channels_last)
    n, channels, height, width = x.shape
    out_height, out_width = y.shape[2:]
    v = _Axis.of(cell[0], up_y, down_y, top, taps_y, out_height, flip)
    h = _Axis.of(cell[1], up_x, down_x, left, taps_x, out_width, flip)
    blocks = -(-channels * v.cells * h.cells // block)
    launch(
        _kernel, (n * blocks,),
        x, f, y, channels, height, width, out_height, out_width, v.cells, h.cells, blocks, v.origin, h.origin,
        STEP_Y=v.step, STEP_X=h.step, REACH_Y=v.reach, REACH_X=h.reach, CELL_Y=cell[0], CELL_X=cell[1],
        TAPS=_tap_table(v, h, taps_x), GAIN=gain, CHANNELS_LAST=channels_last, WIDE=wide(x), BLOCK=block,
    )  # fmt: skip
    return y


# --- PyTorch: a depthwise convolution ---


def _run_torch(x: Tensor, f: Tensor, settings: _Settings) -> Tensor:
    """Depthwise convolution with a stride for `down`, transposed with a stride for `up`: no zero is ever multiplied.

    On a CPU in channels_last it takes 1.5 to 2 copies' time; separable passes and sliced sums were measured slower.
    """
    up, down, (left, right, top, bottom), gain, flip = settings
    c = x.shape[1]
    fh, fw = f.shape
    if up == (1, 1):
        weight = _depthwise(f if flip else f.flip([0, 1]), gain, x)  # conv2d correlates
        if left == right >= 0 and top == bottom >= 0:
            return F.conv2d(x, weight, stride=down, padding=(top, left), groups=c)
        return F.conv2d(F.pad(x, [left, right, top, bottom]), weight, stride=down, groups=c)
    # Inserting zeros and convolving is a transposed convolution, which pads by fh - 1 before and fh - up after.
    weight = _depthwise(f.flip([0, 1]) if flip else f, gain, x)
    left, right, top, bottom = fw - 1 - left, fw - up[1] - right, fh - 1 - top, fh - up[0] - bottom  # what to crop
    if left == right >= 0 and top == bottom >= 0:
        y = F.conv_transpose2d(x, weight, stride=up, padding=(top, left), groups=c)
    else:
        y = F.pad(F.conv_transpose2d(x, weight, stride=up, groups=c), [-left, -right, -top, -bottom])
    return y[:, :, :: down[0], :: down[1]] if down != (1, 1) else y


def _depthwise(f: Tensor, gain: float, x: Tensor) -> Tensor:
    return (f * gain).to(x.dtype).expand(x.shape[1], 1, -1, -1)


# --- What is called ---


class _UpFirDn(torch.autograd.Function):
    """Its derivative is itself with up and down exchanged and the filter turned by half a circle, to every order.

    (PyTorch's second derivative of a depthwise convolution runs channel by channel: ten times slower for all of R1.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, settings: _Settings, triton: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(f)
        ctx.settings = (settings.adjoint(x.shape[2], x.shape[3], f), triton)
        if not triton:
            with no_autocast(x.device.type):
                return _run_torch(x, f, settings)
        if not _lies_channels_last(x):
            x = x.contiguous()
        up, down, padding, gain, flip = settings
        return _run_triton(x, f.contiguous(), up, down, padding, gain, flip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (f,) = ctx.saved_tensors
        (dy,) = grads
        return None if dy is None else _UpFirDn.apply(dy, f, *ctx.settings), None, None, None


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: Factor = 1,
    down: Factor = 1,
    padding: Padding = (0, 0, 0, 0),
    gain: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Zero-insert by `up`, pad, convolve with `f` times `gain`, keep every `down`-th pixel; any order of derivative.

    x: [N, C, H, W], any floating dtype; f: [fh, fw], constant. up, down: of both axes, or (vertical, horizontal).
    padding: (left, right, top, bottom), negative crops. PyTorch rounds f * gain to x's dtype, Triton does not.
    Triton takes filters of up to 64 taps, and images of fewer than 2^31 elements each; others run in PyTorch.
    Returns [N, C, (H * up + top + bottom - fh) // down + 1, (W * up + left + right - fw) // down + 1] in x's dtype.
    """
    if x.ndim != 4 or f.ndim != 2:
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, H, W] and f {tuple(f.shape)} [fh, fw]")
    if min(*_pair(up), *_pair(down)) < 1:
        raise ValueError(f"up={up} and down={down} must be 1 or more")
    settings = _Settings(_pair(up), _pair(down), padding, float(gain))
    size = settings.output_size(x.shape[2], x.shape[3], f)
    if min(size) < 1:
        raise ValueError(f"x {tuple(x.shape)} with up={up} and padding={padding} is smaller than f {tuple(f.shape)}")
    triton = runs_triton(impl, x)
    largest = x.shape[1] * max(x.shape[2] * x.shape[3], size[0] * size[1])
    if triton and (f.numel() > _MOST_TAPS or largest >= 2**31):
        if impl == "triton":
            raise ValueError(f"x {tuple(x.shape)} or f {tuple(f.shape)} is too large for the Triton kernel")
        triton = False
    return _UpFirDn.apply(x, f, settings, triton)


def upsample2d(x: Tensor, f: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Twice the size, brightness kept: [N, C, H, W] -> [N, C, 2 H, 2 W]. f: the normalised [4, 4] filter."""
    return upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4.0, impl=impl)


def downsample2d(x: Tensor, f: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Half the size: [N, C, H, W] -> [N, C, H / 2, W / 2]. f: the normalised [4, 4] filter."""
    return upfirdn2d(x, f, down=2, padding=(1, 1, 1, 1), impl=impl)
