"""How long work takes on a card, what power it draws, and what that makes of a whole training.

An operation takes the longer of its arithmetic and its traffic, each at the share of the card's rate that training
reaches, and never less than a kernel takes to start and drain. The host launches operations while the card computes,
and copies between the two overlap with both in part; hence for a step of N operations

    busy  = max(sum of the operations' seconds, N * launch_seconds)
    total = busy + max(0, copies - overlap * busy)

Every term falls, or stays, when any rate of the card rises.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lowvram.planner.cards import Card
from lowvram.planner.log import ATTENTION, CONVOLUTION, KINDS, MATMUL, MEMORY, Work

POWER_SHARE = 0.85  # of the board's limit, while the card computes: element-wise work does not reach it
HOST_PARAMETERS_PER_SECOND = 0.9e9  # of a fused AdamW on one of the host's threads: FSDP's offload steps there
IDLE_SHARE = 0.3  # and while it waits, clocks up, for the host


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What training reaches of a card's rates, by kind of operation.

    Shares are of the datasheet, or of what was measured. A product of large operands runs at its share of the
    arithmetic plus the time in which its operands are fetched again and again: `reuse` flops for each byte that the
    memory could deliver. So a card with much arithmetic for its bandwidth (H100, L4) reaches less of it.
    """

    memory: float = 0.75  # element-wise and reductions: strided, broadcast and small ones fall short of a copy
    half_matmul: float = 0.75  # large products alone; `reuse` brings this to about a half
    half_convolution: float = 0.6  # implicit products with borders and odd channel counts
    fp32: float = 0.65  # without tensor cores
    attention: float = 0.5  # the backward recomputes, and heads are narrow
    pcie: float = 0.85  # blocks of some MB, one after another
    matmul_reuse: float = 300.0  # flops a byte: tiles of 128 x 256
    convolution_reuse: float = 64.0  # weight gradients split their sums, and each tap reads anew
    fill_seconds: float = 4e-6  # a kernel's start and end, in which it does not fill the card
    launch_seconds: float = 8e-6  # the host's for an operation of eager PyTorch, autograd and the module included
    overlap: float = 0.7  # of the time that something else runs, copies can hide in
    tf32: bool = True  # fp32 convolutions run on tensor cores, at half the 16-bit rate: torch's default since sm_80


@dataclass(frozen=True, kw_only=True)
class Time:
    """gpu_seconds: of all operations. launch_seconds: the host's for them. pcie_seconds: of all copies.
    total_seconds: with what overlaps counted once."""

    gpu_seconds: float
    launch_seconds: float
    pcie_seconds: float
    total_seconds: float

    @property
    def busy(self) -> float:
        """The share of the time in which the card computes, in [0, 1]."""
        return min(1.0, self.gpu_seconds / self.total_seconds) if self.total_seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """A whole training: its speed, and how long and how much energy it takes."""

    images_per_second: float
    hours: float
    kwh: float


def default_rates(card: Card) -> Rates:
    """The rates to expect of a card, by its generation."""
    rates = Rates(tf32=card.capability >= (8, 0))
    if card.capability < (8, 0):  # no asynchronous copies into shared memory, no flash attention
        rates = replace(rates, half_convolution=0.5, half_matmul=0.6, attention=0.25, convolution_reuse=48.0)
        rates = replace(rates, matmul_reuse=200.0)
    elif card.capability >= (8, 9):  # a second-level cache of 24 to 72 MB holds what 3 to 6 MB did not
        rates = replace(rates, convolution_reuse=96.0)
    if card.measured:  # a measurement reaches so much of a datasheet: large tensors, one shape
        rates = replace(rates, memory=rates.memory / 0.9, fp32=rates.fp32 / 0.8)
        rates = replace(rates, half_matmul=rates.half_matmul / 0.8, attention=rates.attention / 0.8)
        if card.half_convolution_flops is not None:
            rates = replace(rates, half_convolution=1.0)  # of a good shape's rate; `reuse` sees to the others
        if card.launch_seconds is not None:
            rates = replace(rates, launch_seconds=1.5 * card.launch_seconds)  # modules and Python around each
    return rates


def operation_seconds(work: Work, card: Card, rates: Rates | None = None) -> NDArray[np.float64]:
    """The card's seconds for each operation, float64 [N]."""
    rates = default_rates(card) if rates is None else rates
    seconds_per_flop = np.zeros((2, len(KINDS)))  # [half, kind]
    for half in (False, True):
        for kind in (MATMUL, CONVOLUTION, ATTENTION, MEMORY):
            seconds_per_flop[int(half), kind] = _seconds_per_flop(kind, half, card, rates)
    arithmetic = work.flops * seconds_per_flop[work.half.astype(np.intp), work.kinds]
    traffic = work.bytes / (card.bandwidth_bytes_per_second * rates.memory)
    # work / (rate of a full card) + a constant is the rate that saturates with the size of the work.
    return np.maximum(arithmetic, traffic) + rates.fill_seconds


def _seconds_per_flop(kind: int, half: bool, card: Card, rates: Rates) -> float:
    if kind == MEMORY:
        return 1 / (card.fp32_flops * rates.fp32)  # arithmetic of its own counts little
    reuse = rates.convolution_reuse if kind == CONVOLUTION else rates.matmul_reuse
    if half:
        peak, share = card.half_flops, rates.attention if kind == ATTENTION else rates.half_matmul
        if kind == CONVOLUTION:
            peak, share = card.half_convolution_flops or card.half_flops, rates.half_convolution
        rate = peak * share
    else:
        rate = card.fp32_flops * rates.fp32
        if kind == CONVOLUTION and rates.tf32:
            half_peak = card.half_convolution_flops or card.half_flops
            rate = max(rate, half_peak / 2 * rates.half_convolution)
    return 1 / rate + 1 / (card.bandwidth_bytes_per_second * reuse)


def seconds(work: Work, card: Card, rates: Rates | None = None) -> Time:
    """The time of a piece of work on a card; rates: the card's usual ones by default. See the module for the model.

    The bytes of `work.host_bytes` go one after another: a link carries both ways at once, but training seldom does.
    """
    rates = default_rates(card) if rates is None else rates
    gpu = float(operation_seconds(work, card, rates).sum())
    launch = len(work) * rates.launch_seconds
    pcie = work.host_bytes / (card.pcie_bytes_per_second * rates.pcie)
    busy = max(gpu, launch)
    return Time(
        gpu_seconds=gpu,
        launch_seconds=launch,
        pcie_seconds=pcie,
        total_seconds=busy + max(0.0, pcie - rates.overlap * busy),
    )


def energy_joules(seconds: float, card: Card, *, busy: float = 1.0) -> float:
    """What the board draws in so many seconds: 85% of its power while it computes, 30% while it waits.

    busy: the share of the time in which it computes, as `Time.busy`. The rest of the machine is not counted.
    """
    return seconds * card.board_watts * (IDLE_SHARE + (POWER_SHARE - IDLE_SHARE) * busy)


def training(seconds_per_step: float, batch: int, kimg: float, card: Card, *, busy: float = 1.0) -> Training:
    """A training of `kimg` thousand images at `batch` images a step."""
    total_seconds = kimg * 1000 / batch * seconds_per_step
    return Training(
        images_per_second=batch / seconds_per_step,
        hours=total_seconds / 3600,
        kwh=energy_joules(total_seconds, card, busy=busy) / 3.6e6,
    )
