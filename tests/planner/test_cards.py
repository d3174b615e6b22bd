"""The table of cards, how they are found and chosen, and the measurement of the one at hand."""

import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import LowVRAMError
from lowvram.planner import cards

MIB, GIB = 2**20, 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_table() -> None:
    names = [card.name for card in cards.CARDS]
    assert len(names) == len(set(names)) == 20
    by_name = {card.name: card for card in cards.CARDS}
    assert by_name["RTX 3060"] == cards.Card(
        name="RTX 3060",
        vram_bytes=12 * GIB,
        bandwidth_bytes_per_second=360e9,
        fp32_flops=12.7e12,
        half_flops=25.5e12,
        pcie_bytes_per_second=24e9,
        board_watts=170.0,
        capability=(8, 6),
        bf16=True,
    )
    assert by_name["RTX 4060 Ti 16GB"].vram_bytes == 2 * by_name["RTX 4060 Ti 8GB"].vram_bytes
    assert by_name["A100 80GB"].bandwidth_bytes_per_second == 2039e9
    assert by_name["H200"].vram_bytes == 141 * 10**9
    assert {card.name for card in cards.CARDS if not card.bf16} == {"GTX 1660 Super", "RTX 2060", "T4"}
    assert [card.name for card in cards.CARDS if not card.consumer] == names[names.index("T4") :]
    for card in cards.CARDS:  # a slip of a power of ten would stand out
        assert 5 * GIB < card.vram_bytes < 150 * GIB
        assert 2e11 < card.bandwidth_bytes_per_second < 5e12
        assert 4e12 < card.fp32_flops < card.half_flops < 1e15
        assert 1e10 < card.pcie_bytes_per_second < card.bandwidth_bytes_per_second / 8


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx3060", "RTX 3060"),
        ("3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("RTX-3060 12 GB", "RTX 3060"),
        ("3060ti", "RTX 3060 Ti"),
        ("RTX 4060 Ti", "RTX 4060 Ti 8GB"),
        ("4060 ti 16g", "RTX 4060 Ti 16GB"),
        ("gtx 1660 SUPER", "GTX 1660 Super"),
        ("Tesla T4", "T4"),
        ("a100", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("H100 SXM", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H200 SXM 141GB", "H200"),
    ],
)
def test_names_however_written(written: str, name: str) -> None:
    assert cards.find(written).name == name


@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.name)
def test_a_name_of_the_table_is_its_own(card: cards.Card) -> None:
    assert cards.find(card.name) is card
    assert cards.find(f"NVIDIA GeForce {card.name.lower()}") is card


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("RTX 3060 Laptop", "RTX 3060"),
        ("rtx 2060 super", "RTX 2060"),
        ("H100 PCIe", "H100"),
        ("A10G", "A10"),
        ("RTX 3060 8GB", "RTX 3060"),
        ("3061", "RTX 3060"),
        ("banana", "Known: A10, "),
        ("", "Known: A10, "),
    ],
)
def test_another_card_is_refused(written: str, near: str) -> None:
    with pytest.raises(LowVRAMError) as caught:
        cards.find(written)
    assert f"card={written} " in caught.value.problem
    assert near in caught.value.remedy


@given(st.text(max_size=30))
def test_any_text_finds_or_is_refused(written: str) -> None:
    try:
        assert cards.find(written) in cards.CARDS
    except LowVRAMError as error:
        assert error.remedy


@pytest.mark.parametrize(
    ("needed", "name"),
    [
        (1, "GTX 1660 Super"),  # 6 GB and the least power
        (6 * GIB - cards.DISPLAY_BYTES, "GTX 1660 Super"),
        (6 * GIB - cards.DISPLAY_BYTES + 1, "RTX 4060"),
        (10 * GIB, "RTX 3060"),
        (14 * GIB, "RTX 4060 Ti 16GB"),  # and not the T4, which draws less
        (20 * GIB, "RTX 3090"),
        (24 * GIB - cards.DISPLAY_BYTES + 1, "A100 40GB"),
        (39 * GIB, "A100 40GB"),
        (40 * GIB, "A100 80GB"),  # which hardly leaves 40
        (100 * GIB, "H200"),
    ],
)
def test_the_smallest_card(needed: int, name: str) -> None:
    card = cards.smallest(needed)
    assert card is not None
    assert card.name == name


def test_no_card_is_large_enough() -> None:
    assert cards.smallest(200 * GIB) is None


@given(st.integers(0, 160 * GIB), st.integers(0, 160 * GIB))
def test_the_smallest_card_holds_it(needed: int, more: int) -> None:
    card, larger = cards.smallest(needed), cards.smallest(needed + more)
    if card is None:
        assert larger is None
        assert all(cards.usable_bytes(other) < needed for other in cards.CARDS)
    else:
        assert cards.usable_bytes(card) >= needed
        assert larger is None or cards.usable_bytes(larger) >= cards.usable_bytes(card)


@pytest.mark.parametrize(
    ("name", "driver_mib"), [("T4", 15_095), ("L4", 22_560), ("A10", 22_590), ("A100 40GB", 40_330), ("H100", 81_010)]
)
def test_no_more_is_usable_than_drivers_report(name: str, driver_mib: int) -> None:
    assert 0.98 * driver_mib * MIB < cards.usable_bytes(cards.find(name)) <= driver_mib * MIB


@pytest.mark.parametrize(
    ("vram", "name"),
    [
        (4, "RTX 2060"),
        (6, "RTX 2060"),
        (6.5, "RTX 4060"),
        (8, "RTX 4060"),
        (12, "RTX 3060"),
        (16, "RTX 4060 Ti 16GB"),
        (24, "RTX 3090"),
        (32, "A100 40GB"),
        (80, "A100 80GB"),
        (120, "H200"),
    ],
)
def test_the_card_of_a_budget(vram: float, name: str) -> None:
    assert cards.for_budget(int(vram * GIB)).name == name


def test_a_budget_that_no_card_has() -> None:
    with pytest.raises(LowVRAMError, match=r"vram=900GB .*\n.*H200 with 131"):
        cards.for_budget(900 * GIB)


# Measured.


def test_a_cpu_is_measured() -> None:
    precision, state = torch.backends.cuda.matmul.fp32_precision, torch.get_rng_state()
    begun = time.perf_counter()
    found = cards.measure(CPU)
    assert time.perf_counter() - begun < 20  # a tenth of it where nothing else runs
    assert 1e8 < found.bandwidth_bytes_per_second < 1e13
    assert 1e8 < found.pcie_bytes_per_second < 1e13
    for flops in (found.fp32_flops, found.half_flops, found.half_convolution_flops):
        assert 1e7 < flops < 1e14
    assert 1e-7 < found.launch_seconds < 1e-2
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert torch.equal(torch.get_rng_state(), state)  # a training that measures first draws the same numbers


def test_the_measured_rate_is_that_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rate is its bytes or flops by the median of what the clock says."""
    monkeypatch.setattr(cards, "_times", lambda run, device, limit, by_host=False: [9.0, 0.5, 0.25])
    found = cards.measure(CPU)
    assert found.bandwidth_bytes_per_second == 2 * 32 * MIB / 0.5
    assert found.half_flops == 2 * 256**3 / 0.5
    assert found.fp32_flops == 2 * 512**3 / 0.5
    assert found.half_convolution_flops == 2 * 9 * 32**2 * 32**2 / 0.5
    assert found.pcie_bytes_per_second == 8 * MIB / 0.5
    assert found.launch_seconds == pytest.approx(0.5 / 120)


def test_runs_are_bounded() -> None:
    calls = []
    assert len(cards._times(lambda: calls.append(1), CPU, 60.0)) == 30
    assert len(calls) == 31  # one to warm up
    assert len(cards._times(lambda: time.sleep(0.01), CPU, 0.0)) == 3


MEASURED = cards.Measured(
    bandwidth_bytes_per_second=330e9,
    half_flops=22e12,
    half_convolution_flops=18e12,
    fp32_flops=9e12,
    pcie_bytes_per_second=23e9,
    launch_seconds=5e-6,
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver that reports what is set here, and a card of which MEASURED was measured."""
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3060", total_memory=12_044 * MIB, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cards, "measure", lambda device: MEASURED)
    return properties


def test_the_card_at_hand(driver: SimpleNamespace) -> None:
    card = cards.present(CUDA)
    assert (card.name, card.vram_bytes, card.board_watts) == ("RTX 3060", 12_044 * MIB, 170.0)
    assert (card.measured, card.capability, card.bf16, card.consumer) == (True, (8, 6), True, True)
    assert (card.bandwidth_bytes_per_second, card.half_flops, card.fp32_flops) == (330e9, 22e12, 9e12)
    assert (card.half_convolution_flops, card.launch_seconds) == (18e12, 5e-6)


@pytest.mark.parametrize(
    ("reported", "memory_mib", "name"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 16_380, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 8_188, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 6_144, "RTX 3060 Laptop"),
        ("NVIDIA GeForce RTX 3060", 8_192, "RTX 3060"),  # a version that the table lacks
        ("Tesla T4", 15_095, "T4"),
        ("NVIDIA H200", 143_156, "H200"),
    ],
)
def test_the_name_of_the_card_at_hand(driver: SimpleNamespace, reported: str, memory_mib: int, name: str) -> None:
    driver.name, driver.total_memory = reported, memory_mib * MIB
    card = cards.present(CUDA)
    assert card.name == name
    assert card.vram_bytes == memory_mib * MIB
    assert 70 <= card.board_watts <= 700


def test_an_unlisted_card_draws_what_a_similar_one_does(driver: SimpleNamespace) -> None:
    driver.name, driver.total_memory = "NVIDIA Something New", 10 * GIB
    assert cards.present(CUDA).board_watts == 170.0  # 330 GB/s and 22 TFLOP/s measured, of 8.6: as an RTX 3060


def test_no_card_at_hand() -> None:
    with pytest.raises(LowVRAMError, match="device=cpu is no graphics card"):
        cards.present(CPU)


def test_a_full_card(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> cards.Measured:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cards, "measure", full)
    with pytest.raises(LowVRAMError, match=r"RTX 3060 has no 256MB free.*\n.*Close"):
        cards.present(CUDA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
def test_a_real_card() -> None:
    cards.measure(CUDA)  # libraries are loaded
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(CUDA)
    torch.cuda.reset_peak_memory_stats(CUDA)
    begun = time.perf_counter()
    card = cards.present(CUDA)
    assert time.perf_counter() - begun < 2
    assert torch.cuda.max_memory_reserved(CUDA) - before <= 320 * MIB  # 256 of its own, and cuBLAS
    assert torch.cuda.memory_reserved(CUDA) <= before
    with_table = [other for other in cards.CARDS if other.name == card.name]
    for listed in with_table:
        assert 0.5 < card.bandwidth_bytes_per_second / listed.bandwidth_bytes_per_second < 1.1
        assert 0.4 < card.half_flops / listed.half_flops < 1.15


def test_plans_take_triton_where_its_makers_support_it() -> None:
    assert not cards.runs_triton(cards.find("RTX 2060"))  # sm_75: tried on the card itself
    assert cards.runs_triton(cards.find("RTX 3060"))
    assert cards.runs_triton(cards.find("RTX 2060"), "triton")
    assert not cards.runs_triton(cards.find("RTX 3060"), "reference")
