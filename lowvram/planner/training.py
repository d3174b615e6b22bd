"""How a training is made to fit its card: planned, tried out on throw-away copies, and the plan's constants corrected.

`memory=recipe` trains as the recipe says, `memory=FILE.json` as a plan or a policy in a file does.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowvram import rng
from lowvram.config import settings_values
from lowvram.data.image_cache import cache_root
from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.memory.apply import Applied
from lowvram.memory.guard import CONTEXT_BYTES, Cap, Meter, in_gb
from lowvram.memory.policy import MemoryPolicy
from lowvram.memory.precision import choose as choose_precision
from lowvram.memory.recovery import free_memory, is_out_of_memory
from lowvram.planner import calibration, cards
from lowvram.planner.calibration import Constants
from lowvram.planner.cards import Card
from lowvram.planner.plan import Plan
from lowvram.planner.worker import plan_apart
from lowvram.settings import Settings
from lowvram.tasks import Task, build_task

TRIES = 3  # plans that are tried out, each with the constants that the one before taught
_MOST_FILE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a training runs under.

    settings: the recipe's, with the policy's micro-batches. policy: None: as the settings say. plan: if one was made.
    """

    settings: Settings
    policy: MemoryPolicy | None = None
    plan: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a try on throw-away copies measured. seconds: of a step, lazy phases by their share."""

    allocator_bytes: int
    device_bytes: int
    seconds: float
    ran_out: bool = False


def choose(
    settings: Settings, device: torch.device, cap: Cap, world_size: int, folder: Path, say: Callable[[str], None]
) -> Chosen:
    """The policy for a training: the user's, or a plan for the card that was tried out on it.

    folder: of the run.

    Raises:
        LowVRAMError: no plan fits, or a file of `memory=FILE` can't be used.
    """
    wanted = settings.memory.policy
    if wanted not in ("auto", "recipe"):
        return under(settings, policy_in(Path(wanted).expanduser(), settings))
    if wanted == "recipe" or not plans_for(settings, device, world_size):
        return Chosen(settings=settings)
    budget_bytes = _budget(device, cap)
    card = cards.present(device)
    for attempt in range(TRIES):
        plan = _planned(settings, card, budget_bytes, say)
        if not plan.fits:
            raise LowVRAMError(
                f"{settings.recipe} does not fit the {in_gb(budget_bytes)} that are there.\n{plan}",
                f"{'; '.join(plan.needs)}. memory=recipe trains without a plan.",
            )
        chosen = under(settings, plan.policy, plan)
        constants = calibration.load(card)
        trial = try_out(chosen, device, folder)
        say(compared(plan, trial))
        calibration.save(card, learnt(plan, trial, constants))
        if not trial.ran_out and trial.device_bytes <= plan.needed_bytes:
            break
        if attempt + 1 < TRIES:
            say("the plan needs more than it said; planning again with what was learnt")
    return chosen


def plans_for(settings: Settings, device: torch.device, world_size: int) -> bool:
    """Whether a training is planned by itself: on one card, without FSDP, which places things by itself."""
    return device.type == "cuda" and world_size == 1 and settings.memory.fsdp == "none"


def under(settings: Settings, policy: MemoryPolicy, plan: Plan | None = None) -> Chosen:
    """The settings with a policy's micro-batches, which the task's sampler goes by too."""
    micro = {name: policy.phase(name).micro_batch for name in settings.phase_names()}
    return Chosen(settings=settings.with_micro_batches(micro), policy=policy, plan=plan)


def policy_in(path: Path, settings: Settings) -> MemoryPolicy:
    """The policy of a plan.json, or one that stands alone in a file.

    Raises:
        LowVRAMError: it is not there, is neither, or was made for another recipe.
    """
    if not path.is_file():
        raise LowVRAMError(f"memory={path} is not there.", "Give auto, recipe, or a plan.json of lowvram.plan.")
    if path.stat().st_size > _MOST_FILE_BYTES:
        raise LowVRAMError(f"memory={path} is too large for a plan.", "Give a plan.json of lowvram.plan.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise LowVRAMError(f"memory={path} can't be read: {str(error)[:200]}.", "Give a plan.json.") from None
    if isinstance(values, dict) and "lowvram_plan" in values:
        policy = Plan.load(path).policy
    else:
        try:
            policy = MemoryPolicy.from_dict(values)
        except (TypeError, AttributeError, ValueError) as error:
            raise LowVRAMError(f"memory={path} is neither a plan nor a policy: {error}.", "Give a plan.json.") from None
    names = settings.phase_names()
    for name in policy.phases:
        if name not in names:
            raise LowVRAMError(f"memory={path} is for a phase {name}.", f"This recipe trains {', '.join(names)}.")
    return policy


def apply_to(task: Task, chosen: Chosen, device: torch.device, **processes: Any) -> Applied:
    """The chosen policy on a task's networks. processes: world_size and sum_over_processes, as in `Applied`."""
    settings, policy = chosen.settings, chosen.policy
    if policy is None:
        precision = "fp32" if task.own_precision else choose_precision(settings.precision, device)
        names = [phase.name for phase in task.phases]
        policy = MemoryPolicy.from_settings(settings, phases=names, precision=precision)
    return Applied(
        policy,
        task.phases,
        device=device,
        averages=task.averages,
        seed=settings.seed,
        own_precision=task.own_precision,
        zero_nonfinite=task.own_precision and task.half_dtype == torch.float16,
        **processes,
    )


# Trying out.


def try_out(chosen: Chosen, device: torch.device, folder: Path) -> Trial:
    """Run each phase twice on networks that are thrown away after it, the heaviest first, and sample.

    folder: of the run that is tried out.
    """
    states = rng.states(device)
    meter = Meter(device, synchronize=True)
    before = guard.outside_bytes(device) if device.type == "cuda" else 0
    ran_out = False
    try:
        _run(chosen, device, meter, folder)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ran_out = True
        del error
    free_memory(device)
    rng.restore(states, device)
    costs = meter.costs
    every = {phase.name: phase.every for phase in chosen.plan.phases} if chosen.plan else {}
    others = max(0, before - CONTEXT_BYTES)  # the display and other programs, whose memory is not this training's
    return Trial(
        allocator_bytes=max((cost.reserved_bytes for cost in costs.values()), default=0),
        device_bytes=max((cost.device_bytes for cost in costs.values()), default=0) - others,
        seconds=sum(cost.seconds / every[name] for name, cost in costs.items() if every.get(name)),
        ran_out=ran_out,
    )


def _run(chosen: Chosen, device: torch.device, meter: Meter, folder: Path) -> None:
    settings = chosen.settings.at_full_cost()
    task = build_task(settings, device, folder)
    task.prepare_training()
    applied = apply_to(task, chosen, device)
    images = task.example(settings.batch)
    labels, positions = torch.zeros(settings.batch, dtype=torch.int64), torch.arange(settings.batch)
    peaks = {phase.name: phase.live_bytes for phase in chosen.plan.phases} if chosen.plan else {}
    for time_ in ("warm-up", "timed"):
        for phase in sorted(task.phases, key=lambda phase: -peaks.get(phase.name, 0)):
            if time_ == "timed":
                meter.costs[phase.name].seconds = 0.0  # memory's peaks stay
            with meter.phase(phase.name):
                micro_batches = phase.micro_batches(images, labels, positions, 0, settings.seed)
                with applied.running(phase):
                    loss, means = applied.accumulate(phase, micro_batches)
                outcome = applied.update(phase, loss)
                if outcome.applied and phase.finish is not None:
                    phase.finish(means)
        with meter.phase("average"):
            applied.settle()
            for average in task.averages:
                average.update(1000, settings.batch)
    with meter.phase("sampling"), applied.sampling():
        task.sample(1 if device.type == "cpu" else min(settings.grid, settings.batch))


def compared(plan: Plan, trial: Trial) -> str:
    """Predicted against measured, in a line."""
    if trial.ran_out:
        return f"tried out: ran out of memory at {in_gb(trial.allocator_bytes)}, where the plan foresaw no more"
    predicted = plan.reserved_bytes + plan.workspace_bytes
    step = sum(phase.seconds / phase.every for phase in plan.phases if phase.every)
    return (
        f"tried out on copies, predicted and measured: {in_gb(predicted)} and {in_gb(trial.allocator_bytes)} reserved, "
        f"{in_gb(plan.device_bytes)} and {in_gb(trial.device_bytes)} on the card, {step:.3g} and {trial.seconds:.3g} s "
        "a step"
    )


def learnt(plan: Plan, trial: Trial, constants: Constants) -> Constants:
    """The card's constants after a try."""
    if trial.ran_out:  # what was measured ends where memory did
        return replace(constants, margin_fraction=min(0.25, constants.margin_fraction + 0.05))
    step = sum(phase.seconds / phase.every for phase in plan.phases if phase.every)
    return calibration.corrected(
        constants,
        predicted_reserved_bytes=round(plan.reserved_bytes / constants.reserved_factor),
        measured_reserved_bytes=trial.allocator_bytes,
        predicted_device_bytes=plan.device_bytes,
        measured_device_bytes=trial.device_bytes,
        predicted_seconds=step / constants.time_factor,
        measured_seconds=trial.seconds,
    )


# Plans that were made before.


def _planned(settings: Settings, card: Card, budget_bytes: int, say: Callable[[str], None]) -> Plan:
    kept = _plans_folder() / f"{_key(settings, card, budget_bytes)}.json"
    try:
        plan = Plan.load(kept)
    except LowVRAMError:
        say(f"planning for the {in_gb(budget_bytes)} of the {card.name}: half a minute")
        plan = plan_apart(settings, card, budget_bytes)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            plan.save(kept)
        except OSError:  # planned again the next time
            pass
    say(str(plan))
    return plan


def _key(settings: Settings, card: Card, budget_bytes: int) -> str:
    """What a plan depends on."""
    from lowvram import __version__

    values = settings_values(settings)
    for name in ("out", "resume", "seed", "data", "debug", "logger", "keep", "snapshot_kimg", "log_kimg"):
        values.pop(name)
    for name in ("price", "electricity", "carbon", "contributor", "mark"):  # nothing of how it is trained
        values.pop(name)
    parts = [values, sorted(settings.overrides), card.name, card.vram_bytes, budget_bytes // 2**26 * 2**26]
    parts += [asdict(calibration.load(card)), torch.__version__, __version__, settings.data.labels]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _plans_folder() -> Path:
    return cache_root() / "plans"


def _budget(device: torch.device, cap: Cap) -> int:
    """What this process may use of the card, context included: of `vram`, or of what is free."""
    if cap.allocator_bytes is not None:
        return cap.allocator_bytes + CONTEXT_BYTES
    return cap.total_bytes - max(0, guard.outside_bytes(device) - CONTEXT_BYTES)
