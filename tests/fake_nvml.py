"""A stand-in for the module of nvidia-ml-py: two cards, and what they are asked."""

import sys
import time
from types import SimpleNamespace

import pytest


class NVMLError(Exception):
    """As the library's."""


class FakeNvml:
    """Cards that take 250 W. used: what the next questions after memory are answered; the last one stays.

    counts_energy, tells_power: whether they can. joules: of the counter, None: what 250 W make of the time.
    """

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.used = [100]
        self.counts_energy = self.tells_power = self.is_there = True
        self.joules: float | None = None
        self.watts = 250.0
        self.asked: list[object] = []

    def nvmlInit(self) -> None:
        self._must(self.is_there)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        self._must(index < 2)
        return f"card {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        self._must("unknown" not in uuid and not (uuid.startswith("GPU-") and "slice" in uuid))
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=self.used.pop(0) if len(self.used) > 1 else self.used[0])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._must(self.counts_energy)
        return int((time.perf_counter() * 250 if self.joules is None else self.joules) * 1e3)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._must(self.tells_power)
        return int(self.watts * 1e3)

    def _must(self, can: bool) -> None:
        if not can:
            raise NVMLError("not supported")


def install(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Let it be what `import pynvml` finds."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake
