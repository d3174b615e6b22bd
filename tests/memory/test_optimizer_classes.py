"""Adam without its first moment, and Adafactor over matrices, against torch's own."""

import pytest
import torch
from torch import nn

from lowvram.memory.optimizer_classes import Adafactor, SecondMomentAdam

SHAPES = ([37, 5], [4099], [8, 4, 3, 3], [])


def twins(dtype: torch.dtype = torch.float32, shapes: tuple[list[int], ...] = SHAPES) -> list[list[nn.Parameter]]:
    draws = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draws) for shape in shapes]
    return [[nn.Parameter(v.clone().to(dtype)) for v in values] for _ in range(2)]


def give(params: list[list[nn.Parameter]], step: int) -> None:
    draws = torch.Generator().manual_seed(step + 1)
    for pair in zip(*params, strict=True):
        grad = torch.randn(pair[0].shape, generator=draws) * 10 ** (step % 3 - 2)
        for param in pair:
            param.grad = grad.to(param.dtype).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_without_a_first_moment_is_torch_s_bit_by_bit(dtype: torch.dtype, decoupled: bool, decay: float) -> None:
    torch_s, ours = params = twins(dtype)
    settings = {"lr": 1e-2, "eps": 1e-8, "weight_decay": decay}
    own = (torch.optim.AdamW if decoupled else torch.optim.Adam)(torch_s, betas=(0.0, 0.99), fused=True, **settings)
    optimizer = SecondMomentAdam(ours, beta2=0.99, decoupled_weight_decay=decoupled, **settings)
    for step in range(6):
        give(params, step)
        own.step()
        optimizer.step()
    for a, b in zip(torch_s, ours, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(own.state[a]["exp_avg_sq"], optimizer.state[b]["exp_avg_sq"])
        assert optimizer.state[b].keys() == {"step", "exp_avg_sq"}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_torch_s_on_matrices_vectors_and_scalars(decay: float) -> None:
    torch_s, ours = params = twins(shapes=([37, 5], [300], [64, 64], []))
    own = torch.optim.Adafactor(torch_s, lr=0.02, weight_decay=decay, foreach=False)
    optimizer = Adafactor(ours, lr=0.02, betas=(0.9, 0.999), weight_decay=decay)
    for step in range(8):
        give(params, step)
        own.step()
        optimizer.step()
    for a, b in zip(torch_s, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adafactor_treats_convolutions_as_matrices_in_any_memory_format() -> None:
    torch_s, ours = twins(shapes=([16, 8, 3, 3],))
    matrix = nn.Parameter(torch_s[0].detach().reshape(16, 72))
    ours[0].data = ours[0].data.contiguous(memory_format=torch.channels_last)
    own = torch.optim.Adafactor([matrix], lr=0.02, foreach=False)
    optimizer = Adafactor(ours, lr=0.02, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(5):
        give([torch_s, ours], step)
        assert torch_s[0].grad is not None
        matrix.grad = torch_s[0].grad.reshape(16, 72)
        own.step()
        optimizer.step()
    torch.testing.assert_close(matrix.view(16, 8, 3, 3), ours[0], rtol=1e-5, atol=1e-6)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_adafactor_keeps_few_bytes_of_a_convolution() -> None:
    param = nn.Parameter(torch.zeros(64, 64, 3, 3))
    state = Adafactor([param], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0).make_state(param)
    held = sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor))
    assert held == 4 * (64 + 64 * 9)  # 2,560 bytes; torch's own keeps 98,304
