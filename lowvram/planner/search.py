"""The fastest policy within a budget.

Every choice is priced by itself, whatever the budget; of all combinations those stay that no other beats in both time
and memory, and the fastest of them that fits wins. So a larger budget never gives a slower plan. What costs most to
look into is looked into only where it could win: see `options`.
"""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from lowvram.errors import LowVRAMError
from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.planner import calibration
from lowvram.planner.allocator import Replay
from lowvram.planner.calibration import Constants
from lowvram.planner.cards import Card
from lowvram.planner.estimate import Choice, Estimator, choice_of
from lowvram.planner.log import ACTIVATIONS, Requests
from lowvram.planner.options import Fixed, Options, legal, may_fuse, options, policy_of, shares
from lowvram.planner.pieces import Pieces, large
from lowvram.planner.tracing import Job, Structure, kinds_of

_ALIKE = 1.01  # times this close count as equal, for no model of time is better; then the simpler policy wins
_RECOMPUTED = 1.15  # a phase that recomputes takes at least so many times as long
_OFFLOADED = 0.8  # of the activations, offloading moves at least so much


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A policy with its price. live_bytes: the peak of a step, what is there throughout included."""

    policy: MemoryPolicy
    estimator: Estimator
    seconds: float
    live_bytes: int
    techniques: int

    @property
    def rank(self) -> tuple[int, int, float, int]:
        """What is better comes first."""
        return slowness(self.seconds), self.techniques, self.seconds, self.live_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Weighed:
    """A candidate and what an allocator would reserve for it. needed_bytes: on the device, with the margin."""

    candidate: Candidate
    requests: Requests
    replayed: Replay
    needed_bytes: int
    settled: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search. best: the fastest that fits; None: none does. least: the thriftiest of all.

    faster, slower: the neighbours of the best: what did not fit, and what would have as well.
    """

    best: Weighed | None
    least: Weighed
    faster: tuple[Weighed, ...]
    slower: tuple[Weighed, ...]


class Search:
    """Looks for the fastest policy of a subject on a card.

    Args:
        pieces: of the subject. structure: how its weights are held as long as they are not streamed.
        constants: what turns a replay into bytes on the device.
        fixed: settings that stay. allow: changes that are allowed, by name.
    """

    def __init__(
        self,
        pieces: Pieces,
        structure: Structure,
        card: Card,
        constants: Constants,
        *,
        fixed: Fixed | None = None,
        allow: Collection[str] = (),
    ) -> None:
        self.pieces, self.card, self.constants = pieces, card, constants
        self.fixed, self.allow = fixed or Fixed(), tuple(allow)
        self.resident = Estimator(pieces, structure, card)
        self.streamed = [
            Estimator(pieces, replace(own, resident=share), card)
            for own in self._streamed_structures(structure)
            for share in shares(self.resident.facts, self.fixed)
        ]
        self._frontiers: dict[int, list[Candidate]] = {}
        self._weighed: dict[MemoryPolicy, Weighed] = {}

    def within(self, vram_bytes: int | None) -> Found:
        """The fastest policy whose device memory and margin are within the budget; None: no budget."""
        best = self.fastest(vram_bytes)
        return self._found(best, self._frontiers[max(self._frontiers)], vram_bytes)

    def fastest(self, vram_bytes: int | None) -> Weighed | None:
        """The best alone; None: nothing fits."""
        best: Weighed | None = None
        for tier in self._tiers():
            best = self._best(tier, vram_bytes)
            if best is not None and self._is_final(tier, best):
                break
        return best

    def least(self, below_bytes: int) -> Weighed:
        """The thriftiest policy; the search goes on only until one needs no more than `below_bytes`."""
        found: Weighed | None = None
        for tier in self._tiers():
            found = self.weigh(self.frontier(tier)[-1], settle=False)
            if found.needed_bytes <= below_bytes:
                break
        assert found is not None
        return found

    def frontier(self, tier: int) -> list[Candidate]:
        """The candidates up to a tier that no other beats, the fastest and largest first."""
        if tier not in self._frontiers:
            before = self.frontier(tier - 1) if tier - 1 in self._tiers() else []
            estimators = self.streamed if tier == 3 else [self.resident]
            candidates = [one for estimator in estimators for one in self._candidates(estimator, tier)]
            self._frontiers[tier] = _unbeaten([*before, *candidates])
        return self._frontiers[tier]

    def weigh(self, candidate: Candidate, *, settle: bool = True) -> Weighed:
        """What the allocator would reserve for a candidate. settle: record small micro-batches themselves."""
        found = self._weighed.get(candidate.policy)
        if found is None or (settle and not found.settled):
            if settle:
                candidate.estimator.settle(candidate.policy)
            requests, replayed = candidate.estimator.replayed(candidate.policy)
            needed = calibration.needed_bytes(replayed.reserved_bytes, self.constants)
            needed += calibration.margin(replayed.reserved_bytes, self.constants)
            found = Weighed(
                candidate=candidate, requests=requests, replayed=replayed, needed_bytes=needed, settled=settle
            )
            self._weighed[candidate.policy] = found
        return found

    # Looking.

    def _tiers(self) -> Iterator[int]:
        if "stream" not in (self.fixed.weights, self.fixed.frozen):
            yield 1
            yield 2
        if self.streamed:
            yield 3

    def _streamed_structures(self, structure: Structure) -> list[Structure]:
        """How weights are held where some are streamed: the frozen alone, or all that can be."""
        if structure.sharded:  # which does what streaming would
            return []
        phases = self.resident.facts.phases
        frozen = self.fixed.frozen != "device" and any(phase.frozen_blocks for phase in phases)
        trained = self.fixed.weights != "device" and all(phase.has_blocks and phase.trained_blocks for phase in phases)
        found = []
        if frozen and self.fixed.weights != "stream":
            found.append(replace(structure, frozen="stream"))
        if trained and (frozen or self.fixed.frozen != "stream"):
            whole = replace(structure, weights="stream", frozen="stream" if frozen else "device", fsdp="none")
            named = {name: own["kind"] for name, own in self.fixed.optimizers.items() if "kind" in own}
            kinds = [named]
            if "adam8bit" in self.allow:
                kinds.append({name: named.get(name, "adam8bit") for name in self.resident.facts.optimizers})
            found += [replace(whole, kinds=own) for own in dict.fromkeys(map(kinds_of, kinds))]
        for name, wanted in (("memory.weights", self.fixed.weights), ("memory.frozen", self.fixed.frozen)):
            if wanted == "stream" and not found:
                raise LowVRAMError(f"{name}=stream, but its networks show no blocks.", f"Use {name}=device.")
        return found

    def _best(self, tier: int, vram_bytes: int | None) -> Weighed | None:
        for candidate in self.frontier(tier):
            if vram_bytes is not None and self._at_least(candidate) > vram_bytes:
                continue
            weighed = self.weigh(candidate)
            if vram_bytes is None or weighed.needed_bytes <= vram_bytes:
                return weighed
        return None

    def _at_least(self, candidate: Candidate) -> int:
        """Bytes on the device that a candidate needs however well the allocator does."""
        needed = calibration.needed_bytes(candidate.live_bytes, self.constants)
        return needed + calibration.margin(candidate.live_bytes, self.constants)

    def _found(self, best: Weighed | None, frontier: list[Candidate], vram_bytes: int | None) -> Found:
        least = self.weigh(frontier[-1], settle=best is None)
        if best is None:
            return Found(best=None, least=least, faster=(), slower=())
        place = next((i for i, c in enumerate(frontier) if c.rank >= best.candidate.rank), len(frontier))
        rest = [c for c in frontier if c.policy != best.candidate.policy]
        faster = [self.weigh(c, settle=False) for c in rest[max(0, place - 2) : place]]
        next_ = [self.weigh(c, settle=False) for c in rest[place : place + 1]]
        slower = dict.fromkeys([*next_, *([least] if next_ else [])])
        return Found(best=best, least=least, faster=tuple(faster), slower=tuple(slower))

    def _is_final(self, tier: int, best: Weighed) -> bool:
        """Whether no higher tier has anything better."""
        return tier == 3 or slowness(self._lower_bound(tier, best)) >= slowness(best.candidate.seconds)

    def _lower_bound(self, tier: int, best: Weighed) -> float:
        """Seconds of a step that no policy of the next tier beats, as far as is known without looking into it."""
        estimator = self.resident
        facts, policy = estimator.facts, best.candidate.policy
        plain = OptimizerPolicy(weights_dtype=estimator.structure.weights_dtype)
        otherwise = 0.0  # every phase in the cheapest other way
        gain = 0.0  # of phases that could run whole if something else were moved out of the way
        for phase in facts.phases:
            whole: Choice = (_largest(phase, self.fixed), "keep", 1)
            at_best = estimator.phase(phase, whole, plain)
            now = estimator.phase(phase, choice_of(policy, phase), policy.optimizer(phase.optimizer)).seconds
            every = facts.every[phase.name]
            other = self._cheapest_other(estimator, phase, whole, at_best.seconds)
            otherwise += (other if tier == 2 else min(now, other)) / every
            gain += max(0.0, now - at_best.seconds) / every
        otherwise += sum(estimator.update(p.optimizer, plain).seconds / facts.every[p.name] for p in facts.phases)
        otherwise += estimator.average("device").seconds
        if tier == 2:  # the next streams: every block is recomputed
            return otherwise
        moved = min([*facts.parameter_bytes.values(), *([facts.average_bytes] if facts.average_bytes else [])])
        transfer = moved / (self.card.pcie_bytes_per_second * estimator.rates.pcie)
        # A fused update frees the gradients, and moves nothing.
        if any(may_fuse(facts, estimator.structure, name) for name in facts.optimizers):
            transfer = 0.0
        return min(otherwise, best.candidate.seconds - gain + transfer)

    def _cheapest_other(self, estimator: Estimator, phase: PhaseFacts, whole: Choice, seconds: float) -> float:
        if not phase.second_order and phase.has_blocks:
            return seconds * _RECOMPUTED
        piece = estimator.recorded(phase, whole).piece
        held = float(piece.sizes[piece.categories == ACTIVATIONS].sum())
        pcie = 2 * _OFFLOADED * held / (self.card.pcie_bytes_per_second * estimator.rates.pcie)
        return seconds + max(0.0, pcie - estimator.rates.overlap * seconds)

    # Candidates.

    def _candidates(self, estimator: Estimator, tier: int) -> list[Candidate]:
        offered = options(estimator.facts, estimator.structure, tier, self.fixed, self.allow)
        self.pieces.want(_jobs(estimator, offered))
        found = []
        names = list(offered.optimizers)
        for owns in itertools.product(*offered.optimizers.values()):
            optimizers = dict(zip(names, owns, strict=True))
            for ema in offered.ema:
                found += list(self._of_places(estimator, offered, optimizers, ema))
        return found

    def _of_places(
        self, estimator: Estimator, offered: Options, optimizers: dict[str, OptimizerPolicy], ema: str
    ) -> Iterator[Candidate]:
        """For each peak that some phase could have, the fastest choice for every phase that stays below."""
        facts = estimator.facts
        held = sum(-(-size // 512) * 512 for _, size in estimator.residents(optimizers, ema))
        updates = {name: estimator.update(name, own) for name, own in optimizers.items()}
        average = estimator.average(ema)
        floor = max([update.peak_bytes for update in updates.values()] + [average.peak_bytes])
        prices = {
            phase.name: sorted(
                (cost.seconds, cost.peak_bytes, choice)
                for choice in offered.phases[phase.name]
                for cost in [estimator.phase(phase, choice, optimizers[phase.optimizer])]
            )
            for phase in facts.phases
        }
        fixed_seconds = average.seconds + sum(
            updates[phase.optimizer].seconds / facts.every[phase.name] for phase in facts.phases
        )
        peaks = sorted({peak for rows in prices.values() for _, peak, _ in rows})
        for limit in peaks:
            picked: dict[str, tuple[float, int, Choice]] = {}
            for phase in facts.phases:
                row = next((row for row in prices[phase.name] if row[1] <= limit), None)
                if row is None:
                    break
                picked[phase.name] = row
            if len(picked) < len(facts.phases):
                continue
            chosen = {name: row[2] for name, row in picked.items()}
            if not legal(facts, optimizers, {name: choice[0] for name, choice in chosen.items()}):
                continue
            seconds = fixed_seconds + sum(picked[p.name][0] / facts.every[p.name] for p in facts.phases)
            yield Candidate(
                policy=policy_of(estimator.structure, chosen, optimizers, ema),
                estimator=estimator,
                seconds=seconds,
                live_bytes=held + max([floor] + [row[1] for row in picked.values()]),
                techniques=_techniques(chosen, optimizers, ema) + _of_streams(estimator.structure),
            )


def _of_streams(structure: Structure) -> int:
    return (structure.frozen != "device") + (structure.resident > 0)


def _jobs(estimator: Estimator, offered: Options) -> list[Job]:
    jobs: list[Job] = []
    for phase in estimator.facts.phases:
        for choice in offered.phases[phase.name]:
            jobs.append(estimator.wanted(phase, choice))
    jobs += [estimator.update_job(name, own) for name, owns in offered.optimizers.items() for own in owns]
    if estimator.facts.average_bytes:
        jobs.append(Job(structure=estimator.recorded_under, what="average"))
    if estimator.facts.samples_images:
        jobs.append(large(Job(structure=estimator.recorded_under, what="sample"), 1))
    return list(dict.fromkeys(jobs))


def slowness(seconds: float) -> int:
    """Of times that count as equal the same whole number, of longer ones a larger."""
    return round(math.log(max(seconds, 1e-9)) / math.log(_ALIKE))


def _unbeaten(candidates: list[Candidate]) -> list[Candidate]:
    """Those that need less memory than all that are better otherwise, the best and largest first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda c: c.rank):
        if not kept or one.live_bytes < kept[-1].live_bytes:
            kept.append(one)
    return kept


def _largest(phase: PhaseFacts, fixed: Fixed) -> int:
    wanted = fixed.phases.get(phase.name, {}).get("micro_batch")
    return min(int(wanted), phase.samples_per_process) if wanted else phase.samples_per_process


def _techniques(chosen: dict[str, Choice], optimizers: dict[str, OptimizerPolicy], ema: str) -> int:
    """How many settings are not plain."""
    count = sum(activations != "keep" for _, activations, _ in chosen.values()) + (ema != "device")
    for own in optimizers.values():
        plain = OptimizerPolicy()
        count += sum(getattr(own, n) != getattr(plain, n) for n in ("kind", "update", "state", "weights"))
    return count
