"""Plans in which a share of what streams stays on the device: worked out from what was recorded with nothing there."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from planned import peaks, seeds
from streamed_nets import net

from lowvram import MicroBatch, Phase, load_recipe
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.planner import calibration, cards, make
from lowvram.planner.compose import highest
from lowvram.planner.estimate import Estimator, choice_of
from lowvram.planner.options import SHARES, Fixed, options, shares
from lowvram.planner.pieces import Pieces
from lowvram.planner.plan import Plan
from lowvram.planner.recipe import fixed_by
from lowvram.planner.search import Search, slowness
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure

CARD = cards.find("RTX 3060")
CONSTANTS = calibration.default(CARD)
DEPTH, WIDTH = 8, 1024  # 17 MB a block: a recording takes no longer for that


def build() -> Subject:
    """Blocks between two layers, all in training, their gradients' norm bounded."""
    network = net(DEPTH, width=WIDTH).requires_grad_(False)

    def loss(micro: MicroBatch) -> torch.Tensor:
        return network(micro.images).square().mean()

    phase = Phase(
        name="all",
        networks=(network,),
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
        loss=loss,
        samples=2,
        clip_norm=1.0,
    )

    def micro_batch(_phase: Phase, n: int) -> MicroBatch:
        return MicroBatch(images=torch.empty(n, 400, 5), labels=torch.zeros(n), seeds=seeds(n))

    return Subject(phases=[phase], networks={"all": network}, micro_batch=micro_batch)


def policy_of(resident: float, activations: str = "recompute", micro_batch: int = 2, **own: str) -> MemoryPolicy:
    return MemoryPolicy(
        phases={"all": PhasePolicy(activations=activations, micro_batch=micro_batch)},
        optimizers={"all": OptimizerPolicy(**{"weights": "stream", "update": "deferred", "state": "host", **own})},
        resident=resident,
    )


@pytest.fixture(scope="module")
def pieces() -> Iterator[Pieces]:
    with Pieces(build, processes=1, proportional=False) as made:
        yield made


@pytest.fixture(scope="module")
def search(pieces: Pieces) -> Search:
    return Search(pieces, Structure(), CARD, CONSTANTS)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy_of(0.5), id="recomputed"),
        pytest.param(policy_of(0.5, "keep"), id="kept", marks=pytest.mark.slow),
        pytest.param(policy_of(0.75, micro_batch=1), id="in halves", marks=pytest.mark.slow),
        pytest.param(policy_of(0.75, state="device"), id="with its state", marks=pytest.mark.slow),
        pytest.param(policy_of(1.0), id="whole", marks=pytest.mark.slow),
    ],
)
def test_a_composed_policy_is_what_the_machinery_needs(pieces: Pieces, policy: MemoryPolicy) -> None:
    estimator = Estimator(pieces, Structure.of(policy), CARD)
    estimator.settle(policy)
    part = highest(estimator.requests(policy))["all"]
    direct = peaks(build, policy)["all"]
    # Never less; a little more: blocks that stay are not updated amid a forward, as those that were recorded are.
    assert 0.94 * part.live_bytes <= direct <= 1.002 * part.live_bytes
    if policy == policy_of(0.5):
        assert direct == pytest.approx(part.live_bytes, rel=0.005)
    block = sum(p.nbytes for p in net(1, width=WIDTH).stack[0].parameters())
    nothing = Estimator(pieces, Structure.of(policy_of(0.0)), CARD).requests(replace(policy, resident=0.0))
    assert direct > highest(nothing)["all"].live_bytes + (0.9 * policy.resident * DEPTH - 2) * block


@pytest.mark.parametrize("micro_batch", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_copied_is_what_a_recording_of_the_share_copies(pieces: Pieces, micro_batch: int) -> None:
    """The composed sum against that of the same policy recorded itself."""
    whole = policy_of(0.0, micro_batch=micro_batch)
    policy = policy_of(0.5, micro_batch=micro_batch, state="device")  # as recordings have it
    own = policy.optimizer("all")
    composed = Estimator(pieces, Structure.of(policy), CARD)
    (phase,) = composed.facts.phases
    found = composed.phase(phase, choice_of(policy, phase), own)
    job = replace(composed.job(phase, choice_of(policy, phase)), structure=Structure.of(policy))
    recorded = pieces.get(replace(job, activations="recompute"))
    assert found.host_bytes == pytest.approx(recorded.piece.work.host_bytes, rel=0.06)
    plain = Estimator(pieces, Structure.of(whole), CARD)
    assert found.host_bytes < plain.phase(phase, choice_of(whole, phase), own).host_bytes
    assert found.flops == plain.phase(phase, choice_of(whole, phase), own).flops


def test_each_share_is_found_where_it_fits(search: Search) -> None:
    """From what the thriftiest plan needs on, more memory keeps more there, and is never slower."""
    least = search.within(1).least
    assert least.candidate.policy.resident == 0.0
    weights = sum(p.nbytes for p in net(DEPTH, width=WIDTH).parameters())
    seconds, residents = [], []
    for step in range(12):
        vram_bytes = least.needed_bytes + step * weights // 10
        found = search.within(vram_bytes).best
        assert found is not None and found.needed_bytes <= vram_bytes
        seconds.append(slowness(found.candidate.seconds))
        policy = found.candidate.policy
        if policy.optimizer("all").weights == "stream":
            residents.append(policy.resident)
            assert policy.resident == 0.0 or policy.phase("all").activations == "recompute"
    assert seconds == sorted(seconds, reverse=True)
    assert residents == sorted(residents)
    assert len(set(residents)) >= 4
    assert set(residents) <= {0.0, *SHARES}
    assert search.within(None).best.candidate.policy.resident == 0.0  # type: ignore[union-attr]


def test_a_share_costs_no_recording(search: Search, pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    search.within(1)
    monkeypatch.setattr(pieces, "_run", lambda jobs: [pytest.fail(f"recorded {job}") for job in jobs])
    prices = [candidate.policy.resident for candidate in search.frontier(3)]
    assert set(prices) > {0.0, 0.2, 0.9}


def test_what_the_user_fixed_stays(pieces: Pieces) -> None:
    found = Search(pieces, Structure(), CARD, CONSTANTS, fixed=Fixed(weights="stream", resident=0.35)).within(None).best
    assert found is not None
    assert found.candidate.policy.resident == 0.35
    kept = Fixed(weights="stream", phases={"all": {"activations": "keep"}})
    search = Search(pieces, Structure(), CARD, CONSTANTS, fixed=kept)
    assert {candidate.policy.resident for candidate in search.frontier(3)} == {0.0}
    words = ["memory.resident=0.5", "memory.weights.denoiser=stream", "memory.update.denoiser=deferred"]
    assert fixed_by(load_recipe("sdxl_finetune", words)).resident == 0.5
    assert fixed_by(load_recipe("sdxl_finetune", [])).resident is None


def test_second_derivatives_are_offered_none(pieces: Pieces) -> None:
    facts = pieces.facts(Structure(weights="stream"))
    assert shares(facts, Fixed()) == (0.0, *SHARES)
    second = replace(facts, phases=tuple(replace(phase, second_order=True) for phase in facts.phases))
    assert shares(second, Fixed()) == (0.0,)
    offered = options(facts, Structure(weights="stream", resident=0.5), 3)
    assert {choice[1:] for choice in offered.phases["all"]} == {("recompute", 1)}


def test_a_plan_says_what_stays_and_counts_it_once(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "Pieces", lambda *_, **__: nullcontext(pieces))

    def planned(resident: float) -> Plan:
        fixed = Fixed(weights="stream", resident=resident)
        request = make.Request(build=build, name="all", batch=2, kimg=1.0, fixed=fixed)
        return make.make(request, make.place(None, "RTX 3060"))

    nothing, half = planned(0.0), planned(0.5)
    weights = sum(p.nbytes for block in net(DEPTH, width=WIDTH).stack for p in block.parameters())
    assert "memory.resident" not in nothing.settings
    assert half.settings["memory.resident"] == "0.5"
    assert "memory.resident=0.5" in str(half)
    assert half.settings["memory.activations.all"] == "recompute"
    assert half.phases[0].by_category["weights"] - nothing.phases[0].by_category["weights"] == pytest.approx(
        weights / 2, rel=0.01
    )
    assert nothing.host_bytes - half.host_bytes == pytest.approx(weights / 2, rel=0.01)
    assert half.phases[0].host_bytes < nothing.phases[0].host_bytes
    assert Plan.from_json(half.to_json()).policy == half.policy
