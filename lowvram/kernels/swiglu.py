"""y = up * act(gate) for x = [gate, up] in one tensor [..., 2 H] -> [..., H], saving x only.

The gated units of Shazeer 2020 (arXiv 2002.05202): SwiGLU with SiLU, GEGLU with GELU, whose published layout is
[up, gate]. Plain PyTorch keeps act(gate) as well as x; here the backward computes it again.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lowvram.kernels.derivatives import first_order_only
from lowvram.kernels.dispatch import Impl, jit, launch, register, runs_triton, tl, wide

_BLOCK = 1024  # elements of y: two loads and a store of 16 bytes for each of 128 threads, in 16 bits


def plain(x: Tensor, act: Literal["silu", "gelu"]) -> Tensor:
    """The meaning, differentiable by autograd to any order."""
    first, second = x.chunk(2, dim=-1)
    return second * F.silu(first) if act == "silu" else first * F.gelu(second)


@jit
def _act(gate, GELU: tl.constexpr):
    if GELU:
        return gate * 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476))
    return gate / (1 + tl.exp(-gate))


@jit
def _act_grad(gate, GELU: tl.constexpr):
    if GELU:
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        return 0.5 * (1 + tl.math.erf(gate * 0.7071067811865476)) + gate * density
    s = 1 / (1 + tl.exp(-gate))
    return s * (1 + gate * (1 - s))


@jit
def _forward_kernel(x, y, width, GELU: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A row of y [R, H] in blocks: program (row, block). Reads 2, writes 1 element for each of y."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(WIDE)
    second = tl.load(x + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(WIDE)
    result = first * _act(second, GELU) if GELU else second * _act(first, GELU)
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(dy, x, dx, width, GELU: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Reads 3, writes 2 elements for each of y."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at_first, at_second = row * 2 * width + column, (row * 2 + 1) * width + column
    first = tl.load(x + at_first, mask=inside, other=0.0).to(WIDE)
    second = tl.load(x + at_second, mask=inside, other=0.0).to(WIDE)
    d = tl.load(dy + row * width + column, mask=inside, other=0.0).to(WIDE)
    if GELU:
        d_first = d * _act(second, GELU)
        d_second = d * first * _act_grad(second, GELU)
    else:
        d_first = d * second * _act_grad(first, GELU)
        d_second = d * _act(first, GELU)
    tl.store(dx + at_first, d_first.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + at_second, d_second.to(dx.dtype.element_ty), mask=inside)


def _fake_forward(x: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@register("swiglu(Tensor x, bool gelu) -> Tensor", fake=_fake_forward)
def _forward_triton(x: Tensor, gelu: bool) -> Tensor:
    y = _fake_forward(x, gelu)
    width = y.shape[-1]
    launch(_forward_kernel, _grid(y), x, y, width, GELU=gelu, WIDE=wide(x), BLOCK=_BLOCK)
    return y


@register("swiglu_backward(Tensor dy, Tensor x, bool gelu) -> Tensor", fake=lambda dy, x, gelu: torch.empty_like(x))
def _backward_triton(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    dx = torch.empty_like(x)
    launch(_backward_kernel, _grid(dy), dy, x, dx, dy.shape[-1], GELU=gelu, WIDE=wide(x), BLOCK=_BLOCK)
    return dx


def _grid(y: Tensor) -> tuple[int, int]:
    width = y.shape[-1]
    return (y.numel() // width if width else 0, -(-width // _BLOCK))


def _forward_torch(x: Tensor, gelu: bool) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return F.gelu(second).mul_(first) if gelu else F.silu(first).mul_(second)


def _backward_torch(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    """No temporary tensor: each half of the result is worked on where it will stay."""
    first, second = x.chunk(2, dim=-1)
    dx = torch.empty_like(x)
    d_first, d_second = dx.chunk(2, dim=-1)
    aten = torch.ops.aten
    if gelu:
        aten.gelu.out(second, out=d_first).mul_(dy)
        torch.mul(dy, first, out=d_second)
        aten.gelu_backward.grad_input(d_second, second, grad_input=d_second)
    else:
        aten.silu.out(first, out=d_second).mul_(dy)
        torch.mul(dy, second, out=d_first)
        aten.silu_backward.grad_input(d_first, first, grad_input=d_first)
    return dx


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gelu: bool, triton: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = (gelu, triton)
        return (_forward_triton if triton else _forward_torch)(x, gelu)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gelu, triton = ctx.settings
        return (_backward_triton if triton else _backward_torch)(dy.contiguous(), x, gelu), None, None


def swiglu(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """up * silu(gate) of x = [gate, up]: [..., 2 H] -> [..., H], in x's dtype; arithmetic in fp32.

    Keeps x alone for the backward, which can't be differentiated again.
    """
    return _gated(x, gelu=False, impl=impl)


def geglu(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """up * gelu(gate) of x = [up, gate]: [..., 2 H] -> [..., H]; otherwise as `swiglu`."""
    return _gated(x, gelu=True, impl=impl)


def _gated(x: Tensor, *, gelu: bool, impl: Impl) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"the last dimension of x {tuple(x.shape)} must be even: gate and up")
    return _Gated.apply(x.contiguous(), gelu, runs_triton(impl, x))
