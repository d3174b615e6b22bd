"""Who holds the memory at the peak of a step, what arithmetic it does, and what it copies to the host and back."""

import bisect
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lowvram.memory import host
from lowvram.memory.tracer import LiveBytes

MIB = 2**20
_SHOWN = ("lowvram", "diffusers", "benchmarks")  # packages whose lines are named as makers of a tensor
_SKIPPED = ("/account.py", "/memory/tracer.py", "/memory/host.py")


class _Entry(int):
    """Bytes of a storage, and who made it."""

    maker: str


class _Ledger(host.StorageTable[int]):
    def __init__(self, account: "Account") -> None:
        super().__init__(account._dropped)
        self.account = account

    def set(self, tensor: Tensor, value: int) -> None:
        before = self.get(tensor)
        if before is not None:
            self.account.log.append((-before, before))
        entry = _Entry(value)
        entry.maker = self.account.maker(tensor)
        self.account.log.append((value, entry))
        super().set(tensor, entry)


class Account(LiveBytes):
    """Live bytes with a log of who made and freed what. flops, host_bytes: so far."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, Any]] = []  # (change in bytes, entry)
        self.flops = 0
        self.host_bytes = 0  # copied between device and host, both ways
        self._sizes = _Ledger(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is NotImplemented:
            return out
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            with suppress(TypeError, ValueError):
                self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        if func is torch.ops.aten.copy_.default and host.is_host(args[0]) != host.is_host(args[1]):
            self.host_bytes += args[0].nbytes
        return out

    def call(self, what: str, *things: Any) -> None:
        """Name what made tensors that are alive: "weights of G" instead of a line of code."""
        for thing in things:
            for tensor in thing if isinstance(thing, Iterable) and not isinstance(thing, Tensor) else [thing]:
                entry = self._sizes.get(tensor) if isinstance(tensor, Tensor) else None
                if isinstance(entry, _Entry):
                    entry.maker = what

    def empty_cache(self) -> None:
        """Note that the allocator gives back here what is free, and that its highest point is looked for from here."""
        self.log.append((0, None))

    def maker(self, tensor: Tensor) -> str:
        """The line of code at work, and the tensor that it made."""
        frame = sys._getframe(1)
        place = "torch"
        while frame is not None:
            name = frame.f_code.co_filename
            if any(f"/{part}/" in name for part in _SHOWN) and not name.endswith(_SKIPPED):
                place = f"{name.rsplit('/', 1)[1]} {frame.f_code.co_name}"
                break
            frame = frame.f_back
        pass_ = ", backward" if torch._C._current_graph_task_id() != -1 else ""
        return f"{place}{pass_} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    def holders(self, start: int, stop: int, most: int = 14) -> list[tuple[str, int]]:
        """What is alive where the log between two places is at its highest: maker and bytes, the largest first."""
        live = highest = 0
        at = start
        for index, (change, _) in enumerate(self.log[:stop]):
            live += change
            if index >= start and live > highest:
                highest, at = live, index
        held: Counter[str] = Counter()
        for change, entry in self.log[: at + 1]:
            if entry is not None:
                held[entry.maker] += change
        rows = [(maker, size) for maker, size in held.most_common(most) if size > 0]
        return [*rows, ("all else", highest - sum(size for _, size in rows))]

    def last_maker(self, start: int, stop: int) -> str:
        """Who made the tensor with which the peak was reached."""
        live = highest = 0
        last = "nothing"
        for index, (change, entry) in enumerate(self.log[:stop]):
            live += change
            if index >= start and live > highest:
                highest, last = live, entry.maker
        return last

    def _dropped(self, entry: int) -> None:
        self.log.append((-entry, entry))
        self._freed(entry)


def reserved_bytes(log: list[tuple[int, Any]]) -> int:
    """What a caching allocator as torch's reserves for the requests of a log: best fit in segments that stay reserved.

    Requests up to 1 MiB share segments of 2 MiB, those up to 10 MiB segments of 20 MiB, larger ones get their own,
    rounded up to 2 MiB. Where the log says `Account.empty_cache`, wholly free segments go back. Streams, and freeing
    what is cached when memory runs out, are left out.
    """
    free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}  # by small: (size, segment, offset), sorted
    where: dict[int, tuple[int, int, int, bool]] = {}
    whole_sizes: dict[int, int] = {}  # by segment
    reserved = highest = segments = 0
    for change, entry in log:
        if entry is None:
            for small, spots in free.items():
                reserved -= sum(spot[0] for spot in spots if spot[0] == whole_sizes[spot[1]])
                free[small] = [spot for spot in spots if spot[0] != whole_sizes[spot[1]]]
            highest = reserved
        elif change > 0:
            size, small = int(change), change <= MIB
            spots = free[small]
            index = bisect.bisect_left(spots, (size, -1, -1))
            if index == len(spots):
                whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
                reserved, segments = reserved + whole, segments + 1
                highest, whole_sizes[segments] = max(highest, reserved), whole
                bisect.insort(spots, (whole, segments, 0))
                index = bisect.bisect_left(spots, (size, -1, -1))
            got, segment, offset = spots.pop(index)
            rest = got - size
            if rest >= (512 if small else MIB + 1):
                bisect.insort(spots, (rest, segment, offset + size))
            else:
                size = got
            where[id(entry)] = (size, segment, offset, small)
        elif id(entry) in where:
            size, segment, offset, small = where.pop(id(entry))
            spots = free[small]
            for spot in [s for s in spots if s[1] == segment and (s[2] + s[0] == offset or offset + size == s[2])]:
                spots.remove(spot)
                offset, size = min(offset, spot[2]), size + spot[0]
            bisect.insort(spots, (size, segment, offset))
    return highest
