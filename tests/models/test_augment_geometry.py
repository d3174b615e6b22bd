import math

import pytest
import torch
from torch import Tensor

from lowvram.kernels import dispatch
from lowvram.models import augment_geometry as geometry


def blob(x: float, y: float, size: int = 64) -> Tensor:
    """A smooth spot at (x, y) pixels from the centre. float64 [1, 1, size, size]"""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.exp(-((at - x)[None, :] ** 2 + (at - y)[:, None] ** 2) / 32)[None, None]


def centre(image: Tensor) -> tuple[float, float]:
    at = torch.arange(image.shape[-1], dtype=torch.float64) - (image.shape[-1] - 1) / 2
    weight = image[0, 0] / image.sum()
    return (weight * at[None, :]).sum().item(), (weight * at[:, None]).sum().item()


def identity(batch: int) -> Tensor:
    return torch.eye(3, dtype=torch.float64).expand(batch, 3, 3)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_mirroring_turning_and_shifting_come_in_this_order(flip: bool, turns: int) -> None:
    image = torch.randn(1, 3, 16, 16)
    expected = (image.flip(3) if flip else image).rot90(turns, (2, 3))
    expected = torch.nn.functional.pad(expected, (4, 4, 4, 4), mode="reflect")[:, :, 4 + 3 :, 4 - 2 :][:, :, :16, :16]
    whole = [torch.tensor([n]) for n in (turns, 2, -3)]
    assert torch.equal(geometry.blit(image, torch.tensor([flip]), *whole), expected)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (7, 12)])
def test_warping_by_the_identity_reproduces_every_pixel(height: int, width: int) -> None:
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(geometry.warp(images, identity(2)), images, rtol=0, atol=1e-12)


def test_whole_pixel_shifts_by_warping_reproduce_every_pixel_of_the_image() -> None:
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    out = geometry.warp(images, geometry.translate(scalar(-5), scalar(3)))  # content moves right by 5 and up by 3
    torch.testing.assert_close(out[:, :, :21, 5:], images[:, :, 3:, :19], rtol=0, atol=1e-12)
    smooth = blob(4, -9, 24)
    out, whole = geometry.warp(smooth, geometry.translate(scalar(-5), scalar(3))), torch.zeros(1, dtype=torch.long)
    reflected = geometry.blit(smooth, whole > 0, whole, whole + 5, whole - 3)
    torch.testing.assert_close(out, reflected, rtol=0, atol=2e-3)  # beyond the edge: to what a mirrored filter differs


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_rotation_by_90_degrees_is_rot90_with_no_shift(turns: int) -> None:
    image = blob(9, -4)
    out = geometry.warp(image, geometry.rotate(scalar(turns * math.pi / 2)))
    torch.testing.assert_close(out, image.rot90(turns, (2, 3)), rtol=0, atol=5e-3)
    assert centre(out) == pytest.approx(centre(image.rot90(turns, (2, 3))), abs=1e-4)


def test_points_go_where_the_matrix_says() -> None:
    image = blob(8, 5)
    moved = centre(geometry.warp(image, geometry.translate(scalar(-3.25), scalar(-1.5))))
    assert moved == pytest.approx((11.25, 6.5), abs=1e-3)
    stretched = centre(geometry.warp(image, geometry.scale(scalar(0.8), scalar(1))))
    assert stretched == pytest.approx((10, 5), abs=1e-3)
    turned = centre(geometry.warp(image, geometry.rotate(scalar(math.pi / 6))))
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    assert turned == pytest.approx((cos * 8 + sin * 5, cos * 5 - sin * 8), abs=1e-3)


def test_shrinking_far_repeats_the_mirrored_image() -> None:
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).expand(1, 1, 32, 32)
    out = geometry.warp(ramp, geometry.scale(scalar(8), scalar(1)))[0, 0, 16]
    at = (torch.arange(32) - 15.5) * 8 / 31  # in image widths from the centre
    expected = 1 - 2 * ((at + 0.5) % 2 - 1).abs()
    assert (out - expected).abs().mean() < 0.1
    assert expected.std() > 0.5


def test_warping_by_triton_is_the_same_map_with_the_same_gradient() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = torch.randn(1, 1, 5, 8, dtype=torch.float64, device=device, requires_grad=True)
    turn = geometry.rotate(scalar(0.3)) @ geometry.translate(scalar(1.5), scalar(-0.25))
    results = []
    for impl in ("reference", "triton"):
        with dispatch.using(impl):
            y = geometry.warp(image, turn)
            results.append((y, *torch.autograd.grad(y.square().sum(), image)))
    torch.testing.assert_close(results[0], results[1])


def test_the_bands_split_the_spectrum() -> None:
    bands = geometry.band_filters()
    unit = torch.zeros(43, dtype=torch.float64)
    unit[21] = 1
    torch.testing.assert_close(bands.sum(0), unit)
    torch.testing.assert_close(bands, bands.flip(1))
    assert bands.shape == (4, 43)
    frequency = torch.tensor([1 / 32, 3 / 16, 3 / 8, 3 / 4], dtype=torch.float64) * math.pi  # inside of each band
    response = torch.cos(frequency[:, None] * (torch.arange(43) - 21)) @ bands.t()
    assert response.argmax(1).tolist() == [0, 1, 2, 3]
    assert response.diagonal().min() > 0.7
