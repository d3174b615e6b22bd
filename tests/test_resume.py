"""A run that was stopped and resumed ends as one that was not, bit for bit on a CPU."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from safetensors.torch import load_file
from tiny import TINY

from lowvram import LowVRAMError, Trainer, checkpoint

Make = Callable[..., object]


def assert_same_end(a: Path, b: Path) -> None:
    """Both runs' newest checkpoints hold the same bits: networks, optimizers, statistics, counts."""
    first, second = (checkpoint.latest_good(run / "checkpoints") for run in (a, b))
    assert first is not None
    assert second is not None
    assert first.name == second.name
    names = sorted(p.name for p in first.glob("*.safetensors") if not p.name.startswith("rng"))
    assert {
        "G.safetensors",
        "D.safetensors",
        "G_ema.safetensors",
        "optimizer_G.safetensors",
        "task.safetensors",
    } <= set(names)
    for name in names:
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        different = [key for key in one if not torch.equal(one[key], other[key])]
        assert not different, (name, different)
    numbers = [json.loads((p / "state.json").read_text()) for p in (first, second)]
    assert numbers[0]["images_seen"] == numbers[1]["images_seen"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_ends_bit_identical(tmp_path: Path, workers: int) -> None:
    words = ["recipe=faces32", *TINY, "kimg=0.24", "snapshot_kimg=0.024", f"data.workers={workers}"]
    whole = start("lowvram.train", *words, "out=whole", cwd=tmp_path)
    killed = start("lowvram.train", *words, "out=killed", "resume=auto", cwd=tmp_path)
    kills = 0
    for attempt in range(2):
        target = random.Random(workers * 10 + attempt).randrange(3, 24)  # a random step, past where it began
        steps = _wait_for_step(tmp_path / "killed", _last_step(tmp_path / "killed") + target, killed)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        kills += killed.returncode == -signal.SIGKILL
        if steps is None:
            break
        killed = start("lowvram.train", *words, "out=killed", "resume=auto", cwd=tmp_path)
    out, err = killed.communicate(timeout=240)
    if killed.returncode == -signal.SIGKILL:
        out, err = (again := start("lowvram.train", *words, "out=killed", "resume=auto", cwd=tmp_path)).communicate(
            timeout=240
        )
        killed = again
    assert killed.returncode == 0, out + err
    _, whole_err = whole.communicate(timeout=240)
    assert whole.returncode == 0, whole_err
    assert kills >= 1
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 31, 2))  # nothing twice, nothing missing


def _last_step(run: Path) -> int:
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def _wait_for_step(run: Path, step: int, process: object) -> int | None:
    """Wait until the run's metrics reach a step; None when it ended before."""
    for _ in range(2400):
        if _last_step(run) >= step:
            return step
        if process.poll() is not None:  # type: ignore[attr-defined]
            return None
        time.sleep(0.05)
    raise TimeoutError(step)


def test_sigterm_saves_exits_0_and_resumes(tmp_path: Path) -> None:
    words = ["recipe=faces32", *TINY, "snapshot_kimg=10"]
    process = start("lowvram.train", *words, "kimg=10", "out=run", cwd=tmp_path)
    _wait_for_step(tmp_path / "run", 4, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped and saved" in out
    stopped = checkpoint.latest_good(tmp_path / "run" / "checkpoints")
    assert stopped is not None
    kimg = (int(stopped.name.removeprefix("step-")) + 6) * 8 / 1000
    for name, extra in (("run", ["resume=auto"]), ("whole", [])):
        process = start("lowvram.train", *words, f"kimg={kimg}", f"out={name}", *extra, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_random_numbers_of_user_code_go_on(tiny: Make) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    trainer = Trainer(tiny("kimg=0.016"), quiet=True)
    trainer.fit()
    expected = draw()
    draw()
    Trainer(tiny("resume=auto"), quiet=True)
    assert draw() == expected


def test_a_damaged_newest_checkpoint_is_skipped(tiny: Make) -> None:
    trainer = Trainer(tiny("kimg=0.032", "snapshot_kimg=0.016"), quiet=True)
    trainer.fit()
    newest = checkpoint.candidates(trainer.run.checkpoints)[0]
    (newest / "D.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"):
        again = Trainer(tiny("resume=auto"), quiet=True)
    assert again.step == 2


def test_the_saved_recipe_wins_unless_overridden_by_name(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    from lowvram import load_recipe

    first = Trainer(tiny("kimg=0.016", "batch=16", "loss.r1_gamma=0.3"), quiet=True)
    first.fit()
    given = load_recipe(
        "faces32",
        [
            *(w for w in TINY if not w.startswith(("batch", "loss.r1_gamma"))),
            f"out={first.run.folder}",
            "resume=auto",
            "kimg=0.08",
        ],
    )
    given.batch = 32  # differs from the saved one, but the user did not name it
    again = Trainer(given)
    said = capsys.readouterr().out
    assert (again.recipe.batch, again.recipe.kimg, again.recipe.loss.r1_gamma) == (16, 0.08, 0.3)
    assert "batch: 16 in the saved recipe holds, not 32" in said
    assert "kimg: 0.016 in the saved recipe, now 0.08" in said
    again.fit()
    assert again.images_seen == 80


def test_a_network_of_another_shape_is_refused_with_the_reason(tiny: Make) -> None:
    Trainer(tiny("kimg=0.016"), quiet=True).fit()
    with pytest.raises(LowVRAMError, match="don't fit the recipe"):
        Trainer(tiny("resume=auto", "model.channel_max=8"), quiet=True)
    assert Trainer(tiny("resume=auto"), quiet=True).step == 2  # the saved recipe was not spoilt


def test_augmentation_can_be_switched_on_at_a_resume(tiny: Make) -> None:
    Trainer(tiny("kimg=0.016", "augment.mode=none"), quiet=True).fit()
    again = Trainer(tiny("resume=auto", "kimg=0.024", "augment.mode=ada", "augment.p=0.3"), quiet=True)
    assert (again.step, again.task.status()["augment_p"]) == (2, pytest.approx(0.3))
    again.fit()
    assert again.images_seen == 24


def test_resume_from_a_path_into_a_new_run(tiny: Make, tmp_path: Path) -> None:
    first = Trainer(tiny("kimg=0.032", "snapshot_kimg=0.016"), quiet=True)
    first.fit()
    older = checkpoint.candidates(first.run.checkpoints)[1]
    other = Trainer(tiny(f"resume={older}", f"out={tmp_path / 'other'}", "kimg=0.032"), quiet=True)
    assert other.step == 2
    other.fit()
    assert_same_end(first.run.folder, other.run.folder)


def test_resume_without_a_run(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Trainer(tiny("resume=auto")).step == 0
    assert "found no" in capsys.readouterr().out
    with pytest.raises(LowVRAMError, match="nowhere"):
        Trainer(tiny(f"resume={tmp_path / 'nowhere'}"), quiet=True)


def test_a_finished_run_says_so(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(tiny("kimg=0.016"), quiet=True).fit()
    Trainer(tiny("kimg=0.016", "resume=auto")).fit()
    assert "already" in capsys.readouterr().out
