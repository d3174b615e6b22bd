"""Curves: what is drawn lies where the numbers say, whatever the numbers are."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.pages.charts import Axis, Level, Line, chart, means, thinned
from lowvram.pages.words import gigabytes, number

values = st.floats(-1e30, 1e30, allow_nan=False)
points = st.lists(st.tuples(st.floats(0, 1e9), values), min_size=1, max_size=60).map(sorted)


@given(points)
def test_whatever_the_numbers_are_the_paths_are_bounded(line: list[tuple[float, float]]) -> None:
    made = chart("Loss", "kimg", "loss", [Line(label="a", points=line)])
    assert made is not None
    for drawn in made.drawn:
        for place in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?", drawn.path.replace("h0", "")):
            assert "e" not in place and -2000 <= float(place) <= 3000
    assert all(-0.01 <= at <= 100.01 for at, _ in (*made.x_ticks, *made.y_ticks))
    assert 1 <= len(made.y_ticks) <= 20


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-305, -1e-320])
def test_numbers_too_small_for_a_tick_are_drawn(tiny: float) -> None:
    for line in ([(0.0, 0.0), (1.0, tiny)], [(0.0, 1.0), (tiny, 2.0)], [(0.0, tiny), (1.0, 2 * tiny)]):
        made = chart("Loss", "kimg", "loss", [Line(label="a", points=sorted(line))])
        assert made is not None and 1 <= len(made.y_ticks) <= 20 and "nan" not in made.drawn[0].path


@given(st.floats(-1e20, 1e20), st.floats(-1e20, 1e20))
def test_an_axis_holds_both_ends(one: float, other: float) -> None:
    axis = Axis.of(min(one, other), max(one, other))
    assert axis.low <= min(one, other) <= max(one, other) <= axis.high
    assert axis.high > axis.low


def test_a_point_is_drawn_where_it_is() -> None:
    made = chart("Loss", "kimg", "loss", [Line(label="a", points=[(0, 0), (5, 10), (10, 20)])], smooth=False)
    assert made is not None
    line, dots = made.drawn
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+) ", line.path)]
    ys = [float(y) for y in re.findall(r" ([\d.]+)", line.path)]
    assert xs == [0, 500, 1000]
    ticks = {label: at for at, label in made.y_ticks}
    assert ys[1] / 10 == round(ticks["10"], 2) and ys[2] / 10 == round(ticks["20"], 2)
    assert dots.kind == "dots" and dots.path.count("M") == 3


def test_a_few_wild_steps_do_not_flatten_the_rest_and_are_said() -> None:
    calm = [(float(n), 1 + 0.1 * (n % 7)) for n in range(200)]
    made = chart("Loss", "kimg", "loss", [Line(label="a", points=[(0.0, 1e6), *calm[1:]])])
    assert made is not None and made.note.startswith("1 of the measured values")
    assert float(made.y_ticks[-1][1]) < 5
    assert ("0.0", "1000000.0") in made.rows  # and the table has them


def test_thinning_keeps_peaks_and_means_keep_their_place() -> None:
    line = [(float(n), 0.0) for n in range(10_000)]
    line[5_001] = (5001.0, 9.0)
    assert len(thinned(line)) <= 800 and (5001.0, 9.0) in thinned(line)
    straight = [(float(n), 2.0 * n) for n in range(300)]
    assert all(abs(y - 2 * x) < 1e-9 for x, y in means(straight))


def test_a_level_is_on_the_axis() -> None:
    made = chart(
        "Memory", "kimg", "GB", [Line(label="a", points=[(0, 1), (1, 2)])], levels=[Level(label="budget", value=6)]
    )
    assert made is not None and 0 < made.levels[0][0] < 20 and "budget at 6" in made.said


def test_no_points_no_chart() -> None:
    assert chart("Loss", "kimg", "loss", [Line(label="a", points=[])]) is None


def test_numbers_in_words() -> None:
    assert [number(v) for v in (0, 0.00123, 12.34, 1234.5, -5)] == ["0", "0.00123", "12.3", "1,230", "-5"]
    assert [gigabytes(v) for v in (6 * 2**30, 150 * 2**20, 10)] == ["6.00 GB", "0.15 GB", "10 bytes"]
