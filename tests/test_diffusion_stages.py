"""One command trains a denoiser and all that it stands on: the autoencoder first, then latents, then the denoiser."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_diffusion import (
    DIT_WORDS,
    TINY_LDM,
    UNET_CLASSES,
    ldm_recipe,
    save_vae,
    settings_of,
    steps,
    vae_recipe,
    write_vae_recipe,
)

from lowvram import LowVRAMError, Trainer, checkpoint, load_recipe, load_run
from lowvram.settings import Settings
from lowvram.tasks.autoencoder import to_pixels

Staged = Callable[..., Settings]


@pytest.fixture
def staged(tmp_path: Path) -> Staged:
    """staged("NAME", ...): a recipe for `runs/NAME` that has no autoencoder yet."""
    vae = write_vae_recipe(tmp_path)

    def make(name: str, *overrides: str) -> Settings:
        words = [f"latent.recipe={vae}", f"out={tmp_path / 'runs' / name}", "kimg=0.016", *overrides]
        return settings_of("faces64_ldm", [*TINY_LDM, *words])

    return make


def folders(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_the_autoencoder_is_trained_first_and_once(
    staged: Staged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(staged("one")).fit()
    assert "faces64_ldm stands on tiny_vae, of which no run is done: that one first" in capsys.readouterr().out
    runs = tmp_path / "runs"
    assert folders(runs) == ["one", "tiny_vae"]
    assert checkpoint.latest_good(runs / "tiny_vae" / "checkpoints") == runs / "tiny_vae/checkpoints/step-00000002"
    trained = (runs / "tiny_vae" / "metrics.jsonl").stat().st_mtime_ns
    other = Trainer(staged("two", *DIT_WORDS))
    assert "that one first" not in capsys.readouterr().out
    other.fit()
    assert folders(runs) == ["one", "tiny_vae", "two"]
    assert (runs / "tiny_vae" / "metrics.jsonl").stat().st_mtime_ns == trained
    both = [(runs / name / "autoencoder" / "config.json").read_text() for name in ("one", "two")]
    assert both[0] == both[1]
    # Latents have mean 0 and standard deviation 1 by what was measured on them.
    moments = torch.stack([torch.from_numpy(other.task.items().moments(i)) for i in range(64)])
    z = other.task.codec.to_latents(moments, torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert abs(float(z.mean())) < 0.02
    assert float(z.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_an_autoencoder_of_other_data_is_not_taken(staged: Staged, tmp_path: Path) -> None:
    Trainer(staged("one"), quiet=True)
    Trainer(staged("two", "data.builtin_count=40"), quiet=True)
    assert {"tiny_vae", "tiny_vae-2"} <= set(folders(tmp_path / "runs"))
    saved = [checkpoint.latest_good(tmp_path / "runs" / name / "checkpoints") for name in ("tiny_vae", "tiny_vae-2")]
    assert all(saved)


def test_an_autoencoder_that_was_stopped_is_gone_on_with(
    staged: Staged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = tmp_path / "runs" / "tiny_vae"
    words = ["kimg=0.064", "snapshot_kimg=0.016"]
    write_vae_recipe(tmp_path, kimg=0.064)
    steps(Trainer(load_recipe(str(tmp_path / "tiny_vae.yaml"), [*words, f"out={vae}"]), quiet=True), 3)
    assert [path.name for path in checkpoint.candidates(vae / "checkpoints")] == ["step-00000002"]
    Trainer(staged("one"))
    said = capsys.readouterr().out
    assert "that one first" in said
    assert f"resuming {vae / 'checkpoints' / 'step-00000002'}" in said
    assert "tiny_vae-2" not in folders(tmp_path / "runs")
    assert checkpoint.candidates(vae / "checkpoints")[0].name == "step-00000008"
    lines = [json.loads(line) for line in (vae / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]


def test_stopping_within_the_first_stage_ends_both(
    staged: Staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vae_recipe(tmp_path, kimg=10)
    plain = Trainer.train_step

    def stop(self: Trainer, batch: object) -> object:
        result = plain(self, batch)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on with"):
        Trainer(staged("one"), quiet=True)
    assert folders(tmp_path / "runs") == ["tiny_vae"]  # nothing of the second stage
    assert checkpoint.latest_good(tmp_path / "runs/tiny_vae/checkpoints") is not None


@pytest.mark.parametrize("words", [pytest.param((), marks=pytest.mark.slow), UNET_CLASSES, DIT_WORDS])
def test_a_run_folder_is_all_that_sampling_needs(
    words: tuple[str, ...], staged: Staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(staged("one", *words, f"latent.folder={tmp_path / 'cache'}"), quiet=True)
    trainer.fit()
    wanted = trainer.sample(3, seed=5)
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(tmp_path / "runs" / "one", moved)
    for folder in (tmp_path / "runs", tmp_path / "cache"):
        shutil.rmtree(folder)
    (tmp_path / "tiny_vae.yaml").unlink()
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "other-cache"))
    assert torch.equal(load_run(moved, device="cpu").sample(3, seed=5), wanted)
    assert not (tmp_path / "other-cache").exists()
    # Nor does going on need more than the images.
    words = ("resume=auto", "kimg=0.032", "latent.folder=null", f"out={moved}")
    again = Trainer(settings_of("faces64_ldm", words), quiet=True)
    again.fit()
    assert again.step == 4
    assert folders(moved.parent) == ["run"]


@pytest.mark.slow
def test_going_on_in_another_folder_keeps_the_autoencoder(staged: Staged, tmp_path: Path) -> None:
    first = Trainer(staged("one"), quiet=True)
    first.fit()
    shutil.rmtree(tmp_path / "runs" / "tiny_vae")
    saved = first.run.folder / "checkpoints" / "step-00000002"
    for number, start in enumerate((first.run.folder, saved)):
        home = tmp_path / f"other-{number}"
        trainer = Trainer(staged("one", f"resume={start}", f"out={home / 'run'}", "kimg=0.024"), quiet=True)
        trainer.fit()
        assert trainer.step == 3
        assert folders(home) == ["run"]  # and no second autoencoder, in whose latents the denoiser would be lost
        mine, theirs = (
            (run / "autoencoder" / "diffusion_pytorch_model.safetensors").read_bytes()
            for run in (home / "run", first.run.folder)
        )
        assert mine == theirs


# Autoencoders from elsewhere.


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=3.0,
    ).eval()


@pytest.mark.parametrize("inside", [False, True])
def test_an_autoencoder_of_diffusers_is_taken(inside: bool, kl: AutoencoderKL, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline" / "vae" if inside else tmp_path / "vae"
    kl.save_pretrained(folder)
    trainer = Trainer(ldm_recipe(tmp_path / "run", folder.parent if inside else folder, "kimg=0.016"), quiet=True)
    assert trainer.task.scale == 3.0
    image = trainer.task.dataset()[3].float() / 127.5 - 1
    with torch.no_grad():
        wanted = kl.encode(image[None]).latent_dist.parameters[0]
    found = torch.from_numpy(trainer.task.items().moments(3)).float()
    assert float((found - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())
    trainer.fit()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = to_pixels(kl.decode(z / 3.0).sample)
    assert int((trainer.task.codec.decode(z, torch.device("cpu"), 2).int() - decoded.int()).abs().max()) <= 1
    assert AutoencoderKL.from_pretrained(trainer.run.folder / "autoencoder").config.scaling_factor == 3.0


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"latent_channels": 8}, (), "channels=8, and the recipe says latent.channels=4"),
        ({"block_out_channels": (8, 16)}, (), "factor=2, and the recipe says latent.factor=4"),
        ({}, ("latent.factor=2",), "factor=4, and the recipe says latent.factor=2"),
    ],
)
def test_latents_of_another_shape_are_refused(
    changes: dict[str, object], words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    vae = save_vae(tmp_path / "vae", **changes)
    with pytest.raises(LowVRAMError, match=message) as error:
        Trainer(ldm_recipe(tmp_path / "run", vae, *words), quiet=True)
    assert "Use latent." in error.value.remedy
    assert not (tmp_path / "run").exists()


def test_what_is_no_autoencoder_is_refused(tmp_path: Path, kl: AutoencoderKL) -> None:
    vae = save_vae(tmp_path / "vae")

    def refused(path: Path, message: str) -> None:
        with pytest.raises(LowVRAMError, match=message):
            Trainer(ldm_recipe(tmp_path / "run", path), quiet=True)
        assert not (tmp_path / "run").exists()

    refused(tmp_path / "nowhere", "holds no autoencoder")
    Trainer(ldm_recipe(tmp_path / "ldm", vae, "kimg=0.008"), quiet=True).fit()
    refused(tmp_path / "ldm", "a run of diffusion, not of an autoencoder")
    weights = vae / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(vae, "can't be read")
    kl.save_pretrained(vae)  # attention in the middle, which the config of the next line lacks
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "mid_block_add_attention": False}))
    refused(vae, "does not fit its config.json")
    (vae / "config.json").write_text("{")
    refused(vae, "can't be read")


def test_a_run_of_lowvram_is_an_autoencoder_too(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    first = Trainer(vae_recipe(run, "kimg=0.016"), quiet=True)
    first.fit()
    trainer = Trainer(ldm_recipe(tmp_path / "run", run, "kimg=0.008"), quiet=True)
    trainer.fit()
    kept = trainer.task.codec.autoencoder.state_dict()
    for name, tensor in first.task.networks["autoencoder_ema"].state_dict().items():
        assert torch.equal(kept[name], tensor)
    with Image.open(tmp_path / "run" / "reals.png") as image:
        assert image.size == (64, 64)
