"""Training an autoencoder and denoisers of its latents: what losses are, what a step depends on, what resumes.

A change of the golden numbers is a change of what training computes: it needs a reason, in the commit that changes
golden/autoencoder_losses.json or golden/diffusion_losses.json. To write them anew: LOWVRAM_WRITE_GOLDEN=1 pytest
tests/test_diffusion_training.py
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import CALM, MODELS, ldm_recipe, save_vae, steps, vae_recipe
from torch import Tensor

from lowvram import LowVRAMError, Trainer, checkpoint, load_run
from lowvram.data import latents
from lowvram.settings import Settings
from lowvram.tasks import codec

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "vae")


def check_golden(name: str, losses: object) -> None:
    """Compare with golden/NAME.json, to 2e-3 of each number and 2e-4."""
    path = GOLDEN / f"{name}.json"
    if os.environ.get("LOWVRAM_WRITE_GOLDEN"):
        path.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert isinstance(losses, list)
    assert len(golden) == len(losses) == 10
    for step, (got, wanted) in enumerate(zip(losses, golden, strict=True)):
        assert got == pytest.approx(wanted, rel=2e-3, abs=2e-4), f"step {step}"


def test_losses_of_the_autoencoder_are_the_golden_ones(tmp_path: Path) -> None:
    trainer = Trainer(vae_recipe(tmp_path / "run", "kimg=0.08", *CALM), quiet=True)
    check_golden("autoencoder_losses", steps(trainer))


@pytest.mark.parametrize("model", MODELS)
def test_losses_of_a_denoiser_are_the_golden_ones(model: str, vae: Path, tmp_path: Path) -> None:
    trainer = Trainer(ldm_recipe(tmp_path / "run", vae, "kimg=0.08", *CALM, *MODELS[model]), quiet=True)
    check_golden(f"{model}_losses", steps(trainer))


def mean_loss(losses: list[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in losses) / len(losses)


def test_the_autoencoder_learns_to_give_back_its_images(tmp_path: Path) -> None:
    trainer = Trainer(vae_recipe(tmp_path / "run", "optimizer.lr=0.01", "kimg=10"), quiet=True)
    originals = torch.stack([trainer.task.dataset()[i] for i in range(4)]).float()

    def error() -> float:
        return float((trainer.sample(4).float() - originals).abs().mean())

    before = error()
    losses = steps(trainer, 24)
    assert mean_loss(losses[-5:], "autoencoder") < 0.9 * mean_loss(losses[:2], "autoencoder")  # both its parts
    assert mean_loss(losses[-5:], "discriminator") != mean_loss(losses[:5], "discriminator")
    assert error() < 0.7 * before


@pytest.mark.parametrize("model", MODELS)
def test_a_denoiser_learns(model: str, vae: Path, tmp_path: Path) -> None:
    recipe = ldm_recipe(tmp_path / "run", vae, "optimizer.lr=0.005", "kimg=10", *MODELS[model])
    losses = steps(Trainer(recipe, quiet=True), 24)
    assert mean_loss(losses[-5:], "denoiser") < 0.75 * mean_loss(losses[:2], "denoiser")


@pytest.mark.parametrize(("predict", "schedule"), [("eps", "scaled_linear"), ("v", "cosine"), ("x0", "linear")])
def test_every_prediction_is_trained_and_sampled(predict: str, schedule: str, vae: Path, tmp_path: Path) -> None:
    words = [f"loss.predict={predict}", f"loss.schedule={schedule}", "loss.min_snr_gamma=5", "optimizer.lr=0.005"]
    trainer = Trainer(ldm_recipe(tmp_path / "run", vae, "kimg=10", *words), quiet=True)
    losses = steps(trainer, 20)
    assert mean_loss(losses[-5:], "denoiser") < mean_loss(losses[:2], "denoiser")
    assert trainer.sample(2).float().std() > 1


# What a step depends on.


def all_weights(trainer: Trainer) -> dict[str, Tensor]:
    trainer.applied.settle()
    return {
        f"{name}.{key}": value.clone()
        for name, network in trainer.task.networks.items()
        for key, value in network.state_dict().items()
    }


def recipe_of(model: str, out: Path, vae: Path, *words: str) -> Settings:
    if model == "autoencoder":
        return vae_recipe(out, *words)
    return ldm_recipe(out, vae, *MODELS[model], *words)


def test_the_discriminator_joins_in_late(tmp_path: Path) -> None:
    recipe = vae_recipe(tmp_path / "run", "loss.adversarial_start_kimg=0.016", "kimg=0.032")
    trainer = Trainer(recipe, quiet=True)
    start = all_weights(trainer)
    names = []
    for result in trainer:
        names.append(sorted(result.losses))
        if result.step == 2:
            now = all_weights(trainer)
            assert all(torch.equal(now[key], start[key]) for key in now if key.startswith("discriminator."))
    assert names == [["autoencoder"]] * 2 + [["autoencoder", "discriminator"]] * 2
    plain = steps(Trainer(vae_recipe(tmp_path / "plain", "loss.adversarial_weight=0", "kimg=0.032"), quiet=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    joined = [json.loads(line)["loss/autoencoder"] for line in lines]
    assert joined[0] == pytest.approx(mean_loss(plain[:2], "autoencoder"), rel=1e-5)
    assert joined[1] != pytest.approx(mean_loss(plain[2:], "autoencoder"), rel=1e-5)


def test_the_step_size_grows_over_the_warmup(vae: Path, tmp_path: Path) -> None:
    recipe = ldm_recipe(tmp_path / "run", vae, "optimizer.warmup_kimg=0.032", "optimizer.lr=0.001", "kimg=10")
    trainer = Trainer(recipe, quiet=True)
    (updater,) = trainer.applied.updaters.values()
    (part,) = updater.buckets["rest"].parts
    seen: list[float] = []
    part.optimizer.register_step_pre_hook(lambda *_: seen.append(part.optimizer.param_groups[0]["lr"]))
    steps(trainer, 5)
    assert seen == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001])


@pytest.mark.parametrize(("model", "dropout"), [("unet", 0.0), ("unet", 0.3), ("dit", 0.3), ("dit", 1.0)])
def test_the_condition_is_left_out_as_often_as_set(model: str, dropout: float, vae: Path, tmp_path: Path) -> None:
    recipe = ldm_recipe(tmp_path / "run", vae, f"loss.condition_dropout={dropout}", *MODELS[model])
    task = Trainer(recipe, quiet=True).task
    count = 2000
    labels, seeds = torch.arange(count) % 7, torch.arange(count) * 7919

    def told(part: slice) -> Tensor:
        """Which samples are told nothing, bool [n]; and that the others are told their own condition."""
        given = task.condition.training(labels[part], seeds[part], task.text)
        if model == "unet":
            nothing = given["labels"] == task.condition.count
            assert torch.equal(given["labels"][~nothing], labels[part][~nothing])
            return nothing
        words = given["context_mask"].sum(1)  # the start token counts always
        wanted = 1 + (task.text.tokenizer.encode(task.captions[:7]) != 0).sum(1)
        assert torch.equal(words[words > 1], wanted[labels[part]][words > 1])
        return words == 1

    nothing = told(slice(None))
    deviation = (dropout * (1 - dropout) / count) ** 0.5
    assert abs(float(nothing.float().mean()) - dropout) <= 4 * deviation
    assert torch.equal(torch.cat([told(slice(0, 700)), told(slice(700, None))]), nothing)  # of each sample alone


# Captions.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 images; only of eight there are captions, one of which is long."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(16):
        pixels = np.random.RandomState(index).randint(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        if index % 2:
            words = "word " * 50 if index == 15 else f"a picture with number {index}"
            (folder / f"{index:02d}.txt").write_text(words)
    return folder


def with_pictures(out: Path, vae: Path, pictures: Path, *words: str) -> Settings:
    return ldm_recipe(out, vae, *MODELS["dit"], f"data.path={pictures}", "text.length=12", *words)


def test_missing_and_long_captions_are_counted(
    pictures: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(with_pictures(tmp_path / "run", vae, pictures, "kimg=0.016"))
    assert "1 captions are longer than text.length=12 and are cut" in "".join(capsys.readouterr())
    assert "8 of 16 images of" in caplog.text
    trainer.fit()  # grids are of these captions, the long one among them
    images = trainer.sample(9, seed=2)
    assert torch.equal(load_run(trainer.run.folder, device="cpu").sample(9, seed=2), images)
    kept = (trainer.run.folder / "captions.txt").read_text().splitlines()
    assert kept[:2] == ["a picture with number 1", "a picture with number 3"]
    assert len(kept) == 8
    with pytest.raises(LowVRAMError, match="has 50 words"):
        trainer.sample(1, prompts=[kept[-1]])


def test_missing_captions_are_an_error_where_asked(pictures: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError, match=r"8 of 16 images of .* have no caption, 00.png first"):
        Trainer(with_pictures(tmp_path / "run", vae, pictures, "text.missing=error"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_classes_of_other_data_are_refused(vae: Path, tmp_path: Path, pictures: Path) -> None:
    Trainer(ldm_recipe(tmp_path / "run", vae, "kimg=0.008", *MODELS["unet"]), quiet=True).fit()
    (tmp_path / "other").mkdir()
    for name in ("a", "b"):
        shutil.copytree(pictures, tmp_path / "other" / name)
    words = ("resume=auto", f"data.path={tmp_path / 'other'}")
    with pytest.raises(LowVRAMError, match="has 2 classes, and the run was begun with"):
        Trainer(ldm_recipe(tmp_path / "run", vae, *words), quiet=True)


# Resuming.


def assert_same_end(a: Path, b: Path) -> None:
    """The newest checkpoints of both runs hold the same bits."""
    first, second = (checkpoint.latest_good(run / "checkpoints") for run in (a, b))
    assert first is not None
    assert second is not None
    assert first.name == second.name
    names = sorted(p.name for p in first.glob("*.safetensors") if not p.name.startswith("rng"))
    assert len(names) >= 4
    assert names == sorted(p.name for p in second.glob("*.safetensors") if not p.name.startswith("rng"))
    for name in names:
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert not [key for key in one if not torch.equal(one[key], other[key])], name


@pytest.mark.parametrize("model", ["autoencoder", *MODELS])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(model: str, vae: Path, tmp_path: Path) -> None:
    # Stopped within the warm-up, before the discriminator joins in.
    words = ["kimg=0.064", "snapshot_kimg=0.016", "optimizer.warmup_kimg=0.04"]
    words += ["loss.adversarial_start_kimg=0.024"] if model == "autoencoder" else []
    Trainer(recipe_of(model, tmp_path / "whole", vae, *words), quiet=True).fit()
    steps(Trainer(recipe_of(model, tmp_path / "stopped", vae, *words), quiet=True), 3)  # two of which are saved
    again = Trainer(recipe_of(model, tmp_path / "stopped", vae, *words, "resume=auto"), quiet=True)
    assert again.step == 2
    again.fit()
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    for name in ("whole", "stopped"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4, 6, 8]


class _Stop(Exception):
    """Stands for the user who stops the program while latents are made."""


def test_a_cache_that_was_interrupted_is_completed(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "_SHARD_BYTES", 2 * 8 * 8 * 8 * 2 * 16)  # 16 images a shard, with their flips
    words = ["kimg=0.032", "snapshot_kimg=0.016"]
    Trainer(ldm_recipe(tmp_path / "whole", vae, *words, f"latent.folder={tmp_path / 'one'}"), quiet=True).fit()
    plain, seen = codec.Codec.encode, 0

    def encode(self: codec.Codec, images: Tensor, device: torch.device) -> Tensor:
        nonlocal seen
        seen += len(images)
        if 70 < seen <= 86:  # in the third shard
            raise _Stop
        return plain(self, images, device)

    monkeypatch.setattr(codec.Codec, "encode", encode)
    recipe = ldm_recipe(tmp_path / "run", vae, *words, f"latent.folder={tmp_path / 'two'}")
    with pytest.raises(_Stop):
        Trainer(recipe, quiet=True)
    assert not (tmp_path / "run").exists()
    assert len(list((tmp_path / "two").rglob("*.safetensors"))) == 2
    seen = 1000
    Trainer(recipe, quiet=True).fit()
    assert seen == 1000 + 2 * 32  # half of the images, plain and flipped, and no more
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_latents_are_made_once_for_all_runs(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(ldm_recipe(tmp_path / "one", vae, f"latent.folder={tmp_path / 'cache'}"), quiet=True)

    def encode(*_: object) -> Iterator[None]:
        raise AssertionError("encoded again")

    monkeypatch.setattr(codec.Codec, "encode", encode)
    words = [f"latent.folder={tmp_path / 'cache'}", *MODELS["dit"]]
    Trainer(ldm_recipe(tmp_path / "two", vae, *words), quiet=True)
    with pytest.raises(AssertionError, match="encoded again"):  # another picture is another cache
        Trainer(ldm_recipe(tmp_path / "three", vae, "data.builtin_count=65", *words), quiet=True)


def test_several_crops_are_drawn_from_the_cache(vae: Path, tmp_path: Path) -> None:
    trainer = Trainer(ldm_recipe(tmp_path / "run", vae, "latent.crops=3"), quiet=True)
    items = trainer.task.items()
    first = torch.from_numpy(items.moments(0))
    assert items.crops == 3
    assert not torch.equal(first, torch.from_numpy(items.moments(0, crop=1)))
    other = Trainer(ldm_recipe(tmp_path / "plain", vae), quiet=True)
    assert torch.equal(first, torch.from_numpy(other.task.items().moments(0)))
    assert steps(trainer, 3) != steps(other, 3)


def test_a_changed_recipe_is_refused_with_the_reason(vae: Path, tmp_path: Path) -> None:
    Trainer(ldm_recipe(tmp_path / "run", vae, "kimg=0.008"), quiet=True).fit()
    with pytest.raises(LowVRAMError, match="don't fit the recipe"):
        Trainer(ldm_recipe(tmp_path / "run", vae, "resume=auto", "unet.channels=[32,32]"), quiet=True)
