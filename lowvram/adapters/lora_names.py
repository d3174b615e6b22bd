"""The names that layers of adapters have in files, and the paths that they have in our networks.

Files of diffusers name a tensor `unet.<path>.lora_A.weight`; those of the common web interfaces
`lora_unet_<path with _ for .>.lora_down.weight`. The paths are those of diffusers' folders; of SDXL many files have
those of the single file instead, `input_blocks_4_1_...`, which are read too.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

# The parts of a pipeline, by what their layers' names begin with.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
TEXT_MODEL = "text_model."  # paths of text encoders begin with it in files, and in some networks

_ENDS = {
    "down": ("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "up": ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"),
    "alpha": ("alpha",),
}
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
# Names with a `_` in them: every other `_` of a flat name was a dot.
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "input_blocks", "output_blocks", "middle_block"),
    *("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out"),
    *("time_embedding", "add_embedding", "linear_1", "linear_2", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "time_embed", "label_emb", "text_model", "self_attn", "q_proj", "k_proj", "v_proj"),
    *("out_proj", "text_projection"),
)
_WORD = re.compile(rf"(?:{'|'.join(_WORDS)}|[^_]+)(?=_|$)")
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


class Name(NamedTuple):
    """What a tensor of a file is: the part of the pipeline, the layer's path, and down, up, magnitude or alpha."""

    part: str
    path: str
    kind: str


def parse(key: str, layers_per_block: int = 2) -> Name | None:
    """What a key of a file names; None if no tensor of a LoRA or DoRA.

    layers_per_block: of the UNet, for the names of single files; 2 in all published ones.
    """
    key = _PROCESSOR.sub(lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora.{m[2]}.weight", key)
    found = [(kind, end) for kind, ends in _ENDS.items() for end in ends if key.endswith(f".{end}")]
    if not found:
        return None
    kind, end = max(found, key=lambda pair: len(pair[1]))
    layer = key.removesuffix(f".{end}").removeprefix("base_model.model.")
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), "")
    path = layer.removeprefix(prefix)
    part = PREFIXES.get(prefix, "text_encoder" if "encoder.layers." in layer else "unet")
    path = dotted(path) if prefix.endswith("_") else path
    if part == "unet":
        path = from_single_file(path, layers_per_block)
    elif not path.startswith((TEXT_MODEL, "text_projection")):
        path = TEXT_MODEL + path
    return Name(part, path, kind)


def dotted(flat: str) -> str:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`."""
    return ".".join(_WORD.findall(flat))


def from_single_file(path: str, layers_per_block: int) -> str:
    """A path of a single file's UNet as the folder's; others as they are."""
    for old, new in _OUTSIDE.items():
        if path == old:
            return new
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.+)", path)
    if match is None:
        return path
    stage, first, second, rest = match[1], int(match[2]), int(match[3] or 0), match[4]
    if stage == "middle_block":
        rest = path.split(".", 2)[2]
        return f"mid_block.attentions.0.{rest}" if first == 1 else f"mid_block.resnets.{first // 2}.{_resnet(rest)}"
    if stage == "input_blocks":
        level, layer = divmod(first - 1, layers_per_block + 1)
        if layer == layers_per_block:
            return f"down_blocks.{level}.downsamplers.0.conv"
        block = f"down_blocks.{level}"
    else:
        level, layer = divmod(first, layers_per_block + 1)
        block = f"up_blocks.{level}"
        if rest == "conv":
            return f"{block}.upsamplers.0.conv"
    return f"{block}.attentions.{layer}.{rest}" if second else f"{block}.resnets.{layer}.{_resnet(rest)}"


def flat_key(part: str, path: str, second_encoder: bool, end: str) -> str:
    """The key that web interfaces read. second_encoder: the pipeline has two, which changes the first one's name."""
    encoder = "te1" if second_encoder else "te"
    prefix = {"unet": "unet", "text_encoder": encoder, "text_encoder_2": "te2"}[part]
    return f"lora_{prefix}_{path.replace('.', '_')}.{end}"


def nearest(wrong: Iterable[str], known: Iterable[str]) -> str:
    """Some of the names that are wrong, each with the nearest of those known."""
    known = list(known)
    told = []
    for name in list(wrong)[:3]:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        told.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(told)


def _resnet(rest: str) -> str:
    return _RESNET.get(rest, rest)
