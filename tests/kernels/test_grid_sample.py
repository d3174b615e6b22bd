from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lowvram.kernels.grid_sample import grid_sample
from lowvram.kernels.linear_map import linear_map

MODES = [(padding, corners) for padding in ("zeros", "border", "reflection") for corners in (False, True)]


def points(batch: int = 2, height: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random points, some of them far beyond the edges. [B, H, W, 2]"""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, height, width, 2, generator=generator, dtype=dtype) * 5 - 2.5


@pytest.mark.parametrize(("padding_mode", "align_corners"), MODES)
@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 3, 5, 1)])
def test_value_and_gradient_are_those_of_torch(padding_mode: str, align_corners: bool, shape: tuple[int, ...]) -> None:
    ours = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    native = ours.detach().clone().requires_grad_()
    y = grid_sample(ours, points(), padding_mode=padding_mode, align_corners=align_corners)
    expected = F.grid_sample(native, points(), padding_mode=padding_mode, align_corners=align_corners)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    cotangent = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, ours, cotangent)[0], torch.autograd.grad(expected, native, cotangent)[0]
    )


@pytest.mark.parametrize(("padding_mode", "align_corners"), MODES)
def test_first_and_second_derivative(padding_mode: str, align_corners: bool) -> None:
    images = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def sample(x: Tensor) -> Tensor:
        return grid_sample(x, points(), padding_mode=padding_mode, align_corners=align_corners)

    assert gradcheck(sample, images)
    assert gradgradcheck(sample, images)


def test_second_derivative_is_the_native_one_where_torch_has_it() -> None:
    grid = points(batch=2)

    def penalty_gradient(sample: Callable[[Tensor], Tensor]) -> Tensor:
        images = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 2, 3, 4).requires_grad_()
        (grad,) = torch.autograd.grad((sample(images) ** 3).sum(), images, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), images)[0]

    try:
        native = penalty_gradient(lambda x: F.grid_sample(x, grid, align_corners=False))
    except RuntimeError:
        pytest.skip("this torch has no second derivative of grid_sample")
    torch.testing.assert_close(penalty_gradient(lambda x: grid_sample(x, grid)), native)


def test_a_gradient_penalty_through_it_is_that_of_the_dense_matrix() -> None:
    """R1 of a nonlinear function of the samples, against the same sampling written as a matrix."""
    grid = points(batch=1)
    basis = torch.eye(12, dtype=torch.float64).view(12, 1, 3, 4)
    matrix = grid_sample(basis, grid.expand(12, -1, -1, -1)).flatten(1)  # [12 inputs, 15 outputs]
    images = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(samples: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad((samples**3).sum(), images, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), images)[0]

    torch.testing.assert_close(penalty(grid_sample(images, grid)), penalty(images.flatten(1) @ matrix))


def test_it_saves_the_grid_and_not_the_images() -> None:
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    grid = points(dtype=torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        grid_sample(images, grid)
    assert saved == [grid.data_ptr()]


def test_a_grid_that_wants_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="grid requires a gradient"):
        grid_sample(torch.randn(1, 1, 4, 4), torch.zeros(1, 2, 2, 2, requires_grad=True))
    with pytest.raises(ValueError, match="'mirror' is not one of zeros, border, reflection"):
        grid_sample(torch.randn(1, 1, 4, 4), torch.zeros(1, 2, 2, 2), padding_mode="mirror")


def test_linear_map_runs_the_adjoint_and_the_map_in_turn_and_without_autocast() -> None:
    calls: list[str] = []

    def double(x: Tensor, _: Tensor) -> Tensor:
        calls.append(f"map {torch.is_autocast_enabled('cpu')}")
        return 2 * x

    def adjoint(x: Tensor, _: Tensor) -> Tensor:
        calls.append("adjoint")
        return 2 * x

    x = torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_map(x, double, adjoint, torch.zeros(1))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # 8 x
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, torch.full((3,), 8.0))
    assert calls == ["map False", "adjoint", "map False", "adjoint"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    grid = points().cuda()
    torch.testing.assert_close(grid_sample(images, grid), F.grid_sample(images, grid, align_corners=False))
    assert gradgradcheck(lambda x: grid_sample(x, grid), images, nondet_tol=1e-12)
