"""The choice of real images is fixed, and kept statistics are trusted only when whole."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram.metrics import real
from lowvram.metrics.frechet import Gaussian


class FakeImages:
    """20 plain images, each its own grey; the left half darker, so that a mirror shows."""

    name = "fakes"
    resolution = 16
    fingerprint = "f00"
    length = 20

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        image = torch.full((3, 16, 16), 10 * index, dtype=torch.uint8)
        image[..., :8] //= 2
        return image


class FakeExtractor:
    name, version, dim = "fake", "fake-1", 3

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.float().mean((1, 2, 3)), images[:, 0, 0, 0].float(), images[:, 0, 0, -1].float()], 1)


def halves(n: int, keep: int, batch: int = 7) -> real.Halves:
    taken = real.Halves(3, keep)
    for images in real.real_batches(FakeImages(), n, mirror=False, batch=batch):
        taken.update(FakeExtractor()(images))
    return taken


def test_the_choice_is_random_and_always_the_same() -> None:
    chosen = real.real_indices(1000, 100)
    assert chosen == real.real_indices(1000, 100) and len(set(chosen)) == 100
    assert 350 < np.mean(chosen) < 650  # not the first class of a sorted folder
    assert sorted(real.real_indices(20, 20)) == list(range(20))


def test_mirroring_flips_about_half_of_the_images() -> None:
    plain = torch.cat(list(real.real_batches(FakeImages(), 20, mirror=False, batch=6)))
    mirrored = torch.cat(list(real.real_batches(FakeImages(), 20, mirror=True, batch=6)))
    flipped = [torch.equal(m, p.flip(-1)) and not torch.equal(m, p) for m, p in zip(mirrored, plain, strict=True)]
    same = [torch.equal(m, p) for m, p in zip(mirrored, plain, strict=True)]
    assert all(f or s for f, s in zip(flipped, same, strict=True)) and 4 <= sum(flipped) <= 16


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_halves_split_the_images_however_they_are_batched(batch: int) -> None:
    whole = torch.cat([FakeExtractor()(b) for b in real.real_batches(FakeImages(), 15, mirror=False, batch=15)])
    taken = halves(15, keep=10, batch=batch)
    assert [part.gaussian.count for part in taken.parts] == [8, 7]
    assert torch.equal(taken.parts[1].features, whole[1::2][:5])
    np.testing.assert_allclose(taken.gaussian.covariance, Gaussian.of(whole).covariance)


def test_kept_statistics_come_back_exactly(tmp_path: Path) -> None:
    taken = halves(15, keep=10)
    path = tmp_path / "sub" / "statistics.npz"
    real.write_statistics(path, taken)
    back = real.read_statistics(path, dim=3, n=15, keep=10)
    assert back is not None
    for a, b in zip(taken.parts, back.parts, strict=True):
        assert a.gaussian.count == b.gaussian.count and torch.equal(a.features, b.features)
        assert np.array_equal(a.gaussian.mean, b.gaussian.mean) and np.array_equal(
            a.gaussian.scatter, b.gaussian.scatter
        )
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "pickle"])
def test_damaged_statistics_are_taken_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "statistics.npz"
    real.write_statistics(path, halves(15, keep=10))
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        at = whole.index(b"scatter0") + 200
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        real.write_statistics(path, halves(13, keep=10))
    else:
        np.savez(path, count0=np.array([{}], dtype=object))
    with caplog.at_level(logging.WARNING):
        assert real.read_statistics(path, dim=3, n=15, keep=10) is None
    assert "taken again" in caplog.text


def test_the_path_tells_apart_whatever_changes_the_numbers() -> None:
    images, extractor = FakeImages(), FakeExtractor()
    base = real.statistics_path(images, extractor, 15, 10, mirror=False)
    other_images, other_extractor = FakeImages(), FakeExtractor()
    other_images.fingerprint, other_extractor.version = "f01", "fake-2"
    others = [
        real.statistics_path(other_images, extractor, 15, 10, mirror=False),
        real.statistics_path(images, other_extractor, 15, 10, mirror=False),
        real.statistics_path(images, extractor, 16, 10, mirror=False),
        real.statistics_path(images, extractor, 15, 10, mirror=True),
    ]
    assert len({base, *others}) == 5
    assert base.is_relative_to(os.environ["LOWVRAM_CACHE"])


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        real.write_statistics(tmp_path / "file" / "statistics.npz", halves(15, keep=10))
    assert "can't be kept" in caplog.text
