"""Live bytes against counts by hand, real tensors against fake ones, and a whole StyleGAN2 step."""

import gc

import pytest
import torch
import torch.distributed.tensor
from tiny import TINY
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from lowvram import load_recipe
from lowvram.memory import host
from lowvram.memory.tracer import LiveBytes
from lowvram.phase import MicroBatch
from lowvram.tasks import build_task

KIB = 1024


def test_counts_storages_rounded_up_and_frees_at_once():
    with LiveBytes() as memory:
        a = torch.empty(100)  # 400 bytes
        assert memory.live_bytes == 512
        b = torch.empty(129)  # 516 bytes
        view = b[2:]
        same = b.detach().view(3, 43).t()
        assert memory.live_bytes == 512 + 1024
        del a, b
        assert memory.live_bytes == 1024
        del view, same
        assert memory.live_bytes == 0
    assert memory.peak_bytes == 512 + 1024


def test_reset_peak_and_storages_that_outlive_the_block():
    with LiveBytes() as memory:
        kept = torch.empty(256)
        torch.empty(1024)
        assert memory.peak_bytes == 5 * KIB
        memory.reset_peak()
        assert memory.peak_bytes == KIB
    del kept
    assert memory.live_bytes == 0


def test_host_memory_does_not_count():
    x = torch.empty(256)
    with LiveBytes() as memory:
        buffer = host.copy_of(x)
        with host.on_host():
            other = torch.zeros(512)
            other.mul_(2)
        buffer[1:].add_(1)
        assert memory.live_bytes == memory.peak_bytes == 0
        back = host.device_copy(buffer, x.device)
        assert memory.live_bytes == KIB
    assert back.numel() + other.numel() == 768


def test_watch_counts_what_existed_before_once():
    network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(128))
    network[0](torch.ones(1, 64)).sum().backward()
    optimizer = torch.optim.Adam(network[0].parameters())
    optimizer.step()
    memory = LiveBytes()
    memory.watch(network, optimizer)
    memory.watch(network.parameters(), torch.empty(0))
    weight, step = 16 * KIB, 512
    batch_norm = 4 * 512 + 512  # weight, bias, mean, variance; their count
    assert memory.live_bytes == weight * 4 + step + batch_norm  # weight, gradient and two moments


def test_other_devices_are_left_out():
    with LiveBytes("cuda") as memory:
        kept = torch.empty(1000)
    assert memory.peak_bytes == 0 and kept.numel()


def test_resized_storages_are_followed():
    with LiveBytes() as memory:
        x = torch.empty(256)
        x.untyped_storage().resize_(0)
        x.detach()
        assert memory.live_bytes == 0
        x.untyped_storage().resize_(1024)
        x.detach()
        assert memory.live_bytes == KIB


def _mlp_peak(layers: int, width: int, batch: int, recompute: bool) -> int:
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    with LiveBytes() as memory:
        memory.watch(network)
        x = torch.randn(batch, width)
        for layer in network:
            x = checkpoint(layer, x.sigmoid(), use_reentrant=False) if recompute else layer(x.sigmoid())
        x.sum().backward()
    return memory.peak_bytes


def test_an_mlp_is_counted_as_by_hand_and_fake_as_real():
    """Sigmoid keeps its result, which the layer keeps too: one activation a layer. The peak is in the first backward
    step: the last output, the loss, its expanded gradient [1 value], and all kept."""
    layers, width, batch = 6, 64, 64
    weight = activation = 4 * 64 * 64
    real = _mlp_peak(layers, width, batch, recompute=False)
    with FakeTensorMode():
        assert _mlp_peak(layers, width, batch, recompute=False) == real
    # At the end of the backward: every weight twice (its gradient), first activation and input, two gradients by them.
    at_the_start = layers * (weight + activation)
    at_the_end = 2 * layers * weight + 2 * activation
    assert max(at_the_start, at_the_end) <= real <= max(at_the_start, at_the_end) + 3 * activation + 2 * 512


def test_double_backward_is_followed():
    with LiveBytes() as memory:
        w = torch.randn(64, 64, requires_grad=True)
        x = torch.randn(64, 64, requires_grad=True)
        (grad,) = torch.autograd.grad((x @ w).sigmoid().sum(), x, create_graph=True)
        live_in_graph = memory.live_bytes
        grad.square().sum().backward()
        del grad
        assert memory.live_bytes == 4 * 16 * KIB < live_in_graph  # w, x and their gradients


# A StyleGAN2 step: the task's own four losses.

PHASES = ("G", "path_length", "D", "R1")


def _step_peaks(tiny: list[str], tmp_path) -> tuple[dict[str, int], int]:
    """Peak bytes by phase of a second step (states exist), and what is alive after it."""
    recipe = load_recipe("faces32", [*tiny, f"out={tmp_path / 'run'}"])
    n = recipe.batch
    torch.manual_seed(0)
    seeds = list(range(n))
    with LiveBytes() as memory:
        task = build_task(recipe, torch.device("cpu"))
        task.prepare_training()
        task.augment.set_probability(1.0)
        peaks = {}
        for _ in range(2):
            for phase in task.phases:
                memory.reset_peak()
                m = phase.samples
                images = torch.zeros(m, 3, recipe.resolution, recipe.resolution, dtype=torch.uint8)
                micro = MicroBatch(images=images, labels=torch.full((m,), -1), seeds=_real_seeds(seeds[:m]))
                with phase.trainable():
                    for loss in phase.losses(micro):
                        (loss * phase.every).backward()
                        del loss
                    phase.optimizer.step()
                    phase.optimizer.zero_grad()
                del micro, images
                peaks[phase.name] = memory.peak_bytes
        live = memory.live_bytes
        del task, phase
        gc.collect()
        assert memory.live_bytes < live / 10
    return peaks, live


def _real_seeds(seeds: list[int]) -> torch.Tensor:
    with unset_fake_temporarily():  # numbers are read off them
        return torch.tensor(seeds)


@pytest.mark.slow
def test_a_fake_stylegan2_step_is_counted_as_the_real_one(tmp_path, monkeypatch):
    settings = [*TINY, "augment.p=1"]
    real, live = _step_peaks(settings, tmp_path)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)  # torch can't move a module of fake tensors
    with FakeTensorMode():
        fake, fake_live = _step_peaks(settings, tmp_path)
    assert set(real) == set(PHASES)
    assert fake_live == live
    assert fake == real


def test_wrapped_tensors_are_counted_by_what_they_hold(tmp_path):
    dist = torch.distributed
    alone = not dist.is_initialized()  # a test of FSDP in the same process may have left its group
    if alone:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        x = dist.tensor.distribute_tensor(torch.ones(256), mesh, [dist.tensor.Shard(0)])
        with LiveBytes() as memory:
            y = x * 2
            assert memory.live_bytes == KIB
            memory.watch(x)
            assert memory.live_bytes == 2 * KIB
            del y
            assert memory.live_bytes == KIB
    finally:
        if alone:
            dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_card_it_counts_what_the_allocator_counts():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with LiveBytes("cuda") as memory:
        x = torch.randn(1000, 77, device="cuda", requires_grad=True)
        loss = (x.sigmoid() * x.exp()).tanh().sum()
        assert memory.live_bytes == torch.cuda.memory_allocated() - before
        loss.backward()
    assert memory.peak_bytes == torch.cuda.max_memory_allocated() - before
    buffer = host.empty_like(x)
    assert buffer.is_pinned() and not host.empty_like(torch.empty(3)).is_pinned()
