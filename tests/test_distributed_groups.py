"""Two processes with parameters that have a step size of their own train as one process does, sharded or not."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import run
from safetensors.torch import load_file
from test_distributed import launch, losses
from tiny_fine_tuning import CALM, TINY
from torch import Tensor

from lowvram import checkpoint

WORDS = (
    *(*TINY, *CALM, "log_kimg=0.004", "batch=4", "kimg=0.012", "ema.enabled=true"),
    *("text.train=true", "text.lr=0.002", "optimizer.clip_norm=0.5", "optimizer.schedule=linear"),
)
RECIPES = {"lora": ("recipe=sd15_lora", "lora.rank=2", "lora.dropout=0.2"), "full": ("recipe=sd15_finetune",)}


@pytest.fixture(scope="module")
def one(home: Path) -> Callable[[str], Path]:
    """The run of a single process, by what is trained."""

    @cache
    def make(kind: str) -> Path:
        alone = run("lowvram.train", *words_of(kind), f"out={kind}", cwd=home)
        assert alone.returncode == 0, alone.stderr
        return home / kind

    return make


def words_of(kind: str) -> tuple[str, ...]:
    return (*RECIPES[kind], *WORDS, "weights=sd1", "data.path=pictures")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("lora", ()),
        ("lora", ("memory.update.denoiser=deferred", "memory.state.denoiser=host")),
        ("full", ("memory.fsdp=shard",)),
        ("full", ("memory.fsdp=offload", "memory.activations.denoiser=recompute")),
    ],
)
def test_text_encoders_with_their_own_step_size(
    kind: str, policy: tuple[str, ...], one: Callable[[str], Path], home: Path
) -> None:
    out = home / f"{kind}{len(list(home.iterdir()))}"
    two = launch(home, *words_of(kind), *policy, f"out={out.name}")
    assert two.returncode == 0, two.stdout + two.stderr
    for a, b in zip(losses(out), losses(one(kind)), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    found, wanted = saved(out), saved(one(kind))
    assert found.keys() == wanted.keys()
    assert any("text" in key.split(".")[0] for key in wanted)
    for key, tensor in wanted.items():
        assert (found[key].double() - tensor.double()).abs().max() < 1e-5, key


def saved(folder: Path) -> dict[str, Tensor]:
    """File and key of each tensor of the newest checkpoint, but for what each process has of its own."""
    newest = checkpoint.latest_good(folder / "checkpoints")
    assert newest is not None
    files = [path for path in newest.glob("*.safetensors") if not path.stem.startswith("rng")]
    return {f"{path.stem}.{key}": tensor for path in files for key, tensor in load_file(path).items()}
