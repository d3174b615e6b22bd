"""The autoencoder of latent diffusion: images to Gaussian latents and back (Rombach et al. 2022, arXiv 2112.10752).

Settings and state-dict keys are those of a published `vae` folder (`AutoencoderKL`).
"""

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lowvram import standin
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder_layers import Decoder, Encoder
from lowvram.models.tiling import decode_tiled

LOG_VARIANCE_RANGE = (-30.0, 20.0)

_SETTINGS = (
    "in_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_add_attention",
    "scaling_factor",
    "shift_factor",
    "use_quant_conv",
    "use_post_quant_conv",
)
# Settings of a config.json that say nothing about the numbers the network computes.
_HARMLESS = ("sample_size", "force_upcast")

_log = logging.getLogger(__name__)
_warned: WeakSet[nn.Module] = WeakSet()  # models whose overflow has been reported


class Autoencoder(nn.Module):
    """A convolutional encoder to the mean and log variance of latents, and a decoder.

    Weights fp32 or 16-bit; encode and decode take any floating dtype and compute in that of the weights (or autocast).

    Args:
        in_channels: of the images, and of what is decoded.
        latent_channels: of the latents.
        block_out_channels: width of each stage, from the images' resolution to the latents'; each stage but the last
            halves the resolution, so `factor` is 2 ** (stages - 1).
        layers_per_block: residual blocks in a stage of the encoder; the decoder's have one more.
        norm_num_groups: of each group norm; must divide every width.
        mid_block_add_attention: attention over all latent pixels, in both halves.
        scaling_factor: the diffusion model sees (latents - shift_factor) * scaling_factor, of about unit variance.
        shift_factor: see there.
        use_quant_conv: 1x1 convolution after the encoder.
        use_post_quant_conv: 1x1 convolution before the decoder.

    Raises:
        LowVRAMError: a width is not a multiple of norm_num_groups, or there is none.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        super().__init__()
        channels = tuple(block_out_channels)
        if not channels or any(width <= 0 or width % norm_num_groups for width in channels):
            raise LowVRAMError(
                f"block_out_channels={list(channels)} with norm_num_groups={norm_num_groups} leaves groups uneven.",
                "Give one or more widths that are multiples of norm_num_groups, or fewer groups.",
            )
        if scaling_factor <= 0:
            raise LowVRAMError(f"scaling_factor={scaling_factor} must be positive.", "Use 1 / (std of the latents).")
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.block_out_channels = channels
        self.layers_per_block = layers_per_block
        self.norm_num_groups = norm_num_groups
        self.mid_block_add_attention = mid_block_add_attention
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.factor = 2 ** (len(channels) - 1)
        moments = 2 * latent_channels
        shape = (channels, layers_per_block, norm_num_groups)
        self.encoder = Encoder(in_channels, moments, *shape, attention=mid_block_add_attention)
        self.decoder = Decoder(latent_channels, in_channels, *shape, attention=mid_block_add_attention)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Autoencoder":
        """The network of a `vae/config.json`, with fresh weights.

        Raises:
            LowVRAMError: a setting in it asks for another network than this one.
        """
        stages = len(config.get("block_out_channels", (64,)))
        # What a setting must be; where a folder leaves it out, it has this value.
        fixed = {
            "_class_name": "AutoencoderKL",
            "out_channels": config.get("in_channels", 3),
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "act_fn": "silu",
        }
        for name, value in config.items():
            plain = list(value) if isinstance(value, list | tuple) else value
            if name in (*_SETTINGS, *_HARMLESS) or plain in (None, False):
                continue
            if (name in fixed and plain != fixed[name]) or (name not in fixed and not name.startswith("_")):
                wanted = f"; it has {fixed[name]!r}" if name in fixed else ""
                raise LowVRAMError(
                    f"the autoencoder's config has {name}={value!r}, which this network does not know{wanted}.",
                    "Use the autoencoder of Stable Diffusion 1, 2, XL or 3, or one trained here.",
                )
        # Folders leave out what equals the defaults of the format, some of which differ from ours.
        settings: dict[str, Any] = {"block_out_channels": (64,), "layers_per_block": 1}
        settings |= {name: config[name] for name in _SETTINGS if config.get(name) is not None}
        return cls(**settings)

    def to_config(self) -> dict[str, Any]:
        """What `from_config` reads: the content of a `vae/config.json`."""
        stages = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "act_fn": "silu",
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "use_quant_conv": self.quant_conv is not None,
            "use_post_quant_conv": self.post_quant_conv is not None,
            "mid_block_add_attention": self.mid_block_add_attention,
        }

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, in, H, W] in [-1, 1] -> moments [B, 2 latent, H / f, W / f]: mean, then log variance in [-30, 20].

        Raises:
            LowVRAMError: not floating point, other channels, or a side that the factor does not divide.
        """
        self._check(images, "images", self.in_channels, self.factor)
        moments = self.encoder(_prepared(images, self.encoder.conv_in.weight))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, latent, h, w] -> images [B, in, f h, f w], about [-1, 1], not clamped.

        Raises:
            LowVRAMError: not floating point, or other channels.
        """
        self._check(latents, "latents", self.latent_channels, 1)
        latents = _prepared(latents, self.decoder.conv_in.weight)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        images: Tensor = self.decoder(latents)
        return images

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructions [B, in, H, W] and moments [B, 2 latent, h, w] of images in [-1, 1].

        noise: standard normal [B, latent, h, w], to sample the latents with; None: decode their mean.
        """
        moments = self.encode(images)
        return self.decode(sample_latents(moments, noise)), moments

    def to_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """What a diffusion model is trained on, (mean + std * noise - shift) * scaling, [B, latent, h, w].

        moments [B, 2 latent, h, w]; noise standard normal [B, latent, h, w], or None for the mean. fp32 at least.
        """
        return (sample_latents(moments, noise) - self.shift_factor) * self.scaling_factor

    def unscale(self, z: Tensor) -> Tensor:
        """The unscaled latents of a diffusion model's, which `decode` takes. [B, latent, h, w] -> the same, fp32."""
        return z.to(_at_least_fp32(z)) / self.scaling_factor + self.shift_factor

    def decoding_bytes(self, height: int, width: int) -> int:
        """The most that `decode` has of activations at a time for a latent of this size, without gradients.

        Besides it there are weights, and what the kernels take for themselves.
        """
        channels, last = tuple(reversed(self.block_out_channels)), len(self.block_out_channels) - 1
        most = (8 if self.mid_block_add_attention else 5) * channels[0]  # channels, of a latent pixel
        for i, out in enumerate(channels):
            into = channels[max(0, i - 1)]
            wide = [2 * into + out, into + 4 * out]  # the first residual block; the others, beside the stage's input
            if i < last:
                wide.append(into + 9 * out)  # the upsampler, whose output has four times the pixels
            most = max(most, max(wide) * 4**i)
        return most * height * width * self.decoder.conv_in.weight.element_size()

    def blocks(self) -> dict[str, nn.Module]:
        """Residual blocks, attention and samplers, in the order they run."""
        halves = (("encoder", self.encoder), ("decoder", self.decoder))
        return {f"{half}.{name}": part for half, network in halves for name, part in network.parts()}

    def _check(self, x: Tensor, name: str, channels: int, multiple: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise LowVRAMError(
                f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)} can't go through this autoencoder.",
                f"Pass floating-point {name} [B, {channels}, height, width].",
            )
        if x.shape[2] % multiple or x.shape[3] % multiple or not x.numel():
            raise LowVRAMError(
                f"{name} of {x.shape[3]}x{x.shape[2]} pixels: both sides must be multiples of {multiple}.",
                "Crop or resize them.",
            )


def sample_latents(moments: Tensor, noise: Tensor | None) -> Tensor:
    """mean + std * noise of moments [B, 2 C, h, w], or the mean without noise. [B, C, h, w], fp32 at least."""
    mean, log_variance = moments.to(_at_least_fp32(moments)).chunk(2, dim=1)
    return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


def decode_safely(
    model: Autoencoder, latents: Tensor, *, tile_pixels: int | None = None, overlap: float = 0.25
) -> Tensor:
    """Decode unscaled latents [B, latent, h, w] for viewing; what overflows in fp16 or bf16 is decoded again in fp32.

    Only the images that are not finite are decoded again, one at a time, so that no image depends on its batch. The
    first time, a warning is logged. 16-bit weights of the decoder are widened meanwhile, which is undone exactly.
    Without gradients.

    tile_pixels, overlap: as in `decode_tiled`; None: whole images.
    Raises:
        LowVRAMError: the latents themselves are not finite, or their images are not even in fp32.
    """

    def decode(x: Tensor) -> Tensor:
        if tile_pixels is None:
            return model.decode(x)
        return decode_tiled(model, x, tile_pixels=tile_pixels, overlap=overlap)

    with torch.no_grad():
        wrong = _not_finite(latents)
        if wrong:
            raise LowVRAMError(
                f"latents of samples {wrong} are not finite.", "Sample in fp32 or bf16, or from an earlier checkpoint."
            )
        images = decode(latents)
        wrong = _not_finite(images)
        if not wrong:
            return images
        if model not in _warned:
            _warned.add(model)
            _log.warning(
                "decoding overflowed in %s for %d of %d images; these are decoded in fp32",
                str(images.dtype).removeprefix("torch."),
                len(wrong),
                len(images),
            )
        images = images.float()
        halves = [part for part in (model.decoder, model.post_quant_conv) if part is not None]
        dtype = model.decoder.conv_in.weight.dtype
        with torch.autocast(latents.device.type, enabled=False):
            for part in halves:
                part.float()
            try:
                for i in wrong:
                    images[i] = decode(latents[i : i + 1].float())[0]
            finally:
                for part in halves:
                    part.to(dtype)
        wrong = _not_finite(images)
        if wrong:
            raise LowVRAMError(
                f"images of samples {wrong} are not finite even when decoded in fp32.",
                "The latents or the autoencoder's weights are broken: check the checkpoint.",
            )
        return images


def _not_finite(x: Tensor) -> list[int]:
    """The rows of x [B, ...] that hold NaN or infinity."""
    if standin.active():  # there is nothing to read
        return []
    good = x.isfinite().flatten(1).all(dim=1)
    rows: list[int] = (~good).nonzero().flatten().tolist()
    return rows


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _prepared(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, C, H, W] in the weights' dtype; channels last on a CPU, where that takes a fifth off a training step."""
    if standin.is_gpu(x.device):
        return x.to(weight.dtype)
    return x.to(weight.dtype, memory_format=torch.channels_last)
