"""What is in a run folder, read as something that a stranger may have made: bounded, and nothing in it is executed.

Of recipe.yaml plain values are taken, so that a folder of an older or newer version still opens.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lowvram.errors import LowVRAMError
from lowvram.pages import about, metrics, pictures
from lowvram.receipt.ledger import NAME as RECEIPT
from lowvram.receipt.ledger import Receipt
from lowvram.receipt.stands_on import StandsOn

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan

_MOST_RECIPE_BYTES = 2**18
_MOST_SETTINGS = 1000
_MOST_DEPTH = 8
_MOST_NAMES = 100_000  # of a folder
_MOST_EVALUATIONS = 200
_MOST_EVALUATION_BYTES = 2**18
_MOST_STATE_BYTES = 2**22
MOST_TEXT = 2000  # of a setting's text; what is longer is cut
_PRIVATE = ("mark.certificate", "mark.key")  # where somebody keeps what signs: of no use to others


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A file that lowvram.evaluate left. values, floor: by metric. settings: of the sampling, what was named."""

    step: int
    kimg: float
    values: dict[str, float]
    floor: dict[str, float]
    images: int
    real_images: int
    settings: str
    notes: tuple[str, ...]

    @property
    def conditions(self) -> str:
        """How it was measured; metrics of other conditions are not to be held against these."""
        return f"{self.images:,} images{f', {self.settings}' if self.settings else ''}"


@dataclass(frozen=True, kw_only=True)
class Content:
    """A run folder. settings: of recipe.yaml, dotted. grids: by thousands of images. checkpoints, files: (name, bytes).

    Paths of a signature's key and certificate are left out of settings; signed: whether there were some. data: the data
    set's name, "" where neither a checkpoint nor about.json says it. faults: what is missing or broken, in sentences.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    signed: bool
    metrics: metrics.Metrics
    plan: "Plan | None"
    receipt: Receipt
    stands_on: StandsOn | None
    evaluations: tuple[Evaluated, ...]
    grids: list[tuple[int, Path]]
    about: list[about.About]
    checkpoints: list[tuple[str, int]]
    files: list[tuple[str, int]]
    data: str
    faults: list[str]

    def number(self, name: str) -> float | None:
        """A setting that is a number."""
        value = self.settings.get(name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
        return float(value) if good and value is not None and math.isfinite(value) else None

    def text(self, name: str) -> str:
        """A setting that is text, "" where it is not."""
        value = self.settings.get(name)
        return value if isinstance(value, str) else ""

    @property
    def kimg(self) -> float:
        """Thousands of images seen."""
        return self.metrics.last("kimg") or 0.0


def read(folder: str | Path, *, quick: bool = False) -> Content:
    """What is there. quick: as `metrics.read` knows it.

    Raises:
        LowVRAMError: it is no run folder, or can't be read at all.
    """
    folder = Path(folder).expanduser()
    try:
        what = _no_run(folder)
        if what:
            remedy = "Give a folder that python -m lowvram.train wrote, as outputs/NAME."
            raise LowVRAMError(f"{folder} {what}.", remedy)
        files = _files(folder)
        found = metrics.read(folder, quick=quick)
    except OSError as error:
        raise LowVRAMError(f"{folder} can't be read: {error}.", "Look at its permissions.") from error
    faults: list[str] = []
    checkpoints = _checkpoints(folder / "checkpoints", faults)
    settings = _settings(folder / "recipe.yaml", faults)
    private = [settings.pop(name, None) for name in _PRIVATE]
    records = about.read(folder)
    names = [name for name, _ in files]
    batch = settings.get("batch")
    content = Content(
        folder=folder,
        name=folder.absolute().name,
        settings=settings,
        signed=any(value is not None for value in private),
        metrics=found,
        plan=_plan(folder, names, faults),
        receipt=_receipt(folder, names, faults),
        stands_on=_stands_on(folder, faults),
        evaluations=tuple(_evaluations(folder / "metrics", batch if type(batch) is int else 0, faults)),
        grids=pictures.grids(folder, names),
        about=records,
        checkpoints=checkpoints,
        files=files,
        data=_data_name(folder, checkpoints) or (records[-1].data if records else ""),
        faults=faults,
    )
    faults += _missing(content, names)
    return content


def _no_run(folder: Path) -> str:
    """Why a folder is none of a run, "" if it is one. Raises OSError where it can't be looked into."""
    recipe = folder / "recipe.yaml"
    if not os.path.lexists(folder):
        return "is not there"
    with os.scandir(folder):  # a folder that may not be read has no recipe, as far as one sees
        pass
    if recipe.is_symlink():  # of a foreign folder, it could show any file
        return "is not a run folder: its recipe.yaml is a link"
    return "" if recipe.is_file() else "is not a run folder: it has no recipe.yaml"


def _missing(content: Content, names: list[str]) -> Iterator[str]:
    found = content.metrics
    if metrics.NAME not in names:
        yield "metrics.jsonl is not there, so there are no curves."
    elif not found.rows:
        yield "metrics.jsonl has no line that can be read, so there are no curves."
    if found.broken:
        lines = "One line" if found.broken == 1 else f"{found.broken} lines"
        yield f"{lines} of metrics.jsonl could not be read and {'is' if found.broken == 1 else 'are'} left out."
    if found.not_finite:
        yield f"{found.not_finite} values in metrics.jsonl are NaN, infinite or beyond 1e30 and are left out."
    if not found.every_line:
        yield "metrics.jsonl is large: lines at even distances stand for the rest. Each that is shown is exact."
    if not content.grids:
        yield "There are no sample grids (fakes_....png) yet."
    if RECEIPT not in names:
        yield "There is no receipt.json, as in folders of older versions: energy and cost are not known."


def _settings(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_RECIPE_BYTES + 1)
        if len(content) > _MOST_RECIPE_BYTES:
            raise ValueError("it is too large")
        values = yaml.load(content, _PlainLoader)  # a SafeLoader: plain values and nothing else
        if not isinstance(values, dict):
            raise ValueError("it holds no settings")
        leaves = dict(_leaves(values, "", 0))
        if len(leaves) > _MOST_SETTINGS:
            raise ValueError("it has too many settings")
        return leaves
    except (OSError, yaml.YAMLError, RecursionError, *_BY_TAGS) as error:
        faults.append(f"recipe.yaml can't be read: {' '.join(str(error).split())[:200]}. The settings are not known.")
        return {}


# What PyYAML raises for a value that is not what its tag says, as `!!bool maybe`.
_BY_TAGS = (ValueError, OverflowError, LookupError, AttributeError, TypeError)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them unfold to billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias, as no recipe of a run does")
        return super().compose_node(parent, index)


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and depth < _MOST_DEPTH:
        for key, entry in value.items():
            short = str(key)[:100]
            yield from _leaves(entry, f"{name}.{short}" if name else short, depth + 1)
    elif value is None or isinstance(value, bool | int | float):
        yield name, value if not isinstance(value, int) or value.bit_length() < 1000 else "a very large number"
    elif isinstance(value, list) and len(str(value)) <= MOST_TEXT:
        yield name, value
    else:
        yield name, str(value)[:MOST_TEXT]


def _files(folder: Path) -> list[tuple[str, int]]:
    """Names and bytes of the regular files in the folder itself."""
    found = []
    with os.scandir(folder) as entries:
        for n, entry in enumerate(entries):
            if n >= _MOST_NAMES:
                break
            if entry.is_file(follow_symlinks=False) and not entry.name.endswith(".partial"):
                found.append((entry.name, entry.stat(follow_symlinks=False).st_size))
    return sorted(found)


def _checkpoints(folder: Path, faults: list[str]) -> list[tuple[str, int]]:
    """Names and bytes of the checkpoints, oldest first. Links are none."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            some = [e for n, e in enumerate(entries) if n < 1000 and e.is_dir(follow_symlinks=False)]
        names = sorted(e.name for e in some if e.name.startswith("step-") and not e.name.endswith(".partial"))
        return [(name, sum(size for _, size in _files(folder / name))) for name in names]
    except OSError as error:
        faults.append(f"The checkpoints can't be looked at: {error.strerror or error}.")
        return []


def _plan(folder: Path, names: list[str], faults: list[str]) -> "Plan | None":
    if "plan.json" not in names:
        return None
    from lowvram.planner.plan import Plan  # with torch: only where there is a plan

    try:
        return Plan.load(folder / "plan.json")
    except LowVRAMError as error:
        faults.append(f"The plan can't be shown: {error.problem}")
        return None


def _receipt(folder: Path, names: list[str], faults: list[str]) -> Receipt:
    if RECEIPT not in names:
        return Receipt()
    try:
        return Receipt.read(folder)
    except LowVRAMError as error:
        faults.append(error.problem)
        return Receipt()


def _stands_on(folder: Path, faults: list[str]) -> StandsOn | None:
    try:
        return StandsOn.read(folder)
    except LowVRAMError as error:
        faults.append(error.problem)
        return None


def _data_name(folder: Path, checkpoints: list[tuple[str, int]]) -> str:
    for name, _ in reversed(checkpoints):
        values = _json(folder / "checkpoints" / name / "state.json", _MOST_STATE_BYTES)
        data = values.get("dataset")
        if isinstance(data, dict) and isinstance(data.get("name"), str):
            return str(data["name"])[:300]
    return ""


def _evaluations(folder: Path, batch: int, faults: list[str]) -> Iterator[Evaluated]:
    """By step, of metrics/evaluation-....json."""
    if folder.is_symlink() or not folder.is_dir():
        return
    found = []
    try:
        names = [name for name, _ in _files(folder) if name.startswith("evaluation-") and name.endswith(".json")]
    except OSError as error:
        faults.append(f"The folder metrics can't be looked at: {error.strerror or error}.")
        return
    for name in names[-_MOST_EVALUATIONS:]:
        values = _json(folder / name, _MOST_EVALUATION_BYTES)
        evaluated = _evaluated(values, batch)
        if evaluated is None:
            faults.append(f"metrics/{name[:80]} can't be read.")
        else:
            found.append(evaluated)
    yield from sorted(found, key=lambda one: one.step)


def _evaluated(values: dict[str, Any], batch: int) -> Evaluated | None:
    step = values.get("step")
    if type(step) is not int or not 0 <= step < 2**50:
        return None
    kimg = values.get("kimg", step * batch / 1000)  # older evaluations don't say it
    usual = {"seed": 0, "truncation": 1.0, "noise": "random"}
    named = ("seed", "truncation", "noise", "steps", "sampler", "guidance")
    said = [f"{name}={str(values[name])[:40]}" for name in named if values.get(name) not in (None, usual.get(name))]
    notes = values.get("notes")
    return Evaluated(
        step=step,
        kimg=kimg if _finite(kimg) else 0.0,
        values=_numbers(values.get("values")),
        floor=_numbers(values.get("floor")),
        images=_whole(values.get("generated_images")),
        real_images=_whole(values.get("real_images")),
        settings=" ".join(said),
        notes=tuple(str(note)[:500] for note in notes[:10]) if isinstance(notes, list) else (),
    )


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {str(name)[:60]: value for name, value in list(values.items())[:50] if _finite(value)}


def _finite(value: Any) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and abs(value) < 1e15 and math.isfinite(value)


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**60 else 0


def _json(path: Path, most_bytes: int) -> dict[str, Any]:
    """A JSON object of a file; empty where it is none, or too large."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > most_bytes:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
