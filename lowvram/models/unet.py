"""The UNet of latent diffusion: Stable Diffusion 1.x, 2.x and XL, and smaller ones with classes or without condition.

Papers: latent diffusion arXiv 2112.10752, SDXL arXiv 2307.01952. Settings are named as in the `config.json` of
diffusers folders, and state-dict keys are those of the weights beside it. Plain networks: nothing here saves memory.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.models.group_norm import GroupNorm
from lowvram.models.unet_layers import (
    EmbeddingMLP,
    ResnetBlock,
    SpatialAttention,
    SpatialTransformer,
    Stage,
    sinusoids,
    zeroed,
)

_Kind = Literal["none", "plain", "cross"]
_DOWN: dict[str, _Kind] = {"DownBlock2D": "none", "AttnDownBlock2D": "plain", "CrossAttnDownBlock2D": "cross"}
_UP: dict[str, _Kind] = {"UpBlock2D": "none", "AttnUpBlock2D": "plain", "CrossAttnUpBlock2D": "cross"}
_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

# What a config.json that leaves a setting out means by that, where it is not what UNet(...) means.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"cross_attention_dim": 1280},
    "UNet2DModel": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
        "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "cross_attention_dim": None,
    },
}
# Settings that change no number here. `upcast_attention` is met: fused attention adds up in fp32 anyway.
_HARMLESS = ("sample_size", "upcast_attention", "num_train_timesteps", "addition_embed_type_num_heads")
# Settings of other networks, and the values that they have in ours.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "attn_norm_num_groups": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "downsample_type": ("conv",),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upsample_type": ("conv",),
}
_OTHER_NETWORK = "It changes the network: use weights of Stable Diffusion 1.x, 2.x or XL, or of a UNet made here."


class UNet(nn.Module):
    """Predicts what its objective says (noise, v, ...) of noisy latents; the final convolution begins at zero.

    Args:
        in_channels, out_channels: of the latents.
        block_out_channels: for each level, the finest first; each level but the last halves height and width.
        layers_per_block: residual blocks on the way down, for all levels or each; one more on the way up.
        down_block_types: DownBlock2D (no attention), AttnDownBlock2D (over pixels) or CrossAttnDownBlock2D
            (transformers that read the context) for each level; None: attention on all but the coarsest.
        up_block_types: the like, UpBlock2D and so on, the coarsest first.
        mid_block_type: UNetMidBlock2DCrossAttn; UNetMidBlock2D, one residual block; None, nothing. With
            cross_attention_dim=None: two residual blocks and, with add_attention, attention over pixels between them.
        attention_head_dim: as in published configurations the NUMBER of heads of transformers, and the width of a head
            of attention over pixels (None: one head); for all levels or each.
        cross_attention_dim: width D of the context; None: a network without context.
        transformer_layers_per_block: for all levels or each.
        num_class_embeds: rows of a class embedding, among them one for "no class" if guidance is wanted.
        addition_embed_type: "text_time" for SDXL's pooled text and sizes; its sinusoids have addition_time_embed_dim
            channels, and with the pooled text they have projection_class_embeddings_input_dim.
        norm_num_groups, norm_eps: of the group norms. flip_sin_to_cos, freq_shift: see `sinusoids`.

    Raises:
        LowVRAMError: settings that do not fit one another.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        down_block_types: Sequence[str] | None = None,
        up_block_types: Sequence[str] | None = None,
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        add_attention: bool = True,
        attention_head_dim: int | Sequence[int] | None = 8,
        cross_attention_dim: int | None = 768,
        transformer_layers_per_block: int | Sequence[int] = 1,
        use_linear_projection: bool = False,
        num_class_embeds: int | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
    ) -> None:
        super().__init__()
        channels = _channels(block_out_channels, norm_num_groups)
        levels = len(channels)
        context_dim = None if cross_attention_dim is None else _width("cross_attention_dim", cross_attention_dim)
        layout = _Layout(
            channels=channels,
            layers=_for_levels("layers_per_block", layers_per_block, levels),
            depths=_for_levels("transformer_layers_per_block", transformer_layers_per_block, levels),
            heads=_heads(attention_head_dim, levels),
            context_dim=context_dim,
            linear=use_linear_projection,
            groups=norm_num_groups,
            eps=norm_eps,
        )
        self.in_channels, self.cross_attention_dim = in_channels, context_dim
        self.factor = 2 ** (levels - 1)  # height and width must be multiples of it
        self.addition_time_embed_dim = addition_time_embed_dim
        self.flip_sin_to_cos, self.freq_shift = flip_sin_to_cos, freq_shift

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(channels[0], layout.embedding_dim)
        self.class_embedding = (
            None if num_class_embeds is None else nn.Embedding(num_class_embeds, layout.embedding_dim)
        )
        added = (addition_embed_type, addition_time_embed_dim, projection_class_embeddings_input_dim)
        self.add_embedding = _add_embedding(*added, layout.embedding_dim)
        self.down_blocks = layout.down(_kinds("down_block_types", down_block_types, _DOWN, levels, context_dim))
        self.mid_block = layout.mid(mid_block_type, add_attention)
        self.up_blocks = layout.up(_kinds("up_block_types", up_block_types, _UP, levels, context_dim))
        self.reads_context = any(isinstance(module, SpatialTransformer) for module in self.modules())
        self.conv_norm_out = GroupNorm(norm_num_groups, channels[0], eps=norm_eps, act="silu")
        self.conv_out = zeroed(nn.Conv2d(channels[0], out_channels, 3, padding=1))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "UNet":
        """The network of a diffusers folder's config.json (UNet2DConditionModel, or UNet2DModel), weights not loaded.

        Raises:
            LowVRAMError: a setting asks for a network that this is not, or is not known.
        """
        name = config.get("_class_name", "UNet2DConditionModel")
        if name not in _DEFAULTS:
            raise LowVRAMError(
                f"A configuration of {name!r} is not one of a UNet.", f"Use one of {', '.join(_DEFAULTS)}."
            )
        names = inspect.signature(cls.__init__).parameters
        settings = dict(_DEFAULTS[name])
        for key, value in config.items():
            if key in names:
                settings[key] = value
            elif key.startswith("_") or key in _HARMLESS:
                continue
            elif key not in _FIXED:
                if value not in (None, False):  # what a newer version adds is off unless it says otherwise
                    raise LowVRAMError(f"{key}={value!r} of the UNet's configuration is not known.", _OTHER_NETWORK)
            elif _single(value) not in _FIXED[key]:
                raise LowVRAMError(f"{key}={value!r} of the UNet's configuration is not supported.", _OTHER_NETWORK)
        return cls(**settings)

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in the order they run: residual blocks, attention layers and samplers.

        A spatial transformer of one transformer block is a block; of a deeper one each transformer block is.
        """
        stages = [(f"down_blocks.{i}", stage) for i, stage in enumerate(self.down_blocks)]
        stages += [("mid_block", self.mid_block)] if self.mid_block is not None else []
        stages += [(f"up_blocks.{i}", stage) for i, stage in enumerate(self.up_blocks)]
        return {f"{name}.{below}": block for name, stage in stages for below, block in cast(Stage, stage).blocks()}

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
        """x [B, in, H, W] at time [B] or scalar, float 0..1000 -> [B, out, H, W] in x's dtype.

        labels: int64 [B], rows of the class embedding. context [B, L, D]. context_mask: bool [B, L], True for tokens
        that are read, at least one in each row. pooled [B, P] and size_ids [B, 6] (height and width of the original,
        top and left of the crop, height and width of the target): SDXL's additions.

        Raises:
            LowVRAMError: a shape that does not fit, a missing condition, or one that the network has no use for.
        """
        self._check(x, time, context, context_mask)
        dtype = self.conv_in.weight.dtype
        embedding = F.silu(self._embedding(len(x), time.to(x.device), labels, pooled, size_ids))  # [B, E]
        context = None if context is None else context.to(dtype)
        mask = None if context_mask is None else context_mask.bool()[:, None, None]  # [B, 1, 1, L]
        h = self.conv_in(x.to(dtype))
        skips = [h]
        for stage in self.down_blocks:
            h = stage(h, embedding, context, mask, leave=skips)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding, context, mask)
        for stage in self.up_blocks:
            h = stage(h, embedding, context, mask, take=skips)
        return self.conv_out(self.conv_norm_out(h)).to(x.dtype)

    def _embedding(
        self, batch: int, time: Tensor, labels: Tensor | None, pooled: Tensor | None, size_ids: Tensor | None
    ) -> Tensor:
        """The embedding of everything but the context: [B, E]."""
        kind: dict[str, Any] = {"flip_sin_to_cos": self.flip_sin_to_cos, "freq_shift": self.freq_shift}
        waves = sinusoids(time.reshape(-1), self.time_embedding.linear_1.in_features, **kind)
        embedding = self.time_embedding(waves).expand(batch, -1)
        _check_use("labels", labels, self.class_embedding is not None, "class embedding (num_class_embeds)")
        if self.class_embedding is not None and labels is not None:
            if labels.shape != (batch,):
                raise LowVRAMError(
                    f"labels has shape {list(labels.shape)}, not [{batch}].", "Give a class to each sample."
                )
            embedding = embedding + self.class_embedding(labels)
        for name, value in (("pooled", pooled), ("size_ids", size_ids)):
            _check_use(name, value, self.add_embedding is not None, "added embedding (addition_embed_type)")
        if self.add_embedding is not None and pooled is not None and size_ids is not None:
            sizes = sinusoids(size_ids.flatten(), self.addition_time_embed_dim or 0, **kind).reshape(batch, -1)
            added = torch.cat([pooled.float(), sizes], dim=1)  # [B, P + 6 * channels of a sinusoid]
            wanted = self.add_embedding.linear_1.in_features
            if added.shape[1] != wanted:
                raise LowVRAMError(
                    f"pooled {list(pooled.shape)} and size_ids {list(size_ids.shape)} make {added.shape[1]} channels, "
                    f"not projection_class_embeddings_input_dim={wanted}.",
                    "Use the text encoder that belongs to this UNet, and six sizes for each image.",
                )
            embedding = embedding + self.add_embedding(added)
        return embedding

    def _check(self, x: Tensor, time: Tensor, context: Tensor | None, mask: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise LowVRAMError(
                f"x has shape {list(x.shape)}, not [B, {self.in_channels}, H, W].", "Give it latents of this network."
            )
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise LowVRAMError(
                f"Latents of {x.shape[2]}x{x.shape[3]} can't be halved {len(self.down_blocks) - 1} times.",
                f"Use a height and a width that are multiples of {self.factor}.",
            )
        if time.numel() not in (1, len(x)):
            raise LowVRAMError(f"time has {time.numel()} values for {len(x)} samples.", "Give one, or one for each.")
        _check_use("context", context, self.reads_context, "cross-attention")
        if context is None:
            if mask is not None:
                _check_use("context_mask", mask, False, "cross-attention")
            return
        if context.dim() != 3 or context.shape[0] != len(x) or context.shape[2] != self.cross_attention_dim:
            raise LowVRAMError(
                f"context has shape {list(context.shape)}, not [{len(x)}, L, {self.cross_attention_dim}].",
                "Use the text encoder that belongs to this UNet, and one row for each sample.",
            )
        if mask is not None and mask.shape != context.shape[:2]:
            raise LowVRAMError(
                f"context_mask has shape {list(mask.shape)}, not {list(context.shape[:2])}.",
                "Give a bool for each token of the context.",
            )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The widths and depths of all levels, the finest first, and what is made of them.

    heads: the number of heads of transformers, but the width of a head of attention over pixels.
    """

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int | None, ...]
    context_dim: int | None
    linear: bool
    groups: int
    eps: float

    @property
    def embedding_dim(self) -> int:
        return 4 * self.channels[0]

    def down(self, kinds: Sequence[_Kind]) -> nn.ModuleList:
        stages, before = nn.ModuleList(), self.channels[0]
        for level, width in enumerate(self.channels):
            resnets = [self._resnet(before if i == 0 else width, width) for i in range(self.layers[level])]
            attentions = self._attentions(kinds[level], level, self.heads[level], len(resnets))
            stages.append(Stage(resnets, attentions, down=level < len(self.channels) - 1))
            before = width
        return stages

    def mid(self, block_type: str | None, add_attention: bool) -> Stage | None:
        if block_type not in _MID:
            raise LowVRAMError(f"mid_block_type={block_type!r} is not known.", f"Use one of {_MID}.")
        if block_type is None:
            return None
        width = self.channels[-1]
        if self.context_dim is None:
            kind: _Kind = "plain" if add_attention else "none"
        elif block_type == "UNetMidBlock2DCrossAttn":
            kind = "cross"
        else:
            return Stage([self._resnet(width, width)], [])
        resnets = [self._resnet(width, width) for _ in range(2)]
        return Stage(resnets, self._attentions(kind, -1, self.heads[-1], 1))

    def up(self, kinds: Sequence[_Kind]) -> nn.ModuleList:
        skips = [self.channels[0]]  # what the way down left
        for level, width in enumerate(self.channels):
            skips += [width] * (self.layers[level] + (level < len(self.channels) - 1))
        stages, before = nn.ModuleList(), self.channels[-1]
        for i, level in enumerate(reversed(range(len(self.channels)))):
            resnets, width = [], self.channels[level]
            for _ in range(self.layers[level] + 1):
                resnets.append(self._resnet(before + skips.pop(), width))
                before = width
            # Published code takes widths of heads, but not numbers of heads, in the order of the way down here too.
            attentions = self._attentions(kinds[i], level, self.heads[i], len(resnets))
            stages.append(Stage(resnets, attentions, up=level > 0))
        return stages

    def _resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(in_channels, out_channels, self.embedding_dim, groups=self.groups, eps=self.eps)

    def _attentions(self, kind: _Kind, level: int, head_dim: int | None, count: int) -> list[nn.Module]:
        width, heads, context_dim = self.channels[level], self.heads[level], self.context_dim
        if kind == "none":
            return []
        if kind == "plain":
            head_dim = width if head_dim is None else head_dim
            _check_divides("the width of a head of attention over pixels", head_dim, width)
            return [SpatialAttention(width, width // head_dim, groups=self.groups, eps=self.eps) for _ in range(count)]
        if context_dim is None:
            raise LowVRAMError(
                "A cross-attention block with cross_attention_dim=None has nothing to attend to.",
                "Use AttnDownBlock2D and AttnUpBlock2D, or set cross_attention_dim.",
            )
        if heads is None:
            raise LowVRAMError("attention_head_dim=None for transformers.", "Set it to their number of heads.")
        _check_divides("the number of heads of transformers", heads, width)
        settings: dict[str, Any] = {"depth": self.depths[level], "linear": self.linear, "groups": self.groups}
        return [SpatialTransformer(width, context_dim, heads, **settings) for _ in range(count)]


def _add_embedding(
    kind: str | None, channels: int | None, input_dim: int | None, embedding_dim: int
) -> EmbeddingMLP | None:
    if kind is None:
        return None
    if kind != "text_time":
        raise LowVRAMError(f"addition_embed_type={kind!r} is not supported.", "Use text_time or None.")
    if not channels or not input_dim:
        raise LowVRAMError(
            f"addition_embed_type=text_time with addition_time_embed_dim={channels} and "
            f"projection_class_embeddings_input_dim={input_dim}.",
            "Set both; SDXL has 256 and 2816.",
        )
    return EmbeddingMLP(input_dim, embedding_dim)


def _channels(channels: Sequence[int], groups: int) -> tuple[int, ...]:
    channels = tuple(channels)
    if not channels or not groups or any(width < 1 or width % groups for width in channels):
        raise LowVRAMError(
            f"norm_num_groups={groups} does not divide block_out_channels={channels}.",
            "Use channels that are multiples of the number of groups.",
        )
    return channels


def _for_levels(name: str, value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels or not all(isinstance(number, int) and number > 0 for number in values):
        raise LowVRAMError(
            f"{name}={value!r} does not suit {levels} levels.", f"Give a whole number from 1, or {levels} of them."
        )
    return values


def _heads(value: int | Sequence[int] | None, levels: int) -> tuple[int | None, ...]:
    return (None,) * levels if value is None else _for_levels("attention_head_dim", value, levels)


def _kinds(
    name: str, types: Sequence[str] | None, known: dict[str, _Kind], levels: int, context_dim: int | None
) -> list[_Kind]:
    """The attention of each level in the order of `types`; for None attention on all but the coarsest."""
    if types is None:
        kind: _Kind = "plain" if context_dim is None else "cross"
        kinds: list[_Kind] = [kind] * (levels - 1)
        return [*kinds, "none"] if known is _DOWN else ["none", *kinds]
    if len(types) != levels or any(block_type not in known for block_type in types):
        raise LowVRAMError(
            f"{name}={list(types)} does not suit {levels} levels.", f"Give {levels} of {', '.join(known)}."
        )
    return [known[block_type] for block_type in types]


def _check_divides(meaning: str, divisor: int, channels: int) -> None:
    if channels % divisor:
        raise LowVRAMError(
            f"attention_head_dim={divisor} does not divide {channels} channels.",
            f"It is {meaning}: use a divisor of each level's channels.",
        )


def _check_use(name: str, value: Tensor | None, used: bool, reader: str) -> None:
    """Raise LowVRAMError where a condition is missing, or given to a network that can't use it."""
    if used and value is None:
        raise LowVRAMError(f"This UNet needs {name}, which is None: it has {reader}.", f"Give it {name}.")
    if value is not None and not used:
        raise LowVRAMError(f"This UNet has no use for {name}: it has no {reader}.", f"Leave {name} out.")


def _width(name: str, value: int | Sequence[int]) -> int:
    """A whole number from 1, also as a list of equal ones."""
    width = _single(value)
    if not isinstance(width, int) or width < 1:
        raise LowVRAMError(f"{name}={value!r} is not a whole number from 1.", "Set it to one, the same for all levels.")
    return width


def _single(value: Any) -> Any:
    """The value that all elements of a list have, if they have one."""
    return value[0] if isinstance(value, list | tuple) and value and all(v == value[0] for v in value) else value
