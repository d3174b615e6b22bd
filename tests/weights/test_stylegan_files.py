"""A StyleGAN2 out of a run and back, and samples of a published one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from pickles import write
from safetensors import safe_open
from safetensors.torch import save_file

from lowvram import Trainer, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.models.stylegan2 import Generator
from lowvram.tasks import load_run, load_weights
from lowvram.weights import stylegan2


def run_command(name: str, *words: str, cwd: Path, code: int = 0) -> Any:
    done = run(f"lowvram.{name}", *words, cwd=cwd)
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.fixture
def trained(tiny: Callable, tmp_path: Path) -> Path:
    Trainer(tiny("kimg=0.016", "snapshot_kimg=0.016"), quiet=True).fit()
    return tmp_path / "run"


def test_a_run_becomes_a_file_that_samples_and_trains_the_same(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "faces.safetensors"
    said = run_command("convert", f"run={trained}", "to=stylegan", f"out={out}", cwd=tmp_path)
    assert "wrote G_ema, G, D" in said.stdout
    theirs, ours = load_run(trained, device="cpu"), load_weights(out, device="cpu")
    assert torch.equal(theirs.sample(4, seed=3), ours.sample(4, seed=3))
    with safe_open(out, "pt") as file:
        assert "G_ema.synthesis.b4.const" in file.keys() and "D.b16.fromrgb.weight" in file.keys()  # noqa: SIM118
    recipe = load_recipe(
        "faces32", [f"weights={out}", "resolution=16", "batch=8", "device=cpu", f"out={tmp_path / 'b'}"]
    )
    assert (recipe.model.z_dim, recipe.model.channel_base) == (16, 256)
    again = Trainer(recipe, quiet=True)
    saved = stylegan2.read(out)
    for name in ("G", "G_ema", "D"):
        state = again.task.networks[name].state_dict()
        assert set(state) == set(saved[name].state)
        assert all(torch.equal(value, state[key]) for key, value in saved[name].state.items())


def test_a_published_pickle_is_sampled_from_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    g = Generator(16, z_dim=8, w_dim=12, c_dim=3, mapping_layers=2, channel_base=64, channel_max=8)
    kwargs = {"z_dim": 8, "w_dim": 12, "c_dim": 3, "img_resolution": 16, "img_channels": 3}
    kwargs |= {"mapping_kwargs": {"num_layers": 2}, "channel_base": 64, "channel_max": 8}  # as newer files have it
    path = write(tmp_path / "animals.pkl", {"G_ema": (g, kwargs)})
    run_command("sample", f"weights={path}", "n=3", "classes=0,2", "device=cpu", cwd=tmp_path)
    assert len(list((tmp_path / "outputs" / "animals" / "samples").glob("seed*.png"))) == 3
    out = tmp_path / "animals.safetensors"
    run_command("convert", f"weights={path}", "to=stylegan", f"out={out}", cwd=tmp_path)
    for first, second in ((path, out),):
        a, b = load_weights(first, device="cpu"), load_weights(second, device="cpu")
        assert torch.equal(a.sample(2, classes=[1]), b.sample(2, classes=[1]))


def test_what_can_not_be_read_or_written_is_said(trained: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({"x": torch.zeros(1)}, bad)
    with pytest.raises(LowVRAMError, match="holds no weights that are known"):
        load_weights(bad, device="cpu")
    out = tmp_path / "a.safetensors"
    run_command("convert", f"run={trained}", "to=stylegan", f"out={out}", cwd=tmp_path)
    whole = out.read_bytes()
    for damaged in (whole[:100], whole[:-5], (1 << 60).to_bytes(8, "little") + whole[8:], b""):
        bad.write_bytes(damaged)
        with pytest.raises(LowVRAMError, match=r"bad\.safetensors (can't be read|is )"):
            load_weights(bad, device="cpu")
    networks = stylegan2.read(out)
    networks["G_ema"].state["mapping.w_avg"][0] = float("inf")
    stylegan2.write(bad, networks)
    with pytest.raises(LowVRAMError, match=r"G_ema\.mapping\.w_avg has values that are not finite"):
        load_weights(bad, device="cpu")
    stylegan2.write(bad, {"D": networks["D"]})
    with pytest.raises(LowVRAMError, match="holds no generator"):
        load_weights(bad, device="cpu")
    for words, text in (
        ((f"run={trained}", f"out={out}"), "is there already"),
        ((f"run={trained}", f"out={tmp_path / 'b.pkl'}"), "does not end in .safetensors"),
        ((f"run={trained}", f"out={tmp_path / 'b.safetensors'}", "to=onnx"), "to=onnx is not known"),
        ((f"out={tmp_path / 'b.safetensors'}",), "needs a run or weights"),
    ):
        to = () if any(word.startswith("to=") for word in words) else ("to=stylegan",)
        assert text in run_command("convert", *words, *to, cwd=tmp_path, code=2).stderr
    assert "needs a run or weights" in run_command("sample", cwd=tmp_path, code=2).stderr
