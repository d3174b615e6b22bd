"""Image i depends on the seed and i alone, and a walk through w closes."""

import pytest
import torch

from lowvram.errors import LowVRAMError
from lowvram.models.stylegan2 import Generator
from lowvram.sampling import gan


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make(0)


@pytest.fixture(scope="module")
def conditional() -> Generator:
    return make(3)


def make(c_dim: int) -> Generator:
    torch.manual_seed(0)
    network = Generator(16, z_dim=8, w_dim=8, c_dim=c_dim, mapping_layers=2, channel_base=256, channel_max=16)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)  # starts at 0, and then noise modes all give the same
    return network.eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding at the edge between two of the 256 levels."""
    return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_an_image_does_not_depend_on_the_slicing(generator: Generator, noise_mode: str) -> None:
    whole = gan.sample_images(generator, 7, seed=5, noise_mode=noise_mode, micro_batch=7)
    assert whole.dtype == torch.uint8 and whole.shape == (7, 3, 16, 16) and not whole.is_inference()
    assert close(gan.sample_images(generator, 7, seed=5, noise_mode=noise_mode, micro_batch=3), whole)
    assert close(gan.sample_images(generator, 3, seed=5, noise_mode=noise_mode, start=2), whole[2:5])


def test_seeds_indices_truncation_and_noise_all_matter(generator: Generator) -> None:
    base = gan.sample_images(generator, 2, seed=1)
    assert not close(base[:1], base[1:])
    assert not close(gan.sample_images(generator, 2, seed=2), base)
    assert not close(gan.sample_images(generator, 2, seed=1, truncation_psi=0.3), base)
    modes = [gan.sample_images(generator, 2, seed=1, noise_mode=m) for m in ("const", "random", "none")]
    assert not close(modes[0], modes[1]) and not close(modes[1], modes[2]) and not close(modes[0], modes[2])
    average = gan.sample_images(generator, 2, seed=1, truncation_psi=0)
    assert close(average[:1], average[1:])


def test_latents_are_normal_and_belong_to_their_index() -> None:
    z = gan.latents(500, 3, 64)
    assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02
    assert torch.equal(gan.latents(2, 3, 64, start=7), z[7:9])


def test_classes_go_by_the_image_and_not_by_the_slice(conditional: Generator) -> None:
    turns = gan.sample_images(conditional, 6, seed=0)
    assert close(gan.sample_images(conditional, 6, seed=0, classes=[0, 1, 2], micro_batch=2), turns)
    assert close(gan.sample_images(conditional, 2, seed=0, classes=[0, 1, 2], start=4), turns[4:])
    assert not close(gan.sample_images(conditional, 6, seed=0, classes=[2]), turns)


def test_uint8_inverts_how_real_images_are_scaled() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(gan.to_uint8(levels.float() / 127.5 - 1), levels)
    assert gan.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(LowVRAMError, match="NaN"):
        gan.to_uint8(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"noise_mode": "loud"}, "noise=loud"),
        ({"classes": [1]}, "without classes"),
    ],
)
def test_wrong_values_are_named(generator: Generator, options: dict, message: str) -> None:
    with pytest.raises(LowVRAMError, match=message):
        gan.sample_images(generator, **{"n": 2, **options})


@pytest.mark.parametrize("classes", [[3], [-1], []])
def test_unknown_classes_are_named(conditional: Generator, classes: list[int]) -> None:
    with pytest.raises(LowVRAMError, match="class"):
        gan.sample_images(conditional, 2, classes=classes)
    with pytest.raises(LowVRAMError, match="class"):
        gan.interpolate(conditional, classes=classes)


def test_the_curve_is_closed_smooth_and_passes_its_keys() -> None:
    keys = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(5):
        assert torch.equal(gan.closed_curve(keys, k), keys[:, k])
    assert torch.allclose(gan.closed_curve(keys, 5 - 1e-9), keys[:, 0], atol=1e-7)
    step = 1e-6
    for t in (0.0, 1.0, 4.0):  # the same speed before and after a key, also where the curve closes
        before = gan.closed_curve(keys, t) - gan.closed_curve(keys, (t - step) % 5)
        after = gan.closed_curve(keys, t + step) - gan.closed_curve(keys, t)
        assert torch.allclose(before / step, after / step, atol=1e-4)
        assert float(after.norm()) > 0


def test_a_walk_passes_the_images_of_its_latents(generator: Generator) -> None:
    frames = list(gan.interpolate(generator, seed=3, keyframes=3, frames_per_keyframe=4, rows=1, cols=2, micro_batch=1))
    assert len(frames) == 12 and frames[0].shape == (3, 16, 32) and frames[0].dtype == torch.uint8
    stills = gan.sample_images(generator, 6, seed=3)
    for k in range(3):
        assert close(frames[4 * k][:, :, :16], stills[k]) and close(frames[4 * k][:, :, 16:], stills[3 + k])
    moved = [float((a.float() - b.float()).abs().mean()) for a, b in zip(frames, [*frames[1:], frames[0]], strict=True)]
    assert 0 < max(moved) < 6 * (sum(moved) / len(moved))  # no jump, neither between frames nor at the end


def test_a_class_conditional_walk_keeps_its_class(conditional: Generator) -> None:
    (first, *_) = gan.interpolate(conditional, seed=1, keyframes=2, frames_per_keyframe=1, cols=2, classes=[2, 0])
    own = gan.sample_images(conditional, 4, seed=1, classes=[2, 2, 0, 0])
    assert close(first[:, :, :16], own[0]) and close(first[:, :, 16:], own[2])
