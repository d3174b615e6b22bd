"""The meter, the cap's arithmetic and its messages."""

from collections.abc import Callable

import psutil
import pytest
import torch

from lowvram.errors import LowVRAMError
from lowvram.memory import guard

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB, GIB = 2**20, 2**30
CONTEXT = guard.CONTEXT_BYTES


def test_meter_on_a_cpu() -> None:
    meter = guard.Meter(CPU)
    for _ in range(2):
        with meter.phase("D"):
            torch.ones(4)
    with pytest.raises(KeyError), meter.phase("G"):
        raise KeyError
    costs = meter.take()
    assert {name: cost.count for name, cost in costs.items()} == {"D": 2, "G": 1}
    assert costs["D"].allocated_bytes == costs["D"].reserved_bytes >= psutil.Process().memory_info().rss // 2
    assert 0 < costs["D"].device_bytes < psutil.virtual_memory().total
    assert meter.take() == {}
    assert meter.take_messages() == []


class FakeCard:
    """torch.cuda of a card whose figures are set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, self.used, self.reserved, self.peak = 6 * GIB, 800 * MIB, 0, 0
        self.fractions: list[tuple[float, int]] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.used, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak // 2)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction, index: self.fractions.append((fraction, index)),
        )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    return FakeCard(monkeypatch)


def test_meter_on_a_card(card: FakeCard) -> None:
    meter = guard.Meter(CUDA)
    for used, peak in ((5 * GIB, GIB), (3 * GIB, 2 * GIB)):
        with meter.phase("D"):
            card.used, card.peak = used, peak
    cost = meter.take()["D"]
    assert (cost.allocated_bytes, cost.reserved_bytes, cost.device_bytes) == (GIB, 2 * GIB, 5 * GIB)


@pytest.mark.parametrize(("platform", "said"), [("win32", 1), ("linux", 0)])
def test_a_spill_is_said_once(card: FakeCard, monkeypatch: pytest.MonkeyPatch, platform: str, said: int) -> None:
    meter = guard.Meter(CUDA)  # 800 MiB are taken outside of the allocator
    monkeypatch.setattr("sys.platform", platform)
    messages = []
    for peak in (6 * GIB - 800 * MIB, 6 * GIB + 224 * MIB, 7 * GIB):
        with meter.phase("R1"):
            card.peak = peak
        messages.append(meter.take_messages())
    assert [len(m) for m in messages] == [0, said, 0]  # what just fits is none
    if said:
        assert messages[1][0].startswith("phase R1 took 1GB more than the card has")
        assert "vram=6GB" in messages[1][0]


@pytest.mark.parametrize(
    ("reserved", "outside", "spilled"),
    [(5 * GIB, GIB, 0), (5 * GIB, GIB + 1, 1), (7 * GIB, 0, GIB + CONTEXT), (6 * GIB - CONTEXT, 0, 0), (0, 0, 0)],
)
def test_what_has_spilled(reserved: int, outside: int, spilled: int) -> None:
    assert guard.spilled_bytes(reserved_bytes=reserved, outside_bytes=outside, total_bytes=6 * GIB) == spilled


@pytest.mark.parametrize(
    ("vram", "total", "outside", "allocator"),
    [
        (6 * GIB, 6 * GIB, CONTEXT + 300 * MIB, 6 * GIB - CONTEXT - 300 * MIB),  # the card itself, with a display
        (6 * GIB, 80 * GIB, CONTEXT, 6 * GIB - CONTEXT),  # a stand-in for a smaller card
        (6 * GIB, 80 * GIB, 60 * GIB, 6 * GIB - CONTEXT),  # beside another training
        (6 * GIB, 24 * GIB, 20 * GIB, 4 * GIB),  # which leaves too little
        (6 * GIB, 6 * GIB, 100 * MIB, 6 * GIB - CONTEXT),  # a young context will grow
        (8 * GIB, 6 * GIB, CONTEXT, 6 * GIB - CONTEXT),  # more than there is
        (CONTEXT + guard.LEAST_BYTES, 6 * GIB, CONTEXT, guard.LEAST_BYTES),
    ],
)
def test_what_the_allocator_gets(vram: int, total: int, outside: int, allocator: int) -> None:
    cap = guard.plan_cap(vram, total_bytes=total, outside_bytes=outside)
    assert cap.allocator_bytes == allocator
    assert cap.fraction * total == pytest.approx(allocator, abs=1)
    assert cap.vram_bytes == min(vram, total)
    assert allocator + max(outside, CONTEXT) <= total
    assert any("more than the card has" in m for m in cap.messages) == (vram > total)
    assert any("other programs hold" in m for m in cap.messages) == (allocator < min(vram, total) - CONTEXT)


def test_too_small_a_budget() -> None:
    with pytest.raises(LowVRAMError, match=r"vram=0\.59GB leaves 0\.17GB .*\n.*vram=0\.67GB"):
        guard.plan_cap(CONTEXT + 170 * MIB, total_bytes=6 * GIB, outside_bytes=0)
    with pytest.raises(LowVRAMError, match=r"vram=0\.2GB leaves 0GB"):
        guard.plan_cap(200 * MIB, total_bytes=6 * GIB, outside_bytes=0)
    with pytest.raises(LowVRAMError, match=r"other programs hold 5\.48GB of the card's 6GB.\n.*Close"):
        guard.plan_cap(6 * GIB, total_bytes=6 * GIB, outside_bytes=6 * GIB - 100 * MIB)


@pytest.mark.parametrize(("device", "index"), [(CUDA, 0), (torch.device("cuda"), 3)])
def test_cap_is_set_and_lifted(card: FakeCard, device: torch.device, index: int) -> None:
    card.used, card.reserved = 800 * MIB, 100 * MIB
    cap = guard.cap(6 * GIB, device)
    assert cap.allocator_bytes == 6 * GIB - 700 * MIB  # what the allocator holds already is its own
    assert guard.cap(None, device).vram_bytes is None
    assert card.fractions == [(cap.fraction, index), (1.0, index)]


def test_no_cap_on_a_cpu() -> None:
    cap = guard.cap(6 * GIB, CPU)
    assert cap.messages == ("vram=6GB is for a GPU: it bounds nothing on cpu",)
    assert cap.allocator_bytes is None
    assert guard.cap(None, CPU).messages == ()


@pytest.mark.parametrize(
    ("reserved", "wanted", "outside", "total", "least"),
    [
        (2 * GIB, GIB, 0, 24 * GIB, 3 * GIB + 512 * MIB),  # 430 MiB of context, rounded up
        (2 * GIB, 82 * MIB, 0, 24 * GIB, 2 * GIB + 512 * MIB),  # exactly a step
        (2 * GIB, 83 * MIB, 0, 24 * GIB, 2 * GIB + 768 * MIB),
        (2 * GIB, None, 0, 24 * GIB, 2 * GIB + 768 * MIB),
        (2 * GIB, GIB, 20 * GIB, 24 * GIB, 3 * GIB + 512 * MIB),  # room beside what others hold
        (4 * GIB, 2 * GIB, GIB, 6 * GIB, 7 * GIB),  # none: the display counts
    ],
)
def test_budget_that_would_do(reserved: int, wanted: int | None, outside: int, total: int, least: int) -> None:
    found = guard.plan_budget_bytes(
        reserved_bytes=reserved, wanted_bytes=wanted, outside_bytes=outside, total_bytes=total
    )
    assert found == least
    if found <= total and wanted is not None:  # with that budget the cap lets the allocation through
        allocator = guard.plan_cap(found, total_bytes=total, outside_bytes=outside).allocator_bytes
        assert allocator is not None
        assert allocator >= reserved + wanted


def test_budget_of_a_device(card: FakeCard) -> None:
    card.used, card.reserved = 3 * GIB, 2 * GIB
    assert guard.smallest_budget_bytes(reserved_bytes=4 * GIB, wanted_bytes=2 * GIB, device=CUDA) == 7 * GIB
    assert guard.smallest_budget_bytes(reserved_bytes=4 * GIB, wanted_bytes=1, device=CPU) == 4 * GIB + 256 * MIB


@pytest.mark.parametrize(
    ("size", "text", "up"),
    [(6 * GIB, "6GB", "6GB"), (5500 * MIB, "5.37GB", "5.38GB"), (5 * GIB + 1, "5GB", "5.01GB"), (0, "0GB", "0GB")],
)
def test_sizes_as_settings_are_written(size: int, text: str, up: str) -> None:
    assert guard.in_gb(size) == text
    assert guard.in_gb(size, up=True) == up


def test_sizes_read_back(tiny: Callable[..., object]) -> None:
    from lowvram.settings import parse_bytes

    assert parse_bytes("vram", guard.in_gb(6 * GIB)) == 6 * GIB
