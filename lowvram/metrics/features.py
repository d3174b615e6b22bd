"""Images to features, by networks that need no download: trained on ImageNet, or with random weights.

A Frechet distance is only comparable with others on the same features of images resized in the same way. So each
extractor's `name` goes into the metric's name, and `version` into the key of whatever is cached.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.models.backbones import load_efficientnet_lite


class FeatureExtractor(Protocol):
    """Features of uint8 images [B, 3, H, W] of any size, float32 [B, dim] on the CPU."""

    name: str
    version: str
    dim: int

    def __call__(self, images: Tensor) -> Tensor: ...


class EfficientNetLite0:
    """Globally pooled features of the last convolution (1280 channels, after ReLU6) of EfficientNet-Lite0 on ImageNet.

    Images are resized to 224x224 (bicubic, with antialiasing where they shrink), clamped to [0, 255] and normalised
    as (x - 127) / 128, as this network was trained. With this, it tells a cat from an espresso; batch normalisation
    uses its running statistics, so that an image's features do not depend on its batch.

    size: pixels a side to resize to. A smaller one is quicker (96: a sixth of the time), and another metric: features
        are larger and distances with them (a fresh 32x32 generator to the built-in faces: 330 at 224, 1,440 at 96).
    """

    dim = 1280

    def __init__(self, device: torch.device | str = "cpu", size: int = 224) -> None:
        self.device = torch.device(device)
        if size < 32:
            raise LowVRAMError(f"feature_size={size} is too small for EfficientNet-Lite0.", "Use 224, or at least 32.")
        self.size = size
        self.name = "efficientnet_lite0" if size == 224 else f"efficientnet_lite0_{size}px"
        self.version = f"efficientnet_lite0-pool-{size}-bicubic-1"
        self.network = load_efficientnet_lite("efficientnet_lite0").to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        x = _as_rgb(images).to(self.device, torch.float32)
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features = self.network.extract_features(x)  # [B, 1280, 7, 7]
        return features.mean((2, 3)).cpu()

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits, float32 [B, 1000], from the same features."""
        fc: nn.Module = self.network._fc
        logits: Tensor = fc(self(images).to(self.device))
        return logits.cpu()


class RandomConv:
    """A convolutional network with random weights, always the same: a judge that has learned nothing.

    A generator that learned from a network of ImageNet, as a projected GAN does, may please other such networks beyond
    what is to be seen. This one shares nothing with them. How random features judge beside learned ones is shown in
    arXiv 2002.09797, section 4.2. A fully connected layer ends them, so that they tell where in an image something
    lies; they know nothing of what it means, and see colours and layout first.

    Images are resized to 64x64 (bicubic, with antialiasing where they shrink) and scaled to [-1, 1]; of larger images
    the details are left to the sliced Wasserstein distance. With 256 features fewer images suffice than with 1280.
    """

    name = "random_conv"
    version = "random_conv-64-32.64.96.128-256-bicubic-1"
    dim = 256
    size = 64
    _WIDTHS = (32, 64, 96, 128)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        self._convolutions: list[Tensor] = []
        channels = 3
        for width in self._WIDTHS:  # He et al. 2015, arXiv 1502.01852, equation 10: as much variance out as in
            weight = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            self._convolutions.append(weight.to(self.device, memory_format=torch.channels_last))
            channels = width
        inputs = channels * (self.size // 2 ** len(self._WIDTHS)) ** 2
        self._projection = (torch.randn(self.dim, inputs, generator=generator) / inputs**0.5).to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        x = _as_rgb(images).to(self.device, torch.float32)
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        x = (x / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for weight in self._convolutions:
            x = F.avg_pool2d(F.relu(F.conv2d(x, weight, padding=1)), 2)
        return F.linear(x.flatten(1), self._projection).cpu()


# One file under the names that torch-fidelity and pytorch-fid give it; the digits are the beginning of its SHA-256.
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"


class InceptionV3:
    """The 2048 pooled features that define FID (Heusel et al. 2017, arXiv 1706.08500), by torch-fidelity.

    weights: the converted TensorFlow weights of 2015-12-05. Nothing is ever downloaded.
    Raises LowVRAMError where the file is not that network.
    """

    name = "inception"
    dim = 2048

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.device = torch.device(device)
        try:
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            # torch-fidelity unpickles freely: a file that holds more than tensors is refused here first.
            torch.load(weights, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
        except Exception as error:
            raise LowVRAMError(
                f"inception={weights} can't be loaded: {str(error).splitlines()[0] if str(error) else error!r}",
                f"Give the file {INCEPTION_FILES[0]} that torch-fidelity publishes.",
            ) from error
        self.is_published = digest.startswith(INCEPTION_SHA256)
        self.version = f"inception-2048-{digest[:16]}"
        self.network = network.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        (features,) = self.network(_as_rgb(images).to(self.device))
        return features.float().cpu()


def find_inception(path: str | None = None) -> Path | None:
    """The weights of Inception: the path given, or a file that torch-fidelity or pytorch-fid left in torch hub's cache.

    Raises LowVRAMError where a path is given and is no file.
    """
    if path is not None:
        place = Path(path).expanduser()
        if not place.is_file():
            raise LowVRAMError(
                f"inception={path} is no file.", f"Give the path of {INCEPTION_FILES[0]}, or leave it out."
            )
        return place
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in INCEPTION_FILES if (folder / name).is_file()), None)


@cache
def default_extractor(device: str = "cpu") -> EfficientNetLite0:
    """One EfficientNet-Lite0 for each device and process."""
    return EfficientNetLite0(device)


def _as_rgb(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise LowVRAMError(
            f"features can't be taken of {images.dtype} {list(images.shape)}.", "Pass uint8 images [B, 3, H, W]."
        )
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)
