"""What became slower, larger or broken from one measurement to the next; a Markdown table, and the exit code says it.

    python -m benchmarks.compare OLD NEW [--memory 3] [--speed 10] [--any-hardware]

OLD, NEW: files of benchmark points (benchmarks.record), or folders of them. Points of the same benchmark, name, recipe
and overrides are compared, on the same hardware: the card and its memory, or the CPU and its threads. Of a point that
was measured again the last counts.

Memory: a peak (allocated, reserved, device) that rises over `--memory` per cent fails. Peaks have no spread.
Speed: images a second; without them whole steps; without those each thing that was timed. A measurement is taken as
median +- half the range between its quartiles (in seconds), and it fails if the new one's faster end is still over
`--speed` per cent slower than the old one's slower end. A single time has no range, and what it measures counts as it
is; the more it varies, the larger a loss passes: what noise would hide is in the table's last column.
A point that ran and now fails, fails too. One that is missing, or was not there before, is only listed. What is not
ours (a name that ends in ": plain", ": compiled", ": bitsandbytes 8-bit" and so on) is a yardstick: it is shown where
it moved as far, for the machine may have changed, and fails nothing.

Exit codes: 0, all is well; 1, something fails; 2, nothing could be compared: a file is missing, has no points, or has
other points or other hardware only (with --any-hardware figures of other hardware are compared all the same).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.points import (
    MEMORY,
    Key,
    Measured,
    cell,
    code,
    figures,
    load,
    markdown_table,
    relative_spread,
    seconds,
    shared_overrides,
    size,
)
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError

Verdict = Literal["worse", "same", "better"]
_HEADERS = ("", "point", "what", "old", "new", "change", "passes to")
_RIGHT = ("old", "new", "change", "passes to")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of a point, then and now.

    ratio: new to old, of a size or a speed; limit: the worst ratio that passes; yardstick: it is not ours.
    """

    what: str
    old: str
    new: str
    ratio: float
    limit: float
    verdict: Verdict
    yardstick: bool = False

    @property
    def fails(self) -> bool:
        """Whether it became worse, and is ours."""
        return self.verdict == "worse" and not self.yardstick


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Changes by point, and the points that have none.

    newly_failed: those that ran in the old measurement. shared: overrides of all points, which are not in their names.
    """

    changes: dict[str, list[Change]]
    newly_failed: dict[str, str]
    still_failed: dict[str, str]
    missing: list[str]
    added: list[str]
    shared: list[str]

    @property
    def passes(self) -> bool:
        """Whether nothing became worse."""
        return not self.newly_failed and not any(c.fails for found in self.changes.values() for c in found)


def compare(
    old: Sequence[Measured],
    new: Sequence[Measured],
    *,
    memory_percent: float = 3.0,
    speed_percent: float = 10.0,
    any_hardware: bool = False,
) -> Comparison:
    """Compare the points of two measurements; see the module.

    Raises:
        LowVRAMError: they have no hardware, or no point, in common.
    """
    shared = {m.hardware for m in old} & {m.hardware for m in new}
    if not any_hardware:
        if not shared:
            raise LowVRAMError(
                f"The old points were measured on {_listed(m.hardware for m in old)}, the new ones on "
                f"{_listed(m.hardware for m in new)}.",
                "Compare measurements of the same hardware; --any-hardware compares them all the same.",
            )
        old = [m for m in old if m.hardware in shared]
    before, after = _by_key(old, any_hardware), _by_key(new, any_hardware)
    after = _failures_spread(before, after)
    shared_words = shared_overrides([*before.values(), *after.values()])
    naming = partial(_name, shared=shared_words, with_hardware=not any_hardware and len({m.hardware for m in new}) > 1)
    if not before.keys() & after.keys():
        raise LowVRAMError(
            f"None of the {len(after)} new points is among the {len(before)} old ones.",
            "Points match when benchmark, name, recipe and overrides do: run the benchmark with the same settings.",
        )
    changes: dict[str, list[Change]] = {}
    newly_failed: dict[str, str] = {}
    still_failed: dict[str, str] = {}
    added = []
    for key, now in after.items():
        then, name = before.get(key), naming(now)
        if now.error:  # a yardstick's is its own matter
            failing = still_failed if then is None or then.error or now.yardstick else newly_failed
            failing[name] = now.error
        elif then is None or then.error:
            added.append(name)
        else:
            found = [*_sizes(then, now, memory_percent), *_speeds(then, now, speed_percent)]
            changes[name] = [replace(change, yardstick=now.yardstick) for change in found]
    if not any(changes.values()) and not newly_failed:
        raise LowVRAMError(
            f"No figure was measured in both: {len(still_failed)} points failed, the others have no figures.",
            "Mend what fails, and measure again.",
        )
    missing = [naming(then) for key, then in before.items() if key not in after and not then.error]
    return Comparison(
        changes=changes,
        newly_failed=newly_failed,
        still_failed=still_failed,
        missing=missing,
        added=added,
        shared=shared_words,
    )


def _by_key(points: Sequence[Measured], any_hardware: bool) -> dict[tuple[str, Key], Measured]:
    return {("" if any_hardware else measured.hardware, measured.key): measured for measured in points}


def _failures_spread(
    before: Mapping[tuple[str, Key], Measured], after: Mapping[tuple[str, Key], Measured]
) -> dict[tuple[str, Key], Measured]:
    """The new points; where a whole run failed (which is then called "step"), its points as the old ones are named."""

    def run_of(where: tuple[str, Key]) -> tuple[str, ...]:
        hardware, (benchmark, _, recipe, overrides) = where
        return hardware, benchmark, recipe, *overrides

    whole = {key: now for key, now in after.items() if now.error and now.point["name"] == "step" and key not in before}
    failed = {run_of(key): (key, now) for key, now in whole.items()}
    spread = dict(after)
    for key, then in before.items():
        if key not in after and run_of(key) in failed:
            unnamed, now = failed[run_of(key)]
            spread.pop(unnamed, None)
            spread[key] = replace(now, point={**now.point, "name": then.point["name"]})
    return spread


def _name(measured: Measured, *, shared: Sequence[str], with_hardware: bool) -> str:
    benchmark, name, recipe, overrides = measured.key
    words = [benchmark, *([recipe] if recipe not in ("", name) else []), name]
    words += [word for word in overrides if word not in shared]
    return " ".join([*words, *([f"({measured.hardware})"] if with_hardware else [])])


def _sizes(old: Measured, new: Measured, percent: float) -> list[Change]:
    """The peaks that both have."""
    changes = []
    limit = 1 + percent / 100
    for kind in MEMORY:
        then, now = old.memory_bytes(kind), new.memory_bytes(kind)
        if then is None or now is None:
            continue
        ratio = now / then if then else float("inf") if now else 1.0
        verdict: Verdict = "worse" if now > limit * then else "better" if limit * now < then else "same"
        changes.append(
            Change(what=f"{kind} memory", old=size(then), new=size(now), ratio=ratio, limit=limit, verdict=verdict)
        )
    return changes


def _speeds(old: Measured, new: Measured, percent: float) -> list[Change]:
    """The speed of the whole, or of each part where the whole was not measured in both."""
    then, now = old.images_per_second, new.images_per_second
    if then is not None and now is not None:
        shown = (f"{figures(then)} images/s", f"{figures(now)} images/s")
        return [_speed("speed", shown, now / then, old.noise, new.noise, percent)]
    parts, parts_now = old.times(), new.times()
    steps = old.step, new.step
    if steps[0] and steps[1]:
        parts, parts_now = {"steps": steps[0]}, {"steps": steps[1]}
    return [_timed(name, parts[name], parts_now[name], percent) for name in parts if name in parts_now]


def _timed(name: str, old: Mapping[str, Any], new: Mapping[str, Any], percent: float) -> Change:
    then, now = old["median"], new["median"]
    noise = relative_spread(old), relative_spread(new)
    return _speed(f"speed of {name}", (seconds(then), seconds(now)), then / now, *noise, percent)


def _speed(
    what: str, shown: tuple[str, str], ratio: float, noise_then: float, noise_now: float, percent: float
) -> Change:
    """ratio: of the medians, above 1 when faster. A noise is half the quartiles' range as a part of the median."""
    limit = 1 - percent / 100
    # The slower end of the old times is median * (1 + noise), the faster end of the new ones median * (1 - noise).
    fails_below = limit * max(0.0, 1 - noise_now) / (1 + noise_then)
    gains_above = (1 + noise_now) / max(1e-9, 1 - noise_then) / limit
    verdict: Verdict = "worse" if ratio < fails_below else "better" if ratio > gains_above else "same"
    return Change(what=what, old=shown[0], new=shown[1], ratio=ratio, limit=fails_below, verdict=verdict)


def markdown(found: Comparison, old: Sequence[Measured], new: Sequence[Measured]) -> str:
    """What changed, worst first; what did not is counted."""
    flat = [(point, change) for point, changes in found.changes.items() for change in changes]
    count = Counter(change.verdict for _, change in flat if not change.yardstick)
    moved = sorted((pair for pair in flat if pair[1].verdict != "same"), key=_rank)
    lines = [
        f"# Comparison: {'passed' if found.passes else 'FAILED'}",
        f"{len(found.changes)} points compared, {sum(count.values())} figures of ours: {count['worse']} worse, "
        f"{count['better']} better, {count['same']} the same. {len(found.newly_failed)} points fail that ran before.",
        f"All with {' '.join(code(word) for word in found.shared)}." if found.shared else "",
        "\n".join(f"- {words}" for words in _differences(old, new)),
        markdown_table([_row(*pair) for pair in moved], _HEADERS, right=_RIGHT) if moved else "",
        _list("Failed now, ran before", [f"{point}: {error}" for point, error in found.newly_failed.items()]),
        _list(
            "Failed, as before or not measured before",
            [f"{point}: {error}" for point, error in found.still_failed.items()],
        ),
        _list("Missing in the new measurement", found.missing),
        _list("Not in the old measurement", found.added),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _rank(pair: tuple[str, Change]) -> tuple[bool, bool, float]:
    change = pair[1]
    extent = max(change.ratio, 1 / change.ratio) if change.ratio else float("inf")
    return change.yardstick, change.verdict == "better", -extent


def _row(point: str, change: Change) -> dict[str, str]:
    sign = "yardstick" if change.yardstick else "WORSE" if change.fails else "better"
    said = (sign, cell(point), change.what, change.old, change.new, _percent(change.ratio), _percent(change.limit))
    return dict(zip(_HEADERS, said, strict=True))


def _differences(old: Sequence[Measured], new: Sequence[Measured]) -> list[str]:
    """What else changed between the two measurements: hardware, driver, versions, commit."""
    said = []
    for name, of in (
        ("hardware", lambda m: m.hardware),
        ("driver", lambda m: m.environment.get("driver")),
        ("commit", lambda m: m.environment.get("commit")),
        ("torch", lambda m: (m.environment.get("versions") or {}).get("torch")),
        ("triton", lambda m: (m.environment.get("versions") or {}).get("triton")),
    ):
        then, now = (_listed(str(of(m)) for m in points if of(m)) for points in (old, new))
        if then != now:
            said.append(f"{name}: {cell(then or 'not known')}, now {cell(now or 'not known')}")
    return said


def _list(heading: str, items: Iterable[str]) -> str:
    lines = [f"- {cell(item)}" for item in items]
    return f"{heading}:\n\n" + "\n".join(lines) if lines else ""


def _listed(words: Iterable[str]) -> str:
    return " and ".join(sorted(set(words)))


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a file, or a folder that is searched")
    parser.add_argument("new", type=Path, help="the same, measured later")
    parser.add_argument("--memory", type=float, default=3.0, metavar="PERCENT", help="rise that passes (3)")
    parser.add_argument("--speed", type=float, default=10.0, metavar="PERCENT", help="loss that passes (10)")
    parser.add_argument("--any-hardware", action="store_true", help="compare figures of different hardware too")
    options = parser.parse_args()

    def run() -> None:
        if options.memory < 0 or not 0 <= options.speed < 100:
            raise LowVRAMError(
                f"--memory {options.memory:g} --speed {options.speed:g} are no per cents of a rise and of a loss.",
                "Use --memory 0 or more, and --speed from 0 to below 100.",
            )
        old, new = _points(options.old), _points(options.new)
        found = compare(
            old,
            new,
            memory_percent=options.memory,
            speed_percent=options.speed,
            any_hardware=options.any_hardware,
        )
        print(markdown(found, old, new))
        sys.exit(0 if found.passes else 1)

    report_errors(run, [])


def _points(path: Path) -> list[Measured]:
    points = load([path])
    if not points:
        raise LowVRAMError(f"No benchmark points in {path}.", "Write some: python -m benchmarks.train_step --help")
    return points


if __name__ == "__main__":
    main()
