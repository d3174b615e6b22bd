"""Memory runs out at every kind of point of a training, and what comes out is what comes out without.

Faults are raised by hooks, in torch's own words. The reference is the same training without a fault. Where what was
done about it leaves the micro-batches as they were, everything must be bit-identical.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
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
    """Raises at its calls of these numbers, from 1 on; of the calls while a phase runs, if that is named."""

    at: tuple[int, ...] = (1,)
    phase: str | None = None
    calls: int = 0
    raised: int = 0
    running: str = ""  # the phase that runs

    def __call__(self, *_: object, **__: object) -> None:
        if self.phase in (None, self.running):
            self.calls += 1
            if self.calls in self.at:
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


def train(recipe: object, *faults: tuple[Install, Fault]) -> Result:
    """Three steps, the first of them without faults, then a checkpoint."""
    trainer = Trainer(recipe, quiet=True)
    said: list[str] = []
    trainer.rescue.say = said.append

    def now(phase: str) -> None:
        for _, fault in faults:
            fault.running = phase

    trainer.progress.phase = now
    trainer.run.prepare()
    losses = []
    with closing(trainer.loader.iterate(0)) as batches:
        for step in range(3):
            losses.append(trainer.train_step(next(batches)).losses)
            if step == 0:
                for install, fault in faults:
                    install(trainer, fault)
    now("")
    trainer.save()
    for _, fault in faults:
        assert fault.raised == len(fault.at), f"{fault} was not met"
    assert [updater.count for updater in trainer.applied.updaters.values()] == [5, 5]  # none lost, none done twice
    tensors = weights(trainer) | trainer.task.tensors()
    for name, updater in trainer.applied.updaters.items():
        state, numbers = updater.state()
        tensors |= {f"optimizer {name} {key}": tensor.clone() for key, tensor in state.items()}
        tensors |= {f"optimizer {name} {key}": torch.tensor(number) for key, number in numbers["scalars"].items()}
    saved = checkpoint.read(trainer.run.checkpoints / "step-00000003")
    for name, network in trainer.task.networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, saved.tensors[name][key])
    assert trainer.run.grid_path(trainer.images_seen).is_file()
    return Result(tensors=tensors, losses=losses, said=said)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The training of some settings without a fault."""

    @cache
    def make(*words: str) -> Result:
        out = tmp_path_factory.mktemp("reference") / "run"
        return train(load_recipe("faces32", [*TINY, f"out={out}", *CALM, *words]))

    return make


def assert_same(got: Result, wanted: Result, tolerance: float = 0.0) -> None:
    assert largest_difference(got.tensors, wanted.tensors) <= tolerance, "\n".join(got.said)
    for one, other in zip(got.losses, wanted.losses, strict=True):
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-6) if tolerance else other)


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


def averaging(trainer: Trainer, fault: Fault) -> None:
    (average,) = trainer.task.averages
    average.update = fault.before(average.update)


def settling(trainer: Trainer, fault: Fault) -> None:
    trainer.applied.settle = fault.before(trainer.applied.settle)


def copying_for_a_redo(trainer: Trainer, fault: Fault) -> None:
    snapshot = trainer.rescue._snapshot
    snapshot.take = fault.before(snapshot.take)


def grid(trainer: Trainer, fault: Fault) -> None:
    """In sampling, which happens when the run is saved."""
    trainer.task.G_ema.synthesis.register_forward_hook(fault)


def gathering(trainer: Trainer, fault: Fault) -> None:
    """While what a checkpoint holds is gathered."""
    trainer.applied.full_state = fault.before(trainer.applied.full_state)


def writing(trainer: Trainer, fault: Fault) -> None:
    """While a checkpoint is written, of which some files are there by then."""

    class Struck(dict[str, Tensor]):
        def items(self) -> Any:
            fault()
            return super().items()

    state = trainer.applied.updaters["D"].state
    trainer.applied.updaters["D"].state = lambda: (Struck(state()[0]), state()[1])


# At every kind of point. The first step has all four phases and no fault, the second G and D, the third all.
POINTS: dict[str, list[tuple[Install, Fault]]] = {
    "forward": [
        (forward_of("G"), Fault(phase="G")),
        (forward_of("D"), Fault(phase="G", at=(4,))),
        (forward_of("G"), Fault(phase="path_length")),
        (forward_of("G"), Fault(phase="D")),  # without gradients
        (forward_of("D"), Fault(phase="D", at=(6,))),
        (forward_of("D"), Fault(phase="R1", at=(2,))),
    ],
    "backward": [
        (backward_of("G"), Fault(phase="G", at=(2,))),
        (backward_of("G"), Fault(phase="path_length")),
        (backward_of("D"), Fault(phase="D", at=(3, 7))),
        (backward_of("D"), Fault(phase="R1", at=(2,))),
    ],
    "backward of modules": [
        (backward_of_a_module, Fault(phase="D", at=(3,))),
        (first_derivative, Fault(phase="R1", at=(2,))),
    ],
    "between terms and micro-batches": [
        (terms_of("G"), Fault(at=(2, 5))),
        (terms_of("D"), Fault(at=(2, 9))),
        (terms_of("path_length"), Fault(at=(2,))),
        (terms_of("R1"), Fault(at=(3,))),
    ],
    "before the optimizer steps": [
        (update_of("G", "before"), Fault(at=(1, 3))),
        (update_of("G", "before"), Fault(phase="path_length", at=(1, 2))),
        (update_of("D", "before"), Fault(phase="D", at=(2,))),
        (update_of("D", "before"), Fault(phase="R1")),
    ],
    "after the optimizer stepped": [
        (update_of("G", "after"), Fault(at=(1, 2))),
        (update_of("G", "after"), Fault(phase="path_length")),
        (update_of("D", "after"), Fault(phase="D", at=(2,))),
        (update_of("D", "after"), Fault(phase="R1")),
    ],
    "around a step": [
        (copying_for_a_redo, Fault(at=(2, 3))),
        (finish_of("G"), Fault(at=(2,))),
        (finish_of("path_length"), Fault()),
        (settling, Fault()),
        (averaging, Fault(at=(1,))),
    ],
    "saving": [
        (grid, Fault()),
        (gathering, Fault(at=(2,))),
        (writing, Fault()),
    ],
}


@pytest.mark.parametrize("where", POINTS)
def test_faults_change_nothing(where: str, tiny: Callable[..., object], reference: Callable[..., Result]) -> None:
    faults = [(install, replace(fault)) for install, fault in POINTS[where]]
    got = train(tiny(*CALM, *SMALL), *faults)
    assert_same(got, reference(*SMALL))
    assert len(got.said) == sum(len(fault.at) for _, fault in faults)
    assert all(WANTED in line for line in got.said)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "plain"])
def test_nor_under_another_policy(policy: str, tiny: Callable[..., object], reference: Callable[..., Result]) -> None:
    words = (*SMALL, *POLICIES[policy])
    got = train(
        tiny(*CALM, *words),
        (forward_of("G"), Fault(phase="G")),
        (terms_of("D"), Fault(at=(4,))),
        (backward_of("D"), Fault(phase="R1", at=(2,))),
        (update_of("G", "before"), Fault(at=(2,))),
        (update_of("D", "after"), Fault(at=(1,))),
    )
    assert_same(got, reference(*words))
    assert len(got.said) == 5


@pytest.mark.parametrize("name", ["G", "D"])
def test_nor_in_the_updates_that_streamed_blocks_wait_for(
    name: str, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    """When a block is loaded in a forward of either network's phase, and when all are settled."""
    words = (*SMALL, *POLICIES["streamed"])
    before, after = Fault(at=(1, 4)), Fault(at=(2, 3))
    got = train(tiny(*CALM, *words), (update_of(name, "before"), before), (update_of(name, "after"), after))
    assert_same(got, reference(*words))
    assert {line.split(" (")[0].split(" in ")[1] for line in got.said} > {"the average"}
    assert any("the step is done again" in line for line in got.said)


@pytest.mark.parametrize("times", [1, 3])
def test_smaller_micro_batches_change_no_more_than_the_order_of_sums(
    times: int, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    phases = {"G": "G", "path_length": "G", "D": "D", "R1": "D"}
    at = tuple(range(1, times + 1))
    got = train(tiny(*CALM), *((backward_of(network), Fault(phase=name, at=at)) for name, network in phases.items()))
    assert_same(got, reference(), REORDERED)
    assert len(got.said) == 4 * times
    for name in phases:
        assert sum(f"micro_batch.{name}: " in line for line in got.said) >= 1
