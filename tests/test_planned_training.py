"""Training under a plan: from a file, or made for the card that is there, tried out, and learnt from."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowvram import LowVRAMError, Trainer, load_recipe
from lowvram.memory.guard import Cap
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.planner import calibration, cards, training, worker
from lowvram.planner.plan import Plan
from lowvram.planner.recipe import plan_recipe
from lowvram.planner.training import Chosen, Trial
from lowvram.settings import Settings

Make = Callable[..., Settings]
CARD = cards.find("RTX 2060")
CPU = torch.device("cpu")
NO_CAP = Cap(vram_bytes=None, allocator_bytes=None, total_bytes=CARD.vram_bytes)
NO_RUN = Path("no-run-yet")
POLICY = MemoryPolicy(
    phases={"G": PhasePolicy(micro_batch=4, activations="recompute"), "R1": PhasePolicy(activations="offload")},
    optimizers={"D": OptimizerPolicy(state="host")},
    ema="host",
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    from tiny import TINY

    recipe = load_recipe("faces32", [*TINY, "batch=16", f"out={tmp_path_factory.mktemp('plan') / 'run'}", "vram=1GB"])
    return plan_recipe(recipe, card=CARD)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, plan: Plan, tmp_path: Path) -> list[int]:
    """Trainings are planned as on a card, by a planner that answers at once; returns the budgets it was asked for.

    What they learn of it stays in the test.
    """
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []

    def planner(settings: Settings, card: cards.Card, budget_bytes: int) -> Plan:
        asked.append(budget_bytes)
        return plan

    monkeypatch.setattr(training, "plans_for", lambda *_: True)
    monkeypatch.setattr(cards, "present", lambda _: CARD)
    monkeypatch.setattr(training, "plan_apart", planner)
    return asked


def trial_of(plan: Plan, **changes: object) -> Trial:
    """A try that measures just what was predicted."""
    as_foreseen = Trial(
        allocator_bytes=plan.reserved_bytes + plan.workspace_bytes, device_bytes=plan.device_bytes, seconds=1.0
    )
    return replace(as_foreseen, **changes)


# A policy in a file.


def test_a_policy_in_a_file_is_applied(tiny: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(POLICY.to_dict()))
    trainer = Trainer(tiny("batch=16", f"memory={file}"), quiet=True)
    assert trainer.applied.policy == POLICY
    assert {p.name: p.micro_batch for p in trainer.task.phases}["G"] == 4
    plain = Trainer(tiny("batch=16", f"out={tmp_path / 'plain'}"), quiet=True)
    ours, theirs = next(iter(trainer)), next(iter(plain))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_a_plan_is_a_policy_in_a_file(tiny: Make, tmp_path: Path, plan: Plan) -> None:
    plan.save(tmp_path / "plan.json")
    trainer = Trainer(tiny("batch=16", f"memory={tmp_path / 'plan.json'}"), quiet=True)
    assert trainer.applied.policy == plan.policy


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not there"),
        ("{", "can't be read"),
        ("[1]", "neither a plan nor a policy"),
        ('{"lowvram_plan": 99}', "version"),
        ('{"colour": "red"}', "neither a plan nor a policy"),
        ('{"phases": {"denoise": {}}}', "phase denoise"),
        ('{"phases": {"G": {"activations": "forget"}}}', "activations=forget"),
    ],
)
def test_files_that_are_no_policy(tiny: Make, tmp_path: Path, content: str | None, problem: str) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(LowVRAMError, match=problem):
        Trainer(tiny(f"memory={file}"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_words_that_are_no_policy(tiny: Make) -> None:
    with pytest.raises(LowVRAMError, match="memory=lots"):
        tiny("memory=lots")


def test_nothing_is_planned_on_a_cpu(tiny: Make) -> None:
    trainer = Trainer(tiny("micro_batch.G=4", "batch=16"), quiet=True)
    assert trainer.chosen == Chosen(settings=trainer.recipe)
    assert trainer.applied.policy.phase("G").micro_batch == 4


# A plan for the card.


def test_a_training_is_planned_tried_out_and_trained(
    tiny: Make, tmp_path: Path, plan: Plan, on_a_card: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny("batch=16", "kimg=0.016"))
    assert trainer.applied.policy == plan.policy
    said = capsys.readouterr().out
    assert f"{plan.recipe} fits" in said
    assert "predicted and measured" in said
    assert Plan.load(tmp_path / "run" / "plan.json").policy == plan.policy
    assert (tmp_path / "run" / "plan.png").stat().st_size > 10_000
    trainer.fit()
    assert trainer.images_seen == 16


def test_the_same_plan_is_not_made_twice(tiny: Make, plan: Plan, on_a_card: list[int]) -> None:
    recipe = tiny("batch=16", "seed=7")
    for _ in range(2):
        training._planned(recipe, CARD, 2**30, lambda _: None)
    assert len(on_a_card) == 1
    training._planned(replace(recipe, batch=8), CARD, 2**30, lambda _: None)
    assert len(on_a_card) == 2


def test_what_was_measured_is_learnt(
    tiny: Make, plan: Plan, on_a_card: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    more = plan.reserved_bytes + plan.workspace_bytes + 2**27
    trials = iter([trial_of(plan, allocator_bytes=more, device_bytes=plan.needed_bytes + 2**27), trial_of(plan)])
    monkeypatch.setattr(training, "try_out", lambda *_: next(trials))
    said: list[str] = []
    chosen = training.choose(tiny("batch=16"), CPU, NO_CAP, 1, NO_RUN, said.append)
    assert chosen.plan == plan
    assert any("planning again" in line for line in said)
    learnt = calibration.load(CARD)
    assert learnt.measurements == 2
    assert calibration.allocator_bytes(plan.reserved_bytes, learnt) >= more - 2**26  # eased by the second try
    assert len(on_a_card) == 2  # other constants, another plan


def test_a_try_that_runs_out_widens_the_margin(
    tiny: Make, plan: Plan, on_a_card: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    trials = iter([trial_of(plan, ran_out=True), trial_of(plan)])
    monkeypatch.setattr(training, "try_out", lambda *_: next(trials))
    before = calibration.load(CARD).margin_fraction
    training.choose(tiny("batch=16"), CPU, NO_CAP, 1, NO_RUN, lambda _: None)
    assert calibration.load(CARD).margin_fraction > before


def test_a_training_that_does_not_fit_says_what_would(
    tiny: Make, plan: Plan, on_a_card: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    too_large = replace(plan, fits=False, vram_bytes=2**28, needs=("vram=2GB, with the settings above",))
    monkeypatch.setattr(training, "plan_apart", lambda *_: too_large)
    with pytest.raises(LowVRAMError, match="does not fit") as error:
        Trainer(tiny("batch=16"), quiet=True)
    assert "vram=2GB" in error.value.remedy
    assert "memory=recipe" in error.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_try_changes_nothing(tiny: Make, plan: Plan) -> None:
    """It runs for real: each phase, the average and the sampler, on networks of its own."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    chosen = training.under(tiny("batch=16"), plan.policy, plan)
    trial = training.try_out(chosen, CPU, NO_RUN)
    assert torch.equal(torch.rand(4), expected)
    assert trial.seconds > 0
    assert trial.allocator_bytes > 0
    assert not trial.ran_out


def test_a_try_that_runs_out_of_memory_is_a_result(tiny: Make, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training, "_run", fail)
    assert training.try_out(training.under(tiny("batch=16"), plan.policy, plan), CPU, NO_RUN).ran_out


def test_other_errors_of_a_try_are_raised(tiny: Make, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(training, "_run", fail)
    with pytest.raises(ValueError, match="something else"):
        training.try_out(training.under(tiny("batch=16"), plan.policy, plan), CPU, NO_RUN)


# A process of its own.


@pytest.mark.slow
def test_a_plan_made_apart_is_the_same(tiny: Make, plan: Plan) -> None:
    found = worker.plan_apart(tiny("batch=16"), CARD, 2**30)
    assert found.policy == plan.policy
    assert found.device_bytes == plan.device_bytes


def test_errors_of_the_other_process_are_told(tiny: Make) -> None:
    with pytest.raises(LowVRAMError, match="leaves nothing to train with") as error:
        worker.plan_apart(tiny("batch=16"), CARD, 2**28)
    assert "vram=" in error.value.remedy
