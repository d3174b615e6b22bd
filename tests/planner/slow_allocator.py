"""A caching allocator that scans lists: slow, and too plain to be wrong in the same way as the fast one."""

from collections.abc import Sequence
from itertools import groupby

from lowvram.planner.allocator import MIB
from lowvram.planner.log import Requests


class Plain:
    """Ranges of addresses as lists of (bytes, holder); holder None: free, -1: no memory."""

    def __init__(self, capacity_bytes: int, expandable: bool) -> None:
        self.capacity, self.expandable = capacity_bytes, expandable
        self.pages = [2 * MIB, 20 * MIB]
        self.ranges: list[tuple[int, list[tuple[int, int | None]]]] = []  # (pool, blocks)
        if expandable:
            self.ranges = [(pool, [(20 * MIB * 1000, -1)]) for pool in (0, 1)]
        self.flushes = 0

    def reserved(self) -> int:
        return sum(size for _, blocks in self.ranges for size, holder in blocks if holder != -1)

    def join(self) -> None:
        for _, blocks in self.ranges:
            joined: list[tuple[int, int | None]] = []
            for holder, group in groupby(blocks, key=lambda block: block[1]):
                sizes = [size for size, _ in group]
                joined += [(sum(sizes), holder)] if holder in (None, -1) else [(size, holder) for size in sizes]
            blocks[:] = joined

    def free(self, storage: int) -> None:
        for _, blocks in self.ranges:
            blocks[:] = [(size, None if holder == storage else holder) for size, holder in blocks]
        self.join()

    def empty(self) -> None:
        for pool, blocks in self.ranges:
            if not self.expandable:
                blocks[:] = [] if [holder for _, holder in blocks] == [None] else blocks
                continue
            cut: list[tuple[int, int | None]] = []
            begin = 0
            for size, holder in blocks:
                first, last = -(-begin // self.pages[pool]), (begin + size) // self.pages[pool]
                if holder is None and first < last:
                    first, last = first * self.pages[pool], last * self.pages[pool]
                    pieces = [(first - begin, None), (last - first, -1), (begin + size - last, None)]
                    cut += [piece for piece in pieces if piece[0]]
                else:
                    cut.append((size, holder))
                begin += size
            blocks[:] = cut
        self.join()

    def found(self, pool: int, wanted: int) -> tuple[int, int] | None:
        fits = []
        for number, (kind, blocks) in enumerate(self.ranges):
            for index, (size, holder) in enumerate(blocks):
                if kind == pool and holder is None and size >= wanted:
                    grows = index + 1 < len(blocks) and blocks[index + 1][1] == -1
                    fits.append((size, number, index, size + (blocks[index + 1][0] if grows else 0)))
        fits.sort()
        while len(fits) > 1 and fits[1][3] < fits[0][3]:
            del fits[0]
        return fits[0][1:3] if fits else None

    def allocate(self, storage: int, wanted: int) -> bool:
        pool = int(wanted > MIB)
        place = self.found(pool, wanted)
        if place is None:
            segment = 2 * MIB if not pool else 20 * MIB if wanted < 10 * MIB else -(-wanted // (2 * MIB)) * 2 * MIB
            if self.reserved() + segment > self.capacity:
                self.flushes += 1
                self.empty()
                if self.reserved() + segment > self.capacity:
                    return False
            if self.expandable:
                self.grow(pool, wanted)
            else:
                self.ranges.append((pool, [(segment, None)]))
            place = self.found(pool, wanted)
            assert place is not None
        blocks = self.ranges[place[0]][1]
        size = blocks[place[1]][0]
        split = size - wanted >= 512 if self.expandable or not pool else size - wanted > MIB
        blocks[place[1] : place[1] + 1] = [(wanted, storage), (size - wanted, None)] if split else [(size, storage)]
        return True

    def grow(self, pool: int, wanted: int) -> None:
        """Fill holes page by page, from the first whose surroundings have room."""
        blocks = self.ranges[pool][1]
        for index in range(len(blocks)):
            if blocks[index][1] != -1:
                continue
            index -= index > 0 and blocks[index - 1][1] is None
            room = 0
            for size, holder in blocks[index:]:
                if holder not in (None, -1):
                    break
                room += size
            if room >= wanted:
                break
        while not (blocks[index][1] is None and blocks[index][0] >= wanted):
            hole = next(place for place in range(index, len(blocks)) if blocks[place][1] == -1)
            size = blocks[hole][0] - self.pages[pool]
            blocks[hole : hole + 1] = [(self.pages[pool], None), (size, -1)] if size else [(self.pages[pool], None)]
            self.join()


def plainly(asked: Requests, capacity_bytes: int, empty_at: Sequence[int], expandable: bool) -> tuple:
    """Bytes reserved after each event, the event that failed, flushes: by the slow model."""
    plain = Plain(capacity_bytes, expandable)
    reserved: list[int] = []
    for event, code in enumerate(asked.order.tolist()):
        if event in empty_at:
            plain.empty()
        if code < 0:
            plain.free(~code)
        elif not plain.allocate(code, int(asked.sizes[code])):
            return reserved + [plain.reserved()] * (len(asked.order) - event), event, plain.flushes
        reserved.append(plain.reserved())
    return reserved, None, plain.flushes
