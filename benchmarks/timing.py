"""Time and memory of operations on a device: competitors in turn, so that the machine's noise hits all alike."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lowvram.memory.tracer import LiveBytes

Run = Callable[[], Any]

_FLUSH_BYTES = (
    256 * 2**20
)  # written between runs: more than the L2 cache of any card, so that none finds its input there
_AHEAD_CYCLES = 2_000_000  # of the device, about a millisecond: what the host has launched by then is timed alone
_WARM_UP_RUNS = 3


class Clock:
    """Seconds of one run from cold caches.

    On CUDA by events, with the host ahead of the device, so that a launch costs nothing unless the device waits for
    it. On a CPU the wall clock; caches are left as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self._on_gpu else 0, dtype=torch.uint8, device=device)

    def seconds(self, run: Run) -> tuple[float, Any]:
        """The seconds of one run, and what it returned."""
        if not self._on_gpu:
            begun = time.perf_counter()
            result = run()
            return time.perf_counter() - begun, result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, result

    def wall_seconds(self, run: Run) -> float:
        """From an idle device to an idle device, the host's part included: of optimizers, which may wait for it."""
        self._synchronize()
        begun = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - begun

    def copy_seconds(self, moved_bytes: int, *, runs: int = 15) -> list[float]:
        """Of copying a tensor, reads and writes together being `moved_bytes`."""
        source = torch.empty(max(1, moved_bytes // 2), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        source.zero_()
        seconds = [self.seconds(lambda: target.copy_(source))[0] for _ in range(runs + _WARM_UP_RUNS)]
        return seconds[_WARM_UP_RUNS:]

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


def in_turn(
    runs: Mapping[str, Callable[[], Sequence[float]]],
    *,
    budget_seconds: float,
    least: int = 5,
    most: int = 100,
    warm_up: int = _WARM_UP_RUNS,
) -> dict[str, list[list[float]]]:
    """Let each run once, again and again: at least `least` times each, then until the budget is spent.

    A run returns the seconds of each of its parts. Returns, by name, a list of seconds for each part.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    rounds: dict[str, list[Sequence[float]]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for index in range(most):
        if index >= least and time.perf_counter() - begun > budget_seconds:
            break
        for name, run in runs.items():
            rounds[name].append(run())
    return {name: [list(part) for part in zip(*found, strict=True)] for name, found in rounds.items()}


def peak_bytes(run: Run, device: torch.device, *, held: Sequence[Any] = ()) -> int:
    """The most that is alive at a time while it runs, less what was alive before.

    held: what lived before, which a CPU's count has to be told (see `LiveBytes.watch`).
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as memory:
        memory.watch(*held)
        memory.reset_peak()
        before = memory.live_bytes
        run()
    return memory.peak_bytes - before


def kept_bytes(forward: Callable[[], Tensor]) -> int | None:
    """Bytes that autograd holds on to for the backward of what `forward` returns; None where hooks can't see it."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with suppress(Exception), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
        del result
        return sum(kept.values())
    return None
