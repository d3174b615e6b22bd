"""The width of the arithmetic: chosen by card, autocast round a phase, and the loss scale that fp16 needs."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lowvram.errors import LowVRAMError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_SCALE = 2.0**24  # a phase whose gradients are all zero would otherwise double it until it overflows itself


def choose(name: str, device: torch.device) -> str:
    """The precision for a device: `auto` is bf16 where a CUDA card has it and fp16 on other cards; fp32 off CUDA.

    Raises:
        LowVRAMError: the name is not known, or bf16 is asked of a card that would only emulate it (RTX 20xx and older).
    """
    if name not in ("auto", "fp32", *_DTYPES):
        raise LowVRAMError(f"precision={name} is not known.", f"Use one of auto, fp32, {', '.join(_DTYPES)}.")
    if device.type != "cuda":
        return "fp32" if name == "auto" else name
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp16"
    if name == "bf16" and not _has_bf16(device):
        raise LowVRAMError(
            f"precision=bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic and would emulate it.",
            "Use precision=fp16 (with loss scaling), or precision=auto.",
        )
    return name


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for a phase: "bf16" or "fp16"; nothing for "fp32".

    The weight cache is off. It keeps a narrow copy of every weight until the context ends (1.4 GiB for SD 1.5), which
    checkpointing does not free, and it would go on using a weight that has been streamed out or updated since.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision], cache_enabled=False)


class LossScale:
    """The factor that keeps fp16 gradients above zero; a power of two, so that taking it out again is exact.

    It halves after a step whose gradients are not finite (the trainer redoes or skips that step) and doubles after
    `growth_every` finite ones.

    Args:
        init: the first factor, at least 1. growth_every: finite steps before it doubles.
    """

    def __init__(self, init: float = 2.0**16, growth_every: int = 2000) -> None:
        if init < 1 or growth_every < 1:
            raise ValueError(f"init={init} and growth_every={growth_every} must be at least 1")
        self.scale = float(init)
        self.growth_every = growth_every
        self.exhausted = False  # the gradients were not finite at scale 1: no scale will help
        self._finite_steps = 0

    def update(self, finite: bool) -> None:
        """Take in whether the gradients of a step were all finite."""
        if not finite:
            self.exhausted = self.scale == 1.0
            self.scale = max(1.0, self.scale / 2)
            self._finite_steps = 0
            return
        self.exhausted = False
        self._finite_steps += 1
        if self._finite_steps >= self.growth_every:
            self.scale = max(self.scale, min(2 * self.scale, _LARGEST_SCALE))
            self._finite_steps = 0

    def state(self) -> dict[str, Any]:
        """Numbers for a checkpoint."""
        return {"scale": self.scale, "finite_steps": self._finite_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.scale, self._finite_steps = float(state["scale"]), int(state["finite_steps"])
        self.exhausted = False


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):  # the question is answered for the current device
        return torch.cuda.is_bf16_supported(including_emulation=False)
