import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.data.peeps import PeepsSet
from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.objectives import reconstruction
from lowvram.objectives.reconstruction import LPIPS, PerceptualLoss


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss()


@pytest.fixture(scope="module")
def faces() -> Tensor:
    """Drawn faces, float [3, 3, 64, 64] in [-1, 1]."""
    drawn = PeepsSet(resolution=64, count=3)
    pixels = [torch.from_numpy(drawn.fetch(i).pixels.copy()).permute(2, 0, 1) for i in range(3)]
    return torch.stack(pixels).float() / 127.5 - 1


# --- Pure functions ---


def test_l1_is_a_mean_for_each_sample() -> None:
    images = torch.zeros(2, 3, 4, 4)
    made = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -2.0)]).bfloat16()
    assert reconstruction.l1(made, images).tolist() == [0.5, 2.0]


def test_kl_is_the_integral_it_stands_for_for_one_number() -> None:
    moments = torch.randn(3, 8, 5, 4, generator=torch.Generator().manual_seed(1))
    mean, log_variance = (x.double()[..., None] for x in moments.chunk(2, dim=1))
    x = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    log_p = -0.5 * ((x - mean).square() / log_variance.exp() + log_variance)  # both without log(2 pi) / 2
    density = log_p.exp() / math.sqrt(2 * math.pi)
    wanted = (density * (log_p + 0.5 * x.square())).sum(-1).mul(x[1] - x[0]).mean((1, 2, 3)).float()
    torch.testing.assert_close(reconstruction.kl(moments), wanted)
    assert reconstruction.kl(torch.zeros(2, 8, 3, 3)).tolist() == [0, 0]


def test_the_perceptual_loss_sees_blur_noise_and_another_face(perceptual: PerceptualLoss, faces: Tensor) -> None:
    def blurred(radius: float) -> Tensor:
        out = []
        for face in faces:
            picture = Image.fromarray(((face + 1) * 127.5).byte().permute(1, 2, 0).numpy())
            pixels = torch.frombuffer(
                bytearray(picture.filter(ImageFilter.GaussianBlur(radius)).tobytes()), dtype=torch.uint8
            )
            out.append(pixels.reshape(64, 64, 3).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(out)

    same, little, much = (perceptual(x, faces) for x in (faces, blurred(0.7), blurred(2)))
    assert same.tolist() == [0, 0, 0]
    assert (little > 0.01).all()
    assert (much > little).all()
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(1))
    assert (perceptual(faces + 0.3 * noise, faces) > perceptual(faces + 0.05 * noise, faces)).all()
    # A small shift of brightness is far less than another face, though its L1 is not.
    brighter = perceptual(faces - 0.1, faces)
    assert (brighter < 0.5 * perceptual(faces.roll(1, 0), faces)).all()


def test_the_perceptual_loss_belongs_to_a_sample_and_only_reconstructions_get_gradients(
    perceptual: PerceptualLoss, faces: Tensor
) -> None:
    made = (faces.roll(1, 0) * 0.5).requires_grad_()
    target = faces.clone().requires_grad_()
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())
    losses = perceptual(made, target)
    assert losses.shape == (3,)
    torch.testing.assert_close(perceptual(made[1:2], target[1:2]), losses[1:2], rtol=1e-4, atol=1e-6)
    losses[0].backward()
    assert made.grad is not None
    assert made.grad[0].abs().sum() > 0
    assert made.grad[1:].abs().sum() == 0
    assert target.grad is None
    assert not any(p.requires_grad for p in perceptual.parameters())
    with torch.no_grad():  # down the gradient it gets smaller
        step = made[:1] - 0.005 * made.grad[:1] / made.grad[:1].abs().max()
        assert perceptual(step, faces[:1]) < losses[0]


def test_features_are_at_five_depths_of_the_network_that_metrics_use(perceptual: PerceptualLoss, faces: Tensor) -> None:
    from lowvram.metrics.features import EfficientNetLite0

    with torch.no_grad():
        found = perceptual.features(faces)
        assert [tuple(x.shape[1:]) for x in found] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (80, 4, 4), (112, 4, 4)]
        assert [tuple(x.shape[2:]) for x in perceptual.features(F.avg_pool2d(faces, 2))][-1] == (2, 2)
        network = EfficientNetLite0().network
        x = network._swish(network._conv_stem(((faces + 1) * 127.5 - 127) / 128))
        for block in network._blocks[:11]:
            x = block(x)
    torch.testing.assert_close(found[-1], x, rtol=1e-4, atol=1e-4)


def test_the_perceptual_loss_has_blocks_and_runs_under_autocast(perceptual: PerceptualLoss, faces: Tensor) -> None:
    assert list(find_blocks(perceptual)) == [f"layers.{i}" for i in range(11)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = perceptual(faces * 0.5, faces)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, perceptual(faces * 0.5, faces), rtol=0.1, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 3, 16, 64), (3, 64, 64)])
def test_images_that_the_perceptual_loss_can_not_take(perceptual: PerceptualLoss, shape: tuple[int, ...]) -> None:
    with pytest.raises(LowVRAMError, match="not for the perceptual loss"):
        perceptual(torch.zeros(shape), torch.zeros(shape))


# --- LPIPS, where it is installed ---


class FakeLPIPS(nn.Module):
    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.net = net
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        return self.scale * (made - images).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package `lpips`, and the folder of torch hub's weights, still empty."""
    package: Any = types.ModuleType("lpips")
    package.LPIPS = FakeLPIPS
    package.__spec__ = types.SimpleNamespace(name="lpips")
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_lpips_goes_through_its_package_frozen(lpips: Path) -> None:
    (lpips / "vgg16-397923af.pth").touch()
    loss = LPIPS().train()
    assert (loss.network.net, loss.training) == ("vgg", False)
    made = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    distances = loss(made, torch.zeros(2, 3, 8, 8))
    assert distances.tolist() == [0.5, 0.5]
    distances.sum().backward()
    assert made.grad is not None
    assert loss.network.scale.grad is None


def test_lpips_downloads_nothing_and_says_what_is_missing(lpips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LowVRAMError, match=r"there is no .*alexnet-owt-7be5be79\.pth"):
        LPIPS("alex")
    with pytest.raises(LowVRAMError, match="backbone=squeeze"):
        LPIPS("squeeze")
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LowVRAMError, match="lpips is not installed"):
        LPIPS()
