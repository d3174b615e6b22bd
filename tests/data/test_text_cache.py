"""Rows of tensors in one file: written as they are made, read one by one."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowvram.data import text_cache
from lowvram.data.text_cache import Rows, write_rows
from lowvram.errors import LowVRAMError


def parts(tensors, step=3):
    for name, tensor in tensors.items():
        yield from ((name, rows) for rows in tensor.split(step))


def tensors(n=8):
    torch.manual_seed(0)
    return {"context_0": torch.randn(n, 5, 4), "context_1": torch.randn(n, 5, 2), "pooled": torch.randn(n, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back_by_safetensors_and_by_row(tmp_path, dtype):
    path, given = tmp_path / "deep" / "x.safetensors", tensors()
    write_rows(path, {name: tuple(tensor.shape) for name, tensor in given.items()}, dtype, parts(given))
    whole, rows = load_file(path), Rows(path)
    assert list(path.parent.iterdir()) == [path]
    for name, tensor in given.items():
        assert whole[name].dtype == dtype and torch.equal(whole[name], tensor.to(dtype))
        assert torch.equal(rows.read(name, [5, 0, 5]), tensor.to(dtype)[[5, 0, 5]])


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given | {"pooled": given["pooled"][:-1]},
        lambda given: given | {"pooled": torch.randn(9, 3)},
        lambda given: given | {"context_1": torch.randn(8, 5, 3)},
        lambda given: dict(reversed(given.items())),
    ],
)
def test_other_rows_than_announced_leave_no_file(tmp_path, change):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    with pytest.raises(ValueError, match="byte"):
        write_rows(tmp_path / "x.safetensors", shapes, torch.float32, parts(change(tensors())))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_how_much_was_wanted(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text_cache.os, "fsync", full)
    given = {"context_0": torch.zeros(2**18, 4)}
    with pytest.raises(LowVRAMError, match=r"x.safetensors can't be written \(4 MiB\): No space") as caught:
        write_rows(tmp_path / "x.safetensors", {"context_0": (2**18, 4)}, torch.float32, parts(given, step=2**17))
    assert "LOWVRAM_CACHE" in caught.value.remedy and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\xff" * 16, lambda data: b""])
def test_a_damaged_file_is_named(tmp_path, damage):
    path, given = tmp_path / "x.safetensors", tensors()
    write_rows(path, {name: tuple(tensor.shape) for name, tensor in given.items()}, torch.float16, parts(given))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LowVRAMError, match=r"x.safetensors can't be read"):
        Rows(path)
    Path(path).unlink()
    with pytest.raises(LowVRAMError, match=r"x.safetensors can't be read"):
        Rows(path)
