"""Blocks that keep only their inputs for the backward and run again within it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lowvram.errors import LowVRAMError

Forward = Callable[..., Any]


@contextmanager
def recomputing(blocks: Sequence[nn.Module], every: int = 1) -> Iterator[None]:
    """Within it, the first of each `every` blocks is recomputed in the backward, which may come later.

    Exact, also for blocks that draw random numbers and under second derivatives (where it saves nothing). Without grad
    mode a block runs plainly. Networks keep their state-dict keys and hooks.

    Raises:
        LowVRAMError: every is below 1, or a block is recomputed or streamed already.
    """
    if every < 1:
        raise LowVRAMError(f"recompute_every={every} is too small.", "Use 1 or more.")

    def wrap(_block: nn.Module, forward: Forward) -> Forward:
        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return recompute(forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

        return recomputed

    with wrapped_forwards(blocks[::every], wrap):
        yield


def recompute(function: Forward, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), keeping for the backward only tensors among the arguments, at any depth."""
    # Flat, because torch looks for devices whose random state must return, and for tensors to save (and so to offload),
    # only among the positional arguments themselves.
    leaves, spec = tree_flatten((args, kwargs))

    def run(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, spec)
        return function(*args, **kwargs)

    return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=True)


@contextmanager
def wrapped_forwards(blocks: Iterable[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Within it, each block's forward is wrap(block, forward): an instance attribute, so that nothing else changes.

    Raises:
        LowVRAMError: a block is wrapped already.
    """
    wrapped: list[tuple[nn.Module, Any]] = []
    try:
        for block in blocks:
            before = vars(block).get("forward")  # of an instance: other tools (accelerate) set it too
            if getattr(before, "_of_lowvram", False):
                raise LowVRAMError(
                    f"A {type(block).__name__} block is recomputed or streamed already.",
                    "Use activations=recompute or weights=stream once; a streamed block is recomputed anyway.",
                )
            forward = wrap(block, block.forward)
            forward._of_lowvram = True  # type: ignore[attr-defined]
            vars(block)["forward"] = forward
            wrapped.append((block, before))
        yield
    finally:
        for block, before in wrapped:
            if before is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = before
