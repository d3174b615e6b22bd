"""y = clamp(gain * act(scale * x + noise + b)), saving y only. x [N, C, ...], b [C], scale [N, C], noise [N, 1, H, W].

The derivative of leaky ReLU is known from the sign of y, that of the clamp from |y| == clamp, and both are constant
pieces: one saved tensor serves the first derivative and the second. Plain PyTorch keeps one per operation.

Triton's forward is one pass, and so is its first backward: it reads dy and y, writes dx, and adds up the gradients of
b, scale and noise on the way. A backward that will itself be differentiated is made of operations that can be.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lowvram.kernels.bias_act_triton import backward_triton, forward_triton, forward_triton_, is_channels_last
from lowvram.kernels.dispatch import Impl, runs_triton

Activation = Literal["linear", "lrelu"]
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # by x, b, scale and noise

LEAK = 0.2  # slope of the leaky ReLU below zero, in every published StyleGAN
_PARTS = 8  # of a batch of large images; more would save little, and each costs the launch of some kernels
_LARGE = 2**16  # elements


def plain(
    x: Tensor,
    b: Tensor | None = None,
    act: Activation = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The meaning, operation by operation; differentiable by autograd to any order."""
    if scale is not None:
        x = x * scale[:, :, None, None]
    if noise is not None:
        x = x + noise
    if b is not None:
        x = x + _along_channels(b, x)
    if act == "lrelu":
        x = torch.nn.functional.leaky_relu(x, LEAK)
    x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def _along_channels(b: Tensor, x: Tensor) -> Tensor:
    return b.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2))  # [C, 1, ...]


class _Settings(NamedTuple):
    act: Activation
    gain: float
    clamp: float | None
    inplace: bool
    triton: bool

    @property
    def slope(self) -> float:
        return LEAK if self.act == "lrelu" else 1.0


# The forward.


def _forward_torch(
    x: Tensor, b: Tensor | None, scale: Tensor | None, noise: Tensor | None, settings: _Settings
) -> Tensor:
    y = x if settings.inplace else torch.empty_like(x)
    # The first operation reads x, the rest work in y.
    if scale is not None and noise is not None:
        torch.addcmul(noise, x, scale[:, :, None, None], out=y)
    elif scale is not None:
        torch.mul(x, scale[:, :, None, None], out=y)
    elif noise is not None:
        torch.add(x, noise, out=y)
    elif b is not None:
        torch.add(x, _along_channels(b, x), out=y)
    elif not settings.inplace:
        y.copy_(x)
    if b is not None and (scale is not None or noise is not None):
        y.add_(_along_channels(b, x))
    if settings.act == "lrelu":
        torch.nn.functional.leaky_relu_(y, LEAK)
    if settings.gain != 1:
        y.mul_(settings.gain)
    if settings.clamp is not None:
        y.clamp_(-settings.clamp, settings.clamp)
    return y


def _forward_triton(
    x: Tensor, b: Tensor | None, scale: Tensor | None, noise: Tensor | None, settings: _Settings
) -> Tensor:
    if not settings.inplace:
        return forward_triton(x, b, scale, noise, settings.slope, settings.gain, settings.clamp)
    forward_triton_(x, b, scale, noise, settings.slope, settings.gain, settings.clamp)
    return x


class _BiasAct(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, scale: Tensor | None, noise: Tensor | None, settings: _Settings
    ) -> Tensor:
        y = (_forward_triton if settings.triton else _forward_torch)(x, b, scale, noise, settings)
        if settings.inplace:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)  # an optimizer leaves alone what has no gradient, but not what has zeros
        ctx.settings = settings
        needs_y = settings.act == "lrelu" or settings.clamp is not None or scale is not None
        # Bias, scale and noise are small beside y.
        ctx.save_for_backward(y if needs_y else None, b, scale, noise)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, b, scale, noise = ctx.saved_tensors
        (dy,) = grads
        if dy is None:
            return (None,) * 5
        arguments = (dy, y, b, scale, noise, ctx.settings, ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            return *_backward_differentiable(*arguments), None
        if ctx.settings.triton and y is not None:
            return *_backward_triton(*arguments), None
        return *_backward_torch(*arguments), None


# The backward, in three ways. g is the gradient by the activation's argument, scale * x + noise + b.


def _backward_triton(
    dy: Tensor,
    y: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    settings: _Settings,
    needs: tuple[bool, ...],
) -> _Grads:
    """In one pass, but for adding up partial sums."""
    _, needs_b, needs_scale, needs_noise = needs
    dx, by_channel, by_scale, by_pixel = backward_triton(
        _laid_out_as(y, dy), y, b, scale, noise, settings.slope, settings.gain, settings.clamp, *needs[1:]
    )
    db = dscale = dnoise = None
    if needs_b and b is not None:
        db = by_channel.sum((0, 1)).to(b.dtype)
    if needs_scale and scale is not None:
        dscale = (by_scale.sum(1) / scale).to(scale.dtype)
    if needs_noise and noise is not None:
        dnoise = by_pixel.sum(1).view(len(y), 1, *y.shape[2:]).sum_to_size(noise.shape).to(noise.dtype)
    return dx, db, dscale, dnoise


def _laid_out_as(y: Tensor, dy: Tensor) -> Tensor:
    return dy if dy.stride() == y.stride() else torch.empty_like(y).copy_(dy)


def _backward_torch(
    dy: Tensor,
    y: Tensor | None,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    settings: _Settings,
    needs: tuple[bool, ...],
) -> _Grads:
    """With one new tensor as large as y, which is g and then dx."""
    needs_x, needs_b, needs_scale, needs_noise = needs
    db = dscale = dnoise = None
    if needs_scale and scale is not None and y is not None:
        g, total = _g_and_scale_sum(dy, y, settings)
        dscale = _scale_grad(total, g, b, scale, noise)
    else:
        g = _grad_from_output(dy, y, settings)
    if needs_b and b is not None:
        db = _bias_grad(g, b)
    if needs_noise and noise is not None:
        dnoise = _noise_grad(g, noise)
    if scale is not None and needs_x:
        g = g * scale[:, :, None, None] if g is dy else g.mul_(scale[:, :, None, None])
    return g if needs_x else None, db, dscale, dnoise


def _g_and_scale_sum(dy: Tensor, y: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """g, and the sum over H, W of g * (scale * x + noise + b): [N, C].

    The activation is positively homogeneous, so g * its argument = dy * y wherever y is not clamped, and zero where it
    is. In parts: the unclamped gradient and the product would be two more tensors as large as y.
    """
    aten = torch.ops.aten
    act, gain, clamp, *_ = settings
    parts = _PARTS if math.prod(y.shape[1:]) >= _LARGE else 1
    g = torch.empty_like(y)
    totals = []
    for part, unclamped, of_y in zip(g.chunk(parts), dy.chunk(parts), y.chunk(parts), strict=True):
        if clamp is not None:
            unclamped = aten.hardtanh_backward(unclamped, of_y, -clamp, clamp)
        totals.append(_product_sum(unclamped, of_y))
        if act == "lrelu":
            aten.leaky_relu_backward.grad_input(unclamped, of_y, LEAK, True, grad_input=part)
        else:
            part.copy_(unclamped)
    return g if gain == 1 else g.mul_(gain), torch.cat(totals)


def _product_sum(u: Tensor, v: Tensor) -> Tensor:
    wide = _wide(u)
    product = u * v if u.dtype == wide else u.to(wide).mul_(v)  # fp16 might not hold it
    return product.sum((2, 3))


def _backward_differentiable(
    dy: Tensor,
    y: Tensor | None,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    settings: _Settings,
    needs: tuple[bool, ...],
) -> _Grads:
    """The same, of operations that have a derivative: R1 and the path length differentiate this by dy, y and scale."""
    needs_x, needs_b, needs_scale, needs_noise = needs
    dx = db = dscale = dnoise = None
    if needs_scale and scale is not None and y is not None:
        unclamped = _by_argument(dy, y, settings._replace(act="linear", gain=1.0))
        g = _by_argument(unclamped, y, settings._replace(clamp=None))
        dscale = _scale_grad((unclamped * y).sum((2, 3), dtype=_wide(y)), g, b, scale, noise)
        del unclamped  # a map as large as y, of which few should be alive at a time
    else:
        g = _by_argument(dy, y, settings)
    if needs_b and b is not None:
        db = _bias_grad(g, b)
    if needs_noise and noise is not None:
        dnoise = _noise_grad(g, noise)
    if needs_x:
        dx = g if scale is None else g * scale[:, :, None, None]
    return dx, db, dscale, dnoise


class _ByArgument(Function):
    """g = dy * (derivative read off y): linear in dy, constant in y almost everywhere, so its own derivative."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, y: Tensor | None, settings: _Settings) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(y)
        if settings.triton and y is not None:
            numbers = (settings.slope, settings.gain, settings.clamp)
            return backward_triton(_laid_out_as(y, dy), y, None, None, None, *numbers, *[False] * 3)[0]
        return _grad_from_output(dy, y, settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (y,) = ctx.saved_tensors
        (dy,) = grads
        return None if dy is None else _by_argument(dy, y, ctx.settings), None, None


def _by_argument(dy: Tensor, y: Tensor | None, settings: _Settings) -> Tensor:
    act, gain, clamp, *_ = settings
    return dy if act == "linear" and gain == 1 and clamp is None else _ByArgument.apply(dy, y, settings)


def _grad_from_output(dy: Tensor, y: Tensor | None, settings: _Settings) -> Tensor:
    """dy * gain * act'(argument) * [not clamped], all read off y, in one new tensor; dy itself if that is all."""
    aten = torch.ops.aten
    act, gain, clamp, *_ = settings
    dx = aten.leaky_relu_backward(dy, y, LEAK, True) if act == "lrelu" else None
    if clamp is not None:  # zero where |y| == clamp
        if dx is None:
            dx = aten.hardtanh_backward(dy, y, -clamp, clamp)
        else:
            aten.hardtanh_backward.grad_input(dx, y, -clamp, clamp, grad_input=dx)
    if gain == 1:
        return dy if dx is None else dx
    return dy * gain if dx is None else dx.mul_(gain)


def _scale_grad(total: Tensor, g: Tensor, b: Tensor | None, scale: Tensor, noise: Tensor | None) -> Tensor:
    """sum over H, W of g * x, without x: scale * x is the activation's argument less noise and bias.

    total: the sum over H, W of g * argument, [N, C].
    """
    if noise is not None:
        noise = noise.to(g.dtype).expand(len(g), 1, *g.shape[2:])
        total = total - torch.bmm(g.flatten(2), noise.flatten(2).transpose(1, 2))[:, :, 0]
    if b is not None:
        total = total - b * g.sum((2, 3), dtype=_wide(g))
    return (total / scale).to(scale.dtype)


def _bias_grad(g: Tensor, b: Tensor) -> Tensor:
    return g.sum([i for i in range(g.ndim) if i != 1], dtype=_wide(g)).to(b.dtype)


def _noise_grad(g: Tensor, noise: Tensor) -> Tensor:
    return g.sum(1, keepdim=True, dtype=_wide(g)).sum_to_size(noise.shape).to(noise.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)  # a half-width sum over B*H*W loses the small terms


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    act: Activation = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """clamp(gain * act(scale * x + noise + b)), saving only the result; exact first and second derivatives.

    x: [N, C, ...], any floating dtype; b: [C] or None, any floating dtype (its gradient is summed in fp32 at least).
    act: "linear" or "lrelu" (slope 0.2); gain > 0; clamp: the largest magnitude of the result, rounded to x's dtype, or
    None. Triton takes both numbers in fp32.
    scale [N, C], not zero, and noise ([N, 1, H, W] or [H, W]) are for images [N, C, H, W], in x's dtype, or None.
    inplace: the result may overwrite x, which nothing else must need (a convolution's output, say).
    Returns x's shape, dtype and layout.

    Raises:
        ValueError: shapes, act, gain or clamp are not of these.
    """
    _check(x, b, act, gain, clamp, scale, noise)
    triton = runs_triton(impl, x)
    if act == "linear" and gain == 1 and b is None and clamp is None and scale is None and noise is None:
        return x
    if triton and not (x.is_contiguous() or is_channels_last(x)):
        x = x.contiguous()
    clamp = None if clamp is None else _storable(clamp, x.dtype)
    return _BiasAct.apply(x, b, scale, noise, _Settings(act, gain, clamp, inplace, triton))


def _check(
    x: Tensor,
    b: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    scale: Tensor | None,
    noise: Tensor | None,
) -> None:
    if act not in ("linear", "lrelu"):
        raise ValueError(f'act={act!r} is not known; use "linear" or "lrelu"')
    if not gain > 0 or (clamp is not None and not clamp > 0):
        # The sign of y must be that of x + b, or the derivative can't be read off it.
        raise ValueError(f"gain={gain} and clamp={clamp} must be positive")
    if x.ndim < 2 or (b is not None and b.shape != x.shape[1:2]):
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, ...] and b {None if b is None else tuple(b.shape)} [C]")
    if (scale is not None or noise is not None) and x.ndim != 4:
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, H, W] to take a scale or noise")
    if scale is not None and scale.shape != x.shape[:2]:
        raise ValueError(f"scale {tuple(scale.shape)} must be [N, C] of x {tuple(x.shape)}")
    if noise is not None and noise.shape not in (x.shape[2:], (len(x), 1, *x.shape[2:])):
        raise ValueError(f"noise {tuple(noise.shape)} must be [N, 1, H, W] or [H, W] of x {tuple(x.shape)}")


def _storable(value: float, dtype: torch.dtype) -> float:
    """value as dtype rounds it: |y| == clamp tells where y was clamped, so y must be able to hold it."""
    spacing = torch.finfo(dtype).eps * 2.0 ** (math.frexp(value)[1] - 1)
    return round(value / spacing) * spacing
