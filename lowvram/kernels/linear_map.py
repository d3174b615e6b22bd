"""y = A x for a fixed linear map A, of which autograd keeps only the constants that define A.

PyTorch's own convolutions and samplers save their input for the gradient with respect to their weights, even where
nobody asks for it. A map whose weights are constants needs nothing of its input: its derivative is its adjoint, whose
derivative is the map again, and so on to any order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

Map = Callable[..., Tensor]


def linear_map(x: Tensor, forward: Map, adjoint: Map, *constants: Tensor) -> Tensor:
    """`forward(x, *constants)`, differentiable with respect to x any number of times.

    x: any floating-point tensor. forward: linear in its first argument; run without autograd and without autocast.
    adjoint: its transpose: takes a tensor of the output's shape and the same constants, returns one of x's shape.
    constants: tensors that get no gradient, all that is saved for the backward.
    """
    return cast(Tensor, _LinearMap.apply(x, forward, adjoint, *constants))


class _LinearMap(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, adjoint: Map, *constants: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zeros, here and below
        ctx.maps = forward, adjoint
        ctx.save_for_backward(*constants)
        with no_autocast(x.device.type):
            return forward(x, *constants)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        forward, adjoint = ctx.maps
        (dy,) = grads
        wanted = dy is not None and ctx.needs_input_grad[0]
        grad_x = linear_map(dy, adjoint, forward, *ctx.saved_tensors) if wanted else None
        return grad_x, None, None, *[None] * len(ctx.saved_tensors)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within, operations keep their inputs' dtypes."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # "meta" has no autocast
