"""Two processes compute what one does, for the same effective batch."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import environment, run
from safetensors.torch import load_file
from seeds import for_one_of_the_seeds
from tiny import TINY

from lowvram import checkpoint

# A large eps: Adam's first steps are else the signs of gradients, and rounding decides those near zero.
WORDS = ["recipe=faces32", *TINY, "kimg=0.048", "log_kimg=0.008", "optimizer.eps=0.01", "optimizer.lr=0.02"]


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/") or k == "augment_p"} for line in lines]


def launch(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return subprocess.run(
        [*command, "-m", "lowvram.train", *words],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a single process, by seed and settings."""

    @cache
    def make(seed: int, *words: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        alone = run("lowvram.train", *WORDS, *words, f"seed={seed}", "out=one", cwd=folder)
        assert alone.returncode == 0, alone.stderr
        return folder / "one"

    return make


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], []),
        pytest.param([], ["memory.fsdp=offload"], marks=pytest.mark.slow),  # tests/memory/test_fsdp.py trains so too
        pytest.param(["optimizer.mapping_lr=0.1"], ["memory.fsdp=shard"], marks=pytest.mark.slow),
        pytest.param([], ["memory.update.D=deferred", "memory.ema=host"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(
    words: list[str], policy: list[str], one: Callable[..., Path], tmp_path: Path
) -> None:
    def check(seed: int) -> None:
        two = launch(tmp_path, *WORDS, *words, *policy, f"seed={seed}", f"out=two{seed}")
        assert two.returncode == 0, two.stdout + two.stderr
        compare(one(seed, *words), tmp_path / f"two{seed}")

    for_one_of_the_seeds(check)


def compare(one: Path, two: Path) -> None:
    """The same losses, networks and optimizer states, but for the order of additions."""
    expected = losses(one)
    assert len(expected) == 6
    for a, b in zip(losses(two), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    newest = [checkpoint.latest_good(folder / "checkpoints") for folder in (one, two)]
    assert newest[0] is not None
    assert newest[1] is not None
    for file in ("G", "D", "G_ema", "task", "optimizer_G", "optimizer_D"):
        a, b = (load_file(path / f"{file}.safetensors") for path in newest)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-5), f"{file} {key}"
    assert len(json.loads((newest[1] / "state.json").read_text())["rng"]) == 2  # each process keeps its own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["batch=4"], "batch=4 does not divide among 2 processes", marks=pytest.mark.slow),
        pytest.param(
            ["model.mbstd_group_size=1"],
            "the 4 images of phase path_length leave some of 2 processes without one",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_batch_that_can_not_be_shared_is_named(tmp_path: Path, words: list[str], said: str) -> None:
    result = launch(tmp_path, *WORDS, *words, "out=two")
    assert result.returncode != 0
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []
