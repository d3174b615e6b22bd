"""Precision falls when images leave the data, recall when they cover less of it."""

import pytest
import torch

from lowvram.errors import LowVRAMError
from lowvram.metrics.precision_recall import precision_recall


def cloud(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def test_the_same_distribution_scores_high_on_both() -> None:
    scores = precision_recall(cloud(400, 0), cloud(400, 1))
    assert min(scores) > 0.75


def test_fewer_modes_cost_recall_and_outliers_cost_precision() -> None:
    real = torch.cat([cloud(200, 0), cloud(200, 1) + 50])
    one_mode = precision_recall(cloud(400, 2), real)
    assert one_mode.precision > 0.7 and one_mode.recall < 0.55
    half_lost = precision_recall(torch.cat([real[::2] + 0.01, cloud(200, 3) - 500]), real)
    assert half_lost.precision == pytest.approx(0.5, abs=0.02) and half_lost.recall > 0.9


def test_too_few_images_are_named() -> None:
    with pytest.raises(LowVRAMError, match="3 images"):
        precision_recall(cloud(3, 0), cloud(9, 1))
