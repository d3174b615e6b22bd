"""Frozen networks that a loss's gradient goes through: what is trained is the same under every policy, bit for bit."""

import copy

import pytest
import torch
from frozen_nets import SAMPLES, Told, adapted, adapter_phase, steps, told_phase
from streamed_nets import net
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.memory import host
from lowvram.memory.apply import apply
from lowvram.memory.ladder import thriftier
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.memory.recovery import Snapshot
from lowvram.memory.tracer import LiveBytes
from lowvram.phase import Phase

CPU = torch.device("cpu")
STREAM = MemoryPolicy(frozen="stream")


POLICIES = {
    "recompute": {"activations": "recompute"},
    "recompute every other block": {"activations": "recompute", "recompute_every": 2},
    "offload": {"activations": "offload"},
    "stream": {"frozen": "stream"},
    "stream and offload": {"frozen": "stream", "activations": "offload"},
    "stream and deferred": {"frozen": "stream", "update": "deferred", "state": "host"},
    "stream and averages on the host": {"frozen": "stream", "ema": "host"},
}


def policy_of(name: str, options: dict[str, str]) -> MemoryPolicy:
    own = {key: options[key] for key in ("activations", "recompute_every") if key in options}
    optimizer = {key: options[key] for key in ("update", "state") if key in options}
    rest = {key: options[key] for key in ("frozen", "ema") if key in options}
    return MemoryPolicy(
        phases={name: PhasePolicy(**own)},  # type: ignore[arg-type]
        optimizers={name: OptimizerPolicy(**optimizer)},
        **rest,
    )


def train_adapters(policy: MemoryPolicy, **changes: object) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, the trained weights and their averages, and the frozen ones."""
    network, layers = adapted()
    average = ExponentialMovingAverage(layers, copy.deepcopy(layers), half_life_kimg=0.01, rampup=None)
    losses = []
    for number, (applied, loss) in enumerate(
        steps(adapter_phase(network, layers, **changes), policy, averages=[average])
    ):
        applied.settle()
        average.update((number + 1) * SAMPLES, SAMPLES)
        losses.append(loss)
    trained = {f"now.{k}": v.clone() for k, v in layers.state_dict().items()}
    trained |= {f"average.{k}": v.clone() for k, v in average.target.state_dict().items()}
    return losses, trained, applied.full_state(network)


@pytest.mark.parametrize("technique", POLICIES)
@pytest.mark.parametrize("micro_batch", [SAMPLES, 4])
def test_layers_inside_a_frozen_network_learn_the_same(technique: str, micro_batch: int) -> None:
    expected, trained, before = train_adapters(MemoryPolicy(), micro_batch=micro_batch)
    losses, weights, frozen = train_adapters(policy_of("adapter", POLICIES[technique]), micro_batch=micro_batch)
    assert losses == expected
    assert all(torch.equal(weights[key], trained[key]) for key in trained)
    start = adapted()[0].state_dict()
    inside = [key for key in start if ".up." in key or ".down." in key]
    assert inside
    for key in start.keys() - set(inside):
        assert torch.equal(frozen[key], start[key]), key
        assert torch.equal(before[key], start[key]), key
    assert not any(torch.equal(frozen[key], start[key]) for key in inside)


@pytest.mark.parametrize("technique", [t for t in POLICIES if "averages" not in t])
def test_vectors_before_two_frozen_networks_learn_the_same(technique: str) -> None:
    def train(policy: MemoryPolicy) -> tuple[list[float], Tensor]:
        first, second, told = net(3), net(2), Told()
        first.last = nn.Linear(12, 5)
        both = nn.Sequential(first, second)
        phase = told_phase(both, told)
        phase.frozen = (first, second)
        return [loss for _, loss in steps(phase, policy)], told.vectors.detach().clone()

    torch.manual_seed(0)
    expected, vectors = train(MemoryPolicy())
    torch.manual_seed(0)
    losses, found = train(policy_of("told", POLICIES[technique]))
    assert losses == expected
    assert torch.equal(found, vectors)
    assert not torch.equal(found, Told().vectors)


def test_only_what_is_trained_gets_gradients() -> None:
    network, layers = adapted()
    network.requires_grad_(True)  # as a user's network is
    phase = adapter_phase(network, layers)
    with phase.trainable():
        asking = {name for name, p in network.named_parameters() if p.requires_grad}
    assert asking == {name for name, _ in network.named_parameters() if ".up." in name or ".down." in name}
    assert not any(p.requires_grad for p in network.parameters())


def test_streamed_weights_are_on_the_host_and_trained_ones_are_not() -> None:
    network, layers = adapted(dtype=torch.bfloat16)
    applied = apply(STREAM, [adapter_phase(network, layers)], device="cpu")
    inside = set(layers.parameters())
    blocks = {p for block in network.stack for p in block.parameters()}
    assert {host.is_host(p) for p in blocks - inside} == {True}
    assert {host.is_host(p) for p in (*inside, network.first.weight, network.last.weight)} == {False}
    assert applied.frozen_bytes() == sum(p.nbytes for p in blocks - inside)


def test_nothing_is_copied_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    network, layers = adapted()
    written = []
    for applied, _ in steps(adapter_phase(network, layers), STREAM, count=1):
        (stream,) = applied._streams.values()
        monkeypatch.setattr(stream, "_write_back", written.append)
    phase = applied.phases[0]
    for _ in range(2):
        applied.step(phase, torch.zeros(SAMPLES, 1))
        with applied.sampling(), torch.no_grad():
            network(torch.randn(2, 3, 5))
    applied.full_state(network)
    assert written == []


def test_two_blocks_are_on_the_device_and_no_more() -> None:
    def peak(policy: MemoryPolicy, depth: int) -> int:
        network = net(depth, width=64).requires_grad_(False)
        told = Told()
        phase = told_phase(network, told, samples=1)
        applied = apply(policy, [phase], device="cpu")
        applied.step(phase, torch.zeros(1, 1))
        with LiveBytes() as memory:
            memory.watch(network)
            applied.step(phase, torch.zeros(1, 1))
            return memory.peak_bytes

    block = sum(p.nbytes for p in net(1, width=64).stack[0].parameters())
    assert peak(MemoryPolicy(), 12) - peak(MemoryPolicy(), 6) >= 6 * block
    assert peak(STREAM, 12) - peak(STREAM, 6) < block


@pytest.mark.parametrize("policy", [MemoryPolicy(), STREAM, MemoryPolicy(frozen="stream", ema="host")])
def test_the_frozen_network_itself_is_sampled_from(policy: MemoryPolicy) -> None:
    network, layers = adapted()
    network.eval()
    phase = adapter_phase(network, layers)
    applied = apply(policy, [phase], device="cpu")
    applied.step(phase, torch.zeros(SAMPLES, 1))
    x = torch.randn(2, 3, 5)
    with applied.sampling(), torch.inference_mode():
        found = network(x)
    plain, same_layers = adapted()
    plain.eval()
    for one, other in zip(same_layers.parameters(), layers.parameters(), strict=True):
        one.data.copy_(other)
    with torch.no_grad():
        assert torch.equal(found, plain(x))


def test_trained_streams_are_sampled_from_without_averages() -> None:
    """A deferred update that waits for its block's use is in what is sampled."""

    def phase_of(network: nn.Module) -> Phase:
        def loss(micro):
            return network(torch.ones(len(micro), 3, 5)).square().mean()

        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        return Phase(name="all", networks=(network,), optimizer=optimizer, loss=loss, samples=2)

    streamed = MemoryPolicy(optimizers={"all": OptimizerPolicy(update="deferred", weights="stream", state="host")})
    x, found = torch.randn(2, 3, 5), []
    for policy in (MemoryPolicy(), streamed):
        network = net(3).eval().requires_grad_(False)
        phase = phase_of(network)
        applied = apply(policy, [phase], device="cpu")
        for _ in range(2):
            applied.step(phase, torch.zeros(2, 1))
            with applied.sampling(), torch.no_grad():
                found.append(network(x))
    assert torch.equal(found[1], found[3]) and not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_averages_on_the_host_come_block_by_block_where_weights_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import lowvram.ema as ema

    moved: list[int] = []
    monkeypatch.setattr(ema, "_is_on", lambda tensor, _device: not host.is_host(tensor))  # the host, on a CPU

    def copied(tensor: Tensor, device: torch.device) -> Tensor:
        moved.append(tensor.nbytes)
        return host.device_copy(tensor, device)

    monkeypatch.setattr(ema, "_copy_on", copied)
    network = net(4, width=64).eval().requires_grad_(False)
    target = copy.deepcopy(network)
    for parameter in target.parameters():
        parameter.data = host.copy_of(parameter.data)
    before = [p.data_ptr() for p in target.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    loss = lambda micro: network(micro.images).sum()  # noqa: E731 - never called
    phase = Phase(name="all", networks=(network,), optimizer=optimizer, loss=loss, samples=2)
    own = OptimizerPolicy(update="deferred", weights="stream", state="host")
    average = ExponentialMovingAverage(network, target, half_life_kimg=1.0, rampup=None)
    policy = MemoryPolicy(optimizers={"all": own}, ema="host")
    applied = apply(policy, [phase], device="cpu", averages=[average])
    x = torch.randn(2, 3, 5)
    expected = net(4, width=64).eval()(x)
    with applied.sampling(), torch.no_grad(), LiveBytes() as memory:
        memory.watch(target)
        outside = sum(p.nbytes for layer in (target.first, target.last) for p in layer.parameters())
        assert sum(moved) == outside
        memory.reset_peak()
        assert torch.equal(target(x), expected)
        peak_bytes = memory.peak_bytes
    block = sum(p.nbytes for p in target.stack[0].parameters())
    assert sum(moved) == outside + 4 * block
    assert peak_bytes < 2 * block
    assert [p.data_ptr() for p in target.parameters()] == before


def test_running_out_of_memory_streams_the_frozen_in_the_end() -> None:
    network, layers = adapted()
    expected, _, _ = train_adapters(MemoryPolicy())
    phase = adapter_phase(network, layers)
    applied = apply(MemoryPolicy(), [phase], device="cpu", seed=3)
    policy, words = applied.policy, []
    while (found := thriftier(policy, applied.facts(phase))) is not None:
        policy, what = found
        words.append(what)
    assert words[-1] == "memory.frozen: device -> stream"
    assert policy.frozen == "stream"
    torch.manual_seed(0)
    losses = [applied.step(phase, torch.zeros(SAMPLES, 1), number=0).loss]
    applied.change(MemoryPolicy(frozen="stream"))
    assert any(host.is_host(p) for p in network.parameters())
    for number in (1, 2):
        torch.manual_seed(number)
        losses.append(applied.step(phase, torch.zeros(SAMPLES, 1), number=number).loss)
    assert losses == expected
    with pytest.raises(LowVRAMError, match=r"memory\.frozen=device"):
        applied.change(MemoryPolicy())


class Packed(nn.Module):
    """A linear layer of 8-bit weights in a buffer, beside a parameter in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 255, (6, 5), dtype=torch.uint8))
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return F.linear(x, self.packed.to(x.dtype) / 128 - 1) * self.gain


def test_packed_weights_are_not_copied_for_a_second_try() -> None:
    network = Packed().requires_grad_(False)
    phase = Phase(
        name="gain",
        networks=(nn.ParameterList([network.gain]),),
        frozen=(network,),
        optimizer=torch.optim.SGD([network.gain], lr=0.1),
        loss=lambda micro: network(torch.ones(len(micro), 5)).square().mean(),
        samples=2,
    )
    applied = apply(MemoryPolicy(), [phase], device="cpu")
    snapshot = Snapshot([network], CPU, unchanged=applied.packed())
    snapshot.take()
    applied.step(phase, torch.zeros(2, 1))
    assert network.seen == 1
    snapshot.restore()
    assert network.seen == 0
    assert all(copy_.dtype != torch.uint8 for copy_ in snapshot._copies.values())
    assert network.gain.ne(1).any()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (MemoryPolicy(optimizers={"adapter": OptimizerPolicy(weights="stream", update="deferred")}), "no blocks"),
        (MemoryPolicy(fsdp="shard"), "trains parts of a frozen network"),
        (MemoryPolicy(frozen="stream", fsdp="shard"), "memory.frozen=stream"),
    ],
)
def test_what_can_t_be_done_is_said(policy: MemoryPolicy, words: str) -> None:
    network, layers = adapted()
    with pytest.raises(LowVRAMError, match=words):
        apply(policy, [adapter_phase(network, layers)], device="cpu")


def test_streaming_what_is_not_there_is_refused() -> None:
    network, layers = adapted()
    phase = adapter_phase(network, layers)
    phase.frozen = ()
    with pytest.raises(LowVRAMError, match=r"memory\.frozen=stream, but no phase"):
        apply(STREAM, [phase], device="cpu")
    with pytest.raises(LowVRAMError, match="frozen=host is not known"):
        MemoryPolicy(frozen="host")
    assert MemoryPolicy.from_dict(STREAM.to_dict()) == STREAM
    assert hash(STREAM) != hash(MemoryPolicy())
