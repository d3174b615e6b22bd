"""Triton's part of group_norm_silu.py: the kernels, how x is divided among programs, the registered operations.

Sums are made for each channel over chunks of pixels, then for each group in a fixed order: no atomics, so that a run
repeats, and one scheme for both layouts and for groups too large for a program. Forward: moments, group, apply (x is
read twice). Backward: sums, means, gradient (dy and x are read twice). A small group is a program's own, read once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram.kernels.dispatch import jit, launch, register, tl, wide

_TILE = 4096  # elements: 32 for each of 128 threads, four loads of 16 bytes in 16 bits
_ROW = 512  # pixels of a tile: sums are 8 bytes for each channel of it, 1% of what it holds
_LINE = 32  # channels of a tile where they are what lies side by side: two sectors of 32 bytes in 16 bits
_OWN = 16384  # elements of a group that is one program's own: 32 for each of 512 threads, which hold them

_Optional = Tensor | None


# -------------------------------------------------------------------------------------------------- parts of kernels


@jit
def _tile(channels, pixels, chunks, stride_c, stride_p, CH: tl.constexpr, PIX: tl.constexpr):
    """Program (sample and chunk of pixels, block of channels): channels [CH], places [CH, PIX] in x, which are there.

    One of the strides is 1: pixels lie side by side, or channels do.
    """
    row = tl.program_id(0)
    sample = (row // chunks).to(tl.int64)
    c = tl.program_id(1) * CH + tl.arange(0, CH)
    p = (row % chunks) * PIX + tl.arange(0, PIX)
    place = (sample * channels * pixels + c.to(tl.int64) * stride_c)[:, None] + (p.to(tl.int64) * stride_p)[None, :]
    return sample, c, place, (c < channels)[:, None] & (p < pixels)[None, :]


@jit
def _own(channels, pixels, width, CH: tl.constexpr, PIX: tl.constexpr):
    """Program: a group. The same for all of its channels and pixels, of which pixels lie side by side."""
    first = tl.program_id(0).to(tl.int64) * width  # channel, counted through the samples
    lane, p = tl.arange(0, CH), tl.arange(0, PIX)
    place = ((first + lane) * pixels)[:, None] + p[None, :]
    return first // channels, first % channels + lane, place, (lane < width)[:, None] & (p < pixels)[None, :]


@jit
def _affine(sample, c, there, channels, weight, bias, scale, shift, WIDE: tl.constexpr):
    """Weight and bias [CH] of the norm, with scale and shift in them; zero where no channel is there."""
    w = there.to(WIDE)
    b = tl.zeros_like(w)
    at = sample * channels + c
    if weight is not None:
        w = tl.load(weight + c, mask=there, other=0.0).to(WIDE)
    if bias is not None:
        b = tl.load(bias + c, mask=there, other=0.0).to(WIDE)
    if scale is not None:
        factor = 1 + tl.load(scale + at, mask=there, other=0.0).to(WIDE)
        w *= factor
        b *= factor
    if shift is not None:
        b += tl.load(shift + at, mask=there, other=0.0).to(WIDE)
    return w, b


@jit
def _act(u, SILU: tl.constexpr):
    return u / (1 + tl.exp(-u)) if SILU else u


@jit
def _statistics(sample, c, there, mean, rstd, groups, width):
    """Mean and 1 / standard deviation [CH] of the groups that channels are of."""
    group = sample * groups + c // width
    return tl.load(mean + group, mask=there, other=0.0), tl.load(rstd + group, mask=there, other=0.0)


@jit
def _through_act(dy, x, place, inside, m, r, w, b, SILU: tl.constexpr, WIDE: tl.constexpr):
    """z and du, zero where there is no element."""
    z = tl.where(inside, (tl.load(x + place, mask=inside, other=0.0).to(WIDE) - m) * r, 0.0)
    d = tl.load(dy + place, mask=inside, other=0.0).to(WIDE)
    if SILU:
        u = z * w + b
        s = 1 / (1 + tl.exp(-u))
        d *= s * (1 + u * (1 - s))
    return z, d


@jit
def _partial(step, chunks, channels, groups, width, CH: tl.constexpr, ROWS: tl.constexpr):
    """Program: a group. Places [ROWS, CH] of its channels' sums in [N, chunks, 2, C], ROWS chunks from step on."""
    group = tl.program_id(0).to(tl.int64)
    chunk, lane = step * ROWS + tl.arange(0, ROWS), tl.arange(0, CH)
    at = (group // groups * chunks + chunk)[:, None] * (2 * channels) + (group % groups * width + lane)[None, :]
    return chunk, at, (chunk < chunks)[:, None] & (lane < width)[None, :]


# ------------------------------------------------------------------------------------------------------------ forward


@jit
def _own_forward_kernel(
    x, y, mean, rstd, weight, bias, scale, shift, channels, pixels, width, eps,
    SILU: tl.constexpr, WIDE: tl.constexpr, CH: tl.constexpr, PIX: tl.constexpr,
):  # fmt: skip
    """A group, at once. Reads and writes each element once."""
    sample, c, place, inside = _own(channels, pixels, width, CH, PIX)
    v = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    m = tl.sum(v) / (width * pixels)
    v = tl.where(inside, v - m, 0.0)
    r = tl.math.rsqrt(tl.sum(v * v) / (width * pixels) + eps)
    tl.store(mean + tl.program_id(0), m)
    tl.store(rstd + tl.program_id(0), r)
    w, b = _affine(sample, c, tl.arange(0, CH) < width, channels, weight, bias, scale, shift, WIDE)
    u = v * r * w[:, None] + b[:, None]
    tl.store(y + place, _act(u, SILU).to(y.dtype.element_ty), mask=inside)


@jit
def _moments_kernel(
    x, parts, channels, pixels, chunks, stride_c, stride_p, WIDE: tl.constexpr, CH: tl.constexpr, PIX: tl.constexpr
):
    """Mean, and sum of squared distances from it, of each channel over a chunk of pixels. Reads each element once."""
    _, c, place, inside = _tile(channels, pixels, chunks, stride_c, stride_p, CH, PIX)
    v = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    m = tl.sum(v, 1) / tl.minimum(pixels - tl.program_id(0) % chunks * PIX, PIX)
    v = tl.where(inside, v - m[:, None], 0.0)
    at = parts + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(at, m, mask=c < channels)
    tl.store(at + channels, tl.sum(v * v, 1), mask=c < channels)


@jit
def _group_kernel(
    parts, mean, rstd, channels, pixels, chunks, groups, width, eps,
    WIDE: tl.constexpr, PIX: tl.constexpr, CH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A group's mean and 1 / standard deviation of its channels' moments: squares are never of x itself."""
    total = tl.zeros([ROWS, CH], WIDE)
    for step in range(STEPS):
        chunk, at, inside = _partial(step, chunks, channels, groups, width, CH, ROWS)
        count = tl.minimum(pixels - chunk * PIX, PIX)[:, None]
        total += count * tl.load(parts + at, mask=inside, other=0.0)
    m = tl.sum(total) / (width * pixels)
    total = tl.zeros([ROWS, CH], WIDE)
    for step in range(STEPS):
        chunk, at, inside = _partial(step, chunks, channels, groups, width, CH, ROWS)
        count = tl.minimum(pixels - chunk * PIX, PIX)[:, None]
        away = tl.load(parts + at, mask=inside, other=0.0) - m
        within = tl.load(parts + at + channels, mask=inside, other=0.0)
        total += tl.where(inside, within + count * away * away, 0.0)
    tl.store(mean + tl.program_id(0), m)
    tl.store(rstd + tl.program_id(0), tl.math.rsqrt(tl.sum(total) / (width * pixels) + eps))


@jit
def _apply_kernel(
    x, y, mean, rstd, weight, bias, scale, shift, channels, pixels, chunks, stride_c, stride_p, groups, width,
    SILU: tl.constexpr, WIDE: tl.constexpr, CH: tl.constexpr, PIX: tl.constexpr,
):  # fmt: skip
    """Reads and writes each element once."""
    sample, c, place, inside = _tile(channels, pixels, chunks, stride_c, stride_p, CH, PIX)
    there = c < channels
    w, b = _affine(sample, c, there, channels, weight, bias, scale, shift, WIDE)
    m, r = _statistics(sample, c, there, mean, rstd, groups, width)
    v = tl.load(x + place, mask=inside, other=0.0).to(WIDE)
    u = (v - m[:, None]) * (r * w)[:, None] + b[:, None]
    tl.store(y + place, _act(u, SILU).to(y.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------- backward
# With z = (x - mean) rstd and du the gradient by u: dx = rstd (w du - [w du] - z [w du z]), [] the group's mean; and
# all gradients of parameters are of two sums over pixels, du and du z.


@jit
def _own_backward_kernel(
    dy, x, dx, sums, mean, rstd, weight, bias, scale, shift, channels, pixels, width, rows,
    SILU: tl.constexpr, WIDE: tl.constexpr, CH: tl.constexpr, PIX: tl.constexpr,
):  # fmt: skip
    """A group, at once. Reads 2, writes 1 for each element. sums [2, N, C]; rows: N C."""
    sample, c, place, inside = _own(channels, pixels, width, CH, PIX)
    m = tl.load(mean + tl.program_id(0))
    r = tl.load(rstd + tl.program_id(0))
    there = tl.arange(0, CH) < width
    w, b = _affine(sample, c, there, channels, weight, bias, scale, shift, WIDE)
    z, d = _through_act(dy, x, place, inside, m, r, w[:, None], b[:, None], SILU, WIDE)
    of_d, of_dz = tl.sum(d, 1), tl.sum(d * z, 1)
    at = sums + sample * channels + c
    tl.store(at, of_d, mask=there)
    tl.store(at + rows, of_dz, mask=there)
    mean_d, mean_dz = tl.sum(w * of_d) / (width * pixels), tl.sum(w * of_dz) / (width * pixels)
    d = r * (w[:, None] * d - mean_d - z * mean_dz)
    tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)


@jit
def _sums_kernel(
    dy, x, parts, mean, rstd, weight, bias, scale, shift, channels, pixels, chunks, stride_c, stride_p, groups, width,
    SILU: tl.constexpr, WIDE: tl.constexpr, CH: tl.constexpr, PIX: tl.constexpr,
):  # fmt: skip
    """The two sums of each channel over a chunk of pixels. Reads 2 for each element."""
    sample, c, place, inside = _tile(channels, pixels, chunks, stride_c, stride_p, CH, PIX)
    there = c < channels
    w, b = _affine(sample, c, there, channels, weight, bias, scale, shift, WIDE)
    m, r = _statistics(sample, c, there, mean, rstd, groups, width)
    z, d = _through_act(dy, x, place, inside, m[:, None], r[:, None], w[:, None], b[:, None], SILU, WIDE)
    at = parts + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(d, 1), mask=there)
    tl.store(at + channels, tl.sum(d * z, 1), mask=there)


@jit
def _means_kernel(
    parts, sums, means, weight, scale, channels, pixels, chunks, groups, width, rows, all_groups,
    WIDE: tl.constexpr, CH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A group's channels over all chunks, sums [2, N, C], and its own means [2, N, G]. rows: N C; all_groups: N G."""
    total_d, total_dz = tl.zeros([ROWS, CH], WIDE), tl.zeros([ROWS, CH], WIDE)
    for step in range(STEPS):
        _, at, inside = _partial(step, chunks, channels, groups, width, CH, ROWS)
        total_d += tl.load(parts + at, mask=inside, other=0.0)
        total_dz += tl.load(parts + at + channels, mask=inside, other=0.0)
    of_d, of_dz = tl.sum(total_d, 0), tl.sum(total_dz, 0)
    group, lane = tl.program_id(0).to(tl.int64), tl.arange(0, CH)
    sample, c, there = group // groups, group % groups * width + lane, lane < width
    at = sums + sample * channels + c
    tl.store(at, of_d, mask=there)
    tl.store(at + rows, of_dz, mask=there)
    w, _ = _affine(sample, c, there, channels, weight, None, scale, None, WIDE)
    tl.store(means + group, tl.sum(w * of_d) / (width * pixels))
    tl.store(means + all_groups + group, tl.sum(w * of_dz) / (width * pixels))


@jit
def _gradient_kernel(
    dy, x, dx, means, mean, rstd, weight, bias, scale, shift,
    channels, pixels, chunks, stride_c, stride_p, groups, width, all_groups,
    SILU: tl.constexpr, WIDE: tl.constexpr, CH: tl.constexpr, PIX: tl.constexpr,
):  # fmt: skip
    """Reads 2, writes 1 for each element."""
    sample, c, place, inside = _tile(channels, pixels, chunks, stride_c, stride_p, CH, PIX)
    there = c < channels
    w, b = _affine(sample, c, there, channels, weight, bias, scale, shift, WIDE)
    m, r = _statistics(sample, c, there, mean, rstd, groups, width)
    group = sample * groups + c // width
    mean_d = tl.load(means + group, mask=there, other=0.0)
    mean_dz = tl.load(means + all_groups + group, mask=there, other=0.0)
    z, d = _through_act(dy, x, place, inside, m[:, None], r[:, None], w[:, None], b[:, None], SILU, WIDE)
    d = r[:, None] * (w[:, None] * d - mean_d[:, None] - z * mean_dz[:, None])
    tl.store(dx + place, d.to(dx.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------- launches


class _Plan(NamedTuple):
    """How x is divided. own: each group is a program's. ch, pix: of a tile; reduce: what goes over the partial sums."""

    samples: int
    channels: int
    groups: int
    pixels: int
    own: bool
    ch: int
    pix: int

    @property
    def width(self) -> int:
        return self.channels // self.groups

    @property
    def chunks(self) -> int:
        return -(-self.pixels // self.pix)

    @property
    def grid(self) -> tuple[int, int]:
        return self.samples * self.chunks, -(-self.channels // self.ch)

    @property
    def reduce(self) -> dict[str, int]:
        ch = _power(self.width)
        rows = max(1, min(_power(self.chunks), _TILE // 2 // ch))
        return {"CH": ch, "ROWS": rows, "STEPS": _power(-(-self.chunks // rows))}


def _plan(x: Tensor, groups: int) -> _Plan:
    samples, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    ch, pix = _power(channels // groups), _power(pixels)
    own = x.is_contiguous() and ch * pix <= _OWN
    if own:
        pass
    elif x.is_contiguous():
        pix = min(pix, _ROW)
        ch = min(_power(channels), _TILE // pix)
    else:
        ch = min(_power(channels), _LINE)
        pix = min(pix, _TILE // ch)
    return _Plan(samples, channels, groups, pixels, own, ch, pix)


def _power(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def _strides(x: Tensor, plan: _Plan) -> tuple[int, int]:
    """Of channels and of pixels."""
    return (plan.pixels, 1) if x.is_contiguous() else (1, plan.channels)


def _options(x: Tensor, plan: _Plan, silu: bool) -> dict[str, Any]:
    warps = max(4, min(16, plan.ch * plan.pix // 1024))
    return {"SILU": silu, "WIDE": wide(x), "CH": plan.ch, "PIX": plan.pix, "num_warps": warps}


def _fake_forward(
    x: Tensor,
    groups: int,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    scale: _Optional,
    shift: _Optional,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(len(x), groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), mean, torch.empty_like(mean)


@register(
    "group_norm_silu(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, "
    "bool silu) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def forward(
    x: Tensor,
    groups: int,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    scale: _Optional,
    shift: _Optional,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = made = _fake_forward(x, groups, weight, bias, eps, scale, shift, silu)
    plan, affine = _plan(x, groups), (weight, bias, scale, shift)
    options = _options(x, plan, silu)
    if plan.own:
        sizes = (plan.channels, plan.pixels, plan.width)
        launch(_own_forward_kernel, (mean.numel(),), x, y, mean, rstd, *affine, *sizes, eps, **options)
        return made
    sizes = (plan.channels, plan.pixels, plan.chunks)
    strides, per_group = _strides(x, plan), (groups, plan.width)
    parts = x.new_empty(plan.samples, plan.chunks, 2, plan.channels, dtype=mean.dtype)
    tile = {name: options[name] for name in ("WIDE", "CH", "PIX", "num_warps")}
    launch(_moments_kernel, plan.grid, x, parts, *sizes, *strides, **tile)
    reduce = {"WIDE": wide(x), "PIX": plan.pix, **plan.reduce}
    launch(_group_kernel, (mean.numel(),), parts, mean, rstd, *sizes, *per_group, eps, **reduce)
    launch(_apply_kernel, plan.grid, x, y, mean, rstd, *affine, *sizes, *strides, *per_group, **options)
    return made


def _fake_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: _Optional, bias: _Optional, scale: _Optional,
    shift: _Optional, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), mean.new_empty(2, *x.shape[:2])


@register(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, bool silu) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: _Optional, bias: _Optional, scale: _Optional,
    shift: _Optional, silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and, for each sample and channel, the sums of du and of du z: [2, N, C]."""
    dx, sums = made = _fake_backward(dy, x, mean, rstd, weight, bias, scale, shift, silu)
    groups = mean.shape[1]
    plan, of_x = _plan(x, groups), (mean, rstd, weight, bias, scale, shift)
    rows, all_groups = plan.samples * plan.channels, mean.numel()
    options = _options(x, plan, silu)
    if plan.own:
        sizes = (plan.channels, plan.pixels, plan.width)
        launch(_own_backward_kernel, (all_groups,), dy, x, dx, sums, *of_x, *sizes, rows, **options)
        return made
    sizes = (plan.channels, plan.pixels, plan.chunks)
    strides, per_group = _strides(x, plan), (groups, plan.width)
    parts = sums.new_empty(plan.samples, plan.chunks, 2, plan.channels)
    means = sums.new_empty(2, plan.samples, groups)
    launch(_sums_kernel, plan.grid, dy, x, parts, *of_x, *sizes, *strides, *per_group, **options)
    totals = (parts, sums, means, weight, scale, *sizes, *per_group, rows, all_groups)
    launch(_means_kernel, (all_groups,), *totals, WIDE=wide(x), **plan.reduce)
    launch(_gradient_kernel, plan.grid, dy, x, dx, means, *of_x, *sizes, *strides, *per_group, all_groups, **options)
    return made
