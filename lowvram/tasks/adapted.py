"""Sampling from weights in files: a published pipeline as it is, or with LoRAs and words that were learned for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowvram.adapters import embedding_files, lora_files, lora_names
from lowvram.adapters.embedding_files import EmbeddingFile
from lowvram.adapters.stack import Stack
from lowvram.config import load_recipe
from lowvram.errors import LowVRAMError
from lowvram.settings import StableDiffusionSettings
from lowvram.settings.stable_diffusion import scales
from lowvram.tasks import low_rank, published
from lowvram.tasks.fine_tuned import FineTuned
from lowvram.tasks.stable_diffusion import StableDiffusionTask
from lowvram.weights.pipeline import Pipeline, open_pipeline
from lowvram.weights.tensor_file import TensorFile

Kind = Literal["stylegan", "pipeline", "lora", "embedding"]

_RECIPES = {"sd1": "sd15_finetune", "sd2": "sd21_finetune", "sdxl": "sdxl_finetune"}
_MOST_OF_A_WORD = 2  # tensors
_LEAST_WIDTH = 32  # of an encoder that a word could be for


def kind_of(path: Path) -> Kind:
    """What a file or folder of weights is.

    Raises:
        LowVRAMError: it is not there, can't be read, or is something else.
    """
    if not path.exists():
        raise LowVRAMError(f"weights={path} is not there.", "Give a file, or a folder of a pipeline.")
    if path.is_dir():
        return "pipeline"
    if path.suffix == ".pkl":
        return "stylegan"
    if path.suffix in (".pt", ".bin"):
        return "embedding"
    with TensorFile.open(path) as file:
        if "stylegan2" in file.metadata:
            return "stylegan"
        if any(name.startswith("model.diffusion_model.") for name in file.names):
            return "pipeline"
        if any(lora_names.parse(name) is not None for name in file.names):
            return "lora"
        if len(file.names) <= _MOST_OF_A_WORD and all(file.shape(n)[-1:] >= (_LEAST_WIDTH,) for n in file.names):
            return "embedding"
        raise LowVRAMError(
            f"weights={path} holds no weights that are known, but {len(file.names)} tensors such as {file.names[0]}."
            if file.names
            else f"weights={path} is empty.",
            "Give StyleGAN2, or Stable Diffusion's whole pipeline, a LoRA or the embedding of a word.",
        )


class Adapted(FineTuned):
    """A pipeline with LoRAs in it, merged into its text encoders, and words put into these."""

    def __init__(
        self,
        settings: StableDiffusionSettings,
        pipeline: Pipeline,
        device: torch.device,
        *,
        stack: Stack | None = None,
        words: Sequence[EmbeddingFile] = (),
    ) -> None:
        stack = Stack() if stack is None else stack
        self.words = words
        text = published.text(pipeline, settings, device, live=bool(words), **low_rank.text_options(stack))
        super().__init__(settings, pipeline, text, device, stack)
        if words:
            self.text = text.network()
            assert self.text is not None
            embeddings = embedding_files.add_from_files(list(self.text.encoders), text.tokenizers, words)
            text.tokenizers = self.text.tokenizers = embeddings.tokenizers
            self.text.requires_grad_(False).eval()

    def changed(self) -> dict[str, dict[str, Tensor]]:
        if self.words:
            raise LowVRAMError(
                f"a pipeline has no place for the word {self.words[0].token} of {self.words[0].path}.",
                "Leave it out, and load its file beside the pipeline.",
            )
        return super().changed()


def open_weights(
    paths: Sequence[Path],
    device: torch.device,
    *,
    base: Path | None = None,
    scale: float | str | None = None,
    predict: str | None = None,
) -> StableDiffusionTask:
    """A task that samples from files of Stable Diffusion: one pipeline, and LoRAs and words for it.

    base: the pipeline, where `paths` are LoRAs and words alone. scale: how much LoRAs count, all alike, or "0.8|0.5"
    one after the other. predict: eps or v, what its UNet does, where that is to be said.

    Raises:
        LowVRAMError: a file can't be read, they don't fit one another, there is no pipeline, or more than one, or
            there are more or fewer scales than LoRAs.
    """
    kinds = {path: kind_of(path) for path in paths}
    pipelines = [path for path, kind in kinds.items() if kind == "pipeline"] + ([base] if base is not None else [])
    others = [path for path, kind in kinds.items() if kind != "pipeline"]
    if not pipelines:
        raise LowVRAMError(
            f"weights={others[0]} is of type {kinds[others[0]]}, and stands on weights that are not named.",
            "Add base=PATH: the pipeline that it was trained on.",
        )
    if len(pipelines) > 1:
        raise LowVRAMError(f"{pipelines[0]} and {pipelines[1]} are both whole pipelines.", "Give one of them.")
    loras = [path for path in others if kinds[path] == "lora"]
    if scale is not None and not loras:
        raise LowVRAMError(f"scale={scale} is for LoRAs, and there is none among the weights.", "Leave scale out.")
    counts = scales("scale", None if scale is None else str(scale), len(loras))
    settings = settings_for(pipelines[0], predict)
    pipeline = published.source(settings)
    assert isinstance(pipeline, Pipeline)
    tuned = Adapted(
        settings,
        pipeline,
        device,
        stack=Stack([lora_files.read(path) for path in loras], counts),
        words=[embedding_files.read(path) for path in others if kinds[path] == "embedding"],
    )
    return StableDiffusionTask(settings, device, pipeline=pipeline, tuned=tuned)


def settings_for(path: Path, predict: str | None = None) -> StableDiffusionSettings:
    """The settings to sample a pipeline with, at the size that it was trained for. predict: see `open_weights`."""
    pipeline = open_pipeline(path)
    found = load_recipe(_RECIPES[pipeline.family])
    assert isinstance(found, StableDiffusionSettings)
    loss = replace(found.loss, predict=predict or found.loss.predict)
    settings = published.with_shape(replace(found, weights=str(path), loss=loss))
    size = int(pipeline.config("unet").get("sample_size") or settings.latent_size) * settings.latent.factor
    return replace(settings, resolution=size)
