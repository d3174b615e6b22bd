"""What a training runs on, as its receipt names it; the meter of its energy, and its account."""

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram import __version__
from lowvram.errors import LowVRAMError
from lowvram.receipt.account import Account, Sum, session
from lowvram.receipt.energy import EnergyMeter, of_card, of_processor
from lowvram.receipt.rates import Rates

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lowvram.settings import Settings

_UNKNOWN_WATTS = 200.0  # of a card that is in no table: between the 170 W of an RTX 3060 and the 250 W of a V100
_CPUINFO = Path("/proc/cpuinfo")


def open_account(
    settings: "Settings",
    device: "torch.device",
    accelerator: "Accelerator",
    *,
    say: Callable[[str], None],
    total: Sum,
) -> Account:
    """The account of a process' training. accelerator: of those that train together. say, total: see `Account`."""
    import torch

    machine, meter = machine_and_meter(device, counts_machine=accelerator.is_local_main_process)
    begun = session(
        contributor=settings.contributor,
        machine=machine,
        cards=accelerator.num_processes,
        rates=Rates.of(settings.price, settings.electricity, settings.carbon),
        version=__version__,
        torch=str(torch.__version__),
        vram=settings.vram,
    )
    shows_money = settings.price is not None or settings.electricity is not None
    return Account(begun, meter, say=say, total=total, is_main=accelerator.is_main_process, shows_money=shows_money)


def machine_and_meter(device: "torch.device", *, counts_machine: bool) -> tuple[str, EnergyMeter]:
    """A name and a meter of the device. counts_machine: as for `of_processor`; each card has a process of its own.

    Of a slice of a card (MIG) the estimate is that of the whole; of Apple's GPU the processor's part alone is known.
    """
    if device.type != "cuda":
        return processor_name(), of_processor(counts_machine=counts_machine)
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    watts = partial(board_watts, properties.name)
    return properties.name, of_card(device.index or 0, None if uuid is None else str(uuid), watts)


def board_watts(name: str) -> float:
    """What a card draws while it trains, from its board's power, where NVML tells nothing. name: the driver's."""
    from lowvram.planner import cards, cost

    try:
        return cost.energy_joules(1.0, cards.find(name))
    except LowVRAMError:
        return _UNKNOWN_WATTS


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's, as the system calls it."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "processor"
