"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958): skip generator, residual discriminator, plain networks.

State-dict keys are those of the published checkpoints. Every operation has exact first and second derivatives.
Legend: B batch, C channels, R resolution of a block, num_ws = 2 log2(resolution) - 2.
"""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.kernels.upfirdn2d import make_filter, upsample2d
from lowvram.models.pyramid import channels_by_resolution, check_at_least, check_images, dtypes_by_resolution
from lowvram.models.stylegan2_layers import (
    ConvLayer,
    FullyConnected,
    NoiseMode,
    SynthesisLayer,
    ToRGB,
    best_memory_format,
)

DISCRIMINATOR_MAPPING_LAYERS = (
    8  # of the published class-conditional discriminators; the generator's depth is a setting
)


class Mapping(nn.Module):
    """Latent z and label c to w: normalise, concatenate, fully connected layers (StyleGAN2, section 2).

    z: float32 [B, z_dim]; c: float32 [B, c_dim]. num_ws None returns [B, w_dim] and keeps no average of w.
    """

    w_avg: Tensor

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, num_layers: int) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.num_layers = z_dim, c_dim, w_dim, num_ws, num_layers
        if c_dim > 0:
            self.embed = FullyConnected(c_dim, w_dim)
        in_features = z_dim + (w_dim if c_dim > 0 else 0)
        for i in range(num_layers):
            self.add_module(f"fc{i}", FullyConnected(in_features, w_dim, act="lrelu", lr_multiplier=0.01))
            in_features = w_dim
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, c: Tensor | None = None, truncation_psi: float = 1.0) -> Tensor:
        """ws, float32 [B, num_ws, w_dim]; truncation_psi 1 leaves w as it is, 0 gives the average w."""
        parts = []
        if self.z_dim > 0:
            z = _checked(z, self.z_dim, "z").float()
            parts.append(_normalised(z))
        if self.c_dim > 0:
            parts.append(_normalised(self.embed(_checked(c, self.c_dim, "c").float())))
        elif c is not None and c.numel() > 0:
            raise LowVRAMError(
                f"c has shape {tuple(c.shape)}, but this network has no classes (c_dim=0)",
                "Leave c out, or build the network with c_dim set to the number of classes.",
            )
        if len(parts) == 2 and len(parts[0]) != len(parts[1]):
            raise LowVRAMError(
                f"c has {len(parts[1])} rows for {len(parts[0])} rows of z", "Pass one label for each sample."
            )
        x = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)  # [B, w_dim]
        if self.num_ws is None:
            return x
        if truncation_psi != 1:
            x = self.w_avg.lerp(x, truncation_psi)
        return x[:, None].expand(-1, self.num_ws, -1)

    @torch.no_grad()
    def update_w_avg(self, w_mean: Tensor, beta: float = 0.998) -> None:
        """w_avg <- beta w_avg + (1 - beta) w_mean, w_mean [w_dim]: once a step, over the whole batch, by the task."""
        self.w_avg.lerp_(w_mean.detach().to(self.w_avg), 1 - beta)


def _normalised(x: Tensor) -> Tensor:
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def _checked(x: Tensor | None, features: int, name: str) -> Tensor:
    if x is None or x.ndim != 2 or x.shape[1] != features:
        shape = None if x is None else tuple(x.shape)
        problem = f"{name} has shape {shape}, not [B, {features}]"
        raise LowVRAMError(problem, f"Pass {name} as a float tensor [B, {features}].")
    return x


class SynthesisBlock(nn.Module):
    """One resolution of the skip generator: two convolutions (one at 4x4), and to-RGB added to the up-sampled image.

    x: [B, in, R / 2, R / 2] (None at 4x4), image: float32 [B, 3, R / 2, R / 2] or None, ws: [B, num_convs + 1, w_dim].
    Returns x [B, out, R, R] in the block's dtype and image float32 [B, 3, R, R].
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        image_channels: int,
        *,
        dtype: torch.dtype,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.first_ws = 0 if in_channels == 0 else 2 * int(math.log2(resolution)) - 5  # index of its first w
        name = f"b{resolution}"
        self.register_buffer("resample_filter", make_filter())
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, up=2, clamp=clamp, name=f"{name}.conv0"
            )
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, w_dim, resolution, up=1, clamp=clamp, name=f"{name}.conv1"
        )
        self.torgb = ToRGB(out_channels, image_channels, w_dim, clamp=clamp)
        self.num_convs = 1 if in_channels == 0 else 2

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        ws: Tensor,
        noise_mode: NoiseMode = "random",
        noise_seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        w = ws.unbind(1)
        if x is None:
            x = self.const.to(self.dtype).expand(len(ws), -1, -1, -1)
            x = x.contiguous(memory_format=best_memory_format(x, x.shape[1]))  # the convolutions keep the format
        else:
            x = x.to(self.dtype)
            x = x.contiguous(memory_format=best_memory_format(x, x.shape[1]))
            x = self.conv0(x, w[0], noise_mode, noise_seeds)
        x = self.conv1(x, w[-2], noise_mode, noise_seeds)
        rgb = self.torgb(x, w[-1])
        return x, rgb if image is None else rgb + upsample2d(image, self.resample_filter)


class Synthesis(nn.Module):
    """ws [B, num_ws, w_dim] -> float32 images [B, image_channels, resolution, resolution]."""

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        image_channels: int,
        channels: dict[int, int],
        dtypes: dict[int, torch.dtype],
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.w_dim = w_dim
        self.resolutions = list(channels)
        self.num_ws = 2 * len(channels)
        for res, out_channels in channels.items():
            block = SynthesisBlock(
                channels.get(res // 2, 0), out_channels, w_dim, res, image_channels, dtype=dtypes[res], clamp=clamp
            )
            self.add_module(f"b{res}", block)

    def forward(self, ws: Tensor, noise_mode: NoiseMode = "random", noise_seeds: Tensor | None = None) -> Tensor:
        """noise_seeds: int64 [B] on the CPU, or None to draw the noise from torch's default generator."""
        if noise_mode not in get_args(NoiseMode):
            raise LowVRAMError(f"noise_mode={noise_mode!r} is not known", 'Use "random", "const" or "none".')
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise LowVRAMError(
                f"ws has shape {tuple(ws.shape)}, not [B, {self.num_ws}, {self.w_dim}]", "Pass what g.mapping returns."
            )
        if noise_seeds is not None and len(noise_seeds) != len(ws):
            raise LowVRAMError(
                f"{len(noise_seeds)} noise_seeds for a batch of {len(ws)}", "Pass one seed for each sample."
            )
        ws = ws.float()
        x = image = None
        for res in self.resolutions:
            block = getattr(self, f"b{res}")
            block_ws = ws.narrow(1, block.first_ws, block.num_convs + 1)
            x, image = block(x, image, block_ws, noise_mode, noise_seeds)
        assert image is not None
        return image


class Generator(nn.Module):
    """StyleGAN2 generator: mapping network and skip synthesis network.

    resolution: a power of two from 16 to 1024. Channels at R: min(channel_base // R, channel_max).
    num_fp16_res: how many of the top resolutions run in half_dtype, never below 8x8; to-RGB and the image stay fp32.
    conv_clamp: the largest magnitude of a convolution's output before its gain, or None.
    Raises LowVRAMError for values that make no network.
    """

    def __init__(
        self,
        resolution: int,
        z_dim: int = 512,
        w_dim: int = 512,
        c_dim: int = 0,
        image_channels: int = 3,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = 256,
        half_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        check_at_least(1, z_dim=z_dim, w_dim=w_dim, image_channels=image_channels, mapping_layers=mapping_layers)
        check_at_least(0, c_dim=c_dim)
        channels = channels_by_resolution(resolution, channel_base, channel_max)
        dtypes = dtypes_by_resolution(resolution, num_fp16_res, half_dtype, conv_clamp)
        self.resolution, self.z_dim, self.w_dim, self.c_dim = resolution, z_dim, w_dim, c_dim
        self.image_channels = image_channels
        self.synthesis = Synthesis(w_dim, resolution, image_channels, channels, dtypes, conv_clamp)
        self.num_ws = self.synthesis.num_ws
        self.mapping = Mapping(z_dim, c_dim, w_dim, self.num_ws, mapping_layers)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        noise_mode: NoiseMode = "random",
        noise_seeds: Tensor | None = None,
    ) -> Tensor:
        """z: float [B, z_dim]; c: float [B, c_dim], or None without classes; noise_seeds: int64 [B] on the CPU or None.

        Returns float32 [B, image_channels, resolution, resolution], about [-1, 1].
        """
        return self.synthesis(self.mapping(z, c, truncation_psi), noise_mode, noise_seeds)

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in the order they run: {"synthesis.b4": ..., "synthesis.b8": ...}."""
        return {f"synthesis.b{res}": getattr(self.synthesis, f"b{res}") for res in self.synthesis.resolutions}


class DiscriminatorBlock(nn.Module):
    """Residual block (StyleGAN2, section 4.1): [B, in, R, R] -> [B, out, R / 2, R / 2] in the block's dtype."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_channels: int | None,
        *,
        dtype: torch.dtype,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("resample_filter", make_filter())
        half = math.sqrt(0.5)  # the sum of two unit-variance branches has unit variance again
        if image_channels is not None:  # only the top block sees the image
            self.fromrgb = ConvLayer(image_channels, in_channels, 1, act="lrelu", clamp=clamp)
        self.conv0 = ConvLayer(in_channels, in_channels, 3, act="lrelu", clamp=clamp)
        self.conv1 = ConvLayer(in_channels, out_channels, 3, act="lrelu", down=2, gain=half, clamp=clamp)
        self.skip = ConvLayer(in_channels, out_channels, 1, bias=False, down=2, gain=half)
        self.has_fromrgb = image_channels is not None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        x = x.contiguous(memory_format=best_memory_format(x, x.shape[1]))  # the convolutions keep the format
        if self.has_fromrgb:
            x = self.fromrgb(x)
        return self.skip(x) + self.conv1(self.conv0(x))


class DiscriminatorEpilogue(nn.Module):
    """The 4x4 block: minibatch standard deviation, convolution, two linear layers. [B, C, 4, 4] -> float32 [B, out]."""

    def __init__(self, channels: int, out_features: int, mbstd_group_size: int, clamp: float | None) -> None:
        super().__init__()
        self.mbstd_group_size = mbstd_group_size
        self.conv = ConvLayer(channels + 1, channels, 3, act="lrelu", clamp=clamp)
        self.fc = FullyConnected(channels * 16, channels, act="lrelu")
        self.out = FullyConnected(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = minibatch_stddev(x.float(), self.mbstd_group_size)
        return self.out(self.fc(self.conv(x).flatten(1)))


def minibatch_stddev(x: Tensor, group_size: int) -> Tensor:
    """Append how much the samples of a group differ, as one channel (arXiv 1710.10196, section 3).

    x: float32 [B, C, H, W] -> [B, C + 1, H, W]. Sample n is grouped with n + B / group, n + 2 B / group, ...
    A batch below group_size is one group; otherwise B must be a multiple of it (LowVRAMError).
    """
    b, _, h, w = x.shape
    group = min(group_size, b)
    if b % group:
        raise LowVRAMError(
            f"a batch of {b} in the discriminator is not a multiple of mbstd_group_size={group_size}",
            "Use a batch that is a multiple of it, or another mbstd_group_size.",
        )
    grouped = x.unflatten(0, (group, b // group))  # [G, B / G, C, H, W]
    grouped = grouped - grouped.mean(0)
    spread = (grouped.square().mean(0) + 1e-8).sqrt().mean((1, 2, 3))  # [B / G]
    return torch.cat([x, spread.repeat(group).view(b, 1, 1, 1).expand(-1, -1, h, w)], dim=1)


class Discriminator(nn.Module):
    """StyleGAN2 discriminator: residual blocks, minibatch standard deviation, projection on the label.

    Arguments as in Generator; mbstd_group_size: how many samples the minibatch standard deviation compares.
    """

    def __init__(
        self,
        resolution: int,
        c_dim: int = 0,
        image_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        mbstd_group_size: int = 4,
        num_fp16_res: int = 0,
        conv_clamp: float | None = 256,
        half_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        check_at_least(1, image_channels=image_channels, mbstd_group_size=mbstd_group_size)
        check_at_least(0, c_dim=c_dim)
        channels = channels_by_resolution(resolution, channel_base, channel_max)
        dtypes = dtypes_by_resolution(resolution, num_fp16_res, half_dtype, conv_clamp)
        self.resolution, self.c_dim, self.image_channels = resolution, c_dim, image_channels
        self.resolutions = sorted(channels, reverse=True)
        for res in self.resolutions[:-1]:
            block = DiscriminatorBlock(
                channels[res],
                channels[res // 2],
                image_channels if res == resolution else None,
                dtype=dtypes[res],
                clamp=conv_clamp,
            )
            self.add_module(f"b{res}", block)
        self.cmap_dim = channels[4] if c_dim > 0 else 0
        if c_dim > 0:
            self.mapping = Mapping(0, c_dim, self.cmap_dim, None, DISCRIMINATOR_MAPPING_LAYERS)
        self.b4 = DiscriminatorEpilogue(channels[4], self.cmap_dim or 1, mbstd_group_size, conv_clamp)

    def forward(self, images: Tensor, c: Tensor | None = None) -> Tensor:
        """images: float [B, image_channels, R, R], about [-1, 1]; c as in Generator. Returns float32 logits [B, 1]."""
        check_images(images, self.image_channels, self.resolution)
        if self.c_dim == 0 and c is not None and c.numel() > 0:
            raise LowVRAMError(
                f"c has shape {tuple(c.shape)}, but this network has no classes (c_dim=0)",
                "Leave c out, or build the network with c_dim set to the number of classes.",
            )
        x = images
        for res in self.resolutions:
            x = getattr(self, f"b{res}")(x)
        if self.c_dim > 0:  # projection discriminator (arXiv 1802.05637, equation 3)
            x = (x * self.mapping(None, c)).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in the order they run: {"b256": ..., ..., "b4": ...}."""
        return {f"b{res}": getattr(self, f"b{res}") for res in self.resolutions}


def freeze_layers(discriminator: Discriminator, count: int) -> None:
    """Let the first `count` layers keep their values: they become buffers (FreezeD, Mo et al. 2020, arXiv 2002.10964).

    Layers are counted from the image on: the top block's fromrgb, conv0, conv1 and skip, the next block's conv0, ...
    State-dict keys stay as they are. Raises LowVRAMError if there are fewer layers.
    """
    blocks = [block for block in discriminator.blocks().values() if isinstance(block, DiscriminatorBlock)]
    layers = [layer for block in blocks for layer in block.children()]
    if count > len(layers):
        raise LowVRAMError(
            f"freeze_d={count}: the discriminator has {len(layers)} layers.", "Use a usual 10, or fewer."
        )
    for layer in layers[:count]:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            layer.register_buffer(name, parameter.detach())
