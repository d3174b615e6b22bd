"""The weight gradient by products against PyTorch's, and where it is taken."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lowvram.kernels import dispatch, weight_gradient
from lowvram.kernels.conv2d import conv2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _native(dy, x, kernel, stride, padding):
    w = torch.zeros(dy.shape[1], x.shape[1], kernel, kernel, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x, w, stride=stride, padding=padding), w, dy)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, stride, padding", list(itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2, 3))))
def test_equals_pytorch_at_every_geometry(kernel, stride, padding, layout):
    torch.manual_seed(0)
    for height, width in itertools.product((1, 4, 5, 8, 9), (5, 6)):
        if min(height, width) + 2 * padding < kernel:
            continue
        x = torch.randn(2, 3, height, width, dtype=torch.float64).contiguous(memory_format=layout)
        dy = torch.randn_like(F.conv2d(x, x.new_zeros(4, 3, kernel, kernel), stride=stride, padding=padding))
        found = weight_gradient.weight_gradient(dy, x, kernel, stride, padding)
        torch.testing.assert_close(found, _native(dy, x, kernel, stride, padding))
        assert found.is_contiguous()


def test_of_no_images_it_is_zero():
    found = weight_gradient.weight_gradient(torch.zeros(0, 4, 6, 6), torch.zeros(0, 3, 6, 6), 3, 1, 1)
    assert torch.equal(found, torch.zeros(4, 3, 3, 3))


@pytest.fixture
def without_avx512(monkeypatch):
    monkeypatch.setattr(weight_gradient, "_native_is_slow", lambda: True)


@pytest.mark.usefixtures("without_avx512")
@pytest.mark.parametrize("stride, padding, transposed", [(1, 1, False), (2, 0, False), (2, 0, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_and_their_second_derivatives_use_it(monkeypatch, stride, padding, transposed, layout):
    torch.manual_seed(0)
    monkeypatch.setattr(weight_gradient, "_MULTIPLICATIONS", 0)
    calls = []
    products = weight_gradient.weight_gradient
    monkeypatch.setattr(weight_gradient, "weight_gradient", lambda *args: calls.append(args) or products(*args))
    x = torch.randn(3, 32, 9, 8).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(32, 40, 3, 3) if transposed else torch.randn(40, 32, 3, 3)
    w.requires_grad_()

    def gradients(convolution):
        y = convolution(x, w, stride=stride, padding=padding)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    found = gradients(lambda *args, **options: conv2d(*args, transposed=transposed, **options))
    assert calls
    expected = gradients(F.conv_transpose2d if transposed else F.conv2d)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.usefixtures("without_avx512")
def test_taken_where_it_is_faster_and_never_in_what_stands_for_a_card():
    large, small = torch.empty(4, 128, 64, 64), torch.empty(4, 128, 4, 4)
    assert weight_gradient.suits(large, large, 1)
    assert not weight_gradient.suits(small, small, 1)
    assert not weight_gradient.suits(large, torch.empty(4, 3, 64, 64), 1)
    assert not weight_gradient.suits(large, large, 2)
    assert not weight_gradient.suits(large.half(), large.half(), 1)
    assert not weight_gradient.suits(large.to("meta"), large.to("meta"), 1)
    with dispatch.pretending(triton=False):
        assert not weight_gradient.suits(large, large, 1)


def test_elsewhere_pytorchs_own_is_taken(monkeypatch):
    monkeypatch.setattr(weight_gradient, "_native_is_slow", lambda: False)
    large = torch.empty(4, 128, 64, 64)
    assert not weight_gradient.suits(large, large, 1)
