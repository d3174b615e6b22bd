"""CPU tensors that stand for a card's: what a trace runs on where there is no card (lowvram.planner).

The few places that choose by device (memory formats, precision) ask here.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lowvram.kernels import dispatch

_depth = 0  # for every thread: autograd has its own


@contextmanager
def cuda(triton: bool = False) -> Iterator[None]:
    """Within, tensors on the CPU stand for a CUDA card's, and hold no numbers that would matter.

    triton: whether that card runs Triton's kernels.
    """
    global _depth
    _depth += 1
    try:
        with dispatch.pretending(triton):
            yield
    finally:
        _depth -= 1


def active() -> bool:
    """Whether CPU tensors stand for a card's."""
    return _depth > 0


def real() -> AbstractContextManager[object]:
    """Within, new tensors hold numbers even in a trace: for the few that decide what runs, and are of no size."""
    return _disable_current_modes() if active() else nullcontext()


def is_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU, or stands for one."""
    return device.type != "cpu" or active()
