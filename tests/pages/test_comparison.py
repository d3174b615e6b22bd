"""Runs side by side."""

import json
import time
from pathlib import Path

import pytest
from example_runs import Page, metrics_line, run_folder, session, write_evaluation, write_grid

from lowvram import pages
from lowvram.errors import LowVRAMError
from lowvram.pages import metrics
from lowvram.receipt.ledger import Receipt
from lowvram.receipt.rates import energy


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return run_folder(tmp_path / "a"), run_folder(tmp_path / "b", "optimizer.lr=0.001", "batch=32")


def test_it_says_what_differed_and_no_more(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = Page(pages.compare(two, tmp_path / "compare.html"))
    rows = [[page.text(cell) for cell in row] for row in page.all("tr")]
    assert ["batch", "16", "32"] in rows and any(row[0] == "optimizer.lr" and row[2] == "0.001" for row in rows)
    assert not any(row[0] in ("seed", "out", "kimg") for row in rows)
    assert "data-said" not in page.source and len(page.all("img")) == 6


def test_curves_go_over_images_hours_and_energy(two: tuple[Path, Path], tmp_path: Path) -> None:
    write_evaluation(two[1], 500, fid=12.5)
    page = Page(pages.compare(two, tmp_path / "compare.html"))
    last = metrics_line(1000)
    tables = {}
    for group in page.all("div"):
        if (group.get("class") or "").startswith("over "):
            inner = [figure for figure in group.iter() if figure.get("class") == "chart"]
            tables[group.get("class")] = {page.text(f).split(" a b ")[0]: page.text(f) for f in inner}
    assert list(tables) == ["over over-images", "over over-hours", "over over-energy"]
    ends = (last["kimg"], last["seconds"] / 3600, last["kwh"])
    for table, end in zip(tables.values(), ends, strict=True):
        assert f"a {json.dumps(end)} {json.dumps(last['loss/G'])}" in table["Loss of G"]
    # 500 steps of 32 images are 16 kimg, which the other batch's line of 1000 steps has
    for table, end in zip(tables.values(), ends, strict=True):
        (fid,) = [text for title, text in table.items() if "FID" in title]
        assert fid.endswith(f"{json.dumps(end)} 12.5")


def test_points_that_no_line_places_are_left_out() -> None:
    rows: list[metrics.Row] = [
        {"step": n, "kimg": float(n), **({"kwh": n / 10} if n >= 4 else {})} for n in range(1, 11)
    ]
    found = metrics.Metrics(rows=tuple(rows))
    points = [(x, x) for x in (0.0, 2.0, 3.99, 4.0, 5.5, 10.0, 11.0)]
    assert found.moved(points, "kwh") == [(0.4, 4.0), (pytest.approx(0.55), 5.5), (1.0, 10.0)]
    assert found.moved(points, "seconds") == []


def test_a_long_run_whose_first_lines_know_no_energy_takes_no_longer() -> None:
    rows: list[metrics.Row] = [
        {"step": n, "kimg": n / 7, "loss/G": 1.0, **({"kwh": n / 9} if n > 10_000 else {})} for n in range(20_000)
    ]
    found = metrics.Metrics(rows=tuple(rows))
    points = [(x + 0.01, y) for x, y in found.series("loss/G")]
    begun = time.process_time()
    assert len(found.moved(points, "kwh")) == 9_998
    assert time.process_time() - begun < 2


def test_runs_that_were_measured_differently_say_so(two: tuple[Path, Path], tmp_path: Path) -> None:
    write_evaluation(two[0], 500, fid=20.0, n=1000)
    write_evaluation(two[1], 500, fid=12.5, n=5000)
    page = Page(pages.compare(two, tmp_path / "c.html"))
    rows = [[page.text(cell) for cell in row] for row in page.all("tr")]
    assert ["FID", "20 (after 8 kimg, 1,000 images)", "12.5 (after 16 kimg, 5,000 images)"] in rows
    assert "b (5,000 images)" in page.text()
    write_evaluation(two[1], 400, fid=99.0, n=1000)  # now both were measured so, and are compared by that
    page = Page(pages.compare(two, tmp_path / "c.html"))
    rows = [[page.text(cell) for cell in row] for row in page.all("tr")]
    assert ["FID", "20 (after 8 kimg)", "99 (after 12.8 kimg)"] in rows


def test_runs_of_different_tasks_and_ages_compare(tmp_path: Path) -> None:
    from lowvram.config import load_recipe
    from lowvram.run import Run

    first = run_folder(tmp_path / "a")
    second = tmp_path / "old"
    Run(second, load_recipe("faces64_ldm"), is_new=True).prepare()
    (second / "metrics.jsonl").write_text(json.dumps({"step": 1, "kimg": 8.0, "s_per_kimg": 3.0, "loss/denoiser": 0.5}))
    write_grid(second / "fakes_000008.png")
    page = Page(pages.compare([first, second], tmp_path / "compare.html"))
    text = page.text()
    assert "Not recorded for old" in text and "old: There is no receipt.json" in text
    assert "task stylegan2 diffusion" in text and "Loss of denoiser" in text
    assert "a, 8 kimg" in text and "old, 8 kimg" in text


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / where / "run") for where in ("x", "y")]
    assert "x/run, y/run" in Page(pages.compare(folders, tmp_path / "c.html")).text()


def test_costs_that_do_not_reach_back_to_the_begin_say_so(two: tuple[Path, Path], tmp_path: Path) -> None:
    late = Receipt((session(2, 8000, 16000),))
    late.write(two[1])
    text = Page(pages.compare(two, tmp_path / "c.html")).text()
    kwh = energy(late.totals().kwh)
    assert f"Energy {energy(2 * late.totals().kwh)} {kwh} (since 8 kimg)" in text
    assert f"Energy since 8 kimg {kwh}" in Page(pages.write(two[1])).text()


@pytest.mark.parametrize(("names", "said"), [
    (["a"], "1 runs can't be compared"), (["a", "a"], "named twice"), (["a", "../t/a"], "named twice"),
    (["a", "nothing"], "not there"), (["a"] * 7, "7 runs"),
])  # fmt: skip
def test_what_cannot_be_compared(tmp_path: Path, names: list[str], said: str) -> None:
    (tmp_path / "t").mkdir()
    run_folder(tmp_path / "t" / "a")
    with pytest.raises(LowVRAMError, match=said):
        pages.compare([tmp_path / "t" / name for name in names], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()
