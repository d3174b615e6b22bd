import pytest
import torch
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.models.fastgan import Excitation, Generator
from lowvram.sampling import gan


def generator(**options: int) -> Generator:
    torch.manual_seed(0)
    return Generator(64, **{"z_dim": 8, "channel_base": 512, "channel_max": 16, **options})


def test_images_have_their_size_lie_in_range_and_differ() -> None:
    network = generator()
    images = network(torch.randn(4, 8))
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert images.std(0).mean() > 0.05
    assert 0.2 < images.std() < 0.9  # neither flat nor saturated at the start


def test_an_image_depends_on_its_own_latent_and_noise_alone() -> None:
    network = generator()
    with torch.no_grad():
        for block in network.blocks().values():
            block.strength.fill_(1.0)  # type: ignore[union-attr, operator]
    z, seeds = torch.randn(4, 8), torch.arange(4)
    together = network(z, noise_seeds=seeds)
    assert torch.allclose(together[2:3], network(z[2:3], noise_seeds=seeds[2:3]), atol=1e-5)
    assert not torch.allclose(network(z, noise_mode="const"), network(z, noise_mode="none"), atol=1e-3)
    assert not torch.allclose(together, network(z, noise_seeds=seeds + 1), atol=1e-3)
    assert torch.equal(network(z, noise_mode="const"), network(z, noise_mode="const"))


def test_a_coarse_map_weighs_the_channels_of_a_fine_one() -> None:
    network = generator()
    assert [name for name, block in network.blocks().items() if block.excite is not None] == ["b64"]  # of 4x4
    excitation = Excitation(3, 5)
    x = torch.randn(2, 3, 8, 8)
    weights = excitation(x)
    assert weights.shape == (2, 5, 1, 1)
    assert ((weights > 0) & (weights < 1)).all()
    hidden = F.leaky_relu(excitation.squeeze(F.adaptive_avg_pool2d(x, 4).flatten(1)), 0.2)
    assert torch.allclose(weights[:, :, 0, 0], torch.sigmoid(excitation.excite(hidden)))


def test_classes_and_sampling() -> None:
    network = generator(c_dim=3)
    images = gan.sample_images(network, 4, seed=1, micro_batch=3)
    assert images.shape == (4, 3, 64, 64)
    assert torch.equal(images, gan.sample_images(network, 4, seed=1, micro_batch=3))
    other = gan.sample_images(network, 4, seed=1, classes=[2])
    assert not torch.equal(images[0], other[0])
    assert torch.equal(images[2], gan.sample_images(network, 4, seed=1, classes=[2], micro_batch=3)[2])
    frames = list(gan.interpolate(network, keyframes=2, frames_per_keyframe=2))
    assert len(frames) == 4
    assert list(find_blocks(network)) == ["b8", "b16", "b32", "b64"]


def test_16_bit_blocks_stay_near_fp32() -> None:
    half = generator(num_fp16_res=2)
    z = torch.randn(2, 8)
    images = half(z, noise_mode="const")
    assert images.dtype == torch.float32
    wide = generator()
    wide.load_state_dict(half.state_dict())
    assert (images - wide(z, noise_mode="const")).abs().max() < 0.02


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Generator(48), "resolution=48"),
        (lambda: Generator(32, channel_base=16), "channel_base=16"),
        (lambda: generator().mapping(torch.zeros(1, 8), truncation_psi=0.5), "truncation_psi=0.5"),
        (lambda: generator().mapping(torch.zeros(1, 8), torch.zeros(1, 2)), "c is given"),
        (lambda: generator().synthesis(torch.zeros(1, 9)), "ws has shape"),
    ],
)
def test_what_makes_no_image_is_refused(call: object, said: str) -> None:
    with pytest.raises(LowVRAMError, match=said):
        call()  # type: ignore[operator]
