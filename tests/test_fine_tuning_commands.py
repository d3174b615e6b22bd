"""Fine-tuning as a user types it: trained, exported, and sampled here and by diffusers; and what is refused."""

import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from commands import run as command
from PIL import Image
from tiny_fine_tuning import TINY, make_pictures, no_warnings, run_task, to_float, trainer_for
from tiny_pipelines import FAMILIES, load_pipeline, make_pipeline
from torch import Tensor

from lowvram import LowVRAMError, convert, seeded
from lowvram import sample as sample_command
from lowvram.convert import ConvertOptions
from lowvram.sample import SampleOptions
from lowvram.sampling.gan import sample_seeds
from lowvram.tasks import load_weights

PROMPT, NEGATIVE = "a red cat", "the dog"
GUIDED = {"steps": 3, "sampler": "euler", "spacing": "trailing", "guidance": 3.0, "negative": NEGATIVE}
BIG = ("optimizer.lr=0.01", "kimg=0.006", "optimizer.schedule=constant", "memory.weights_dtype.denoiser=fp32")

RUNS: dict[str, tuple[str, ...]] = {
    "full": ("sd2", "sd21_finetune", "text.train=true", *BIG[:-1], "optimizer.lr=0.001"),
    "lora": ("sdxl", "sdxl_lora", "text.train=true", "lora.targets=[attention,conv1]", "lora.alpha=8", *BIG),
    "word": ("sd1", "sd15_textual_inversion", "embedding.vectors=2", "embedding.initial=cat", "ema.enabled=true", *BIG),
}


class Home:
    """Pipelines by family, images, and runs that are made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = make_pictures(folder / "pictures")
        self.weights = {family: make_pipeline(folder / family, family) for family in FAMILIES}
        self.run = cache(self._run)
        self.image = cache(self._image)

    def _run(self, kind: str) -> Path:
        family, recipe, *words = RUNS[kind]
        out = self.folder / f"run_{kind}"
        trainer_for(recipe, self.weights[family], f"data.path={self.pictures}", f"out={out}", *words).fit()
        return out

    def family(self, kind: str) -> Path:
        return self.weights[RUNS[kind][0]]

    def _image(self, kind: str, prompt: str = PROMPT) -> Tensor:
        """By the run itself, [1, 3, 32, 32] in 0..1."""
        return to_float(run_task(self.run(kind)).sample(1, seed=5, prompts=[prompt], **GUIDED))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    no_warnings()
    return Home(tmp_path_factory.mktemp("home"))


def by_diffusers(pipeline: Any, prompt: str = PROMPT, *, width: int = 32) -> Tensor:
    """The same prompts, start and steps."""
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing"}
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    start = seeded.randn(sample_seeds(1, 5), 4, 8, width // 4, stream="sampler.start")
    found = pipeline(
        prompt,
        negative_prompt=NEGATIVE,
        latents=start * pipeline.scheduler.init_noise_sigma,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=width,
        output_type="pt",
    )
    return found.images


def assert_same_image(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-3, beside the rounding to whole numbers."""
    assert ours.shape == theirs.shape
    assert ours.std() > 0.05
    assert (ours - theirs).abs().max() <= 0.5 / 255 + 1e-3


def converted(home: Home, kind: str, out: Path, **options: str) -> Path:
    convert.main(ConvertOptions(run=str(home.run(kind)), out=str(out), **options))
    return out


def differs(home: Home, kind: str) -> None:
    """What was trained shows."""
    base = load_weights(home.family(kind), device="cpu")
    plain = to_float(base.sample(1, seed=5, prompts=[PROMPT], **GUIDED))
    assert (plain - home.image(kind)).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_exported_pipelines_sample_the_same_in_diffusers(kind: str, home: Home, tmp_path: Path) -> None:
    """Low-rank weights are merged into them."""
    folder = converted(home, kind, tmp_path / "pipeline", to="diffusers")
    theirs = load_pipeline(folder)
    assert_same_image(home.image(kind), by_diffusers(theirs))
    differs(home, kind)
    file = converted(home, kind, tmp_path / "single.safetensors", to="single_file")
    single = type(theirs).from_single_file(str(file), config=str(folder), local_files_only=True)
    single.set_progress_bar_config(disable=True)
    assert_same_image(home.image(kind), by_diffusers(single))
    again = load_weights(file if kind == "lora" else folder, device="cpu")
    options = {} if kind == "lora" else {"size": (32, 32)}
    if kind == "full":
        again.settings.resolution = 32
        assert_same_image(home.image(kind), to_float(again.sample(1, seed=5, prompts=[PROMPT], **GUIDED, **options)))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_file_does_the_same_in_diffusers(layout: str, home: Home, tmp_path: Path) -> None:
    file = converted(home, "lora", tmp_path / "mine.safetensors", to="lora", layout=layout)
    pipeline = load_pipeline(home.family("lora"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(file)
    assert_same_image(home.image("lora"), by_diffusers(pipeline))
    ours = load_weights(file, base=home.family("lora"), device="cpu")
    assert_same_image(home.image("lora"), to_float(ours.sample(1, seed=5, prompts=[PROMPT], **GUIDED)))


def test_a_word_does_the_same_in_diffusers(home: Home, tmp_path: Path) -> None:
    file = converted(home, "word", tmp_path / "mine.safetensors", to="embedding")
    pipeline = load_pipeline(home.family("word"))
    pipeline.load_textual_inversion(str(file), token="<mine>")
    prompt = "a <mine> dog"
    assert_same_image(home.image("word", prompt), by_diffusers(pipeline, prompt))
    for layout in ("diffusers", "kohya"):
        mine = converted(home, "word", tmp_path / f"{layout}.safetensors", to="embedding", layout=layout)
        ours = load_weights(f"{mine}|{home.family('word')}", device="cpu")
        word = "<mine>"
        image = to_float(ours.sample(1, seed=5, prompts=[prompt.replace("<mine>", word)], **GUIDED))
        assert_same_image(home.image("word", prompt), image)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_published_weights_sample_as_in_diffusers_at_any_size(family: str, home: Home) -> None:
    """SDXL is told the size of what it makes."""
    task = load_weights(home.weights[family], device="cpu")
    ours = task.sample(1, seed=5, prompts=[PROMPT], size=(48, 32), **GUIDED)
    assert_same_image(to_float(ours), by_diffusers(load_pipeline(home.weights[family]), width=48))


def test_from_the_command_line(home: Home, tmp_path: Path) -> None:
    """Relative paths, as a user has them; what is written, and what is said."""
    shutil.copytree(home.weights["sd1"], tmp_path / "model")
    make_pictures(tmp_path / "mine")
    words = ["recipe=sd15_lora", "weights=model", "data.path=mine", *TINY, "ema.enabled=true"]
    done = command("lowvram.train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lowvram: done: outputs/sd15_lora" in done.stdout
    there = {path.name for path in (tmp_path / "outputs" / "sd15_lora").iterdir()}
    assert {"autoencoder", "captions.txt", "checkpoints", "fakes_000000.png", "recipe.yaml"} <= there
    done = command("lowvram.convert", "run=outputs/sd15_lora", "to=lora", "out=mine.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote low-rank weights of unet to mine.safetensors" in done.stdout
    words = ["weights=mine.safetensors", "base=model", "prompt=a cat | a dog", "n=2", "steps=2", "vram=6GB"]
    done = command("lowvram.sample", *words, "size=48x32", "negative=red", "out=made", "device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    print("SAID", done.stdout)
    names = ["grid.png", "seed0000_00000.png", "seed0000_00001.png"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == names
    with Image.open(tmp_path / "made" / names[1]) as image:
        assert image.size == (48, 32)
    done = command("lowvram.sample", "weights=mine.safetensors", "out=never", cwd=tmp_path)
    assert done.returncode == 2
    assert "Add base=PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "never").exists()


# Sampling options.


def sampled(home: Home, out: Path, **options: Any) -> np.ndarray:
    usual: dict[str, Any] = {"n": 1, "steps": 2, "prompt": PROMPT, "device": "cpu"}
    sample_command.main(SampleOptions(weights=str(home.weights["sd1"]), out=str(out), **usual | options))
    return np.array(Image.open(out / "seed0000_00000.png"))


def test_sampling_options(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = sampled(home, tmp_path / "plain", vram="6GB")
    said = capsys.readouterr().out
    print("SAID", said)
    assert np.array_equal(sampled(home, tmp_path / "again"), plain)
    assert not np.array_equal(sampled(home, tmp_path / "negative", negative=NEGATIVE), plain)
    assert sampled(home, tmp_path / "wide", size="64x32").shape == (32, 64, 3)
    face, mask = np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    mask[8:21, 3:17] = 255
    for name, content in (("face", face), ("mask", mask)):
        Image.fromarray(content).save(tmp_path / f"{name}.png")
    init = {"init": str(tmp_path / "face.png")}
    made = sampled(home, tmp_path / "painted", **init, mask=str(tmp_path / "mask.png"))
    assert np.array_equal(made[mask == 0], face[mask == 0])
    assert not np.array_equal(made[mask > 0], face[mask > 0])
    assert not np.array_equal(sampled(home, tmp_path / "varied", **init, strength=0.5), plain)
    animation = {"interpolate": True, "seconds": 1, "fps": 2, "n": 1, "device": "cpu", "steps": 2}
    sample_command.main(
        SampleOptions(weights=str(home.weights["sd1"]), out=str(tmp_path / "walk"), prompt="a cat|a dog", **animation)
    )
    with Image.open(tmp_path / "walk" / "interpolation_seed0000.webp") as image:
        assert (image.size, getattr(image, "n_frames", 0)) == ((32, 32), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "50x32"}, "size=50x32 is not made of multiples of"),
        ({"size": "wide"}, "size=wide is no size"),
        ({"prompt": "cat " * 90}, "92"),
        ({"negative": "cat " * 90}, "92"),
        ({"strength": 0.5}, "without an image"),
        ({"truncation": 0.7}, "truncation is nothing that a run of stable_diffusion knows"),
        ({"classes": "3"}, "classes is nothing"),
        ({"sampler": "euler2"}, "euler2"),
        ({"steps": 2000}, "2000"),
    ],
)
def test_sampling_options_that_are_refused(options: dict[str, Any], words: str, home: Home, tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError) as error:
        sampled(home, tmp_path / "never", **options)
    assert words in str(error.value)
    assert not (tmp_path / "never").exists()
