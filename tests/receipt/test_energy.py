"""Meters of energy, by stand-ins for what a card and a processor tell."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fake_nvml
import pytest
from fake_nvml import FakeNvml

from lowvram.receipt import energy
from lowvram.receipt.energy import ESTIMATE, NVML, RAPL, EnergyMeter, ProcessLoad, of_card, of_processor
from lowvram.receipt.machine import board_watts, processor_name
from lowvram.receipt.nvml import Nvml


class Clock:
    """Stands for time.perf_counter, and stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return time.process_time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(energy, "time", found)
    return found


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return fake_nvml.install(monkeypatch)


def seventy() -> float:
    return 70.0


def never() -> float:
    raise AssertionError("the estimate is asked though the card tells")


# Cards.


def test_a_card_that_counts_is_measured_while_it_runs_alone(card: FakeNvml, clock: Clock) -> None:
    card.joules = 5000.0
    meter = of_card(0, None, seventy)
    clock.now, card.joules = 1010, 9000.0
    assert meter.read() == 0  # not begun yet
    meter.start()
    clock.now, card.joules = 1020, 9500.0
    assert meter.read() == 500
    clock.now, card.joules = 1030, 9800.0
    meter.stop()
    clock.now, card.joules = 2000, 20_000.0
    meter.start()
    clock.now, card.joules = 2010, 20_200.0
    meter.stop()
    assert (meter.read(), meter.by) == (1000, NVML)


@pytest.mark.parametrize("after", [100.0, 5000.0, 9e9], ids=["begun anew", "stands still", "jumps"])
def test_a_count_that_can_not_be_is_estimated(card: FakeNvml, clock: Clock, after: float) -> None:
    card.joules = 5000.0
    meter = of_card(0, None, seventy)
    meter.start()
    clock.now, card.joules = 1010, after
    assert meter.read() == pytest.approx(70 * 10)
    clock.now, card.joules = 1020, after + 600
    meter.stop()
    assert (meter.joules, meter.by) == (pytest.approx(1300), ESTIMATE)  # the next is measured again, and both are told


def test_a_card_that_stops_telling_is_estimated(card: FakeNvml, clock: Clock) -> None:
    card.joules = 0.0
    meter = of_card(0, None, seventy)
    meter.start()
    card.counts_energy = False
    clock.now = 1100
    meter.stop()
    assert (meter.joules, meter.by) == (pytest.approx(7000), ESTIMATE)


def test_what_was_estimated_is_not_measured_too(card: FakeNvml, clock: Clock) -> None:
    card.joules = 0.0
    meter = of_card(0, None, seventy)
    meter.start()
    clock.now, card.joules = 1010, 1000.0
    assert meter.read() == 1000
    clock.now, card.joules, card.counts_energy = 1020, 2000.0, False
    assert meter.read() == pytest.approx(1000 + 700)
    clock.now, card.joules, card.counts_energy = 1030, 3000.0, True
    assert meter.read() == pytest.approx(1000 + 700 + 700)  # from when it counts is known from here on
    clock.now, card.joules = 1040, 4000.0
    meter.stop()
    assert (meter.joules, meter.by) == (pytest.approx(1000 + 700 + 700 + 1000), ESTIMATE)
    clock.now, card.joules, card.counts_energy = 5000, 90_000.0, False
    meter.start()  # what the card took meanwhile is somebody else's
    clock.now, card.joules, card.counts_energy = 5010, 91_000.0, True
    meter.stop()
    assert meter.joules == pytest.approx(3400 + 700)


def test_a_meter_that_runs_is_not_begun_again(card: FakeNvml, clock: Clock) -> None:
    card.joules = 0.0
    meter = of_card(0, None, seventy)
    meter.start()
    clock.now, card.joules = 1010, 1000.0
    meter.start()
    clock.now, card.joules = 1020, 2000.0
    meter.stop()
    assert meter.joules == 2000


def test_where_a_card_does_not_count_its_power_is_summed(card: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    card.counts_energy = False
    monkeypatch.setattr(energy.CardPower, "every_seconds", 0.01)
    meter = of_card(0, None, never)
    begun = time.perf_counter()
    meter.start()
    time.sleep(0.15)
    card.watts = 50.0  # which two looks alone, at the begin and the end, would make 150 of
    time.sleep(0.15)
    meter.stop()
    seconds = time.perf_counter() - begun
    assert meter.by == NVML
    assert 0.15 * 250 < meter.joules < 0.15 * 250 + (seconds - 0.15) * 250
    stopped = meter.joules
    time.sleep(0.05)
    assert meter.joules == stopped  # nobody looks any more


def test_power_is_the_trapezoid_between_looks(card: FakeNvml, clock: Clock) -> None:
    source = energy.CardPower(Nvml())
    clock.now, card.watts = 1002, 150.0
    assert source.take() == 2 * 200


@pytest.mark.parametrize("missing", ["library", "package", "slice"])
def test_without_nvml_the_boards_power_is_the_estimate(
    card: FakeNvml, clock: Clock, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    card.counts_energy = card.tells_power = False
    if missing == "library":
        card.is_there = False
    elif missing == "package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = of_card(0, None, seventy)
    meter.start()
    clock.now += 5
    meter.stop()
    assert (meter.joules, meter.by) == (350, ESTIMATE)


@pytest.mark.parametrize(
    ("visible", "index", "uuid", "asked"),
    [
        (None, 1, None, [1]),
        ("1,0", 1, None, [0]),
        ("GPU-12", 0, None, ["GPU-12"]),
        ("1", 0, "ab-12", ["GPU-ab-12"]),  # torch's order may be another than NVML's
        (None, 0, "slice-1", ["GPU-slice-1", "MIG-slice-1"]),
    ],
)
def test_the_card_is_the_one_that_trains(
    card: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    index: int,
    uuid: str | None,
    asked: list[object],
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Nvml(index, uuid).watts() == 250 and card.asked == asked


def test_a_card_that_is_not_there_is_an_os_error(card: FakeNvml) -> None:
    for arguments in ((7, None), (0, "unknown")):
        with pytest.raises(OSError, match="failed"):
            Nvml(*arguments)


def test_an_estimate_is_below_the_boards_power() -> None:
    assert 100 < board_watts("NVIDIA GeForce RTX 3060") < 170
    assert board_watts("Matrox G200") == 200


# Processors.


@pytest.fixture
def rapl(tmp_path: Path) -> Callable[..., None]:
    """rapl(domain, name=..., energy_uj=..., max_energy_range_uj=...) writes a domain's files."""

    def write(domain: str, **values: object) -> None:
        folder = tmp_path / domain
        folder.mkdir(exist_ok=True)
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")

    return write


def two_processors(rapl: Callable[..., None], first: int, second: int) -> None:
    rapl("intel-rapl:0", name="package-0", energy_uj=first, max_energy_range_uj=10_000_000)
    rapl("intel-rapl:0:0", name="core", energy_uj=first, max_energy_range_uj=10_000_000)
    rapl("intel-rapl:0:1", name="dram", energy_uj=first, max_energy_range_uj=10_000_000)
    rapl("intel-rapl:1", name="package-1", energy_uj=second, max_energy_range_uj=10_000_000)
    rapl("intel-rapl:2", name="psys", energy_uj=first, max_energy_range_uj=10_000_000)


def test_processors_and_memory_count_and_go_round(rapl: Callable[..., None], tmp_path: Path, clock: Clock) -> None:
    two_processors(rapl, 1_000_000, 9_000_000)
    meter = of_processor(folder=tmp_path)
    meter.start()
    clock.now += 1
    two_processors(rapl, 3_000_000, 500_000)  # 2 J each of package 0 and its memory; package 1 went round: 1.5 J
    assert meter.read() == pytest.approx(5.5)
    clock.now += 1
    two_processors(rapl, 3_500_000, 600_000)
    meter.stop()
    assert (meter.joules, meter.by) == (pytest.approx(6.6), RAPL)


def test_one_process_counts_a_machine(rapl: Callable[..., None], tmp_path: Path) -> None:
    two_processors(rapl, 1_000_000, 9_000_000)
    meter = of_processor(counts_machine=False, folder=tmp_path)
    meter.start()
    two_processors(rapl, 3_000_000, 9_500_000)
    meter.stop()
    assert (meter.joules, meter.by) == (0, RAPL)


def test_a_processor_that_stops_telling_is_estimated(rapl: Callable[..., None], tmp_path: Path) -> None:
    two_processors(rapl, 0, 0)
    meter = of_processor(folder=tmp_path)
    meter.start()
    rapl("intel-rapl:1", energy_uj="text")
    meter.stop()
    assert meter.by == ESTIMATE


@pytest.mark.parametrize("content", [None, "", "text"])
def test_a_processor_that_tells_nothing_is_estimated(
    rapl: Callable[..., None], tmp_path: Path, content: str | None
) -> None:
    rapl("intel-rapl:0", name="package-0", max_energy_range_uj=10_000_000)
    if content is None:
        (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # as unreadable as one without rights is, for root too
    else:
        rapl("intel-rapl:0", energy_uj=content)
    assert of_processor(folder=tmp_path).by == ESTIMATE
    assert of_processor(folder=tmp_path / "nowhere").by == ESTIMATE


def test_processors_that_stand_still_are_estimated(rapl: Callable[..., None], tmp_path: Path, clock: Clock) -> None:
    two_processors(rapl, 0, 0)  # as some virtual machines show them
    meter = of_processor(folder=tmp_path)
    meter.start()
    clock.now += 10
    meter.stop()
    assert meter.by == ESTIMATE


def test_a_busy_core_of_this_process_and_of_its_children_counts() -> None:
    source = ProcessLoad(watts_per_core=10)
    own = energy.time.process_time()
    while energy.time.process_time() - own < 0.3:
        pass
    assert 3 <= source.take() < 6
    loop = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    living = source.take()
    assert 4.5 <= living < 8  # while it lives
    child.communicate(b"\n")
    assert source.take() < 1.5  # and once it has ended not again
    time.sleep(0.3)
    assert source.take() < 1  # who waits takes nothing


def test_a_meter_without_an_estimate_goes_on_without_its_source() -> None:
    class Broken(energy.Source):
        def begin(self) -> None:
            raise OSError("gone")

        def take(self) -> float:
            raise OSError("gone")

    meter = EnergyMeter(Broken())
    meter.start()
    meter.stop()
    assert (meter.joules, meter.by) == (0, ESTIMATE)


def test_a_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: AMD Ryzen: 5\n")
    assert processor_name(tmp_path / "cpuinfo") == "AMD Ryzen: 5"
    assert processor_name(tmp_path / "nowhere")
