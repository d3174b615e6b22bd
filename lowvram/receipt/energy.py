"""The energy of a training: measured by NVML on a card and by RAPL on a processor, else estimated and said to be.

A card is measured alone, without the machine round it; a processor with all that runs on it. Both count what other
programs take at the same time, for neither can tell them apart. An estimate on a processor is of this process alone.
"""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lowvram.receipt.nvml import Nvml

NVML, RAPL, ESTIMATE = "NVML", "RAPL", "estimate"
# For each busy core, memory and losses included. Desktop processors are specified at 65 to 125 W for 6 to 16 cores,
# those of laptops at 15 to 45 W for 4 to 14, of servers at 200 to 360 W for 28 to 96: 3 to 11 W a core, plus memory and
# a power supply that loses a tenth.
WATTS_PER_CORE = 10.0
_POWERCAP = Path("/sys/class/powercap")
_POWER_SECONDS = 0.2  # between looks at the power
_RAPL_SECONDS = 60.0  # a processor's counter is round after ten minutes at the soonest
_STILL_SECONDS = 2.0  # a counter that stood still for longer counts nothing: nothing draws no power
_MOST_WATTS = 5000.0  # of a card or a machine; a jump beyond that is no energy


class Source(ABC):
    """Something that knows a part of the energy.

    by: NVML, RAPL or ESTIMATE. every_seconds: it must be asked as often as that; None: whenever.
    """

    by: str = ESTIMATE
    every_seconds: float | None = None

    @abstractmethod
    def begin(self) -> None:
        """Count from now. Raises OSError."""

    @abstractmethod
    def take(self) -> float:
        """Joules since `begin` or the last call. Raises OSError, and then counts from now if it can."""


class CardCounter(Source):
    """A card's own count of its energy."""

    by = NVML

    def __init__(self, card: Nvml) -> None:
        self._card = card
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._last_joules, self._last_seconds = self._card.energy_joules(), time.perf_counter()

    def take(self) -> float:
        """Joules since then."""
        before, begun = self._last_joules, self._last_seconds
        self.begin()
        return _credible(self._last_joules - before, self._last_seconds - begun)


class CardPower(Source):
    """The sum of a card's power over time, of looks at it in between."""

    by = NVML
    every_seconds = _POWER_SECONDS

    def __init__(self, card: Nvml) -> None:
        self._card = card
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._last_watts, self._last_seconds = self._card.watts(), time.perf_counter()

    def take(self) -> float:
        """Joules since then: the trapezoid under two looks."""
        before, begun = self._last_watts, self._last_seconds
        self.begin()
        return (before + self._last_watts) / 2 * (self._last_seconds - begun)


class Constant(Source):
    """So many watts all the time. watts: asked when it is first needed."""

    def __init__(self, watts: Callable[[], float]) -> None:
        self._ask = watts
        self._watts: float | None = None
        self._begun = time.perf_counter()

    def begin(self) -> None:
        """Count from now."""
        self._begun = time.perf_counter()

    def take(self) -> float:
        """Joules since then."""
        if self._watts is None:
            self._watts = self._ask()
        begun, self._begun = self._begun, time.perf_counter()
        return (self._begun - begun) * self._watts


class Processors(Source):
    """The energy of a machine's processors and their memory, by RAPL: of Intel's and AMD's, in Linux.

    Raises:
        OSError: there is none, or it can't be read, which often takes the administrator.
    """

    by = RAPL
    every_seconds = _RAPL_SECONDS

    def __init__(self, folder: Path = _POWERCAP) -> None:
        self._domains = [path for path in sorted(folder.glob("intel-rapl:*")) if _is_whole(path)]
        if not any(_name(path).startswith("package") for path in self._domains):
            raise OSError(f"no processor's energy in {folder}")
        self._range = {path: _number(path / "max_energy_range_uj") for path in self._domains}
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._last = {path: _number(path / "energy_uj") for path in self._domains}
        self._last_seconds = time.perf_counter()

    def take(self) -> float:
        """Joules since then. A counter that is lower than before has been round once."""
        before, begun = self._last, self._last_seconds
        self.begin()
        microjoules = 0
        for path, now in self._last.items():
            microjoules += now - before[path] + (self._range[path] if now < before[path] else 0)
        return _credible(microjoules / 1e6, self._last_seconds - begun)


class ProcessLoad(Source):
    """An estimate: the processor time of this process and all below it, at so many watts a busy core."""

    def __init__(self, watts_per_core: float = WATTS_PER_CORE) -> None:
        self._watts = watts_per_core
        self._ended = 0.0
        self._living: dict[tuple[int, float], float] = {}
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._last_seconds = self._core_seconds()

    def take(self) -> float:
        """Joules since then."""
        before = self._last_seconds
        self.begin()
        return max(0.0, self._last_seconds - before) * self._watts

    def _core_seconds(self) -> float:
        """Seconds that cores worked for this process, its children that live, and those that have ended."""
        import psutil

        times = os.times()
        living = {}
        with suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    used = child.cpu_times()
                    below = getattr(used, "children_user", 0.0) + getattr(used, "children_system", 0.0)
                    living[child.pid, child.create_time()] = used.user + used.system + below
        if os.name == "nt":  # where the system forgets those that ended; elsewhere they are in `times`
            self._ended += sum(seconds for key, seconds in self._living.items() if key not in living)
            self._living = living
        return time.process_time() + times.children_user + times.children_system + self._ended + sum(living.values())


class Nothing(Source):
    """The part of a process whose energy another one counts."""

    def __init__(self, by: str) -> None:
        self.by = by

    def begin(self) -> None:
        """Nothing."""

    def take(self) -> float:
        """Nothing."""
        return 0.0


class EnergyMeter:
    """Adds up a source's energy while it runs; where that fails, the estimate's for so long.

    joules: up to the last `read`. by: how it was measured, ESTIMATE once a part of it is one.
    """

    def __init__(self, source: Source, estimate: Source | None = None) -> None:
        self.joules = 0.0
        self.by = source.by
        self._source, self._estimate = source, estimate
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None
        self._running = False
        self._lost = False  # the source doesn't know from when it counts

    def start(self) -> None:
        """Begin to measure, unless that is being done."""
        if self._running:
            return
        self._lost = not self._begun()
        if self._estimate is not None:
            self._estimate.begin()
        self._running = True
        if self._source.every_seconds is not None:
            self._stop = threading.Event()
            threading.Thread(target=self._look, args=(self._stop,), name="energy", daemon=True).start()

    def stop(self) -> None:
        """Stop measuring."""
        self.read()
        self._running = False
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def read(self) -> float:
        """Joules up to now."""
        with self._lock:
            if self._running:
                self.joules += self._taken()
            return self.joules

    def _taken(self) -> float:
        """Joules since the last time: the source's, or, where it fails or has failed before, the estimate's."""
        if not self._lost:
            with suppress(OSError):
                joules = self._source.take()
                if self._estimate is not None:
                    self._estimate.begin()
                return joules
        self._lost = not self._begun()  # from now on, so that nothing counts twice
        self.by = ESTIMATE
        return 0.0 if self._estimate is None else self._estimate.take()

    def _begun(self) -> bool:
        try:
            self._source.begin()
        except OSError:
            return False
        return True

    def _look(self, stop: threading.Event) -> None:
        assert self._source.every_seconds is not None
        while not stop.wait(self._source.every_seconds):
            self.read()


def of_card(index: int, uuid: str | None, watts: Callable[[], float]) -> EnergyMeter:
    """The meter of a card, by the best that it offers. index, uuid: see `Nvml`. watts: an estimate of its power."""
    estimate = Constant(watts)
    with suppress(OSError):
        card = Nvml(index, uuid)
        with suppress(OSError):
            return EnergyMeter(CardCounter(card), estimate)
        return EnergyMeter(CardPower(card), estimate)
    return EnergyMeter(estimate)


def of_processor(*, counts_machine: bool = True, folder: Path = _POWERCAP) -> EnergyMeter:
    """The meter of a process on a processor. counts_machine: whether it is this process that counts the machine's."""
    try:
        machine = Processors(folder)
    except OSError:
        return EnergyMeter(ProcessLoad())
    return EnergyMeter(machine, ProcessLoad()) if counts_machine else EnergyMeter(Nothing(RAPL))


def _credible(joules: float, seconds: float) -> float:
    """The energy, or OSError where a counter can't have meant it: begun anew, standing still, or jumping."""
    if joules < 0 or joules > _MOST_WATTS * (seconds + 1) or (joules == 0 and seconds > _STILL_SECONDS):
        raise OSError(f"{joules} J in {seconds:.1f} s are not what was drawn")
    return joules


def _is_whole(path: Path) -> bool:
    """Whether a domain is a processor or its memory, and no part of another (cores, graphics)."""
    name = _name(path)
    return name.startswith("package") or name == "dram"


def _name(path: Path) -> str:
    try:
        return (path / "name").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except ValueError as error:
        raise OSError(f"{path} holds no number: {error}") from None
