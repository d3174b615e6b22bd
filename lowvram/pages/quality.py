"""Quality as lowvram.evaluate measured it: which evaluations may stand in one curve, and what a page shows of them.

A metric depends on how it was measured: on the settings of the sampling, and for some on how many images there were.
Only evaluations that were made alike make a curve.
"""

from collections.abc import Sequence
from typing import Any

from lowvram.pages.charts import Line, chart
from lowvram.pages.folder import Content, Evaluated
from lowvram.pages.words import count, images, number, six

_MOST_METRICS = 16
_MOST_LINES = 8  # of a chart
_METRIC_WORDS = {
    "frechet": "Frechet distance",
    "fid": "FID",
    "precision": "Precision",
    "recall": "Recall",
    "swd": "Sliced Wasserstein distance",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "random_conv": "random features",
}


def metric_title(name: str) -> str:
    """A metric's name in words: "Frechet distance, EfficientNet-Lite0 96px" for frechet_efficientnet_lite0_96px."""
    kind, _, rest = name.partition("_")
    if kind not in _METRIC_WORDS:
        return name
    for short, words in _METRIC_WORDS.items():
        rest = rest.replace(short, words)
    return f"{_METRIC_WORDS[kind]}{', ' if rest else ''}{rest.replace('_', ' ')}"


def metric_names(contents: Sequence[Content]) -> list[str]:
    """The metrics that a page shows, as many as it has room for."""
    return _all_names(contents)[:_MOST_METRICS]


def groups(content: Content, name: str) -> dict[str, list[Evaluated]]:
    """Evaluations that have a metric, by the conditions of each, which a label can show.

    In each group one of each step, by images seen. First those under which most steps were measured; among as many,
    those of the usual settings, of most images.
    """
    found: dict[str, dict[float, Evaluated]] = {}
    for one in content.evaluations:
        if name in one.values:
            found.setdefault(one.conditions, {})[one.kimg] = one
    some = [[of_kimg[kimg] for kimg in sorted(of_kimg)] for of_kimg in found.values()]
    some.sort(key=lambda group: (-len(group), bool(group[0].settings), -group[0].images))
    return {group[0].conditions: group for group in some}


def evaluations_of(contents: Sequence[Content], name: str) -> list[list[Evaluated]]:
    """Those that runs are compared by, of each run: made alike where all that have the metric allow it."""
    all_groups = [groups(one, name) for one in contents]
    having = [one for one in all_groups if one]
    common = [conditions for conditions in having[0] if all(conditions in one for one in having)] if having else []
    return [one[common[0]] if one and common else next(iter(one.values()), []) for one in all_groups]


def same_conditions(found: Sequence[Sequence[Evaluated]]) -> bool:
    """Whether evaluations of several runs were made alike."""
    return len({one.conditions for some in found for one in some}) <= 1


def tile(content: Content) -> tuple[str, str] | None:
    """A distance for the head of the page: of the newest step, with the usual settings where there are such, and of
    most images. None where none was measured."""
    having = [(one, names) for one in content.evaluations if (names := _distances(one))]
    if not having:
        return None
    best, names = max(having, key=lambda pair: (pair[0].step, not pair[0].settings, pair[0].images))
    said = f" with {best.settings}" if best.settings else ""
    return metric_title(names[0]).partition(",")[0] + said, number(best.values[names[0]])


def _distances(evaluated: Evaluated) -> list[str]:
    return [name for kind in ("fid", "frechet") for name in evaluated.values if name.startswith(kind)]


def quality(content: Content) -> dict[str, Any]:
    """A table of evaluations, a row for each, and a curve for each metric that was taken at several steps."""
    evaluations, names = content.evaluations, metric_names([content])
    rows = []
    for one in evaluations:
        real = f" against {count(one.real_images)} real ones" if one.real_images else ""
        settings = f", {one.settings}" if one.settings else ""
        what = f"{images(one.kimg)}, {count(one.images)} images{real}{settings}"
        rows.append((what, *(six(one.values[name]) if name in one.values else "" for name in names)))
    floor = next((one.floor for one in reversed(evaluations) if one.floor), {})
    if floor:
        rows.append(("real images against real ones", *(six(floor[name]) if name in floor else "" for name in names)))
    notes = list(dict.fromkeys(note for one in evaluations for note in one.notes))[:10]
    left_out = len(_all_names([content])) - len(names)
    if left_out:
        notes.append(f"{left_out} more metrics are left out.")
    curves = [_curve(content, name) for name in names]
    return {
        "head": ("Measured after", *(metric_title(name) for name in names)),
        "rows": rows,
        "notes": notes,
        "charts": [one for one in curves if one is not None],
    }


def _curve(content: Content, name: str) -> Any:
    found = groups(content, name)
    several = [group for group in found.values() if len(group) > 1][:_MOST_LINES]
    lines = [
        Line(label=group[0].conditions, points=[(one.kimg, one.values[name]) for one in group], colour=n)
        for n, group in enumerate(several)
    ]
    alone = f" ({several[0][0].conditions})" if len(several) == 1 < len(found) else ""
    return chart(metric_title(name) + alone, "kimg", "", lines, smooth=False)


def _all_names(contents: Sequence[Content]) -> list[str]:
    return list(dict.fromkeys(name for one in contents for evaluated in one.evaluations for name in evaluated.values))
