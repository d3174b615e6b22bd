"""Fine-tuning as a user types it: trained, exported, and sampled here and by diffusers; and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from commands import run as command
from PIL import Image
from safetensors.torch import load_file, save_file
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
GUIDED: dict[str, Any] = {"steps": 3, "sampler": "euler", "spacing": "trailing", "guidance": 3.0, "negative": NEGATIVE}
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
        self.weights: dict[str, Path] = {family: make_pipeline(folder / family, family) for family in FAMILIES}
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
    sigma = float(pipeline.scheduler.init_noise_sigma)
    found = pipeline(
        prompt,
        negative_prompt=NEGATIVE,
        latents=start * (sigma**2 + 1) ** 0.5 / sigma,  # it multiplies them by sigma; we give the last level's variance
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=width,
        output_type="pt",
    )
    return found.images


def assert_same_image(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-3, beside the rounding of ours to whole numbers; of both, one of these."""
    assert ours.shape == theirs.shape
    assert ours.std() > 0.05
    whole = bool((theirs * 255 - (theirs * 255).round()).abs().max() < 1e-3)
    assert (ours - theirs).abs().max() <= (1 / 255 + 1e-6 if whole else 0.5 / 255 + 1e-3)


def converted(home: Home, kind: str, out: Path, **options: str) -> Path:
    convert.main(ConvertOptions(run=str(home.run(kind)), out=str(out), **options))
    return out


def differs(home: Home, kind: str) -> None:
    """What was trained shows."""
    base = load_weights(home.family(kind), device="cpu")
    plain = to_float(base.sample(1, seed=5, prompts=[PROMPT], **GUIDED))
    assert (plain - home.image(kind)).abs().max() > 0.02


def test_an_exported_pipeline_samples_the_same_in_diffusers(home: Home, tmp_path: Path) -> None:
    """As a folder and as one file."""
    folder = converted(home, "full", tmp_path / "pipeline", to="diffusers")
    file = converted(home, "full", tmp_path / "single.safetensors", to="single_file")
    theirs = load_pipeline(folder)
    assert_same_image(home.image("full"), by_diffusers(theirs))
    single = type(theirs).from_single_file(str(file), config=str(folder), local_files_only=True)
    single.set_progress_bar_config(disable=True)
    assert_same_image(home.image("full"), by_diffusers(single))
    differs(home, "full")


@pytest.mark.slow
def test_merged_low_rank_weights_sample_the_same(home: Home, tmp_path: Path) -> None:
    folder = converted(home, "lora", tmp_path / "pipeline", to="diffusers")
    assert_same_image(home.image("lora"), by_diffusers(load_pipeline(folder)))
    again = load_weights(folder, device="cpu")
    assert_same_image(home.image("lora"), to_float(again.sample(1, seed=5, prompts=[PROMPT], **GUIDED)))
    differs(home, "lora")


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
        image = to_float(ours.sample(1, seed=5, prompts=[prompt], **GUIDED))
        assert_same_image(home.image("word", prompt), image)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_published_weights_sample_as_in_diffusers_at_any_size(family: str, home: Home) -> None:
    """SDXL is told the size of what it makes."""
    task = load_weights(home.weights[family], device="cpu")
    ours = task.sample(1, seed=5, prompts=[PROMPT], size=(48, 32), **GUIDED)
    assert_same_image(to_float(ours), by_diffusers(load_pipeline(home.weights[family]), width=48))


def test_from_the_command_line(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths, as a user has them; what is written, and what is said."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home.weights["sd1"], "model")
    make_pictures(Path("mine"))
    words = ["recipe=sd15_lora", "weights=model", "data.path=mine", *TINY, "ema.enabled=true"]
    done = command("lowvram.train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lowvram: done: outputs/sd15_lora" in done.stdout
    there = {path.name for path in Path("outputs/sd15_lora").iterdir()}
    assert {"captions.txt", "checkpoints", "fakes_000000.png", "recipe.yaml"} <= there
    convert.main(ConvertOptions(run="outputs/sd15_lora", to="lora", out="mine.safetensors"))
    assert "wrote low-rank weights of unet to mine.safetensors" in capsys.readouterr().out
    options: dict[str, Any] = {"n": 2, "steps": 2, "size": "48x32", "negative": "red", "device": "cpu"}
    sample_command.main(
        SampleOptions(weights="mine.safetensors", base="model", prompt="a cat | a dog", out="made", **options)
    )
    names = ["grid.png", "seed0000_00000.png", "seed0000_00001.png"]
    assert sorted(path.name for path in Path("made").iterdir()) == names
    with Image.open(Path("made") / names[1]) as image:
        assert image.size == (48, 32)


# Sampling options.


def sampled(home: Home, out: Path, **options: Any) -> np.ndarray:
    usual: dict[str, Any] = {"n": 1, "steps": 2, "prompt": PROMPT, "device": "cpu"}
    sample_command.main(SampleOptions(weights=str(home.weights["sd1"]), out=str(out), **usual | options))
    return np.array(Image.open(out / "seed0000_00000.png"))


def test_sampling_options(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = sampled(home, tmp_path / "plain", vram="6GB")
    said = capsys.readouterr().out
    assert "vram=6GB is for a GPU: it bounds nothing on cpu" in said
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
    animation: dict[str, Any] = {"interpolate": True, "seconds": 1, "fps": 2, "n": 1, "device": "cpu", "steps": 2}
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
        ({"prompt": "cat " * 90}, "has 90 tokens, of which CLIP reads 75"),
        ({"negative": "cat " * 90}, "has 90 tokens, of which CLIP reads 75"),
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


# What is refused.


def copied(home: Home, out: Path, family: str = "sd1") -> Path:
    return shutil.copytree(home.weights[family], out)


def changed_unet(home: Home, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a pipeline whose UNet has other tensors."""
    file = next((copied(home, out) / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return out


def not_a_pipeline(home: Home, out: Path) -> Path:
    return home.pictures


def inpainting(home: Home, out: Path) -> Path:
    config = copied(home, out) / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    return out


def missing_key(home: Home, out: Path) -> Path:
    return changed_unet(home, out, lambda tensors: tensors.pop("conv_out.bias"))


def unexpected_key(home: Home, out: Path) -> Path:
    return changed_unet(home, out, lambda tensors: tensors.update({"conv_out.bias2": torch.zeros(4)}))


def wrong_shape(home: Home, out: Path) -> Path:
    return changed_unet(home, out, lambda tensors: tensors.update({"conv_out.bias": torch.zeros(5)}))


def not_a_number(home: Home, out: Path) -> Path:
    return changed_unet(home, out, lambda tensors: tensors["conv_out.bias"].fill_(float("nan")))


def truncated(home: Home, out: Path) -> Path:
    file = next((copied(home, out) / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    return out


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def with_code(home: Home, out: Path) -> Path:
    path = out.with_suffix(".ckpt")
    torch.save({"state_dict": {"model.diffusion_model.x": Hostile(home.folder / "executed")}}, path)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda home, out: out, ("does not exist",)),
        (not_a_pipeline, ("no unet/config.json",)),
        (inpainting, ("take 9 channels", "text-to-image")),
        (missing_key, ("diffusion_pytorch_model.safetensors", "conv_out.bias is missing")),
        (unexpected_key, ("conv_out.bias2 has no place here",)),
        (wrong_shape, ("conv_out.bias has shape [5], not [4]",)),
        (not_a_number, ("diffusion_pytorch_model.safetensors", "conv_out.bias")),
        (truncated, ("diffusion_pytorch_model.safetensors",)),
        (with_code, (".ckpt",)),
    ],
)
def test_weights_that_are_refused(
    make: Callable[[Home, Path], Path], words: tuple[str, ...], home: Home, tmp_path: Path
) -> None:
    """The same by training and by sampling. Nothing is executed, and nothing left."""
    weights = make(home, tmp_path / "weights")
    with pytest.raises(LowVRAMError) as trained:
        trainer_for("sd15_lora", weights, f"data.path={home.pictures}", f"out={tmp_path / 'never'}")
    with pytest.raises(LowVRAMError) as sampled:
        load_weights(weights, device="cpu")
    for word in (*words, str(weights)):
        assert word in str(trained.value)
    assert str(weights) in str(sampled.value)
    assert not (tmp_path / "never").exists()
    assert not (home.folder / "executed").exists()


@pytest.mark.parametrize(
    ("recipe", "words", "says"),
    [
        ("sd15_lora", ["weights=null", "resolution=64"], ("none are named", "weights=PATH")),
        ("sd15_lora", ["resolution=36"], ("resolution=36 is not a multiple of 16", "Use 32")),
        ("sd15_lora", ["family=sdxl"], ("family=sdxl is not the sd1 of weights=",)),
        ("sd15_lora", ["prior.prompt=a dog"], ("prior.prompt='a dog'", "text.prompt")),
        ("sd15_lora", ["lora.targets=[to_z]"], ("'to_z'", "attention, transformer, all")),
        ("sd15_lora", ["lora.rank=0"], ("lora.rank=0",)),
        ("sd15_lora", ["text.missing=error"], ("2.png",)),
        ("sd15_lora", ["data.masks=nowhere"], ("nowhere",)),
        ("sd15_lora", ["data.masks={bad}"], ("0.png",)),
        ("sd15_lora", ["data.masks=alpha"], ("data.masks=alpha", "no image")),
        ("sd15_lora", ["sampling.sampler=euler2"], ("euler2",)),
        ("sd15_lora", ["memory.frozen=somewhere"], ("memory.frozen=somewhere",)),
        ("sd15_finetune", ["base=nf4"], ("base=nf4 with train=full", "train=lora")),
        ("sd15_finetune", ["train=half"], ("train=half",)),
        ("sd15_finetune", ["loss.zero_terminal_snr=true"], ("eps",)),
        ("sd15_textual_inversion", ["text.train=true"], ("text.train=true with train=textual_inversion",)),
        ("sd15_textual_inversion", ["embedding.token=cat"], ("'cat'", "already", "<cat-1>")),
        ("sd15_textual_inversion", ["embedding.initial=zebra"], ("'zebra'", "5 tokens for 1 vectors")),
        ("sd15_textual_inversion", ["embedding.vectors=0"], ("embedding.vectors=0",)),
        ("sd15_textual_inversion", ["embedding.templates=objct"], ("embedding.templates=objct", "object, style")),
        (
            "sd15_textual_inversion",
            ["embedding.templates=style", "text.prompt=a <mine>"],
            ("text.prompt='a <mine>' and embedding.templates=style",),
        ),
        ("sd15_lora", ["text.lr=0.1"], ("text.lr=0.1 with text.train=false",)),
        ("sd15_lora", ["text.lr=0", "text.train=true"], ("text.lr=0.0 must be above 0",)),
    ],
)
def test_recipes_that_are_refused(
    recipe: str, words: list[str], says: tuple[str, ...], home: Home, tmp_path: Path
) -> None:
    bad = tmp_path / "masks"
    bad.mkdir()
    (bad / "0.png").write_bytes(b"no image")
    words = [f"data.path={home.pictures}", f"out={tmp_path / 'never'}", *(word.format(bad=bad) for word in words)]
    with pytest.raises(LowVRAMError) as error:
        trainer_for(recipe, home.weights["sd1"], *words)
    for word in says:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) >= 2  # a remedy
    assert not (tmp_path / "never").exists()


def test_files_that_do_not_go_together(home: Home, tmp_path: Path) -> None:
    lora = converted(home, "lora", tmp_path / "lora.safetensors", to="lora")
    word = converted(home, "word", tmp_path / "word.safetensors", to="embedding")
    one, xl = home.weights["sd1"], home.weights["sdxl"]
    for paths, base, says in (
        (f"{lora}", one, (str(lora), "made for this family")),
        (f"{lora}", None, (str(lora), "base=PATH")),
        (f"{word}|{xl}", None, (str(word), "made for this family")),
        (f"{one}|{xl}", None, (str(one), str(xl), "one of them")),
        (f"{one}", xl, (str(one), str(xl), "one of them")),
        (f"{one}|{tmp_path / 'nowhere'}", None, ("nowhere is not there",)),
    ):
        with pytest.raises(LowVRAMError) as error:
            load_weights(paths, base=base, device="cpu")
        for word_ in says:
            assert word_ in str(error.value)
    with pytest.raises(LowVRAMError) as error:
        run_task(home.run("lora"), base=one)
    assert str(one) in str(error.value) or "don't fit" in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"run": "word", "to": "lora"}, ("train=textual_inversion",)),
        ({"run": "word", "to": "diffusers"}, ("<mine>", "to=embedding")),
        ({"run": "lora", "to": "embedding"}, ("train=lora",)),
        ({"run": "lora", "to": "stylegan"}, ("stable_diffusion", "to=stylegan")),
        ({"run": "lora", "to": "lora", "layout": "webui"}, ("layout=webui",)),
        ({"run": "lora", "to": "lora", "dtype": "int8"}, ("dtype=int8",)),
        ({"run": "lora", "to": "lora", "out": "there.safetensors"}, ("there.safetensors is there already",)),
        ({"run": "lora", "to": "lora", "out": "never"}, ("does not end in .safetensors",)),
        ({"run": "lora", "to": "bundle"}, ("to=bundle",)),
        ({"to": "lora"}, ("run or weights",)),
        ({"run": "word"}, ("to is missing: one of diffusers, single_file", "fits to=embedding.")),
        ({"run": "lora"}, ("to is missing", "fits to=lora or to=diffusers or to=single_file.")),
        ({"weights": "sd1"}, ("to is missing", "fits to=diffusers or to=single_file.")),
        ({"weights": "sd1", "to": "lora"}, ("sd1 were trained by no run",)),
    ],
)
def test_conversions_that_are_refused(
    options: dict[str, str], says: tuple[str, ...], home: Home, tmp_path: Path
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    options = {"out": "never" if options.get("to") == "diffusers" else "never.safetensors", **options}
    options["out"] = str(tmp_path / options["out"])
    if "run" in options:
        options["run"] = str(home.run(options["run"]))
    if "weights" in options:
        options["weights"] = str(home.weights[options["weights"]])
    with pytest.raises(LowVRAMError) as error:
        convert.main(ConvertOptions(**options))
    for word in says:
        assert word in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_a_word_is_not_lost_silently(home: Home, tmp_path: Path) -> None:
    """A pipeline has no place for it."""
    word = converted(home, "word", tmp_path / "word.safetensors", to="embedding")
    base = str(home.weights["sd1"])
    for options in ({"weights": f"{base}|{word}"}, {"weights": str(word), "base": base}):
        with pytest.raises(LowVRAMError, match="no place for the word <mine>"):
            convert.main(ConvertOptions(**options, to="diffusers", out=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()
