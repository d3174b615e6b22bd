"""The averaged network that samples are drawn from."""

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Follow a network's weights with a half-life counted in images (arXiv 1710.10196 section 4.1, 2006.06676 app. A).

    Args:
        source: the network in training.
        target: a network of the same shape, which holds the average. Buffers are copied, not averaged.
        half_life_kimg: thousands of images after which an old value counts half.
        rampup: early on the half-life is at most this fraction of the images seen; None: no ramp.
    """

    def __init__(self, source: nn.Module, target: nn.Module, *, half_life_kimg: float, rampup: float | None) -> None:
        self.source = source
        self.target = target
        self.half_life_kimg = half_life_kimg
        self.rampup = rampup

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Move the average towards the source, after a step of `batch` images that made `images_seen` of them."""
        half_life_images = self.half_life_kimg * 1000
        if self.rampup is not None:
            half_life_images = min(half_life_images, images_seen * self.rampup)
        beta = 0.5 ** (batch / max(half_life_images, 1e-8))
        averaged: list[Tensor] = list(self.target.parameters())
        current: list[Tensor] = list(self.source.parameters())
        torch._foreach_lerp_(averaged, current, 1 - beta)
        for kept, new in zip(self.target.buffers(), self.source.buffers(), strict=True):
            kept.copy_(new)
