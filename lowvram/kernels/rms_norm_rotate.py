"""y = rotate(x / rms(x) * weight): how queries and keys are made ready for attention, in one pass that saves x.

RMS norm as in rms_norm.py; then each pair (i, i + d / 2) of a token is turned by an angle of its own (rotary positions,
Su et al. 2021, arXiv 2104.09864, section 3.4). Shapes: x [..., T, d], weight [d], rotation [2, T, d / 2]: cosines and
sines. Plain PyTorch makes seven tensors of fp32 on the way; here a pair is turned in registers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowvram.kernels import rms_norm as norm
from lowvram.kernels.derivatives import first_order_only
from lowvram.kernels.dispatch import Impl, jit, launch, register, runs_triton, tl, wide
from lowvram.kernels.rms_norm import beginning


def plain(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> Tensor:
    """The meaning, differentiable by autograd to any order."""
    return turned(norm.plain(x, weight, eps), *rotation)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x[i], x[i + d / 2]) of x [..., T, d] turned by angles [T, d / 2]; in fp32, the dtype is x's."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


@jit
def _forward_kernel(
    x, weight, rotation, y, rstd, rows, tokens, half, n1, n2, x0, x1, x2, y0, y1, y2,
    EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, each as two halves in registers. Reads 1, writes 1 element for each of y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)[None]
    exists, inside = column < half, (row < rows)[:, None] & (column < half)
    at = x + beginning(row, n1, n2, x0, x1, x2)[:, None] + column
    first = tl.load(at, mask=inside, other=0.0).to(WIDE)
    second = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
    r = tl.math.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * half) + EPS)
    first *= r[:, None] * tl.load(weight + column, mask=exists, other=0.0).to(WIDE)
    second *= r[:, None] * tl.load(weight + half + column, mask=exists, other=0.0).to(WIDE)
    angle = rotation + (row % tokens)[:, None] * half + column
    cos = tl.load(angle, mask=inside, other=0.0).to(WIDE)
    sin = tl.load(angle + tokens * half, mask=inside, other=0.0).to(WIDE)
    at = y + beginning(row, n1, n2, y0, y1, y2)[:, None] + column
    tl.store(at, (first * cos - second * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(at + half, (first * sin + second * cos).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=row < rows)


@jit
def _backward_kernel(
    dy, x, weight, rotation, rstd, dx, sums, rows, tokens, half, n1, n2, dy0, dy1, dy2, x0, x1, x2, dx0, dx1, dx2,
    STEPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """STEPS times ROWS rows: dy is turned back, the rest is RMS norm's. Reads 2, writes 1 element for each of x."""
    column = tl.arange(0, HALF)[None]
    exists = column < half
    factor_first = tl.load(weight + column, mask=exists, other=0.0).to(WIDE)
    factor_second = tl.load(weight + half + column, mask=exists, other=0.0).to(WIDE)
    total_first = tl.zeros([ROWS, HALF], WIDE)
    total_second = tl.zeros([ROWS, HALF], WIDE)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & exists
        angle = rotation + (row % tokens)[:, None] * half + column
        cos = tl.load(angle, mask=inside, other=0.0).to(WIDE)
        sin = tl.load(angle + tokens * half, mask=inside, other=0.0).to(WIDE)
        at = dy + beginning(row, n1, n2, dy0, dy1, dy2)[:, None] + column
        turned_first = tl.load(at, mask=inside, other=0.0).to(WIDE)
        turned_second = tl.load(at + half, mask=inside, other=0.0).to(WIDE)
        d_first = turned_first * cos + turned_second * sin
        d_second = turned_second * cos - turned_first * sin
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        at = x + beginning(row, n1, n2, x0, x1, x2)[:, None] + column
        first = tl.load(at, mask=inside, other=0.0).to(WIDE) * r
        second = tl.load(at + half, mask=inside, other=0.0).to(WIDE) * r
        total_first += d_first * first
        total_second += d_second * second
        d_first *= factor_first
        d_second *= factor_second
        along = (tl.sum(d_first * first + d_second * second, axis=1) / (2 * half))[:, None]
        at = dx + beginning(row, n1, n2, dx0, dx1, dx2)[:, None] + column
        tl.store(at, (r * (d_first - first * along)).to(dx.dtype.element_ty), mask=inside)
        tl.store(at + half, (r * (d_second - second * along)).to(dx.dtype.element_ty), mask=inside)
    column = tl.arange(0, HALF)
    at = sums + tl.program_id(0).to(tl.int64) * (2 * half) + column
    tl.store(at, tl.sum(total_first, axis=0), mask=column < half)
    tl.store(at + half, tl.sum(total_second, axis=0), mask=column < half)


def _tile(width: int) -> dict[str, int]:
    tile = norm.tile(width)
    return {"ROWS": tile["ROWS"], "HALF": max(1, tile["BLOCK"] // 2), "num_warps": tile["num_warps"]}


def _fake_forward(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


@register(
    "rms_norm_rotate(Tensor x, Tensor weight, Tensor rotation, float eps) -> (Tensor, Tensor)", fake=_fake_forward
)
def _forward_triton(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / rms(x), for x that is `addressable`."""
    y, rstd = _fake_forward(x, weight, rotation, eps)
    tile = _tile(x.shape[-1])
    grid = (-(-rstd.numel() // tile["ROWS"]) if x.numel() else 0,)
    sizes = (rstd.numel(), x.shape[-2], x.shape[-1] // 2, *norm.strides_of_rows(x, y))
    launch(_forward_kernel, grid, x, weight, rotation, y, rstd, *sizes, EPS=eps, WIDE=wide(x), **tile)
    return y, rstd


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, rotation: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), rstd.new_empty(norm.backward_steps(rstd.numel(), x.shape[-1])[0], x.shape[-1])


@register(
    "rms_norm_rotate_backward(Tensor dy, Tensor x, Tensor weight, Tensor rotation, Tensor rstd) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward_triton(dy: Tensor, x: Tensor, weight: Tensor, rotation: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and the weight's gradient in parts that are to be summed."""
    dx, sums = _fake_backward(dy, x, weight, rotation, rstd)
    programs, steps = norm.backward_steps(rstd.numel(), x.shape[-1])
    sizes = (rstd.numel(), x.shape[-2], x.shape[-1] // 2, *norm.strides_of_rows(dy, x, dx))
    arguments = (dy, x, weight, rotation, rstd, dx, sums, *sizes)
    launch(_backward_kernel, (programs,), *arguments, STEPS=steps, WIDE=wide(x), **_tile(x.shape[-1]))
    return dx, sums


def _forward_torch(x: Tensor, weight: Tensor, rotation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = norm.forward_torch(x, weight, eps)
    return _turned_lean(y, *rotation), rstd


def _turned_lean(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`turned`, with two wide temporary tensors of half the size at a time."""
    y = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    to_first, to_second = y.chunk(2, dim=-1)
    torch.sub(first * cos, second * sin, out=to_first)
    torch.add(first * sin, second * cos, out=to_second)
    return y


class _RMSNormRotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotation: Tensor, eps: float, triton: bool) -> Tensor:
        y, rstd = (_forward_triton if triton else _forward_torch)(x, weight, rotation, eps)
        ctx.save_for_backward(x, weight, rotation, rstd)
        ctx.triton = triton
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotation, rstd = ctx.saved_tensors
        if ctx.triton:
            dx, sums = _backward_triton(norm.addressable(dy), x, weight, rotation, rstd)
            d_weight = sums.sum(dim=0)
        else:
            cos, sin = rotation
            dx, d_weight = norm.backward_torch(_turned_lean(dy, cos, -sin), x, weight, rstd)
        return dx, d_weight.to(weight.dtype), None, None, None


def rms_norm_rotate(x: Tensor, weight: Tensor, rotation: Tensor, eps: float = 1e-6, *, impl: Impl = "auto") -> Tensor:
    """rms_norm(x, weight) [..., T, d] with its pairs (i, i + d / 2) turned, in x's dtype and fp32 arithmetic.

    weight: [d]. rotation: cosines and sines [2, T, d / 2], taken as constants. Strides and what is kept: as `rms_norm`.

    Raises:
        ValueError: the weight or the rotation has another shape, or d is odd.
    """
    if x.dim() < 2 or x.shape[-1] % 2:
        raise ValueError(f"x {tuple(x.shape)} must be [..., T, d] with an even d")
    tokens, width = x.shape[-2:]
    if weight.shape != (width,):
        raise ValueError(f"weight {tuple(weight.shape)} must be {(width,)}: the last dimension of x")
    if rotation.shape != (2, tokens, width // 2):
        raise ValueError(f"rotation {tuple(rotation.shape)} must be {(2, tokens, width // 2)}, for x {tuple(x.shape)}")
    triton = runs_triton(impl, x)
    rotation = rotation.detach().contiguous()
    return _RMSNormRotate.apply(norm.addressable(x) if triton else x, weight.contiguous(), rotation, eps, triton)
