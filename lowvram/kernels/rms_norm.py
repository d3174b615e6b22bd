"""y = x / rms(x) * weight over the last dimension, saving x and a number for each row.

RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4). Shapes: x [..., D], weight [D] or none. Plain PyTorch
keeps x / rms(x) as well, and PyTorch's own rms_norm an x of 32 bits under autocast; here the backward computes it again
from x and 1 / rms(x), which is fp32 [..., 1]. Statistics are taken in fp32: the squares of fp16 values overflow fp16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowvram.kernels.derivatives import first_order_only
from lowvram.kernels.dispatch import Impl, jit, launch, register, runs_triton, tl, wide

_TILE = 2048  # elements: two loads of 16 bytes for each of 128 threads, in 16 bits
_PROGRAMS = 512  # of a backward that sums over rows: each leaves a row of fp32, which this bounds


def plain(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The meaning, differentiable by autograd to any order."""
    y = (x * inverse_rms(x, eps)).to(x.dtype)
    return y if weight is None else y * weight.to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) for each row: [..., 1] in fp32, or fp64 for fp64."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


@jit
def beginning(row, n1, n2, s0, s1, s2):
    """Where row begins, of rows [n0, n1, n2] with strides s0, s1, s2. Divided in 32 bits, multiplied in 64."""
    outer = row // n2
    return (outer // n1).to(tl.int64) * s0 + (outer % n1).to(tl.int64) * s1 + (row % n2).to(tl.int64) * s2


@jit
def _forward_kernel(
    x, weight, y, rstd, rows, width, n1, n2, x0, x1, x2, y0, y1, y2,
    EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, held in registers. Reads 1, writes 1 element for each of y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None]
    inside = (row < rows)[:, None] & (column < width)
    at = beginning(row, n1, n2, x0, x1, x2)[:, None] + column
    values = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    r = tl.math.rsqrt(tl.sum(values * values, axis=1) / width + EPS)
    result = values * r[:, None]
    if weight is not None:
        result *= tl.load(weight + column, mask=column < width, other=0.0).to(WIDE)
    at = beginning(row, n1, n2, y0, y1, y2)[:, None] + column
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=row < rows)


@jit
def _backward_kernel(
    dy, x, weight, rstd, dx, sums, rows, width, n1, n2, dy0, dy1, dy2, x0, x1, x2, dx0, dx1, dx2,
    STEPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS times ROWS rows, one after another. Reads 2, writes 1 element for each of x; and a row of `sums`."""
    column = tl.arange(0, BLOCK)[None]
    total = tl.zeros([ROWS, BLOCK], WIDE)
    if weight is not None:
        factor = tl.load(weight + column, mask=column < width, other=0.0).to(WIDE)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        at = beginning(row, n1, n2, x0, x1, x2)[:, None] + column
        normed = tl.load(x + at, mask=inside, other=0.0).to(WIDE) * r
        at = beginning(row, n1, n2, dy0, dy1, dy2)[:, None] + column
        d = tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        if weight is not None:
            total += d * normed
            d *= factor
        result = r * (d - normed * (tl.sum(d * normed, axis=1) / width)[:, None])
        at = beginning(row, n1, n2, dx0, dx1, dx2)[:, None] + column
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
    if weight is not None:
        at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(sums + at, tl.sum(total, axis=0), mask=tl.arange(0, BLOCK) < width)


def tile(width: int) -> dict[str, int]:
    """Whole rows of this width for one program, so that what is summed over a row stays in it."""
    block = next_power_of_two(width)
    return {
        "ROWS": max(1, _TILE // block),
        "BLOCK": block,
        "num_warps": 4 if block <= 4096 else 8 if block <= 16384 else 16,
    }


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is n or more, and 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def strides_of_rows(*tensors: Tensor) -> tuple[int, ...]:
    """How `beginning` finds rows in tensors of one shape: sizes n1 and n2, then three strides for each tensor."""
    if all(t.is_contiguous() for t in tensors):
        width = tensors[0].shape[-1]
        return (1, 1, *(stride for _ in tensors for stride in (width, 0, 0)))
    padded = [t[(None,) * (4 - t.dim())] for t in tensors]
    return (*padded[0].shape[1:3], *(stride for t in padded for stride in t.stride()[:3]))


def addressable(x: Tensor) -> Tensor:
    """x itself where `beginning` can find its rows (queries and keys, cut out of one projection), else a copy."""
    strided = x.dim() <= 4 and x.stride(-1) == 1 and 0 not in x.stride()
    return x if x.is_contiguous() or strided else x.contiguous()


def _fake_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


@register("rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)", fake=_fake_forward)
def _forward_triton(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x must be `addressable`."""
    y, rstd = _fake_forward(x, weight, eps)
    tiles = tile(x.shape[-1])
    grid = (-(-rstd.numel() // tiles["ROWS"]) if x.numel() else 0,)
    sizes = (rstd.numel(), x.shape[-1], *strides_of_rows(x, y))
    launch(_forward_kernel, grid, x, weight, y, rstd, *sizes, EPS=eps, WIDE=wide(x), **tiles)
    return y, rstd


def backward_steps(rows: int, width: int) -> tuple[int, int]:
    """Programs of a backward, and the tiles that each goes through: a power of two, as each number is compiled."""
    tiles = -(-rows // tile(width)["ROWS"]) if width else 0
    steps = next_power_of_two(-(-tiles // _PROGRAMS))
    return -(-tiles // steps), steps


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    programs = 0 if weight is None else backward_steps(rstd.numel(), x.shape[-1])[0]
    return torch.empty_like(x), rstd.new_empty(programs, x.shape[-1])


@register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)", fake=_fake_backward
)
def _backward_triton(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and the weight's gradient in parts that are to be summed: atomics would sum them in an order of their own."""
    dx, sums = _fake_backward(dy, x, weight, rstd)
    rows, width = rstd.numel(), x.shape[-1]
    programs, steps = backward_steps(rows, width)
    sizes = (rows, width, *strides_of_rows(dy, x, dx))
    arguments = (dy, x, weight, rstd, dx, sums, *sizes)
    launch(_backward_kernel, (programs,), *arguments, STEPS=steps, WIDE=wide(x), **tile(width))
    return dx, sums


def forward_torch(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y, bit for bit as `plain`, and 1 / rms(x)."""
    rstd = inverse_rms(x, eps)
    y = torch.mul(x, rstd, out=torch.empty_like(x))
    return y if weight is None else y.mul_(weight.to(y.dtype)), rstd


def backward_torch(dy: Tensor, x: Tensor, factor: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by x and by the factor of y = x * rstd * factor, the latter in fp32. One wide temporary at a time."""
    product = (x * rstd).mul_(dy)
    d_factor = rstd.new_empty(0)
    if factor is not None:
        d_factor = product.sum_to_size(factor.shape)
        if d_factor.numel() == product.numel():  # nothing was summed: it is the product itself
            d_factor = d_factor.clone()
        product.mul_(factor)
    along_x = product.sum(dim=-1, keepdim=True).mul_(rstd).mul_(rstd).div_(-x.shape[-1])
    torch.mul(dy, rstd, out=product)
    if factor is not None:
        product.mul_(factor)
    return product.addcmul_(x, along_x).to(x.dtype), d_factor


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, triton: bool) -> Tensor:
        y, rstd = (_forward_triton if triton else forward_torch)(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.triton = triton
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if ctx.triton:
            dx, sums = _backward_triton(addressable(dy), x, weight, rstd)
            d_weight = sums.sum(dim=0)
        else:
            dx, d_weight = backward_torch(dy, x, weight, rstd)
        return dx, None if weight is None else d_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, impl: Impl = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., D], in x's dtype; arithmetic in fp32.

    weight: [D] of any float dtype. Keeps x and fp32 [..., 1] for the backward, which can't be differentiated again.
    Up to four dimensions of any strides are read where they are, if the last is dense; y then has x's order in memory.

    Raises:
        ValueError: the weight is not [D].
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be {tuple(x.shape[-1:])}: the last dimension of x")
    triton = runs_triton(impl, x)
    weight = None if weight is None else weight.contiguous()
    return _RMSNorm.apply(addressable(x) if triton else x, weight, eps, triton)
