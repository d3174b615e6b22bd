"""Gated units against fp64, by PyTorch and by Triton's interpreter (or the card, where there is one)."""

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device

from lowvram.kernels import dispatch
from lowvram.kernels.swiglu import geglu, plain, swiglu

ACTS = {"silu": swiglu, "gelu": geglu}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 2 * 24), (2 * 1031,), (2, 3, 2), (0, 4, 8), (4, 0)], ids=str)
def test_value_and_gradient_are_those_of_fp64(impl, act, dtype, shape) -> None:
    x = torch.randn(shape, dtype=dtype, device=device()).requires_grad_()
    y = ACTS[act](x, impl=impl)
    wide = x.detach().double().requires_grad_()
    expected = plain(wide, act)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == dtype
    close(y, expected)
    close(x.grad, wide.grad)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_any_strides(impl) -> None:
    x = torch.randn(6, 4, 16, device=device()).transpose(0, 1)
    close(swiglu(x, impl=impl), plain(x.double(), "silu"))
    x = x.contiguous().requires_grad_()
    (swiglu(x, impl=impl).transpose(0, 1) ** 2).sum().backward()
    wide = x.detach().double().requires_grad_()
    (plain(wide, "silu") ** 2).sum().backward()
    close(x.grad, wide.grad)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_keeps_its_input_alone(impl) -> None:
    x = torch.randn(3, 16, device=device(), requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = swiglu(x, impl=impl)
    assert [k.data_ptr() for k in kept] == [x.data_ptr()]
    with pytest.raises(RuntimeError, match="no second derivative"):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        g.sum().backward()


def test_rows_beyond_32_bits_are_addressed_in_64() -> None:
    launches = []
    x = torch.empty(1 << 19, 2 * 4096, dtype=torch.float16)  # never touched, so never there
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        swiglu(x, impl="triton")
    ((_, (rows, blocks), (_, _, width), _),) = launches
    assert rows == 1 << 19 and blocks * 1024 >= width == 4096
    assert 2 * width < 2**31  # within a row 32 bits do; the row's beginning is computed in 64


def test_compiles_for_every_card_into_wide_accesses() -> None:
    records = compile_all(
        """
from lowvram.kernels.swiglu import geglu, swiglu
for f in (swiglu, geglu):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(8, 4096, dtype=dtype, requires_grad=True)
        f(x, impl="triton").sum().backward()
"""
    )
    assert {r["kernel"] for r in records} == {"_forward_kernel", "_backward_kernel"}
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    for record in records:
        assert set(record["loads"]) == set(record["stores"]) == {"128"}, record


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="impl='fast'"):
        swiglu(torch.zeros(2, 4), impl="fast")
