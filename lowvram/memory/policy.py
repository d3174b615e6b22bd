"""What is done to save memory, as one frozen record. `lowvram.memory.apply` carries it out."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.settings import MEMORY_CHOICES, Settings
from lowvram.settings.checks import fraction

PRECISIONS = ("fp32", "bf16", "fp16")
ATTENTION = MEMORY_CHOICES["attention"]
NARROW = ("adam8bit", "lion8bit")  # on lowvram's own kernel; they round bf16 weights themselves
BITSANDBYTES = ("paged_adam", "paged_adam8bit")


@dataclass(frozen=True, kw_only=True)
class PhasePolicy:
    """How one phase runs.

    micro_batch: samples of one process in memory at a time; None: all of them. activations: kept for the backward,
    recomputed block by block (every `recompute_every`-th block), or offloaded to the host.
    """

    micro_batch: int | None = None
    activations: str = "keep"
    recompute_every: int = 1

    def __post_init__(self) -> None:
        _one_of("activations", self.activations, MEMORY_CHOICES["activations"])
        for name in ("micro_batch", "recompute_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LowVRAMError(f"{name}={value} is too small.", "Use 1 or more.")


@dataclass(frozen=True, kw_only=True)
class OptimizerPolicy:
    """How the weights of one optimizer are held and changed.

    kind: adam is the task's own at full width; the others take its hyperparameters. adam8bit and lion8bit run on
        lowvram's own kernel, on every device; paged_adam and paged_adam8bit on bitsandbytes'.
    update: after the backward; fused: inside it, each gradient freed at once (no clipping, no accumulation); deferred:
        gradients go to the host as they are made, and the update, which is exact, follows.
    state: where the optimizer's state lives. weights: on the device, or streamed from the host block by block.
    weights_dtype: bf16 keeps no fp32 master; updates are rounded stochastically.
    """

    kind: str = "adam"
    update: str = "after"
    state: str = "device"
    weights: str = "device"
    weights_dtype: str = "fp32"

    def __post_init__(self) -> None:
        _one_of("optimizer", self.kind, MEMORY_CHOICES["optimizer"])
        _one_of("update", self.update, MEMORY_CHOICES["update"])
        _one_of("state", self.state, MEMORY_CHOICES["state"])
        _one_of("weights", self.weights, MEMORY_CHOICES["weights"])
        _one_of("weights_dtype", self.weights_dtype, MEMORY_CHOICES["weights_dtype"])


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """Everything that is done to save memory in a training.

    precision: autocast round every phase. phases, optimizers: by name; an optimizer has the name of the first phase
    that uses it ("G", "D"). ema: where averaged networks live. fsdp: parameters sharded over the processes, also with
    all of them on the host (offload). frozen: weights that gradients go through and no update changes, on the device or
    streamed from the host block by block. resident: of every network that streams, the share of its blocks' bytes, in
    [0, 1], that stays on the device throughout (which blocks: `stream_parts.staying`); streamed blocks are always
    recomputed, these as the phase says.
    """

    precision: str = "fp32"
    phases: Mapping[str, PhasePolicy] = field(default_factory=dict)
    optimizers: Mapping[str, OptimizerPolicy] = field(default_factory=dict)
    ema: str = "device"
    attention: str = "sdpa"
    fsdp: str = "none"
    frozen: str = "device"
    resident: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", MappingProxyType(dict(self.phases)))
        object.__setattr__(self, "optimizers", MappingProxyType(dict(self.optimizers)))
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("ema", self.ema, MEMORY_CHOICES["ema"])
        _one_of("attention", self.attention, MEMORY_CHOICES["attention"])
        _one_of("fsdp", self.fsdp, MEMORY_CHOICES["fsdp"])
        _one_of("frozen", self.frozen, MEMORY_CHOICES["frozen"])
        fraction("memory.resident", self.resident)
        for name, optimizer in self.optimizers.items():
            if self.precision == "fp16" and optimizer.update == "fused":
                raise LowVRAMError(
                    f"precision=fp16 with memory.update.{name}=fused: weights would change before an overflow shows.",
                    f"Use memory.update.{name}=deferred, which is exact, or precision=bf16.",
                )
            if optimizer.weights == "stream" and optimizer.update == "after":
                raise LowVRAMError(
                    f"memory.weights.{name}=stream with memory.update.{name}=after would collect every gradient on the "
                    "device.",
                    f"Use memory.update.{name}=deferred (exact), or memory.update.{name}=fused.",
                )
            if optimizer.kind.startswith("paged") and optimizer.state == "host":
                raise LowVRAMError(
                    f"memory.optimizer.{name}={optimizer.kind} with memory.state.{name}=host: paged state moves to the "
                    "host by itself.",
                    f"Use memory.state.{name}=device, or memory.optimizer.{name}=adam8bit.",
                )
            if self.fsdp != "none":
                self._check_fsdp(name, optimizer)

    def _check_fsdp(self, name: str, optimizer: OptimizerPolicy) -> None:
        setting = f"memory.fsdp={self.fsdp}"
        if optimizer.kind in (*BITSANDBYTES, "adafactor"):
            raise LowVRAMError(
                f"{setting} with memory.optimizer.{name}={optimizer.kind}: it does not know sharded tensors.",
                f"Use memory.optimizer.{name}=adam or adam8bit, or memory.fsdp=none.",
            )
        for field_, plain in (("update", "after"), ("state", "device"), ("weights", "device")):
            value = getattr(optimizer, field_)
            if value != plain:
                raise LowVRAMError(
                    f"{setting} with memory.{field_}.{name}={value}: FSDP places weights, gradients and state itself.",
                    f"Use memory.{field_}.{name}={plain}, or memory.fsdp=none.",
                )
        if optimizer.weights_dtype != "fp32":
            raise LowVRAMError(
                f"{setting} with memory.weights_dtype.{name}={optimizer.weights_dtype} is not built.",
                f"Use memory.weights_dtype.{name}=fp32, or memory.fsdp=none.",
            )

    def phase(self, name: str) -> PhasePolicy:
        """The policy of a phase; phases that are not named keep everything."""
        return self.phases.get(name, PhasePolicy())

    def optimizer(self, name: str) -> OptimizerPolicy:
        """The policy of an optimizer; those that are not named stay as the task made them."""
        return self.optimizers.get(name, OptimizerPolicy())

    def with_phase(self, name: str, **changes: Any) -> "MemoryPolicy":
        """A copy with one phase's policy changed."""
        return replace(self, phases={**self.phases, name: replace(self.phase(name), **changes)})

    def with_optimizer(self, name: str, **changes: Any) -> "MemoryPolicy":
        """A copy with one optimizer's policy changed."""
        return replace(self, optimizers={**self.optimizers, name: replace(self.optimizer(name), **changes)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` is the inverse."""
        return {
            "precision": self.precision,
            "phases": {name: asdict(phase) for name, phase in self.phases.items()},
            "optimizers": {name: asdict(optimizer) for name, optimizer in self.optimizers.items()},
            "ema": self.ema,
            "attention": self.attention,
            "fsdp": self.fsdp,
            "frozen": self.frozen,
            "resident": self.resident,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MemoryPolicy":
        """A policy from what `to_dict` gave."""
        phases = {name: PhasePolicy(**phase) for name, phase in values.get("phases", {}).items()}
        optimizers = {name: OptimizerPolicy(**optimizer) for name, optimizer in values.get("optimizers", {}).items()}
        rest = {name: value for name, value in values.items() if name not in ("phases", "optimizers")}
        return cls(phases=phases, optimizers=optimizers, **rest)

    @classmethod
    def from_settings(cls, settings: Settings, *, phases: Collection[str], precision: str = "fp32") -> "MemoryPolicy":
        """The policy that a recipe writes out.

        phases: the names of those that it trains; settings of a phase that is switched off mean nothing. precision: of
        autocast, for networks that leave it to the policy.
        """
        memory = settings.memory
        micro_batches = settings.micro_batches()
        by_phase = {
            name: PhasePolicy(
                micro_batch=micro_batches.get(name), activations=activations, recompute_every=memory.recompute_every
            )
            for name, activations in memory.activations.items()
            if name in phases
        }
        columns = {"kind": memory.optimizer, **{k: v for k, v in memory.by_optimizer().items() if k != "optimizer"}}
        optimizers = {
            name: OptimizerPolicy(**{column: values[name] for column, values in columns.items()})
            for name in memory.optimizer
            if name in phases  # an optimizer has the name of its first phase
        }
        return cls(
            precision=precision,
            phases=by_phase,
            optimizers=optimizers,
            ema=memory.ema,
            attention=memory.attention,
            fsdp=memory.fsdp,
            frozen=memory.frozen,
            resident=memory.resident,
        )

    def __hash__(self) -> int:
        return hash(
            (
                self.precision,
                *sorted(self.phases.items(), key=lambda i: i[0]),
                *sorted(self.optimizers.items(), key=lambda i: i[0]),
                self.ema,
                self.attention,
                self.fsdp,
                self.frozen,
                self.resident,
            )
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LowVRAMError(f"{name}={value} is not known.", f"Use one of {', '.join(allowed)}.")
