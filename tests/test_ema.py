"""The average, wherever it lives and however wide its source is."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lowvram import ema
from lowvram.ema import ExponentialMovingAverage, on_device
from lowvram.memory import fsdp


class Small(nn.Module):
    """Parameters of several sizes and layouts, one used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.deep = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 2))
        self.gain = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("w_avg", torch.zeros(4))


def pair(dtype: torch.dtype = torch.float32) -> tuple[Small, Small]:
    torch.manual_seed(0)
    source, target = Small(), Small().requires_grad_(False)
    source.w_avg.fill_(3)
    return source.to(dtype), target


def expected(source: Small, target: Small, beta: float) -> dict[str, Tensor]:
    new = dict(source.named_parameters())
    return {
        name: (beta * kept.double() + (1 - beta) * new[name].double()).float()
        for name, kept in target.named_parameters()
    }


def check(source: Small, target: Small, average: ExponentialMovingAverage) -> None:
    beta = 0.5 ** (8 / 100)
    for _ in range(3):
        want = expected(source, target, beta)
        average.update(images_seen=1000, batch=8)
        for name, kept in target.named_parameters():
            torch.testing.assert_close(kept, want[name], rtol=0, atol=1e-7)
            assert kept.dtype == torch.float32
    assert torch.equal(target.w_avg, source.w_avg.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows(dtype: torch.dtype) -> None:
    source, target = pair(dtype)
    check(source, target, ExponentialMovingAverage(source, target, half_life_kimg=0.1, rampup=None))


def test_ramps_up() -> None:
    source, target = pair()
    want = expected(source, target, 0.5 ** (8 / 20))  # half-life: 0.05 * 400 images
    ExponentialMovingAverage(source, target, half_life_kimg=10, rampup=0.05).update(images_seen=400, batch=8)
    torch.testing.assert_close(dict(target.named_parameters()), want, rtol=0, atol=1e-7)


class FakeEvent:
    """Stands in for a CUDA event: notes that every copy is waited for."""

    waited = 0

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        FakeEvent.waited += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_on_the_host(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way from a card through two scratch buffers, on the CPU: only pinning and waiting are stand-ins."""
    source, target = pair(dtype)
    reserved: list[Tensor] = []

    def pageable(size_bytes: int) -> Tensor:
        reserved.append(torch.full((size_bytes,), 255, dtype=torch.uint8))
        return reserved[-1]

    monkeypatch.setattr(ema, "_pinned", pageable)
    narrow = dtype == torch.bfloat16
    monkeypatch.setattr(ema, "_beside", lambda kept, new: new.numel() == 1 and not narrow)  # one beside the average
    monkeypatch.setattr(ema, "_to_host", lambda new, device: new.shape != (2,))  # on a card; one elsewhere
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    FakeEvent.waited = 0
    check(source, target, ExponentialMovingAverage(source, target, half_life_kimg=0.1, rampup=None))
    assert FakeEvent.waited == 3 * (6 if narrow else 5)  # in each of three updates
    largest_bytes = 5 * 3 * 3 * 3 * source.conv.weight.element_size()
    assert [buffer.numel() for buffer in reserved] == [-(-largest_bytes // 16) * 16] * 2  # made once, and no larger


def test_sharded_source() -> None:
    source, target = pair()
    source.conv.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    plain = copy.deepcopy(source)
    fsdp.shard(source, {}, torch.device("cpu"), offload=False)
    assert hasattr(source.conv.weight, "full_tensor")
    want = expected(plain, target, 0.5 ** (8 / 100))
    ExponentialMovingAverage(source, target, half_life_kimg=0.1, rampup=None).update(images_seen=1000, batch=8)
    torch.testing.assert_close(dict(target.named_parameters()), want, rtol=0, atol=1e-7)


def test_on_device_is_nothing_where_the_network_is() -> None:
    network = Small()
    places = [tensor.data_ptr() for tensor in network.state_dict().values()]
    with on_device(network, torch.device("cpu")):
        assert [tensor.data_ptr() for tensor in network.state_dict().values()] == places


def test_on_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "_is_on", lambda tensor, device: False)  # the CPU as another device
    network = Small()
    values = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parameters, buffer = list(network.parameters()), network.w_avg
    places = [parameter.data_ptr() for parameter in parameters]
    with pytest.raises(KeyError), on_device(network, torch.device("cpu")):
        assert all(p.data_ptr() != place for p, place in zip(network.parameters(), places, strict=True))
        assert all(p is q for p, q in zip(network.parameters(), parameters, strict=True))
        assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(network.state_dict(), values, rtol=0, atol=0)
        raise KeyError
    assert [p.data_ptr() for p in network.parameters()] == places
    assert network.w_avg is buffer


def test_on_device_that_runs_out_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def copy_on(tensor: Tensor, device: torch.device) -> Tensor:
        copies.append(tensor)
        if len(copies) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.clone()

    monkeypatch.setattr(ema, "_is_on", lambda tensor, device: False)
    monkeypatch.setattr(ema, "_copy_on", copy_on)
    network = Small()
    places = [parameter.data_ptr() for parameter in network.parameters()]
    with pytest.raises(torch.OutOfMemoryError), on_device(network, torch.device("cuda")):
        raise AssertionError("not reached")
    assert [parameter.data_ptr() for parameter in network.parameters()] == places


@pytest.mark.parametrize(
    ("here", "asked", "same"),
    [
        ("cpu", "cpu", True),
        ("cuda:0", "cuda", True),
        ("cuda:0", "cuda:0", True),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cuda:0", False),
        ("cuda:0", "cpu", False),
    ],
)
def test_which_devices_are_one(here: str, asked: str, same: bool) -> None:
    assert ema._is_on(SimpleNamespace(device=torch.device(here)), torch.device(asked)) is same
