"""What networks of images have at each resolution from 4x4 on: channels, and the width of their numbers."""

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError


def channels_by_resolution(resolution: int, channel_base: int, channel_max: int) -> dict[int, int]:
    """Channels by resolution, 4 first: min(channel_base // R, channel_max)."""
    if resolution not in (16, 32, 64, 128, 256, 512, 1024):
        raise LowVRAMError(
            f"resolution={resolution!r} is not a power of two from 16 to 1024", "Use 16, 32, 64, 128, 256, 512 or 1024."
        )
    check_at_least(1, channel_base=channel_base, channel_max=channel_max)
    if channel_base < resolution:
        raise LowVRAMError(
            f"channel_base={channel_base} leaves no channel at resolution {resolution}",
            f"Use a channel_base of at least {resolution}; published networks have 16384 or 32768.",
        )
    sizes = [2**i for i in range(2, resolution.bit_length())]
    return {res: min(channel_base // res, channel_max) for res in sizes}


def dtypes_by_resolution(
    resolution: int, num_fp16_res: int, half_dtype: torch.dtype, conv_clamp: float | None
) -> dict[int, torch.dtype]:
    """The dtype of each block: half_dtype for the top num_fp16_res resolutions, never below 8x8."""
    check_at_least(0, num_fp16_res=num_fp16_res)
    if half_dtype not in (torch.float16, torch.bfloat16):
        raise LowVRAMError(f"half_dtype={half_dtype!r} is no 16-bit type", "Use torch.float16 or torch.bfloat16.")
    if conv_clamp is not None and not conv_clamp > 0:
        raise LowVRAMError(f"conv_clamp={conv_clamp!r} is not positive", "Use 256, or None for no clamp.")
    sizes = [2**i for i in range(2, resolution.bit_length())]
    half = set(sizes[len(sizes) - min(num_fp16_res, len(sizes) - 1) :])  # all but 4x4 at most
    return {res: half_dtype if res in half else torch.float32 for res in sizes}


def check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LowVRAMError(f"{name}={value!r} is not a whole number of {least} or more", f"Set {name} to one.")


def check_images(images: Tensor, channels: int, resolution: int) -> None:
    """Raise LowVRAMError unless images are [B, channels, resolution, resolution], as a discriminator is built for."""
    if images.ndim != 4 or images.shape[1:] != (channels, resolution, resolution):
        raise LowVRAMError(
            f"images have shape {tuple(images.shape)}, not [B, {channels}, {resolution}, {resolution}]",
            "Resize them, or build the discriminator for their size.",
        )
