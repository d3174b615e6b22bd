"""Faults for trainings on small networks: memory runs out where a test wants it, in torch's own words."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_equivalence import largest_difference, weights
from torch import Tensor, nn

from lowvram import Trainer, checkpoint
from lowvram.memory.update import Updater

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 5.79 GiB of which 1 GiB is free."
)
WANTED = "2048 MiB wanted"


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
    """Just before or after the inner optimizer of a middle part steps, also of the one that a new policy makes."""

    def install(trainer: Trainer, fault: Fault) -> None:
        def hook(updater: Updater) -> Updater:
            parts = [part for bucket in updater.buckets.values() for part in bucket.parts]
            optimizer = parts[len(parts) // 2].optimizer
            (optimizer.register_step_pre_hook if when == "before" else optimizer.register_step_post_hook)(fault)
            return updater

        make, applied = trainer.applied._make_updater, trainer.applied
        applied._make_updater = lambda made: hook(make(made)) if made == name else make(made)
        hook(applied.updaters[name])

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


# Optimizers, samplers and features that can be struck.


class Momentum(torch.optim.Optimizer):
    """Moves one weight after the other, and may be struck in between."""

    strike: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["sum"] = state.get("sum", torch.zeros_like(param)).add_(param.grad)
            self.strike()
            param.sub_(state["sum"], alpha=self.param_groups[0]["lr"])


def more_than(most: int) -> Callable[..., None]:
    """A hook that strikes where a module makes more than so many images at a time."""

    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if len(output) > most:
            raise torch.OutOfMemoryError(MESSAGE)

    return hook


class Means:
    """Features without a network: an image's mean colour, and that of a corner."""

    name, version, dim = "means", "1", 6

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError(MESSAGE)
        self.sizes.append(len(images))
        return torch.cat([images.float().mean((2, 3)), images[:, :, :4, :4].float().mean((2, 3))], dim=1)
