"""Pages on the disk."""

import base64
import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowvram.errors import LowVRAMError
from lowvram.pages import about, comparison, folder, run_page
from lowvram.pages.words import UNFIT

if TYPE_CHECKING:
    import torch
    from jinja2 import Environment

NAME = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_SECONDS = 0.5  # for pictures, while a training waits; those left out come with a later page
MOST_RUNS = 6


def write(run: str | Path, *, out: str | Path | None = None) -> Path:
    """Write a run folder's page, RUN/report.html unless `out` says another place; returns where.

    Raises:
        LowVRAMError: it is no run folder.
        OSError: the disk says no.
    """
    run = Path(run).expanduser()
    return _save(run / NAME if out is None else Path(out).expanduser(), "run.html", run_page.view(folder.read(run)))


def compare(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write a page with runs side by side; returns where.

    Raises:
        LowVRAMError: one is no run folder, two are the same, or they are fewer than two or too many.
        OSError: the disk says no.
    """
    folders = [Path(run).expanduser() for run in runs]
    if not 2 <= len(folders) <= MOST_RUNS:
        raise LowVRAMError(f"{len(folders)} runs can't be compared.", f"Name 2 to {MOST_RUNS} run folders.")
    for n, one in enumerate(folders):
        if one.resolve() in [other.resolve() for other in folders[:n]]:
            raise LowVRAMError(f"{one} is named twice.", "Name each run once.")
    contents = [folder.read(one) for one in folders]
    return _save(Path(out).expanduser(), "comparison.html", comparison.view(contents))


class Data(Protocol):
    """A data set, as far as a page speaks of it."""

    name: str

    def __len__(self) -> int: ...


def while_training(
    run: Path,
    data: Data,
    *,
    begun: str,
    running: bool,
    say: Callable[[str], None],
    device: "torch.device | None" = None,
) -> None:
    """Renew a run's page, and its about.json, which says later whether the training ended.

    No failure ends the training: `say` gets one line. begun: when the session did, UTC, ISO 8601, as its receipt has
    it. running: False with the last call of a session.
    """
    if sys.is_finalizing():  # a script has ended within a training, and Python can import nothing any more
        return
    try:
        content = folder.read(run, quick=True)
        record = about.here(data=data.name, images=len(data), device=device)
        ended = "" if running else datetime.now(UTC).isoformat()
        about.note(run, replace(record, kimg=content.kimg, begun=begun, ended=ended))
        content = replace(content, about=about.read(run))
        _save(run / NAME, "run.html", run_page.view(content, running=running, seconds=_SECONDS))
    except Exception as error:  # a mistake in a page must not cost days of training
        say(f"the run's page could not be written: {' '.join(str(error).split()) or type(error).__name__}")


def _save(path: Path, template: str, values: dict[str, Any]) -> Path:
    """Fill in a template, and write it whole or not at all."""
    text = _templates().get_template(template).render(**values, **_own_parts())
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(UNFIT.sub("�", text), encoding="utf-8", newline="\n")
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return path


@functools.cache
def _templates() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _own_parts() -> dict[str, Any]:
    """The style sheet and the script, as they are, with the hashes by which the page allows these two and no others."""
    from markupsafe import Markup

    parts: dict[str, Any] = {}
    for name in ("style.css", "script.js"):
        text = (_TEMPLATES / name).read_text(encoding="utf-8").strip()
        kind = name.partition(".")[0]
        parts[kind] = Markup(text)
        parts[f"{kind}_hash"] = "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return parts
