"""Streamed blocks: the plain run's numbers, with two blocks of weights on the device."""

import copy
import random

import pytest
import torch
from streamed_nets import adam, net, same, streamed, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.errors import LowVRAMError
from lowvram.memory import host
from lowvram.memory.blocks import find_blocks
from lowvram.memory.checkpointing import recomputing
from lowvram.memory.tracer import LiveBytes
from lowvram.models.stylegan2 import Discriminator, Generator
from lowvram.objectives.adversarial import path_lengths, r1_penalty


@pytest.mark.parametrize(
    "depth, order",
    [(1, None), (2, None), (3, None), (5, None), (2, (0, 1, 0, 1, 0)), (3, (0, 0, 1, 2, 0, 2)), (4, (3, 1, 2, 0))],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_is_bit_identical(depth, order, micro_batches):
    plain, other = net(depth, order), net(depth, order)
    expected = train(plain, micro_batches=micro_batches)
    stream = streamed(other)
    assert same(expected, train(other, stream, micro_batches=micro_batches))
    assert same(plain.state_dict(), other.state_dict())


def test_frozen_networks_pass_gradients_through():
    plain, other = net().requires_grad_(False), net().requires_grad_(False)
    stream = streamed(other)
    torch.manual_seed(1)
    x, y = (torch.randn(4, 3, 5).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    torch.manual_seed(2)
    plain(x).sum().backward()
    torch.manual_seed(2)
    with stream.running():
        other(y).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.grad)
    assert all(p.grad is None for p in other.parameters())


def test_weights_frozen_in_part():
    plain, other = net(), net()
    for network in (plain, other):
        for block in network.stack[1:3]:
            block.qkv.requires_grad_(False)
    assert same(train(plain), train(other, streamed(other)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_blocks_of_two_dtypes_and_memory_formats(half):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
            self.narrow = nn.Linear(5, 5).to(half)

        def forward(self, x):
            return self.conv(x) + self.narrow(x.to(half)).float()

    def run(network, stream=None):
        torch.manual_seed(3)
        x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
        if stream is None:
            network(x).sum().backward()
        else:
            with stream.running():
                network(x).sum().backward()
        return [p.grad for p in network.parameters()]

    torch.manual_seed(0)
    plain = nn.Sequential(Mixed(), Mixed(), Mixed())
    other = copy.deepcopy(plain)
    stream = streamed(other)
    assert [p.stride() for p in plain.parameters()] == [p.stride() for p in other.parameters()]
    assert same(run(plain), run(other, stream))


def unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        dropout=0.1,
    )


def test_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")

    def run(network, stream=None):
        torch.manual_seed(1)
        optimizer, losses = adam(network), []
        for _ in range(3):
            x, t = torch.randn(2, 3, 8, 8), torch.randint(1000, (2,))
            if stream is None:
                loss = network(x, t).sample.square().mean()
                loss.backward()
            else:
                with stream.running():
                    loss = network(x, t).sample.square().mean()
                    loss.backward()
                stream.flush()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    plain, other = unet(diffusers), unet(diffusers)
    stream = streamed(other)
    assert same(run(plain), run(other, stream))
    assert same(plain.state_dict(), other.state_dict())


def test_second_derivatives_while_resident():
    def r1(network):
        torch.manual_seed(1)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        r1_penalty(network(x), x).mean().backward()
        return [p.grad for p in network.parameters()]

    torch.manual_seed(0)
    plain = Discriminator(16, channel_base=64, channel_max=8)
    other = copy.deepcopy(plain)
    stream = streamed(other)
    expected = r1(plain)
    with stream.resident():
        assert same(expected, r1(other))
    assert all(host.is_host(p) for b in other.blocks().values() for p in b.parameters())


def test_path_lengths_while_resident():
    def run(network):
        torch.manual_seed(1)
        ws = network.mapping(torch.randn(2, 8))
        images = network.synthesis(ws)
        path_lengths(images, ws, torch.randn_like(images)).mean().backward()
        return [p.grad for p in network.parameters()]

    torch.manual_seed(0)
    plain = Generator(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)
    other = copy.deepcopy(plain)
    stream = streamed(other)
    expected = run(plain)
    with stream.resident():
        assert same(expected, run(other))


@pytest.mark.parametrize("seed", range(6))
def test_graphs_with_branches(seed):
    """Blocks that read any earlier results: none's backward reads another's weights, whatever the order of branches."""

    def run(network, stream):
        choices = random.Random(seed)
        torch.manual_seed(seed)
        start = torch.randn(2, 3, 12, requires_grad=True)
        results = [start]

        def forward():
            for block in network.stack:
                inputs = choices.sample(results, min(len(results), choices.randint(1, 3)))
                results.append(block(sum(inputs)))
            return sum(r.square().mean() for r in choices.sample(results[1:], 4))

        if stream is None:
            forward().backward()
        else:
            with stream.running():
                forward().backward()
        return [start.grad, *(p.grad for p in network.stack.parameters())]

    plain, other = net(7), net(7)
    stream = streamed(other)
    names = {p: name for name, params in stream.params.items() for p in params}
    for param in names:  # raises unless the block is on the device when its gradient arrives
        param.register_post_accumulate_grad_hook(lambda p: stream.mark_changed(names[p]))
    for _ in range(2):
        plain.zero_grad()
        other.zero_grad()
        assert same(run(plain, None), run(other, stream))


# Where the weights are.


def test_names_values_and_objects_stay():
    network = net()
    before = {name: (id(p), p.detach().clone()) for name, p in network.named_parameters()}
    state = copy.deepcopy(network.state_dict())
    stream = streamed(network)
    with stream.running():
        network(torch.randn(2, 3, 5)).sum().backward()
        assert list(network.state_dict()) == list(state)
    stream.flush()
    assert same(dict(network.state_dict()), dict(state))
    for name, p in network.named_parameters():
        assert before[name][0] == id(p) and torch.equal(before[name][1], p)
    assert all("forward" not in vars(m) for m in network.modules())
    assert same(dict(copy.deepcopy(network).state_dict()), dict(state))


def test_safetensors_take_the_state_dict(tmp_path):
    from safetensors.torch import load_file, save_file

    network = net()
    streamed(network)
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), dict(network.state_dict()))


def test_parameters_that_blocks_share_stay_on_the_device():
    network = net()
    network.stack[2].out.weight = network.stack[0].out.weight
    network.last.bias = nn.Parameter(torch.zeros(2))
    network.tied = network.stack[1].qkv.weight
    streamed(network)
    assert not host.is_host(network.stack[2].out.weight) and not host.is_host(network.tied)
    assert host.is_host(network.stack[0].qkv.weight) and host.is_host(network.stack[2].out.bias)
    assert not host.is_host(network.first.weight) and not host.is_host(network.stack[0].shift)


def block_bytes(block):
    return sum(-(-p.nbytes // 512) * 512 for p in block.parameters())


def test_weights_on_the_device_are_two_blocks_and_the_rest():
    """8 blocks of 4 x 256 x 256: 8.4 MB of weights, of which 2.1 MB and the layers at the ends may be on the device."""
    network = net(depth=8, width=256)
    largest = max(block_bytes(block) for block in network.stack)
    rest = sum(-(-p.nbytes // 512) * 512 for m in (network.first, network.last) for p in m.parameters())
    rest += sum(-(-b.nbytes // 512) * 512 for b in network.buffers())
    x = torch.randn(2, 3, 5)
    with LiveBytes() as memory:
        memory.watch(network)
        resident = memory.live_bytes
        assert resident == 8 * largest + rest
        memory.watch(x)
        rest += 512
        stream = streamed(network)
        assert memory.live_bytes == rest
        memory.reset_peak()
        with torch.no_grad(), stream.running():
            network(x)
        assert memory.live_bytes == 2 * largest + rest
        activations = 64 << 10
        assert memory.peak_bytes <= 2 * largest + rest + activations

        def forget(param):
            param.grad = None

        handles = [p.register_post_accumulate_grad_hook(forget) for p in network.parameters()]
        memory.reset_peak()
        with stream.running():
            network(x).sum().backward()
        gradients = largest  # of one block at most: those of the others are gone
        assert memory.peak_bytes <= 2 * largest + rest + gradients + 2 * activations < resident / 2
        stream.flush(release=True)
        assert memory.live_bytes == rest
        for handle in handles:
            handle.remove()


def test_resident_holds_only_blocks_that_run_and_lets_them_go():
    network = net(depth=4, width=64)
    stream = streamed(network)
    with LiveBytes() as memory:
        with stream.resident(), torch.no_grad():
            network.stack[1](torch.randn(1, 3, 64))
            assert memory.live_bytes == block_bytes(network.stack[1])
        assert memory.live_bytes == 0


# Changes on the device.


def test_updates_inside_the_backward_reach_the_host():
    """Plain SGD by hooks: the same weights as a plain run's after three steps."""

    def hook_up(network, stream):
        owners = {p: name for name, b in find_blocks(network).items() for p in b.parameters()}

        @torch.no_grad()
        def update(param):
            param.data.add_(param.grad, alpha=-0.1)  # through .data, so that torch does not notice
            param.grad = None
            if stream is not None and param in owners:
                assert not host.is_host(param)
                stream.mark_changed(owners[param])

        for param in network.parameters():
            param.register_post_accumulate_grad_hook(update)

    plain, other = net(5), net(5)
    stream = streamed(other)
    hook_up(plain, None)
    hook_up(other, stream)
    for seed in range(3):
        torch.manual_seed(seed)
        plain(torch.randn(4, 3, 5)).square().mean().backward()
        torch.manual_seed(seed)
        with stream.running():
            other(torch.randn(4, 3, 5)).square().mean().backward()
    stream.flush()
    assert same(plain.state_dict(), other.state_dict())
    assert not same(plain.state_dict(), net(5).state_dict())
    assert all(host.is_host(p) for p in other.stack.parameters())


@pytest.mark.parametrize("noticed", [True, False])
def test_pending_updates_when_loaded_reach_the_host(noticed):
    network = net(5)
    stream = streamed(network)
    before = copy.deepcopy(network.state_dict())
    blocks = find_blocks(network)
    pending, seen = set(blocks), []

    def on_load(name):
        seen.append((name, torch.is_grad_enabled(), all(not host.is_host(p) for p in blocks[name].parameters())))
        if name not in pending:
            return False
        pending.discard(name)
        for param in blocks[name].parameters():
            (param if noticed else param.data).add_(1)
        return not noticed

    stream.on_load = on_load
    with stream.running():
        network(torch.randn(2, 3, 5)).sum().backward()
    stream.flush()
    assert seen == [(name, False, True) for name in blocks]  # once each: not in the backward
    for name, value in network.state_dict().items():
        is_weight = name.startswith("stack") and "shift" not in name
        assert torch.equal(value, before[name] + 1 if is_weight else before[name])


def test_random_numbers_of_an_update_do_not_disturb_those_of_the_block():
    plain, other = net(), net()
    stream = streamed(other)

    def on_load(_name):
        torch.randn(3)
        return False

    stream.on_load = on_load
    x = torch.randn(2, 3, 5)
    with stream.running():
        torch.manual_seed(1)
        loss = other(x).sum()
        loss.backward()
    gradient = other.stack[3].gain.grad

    def draw(*_):
        torch.randn(3)

    for block in plain.stack:  # the same numbers, drawn at the same places
        block.register_forward_pre_hook(draw)
    torch.manual_seed(1)
    expected = plain(x).sum()
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(gradient, plain.stack[3].gain.grad)


def test_loaded_writes_back():
    network = net()
    stream = streamed(network)
    before = {name: b.out.weight.detach().clone() for name, b in find_blocks(network).items()}
    for name, block in find_blocks(network).items():
        with stream.loaded(name):
            assert not host.is_host(block.out.weight)
            block.out.weight.data.mul_(3)
    stream.flush()
    for name, block in find_blocks(network).items():
        assert host.is_host(block.out.weight) and torch.equal(block.out.weight, 3 * before[name])


def test_changes_while_resident_reach_the_host():
    network = net()
    stream = streamed(network)
    with stream.resident():
        network(torch.zeros(1, 3, 5))
        network.stack[0].gain.data.fill_(7)
        stream.mark_changed("stack.0")
        network.stack[1].gain.detach().fill_(8)  # noticed
        with stream.loaded("stack.2"):
            network.stack[2].gain.data.fill_(9)
    assert [float(b.gain.detach()) for b in network.stack] == [7, 8, 9, 1]


def test_weights_loaded_from_a_file_between_passes_are_used():
    """Also where a block was brought ahead, and so would be stale."""
    network, other = net().eval(), net().eval()
    stream = streamed(network)
    x = torch.randn(2, 3, 5)
    with torch.no_grad(), stream.running():
        for _ in range(3):  # the order is known: the first block is brought again at the end
            network(x)
        state = {name: value * 1.5 for name, value in other.state_dict().items()}
        network.load_state_dict(state)  # without flush
        other.load_state_dict(state)
        assert torch.equal(network(x), other(x))


def test_mark_changed_of_an_absent_block_is_an_error():
    network = net()
    stream = streamed(network)
    with pytest.raises(RuntimeError, match="not on the device"):
        stream.mark_changed("stack.0")


def test_what_an_update_changed_before_it_failed_stays_changed():
    """It goes on where it was: nothing twice, nothing lost."""
    network = net()
    stream = streamed(network)
    left = ["qkv", "out"]

    def on_load(name):
        if name == "stack.1" and left:
            getattr(network.stack[1], left[0]).weight.data.fill_(len(left))
            left.pop(0)
            if left:
                raise Mishap
        return False

    stream.on_load = on_load
    for _ in range(2):
        try:
            with stream.running(), torch.no_grad():
                network(torch.zeros(1, 3, 5))
        except Mishap:
            assert left == ["out"]
    stream.flush()
    assert not left and network.stack[1].qkv.weight.unique().tolist() == [2]


# Misuse and mishaps.


class Mishap(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "recompute", "backward", "on_load"])
def test_after_an_error_the_step_can_be_redone(where):
    plain, other = net(), net()
    expected = train(plain, steps=2)
    stream = streamed(other)
    armed = []

    def fail(*_):
        if armed:
            armed.clear()
            raise Mishap

    handles = []
    if where == "forward":
        handles.append(other.stack[2].out.register_forward_pre_hook(fail))
    elif where == "recompute":
        calls = []

        def second_call(*_):
            calls.append(1)
            if len(calls) == 2:
                fail()

        handles.append(other.stack[2].out.register_forward_pre_hook(second_call))
    elif where == "backward":
        handles.append(other.stack[1].gain.register_hook(fail))
    else:
        stream.on_load = lambda name: bool(name == "stack.2" and fail())
    armed.append(1)
    with pytest.raises(Mishap), stream.running():
        other(torch.randn(2, 3, 5)).sum().backward()
    assert not armed
    assert all("forward" not in vars(m) for m in other.modules())
    other.zero_grad()
    for handle in handles:
        handle.remove()
    assert same(expected, train(other, stream, steps=2))
    assert same(plain.state_dict(), other.state_dict())


def test_streamed_and_recomputed_at_once_is_an_error():
    network = net()
    stream = streamed(network)
    blocks = list(find_blocks(network).values())
    with stream.running():
        with pytest.raises(LowVRAMError, match="already"), recomputing(blocks):
            pass
        with pytest.raises(LowVRAMError, match="already"), stream.resident():
            pass
        network(torch.zeros(1, 3, 5)).sum().backward()  # still in order


def test_flush_and_loaded_within_a_backward_are_errors():
    network = net()
    stream = streamed(network)

    def load(_grad):
        with stream.loaded("stack.3"):
            pass

    for action in (lambda _grad: stream.flush(), load):
        handle = network.stack[1].gain.register_hook(action)
        with pytest.raises(RuntimeError, match="backward"), stream.running():
            network(torch.zeros(1, 3, 5)).sum().backward()
        handle.remove()
    with pytest.raises(RuntimeError, match="resident"), stream.resident():
        stream.flush()


def test_weights_used_other_than_by_calling_their_block_are_an_error_not_wrong_numbers():
    network = net(6)
    stream = streamed(network)
    with stream.running():
        x = network.first(torch.randn(2, 3, 5))
        y = network.stack[0](x)
        z = (y @ network.stack[0].out.weight).square()  # saved by the graph, in a slot
        for block in network.stack[1:]:
            z = block(z)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


def test_outputs_that_are_weights_are_copied():
    class Gives(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), float(value)))
            self.inner = nn.Linear(1, 1)

        def forward(self):
            return {"weight": self.weight, "view": self.weight[1:]}

    network = nn.ModuleList(Gives(value) for value in range(5))
    stream = streamed(network)
    with stream.running():
        outputs = [block() for block in network]
        for value, output in enumerate(outputs):
            assert output["weight"].tolist() == [value] * 4 and output["view"].tolist() == [value] * 3
        sum((o["weight"] * i).sum() + o["view"].sum() for i, o in enumerate(outputs)).backward()
    assert [block.weight.grad.tolist() for block in network] == [[i, i + 1, i + 1, i + 1] for i in range(5)]


def test_inference_mode():
    network = net().eval()
    x = torch.randn(2, 3, 5)
    expected = network(x).detach()
    stream = streamed(network)
    with stream.running():
        with torch.inference_mode():
            assert torch.equal(network(x), expected)
        network(x).sum().backward()
    assert network.stack[0].gain.grad is not None


# Traced.


@pytest.mark.parametrize("second_order", [False, True])
def test_fake_tensors_take_the_same_bytes(second_order):
    def peak():
        network = Discriminator(16, channel_base=1024, channel_max=64)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        with LiveBytes() as memory:
            memory.watch(network, x)
            stream = streamed(network)
            memory.reset_peak()
            for _ in range(2):
                if second_order:
                    with stream.resident():
                        r1_penalty(network(x), x).mean().backward()
                else:
                    with stream.running():
                        network(x).sum().backward()
            stream.flush(release=True)
            return memory.peak_bytes, memory.live_bytes

    torch.manual_seed(0)
    real = peak()
    with FakeTensorMode():
        traced = peak()
    assert real == traced
    assert real[1] < real[0]
