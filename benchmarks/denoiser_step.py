"""A training step of a diffusion recipe's denoiser beside that of diffusers' UNet of the same layout, in one run.

    python -m benchmarks.denoiser_step recipe=faces256_ldm [batch=16] [setting=value ...] [--steps 10] [--json FILE]
    python -m benchmarks.denoiser_step -m recipe=faces256_ldm,faces512_ldm [...]     a sweep, see benchmarks.sweep

Ours: the recipe's network, phase and policy (micro-batches and memory.* as set), in the precision of the recipe.
diffusers: the layout of the recipe in diffusers' class, the same objective, AdamW and precision, the whole batch at
once, as its example scripts train. Both are timed in turn; medians are quoted. Memory: of a card the allocator's peak
above what was there; on a CPU the bytes alive, counted operation by operation in a step of its own.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, sweep
from benchmarks.peers.diffusers_unet import theirs
from benchmarks.peers.recipe_step import ours
from benchmarks.peers.side import Step
from benchmarks.points import size
from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError
from lowvram.launch import prefer_huge_pages
from lowvram.memory.precision import choose
from lowvram.memory.tracer import LiveBytes
from lowvram.settings import DiffusionSettings
from lowvram.tasks import pick_device

BENCHMARK = "denoiser_step"


def peak_bytes(step: Step, device: torch.device) -> tuple[int, int | None]:
    """The peak of a step, weights and optimizer state included: of tensors, and of a card's allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    with LiveBytes() as memory:
        memory.watch(*step.held)
        step.run()
    return memory.peak_bytes, None


def seconds(step: Step, device: torch.device) -> float:
    """One step, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def compare(settings: DiffusionSettings, overrides: list[str], *, steps: int) -> list[dict[str, Any]]:
    """A point (`record.point`) for each, timed in turn, and their peaks, each measured with the other out of memory."""
    device = pick_device(settings.device)
    kinds: dict[str, Callable[[DiffusionSettings, torch.device], Step]] = {
        "ours": lambda settings, device: ours(settings, "denoiser", device)
    }
    if settings.network == "unet" and settings.condition == "none":
        kinds["diffusers"] = theirs
    peaks: dict[str, tuple[int, int | None]] = {}
    details: dict[str, dict[str, Any]] = {}
    for name, make in kinds.items():
        step = make(settings, device)
        step.run()  # makes the optimizer's state
        peaks[name], details[name] = peak_bytes(step, device), dict(step.details)
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()
    built = {name: make(settings, device) for name, make in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(steps + 2):
        for name, step in built.items():
            took = seconds(step, device)
            if round_ >= 2:
                times[name].append(took)
    shared = {"batch": settings.batch, "precision": choose(settings.precision, device), "options": {"steps": steps}}
    return [
        record.point(
            BENCHMARK,
            name,
            recipe=settings.recipe,
            overrides=sorted(overrides),
            seconds={"step": record.spread(times[name])},
            seconds_per_step=record.spread(times[name]),
            images_per_second=settings.batch / record.spread(times[name])["median"],
            allocated_bytes=peaks[name][0],
            reserved_bytes=peaks[name][1],
            details=details[name] | shared | {"device": str(device)},
        )
        for name in kinds
    ]


def table(points: list[dict[str, Any]]) -> str:
    """The points for people."""
    first, about = points[0], points[0]["details"]
    lines = [f"{first['recipe']}, batch {about['batch']}, {about['precision']}"]
    for one in points:
        lines.append(
            f"{one['name']:<10} {one['details']['parameters'] / 1e6:7.2f} M {one['seconds_per_step']['median']:9.3f} s "
            f"{one['images_per_second']:8.2f} images/s {size(one['memory']['allocated_bytes']):>9}"
        )
    for other in points[1:]:
        speed = first["images_per_second"] / other["images_per_second"]
        memory = first["memory"]["allocated_bytes"] / other["memory"]["allocated_bytes"]
        lines.append(f"ours is {speed:.2f} times as fast as {other['name']}, in {memory:.2f} of the memory")
    return "\n".join(lines)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="recipe=NAME and settings")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the points there (benchmarks.record)")
    sweep.add_options(parser)
    options = parser.parse_intermixed_args()
    asked = {"steps": max(1, options.steps)}
    if options.multirun:
        sweep.main(BENCHMARK, options, asked)
    prefer_huge_pages()
    recipe, overrides = sweep.recipe_and_overrides(options.settings, "faces256_ldm")

    def run() -> None:
        settings = load_recipe(recipe, overrides)
        if not isinstance(settings, DiffusionSettings):
            raise LowVRAMError(f"recipe={recipe} trains no denoiser.", "Use one such as faces256_ldm.")
        points = compare(settings, overrides, **asked)
        print(table(points))
        if options.json:
            record.write(options.json, points, device=points[0]["details"]["device"])

    report_errors(run, overrides)


if __name__ == "__main__":
    main()
