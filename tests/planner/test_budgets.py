"""Budgets: a larger one never gives a slower plan, and a plan stays within its own when its requests are replayed."""

from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import TINY

from lowvram import load_recipe
from lowvram.planner import calibration, cards
from lowvram.planner.allocator import replay
from lowvram.planner.pieces import Pieces
from lowvram.planner.recipe import subject_of
from lowvram.planner.search import Found, Search, slowness
from lowvram.planner.tracing import Structure

CARD = cards.find("RTX 3060")
CONSTANTS = calibration.default(CARD)
RECIPE = ["resolution=32", "batch=32", "model.channel_base=4096", "model.channel_max=128", "mbstd=4"]
MIB = 2**20
# From what nothing fits into to what the plain run leaves unused.
LEAST, MOST = 520, 1400
BUDGETS = st.integers(LEAST, MOST).map(lambda mib: mib * MIB)


@pytest.fixture(scope="module")
def search() -> Iterator[Search]:
    words = [word.replace("mbstd=", "model.mbstd_group_size=") for word in RECIPE]
    with Pieces(subject_of(load_recipe("faces32", [*TINY, *words])), processes=1) as pieces:
        yield Search(pieces, Structure(), CARD, CONSTANTS)


def replayed_bytes(found: Found, budget_bytes: int) -> int:
    """What an allocator bound to the budget reserves for the plan's requests, made anew, with all around it."""
    assert found.best is not None
    candidate = found.best.candidate
    capacity = budget_bytes - CONSTANTS.context_bytes - CONSTANTS.workspace_bytes
    again = replay(candidate.estimator.requests(candidate.policy), capacity_bytes=capacity)
    assert again.fits
    assert again.flushes == 0
    return calibration.needed_bytes(again.reserved_bytes, CONSTANTS)


@settings(max_examples=60)
@given(budget_bytes=BUDGETS)
def test_a_plan_is_within_its_budget(search: Search, budget_bytes: int) -> None:
    found = search.within(budget_bytes)
    if found.best is None:
        assert found.least.needed_bytes > budget_bytes
        return
    assert found.best.needed_bytes <= budget_bytes
    assert replayed_bytes(found, budget_bytes) <= budget_bytes


@settings(max_examples=60)
@given(one=BUDGETS, other=BUDGETS)
@example(one=LEAST * MIB, other=MOST * MIB)
def test_a_larger_budget_never_gives_a_slower_plan(search: Search, one: int, other: int) -> None:
    small, large = (search.within(budget).best for budget in sorted((one, other)))
    if small is None:
        return
    assert large is not None
    assert slowness(large.candidate.seconds) <= slowness(small.candidate.seconds)


def test_the_budgets_meet_every_tier(search: Search) -> None:
    """Or the tests above would say little."""
    plans = [search.within(mib * MIB).best for mib in range(LEAST, MOST, 40)]
    assert plans[0] is None
    policies = {plan.candidate.policy for plan in plans if plan is not None}
    assert len(policies) >= 4
    plain = search.within(None).best
    assert plain is not None
    assert plain.candidate.techniques == 0
    assert {phase.micro_batch for phase in plain.candidate.policy.phases.values()} <= {32, 16}


@pytest.mark.parametrize("mib", [LEAST + 100, 700, 900, MOST])
def test_the_mathematics_stay(search: Search, mib: int) -> None:
    found = search.within(mib * MIB)
    candidate = (found.best or found.least).candidate
    for phase in search.resident.facts.phases:
        micro_batch = candidate.policy.phase(phase.name).micro_batch
        assert micro_batch is not None
        assert phase.samples_per_process % micro_batch == 0
        assert micro_batch % phase.group == 0
    for name in search.resident.facts.optimizers:
        assert candidate.policy.optimizer(name).kind == "adam"
        assert candidate.policy.optimizer(name).weights_dtype == "fp32"
