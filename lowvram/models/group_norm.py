"""The group norm of the UNet and the autoencoder."""

from typing import Literal

from torch import Tensor, nn

from lowvram.kernels.group_norm_silu import group_norm_silu


class GroupNorm(nn.GroupNorm):
    """Group normalisation (arXiv 1803.08494), then SiLU with act="silu": [B, C, ...] -> the same, in x's dtype.

    That holds under autocast too, where PyTorch's would go on in fp32 with twice the bytes. The arithmetic is of fp32.
    """

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-6, act: Literal["silu", "none"] = "none") -> None:
        super().__init__(groups, channels, eps=eps)
        self.act: Literal["silu", "none"] = act

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, act=self.act)
