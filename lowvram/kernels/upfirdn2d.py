"""Up-sample (zero insertion), pad, FIR filter, down-sample: one linear operation. Shapes: x [N, C, H, W], f [fh, fw].

It is the resampling of StyleGAN2 (arXiv 1912.04958, appendix B) and of ADA. As it is linear in x and the filter is
fixed, its derivatives of every order are the same operation again, and none of them keeps an activation.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Padding = tuple[int, int, int, int]  # left, right, top, bottom, in pixels of the up-sampled image; negative crops


def reference(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, padding: Padding = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """The meaning, step by step: zero insertion, padding, true convolution with f, every `down`-th pixel."""
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, list(padding))
    kernel = (f * gain).flip([0, 1]).to(x.dtype).expand(c, 1, -1, -1)  # conv2d correlates: flipped, it convolves
    return F.conv2d(x, kernel, groups=c)[:, :, ::down, ::down]


def make_filter(taps: tuple[float, ...] = (1, 3, 3, 1)) -> Tensor:
    """The normalised outer product of taps with themselves: float32 [len(taps), len(taps)], sum 1."""
    row = torch.tensor(taps, dtype=torch.float32)
    f = row.outer(row)
    return f / f.sum()


class _UpFirDn(torch.autograd.Function):
    """Its derivative is itself with up and down exchanged and the filter turned by half a circle, to every order.

    (PyTorch's second derivative of a depthwise convolution runs channel by channel: ten times slower for all of R1.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, up: int, down: int, padding: Padding, gain: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(f)
        ctx.settings = (x.shape, up, down, padding, gain)
        return _run(x, f, up, down, padding, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        (f,) = ctx.saved_tensors
        (dy,) = grads
        if dy is None:
            return None, None, None, None, None, None
        (_, _, height, width), up, down, (left, right, top, bottom), gain = ctx.settings
        fh, fw = f.shape
        out_h, out_w = dy.shape[2:]
        # The adjoint starts where the output's first pixel reached, and must come out at the input's size.
        left, top = fw - 1 - left, fh - 1 - top
        right = (width - 1) * up + fw - out_w * down - left
        bottom = (height - 1) * up + fh - out_h * down - top
        dx = _UpFirDn.apply(dy, f.flip([0, 1]), down, up, (left, right, top, bottom), gain)
        return dx, None, None, None, None, None


def _run(x: Tensor, f: Tensor, up: int, down: int, padding: Padding, gain: float) -> Tensor:
    """Depthwise convolution with a stride for `down`, transposed with a stride for `up`: no zero is ever multiplied.

    On a CPU in channels_last it takes 1.5 to 2 copies' time; separable passes and sliced sums were measured slower.
    """
    c = x.shape[1]
    fh, fw = f.shape
    left, right, top, bottom = padding
    if up == 1:
        weight = _depthwise(f.flip([0, 1]), gain, x)
        if left == right >= 0 and top == bottom >= 0:
            return F.conv2d(x, weight, stride=down, padding=(top, left), groups=c)
        return F.conv2d(F.pad(x, list(padding)), weight, stride=down, groups=c)
    # Inserting zeros and convolving is a transposed convolution, which pads by fh - 1 before and fh - up after.
    weight = _depthwise(f, gain, x)
    left, right, top, bottom = fw - 1 - left, fw - up - right, fh - 1 - top, fh - up - bottom  # what to crop
    if left == right >= 0 and top == bottom >= 0:
        y = F.conv_transpose2d(x, weight, stride=up, padding=(top, left), groups=c)
    else:
        y = F.pad(F.conv_transpose2d(x, weight, stride=up, groups=c), [-left, -right, -top, -bottom])
    return y[:, :, ::down, ::down] if down > 1 else y


def _depthwise(f: Tensor, gain: float, x: Tensor) -> Tensor:
    return (f * gain).to(x.dtype).expand(x.shape[1], 1, -1, -1)


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: Padding = (0, 0, 0, 0),
    gain: float = 1.0,
    impl: Literal["auto", "reference"] = "auto",
) -> Tensor:
    """Zero-insert by `up`, pad, convolve with `f` times `gain`, keep every `down`-th pixel.

    x: [N, C, H, W], any floating dtype; f: [fh, fw], constant. padding: (left, right, top, bottom), negative crops.
    Returns [N, C, (H * up + top + bottom - fh) // down + 1, (W * up + left + right - fw) // down + 1] in x's dtype.
    """
    if x.ndim != 4 or f.ndim != 2:
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, H, W] and f {tuple(f.shape)} [fh, fw]")
    if up < 1 or down < 1:
        raise ValueError(f"up={up} and down={down} must be 1 or more")
    if impl == "reference":
        return reference(x, f, up, down, padding, gain)
    if impl != "auto":
        raise ValueError(f'impl={impl!r} is not known; use "auto" or "reference"')
    return _UpFirDn.apply(x, f, up, down, padding, gain)


def upsample2d(x: Tensor, f: Tensor, *, impl: Literal["auto", "reference"] = "auto") -> Tensor:
    """Twice the size, brightness kept: [N, C, H, W] -> [N, C, 2 H, 2 W]. f: the normalised [4, 4] filter."""
    return upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4.0, impl=impl)


def downsample2d(x: Tensor, f: Tensor, *, impl: Literal["auto", "reference"] = "auto") -> Tensor:
    """Half the size: [N, C, H, W] -> [N, C, H / 2, W / 2]. f: the normalised [4, 4] filter."""
    return upfirdn2d(x, f, down=2, padding=(1, 1, 1, 1), impl=impl)
