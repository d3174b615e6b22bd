"""Memory measured and bounded: the peaks of each phase, the cap of `vram=6GB`, and what a budget would have to be.

Three layers lie on a card: what torch's allocator has reserved (most of it allocated to tensors), the CUDA context with
the kernels of this process, which no allocator setting bounds, and what others hold: the display, other programs.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from lowvram.errors import LowVRAMError

CONTEXT_BYTES = 430 * 2**20  # the context once its kernels are loaded, cuBLAS and cuDNN among them
LEAST_BYTES = 256 * 2**20  # below this for the allocator no training starts
_BUDGET_STEP_BYTES = 256 * 2**20


@dataclass(kw_only=True)
class PhaseCost:
    """What a phase took since the meter was last read.

    seconds: in total, over `count` runs. allocated_bytes and reserved_bytes: the highest peak of a run; on a CPU both
    are the resident set of the process, the highest that it has had since it started. device_bytes: the most of the
    whole device, all programs together, in use at the end of a run; on a CPU, of the machine.
    """

    seconds: float = 0.0
    count: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    device_bytes: int = 0


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
        self._spill_said = False
        self._messages: list[str] = []
        self._outside_bytes = outside_bytes(device) if device.type == "cuda" else 0

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
            used, total = used_and_total_bytes(self.device)
            cost.allocated_bytes = max(cost.allocated_bytes, allocated)
            cost.reserved_bytes = max(cost.reserved_bytes, reserved)
            cost.device_bytes = max(cost.device_bytes, used)
            if on_gpu and sys.platform == "win32":  # elsewhere a driver refuses what does not fit
                self.note_spill(name, reserved, total)

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

    def take_messages(self) -> list[str]:
        """What the user should be told since the last call; a spill is said once."""
        messages, self._messages = self._messages, []
        return messages

    def note_spill(self, name: str, reserved_bytes: int, total_bytes: int) -> None:
        """Say so, once, if a phase reserved more than fits on the card beside everything else."""
        spilled = spilled_bytes(
            reserved_bytes=reserved_bytes, outside_bytes=self._outside_bytes, total_bytes=total_bytes
        )
        if spilled and not self._spill_said:
            self._spill_said = True
            self._messages.append(
                f"phase {name} took {in_gb(spilled)} more than the card has; Windows put it into system memory, which "
                f"slows training many times. Set vram={in_gb(total_bytes)} or less, so that memory is saved instead."
            )


@dataclass(frozen=True, kw_only=True)
class Cap:
    """A bound on this process's device memory.

    vram_bytes: the budget, no larger than the card; None: unbounded. allocator_bytes: what of it torch's allocator may
    reserve. total_bytes: of the card. messages: for the user.
    """

    vram_bytes: int | None
    allocator_bytes: int | None
    total_bytes: int
    messages: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """allocator_bytes as torch wants it: a fraction of the card."""
        return 1.0 if self.allocator_bytes is None else self.allocator_bytes / self.total_bytes


def cap(vram_bytes: int | None, device: torch.device) -> Cap:
    """Bound what this process takes of a CUDA device, in bytes with its context; None lifts the bound.

    Call it before tensors are made: memory that is reserved already stays so. Not enforced on a CPU, which the
    messages then say.

    Raises:
        LowVRAMError: nothing would be left to train with.
    """
    if device.type != "cuda":
        _, total = used_and_total_bytes(device)
        said = () if vram_bytes is None else (f"vram={in_gb(vram_bytes)} is for a GPU: it bounds nothing on {device}",)
        return Cap(vram_bytes=vram_bytes, allocator_bytes=None, total_bytes=total, messages=said)
    _, total = used_and_total_bytes(device)
    found = (
        Cap(vram_bytes=None, allocator_bytes=None, total_bytes=total)
        if vram_bytes is None
        else plan_cap(vram_bytes, total_bytes=total, outside_bytes=outside_bytes(device))
    )
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(found.fraction, index)
    return found


def plan_cap(vram_bytes: int, *, total_bytes: int, outside_bytes: int) -> Cap:
    """The arithmetic of `cap`: the budget less the context, and no more than others leave of the card.

    A budget as large as the card, or larger, loses what the display and others hold; a smaller one only where they
    leave too little beside it. outside_bytes: in use on the card besides torch's allocator, this process's context
    included; while that is young and holds few kernels, it is taken to be CONTEXT_BYTES.
    """
    messages: list[str] = []
    vram = min(vram_bytes, total_bytes)
    if vram_bytes > total_bytes:
        messages.append(f"vram={in_gb(vram_bytes)} is more than the card has: {in_gb(total_bytes)} are used")
    outside = max(outside_bytes, CONTEXT_BYTES)
    allocator = min(vram - CONTEXT_BYTES, total_bytes - outside)
    if allocator < LEAST_BYTES:
        taken = f"CUDA itself takes {in_gb(CONTEXT_BYTES)}"
        others = in_gb(outside - CONTEXT_BYTES)
        if total_bytes - outside < vram - CONTEXT_BYTES:
            raise LowVRAMError(
                f"vram={in_gb(vram_bytes)} leaves {in_gb(max(0, allocator))} to train with: {taken}, and other "
                f"programs hold {others} of the card's {in_gb(total_bytes)}.",
                "Close other programs that use the GPU.",
            )
        raise LowVRAMError(
            f"vram={in_gb(vram_bytes)} leaves {in_gb(max(0, allocator))} to train with: {taken}.",
            f"Use vram={in_gb(CONTEXT_BYTES + LEAST_BYTES, up=True)} at the very least.",
        )
    if allocator < vram - CONTEXT_BYTES:
        others = in_gb(outside - CONTEXT_BYTES)
        messages.append(f"other programs hold {others} of the card; {in_gb(allocator)} are left to train with")
    return Cap(vram_bytes=vram, allocator_bytes=allocator, total_bytes=total_bytes, messages=tuple(messages))


def spilled_bytes(*, reserved_bytes: int, outside_bytes: int, total_bytes: int) -> int:
    """Bytes that a driver must have put elsewhere: reserved and outside of the allocator, less the card's own memory.

    outside_bytes: as in `plan_cap`.
    """
    return max(0, reserved_bytes + max(outside_bytes, CONTEXT_BYTES) - total_bytes)


def plan_budget_bytes(*, reserved_bytes: int, wanted_bytes: int | None, outside_bytes: int, total_bytes: int) -> int:
    """The smallest `vram` with which an allocation would not have failed, rounded up to 256 MiB.

    As in `plan_cap`, what others hold counts where the card is too small for both. A result above total_bytes means a
    larger card, or closing other programs.

    reserved_bytes: by the allocator when it failed. wanted_bytes: by the allocation; None, not known, counts as one
    rounding step.
    """
    needed = reserved_bytes + (_BUDGET_STEP_BYTES if wanted_bytes is None else wanted_bytes)
    outside = max(outside_bytes, CONTEXT_BYTES)
    whole = needed + (CONTEXT_BYTES if needed + outside <= total_bytes else outside)
    return -(-whole // _BUDGET_STEP_BYTES) * _BUDGET_STEP_BYTES


def smallest_budget_bytes(*, reserved_bytes: int, wanted_bytes: int | None, device: torch.device) -> int:
    """`plan_budget_bytes` with what the device holds now; on a CPU just what was held and wanted, rounded up."""
    if device.type != "cuda":
        whole = reserved_bytes + (wanted_bytes or _BUDGET_STEP_BYTES)
        return -(-whole // _BUDGET_STEP_BYTES) * _BUDGET_STEP_BYTES
    _, total = used_and_total_bytes(device)
    return plan_budget_bytes(
        reserved_bytes=reserved_bytes,
        wanted_bytes=wanted_bytes,
        outside_bytes=outside_bytes(device),
        total_bytes=total,
    )


def outside_bytes(device: torch.device) -> int:
    """Bytes in use on a CUDA device besides this process's allocator: its context, the display, other programs."""
    used, _ = used_and_total_bytes(device)
    return max(0, used - torch.cuda.memory_reserved(device))


def used_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """In use by all programs together, and there at all: of a CUDA device, else of the machine's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    memory = psutil.virtual_memory()
    return memory.total - memory.available, memory.total


def resident_peak_bytes(process: psutil.Process | None = None) -> int:
    """Highest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int((process or psutil.Process()).memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_gb(size_bytes: int, *, up: bool = False) -> str:
    """Bytes as a setting is written, "5.5GB": of 2^30 bytes, to a hundredth, rounded to the nearest or up."""
    hundredths = -(-size_bytes * 100 // 2**30) if up else round(size_bytes * 100 / 2**30)
    return f"{hundredths / 100:g}GB"
