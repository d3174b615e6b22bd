"""Tensors of every type, comparison bit for bit, and what an unusable file is refused with."""

from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.weights.tensor_file import TensorFile

PLAIN = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
PLAIN += [torch.int8, torch.uint8, torch.bool, torch.complex64]


def tensors(dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {
        f"layer.{number}.weight": (torch.rand(3, number + 1, generator=generator) * 100).to(dtype)
        for number, dtype in enumerate(dtypes)
    }
    return out | {"none": torch.empty(0, 4), "one": torch.tensor(3.5), "a very long name ü": torch.arange(5)}


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def refused(path: Path, *words: str) -> str:
    """What opening says; it names the file and these words."""
    with pytest.raises(LowVRAMError) as caught, TensorFile.open(path) as file:
        for name in file.names:
            file.read(name)
    said = caught.value.problem
    assert str(path) in said, said
    for word in words:
        assert word in said, said
    assert caught.value.remedy and "weights_only" not in str(caught.value)
    return said


def damage(data: st.DataObject, content: bytearray, length: int) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
