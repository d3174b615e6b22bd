"""What fine-tuning trains, against diffusers' own networks on the same images, noise and levels; and what it leaves."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_fine_tuning import (
    CALM,
    RECIPES,
    batches,
    largest_difference,
    make_pictures,
    networks,
    no_warnings,
    stored,
    task_of,
    trainer_for,
)
from tiny_pipelines import FAMILIES, load_pipeline, make_pipeline
from torch import Tensor
from torch.nn import functional as F

from lowvram import Trainer, seeded
from lowvram.adapters.lora import plain_state
from lowvram.data.latents import LatentSet
from lowvram.phase import MicroBatch
from lowvram.tasks import load_weights

GAMMA = 5.0


class World:
    """Pipelines by family, in files and in diffusers, and a folder of images."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pictures = make_pictures(home / "pictures")
        self.folders: dict[str, Path] = {family: make_pipeline(home / family, family) for family in FAMILIES}
        self.theirs: dict[str, Any] = {family: load_pipeline(folder) for family, folder in self.folders.items()}
        self._runs = 0

    def trainer(self, recipe: str, family: str, *words: str, pictures: bool = True) -> Trainer:
        self._runs += 1
        data = [f"data.path={self.pictures}"] if pictures else []
        return trainer_for(recipe, self.folders[family], *data, f"out={self.home / str(self._runs)}", *words)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    no_warnings()
    return World(tmp_path_factory.mktemp("world"))


# The loss by diffusers.


@torch.no_grad()
def told(pipeline: Any, captions: list[str], *, half: bool = True) -> dict[str, Any]:
    """The keyword arguments of diffusers' UNet. half: as what is kept of them on disk."""

    def kept(tensor: Tensor) -> Tensor:
        return tensor.half().float() if half else tensor

    n = len(captions)
    if not hasattr(pipeline, "text_encoder_2"):
        return {"encoder_hidden_states": kept(pipeline.encode_prompt(captions, "cpu", 1, False)[0])}
    context, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    there = torch.tensor([bool(caption) for caption in captions])  # its pipeline has zeros for none
    context, pooled = context * there[:, None, None], pooled * there[:, None]
    sizes = torch.tensor([[32, 40, 0, 4, 32, 32]] * n)  # 40x32, of which the centre is cut
    return {
        "encoder_hidden_states": kept(context),
        "added_cond_kwargs": {"text_embeds": kept(pooled), "time_ids": sizes},
    }


def micro_batch(trainer: Trainer, batch: Any) -> MicroBatch:
    phase = trainer.task.phases[0]
    (micro,) = phase.micro_batches(batch.images, batch.labels, batch.position, trainer.images_seen, trainer.recipe.seed)
    return micro


def their_loss(
    pipeline: Any,
    micro: MicroBatch,
    captions: list[str],
    *,
    gamma: float | None = None,
    offset: float = 0.0,
    half: bool = True,
) -> Tensor:
    """Mean squared error by diffusers' UNet and noise scheduler, each sample weighed by its level."""
    scale = pipeline.vae.config.scaling_factor
    mean, log_variance = micro.images.float().chunk(2, dim=1)
    std = (0.5 * log_variance.clamp(-30, 20)).exp()
    x0 = (mean + std * seeded.randn(micro.seeds, *mean.shape[1:], stream="latent")) * scale
    noise = seeded.randn(micro.seeds, *x0.shape[1:], stream="diffusion.noise")
    noise = noise + offset * seeded.randn(micro.seeds, len(noise[0]), 1, 1, stream="diffusion.offset")
    times = (seeded.rand(micro.seeds, stream="diffusion.level") * 1000).long()
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    out = pipeline.unet(scheduler.add_noise(x0, noise, times), times, **told(pipeline, captions, half=half)).sample
    of_noise = scheduler.config.prediction_type == "epsilon"
    target = noise if of_noise else scheduler.get_velocity(x0, noise, times)
    error = F.mse_loss(out, target, reduction="none").mean(dim=(1, 2, 3))
    if gamma is not None:
        alpha_bar = scheduler.alphas_cumprod[times]
        snr = alpha_bar / (1 - alpha_bar)
        error = error * snr.clamp(max=gamma) / (snr if of_noise else snr + 1)
    return error.mean()


def captions_of(trainer: Trainer, micro: MicroBatch) -> list[str]:
    """By the text files beside the images."""
    names = [task_of(trainer).instances.images.file_name(int(label)) for label in micro.labels]
    return [Path(trainer.recipe.data.path or "", name).with_suffix(".txt").read_text() for name in names]


CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sd2 full": ("sd2", "finetune", ("ema.enabled=true", "text.train=true")),
    "sdxl full": (
        "sdxl",
        "finetune",
        ("loss.min_snr_gamma=null", "loss.offset_noise=0.1", "memory.weights_dtype.denoiser=fp32"),
    ),
    "sd1 lora": ("sd1", "lora", ("text.train=true", "ema.enabled=true", "lora.dropout=0.3")),
    "sd2 lora": ("sd2", "lora", ("lora.dora=true", "lora.alpha=8")),
    "sdxl lora": ("sdxl", "lora", ("text.train=true", "lora.dora=true", "ema.enabled=true")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_and_what_changes(case: str, world: World) -> None:
    family, recipe, words = CASES[case]
    trainer = world.trainer(f"{RECIPES[family]}_{recipe}", family, "loss.condition_dropout=0", *words)
    pipeline, settings = world.theirs[family], task_of(trainer).settings
    assert (settings.family, settings.loss.predict) == (family, "v" if family == "sd2" else "eps")
    begun = networks(trainer)
    first, second = batches(trainer, 2)
    micro = micro_batch(trainer, first)
    loss, half = settings.loss, not settings.text.train
    with torch.no_grad():  # LoRA and DoRA begin as the weights are
        captions, gamma = captions_of(trainer, micro), loss.min_snr_gamma
        wanted = their_loss(pipeline, micro, captions, gamma=gamma, offset=loss.offset_noise, half=half)
    assert trainer.train_step(first).losses["denoiser"] == pytest.approx(float(wanted), rel=1e-5)
    trainer.train_step(second)
    ended = networks(trainer)
    assert begun.keys() == ended.keys()
    for key in begun:
        assert ended[key].isfinite().all()
        assert torch.equal(begun[key], ended[key]) == _unread(family, key), key
    assert any("_ema." in key for key in begun) == settings.ema.enabled
    assert any("text" in key for key in begun) == settings.text.train
    _assert_base_stays(trainer)


def _unread(family: str, key: str) -> bool:
    """SDXL's context is each encoder's last layer but one; of the second the last is `pooled`."""
    return family == "sdxl" and "text_encoder" in key and "_2" not in key.split(".")[0] and "layers.2." in key


def _assert_base_stays(trainer: Trainer) -> None:
    task = task_of(trainer)
    assert largest_difference(task.codec.autoencoder.state_dict(), stored(task.pipeline, "vae")) == 0
    if task.settings.train == "full":
        return
    assert largest_difference(plain_state(task.tuned.unet), stored(task.pipeline, "unet")) == 0
    if task.tuned.text is not None:
        for number, part in enumerate(task.condition.parts):
            plain = {
                ".".join(name for name in key.split(".") if name != "base_layer"): tensor
                for key, tensor in task.tuned.text.state(number).items()
                if "lora_" not in key
            }
            assert largest_difference(plain, stored(task.pipeline, part)) == 0


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_latents_are_those_of_diffusers(family: str, world: World) -> None:
    trainer = world.trainer(f"{RECIPES[family]}_lora", family)
    items, vae = task_of(trainer).instances.items, world.theirs[family].vae
    picture = Image.open(world.pictures / "0.png").convert("RGB").crop((4, 0, 36, 32))
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = vae.encode(x).latent_dist
    assert isinstance(items, LatentSet)
    mean, log_variance = torch.from_numpy(items.moments(0)).float().chunk(2)
    torch.testing.assert_close(mean, wanted.mean[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(log_variance, wanted.logvar[0], atol=1e-2, rtol=2e-3)


def test_three_steps_end_as_those_of_diffusers_unet(world: World) -> None:
    """AdamW, the bound on the gradient's norm and a falling step size, by torch on diffusers' UNet."""
    words = ("loss.condition_dropout=0", "optimizer.clip_norm=0.5", "kimg=0.006", "optimizer.weight_decay=0.1")
    trainer = world.trainer("sd15_finetune", "sd1", *CALM, *words, "optimizer.schedule=linear")
    pipeline = copy.copy(world.theirs["sd1"])
    pipeline.unet = copy.deepcopy(pipeline.unet).train()
    begun = {key: tensor.clone() for key, tensor in pipeline.unet.state_dict().items()}
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=0.02, eps=0.01, weight_decay=0.1)
    for step, batch in enumerate(batches(trainer, 3)):
        micro = micro_batch(trainer, batch)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 3)
        loss = their_loss(pipeline, micro, captions_of(trainer, micro), gamma=GAMMA)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipeline.unet.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.train_step(batch).losses["denoiser"] == pytest.approx(float(loss.detach()), rel=1e-5)
    ended = dict(pipeline.unet.state_dict())
    assert largest_difference(begun, ended) > 1e-3
    assert largest_difference(task_of(trainer).tuned.unet.state_dict(), ended) < 1e-5


def test_condition_dropout(world: World) -> None:
    trainer = world.trainer("sdxl_lora", "sdxl", "loss.condition_dropout=1")
    (batch,) = batches(trainer, 1)
    micro = micro_batch(trainer, batch)
    with torch.no_grad():
        wanted = their_loss(world.theirs["sdxl"], micro, ["", ""], gamma=GAMMA)
    assert trainer.train_step(batch).losses["denoiser"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_textual_inversion(family: str, world: World) -> None:
    """The word begins as "cat", three times over; it alone is trained, and takes part in the loss."""
    words = ["embedding.vectors=3", "embedding.initial=cat", "embedding.token=<toy>", "ema.enabled=true"]
    words += [f"data.path={make_pictures(world.home / 'plain', [None] * 4)}", "text.prompt=a red <toy>"]
    kind = [f"family={family}"] if family != "sd1" else []
    trainer = world.trainer("sd15_textual_inversion", family, *words, *kind, pictures=False)
    begun = networks(trainer)
    assert set(begun) == {
        f"embedding{end}.rows.0.{encoder}" for end in ("", "_ema") for encoder in range(1 + (family == "sdxl"))
    }
    first, *others = batches(trainer, 3)
    micro = micro_batch(trainer, first)
    with torch.no_grad():
        wanted = their_loss(world.theirs[family], micro, ["a red cat cat cat"] * 2, half=False)
    assert trainer.train_step(first).losses["denoiser"] == pytest.approx(float(wanted), rel=1e-5)
    for batch in others:
        trainer.train_step(batch)
    ended = networks(trainer)
    for key in begun:
        assert begun[key].shape == (3, 128 if key.endswith("1") or family == "sd1" else 64)
        assert (ended[key] - begun[key]).abs().amax(dim=1).min() > 0  # each vector
    _assert_base_stays(trainer)
    vectors = task_of(trainer).tuned.vectors()
    assert torch.equal(vectors[0], ended["embedding_ema.rows.0.0"])
    assert not torch.equal(vectors[0], ended["embedding.rows.0.0"])


# DreamBooth.


def test_prior_preservation(world: World, tmp_path: Path) -> None:
    place = tmp_path / "class"
    words = ["text.prompt=a red cat", "prior.prompt=a cat", "prior.images=3", f"prior.folder={place}", "batch=4"]
    words += [f"data.path={make_pictures(tmp_path / 'own', [None] * 2)}", "prior.weight=0.25"]

    def begin() -> tuple[Trainer, dict[str, int]]:
        trainer = world.trainer("sd15_dreambooth", "sd1", *words, pictures=False)
        return trainer, {path.name: path.stat().st_mtime_ns for path in place.iterdir()}

    trainer, made = begin()
    assert sorted(made) == ["00000.png", "00001.png", "00002.png"]
    by_weights = load_weights(world.folders["sd1"], device="cpu")
    images = by_weights.sample(3, seed=trainer.recipe.seed, prompts=["a cat"], steps=2, micro_batch=1)
    for name, image in zip(sorted(made), images, strict=True):
        assert alike(pixels(place / name), image.permute(1, 2, 0).numpy())
    # Both kinds are in the loss, each with its own caption, and those of the class by their weight.
    (batch,) = batches(trainer, 1)
    micro = micro_batch(trainer, batch)
    of_class = (micro.labels >= 2).tolist()
    assert set(of_class) == {False, True}
    wanted = 0.0
    for row, is_class in enumerate(of_class):
        one = MicroBatch(images=micro.images[[row]], labels=micro.labels[[row]], seeds=micro.seeds[[row]])
        with torch.no_grad():
            loss = their_loss(world.theirs["sd1"], one, ["a cat" if is_class else "a red cat"])
        wanted += float(loss) * (0.25 if is_class else 1.0) / 4
    assert trainer.train_step(batch).losses["denoiser"] == pytest.approx(wanted, rel=1e-5)
    # They are not made again; one that was interrupted, while a file was written, goes on with what is missing.
    assert begin()[1] == made
    before = pixels(place / "00001.png")
    (place / "00001.png").rename(place / ".00001.png.partial")
    _, again = begin()
    assert sorted(again) == sorted(made)
    assert {name for name in made if again[name] == made[name]} == {"00000.png", "00002.png"}
    assert alike(pixels(place / "00001.png"), before)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """But for the order of additions, in micro-batches of other sizes."""
    return bool(np.abs(one.astype(int) - other).max() <= 1)


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))
