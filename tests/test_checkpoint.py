"""Checkpoints: whole or absent, nothing executed, nothing lost to a full disk or a damaged file."""

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lowvram import LowVRAMError, checkpoint
from lowvram.checkpoint import Checkpoint
from lowvram.memory import optimizers


def small(value: float = 1.0) -> Checkpoint:
    return Checkpoint(
        tensors={"G": {"w": torch.full([3, 2], value), "n": torch.tensor(2)}}, numbers={"step": 5, "x": [1.5]}
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 5, small(), keep=2)
    back = checkpoint.read(path)
    assert back.numbers == {"step": 5, "x": [1.5]}
    assert torch.equal(back.tensors["G"]["w"], torch.full([3, 2], 1.0))
    assert back.tensors["G"]["n"].dtype == torch.int64
    assert checkpoint.damage(path) is None


def test_the_newest_few_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.write(tmp_path, step, small(), keep=2)
    assert [p.name for p in checkpoint.candidates(tmp_path)] == ["step-00000004", "step-00000003"]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest", "empty"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, harm: str) -> None:
    good = checkpoint.write(tmp_path, 1, small(), keep=5)
    bad = checkpoint.write(tmp_path, 2, small(), keep=5)
    weights = bad / "G.safetensors"
    content = bytearray(weights.read_bytes())
    if harm == "truncate":
        weights.write_bytes(content[:-3])
    elif harm == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif harm == "remove":
        weights.unlink()
    elif harm == "manifest":
        (bad / "manifest.json").write_text("{")
    else:
        (bad / "manifest.json").write_text("[]")
    with pytest.warns(UserWarning, match="step-00000002"):
        assert checkpoint.latest_good(tmp_path) == good
    with pytest.raises(LowVRAMError, match="damaged"):
        checkpoint.read(bad)


def test_a_full_disk_leaves_the_older_checkpoints_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = checkpoint.write(tmp_path, 1, small(), keep=1)

    def full(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, 2, small(), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert checkpoint.latest_good(tmp_path) == good


def test_a_half_written_folder_of_a_killed_run_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.partial").mkdir()
    assert checkpoint.latest_good(tmp_path) is None
    checkpoint.write(tmp_path, 1, small(), keep=1)
    assert not (tmp_path / "step-00000009.partial").exists()


def test_a_pickle_in_a_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, small(), keep=1)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "executed"),))  # type: ignore[return-value]

    data = pickle.dumps(Bomb())
    (path / "G.safetensors").write_bytes(data)
    import hashlib

    manifest = json.loads((path / "manifest.json").read_text())
    manifest["G.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LowVRAMError, match="can't be read"):
        checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


def test_a_manifest_can_not_point_outside(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 1, small(), keep=1)
    (tmp_path / "secret").write_text("x")
    (path / "manifest.json").write_text(json.dumps({"../secret": {"bytes": 1, "sha256": "0"}}))
    assert "missing" in str(checkpoint.damage(path))


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_optimizers_go_on_exactly(make: object, tmp_path: Path) -> None:
    def steps(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
        for row in inputs:
            optimizer.zero_grad()
            network(row).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    inputs = torch.randn(6, 3)
    network = nn.Linear(3, 2)
    optimizer = make(network.parameters())  # type: ignore[operator]
    steps(network, optimizer, inputs[:3])
    tensors, numbers = optimizers.pack(optimizer)
    path = checkpoint.write(tmp_path, 1, Checkpoint(tensors={"o": tensors}, numbers=numbers), keep=1)

    other = nn.Linear(3, 2)
    other.load_state_dict(network.state_dict())
    restored = make(other.parameters())  # type: ignore[operator]
    back = checkpoint.read(path)
    optimizers.unpack(restored, back.tensors["o"], back.numbers)
    steps(network, optimizer, inputs[3:])
    steps(other, restored, inputs[3:])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
