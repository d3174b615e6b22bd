"""What the planner answers, as one record that goes to a table, to a picture and to plan.json.

Shapes: E events of a trace, T points that stand for them in a picture.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import LowVRAMError
from lowvram.memory.guard import in_gb
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.planner.costs import CardCost
from lowvram.planner.log import CATEGORIES, Requests
from lowvram.receipt.rates import Rates

if TYPE_CHECKING:
    from lowvram.memory.apply import Applied
    from lowvram.phase import Phase


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """One phase of a step, or what else takes memory: "average", "sampling", "saving".

    samples: of one process in one run of the phase. every: steps from one run to the next; 0: not within a step.
    micro_batch: samples in memory at a time. live_bytes, reserved_bytes: the peaks. by_category: bytes at the live
    peak by name in CATEGORIES; what is not named is 0. peak_op, peak_module: where that peak is. seconds, flops,
    host_bytes (copied to and from the host): of one run, all its micro-batches together.
    """

    name: str
    samples: int
    every: int
    micro_batch: int
    activations: str
    live_bytes: int
    reserved_bytes: int
    by_category: Mapping[str, int]
    peak_op: str
    peak_module: str
    seconds: float
    flops: float
    host_bytes: float

    def __post_init__(self) -> None:
        unknown = sorted(set(self.by_category) - set(CATEGORIES))
        if unknown:
            raise LowVRAMError(f"category {unknown[0]} of {self.name} is not known.", f"Use {', '.join(CATEGORIES)}.")
        whole = {name: self.by_category.get(name, 0) for name in CATEGORIES}
        object.__setattr__(self, "by_category", MappingProxyType(whole))

    @property
    def micro_batches(self) -> int:
        """How many micro-batches make one run."""
        return -(-self.samples // self.micro_batch) if self.micro_batch else 0


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A plan that lost. what: how it differs, in the words of the settings; why: what spoke against it."""

    what: str
    device_bytes: int
    images_per_second: float
    why: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeline:
    """Memory over a step, thinned out for a picture.

    marks: (name, begin, end), the parts of the step in order, as ranges of points that join without a gap.
    bytes: int64 [CATEGORIES, T], live. reserved: int64 [T], or None where it is not known.
    """

    marks: tuple[tuple[str, int, int], ...]
    bytes: NDArray[np.int64]
    reserved: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.bytes.ndim != 2 or len(self.bytes) != len(CATEGORIES):
            raise LowVRAMError(f"timeline of shape {self.bytes.shape}.", f"Give [{len(CATEGORIES)}, T].")
        if self.reserved is not None and self.reserved.shape != self.bytes.shape[1:]:
            raise LowVRAMError(f"reserved of shape {self.reserved.shape}.", f"Give [{self.bytes.shape[1]}].")
        at = 0
        for name, begin, end in self.marks:
            if begin != at or end < begin:
                raise LowVRAMError(f"mark {name} at {begin} to {end} leaves a gap.", f"Let it begin at {at}.")
            at = end
        if at != self.bytes.shape[1]:
            raise LowVRAMError(f"marks end at {at} of {self.bytes.shape[1]} points.", "Let them cover all.")

    def __len__(self) -> int:
        return self.bytes.shape[1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Timeline):
            return NotImplemented
        both = self.reserved is not None and other.reserved is not None
        same = np.array_equal(self.reserved, other.reserved) if both else self.reserved is other.reserved  # type: ignore[arg-type]
        return self.marks == other.marks and np.array_equal(self.bytes, other.bytes) and same

    @classmethod
    def of(cls, requests: Requests, reserved: NDArray[np.int64] | None = None, points: int = 1200) -> "Timeline":
        """The step of a trace, from its first mark on, in `points` points or fewer (one for each mark at least).

        Each point stands for a run of events within one mark and shows the one with the most bytes alive, so that no
        peak is lost. reserved: int64 [E], bytes after each event; a point shows their maximum.
        """
        events = len(requests.order)
        if reserved is not None and reserved.shape != (events,):
            raise LowVRAMError(f"reserved of shape {reserved.shape}.", f"Give one number for each of {events} events.")
        marks = requests.marks or ((0, "step"),)
        edges = [*(event for event, _ in marks), events]
        spans = tuple((name, edges[n] - edges[0], edges[n + 1] - edges[0]) for n, (_, name) in enumerate(marks))
        whole = cls(
            marks=spans,
            bytes=requests.live_by_category()[:, edges[0] :],
            reserved=None if reserved is None else reserved[edges[0] :],
        )
        return whole.coarser(points)

    def coarser(self, points: int) -> "Timeline":
        """The same in `points` points or fewer, peaks kept."""
        if len(self) <= points:
            return self
        starts: list[int] = []
        marks = []
        spare = max(0, points - sum(end > begin for _, begin, end in self.marks))
        for name, begin, end in self.marks:
            length = end - begin
            bins = min(length, 1 + spare * length // len(self))  # every mark that has events keeps a point
            first = len(starts)
            starts += [begin + length * n // bins for n in range(bins)]
            marks.append((name, first, len(starts)))
        total = self.bytes.sum(axis=0)
        ends = [*starts[1:], len(self)]
        highest = [low + int(total[low:high].argmax()) for low, high in zip(starts, ends, strict=True)]
        reserved = None if self.reserved is None else np.maximum.reduceat(self.reserved, starts)
        return Timeline(marks=tuple(marks), bytes=self.bytes[:, highest], reserved=reserved)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a recipe is trained on a card, or what it would take.

    recipe, card: names. card_measured: the card's speed was measured, not looked up. vram_bytes: the budget; None:
    none was set. fits: within it; else the plan is the thriftiest one. policy: what is done, and settings: the same in
    the words of a command line, only what is not plain. phases: those of a step and what else takes memory.
    live_bytes, reserved_bytes: the highest peaks. workspace_bytes, context_bytes: outside of the allocator.
    device_bytes: reserved, workspaces and context together. margin_bytes: kept free for what a trace does not see.
    kimg: the training's length; hours, kwh: what it takes. host_bytes: RAM that the plan needs. smallest_card: by
    name, None where none of the table is large enough. smallest_vram_bytes: the smallest budget that fits. changes:
    what of the mathematics was given up, empty unless allowed. needs: what would have to change where nothing fits.
    processes: that train together, each on a card of this kind; bytes are of one of them, speed and energy of all.
    rates: what an hour and a kWh cost and emit. published: what the same work cost others, in words. costs: the same
    training on other cards, empty unless asked for.
    """

    recipe: str
    card: str
    card_measured: bool
    vram_bytes: int | None
    fits: bool
    policy: MemoryPolicy
    phases: tuple[PhasePlan, ...]
    live_bytes: int
    reserved_bytes: int
    workspace_bytes: int
    context_bytes: int
    margin_bytes: int
    device_bytes: int
    images_per_second: float
    kimg: float
    hours: float
    kwh: float
    host_bytes: int
    smallest_card: str | None
    smallest_vram_bytes: int
    alternatives: tuple[Alternative, ...] = ()
    changes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    processes: int = 1
    rates: Rates = field(default_factory=Rates)
    published: tuple[str, ...] = ()
    costs: tuple[CardCost, ...] = ()
    timeline: Timeline | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        together = self.reserved_bytes + self.workspace_bytes + self.context_bytes
        if self.device_bytes != together:
            raise LowVRAMError(
                f"device_bytes={self.device_bytes} is not the sum of reserved, workspaces and context.",
                f"Give {together}.",
            )
        if self.fits and self.headroom_bytes is not None and self.headroom_bytes < 0:
            raise LowVRAMError(
                f"the plan needs {in_gb(self.needed_bytes, up=True)} and can't fit vram={in_gb(self.vram_bytes or 0)}.",
                "Give fits=False.",
            )

    @property
    def needed_bytes(self) -> int:
        """Bytes on the device with the margin."""
        return self.device_bytes + self.margin_bytes

    @property
    def headroom_bytes(self) -> int | None:
        """What the budget leaves beyond the margin, below 0 where it does not fit; None without a budget."""
        return None if self.vram_bytes is None else self.vram_bytes - self.needed_bytes

    @property
    def money(self) -> float:
        """What the whole training costs: the rent of the cards and their electricity."""
        return self.rates.money(self.hours * self.processes, self.kwh)

    @property
    def co2_grams(self) -> float:
        """What the whole training's electricity emits."""
        return self.rates.co2_grams(self.kwh)

    def __str__(self) -> str:
        from lowvram.planner import table  # which needs this file

        return table.text(self)

    def apply(self, phases: "Sequence[Phase]", **options: Any) -> "Applied":
        """Carry out the plan on the phases that it was made for; see `own.apply_plan` for the options."""
        from lowvram.planner.own import apply_plan  # which needs this file

        return apply_plan(self, phases, **options)

    def to_json(self) -> str:
        """Everything as JSON, keys in a fixed order; the timeline has `plan_file.JSON_POINTS` points at most."""
        from lowvram.planner import plan_file  # which needs this file, here and below

        return plan_file.to_json(self)

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan.json") -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            LowVRAMError: it is broken, not a plan, or of another version; `source` says what was read.
        """
        from lowvram.planner import plan_file

        return plan_file.from_json(text, source=source)

    def save(self, path: str | Path) -> None:
        """Write plan.json, under a temporary name first. Raises OSError where the disk says no."""
        from lowvram.planner import plan_file

        plan_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.json. Raises LowVRAMError where it is missing, broken, foreign or too large."""
        from lowvram.planner import plan_file

        return plan_file.load(Path(path))


def settings_of(policy: MemoryPolicy, phases: Collection[str], *, plain: MemoryPolicy | None = None) -> dict[str, str]:
    """What differs from the plain policy, in the words of the settings: {"memory.activations.G": "recompute"}.

    phases: the names of those that are trained. plain: another policy to start from, such as the recipe's own.

    Raises:
        LowVRAMError: phases are recomputed at different intervals, for which there is one setting.
    """
    plain = MemoryPolicy() if plain is None else plain
    words: dict[str, str] = {}
    if policy.precision != plain.precision:
        words["precision"] = policy.precision
    for column, word in (("micro_batch", "micro_batch"), ("activations", "memory.activations")):
        for name in phases:
            value = getattr(policy.phase(name), column)
            if value != getattr(plain.phase(name), column):
                words[f"{word}.{name}"] = "null" if value is None else str(value)
    intervals = {policy.phase(name).recompute_every for name in phases if policy.phase(name).activations == "recompute"}
    if len(intervals) > 1:
        raise LowVRAMError(
            f"phases are recomputed every {' and '.join(f'{n}.' for n in sorted(intervals))} block.",
            "memory.recompute_every is one number for all of them.",
        )
    if intervals and intervals != {plain.phase(name).recompute_every for name in phases}:
        words["memory.recompute_every"] = str(intervals.pop())
    names = dict.fromkeys((*policy.optimizers, *plain.optimizers))
    for field_ in fields(OptimizerPolicy):
        word = "optimizer" if field_.name == "kind" else field_.name
        for name in names:
            value = getattr(policy.optimizer(name), field_.name)
            if value != getattr(plain.optimizer(name), field_.name):
                words[f"memory.{word}.{name}"] = value
    for word in ("ema", "attention", "fsdp", "frozen"):
        if getattr(policy, word) != getattr(plain, word):
            words[f"memory.{word}"] = getattr(policy, word)
    if policy.resident != plain.resident:
        words["memory.resident"] = f"{policy.resident:g}"
    return words
