"""A recipe's task as a subject to plan for."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowvram.errors import LowVRAMError
from lowvram.memory.policy import MemoryPolicy
from lowvram.phase import MicroBatch, Phase
from lowvram.planner import make
from lowvram.planner.cards import Card
from lowvram.planner.options import LOSSES, ROUNDINGS, Fixed, check_allowed
from lowvram.planner.plan import Plan
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure
from lowvram.settings import PHASES, Settings, parse_bytes
from lowvram.tasks import build_task

_UNPLANNED = ("memory.weights_dtype", "memory.fsdp")


def subject_of(settings: Settings) -> Callable[[], Subject]:
    """What builds the task of a recipe, on fake tensors: to be called within `subject.fake_card`."""

    def build() -> Subject:
        device = torch.device("cpu")
        task = build_task(as_later(settings), device)
        task.prepare_training()
        shape = (3, settings.resolution, settings.resolution)

        def micro_batch(phase: Phase, n: int) -> MicroBatch:
            images = torch.empty(n, *shape, dtype=torch.uint8, device=device)
            labels = torch.zeros(n, dtype=torch.int64, device=device)
            return MicroBatch(images=images, labels=labels, seeds=seeds(n))

        def sample(n: int) -> Tensor:
            return task.sample(n, micro_batch=n)

        whole = settings.batch * shape[0] * shape[1] * shape[2]
        return Subject(
            phases=task.phases,
            networks=task.networks,
            micro_batch=micro_batch,
            averages=task.averages,
            resident=list(task.tensors().values()),
            batch_bytes=whole,
            sample=sample,
            sampling_slice=lambda micro: max(1, micro // 2),
            own_precision=task.own_precision,
            zero_nonfinite=task.own_precision and settings.precision in ("auto", "fp16"),
        )

    return build


def as_later(settings: Settings) -> Settings:
    """Augmentation that starts at p = 0 costs nothing at first; a plan is for the time when it does."""
    return replace(settings, augment=replace(settings.augment, p=settings.augment.p or 0.5))


def seeds(n: int) -> Tensor:
    """Seeds of n samples, real numbers even in a trace."""
    with unset_fake_temporarily():
        return torch.arange(1, n + 1)


def plan_recipe(
    settings: Settings, *, card: str | Card | None = None, where: make.Place | None = None, allow: Collection[str] = ()
) -> Plan:
    """The plan for a recipe within `settings.vram`, on a card (see `make.place`), or in a place that is given whole.

    What is allowed is used only if nothing fits without it.

    Raises:
        LowVRAMError: the budget, the card or an allowed change makes no sense.
    """
    check_allowed(allow)
    if where is None:
        where = make.place(None if settings.vram is None else parse_bytes("vram", settings.vram), card)
    plan = make.make(_request(settings, ()), where)
    for changed, changes in _changed(settings, allow):
        if plan.fits:
            break
        plan = make.make(_request(changed, changes), where, allow=allow)
    return plan


def _request(settings: Settings, changes: tuple[str, ...]) -> make.Request:
    names = phase_names(settings)
    return make.Request(
        build=subject_of(settings),
        name=settings.recipe,
        batch=settings.batch,
        kimg=settings.kimg,
        structure=Structure(attention=settings.memory.attention),
        fixed=fixed_by(settings),
        plain=with_micro_batches(MemoryPolicy.from_settings(settings, phases=names), settings, names),
        changes=changes,
    )


def fixed_by(settings: Settings) -> Fixed:
    """The settings of memory that the user named, which plans keep."""
    phases: dict[str, dict[str, Any]] = {}
    optimizers: dict[str, dict[str, str]] = {}
    memory = settings.memory
    for name in settings.overrides:
        group, _, key = name.rpartition(".")
        if group == "micro_batch":
            phases.setdefault(key, {})["micro_batch"] = getattr(settings.micro_batch, key)
        elif group == "memory.activations":
            phases.setdefault(key, {})["activations"] = memory.activations[key]
        elif group in _UNPLANNED or name in _UNPLANNED:
            raise LowVRAMError(
                f"{name} is named, which no plan is made with.", "Train by the recipe's settings alone: memory=recipe."
            )
        elif group == "memory.weights":
            continue
        elif group.startswith("memory.") and group.removeprefix("memory.") in memory.by_optimizer():
            column = group.removeprefix("memory.")
            field_ = "kind" if column == "optimizer" else column
            optimizers.setdefault(key, {})[field_] = memory.by_optimizer()[column][key]
    if "memory.recompute_every" in settings.overrides:
        for name in phase_names(settings):
            phases.setdefault(name, {})["recompute_every"] = memory.recompute_every
    ema = memory.ema if "memory.ema" in settings.overrides else None
    return Fixed(phases=phases, optimizers=optimizers, ema=ema, weights=_fixed_weights(settings))


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


def phase_names(settings: Settings) -> list[str]:
    """The phases that a recipe trains."""
    loss = settings.loss
    used = {
        "path_length": loss.path_length_every and loss.path_length_weight,
        "R1": loss.r1_every and settings.r1_gamma,
    }
    return [name for name in PHASES if used.get(name, True)]


def with_micro_batches(policy: MemoryPolicy, settings: Settings, names: Iterable[str]) -> MemoryPolicy:
    """The policy with a recipe's own micro-batches written out."""
    for name in names:
        whole = settings.phase_batch(name)
        policy = policy.with_phase(name, micro_batch=min(getattr(settings.micro_batch, name) or whole, whole))
    return policy


def _changed(settings: Settings, allow: Collection[str]) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """The recipe with what was allowed, one change after the other; first other roundings alone."""
    roundings = tuple(name for name in allow if name in ROUNDINGS)
    if roundings:
        yield settings, ()
    changes: tuple[str, ...] = ()
    for name in allow:
        if name not in LOSSES:
            continue
        loss = settings.loss
        if name == "pl_shrink":
            loss = replace(loss, path_length_batch_shrink=min(settings.batch, 2 * loss.path_length_batch_shrink))
            said = f"loss.path_length_batch_shrink={loss.path_length_batch_shrink}"
        else:
            loss = replace(loss, r1_kind="finite_difference")
            said = "loss.r1_kind=finite_difference"
        settings = replace(settings, loss=loss)
        changes = (*changes, said)
        yield settings, changes
