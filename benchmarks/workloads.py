"""What benchmarks.policies trains: a recipe's task, or a text-to-image UNet of the size of Stable Diffusion 1.5."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from lowvram import load_recipe, standin
from lowvram.ema import ExponentialMovingAverage
from lowvram.memory.apply import Applied
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.memory.precision import choose
from lowvram.memory.recovery import Snapshot
from lowvram.phase import MicroBatch, Phase
from lowvram.planner.recipe import seeds
from lowvram.planner.subject import to_fake_host
from lowvram.seeded import randn
from lowvram.tasks import build_task, codec
from lowvram.tasks.diffusion import DiffusionTask


@dataclass(kw_only=True)
class Workload:
    """A training under one policy, with a batch that is in memory.

    images: [B, ...] on the device. seeds: int64 [B] on the CPU, real numbers in a trace too.
    networks: by name, averaged ones too. sample: makes images of the averaged network, n at a time.
    """

    applied: Applied
    images: Tensor
    seeds: Tensor
    networks: dict[str, nn.Module]
    averages: list[ExponentialMovingAverage] = field(default_factory=list)
    sample: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        self.phases = self.applied.phases
        # As the trainer does, so that a step that runs out of memory can be done again.
        self._snapshot = Snapshot(self.networks.values(), self.applied.device)

    def run(self, phase: Phase) -> None:
        """Gradients and update of one phase over the whole batch."""
        self._snapshot.take()
        with self.applied.running(phase):
            loss, means = self.applied.accumulate(phase, self._micro_batches(phase))
        outcome = self.applied.update(phase, loss)
        if outcome.applied and phase.finish is not None:
            phase.finish(means)

    def end_step(self) -> None:
        """What follows the phases: pending updates, averages."""
        if self.averages:
            self.applied.settle()
        for average in self.averages:
            average.update(100_000, len(self.seeds))

    def draw(self, n: int) -> None:
        """Sample n images, as the trainer does for its grid."""
        assert self.sample is not None
        with self.applied.sampling():
            self.sample(n)

    def _micro_batches(self, phase: Phase) -> Iterator[MicroBatch]:
        size = min(phase.micro_batch or phase.samples, phase.samples)
        for begin in range(0, phase.samples, size):
            # Not by Phase.micro_batches, which reads positions: a trace has none to read.
            images = self.images[begin : begin + size].clone()
            labels = torch.full((size,), -1, device=images.device)
            with unset_fake_temporarily():
                own = self.seeds[begin : begin + size].clone()
            yield MicroBatch(images=images, labels=labels, seeds=own)


def recipe(name: str, overrides: list[str], device: torch.device) -> Workload:
    """The task of a recipe as the trainer builds it; random images in place of a data set.

    overrides: a policy among them. It is taken when its steps cost most (see `Settings.at_full_cost`); latents are
    decoded by an autoencoder that has learned nothing.
    """
    settings = load_recipe(name, [*overrides, "data.workers=0"]).at_full_cost()
    torch.manual_seed(settings.seed)
    task = build_task(settings, device)
    task.prepare_training()
    if standin.active() and settings.memory.ema == "host":
        for average in task.averages:
            to_fake_host(average.target)
    precision = "fp32" if task.own_precision else choose(settings.precision, device)
    applied = Applied(
        MemoryPolicy.from_settings(settings, phases=[phase.name for phase in task.phases], precision=precision),
        task.phases,
        device=device,
        averages=task.averages,
        own_precision=task.own_precision,
        zero_nonfinite=task.own_precision and task.half_dtype == torch.float16,
    )

    def sample(n: int) -> None:
        if isinstance(task, DiffusionTask):
            vars(task)["_codec"] = codec.pretended(task.settings)
        task.sample(n, micro_batch=n)
        vars(task).pop("_codec", None)  # between samples it waits on the host, which on a CPU would be counted

    return Workload(
        applied=applied,
        images=task.example(settings.batch),
        seeds=seeds(settings.batch),
        networks=task.networks,
        averages=task.averages,
        sample=sample,
    )


def sd15(
    device: torch.device,
    *,
    batch: int = 4,
    precision: str = "fp32",
    phase: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **changes: Any,
) -> Workload:
    """Full training of the UNet of Stable Diffusion 1.x (diffusers' class, its public configuration, random weights).

    One phase, "denoise": the noise objective on latents [B, 4, 64, 64] with text states [B, 77, 768], AdamW.
    phase, optimizer: fields of its PhasePolicy and OptimizerPolicy. changes: to the UNet's configuration.
    """
    from diffusers import UNet2DConditionModel

    narrow = (optimizer or {}).get("weights_dtype") == "bf16"
    with nullcontext() if device.type == "cpu" else torch.device(device):
        torch.manual_seed(0)
        network = UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": 768, **changes})
    dtype = torch.bfloat16 if narrow else torch.float32
    size = network.config.sample_size
    states = torch.randn(batch, 77, network.config.cross_attention_dim, dtype=dtype, device=device)

    def loss(micro: MicroBatch) -> Tensor:
        latents = micro.images
        noise = randn(micro.seeds, *latents.shape[1:], stream="noise").to(device)
        t = torch.linspace(0, 1, len(latents), device=device)  # [b]
        alpha = torch.cos(t * torch.pi / 2)[:, None, None, None]
        noisy = alpha * latents + (1 - alpha**2).sqrt() * noise
        text = states[: len(latents)]
        predicted = network(noisy.to(dtype), (t * 1000).to(dtype), encoder_hidden_states=text).sample
        return F.mse_loss(predicted.float(), noise)

    adamw = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.01)
    denoise = Phase(name="denoise", networks=(network,), optimizer=adamw, loss=loss, samples=batch)
    policy = MemoryPolicy(
        precision=precision,
        phases={"denoise": PhasePolicy(**(phase or {}))},
        optimizers={"denoise": OptimizerPolicy(**(optimizer or {}))},
    )
    return Workload(
        applied=Applied(policy, [denoise], device=device),
        images=torch.randn(batch, 4, size, size, device=device),
        seeds=seeds(batch),
        networks={"UNet": network},
    )
