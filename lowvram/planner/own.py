"""A plan for a model of your own: plain modules, plain optimizers, and losses as functions.

plan = plan_memory([phase], vram="6GB", example=batch)
applied = plan.apply([phase])
for batch in loader:
    for phase in applied.phases:
        applied.step(phase, batch)
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from lowvram import rng
from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.memory import precision as precisions
from lowvram.memory.apply import Applied
from lowvram.memory.guard import in_gb
from lowvram.memory.optimizers import pack
from lowvram.memory.policy import PRECISIONS, MemoryPolicy, PhasePolicy
from lowvram.phase import MicroBatch, Phase, as_tensors, count_samples
from lowvram.planner import cards, make
from lowvram.planner.cards import Card
from lowvram.planner.fake_weights import FakeWeights
from lowvram.planner.options import LOSSES, ROUNDINGS, Fixed
from lowvram.planner.plan import Plan
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure
from lowvram.planner.watch import Watch
from lowvram.settings import nearest, parse_bytes

log = logging.getLogger(__name__)

BATCH_NORM = "batch_norm"  # allow=...: batches are cut although batch normalisation then sees less of them
Blocks = Mapping[nn.Module, Mapping[str, nn.Module]]


def plan_memory(
    phases: Sequence[Phase],
    vram: str | None = None,
    *,
    example: Any,
    card: str | Card | None = None,
    allow: Collection[str] = (),
    precision: str = "auto",
    networks: Mapping[str, nn.Module] | None = None,
    averages: Sequence[ExponentialMovingAverage] = (),
    blocks: Blocks | None = None,
    kimg: float = 1000.0,
    name: str = "your model",
) -> Plan:
    """The fastest way to train phases within a budget, found without computing anything or touching the networks.

    Losses run on tensors that have shapes and no values: what they read of one (`item`) is 0. Those that can be cut
    into micro-batches are: a loss has to be a mean over samples.

    Args:
        phases: of one step, in their order, with networks on any device ("meta" too) and plain optimizers.
        vram: of the card, such as "6GB"; None: all of it.
        example: a batch as `Phase.cut` takes it, of which only shapes and dtypes count.
        card: by name; None: the one that is there, else a usual one of the budget's size.
        allow: what may be changed if nothing fits else: adam8bit; batch_norm: batch normalisation over micro-batches.
        precision: of autocast: fp32, bf16, fp16; auto is bf16 where the card has it, else fp16.
        networks: what losses use besides the networks that phases train and go through, such as a VGG, by name. A
            network that a gradient goes through belongs in `Phase.frozen`: it can be recomputed and streamed then.
        averages: averaged networks. Update them after `applied.settle()`.
        blocks: a network's blocks by name, where its structure does not show them.
        kimg: thousand samples of the training, for its hours. name: of the training, for the table.

    Raises:
        LowVRAMError: the budget, the card, a phase or the example makes no sense, or a loss can't be traced.
    """
    example, allow = as_tensors(example), tuple(allow)
    _check_allowed(allow)
    _check_phases(phases, count_samples(example))
    where = make.place(None if vram is None else parse_bytes("vram", vram), card)
    named = _named(phases, networks or {}, averages)
    whole = {phase.name: {"micro_batch": phase.samples} for phase in phases} if _uses_batch_norm(named) else {}
    autocast = autocast_for(precision, where.card)
    said = f"batches are not cut, for batch normalisation would see less of them (allow={BATCH_NORM})"
    request = make.Request(
        build=_builder(phases, example, named, averages, blocks),
        name=name,
        batch=max(phase.samples for phase in phases),
        kimg=kimg,
        structure=Structure(precision=autocast, triton=cards.runs_triton(where.card)),
        fixed=Fixed(phases=whole),
        plain=MemoryPolicy(
            precision=autocast, phases={phase.name: PhasePolicy(micro_batch=phase.samples) for phase in phases}
        ),
        smaller=f"{f'allow={BATCH_NORM}, which cuts batches, ' if whole else ''}smaller samples, or a smaller network",
        notes=(said,) if whole else (),
        proportional=False,  # nobody knows how others' models treat their batch
        # With a card, autograd has threads that don't bear a fork once a backward has run.
        processes=1 if torch.cuda.is_available() else None,
    )
    roundings = tuple(change for change in allow if change != BATCH_NORM)
    with _random_state_kept():
        plan = make.make(request, where)
        if not plan.fits and roundings:
            plan = make.make(request, where, allow=roundings)
        if not plan.fits and whole and BATCH_NORM in allow:
            said = "batch normalisation over micro-batches"
            request = replace(request, fixed=Fixed(), notes=(), changes=(said,))
            plan = make.make(request, where, allow=roundings)
    return plan


def apply_plan(
    plan: Plan,
    phases: Sequence[Phase],
    *,
    device: torch.device | str | None = None,
    networks: Mapping[str, nn.Module] | None = None,
    averages: Sequence[ExponentialMovingAverage] = (),
    blocks: Blocks | None = None,
    seed: int = 0,
) -> Applied:
    """Carry out a plan: networks go to the device, and on CUDA this process is bound to the plan's budget.

    The optimizers' state, if there is any, is taken over: from then on it is `applied.updaters[name].state()`.

    Args:
        plan: from `plan_memory`, or `Plan.load`.
        phases, networks, averages, blocks: as `plan_memory` had them.
        device: None: CUDA where it is, else where the parameters are.
        seed: of the samples' seeds, and of stochastic rounding.

    Raises:
        LowVRAMError: the plan does not fit its budget, was made for other phases, or the card can't do what it says.
    """
    if not plan.fits:
        raise LowVRAMError(
            f"{plan.recipe} does not fit vram={in_gb(plan.vram_bytes or 0)}: nothing can be applied.",
            f"Use {' or '.join(plan.needs[:2]) or 'a larger budget'}.",
        )
    planned = {row.name: row.samples for row in plan.phases if row.name in plan.policy.phases}
    given = {phase.name: phase.samples for phase in phases}
    if planned != given:
        raise LowVRAMError(
            f"the plan is for phases of {_in_words(planned)} samples, and these are {_in_words(given)}.",
            "Plan anew: plan_memory(phases, ...).",
        )
    where = _device(phases, device)
    precisions.choose(plan.policy.precision, where)
    if where.type == "cuda":
        for message in guard.cap(plan.vram_bytes, where).messages:
            log.warning(message)
    others = list((networks or {}).values())
    # What phases train and go through is placed with the plan: streamed, or on the device.
    placed = {module for phase in phases for n in (*phase.networks, *phase.frozen) for module in n.modules()}
    for network in others:
        if not any(module in placed for module in network.modules()):
            network.to(where)
    for parameter in (p for phase in phases for p in phase.parameters()):
        parameter.grad = None  # of a training before
    applied = Applied(plan.policy, phases, device=where, averages=averages, blocks=blocks, seed=seed)
    for name, updater in applied.updaters.items():
        if updater.like.state:
            for message in updater.load_state(*pack(updater.like)):
                log.warning("optimizer of %s: %s", name, message)
            updater.like.state.clear()
    return applied


# What is planned for.


def _builder(
    phases: Sequence[Phase],
    example: Any,
    named: Mapping[str, nn.Module],
    averages: Sequence[ExponentialMovingAverage],
    blocks: Blocks | None,
) -> Callable[[], Subject]:
    """What swaps the networks' tensors for fake ones, until `Subject.restore`."""
    on_card = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.is_cuda]
    optimizers = list({id(phase.optimizer): phase.optimizer for phase in phases}.values())

    def build() -> Subject:
        fakes = FakeWeights(named, optimizers)
        try:
            watches = [Watch(phase, named.values()) for phase in phases]
            return Subject(
                phases=[replace(phase, loss=watch.loss) for phase, watch in zip(phases, watches, strict=True)],
                networks=named,
                micro_batch=micro_batch,
                averages=[
                    ExponentialMovingAverage(a.source, a.target, half_life_kimg=a.half_life_kimg, rampup=a.rampup)
                    for a in averages
                ],
                batch_bytes=sum(tensor.nbytes for tensor in on_card),
                blocks=blocks,
                restore=fakes.undo,
            )
        except BaseException:
            fakes.undo()
            raise

    def micro_batch(phase: Phase, n: int) -> MicroBatch:
        def some(tensor: Tensor) -> Tensor:
            channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            return torch.empty((n, *tensor.shape[1:]), dtype=tensor.dtype, memory_format=memory_format)

        with unset_fake_temporarily():
            seeds = torch.arange(1, n + 1)  # real numbers even in a trace
        return MicroBatch.of(tree_map_only(Tensor, some, example), seeds)

    return build


def _named(
    phases: Sequence[Phase], networks: Mapping[str, nn.Module], averages: Sequence[ExponentialMovingAverage]
) -> dict[str, nn.Module]:
    """All networks by name, none inside another."""
    found = dict(networks)
    for network in (n for phase in phases for n in (*phase.networks, *phase.frozen)):
        _add(found, type(network).__name__, network)
    for average in averages:
        _add(found, f"average of {type(average.source).__name__}", average.target)
    return found


def _add(found: dict[str, nn.Module], name: str, network: nn.Module) -> None:
    if any(network is module for known in found.values() for module in known.modules()):
        return
    names = (name if n == 1 else f"{name} {n}" for n in range(1, len(found) + 2))
    found[next(one for one in names if one not in found)] = network


def _uses_batch_norm(named: Mapping[str, nn.Module]) -> bool:
    """Whether a sample's loss depends on the others in its batch."""
    modules = (module for network in named.values() for module in network.modules())
    return any(isinstance(module, _BatchNorm) and module.training for module in modules)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    state = rng.states(device)
    try:
        yield
    finally:
        rng.restore(state, device)


# What is asked for.


def _check_allowed(allow: Collection[str]) -> None:
    for change in allow:
        if change in LOSSES:
            raise LowVRAMError(f"allow={change} changes a recipe's loss.", "Change your own: it is yours.")
        if change not in (*ROUNDINGS, BATCH_NORM):
            raise LowVRAMError(f"allow={change} is not known.", nearest(change, [*ROUNDINGS, BATCH_NORM]))


def _check_phases(phases: Sequence[Phase], samples: int) -> None:
    if not phases:
        raise LowVRAMError("there is no phase to plan for.", "Give at least one lowvram.Phase.")
    for phase in phases:
        if not isinstance(phase, Phase):
            raise LowVRAMError(f"{type(phase).__name__} is not a phase.", "Give a list of lowvram.Phase.")
    names = [phase.name for phase in phases]
    for phase in phases:
        if names.count(phase.name) > 1:
            raise LowVRAMError(f"two phases are called {phase.name}.", "Give each a name of its own.")
        if phase.samples < 1 or phase.samples % phase.group:
            raise LowVRAMError(
                f"phase {phase.name} has {phase.samples} samples in groups of {phase.group}.",
                f"Use a multiple of {phase.group}.",
            )
        if samples < phase.samples:
            log.info("the example has %d samples, phase %s takes %d", samples, phase.name, phase.samples)
        held = {id(p) for group in phase.optimizer.param_groups for p in group["params"]}
        sharing = [other for other in phases if other.optimizer is phase.optimizer]
        own = {id(p): p for other in sharing for p in other.parameters()}
        if held != set(own):
            only, lacking = len(held - set(own)), len(set(own) - held)
            raise LowVRAMError(
                f"phase {phase.name}: {lacking} parameters of its networks are not in its optimizer, and {only} in "
                "that are of no network of it.",
                "Name the modules that are trained, all of each, in Phase(networks=...), and what else the loss uses "
                "in plan_memory(networks={'name': module}).",
            )


def autocast_for(wanted: str, card: Card) -> str:
    if wanted == "auto":
        return "bf16" if card.bf16 else "fp16"
    if wanted not in PRECISIONS:
        raise LowVRAMError(f"precision={wanted} is not known.", f"Use one of auto, {', '.join(PRECISIONS)}.")
    if wanted == "bf16" and not card.bf16:
        raise LowVRAMError(
            f"precision=bf16: the {card.name} has no bf16 arithmetic and would emulate it.",
            "Use precision=fp16 (with loss scaling), or precision=auto.",
        )
    return wanted


def _device(phases: Sequence[Phase], device: torch.device | str | None) -> torch.device:
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None:
        device = next((p.device for phase in phases for p in phase.parameters()), torch.device("cpu"))
    return torch.device(device)


def _in_words(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in samples.items()) or "none"
