"""One training, measured in a process of its own: what benchmarks.memory_prediction compares predictions with.

    python -m benchmarks.measured_memory < what.json        (see `Asked`)
    python -m benchmarks.measured_memory --card             the GPU that is there, measured

The last line that is printed is the result as JSON.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, TypedDict

import torch

from benchmarks import workloads
from benchmarks.device import DevicePeak, order_by_bus
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
    watch = DevicePeak(device)
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
        part["runs_seconds"] = part["seconds"][1:]  # the first loads kernels
        part["seconds"] = statistics.median(part["runs_seconds"])
    result = {
        "parts": parts,
        "every": every,
        "seconds": sum(parts[name]["seconds"] / n for name, n in every.items() if name in parts),
    }
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


def main() -> None:
    """Entry of the command."""
    order_by_bus()
    if "--card" in sys.argv:
        print(json.dumps(asdict(cards.present(torch.device("cuda", 0)))))
        return
    try:
        print(json.dumps(measure(json.load(sys.stdin))))
    except (LowVRAMError, torch.OutOfMemoryError) as error:
        sys.exit(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
