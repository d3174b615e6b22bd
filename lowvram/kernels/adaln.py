"""The two element-wise halves of adaLN-zero (Peebles and Xie 2023, arXiv 2212.09748, section 3.2), each in one pass.

    y = x / rms(x) * (1 + scale) + shift      adaln: saves x, scale and 1 / rms(x), fp32 [B, ..., 1]
    y = x + gate * h                          gated_residual: saves h and gate

Shapes: x, h [B, ..., D]; scale, shift, gate [B, D] or [B, 1, ..., D]. Plain PyTorch keeps x / rms(x) too, and makes
whole temporary tensors for the gradients of scale, shift and gate, which are sums over the tokens of a sample.

Legend: B samples, T tokens of each, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowvram.kernels.derivatives import first_order_only
from lowvram.kernels.dispatch import Impl, jit, launch, register, runs_triton, tl, wide
from lowvram.kernels.rms_norm import backward_torch, inverse_rms, next_power_of_two, tile
from lowvram.kernels.rms_norm import plain as plain_norm

_PROGRAMS = 512  # of a backward; more only where a sample is small
_TOKENS = (
    32  # that a program of the backward sums, at least: it leaves fp32 for each channel, which is little beside 32
)


def plain(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The meaning of `adaln`, differentiable by autograd to any order; scale and shift [B, 1, ..., D]."""
    return (plain_norm(x, None, eps) * (1 + scale) + shift).to(x.dtype)


def plain_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """The meaning of `gated_residual`, differentiable by autograd to any order; gate [B, 1, ..., D]."""
    return (x + gate * h).to(x.dtype)


@jit
def _rows(step, programs, tokens, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS] of [B * T, D] for one step of this program, of so many programs for each sample; and which exist."""
    program = tl.program_id(0)
    token = (program % programs * STEPS + step) * ROWS + tl.arange(0, ROWS)
    return (program // programs).to(tl.int64) * tokens + token, token < tokens


@jit
def _of_sample(values, stride, programs, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The row of scale, shift or gate that belongs to this program's sample: [1, BLOCK]."""
    sample = (tl.program_id(0) // programs).to(tl.int64)
    column = tl.arange(0, BLOCK)[None]
    return tl.load(values + sample * stride + column, mask=column < width, other=0.0).to(WIDE)


@jit
def _adaln_kernel(
    x, scale, shift, y, rstd, programs, tokens, width, scale_stride, shift_stride,
    EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole tokens, held in registers. Reads 1, writes 1 element for each of y."""
    factor = 1 + _of_sample(scale, scale_stride, programs, width, WIDE, BLOCK)
    offset = _of_sample(shift, shift_stride, programs, width, WIDE, BLOCK)
    row, exists = _rows(0, programs, tokens, 1, ROWS)
    column = tl.arange(0, BLOCK)[None]
    at, inside = row[:, None] * width + column, exists[:, None] & (column < width)
    values = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    r = tl.math.rsqrt(tl.sum(values * values, axis=1) / width + EPS)
    tl.store(y + at, (values * r[:, None] * factor + offset).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=exists)


@jit
def _adaln_backward_kernel(
    dy, x, scale, rstd, dx, sums, programs, tokens, width, scale_stride,
    STEPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS times ROWS tokens of a sample. Reads 2, writes 1 element for each of x; and two rows of `sums`."""
    factor = 1 + _of_sample(scale, scale_stride, programs, width, WIDE, BLOCK)
    column = tl.arange(0, BLOCK)[None]
    d_scale = tl.zeros([ROWS, BLOCK], WIDE)
    d_shift = tl.zeros([ROWS, BLOCK], WIDE)
    for step in range(STEPS):
        row, exists = _rows(step, programs, tokens, STEPS, ROWS)
        at, inside = row[:, None] * width + column, exists[:, None] & (column < width)
        r = tl.load(rstd + row, mask=exists, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(WIDE) * r
        d = tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        d_scale += d * normed
        d_shift += d
        d *= factor
        result = r * (d - normed * (tl.sum(d * normed, axis=1) / width)[:, None])
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
    _store_sum(d_scale, sums, 0, width, BLOCK)
    _store_sum(d_shift, sums, tl.num_programs(0), width, BLOCK)


@jit
def _residual_kernel(
    x, h, gate, y, programs, tokens, width, gate_stride,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads 2, writes 1 element for each of y."""
    factor = _of_sample(gate, gate_stride, programs, width, WIDE, BLOCK)
    row, exists = _rows(0, programs, tokens, 1, ROWS)
    column = tl.arange(0, BLOCK)[None]
    at, inside = row[:, None] * width + column, exists[:, None] & (column < width)
    result = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    result += factor * tl.load(h + at, mask=inside, other=0.0).to(WIDE)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@jit
def _residual_backward_kernel(
    dy, h, gate, dh, sums, programs, tokens, width, gate_stride,
    STEPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads 2, writes 1 element for each of h; and a row of `sums`. The gradient of x is dy itself."""
    factor = _of_sample(gate, gate_stride, programs, width, WIDE, BLOCK)
    column = tl.arange(0, BLOCK)[None]
    d_gate = tl.zeros([ROWS, BLOCK], WIDE)
    for step in range(STEPS):
        row, exists = _rows(step, programs, tokens, STEPS, ROWS)
        at, inside = row[:, None] * width + column, exists[:, None] & (column < width)
        d = tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        d_gate += d * tl.load(h + at, mask=inside, other=0.0).to(WIDE)
        tl.store(dh + at, (d * factor).to(dh.dtype.element_ty), mask=inside)
    _store_sum(d_gate, sums, 0, width, BLOCK)


@jit
def _store_sum(values, sums, first, width, BLOCK: tl.constexpr):
    """The sum over rows of values [ROWS, BLOCK], as row `first` + this program of sums."""
    column = tl.arange(0, BLOCK)
    at = (first + tl.program_id(0)).to(tl.int64) * width + column
    tl.store(sums + at, tl.sum(values, axis=0), mask=column < width)


def _forward_grid(x: Tensor) -> tuple[tuple[int], tuple[int, int, int]]:
    """The grid over tiles of tokens; and programs for each sample, tokens and width, as kernels take them."""
    batch, tokens, width = x.shape
    programs = -(-tokens // tile(width)["ROWS"]) if width else 0
    return (batch * programs,), (programs, tokens, width)


def _backward_steps(x: Tensor) -> tuple[int, int]:
    """Programs for each sample, and the tiles that each goes through: a power of two, as each number is compiled."""
    (tiles,), (tiles_of_sample, _, width) = _forward_grid(x)
    wanted = max(-(-_TOKENS // tile(width)["ROWS"]), -(-tiles // _PROGRAMS))
    steps = next_power_of_two(min(wanted, tiles_of_sample))
    return -(-tiles_of_sample // steps), steps


def _fake_sums(x: Tensor, count: int) -> Tensor:
    """[count, B, programs of a sample, D]: what is left to be summed, in an order that is always the same."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(count, len(x), _backward_steps(x)[0], x.shape[-1], dtype=dtype)


def _fake_adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


@register("adaln(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor, Tensor)", fake=_fake_adaln)
def _adaln_triton(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / rms(x), for contiguous x [B, T, D]; scale and shift [B, D] with rows that are contiguous."""
    y, rstd = _fake_adaln(x, scale, shift, eps)
    grid, sizes = _forward_grid(x)
    arguments = (x, scale, shift, y, rstd, *sizes, scale.stride(0), shift.stride(0))
    launch(_adaln_kernel, grid, *arguments, EPS=eps, WIDE=wide(x), **tile(x.shape[-1]))
    return y, rstd


def _fake_adaln_backward(dy: Tensor, x: Tensor, scale: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _fake_sums(x, 2)


@register(
    "adaln_backward(Tensor dy, Tensor x, Tensor scale, Tensor rstd) -> (Tensor, Tensor)", fake=_fake_adaln_backward
)
def _adaln_backward_triton(dy: Tensor, x: Tensor, scale: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx, and the parts of d_scale and d_shift."""
    dx, sums = _fake_adaln_backward(dy, x, scale, rstd)
    programs, steps = _backward_steps(x)
    arguments = (dy, x, scale, rstd, dx, sums, programs, *x.shape[1:], scale.stride(0))
    grid = (len(x) * programs,)
    launch(_adaln_backward_kernel, grid, *arguments, STEPS=steps, WIDE=wide(x), **tile(x.shape[-1]))
    return dx, sums


@register("gated_residual(Tensor x, Tensor h, Tensor gate) -> Tensor", fake=lambda x, h, gate: torch.empty_like(x))
def _residual_triton(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    y = torch.empty_like(x)
    grid, sizes = _forward_grid(x)
    launch(_residual_kernel, grid, x, h, gate, y, *sizes, gate.stride(0), WIDE=wide(x), **tile(x.shape[-1]))
    return y


def _fake_residual_backward(dy: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), _fake_sums(h, 1)


@register("gated_residual_backward(Tensor dy, Tensor h, Tensor gate) -> (Tensor, Tensor)", fake=_fake_residual_backward)
def _residual_backward_triton(dy: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dh, and the parts of d_gate."""
    dh, sums = _fake_residual_backward(dy, h, gate)
    programs, steps = _backward_steps(h)
    arguments = (dy, h, gate, dh, sums, programs, *h.shape[1:], gate.stride(0))
    grid = (len(h) * programs,)
    launch(_residual_backward_kernel, grid, *arguments, STEPS=steps, WIDE=wide(h), **tile(h.shape[-1]))
    return dh, sums


def _adaln_torch(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = inverse_rms(x, eps)
    y = torch.mul(x, rstd, out=torch.empty_like(x))
    return y.mul_(1 + scale[:, None]).add_(shift[:, None]), rstd


def _residual_torch(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    y = gate[:, None] * h
    return y.add_(x) if y.dtype == x.dtype else (x + y).to(x.dtype)


class _AdaLN(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, triton: bool) -> Tensor:
        y, rstd = (_adaln_triton if triton else _adaln_torch)(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, rstd)
        ctx.settings = (triton, shift.dtype)
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, rstd = ctx.saved_tensors
        triton, shift_dtype = ctx.settings
        if triton:
            dx, sums = _adaln_backward_triton(dy.contiguous(), x, scale, rstd)
            d_scale, d_shift = sums.sum(dim=2)
        else:
            dx, d_scale = backward_torch(dy, x, 1 + scale[:, None], rstd)
            d_scale, d_shift = d_scale[:, 0], dy.sum(dim=1, dtype=rstd.dtype)
        return dx, d_scale.to(scale.dtype), d_shift.to(shift_dtype), None, None


class _GatedResidual(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, gate: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(h, gate)
        ctx.triton = triton
        return (_residual_triton if triton else _residual_torch)(x, h, gate)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, gate = ctx.saved_tensors
        if ctx.triton:
            dh, sums = _residual_backward_triton(dy.contiguous(), h, gate)
            d_gate = sums[0].sum(dim=1)
        else:
            d_gate = (dy * h.to(gate.dtype)).sum(dim=1)
            dh = (dy * gate[:, None]).to(h.dtype)
        return dy, dh, d_gate.to(gate.dtype), None


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, *, impl: Impl = "auto") -> Tensor:
    """rms_norm(x) * (1 + scale) + shift for x [B, ..., D], in x's dtype and fp32 arithmetic.

    scale, shift: [B, D] or [B, 1, ..., D] of any float dtype. Keeps x, scale and fp32 [B, ..., 1] for the backward,
    which can't be differentiated again.

    Raises:
        ValueError: scale or shift has another shape.
    """
    scale, shift = _by_sample("scale", scale, x), _by_sample("shift", shift, x)
    triton = runs_triton(impl, x)
    return _AdaLN.apply(_by_token(x, triton), scale, shift, eps, triton).view(x.shape)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x + gate * h for x and h [B, ..., D], in x's dtype and fp32 arithmetic; gate: [B, D] or [B, 1, ..., D].

    Keeps h and gate for the backward, which can't be differentiated again.

    Raises:
        ValueError: h is not of x's shape, or the gate has another.
    """
    if h.shape != x.shape:
        raise ValueError(f"h {tuple(h.shape)} must have x's shape {tuple(x.shape)}")
    gate = _by_sample("gate", gate, x)
    triton = runs_triton(impl, x)
    return _GatedResidual.apply(_by_token(x, triton), _by_token(h, triton), gate, triton).view(x.shape)


def _by_token(x: Tensor, contiguous: bool) -> Tensor:
    """[B, ..., D] as [B, T, D]."""
    x = x.contiguous() if contiguous else x
    return x if x.dim() == 3 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _by_sample(name: str, values: Tensor, x: Tensor) -> Tensor:
    """[B, D] or [B, 1, ..., D] as [B, D] with rows that are contiguous; no copy of what was cut from a wider tensor."""
    if x.dim() < 2:
        raise ValueError(f"x {tuple(x.shape)} must have a dimension of samples and one of channels: [B, ..., D]")
    batch, width = x.shape[0], x.shape[-1]
    if values.shape not in ((batch, width), (batch, *[1] * (x.dim() - 2), width)):
        raise ValueError(f"{name} {tuple(values.shape)} must be {(batch, width)}, for x {tuple(x.shape)}")
    values = values.reshape(batch, width)
    return values if values.stride(-1) == 1 else values.contiguous()
