"""What is planned for: phases, averages and a sampler, made anew on fake tensors."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram import standin
from lowvram.ema import ExponentialMovingAverage
from lowvram.memory import host
from lowvram.phase import Phase
from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu


@dataclass(kw_only=True)
class Subject:
    """A training whose tensors are fake, or become so within `Source.made`.

    networks: everything that is on the device throughout, by name, averaged networks too.
    micro_batch: n samples as a phase's loss wants them. resident: other tensors that are there throughout.
    batch: makes what a step has on the device for its whole batch, before it is cut.
    sample: makes images, n at a time; sampling_slice: how many that is for a micro-batch of the first phase; None: the
        task has no sampler.
    own_precision, zero_nonfinite, blocks: see `memory.apply.Applied`. restore: puts back what making it took away.
    """

    phases: Sequence[Phase]
    networks: Mapping[str, nn.Module]
    micro_batch: Callable[[Phase, int], Any]
    averages: Sequence[ExponentialMovingAverage] = ()
    resident: Sequence[Tensor] = ()
    batch_bytes: int = 0
    sample: Callable[[int], object] | None = None
    sampling_slice: Callable[[int], int] | None = None
    own_precision: bool = False
    zero_nonfinite: bool = False
    blocks: Mapping[nn.Module, Mapping[str, nn.Module]] | None = None
    restore: Callable[[], None] = lambda: None


@contextmanager
def fake_card(mode: FakeTensorMode | None = None, *, triton: bool = False) -> Iterator[FakeTensorMode]:
    """Within, tensors on the CPU are fake and stand for a card's.

    mode: of fakes from before, to go on with them. triton: whether the card runs Triton's kernels.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Of networks that copy themselves as they are made; nothing is read from what is copied here.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(standin.cuda(triton))
        stack.enter_context(cuda_autocast_on_cpu())
        stack.enter_context(mock.patch.object(nn.Module, "to", _to))
        for name, dtype in (("float", torch.float32), ("half", torch.float16), ("bfloat16", torch.bfloat16)):
            stack.enter_context(mock.patch.object(nn.Module, name, lambda module, dtype=dtype: _to(module, dtype)))
        yield stack.enter_context(mode or FakeTensorMode(allow_non_fake_inputs=True))


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, which torch refuses for fake parameters: their data change type in place; all devices are one."""
    _, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    for tensor in (*module.parameters(), *module.buffers()):
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
        if memory_format is not None and tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    return module


def to_fake_host(network: nn.Module) -> None:
    """What moving a network from a card to the host does, where both are the CPU."""
    for tensor in (*network.parameters(), *network.buffers()):
        if not host.is_host(tensor):
            tensor.data = host.copy_of(tensor)
