"""What NVIDIA's management library (NVML) says of a card as a whole: bytes in use by everybody, and energy.

It makes no CUDA context, which would be in what it measures. Cards are told apart by their index, not by the UUID that
torch would tell, for that would use CUDA.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from lowvram.memory import guard
from lowvram.receipt.nvml import Nvml

_WATCH_SECONDS = 0.005
_ENERGY_SECONDS = 1.0  # the driver renews its counter every tenth of a second or so
_MOST_RUNS = 10_000


def order_by_bus() -> None:
    """Let CUDA count its cards as NVML does, unless the user decided. To be called before CUDA is used."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def nvml(device: torch.device) -> Nvml | None:
    """The card's, or None: of no card, or where there is no NVML."""
    if device.type == "cuda":
        with suppress(OSError):
            return Nvml(device.index or 0)
    return None


class DevicePeak:
    """The most that is in use of a whole device, less what was before: by NVML while it runs, else when looked at.

    To be made before CUDA is used, so that this process's context counts. by: "NVML", or "cudaMemGetInfo", which makes
    a context and can't tell what others had before; None: of a CPU, where nothing is looked at.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak_bytes = self._before_bytes = 0
        self.by: str | None = None
        self._used: Callable[[], int] | None = None
        if device.type != "cuda":
            return
        card = nvml(device)
        with suppress(OSError):
            if card is not None:
                self._before_bytes, self._used, self.by = card.used_bytes(), card.used_bytes, "NVML"
        if self._used is None:
            self._used, self.by = (lambda: guard.used_and_total_bytes(device)[0]), "cudaMemGetInfo"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look all the time within."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_WATCH_SECONDS):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        if self.by == "NVML":
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.ident is not None:
                thread.join()

    def look(self) -> None:
        """Note what is in use now."""
        if self._used is not None:
            with suppress(OSError):  # once in a while it is busy
                self.peak_bytes = max(self.peak_bytes, self._used() - self._before_bytes)


def joules(run: Callable[[], object], device: torch.device, *, least_seconds: float = _ENERGY_SECONDS) -> float | None:
    """Energy that the card takes for one run, the mean of as many as fit a second; None where it can't be told."""
    card = nvml(device)
    if card is None:
        return None
    try:
        torch.cuda.synchronize(device)
        before, begun, runs = card.energy_joules(), time.perf_counter(), 0
        while time.perf_counter() - begun < least_seconds and runs < _MOST_RUNS:
            run()
            torch.cuda.synchronize(device)
            runs += 1
        return (card.energy_joules() - before) / runs
    except OSError:
        return None
