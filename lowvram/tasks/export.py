"""What was trained of Stable Diffusion, as files that other programs load. Each writer says what it wrote."""

from pathlib import Path
from typing import Literal, cast

import torch

from lowvram.adapters import embedding_files, lora_files
from lowvram.errors import LowVRAMError
from lowvram.tasks import published
from lowvram.tasks.adapted import Adapted
from lowvram.tasks.fine_tuned import Inversion, Lora
from lowvram.tasks.stable_diffusion import StableDiffusionTask
from lowvram.weights import pipeline_writer
from lowvram.weights.pipeline import Pipeline

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write(
    task: StableDiffusionTask,
    out: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    layout: Literal["diffusers", "kohya"] = "diffusers",
) -> str:
    """Write what a task trained: to "diffusers", "single_file", "lora" or "embedding". The task is of no more use.

    dtype: of the weights; None: as they came, or as they were trained. layout: of lora and embedding.

    Raises:
        LowVRAMError: it trained nothing of the kind, stands on random weights, or the files can't be written.
    """
    if to == "lora":
        return _lora(task, out, dtype, layout)
    if to == "embedding":
        return _embedding(task, out, dtype, layout)
    if isinstance(task.tuned, Inversion):
        raise LowVRAMError(
            f"to={to}: what was trained is the word {task.settings.embedding.token}, and no weight of the pipeline.",
            "Use to=embedding, and load it beside the pipeline.",
        )
    pipeline = task.pipeline
    if not isinstance(pipeline, Pipeline):
        raise LowVRAMError(f"weights={published.RANDOM} are no pipeline to write.", "Train on published weights.")
    changed = task.tuned.changed()
    if task.settings.latent.path is not None:
        changed["vae"] = dict(task.codec.autoencoder.state_dict())
    changes = published.scheduler_changes(task.settings, pipeline.config("scheduler"))
    return write_pipeline(pipeline, out, to, changed, dtype, changes)


def rewrite(
    path: Path,
    out: Path,
    *,
    to: Literal["lora", "embedding"],
    dtype: torch.dtype | None = None,
    layout: Literal["diffusers", "kohya"] = "diffusers",
) -> str:
    """Write the LoRA or the word of a file in another layout or dtype.

    Raises:
        LowVRAMError: it can't be read or written.
    """
    if to == "embedding":
        word = embedding_files.read(path)
        kind: Literal["diffusers", "webui"] = "diffusers" if layout == "diffusers" else "webui"
        embedding_files.write(out, word.token, word.vectors, layout=kind, dtype=dtype)
        return f"the word {word.token}"
    parts = lora_files.read(path).parts
    states = {part: lora_files.state_of(layers) for part, layers in parts.items()}
    alphas = {part: {name: layer.alpha for name, layer in layers.items()} for part, layers in parts.items()}
    lora_files.write(out, states, alpha=alphas, layout=layout, dtype=dtype)
    return f"low-rank weights of {', '.join(states)}"


def write_pipeline(
    pipeline: Pipeline,
    out: Path,
    to: str,
    changed: pipeline_writer.Changed,
    dtype: torch.dtype | None = None,
    scheduler: dict[str, object] | None = None,
) -> str:
    """Write a pipeline as "diffusers" or "single_file". changed: state dicts of parts that differ from it."""
    writer = pipeline_writer.write_folder if to == "diffusers" else pipeline_writer.write_single_file
    writer(out, pipeline, changed, dtype=dtype, scheduler=scheduler)
    return "a pipeline" + (f" with its own {', '.join(changed)}" if changed else "")


def _lora(task: StableDiffusionTask, out: Path, dtype: torch.dtype | None, layout: str) -> str:
    if not isinstance(task.tuned, Lora):
        raise _none(task, "lora")
    states = task.tuned.states()
    kind = cast(Literal["diffusers", "kohya"], layout)
    lora_files.write(out, states, alpha=task.tuned.alphas(), layout=kind, dtype=dtype)
    return f"low-rank weights of {', '.join(states)}"


def _embedding(task: StableDiffusionTask, out: Path, dtype: torch.dtype | None, layout: str) -> str:
    if not isinstance(task.tuned, Inversion):
        raise _none(task, "embedding")
    token = task.settings.embedding.token
    kind: Literal["diffusers", "webui"] = "diffusers" if layout == "diffusers" else "webui"
    embedding_files.write(out, token, task.tuned.vectors(), layout=kind, dtype=dtype)
    return f"the word {token}"


def _none(task: StableDiffusionTask, to: str) -> LowVRAMError:
    has = f"the run was trained with train={task.settings.train}"
    if isinstance(task.tuned, Adapted):
        has = f"weights={task.settings.weights} were trained by no run"
    return LowVRAMError(f"to={to}: {has}.", "Use to=diffusers.")
