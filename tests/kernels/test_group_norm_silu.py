"""Group norm and SiLU against fp64, by PyTorch and by Triton's interpreter (or the card, where there is one)."""

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device
from torch import Tensor

from lowvram.kernels import dispatch, group_norm_silu_triton
from lowvram.kernels.group_norm_silu import group_norm_silu, plain

WAYS = ["reference", "triton", "triton, divided"]
# The same sums are made one after the other, of numbers that are not centred.
LONGER = 4.0


@pytest.fixture(params=WAYS)
def impl(request, monkeypatch) -> str:
    """How to run; "triton, divided": the kernels for large groups, in tiles so small that a few pixels are many."""
    if request.param == "triton, divided":
        for name, value in {"_OWN": 0, "_TILE": 32, "_ROW": 16, "_LINE": 4}.items():
            monkeypatch.setattr(group_norm_silu_triton, name, value)
    return request.param.partition(",")[0]


def inputs(shape, dtype, *, modulated: bool, last: bool = False) -> list[Tensor | None]:
    """x, weight and bias (fp32 at least, as under autocast), scale and shift."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device()) * 2 + 1
    x = x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.randn(2, shape[1], dtype=wide, device=device()).unbind()
    scale, shift = torch.randn(2, *shape[:2], dtype=dtype, device=device()).unbind() if modulated else (None, None)
    return [None if t is None else t.requires_grad_() for t in (x, weight, bias, scale, shift)]


def compare(given, groups, impl, act="silu", eps=1e-5) -> None:
    """Value and all gradients against `plain` in fp64."""
    x, weight, bias, scale, shift = given
    given = [None if t is None else t.detach().requires_grad_() for t in given]
    y = group_norm_silu(given[0], groups, *given[1:3], eps, scale=given[3], shift=given[4], act=act, impl=impl)
    assert y.dtype == x.dtype and y.stride() == given[0].stride()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, scale, shift)]
    expected = plain(wide[0], groups, *wide[1:3], eps, *wide[3:], act)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    close(y, expected)
    for t, w in zip(given, wide, strict=True):
        if t is not None:
            assert t.grad.dtype == t.dtype
            close(t.grad, w.grad, factor=LONGER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "groups", "last", "modulated"),
    [
        ((2, 6, 3, 7), 2, False, True),
        ((2, 6, 3, 3), 2, True, False),
        ((3, 8), 2, False, False),
    ],
)
def test_value_and_gradients_are_those_of_fp64(impl, dtype, shape, groups, last, modulated) -> None:
    compare(inputs(shape, dtype, modulated=modulated, last=last), groups, impl)


@pytest.mark.parametrize("left_out", ["weight and bias", "bias", "weight, bias, scale", "shift", "activation"])
def test_each_part_may_be_left_out(impl, left_out) -> None:
    given = inputs((2, 6, 3, 7), torch.float32, modulated="s" in left_out.replace("bias", ""))
    for i, name in enumerate(["x", "weight", "bias", "scale", "shift"]):
        if name in left_out:
            given[i] = None
    compare(given, 2, impl, act="none" if left_out == "activation" else "silu", eps=0.1)


def test_a_large_group_is_divided_among_programs() -> None:
    x, weight, bias, *_ = given = inputs((1, 4, 130, 40), torch.float16, modulated=False)
    launches = []
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        group_norm_silu(x, 1, weight, bias, impl="triton")
    assert [kernel.__name__ for kernel, *_ in launches] == ["_moments_kernel", "_group_kernel", "_apply_kernel"]
    assert launches[0][1] == (11, 1)  # 512 pixels of all channels at a time
    compare(given, 1, "triton")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_groups_of_many_chunks_are_summed_in_steps(last, monkeypatch) -> None:
    for name, value in {"_OWN": 0, "_TILE": 16, "_ROW": 8, "_LINE": 4}.items():
        monkeypatch.setattr(group_norm_silu_triton, name, value)
    given = inputs((1, 4, 6, 7), torch.float32, modulated=False, last=last)
    plan = group_norm_silu_triton._plan(given[0], 2)
    assert plan.reduce["STEPS"] > 1
    compare(given, 2, "triton")


def test_16_bits_are_widened_in_parts() -> None:
    compare(inputs((2, 24, 90, 90), torch.bfloat16, modulated=False), 12, "reference")
    compare(inputs((1, 24, 90, 90), torch.float16, modulated=True), 12, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_large_mean_costs_no_accuracy(impl, dtype) -> None:
    """Squares of x itself would be 10^6 times the variance."""
    x = torch.randn(1, 4, 6, 6, device=device()) + (1000 if dtype == torch.float32 else 100)
    x = x.to(dtype)
    y, expected = group_norm_silu(x, 2, act="none", impl=impl), plain(x.double(), 2, act="none")
    assert (y.double() - expected).abs().max() < (1e-4 if dtype == torch.float32 else 4e-3)


def test_gradcheck(impl) -> None:
    def run(x, weight, bias, scale, shift):
        return group_norm_silu(x, 2, weight, bias, scale=scale, shift=shift, impl=impl)

    assert torch.autograd.gradcheck(run, inputs((2, 4, 2, 2), torch.float64, modulated=True), fast_mode=True)


def test_any_strides_and_an_empty_batch(impl) -> None:
    x = torch.randn(6, 2, 4, 5, device=device()).transpose(0, 1)
    y = group_norm_silu(x, 3, impl=impl)
    assert y.is_contiguous()
    close(y, plain(x.double(), 3))
    empty = torch.zeros(0, 6, 4, 4, device=device(), requires_grad=True)
    weight = torch.ones(6, device=device(), requires_grad=True)
    y = group_norm_silu(empty, 3, weight, impl=impl)
    y.sum().backward()
    assert y.shape == empty.grad.shape == empty.shape and not weight.grad.any()


def test_keeps_its_input_and_statistics_alone(impl) -> None:
    x, weight, bias, *_ = inputs((2, 6, 5, 5), torch.float16, modulated=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = group_norm_silu(x, 3, weight, bias, impl=impl)
    assert {t.data_ptr() for t in kept} >= {t.data_ptr() for t in (x, weight, bias)}
    assert sum(t.nbytes for t in kept) == x.nbytes + weight.nbytes + bias.nbytes + 2 * (2 * 3) * 4
    with pytest.raises(RuntimeError, match="GroupNorm has no second derivative"):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_type_alone(impl, dtype) -> None:
    x, weight, bias, *_ = inputs((2, 6, 4, 4), dtype, modulated=False)
    with torch.autocast(device(), dtype=dtype):
        y = group_norm_silu(x, 3, weight, bias, impl=impl)
    assert y.dtype == dtype
    close(y, plain(x.double(), 3, weight.double(), bias.double()))


def test_the_largest_temporary_is_small_in_16_bits() -> None:
    """Without Triton: parts of a map in fp32, not all of it."""
    from lowvram.memory.tracer import LiveBytes

    def peak_bytes(make) -> int:
        x = torch.randn(1, 32, 128, 128, dtype=torch.bfloat16, requires_grad=True)
        with LiveBytes() as memory:
            memory.watch(x)
            make(x).sum().backward()
        return memory.peak_bytes

    lean = peak_bytes(lambda x: group_norm_silu(x, 32, impl="reference"))
    map_bytes = 32 * 128 * 128 * 2
    assert lean < 5.7 * map_bytes  # x, y or dy, dx, and a quarter of it in fp32, several times
    assert peak_bytes(lambda x: plain(x.float(), 32).bfloat16()) > 8 * map_bytes


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_maps_beyond_32_bits_are_addressed_in_64(last) -> None:
    launches = []
    x = torch.empty(3, 512, 2048, 1024, dtype=torch.float16)  # 3.2e9 elements, never touched, so never there
    if last:
        x = torch.empty(3, 2048, 1024, 512, dtype=torch.float16).permute(0, 3, 1, 2)
    x.requires_grad_()
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        y = group_norm_silu(x, 32, impl="triton")
        torch.autograd.grad(y, x, torch.empty_like(x))
    assert len(launches) == 6
    for _, grid, _, options in launches:
        assert grid[0] < 2**31 and all(size <= 65535 for size in grid[1:])
        if "PIX" in options and len(grid) == 2:  # every pixel of every sample and every channel has a program
            assert grid[0] * options["PIX"] >= 3 * 2048 * 1024 and grid[1] * options["CH"] >= 512


COMPILED = """
from lowvram.kernels.group_norm_silu import group_norm_silu

def run(shape, groups, dtype, last=False, modulated=False):
    x = torch.empty(shape, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    weight, bias = torch.empty(2, shape[1]).unbind()
    given = dict(scale=torch.empty(shape[:2]), shift=torch.empty(shape[:2])) if modulated else {}
    group_norm_silu(x.requires_grad_(), groups, weight, bias, **given, impl="triton").sum().backward()

run((2, 512, 16, 16), 32, torch.float16)
run((2, 640, 64, 64), 32, torch.float16)
run((2, 640, 64, 64), 32, torch.bfloat16, last=True, modulated=True)
"""


@pytest.mark.slow
def test_compiles_for_every_card_into_wide_accesses() -> None:
    records = compile_all(COMPILED)
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    maps = {"own_forward": (1, 1), "own_backward": (2, 1), "moments": (1, 0), "apply": (1, 1), "sums": (2, 0)}
    maps["gradient"] = (2, 1)
    assert {r["kernel"] for r in records} == {f"_{name}_kernel" for name in (*maps, "group", "means")}
    for record in records:
        for accesses, count in zip(("loads", "stores"), maps.get(record["kernel"][1:-7], (0, 0)), strict=True):
            # 16 bits go by 8 at a time; the rest are sums and weights of fp32.
            assert record[accesses].get("128", 0) >= 4 * count, record
            assert not {"8", "16"} & set(record[accesses]), record


def test_bad_input_is_named() -> None:
    x = torch.zeros(2, 6, 4, 4)
    with pytest.raises(ValueError, match="groups=4"):
        group_norm_silu(x, 4)
    with pytest.raises(ValueError, match=r"weight \(5,\) must be \[6\]"):
        group_norm_silu(x, 3, torch.ones(5))
    with pytest.raises(ValueError, match=r"scale \(6,\) must be \[2, 6\]"):
        group_norm_silu(x, 3, scale=torch.ones(6))
    with pytest.raises(ValueError, match="act='relu'"):
        group_norm_silu(x, 3, act="relu")
