import copy
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from lowvram.errors import LowVRAMError
from lowvram.models.augment import (
    PIPELINES,
    Augmentations,
    AugmentPipe,
    _Draws,
    adapt,
    band_gains,
    general_matrix,
    whole_shift,
)

SIZE = 16


def only(p: float = 1.0, **fields: float) -> AugmentPipe:
    """A pipeline of the given transformations alone."""
    pipe = AugmentPipe(Augmentations(**fields))
    pipe.set_probability(p)
    return pipe


def named(name: str, p: float = 1.0) -> AugmentPipe:
    pipe = AugmentPipe.from_name(name)
    pipe.set_probability(p)
    return pipe


def noise_images(batch: int, channels: int = 3, size: int = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


# --- The probability ---


@pytest.mark.parametrize("name", PIPELINES)
def test_with_p_0_the_images_come_back_untouched_and_with_p_1_they_change(name: str) -> None:
    images = noise_images(4)
    pipe = AugmentPipe.from_name(name)
    assert pipe(images) is images
    pipe.set_probability(1.0)
    out = pipe(images, torch.arange(4))
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert not torch.equal(out, images)
    assert out.isfinite().all()


def test_a_tiny_p_changes_nothing_beyond_rounding() -> None:
    images = noise_images(4, size=32)
    torch.testing.assert_close(named("bgcfnc", 1e-12)(images, torch.arange(4)), images, rtol=0, atol=3e-5)


def test_p_is_a_buffer_and_any_way_of_writing_it_counts() -> None:
    pipe = AugmentPipe.from_name("bgc")
    assert list(pipe.state_dict()) == ["p"]
    assert pipe.p.dtype == torch.float32
    assert pipe.p.shape == ()
    pipe.set_probability(0.25)
    assert (pipe.probability(), pipe.p.item()) == (0.25, 0.25)
    pipe.p.fill_(0.5)
    assert pipe.probability() == 0.5
    pipe.load_state_dict({"p": torch.tensor(0.75)})
    assert pipe.probability() == 0.75
    other = copy.deepcopy(pipe)
    other.p.zero_()
    assert (other.probability(), pipe.probability()) == (0.0, 0.75)
    with pytest.raises(LowVRAMError, match=r"p=34 is outside"):
        pipe.set_probability(34)


@pytest.mark.parametrize(
    ("fields", "share"), [({"x_flip": 1.0}, 0.25), ({"x_flip": 0.5}, 0.125), ({"cutout": 1.0}, 0.5)]
)
def test_each_image_is_transformed_with_probability_p(fields: dict[str, float], share: float) -> None:
    """At p = 0.5; applied mirroring draws a fair coin, so it mirrors half of those to which it is applied."""
    images = noise_images(1, 1, 8).expand(2000, -1, -1, -1)
    changed = (only(0.5, **fields)(images, torch.arange(2000)) != images).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(share, abs=4 * math.sqrt(share / 2000))


def test_an_image_is_turned_with_probability_p_though_two_rotations_are_drawn() -> None:
    images = noise_images(1, 1, 8).expand(1000, -1, -1, -1)
    out = only(0.5, rotation=1.0)(images, torch.arange(1000))
    changed = ((out - images).abs() > 1e-3).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.5, abs=0.06)


def test_adapt_moves_towards_the_target_by_a_fixed_step_and_stays_in_bounds() -> None:
    assert adapt(0.3, 0.7, 0.6, images=64, adjust_kimg=500) == pytest.approx(0.3 + 64 / 500_000)
    assert adapt(0.3, 0.5, 0.6, images=64, adjust_kimg=500) == pytest.approx(0.3 - 64 / 500_000)
    assert adapt(0.3, 0.6, 0.6, images=64) == 0.3
    assert adapt(0.3, math.nan, 0.6, images=64) == 0.3
    assert adapt(0.0, -1.0, images=64) == 0.0
    assert adapt(1.0, 1.0, images=64) == 1.0
    assert adapt(34.0, 1.0, images=64) == 1.0
    p = 0.0
    for _ in range(500_000 // 1000):
        p = adapt(p, 1.0, images=1000, adjust_kimg=500)
    assert p == pytest.approx(1.0)
    with pytest.raises(LowVRAMError, match="adjust_kimg=0 must be positive"):
        adapt(0.3, 0.7, images=64, adjust_kimg=0)


# --- Random numbers belong to the image ---


@pytest.mark.parametrize("name", ["bgcfnc", "blit"])
def test_an_image_does_not_depend_on_the_batch_around_it(name: str) -> None:
    images, seeds = noise_images(6), torch.tensor([3, 14, 15, 92, 65, 35])
    pipe = named(name, 0.8)
    whole = pipe(images, seeds)
    parts = torch.cat([pipe(images[:1], seeds[:1]), pipe(images[1:4], seeds[1:4]), pipe(images[4:], seeds[4:])])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipe(images.flip(0), seeds.flip(0)).flip(0), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pipe(images, seeds, stream="other"), whole)
    assert torch.equal(pipe(images, seeds), whole)


def test_without_seeds_the_default_generator_draws() -> None:
    images, pipe = noise_images(3), named("bgc")
    torch.manual_seed(5)
    first, second = pipe(images), pipe(images)
    torch.manual_seed(5)
    assert torch.equal(pipe(images), first)
    assert not torch.allclose(first, second)


def test_switching_one_transformation_on_changes_no_others_numbers() -> None:
    images, seeds = noise_images(8), torch.arange(8)
    both, brightness = only(brightness=1.0, cutout=1.0)(images, seeds), only(brightness=1.0)(images, seeds)
    kept = both != 0
    assert torch.equal(both[kept], brightness[kept])


# --- Derivatives ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["blit", "geom", "color", "filter", "noise", "cutout", "bgcfnc"])
def test_first_and_second_derivatives(name: str, channels: int) -> None:
    images = noise_images(2, channels, 4, torch.float64).requires_grad_()
    pipe, seeds = named(name), torch.tensor([1, 2])
    assert gradcheck(lambda x: pipe(x, seeds), images)
    assert gradgradcheck(lambda x: pipe(x, seeds), images)


@pytest.mark.parametrize("name", ["blit", "geom", "color", "filter"])
def test_the_gradient_is_the_transpose_at_a_size_where_all_taps_fit(name: str) -> None:
    pipe, seeds = named(name), torch.tensor([4, 5])
    x, y = noise_images(2, size=48, dtype=torch.float64), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    x.requires_grad_()
    linear = pipe(x, seeds) - pipe(torch.zeros_like(x), seeds)
    (back,) = torch.autograd.grad(linear, x, y)
    torch.testing.assert_close((linear * y).sum(), (x * back).sum())


def test_a_gradient_penalty_reaches_the_weights_of_a_discriminator_behind_it() -> None:
    """What R1 does: the second derivative with respect to a weight, against the finite difference of the first."""
    torch.manual_seed(0)
    images = noise_images(2, size=8, dtype=torch.float64).requires_grad_()
    pipe, seeds = named("bgcfnc"), torch.tensor([1, 2])
    weight = torch.randn(3, 8, 8, dtype=torch.float64)

    def penalty(w: Tensor) -> Tensor:
        logits = (pipe(images, seeds) * w).sum((1, 2, 3)).tanh()
        return torch.autograd.grad(logits.sum(), images, create_graph=True)[0].square().sum()

    assert gradcheck(penalty, weight.requires_grad_())


def test_geometry_colour_and_filtering_save_a_few_numbers_an_image() -> None:
    images = noise_images(4, size=64).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        named("bgcf")(images, torch.arange(4))
    assert sum(saved) < 0.02 * images.numel()


# --- Blitting ---


def test_mirroring_is_torch_flip() -> None:
    images = noise_images(32)
    out = only(x_flip=1.0)(images, torch.arange(32))
    flipped = (out == images.flip(3)).flatten(1).all(1)
    same = (out == images).flatten(1).all(1)
    assert (flipped ^ same).all()
    assert 8 <= flipped.sum() <= 24


def test_turning_by_90_degrees_is_torch_rot90() -> None:
    images = noise_images(64)
    out = only(rotate_90=1.0)(images, torch.arange(64))
    counts = [sum(torch.equal(o, i.rot90(k, (1, 2))) for o, i in zip(out, images, strict=True)) for k in range(4)]
    assert sum(counts) == 64
    assert min(counts) >= 6


def test_whole_pixel_shifts_copy_pixels_and_reflect_at_the_edge() -> None:
    images = noise_images(32, size=32)
    out = only(integer_translation=1.0)(images, torch.arange(32))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    shifts = {(dy, dx) for dy in range(9) for dx in range(9)}  # an eighth of 32 pixels, either way
    seen = []
    for o, wide in zip(out, padded, strict=True):
        seen += [(dy, dx) for dy, dx in shifts if torch.equal(o, wide[:, dy : dy + 32, dx : dx + 32])]
    assert len(seen) == 32
    assert len(set(seen)) > 16


# --- General geometry ---


@pytest.mark.parametrize(
    "fields",
    [
        {"isotropic_scale": 1.0, "isotropic_scale_std": 2.0},
        {"rotation": 1.0},
        {"anisotropic_scale": 1.0, "anisotropic_scale_std": 2.0},
        {"fractional_translation": 1.0, "fractional_translation_std": 3.0},
    ],
)
def test_geometry_leaves_no_border(fields: dict[str, float]) -> None:
    images = torch.full((64, 3, 24, 24), 0.75)
    torch.testing.assert_close(only(**fields)(images, torch.arange(64)), images, rtol=0, atol=1e-5)


def test_strengths_of_the_geometry_are_those_of_the_paper() -> None:
    def matrices(**fields: float) -> Tensor:
        draws = _Draws(torch.arange(1000), "augment", 1000, 1.0)
        return general_matrix(Augmentations(**fields), draws, 40, 80).inverse()  # from source to output

    scales = matrices(isotropic_scale=1.0)[:, 0, 0].log2()
    assert (scales.mean().item(), scales.std().item()) == pytest.approx((0, 0.2), abs=0.02)
    stretched = matrices(anisotropic_scale=1.0)
    torch.testing.assert_close(stretched[:, 0, 0] * stretched[:, 1, 1], torch.ones(1000, dtype=torch.float64))
    assert stretched[:, 0, 0].log2().std().item() == pytest.approx(0.2, abs=0.02)
    shifts = matrices(fractional_translation=1.0)[:, :2, 2]
    assert shifts.std(0).tolist() == pytest.approx([10, 5], rel=0.1)
    turns = matrices(rotation=1.0)
    angles = torch.atan2(turns[:, 1, 0], turns[:, 0, 0])
    assert angles.abs().mean().item() == pytest.approx(math.pi / 2, abs=0.1)
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3, dtype=torch.float64).expand(1000, 3, 3))
    whole = only(integer_translation=1.0).augmentations
    x, y = whole_shift(whole, _Draws(torch.arange(1000), "augment", 1000, 1.0), 40, 80)
    assert (x.abs().max(), y.abs().max()) == (10, 5)
    assert x.abs().mean().item() == pytest.approx(5, abs=0.4)


def test_a_whole_pixel_shift_is_the_same_whether_copied_or_part_of_a_general_transformation() -> None:
    images, seeds = noise_images(16, size=32, dtype=torch.float64), torch.arange(16)
    copied = only(x_flip=1.0, rotate_90=1.0, integer_translation=1.0)(images, seeds)
    warped = only(x_flip=1.0, rotate_90=1.0, integer_translation=1.0, rotation=1.0, rotation_max=0.0)(images, seeds)
    inner = (..., slice(4, -4), slice(4, -4))  # what no shift brings in from beyond the edge
    torch.testing.assert_close(warped[inner], copied[inner], rtol=0, atol=1e-10)


# --- Colour ---


def test_colour_keeps_what_each_transformation_keeps() -> None:
    images, seeds = noise_images(32, dtype=torch.float64), torch.arange(32)
    luma = images.mean(1, keepdim=True)
    chroma = (images - luma).norm(dim=1)

    def parts(**fields: float) -> tuple[Tensor, Tensor, Tensor]:
        out = only(**fields)(images, seeds)
        out_luma = out.mean(1, keepdim=True)
        return out, out_luma, (out - out_luma).norm(dim=1)

    out, _, _ = parts(brightness=1.0)
    offsets = (out - images).flatten(1)
    torch.testing.assert_close(offsets, offsets[:, :1].expand_as(offsets), rtol=1e-5, atol=1e-6)
    assert offsets[:, 0].std().item() == pytest.approx(0.2, abs=0.08)

    out, _, _ = parts(contrast=1.0)
    factors = (out / images).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert factors[:, 0].log2().std().item() == pytest.approx(0.5, abs=0.2)

    out, out_luma, out_chroma = parts(luma_flip=1.0)
    flipped = out_luma[:, 0, 0, 0] * luma[:, 0, 0, 0] < 0
    assert 8 <= flipped.sum() <= 24
    torch.testing.assert_close(out_luma[flipped], -luma[flipped])
    torch.testing.assert_close((out - out_luma)[flipped], (images - luma)[flipped])

    out, out_luma, out_chroma = parts(hue=1.0)
    torch.testing.assert_close(out_luma, luma)
    torch.testing.assert_close(out_chroma, chroma)
    assert ((out - images).abs().amax((1, 2, 3)) > 0.1).float().mean() > 0.8

    out, out_luma, out_chroma = parts(saturation=1.0)
    torch.testing.assert_close(out_luma, luma)
    factors = ((out - out_luma) / (images - luma)).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert factors[:, 0].log2().std().item() == pytest.approx(1.0, abs=0.4)
    grey, _, _ = parts(saturation=1.0, saturation_std=0.0)
    torch.testing.assert_close(grey, images)


def test_brightness_comes_before_contrast_and_the_luma_flip() -> None:
    black, seeds = torch.zeros(32, 3, 2, 2), torch.arange(32)
    fields = {"contrast": 1.0, "luma_flip": 1.0}
    shifted = only(brightness=1.0)(black, seeds)
    torch.testing.assert_close(only(brightness=1.0, **fields)(black, seeds), only(**fields)(shifted, seeds))


def test_a_turn_of_the_hue_by_a_third_swaps_the_channels() -> None:
    """Among many draws one is near 120 degrees: red becomes green or blue."""
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(512, -1, 2, 2)
    out = only(hue=1.0)(red, torch.arange(512))[:, :, 0, 0]
    for channel in range(3):
        assert (out - torch.eye(3)[channel]).norm(dim=1).min() < 0.05
    torch.testing.assert_close(out.sum(1), torch.ones(512))


def test_a_grey_image_is_treated_as_equal_rgb() -> None:
    grey, seeds = noise_images(8, 1), torch.arange(8)
    pipe = named("color")
    torch.testing.assert_close(pipe(grey, seeds), pipe(grey.expand(-1, 3, -1, -1), seeds).mean(1, keepdim=True))
    torch.testing.assert_close(only(hue=1.0, saturation=1.0)(grey, seeds), grey)


# --- Filtering, noise, cutout ---


def test_filtering_amplifies_a_band_and_keeps_a_natural_images_power() -> None:
    pipe = only(image_filter=1.0)
    flat = torch.ones(256, 1, 8, 8)
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(256, 1, 32, 32)  # the highest frequency, along x
    seeds = torch.arange(256)
    low = pipe(flat, seeds)[:, 0, 4, 4]  # gain of band 1, squared: along x and along y
    high = pipe(stripes, seeds)[:, 0, 16, 16] / low.sqrt()  # gain of band 4
    assert low.log2().std() > 0.1
    assert high.log2().std() > 0.5
    torch.testing.assert_close(only(image_filter=1.0, image_filter_std=0.0)(stripes, seeds), stripes)
    gains = band_gains(pipe.augmentations, _Draws(seeds, "augment", 256, 1.0))
    torch.testing.assert_close(gains[:, 0].float() ** 2, low, rtol=1e-4, atol=1e-4)
    draws = _Draws(seeds, "augment", 256, 0.1)
    gains = band_gains(pipe.augmentations, draws)
    chosen = torch.stack([draws.chosen(f"band{band}?", 1.0) for band in range(4)]).sum(0)
    torch.testing.assert_close(gains[chosen == 0], torch.ones_like(gains[chosen == 0]))
    alone = gains[chosen == 1]
    assert 40 < len(alone) < 110
    power = (alone.square() * torch.tensor([10, 1, 1, 1]) / 13).sum(1)
    torch.testing.assert_close(power, torch.ones_like(power))


def test_noise_is_white_with_a_half_normal_sigma() -> None:
    images = torch.zeros(400, 3, SIZE, SIZE)
    out = only(noise=1.0)(images, torch.arange(400))
    sigma = out.std((1, 2, 3))
    assert sigma.mean().item() == pytest.approx(0.1 * math.sqrt(2 / math.pi), abs=0.01)
    assert sigma.square().mean().sqrt().item() == pytest.approx(0.1, abs=0.012)
    white = out / sigma[:, None, None, None]
    assert (white[..., 1:] * white[..., :-1]).mean().abs() < 0.01
    assert (white[:, 0] * white[:, 1]).mean().abs() < 0.01
    doubled = only(noise=1.0, noise_std=0.2)(images, torch.arange(400))
    torch.testing.assert_close(doubled, out * 2)


def test_cutout_clears_a_rectangle_of_half_the_size_around_a_uniform_centre() -> None:
    images = torch.ones(512, 3, 32, 32)
    hole = only(cutout=1.0)(images, torch.arange(512)) == 0
    assert (hole == hole[:, :1]).all()
    rows, columns = hole[:, 0].any(2).sum(1), hole[:, 0].any(1).sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), rows * columns)  # a full rectangle
    assert (rows.max(), columns.max()) == (16, 16)
    assert rows.min() <= 10  # half of it outside
    assert (rows == 16).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert hole.float().mean((0, 1))[16, 16].item() == pytest.approx(0.25, abs=0.06)
    small = only(cutout=1.0, cutout_size=0.25)(images, torch.arange(512)) == 0
    assert small[:, 0].any(2).sum(1).max() == 8


# --- Settings, dtypes, errors ---


def test_names() -> None:
    assert AugmentPipe.from_name("bgc").augmentations.hue == 1.0
    assert AugmentPipe.from_name("bgc").augmentations.noise == 0.0
    assert AugmentPipe.from_name("bg", rotation=0.5, rotation_max=0.1).augmentations.rotation == 0.5
    with pytest.raises(LowVRAMError, match='"colour" is unknown') as error:
        AugmentPipe.from_name("colour")
    assert '"color"' in error.value.remedy


def test_wrong_values_and_shapes_are_named() -> None:
    with pytest.raises(LowVRAMError, match=r"x_flip=1.5"):
        Augmentations(x_flip=1.5)
    with pytest.raises(LowVRAMError, match=r"noise_std=-1"):
        Augmentations(noise_std=-1)
    with pytest.raises(LowVRAMError, match="4 channels"):
        named("color")(torch.zeros(2, 4, 8, 8))
    with pytest.raises(LowVRAMError, match="8x6 pixels"):
        named("blit")(torch.zeros(2, 3, 6, 8))
    assert only(x_flip=1.0, rotation=1.0)(torch.zeros(2, 4, 6, 8)).shape == (2, 4, 6, 8)


def test_half_precision_and_autocast_lose_nothing_inside() -> None:
    images, seeds = noise_images(4), torch.arange(4)
    pipe = named("bgcf")
    full = pipe(images, seeds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pipe(images, seeds), full)
    half = pipe(images.bfloat16(), seeds)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), pipe(images.bfloat16().float(), seeds), rtol=1e-2, atol=1e-2)


def test_it_can_be_traced_without_numbers() -> None:
    with FakeTensorMode():
        pipe = AugmentPipe.from_name("bgcfnc")
        images = torch.empty(2, 3, 16, 16, requires_grad=True)
        out = pipe(images)
        (grad,) = torch.autograd.grad(out.sum(), images)
    assert out is not images  # as with p = 1
    assert grad.shape == (2, 3, 16, 16)
    meta = AugmentPipe.from_name("bgcfnc").to("meta")(torch.empty(2, 3, 16, 16, device="meta"))
    assert meta.shape == (2, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_transforms_as_the_cpu_does() -> None:
    images, seeds = noise_images(4), torch.arange(4)
    pipe = named("bgcf")
    expected = pipe(images, seeds)
    torch.testing.assert_close(pipe.cuda()(images.cuda(), seeds).cpu(), expected, rtol=1e-4, atol=1e-4)
