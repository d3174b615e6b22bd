"""A recipe's task as a subject to plan for."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowvram.errors import LowVRAMError
from lowvram.memory.policy import MemoryPolicy
from lowvram.phase import MicroBatch, Phase
from lowvram.planner import cards, make
from lowvram.planner.cards import Card
from lowvram.planner.options import LOSSES, ROUNDINGS, Fixed, check_allowed
from lowvram.planner.own import autocast_for
from lowvram.planner.plan import Plan
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure
from lowvram.settings import Settings, parse_bytes
from lowvram.tasks import build_task, task_class


def subject_of(settings: Settings) -> Callable[[], Subject]:
    """What builds the task of a recipe, on fake tensors: to be called within `subject.fake_card`."""

    def build() -> Subject:
        device = torch.device("cpu")
        task = build_task(settings.at_full_cost(), device)
        task.prepare_training()

        def micro_batch(phase: Phase, n: int) -> MicroBatch:
            images = task.example(n)
            labels = torch.zeros(n, dtype=torch.int64, device=device)
            return MicroBatch(images=images, labels=labels, seeds=seeds(n))

        def sample(n: int) -> Tensor:
            return task.sample(n, micro_batch=n)

        whole = sum(x.numel() * x.element_size() for x in [task.example(settings.batch)])
        return Subject(
            phases=task.phases,
            networks=task.networks,
            micro_batch=micro_batch,
            averages=task.averages,
            resident=task.resident(),
            batch_bytes=whole,
            sample=sample,
            sampling_slice=lambda micro: max(1, micro // 2),
            own_precision=task.own_precision,
            zero_nonfinite=task.own_precision and settings.precision in ("auto", "fp16"),
        )

    return build


def seeds(n: int) -> Tensor:
    """Seeds of n samples, real numbers even in a trace."""
    with unset_fake_temporarily():
        return torch.arange(1, n + 1)


def plan_recipe(
    settings: Settings,
    *,
    card: str | Card | None = None,
    where: make.Place | None = None,
    allow: Collection[str] = (),
    processes: int = 1,
) -> Plan:
    """The plan for a recipe within `settings.vram`, on a card (see `make.place`), or in a place that is given whole.

    What is allowed is used only if nothing fits without it. processes: that train together, each on such a card.

    Raises:
        LowVRAMError: the budget, the card or an allowed change makes no sense.
    """
    check_allowed(allow)
    if where is None:
        where = make.place(None if settings.vram is None else parse_bytes("vram", settings.vram), card)
    plan = make.make(_request(settings, (), where.card, processes), where)
    for changed, changes in _changed(settings, allow):
        if plan.fits:
            break
        plan = make.make(_request(changed, changes, where.card, processes), where, allow=allow)
    return plan


def _request(settings: Settings, changes: tuple[str, ...], card: Card, processes: int) -> make.Request:
    names = settings.phase_names()
    precision = "fp32" if task_class(settings).own_precision else autocast_for(settings.precision, card)
    return make.Request(
        build=subject_of(settings),
        name=settings.recipe,
        batch=settings.batch,
        kimg=settings.kimg,
        structure=Structure(
            attention=settings.memory.attention,
            precision=precision,
            fsdp=settings.memory.fsdp,
            weights_dtype=_weights_dtype(settings),
            processes=processes,
            triton=cards.runs_triton(card, settings.kernels),
        ),
        fixed=fixed_by(settings),
        plain=with_micro_batches(
            MemoryPolicy.from_settings(settings, phases=names, precision=precision), settings, names
        ),
        changes=changes,
    )


def fixed_by(settings: Settings) -> Fixed:
    """The settings of memory that the user named, which plans keep."""
    phases: dict[str, dict[str, Any]] = {}
    optimizers: dict[str, dict[str, str]] = {}
    memory = settings.memory
    for key, kind in memory.optimizer.items():
        if kind != "adam":  # part of what the recipe trains, like its losses
            optimizers[key] = {"kind": kind}
    for name in settings.overrides:
        group, _, key = name.rpartition(".")
        if group == "micro_batch":
            phases.setdefault(key, {})["micro_batch"] = settings.micro_batches()[key]
        elif group == "memory.activations":
            phases.setdefault(key, {})["activations"] = memory.activations[key]
        elif group in ("memory.weights", "memory.weights_dtype"):
            continue
        elif group.startswith("memory.") and group.removeprefix("memory.") in memory.by_optimizer():
            column = group.removeprefix("memory.")
            field_ = "kind" if column == "optimizer" else column
            optimizers.setdefault(key, {})[field_] = memory.by_optimizer()[column][key]
    if "memory.recompute_every" in settings.overrides:
        for name in settings.phase_names():
            phases.setdefault(name, {})["recompute_every"] = memory.recompute_every
    ema = memory.ema if "memory.ema" in settings.overrides else None
    frozen = memory.frozen if "memory.frozen" in settings.overrides else None
    resident = memory.resident if "memory.resident" in settings.overrides else None
    return Fixed(
        phases=phases,
        optimizers=optimizers,
        ema=ema,
        weights=_fixed_weights(settings),
        frozen=frozen,
        resident=resident,
    )


def _weights_dtype(settings: Settings) -> str:
    """What all networks in training are held in, which is the recipe's to say."""
    own = {key: value for key, value in settings.memory.weights_dtype.items() if key in settings.phase_names()}
    dtypes = set(own.values()) or {"fp32"}
    if len(dtypes) > 1:
        raise LowVRAMError(
            f"memory.weights_dtype differs between {' and '.join(own)}, and a plan holds all networks alike.",
            "Set it alike for all, or train by the recipe's settings alone: memory=recipe.",
        )
    return dtypes.pop()


def _fixed_weights(settings: Settings) -> str | None:
    """Where weights are, if that was named: of all networks alike."""
    named = {key for key in settings.memory.weights if f"memory.weights.{key}" in settings.overrides}
    places = {settings.memory.weights[key] for key in named}
    if not named:
        return None
    if len(places) > 1 or named != set(settings.memory.weights):
        raise LowVRAMError(
            f"memory.weights.{min(named)} is named, and a plan streams all networks or none.",
            f"Name {' and '.join(f'memory.weights.{key}' for key in settings.memory.weights)} alike, or none.",
        )
    return places.pop()


def with_micro_batches(policy: MemoryPolicy, settings: Settings, names: Iterable[str]) -> MemoryPolicy:
    """The policy with a recipe's own micro-batches written out."""
    for name in names:
        whole = settings.phase_batch(name)
        policy = policy.with_phase(name, micro_batch=min(settings.micro_batches()[name] or whole, whole))
    return policy


def _changed(settings: Settings, allow: Collection[str]) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """The recipe with what was allowed, one change after the other; first other roundings alone."""
    roundings = tuple(name for name in allow if name in ROUNDINGS)
    if roundings:
        yield settings, ()
    yield from settings.changed([name for name in allow if name in LOSSES])
