"""A recipe's task as a subject to plan for."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowvram.errors import LowVRAMError
from lowvram.memory.policy import MemoryPolicy
from lowvram.phase import MicroBatch, Phase
from lowvram.planner import cards, make, published
from lowvram.planner.cards import Card
from lowvram.planner.costs import CardCost
from lowvram.planner.options import LOSSES, ROUNDINGS, Fixed, check_allowed
from lowvram.planner.own import autocast_for
from lowvram.planner.pieces import Pieces
from lowvram.planner.plan import Plan
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure
from lowvram.receipt.rates import Rates
from lowvram.settings import Settings, parse_bytes
from lowvram.tasks import build_task, task_class

Costs = Literal["none", "quick", "each"]


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
            zero_nonfinite=task.own_precision and task.half_dtype == torch.float16,
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
    costs: Costs = "none",
) -> Plan:
    """The plan for a recipe within `settings.vram`, on a card (see `make.place`), or in a place that is given whole.

    What is allowed is used only if nothing fits without it. processes: that train together, each on such a card.
    costs: with what the training takes on the cards of the table: "each" plans for every one by itself; "quick" takes
        what was recorded for the plan's card, and leaves out those that would train in another precision.

    Raises:
        LowVRAMError: the budget, the card or an allowed change makes no sense.
    """
    check_allowed(allow)
    if where is None:
        where = make.place(None if settings.vram is None else parse_bytes("vram", settings.vram), card)
    with ExitStack() as stack:
        ways = [_Way(settings, (), (), processes, stack)]
        for changed, changes in _changed(settings, allow):
            same = ways[0] if changed is settings else None
            ways.append(_Way(changed, changes, tuple(allow), processes, stack, same))
        for way in ways:
            plan = way.plan(where)
            if plan.fits:
                break
        return plan if costs == "none" else _with_costs(plan, ways, where, each=costs == "each")


class _Way:
    """The recipe, or what it becomes where changes are allowed, with its pieces, which end with the stack."""

    def __init__(
        self,
        settings: Settings,
        changes: tuple[str, ...],
        allow: tuple[str, ...],
        processes: int,
        stack: ExitStack,
        same: "_Way | None" = None,  # that trains the same, and has the same pieces
    ) -> None:
        self.settings, self.changes, self.allow, self.processes = settings, changes, allow, processes
        self._stack, self._same = stack, same

    @cached_property
    def pieces(self) -> Pieces:
        """Of every card that the way is tried on."""
        return self._same.pieces if self._same else self._stack.enter_context(Pieces(subject_of(self.settings)))

    def request(self, card: Card) -> make.Request:
        """What to plan for on a card."""
        return _request(self.settings, self.changes, card, self.processes)

    def plan(self, where: make.Place) -> Plan:
        """The plan for a place."""
        return make.make_from(self.pieces, self.request(where.card), where, allow=self.allow)

    def cost(self, card: Card, structure: Structure) -> CardCost:
        """The cost on a card, by what is recorded under a structure."""
        request = replace(self.request(card), structure=structure)
        return make.cost_from(self.pieces, request, card, allow=self.allow)


def _with_costs(plan: Plan, ways: Sequence[_Way], where: make.Place, *, each: bool) -> Plan:
    """The plan with the training's cost on its card and on the others, in the order of the table."""
    here, notes = ways[0].request(where.card).structure, plan.notes
    kinds = {card.name: ways[0].request(card).structure for card in cards.CARDS}
    if each:
        # Cards that record alike one after the other, the plan's kind first: another has the networks built anew.
        order = list(dict.fromkeys([here, *kinds.values()]))
        looked_at = sorted(cards.CARDS, key=lambda card: order.index(kinds[card.name]))
    else:
        looked_at = [card for card in cards.CARDS if _trains_like(kinds[card.name], here)]
        notes += tuple(_on_quick_costs(plan.card, here, kinds))
        kinds = dict.fromkeys(kinds, here)
    own = CardCost(
        card=plan.card,
        fits=plan.fits,
        needed_bytes=plan.needed_bytes,
        usable_bytes=where.budget_bytes,
        images_per_second=plan.images_per_second if plan.fits else 0.0,
        hours=plan.hours if plan.fits else 0.0,
        kwh=plan.kwh if plan.fits else 0.0,
        changes=plan.changes,
    )
    rows = {plan.card: own}
    for card in looked_at:
        if card.name not in rows:
            rows[card.name] = _cost(ways, card, kinds[card.name])
    others = tuple(rows[card.name] for card in cards.CARDS if card.name in rows)
    return replace(plan, costs=others if own in others else (own, *others), notes=notes)


def _on_quick_costs(name: str, here: Structure, kinds: Mapping[str, Structure]) -> Iterator[str]:
    """What is to be known of a table of cards that all trained as one of them does."""
    left_out = [other for other, kind in kinds.items() if not _trains_like(kind, here)]
    if any(kind.triton != here.triton for other, kind in kinds.items() if other not in left_out):
        # faces256: 1.17 to 1.35 of the time that costs=true finds, and the same memory
        wrong = "that don't run Triton's kernels are slower" if here.triton else "that run Triton's kernels are faster"
        yield (
            f"other cards are reckoned with the {name}'s kernels: those {wrong} than told, often by a fifth to a third "
            "(costs=true: each by itself)"
        )
    if left_out:
        yield f"costs=true tells of {', '.join(left_out)} too, which would train in another precision"


def _trains_like(one: Structure, other: Structure) -> bool:
    """Whether training needs as much memory and arithmetic, but for kernels."""
    halves = (one.precision == "fp32") == (other.precision == "fp32")
    return halves and replace(one, triton=other.triton, precision=other.precision) == other


def _cost(ways: Sequence[_Way], card: Card, structure: Structure) -> CardCost:
    for way in ways:
        row = way.cost(card, structure)
        if row.fits:
            break
    return row


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
        rates=Rates.of(settings.price, settings.electricity, settings.carbon),
        published=published.figures(settings),
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
