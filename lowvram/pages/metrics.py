"""The lines of metrics.jsonl, of a run that may be long, broken off, or somebody else's.

A file of some size is read line by line; of a larger one, lines at even distances stand for the rest, and are exact
themselves.
"""

import bisect
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

NAME = "metrics.jsonl"
_WHOLE_BYTES = 64 * 2**20  # read whole, in some seconds
_QUICK_BYTES = 3 * 2**20  # the same while a training waits for it
_LINES = 2000  # of a larger file
_MOST_LINE_BYTES = 2**16
_MOST_KEYS = 300
_MOST_TEXT = 100
_MOST_NUMBER = 1e30

Point = tuple[float, float]
Row = dict[str, float | str]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Lines in the order of their steps; each has step and kimg. Values that are not finite are left out.

    broken: lines that could not be read, the last one of a run that was cut off among them. not_finite: values that
    were NaN, infinite or beyond _MOST_NUMBER. every_line: False where lines stand for those between them.
    """

    rows: tuple[Row, ...] = ()
    broken: int = 0
    not_finite: int = 0
    every_line: bool = True

    def series(self, name: str, over: str = "kimg") -> list[Point]:
        """(over, value) of each line that has both."""
        return [
            (x, y)
            for row in self.rows
            if isinstance(x := row.get(over), float | int) and isinstance(y := row.get(name), float | int)
        ]

    def names(self, prefix: str) -> list[str]:
        """The values that begin with a prefix, in the order in which they first come."""
        return [name for name in self._names if name.startswith(prefix)]

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(itertools.chain.from_iterable(self.rows)))

    def last(self, name: str) -> float | None:
        """The newest value."""
        found = self.series(name)
        return found[-1][1] if found else None

    def highest(self, name: str) -> float | None:
        """The largest value."""
        return max((y for _, y in self.series(name)), default=None)

    def moved(self, points: Iterable[Point], name: str) -> list[Point]:
        """Points over kimg as points over a value that grows, such as the hours up to then.

        Between lines that have the value it is taken in proportion; points before the first or after the last of them
        are left out, for nothing says where they lie.
        """
        known = dict(self.series(name))
        at = sorted(known)
        out = []
        for kimg, y in points:
            right = bisect.bisect_left(at, kimg)
            if kimg in known:
                out.append((known[kimg], y))
            elif 0 < right < len(at):
                before, after = at[right - 1], at[right]
                share = (kimg - before) / (after - before)
                out.append((known[before] + (known[after] - known[before]) * share, y))
        return out


def read(folder: Path, *, quick: bool = False) -> Metrics:
    """Those of a run folder; none where there is no such file. quick: be done in a second, however long the run is.

    Raises:
        OSError: the disk says no.
    """
    path = folder / NAME
    if path.is_symlink() or not path.is_file():
        return Metrics()
    size = path.stat().st_size
    every_line = size <= (_QUICK_BYTES if quick else _WHOLE_BYTES)
    with path.open("rb") as file:
        lines = file.read(_WHOLE_BYTES).splitlines() if every_line else _some_lines(file, size)
        return _gathered(lines, every_line=every_line)


def _some_lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    yield file.readline(_MOST_LINE_BYTES)
    for n in range(1, _LINES):
        file.seek(size * n // _LINES)
        file.readline(_MOST_LINE_BYTES)  # the rest of a line
        yield file.readline(_MOST_LINE_BYTES)
    file.seek(size - 2 * _MOST_LINE_BYTES)
    yield from file.read(2 * _MOST_LINE_BYTES).splitlines()[1:]


def _gathered(lines: Iterable[bytes], *, every_line: bool) -> Metrics:
    by_step: dict[float, Row] = {}
    broken = not_finite = 0
    for line in lines:
        if not line.strip(b"\0 \t\r\n"):
            continue
        row, bad = _row(line)
        not_finite += bad
        if row is None:
            broken += 1
        else:
            by_step[float(row["step"])] = row
    rows = tuple(by_step[step] for step in sorted(by_step))
    return Metrics(rows=rows, broken=broken, not_finite=not_finite, every_line=every_line)


def _row(line: bytes) -> tuple[Row | None, int]:
    """A line's values, or None, and how many of them are no finite numbers."""
    if len(line) > _MOST_LINE_BYTES:
        return None, 0
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None, 0
    if not isinstance(values, dict) or len(values) > _MOST_KEYS:
        return None, 0
    row: Row = {}
    bad = 0
    for name, value in values.items():
        if len(name) > _MOST_TEXT:
            continue
        if _is_number(value):
            row[name] = value
        elif isinstance(value, str):
            row[name] = value[:_MOST_TEXT]
        else:
            bad += isinstance(value, float)
    good = all(isinstance(at := row.get(name), int | float) and at >= 0 for name in ("step", "kimg"))
    return (row if good else None), bad


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MOST_NUMBER and math.isfinite(value)  # compared first: an int may be too large for a float
