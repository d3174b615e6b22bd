"""Rounding to bf16 that is right on average, so that small updates are not lost where no fp32 copy is kept."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # bounds the temporaries: 4 bytes of random bits and two copies, 48 MiB


@torch.no_grad()
def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Write `source` into `target`, each element to one of its two bf16 neighbours, so that the mean is exact.

    A bf16 number is the upper half of an fp32 number. Adding 16 random bits to the lower half and cutting it off
    carries into the upper half with a probability that is the lower half's share of the gap.

    target: bfloat16; source: float32 of the same shape and device. NaN and infinities are kept; finite values stay
    finite. generator: on their device.

    Returns:
        target
    """
    if target.dtype != torch.bfloat16 or source.dtype != torch.float32 or target.shape != source.shape:
        raise ValueError(
            f"{source.dtype} {list(source.shape)} can't be rounded into {target.dtype} {list(target.shape)}"
        )
    if target.is_contiguous() and source.is_contiguous():
        targets, sources = target.view(-1).split(_CHUNK_ELEMENTS), source.view(-1).split(_CHUNK_ELEMENTS)
    else:
        targets, sources = (target,), (source,)
    for into, values in zip(targets, sources, strict=True):
        bits = torch.empty_like(values, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
        bits.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
        largest = torch.finfo(torch.bfloat16).max  # fp32 reaches a little higher
        rounded = bits.view(torch.float32).clamp_(-largest, largest)
        into.copy_(torch.where(values.isfinite(), rounded, values))  # random bits would turn infinity into NaN
    return target
