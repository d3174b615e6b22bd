"""What the planner may choose from: the values of each setting, by what they cost to look into.

Tier 1 cuts phases into micro-batches. Tier 2 recomputes or offloads activations, defers updates, and moves state and
averages to the host. Tier 3 streams weights: those of frozen networks alone, which costs no deferred update, or all;
and of these a share of the blocks, or none, stays on the device.
All of it trains the same network; what would not has to be allowed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.planner.tracing import Facts, Structure
from lowvram.settings import nearest

ROUNDINGS = {  # allow=...: other roundings of the same training, within a stated tolerance
    "adam8bit": "the optimizer's state in 8 bits",
}
LOSSES = {  # allow=...: another loss
    "fd_r1": "R1 by finite differences (loss.r1_kind=finite_difference)",
    "pl_shrink": "path length on half as many images (loss.path_length_batch_shrink doubled)",
}
SHARES = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)  # of what streams that may stay on the device
ALLOWED = {**ROUNDINGS, **LOSSES}


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Settings that the user wrote, which no plan changes: by phase, by optimizer, and for all.

    weights: of every network, frozen: of those that no update changes; None: as the plan wants them. resident: the
    share of what streams, if anything does.
    """

    phases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ema: str | None = None
    weights: str | None = None
    frozen: str | None = None
    resident: float | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The values that a tier offers. phases: (micro_batch, activations, recompute_every), by the phase's name."""

    structure: Structure
    phases: Mapping[str, tuple[tuple[int, str, int], ...]]
    optimizers: Mapping[str, tuple[OptimizerPolicy, ...]]
    ema: tuple[str, ...]


def check_allowed(allow: Collection[str]) -> None:
    """Raise LowVRAMError unless each is a change that can be allowed."""
    for name in allow:
        if name not in ALLOWED:
            raise LowVRAMError(f"allow={name} is not known.", nearest(name, list(ALLOWED)))


def options(
    facts: Facts, structure: Structure, tier: int, fixed: Fixed | None = None, allow: Collection[str] = ()
) -> Options:
    """What a tier offers for a subject, all of the lower tiers' included; tier 3 asks for a streamed structure."""
    fixed = fixed or Fixed()
    streams = structure.weights == "stream"
    phases = {
        phase.name: tuple(
            (micro, activations, every)
            for activations, every in _activations(phase, tier, structure, fixed)
            for micro in _micro_batches(phase, fixed)
            if not streams or micro < phase.samples_per_process or phase.samples_per_process == phase.group
        )
        for phase in facts.phases
    }
    optimizers = {name: tuple(_optimizers(name, facts, structure, tier, fixed, allow)) for name in facts.optimizers}
    places = (fixed.ema,) if fixed.ema else ("device", "host") if tier > 1 and facts.average_bytes else ("device",)
    return Options(structure=structure, phases=phases, optimizers=optimizers, ema=places)


def shares(facts: Facts, fixed: Fixed) -> tuple[float, ...]:
    """The shares of what streams that may stay on the device.

    None with phases of a second derivative, which bring whole networks there. Blocks that stay are recomputed, as those
    that stream are: what was recorded of these tells the rest.
    """
    if fixed.resident is not None:
        return (fixed.resident,)
    recomputed = all(
        not phase.second_order
        and fixed.phases.get(phase.name, {}).get("activations", "recompute") == "recompute"
        and fixed.phases.get(phase.name, {}).get("recompute_every", 1) == 1
        for phase in facts.phases
    )
    return (0.0, *SHARES) if recomputed else (0.0,)


def legal(facts: Facts, optimizers: Mapping[str, OptimizerPolicy], micro_batches: Mapping[str, int]) -> bool:
    """Whether a fused update, if there is one, is exact: one backward in a step, and no bound on the norm."""
    for phase in facts.phases:
        if optimizers[phase.optimizer].update != "fused":
            continue
        if facts.terms[phase.name] > 1 or facts.clips[phase.name]:
            return False
        if micro_batches[phase.name] < phase.samples_per_process:
            return False
    return True


def _micro_batches(phase: PhaseFacts, fixed: Fixed) -> list[int]:
    samples = phase.samples_per_process
    wanted = fixed.phases.get(phase.name, {}).get("micro_batch")
    if wanted is not None:
        return [min(wanted, samples)]
    return [n for n in range(samples, 0, -1) if samples % n == 0 and n % phase.group == 0]


def _activations(phase: PhaseFacts, tier: int, structure: Structure, fixed: Fixed) -> list[tuple[str, int]]:
    streams, sharded = streams_all(phase, structure), structure.sharded
    own = fixed.phases.get(phase.name, {})
    every = int(own.get("recompute_every", 1))
    if "activations" in own:
        return [(str(own["activations"]), every)]
    if tier == 1:
        return [("keep", 1)]
    if sharded:  # gathered weights are freed while a copy of them may be on its way to the host
        return [("keep", 1)] if phase.second_order or not phase.has_blocks else [("keep", 1), ("recompute", every)]
    if phase.second_order:
        return [("offload", 1)] if streams else [("keep", 1), ("offload", 1)]
    if structure.resident and phase.has_blocks:  # those that stay are recomputed too
        return [("recompute", every)]
    if streams:
        return [("keep", 1)]  # streamed blocks are recomputed as it is
    return [("keep", 1), ("recompute", every)] if phase.has_blocks else [("keep", 1), ("offload", 1)]


def streams_all(phase: PhaseFacts, structure: Structure) -> bool:
    """Whether all blocks of a phase are streamed."""
    frozen = structure.frozen == "stream" and phase.frozen_blocks and not phase.trained_blocks
    return structure.weights == "stream" or frozen


def _optimizers(
    name: str, facts: Facts, structure: Structure, tier: int, fixed: Fixed, allow: Collection[str]
) -> list[OptimizerPolicy]:
    own = dict(fixed.optimizers.get(name, {}))
    plain = OptimizerPolicy(weights=structure.weights, weights_dtype=structure.weights_dtype, **_plain(structure))
    narrow = "adam8bit" in allow and tier > 1
    kinds = [own["kind"]] if "kind" in own else ["adam", *(["adam8bit"] if narrow else [])]
    if structure.weights == "stream":  # their updates are in the pieces of phases
        kinds = [dict(structure.kinds).get(name, "adam")]
    found = []
    for kind in kinds:
        updates, states = _places(facts, structure, tier, name)
        for update in [own["update"]] if "update" in own else updates:
            for state in [own["state"]] if "state" in own else states:
                if kind.startswith("paged") and state == "host":
                    continue
                found.append(replace(plain, kind=kind, update=update, state=state))
    return list(dict.fromkeys(found))


def _plain(structure: Structure) -> dict[str, str]:
    return {"update": "deferred", "state": "host"} if structure.weights == "stream" else {}


def _places(facts: Facts, structure: Structure, tier: int, optimizer: str) -> tuple[list[str], list[str]]:
    if structure.weights == "stream":
        return ["deferred"], ["host"]
    if tier == 1 or structure.sharded:
        return ["after"], ["device"]
    fused = may_fuse(facts, structure, optimizer)
    return ["after", *(["fused"] if fused else []), "deferred"], ["device", "host"]


def may_fuse(facts: Facts, structure: Structure, optimizer: str) -> bool:
    """Whether an optimizer's update inside the backward is exact where its phases run whole."""
    if structure.processes > 1:  # whose gradients are summed after it
        return False
    mine = [phase for phase in facts.phases if phase.optimizer == optimizer]
    return not any(facts.terms[phase.name] > 1 or facts.clips[phase.name] for phase in mine)


def policy_of(
    structure: Structure,
    phases: Mapping[str, tuple[int, str, int]],
    optimizers: Mapping[str, OptimizerPolicy],
    ema: str,
) -> MemoryPolicy:
    """The policy that a choice of options is."""
    from lowvram.memory.policy import PhasePolicy

    return MemoryPolicy(
        precision=structure.precision,
        attention=structure.attention,
        fsdp=structure.fsdp,
        frozen=structure.frozen,
        resident=structure.resident,
        ema=ema,
        optimizers=optimizers,
        phases={
            name: PhasePolicy(micro_batch=micro, activations=activations, recompute_every=every)
            for name, (micro, activations, every) in phases.items()
        },
    )
