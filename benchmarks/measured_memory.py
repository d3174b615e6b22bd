"""One training, measured in a process of its own: what benchmarks.memory_prediction compares predictions with.

    python -m benchmarks.measured_memory < what.json        (see `Asked`)
    python -m benchmarks.measured_memory --card             the GPU that is there, measured

The last line that is printed is the result as JSON.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, TypedDict

import torch

from benchmarks import workloads
from benchmarks.workloads import Workload
from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.memory.tracer import LiveBytes
from lowvram.planner import cards


class Asked(TypedDict):
    """vram_bytes: the cap. order: the parts of a step, the heaviest first. sampled: images at a time."""

    recipe: str
    overrides: list[str]
    vram_bytes: int | None
    order: list[str]
    sampled: int
    steps: int


def apart(asked: dict[str, Any]) -> dict[str, Any]:
    """`measure`, in a new process; {"error": ...} if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measured_memory"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(asked: Asked) -> dict[str, Any]:
    """Peaks by part of a step, of the device too where there is one, and the seconds of a step."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    watch = _Device(device)
    if asked["vram_bytes"] is not None:
        guard.cap(asked["vram_bytes"], device)
    memory = LiveBytes() if device.type == "cpu" else None
    with memory or nullcontext(), watch.watching():
        work = workloads.recipe(asked["recipe"], asked["overrides"], device)
        parts: dict[str, dict[str, Any]] = {}
        runs = _runs(work, asked["sampled"])
        every = {phase.name: phase.every for phase in work.phases} | {"average": 1}
        for _ in range(max(2, asked["steps"])):  # the second finds what the first left
            for name in asked["order"]:
                _run(runs[name], parts.setdefault(name, {"seconds": []}), device, memory)
                watch.look()
    for part in parts.values():
        part["seconds"] = statistics.median(part["seconds"][1:])  # the first loads kernels
    result = {"parts": parts, "seconds": sum(parts[name]["seconds"] / n for name, n in every.items() if name in parts)}
    if device.type == "cuda":
        result |= {"device_bytes": watch.peak_bytes, "device_by": watch.by}
    return result


def _runs(work: Workload, sampled: int) -> dict[str, Callable[[], None]]:
    runs: dict[str, Callable[[], None]] = {p.name: lambda p=p: work.run(p) for p in work.phases}  # type: ignore[misc]
    return runs | {"average": work.end_step, "sampling": lambda: work.draw(sampled)}


def _run(run: Callable[[], None], part: dict[str, Any], device: torch.device, memory: LiveBytes | None) -> None:
    if memory is not None:
        memory.reset_peak()
    else:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if memory is None:
        torch.cuda.synchronize(device)
        part["reserved_bytes"] = max(part.get("reserved_bytes", 0), torch.cuda.max_memory_reserved(device))
    live = memory.peak_bytes if memory is not None else torch.cuda.max_memory_allocated(device)
    part["seconds"].append(time.perf_counter() - begun)
    part["live_bytes"] = max(part.get("live_bytes", 0), live)


class _Device:
    """What is in use of the whole device at most, less what was before: by NVML while it runs, else when looked at."""

    _SECONDS = 0.005

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = self._before_bytes = 0
        self._used: Callable[[], int] | None = None
        if device.type == "cuda":
            self._used, self.by = _by_nvml() or (lambda: guard.used_and_total_bytes(device)[0]), "NVML"
            if _by_nvml() is None:
                self.by = "cudaMemGetInfo"  # which makes a context: it can't tell what others had before
            else:
                self._before_bytes = self._used()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look all the time within."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(self._SECONDS):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        if self._used is not None and self.by == "NVML":
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()

    def look(self) -> None:
        """Note what is in use now."""
        if self._used is not None:
            self.peak_bytes = max(self.peak_bytes, self._used() - self._before_bytes)


def _by_nvml() -> Callable[[], int] | None:
    """What reads the bytes in use of the first device, or None."""
    with suppress(Exception):  # no pynvml, or a driver without it
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetMemoryInfo(handle)
        return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    return None


def main() -> None:
    """Entry of the command."""
    if "--card" in sys.argv:
        print(json.dumps(asdict(cards.present(torch.device("cuda", 0)))))
        return
    try:
        print(json.dumps(measure(json.load(sys.stdin))))
    except (LowVRAMError, torch.OutOfMemoryError) as error:
        sys.exit(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
