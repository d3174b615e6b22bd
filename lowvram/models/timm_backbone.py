"""Any convolutional network of timm as a frozen backbone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.models.backbones import Backbone

_REDUCTIONS = (4, 8, 16, 32)  # how many times smaller than the images the maps are


class TimmBackbone(Backbone):
    """A network of timm, by its name there, with the weights that timm downloads or those of a file.

    Args:
        name: such as resnet18 or convnext_tiny.fb_in1k.
        weights: a .safetensors, or a .pth of tensors alone, that timm would download; None: its cache, or the network.

    Raises:
        LowVRAMError: timm is not installed or does not know it, it has no maps at 1/4, 1/8, 1/16 and 1/32 of an image's
            size, or its weights can't be had.
    """

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise LowVRAMError(
                f"projection.backbone={name} is one of timm, which is not installed.",
                "pip install timm, or use efficientnet_lite1.",
            ) from None
        network = _make(timm, name, weights)
        reductions, channels = network.feature_info.reduction(), network.feature_info.channels()
        if any(wanted not in reductions for wanted in _REDUCTIONS):
            raise LowVRAMError(
                f"projection.backbone={name} has maps at 1/{', 1/'.join(map(str, reductions))} of an image's "
                "size, and those at 1/4, 1/8, 1/16 and 1/32 are needed.",
                "Use a convolutional network, such as resnet18, convnext_tiny or efficientnet_lite1.",
            )
        # Of several maps of one size the last is the deepest.
        self._levels = [len(reductions) - 1 - reductions[::-1].index(wanted) for wanted in _REDUCTIONS]
        self.channels = tuple(channels[level] for level in self._levels)
        self.network = network
        config: Any = getattr(network, "pretrained_cfg", {})
        for buffer, values in (("mean", config.get("mean", (0.5,) * 3)), ("std", config.get("std", (0.5,) * 3))):
            self.register_buffer(buffer, torch.tensor(values)[:, None, None])
        self.requires_grad_(False)
        self.eval()

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> list[Tensor]:
        x = (images / 2 + (0.5 - self.mean).to(images.dtype)) / self.std.to(images.dtype)
        maps: list[Tensor] = self.network(x)
        return [maps[level] for level in self._levels]

    def blocks(self) -> dict[str, torch.nn.Module]:
        return {f"network.{name}": stage for name, stage in self.network.named_children() if any(stage.children())}


def _make(timm: Any, name: str, weights: Path | None) -> Any:
    """The network as a pyramid of features, with its weights."""
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('.')[0][:6]}*")[:3]
        raise LowVRAMError(
            f"projection.backbone={name} is neither efficientnet_lite0, efficientnet_lite1 nor a model of timm.",
            f"Did you mean {', '.join(near)}?" if near else "Use efficientnet_lite1.",
        )
    overlay = None
    if weights is not None:
        path = weights.expanduser()
        if not path.is_file():
            raise LowVRAMError(
                f"projection.backbone_weights={weights} is no file.", "Give the file that timm downloads."
            )
        overlay = {"file": str(path)}
    try:
        if weights is not None and path.suffix != ".safetensors":
            # timm unpickles freely: a file that holds more than tensors is refused here first.
            torch.load(path, map_location="cpu", weights_only=True)
        return timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # a hub that is not there, a file of another network: each library has its own
        reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
        raise LowVRAMError(
            f"the weights of projection.backbone={name} can't be had: {reason}",
            "Give the file that timm would download, projection.backbone_weights=FILE, or use efficientnet_lite1.",
        ) from error
