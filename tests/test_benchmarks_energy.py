"""The benchmark of energy: loads are told apart, and meters that disagree are."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import energy
from lowvram.errors import LowVRAMError


def test_a_busy_processor_takes_more_than_an_idle_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    energy.main(energy.Options(seconds=0.3, device="cpu", json=str(tmp_path / "energy.json")))
    points = {point["name"]: point for point in json.loads((tmp_path / "energy.json").read_text())["points"]}
    watts = {name: point["details"]["watts"]["estimate"] for name, point in points.items()}
    assert watts["idle"] < 0.5 * min(watts["copy"], watts["product"])
    assert points["product"]["details"]["tflops_per_second"] > 0 == points["copy"]["details"]["tflops_per_second"]
    assert "product" in capsys.readouterr().out


def test_meters_of_a_card_must_agree_under_a_load() -> None:
    assert energy.apart("product", {"counter": 300.0, "power": 310.0, "estimate": 100.0}) is None
    assert energy.apart("idle", {"counter": 30.0, "power": 60.0}) is None
    assert energy.apart("copy", {"power": 60.0, "estimate": 90.0}) is None
    said = energy.apart("copy", {"counter": 100.0, "power": 160.0})
    assert said is not None and "100.0 W" in said and "160.0 W" in said


def test_a_wrong_time_is_refused() -> None:
    with pytest.raises(LowVRAMError, match="seconds=0"):
        energy.main(energy.Options(seconds=0))
    assert energy._load("product", torch.device("cpu"))[1] == pytest.approx(2 * 1024**3 / 1e12)
