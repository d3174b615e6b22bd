"""The benchmarks of a training step run as their pages say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, run
from tiny import TINY

from benchmarks import denoiser_step, record, train_step
from lowvram import LowVRAMError, Trainer, load_recipe
from lowvram.memory.policy import MemoryPolicy, PhasePolicy

CPU = torch.device("cpu")
PHASES = ["G", "path_length", "D", "R1", "average"]


@pytest.mark.slow
def test_train_step_times_every_phase_under_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "result.json"
    words = ["recipe=faces32", *TINY, "vram=1GB", "--steps", "2", "--warmup", "0", "--json", str(file)]
    done = run("benchmarks.train_step", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    content = record.read(file)
    (point,) = content["points"]
    assert (point["benchmark"], point["recipe"]) == ("train_step", "faces32")
    assert point["overrides"] == sorted([*TINY, "vram=1GB"])
    assert list(point["seconds"]) == PHASES
    assert all(spread["n"] == 2 and 0 < spread["min"] <= spread["median"] for spread in point["seconds"].values())
    every = {name: phase["every"] for name, phase in point["details"]["phases"].items()}
    sums = sum(spread["max"] / every[name] for name, spread in point["seconds"].items())
    assert 0 < point["seconds_per_step"]["median"] <= sums * 1.0001
    assert point["images_per_second"] == pytest.approx(8 / point["seconds_per_step"]["median"])
    peaks = {name: phase["allocated_bytes"] for name, phase in point["details"]["phases"].items()}
    assert point["memory"] == {
        "allocated_bytes": max(peaks.values()),
        "reserved_bytes": None,
        "device_bytes": None,
    }
    assert 0 < peaks["average"] < peaks["G"]
    assert point["details"]["plan"]["vram_bytes"] == 2**30 and not point["details"]["thriftier_than_begun"]
    assert content["environment"]["hardware"]["threads"] == 1
    assert "images/s" in done.stdout and json.loads(done.stdout[done.stdout.index("{") :]) == point


def test_a_budget_without_a_card_is_the_plan_for_a_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = MemoryPolicy(precision="fp32", phases={"G": PhasePolicy(micro_batch=4, activations="recompute")})
    asked = []

    def planner(settings: object, card: object, budget_bytes: int) -> SimpleNamespace:
        asked.append(budget_bytes)
        return SimpleNamespace(fits=len(asked) == 1, policy=policy, needed_bytes=2**32, needs=["another recipe"])

    monkeypatch.setattr(train_step, "plan_apart", planner)
    settings = load_recipe("faces32", [*TINY, "vram=2GB", f"out={tmp_path / 'run'}"])
    planned, plan = train_step.planned_without_a_card(settings, CPU, tmp_path)
    assert plan is not None and asked == [2 * 2**30]
    assert Trainer(planned, quiet=True).applied.policy == policy
    with pytest.raises(LowVRAMError, match=r"does not fit vram=2GB: it needs 4GB"):
        train_step.planned_without_a_card(settings, CPU, tmp_path)
    plain = load_recipe("faces32", [*TINY, "vram=2GB", "memory=recipe"])
    assert train_step.planned_without_a_card(plain, CPU, tmp_path) == (plain, None)


def test_a_plan_in_half_precision_is_run_in_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = SimpleNamespace(fits=True, policy=MemoryPolicy(precision="fp16"))
    monkeypatch.setattr(train_step, "plan_apart", lambda *_: half)
    planned, _ = train_step.planned_without_a_card(load_recipe("faces64_ldm", ["vram=2GB"]), CPU, tmp_path)
    assert json.loads(Path(planned.memory.policy).read_text())["precision"] == "fp32"


def test_a_denoiser_stands_beside_diffusers() -> None:
    pytest.importorskip("diffusers")
    overrides = ["device=cpu", "batch=2"]
    points = denoiser_step.compare(load_recipe("faces64_ldm", overrides), overrides, steps=2)
    assert [point["name"] for point in points] == ["ours", "diffusers"]
    ours, theirs = points
    assert ours["details"]["parameters"] == pytest.approx(theirs["details"]["parameters"], rel=0.1)
    assert all(point["seconds_per_step"]["n"] == 2 and point["memory"]["allocated_bytes"] > 2**20 for point in points)
    assert ours["overrides"] == ["batch=2", "device=cpu"]
    assert "times as fast as diffusers" in denoiser_step.table(points)
