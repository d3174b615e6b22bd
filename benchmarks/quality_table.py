"""What benchmarks.time_to_quality says of its points: a table, and how much sooner one recipe is as good as another."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lowvram.memory.guard import in_gb

Point = Mapping[str, Any]  # of benchmarks.record

_COLUMNS = {"seconds": 9, "kimg": 9, "Wh": 9, "img/kWh": 10, "peak": 9}
_SHORT = {
    "frechet": "FD",
    "precision": "P",
    "recall": "R",
    "swd_mean": "SWD",
    "efficientnet_lite0": "Lite0",
    "random_conv": "rand",
}
_LEGEND = (
    "FD, P, R: Frechet distance, precision, recall on features of EfficientNet-Lite0 (Lite0) or an untrained network's",
    "(rand); SWD: sliced Wasserstein distance. Of distances less is better, of P and R more. Seconds are of training.",
)


def shown(values: Mapping[str, float]) -> list[str]:
    """The metrics that a table and pictures show, distances first.

    Of the sliced Wasserstein distance's levels their mean alone, and precision and recall of learned features.
    """
    distances = [name for name in values if name.startswith("frechet") or name == "swd_mean"]
    shares = [name for name in values if not is_distance(name) and not name.endswith("random_conv")]
    return [*distances, *shares]


def is_distance(metric: str) -> bool:
    """Whether less is better."""
    return metric.startswith(("frechet", "swd"))


def short(metric: str) -> str:
    """A metric's name for the head of a column: "FD Lite0 96px" for frechet_efficientnet_lite0_96px."""
    for word, brief in _SHORT.items():
        metric = metric.replace(word, brief)
    return metric.replace("_", " ")


def header(point: Point, width: int) -> list[str]:
    """The legend and the head of the table. width: of the longest recipe's name."""
    line = f"{'recipe':<{max(width, 6)}}" + "".join(f"{name:>{size}}" for name, size in _COLUMNS.items())
    return ["", *_LEGEND, line + "".join(f"{short(name):>{_wide(name)}}" for name in shown(point["details"]["values"]))]


def row(point: Point, width: int) -> str:
    """A point as a line of the table."""
    details = point["details"]
    per_kwh = details["images_per_kwh"]
    cells = {
        "seconds": f"{details['seconds']:.1f}",
        "kimg": f"{details['kimg']:.2f}",
        "Wh": f"{1000 * details['kwh']:.3g}",
        "img/kWh": f"{per_kwh:.3g}" if per_kwh else "-",
        "peak": in_gb(details["peak_bytes"]),
    }
    line = f"{point['recipe']:<{max(width, 6)}}" + "".join(f"{cells[name]:>{size}}" for name, size in _COLUMNS.items())
    return line + "".join(f"{details['values'][name]:>{_wide(name)}.4g}" for name in shown(details["values"]))


def floor(values: Mapping[str, float]) -> list[str]:
    """The same between halves of the real images, as a line."""
    if not values:
        return []
    return [
        "two halves of the real images: " + ", ".join(f"{short(name)} {values[name]:.4g}" for name in shown(values))
    ]


def sooner(points: Sequence[Point]) -> list[str]:
    """When each recipe is as near to the real images as the first one is at its end, by each distance.

    It is held against the time when the first one was that near for the first time, which may be before its end.
    A distance by which the first one has come no nearer since its first point tells nothing yet, and is said to.
    """
    courses: dict[str, list[Point]] = {}
    for point in points:
        if not point["error"]:
            courses.setdefault(point["recipe"], []).append(point)
    if len(courses) < 2:
        return []
    (first, own), *others = courses.items()
    begin, last = own[0]["details"]["values"], own[-1]["details"]
    metrics = list(filter(is_distance, shown(last["values"])))
    telling = [metric for metric in metrics if len(own) == 1 or last["values"][metric] < begin[metric]]
    lines = [f"by {short(metric)} {first} came no nearer" for metric in metrics if metric not in telling]
    for name, course in others:
        end = course[-1]["details"]["values"]
        for metric in telling:
            goal = last["values"][metric]
            since = reached(own, metric, goal)
            assert since is not None  # at its end, if not before
            what = f"{short(metric)} {goal:.4g}, {first}'s after {since:.0f} s"
            when = reached(course, metric, goal)
            if when is None:
                lines.append(f"{name} does not reach {what}: {end[metric]:.4g} at its end")
            else:
                lines.append(f"{name} reaches {what}, after {when:.0f} s: {since / when:.2g} times as soon")
    return lines


def reached(course: Sequence[Point], metric: str, goal: float) -> float | None:
    """Seconds until a distance is down to a goal for the first time, on straight lines between points; None: never."""
    found = [(point["details"]["seconds"], point["details"]["values"][metric]) for point in course]
    if found[0][1] <= goal:  # by then; when, was not measured
        return float(found[0][0])
    for (before, far), (after, near) in pairwise(found):
        if near <= goal:
            return float(before + (after - before) * (far - goal) / (far - near))
    return None


def brief(value: float) -> str:
    """Up to three figures, or all that stand before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _wide(metric: str) -> int:
    return max(8, len(short(metric))) + 2
