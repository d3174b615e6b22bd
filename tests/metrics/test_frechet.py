"""The Frechet distance is the closed form, and gathering statistics batch by batch changes nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import LowVRAMError
from lowvram.metrics.frechet import Gaussian, frechet_distance, frechet_efficientnet_lite0


def features(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@given(cuts=st.lists(st.integers(0, 40), max_size=5), shift=st.floats(-1e4, 1e4))
def test_batches_join_to_the_statistics_of_the_whole(cuts: list[int], shift: float) -> None:
    whole = features(40, 6).double() + shift
    gaussian = Gaussian.empty(6)
    for part in np.split(whole.numpy(), sorted(cuts)):
        gaussian.update(torch.from_numpy(part))
    assert gaussian.count == 40
    np.testing.assert_allclose(gaussian.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(whole.numpy(), rowvar=False), rtol=1e-8, atol=1e-10)


def test_diagonal_gaussians_have_their_closed_form() -> None:
    a = Gaussian(101, np.array([0.0, 1.0]), np.diag([4.0, 9.0]) * 100)
    b = Gaussian(101, np.array([3.0, 5.0]), np.diag([1.0, 25.0]) * 100)
    assert frechet_distance(a, b) == pytest.approx(9 + 16 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_correlated_and_rank_deficient_covariances_agree_with_the_symmetric_form() -> None:
    a, b = Gaussian.of(features(20, 32)), Gaussian.of(features(200, 32, 1) @ features(32, 32, 2) + 1)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(LowVRAMError, match="1 images"):
        frechet_distance(Gaussian.of(features(1, 4)), Gaussian.of(features(9, 4)))


def test_the_function_on_images_sees_blur_and_not_the_batching() -> None:
    images = (torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)
    same = frechet_efficientnet_lite0(images.split(8), images.split(5))
    assert same == pytest.approx(0, abs=1e-3)
    assert frechet_efficientnet_lite0(images.split(8), blurred.split(8)) > 20
