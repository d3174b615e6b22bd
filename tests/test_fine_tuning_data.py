"""Fine-tuning on images as people have them: of several shapes, in folders that say how often, with tags and masks."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import make_pipeline

from lowvram import Trainer, load_recipe

SIZES = ((64, 64), (64, 96), (96, 64))  # height, width


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A run of SDXL's LoRA with everything that can be said of images and captions."""
    home = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for number in range(6):
        folder = "3_cat" if number < 3 else "dog"
        height, width = SIZES[number % 3]
        for place in ("pictures", "masks"):
            (home / place / folder).mkdir(parents=True, exist_ok=True)
        picture = random.randint(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(picture).save(home / "pictures" / folder / f"{number}.png")
        (home / "pictures" / folder / f"{number}.txt").write_text("a red cat, long hair, blue eyes, smiling")
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        if number != 5:  # which counts whole
            Image.fromarray(mask).save(home / "masks" / folder / f"{number}.png")
    words = [
        *(f"weights={make_pipeline(home / 'sdxl', 'sdxl')}", "resolution=64", "batch=2", "kimg=0.006"),
        *("device=cpu", "data.workers=0", f"data.path={home / 'pictures'}", f"data.masks={home / 'masks'}"),
        *("data.buckets=true", "text.shuffle=true", "text.tag_dropout=0.2", "loss.unmasked_weight=0.1"),
        *("text.prompt=a cat", "prior.prompt=an animal", "prior.images=4", "sampling.steps=1", "grid=2"),
        *("sampling.prompts=[a red cat,a dog]", f"out={home / 'run'}"),
    ]
    made = Trainer(load_recipe("sdxl_lora", words), quiet=True)
    made.fit()
    yield made


def test_batches_are_of_one_shape_with_masks_and_labels(trainer: Trainer) -> None:
    items, own = trainer.task.items(), 6
    assert trainer.task.instances.own == own  # type: ignore[attr-defined]
    assert len(items) == 2 * (3 * 3 + 3)  # cats three times, and as many of the class
    shapes, labels = set(), set()
    stream = trainer.loader.iterate(0)
    for _ in range(24):
        batch = next(stream)
        shapes.add(tuple(batch.images.shape[1:]))
        labels |= set(batch.labels.tolist())
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
            mask = image[-1].float()
            assert float(mask.min()) >= 0 and float(mask.max()) <= 1
            assert float(mask.mean()) == (1 if label >= own - 1 else pytest.approx(0.5, abs=0.1))
    stream.close()
    assert len(shapes) == 3 and labels == set(range(10))


def test_the_network_is_told_sizes_and_cuts(trainer: Trainer) -> None:
    sizes = trainer.task.instances.size_ids  # type: ignore[attr-defined]
    assert sizes.shape == (10, 1, 6)
    assert sizes[:3, 0, :2].tolist() == [[64, 64], [64, 96], [96, 64]]
    assert all(height * width <= 64 * 64 for height, width in sizes[:, 0, 4:].tolist())


def test_it_samples_what_the_recipe_asks_for(trainer: Trainer) -> None:
    assert (trainer.run.folder / "captions.txt").read_text().splitlines() == ["a red cat", "a dog"]
    images = trainer.sample(2, seed=trainer.recipe.seed)
    assert images.shape == (2, 3, 64, 64) and not torch.equal(images[0], images[1])
