"""Backward functions that have no derivative of their own, and say so."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order_only(backward: Backward) -> Backward:
    """Mark the backward of an autograd Function as the last: its results raise if they are differentiated.

    torch's once_differentiable notices that only where the incoming gradient requires one. A penalty on the gradient of
    a sum, as R1 is, has a constant there: it would go through unnoticed, and count for nothing.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        asked_for_graph = torch.is_grad_enabled()
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not asked_for_graph:
            return results
        name = type(ctx).__name__.removesuffix("Backward").removeprefix("_")
        message = f"{name} has no second derivative (its backward is run once); use plain PyTorch operations there."
        return tuple(None if r is None else _refusing(r, message) for r in results)

    return run


def _refusing(result: Tensor, message: str) -> Tensor:
    refuse = torch._C._functions.DelayedError(message, 1)  # type: ignore[attr-defined]
    refused: Tensor = refuse(result.detach().requires_grad_())
    return refused
