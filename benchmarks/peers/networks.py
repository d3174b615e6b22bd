"""Networks of torchvision and timm, not changed for it, under a plan for a small budget, beside plain training."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.side import Missing, Peer, Step, optimizers_of
from lowvram.memory.precision import autocast, choose
from lowvram.phase import MicroBatch, Phase

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan

_CLASSES = 1000
_LR = 1e-4
_CARD = "RTX 4060"  # that a plan is for where there is none


@dataclass(frozen=True, kw_only=True)
class Training:
    """A classifier in training. vram: what it gets; plainly it takes more."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    size: int
    vram: str


def _torchvision(name: str, **options: Any) -> nn.Module:
    try:
        import torchvision  # type: ignore[import-untyped]
    except ImportError as error:
        raise Missing("torchvision", error) from None
    return getattr(torchvision.models, name)(num_classes=_CLASSES, **options)


def _timm(name: str, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise Missing("timm", error) from None
    return timm.create_model(name, num_classes=_CLASSES, **options)


TRAININGS = {
    "torchvision_resnet50": Training(
        name="resnet50", make=lambda: _torchvision("resnet50"), batch=64, size=224, vram="4GB"
    ),
    "timm_vit": Training(
        name="vit_base_patch16_224", make=lambda: _timm("vit_base_patch16_224"), batch=64, size=224, vram="4GB"
    ),
}
SMALL = {
    "torchvision_resnet50": Training(
        name="resnet18", make=lambda: _torchvision("resnet18"), batch=16, size=128, vram="800MB"
    ),
    "timm_vit": Training(
        name="vit_tiny_patch16_224",
        make=lambda: _timm("vit_tiny_patch16_224", depth=4, img_size=160),
        batch=32,
        size=160,
        vram="800MB",
    ),
}


def _batch(training: Training) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(training.batch, 3, training.size, training.size, generator=generator)
    return images, torch.arange(training.batch) % _CLASSES


def plain(training: Training, device: torch.device) -> Step:
    """Autocast, the whole batch at once, AdamW in torch's fused kernel, fp16's loss scaled."""
    torch.manual_seed(0)
    network = training.make().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LR, fused=True)
    images, labels = _batch(training)
    precision = choose("auto", device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def run() -> None:
        with autocast(precision, device):
            loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Step(run=run, held=[network, optimizer], samples=training.batch, details={"precision": precision})


@functools.cache  # for the same network is built twice, once to measure its memory
def _plan(training: Training, device: torch.device) -> "Plan":
    from lowvram.planner.own import plan_memory

    on_gpu = device.type == "cuda"
    return plan_memory(
        [_phase(training)],
        training.vram,
        example=_batch(training),
        card=None if on_gpu else _CARD,
        precision="auto" if on_gpu else "fp32",  # in which it runs on a CPU
        name=training.name,
    )


def _phase(training: Training) -> Phase:
    torch.manual_seed(0)
    network = training.make()

    def loss(micro: MicroBatch) -> Tensor:
        return F.cross_entropy(network(micro.images), micro.labels)

    optimizer = torch.optim.AdamW(network.parameters(), lr=_LR)
    return Phase(name="train", networks=(network,), optimizer=optimizer, loss=loss, samples=training.batch)


def planned(training: Training, device: torch.device) -> Step:
    """The same under the plan for the budget, by which this process is bound on a GPU."""
    from lowvram.memory.guard import in_gb
    from lowvram.planner.own import apply_plan

    plan = _plan(training, device)
    applied = apply_plan(plan, [_phase(training)], device=device)
    (phase,) = applied.phases
    batch = _batch(training)
    return Step(
        run=lambda: applied.step(phase, batch),
        held=[*phase.networks, *optimizers_of(applied)],
        samples=training.batch,
        details={
            "vram": training.vram,
            "predicted_device": in_gb(plan.device_bytes),
            "micro_batch": phase.micro_batch,
            "activations": plan.policy.phase(phase.name).activations,
        },
    )


def peer(name: str, *, small: bool) -> Peer:
    """The comparison of that name."""
    training = (SMALL if small else TRAININGS)[name]
    return Peer(
        name=name,
        what=f"a training step of {training.name}, batch {training.batch} at {training.size}, with {training.vram}",
        sides={
            "planned": lambda device: planned(training, device),
            "plain": lambda device: plain(training, device),
        },
    )
