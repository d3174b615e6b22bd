"""How near a kernel's result must be to that of fp64, by its type; and the device that kernels are tested on."""

import torch
from torch import Tensor

# Relative to the largest magnitude expected. Half types: two units in the last place, as Triton's interpreter cuts
# bf16 off instead of rounding it.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def device() -> str:
    """Where Triton runs: the card, or the CPU through its interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def close(actual: Tensor, expected: Tensor, *, factor: float = 1.0) -> None:
    """Assert that `actual` is `expected` (fp64) as nearly as its own type allows; factor: for longer arithmetic."""
    assert actual is not None and actual.shape == expected.shape
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = factor * RELATIVE[actual.dtype] * max(1e-3, expected.abs().max().item())
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"
