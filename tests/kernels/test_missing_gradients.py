"""No gradient stays no gradient: zeros in its place would make an optimizer step what the loss does not reach."""

import pytest
import torch
from torch import Tensor

from lowvram.kernels.bias_act import bias_act
from lowvram.kernels.conv2d import conv2d
from lowvram.kernels.upfirdn2d import downsample2d, make_filter
from lowvram.models.stylegan2_layers import running_weight


class _Fork(torch.autograd.Function):
    """Two inputs as they are; the second gets no gradient, though its node runs."""

    @staticmethod
    def forward(ctx: object, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.view_as(x), y.view_as(y)

    @staticmethod
    def backward(ctx: object, dx: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return dx, dy


@pytest.mark.parametrize("kernel", ["bias_act", "bias_act by Triton", "conv2d", "downsample2d", "running_weight"])
def test_a_missing_gradient_stays_missing(kernel: str) -> None:
    leaf = torch.randn(2, 2, 4, 4, requires_grad=True)
    used = torch.randn(2, 2, 4, 4, requires_grad=True)
    unreached = {
        "bias_act": lambda: bias_act(leaf * 1, torch.zeros(2), act="lrelu"),
        "bias_act by Triton": lambda: bias_act(leaf * 1, torch.zeros(2), act="lrelu", impl="triton"),
        "conv2d": lambda: conv2d(leaf, torch.randn(2, 2, 3, 3), padding=1),
        "downsample2d": lambda: downsample2d(leaf, make_filter()),
        "running_weight": lambda: running_weight(leaf, used, 2.0),
    }[kernel]()
    reached, _ = _Fork.apply(used, unreached)
    reached.sum().backward()
    assert used.grad is not None
    assert leaf.grad is None
