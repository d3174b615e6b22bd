"""Images of a GAN's generator, in slices that bound the memory.

Legend: B batch, K keyframes, N walks side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.sampling.grids import make_grid

if TYPE_CHECKING:
    from lowvram.models.stylegan2_layers import NoiseMode

NOISE_MODES: tuple[NoiseMode, ...] = ("random", "const", "none")
DEFAULT_SLICE = 16


class Generator(Protocol):
    """What a generator of images has: a mapping of its latents, and the synthesis of images from what that gives.

    mapping(z [B, z_dim], c [B, c_dim] or None, truncation_psi) -> ws, of any shape [B, ...] along which images change
    smoothly. synthesis(ws, noise_mode, noise_seeds) -> float images [B, C, R, R] in about [-1, 1]. A network that knows
    no truncation or noise takes psi = 1 alone and any mode. c_dim: classes; 0: none.
    """

    z_dim: int
    c_dim: int

    @property
    def mapping(self) -> Callable[..., Tensor]: ...
    @property
    def synthesis(self) -> Callable[..., Tensor]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def sample_seeds(n: int, seed: int, start: int = 0) -> Tensor:
    """One seed for each of the images start ... start + n - 1, int64 [n]: a function of seed and index alone."""
    return torch.tensor([seeded.mix(seed, i) for i in range(start, start + n)], dtype=torch.int64)


def latents(n: int, seed: int, z_dim: int, start: int = 0) -> Tensor:
    """Latents of the images start ... start + n - 1, float32 [n, z_dim] on the CPU.

    Drawn on the CPU wherever the network runs, so that a GPU makes the same images.
    """
    return seeded.randn(sample_seeds(n, seed, start), z_dim, stream="z")


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] as uint8 of the same shape, rounded and clamped: the inverse of x / 127.5 - 1.

    Raises LowVRAMError where they hold NaN: a generator that came to this has nothing to show.
    """
    if images.isnan().any():
        raise LowVRAMError("the generator gives NaN in place of an image.", "Sample from an earlier checkpoint.")
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def sample_images(
    generator: Generator,
    n: int,
    *,
    seed: int = 0,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    classes: list[int] | None = None,
    micro_batch: int | None = None,
    start: int = 0,
) -> Tensor:
    """n images, uint8 [n, C, R, R] on the CPU.

    Image i (counted from 0, so the first one here is `start`) depends on the seed and i alone, up to floating-point
    reordering: neither on n nor on how the work is cut.

    Args:
        truncation_psi: 1 keeps the full variety, 0 gives the average image (StyleGAN, arXiv 1812.04948, appendix B).
        noise_mode: "const" (the network's own noise), "random" (each image its own) or "none".
        classes: image i is of class classes[i % len(classes)]; None takes all classes in turn.
        micro_batch: images at a time; 16 unless given.

    Raises:
        LowVRAMError: n or micro_batch below 1, an unknown noise mode or class, a class for a network without classes.
    """
    mode = _check(n, noise_mode, micro_batch)
    picked = _class_of_each(generator, classes)
    device = _device_of(generator)
    out = []
    with torch.inference_mode():
        for first in range(start, start + n, micro_batch or DEFAULT_SLICE):
            b = min(micro_batch or DEFAULT_SLICE, start + n - first)
            z = latents(b, seed, generator.z_dim, first).to(device)
            c = _one_hot([picked[i % len(picked)] for i in range(first, first + b)], generator.c_dim, device)
            ws = generator.mapping(z, c, truncation_psi=truncation_psi)
            noise_seeds = sample_seeds(b, seed, first) if noise_mode == "random" else None
            images = generator.synthesis(ws, noise_mode=mode, noise_seeds=noise_seeds)
            out.append(to_uint8(images).cpu())
    return torch.cat(out)


def interpolate(
    generator: Generator,
    *,
    seed: int = 0,
    keyframes: int = 8,
    frames_per_keyframe: int = 30,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    classes: list[int] | None = None,
    rows: int = 1,
    cols: int = 1,
    micro_batch: int | None = None,
) -> Iterator[Tensor]:
    """Frames of rows * cols walks through w that end where they began, each uint8 [C, rows * R, cols * R] on the CPU.

    A walk passes its keyframes, the images of latents drawn by the seed, along a closed cubic curve: position and
    speed are continuous, also from the last of the keyframes * frames_per_keyframe frames to the first. Walk j is of
    class classes[j % len(classes)]. Noise stays as it is along a walk. `micro_batch` images are made at a time.

    Raises LowVRAMError as `sample_images`, at once and not at the first frame.
    """
    mode = _check(rows, noise_mode, micro_batch, name="rows")
    _check(cols, noise_mode, micro_batch, name="cols")
    _check(keyframes, noise_mode, micro_batch, name="keyframes")
    _check(frames_per_keyframe, noise_mode, micro_batch, name="frames_per_keyframe")
    picked = _class_of_each(generator, classes)
    walks = rows * cols
    device = _device_of(generator)
    with torch.inference_mode():
        z = latents(walks * keyframes, seed, generator.z_dim).to(device)
        c = _one_hot([picked[i // keyframes % len(picked)] for i in range(len(z))], generator.c_dim, device)
        keys = generator.mapping(z, c, truncation_psi=truncation_psi).unflatten(0, (walks, keyframes))
    noise_seeds = sample_seeds(walks, seed) if noise_mode == "random" else None

    def frames() -> Iterator[Tensor]:
        for frame in range(keyframes * frames_per_keyframe):
            with torch.inference_mode():
                ws = closed_curve(keys, frame / frames_per_keyframe)  # [N, ...]
                cells = []
                for at in range(0, walks, micro_batch or DEFAULT_SLICE):
                    part = slice(at, at + (micro_batch or DEFAULT_SLICE))
                    own = noise_seeds[part] if noise_seeds is not None else None
                    images = generator.synthesis(ws[part], noise_mode=mode, noise_seeds=own)
                    cells.append(to_uint8(images).cpu())
            yield make_grid(torch.cat(cells), columns=cols)

    return frames()


def closed_curve(keys: Tensor, t: float) -> Tensor:
    """The point t of a closed Catmull-Rom curve through keys [N, K, ...] (Catmull & Rom 1974); t = k is keys[:, k].

    Cubic, with a continuous derivative everywhere, of period K in t. Returns [N, ...].
    """
    count = keys.shape[1]
    index, x = int(t // 1), t % 1
    before, here, there, after = (keys[:, (index + offset) % count] for offset in (-1, 0, 1, 2))
    slope_here, slope_there = (there - before) / 2, (after - here) / 2
    return (
        here * (2 * x**3 - 3 * x**2 + 1)
        + slope_here * (x**3 - 2 * x**2 + x)
        + there * (3 * x**2 - 2 * x**3)
        + slope_there * (x**3 - x**2)
    )


def _check(n: int, noise_mode: str, micro_batch: int | None, name: str = "n") -> NoiseMode:
    if n < 1:
        raise LowVRAMError(f"{name}={n} is too small.", "Use 1 or more.")
    if micro_batch is not None and micro_batch < 1:
        raise LowVRAMError(f"micro_batch={micro_batch} is too small.", "Use 1 or more.")
    for mode in NOISE_MODES:
        if mode == noise_mode:
            return mode
    raise LowVRAMError(f"noise={noise_mode} is not known.", f"Use one of {', '.join(NOISE_MODES)}.")


def _class_of_each(generator: Generator, classes: list[int] | None) -> list[int]:
    """The classes to take in turn; [0] for a network without classes."""
    c_dim = generator.c_dim
    if c_dim == 0:
        if classes is not None:
            raise LowVRAMError(f"classes={classes}: this network was trained without classes.", "Leave classes out.")
        return [0]
    if classes is None:
        return list(range(c_dim))
    if not classes:
        raise LowVRAMError("classes=[] names no class.", f"Give numbers from 0 to {c_dim - 1}, or leave classes out.")
    wrong = [c for c in classes if not 0 <= c < c_dim]
    if wrong:
        raise LowVRAMError(f"class {wrong[0]} is not there.", f"This network's classes are 0 to {c_dim - 1}.")
    return classes


def _one_hot(classes: list[int], c_dim: int, device: torch.device) -> Tensor | None:
    """float32 [B, c_dim], or None without classes."""
    if c_dim == 0:
        return None
    return nn.functional.one_hot(torch.tensor(classes), c_dim).float().to(device)


def _device_of(generator: Generator) -> torch.device:
    return next(generator.parameters()).device
