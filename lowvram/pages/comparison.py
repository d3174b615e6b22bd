"""The page that puts runs side by side."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from lowvram.pages import pictures
from lowvram.pages.charts import Chart, Line, chart
from lowvram.pages.cost import money
from lowvram.pages.folder import Content
from lowvram.pages.metrics import Point
from lowvram.pages.recipe import command
from lowvram.pages.run_page import data_name, metric_points, metric_title, state
from lowvram.pages.words import count, gigabytes, images, number, plain, six, span
from lowvram.receipt.rates import co2, energy

_MOST_CURVES = 16
_MOST_MOMENTS = 4
_OF_THE_CALL = ("out", "resume", "debug")
# What curves go over: how it is said, its unit, and where it stands in a line of metrics.
_OVER = (("images", "kimg"), ("hours", "hours"), ("energy", "kWh"))


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
    for name in _metric_names(contents):
        last = [points[-1] if (points := metric_points(one, name)) else None for one in contents]
        rows.append(
            (
                metric_title(name),
                [f"{six(at[1])} (after {images(at[0])})" if at is not None else "–" for at in last],
            )
        )
    return [(name, said) for name, said in rows if any(word != "–" for word in said)]


def _since(content: Content) -> str:
    """What to add to sums that do not reach back to the run's begin."""
    first = content.receipt.totals().first_image
    return f" (since {images(first / 1000)})" if first else ""


def _metric_names(contents: Sequence[Content]) -> list[str]:
    return list(dict.fromkeys(name for one in contents for evaluated in one.evaluations for name in evaluated.values))


def _curves(contents: Sequence[Content], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each of images, hours and energy the same charts, a line for each run."""
    wanted: list[tuple[str, str, Callable[[Content], list[Point]]]] = []
    series = list(dict.fromkeys(name for one in contents for name in one.metrics.names("loss/")))[:_MOST_CURVES]
    for name in _metric_names(contents):
        wanted.append((metric_title(name), "", lambda one, name=name: metric_points(one, name)))  # type: ignore[misc]
    for name in series:
        title = f"Loss of {name.removeprefix('loss/')}"
        wanted.append((title, "loss", lambda one, name=name: one.metrics.series(name)))  # type: ignore[misc]
    wanted.append(("Augmentation probability p", "p", lambda one: one.metrics.series("augment_p")))
    wanted.append(("Time for a thousand images", "s/kimg", lambda one: one.metrics.series("s_per_kimg")))
    out = []
    for over, unit in _OVER:
        charts: list[Chart] = []
        for title, y_label, points in wanted:
            lines = [
                Line(label=name, points=_moved(points(one), one, over), colour=n)
                for n, (name, one) in enumerate(zip(names, contents, strict=True))
            ]
            made = chart(title, unit, y_label, lines)
            if made is not None:
                charts.append(made)
        without = [name for name, one in zip(names, contents, strict=True) if not _moved([(0.0, 0.0)], one, over)]
        out.append({"over": over, "charts": charts, "without": without})
    return out


def _moved(points: list[Point], content: Content, over: str) -> list[Point]:
    """Points over thousands of images as points over hours of training steps, or over kWh; none where not known."""
    if over == "images":
        return points
    name, scale = ("seconds", 3600.0) if over == "hours" else ("kwh", 1.0)
    known = content.metrics.series(name)
    if not known:
        return []
    at = dict(known)
    out = []
    for kimg, value in points:
        x = at[kimg] if kimg in at else content.metrics.at(kimg, name)
        if x is not None:
            out.append((x / scale, value))
    return out


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
