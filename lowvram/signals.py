"""SIGINT and SIGTERM ask training to finish its step and save; a second Ctrl-C ends it at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SAME_SECONDS = 2.0  # a terminal and a launcher both pass on one Ctrl-C


class StopRequest:
    """Whether a signal has asked to stop. Outside `listening` signals mean what they always do.

    SIGTERM is a scheduler's, which may say it twice and loses patience with SIGKILL: it never ends training unsaved.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.asked = False
        self._tell = tell
        self._asked_at = 0.0
        self._saving = False
        self._interrupted = False  # by Ctrl-C, and not by a scheduler alone
        self._impatient = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the first signal; signals can be caught in the main thread only, elsewhere this does nothing."""
        self.asked = self._interrupted = self._impatient = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, a second Ctrl-C waits for the end, which is near; a third does not."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
            self._interrupted = number == signal.SIGINT
            more = "; once more, from two seconds on, stops at once, unsaved" if self._interrupted else ""
            self._say(f"{name}: finishing the step, then saving{more}")
        elif number == signal.SIGINT and not self._interrupted:
            self._interrupted, self._asked_at = True, now
            self._say(f"{name}: saving is under way already; once more, from two seconds on, stops at once, unsaved")
        elif number == signal.SIGINT and now - self._asked_at > _SAME_SECONDS:
            if not self._saving or self._impatient:
                raise KeyboardInterrupt
            self._impatient = True
            self._say(f"{name}: saving, which takes a moment; once more stops at once, unsaved")

    def _say(self, message: str) -> None:
        with suppress(RuntimeError, OSError):  # the signal may have come within a print, where another is refused
            self._tell(message)
