"""Norm and rotation of queries and keys against fp64, by PyTorch and by Triton's interpreter (or the card)."""

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.kernels import dispatch
from lowvram.kernels.rms_norm_rotate import plain, rms_norm_rotate

EPS = 1e-6


def rotation(tokens, width):
    angles = torch.rand(tokens, width // 2, device=device()) * 6
    return torch.stack([angles.cos(), angles.sin()])


def compare(x, weight, turn, impl, dy=None) -> None:
    """Value and gradients of x and weight, in their dtypes, with those in fp64."""
    y = rms_norm_rotate(x, weight, turn, impl=impl)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = plain(wide_x, wide_weight, turn.double(), EPS)
    dy = torch.randn_like(y) if dy is None else dy
    grads = torch.autograd.grad(y, (x, weight), dy)
    expected_grads = torch.autograd.grad(expected, (wide_x, wide_weight), dy.double())
    assert y.dtype == grads[0].dtype == x.dtype and grads[1].dtype == weight.dtype
    close(y, expected, factor=3)  # PyTorch rounds narrow types three times: normed, weighted, turned
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # PyTorch's path rounds a gradient that is turned back to x's dtype, before it goes on to a wider weight.
        close(grad.to(x.dtype) if impl == "reference" else grad, expected_grad, factor=3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 7, 12), (5, 1030), (1, 2), (2, 2, 2, 3, 6), (0, 4, 8), (2, 0, 4)], ids=str)
def test_value_and_gradients_are_those_of_fp64(impl, dtype, shape) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device()).requires_grad_()
    weight = torch.randn(shape[-1], device=device()).to(dtype).requires_grad_()
    compare(x, weight, rotation(*shape[-2:]), impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_of_a_projection_are_read_where_they_are(impl, dtype) -> None:
    """Queries [B, heads, T, d] cut out of [B, T, 3, heads, d] with fp32 weights, and gradients of any order."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 4, 16, device=device()).to(dtype)
    q = qkv.permute(2, 0, 3, 1, 4)[0].requires_grad_()
    weight, turn = torch.randn(16, device=device()).requires_grad_(), rotation(5, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm_rotate(q, weight, turn, impl=impl)
    assert [k.data_ptr() for k in kept[:3]] == [t.data_ptr() for t in (q, weight, turn)]
    assert [(k.shape, k.dtype) for k in kept[3:]] == [((2, 4, 5, 1), torch.float32)]
    assert y.transpose(1, 2).is_contiguous()  # in q's order
    for dy in (torch.randn(4, 5, 2, 16, device=device()).permute(2, 0, 1, 3), torch.randn(2, 4, 16, 5).mT.to(device())):
        compare(q, weight, turn, impl, dy.to(dtype))


def test_many_rows_are_summed_in_parts(monkeypatch) -> None:
    monkeypatch.setattr("lowvram.kernels.rms_norm._PROGRAMS", 4)
    x = torch.randn(3, 33, 300, device=device()).requires_grad_()  # tiles of four rows do not end where images do
    weight = torch.randn(300, device=device()).requires_grad_()
    compare(x, weight, rotation(33, 300), "triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_by_differences_and_no_second_ones(impl) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, device=device(), requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, device=device(), requires_grad=True)
    turn = rotation(3, 4).double()
    function = lambda *tensors: rms_norm_rotate(*tensors, turn, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
    with pytest.raises(RuntimeError, match="RMSNormRotate has no second derivative"):
        (g,) = torch.autograd.grad(function(x, weight).sum(), x, create_graph=True)
        g.sum().backward()


def test_a_trace_sees_what_a_card_would_allocate() -> None:
    with FakeTensorMode(), dispatch.pretending(True):
        x = torch.empty(2, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(16, requires_grad=True)
        y = rms_norm_rotate(x.transpose(1, 2), weight, torch.empty(2, 3, 8))
        assert y.dtype == torch.bfloat16 and y.transpose(1, 2).is_contiguous()
        y.sum().backward()
        assert x.grad.shape == x.shape and weight.grad.dtype == torch.float32


def test_rows_beyond_32_bits_are_addressed_in_64() -> None:
    launches = []
    x = torch.empty(1 << 10, 1 << 10, 4096, dtype=torch.float16)  # never touched, so never there
    weight, turn = torch.empty(4096), torch.empty(2, 1 << 10, 2048)
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        rms_norm_rotate(x, weight, turn, impl="triton")
        torch.ops.lowvram.rms_norm_rotate_backward(x, x, weight, turn, torch.empty(1 << 10, 1 << 10, 1))
    (_, (programs,), forward, options), (_, (parts,), backward, steps) = launches
    assert forward[5:11] == backward[7:13] == (1 << 20, 1 << 10, 2048, 1, 1, 4096)
    assert programs * options["ROWS"] >= 1 << 20 and parts * steps["ROWS"] * steps["STEPS"] >= 1 << 20
    assert parts <= 512  # rows of fp32 that are left to be summed


@pytest.mark.slow
def test_compiles_for_every_card_into_wide_accesses() -> None:
    records = compile_all(
        """
from lowvram.kernels.rms_norm_rotate import rms_norm_rotate
q = torch.randn(2, 16, 3, 6, 64, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)[0].requires_grad_()
rms_norm_rotate(q, torch.ones(64, requires_grad=True), torch.zeros(2, 16, 32), impl="triton").sum().backward()
"""
    )
    assert {r["kernel"] for r in records} == {"_forward_kernel", "_backward_kernel"}
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    for record in records:
        for kind in ("loads", "stores"):
            assert "128" in record[kind] and set(record[kind]) <= {"128", "32"}, record
            assert record[kind].get("32", 0) <= 2, record  # of the numbers for each row, and sums


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x \(3, 5\) must be .* even d"),
        ({"weight": torch.zeros(2)}, r"weight \(2,\) must be \(4,\)"),
        ({"rotation": torch.zeros(2, 3, 4)}, r"rotation \(2, 3, 4\) must be \(2, 3, 2\)"),
        ({"impl": "fast"}, "impl='fast'"),
    ],
)
def test_bad_input_is_named(change, message) -> None:
    given = {"x": torch.zeros(3, 4), "weight": torch.zeros(4), "rotation": torch.zeros(2, 3, 2)} | change
    with pytest.raises(ValueError, match=message):
        rms_norm_rotate(**given)
