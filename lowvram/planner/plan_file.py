"""plan.json: a plan written down and read back, also one that somebody else wrote: checked, bounded, never run."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from lowvram.errors import LowVRAMError
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.planner.costs import CardCost
from lowvram.planner.log import CATEGORIES
from lowvram.planner.plan import Alternative, PhasePlan, Plan, Timeline
from lowvram.receipt.rates import Rates

_T = TypeVar("_T")

VERSION = 3
JSON_POINTS = 400
# What version 2 did not have, and what it means that a plan says nothing of it.
_SINCE_3: Mapping[str, Any] = {"rates": {**asdict(Rates())}, "published": [], "costs": []}
_WORKED_OUT = ("money", "co2_grams")  # of the other fields; written for those who read the file with something else
_MOST_FILE_BYTES = 4 * 2**20
_MOST_TEXT = 2000
_MOST_ENTRIES = 4096
_MOST_COUNT = 2**60
_REMEDY = "Make it anew with python -m lowvram.plan recipe=NAME vram=SIZE."


def to_json(plan: Plan) -> str:
    """Everything as JSON, keys in a fixed order; the timeline has JSON_POINTS points at most."""
    values = {"lowvram_plan": VERSION, **_plain(plan)}
    timeline = values.pop("timeline")
    values |= {name: getattr(plan, name) for name in _WORKED_OUT}
    head = json.dumps(values, indent=2, allow_nan=False)
    return f'{head[:-2]},\n  "timeline": {json.dumps(timeline)}\n}}\n'  # thousands of numbers: one line


def from_json(text: str, *, source: str = "plan.json") -> Plan:
    """The plan that `to_json` wrote, or an older lowvram's.

    Raises:
        LowVRAMError: it is broken, not a plan, or of another version; `source` says what was read.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LowVRAMError(f"{source} is not JSON: {str(error)[:200]}.", _REMEDY) from None
    if not isinstance(values, dict) or "lowvram_plan" not in values:
        raise LowVRAMError(f"{source} is not a plan.", "Give a plan.json that python -m lowvram.plan wrote.")
    version = values.pop("lowvram_plan")
    if version not in (2, VERSION) or isinstance(version, bool):
        raise LowVRAMError(
            f"{source} is a plan of version {str(version)[:20]}, and this lowvram reads versions 2 and {VERSION}.",
            _REMEDY,
        )
    try:
        if version == 2:
            return _record(Plan, {**_SINCE_3, **values}, "")
        said = {name: _number(values.pop(name, None), name) for name in _WORKED_OUT}
        plan = _record(Plan, values, "")
        for name, value in said.items():
            if not math.isclose(value, getattr(plan, name), rel_tol=1e-6):
                raise _WrongError(f"{name} is not what its hours, its kWh and its rates make")
        return plan
    except _WrongError as error:
        raise LowVRAMError(f"{source} is damaged: {error}.", _REMEDY) from None
    except LowVRAMError as error:
        raise LowVRAMError(f"{source} is damaged: {error.problem}", _REMEDY) from None


def save(plan: Plan, path: Path) -> None:
    """Write plan.json, under a temporary name first. Raises OSError where the disk says no."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(to_json(plan), encoding="utf-8", newline="\n")
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def load(path: Path) -> Plan:
    """Read a plan.json. Raises LowVRAMError where it is missing, broken, foreign or too large."""
    if not path.is_file():  # nor a pipe, which would never end
        raise LowVRAMError(f"plan {path} is not there.", _REMEDY)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise LowVRAMError(f"plan {path} can't be read: {error}.", _REMEDY) from error
    if len(content) > _MOST_FILE_BYTES:
        raise LowVRAMError(f"plan {path} is larger than {_MOST_FILE_BYTES >> 20} MiB, as no plan is.", _REMEDY)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise LowVRAMError(f"plan {path} is not text.", _REMEDY) from None
    return from_json(text, source=f"plan {path}")


class _WrongError(Exception):
    """What is wrong with a value of a plan.json."""


def _plain(value: Any) -> Any:
    """Values that JSON knows."""
    if isinstance(value, MemoryPolicy):
        return value.to_dict()
    if isinstance(value, Timeline):
        small = value.coarser(JSON_POINTS)
        live = {name: row.tolist() for name, row in zip(CATEGORIES, small.bytes, strict=True)}
        reserved = None if small.reserved is None else small.reserved.tolist()
        return {"marks": [list(mark) for mark in small.marks], "bytes": live, "reserved": reserved}
    if is_dataclass(value):
        return {field_.name: _plain(getattr(value, field_.name)) for field_ in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _record(cls: type[_T], values: Any, where: str) -> _T:
    """A dataclass from a JSON object that has its fields, all of them and no others."""
    values = _object(values, where or "the file")
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for name in values.keys() - hints.keys():
        raise _WrongError(f"{prefix}{name[:40]} is not known")
    for name in hints.keys() - values.keys():
        raise _WrongError(f"{prefix}{name} is missing")
    return cls(**{name: _READERS[hint](values[name], prefix + name) for name, hint in hints.items()})


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MOST_ENTRIES or any(len(name) > _MOST_TEXT for name in value):
        raise _WrongError(f"{where} is not an object of at most {_MOST_ENTRIES} entries")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ENTRIES:
        raise _WrongError(f"{where} is not a list of at most {_MOST_ENTRIES} entries")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise _WrongError(f"{where} is not a text of at most {_MOST_TEXT} characters")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _WrongError(f"{where} is not true or false")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_COUNT:  # a bool is an int, too
        raise _WrongError(f"{where} is not a whole number from 0 to 2^60")
    return value


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e30 or not math.isfinite(value):
        raise _WrongError(f"{where} is not a number from 0 to 1e30")
    return float(value)


def _or_none(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, where: None if value is None else read(value, where)


def _each(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    return lambda value, where: tuple(read(entry, f"{where}[{n}]") for n, entry in enumerate(_list(value, where)))


def _by_name(read: Callable[[Any, str], Any]) -> Callable[[Any, str], dict[str, Any]]:
    return lambda value, where: {
        name: read(entry, f"{where}.{name[:40]}") for name, entry in _object(value, where).items()
    }


def _record_of(cls: type[Any]) -> Callable[[Any, str], Any]:
    return lambda value, where: _record(cls, value, where)


def _policy(value: Any, where: str) -> MemoryPolicy:
    """Types first: MemoryPolicy checks what the values mean."""
    values = _object(value, where)
    checked: dict[str, Any] = {}
    for name, entry in values.items():
        if name in ("phases", "optimizers"):
            kind: type[Any] = PhasePolicy if name == "phases" else OptimizerPolicy
            parts = _by_name(_record_of(kind))(entry, f"{where}.{name}")
            checked[name] = {part: asdict(policy) for part, policy in parts.items()}
        elif name == "resident":
            checked[name] = _number(entry, f"{where}.{name}")
        elif name in get_type_hints(MemoryPolicy):
            checked[name] = _text(entry, f"{where}.{name}")
        else:
            raise _WrongError(f"{where}.{name[:40]} is not known")
    return MemoryPolicy.from_dict(checked)


def _timeline(value: Any, where: str) -> Timeline:
    values = _object(value, where)
    if values.keys() != {"marks", "bytes", "reserved"}:
        raise _WrongError(f"{where} does not have just marks, bytes and reserved")
    rows = _by_name(_each(_count))(values["bytes"], f"{where}.bytes")
    if tuple(rows) != CATEGORIES or len({len(row) for row in rows.values()}) != 1:
        raise _WrongError(f"{where}.bytes does not have equally long lists for {', '.join(CATEGORIES)}")
    marks = []
    for n, mark in enumerate(_list(values["marks"], f"{where}.marks")):
        at = f"{where}.marks[{n}]"
        if len(_list(mark, at)) != 3:
            raise _WrongError(f"{at} is not a name, a begin and an end")
        marks.append((_text(mark[0], at), _count(mark[1], at), _count(mark[2], at)))
    reserved = _or_none(_each(_count))(values["reserved"], f"{where}.reserved")
    return Timeline(
        marks=tuple(marks),
        bytes=np.array([rows[name] for name in CATEGORIES], np.int64),
        reserved=None if reserved is None else np.array(reserved, np.int64),
    )


_READERS: Mapping[Any, Callable[[Any, str], Any]] = {
    str: _text,
    bool: _flag,
    int: _count,
    float: _number,
    int | None: _or_none(_count),
    str | None: _or_none(_text),
    tuple[str, ...]: _each(_text),
    Mapping[str, int]: _by_name(_count),
    Mapping[str, str]: _by_name(_text),
    MemoryPolicy: _policy,
    tuple[PhasePlan, ...]: _each(_record_of(PhasePlan)),
    tuple[Alternative, ...]: _each(_record_of(Alternative)),
    tuple[CardCost, ...]: _each(_record_of(CardCost)),
    Rates: _record_of(Rates),
    Timeline | None: _or_none(_timeline),
}
