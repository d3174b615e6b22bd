"""The policies that are compared, by name; the first is the plain run."""

from typing import Any, TypeVar

from lowvram.errors import LowVRAMError
from lowvram.settings import Settings, StyleGAN2Settings, nearest

Policy = TypeVar("Policy")

_PLAIN = [f"micro_batch.{phase}=null" for phase in ("G", "path_length", "D", "R1")]
_OFFLOADED = ["memory.activations.path_length=offload", "memory.activations.R1=offload"]
_RECOMPUTED = ["memory.activations.G=recompute", "memory.activations.D=recompute"]
_DEFERRED = ["memory.update.G=deferred", "memory.update.D=deferred"]
_NARROW = ["memory.optimizer.G=adam8bit", "memory.optimizer.D=adam8bit"]
_STATE_ON_HOST = ["memory.state.G=host", "memory.state.D=host"]
_STREAMED = [*_DEFERRED, "memory.weights.G=stream", "memory.weights.D=stream"]


def of(settings: Settings) -> dict[str, list[str]]:
    """Overrides of any recipe."""
    if isinstance(settings, StyleGAN2Settings):
        return stylegan2(settings)
    phases = settings.phase_names()

    def each(setting: str, value: str) -> list[str]:
        return [f"memory.{setting}.{name}={value}" for name in phases]

    plain = [f"micro_batch.{name}=null" for name in phases]
    recomputed, streamed = each("activations", "recompute"), [*each("update", "deferred"), *each("weights", "stream")]
    least = [f"micro_batch.{name}=1" for name in phases]
    sets = {
        "plain": [],
        "recompute": recomputed,
        "half micro-batches": [f"micro_batch.{name}={max(1, settings.batch // 2)}" for name in phases],
        "least micro-batches": least,
        "8-bit": each("optimizer", "adam8bit"),
        "deferred": each("update", "deferred"),
        "state on the host": each("state", "host"),
        "average on the host": ["memory.ema=host"],
        "streamed": streamed,
        "leanest": [*recomputed, *least, *streamed, "memory.ema=host"],
    }
    return {name: [*plain, *changes] for name, changes in sets.items()}


def stylegan2(settings: Settings) -> dict[str, list[str]]:
    """Overrides of a StyleGAN2 recipe."""
    half = _micro(settings, 2)
    least = _micro(settings, settings.batch)
    lazy = _lazy(settings)
    sets = {
        "plain": [],
        "recompute": _RECOMPUTED,
        "offload R1 and path length": _OFFLOADED,
        "half micro-batches": half,
        "least micro-batches": least,
        "8-bit": _NARROW,
        "deferred": _DEFERRED,
        "fused G": ["memory.update.G=fused"],
        "state on the host": _STATE_ON_HOST,
        "average on the host": ["memory.ema=host"],
        "streamed": _STREAMED,
        "fsdp offload": ["memory.fsdp=offload"],
        "lean": lazy,
        "lean host state": [*lazy, *_STATE_ON_HOST, "memory.ema=host"],
        "leaner": [*lazy, *_RECOMPUTED],
        "leanest": [*_RECOMPUTED, *_OFFLOADED, *least, *_STREAMED, "memory.ema=host"],
    }
    return {name: [*_PLAIN, *changes] for name, changes in sets.items()}


def sd15(batch: int) -> dict[str, dict[str, Any]]:
    """Arguments of `workloads.sd15`."""
    narrow = {"weights_dtype": "bf16", "kind": "adam8bit"}
    recompute = {"activations": "recompute"}
    return {
        "plain": {"precision": "bf16"},
        "recompute": {"precision": "bf16", "phase": recompute},
        "8-bit": {"precision": "bf16", "optimizer": {"kind": "adam8bit"}},
        "bf16 weights": {"optimizer": {"weights_dtype": "bf16"}},
        "bf16 weights 8-bit": {"optimizer": narrow},
        "resident": {"phase": recompute, "optimizer": {**narrow, "update": "fused"}},
        "resident micro-batches": {
            "phase": {**recompute, "micro_batch": max(1, batch // 2)},
            "optimizer": {**narrow, "update": "deferred"},
        },
        "streamed": {"optimizer": {**narrow, "update": "fused", "weights": "stream"}},
        "streamed deferred": {"optimizer": {**narrow, "update": "deferred", "weights": "stream"}},
        "streamed micro-batches": {
            "phase": {"micro_batch": max(1, batch // 2)},
            "optimizer": {**narrow, "update": "deferred", "weights": "stream"},
        },
    }


def pick(policies: dict[str, Policy], only: list[str]) -> dict[str, Policy]:
    """Those named; all where none is."""
    for name in only:
        if name not in policies:
            raise LowVRAMError(f"the policy {name!r} is not known.", nearest(name, list(policies)))
    return {name: policies[name] for name in only} if only else policies


def _lazy(settings: Settings) -> list[str]:
    """The phases that run seldom, thriftily: half micro-batches, or activations on the host where groups forbid it."""
    half = settings.batch // 2
    divisible = half % settings.model.mbstd_group_size == 0
    shrunk = max(1, settings.phase_batch("path_length") // 2)
    r1 = f"micro_batch.R1={half}" if divisible else "memory.activations.R1=offload"
    return [r1, f"micro_batch.path_length={shrunk}"]


def _micro(settings: Settings, parts: int) -> list[str]:
    """Micro-batches of a so-manieth of the batch, or of one group where that is more."""
    group = settings.model.mbstd_group_size
    whole = max(group, settings.batch // parts // group * group)
    shrunk = settings.phase_batch("path_length")
    size = max(1, shrunk // parts)
    return [f"micro_batch.{name}={whole}" for name in ("G", "D", "R1")] + [f"micro_batch.path_length={size}"]
