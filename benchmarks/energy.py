"""Is the energy that a receipt tells right? Known loads, by every meter that there is, side by side.

    python -m benchmarks.energy [seconds=8] [device=auto] [json=PATH]

Loads: `idle`; `copy`, which moves memory and computes nothing; `product`, matrix products (16 bit on a GPU). Each runs
for so many seconds under all meters at once: a card's own counter, the integral of its power, and the estimate from its
board's power; of a processor RAPL and the estimate from its busy cores. Where two measure, they should agree; an idle
machine draws least, and products take so many joules for each TFLOP, which data sheets tell too.

Exit code 1: a card's counter and its power differ by more than a tenth under a load.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from lowvram.config import command
from lowvram.errors import LowVRAMError
from lowvram.receipt import energy
from lowvram.receipt.energy import EnergyMeter
from lowvram.receipt.machine import board_watts
from lowvram.receipt.nvml import Nvml
from lowvram.tasks import pick_device

LOADS = ("idle", "copy", "product")
_MOST_APART = 0.1
_WARM_SECONDS = 1.0  # a card raises its clocks, and counters are renewed, some times a second


@dataclass(kw_only=True)
class Options:
    """Known loads, by every meter of energy that there is."""

    seconds: float = field(default=8.0, metadata={"help": "how long each load runs"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    json: str | None = field(default=None, metadata={"help": "where the points go"})


def main(options: Options) -> None:
    """Run all loads, print a table, write the points."""
    if not 0 < options.seconds <= 600:
        raise LowVRAMError(f"seconds={options.seconds} is not above 0 and at most 600.", "Use 8.")
    device = pick_device(options.device)
    points = []
    print(f"{'load':<8}{'meter':<10}{'watts':>8}{'J/TFLOP':>10}")
    for name in LOADS:
        watts, tflops = measure(name, device, options.seconds)
        for meter, found in watts.items():
            each = f"{found / tflops:.2f}" if tflops else "-"
            print(f"{name:<8}{meter:<10}{found:>8.1f}{each:>10}")
        details = {"watts": watts, "tflops_per_second": tflops, "seconds": options.seconds}
        points.append(record.point("energy", name, details=details, error=apart(name, watts)))
    if options.json is not None:
        record.write(Path(options.json).expanduser(), points, device=device)
    errors = [point["error"] for point in points if point["error"]]
    print("\n".join(errors))
    if errors:
        sys.exit(1)


def measure(load: str, device: torch.device, seconds: float) -> tuple[dict[str, float], float]:
    """Mean watts by meter, and the TFLOP/s that were computed, of a load of LOADS."""
    run, tflop = _load(load, device)
    _repeat(run, device, min(seconds, _WARM_SECONDS))
    meters = _meters(device)
    for meter in meters.values():
        meter.start()
    begun = time.perf_counter()
    count = _repeat(run, device, seconds)
    for meter in meters.values():
        meter.stop()
    took = time.perf_counter() - begun
    return {name: meter.joules / took for name, meter in meters.items()}, count * tflop / took


def apart(load: str, watts: dict[str, float]) -> str | None:
    """What is wrong where both measure a card under a load; None: nothing."""
    if load == "idle" or not {"counter", "power"} <= watts.keys():
        return None
    ratio = watts["counter"] / max(watts["power"], 1e-9)
    if abs(ratio - 1) <= _MOST_APART:
        return None
    return f"{load}: the counter tells {watts['counter']:.1f} W and the power {watts['power']:.1f} W"


def _meters(device: torch.device) -> dict[str, EnergyMeter]:
    found: dict[str, EnergyMeter] = {}
    if device.type != "cuda":
        with suppress(OSError):
            found["RAPL"] = EnergyMeter(energy.Processors())
        found["estimate"] = EnergyMeter(energy.ProcessLoad())
        return found
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    for name, kind in (("counter", energy.CardCounter), ("power", energy.CardPower)):
        with suppress(OSError):
            found[name] = EnergyMeter(kind(Nvml(device.index or 0, None if uuid is None else str(uuid))))
    found["estimate"] = EnergyMeter(energy.Constant(lambda: board_watts(properties.name)))
    return found


def _load(name: str, device: torch.device) -> tuple[Callable[[], Any], float]:
    """What is repeated, and the TFLOP of one time."""
    gpu = device.type == "cuda"
    if name == "idle":
        return lambda: time.sleep(0.01), 0.0
    side = 8192 if gpu else 1024
    a = torch.randn(side, side, device=device, dtype=torch.float16 if gpu else torch.float32)
    b = torch.empty_like(a)
    if name == "copy":
        return lambda: b.copy_(a), 0.0
    return lambda: torch.mm(a, a, out=b), 2 * side**3 / 1e12


def _repeat(run: Callable[[], Any], device: torch.device, seconds: float) -> int:
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        run()
        count += 1
        if device.type == "cuda" and count % 16 == 0:  # or a queue of unknown length would run on
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count


if __name__ == "__main__":
    command(Options, main, "benchmarks.energy")
