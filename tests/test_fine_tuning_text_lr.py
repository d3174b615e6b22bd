"""Text encoders with a step size of their own, under each way to update."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_fine_tuning import CALM, batches, largest_difference, make_pictures, networks, trainer_for
from tiny_pipelines import make_pipeline
from torch import Tensor

from lowvram import checkpoint

TRAINED = ("text.train=true", "optimizer.clip_norm=null", "loss.condition_dropout=0")
LORA = ("sd15_lora", "lora.rank=2", *TRAINED)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_pictures(home / "pictures")
    make_pipeline(home / "sd1", "sd1")
    return home


def trainer(home: Path, out: Path, recipe: str, *words: str) -> Any:
    return trainer_for(recipe, home / "sd1", f"data.path={home / 'pictures'}", f"out={out}", *CALM, *words)


def moved(home: Path, out: Path, *words: str, steps: int = 1) -> dict[str, Tensor]:
    """By how much each tensor changed in some steps."""
    made = trainer(home, out, *words)
    begun = networks(made)
    for batch in batches(made, steps):
        made.train_step(batch)
    ended = networks(made)
    return {key: ended[key] - begun[key] for key in begun if not key.endswith("lora_A.weight")}


UPDATES: dict[str, tuple[str, ...]] = {
    "adam": (),
    "adam8bit": ("memory.optimizer.denoiser=adam8bit",),
    "lion8bit": ("memory.optimizer.denoiser=lion8bit", "optimizer.weight_decay=0"),
    "adafactor": ("memory.optimizer.denoiser=adafactor", "optimizer.weight_decay=0"),
    "deferred": ("memory.update.denoiser=deferred", "memory.state.denoiser=host"),
    "fused": ("memory.update.denoiser=fused",),
    "bf16": ("memory.weights_dtype.denoiser=bf16",),
}


@pytest.mark.parametrize("update", UPDATES)
def test_the_first_step_is_by_each_ones_own_size(update: str, home: Path, tmp_path: Path) -> None:
    words = (*LORA, *UPDATES[update], "optimizer.lr=0.02")
    alike = moved(home, tmp_path / "alike", *words)
    own = moved(home, tmp_path / "own", *words, "text.lr=0.005")
    for key, change in own.items():
        share = 0.25 if key.startswith("lora_text") else 1.0
        if update == "bf16":  # rounded to what is near: of single numbers it says little
            norms = float(change.norm()), share * float(alike[key].norm())
            assert norms[0] == pytest.approx(norms[1], rel=0.1)
        else:
            torch.testing.assert_close(change, share * alike[key], rtol=1e-4, atol=1e-7)
    assert any(key.startswith("lora_text") and change.any() for key, change in own.items())


def test_all_of_the_encoders_streamed(home: Path, tmp_path: Path) -> None:
    words = ("sd15_finetune", *TRAINED, "text.lr=0.002")
    streamed = ("memory.weights.denoiser=stream", "memory.update.denoiser=deferred")
    found = moved(home, tmp_path / "streamed", *words, *streamed, steps=2)
    assert largest_difference(found, moved(home, tmp_path / "plain", *words, steps=2)) == 0
    other = moved(home, tmp_path / "other", *words[:-1], steps=2)
    assert any(not torch.equal(other[key], found[key]) for key in found if key.startswith("text"))


NARROW = ("memory.optimizer.denoiser=adam8bit", "memory.state.denoiser=host", "memory.update.denoiser=deferred")


@pytest.mark.parametrize("memory", [(), pytest.param(NARROW, marks=pytest.mark.slow)], ids=["plain", "narrow"])
def test_it_follows_the_schedule_and_resumes_bit_for_bit(home: Path, tmp_path: Path, memory: tuple[str, ...]) -> None:
    words = (*LORA, "text.lr=0.004", "optimizer.lr=0.02", "optimizer.schedule=linear", "lora.dropout=0.1", *memory)
    trainer(home, tmp_path / "whole", *words).fit()
    first = trainer(home, tmp_path / "run", *words)
    sizes = []
    for result in first:
        sizes.append([group["lr"] for group in first.task.optimizers["denoiser"].param_groups])
        if result.step == 2:
            first.stop_request.asked = True
    assert first.interrupted
    for unet, text in sizes:
        assert text == pytest.approx(unet / 5) and unet < 0.02
    trainer(home, tmp_path / "run", *words, "resume=auto").fit()
    assert largest_difference(saved(tmp_path / "run"), saved(tmp_path / "whole")) == 0


def saved(run: Path) -> dict[str, Tensor]:
    folder = checkpoint.latest_good(run / "checkpoints")
    assert folder is not None
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}.{key}": tensor for file in files for key, tensor in load_file(file).items()}
