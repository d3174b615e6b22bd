"""Steps of Adam and Lion with 8-bit moments: PyTorch and Triton against fp64, and against each other."""

import copy
import math
from typing import Any

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.kernels import dispatch
from lowvram.kernels import eight_bit as eb
from lowvram.kernels.adamw8bit import Rule, Slot, adamw8bit_, is_dense, memory_order, workspace

SIZES = (1, 300, 5000, 4096)  # fp32 moments for the first two; then a last block that is not whole
RULES = {
    "AdamW": {"decoupled": True, "weight_decay": 0.1},
    "Adam": {"decoupled": False, "weight_decay": 0.1},
    "no first moment": {"betas": (0.0, 0.99)},
    "Lion": {"lion": True, "weight_decay": 0.1},
}


def rule(**changes: Any) -> Rule:
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "decoupled": True}
    return Rule(**{**settings, **changes})


def normal(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device=device(), dtype=dtype)


def slots(how: Rule, *, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> list[Slot]:
    made = []
    for i, n in enumerate(sizes):
        state: dict[str, Tensor | None] = {"first": None, "first_scale": None, "second": None, "second_scale": None}
        for name in ["first"] if how.lion else ["second"] if how.betas[0] == 0 else ["first", "second"]:
            narrow = n >= 4096
            state[name] = torch.zeros(n, dtype=torch.uint8 if narrow else torch.float32, device=device())
            state[f"{name}_scale"] = torch.zeros(-(-n // 256), device=device()) if narrow else None
        made.append(Slot(weight=normal(n, i, dtype), grad=None, step=0, key=None, **state))
    return made


def step(chosen: list[Slot], how: Rule, impl: Any, number: int, **options: Any) -> None:
    """The step of that number, from 1, with gradients that are the same each time, of many magnitudes."""
    for i, slot in enumerate(chosen):
        n = len(slot.weight)
        decades = torch.logspace(0, -3, n, device=device())
        slot.grad = (normal(n, 100 * number + i) * decades).to(slot.weight.dtype)
        slot.step = number
    adamw8bit_(chosen, how, workspace([len(s.weight) for s in chosen], torch.device(device())), impl=impl, **options)


def tensors_of(slot: Slot) -> dict[str, Tensor]:
    found = {n: getattr(slot, n) for n in ("weight", "first", "first_scale", "second", "second_scale")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def wide_moments(slot: Slot) -> dict[str, Tensor]:
    """Moments as float64."""
    out = {}
    for name, code in (("first", "signed"), ("second", "positive")):
        state, scales = getattr(slot, name), getattr(slot, f"{name}_scale")
        if state is not None:
            out[name] = (state if scales is None else eb.dequantize(state.cpu(), scales.cpu(), code)).cpu().double()
    return out


def expected(slot: Slot, how: Rule, factor: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight and moments after a step, by the papers' formulas in fp64."""
    (beta1, beta2), moments = how.betas, wide_moments(slot)
    weight, grad = slot.weight.cpu().double(), slot.grad.cpu().double() * factor
    if how.decoupled or how.lion:
        weight = weight - how.lr * how.weight_decay * weight
    else:
        grad = grad + how.weight_decay * weight
    if how.lion:
        weight = weight - how.lr * torch.sign(beta1 * moments["first"] + (1 - beta1) * grad)
        return weight, {"first": beta2 * moments["first"] + (1 - beta2) * grad}
    first = beta1 * moments.get("first", torch.zeros_like(grad)) + (1 - beta1) * grad
    second = beta2 * moments["second"] + (1 - beta2) * grad**2
    root = (second / (1 - beta2**slot.step)).sqrt() + how.eps
    weight = weight - how.lr * first / (1 - beta1**slot.step) / root
    return weight, {"first": first, "second": second}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_that_of_fp64(name: str, dtype: torch.dtype, impl: Any) -> None:
    """The weight to its own width; moments to half the gap between two levels."""
    how = rule(**RULES[name])
    chosen = slots(how, dtype=dtype)
    for number in (1, 2):
        before = copy.deepcopy(chosen)
        step(chosen, how, impl, number, factor=0.5)
        for slot, was in zip(chosen, before, strict=True):
            was.grad, was.step = slot.grad, slot.step
            weight, moments = expected(was, how, 0.5)
            unit = {torch.float32: 3e-7, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype]  # bf16 may be cut off
            error = (slot.weight.cpu().double() - weight).abs()
            moved = error > unit * weight.abs().clamp(min=how.lr)
            assert moved.float().mean() < (1e-3 if how.lion else 1e-9)  # a sign is that of rounding, next to zero
            for key, found in wide_moments(slot).items():
                if getattr(slot, f"{key}_scale") is None:
                    torch.testing.assert_close(found, moments[key], rtol=1e-5, atol=1e-9)
                    continue
                padded = torch.nn.functional.pad(moments[key], (0, -len(found) % 256)).view(-1, 256)
                largest = padded.abs().amax(dim=1).repeat_interleave(256)[: len(found)]
                gap = 0.45 / (64 if key == "first" else 128)  # of the widest cells
                assert ((found - moments[key]).abs() <= (gap + 1e-6) * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_both_ways_agree_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """But for the last bit of a root, which PyTorch's library for CPUs may round otherwise, and of what its AVX2 code
    fuses otherwise."""
    differ = 0.0 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 2e-2
    how = rule(**RULES[name])
    one, other = slots(how, dtype=dtype), slots(how, dtype=dtype)
    for number in (1, 2, 3):
        for chosen, impl in ((one, "reference"), (other, "triton")):
            for i, slot in enumerate(chosen):
                slot.key = 1234567890123456789 + i if dtype == torch.bfloat16 else None
            step(chosen, how, impl, number)
    for a, b in zip(one, other, strict=True):
        for key, value in tensors_of(a).items():
            found = tensors_of(b)[key]
            if device() == "cuda":  # which fuses products and sums
                continue
            if key == "weight":
                assert (value != found).float().mean() < max(2e-3, differ)
                torch.testing.assert_close(value, found, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)
            else:
                assert (value != found).float().mean() <= differ, key


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rounding_is_unbiased_and_follows_the_key(impl: Any) -> None:
    """Weights of 1 that move by 0.3 of a gap: 30% of them step, and none by more; seen over 8 keys of 4096 elements."""
    how, n, gap = rule(lr=0.3 * 2**-7, betas=(0.0, 0.99), eps=0.0), 4096, 2**-7
    means, seen = [], []
    for key in range(8):
        (slot,) = slots(how, dtype=torch.bfloat16, sizes=(n,))
        slot.weight.fill_(1 + gap)
        slot.grad, slot.step, slot.key = torch.ones_like(slot.weight), 1, key
        work = workspace([n], slot.weight.device)
        adamw8bit_([slot], how, work, impl=impl)
        steps = (1 + gap - slot.weight.double()) / gap
        assert set(steps.tolist()) == {0.0, 1.0}
        means.append(steps.mean().item())
        seen.append(steps)
    deviation = math.sqrt(0.3 * 0.7 / n)
    assert all(abs(mean - 0.3) < 4.5 * deviation for mean in means)
    assert abs(sum(means) / 8 - 0.3) < 4 * deviation / math.sqrt(8)
    correlation = torch.corrcoef(torch.stack(seen))
    assert (correlation - torch.eye(8, device=correlation.device)).abs().max() < 6 / math.sqrt(n)
    shifted = torch.stack([seen[0][:-8], *(seen[0][k : n - 8 + k] for k in range(1, 9))])  # neighbours are independent
    assert (torch.corrcoef(shifted)[0, 1:]).abs().max() < 6 / math.sqrt(n)


def test_random_numbers_are_philox_and_fill_their_range() -> None:
    """Known answers of the generator (Salmon et al. 2011, their library's kat_vectors): zeros, and pi's digits."""
    zeros = eb.random_16(0, 0, 8, torch.device("cpu"))
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert zeros.tolist() == [half for word in words for half in (word & 0xFFFF, word >> 16)]
    far = eb.random_16(7, 1 << 35, 1 << 16, torch.device("cpu"))
    assert not torch.equal(far, eb.random_16(7, 0, 1 << 16, torch.device("cpu")))
    assert torch.equal(far[256:512], eb.random_16(7, (1 << 35) + 256, 256, torch.device("cpu")))
    counts = torch.bincount(far.long() >> 8, minlength=256).double()
    assert ((counts - 256) ** 2 / 256).sum() < 255 + 5 * math.sqrt(2 * 255)  # chi squared


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_of_the_device_multiplies_gradients_and_if_not_finite_changes_nothing(
    impl: Any, dtype: torch.dtype
) -> None:
    how = rule(weight_decay=0.1)
    one, other = slots(how, dtype=dtype), slots(how, dtype=dtype)
    step(one, how, impl, 1, factor=0.25)
    step(other, how, impl, 1, factor=0.5, multiplier=torch.tensor(0.5, device=device()))
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(a).values(), tensors_of(b).values(), strict=True))
    before = copy.deepcopy(one)
    for bad in (math.nan, math.inf):
        step(one, how, impl, 2, multiplier=torch.tensor(bad, device=device()))
    for a, b in zip(one, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors_of(a).values(), tensors_of(b).values(), strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_slots_without_gradient_of_other_types_and_of_no_elements(impl: Any) -> None:
    how = rule()
    mixed = [*slots(how, sizes=(5000, 7, 0)), *slots(how, dtype=torch.bfloat16, sizes=(100, 4096))]
    plain = copy.deepcopy(mixed)
    step(mixed, how, impl, 1)
    for slot in plain[2:]:  # one by one
        step([slot], how, impl, 1)
    for slot, number in zip(mixed, range(5), strict=True):
        slot.grad, slot.step = (None if number == 0 else normal(len(slot.weight), number, slot.weight.dtype)), 2
    before = [slot.weight.clone() for slot in mixed]
    adamw8bit_(mixed, how, workspace([5000, 7, 0, 100, 4096], mixed[0].weight.device), impl=impl)
    changed = [not torch.equal(slot.weight, was) for slot, was in zip(mixed, before, strict=True)]
    assert changed == [False, True, False, True, True]


def test_zeros_infinities_and_bad_numbers_stay_in_their_own_block() -> None:
    for impl in ("reference", "triton"):
        how = rule()
        (slot,) = slots(how, sizes=(8192,))
        slot.grad, slot.step = torch.zeros(8192, device=device()), 1
        slot.grad[256:512] = 1e-30
        slot.grad[600] = math.nan
        slot.grad[2600] = math.inf
        before = slot.weight.clone()
        adamw8bit_([slot], how, workspace([8192], slot.weight.device), impl=impl)
        finite = slot.weight.isfinite()
        assert finite.sum() == 8192 - 2 and not finite[600] and not finite[2600]
        assert torch.equal(slot.weight[:256], before[:256])  # 0 / 0 is no step
        touched = torch.tensor([600 // 256, 2600 // 256], device=slot.weight.device)
        assert slot.second_scale.index_fill(0, touched, 0.0).isfinite().all()


def test_one_launch_for_a_group_and_programs_beyond_32_bits_of_elements() -> None:
    launches = []
    how = rule()
    n = (1 << 32) + 5  # never touched, so never there
    huge = Slot(
        weight=torch.empty(n, dtype=torch.bfloat16),
        grad=torch.empty(n, dtype=torch.bfloat16),
        first=torch.empty(n, dtype=torch.uint8),
        first_scale=torch.empty(n // 256 + 1),
        second=torch.empty(n, dtype=torch.uint8),
        second_scale=torch.empty(n // 256 + 1),
        step=1,
        key=3,
    )
    small = slots(how, dtype=torch.bfloat16, sizes=(300, 5000))
    for slot in small:
        slot.grad, slot.step, slot.key = slot.weight.clone(), 1, 1
    work = workspace([300, n, 5000], torch.device("cpu"))
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        adamw8bit_([small[0], huge, small[1]], how, work, impl="triton")
    ((_, (programs,), (table, owners, *_), options),) = launches
    tile = options["ROWS"] * 256
    assert programs == len(owners) == 1 + -(-n // tile) + 3 < 2**31
    begins = table[:, 7].tolist()
    assert begins == [0, 1, 1 + -(-n // tile)]
    assert [owners[b].item() for b in begins] == [0, 1, 2] and owners[-4].item() == 1
    last_start = (begins[2] - 1 - begins[1]) * tile  # as the kernel has it, in 64 bits
    assert 2**32 <= last_start < n <= last_start + tile
    assert table[1, 6] == n and table[:, 11].tolist() == [0, 1, 1]


def test_any_order_of_dense_memory_is_taken_flat() -> None:
    x = torch.arange(24.0).view(2, 3, 2, 2)
    last = x.contiguous(memory_format=torch.channels_last)
    assert is_dense(last) and memory_order(last).data_ptr() == last.data_ptr()
    assert memory_order(last).tolist() == x.permute(0, 2, 3, 1).flatten().tolist()
    assert is_dense(x.new_zeros(0, 3)) and is_dense(x.new_zeros([])) and is_dense(x.transpose(0, 3))
    for bad in (x[:, :2], x[:1].expand(2, 3, 2, 2), x[..., ::2]):
        assert not is_dense(bad)
        with pytest.raises(ValueError, match="not dense"):
            memory_order(bad)


@pytest.mark.parametrize("code", ["signed", "unsigned", "positive"])
def test_the_upper_16_bits_of_a_number_leave_two_codes(code: str) -> None:
    """Which is what a CPU's way of encoding rests on: at either end of each range, and next to every bound."""
    lowest = eb._lowest_codes(code)
    bounds = torch.tensor(eb.tables(torch.device("cpu"))[0 if code == "signed" else 1, 256:511].tolist())
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = [bits.view(torch.float32) for bits in (upper, upper | 0xFFFF)]
    if code != "unsigned":
        codes = torch.stack([torch.bucketize(end, bounds) for end in ends])
        known = ends[0].isfinite()  # NaN's codes are nobody's
        assert ((codes.amax(0) - codes.amin(0))[known] <= 1).all()
        assert torch.equal(codes.amin(0)[known], lowest[known].long())
    levels = torch.tensor(eb.code_values(code))
    narrow, scales = eb.quantize(torch.cat([levels, levels.new_zeros(255), levels.new_ones(1)]), code)
    assert narrow[:256].tolist() == list(range(256)) and scales.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("code", ["signed", "unsigned", "positive"])
def test_what_was_rounded_stays(code: str) -> None:
    """So state that was kept in fp32 for a while is the same 8 bits again, whatever the sign of a block's largest."""
    draws = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -8, 5000)
    values = draws if code == "signed" else draws.abs()
    codes, scales = eb.quantize(values, code)
    again = eb.quantize(eb.dequantize(codes, scales, code), code)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.slow
def test_compiles_for_every_card_into_wide_accesses() -> None:
    """Whole blocks of weights, gradients and moments go 16 bytes at a time; what is left over, element by element."""
    code = """
from lowvram.kernels.adamw8bit import Rule, Slot, adamw8bit_, workspace
n = 8192
for dtype, lion in CASES:
    how = Rule(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decoupled=True, lion=lion)
    state = lambda: dict(zip(("first", "first_scale"), (torch.zeros(n, dtype=torch.uint8), torch.zeros(n // 256))))
    second = dict.fromkeys(("second", "second_scale")) if lion else {
        k.replace("first", "second"): v for k, v in state().items()}
    x = torch.zeros(n, dtype=dtype)
    slot = Slot(weight=x, grad=x.clone(), step=1, key=3, **state(), **second)
    adamw8bit_([slot], how, workspace([n], slot.weight.device), impl="triton")
"""
    records = compile_all(code.replace("CASES", "[(torch.bfloat16, False)]"))
    records += compile_all(code.replace("CASES", "[(torch.float32, False), (torch.bfloat16, True)]"), [75])
    assert {r["architecture"] for r in records} == set(ARCHITECTURES) and len(records) == len(ARCHITECTURES) + 2
    for record in records:
        assert record["loads"]["128"] >= 4 and record["stores"]["128"] >= 3, record
        assert record["shared"] <= 16 * 1024


def test_bad_input_is_named() -> None:
    how = rule()
    (slot,) = slots(how, sizes=(5000,))
    slot.grad, slot.step = slot.weight.clone(), 1
    work = workspace([5000], slot.weight.device)
    for changes, says in (
        ({"grad": torch.zeros(7, device=device())}, "grad must be"),
        ({"weight": slot.weight.double()}, "float64"),
        ({"first_scale": None}, "need scales"),
        ({"second_scale": torch.zeros(3, device=device())}, "need scales"),
    ):
        bad = copy.copy(slot)
        for name, value in changes.items():
            setattr(bad, name, value)
        with pytest.raises(ValueError, match=says):
            adamw8bit_([bad], how, work)
    with pytest.raises(ValueError, match="multiplier"):
        adamw8bit_([slot], how, work, multiplier=torch.zeros(2, device=device()))


def test_it_can_be_traced_for_a_card_with_triton_and_without() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    how = rule()
    for triton in (True, False):
        seen: list[Any] = []
        with FakeTensorMode(), dispatch.pretending(triton):
            chosen, work = slots(how), workspace(list(SIZES), torch.device("cpu"))
            for slot in chosen:
                slot.grad, slot.step = torch.zeros_like(slot.weight), 1
            with Operations():
                adamw8bit_(chosen, how, work, factor=0.5)
        ours = [func for func in seen if func.namespace == "lowvram"]
        assert len(ours) == triton  # one operation for them all, or PyTorch's own, which a trace sees one by one
        assert triton or len(seen) > 20


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_was_changed_says_so(impl) -> None:
    weight, left = torch.randn(64), torch.randn(64)
    slots = [
        Slot(
            weight=w, grad=g, first=torch.zeros(64), first_scale=None, second=torch.zeros(64), second_scale=None, step=1
        )
        for w, g in ((weight, torch.randn(64)), (left, None))
    ]
    rule = Rule(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, decoupled=True)
    kept = weight.requires_grad_().square()  # its backward wants the old weight
    with torch.no_grad():
        adamw8bit_(slots, rule, workspace([64, 64], torch.device("cpu")), impl=impl)
    assert left._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_tensors_of_two_devices_are_refused() -> None:
    slot = Slot(
        weight=torch.zeros(8),
        grad=torch.zeros(8, device="meta"),
        first=torch.zeros(8),
        first_scale=None,
        second=torch.zeros(8),
        second_scale=None,
        step=1,
    )
    rule = Rule(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, decoupled=True)
    with pytest.raises(ValueError, match="grad is on meta, and its weight on cpu"):
        adamw8bit_([slot], rule, workspace([8], torch.device("cpu")))
