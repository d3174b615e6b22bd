"""Losses of the autoencoder, one value for each sample: L1, KL and perceptual; hinge.py has the adversarial one.

Papers: Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G; Esser et al. 2021, arXiv 2012.09841. Weights
belong to the task's phases. There is no adaptive weight for the adversarial term (arXiv 2012.09841, equation 7): it is
a ratio of gradients of the whole batch, so that a sample's loss would depend on its micro-batch.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError

_LAST_BLOCKS = (0, 2, 4, 7, 10)  # of EfficientNet-Lite0's stages at 1/2, 1/4, 1/8, 1/16 and 1/16 of the resolution
_LPIPS_BACKBONES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}


def l1(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference over an image's numbers. Both [B, C, H, W] of any floating dtype -> fp32 [B]."""
    return (reconstructions.float() - images.float()).abs().flatten(1).mean(1)


def kl(moments: Tensor) -> Tensor:
    """KL divergence of N(mean, std^2) from N(0, 1), in nats for one number of the latents (their mean).

    moments: mean and log variance, [B, 2 C, h, w]. Returns fp32 [B]. Published weights (1e-6) are for sums over an
    image's numbers of both the L1 and the KL term: beside mean L1 that is 1e-6 * latent numbers / image numbers.
    """
    mean, log_variance = moments.float().flatten(1).chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(1)


class PerceptualLoss(nn.Module):
    """Distance of two images in the features of a network trained on ImageNet, with no download.

    As LPIPS (Zhang et al. 2018, arXiv 1801.03924, equation 1) without its learned weights: at each of five depths of
    EfficientNet-Lite0 features are divided by their norm over the channels; squared differences are summed over the
    channels and averaged over space; then the mean over depths. Numbers are not comparable with LPIPS.

    The network is frozen, has no batch statistics, and stays in evaluation mode. Any size from 32x32.
    """

    def __init__(self) -> None:
        super().__init__()
        from lowvram.metrics.features import EfficientNetLite0

        network = EfficientNetLite0().network
        self.stem = nn.Sequential(network._conv_stem, network._swish)  # its batch norm is folded into the convolution
        self.layers = nn.ModuleList(network._blocks[: _LAST_BLOCKS[-1] + 1])
        self.requires_grad_(False)
        self.eval()

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Distances fp32 [B] of reconstructions, which get gradients, from images, both [B, 3, H, W] in [-1, 1].

        Raises:
            LowVRAMError: the images are not RGB or smaller than 32x32.
        """
        for x in (reconstructions, images):
            if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 32:
                raise LowVRAMError(
                    f"images {list(x.shape)} are not for the perceptual loss.",
                    "Use RGB images of at least 32x32 pixels, or set its weight to 0.",
                )
        with torch.no_grad():
            wanted = self.features(images)
        distances = torch.zeros(len(images), device=images.device)
        for made, aim in zip(self.features(reconstructions), wanted, strict=True):
            distances = distances + (_unit(made) - _unit(aim)).square().sum(1).mean((1, 2))
        return distances / len(wanted)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> features [B, C, h, w] at each depth, not normalised."""
        x = (images * 127.5 + 0.5) / 128  # (value in 0 ... 255 - 127) / 128, as the network was trained
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        found = []
        for i, block in enumerate(self.layers):
            x = block(x)
            if i in _LAST_BLOCKS:
                found.append(x)
        return found

    def blocks(self) -> dict[str, nn.Module]:
        """The inverted residual blocks."""
        return {f"layers.{i}": block for i, block in enumerate(self.layers)}

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """It stays in evaluation mode."""
        super().train(False)
        return self


class LPIPS(nn.Module):
    """LPIPS itself (Zhang et al. 2018, arXiv 1801.03924) by the `lpips` package, where it and its weights are there.

    Nothing is downloaded: the backbone's weights must lie in torch hub's cache, as torchvision leaves them.

    Args:
        backbone: "vgg" (the usual training loss) or "alex" (the usual metric).

    Raises:
        LowVRAMError: the package or the weights are missing.
    """

    def __init__(self, backbone: str = "vgg") -> None:
        super().__init__()
        if backbone not in _LPIPS_BACKBONES:
            raise LowVRAMError(f"LPIPS with backbone={backbone} is not known.", "Use vgg or alex.")
        if importlib.util.find_spec("lpips") is None:
            raise LowVRAMError(
                "LPIPS was asked for, and the package lpips is not installed.",
                "pip install lpips, or use the built-in perceptual loss.",
            )
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONES[backbone]
        if not weights.is_file():
            raise LowVRAMError(
                f"LPIPS needs torchvision's ImageNet weights, and there is no {weights}.",
                f"Put torchvision's {weights.name} there, or use the built-in perceptual loss.",
            )
        try:
            package: Any = importlib.import_module("lpips")
        except ImportError as error:
            raise LowVRAMError(f"the package lpips can't be imported: {error}.", "pip install lpips.") from error
        self.network = package.LPIPS(net=backbone, verbose=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Distances [B] of two batches [B, 3, H, W] in [-1, 1]."""
        distances: Tensor = self.network(reconstructions, images)  # [B, 1, 1, 1]
        return distances.float().flatten()

    def train(self, mode: bool = True) -> "LPIPS":
        """It stays in evaluation mode."""
        super().train(False)
        return self


def _unit(features: Tensor) -> Tensor:
    """Features [B, C, h, w] divided by their norm over C, in fp32; all zeros stay zeros."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()
