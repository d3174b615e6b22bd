"""The plan's picture, pixel by pixel where it matters: the budget's row, the areas' heights, nothing half written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_plans import GIB, a_phase, a_plan
from PIL import Image

from lowvram.planner import picture
from lowvram.planner.log import CATEGORIES
from lowvram.planner.plan import Plan, Timeline

LEFT, TOP, RIGHT, BOTTOM = picture.PLOT
SHARES = {"weights": 1.0, "gradients": 0.5, "optimizer": 0.75, "average": 0.25, "activations": 1.5, "temporary": 0.5}


def make_plan(**changes: Any) -> Plan:
    """Two phases; the second has 4.5 GiB alive all through, the first half of that."""
    high = np.array([SHARES[name] * GIB for name in CATEGORIES], np.int64)
    phases = (
        a_phase(
            name,
            int(part * 4.5 * GIB),
            reserved_bytes=5 * GIB,
            by_category={category: int(part * share * GIB) for category, share in SHARES.items()},
        )
        for name, part in (("G", 0.5), ("D", 1.0))
    )
    whole = a_plan(
        *phases,
        live_bytes=int(4.5 * GIB),
        reserved_bytes=5 * GIB,
        context_bytes=GIB // 2,
        margin_bytes=GIB // 16,
        smallest_card=None,
        timeline=Timeline(
            marks=(("G", 0, 100), ("D", 100, 200)),
            bytes=np.concatenate([np.tile(high[:, None] // 2, 100), np.tile(high[:, None], 100)], axis=1),
            reserved=np.full(200, 5 * GIB),
        ),
    )
    return replace(whole, **changes)


def drawn(plan: Plan, folder: Path) -> np.ndarray:
    picture.draw(plan, folder / "plan.png")
    with Image.open(folder / "plan.png") as image:
        assert (image.format, image.size, image.mode) == ("PNG", picture.SIZE, "RGB")
        return np.asarray(image)


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == colour).all(axis=-1)


def budget_rows(pixels: np.ndarray) -> list[int]:
    """Rows in which the budget's colour runs across the plot."""
    across = is_colour(pixels[:, LEFT:RIGHT], picture.BUDGET).mean(axis=1)
    return [int(n) for n in np.flatnonzero(across > 0.5)]


def row_of(size_bytes: float, top_bytes: int) -> float:
    return BOTTOM - (BOTTOM - TOP) * size_bytes / top_bytes


@pytest.mark.parametrize("vram_gib", [6, 8, 12])
def test_the_budget_lies_at_its_row_and_is_dashed(tmp_path: Path, vram_gib: int) -> None:
    plan = make_plan(vram_bytes=vram_gib * GIB)
    pixels = drawn(plan, tmp_path)
    assert plan.timeline is not None
    axis = picture.Axis.of(plan, plan.timeline)
    assert vram_gib * GIB < axis.top_bytes < 1.3 * vram_gib * GIB
    rows = budget_rows(pixels)
    assert len(rows) == 3 and abs(rows[1] - row_of(vram_gib * GIB, axis.top_bytes)) <= 1
    line = is_colour(pixels[rows[1], LEFT:RIGHT], picture.BUDGET)
    assert 20 < np.count_nonzero(line[1:] & ~line[:-1]) < 100  # the dashes' beginnings
    limit = round(row_of((vram_gib - 0.625) * GIB, axis.top_bytes))
    assert 0.3 < is_colour(pixels[limit - 1 : limit + 2, LEFT:RIGHT], picture.LIMIT).any(axis=0).mean() < 0.7


def test_areas_are_stacked_to_scale(tmp_path: Path) -> None:
    plan = make_plan()
    pixels = drawn(plan, tmp_path)
    assert plan.timeline is not None
    top = picture.Axis.of(plan, plan.timeline).top_bytes
    for part, column in ((0.5, LEFT + (RIGHT - LEFT) // 4), (1.0, LEFT + 3 * (RIGHT - LEFT) // 4)):
        below = 0.0
        for name in CATEGORIES:
            rows = np.flatnonzero(is_colour(pixels[TOP:BOTTOM, column], picture.COLOURS[name])) + TOP
            low, high = row_of(below * GIB, top), row_of((below + part * SHARES[name]) * GIB, top)
            assert abs(rows.max() - low) <= 2 and abs(rows.min() - high) <= 2, name
            assert len(rows) >= low - high - 3, name
            below += part * SHARES[name]
    reserved = np.flatnonzero(is_colour(pixels[TOP:BOTTOM, LEFT + 50], picture.RESERVED)) + TOP
    assert len(reserved) >= 1 and abs(reserved.mean() - row_of(5 * GIB, top)) <= 1.5


def test_phases_are_marked_where_they_begin(tmp_path: Path) -> None:
    pixels = drawn(make_plan(), tmp_path).astype(int)
    middle = (LEFT + RIGHT) // 2
    strip = pixels[TOP - 6 : TOP, LEFT + 10 : RIGHT - 10].sum(axis=2).max(axis=0)
    assert [n + LEFT + 10 for n in np.flatnonzero(strip < 400)] == [middle]
    names = pixels[TOP - 32 : TOP - 8, LEFT:RIGHT].sum(axis=2).min(axis=0) < 300
    for begin, end in ((LEFT, middle), (middle, RIGHT)):
        inked = np.flatnonzero(names[begin - LEFT : end - LEFT])
        assert len(inked) and abs(inked.mean() - (end - begin) / 2) < 12


def test_without_a_budget_or_far_below_it(tmp_path: Path) -> None:
    assert budget_rows(drawn(make_plan(vram_bytes=None), tmp_path)) == []
    plan = make_plan(vram_bytes=80 * GIB)
    assert plan.timeline is not None
    assert picture.Axis.of(plan, plan.timeline).top_bytes < 6 * GIB  # not flattened
    pixels = drawn(plan, tmp_path)
    assert budget_rows(pixels) == []
    assert is_colour(pixels[:TOP, RIGHT:], picture.BUDGET).sum() > 20  # but named


def test_without_a_timeline_the_phases_stand_for_it(tmp_path: Path) -> None:
    assert (drawn(make_plan(timeline=None), tmp_path) == drawn(make_plan(), tmp_path))[TOP:BOTTOM].mean() > 0.999


def test_a_plan_that_does_not_fit_rises_over_its_budget(tmp_path: Path) -> None:
    pixels = drawn(make_plan(vram_bytes=3 * GIB, fits=False), tmp_path)
    (row, *_) = budget_rows(pixels)
    assert is_colour(pixels[TOP:row, LEFT:RIGHT], picture.COLOURS["activations"]).sum() > 1000
    assert is_colour(pixels[:70], picture.BUDGET).sum() > 100  # its title


def test_awkward_plans_are_drawn(tmp_path: Path) -> None:
    empty = Timeline(marks=(), bytes=np.zeros((len(CATEGORIES), 0), np.int64))
    nothing = make_plan(timeline=empty, phases=(), live_bytes=0, reserved_bytes=0, device_bytes=9 * GIB // 16)
    drawn(nothing, tmp_path)
    many = tuple((f"phase_{n}\n\x1bé" * 9, n, n + 1) for n in range(200))
    timeline = make_plan().timeline
    assert timeline is not None
    drawn(make_plan(recipe="ü" * 300, timeline=replace(timeline, marks=many, reserved=None)), tmp_path)


def test_labels_stay_apart() -> None:
    middles = picture._apart([10, 12, 14, 99], [20, 20, 20, 20], 0, 100)
    assert middles == [10, 30, 50, 90]
    assert picture._apart([95, 96], [30, 30], 0, 100) == [55, 85]
    assert picture._apart([50, 50, 50], [40, 40, 40], 0, 100) == [20, 60, None]


def test_a_failed_picture_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        picture.draw(make_plan(), tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []
