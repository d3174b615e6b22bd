"""A run folder that somebody else made: nothing in it is obeyed, and nothing in it is too large."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_runs import Page, metrics_line, run_folder, session, write_evaluation, write_grid

from lowvram import pages
from lowvram.errors import LowVRAMError
from lowvram.pages import folder as folders
from lowvram.pages import metrics
from lowvram.receipt.ledger import Receipt


def page_of(folder: Path) -> Page:
    return Page(pages.write(folder))


EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(1)">\x00\ud800'


def test_nothing_in_a_folder_becomes_markup(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run <b onclick=x>")
    clean = EVIL.replace("\x00", "").replace("\ud800", "")
    recipe = {"recipe": clean, "task": clean, "resolution": clean, "kimg": clean, clean: {clean: [clean, {"a": clean}]}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    evil = {
        **metrics_line(1),
        f"loss/{EVIL}": 1.5,
        f"seconds/{EVIL}": 2,
        f"peak_allocated_bytes/{EVIL}": 3,
        "currency": EVIL,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(evil))
    Receipt((session(1, 0, 16, contributor=clean, machine=clean, energy_by=clean, currency=clean),)).write(folder)
    (folder / "about.json").write_text(json.dumps([{"python": EVIL, "data": EVIL, "images": 3, "device": EVIL}]))
    named: dict[str, Any] = {clean: 1.0}
    write_evaluation(folder, 1, **named)
    (folder / "checkpoints" / "step-00001000" / "state.json").write_text(json.dumps({"dataset": {"name": EVIL}}))
    (folder / "<script>alert(2)<").write_text("")
    page = page_of(folder)
    assert len(page.all("script")) == 1 and "alert" not in page.all("script")[0].text
    assert not [element for element in page.tree.iter() for name in element.attrib if name.startswith("on")]
    assert len(page.all("img")) == 4 and "alert(1)" in page.text()


@pytest.mark.parametrize(
    "text",
    [
        "recipe: &a [*a]",
        "a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]",
        "recipe: !!python/object/apply:os.system [touch evil]",
        "recipe: ${oc.env:HOME}",
        "- a\n- b",
        "a: 1\n b: 2",
        "[" * 5000,
        "recipe: " + "9" * 100_000,
        "recipe: 2001-02-30",
        "a: !!bool maybe",
        "a: !!int ''",
        "a: !!float ''",
        "a: !!timestamp x",
        "\x00",
        "x: " + "y" * 2**18,
        "",
    ],
    ids=range(16),
)
def test_a_hostile_recipe_is_said_and_not_obeyed(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder(tmp_path / "run")
    (folder / "recipe.yaml").write_text(text)
    page = page_of(folder)
    assert len(page.source) < 2**20
    assert not Path("evil").exists()
    if "HOME" in text:
        assert "${oc.env:HOME}" in page.text() and os.environ["HOME"] not in page.text()
    else:
        assert "recipe.yaml can't be read" in page.text()
    assert "Loss of G" in page.charts()


def test_broken_lines_and_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    good = [metrics_line(step) for step in (10, 20, 30)]
    lines = [
        json.dumps(good[0]),
        json.dumps({**good[1], "loss/G": float("nan"), "loss/D": float("inf")}),
        '{"step": 5, "kimg": ' + "9" * 5000 + "}",
        '{"step": -1, "kimg": 1}',
        '{"step": 6, "kimg": 1e308, "loss/G": 1}',
        "[1, 2]",
        "[" * 50_000,
        json.dumps(good[2]),
        json.dumps(metrics_line(40))[:60],
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(folder)
    assert [row[0] for row in page.charts()["Loss of D"]] == ["0.16", "0.48"]
    assert "3 values in metrics.jsonl are NaN, infinite or beyond 1e30" in page.text()
    assert "6 lines of metrics.jsonl could not be read" in page.text()


def test_a_step_that_was_taken_again_counts_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = [metrics_line(10), metrics_line(20), {**metrics_line(10), "loss/G": 7.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row.get("loss/G") for row in metrics.read(folder).rows] == [7.0, lines[1]["loss/G"]]


def test_of_a_huge_file_some_exact_lines_stand_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", lines=5000, every=1)
    monkeypatch.setattr(metrics, "_LINES", 100)
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.seek(0, os.SEEK_END)
        written = (folder / "metrics.jsonl").read_text().splitlines()
        file.truncate(5 * 2**30)  # and 5 GB of nothing
    found = metrics.read(folder)
    assert not found.every_line
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.truncate(len("\n".join(written)) + 1)
    monkeypatch.setattr(metrics, "_WHOLE_BYTES", 10_000)
    found = metrics.read(folder)
    assert not found.every_line and 100 <= len(found.rows) < 1000
    assert all(json.dumps(row) in (json.dumps(json.loads(written[int(row["step"]) - 1])),) for row in found.rows)
    assert (found.rows[0]["step"], found.rows[-1]["step"]) == (1, 5000)
    assert "lines at even distances stand for the rest" in page_of(folder).text()


def test_pictures_that_are_none_are_named_and_links_are_not_followed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    write_grid(tmp_path / "private.png")
    (folder / "reals.png").unlink()
    (folder / "reals.png").symlink_to(tmp_path / "private.png")
    (folder / "fakes_000016.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (folder / "fakes_000008.png").write_bytes((folder / "fakes_000008.png").read_bytes()[:2000])
    (folder / "fakes_000004.png").symlink_to(tmp_path / "private.png")
    (folder / "recipe.txt").symlink_to("/etc/passwd")
    page = page_of(folder)
    assert len(page.all("img")) == 1
    assert "fakes_000016.png is no picture" in page.text() and "fakes_000008.png is no picture" in page.text()


def test_a_recipe_that_is_a_link_is_none(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "recipe.yaml").rename(tmp_path / "private.yaml")
    (folder / "recipe.yaml").symlink_to(tmp_path / "private.yaml")
    with pytest.raises(LowVRAMError, match=r"its recipe\.yaml is a link"):
        pages.write(folder)


def test_checkpoints_that_are_links_are_not_followed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "checkpoints" / "step-00001000").rename(tmp_path / "private")
    (folder / "checkpoints" / "step-00001000").symlink_to(tmp_path / "private")
    assert folders.read(folder).checkpoints == [] and folders.read(folder).data == ""


@pytest.mark.parametrize(("name", "said"), [
    ("", "run can't be read"), ("metrics", "The folder metrics can't be looked at"),
    ("checkpoints", "The checkpoints can't be looked at"),
])  # fmt: skip
def test_what_may_not_be_read_is_said(tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run")
    write_evaluation(folder, 10, fid=5.0)
    scandir = os.scandir

    def refused(path: Path) -> Iterator[os.DirEntry[str]]:  # as for a user that is not root
        if Path(path) == folder / name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    if name:
        assert f"{said}: Permission denied" in page_of(folder).text()
    else:
        with pytest.raises(LowVRAMError, match=said):
            pages.write(folder)


def test_many_metrics_are_so_many_columns_and_no_more(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for step in range(1, 9):
        values: dict[str, Any] = {f"metric{step}_{n}": 1.0 for n in range(40)}
        write_evaluation(folder, step, **values)
    page = page_of(folder)
    assert max(len(list(row)) for row in page.all("tr")) <= 17
    assert "304 more metrics are left out" in page.text()


def test_an_image_bomb_is_not_unpacked(tmp_path: Path) -> None:
    from PIL import Image

    folder = run_folder(tmp_path / "run")
    Image.new("1", (12_000, 12_000)).save(folder / "fakes_000012.png")  # 144 million pixels in a few KB
    assert (folder / "fakes_000012.png").stat().st_size < 100_000
    assert "fakes_000012.png has" in page_of(folder).text()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_does_not_hold_it_up(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for name in ("metrics.jsonl", "receipt.json", "fakes_000000.png", "reals.png"):
        (folder / name).unlink()
    for name in ("metrics.jsonl", "receipt.json", "fakes_000000.png", "reals.png", "plan.json", "about.json"):
        os.mkfifo(folder / name)
    assert "metrics.jsonl is not there" in page_of(folder).text()


def test_broken_json_beside_it_is_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    write_evaluation(folder, 10, fid=5.0)
    for name in ("receipt.json", "plan.json", "about.json", "metrics/evaluation-00000010-n64-seed0-truncation1.json"):
        (folder / name).write_text("[[[[")
    text = page_of(folder).text()
    assert "receipt.json can't be read" in text and "plan" in text and "evaluation-00000010" in text
