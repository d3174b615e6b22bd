"""What an update refuses before it changes anything."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.memory.apply import Applied, apply
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.phase import MicroBatch, Phase


def training(beta1: float, **policy: Any) -> tuple[nn.Module, Phase, Applied]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    phase = Phase(
        name="fit",
        networks=(network,),
        optimizer=torch.optim.Adam(network.parameters(), lr=0.01, betas=(beta1, 0.9)),
        loss=lambda micro: network(micro.images).square().mean(),
        samples=4,
    )
    applied = apply(MemoryPolicy(optimizers={"fit": OptimizerPolicy(**policy)}), [phase], device="cpu", seed=0)
    return network, phase, applied


def backward(phase: Phase, applied: Applied) -> Tensor:
    micro = MicroBatch.of(torch.ones(4, 4), torch.arange(4))
    with applied.running(phase):
        loss, _ = applied.accumulate(phase, iter([micro]))
    return loss


def step(phase: Phase, applied: Applied) -> None:
    applied.update(phase, backward(phase, applied))
    applied.settle()


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("kind", ["adam", "adam8bit"])
@pytest.mark.parametrize("update", ["after", "deferred", "fused"])
@pytest.mark.parametrize(("first", "then"), [(0.0, 0.5), (0.5, 0.0)])
def test_beta1_that_moves_from_0_or_to_it_is_refused(first: float, then: float, update: str, kind: str) -> None:
    network, phase, applied = training(first, update=update, kind=kind)
    group = phase.optimizer.param_groups[0]
    step(phase, applied)
    before = weights(network)
    group["betas"] = (then, 0.9)
    with pytest.raises(LowVRAMError) as error:
        step(phase, applied)
    assert f"the optimizer fit went from beta1={first} to {then}" in error.value.problem
    assert "memory.optimizer.fit=adafactor" in error.value.remedy
    assert equal(weights(network), before)
    group["betas"] = (first, 0.99)
    step(phase, applied)
    assert not equal(weights(network), before)


@pytest.mark.parametrize("update", ["after", "deferred"])
def test_it_is_refused_between_gradients_and_update(update: str) -> None:
    network, phase, applied = training(0.0, update=update)
    before = weights(network)
    loss = backward(phase, applied)
    phase.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    with pytest.raises(LowVRAMError, match=r"beta1=0\.0 to 0\.5"):
        applied.update(phase, loss)
    applied.settle()
    assert equal(weights(network), before)


@pytest.mark.parametrize("kind", ["adafactor", "lion8bit"])
def test_kinds_whose_state_does_not_depend_on_it_go_on(kind: str) -> None:
    network, phase, applied = training(0.0, kind=kind)
    step(phase, applied)
    before = weights(network)
    phase.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    step(phase, applied)
    after = weights(network)
    assert not equal(after, before)
    assert all(x.isfinite().all() for x in after)
