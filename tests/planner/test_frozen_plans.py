"""Plans for what is trained beside or inside frozen networks: weights counted once, gradients of the trained alone."""

from collections.abc import Iterator

import pytest
import torch
from frozen_nets import SAMPLES, adapted, adapter_phase
from planned import peaks, seeds
from streamed_nets import net
from torch import Tensor, nn

from lowvram import MicroBatch, Phase, plan_memory
from lowvram.ema import ExponentialMovingAverage
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.planner import cards
from lowvram.planner.compose import highest
from lowvram.planner.estimate import Estimator
from lowvram.planner.log import AVERAGE, WEIGHTS
from lowvram.planner.options import Fixed
from lowvram.planner.pieces import Pieces
from lowvram.planner.search import Search
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Structure

CARD = cards.find("RTX 3060")
STREAMED = Structure(frozen="stream")


def build() -> Subject:
    """Low-rank layers in a frozen network, which no checkpoint and so no list of networks names."""
    network, layers = adapted()
    phase = adapter_phase(network, layers)
    average = ExponentialMovingAverage(layers, adapted()[1], half_life_kimg=1.0, rampup=None)

    def micro_batch(_phase: Phase, n: int) -> MicroBatch:
        return MicroBatch(images=torch.empty(n, 1), labels=torch.zeros(n, dtype=torch.int64), seeds=seeds(n))

    def sample(n: int) -> Tensor:
        with torch.no_grad():
            return network(torch.empty(n, 3, 5))

    networks: dict[str, nn.Module] = {"layers": layers, "average": average.target}
    return Subject(phases=[phase], networks=networks, micro_batch=micro_batch, averages=[average], sample=sample)


@pytest.fixture(scope="module")
def pieces() -> Iterator[Pieces]:
    with Pieces(build, processes=1, proportional=False) as made:
        yield made


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(MemoryPolicy(), id="kept"),
        pytest.param(
            MemoryPolicy(phases={"adapter": PhasePolicy(activations="recompute", micro_batch=4)}),
            id="recomputed",
            marks=pytest.mark.slow,
        ),
        pytest.param(MemoryPolicy(frozen="stream"), id="streamed"),
        pytest.param(
            MemoryPolicy(frozen="stream", phases={"adapter": PhasePolicy(micro_batch=4)}),
            id="streamed in halves",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MemoryPolicy(frozen="stream", optimizers={"adapter": OptimizerPolicy(update="deferred", state="host")}),
            id="streamed and deferred",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_composed_policy_is_what_the_machinery_needs(pieces: Pieces, policy: MemoryPolicy) -> None:
    estimator = Estimator(pieces, Structure.of(policy), CARD)
    estimator.settle(policy)
    parts = highest(estimator.requests(policy))

    def with_the_network() -> Subject:
        made = build()
        return Subject(**{**vars(made), "networks": {**made.networks, "network": made.phases[0].frozen[0]}})

    direct = peaks(with_the_network, policy)
    for name, live_bytes in direct.items():
        if name == "adapter" or policy.frozen == "device":  # between steps a stream's slots are counted all the same
            assert parts[name].live_bytes == pytest.approx(live_bytes, rel=0.005), name


def test_weights_are_counted_once_and_state_of_what_is_trained(pieces: Pieces) -> None:
    network, layers = adapted()
    trained = sum(p.nbytes for p in layers.parameters())
    frozen = sum(p.nbytes for p in network.parameters()) - trained
    facts = pieces.facts(Structure())
    assert facts.residents.total_bytes(WEIGHTS) == trained + frozen + sum(b.nbytes for b in network.buffers())
    assert facts.residents.total_bytes(AVERAGE) == trained
    assert facts.parameter_bytes == {"adapter": trained}
    assert 2 * trained <= facts.state_bytes["adapter"] <= 2 * trained + 8 * len(list(layers.parameters()))
    streamed = pieces.facts(STREAMED)
    assert streamed.frozen_bytes == facts.frozen_bytes > 0.9 * frozen
    assert streamed.residents.total_bytes(WEIGHTS) == facts.residents.total_bytes(WEIGHTS) - facts.frozen_bytes
    assert streamed.parameter_bytes == facts.parameter_bytes


def test_frozen_weights_stream_before_anything_else_does(pieces: Pieces) -> None:
    search = Search(pieces, Structure(), CARD, _constants())
    whole, least = search.within(None).best, search.within(1).least
    assert whole is not None
    assert whole.candidate.policy.frozen == "device"
    assert whole.candidate.techniques == 0
    policy = least.candidate.policy
    assert policy.frozen == "stream"
    assert {own.weights for own in policy.optimizers.values()} == {"device"}
    assert least.candidate.live_bytes < whole.candidate.live_bytes
    found = Search(pieces, Structure(), CARD, _constants(), fixed=Fixed(frozen="stream")).within(None).best
    assert found is not None and found.candidate.policy.frozen == "stream"
    found = Search(pieces, Structure(), CARD, _constants(), fixed=Fixed(frozen="device")).within(1)
    assert found.least.candidate.policy.frozen == "device"


def _constants():  # type: ignore[no-untyped-def]
    from lowvram.planner import calibration

    return calibration.default(CARD)


WIDE = 2048


def wide(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Phase]:
    """Sixteen blocks of 67 MB each (in fp32), frozen, and a layer in front of them that is trained."""
    with torch.device("meta"):
        network = net(16, width=WIDE).requires_grad_(False).to(dtype)
        trained = nn.Linear(5, 5)

    def loss(micro: MicroBatch) -> Tensor:
        return network(trained(micro.images).to(dtype)).float().square().mean()

    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    own = {"networks": (trained,), "frozen": (network,), "optimizer": optimizer, "loss": loss, "samples": 1}
    return network, trained, Phase(name="front", **own)  # type: ignore[arg-type]


def test_phases_of_your_own_are_planned_with_what_they_go_through() -> None:
    network, trained, phase = wide()
    weights = sum(p.nbytes for p in network.parameters())
    whole = plan_memory([phase], example=torch.empty(1, 3, 5, device="meta"), precision="fp32", card="RTX 3060")
    row = whole.phases[0]
    assert row.by_category["weights"] == pytest.approx(weights, rel=0.01)
    assert row.by_category["optimizer"] < 2**14
    assert row.by_category["gradients"] < 2**14
    budget = f"{(whole.needed_bytes - weights * 8 // 10) // 2**20}MB"  # too little for a share that stays
    plan = plan_memory([phase], budget, example=torch.empty(1, 3, 5), precision="fp32", card="RTX 3060")
    assert plan.fits
    assert plan.settings == {"memory.frozen": "stream"}
    assert weights > plan.host_bytes > 0.95 * weights
    assert plan.phases[0].by_category["weights"] < 0.2 * weights
    assert plan.images_per_second < whole.images_per_second
    assert all(p.is_meta for p in (*network.parameters(), *trained.parameters()))  # nothing was touched


def test_a_plan_streams_what_it_says_when_applied() -> None:
    network, layers = adapted()
    phase = adapter_phase(network, layers)
    plan = plan_memory([phase], example=torch.empty(SAMPLES, 1), precision="fp32", card="RTX 3060")
    assert plan.policy.frozen == "device"
    applied = plan.apply([phase], device="cpu")
    assert applied.step(phase, torch.zeros(SAMPLES, 1)) is not None


def test_packed_weights_count_as_bytes_and_are_not_copied() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.zeros(512, 512, dtype=torch.uint8, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.packed.to(x.dtype)

    network, trained = Packed(), nn.Linear(4, 512, device="meta")
    phase = Phase(
        name="front",
        networks=(trained,),
        frozen=(network,),
        optimizer=torch.optim.SGD(trained.parameters(), lr=0.1),
        loss=lambda micro: network(trained(micro.images)).square().mean(),
        samples=2,
    )
    plan = plan_memory([phase], example=torch.empty(2, 4), precision="fp32", card="RTX 3060")
    assert plan.phases[0].by_category["weights"] == pytest.approx(512 * 512, abs=2**14)
    assert plan.phases[0].by_category["temporary"] < 512 * 512 * 4 + 2**16


def test_state_of_the_host_is_of_the_optimizer_that_is_used() -> None:
    """Streamed in 8 bits: a byte for each moment, not four; and each weight and gradient once."""

    def full() -> Subject:
        network = net(3, width=512).requires_grad_(False)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

        def loss(micro: MicroBatch) -> Tensor:
            return network(micro.images).square().mean()

        phase = Phase(name="all", networks=(network,), optimizer=optimizer, loss=loss, samples=1)

        def micro_batch(_phase: Phase, n: int) -> MicroBatch:
            return MicroBatch(images=torch.empty(n, 3, 5), labels=torch.zeros(n), seeds=seeds(n))

        return Subject(phases=[phase], networks={"all": network}, micro_batch=micro_batch)

    from lowvram.planner import make

    fixed = Fixed(optimizers={"all": {"kind": "adam8bit"}}, weights="stream", resident=0.0)
    request = make.Request(
        build=full, name="all", batch=1, kimg=1.0, fixed=fixed, structure=Structure(triton=True), processes=1
    )
    plan = make.make(request, make.place(None, "RTX 3060"))
    own = plan.policy.optimizer("all")
    assert (own.kind, own.weights) == ("adam8bit", "stream")
    network = net(3, width=512)
    count = sum(p.numel() for p in network.parameters())
    assert plan.host_bytes == pytest.approx(10 * count, rel=0.1)
    block = sum(p.numel() for p in network.stack[0].parameters())
    assert plan.phases[0].by_category["temporary"] + plan.phases[0].by_category["optimizer"] < 8 * block
