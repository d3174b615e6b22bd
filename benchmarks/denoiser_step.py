"""A training step of a diffusion recipe's denoiser beside that of diffusers' UNet of the same layout, in one run.

    python -m benchmarks.denoiser_step recipe=faces256_ldm [batch=16] [setting=value ...] [--steps 10] [--json FILE]

Ours: the recipe's network, phase and policy (micro-batches and memory.* as set), in the precision of the recipe.
diffusers: the layout of the recipe in diffusers' class, the same objective, AdamW and precision, the whole batch at
once, as its example scripts train. Both are timed in turn; medians are quoted. Memory: of a card the allocator's peak
above what was there; on a CPU the bytes alive, counted operation by operation in a step of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_step import device_name
from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError
from lowvram.launch import prefer_huge_pages
from lowvram.memory.apply import Applied
from lowvram.memory.policy import MemoryPolicy
from lowvram.memory.precision import autocast, choose
from lowvram.memory.tracer import LiveBytes
from lowvram.noise import Schedule
from lowvram.objectives.diffusion import diffusion_loss
from lowvram.settings import DiffusionSettings
from lowvram.tasks import build_task, pick_device
from lowvram.tasks.diffusion import DiffusionTask


@dataclass(kw_only=True)
class Step:
    """A training step that can be run again and again, and what is in memory between steps."""

    run: Callable[[], None]
    network: nn.Module
    optimizer: torch.optim.Optimizer


def ours(settings: DiffusionSettings, device: torch.device) -> Step:
    """The recipe's own."""
    torch.manual_seed(0)
    task = build_task(settings, device)
    assert isinstance(task, DiffusionTask)
    task.prepare_training()
    (phase,) = task.phases
    policy = MemoryPolicy.from_settings(settings, phases=[phase.name], precision=choose(settings.precision, device))
    applied = Applied(policy, task.phases, device=device)
    images = task.example(settings.batch)
    labels, positions = torch.zeros(settings.batch, dtype=torch.int64), torch.arange(settings.batch)

    def run() -> None:
        with applied.running(phase):
            loss, _ = applied.accumulate(phase, phase.micro_batches(images, labels, positions, 0, 0))
        applied.update(phase, loss)

    return Step(run=run, network=task.denoiser, optimizer=phase.optimizer)


def theirs(settings: DiffusionSettings, device: torch.device) -> Step:
    """diffusers' UNet without a condition, trained as its scripts do."""
    from diffusers import UNet2DModel

    shape = settings.unet
    down = ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in shape.attention]
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=settings.latent_size,
        in_channels=settings.latent.channels,
        out_channels=settings.latent.channels,
        block_out_channels=tuple(shape.channels),
        layers_per_block=shape.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        attention_head_dim=shape.head_channels,
        norm_num_groups=shape.norm_groups,
    ).to(device)
    adam = settings.optimizer
    optimizer = torch.optim.AdamW(network.parameters(), lr=adam.lr, betas=(adam.beta1, adam.beta2), fused=True)
    precision = choose(settings.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    size = settings.latent_size
    x0 = torch.randn(settings.batch, settings.latent.channels, size, size, device=device)
    seeds = torch.arange(settings.batch)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t).sample

    def run() -> None:
        with autocast(precision, device):
            loss = diffusion_loss(predict, x0, seeds, schedule=Schedule.flow(), predict="flow").mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), adam.clip_norm or 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Step(run=run, network=network, optimizer=optimizer)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The peak of a step, weights and optimizer state included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with LiveBytes() as memory:
        memory.watch(step.network, step.optimizer)
        step.run()
    return memory.peak_bytes


def seconds(step: Step, device: torch.device) -> float:
    """One step, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def compare(settings: DiffusionSettings, *, steps: int) -> dict[str, Any]:
    """Medians of both, timed in turn, and their peaks, each measured with the other out of memory."""
    device = pick_device(settings.device)
    kinds: dict[str, Callable[[DiffusionSettings, torch.device], Step]] = {"ours": ours}
    if settings.network == "unet" and settings.condition == "none":
        kinds["diffusers"] = theirs
    result: dict[str, Any] = {name: {} for name in kinds}
    for name, make in kinds.items():
        step = make(settings, device)
        step.run()  # makes the optimizer's state
        result[name]["peak_bytes"] = peak_bytes(step, device)
        result[name]["parameters"] = sum(p.numel() for p in step.network.parameters())
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
    for name in kinds:
        result[name]["seconds"] = statistics.median(times[name])
        result[name]["images_per_second"] = settings.batch / statistics.median(times[name])
    return {
        "recipe": settings.recipe,
        "batch": settings.batch,
        "micro_batch": settings.micro_batch.denoiser,
        "precision": choose(settings.precision, device),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **result,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['recipe']}, batch {result['batch']}, {result['precision']}, on {result['device']}"]
    for name in ("ours", "diffusers"):
        if name in result:
            one = result[name]
            lines.append(
                f"{name:<10} {one['parameters'] / 1e6:7.2f} M {one['seconds']:9.3f} s {one['images_per_second']:8.2f} "
                f"images/s {one['peak_bytes'] / 2**30:7.2f} GiB"
            )
    if "diffusers" in result:
        speed = result["diffusers"]["seconds"] / result["ours"]["seconds"]
        memory = result["ours"]["peak_bytes"] / result["diffusers"]["peak_bytes"]
        lines.append(f"ours is {speed:.2f} times as fast, in {memory:.2f} of the memory")
    return "\n".join(lines)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="recipe=NAME and settings")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()
    prefer_huge_pages()
    recipe = next((s.removeprefix("recipe=") for s in options.settings if s.startswith("recipe=")), "faces256_ldm")
    overrides = [s for s in options.settings if not s.startswith("recipe=")]

    def run() -> None:
        settings = load_recipe(recipe, overrides)
        if not isinstance(settings, DiffusionSettings):
            raise LowVRAMError(f"recipe={recipe} trains no denoiser.", "Use one such as faces256_ldm.")
        result = compare(settings, steps=options.steps)
        print(table(result))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    report_errors(run, overrides)


if __name__ == "__main__":
    main()
