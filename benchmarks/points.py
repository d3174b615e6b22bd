"""Points of benchmark files (benchmarks.record) as the report and the comparison read them."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from lowvram.errors import LowVRAMError
from lowvram.memory.guard import in_gb

Key = tuple[str, str, str, tuple[str, ...]]
MEMORY = ("device", "reserved", "allocated")  # peaks, from what a card's owner sees to what tensors take
_YARDSTICKS = ("plain", "compiled", "copy", "torch", "torchao", "bitsandbytes", "diffusers")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point, and where it was measured."""

    point: Mapping[str, Any]
    environment: Mapping[str, Any]
    path: Path

    @property
    def key(self) -> Key:
        """What has to be equal for two points to be of the same thing; the order of different settings does not."""
        overrides = sorted(self.point.get("overrides") or (), key=lambda word: word.partition("=")[0])
        return self.point["benchmark"], self.point["name"], self.point.get("recipe") or "", tuple(overrides)

    @property
    def hardware(self) -> str:
        """ "RTX 3060, 12GB", or "Xeon, 2 threads": what has to be equal for figures to be compared."""
        found = self.environment.get("hardware") or {}
        device = found.get("device") or "unknown hardware"
        memory_bytes, threads = number(found.get("memory_bytes")), found.get("threads")
        if memory_bytes:
            return f"{device}, {in_gb(round(memory_bytes / 2**30) * 2**30)}"  # drivers keep some MB more or less
        return f"{device}, {threads} thread{'' if threads == 1 else 's'}" if threads else str(device)

    @property
    def error(self) -> str | None:
        """What it failed with."""
        return self.point.get("error") or None

    @property
    def yardstick(self) -> bool:
        """Whether it is what ours is measured by: the part of the name after a colon says whose it is."""
        return self.point["name"].rpartition(": ")[2].split(" ")[0] in _YARDSTICKS

    def memory_bytes(self, kind: str) -> int | None:
        """The peak of one kind in MEMORY; None where it was not measured."""
        found = number((self.point.get("memory") or {}).get(f"{kind}_bytes"))
        return None if found is None or self.error else int(found)

    @property
    def images_per_second(self) -> float | None:
        """None where it was not measured."""
        return None if self.error else number(self.point.get("images_per_second"), positive=True)

    @property
    def step(self) -> Mapping[str, Any] | None:
        """The spread of the seconds of a whole step; None where it was not measured."""
        found = self.point.get("seconds_per_step")
        return found if not self.error and median(found) is not None else None

    @property
    def noise(self) -> float:
        """Half the range between the quartiles of a step's seconds, as a part of their median; 0 where not known."""
        return relative_spread(self.step)

    def times(self) -> dict[str, Mapping[str, Any]]:
        """The spreads of its phases, or of whatever was timed, by name."""
        spreads = {} if self.error else self.point.get("seconds") or {}
        return {name: found for name, found in spreads.items() if median(found) is not None}


def number(value: Any, *, positive: bool = False) -> float | None:
    """A finite number (above 0 where asked), or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return None if positive and value <= 0 else value


def median(spread: Any) -> float | None:
    """The median of a `record.spread`; None where there is none."""
    return number(spread.get("median"), positive=True) if isinstance(spread, Mapping) else None


def relative_spread(spread: Any) -> float:
    """Half the range between the quartiles as a part of the median; 0 of a single run, or where there is no spread."""
    middle = median(spread)
    return 0.0 if middle is None else (number(spread.get("iqr"), positive=True) or 0.0) / 2 / middle


def load(paths: Iterable[Path], *, say: Callable[[str], None] | None = None) -> list[Measured]:
    """The points of files, and of all files below folders; of a point measured again on the same hardware the last.

    Hidden folders below a folder are left out. A JSON file of another kind is skipped, and named to `say` (default: the
    standard error stream).

    Raises:
        LowVRAMError: a path is not there.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    latest: dict[tuple[str, Key], Measured] = {}
    older = 0
    for measured in _dated(_files(paths), say):
        same = (measured.hardware, measured.key)
        older += same in latest
        latest.pop(same, None)  # so that it comes where the last one came
        latest[same] = measured
    if older:
        say(f"left out: {older} older measurement{'' if older == 1 else 's'} of the same points")
    return list(latest.values())


def _files(paths: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise LowVRAMError(f"{path} is not there.", "Name a file or a folder that a benchmark wrote.")
        below = sorted(path.rglob("*.json")) if path.is_dir() else []
        seen = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        for file in seen if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _dated(files: Sequence[Path], say: Callable[[str], None]) -> Iterator[Measured]:
    """The points of all files, those measured first before the others."""
    read: list[tuple[str, Path, dict[str, Any]]] = []
    for file in files:
        try:
            content = record.read(file)
        except (ValueError, OSError, RecursionError) as error:
            why = "not JSON" if isinstance(error, json.JSONDecodeError | UnicodeError) else str(error)
            say(f"skipped: {why if str(file) in why else f'{file}: {why}'}")
            continue
        environment = content.get("environment")
        content["environment"] = environment if isinstance(environment, dict) else {}
        read.append((str(content["environment"].get("date") or ""), file, content))
    for _, file, content in sorted(read, key=lambda found: found[0]):  # stable: of equal dates the last file
        points = content.get("points")
        for point in points if isinstance(points, list) else []:
            if not isinstance(point, dict) or not all(isinstance(point.get(k), str) for k in ("benchmark", "name")):
                say(f"skipped: {file} has a point without a benchmark and a name")
                continue
            yield Measured(point=point, environment=content["environment"], path=file)


def shared_overrides(points: Sequence[Measured]) -> list[str]:
    """The overrides that all of several points have."""
    if len(points) < 2:
        return []
    sets = [set(measured.point.get("overrides") or ()) for measured in points]
    return [word for word in points[0].point.get("overrides") or () if all(word in each for each in sets)]


def seconds(value: float) -> str:
    """A time with three figures: "1.23 s", "45.6 ms", "789 us"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{figures(value / size)} {unit}"
    return f"{figures(value / 1e-6)} us"


def size(size_bytes: float) -> str:
    """Bytes in GB of 2^30, or MB of 2^20: "5.5GB", "36.2MB", "512 bytes"."""
    if size_bytes >= 2**30:
        return in_gb(round(size_bytes))
    return f"{figures(size_bytes / 2**20)}MB" if size_bytes >= 2**20 else f"{size_bytes:.0f} bytes"


def figures(value: float) -> str:
    """Three figures, never with an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    rounded = float(f"{value:.3g}")
    if rounded == 0 or not math.isfinite(rounded):
        return f"{rounded:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded if digits else value:.{digits}f}"


def cell(said: object) -> str:
    """Text as one cell of a Markdown table."""
    return " ".join(str(said).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def code(said: str) -> str:
    """Text as code in a cell of a Markdown table."""
    return f"`{' '.join(said.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def markdown_table(rows: Sequence[Mapping[str, str]], headers: Sequence[str], *, right: Iterable[str] = ()) -> str:
    """A table of those columns in which there is anything; `right` are set to the right."""
    used = [header for header in headers if any(row.get(header) for row in rows)]
    aligned = set(right)
    lines = [used, ["---:" if header in aligned else "---" for header in used]]
    lines += [[row.get(header, "") for header in used] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def natural(said: str) -> tuple[str | int, ...]:
    """A key that sorts "vram=10GB" behind "vram=6GB"."""
    return tuple(int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", said)))
