"""R3GAN's networks: shapes, both derivatives, how they begin, and that a sample's numbers are its own."""

import pytest
import torch

from lowvram import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.models.r3gan import Discriminator, Generator
from lowvram.objectives.adversarial import r1_penalty

SHAPE = {"widths": [16, 8, 8], "blocks": [2, 1, 1], "groups": [4, 2, 2]}


def pair(resolution: int = 16, c_dim: int = 0, **changes: object) -> tuple[Generator, Discriminator]:
    """Networks with the last layers of their blocks drawn too, so that gradients reach everything."""
    torch.manual_seed(0)
    shape = {**SHAPE, **changes, "c_dim": c_dim, "embed_dim": 6}
    networks = Generator(resolution, z_dim=5, **shape), Discriminator(resolution, **shape)
    for network in networks:
        for name, parameter in network.named_parameters():
            if "weight2" in name or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return networks


def in_fp64(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.double().modules():
        if hasattr(module, "dtype"):
            module.dtype = torch.float64
    return network


def onehot(*classes: int, of: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), of).float()


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(c_dim: int, half: torch.dtype | None) -> None:
    precision = {} if half is None else {"num_fp16_res": 9, "half_dtype": half}
    g, d = pair(32, c_dim, widths=[16, 8, 8, 4], blocks=[1, 2, 1, 1], groups=[4, 2, 2, 1], **precision)
    c = onehot(0, 2) if c_dim else None
    ws = g.mapping(torch.randn(2, 5), c)
    assert ws.shape == (2, 11 if c_dim else 5)
    images = g.synthesis(ws, noise_mode="none")
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.float32)
    logits = d(images, c)
    assert (logits.shape, logits.dtype) == ((2, 1), torch.float32)
    for network, names in (
        (g, ["synthesis.b4_0", "synthesis.b8_0", "synthesis.b8_1", "synthesis.b16_0", "synthesis.b32_0"]),
        (d, ["b32_0", "b16_0", "b8_0", "b8_1", "b4_0"]),
    ):
        blocks = find_blocks(network)
        assert list(blocks) == names
        dtypes = [block.dtype for name, block in blocks.items() if "b4_" not in name]
        assert dtypes == [half or torch.float32] * 4
        assert [block.dtype for name, block in blocks.items() if "b4_" in name] == [torch.float32]


def test_images_in_16_bit_are_near_those_in_32() -> None:
    plain, half = pair()[0], pair(num_fp16_res=2, half_dtype=torch.bfloat16)[0]
    z = torch.randn(4, 5)
    difference = plain(z) - half(z)
    assert 0 < difference.abs().mean() < 0.02 * plain(z).std()


@pytest.mark.parametrize("c_dim", [0, 3])
def test_both_derivatives_of_the_discriminator(c_dim: int) -> None:
    """By the image and by the weights, as R1 and R2 ask for them."""
    d = in_fp64(pair(c_dim=c_dim, widths=[8, 4, 4], blocks=[1, 1, 1], groups=[2, 2, 1])[1])
    c = onehot(1, 2).double() if c_dim else None
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    parameters = tuple(d.parameters())

    def f(images: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return d(images, c)

    assert torch.autograd.gradcheck(f, (images, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (images, *parameters), fast_mode=True)

    def penalty(*_: torch.Tensor) -> torch.Tensor:
        x = images.detach().requires_grad_()
        return r1_penalty(d(x, c), x)

    # (A class's embedding that no label names has no gradient, and a bias has none at the second order.)
    steep = tuple(p for name, p in d.named_parameters() if "bias" not in name)
    assert torch.autograd.gradcheck(penalty, steep, fast_mode=True)


def test_the_derivatives_of_the_generator() -> None:
    g = in_fp64(pair(c_dim=3, widths=[8, 4, 4], blocks=[1, 1, 1], groups=[2, 2, 1])[0])
    z, c = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), onehot(0, 1).double()
    inputs = (z, *g.parameters())
    assert torch.autograd.gradcheck(lambda z, *_: g(z, c), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda z, *_: g(z, c), inputs, fast_mode=True)


def test_blocks_begin_as_the_identity_and_keep_the_variance() -> None:
    torch.manual_seed(0)
    widths, blocks, groups = [64, 64, 48, 32, 32], [2, 2, 2, 2, 2], [8, 8, 6, 4, 4]
    g, d = Generator(64, widths, blocks, groups), Discriminator(64, widths, blocks, groups)
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(g.synthesis.b4_1(x), x)  # neither resampling nor residual
    inner = g.synthesis.b4_1
    active = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x, inner.weight0), 0.2).detach()
    expected = sum(blocks) ** -0.25  # Fix-up's share of the usual size
    assert float(active.square().mean().sqrt()) == pytest.approx(expected, rel=0.15)
    sizes = []
    for network, run in ((g, lambda: g(torch.randn(8, 64))), (d, lambda: d(torch.randn(8, 3, 64, 64)))):
        for block in network.blocks().values():
            block.register_forward_hook(lambda _, __, out: sizes.append(out.detach().square().mean().sqrt().item()))
        run()
    assert len(sizes) == 20
    # Noise loses by being smoothed at each of four halvings; a smooth image, the generator's, loses little.
    assert all(0.5 < size < 1.5 for size in sizes[:10])
    assert all(sizes[i] == pytest.approx(sizes[i + 1]) for i in range(0, 9, 2))  # depth changes nothing
    assert all(sizes[i] > 0.2 * sizes[i - 1] for i in range(11, 20))


def test_resampling_is_bilinear_and_takes_constants_to_constants() -> None:
    g, d = pair()
    up, down = g.synthesis.b16_0, d.b8_0  # 8 to 8 channels, and 8 to 16
    for parameter in (up.weight2, down.weight2):
        torch.nn.init.zeros_(parameter)
    ramp = torch.arange(8.0).expand(1, 8, 8, 8)
    wide = up(ramp)[0, 0, 3]
    torch.testing.assert_close(wide[:15], torch.arange(15.0) / 2)  # between neighbours, the mean of them
    assert down.resample == "down"
    small = down(torch.ones(1, 8, 8, 8))[0, :, 1:, 1:]
    torch.testing.assert_close(small, small[:, :1, :1].expand_as(small))


@pytest.mark.parametrize("c_dim", [0, 3])
def test_a_sample_does_not_depend_on_its_batch(c_dim: int) -> None:
    g, d = pair(c_dim=c_dim)
    z, c = torch.randn(5, 5), onehot(0, 1, 2, 0, 1) if c_dim else None
    images = g(z, c)
    logits = d(images, c)
    alone = [g(z[i : i + 1], None if c is None else c[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), images, atol=1e-5, rtol=1e-4)
    one_by_one = [d(images[i : i + 1], None if c is None else c[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(one_by_one), logits, atol=1e-5, rtol=1e-4)


def test_classes_make_a_difference_to_both() -> None:
    g, d = pair(c_dim=3)
    z = torch.randn(1, 5).expand(2, 5)
    images = g(z, onehot(0, 1))
    assert (images[0] - images[1]).abs().max() > 0.01
    logits = d(images[:1].expand(2, -1, -1, -1), onehot(0, 1))
    assert (logits[0] - logits[1]).abs() > 1e-4


def test_keeps_no_more_than_it_must() -> None:
    """Of a block: its input and two activations. What weights and biases take is theirs."""
    block = pair(widths=[16, 16, 16], blocks=[2, 1, 1], groups=[4, 4, 4])[0].synthesis.b4_1
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    x = torch.randn(8, 16, 4, 4, requires_grad=True) * 1
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    # x, and twice `expansion` times that; and the 3x3 weights in the layout of x.
    assert sum(kept.values()) <= 5 * x.nbytes + block.weight1.nbytes


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"widths": [16, 8]}, ("model.widths=[16, 8]", "resolution=16", "3 stages")),
        ({"groups": [4, 3, 2]}, ("model.groups=[4, 3, 2]: 3 does not divide the 16", "Use 2")),
        ({"blocks": [2, 0, 1]}, ("model.blocks=0",)),
        ({"expansion": 0}, ("model.expansion=0",)),
        ({"half_dtype": torch.float32}, ("torch.float32",)),
    ],
)
def test_shapes_that_make_no_network_are_refused(changes: dict[str, object], names: tuple[str, ...]) -> None:
    for kind in (Generator, Discriminator):
        with pytest.raises(LowVRAMError) as error:
            kind(16, **{**SHAPE, **changes})
        for name in names:
            assert name in str(error.value)


def test_arguments_that_do_not_fit_are_refused() -> None:
    g, d = pair()
    with pytest.raises(LowVRAMError, match=r"truncation_psi=0\.5"):
        g.mapping(torch.randn(1, 5), None, truncation_psi=0.5)
    with pytest.raises(LowVRAMError, match=r"z has shape \(1, 4\)"):
        g(torch.randn(1, 4))
    with pytest.raises(LowVRAMError, match="no classes"):
        g(torch.randn(1, 5), onehot(1))
    with pytest.raises(LowVRAMError, match=r"\(1, 3, 8, 8\)"):
        d(torch.randn(1, 3, 8, 8))
    g, d = pair(c_dim=3)
    with pytest.raises(LowVRAMError, match=r"not \[B, 3\]"):
        d(torch.randn(1, 3, 16, 16))
    with pytest.raises(LowVRAMError, match="2 rows for 1 rows"):
        g(torch.randn(1, 5), onehot(1, 2))
