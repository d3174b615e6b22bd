"""Sweeps: which points there are, that they go on where they were stopped, and that failures stop nothing."""

import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from commands import ROOT, run, start
from tiny import TINY

from benchmarks import record, sweep
from benchmarks.sweep import Point
from lowvram import LowVRAMError

OPTIONS = {"steps": 3}
# What stands for the benchmark: batch=5 fails, batch=6 is killed, batch=7 takes its time, others write their point.
MEASURE = """
import json, os, signal, sys, time
words, file = sys.argv[1:-2], sys.argv[-1]
print("measuring", words)
if "batch=5" in words:
    sys.exit("Traceback of three lines\\nlowvram: batch=5 is not divisible.\\n         Use 4.")
if "batch=6" in words:
    os.kill(os.getpid(), signal.SIGKILL)
if "batch=7" in words:
    time.sleep(60)
values = json.loads(os.environ["POINT"])
steps = int(words[words.index("--steps") + 1])
values["points"][0] |= {"overrides": [w for w in words if "=" in w][:-1], "details": {"options": {"steps": steps}}}
with open(file, "w") as out:
    json.dump(values, out)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points are measured by `MEASURE`, on this machine."""
    point = record.point("train_step", "step", recipe="faces32", images_per_second=1.0, allocated_bytes=2**20)
    content = {"schema": record.SCHEMA, "environment": record.environment("cpu"), "points": [point]}
    monkeypatch.setenv("POINT", json.dumps(content))
    monkeypatch.setattr(sweep, "_environment", lambda _: content["environment"])

    def command(self: Point, file: Path) -> list[str]:
        options = [word for name, value in self.options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-c", MEASURE, *self.words, *options, "--json", str(file)]

    monkeypatch.setattr(Point, "command", command)
    return tmp_path / "sweep"


def swept(*words: str) -> list[tuple[str, ...]]:
    return [point.words for point in sweep.points("train_step", list(words), OPTIONS)]


# Which points.


def test_points_are_all_combinations_in_hydras_order() -> None:
    found = sweep.points("train_step", ["recipe=faces32,faces64", "vram=4GB,6GB", "data.workers=0"], OPTIONS)
    assert [point.label for point in found] == [
        "recipe=faces32 vram=4GB",
        "recipe=faces32 vram=6GB",
        "recipe=faces64 vram=4GB",
        "recipe=faces64 vram=6GB",
    ]
    assert found[1].words == ("data.workers=0", "recipe=faces32", "vram=6GB")
    assert (found[1].recipe, found[1].overrides) == ("faces32", ["data.workers=0", "vram=6GB"])


def test_ranges_globs_lists_and_quotes_are_hydras() -> None:
    assert [words[0] for words in swept("recipe=faces32", "batch=range(4,13,4)")] == ["batch=4", "batch=8", "batch=12"]
    recipes = {words[0] for words in swept("recipe=glob(faces256*,exclude=*text)")}
    assert recipes == {f"recipe=faces256{end}" for end in ("", "_vae", "_ldm", "_dit", "_fast", "_few", "_r3gan")}
    assert swept("recipe=faces256_ldm", "unet.channels=[32,64],[64]") == [
        ("recipe=faces256_ldm", "unet.channels=[32,64]"),
        ("recipe=faces256_ldm", "unet.channels=[64]"),
    ]
    assert swept("recipe=a", "data.path='a,b c.zip'") == [("data.path='a,b c.zip'", "recipe=a")]
    assert swept("recipe=a", "batch=4,8", "batch=16") == [("batch=16", "recipe=a")]


def test_a_point_has_one_file_in_every_sweep() -> None:
    (alone,) = sweep.points("train_step", ["batch=8", "recipe=faces32"], OPTIONS)
    among = sweep.points("train_step", ["recipe=faces64,faces32", "batch=4,8"], {"steps": 99})
    keys = [point.key for point in among]
    assert alone.key == keys[3] and len(set(keys)) == 4
    assert alone.key.startswith("train-step-faces32-batch-8-")
    assert sweep.points("denoiser_step", ["batch=8", "recipe=faces32"], OPTIONS)[0].key != alone.key


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("batch", "batch is not understood"),
        ("--stepz=3", "--stepz=3 is not understood"),
        ("batch=interval(1,2)", "no end of values"),
        ("recipe=glob(nothing*)", "recipe has no values"),
        ("batch=range(4", "range"),
    ],
)
def test_words_that_are_no_sweep(word: str, problem: str) -> None:
    with pytest.raises(LowVRAMError, match=problem):
        sweep.points("train_step", ["recipe=faces32", word], OPTIONS)


# Running them.


def statuses(folder: Path) -> dict[str, str | None]:
    """Of every file, by its batch: the error."""
    points = [record.read(file)["points"][0] for file in folder.glob("*.json")]
    return {point["overrides"][0]: point["error"] for point in points}


def test_failed_points_are_recorded_and_stop_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=faces32", "model.mbstd_group_size=1", "batch=4,5,6,8", f"out={folder}"]
    assert sweep.sweep("train_step", words, OPTIONS) == 2
    points = {one["overrides"][0]: one for file in folder.glob("*.json") for one in record.read(file)["points"]}
    errors = {name: point["error"] for name, point in points.items()}
    assert errors == {
        "batch=4": None,
        "batch=5": "batch=5 is not divisible.",
        "batch=6": "killed by SIGKILL",
        "batch=8": None,
    }
    said = capsys.readouterr().out
    assert "2/4 recipe=faces32 batch=5: batch=5 is not divisible." in said
    assert f"2 of 4 points are in {folder}" in said
    (log,) = (folder / ".sweep").glob("*batch-8*.log")
    assert "measuring" in log.read_text()


def test_what_is_there_is_kept_and_what_failed_is_tried_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=faces32", "model.mbstd_group_size=1", f"out={folder}"]
    assert sweep.sweep("train_step", [*words, "batch=4,5"], OPTIONS) == 1
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*batch-4*.json")}
    capsys.readouterr()
    assert sweep.sweep("train_step", ["batch=4,5,8", *words], OPTIONS) == 1
    said = capsys.readouterr().out
    assert "batch=4 recipe=faces32: kept, of commit" in said and "1/2 batch=5 recipe=faces32: batch=5 is not" in said
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert sweep.sweep("train_step", [*words, "batch=4", "redo=true"], OPTIONS) == 0
    assert {file: file.stat().st_mtime_ns for file in before} != before
    capsys.readouterr()
    assert sweep.sweep("train_step", [*words, "batch=4"], {"steps": 9}) == 0  # other options are another measurement
    assert "kept, of" not in capsys.readouterr().out
    (file,) = before
    file.write_text(file.read_text()[:100])  # as a full disk would leave it
    assert sweep.sweep("train_step", [*words, "batch=4"], OPTIONS) == 0
    assert statuses(folder)["batch=4"] is None


def test_a_point_that_takes_too_long_is_ended(folder: Path) -> None:
    words = ["recipe=faces32", "model.mbstd_group_size=1", "batch=7", f"out={folder}"]
    assert sweep.sweep("train_step", words, OPTIONS, timeout_seconds=1.5) == 1
    assert statuses(folder) == {"batch=7": "it took longer than 1.5 seconds"}


def test_points_that_cannot_be_composed_fail_alone(folder: Path) -> None:
    assert sweep.sweep("train_step", ["recipe=faces32,faces64_ldm", "loss.r1_gamma=1", f"out={folder}"], OPTIONS) == 1
    errors = {file.name.split("-")[2]: record.read(file)["points"][0]["error"] for file in folder.glob("*.json")}
    assert errors == {"faces32": None, "faces64": "There is no setting loss.r1_gamma."}


def test_a_folder_is_of_one_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["recipe=faces32", "batch=4", f"out={folder}"]
    assert sweep.sweep("train_step", words, OPTIONS) == 0
    monkeypatch.setattr(sweep, "_environment", lambda _: {"hardware": {"device": "RTX 9999"}})
    with pytest.raises(LowVRAMError, match="this is RTX 9999"):
        sweep.sweep("train_step", words, OPTIONS)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["recipe=faces32", "colour=red,blue"], "There is no setting colour"),
        (["recipe=faces9,faces8"], "recipe=faces9 is not known"),
        (["recipe=faces32", "hydra/launcher=submitit_nowhere"], "hydra/launcher"),
    ],
)
def test_mistakes_of_the_command_run_nothing(
    folder: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Namespace(settings=[*words, f"out={folder}"], json=None, timeout=None)
    with pytest.raises(SystemExit) as stopped:
        sweep.main("train_step", options, OPTIONS)
    assert stopped.value.code == sweep.MISTAKE
    assert problem in capsys.readouterr().err and not list(folder.glob("*.json"))


def test_stopped_it_ends_its_point_and_goes_on_later(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Namespace(settings=["recipe=faces32", "model.mbstd_group_size=1", "batch=4,7,8"], json=None, timeout=None)
    options.settings.append(f"out={folder}")

    def stop() -> None:
        while not list((folder / ".sweep").glob("*batch-7*.log")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        sweep.main("train_step", options, OPTIONS)
    assert stopped.value.code == sweep.STOPPED and statuses(folder) == {"batch=4": None}
    assert "goes on from here" in capsys.readouterr().err
    words = [word.replace("4,7,8", "4,8") for word in options.settings]
    assert sweep.sweep("train_step", words, OPTIONS) == 0
    assert "batch=4: kept, of" in capsys.readouterr().out and statuses(folder) == {"batch=4": None, "batch=8": None}


@pytest.mark.slow
def test_a_real_sweep_is_stopped_and_goes_on(tmp_path: Path) -> None:
    words = ["-m", "recipe=faces32", *TINY, "batch=8,6,16", "--steps", "1", "--warmup", "0", f"out={tmp_path}"]
    process = start("benchmarks.train_step", *words, cwd=ROOT)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*batch-8*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == sweep.STOPPED and "goes on from here" in err, (out, err)
    done = run("benchmarks.train_step", *words, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "batch=8: kept" in done.stdout and "2 of 3 points are in" in done.stdout
    errors = {
        next(w for w in point["overrides"] if w.startswith("batch=")): point["error"]
        for file in tmp_path.glob("*.json")
        for point in record.read(file)["points"]
    }
    assert errors["batch=8"] is errors["batch=16"] is None and "mbstd_group_size" in errors["batch=6"]
