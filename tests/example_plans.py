"""A plan's record with plausible figures, for what reads plans."""

from typing import Any

from lowvram.memory.policy import MemoryPolicy
from lowvram.planner.costs import CardCost
from lowvram.planner.plan import PhasePlan, Plan

GIB, MIB = 2**30, 2**20


def a_phase(name: str, live_bytes: int, **own: Any) -> PhasePlan:
    """A phase of 64 samples by 8; own: fields that matter."""
    values = {
        "samples": 64,
        "every": 1,
        "micro_batch": 8,
        "activations": "keep",
        "reserved_bytes": live_bytes,
        "by_category": {"activations": live_bytes},
        "peak_op": "aten.mm",
        "peak_module": "b8",
        "seconds": 1.0,
        "flops": 1e12,
        "host_bytes": 0.0,
    }
    return PhasePlan(name=name, live_bytes=live_bytes, **{**values, **own})  # type: ignore[arg-type]


def a_plan(*phases: PhasePlan, live_bytes: int, reserved_bytes: int, **own: Any) -> Plan:
    """A plan that fits 6 GiB; own: fields that matter."""
    values = {
        "recipe": "faces256",
        "card": "RTX 2060",
        "card_measured": False,
        "vram_bytes": 6 * GIB,
        "fits": True,
        "policy": MemoryPolicy(),
        "workspace_bytes": 64 * MIB,
        "context_bytes": 384 * MIB,
        "margin_bytes": 200 * MIB,
        "images_per_second": 12.3,
        "kimg": 25000.0,
        "hours": 564.0,
        "kwh": 58.0,
        "host_bytes": 0,
        "smallest_card": "RTX 2060",
        "smallest_vram_bytes": 6 * GIB,
        **own,
    }
    values["device_bytes"] = reserved_bytes + values["workspace_bytes"] + values["context_bytes"]
    return Plan(phases=phases, live_bytes=live_bytes, reserved_bytes=reserved_bytes, **values)


def a_cost(card: str, *, fits: bool = True, **own: Any) -> CardCost:
    """What a training takes on a card; own: fields that matter."""
    values = {
        "needed_bytes": 5 * GIB,
        "usable_bytes": 12 * GIB if fits else 4 * GIB,
        "images_per_second": 20.0 if fits else 0.0,
        "hours": 300.0 if fits else 0.0,
        "kwh": 50.0 if fits else 0.0,
        **own,
    }
    return CardCost(card=card, fits=fits, **values)  # type: ignore[arg-type]
