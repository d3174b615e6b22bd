"""The parts of adaptive discriminator augmentation that move or filter pixels (arXiv 2006.06676, appendix B).

All are linear in the image, and are handed to autograd as such (`linear_map`): the forward saves nothing but a few
numbers an image, and R1 can differentiate through them as often as it likes. Images are [B, C, H, W]; outside of its
frame an image continues as its mirror image about the centres of its outermost pixels, without end. So the result for
one image does not depend on its neighbours in the batch, whose motions would otherwise set a common margin, and no
margin as large as the image is ever up-sampled.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lowvram.kernels.dispatch import runs_triton
from lowvram.kernels.grid_sample import sample_adjoint, sample_map
from lowvram.kernels.linear_map import linear_map
from lowvram.kernels.upfirdn2d import upfirdn2d

# The orthogonal low-pass filters of the symlet wavelets (Daubechies, Ten Lectures on Wavelets, table 8.3): unit norm,
# orthogonal to their own shifts by two, sum sqrt(2).
SYM2 = (-0.1294095225512604, 0.2241438680420134, 0.8365163037378079, 0.4829629131445342)
SYM6 = (
    0.015404109327044804,
    0.0034907120842221618,
    -0.11799011114851977,
    -0.04831174258569758,
    0.4910559419279738,
    0.7876411410286507,
    0.3379294217281656,
    -0.07263752278637652,
    -0.021060292512370852,
    0.04472490177078131,
    0.001767711864253988,
    -0.007800708325032377,
)
_TAPS = len(SYM6)
_HALF = _TAPS // 2
_CENTRE = _HALF - 1  # the tap at which an up-sampled pixel sits, but for _LAG
# A symlet is not quite symmetric: its centre of mass, hence the picture, lies this many up-sampled pixels off _CENTRE.
# Uncorrected, a turn by 180 degrees would shift the image by 2 * _LAG = 0.2 of them.
_LAG = sum(tap * h for tap, h in enumerate(SYM6)) / math.sqrt(2) - _CENTRE
_MARGIN = 6  # source pixels beyond the edge that are up-sampled too
_UP_MARGIN = 7  # up-sampled pixels beyond the edge of which they give the true value ...
_UP_SPARE = 1  # ... when the last one is dropped, so that both sides have as many


def translate(x: Tensor, y: Tensor) -> Tensor:
    """Matrices [B, 3, 3] that move points by (x, y), each [B]."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([one, zero, x, zero, one, y])


def scale(x: Tensor, y: Tensor) -> Tensor:
    """Matrices [B, 3, 3] that multiply coordinates by (x, y), each [B]."""
    zero = torch.zeros_like(x)
    return _matrix([x, zero, zero, zero, y, zero])


def rotate(angle: Tensor) -> Tensor:
    """Matrices [B, 3, 3] that turn points from x towards y (clockwise on a screen); angle [B] in radians."""
    zero, cos, sin = torch.zeros_like(angle), angle.cos(), angle.sin()
    return _matrix([cos, -sin, zero, sin, cos, zero])


def _matrix(rows: list[Tensor]) -> Tensor:
    zero, one = torch.zeros_like(rows[0]), torch.ones_like(rows[0])
    return torch.stack([*rows, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


# --- Pixel blitting: copies of whole pixels ---


def blit(images: Tensor, flip: Tensor, quarter_turns: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Mirror left-right where `flip`, then turn, then shift by whole pixels; each pixel is an exact copy of one.

    images [B, C, H, W] (H = W where an image is turned by an odd number), flip bool [B], quarter_turns int64 [B]
    (counter-clockwise, as torch.rot90 over dims (2, 3)), shift_x and shift_y int64 [B] (right, down).
    """
    height, width = images.shape[2:]
    u = fold(torch.arange(width) - shift_x[:, None], width)  # [B, W] column before the shift
    v = fold(torch.arange(height) - shift_y[:, None], height)  # [B, H] row before the shift
    turns, flip = quarter_turns[:, None], flip[:, None]
    odd = turns % 2 == 1
    # Undo the turn: the source (row, column) is (v, u) or, for an odd turn, (u, v), each counted from one end or the
    # other. Undo the mirroring: count columns from the other end.
    u = torch.where((turns >= 2) ^ (flip & ~odd), width - 1 - u, u)
    v = torch.where((turns == 1) ^ (turns == 2) ^ (flip & odd), height - 1 - v, v)
    from_row = torch.where(odd, v, v * width)  # [B, H] what an output row adds to the flat source index
    from_column = torch.where(odd, u * width, u)  # [B, W] what an output column adds
    rows, columns = (index.to(images.device, non_blocking=True) for index in (from_row, from_column))
    return linear_map(images, _take, _put, rows, columns)


def _take(images: Tensor, from_row: Tensor, from_column: Tensor) -> Tensor:
    return images.flatten(2).gather(2, _flat_index(images, from_row, from_column)).view(images.shape)


def _put(grad: Tensor, from_row: Tensor, from_column: Tensor) -> Tensor:
    index = _flat_index(grad, from_row, from_column)
    return torch.zeros_like(grad).flatten(2).scatter_add(2, index, grad.flatten(2)).view(grad.shape)


def _flat_index(images: Tensor, from_row: Tensor, from_column: Tensor) -> Tensor:
    index = from_row[:, :, None] + from_column[:, None, :]  # [B, H, W]
    return index.flatten(1)[:, None].expand(-1, images.shape[1], -1)  # [B, C, H * W], no copy


def fold(index: Tensor, size: int) -> Tensor:
    """Fold any integer index into [0, size) by mirroring about the centres of the first and the last pixel."""
    last = size - 1
    return last - (index % max(2 * last, 1) - last).abs()


# --- General geometric transformations ---


def warp(images: Tensor, to_source: Tensor) -> Tensor:
    """Resample images by an affine map: up-sample twofold, sample bilinearly, down-sample.

    images [B, C, H, W], H and W from 4. to_source: [B, 3, 3] on the CPU, from an output pixel to the point of the
    source shown there, in pixels from the image's centre, x right and y down. The sym6 filter is orthogonal to its own
    even shifts, so that a shift by whole pixels reproduces them (to rounding), but for those that come from beyond the
    edge (a mirrored filter differs in the finest detail). Saves 6 numbers an image.
    """
    height, width = images.shape[2:]
    half = torch.tensor([width - 1, height - 1], dtype=torch.float64)  # half the size, in up-sampled pixels
    linear, shift = to_source[:, :2, :2].double(), 2 * to_source[:, :2, 2:].double()
    theta = torch.cat([linear, shift], dim=2) / half[:, None]  # [B, 2, 3], to where -1 and 1 are the edges' centres
    return linear_map(images, _warp, _warp_adjoint, to_device(theta, images))


def _warp(images: Tensor, theta: Tensor) -> Tensor:
    height, width = images.shape[2:]
    grid = _source_grid(theta, height, width)
    padded = _reflect(_reflect(images, 2, _MARGIN), 3, _MARGIN)
    up = _upsample(padded, math.sqrt(2), _UP_SPARE)  # [B, C, 2H + 13, 2W + 13]: 7 beyond the outermost pixels
    moved = sample_map(up, grid, padding_mode="border", align_corners=True)  # [B, C, 2H + 10, 2W + 10]
    del up, grid
    return _downsample(moved, 1 / math.sqrt(2))


def _warp_adjoint(grad: Tensor, theta: Tensor) -> Tensor:
    height, width = grad.shape[2:]
    grid = _source_grid(theta, height, width)
    pad = _HALF - 1
    moved = _upsample(F.pad(grad, (pad, pad, pad, pad)), 1 / math.sqrt(2))  # [B, C, 2H + 10, 2W + 10]
    up_height, up_width = (2 * side - 1 + 2 * _UP_MARGIN for side in (height, width))
    up = sample_adjoint(moved, grid, height=up_height, width=up_width, padding_mode="border", align_corners=True)
    del moved, grid
    low, high = _TAPS - 2, _TAPS - 2 + _UP_SPARE
    padded = _downsample(F.pad(up, (low, high, low, high)), math.sqrt(2))  # [B, C, H + 12, W + 12]
    return _reflect_adjoint(_reflect_adjoint(padded, 2, _MARGIN), 3, _MARGIN)


def _source_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Where each up-sampled output pixel, and the margin that the down-sampling filter reaches, comes from.

    -> [B, 2H + 10, 2W + 10, 2] in units of the up-sampled source with its margin. Element-wise, not by a matrix product
    that may run in TF32: 10 bits of mantissa would be an error of a pixel.
    """
    x, y = (
        torch.arange(2 * side + _TAPS - 2, device=theta.device, dtype=theta.dtype) - (_CENTRE + _LAG + side - 1)
        for side in (width, height)
    )
    coordinates = []
    for axis, side in enumerate((width, height)):
        by_x, by_y, offset = theta[:, axis, :, None, None].unbind(1)  # each [B, 1, 1]
        at = torch.addcmul(torch.addcmul(offset, by_y, y[:, None]), by_x, x)  # [B, H', W'], -1 and 1 at the edges
        coordinates.append(_mirrored(at, half=side - 1))
    return torch.stack(coordinates, dim=-1)


def _mirrored(at: Tensor, half: int) -> Tensor:
    """Bring coordinates from beyond the edges back to their mirror image, and into units of the source with its margin.

    Left alone are those few of which the up-sampled margin has the true value: mirrored, an asymmetric filter is
    another filter, and the ring of pixels at the edge would not be exact.
    """
    folded = (at + 1).remainder_(4).sub_(2).abs_().neg_().add_(1)
    folded = torch.where(at.abs() <= 1 + (_UP_MARGIN - 0.5) / half, at, folded)
    return folded.mul_(half / (half + _UP_MARGIN)).add_(_LAG / (half + _UP_MARGIN))


def _upsample(x: Tensor, gain: float, spare: int = 0) -> Tensor:
    """Twofold zero-stuffing and SYM6 along both axes, where it fits: [B, C, H, W] -> [B, C, 2H - 10, 2W - 10].

    spare: so many pixels fewer at the end of each axis. In PyTorch each of the four phases is a depth-wise convolution
    of its own (one with four outputs a plane is slower on a CPU), in Triton each axis a pass.
    """
    if runs_triton("auto", x):
        taps = _sym6(gain, x)
        x = upfirdn2d(x, taps[None], up=(1, 2), padding=(1, -spare, 0, 0))
        return upfirdn2d(x, taps[:, None], up=(2, 1), padding=(0, 0, 1, -spare))
    batch, channels, height, width = x.shape
    planes = batch * channels
    taps = _sym6(gain, x).view(_HALF, 2).t().flip(1)  # [2, 6]: for the even and for the odd pixels
    planes_first = x.reshape(1, planes, height, width)
    phases = []
    for rows in taps:
        for columns in taps:
            kernel = torch.outer(rows, columns).expand(planes, 1, -1, -1)  # [B C, 1, 6, 6]
            phases.append(F.conv2d(planes_first, kernel, groups=planes)[0])
    y = torch.stack(phases, dim=1).unflatten(1, (2, 2))  # [B C, 2, 2, H - 5, W - 5]
    y = y.permute(0, 3, 1, 4, 2)  # rows and columns interleaved
    y = y.reshape(batch, channels, 2 * (height - _HALF + 1), 2 * (width - _HALF + 1))
    return y[:, :, :-spare, :-spare].contiguous() if spare else y


def _downsample(x: Tensor, gain: float) -> Tensor:
    """SYM6 reversed, and every other pixel: [B, C, 2H + 10, 2W + 10] -> [B, C, H, W]; the transpose of `_upsample`."""
    batch, channels, height, width = x.shape
    planes = batch * channels
    taps = _sym6(gain, x)
    if runs_triton("auto", x):
        turned = taps.flip(0)  # as upfirdn2d convolves
        return upfirdn2d(upfirdn2d(x, turned[None], down=(1, 2)), turned[:, None], down=(2, 1))
    kernel = torch.outer(taps, taps).expand(planes, 1, -1, -1)  # [B C, 1, 12, 12]
    y = F.conv2d(x.reshape(1, planes, height, width), kernel, stride=2, groups=planes)
    return y.view(batch, channels, *y.shape[2:])


def _sym6(gain: float, like: Tensor) -> Tensor:
    return to_device(torch.tensor(SYM6, dtype=torch.float64) * gain, like)


def to_device(numbers: Tensor, like: Tensor) -> Tensor:
    """A few numbers made on the CPU, brought to the dtype and device of `like` without waiting for that device."""
    return numbers.to(like.dtype).to(like.device, non_blocking=True)


def _reflect(x: Tensor, axis: int, margin: int) -> Tensor:
    """Extend both ends of an axis by its mirror image."""
    size = x.shape[axis]
    return x.index_select(axis, fold(torch.arange(-margin, size + margin, device=x.device), size))


def _reflect_adjoint(grad: Tensor, axis: int, margin: int) -> Tensor:
    size = grad.shape[axis] - 2 * margin
    index = fold(torch.arange(-margin, size + margin, device=grad.device), size)
    return grad.new_zeros([*grad.shape[:axis], size, *grad.shape[axis + 1 :]]).index_add_(axis, index, grad)


# --- Image-space filtering ---


def band_filters() -> Tensor:
    """Zero-phase filters of the bands [0, pi/8], [pi/8, pi/4], [pi/4, pi/2], [pi/2, pi]: float64 [4, 43]; sum = 1.

    With SYM2's half-band filter L(z) = H(z) H(1/z) / 2 and its complement 1 - L, the wavelet tree gives
    L(z) L(z^2) L(z^4), L(z) L(z^2) (1 - L(z^4)), L(z) (1 - L(z^2)) and 1 - L(z).
    """
    return torch.tensor(_band_taps(), dtype=torch.float64)


@cache
def _band_taps() -> list[list[float]]:
    low = [tap / 2 for tap in _convolve(SYM2, SYM2[::-1])]  # 7 taps
    below = [1.0]  # what the bands above leave over
    bands: list[list[float]] = []
    for step in (1, 2, 4):
        stretched = [low[i // step] if i % step == 0 else 0.0 for i in range((len(low) - 1) * step + 1)]
        lower = _convolve(below, stretched)
        bands.insert(0, [a - b for a, b in zip(_centred(below, len(lower)), lower, strict=True)])
        below = lower
    return [_centred(band, len(below)) for band in (below, *bands)]


def _convolve(a: Sequence[float], b: Sequence[float]) -> list[float]:
    out = [0.0] * (len(a) + len(b) - 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            out[i + j] += left * right
    return out


def _centred(taps: Sequence[float], length: int) -> list[float]:
    margin = [0.0] * ((length - len(taps)) // 2)
    return [*margin, *taps, *margin]


def filter_images(images: Tensor, taps: Tensor) -> Tensor:
    """Filter each image along both axes with its own symmetric filter: images [B, C, H, W], taps [B, odd length]."""
    return linear_map(images, _filter, _filter_adjoint, to_device(taps, images))


def _filter(images: Tensor, taps: Tensor) -> Tensor:
    margin = taps.shape[1] // 2
    for axis in (2, 3):
        images = _correlate(_reflect(images, axis, margin), taps, axis)
    return images


def _filter_adjoint(grad: Tensor, taps: Tensor) -> Tensor:
    margin = taps.shape[1] // 2
    for axis in (2, 3):  # the filter is its own mirror image, so that correlation is convolution
        wide = (0, 0, 2 * margin, 2 * margin) if axis == 2 else (2 * margin, 2 * margin)
        grad = _reflect_adjoint(_correlate(F.pad(grad, wide), taps, axis), axis, margin)
    return grad


def _correlate(x: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Filter along one axis, where the taps fit; each image by its own. x [B, C, H, W], taps [B, T]."""
    planes = x.shape[0] * x.shape[1]
    weight = taps.repeat_interleave(x.shape[1], 0)[:, None]  # [B C, 1, T]
    y = F.conv2d(x.reshape(1, planes, *x.shape[2:]), weight.unsqueeze(5 - axis), groups=planes)
    return y.view(*x.shape[:2], *y.shape[2:])
