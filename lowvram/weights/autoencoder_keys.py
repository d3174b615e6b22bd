"""Names of the autoencoder: those of a folder, present and before 2023, and latent diffusion's of a single file.

Latent diffusion counts the decoder's levels from the finest, folders from the one that runs first.
"""

from collections.abc import Collection, Mapping

from lowvram.weights.pipeline_keys import Form, Piece, inverse, renamed

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}


def present_name(name: str) -> str:
    """The name in a folder of today, of a tensor in any folder."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) > 2:
        parts[-2] = _OLD_ATTENTION.get(parts[-2], parts[-2])
    return ".".join(parts)


def from_folder(keys: Collection[str]) -> list[tuple[str, Piece]]:
    """Names and places of a folder's tensors."""
    names = [(present_name(key), key) for key in keys]
    return [(name, Piece(key, _form(name))) for name, key in names]


def from_single_file(keys: Collection[str]) -> dict[str, Piece]:
    """The tensors by the folder's names, from keys without their common prefix; without those that have no name."""
    levels = layers = 0
    while f"encoder.down.{levels}.block.0.norm1.weight" in keys:
        levels += 1
    while f"encoder.down.0.block.{layers}.norm1.weight" in keys:
        layers += 1
    modules = inverse(_modules(levels, layers))
    found = {key: renamed(key, modules) for key in keys}
    return {name: Piece(key, _form(name)) for key, name in found.items() if name is not None}


def to_single_file(names: Mapping[str, object]) -> dict[str, Piece]:
    """Where each tensor of a folder goes, as key without prefix; without those that have no place."""
    levels = layers = 0
    while f"encoder.down_blocks.{levels}.resnets.0.norm1.weight" in names:
        levels += 1
    while f"encoder.down_blocks.0.resnets.{layers}.norm1.weight" in names:
        layers += 1
    modules = _modules(levels, layers)
    found = {name: renamed(name, modules) for name in names}
    return {name: Piece(key, _form(name)) for name, key in found.items() if key is not None}


def _form(name: str) -> Form:
    """Attention's projections are 1x1 convolutions in single files and old folders."""
    projection = ".attentions." in name and name.endswith(".weight") and "group_norm" not in name
    return "flat" if projection else "same"


def _modules(levels: int, layers: int) -> dict[str, str]:
    """Every module with tensors, by its name in a folder: its name in a single file."""
    out = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        for here, there in {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}.items():
            out[f"{side}.{here}"] = f"{side}.{there}"
        for number in range(2):
            _add_residual(out, f"{side}.mid_block.resnets.{number}", f"{side}.mid.block_{number + 1}")
        for here, there in _ATTENTION.items():
            out[f"{side}.mid_block.attentions.0.{here}"] = f"{side}.mid.attn_1.{there}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        down_there, up_there = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(layers):
            _add_residual(out, f"{down}.resnets.{layer}", f"{down_there}.block.{layer}")
        for layer in range(layers + 1):
            _add_residual(out, f"{up}.resnets.{layer}", f"{up_there}.block.{layer}")
        out[f"{down}.downsamplers.0.conv"] = f"{down_there}.downsample.conv"
        out[f"{up}.upsamplers.0.conv"] = f"{up_there}.upsample.conv"
    return out


def _add_residual(out: dict[str, str], block: str, place: str) -> None:
    for here, there in _RESIDUAL.items():
        out[f"{block}.{here}"] = f"{place}.{there}"
