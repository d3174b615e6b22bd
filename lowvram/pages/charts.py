"""Curves as SVG that needs no script: lines stretch with the page, text keeps its size, colours follow the page.

Chart libraries draw pictures of one size, whose text is too small to read on a phone, in colours of their own, and
bring scripts; what is left to do is ticks and paths. Coordinates of paths run from 0 to 1000 both ways, y downwards;
ticks stand at percentages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowvram.pages.metrics import Point
from lowvram.pages.words import exact, number

COLOURS = 8  # that the style sheet knows
_MOST_POINTS = 400
_MOST_ROWS = 25  # of a table
_TICKS = 5
_FEWEST_TO_SMOOTH = 12
_SMALLEST = 1e-200  # a smaller range has no round ticks: floats end at 5e-324


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve to draw. colour: its number in the style sheet."""

    label: str
    points: Sequence[Point]
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Level:
    """A value that holds all along, such as a budget."""

    label: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A path. kind: "raw", as measured, "smooth", its mean over neighbours, or "dots" for a few points."""

    path: str
    colour: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template needs. ticks, levels: (percent, label). said: the curves in words. rows: exact values."""

    title: str
    x_label: str
    y_label: str
    drawn: tuple[Drawn, ...]
    legend: tuple[tuple[str, int], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    levels: tuple[tuple[float, str], ...]
    said: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From low to high, with a tick at each multiple of step."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, low: float, high: float) -> "Axis":
        """One that holds both values, with round ticks and a little room."""
        if high - low < _SMALLEST:
            room = max(abs(low), abs(high)) * 0.1
            room = room if room >= _SMALLEST else 1.0
            low, high = low - room * (low != 0), high + room
        step = round_step((high - low) / _TICKS)
        return cls(low=low, high=high, step=step)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at low and 1 at high."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and labels of the ticks."""
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        places = max(0, -math.floor(math.log10(self.step) + 1e-9) + (f"{self.step:e}"[2] != "0"))
        values = [n * self.step for n in range(first, min(last, first + 50) + 1)]
        largest = max(map(abs, values), default=0.0)
        if largest >= 1e7 or places > 5:
            return [(value, f"{value:.3g}") for value in values]
        return [(value, f"{value:,.{places}f}") for value in values]


def chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    smooth: bool = True,
) -> Chart | None:
    """A chart of curves; None where no curve has a point.

    x_label, y_label: what is counted, with its unit. from_zero: the axis begins at 0. smooth: also draw means over
    neighbouring points, where there are enough, and leave out single wild ones; what is counted exactly is drawn whole.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x_axis = Axis.of(0.0, max(x for line in lines for x, _ in line.points))
    low, high, outside = _range(lines, whole=not smooth)
    for level in levels:
        low, high = min(low, level.value), max(high, level.value)
    room = (high - low) * 0.06
    y_axis = Axis.of(0.0 if from_zero or 0 <= low < 0.3 * high else low - room, high + room)
    drawn = []
    for line in lines:
        smoothed = smooth and len(line.points) >= _FEWEST_TO_SMOOTH
        kind = "raw" if smoothed else "smooth"
        if smoothed or len(line.points) > 1:
            drawn.append(_drawn(line, thinned(line.points), kind, x_axis, y_axis))
        if smoothed:
            drawn.append(_drawn(line, spread(means(line.points), _MOST_POINTS), "smooth", x_axis, y_axis))
        if len(line.points) <= _FEWEST_TO_SMOOTH:
            drawn.append(_drawn(line, line.points, "dots", x_axis, y_axis))
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        drawn=tuple(drawn),
        legend=tuple((line.label, line.colour) for line in lines) if len(lines) > 1 else (),
        x_ticks=tuple((100 * x_axis.share(value), label) for value, label in x_axis.ticks()),
        y_ticks=tuple((100 - 100 * y_axis.share(value), label) for value, label in y_axis.ticks()),
        levels=tuple((100 - 100 * y_axis.share(level.value), level.label) for level in levels),
        said=_in_words(title, x_label, lines, levels),
        note=f"{outside} of the measured values lie beyond the axis." if outside else "",
        **_table(x_label, y_label, lines),
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most _MOST_POINTS of them, lowest and highest of each stretch kept."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    kept: list[Point] = []
    bins = _MOST_POINTS // 2
    for n in range(bins):
        part = points[len(points) * n // bins : len(points) * (n + 1) // bins]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def means(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbours, a twentieth of all; fewer at the ends, as many on both sides."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    half = max(1, len(points) // 40)
    out = []
    for n, (x, _) in enumerate(points):
        reach = min(half, n, len(points) - 1 - n)
        out.append((x, (sums[n + reach + 1] - sums[n - reach]) / (2 * reach + 1)))
    return out


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many at even distances, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(n * (len(points) - 1) / (most - 1))] for n in range(most)]


def _range(lines: Sequence[Line], *, whole: bool) -> tuple[float, float, int]:
    """Lowest and highest value to show, and how many lie beyond: a few first steps must not flatten all the rest."""
    values = sorted(y for line in lines for _, y in line.points)
    low, high = values[0], values[-1]
    if whole or len(values) < 50:
        return low, high, 0
    inner_low, inner_high = values[len(values) // 50], values[-1 - len(values) // 50]
    spread = inner_high - inner_low
    if spread > 0 and high > inner_high + 1.5 * spread:
        high = inner_high + 0.3 * spread
    if spread > 0 and low < inner_low - 1.5 * spread:
        low = inner_low - 0.3 * spread
    return low, high, sum(not low <= value <= high for value in values)


def _drawn(line: Line, points: Sequence[Point], kind: str, x_axis: Axis, y_axis: Axis) -> Drawn:
    def place(point: Point) -> str:
        # A value far beyond the axis is drawn just beyond it: browsers stumble over huge coordinates.
        x, y = 1000 * x_axis.share(point[0]), 1000 - 1000 * y_axis.share(point[1])
        return f"{min(max(x, -2000), 2000):.1f} {min(max(y, -2000), 3000):.1f}"

    if kind == "dots":  # a line of no length with round ends
        path = "".join(f"M{place(point)}h0" for point in points)
    else:
        path = "M" + "L".join(place(point) for point in points)
    return Drawn(path=path, colour=line.colour % COLOURS, kind=kind)


def _in_words(title: str, x_label: str, lines: Sequence[Line], levels: Sequence[Level]) -> str:
    parts = []
    for line in lines:
        (x0, y0), (x1, y1) = line.points[0], line.points[-1]
        name = f"{line.label}: " if len(lines) > 1 else ""
        parts.append(f"{name}{number(y0)} at {number(x0)}, {number(y1)} at {number(x1)} {x_label}")
    parts += [f"{level.label} at {number(level.value)}" for level in levels]
    return f"{title}. {'; '.join(parts)}."


def _table(x_label: str, y_label: str, lines: Sequence[Line]) -> dict[str, tuple]:  # type: ignore[type-arg]
    """Exact values: one line by x, several below each other with their names."""
    if len(lines) == 1:
        rows = tuple((exact(x), exact(y)) for x, y in spread(lines[0].points, _MOST_ROWS))
        return {"head": (x_label, y_label), "rows": rows}
    each = max(5, 2 * _MOST_ROWS // len(lines))
    several = tuple((line.label, exact(x), exact(y)) for line in lines for x, y in spread(line.points, each))
    return {"head": ("of", x_label, y_label), "rows": several}


def round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.8)
