"""Several processes, pretended by one: what FSDP2 allocates in each of them, on fake tensors.

A trace of `memory.fsdp` runs torch's own FSDP2, all buffers of its collectives included, in a process group whose
collectives do nothing. What the processor's device does not show of a card is put in: offloaded shards are host memory,
and they and their gradients are copied.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowvram.errors import LowVRAMError
from lowvram.memory import fsdp, host
from lowvram.memory.update import Updater

_INTERNALS = "torch.distributed.fsdp._fully_shard"


@contextmanager
def process_group(processes: int) -> Iterator[None]:
    """A group of so many processes, of which this is the first and only one.

    Raises:
        LowVRAMError: there is a real one, or this build of torch can't pretend.
    """
    if not dist.is_available():
        raise LowVRAMError("this build of torch has no torch.distributed, which fsdp needs.", "Use memory.fsdp=none.")
    if dist.is_initialized():
        raise LowVRAMError(
            "memory.fsdp can't be planned for in a process that belongs to a group of processes.",
            "Plan before the training, in a process of its own: python -m lowvram.plan.",
        )
    from torch.distributed._tools import fake_collectives  # noqa: F401  collectives of tensors without values
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def sharding(*, offload: bool, resized: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, networks are sharded and run as on cards.

    resized: called after FSDP2 changed a storage's size, which is how it frees gathered weights and gets them back.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    def telling(change: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def told(tensor: Tensor) -> None:
            change(tensor)
            resized(tensor)

        return told

    def make_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # it reads the ranks from a tensor
            return mesh(*args, **kwargs)

    mesh = fsdp.init_device_mesh
    allocate, free = telling(_fsdp_param.alloc_storage), telling(_fsdp_param.free_storage)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(fsdp, "init_device_mesh", make_mesh))
        stack.enter_context(mock.patch.object(_fsdp_param, "alloc_storage", allocate))
        stack.enter_context(mock.patch.object(_fsdp_param, "free_storage", free))
        stack.enter_context(mock.patch.object(_fsdp_param_group, "alloc_storage", allocate))
        if offload:
            stack.enter_context(mock.patch.object(fsdp, "shard", _on_the_host(fsdp.shard)))
            inputs = _fsdp_param.FSDPParam.all_gather_inputs
            stack.enter_context(mock.patch.object(_fsdp_param.FSDPParam, "all_gather_inputs", _brought(inputs)))
        yield


@contextmanager
def summing() -> Iterator[None]:
    """Within, updaters know without reading a number which gradients other processes have: the same as this one."""

    def those(updater: Updater, here: list[bool]) -> list[nn.Parameter]:
        return [param for param, has in zip(updater.params, here, strict=True) if has]

    with mock.patch.object(Updater, "_with_gradient_anywhere", those):
        yield


def summed(value: Tensor) -> Tensor:
    """The sum over processes, which accelerate makes in a copy. The copy ends here, in the place of `value`."""
    value.clone()
    return value


@contextmanager
def gradients_to_the_host(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, the gradients of offloaded shards go to the host once they are reduced."""
    handles = []
    for param in params:
        asked = param.requires_grad
        param.requires_grad_(True)  # torch refuses a hook on what is frozen at the moment
        handles.append(param.register_post_accumulate_grad_hook(_to_the_host))  # type: ignore[arg-type]
        param.requires_grad_(asked)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_the_host(param: nn.Parameter) -> None:
    grad = param.grad
    if grad is not None and fsdp.local(grad) is not grad and not host.is_host(fsdp.local(grad)):
        grad._local_tensor = host.copy_of(fsdp.local(grad))  # type: ignore[attr-defined]


def _on_the_host(shard: Callable[..., None]) -> Callable[..., None]:
    def on_the_host(*args: Any, **kwargs: Any) -> None:
        with host.on_host():
            shard(*args, **kwargs)

    return on_the_host


def _brought(inputs: Any) -> property:
    """`FSDPParam.all_gather_inputs` on the device."""

    def brought(param: Any) -> list[Tensor]:
        device = torch.device("cpu")
        return [host.device_copy(t, device) if host.is_host(t) else t for t in inputs.fget(param)]

    return property(brought)
