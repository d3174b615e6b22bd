"""Recomputed blocks: same numbers, fewer bytes, and nothing left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.memory.checkpointing import recomputing
from lowvram.models.stylegan2 import Discriminator, Generator
from lowvram.objectives.adversarial import path_lengths, r1_penalty


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 8 * width)
        self.back = nn.Linear(8 * width, width)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x, *, scale=None):
        self.calls += 1
        y = self.back(self.dropout(torch.tanh(self.wide(x))))
        return x + (y if scale is None else y * scale["by"])


def stack(depth=4, width=8):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(depth)))


def step(network, *, recompute_every=None):
    """Loss and gradients of a seeded step."""
    torch.manual_seed(1)
    x = torch.randn(16, 8, requires_grad=True)
    if recompute_every is None:
        loss = network(x).square().mean()
    else:
        with recomputing(list(network), recompute_every):
            loss = network(x).square().mean()
    loss.backward()  # outside: the context may be left before
    grads = [x.grad, *(p.grad for p in network.parameters())]
    network.zero_grad()
    return [loss.detach(), *grads]


@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_bit_identical_with_dropout(every):
    network = stack()
    plain, recomputed = step(network), step(network, recompute_every=every)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("every, calls", [(1, [2, 2, 2, 2]), (2, [2, 1, 2, 1]), (3, [2, 1, 1, 2]), (4, [2, 1, 1, 1])])
def test_every_nth_block_runs_twice(every, calls):
    network = stack()
    step(network, recompute_every=every)
    assert [block.calls for block in network] == calls


def test_saves_only_the_inputs():
    """Per block: 2 tensors [16, 64] are kept plainly (tanh, dropout) among others; recomputed, one [16, 8]."""

    def saved_bytes(every):
        sizes = {}

        def pack(x):
            if not isinstance(x, nn.Parameter):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        network = stack()
        torch.manual_seed(1)
        x = torch.randn(16, 8, requires_grad=True)
        with saved_tensors_hooks(pack, lambda x: x):
            if every is None:
                y = network(x)
            else:
                with recomputing(list(network), every):
                    y = network(x)
        assert y.requires_grad
        return sum(sizes.values())

    block_bytes = 16 * 64 * 4
    plain, recomputed = saved_bytes(None), saved_bytes(1)
    assert plain >= 4 * 2 * block_bytes
    assert recomputed <= 4 * 16 * 8 * 4 + 64  # the inputs, and an empty stand-in
    assert saved_bytes(2) <= plain - 2 * 2 * block_bytes


def test_tensors_at_any_depth_of_the_arguments():
    def gradients(recompute):
        torch.manual_seed(3)
        block, x, by = Block(8), torch.randn(4, 8), torch.randn(8, requires_grad=True)
        kept = []
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            if recompute:
                with recomputing([block]):
                    y = block(x, scale={"by": by * 1})
            else:
                y = block(x, scale={"by": by * 1})
        y.sum().backward()
        return by.grad, [tuple(t.shape) for t in kept]

    (plain, _), (recomputed, kept) = gradients(False), gradients(True)
    assert torch.equal(plain, recomputed)
    assert (8,) in kept  # offloading around it sees the tensor in the dictionary too


def test_without_grad_mode_it_runs_plainly():
    network = stack()
    with torch.no_grad(), recomputing(list(network)):
        network(torch.randn(2, 8))
    assert [block.calls for block in network] == [1] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    network = stack()
    keys = list(network.state_dict())
    hooked = []
    network[0].register_forward_hook(lambda *_: hooked.append(1))
    try:
        with recomputing(list(network)):
            assert list(network.state_dict()) == keys
            network(torch.randn(2, 8))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert hooked == [1]
    assert all("forward" not in vars(block) for block in network)
    network[0]._forward_hooks.clear()  # a lambda, which pickle can't take
    restored = pickle.loads(pickle.dumps(network))
    assert list(copy.deepcopy(restored).state_dict()) == keys


def test_a_forward_that_others_set_returns():
    block = Block(4)
    plain = block.forward

    def set_by_others(x):
        return plain(x) + 1

    block.forward = set_by_others
    with recomputing([block]):
        assert block(torch.zeros(1, 4)).shape == (1, 4)
    assert vars(block)["forward"] is set_by_others


def test_twice_at_once_is_an_error_that_changes_nothing():
    network = stack(2)
    with recomputing([network[1]]):
        within = vars(network[1])["forward"]
        with pytest.raises(LowVRAMError, match="recomputed or streamed already"), recomputing(list(network)):
            pass
        assert vars(network[1])["forward"] is within
        assert "forward" not in vars(network[0])


def test_every_must_be_positive():
    with pytest.raises(LowVRAMError, match="recompute_every=0"), recomputing([], 0):
        pass


def test_second_derivatives_of_r1():
    torch.manual_seed(0)
    d = Discriminator(16, channel_base=64, channel_max=8)

    def gradients(recompute):
        torch.manual_seed(1)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        with recomputing(list(find_blocks(d).values()) if recompute else []):
            r1_penalty(d(x), x).mean().backward()
        grads = [p.grad for p in d.parameters() if p.grad is not None]
        d.zero_grad()
        return grads

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_second_derivatives_of_path_lengths():
    torch.manual_seed(0)
    g = Generator(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)

    def gradients(recompute):
        torch.manual_seed(1)
        with recomputing(list(find_blocks(g).values()) if recompute else []):
            ws = g.mapping(torch.randn(2, 8))
            images = g.synthesis(ws)  # noise from the default generator: it must come again
            path_lengths(images, ws, torch.randn_like(images)).mean().backward()
        grads = [p.grad for p in g.parameters() if p.grad is not None]
        g.zero_grad()
        return grads

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
