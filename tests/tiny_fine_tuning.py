"""Fine-tuning of the pipelines of tiny_pipelines.py, small enough for seconds: 32x32 images of their own captions."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_diffusion import settings_of
from torch import Tensor

from lowvram import Trainer
from lowvram.data.loader import Batch
from lowvram.settings import StableDiffusionSettings
from lowvram.tasks import load_run, published
from lowvram.tasks.stable_diffusion import StableDiffusionTask
from lowvram.weights.pipeline import Pipeline

CAPTIONS = ("a red cat", "cat, red, dog", "", "a dog", "red", "the cat and dog")

TINY = (
    "resolution=32",
    "batch=2",
    "kimg=0.008",
    "data.workers=0",
    "grid=1",
    "log_kimg=0.002",
    "sampling.steps=2",
    "optimizer.warmup_kimg=0",
    "device=cpu",
)

# As in tiny_diffusion.py, for what is compared across orders of sums; without a bound on the gradient of first steps.
CALM = ("optimizer.eps=0.01", "optimizer.lr=0.02", "optimizer.schedule=constant", "memory.optimizer.denoiser=adam")
RECIPES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}


def make_pictures(folder: Path, captions: Sequence[str | None] = CAPTIONS, size: tuple[int, int] = (40, 32)) -> Path:
    """Noise of a few colours, with a text file beside each image: the same on every call. None: no file."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for index, caption in enumerate(captions):
        coarse = random.randint(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(folder / f"{index}.png")
        if caption is not None:
            (folder / f"{index}.txt").write_text(caption)
    return folder


def settings_for(recipe: str, weights: Path, *overrides: str) -> StableDiffusionSettings:
    """`load_recipe`, with Hydra's composition only once."""
    settings = settings_of(recipe, [*TINY, f"weights={weights}", *overrides])
    assert isinstance(settings, StableDiffusionSettings)
    return published.with_shape(settings)


def trainer_for(recipe: str, weights: Path, *overrides: str) -> Trainer:
    return Trainer(settings_for(recipe, weights, *overrides), quiet=True)


def task_of(trainer: Trainer) -> Any:
    assert isinstance(trainer.task, StableDiffusionTask)
    return trainer.task


def run_task(folder: Path, **options: Any) -> Any:
    return load_run(folder, device="cpu", **options)


def batches(trainer: Trainer, count: int) -> Iterator[Batch]:
    with closing(trainer.loader.iterate(0)) as found:
        yield from islice(found, count)


def networks(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that is trained or averaged, by network and name."""
    trainer.applied.settle()
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, network in trainer.task.networks.items()
        for key, tensor in trainer.applied.full_state(network).items()
    }


def stored(pipeline: Pipeline, part: str) -> dict[str, Tensor]:
    """The tensors of a part as its file has them."""
    return {name: pipeline.tensor(part, name) for name in pipeline.names(part)}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


@cache
def no_warnings() -> None:
    """Silence of diffusers and transformers, whose advice is for their users."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def to_float(images: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] -> float in [0, 1], as diffusers' pipelines give them."""
    return images.to(torch.float32) / 255
