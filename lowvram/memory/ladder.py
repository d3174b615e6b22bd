"""The next thriftier policy for a phase that ran out of memory, dearest in speed last.

    policy, what = thriftier(policy, phase)      # what: "micro_batch.D: 16 -> 8"

Every step changes one thing, and none changes what is computed beyond rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowvram.memory.policy import MemoryPolicy

_CHEAP_MICRO_BATCH = 4  # below this a GPU idles, so that recomputing or offloading activations costs less


@dataclass(frozen=True, kw_only=True)
class PhaseFacts:
    """What a thriftier policy depends on.

    optimizer: the name of the one that the phase steps. samples_per_process: of one update. group: samples that stay
    together in a micro-batch. second_order: its loss takes a derivative of a derivative. has_blocks: its networks show
    blocks that can be recomputed; trained_blocks, frozen_blocks: networks that it trains, and others that it needs, do.
    """

    name: str
    optimizer: str
    samples_per_process: int
    group: int = 1
    second_order: bool = False
    has_blocks: bool = False
    trained_blocks: bool = True
    frozen_blocks: bool = False


def thriftier(policy: MemoryPolicy, phase: PhaseFacts) -> tuple[MemoryPolicy, str] | None:
    """The next policy, and what changed in it in the words of the settings; None after the last one."""
    return next(_steps(policy, phase), None)


def _steps(policy: MemoryPolicy, phase: PhaseFacts) -> Iterator[tuple[MemoryPolicy, str]]:
    """Every step that is open, in the order in which they are taken."""
    yield from _smaller_micro_batch(policy, phase, least=max(phase.group, _CHEAP_MICRO_BATCH))
    yield from _thriftier_activations(policy, phase)
    yield from _deferred_update(policy, phase)
    yield from _smaller_micro_batch(policy, phase, least=phase.group)
    yield from _offloaded_activations(policy, phase)
    yield from _state_on_the_host(policy, phase)
    if policy.ema == "device":
        yield replace(policy, ema="host"), "memory.ema: device -> host"
    if policy.resident:
        yield replace(policy, resident=0.0), f"memory.resident: {policy.resident:g} -> 0"
    if phase.frozen_blocks and policy.frozen == "device" and policy.fsdp == "none":
        yield replace(policy, frozen="stream"), "memory.frozen: device -> stream"


def _smaller_micro_batch(policy: MemoryPolicy, phase: PhaseFacts, *, least: int) -> Iterator[tuple[MemoryPolicy, str]]:
    """Half the micro-batch, or the next size to it that divides the samples in whole groups."""
    if policy.optimizer(phase.optimizer).update == "fused":  # each micro-batch would be an update of its own
        return
    samples = phase.samples_per_process
    now = min(policy.phase(phase.name).micro_batch or samples, samples)
    sizes = [n for n in range(least, now) if samples % n == 0 and n % phase.group == 0]
    if not sizes:
        return
    halves = [n for n in sizes if 2 * n <= now]
    size = max(halves) if halves else min(sizes)
    yield policy.with_phase(phase.name, micro_batch=size), f"micro_batch.{phase.name}: {now} -> {size}"


def _thriftier_activations(policy: MemoryPolicy, phase: PhaseFacts) -> Iterator[tuple[MemoryPolicy, str]]:
    """Recomputed block by block; offloaded under a second derivative, for which recomputed ones are kept all along."""
    if phase.second_order:
        yield from _activations(policy, phase, "keep", "offload")
        yield from _activations(policy, phase, "recompute", "offload")
        return
    if not _recomputes(policy, phase):
        return
    yield from _activations(policy, phase, "keep", "recompute")
    own = policy.phase(phase.name)
    if own.activations == "recompute" and own.recompute_every > 1:
        what = f"recompute_every.{phase.name}: {own.recompute_every} -> 1"
        yield policy.with_phase(phase.name, recompute_every=1), what


def _offloaded_activations(policy: MemoryPolicy, phase: PhaseFacts) -> Iterator[tuple[MemoryPolicy, str]]:
    """For networks without blocks. Recomputed activations stay so: offloading would keep more of them."""
    if not phase.has_blocks and not _streams(policy, phase):
        yield from _activations(policy, phase, "keep", "offload")


def _activations(policy: MemoryPolicy, phase: PhaseFacts, now: str, then: str) -> Iterator[tuple[MemoryPolicy, str]]:
    if policy.phase(phase.name).activations == now:
        yield policy.with_phase(phase.name, activations=then), f"memory.activations.{phase.name}: {now} -> {then}"


def _recomputes(policy: MemoryPolicy, phase: PhaseFacts) -> bool:
    return phase.has_blocks and not _streams(policy, phase)  # streamed blocks are recomputed as it is


def _streams(policy: MemoryPolicy, phase: PhaseFacts) -> bool:
    """Whether all blocks are streamed: of the networks that it trains, and of those that are frozen."""
    if policy.resident:
        return False
    trained = policy.optimizer(phase.optimizer).weights == "stream" or not phase.trained_blocks
    frozen = policy.frozen == "stream" or not phase.frozen_blocks
    return trained and frozen and (phase.trained_blocks or phase.frozen_blocks)


def _deferred_update(policy: MemoryPolicy, phase: PhaseFacts) -> Iterator[tuple[MemoryPolicy, str]]:
    """A fused update admits no micro-batches; a deferred one does, and keeps the gradients off the device too."""
    if policy.optimizer(phase.optimizer).update == "fused":
        what = f"memory.update.{phase.optimizer}: fused -> deferred"
        yield policy.with_optimizer(phase.optimizer, update="deferred"), what


def _state_on_the_host(policy: MemoryPolicy, phase: PhaseFacts) -> Iterator[tuple[MemoryPolicy, str]]:
    """The phase's own optimizer first, then the others that the policy names: their state is in the way too."""
    if policy.fsdp != "none":
        return
    for name in dict.fromkeys((phase.optimizer, *policy.optimizers)):
        own = policy.optimizer(name)
        if own.state == "device" and not own.kind.startswith("paged"):
            yield policy.with_optimizer(name, state="host"), f"memory.state.{name}: device -> host"
