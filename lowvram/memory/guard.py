"""Measured memory: the peak of a phase on the device, or of the process on a CPU."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch


@dataclass(kw_only=True)
class PhaseCost:
    """What a phase took since the meter was last read.

    seconds: in total, over `count` runs. allocated_bytes and reserved_bytes: the highest peak of a run; on a CPU both
    are the resident set of the process, the highest that it has had since it started.
    """

    seconds: float = 0.0
    count: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0


class Meter:
    """Measures each phase's time and peak memory.

    With `synchronize` the device is waited for at both ends of a phase, so that its time is its own (benchmarks);
    without, a phase's time is that of launching it.
    """

    def __init__(self, device: torch.device, *, synchronize: bool = False) -> None:
        self.device = device
        self.synchronize = synchronize
        self.costs: dict[str, PhaseCost] = {}
        self._process = psutil.Process()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs within, under `name`."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            if self.synchronize:
                torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        try:
            yield
        finally:
            if on_gpu and self.synchronize:
                torch.cuda.synchronize(self.device)
            cost = self.costs.setdefault(name, PhaseCost())
            cost.seconds += time.perf_counter() - begun
            cost.count += 1
            allocated, reserved = self.peak_bytes()
            cost.allocated_bytes = max(cost.allocated_bytes, allocated)
            cost.reserved_bytes = max(cost.reserved_bytes, reserved)

    def peak_bytes(self) -> tuple[int, int]:
        """Peak allocated and reserved bytes since the phase began; on a CPU the process's resident peak, twice."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        resident = resident_peak_bytes(self._process)
        return resident, resident

    def take(self) -> dict[str, PhaseCost]:
        """The costs since the last call."""
        costs, self.costs = self.costs, {}
        return costs


def resident_peak_bytes(process: psutil.Process | None = None) -> int:
    """Highest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int((process or psutil.Process()).memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
