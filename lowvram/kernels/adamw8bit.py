"""A step of Adam, AdamW or Lion over all parameters of a network in one launch, with moments in 8 bits.

Adam (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1; decoupled decay as in AdamW, Loshchilov and Hutter 2017, arXiv
1711.05101) and Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), in fp32, on moments that are kept in blocks of
256 numbers of 8 bits with one fp32 scale (eight_bit.py): 2 bytes a parameter in place of 8. bf16 weights need no fp32
copy: they are rounded at random to a neighbour, right on average.

Tensors are taken flat, in the order of their memory; so channels_last weights are as good as others. Moments of small
tensors stay fp32, in the same launch. The gradients are multiplied first by a number of the host's and one of the
device's, such as 1 / loss scale and a clipping factor, so that the host need not wait for the device to know them.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram.kernels import eight_bit
from lowvram.kernels.dispatch import Impl, jit, launch, on_gpu, register, runs_triton, tl
from lowvram.kernels.eight_bit import BLOCK, decode_tile, encode_tile, random_tile, round_at_random_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 8  # blocks to a program: 16 elements a thread, whose loads are enough in flight to fill a card's bandwidth
_TILE = _ROWS * BLOCK
_COLUMNS = 12  # of the table that a launch reads: see _row
_CHUNK_CPU = 1 << 16  # elements that PyTorch does at a time, with six temporaries: 1.5 MiB, in the cache,
_CHUNK_GPU = 1 << 20  # or 24 MiB, for as few launches
_SPARE_BYTES = 32  # for an element of a chunk: smaller temporaries, most of them for random numbers


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is done to every parameter alike.

    lion: Lion in place of Adam; its decay is decoupled. decoupled: decay the weight (AdamW), not by the gradient.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    lion: bool = False


@dataclass(kw_only=True)
class Slot:
    """One parameter, as flat tensors in the order of its memory, on one device; n = numel.

    weight: [n], fp32, bf16 or fp16. grad: [n], of any of these; None: it is left as it is. first, second: the moments,
    uint8 [n] with scales float32 [ceil(n / 256)], or float32 [n] with None. Lion has no second; Adam with beta1 = 0
    no first. step: the number of this step, from 1. key: 63 random bits by which a bf16 weight is rounded; None: it is
    rounded to the nearest.
    """

    weight: Tensor
    grad: Tensor | None
    first: Tensor | None
    first_scale: Tensor | None
    second: Tensor | None
    second_scale: Tensor | None
    step: int
    key: int | None = None


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What a launch over certain parameters reads beside them, on their device; made once.

    codes: float32 [2, 512], see eight_bit.tables. owners: int32 [programs], the parameter that each works on. table:
    int64 [parameters, 12], overwritten by each step.
    """

    codes: Tensor
    owners: Tensor
    table: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        return self.codes, self.owners, self.table


def workspace(sizes: Sequence[int], device: torch.device) -> Workspace:
    """The workspace of parameters with so many elements, in the order of the slots."""
    programs = [-(-size // _TILE) for size in sizes]
    owners = torch.repeat_interleave(
        torch.arange(len(sizes), dtype=torch.int32, device=device),
        torch.tensor(programs, device=device),
        output_size=sum(programs),
    )
    table = torch.empty(len(sizes), _COLUMNS, dtype=torch.int64, device=device)
    return Workspace(codes=eight_bit.tables(device), owners=owners, table=table)


def memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor flat, as a view, in the order of its memory.

    Raises:
        ValueError: it has gaps, or elements that share memory.
    """
    if not is_dense(tensor):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} with strides {tensor.stride()} is not dense")
    return tensor.as_strided((tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in any order."""
    if tensor.is_contiguous():  # nearly always, and quickly told: a step asks for every parameter
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# Triton.


@jit
def _at(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(KIND))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@jit
def _load(pointers, inside, KNOWN: tl.constexpr):
    return tl.load(pointers) if KNOWN else tl.load(pointers, mask=inside, other=0)


@jit
def _store(pointers, values, inside, KNOWN: tl.constexpr):
    if KNOWN:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=inside)


@jit
def _float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _tile(
    row, start, size, codes, beta1, rest1, beta2, rest2, eps, decay, shrink, factor,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, LION: tl.constexpr, FIRST: tl.constexpr, COUPLED: tl.constexpr,
    RANDOM: tl.constexpr, ALIGNED: tl.constexpr, NARROW: tl.constexpr, KNOWN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of one parameter; KNOWN: all of them are whole, so that no mask keeps accesses narrow."""
    at = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = start + at < size
    block = start // 256 + tl.arange(0, ROWS)
    block_inside = block * 256 < size
    state: tl.constexpr = tl.uint8 if NARROW else tl.float32

    weight_at = _at(tl.load(row), WEIGHT, ALIGNED) + start + at
    weight = _load(weight_at, inside, KNOWN).to(tl.float32)
    grad = _load(_at(tl.load(row + 1), GRAD, ALIGNED) + start + at, inside, KNOWN).to(tl.float32) * factor
    if COUPLED:
        grad += weight * decay
    else:
        weight *= shrink
    first = grad
    if FIRST:
        first_at = _at(tl.load(row + 2), state, ALIGNED) + start + at
        first = _load(first_at, inside, KNOWN)
        if NARROW:
            first_scale_at = _at(tl.load(row + 3), tl.float32, False) + block
            first = decode_tile(first, _load(first_scale_at, block_inside, KNOWN), codes)
    step_size = _float(tl.load(row + 9))
    if LION:
        mixed = first * beta1 + grad * rest1
        weight -= tl.where(mixed > 0.0, step_size, tl.where(mixed < 0.0, -step_size, mixed))
        first = first * beta2 + grad * rest2
    else:
        if FIRST:
            first = first * beta1 + grad * rest1
        second_at = _at(tl.load(row + 4), state, ALIGNED) + start + at
        second = _load(second_at, inside, KNOWN)
        if NARROW:
            second_scale_at = _at(tl.load(row + 5), tl.float32, False) + block
            second = decode_tile(second, _load(second_scale_at, block_inside, KNOWN), codes + 512)
        if not KNOWN:
            second = tl.where(inside, second, 0.0)
        second = second * beta2 + grad * grad * rest2
        weight -= first / (tl.sqrt(second) * _float(tl.load(row + 10)) + eps) * step_size
        if NARROW:
            second, scales = encode_tile(second, codes + 512, False)
            _store(second_scale_at, scales, block_inside, KNOWN)
        _store(second_at, second, inside, KNOWN)
    if FIRST:
        if NARROW:
            if not KNOWN:
                first = tl.where(inside, first, 0.0)
            first, scales = encode_tile(first, codes, True)
            _store(first_scale_at, scales, block_inside, KNOWN)
        _store(first_at, first, inside, KNOWN)
    if RANDOM:
        weight = round_at_random_tile(weight, random_tile(tl.load(row + 8), start, ROWS))
    _store(weight_at, weight.to(WEIGHT), inside, KNOWN)


@jit
def _step_kernel(
    table, owners, codes, multiplier, beta1, rest1, beta2, rest2, eps, decay, shrink, factor,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, LION: tl.constexpr, FIRST: tl.constexpr, COUPLED: tl.constexpr,
    RANDOM: tl.constexpr, ALIGNED: tl.constexpr, MULTIPLIED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program for each 2048 elements of a parameter. Of each element of Adam with bf16 weights and gradients it reads
    6 bytes and writes 4; in whole blocks, 16 bytes at a time for each thread."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program).to(tl.int64) * COLUMNS
    start = (program - tl.load(row + 7)) * (ROWS * 256)  # int64
    size = tl.load(row + 6)
    works = tl.load(row + 1) != 0
    if MULTIPLIED:
        factor = tl.load(multiplier) * factor
        works = works & (tl.abs(factor) <= 3.4028234663852886e38)
    if works:
        narrow = tl.load(row + 11) != 0
        if narrow & (start + ROWS * 256 <= size):
            _tile(row, start, size, codes, beta1, rest1, beta2, rest2, eps, decay, shrink, factor,
                  WEIGHT, GRAD, LION, FIRST, COUPLED, RANDOM, ALIGNED, True, True, ROWS)  # fmt: skip
        elif narrow:
            _tile(row, start, size, codes, beta1, rest1, beta2, rest2, eps, decay, shrink, factor,
                  WEIGHT, GRAD, LION, FIRST, COUPLED, RANDOM, ALIGNED, True, False, ROWS)  # fmt: skip
        else:
            _tile(row, start, size, codes, beta1, rest1, beta2, rest2, eps, decay, shrink, factor,
                  WEIGHT, GRAD, LION, FIRST, COUPLED, RANDOM, ALIGNED, False, False, ROWS)  # fmt: skip


@register(
    "adamw8bit_(Tensor(a!)[] weights, Tensor?[] grads, Tensor(b!)[] firsts, Tensor(c!)[] first_scales, "
    "Tensor(d!)[] seconds, Tensor(e!)[] second_scales, Tensor(f!) table, Tensor owners, Tensor codes, "
    "Tensor? multiplier, float[] numbers, int[] steps, int[] keys, bool lion, bool decoupled, bool random) -> ()",
    fake=lambda *_: None,
)
def _step_triton(
    weights: list[Tensor], grads: list[Tensor | None], firsts: list[Tensor], first_scales: list[Tensor],
    seconds: list[Tensor], second_scales: list[Tensor], table: Tensor, owners: Tensor, codes: Tensor,
    multiplier: Tensor | None, numbers: list[float], steps: list[int], keys: list[int],
    lion: bool, decoupled: bool, random: bool,
) -> None:  # fmt: skip
    """Fill the table and launch. Absent moments are empty lists, absent scales empty tensors."""
    rule = _rule(numbers, lion=lion, decoupled=decoupled)
    rows, program, aligned = [], 0, True
    states = [firsts, first_scales, seconds, second_scales]
    for i, (weight, grad, step, key) in enumerate(zip(weights, grads, steps, keys, strict=True)):
        state = [tensors[i].data_ptr() if tensors else 0 for tensors in states]
        pointers = [weight.data_ptr(), 0 if grad is None else grad.data_ptr(), *state]
        aligned = aligned and not any(pointer % 16 for pointer in (pointers[0], pointers[1], state[0], state[2]))
        narrow = (firsts or seconds)[i].dtype == torch.uint8
        rows.append([*pointers, weight.numel(), program, key, *map(_bits, _sizes(rule, step)), narrow])
        program += -(-weight.numel() // _TILE)
    filled = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=table.is_cuda)
    table.copy_(filled, non_blocking=True)
    weight, grad = next((w, g) for w, g in zip(weights, grads, strict=True) if g is not None)
    launch(
        _step_kernel, (len(owners),), table, owners, codes, multiplier, *_arguments(rule, numbers[-1]),
        WEIGHT=_kind(weight), GRAD=_kind(grad), LION=lion, FIRST=bool(firsts),
        COUPLED=_coupled(rule), RANDOM=random, ALIGNED=aligned, MULTIPLIED=multiplier is not None,
        COLUMNS=_COLUMNS, ROWS=_ROWS,
    )  # fmt: skip


def _kind(tensor: Tensor) -> Any:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[tensor.dtype]


def _bits(number: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", number))
    return int(bits)


# What both ways have in common.


def _rule(numbers: Sequence[float], *, lion: bool, decoupled: bool) -> Rule:
    lr, beta1, beta2, eps, decay = numbers[:5]
    return Rule(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, decoupled=decoupled, lion=lion)


def _sizes(rule: Rule, step: int) -> tuple[float, float]:
    """The step size with the correction of the first moment's bias, and the factor on the second's square root."""
    if rule.lion:
        return rule.lr, 1.0
    beta1, beta2 = rule.betas
    return rule.lr / (1 - beta1**step), (1 - beta2**step) ** -0.5


def _coupled(rule: Rule) -> bool:
    return bool(rule.weight_decay) and not rule.decoupled and not rule.lion


def _arguments(rule: Rule, factor: float) -> list[float]:
    """beta1, 1 - beta1, beta2, 1 - beta2, eps, decay by the gradient, and factors on the weight and on the gradient."""
    beta1, beta2 = rule.betas
    shrink = 1.0 if _coupled(rule) else 1 - rule.lr * rule.weight_decay
    return [beta1, 1 - beta1, beta2, 1 - beta2, rule.eps, rule.weight_decay, shrink, factor]


# PyTorch.


def _step_torch(slots: Sequence[Slot], rule: Rule, codes: Tensor, factor: float, multiplier: Tensor | None) -> None:
    """The same numbers in the same order, a chunk at a time."""
    slots = [slot for slot in slots if slot.grad is not None and slot.weight.numel()]
    if not slots:
        return
    gpu, device = on_gpu(slots[0].weight), slots[0].weight.device
    chunk = _CHUNK_GPU if gpu else _CHUNK_CPU
    longest = min(chunk, max(-(-slot.weight.numel() // BLOCK) * BLOCK for slot in slots))
    wide = [torch.empty(longest, device=device) for _ in range(5)]
    index = torch.empty(longest, dtype=torch.int32, device=device)
    if gpu:  # memory that runs out does so here, before a weight has changed; what is freed at once serves from then on
        torch.empty(longest * _SPARE_BYTES, dtype=torch.uint8, device=device)
    factors = multiplier if multiplier is None else multiplier.float() * factor
    for slot in slots:
        for start in range(0, slot.weight.numel(), chunk):
            end = min(start + chunk, slot.weight.numel())
            _chunk_torch(slot, start, end, rule, codes, factor if factors is None else factors, wide, index)


def _chunk_torch(
    slot: Slot, start: int, end: int, rule: Rule, codes: Tensor, factor: float | Tensor, wide: list[Tensor],
    index: Tensor,
) -> None:  # fmt: skip
    assert slot.grad is not None
    n, padded = end - start, -(-(end - start) // BLOCK) * BLOCK
    keep = None if isinstance(factor, float) else ~factor.isfinite()
    beta1, rest1, beta2, rest2, eps, decay, shrink, _ = _arguments(rule, 1.0)
    step_size, correction = _sizes(rule, slot.step)
    weight, grad, part, temporary = (buffer[:n] for buffer in wide[:4])

    weight.copy_(slot.weight[start:end])
    grad.copy_(slot.grad[start:end]).mul_(factor)
    if _coupled(rule):
        grad.add_(torch.mul(weight, decay, out=temporary))
    else:
        weight.mul_(shrink)
    first = _Moment(slot.first, slot.first_scale, start, end, codes, "signed", wide[2][:padded], index[:padded])
    second = _Moment(slot.second, slot.second_scale, start, end, codes, "positive", wide[4][:padded], index[:padded])
    part = grad
    if slot.first is not None:
        part = first.read()
    if rule.lion:
        torch.mul(part, beta1, out=temporary)
        weight.sub_(temporary.add_(torch.mul(grad, rest1, out=wide[4][:n])).sign_().mul_(step_size))
        part.mul_(beta2).add_(grad.mul_(rest2))
    else:
        squares = second.read()
        if slot.first is not None:
            part.mul_(beta1).add_(torch.mul(grad, rest1, out=temporary))
        squares.mul_(beta2).add_(torch.mul(grad, grad, out=temporary).mul_(rest2))
        torch.sqrt(squares, out=temporary).mul_(correction).add_(eps)
        weight.sub_(torch.div(part, temporary, out=temporary).mul_(step_size))
        second.write(keep)
    if slot.first is not None:
        first.write(keep)
    if slot.weight.dtype == torch.bfloat16 and slot.key is not None:
        eight_bit.round_at_random_(weight, slot.key, start)
    _put(slot.weight[start:end], weight, keep)


class _Moment:
    """A chunk of one moment, of either width."""

    def __init__(
        self, state: Tensor | None, scales: Tensor | None, start: int, end: int, codes: Tensor, code: str, wide: Tensor,
        index: Tensor,
    ) -> None:  # fmt: skip
        self.wide, self.index, self.n, self.code = wide, index, end - start, code
        self.table = codes[0 if code == "signed" else 1]
        self.scales = None if scales is None else scales[start // BLOCK : -(-end // BLOCK)]
        if state is not None:
            self.state = state[start:end]

    def read(self) -> Tensor:
        """float32 [n], to be changed in place."""
        if self.scales is None:
            self.wide[: self.n].copy_(self.state)
        else:
            eight_bit.decode(self.state, self.scales, self.table, self.wide, self.index)
        return self.wide[: self.n]

    def write(self, keep: Tensor | None) -> None:
        """Store what was made of it."""
        if self.scales is None:
            _put(self.state, self.wide[: self.n], keep)
        else:
            _put(self.scales, eight_bit.encode(self.wide, self.table, self.index, self.code), keep)
            _put(self.state, self.index[: self.n], keep)


def _put(target: Tensor, values: Tensor, keep: Tensor | None) -> None:
    """Store values, unless `keep` is true: a bool [] on the device."""
    target.copy_(values if keep is None else torch.where(keep, target.to(values.dtype), values))


def adamw8bit_(
    slots: Sequence[Slot],
    rule: Rule,
    work: Workspace,
    *,
    factor: float = 1.0,
    multiplier: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Change the weights and moments of all slots, in place, by one step.

    factor, multiplier: on the gradients; the latter float32 [] or [1] on the device. If their product is not finite,
    nothing is changed on the device, and the host doesn't wait to learn that; it counts the step all the same, so that
    later steps correct the moments' bias a little less.
    work: `workspace` of the slots' sizes.

    Raises:
        ValueError: a slot's tensors don't fit one another.
    """
    _check(slots, multiplier)
    with_grad = [slot for slot in slots if slot.grad is not None]
    if not with_grad:
        return
    if not runs_triton(impl, slots[0].weight):
        _step_torch(slots, rule, work.codes, factor, multiplier)
        return
    kinds = {(s.weight.dtype, s.grad.dtype, s.key is not None) for s in with_grad if s.grad is not None}
    nothing = work.codes[:0, 0]
    for weight, grad, random in sorted(kinds, key=str):  # one, as a rule
        mine = [(s.weight.dtype, None if s.grad is None else s.grad.dtype, s.key is not None) for s in slots]
        chosen = [m == (weight, grad, random) for m in mine]
        lists = [
            [getattr(s, name) if getattr(s, name) is not None else nothing for s in slots]
            if any(getattr(s, name.removesuffix("_scale")) is not None for s in slots)
            else []
            for name in ("first", "first_scale", "second", "second_scale")
        ]
        numbers = [rule.lr, *rule.betas, rule.eps, rule.weight_decay, factor]
        _step_triton(
            [s.weight for s in slots],
            [s.grad if take else None for s, take in zip(slots, chosen, strict=True)],
            *lists,
            work.table,
            work.owners,
            work.codes,
            multiplier,
            numbers,
            [s.step for s in slots],
            [s.key or 0 for s in slots],
            rule.lion,
            rule.decoupled,
            random and weight == torch.bfloat16,
        )
    # As operations of torch do, for backwards that saved them and for who asks whether they changed.
    changed = [(s.weight, s.first, s.first_scale, s.second, s.second_scale) for s in with_grad]
    torch.autograd.graph.increment_version([t for tensors in changed for t in tensors if t is not None])


def _check(slots: Sequence[Slot], multiplier: Tensor | None) -> None:
    if multiplier is not None and (multiplier.numel() != 1 or multiplier.dtype != torch.float32):
        raise ValueError(f"multiplier must be one float32 number, not {multiplier.dtype} {list(multiplier.shape)}")
    for slot in slots:
        n, device = slot.weight.numel(), slot.weight.device
        for name in ("weight", "grad", "first", "second", "first_scale", "second_scale"):
            tensor = getattr(slot, name)
            if tensor is not None and tensor.device != device:  # a kernel that is given addresses would not notice
                raise ValueError(f"{name} is on {tensor.device}, and its weight on {device}")
        for name in ("weight", "grad", "first", "second"):
            tensor = getattr(slot, name)
            if tensor is not None and (tensor.shape != (n,) or not tensor.is_contiguous()):
                raise ValueError(f"{name} must be a contiguous [{n}], not {list(tensor.shape)}")
        for state, scales in ((slot.first, slot.first_scale), (slot.second, slot.second_scale)):
            narrow = state is not None and state.dtype == torch.uint8
            if narrow != (scales is not None) or (scales is not None and scales.shape != (-(-n // BLOCK),)):
                raise ValueError(f"moments of uint8 [{n}] need scales [{-(-n // BLOCK)}], and others none")
        if slot.weight.dtype not in DTYPES or (slot.grad is not None and slot.grad.dtype not in DTYPES):
            raise ValueError(f"a weight of {slot.weight.dtype} is not known; use float32, bfloat16 or float16")
