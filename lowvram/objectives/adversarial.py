"""Losses of GANs as pure functions: logistic, R1, path length (StyleGAN2, arXiv 1912.04958), relativistic (R3GAN).

One value for each sample.

Weighting (gamma / 2, the lazy interval, the moving mean of path lengths) belongs to the task's phases.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating logistic loss, softplus(-D(G(z))) = -log sigmoid (Goodfellow et al. 2014, section 3).

    fake_logits: [B, 1] or [B]. Returns [B].
    """
    return F.softplus(-fake_logits).reshape(len(fake_logits))


def discriminator_fake_loss(fake_logits: Tensor) -> Tensor:
    """Logistic loss of a generated image, softplus(D(G(z))). [B, 1] or [B] -> [B]."""
    return F.softplus(fake_logits).reshape(len(fake_logits))


def discriminator_real_loss(real_logits: Tensor) -> Tensor:
    """Logistic loss of a real image, softplus(-D(x)). [B, 1] or [B] -> [B]."""
    return F.softplus(-real_logits).reshape(len(real_logits))


def relativistic_loss(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Logistic loss of a pair, softplus(-(D(a) - D(b))): that a looks more real than b (arXiv 1807.00734, section 4).

    logits, other_logits: [B, 1] or [B], of a and of b. The discriminator's loss has real images as a and generated ones
    as b, the generator's the other way round (R3GAN, arXiv 2501.05441, section 2). Returns [B].
    """
    return F.softplus(other_logits - logits).reshape(len(logits))


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Squared gradient norm of the logits by the images (R1: Mescheder et al. 2018, arXiv 1801.04406, equation 9).

    logits: [B, 1] or [B], computed from `images` [B, C, H, W], which requires grad. Returns [B], differentiable by
    the discriminator's weights. The loss is its mean times gamma / 2, and times the interval where it is lazy
    (StyleGAN2, section 3.1).
    """
    _need_graph(images, "images")
    (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # [B, C, H, W]
    return grad.square().sum(dim=tuple(range(1, grad.ndim)))


def r1_difference_penalty(ahead_logits: Tensor, behind_logits: Tensor, sigma: float) -> Tensor:
    """R1 estimated by a central difference, ((D(x + sigma eps) - D(x - sigma eps)) / (2 sigma))^2.

    ahead_logits, behind_logits: [B, 1] or [B] of x + sigma eps and x - sigma eps, eps standard normal and as large as
    x. Returns [B]. First-order: no derivative by the images. Its mean over eps is `r1_penalty` where a logit depends on
    its own image alone, up to third derivatives, and takes the same weight; the standard deviation of one value is
    sqrt(2) times its mean. The one-sided difference of the approximated R1 of arXiv 2501.08316 would also count
    curvature, which for a discriminator that tells noise is many times R1 (measured: benchmarks/LOG.md).

    The gradient is the sum of those with either argument detached, so that one graph at a time is enough.
    """
    return ((ahead_logits - behind_logits) / (2 * sigma)).square().reshape(len(ahead_logits))


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """Length of the Jacobian-vector product J_w^T y (StyleGAN2, section 3.2, equation 4).

    images: [B, C, H, W], generated from `ws` [B, num_ws, w_dim], which requires grad.
    noise: standard normal numbers [B, C, H, W]; the division by sqrt(H W) is done here.
    Returns [B]: the root of the mean over the layers of the squared norm, differentiable by the generator's weights.
    """
    _need_graph(ws, "ws")
    scale = 1 / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * (noise * scale)).sum(), ws, create_graph=True)  # [B, num_ws, w_dim]
    return grad.square().sum(2).mean(1).sqrt()


def path_length_penalty(lengths: Tensor, mean_length: Tensor | float) -> Tensor:
    """(length - a)^2 with the moving mean a held constant (StyleGAN2, equation 4). lengths: [B]. Returns [B]."""
    return (lengths - mean_length).square()


def range_penalty(images: Tensor) -> Tensor:
    """Mean square of how far pixels lie beyond [-1, 1]. [B, C, H, W] -> fp32 [B].

    For discriminators that look through a network with bounded activations: those saturate there, so that nothing else
    would pull such pixels back.
    """
    return (images.float().abs() - 1).relu().square().flatten(1).mean(1)


def _need_graph(x: Tensor, name: str) -> None:
    if not x.requires_grad:
        raise ValueError(
            f"{name} must require grad before the network sees it, or the penalty has no gradient to measure"
        )
