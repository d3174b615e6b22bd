"""conv2d with its own derivatives against PyTorch's; what it keeps and what it leaves out."""

import itertools

import pytest
import torch
from torch.profiler import profile

from lowvram.kernels.conv2d import conv2d

GEOMETRIES = list(itertools.product((1, 2), (0, 1), (False, True)))  # stride, padding, transposed


@pytest.mark.parametrize("stride, padding, transposed", GEOMETRIES)
@pytest.mark.parametrize("styled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_reference_and_has_both_derivatives(stride, padding, transposed, styled, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(*((3, 2) if transposed else (2, 3)), 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, w, torch.randn(2, 3, dtype=torch.float64, requires_grad=True)) if styled else (x, w)

    def f(x, w, style=None, impl="auto"):
        return conv2d(x, w, style=style, stride=stride, padding=padding, transposed=transposed, impl=impl)

    torch.testing.assert_close(f(*inputs), f(*inputs, impl="reference"))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("kernel", [1, 3])
def test_third_derivative_equals_pytorch(kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)

    def third(impl):
        y = conv2d(x, w, padding=kernel // 2, impl=impl).pow(3).sum()
        for _ in range(3):
            dx, dw = torch.autograd.grad(y, (x, w), create_graph=True)
            y = dx.pow(2).sum() + dw.pow(2).sum()
        return y

    torch.testing.assert_close(third("auto"), third("reference"))


def test_the_image_gradient_computes_no_weight_gradient():
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = conv2d(torch.tanh(x), w, padding=1).sum()
    with profile() as profiled:
        torch.autograd.grad(y, x, create_graph=True)
    names = {event.key for event in profiled.key_averages()}
    assert any("_ConvolveBackward" in name for name in names)
    assert not any("_WeightProxyBackward" in name or "convolution_backward" in name for name in names)


def test_style_times_x_is_not_kept():
    x = torch.randn(2, 8, 16, 16, requires_grad=True) * 1
    w, style = torch.randn(8, 8, 3, 3, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        conv2d(x, w, style=style, padding=1)
    assert sum(kept.values()) == x.nbytes + w.nbytes + style.nbytes


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="don't fit"):
        conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 2, 3, 3))
    with pytest.raises(ValueError, match="impl='fast'"):
        conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3), impl="fast")
