"""y = act(u (1 + scale) + shift) with u = group norm of x, and SiLU or nothing for act; saving x, and not u.

x [N, C, ...] in G groups of C / G channels (arXiv 1803.08494), weight and bias [C], scale and shift [N, C]. Beside x
mean and 1 / standard deviation [N, G] are saved; PyTorch under autocast saves x and u, both in fp32. The arithmetic is
of fp32, whatever the width of x. Without Triton 16 bits are widened in parts, so that no whole map is ever in fp32.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lowvram.kernels import group_norm_silu_triton
from lowvram.kernels.derivatives import first_order_only
from lowvram.kernels.dispatch import Impl, runs_triton

_PARTS = 4  # in which 16 bits are widened: more would save little, and each costs launches
_PART = 1 << 16  # elements of a sample in a part that is not worth dividing further

_Optional = Tensor | None
_Affine = tuple[_Optional, _Optional, _Optional, _Optional]  # weight, bias, scale, shift
_Act = Literal["silu", "none"]


def plain(
    x: Tensor,
    groups: int,
    weight: _Optional = None,
    bias: _Optional = None,
    eps: float = 1e-5,
    scale: _Optional = None,
    shift: _Optional = None,
    act: _Act = "silu",
) -> Tensor:
    """The meaning, differentiable by autograd to any order."""
    w, b = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    u = F.group_norm(x, groups, w, b, eps)
    if scale is not None:
        u = u * (1 + _along_pixels(scale.to(x.dtype), x))
    if shift is not None:
        u = u + _along_pixels(shift.to(x.dtype), x)
    return F.silu(u) if act == "silu" else u


def _along_pixels(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(*t.shape, *[1] * (x.ndim - 2))  # [N, C, 1, ...]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ----------------------------------------------------------------------------------------------------- without Triton


def _forward_torch(
    x: Tensor, groups: int, weight: _Optional, bias: _Optional, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd."""
    weight, bias = (None if t is None else t.to(_wide(x)) for t in (weight, bias))
    parts = _parts(x, groups)
    y = torch.empty_like(x) if len(parts) > 1 else None
    means, rstds = [], []
    for channels, own in parts:
        part = _widened(x, channels)
        w, b = (None if t is None else t[channels] for t in (weight, bias))
        u, mean, rstd = torch.native_group_norm(part, w, b, *_sizes(part), own.stop - own.start, eps)
        del part
        if silu:
            F.silu(u, inplace=True)
        if y is None:
            return _laid_out(u.to(x.dtype), x), mean, rstd
        y[:, channels] = u
        means.append(mean)
        rstds.append(rstd)
    assert y is not None
    return y, torch.cat(means, 1), torch.cat(rstds, 1)


def _backward_torch(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: _Optional, bias: _Optional, silu: bool
) -> tuple[Tensor, _Optional, _Optional]:
    """dx, and the gradients [C] by weight and bias."""
    weight, bias = (None if t is None else t.to(_wide(x)) for t in (weight, bias))
    factor, added = _linear(x, mean, rstd, weight, bias)
    parts = _parts(x, mean.shape[1])
    dx = torch.empty_like(x) if len(parts) > 1 else None
    dws, dbs = [], []
    needed = [True, weight is not None, bias is not None]
    for channels, own in parts:
        part, d = _widened(x, channels), _widened(dy, channels)
        if silu:
            u = torch.addcmul(added[:, channels], part, factor[:, channels])
            d = torch.ops.aten.silu_backward.grad_input(d, u, grad_input=u)
            del u
        m, r, w = mean[:, own].contiguous(), rstd[:, own].contiguous(), None if weight is None else weight[channels]
        sizes = (*_sizes(part), own.stop - own.start)
        d, dw, db = torch.ops.aten.native_group_norm_backward(d, part, m, r, w, *sizes, needed)
        del part
        if dx is None:
            return _laid_out(d.to(x.dtype), x), dw, db
        dx[:, channels] = d
        dws.append(dw)
        dbs.append(db)
    assert dx is not None
    return dx, None if weight is None else torch.cat(dws), None if bias is None else torch.cat(dbs)


def _parts(x: Tensor, groups: int) -> list[tuple[slice, slice]]:
    """Channels and groups to be widened at a time: all of them where x is wide. As many for any number of samples."""
    count = 1
    if x.dtype != _wide(x):
        count = max(1, min(_PARTS, groups, math.prod(x.shape[1:]) // _PART))
    step, width = -(-groups // count), x.shape[1] // groups
    ends = [(first, min(first + step, groups)) for first in range(0, groups, step)]
    return [(slice(first * width, end * width), slice(first, end)) for first, end in ends]


def _widened(t: Tensor, channels: slice) -> Tensor:
    """Those channels in fp32 at least, laid out as PyTorch's group norm takes them: a CPU's channels_last too."""
    last = t.device.type == "cpu" and not t.is_contiguous()
    return t[:, channels].to(_wide(t), memory_format=torch.channels_last if last else torch.contiguous_format)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return len(x), x.shape[1], math.prod(x.shape[2:])


def _linear(x: Tensor, mean: Tensor, rstd: Tensor, weight: _Optional, bias: _Optional) -> tuple[Tensor, Tensor]:
    """What x is multiplied by in the norm, and what is added then: [N, C, 1, ...] each."""
    groups = mean.shape[1]
    weight = mean.new_ones(x.shape[1]) if weight is None else weight
    factor = rstd[..., None] * weight.view(groups, -1)  # [N, G, C / G]
    added = -mean[..., None] * factor
    added = added if bias is None else added + bias.view(groups, -1)
    return _along_pixels(factor.flatten(1), x), _along_pixels(added.flatten(1), x)


def _laid_out(y: Tensor, x: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


# Scale and shift without Triton: the channels of all samples are taken for one sample's, which have weights each.


def _modulated_forward_torch(
    x: Tensor, groups: int, affine: _Affine, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_torch(_one_sample(x), len(x) * groups, *_folded(x, affine), eps, silu)
    return _laid_out(y.view(x.shape), x), mean.view(-1, groups), rstd.view(-1, groups)


def _modulated_backward_torch(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, affine: _Affine, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the gradients [N, C] by weight and bias with scale and shift in them."""
    statistics = (mean.view(1, -1), rstd.view(1, -1))
    dx, dw, db = _backward_torch(_one_sample(dy), _one_sample(x), *statistics, *_folded(x, affine), silu)
    assert dw is not None and db is not None
    return _laid_out(dx.view(x.shape), x), dw.view(x.shape[:2]), db.view(x.shape[:2])


def _one_sample(x: Tensor) -> Tensor:
    return x.contiguous().view(1, -1, *x.shape[2:])


def _folded(x: Tensor, affine: _Affine) -> tuple[Tensor, Tensor]:
    """Weight and bias [N C] with scale and shift in them, wide."""
    weight, bias, scale, shift = (None if t is None else t.to(_wide(x)) for t in affine)
    factor = x.new_ones(x.shape[:2], dtype=_wide(x)) if scale is None else 1 + scale
    b = torch.zeros_like(factor) if bias is None else bias * factor
    w = factor if weight is None else factor * weight
    return w.flatten(), (b if shift is None else b + shift).flatten()


# --------------------------------------------------------------------------------------------------------- either way


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        *affine, groups, eps, silu, triton = given
        weight, bias, scale, shift = affine
        if triton:
            y, mean, rstd = group_norm_silu_triton.forward(x, groups, weight, bias, eps, scale, shift, silu)
        elif scale is None and shift is None:
            y, mean, rstd = _forward_torch(x, groups, weight, bias, eps, silu)
        else:
            y, mean, rstd = _modulated_forward_torch(x, groups, tuple(affine), eps, silu)
        ctx.save_for_backward(x, mean, rstd, *affine)
        ctx.settings = (silu, triton)
        return y

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, *affine = ctx.saved_tensors
        weight, bias, scale, shift = affine
        silu, triton = ctx.settings
        dy = _laid_out(dy, x)
        if triton:
            dx, (db, dw) = group_norm_silu_triton.backward(dy, x, mean, rstd, *affine, silu)
        elif scale is None and shift is None:
            dx, dw, db = _backward_torch(dy, x, mean, rstd, weight, bias, silu)
        else:
            dx, dw, db = _modulated_backward_torch(dy, x, mean, rstd, tuple(affine), silu)
        return dx, *_of_parameters(dw, db, tuple(affine)), None, None, None, None


def _of_parameters(dw: Tensor, db: Tensor, affine: _Affine) -> list[_Optional]:
    """The gradients by weight, bias, scale and shift; dw, db: by weight and bias with all in them, [C] or [N, C]."""
    weight, bias, scale, shift = affine

    def by_channel(t: Tensor, parameter: _Optional) -> _Optional:
        if parameter is None:
            return None
        if t.ndim == 2:
            t = (t if scale is None else t * (1 + scale.to(t.dtype))).sum(0)
        return t.to(parameter.dtype)

    dscale = None
    if scale is not None:
        dscale = dw if weight is None else dw * weight
        dscale = (dscale if bias is None else dscale + db * bias).to(scale.dtype)
    dshift = None if shift is None else db.to(shift.dtype)
    return [by_channel(dw, weight), by_channel(db, bias), dscale, dshift]


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: _Optional = None,
    bias: _Optional = None,
    eps: float = 1e-5,
    *,
    scale: _Optional = None,
    shift: _Optional = None,
    act: _Act = "silu",
    impl: Impl = "auto",
) -> Tensor:
    """silu(u (1 + scale) + shift), u = (x - mean) / sqrt(variance + eps) * weight + bias over each group of channels.

    x: [N, C, ...], any floating dtype, which the result has too, under autocast as without; so has it x's layout
    (contiguous or channels_last; other strides become contiguous). weight, bias: [C]; scale, shift: [N, C]; each any
    floating dtype or None. act: "silu" or "none". Keeps x and [N, G] statistics for the backward, which can't be
    differentiated again.
    """
    if act not in ("silu", "none"):
        raise ValueError(f'act={act!r} is not known; use "silu" or "none"')
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x {tuple(x.shape)} must be [N, C, ...] with channels that are a multiple of groups={groups}")
    for name, t, shape in (
        ("weight", weight, x.shape[1:2]),
        ("bias", bias, x.shape[1:2]),
        ("scale", scale, x.shape[:2]),
        ("shift", shift, x.shape[:2]),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} {tuple(t.shape)} must be {list(shape)} for x {tuple(x.shape)}")
    triton = runs_triton(impl, x)
    if not x.numel():
        return plain(x, groups, weight, bias, eps, scale, shift, act).to(x.dtype)
    if not (x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    weight, bias, scale, shift = (None if t is None else t.contiguous() for t in (weight, bias, scale, shift))
    return _GroupNorm.apply(x, weight, bias, scale, shift, groups, eps, act == "silu", triton)
