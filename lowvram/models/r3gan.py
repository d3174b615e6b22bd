"""R3GAN (Huang et al. 2024, arXiv 2501.05441, section 4, configuration E): generator and discriminator, plain networks.

Residual blocks with grouped convolutions and nothing beside: no normalisation, no noise, no statistics of a batch, so
that a sample's numbers are its own. Every operation has exact first and second derivatives.
Legend: B batch, C channels of a stage, E = expansion * C those within a block, R resolution, D width of the latent.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.kernels.bias_act import LEAK, bias_act
from lowvram.kernels.conv2d import conv2d
from lowvram.kernels.upfirdn2d import make_filter, upfirdn2d
from lowvram.models.pyramid import check_images
from lowvram.models.stylegan2_layers import best_memory_format, running_weight, wide_product
from lowvram.settings.r3gan import check_stages

LRELU_GAIN = math.sqrt(2 / (1 + LEAK**2))  # of weights before a leaky ReLU: keeps the second moment (arXiv 1502.01852)
_BILINEAR = (1.0, 2.0, 1.0)


def _normal(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (gain / math.sqrt(fan_in)))


class _Stage(NamedTuple):
    """The blocks of one resolution."""

    resolution: int
    channels: int
    blocks: int
    groups: int
    dtype: torch.dtype


class Mapping(nn.Module):
    """What the synthesis starts from: the latent beside the embedding of the class (section 4; appendix D).

    z: float32 [B, z_dim]; c: float [B, c_dim] or None without classes. Returns float32 [B, D], D = z_dim + embed_dim.
    """

    def __init__(self, z_dim: int, c_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.width = z_dim + (embed_dim if c_dim else 0)
        if c_dim:
            self.embedding = _normal(c_dim, embed_dim, fan_in=1)  # as large as z

    def forward(self, z: Tensor, c: Tensor | None = None, truncation_psi: float = 1.0) -> Tensor:
        if truncation_psi != 1:
            raise LowVRAMError(
                f"truncation_psi={truncation_psi} is not for R3GAN: it has no average latent to go towards.",
                "Leave truncation_psi out.",
            )
        _check_shape("z", z, self.z_dim)
        _check_classes(c, self.c_dim)
        if not self.c_dim or c is None:
            return z
        if len(c) != len(z):
            raise LowVRAMError(f"c has {len(c)} rows for {len(z)} rows of z", "Pass one label for each sample.")
        return torch.cat([z, c.to(z.dtype) @ self.embedding], dim=1)


class ResidualBlock(nn.Module):
    """x + conv1x1(act(conv3x3(act(conv1x1(x))))), an inverted bottleneck (section 4), with the resampling beside it.

    [B, in, r, r] -> [B, out, R, R] in the block's dtype; R is 2r for resample="up" (which comes first), r / 2 for
    "down" (which comes last), else r. Resampling is bilinear, with a 1x1 convolution only where channels change.

    groups: of the 3x3 convolution. gain: of the first two convolutions' weights at the start; the third is zero, so
    that a block begins as the identity, and no depth changes the variance (Fix-up, arXiv 1901.09321, section 3.2).
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        expansion: int,
        *,
        resample: Literal["up", "down"] | None,
        gain: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype, self.groups, self.resample = dtype, groups, resample
        width = out_channels if resample == "up" else in_channels
        inner = width * expansion
        if in_channels != out_channels:
            self.transition = _normal(out_channels, in_channels, 1, 1, fan_in=in_channels)
        self.has_transition = in_channels != out_channels
        self.register_buffer("resample_filter", make_filter(_BILINEAR))
        gain *= LRELU_GAIN
        self.weight0 = _normal(inner, width, 1, 1, fan_in=width, gain=gain)
        self.bias0 = nn.Parameter(torch.zeros(inner))
        in_group = inner // groups
        self.weight1 = _normal(inner, in_group, 3, 3, fan_in=9 * in_group, gain=gain)
        self.bias1 = nn.Parameter(torch.zeros(inner))
        self.weight2 = nn.Parameter(torch.zeros(width, inner, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        x = x.contiguous(memory_format=best_memory_format(x, self.weight0.shape[1]))  # the convolutions keep the format
        if self.resample == "up":  # after the 1x1 convolution, which is cheaper on the smaller image
            x = upfirdn2d(self._changed(x), self.resample_filter, up=2, padding=(1, 1, 1, 1), gain=4.0)
        x = self._residual(x)
        if self.resample == "down":
            x = self._changed(upfirdn2d(x, self.resample_filter, down=2, padding=(1, 1, 1, 1)))
        return x

    def _residual(self, x: Tensor) -> Tensor:
        """Kept for the backward: x and the two activations, no more."""
        y = bias_act(conv2d(x, running_weight(self.weight0, x)), self.bias0, act="lrelu", inplace=True)  # [B, E, R, R]
        y = conv2d(y, running_weight(self.weight1, y), padding=1, groups=self.groups)
        y = bias_act(y, self.bias1, act="lrelu", inplace=True)
        return conv2d(y, running_weight(self.weight2, y)).add_(x)

    def _changed(self, x: Tensor) -> Tensor:
        return conv2d(x, running_weight(self.transition, x)) if self.has_transition else x


class Synthesis(nn.Module):
    """ws [B, D] -> float32 images [B, image_channels, R, R]: a learned 4x4 basis, modulated, and residual blocks."""

    def __init__(self, width: int, image_channels: int, stages: list[_Stage], expansion: int, gain: float) -> None:
        super().__init__()
        self.width = width
        first = stages[0].channels
        self.basis = nn.Parameter(torch.randn(first, 4, 4))
        self.modulation = _normal(first, width, fan_in=width)
        self.block_names: list[str] = []
        channels = first
        for stage in stages:
            for i in range(stage.blocks):
                name = f"b{stage.resolution}_{i}"
                block = ResidualBlock(
                    channels,
                    stage.channels,
                    stage.groups,
                    expansion,
                    resample="up" if i == 0 and stage.resolution > 4 else None,
                    gain=gain,
                    dtype=stage.dtype,
                )
                self.add_module(name, block)
                self.block_names.append(name)
                channels = stage.channels
        self.to_image = _normal(image_channels, channels, fan_in=channels)

    def forward(self, ws: Tensor, noise_mode: str = "const", noise_seeds: Tensor | None = None) -> Tensor:
        """noise_mode, noise_seeds: of networks with noise; here they change nothing."""
        _check_shape("ws", ws, self.width)
        x = self.basis * (ws @ self.modulation.T)[:, :, None, None]  # [B, C, 4, 4]
        for name in self.block_names:
            x = getattr(self, name)(x)
        kernels = self.to_image.expand(len(x), -1, -1)  # [B, image_channels, C]
        return wide_product(kernels, x.flatten(2)).unflatten(2, x.shape[2:])


class Generator(nn.Module):
    """R3GAN's generator (section 4).

    resolution: a power of two from 16 to 1024. widths, blocks, groups: channels, residual blocks, and groups of the
    3x3 convolutions of each stage, 4x4 first. expansion: channels within a block, relative to those between blocks.
    c_dim: classes, 0 for none, each an embedding of embed_dim numbers. num_fp16_res: how many of the top resolutions
    run in half_dtype, never 4x4; latents and images are fp32.
    Raises LowVRAMError for values that make no network.
    """

    def __init__(
        self,
        resolution: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        groups: Sequence[int],
        z_dim: int = 64,
        c_dim: int = 0,
        embed_dim: int = 64,
        image_channels: int = 3,
        expansion: int = 2,
        num_fp16_res: int = 0,
        half_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        stages = _stages(resolution, widths, blocks, groups, expansion, num_fp16_res, half_dtype)
        self.resolution, self.z_dim, self.c_dim, self.image_channels = resolution, z_dim, c_dim, image_channels
        self.mapping = Mapping(z_dim, c_dim, embed_dim)
        self.synthesis = Synthesis(self.mapping.width, image_channels, stages, expansion, _gain(blocks))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z: float32 [B, z_dim]; c: float [B, c_dim], or None without classes. Returns float32 [B, channels, R, R]."""
        images: Tensor = self.synthesis(self.mapping(z, c))
        return images

    def blocks(self) -> dict[str, nn.Module]:
        """The residual blocks by name, in the order they run: {"synthesis.b4_0": ..., "synthesis.b4_1": ...}."""
        return {f"synthesis.{name}": getattr(self.synthesis, name) for name in self.synthesis.block_names}


class Discriminator(nn.Module):
    """R3GAN's discriminator: the generator's mirror image, and a product with the class's embedding (arXiv 1802.05637).

    Arguments as in Generator; widths, blocks and groups too have 4x4 first.
    """

    def __init__(
        self,
        resolution: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        groups: Sequence[int],
        c_dim: int = 0,
        embed_dim: int = 64,
        image_channels: int = 3,
        expansion: int = 2,
        num_fp16_res: int = 0,
        half_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        stages = _stages(resolution, widths, blocks, groups, expansion, num_fp16_res, half_dtype)
        self.resolution, self.c_dim, self.image_channels = resolution, c_dim, image_channels
        self.dtype = stages[-1].dtype
        channels = stages[-1].channels
        self.from_image = _normal(channels, image_channels, 1, 1, fan_in=image_channels)
        self.block_names: list[str] = []
        for stage, smaller in zip(reversed(stages), [*reversed(stages[:-1]), None], strict=True):
            for i in range(stage.blocks):
                last = i == stage.blocks - 1 and smaller is not None
                name = f"b{stage.resolution}_{i}"
                block = ResidualBlock(
                    stage.channels,
                    smaller.channels if last and smaller is not None else stage.channels,
                    stage.groups,
                    expansion,
                    resample="down" if last else None,
                    gain=_gain(blocks),
                    dtype=stage.dtype,
                )
                self.add_module(name, block)
                self.block_names.append(name)
        channels = stages[0].channels
        features = embed_dim if c_dim else 1
        self.pooling = _normal(channels, 4, 4, fan_in=16)  # a kernel for each channel, as large as its map
        self.head = _normal(features, channels, fan_in=channels)
        if c_dim:
            self.embedding = _normal(c_dim, embed_dim, fan_in=embed_dim)  # the product with features keeps the variance

    def forward(self, images: Tensor, c: Tensor | None = None) -> Tensor:
        """images: float [B, image_channels, R, R], about [-1, 1]; c as in Generator. Returns float32 logits [B, 1]."""
        check_images(images, self.image_channels, self.resolution)
        _check_classes(c, self.c_dim)
        x = images.to(self.dtype)
        x = conv2d(x, running_weight(self.from_image, x))
        for name in self.block_names:
            x = getattr(self, name)(x)
        x = (x.to(self.pooling.dtype) * self.pooling).sum((2, 3))  # [B, C]
        x = x @ self.head.T  # [B, 1], or [B, embed_dim] with classes
        if self.c_dim and c is not None:
            x = (x * (c.to(x.dtype) @ self.embedding)).sum(dim=1, keepdim=True)
        return x

    def blocks(self) -> dict[str, nn.Module]:
        """The residual blocks by name, in the order they run: {"b256_0": ..., "b256_1": ..., "b128_0": ...}."""
        return {name: getattr(self, name) for name in self.block_names}


def _gain(blocks: Sequence[int]) -> float:
    """L^(-1 / (2m - 2)) for L blocks of m = 3 layers (Fix-up, arXiv 1901.09321, equation 4)."""
    return float(sum(blocks) ** (-1 / (2 * 3 - 2)))


def _stages(
    resolution: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    groups: Sequence[int],
    expansion: int,
    num_fp16_res: int,
    half_dtype: torch.dtype,
) -> list[_Stage]:
    """The stages, 4x4 first. Raises LowVRAMError for values that don't go together."""
    check_stages(resolution, list(widths), list(blocks), list(groups), expansion)
    if half_dtype not in (torch.float16, torch.bfloat16):
        raise LowVRAMError(f"half_dtype={half_dtype!r} is no 16-bit type", "Use torch.float16 or torch.bfloat16.")
    first_half = max(1, len(widths) - num_fp16_res)
    return [
        _Stage(4 * 2**i, width, count, parts, half_dtype if i >= first_half else torch.float32)
        for i, (width, count, parts) in enumerate(zip(widths, blocks, groups, strict=True))
    ]


def _check_shape(name: str, x: Tensor, features: int) -> None:
    if x.ndim != 2 or x.shape[1] != features:
        raise LowVRAMError(
            f"{name} has shape {tuple(x.shape)}, not [B, {features}]", f"Pass {name} as a float tensor [B, {features}]."
        )


def _check_classes(c: Tensor | None, c_dim: int) -> None:
    if c_dim and (c is None or c.ndim != 2 or c.shape[1] != c_dim):
        shape = None if c is None else tuple(c.shape)
        raise LowVRAMError(f"c has shape {shape}, not [B, {c_dim}]", f"Pass c as a float tensor [B, {c_dim}].")
    if not c_dim and c is not None and c.numel() > 0:
        raise LowVRAMError(
            f"c has shape {tuple(c.shape)}, but this network has no classes (c_dim=0)",
            "Leave c out, or build the network with c_dim set to the number of classes.",
        )
