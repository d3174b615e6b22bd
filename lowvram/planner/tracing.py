"""Pieces of a training step, each recorded on fake tensors: a phase's micro-batch, an update, an average, a sample.

A whole step under any policy is put together from them (`compose`).
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from lowvram.memory import host
from lowvram.memory.apply import Applied
from lowvram.memory.blocks import blocks_of
from lowvram.memory.fsdp import local
from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.narrow_optimizer import NarrowOptimizer
from lowvram.memory.paged_optimizer import PagedOptimizer
from lowvram.memory.policy import BITSANDBYTES, NARROW, MemoryPolicy, OptimizerPolicy
from lowvram.memory.update import Updater
from lowvram.phase import Phase
from lowvram.planner import pretended
from lowvram.planner.log import AVERAGE, OPTIMIZER, TEMPORARY, WEIGHTS
from lowvram.planner.record import Piece, Recorder, rounded
from lowvram.planner.subject import Subject, fake_card


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What of a policy changes the operations of a phase, beside its activations.

    weights: of all optimizers, on the device or streamed. weights_dtype, precision, attention, fsdp, frozen: as in
    MemoryPolicy. processes: that share each step, a card for each; a plan is for one of them. triton: whether the card
    runs Triton's kernels. kinds: (optimizer, kind) of those that are not adam, where updates run within the phases.
    resident: as in MemoryPolicy; 0 where nothing streams.
    """

    weights: str = "device"
    weights_dtype: str = "fp32"
    precision: str = "fp32"
    attention: str = "sdpa"
    fsdp: str = "none"
    processes: int = 1
    triton: bool = False
    frozen: str = "device"
    kinds: tuple[tuple[str, str], ...] = ()
    resident: float = 0.0

    @classmethod
    def of(cls, policy: MemoryPolicy, *, processes: int = 1, triton: bool = False) -> "Structure":
        """The structure of a policy whose optimizers agree in it."""
        one = next(iter(policy.optimizers.values()), OptimizerPolicy())
        return cls(
            weights=one.weights,
            weights_dtype=one.weights_dtype,
            precision=policy.precision,
            attention=policy.attention,
            fsdp=policy.fsdp,
            processes=processes,
            triton=triton,
            frozen=policy.frozen,
            kinds=kinds_of({n: o.kind for n, o in policy.optimizers.items()}) if one.weights == "stream" else (),
            resident=policy.resident,
        )

    @property
    def has_slots(self) -> bool:
        """Whether some weights are streamed, trained or frozen ones."""
        return "stream" in (self.weights, self.frozen)

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and state are spread over the processes."""
        return self.fsdp != "none"

    def policy(self, optimizers: Sequence[str]) -> MemoryPolicy:
        """The policy under which pieces are recorded."""
        streams = self.weights == "stream"
        own = OptimizerPolicy(
            weights=self.weights, weights_dtype=self.weights_dtype, update="deferred" if streams else "after"
        )
        return MemoryPolicy(
            precision=self.precision,
            attention=self.attention,
            fsdp=self.fsdp,
            frozen=self.frozen,
            resident=self.resident,
            optimizers={name: replace(own, kind=dict(self.kinds).get(name, own.kind)) for name in optimizers},
        )


def kinds_of(kinds: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """As `Structure.kinds`: the kind of each optimizer, by name."""
    return tuple(sorted((name, kind) for name, kind in kinds.items() if kind != "adam"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece to record: `what` is "phase", "update", "average" or "sample".

    name: of the phase or the optimizer. samples: in the micro-batch or the slice. runs: micro-batches one after the
    other, with streamed or sharded weights.
    """

    structure: Structure
    what: str
    name: str = ""
    samples: int = 0
    runs: int = 1
    activations: str = "keep"
    recompute_every: int = 1
    optimizer: OptimizerPolicy = field(default_factory=OptimizerPolicy)


@dataclass(frozen=True, kw_only=True)
class Residents:
    """What is there throughout: sizes in bytes by place in log.CATEGORIES."""

    sizes: tuple[tuple[int, int], ...]  # (category, bytes)

    def total_bytes(self, category: int) -> int:
        """Of one category."""
        return sum(size for kind, size in self.sizes if kind == category)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a job gave.

    residents: of an update its optimizer's state; of a phase with streams the device's slots. step_sizes: of an update
    that begins inside the backward, the bytes that each parameter's gradient needs beside itself as it is complete.
    state_bytes: of an update, of its optimizer's state wherever that is. copied_bytes: weights that streams copied.
    """

    piece: Piece
    residents: Residents = Residents(sizes=())
    step_sizes: tuple[int, ...] = ()
    state_bytes: int = 0
    copied_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A network that streams. optimizer: None: it is frozen. blocks: their parameters' bytes, in the blocks' order."""

    optimizer: str | None
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What planning needs to know of a subject.

    phases: in the order of a step, with `samples` of all processes, `every`, `terms` and `clips` beside the ladder's
    facts.
    parameter_bytes, state_bytes: of each optimizer. largest_block_bytes: its weights. frozen_bytes: weights of frozen
    blocks, which can stream. average_slice_bytes: of averages that come to the device block by block. streams: of the
    structure, with all blocks that they stream.
    """

    phases: tuple[PhaseFacts, ...]
    samples: dict[str, int]
    every: dict[str, int]
    terms: dict[str, int]
    clips: dict[str, bool]
    optimizers: tuple[str, ...]
    residents: Residents
    average_bytes: int
    largest_block_bytes: int
    parameter_bytes: dict[str, int]
    state_bytes: dict[str, int]
    samples_images: bool
    own_precision: bool
    frozen_bytes: int = 0
    average_slice_bytes: int = 0
    streams: tuple[Stream, ...] = ()


class Tracer:
    """Records pieces of one subject under one structure. Use it within `tracer`."""

    def __init__(self, subject: Subject, structure: Structure, recorder: Recorder, fakes: FakeTensorMode) -> None:
        self.subject, self.structure, self.recorder, self._fakes = subject, structure, recorder, fakes
        self.phases = {phase.name: phase for phase in subject.phases}
        names: dict[int, str] = {}
        for phase in subject.phases:
            names.setdefault(id(phase.optimizer), phase.name)
        self.applied = Applied(
            structure.policy(list(names.values())),
            subject.phases,
            device=torch.device("cpu"),
            averages=subject.averages,
            own_precision=subject.own_precision,
            zero_nonfinite=subject.zero_nonfinite,
            blocks=subject.blocks,
            world_size=structure.processes,
            sum_over_processes=pretended.summed,
        )

        self.networks = _with_frozen(subject)
        recorder.call_networks(self.networks)  # sharded parameters are new ones
        for network in self.networks.values():
            recorder.know(local(tensor) for tensor in (*network.parameters(), *network.buffers()))
        recorder.know(subject.resident)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Tensors are fake within, and what is done is recorded."""
        collects = gc.isenabled()
        gc.disable()  # what is alive must not depend on when it runs
        try:
            card = fake_card(self._fakes, triton=self.structure.triton)
            with card, _processes(self.structure, self.recorder), self.recorder.recording():
                yield
        finally:
            if collects:
                gc.enable()

    def record(self, job: Job) -> Recorded:
        """The piece of a job."""
        gc.collect()
        recorded: Recorded = getattr(self, f"_{job.what}")(job)
        return recorded

    def facts(self) -> Facts:
        """Of the subject."""
        applied, subject = self.applied, self.subject
        applied.flush()  # streamed weights are on the host; slots count with the phases that use them
        averaged = {id(average.target) for average in subject.averages}
        sizes: list[tuple[int, int]] = []
        seen: set[int] = set()
        # Averages first: they may sit inside a frozen network.
        for network in sorted(self.networks.values(), key=lambda network: id(network) not in averaged):
            kind = AVERAGE if id(network) in averaged else WEIGHTS
            for tensor in (*network.parameters(), *network.buffers()):
                sizes += _sizes([local(tensor)], kind, seen)
        # A redone step starts from a copy of the buffers (memory.recovery.Snapshot).
        packed = {id(buffer) for buffer in applied.packed()}
        buffers = {id(b): b for network in self.networks.values() for b in network.buffers()}
        sizes += [(TEMPORARY, b.untyped_storage().nbytes()) for key, b in buffers.items() if key not in packed]
        sizes += _sizes(subject.resident, TEMPORARY, seen)
        if subject.batch_bytes:
            sizes.append((TEMPORARY, subject.batch_bytes // self.structure.processes))
        average_bytes = sum(size for kind, size in sizes if kind == AVERAGE)
        by_optimizer: dict[str, dict[int, int]] = {}
        for phase in subject.phases:
            own = by_optimizer.setdefault(applied.optimizer_names[phase.name], {})
            own.update({id(p): local(p).nbytes for p in phase.parameters()})  # not its storage's: streams share those
        return Facts(
            phases=tuple(applied.facts(phase) for phase in subject.phases),
            samples={phase.name: phase.samples for phase in subject.phases},
            every={phase.name: phase.every for phase in subject.phases},
            terms={phase.name: phase.terms for phase in subject.phases},
            clips={phase.name: phase.clip_norm is not None for phase in subject.phases},
            optimizers=tuple(dict.fromkeys(applied.optimizer_names.values())),
            residents=Residents(sizes=tuple(sizes)),
            average_bytes=average_bytes,
            largest_block_bytes=applied.largest_block_bytes(),
            parameter_bytes={name: sum(own.values()) for name, own in by_optimizer.items()},
            state_bytes={name: _state_bytes(updater) for name, updater in applied.updaters.items()},
            samples_images=subject.sample is not None,
            own_precision=subject.own_precision,
            frozen_bytes=applied.frozen_bytes(),
            average_slice_bytes=sum(_slice_bytes(average.target) for average in subject.averages),
            streams=tuple(
                Stream(optimizer=name, blocks=tuple(map(tuple, blocks))) for name, blocks in applied.streamed_bytes()
            ),
        )

    # Jobs.

    def _phase(self, job: Job) -> Recorded:
        phase = self.phases[job.name]
        self.applied.change(
            self.applied.policy.with_phase(
                job.name, activations=job.activations, recompute_every=job.recompute_every, micro_batch=None
            )
        )
        streams, sharded = self.structure.weights == "stream", self.structure.sharded
        updater = self.applied.updater(phase)
        if streams or sharded:  # once before, so that what a first run makes is there
            self._run(phase, replace(job, runs=1))
            updater.finish(torch.zeros([]), None) if streams else updater.discard()
        elif self.structure.has_slots:
            self.applied.make_slots()
        copied_bytes = self.applied.copied_bytes()
        self.recorder.start()
        with self._marked(updater), self._collecting(phase):
            self._run(phase, job)
        if streams:
            updater.finish(torch.zeros([]), None)
        piece = self.recorder.cut()
        copied_bytes = self.applied.copied_bytes() - copied_bytes
        updater.discard()
        self.applied.settle()
        gc.collect()
        slots = tuple((WEIGHTS, size) for size in self.applied.slot_sizes_bytes())
        return Recorded(piece=piece, residents=Residents(sizes=slots), copied_bytes=copied_bytes)

    def _run(self, phase: Phase, job: Job) -> None:
        def micro_batches() -> Iterator[Any]:
            for _ in range(job.runs):
                yield self.subject.micro_batch(phase, job.samples)

        with self.applied.running(phase):
            self.applied.accumulate(phase, micro_batches())

    @contextmanager
    def _collecting(self, phase: Phase) -> Iterator[None]:
        """Note gradients as they are complete, and send those of offloaded shards to the host."""
        offload = self.structure.fsdp == "offload"
        moving = pretended.gradients_to_the_host(phase.parameters()) if offload else nullcontext()
        with moving, self.recorder.collecting(phase.parameters()):
            yield

    @contextmanager
    def _marked(self, updater: Any) -> Iterator[None]:
        backward = updater.backward

        def marked(loss: Tensor) -> None:
            self.recorder.backward_begins()
            backward(loss)

        with mock.patch.object(updater, "backward", marked):
            yield

    def _update(self, job: Job) -> Recorded:
        own = self.applied.updaters[job.name]
        streams = [(s, s.on_load) for s in {b.stream for b in own.buckets.values()} if s is not None]
        updater = self.applied.another_updater(job.name, job.optimizer)
        if self.structure.fsdp == "offload":  # the host's, as the step is
            self.recorder.start()
            return Recorded(piece=self.recorder.cut())
        # Optimizers that are not known make their state in the first step, and those of 8 bits their tables. Of sharded
        # tensors torch works out the shapes of each operation once, on whole ones.
        if not _state_of(updater) or job.optimizer.kind in (*NARROW, *BITSANDBYTES) or self.structure.sharded:
            self._update_once(updater, 1.0 if self._clips(job.name) else None)
        residents = Residents(sizes=tuple(_sizes(_state_of(updater), OPTIMIZER, set())))
        state_bytes = _state_bytes(updater)
        params = updater.params
        step_sizes = []
        with updater.collecting():
            for param in params:
                param.grad = torch.empty_like(param)
                if job.optimizer.update == "after":
                    continue
                self.recorder.start()
                updater.take_gradient(param)
                live = _peak(self.recorder.cut())
                step_sizes.append(live)
        for bucket in updater.buckets.values():  # so that a stream's slots are there
            with bucket.on_device():
                pass
        self.recorder.start()
        updater.finish(torch.zeros([]), 1.0 if self._clips(job.name) else None)
        updater.flush()
        piece = self.recorder.cut()
        updater.close()
        for stream, on_load in streams:  # they called the other updater
            stream.on_load = on_load
        for param in params:
            param.grad = None
        return Recorded(piece=piece, residents=residents, step_sizes=tuple(step_sizes), state_bytes=state_bytes)

    @staticmethod
    def _update_once(updater: Updater, clip_norm: float | None) -> None:
        with updater.collecting():
            for param in updater.params:
                param.grad = torch.empty_like(param)
                if updater.policy.update != "after":
                    updater.take_gradient(param)
        updater.finish(torch.zeros([]), clip_norm)
        updater.flush()

    def _clips(self, optimizer: str) -> bool:
        return any(
            phase.clip_norm is not None
            for phase in self.subject.phases
            if self.applied.optimizer_names[phase.name] == optimizer
        )

    def _average(self, job: Job) -> Recorded:
        for _ in range(2 if self.structure.sharded else 1):  # as of an update
            self.recorder.start()
            for average in self.subject.averages:
                average.update(100_000, 1)
        return Recorded(piece=self.recorder.cut())

    def _sample(self, job: Job) -> Recorded:
        assert self.subject.sample is not None
        self.applied.make_slots()
        self.recorder.start()
        with self.applied.sampling():
            self.subject.sample(job.samples)
        return Recorded(piece=self.recorder.cut())


def _with_frozen(subject: Subject) -> dict[str, nn.Module]:
    """The networks of a subject by name, those that its phases go through too."""
    found = dict(subject.networks)
    known = {module for network in found.values() for module in network.modules()}
    for network in (network for phase in subject.phases for network in phase.frozen):
        if network not in known:
            name = type(network).__name__
            found[name if name not in found else f"{name} {len(found)}"] = network
            known.update(network.modules())
    return found


def _slice_bytes(network: nn.Module) -> int:
    """The most of a network that is on the device when it comes block by block."""
    blocks = [sum(local(p).nbytes for p in block.parameters()) for block in blocks_of(network).values()]
    return sum(local(p).nbytes for p in network.parameters()) - sum(blocks) + max(blocks, default=0)


def _state_of(updater: Updater) -> list[Tensor]:
    parts = [part for bucket in updater.buckets.values() for part in bucket.parts]
    values = tree_leaves([list(state.values()) for part in parts for state in part.optimizer.state.values()])
    for part in parts:  # what 8 bits stand for, and what a launch reads
        if isinstance(part.optimizer, (NarrowOptimizer, PagedOptimizer)):
            values += part.optimizer.workspace_tensors()
    return [local(value) for value in values if isinstance(value, Tensor)]


def _state_bytes(updater: Updater) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _state_of(updater))


def _sizes(tensors: Any, category: int, seen: set[int]) -> list[tuple[int, int]]:
    out = []
    for tensor in tensors:
        if not host.has_storage(tensor) or host.is_host(tensor):
            continue
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            out.append((category, storage.nbytes()))
    return out


def _peak(piece: Piece) -> int:
    storages = np.where(piece.order >= 0, piece.order, ~piece.order)
    if not len(storages):
        return 0
    return int(np.cumsum(np.where(piece.order >= 0, 1, -1) * rounded(piece.sizes)[storages]).max())


@contextmanager
def tracer(build: Callable[[], Subject], structure: Structure) -> Iterator[Tracer]:
    """A subject built on fake tensors, and what records its pieces. Only within `Tracer.active` are tensors fake."""
    with pretended.process_group(structure.processes) if structure.sharded else nullcontext():
        with fake_card(triton=structure.triton) as fakes:
            subject = build()
            recorder = Recorder({}, fakes)
            with _processes(structure, recorder):
                made = Tracer(subject, structure, recorder, fakes)
        try:
            yield made
        finally:
            subject.restore()


@contextmanager
def _processes(structure: Structure, recorder: Recorder) -> Iterator[None]:
    """Within, one process does as each of several would."""
    with ExitStack() as stack:
        if structure.processes > 1:
            stack.enter_context(pretended.summing())
        if structure.sharded:
            offload = structure.fsdp == "offload"
            stack.enter_context(pretended.sharding(offload=offload, resized=recorder.resized))
        yield
