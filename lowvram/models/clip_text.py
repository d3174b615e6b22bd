"""Frozen CLIP text encoders (Radford et al. 2021, arXiv 2103.00020) from a local folder, by transformers.

Needs the extra `text`. Nothing is ever downloaded.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.models.text import TooLong, check_too_long, shortened

_KINDS = ("clip", "clip_text_model")  # of config.json, `model_type`
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_REMEDY = (
    "Give the folder of a Stable Diffusion pipeline (with text_encoder/ and tokenizer/), or one with config.json, the "
    "weights and the tokenizer's files of a CLIP text encoder."
)


class ClipText(nn.Module):
    """The text encoder of a pipeline folder, or a lone CLIP; both encoders side by side where there are two (SDXL).

    With one (SD 1.x, SD 2.x) the context is its last layer, normed, and `pooled` its end token. Where there is a
    `text_encoder_2` the context is each encoder's last but one layer, joined, and `pooled` the projection of the second
    (arXiv 2307.01952, section 2.1).

    Args:
        path: see above.
        mask_padding: the mask leaves out what follows the end token. The published networks look at that too.
        dtype: of the weights, the context and `pooled`.

    Attributes:
        length: tokens of a prompt, with its start and its end (77).
        dim, pooled_dim: widths of the context and of `pooled`.

    Raises:
        LowVRAMError: transformers is missing; or the folder, or a part of it, is missing, broken or no CLIP.
    """

    def __init__(self, path: str | Path, *, mask_padding: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        transformers = _transformers()
        self.mask_padding = mask_padding
        folders = _find(Path(path))
        self.last_but_one = any(encoder.name == "text_encoder_2" for encoder, _ in folders)
        encoders = [_load_encoder(transformers, encoder, dtype) for encoder, _ in folders]
        self.encoders = nn.ModuleList(encoders)
        self.tokenizers = [_load_tokenizer(transformers, tokenizer) for _, tokenizer in folders]
        for (folder, _), encoder, tokenizer in zip(folders, encoders, self.tokenizers, strict=True):
            if len(tokenizer) > encoder.config.vocab_size:
                raise LowVRAMError(
                    f"the tokenizer beside {folder} has {len(tokenizer)} tokens, the encoder "
                    f"{encoder.config.vocab_size}.",
                    "Take both from the same pipeline.",
                )
        configs = [encoder.config for encoder in encoders]
        self.length: int = min(config.max_position_embeddings for config in configs)
        self.dim: int = sum(config.hidden_size for config in configs)
        projected = hasattr(encoders[-1], "text_projection")
        self.pooled_dim: int = configs[-1].projection_dim if projected else configs[-1].hidden_size
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Frozen: stays in evaluation."""
        return super().train(False)

    def encode(self, prompts: Sequence[str], *, too_long: TooLong = "error") -> tuple[Tensor, Tensor, Tensor]:
        """The context [B, length, dim], its mask bool [B, length] and `pooled` [B, pooled_dim], where the weights are.

        too_long: "cut" leaves out the end of what is too long (see `count_too_long`), for training captions.

        Raises:
            LowVRAMError: too_long is "error", and a prompt has more tokens than fit between start and end.
        """
        check_too_long(too_long)
        if too_long == "error":
            self._check_lengths(prompts)
        ids = [self._ids(tokenizer, prompts) for tokenizer in self.tokenizers]
        return self(*ids)

    @torch.no_grad()
    def forward(self, *ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As `encode`, of each tokenizer's numbers int64 and their attention mask, both [B, length]."""
        contexts, masks = [], []
        pooled: Any = None
        for encoder, (numbers, mask) in zip(self.encoders, ids, strict=True):
            device = next(encoder.parameters()).device
            # No attention mask: the published networks learned from encoders that had none.
            output = encoder(input_ids=numbers.to(device), output_hidden_states=self.last_but_one)
            contexts.append(output.hidden_states[-2] if self.last_but_one else output.last_hidden_state)
            masks.append(mask.to(device).bool())
            pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        counts = masks[0].logical_or(masks[-1]) if self.mask_padding else torch.ones_like(masks[0])
        return torch.cat(contexts, dim=-1), counts, pooled

    def count_too_long(self, prompts: Iterable[str]) -> int:
        """How many of the prompts `encode` would have to cut."""
        return sum(self._tokens(prompt) > self.length for prompt in prompts)

    def _tokens(self, prompt: str) -> int:
        """The tokens of a prompt, its start and its end among them."""
        return max(len(tokenizer(prompt, verbose=False)["input_ids"]) for tokenizer in self.tokenizers)

    def _check_lengths(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            tokens = self._tokens(prompt)
            if tokens > self.length:
                raise LowVRAMError(
                    f"the prompt {shortened(prompt)} has {tokens - 2} tokens, of which CLIP reads {self.length - 2}.",
                    f"Shorten it by {tokens - self.length} tokens (about a word each).",
                )

    def _ids(self, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        coded = tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return coded["input_ids"], coded["attention_mask"]


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise LowVRAMError(
            f"a CLIP text encoder needs transformers, which can't be imported: {error}.",
            "pip install 'lowvram[text]', or use the small text encoder that is trained along.",
        ) from error
    return transformers


def _find(path: Path) -> list[tuple[Path, Path]]:
    """The folders of each encoder and its tokenizer: one pair, or two."""
    if not path.is_dir():
        raise LowVRAMError(f"there is no folder {path}.", _REMEDY)
    pairs = [(path / f"text_encoder{end}", path / f"tokenizer{end}") for end in ("", "_2")]
    found = [pair for pair in pairs if pair[0].is_dir()] or [(path, path)]
    for encoder, tokenizer in found:
        if not (encoder / "config.json").is_file():
            raise LowVRAMError(f"{encoder} holds no config.json.", _REMEDY)
        if not any(file.is_file() for pattern in _WEIGHTS for file in encoder.glob(pattern)):
            raise LowVRAMError(f"{encoder} holds no weights (model.safetensors).", _REMEDY)
        # Without these transformers would make up a tokenizer of three tokens.
        if not any(all((tokenizer / name).is_file() for name in names) for names in _VOCABULARIES):
            raise LowVRAMError(f"{tokenizer} holds no tokenizer (vocab.json and merges.txt).", _REMEDY)
    return found


def _load_encoder(transformers: ModuleType, folder: Path, dtype: torch.dtype) -> Any:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, architectures = config.get("model_type"), config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise LowVRAMError(f"{folder / 'config.json'} can't be read: {error}.", "Copy the folder again.") from error
    if kind not in _KINDS:
        raise LowVRAMError(f"{folder} holds a model of type {kind!r}, not a CLIP text encoder.", _REMEDY)
    projected = "CLIPTextModelWithProjection" in architectures
    model_class = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    try:
        model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LowVRAMError(
            f"the text encoder in {folder} can't be loaded: {reason[0]}", "Copy the folder again."
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:  # transformers would go on with random numbers in their place
        raise LowVRAMError(
            f"the weights in {folder} lack {len(missing)} tensors of the encoder, {missing[0]} among them.",
            "Copy the folder again, or give one whose config.json and weights belong together.",
        )
    return model


def _load_tokenizer(transformers: ModuleType, folder: Path) -> Any:
    try:
        return transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exceptions for broken files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LowVRAMError(
            f"the tokenizer in {folder} can't be loaded: {reason[0]}", "Copy the folder again."
        ) from error
