"""The parts of a pipeline, and where the tensors of each lie in its files."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from lowvram.errors import LowVRAMError
from lowvram.weights import autoencoder_keys, text_keys, unet_keys
from lowvram.weights.pipeline_keys import Piece, Shape

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES: dict[str, dict[str, str]] = {  # of each part's keys in a single file
    "sd1": {"unet": _UNET, "vae": _VAE, "text_encoder": "cond_stage_model.transformer."},
    "sd2": {"unet": _UNET, "vae": _VAE, "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
AVERAGES = "model_ema."  # the average of the UNet's weights while it was trained, in a single file beside them
# What training left in a part, and no network needs.
_HARMLESS = {"unet": (AVERAGES,), "vae": (AVERAGES, "loss.")}


def in_folder(path: Path, part: str, keys: Iterable[str]) -> dict[str, Piece]:
    """The tensors of a part's file in a folder, by their present names.

    Raises:
        LowVRAMError: two keys stand for the same tensor.
    """
    kept = [key for key in keys if not key.endswith(".position_ids")]  # a constant, which older versions saved
    if part == "vae":
        return _by_name(path, autoencoder_keys.from_folder(kept))
    return _by_name(path, ((full_name(part, key), Piece(key)) for key in kept))


def full_name(part: str, name: str) -> str:
    """The present name of a tensor, out of any folder, or a network of transformers in memory."""
    if part == "vae":
        return autoencoder_keys.present_name(name)
    return name if part == "unet" else text_keys.full_name(name)


def in_single_file(path: Path, family: str, part: str, shapes: Mapping[str, Shape]) -> dict[str, Piece]:
    """A part's tensors in a single file with these keys, by their names in a folder; {} where it has none.

    Tensors of UNet and autoencoder that are not known come under their own key, so that loading tells of them.

    Raises:
        LowVRAMError: two keys stand for the same tensor.
    """
    prefix = PREFIXES[family].get(part)
    if prefix is None:
        return {}
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if part == "unet":
        pieces = unet_keys.from_single_file(own)
    elif part == "vae":
        pieces = autoencoder_keys.from_single_file(own)
    elif _is_open_clip(prefix):
        pieces = text_keys.from_single_file(own, projected=part == "text_encoder_2")
    else:
        pieces = in_folder(path, part, own)
    if part in _HARMLESS:
        known = {piece.key for piece in pieces.values()}
        unknown = [key for key in own if key not in known and not key.startswith(_HARMLESS[part])]
        pieces |= {key: Piece(key) for key in unknown}
    return {name: piece._replace(key=prefix + piece.key) for name, piece in pieces.items()}


def for_single_file(family: str, part: str, names: Mapping[str, object]) -> dict[str, Piece]:
    """Where a single file has the tensors that a folder has under these names.

    Raises:
        LowVRAMError: some have no place there.
    """
    prefix = PREFIXES[family].get(part)
    if prefix is None:
        raise LowVRAMError(f"A single file of {family} has no place for {part}.", "Write a folder (to=diffusers).")
    if part == "unet":
        pieces = unet_keys.to_single_file(names)
    elif part == "vae":
        pieces = autoencoder_keys.to_single_file(names)
    elif _is_open_clip(prefix):
        pieces = text_keys.to_single_file(names, projected=part == "text_encoder_2")
    else:
        pieces = {name: Piece(name) for name in names}
    if lost := [name for name in names if name not in pieces]:
        raise LowVRAMError(
            f"A single file of {family} has no place for {len(lost)} tensors of {part}, among them {lost[0]}.",
            "Write a folder (to=diffusers).",
        )
    return {name: piece._replace(key=prefix + piece.key) for name, piece in pieces.items()}


def _is_open_clip(prefix: str) -> bool:
    return prefix.endswith(".model.")


def _by_name(path: Path, items: Iterable[tuple[str, Piece]]) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    for name, piece in items:
        if name in pieces:
            raise LowVRAMError(
                f"{path}: {pieces[name].key} and {piece.key} are the same tensor, {name}.", "Download it again."
            )
        pieces[name] = piece
    return pieces
