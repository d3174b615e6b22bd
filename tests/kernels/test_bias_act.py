"""bias_act against its reference: value, first and second derivatives, odd shapes, 16-bit types, and what it keeps."""

import itertools

import pytest
import torch

from lowvram.kernels.bias_act import bias_act

CASES = list(itertools.product(("linear", "lrelu"), (None, 0.7), (False, True)))


def double(*shape, low=None):
    x = torch.randn(shape, dtype=torch.float64) if low is None else torch.rand(shape, dtype=torch.float64) + low
    return x.requires_grad_()


@pytest.mark.parametrize("shape", [(2, 3), (1, 1, 1), (2, 3, 5, 7), (3, 5, 1, 2)])
@pytest.mark.parametrize("act, clamp, bias", CASES)
def test_equals_the_reference_and_has_both_derivatives(act, clamp, bias, shape):
    torch.manual_seed(0)

    def f(x, b, impl="auto"):
        return bias_act(x, b, act=act, gain=1.3, clamp=clamp, impl=impl)

    inputs = double(*shape), double(shape[1]) if bias else None
    torch.testing.assert_close(f(*inputs), f(*inputs, impl="reference"))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("act, clamp, bias", CASES)
@pytest.mark.parametrize("noise_shape", [None, (2, 1, 4, 3), (4, 3)])
def test_scale_and_noise_have_both_derivatives(act, clamp, bias, noise_shape):
    torch.manual_seed(0)

    def f(x, scale, noise, b, impl="auto"):
        return bias_act(x, b, act=act, clamp=clamp, scale=scale, noise=noise, impl=impl)

    inputs = (
        double(2, 3, 4, 3),
        double(2, 3, low=0.5),
        noise_shape and double(*noise_shape),
        double(3) if bias else None,
    )
    torch.testing.assert_close(f(*inputs), f(*inputs, impl="reference"))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("act, clamp, bias", CASES)
def test_inplace_changes_nothing_but_the_memory(act, clamp, bias):
    torch.manual_seed(0)
    x, b, scale = double(2, 3, 4, 3), double(3) if bias else None, double(2, 3, low=0.5)

    def f(x, b, scale):
        return bias_act(x * 1, b, act=act, clamp=clamp, scale=scale, inplace=True)

    torch.testing.assert_close(f(x, b, scale), bias_act(x, b, act=act, clamp=clamp, scale=scale, impl="reference"))
    assert torch.autograd.gradcheck(f, (x, b, scale))
    assert torch.autograd.gradgradcheck(f, (x, b, scale))
    argument = x.detach().clone()
    assert bias_act(argument, b, act="lrelu", inplace=True).data_ptr() == argument.data_ptr()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
def test_narrow_types_keep_the_bias_gradient_wide(dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 33, 31).to(dtype).requires_grad_()
    b = torch.randn(3, requires_grad=True)
    dy = (torch.randn(4, 3, 33, 31) + 1).to(dtype)
    y = bias_act(x, b, act="lrelu", gain=2**0.5, clamp=2.0)
    assert y.dtype == dtype
    dx, db = torch.autograd.grad(y, (x, b), dy)
    wide = x.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    expected = bias_act(*wide, act="lrelu", gain=2**0.5, clamp=2.0, impl="reference")
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    expected_dx, expected_db = torch.autograd.grad(expected, wide, dy.double())
    assert db.dtype == torch.float32
    assert (dx.double() - expected_dx).abs().mean() < 3 * tolerance  # a value may round to the clamp's other side
    torch.testing.assert_close(db.double(), expected_db, rtol=5 * tolerance, atol=1e-2)


def test_keeps_one_tensor_where_plain_pytorch_keeps_several():
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    b = torch.randn(8, requires_grad=True)

    def saved_bytes(impl):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = bias_act(x * 1, b, act="lrelu", gain=1.5, clamp=2.0, impl=impl)
        return sum(kept.values()) / y.untyped_storage().nbytes()

    assert saved_bytes("auto") < 1.01
    assert saved_bytes("reference") >= 2


@pytest.mark.parametrize(
    "kwargs", [{"act": "relu"}, {"gain": 0.0}, {"clamp": -1.0}, {"impl": "cuda"}, {"b": torch.zeros(4)}]
)
def test_bad_arguments_are_refused(kwargs):
    with pytest.raises(ValueError):
        bias_act(torch.zeros(2, 3, 4, 4), **kwargs)
