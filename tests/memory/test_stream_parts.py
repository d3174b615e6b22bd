"""Memory in powers of two, guesses at the next block, and copies that come as late as they may."""

import pytest
import torch
from streamed_nets import net, same, streamed, train
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.memory.blocks import find_blocks
from lowvram.memory.stream_parts import Order, host_buffers


@pytest.mark.parametrize("sizes", [[94, 94, 60, 30, 30, 5, 1, 0], [64], [1] * 9, [3, 0], [0], []])
def test_buffers_share_memory_in_powers_of_two(sizes):
    sizes_bytes = {str(i): size * 512 for i, size in enumerate(sizes)}
    buffers = dict(host_buffers(sizes_bytes, pinned=False))
    assert {name: len(buffer) for name, buffer in buffers.items()} == sizes_bytes
    for index, buffer in enumerate(buffers.values()):
        buffer.fill_(index)
    assert all((buffer == index).all() for index, buffer in enumerate(buffers.values()))  # none overlaps another
    chunks = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in buffers.values() if len(b)}
    assert all(size & (size - 1) == 0 for size in chunks.values())
    assert sum(chunks.values()) <= 2 * sum(sizes_bytes.values())


def test_the_order_is_learned():
    order = Order()
    passes = [("forward", "abcabd"), ("backward", "dbacba")] * 2
    guesses = [[order.after(name, pass_) for name in names] for pass_, names in passes]
    assert guesses[2] == ["b", "c", "a", "b", "d", None]
    assert guesses[3] == ["b", "a", "c", "b", "a", None]
    again = [order.after(name, "no_grad") for name in "abc" * 4]  # a pass may follow itself
    assert again[-6:] == list("bcabca")


@pytest.mark.parametrize("order", [None, (0, 1, 2, 0, 3)])
def test_every_block_but_the_first_is_brought_ahead(order):
    network = net(4, order)
    stream = streamed(network)
    late, loads = [], []
    bring, load = stream._bring, stream._load
    stream._bring = lambda block: (late.append(stream._holding(block) is None), bring(block))[1]
    stream._load = lambda block: (loads.append(block.name), load(block))[1]
    for _ in range(2):
        late.clear()
        loads.clear()
        with stream.running():
            network(torch.randn(2, 3, 5)).sum().backward()
    uses = len(network.order)
    assert len(late) == 2 * uses  # forward, and again in the backward
    assert not any(late)
    assert len(loads) == 2 * (uses - 2)  # at each turn two blocks are there already


# Timing, as on a card.


class LateCopies(TorchDispatchMode):
    """Stands in for the stream of copies: each is done only when someone waits for it, and its source is read then."""

    def __init__(self):
        super().__init__()
        self.queue, self.done, self.waited_for_compute = [], 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        assert self.waited_for_compute, "copied without waiting for the kernels that use the slot"
        self.waited_for_compute = False
        self.queue.append((args[0], args[1]))
        return args[0]

    def wait_stream(self, _stream):
        self.waited_for_compute = True

    def record_event(self):
        return len(self.queue)

    def synchronize(self, event=None):
        end = len(self.queue) if event is None else event
        while self.done < end:
            target, source = self.queue[self.done]
            target.copy_(source)
            self.done += 1


@pytest.fixture
def late_copies(monkeypatch):
    copies = LateCopies()

    class Compute:
        def wait_event(self, event):
            with torch.no_grad():
                copies.synchronize(event)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Compute())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return copies


@pytest.mark.parametrize("order", [None, (0, 1, 2, 0, 3), (0, 0, 1, 1, 2, 3)])
def test_copies_that_take_as_long_as_they_may(late_copies, order):
    plain, other = net(4, order), net(4, order)
    stream = streamed(other)
    stream._copies = late_copies
    assert same(train(plain), train(other, stream))
    assert same(plain.state_dict(), other.state_dict())
    assert late_copies.done >= 3 * 2 * 2


def test_updates_with_copies_that_take_as_long_as_they_may(late_copies):
    def step(network, stream):
        """Deferred steps of gradient descent, each block's when it is next loaded; the last by `loaded`."""
        blocks = find_blocks(network)
        pending = {}

        def update(name):
            grads = pending.pop(name, None)
            for param, grad in zip(blocks[name].parameters(), grads or (), strict=grads is not None):
                param.data.sub_(grad, alpha=0.05)
            return grads is not None

        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(4, 3, 5)
            if stream is None:
                for name in blocks:
                    update(name)
                network(x).square().mean().backward()
            else:
                stream.on_load = update
                with stream.running():
                    network(x).square().mean().backward()
            for name, block in blocks.items():
                pending[name] = [p.grad for p in block.parameters()]
            network.zero_grad()
        for name in blocks:
            if stream is None:
                update(name)
            else:
                with stream.loaded(name), torch.no_grad():
                    update(name)
        if stream is not None:
            stream.flush()
        return network.state_dict()

    other = net(5)
    stream = streamed(other)
    stream._copies = late_copies
    expected = step(net(5), None)
    assert same(dict(expected), dict(step(other, stream)))
    assert not same(dict(expected), dict(net(5).state_dict()))
