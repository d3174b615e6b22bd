"""StyleGAN2 against the published implementation's numbers, and what the class promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram.errors import LowVRAMError
from lowvram.models.stylegan2 import Discriminator, Generator, minibatch_stddev
from lowvram.objectives.adversarial import path_lengths, r1_penalty

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


def generator(resolution=16, **kwargs):
    torch.manual_seed(0)
    return Generator(resolution, **{"z_dim": 16, "w_dim": 24, "mapping_layers": 2, **TINY, **kwargs})


def discriminator(resolution=16, **kwargs):
    torch.manual_seed(0)
    return Discriminator(resolution, **{**TINY, **kwargs})


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512, 1024])
def test_every_power_of_two_makes_networks_that_fit(resolution):
    sizes = {"channel_base": 2 * resolution, "channel_max": 8}
    g, d = generator(resolution, **sizes), discriminator(resolution, **sizes)
    images = g(torch.randn(1, 16))
    assert images.shape == (1, 3, resolution, resolution)
    assert g.num_ws == g.mapping(torch.randn(1, 16)).shape[1] == 2 * (resolution.bit_length() - 1) - 2
    assert d(images).shape == (1, 1)
    expected = [2**i for i in range(2, resolution.bit_length())]
    assert list(g.blocks()) == [f"synthesis.b{res}" for res in expected]
    assert list(d.blocks()) == [f"b{res}" for res in reversed(expected)]
    assert all(g.get_submodule(name) is block for name, block in g.blocks().items())


def test_conditional_networks_carry_the_published_keys_and_use_the_label():
    g, d = generator(c_dim=5), discriminator(c_dim=5)
    assert {"mapping.embed.weight", "mapping.embed.bias", "mapping.fc0.weight", "mapping.w_avg"} <= set(g.state_dict())
    assert g.state_dict()["mapping.fc0.weight"].shape == (24, 16 + 24)
    assert g.state_dict()["mapping.embed.weight"].shape == (24, 5)
    mapping_keys = {name for name in d.state_dict() if name.startswith("mapping.")}
    layers = ["embed", *(f"fc{i}" for i in range(8))]
    assert mapping_keys == {f"mapping.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert d.state_dict()["b4.out.weight"].shape == (32, 32)  # cmap_dim = channels at 4x4
    z, x = torch.randn(4, 16), torch.randn(4, 3, 16, 16)
    labels = torch.eye(5)[[0, 1, 2, 3]]
    other = torch.eye(5)[[4, 1, 2, 3]]
    changed = (g(z, labels, noise_mode="none") - g(z, other, noise_mode="none")).abs().amax((1, 2, 3))
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-5
    assert (d(x, labels) - d(x, other)).abs()[0] > 1e-6
    assert d(x, labels).shape == (4, 1)


def test_without_classes_an_empty_label_is_welcome():
    g, d, z = generator(), discriminator(), torch.randn(2, 16)
    images = g(z, torch.zeros(2, 0), noise_mode="const")
    torch.testing.assert_close(images, g(z, noise_mode="const"))
    torch.testing.assert_close(d(images, torch.zeros(2, 0)), d(images))


def test_noise_modes():
    g, z = generator(), torch.randn(3, 16)
    for block in g.synthesis.children():
        block.conv1.noise_strength.data.fill_(0.5)
    seeds = torch.tensor([7, 8, 9])
    for mode in ("const", "none"):
        assert torch.equal(g(z, noise_mode=mode), g(z, noise_mode=mode))
    assert not torch.equal(g(z), g(z))
    whole = g(z, noise_seeds=seeds)
    assert torch.equal(whole, g(z, noise_seeds=seeds))
    cut = torch.cat([g(z[:1], noise_seeds=seeds[:1]), g(z[1:], noise_seeds=seeds[1:])])
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-4)  # noise belongs to the sample, not to the batch
    assert (g(z, noise_seeds=seeds + 10) - whole).abs().max() > 1e-2


def test_truncation_leads_to_the_average():
    g, z = generator(), torch.randn(3, 16)
    g.mapping.update_w_avg(torch.full((24,), 2.0), 0.25)
    torch.testing.assert_close(g.mapping.w_avg, torch.full((24,), 1.5))
    w = g.mapping(z)
    torch.testing.assert_close(g.mapping(z, truncation_psi=0.0), torch.full_like(w, 1.5))
    torch.testing.assert_close(g.mapping(z, truncation_psi=0.3), 1.5 + 0.3 * (w - 1.5))


def test_forward_leaves_the_average_alone():
    g = generator()
    g(torch.randn(4, 16))
    assert g.mapping.w_avg.abs().max() == 0


@pytest.mark.parametrize("half_dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_16_bit_blocks_stay_near_fp32_and_leave_8x8_upwards_only(half_dtype, tolerance):
    z, x = torch.randn(4, 16), torch.randn(4, 3, 32, 32)
    wide, narrow = generator(32), generator(32, num_fp16_res=10, half_dtype=half_dtype)
    assert [b.dtype for b in narrow.blocks().values()] == [torch.float32] + [half_dtype] * 3
    images = narrow(z, noise_mode="const")
    assert images.dtype == torch.float32
    expected = wide(z, noise_mode="const")
    assert (images - expected).abs().mean() < tolerance * expected.abs().mean()
    d_wide, d_narrow = discriminator(32), discriminator(32, num_fp16_res=2, half_dtype=half_dtype)
    assert [b.dtype for b in list(d_narrow.blocks().values())[:-1]] == [half_dtype] * 2 + [torch.float32]
    logits = d_narrow(x)
    assert logits.dtype == torch.float32
    assert (logits - d_wide(x)).abs().max() < 2 * tolerance


def test_fp16_normalisation_keeps_large_styles_finite():
    wide, narrow = generator(16), generator(16, num_fp16_res=2)
    for g in (wide, narrow):
        g.synthesis.b16.conv1.affine.bias.data.fill_(3e4)
        g.synthesis.b16.conv1.weight.data.mul_(3e3)
    z = torch.randn(2, 16)
    images, expected = narrow(z, noise_mode="none"), wide(z, noise_mode="none")
    assert images.isfinite().all()
    assert (images - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("num_fp16_res", [0, 2])
def test_every_parameter_gets_a_finite_gradient_in_every_phase(num_fp16_res):
    g, d = generator(c_dim=3, num_fp16_res=num_fp16_res), discriminator(c_dim=3, num_fp16_res=num_fp16_res)
    c, real = torch.eye(3)[[0, 1, 2, 0]], torch.randn(4, 3, 16, 16, requires_grad=True)
    loss = d(g(torch.randn(4, 16), c), c).sum()
    for grad in torch.autograd.grad(loss, [*g.parameters(), *d.parameters()]):
        assert grad.isfinite().all()
    penalty = r1_penalty(d(real, c), real).sum()
    names, parameters = zip(*d.named_parameters(), strict=True)
    grads = torch.autograd.grad(penalty, parameters, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert {n for n, grad in zip(names, grads, strict=True) if grad is not None} > {
        "b16.fromrgb.weight",
        "b4.fc.weight",
    }
    ws = g.mapping(torch.randn(2, 16), c[:2])
    images = g.synthesis(ws)
    lengths = path_lengths(images, ws, torch.randn_like(images))
    grads = torch.autograd.grad(lengths.sum(), list(g.mapping.parameters()) + list(g.synthesis.b8.conv0.parameters()))
    assert all(grad.isfinite().all() for grad in grads) and sum(grad.abs().sum() for grad in grads) > 0


def test_path_length_gradient_equals_finite_differences():
    """Through style, demodulation, both convolutions, noise, clamp and to-RGB: the whole second derivative at once."""
    g = generator(conv_clamp=2.0).double()
    ws = torch.randn(2, g.num_ws, 24, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    layer = g.synthesis.b16.conv0
    layer.noise_strength.data.fill_(0.3)
    for block in g.blocks().values():  # fp32 by design, but finite differences want more
        block.dtype = torch.float64

    def length():
        x = image = None
        for block in g.blocks().values():
            block_ws = ws.narrow(1, block.first_ws, block.num_convs + 1)
            x, image = block(x, image, block_ws, "const")
        return path_lengths(image, ws, noise).sum()

    for parameter in (layer.weight, layer.affine.weight, layer.noise_strength, layer.bias, g.synthesis.b8.conv1.weight):
        direction = torch.randn_like(parameter)
        (grad,) = torch.autograd.grad(length(), parameter)
        step, values = 1e-6, []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * step)
            values.append(length().item())
            parameter.data.add_(direction, alpha=-sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_minibatch_stddev_groups_strided_samples():
    x = torch.randn(8, 3, 4, 4)
    y = minibatch_stddev(x, 4)
    assert y.shape == (8, 4, 4, 4)
    for n in range(8):
        members = x[n % 2 :: 2]  # n is grouped with n + B / group, ...
        expected = (members.var(0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[n, 3], expected.expand(4, 4))
    torch.testing.assert_close(minibatch_stddev(x[:2], 4), minibatch_stddev(x[:2], 2))


def test_forward_keeps_one_tensor_a_layer():
    """The generator's activations for its backward: about one output per convolution (plain PyTorch: three to four)."""
    g = generator(64, channel_base=1024, channel_max=16)
    own = {p.untyped_storage().data_ptr() for p in [*g.parameters(), *g.buffers()]}
    kept, outputs = {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own and t.numel() > 4096:
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    for block in g.blocks().values():
        for name, layer in block.named_children():
            if name.startswith("conv"):
                layer.register_forward_hook(lambda m, args, out: outputs.append(out.nbytes))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        g(torch.randn(4, 16))
    assert sum(size for size, _ in kept.values()) < 1.2 * sum(outputs)


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"resolution": 48}, "resolution=48"),
        ({"resolution": 8}, "resolution=8"),
        ({"resolution": 2048}, "resolution=2048"),
        ({"resolution": 64, "channel_base": 32}, "channel_base=32"),
        ({"z_dim": 0}, "z_dim=0"),
        ({"c_dim": -1}, "c_dim=-1"),
        ({"num_fp16_res": -1}, "num_fp16_res=-1"),
        ({"half_dtype": torch.float32}, "half_dtype=torch.float32"),
        ({"conv_clamp": 0}, "conv_clamp=0"),
    ],
)
def test_values_that_make_no_generator_are_named(kwargs, named):
    with pytest.raises(LowVRAMError, match=named):
        generator(**kwargs)


def test_inputs_that_do_not_fit_are_named():
    g, d = generator(), discriminator()
    with pytest.raises(LowVRAMError, match=r"z has shape \(2, 15\)"):
        g(torch.randn(2, 15))
    with pytest.raises(LowVRAMError, match="no classes"):
        g(torch.randn(2, 16), torch.zeros(2, 3))
    with pytest.raises(LowVRAMError, match="c has shape None"):
        generator(c_dim=3)(torch.randn(2, 16))
    with pytest.raises(LowVRAMError, match="c has 3 rows"):
        generator(c_dim=3)(torch.randn(2, 16), torch.zeros(3, 3))
    with pytest.raises(LowVRAMError, match="noise_mode='constant'"):
        g(torch.randn(2, 16), noise_mode="constant")
    with pytest.raises(LowVRAMError, match="3 noise_seeds for a batch of 2"):
        g(torch.randn(2, 16), noise_seeds=torch.arange(3))
    with pytest.raises(LowVRAMError, match="images have shape"):
        d(torch.randn(2, 3, 32, 32))
    with pytest.raises(LowVRAMError, match=r"batch of 6 .* mbstd_group_size=4"):
        d(torch.randn(6, 3, 16, 16))
    with pytest.raises(LowVRAMError, match="mbstd_group_size=0"):
        discriminator(mbstd_group_size=0)
