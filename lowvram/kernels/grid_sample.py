"""Bilinear sampling of an image at a grid of points, differentiable any number of times with respect to the image.

`torch.nn.functional.grid_sample` has no second derivative before torch 2.12 or so, which R1 through an augmentation
needs. The sampling is linear in the image, so its derivative is its adjoint (a scatter-add with the same weights:
`aten::grid_sampler_2d_backward`) and the adjoint's derivative is the sampling again. Unlike the native op it saves the
grid alone, not the image.
"""

from functools import partial

import torch
from torch import Tensor

from lowvram.kernels.linear_map import linear_map

_PADDING_MODES = {"zeros": 0, "border": 1, "reflection": 2}
_BILINEAR = 0


def grid_sample(images: Tensor, grid: Tensor, *, padding_mode: str = "zeros", align_corners: bool = False) -> Tensor:
    """Sample images [B, C, H, W] at grid [B, H', W', 2] -> [B, C, H', W'].

    grid: (x, y) with -1 and 1 at the image's edges: the centres of the outermost pixels with align_corners, their outer
    borders without. Same dtype as images. It gets no gradient: one that requires it raises ValueError.
    padding_mode: "zeros", "border" or "reflection", as in `torch.nn.functional.grid_sample`.
    The backward adds with atomics on CUDA, so it is not deterministic there to the last bit.
    """
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode={padding_mode!r} is not one of {', '.join(_PADDING_MODES)}")
    if grid.requires_grad:
        raise ValueError("grid requires a gradient, which grid_sample does not compute; give grid.detach()")
    height, width = images.shape[2:]
    sample = partial(sample_map, padding_mode=padding_mode, align_corners=align_corners)
    scatter = partial(
        sample_adjoint, height=height, width=width, padding_mode=padding_mode, align_corners=align_corners
    )
    return linear_map(images, sample, scatter, grid)


def sample_map(images: Tensor, grid: Tensor, *, padding_mode: str, align_corners: bool) -> Tensor:
    """The sampling itself, without autograd: [B, C, H, W], [B, H', W', 2] -> [B, C, H', W']."""
    return torch.grid_sampler_2d(images, grid, _BILINEAR, _PADDING_MODES[padding_mode], align_corners)


def sample_adjoint(
    samples: Tensor, grid: Tensor, *, height: int, width: int, padding_mode: str, align_corners: bool
) -> Tensor:
    """Its transpose, without autograd: [B, C, H', W'], [B, H', W', 2] -> [B, C, height, width]."""
    batch, channels = samples.shape[:2]
    # The op reads the shape of its `input` alone when it computes no gradient for the grid: one element will do.
    shape_only = samples.new_zeros(()).expand(batch, channels, height, width)
    mode = _PADDING_MODES[padding_mode]
    grad, _ = torch.ops.aten.grid_sampler_2d_backward(
        samples.contiguous(), shape_only, grid, _BILINEAR, mode, align_corners, [True, False]
    )
    return grad
