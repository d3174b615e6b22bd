"""Two ways of doing the same work: peaks with the other out of memory, times in turn."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks import record, timing
from benchmarks.timing import Clock
from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.memory.apply import Applied


class Missing(LowVRAMError):
    """A package that the work needs is not installed, or can't be imported."""

    def __init__(self, package: str, error: ImportError) -> None:
        super().__init__(f"{package} can't be imported: {error}", f"Install it: pip install {package}.")


@dataclass(kw_only=True)
class Step:
    """Work that can be done again and again.

    held: networks, optimizers and tensors that stay between steps. samples: of one step. details: for the record.
    """

    run: Callable[[], Any]
    held: Sequence[Any]
    samples: int
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A comparison. sides: what makes the step, by name; ours comes first, and the others are what it stands against.

    recipe: whose work it is, or None.
    """

    name: str
    what: str
    sides: Mapping[str, Callable[[torch.device], Step]]
    recipe: str | None = None


@dataclass(kw_only=True)
class Measured:
    """One side. peak_bytes: all that is alive at most, weights and state included; reserved_bytes: of a GPU."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    samples: int = 1
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def compare(peer: Peer, device: torch.device, *, budget_seconds: float) -> dict[str, Measured]:
    """Measure every side; what a side fails with is its result.

    Raises:
        Missing: a package is not installed.
    """
    found = {name: Measured() for name in peer.sides}
    for name, make in peer.sides.items():
        try:
            _measure_memory(found[name], make, device)
        except Missing:
            raise
        except (LowVRAMError, torch.OutOfMemoryError, RuntimeError) as error:
            found[name].error = said(error)
        finally:
            lift_cap(device)
            _free(device)
    working = {name: make for name, make in peer.sides.items() if found[name].error is None}
    try:
        seconds = _timed_in_turn(working, device, budget_seconds=budget_seconds)
    except torch.OutOfMemoryError:  # not all at once: one after the other
        _free(device)
        seconds = {}
        for name, make in working.items():
            seconds |= _timed_in_turn({name: make}, device, budget_seconds=budget_seconds / len(working))
            found[name].details["timed"] = "apart"
            _free(device)
    for name, values in seconds.items():
        found[name].seconds = values
    return found


def _measure_memory(one: Measured, make: Callable[[torch.device], Step], device: torch.device) -> None:
    step = make(device)
    one.samples, one.details = step.samples, dict(step.details)
    step.run()  # makes the optimizer's state
    if device.type != "cuda":
        memory = timing.LiveBytes()
        with memory:
            memory.watch(*step.held)
            step.run()
        one.peak_bytes = memory.peak_bytes
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    torch.cuda.synchronize(device)
    one.peak_bytes = torch.cuda.max_memory_allocated(device)
    one.reserved_bytes = torch.cuda.max_memory_reserved(device)


def _timed_in_turn(
    sides: Mapping[str, Callable[[torch.device], Step]], device: torch.device, *, budget_seconds: float
) -> dict[str, list[float]]:
    steps = {name: make(device) for name, make in sides.items()}
    lift_cap(device)  # a plan's holds for the process, the others in it too
    clock = Clock(device)
    runs = {name: lambda step=step: (clock.wall_seconds(step.run),) for name, step in steps.items()}
    times = timing.in_turn(runs, budget_seconds=budget_seconds, least=3, warm_up=1)
    return {name: parts[0] for name, parts in times.items()}


def optimizers_of(applied: Applied) -> list[torch.optim.Optimizer]:
    """Those that really step, which hold the state; a phase's own only lends its hyperparameters."""
    buckets = (bucket for updater in applied.updaters.values() for bucket in updater.buckets.values())
    return [part.optimizer for bucket in buckets for part in bucket.parts]


def lift_cap(device: torch.device) -> None:
    """Let this process use the whole card again."""
    guard.cap(None, device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def said(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def points(peer: Peer, found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """A point for each side; the ratios to the others are among the details of ours."""
    made = []
    for name, one in found.items():
        spread = record.spread(one.seconds) if one.seconds else None
        made.append(
            record.point(
                "peers",
                f"{peer.name}: {name}",
                recipe=peer.recipe,
                seconds_per_step=spread,
                images_per_second=one.samples / spread["median"] if spread else None,
                allocated_bytes=one.peak_bytes,
                reserved_bytes=one.reserved_bytes,
                error=one.error,
                details=one.details | ratios(found, name),
            )
        )
    return made


def ratios(found: Mapping[str, Measured], name: str) -> dict[str, Any]:
    """How many times as fast one is as each other, and what part of its memory it takes."""
    one = found[name]
    others = {n: other for n, other in found.items() if n != name and not other.error and other.seconds}
    if one.error or not one.seconds:
        return {}
    mine = median(one.seconds)
    return {
        "times_as_fast": {n: median(other.seconds) / mine for n, other in others.items()},
        "part_of_memory": {
            n: one.peak_bytes / other.peak_bytes for n, other in others.items() if one.peak_bytes and other.peak_bytes
        },
    }


def table(peer: Peer, found: Mapping[str, Measured]) -> str:
    """The comparison for people. MB are 10^6 bytes."""
    lines = [f"{peer.name}: {peer.what}"]
    for name, one in found.items():
        if one.error:
            lines.append(f"  {name:<22}  {one.error}")
            continue
        seconds = median(one.seconds)
        speed = f"{seconds * 1e3:>11.2f} ms{one.samples / seconds:>11.1f} /s"
        lines.append(f"  {name:<22}{speed}{(one.peak_bytes or 0) / 1e6:>11.1f} MB")
    ours = next(iter(found))
    own = ratios(found, ours)
    for other, speed in own.get("times_as_fast", {}).items():
        memory = own["part_of_memory"].get(other)
        in_part = f", in {memory:.2f} of the memory" if memory else ""
        lines.append(f"  {ours} is {speed:.2f} times as fast as {other}{in_part}")
    return "\n".join(lines)
