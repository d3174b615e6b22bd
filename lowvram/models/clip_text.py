"""CLIP text encoders (Radford et al. 2021, arXiv 2103.00020), by transformers: from a local folder or from a pipeline.

Needs the extra `text`. Nothing is ever downloaded.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowvram import libraries
from lowvram.errors import LowVRAMError
from lowvram.models.text import TooLong, check_too_long, shortened

Load = Callable[[nn.Module], None]  # puts the weights into a module of the published names

_KINDS = ("clip", "clip_text_model")  # of config.json, `model_type`
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_LAYER = re.compile(r"(.*\.)?encoder\.layers\.\d+")
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
        encoders: those of transformers. tokenizers: of each the object that numbers its tokens; one that knows further
            tokens may take its place.

    Raises:
        LowVRAMError: transformers is missing; or the folder, or a part of it, is missing, broken or no CLIP.
    """

    def __init__(self, path: str | Path, *, mask_padding: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        transformers = _transformers()
        folders = _find(Path(path))
        encoders = [_load_encoder(transformers, encoder, dtype) for encoder, _ in folders]
        tokenizers = [_load_tokenizer(transformers, tokenizer) for _, tokenizer in folders]
        self._take(encoders, tokenizers, names=[str(folder) for folder, _ in folders])
        self.mask_padding = mask_padding
        self.last_but_one = any(folder.name == "text_encoder_2" for folder, _ in folders)
        self.skip, self.trained = 0, False
        self.requires_grad_(False).eval()

    @classmethod
    def from_parts(
        cls,
        encoders: Sequence[tuple[Mapping[str, Any], Load | None]],
        tokenizers: Sequence[Any],
        *,
        last_but_one: bool | None = None,
        skip: int = 0,
        trained: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Encoders whose weights lie anywhere: of each its config.json, and a function that fills in the weights.

        encoders: the function is given a module whose parameters have their published names, with the prefix
            `text_model.`, whatever the installed transformers calls them; None leaves them as memory had them, for
            plans. They are made without initial weights, so that host memory holds them once.
        tokenizers: of each encoder the folder of its files, or an object that was made of one.
        last_but_one: the context is the last but one layer, not normed; None: where there are two encoders.
        skip: so many layers before that ("clip skip"); with one encoder the layer is normed, as published tools do.
        trained: gradients are left on, and `train` has its usual meaning (for dropout within adapters).

        Raises:
            LowVRAMError: a configuration is of no CLIP text encoder, or asks for layers that are not there; what the
                functions raise.
        """
        transformers = _transformers()
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        made = []
        for config, load in encoders:
            encoder = _empty_encoder(transformers, dict(config), dtype)
            if load is not None:
                load(published(encoder))
            made.append(encoder)
        known = [_load_tokenizer(transformers, t) if isinstance(t, str | Path) else t for t in tokenizers]
        self._take(made, known, names=[f"text encoder {number + 1}" for number in range(len(made))])
        self.mask_padding = False
        self.last_but_one = len(made) > 1 if last_but_one is None else last_but_one
        self.skip, self.trained = skip, trained
        layers = min(encoder.config.num_hidden_layers for encoder in made)
        if not 0 <= skip < layers - self.last_but_one:
            raise LowVRAMError(
                f"skip={skip} of an encoder of {layers} layers.", f"Use 0 to {layers - 1 - self.last_but_one}."
            )
        self.requires_grad_(trained).train(trained)
        return self

    def _take(self, encoders: list[Any], tokenizers: list[Any], *, names: list[str]) -> None:
        self.encoders = nn.ModuleList(encoders)
        self.tokenizers = tokenizers
        for name, encoder, tokenizer in zip(names, encoders, tokenizers, strict=True):
            if len(tokenizer) > encoder.config.vocab_size:
                raise LowVRAMError(
                    f"the tokenizer beside {name} has {len(tokenizer)} tokens, the encoder "
                    f"{encoder.config.vocab_size}.",
                    "Take both from the same pipeline.",
                )
        configs = [encoder.config for encoder in encoders]
        self.length: int = min(config.max_position_embeddings for config in configs)
        self.dim: int = sum(config.hidden_size for config in configs)
        projected = hasattr(encoders[-1], "text_projection")
        self.pooled_dim: int = configs[-1].projection_dim if projected else configs[-1].hidden_size

    def train(self, mode: bool = True) -> Self:
        """Frozen: stays in evaluation, unless it was made to be trained."""
        return super().train(mode and self.trained)

    def blocks(self) -> dict[str, nn.Module]:
        """The transformer layers of all encoders by name, in the order they run."""
        return {name: module for name, module in self.named_modules() if _LAYER.fullmatch(name)}

    def state(self, number: int) -> dict[str, Tensor]:
        """The weights of an encoder by their published names, as files of pipelines have them."""
        return dict(published(self.encoders[number]).state_dict())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, too_long: TooLong = "error") -> tuple[Tensor, Tensor, Tensor]:
        """The context [B, length, dim], its mask bool [B, length] and `pooled` [B, pooled_dim], where the weights are.

        too_long: "cut" leaves out the end of what is too long (see `count_too_long`), for training captions.

        Raises:
            LowVRAMError: too_long is "error", and a prompt has more tokens than fit between start and end.
        """
        check_too_long(too_long)
        if too_long == "error":
            check_lengths(self.tokenizers, prompts, self.length)
        ids, masks = zip(*(number_tokens(t, prompts, self.length) for t in self.tokenizers), strict=True)
        context, pooled = self(*ids)
        mask = masks[0].logical_or(masks[-1]) if self.mask_padding else torch.ones_like(masks[0])
        return context, mask.to(context.device), pooled

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        """The context [B, length, dim] and `pooled` [B, pooled_dim] of each tokenizer's numbers, int64 [B, length]."""
        contexts = []
        pooled: Any = None
        layer = -1 - self.skip - self.last_but_one
        for encoder, numbers in zip(self.encoders, ids, strict=True):
            device = next(encoder.parameters()).device
            # No attention mask: the published networks learned from encoders that had none.
            output = encoder(input_ids=numbers.to(device), output_hidden_states=layer != -1)
            if layer == -1:
                contexts.append(output.last_hidden_state)
            else:
                hidden = output.hidden_states[layer]
                contexts.append(hidden if self.last_but_one else _text_model(encoder).final_layer_norm(hidden))
            pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return torch.cat(contexts, dim=-1), pooled

    def count_too_long(self, prompts: Iterable[str]) -> int:
        """How many of the prompts `encode` would have to cut."""
        return sum(tokens > self.length for tokens in count_tokens(self.tokenizers, list(prompts)))


def number_tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """The numbers of a tokenizer, int64 [B, length], and which are no padding, bool [B, length]; cut to the length."""
    coded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return coded["input_ids"], coded["attention_mask"].bool()


def count_tokens(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[int]:
    """The tokens of each prompt, its start and its end among them: by the tokenizer that makes most of it."""
    if not prompts:
        return []
    coded = [tokenizer(list(prompts), verbose=False)["input_ids"] for tokenizer in tokenizers]
    return [max(map(len, of_one)) for of_one in zip(*coded, strict=True)]


def check_lengths(tokenizers: Sequence[Any], prompts: Sequence[str], length: int) -> None:
    """Raise LowVRAMError for a prompt of more tokens than fit between start and end."""
    for prompt, tokens in zip(prompts, count_tokens(tokenizers, prompts), strict=True):
        if tokens > length:
            raise LowVRAMError(
                f"the prompt {shortened(prompt)} has {tokens - 2} tokens, of which CLIP reads {length - 2}.",
                f"Shorten it by {tokens - length} tokens (about a word each).",
            )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json.

    Raises:
        LowVRAMError: transformers is missing, or the files are broken.
    """
    return _load_tokenizer(_transformers(), folder)


def published(encoder: nn.Module) -> nn.Module:
    """The encoder as a module whose parameters are called as in published files: below `text_model.`.

    The parameters are the encoder's own. transformers 5 leaves the prefix out of encoders without a projection.
    """
    if hasattr(encoder, "text_model"):
        return encoder
    named = nn.Module()
    named.text_model = encoder
    return named


def _text_model(encoder: nn.Module) -> Any:
    return getattr(encoder, "text_model", encoder)


def _empty_encoder(transformers: ModuleType, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """An encoder on the CPU that holds no values yet, but for the numbers of positions."""
    if config.get("model_type", _KINDS[0]) not in _KINDS:
        raise LowVRAMError(
            f"the text encoder's configuration is of type {config['model_type']!r}, not a CLIP's.",
            "Use a pipeline of Stable Diffusion 1.x, 2.x or XL.",
        )
    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
    model_class = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    try:
        with torch.device("meta"):
            model = model_class(transformers.CLIPTextConfig.from_dict(config))
    except Exception as error:  # each version of transformers finds other words for a value that can't be
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LowVRAMError(
            f"the text encoder's configuration describes none that can be made: {reason[0]}", "Copy the model again."
        ) from error
    # Not `Module.to_empty`, which fake tensors refuse.
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                assert name == "position_ids", f"what is the buffer {name}?"
                module._buffers[name] = torch.arange(buffer.shape[-1]).expand(buffer.shape).contiguous()
    return model


def _transformers() -> ModuleType:
    remedy = "pip install 'lowvram[text]', or use the small text encoder that is trained along."
    return libraries.load("transformers", "a CLIP text encoder", remedy)


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


def _load_tokenizer(transformers: ModuleType, folder: str | Path) -> Any:
    folder = Path(folder)
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise LowVRAMError(f"{folder} holds no tokenizer (vocab.json and merges.txt).", _REMEDY)
    try:
        return transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exceptions for broken files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LowVRAMError(
            f"the tokenizer in {folder} can't be loaded: {reason[0]}", "Copy the folder again."
        ) from error
