"""Step sizes over a run: against diffusers' schedules, and as the trainer sets them, also after a resume."""

from pathlib import Path

import pytest
import torch
from diffusers import optimization as published
from hypothesis import given
from hypothesis import strategies as st
from tiny_diffusion import steps, vae_recipe

from lowvram import Trainer
from lowvram.errors import LowVRAMError
from lowvram.settings.common import STEP_SCHEDULES, AdamSettings
from lowvram.tasks.step_size import StepSizes

STEPS, BATCH, LR = 20, 8, 0.004


def settings(**changes: object) -> AdamSettings:
    usual = {"lr": LR, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0, "clip_norm": None}
    return AdamSettings(**{**usual, "warmup_kimg": 0.0, **changes})


def optimizer(lr: float = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def step_sizes(*optimizers: torch.optim.Optimizer, **changes: object) -> StepSizes:
    return StepSizes(optimizers, settings(**changes), kimg=STEPS * BATCH / 1000, batch=BATCH)


THEIRS = {
    "linear": lambda it: published.get_linear_schedule_with_warmup(it, 4, STEPS),
    "cosine": lambda it: published.get_cosine_schedule_with_warmup(it, 4, STEPS),
    "cosine_restarts": lambda it: published.get_cosine_with_hard_restarts_schedule_with_warmup(it, 4, STEPS, 3),
    "polynomial": lambda it: published.get_polynomial_decay_schedule_with_warmup(
        it, 4, STEPS, lr_end=0.25 * LR, power=3
    ),
}


@pytest.mark.parametrize("schedule", THEIRS)
def test_schedules_are_those_that_others_call_so(schedule: str) -> None:
    theirs, ours = optimizer(), optimizer()
    scheduler = THEIRS[schedule](theirs)
    final = 0.25 if schedule == "polynomial" else 0.0
    sizes = step_sizes(ours, schedule=schedule, warmup_kimg=4 * BATCH / 1000, power=3.0, cycles=3, final_lr=final)
    for step in range(STEPS + 1):
        sizes.set(step)
        if step >= 4:
            assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-9), step
        else:  # theirs wastes the first step, of size 0
            assert ours.param_groups[0]["lr"] == pytest.approx(LR * (step + 1) / 4)
        theirs.step()
        scheduler.step()


@given(
    st.sampled_from(STEP_SCHEDULES),
    st.integers(0, 30),
    st.floats(0, 1),
    st.floats(0.1, 5),
    st.integers(1, 9),
    st.integers(0, 40),
)
def test_the_share_stays_between_its_ends(
    schedule: str, warmup: int, final: float, power: float, cycles: int, step: int
) -> None:
    sizes = step_sizes(schedule=schedule, warmup_kimg=warmup * BATCH / 1000, final_lr=final, power=power, cycles=cycles)
    share = sizes.share(step)
    assert 0 <= share <= 1
    if step < STEPS:
        assert share > 0  # no step of a run is wasted
    if step >= max(warmup, STEPS):
        assert share == (1.0 if schedule == "constant" else final)
    if step in (warmup - 1, warmup) and step < STEPS:
        assert share == 1


def test_each_optimizer_keeps_its_own_size() -> None:
    one, two = optimizer(1e-3), optimizer(5e-4)
    two.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    step_sizes(one, two, schedule="linear").set(STEPS // 2)
    assert one.param_groups[0]["lr"] == pytest.approx(5e-4)
    assert [group["lr"] for group in two.param_groups] == pytest.approx([2.5e-4] * 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "cos"}, "optimizer.schedule=cos is not known"),
        ({"final_lr": 1.5}, "optimizer.final_lr=1.5"),
        ({"final_lr": -0.1}, "optimizer.final_lr=-0.1"),
        ({"power": 0.0}, "optimizer.power=0.0 must be above 0"),
        ({"cycles": 0}, "optimizer.cycles=0"),
    ],
)
def test_what_is_no_schedule_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(LowVRAMError, match=said):
        settings(**changes)


def sizes_of(trainer: Trainer, n: int | None = None) -> list[float]:
    """The step size that each of the next n steps updates the autoencoder by, in what really updates it."""
    optimizer = trainer.applied.updaters["autoencoder"].buckets["rest"].parts[0].optimizer
    seen: list[float] = []
    hook = optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    steps(trainer, n)
    hook.remove()
    return seen


def test_a_resumed_run_goes_on_in_its_schedule(tmp_path: Path) -> None:
    words = ["kimg=0.064", "snapshot_kimg=0.016", "optimizer.warmup_kimg=0.016", "optimizer.lr=0.001"]
    words += ["optimizer.schedule=cosine", "optimizer.final_lr=0.1", "loss.adversarial_weight=0"]
    whole = sizes_of(Trainer(vae_recipe(tmp_path / "whole", *words), quiet=True))
    assert whole[:3] == pytest.approx([0.0005, 0.001, 0.001])
    assert len(whole) == 8 and whole[3:] == sorted(whole[3:], reverse=True) and 0.0001 < whole[-1] < 0.0002
    first = sizes_of(Trainer(vae_recipe(tmp_path / "stopped", *words), quiet=True), 5)
    again = Trainer(vae_recipe(tmp_path / "stopped", *words, "resume=auto"), quiet=True)
    rest = sizes_of(again)
    assert first + rest[1:] == whole and rest[0] == whole[4]  # the fifth step was not saved, and is taken again
