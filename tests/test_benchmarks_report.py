"""Tables, pictures and comparisons of benchmark points, and the workflows that make them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import ROOT, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import compare, points, record, report, scatter

GIB = 2**30
CARD = {"device": "RTX 3060", "memory_bytes": 12 * GIB, "capability": "8.6"}
Write = Callable[..., Path]


def a_point(vram: str = "6GB", **changes: Any) -> dict[str, Any]:
    """A step of faces256 in 5, 6 and 7 GiB, at 10 images a second, the quartiles 4% about the median of 2 s."""
    usual: dict[str, Any] = {
        "recipe": "faces256",
        "overrides": ["batch=20", f"vram={vram}"],
        "seconds": {"G": record.spread([0.8]), "D": record.spread([1.2])},
        "seconds_per_step": {"median": 2.0, "min": 1.9, "max": 2.1, "iqr": 0.08, "n": 9},
        "images_per_second": 10.0,
        "allocated_bytes": 5 * GIB,
        "reserved_bytes": 6 * GIB,
        "device_bytes": 7 * GIB,
    }
    return record.point(changes.pop("benchmark", "train_step"), changes.pop("name", "step"), **(usual | changes))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("name.json", point, ...): a file of points measured on a card."""

    def make(name: str, *found: dict[str, Any], date: str = "2026-01-01", hardware: Any = CARD) -> Path:
        path = tmp_path / name
        environment = {"date": date, "hardware": hardware, "versions": {"torch": "2.12.0"}, "commit": "abc"}
        record.write(path, found, device="cpu")
        content = json.loads(path.read_text()) | {"environment": environment}
        path.write_text(json.dumps(content))
        return path

    return make


def rows_of(markdown: str) -> list[dict[str, str]]:
    """The table's rows by header, emphasis left in."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(len(row) == len(cells[0]) for row in cells)
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """called(main, words...): a command's exit code and all that it printed; in this process, for torch is slow."""

    def call(main: Callable[[], None], *words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        code: Any = 0
        try:
            main()
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        return code, out + err

    return call


def comparison(old: Path, new: Path, **options: Any) -> compare.Comparison:
    return compare.compare(points.load([old]), points.load([new]), **options)


def verdicts(found: compare.Comparison) -> dict[str, str]:
    (changes,) = found.changes.values()
    return {change.what: change.verdict for change in changes}


# Reading.


def test_other_json_is_named_and_skipped_and_hidden_folders_are_not_searched(write: Write, tmp_path: Path) -> None:
    write("good.json", a_point())
    write("deeper/other.json", a_point("8GB"))
    write(".sweep/log.json", a_point("4GB"))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    said: list[str] = []
    found = points.load([tmp_path], say=said.append)
    assert sorted(m.point["overrides"][1] for m in found) == ["vram=6GB", "vram=8GB"]
    assert len(said) == 3
    assert all(any(name in line for line in said) for name in ("list.json", "broken.json", "binary.json"))


def test_the_last_of_several_measurements_counts_whatever_the_file_is_called(write: Write, tmp_path: Path) -> None:
    write("a.json", a_point(images_per_second=12.0), date="2026-03-01")
    write("b.json", a_point(images_per_second=11.0, overrides=["vram=6GB", "batch=20"]), date="2026-02-01")
    write("c.json", a_point(images_per_second=99.0), hardware=CARD | {"device": "RTX 4090"})
    said: list[str] = []
    found = points.load([tmp_path, tmp_path / "a.json"], say=said.append)
    assert {(m.hardware, m.images_per_second) for m in found} == {("RTX 3060, 12GB", 12.0), ("RTX 4090, 12GB", 99.0)}
    assert said == ["left out: 1 older measurement of the same points"]


def test_what_is_no_number_counts_as_not_measured(write: Write) -> None:
    odd = a_point(images_per_second=float("nan"), allocated_bytes=True, seconds={"G": None}, seconds_per_step={})
    (found,) = points.load([write("odd.json", odd)])
    assert (found.images_per_second, found.memory_bytes("allocated"), found.step, found.times()) == (
        None,
        None,
        None,
        {},
    )
    assert found.noise == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.00123456, "0.00123"), (9.999, "10.0"), (99.96, "100"), (1234.5, "1234"), (0, "0"), (-0.5, "-0.500")],
)
def test_three_figures(value: float, said: str) -> None:
    assert points.figures(value) == said


def test_times_and_sizes_have_their_units() -> None:
    assert [points.seconds(t) for t in (12.3, 0.0456, 7.89e-4, 2e-6)] == ["12.3 s", "45.6 ms", "789 us", "2.00 us"]
    assert [points.size(b) for b in (512, 3 * 2**20, int(5.5 * GIB))] == ["512 bytes", "3.00MB", "5.5GB"]


# The table.


def test_a_row_tells_all_that_was_measured(write: Write) -> None:
    point = a_point(energy_joules_per_image=4.2, details={"goals": [{"what": "copy", "found": 0.5, "reached": False}]})
    (row,) = rows_of(report.report(points.load([write("one.json", point)])))
    assert row == {
        "benchmark": "train_step",
        "name": "step",
        "recipe": "faces256",
        "settings": "`batch=20` `vram=6GB`",
        "images/s": "**10.0**",
        "step": "2.00 s",
        "+-": "2.0%",
        "times": "G 800 ms, D 1.20 s",
        "device": "**7GB**",
        "reserved": "**6GB**",
        "allocated": "**5GB**",
        "J/image": "4.20",
        "details": "copy 0.500, MISSED",
    }


def test_rows_are_in_natural_order_and_failures_say_why_in_their_cell(write: Write) -> None:
    failed = a_point("4GB", error="does not fit | it needs\n5GB, <all> of it")
    text = report.report(points.load([write("all.json", a_point("10GB"), a_point("6GB"), failed)]))
    rows = rows_of(text)
    assert [row["settings"] for row in rows] == ["`vram=4GB`", "`vram=6GB`", "`vram=10GB`"]  # what differs
    assert "All with `batch=20`" in text and "3 points, 1 failed" in text
    assert rows[0]["failed"] == "does not fit \\| it needs 5GB, &lt;all> of it"
    assert not rows[0]["images/s"] and not rows[0]["device"]
    assert "RTX 3060, 12GB, commit abc, torch 2.12.0: 3 points (2026-01-01)" in text


def test_the_frontier_is_bold_for_each_recipe_and_hardware_alone(write: Write, tmp_path: Path) -> None:
    slower = a_point("8GB", images_per_second=9.0, device_bytes=8 * GIB)
    write("a.json", a_point(), slower, a_point(recipe="faces64", images_per_second=1.0))
    write("b.json", slower, hardware=CARD | {"device": "RTX 2060"})
    rows = rows_of(report.report(points.load([tmp_path])))
    bold = {(row["recipe"], row["hardware"], row["images/s"]) for row in rows if row["images/s"].startswith("**")}
    assert bold == {
        ("faces256", "RTX 3060, 12GB", "**10.0**"),
        ("faces64", "RTX 3060, 12GB", "**1.00**"),
        ("faces256", "RTX 2060, 12GB", "**9.00**"),
    }
    assert len(rows) == 4


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_frontier_is_what_nothing_is_better_than(costs_and_gains: list[tuple[int, int]]) -> None:
    def beaten(one: tuple[int, int]) -> bool:
        return any(o[0] <= one[0] and o[1] >= one[1] and o != one for o in costs_and_gains)

    expected = {n for n, one in enumerate(costs_and_gains) if not beaten(one)}
    assert scatter.frontier([(float(a), float(b)) for a, b in costs_and_gains]) == expected


# The pictures.


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == colour).all(axis=-1)


def test_points_lie_where_their_memory_and_speed_say(write: Write, tmp_path: Path) -> None:
    better = a_point("4GB", device_bytes=4 * GIB, images_per_second=5.0)
    beaten = a_point("8GB", device_bytes=8 * GIB, images_per_second=2.5)
    (path,) = report.pictures(points.load([write("all.json", better, a_point(), beaten)]), tmp_path)
    assert path.name == "train-step-faces256.png"
    with Image.open(path) as image:
        assert (image.format, image.size, image.mode) == ("PNG", scatter.SIZE, "RGB")
        pixels = np.asarray(image)
    x = scatter.Axis.of([4.0, 7.0, 8.0], scatter.PLOT[0], scatter.PLOT[2])
    y = scatter.Axis.of([2.45, 5 / 1.02, 10 / 0.98], scatter.PLOT[3], scatter.PLOT[1])
    for memory, speed, filled in ((4, 5, True), (7, 10, True), (8, 2.5, False)):
        column, row = round(x.at(memory)), round(y.at(speed))
        about = is_colour(pixels[row - 7 : row + 8, column - 7 : column + 8], scatter.POINT).mean()
        assert (about > 0.55) if filled else (0.1 < about < 0.5)
        assert is_colour(pixels[row, column], scatter.POINT) == filled
    between = round((y.at(5) + y.at(10)) / 2)  # the frontier rises at 7 GB, and nowhere else at that height
    (columns,) = np.nonzero(is_colour(pixels[between], scatter.FRONTIER))
    assert abs(columns - x.at(7)).max() <= 2


def test_a_recipe_has_a_picture_on_each_hardware_and_failures_have_none(write: Write, tmp_path: Path) -> None:
    write("a.json", a_point(), a_point(recipe="lost", error="no"), a_point(recipe="unknown", images_per_second=None))
    write("b.json", a_point(), hardware=CARD | {"device": "RTX 2060"})
    drawn = report.pictures(points.load([tmp_path]), tmp_path)
    assert {path.name for path in drawn} == {
        "train-step-faces256-rtx-3060-12gb.png",
        "train-step-faces256-rtx-2060-12gb.png",
    }


def test_peaks_of_one_kind_are_compared(write: Write) -> None:
    on_cpu = a_point("8GB", device_bytes=None, reserved_bytes=None)
    group = points.load([write("a.json", a_point(), on_cpu)])
    assert report.comparable(group) == (group, "allocated")
    group = points.load([write("b.json", a_point(), a_point("9GB"), on_cpu)])
    assert report.comparable(group)[1] == "allocated"  # all have it
    group = points.load([write("c.json", a_point(), a_point("9GB", allocated_bytes=None), on_cpu)])
    chosen, kind = report.comparable(group)
    assert kind == "device" and on_cpu["overrides"] not in [m.point["overrides"] for m in chosen]


@pytest.mark.parametrize("values", [[5.0], [0.001, 0.002], [1e6, 1.0], [7.0, 7.1], [3.0, 3.0]])
def test_an_axis_holds_its_values_with_readable_ticks(values: list[float]) -> None:
    axis = scatter.Axis.of(values, 0, 1000)
    assert all(0 <= axis.at(value) < 1000 for value in values) and axis.first >= 0
    assert 2 <= len(axis.ticks()) <= 14 and axis.ticks()[-1] == pytest.approx(axis.last)


# The comparison.


@pytest.mark.parametrize(
    ("changes", "what", "verdict"),
    [
        ({"allocated_bytes": round(5.16 * GIB)}, "allocated memory", "worse"),
        ({"allocated_bytes": round(5.14 * GIB)}, "allocated memory", "same"),
        ({"device_bytes": round(7.22 * GIB)}, "device memory", "worse"),
        ({"reserved_bytes": 5 * GIB}, "reserved memory", "better"),
        # 0.9 * 0.98 / 1.02 of 10 images/s is the least that passes
        ({"images_per_second": 8.66}, "speed", "same"),
        ({"images_per_second": 8.63}, "speed", "worse"),
        ({"images_per_second": 12.0}, "speed", "better"),
    ],
)
def test_figures_pass_within_their_limits(write: Write, changes: dict[str, Any], what: str, verdict: str) -> None:
    found = comparison(write("old.json", a_point()), write("new.json", a_point(**changes)))
    assert verdicts(found).pop(what) == verdict
    assert found.passes == (verdict != "worse")


def test_the_spread_of_both_measurements_excuses_a_slower_one(write: Write) -> None:
    old, quiet = write("old.json", a_point()), {"median": 2.5, "iqr": 0.0}
    assert not comparison(old, write("new.json", a_point(images_per_second=8, seconds_per_step=quiet))).passes
    noisy = quiet | {"iqr": 0.5}  # its faster quartile, 2.25 s, is within 10% of 2.04 s
    assert comparison(old, write("new.json", a_point(images_per_second=8, seconds_per_step=noisy))).passes
    single = {"seconds_per_step": None, "images_per_second": 8.99}
    lone = write("lone.json", a_point(seconds_per_step=None))
    assert not comparison(lone, write("new.json", a_point(**single))).passes  # nothing is known of its noise


def test_without_images_whole_steps_count_and_without_those_each_time(write: Write) -> None:
    slower = {"median": 2.4, "iqr": 0.0}
    times = {"forward": record.spread([1.0]), "backward": record.spread([2.0])}
    none = {"images_per_second": None}
    found = comparison(
        write("old.json", a_point(**none)), write("new.json", a_point(**none, seconds_per_step=slower, seconds=times))
    )
    assert verdicts(found)["speed of steps"] == "worse" and "speed of G" not in verdicts(found)
    none |= {"seconds_per_step": None, "name": "swiglu: triton"}
    faster = times | {"forward": record.spread([1.2])}
    found = comparison(
        write("old.json", a_point(**none, seconds=times)), write("new.json", a_point(**none, seconds=faster))
    )
    assert (verdicts(found)["speed of forward"], verdicts(found)["speed of backward"]) == ("worse", "same")


def test_what_is_not_ours_is_shown_and_fails_nothing(write: Write) -> None:
    def both(speed: float, error: str | None = None) -> list[dict[str, Any]]:
        theirs = a_point(name="adamw8bit UNet: bitsandbytes 8-bit", images_per_second=speed)
        return [theirs, a_point(name="adamw8bit UNet: torchao 8-bit", error=error), a_point(name="UNet: ours 8-bit")]

    old, new = write("old.json", *both(10.0)), write("new.json", *both(5.0, error="not installed"))
    found = comparison(old, new)
    assert found.passes and not found.newly_failed
    (row,) = rows_of(compare.markdown(found, points.load([old]), points.load([new])))
    assert (row[""], row["change"]) == ("yardstick", "-50.0%")


def test_failed_missing_and_new_points_are_told_apart(write: Write) -> None:
    failed = {"error": "out of memory"}
    old = write("old.json", a_point("4GB"), a_point("5GB", **failed), a_point("6GB"), a_point("7GB"))
    new = write("new.json", a_point("4GB", **failed), a_point("5GB", **failed), a_point("6GB"), a_point("8GB"))
    found = comparison(old, new)
    step = "train_step faces256 step vram="
    assert found.newly_failed == {f"{step}4GB": "out of memory"} and not found.passes
    assert found.still_failed == {f"{step}5GB": "out of memory"}
    assert (found.missing, found.added) == ([f"{step}7GB"], [f"{step}8GB"])
    text = compare.markdown(found, points.load([old]), points.load([new]))
    assert "FAILED" in text and "All with `batch=20`" in text and all(f"vram={n}GB" in text for n in (4, 5, 7, 8))


def test_a_run_that_failed_as_a_whole_fails_all_that_it_would_have_measured(write: Write) -> None:
    sides = [a_point(name="ours", benchmark="denoiser_step"), a_point(name="diffusers", benchmark="denoiser_step")]
    found = comparison(write("old.json", *sides), write("new.json", a_point(benchmark="denoiser_step", error="killed")))
    assert list(found.newly_failed) == ["denoiser_step faces256 ours"]
    assert not found.missing and not found.passes


def test_the_exit_code_says_whether_it_passed(
    write: Write, called: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    old, same = write("old.json", a_point()), write("same/new.json", a_point(images_per_second=9.9))
    code, said = called(compare.main, old, same.parent)
    assert code == 0 and "# Comparison: passed" in said
    larger = write("larger.json", a_point(device_bytes=round(7.3 * GIB)))
    done = run("benchmarks.compare", str(old), str(larger), cwd=ROOT)
    assert done.returncode == 1 and "| WORSE |" in done.stdout and "+4.3%" in done.stdout
    assert called(compare.main, old, larger, "--memory", 5)[0] == 0
    for words in ([old, tmp_path / "missing.json"], [old, larger, "--speed", "100"]):
        code, said = called(compare.main, *words)
        assert code == 2 and said.startswith("lowvram: ") and "Traceback" not in said


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ([], "No benchmark points"),
        ([a_point("9GB")], "None of the 1 new points"),
        ([a_point(recipe="other", error="x"), a_point(images_per_second=None, seconds=None, seconds_per_step=None,
          allocated_bytes=None, reserved_bytes=None, device_bytes=None)], "No figure was measured in both"),
    ],
)  # fmt: skip
def test_what_can_not_be_compared_is_no_pass(
    write: Write, called: Callable[..., tuple[int, str]], new: list[Any], why: str
) -> None:
    code, said = called(compare.main, write("old.json", a_point()), write("new.json", *new))
    assert code == 2 and why in said


def test_other_hardware_is_refused_unless_asked_for(write: Write) -> None:
    old = write("old.json", a_point())
    slower = a_point(images_per_second=5.0)
    other = write("new.json", slower, hardware=CARD | {"memory_bytes": 8 * GIB})
    with pytest.raises(compare.LowVRAMError, match="RTX 3060, 12GB, the new ones on RTX 3060, 8GB"):
        comparison(old, other)
    assert not comparison(old, other, any_hardware=True).passes
    # A driver that keeps some MB for itself makes no other card.
    same = write("same.json", a_point(), hardware=CARD | {"memory_bytes": 12 * GIB - 2**25})
    assert comparison(old, same).passes


def test_of_kept_results_of_many_cards_those_of_this_one_count(write: Write, tmp_path: Path) -> None:
    write("kept/a.json", a_point(images_per_second=100.0), hardware=CARD | {"device": "RTX 4090"})
    write("kept/b.json", a_point())
    found = comparison(tmp_path / "kept", write("new.json", a_point()))
    assert found.passes and not found.missing and len(found.changes) == 1


def test_the_report_command_writes_a_table_and_a_picture(
    called: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "old.json").write_text('{"recipe": "faces32"}')
    step = record.spread([0.1, 0.11])
    record.write(
        tmp_path / "new.json",
        [record.point("train_step", "step", recipe="faces32", seconds_per_step=step, images_per_second=40.0,
                      allocated_bytes=2**28)],
        device="cpu",
    )  # fmt: skip
    done = run("benchmarks.report", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "old.json is not a file of benchmark points" in done.stderr
    (row,) = rows_of(done.stdout)
    assert (row["images/s"], row["allocated"]) == ("**40.0**", "**256MB**")
    written = (tmp_path / "report.md").read_text()
    assert done.stdout.strip() in written and "![train-step-faces32](train-step-faces32.png)" in written
    assert (tmp_path / "train-step-faces32.png").exists()
    code, said = called(report.main, tmp_path / "old.json", "--out", tmp_path / "nothing")
    assert code == 2 and "No benchmark points" in said and not (tmp_path / "nothing").exists()


# The workflows.

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_limits_least_rights_and_pinned_actions(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
    for step in steps_of(path):
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))
        assert "${{" not in step.get("run", "")  # values come by the environment: a branch's name is no shell code


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_is_there(path: Path) -> None:
    scripts = "\n".join(step.get("run", "") for step in steps_of(path))
    modules = re.findall(r"python -m (benchmarks\.\w+)", scripts)
    assert modules or ".ci/run" in scripts
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)
    assert (ROOT / ".ci/run").exists()
    for folder in re.findall(r"pytest (?:-\S+ )*(tests/\S+)", scripts):
        assert (ROOT / folder).exists()
    for script in (step["run"] for step in steps_of(path) if "run" in step):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_tests_run_at_both_ends_of_python_and_torch() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12"] and matrix["torch"] == ["lowest", "newest"]
    lowest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    scripts = "\n".join(step.get("run", "") for step in steps_of(ROOT / ".github/workflows/tests.yml"))
    assert lowest is not None and f"torch=={lowest[1]}.*" in scripts


def test_no_foreign_pull_request_reaches_a_runner_of_ours() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
    assert "self-hosted" in next(iter(workflow["jobs"].values()))["runs-on"]
    assert not {"pull_request", "pull_request_target"} & set(workflow[True])  # YAML 1.1 reads `on` as true
