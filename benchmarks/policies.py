"""Peak memory and time of a training step under each of many memory policies, beside the plain run.

    python -m benchmarks.policies recipe=faces256 batch=16 [setting=value ...] [--only NAME,...] [--json FILE]
    python -m benchmarks.policies recipe=sd15 --traced

Settings on the command line hold for every policy; `recipe=sd15` is the UNet of Stable Diffusion 1.5 with the noise
objective (batch=N alone can be set). A step is all phases with their updates, and the averages.

Measured on the device that is there. Memory is torch's max_memory_allocated and max_memory_reserved on CUDA; on a CPU
it is what `lowvram.memory.tracer` counts as alive in a run of its own, host memory left out. Each policy is built,
warmed up and timed for `--steps` steps, then the next, and all of this `--rounds` times, so that the machine's noise
hits all alike; medians are quoted. speed: plain seconds by a policy's.

--traced: on fake tensors, for which nothing is computed: the live bytes of a GPU run (16-bit top resolutions, a GPU's
memory formats), what an allocator would reserve for them, floating-point operations, and bytes copied to the host and
back. A kernel's own workspace is not seen. The autocast of sd15's fp32 weights is the CPU's, which keeps fewer layers
in fp32 than CUDA's does: its activations are counted too low. bf16 weights need no autocast, and are exact.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import policy_sets, workloads
from benchmarks.account import Account, reserved_bytes
from benchmarks.train_step import device_name
from benchmarks.workloads import Workload
from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError

Builder = Callable[[torch.device], Workload]
AVERAGE = "average"  # beside the phases: pending updates and averages at the end of a step


def builders(recipe: str, overrides: list[str], only: list[str], *, traced: bool) -> dict[str, Builder]:
    """What builds the workload under each policy, by the policy's name."""
    if recipe == "sd15":
        if any(not o.startswith("batch=") for o in overrides):
            raise LowVRAMError("recipe=sd15 is the benchmark's own.", "Set batch=N alone.")
        batch = max([int(o.removeprefix("batch=")) for o in overrides], default=4)
        chosen = policy_sets.pick(policy_sets.sd15(batch), only)
        return {
            name: lambda device, policy=policy: workloads.sd15(device, batch=batch, **policy)
            for name, policy in chosen.items()
        }
    base = [*overrides, "precision=fp16"] if traced and not _names(overrides, "precision") else overrides
    chosen = policy_sets.pick(policy_sets.stylegan2(load_recipe(recipe, overrides)), only)
    return {
        name: lambda device, policy=policy: workloads.recipe(recipe, [*policy, *base], device)
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
            results[name] = _attempt(lambda build=build: _counted(build, traced))
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
        "device": "none: fake tensors" if traced else device_name(device),
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


# Counted, on a CPU: real tensors or fake ones.


def _counted(build: Builder, traced: bool) -> dict[str, Any]:
    with ExitStack() as stack:
        if traced:
            stack.enter_context(_as_on_a_gpu())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        account = stack.enter_context(Account())
        work = build(torch.device("cpu"))
        work.after_gradients = lambda phase: account.call(
            "gradients", (p.grad for p in phase.parameters() if p.grad is not None)
        )
        _name_residents(account, work)
        gc.collect()
        account.empty_cache()
        phases: dict[str, Any] = {}
        for _ in range(2):  # the second step has what the first one made
            for name, run, every in _parts(work):
                account.reset_peak()
                begin, flops, moved = len(account.log), account.flops, account.host_bytes
                run()
                before = phases.get(name, {"peak_bytes": 0})
                if account.peak_bytes >= before["peak_bytes"]:
                    before = {"peak_bytes": account.peak_bytes, "span": (begin, len(account.log))}
                moved_bytes = account.host_bytes - moved
                phases[name] = before | {"every": every, "flops": account.flops - flops, "host_bytes": moved_bytes}
        resident_bytes = account.live_bytes
        worst = max(phases, key=lambda name: phases[name]["peak_bytes"])
        span = phases[worst]["span"]
        for phase in phases.values():
            del phase["span"]
        return {
            "phases": phases,
            "resident_bytes": resident_bytes,
            "reserved_bytes": reserved_bytes(account.log),
            "peak_phase": worst,
            "peak_at": account.last_maker(*span),
            "peak_holders": dict(account.holders(*span)),
        }


def _name_residents(account: Account, work: Workload) -> None:
    for name, network in work.networks.items():
        account.call(f"weights of {name}", network.parameters())
        account.call(f"buffers of {name}", network.buffers())
    for name, updater in work.applied.updaters.items():
        for part in (part for bucket in updater.buckets.values() for part in bucket.parts):
            states = part.optimizer.state.values()
            account.call(f"optimizer state of {name}", (v for s in states for v in s.values() if isinstance(v, Tensor)))
    account.call("images", work.images)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Fake tensors are on the CPU, for fake CUDA ones have no backward without a GPU: what the code asks differs."""

    def memory_format(x: Tensor, channels: int) -> torch.memory_format:
        return torch.contiguous_format if x.dtype == torch.float32 else torch.channels_last

    def drawn(
        method: str, seeds: Tensor | None, shape: tuple[int, ...], _: str, device: Any, batch: int | None
    ) -> Tensor:
        return torch.empty(batch if seeds is None else len(seeds), *shape, device=device)  # row by row takes long

    with ExitStack() as stack:
        for module in ("stylegan2", "stylegan2_layers"):
            stack.enter_context(mock.patch(f"lowvram.models.{module}.best_memory_format", memory_format))
        stack.enter_context(mock.patch("lowvram.seeded._draw", drawn))
        # torch can't convert or move the parameters of a fake module; they are made as they should be.
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        yield


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


# Shown.


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


def _phase_cell(phase: dict[str, Any] | None) -> str:
    if phase is None:
        return "-"
    peak = f"{phase['peak_bytes'] / 1e9:.2f}" if phase["peak_bytes"] else "-"
    return f"{peak}/{phase['seconds']:.3f}" if "seconds" in phase else peak


def _number(result: dict[str, Any], key: str, digits: int = 2) -> str:
    return f"{result[key]:.{digits}f}" if key in result else "-"


def _gb(size_bytes: int | None) -> str:
    return "to be timed" if size_bytes is None else f"{size_bytes / 1e9:.2f} GB"


def _names(overrides: list[str], setting: str) -> bool:
    return any(o.split("=")[0] == setting for o in overrides)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="recipe=NAME and settings")
    parser.add_argument("--only", default="", help="names of policies, separated by commas; the first is the reference")
    parser.add_argument("--traced", action="store_true", help="on fake tensors, as on a GPU; nothing is computed")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a policy in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--holders", action="store_true", help="show who holds the memory at each policy's peak")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    recipe = next((s.removeprefix("recipe=") for s in options.settings if s.startswith("recipe=")), "faces64")
    overrides = [s for s in options.settings if not s.startswith("recipe=")]

    def run() -> None:
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        built = builders(recipe, overrides, only, traced=options.traced)
        result = compare(built, steps=options.steps, rounds=options.rounds, traced=options.traced)
        result = {"workload": " ".join([recipe, *overrides])} | result
        print(table(result))
        for name, r in result["policies"].items() if options.holders else ():
            for holder, size_bytes in r.get("peak_holders", {}).items():
                print(f"  {name}: {size_bytes / 1e6:>8.1f} MB  {holder}")
            print(f"  {name}: in {r.get('peak_phase')}, reached by {r.get('peak_at')}")
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    report_errors(run, overrides)


if __name__ == "__main__":
    main()
