"""Random numbers that belong to a sample, not to the batch around it.

A training step must not change when its batch is cut into micro-batches, spread over processes or recomputed under
checkpointing. So each random number is a function of a sample's seed and the name of the stream it is drawn from.
"""

import zlib
from typing import Any

import torch
from torch import Tensor

from lowvram import standin

_MASK64 = 2**64 - 1


def mix(*numbers: int) -> int:
    """Hash integers into one well-spread 63-bit seed (the finaliser of SplitMix64, Steele et al. 2014, section 3)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def randn(
    seeds: Tensor | None, *shape: int, stream: str, device: torch.device | str = "cpu", batch: int | None = None
) -> Tensor:
    """Normal numbers, float32 [B, *shape]. Row i depends on `seeds[i]` and `stream` alone.

    seeds: int64 [B] on the CPU, or None to draw `batch` rows from torch's default generator.
    The numbers are the same on every run on the same kind of device (a CPU and a GPU draw different ones).
    """
    return _draw("normal_", (), torch.float32, seeds, shape, stream, device, batch)


def rand(
    seeds: Tensor | None, *shape: int, stream: str, device: torch.device | str = "cpu", batch: int | None = None
) -> Tensor:
    """Uniform numbers in [0, 1), float32 [B, *shape]; otherwise as `randn`."""
    return _draw("uniform_", (), torch.float32, seeds, shape, stream, device, batch)


def bernoulli(
    seeds: Tensor | None,
    p: float,
    *shape: int,
    stream: str,
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> Tensor:
    """True with probability p, bool [B, *shape]; otherwise as `randn`."""
    return _draw("bernoulli_", (p,), torch.bool, seeds, shape, stream, device, batch)


def _draw(
    method: str,
    arguments: tuple[Any, ...],
    dtype: torch.dtype,
    seeds: Tensor | None,
    shape: tuple[int, ...],
    stream: str,
    device: torch.device | str,
    batch: int | None,
) -> Tensor:
    if seeds is None:
        if batch is None:
            raise ValueError("give seeds, or the number of rows as batch")
        return getattr(torch.empty(batch, *shape, dtype=dtype, device=device), method)(*arguments)
    out = torch.empty(len(seeds), *shape, dtype=dtype, device=device)
    if standin.active():
        return out
    generator = torch.Generator(device=device)
    stream_id = zlib.crc32(stream.encode())
    for row, seed in zip(out, seeds.tolist(), strict=True):
        getattr(row, method)(*arguments, generator=generator.manual_seed(mix(seed, stream_id)))
    return out
