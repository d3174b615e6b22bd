"""Speed against memory as a picture, with the frontier: the points that no other is better than.

Lengths are pixels of the finished picture; it is drawn SHARPER times as large, so that edges come out smooth.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lowvram.planner.picture import BUDGET, COLOURS, SHARPER
from lowvram.planner.table import ascii_only

SIZE = (1200, 800)
PLOT = (100, 130, 1160, 700)  # left, top, right, bottom
RADIUS = 7
FRONTIER, POINT = BUDGET, COLOURS["weights"]

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

_INK, _GREY, _PALE, _PAPER = (32, 32, 32), (104, 104, 104), (225, 225, 225), (255, 255, 255)
_LABEL, _WIDEST_LABEL = 15, 330
_TICKS = 8  # about


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point: x to y, from `low` to `high` by its noise. best: on the frontier."""

    x: float
    y: float
    low: float
    high: float
    label: str
    best: bool


def frontier(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the (cost, gain) than which no other has as much gain for less cost, or more for as little."""
    best: set[int] = set()
    last: tuple[float, float] | None = None
    for n in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1])):
        if last is None or points[n][1] > last[1] or points[n] == last:
            best.add(n)
            last = points[n]
    return best


def draw(marks: Sequence[Mark], path: Path, *, title: str, subtitle: str, across: str, upwards: str) -> None:
    """Write the picture as a PNG of SIZE; one that is there is replaced at once. `across`, `upwards`: the axes."""
    image = Image.new("RGB", (SIZE[0] * SHARPER, SIZE[1] * SHARPER), _PAPER)
    pen = _Pen(ImageDraw.Draw(image))
    pen.write(40, 36, _fitted(title, 28, SIZE[0] - 80), size=28)
    pen.write(40, 72, _fitted(subtitle, 17, SIZE[0] - 80), size=17, ink=_GREY)
    x = Axis.of([mark.x for mark in marks], PLOT[0], PLOT[2])
    y = Axis.of([end for mark in marks for end in (mark.low, mark.high)], PLOT[3], PLOT[1])
    _grid(pen, x, y, across, upwards)
    stairs = _stairs(marks, x, y)
    pen.line(stairs, FRONTIER, 2)
    for mark in sorted(marks, key=lambda mark: mark.best):  # the frontier's on top
        _point(pen, mark, x.at(mark.x), y)
    _labels(pen, marks, x, y, stairs)
    _legend(pen)
    draft = path.with_name(f".{path.name}.partial")
    image.reduce(SHARPER).save(draft, format="PNG", optimize=True)
    draft.replace(path)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values between two ends of a line of pixels, with a tick at each multiple of `step`."""

    first: float
    last: float
    step: float
    begin: int
    end: int

    @classmethod
    def of(cls, values: Sequence[float], begin: int, end: int) -> "Axis":
        """From 0, unless all values lie far from it; to whole steps beyond the largest."""
        low, high = min(values), max(values)
        if low < 0.7 * high:
            low = 0.0
        span = max(high - low, 0.1 * abs(high), 1e-9)
        power = 10 ** math.floor(math.log10(span / _TICKS))
        step = next(n * power for n in (1, 2, 5, 10) if n * power >= 0.999 * span / _TICKS)
        first = max(0.0, (math.floor(low / step) - 1) * step)
        return cls(first=first, last=(math.floor(high / step) + 1) * step, step=step, begin=begin, end=end)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.begin + (self.end - self.begin) * (value - self.first) / (self.last - self.first)

    def ticks(self) -> list[float]:
        """The multiples of `step` on the axis."""
        return [self.first + n * self.step for n in range(round((self.last - self.first) / self.step) + 1)]


@dataclass(frozen=True)
class _Pen:
    """Draws in the finished picture's pixels."""

    pen: ImageDraw.ImageDraw

    def write(
        self, x: float, y: float, said: str, *, size: int = 15, ink: Colour = _INK, anchor: str = "lm", halo: int = 0
    ) -> None:
        place = (x * SHARPER, y * SHARPER)
        self.pen.text(place, said, ink, _font(size), anchor, stroke_width=halo * SHARPER, stroke_fill=_PAPER)

    def line(self, points: Sequence[tuple[float, float]], ink: Colour, width: float = 1) -> None:
        scaled = [(x * SHARPER, y * SHARPER) for x, y in points]
        self.pen.line(scaled, ink, round(width * SHARPER), joint="curve")

    def circle(self, x: float, y: float, radius: float, inside: Colour, outline: Colour) -> None:
        corners = [round(place * SHARPER) for place in (x - radius, y - radius, x + radius, y + radius)]
        self.pen.ellipse(corners, inside, outline, 2 * SHARPER)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SHARPER)


def _width(said: str, size: int) -> float:
    return _font(size).getlength(said) / SHARPER


def _fitted(said: str, size: int, room: float) -> str:
    """The text, cut short where it is wider than the room for it."""
    said = ascii_only(said)
    if _width(said, size) <= room:
        return said
    while said and _width(said + "...", size) > room:
        said = said[:-1]
    return said + "..."


def _grid(pen: _Pen, x: Axis, y: Axis, across: str, upwards: str) -> None:
    left, top, right, bottom = PLOT
    for value in x.ticks():
        pen.line([(x.at(value), top), (x.at(value), bottom)], _PALE)
        pen.write(x.at(value), bottom + 18, f"{value:.6g}", ink=_GREY, anchor="mm")
    for value in y.ticks():
        pen.line([(left, y.at(value)), (right, y.at(value))], _PALE)
        pen.write(left - 10, y.at(value), f"{value:.6g}", ink=_GREY, anchor="rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], _GREY)
    pen.write((left + right) / 2, bottom + 48, across, size=17, anchor="mm")
    pen.write(left, top - 22, upwards, size=17, anchor="mm")


def _stairs(marks: Sequence[Mark], x: Axis, y: Axis) -> list[tuple[float, float]]:
    """The most speed that is to be had in so much memory, as a line over the plot."""
    path: list[tuple[float, float]] = []
    for mark in sorted((mark for mark in marks if mark.best), key=lambda mark: (mark.x, mark.y)):
        path += [(x.at(mark.x), path[-1][1] if path else PLOT[3]), (x.at(mark.x), y.at(mark.y))]
    return [*path, (PLOT[2], path[-1][1])]


def _point(pen: _Pen, mark: Mark, column: float, y: Axis) -> None:
    if mark.high > mark.low:
        pen.line([(column, y.at(mark.low)), (column, y.at(mark.high))], _GREY, 1)
    pen.circle(column, y.at(mark.y), RADIUS, POINT if mark.best else _PAPER, POINT)


def _labels(pen: _Pen, marks: Sequence[Mark], x: Axis, y: Axis, stairs: Sequence[tuple[float, float]]) -> None:
    """Each point's label beside it where there is room for it, the frontier's first; the others stay in the table."""
    taken: list[Box] = [
        (min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1)
        for a, b in pairwise(stairs)
    ]
    for mark in marks:
        column, row = x.at(mark.x), y.at(mark.y)
        taken.append((column - RADIUS, row - RADIUS, column + RADIUS, row + RADIUS))
    for mark in sorted(marks, key=lambda mark: not mark.best):
        said = _fitted(mark.label, _LABEL, _WIDEST_LABEL)
        for box in _places(x.at(mark.x), y.at(mark.y), _width(said, _LABEL), leftwards=mark.best) if said else []:
            if _inside(box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                ink = _INK if mark.best else _GREY
                pen.write(box[0], (box[1] + box[3]) / 2, said, size=_LABEL, ink=ink, halo=2)
                break


def _places(column: float, row: float, width: float, *, leftwards: bool) -> list[Box]:
    """Where a label may lie about a point, the best place first. leftwards: on the frontier, with nothing beyond it."""
    half, away = 9, RADIUS + 5
    right, left, middle = column + away, column - away - width, column - width / 2
    beside = [row - half, row - away - half, row + away - half]  # tops
    over = [row - away - 2 * half, row + away]
    places = [(edge, top) for edge in ([left, right] if leftwards else [right, left]) for top in beside]
    places += [(edge, top) for edge in (middle, left, right) for top in over]
    return [(edge, top, edge + width, top + 2 * half) for edge, top in places]


def _inside(box: Box) -> bool:
    return PLOT[0] <= box[0] and box[2] <= SIZE[0] - 4 and PLOT[1] - 10 <= box[1] and box[3] <= PLOT[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _legend(pen: _Pen) -> None:
    row, column = SIZE[1] - 24, PLOT[0]
    pen.line([(column, row), (column + 44, row)], FRONTIER, 2)
    pen.circle(column + 22, row, RADIUS, POINT, POINT)
    pen.write(column + 56, row, "the frontier: nothing else is as quick in less memory, or quicker in as much")
