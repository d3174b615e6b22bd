"""Latent diffusion by its commands, as a user types them: trained from nothing, then sampled in every way."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run as command
from PIL import Image
from tiny_diffusion import DIT_WORDS, TINY_LDM, write_vae_recipe

from lowvram import evaluate
from lowvram.errors import LowVRAMError
from lowvram.marks import digests
from lowvram.receipt.account import in_words
from lowvram.receipt.ledger import Receipt
from lowvram.sample import SampleOptions, main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `python -m lowvram.train` was called once: outputs/tiny_vae and outputs/faces64_ldm."""
    home = tmp_path_factory.mktemp("home")
    write_vae_recipe(home)
    words = ["recipe=faces64_ldm", *TINY_LDM, *DIT_WORDS, "latent.recipe=./tiny_vae.yaml", "kimg=0.032"]
    done = command("lowvram.train", *words, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faces64_ldm stands on tiny_vae, of which no run is done: that one first" in done.stdout
    assert "latents by the autoencoder in outputs/tiny_vae" in done.stdout
    assert done.stdout.count("lowvram: done: outputs/") == 2
    assert "and before it tiny_vae (recipe tiny_vae, sha256:" in done.stdout
    assert sorted(path.name for path in (home / "outputs").iterdir()) == ["faces64_ldm", "tiny_vae"]
    return home


@pytest.fixture(scope="module")
def ldm(home: Path) -> Path:
    return home / "outputs" / "faces64_ldm"


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def test_training_leaves_what_sampling_needs(ldm: Path) -> None:
    there = {path.name for path in ldm.iterdir()}
    assert {"autoencoder", "captions.txt", "checkpoints", "fakes_000000.png", "metrics.jsonl", "recipe.yaml"} <= there
    with Image.open(ldm / "fakes_000000.png") as image:
        assert image.size == (64, 64)


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_still_names_its_autoencoder(ldm: Path, tmp_path: Path) -> None:
    """Also a new run that goes on from there; what the autoencoder took was taken over with it."""
    vae = ldm.parent / "tiny_vae"
    (step,) = (vae / "checkpoints").iterdir()
    name = f"tiny_vae (recipe tiny_vae, {digests.of_checkpoint(step, ['autoencoder_ema'])})"
    alone = shutil.copytree(ldm, tmp_path / "alone")
    on = (["kimg=0.048", "resume=auto", f"out={alone}"], ["kimg=0.064", f"resume={alone}", f"out={tmp_path / 'new'}"])
    for words in on:
        done = command("lowvram.train", "recipe=faces64_ldm", *TINY_LDM, *DIT_WORDS, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"and before it {name}, not in that: {in_words(Receipt.read(vae))}" in done.stdout
    for folder in ("alone", "new"):
        page = html.unescape((tmp_path / folder / "report.html").read_text())
        assert f"It stands on {name}, which is not in these sums" in page


def test_prompts(home: Path, ldm: Path) -> None:
    prompt = "prompt=a person with a zeppelin | a person with long hair"
    words = ["run=outputs/faces64_ldm", "n=2", "steps=4", "sampler=euler_ancestral", "guidance=2", "device=cpu", prompt]
    done = command("lowvram.sample", *words, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("no caption that this network learned from has zeppelin") == 1
    names = ["grid.png", "seed0000_00000.png", "seed0000_00001.png"]
    assert sorted(path.name for path in (ldm / "samples").iterdir()) == names
    done = command("lowvram.sample", *words[:-1], f"prompt={'hair ' * 33}", cwd=home)
    assert done.returncode == 2
    assert "has 33 words and punctuation marks, of which this model reads 32" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ldm / "samples-2").exists()


def test_an_image_and_a_mask(ldm: Path, tmp_path: Path) -> None:
    face, mask = np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    mask[8:21, 3:17] = 255
    for name, content in (("face", face), ("mask", mask), ("wide", np.zeros((32, 40), np.uint8))):
        Image.fromarray(content).save(tmp_path / f"{name}.png")
    options = {"run": str(ldm), "n": 2, "init": str(tmp_path / "face.png"), "device": "cpu"}
    main(SampleOptions(**options, mask=str(tmp_path / "mask.png"), out=str(tmp_path / "painted")))
    for index in range(2):
        made = pixels(tmp_path / "painted" / f"seed0000_{index:05d}.png")
        assert np.array_equal(made[mask == 0], face[mask == 0])
        assert not np.array_equal(made[mask > 0], face[mask > 0])
    main(SampleOptions(**options, strength=0.5, out=str(tmp_path / "varied")))
    assert pixels(tmp_path / "varied" / "seed0000_00000.png").shape == (32, 32, 3)
    with pytest.raises(LowVRAMError, match="mask is 40x32 pixels and init 32x32"):
        main(SampleOptions(**options, mask=str(tmp_path / "wide.png"), out=str(tmp_path / "never")))
    with pytest.raises(LowVRAMError, match="size=64x64 beside an image to change"):
        main(SampleOptions(**options, size="64x64", out=str(tmp_path / "never")))
    with pytest.raises(LowVRAMError, match="without an image"):
        main(SampleOptions(run=str(ldm), n=1, mask=str(tmp_path / "mask.png"), out=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()


def test_a_looping_walk(ldm: Path, tmp_path: Path) -> None:
    options = {"n": 2, "seconds": 2, "fps": 4, "steps": 2, "device": "cpu", "prompt": "long hair|short hair"}
    main(SampleOptions(run=str(ldm), out=str(tmp_path / "out"), interpolate=True, **options))
    with Image.open(tmp_path / "out" / "interpolation_seed0000.webp") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (8, (64, 32), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": 0.5}, "truncation is nothing that a run of diffusion knows"),
        ({"classes": "1"}, "classes is nothing that a run of diffusion knows"),
        ({"sampler": "magic"}, "magic"),
        ({"spacing": "wide"}, "wide"),
        ({"init": "nowhere.png"}, "init=nowhere.png can't be read"),
    ],
)
def test_options_that_do_not_fit_are_named(ldm: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(LowVRAMError, match=message):
        main(SampleOptions(run=str(ldm), n=1, device="cpu", out=str(tmp_path / "never"), **options))
    assert not (tmp_path / "never").exists()


def test_the_autoencoder_itself_gives_back_images(home: Path, tmp_path: Path) -> None:
    vae = home / "outputs" / "tiny_vae"
    main(SampleOptions(run=str(vae), n=2, device="cpu", out=str(tmp_path / "out")))
    assert len(list((tmp_path / "out").iterdir())) == 3
    with pytest.raises(LowVRAMError, match="steps is nothing that a run of autoencoder knows"):
        main(SampleOptions(run=str(vae), n=2, steps=3, device="cpu", out=str(tmp_path / "never")))
    with pytest.raises(LowVRAMError, match="has no walk to take"):
        main(SampleOptions(run=str(vae), interpolate=True, device="cpu", out=str(tmp_path / "never")))


@pytest.mark.parametrize(("run", "options"), [("faces64_ldm", {"steps": 2, "guidance": 1.5}), ("tiny_vae", {})])
def test_a_run_is_evaluated(
    run: str, options: dict[str, float], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it generates, or an autoencoder's reconstructions, against its data."""
    monkeypatch.chdir(home)
    asked = {"run": f"outputs/{run}", "n": 64, "metrics": "swd", "floor": False, "device": "cpu"}
    evaluate.main(evaluate.EvaluateOptions(**asked, **options))
    said = capsys.readouterr().out
    assert "64 generated images against 64 of the built-in faces" in said
    (kept,) = (home / "outputs" / run / "metrics").iterdir()
    assert json.loads(kept.read_text())["steps"] == options.get("steps")
    with pytest.raises(LowVRAMError, match="truncation_psi is nothing that a run of"):
        evaluate.main(evaluate.EvaluateOptions(**asked, truncation=0.7))
    if run == "tiny_vae":
        with pytest.raises(LowVRAMError, match="steps is nothing that a run of autoencoder knows"):
            evaluate.main(evaluate.EvaluateOptions(**asked, steps=3))
