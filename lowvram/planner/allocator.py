"""What torch's CUDA caching allocator reserves for a list of requests, replayed without a GPU.

The rules, as of torch 2.11 to 2.15 with the default settings:
- Requests up to 1 MiB are cut from segments of 2 MiB, those below 10 MiB from segments of 20 MiB; larger ones get a
  segment of their own, rounded up to 2 MiB, if no free block holds them. The first kind has a pool of its own.
- The smallest free block of the pool that is large enough is taken, of equals the one that came first. What is left of
  it becomes a block if it is 512 bytes or more (small pool) or more than 1 MiB (large pool).
- A freed block joins its free neighbours. Segments stay reserved.
- A new segment that would exceed the capacity makes the allocator give back all wholly free ones and try once more.

With `expandable_segments:True` each pool is one range of addresses, backed by pages of 2 MiB or 20 MiB as it grows;
any free page can be given back, and what is left of a block is kept from 512 bytes on.

Left out: streams (each has pools of its own), graphs, allocations by libraries outside of torch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowvram.planner.log import GRAIN_BYTES, Requests

MIB = 2**20
_SMALL_BYTES = MIB  # requests up to here come from the small pool
_SMALL_SEGMENT_BYTES = 2 * MIB
_LARGE_BYTES = 10 * MIB  # from here on a request gets a segment of its own
_LARGE_SEGMENT_BYTES = 20 * MIB
_ROUND_BYTES = 2 * MIB

# A block is one whole number, its size above its address: sorted, the numbers are in the order of best fit.
_ADDRESS_BITS = 52
_ADDRESS = 2**_ADDRESS_BITS - 1
_RANGE_BYTES = _LARGE_SEGMENT_BYTES * 2**20  # addresses of an expandable pool, more than any card's memory


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What an allocator reserved.

    reserved_bytes: the most at any time. by_mark: the most between each mark and the next, what was reserved at the
    mark included; of a name that comes several times the highest; marks after a failure are missing. fits: nothing
    failed. failed_at: the event that failed, where the replay ended; -1: already the residents did not fit. flushes:
    how often free segments were given back to stay within the capacity, before a failure too (torch's
    `num_alloc_retries`). segments: asked of the device in all; expandable: pages. steps: (event, bytes reserved from
    it on) in order. events: in the requests.
    """

    reserved_bytes: int
    by_mark: dict[str, int]
    fits: bool
    failed_at: int | None
    flushes: int
    segments: int
    steps: tuple[tuple[int, int], ...]
    events: int

    def reserved_over_time(self) -> NDArray[np.int64]:
        """Bytes reserved after each event, int64 [E]; after a failure what was reserved then."""
        starts = np.array([event for event, _ in self.steps], dtype=np.int64)
        values = np.array([reserved for _, reserved in self.steps], dtype=np.int64)
        return values[np.searchsorted(starts, np.arange(self.events), side="right") - 1]


class CachingAllocator:
    """An allocator between two requests. Sizes are bytes, multiples of 512.

    reserved_bytes: now. peak_bytes: the most since it was last set.
    """

    def __init__(self, *, capacity_bytes: int | None = None, expandable: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable = expandable
        self.reserved_bytes = self.peak_bytes = 0
        self.flushes = self.segments = 0
        self.steps: list[tuple[int, int]] = []
        self._small: list[int] = []  # free blocks, sorted
        self._large: list[int] = []
        self._starts: dict[int, int] = {}  # free blocks by their first address
        self._ends: dict[int, int] = {}  # free blocks by the address after them
        self._whole: dict[int, int] = {}  # sizes of segments by address, unless expandable
        self._next = 0  # address of the next segment
        # Addresses without memory behind them, by pool: their sizes by first address.
        self._holes = ({0: _RANGE_BYTES}, {_RANGE_BYTES: _RANGE_BYTES}) if expandable else ({}, {})

    def run(self, order: Sequence[int], sizes: Sequence[int], blocks: list[int], first: int = 0) -> int | None:
        """Serve requests: s allocates sizes[s], ~s frees it. Nothing is done for a size of 0.

        blocks: for each storage 0, or the block that holds it (see `span`); changed in place. first: the number of the
        first event, for `steps` and the result.

        Returns:
            The event that did not fit, or None.

        Raises:
            ValueError: a storage is allocated while alive, or freed while not.
        """
        small, large, starts, ends = self._small, self._large, self._starts, self._ends
        expandable = self.expandable
        for event, code in enumerate(order, first):
            if code < 0:
                block = blocks[~code]
                if block:
                    blocks[~code] = 0
                    self._give(small if sizes[~code] <= _SMALL_BYTES else large, block & _ADDRESS, block)
                elif sizes[~code]:
                    raise ValueError(f"event {event} frees storage {~code}, which is not alive")
                continue
            size = sizes[code]
            if not size:
                continue
            if blocks[code]:
                raise ValueError(f"event {event} allocates storage {code}, which is alive")
            if size <= _SMALL_BYTES:
                free, least_rest = small, GRAIN_BYTES
            else:
                free, least_rest = large, GRAIN_BYTES if expandable else _SMALL_BYTES + 1
            index = bisect_left(free, size << _ADDRESS_BITS)
            if index == len(free):
                fits = self._reserve(size)
                self.steps.append((event, self.reserved_bytes))
                if not fits:
                    return event
                index = bisect_left(free, size << _ADDRESS_BITS)  # only the new block is large enough
            elif expandable:
                index = self._least_room(free, index)
            block = free.pop(index)
            address, whole = block & _ADDRESS, block >> _ADDRESS_BITS
            del starts[address]
            rest = whole - size
            if rest >= least_rest:
                tail = rest << _ADDRESS_BITS | (address + size)
                starts[address + size] = ends[address + whole] = tail
                insort(free, tail)
                blocks[code] = size << _ADDRESS_BITS | address
            else:
                del ends[address + whole]
                blocks[code] = block
        return None

    def empty_cache(self) -> None:
        """Give back what is wholly free: segments, or pages if expandable."""
        for pool, free in enumerate((self._small, self._large)):
            blocks = free.copy()
            for block in blocks:
                address, size = block & _ADDRESS, block >> _ADDRESS_BITS
                if self.expandable:
                    self._unmap(pool, address, size)
                elif self._whole.get(address) == size:
                    del self._whole[address]
                    self._take(free, block)
                    self.reserved_bytes -= size

    @staticmethod
    def span(block: int) -> tuple[int, int]:
        """First address and size, in bytes, of a block."""
        return block & _ADDRESS, block >> _ADDRESS_BITS

    def _reserve(self, size: int) -> bool:
        """Get memory from the device so that a free block of `size` exists; whether the capacity allows it."""
        segment = _segment_bytes(size)
        if self.capacity_bytes is not None and self.reserved_bytes + segment > self.capacity_bytes:
            self.flushes += 1
            self.empty_cache()
            if self.reserved_bytes + segment > self.capacity_bytes:
                return False
        if self.expandable:
            self._grow(size)
        else:
            address = self._next
            self._next = address + segment + _ROUND_BYTES  # a gap, so that segments never join
            self._whole[address] = segment
            self.reserved_bytes += segment
            self.segments += 1
            self._give(self._small if size <= _SMALL_BYTES else self._large, address, segment << _ADDRESS_BITS)
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
        return True

    def _give(self, free: list[int], address: int, block: int) -> None:
        """Make a block free, one with its free neighbours. Of `block` the size counts."""
        size = block >> _ADDRESS_BITS
        starts, ends = self._starts, self._ends
        before = ends.pop(address, 0)
        if before:
            del free[bisect_left(free, before)]
            address = before & _ADDRESS
            size += before >> _ADDRESS_BITS
        after = starts.pop(address + size, 0)
        if after:
            del free[bisect_left(free, after)]
            size += after >> _ADDRESS_BITS
        block = size << _ADDRESS_BITS | address
        starts[address] = ends[address + size] = block
        insort(free, block)

    def _take(self, free: list[int], block: int) -> None:
        """Make a free block unknown."""
        address = block & _ADDRESS
        del free[bisect_left(free, block)], self._starts[address], self._ends[address + (block >> _ADDRESS_BITS)]

    def _least_room(self, free: list[int], index: int) -> int:
        """The free block to take of an expandable pool: one that can grow counts with the hole after it."""
        room = self._room(free[index])
        while index + 1 < len(free) and (following := self._room(free[index + 1])) < room:
            index, room = index + 1, following
        return index

    def _room(self, block: int) -> int:
        end = (block & _ADDRESS) + (block >> _ADDRESS_BITS)
        holes = self._holes[end > _RANGE_BYTES]
        return (block >> _ADDRESS_BITS) + holes.get(end, 0)

    def _grow(self, size: int) -> None:
        """Put pages behind the first addresses where `size` has room between blocks in use."""
        pool = int(size > _SMALL_BYTES)
        free, page = (self._large, _LARGE_SEGMENT_BYTES) if pool else (self._small, _SMALL_SEGMENT_BYTES)
        holes, starts = self._holes[pool], self._starts
        for hole in sorted(holes):
            start = end = self._ends.get(hole, hole) & _ADDRESS  # a free block just before is used too
            while end - start < size and (length := holes.get(end) or starts.get(end, 0) >> _ADDRESS_BITS):
                end += length
            if end - start >= size:
                break
        while (have := starts.get(start, 0) >> _ADDRESS_BITS) < size:
            begin = start + have
            length = holes.pop(begin)
            mapped = min(length, -(-(size - have) // page) * page)
            if mapped < length:
                holes[begin + mapped] = length - mapped
            self.reserved_bytes += mapped
            self.segments += mapped // page
            self._give(free, begin, mapped << _ADDRESS_BITS)

    def _unmap(self, pool: int, address: int, size: int) -> None:
        """Give back the whole pages of a free block."""
        free, page = (self._large, _LARGE_SEGMENT_BYTES) if pool else (self._small, _SMALL_SEGMENT_BYTES)
        holes, end = self._holes[pool], address + size
        first, last = -(-address // page) * page, end // page * page
        if first >= last:
            return
        self._take(free, size << _ADDRESS_BITS | address)
        self.reserved_bytes -= last - first
        for begin, stop in ((address, first), (last, end)):
            if begin < stop:
                self._give(free, begin, (stop - begin) << _ADDRESS_BITS)
        last += holes.pop(last, 0)
        for begin, length in holes.items():
            if begin + length == first:
                first = begin
                break
        holes[first] = last - first


def replay(
    requests: Requests,
    *,
    capacity_bytes: int | None = None,
    resident: Requests | None = None,
    empty_at: Sequence[int] = (),
    expandable: bool = False,
) -> Replay:
    """Serve requests as torch's caching allocator would.

    Args:
        capacity_bytes: what may be reserved, as by `torch.cuda.set_per_process_memory_fraction`; None: no bound. With
            `expandable` torch checks the segment that it would take otherwise, so that pages may exceed the bound by
            less than 20 MiB, and a block that only grows may be refused.
        resident: served before, with storages of its own; what it leaves alive stays. Its peak counts in
            `reserved_bytes`, its marks do not.
        empty_at: events before which wholly free segments are given back (`torch.cuda.empty_cache()`), 0 to E.
        expandable: as `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.

    Raises:
        ValueError: a size below 0, or a storage that is allocated while alive or freed while not.
    """
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable=expandable)
    return _replay(allocator, requests, resident, empty_at)


def _replay(
    allocator: CachingAllocator, requests: Requests, resident: Requests | None, empty_at: Sequence[int]
) -> Replay:
    by_mark: dict[str, int] = {}
    failed: int | None = None
    name: str | None = None
    if resident is not None and allocator.run(resident.order.tolist(), *_room_for(resident)) is not None:
        failed = -1
    highest = allocator.peak_bytes
    order = requests.order.tolist()
    sizes, blocks = _room_for(requests)
    marks: dict[int, list[str]] = {}
    for event, mark in requests.marks:
        marks.setdefault(event, []).append(mark)
    emptied = set(empty_at)
    cuts = sorted({0, *marks, *emptied})
    allocator.steps = [(0, allocator.reserved_bytes)]
    for begin, end in zip(cuts, [*cuts[1:], len(order)], strict=True):
        if failed is not None:
            break
        if begin in emptied:
            allocator.empty_cache()
            allocator.steps.append((begin, allocator.reserved_bytes))
        for name in marks.get(begin, ()):
            by_mark[name] = max(by_mark.get(name, 0), allocator.reserved_bytes)
        allocator.peak_bytes = allocator.reserved_bytes
        failed = allocator.run(order[begin:end], sizes, blocks, begin)
        highest = max(highest, allocator.peak_bytes)
        if name is not None:
            by_mark[name] = max(by_mark[name], allocator.peak_bytes)
    return Replay(
        reserved_bytes=highest,
        by_mark=by_mark,
        fits=failed is None,
        failed_at=failed,
        flushes=allocator.flushes,
        segments=allocator.segments,
        steps=tuple(allocator.steps),
        events=len(order),
    )


def _room_for(requests: Requests) -> tuple[list[int], list[int]]:
    """Sizes as the allocator rounds them, and a place for the block of each storage."""
    if len(requests.sizes) and int(requests.sizes.min()) < 0:
        raise ValueError(f"storage {int(requests.sizes.argmin())} has a size of {int(requests.sizes.min())} bytes")
    return (-(-requests.sizes // GRAIN_BYTES) * GRAIN_BYTES).tolist(), [0] * len(requests.sizes)


def _segment_bytes(size: int) -> int:
    """What the device is asked for to serve a request that no free block holds."""
    if size <= _SMALL_BYTES:
        return _SMALL_SEGMENT_BYTES
    return _LARGE_SEGMENT_BYTES if size < _LARGE_BYTES else -(-size // _ROUND_BYTES) * _ROUND_BYTES
