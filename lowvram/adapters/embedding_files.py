"""Files of textual inversion as others write and read them: diffusers, and the common web interfaces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowvram.adapters.textual_inversion import Embeddings, Word
from lowvram.errors import LowVRAMError
from lowvram.weights import torch_file
from lowvram.weights.tensor_file import NewTensor, TensorFile, check_file, finite, write_tensors

Layout = Literal["diffusers", "webui"]
_ENCODERS = ("clip_l", "clip_g")  # the keys of SDXL's two encoders, in all programs
_REMEDY = "Give a file with the embedding of one word for Stable Diffusion: .safetensors, .pt or .bin."


@dataclass(frozen=True, kw_only=True)
class EmbeddingFile:
    """One word: its token, and its vectors [vectors, dim] for one text encoder or, of SDXL, for both."""

    path: Path
    token: str
    vectors: tuple[Tensor, ...]


def read(path: str | Path, *, token: str = "") -> EmbeddingFile:
    """Read a word. token: to call it by; "": as the file says, else the file's name in <>.

    Raises:
        LowVRAMError: the file can't be read, or holds no word or several, or numbers that are not finite.
    """
    path = Path(path).expanduser()
    tensors, name = _tensors(path)
    if set(tensors) == set(_ENCODERS):
        found = [(key, tensors[key]) for key in _ENCODERS]
    elif len(tensors) == 1:
        found = list(tensors.items())
        name = name or (found[0][0] if found[0][0] not in ("emb_params", "*") else "")
    else:
        raise LowVRAMError(f"{path} holds {len(tensors)} tensors, {', '.join(list(tensors)[:3])} among them.", _REMEDY)
    vectors = []
    for key, tensor in found:
        if tensor.dim() not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
            raise LowVRAMError(f"{path}: {key} is {list(tensor.shape)} of {tensor.dtype}, no vectors.", _REMEDY)
        vectors.append(finite(path, key, tensor if tensor.dim() == 2 else tensor[None]))
    if len({len(tensor) for tensor in vectors}) > 1:
        raise LowVRAMError(f"{path} has {[len(t) for t in vectors]} vectors for the two encoders.", _REMEDY)
    return EmbeddingFile(
        path=path, token=token or name or "<" + "-".join(path.stem.split()) + ">", vectors=tuple(vectors)
    )


def write(
    path: str | Path,
    token: str,
    vectors: Sequence[Tensor],
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a word as a .safetensors file, which appears whole or not at all.

    Of one encoder diffusers names the tensor by the token, the web interfaces `emb_params` (the word is the file's
    name there); of SDXL's two both have clip_l and clip_g.

    Args:
        vectors: for each encoder [vectors, dim]. dtype: to write in; None: the tensors' own.

    Raises:
        LowVRAMError: the file can't be written.
    """
    if not 1 <= len(vectors) <= len(_ENCODERS) or layout not in ("diffusers", "webui"):
        raise ValueError(f"vectors of {len(vectors)} encoders in the layout {layout!r}")
    one = token if layout == "diffusers" else "emb_params"
    keys = (one,) if len(vectors) == 1 else _ENCODERS

    def entry(tensor: Tensor) -> NewTensor:
        width = dtype or tensor.dtype
        return NewTensor(tuple(tensor.shape), width, lambda: tensor.detach().to(width))

    notes = {"format": "pt", "token": token}
    write_tensors(path, {key: entry(tensor) for key, tensor in zip(keys, vectors, strict=True)}, notes)


def add_from_files(
    encoders: Sequence[nn.Module], tokenizers: Sequence[Any], files: Sequence[EmbeddingFile | str | Path]
) -> Embeddings:
    """Put the words of files into text encoders; `tokenizers` of the result knows them.

    Raises:
        LowVRAMError: as `read` and `Embeddings`; or a file is for other encoders.
    """
    words = [file if isinstance(file, EmbeddingFile) else read(file) for file in files]
    for word in words:
        widths = [vectors.shape[1] for vectors in word.vectors]
        wanted = [encoder.get_input_embeddings().embedding_dim for encoder in encoders]  # type: ignore[operator]
        if widths != wanted:
            raise LowVRAMError(
                f"{word.path} has vectors of widths {widths}, the text encoders {wanted}.",
                "Use a file that was made for this family of models.",
            )
    new = [Word(token=word.token, vectors=len(word.vectors[0])) for word in words]
    embeddings = Embeddings(encoders, tokenizers, new)
    for word in words:
        embeddings.load(word.token, word.vectors)
    return embeddings


def _tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, and the word's name where the file has one."""
    check_file(path)
    with path.open("rb") as opened:
        start = opened.read(16)
    # A .safetensors whose header is 128 bytes long begins as a pickle does.
    if path.suffix.lower() == ".safetensors" or not torch_file.looks_like_one(start):
        with TensorFile.open(path) as file:
            return {key: file.read(key) for key in file.names}, file.metadata.get("token", "")
    content = torch_file.load(path)
    name = content.get("name") if isinstance(content, Mapping) else None
    if isinstance(content, Mapping) and "string_to_param" in content:
        content = content["string_to_param"]
    tensors = dict(torch_file.tensors_in(content))
    if not tensors:
        raise LowVRAMError(f"{path} holds no tensors.", _REMEDY)
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}, name if isinstance(name, str) else ""
