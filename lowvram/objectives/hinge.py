"""Hinge losses of a discriminator of patches and its generator (Lim and Ye 2017, arXiv 1705.02894).

Logits are [B, ...] of any further shape; each function takes the mean over an image's logits and returns fp32 [B].
"""

from torch import Tensor
from torch.nn import functional as F


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-D(G(z))."""
    return -fake_logits.float().flatten(1).mean(1)


def discriminator_fake_loss(fake_logits: Tensor) -> Tensor:
    """max(0, 1 + D(G(z)))."""
    return F.relu(1 + fake_logits.float()).flatten(1).mean(1)


def discriminator_real_loss(real_logits: Tensor) -> Tensor:
    """max(0, 1 - D(x))."""
    return F.relu(1 - real_logits.float()).flatten(1).mean(1)
