"""Sharded training is plain training: the same weights after ten steps, in one process and in two.

`python -m torch.distributed.run --nproc_per_node 2 tests/memory/test_fsdp.py FILE` runs `train_gan` in two processes.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from seeds import for_one_of_the_seeds
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.memory import fsdp, optimizers
from lowvram.models.stylegan2 import Discriminator, Generator
from lowvram.objectives import adversarial

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
OFFLOAD = pytest.mark.parametrize("offload", [False, True], ids=["shard", "offload"])


# The optimizer's part, as the updater has it.


def bound(grads: list[Tensor], norm: Tensor, most: float) -> None:
    torch._foreach_mul_(grads, min(1.0, most / (float(norm) + 1e-6)))


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return fsdp.full_tensors(optimizers.pack(optimizer)[0])


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    (group,) = optimizer.param_groups
    optimizers.unpack(optimizer, fsdp.sharded_like(tensors, group["params"]), optimizers.pack(optimizer)[1])


# A small UNet, called as a whole.


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(8, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.down = nn.ModuleList([Block(8), Block(8)])
        self.up = nn.ModuleList([Block(16), Block(24)])
        self.scale = nn.Parameter(torch.ones(24))  # at the root
        self.conv_out = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t[:, None])
        x = self.conv_in(x)
        kept = []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
        for block in self.up:
            x = block(torch.cat([x, kept.pop()], dim=1), time)
        out: Tensor = self.conv_out(x * self.scale[:, None, None])
        return out

    def blocks(self) -> dict[str, nn.Module]:
        return {f"{part}.{i}": self.get_submodule(f"{part}.{i}") for part in ("down", "up") for i in (0, 1)}


def train_unet(prepare: Callable[[UNet], None], *, steps: int = 10, clip: bool = True) -> tuple[UNet, Any]:
    torch.manual_seed(0)
    network = UNet()
    prepare(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    for step in range(steps):
        unet_step(network, optimizer, step, clip=clip)
    return network, optimizer


def unet_step(network: UNet, optimizer: torch.optim.Optimizer, step: int, *, clip: bool = True) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    with fsdp.running([network]):
        for _ in range(2):  # two micro-batches
            x = torch.randn(2, 3, 8, 8, generator=draw)
            F.mse_loss(network(x, torch.rand(2, generator=draw)), x.flip(0)).backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = fsdp.total_norm(grads)
    if clip:
        assert norm > 0.5  # or clipping is not tested
        bound(grads, norm, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return norm


# StyleGAN2: called in parts, frozen in the other's phase, and under create_graph.


class Gan:
    """Two networks and the four phases of a step, over this process's part of a batch of 8."""

    def __init__(self, prepare: Callable[[nn.Module], None], *, rank: int = 0, world_size: int = 1) -> None:
        torch.manual_seed(0)
        small: dict[str, Any] = {"channel_base": 112, "channel_max": 7, "c_dim": 3}  # 7: uneven parts
        self.G = Generator(16, z_dim=8, w_dim=9, mapping_layers=2, **small)
        self.D = Discriminator(16, mbstd_group_size=4, **small)
        for parameter in self.G.parameters():
            if parameter.ndim == 0:  # the noise's strength starts as 0, which hides its gradient's neighbours
                parameter.data.fill_(0.1)
        prepare(self.G)
        prepare(self.D)
        self.networks = {"G": self.G, "D": self.D}
        for network in self.networks.values():
            network.requires_grad_(False)
        adam: dict[str, Any] = {"lr": 0.002, "betas": (0.0, 0.99), "fused": True}
        self.optimizers = {name: torch.optim.Adam(n.parameters(), **adam) for name, n in self.networks.items()}
        self.rank, self.world_size = rank, world_size

    def step(self, step: int) -> None:
        self.phase("G", self.g_loss, step)
        self.phase("G", self.path_length_loss, step + 100, second_order=True)
        self.phase("D", self.d_loss, step + 200)
        self.phase("D", self.r1_loss, step + 300, second_order=True)

    def phase(self, name: str, loss: Callable[..., Tensor], step: int, *, second_order: bool = False) -> None:
        network, optimizer = self.networks[name], self.optimizers[name]
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        with fsdp.running(self.networks.values(), second_order=second_order):
            for part in range(self.rank, 2, self.world_size):  # samples n, n + 2, n + 4, n + 6: one group
                seeds = torch.arange(part, 8, 2) + 1000 * step
                (loss(seeds) / 2).backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        assert len(grads) == len(list(network.parameters())) or second_order
        bound(grads, fsdp.total_norm(grads), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in network.parameters():
            parameter.requires_grad_(False)

    def fakes(self, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = F.one_hot(seeds % 3, 3).float()
        ws = self.G.mapping(seeded.randn(seeds, 8, stream="z"), c)
        second = self.G.mapping(seeded.randn(seeds, 8, stream="z2"), c)  # style mixing: called twice
        ws = torch.where(torch.arange(ws.shape[1])[:, None] < 3, ws, second)
        return self.G.synthesis(ws, noise_seeds=seeds), c, ws

    def reals(self, seeds: Tensor) -> Tensor:
        return seeded.randn(seeds, 3, 16, 16, stream="real").tanh()

    def g_loss(self, seeds: Tensor) -> Tensor:
        images, c, _ = self.fakes(seeds)
        return adversarial.generator_loss(self.D(images, c)).mean()

    def path_length_loss(self, seeds: Tensor) -> Tensor:
        images, _, ws = self.fakes(seeds)
        lengths = adversarial.path_lengths(images, ws, seeded.randn(seeds, 3, 16, 16, stream="y"))
        return adversarial.path_length_penalty(lengths, 0.1).mean() * 2

    def d_loss(self, seeds: Tensor) -> Tensor:
        with torch.no_grad():
            images, c, _ = self.fakes(seeds)
        fake = adversarial.discriminator_fake_loss(self.D(images, c)).mean()
        return fake + adversarial.discriminator_real_loss(self.D(self.reals(seeds), c)).mean()

    def r1_loss(self, seeds: Tensor) -> Tensor:
        reals = self.reals(seeds).requires_grad_(True)
        return adversarial.r1_penalty(self.D(reals, F.one_hot(seeds % 3, 3).float()), reals).mean() * 5


def train_gan(prepare: Callable[[nn.Module], None], steps: int = 10, first: int = 0, **processes: int) -> Gan:
    gan = Gan(prepare, **processes)
    for step in range(first, first + steps):
        gan.step(step)
    return gan


def plain(network: nn.Module) -> None:
    pass


def sharded(offload: bool) -> Callable[[Any], None]:
    return lambda network: fsdp.shard(network, network.blocks(), CPU, offload=offload)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def plain_gan() -> Gan:
    return train_gan(plain)


# One process.


@OFFLOAD
def test_a_unet_trains_as_without(offload: bool) -> None:
    """To 1e-6: FSDP2's node at a block's input sums the gradients of its uses within first, and rounds otherwise."""
    expected, expected_optimizer = train_unet(plain)
    network, optimizer = train_unet(sharded(offload))
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    assert_equal(fsdp.full_state(network), expected.state_dict(), tolerance=1e-6)
    expected_state = full_optimizer_state(expected_optimizer)
    assert_equal(full_optimizer_state(optimizer), expected_state, tolerance=1e-6)


@pytest.mark.parametrize("offload", [pytest.param(False, marks=pytest.mark.slow), True], ids=["shard", "offload"])
def test_the_four_losses_of_stylegan2_train_as_without(offload: bool) -> None:
    def check(seed: int) -> None:
        gan, expected = (train_gan(prepare, first=100 * seed) for prepare in (sharded(offload), plain))
        for name, network in gan.networks.items():
            assert_equal(fsdp.full_state(network), expected.networks[name].state_dict(), tolerance=1e-6)

    for_one_of_the_seeds(check)


def test_the_norm_is_that_of_whole_gradients() -> None:
    network, optimizer = train_unet(sharded(False), steps=1)
    expected, plain_optimizer = train_unet(plain, steps=1)
    a, b = unet_step(network, optimizer, 1, clip=False), unet_step(expected, plain_optimizer, 1, clip=False)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_gradients_that_pass_no_hook_are_collected() -> None:
    """The penalty of a linear network reaches the weights by the graph of the first backward alone, past the hook on
    its output; and FSDP2 puts none on an input that it does not find among the arguments."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, hidden: dict[str, Callable[[], Tensor]]) -> Tensor:
            out: Tensor = F.conv2d(hidden["x"](), self.weight).sum((1, 2, 3))
            return out

    def gradient(shard: bool) -> Tensor:
        torch.manual_seed(0)
        network = Linear()
        if shard:
            fsdp.shard(network, {}, CPU, offload=False)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        with fsdp.running([network], second_order=True):
            adversarial.r1_penalty(network({"x": lambda: x}), x).mean().backward()
        assert network.weight.grad is not None
        return fsdp.full_tensor(network.weight.grad)

    assert torch.equal(gradient(True), gradient(False))


def unsharded_bytes(network: nn.Module) -> int:
    """Bytes of whole weights that lie on the device at this moment."""
    states = [m._get_fsdp_state() for m in network.modules() if fsdp.is_sharded(m)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    outputs = [tensor for group in groups for p in group.fsdp_params for tensor in p.all_gather_outputs]
    return sum(tensor.untyped_storage().nbytes() for tensor in outputs)


@pytest.mark.parametrize("second_order", [False, True])
def test_one_block_is_on_the_device_at_a_time_and_all_of_them_under_second_derivatives(second_order: bool) -> None:
    torch.manual_seed(0)
    network = Discriminator(32, channel_base=512, channel_max=16, mbstd_group_size=2)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in network.blocks().values()]
    fsdp.shard(network, network.blocks(), CPU, offload=True)
    seen: list[int] = []

    def note(*_: Any) -> None:
        seen.append(unsharded_bytes(network))

    for block in network.blocks().values():
        block.register_full_backward_pre_hook(note)
        block.register_forward_pre_hook(note)
    with fsdp.running([network], second_order=second_order):
        network(torch.randn(2, 3, 32, 32, requires_grad=True)).sum().backward()
    assert len(seen) == 2 * len(sizes)
    assert max(seen) == (sum(sizes) if second_order else max(sizes))
    assert max(sizes) < 0.6 * sum(sizes)  # so that the two differ
    assert unsharded_bytes(network) == 0


@OFFLOAD
def test_an_exception_leaves_nothing_behind(offload: bool) -> None:
    expected, _ = train_unet(sharded(False), steps=2)
    network, optimizer = train_unet(sharded(offload), steps=1)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    for place in ("forward", "backward"):
        hook = {
            "forward": network.up[0].norm.register_forward_hook,
            "backward": network.down[1].norm.register_full_backward_hook,
        }[place](fail)
        with pytest.raises(torch.OutOfMemoryError), fsdp.running([network]):
            network(x, t).sum().backward()
        hook.remove()
        assert unsharded_bytes(network) == 0
        assert all(p.grad is None for p in network.parameters())
    unet_step(network, optimizer, 1)
    assert_equal(fsdp.full_state(network), fsdp.full_state(expected))


def fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("injected")


def test_blocks_may_be_recomputed() -> None:
    """Checkpointing as this library does it: inside of the hooks, by the instance attribute `forward`."""
    from torch.utils.checkpoint import checkpoint

    def prepare(network: UNet) -> None:
        sharded(True)(network)
        for block in network.blocks().values():
            block.forward = lambda *args, original=block.forward: checkpoint(original, *args, use_reentrant=False)

    assert_equal(fsdp.full_state(train_unet(prepare)[0]), fsdp.full_state(train_unet(sharded(True))[0]))


def test_a_child_first_or_the_whole_first() -> None:
    torch.manual_seed(0)
    expected = Generator(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)
    torch.manual_seed(0)
    g = Generator(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)
    sharded(False)(g)
    z = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(
            g.synthesis(g.mapping(z), noise_mode="const"), expected.synthesis(expected.mapping(z), "const")
        )
        assert torch.equal(g(z, noise_mode="const"), expected(z, noise_mode="const"))
        g.mapping.update_w_avg(torch.ones(8))
    assert g.state_dict()["mapping.w_avg"].norm() > 0


def test_frozen_parameters_stay_frozen_and_thaw() -> None:
    network = UNet()
    network.requires_grad_(False)
    network.up.requires_grad_(True)
    sharded(False)(network)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        n for n, _ in network.named_parameters() if n.startswith("up.")
    }
    for thawed in (False, True):
        network.down.requires_grad_(thawed)
        with fsdp.running([network]):
            network(torch.randn(2, 3, 8, 8), torch.rand(2)).sum().backward()
        assert (network.down[0].conv.weight.grad is not None) == thawed
        assert network.up[0].conv.weight.grad is not None
        network.zero_grad()


# Checkpoints.


def test_state_goes_from_sharded_to_unsharded_and_back() -> None:
    network, optimizer = train_unet(sharded(True), steps=3)
    weights, state = fsdp.full_state(network), full_optimizer_state(optimizer)
    assert {type(tensor) for tensor in (*weights.values(), *state.values())} == {Tensor}
    assert list(weights) == list(UNet().state_dict())

    plain_network = UNet()
    plain_network.load_state_dict(weights)
    plain_optimizer = torch.optim.AdamW(plain_network.parameters(), lr=1e-3, fused=True)
    load_full_optimizer_state(plain_optimizer, state)

    again = UNet()
    sharded(False)(again)
    fsdp.load_full(again, weights)
    again_optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3, fused=True)
    load_full_optimizer_state(again_optimizer, state)
    assert isinstance(next(iter(again_optimizer.state.values()))["exp_avg"], DTensor)

    for step in range(3, 6):
        for one, its_optimizer in ((network, optimizer), (plain_network, plain_optimizer), (again, again_optimizer)):
            unet_step(one, its_optimizer, step)
    assert_equal(fsdp.full_state(again), fsdp.full_state(network))
    assert_equal(fsdp.full_state(again), fsdp.full_state(train_unet(sharded(True), steps=6)[0]))
    assert_equal(fsdp.full_state(network), plain_network.state_dict(), tolerance=1e-6)


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded() -> None:
    network, _ = train_unet(sharded(False), steps=1)
    before = fsdp.full_state(network)
    other = {key: value + 1 for key, value in before.items()}
    with pytest.raises(LowVRAMError, match=r"'down\.1\.conv\.bias'"):
        fsdp.load_full(network, {**other, "down.1.conv.bias": torch.zeros(3)})
    with pytest.raises(LowVRAMError, match="'extra'"):
        fsdp.load_full(network, {**other, "extra": torch.zeros(3)})
    assert_equal(fsdp.full_state(network), before)


# What can't be done.


def test_what_can_not_be_sharded_raises_and_leaves_the_network_alone() -> None:
    tied = UNet()
    tied.up[0].time = tied.up[1].time = nn.Linear(8, 8)
    mixed = UNet()
    mixed.down[0].conv.half()
    wrong = UNet()
    cases = [
        (tied, tied.blocks(), "up.0.time.weight and up.1.time.weight are one parameter"),
        (mixed, mixed.blocks(), "down.0.conv.weight is torch.float16 in a block of torch.float32"),
        (wrong, {"down.0": UNet().down[0]}, "block down.0 is not a module of that name"),
    ]
    for network, blocks, said in cases:
        with pytest.raises(LowVRAMError, match=said):
            fsdp.shard(network, blocks, CPU, offload=False)
        assert not any(isinstance(parameter, DTensor) for parameter in network.parameters())
    sharded(False)(wrong)
    with pytest.raises(LowVRAMError, match="sharded already"):
        sharded(False)(wrong)


def test_a_device_or_machine_that_can_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LowVRAMError, match="fsdp on device=meta"):
        fsdp.shard(UNet(), {}, torch.device("meta"), offload=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LowVRAMError, match="3 processes share 2 GPUs"):
        fsdp.shard(UNet(), {}, torch.device("cuda"), offload=False)


# Two processes.


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, plain_gan: Gan) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PATH": "/usr/bin"}
    result = subprocess.run(
        [*command, str(tmp_path / "out.pt")], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    saved = torch.load(tmp_path / "out.pt")
    for name, network in plain_gan.networks.items():
        assert_equal(saved[name], network.state_dict(), tolerance=1e-5)
        state = full_optimizer_state(plain_gan.optimizers[name])
        assert saved[f"optimizer_{name}"].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(saved[f"optimizer_{name}"][key], value, rtol=1e-3, atol=1e-5)
    # Parts of a process are about half of the whole, and loading in two processes gives back what was saved.
    assert 0.4 < saved["local_fraction"] < 0.6
    assert saved["reloaded"]
    assert saved["scalar_grad"] == 2 * (3 + 3 * 2)  # two passes over two processes with the inputs 1 and 2


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones([]))

    def forward(self, x: float) -> Tensor:
        return (self.weight * self.scale * x).sum()


def _one_of_two(path: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    gan = train_gan(sharded(True), rank=rank, world_size=2)
    saved: dict[str, Any] = {"reloaded": True}
    for name, network in gan.networks.items():
        saved[name] = fsdp.full_state(network)
        saved[f"optimizer_{name}"] = full_optimizer_state(gan.optimizers[name])
    parameters = list(gan.G.parameters())
    saved["local_fraction"] = sum(fsdp.local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
    other = Gan(sharded(False))
    for name, network in other.networks.items():
        fsdp.load_full(network, saved[name])
        load_full_optimizer_state(other.optimizers[name], saved[f"optimizer_{name}"])
        saved["reloaded"] &= _same(fsdp.full_state(network), saved[name])
        saved["reloaded"] &= _same(full_optimizer_state(other.optimizers[name]), saved[f"optimizer_{name}"])
    scaled = Scaled()
    scaled.weight.data.fill_(1 + rank)  # the first process's count
    fsdp.shard(scaled, {}, CPU, offload=False)
    for _ in range(2):
        with fsdp.running([scaled]):
            scaled(1.0 + rank).backward()
    assert scaled.scale.grad is not None
    saved["scalar_grad"] = scaled.scale.grad.item()
    if rank == 0:
        torch.save(saved, path)
    dist.destroy_process_group()


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


if __name__ == "__main__":
    _one_of_two(sys.argv[1])
