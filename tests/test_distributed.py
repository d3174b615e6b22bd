"""Two processes compute what one does, for the same effective batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import environment, run
from safetensors.torch import load_file
from tiny import TINY

from lowvram import checkpoint

WORDS = ["recipe=faces32", *TINY, "kimg=0.048", "log_kimg=0.008"]


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss/") or k == "augment_p"} for line in lines]


def launch(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return subprocess.run(
        [*command, "-m", "lowvram.train", *words],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    two = launch(tmp_path, *WORDS, "out=two")
    assert two.returncode == 0, two.stdout + two.stderr
    one = run("lowvram.train", *WORDS, "out=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    expected = losses(tmp_path / "one")
    assert len(expected) == 6
    for a, b in zip(losses(tmp_path / "two"), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    newest = [checkpoint.latest_good(tmp_path / name / "checkpoints") for name in ("one", "two")]
    assert newest[0] is not None
    assert newest[1] is not None
    a, b = (load_file(path / "task.safetensors") for path in newest)
    assert torch.allclose(a["path_length_mean"], b["path_length_mean"], rtol=1e-3)
    assert len(json.loads((newest[1] / "state.json").read_text())["rng"]) == 2  # each process keeps its own


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch=4"], "batch=4 does not divide among 2 processes"),
        (["model.mbstd_group_size=1"], "the 4 images of phase path_length leave some of 2 processes without one"),
    ],
)
def test_a_batch_that_can_not_be_shared_is_named(tmp_path: Path, words: list[str], said: str) -> None:
    result = launch(tmp_path, *WORDS, *words, "out=two")
    assert result.returncode != 0
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []
