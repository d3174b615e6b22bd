"""The pyramid keeps all of an image, patches lie inside it, and the distance is that of its definition."""

import pytest
import torch
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.metrics import sliced_wasserstein as swd


def textures(n: int, size: int, seed: int, cells: int = 5) -> torch.Tensor:
    """Smooth random images with some fine grain."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(n, 3, cells, cells, generator=generator) * 200, size=size, mode="bicubic")
    return (smooth + 40 * torch.rand(n, 3, size, size, generator=generator)).clamp(0, 255).to(torch.uint8)


def descriptors(images: torch.Tensor, batch: int = 50) -> dict[int, torch.Tensor]:
    gathered = swd.PatchDescriptors(limit=1000)
    for part in images.split(batch):
        gathered.update(part)
    return gathered.levels()


def test_the_pyramid_adds_up_to_the_image() -> None:
    image = textures(2, 128, 0).float()
    levels = swd.laplacian_pyramid(image)
    assert [level.shape[-1] for level in levels] == [128, 64, 32, 16]
    rebuilt = levels[-1]
    for level in levels[-2::-1]:
        rebuilt = level + swd._enlarge(rebuilt)
    torch.testing.assert_close(rebuilt, image, atol=1e-3, rtol=0)
    flat = swd.laplacian_pyramid(torch.full((1, 1, 64, 64), 7.0))
    assert all(float(level.abs().max()) < 1e-3 for level in flat[:-1])  # nothing of a plain image is in the details
    torch.testing.assert_close(flat[-1], torch.full((1, 1, 16, 16), 7.0))


def test_patches_are_cut_from_everywhere_inside() -> None:
    at = torch.arange(16 * 20).view(1, 1, 16, 20).float().expand(2, 3, -1, -1)
    cut = swd.patches(at, torch.tensor([0, 1]), "test", count=500)
    assert cut.shape == (2, 500, 3, 7, 7)
    corner = cut[:, :, 0, 0, 0].long()
    assert torch.equal(cut[:, :, 1, 3, 2].long(), corner + 3 * 20 + 2)
    assert {int(v) for v in (corner // 20).unique()} == set(range(10)) and {
        int(v) for v in (corner % 20).unique()
    } == set(range(14))
    assert not torch.equal(cut[0], cut[1])
    assert torch.equal(swd.patches(at[1:], torch.tensor([1]), "test", count=500)[0], cut[1])


def test_batching_and_the_limit_change_nothing_else() -> None:
    images = textures(10, 32, 0)
    whole, cut = descriptors(images), descriptors(images, batch=3)
    assert list(whole) == [32, 16] and whole[32].shape == (10, 128, 3, 7, 7)
    assert all(torch.equal(whole[r], cut[r]) for r in whole)
    limited = swd.PatchDescriptors(limit=4)
    for part in images.split(3):
        limited.update(part)
    assert limited.count == 4 and torch.equal(limited.levels()[16], whole[16][:4])


def test_the_distance_of_shifted_sets_is_known() -> None:
    """Half the descriptors at +1 against all of a normal sample: compared with a direct computation."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 40, 3, 7, 7, generator=generator) for _ in range(2))
    b[:, ::2] += 1.5
    got = swd.sliced_wasserstein(a, b, seed=3, directions=20)

    axes = torch.randn(147, 20, generator=torch.Generator().manual_seed(3))
    expected = 0.0
    for axis in (axes / axes.norm(dim=0)).T:
        sorted_sets = []
        for x in (a, b):
            channels = x.flatten(0, 1).transpose(0, 1).flatten(1)  # [C, ...]
            scaled = (x - channels.mean(1).view(3, 1, 1)) / channels.std(1, correction=0).view(3, 1, 1)
            sorted_sets.append((scaled.flatten(0, 1).flatten(1) @ axis).sort().values)
        expected += float((sorted_sets[0] - sorted_sets[1]).abs().mean()) / 20 * 1000
    assert got == pytest.approx(expected, rel=1e-4)
    assert swd.sliced_wasserstein(a, a) == 0
    assert swd.sliced_wasserstein(a, 3 * a + 5) == pytest.approx(0, abs=0.01)  # each set is normalised by itself


def test_each_level_answers_for_its_scale() -> None:
    real, other = descriptors(textures(60, 32, 0)), textures(60, 32, 1)

    def distances(images: torch.Tensor) -> dict[int, float]:
        return {r: swd.sliced_wasserstein(real[r], level) for r, level in descriptors(images).items()}

    def times_farther(images: torch.Tensor) -> dict[int, float]:
        return {r: d / near[r] for r, d in distances(images).items()}

    near = distances(other)
    stripes = torch.arange(32).remainder(2).mul(30).to(torch.uint8)
    striped = times_farther(other.clamp(max=225) + stripes)
    assert striped[32] > 3 and striped[32] > 2 * striped[16]
    calm = times_farther(textures(60, 32, 1, cells=2))  # the same grain on a calmer ground
    assert calm[16] > 3 and calm[16] > 1.5 * calm[32]


def test_plain_images_give_a_number_and_small_ones_an_error() -> None:
    plain = descriptors(torch.full((4, 3, 32, 32), 9, dtype=torch.uint8))
    assert all(swd.sliced_wasserstein(level, level) == 0 for level in plain.values())
    with pytest.raises(LowVRAMError, match="4x4"):
        descriptors(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
