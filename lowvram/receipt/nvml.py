"""What NVIDIA's management library (NVML) says of a card as a whole: bytes in use by everybody, power and energy.

It makes no CUDA context, which would be in what it measures. The library nvidia-ml-py speaks to it.
"""

import os
from collections.abc import Callable
from typing import Any


class Nvml:
    """One card.

    Args:
        index: as CUDA counts it, among CUDA_VISIBLE_DEVICES, in the order of the PCI bus.
        uuid: as torch gives it, without "GPU-"; it holds in any order, and the index is for where it is not known.

    Raises:
        OSError: there is no such library or card.
    """

    def __init__(self, index: int = 0, uuid: str | None = None) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise OSError(f"nvidia-ml-py is not installed: {error}") from None
        self._library: Any = pynvml
        self._ask("nvmlInit")
        self._handle = self._of_uuid(uuid) if uuid else self._of_index(index)

    def used_bytes(self) -> int:
        """In use by all programs."""
        return int(self._ask("nvmlDeviceGetMemoryInfo", self._handle).used)

    def watts(self) -> float:
        """What the card draws now; before Ampere the mean of about a second.

        Raises:
            OSError: it can't be told (a slice of a card, some laptops).
        """
        return float(self._ask("nvmlDeviceGetPowerUsage", self._handle)) / 1e3

    def energy_joules(self) -> float:
        """What the card has taken since its driver was loaded; renewed several times a second.

        Raises:
            OSError: it does not count that (before Volta, or a slice of a card).
        """
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)) / 1e3

    def _of_index(self, index: int) -> Any:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = [word.strip() for word in visible.split(",")] if visible else []
        word = words[index] if index < len(words) else str(index)
        if word.isdecimal():
            return self._ask("nvmlDeviceGetHandleByIndex", int(word))
        return self._ask("nvmlDeviceGetHandleByUUID", word)  # GPU-... or MIG-...

    def _of_uuid(self, uuid: str) -> Any:
        try:
            return self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
        except OSError:
            return self._ask("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")

    def _ask(self, function: str, *arguments: Any) -> Any:
        call: Callable[..., Any] | None = getattr(self._library, function, None)
        if call is None:
            raise OSError(f"{function} is not in this NVML")
        try:
            return call(*arguments)
        except self._library.NVMLError as error:
            raise OSError(f"{function} failed: {error}") from None
