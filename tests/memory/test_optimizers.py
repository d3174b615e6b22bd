"""Optimizers by kind: the hyperparameters arrive, and every kind learns."""

from typing import Any

import pytest
import torch
from torch import nn

from lowvram import LowVRAMError
from lowvram.memory import optimizers
from lowvram.memory.optimizer_classes import SecondMomentAdam

KINDS = ("adam", "adam8bit", "paged_adam", "paged_adam8bit", "lion8bit", "adafactor")


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(70, 100))]


@pytest.mark.parametrize("own", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_hyperparameters_are_the_task_s(kind: str, beta1: float, own: Any) -> None:
    pytest.importorskip("bitsandbytes")
    like = own(one(), lr=0.5, betas=(beta1, 0.97), eps=1e-5, weight_decay=0.03)
    like.param_groups[0]["lr"] = 0.25  # a schedule's doing
    (group,) = optimizers.build(kind, one(), like=like).param_groups
    assert group["lr"] == 0.25
    assert tuple(group["betas"]) == (beta1, 0.97)
    assert group["weight_decay"] == 0.03
    if kind != "adafactor":
        assert group["eps"] == 1e-5
        assert group["decoupled_weight_decay"] == (own is torch.optim.AdamW)


def test_adam_is_fused_and_without_beta1_keeps_no_first_moment() -> None:
    params = one()
    built = optimizers.build("adam", params, like=torch.optim.AdamW(one()))
    assert type(built) is torch.optim.AdamW
    assert built.param_groups[0]["fused"] is True
    built = optimizers.build("adam", params, like=torch.optim.Adam(one(), betas=(0.0, 0.99)))
    assert type(built) is SecondMomentAdam
    optimizers.init_state(built)
    held = sum(v.nbytes for v in built.state[params[0]].values())
    assert held == 4 * 7000 + 4  # Adam itself holds twice that
    kept = optimizers.build("adam", params, like=torch.optim.Adam(one(), betas=(0.0, 0.99), amsgrad=True))
    assert type(kept) is torch.optim.Adam and kept.param_groups[0]["amsgrad"]


def test_other_optimizers_stay_what_they_are() -> None:
    class Slower(torch.optim.Adam):
        pass

    built = optimizers.build("adam", one(), like=torch.optim.SGD(one(), lr=0.1, momentum=0.8, nesterov=True))
    assert type(built) is torch.optim.SGD
    assert (built.param_groups[0]["momentum"], built.param_groups[0]["nesterov"]) == (0.8, True)
    assert type(optimizers.build("adam", one(), like=Slower(one()))) is Slower
    with pytest.raises(LowVRAMError, match=r"optimizer=adam8bit.*SGD"):
        optimizers.build("adam8bit", one(), like=torch.optim.SGD(one(), lr=0.1))


def test_what_a_kind_does_not_know_is_said() -> None:
    with pytest.raises(LowVRAMError, match=r"optimizer=adam4bit is not known.*\n.*lion8bit"):
        optimizers.build("adam4bit", one(), like=torch.optim.Adam(one()))
    with pytest.raises(LowVRAMError, match="2 groups"):
        optimizers.build("adam", one(), like=torch.optim.Adam([{"params": one()}, {"params": one()}]))
    for option in ("amsgrad", "maximize"):
        like = torch.optim.Adam(one(), **{option: True})
        with pytest.raises(LowVRAMError, match=f"adafactor.*{option}"):
            optimizers.build("adafactor", one(), like=like)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_a_small_regression(kind: str, beta1: float) -> None:
    """As far as fp32 Adam does, within a factor of 1.5 in the loss, from a loss a hundred times higher."""
    pytest.importorskip("bitsandbytes")
    reached = losses(kind, beta1)
    assert reached[-1] < reached[0] / 100
    assert reached[-1] < 1.5 * losses("adam", beta1)[-1] + 1e-3


def losses(kind: str, beta1: float) -> list[float]:
    torch.manual_seed(0)
    inputs = torch.randn(256, 64)
    teacher = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))
    targets = teacher(inputs).detach()
    network = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 4))  # 6144 weights in 8 bits
    lr = {"lion8bit": 1e-3, "adafactor": 0.05}.get(kind, 5e-3)
    steps = 200
    optimizer = optimizers.build(
        kind, network.parameters(), like=torch.optim.Adam(network.parameters(), lr=lr, betas=(beta1, 0.99))
    )
    reached = []
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / steps)
        loss = (network(inputs) - targets).square().mean()
        network.zero_grad()
        loss.backward()
        optimizer.step()
        reached.append(loss.item())
    return reached
