"""Names of the UNet: those of a folder, and latent diffusion's (arXiv 2112.10752), which a single file has.

Latent diffusion counts its blocks through all levels: a level's residual blocks, each with its attention, then its
downsampler are input_blocks.1, 2, 3, ...; on the way up the upsampler belongs to the last residual block of a level.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lowvram.weights.pipeline_keys import Piece, inverse, renamed

_WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class _Levels:
    """layers: residual blocks of each level on the way down, the finest first. attention_up: whether levels on the way
    up have attention, the coarsest first. attention_mid: whether the middle has."""

    layers: tuple[int, ...]
    attention_up: tuple[bool, ...]
    attention_mid: bool

    def modules(self) -> dict[str, str]:
        """Every module with tensors, by its name in a folder: its name in a single file."""
        out = dict(_WHOLE)
        number = 0
        for level, layers in enumerate(self.layers):
            for layer in range(layers):
                number += 1
                _add_block(out, f"down_blocks.{level}", layer, f"input_blocks.{number}")
            number += 1
            out[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        _add_residual(out, "mid_block.resnets.0", "middle_block.0")
        if self.attention_mid:
            out["mid_block.attentions.0"] = "middle_block.1"
        _add_residual(out, "mid_block.resnets.1", f"middle_block.{1 + self.attention_mid}")
        number = -1
        for level, layers in enumerate(reversed(self.layers)):
            for layer in range(layers + 1):
                number += 1
                _add_block(out, f"up_blocks.{level}", layer, f"output_blocks.{number}")
            place = 1 + self.attention_up[level]
            out[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{place}.conv"
        return out


def _add_block(out: dict[str, str], stage: str, layer: int, place: str) -> None:
    _add_residual(out, f"{stage}.resnets.{layer}", f"{place}.0")
    out[f"{stage}.attentions.{layer}"] = f"{place}.1"


def _add_residual(out: dict[str, str], block: str, place: str) -> None:
    for here, there in _RESIDUAL.items():
        out[f"{block}.{here}"] = f"{place}.{there}"


def from_single_file(keys: Collection[str]) -> dict[str, Piece]:
    """The tensors by the folder's names, from keys without their common prefix; without those that have no name."""
    modules = inverse(_levels_of_keys(set(keys)).modules())
    found = {key: renamed(key, modules) for key in keys}
    return {name: Piece(key) for key, name in found.items() if name is not None}


def to_single_file(names: Mapping[str, object]) -> dict[str, Piece]:
    """Where each tensor of a folder goes, as key without prefix; without those that have no place."""
    modules = _levels_of_names(set(names)).modules()
    found = {name: renamed(name, modules) for name in names}
    return {name: Piece(key) for name, key in found.items() if key is not None}


def _levels_of_keys(keys: set[str]) -> _Levels:
    layers, number = [0], 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in keys:
            layers.append(0)
        elif f"input_blocks.{number}.0.in_layers.0.weight" in keys:
            layers[-1] += 1
        else:
            break
        number += 1
    attention, number = [], -1
    for count in reversed(layers):
        number += count + 1
        attention.append(f"output_blocks.{number}.1.norm.weight" in keys)
    return _Levels(tuple(layers), tuple(attention), "middle_block.1.norm.weight" in keys)


def _levels_of_names(names: set[str]) -> _Levels:
    layers: list[int] = []
    while f"down_blocks.{len(layers)}.resnets.0.norm1.weight" in names:
        count = 1
        while f"down_blocks.{len(layers)}.resnets.{count}.norm1.weight" in names:
            count += 1
        layers.append(count)
    attention = tuple(f"up_blocks.{level}.attentions.0.norm.weight" in names for level in range(len(layers)))
    return _Levels(tuple(layers), attention, "mid_block.attentions.0.norm.weight" in names)
