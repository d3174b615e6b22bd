"""RMS norm against fp64, by PyTorch and by Triton's interpreter (or the card, where there is one)."""

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.kernels import dispatch
from lowvram.kernels.rms_norm import plain, rms_norm

EPS = 1e-6


def compare(x, weight, impl, dy=None) -> None:
    """Value and gradients of x and weight, which are leaves, with those in fp64."""
    y = rms_norm(x, weight, EPS, impl=impl)
    wide_x = x.detach().double().requires_grad_()
    wide_weight = None if weight is None else weight.detach().double().requires_grad_()
    expected = plain(wide_x, wide_weight, EPS)
    dy = torch.randn_like(y) if dy is None else dy
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == x.dtype and x.grad.dtype == x.dtype
    close(y, expected, factor=2)  # narrow types are rounded twice by PyTorch: normed, and weighted
    close(x.grad, wide_x.grad, factor=2)
    if weight is not None:
        assert weight.grad.dtype == weight.dtype
        close(weight.grad, wide_weight.grad, factor=2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 24), (1031,), (2, 3), (0, 4, 8), (4, 0), (2, 2, 2, 3, 5)], ids=str)
def test_value_and_gradients_are_those_of_fp64(impl, weighted, dtype, shape) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device()).requires_grad_()
    weight = torch.randn(shape[-1], dtype=dtype, device=device()).requires_grad_() if weighted else None
    compare(x, weight, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_wider_than_the_input(impl, dtype) -> None:
    x = torch.randn(5, 48, dtype=dtype, device=device()).requires_grad_()
    compare(x, torch.randn(48, device=device()).requires_grad_(), impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_squares_that_overflow_fp16_and_rows_of_zeros(impl) -> None:
    x = torch.randn(4, 32, dtype=torch.float16, device=device()) * 10000
    x[1] = 0
    compare(x.clamp(-60000, 60000).requires_grad_(), None, impl)


def test_many_rows_are_summed_in_parts(monkeypatch) -> None:
    monkeypatch.setattr("lowvram.kernels.rms_norm._PROGRAMS", 8)
    x = torch.randn(101, 700, device=device()).requires_grad_()  # two rows in a tile, eight tiles in a program
    weight = torch.randn(700, device=device()).requires_grad_()
    compare(x, weight, "triton")
    y = rms_norm(x, weight, impl="triton")
    first, second = (torch.autograd.grad(y, weight, torch.ones_like(y), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_heads_of_a_projection_are_read_where_they_are(impl) -> None:
    """Queries [B, heads, T, d] cut out of [B, T, 3, heads, d], and a gradient of another order."""
    qkv = torch.randn(2, 5, 3, 4, 16, device=device(), requires_grad=True)
    q = qkv.permute(2, 0, 3, 1, 4)[0]
    weight = torch.randn(16, device=device())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm(q, weight, impl=impl)
    assert kept[0].untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert y.transpose(1, 2).is_contiguous()  # in q's order
    wide = q.detach().double().requires_grad_()
    expected = plain(wide, weight.double(), EPS)
    close(y, expected)
    for dy in (torch.randn_like(y), torch.randn(4, 5, 2, 16, device=device()).permute(2, 0, 1, 3), y.new_ones(1, 16)):
        (dq,) = torch.autograd.grad(y, qkv, dy.expand_as(y), retain_graph=True)
        (expected_dq,) = torch.autograd.grad(expected, wide, dy.expand_as(y).double(), retain_graph=True)
        close(dq.permute(2, 0, 3, 1, 4)[0], expected_dq)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("cut", [lambda x: x[..., ::2], lambda x: x.transpose(0, 2), lambda x: x[:1].expand(6, 6, 6)])
def test_any_strides(impl, cut) -> None:
    x = torch.randn(6, 6, 6, device=device(), requires_grad=True)
    weight = torch.randn(cut(x).shape[-1], device=device())
    dy = torch.randn_like(cut(x))
    (dx,) = torch.autograd.grad(rms_norm(cut(x), weight, impl=impl), x, dy)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(cut(wide), weight.double(), EPS), wide, dy.double())
    close(dx, expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_by_differences_and_no_second_ones(impl, weighted) -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, device=device(), requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, device=device(), requires_grad=True) if weighted else None
    assert torch.autograd.gradcheck(lambda *tensors: rms_norm(*tensors, impl=impl), (x, weight), fast_mode=True)
    with pytest.raises(RuntimeError, match="RMSNorm has no second derivative"):
        (g,) = torch.autograd.grad(rms_norm(x, weight, impl=impl).sum(), x, create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_keeps_its_input_and_a_number_for_each_row(impl) -> None:
    x = torch.randn(3, 16, dtype=torch.bfloat16, device=device(), requires_grad=True)
    weight = torch.ones(16, device=device(), requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, impl=impl)
    assert [k.data_ptr() for k in kept[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [(k.dtype, k.shape) for k in kept[2:]] == [(torch.float32, (3, 1))]


def test_a_trace_sees_what_a_card_would_allocate() -> None:
    with FakeTensorMode(), dispatch.pretending(True):
        x = torch.empty(2, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(16, requires_grad=True)
        y = rms_norm(x.transpose(1, 2), weight)
        assert y.dtype == torch.bfloat16 and y.transpose(1, 2).is_contiguous()
        y.sum().backward()
        assert x.grad.shape == x.shape and weight.grad.dtype == torch.float32


def test_rows_beyond_32_bits_are_addressed_in_64() -> None:
    launches = []
    x = torch.empty(1 << 19, 5000, dtype=torch.float16)  # never touched, so never there
    weight = torch.empty(5000, dtype=torch.float16, requires_grad=True)
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        y = rms_norm(x, weight, impl="triton")
        torch.ops.lowvram.rms_norm_backward(y, x, weight, torch.empty(1 << 19, 1))
    (_, (programs,), forward, options), (_, (parts,), backward, steps) = launches
    assert forward[4:9] == backward[6:11] == (1 << 19, 5000, 1, 1, 5000)  # strides within 32 bits, rows within 32
    assert programs * options["ROWS"] >= 1 << 19 and parts * steps["ROWS"] * steps["STEPS"] >= 1 << 19
    assert parts <= 512  # rows of fp32 that are left to be summed


@pytest.mark.slow
def test_compiles_for_every_card_into_wide_accesses() -> None:
    records = compile_all(
        """
from lowvram.kernels.rms_norm import rms_norm
x = torch.randn(8, 16, 384, dtype=torch.float16, requires_grad=True)
rms_norm(x, impl="triton").sum().backward()
q = torch.randn(2, 16, 3, 6, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)[0].requires_grad_()
rms_norm(q, torch.ones(64, requires_grad=True), impl="triton").sum().backward()
"""
    )
    assert {r["kernel"] for r in records} == {"_forward_kernel", "_backward_kernel"}
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    for record in records:
        narrow = {"x", "y", "dy", "dx"} & set(record["signature"])
        assert {record["signature"][name] for name in narrow} <= {"*fp16", "*bf16"}
        for kind in ("loads", "stores"):
            assert "128" in record[kind] and set(record[kind]) <= {"128", "32"}, record
            assert record[kind].get("32", 0) <= 2, record  # of the numbers for each row


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight \(4,\) must be \(3,\)"):
        rms_norm(torch.zeros(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="impl='fast'"):
        rms_norm(torch.zeros(2, 4), impl="fast")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_weight_of_any_strides(impl) -> None:
    x, weight = torch.randn(5, 8), torch.randn(16)
    torch.testing.assert_close(rms_norm(x, weight[::2], impl=impl), rms_norm(x, weight[::2].clone(), impl=impl))
