"""The page of one run, section by section, as plain values for the template."""

import shlex
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from lowvram.pages import metrics, pictures
from lowvram.pages.charts import Chart, Line, chart
from lowvram.pages.cost import cost, money
from lowvram.pages.folder import Content
from lowvram.pages.memory import memory
from lowvram.pages.quality import quality, tile
from lowvram.pages.recipe import TASKS, changed, command
from lowvram.pages.words import count, gigabytes, images, number, plain, span
from lowvram.receipt.rates import energy

_MOST_LOSSES = 12
_MOST_FILES = 60

# What the sample grids of a task show.
_SAMPLES = {
    "": {
        "what": "The same latents each time, as the training went on",
        "quality": "How close generated images come to the data",
    },
    "autoencoder": {
        "what": "Images of the data set, the same each time, encoded and decoded again, as the training went on",
        "quality": "How close images come to the data after they were encoded and decoded",
    },
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
        "quality": quality(content),
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
    """A word for the style sheet, and how far the run is in a sentence. running: None where nobody says it."""
    whole = content.number("kimg")
    seen = images(content.kimg)
    if whole is not None and content.kimg >= whole > 0:
        return "done", f"Done: {seen}."
    of = f"{seen} of {images(whole)}" if whole is not None else seen
    if running is None and not _ended(content):
        quiet = _quiet_seconds(content)
        last = f"; last line {span(quiet)} before this page" if quiet is not None else ""
        return "unknown", f"At {of}{last}. It did not say that it ended. {_resume(content)}"
    if running:
        rest = (whole - content.kimg) * (content.metrics.last("s_per_kimg") or 0.0) if whole is not None else 0.0
        return "running", f"In training: {of}{f', about {span(rest)} left' if rest > 0 else ''}."
    return "stopped", f"Stopped at {of}. {_resume(content)}"


def _resume(content: Content) -> str:
    return f"Resume with: python -m lowvram.train resume={shlex.quote(str(content.folder))}"


def _ended(content: Content) -> bool:
    """Whether the last session says that it ended, and no other has trained since."""
    last = content.about[-1] if content.about else None
    return last is not None and bool(last.ended) and content.kimg <= last.kimg


def _quiet_seconds(content: Content) -> float | None:
    """Since the last line of metrics; of the receipt, which is written with it and keeps the time when it is copied."""
    now = time.time()
    try:
        if content.receipt.sessions:
            then = max(datetime.fromisoformat(one.ended).timestamp() for one in content.receipt.sessions)
        else:
            then = (content.folder / metrics.NAME).stat().st_mtime
    except (OSError, ValueError, OverflowError):
        return None
    return max(0.0, now - then)


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
    if (measured := tile(content)) is not None:
        yield measured


def _samples(content: Content, selected: list[Any], seconds: float | None) -> dict[str, Any]:
    frames = pictures.frames(selected, seconds)
    real, why = pictures.picture_of(content.folder / "reals.png")
    return {
        "frames": [frame for frame in frames if frame.picture is not None],
        **_SAMPLES.get(content.text("task"), _SAMPLES[""]),
        "broken": [(frame.name, frame.reason) for frame in frames if frame.picture is None],
        "all": len(content.grids),
        "real": real,
        "no_real": "" if real is not None else f"reals.png {why}",
    }


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
