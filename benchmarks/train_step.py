"""Seconds by phase, images a second and peak memory of a recipe's training step, as a table and as JSON.

    python -m benchmarks.train_step recipe=faces64 batch=4 [setting=value ...] [--steps 20] [--json FILE]

Each phase runs alone, `--steps` times after `--warmup` runs, on images that are in memory already; medians are quoted.
images/s is that of a whole training step, in which a phase counts once in `every` steps.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.launch import prefer_huge_pages
from lowvram.memory.guard import resident_peak_bytes
from lowvram.phase import Phase
from lowvram.settings import DiffusionSettings
from lowvram.tasks import autoencoder, codec
from lowvram.trainer import Trainer


def measure(recipe: str, overrides: list[str], *, steps: int, warmup: int) -> dict[str, Any]:
    """Time every phase of a recipe; returns what the command prints as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_recipe(recipe, [*overrides, f"out={folder}/run"])
        if isinstance(settings, DiffusionSettings) and settings.latent.path is None:
            settings = _on_untrained_latents(settings, Path(folder))
        trainer = Trainer(settings, quiet=True, synchronize=True)
        batch = next(trainer.loader.iterate(0))
        after_setup_bytes = resident_peak_bytes()
        images = batch.images.to(trainer.device)
        phases = {
            p.name: measure_phase(trainer, p, images, batch, steps=steps, warmup=warmup) for p in trainer.task.phases
        }
        per_step = sum(phases[p.name]["seconds"] / p.every for p in trainer.task.phases)
        return {
            "recipe": recipe,
            "overrides": overrides,
            "resolution": settings.resolution,
            "batch": settings.batch,
            "parameters": {name: _count(network) for name, network in trainer.task.networks.items()},
            "phases": phases,
            "seconds_per_step": per_step,
            "images_per_second": settings.batch / per_step,
            "peak_bytes": max(p["peak_allocated_bytes"] for p in phases.values()),
            "resident_after_setup_bytes": after_setup_bytes,
            "device": device_name(trainer.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def measure_phase(
    trainer: Trainer, phase: Phase, images: torch.Tensor, batch: Any, *, steps: int, warmup: int
) -> dict[str, Any]:
    """Run one phase again and again, update included."""
    seconds = []
    for index in range(warmup + steps):
        begun = time.perf_counter()
        with trainer.meter.phase(phase.name):
            trainer.run_phase(phase, batch, images, 0)
        if index >= warmup:
            seconds.append(time.perf_counter() - begun)
    cost = trainer.meter.costs[phase.name]
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "every": phase.every,
        "samples": phase.samples,
        "peak_allocated_bytes": cost.allocated_bytes,
        "peak_reserved_bytes": cost.reserved_bytes,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = [f"{'phase':<14}{'seconds':>10}{'fastest':>10}{'images':>8}{'every':>7}{'peak GiB':>10}"]
    for name, phase in result["phases"].items():
        rows.append(
            f"{name:<14}{phase['seconds']:>10.3f}{phase['seconds_min']:>10.3f}{phase['samples']:>8}{phase['every']:>7}"
            f"{phase['peak_allocated_bytes'] / 2**30:>10.2f}"
        )
    rows.append(
        f"{result['recipe']} at {result['resolution']}, batch {result['batch']}: "
        f"{result['images_per_second']:.2f} images/s, "
        f"peak {result['peak_bytes'] / 2**30:.2f} GiB, on {result['device']} with {result['threads']} threads"
    )
    return "\n".join(rows)


def device_name(device: torch.device) -> str:
    """The card, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
    options = parser.parse_args()
    prefer_huge_pages()  # as the train command does
    recipe = next((s.removeprefix("recipe=") for s in options.settings if s.startswith("recipe=")), "faces32")
    overrides = [s for s in options.settings if not s.startswith("recipe=")]

    def run() -> None:
        result = measure(recipe, overrides, steps=options.steps, warmup=options.warmup)
        print(table(result))
        text = json.dumps(result, indent=1)
        print(text)
        if options.json:
            options.json.write_text(text + "\n")

    report_errors(run, overrides)


if __name__ == "__main__":
    main()
