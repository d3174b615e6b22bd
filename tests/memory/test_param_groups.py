"""Optimizers with several groups of parameters: each keeps its step size and weight decay under every update."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.memory.apply import apply
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.phase import MicroBatch, Phase


def phase_of(network: nn.Module, **second: Any) -> Phase:
    """Weights in one group, biases in another, in an order that is not the network's."""
    kinds = [[p for p in network.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW([{"params": kinds[0]}, {"params": kinds[1], **second}], lr=0.01, eps=0.01)
    return Phase(
        name="fit",
        networks=(network,),
        optimizer=optimizer,
        loss=lambda micro: network(micro.images).square().mean(),
        samples=4,
    )


@pytest.mark.parametrize("update", ["after", "deferred", "fused"])
def test_groups_of_ones_own_are_those_of_torch(update: Any) -> None:
    def stepped(own: bool) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
        phase = phase_of(network, lr=0.03, weight_decay=0.5)
        x = torch.randn(4, 4)
        policy = MemoryPolicy(optimizers={"fit": OptimizerPolicy(update=update)})
        applied = apply(policy, [phase], device="cpu", seed=0) if own else None
        for _ in range(3):
            micro = MicroBatch.of(x, torch.arange(4))
            if applied is None:
                phase.loss(micro).backward()
                phase.optimizer.step()
                phase.optimizer.zero_grad()
                continue
            with applied.running(phase):
                found, _ = applied.accumulate(phase, [micro])
            applied.update(phase, found)
        if applied is not None:
            applied.settle()
        return [p.detach().clone() for p in network.parameters()]

    for ours, theirs in zip(stepped(True), stepped(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_groups_that_differ_in_more_are_refused() -> None:
    phase = phase_of(nn.Linear(4, 4), betas=(0.5, 0.9))
    with pytest.raises(LowVRAMError, match=r"groups of parameters with betas=\(0\.9, 0\.999\) and \(0\.5, 0\.9\)"):
        apply(MemoryPolicy(), [phase], device="cpu", seed=0)
