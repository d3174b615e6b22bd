"""StyleGAN2 against the published implementation's numbers, and what the class promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram.models.stylegan2 import Discriminator, Generator
from lowvram.objectives.adversarial import r1_penalty

REFERENCE = Path(__file__).parents[2] / "../shared/data/stylegan2_unconditional_reference.npz"
TINY = {"channel_base": 512, "channel_max": 32}


@pytest.fixture(scope="module")
def published():
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE.name} is not beside the repository")
    with np.load(REFERENCE) as data:
        return {name: torch.from_numpy(data[name]) if data[name].dtype == np.float32 else data[name] for name in data}


def weights(published, network):
    return {name[2:]: value for name, value in published.items() if name.startswith(f"{network}/")}


@pytest.fixture(scope="module")
def published_generator(published):
    g = Generator(32, z_dim=32, w_dim=48, mapping_layers=2, conv_clamp=256, **TINY)
    g.load_state_dict(weights(published, "G"))
    return g


@pytest.fixture(scope="module")
def published_discriminator(published):
    d = Discriminator(32, mbstd_group_size=4, conv_clamp=256, **TINY)
    d.load_state_dict(weights(published, "D"))
    return d


def test_mapping_equals_the_published_one(published, published_generator):
    torch.testing.assert_close(published_generator.mapping(published["z"], None), published["ws"])


@pytest.mark.parametrize("key, psi", [("img", 1.0), ("img_trunc05", 0.5)])
def test_images_equal_the_published_ones(published, published_generator, key, psi):
    images = published_generator(published["z"], published["c"], truncation_psi=psi, noise_mode="const")
    torch.testing.assert_close(images, published[key], atol=2e-5, rtol=1e-4)


def test_logits_and_r1_equal_the_published_ones(published, published_discriminator):
    x = published["x"].requires_grad_()
    logits = published_discriminator(x, published["c"])
    torch.testing.assert_close(logits, published["logits"], atol=1e-5, rtol=1e-4)
    r1 = r1_penalty(logits, x)
    torch.testing.assert_close(r1, published["r1"], atol=1e-6, rtol=1e-4)
    names, parameters = zip(*published_discriminator.named_parameters(), strict=True)
    grads = torch.autograd.grad((5 * r1).mean(), parameters, allow_unused=True)
    norms = {n: None if g is None else g.norm().item() for n, g in zip(names, grads, strict=True)}
    expected = json.loads(str(published["r1_grad_norms"]).replace("'", '"').replace("None", "null"))
    for name, norm in expected.items():
        assert (norms[name] or 0.0) == pytest.approx(norm or 0.0, rel=2e-4, abs=1e-7), name
