"""8-bit moments to fp32 and back."""

import pytest
import torch

from lowvram.kernels import eight_bit as convert
from lowvram.kernels.eight_bit import code_values


@pytest.mark.parametrize("code", ["signed", "unsigned", "positive"])
@pytest.mark.parametrize("n", [1, 255, 256, 5000])
def test_every_value_goes_to_the_nearest_of_its_block(code: str, n: int) -> None:
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(n, generator=draws) * torch.logspace(0, -8, n)
    values = values if code == "signed" else values.abs()
    narrow, scales = convert.quantize(values, code)
    assert (narrow.dtype, len(narrow), len(scales)) == (torch.uint8, n, -(-n // 256))
    back = convert.dequantize(narrow, scales, code)
    levels = torch.tensor(code_values(code))
    for start in range(0, n, 256):
        block = values[start : start + 256]
        best = (block[:, None] - levels * block[block.abs().argmax()]).abs().amin(dim=1)
        error = (block - back[start : start + 256]).abs()
        torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-7 * scales[0].abs().item())
    assert torch.equal(convert.quantize(back, code)[0], narrow)


def test_zeros_stay_zero_and_second_moments_positive() -> None:
    values = torch.zeros(512)
    values[0] = 1.0
    for code in ("signed", "unsigned"):
        assert torch.equal(convert.dequantize(*convert.quantize(values, code), code), values)
    positive = convert.dequantize(*convert.quantize(values, "positive"), "positive")
    assert (positive[1:256] > 0).all()
    assert (positive[256:] == 0).all()  # of a block that never had a gradient


def test_the_levels_are_bitsandbytes_own() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for name in ("signed", "unsigned"):
        theirs = functional.create_dynamic_map(signed=name == "signed")
        torch.testing.assert_close(torch.tensor(code_values(name)), theirs, rtol=1e-6, atol=1e-12)
    positive = code_values("positive")
    assert len(positive) == 256 and positive[0] > 0 and list(positive) == sorted(positive)
