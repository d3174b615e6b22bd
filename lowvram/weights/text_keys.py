"""Names of the text encoders: transformers' with the prefix text_model., and open_clip's, which single files have.

open_clip joins the weights that make query, key and value, and transposes the projection of the pooled text.
"""

import re
from collections.abc import Collection, Mapping

from lowvram.weights.pipeline_keys import Piece, Shape

_PREFIX = "text_model."
_INSIDE = ("embeddings.", "encoder.", "final_layer_norm.")
_WHOLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_JOINED = ("q_proj", "k_proj", "v_proj")
_LAYERS = re.compile(r"(?:transformer\.resblocks|text_model\.encoder\.layers)\.(\d{1,6})\.")


def full_name(name: str) -> str:
    """The name with the prefix, which newer versions of transformers leave out."""
    return f"{_PREFIX}{name}" if name.startswith(_INSIDE) else name


def layers(names: Collection[str]) -> int:
    """The number of layers, of names by either layout."""
    return 1 + max((int(found[1]) for name in names if (found := _LAYERS.match(name))), default=-1)


def from_single_file(shapes: Mapping[str, Shape], *, projected: bool) -> dict[str, Piece]:
    """The tensors by the folder's names, from open_clip's keys without their common prefix, and their shapes.

    projected: with the projection of the pooled text and all layers (SDXL). Else the projection stays out, and with it
    the last layer: Stable Diffusion 2.x reads the context from the last but one, and folders have only what is read. A
    file without the projection, as is made from a folder, has no further layer, unless it is ViT-H's 24th.
    """
    count = layers(shapes)
    embedding = shapes.get("token_embedding.weight", ())
    if not projected and ("text_projection" in shapes or (count == 24 and embedding[1:] == (1024,))):
        count -= 1
    return {name: piece for name, piece in _pieces(count, projected).items() if piece.key in shapes}


def to_single_file(names: Mapping[str, object], *, projected: bool) -> dict[str, Piece]:
    """Where each tensor of a folder goes among open_clip's keys, without prefix."""
    return {name: piece for name, piece in _pieces(layers(names), projected).items() if name in names}


def _pieces(count: int, projected: bool) -> dict[str, Piece]:
    out = {name: Piece(key) for name, key in _WHOLE.items()}
    if projected:
        out["text_projection.weight"] = Piece("text_projection", "transposed")
    for layer in range(count):
        here, there = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for inside, outside in _LAYER.items():
                out[f"{here}.{inside}.{kind}"] = Piece(f"{there}.{outside}.{kind}")
            for third, projection in enumerate(_JOINED):
                out[f"{here}.self_attn.{projection}.{kind}"] = Piece(f"{there}.attn.in_proj_{kind}", "third", third)
    return out
