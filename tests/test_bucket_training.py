"""Latent diffusion on images in their own shapes, from a folder of files to a run that resumes exactly."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import TINY_LDM

from lowvram import Trainer, checkpoint, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import Autoencoder
from lowvram.progress import estimate_cpu_cost
from lowvram.run import Run
from lowvram.tasks.autoencoder import save
from lowvram.tasks.diffusion import DiffusionTask

SIZES = [(40, 40), (60, 36), (36, 60), (100, 40), (40, 44)]
IMAGES = 45  # 18 of them go to the square, 18 to 40x24, 9 to 24x40


@pytest.fixture
def recipe(tmp_path):
    """recipe(*overrides) -> one on a folder of images of several shapes, by an autoencoder that never learned."""
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        width, height = SIZES[index % len(SIZES)]
        pixels = np.full((height, width, 3), random.integers(0, 256, 3), np.uint8)
        pixels[:, : width // 2] //= 2
        Image.fromarray(pixels).save(photos / f"{index:03d}.png")
        (photos / f"{index:03d}.txt").write_text(f"picture number {index}")
    torch.manual_seed(0)
    save(Autoencoder(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4), tmp_path / "vae")

    def make(*overrides: str):
        return load_recipe("faces64_ldm", words(tmp_path, *overrides))

    return make


def words(folder: Path, *overrides: str) -> list[str]:
    # 96 images are 12 steps: two epochs of 45 and some.
    own = [f"data.path={folder / 'photos'}", "data.buckets=true", f"latent.path={folder / 'vae'}", "kimg=0.096"]
    return [*TINY_LDM, *own, "snapshot_kimg=0.048", "keep=9", f"out={folder / 'run'}", *overrides]


def watch(trainer: Trainer) -> list[torch.Tensor]:
    """The moments that the denoiser's loss is given, batch by batch."""
    (phase,) = trainer.task.phases
    seen, loss = [], phase.loss

    def watched(micro):
        seen.append(micro.images.clone())
        return loss(micro)

    phase.loss = watched
    return seen


def numbered(trainer: Trainer, images: torch.Tensor) -> list[int]:
    """Which image each is, by its latents or those of its mirror image."""
    items = trainer.task.items()
    known = {items.moments(i, flip).tobytes(): i for i in range(len(items)) for flip in (False, True)}
    return [known[image.numpy().tobytes()] for image in images]


def state(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest_good(folder / "checkpoints")
    assert newest is not None
    files = ("denoiser", "denoiser_ema", "optimizer_denoiser")
    return {f"{f} {name}": t for f in files for name, t in load_file(newest / f"{f}.safetensors").items()}


@pytest.mark.slow
def test_a_run_stopped_and_resumed_is_the_same_run(recipe, tmp_path):
    trainer = Trainer(recipe(), quiet=True)
    seen = watch(trainer)
    losses = [step.losses["denoiser"] for step in trainer]
    assert len(losses) == 12 and all(np.isfinite(losses))

    half = [*words(tmp_path, f"out={tmp_path / 'half'}"), "data.workers=2"]
    done = run("lowvram.train", "recipe=faces64_ldm", *half, "kimg=0.048", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = "3 shapes (width x height) and their images: 24x40 (9), 32x32 (18), 40x24 (18)"
    assert told in done.stdout and "45 images at 32x32" in done.stdout
    for name in ("reals.png", "fakes_000000.png"):
        assert Image.open(tmp_path / "half" / name).size == (64, 64)

    again = Trainer(load_recipe("faces64_ldm", [*half, "resume=auto"]), quiet=True)
    assert again.recipe.data.buckets and again.images_seen == 48
    resumed = watch(again)
    assert [step.losses["denoiser"] for step in again] == losses[6:]
    assert all(torch.equal(one, two) for one, two in zip(resumed[-6:], seen[-6:], strict=True))
    one, two = state(tmp_path / "run"), state(tmp_path / "half")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_every_image_is_learned_from_in_its_own_shape(recipe, network):
    trainer = Trainer(recipe(f"network={network}", "condition=text", "micro_batch.denoiser=4"), quiet=True)
    seen = watch(trainer)
    told = []
    training = trainer.task.condition.training
    trainer.task.condition.training = lambda labels, *rest: told.append(labels) or training(labels, *rest)
    assert all(np.isfinite(step.losses["denoiser"]) for step in trainer)
    seen, told = seen[-24:], told[-24:]  # the first few are trials of how long it will take
    shapes = {tuple(images.shape[1:]) for images in seen}
    assert shapes == {(8, 8, 8), (8, 6, 10), (8, 10, 6)}
    shown = collections.Counter()
    for images, labels in zip(seen, told, strict=True):
        numbers = numbered(trainer, images)
        assert labels.tolist() == numbers  # the caption is that of the image
        shown.update(numbers)
    # 96 images are two epochs of 45 and some: a full epoch shows each image of a bucket, but for less than a batch.
    assert sum(shown.values()) == 96 and set(shown) == set(range(IMAGES)) and max(shown.values()) <= 3
    # None of the three is larger than what plans are made for.
    assert max(torch.Size(shape).numel() for shape in shapes) == trainer.task.example(1)[0].numel()


def test_the_time_a_cpu_takes_is_told_from_images_of_one_shape(recipe):
    trainer = Trainer(recipe(), quiet=True)
    seen = watch(trainer)
    assert "for each kimg on this CPU" in estimate_cpu_cost(trainer.task, trainer.recipe, trainer.applied, 0)
    assert [tuple(images.shape) for images in seen] == [(1, 8, 8, 8), (8, 8, 8, 8)]


def test_an_autoencoder_of_unknown_scale_is_measured_over_all_shapes(recipe, tmp_path):
    trainer = Trainer(recipe(), quiet=True)
    found, items = trainer.task.codec, trainer.task.items()
    found.measure(items)
    means = np.concatenate([items.moments(i)[:4].astype(np.float64).ravel() for i in range(IMAGES)])
    spread = np.concatenate([np.exp(items.moments(i)[4:].astype(np.float64)).ravel() for i in range(IMAGES)])
    assert found.autoencoder.shift_factor == pytest.approx(means.mean(), rel=1e-4, abs=1e-6)
    assert found.autoencoder.scaling_factor == pytest.approx((means.var() + spread.mean()) ** -0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("faces32", [], "data.buckets=true is for latent diffusion alone, and task=stylegan2"),
        ("faces64_vae", [], "data.buckets=true is for latent diffusion alone, and task=autoencoder"),
        ("faces64_ldm", ["latent.crops=2"], "does not go with latent.crops=2"),
        ("faces64_ldm", ["resolution=32"], "nothing but the square at resolution=32: sides are multiples of 16"),
        ("faces64_ldm", ["resolution=32", "network=dit", "latent.factor=8"], "the 2 of network=dit"),
    ],
)
def test_where_buckets_cannot_be(name, overrides, said):
    with pytest.raises(LowVRAMError) as caught:
        load_recipe(name, ["data.buckets=true", *overrides])
    assert said in caught.value.problem and caught.value.remedy


def test_an_older_run_folder_has_no_buckets(recipe, tmp_path):
    trainer = Trainer(recipe("data.buckets=false", "kimg=0.008"), quiet=True)
    trainer.fit()
    path = tmp_path / "run" / "recipe.yaml"
    text = path.read_text()
    assert "\n  buckets: false\n" in text
    path.write_text(text.replace("\n  buckets: false\n", "\n", 1))
    assert Run.open(tmp_path / "run").settings.data.buckets is False


def test_the_autoencoder_of_a_recipe_with_buckets_is_trained_on_squares(recipe):
    earlier = DiffusionTask.earlier(recipe("latent.path=null"), None)
    assert earlier is not None and earlier.recipe == "faces64_vae" and earlier.data.buckets is False
