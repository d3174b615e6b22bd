"""The page that puts runs side by side."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from lowvram.pages import pictures
from lowvram.pages.charts import Chart, Line, chart
from lowvram.pages.cost import money
from lowvram.pages.folder import Content, Evaluated
from lowvram.pages.metrics import Point
from lowvram.pages.quality import evaluations_of, metric_names, metric_title, same_conditions
from lowvram.pages.recipe import command
from lowvram.pages.run_page import data_name, state
from lowvram.pages.words import count, gigabytes, images, number, plain, six, span
from lowvram.receipt.rates import co2, energy

_MOST_CURVES = 16
_MOST_MOMENTS = 4
_OF_THE_CALL = ("out", "resume", "debug")
_OVER = (("images", "kimg"), ("hours", "hours"), ("energy", "kWh"))  # what curves go over, and its unit
_STANDS = {"hours": ("seconds", 3600.0), "energy": ("kwh", 1.0)}  # its name in a line of metrics, and of how many

_Wanted = tuple[str, str, Sequence[str], list[list[Point]]]  # a chart: title, unit, label and points of each run


def view(contents: Sequence[Content]) -> dict[str, Any]:
    """What the template shows."""
    names = _names(contents)
    rows, shared = _differences(contents)
    return {
        "names": names,
        "written": datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        "faults": [f"{name}: {fault}" for name, one in zip(names, contents, strict=True) for fault in one.faults[:10]],
        "recipes": [one.text("recipe") for one in contents],
        "states": [state(one, None) for one in contents],
        "numbers": _numbers(contents),
        "differences": rows,
        "shared": shared,
        "curves": _curves(contents, names),
        "moments": _moments(contents),
        "commands": [command(one) for one in contents],
    }


def _names(contents: Sequence[Content]) -> list[str]:
    """The folders' names; with the one above where two are the same."""
    short = [one.name for one in contents]
    if len(set(short)) == len(short):
        return short
    longer = [f"{one.folder.absolute().parent.name}/{one.name}" for one in contents]
    return longer if len(set(longer)) == len(longer) else [f"{n + 1}: {name}" for n, name in enumerate(short)]


def _differences(contents: Sequence[Content]) -> tuple[list[tuple[str, list[str]]], int]:
    """Settings that are not the same in all runs, and how many are."""
    names = list(dict.fromkeys(name for one in contents for name in one.settings if name not in _OF_THE_CALL))
    rows = []
    for name in names:
        said = [plain(one.settings[name]) if name in one.settings else "–" for one in contents]
        same = all(name in one.settings and one.settings[name] == contents[0].settings[name] for one in contents)
        if not same:
            rows.append((name, said))
    return rows, len(names) - len(rows)


def _numbers(contents: Sequence[Content]) -> list[tuple[str, list[str]]]:
    """The last numbers of each run; rows in which none has one are left out."""

    def known(value: float | None, words: Callable[[float], str]) -> str:
        return "–" if value is None else words(value)

    def receipt(words: Callable[[Any], str]) -> list[str]:
        return [words(one.receipt.totals()) + _since(one) if one.receipt.sessions else "–" for one in contents]

    def metric(name: str, words: Callable[[float], str], *, highest: bool = False) -> list[str]:
        return [known(one.metrics.highest(name) if highest else one.metrics.last(name), words) for one in contents]

    rows = [
        ("Data", [data_name(one) for one in contents]),
        ("Images seen", [count(round(one.kimg * 1000)) for one in contents]),
        ("Time in steps", metric("seconds", span)),
        ("Seconds per kimg, last", metric("s_per_kimg", number)),
        ("Peak memory", metric("peak_reserved_bytes", gigabytes, highest=True)),
        ("Card time", receipt(lambda totals: span(3600 * totals.card_hours))),
        ("Energy", receipt(lambda totals: energy(totals.kwh))),
        ("Money", receipt(money)),
        ("Emissions", receipt(lambda totals: co2(totals.co2_grams))),
        ("Images per kWh", receipt(lambda totals: known(totals.images_per_kwh, number))),
        (
            "Machine",
            [", ".join(dict.fromkeys(s.machine for s in one.receipt.sessions)) or "–" for one in contents],
        ),
    ]
    losses = list(dict.fromkeys(name for one in contents for name in one.metrics.names("loss/")))
    rows += [(f"Loss of {name.removeprefix('loss/')}, last", metric(name, six)) for name in losses[:_MOST_CURVES]]
    for name in metric_names(contents):
        found = evaluations_of(contents, name)
        alike = same_conditions(found)
        rows.append((metric_title(name), [_last_quality(one, name, alike) for one in found]))
    return [(name, said) for name, said in rows if any(word != "–" for word in said)]


def _since(content: Content) -> str:
    """What to add to sums that do not reach back to the run's begin."""
    first = content.receipt.totals().first_image
    return f" (since {images(first / 1000)})" if first else ""


def _last_quality(found: Sequence[Evaluated], name: str, alike: bool) -> str:
    if not found:
        return "–"
    last = found[-1]
    return f"{six(last.values[name])} (after {images(last.kimg)}{'' if alike else f', {last.conditions}'})"


def _curves(contents: Sequence[Content], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each of images, hours and energy the same charts, a line for each run."""
    wanted = [_quality(contents, names, name) for name in metric_names(contents)]
    series = list(dict.fromkeys(name for one in contents for name in one.metrics.names("loss/")))[:_MOST_CURVES]
    for name in series:
        title = f"Loss of {name.removeprefix('loss/')}"
        wanted.append((title, "loss", names, [one.metrics.series(name) for one in contents]))
    for name, title, y_label in (
        ("augment_p", "Augmentation probability p", "p"),
        ("s_per_kimg", "Time for a thousand images", "s/kimg"),
    ):
        wanted.append((title, y_label, names, [one.metrics.series(name) for one in contents]))
    out = []
    for over, unit in _OVER:
        charts: list[Chart] = []
        for title, y_label, labels, series_of_runs in wanted:
            lines = [
                Line(label=label, points=_moved(points, one, over), colour=n)
                for n, (label, points, one) in enumerate(zip(labels, series_of_runs, contents, strict=True))
            ]
            made = chart(title, unit, y_label, lines)
            if made is not None:
                charts.append(made)
        without = [
            name
            for name, one in zip(names, contents, strict=True)
            if over in _STANDS and not one.metrics.series(_STANDS[over][0])
        ]
        out.append({"over": over, "charts": charts, "without": without})
    return out


def _quality(contents: Sequence[Content], names: Sequence[str], name: str) -> _Wanted:
    """Its label says how each run was measured, where it was not done alike."""
    found = evaluations_of(contents, name)
    alike = same_conditions(found)
    labels = [
        run if alike or not evaluated else f"{run} ({evaluated[-1].conditions})"
        for run, evaluated in zip(names, found, strict=True)
    ]
    return metric_title(name), "", labels, [[(one.kimg, one.values[name]) for one in some] for some in found]


def _moved(points: list[Point], content: Content, over: str) -> list[Point]:
    """Points over thousands of images as points over hours of training steps, or over kWh; none where not known."""
    if over == "images":
        return points
    name, scale = _STANDS[over]
    return [(x / scale, value) for x, value in content.metrics.moved(points, name)]


def _moments(contents: Sequence[Content]) -> list[dict[str, Any]]:
    """Samples beside each other after the same number of images, as near as each run has them, at a few moments."""
    if not all(one.grids for one in contents):
        return []
    shortest = min((one.grids for one in contents), key=lambda grids: grids[-1][0])
    marks = [kimg for kimg, _ in shortest]
    some = sorted({marks[round(n * (len(marks) - 1) / (_MOST_MOMENTS - 1))] for n in range(_MOST_MOMENTS)})
    moments = []
    for mark in reversed(some):
        cells = []
        for one in contents:
            kimg, path = min(one.grids, key=lambda grid: abs(grid[0] - mark))
            picture, reason = pictures.picture_of(path)
            cells.append({"kimg": kimg, "picture": picture, "reason": f"{path.name} {reason}"})
        moments.append({"kimg": mark, "cells": cells})
    return moments
