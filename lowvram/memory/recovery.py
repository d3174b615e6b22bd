"""Running out of memory: noticing it, letting go of what the failed try held, and redoing a step from its start."""

import gc
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.memory import guard

Result = TypeVar("Result")
Key = tuple[nn.Module, str]  # a buffer's module, and its name there

# Errors that are not torch.OutOfMemoryError, in lower case. Triton's "out of resource" is not among them: it speaks of
# a kernel's shared memory, which no thriftier policy changes.
_PHRASES = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "cusparse_status_insufficient_resources",
    "cufft_alloc_failed",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
)
_UNITS_BYTES = {"b": 1, "bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """What is left of an out-of-memory error once its tensors are gone: its text, and the bytes it asked for."""

    message: str
    wanted_bytes: int | None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on the device, in cuBLAS or cuDNN, or on the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


def wanted_bytes(error: BaseException) -> int | None:
    """Bytes of the allocation that failed, as the error gives them; None where it does not (cuBLAS, cuDNN)."""
    match = re.search(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|b|[kmgt]ib)\b", str(error).lower())
    return int(float(match[1]) * _UNITS_BYTES[match[2]]) if match else None


def free_memory(device: torch.device) -> None:
    """Give back everything that nothing refers to: Python's cycles, and torch's caches on the device and the host."""
    gc.collect()
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()  # made again when needed
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned buffers
    elif device.type == "mps":
        torch.mps.empty_cache()


def retry(run: Callable[[], Result], recover: Callable[[OutOfMemory], bool]) -> Result:
    """What `run` returns; when memory runs out in it, `recover` is asked whether to call it again.

    `recover` is called when the failed call's tensors are gone: the error is out of hand and the locals of its frames
    are cleared. It makes the next try thriftier and returns True, or raises an error that says more; where it returns
    False, torch.OutOfMemoryError is raised anew. Other errors pass through.
    """
    while True:
        try:
            return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = OutOfMemory(message=str(error), wanted_bytes=wanted_bytes(error))
            _let_go(error)
        # Out of the except block, where `error` and what it refers to would still be alive.
        if not recover(failure):
            raise torch.OutOfMemoryError(failure.message)


def halving(
    run: Callable[[int | None], Result], whole: int, device: torch.device, say: Callable[[str], None], what: str
) -> Result:
    """What `run` returns, called with the number of samples to hold at a time; None, the first, is its own choice.

    Out of memory, it is called again with half as many, beginning at half of `whole`. `say` tells the user, who knows
    the work as `what`.

    Raises:
        LowVRAMError: memory does not suffice for one at a time.
    """
    size: int | None = None

    def recover(failure: OutOfMemory) -> bool:
        nonlocal size
        reserved_bytes = held_bytes(device)
        free_memory(device)
        if size == 1:
            raise given_up(what, failure, device, reserved_bytes)
        size = max(1, (whole if size is None else size) // 2)
        say(f"out of memory in {what} ({wanted_in_words(failure)}): {size} at a time from here on")
        return True

    return retry(lambda: run(size), recover)


def held_bytes(device: torch.device) -> int:
    """Bytes that torch's allocator has reserved now; on a CPU the process's resident peak.

    Just after an allocation failed that is what did not suffice: the allocator gives its caches back before it fails,
    and keeps what the failed work frees. A peak would be that of earlier and larger tries.
    """
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else guard.resident_peak_bytes()


def given_up(where: str, failure: OutOfMemory, device: torch.device, reserved_bytes: int) -> LowVRAMError:
    """The error when nothing is left to try. reserved_bytes: by torch's allocator when memory ran out."""
    least_bytes = guard.smallest_budget_bytes(
        reserved_bytes=reserved_bytes, wanted_bytes=failure.wanted_bytes, device=device
    )
    return LowVRAMError(
        f"out of memory in {where} ({wanted_in_words(failure)}), and no thriftier policy is left.",
        f"About {'vram=' if device.type == 'cuda' else ''}{guard.in_gb(least_bytes, up=True)} would do; "
        "or use a smaller model or resolution.",
    )


def wanted_in_words(failure: OutOfMemory) -> str:
    """The allocation that failed, for the user."""
    return "unknown size" if failure.wanted_bytes is None else f"{failure.wanted_bytes / 2**20:.0f} MiB wanted"


class Snapshot:
    """What a step changes before its update: the networks' buffers and the states of the random number generators.

    Taken at the start of a step and put back to redo it. The copies of the buffers live beside them and are made once;
    a buffer that the step has replaced by another tensor is put back as the tensor it was.

    Args:
        networks: their buffers are kept, persistent or not.
        device: its generator is kept, as is the CPU's.
        generators: further generators in use.
        unchanged: buffers that no step changes (packed weights); no copy is made of them.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        device: torch.device,
        generators: Iterable[torch.Generator] = (),
        unchanged: Iterable[Tensor] = (),
    ) -> None:
        self._networks = tuple(networks)
        self._device = device
        self._generators = tuple(generators)
        self._unchanged = {id(buffer): buffer for buffer in unchanged}
        self._buffers: dict[Key, Tensor | None] = {}
        self._copies: dict[Key, Tensor] = {}
        self._states: list[Tensor] | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Keep the present state; the one kept before is lost."""
        modules = dict.fromkeys(module for network in self._networks for module in network.modules())
        self._buffers = {
            (module, name): buffer
            for module in modules
            for name, buffer in module._buffers.items()
            if id(buffer) not in self._unchanged
        }
        present = {key: buffer for key, buffer in self._buffers.items() if buffer is not None}
        copies = {}
        for key, buffer in present.items():
            copy = self._copies.get(key)
            copies[key] = copy if copy is not None and _alike(copy, buffer) else torch.empty_like(buffer)
        self._copies = copies
        _copy(copies, present)
        self._states = [torch.get_rng_state(), *(generator.get_state() for generator in self._generators)]
        if self._device.type == "cuda":
            self._states.append(torch.cuda.get_rng_state(self._device))
        elif self._device.type == "mps":
            self._states.append(torch.mps.get_rng_state())

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was taken last. It may be put back again."""
        if self._states is None:
            raise RuntimeError("nothing was taken yet")
        for (module, name), buffer in self._buffers.items():
            module._buffers[name] = buffer
        _copy({key: buffer for key, buffer in self._buffers.items() if buffer is not None}, self._copies)
        states = iter(self._states)
        torch.set_rng_state(next(states))
        for generator in self._generators:
            generator.set_state(next(states))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(next(states), self._device)
        elif self._device.type == "mps":
            torch.mps.set_rng_state(next(states))


def _let_go(error: BaseException) -> None:
    """Clear the locals of every frame that failed, also of errors that this one followed; they hold the activations."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        current.__traceback__ = None
        pending += [current.__cause__, current.__context__]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _copy(to: dict[Key, Tensor], source: dict[Key, Tensor]) -> None:
    if to:  # torch refuses empty lists
        torch._foreach_copy_(list(to.values()), [source[key] for key in to])
