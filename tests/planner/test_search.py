"""The search: what it finds is within the budget, more memory never makes it slower, and settings stay as they are."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import peaks, stylegan2

from lowvram.memory.policy import MemoryPolicy
from lowvram.planner import calibration, cards
from lowvram.planner.allocator import replay
from lowvram.planner.options import Fixed, legal
from lowvram.planner.pieces import Pieces
from lowvram.planner.search import Search, Weighed, slowness
from lowvram.planner.tracing import Structure

# Wide enough for its plans to differ by hundreds of MB; a recording takes no longer for that.
WIDE = ("model.channel_base=16384", "model.channel_max=512")
BUILD = stylegan2("augment.mode=none", "loss.path_length_every=0", "resolution=16", "batch=64", *WIDE)
CARD = cards.find("RTX 3060")
CONSTANTS = replace(calibration.default(CARD), context_bytes=100 * 2**20, workspace_bytes=10 * 2**20)
SAMPLES, GROUP = {"G": 64, "D": 64, "R1": 64}, 4
GRID = 1.011  # times within one percent count as equal


@pytest.fixture(scope="module")
def pieces() -> Iterator[Pieces]:
    with Pieces(BUILD, processes=1) as made:
        yield made


@pytest.fixture(scope="module")
def search(pieces: Pieces) -> Search:
    return Search(pieces, Structure(), CARD, CONSTANTS)


@pytest.fixture(scope="module")
def span(search: Search) -> tuple[int, int]:
    """Bytes from a little below what the thriftiest plan needs to a little above the most lavish."""
    least, most = search.within(1).least, search.within(None).best
    assert most is not None
    return least.needed_bytes - 8 * 2**20, most.needed_bytes + 8 * 2**20


def budget(span: tuple[int, int], share: float) -> int:
    return int(span[0] + share * (span[1] - span[0]))


SHARES = st.floats(0.0, 1.0)


@given(shares=st.tuples(SHARES, SHARES))
@settings(max_examples=60)
@pytest.mark.slow
def test_more_memory_is_never_slower(search: Search, span: tuple[int, int], shares: tuple[float, float]) -> None:
    less, more = (budget(span, share) for share in sorted(shares))
    before, after = search.within(less).best, search.within(more).best
    if before is None:
        return
    assert after is not None
    assert slowness(after.candidate.seconds) <= slowness(before.candidate.seconds)
    assert after.candidate.seconds <= before.candidate.seconds * GRID
    assert after.candidate.rank <= before.candidate.rank


@given(share=SHARES)
@settings(max_examples=40)
def test_a_plan_is_within_its_budget(search: Search, span: tuple[int, int], share: float) -> None:
    vram_bytes = budget(span, share)
    found = search.within(vram_bytes)
    if found.best is None:
        assert found.least.needed_bytes > vram_bytes
        return
    assert found.best.needed_bytes <= vram_bytes
    assert found.best.settled
    for faster in found.faster:  # told as what did not fit, or is no better
        assert faster.needed_bytes > vram_bytes or faster.candidate.rank >= found.best.candidate.rank
    capacity = vram_bytes - CONSTANTS.context_bytes - CONSTANTS.workspace_bytes
    replayed = replay(found.best.requests, capacity_bytes=capacity)
    assert replayed.fits
    assert replayed.flushes == 0
    assert replayed.reserved_bytes + calibration.margin(replayed.reserved_bytes, CONSTANTS) <= capacity


def test_there_are_many_plans(search: Search, span: tuple[int, int]) -> None:
    """Else the tests above would say little."""
    plans = [search.within(budget(span, step / 40)).best for step in range(41)]
    assert plans[0] is None
    assert plans[-1] is not None
    found = list(dict.fromkeys(plan.candidate.policy for plan in plans if plan is not None))
    assert len(found) >= 6
    streamed = [any(own.weights == "stream" for own in policy.optimizers.values()) for policy in found]
    assert streamed[0] and not streamed[-1]


def test_a_budget_that_nothing_fits(search: Search, span: tuple[int, int]) -> None:
    found = search.within(span[0])
    assert found.best is None
    assert found.least.needed_bytes > span[0]
    assert (found.faster, found.slower) == ((), ())
    again = search.within(found.least.needed_bytes)
    assert again.best is not None  # what is said to be needed is enough
    assert again.best.needed_bytes <= found.least.needed_bytes


def test_without_a_budget_nothing_is_done(search: Search) -> None:
    best = search.within(None).best
    assert best is not None
    assert best.candidate.techniques == 0
    policy = best.candidate.policy
    assert {name: policy.phase(name).micro_batch for name in SAMPLES} == SAMPLES


@given(share=SHARES)
@settings(max_examples=60)
def test_every_step_stays_the_same_step(search: Search, span: tuple[int, int], share: float) -> None:
    """Micro-batches divide the samples, keep groups together, and a fused update is exact."""
    found = search.within(budget(span, share))
    for weighed in (found.best, found.least, *found.faster, *found.slower):
        if weighed is not None:
            check(weighed)


def check(weighed: Weighed) -> None:
    """That the mathematics of a plan is the recipe's."""
    policy, facts = weighed.candidate.policy, weighed.candidate.estimator.facts
    micro = {}
    for phase in facts.phases:
        assert (phase.samples_per_process, phase.group) == (SAMPLES[phase.name], GROUP)
        micro[phase.name] = policy.phase(phase.name).micro_batch or phase.samples_per_process
        assert phase.samples_per_process % micro[phase.name] == 0
        assert micro[phase.name] % phase.group == 0
    assert legal(facts, {name: policy.optimizer(name) for name in facts.optimizers}, micro)
    assert {own.kind for own in policy.optimizers.values()} == {"adam"}  # nothing else was allowed
    assert {own.weights_dtype for own in policy.optimizers.values()} == {"fp32"}


FIXED: dict[str, tuple[Fixed, Callable[[MemoryPolicy], bool]]] = {
    "micro_batch.G=8": (
        Fixed(phases={"G": {"micro_batch": 8}}),
        lambda policy: policy.phase("G").micro_batch == 8,
    ),
    "memory.activations.G=keep": (
        Fixed(phases={"G": {"activations": "keep"}}),
        lambda policy: policy.phase("G").activations == "keep",
    ),
    "memory.update.D=deferred, memory.state.D=host": (
        Fixed(optimizers={"D": {"update": "deferred", "state": "host"}}),
        lambda policy: (policy.optimizer("D").update, policy.optimizer("D").state) == ("deferred", "host"),
    ),
    "memory.ema=host": (Fixed(ema="host"), lambda policy: policy.ema == "host"),
    "memory.weights=device": (Fixed(weights="device"), lambda policy: policy.optimizer("G").weights == "device"),
    "memory.weights=stream": (
        Fixed(weights="stream"),
        lambda policy: {policy.optimizer(name).weights for name in "GD"} == {"stream"},
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_settings_that_the_user_named_stay(name: str, pieces: Pieces, span: tuple[int, int]) -> None:
    fixed, keeps = FIXED[name]
    search = Search(pieces, Structure(), CARD, CONSTANTS, fixed=fixed)
    for share in (0.0, 0.4):
        found = search.within(budget(span, share))
        weighed = [w for w in (found.best, found.least, *found.faster, *found.slower) if w is not None]
        assert weighed
        assert all(keeps(w.candidate.policy) for w in weighed)


@pytest.mark.slow
def test_roundings_come_only_where_allowed(pieces: Pieces, search: Search, span: tuple[int, int]) -> None:
    # With Triton, whose one kernel needs no temporaries: PyTorch's need more than this small network's state.
    allowed = Search(pieces, Structure(triton=True), CARD, CONSTANTS, allow=("adam8bit",))
    kinds = set()
    for share in (0.3, 0.6):
        vram_bytes = budget(span, share)
        best, plain = allowed.within(vram_bytes).best, search.within(vram_bytes).best
        if best is not None:
            kinds |= {own.kind for own in best.candidate.policy.optimizers.values()}
            assert plain is None or best.candidate.rank <= plain.candidate.rank
    assert "adam8bit" in kinds


def test_an_alike_time_counts_as_the_same() -> None:
    assert slowness(1.0) == slowness(1.004)
    assert slowness(1.0) < slowness(1.02)
    assert all(slowness(1.01**n) == n for n in range(-300, 300))


@pytest.mark.slow
def test_plans_need_what_they_are_said_to_need(search: Search, span: tuple[int, int]) -> None:
    """Live bytes of a plan against the machinery itself."""
    for share in (0.05, 0.4, 0.7):
        best = search.within(budget(span, share)).best
        if best is None:
            continue
        direct = max(peaks(BUILD, best.candidate.policy).values())
        foretold = int(best.requests.live().max())
        assert direct * (1 - 0.0005) <= foretold <= direct * 1.005


def test_a_margin_is_part_of_the_budget(search: Search) -> None:
    best = search.within(None).best
    assert best is not None
    wider = replace(CONSTANTS, margin_bytes=CONSTANTS.margin_bytes + 2**27)
    asked = Search(search.pieces, Structure(), CARD, wider).within(None).best
    assert asked is not None
    assert asked.candidate.policy == best.candidate.policy
    assert asked.needed_bytes > best.needed_bytes
