"""Adaptive discriminator augmentation: training GANs with limited data (arXiv 2006.06676, section 3 and appendix B).

Everything the discriminator sees, real or generated, goes through one random pipeline, whose transformations are each
applied with probability p; p follows how far the discriminator overfits (`adapt`). Images are [B, C, H, W] in about
[-1, 1]. What a transformation does to an image is decided on the CPU from two short rows of random numbers, so the same
seed gives the same transformation on any device, and no step waits for the accelerator.
"""

import difflib
import math
import struct
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.kernels.linear_map import linear_map
from lowvram.models import augment_geometry as geometry

_BLIT = ("x_flip", "rotate_90", "integer_translation")
_GEOM = ("isotropic_scale", "rotation", "anisotropic_scale", "fractional_translation")
_COLOR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
_ALL = (*_BLIT, *_GEOM, *_COLOR, "image_filter", "noise", "cutout")
PIPELINES: dict[str, tuple[str, ...]] = {
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOR,
    "filter": ("image_filter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
    "bg": (*_BLIT, *_GEOM),
    "bgc": (*_BLIT, *_GEOM, *_COLOR),
    "bgcf": (*_BLIT, *_GEOM, *_COLOR, "image_filter"),
    "bgcfn": (*_BLIT, *_GEOM, *_COLOR, "image_filter", "noise"),
    "bgcfnc": _ALL,
    "diff": ("integer_translation", "brightness", "contrast", "saturation", "cutout"),
}
"""The transformations of each named pipeline. The paper's default is "bgc".

"diff" are those of differentiable augmentation, colour, translation and cutout, which are applied to every image, p = 1
(DiffAugment, arXiv 2006.10738, section 4); their strengths are this pipeline's own.
"""

_BANDS = 4
_BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # expected power spectrum of natural images, 1/f (appendix B)

# One column of the tables of random numbers for each decision. A table is drawn whole, whatever is switched on, so that
# switching one transformation on changes no other's numbers; new columns go to the end.
_UNIFORM = (
    *(f"{name}?" for name in _ALL if name not in ("rotation", "image_filter")),
    *("rotation_before?", "rotation_after?", *(f"band{i}?" for i in range(_BANDS))),
    *("x_flip", "rotate_90", "shift_x", "shift_y", "rotation_before", "rotation_after", "luma_flip", "hue"),
    *("cutout_x", "cutout_y"),
)
_NORMAL = (
    *("isotropic_scale", "anisotropic_scale", "shift_x", "shift_y", "brightness", "contrast", "saturation"),
    *(*(f"band{i}" for i in range(_BANDS)), "noise"),
)


@dataclass(frozen=True, kw_only=True)
class Augmentations:
    """Which transformations are on, and how strong they are; the strengths are the paper's.

    The first fields are factors in [0, 1]: a transformation is applied to an image with probability p times its factor,
    0 switches it off. As in the paper, applied mirroring mirrors one image in two, and applied turning by 90 degrees
    leaves one in four as it is. A wrong value raises LowVRAMError.
    """

    x_flip: float = 0.0
    rotate_90: float = 0.0
    integer_translation: float = 0.0
    isotropic_scale: float = 0.0
    rotation: float = 0.0
    anisotropic_scale: float = 0.0
    fractional_translation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    luma_flip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    image_filter: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0

    integer_translation_max: float = 0.125  # of the image's side
    isotropic_scale_std: float = 0.2  # octaves (log2)
    rotation_max: float = 1.0  # half-turns, each way
    anisotropic_scale_std: float = 0.2  # octaves
    fractional_translation_std: float = 0.125  # of the image's side
    brightness_std: float = 0.2  # in an image of [-1, 1]
    contrast_std: float = 0.5  # octaves
    hue_max: float = 1.0  # half-turns, each way
    saturation_std: float = 1.0  # octaves
    image_filter_std: float = 1.0  # octaves, of one band
    noise_std: float = 0.1  # of the half-normal distribution from which an image's sigma is drawn
    cutout_size: float = 0.5  # of the image's side

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _ALL and not 0 <= value <= 1:
                raise LowVRAMError(f"augmentation {field.name}={value} is no probability factor.", "Use 0 to 1.")
            if not 0 <= value < math.inf:
                raise LowVRAMError(
                    f"augmentation strength {field.name}={value} is negative or infinite.", "Use 0 or more."
                )

    def any_on(self, names: tuple[str, ...]) -> bool:
        """Whether any of the named transformations is on."""
        return any(getattr(self, name) for name in names)


class AugmentPipe(nn.Module):
    """The random pipeline, in the paper's order: blitting, geometry, colour, filtering, noise, cutout.

    Its probability is the buffer `p` (float32 scalar, in the state dict; 0 at first). Writing to the buffer in place or
    loading it is noticed (not through `.data`), at the price of one wait for the device; `set_probability` has none.
    """

    p: Tensor

    def __init__(self, augmentations: Augmentations) -> None:
        super().__init__()
        self.augmentations = augmentations
        self.register_buffer("p", torch.zeros([]))
        self._known_p: tuple[Tensor, int, float] | None = None  # the buffer, its version, and its value

    @classmethod
    def from_name(cls, name: str, **strengths: float) -> Self:
        """A pipeline of `PIPELINES`, all factors 1; `strengths` are fields of Augmentations to change.

        An unknown name raises LowVRAMError.
        """
        if name not in PIPELINES:
            nearest = difflib.get_close_matches(name, PIPELINES, n=1, cutoff=0.0)[0]
            raise LowVRAMError(
                f'augmentation pipeline "{name}" is unknown.', f'Did you mean "{nearest}"? All: {", ".join(PIPELINES)}.'
            )
        return cls(Augmentations(**{**dict.fromkeys(PIPELINES[name], 1.0), **strengths}))

    def set_probability(self, p: float) -> None:
        """Set the buffer `p`; outside of [0, 1] raises LowVRAMError."""
        if not 0 <= p <= 1:
            raise LowVRAMError(f"augmentation probability p={p} is outside of [0, 1].", "Clamp it, as `adapt` does.")
        self.p.fill_(p)
        as_stored = struct.unpack("f", struct.pack("f", p))[0]  # what a checkpoint holds, so that a run resumes exactly
        self._known_p = (self.p, self.p._version, as_stored)

    def probability(self) -> float:
        """The value of the buffer `p`. 1 where it has none (a fake or meta tensor, in tracing): the costliest case."""
        if self.p.is_meta or isinstance(self.p, FakeTensor):
            return 1.0
        known = self._known_p
        if known is None or known[0] is not self.p or known[1] != self.p._version:
            known = self._known_p = (self.p, self.p._version, float(self.p))
        return known[2]

    def forward(self, images: Tensor, seeds: Tensor | None = None, *, stream: str = "augment") -> Tensor:
        """Augment images [B, C, H, W], float, about [-1, 1] -> the same shape and dtype (computed in float32 at least).

        seeds: int64 [B] on the CPU: image i then depends on seeds[i] and stream alone; None draws from torch's default
        generators. Images that should be transformed independently (reals and fakes, two phases) need other seeds or
        another stream. Differentiable twice with respect to images. With p = 0 the images come back as they are.
        Costs as much for any p > 0, so that its memory can be told in advance.
        """
        p = self.probability()
        on = self.augmentations
        if p == 0 or not on.any_on(_ALL):
            return images
        self._check(images)
        draws = _Draws(seeds, stream, len(images), p)
        dtype = images.dtype
        x = images if dtype == torch.float64 else images.float()
        x = self._move(x, draws)
        if on.any_on(_COLOR):
            x = mix_channels(x, color_matrix(on, draws, x.shape[1]))
        if on.image_filter:
            taps = band_gains(on, draws) @ geometry.band_filters()  # [B, 43]
            x = geometry.filter_images(x, taps)
        if on.noise:
            sigma = draws.choose("noise?", on.noise, draws.normal["noise"].abs() * on.noise_std, 0)  # [B]
            noise = seeded.randn(seeds, *x.shape[1:], stream=f"{stream}.noise", device=x.device, batch=len(x))
            x = torch.addcmul(x, noise.to(x.dtype), geometry.to_device(sigma, x)[:, None, None, None])
        if on.cutout:
            x = x.masked_fill(cutout_mask(on, draws, *x.shape[2:]).to(x.device, non_blocking=True), 0)
        return x.to(dtype)

    def _move(self, x: Tensor, draws: "_Draws") -> Tensor:
        """Blitting and geometry, with as little resampling as can be.

        Mirroring and turns by 90 degrees map the frame to itself and come first, so they are exact copies in any case;
        whole-pixel shifts are copies unless a general transformation follows, which needs what lies beyond the frame.
        """
        on = self.augmentations
        height, width = x.shape[2:]
        general = on.any_on(_GEOM)
        shift_x, shift_y = whole_shift(on, draws, height, width)
        if on.x_flip or on.rotate_90 or (on.integer_translation and not general):
            flip = draws.chosen("x_flip?", on.x_flip) & (draws.uniform["x_flip"] < 0.5)
            turns = draws.choose("rotate_90?", on.rotate_90, (draws.uniform["rotate_90"] * 4).floor(), 0).long()
            no_shift = torch.zeros_like(turns)
            shifts = (no_shift, no_shift) if general else (shift_x.long(), shift_y.long())
            x = geometry.blit(x, flip, turns, *shifts)
        if general:
            to_source = geometry.translate(-shift_x, -shift_y) @ general_matrix(on, draws, height, width)
            x = geometry.warp(x, to_source)
        return x

    def _check(self, images: Tensor) -> None:
        on = self.augmentations
        channels, height, width = images.shape[1:]
        if on.any_on(_COLOR) and channels not in (1, 3):
            raise LowVRAMError(
                f"images of {channels} channels cannot be augmented in colour.",
                'Use 1 or 3 channels, or a pipeline without colour, such as "bg".',
            )
        if on.rotate_90 and height != width:
            raise LowVRAMError(
                f"images of {width}x{height} pixels cannot be turned by 90 degrees.",
                "Use square images or rotate_90=0.",
            )
        if on.any_on(_GEOM) and min(height, width) < 4:
            raise LowVRAMError(f"images of {width}x{height} pixels are too small to augment.", "Use 4x4 or more.")


class _Draws:
    """The random numbers of a batch: a row of uniform and a row of normal ones for each image, float64, on the CPU."""

    def __init__(self, seeds: Tensor | None, stream: str, batch: int, p: float) -> None:
        uniform = seeded.rand(seeds, len(_UNIFORM), stream=f"{stream}.uniform", batch=batch).double()
        normal = seeded.randn(seeds, len(_NORMAL), stream=f"{stream}.normal", batch=batch).double()
        self.uniform = dict(zip(_UNIFORM, uniform.unbind(1), strict=True))  # each [B]
        self.normal = dict(zip(_NORMAL, normal.unbind(1), strict=True))  # each [B]
        self.p = p

    def chosen(self, gate: str, factor: float) -> Tensor:
        """bool [B]: to which images a transformation is applied."""
        return self.uniform[gate] < self.p * factor

    def choose(self, gate: str, factor: float, value: Tensor, otherwise: float) -> Tensor:
        """`value` [B] where the transformation is applied, `otherwise` elsewhere."""
        return torch.where(self.chosen(gate, factor), value, otherwise)

    def octaves(self, gate: str, factor: float, normal: str, std: float) -> Tensor:
        """A log-normal factor [B], 2^(std * N(0, 1)); 1 where the transformation is not applied."""
        return self.choose(gate, factor, torch.exp2(self.normal[normal] * std), 1)


# --- What is done to each image: small tensors on the CPU ---


def whole_shift(on: Augmentations, draws: _Draws, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Shifts (right, down) by whole pixels, float64 [B] each: round(U(-max, max) * side)."""
    gate = draws.chosen("integer_translation?", on.integer_translation)
    sides = (("shift_x", width), ("shift_y", height))
    x, y = (((draws.uniform[name] * 2 - 1) * on.integer_translation_max * side).round() * gate for name, side in sides)
    return x, y


def general_matrix(on: Augmentations, draws: _Draws, height: int, width: int) -> Tensor:
    """From an output point to the point shown there, float64 [B, 3, 3], in pixels from the image's centre.

    Appendix B composes scaling, turning, stretching, turning again, shifting, in this order from source to output; this
    is the inverse: the product of the inverses in reverse. Both turns are gated by 1 - sqrt(1 - p), so that an image is
    turned with probability p.
    """
    matrix = torch.eye(3, dtype=torch.float64)
    if on.isotropic_scale:
        s = draws.octaves("isotropic_scale?", on.isotropic_scale, "isotropic_scale", -on.isotropic_scale_std)
        matrix = matrix @ geometry.scale(s, s)
    matrix = _turn(matrix, on, draws, "rotation_before")
    if on.anisotropic_scale:
        s = draws.octaves("anisotropic_scale?", on.anisotropic_scale, "anisotropic_scale", -on.anisotropic_scale_std)
        matrix = matrix @ geometry.scale(s, 1 / s)
    matrix = _turn(matrix, on, draws, "rotation_after")
    if on.fractional_translation:
        gate = draws.chosen("fractional_translation?", on.fractional_translation) * on.fractional_translation_std
        x, y = draws.normal["shift_x"] * gate * width, draws.normal["shift_y"] * gate * height
        matrix = matrix @ geometry.translate(-x, -y)
    return matrix


def _turn(matrix: Tensor, on: Augmentations, draws: _Draws, name: str) -> Tensor:
    if not on.rotation:
        return matrix
    each = 1 - math.sqrt(1 - draws.p * on.rotation)
    turned = draws.uniform[f"{name}?"] < each
    angle = torch.where(turned, (draws.uniform[name] * 2 - 1) * math.pi * on.rotation_max, 0)
    return matrix @ geometry.rotate(angle)


def color_matrix(on: Augmentations, draws: _Draws, channels: int) -> Tensor:
    """Affine colour map, float64 [B, C, C + 1]; its last column is the offset.

    Brightness, contrast, mirrored luma, turned hue, saturation; the luma axis is (1, 1, 1) / sqrt(3). A grey image
    (C = 1) is taken as equal RGB and the result averaged, so that hue and saturation do nothing to it.
    """
    identity = torch.eye(3, dtype=torch.float64)
    luma = torch.full((3, 3), 1 / 3, dtype=torch.float64)  # the projection on the luma axis
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)  # axis x colour
    # All three linear maps keep luma and chroma apart: luma is multiplied by a number, chroma scaled and turned.
    contrast = draws.octaves("contrast?", on.contrast, "contrast", on.contrast_std)[:, None, None]
    flipped = draws.chosen("luma_flip?", on.luma_flip) & (draws.uniform["luma_flip"] < 0.5)
    sign = torch.where(flipped, -1.0, 1.0)[:, None, None]
    saturation = draws.octaves("saturation?", on.saturation, "saturation", on.saturation_std)[:, None, None]
    hue = draws.choose("hue?", on.hue, (draws.uniform["hue"] * 2 - 1) * math.pi * on.hue_max, 0)[:, None, None]
    chroma = saturation * (hue.cos() * (identity - luma) + hue.sin() * cross)
    linear = contrast * (sign * luma + chroma)  # [B, 3, 3]
    brightness = draws.choose("brightness?", on.brightness, draws.normal["brightness"] * on.brightness_std, 0)
    offset = (linear @ brightness[:, None, None].expand(-1, 3, 1)).double()
    if channels == 1:
        linear, offset = linear.sum(2, keepdim=True).mean(1, keepdim=True), offset.mean(1, keepdim=True)
    return torch.cat([linear, offset], dim=2)


def band_gains(on: Augmentations, draws: _Draws) -> Tensor:
    """Gain of each frequency band, float64 [B, 4], so normalised that a natural image keeps its power."""
    power = torch.tensor(_BAND_POWER, dtype=torch.float64)
    gains = torch.ones(len(draws.uniform["band0?"]), _BANDS, dtype=torch.float64)
    for band in range(_BANDS):
        one = torch.ones_like(gains)
        one[:, band] = draws.octaves(f"band{band}?", on.image_filter, f"band{band}", on.image_filter_std)
        gains = gains * one / (power * one.square()).sum(1, keepdim=True).sqrt()
    return gains


def cutout_mask(on: Augmentations, draws: _Draws, height: int, width: int) -> Tensor:
    """bool [B, 1, H, W], true in the rectangle that is cut out; its centre is uniform over the image."""
    inside = []
    for name, side in (("cutout_y", height), ("cutout_x", width)):
        centre, half = draws.uniform[name][:, None] * side, on.cutout_size / 2 * side
        pixel = torch.arange(side)
        inside.append((pixel >= (centre - half).round()) & (pixel < (centre + half).round()))  # [B, side]
    rows = inside[0] & draws.chosen("cutout?", on.cutout)[:, None]
    return (rows[:, :, None] & inside[1][:, None, :])[:, None]


def mix_channels(images: Tensor, matrix: Tensor) -> Tensor:
    """Affine colour map of each image: images [B, C, H, W], matrix [B, C, C + 1] (offset last) -> [B, C, H, W]."""
    matrix = geometry.to_device(matrix, images)
    linear, offset = matrix[:, :, :-1], matrix[:, :, -1, None, None]
    return linear_map(images, _mix, _mix_adjoint, linear) + offset


def _mix(images: Tensor, linear: Tensor) -> Tensor:
    # Element-wise, not by a matrix product that may run in TF32: an image whose colours stay must stay as it is.
    out = linear[:, :, 0, None, None] * images[:, :1]
    for channel in range(1, images.shape[1]):
        out.addcmul_(linear[:, :, channel, None, None], images[:, channel : channel + 1])
    return out


def _mix_adjoint(grad: Tensor, linear: Tensor) -> Tensor:
    return _mix(grad, linear.transpose(1, 2))


# --- Adaptation ---


def adapt(p: float, sign_mean: float, target: float = 0.6, *, images: int, adjust_kimg: float = 500.0) -> float:
    """The next p (section 3): a fixed step up where the discriminator is surer of its reals than `target`, else down.

    sign_mean: mean of sign(D(real)) since the last call, the paper's r_t. images: how many were shown since then;
    adjust_kimg: thousands of images that move p by 1. -> p in [0, 1]; a NaN sign_mean leaves it as it is.
    """
    if not adjust_kimg > 0:
        raise LowVRAMError(f"adjust_kimg={adjust_kimg} must be positive.", "The paper uses 500.")
    direction = (sign_mean > target) - (sign_mean < target)
    return min(max(p + direction * images / (adjust_kimg * 1000), 0.0), 1.0)
