"""What a training does when memory runs out: free what the try held, become thriftier, and go on without loss."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from lowvram.errors import LowVRAMError
from lowvram.memory.apply import Applied
from lowvram.memory.ladder import thriftier
from lowvram.memory.recovery import (
    OutOfMemory,
    Snapshot,
    free_memory,
    given_up,
    halving,
    held_bytes,
    retry,
    wanted_in_words,
)
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
        self._snapshot = Snapshot(networks, applied.device, unchanged=applied.packed())

    def redo(self, phase: Phase, run: Callable[[], Result]) -> Result:
        """Run what makes the gradients of a phase; out of memory, again from its start under the next policy.

        Raises:
            LowVRAMError: there is no thriftier policy, or weights were changed already (update=fused), or other
                processes take part, which can't know.
        """
        where = f"phase {phase.name}"
        self.again(where, self._snapshot.take)

        def recover(failure: OutOfMemory) -> bool:
            self._check_alone(where, failure, f"a smaller micro_batch.{phase.name}")
            reserved_bytes = held_bytes(self.applied.device)
            self.applied.discard(phase)
            self._snapshot.restore()
            free_memory(self.applied.device)
            found = thriftier(self.applied.policy, self.applied.facts(phase))
            if found is None:
                raise given_up(where, failure, self.applied.device, reserved_bytes)
            policy, what = found
            now = self.applied.policy
            if (policy.optimizers, policy.resident) != (now.optimizers, now.resident):
                self.again(where, self.applied.settle)  # `change` would, and it can't be called again
            self.applied.change(policy)
            self.say(f"out of memory in {where} ({wanted_in_words(failure)}): {what}; the step is done again")
            return True

        return retry(run, recover)

    def resume(self, phase: Phase, run: Callable[[], Result]) -> Result:
        """Run an update; out of memory, as `again`."""
        return self.again(f"the update of phase {phase.name}", run)

    def again(self, where: str, run: Callable[[], Result]) -> Result:
        """Run what can be called again when it was interrupted: it goes on where it was, or does the same anew.

        Out of memory, caches are freed first, and the averages go to the host next.

        Raises:
            LowVRAMError: neither helped, or other processes take part.
        """
        freed = False

        def recover(failure: OutOfMemory) -> bool:
            nonlocal freed
            self._check_alone(where, failure, "less to hold, such as memory.ema=host")
            reserved_bytes = held_bytes(self.applied.device)
            free_memory(self.applied.device)
            what = "caches freed"
            if freed:
                if self.applied.policy.ema == "host" or not self.applied.averages:
                    raise given_up(where, failure, self.applied.device, reserved_bytes)
                self.applied.change(replace(self.applied.policy, ema="host"))
                what = "memory.ema: device -> host"
            freed = True
            self.say(f"out of memory in {where} ({wanted_in_words(failure)}): {what}, going on")
            return True

        return retry(run, recover)

    def in_slices(self, run: Callable[[int | None], Result], whole: int, what: str = "sampling") -> Result:
        """Run work that takes a slice size; None is its own choice. Out of memory, again with half the slice."""
        return halving(run, whole, self.applied.device, self.say, what)

    def _check_alone(self, where: str, failure: OutOfMemory, remedy: str) -> None:
        if self.applied.world_size > 1:
            raise LowVRAMError(
                f"out of memory in {where} ({wanted_in_words(failure)}) in one of {self.applied.world_size} "
                "processes; the others wait for it, so the step can't be done again.",
                f"Go on from the last checkpoint with {remedy}.",
            )
