"""A whole training step under a policy, put together from recorded pieces.

A phase's micro-batches are alike, so that one of them is recorded. In the first the gradients stay; in those after it
each new gradient is added to them and gone. How a policy takes gradients decides what happens at their arrival.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lowvram.planner.log import CATEGORIES, TEMPORARY, Requests
from lowvram.planner.record import Piece, rounded

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Taking:
    """How gradients are taken as they are complete.

    update: after, deferred or fused. later: the micro-batch is not the first of its phase. step_sizes: see
    tracing.Recorded.
    """

    update: str = "after"
    later: bool = False
    step_sizes: tuple[int, ...] = ()


def scaled(piece: Piece, share: float) -> Piece:
    """The piece of so much larger or smaller a batch, of one recorded with a multiple of `record.PRIME` samples."""

    def rescaled(whole: NDArray[np.float64], grows: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
        if grows.dtype == np.bool_:
            grows = np.where(grows, whole, 0.0)
        result: NDArray[np.float64] = whole - grows + grows * share
        return result

    work = replace(
        piece.work,
        flops=rescaled(piece.work.flops, piece.scaled_flops),
        bytes=rescaled(piece.work.bytes, piece.scaled_bytes),
        host_bytes=piece.work.host_bytes + piece.scaled_host_bytes * (share - 1),
    )
    return replace(piece, sizes=rescaled(piece.sizes, piece.scaled), work=work)


@dataclass(kw_only=True)
class Flow:
    """Events, with their storages' rounded sizes, categories and makers; gradients that stay to the end."""

    order: Ints
    sizes: Ints
    categories: NDArray[np.int8]
    makers: NDArray[np.int32]
    names: tuple[str, ...]
    gradients: Ints  # storages that are alive at the end

    def peak_bytes(self) -> int:
        """The most that is alive at one time, of what these events made."""
        if not len(self.order):
            return 0
        return int(_live(self.order, self.sizes).max())


def flow(piece: Piece, taking: Taking) -> Flow:
    """A micro-batch's events when its gradients are so taken. What it left else ends with it."""
    sizes = rounded(piece.sizes)
    keep = taking.update == "after" and not taking.later
    seen: set[int] = set()
    positions: list[int] = []
    events: list[int] = []
    extra_sizes: list[int] = []
    norms: list[int] = []

    def temporary(size: int) -> int:
        extra_sizes.append(-(-size // 512) * 512)
        return len(sizes) + len(extra_sizes) - 1

    if taking.update != "after" and taking.later:  # the earlier micro-batches' norms
        norms += [temporary(4) for _ in {storage for _, storage, _ in piece.arrivals}]
        positions, events = [0] * len(norms), list(norms)
    for event, storage, parameter in piece.arrivals:
        again = storage in seen
        seen.add(storage)
        inserted: list[int] = []
        if taking.update == "deferred" and (taking.later or again):
            held, total = temporary(int(sizes[storage])), temporary(int(sizes[storage]))
            inserted += [held, total, ~held, ~total]
            if again:  # recorded, it was added to what was there already, and gone
                own = temporary(int(sizes[storage]))
                inserted = [own, *inserted, ~own]
        elif taking.update == "fused" and parameter < len(taking.step_sizes) and taking.step_sizes[parameter]:
            scratch = temporary(taking.step_sizes[parameter])
            inserted += [scratch, ~scratch]
        if not keep and not again:
            inserted.append(~storage)
        if taking.update != "after" and not taking.later and not again:
            norms.append(temporary(4))
            inserted.append(norms[-1])
        positions += [event] * len(inserted)
        events += inserted
    order = np.insert(piece.order, positions, events) if positions else piece.order
    ends = [~storage for storage in (*piece.left, *norms)]
    gradients = sorted(seen) if keep else []
    return Flow(
        order=np.concatenate([order, np.array(ends, dtype=np.int64)]),
        sizes=np.concatenate([sizes, np.array(extra_sizes, dtype=np.int64)]),
        categories=np.concatenate([piece.categories, np.full(len(extra_sizes), TEMPORARY, dtype=np.int8)]),
        makers=np.concatenate([piece.makers, np.zeros(len(extra_sizes), dtype=np.int32)]),
        names=piece.names,
        gradients=np.array(gradients, dtype=np.int64),
    )


class Writer:
    """Writes flows one after the other into `Requests`."""

    def __init__(self) -> None:
        self._order: list[Ints] = []
        self._sizes: list[Ints] = []
        self._categories: list[NDArray[np.int8]] = []
        self._makers: list[NDArray[np.int32]] = []
        self._names: dict[str, int] = {}
        self._marks: list[tuple[int, str]] = []
        self._events = 0
        self._storages = 0

    def mark(self, name: str) -> None:
        """A part of the step begins."""
        self._marks.append((self._events, name))

    def hold(self, sizes: Iterable[tuple[int, int]], name: str) -> Ints:
        """Allocate storages (category, bytes) that stay; returns them for `free`."""
        pairs = [(kind, -(-size // 512) * 512) for kind, size in sizes if size]
        count = len(pairs)
        made = np.arange(self._storages, self._storages + count)
        self._add(
            made,
            np.array([size for _, size in pairs], dtype=np.int64),
            np.array([kind for kind, _ in pairs], dtype=np.int8),
            np.full(count, self._names.setdefault(name, len(self._names)), dtype=np.int32),
        )
        return made

    def play(self, one: Flow) -> Ints:
        """Write a flow; returns the gradients that are alive after it, for `free`."""
        offset = self._storages
        shifted = np.where(one.order >= 0, one.order + offset, one.order - offset)
        places = np.array([self._names.setdefault(n, len(self._names)) for n in one.names] or [0], dtype=np.int32)
        self._add(shifted, one.sizes, one.categories, places[one.makers])
        gradients: Ints = one.gradients + offset
        return gradients

    def free(self, storages: Ints) -> None:
        """End storages."""
        self._order.append(~storages)
        self._events += len(storages)

    def requests(self) -> Requests:
        """All that was written."""
        return Requests(
            order=np.concatenate(self._order),
            sizes=np.concatenate(self._sizes),
            categories=np.concatenate(self._categories),
            makers=np.concatenate(self._makers),
            names=tuple(self._names),
            marks=tuple(self._marks),
        )

    def _add(self, order: Ints, sizes: Ints, categories: NDArray[np.int8], makers: NDArray[np.int32]) -> None:
        self._order.append(order)
        self._sizes.append(sizes)
        self._categories.append(categories)
        self._makers.append(makers)
        self._events += len(order)
        self._storages += len(sizes)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The highest moment of a part of a step: its live bytes, by category, and the operation and module at work."""

    name: str
    live_bytes: int
    by_category: Mapping[str, int] = field(default_factory=dict)
    operation: str = ""
    module: str = ""


def highest(requests: Requests) -> dict[str, Part]:
    """By the name of each mark, the highest moment of its parts."""
    live, by_category = requests.live(), requests.live_by_category()
    storages = requests.storages()
    found: dict[str, Part] = {}
    ends = [event for event, _ in requests.marks[1:]] + [len(live)]
    for (begin, name), end in zip(requests.marks, ends, strict=True):
        before = int(live[begin - 1]) if begin else 0
        event = begin + int(live[begin:end].argmax()) if end > begin else begin - 1
        peak = max(before, int(live[event])) if event >= 0 else before
        if name in found and found[name].live_bytes >= peak:
            continue
        if peak == before and begin:
            event = begin - 1
        maker = requests.names[requests.makers[storages[event]]]
        operation, _, module = maker.partition(" in ")
        found[name] = Part(
            name=name,
            live_bytes=peak,
            by_category={kind: int(by_category[i, event]) for i, kind in enumerate(CATEGORIES)},
            operation=operation,
            module=module,
        )
    return found


def _live(order: Ints, sizes: Ints) -> Ints:
    return np.cumsum(np.where(order >= 0, sizes[np.where(order >= 0, order, ~order)], -sizes[~np.minimum(order, -1)]))
