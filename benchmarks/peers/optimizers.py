"""AdamW with 8-bit state over a whole network: ours beside torch's, bitsandbytes' and torchao's.

All step the same fp32 parameters, by the same gradients, in turn; the time is that of an idle device to an idle device,
for a network has hundreds of tensors, and the host may be what a step waits for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import record, timing
from benchmarks.peers.side import said
from benchmarks.timing import Clock

_SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
OURS = "ours 8-bit"
BITSANDBYTES = "bitsandbytes 8-bit"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network's parameters. network: makes it; it is built without memory, for its shapes."""

    name: str
    recipe: str
    network: Callable[[], nn.Module]

    def parameters(self, device: torch.device) -> list[nn.Parameter]:
        """Random parameters of its shapes, with gradients."""
        with torch.device("meta"):
            shapes = [p.shape for p in self.network().parameters()]
        generator = torch.Generator(device).manual_seed(0)

        def random(shape: torch.Size) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        found = [nn.Parameter(random(shape)) for shape in shapes]
        for parameter in found:
            parameter.grad = random(parameter.shape) * 1e-3
        return found


@dataclass(kw_only=True)
class Measured:
    """One optimizer. state_bytes: what it keeps; peak_bytes: what a step takes beside that, at most."""

    seconds: list[float] = field(default_factory=list)
    state_bytes: int | None = None
    peak_bytes: int | None = None
    error: str | None = None


def _unet(channels: tuple[int, ...], attention: tuple[bool, ...]) -> nn.Module:
    from lowvram.models.unet import UNet

    down = ["AttnDownBlock2D" if one else "DownBlock2D" for one in attention]
    return UNet(
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        attention_head_dim=64,
        cross_attention_dim=None,
        norm_num_groups=min(32, channels[0]),
    )


def _generator() -> nn.Module:
    from lowvram.models.stylegan2 import Generator

    return Generator(256, channel_base=16384)


WHOLE = (
    Workload(
        name="UNet",
        recipe="faces256_ldm",
        network=lambda: _unet((128, 256, 384, 512), (False, True, True, True)),
    ),
    Workload(name="generator", recipe="faces256", network=_generator),
)
SMALL = (Workload(name="small UNet", recipe="faces64_ldm", network=lambda: _unet((64, 128), (False, True))),)


def makers(parameters: list[nn.Parameter]) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    """What makes each optimizer, by name; what it imports may not be there."""

    def ours() -> torch.optim.Optimizer:
        from lowvram.memory import optimizers

        return optimizers.build("adam8bit", parameters, like=torch.optim.AdamW(parameters, **_SETTINGS))

    def bitsandbytes() -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **_SETTINGS)

    def torchao() -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found,unused-ignore]

        return AdamW8bit(parameters, **_SETTINGS)

    return {
        OURS: ours,
        BITSANDBYTES: bitsandbytes,
        "torchao 8-bit": torchao,
        "torch fused": lambda: torch.optim.AdamW(parameters, fused=True, **_SETTINGS),
        "torch foreach": lambda: torch.optim.AdamW(parameters, foreach=True, **_SETTINGS),
    }


def measure(workload: Workload, device: torch.device, *, budget_seconds: float) -> dict[str, Measured]:
    """Every optimizer whose package is installed; one that fails has its error in place of figures."""
    parameters = workload.parameters(device)
    clock = Clock(device)
    found: dict[str, Measured] = {}
    steps: dict[str, Callable[[], tuple[float]]] = {}
    for name, make in makers(parameters).items():
        one = Measured()
        try:
            optimizer = make()
            optimizer.step()  # makes the state
            one.state_bytes = sum(
                x.nbytes for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)
            )
            held = [parameters, [p.grad for p in parameters], list(optimizer.state.values())]
            one.peak_bytes = timing.peak_bytes(optimizer.step, device, held=held)
            steps[name] = lambda optimizer=optimizer: (clock.wall_seconds(optimizer.step),)  # type: ignore[misc]
        except ImportError as error:
            print(f"  {name}: left out: {error}", flush=True)
            continue
        except Exception as error:  # others' libraries fail in their own ways
            one.error = said(error)
        found[name] = one
    for name, parts in timing.in_turn(steps, budget_seconds=budget_seconds).items():
        found[name].seconds = parts[0]
    return found


def points(benchmark: str, workload: Workload, found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """A point for each."""
    return [
        record.point(
            benchmark,
            f"adamw8bit {workload.name}: {name}",
            recipe=workload.recipe,
            seconds_per_step=record.spread(one.seconds) if one.seconds else None,
            allocated_bytes=one.peak_bytes,
            error=one.error,
            details={"kernel": "adamw8bit", "implementation": name, "state_bytes": one.state_bytes},
        )
        for name, one in found.items()
    ]


def table(workload: Workload, found: Mapping[str, Measured]) -> str:
    """For people. MB are 10^6 bytes; temporary is what a step takes beside weights, gradients and state."""
    with torch.device("meta"):
        parameters = list(workload.network().parameters())
    count = sum(p.numel() for p in parameters)
    lines = [
        f"AdamW over {workload.name} ({workload.recipe}): {count / 1e6:.1f} M parameters in {len(parameters)} tensors"
    ]
    lines.append(f"  {'':<20}{'a step':>12}{'state':>12}{'temporary':>12}")
    for name, one in found.items():
        if one.error:
            lines.append(f"  {name:<20}  {one.error}")
            continue
        row = f"  {name:<20}{median(one.seconds) * 1e3:>9.2f} ms"
        lines.append(row + "".join(f"{(size or 0) / 1e6:>9.1f} MB" for size in (one.state_bytes, one.peak_bytes)))
    ours = found.get(OURS)
    for name, one in found.items():
        if ours and ours.seconds and one.seconds and name != OURS:
            lines.append(f"  {OURS} is {median(one.seconds) / median(ours.seconds):.2f} times as fast as {name}")
    return "\n".join(lines)
