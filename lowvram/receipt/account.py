"""What a training keeps of its own cost while it runs: its session in the run's ledger, renewed with each line.

A line is one of metrics.jsonl. A training that was killed before its first one is not counted, nor is what a kill ends
between two of them; where a step fails, or a signal or the caller ends the training, all of it is.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.receipt.energy import ESTIMATE, EnergyMeter
from lowvram.receipt.ledger import NAME, Receipt, Session
from lowvram.receipt.rates import Rates, amount, co2, energy, hours
from lowvram.receipt.stands_on import StandsOn

Sum = Callable[[Sequence[float]], Sequence[float]]  # of each number, over all processes


def session(
    *, contributor: str, machine: str, cards: int, rates: Rates, version: str, torch: str, vram: str | None
) -> Session:
    """A session that begins now and has taken nothing; see `Session` for what is what."""
    now = _now()
    return Session(
        id=uuid.uuid4().hex,
        contributor=_shown(contributor),
        machine=_shown(machine),
        cards=cards,
        begun=now,
        ended=now,
        first_image=0,
        last_image=0,
        seconds=0.0,
        joules=0.0,
        energy_by=ESTIMATE,
        per_hour=rates.per_hour,
        per_kwh=rates.per_kwh,
        grams_per_kwh=rates.grams_per_kwh,
        currency=rates.currency,
        version=version,
        torch=torch,
        vram=vram or "",
    )


class Account:
    """The costs of one process' training, and those of the run before it.

    Time and energy count within `measuring` alone: while a trainer is made and while it iterates, the caller's own code
    between two steps included, but not what a notebook does between.

    Args:
        session: from `session`, in the main process' account the one that is written.
        meter: of this process' card or processor.
        total: sums numbers over all processes, which call it together.
        is_main: whether this process writes. shows_money: on each progress line, since the user named a price.
    """

    def __init__(
        self,
        session: Session,
        meter: EnergyMeter,
        *,
        say: Callable[[str], None],
        total: Sum = lambda numbers: numbers,
        is_main: bool = True,
        shows_money: bool = False,
    ) -> None:
        self.session = session
        self.before = Receipt()
        self.meter = meter
        self._say, self._total, self._is_main, self._shows_money = say, total, is_main, shows_money
        self._seconds = 0.0
        self._started: float | None = None
        self._begun = False  # training, so that there is something to write
        self._folder: Path | None = None
        self._others = float(session.cards)  # what all processes have taken for each joule of this one
        self._logged = (0.0, 0.0)  # seconds and joules at the last line
        self._told = False

    # Measuring.

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count time and energy within."""
        self._start()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Don't, within `measuring`: something else runs that has an account of its own."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    @contextmanager
    def training(self, images_seen: Callable[[], int]) -> Iterator[None]:
        """Measure within; however that ends, the ledger then holds all of it."""
        with self.measuring():
            try:
                yield
            finally:
                self._end(images_seen())

    def _start(self) -> None:
        if self._started is None:
            self.meter.start()
            self._started = time.perf_counter()

    def _stop(self) -> None:
        self._seconds, self._started = self.seconds(), None
        self.meter.stop()

    def seconds(self) -> float:
        """Measured up to now."""
        return self._seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    # The ledger.

    def open(self, folder: Path, saved: Any, images_seen: int) -> None:
        """Take over what was before: from the folder's receipt, and from the ledger `saved` in a checkpoint.

        images_seen: of the checkpoint, 0 for none. A receipt that can't be read is set aside.
        """
        self._folder = folder
        try:
            self.before = Receipt.read(folder)
        except LowVRAMError as error:
            aside = folder / f"{NAME}.bad"
            self._on_disk(lambda: (folder / NAME).replace(aside))
            self._say(f"{error.problem} It is set aside as {aside.name}; costs go on from the checkpoint's.")
        try:
            self.before = self.before.joined(Receipt.of(saved or []).sessions)
        except ValueError as error:
            self._say(f"the checkpoint's record of costs can't be read: {error}")
        if images_seen and not self.before.sessions:
            self._say(f"what the run took up to {images_seen / 1000:g} kimg is not known; its costs count from there")

    def begin(self, images_seen: int) -> None:
        """Training begins, or goes on. All processes call it."""
        if not self._begun:
            self.session = replace(self.session, first_image=images_seen)
        self._begun = True
        self.renew(images_seen)
        self._logged = (self.session.seconds, self.session.joules)

    def renew(self, images_seen: int) -> None:
        """Bring the session up to now. All processes call it."""
        own = self.meter.read()
        joules, estimated = self._total([own, float(self.meter.by == ESTIMATE)])
        if own > 0:
            self._others = joules / own
        self._update(images_seen, joules, ESTIMATE if estimated else self.meter.by)

    def receipt(self) -> Receipt:
        """All sessions up to now."""
        return self.before.joined([self.session]) if self._begun else self.before

    def write(self) -> None:
        """Write receipt.json. A full disk is said once and stops nothing."""
        if self._is_main and self._folder is not None and self.receipt().sessions:
            folder = self._folder
            self._on_disk(lambda: self.receipt().write(folder))

    def short(self) -> str:
        """For a progress line."""
        return short(self.receipt(), with_money=self._shows_money)

    def say_all(self) -> None:
        """Tell what the run took, and of a run that it stands on, whose costs are its own, what that took before it."""
        receipt = self.receipt()
        rates = {session.rates for session in receipt.sessions}
        self._say(f"took {in_words(receipt)}" + (f" ({self.session.rates})" if len(rates) == 1 else ""))
        try:
            earlier = None if self._folder is None else StandsOn.read(self._folder)
        except LowVRAMError as error:
            self._say(error.problem)
            return
        if earlier is not None:
            took = in_words(earlier.receipt) if earlier.receipt.sessions else "what it took is not known"
            self._say(f"and before it {earlier.name()}, not in that: {took}")

    def values(self) -> dict[str, Any]:
        """For a line of metrics: sums over the run's sessions, and the power since the last line."""
        sums = self.receipt().totals()
        seconds, joules = self.session.seconds - self._logged[0], self.session.joules - self._logged[1]
        self._logged = (self.session.seconds, self.session.joules)
        values: dict[str, Any] = {"kwh": sums.kwh, "card_hours": sums.card_hours, "co2_g": sums.co2_grams}
        if len(sums.money) == 1:
            ((currency, cost),) = sums.money.items()
            values["cost"] = cost
            if currency:
                values["currency"] = currency
        else:
            values |= {f"cost/{currency or 'unnamed'}": cost for currency, cost in sums.money.items()}
        values["watts"] = joules / seconds if seconds > 0 else 0.0
        if sums.images_per_kwh is not None:
            values["images_per_kwh"] = sums.images_per_kwh
        return values

    def _end(self, images_seen: int) -> None:
        """As `renew` and `write`, of this process alone: others may have failed, and are taken to go on as before."""
        if self._begun:
            own = self.meter.read()
            self._update(images_seen, own * self._others, self.session.energy_by)
            self.write()

    def _update(self, images_seen: int, joules: float, by: str) -> None:
        self.session = replace(
            self.session,
            last_image=images_seen,
            ended=_now(),
            seconds=self.seconds(),
            joules=max(joules, self.session.joules),
            energy_by=by,
        )

    def _on_disk(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            if not self._told:
                self._say(f"{NAME} could not be written: {error}. Training goes on.")
            self._told = True


def short(receipt: Receipt, *, with_money: bool = False) -> str:
    """A piece of a progress line, such as "0.41 kWh est., cost $0.12". with_money: also where it is next to nothing."""
    sums = receipt.totals()
    paid = {currency: cost for currency, cost in sums.money.items() if with_money or cost >= 1}
    return ", ".join([f"{energy(sums.kwh)}{' est.' if ESTIMATE in sums.energy_by else ''}", *_money(paid)])


def in_words(receipt: Receipt) -> str:
    """What a run took, in a line; by whom, where several lent machines."""
    sums = receipt.totals()
    estimated = " (estimated)" if ESTIMATE in sums.energy_by else ""
    parts = [hours(sums.card_hours), f"{energy(sums.kwh)}{estimated}", *_money(sums.money), co2(sums.co2_grams)]
    line = ", ".join(parts)
    if sums.first_image:
        line += f", since {sums.first_image / 1000:g} kimg: what was before is not known"
    by = receipt.by_contributor()
    if len(by) > 1:
        each = [f"{who or 'unnamed'} {hours(part.card_hours)} and {energy(part.kwh)}" for who, part in by.items()]
        line += f"; by {', '.join(each)}"
    return line


def _money(money: Mapping[str, float]) -> list[str]:
    return [f"cost {' + '.join(amount(cost, currency) for currency, cost in money.items())}"] if money else []


def _shown(text: str) -> str:
    """What a receipt takes of a text: it is shown in terminals and pages."""
    return "".join(letter for letter in text if letter.isprintable())[:200]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
