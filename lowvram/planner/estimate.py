"""What a policy needs and takes: bytes alive, seconds of a step, and the whole step's requests for a replay.

Parts of a step don't overlap in memory, so that a step's peak is the highest of its parts' beside what is there
throughout; and the time of a step is the sum of its parts'.

Pieces are recorded with all blocks of a stream on the host. A share that stays on the device is worked out from them:
its weights are there throughout, slots are for the largest of the others, and less is copied.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.memory.stream_parts import aligned, staying
from lowvram.planner import cost
from lowvram.planner.allocator import Replay, replay
from lowvram.planner.cards import Card
from lowvram.planner.compose import Flow, Taking, Writer, flow
from lowvram.planner.cost import Rates
from lowvram.planner.log import AVERAGE, OPTIMIZER, WEIGHTS, Requests, Work
from lowvram.planner.options import streams_all
from lowvram.planner.pieces import Pieces
from lowvram.planner.record import Piece
from lowvram.planner.tracing import Facts, Job, Recorded, Stream, Structure

STEPS = 2  # of a replay: the second finds what the first left of the allocator's segments
Choice = tuple[int, str, int]  # micro_batch, activations, recompute_every


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """peak_bytes: beside what is there throughout. seconds, flops, host_bytes: of one run, all micro-batches."""

    peak_bytes: int
    seconds: float
    flops: float = 0.0
    host_bytes: float = 0.0
    gpu_seconds: float = 0.0
    offloaded_bytes: float = 0.0  # on the host at one time


class Estimator:
    """Prices the parts of a step when weights are held in one way, on one card.

    exact: smaller micro-batches than were interpolated from are recorded themselves.
    """

    def __init__(self, pieces: Pieces, structure: Structure, card: Card, rates: Rates | None = None) -> None:
        self.pieces, self.structure, self.card = pieces, structure, card
        self.rates = cost.default_rates(card) if rates is None else rates
        self.exact: set[Job] = set()
        self._phases: dict[tuple[str, Choice, OptimizerPolicy], PartCost] = {}
        self._updates: dict[tuple[str, OptimizerPolicy], PartCost] = {}

    @cached_property
    def facts(self) -> Facts:
        """Of the subject."""
        return self.pieces.facts(self.recorded_under)

    @property
    def recorded_under(self) -> Structure:
        """The structure under which pieces are recorded."""
        return replace(self.structure, resident=0.0)

    @property
    def streams(self) -> bool:
        """Whether trained weights are streamed: then a phase's piece holds its update."""
        return self.structure.weights == "stream"

    @property
    def as_recorded(self) -> bool:
        """Whether a second micro-batch is recorded after the first: what becomes of gradients is in the piece."""
        return self.streams or self.structure.sharded

    # Parts.

    def job(self, phase: PhaseFacts, choice: Choice) -> Job:
        """What records a phase's micro-batch."""
        micro, activations, every = choice
        structure = self.structure if self._is_recorded_anew(phase, choice) else self.recorded_under
        if structure != self.structure and streams_all(phase, structure):
            activations = "keep"  # the name of what streamed blocks do, which is to be recomputed
        runs = 2 if self.as_recorded and micro < phase.samples_per_process else 1
        return Job(
            structure=structure,
            what="phase",
            name=phase.name,
            samples=micro,
            runs=runs,
            activations=activations,
            recompute_every=every if activations == "recompute" else 1,
        )

    def _is_recorded_anew(self, phase: PhaseFacts, choice: Choice) -> bool:
        """Whether blocks that stay on the device do something else than to be recomputed, one by one."""
        return self.structure.resident > 0 and phase.has_blocks and choice[1:] != ("recompute", 1)

    def wanted(self, phase: PhaseFacts, choice: Choice) -> Job:
        """What has to be recorded to know a choice."""
        job = self.job(phase, choice)
        return job if job in self.exact else self.pieces.base(job, phase.group)

    def recorded(self, phase: PhaseFacts, choice: Choice) -> Recorded:
        """A phase's micro-batch."""
        job = self.job(phase, choice)
        return self.pieces.get(job) if job in self.exact else self.pieces.like(job, phase.group)

    def phase(self, phase: PhaseFacts, choice: Choice, own: OptimizerPolicy) -> PartCost:
        """One run of a phase under its optimizer's policy, its update not included unless weights stream."""
        key = (phase.name, choice, replace(own, kind="adam", state="device"))
        if key not in self._phases:
            self._phases[key] = self._price_phase(phase, choice, own)
        return self._phases[key]

    def _price_phase(self, phase: PhaseFacts, choice: Choice, own: OptimizerPolicy) -> PartCost:
        recorded = self.recorded(phase, choice)
        piece = recorded.piece
        copied = piece.work.host_bytes
        if self._is_recorded_anew(phase, choice):  # with the state of what stays beside it
            beside = self.resident_state(phase.optimizer, replace(own, state="device"))
            copied += 2 * sum(beside) if own.state == "host" else 0
        else:
            copied = max(0.0, copied - self._saved_bytes(recorded, phase, own))
        count = -(-phase.samples_per_process // choice[0])
        flows = self.flows(phase, choice, own)
        peak = held = self._slots_bytes(phase)
        for one in flows:
            peak = max(peak, held + one.peak_bytes())
            held += int(one.sizes[one.gradients].sum())
        host = self._gradient_traffic(piece, count, own)
        runs = 2 if self.as_recorded and count > 1 else 1
        time = cost.seconds(replace(piece.work, host_bytes=0.0), self.card, self.rates)
        times = count / runs
        pcie = (copied * times + host) / (self.card.pcie_bytes_per_second * self.rates.pcie)
        busy = max(time.gpu_seconds, time.launch_seconds) * times
        return PartCost(
            peak_bytes=peak,
            seconds=busy + max(0.0, pcie - self.rates.overlap * busy),
            gpu_seconds=time.gpu_seconds * times,
            flops=float(piece.work.flops.sum()) * times,
            host_bytes=copied * times + host,
            offloaded_bytes=piece.work.host_bytes / 2 if choice[1] == "offload" else 0.0,
        )

    def _saved_bytes(self, recorded: Recorded, phase: PhaseFacts, own: OptimizerPolicy) -> float:
        """What a recorded phase copied between host and device of the blocks that stay on the device."""
        whole = sum(map(sum, (block for stream in self.facts.streams for block in stream.blocks)))
        if not whole:
            return 0.0
        weights = recorded.copied_bytes * sum(size for sizes in self._staying.values() for size in sizes) / whole
        return weights + 2 * sum(self.resident_state(phase.optimizer, own))

    def flows(self, phase: PhaseFacts, choice: Choice, own: OptimizerPolicy) -> list[Flow]:
        """The first micro-batch of a phase, and one of the others if there are."""
        piece = self.recorded(phase, choice).piece
        if self.as_recorded:  # both micro-batches, and what became of their gradients
            return [flow(piece, Taking())]
        sizes = self._step_sizes(phase, own)
        first = flow(piece, Taking(update=own.update, step_sizes=sizes))
        if choice[0] >= phase.samples_per_process:
            return [first]
        return [first, flow(piece, Taking(update=own.update, later=True, step_sizes=sizes))]

    def _step_sizes(self, phase: PhaseFacts, own: OptimizerPolicy) -> tuple[int, ...]:
        return self.update_piece(phase.optimizer, own).step_sizes if own.update == "fused" else ()

    def _gradient_traffic(self, piece: Piece, count: int, own: OptimizerPolicy) -> float:
        if own.update != "deferred" or self.streams:
            return 0.0
        size = float(sum(piece.sizes[storage] for _, storage, _ in piece.arrivals))
        return size * (2 * count - 1)

    def update_job(self, optimizer: str, own: OptimizerPolicy) -> Job:
        """What records an update. Streamed weights' are recorded deferred, as their phases are."""
        own = replace(own, update="deferred") if self.streams else own
        return Job(structure=self.recorded_under, what="update", name=optimizer, optimizer=own)

    def update_piece(self, optimizer: str, own: OptimizerPolicy) -> Recorded:
        """An update as recorded, its state among the residents."""
        return self.pieces.get(self.update_job(optimizer, own))

    def update(self, optimizer: str, own: OptimizerPolicy) -> PartCost:
        """One update, beside its gradients."""
        key = (optimizer, own)
        if key not in self._updates:
            recorded = self.update_piece(optimizer, own)
            one = flow(recorded.piece, Taking(later=True))
            gradients = self.facts.parameter_bytes[optimizer] if own.update == "after" and not self._offloads else 0
            # What a fused update does, it does within the backward: as much as one that follows it.
            whole = self.update_piece(optimizer, replace(own, update="after")) if own.update == "fused" else recorded
            work = whole.piece.work
            work = replace(work, host_bytes=work.host_bytes + self._summed_bytes(optimizer))
            seconds = self._alone(work)
            if self._offloads:
                seconds += self.facts.parameter_bytes[optimizer] / 4 / cost.HOST_PARAMETERS_PER_SECOND
            self._updates[key] = PartCost(
                peak_bytes=one.peak_bytes() + gradients + self._slots_bytes(),
                seconds=0.0 if self.streams else seconds,
                host_bytes=0.0 if self.streams else work.host_bytes,
            )
        return self._updates[key]

    @property
    def _offloads(self) -> bool:
        return self.structure.fsdp == "offload"

    def _summed_bytes(self, optimizer: str) -> float:
        """What a card sends and receives to sum whole gradients, in a ring; sharded ones' is in the phases' pieces."""
        if self.structure.sharded:
            return 0.0
        return 2 * self.facts.parameter_bytes[optimizer] * (1 - 1 / self.structure.processes)

    def average(self, place: str) -> PartCost:
        """The averages' update."""
        if not self.facts.average_bytes:
            return PartCost(peak_bytes=0, seconds=0.0)
        recorded = self.pieces.get(Job(structure=self.recorded_under, what="average"))
        host = float(self.facts.average_bytes) if place == "host" else 0.0
        work = replace(recorded.piece.work, host_bytes=host)
        peak = 0 if place == "host" else flow(recorded.piece, Taking(later=True)).peak_bytes()
        return PartCost(peak_bytes=peak + self._slots_bytes(), seconds=self._alone(work), host_bytes=host)

    def _sampled(self, slice_: int) -> Recorded:
        return self.pieces.like(Job(structure=self.recorded_under, what="sample", samples=slice_), 1)

    def _alone(self, work: Work) -> float:
        """Seconds of work whose copies nothing runs beside."""
        time = cost.seconds(replace(work, host_bytes=0.0), self.card, self.rates)
        return time.total_seconds + work.host_bytes / (self.card.pcie_bytes_per_second * self.rates.pcie)

    # A whole policy.

    def residents(self, optimizers: Mapping[str, OptimizerPolicy], ema: str) -> list[tuple[int, int]]:
        """What is there throughout: (category, bytes) of each storage."""
        sizes = [(kind, size) for kind, size in self.facts.residents.sizes if ema == "device" or kind != AVERAGE]
        for name, own in optimizers.items():
            state = self.update_piece(name, own).residents.sizes
            sizes += [(OPTIMIZER, size) for _, size in state]
            sizes += [(OPTIMIZER, size) for size in self.resident_state(name, own)]
        return sizes + [(WEIGHTS, size) for own_sizes in self._staying.values() for size in own_sizes]

    def resident_bytes(self, optimizer: str | None) -> int:
        """The weights of streamed networks that stay on the device, of an optimizer; None: of frozen networks."""
        return sum(self._staying.get(optimizer, ()))

    @cached_property
    def _staying(self) -> dict[str | None, list[int]]:
        """Bytes of the parameters that stay on the device, by the optimizer."""
        found: dict[str | None, list[int]] = {}
        for stream, stays in self._stays():
            own = [block for block, here in zip(stream.blocks, stays, strict=True) if here]
            found.setdefault(stream.optimizer, []).extend(size for block in own for size in block)
        return found

    def _stays(self) -> Iterator[tuple[Stream, list[bool]]]:
        """Networks that stream, and which of their blocks stay."""
        for stream in self.facts.streams:
            yield stream, staying([sum(map(aligned, block)) for block in stream.blocks], self.structure.resident)

    def resident_state(self, optimizer: str, own: OptimizerPolicy) -> list[int]:
        """Bytes of the state of weights that stay, where it does too: that of streamed ones is on the host."""
        if not self.streams or own.state == "host" or not self.resident_bytes(optimizer):
            return []
        share = self.resident_bytes(optimizer) / self.facts.parameter_bytes[optimizer]
        return [int(self.update_piece(optimizer, own).state_bytes * share)]

    def slots(self) -> list[tuple[int, int]]:
        """What streams hold on the device between uses: in every phase but those of a second derivative."""
        first = next((phase for phase in self.facts.phases if not phase.second_order), None)
        if first is None or not self.structure.has_slots:
            return []
        if not self.structure.resident:
            return list(self.recorded(first, _slots_from(first)).residents.sizes)
        sizes = []
        for stream, stays in self._stays():
            blocks = zip(stream.blocks, stays, strict=True)
            streamed = sorted(sum(map(aligned, block)) for block, here in blocks if not here)
            sizes += [(WEIGHTS, largest) for largest in streamed[-1:] * len(streamed[:2])]
        return sizes

    def _slots_bytes(self, phase: PhaseFacts | None = None) -> int:
        if phase is not None and phase.second_order:
            return 0
        return sum(-(-size // 512) * 512 for _, size in self.slots())

    def requests(self, policy: MemoryPolicy, *, steps: int = STEPS) -> Requests:
        """A whole training: what is there throughout, some steps with every phase in them, and sampling."""
        writer = Writer()
        writer.mark("start")
        everything = [(kind, size) for kind, size in self.residents(self._own(policy), policy.ema)]
        writer.hold(everything, "held throughout")
        slots = writer.hold(self.slots(), "streamed blocks")
        for _ in range(steps):
            for phase in self.facts.phases:
                writer.mark(phase.name)
                if phase.second_order:  # blocks come one by one, and stay for the phase
                    writer.free(slots)
                    slots = slots[:0]
                elif not len(slots):
                    slots = writer.hold(self.slots(), "streamed blocks")
                self._write_phase(writer, phase, policy)
            slots = slots if len(slots) else writer.hold(self.slots(), "streamed blocks")
            if self.facts.average_bytes:
                writer.mark("average")
                self._write_waiting(writer, policy)
                if policy.ema == "device":
                    average = self.pieces.get(Job(structure=self.recorded_under, what="average"))
                    writer.play(flow(average.piece, Taking(later=True)))
        if self.facts.samples_images:
            writer.mark("sampling")
            brought = writer.hold(self._brought() if policy.ema == "host" else [], "average on the device")
            writer.play(flow(self._sampled(self.sampling_slice(policy)).piece, Taking(later=True)))
            writer.free(brought)
        writer.mark("saving")  # tensor by tensor to the host: nothing is added
        if not self.facts.average_bytes:  # but updates that wait for a use
            self._write_waiting(writer, policy)
        return writer.requests()

    def replayed(self, policy: MemoryPolicy) -> tuple[Requests, Replay]:
        """The requests of a whole training, and what an allocator does with them."""
        known = [
            (self.job(phase, choice_of(policy, phase)) in self.exact, self.job(phase, _slots_from(phase)) in self.exact)
            for phase in self.facts.phases
        ]
        key = self.structure, policy, tuple(known)
        if key not in self.pieces.replays:
            requests = self.requests(policy)
            self.pieces.replays[key] = requests, replay(requests)
        return self.pieces.replays[key]

    def _write_waiting(self, writer: Writer, policy: MemoryPolicy) -> None:
        for name, own in self._own(policy).items() if self.streams else ():
            writer.play(flow(self.update_piece(name, own).piece, Taking(later=True)))

    def sampling_slice(self, policy: MemoryPolicy) -> int:
        """Images that are sampled at a time."""
        first = self.facts.phases[0]
        return max(1, (policy.phase(first.name).micro_batch or first.samples_per_process) // 2)

    def seconds(self, policy: MemoryPolicy) -> tuple[float, float]:
        """Of a step, lazy phases by their share; and the card's own part of it."""
        own = self._own(policy)
        total = self.average(policy.ema).seconds
        gpu = total
        for phase in self.facts.phases:
            part = self.phase(phase, choice_of(policy, phase), own[phase.optimizer])
            update = self.update(phase.optimizer, own[phase.optimizer])
            total += (part.seconds + update.seconds) / self.facts.every[phase.name]
            gpu += part.gpu_seconds / self.facts.every[phase.name]
        return total, gpu

    def settle(self, policy: MemoryPolicy) -> None:
        """Record the micro-batches of a policy themselves that a large batch tells too little of.

        Where a dimension is 1 its stride is arbitrary, and kernels that cut a batch in parts have fewer of them;
        offloading leaves small tensors where they are.
        """
        wanted = []
        for phase in self.facts.phases:
            choice = choice_of(policy, phase)
            if choice[0] < max(8, 2 * phase.group) or choice[1] == "offload":
                wanted.append(self.job(phase, choice))
        self.pieces.want(wanted)
        self.exact.update(wanted)

    def _own(self, policy: MemoryPolicy) -> dict[str, OptimizerPolicy]:
        return {name: policy.optimizer(name) for name in self.facts.optimizers}

    def _brought(self) -> Iterable[tuple[int, int]]:
        """What sampling brings to the device of averages on the host."""
        if self.structure.has_slots:
            return [(AVERAGE, self.facts.average_slice_bytes)]
        return [(kind, size) for kind, size in self.facts.residents.sizes if kind == AVERAGE]

    def _write_phase(self, writer: Writer, phase: PhaseFacts, policy: MemoryPolicy) -> None:
        own = policy.optimizer(phase.optimizer)
        kept = [writer.play(one) for one in self.flows(phase, choice_of(policy, phase), own)]
        if not self.streams:
            writer.play(flow(self.update_piece(phase.optimizer, own).piece, Taking(later=True)))
        for gradients in kept:
            writer.free(gradients)


def _slots_from(phase: PhaseFacts) -> Choice:
    """What is looked at to know the slots of streams."""
    return phase.group, "keep", 1


def choice_of(policy: MemoryPolicy, phase: PhaseFacts) -> Choice:
    """What a policy chooses for a phase."""
    own = policy.phase(phase.name)
    samples = phase.samples_per_process
    return min(own.micro_batch or samples, samples), own.activations, own.recompute_every
