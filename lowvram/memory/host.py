"""Memory on the host: page-locked beside a CUDA device, and told apart from the device where the device is the CPU.

On a CPU, training and host memory are the same kind. So that a trace on the CPU still shows what a technique would save
on a card, storages that stand for host memory are marked here, and `tracer.LiveBytes` leaves them out.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class StorageTable(Generic[T]):
    """A value for each storage that is alive. Keeps none alive, and a storage's value goes when it does.

    Views share their base's value. `dropped` is called with the value of each storage that dies, maybe in a thread of
    autograd. Tensors without a storage of their own (sparse ones, wrappers such as DTensor) have no value.
    """

    def __init__(self, dropped: Callable[[T], None] | None = None) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], T]] = {}  # by the storage's address
        self._dropped = dropped

    def get(self, tensor: Tensor) -> T | None:
        """The value of the tensor's storage, or None."""
        if not has_storage(tensor):
            return None
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def set(self, tensor: Tensor, value: T) -> None:
        """Give the tensor's storage a value, in place of any that it had (`dropped` is not called for that one)."""
        if not has_storage(tensor):
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        entry = self._entries.get(address)
        # The Python object of a storage lives as long as the storage; so a reference to it notices the end of both,
        # and does so before another storage can have the same address.
        reference = weakref.ref(storage, partial(self._forget, address)) if entry is None else entry[0]
        self._entries[address] = (reference, value)

    def _forget(self, address: int, reference: "weakref.ref[Any]") -> None:
        _, value = self._entries.pop(address)
        if self._dropped is not None:
            self._dropped(value)

    def __len__(self) -> int:
        return len(self._entries)


def has_storage(tensor: Tensor) -> bool:
    """Whether the tensor is a plain strided one, whose memory is one storage of its own."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


_on_host: StorageTable[bool] = StorageTable()
_thread = threading.local()


def is_host(tensor: Tensor) -> bool:
    """Whether the tensor's memory was allocated within `on_host`. True for its views; works on fake tensors."""
    return _on_host.get(tensor) is not None


def allocating_on_host() -> bool:
    """Whether this thread is within `on_host`."""
    return getattr(_thread, "depth", 0) > 0


@contextmanager
def on_host() -> Iterator[None]:
    """Memory that this thread allocates within, through operations on CPU tensors, is host memory.

    A tensor that shares memory with one from before stays what it was.
    """
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        with _MarkNew():
            yield
    finally:
        _thread.depth -= 1


class _MarkNew(TorchDispatchMode):
    """Marks the storages of results that are not those of an operand."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device.type == "cpu" and has_storage(t)]
        if results:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_strided(t)}
            if torch.ops.aten.lift_fresh.default is func:  # of torch.tensor([...]), whose storage no operation made
                given = set()
            for tensor in results:
                if tensor.untyped_storage()._cdata not in given:
                    _on_host.set(tensor, True)
        return out


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and has_storage(value)


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised host memory: same shape and dtype on the CPU, same strides where they leave no gaps.

    Page-locked when `tensor` is on CUDA, so that copies run beside the computation. (torch's allocator of page-locked
    memory hands out powers of two, and keeps freed blocks for the next request.)
    """
    with on_host(), torch.no_grad():
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy in host memory, detached. Waits for the device."""
    copy = empty_like(tensor)
    with torch.no_grad():
        return copy.copy_(tensor)


def device_copy(tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
    """A copy on the training device, detached; also where that is the CPU, and `Tensor.to` would not copy."""
    with torch.no_grad():
        return torch.empty_like(tensor, device=device, requires_grad=False).copy_(tensor, non_blocking=non_blocking)
