"""upfirdn2d against zero insertion, padding, convolution and slicing one by one; derivatives; nothing kept."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowvram.kernels.upfirdn2d import downsample2d, make_filter, upfirdn2d, upsample2d

small = st.integers(1, 5)
side = st.integers(-2, 5)


@settings(max_examples=120, deadline=None)
@given(up=st.integers(1, 3), down=st.integers(1, 3), f_size=st.tuples(small, small), padding=st.tuples(*[side] * 4),
       size=st.tuples(st.integers(3, 8), st.integers(3, 8)), seed=st.integers(0, 99))  # fmt: skip
def test_equals_the_reference_in_value_and_gradient(up, down, f_size, padding, size, seed):
    left, right, top, bottom = padding
    assume(size[0] * up + min(top, 0) + min(bottom, 0) > 0 and size[1] * up + min(left, 0) + min(right, 0) > 0)
    assume(size[0] * up + top + bottom >= f_size[0] and size[1] * up + left + right >= f_size[1])
    torch.manual_seed(seed)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    f = torch.randn(f_size, dtype=torch.float64)
    y = upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.5)
    expected = upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.5, impl="reference")
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resample", [upsample2d, downsample2d])
def test_second_derivative(resample, layout):
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    f = make_filter().double()

    def squared(x):  # the second derivative of a linear operation alone is zero
        return resample(x, f).square()

    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x)


def test_resampling_keeps_brightness_and_size():
    x = torch.full((1, 2, 16, 16), 0.5)
    assert upsample2d(x, make_filter()).shape == (1, 2, 32, 32)
    torch.testing.assert_close(upsample2d(x, make_filter())[:, :, 4:-4, 4:-4], torch.full((1, 2, 24, 24), 0.5))
    assert downsample2d(x, make_filter()).shape == (1, 2, 8, 8)
    torch.testing.assert_close(downsample2d(x, make_filter())[:, :, 2:-2, 2:-2], torch.full((1, 2, 4, 4), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_stay_narrow(dtype):
    x = torch.randn(2, 3, 9, 7)
    y = upfirdn2d(x.to(dtype), make_filter(), padding=(2, 2, 2, 2))
    assert y.dtype == dtype
    expected = upfirdn2d(x, make_filter(), padding=(2, 2, 2, 2), impl="reference")
    torch.testing.assert_close(y.float(), expected, atol=3e-2, rtol=3e-2)


def test_no_activation_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        upsample2d(torch.randn(2, 8, 16, 16, requires_grad=True), make_filter())
    assert sum(kept) <= 16  # the filter


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        upfirdn2d(torch.zeros(3, 4, 4), make_filter())
    with pytest.raises(ValueError, match="up=0"):
        upfirdn2d(torch.zeros(1, 3, 4, 4), make_filter(), up=0)
