"""Counted memory: what is alive at each moment of a computation, operation by operation, on real or fake tensors.

Under `torch._subclasses.FakeTensorMode` with tensors on the CPU it tells a step's peak on any device before it is run:
a fake tensor has a size but no memory. It counts what operations return; a kernel's own workspace is not seen.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lowvram.memory import host

GRAIN_BYTES = 512  # the CUDA allocator rounds each request up to a multiple of it


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages, each rounded up to 512, that operations within it returned.

        with LiveBytes() as memory:
            memory.watch(network, optimizer)
            step()
        print(memory.peak_bytes)

    A storage from before counts when it is watched, or from the first operation that returns a view of it or changes
    it. Host memory (lowvram.memory.host) does not count. Storages that outlive the block are followed on.

    Args:
        device: count this type of device alone ("cuda"); None: every device.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes = host.StorageTable[int](self._freed)

    def watch(self, *things: nn.Module | torch.optim.Optimizer | Tensor | Iterable[Any]) -> None:
        """Count what existed before: parameters, buffers and gradients of modules, states of optimizers, tensors."""
        for thing in things:
            if isinstance(thing, Tensor):
                self._see(thing)
                if thing.is_leaf and thing.grad is not None:
                    self._see(thing.grad)
            elif isinstance(thing, nn.Module):
                self.watch(*thing.parameters(), *thing.buffers())
            elif isinstance(thing, torch.optim.Optimizer):
                state = [value for values in thing.state.values() for value in tree_leaves(values)]
                params = [p for group in thing.param_groups for p in group["params"]]
                self.watch(*(value for value in (*params, *state) if isinstance(value, Tensor)))
            else:
                self.watch(*(leaf for leaf in tree_leaves(list(thing)) if isinstance(leaf, Tensor)))

    def reset_peak(self) -> None:
        """The peak is what is alive now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(_is_wrapper(t) for t in types):
            return NotImplemented  # it runs operations on the tensors that it is made of, which come here
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in inner]  # some wrappers list their mesh too
            self.watch(*(part for part in parts if isinstance(part, Tensor)))
            return
        if not host.has_storage(tensor) or self.device not in (None, tensor.device.type):
            return
        before = self._sizes.get(tensor)
        if before is None and (host.allocating_on_host() or host.is_host(tensor)):
            return
        after = -(-tensor.untyped_storage().nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        if after != before:  # new, or resized
            self._sizes.set(tensor, after)
            self.live_bytes += after - (before or 0)
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes


def _is_wrapper(kind: type) -> bool:
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")
