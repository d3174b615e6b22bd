"""The weight gradient of a convolution as products of matrices: dy [B, O, h, w], x [B, I, H, W] -> dw [O, I, k, k].

dw[:, :, u, v] sums dy[r, c] x[s r + u - p, s c + v - p]^T over the pixels of all images (s stride, p padding). With
channels last it is one product of matrices for each (u, v). Where dy and x are laid out in rows of one length, each
with a gap of zeros behind it, a shift in the image is a shift in memory, and no product needs a copy of its own.

For processors with AVX2 and without AVX-512, where oneDNN's own runs at a fifth to two thirds of a forward's speed, the
slower the larger the image.
"""

import functools

import torch
from torch import Tensor

from lowvram.kernels.dispatch import on_gpu, register

_CHANNELS = 32  # of the narrower side, from which on
_MULTIPLICATIONS = 2**25  # and of one of the products


@functools.cache
def _native_is_slow() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def suits(dy: Tensor, x: Tensor, groups: int) -> bool:
    """Whether to take `weight_gradient` rather than PyTorch's own: where it was measured to be faster."""
    if on_gpu(dy) or dy.device.type != "cpu" or dy.dtype != torch.float32 or groups > 1 or not _native_is_slow():
        return False
    out_channels, channels = dy.shape[1], x.shape[1]
    pixels = len(dy) * dy.shape[2] * dy.shape[3]
    return min(out_channels, channels) >= _CHANNELS and pixels * out_channels * channels >= _MULTIPLICATIONS


@register(
    "weight_gradient(Tensor dy, Tensor x, int kernel, int stride, int padding) -> Tensor",
    fake=lambda dy, x, kernel, stride, padding: dy.new_empty(dy.shape[1], x.shape[1], kernel, kernel),
)
def weight_gradient(dy: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """d(sum(dy * conv(x, w))) / dw in fp32 or fp64. Besides the result it holds a copy of dy, and one of x at a time
    by stride^2."""
    size = dy.shape[2:]
    offsets = [divmod(tap - padding, stride) for tap in range(kernel)]  # (shift, which of the stride's pixels)
    low, high = min(0, offsets[0][0]), max(0, offsets[-1][0])
    # What of x is read: up to `high` pixels more than dy has, for of these the last row of dy sees so many.
    beyond = max(0, *(min(-(-whole // stride) - own, high) for whole, own in zip(x.shape[2:], size, strict=True)))
    gap = max(high, beyond - low)
    rows, columns = size[0] + gap, size[1] + gap
    grads = _in_rows(dy, rows, columns)
    dw = dy.new_empty(dy.shape[1], kernel, kernel, x.shape[1])
    for down in {pixel for _, pixel in offsets}:
        for along in {pixel for _, pixel in offsets}:
            part = x[:, :, down::stride, along::stride][:, :, : size[0] + beyond, : size[1] + beyond]
            values = _in_rows(part, rows, columns)
            for u, v in ((u, v) for u in range(kernel) for v in range(kernel)):
                if (offsets[u][1], offsets[v][1]) == (down, along):
                    shift = offsets[u][0] * columns + offsets[v][0]
                    # Pixels of dy whose partner is outside of memory have none in the image.
                    left, right = grads[max(0, -shift) :], values[max(0, shift) :]
                    pixels = min(len(left), len(right))
                    torch.mm(left[:pixels].mT, right[:pixels], out=dw[:, u, v])
    return dw.permute(0, 3, 1, 2).contiguous()


def _in_rows(images: Tensor, rows: int, columns: int) -> Tensor:
    """[B, C, h, w] -> [B * rows * columns, C], with zeros below and to the right of each image."""
    images = images.permute(0, 2, 3, 1)
    if images.shape[1:3] == (rows, columns):
        return images.flatten(0, 2)
    laid = images.new_zeros(len(images), rows, columns, images.shape[3])
    laid[:, : images.shape[1], : images.shape[2]] = images
    return laid.flatten(0, 2)
