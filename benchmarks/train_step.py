"""Seconds by phase, images a second, peak memory and energy of a recipe's training step, as a table and as JSON.

    python -m benchmarks.train_step recipe=faces64 batch=4 [setting=value ...] [--steps 20] [--json FILE]
    python -m benchmarks.train_step -m recipe=faces256,faces256_ldm vram=4GB,6GB,8GB [out=FOLDER]

The training is set up as `lowvram.train` does it, `vram=6GB` included: planned, tried out and capped on a card. Without
a card the recipe is planned for a usual one of that size, and the policy applied to the training on the CPU; nothing is
capped there. `memory=recipe` goes by the settings alone.

Then, on a batch that is in memory already, come `--warmup` rounds and `--steps` timed ones; in each every phase runs
once, update included, and so do the averages. Medians are quoted. images/s is that of a whole training step, in which a
phase counts once in `every` steps. Peaks are over all rounds: torch's allocated and reserved bytes, and the whole
device's less what was in use before (NVML). On a CPU allocated bytes are counted operation by operation in the warm-up
rounds, of which there is one at least. Energy is measured after that, a second for each phase, where NVML gives it.

-m: a sweep over any settings, resumable, each point in a process of its own; see benchmarks.sweep.
--json: the point, in the schema of benchmarks.record.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, sweep
from benchmarks.device import DevicePeak, joules, order_by_bus
from benchmarks.points import size
from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError
from lowvram.launch import prefer_huge_pages
from lowvram.memory.guard import in_gb, resident_peak_bytes
from lowvram.memory.policy import MemoryPolicy
from lowvram.memory.precision import choose
from lowvram.memory.tracer import LiveBytes
from lowvram.planner import make
from lowvram.planner.plan import Plan
from lowvram.planner.worker import plan_apart
from lowvram.settings import DiffusionSettings, Settings, parse_bytes
from lowvram.tasks import autoencoder, codec, pick_device, task_class
from lowvram.trainer import Trainer

BENCHMARK = "train_step"
AVERAGE = "average"  # beside the phases: pending updates and averages at the end of a step


@dataclass(kw_only=True)
class Part:
    """Something that a training step does, and what it took. every: it counts once in so many steps."""

    run: Callable[[], object]
    every: int
    samples: int
    seconds: list[float] = field(default_factory=list)
    allocated_bytes: int = 0
    reserved_bytes: int | None = None
    joules: float | None = None


def measure(recipe: str, overrides: list[str], *, steps: int, warmup: int) -> dict[str, Any]:
    """The recipe's point (`record.point`): its phases, run as in training.

    Raises:
        LowVRAMError: the settings are wrong, or the recipe does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = load_recipe(recipe, [*overrides, f"out={folder}/run"])
        device = pick_device(settings.device)
        watch = DevicePeak(device)  # before CUDA is used
        settings, plan = planned_without_a_card(settings, device, Path(folder))
        if isinstance(settings, DiffusionSettings) and settings.latent.path is None:
            settings = _on_untrained_latents(settings, Path(folder))
        counted = LiveBytes() if device.type == "cpu" else None
        with counted or nullcontext():
            trainer = Trainer(settings, quiet=True, synchronize=True)
        batch = next(trainer.loader.iterate(0))
        policy = trainer.applied.policy
        with watch.watching():
            parts = _parts(trainer, batch)
            _warm_up(trainer, parts, warmup, counted)
            _time(trainer, parts, steps)
        for part in parts.values():
            part.joules = joules(part.run, trainer.device)
        plan = trainer.chosen.plan or plan
        details = {
            "resolution": settings.resolution,
            "batch": settings.batch,
            "parameters": {name: _count(network) for name, network in trainer.task.networks.items()},
            "phases": {name: _described(part) for name, part in parts.items()},
            "policy": trainer.applied.policy.to_dict(),
            "thriftier_than_begun": trainer.applied.policy != policy,  # memory ran out on the way
            "plan": None if plan is None else _of_plan(plan),
            "cap_bytes": trainer.cap.allocator_bytes,
            "device": str(trainer.device),
            "device_by": watch.by,
            "resident_peak_bytes": resident_peak_bytes(),
            "options": {"steps": steps, "warmup": warmup},
        }
        return _point(recipe, overrides, parts, watch, details)


def planned_without_a_card(settings: Settings, device: torch.device, folder: Path) -> tuple[Settings, Plan | None]:
    """`vram=6GB` off a GPU: the settings under the plan for a usual card of that size, in the device's precision.

    On a GPU they come back as they are, for the trainer plans there; and so they do where nothing is to be planned.

    Raises:
        LowVRAMError: no plan fits.
    """
    if device.type == "cuda" or settings.vram is None or settings.memory.policy != "auto":
        return settings, None
    where = make.place(parse_bytes("vram", settings.vram))
    plan = plan_apart(settings, where.card, where.budget_bytes)
    if not plan.fits:
        raise LowVRAMError(
            f"{settings.recipe} does not fit vram={settings.vram}: it needs {in_gb(plan.needed_bytes, up=True)}.",
            f"{'; '.join(plan.needs)}.",
        )
    precision = "fp32" if task_class(settings).own_precision else choose(settings.precision, device)
    policy: MemoryPolicy = replace(plan.policy, precision=precision)
    file = folder / "policy.json"
    file.write_text(json.dumps(policy.to_dict()))
    return replace(settings, memory=replace(settings.memory, policy=str(file))), plan


def _parts(trainer: Trainer, batch: Any) -> dict[str, Part]:
    images = batch.images.to(trainer.device)
    parts = {
        phase.name: Part(
            run=partial(trainer.run_phase, phase, batch, images, 0), every=phase.every, samples=phase.samples
        )
        for phase in trainer.task.phases
    }

    def average() -> None:
        trainer.applied.settle()
        for one in trainer.task.averages:
            one.update(100_000, trainer.recipe.batch)  # so many images in, averages have their whole length

    if trainer.task.averages:
        parts[AVERAGE] = Part(run=average, every=1, samples=trainer.recipe.batch)
    return parts


def _warm_up(trainer: Trainer, parts: dict[str, Part], rounds: int, counted: LiveBytes | None) -> None:
    """counted: holds what the training was built of; None: the meter reads a card's peaks, of these rounds too."""
    with counted or nullcontext():
        for _ in range(rounds if counted is None else max(1, rounds)):
            for name, part in parts.items():
                if counted is not None:
                    counted.reset_peak()
                with trainer.meter.phase(name):
                    part.run()
                if counted is not None:
                    part.allocated_bytes = max(part.allocated_bytes, counted.peak_bytes)


def _time(trainer: Trainer, parts: dict[str, Part], rounds: int) -> None:
    costs = trainer.meter.costs
    for _ in range(rounds):
        for name, part in parts.items():
            before = costs[name].seconds if name in costs else 0.0
            with trainer.meter.phase(name):
                part.run()
            part.seconds.append(costs[name].seconds - before)
    if trainer.device.type == "cuda":
        for name, part in parts.items():
            part.allocated_bytes, part.reserved_bytes = costs[name].allocated_bytes, costs[name].reserved_bytes


def _point(
    recipe: str, overrides: list[str], parts: dict[str, Part], watch: DevicePeak, details: dict[str, Any]
) -> dict[str, Any]:
    rounds = zip(*([seconds / part.every for seconds in part.seconds] for part in parts.values()), strict=True)
    per_step = record.spread([sum(round_) for round_ in rounds])
    energy = _sum(None if part.joules is None else part.joules / part.every for part in parts.values())
    reserved = [part.reserved_bytes for part in parts.values() if part.reserved_bytes is not None]
    return record.point(
        BENCHMARK,
        "step",
        recipe=recipe,
        overrides=sorted(overrides),
        seconds={name: record.spread(part.seconds) for name, part in parts.items()},
        seconds_per_step=per_step,
        images_per_second=details["batch"] / per_step["median"],
        allocated_bytes=max(part.allocated_bytes for part in parts.values()),
        reserved_bytes=max(reserved, default=None),
        device_bytes=watch.peak_bytes if watch.by else None,
        energy_joules_per_image=None if energy is None else energy / details["batch"],
        details=details,
    )


def _described(part: Part) -> dict[str, Any]:
    return {
        "every": part.every,
        "samples": part.samples,
        "allocated_bytes": part.allocated_bytes,
        "reserved_bytes": part.reserved_bytes,
        "joules": part.joules,
    }


def _of_plan(plan: Plan) -> dict[str, Any]:
    return {"card": plan.card, "needed_bytes": plan.needed_bytes, "vram_bytes": plan.vram_bytes} | {
        "settings": dict(plan.settings),
        "changes": list(plan.changes),
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def table(point: dict[str, Any]) -> str:
    """The point for people."""
    details = point["details"]
    rows = [f"{'phase':<14}{'seconds':>10}{'fastest':>10}{'images':>8}{'every':>7}{'allocated':>11}"]
    for name, phase in details["phases"].items():
        seconds = point["seconds"][name]
        rows.append(
            f"{name:<14}{seconds['median']:>10.3f}{seconds['min']:>10.3f}{phase['samples']:>8}{phase['every']:>7}"
            f"{size(phase['allocated_bytes']):>11}"
        )
    device = record.device_name(torch.device(details["device"]))
    rows.append(
        f"{point['recipe']} at {details['resolution']}, batch {details['batch']}: "
        f"{point['images_per_second']:.2f} images/s, peak {', '.join(sweep.peaks_in_words(point))}, "
        f"on {device} with {torch.get_num_threads()} threads"
    )
    if point["energy_joules_per_image"] is not None:
        rows.append(f"{point['energy_joules_per_image']:.3g} J an image")
    if details["plan"]:
        plan = details["plan"]
        changed = " ".join(f"{name}={value}" for name, value in plan["settings"].items())
        rows.append(f"planned for the {plan['card']}: {changed or 'as the recipe is'}")
    if details["thriftier_than_begun"]:
        rows.append("!! memory ran out on the way: the policy was made thriftier than it was planned")
    return "\n".join(rows)


def _on_untrained_latents(settings: DiffusionSettings, folder: Path) -> DiffusionSettings:
    """The recipe on an autoencoder of its shape that has learned nothing, and a batch of images: as quick as any."""
    autoencoder.save(codec.pretended(settings).autoencoder, folder / "vae")
    latent = replace(settings.latent, path=str(folder / "vae"), folder=str(folder / "latents"))
    return replace(settings, latent=latent, data=replace(settings.data, builtin_count=settings.batch))


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="recipe=NAME and settings")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result there too")
    sweep.add_options(parser)
    options = parser.parse_intermixed_args()
    asked = {"steps": max(1, options.steps), "warmup": max(0, options.warmup)}
    if options.multirun:
        sweep.main(BENCHMARK, options, asked)
    prefer_huge_pages()  # as the train command does
    order_by_bus()
    recipe, overrides = sweep.recipe_and_overrides(options.settings, "faces32")

    def run() -> None:
        point = measure(recipe, overrides, **asked)
        print(table(point))
        print(json.dumps(point, indent=1))
        if options.json:
            record.write(options.json, [point], device=point["details"]["device"])

    report_errors(run, overrides)


if __name__ == "__main__":
    main()
