"""Fine-tuning resumed, and under every way to save memory: the same weights are trained."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault
from safetensors.torch import load_file
from tiny_fine_tuning import CALM, batches, largest_difference, networks, run_task, trainer_for
from tiny_pipelines import make_pipeline
from torch import Tensor

from lowvram import LowVRAMError, checkpoint

REORDERED = 1e-6  # largest difference of a weight when sums are made in another order
STEPS = 3

WORD = ("embedding.vectors=2", "embedding.initial=cat", "text.prompt=a <mine>")
RECIPES: dict[str, tuple[str, ...]] = {
    "lora": ("sd15_lora", "ema.enabled=true", "text.train=true", "lora.rank=4", "lora.dropout=0.2"),
    "textual_inversion": ("sd15_textual_inversion", *WORD, "ema.enabled=true"),
    "full": ("sd15_finetune", "ema.enabled=true", "optimizer.schedule=cosine"),
}


def trainer(home: Path, out: Path, recipe: str, *words: str) -> Any:
    return trainer_for(recipe, home / "sd1", f"data.path={home / 'pictures'}", f"out={out}", *words)


# Resuming.


def saved(run: Path) -> dict[str, Tensor]:
    """File and key of every tensor of the newest checkpoint."""
    folder = checkpoint.latest_good(run / "checkpoints")
    assert folder is not None
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}.{key}": tensor for file in files for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of four steps, by what is trained."""

    @cache
    def make(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind) / "run"
        recipe, *words = RECIPES[kind]
        trainer(home, out, recipe, *words).fit()
        return out

    return make


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "lora")) for k in RECIPES])
def test_a_resumed_run_ends_bit_for_bit(
    kind: str, home: Path, tmp_path: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, *words = RECIPES[kind]
    first = trainer(home, tmp_path / "run", recipe, *words)
    for result in first:
        if result.step == 2:
            first.stop_request.asked = True
    assert first.interrupted
    torch.manual_seed(1)  # of what was drawn before, nothing counts
    trainer(home, tmp_path / "run", recipe, *words, "resume=auto").fit()
    one, other = saved(tmp_path / "run"), saved(whole(kind))
    assert largest_difference(one, other) == 0
    assert {name.removesuffix("_ema") for name in run_task(whole(kind)).networks} <= {k.split(".")[0] for k in one}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_and_its_weights_can_move(kind: str, home: Path, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    """Sampled in another place it gives what the trainer sampled; the weights are named where they went."""
    run = whole(kind)
    task = run_task(run)
    options = {"seed": task.settings.seed, "prompts": ["a red cat <mine>"], "steps": 2}
    wanted = task.sample(1, **options)
    shutil.copytree(run, tmp_path / "moved")
    assert torch.equal(run_task(tmp_path / "moved").sample(1, **options), wanted)
    weights = home / "sd1"
    weights.rename(home / "elsewhere")
    try:
        with pytest.raises(LowVRAMError, match=r"(?s)which is not there\..*base=PATH") as error:
            run_task(tmp_path / "moved")
        assert str(weights) in str(error.value)
        moved = run_task(tmp_path / "moved", base=home / "elsewhere")
        assert torch.equal(moved.sample(1, **options), wanted)
    finally:
        (home / "elsewhere").rename(weights)
    assert not torch.equal(
        run_task(run, base=make_pipeline(tmp_path / "other", "sd1", seed=1)).sample(1, **options), wanted
    ) or (kind == "full")


# Policies.

Run = Callable[..., tuple[dict[str, Tensor], list[dict[str, float]]]]


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(recipe, setting, ...): what is trained and averaged after some steps, and their losses."""

    @cache
    def make(recipe: str, *words: str, count: int = STEPS) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        usual = [*CALM, "batch=4", "kimg=10", "optimizer.clip_norm=0.5", "optimizer.warmup_kimg=0.02"]
        made = trainer(home, tmp_path_factory.mktemp("run") / "run", recipe, *usual, *words)
        losses = [made.train_step(batch).losses for batch in batches(made, count)]
        return networks(made), losses

    return make


LORA = ("sd15_lora", "lora.rank=4")
TEXT = (*LORA, "lora.dropout=0.1", "text.train=true", "ema.enabled=true")
NEW_WORD = ("sd15_textual_inversion", *WORD)
FULL = ("sd15_finetune", "ema.enabled=true")

STREAMED = ("memory.weights.denoiser=stream", "memory.update.denoiser=deferred")
TECHNIQUES: dict[str, tuple[tuple[str, ...], tuple[str, ...], float]] = {
    "LoRA, recompute": (TEXT, ("memory.activations.denoiser=recompute",), 0.0),
    "LoRA, offload": (LORA, ("memory.activations.denoiser=offload",), 0.0),
    "LoRA, frozen streamed": (TEXT, ("memory.frozen=stream", "memory.ema=host"), 0.0),
    "LoRA, frozen streamed, recompute, micro-batches": (
        LORA,
        ("memory.frozen=stream", "memory.activations.denoiser=recompute", "micro_batch.denoiser=2"),
        REORDERED,
    ),
    "LoRA, micro-batches of 1": (TEXT, ("micro_batch.denoiser=1",), REORDERED),
    "LoRA, micro-batches of 2, recompute": (
        TEXT,
        ("micro_batch.denoiser=2", "memory.activations.denoiser=recompute"),
        REORDERED,
    ),
    "LoRA, deferred": (TEXT, ("memory.update.denoiser=deferred", "memory.state.denoiser=host"), 0.0),
    "a word, frozen streamed": (NEW_WORD, ("memory.frozen=stream", "memory.activations.denoiser=recompute"), 0.0),
    "full, streamed": (FULL, (*STREAMED, "memory.ema=host"), 0.0),
    "full, streamed, recompute, micro-batches": (
        FULL,
        (*STREAMED, "memory.activations.denoiser=recompute", "micro_batch.denoiser=2"),
        REORDERED,
    ),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_same_is_trained_under(technique: str, run: Run) -> None:
    recipe, words, tolerance = TECHNIQUES[technique]
    found, losses = run(*recipe, *words)
    wanted, wanted_losses = run(*recipe)
    begun, _ = run(*recipe, count=0)
    for one, other in zip(losses, wanted_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert largest_difference(found, wanted) <= tolerance
    assert largest_difference(begun, wanted) > 100 * REORDERED


def test_a_step_that_ran_out_of_memory_drops_the_same(run: Run, home: Path, tmp_path: Path) -> None:
    """Made again with smaller micro-batches, under recomputation."""
    words = [*CALM, "batch=4", "kimg=10", "optimizer.clip_norm=0.5", "optimizer.warmup_kimg=0.02"]
    made = trainer(home, tmp_path / "run", *TEXT, *words)
    said: list[str] = []
    made.rescue.say = said.append
    fault = Fault(at=(1, 3))
    next(iter(made.task.tuned.unet.blocks().values())).register_forward_hook(fault)
    for batch in batches(made, STEPS):
        made.train_step(batch)
    assert fault.raised == 2 and len(said) == 2
    assert made.applied.policy.phases["denoiser"].micro_batch in (1, 2), said
    wanted, _ = run(*TEXT)
    assert largest_difference(networks(made), wanted) <= REORDERED


@pytest.mark.parametrize("narrow", ["fp16", "bf16"])
def test_lora_on_a_narrow_base(narrow: str, run: Run) -> None:
    """It trains nearly as on a base of fp32, in fp32 itself, and exactly the same under the policies."""
    plain, plain_losses = run(*LORA)
    found, losses = run(*LORA, f"base={narrow}")
    words = ("memory.frozen=stream", "memory.activations.denoiser=recompute")
    assert largest_difference(run(*LORA, f"base={narrow}", *words)[0], found) == 0
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for one, other in zip(losses, plain_losses, strict=True):
        assert one == pytest.approx(other, rel=0.05)
    begun, _ = run(*LORA, count=0)

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((one[key].double() - other[key].double()).square().sum()) for key in one) ** 0.5

    assert 0 < distance(found, plain) < 0.35 * distance(plain, begun)


def test_lora_on_four_bits(run: Run) -> None:
    pytest.importorskip("bitsandbytes")
    found, losses = run(*LORA, "base=nf4")
    plain, plain_losses = run(*LORA)
    assert found.keys() == plain.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for one, other in zip(losses, plain_losses, strict=True):
        assert one == pytest.approx(other, rel=0.3)
    words = ("memory.frozen=stream", "memory.activations.denoiser=recompute")
    assert largest_difference(run(*LORA, "base=nf4", *words)[0], found) == 0
