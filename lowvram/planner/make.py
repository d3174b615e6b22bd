"""A plan for a subject: where it is trained, what was found, and everything that a person wants to know of it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from lowvram.errors import LowVRAMError
from lowvram.memory.guard import LEAST_BYTES, in_gb
from lowvram.memory.policy import MemoryPolicy
from lowvram.planner import calibration, cards, cost
from lowvram.planner.calibration import Constants
from lowvram.planner.cards import Card
from lowvram.planner.compose import Part, highest
from lowvram.planner.costs import CardCost
from lowvram.planner.estimate import Estimator, PartCost, choice_of
from lowvram.planner.options import Fixed, check_allowed
from lowvram.planner.pieces import Pieces
from lowvram.planner.plan import Alternative, PhasePlan, Plan, Timeline, settings_of
from lowvram.planner.search import Found, Search, Weighed
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure
from lowvram.receipt.rates import Rates

_MOST_BYTES = 192 * 2**30  # no single card has more
NCCL_BYTES = 200 * 2**20  # its channels' buffers beside a context, by NCCL's defaults for two to eight cards


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where to train. budget_bytes: what may be used of the card."""

    card: Card
    constants: Constants
    budget_bytes: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan for.

    build: makes the subject on fake tensors. name, batch, kimg: of the training, all processes together. structure: how
    weights are held, and by how many processes.
    fixed: settings that stay. plain: the policy that settings are told from. changes: of the mathematics, as made.
    smaller: what would need less memory, if nothing fits. notes: to be said with the plan. rates, published: as in
    Plan. proportional, processes: see `pieces.Pieces`.
    """

    build: Callable[[], Subject]
    name: str
    batch: int
    kimg: float
    structure: Structure = field(default_factory=Structure)
    fixed: Fixed = field(default_factory=Fixed)
    plain: MemoryPolicy = field(default_factory=MemoryPolicy)
    changes: tuple[str, ...] = ()
    smaller: str = "a smaller resolution, or narrower networks (model.channel_base)"
    notes: tuple[str, ...] = ()
    rates: Rates = field(default_factory=Rates)
    published: tuple[str, ...] = ()
    proportional: bool = True
    processes: int | None = None


def place(vram_bytes: int | None, card: str | Card | None = None) -> Place:
    """The card that is named, else the one that is there, else a usual one of the budget's size.

    Raises:
        LowVRAMError: nobody makes such a card, it has less than the budget, or the budget leaves nothing to train with.
    """
    if vram_bytes is not None and vram_bytes > _MOST_BYTES:
        raise LowVRAMError(f"vram={in_gb(vram_bytes)} is more than any card has.", "Write what yours has: vram=8GB.")
    if isinstance(card, str):
        card = cards.find(card)
    if card is None and torch.cuda.is_available():
        card = cards.present(torch.device("cuda", torch.cuda.current_device()))
    if card is None:
        card = cards.for_budget(cards.find("RTX 2060").vram_bytes if vram_bytes is None else vram_bytes)
    if vram_bytes is not None and vram_bytes > card.vram_bytes:
        raise LowVRAMError(
            f"vram={in_gb(vram_bytes)} is more than the {card.name} has: {in_gb(card.vram_bytes)}.",
            f"Write vram={in_gb(card.vram_bytes)} or less, or another card=NAME.",
        )
    constants = calibration.load(card)
    budget = cards.usable_bytes(card) if vram_bytes is None else vram_bytes
    least = constants.context_bytes + constants.workspace_bytes + LEAST_BYTES
    if budget < least:
        raise LowVRAMError(
            f"vram={in_gb(budget)} leaves nothing to train with: CUDA and its libraries take "
            f"{in_gb(constants.context_bytes + constants.workspace_bytes)}.",
            f"Use vram={in_gb(least, up=True)} at the very least.",
        )
    return Place(card=card, constants=constants, budget_bytes=budget)


def make(request: Request, where: Place, *, allow: Collection[str] = ()) -> Plan:
    """The fastest plan for a request that fits, or the thriftiest if none does.

    Raises:
        LowVRAMError: the budget is below the weights of one block, or an allowed change is not known.
    """
    with Pieces(request.build, processes=request.processes, proportional=request.proportional) as pieces:
        return make_from(pieces, request, where, allow=allow)


def make_from(pieces: Pieces, request: Request, where: Place, *, allow: Collection[str] = ()) -> Plan:
    """As `make`, of the request's pieces, which stay open."""
    check_allowed(allow)
    where = _shared(where, request.structure)
    search = _search(pieces, request, where, allow)
    found = search.within(where.budget_bytes)
    smallest = min(cards.CARDS, key=lambda card: card.vram_bytes)
    least = search.least(cards.usable_bytes(smallest)) if found.best is not None else found.least
    return _Author(request, where, search, found, least).plan()


def cost_from(pieces: Pieces, request: Request, card: Card, *, allow: Collection[str] = ()) -> CardCost:
    """What `make_from` would say of another card, all of whose memory may be used: just whether, how fast, how dear."""
    usable, needed, training = cards.usable_bytes(card), None, None
    try:
        where = _shared(place(None, card), request.structure)
        search = _search(pieces, request, where, allow)
    except LowVRAMError:  # not a block fits: other mistakes have been found with the card that was asked for
        pass
    else:
        best = search.fastest(where.budget_bytes)
        needed = (best or search.within(where.budget_bytes).least).needed_bytes
        training = None if best is None else _training(request, where, best)
    return CardCost(
        card=card.name,
        fits=training is not None,
        needed_bytes=needed,
        usable_bytes=usable,
        images_per_second=training.images_per_second if training else 0.0,
        hours=training.hours if training else 0.0,
        kwh=training.kwh if training else 0.0,
        changes=request.changes,
    )


def _shared(where: Place, structure: Structure) -> Place:
    """With what cards need beside that talk to each other."""
    if structure.processes < 2:
        return where
    nccl = where.constants.workspace_bytes + NCCL_BYTES
    return replace(where, constants=replace(where.constants, workspace_bytes=nccl))


def _search(pieces: Pieces, request: Request, where: Place, allow: Collection[str]) -> Search:
    search = Search(pieces, request.structure, where.card, where.constants, fixed=request.fixed, allow=allow)
    _check_processes(search.resident)
    _check_block(search, where)
    return search


def _training(request: Request, where: Place, chosen: Weighed) -> cost.Training:
    """The whole training under a policy, on all its cards."""
    seconds, gpu = chosen.candidate.estimator.seconds(chosen.candidate.policy)
    seconds *= where.constants.time_factor
    busy = min(1.0, gpu / max(seconds, 1e-12))
    training = cost.training(seconds, request.batch, request.kimg, where.card, busy=busy)
    return replace(training, kwh=training.kwh * request.structure.processes)


def _check_processes(estimator: Estimator) -> None:
    processes = estimator.structure.processes
    for phase in estimator.facts.phases:
        samples = estimator.facts.samples[phase.name]
        if samples % (processes * phase.group):
            raise LowVRAMError(
                f"the {samples} samples of phase {phase.name} don't divide among {processes} processes in groups of "
                f"{phase.group}.",
                f"Use a batch that gives it a multiple of {processes * phase.group}, or fewer processes.",
            )


def _check_block(search: Search, where: Place) -> None:
    facts = search.resident.facts
    left = where.budget_bytes - where.constants.context_bytes - where.constants.workspace_bytes
    if left < facts.largest_block_bytes:
        raise LowVRAMError(
            f"vram={in_gb(where.budget_bytes)} leaves {in_gb(left)} to train with, less than the weights of one block, "
            f"{in_gb(facts.largest_block_bytes)}.",
            f"Use vram={in_gb(where.budget_bytes - left + 2 * facts.largest_block_bytes, up=True)} at the very least.",
        )


class _Author:
    """Writes down what a search found."""

    def __init__(self, request: Request, where: Place, search: Search, found: Found, least: Weighed) -> None:
        self.request, self.where, self.search, self.found, self.least = request, where, search, found, least
        self.chosen = found.best or found.least
        self.policy = self.chosen.candidate.policy
        self.estimator: Estimator = self.chosen.candidate.estimator
        self.names = [phase.name for phase in self.estimator.facts.phases]

    def plan(self) -> Plan:
        """The plan."""
        constants, card, replayed = self.where.constants, self.where.card, self.chosen.replayed
        training = _training(self.request, self.where, self.chosen)
        reserved = calibration.needed_bytes(replayed.reserved_bytes, constants)
        reserved -= constants.workspace_bytes + constants.context_bytes
        parts = highest(self.chosen.requests)
        smallest = cards.smallest(self.least.needed_bytes)
        return Plan(
            recipe=self.request.name,
            card=card.name,
            card_measured=card.measured,
            vram_bytes=self.where.budget_bytes,
            fits=self.found.best is not None,
            policy=self.policy,
            phases=tuple(self._phases(parts)),
            live_bytes=max(part.live_bytes for part in parts.values()),
            reserved_bytes=reserved,
            workspace_bytes=constants.workspace_bytes,
            context_bytes=constants.context_bytes,
            margin_bytes=calibration.margin(replayed.reserved_bytes, constants),
            device_bytes=calibration.needed_bytes(replayed.reserved_bytes, constants),
            images_per_second=training.images_per_second,
            kimg=self.request.kimg,
            hours=training.hours,
            kwh=training.kwh,
            processes=self.request.structure.processes,
            host_bytes=self._host_bytes(),
            smallest_card=smallest.name if smallest else None,
            smallest_vram_bytes=min(self.least.needed_bytes, self.chosen.needed_bytes),
            alternatives=tuple(self._alternatives(training.images_per_second)),
            changes=self.request.changes,
            needs=tuple(self._needs()),
            settings=settings_of(self.policy, self.names, plain=self.request.plain),
            notes=tuple(self._notes()),
            rates=self.request.rates,
            published=self.request.published,
            timeline=Timeline.of(self.chosen.requests, replayed.reserved_over_time()),
        )

    def _phases(self, parts: Mapping[str, Part]) -> list[PhasePlan]:
        by_mark = self.chosen.replayed.by_mark
        rows = []
        for phase in self.estimator.facts.phases:
            choice = choice_of(self.policy, phase)
            own = self.policy.optimizer(phase.optimizer)
            run, update = self.estimator.phase(phase, choice, own), self.estimator.update(phase.optimizer, own)
            rows.append(
                self._row(
                    parts[phase.name],
                    by_mark,
                    samples=phase.samples_per_process,
                    every=self.estimator.facts.every[phase.name],
                    micro_batch=choice[0],
                    activations=choice[1],
                    price=PartCost(
                        peak_bytes=0,
                        seconds=run.seconds + update.seconds,
                        flops=run.flops,
                        host_bytes=run.host_bytes + update.host_bytes,
                    ),
                )
            )
        none = PartCost(peak_bytes=0, seconds=0.0)
        for name, every in (("average", 1), ("sampling", 0), ("saving", 0)):
            if name in parts:
                price = self.estimator.average(self.policy.ema) if name == "average" else none
                slice_ = self.estimator.sampling_slice(self.policy) if name == "sampling" else 0
                rows.append(
                    self._row(
                        parts[name],
                        by_mark,
                        samples=slice_,
                        every=every,
                        micro_batch=slice_,
                        activations="",
                        price=price,
                    )
                )
        return rows

    def _row(
        self,
        part: Part,
        by_mark: Mapping[str, int],
        *,
        samples: int,
        every: int,
        micro_batch: int,
        activations: str,
        price: PartCost,
    ) -> PhasePlan:
        return PhasePlan(
            name=part.name,
            samples=samples,
            every=every,
            micro_batch=micro_batch,
            activations=activations,
            live_bytes=part.live_bytes,
            reserved_bytes=by_mark[part.name],
            by_category=part.by_category,
            peak_op=part.operation,
            peak_module=part.module,
            seconds=price.seconds * self.where.constants.time_factor,
            flops=price.flops,
            host_bytes=price.host_bytes,
        )

    def _host_bytes(self) -> int:
        """What the policy keeps in the host's memory, for each process."""
        facts, total = self.estimator.facts, 0
        if self.policy.fsdp == "offload":  # weights and gradients, and state
            total += 2 * sum(facts.parameter_bytes.values()) + sum(facts.state_bytes.values())
        for name in facts.optimizers:
            own = self.policy.optimizer(name)
            weights = facts.parameter_bytes[name]
            total += weights - self.estimator.resident_bytes(name) if own.weights == "stream" else 0
            total += weights if own.update == "deferred" else 0
            if own.state == "host" or own.weights == "stream":
                total += self.estimator.update_piece(name, own).state_bytes
                total -= sum(self.estimator.resident_state(name, own))
        total += facts.average_bytes if self.policy.ema == "host" else 0
        total += facts.frozen_bytes - self.estimator.resident_bytes(None) if self.policy.frozen == "stream" else 0
        offloaded = [
            self.estimator.phase(phase, choice_of(self.policy, phase), self.policy.optimizer(phase.optimizer))
            for phase in facts.phases
            if self.policy.phase(phase.name).activations == "offload"
        ]
        return int(total + max((price.offloaded_bytes for price in offloaded), default=0))

    def _alternatives(self, speed: float) -> list[Alternative]:
        out = []
        for other in (*self.found.faster, *self.found.slower):
            seconds, _ = other.candidate.estimator.seconds(other.candidate.policy)
            theirs = self.request.batch / (seconds * self.where.constants.time_factor)
            over = other.needed_bytes - self.where.budget_bytes
            difference = theirs / speed - 1
            if over > 0:
                why = f"needs {in_gb(over, up=True)} more than the budget"
            elif abs(difference) < 0.005:
                why = "no faster, and does more" if difference >= 0 else "as fast; more headroom than is needed"
            else:
                why = f"{-100 * difference:.0f}% slower"
            words = settings_of(other.candidate.policy, self.names, plain=self.policy)
            out.append(
                Alternative(
                    what=", ".join(f"{name}={value}" for name, value in words.items()),
                    device_bytes=other.needed_bytes,
                    images_per_second=theirs,
                    why=why,
                )
            )
        return out

    def _needs(self) -> list[str]:
        if self.found.best is not None:
            return []
        needed = in_gb(self.least.needed_bytes, up=True)
        words = [f"vram={needed}, with the settings above"]
        bigger = cards.smallest(self.least.needed_bytes)
        if bigger is not None:
            words.append(f"a card such as the {bigger.name}")
        words.append(f"or {self.request.smaller}")
        return words

    def _notes(self) -> list[str]:
        notes = [*self.request.notes]
        constants, card = self.where.constants, self.where.card
        if not card.measured:
            notes.append(f"times are those of the {card.name}'s datasheet, which trainings reach in part: see cost.py")
        if self.request.structure.processes > 1:
            notes.append(
                f"for each of {self.request.structure.processes} cards, that talk by PCI Express; NCCL's "
                f"{in_gb(NCCL_BYTES)} are a usual figure"
            )
        if not constants.measurements:
            notes.append("workspaces and context are usual figures; training corrects them for the card it runs on")
        return notes
