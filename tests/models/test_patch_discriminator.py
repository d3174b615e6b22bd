import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.models.patch_discriminator import PatchDiscriminator


def images_of(batch: int, height: int = 32, width: int = 40) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_papers_size(layers: int, field: int) -> None:
    """70x70 with three layers, 16x16 with one (section 3.2.2). Without norms, which see the whole image."""
    model = PatchDiscriminator(channels=4, layers=layers).double()
    for layer in model.layers:
        layer.norm = None
    images = images_of(1, 128, 128).double().requires_grad_()
    logits = model(images)
    middle = logits.shape[-1] // 2
    (grad,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    seen = grad[0].abs().sum(0) > 0
    assert (seen.any(0).sum().item(), seen.any(1).sum().item()) == (field, field)


@pytest.mark.parametrize(
    ("size", "layers", "logits"), [((32, 40), 2, (6, 8)), ((64, 64), 3, (6, 6)), ((25, 24), 3, (1, 1))]
)
def test_shapes(size: tuple[int, int], layers: int, logits: tuple[int, int]) -> None:
    assert PatchDiscriminator(channels=8, layers=layers)(images_of(2, *size)).shape == (2, 1, *logits)


def test_the_papers_widths_and_initialisation() -> None:
    model = PatchDiscriminator(layers=4)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 512, 1]
    assert [conv.stride[0] for conv in convs] == [2, 2, 2, 2, 1, 1]
    assert all(conv.kernel_size == (4, 4) for conv in convs)
    assert convs[3].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert [layer.norm is None for layer in model.layers] == [True, False, False, False, False]


def test_an_images_logits_do_not_depend_on_the_batch_and_see_its_colour() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(channels=8, layers=2)
    images = images_of(3)
    images[0] += 5
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=0, atol=1e-5)
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert (model(flat) - model(-flat)).abs().max() > 1e-3


def test_second_derivatives_are_right() -> None:
    """So that R1 may be used on it."""
    torch.manual_seed(0)
    model = PatchDiscriminator(channels=4, layers=1).double()
    assert gradgradcheck(model, images_of(1, 6, 6).double().requires_grad_())


def test_blocks_and_autocast() -> None:
    model = PatchDiscriminator(channels=8, layers=2)
    assert list(find_blocks(model)) == ["layers.0", "layers.1", "layers.2"]
    kinds: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images_of(1))
    assert kinds == [torch.bfloat16] * 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LowVRAMError, match="channels=6"):
        PatchDiscriminator(channels=6)
    with pytest.raises(LowVRAMError, match="layers=0"):
        PatchDiscriminator(layers=0)
    with pytest.raises(LowVRAMError, match=r"images of 40x16 pixels .* needs 24"):
        PatchDiscriminator(channels=8)(images_of(1, 16, 40))
