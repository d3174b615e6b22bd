"""Diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748) with adaLN-zero, and with what small transformers
gained since: RMSNorm (arXiv 1910.07467), normalised queries and keys (arXiv 2302.05442, section 2), rotary positions in
two dimensions (arXiv 2104.09864, and 2403.13298 for images) and SwiGLU (arXiv 2002.05202).

Legend: B batch, C channels, H and W of the latents, h = H / patch and w = W / patch, T = h w tokens, D width,
d width of a head, L tokens of the text.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.kernels.adaln import adaln, gated_residual
from lowvram.kernels.rms_norm import rms_norm
from lowvram.kernels.rms_norm_rotate import rms_norm_rotate
from lowvram.kernels.swiglu import swiglu

NORM_EPS = 1e-6
ROTARY_BASE = 100.0  # for images, whose axes are tens of tokens long (arXiv 2403.13298, section 3.2)
SINUSOIDS = 256  # of a number that is embedded: time, sizes
HIDDEN_MULTIPLE = 64  # widths that fill the tiles of a matrix product


def sinusoids(x: Tensor, features: int = SINUSOIDS) -> Tensor:
    """Cosines and sines of x at geometric frequencies from 1 down to nearly 1 / 10000: float32 [*x.shape, features]."""
    half = features // 2
    frequencies = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000.0) / half))
    angles = x.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotations(height: int, width: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines for each token of an image, row by row: float32 [2, height * width, head_dim / 2].

    The first half of the angles grows with the row, the second with the column. What two tokens make of each other thus
    depends on the rows and columns between them, and on no size of the image.
    """
    quarter = head_dim // 4
    frequencies = ROTARY_BASE ** (-torch.arange(quarter, device=device) / quarter)
    rows = torch.arange(height, device=device)[:, None] * frequencies  # [h, d / 4]
    columns = torch.arange(width, device=device)[:, None] * frequencies  # [w, d / 4]
    angles = torch.cat(
        [rows[:, None].expand(height, width, quarter), columns[None].expand(height, width, quarter)], dim=-1
    ).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()])


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Of a gated MLP with the parameters of a plain one of width mlp_ratio * dim (arXiv 2002.05202, section 3.1)."""
    return HIDDEN_MULTIPLE * math.ceil(2 * mlp_ratio * dim / 3 / HIDDEN_MULTIPLE)


def check_heads(dim: int, heads: int) -> None:
    """Raise LowVRAMError unless `heads` heads share `dim`, each with a multiple of 4 (two axes of pairs)."""
    if dim < 1 or heads < 1 or dim % (4 * heads):
        raise LowVRAMError(
            f"dim={dim} with heads={heads}: a head's width, dim / heads, must be a multiple of 4.",
            f"Use dim={max(1, round(dim / (4 * heads or 1))) * 4 * max(1, heads)}, or another number of heads.",
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in fp32, result in x's dtype.

    rotation: as `rotations` gives it, to turn the pairs (i, i + d / 2) of x [..., T, d] by; or None.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        if rotation is None:
            return rms_norm(x, self.weight, NORM_EPS)
        return rms_norm_rotate(x, self.weight, rotation, NORM_EPS)


class Attention(nn.Module):
    """Self-attention over x [B, T, D] with normalised queries and keys.

    rotation: as `rotations` gives it, or None. mask: bool [B, T], True for tokens that are looked at, or None.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(dim // heads)
        self.k_norm = RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, d]
        return self.out(_attend(self.q_norm(q, rotation), self.k_norm(k, rotation), v, mask))


class CrossAttention(nn.Module):
    """Attention of x [B, T, D] to context [B, L, context_dim], zero at initialisation.

    mask: bool [B, L], True for tokens that are looked at, or None. No biases: a context of zeros adds zero.
    """

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.q_norm = RMSNorm(dim // heads)
        self.k_norm = RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, d]
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, L, d]
        return self.out(_attend(self.q_norm(q), self.k_norm(k), v, mask))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, heads, T, d] to [B, T, heads * d]. Norms may have come out wider than v under autocast."""
    attn_mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=attn_mask)
    return out.transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), [B, T, D] to [B, T, D]; one matrix holds gate and up."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class DiTBlock(nn.Module):
    """Self-attention, cross-attention where there is a context, and MLP. At initialisation the identity.

    x [B, T, D]; condition [B, D], after its SiLU; rotation [2, T, d / 2]; context [B, L, context_dim]; mask [B, L].
    """

    def __init__(self, dim: int, heads: int, hidden: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        if context_dim is not None:
            self.cross_norm = RMSNorm(dim)
            self.cross_attention = CrossAttention(dim, heads, context_dim)
        self.mlp = SwiGLU(dim, hidden)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Tensor, condition: Tensor, rotation: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = gated_residual(x, self.attention(adaln(x, scale1, shift1, NORM_EPS), rotation), gate1)
        if context is not None:
            x = x + self.cross_attention(self.cross_norm(x), context, mask)
        return gated_residual(x, self.mlp(adaln(x, scale2, shift2, NORM_EPS)), gate2)


class DiT(nn.Module):
    """Noise (or velocity) predictor over latents of any height and width that `patch` divides.

    Args:
        in_channels: of the latents. out_channels: of the prediction; None: as many.
        patch: pixels of the latents along one side of a token.
        dim, depth, heads: width, blocks, heads of each attention; dim / heads is a multiple of 4.
        num_classes: rows of the class embedding, the null class among them; None: no classes.
        context_dim: width of the text's tokens, to which each block attends; None: no text.
        pooled_dim: width of one vector for the whole text, added to the condition; None: none.
        size_conditioning: takes six sizes for each sample: original, crop and target (arXiv 2307.01952, section 2.2).
        mlp_ratio: see `hidden_width`.

    Raises:
        LowVRAMError: a size is too small, or heads don't fit the width.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int | None = None,
        patch: int = 2,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        num_classes: int | None = None,
        context_dim: int | None = None,
        pooled_dim: int | None = None,
        size_conditioning: bool = False,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        counts: dict[str, int | None] = {"in_channels": in_channels, "out_channels": out_channels, "patch": patch}
        counts |= {"depth": depth, "num_classes": num_classes, "context_dim": context_dim, "pooled_dim": pooled_dim}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise LowVRAMError(f"{name}={value} is too small for a DiT.", "Use 1 or more, or leave it out.")
        if mlp_ratio <= 0:
            raise LowVRAMError(f"mlp_ratio={mlp_ratio} is not positive.", "Use 4, the published ratio.")
        check_heads(dim, heads)
        self.in_channels, self.out_channels, self.patch = in_channels, out_channels, patch
        self.head_dim = dim // heads
        self.num_classes, self.context_dim, self.pooled_dim = num_classes, context_dim, pooled_dim
        self.size_conditioning = size_conditioning

        self.patch_embed = nn.Linear(in_channels * patch**2, dim)
        self.time_embed = nn.Sequential(nn.Linear(SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim))
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes, dim)
        if context_dim is not None:
            self.context_norm = RMSNorm(context_dim)
        if pooled_dim is not None:
            self.pooled_embed = nn.Sequential(nn.Linear(pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        if size_conditioning:
            self.size_embed = nn.Sequential(nn.Linear(6 * SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim))
        hidden = hidden_width(dim, mlp_ratio)
        self.layers = nn.ModuleList(DiTBlock(dim, heads, hidden, context_dim) for _ in range(depth))
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, out_channels * patch**2)
        self._initialise()

    def blocks(self) -> dict[str, nn.Module]:
        """The transformer blocks by name: the grain of recomputation and streaming."""
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        *,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
    ) -> Tensor:
        """The prediction [B, out_channels, H, W] in x's dtype; the arithmetic is in that of the weights.

        x: [B, C, H, W] of any float dtype. time: [B] or a scalar, 0 to 1000. labels: int64 [B] below num_classes.
        context: [B, L, context_dim]. context_mask: bool [B, L], True for tokens that count; a sample where none does
        attends to nothing. pooled: [B, pooled_dim]. size_ids: [B, 6] in pixels.

        Raises:
            LowVRAMError: a shape does not fit, or a condition is missing, or given to a network without it.
        """
        self._check_image(x)
        batch, _, height, width = x.shape
        self._check_conditions(batch, labels, context, context_mask, pooled, size_ids)
        dtype = self.patch_embed.weight.dtype
        condition = F.silu(self._condition(time, batch, labels, pooled, size_ids))  # [B, D]
        if context is not None:
            context, context_mask = self._readable(context.to(dtype), context_mask)
        rotation = rotations(height // self.patch, width // self.patch, self.head_dim, x.device)

        tokens = self.patch_embed(self._patches(x.to(dtype)))  # [B, T, D]
        for layer in self.layers:
            tokens = layer(tokens, condition, rotation, context, context_mask)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, dim=-1)
        tokens = self.final(adaln(tokens, scale, shift, NORM_EPS))  # [B, T, C patch^2]
        return self._image(tokens, height, width).to(x.dtype)

    def _condition(
        self, time: Tensor, batch: int, labels: Tensor | None, pooled: Tensor | None, size_ids: Tensor | None
    ) -> Tensor:
        """The sum of all that the whole image is conditioned on, [B, D]."""
        if time.numel() not in (1, batch) or time.dim() > 1:
            raise LowVRAMError(f"time has shape {list(time.shape)} for {batch} images.", f"Give [{batch}] or a scalar.")
        dtype, device = self.patch_embed.weight.dtype, self.patch_embed.weight.device
        condition: Tensor = self.time_embed(sinusoids(time.to(device).expand(batch)).to(dtype))
        if labels is not None:
            condition = condition + self.class_embedding(labels)
        if pooled is not None:
            condition = condition + self.pooled_embed(pooled.to(dtype))
        if size_ids is not None:
            condition = condition + self.size_embed(sinusoids(size_ids).flatten(1).to(dtype))
        return condition

    def _readable(self, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The context normalised, with zeros for samples that have no token: to attend to nothing at all gives NaN."""
        context = self.context_norm(context)
        if mask is None:
            return context, None
        some = mask.any(dim=1, keepdim=True)  # [B, 1]
        return torch.where(some[..., None], context, 0.0), mask | ~some

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, T, C patch^2]: rows of patches, each by channel, row and column."""
        batch, channels, height, width = x.shape
        p = self.patch
        x = x.reshape(batch, channels, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)

    def _image(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `_patches`, [B, out_channels, H, W]."""
        p = self.patch
        x = tokens.reshape(len(tokens), height // p, width // p, self.out_channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), self.out_channels, height, width)

    def _initialise(self) -> None:
        """Xavier for matrices; what adds to the stream, and the output, begin at zero (adaLN-zero, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in self.time_embed:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        silent = [self.final_modulation, self.final]
        for module in self.modules():
            if isinstance(module, DiTBlock):
                silent.append(module.modulation)
            elif isinstance(module, CrossAttention):
                silent.append(module.out)
        for linear in silent:
            nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _check_image(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise LowVRAMError(
                f"x has shape {list(x.shape)}, not [B, {self.in_channels}, H, W].",
                f"Give latents of {self.in_channels} channels, or build the DiT with in_channels of yours.",
            )
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch or not x.numel():
            raise LowVRAMError(
                f"latents of {height}x{width} can't be cut into patches of {self.patch}x{self.patch}.",
                f"Use a height and a width that are multiples of {self.patch}.",
            )

    def _check_conditions(
        self,
        batch: int,
        labels: Tensor | None,
        context: Tensor | None,
        mask: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
    ) -> None:
        _check_condition("labels", labels, self.num_classes is not None, "num_classes", [batch])
        _check_condition("pooled", pooled, self.pooled_dim is not None, "pooled_dim", [batch, self.pooled_dim])
        _check_condition("size_ids", size_ids, self.size_conditioning, "size_conditioning", [batch, 6])
        length = context.shape[1] if context is not None and context.dim() == 3 else None
        expected = [batch, length, self.context_dim]
        _check_condition("context", context, self.context_dim is not None, "context_dim", expected)
        if mask is None:
            return
        if context is None:
            raise LowVRAMError("context_mask is given without a context.", "Give both, or neither.")
        if mask.dtype != torch.bool or list(mask.shape) != [batch, length]:
            raise LowVRAMError(
                f"context_mask is {mask.dtype} {list(mask.shape)}, not torch.bool [{batch}, {length}].",
                "Give True for each token that counts.",
            )


def _check_condition(name: str, value: Tensor | None, wanted: bool, setting: str, shape: list[int | None]) -> None:
    if value is None and wanted:
        raise LowVRAMError(f"this DiT was built with {setting}, but got no {name}.", f"Give {name}.")
    if value is not None and not wanted:
        raise LowVRAMError(
            f"this DiT was built without {setting}, but got {name}.", f"Leave {name} out, or set {setting}."
        )
    if value is not None and list(value.shape) != shape:
        expected = "[" + ", ".join("L" if n is None else str(n) for n in shape) + "]"
        raise LowVRAMError(f"{name} has shape {list(value.shape)}, not {expected}.", f"Give {name} of that shape.")
