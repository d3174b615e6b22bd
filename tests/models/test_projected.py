import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from lowvram.errors import LowVRAMError
from lowvram.models import backbones
from lowvram.models.projected import GroupedBatchNorm, Head, ProjectedDiscriminator, Projection, SpectralConv2d


@pytest.fixture(scope="module")
def backbone() -> backbones.Backbone:
    return backbones.make("efficientnet_lite0")


def images(n: int, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_maps_and_logits_have_the_sizes_that_they_tell(backbone: backbones.Backbone) -> None:
    projection = Projection(backbone, channels=8, size=64)
    maps = projection(images(2))
    assert [tuple(m.shape) for m in maps] == [
        (2, w, s, s) for w, s in zip(projection.widths, projection.sizes, strict=True)
    ]
    assert projection.widths == (8, 16, 32, 64)
    heads = ProjectedDiscriminator(projection.widths, projection.sizes, channels=32, group=2)
    assert [tuple(x.shape) for x in heads(maps)] == [(2, 4, 4), (2, 4, 4), (2, 4, 4), (2, 2, 2)]
    assert all(torch.equal(one, other) for one, other in zip(projection(images(2)), maps, strict=True))
    assert projection(images(2, 128))[0].shape == maps[0].shape  # shrunk
    grey = images(2)[:, :1]
    assert torch.equal(projection(grey)[1], projection(grey.expand(-1, 3, -1, -1))[1])


def test_coarse_maps_reach_fine_ones_and_variance_stays(backbone: backbones.Backbone) -> None:
    torch.manual_seed(0)
    projection = Projection(backbone, channels=32, size=64)
    with torch.no_grad():
        before = [m.std() for m in projection(images(8))]
        projection.across_channels[-1].weight.mul_(3)  # type: ignore[operator]
        after = [m.std() for m in projection(images(8))]
    assert all(b > a for a, b in zip(before, after, strict=True))
    assert all(0.3 < a / before[1] < 3 for a in before[:-1])


def test_only_heads_are_trained_and_gradients_reach_the_image(backbone: backbones.Backbone) -> None:
    projection = Projection(backbone, channels=8, size=64)
    heads = ProjectedDiscriminator(projection.widths, projection.sizes, channels=16, group=0)
    assert not any(p.requires_grad for p in projection.parameters())
    assert not {id(p) for p in backbone.parameters()} & {id(p) for p in projection.parameters()}
    x = images(2).requires_grad_(True)
    sum(logits.mean() for logits in heads(projection(x))).backward()
    assert x.grad is not None
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters())
    assert all(p.grad is None for p in (*projection.parameters(), *backbone.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.15), (torch.bfloat16, 0.4)])
def test_gradients_survive_16_bit(dtype: torch.dtype, tolerance: float) -> None:
    def gradient(half: torch.dtype | None) -> Tensor:
        torch.manual_seed(0)
        projection = Projection(backbones.make("efficientnet_lite0"), channels=8, size=64, half_dtype=half)
        heads = ProjectedDiscriminator(projection.widths, projection.sizes, channels=16, group=0)
        x = images(2).requires_grad_(True)
        maps = projection(x)
        assert all(m.dtype == torch.float32 for m in maps)
        (1e-5 * sum(logits.mean() for logits in heads(maps))).backward()  # as of a large batch
        assert x.grad is not None
        return x.grad

    wanted = gradient(None)
    assert (gradient(dtype) - wanted).norm() < tolerance * wanted.norm()


def test_spectral_norm_is_torch_s_and_moves_once_an_update() -> None:
    torch.manual_seed(0)
    ours = SpectralConv2d(6, 10, 3, padding=1)
    theirs = spectral_norm(nn.Conv2d(6, 10, 3, padding=1), n_power_iterations=200)
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(ours.weight)  # type: ignore[union-attr, operator]
        assert theirs.bias is not None and ours.bias is not None
        theirs.bias.copy_(ours.bias)
    x = torch.randn(2, 6, 8, 8)
    for _ in range(60):
        ours(x)
        ours.keep_vectors()
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    with torch.no_grad():
        ours.weight += torch.randn_like(ours.weight)
    before, first = ours.left.clone(), ours(x)
    assert torch.equal(ours.left, before)
    assert torch.equal(ours(x), first)  # also redone
    ours.keep_vectors()
    ours.keep_vectors()
    assert not torch.equal(ours.left, before)
    assert not torch.equal(ours(x), first)


def test_a_fifth_map_is_of_colours_and_of_how_they_differ(backbone: backbones.Backbone) -> None:
    projection = Projection(backbone, channels=8, size=64, pixels=8, group=4)
    assert (projection.widths, projection.sizes) == ((8, 16, 32, 64, 8), (16, 8, 4, 2, 8))
    assert projection.of_pixels is not None
    x = images(8)
    seen: list[Tensor] = []
    projection.of_pixels.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    whole = projection(x)[-1]
    assert tuple(whole.shape) == (8, 8, 8, 8)
    small, spread = seen[0].split(3, dim=1)
    torch.testing.assert_close(small, F.avg_pool2d(x, 4))
    of_evens = small[::2].std(0, correction=0)  # samples n, n + B / group, ...
    torch.testing.assert_close(spread[0], 2 * of_evens, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(spread[0], spread[6])
    # The same in a micro-batch that a phase cuts, and none where all are alike.
    torch.testing.assert_close(projection(x[1::2])[-1], whole[1::2])
    projection(x[:1].expand(4, -1, -1, -1))
    assert seen[-1][:, 3:].max() < 0.03
    with pytest.raises(LowVRAMError, match="groups of 4"):
        projection(images(6))


def test_a_fifth_map_without_groups_is_the_image_alone(backbone: backbones.Backbone) -> None:
    projection = Projection(backbone, channels=8, size=64, pixels=32, half_dtype=torch.bfloat16)
    x = images(3)
    fifth = projection(x)[-1]
    assert fifth.dtype == torch.float32
    torch.testing.assert_close(projection(x[:1])[-1], fifth[:1])
    assert projection.of_pixels is not None
    torch.testing.assert_close(fifth, F.conv2d(x, projection.of_pixels.weight))  # type: ignore[arg-type]


def test_the_head_of_pixels_sees_how_much_they_differ_which_normalised_ones_do_not() -> None:
    torch.manual_seed(0)
    heads = ProjectedDiscriminator((8, 8), (8, 8), channels=16, group=4, of_features=1)
    maps = torch.randn(8, 8, 8, 8)
    normalised, free = heads([maps, maps])
    weaker = heads([maps / 3, maps / 3])
    torch.testing.assert_close(weaker[0], normalised, atol=1e-3, rtol=1e-3)
    assert (weaker[1] - free).abs().mean() > 0.1 * free.abs().mean()
    torch.testing.assert_close(heads([maps[1::2]] * 2)[1], free[1::2])  # in any micro-batch


def test_groups_are_normalised_as_batches_and_in_any_micro_batch() -> None:
    norm = GroupedBatchNorm(5, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(4, 5, 3, 3) * 3 + 1
    assert torch.allclose(norm(x), F.batch_norm(x, None, None, norm.weight, norm.bias, training=True), atol=1e-5)
    batch = torch.randn(8, 5, 3, 3)  # samples n and n + 2, n + 4, n + 6 belong together
    parts = [batch[i::2] for i in range(2)]
    whole = norm(batch)
    for i, part in enumerate(parts):
        assert torch.allclose(whole[i::2], norm(part), atol=1e-6)


def test_classes_are_judged_by_a_product() -> None:
    torch.manual_seed(0)
    head = Head(8, 8, channels=16, group=0, c_dim=3)
    x = torch.randn(2, 8, 8, 8)
    one, other = (head(x, F.one_hot(torch.tensor([c, c]), 3).float()) for c in (0, 2))
    difference = one - other
    assert not torch.allclose(one, other)
    assert head(x).shape == difference.shape


def test_what_makes_no_projection_is_refused(backbone: backbones.Backbone) -> None:
    with pytest.raises(LowVRAMError, match="100 pixels"):
        Projection(backbone, size=100)
    with pytest.raises(LowVRAMError, match="4 channels"):
        Projection(backbone, channels=4)
