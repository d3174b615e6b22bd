"""The account of a process while it trains: what it counts, what it writes, and what it takes over."""

from pathlib import Path
from typing import Any

import pytest

from lowvram.receipt import account
from lowvram.receipt.account import Account, in_words, session, short
from lowvram.receipt.energy import ESTIMATE, NVML, EnergyMeter, Source
from lowvram.receipt.ledger import NAME, Receipt
from lowvram.receipt.rates import Rates
from lowvram.receipt.stands_on import StandsOn


class Clock:
    """Stands for time.perf_counter."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Steady(Source):
    """100 W by the clock, as if measured."""

    by = NVML

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def begin(self) -> None:
        self._begun = self._clock.now

    def take(self) -> float:
        before = self._begun
        self.begin()
        return 100 * (self._begun - before)


class Machine:
    """Opens accounts of one run folder, and keeps what they say."""

    def __init__(self, clock: Clock, folder: Path) -> None:
        self.clock, self.folder = clock, folder
        self.said: list[str] = []

    def open(self, saved: Any = None, images_seen: int = 0, price: str | None = None, **values: Any) -> Account:
        rates = Rates.of(price, None, None)
        names = {"contributor": "", "cards": 1, **{k: values.pop(k) for k in ("contributor", "cards") if k in values}}
        begun = session(machine="a\ncard", rates=rates, version="0", torch="2", vram=None, **names)
        found = Account(begun, EnergyMeter(Steady(self.clock)), say=self.said.append, **values)
        found.open(self.folder, saved, images_seen)
        return found

    def train(self, found: Account, images: tuple[int, int], seconds: float, *, logs: bool = True) -> None:
        with found.training(lambda: images[1]):
            found.begin(images[0])
            self.clock.now += seconds
            if logs:
                found.renew(images[1])
                found.write()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    clock = Clock()
    monkeypatch.setattr(account, "time", clock)
    return Machine(clock, tmp_path)


def test_making_and_training_count_and_what_lies_between_does_not(machine: Machine) -> None:
    found = machine.open()
    with found.measuring():
        machine.clock.now += 5
        with found.paused():
            machine.clock.now += 1000  # an autoencoder is trained, which has a receipt of its own
        machine.clock.now += 2
    machine.clock.now += 10_000  # a notebook waits
    assert not (machine.folder / NAME).exists()
    machine.train(found, (0, 64), 10)
    machine.clock.now += 10_000
    machine.train(found, (64, 96), 3)
    (kept,) = Receipt.read(machine.folder).sessions
    assert (kept.seconds, kept.joules, kept.energy_by) == (20, 2000, NVML)
    assert (kept.first_image, kept.last_image, kept.machine) == (0, 96, "acard")


def test_sums_go_on_over_sessions_and_nothing_counts_twice(machine: Machine) -> None:
    first = machine.open(contributor="Ann")
    machine.train(first, (0, 100), 10)
    saved = first.receipt().plain()  # in a checkpoint at image 100
    machine.train(first, (100, 150), 7)  # and then killed: 50 images are lost
    second = machine.open(saved, 100, contributor="Bob", price="$3.6/h")
    machine.train(second, (100, 200), 20)
    sums = Receipt.read(machine.folder).totals()
    assert (sums.sessions, sums.seconds, sums.images) == (2, 37, 250)
    assert sums.kwh == pytest.approx(3700 / 3.6e6)
    assert sums.money == {"": pytest.approx(1700 / 3.6e6 * 0.3), "$": pytest.approx(20 / 1000)}
    assert second.values()["card_hours"] == 37 / 3600
    assert "by Ann 17 s and" in in_words(second.receipt()) and "Bob 20 s and" in in_words(second.receipt())


def test_a_branch_takes_the_ledger_of_its_checkpoint_alone(machine: Machine, tmp_path: Path) -> None:
    first = machine.open()
    machine.train(first, (0, 100), 10)
    saved = first.receipt().plain()
    machine.train(first, (100, 900), 90)
    machine.folder = tmp_path / "branch"
    machine.folder.mkdir()
    branch = machine.open(saved, 100)
    machine.train(branch, (100, 120), 5)
    assert Receipt.read(machine.folder).totals().seconds == 15
    both = Receipt.read(machine.folder).joined(Receipt.read(tmp_path).sessions)
    assert both.totals().seconds == 105  # put together again, what they share counts once


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_fails_counts(machine: Machine, error: type[BaseException]) -> None:
    found = machine.open()

    def fail() -> None:
        with found.training(lambda: 8):
            found.begin(0)
            machine.clock.now += 4
            raise error

    with pytest.raises(error):
        fail()
    assert Receipt.read(machine.folder).totals().seconds == 4


def test_a_greeting_that_fails_does_not_count(machine: Machine) -> None:
    found = machine.open()
    with pytest.raises(ValueError, match="greeting"), found.training(lambda: 0):
        raise ValueError("greeting")
    assert not (machine.folder / NAME).exists()


def test_of_several_processes_the_energy_is_the_sum(machine: Machine) -> None:
    def total(numbers: Any) -> list[float]:  # the others take three times as much, one of them by an estimate
        return [numbers[0] * 4, numbers[1] + 1]

    found = machine.open(cards=4, total=total)
    machine.train(found, (0, 8), 10)
    with pytest.raises(ValueError, match="step"), found.training(lambda: 8):
        machine.clock.now += 10
        raise ValueError("step")  # nobody can be asked now
    (kept,) = Receipt.read(machine.folder).sessions
    assert (kept.joules, kept.energy_by, kept.card_hours) == (8000, ESTIMATE, 80 / 3600)


def test_other_processes_write_nothing(machine: Machine) -> None:
    machine.train(machine.open(is_main=False), (0, 8), 10)
    assert not (machine.folder / NAME).exists()


def test_a_receipt_that_can_not_be_read_is_set_aside(machine: Machine) -> None:
    first = machine.open()
    machine.train(first, (0, 100), 10)
    (machine.folder / NAME).write_text("{")
    second = machine.open(first.receipt().plain(), 100)
    assert (machine.folder / "receipt.json.bad").read_text() == "{"
    assert "receipt.json.bad" in machine.said[-1]
    machine.train(second, (100, 120), 5)
    assert Receipt.read(machine.folder).totals().seconds == 15


def test_a_checkpoint_with_something_else_for_a_ledger_stops_nothing(machine: Machine) -> None:
    machine.train(machine.open([{"id": 5}], 100), (100, 120), 5)
    assert "can't be read" in machine.said[0]
    assert Receipt.read(machine.folder).totals().first_image == 100


def test_costs_of_older_versions_are_said_to_be_unknown(machine: Machine) -> None:
    found = machine.open(None, 5000)
    assert "up to 5 kimg is not known" in machine.said[0]
    machine.train(found, (5000, 6000), 60)
    found.say_all()
    assert "since 5 kimg" in machine.said[-1]


def test_a_full_disk_is_said_once_and_stops_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    found = machine.open()
    monkeypatch.setattr(Receipt, "write", full)
    machine.train(found, (0, 8), 10)
    assert len(machine.said) == 1 and "No space left" in machine.said[0]


def test_a_line_of_metrics(machine: Machine) -> None:
    found = machine.open(price="$36/h", cards=2)
    with found.measuring():
        machine.clock.now += 100
    with found.training(lambda: 64):
        found.begin(0)
        machine.clock.now += 100
        found.renew(64)
        values = found.values()
    assert values == {
        "kwh": pytest.approx(20_000 / 3.6e6),
        "card_hours": pytest.approx(400 / 3600),
        "co2_g": pytest.approx(20_000 / 3.6e6 * 400),
        "cost": pytest.approx(4.0),
        "currency": "$",
        "watts": pytest.approx(100.0),  # of the interval, not of what came before
        "images_per_kwh": pytest.approx(64 * 3.6e6 / 20_000),
    }
    assert short(found.receipt()) == "5.6 Wh, cost $4.00"


def test_money_of_several_currencies_is_not_added_up(machine: Machine) -> None:
    machine.train(machine.open(price="$36/h"), (0, 8), 100)
    found = machine.open(price="36 EUR/h")
    machine.train(found, (8, 16), 100)
    values = found.values()
    assert (values["cost/$"], values["cost/EUR"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert not {"cost", "currency"} & values.keys()
    assert "cost $1.00 + 1.00 EUR" in in_words(found.receipt())


def test_next_to_nothing_is_told_only_of_a_named_price(machine: Machine) -> None:
    found = machine.open()
    machine.train(found, (0, 8), 36)
    assert found.short() == "1 Wh"
    assert short(found.receipt(), with_money=True) == "1 Wh, cost under 0.001"


def test_the_run_before_is_named_and_not_added(machine: Machine, tmp_path: Path) -> None:
    machine.train(machine.open(), (0, 8), 36)
    first, machine.folder = machine.folder, tmp_path / "second"
    machine.folder.mkdir()
    StandsOn(run="vae-2", recipe="vae", checkpoint="sha256:5", receipt=Receipt.read(first)).write(machine.folder)
    for took in ("72 s, 2 Wh", "2.4 min, 4 Wh"):  # the second is a session that goes on
        found = machine.open()
        machine.train(found, (0, 8), 72)
        found.say_all()
        assert machine.said[-2].startswith(f"took {took},")
        assert "before it vae-2 (recipe vae, sha256:5), not in that: 36 s, 1 Wh" in machine.said[-1]
    (machine.folder / "stands_on.json").write_text('{"run": 5}')
    found.say_all()
    assert "stands_on.json can't be read: run is 5" in machine.said[-1]
    assert StandsOn.read(first) is None
