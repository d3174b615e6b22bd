"""Text encoders with a step size of their own, under each way to update."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_fine_tuning import CALM, batches, largest_difference, networks, trainer_for
from torch import Tensor

from lowvram import checkpoint

TRAINED = ("text.train=true", "optimizer.clip_norm=null", "loss.condition_dropout=0")
LORA = ("sd15_lora", "lora.rank=2", *TRAINED)


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


RESUMED: dict[str, tuple[str, ...]] = {
    "lora": LORA,
    "lora, deferred, state on the host": (*LORA, *UPDATES["deferred"]),
    "lora, 8 bits": (*LORA, *UPDATES["adam8bit"]),
    "lora, bf16": (*LORA, *UPDATES["bf16"]),
    "full, streamed": ("sd15_finetune", *TRAINED, "memory.weights.denoiser=stream", "memory.update.denoiser=deferred"),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * ("," in k)) for k in RESUMED])
def test_a_run_goes_on_with_it_or_without_it(kind: str, home: Path, tmp_path: Path) -> None:
    """What the optimizer knows of each weight stays, and the next step has the size that is named now."""
    words = (*RESUMED[kind], "optimizer.lr=0.02", "kimg=0.004")
    trainer(home, tmp_path / "without", *words).fit()  # two steps
    trainer(home, tmp_path / "with", *words, "text.lr=0.01").fit()
    exact = "bf16" not in kind  # whose steps are rounded
    for begun, now, share in (("without", "0.005", 0.25), ("with", "null", 2.0), ("with", "0.04", 4.0)):
        as_it_was = resumed(home, tmp_path / begun, *words)
        other = resumed(home, tmp_path / begun, *words, f"text.lr={now}")
        for one, two in zip(state_of(as_it_was), state_of(other), strict=True):
            assert torch.equal(one, two)
        assert sum(bool(tensor.any()) for tensor in state_of(other)) > len(state_of(other)) // 2
        wanted, found = one_step(as_it_was), one_step(other)
        for one, two in zip(state_of(as_it_was), state_of(other), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
        for key, change in found.items() if exact else ():
            alike = wanted[key] * (share if "text" in key.split(".")[0] else 1.0)
            torch.testing.assert_close(change, alike, rtol=1e-3, atol=1e-6)
        assert any(change.any() for key, change in found.items() if "text" in key.split(".")[0])


def resumed(home: Path, run: Path, *words: str) -> Any:
    """A copy of a run, which has one more step to go."""
    copy = run.parent / f"{run.name} {len(list(run.parent.iterdir()))}"
    shutil.copytree(run, copy)
    return trainer(home, copy, *words, "kimg=0.006", "resume=auto")


def state_of(made: Any) -> list[Tensor]:
    """Of the optimizer, as a checkpoint has it."""
    tensors, _ = made.applied.updaters["denoiser"].state()
    return [tensors[key].detach().clone().float() for key in sorted(tensors)]


def one_step(made: Any) -> dict[str, Tensor]:
    begun = networks(made)
    made.fit()
    ended = networks(made)
    return {key: ended[key] - begun[key] for key in begun}
