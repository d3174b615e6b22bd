"""The model of time: its parts, that it only falls as cards get faster, and that it agrees with published trainings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lowvram.planner import cards, cost
from lowvram.planner.log import ATTENTION, CONVOLUTION, KINDS, MATMUL, MEMORY, Work
from lowvram.planner.record import convolution_backward_flops

A100 = cards.find("A100 40GB")
RTX_3060 = cards.find("RTX 3060")
IDEAL = cost.Rates(
    memory=1.0,
    half_matmul=1.0,
    half_convolution=1.0,
    fp32=1.0,
    attention=1.0,
    pcie=1.0,
    matmul_reuse=float("inf"),
    convolution_reuse=float("inf"),
    fill_seconds=0.0,
    launch_seconds=0.0,
    overlap=1.0,
    tf32=False,
)


def work(*rows: tuple[float, float, int, bool], host_bytes: float = 0.0) -> Work:
    """(flops, bytes, kind, half) of each operation."""
    flops, moved, kinds, half = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Work(
        flops=np.array(flops, np.float64),
        bytes=np.array(moved, np.float64),
        kinds=np.array(kinds, np.int8),
        half=np.array(half, np.bool_),
        host_bytes=host_bytes,
    )


def test_an_operation_takes_the_longer_of_arithmetic_and_traffic() -> None:
    rows = work(
        (12.7e12, 1.0, MATMUL, False), (25.5e12, 1.0, MATMUL, True), (1.0, 360e9, CONVOLUTION, True), (0, 36e9, 0, True)
    )
    assert cost.operation_seconds(rows, RTX_3060, IDEAL) == pytest.approx([1, 1, 1, 0.1])
    assert cost.seconds(rows, RTX_3060, IDEAL).total_seconds == pytest.approx(3.1)


@pytest.mark.parametrize(
    ("changed", "row", "expected"),
    [
        ({"memory": 0.5}, (0, 360e9, MEMORY, False), 2),
        ({"half_matmul": 0.5}, (25.5e12, 0, MATMUL, True), 2),
        ({"half_convolution": 0.5}, (25.5e12, 0, CONVOLUTION, True), 2),
        ({"attention": 0.25}, (25.5e12, 0, ATTENTION, True), 4),
        ({"fp32": 0.5}, (12.7e12, 0, CONVOLUTION, False), 2),
        ({"tf32": True, "half_convolution": 0.5}, (12.7e12, 0, CONVOLUTION, False), 1),  # plain fp32 is as fast here
        ({"matmul_reuse": 100.0}, (36e12, 0, MATMUL, True), 36 / 25.5 + 1),
        ({"convolution_reuse": 100.0}, (36e12, 0, CONVOLUTION, True), 36 / 25.5 + 1),
        ({"fill_seconds": 3e-6}, (0, 0, MEMORY, False), 3e-6),
    ],
)
def test_each_share(changed: dict[str, float], row: tuple[float, float, int, bool], expected: float) -> None:
    found = cost.seconds(work(row), RTX_3060, replace(IDEAL, **changed))
    assert found.total_seconds == pytest.approx(expected, rel=1e-3)


def test_tf32_counts_on_large_cards() -> None:
    rows = work((19.5e12, 0, CONVOLUTION, False))
    assert cost.seconds(rows, A100, IDEAL).total_seconds == pytest.approx(1)
    assert cost.seconds(rows, A100, replace(IDEAL, tf32=True)).total_seconds == pytest.approx(19.5 / 156)
    assert cost.default_rates(A100).tf32
    assert not cost.default_rates(cards.find("T4")).tf32


def test_small_operations_do_not_fill_a_card() -> None:
    """The rate rises with the size of the work, towards the full card's."""
    rates = []
    for flops in (1e6, 1e8, 1e10, 1e12):
        rates.append(flops / cost.seconds(work((flops, 0, MATMUL, True)), A100).gpu_seconds)
    assert rates == sorted(rates)
    assert rates[0] < 0.01 * rates[-1]
    assert 0.3 < rates[-1] / A100.half_flops < 0.7


def test_the_host_launches_beside_the_card() -> None:
    rates = replace(IDEAL, launch_seconds=1e-3)
    busy = cost.seconds(work(*[(0, 360e9, MEMORY, False)] * 10), RTX_3060, rates)
    assert (busy.gpu_seconds, busy.launch_seconds) == pytest.approx((10, 0.01))
    assert busy.total_seconds == pytest.approx(10)
    assert busy.busy == 1.0
    idle = cost.seconds(work(*[(0, 360e5, MEMORY, False)] * 10), RTX_3060, rates)
    assert idle.total_seconds == pytest.approx(0.01)
    assert idle.busy == pytest.approx(0.1)


@pytest.mark.parametrize(("overlap", "total"), [(0.0, 3.0), (0.5, 2.5), (1.0, 2.0)])
def test_copies_hide_in_part(overlap: float, total: float) -> None:
    rows = work((0, 360e9, MEMORY, False), host_bytes=48e9)  # a second of work, two of copies
    found = cost.seconds(rows, RTX_3060, replace(IDEAL, overlap=overlap))
    assert found.pcie_seconds == pytest.approx(2)
    assert found.total_seconds == pytest.approx(total)
    assert cost.seconds(replace(rows, host_bytes=1e9), RTX_3060, IDEAL).total_seconds == pytest.approx(1)


def test_copies_hide_behind_launches_too() -> None:
    """Else a card that computes faster, with as much left to launch and to copy, would take longer."""
    rows = work((0, 36e9, MEMORY, False), host_bytes=24e9)  # a second of copies
    rates = replace(IDEAL, overlap=0.5, launch_seconds=1.0)
    assert cost.seconds(rows, RTX_3060, rates).total_seconds == pytest.approx(1.5)
    faster = replace(RTX_3060, bandwidth_bytes_per_second=3600e9)
    assert cost.seconds(rows, faster, rates).total_seconds == pytest.approx(1.5)


def test_nothing_takes_no_time() -> None:
    found = cost.seconds(work(), RTX_3060)
    assert found == cost.Time(gpu_seconds=0.0, launch_seconds=0.0, pcie_seconds=0.0, total_seconds=0.0)
    assert found.busy == 0.0


_AMOUNT = st.one_of(st.just(0.0), st.floats(1.0, 1e14))
_ROWS = st.lists(st.tuples(_AMOUNT, _AMOUNT, st.integers(0, len(KINDS) - 1), st.booleans()), min_size=1, max_size=8)
_RATES = (
    "bandwidth_bytes_per_second",
    "fp32_flops",
    "half_flops",
    "pcie_bytes_per_second",
)


@given(
    _ROWS,
    st.one_of(st.just(0.0), st.floats(0, 1e12)),
    st.sampled_from(cards.CARDS),
    st.lists(st.floats(1.0, 10.0), min_size=4, max_size=4),
    st.sampled_from([0.0, 8e-6, 0.1]),
)
def test_a_faster_card_never_takes_longer(
    rows: list[tuple[float, float, int, bool]],
    host_bytes: float,
    card: cards.Card,
    factors: list[float],
    launch_seconds: float,
) -> None:
    faster = replace(card, **{name: getattr(card, name) * f for name, f in zip(_RATES, factors, strict=True)})
    rates = replace(cost.default_rates(card), launch_seconds=launch_seconds)
    asked = work(*rows, host_bytes=host_bytes)
    slow, fast = cost.seconds(asked, card, rates), cost.seconds(asked, faster, rates)
    assert fast.total_seconds <= slow.total_seconds * (1 + 1e-12)
    assert max(slow.gpu_seconds, slow.launch_seconds) <= slow.total_seconds
    assert slow.total_seconds <= max(slow.gpu_seconds, slow.launch_seconds) + slow.pcie_seconds


@given(_ROWS, st.sampled_from(cards.CARDS), st.integers(0, 7), st.sampled_from(["flops", "bytes"]))
def test_more_work_never_takes_less(
    rows: list[tuple[float, float, int, bool]], card: cards.Card, place: int, what: str
) -> None:
    asked = work(*rows)
    more = np.array(getattr(asked, what))
    more[place % len(rows)] *= 2
    before, after = cost.seconds(asked, card), cost.seconds(replace(asked, **{what: more}), card)
    assert after.total_seconds >= before.total_seconds


def test_cards_that_lead_in_all_figures_are_faster() -> None:
    """Later generations reach larger shares, so the generation is a figure too."""
    rows = [(flops, flops / 50, kind, half) for flops in (1e8, 1e11) for kind in range(4) for half in (False, True)]
    asked = [work(row) for row in rows]
    pairs = 0
    for slow in cards.CARDS:
        for fast in cards.CARDS:
            if all(getattr(fast, name) >= getattr(slow, name) for name in (*_RATES, "capability")):
                pairs += 1
                for one in asked:
                    assert cost.seconds(one, fast).total_seconds <= cost.seconds(one, slow).total_seconds * 1.001
    assert pairs > 60


def test_a_measured_card_takes_about_as_long_as_its_datasheet_says() -> None:
    measured = replace(
        RTX_3060,
        bandwidth_bytes_per_second=0.9 * 360e9,
        half_flops=0.8 * 25.5e12,
        fp32_flops=0.8 * 12.7e12,
        half_convolution_flops=0.6 * 25.5e12,
        launch_seconds=4e-6,
        measured=True,
    )
    for kind in (MEMORY, MATMUL, CONVOLUTION, ATTENTION):
        for half in (False, True):
            rows = work((5e11, 2e9, kind, half))
            ratio = cost.seconds(rows, measured).total_seconds / cost.seconds(rows, RTX_3060).total_seconds
            assert ratio == pytest.approx(1, rel=0.1)
    assert cost.default_rates(measured).launch_seconds == pytest.approx(6e-6)


# One step of StyleGAN2, without TF32 as in the published code, of unfused operations, which cost us some time more:
# lazy phases by their share, in TFLOP and GB as traced. Published: facts of the papers' own runs on one card.
@pytest.mark.parametrize(
    ("half_tflop", "fp32_tflop", "convolution_gb", "other_gb", "operations", "batch", "published_seconds_per_kimg"),
    [(6.0, 0.44, 23.2, 77.9, 5139, 16, 12.53), (6.33, 1.76, 48.9, 170.5, 5771, 4, 90.39)],
    ids=["256", "1024"],
)
def test_published_trainings(
    half_tflop: float,
    fp32_tflop: float,
    convolution_gb: float,
    other_gb: float,
    operations: int,
    batch: int,
    published_seconds_per_kimg: float,
) -> None:
    share = half_tflop / (half_tflop + fp32_tflop)
    rows = [(half_tflop * 1e12 / 220, share * convolution_gb * 1e9 / 220, CONVOLUTION, True)] * 220
    rows += [(fp32_tflop * 1e12 / 140, (1 - share) * convolution_gb * 1e9 / 140, CONVOLUTION, False)] * 140
    rows += [(0.0, other_gb * 1e9 / (operations - 360), MEMORY, True)] * (operations - 360)
    found = cost.seconds(work(*rows), A100, replace(cost.default_rates(A100), tf32=False))
    ratio = found.total_seconds * 1000 / batch / published_seconds_per_kimg
    assert 0.95 < ratio < 1.3


def test_energy_and_a_training() -> None:
    assert cost.energy_joules(10, RTX_3060) == pytest.approx(10 * 170 * 0.85)
    assert cost.energy_joules(10, RTX_3060, busy=0) == pytest.approx(10 * 170 * 0.3)
    found = cost.training(0.5, 16, 1000, RTX_3060)
    assert found.images_per_second == pytest.approx(32)
    assert found.hours == pytest.approx(1e6 / 32 / 3600)
    assert found.kwh == pytest.approx(found.hours * 0.170 * 0.85)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_gradients_of_a_convolution_each_take_as_much_as_it_does(groups: int, transposed: bool) -> None:
    x = torch.empty(2, 8, 6, 6)
    w = torch.empty(*((8, 16 // groups) if transposed else (16, 8 // groups)), 3, 3)
    options = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)
    with FlopCounterMode(display=False) as forward:
        y = torch.ops.aten.convolution(x, w, None, *options)
    for mask in ([True, False, False], [True, True, False]):
        counted = convolution_backward_flops(y, x, w, None, *options, mask)
        assert counted == sum(mask) * forward.get_total_flops()
