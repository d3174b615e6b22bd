"""Layers of the latent diffusion UNet (arXiv 2112.10752), whose residual blocks are those of DDPM (arXiv 2006.11239).

Module names are those of published checkpoints. Group norms compute in fp32, whatever the width of the input.
Legend: B batch, C channels, H W height and width, N = H W, L context tokens, D context width, E width of the embedding.
"""

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.kernels.swiglu import geglu
from lowvram.models.group_norm import GroupNorm

Module = TypeVar("Module", bound=nn.Module)

_TRANSFORMER_NORM_EPS = 1e-6  # of the group norm before a transformer; the residual blocks have a setting


def sinusoids(positions: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal embedding of positions [n]: float32 [n, dim] (arXiv 1706.03762, section 3.5).

    Angular frequencies fall from 1 geometrically towards 1 / 10000, which the last reaches where freq_shift is 1.
    Cosines come first if flip_sin_to_cos, else sines; an odd dim ends in a zero.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * torch.exp(index * (-math.log(10000) / (half - freq_shift)))  # [n, half]
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


class EmbeddingMLP(nn.Module):
    """Two linear layers with a SiLU between: [B, in] -> [B, E] in the weights' dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding added between them, round a skip connection.

    forward(x [B, C, H, W], embedding [B, E] after its SiLU, skip [B, C', H, W] or None) -> [B, out, H, W]. in_channels
    is C + C': the concatenation belongs to the block, so that who recomputes it keeps no copy of the two. The second
    convolution begins at zero: a new block passes its input on (Dhariwal and Nichol 2021, arXiv 2105.05233).
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, act="silu")
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, act="silu")
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.conv1(self.norm1(x))
        h = h + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class _Projections(nn.Module):
    """Queries of x, keys and values of context, attention in heads, an output projection.

    x [B, N, C], context [B, L, D], mask bool [B, 1, 1, L], True for what takes part -> [B, N, C].
    """

    def __init__(self, channels: int, context_dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def attend(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, N or L, C / heads]
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Attention(_Projections):
    """Attention within a transformer block: x [B, N, C] to itself, or to a context [B, L, D]. Returns [B, N, C]."""

    def __init__(self, channels: int, context_dim: int | None, heads: int) -> None:
        super().__init__(channels, channels if context_dim is None else context_dim, heads, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, x if context is None else context, mask)


class SpatialAttention(_Projections):
    """Self-attention over all pixels with its own norm and skip connection (DDPM): [B, C, H, W] -> the same."""

    def __init__(self, channels: int, heads: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, channels, heads, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps=eps)
        zeroed(self.to_out[0])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        return x + self.attend(tokens, tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class _GatedGELU(nn.Module):
    """GEGLU (Shazeer 2020, arXiv 2002.05202, section 2): a * gelu(b) of one projection to both."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to 4 C and back: [B, N, C] -> the same. `net.1` is the place of a dropout, which has no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_GatedGELU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a layer norm and round a skip connection.

    forward(x [B, N, C], context [B, L, D], mask bool [B, 1, 1, L] or None) -> [B, N, C].
    """

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, None, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels, round a skip connection (LDM, appendix E.2.1); its output begins at zero.

    forward(x [B, C, H, W], context [B, L, D], mask bool [B, 1, 1, L] or None) -> [B, C, H, W]. linear: the projections
    in and out are linear layers instead of 1x1 convolutions, which differ only in the shape of their weights.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, *, depth: int, linear: bool, groups: int) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=_TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads) for _ in range(depth)])
        self.proj_out = zeroed(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, N, C]
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    """Convolution of stride 2: [B, C, H, W] -> [B, C, H / 2, W / 2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution: [B, C, H, W] -> [B, C, 2 H, 2 W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The layers of one level, or of the middle: residual blocks, attention after each or some, a sampler."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[nn.Module], *, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        width = resnets[-1].conv2.out_channels
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        *,
        leave: list[Tensor] | None = None,
        take: list[Tensor] | None = None,
    ) -> Tensor:
        """leave: gets the output of each layer. take: each layer concatenates its last, and removes it."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(x, embedding) if take is None else resnet(x, embedding, take.pop())
            if isinstance(attention, SpatialTransformer):
                x = attention(x, context, mask)
            elif attention is not None:
                x = attention(x)
            if leave is not None:
                leave.append(x)
        for sampler in (*self.downsamplers, *self.upsamplers):
            x = sampler(x)
            if leave is not None:
                leave.append(x)
        return x

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """See `UNet.blocks`."""
        for i, (resnet, attention) in enumerate(zip_longest(self.resnets, self.attentions)):
            yield f"resnets.{i}", resnet
            if isinstance(attention, SpatialTransformer) and len(attention.transformer_blocks) > 1:
                for j, block in enumerate(attention.transformer_blocks):
                    yield f"attentions.{i}.transformer_blocks.{j}", block
            elif attention is not None:
                yield f"attentions.{i}", attention
        for name in ("downsamplers", "upsamplers"):
            yield from ((f"{name}.{i}", sampler) for i, sampler in enumerate(getattr(self, name)))


def zeroed(module: Module) -> Module:
    """The module with all its parameters zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
