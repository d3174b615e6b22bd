"""Bias, noise, pixel normalisation and a gated linear unit in one Function that keeps only its input for the backward.

    t = x + bias + noise;  n = t / sqrt(mean over channels of t^2 + eps);  y = n[:C] * sigmoid(n[C:])

PyTorch alone would keep t, its square in fp32, n and what the gate needs: four to six times x. By PyTorch on every
device; the factors in fp32, the products in x's dtype. Pixel normalisation: arXiv 1710.10196, section 4.2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lowvram.kernels.derivatives import first_order_only

_EPS = 1e-8


def plain(x: Tensor, bias: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """The meaning, differentiable by autograd to any order."""
    t = x if bias is None else x + bias[:, None, None]
    t = t if noise is None else t + noise
    return F.glu(t * (t.square().mean(1, keepdim=True) + _EPS).rsqrt(), dim=1)


def norm_glu(x: Tensor, bias: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """x [B, 2 C, H, W], bias [2 C], noise [B or 1, 1, H, W] -> [B, C, H, W] in x's dtype. First-order."""
    y: Tensor = _NormGlu.apply(x, bias, noise)
    return y


def _normalised(x: Tensor, bias: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """n in a tensor of its own, and the factor 1 / rms in fp32 or wider [B, 1, H, W]."""
    n = x.clone() if bias is None else x + bias[:, None, None].to(x.dtype)
    if noise is not None:
        n += noise.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(n, dim=1, keepdim=True, dtype=wide)
    factor = norm.square_().div_(n.shape[1]).add_(_EPS).rsqrt_()
    return n.mul_(factor), factor


class _NormGlu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, noise: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias, noise)
        value, gate = _normalised(x, bias, noise)[0].chunk(2, dim=1)
        return torch.sigmoid(gate).mul_(value)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, bias, noise = ctx.saved_tensors
        n, factor = _normalised(x, bias, noise)
        value, gate = n.chunk(2, dim=1)
        dx = torch.empty_like(x)
        d_value, d_gate = dx.chunk(2, dim=1)
        # Half of the channels at a time, and in place where it can be: few tensors as large as x are there at once.
        is_open = torch.sigmoid(gate)
        torch.mul(dy, is_open, out=d_value)
        torch.mul(d_value, value, out=d_gate)
        d_gate.mul_(is_open.neg_().add_(1))
        del is_open
        along = (d_value * value).sum(1, keepdim=True, dtype=factor.dtype)
        along += (d_gate * gate).sum(1, keepdim=True, dtype=factor.dtype)
        dx.sub_(n.mul_(along / n.shape[1])).mul_(factor)
        wide = torch.promote_types(x.dtype, torch.float32)
        d_bias = None if bias is None else dx.sum((0, 2, 3), dtype=wide).to(bias.dtype)
        d_noise = None
        if noise is not None:
            d_noise = dx.sum(1, keepdim=True, dtype=wide)
            d_noise = (d_noise if len(noise) == len(dx) else d_noise.sum(0, keepdim=True)).to(noise.dtype)
        return dx, d_bias, d_noise
