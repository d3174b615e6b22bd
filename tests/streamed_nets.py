"""Small networks in blocks, for the tests of streaming."""

import torch
from torch import nn

from lowvram.memory.blocks import find_blocks
from lowvram.memory.stream import BlockStream

CPU = torch.device("cpu")


class Block(nn.Module):
    """Attention-like: odd sizes, dropout, a frozen part, two outputs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.25)
        self.register_buffer("shift", torch.full((width,), 0.1))

    def forward(self, x, *, scale=None):
        q, k, v = self.qkv(self.norm(x) + self.shift).chunk(3, dim=-1)
        y = self.out(self.drop(nn.functional.scaled_dot_product_attention(q, k, v))) * self.gain
        return x + (y if scale is None else y * scale)


class Net(nn.Module):
    """Skip connections as in a UNet, layers outside of blocks, and (order given) blocks that run several times."""

    def __init__(self, depth: int = 4, order: tuple[int, ...] | None = None, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.stack = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 2)
        self.order = tuple(range(depth)) if order is None else order

    def forward(self, x, scale=None):
        x = self.first(x)
        kept = []
        for position, index in enumerate(self.order):
            if 2 * position >= len(self.order) and kept:
                x = x + kept.pop()
            x = self.stack[index](x, scale=scale)
            if 2 * position < len(self.order):
                kept.append(x)
        return self.last(x)


def net(depth=4, order=None, width=12):
    torch.manual_seed(0)
    return Net(depth, order, width)


def streamed(network):
    return BlockStream(network, find_blocks(network), CPU)


def adam(network):
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def train(network, stream=None, *, steps=3, micro_batches=1, size=16):
    """A few seeded steps, the weights changed between them by whoever streams nothing; losses and last gradients."""
    torch.manual_seed(5)
    optimizer, losses = adam(network), []
    for _ in range(steps):
        for _ in range(micro_batches):
            x = torch.randn(size, 3, 5)
            if stream is None:
                loss = network(x, scale=torch.tensor(2.0)).square().mean()
                loss.backward()
            else:
                with stream.running():
                    loss = network(x, scale=torch.tensor(2.0)).square().mean()
                    loss.backward()
            losses.append(loss.detach())
        grads = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
        if stream is not None:
            stream.flush()
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads


def same(first, second):
    """Whether two results are alike to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second
