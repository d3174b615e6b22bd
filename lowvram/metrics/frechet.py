"""Frechet distance between two sets of features, from float64 statistics gathered batch by batch.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))          (Heusel et al. 2017, arXiv 1706.08500, equation 6)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.metrics.features import FeatureExtractor, default_extractor


@dataclass
class Gaussian:
    """Count, mean [D] and scatter [D, D] (sum of outer products about the mean) of features, in float64.

    Sets join without loss of precision (Chan et al. 1979), so that no more than a batch need be held.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def empty(cls, dim: int) -> Gaussian:
        """Of no features yet."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Of features [B, D]."""
        gaussian = cls.empty(features.shape[1])
        gaussian.update(features)
        return gaussian

    def update(self, features: Tensor) -> None:
        """Take in features [B, D]."""
        values = features.double().numpy()
        if not len(values):
            return
        mean = values.mean(axis=0)
        centred = values - mean
        joined = self.joined(Gaussian(len(values), mean, centred.T @ centred))
        self.count, self.mean, self.scatter = joined.count, joined.mean, joined.scatter

    def joined(self, other: Gaussian) -> Gaussian:
        """Statistics of both sets together."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        weight = self.count * other.count / count
        return Gaussian(count, mean, self.scatter + other.scatter + weight * np.outer(apart, apart))

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased [D, D]. Raises LowVRAMError for fewer than two features."""
        if self.count < 2:
            raise LowVRAMError(f"a covariance of {self.count} images can't be taken.", "Use n=2 or more.")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance, never below 0 by more than rounding.

    With fewer images than features, the covariances have no full rank: the distance is defined, and too large by an
    amount that falls as 1 / n. Compare only distances of equal counts.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [{"mu": g.mean, "sigma": g.covariance} for g in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def frechet_efficientnet_lite0(
    a: Iterable[Tensor], b: Iterable[Tensor], *, extractor: FeatureExtractor | None = None
) -> float:
    """Frechet distance on EfficientNet-Lite0 features between two streams of uint8 batches [B, 3, H, W].

    extractor: another one, or the same on a GPU; `default_extractor()` otherwise.
    """
    extract = extractor or default_extractor()
    return frechet_distance(*(gaussian_of(batches, extract) for batches in (a, b)))


def gaussian_of(batches: Iterable[Tensor], extractor: FeatureExtractor) -> Gaussian:
    """Statistics of the features of a stream of uint8 batches [B, 3, H, W]."""
    gaussian = Gaussian.empty(extractor.dim)
    for images in batches:
        gaussian.update(extractor(images))
    return gaussian
