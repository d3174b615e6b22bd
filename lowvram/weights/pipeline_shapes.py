"""The configurations of a single file's networks, which it does not hold: worked out from the shapes of its tensors.

What shapes cannot tell follows the published pipeline of the family (configs/): 32 groups in the norms, activations,
scaling of the latents, schedule; and of heads of attention 8 in each level of a Stable Diffusion 1.x UNet, else as
many as are 64 channels wide.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.weights import text_keys
from lowvram.weights.pipeline_keys import Shape

_CONFIGS = Path(__file__).parent / "configs"
_HEAD_CHANNELS = 64
_OTHER = "Only networks built like those of Stable Diffusion 1.x, 2.x and XL can be taken from a single file."


def published(family: str) -> dict[str, dict[str, Any]]:
    """The configurations of the family's published pipeline, by part, and of its "scheduler"."""
    content: dict[str, dict[str, Any]] = json.loads((_CONFIGS / f"{family}.json").read_text(encoding="utf-8"))
    return content


class Shapes:
    """The shapes of a part's tensors by the folder's names, of a file that may lack any of them."""

    def __init__(self, path: Path, part: str, shapes: Mapping[str, Shape]) -> None:
        self.path, self.part, self.shapes = path, part, shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def get(self, name: str, dimensions: int) -> Shape:
        """The shape of a tensor that must be there, with so many dimensions."""
        if name not in self.shapes:
            raise LowVRAMError(f"{self.path}: {name} of the {self.part} is missing.", "Use a whole file.")
        shape = self.shapes[name]
        if len(shape) != dimensions:
            raise LowVRAMError(
                f"{self.path}: {name} of the {self.part} has shape {list(shape)}, where {dimensions} axes belong.",
                _OTHER,
            )
        return shape

    def count(self, pattern: str) -> int:
        """How many there are, from 0 on, of a name with {} in place of a number."""
        number = 0
        while pattern.format(number) in self.shapes:
            number += 1
        return number


def unet(family: str, shapes: Shapes, *, pooled: int | None) -> dict[str, Any]:
    """The content of unet/config.json. pooled: width of the pooled text that it adds to the time (SDXL), if known."""
    config = published(family)["unet"]
    levels = shapes.count("down_blocks.{}.resnets.0.norm1.weight")
    channels = [shapes.get(f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    layers = [shapes.count(f"down_blocks.{i}.resnets.{{}}.norm1.weight") for i in range(levels)]
    if not channels:
        raise LowVRAMError(f"{shapes.path}: its UNet has no residual blocks.", _OTHER)
    down = [_depth(shapes, f"down_blocks.{i}", layers[i]) for i in range(levels)]
    up = [_depth(shapes, f"up_blocks.{i}", layers[-1 - i] + 1) for i in range(levels)]
    middle = _depth(shapes, "mid_block", 1)
    if up[::-1] != down or not middle or down[-1] not in (0, middle):
        raise LowVRAMError(
            f"{shapes.path}: its UNet has transformers of depths {down} on the way down, {middle} in the middle and "
            f"{up} on the way up.",
            _OTHER,
        )
    inside = "mid_block.attentions.0"
    depths = [depth or 1 for depth in down[:-1]] + [middle]
    config |= {
        "in_channels": shapes.get("conv_in.weight", 4)[1],
        "out_channels": shapes.get("conv_out.weight", 4)[0],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
        "cross_attention_dim": shapes.get(f"{inside}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "attention_head_dim": 8 if family == "sd1" else [max(1, width // _HEAD_CHANNELS) for width in channels],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "use_linear_projection": len(shapes.shapes.get(f"{inside}.proj_in.weight", ())) == 2,
    }
    if "class_embedding.weight" in shapes:
        config["num_class_embeds"] = shapes.get("class_embedding.weight", 2)[0]
    if family == "sdxl":
        config |= _added(shapes, config["addition_time_embed_dim"], pooled)
    return config


def _depth(shapes: Shapes, stage: str, layers: int) -> int:
    """Transformer blocks in each of a stage's attentions; 0: it has none."""
    depths = {
        shapes.count(f"{stage}.attentions.{layer}.transformer_blocks.{{}}.norm1.weight") for layer in range(layers)
    }
    if len(depths) > 1:
        raise LowVRAMError(
            f"{shapes.path}: the attentions of {stage} in its UNet are {sorted(depths)} blocks deep.", _OTHER
        )
    return depths.pop()


def _added(shapes: Shapes, usual: int, pooled: int | None) -> dict[str, Any]:
    """The embedding of pooled text and six sizes, of `usual` channels each where the text's width is not known."""
    width = shapes.get("add_embedding.linear_1.weight", 2)[1]
    each, left = (usual, 0) if pooled is None else divmod(width - pooled, 6)
    if left or each <= 0:
        raise LowVRAMError(
            f"{shapes.path}: its UNet takes {width} added channels, and its second text encoder gives {pooled}, which "
            "does not leave six equal parts for the sizes.",
            _OTHER,
        )
    return {"addition_time_embed_dim": each, "projection_class_embeddings_input_dim": width}


def autoencoder(family: str, shapes: Shapes) -> dict[str, Any]:
    """The content of vae/config.json."""
    levels = shapes.count("encoder.down_blocks.{}.resnets.0.norm1.weight")
    if not levels:
        raise LowVRAMError(f"{shapes.path}: its autoencoder has no residual blocks.", _OTHER)
    channels = [shapes.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    own: dict[str, Any] = {
        "in_channels": shapes.get("encoder.conv_in.weight", 4)[1],
        "out_channels": shapes.get("decoder.conv_out.weight", 4)[0],
        "latent_channels": shapes.get("decoder.conv_in.weight", 4)[1],
        "block_out_channels": channels,
        "layers_per_block": shapes.count("encoder.down_blocks.0.resnets.{}.norm1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" not in shapes:
            own[f"use_{name}"] = False
    return published(family)["vae"] | own


def text(family: str, part: str, shapes: Shapes) -> dict[str, Any]:
    """The content of a text encoder's config.json."""
    config = published(family)[part]
    tokens, width = shapes.get("text_model.embeddings.token_embedding.weight", 2)
    config |= {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": shapes.get("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": text_keys.layers(shapes.shapes),
        "num_attention_heads": max(1, width // _HEAD_CHANNELS),
        "max_position_embeddings": shapes.get("text_model.embeddings.position_embedding.weight", 2)[0],
    }
    if part == "text_encoder_2":
        config["projection_dim"] = shapes.get("text_projection.weight", 2)[0]
    elif width != published(family)[part]["hidden_size"]:
        config["projection_dim"] = width
    return config


def prediction(family: str, keys: Mapping[str, Shape], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a single file tells of its schedule: prediction_type, and of a zero terminal SNR.

    In this order: tensors named v_pred and ztsnr, which mark such files of 1.x and XL; modelspec.prediction_type of
    the metadata; else noise ("epsilon") but for 2.x, which is published in both kinds that nothing in the weights
    tells apart: v, unless its training ended with step 875,000, as that of 2.0-base, or its metadata say that it is
    made for 512 pixels.
    """
    found = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in keys or found in ("v", "v_prediction", "v-prediction"):
        out: dict[str, Any] = {"prediction_type": "v_prediction"}
    elif found in ("epsilon", "eps") or family != "sd2":
        out = {"prediction_type": "epsilon"}
    else:
        base = metadata.get("global_step") == "875000" or metadata.get("modelspec.resolution", "").startswith("512")
        out = {"prediction_type": "epsilon" if base else "v_prediction"}
    if "ztsnr" in keys:
        out |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return out
