"""Numbers in 8 bits: blocks of 256 with one fp32 scale, rounded to the nearest of 256 levels; and rounding at random.

The levels are those of dynamic quantisation (Dettmers et al. 2021, arXiv 2110.02861, section 2): seven decades from
1e-7 to 1, each cut into cells of equal width, twice as many as the decade below; a level is the middle of a cell.
"signed" has 2**i cells in decade i on both sides of zero and 1 on top, "unsigned" 2**(i + 1) on one side. "positive" is
the latter with 1e-7 in the place of zero: a second moment of zero would divide by nothing.

A block's scale is its element of largest magnitude, with its sign, so that this one is the level 1 and exact. What was
rounded once therefore stays as it is when it is rounded again.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowvram.kernels.dispatch import jit, on_gpu, tl

BLOCK = 256  # elements that share a scale
LEVELS = 256
FLOOR = 1e-7  # of "positive"
_SMALLEST_SCALE = 1e-37  # a block below it is zero: its reciprocal would not be finite
_DECADES = 7
_SIGNED_ZERO = 127  # the place of zero among the signed levels
_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)  # multipliers, and what keys grow by
_ROUNDS = 10
_PIECE = 1 << 12  # numbers that a CPU looks up at a time, in its cache
_RANDOM_PIECE = 1 << 14  # random numbers that it makes at a time: 0.4 MiB of temporaries; fewer cost as much time each


@cache
def code_values(name: str) -> tuple[float, ...]:
    """256 rising values: "signed", "unsigned" or "positive"."""
    signed = name == "signed"
    above = [level for decade in range(_DECADES) for level in _middles(decade, 2 ** (decade + (not signed)))] + [1.0]
    if signed:
        return (*(-level for level in reversed(above[:-1])), 0.0, *above)
    return (FLOOR if name == "positive" else 0.0, *above)


def _middles(decade: int, cells: int) -> list[float]:
    largest = 10.0 ** (decade - _DECADES + 1)
    return [largest * (0.1 + 0.9 * (cell + 0.5) / cells) for cell in range(cells)]


def tables(device: torch.device) -> Tensor:
    """What kernels read, float32 [2, 512] for "signed" and "positive": 256 levels, and 255 bounds between them."""
    rows = []
    for name in ("signed", "positive"):
        levels = code_values(name)
        bounds = [(low + high) / 2 for low, high in pairwise(levels)]
        rows.append([*levels, *bounds, torch.finfo(torch.float32).max])
    return torch.tensor(rows, dtype=torch.float32, device=device)


# In PyTorch. Each works in given buffers, for callers that must not run out of memory half-way.


def decode(codes: Tensor, scales: Tensor, table: Tensor, out: Tensor, index: Tensor) -> None:
    """uint8 [n] with scales float32 [blocks] into out float32 [blocks * 256]; what is beyond n becomes zero.

    table: one row of `tables`. index: int32, as long as out, overwritten.
    """
    n = len(codes)
    index[:n].copy_(codes)
    torch.index_select(table, 0, index[:n], out=out[:n])
    out[n:].zero_()
    out.view(-1, BLOCK).mul_(scales[:, None])


def encode(values: Tensor, table: Tensor, index: Tensor, code: str) -> Tensor:
    """The scales float32 [blocks] of float32 [blocks * 256], which is overwritten; its codes go to index, int32.

    table: the row of `tables` for `code`.
    """
    rows = values.view(-1, BLOCK)
    high, low = rows.amax(dim=1), rows.amin(dim=1)
    scales = torch.where(high >= -low, high, low)
    scales.masked_fill_(scales.abs() < _SMALLEST_SCALE, 0.0)
    rows.mul_(torch.where(scales == 0, 1.0, scales).reciprocal_()[:, None])
    bounds = table[LEVELS : 2 * LEVELS - 1]
    if on_gpu(values) or type(values) is not Tensor:  # a fake one
        torch.bucketize(values, bounds, out_int32=True, out=index)
        return scales
    # A search takes a CPU ten times as long as two looks into tables: the upper 16 bits of a number leave two codes.
    lowest = _lowest_codes(code)
    for some, codes in zip(values.split(_PIECE), index.split(_PIECE), strict=True):
        upper = (some.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        torch.index_select(lowest, 0, upper, out=codes)
        codes.add_(some > torch.index_select(table[LEVELS:], 0, codes))
    return scales


@cache
def _lowest_codes(code: str) -> Tensor:
    """By the upper 16 bits of an fp32 number, the code of the lowest number that has them: int32 [65536] on the CPU."""
    with _disable_current_modes():  # it serves for good, outside of any trace
        upper = torch.arange(1 << 16, dtype=torch.int32) << 16
        lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32).nan_to_num(0.0)
        return torch.bucketize(lowest, _table(code)[LEVELS : 2 * LEVELS - 1], out_int32=True)


def quantize(values: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """float32 [n] as uint8 [n] and the scale of each block, float32 [blocks]; `code`: see `code_values`."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))  # a copy, or a view if nothing is missing
    index = torch.empty_like(padded, dtype=torch.int32)
    scales = encode(padded.clone(), _table(code), index, code)
    return index[: len(values)].to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, code: str) -> Tensor:
    """What `quantize`, or an optimizer's step, made of float32 [n]."""
    out = torch.empty(len(scales) * BLOCK, device=scales.device)
    decode(codes, scales, _table(code), out, torch.empty_like(out, dtype=torch.int32))
    return out[: len(codes)]


def _table(code: str) -> Tensor:
    levels = torch.tensor(code_values(code), dtype=torch.float64, device="cpu")
    bounds = (levels[1:] + levels[:-1]) / 2
    return torch.cat([levels, bounds, levels.new_tensor([torch.finfo(torch.float32).max])]).float()


def random_16(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Random numbers below 2**16 for elements start .. start + count of a tensor, int32; start a multiple of 8.

    Philox-4x32-10 (Salmon et al. 2011, section 4.3) of the element's number over 8: its four words are eight numbers,
    low halves before high ones. key: 64 bits.
    """
    counter = torch.arange(start // 8, -(-(start + count) // 8), device=device)  # int64, of which 32 bits are used
    nothing = torch.zeros_like(counter)
    even = torch.stack([counter & 0xFFFFFFFF, nothing])  # words 0 and 2: two at a time, for few operations
    odd = torch.stack([counter >> 32, nothing])  # words 1 and 3
    for turn in range(_ROUNDS):
        # 64 bits, the sign bit is one of them; the words change places.
        products = torch.stack([even[1] * _PHILOX[1], even[0] * _PHILOX[0]])
        even = (products >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(odd)
        even[0].bitwise_xor_(key + turn * _PHILOX[2] & 0xFFFFFFFF)
        even[1].bitwise_xor_((key >> 32) + turn * _PHILOX[3] & 0xFFFFFFFF)
        odd = products.bitwise_and_(0xFFFFFFFF)
    words = torch.stack([even, odd], dim=1).view(4, -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=1).to(torch.int32)  # [4, 2, n]
    return halves.permute(2, 0, 1).reshape(-1)[:count]


def round_at_random_(values: Tensor, key: int, start: int) -> None:
    """Make float32 [n] what bfloat16 holds: each one of its two neighbours, so that the mean is exact.

    A bf16 number is the upper half of an fp32 number. Adding 16 random bits to the lower half and cutting it off
    carries into the upper half with a probability that is the lower half's share of the gap. NaN and infinities are
    kept; finite values stay finite. key, start: see `random_16`.
    """
    largest = torch.finfo(torch.bfloat16).max
    piece = len(values) if on_gpu(values) else _RANDOM_PIECE
    for begin in range(0, len(values), piece):
        some = values[begin : begin + piece]
        noise = random_16(key, start + begin, len(some), some.device)
        rounded = noise.add_(some.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
        some.copy_(torch.where(some.isfinite(), rounded.clamp_(-largest, largest), some))


# In Triton, for tiles [rows, 256] of whole blocks.


@jit
def decode_tile(codes, scales, table):
    """uint8 [rows, 256] with scales [rows] as float32: a level is one load from a table that stays in the L1 cache."""
    return tl.load(table + codes.to(tl.int32)) * scales[:, None]


@jit
def encode_tile(values, table, SIGNED: tl.constexpr):
    """Codes uint8 and scales [rows] of float32 [rows, 256].

    The decade and the cell in it are computed; rounding leaves that at most one level off, next to the bounds, so one
    look at the bounds on both sides makes it exact. (A search in the bounds alone would be eight loads, not two.)
    """
    high, low = tl.max(values, axis=1), tl.min(values, axis=1)
    scales = tl.where(high >= -low, high, low)
    scales = tl.where(tl.abs(scales) < 1e-37, 0.0, scales)
    x = values * (1.0 / tl.where(scales == 0.0, 1.0, scales))[:, None]
    magnitude = tl.abs(x)
    cells = 1.0 if SIGNED else 2.0
    first = 1.0  # the place of a decade's first level, counted from zero's
    smallest, slope = 1e-7, cells / 0.9e-6
    place = (magnitude - smallest) * slope + first
    for _ in tl.static_range(6):
        first += cells
        cells *= 2.0
        smallest *= 10.0
        slope *= 0.2
        place = tl.where(magnitude >= smallest, (magnitude - smallest) * slope + first, place)
    last: tl.constexpr = 128 if SIGNED else 255
    place = tl.where(place >= 0.0, tl.where(place < last, place, last), 0.0).to(tl.int32)  # 0 for NaN too
    if SIGNED:
        place = tl.where(x < 0.0, 127 - tl.minimum(place, 127), 127 + place)
    below = tl.load(table + 256 + tl.maximum(place - 1, 0))
    above = tl.load(table + 256 + tl.minimum(place, 254))
    up = (x > above) & (place < 255)
    down = (x <= below) & (place > 0)
    return (place + up.to(tl.int32) - down.to(tl.int32)).to(tl.uint8), scales


@jit
def random_tile(key, start, ROWS: tl.constexpr):
    """`random_16` of the elements from `start` (int64, a multiple of 256) on: int32 [ROWS, 256]."""
    counter = start // 8 + tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(key, low, high, zero, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, 32, 2, 2], in order
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [ROWS, 256]).to(tl.int32)


@jit
def round_at_random_tile(values, noise):
    """`round_at_random_`."""
    bits = (values.to(tl.int32, bitcast=True) + noise) & -65536
    rounded = bits.to(tl.float32, bitcast=True)
    largest = 3.3895313892515355e38  # of bfloat16
    rounded = tl.where(rounded > largest, largest, tl.where(rounded < -largest, -largest, rounded))
    return tl.where(tl.abs(values) <= 3.4028234663852886e38, rounded, values)
