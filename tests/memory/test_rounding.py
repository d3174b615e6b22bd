"""Stochastic rounding: one of the two neighbours, right on average, nothing finite lost."""

import pytest
import torch

from lowvram.memory.rounding import stochastic_round_


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.1415926e-5, -123.4567, 1e-40, 0.0])
def test_the_mean_is_exact_and_only_neighbours_occur(value: float) -> None:
    n = 200_000
    source = torch.full([n], value)
    rounded = stochastic_round_(torch.empty(n, dtype=torch.bfloat16), source, generator()).double()
    exact = float(source[0].double())
    bits = source[:1].view(torch.int32) & -(1 << 16)
    near, far = (float(b.view(torch.float32).double()) for b in (bits, bits + (1 << 16)))
    assert set(rounded.tolist()) <= {near, far}
    gap = abs(far - near)
    # The standard error of a mean of n draws from two values is at most gap / (2 sqrt n): allow five.
    assert abs(float(rounded.mean()) - exact) <= 5 * gap / (2 * n**0.5) or exact == near
    assert exact == near or len(set(rounded.tolist())) == 2


def test_values_that_bf16_has_stay() -> None:
    source = torch.randn(1000, generator=generator()).bfloat16().float()
    assert torch.equal(stochastic_round_(torch.empty(1000, dtype=torch.bfloat16), source, generator()).float(), source)


def test_non_finite_values_are_kept_and_finite_ones_stay_finite() -> None:
    largest = torch.finfo(torch.float32).max
    source = torch.tensor([float("inf"), -float("inf"), float("nan"), largest, -largest]).repeat(500)
    rounded = stochastic_round_(torch.empty(2500, dtype=torch.bfloat16), source, generator()).view(500, 5)
    assert (rounded[:, 0] == float("inf")).all()
    assert (rounded[:, 1] == -float("inf")).all()
    assert rounded[:, 2].isnan().all()
    assert rounded[:, 3:].isfinite().all()


def test_shapes_strides_and_seeds() -> None:
    source = torch.randn(6, 10, generator=generator())
    target = torch.zeros(10, 6, dtype=torch.bfloat16).t()
    assert stochastic_round_(target, source, generator(1)) is target
    assert torch.allclose(target.float(), source, rtol=2**-7)
    again = stochastic_round_(torch.zeros(10, 6, dtype=torch.bfloat16).t(), source, generator(1))
    other = stochastic_round_(torch.zeros(10, 6, dtype=torch.bfloat16).t(), source, generator(2))
    assert torch.equal(target, again)
    assert not torch.equal(target, other)
    with pytest.raises(ValueError, match="can't be rounded"):
        stochastic_round_(torch.zeros(3), torch.zeros(3))


def test_many_small_updates_are_not_lost() -> None:
    weights = torch.ones(4096, dtype=torch.bfloat16)
    draws = generator()
    for _ in range(200):
        stochastic_round_(weights, weights.float() + 1e-4, draws)  # an 80th of the gap at 1
    assert abs(float(weights.float().mean()) - 1.02) < 5e-4  # to the nearest it would still be 1
