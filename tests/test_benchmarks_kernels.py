"""The benchmark of kernels, the comparisons with other libraries, and the command that asks a GPU everything."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ROOT
from torch import nn

from benchmarks import kernel_cases, kernels, record, timing
from benchmarks.kernel_cases import Case
from benchmarks.kernels import Measured, Result
from benchmarks.peers import __main__ as peers
from benchmarks.peers import networks, optimizers, plain_stylegan2, recipe_step, side
from benchmarks.peers.side import Peer, Step
from benchmarks.short_training import point as training_point
from lowvram import load_recipe
from lowvram.models import stylegan2
from lowvram.settings import StyleGAN2Settings

CPU = torch.device("cpu")
MIB = 2**20


def doubled(**changes: object) -> Case:
    """y = 2 x as a kernel's case."""
    options = {
        "kernel": "double",
        "name": "[B, 4]",
        "recipe": "none",
        "shapes": lambda n: {"x": (n, 4)},
        "batch": 3,
        "ours": lambda inputs, impl: 2 * inputs["x"],
        "plain": lambda inputs: inputs["x"] + inputs["x"],
        "dtype": torch.float32,
        "needed": (),
    }
    return Case(**(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_every_kernel_has_cases_whose_reference_is_right(name: str) -> None:
    for case in kernel_cases.small(kernel_cases.CASES[name]())[:1]:
        assert kernels.wrong(case, lambda inputs, case=case: case.ours(inputs, "reference"), CPU) is None


def test_a_wrong_value_and_a_wrong_gradient_are_found() -> None:
    case = doubled()
    assert kernels.wrong(case, case.plain, CPU) is None
    assert "the value is off" in kernels.wrong(case, lambda inputs: 2.001 * inputs["x"], CPU)
    assert "the value is off" in kernels.wrong(case, lambda inputs: 2 * inputs["x"] + float("nan"), CPU)
    by_other_way = kernels.wrong(case, lambda inputs: inputs["x"] + inputs["x"].detach(), CPU)
    assert by_other_way.startswith("d x is off")


def test_bytes_that_must_move() -> None:
    case = kernel_cases.swiglu()[0]
    inputs = case.inputs(1, CPU)
    y = case.plain(inputs)
    forward, backward = case.moved_bytes(inputs, y)
    assert forward == inputs["x"].nbytes + y.nbytes  # reads x, writes y
    assert backward == y.nbytes + 2 * inputs["x"].nbytes  # reads dy and x, writes dx


def test_what_autograd_keeps_and_what_is_alive() -> None:
    x = torch.randn(MIB // 4, requires_grad=True)
    assert timing.kept_bytes(lambda: x.sin()) == MIB
    assert timing.kept_bytes(lambda: x + 1) == 0
    with torch.no_grad():
        assert timing.peak_bytes(lambda: (x + 1) * 2, CPU, held=[x]) == 2 * MIB


def result(ours: tuple[float, float], theirs: tuple[float, float]) -> Result:
    """Forward and backward seconds of Triton's and of plain; a copy takes 0.8 seconds."""

    def measured(seconds: tuple[float, float]) -> Measured:
        return Measured(forward_seconds=[seconds[0]] * 5, backward_seconds=[seconds[1]] * 5)

    case, both = doubled(), {"triton": measured(ours), "plain": measured(theirs)}
    return Result(case=case, measured=both, moved_bytes=(96, 96), copy_seconds=(0.8, 0.8))


def test_goals_are_of_a_copy_and_of_the_best_alternative() -> None:
    assert [goal.reached for goal in kernels.goals(result((1.0, 1.0), (1.5, 1.5)))] == [True, True, True]
    assert [goal.reached for goal in kernels.goals(result((1.0, 1.1), (1.0, 1.0)))] == [True, False, False]
    failed = result((1.0, 1.0), (1.0, 1.0))
    failed.measured["triton"].error = "wrong"
    assert kernels.goals(failed) == []
    assert all(point["error"] == "wrong" for point in kernels.points(failed) if point["name"].endswith("triton"))


@pytest.mark.parametrize(("theirs", "reached"), [(2.1, True), (1.9, False)])
def test_the_optimizer_has_to_take_half_of_bitsandbytes_time(theirs: float, reached: bool) -> None:
    found = {
        optimizers.OURS: optimizers.Measured(seconds=[1.0]),
        optimizers.BITSANDBYTES: optimizers.Measured(seconds=[theirs]),
    }
    goal = kernels.optimizer_goal(found)
    assert goal is not None and goal.reached is reached
    del found[optimizers.BITSANDBYTES]
    assert kernels.optimizer_goal(found) is None


def test_the_command_writes_points_and_survives_a_kernel_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone() -> list[Case]:
        raise ImportError("no module named gone")

    monkeypatch.setattr(kernel_cases, "CASES", {})
    monkeypatch.setattr(kernels, "CASES", {"gone": gone, "double": lambda: [doubled()]})
    monkeypatch.setattr(kernels, "_LARGE_COPY_BYTES", {"cpu": 2**12})
    path = tmp_path / "kernels.json"
    words = ["kernels", "--only", "gone,double", "--no-compile", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as exit_:
        kernels.main()
    assert exit_.value.code == 1
    points = {point["name"]: point for point in record.read(path)["points"]}
    assert points["gone"]["error"] == "not there: no module named gone"
    ours = points["double [B, 4], B=1, float32: reference"]
    assert ours["seconds"]["backward"]["median"] > 0 and ours["details"]["kept_bytes"] == 0
    assert "double [B, 4]" in capsys.readouterr().out


def test_optimizers_step_the_same_network_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # left out, as where it is not installed
    workload = optimizers.Workload(name="tiny", recipe="none", network=lambda: nn.Linear(64, 128))
    found = optimizers.measure(workload, CPU, budget_seconds=0)
    assert {optimizers.OURS, "torch fused"} <= set(found) and optimizers.BITSANDBYTES not in found
    assert found[optimizers.OURS].error is None
    assert found[optimizers.OURS].state_bytes < found["torch fused"].state_bytes / 3
    points = {point["name"]: point for point in optimizers.points("peers", workload, found)}
    assert points["adamw8bit tiny: torch fused"]["seconds_per_step"]["n"] >= 5
    assert "times as fast as torch fused" in optimizers.table(workload, found)


def sides() -> dict[str, Callable[[torch.device], Step]]:
    """One that holds 1 MiB and adds two temporary ones, one that adds one, one that fails."""
    held = torch.zeros(MIB // 4)

    def lean(device: torch.device) -> Step:
        return Step(run=lambda: held + 1, held=[held], samples=4)

    def large(device: torch.device) -> Step:
        return Step(run=lambda: (held + 1) * 2, held=[held], samples=4)

    def failing(device: torch.device) -> Step:
        raise RuntimeError("no such thing\nand more")

    return {"lean": lean, "large": large, "failing": failing}


def test_sides_are_compared_and_one_that_fails_is_recorded() -> None:
    peer = Peer(name="adding", what="additions", sides=sides())
    found = side.compare(peer, CPU, budget_seconds=0)
    assert found["lean"].peak_bytes == 2 * MIB and found["large"].peak_bytes == 3 * MIB
    points = {point["name"]: point for point in side.points(peer, found)}
    assert points["adding: failing"]["error"] == "RuntimeError: no such thing"
    assert points["adding: lean"]["details"]["part_of_memory"]["large"] == pytest.approx(2 / 3)
    assert points["adding: lean"]["images_per_second"] > 0
    assert "in 0.67 of the memory" in side.table(peer, found)


def test_a_comparison_whose_package_is_missing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    path = tmp_path / "points.json"
    monkeypatch.setattr("sys.argv", ["peers", "--here", "timm_vit", "--json", str(path)])
    monkeypatch.setattr(networks, "planned", networks.plain)  # which would take longer to find out
    peers.main()
    assert json.loads(path.read_text()) == []
    assert "timm_vit: left out: timm can't be imported" in capsys.readouterr().out


def test_a_comparison_that_takes_too_long_is_recorded() -> None:
    (late,) = peers.run_apart("timm_vit", [], limit_seconds=0.01)
    assert late["error"] == "not done in 0 seconds"


def test_a_training_that_passes_its_budget_is_an_error(tmp_path: Path) -> None:
    metrics = {"s_per_kimg": 10.0, "kimg": 1.0, "seconds": 10, "loss/D": 0.5}
    metrics |= {"peak_allocated_bytes": 100, "peak_reserved_bytes": 200}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    words = ["recipe=faces64", "vram=1GB"]
    fine = training_point(words, tmp_path, device_bytes=2**30, status=0, said="")
    assert fine["error"] is None and fine["images_per_second"] == pytest.approx(100)
    over = training_point(words, tmp_path, device_bytes=2**30 + 2**25, status=0, said="")
    assert over["error"] == "took 1.04GB of the card, with vram=1GB"
    nothing = training_point(words, tmp_path / "elsewhere", device_bytes=None, status=1, said="a\nwhy\n")
    assert nothing["error"] == "no metrics were written; exit status 1: why"


CHECK = ROOT / "benchmarks" / "gpu_check.sh"
# In place of Python: one part fails, one hangs, the others do nothing; one module can't be imported.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *record.device_name*) echo "$KIND my-card" ;;
  -\\ *) [[ $* == *dicebear* ]] && echo dicebear; [[ $* == *diffusers* ]] && echo diffusers ;;
  *benchmarks.kernels*) echo broken; exit 3 ;;
  *benchmarks.peers*) sleep 300 ;;
esac
exit 0
"""


def check(tmp_path: Path, *words: str, kind: str = "cuda") -> subprocess.CompletedProcess[str]:
    """gpu_check.sh with that Python."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    command = ["bash", str(CHECK), "--python", str(python), "--out", str(tmp_path / "out"), *words]
    return subprocess.run(
        command, env={**os.environ, "KIND": kind}, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_check_of_a_gpu_goes_on_after_failures(tmp_path: Path) -> None:
    done = check(tmp_path, "--seconds", "32")
    table = (tmp_path / "out" / "check.md").read_text()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "| kernels | FAILED: status 3, see logs/kernels.log |" in table
    assert "| peers | FAILED: stopped after its" in table
    assert "| training | skipped: dicebear can't be imported |" in table
    assert "| gan_step | ok |" in table and "| denoiser_step | skipped: " in table
    assert (tmp_path / "out" / "logs" / "kernels.log").read_text() == "broken\n"


def test_the_check_wants_a_gpu_or_a_rehearsal(tmp_path: Path) -> None:
    done = check(tmp_path, kind="cpu")
    assert done.returncode == 69 and "--rehearse" in done.stderr
    assert check(tmp_path, "--rehearse", "--only", "kernel_tests", kind="cpu").returncode == 0
    assert check(tmp_path, "--only", "nothing").returncode == 64
    assert check(tmp_path, "--wrong").returncode == 64


def test_plain_stylegan2_computes_what_ours_does() -> None:
    """Or else it is another work that is compared."""
    torch.manual_seed(0)
    g = stylegan2.Generator(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=16)
    d = stylegan2.Discriminator(16, channel_base=128, channel_max=16)
    for parameter in (*g.parameters(), *d.parameters()):  # biases are 0 at first, and the noise stays so
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    z = torch.randn(4, 8)
    ws = plain_stylegan2.mapping(g.mapping, z)
    torch.testing.assert_close(ws, g.mapping(z))
    images = plain_stylegan2.synthesis(g.synthesis, ws)
    torch.testing.assert_close(images, g.synthesis(ws, noise_mode="none"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain_stylegan2.logits(d, images), d(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", plain_stylegan2.PHASES)
def test_phases_of_stylegan2_are_compared(phase: str) -> None:
    settings = load_recipe("faces32", ["batch=8", "augment.mode=none", "precision=fp32"])
    assert isinstance(settings, StyleGAN2Settings)
    settings = replace(settings, loss=replace(settings.loss, path_length_every=4))
    sides = {
        "ours": lambda device: recipe_step.ours(settings, phase, device),
        "plain": lambda device: plain_stylegan2.theirs(settings, phase, device),
    }
    peer = Peer(name=f"stylegan2 {phase}", what="a phase", sides=sides)
    found = side.compare(peer, torch.device("cpu"), budget_seconds=0.01)
    ours, plain = found["ours"], found["plain"]
    assert ours.error is None and plain.error is None
    assert ours.peak_bytes and plain.peak_bytes and ours.peak_bytes < plain.peak_bytes
