"""The loop: phases, micro-batches, what is written, what stops it. (test_resume and test_distributed: more.)"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import environment
from PIL import Image
from tiny import TINY

from lowvram import LowVRAMError, Trainer, checkpoint, load_run
from lowvram.trainer import NonFiniteError

Make = Callable[..., object]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in trainer.task.networks.items()
        for key, value in network.state_dict().items()
    }


def steps(trainer: Trainer, n: int) -> list[dict[str, float]]:
    out = []
    for result in trainer:
        out.append(result.losses)
        if len(out) == n:
            break
    return out


def test_a_run_leaves_what_the_readme_says(tiny: Make, tmp_path: Path) -> None:
    trainer = Trainer(tiny("kimg=0.064", "snapshot_kimg=0.032", "keep=2"), quiet=True)
    trainer.fit()
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in lines] == [0.016, 0.032, 0.048, 0.064]
    for key in (
        "step",
        "s_per_kimg",
        "loss/G",
        "loss/D",
        "augment_p",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "seconds/R1",
    ):
        assert key in lines[-1]
    assert lines[-1]["peak_allocated_bytes"] > 50 * 2**20
    assert Image.open(run / "reals.png").size == Image.open(run / "fakes_000000.png").size
    assert [p.name for p in checkpoint.candidates(run / "checkpoints")] == ["step-00000008", "step-00000004"]
    assert (run / "recipe.yaml").is_file()


def test_sample_is_uint8_and_depends_on_the_seed_alone(tiny: Make) -> None:
    trainer = Trainer(tiny("kimg=0.016"), quiet=True)
    trainer.fit()
    images = trainer.sample(5, seed=0)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert torch.equal(trainer.sample(2, seed=0), images[:2])
    assert not torch.equal(trainer.sample(5, seed=1), images)
    loaded = load_run(trainer.run.folder, device="cpu")
    assert torch.equal(loaded.sample(5, seed=0), images)


def test_researchers_run_their_code_between_steps(tiny: Make) -> None:
    trainer = Trainer(tiny("kimg=0.04"), quiet=True)
    seen = [(step.step, step.images_seen, sorted(step.losses)) for step in trainer]
    assert seen == [
        (1, 8, ["D", "G", "R1", "path_length"]),
        (2, 16, ["D", "G"]),
        (3, 24, ["D", "G", "R1", "path_length"]),
        (4, 32, ["D", "G"]),
        (5, 40, ["D", "G", "R1", "path_length"]),
    ]


@pytest.mark.parametrize("micro", [4, 8])
def test_micro_batches_change_nothing_but_rounding(tiny: Make, tmp_path: Path, micro: int) -> None:
    whole = Trainer(tiny("batch=16", "data.mirror=true"), quiet=True)
    cut = Trainer(
        tiny(
            "batch=16",
            f"micro_batch={{G: {micro}, path_length: 2, D: {micro}, R1: {micro}}}",
            f"out={tmp_path / 'cut'}",
        ),
        quiet=True,
    )
    first, second = steps(whole, 4), steps(cut, 4)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5)
    start = weights(Trainer(tiny("batch=16", f"out={tmp_path / 'fresh'}"), quiet=True))
    after, other = weights(whole), weights(cut)
    moved = {k: (after[k] - start[k]).float().abs().max() for k in after}
    for key, value in after.items():  # Adam divides by the gradient's size, so compare with how far a weight moved
        assert (value - other[key]).abs().max() <= 0.02 * moved[key] + 1e-6, key


def test_every_network_of_the_phases_moves(tiny: Make, tmp_path: Path) -> None:
    start = weights(Trainer(tiny(f"out={tmp_path / 'fresh'}"), quiet=True))
    trainer = Trainer(tiny(), quiet=True)
    steps(trainer, 4)
    after = weights(trainer)
    for name in ("G", "D", "G_ema"):
        still = [
            k for k in after if k.startswith(f"{name}.") and k.endswith("weight") and torch.equal(after[k], start[k])
        ]
        assert not still
    assert not torch.equal(after["G.mapping.w_avg"], start["G.mapping.w_avg"])
    assert trainer.task.tensors()["path_length_mean"] > 0
    assert 0 <= trainer.task.status()["augment_p"] <= 1
    assert trainer.task.status()["augment_p"] != 0.2


def test_the_average_is_between_the_start_and_the_weights(tiny: Make) -> None:
    trainer = Trainer(tiny("ema.half_life_kimg=0.008", "ema.rampup=null"), quiet=True)
    key = "G_ema.synthesis.b4.const"
    source = "G.synthesis.b4.const"
    before = weights(trainer)
    steps(trainer, 1)
    after = weights(trainer)
    assert torch.allclose(after[key], (before[key] + after[source]) / 2, atol=1e-6)


def test_clip_norm_bounds_the_norm_over_all_parameters(tiny: Make) -> None:
    trainer = Trainer(tiny("micro_batch.D=4"), quiet=True)
    phase = next(p for p in trainer.task.phases if p.name == "D")
    seen: list[float] = []

    def look(*_: object) -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in phase.parameters() if p.grad is not None])))

    (part,) = trainer.applied.updater(phase).buckets["rest"].parts
    part.optimizer.register_step_pre_hook(look)
    trainer.task.phases = [phase]
    steps(trainer, 1)
    phase.clip_norm = seen[0] / 1000
    steps(trainer, 1)
    assert seen[1] == pytest.approx(phase.clip_norm, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_stops_with_its_phase_and_harms_nothing(tiny: Make, where: str) -> None:
    trainer = Trainer(tiny("snapshot_kimg=0.008"), quiet=True)
    steps(trainer, 1)
    good = checkpoint.latest_good(trainer.run.checkpoints)
    before = weights(trainer)
    phase = next(p for p in trainer.task.phases if p.name == "D")
    plain = phase.loss
    spoil = (lambda loss: loss * float("nan")) if where == "loss" else _bad_gradient
    phase.loss = lambda micro: (spoil(loss) for loss in plain(micro))
    with pytest.raises(NonFiniteError, match=r"phase D.*step 1") as error:
        steps(trainer, 1)
    assert "resume=auto" in error.value.remedy
    after = weights(trainer)
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("D."))
    assert checkpoint.latest_good(trainer.run.checkpoints) == good


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("inf")


def _bad_gradient(loss: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _BadGradient.apply(loss)
    return result


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(tiny: Make, number: int) -> None:
    trainer = Trainer(tiny("kimg=10"), quiet=True)
    for step in trainer:
        if step.step == 3:
            os.kill(os.getpid(), number)
    assert trainer.interrupted
    assert trainer.step == 4
    assert checkpoint.candidates(trainer.run.checkpoints)[0].name == "step-00000004"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_disk_that_fills_loses_neither_the_run_nor_the_last_checkpoint(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny("snapshot_kimg=0.008", "kimg=0.04"))
    steps(trainer, 2)
    good = checkpoint.latest_good(trainer.run.checkpoints)
    real = checkpoint._save_tensors

    def full(tensors: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    steps(trainer, 2)  # training goes on
    assert "No space left" in capsys.readouterr().out
    assert checkpoint.latest_good(trainer.run.checkpoints) == good
    with pytest.raises(LowVRAMError, match="No space left"):
        trainer.fit()
    monkeypatch.setattr(checkpoint, "_save_tensors", real)
    trainer.save(final=True)
    assert checkpoint.latest_good(trainer.run.checkpoints) != good


def test_an_existing_run_folder_is_not_touched(tiny: Make, tmp_path: Path) -> None:
    Trainer(tiny(), quiet=True)
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    with pytest.raises(LowVRAMError, match=r"resume=auto"):
        Trainer(tiny("batch=16"), quiet=True)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_without_out_runs_are_numbered(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Trainer(tiny("out=null"), quiet=True).run.folder.name for _ in range(3)]
    assert folders == ["faces32", "faces32-2", "faces32-3"]


def test_class_conditional_training_and_sampling(tiny: Make) -> None:
    trainer = Trainer(tiny("data.labels=true", "kimg=0.016"), quiet=True)
    trainer.fit()
    assert trainer.task.dataset().num_classes > 1
    one, two = (trainer.sample(2, seed=0, classes=[c]) for c in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_resolutions_train(tiny: Make, precision: str) -> None:
    trainer = Trainer(tiny(f"precision={precision}", "model.num_fp16_res=1"), quiet=True)
    losses = steps(trainer, 3)
    plain = steps(Trainer(tiny(f"out={trainer.run.folder}-fp32"), quiet=True), 3)
    assert losses[0]["D"] == pytest.approx(plain[0]["D"], rel=0.05)
    assert losses[0] != plain[0]


def test_tensorboard_on_request(tiny: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    Trainer(tiny("kimg=0.016", "logger=tensorboard"), quiet=True).fit()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LowVRAMError, match=r"lowvram\[wandb\]"):
        Trainer(tiny("logger=wandb"), quiet=True)


def test_a_script_may_end_within_a_training(tmp_path: Path) -> None:
    script = """
import sys
from lowvram import Trainer, load_recipe
trainer = Trainer(load_recipe("faces32", sys.argv[1:]))
steps = iter(trainer)
next(steps)
"""
    command = [sys.executable, "-c", script, *TINY, f"out={tmp_path / 'run'}"]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" not in done.stdout + done.stderr and "Traceback" not in done.stderr
