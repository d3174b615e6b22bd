"""The projected discriminator (Sauer et al. 2021, arXiv 2111.01007): random projections of features, and small heads.

Images go through a frozen network trained on ImageNet; its features at four scales are mixed across channels and across
scales by random convolutions that never change, and a head at each scale judges them (section 3.2). Only the heads are
trained. On a GPU the backward of resizing adds in any order (`F.interpolate`): runs agree there up to reordering.

Such features tell little of colours, and normalised heads little of how much images differ: all may come out with one
skin and one shirt. A fifth map can be the image itself, small, with its spread over a group of samples beside it, as in
the minibatch standard deviation of arXiv 1710.10196 (section 3), for a head that is not normalised; that is ours, not
the paper's.
Legend: B batch, w width of a map, h and w its sides.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.kernels.derivatives import first_order_only
from lowvram.models.backbones import Backbone

_COARSEST = 4  # pixels a side of the maps that logits are taken from, about
_GRADIENT_SCALE = 4096.0


class Projection(nn.Module):
    """Features of a frozen network, mixed across channels (1x1) and scales (3x3, from coarse to fine), at random.

    Args:
        backbone: of the features. It is not part of this module's state.
        channels: of the finest map; each coarser one has twice as many.
        size: pixels a side that images are resized to before the backbone (bilinear).
        half_dtype: of the backbone and the projections; None: fp32. In fp16 gradients are 4096 times larger on their
            way through, for those of an image's pixels would vanish.
        pixels: a side of the fifth map; 0: there is none. It halves the images' own size once or more, or is it.
        group: samples whose spread is looked at there, as in `GroupedBatchNorm`; 0: none.

    widths, sizes: channels and pixels a side of the maps.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        channels: int = 64,
        size: int = 224,
        half_dtype: torch.dtype | None = None,
        pixels: int = 0,
        group: int = 0,
    ) -> None:
        super().__init__()
        if channels < 8:
            raise LowVRAMError(f"projection of {channels} channels is too narrow.", "Use 64.")
        if size < 32 or size % 32:
            raise LowVRAMError(f"images of {size} pixels don't fit a backbone.", "Use a multiple of 32, such as 96.")
        self._backbone = (backbone,)  # in a tuple, so that neither its weights nor its mode are this module's
        self.size, self.dtype, self.pixels, self.group = size, half_dtype or torch.float32, pixels, group
        widths = tuple(channels * 2**i for i in range(len(backbone.channels)))
        sizes = tuple(size // 2 ** (i + 2) for i in range(len(widths)))
        self.widths, self.sizes = (*widths, *[channels] * bool(pixels)), (*sizes, *[pixels] * bool(pixels))
        self.across_channels = nn.ModuleList(
            _random_conv(own, wide, 1) for own, wide in zip(backbone.channels, widths, strict=True)
        )
        self.coarser = nn.ModuleList(_random_conv(wide, fine, 1) for fine, wide in itertools.pairwise(widths))
        self.across_scales = nn.ModuleList(_random_conv(wide, wide, 3) for wide in widths[:-1])
        self.to(self.dtype)
        self.of_pixels = _random_conv(6 if group else 3, channels, 1) if pixels else None
        self.requires_grad_(False)
        backbone.to(self.dtype)

    @property
    def backbone(self) -> Backbone:
        """The frozen network."""
        return self._backbone[0]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> four maps, or five, float32 [B, widths[i], sizes[i], sizes[i]].

        The fifth is last; with a group, B must be a multiple of it.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        small = [] if self.of_pixels is None else [self.of_pixels(self._small(images))]
        if images.shape[-1] != self.size:
            shrinks = images.shape[-1] > self.size
            images = F.interpolate(
                images, (self.size, self.size), mode="bilinear", align_corners=False, antialias=shrinks
            )
        scale = _GRADIENT_SCALE if self.dtype == torch.float16 else 1.0
        features = self.backbone(_ScaledGradient.apply(images, 1 / scale).to(self.dtype))
        mixed = [self.across_channels[-1](features[-1])]
        for i in reversed(range(len(features) - 1)):
            own = self.across_channels[i](features[i])
            above = F.interpolate(self.coarser[i](mixed[0]), own.shape[2:], mode="bilinear", align_corners=False)
            mixed.insert(0, self.across_scales[i]((own + above) * math.sqrt(0.5)))
        return [*(_ScaledGradient.apply(x.float(), scale) for x in mixed), *small]

    def _small(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] shrunk to `pixels` a side, with the group's standard deviation beside them."""
        small = F.avg_pool2d(images, images.shape[-1] // self.pixels)
        if not self.group:
            return small
        grouped = in_groups(small, self.group)
        spread = (grouped.var(0, correction=0) + 1e-4).sqrt().expand_as(grouped).flatten(0, 1)
        return torch.cat([small, 2 * spread], dim=1)


class _ScaledGradient(torch.autograd.Function):
    """The same, with another scale of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * ctx.scale, None


class ProjectedDiscriminator(nn.Module):
    """Heads that judge the maps of a `Projection`, one at each scale.

    Args:
        widths, sizes: channels and pixels a side of the maps.
        channels: the widest a head becomes.
        group: samples that are normalised together, see `GroupedBatchNorm`; 0: no normalisation.
        c_dim: classes; 0: none. They are judged by a product with an embedding (arXiv 1802.05637).
        of_features: how many of the maps are a backbone's. Heads of those behind them, of pixels, are not normalised:
            that would take away how bright a group is and how much it differs.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        sizes: tuple[int, ...],
        *,
        channels: int = 512,
        group: int = 0,
        c_dim: int = 0,
        of_features: int = 4,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            Head(width, size, channels=channels, group=group if i < of_features else 0, c_dim=c_dim)
            for i, (width, size) in enumerate(zip(widths, sizes, strict=True))
        )

    def forward(self, maps: list[Tensor], c: Tensor | None = None) -> list[Tensor]:
        """Maps as from `Projection`, c one-hot [B, c_dim] or None -> logits of each scale, float32 [B, h, w]."""
        return [head(x, c) for head, x in zip(self.heads, maps, strict=True)]

    def keep_vectors(self) -> None:
        """Let the power iteration of every layer go on from its last forward. Called once an update."""
        for module in self.modules():
            if isinstance(module, SpectralConv2d):
                module.keep_vectors()

    def blocks(self) -> dict[str, nn.Module]:
        """The heads by name."""
        return {f"heads.{i}": head for i, head in enumerate(self.heads)}


class Head(nn.Module):
    """Halving 4x4 convolutions down to about 4 pixels a side, then logits of patches."""

    def __init__(self, in_channels: int, size: int, *, channels: int, group: int, c_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []

        def add(width: int, kernel_size: int, stride: int) -> None:
            nonlocal in_channels
            layers.append(SpectralConv2d(in_channels, width, kernel_size, stride=stride, padding=1, bias=not group))
            if group:
                layers.append(GroupedBatchNorm(width, group))
            layers.append(nn.LeakyReLU(0.2))
            in_channels = width

        while size >= 2 * _COARSEST:
            add(min(channels, 2 * in_channels), 4, 2)
            size //= 2
        if not layers:
            add(min(channels, in_channels), 3, 1)
        self.layers = nn.Sequential(*layers)
        self.embed = nn.Linear(c_dim, in_channels, bias=False) if c_dim else None
        self.logits = SpectralConv2d(in_channels, 1, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """[B, in, h, w] -> float32 [B, h', w']."""
        x = self.layers(x)
        logits: Tensor = self.logits(x)[:, 0]
        if self.embed is not None and c is not None:
            logits = logits + (x * self.embed(c)[:, :, None, None].to(x.dtype)).mean(1)
        return logits.float()


def in_groups(x: Tensor, group: int) -> Tensor:
    """[B, C, h, w] -> [group, B / group, C, h, w]: samples n, n + B / group, ... are a group.

    The phases of training cut batches so that groups stay whole. Raises LowVRAMError where B is no multiple of group.
    """
    if len(x) % group:
        raise LowVRAMError(f"{len(x)} samples are not in groups of {group}.", "Give a multiple.")
    return x.unflatten(0, (group, -1))


class GroupedBatchNorm(nn.Module):
    """Batch normalisation over groups of samples, with a scale and a shift for each channel (arXiv 2301.09515, app. A).

    The result is the same in any micro-batch, see `in_groups`. Nothing is kept from one forward to the next.
    """

    def __init__(self, channels: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same. Raises LowVRAMError where B is no multiple of the group."""
        grouped = in_groups(x.float(), self.group)
        variance, mean = torch.var_mean(grouped, dim=(0, 3, 4), keepdim=True, correction=0)
        scale = self.weight[:, None, None] * (variance + 1e-5).rsqrt()
        return ((grouped - mean) * scale + self.bias[:, None, None]).flatten(0, 1).to(x.dtype)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value (Miyato et al. 2018, arXiv 1802.05957).

    A forward takes one step of the power iteration from the vectors that are kept, and keeps nothing: so one that is
    repeated, cut into micro-batches or redone computes the same. `keep_vectors` keeps those of the last forward.
    """

    left: Tensor
    right: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        self.register_buffer("left", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(in_channels * kernel_size**2), dim=0))
        self._latest: tuple[Tensor, Tensor] | None = None
        for _ in range(15):  # from random vectors to nearly the largest
            self._latest = self._iterated()
            self.keep_vectors()

    @torch.no_grad()
    def _iterated(self) -> tuple[Tensor, Tensor]:
        """Left and right singular vectors after one more step of the power iteration."""
        matrix = self.weight.flatten(1).to(self.left.dtype)
        right = F.normalize(matrix.mT @ self.left, dim=0)
        return F.normalize(matrix @ right, dim=0), right

    @torch.no_grad()
    def keep_vectors(self) -> None:
        """Begin the next forward's step from the vectors of the last one's."""
        if self._latest is not None:
            self.left.copy_(self._latest[0])
            self.right.copy_(self._latest[1])

    def forward(self, x: Tensor) -> Tensor:
        self._latest = left, right = self._iterated()
        weight = self.weight.float()
        norm = torch.dot(left, weight.flatten(1) @ right)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, (weight / norm).to(x.dtype), bias)


def _random_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that keeps variance, as drawn (He et al. 2015), without bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.normal_(conv.weight, std=1 / math.sqrt(in_channels * kernel_size**2))
    return conv
