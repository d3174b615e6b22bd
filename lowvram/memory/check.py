"""Which policies can't be honoured for which phases, said before anything is changed."""

from collections.abc import Mapping, Sequence

import torch

from lowvram.errors import LowVRAMError
from lowvram.memory import attention
from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.policy import MemoryPolicy
from lowvram.phase import Phase


def check(
    policy: MemoryPolicy,
    phases: Sequence[Phase],
    optimizer_names: Mapping[str, str],
    facts: Mapping[str, PhaseFacts],
    own_precision: bool,
    world_size: int,
    device: torch.device,
) -> None:
    """Raise LowVRAMError for the first setting that can't be honoured, naming what stands against it."""
    _check_names("memory.activations", policy.phases, [phase.name for phase in phases])
    _check_names("memory.optimizer", policy.optimizers, list(dict.fromkeys(optimizer_names.values())))
    for phase in phases:
        _check_activations(policy, phase, facts[phase.name])
        _check_micro_batch(policy, phase)
        _check_update(policy, phase, optimizer_names[phase.name], world_size)
        attention.check(policy.attention, device, second_order=phase.second_order)
    if own_precision:
        _check_precision(policy)
    _check_streams(policy, phases, optimizer_names, facts)


def _check_streams(
    policy: MemoryPolicy, phases: Sequence[Phase], optimizer_names: Mapping[str, str], facts: Mapping[str, PhaseFacts]
) -> None:
    for name, optimizer in policy.optimizers.items():
        if optimizer.weights == "stream" and not any(
            facts[p.name].has_blocks and facts[p.name].trained_blocks for p in phases if optimizer_names[p.name] == name
        ):
            raise LowVRAMError(
                f"memory.weights.{name}=stream, but its networks show no blocks.",
                "Name them: apply(..., blocks=...). What is trained inside frozen networks stays on the device.",
            )
    if policy.resident and "stream" not in (policy.frozen, *(own.weights for own in policy.optimizers.values())):
        raise LowVRAMError(
            f"memory.resident={policy.resident:g}, but no weights are streamed: all are on the device.",
            "Leave memory.resident out, or use memory.weights.NAME=stream or memory.frozen=stream.",
        )
    if policy.frozen == "stream" and not any(one.frozen_blocks for one in facts.values()):
        raise LowVRAMError(
            "memory.frozen=stream, but no phase goes through a frozen network that shows blocks.",
            "Use memory.frozen=device, or name them: Phase(frozen=...), apply(..., blocks=...).",
        )
    if policy.frozen == "stream" and policy.fsdp != "none":
        raise LowVRAMError(
            f"memory.frozen=stream with memory.fsdp={policy.fsdp} is not built.",
            "Use memory.frozen=device, or memory.fsdp=none.",
        )
    inside = next((phase for phase in phases if _trains_inside_frozen(phase)), None)
    if inside is not None and policy.fsdp != "none":
        raise LowVRAMError(
            f"memory.fsdp={policy.fsdp} with phase {inside.name}, which trains parts of a frozen network.",
            "Use memory.fsdp=none: what is trained is small.",
        )


def _trains_inside_frozen(phase: Phase) -> bool:
    """Whether parameters in training sit inside a frozen network."""
    frozen = {parameter for network in phase.frozen for parameter in network.parameters()}
    return any(parameter in frozen for parameter in phase.parameters())


def _check_names(setting: str, named: Mapping[str, object], known: list[str]) -> None:
    for name in named:
        if name not in known:
            raise LowVRAMError(f"{setting}.{name} names nothing that is trained.", f"There are {', '.join(known)}.")


def _check_activations(policy: MemoryPolicy, phase: Phase, facts: PhaseFacts) -> None:
    activations = policy.phase(phase.name).activations
    if activations == "offload" and policy.fsdp != "none":
        raise LowVRAMError(
            f"memory.activations.{phase.name}=offload with memory.fsdp={policy.fsdp}: FSDP frees the weights that it "
            "gathered while a copy of them may be on its way to the host.",
            f"Use memory.activations.{phase.name}=recompute, or memory.fsdp=none.",
        )
    if activations != "recompute":
        return
    if phase.second_order:
        raise LowVRAMError(
            f"memory.activations.{phase.name}=recompute saves nothing: the phase takes a second derivative, "
            "for which recomputed activations are kept.",
            f"Use memory.activations.{phase.name}=offload, exact there too, or a smaller micro_batch.{phase.name}.",
        )
    if not facts.has_blocks:
        raise LowVRAMError(
            f"memory.activations.{phase.name}=recompute, but the networks show no blocks.",
            "Name them: apply(..., blocks=...).",
        )


def _check_micro_batch(policy: MemoryPolicy, phase: Phase) -> None:
    micro = policy.phase(phase.name).micro_batch
    if micro is None or micro >= phase.samples:
        return
    if micro % phase.group or phase.samples % micro:
        raise LowVRAMError(
            f"micro_batch.{phase.name}={micro} must divide the phase's {phase.samples} samples and keep groups of "
            f"{phase.group} together.",
            f"Use {phase.group} times a divisor of {phase.samples // phase.group}.",
        )


def _check_update(policy: MemoryPolicy, phase: Phase, optimizer: str, world_size: int) -> None:
    if policy.optimizer(optimizer).update != "fused":
        return
    fused, exact = f"memory.update.{optimizer}=fused", f"Use memory.update.{optimizer}=deferred, which is exact."
    micro = policy.phase(phase.name).micro_batch or phase.micro_batch
    if phase.clip_norm is not None:
        raise LowVRAMError(
            f"{fused} with clip_norm={phase.clip_norm} of phase {phase.name}: the global norm is known only after the "
            "backward.",
            exact,
        )
    if micro is not None and micro * world_size < phase.samples:
        raise LowVRAMError(
            f"{fused} with micro_batch.{phase.name}={micro}: each micro-batch of {phase.samples} samples would be an "
            "update of its own.",
            exact,
        )
    if phase.terms > 1:
        raise LowVRAMError(
            f"{fused} with phase {phase.name}, whose loss comes in {phase.terms} parts: each would be an update.", exact
        )
    if world_size > 1:
        raise LowVRAMError(f"{fused} with {world_size} processes: gradients are summed after the backward.", exact)


def _check_precision(policy: MemoryPolicy) -> None:
    if policy.precision != "fp32":
        raise LowVRAMError(
            f"autocast to {policy.precision} round networks that choose their own 16-bit layers.",
            "Set their precision instead.",
        )
    for name, optimizer in policy.optimizers.items():
        if optimizer.weights_dtype != "fp32":
            raise LowVRAMError(
                f"memory.weights_dtype.{name}={optimizer.weights_dtype} with networks that choose their own "
                "16-bit layers: their weights are fp32.",
                f"Use memory.weights_dtype.{name}=fp32.",
            )
