"""Bias, noise, pixel normalisation and gate against fp64, and what is kept for the backward."""

import pytest
import torch
from tolerances import close, device
from torch.autograd import gradcheck

from lowvram.kernels.norm_glu import norm_glu, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (1, 34, 3, 5), (0, 4, 2, 2)], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_value_and_gradients_are_those_of_fp64(dtype, shape, shared) -> None:
    torch.manual_seed(0)
    b, c, h, w = shape
    x = torch.randn(shape, dtype=dtype, device=device()).requires_grad_()
    bias = torch.randn(c, device=device()).to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
    noise = torch.randn(1 if shared else b, 1, h, w, device=device()).to(bias.dtype).requires_grad_()
    y = norm_glu(x, bias, noise)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, bias, noise)]
    expected = plain(*wide)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == dtype
    close(y, expected)
    for narrow, reference in zip((x, bias, noise), wide, strict=True):
        scale = reference.grad.abs().max().clamp(min=1) if reference.grad.numel() else 1
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 8e-2}.get(dtype, 1e-5)
        assert narrow.grad is not None
        assert narrow.grad.dtype == narrow.dtype
        if reference.grad.numel():
            assert (narrow.grad - reference.grad).abs().max() <= tolerance * scale


def test_gradcheck_with_and_without_the_additions() -> None:
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(norm_glu, (x, bias, noise))
    assert gradcheck(norm_glu, (x,))
    assert gradcheck(lambda x, noise: norm_glu(x, None, noise), (x, noise[:1].detach().requires_grad_()))


def test_channels_last_stays_and_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm_glu(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)


def test_it_keeps_its_input_alone() -> None:
    x = torch.randn(2, 8, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    bias, noise = torch.zeros(8, requires_grad=True), torch.randn(2, 1, 16, 16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_glu(x, bias, noise)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), bias.data_ptr(), noise.data_ptr()}
