"""What a training does when memory runs out: free what the try held, become thriftier, and go on without loss."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.memory.apply import Applied
from lowvram.memory.ladder import thriftier
from lowvram.memory.recovery import OutOfMemory, Snapshot, free_memory, retry
from lowvram.phase import Phase

Result = TypeVar("Result")


class Rescue:
    """Runs the parts of a step so that running out of memory changes neither its data nor its random numbers.

    Args:
        applied: whose policy becomes thriftier.
        networks: all whose buffers a phase may change.
        say: tells the user what happened.
    """

    def __init__(self, applied: Applied, networks: Iterable[nn.Module], say: Callable[[str], None]) -> None:
        self.applied, self.say = applied, say
        self._snapshot = Snapshot(networks, applied.device)

    def redo(self, phase: Phase, run: Callable[[], Result]) -> Result:
        """Run what makes the gradients of a phase; out of memory, again from its start under the next policy.

        Raises:
            LowVRAMError: there is no thriftier policy, or weights were changed already (update=fused), or other
                processes take part, which can't know.
        """
        self._snapshot.take()

        def recover(failure: OutOfMemory) -> bool:
            self._check_alone(phase, failure)
            reserved_bytes = _reserved_bytes(self.applied.device)
            self.applied.discard(phase)
            self._snapshot.restore()
            free_memory(self.applied.device)
            found = thriftier(self.applied.policy, self.applied.facts(phase))
            if found is None:
                raise self._given_up(f"phase {phase.name}", failure, reserved_bytes)
            policy, what = found
            self.applied.change(policy)
            self.say(f"out of memory in phase {phase.name} ({_wanted(failure)}): {what}; the step is done again")
            return True

        return retry(run, recover)

    def resume(self, phase: Phase, run: Callable[[], Result]) -> Result:
        """Run an update that can be called again and goes on where it was; memory is freed in between."""
        tries = 0

        def recover(failure: OutOfMemory) -> bool:
            nonlocal tries
            tries += 1
            self._check_alone(phase, failure)
            reserved_bytes = _reserved_bytes(self.applied.device)
            free_memory(self.applied.device)
            if tries > 2:
                raise self._given_up(f"the update of phase {phase.name}", failure, reserved_bytes)
            self.say(f"out of memory in the update of phase {phase.name} ({_wanted(failure)}): caches freed, going on")
            return True

        return retry(run, recover)

    def in_slices(self, run: Callable[[int | None], Result], whole: int, what: str = "sampling") -> Result:
        """Run work that takes a slice size; None is its own choice. Out of memory, again with half the slice."""
        size: int | None = None

        def recover(failure: OutOfMemory) -> bool:
            nonlocal size
            reserved_bytes = _reserved_bytes(self.applied.device)
            free_memory(self.applied.device)
            if size == 1:
                raise self._given_up(what, failure, reserved_bytes)
            size = max(1, (whole if size is None else size) // 2)
            self.say(f"out of memory in {what} ({_wanted(failure)}): {size} at a time from here on")
            return True

        return retry(lambda: run(size), recover)

    def _check_alone(self, phase: Phase, failure: OutOfMemory) -> None:
        if self.applied.world_size > 1:
            raise LowVRAMError(
                f"out of memory in phase {phase.name} ({_wanted(failure)}) in one of {self.applied.world_size} "
                "processes; the others wait for it, so the step can't be done again.",
                f"Go on from the last checkpoint with a smaller micro_batch.{phase.name}.",
            )

    def _given_up(self, where: str, failure: OutOfMemory, reserved_bytes: int) -> LowVRAMError:
        least = guard.smallest_budget_bytes(
            reserved_bytes=reserved_bytes, wanted_bytes=failure.wanted_bytes, device=self.applied.device
        )
        return LowVRAMError(
            f"out of memory in {where} ({_wanted(failure)}), and no thriftier policy is left.",
            f"About {least / 2**30:.2f} GiB would do; or use a smaller model or resolution.",
        )


def _wanted(failure: OutOfMemory) -> str:
    return "unknown size" if failure.wanted_bytes is None else f"{failure.wanted_bytes / 2**20:.0f} MiB wanted"


def _reserved_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else guard.resident_peak_bytes()
