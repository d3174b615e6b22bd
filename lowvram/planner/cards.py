"""Graphics cards: what their makers promise, and what the one at hand really does.

Datasheet figures are upper bounds; `lowvram.planner.cost` knows what share of them training reaches.
"""

import math
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.kernels import dispatch
from lowvram.memory.guard import in_gb
from lowvram.settings import nearest

GIB = 2**30
DISPLAY_BYTES = 300 * 2**20  # what a desktop and the driver keep of a GeForce card
_TRITON_SUPPORTS = (8, 0)  # compute capability, by its makers' word; on 7.5 training tries it on the card


@dataclass(frozen=True, kw_only=True)
class Card:
    """A graphics card.

    vram_bytes: as on the box, or as the driver reports it where measured. half_flops: matrix products of 16-bit
    operands summed in fp32, per second. pcie_bytes_per_second: pinned memory, one way. capability: CUDA's. bf16: in
    hardware. measured: the rates were timed on the card, and are no datasheet's; then half_convolution_flops and
    launch_seconds (the host's time for one operation, forward or backward) are known too.
    """

    name: str
    vram_bytes: int
    bandwidth_bytes_per_second: float
    fp32_flops: float
    half_flops: float
    pcie_bytes_per_second: float
    board_watts: float
    capability: tuple[int, int]
    bf16: bool
    measured: bool = False
    half_convolution_flops: float | None = None
    launch_seconds: float | None = None

    @property
    def consumer(self) -> bool:
        """A GeForce card, which mostly drives a display as well."""
        return re.match(r"(GeForce )?(RTX|GTX) \d", self.name) is not None


# In practice, from pinned memory, each way.
_PCIE_BYTES_PER_SECOND = {"3x16": 12e9, "4x8": 12e9, "4x16": 24e9, "5x8": 24e9, "5x16": 50e9}


def _card(
    name: str, vram_gib: float, gb_per_second: float, fp32: float, half: float, pcie: str, watts: int, capability: str
) -> Card:
    """A row as datasheets have it: rates in TFLOP/s, GB/s of 10^9 bytes."""
    major, minor = map(int, capability.split("."))
    return Card(
        name=name,
        vram_bytes=int(vram_gib * GIB),
        bandwidth_bytes_per_second=gb_per_second * 1e9,
        fp32_flops=fp32 * 1e12,
        half_flops=half * 1e12,
        pcie_bytes_per_second=_PCIE_BYTES_PER_SECOND[pcie],
        board_watts=float(watts),
        capability=(major, minor),
        bf16=major >= 8,
    )


CARDS: tuple[Card, ...] = (
    _card("GTX 1660 Super", 6, 336, 5.0, 10, "3x16", 125, "7.5"),  # no tensor cores
    _card("RTX 2060", 6, 336, 6.5, 25.8, "3x16", 160, "7.5"),
    _card("RTX 3050", 8, 224, 9.1, 18.2, "4x8", 130, "8.6"),
    _card("RTX 3060", 12, 360, 12.7, 25.5, "4x16", 170, "8.6"),
    _card("RTX 3060 Ti", 8, 448, 16.2, 32.4, "4x16", 200, "8.6"),
    _card("RTX 3070", 8, 448, 20.3, 40.6, "4x16", 220, "8.6"),
    _card("RTX 3090", 24, 936, 35.6, 71, "4x16", 350, "8.6"),
    _card("RTX 4060", 8, 272, 15.1, 30.2, "4x8", 115, "8.9"),
    _card("RTX 4060 Ti 8GB", 8, 288, 22.1, 44.1, "4x8", 160, "8.9"),
    _card("RTX 4060 Ti 16GB", 16, 288, 22.1, 44.1, "4x8", 160, "8.9"),
    _card("RTX 4070", 12, 504, 29.1, 58.3, "4x16", 200, "8.9"),
    _card("RTX 4090", 24, 1008, 82.6, 165, "4x16", 450, "8.9"),
    _card("RTX 5060", 8, 448, 19.2, 38, "5x8", 145, "12.0"),
    _card("T4", 16, 320, 8.1, 65, "3x16", 70, "7.5"),
    _card("L4", 24, 300, 30.3, 121, "4x16", 72, "8.9"),
    _card("A10", 24, 600, 31.2, 125, "4x16", 150, "8.6"),
    _card("A100 40GB", 40, 1555, 19.5, 312, "4x16", 400, "8.0"),
    _card("A100 80GB", 80, 2039, 19.5, 312, "4x16", 400, "8.0"),
    _card("H100", 80, 3350, 67, 989, "5x16", 700, "9.0"),
    _card("H200", 141e9 / GIB, 4800, 67, 989, "5x16", 700, "9.0"),  # 141 GB of 10^9
)

# The commonest card of each size in people's machines; of two about as common the slower, so as not to promise much.
_COMMONEST = ("RTX 2060", "RTX 4060", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 3090", "A100 40GB", "A100 80GB", "H200")


def _key(name: str) -> str:
    """What distinguishes a card in a name however written: "NVIDIA GeForce RTX 3060" and "rtx3060" are "3060"."""
    bare = name.lower().replace("-", " ")
    bare = re.sub(r"nvidia|geforce|tesla|rtx|gtx|gpu|hbm\d*e?|sxm\d*", " ", bare)
    bare = re.sub(r"(?<=\d) ?(gib|g)\b", "gb", bare)
    bare = re.sub(r"(?<=a100) pcie\b", " ", bare)  # another board with the same chip and memory; H100's differs
    return re.sub(r"[^a-z0-9]", "", bare)


def _box_gb(card: Card) -> int:
    """The memory as the box has it, in whole GB."""
    return card.vram_bytes // GIB if card.vram_bytes % GIB == 0 else round(card.vram_bytes / 1e9)


def _names() -> dict[str, Card]:
    """Every card by what it may be called: with its memory, and without; of two sizes the smaller then."""
    known: dict[str, Card] = {}
    for card in sorted(CARDS, key=lambda card: card.vram_bytes):
        bare = re.sub(r" \d+GB$", "", card.name)
        for name in (bare, f"{bare} {_box_gb(card)}GB"):
            known.setdefault(_key(name), card)
    return known


def find(name: str) -> Card:
    """The card of a name: case, spaces, the maker, "GeForce", "RTX" and "-SXM4" don't matter.

    The memory may follow ("RTX 4060 Ti 16GB"); without it the smaller is taken. Laptop, Super and other versions are
    cards of their own, and known only where the table has them.

    Raises:
        LowVRAMError: it is not in the table.
    """
    card = _names().get(_key(name))
    if card is None:
        shown = " ".join(name.split())[:60]
        raise LowVRAMError(
            f"card={shown} is not known.",
            nearest(_close_to(shown), [card.name for card in CARDS]) + " A card that is there needs no name.",
        )
    return card


def _close_to(name: str) -> str:
    """The name as the table writes names, so that spelling alone makes no difference."""
    upper = re.sub(r"\b(NVIDIA|GEFORCE|TESLA|GPU)\b", " ", name.upper().replace("-", " "))
    upper = re.sub(r"(RTX|GTX)(?=\d)", r"\1 ", upper).replace(" TI", " Ti").replace("SUPER", "Super")
    spaced = " ".join(upper.split())
    return f"RTX {spaced}" if re.match(r"\d{4}", spaced) else spaced


def usable_bytes(card: Card) -> int:
    """Bytes of the card that a process may fill, its context included; a measured card's own figure lacks the rest.

    A display takes its part of a GeForce card, error correction a part of the GDDR memory of T4, L4 and A10, and the
    firmware a little of the others.
    """
    if card.consumer:
        return card.vram_bytes - DISPLAY_BYTES
    if card.measured:
        return card.vram_bytes
    gddr = card.bandwidth_bytes_per_second < 1e12
    return card.vram_bytes - card.vram_bytes // (
        12 if gddr else 64
    )  # drivers report 14.7 of 16, 22.1 of 24; 79.1 of 80


def smallest(needed_bytes: int) -> Card | None:
    """The smallest card of the table that holds so many bytes, context included; None: none does.

    A GeForce card if there is one; of several the one of the least power.
    """
    fitting = [card for card in CARDS if usable_bytes(card) >= needed_bytes]
    return min(fitting, key=lambda card: (not card.consumer, card.vram_bytes, card.board_watts), default=None)


def for_budget(vram_bytes: int) -> Card:
    """The card to time a plan on where none is named and none is there: the commonest with that much memory.

    A size between two is taken to be the larger with something else running: 5.5 GB are a card of 6.

    Raises:
        LowVRAMError: no card has as much.
    """
    for name in _COMMONEST:
        card = find(name)
        if vram_bytes <= card.vram_bytes:
            return card
    raise LowVRAMError(
        f"vram={in_gb(vram_bytes)} is more than any known card has.",
        f"The largest is {card.name} with {in_gb(card.vram_bytes)}.",
    )


# The card at hand.

_WAKE_SECONDS = 0.2  # an idle card's clocks are low, and take so long to rise
_SECONDS_EACH = 0.1  # for the runs of one measurement, of six
_LEAST_RUNS, _MOST_RUNS = 3, 30


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How large the measured operations are: enough to fill a device, within 256 MiB, caches exceeded by the copy."""

    copy_bytes: int
    matmul: int
    fp32_matmul: int
    convolution: tuple[int, int, int]  # images, channels, height = width
    host_bytes: int


_GPU = _Sizes(copy_bytes=96 * 2**20, matmul=4096, fp32_matmul=2048, convolution=(8, 256, 64), host_bytes=32 * 2**20)
_CPU = _Sizes(copy_bytes=32 * 2**20, matmul=256, fp32_matmul=512, convolution=(1, 32, 32), host_bytes=8 * 2**20)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates of a device: a copy within it counts its reads and its writes, one to it its bytes once."""

    bandwidth_bytes_per_second: float
    half_flops: float
    half_convolution_flops: float
    fp32_flops: float
    pcie_bytes_per_second: float
    launch_seconds: float


def present(device: torch.device) -> Card:
    """The card of this machine, measured in under two seconds and 256 MiB, which are given back.

    The name is the table's where it has the card, else the driver's; the power is then that of the most similar card.

    Raises:
        LowVRAMError: the device is no CUDA device, or there is none, or other programs fill it.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise LowVRAMError(f"device={device} is no graphics card to measure.", "Name one, such as card=RTX 3060.")
    properties = torch.cuda.get_device_properties(device)
    try:
        found = measure(device)
    except torch.OutOfMemoryError as error:
        raise LowVRAMError(
            f"{properties.name} has no 256MB free, which measuring its speed takes.",
            "Close other programs that use the GPU.",
        ) from error
    known = _in_table(properties.name, properties.total_memory)
    name = known.name if known else re.sub(r"^NVIDIA (GeForce )?| GPU$", "", properties.name)
    card = Card(
        name=name,
        vram_bytes=properties.total_memory,
        bandwidth_bytes_per_second=found.bandwidth_bytes_per_second,
        fp32_flops=found.fp32_flops,
        half_flops=found.half_flops,
        pcie_bytes_per_second=found.pcie_bytes_per_second,
        board_watts=0.0,
        capability=(properties.major, properties.minor),
        bf16=properties.major >= 8,
        measured=True,
        half_convolution_flops=found.half_convolution_flops,
        launch_seconds=found.launch_seconds,
    )
    return replace(card, board_watts=(known or _most_similar(card)).board_watts)


def runs_triton(card: Card, kernels: str = "auto") -> bool:
    """Whether training on the card takes Triton's kernels. kernels: the recipe's setting.

    Of a card that is not here, below what Triton supports, the answer is no: PyTorch's kernels need a little more.
    """
    if kernels != "auto":
        return kernels == "triton"
    if card.measured and torch.cuda.is_available():
        return dispatch.works_on(torch.cuda.current_device())
    return card.capability >= _TRITON_SUPPORTS


def _in_table(name: str, total_bytes: int) -> Card | None:
    """The table's card of a driver's name; of two sizes, and only if, the one that the memory agrees with."""
    for size in ("", *(f" {_box_gb(card)}GB" for card in CARDS)):
        with suppress(LowVRAMError):
            card = find(name + size)
            if 0.85 * card.vram_bytes <= total_bytes <= 1.1 * card.vram_bytes:
                return card
    return None


def _most_similar(card: Card) -> Card:
    """The table's card nearest in speed, kind first: laptop and unlisted cards draw about as much."""

    def distance(other: Card) -> float:
        rates = (
            (card.bandwidth_bytes_per_second / 0.9, other.bandwidth_bytes_per_second),  # measured against promised
            (card.half_flops / 0.8, other.half_flops),
        )
        return sum(abs(math.log(ours / theirs)) for ours, theirs in rates) + (card.capability != other.capability)

    return min(CARDS, key=distance)


@torch.no_grad()
def measure(device: torch.device) -> Measured:
    """Time a device's copies, products and launches. On a CPU the same with smaller tensors.

    Medians of runs after a warm-up, a second in all beside what the libraries take to load; everything allocated
    is freed. TF32 is off for the fp32 rate.
    """
    sizes = _GPU if device.type == "cuda" else _CPU
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    try:
        if device.type == "cuda":
            _wake(sizes.matmul, half, device)
        return Measured(
            bandwidth_bytes_per_second=_copy_rate(sizes.copy_bytes, device),
            half_flops=_matmul_rate(sizes.matmul, half, device),
            half_convolution_flops=_convolution_rate(*sizes.convolution, half, device),
            fp32_flops=_fp32_rate(sizes.fp32_matmul, device),
            pcie_bytes_per_second=_host_rate(sizes.host_bytes, device),
            launch_seconds=_launch_seconds(device),
        )
    finally:
        if device.type == "cuda":
            _give_back()


def _wake(size: int, dtype: torch.dtype, device: torch.device) -> None:
    a = torch.ones(size, size, device=device, dtype=dtype)
    stop = time.perf_counter() + _WAKE_SECONDS
    while time.perf_counter() < stop:
        torch.mm(a, a)
        torch.cuda.synchronize(device)


def _noise(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random, for zeros run cooler and so faster; of its own generator, so that a training's numbers stay."""
    return torch.randn(*shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))


def _copy_rate(size_bytes: int, device: torch.device) -> float:
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / _median_seconds(lambda: target.copy_(source), device)


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a = _noise(size, size, dtype=dtype, device=device)
    b, out = a.t().contiguous(), torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)


def _fp32_rate(size: int, device: torch.device) -> float:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        return _matmul_rate(size, torch.float32, device)
    finally:
        matmul.fp32_precision = before


def _convolution_rate(images: int, channels: int, side: int, dtype: torch.dtype, device: torch.device) -> float:
    x = _noise(images, channels, side, side, dtype=dtype, device=device)
    weight = _noise(channels, channels, 3, 3, dtype=dtype, device=device)
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    flops = 2 * 9 * images * channels**2 * side**2
    return flops / _median_seconds(lambda: F.conv2d(x, weight, padding=1), device)


def _host_rate(size_bytes: int, device: torch.device) -> float:
    """The slower of the two ways."""
    there = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    here = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    ways = (lambda: there.copy_(here, non_blocking=True), lambda: here.copy_(there, non_blocking=True))
    return size_bytes / max(_median_seconds(way, device, _SECONDS_EACH / 2) for way in ways)


def _launch_seconds(device: torch.device, depth: int = 40) -> float:
    """The host's time for an operation under autograd: `depth` forward, and two for each in the backward."""
    x = torch.ones(1, device=device, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(depth):
            y = torch.sin(y)
        torch.autograd.grad(y, x)

    with torch.enable_grad():
        times = _times(run, device, _SECONDS_EACH, by_host=True)
    return statistics.median(times) / (3 * depth)


def _median_seconds(run: Callable[[], Tensor], device: torch.device, limit_seconds: float = _SECONDS_EACH) -> float:
    return max(statistics.median(_times(run, device, limit_seconds)), 1e-9)


def _times(
    run: Callable[[], Tensor | None], device: torch.device, limit_seconds: float, *, by_host: bool = False
) -> list[float]:
    """Seconds of each run, after one that is not counted: at least 3, and at most 30 or the limit.

    by_host: what the host takes, which does not wait for the device; else what the device takes.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    by_events = device.type == "cuda" and not by_host
    run()
    wait(device)
    times: list[float] = []
    stop = time.perf_counter() + limit_seconds
    while len(times) < _LEAST_RUNS or (len(times) < _MOST_RUNS and time.perf_counter() < stop):
        if by_events:
            with torch.cuda.device(device):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
            wait(device)
    return times


def _give_back() -> None:
    """Free what the measurement left in torch's caches: segments, pinned memory, cuBLAS workspaces."""
    for name in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):
        with suppress(AttributeError, RuntimeError):
            getattr(torch._C, name)()
    torch.cuda.empty_cache()
