"""A plan as a picture: what lies in the card's memory over a step, and the budget it has to stay under.

Lengths are pixels of the finished picture; it is drawn SHARPER times as large, so that edges come out smooth.
"""

import bisect
import contextlib
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lowvram.memory.guard import in_gb
from lowvram.planner import table
from lowvram.planner.log import CATEGORIES
from lowvram.planner.plan import Plan, Timeline

SIZE = (1600, 900)
PLOT = (96, 190, 1404, 740)  # left, top, right, bottom
SHARPER = 3

# Okabe and Ito's palette, whose colours stay apart for colour-blind eyes.
COLOURS = {
    "weights": (0, 114, 178),
    "gradients": (230, 159, 0),
    "optimizer": (86, 180, 233),
    "average": (240, 228, 66),
    "activations": (0, 158, 115),
    "temporary": (204, 121, 167),
}
BUDGET = (213, 94, 0)
LIMIT = (140, 92, 62)
RESERVED = (45, 45, 45)
_BESIDE = (253, 239, 229)  # between what the allocator has and the budget
_INK, _GREY, _PALE, _PAPER = (32, 32, 32), (104, 104, 104), (225, 225, 225), (255, 255, 255)

_TALLEST = 1.12  # the axis over the highest thing that it shows
_FAR = 2.5  # a budget so many times above the memory would flatten it, and is only named
_TICKS = 8  # at most
_FLAT_POINTS = 100
_LINE = 22  # between labels below each other


def draw(plan: Plan, path: str | Path) -> None:
    """Write the picture as a PNG of SIZE, under a temporary name first. Raises OSError where the disk says no.

    A plan without a timeline shows the peak of each phase in its place.
    """
    canvas = _Canvas.blank()
    traced = plan.timeline is not None and len(plan.timeline) > 0
    timeline = plan.timeline if traced and plan.timeline is not None else _flat(plan)
    axis = Axis.of(plan, timeline)
    _heading(canvas, plan)
    _beside(canvas, plan, axis)
    _grid(canvas, axis)
    if len(timeline):
        _areas(canvas, timeline, axis)
        _phases(canvas, timeline)
        _peak(canvas, plan, timeline)
    _levels(canvas, plan, timeline, axis)
    _legend(canvas, timeline, "operations of a step, in order" if traced else "the peak of each phase")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        canvas.image.reduce(SHARPER).save(partial, format="PNG", optimize=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The vertical axis, from 0 to top_bytes, with a tick at each multiple of step_bytes."""

    top_bytes: int
    step_bytes: float

    @classmethod
    def of(cls, plan: Plan, timeline: Timeline) -> "Axis":
        """An axis for all that is drawn; a budget far above it is left out."""
        live = int(timeline.bytes.sum(axis=0).max(initial=0))
        reserved = 0 if timeline.reserved is None else int(timeline.reserved.max(initial=0))
        highest = max(live, reserved, plan.reserved_bytes, 2**20)
        if plan.vram_bytes is not None and plan.vram_bytes <= _FAR * highest:
            highest = max(highest, plan.vram_bytes)
        top = int(highest * _TALLEST)
        rough = top / 2**30 / _TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999)
        return cls(top_bytes=top, step_bytes=step * 2**30)

    def row(self, size_bytes: float) -> int:
        """The picture's row of a size."""
        return round(PLOT[3] - (PLOT[3] - PLOT[1]) * size_bytes / self.top_bytes)

    def shows(self, size_bytes: int) -> bool:
        """Whether a size lies on the axis."""
        return 0 <= size_bytes <= self.top_bytes


@dataclass(frozen=True, kw_only=True)
class _Canvas:
    """An image in the finished picture's pixels."""

    image: Image.Image
    pen: ImageDraw.ImageDraw

    @classmethod
    def blank(cls) -> "_Canvas":
        image = Image.new("RGB", (SIZE[0] * SHARPER, SIZE[1] * SHARPER), _PAPER)
        return cls(image=image, pen=ImageDraw.Draw(image))

    def write(
        self, x: float, y: float, said: str, *, size: int = 16, ink: tuple[int, int, int] = _INK, anchor: str = "lm"
    ) -> None:
        self.pen.text((x * SHARPER, y * SHARPER), said, ink, _font(size), anchor)

    def box(self, left: float, top: float, right: float, bottom: float, ink: tuple[int, int, int]) -> None:
        """Filled, without the right and bottom edge."""
        if right > left and bottom > top:
            corners = (left * SHARPER, top * SHARPER, right * SHARPER - 1, bottom * SHARPER - 1)
            self.pen.rectangle(corners, ink)

    def line(self, points: list[tuple[float, float]], ink: tuple[int, int, int], width: float = 1) -> None:
        scaled = [(x * SHARPER, y * SHARPER) for x, y in points]
        self.pen.line(scaled, ink, round(width * SHARPER), joint="curve")

    def fill(self, points: list[tuple[float, float]], ink: tuple[int, int, int]) -> None:
        self.pen.polygon([(x * SHARPER, y * SHARPER) for x, y in points], ink)

    def dashes(self, row: int, ink: tuple[int, int, int], *, height: int, dash: int, gap: int) -> None:
        """Across the plot, `height` rows about `row`."""
        top = row - height // 2
        for left in range(PLOT[0], PLOT[2], dash + gap):
            self.box(left, top, min(left + dash, PLOT[2]), top + height, ink)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SHARPER)


def _width(said: str, size: int) -> float:
    return _font(size).getlength(said) / SHARPER


def _fitted(said: str, size: int, room: float) -> str:
    """The text, cut short where it is wider than the room for it."""
    said = table.ascii_only(said)
    if _width(said, size) <= room:
        return said
    fits = bisect.bisect_left(range(len(said)), True, key=lambda n: _width(said[:n] + "...", size) > room) - 1
    return said[: max(0, fits)] + "..."


def _heading(canvas: _Canvas, plan: Plan) -> None:
    room = SIZE[0] - 2 * 40
    ink = _INK if plan.fits else BUDGET
    canvas.write(40, 44, _fitted(table.title(plan), 30, room), size=30, ink=ink)
    canvas.write(40, 84, _fitted(table.figures(plan), 19, room), size=19, ink=_GREY)


def _grid(canvas: _Canvas, axis: Axis) -> None:
    left, top, right, bottom = PLOT
    for n in range(int(axis.top_bytes / axis.step_bytes) + 1):
        row = axis.row(n * axis.step_bytes)
        canvas.box(left, row, right, row + 1, _PALE)
        canvas.write(left - 10, row, f"{n * axis.step_bytes / 2**30:g}", size=15, ink=_GREY, anchor="rm")
    canvas.write(left - 10, top - 24, "GB", size=15, ink=_GREY, anchor="rm")
    canvas.box(left - 1, top, left, bottom + 1, _GREY)
    canvas.box(left - 1, bottom, right, bottom + 1, _GREY)


def _beside(canvas: _Canvas, plan: Plan, axis: Axis) -> None:
    """A band below the budget for what is not the allocator's."""
    if plan.vram_bytes is not None and axis.shows(plan.vram_bytes):
        canvas.box(PLOT[0], axis.row(plan.vram_bytes), PLOT[2], axis.row(max(0, _limit_bytes(plan))), _BESIDE)


def _limit_bytes(plan: Plan) -> int:
    """What of the budget the allocator has; below 0 where there is too little for the rest."""
    return (plan.vram_bytes or 0) - plan.workspace_bytes - plan.context_bytes - plan.margin_bytes


def _steps(rows: list[float]) -> list[tuple[float, float]]:
    """A line over the plot's width with each point level over its share of it."""
    each = (PLOT[2] - PLOT[0]) / len(rows)
    return [(PLOT[0] + (n + end) * each, row) for n, row in enumerate(rows) for end in (0, 1)]


def _highest(timeline: Timeline) -> int:
    """The point with the most bytes alive; of several beside each other the middle one."""
    total = timeline.bytes.sum(axis=0)
    first = int(total.argmax())
    last = first
    while last + 1 < len(total) and total[last + 1] == total[first]:
        last += 1
    return (first + last) // 2


def _areas(canvas: _Canvas, timeline: Timeline, axis: Axis) -> None:
    """Each category on those before it; the tallest sum first, so that the next one covers what is not its own."""
    left, top, right, bottom = PLOT
    scale = (bottom - top) / axis.top_bytes
    edges = bottom - np.cumsum(timeline.bytes, axis=0) * scale  # [CATEGORIES, T]
    for name, rows in reversed(list(zip(CATEGORIES, edges.tolist(), strict=True))):
        canvas.fill([(left, bottom), *_steps(rows), (right, bottom)], COLOURS[name])
    if timeline.reserved is not None:
        canvas.line(_steps((bottom - timeline.reserved * scale).tolist()), RESERVED, 2)


def _phases(canvas: _Canvas, timeline: Timeline) -> None:
    """A line where each phase begins and its name over its middle, or a row higher where it is too narrow for that."""
    left, top, right, bottom = PLOT
    each = (right - left) / len(timeline)
    spans = [(table.ascii_only(name), left + b * each, left + e * each) for name, b, e in timeline.marks if e > b]
    high: list[tuple[float, str]] = []
    for n, (name, begin, end) in enumerate(spans):
        if n:
            canvas.box(round(begin), top - 6, round(begin) + 1, bottom, _GREY)
        if _width(name, 17) + 12 <= end - begin:
            canvas.write((begin + end) / 2, top - 20, name, size=17, anchor="mm")
        else:
            high.append(((begin + end) / 2, _fitted(name, 15, 150)))
    widths = [_width(name, 15) + 16 for _, name in high]
    for (middle, name), at in zip(high, _apart([x for x, _ in high], widths, left, SIZE[0] - 10), strict=True):
        if at is not None:
            canvas.line([(at, top - 42), (middle, top - 30), (middle, top - 2)], _GREY, 1)
            canvas.write(at, top - 53, name, size=15, anchor="mm")


def _apart(wanted: list[float], widths: list[float], low: float, high: float) -> list[float | None]:
    """Middles near the wanted ones (in order) at which things so wide don't overlap; None for those with no room."""
    placed: list[float | None] = []
    edge = low
    for n, (middle, width) in enumerate(zip(wanted, widths, strict=True)):
        rest = sum(widths[n + 1 :])
        latest = max(edge, high - rest - width)  # so that the others still have room, if they can
        start = min(max(middle - width / 2, edge), latest)
        if start + width > high:
            placed.append(None)
            continue
        placed.append(start + width / 2)
        edge = start + width
    return placed


def _peak(canvas: _Canvas, plan: Plan, timeline: Timeline) -> None:
    """A mark under the axis at the highest point, and what runs there."""
    left, _, right, bottom = PLOT
    point = _highest(timeline)
    x = left + (point + 0.5) * (right - left) / len(timeline)
    canvas.fill([(x, bottom + 4), (x - 7, bottom + 16), (x + 7, bottom + 16)], _INK)
    name = next(name for name, begin, end in timeline.marks if begin <= point < end)
    said = f"peak: {in_gb(int(timeline.bytes[:, point].sum()))} live in {name}"
    phase = next((phase for phase in plan.phases if phase.name == name), None)
    if phase is not None and phase.peak_op:
        said += f", at {phase.peak_op}" + (f" in {phase.peak_module}" if phase.peak_module else "")
    most = table.peak_phase(plan)
    if most is not None and most.name not in [name for name, _, _ in timeline.marks]:
        said += f"; more outside of the step: {in_gb(most.live_bytes)} in {most.name}"
    said = _fitted(said, 16, right - left)
    half = _width(said, 16) / 2
    canvas.write(min(max(x, left + half), right - half), bottom + 31, said, anchor="mm")


def _levels(canvas: _Canvas, plan: Plan, timeline: Timeline, axis: Axis) -> None:
    """The budget, what of it the allocator has, and what it reserves: lines, named at their right end."""
    labels: list[tuple[int, str, tuple[int, int, int]]] = []
    if timeline.reserved is not None and len(timeline):
        last = int(timeline.reserved[-1])
        labels.append((axis.row(last), f"reserved {in_gb(last)}", RESERVED))
    if plan.vram_bytes is not None and axis.shows(plan.vram_bytes):
        row, limit = axis.row(plan.vram_bytes), _limit_bytes(plan)
        canvas.dashes(row, BUDGET, height=3, dash=18, gap=8)
        labels.append((row, f"budget {in_gb(plan.vram_bytes)}", BUDGET))
        if limit > 0:
            canvas.dashes(axis.row(limit), LIMIT, height=1, dash=5, gap=5)
            labels.append((axis.row(limit), f"for tensors {in_gb(limit)}", LIMIT))
        if axis.row(limit) - row >= _LINE + 4 and plan.reserved_bytes < limit:  # else memory lies there
            said, middle = "workspaces, CUDA context, margin", (row + axis.row(limit)) // 2 + 1
            canvas.box(PLOT[2] - 16 - _width(said, 15), middle - 9, PLOT[2] - 4, middle + 9, _BESIDE)
            canvas.write(PLOT[2] - 10, middle, said, size=15, ink=LIMIT, anchor="rm")
    elif plan.vram_bytes is not None:
        x, y = PLOT[2] + 8, PLOT[1] - 24
        canvas.fill([(x, y - 7), (x - 5, y + 4), (x + 6, y + 4)], BUDGET)
        canvas.write(x + 10, y, _fitted(f"budget {in_gb(plan.vram_bytes)}, far above", 15, 180), size=15, ink=BUDGET)
    labels.sort(key=lambda label: label[0])
    rows = _apart([row for row, _, _ in labels], [_LINE] * len(labels), PLOT[1] - 10, PLOT[3] + 20)
    for (row, said, ink), at in zip(labels, rows, strict=True):
        if at is not None:
            canvas.line([(PLOT[2] + 2, row + 0.5), (PLOT[2] + 14, at)], ink, 1)
            canvas.write(PLOT[2] + 18, at, said, size=16, ink=ink)


def _legend(canvas: _Canvas, timeline: Timeline, what: str) -> None:
    """Every category with its bytes at the highest point, bottom of the stack first, then the lines."""
    at_peak = dict.fromkeys(CATEGORIES, 0)
    if len(timeline):
        column = timeline.bytes[:, _highest(timeline)]
        at_peak = dict(zip(CATEGORIES, column.tolist(), strict=True))
    top = PLOT[3] + 90
    canvas.write(PLOT[0], top - 26, f"{what}; live bytes by category, at the peak:", size=15, ink=_GREY)
    each = (SIZE[0] - PLOT[0] - 40) / (len(CATEGORIES) + 1)
    for n, (name, size) in enumerate(at_peak.items()):
        x = PLOT[0] + n * each
        canvas.box(x, top + 4, x + 22, top + 26, COLOURS[name])
        canvas.write(x + 32, top + 7, name, size=17)
        canvas.write(x + 32, top + 29, in_gb(size), size=15, ink=_GREY)
    x = PLOT[0] + len(CATEGORIES) * each
    if timeline.reserved is not None:
        canvas.box(x, top + 14, x + 22, top + 16, RESERVED)
        canvas.write(x + 32, top + 7, "reserved", size=17)
        canvas.write(x + 32, top + 29, "by the allocator", size=15, ink=_GREY)


def _flat(plan: Plan) -> Timeline:
    """The peaks of the phases as if each lasted all through its phase."""
    marks = [(phase.name, n * _FLAT_POINTS, (n + 1) * _FLAT_POINTS) for n, phase in enumerate(plan.phases)]
    peaks = [[phase.by_category[name] for phase in plan.phases] for name in CATEGORIES]
    return Timeline(
        marks=tuple(marks),
        bytes=np.array(peaks, np.int64).reshape(len(CATEGORIES), -1).repeat(_FLAT_POINTS, axis=1),
        reserved=np.array([phase.reserved_bytes for phase in plan.phases], np.int64).repeat(_FLAT_POINTS),
    )
