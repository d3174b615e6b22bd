"""All that was measured as one Markdown table, and a picture of memory against speed for each recipe.

    python -m benchmarks.report PATH... [--out FOLDER]

PATH: files of benchmark points (benchmarks.record), or folders that are searched for them; other JSON files are named
and skipped. Of a point that was measured again on the same hardware the last counts. The table is printed, and written
with the pictures to FOLDER: report.md, BENCHMARK-RECIPE.png (by default to the first PATH, or the folder of that
file).

Memory is at its peak, in GB of 2^30 or MB of 2^20 bytes: `device`, what the whole card had in use less what others
used; `reserved` by torch's allocator; `allocated` by tensors. `+-` is half the range between the quartiles of the
times, as a part of their median. A recipe's points on the frontier are bold: nothing else that the benchmark measured
of it on that hardware is as quick in less memory, or quicker in as much.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, scatter
from benchmarks.points import (
    MEMORY,
    Measured,
    cell,
    code,
    figures,
    load,
    markdown_table,
    natural,
    number,
    seconds,
    shared_overrides,
    size,
)
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError

Group = tuple[str, str, str]  # benchmark, recipe, hardware: what is compared in one picture

_HEADERS = (
    "benchmark",
    "name",
    "recipe",
    "settings",
    "images/s",
    "step",
    "+-",
    "times",
    *MEMORY,
    "J/image",
    "hardware",
    "failed",
    "details",
)
_RIGHT = ("images/s", "step", "+-", *MEMORY, "J/image")
_LONGEST_ERROR = 300


def report(points: Sequence[Measured]) -> str:
    """The Markdown of points: a heading, how much there is, the table, and the environments it stands on."""
    shared = shared_overrides(points)
    several = len({measured.hardware for measured in points}) > 1
    bold = {id(measured) for group in groups(points).values() for measured in frontier(group)}
    rows = []
    for measured in sorted(points, key=_place):
        row = _row(measured, shared) | ({"hardware": cell(measured.hardware)} if several else {})
        if id(measured) in bold:
            row |= {header: f"**{row[header]}**" for header in ("images/s", *MEMORY) if row.get(header)}
        rows.append(row)
    failed = sum(measured.error is not None for measured in points)
    lines = [
        "# Benchmarks",
        f"{_count(len(points), 'point')}, {failed} failed."
        + (" Bold: on the frontier of memory and speed of its recipe." if bold else ""),
    ]
    if shared:
        lines.append(f"All with {' '.join(code(word) for word in shared)}.")
    lines += [markdown_table(rows, _HEADERS, right=_RIGHT), "\n".join(_environments(points))]
    return "\n\n".join(lines) + "\n"


def pictures(points: Sequence[Measured], folder: Path) -> list[Path]:
    """Draw each recipe's points in a folder; returns the files. A recipe without memory and speed has none."""
    drawn = []
    found = groups(points)
    places = Counter((benchmark, recipe) for benchmark, recipe, _ in found)
    for (benchmark, recipe, hardware), group in found.items():
        words = [benchmark, recipe, *([hardware] if places[benchmark, recipe] > 1 else [])]
        path = folder / f"{'-'.join(record.slug(word) for word in words)}.png"
        chosen, kind = comparable(group)
        in_gib = max(measured.memory_bytes(kind) or 0 for measured in chosen) >= 2**30
        scatter.draw(
            _marks(group, 2**30 if in_gib else 2**20),
            path,
            title=f"{recipe}: memory against speed ({benchmark})",
            subtitle=_subtitle(group, hardware),
            across=f"peak memory {_MEANING[kind]}, {'GB' if in_gib else 'MB'}",
            upwards="images/s",
        )
        drawn.append(path)
    return drawn


_MEANING = {"device": "of the device", "reserved": "reserved", "allocated": "allocated"}


def groups(points: Sequence[Measured]) -> dict[Group, list[Measured]]:
    """The points that have a recipe, a speed and a peak, by `Group`, in order."""
    found: dict[Group, list[Measured]] = {}
    for measured in sorted(points, key=_place):
        recipe = measured.point.get("recipe")
        peaks = [measured.memory_bytes(kind) for kind in MEMORY]
        if recipe and measured.images_per_second is not None and any(peaks):
            found.setdefault((measured.point["benchmark"], recipe, measured.hardware), []).append(measured)
    return found


def comparable(group: Sequence[Measured]) -> tuple[list[Measured], str]:
    """The points that have one kind of peak, and the kind: what most have, and of several the widest of MEMORY."""
    counts = {kind: sum(bool(measured.memory_bytes(kind)) for measured in group) for kind in MEMORY}
    kind = max(MEMORY, key=lambda kind: counts[kind])  # the first of equals
    return [measured for measured in group if measured.memory_bytes(kind)], kind


def frontier(group: Sequence[Measured]) -> list[Measured]:
    """The points of a group that no other is better than; see `scatter.frontier`."""
    chosen, kind = comparable(group)
    best = scatter.frontier([(m.memory_bytes(kind) or 0, m.images_per_second or 0.0) for m in chosen])
    return [measured for n, measured in enumerate(chosen) if n in best]


def _place(measured: Measured) -> tuple[Any, ...]:
    benchmark, name, recipe, overrides = measured.key
    return benchmark, natural(recipe), measured.hardware, natural(" ".join(overrides)), natural(name)


def _row(measured: Measured, shared: Sequence[str]) -> dict[str, str]:
    point = measured.point
    overrides = [code(word) for word in point.get("overrides") or () if word not in shared]
    row = {
        "benchmark": cell(point["benchmark"]),
        "name": cell(point["name"]),
        "recipe": cell(point.get("recipe") or ""),
        "settings": " ".join(overrides),
        "details": cell(_details(point.get("details") or {})),
    }
    if measured.error:
        return row | {"failed": cell(measured.error[:_LONGEST_ERROR])}
    if (speed := measured.images_per_second) is not None:
        row["images/s"] = figures(speed)
    if measured.step is not None:
        row |= {"step": seconds(measured.step["median"]), "+-": _percent(measured.noise)}
    times = measured.times().items()
    row["times"] = ", ".join(f"{cell(name)} {seconds(spread['median'])}" for name, spread in times)
    peaks = {kind: measured.memory_bytes(kind) for kind in MEMORY}
    row |= {kind: size(peak) for kind, peak in peaks.items() if peak is not None}
    if (energy := number(point.get("energy_joules_per_image"))) is not None:
        row["J/image"] = figures(energy)
    return row


def _percent(part: float) -> str:
    return f"{100 * part:.1f}%" if part else ""


def _details(details: Mapping[str, Any]) -> str:
    """What a reader looks for: goals, ratios, sizes, what was true, and the plan; the rest is left to the file."""
    said = []
    for name, value in details.items():
        found = number(value)
        if value is True:
            said.append(name.replace("_", " "))
        elif name.endswith("_bytes") and found is not None:
            said.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {size(found)}")
        elif name.endswith("_ratio") and found is not None:
            said.append(f"{name.removesuffix('_ratio').replace('_', ' ')} {figures(found)}x")
        elif name == "goals" and isinstance(value, list):
            said += [_goal(goal) for goal in value]
        elif name == "plan" and isinstance(value, Mapping) and value.get("settings"):
            said.append("plan " + " ".join(f"{setting}={what}" for setting, what in value["settings"].items()))
    return "; ".join(said)


def _goal(goal: Mapping[str, Any]) -> str:
    return f"{goal['what']} {figures(goal['found'])}, {'reached' if goal['reached'] else 'MISSED'}"


def _environments(points: Sequence[Measured]) -> list[str]:
    """A line for each different environment, dates aside: hardware, driver, versions, commit."""
    dates: dict[str, list[str]] = {}
    for measured in points:
        environment = measured.environment
        versions = environment.get("versions") or {}
        parts = [measured.hardware]
        parts += [f"{name} {environment[name]}" for name in ("driver", "commit") if environment.get(name)]
        parts += [f"{name} {version}" for name, version in versions.items() if version]
        dates.setdefault(", ".join(parts), []).append(str(environment.get("date") or "")[:10])
    lines = []
    for words, days in dates.items():
        known = sorted({day for day in days if day})
        when = f" ({known[0]}{f' to {known[-1]}' if len(known) > 1 else ''})" if known else ""
        lines.append(f"- {cell(words)}: {_count(len(days), 'point')}{when}")
    return lines


def _marks(group: Sequence[Measured], unit_bytes: int) -> list[scatter.Mark]:
    chosen, kind = comparable(group)
    best = {id(measured) for measured in frontier(group)}
    shared = set(shared_overrides(chosen))
    names = len({measured.point["name"] for measured in chosen}) > 1
    marks = []
    for measured in chosen:
        own = [word for word in measured.point.get("overrides") or () if word not in shared]
        speed, noise = measured.images_per_second or 0.0, measured.noise
        marks.append(
            scatter.Mark(
                x=(measured.memory_bytes(kind) or 0) / unit_bytes,
                y=speed,
                low=speed / (1 + noise),
                high=speed / (1 - noise) if noise < 0.5 else 2 * speed,
                label=" ".join([*([measured.point["name"]] if names else []), *own]),
                best=id(measured) in best,
            )
        )
    return marks


def _subtitle(group: Sequence[Measured], hardware: str) -> str:
    chosen, kind = comparable(group)
    versions = {str((m.environment.get("versions") or {}).get("torch") or "") for m in chosen} - {""}
    words = [hardware, *(f"torch {version}" for version in sorted(versions))]
    words += [f"all with {' '.join(shared)}"] if (shared := shared_overrides(chosen)) else []
    if left := len(group) - len(chosen):
        words.append(f"{_count(left, 'point')} without {kind} memory left out")
    return "; ".join(words)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, or folders to be searched")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the table and the pictures are written")
    options = parser.parse_args()

    def run() -> None:
        points = load(options.paths)
        if not points:
            said = " ".join(str(path) for path in options.paths)
            raise LowVRAMError(f"No benchmark points in {said}.", "Write some: python -m benchmarks.train_step --help")
        first: Path = options.paths[0]
        folder = options.out or (first if first.is_dir() else first.parent)
        folder.mkdir(parents=True, exist_ok=True)
        said = report(points)
        drawn = pictures(points, folder)
        shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
        (folder / "report.md").write_text(said + shown)
        print(f"written: {', '.join(str(path) for path in [folder / 'report.md', *drawn])}", file=sys.stderr)
        print(said)

    report_errors(run, [])


if __name__ == "__main__":
    main()
