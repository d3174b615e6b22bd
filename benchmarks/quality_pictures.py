"""Pictures of benchmarks.time_to_quality: curves of each metric over time, images and energy; samples side by side.

Lengths are pixels of the finished picture; curves are drawn SHARPER times as large, so that edges come out smooth.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.quality_table import Point, brief, is_distance, shown
from benchmarks.scatter import Axis
from lowvram.memory.guard import in_gb
from lowvram.pages.quality import metric_title
from lowvram.planner.picture import BUDGET, COLOURS, SHARPER
from lowvram.planner.table import ascii_only
from lowvram.sampling.grids import make_grid

Courses = Mapping[str, Sequence[Point]]  # by recipe: points without errors, at least one

_PANEL = (470, 250)  # a plot with its numbers
_PLOT = (64, 34, 454, 214)  # of the panel: left, top, right, bottom
_LEGEND_ROW, _MARGIN = 26, 24
_LINES = [BUDGET, *(COLOURS[name] for name in ("weights", "activations", "temporary", "gradients", "optimizer"))]
_INK, _GREY, _PALE, _PAPER = (32, 32, 32), (104, 104, 104), (228, 228, 228), (255, 255, 255)
_ACROSS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "seconds of training": lambda details: float(details["seconds"]),
    "thousands of images": lambda details: float(details["kimg"]),
    "watt hours": lambda details: 1000 * float(details["kwh"]),
}
_CELL = 256  # about as wide is each little grid of samples
_MOST_TIMES = 5
_LABEL = 150


@dataclass(frozen=True, kw_only=True)
class LogAxis:
    """Positive values between two ends of a line of pixels, by their logarithm; ticks at round numbers."""

    first: float
    last: float
    begin: int
    end: int

    @classmethod
    def of(cls, values: Sequence[float], begin: int, end: int) -> "LogAxis":
        """A little beyond the least and the largest."""
        least, most = max(min(values), 1e-9), max(*values, 1e-9)
        return cls(first=least / 1.15, last=most * 1.15, begin=begin, end=end)

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = math.log(max(value, self.first) / self.first) / math.log(self.last / self.first)
        return self.begin + (self.end - self.begin) * share

    def ticks(self) -> list[float]:
        """Round values on the axis: the fewer of each power of ten, the more of these it has."""
        powers = range(math.floor(math.log10(self.first)), math.ceil(math.log10(self.last)) + 1)
        span = self.last / self.first
        digits: tuple[float, ...] = (1, 1.5, 2, 3, 4, 5, 6, 8) if span < 8 else (1, 2, 5) if span < 500 else (1,)
        return [d * 10.0**p for p in powers for d in digits if self.first <= d * 10.0**p <= self.last]


def draw_curves(courses: Courses, path: Path) -> None:
    """Write the curves as a PNG: a row for each metric, a column for each cost. Dashed: halves of the real images."""
    metrics = shown(next(iter(courses.values()))[0]["details"]["values"])
    top = _MARGIN + _LEGEND_ROW * (len(courses) + 1)
    size = (_PANEL[0] * len(_ACROSS) + _MARGIN, top + _PANEL[1] * len(metrics) + _MARGIN)
    image = Image.new("RGB", (size[0] * SHARPER, size[1] * SHARPER), _PAPER)
    pen = _Pen(ImageDraw.Draw(image))
    for place, (name, points) in enumerate(courses.items()):
        height = _MARGIN + _LEGEND_ROW * place
        pen.line([(_PLOT[0], height), (_PLOT[0] + 40, height)], _LINES[place % len(_LINES)], 3)
        last = points[-1]["details"]
        said = f"{name}: {last['seconds']:.0f} s, {last['kimg']:.3g} kimg, peak {in_gb(last['peak_bytes'])}"
        pen.write(_PLOT[0] + 52, height, f"{said} ({last['peak_is']})", 16, anchor="lm")
    height = _MARGIN + _LEGEND_ROW * len(courses)
    pen.dashes(_PLOT[0], _PLOT[0] + 40, height)
    pen.write(_PLOT[0] + 52, height, "two halves of the real images", 16, _GREY, "lm")
    for column, across in enumerate(_ACROSS):
        for line, metric in enumerate(metrics):
            _panel(pen, courses, metric, across, (column * _PANEL[0], top + line * _PANEL[1]))
    _save(image.reduce(SHARPER), path)


def _panel(pen: "_Pen", courses: Courses, metric: str, across: str, corner: tuple[int, int]) -> None:
    left, top, right, bottom = (_PLOT[n] + corner[n % 2] for n in range(4))
    curves = [
        [(_ACROSS[across](point["details"]), point["details"]["values"][metric]) for point in points]
        for points in courses.values()
    ]
    floor = next(iter(courses.values()))[0]["details"]["floor"].get(metric)
    heights = [value for curve in curves for _, value in curve] + ([] if floor is None else [floor])
    x = Axis.of([0.0, *(value for curve in curves for value, _ in curve)], left, right)
    y = LogAxis.of(heights, bottom, top) if is_distance(metric) else Axis.of([0.0, *heights], bottom, top)
    for value in x.ticks()[:: max(1, len(x.ticks()) // 6)]:
        pen.line([(x.at(value), top), (x.at(value), bottom)], _PALE, 1)
        pen.write(x.at(value), bottom + 11, f"{value:.4g}", 11, _GREY)
    for value in y.ticks()[:: max(1, len(y.ticks()) // 6)]:
        pen.line([(left, y.at(value)), (right, y.at(value))], _PALE, 1)
        pen.write(left - 6, y.at(value), f"{value:.4g}", 11, _GREY, "rm")
    pen.line([(left, top), (left, bottom), (right, bottom)], _GREY, 1)
    title = f"{metric_title(metric)} ({'less' if is_distance(metric) else 'more'} is better)"
    pen.write(left, top - 12, title, 13, anchor="lm")
    pen.write((left + right) / 2, bottom + 26, across, 12, _GREY)
    if floor is not None:
        pen.dashes(left, right, y.at(floor))
    for place, curve in enumerate(curves):
        points = [(x.at(value), y.at(height)) for value, height in curve]
        pen.line(points, _LINES[place % len(_LINES)], 2)
        for point in points:
            pen.dot(*point, _LINES[place % len(_LINES)])


def draw_samples(
    courses: Courses, images: Mapping[str, Sequence[Tensor | None]], real: Tensor, path: Path, *, times: Sequence[str]
) -> None:
    """Write a PNG of samples at equal times: a row for each recipe, a column for each time, and real images at the end.

    images: of each recipe those of each measurement, uint8 [n, 3, R, R]. times: of the measurements, in words.
    """
    chosen = some_of(max(map(len, courses.values())), _MOST_TIMES)
    grids = {name: {n: _cell(of[n]) for n in chosen if n < len(of)} for name, of in images.items()}
    truth = _cell(real)
    assert truth is not None
    width, height, gap = truth.width, truth.height, 12
    line = height + 44
    size = (_LABEL + (width + gap) * (len(chosen) + 1) + gap, 44 + line * len(courses))
    image = Image.new("RGB", size, _PAPER)
    pen = _Pen(ImageDraw.Draw(image), 1)
    for row, (name, points) in enumerate(courses.items()):
        top = 44 + row * line
        pen.write(_LABEL - 12, top + height / 2, _fitted(name, 17, _LABEL - 16), 17, anchor="rm")
        for column, n in enumerate(chosen):
            grid, left = grids[name].get(n), _LABEL + column * (width + gap)
            if grid is None or n >= len(points):
                continue
            details = points[n]["details"]
            image.paste(grid, (left, top))
            distance = next(metric for metric in shown(details["values"]) if metric.startswith("frechet"))
            said = f"{brief(details['seconds'])} s, {brief(details['kimg'])} kimg, Frechet distance"
            pen.write(left + width / 2, top + height + 16, f"{said} {details['values'][distance]:.0f}", 13, _GREY)
    for column, n in enumerate(chosen):
        pen.write(_LABEL + column * (width + gap) + width / 2, 24, times[n], 20)
    left = _LABEL + len(chosen) * (width + gap)
    pen.write(left + width / 2, 24, "real", 20)
    image.paste(truth, (left, 44))
    _save(image, path)


def some_of(count: int, most: int) -> list[int]:
    """So many places of 0 ... count - 1, evenly spaced, the last among them."""
    kept = min(count, most)
    return [math.ceil((n + 1) * count / kept) - 1 for n in range(kept)]


def _cell(images: Tensor | None) -> Image.Image | None:
    """A grid of images, enlarged by a whole number to about _CELL, or made smaller."""
    if images is None:
        return None
    pixels = make_grid(images).permute(1, 2, 0).numpy()
    grid = Image.fromarray(np.ascontiguousarray(pixels))
    if grid.width <= _CELL:
        times = max(1, round(_CELL / grid.width))
        return grid.resize((grid.width * times, grid.height * times), Image.Resampling.NEAREST)
    return grid.resize((_CELL, round(grid.height * _CELL / grid.width)), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Pen:
    """Draws in the finished picture's pixels."""

    pen: ImageDraw.ImageDraw
    scale: int = SHARPER

    def write(
        self, x: float, y: float, said: str, size: int, ink: tuple[int, int, int] = _INK, anchor: str = "mm"
    ) -> None:
        self.pen.text((x * self.scale, y * self.scale), ascii_only(said), ink, _font(size * self.scale), anchor)

    def line(self, points: Sequence[tuple[float, float]], ink: tuple[int, int, int], width: float) -> None:
        if len(points) > 1:
            scaled = [(x * self.scale, y * self.scale) for x, y in points]
            self.pen.line(scaled, ink, round(width * self.scale), joint="curve")

    def dashes(self, left: float, right: float, row: float) -> None:
        for start in np.arange(left, right, 10):
            self.line([(float(start), row), (min(float(start) + 6, right), row)], _GREY, 1.5)

    def dot(self, x: float, y: float, ink: tuple[int, int, int]) -> None:
        self.pen.ellipse([round(place * self.scale) for place in (x - 3.5, y - 3.5, x + 3.5, y + 3.5)], ink)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitted(said: str, size: int, room: float) -> str:
    """The text, cut short where it is wider than the room for it."""
    said = ascii_only(said)
    if _font(size).getlength(said) <= room:
        return said
    while said and _font(size).getlength(said + "...") > room:
        said = said[:-1]
    return said + "..."


def _save(image: Image.Image, path: Path) -> None:
    draft = path.with_name(f".{path.name}.partial")
    image.save(draft, format="PNG", optimize=True)
    draft.replace(path)
