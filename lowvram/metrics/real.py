"""Statistics of the real images: a fixed choice of them, in two halves, kept on disk between evaluations."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowvram import seeded
from lowvram.data.image_cache import cache_root
from lowvram.metrics.features import FeatureExtractor
from lowvram.metrics.frechet import Gaussian

log = logging.getLogger(__name__)

# Raise when the same images may give other statistics, so that kept ones are taken again.
_VERSION = 1


class Images(Protocol):
    """What is asked of a data set (lowvram.data.ImageSet has it). [i] is uint8 [3, R, R]."""

    name: str
    resolution: int

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Tensor: ...


class FeatureSummary:
    """Statistics of all features that pass by (see Gaussian), and the first `keep` of them, float32 [<= keep, D]."""

    def __init__(self, dim: int, keep: int) -> None:
        self.gaussian = Gaussian.empty(dim)
        self.keep = keep
        self._kept: list[Tensor] = [torch.empty(0, dim)]
        self._kept_count = 0

    def update(self, features: Tensor) -> None:
        """Take in features [B, D]."""
        self.gaussian.update(features)
        some = features[: self.keep - self._kept_count].float()
        self._kept.append(some)
        self._kept_count += len(some)

    @property
    def features(self) -> Tensor:
        """The features kept, float32 [<= keep, D]."""
        self._kept = [torch.cat(self._kept)]
        return self._kept[0]


class Halves:
    """Features by turns in two halves, so that the halves' distance tells how small a distance can be."""

    def __init__(self, dim: int, keep: int) -> None:
        self.parts = (FeatureSummary(dim, keep // 2), FeatureSummary(dim, keep // 2))
        self._seen = 0

    def update(self, features: Tensor) -> None:
        """Take in features [B, D]."""
        for turn, part in enumerate(self.parts):
            part.update(features[(turn + self._seen) % 2 :: 2])
        self._seen += len(features)

    @property
    def gaussian(self) -> Gaussian:
        """Statistics of both halves together."""
        return self.parts[0].gaussian.joined(self.parts[1].gaussian)

    @property
    def features(self) -> Tensor:
        """The features kept of both halves."""
        return torch.cat([part.features for part in self.parts])


def real_indices(length: int, n: int) -> list[int]:
    """The images that stand for a data set: always the same random n of it, since files may be sorted by class."""
    order = np.random.default_rng(0).permutation(length)
    return [int(i) for i in order[:n]]


def real_batches(images: Images, n: int, *, mirror: bool, batch: int, workers: int = 0) -> Iterator[Tensor]:
    """The first n of `real_indices`, in uint8 batches [batch, 3, R, R].

    mirror: flip every second one or so, always the same: what a generator trained on mirrored images is to match.
    """
    chosen = _Chosen(images, real_indices(len(images), n), mirror)
    yield from DataLoader(chosen, batch_size=batch, num_workers=workers)


class _Chosen(Dataset[Tensor]):
    def __init__(self, images: Images, indices: list[int], mirror: bool) -> None:
        self.images, self.indices, self.mirror = images, indices, mirror

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        index = self.indices[position]
        image = self.images[index]
        return image.flip(-1) if self.mirror and seeded.mix(index) % 2 else image


def statistics_path(images: Images, extractor: FeatureExtractor, n: int, keep: int, *, mirror: bool) -> Path:
    """Where the statistics of these images and features are kept."""
    parts = [_VERSION, images.fingerprint, images.resolution, extractor.version, n, keep, mirror]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
    return cache_root() / "statistics" / f"{extractor.name}-{digest}.npz"


def read_statistics(path: Path, dim: int, n: int, keep: int) -> Halves | None:
    """What `write_statistics` kept; None where it is not there, or damaged and so to be taken again."""
    if not path.is_file():
        return None
    halves = Halves(dim, keep)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for turn, part in enumerate(halves.parts):
                count, mean, scatter = (arrays[f"{name}{turn}"] for name in ("count", "mean", "scatter"))
                features = torch.from_numpy(arrays[f"features{turn}"])
                expected = n // 2 + (n % 2 if turn == 0 else 0)
                shapes = [(dim,), (dim, dim), (min(expected, part.keep), dim)]
                if int(count) != expected or [mean.shape, scatter.shape, tuple(features.shape)] != shapes:
                    raise ValueError("its sizes are others than its name says")
                if not (np.isfinite(mean).all() and np.isfinite(scatter).all() and features.isfinite().all()):
                    raise ValueError("it holds no finite numbers")
                part.update(features)
                part.gaussian = Gaussian(int(count), mean, scatter)
    except Exception as error:  # a damaged file can raise anything; what it held is computed again
        log.warning("the kept statistics %s can't be read (%s): they are taken again", path, error)
        return None
    return halves


def write_statistics(path: Path, halves: Halves) -> None:
    """Keep statistics for the next evaluation; a disk that says no is a warning."""
    arrays: dict[str, Any] = {}
    for turn, part in enumerate(halves.parts):
        arrays[f"count{turn}"] = np.int64(part.gaussian.count)
        arrays[f"mean{turn}"] = part.gaussian.mean
        arrays[f"scatter{turn}"] = part.gaussian.scatter
        arrays[f"features{turn}"] = part.features.numpy()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        log.warning("the statistics of the real images can't be kept in %s (%s)", path.parent, error.strerror or error)
