"""Peak memory and time of a training step under each of many memory policies, beside the plain run.

    python -m benchmarks.policies recipe=faces256 batch=16 [setting=value ...] [--only NAME,...] [--json FILE]
    python -m benchmarks.policies recipe=sd15 --traced

Settings on the command line hold for every policy; `recipe=sd15` is the UNet of Stable Diffusion 1.5 with the noise
objective (batch=N alone can be set). A step is all phases with their updates, and the averages.

Measured on the device that is there. Memory is torch's max_memory_allocated and max_memory_reserved on CUDA; on a CPU
it is what `lowvram.memory.tracer` counts as alive in a run of its own, host memory left out. Each policy is built,
warmed up and timed for `--steps` steps, then the next, and all of this `--rounds` times, so that the machine's noise
hits all alike; medians are quoted. speed: plain seconds by a policy's.

--traced: on fake tensors that stand for a card's (lowvram.planner), for which nothing is computed: live bytes, what
torch's allocator would reserve for them, floating-point operations, and bytes copied to the host and back. Two steps
run whole, one operation after the other; the planner, which puts a step together from pieces, has to agree with them.
A kernel's own workspace is not seen. Kernels are Triton's, as on most cards.

--json: a point for each policy, in the schema of benchmarks.record; what is traced is "policies_traced" there.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import policy_sets, record, workloads
from benchmarks.workloads import Workload
from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError
from lowvram.memory.tracer import LiveBytes
from lowvram.planner.allocator import replay
from lowvram.planner.log import Requests
from lowvram.planner.record import Piece, Recorder, rounded
from lowvram.planner.subject import fake_card

Builder = Callable[[torch.device], Workload]
_SD15_BATCH = 4
AVERAGE = "average"  # beside the phases: pending updates and averages at the end of a step


def builders(recipe: str, overrides: list[str], only: list[str]) -> dict[str, Builder]:
    """What builds the workload under each policy, by the policy's name."""
    if recipe == "sd15":
        if any(not o.startswith("batch=") for o in overrides):
            raise LowVRAMError("recipe=sd15 is the benchmark's own.", "Set batch=N alone.")
        batch = _batch(recipe, overrides)
        chosen = policy_sets.pick(policy_sets.sd15(batch), only)
        return {
            name: lambda device, policy=policy: workloads.sd15(device, batch=batch, **policy)
            for name, policy in chosen.items()
        }
    chosen = policy_sets.pick(policy_sets.of(load_recipe(recipe, overrides)), only)
    return {
        name: lambda device, policy=policy: workloads.recipe(recipe, [*policy, *overrides], device)
        for name, policy in chosen.items()
    }


def compare(built: dict[str, Builder], *, steps: int, rounds: int, traced: bool) -> dict[str, Any]:
    """Peaks and times by policy; see the module. A policy that can't be built or run says why under "error"."""
    device = torch.device("cuda" if torch.cuda.is_available() and not traced else "cpu")
    results: dict[str, dict[str, Any]] = {}
    for name, build in built.items():
        results[name] = {}
        if name.startswith("fsdp") and traced:
            results[name] = {"error": "not traced: torch's FSDP reads data"}
        elif not name.startswith("fsdp") and device.type == "cpu":  # FSDP's own host memory is not told apart there
            results[name] = _attempt(lambda build=build: (trace if traced else count)(build))
        _summarise(results[name])
        print(f"{name}: {results[name].get('error') or _gb(results[name].get('peak_bytes'))}", flush=True)
    for _ in range(0 if traced else rounds):
        for name, build in built.items():
            if "error" not in results[name]:
                results[name] |= _attempt(
                    lambda build=build, so_far=results[name]: _timed(build, device, steps, so_far)
                )
    for result in results.values():
        _summarise(result)
    plain = next(iter(results.values()))
    for result in results.values():
        for key in ("peak_bytes", "seconds_per_step", "flops_per_step"):
            if result.get(key) and plain.get(key):
                result[f"{key}_ratio"] = result[key] / plain[key]
    return {
        "traced": traced,
        "device": "none: fake tensors" if traced else record.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": steps,
        "rounds": rounds,
        "policies": results,
    }


def _attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except (LowVRAMError, torch.OutOfMemoryError) as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# Counted, on a CPU, and traced.


def count(build: Builder) -> dict[str, Any]:
    """Peaks of a run on a CPU, by phase: what `LiveBytes` counts over two steps."""
    with LiveBytes() as memory:
        work = build(torch.device("cpu"))
        gc.collect()
        phases: dict[str, Any] = {}
        for _ in range(2):  # the second step has what the first one made
            for name, run, every in _parts(work):
                memory.reset_peak()
                run()
                before = phases.get(name, {"peak_bytes": 0})["peak_bytes"]
                phases[name] = {"every": every, "peak_bytes": max(before, memory.peak_bytes)}
        return {"phases": phases, "resident_bytes": memory.live_bytes}


def trace(build: Builder, *, triton: bool = True) -> dict[str, Any]:
    """The same of fake tensors that stand for a card's, with what an allocator reserves and who holds the peak.

    triton: whether the card runs Triton's kernels.
    """
    collects = gc.isenabled()
    gc.disable()  # what is alive must not depend on when it runs
    try:
        with fake_card(triton=triton) as fakes:
            recorder = Recorder({}, fakes)
            with recorder.recording():
                recorder.start()
                work = build(torch.device("cpu"))
                gc.collect()
                recorder.call_networks(work.networks)
                cuts = [("", 0, recorder.cut())]
                for _ in range(2):
                    for name, run, every in _parts(work):
                        run()
                        cuts.append((name, every, recorder.cut()))
                return _described(cuts)
    finally:
        if collects:
            gc.enable()


def _described(cuts: list[tuple[str, int, Piece]]) -> dict[str, Any]:
    """cuts: the record from its beginning to the end of each part: name, `every`, record; the first is building."""
    whole = cuts[-1][2]
    begin = len(cuts[0][2].order)
    asked = Requests(
        order=whole.order,
        sizes=rounded(whole.sizes),
        categories=whole.categories,
        makers=whole.makers,
        names=whole.names,
        marks=tuple((len(before.order), name) for (_, _, before), (name, _, _) in pairwise(cuts)),
    )
    live = asked.live()
    phases: dict[str, Any] = {}
    worst = begin
    for (_, _, before), (name, every, after) in pairwise(cuts):
        first = len(before.order) - 1  # with what was alive before; a part need not ask for anything
        at = first + int(live[first : len(after.order)].argmax())
        known = phases.get(name, {"peak_bytes": 0, "every": every})
        phases[name] = known | {
            "peak_bytes": max(known["peak_bytes"], int(live[at])),
            "flops": int(after.work.flops[len(before.work) :].sum()),
            "host_bytes": int(after.work.host_bytes - before.work.host_bytes),
        }
        if live[at] > live[worst]:
            worst, worst_phase = at, name
    return {
        "phases": phases,
        "resident_bytes": int(live[-1]),
        # From the start of training on: what building left free is given back before.
        "reserved_bytes": max(replay(asked, empty_at=[begin]).by_mark.values()),
        "peak_phase": worst_phase,
        "peak_at": asked.names[asked.makers[asked.storages()[worst]]],
        "peak_holders": _holders(asked, worst, begin),
    }


def _holders(asked: Requests, event: int, begin: int, most: int = 14) -> dict[str, int]:
    """Bytes alive after an event by what made them, the largest first; what building made is one of them."""
    changes, storages = asked.changes()[: event + 1], asked.storages()[: event + 1]
    held = np.zeros(len(asked.names) + 1, dtype=np.int64)
    built = np.zeros(len(asked.sizes), dtype=np.bool_)
    built[storages[: min(begin, event + 1)]] = True
    np.add.at(held, np.where(built[storages], len(asked.names), asked.makers[storages]), changes)
    names = (*asked.names, "held throughout: weights, state, batch")
    rows = {names[place]: int(held[place]) for place in np.argsort(-held)[:most] if held[place] > 0}
    return rows | {"all else": int(held.sum()) - sum(rows.values())}


# Timed.


def _timed(build: Builder, device: torch.device, steps: int, so_far: dict[str, Any]) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    work = build(device)
    if on_gpu:
        torch.cuda.empty_cache()
    phases = so_far.get("phases", {})
    for step in range(steps + 1):
        for name, run, every in _parts(work):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            begun = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begun
            phase = phases.setdefault(name, {"peak_bytes": 0, "every": every})
            if step:
                phase.setdefault("runs_seconds", []).append(seconds)
            if on_gpu:
                phase["peak_bytes"] = max(phase["peak_bytes"], torch.cuda.max_memory_allocated(device))
                reserved = torch.cuda.max_memory_reserved(device)
                phase["reserved_bytes"] = max(phase.get("reserved_bytes", 0), reserved)
    return {"phases": phases}


def _parts(work: Workload) -> Iterator[tuple[str, Callable[[], None], int]]:
    """The phases of a step and its end: name, what runs it, and in how many steps it runs once."""
    for phase in work.phases:
        yield phase.name, lambda phase=phase: work.run(phase), phase.every
    if work.averages:
        yield AVERAGE, work.end_step, 1


def _summarise(result: dict[str, Any]) -> None:
    phases = result.get("phases")
    if not phases:
        return
    if any(phase["peak_bytes"] for phase in phases.values()):
        result["peak_bytes"] = max(phase["peak_bytes"] for phase in phases.values())
    for phase in phases.values():
        if "runs_seconds" in phase:
            phase["seconds"] = statistics.median(phase["runs_seconds"])
    for key, per_step in (("seconds", "seconds_per_step"), ("flops", "flops_per_step"), ("host_bytes", "host_bytes")):
        if all(key in phase for phase in phases.values()):
            result[per_step] = sum(phase[key] / phase["every"] for phase in phases.values())
    if any("reserved_bytes" in phase for phase in phases.values()):
        result["reserved_bytes"] = max(phase["reserved_bytes"] for phase in phases.values())


# Recorded and shown.


def points(result: dict[str, Any], recipe: str, overrides: list[str], batch: int) -> list[dict[str, Any]]:
    """A point (`record.point`) for each policy. What is traced is of a benchmark of its own, "policies_traced"."""
    benchmark = "policies_traced" if result["traced"] else "policies"
    return [
        _point(
            benchmark, name, {**found, "steps": result["steps"], "rounds": result["rounds"]}, recipe, overrides, batch
        )
        for name, found in result["policies"].items()
    ]


def _point(
    benchmark: str, name: str, found: dict[str, Any], recipe: str, overrides: list[str], batch: int
) -> dict[str, Any]:
    phases: dict[str, dict[str, Any]] = found.get("phases") or {}
    timed = {phase: one["runs_seconds"] for phase, one in phases.items() if one.get("runs_seconds")}
    per_step = None
    if timed and len(timed) == len(phases):
        runs = zip(*([s / phases[phase]["every"] for s in seconds] for phase, seconds in timed.items()), strict=True)
        per_step = record.spread([sum(run) for run in runs])
    return record.point(
        benchmark,
        name,
        recipe=recipe,
        overrides=sorted(overrides),
        seconds={phase: record.spread(seconds) for phase, seconds in timed.items()},
        seconds_per_step=per_step,
        images_per_second=batch / per_step["median"] if per_step else None,
        allocated_bytes=found.get("peak_bytes"),
        reserved_bytes=found.get("reserved_bytes"),
        error=found.get("error"),
        details=found,
    )


def table(result: dict[str, Any]) -> str:
    """The result for people: GB are 10^9 bytes."""
    policies = result["policies"]
    width = max(map(len, policies)) + 2
    phases = list(next((r["phases"] for r in policies.values() if r.get("phases")), {}))
    head = f"{'policy':<{width}}" + "".join(f"{name:>12}" for name in phases) + f"{'peak GB':>9}{'GiB':>7}{'ratio':>7}"
    head += f"{'reserved':>10}{'FLOPs':>7}{'host GB':>9}" if result["traced"] else f"{'s/step':>9}{'speed':>7}"
    rows = [head]
    for name, r in policies.items():
        if not r.get("phases"):
            rows.append(f"{name:<{width}}{r.get('error', 'not run')}")
            continue
        cells = [f"{_phase_cell(r['phases'].get(phase)):>12}" for phase in phases]
        size_bytes = r.get("peak_bytes", math.nan)
        peak = f"{size_bytes / 1e9:>9.2f}{size_bytes / 2**30:>7.2f}{_number(r, 'peak_bytes_ratio'):>7}"
        if result["traced"]:
            extra = f"{r['reserved_bytes'] / 1e9:>10.2f}{_number(r, 'flops_per_step_ratio'):>7}"
            extra += f"{r['host_bytes'] / 1e9:>9.2f}"
        else:
            speed = 1 / r["seconds_per_step_ratio"] if "seconds_per_step_ratio" in r else 0.0
            extra = f"{_number(r, 'seconds_per_step', 3):>9}{speed:>7.2f}"
        rows.append(f"{name:<{width}}{''.join(cells)}{peak}{extra}")
    how = "traced with fake tensors, live bytes of the device" if result["traced"] else f"on {result['device']}"
    unit = "peak GB" if result["traced"] else "peak GB / seconds"
    rows.append(f"{result['workload']}: {how}; by phase: {unit}; ratios are to the first row")
    return "\n".join(rows)


def _batch(recipe: str, overrides: list[str]) -> int:
    if recipe == "sd15":
        return max([int(o.removeprefix("batch=")) for o in overrides], default=_SD15_BATCH)
    return load_recipe(recipe, overrides).batch


def _phase_cell(phase: dict[str, Any] | None) -> str:
    if phase is None:
        return "-"
    peak = f"{phase['peak_bytes'] / 1e9:.2f}" if phase["peak_bytes"] else "-"
    return f"{peak}/{phase['seconds']:.3f}" if "seconds" in phase else peak


def _number(result: dict[str, Any], key: str, digits: int = 2) -> str:
    return f"{result[key]:.{digits}f}" if key in result else "-"


def _gb(size_bytes: int | None) -> str:
    return "to be timed" if size_bytes is None else f"{size_bytes / 1e9:.2f} GB"


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="recipe=NAME and settings")
    parser.add_argument("--only", default="", help="names of policies, separated by commas; the first is the reference")
    parser.add_argument("--traced", action="store_true", help="on fake tensors, as on a GPU; nothing is computed")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a policy in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--holders", action="store_true", help="show who holds the memory at each policy's peak")
    parser.add_argument(
        "--json", type=Path, help="write a point for each policy there, in the schema of benchmarks.record"
    )
    options = parser.parse_args()
    recipe = next((s.removeprefix("recipe=") for s in options.settings if s.startswith("recipe=")), "faces64")
    overrides = [s for s in options.settings if not s.startswith("recipe=")]

    def run() -> None:
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        built = builders(recipe, overrides, only)
        result = compare(built, steps=options.steps, rounds=options.rounds, traced=options.traced)
        result = {"workload": " ".join([recipe, *overrides])} | result
        print(table(result))
        for name, r in result["policies"].items() if options.holders else ():
            for holder, size_bytes in r.get("peak_holders", {}).items():
                print(f"  {name}: {size_bytes / 1e6:>8.1f} MB  {holder}")
            print(f"  {name}: in {r.get('peak_phase')}, reached by {r.get('peak_at')}")
        if options.json:
            device = "cuda" if torch.cuda.is_available() and not options.traced else "cpu"
            batch = _batch(recipe, overrides)
            record.write(options.json, points(result, recipe, overrides, batch), device=device)

    report_errors(run, overrides)


if __name__ == "__main__":
    main()
