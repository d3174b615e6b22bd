"""Small frozen networks whose gradient goes to a little that is trained: low-rank layers inside, a vector in front."""

from collections.abc import Iterator

import torch
from streamed_nets import Net, net
from torch import Tensor, nn

from lowvram import seeded
from lowvram.memory.apply import Applied, apply
from lowvram.memory.policy import MemoryPolicy
from lowvram.phase import MicroBatch, Phase

SAMPLES = 8


class LowRank(nn.Module):
    """A frozen linear layer, and a trained product of two thin matrices beside it (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Net, nn.ModuleDict]:
    """A frozen network, and the layers in training that sit inside its blocks."""
    network = net(4).requires_grad_(False).to(dtype)
    torch.manual_seed(seed + 1)
    layers = nn.ModuleDict()
    for index, block in enumerate(network.stack):
        block.out = LowRank(block.out)
        layers[f"{index}"] = nn.ModuleDict({"down": block.out.down, "up": block.out.up}).float()
    return network, layers.requires_grad_(False)


class Told(nn.Module):
    """Vectors that are put in front of what a frozen network reads, as in textual inversion (arXiv 2208.01618)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.vectors = nn.Parameter(torch.randn(2, 5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.vectors.expand(len(x), -1, -1), x], dim=1)


def adapter_phase(network: Net, layers: nn.Module, **changes: object) -> Phase:
    """Fits the network's output to a fixed target by the layers alone."""

    def loss(micro: MicroBatch) -> Tensor:
        x = seeded.randn(micro.seeds, 3, 5, stream="x")
        return (network(x) - x.sum(dim=-1, keepdim=True).tanh()).square().mean()

    return _phase("adapter", network, layers, loss, **changes)


def told_phase(network: Net, told: Told, **changes: object) -> Phase:
    """The same by vectors that the network reads first."""

    def loss(micro: MicroBatch) -> Tensor:
        x = seeded.randn(micro.seeds, 3, 5, stream="x")
        return (network(told(x)) - x.mean().tanh()).square().mean()

    return _phase("told", network, told, loss, **changes)


def _phase(name: str, network: nn.Module, trained: nn.Module, loss: object, **changes: object) -> Phase:
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6)
    own = {"name": name, "networks": (trained,), "frozen": (network,), "optimizer": optimizer, "loss": loss}
    return Phase(**{**own, "samples": SAMPLES, "clip_norm": 0.5, **changes})  # type: ignore[arg-type]


def steps(phase: Phase, policy: MemoryPolicy, count: int = 3, **options: object) -> Iterator[tuple[Applied, float]]:
    """Train a phase under a policy; after each step what applied it, and the loss."""
    applied = apply(policy, [phase], device="cpu", seed=3, **options)
    for number in range(count):
        torch.manual_seed(number)  # of dropout, which is drawn for whole micro-batches
        outcome = applied.step(phase, torch.zeros(SAMPLES, 1), number=number)
        assert outcome is not None
        yield applied, outcome.loss
