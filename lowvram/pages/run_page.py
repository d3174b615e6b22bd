"""The page of one run, section by section, as plain values for the template."""

import shlex
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from lowvram.pages import pictures
from lowvram.pages.charts import Chart, Line, chart
from lowvram.pages.cost import cost, money
from lowvram.pages.folder import Content
from lowvram.pages.memory import memory
from lowvram.pages.recipe import TASKS, changed, command
from lowvram.pages.words import count, gigabytes, images, number, plain, six, span
from lowvram.receipt.rates import energy

_MOST_LOSSES = 12
_MOST_FILES = 60
_STILL_SECONDS = 120.0  # no line for that long, and for three intervals: nobody is training
_METRIC_WORDS = {
    "frechet": "Frechet distance",
    "fid": "FID",
    "precision": "Precision",
    "recall": "Recall",
    "swd": "Sliced Wasserstein distance",
    "efficientnet_lite0": "EfficientNet-Lite0",
}


def view(content: Content, *, running: bool | None = None, seconds: float | None = None) -> dict[str, Any]:
    """What the template shows. running: whether it is being trained; None: not known. seconds: for pictures."""
    selected = pictures.chosen(content.grids)
    return {
        "name": content.name,
        "folder": shlex.quote(str(content.folder)),
        "recipe": content.text("recipe") or "a recipe that is not known",
        "summary": _summary(content),
        "state": state(content, running),
        "written": datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        "tiles": list(_tiles(content)),
        "faults": content.faults[:20],
        "samples": _samples(content, selected, seconds),
        "quality": _quality(content),
        "losses": losses(content),
        "speed": _speed(content),
        "memory": memory(content),
        "cost": cost(content),
        "data": list(_data(content)),
        "changed": _changed(content),
        "settings": [(name, plain(value)) for name, value in content.settings.items()],
        "command": command(content),
        "versions": _versions(content),
        "files": [(name, gigabytes(size)) for name, size in _shown_files(content)],
        "more_files": max(0, len(content.files) - len(_shown_files(content))),
        "checkpoints": [(name, gigabytes(size)) for name, size in content.checkpoints],
    }


def state(content: Content, running: bool | None) -> tuple[str, str]:
    """A word for the style sheet, and how far the run is in a sentence."""
    whole = content.number("kimg")
    seen = images(content.kimg)
    if whole is not None and content.kimg >= whole > 0:
        return "done", f"Done: {seen}."
    of = f"{seen} of {images(whole)}" if whole is not None else seen
    if running is None:
        running = _changed_lately(content)
    if running:
        rest = (whole - content.kimg) * (content.metrics.last("s_per_kimg") or 0.0) if whole is not None else 0.0
        return "running", f"In training: {of}{f', about {span(rest)} left' if rest > 0 else ''}."
    return "stopped", f"Stopped at {of}. Resume with: python -m lowvram.train resume={shlex.quote(str(content.folder))}"


def _changed_lately(content: Content) -> bool:
    try:
        quiet = time.time() - (content.folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return False
    interval = (content.metrics.last("s_per_kimg") or 0.0) * (content.number("log_kimg") or 0.0)
    return quiet < max(_STILL_SECONDS, 3 * interval)


def _summary(content: Content) -> str:
    task = TASKS.get(content.text("task"), content.text("task") or "a model")
    resolution = content.settings.get("resolution")
    size = f" of {resolution}x{resolution} images" if isinstance(resolution, int) else ""
    return f"{task[0].upper()}{task[1:]}{size}, trained on {data_name(content)}."


def data_name(content: Content) -> str:
    """What it was trained on, in words."""
    if "data.path" not in content.settings:
        return content.data or "data that are not known"
    path = content.text("data.path")
    count_ = next((one.images for one in reversed(content.about) if one.images), 0)
    if not path:
        count_ = count_ or int(content.number("data.builtin_count") or 0)
        return f"{count(count_)} of the built-in drawn faces" if count_ else "the built-in drawn faces"
    return f"{count(count_)} images of {path}" if count_ else path


def _tiles(content: Content) -> Iterator[tuple[str, str]]:
    """The few numbers to see first."""
    found, receipt = content.metrics, content.receipt
    yield "Images seen", count(round(content.kimg * 1000))
    if (seconds := found.last("seconds")) is not None:
        yield "Time in steps", span(seconds)
    if (speed := found.last("s_per_kimg")) is not None:
        yield "Speed, last", f"{number(speed)} s/kimg"
    if (peak := found.highest("peak_reserved_bytes")) is not None:
        yield "Peak memory", gigabytes(peak)
    if receipt.sessions:
        totals = receipt.totals()
        about = "about " if "estimate" in totals.energy_by else ""
        since = f" since {images(totals.first_image / 1000)}" if totals.first_image else ""
        yield f"Energy{since}", f"{about}{energy(totals.kwh)}"
        paid = money(totals)
        yield f"Cost{since}", paid if paid.startswith("under") else f"{about}{paid}"
    if content.evaluations:
        last = content.evaluations[-1]
        best = [name for kind in ("fid", "frechet") for name in last.values if name.startswith(kind)]
        if best:
            yield metric_title(best[0]).partition(",")[0], number(last.values[best[0]])


def _samples(content: Content, selected: list[Any], seconds: float | None) -> dict[str, Any]:
    frames = pictures.frames(selected, seconds)
    real, why = pictures.picture_of(content.folder / "reals.png")
    return {
        "frames": [frame for frame in frames if frame.picture is not None],
        "broken": [(frame.name, frame.reason) for frame in frames if frame.picture is None],
        "all": len(content.grids),
        "real": real,
        "no_real": "" if real is not None else f"reals.png {why}",
    }


def _quality(content: Content) -> dict[str, Any]:
    """A table of evaluations, a row for each, and a curve for each metric that was taken at several steps."""
    evaluations = content.evaluations
    names = list(dict.fromkeys(name for one in evaluations for name in one.values))
    curves = [
        chart(
            metric_title(name), "kimg", "", [Line(label=name, points=metric_points(content, name))],
            smooth=False,
        )
        for name in names
        if len({one.step for one in evaluations if name in one.values}) > 1
    ]  # fmt: skip
    rows = []
    for one in evaluations:
        settings = f", {one.settings}" if one.settings else ""
        what = f"{images(one.kimg)}, {count(one.images)} images{settings}"
        rows.append((what, *(six(one.values[name]) if name in one.values else "" for name in names)))
    floor = next((one.floor for one in reversed(evaluations) if one.floor), {})
    if floor:
        rows.append(("real images against real ones", *(six(floor[name]) if name in floor else "" for name in names)))
    return {
        "head": ("Measured after", *(metric_title(name) for name in names)),
        "rows": rows,
        "notes": list(dict.fromkeys(note for one in evaluations for note in one.notes))[:10],
        "charts": [one for one in curves if one is not None],
    }


def metric_title(name: str) -> str:
    """A metric's name in words: "Frechet distance, EfficientNet-Lite0 96px" for frechet_efficientnet_lite0_96px."""
    kind, _, rest = name.partition("_")
    if kind not in _METRIC_WORDS:
        return name
    for short, words in _METRIC_WORDS.items():
        rest = rest.replace(short, words)
    return f"{_METRIC_WORDS[kind]}{', ' if rest else ''}{rest.replace('_', ' ')}"


def metric_points(content: Content, name: str) -> list[tuple[float, float]]:
    """A quality metric over thousands of images; of several evaluations of a step the one of most images."""
    best = sorted((one for one in content.evaluations if name in one.values), key=lambda one: one.images)
    return sorted({one.kimg: one.values[name] for one in best}.items())


def losses(content: Content) -> list[Chart]:
    """A chart for each loss, since each has a scale of its own, and for the augmentation's probability."""
    found = content.metrics
    names = [*found.names("loss/")[:_MOST_LOSSES], *(["augment_p"] if found.names("augment_p") else [])]
    titles = {"augment_p": "Augmentation probability p"}
    charts = [
        chart(
            titles.get(name, f"Loss of {name.removeprefix('loss/')}"), "kimg", "p" if name == "augment_p" else "loss",
            [Line(label=name, points=found.series(name), colour=n)],
        )
        for n, name in enumerate(names)
    ]  # fmt: skip
    return [one for one in charts if one is not None]


def _speed(content: Content) -> list[Chart]:
    found = content.metrics
    phases = found.names("seconds/")[:8]
    lines = [
        Line(label=name.removeprefix("seconds/"), points=found.series(name), colour=n) for n, name in enumerate(phases)
    ]
    whole = [Line(label="s/kimg", points=found.series("s_per_kimg"))]
    charts = (
        chart("Time for a thousand images", "kimg", "s/kimg", whole, from_zero=True),
        chart("Time of one run of each phase", "kimg", "seconds", lines, from_zero=True),
    )
    return [one for one in charts if one is not None]


def _data(content: Content) -> Iterator[tuple[str, str]]:
    yield "Model", TASKS.get(content.text("task"), content.text("task") or "not known")
    yield "Data", data_name(content)
    if content.data and content.text("data.path"):
        yield "Data set's name", content.data
    if content.text("weights"):
        yield "Began with the weights", content.text("weights")
    for name, label in (("resolution", "Resolution"), ("batch", "Batch"), ("kimg", "Length, kimg")):
        if name in content.settings:
            yield label, plain(content.settings[name])
    if content.plan is not None:
        yield "Planned for", content.plan.card or "a card"


def _changed(content: Content) -> list[tuple[str, str]] | None:
    differing = changed(content)
    return None if differing is None else [(name, plain(value)) for name, value in differing.items()]


def _versions(content: Content) -> list[tuple[str, str]]:
    """Of the newest session; of older folders what the receipt knows."""
    rows: list[tuple[str, str]] = []
    if content.about:
        last = content.about[-1]
        rows = [
            ("lowvram", last.lowvram),
            ("commit", last.commit),
            ("torch", last.torch),
            ("CUDA", last.cuda),
            ("Python", last.python),
            ("system", last.system),
            ("device", last.device),
        ]
    elif content.receipt.sessions:
        session = content.receipt.sessions[-1]
        rows = [("lowvram", session.version), ("torch", session.torch)]
    machines = list(dict.fromkeys(session.machine for session in content.receipt.sessions))
    return [(name, value) for name, value in [*rows, ("machine", ", ".join(machines[:10]))] if value]


def _shown_files(content: Content) -> list[tuple[str, int]]:
    grids = {path.name for _, path in content.grids[1:-1]}
    return [file for file in content.files if file[0] not in grids][:_MOST_FILES]
