"""R1 by differences in a training: its formula, its groups and random numbers, what it allows, what it saves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_equivalence import CALM, largest_difference, weights
from torch import Tensor

from lowvram import LowVRAMError, Trainer, seeded
from lowvram.memory.tracer import LiveBytes
from lowvram.phase import MicroBatch, Phase

Make = Callable[..., object]
KIND = "loss.r1_kind=finite_difference"
AUGMENTED = ("augment.mode=fixed", "augment.pipeline=bgcfnc", "augment.p=0.5")


def r1(trainer: Trainer) -> Phase:
    return next(phase for phase in trainer.task.phases if phase.name == "R1")


def batch(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
    pictures = trainer.task.dataset()
    images = torch.stack([torch.as_tensor(pictures[i]) for i in range(8)])
    return images, torch.full((8,), -1), torch.arange(8)


def gradients(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """The value and the gradients of the phase R1, as the trainer collects them."""
    phase = r1(trainer)
    for parameter in phase.parameters():
        parameter.grad = None
    with trainer.applied.running(phase):
        loss, _ = trainer.applied.accumulate(phase, phase.micro_batches(*batch(trainer), 0, 5))
    return float(loss), {n: p.grad / phase.every for n, p in trainer.task.D.named_parameters() if p.grad is not None}


def formula(trainer: Trainer, micro: MicroBatch, sigma: float) -> tuple[float, dict[str, Tensor]]:
    """gamma / 2 ((D(A(x + sigma eps)) - D(A(x - sigma eps))) / (2 sigma))^2 in one graph."""
    task, seeds = trainer.task, micro.seeds
    x = micro.images.float() / 127.5 - 1
    eps = torch.stack([seeded.randn(seeds[i : i + 1], 3, 16, 16, stream="r1")[0] for i in range(len(seeds))])
    parameters = dict(task.D.named_parameters())
    with r1(trainer).trainable():
        behind, ahead = (
            task.D(task.augment(images, seeds, stream="augment.real")) for images in (x - sigma * eps, x + sigma * eps)
        )
        loss = trainer.recipe.r1_gamma / 2 * ((ahead - behind) / (2 * sigma)).square().mean()
        grads = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, grads, strict=True))


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To within what the division by sigma leaves of fp32; a bias that cancels out is all rounding."""
    assert one.keys() == other.keys()
    scale = max(float(grad.abs().max()) for grad in other.values())
    for name, grad in one.items():
        assert (grad - other[name]).abs().max() <= 1e-3 * other[name].abs().max() + 1e-5 * scale, name


@pytest.mark.parametrize("sigma", [0.01, 0.1])
def test_loss_and_gradients_are_those_of_the_formula(tiny: Make, sigma: float) -> None:
    """Two terms, one graph at a time, against both in one graph; moved before the augmentation, which both share."""
    trainer = Trainer(tiny(KIND, f"loss.r1_sigma={sigma}", *AUGMENTED), quiet=True)
    loss, grads = gradients(trainer)
    (micro,) = r1(trainer).micro_batches(*batch(trainer), 0, 5)
    wanted, wanted_grads = formula(trainer, micro, sigma)
    assert loss == pytest.approx(wanted, rel=1e-3)
    assert loss > 0
    assert_alike(grads, wanted_grads)


def test_micro_batches_have_the_groups_and_the_steps_of_the_whole_batch(tiny: Make) -> None:
    trainer = Trainer(tiny(KIND, *AUGMENTED), quiet=True)
    loss, grads = gradients(trainer)
    r1(trainer).micro_batch = 4
    cut_loss, cut = gradients(trainer)
    assert cut_loss == pytest.approx(loss, rel=1e-3)
    assert_alike(cut, grads)


def test_on_average_it_is_the_exact_penalty(tiny: Make) -> None:
    trainer = Trainer(tiny(KIND, "augment.mode=none", "loss.r1_sigma=0.001"), quiet=True)
    task, phase = trainer.task, r1(trainer)
    (micro,) = phase.micro_batches(*batch(trainer), 0, 0)
    with phase.trainable():
        exact = task._r1_loss(micro).item()
        drawn = [
            next(phase.losses(micro)).item()
            for seed in range(1, 301)
            for micro in phase.micro_batches(*batch(trainer), 0, seed)
        ]
    # 2400 values with a standard deviation of sqrt(2) times their mean: 3% of it, and what curvature adds.
    assert sum(drawn) / len(drawn) == pytest.approx(exact, rel=0.12)


def test_r1_is_first_order_and_so_may_be_recomputed(tiny: Make, tmp_path: Path) -> None:
    recompute = "memory.activations.R1=recompute"
    phase = r1(Trainer(tiny(KIND, recompute), quiet=True))
    assert (phase.second_order, phase.terms, phase.every) == (False, 2, 2)
    exact = r1(Trainer(tiny("loss.r1_kind=exact", f"out={tmp_path / 'exact'}"), quiet=True))
    assert (exact.second_order, exact.terms) == (True, 1)
    with pytest.raises(LowVRAMError, match=r"memory\.activations\.R1=recompute saves nothing"):
        Trainer(tiny(recompute, f"out={tmp_path / 'refused'}"), quiet=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory.activations.R1=recompute",),
        pytest.param(("memory.activations.R1=offload",), marks=pytest.mark.slow),
        ("memory.weights.D=stream", "memory.update.D=deferred", "memory.state.D=host"),
    ],
)
def test_the_same_network_is_trained_under(tiny: Make, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    ends = []
    for name, more in (("plain", ()), ("saved", overrides)):
        trainer = Trainer(tiny("kimg=0.032", KIND, *CALM, *more, f"out={tmp_path}/{name}"), quiet=True)
        for result in trainer:
            assert all(map(torch.isfinite, map(torch.tensor, result.losses.values())))
        assert trainer.step == 4
        ends.append(weights(trainer))
    assert largest_difference(*ends) == 0


def peak_bytes(trainer: Trainer, name: str) -> int:
    """What the loss and backward of a phase make, at the most."""
    (phase,) = (phase for phase in trainer.task.phases if phase.name == name)
    with LiveBytes() as memory, trainer.applied.running(phase):
        trainer.applied.accumulate(phase, phase.micro_batches(*batch(trainer), 0, 5))
    return memory.peak_bytes


def test_it_takes_the_memory_of_phase_d_not_that_of_a_second_derivative(tiny: Make, tmp_path: Path) -> None:
    # Several blocks whose activations count, beside small weights.
    wide = ("resolution=64", "model.channel_base=512", "model.channel_max=64", "augment.mode=none")
    trainer = Trainer(tiny(KIND, *wide), quiet=True)
    plain = peak_bytes(trainer, "R1")
    assert plain < 1.05 * peak_bytes(trainer, "D")
    recomputed = Trainer(tiny(KIND, *wide, "memory.activations.R1=recompute", f"out={tmp_path / 'again'}"), quiet=True)
    assert peak_bytes(recomputed, "R1") < 0.85 * plain
    exact = Trainer(tiny(*wide, f"out={tmp_path / 'exact'}"), quiet=True)
    assert plain < 0.75 * peak_bytes(exact, "R1")


def test_a_run_can_change_its_kind_of_r1(tiny: Make) -> None:
    Trainer(tiny("kimg=0.016"), quiet=True).fit()
    again = Trainer(tiny("resume=auto", "kimg=0.032", KIND), quiet=True)
    assert (again.step, r1(again).second_order) == (2, False)
    again.fit()
    assert again.images_seen == 32
