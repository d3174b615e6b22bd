"""The PatchGAN discriminator (Isola et al. 2017, arXiv 1611.07004, section 3.2.2 and appendix 6.1.2)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.errors import LowVRAMError

_WIDEST = 8  # times the first layer's channels


class PatchDiscriminator(nn.Module):
    """Judges each overlapping patch of an image by itself: 70x70 pixels with three halving layers.

    Group norms stand where the paper has batch norms, so that an image's logits do not depend on its micro-batch.

    Args:
        in_channels: of the images.
        channels: of the first layer, a multiple of 4; each next one has twice as many, up to 8 times.
        layers: how many of them halve the resolution. One more, with stride 1, and the logits' follow.

    Raises:
        LowVRAMError: channels or layers is out of range.
    """

    def __init__(self, *, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise LowVRAMError(f"channels={channels} of the discriminator must be a multiple of 4.", "Use 64 or 32.")
        if layers < 1:
            raise LowVRAMError(f"layers={layers} of the discriminator must be at least 1.", "Use 3.")
        self.in_channels = in_channels
        self.halvings = layers
        widths = [in_channels, *(channels * min(2**i, _WIDEST) for i in range(layers + 1))]
        self.layers = nn.ModuleList(
            PatchLayer(widths[i], widths[i + 1], stride=2 if i < layers else 1, norm=i > 0) for i in range(layers + 1)
        )
        self.logits = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # appendix 6.2
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in, H, W] in [-1, 1] -> logits [B, 1, H / 2^layers - 2, W / 2^layers - 2], rounded down.

        Raises:
            LowVRAMError: the images are too small for a single logit.
        """
        least = 3 * 2**self.halvings
        if min(images.shape[2:]) < least:
            raise LowVRAMError(
                f"images of {images.shape[3]}x{images.shape[2]} pixels are too small for a discriminator with "
                f"layers={self.halvings}, which needs {least}.",
                "Use fewer layers.",
            )
        for layer in self.layers:
            images = layer(images)
        logits: Tensor = self.logits(images)
        return logits

    def blocks(self) -> dict[str, nn.Module]:
        """Convolution, norm and activation as one."""
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}


class PatchLayer(nn.Module):
    """4x4 convolution, group norm (the first layer has none), leaky ReLU. [B, in, H, W] -> [B, out, ...]."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=not norm)
        # At least four channels in a group: one alone would lose its mean, and with it an image's overall colour.
        self.norm = nn.GroupNorm(math.gcd(32, out_channels // 4), out_channels) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x).to(x.dtype)  # autocast would go on in fp32
        return F.leaky_relu(x, 0.2)
