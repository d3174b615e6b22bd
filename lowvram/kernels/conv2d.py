"""y = conv(style * x, w), lean in both derivatives. Shapes: x [B, I, H, W], w [O, I / groups, k, k], style [B, I].

A convolution is linear in x and in w, so its derivatives of every order are built of three maps: convolution,
transposed convolution and weight gradient; here each is differentiated by the other two. PyTorch's own second
derivative takes the weight's part by a convolution with kernels as large as the image (1.5 to 3 times slower), and
group by group where there are several; a style applied outside would keep style * x as well as x. The convolutions are
PyTorch's own; style * x and its backward are a Triton kernel each where there is Triton (see `modulated_conv`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram.kernels import weight_gradient as by_products
from lowvram.kernels.dispatch import Impl, runs_triton
from lowvram.kernels.modulated_conv import fits_triton, modulate, modulate_backward


class _Geometry(NamedTuple):
    """Of w [O, I / groups, k, k]: a plain convolution leads from I to O channels, a transposed one from O to I."""

    kernel: int
    stride: int
    padding: int
    transposed: bool
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def adjoint(self, x: Tensor) -> "_Geometry":
        """The geometry that leads from the output back to x [B, C, H, W]."""
        if self.transposed:
            return self._replace(transposed=False, output_padding=(0, 0))
        # Pixels at the end that the stride did not reach belong to x all the same.
        left_over = [(size + 2 * self.padding - self.kernel) % self.stride for size in x.shape[2:]]
        return self._replace(transposed=True, output_padding=(left_over[0], left_over[1]))

    def output_size(self, x: Tensor) -> list[int]:
        """[H, W] of the output for x [B, C, H, W]."""
        k, s, p = self.kernel, self.stride, 2 * self.padding
        if self.transposed:
            return [(size - 1) * s - p + k + o for size, o in zip(x.shape[2:], self.output_padding, strict=True)]
        return [(size + p - k) // s + 1 for size in x.shape[2:]]


def _convolve(x: Tensor, w: Tensor, geometry: _Geometry) -> Tensor:
    _, stride, padding, transposed, output_padding, groups = geometry
    return torch.convolution(x, w, None, [stride] * 2, [padding] * 2, [1, 1], transposed, list(output_padding), groups)


def plain(
    x: Tensor,
    w: Tensor,
    style: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """The meaning, differentiable by autograd to any order."""
    if style is not None:
        x = x * style[:, :, None, None]
    return (F.conv_transpose2d if transposed else F.conv2d)(x, w, stride=stride, padding=padding, groups=groups)


class _Convolve(torch.autograd.Function):
    """The derivatives by x and style. The weight's is `proxy`'s, which autograd runs only where it is asked for.

    (A Function that returns both can't know that a penalty's inner gradient asks for the image alone.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, style: Tensor | None, proxy: Tensor | None, geometry: _Geometry, triton: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.adjoint, ctx.triton = geometry.adjoint(x), triton
        ctx.save_for_backward(x if style is not None else None, w, style)
        return _convolve(x if style is None else modulate(x, style, triton), w, geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, style = ctx.saved_tensors
        (dy,) = grads
        if dy is None:
            return (None,) * 6
        needs_x, _, needs_style, needs_proxy, _, _ = ctx.needs_input_grad
        dx = dstyle = None
        if needs_x or needs_style:
            dx = _conv(dy, w, None, ctx.adjoint, ctx.triton)  # by style * x
        if style is not None and dx is not None:
            if torch.is_grad_enabled():  # a second derivative will want dx as it is
                dstyle = (dx * x).sum((2, 3)) if needs_style else None
                dx = dx * style[:, :, None, None]
            elif needs_style:
                dx, dstyle = modulate_backward(dx, x, style, needs_x, ctx.triton)
            else:
                dx = dx.mul_(style[:, :, None, None])
        return dx if needs_x else None, None, dstyle, dy if needs_proxy else None, None, None


class _WeightProxy(torch.autograd.Function):
    """Stands for the weight in the graph: an output without memory, and a backward that is the weight gradient."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, inputs: tuple[Tensor, Tensor | None], shape: list[int], geometry: _Geometry, triton: bool
    ) -> Tensor:
        # x and style come in a tuple, so that this node is no way to x: it would run where only x is asked for.
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.triton = geometry, triton
        ctx.save_for_backward(*inputs)
        return w.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        x, style = ctx.saved_tensors
        (dy,) = grads
        if dy is None:
            return None, None, None, None, None
        if style is not None:  # again, rather than kept
            x = x * style[:, :, None, None] if torch.is_grad_enabled() else modulate(x, style, ctx.triton)
        straight = ctx.geometry._replace(transposed=False, output_padding=(0, 0))
        dy, x = (x, dy) if ctx.geometry.transposed else (dy, x)
        return _WeightGrad.apply(dy, x, straight, ctx.triton), None, None, None, None


class _WeightGrad(torch.autograd.Function):
    """d(sum(dy * conv(x, w))) / dw of a plain convolution: dy [B, O, h, w], x [B, I, H, W] -> [O, I / groups, k, k]."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, geometry: _Geometry, triton: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.triton = geometry, triton
        ctx.save_for_backward(dy, x)
        kernel, stride, padding, _, _, groups = geometry
        if by_products.suits(dy, x, groups):
            return by_products.weight_gradient(dy, x, kernel, stride, padding)
        w = dy.new_empty(dy.shape[1], x.shape[1] // groups, kernel, kernel)  # only its shape is read
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [False, True, False]
        )[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        dy, x = ctx.saved_tensors
        (dw,) = grads
        if dw is None:
            return None, None, None, None
        d_dy = _conv(x, dw, None, ctx.geometry, ctx.triton) if ctx.needs_input_grad[0] else None
        dx = _conv(dy, dw, None, ctx.geometry.adjoint(x), ctx.triton) if ctx.needs_input_grad[1] else None
        return d_dy, dx, None, None


def _conv(x: Tensor, w: Tensor, style: Tensor | None, geometry: _Geometry, triton: bool) -> Tensor:
    proxy = None
    if w.requires_grad and torch.is_grad_enabled():
        channels = w.shape[1] * geometry.groups if geometry.transposed else w.shape[0]
        shape = [x.shape[0], channels, *geometry.output_size(x)]
        proxy = _WeightProxy.apply(w, (x, style), shape, geometry, triton)
    return _Convolve.apply(x, w, style, proxy, geometry, triton)


def _autocast(x: Tensor, w: Tensor, style: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of a convolution's operands: here, as the backward runs outside of it on what is kept."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):  # "meta" has none
        return x, w, style
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), w.to(dtype), None if style is None else style.to(dtype)


def conv2d(
    x: Tensor,
    w: Tensor,
    *,
    style: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    groups: int = 1,
    impl: Impl = "auto",
) -> Tensor:
    """Convolution (a correlation, as everywhere in PyTorch) of style * x; exact first and second derivatives.

    x: [B, I, H, W]; w: [O, I / groups, k, k], or [I, O / groups, k, k] for transposed=True; style: [B, I] or None; all
    of one dtype. groups: parts of the channels that know nothing of each other.
    Keeps x, w and style for the backward, and nothing else. Returns what F.conv2d or F.conv_transpose2d would; under
    autocast all of it in autocast's dtype.
    """
    if w.ndim != 4 or w.shape[2] != w.shape[3] or x.ndim != 4:
        fits = False
    else:
        fits = x.shape[1] == (w.shape[0] if transposed else w.shape[1] * groups) and w.shape[0] % groups == 0
    if not fits:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)} don't fit a convolution with a square kernel")
    if style is not None and style.shape != x.shape[:2]:
        raise ValueError(f"style {tuple(style.shape)} must be [B, I] of x {tuple(x.shape)}")
    triton = runs_triton(impl, x) and style is not None and fits_triton(x)
    x, w, style = _autocast(x, w, style)
    return _conv(x, w, style, _Geometry(w.shape[2], stride, padding, transposed, groups=groups), triton)
