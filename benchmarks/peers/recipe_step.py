"""A phase of a recipe's training as our side of a comparison."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.peers.side import Step, optimizers_of

if TYPE_CHECKING:
    from lowvram.settings import Settings


def ours(settings: "Settings", phase: str, device: torch.device) -> Step:
    """The recipe's own: networks, phase and policy (micro-batches and memory.* as set)."""
    from lowvram.memory.apply import Applied
    from lowvram.memory.policy import MemoryPolicy
    from lowvram.memory.precision import choose
    from lowvram.tasks import build_task

    torch.manual_seed(0)
    task = build_task(settings, device)
    task.prepare_training()
    names = [one.name for one in task.phases]
    policy = MemoryPolicy.from_settings(settings, phases=names, precision=choose(settings.precision, device))
    applied = Applied(policy, task.phases, device=device)
    one = task.phases[names.index(phase)]
    images = task.example(settings.batch)
    labels, positions = torch.zeros(settings.batch, dtype=torch.int64), torch.arange(settings.batch)

    def run() -> None:
        with applied.running(one):
            loss, _ = applied.accumulate(one, one.micro_batches(images, labels, positions, 0, 0))
        applied.update(one, loss)

    return Step(
        run=run,
        held=[*(n for name, n in task.networks.items() if not name.endswith("_ema")), *optimizers_of(applied)],
        samples=settings.batch,
        details=counted(*one.networks) | {"micro_batch": one.micro_batch},
    )


def counted(*networks: nn.Module) -> dict[str, Any]:
    """For the record: parameters of networks together."""
    return {"parameters": sum(p.numel() for network in networks for p in network.parameters())}
