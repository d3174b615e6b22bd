"""Predicted memory beside measured: a real run on a CPU, the arithmetic of a GPU's, the published peaks."""

from pathlib import Path

import pytest
from commands import ROOT, run

from benchmarks import memory_prediction, published_stylegan2, record
from benchmarks.memory_prediction import Case, Prediction
from lowvram.planner.calibration import Constants

MIB = 2**20
GIB = 2**30
CASE = Case(recipe="faces64", policy="6GB", overrides=("batch=4",), vram_bytes=3 * GIB)
PREDICTION = Prediction(
    live_bytes={"G": 2 * GIB}, reserved_bytes={"G": 2 * GIB}, replayed_bytes=2 * GIB, seconds=1.0, sampled=2
)


@pytest.mark.slow
def test_a_run_on_a_cpu_is_predicted_to_the_byte(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["--recipes", "faces32:8", "--policies", "plain,lean", "--json", str(out)]
    done = run("benchmarks.memory_prediction", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    points = record.read(out)["points"]
    assert [(point["recipe"], point["name"]) for point in points] == [("faces32", "plain"), ("faces32", "lean")]
    for point in points:
        case = point["details"]
        assert point["memory"]["allocated_bytes"] == max(part["measured_live_bytes"] for part in case["parts"].values())
        assert point["seconds_per_step"]["median"] > 0 and point["seconds"]["sampling"]["n"] == 1
        assert {"G", "D", "R1", "average", "sampling"} <= set(case["parts"]) and not case["flags"]
        for part in case["parts"].values():
            assert part["predicted_live_bytes"] == pytest.approx(part["measured_live_bytes"], rel=0.001)
    assert "faces32:8, plain" in done.stdout


def measured(device_bytes: int) -> dict:
    parts = {"G": {"live_bytes": 2 * GIB, "reserved_bytes": 2 * GIB + 80 * MIB, "seconds": 1.0}}
    return {"parts": parts, "seconds": 2.0, "device_bytes": device_bytes, "device_by": "NVML"}


def test_what_exceeds_the_prediction_and_the_cap_is_flagged() -> None:
    fine = memory_prediction.compared(CASE, PREDICTION, measured(2 * GIB + 500 * MIB), Constants())
    assert not fine["flags"] and "2671.8" in memory_prediction.table({"on_gpu": True, "cases": [fine]})
    over = memory_prediction.compared(CASE, PREDICTION, measured(4 * GIB), Constants())
    assert over["flags"] == ["more of the device than predicted", "above its cap of 3GB"]
    failed = memory_prediction.compared(CASE, PREDICTION, {"error": "out of memory"}, Constants())
    assert failed["flags"] == ["out of memory"] and not failed["parts"]
    points = memory_prediction.points({"cases": [fine, failed]})
    assert points[0]["memory"]["device_bytes"] == 2 * GIB + 500 * MIB and points[1]["error"] == "out of memory"


def test_the_constants_learn_from_what_was_measured() -> None:
    entry = memory_prediction.compared(CASE, PREDICTION, measured(4 * GIB), Constants())
    after = memory_prediction.learnt([entry, {"error": "not run"}], Constants())
    assert after.measurements == 1 and after.time_factor == pytest.approx(2.0)
    assert after.context_bytes == 2 * GIB - 80 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", published_stylegan2.CONFIGURATIONS)
def test_published_peaks_are_foretold_within_ten_percent(name: str) -> None:
    published = published_stylegan2.CONFIGURATIONS[name]
    found = published_stylegan2.trace(published)
    assert found["live_bytes"] / GIB == pytest.approx(published.gib, rel=0.1)
    for phase, expected in zip(published_stylegan2.PHASES, published.phases_gib or (), strict=False):
        assert found["phases"][phase] / GIB == pytest.approx(expected, rel=0.1)
    assert published_stylegan2.trace(published, lean=True)["live_bytes"] < 0.9 * found["live_bytes"]
