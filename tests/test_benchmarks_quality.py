"""Time to quality: the clock counts training alone, recipes take turns, and what was measured is kept."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny import TINY

from benchmarks import quality_pictures, quality_table, quality_worker, record, time_to_quality
from benchmarks.quality_worker import TimedTrainer
from benchmarks.time_to_quality import Comparison, Options
from lowvram import Trainer, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.metrics.evaluation import Evaluation

LEARNED, RANDOM = "frechet_efficientnet_lite0", "frechet_random_conv"


def a_point(recipe: str, seconds: float, distance: float) -> dict[str, Any]:
    values = {LEARNED: distance, RANDOM: distance / 10, "swd_16": 1.0, "swd_mean": distance, "precision_x": 0.5}
    details = {
        "seconds": seconds,
        "kimg": seconds / 10,
        "kwh": seconds / 1e6,
        "images_per_kwh": 1e8,
        "peak_bytes": 2**29,
        "peak_is": "resident",
        "values": values,
        "floor": dict.fromkeys(values, 1.0),
        "ended": False,
    }
    return record.point("time_to_quality", f"after {seconds}", recipe=recipe, details=details)


# The options.


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "either seconds or kimg"),
        ({"seconds": 3, "kimg": 1}, "either seconds or kimg"),
        ({"seconds": -1}, "seconds=-1"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"kimg": 1, "n": 3}, "n=3"),
        ({"kimg": 1, "points": 0}, "points=0"),
        ({"kimg": 1, "points": 1000}, "points=1000"),
        ({"kimg": 1, "n": 10, "shown": 16}, "shown=16"),
        ({"kimg": 1, "recipe": " ,"}, "names nothing"),
        ({"kimg": 1, "recipe": "faces32,my/faces32.yaml"}, "two of the name faces32"),
    ],
)
def test_nonsense_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(LowVRAMError, match=said):
        Options(**{"recipe": "faces32"} | asked)


def test_early_measurements_are_closer_together() -> None:
    goals = Options(recipe="faces32", seconds=100, points=4).goals()
    assert goals == pytest.approx([6.25, 25, 56.25, 100])
    assert Options(recipe="faces32", kimg=2, points=1).goals() == [2]


def test_recipes_of_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError, match="resolution is 32 in faces32 and 64 in faces64"):
        Comparison(Options(recipe="faces32,faces64", seconds=1, out=str(tmp_path / "out")), [])
    (tmp_path / "runs").mkdir()
    with pytest.raises(LowVRAMError, match="has trainings already"):
        Comparison(Options(recipe="faces32", seconds=1, out=str(tmp_path)), [])
    with pytest.raises(LowVRAMError, match="no setting secondz"):
        Comparison(Options(recipe="faces32", seconds=1, out=str(tmp_path / "out")), ["secondz=3"])


@pytest.mark.parametrize(
    ("asked", "words", "said"),
    [
        ({"feature_size": 16}, [], "feature_size=16"),
        ({"measure_on": "cuda:99"}, [], "measure_on=cuda:99 is not there"),
        ({"measure_on": "gpu"}, [], "measure_on=gpu is not there"),
        ({"measure_on": "meta"}, [], "measure_on=meta is not there"),
        ({}, ["data.builtin_count=7"], "7 images, too few"),
    ],
)
def test_what_measuring_would_find_wrong_is_said_before_training(
    asked: dict[str, Any], words: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(LowVRAMError, match=said):
        Comparison(Options(recipe="faces32", seconds=1, out=str(tmp_path / "out"), **asked), words)
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_a_schedule_keeps_its_length(tmp_path: Path) -> None:
    def length(recipe: str, *words: str) -> float:
        found = Comparison(Options(recipe=recipe, seconds=1, out=str(tmp_path / "out")), words).overrides[recipe]
        return load_recipe(recipe, found).kimg

    assert length("faces32") == 1e6
    scheduled = ("optimizer.schedule=cosine",)
    assert length("faces64_ldm", *scheduled) == load_recipe("faces64_ldm").kimg


# The trainer with a clock.


def test_the_clock_counts_neither_saving_nor_sampling(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = 0.4
    saved = Trainer.save_samples
    monkeypatch.setattr(Trainer, "save_samples", lambda *a, **k: (time.sleep(slow), saved(*a, **k))[1])
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *a: (time.sleep(0.2), step(*a))[1])
    trainer = TimedTrainer(tiny("kimg=0.024", "snapshot_kimg=0.008"))
    begun = time.perf_counter()
    first = trainer.train(seconds=None, images=8)  # a grid before it, and one after it
    assert first["images"] == 8 and not first["done"] and first["allocated_bytes"] > 2**20
    trainer.write_samples(9, str(tmp_path / "some.npy"))
    time.sleep(slow)
    second = trainer.train(seconds=None, images=24)
    elapsed = time.perf_counter() - begun
    assert second["images"] == 24 and second["done"]
    assert first["seconds"] >= 0.2 and first["seconds"] + 0.4 <= second["seconds"] <= elapsed - 4 * slow
    assert first["joules"] <= second["joules"]
    written = np.load(tmp_path / "some.npy")
    assert written.shape == (9, 3, 16, 16) and written.dtype == np.uint8
    now = trainer.sample(9, seed=0, noise_mode="random")
    assert not torch.equal(torch.from_numpy(written), now)  # it has learned since
    trainer.write_samples(9, str(tmp_path / "some.npy"))
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "some.npy")), now)
    trainer.finish()
    assert json.loads((tmp_path / "run" / "receipt.json").read_text()) and (tmp_path / "run" / "report.html").is_file()
    assert trainer.account.seconds() < elapsed - 2 * slow


@pytest.mark.skipif(not quality_worker._reset_resident_peak(), reason="the system can't begin a peak anew")
def test_memory_that_measuring_and_saving_take_is_not_training_s(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold(*_: Any, **__: Any) -> None:
        torch.ones(2**27)  # 512 MB, all touched

    monkeypatch.setattr(Trainer, "save_samples", hold)
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch: _quick_step(self))
    trainer = TimedTrainer(tiny("kimg=1", "snapshot_kimg=0.008"))
    hold()
    before = psutil.Process().memory_info().rss
    first = trainer.train(seconds=None, images=16)  # which saves
    assert 2**20 < first["reserved_bytes"] < before + 2**28
    assert first["peak_is"] == "resident in the process while it trained"
    hold()
    assert trainer.train(seconds=None, images=32)["reserved_bytes"] < before + 2**28
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch: (hold(), _quick_step(self))[1])
    assert trainer.train(seconds=None, images=48)["reserved_bytes"] > before + 2**28
    monkeypatch.setattr(quality_worker, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    assert "also while it was measured" in trainer.train(seconds=None, images=64)["peak_is"]


def test_time_ends_a_slice(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TimedTrainer(tiny("kimg=1", "snapshot_kimg=100"))
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch: _quick_step(self))
    assert 0.3 <= trainer.train(seconds=0.3, images=None)["seconds"] < 5
    seen = trainer.images_seen
    assert trainer.train(seconds=0.3, images=None)["images"] == seen  # that time is over
    assert trainer.train(seconds=0.6, images=None)["images"] > seen


def _quick_step(trainer: Trainer) -> Any:
    from lowvram.trainer import StepResult

    time.sleep(0.05)
    trainer.step += 1
    trainer.images_seen += 8
    return StepResult(step=trainer.step, images_seen=trainer.images_seen, losses={}, costs={})


def test_requests_are_answered_line_by_line(tmp_path: Path) -> None:
    words = [*TINY, f"out={tmp_path / 'run'}", "kimg=1"]
    asked: list[dict[str, Any]] = [
        {"recipe": "faces32", "overrides": words},
        {"do": "train", "seconds": None, "images": 8},
        {"do": "sample", "n": 8, "path": str(tmp_path / "nowhere" / "x.npy")},
        {"do": "finish"},
    ]
    out = io.StringIO()
    quality_worker.answer(map(json.dumps, asked), out)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert answers[0]["device"] == "cpu" and "hardware" in answers[0]["environment"]
    assert answers[1]["images"] == 8
    assert "nowhere" in answers[2]["error"] and len(answers) == 3  # an error is the last answer


def test_a_worker_that_can_not_begin_says_why() -> None:
    with pytest.raises(LowVRAMError, match="recipe=nonsense is not known"):
        quality_worker.Worker("nonsense", [])


# Recipes in turns, with trainings and measures that are made up.


class FakeWorker:
    """Learns as many images a second as its recipe's file says; fails after so many requests, if asked to."""

    asked: list[tuple[str, str]] = []
    fails: dict[str, int] = {}
    closed = 0

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.recipe, self.images, self.count = recipe, 0, 0
        self.environment = {"environment": record.environment("cpu"), "device": "cpu"}

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append((Path(self.recipe).stem, name))
        self.count += 1
        if self.fails.get(Path(self.recipe).stem) == self.count:
            raise LowVRAMError("the loss is nan.", "Lower it.")
        if name == "sample":
            np.save(arguments["path"], np.full((arguments["n"], 3, 32, 32), self.images % 256, np.uint8))
        if name != "train":
            return {}
        self.images = round(arguments["seconds"] * 10)
        return {
            "seconds": arguments["seconds"],
            "images": self.images,
            "joules": 36.0 * self.images,
            "energy_by": "estimate",
            "allocated_bytes": 2**30,
            "reserved_bytes": 2**30,
            "peak_is": "made up",
            "done": False,
        }

    def close(self) -> None:
        FakeWorker.closed += 1


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Comparison]:
    def evaluate(batches: Any, real: Any, *, n: int, floor: bool, **_: Any) -> Evaluation:
        far = 256.0 - int(next(iter(batches))[0, 0, 0, 0])
        values = {LEARNED: far, RANDOM: far, "swd_mean": far}
        floors = dict.fromkeys(values, 1.0) if floor else {}
        return Evaluation(values=values, floor=floors, generated_images=n, real_images=n, floor_images=n // 2)

    monkeypatch.setattr(time_to_quality, "Worker", FakeWorker)
    monkeypatch.setattr(time_to_quality, "evaluate_images", evaluate)
    monkeypatch.setattr(FakeWorker, "asked", [])
    monkeypatch.setattr(FakeWorker, "fails", {})
    monkeypatch.setattr(FakeWorker, "closed", 0)
    (tmp_path / "other.yaml").write_text("defaults: [faces32, _self_]\nrecipe: other\n")
    both = f"faces32,{tmp_path / 'other.yaml'}"

    def make(**asked: Any) -> Comparison:
        options = {"recipe": both, "seconds": 16, "points": 2, "n": 16, "shown": 4} | asked
        return Comparison(Options(**options, out=str(tmp_path / "out")), ["data.builtin_count=8"])

    return make


def test_recipes_take_turns_and_all_is_written(made_up: Callable[..., Comparison], tmp_path: Path) -> None:
    points = made_up().run()
    trained = [name for name, what in FakeWorker.asked if what == "train"]
    assert trained == ["faces32", "other", "other", "faces32"] and FakeWorker.closed == 2
    assert [name for name, what in FakeWorker.asked if what == "finish"] == ["faces32", "other"]
    assert record.read(tmp_path / "out" / "quality.json")["points"] == points
    assert [(point["recipe"], point["name"]) for point in points] == [
        ("faces32", "1 of 2"),
        ("faces32", "2 of 2"),
        ("other", "1 of 2"),
        ("other", "2 of 2"),
    ]
    first, last = points[0]["details"], points[1]["details"]
    assert (first["seconds"], last["seconds"], last["kimg"]) == (4, 16, 0.16)
    assert first["values"][LEARNED] == 256 - 40 > last["values"][LEARNED] == 256 - 160
    assert last["kwh"] == pytest.approx(0.16 * 0.01) and last["images_per_kwh"] == pytest.approx(100_000)
    assert last["floor"] == {LEARNED: 1.0, RANDOM: 1.0, "swd_mean": 1.0}
    assert points[1]["overrides"] == ["data.builtin_count=8", "seconds=16"]
    assert all((tmp_path / "out" / name).is_file() for name in time_to_quality.WRITTEN)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_training_that_fails_stops_no_other(
    made_up: Callable[..., Comparison], capsys: pytest.CaptureFixture[str]
) -> None:
    FakeWorker.fails["faces32"] = 3  # the second slice
    points = made_up(points=3).run()
    assert [(point["recipe"], point["error"]) for point in points] == [
        ("faces32", None),
        ("faces32", "the loss is nan."),
        *[("other", None)] * 3,
    ]
    assert "faces32 failed: the loss is nan." in capsys.readouterr().out
    assert ("faces32", "finish") not in FakeWorker.asked


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
        (MemoryError(), "MemoryError()"),
        (LowVRAMError("it is not finite.", "Wait."), "it is not finite."),
    ],
)
def test_a_measurement_that_fails_is_a_point_and_no_more(
    error: Exception, said: str, made_up: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = time_to_quality.evaluate_images, iter([None, error])

    def fails_once(*args: Any, **options: Any) -> Evaluation:
        if problem := next(calls, None):
            raise problem
        return evaluate(*args, **options)

    comparison = made_up(points=3)
    monkeypatch.setattr(time_to_quality, "evaluate_images", fails_once)
    points = comparison.run()
    errors = [(point["recipe"], point["error"]) for point in points]
    failed = f"it could not be measured: {said}"
    assert errors == [*[("faces32", None)] * 3, ("other", failed), *[("other", None)] * 2]
    assert [name for name, what in FakeWorker.asked if what == "finish"] == ["faces32", "other"]
    assert all((tmp_path / "out" / name).is_file() for name in time_to_quality.WRITTEN)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_defect_of_ours_is_no_point(made_up: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any, **__: Any) -> Evaluation:
        raise RuntimeError("shapes do not fit")

    comparison = made_up()
    monkeypatch.setattr(time_to_quality, "evaluate_images", evaluate)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        comparison.run()
    assert FakeWorker.closed == 2


def test_what_was_measured_outlives_an_interruption(
    made_up: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = made_up()
    ask = FakeWorker.ask

    def interrupted(self: FakeWorker, name: str, **arguments: Any) -> dict[str, Any]:
        if len(FakeWorker.asked) == 5:
            raise KeyboardInterrupt
        return ask(self, name, **arguments)

    monkeypatch.setattr(FakeWorker, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comparison.run()
    assert len(record.read(tmp_path / "out" / "quality.json")["points"]) == 2 and FakeWorker.closed == 2


# The table and the pictures.


def test_who_is_as_good_sooner_is_said() -> None:
    slow = [a_point("slow", 10, 300), a_point("slow", 100, 100)]
    fast = [a_point("fast", 10, 200), a_point("fast", 30, 50), a_point("fast", 100, 60)]
    assert quality_table.reached(fast, LEARNED, 100) == pytest.approx(10 + 20 * 100 / 150)
    assert quality_table.reached(fast, LEARNED, 40) is None and quality_table.reached(fast, LEARNED, 250) == 10
    said = quality_table.sooner([*slow, *fast])
    assert said[0] == "fast reaches FD Lite0 100, slow's after 100 s, after 23 s: 4.3 times as soon"
    assert "fast does not reach" in quality_table.sooner([*slow, a_point("fast", 10, 200)])[0]
    assert quality_table.sooner(slow) == []
    astray = quality_table.sooner([a_point("slow", 10, 90), a_point("slow", 100, 100), *fast])
    assert astray == [f"by {metric} slow came no nearer" for metric in ("FD Lite0", "FD rand", "SWD")]


def test_the_first_one_s_time_is_that_of_its_first_being_so_near() -> None:
    slow = [a_point("slow", seconds, distance) for seconds, distance in ((5, 200), (100, 50), (300, 90))]
    fast = [a_point("fast", 60, 90)]
    said = quality_table.sooner([*slow, *fast])
    assert said[0] == "fast reaches FD Lite0 90, slow's after 75 s, after 60 s: 1.2 times as soon"


def test_a_row_has_a_cell_for_each_head() -> None:
    point = a_point("faces32", 12.34, 100)
    head = quality_table.header(point, 10)[-1]
    assert len(head) == len(quality_table.row(point, 10))
    costs, values = ["faces32", "12.3", "1.23", "0.0123", "1e+08", "0.5GB"], ["100", "10", "100", "0.5"]
    assert quality_table.row(point, 10).split() == [*costs, *values]
    assert head.split()[-7:] == ["FD", "Lite0", "FD", "rand", "SWD", "P", "x"]


def test_the_pictures_have_a_place_for_each_recipe(tmp_path: Path) -> None:
    courses = {name: [a_point(name, s, s * at) for s in (1, 4, 9)] for name, at in (("a", 3.0), ("b", 5.0))}
    quality_pictures.draw_curves(courses, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        counted = {colour: count for count, colour in image.convert("RGB").getcolors(2**24) or []}
        # A row for each of four metrics, each with a line of both colours in three panels.
        assert all(counted[colour] > 100 for colour in quality_pictures._LINES[:2])
        one = image.size
    grids = {name: [torch.full((4, 3, 16, 16), 60 * n + 40, dtype=torch.uint8) for n in range(3)] for name in courses}
    grids["b"][1] = None  # type: ignore[call-overload]
    real = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    quality_pictures.draw_samples(courses, grids, real, tmp_path / "samples.png", times=["1 s", "4 s", "9 s"])
    with Image.open(tmp_path / "samples.png") as image:
        counted = {colour[0]: count for count, colour in image.convert("RGB").getcolors(2**24) or []}
    assert counted[40] >= 2 * 256**2 and counted[160] >= 2 * 256**2 and 256**2 <= counted[100] < 2 * 256**2
    assert counted[0] >= 256**2 and one[0] > one[1] / 2


@pytest.mark.parametrize(("least", "most"), [(1.0, 1.5), (20.0, 300.0), (0.01, 4000.0), (5.0, 5.0)])
def test_a_logarithmic_axis_has_ticks_and_ends(least: float, most: float) -> None:
    axis = quality_pictures.LogAxis.of([most, least], 200, 0)
    assert 200 > axis.at(least) >= axis.at(most) > 0 and axis.at(0) == 200
    assert 1 <= len(axis.ticks()) <= 10 and all(axis.first <= tick <= axis.last for tick in axis.ticks())


@pytest.mark.parametrize(
    ("count", "most", "places"), [(8, 5, [1, 3, 4, 6, 7]), (3, 5, [0, 1, 2]), (1, 5, [0]), (6, 3, [1, 3, 5])]
)
def test_some_times_are_shown_the_last_among_them(count: int, most: int, places: list[int]) -> None:
    assert quality_pictures.some_of(count, most) == places


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "other.yaml").write_text("defaults: [faces32, _self_]\nrecipe: other\nloss:\n  r1_gamma: 100\n")
    words = [word for word in TINY if "r1_gamma" not in word]
    asked = [f"recipe=faces32,{tmp_path / 'other.yaml'}", "kimg=0.032", "points=2", "n=16", "feature_size=32"]
    command = [sys.executable, "-m", "benchmarks.time_to_quality", *asked, f"out={out}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = record.read(out / "quality.json")["points"]
    assert [point["details"]["kimg"] for point in points] == [0.008, 0.032] * 2
    assert all(
        0 < value < 1e9 for point in points for name, value in point["details"]["values"].items() if "swd" in name
    )
    assert points[1]["details"]["values"] != points[3]["details"]["values"]
    assert "two halves of the real images" in done.stdout and "FD rand" in done.stdout
    assert (out / "runs" / "other" / "checkpoints").is_dir()
