"""The light generator of FastGAN (Liu et al. 2021, arXiv 2101.04775), without its batch normalisation.

Convolution, normalisation and a gated linear unit, twice at each resolution; skip-layer excitation lets a coarse map
weigh the channels of one 16 times finer (section 3.1). In place of batch normalisation each pixel's channels are
divided by their root mean square (arXiv 1710.10196, section 4.2), so that an image depends on no other in its batch.
Legend: B batch, C channels, R resolution of a block.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.kernels.norm_glu import norm_glu
from lowvram.models.pyramid import channels_by_resolution, check_at_least, dtypes_by_resolution
from lowvram.models.stylegan2_layers import NoiseMode, best_memory_format

_EXCITED_FROM = 16  # a block is weighed by the one at so many times lower a resolution


class Generator(nn.Module):
    """z to images by blocks of growing resolution.

    resolution: a power of two from 16 to 1024. Channels at R: min(channel_base // R, channel_max).
    num_fp16_res: how many of the top resolutions run in half_dtype, never 4x4; the image is fp32.
    Raises LowVRAMError for values that make no network.
    """

    def __init__(
        self,
        resolution: int,
        z_dim: int = 256,
        c_dim: int = 0,
        image_channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        half_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        check_at_least(1, z_dim=z_dim, image_channels=image_channels)
        check_at_least(0, c_dim=c_dim)
        channels = channels_by_resolution(resolution, channel_base, channel_max)
        dtypes = dtypes_by_resolution(resolution, num_fp16_res, half_dtype, None)
        self.resolution, self.z_dim, self.c_dim, self.image_channels = resolution, z_dim, c_dim, image_channels
        self.resolutions = list(channels)
        self.embed = nn.Linear(c_dim, z_dim, bias=False) if c_dim else None
        self.first = nn.Linear(z_dim * (2 if c_dim else 1), 2 * channels[4] * 16)
        for res, width in channels.items():
            if res > 4:
                coarse = channels.get(res // _EXCITED_FROM)
                self.add_module(f"b{res}", Block(channels[res // 2], width, res, coarse, dtype=dtypes[res]))
        self.to_image = ToImage(channels[resolution], image_channels, 3, padding=1)
        _initialise(self)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        noise_mode: NoiseMode = "random",
        noise_seeds: Tensor | None = None,
    ) -> Tensor:
        """z: float [B, z_dim]; c: float [B, c_dim], or None without classes; noise_seeds: int64 [B] on the CPU or None.

        Returns float32 [B, image_channels, resolution, resolution] in [-1, 1].
        """
        return self.synthesis(self.mapping(z, c, truncation_psi), noise_mode, noise_seeds)

    def mapping(self, z: Tensor, c: Tensor | None = None, truncation_psi: float = 1.0) -> Tensor:
        """z of unit variance, and the embedding of the class: [B, z_dim] or [B, 2 z_dim]. There is no truncation."""
        if truncation_psi != 1:
            raise LowVRAMError(f"truncation_psi={truncation_psi}: FastGAN has no truncation.", "Leave it out.")
        if (c is None) != (self.embed is None):
            raise LowVRAMError(f"c is {'missing' if c is None else 'given'}.", f"The network has c_dim={self.c_dim}.")
        z = _unit_rms(z.float(), dim=1)
        if self.embed is None or c is None:
            return z
        return torch.cat([z, _unit_rms(self.embed(c.float()), dim=1)], dim=1)

    def synthesis(self, ws: Tensor, noise_mode: NoiseMode = "random", noise_seeds: Tensor | None = None) -> Tensor:
        """ws as from `mapping` -> float32 images [B, image_channels, R, R]."""
        if ws.ndim != 2 or ws.shape[1] != self.first.in_features:
            raise LowVRAMError(f"ws has shape {tuple(ws.shape)}.", "Pass what g.mapping returns.")
        x = self.first(ws).unflatten(1, (-1, 4, 4))
        maps = {4: norm_glu(x)}
        for res in self.resolutions[1:]:
            block = getattr(self, f"b{res}")
            maps[res] = block(maps[res // 2], maps.get(res // _EXCITED_FROM), noise_mode, noise_seeds)
        image: Tensor = self.to_image(maps[self.resolution])
        return image

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in the order they run."""
        return {f"b{res}": getattr(self, f"b{res}") for res in self.resolutions[1:]}


class Block(nn.Module):
    """Twice the resolution: two convolutions with noise, each normalised and gated.

    x: [B, in, R / 2, R / 2]; coarse: [B, C, R / 16, R / 16], whose excitation multiplies the channels, or None.
    Returns [B, out, R, R] in the block's dtype.
    """

    noise0: Tensor
    noise1: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, resolution: int, coarse: int | None, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.resolution, self.dtype = resolution, dtype
        self.conv0 = nn.Conv2d(in_channels, 2 * out_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(out_channels, 2 * out_channels, 3, padding=1)
        self.strength = nn.Parameter(torch.zeros(2))
        for i in range(2):
            self.register_buffer(f"noise{i}", torch.randn(resolution, resolution))
        self.excite = None if coarse is None else Excitation(coarse, out_channels)

    def forward(
        self, x: Tensor, coarse: Tensor | None, noise_mode: NoiseMode = "random", noise_seeds: Tensor | None = None
    ) -> Tensor:
        x = F.interpolate(x.to(self.dtype), scale_factor=2, mode="nearest")
        x = x.contiguous(memory_format=best_memory_format(x, x.shape[1]))
        for i, conv in enumerate((self.conv0, self.conv1)):
            x = conv._conv_forward(x, conv.weight.to(x.dtype), None)
            noise = self._noise(i, len(x), noise_mode, noise_seeds)
            x = norm_glu(x, conv.bias, None if noise is None else noise * self.strength[i])
        if self.excite is not None and coarse is not None:
            x = x * self.excite(coarse.float()).to(x.dtype)
        return x

    def _noise(self, i: int, batch: int, mode: NoiseMode, seeds: Tensor | None) -> Tensor | None:
        """float32 [B, 1, R, R] for "random", [1, 1, R, R] for "const", None for "none"."""
        if mode == "none":
            return None
        const: Tensor = getattr(self, f"noise{i}")
        if mode == "const":
            return const[None, None]
        size, stream = self.resolution, f"noise.b{self.resolution}.conv{i}"
        return seeded.randn(seeds, 1, size, size, stream=stream, device=const.device, batch=batch)


class ToImage(nn.Conv2d):
    """A convolution in the dtype of its input, to a float32 image in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        image = self._conv_forward(x, self.weight.to(x.dtype), None).float()
        return torch.tanh(image if self.bias is None else image + self.bias[:, None, None])


class Excitation(nn.Module):
    """Skip-layer excitation (section 3.1): [B, in, h, w] -> weights in (0, 1), [B, out, 1, 1]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(in_channels * 16, out_channels)
        self.excite = nn.Linear(out_channels, out_channels)

    def forward(self, coarse: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(coarse, 4).flatten(1)
        weights: Tensor = torch.sigmoid(self.excite(F.leaky_relu(self.squeeze(pooled), 0.2)))
        return weights[:, :, None, None]


def _unit_rms(x: Tensor, dim: int) -> Tensor:
    """x divided by its root mean square along dim, taken in fp32."""
    return x * (x.float().square().mean(dim, keepdim=True) + 1e-8).rsqrt().to(x.dtype)


def _initialise(network: nn.Module) -> None:
    """Weights that keep variance (He et al. 2015), biases of 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
