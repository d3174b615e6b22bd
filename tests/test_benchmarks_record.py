"""The schema of benchmarks, and what NVML says of a card (by a library that stands for the driver's)."""

import sys
import time
from pathlib import Path

import fake_nvml
import pytest
import torch
from fake_nvml import FakeNvml

from benchmarks import device, record
from benchmarks.device import DevicePeak, Nvml

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return fake_nvml.install(monkeypatch)


@pytest.mark.parametrize(
    ("visible", "index", "asked"),
    [(None, 1, 1), ("1", 0, 1), ("1,0", 1, 0), ("GPU-1234", 0, "GPU-1234"), ("0, MIG-56", 1, "MIG-56")],
)
def test_the_card_is_the_one_that_cuda_sees(
    library: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, asked: object
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Nvml(index).used_bytes() == 100 and library.asked == [asked]


def test_the_peak_is_of_the_whole_device_less_what_was_before(library: FakeNvml) -> None:
    library.used = [100, 130, 900, 400]
    peak = DevicePeak(CUDA)
    assert peak.by == "NVML"
    with peak.watching():
        while len(library.used) > 1:
            time.sleep(0.005)
    assert peak.peak_bytes == 800


def test_off_a_card_nothing_is_looked_at() -> None:
    peak = DevicePeak(CPU)
    with peak.watching():
        peak.look()
    assert (peak.by, peak.peak_bytes, device.joules(lambda: None, CPU)) == (None, 0, None)


def test_energy_is_that_of_a_run(library: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    found = device.joules(lambda: time.sleep(0.02), CUDA, least_seconds=0.2)
    assert found == pytest.approx(250 * 0.02, rel=0.5)
    library.counts_energy = False
    assert device.joules(lambda: None, CUDA, least_seconds=0.01) is None


def test_no_library_or_no_such_card_is_no_nvml(monkeypatch: pytest.MonkeyPatch, library: FakeNvml) -> None:
    assert device.nvml(torch.device("cuda", 5)) is None

    library.is_there = False
    assert device.nvml(CUDA) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device.nvml(CUDA) is None


def test_the_spread_is_between_the_quartiles() -> None:
    assert record.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "min": 1.0, "max": 5.0, "iqr": 2.0, "n": 5}
    assert record.spread([2.0])["iqr"] == 0.0


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    point = record.point("train_step", "step", recipe="faces32", overrides=("batch=8",), allocated_bytes=5)
    record.write(tmp_path / "new" / "one.json", [point], device="cpu")
    content = record.read(tmp_path / "new" / "one.json")
    assert content["points"] == [point]
    assert torch.__version__.startswith(content["environment"]["versions"]["torch"])
    elsewhere = {"hardware": {"device": "RTX 3060"}}
    record.write(tmp_path / "new" / "one.json", [point], device="cpu", measured_in=elsewhere)
    assert record.read(tmp_path / "new" / "one.json")["environment"] == elsewhere
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["one.json"]
    (tmp_path / "other.json").write_text('{"schema": "another"}')
    with pytest.raises(ValueError, match="not a file of benchmark points"):
        record.read(tmp_path / "other.json")


def test_a_slug_is_a_files_name() -> None:
    assert record.slug("Intel(R) Xeon(R), 2.1 GHz") == "intel-r-xeon-r-2-1-ghz"
