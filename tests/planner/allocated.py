"""What torch's CPU allocator really gave, event by event, and which of it was a kernel's own workspace."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode

_CALL = "an operation"


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The most bytes alive at a time, not rounded. all_bytes: of the allocator. outliving_bytes: of what outlives the
    operation that asked for it; the rest are workspaces within kernels."""

    all_bytes: int
    outliving_bytes: int


class _Calls(TorchDispatchMode):
    """Marks each operation in the profile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with profiler.record_function(_CALL):
            return func(*args, **(kwargs or {}))


def peaks_of(run: Callable[[], object]) -> Peaks:
    """Of what `run` allocates, as torch's profiler saw the allocator."""
    gc.collect()
    gc.disable()
    try:
        with profiler.profile(use_kineto=True, use_device=None, profile_memory=True) as profile, _Calls():
            kept = run()  # what it returns is not freed before the end
        del kept
    finally:
        gc.enable()
    events = sorted(_events(profile.kineto_results.experimental_event_tree()), key=lambda event: event[0])
    given: dict[int, tuple[int, int]] = {}  # by address: place in `changes`, operation
    changes: list[int] = []
    workspace: set[int] = set()
    for _, address, size, call in events:
        if size > 0:
            given[address] = (len(changes), call)
        elif address in given:
            place, its_call = given.pop(address)
            if call and call == its_call:
                workspace |= {place, len(changes)}
        changes.append(size)
    return Peaks(
        all_bytes=_highest(changes),
        outliving_bytes=_highest([0 if place in workspace else size for place, size in enumerate(changes)]),
    )


def _highest(changes: list[int]) -> int:
    live = highest = 0
    for change in changes:
        live += change
        highest = max(highest, live)
    return highest


def _events(nodes: list[Any], call: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Nanoseconds, address, bytes (negative: freed), and the operation in which it happened, or 0."""
    for node in nodes:
        if node.tag == torch._C._profiler._EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, call
        inside = node.correlation_id or id(node)
        yield from _events(node.children, call or (inside if node.name == _CALL else 0))
