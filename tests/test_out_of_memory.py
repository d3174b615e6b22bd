"""Memory runs out at every kind of point of a training, and what comes out is what comes out without.

Faults are raised by hooks, in torch's own words. The reference is the same training without a fault. Where what was
done about it leaves the micro-batches as they were, everything must be bit-identical.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from test_equivalence import CALM, REORDERED, largest_difference, weights
from tiny import TINY
from torch import Tensor, nn

from lowvram import Trainer, checkpoint, load_recipe

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 5.79 GiB of which 1 GiB is free."
)
WANTED = "2048 MiB wanted"

# The smallest micro-batches for which the ladder has a cheaper step, one that changes no order of additions.
SMALL = ("micro_batch.G=4", "micro_batch.path_length=4", "micro_batch.D=4", "micro_batch.R1=4")
POLICIES = {
    "plain": (),
    "deferred": ("memory.update.G=deferred", "memory.update.D=deferred"),
    "streamed": (
        "memory.weights.G=stream", "memory.update.G=deferred", "memory.weights.D=stream", "memory.update.D=deferred",
    ),
    "state on the host": ("memory.state.G=host", "memory.state.D=host"),
    "8 bits": ("memory.optimizer.G=adam8bit", "memory.optimizer.D=adam8bit"),
    "offload": tuple(f"memory.activations.{phase}=offload" for phase in ("G", "path_length", "D", "R1")),
}  # fmt: skip


@dataclass
class Fault:
    """Raises at its calls number `at` to `at + times - 1`; of those while a phase runs, if that is named."""

    at: int = 1
    times: int = 1
    phase: str | None = None
    calls: int = 0
    raised: int = 0
    running: str = ""  # the phase that runs

    def __call__(self, *_: object, **__: object) -> None:
        if self.phase is not None and self.running != self.phase:
            return
        self.calls += 1
        if self.at <= self.calls < self.at + self.times:
            self.raised += 1
            raise torch.OutOfMemoryError(MESSAGE)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which this strikes first."""

        def struck(*args: Any, **kwargs: Any) -> Any:
            self()
            return function(*args, **kwargs)

        return struck


@dataclass
class Result:
    """All that a training leaves."""

    tensors: dict[str, Tensor]
    losses: list[dict[str, float]]
    said: list[str] = field(default_factory=list)


Install = Callable[[Trainer, Fault], None]


def train(recipe: object, install: Install | None = None, fault: Fault | None = None) -> Result:
    """Four steps, the first of them before the fault is installed."""
    trainer = Trainer(recipe, quiet=True)
    said: list[str] = []
    trainer.rescue.say = said.append
    losses = []
    for result in trainer:
        losses.append(result.losses)
        if trainer.step == 1 and install is not None:
            assert fault is not None
            trainer.progress.phase = partial(setattr, fault, "running")
            install(trainer, fault)
    assert trainer.step == 4
    assert fault is None or fault.raised == fault.times, "the fault was not met"
    tensors = weights(trainer) | trainer.task.tensors()
    for name, updater in trainer.applied.updaters.items():
        tensors |= {f"optimizer {name} {key}": tensor.clone() for key, tensor in updater.state()[0].items()}
        assert updater.count == {"G": 6, "D": 6}[name]  # none lost, none done twice
    saved = checkpoint.latest_good(trainer.run.checkpoints)
    assert saved is not None and saved.name == "step-00000004"
    for name, network in trainer.task.networks.items():
        for key, tensor in checkpoint.read(saved).tensors.get(name, {}).items():
            assert torch.equal(tensor, network.state_dict()[key])
    return Result(tensors=tensors, losses=losses, said=said)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The training of some settings without a fault."""

    @cache
    def make(*words: str) -> Result:
        out = tmp_path_factory.mktemp("reference") / "run"
        return train(load_recipe("faces32", [*TINY, f"out={out}", "kimg=0.032", *CALM, *words]))

    return make


def assert_same(got: Result, wanted: Result, tolerance: float = 0.0) -> None:
    assert largest_difference(got.tensors, wanted.tensors) <= tolerance
    if tolerance:
        for one, other in zip(got.losses, wanted.losses, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    else:
        assert got.losses == wanted.losses


# Points of a step.


def forward_of(network: str) -> Install:
    """In the forward of a network's second block."""

    def install(trainer: Trainer, fault: Fault) -> None:
        block = list(getattr(trainer.task, network).blocks().values())[1]
        block.register_forward_hook(fault)

    return install


def backward_of(network: str) -> Install:
    """In the backward, when the gradient of the network's first weight is made: those of most others are there."""

    def install(trainer: Trainer, fault: Fault) -> None:
        param = next(p for p in getattr(trainer.task, network).parameters() if p.dim() > 1)
        param.requires_grad_(True).register_hook(fault)
        param.requires_grad_(False)

    return install


def backward_of_a_module(trainer: Trainer, fault: Fault) -> None:
    """In the backward of a whole block of D."""
    next(iter(trainer.task.D.blocks().values())).register_full_backward_hook(fault)


def first_derivative(trainer: Trainer, fault: Fault) -> None:
    """In the derivative by the images that R1 takes, before the backward of the loss."""

    def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if fault.running == "R1":
            output.register_hook(fault)

    trainer.task.D.register_forward_hook(watch)


def terms_of(phase: str) -> Install:
    """As often as a term of a phase's loss is asked for, and once more at its end."""

    def install(trainer: Trainer, fault: Fault) -> None:
        (found,) = (p for p in trainer.task.phases if p.name == phase)
        loss = found.loss

        def terms(micro: object) -> Iterator[Tensor]:
            made = loss(micro)
            for term in iter([made]) if isinstance(made, Tensor) else made:
                fault()
                yield term
            fault()

        found.loss = terms

    return install


def update_of(name: str, when: str) -> Install:
    """Just before or after the inner optimizer of a middle part steps; under fault.at = 1 at the next update."""

    def install(trainer: Trainer, fault: Fault) -> None:
        parts = [part for bucket in trainer.applied.updaters[name].buckets.values() for part in bucket.parts]
        optimizer = parts[len(parts) // 2].optimizer
        hook = optimizer.register_step_pre_hook if when == "before" else optimizer.register_step_post_hook
        hook(fault)

    return install


def finish_of(phase: str) -> Install:
    def install(trainer: Trainer, fault: Fault) -> None:
        (found,) = (p for p in trainer.task.phases if p.name == phase)
        found.finish = fault.before(found.finish)

    return install


def average(trainer: Trainer, fault: Fault) -> None:
    (average,) = trainer.task.averages
    average.update = fault.before(average.update)


def settling(trainer: Trainer, fault: Fault) -> None:
    trainer.applied.settle = fault.before(trainer.applied.settle)


def copy_for_a_redo(trainer: Trainer, fault: Fault) -> None:
    snapshot = trainer.rescue._snapshot
    snapshot.take = fault.before(snapshot.take)


def grid(trainer: Trainer, fault: Fault) -> None:
    """In sampling, which happens when the run is saved."""
    trainer.task.G_ema.synthesis.register_forward_hook(fault)


def gathering(trainer: Trainer, fault: Fault) -> None:
    """While what a checkpoint holds is gathered."""
    trainer.applied.full_state = fault.before(trainer.applied.full_state)


# Under the plain policy: every kind of point.
POINTS: dict[str, tuple[Install, Fault]] = {
    "forward of G": (forward_of("G"), Fault(phase="G")),
    "forward of G without gradients": (forward_of("G"), Fault(phase="D")),
    "forward of D": (forward_of("D"), Fault(phase="D")),
    "forward of D in the phase of G": (forward_of("D"), Fault(phase="G", at=2)),
    "backward of G": (backward_of("G"), Fault(phase="G")),
    "backward of D": (backward_of("D"), Fault(phase="D")),
    "backward of a module of D": (backward_of_a_module, Fault(phase="D", at=3)),
    "second derivative of G": (backward_of("G"), Fault(phase="path_length")),
    "second derivative of D": (backward_of("D"), Fault(phase="R1", at=2)),
    "derivative by the images": (first_derivative, Fault(phase="R1")),
    "second-order forward": (forward_of("D"), Fault(phase="R1", at=2)),
    "between the terms of D": (terms_of("D"), Fault(at=2)),
    "after the last term of D": (terms_of("D"), Fault(at=6)),
    "second micro-batch of G": (terms_of("G"), Fault(at=3)),
    "before the step of G": (update_of("G", "before"), Fault()),
    "after the step of G": (update_of("G", "after"), Fault()),
    "before the step of path length": (update_of("G", "before"), Fault(phase="path_length")),
    "before the step of D": (update_of("D", "before"), Fault(at=2)),
    "after the step of D": (update_of("D", "after"), Fault(at=2)),
    "after the step of R1": (update_of("D", "after"), Fault(phase="R1")),
    "end of phase G": (finish_of("G"), Fault()),
    "end of phase path length": (finish_of("path_length"), Fault()),
    "the average": (average, Fault(at=2)),
    "what waits for the average": (settling, Fault()),
    "the copy for a redo": (copy_for_a_redo, Fault(at=3)),
    "sampling": (grid, Fault()),
    "gathering a checkpoint": (gathering, Fault(at=2)),
}


def fresh(fault: Fault, **changes: object) -> Fault:
    return Fault(**{"at": fault.at, "times": fault.times, "phase": fault.phase, **changes})


@pytest.mark.parametrize("point", POINTS)
def test_nothing_changes_with_a_fault_in(
    point: str, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    install, fault = POINTS[point]
    got = train(tiny("kimg=0.032", *CALM, *SMALL), install, fresh(fault))
    assert_same(got, reference(*SMALL))
    assert len(got.said) == 1 and WANTED in got.said[0]


SOME_POINTS = (
    "forward of G", "backward of D", "second derivative of D", "between the terms of D", "second micro-batch of G",
    "before the step of G", "after the step of D",
)  # fmt: skip


@pytest.mark.parametrize("point", SOME_POINTS)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "plain"])
def test_under_other_policies_too(
    policy: str, point: str, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    install, fault = POINTS[point]
    words = (*SMALL, *POLICIES[policy])
    # Two in a row, so that more than one step of the ladder is taken. An update has but one more try.
    times = 1 if "step" in point else 2
    got = train(tiny("kimg=0.032", *CALM, *words), install, fresh(fault, times=times))
    # A micro-batch of G or D can't be smaller. Offloaded, the second-order phases have no other step than that.
    halved = any("micro_batch" in line for line in got.said)
    assert_same(got, reference(*words), REORDERED if halved else 0.0)
    assert not (halved and point in ("forward of G", "backward of D"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("name", ["G", "D"])
def test_the_update_that_a_streamed_block_waits_for(
    name: str, when: str, at: int, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    """As it is loaded in a forward of its own phase, in that of the other network's, and when all are settled."""
    words = (*SMALL, *POLICIES["streamed"])
    got = train(tiny("kimg=0.032", *CALM, *words), update_of(name, when), Fault(at=at))
    assert_same(got, reference(*words))
    assert len(got.said) == 1


@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("phase", ["G", "path_length", "D", "R1"])
def test_smaller_micro_batches_change_no_more_than_the_order_of_sums(
    phase: str, times: int, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    network = "G" if phase in ("G", "path_length") else "D"
    got = train(tiny("kimg=0.032", *CALM), backward_of(network), Fault(phase=phase, times=times))
    assert_same(got, reference(), REORDERED)
    assert len(got.said) == times
    assert f"micro_batch.{phase}: " in "".join(got.said)
