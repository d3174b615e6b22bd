"""8-bit optimizers over sharded weights: each process keeps the bits of its own part, and a checkpoint is everyone's.

`python -m torch.distributed.run --nproc_per_node 2 tests/memory/test_fsdp_narrow.py FILE` trains in two processes.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.memory import fsdp, optimizers
from lowvram.memory import optimizer_convert as convert

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
KINDS = ("adam8bit", "lion8bit")


class Network(nn.Module):
    """Parts of odd sizes, a vector of more than 4096 elements, and one element that no process shares."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(71, 101), nn.Linear(101, 71)
        self.gain = nn.Parameter(torch.ones(71 * 71))
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return x @ self.gain.view(71, 71) * self.scale / 8


def make(network: nn.Module, kind: str) -> torch.optim.Optimizer:
    like = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    return optimizers.build(kind, network.parameters(), like=like)


def train(network: Network, optimizer: torch.optim.Optimizer, steps: range, *, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        x = torch.randn(8, 71, generator=torch.Generator().manual_seed(step))[rank::world]
        with fsdp.running([network]):
            (F.mse_loss(network(x), x.flip(1), reduction="sum") / (8 * 71)).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = optimizers.pack(optimizer)
    return fsdp.full_tensors(tensors), numbers


def load(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> list[str]:
    (group,) = optimizer.param_groups
    cut = fsdp.sharded_like(convert.widened(tensors, group["params"]), group["params"])
    return optimizers.unpack(optimizer, cut, numbers)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[k].double() - b[k].double()).square().sum() for k in a) ** 0.5)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("offload", [False, True], ids=["shard", "offload"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_is_the_plain_run_to_the_bit_and_state_goes_both_ways(kind: str, offload: bool) -> None:
    plain, one = Network(), Network()
    fsdp.shard(one, {}, CPU, offload=offload)
    plain_optimizer, own = make(plain, kind), make(one, kind)
    for network, optimizer in ((plain, plain_optimizer), (one, own)):
        train(network, optimizer, range(6))
    assert equal(fsdp.full_state(one), plain.state_dict())
    saved = state_of(own), state_of(plain_optimizer)
    assert all(value.dtype == torch.float32 for value in saved[0][0].values())
    assert any(value.dtype == torch.uint8 for value in saved[1][0].values())

    for state in saved:
        there, back = Network(), Network()
        fsdp.shard(there, {}, CPU, offload=offload)
        for network in (there, back):
            fsdp.load_full(network, fsdp.full_state(one)) if fsdp.is_sharded(network) else network.load_state_dict(
                fsdp.full_state(one)
            )
            optimizer = make(network, kind)
            assert load(optimizer, *state) == []
            train(network, optimizer, range(6, 8))
        assert equal(fsdp.full_state(there), back.state_dict())
    train(one, own, range(6, 8))
    assert equal(fsdp.full_state(one), fsdp.full_state(there))


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_to_the_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PATH": "/usr/bin"}
    result = subprocess.run(
        [*command, str(tmp_path / "out.pt")], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    saved = torch.load(tmp_path / "out.pt")
    start = {k: v.clone() for k, v in Network().state_dict().items()}
    for kind in KINDS:
        found = saved[kind]
        assert found["resumed"] and found["messages"] == []
        assert 0.4 < found["local_fraction"] < 0.6  # of the state's bytes, in the first process
        plain = Network()
        train(plain, make(plain, kind), range(6))
        moved = distance(plain.state_dict(), start)
        # Blocks end where a process's part does: other scales, and so other roundings. Lion's are of whole steps.
        assert distance(found["weights"], plain.state_dict()) < (0.02 if kind == "adam8bit" else 0.2) * moved


def _one_of_two(path: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    saved: dict[str, Any] = {}
    for kind in KINDS:
        network = Network()
        fsdp.shard(network, {}, CPU, offload=False)
        optimizer = make(network, kind)
        train(network, optimizer, range(6), rank=rank, world=2)
        weights, state = fsdp.full_state(network), state_of(optimizer)
        again = Network()
        fsdp.shard(again, {}, CPU, offload=False)
        fsdp.load_full(again, weights)
        resumed = make(again, kind)
        messages = load(resumed, *state)
        for one, its in ((network, optimizer), (again, resumed)):
            train(one, its, range(6, 9), rank=rank, world=2)
        same = torch.tensor(float(equal(fsdp.full_state(network), fsdp.full_state(again))))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        plain = make(Network(), kind)
        optimizers.init_state(plain)
        whole = sum(v.nbytes for s in plain.state.values() for v in s.values() if isinstance(v, Tensor))
        saved[kind] = {"weights": weights, "resumed": bool(same.item()), "messages": messages}
        saved[kind]["local_fraction"] = held / whole
    if rank == 0:
        torch.save(saved, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_of_two(sys.argv[1])
