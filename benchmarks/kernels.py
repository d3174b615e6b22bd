"""Every kernel on shapes of our recipes: time, bytes against a copy of as many, memory; and what else users could take.

    python -m benchmarks.kernels [--only swiglu,adamw8bit] [--json FILE] [--seconds 0.3] [--no-compile] [--small]

Implementations: `triton`, ours; `reference`, ours in PyTorch alone, for machines without Triton; `plain`, the meaning
in PyTorch; `compiled`, torch.compile of that; and what else there is, such as `torch`'s own operation. Before they are
timed Triton's results are held against fp64, and the reference's where it computes in fp32 (in 16 bits PyTorch rounds
between its operations, as in `plain`); what is wrong is not timed. Forward and backward are timed by themselves, all
implementations in turn, the L2 cache flushed before each run (see benchmarks.timing); medians are quoted.

Goals, of a GPU: a kernel that works element by element moves the bytes that it must at 80% of the speed at which a
copy of as many bytes moves them, timed in the same way; none is slower, forward and backward together, than the best
alternative, noise (a quartile) aside; and the 8-bit optimizer takes half of bitsandbytes' time for a whole network. A
mark says of each whether it was reached. On a CPU, or with --small, one sample of each kind of shape is run in fp32.

kept: bytes that autograd holds on to for the backward, input and output among them if they are needed. peak: what
forward and backward have alive at most besides inputs and the gradient that comes in.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, timing
from benchmarks.kernel_cases import CASES, Case, Inputs, small
from benchmarks.peers import optimizers
from benchmarks.timing import Clock
from lowvram.kernels import dispatch

COPY_SHARE = 0.8
OPTIMIZER_RATIO = 2.0
OPTIMIZER = "adamw8bit"
_OURS = ("triton", "reference")
# Relative to the largest magnitude, as in tests/kernels/tolerances.py; in sums as long as these a few times more.
_RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
_TF32 = 2e-3
_OFF_SHARE = 1e-4  # of the elements may be off: they fell on the other side of a kink
_CHECKED_ELEMENTS = 2**24  # of the largest tensor when results are held against fp64
_LARGE_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


@dataclass(kw_only=True)
class Measured:
    """One implementation. seconds: (forward, backward) of each run; error: why there are none."""

    forward_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    error: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Forward and backward together, of each run."""
        return [f + b for f, b in zip(self.forward_seconds, self.backward_seconds, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a kernel has to reach, as a ratio, and whether it did."""

    what: str
    found: float
    reached: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.found:.2f}, {'reached' if self.reached else 'MISSED'}"


@dataclass(kw_only=True)
class Result:
    """All implementations of a case. copy_seconds: of copies that move as many bytes as forward, and as backward."""

    case: Case
    measured: dict[str, Measured]
    moved_bytes: tuple[int, int]
    copy_seconds: tuple[float, float]
    goals: list[Goal] = field(default_factory=list)


def implementations(case: Case, device: torch.device, *, compiled: bool) -> dict[str, Callable[[Inputs], Tensor]]:
    """What can be run there, by name; ours first."""
    found: dict[str, Callable[[Inputs], Tensor]] = {}
    if device.type == "cuda" and dispatch.works_on(device.index or 0):
        found["triton"] = lambda inputs: case.ours(inputs, "triton")
    found["reference"] = lambda inputs: case.ours(inputs, "reference")
    found["plain"] = case.plain
    if compiled:
        torch.compiler.reset()  # each case is compiled for its own shapes
        found["compiled"] = torch.compile(case.plain, dynamic=False)
    return found | dict(case.others)


def wrong(case: Case, run: Callable[[Inputs], Tensor], device: torch.device) -> str | None:
    """How the value or a gradient differs from fp64's by more than its type allows; None: it does not."""
    one = max(torch.Size(shape).numel() for shape in case.shapes(1).values())
    inputs = case.inputs(max(1, min(case.batch, _CHECKED_ELEMENTS // one)), device)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    y, expected = run(inputs), case.plain(exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    wanted = [name for name, x in inputs.items() if x.requires_grad]
    grads = torch.autograd.grad(y, [inputs[name] for name in wanted], dy)
    expected_grads = torch.autograd.grad(expected, [exact[name] for name in wanted], dy.double())
    pairs = {"the value": (y, expected)}
    pairs |= {f"d {n}": (g, e) for n, g, e in zip(wanted, grads, expected_grads, strict=True)}
    for what, (actual, right) in pairs.items():
        # A sum over many elements that were rounded to the narrow type has their error, whatever its own type.
        relative = max(_RELATIVE[actual.dtype], _RELATIVE[y.dtype], _TF32 if case.tf32 else 0.0)
        errors = (actual.double() - right).abs()
        allowed = relative * max(1e-3, right.abs().max().item())
        share = (~(errors <= allowed)).double().mean().item()  # NaN counts
        if share > _OFF_SHARE:
            return f"{what} is off by up to {errors.max().item():.3g}, {share:.2%} of it by more than {allowed:.3g}"
    return None


def measure(case: Case, device: torch.device, clock: Clock, *, budget_seconds: float, compiled: bool) -> Result:
    """Check, then time and measure every implementation."""
    inputs = case.inputs(case.batch, device)
    wanted = [x for x in inputs.values() if x.requires_grad]
    with torch.no_grad():
        y = case.plain(inputs)
    moved, dy = case.moved_bytes(inputs, y), torch.randn_like(y)
    del y
    runs = implementations(case, device, compiled=compiled)
    measured = {name: Measured() for name in runs}

    def step(run: Callable[[Inputs], Tensor]) -> tuple[float, float]:
        forward, y = clock.seconds(lambda: run(inputs))
        backward, _ = clock.seconds(lambda: torch.autograd.grad(y, wanted, dy))
        return forward, backward

    for name, run in runs.items():
        one = measured[name]
        try:
            checked = name == "triton" or (name == "reference" and case.dtype == torch.float32)
            one.error = wrong(case, run, device) if checked else None
            if one.error is None:
                step(run)  # compiles
                one.kept_bytes = timing.kept_bytes(lambda run=run: run(inputs))  # type: ignore[misc]
                if device.type == "cuda" or name != "compiled":  # which on a CPU allocates unseen
                    one.peak_bytes = timing.peak_bytes(
                        lambda run=run: torch.autograd.grad(run(inputs), wanted, dy),  # type: ignore[misc]
                        device,
                        held=[*inputs.values(), dy],
                    )
        except Exception as error:  # one that fails is a line of the table
            one.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    steps = {name: lambda run=run: step(run) for name, run in runs.items() if measured[name].error is None}
    for name, parts in timing.in_turn(steps, budget_seconds=budget_seconds * len(steps)).items():
        measured[name].forward_seconds, measured[name].backward_seconds = parts
    copies = [median(clock.copy_seconds(size)) for size in moved]
    return Result(case=case, measured=measured, moved_bytes=moved, copy_seconds=(copies[0], copies[1]))


def goals(result: Result) -> list[Goal]:
    """Of ours, which is Triton's where it runs."""
    ours = next((result.measured[n] for n in _OURS if n in result.measured and not result.measured[n].error), None)
    if ours is None:
        return []
    found = []
    if result.case.element_wise:
        parts = {"forward": ours.forward_seconds, "backward": ours.backward_seconds}
        for (what, seconds), copy in zip(parts.items(), result.copy_seconds, strict=True):
            share = copy / median(seconds)
            found.append(Goal(what=f"{what}, of a copy's speed", found=share, reached=share >= COPY_SHARE))
    others = {n: m for n, m in result.measured.items() if n not in _OURS and not m.error}
    if others:
        name, best = min(others.items(), key=lambda item: median(item[1].seconds))
        noise = (record.spread(ours.seconds)["iqr"] + record.spread(best.seconds)["iqr"]) / 2
        mine, theirs = median(ours.seconds), median(best.seconds)
        found.append(Goal(what=f"times as fast as {name}", found=theirs / mine, reached=mine <= theirs + noise))
    return found


def points(result: Result) -> list[dict[str, Any]]:
    """A point for each implementation; goals are among the details of ours."""
    found = []
    for name, one in result.measured.items():
        seconds = {"forward": one.forward_seconds, "backward": one.backward_seconds} if one.seconds else {}
        details: dict[str, Any] = {
            "kernel": result.case.kernel,
            "implementation": name,
            "kept_bytes": one.kept_bytes,
            "moved_bytes": dict(zip(("forward", "backward"), result.moved_bytes, strict=True)),
            "copy_seconds": dict(zip(("forward", "backward"), result.copy_seconds, strict=True)),
        }
        if name == next(iter(result.measured)):
            details["goals"] = [vars(goal) for goal in result.goals]
        found.append(
            record.point(
                "kernels",
                f"{result.case.title}: {name}",
                recipe=result.case.recipe,
                seconds={part: record.spread(values) for part, values in seconds.items()},
                seconds_per_step=record.spread(one.seconds) if one.seconds else None,
                allocated_bytes=one.peak_bytes,
                error=one.error,
                details=details,
            )
        )
    return found


_HEAD = f"{'':<14}{'forward':>12}{'of copy':>9}{'backward':>12}{'of copy':>9}{'kept':>11}{'peak':>11}"


def table(result: Result) -> str:
    """The case for people. MB are 10^6 bytes."""
    lines = [f"{result.case.title} ({result.case.recipe})"]
    for name, one in result.measured.items():
        if one.error:
            lines.append(f"  {name:<12}  {one.error}")
            continue
        row = f"  {name:<12}"
        parts = (one.forward_seconds, one.backward_seconds)
        for seconds, copy in zip(parts, result.copy_seconds, strict=True):
            row += f"{in_time(median(seconds)):>12}{copy / median(seconds):>9.2f}"
        lines.append(row + f"{_in_mb(one.kept_bytes):>11}{_in_mb(one.peak_bytes):>11}")
    return "\n".join([*lines, *(f"  {goal}" for goal in result.goals)])


def in_time(seconds: float) -> str:
    """In microseconds or milliseconds."""
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _in_mb(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


class Benchmark:
    """All that is asked for, written down after every case: a time limit loses what was not run yet, and no more."""

    def __init__(self, device: torch.device, path: Path | None, *, budget_seconds: float, compiled: bool) -> None:
        self.device, self.path, self.budget_seconds, self.compiled = device, path, budget_seconds, compiled
        self.clock = Clock(device)
        self.points: list[dict[str, Any]] = []
        self.goals: list[Goal] = []
        self.failed = 0

    def copy(self) -> None:
        """The card's bandwidth, by a copy so large that its start and end don't count."""
        moved = _LARGE_COPY_BYTES[self.device.type]
        spread = record.spread(self.clock.copy_seconds(moved))
        rate = moved / spread["median"]
        print(f"a copy of {moved / 2**20:.0f} MiB read and written: {rate / 1e9:.1f} GB/s")
        self._add([record.point("kernels", "copy", seconds_per_step=spread, details={"bytes_per_second": rate})])

    def kernel(self, name: str, *, small_shapes: bool) -> None:
        """The cases of one kernel."""
        try:
            cases = CASES[name]()
        except (ImportError, AttributeError) as error:
            self.failed += 1
            print(f"{name}: not there: {error}", flush=True)
            self._add([record.point("kernels", name, error=f"not there: {error}")])
            return
        for case in small(cases) if small_shapes else cases:
            result = measure(case, self.device, self.clock, budget_seconds=self.budget_seconds, compiled=self.compiled)
            if self.device.type == "cuda":
                result.goals = goals(result)
            self.goals += result.goals
            self.failed += sum(one.error is not None for n, one in result.measured.items() if n in _OURS)
            print(table(result), flush=True)
            self._add(points(result))
            del result
            gc.collect()

    def optimizer(self, *, small_shapes: bool) -> None:
        """8-bit AdamW over whole networks, beside what users would take."""
        for workload in optimizers.SMALL if small_shapes else optimizers.WHOLE:
            found = optimizers.measure(workload, self.device, budget_seconds=4 * self.budget_seconds)
            print(optimizers.table(workload, found), flush=True)
            goal = optimizer_goal(found) if self.device.type == "cuda" else None
            if goal is not None:
                self.goals.append(goal)
                print(f"  {goal}", flush=True)
            self.failed += found[optimizers.OURS].error is not None
            self._add(optimizers.points("kernels", workload, found))

    def _add(self, points: list[dict[str, Any]]) -> None:
        self.points += points
        if self.path is not None:
            record.write(self.path, self.points, device=self.device)


def optimizer_goal(found: Mapping[str, optimizers.Measured]) -> Goal | None:
    """Ours against bitsandbytes'."""
    ours, theirs = found.get(optimizers.OURS), found.get(optimizers.BITSANDBYTES)
    if ours is None or theirs is None or ours.error or theirs.error:
        return None
    ratio = median(theirs.seconds) / median(ours.seconds)
    return Goal(what="times as fast as bitsandbytes", found=ratio, reached=ratio >= OPTIMIZER_RATIO)


def main() -> None:
    """Entry of the command."""
    known = [OPTIMIZER, *CASES]  # in this order: a time limit should not lose the optimizer
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(known), help="kernels, separated by commas")
    parser.add_argument("--json", type=Path, help="write the points there too, after every case")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing each implementation of a case")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes longest")
    parser.add_argument("--small", action="store_true", help="small shapes, as on a CPU")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no kernel is called {unknown[0]}: use {', '.join(known)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    small_shapes = options.small or device.type == "cpu"
    benchmark = Benchmark(device, options.json, budget_seconds=options.seconds, compiled=not options.no_compile)
    print(f"{record.device_name(device)}, torch {torch.__version__}" + ("" if device.type == "cuda" else _ON_A_CPU))
    benchmark.copy()
    print(_HEAD)
    for name in names:
        if name == OPTIMIZER:
            benchmark.optimizer(small_shapes=small_shapes)
        else:
            benchmark.kernel(name, small_shapes=small_shapes)
    if benchmark.goals:
        print(f"{sum(goal.reached for goal in benchmark.goals)} of {len(benchmark.goals)} goals reached")
    sys.exit(1 if benchmark.failed else 0)


_ON_A_CPU = "; Triton's kernels run on a GPU: here ours is the reference, and the goals don't count"


if __name__ == "__main__":
    main()
