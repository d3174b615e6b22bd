"""y = clamp(gain * act(scale * x + noise + b)), saving y only. x [N, C, ...], b [C], scale [N, C], noise [N, 1, H, W].

The derivative of leaky ReLU is known from the sign of y, that of the clamp from |y| == clamp, and both are constant
pieces: one saved tensor serves the first derivative and the second. Plain PyTorch keeps one per operation.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["linear", "lrelu"]

_PARTS = 8  # more would save little, and each costs the launch of two kernels
LEAK = 0.2  # slope of the leaky ReLU below zero, in every published StyleGAN


def reference(
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


class _BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, scale: Tensor | None, noise: Tensor | None, settings: _Settings
    ) -> Tensor:
        act, gain, clamp, inplace = settings
        y = x if inplace else torch.empty_like(x)
        # The first operation reads x, the rest work in y.
        if scale is not None and noise is not None:
            torch.addcmul(noise, x, scale[:, :, None, None], out=y)
        elif scale is not None:
            torch.mul(x, scale[:, :, None, None], out=y)
        elif noise is not None:
            torch.add(x, noise, out=y)
        elif b is not None:
            torch.add(x, _along_channels(b, x), out=y)
        elif not inplace:
            y.copy_(x)
        if b is not None and (scale is not None or noise is not None):
            y.add_(_along_channels(b, x))
        if act == "lrelu":
            torch.nn.functional.leaky_relu_(y, LEAK)
        if gain != 1:
            y.mul_(gain)
        if clamp is not None:
            y.clamp_(-clamp, clamp)
        if inplace:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)  # an optimizer leaves alone what has no gradient, but not what has zeros
        ctx.settings = settings
        needs_y = act == "lrelu" or clamp is not None or scale is not None
        # Bias, scale and noise are small beside y.
        ctx.save_for_backward(y if needs_y else None, b, scale, noise)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, b, scale, noise = ctx.saved_tensors
        (dy,) = grads
        if dy is None:
            return (None,) * 5
        act, gain, clamp, _ = ctx.settings
        needs_x, needs_b, needs_scale, needs_noise, _ = ctx.needs_input_grad
        unclamped = dy
        if needs_scale and clamp is not None:  # the scale's derivative wants this step by itself
            unclamped, clamp = _BiasActGrad.apply(dy, y, "linear", 1.0, clamp), None
        g = _BiasActGrad.apply(unclamped, y, act, gain, clamp)  # by the argument of the activation
        wide = torch.promote_types(g.dtype, torch.float32)  # a half-width sum over B*H*W loses the small terms
        dx = db = dscale = dnoise = None
        if needs_scale:
            dscale = _scale_grad(unclamped, g, y, b, scale, noise)
        del unclamped, dy  # maps as large as y, of which few should be alive at a time
        if needs_b:
            db = g.sum([i for i in range(g.ndim) if i != 1], dtype=wide).to(b.dtype)
        if needs_noise:
            dnoise = g.sum(1, keepdim=True, dtype=wide).sum_to_size(noise.shape).to(noise.dtype)
        if needs_x and scale is None:
            dx = g
        elif needs_x:  # g is this function's own, unless a second derivative will want it
            dx = g * scale[:, :, None, None] if torch.is_grad_enabled() else g.mul_(scale[:, :, None, None])
        return dx, db, dscale, dnoise, None


def _scale_grad(
    unclamped: Tensor, g: Tensor, y: Tensor, b: Tensor | None, scale: Tensor, noise: Tensor | None
) -> Tensor:
    """sum over H, W of g * x, without x: scale * x is the activation's argument less noise and bias.

    The activation is positively homogeneous, so g * argument = dy * y wherever y is not clamped, and zero where it is.
    unclamped: dy, zero where y is clamped.
    """
    wide = torch.promote_types(g.dtype, torch.float32)
    if torch.is_grad_enabled() or not len(y):
        total = (unclamped * y).sum((2, 3), dtype=wide)  # [N, C]
    else:  # in parts: the product of two whole maps would be a third, for the sake of [N, C] numbers
        parts = zip(unclamped.chunk(_PARTS), y.chunk(_PARTS), strict=True)
        total = torch.cat([(u * v).sum((2, 3), dtype=wide) for u, v in parts])
    if noise is not None:
        noise = noise.to(g.dtype).expand(len(g), 1, *g.shape[2:])
        total = total - torch.bmm(g.flatten(2), noise.flatten(2).transpose(1, 2))[:, :, 0]
    if b is not None:
        total = total - b * g.sum((2, 3), dtype=wide)
    return (total / scale).to(scale.dtype)


class _BiasActGrad(torch.autograd.Function):
    """dx = dy * (derivative read off y): linear in dy, constant in y almost everywhere, so its own derivative."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, y: Tensor | None, act: Activation, gain: float, clamp: float | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.settings = (act, gain, clamp)
        ctx.save_for_backward(y)
        return grad_from_output(dy, y, act, gain, clamp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        (y,) = ctx.saved_tensors
        (dy,) = grads
        return None if dy is None else _BiasActGrad.apply(dy, y, *ctx.settings), None, None, None, None


def grad_from_output(dy: Tensor, y: Tensor | None, act: Activation, gain: float, clamp: float | None) -> Tensor:
    """dy * gain * act'(argument) * [not clamped], all read off y, in one new tensor."""
    aten = torch.ops.aten
    dx = aten.leaky_relu_backward(dy, y, LEAK, True) if act == "lrelu" else None
    if clamp is not None:  # zero where |y| == clamp
        if dx is None:
            dx = aten.hardtanh_backward(dy, y, -clamp, clamp)
        else:
            aten.hardtanh_backward.grad_input(dx, y, -clamp, clamp, grad_input=dx)
    if dx is None:
        return dy * gain
    return dx if gain == 1 else dx.mul_(gain)


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
    impl: Literal["auto", "reference"] = "auto",
) -> Tensor:
    """clamp(gain * act(scale * x + noise + b)), saving only the result; exact first and second derivatives.

    x: [N, C, ...], any floating dtype; b: [C] or None, any floating dtype (its gradient is summed in fp32 at least).
    act: "linear" or "lrelu" (slope 0.2); gain > 0; clamp: the largest magnitude of the result, or None.
    scale [N, C], not zero, and noise ([N, 1, H, W] or [H, W]) are for images [N, C, H, W], in x's dtype, or None.
    inplace: the result may overwrite x, which nothing else must need (a convolution's output, say).
    impl: "reference" runs plain PyTorch, "auto" the fastest there is. Returns x's shape and dtype.
    """
    if act not in ("linear", "lrelu"):
        raise ValueError(f'act={act!r} is not known; use "linear" or "lrelu"')
    if not gain > 0 or (clamp is not None and not clamp > 0):
        # The sign of y must be that of x + b, or the derivative can't be read off it.
        raise ValueError(f"gain={gain} and clamp={clamp} must be positive")
    if x.ndim < 2 or (b is not None and b.shape != x.shape[1:2]):
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, ...] and b {None if b is None else tuple(b.shape)} [C]")
    if (scale is not None or noise is not None) and x.ndim != 4:
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, H, W] to take a scale or noise")
    if impl == "reference":
        return reference(x, b, act, gain, clamp, scale, noise)
    if impl != "auto":
        raise ValueError(f'impl={impl!r} is not known; use "auto" or "reference"')
    if act == "linear" and gain == 1 and b is None and clamp is None and scale is None and noise is None:
        return x
    return _BiasAct.apply(x, b, scale, noise, _Settings(act, gain, clamp, inplace))
