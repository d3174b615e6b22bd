"""A share of what streams stays on the device: the same numbers, with so much less to copy."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from frozen_nets import SAMPLES, adapted, adapter_phase, steps
from hypothesis import given
from hypothesis import strategies as st
from streamed_nets import CPU, Net, net, same, train
from torch import Tensor, nn

from lowvram import load_recipe, seeded
from lowvram.errors import LowVRAMError
from lowvram.memory import host
from lowvram.memory.apply import apply
from lowvram.memory.blocks import find_blocks
from lowvram.memory.ladder import thriftier
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.memory.stream import BlockStream
from lowvram.memory.stream_parts import staying
from lowvram.memory.tracer import LiveBytes
from lowvram.models.stylegan2 import Discriminator
from lowvram.objectives.adversarial import r1_penalty
from lowvram.phase import MicroBatch, Phase

DEPTH = 5


def phase_of(network: nn.Module, **changes: object) -> Phase:
    """Fits a network's output to a fixed target, its norm bounded."""

    def loss(micro: MicroBatch) -> Tensor:
        x = seeded.randn(micro.seeds, 3, 5, stream="x").to(network.last.weight.dtype)
        return (network(x) - x.sum(dim=-1, keepdim=True).tanh()).float().square().mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6)
    own = {"name": "all", "networks": (network,), "optimizer": optimizer, "loss": loss, "samples": SAMPLES}
    return Phase(**{**own, "clip_norm": 0.5, **changes})  # type: ignore[arg-type]


def policy_of(resident: float = 0.0, activations: str = "keep", **own: str) -> MemoryPolicy:
    return MemoryPolicy(
        phases={"all": PhasePolicy(activations=activations)},
        optimizers={"all": OptimizerPolicy(**own)},
        resident=resident,
    )


def streamed_policy(resident: float = 0.0, activations: str = "keep", **own: str) -> MemoryPolicy:
    return policy_of(resident, activations, **{"weights": "stream", "update": "deferred", **own})


def learn(policy: MemoryPolicy, **changes: object) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, weights and the optimizer's state after three steps."""
    network = net(DEPTH).requires_grad_(False)
    losses = [(loss, applied) for applied, loss in steps(phase_of(network, **changes), policy)]
    applied = losses[-1][1]
    state, _ = applied.updaters["all"].state()
    return [loss for loss, _ in losses], copy.deepcopy(applied.full_state(network)), state


# Which blocks.


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=40), share=st.floats(0.0, 1.0))
def test_the_share_is_met_within_half_a_block_at_any_place(sizes: list[int], share: float) -> None:
    stays = staying(sizes, share)
    assert stays == staying(sizes, share)
    passed = kept = 0
    for size, here in zip(sizes, stays, strict=True):
        passed, kept = passed + size, kept + size * here
        assert abs(kept - share * passed) <= max(sizes) / 2 + 1e-6 * passed
    assert not any(staying(sizes, 0.0)) and all(staying(sizes, 1.0))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7, 0.85])
def test_like_blocks_stay_at_even_distances(share: float) -> None:
    stays = staying([7] * 60, share)
    assert sum(stays) == round(60 * share)
    for wanted in (True, False):
        places = [n for n, here in enumerate(stays) if here is wanted]
        distances = {b - a for a, b in pairwise(places)}
        assert max(distances) - min(distances) <= 1


# What is computed.


@pytest.mark.parametrize("order", [None, (0, 1, 0, 1, 4, 0), (4, 0, 2, 2, 3, 1)])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_stream_of_some_blocks_is_bit_identical(order: tuple[int, ...] | None, share: float) -> None:
    plain, other = net(DEPTH, order), net(DEPTH, order)
    expected = train(plain, micro_batches=2)
    stream = BlockStream(other, find_blocks(other), CPU, resident=share)
    assert same(expected, train(other, stream, micro_batches=2))
    assert same(plain.state_dict(), other.state_dict())


def test_second_derivatives() -> None:
    def r1(network: nn.Module) -> list[Tensor | None]:
        torch.manual_seed(1)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        r1_penalty(network(x), x).mean().backward()
        return [p.grad for p in network.parameters()]

    torch.manual_seed(0)
    plain = Discriminator(16, channel_base=64, channel_max=8)
    other = copy.deepcopy(plain)
    stream = BlockStream(other, find_blocks(other), CPU, resident=0.5)
    assert stream.staying and stream.params
    expected = r1(plain)
    with stream.resident():
        assert same(expected, r1(other))


@pytest.mark.parametrize("micro_batch", [SAMPLES, 4])
@pytest.mark.parametrize(
    "policy",
    [
        streamed_policy(0.5),
        streamed_policy(0.5, "recompute", state="host"),
        streamed_policy(0.3, "offload"),
        streamed_policy(1.0, "recompute"),
    ],
    ids=["kept", "recomputed, state on the host", "offloaded", "whole"],
)
def test_a_training_is_bit_identical(policy: MemoryPolicy, micro_batch: int) -> None:
    assert same(learn(policy, micro_batch=micro_batch), learn(policy_of(), micro_batch=micro_batch))


@pytest.mark.parametrize(
    "own",
    [
        {"update": "fused"},
        {"kind": "adam8bit", "weights_dtype": "bf16"},
        {"update": "fused", "kind": "adam8bit", "weights_dtype": "bf16", "state": "host"},
        {"weights_dtype": "bf16"},
    ],
    ids=lambda own: " ".join(own.values()),
)
def test_other_optimizers_do_as_where_nothing_streams(own: dict[str, str]) -> None:
    whole = {name: value for name, value in own.items() if name not in ("update", "state")}
    expected = learn(policy_of(**whole), clip_norm=None)
    assert same(learn(streamed_policy(0.5, "recompute", **own), clip_norm=None), expected)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_layers_inside_a_frozen_network_learn_the_same(activations: str) -> None:
    def learn_adapters(policy: MemoryPolicy) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        network, layers = adapted()
        losses = [(loss, applied) for applied, loss in steps(adapter_phase(network, layers), policy)]
        for param in layers.parameters():
            assert not host.is_host(param)
        return [loss for loss, _ in losses], layers.state_dict(), losses[-1][1].full_state(network)

    own = {"adapter": PhasePolicy(activations=activations)}
    assert same(learn_adapters(MemoryPolicy(frozen="stream", resident=0.5, phases=own)), learn_adapters(MemoryPolicy()))


def test_weights_that_blocks_share_are_changed_once() -> None:
    def learn_tied(policy: MemoryPolicy) -> dict[str, Tensor]:
        network = net(DEPTH).requires_grad_(False)
        network.stack[3].out.weight = network.stack[0].out.weight
        network.stack[4].qkv.weight = network.stack[1].qkv.weight
        *_, (applied, _) = steps(phase_of(network), policy)
        applied.flush()
        return copy.deepcopy(applied.full_state(network))

    expected = learn_tied(policy_of())
    assert same(learn_tied(streamed_policy(0.5)), expected)
    assert same(learn_tied(policy_of(update="deferred")), expected)


# Where weights are.


def test_streamed_blocks_are_on_the_host_and_the_others_are_not() -> None:
    network = net(8, width=64).requires_grad_(False)
    applied = apply(streamed_policy(0.5), [phase_of(network)], device="cpu")
    applied.flush()  # the last two are in the slots
    on_host = [{host.is_host(p) for p in block.parameters()} for block in network.stack]
    assert on_host == [{False}, {True}] * 4
    (streamed,) = applied.streamed_bytes()
    assert streamed == ("all", [[p.nbytes for p in block.parameters()] for block in network.stack[1::2]])
    parts = {name: bucket.parts for name, bucket in applied.updaters["all"].buckets.items()}
    state_on_host = [
        all(host.is_host(t) for part in own for s in part.optimizer.state.values() for t in s.values() if t.numel() > 1)
        for own in parts.values()
    ]
    assert state_on_host == [False, True] * 4 + [False]  # the rest is on the device, as the policy says


def test_memory_grows_by_what_stays_and_copies_shrink() -> None:
    def run(resident: float) -> tuple[int, int]:
        network = net(10, width=64).requires_grad_(False)
        phase = phase_of(network)
        applied = apply(streamed_policy(resident, "recompute", state="host"), [phase], device="cpu")
        applied.step(phase, torch.zeros(SAMPLES, 1))
        copied_bytes = applied.copied_bytes()
        with LiveBytes() as memory:
            memory.watch(network)
            applied.step(phase, torch.zeros(SAMPLES, 1))
            return memory.peak_bytes, applied.copied_bytes() - copied_bytes

    block = sum(p.nbytes for p in net(1, width=64).stack[0].parameters())
    least, most_copied = run(0.0)
    for resident in (0.3, 0.6):
        peak_bytes, copied_bytes = run(resident)
        assert peak_bytes - least == pytest.approx(10 * resident * block, abs=0.1 * block)
        # Two blocks are there from the pass before at each turn.
        assert (10 * (1 - resident) - 2) / 8 * most_copied <= copied_bytes <= (1 - resident) * most_copied


# Changes.


def test_running_out_of_memory_streams_all_in_the_end() -> None:
    network = net(DEPTH).requires_grad_(False)
    expected, weights, state = learn(policy_of())
    phase = phase_of(network)
    policy = streamed_policy(0.5)
    applied = apply(policy, [phase], device="cpu", seed=3)
    words = []
    while (found := thriftier(policy, applied.facts(phase))) is not None:
        policy, what = found
        words.append(what)
    assert "memory.activations.all: keep -> recompute" in words
    assert words[-1] == "memory.resident: 0.5 -> 0"
    losses = []
    for number in range(3):
        torch.manual_seed(number)
        losses.append(applied.step(phase, torch.zeros(SAMPLES, 1), number=number).loss)
        if number == 1:  # its update waits for the blocks that stream
            applied.change(streamed_policy(0.0))
            applied.flush()  # the last two are in the slots
            assert all(host.is_host(p) for block in network.stack for p in block.parameters())
    assert losses == expected
    assert same(applied.updaters["all"].state()[0], state)  # which applies what waits
    assert same(applied.full_state(network), weights)
    with pytest.raises(LowVRAMError, match=r"(?s)can become 0 only, not 0\.7.*resume with memory\.resident=0\.7"):
        applied.change(streamed_policy(0.7))


def test_a_step_that_runs_out_of_memory_is_done_again_without_what_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, weights, _ = learn(policy_of())
    network = net(DEPTH).requires_grad_(False)
    failures = iter([False, False, True])
    forward = Net.forward

    def failing(self: Net, *args: object, **kwargs: object) -> Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Net, "forward", failing)
    policy = replace(streamed_policy(0.5, "recompute", state="host"), ema="host")
    done = list(steps(phase_of(network, group=SAMPLES), policy))
    applied = done[-1][0]
    applied.flush()
    assert applied.policy.resident == 0.0
    assert [loss for _, loss in done] == expected
    assert same(applied.full_state(network), weights)


def test_checkpoints_go_from_one_share_to_another() -> None:
    network = net(DEPTH).requires_grad_(False)
    phase = phase_of(network)
    first = apply(streamed_policy(0.5), [phase], device="cpu", seed=3)
    torch.manual_seed(0)
    losses = [first.step(phase, torch.zeros(SAMPLES, 1), number=0).loss]
    state = copy.deepcopy(first.updaters["all"].state())
    weights = {name: value.clone() for name, value in first.full_state(network).items()}
    other = net(DEPTH).requires_grad_(False)
    phase = phase_of(other)
    second = apply(streamed_policy(0.8, "recompute", state="host"), [phase], device="cpu", seed=3)
    second.load_state(other, weights)
    second.updaters["all"].load_state(*state)
    for number in (1, 2):
        torch.manual_seed(number)
        losses.append(second.step(phase, torch.zeros(SAMPLES, 1), number=number).loss)
    assert losses == learn(policy_of())[0]


# Settings.


def test_the_setting() -> None:
    words = ["memory.weights.denoiser=stream", "memory.update.denoiser=deferred", "memory.resident=0.5"]
    settings = load_recipe("sdxl_finetune", words)
    policy = MemoryPolicy.from_settings(settings, phases=["denoiser"])
    assert policy.resident == 0.5
    assert MemoryPolicy.from_dict(policy.to_dict()) == policy
    assert hash(policy) != hash(MemoryPolicy.from_dict({**policy.to_dict(), "resident": 0.0}))
    older = {name: value for name, value in policy.to_dict().items() if name != "resident"}
    assert MemoryPolicy.from_dict(older).resident == 0.0
    for share in ("-0.1", "1.5"):
        with pytest.raises(LowVRAMError, match=rf"memory\.resident={share} must lie in \[0, 1\]"):
            load_recipe("sdxl_finetune", [f"memory.resident={share}"])
    with pytest.raises(LowVRAMError, match=r"memory\.resident=2"):
        MemoryPolicy(resident=2)


def test_nothing_can_stay_where_nothing_streams() -> None:
    with pytest.raises(LowVRAMError, match=r"memory\.resident=0\.5, but no weights are streamed"):
        apply(policy_of(0.5), [phase_of(net(2))], device="cpu")
