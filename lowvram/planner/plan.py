"""What the planner answers, as one record that goes to a table, to a picture and to plan.json.

Shapes: E events of a trace, T points that stand for them in a picture.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import LowVRAMError
from lowvram.memory.guard import in_gb
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.planner.log import CATEGORIES, Requests

if TYPE_CHECKING:
    from lowvram.memory.apply import Applied
    from lowvram.phase import Phase

_T = TypeVar("_T")

VERSION = 2  # of plan.json
JSON_POINTS = 400
_MOST_FILE_BYTES = 4 * 2**20
_MOST_TEXT = 2000
_MOST_ENTRIES = 4096
_MOST_COUNT = 2**60
_REMEDY = "Make it anew with python -m lowvram.plan recipe=NAME vram=SIZE."


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

    def __str__(self) -> str:
        from lowvram.planner import table  # which needs this file

        return table.text(self)

    def apply(self, phases: "Sequence[Phase]", **options: Any) -> "Applied":
        """Carry out the plan on the phases that it was made for; see `own.apply_plan` for the options."""
        from lowvram.planner.own import apply_plan  # which needs this file

        return apply_plan(self, phases, **options)

    def to_json(self) -> str:
        """Everything as JSON, keys in a fixed order; the timeline has JSON_POINTS points at most."""
        values = {"lowvram_plan": VERSION, **_plain(self)}
        timeline = values.pop("timeline")
        head = json.dumps(values, indent=2, allow_nan=False)
        return f'{head[:-2]},\n  "timeline": {json.dumps(timeline)}\n}}\n'  # thousands of numbers: one line

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan.json") -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            LowVRAMError: it is broken, not a plan, or of another version; `source` says what was read.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LowVRAMError(f"{source} is not JSON: {str(error)[:200]}.", _REMEDY) from None
        if not isinstance(values, dict) or "lowvram_plan" not in values:
            raise LowVRAMError(f"{source} is not a plan.", "Give a plan.json that python -m lowvram.plan wrote.")
        version = values.pop("lowvram_plan")
        if version != VERSION or isinstance(version, bool):
            raise LowVRAMError(
                f"{source} is a plan of version {str(version)[:20]}, and this lowvram reads version {VERSION}.", _REMEDY
            )
        try:
            return _record(cls, values, "")
        except _WrongError as error:
            raise LowVRAMError(f"{source} is damaged: {error}.", _REMEDY) from None
        except LowVRAMError as error:
            raise LowVRAMError(f"{source} is damaged: {error.problem}", _REMEDY) from None

    def save(self, path: str | Path) -> None:
        """Write plan.json, under a temporary name first. Raises OSError where the disk says no."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.to_json(), encoding="utf-8", newline="\n")
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan.json. Raises LowVRAMError where it is missing, broken, foreign or too large."""
        path = Path(path)
        if not path.is_file():  # nor a pipe, which would never end
            raise LowVRAMError(f"plan {path} is not there.", _REMEDY)
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_FILE_BYTES + 1)
        except OSError as error:
            raise LowVRAMError(f"plan {path} can't be read: {error}.", _REMEDY) from error
        if len(content) > _MOST_FILE_BYTES:
            raise LowVRAMError(f"plan {path} is larger than {_MOST_FILE_BYTES >> 20} MiB, as no plan is.", _REMEDY)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise LowVRAMError(f"plan {path} is not text.", _REMEDY) from None
        return cls.from_json(text, source=f"plan {path}")


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


class _WrongError(Exception):
    """What is wrong with a value of a plan.json."""


def _plain(value: Any) -> Any:
    """Values that JSON knows."""
    if isinstance(value, MemoryPolicy):
        return value.to_dict()
    if isinstance(value, Timeline):
        small = value.coarser(JSON_POINTS)
        live = {name: row.tolist() for name, row in zip(CATEGORIES, small.bytes, strict=True)}
        reserved = None if small.reserved is None else small.reserved.tolist()
        return {"marks": [list(mark) for mark in small.marks], "bytes": live, "reserved": reserved}
    if is_dataclass(value):
        return {field_.name: _plain(getattr(value, field_.name)) for field_ in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _record(cls: type[_T], values: Any, where: str) -> _T:
    """A dataclass from a JSON object that has its fields, all of them and no others."""
    values = _object(values, where or "the file")
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in values.keys() - hints.keys():
        raise _WrongError(f"{prefix}{name[:40]} is not known")
    for name in hints.keys() - values.keys():
        raise _WrongError(f"{prefix}{name} is missing")
    return cls(**{name: _READERS[hint](values[name], prefix + name) for name, hint in hints.items()})


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MOST_ENTRIES or any(len(name) > _MOST_TEXT for name in value):
        raise _WrongError(f"{where} is not an object of at most {_MOST_ENTRIES} entries")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ENTRIES:
        raise _WrongError(f"{where} is not a list of at most {_MOST_ENTRIES} entries")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise _WrongError(f"{where} is not a text of at most {_MOST_TEXT} characters")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _WrongError(f"{where} is not true or false")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_COUNT:  # a bool is an int, too
        raise _WrongError(f"{where} is not a whole number from 0 to 2^60")
    return value


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e30 or not math.isfinite(value):
        raise _WrongError(f"{where} is not a number from 0 to 1e30")
    return float(value)


def _or_none(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, where: None if value is None else read(value, where)


def _each(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    return lambda value, where: tuple(read(entry, f"{where}[{n}]") for n, entry in enumerate(_list(value, where)))


def _by_name(read: Callable[[Any, str], Any]) -> Callable[[Any, str], dict[str, Any]]:
    return lambda value, where: {
        name: read(entry, f"{where}.{name[:40]}") for name, entry in _object(value, where).items()
    }


def _record_of(cls: type[Any]) -> Callable[[Any, str], Any]:
    return lambda value, where: _record(cls, value, where)


def _policy(value: Any, where: str) -> MemoryPolicy:
    """Types first: MemoryPolicy checks what the values mean."""
    values = _object(value, where)
    checked: dict[str, Any] = {}
    for name, entry in values.items():
        if name in ("phases", "optimizers"):
            kind: type[Any] = PhasePolicy if name == "phases" else OptimizerPolicy
            parts = _by_name(_record_of(kind))(entry, f"{where}.{name}")
            checked[name] = {part: asdict(policy) for part, policy in parts.items()}
        elif name == "resident":
            checked[name] = _number(entry, f"{where}.{name}")
        elif name in get_type_hints(MemoryPolicy):
            checked[name] = _text(entry, f"{where}.{name}")
        else:
            raise _WrongError(f"{where}.{name[:40]} is not known")
    return MemoryPolicy.from_dict(checked)


def _timeline(value: Any, where: str) -> Timeline:
    values = _object(value, where)
    if values.keys() != {"marks", "bytes", "reserved"}:
        raise _WrongError(f"{where} does not have just marks, bytes and reserved")
    rows = _by_name(_each(_count))(values["bytes"], f"{where}.bytes")
    if tuple(rows) != CATEGORIES or len({len(row) for row in rows.values()}) != 1:
        raise _WrongError(f"{where}.bytes does not have equally long lists for {', '.join(CATEGORIES)}")
    marks = []
    for n, mark in enumerate(_list(values["marks"], f"{where}.marks")):
        at = f"{where}.marks[{n}]"
        if len(_list(mark, at)) != 3:
            raise _WrongError(f"{at} is not a name, a begin and an end")
        marks.append((_text(mark[0], at), _count(mark[1], at), _count(mark[2], at)))
    reserved = _or_none(_each(_count))(values["reserved"], f"{where}.reserved")
    return Timeline(
        marks=tuple(marks),
        bytes=np.array([rows[name] for name in CATEGORIES], np.int64),
        reserved=None if reserved is None else np.array(reserved, np.int64),
    )


_READERS: Mapping[Any, Callable[[Any, str], Any]] = {
    str: _text,
    bool: _flag,
    int: _count,
    float: _number,
    int | None: _or_none(_count),
    str | None: _or_none(_text),
    tuple[str, ...]: _each(_text),
    Mapping[str, int]: _by_name(_count),
    Mapping[str, str]: _by_name(_text),
    MemoryPolicy: _policy,
    tuple[PhasePlan, ...]: _each(_record_of(PhasePlan)),
    tuple[Alternative, ...]: _each(_record_of(Alternative)),
    Timeline | None: _or_none(_timeline),
}
