"""What StyleGAN2 does round a native convolution (arXiv 1912.04958, section 2.2), each in one pass over memory.

Modulation, y = style * x, with its backward: g * style in g's place, and sum over H, W of g * x, for which PyTorch
makes a whole map of products. Demodulation wants the squares of each kernel summed, without a tensor of the squares.
Shapes: x [B, I, H, W], style [B, I], w [O, I, k, k]. `conv2d` calls the first two; here they are without autograd.
"""

from typing import Any

import torch
from torch import Tensor

from lowvram.kernels.dispatch import Impl, jit_for_any, launch, register, runs_triton, tl, triton, wide

_TILE = 4096  # elements of x: 32 for each of 128 threads, four loads of 16 bytes in 16 bits
_PARTS = 8  # of a batch, whose products PyTorch makes one after another
_KERNELS = 256  # of a program that sums squares: two for each of 128 threads


def plain(x: Tensor, style: Tensor) -> Tensor:
    """The meaning of modulation, differentiable by autograd to any order."""
    return x * style[:, :, None, None]


# --- Triton ---


@jit_for_any("channel_blocks", "pixel_blocks")
def _modulate_kernel(
    x, style, y, channels, pixels, channel_blocks, pixel_blocks,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_C channels x BLOCK_P pixels of an image. Reads 1, writes 1 element for each of x."""
    program = tl.program_id(0)
    block = program % (channel_blocks * pixel_blocks)
    image = (program // (channel_blocks * pixel_blocks)).to(tl.int64)
    channel = block % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = block // channel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    factor = tl.load(style + image * channels + channel, mask=channel < channels, other=0.0).to(WIDE)
    if CHANNELS_LAST:
        offset = pixel[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        factor = factor[None, :]
    else:
        offset = channel[:, None] * pixels + pixel[None, :]
        inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        factor = factor[:, None]
    at = image * channels * pixels
    result = tl.load(x + at + offset, mask=inside, other=0.0).to(WIDE) * factor
    tl.store(y + at + offset, result.to(y.dtype.element_ty), mask=inside)


@jit_for_any("channel_blocks", "pixel_blocks")
def _modulate_backward_kernel(
    g, x, style, partial, channels, pixels, channel_blocks, pixel_blocks,
    SCALE_G: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The same tile. Reads g and x, writes g, and a sum for BLOCK_P elements: partial [B, pixel_blocks, I].

    The sums are added afterwards, in a fixed order: no atomics, so that a run can be repeated to the bit.
    """
    program = tl.program_id(0)
    block = program % (channel_blocks * pixel_blocks)
    image = (program // (channel_blocks * pixel_blocks)).to(tl.int64)
    pixel_block = block // channel_blocks
    channel = block % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = pixel_block * BLOCK_P + tl.arange(0, BLOCK_P)
    factor = tl.load(style + image * channels + channel, mask=channel < channels, other=0.0).to(WIDE)
    if CHANNELS_LAST:
        offset = pixel[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        factor = factor[None, :]
    else:
        offset = channel[:, None] * pixels + pixel[None, :]
        inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        factor = factor[:, None]
    at = image * channels * pixels
    grad = tl.load(g + at + offset, mask=inside, other=0.0).to(WIDE)
    product = grad * tl.load(x + at + offset, mask=inside, other=0.0).to(WIDE)
    total = tl.sum(product, axis=0 if CHANNELS_LAST else 1)
    tl.store(partial + (image * pixel_blocks + pixel_block) * channels + channel, total, mask=channel < channels)
    if SCALE_G:
        tl.store(g + at + offset, (grad * factor).to(g.dtype.element_ty), mask=inside)


@jit_for_any("kernels")
def _energy_kernel(w, energy, kernels, TAPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A lane for each kernel: its TAPS numbers lie together, so that the loads after the first hit the cache."""
    kernel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), WIDE)
    for tap in tl.static_range(TAPS):
        value = tl.load(w + kernel * TAPS + tap, mask=kernel < kernels, other=0.0).to(WIDE)
        total += value * value
    tl.store(energy + kernel, total.to(energy.dtype.element_ty), mask=kernel < kernels)


def _tile(channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P): along memory as far as reads want it, the rest across."""
    if channels_last:
        block_c = min(64, max(8, triton.next_power_of_2(channels)))
        return block_c, _TILE // block_c
    block_p = min(_TILE, max(8, triton.next_power_of_2(pixels)))
    return _TILE // block_p, block_p


def _lies_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if _lies_channels_last(like) else torch.contiguous_format)


def _grid(x: Tensor, block_c: int, block_p: int) -> tuple[int, int, int, int]:
    """channels, pixels, and the blocks of each."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    return channels, pixels, -(-channels // block_c), -(-pixels // block_p)


@register("modulate(Tensor x, Tensor style) -> Tensor", fake=lambda x, style: torch.empty_like(x))
def _modulate_triton(x: Tensor, style: Tensor) -> Tensor:
    """x lies in one of the two layouts, style contiguous."""
    y = torch.empty_like(x)
    last = _lies_channels_last(x)
    block_c, block_p = _tile(x.shape[1], x.shape[2] * x.shape[3], last)
    sizes = _grid(x, block_c, block_p)
    grid = (len(x) * sizes[2] * sizes[3],)
    launch(
        _modulate_kernel, grid, x, style, y, *sizes,
        CHANNELS_LAST=last, WIDE=wide(x), BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip
    return y


@register(
    "modulate_backward(Tensor(a!) g, Tensor x, Tensor style, bool scale_g) -> Tensor",
    fake=lambda g, x, style, scale_g: torch.empty_like(style),
)
def _modulate_backward_triton(g: Tensor, x: Tensor, style: Tensor, scale_g: bool) -> Tensor:
    """-> dstyle; g becomes g * style. g lies as x does."""
    last = _lies_channels_last(x)
    block_c, block_p = _tile(x.shape[1], x.shape[2] * x.shape[3], last)
    sizes = _grid(x, block_c, block_p)
    dtype = torch.promote_types(x.dtype, torch.float32)
    partial = torch.empty(len(x), sizes[3], x.shape[1], dtype=dtype, device=x.device)
    launch(
        _modulate_backward_kernel, (len(x) * sizes[2] * sizes[3],), g, x, style, partial, *sizes,
        SCALE_G=scale_g, CHANNELS_LAST=last, WIDE=wide(x), BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip
    return (partial[:, 0] if sizes[3] == 1 else partial.sum(1)).to(style.dtype)


@register("kernel_energy(Tensor w) -> Tensor", fake=lambda w: w.new_empty(w.shape[:2]))
def _energy_triton(w: Tensor) -> Tensor:
    energy = w.new_empty(w.shape[:2])
    kernels, taps = energy.numel(), w.shape[2] * w.shape[3]
    launch(_energy_kernel, (-(-kernels // _KERNELS),), w, energy, kernels, TAPS=taps, WIDE=wide(w), BLOCK=_KERNELS)
    return energy


# --- What is called ---


def fits_triton(x: Tensor) -> bool:
    """Whether the kernels' offsets within one image of x [B, I, H, W] stay below 2^31."""
    return x.shape[1] * x.shape[2] * x.shape[3] < 2**31


def modulate(x: Tensor, style: Tensor, triton: bool) -> Tensor:
    """style * x in x's layout and dtype, for the forward of an autograd Function."""
    if not triton:
        return plain(x, style)
    return _modulate_triton(x if _lies_channels_last(x) else x.contiguous(), style.contiguous())


def modulate_backward(g: Tensor, x: Tensor, style: Tensor, scale_g: bool, triton: bool) -> tuple[Tensor, Tensor]:
    """(g * style in g's own memory, dstyle = sum over H, W of g * x), in no more than a part of a map besides.

    g: the gradient by style * x, which nobody else may need. scale_g=False leaves it as it is.
    """
    if triton:
        x = x if _lies_channels_last(x) else x.contiguous()
        g = _in_layout_of(g, x)
        return g, _modulate_backward_triton(g, x, style.contiguous(), scale_g)
    parts = zip(g.chunk(_PARTS), x.chunk(_PARTS), strict=True)
    dstyle = torch.cat([(u * v).sum((2, 3)) for u, v in parts])
    return g.mul_(style[:, :, None, None]) if scale_g else g, dstyle


class _KernelEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, triton: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w)
        return _energy_triton(w.contiguous()) if triton else w.square().sum((2, 3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (w,) = ctx.saved_tensors
        (d,) = grads
        return None if d is None else w * (2 * d)[:, :, None, None], None  # one pass, and differentiable


def kernel_energy(w: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The sum of the squares of each kernel: w [O, I, k, k] -> [O, I], in w's dtype; keeps w; exact to any order.

    Equation 3 of arXiv 1912.04958 is rsqrt(style^2 @ kernel_energy(w).T + epsilon): [B, O].
    """
    if w.ndim != 4:
        raise ValueError(f"w {tuple(w.shape)} must be [O, I, k, k]")
    return _KernelEnergy.apply(w, runs_triton(impl, w))
