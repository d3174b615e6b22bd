"""Layers of the latent-diffusion autoencoder (arXiv 2112.10752), which are VQGAN's (arXiv 2012.09841, appendix A).

Names of modules are those of the keys in published `vae` folders. B images, C channels, H x W pixels.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.models.group_norm import GroupNorm

# What attention was called in folders written before 2023.
_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ResNetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), without a time embedding. [B, in, H, W] -> [B, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, act="silu")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, act="silu")
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """x + self-attention of one head over all pixels. [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_load_state_dict_pre_hook(_rename_old_keys)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H W, C]
        q, k, v = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # [B, 1, H W, C]
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


def _rename_old_keys(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Bring the attention keys of old folders, in place, to their present names: linear layers or 1x1 convolutions."""
    for old, new in _OLD_ATTENTION_NAMES.items():
        for kind in ("weight", "bias"):
            tensor = state.pop(f"{prefix}{old}.{kind}", None)
            if tensor is not None:
                state[f"{prefix}{new}.{kind}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor


class Downsampler(nn.Module):
    """3x3 convolution with stride 2, padded below and on the right alone. [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsampler(nn.Module):
    """Nearest neighbour by 2, then a 3x3 convolution. [B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the latents' resolution. [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResNetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        x = self.resnets[1](x)
        return x

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Its blocks in the order they run."""
        yield "resnets.0", self.resnets[0]
        for i, attention in enumerate(self.attentions):
            yield f"attentions.{i}", attention
        yield "resnets.1", self.resnets[1]


class Stage(nn.Module):
    """Residual blocks at one resolution, then a sampler where `sampler` names one ("downsamplers", "upsamplers")."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, sampler: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResNetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers)
        )
        self.sampler = sampler
        if sampler is not None:
            kind = Downsampler if sampler == "downsamplers" else Upsampler
            self.add_module(sampler, nn.ModuleList([kind(out_channels)]))

    def forward(self, x: Tensor) -> Tensor:
        for _, part in self.parts():
            x = part(x)
        return x

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Its blocks in the order they run."""
        for i, resnet in enumerate(self.resnets):
            yield f"resnets.{i}", resnet
        if self.sampler is not None:
            yield f"{self.sampler}.0", self.get_submodule(f"{self.sampler}.0")


class Encoder(nn.Module):
    """Images [B, in, H, W] -> moments before `quant_conv`, [B, 2 latent, H / f, W / f]."""

    def __init__(
        self, in_channels: int, moments: int, channels: tuple[int, ...], layers: int, groups: int, *, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        widths = (channels[0], *channels)
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            Stage(widths[i], width, layers, groups, sampler="downsamplers" if i < last else None)
            for i, width in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], groups, attention=attention)
        self.conv_norm_out = GroupNorm(groups, channels[-1], act="silu")
        self.conv_out = nn.Conv2d(channels[-1], moments, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for stage in self.down_blocks:
            x = stage(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Its blocks in the order they run."""
        for i, stage in enumerate(self.down_blocks):
            assert isinstance(stage, Stage)
            yield from ((f"down_blocks.{i}.{name}", part) for name, part in stage.parts())
        yield from ((f"mid_block.{name}", part) for name, part in self.mid_block.parts())


class Decoder(nn.Module):
    """Latents after `post_quant_conv`, [B, latent, h, w] -> images [B, out, f h, f w].

    channels: from the images' resolution to the latents', as in the encoder. Each stage has one residual block more.
    """

    def __init__(
        self, latent_channels: int, out: int, channels: tuple[int, ...], layers: int, groups: int, *, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        self.mid_block = MidBlock(channels[-1], groups, attention=attention)
        widths = (channels[-1], *reversed(channels))
        last = len(channels) - 1
        self.up_blocks = nn.ModuleList(
            Stage(widths[i], widths[i + 1], layers + 1, groups, sampler="upsamplers" if i < last else None)
            for i in range(len(channels))
        )
        self.conv_norm_out = GroupNorm(groups, channels[0], act="silu")
        self.conv_out = nn.Conv2d(channels[0], out, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for stage in self.up_blocks:
            x = stage(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Its blocks in the order they run."""
        yield from ((f"mid_block.{name}", part) for name, part in self.mid_block.parts())
        for i, stage in enumerate(self.up_blocks):
            assert isinstance(stage, Stage)
            yield from ((f"up_blocks.{i}.{name}", part) for name, part in stage.parts())
