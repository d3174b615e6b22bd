"""Sliced Wasserstein distance between patches of a Laplacian pyramid (PGGAN, arXiv 1710.10196, section 5).

It sees what a Frechet distance on pooled features does not: whether textures are right, scale by scale. The level at
16x16 speaks of the layout, the finest of pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram import seeded
from lowvram.errors import LowVRAMError

PATCH = 7
PATCHES_PER_IMAGE = 128
DIRECTIONS = 512
COARSEST = 16
# Directions sorted at a time, to bound the memory: 16 of 262,144 descriptors are 16 MB.
_DIRECTIONS_AT_ONCE = 16


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """float32 [B, C, H, W] -> levels from the finest on, each half as large, down to 16 pixels (Burt & Adelson 1983).

    Each but the last holds what its level adds to the next one's enlargement; the last is the small image itself.
    """
    levels = []
    while min(images.shape[-2:]) >= 2 * COARSEST:
        smaller = _blur(images)[..., ::2, ::2]
        levels.append(images - _enlarge(smaller))
        images = smaller
    return [*levels, images]


def _blur(x: Tensor, gain: float = 1.0) -> Tensor:
    """Each channel filtered by the binomial [1, 4, 6, 4, 1] in both directions."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    kernel = (torch.outer(taps, taps) * gain).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def _enlarge(x: Tensor) -> Tensor:
    """Twice the size: zeros between the pixels, then the filter with gain 4."""
    b, c, h, w = x.shape
    spread = x.new_zeros(b, c, 2 * h, 2 * w)
    spread[..., ::2, ::2] = x
    return _blur(spread, gain=4.0)


def patches(level: Tensor, seeds: Tensor, stream: str, count: int = PATCHES_PER_IMAGE) -> Tensor:
    """`count` random 7x7 patches of each image: [B, C, H, W] -> [B, count, C, 7, 7]. seeds: int64 [B]."""
    b, _, h, w = level.shape
    if min(h, w) < PATCH:
        raise LowVRAMError(f"patches of {PATCH}x{PATCH} don't fit images of {w}x{h}.", "Use images of 16x16 or more.")
    drawn = seeded.rand(seeds, 2, count, stream=stream)  # [B, 2, count], CPU
    top = (drawn[:, 0] * (h - PATCH + 1)).long()
    left = (drawn[:, 1] * (w - PATCH + 1)).long()
    offset = torch.arange(PATCH)
    rows = (top[:, :, None, None] + offset[:, None]).to(level.device)  # [B, count, 7, 1]
    columns = (left[:, :, None, None] + offset).to(level.device)  # [B, count, 1, 7]
    image = torch.arange(b, device=level.device)[:, None, None, None]
    return level[image, :, rows, columns].permute(0, 1, 4, 2, 3)  # from [B, count, 7, 7, C]


class PatchDescriptors:
    """Descriptors of up to `limit` images, taken in batch by batch, in half precision: 38 KB an image and level.

    Where the patches lie depends on an image's place in the stream alone. 2,048 images of 256x256 take 0.4 GB.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._levels: dict[int, list[Tensor]] = {}  # resolution -> batches [B, patches, C, 7, 7]

    def update(self, images: Tensor) -> None:
        """Take in uint8 images [B, C, H, W], as far as there is room."""
        images = images[: self.limit - self.count]
        if not len(images):
            return
        seeds = torch.arange(self.count, self.count + len(images))
        self.count += len(images)
        for level in laplacian_pyramid(images.float()):
            resolution = level.shape[-1]
            taken = patches(level, seeds, stream=f"patches.{resolution}").half()
            self._levels.setdefault(resolution, []).append(taken)

    def levels(self) -> dict[int, Tensor]:
        """By resolution, the finest first: half precision [images, patches, C, 7, 7]."""
        self._levels = {resolution: [torch.cat(batches)] for resolution, batches in self._levels.items()}
        return {resolution: batches[0] for resolution, batches in self._levels.items()}


def sliced_wasserstein(a: Tensor, b: Tensor, *, seed: int = 0, directions: int = DIRECTIONS) -> float:
    """Mean over random directions of the 1-D Wasserstein distance, times 1000.

    a, b: descriptors [images, patches, C, 7, 7]. Each set is normalised to mean 0 and variance 1 by channel, as in the
    paper. Sets of unequal size are cut to the smaller one's number of images.
    """
    images = min(len(a), len(b))
    if not images:
        raise LowVRAMError("a sliced Wasserstein distance of 0 images can't be taken.", "Use n=2 or more.")
    flat_a, flat_b = (_normalised(x[:images]) for x in (a, b))  # [D, 49 C]
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(flat_a.shape[1], directions, generator=generator)
    axes /= axes.norm(dim=0)
    total = 0.0
    for some in axes.split(_DIRECTIONS_AT_ONCE, dim=1):
        # numpy's sort uses vector instructions: 15 times as fast as torch's, which also orders the indices.
        sorted_a, sorted_b = (np.sort((some.T @ x.T).numpy(), axis=1) for x in (flat_a, flat_b))  # [some, D]
        total += float(np.abs(sorted_a - sorted_b).mean(axis=1, dtype=np.float64).sum())
    return total / directions * 1000


def _normalised(descriptors: Tensor) -> Tensor:
    """[images, patches, C, 7, 7] -> float32 [images * patches, C * 49], mean 0 and variance 1 by channel."""
    x = descriptors.flatten(0, 1).float()
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    # A channel that is the same everywhere (an all-grey level) has nothing to scale.
    return ((x - mean) / variance.sqrt().clamp(min=1e-6)).flatten(1)
