"""SIGINT and SIGTERM ask training to finish its step and save; a second one ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal has asked to stop. Outside `listening` signals mean what they always do."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.asked = False
        self._tell = tell

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the first signal; signals can be caught in the main thread only, elsewhere this does nothing."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._tell(f"{signal.Signals(number).name}: finishing the step, then saving; once more stops at once, unsaved")
