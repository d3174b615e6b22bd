"""An invisible watermark, by the library invisible-watermark (the extra `watermark`): its method dwtDctSvd.

The picture says one thing, that it was made with this library: a fixed pattern of 64 bits, repeated over blocks of 8x8
pixels in the brightness of a colour (wavelet, cosine transform, largest singular value; see the library). Found is a
correlation with the pattern, not a whole text: half of a drawing is blank paper, whose blocks hold nothing.

What was measured is in benchmarks/results/marks.json (`python -m benchmarks.marks`), and in short below.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowvram.errors import LowVRAMError
from lowvram.libraries import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_PIXELS = 256 * 256  # smaller ones the library refuses: too few blocks for the pattern
# Standard deviations; 64 bits that all agree give 8. A correlation of independent bits is as high once in 800,000 times
# (Student's t, 62 degrees of freedom), so once in 160,000 pictures that are looked at in five sizes.
THRESHOLD = 4.4
MEASURED = "measured: no false alarm in 1,200 pictures (120 of them in five sizes), 3 in 2,400,000 by chance"
MEASURED_FILMS = "measured: no false alarm in 80 MP4s of 256 pixels in four sizes, 0 in 1,600,000 by chance"
_MOST_PIXELS = 4096 * 4096  # that are looked through as they are; larger ones in the usual sizes alone
_SIZES = (256, 512, 768, 1024)  # shorter sides that a picture which was scaled may have had
_PATTERN = 0x9AF2_61D4_C7B8_350E  # 32 ones of 64, and unlike itself when shifted
_BITS = 64
_METHOD = "dwtDctSvd"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a picture's blocks say.

    score: standard deviations by which the best size agrees with the pattern. size: (width, height) of that size.
    frames: of a film, that say it together.
    """

    score: float
    size: tuple[int, int]
    frames: int = 1

    @property
    def found(self) -> bool:
        """Whether this is the watermark, by the threshold."""
        return self.score >= THRESHOLD


def check(width: int, height: int) -> None:
    """Raise LowVRAMError unless pictures of that size can be given the watermark, and the library is there."""
    if width * height < LEAST_PIXELS:
        raise LowVRAMError(
            f"a watermark needs a picture of 256x256 or more, and this one has {width}x{height}.",
            "Say watermark=false (mark.watermark=false in training): metadata marks pictures of any size.",
        )
    _library()


def embed(pixels: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """A picture with the watermark in it. pixels: uint8 [H, W, 3], RGB; the result is a new array of that kind.

    Raises:
        LowVRAMError: it is smaller than 256x256, or the library is not installed.
    """
    import numpy as np

    check(pixels.shape[1], pixels.shape[0])
    encoder = _library().WatermarkEncoder()
    encoder.set_by_bits(pattern())
    bgr = encoder.encode(np.ascontiguousarray(pixels[..., ::-1]), _METHOD)
    return np.ascontiguousarray(bgr[..., ::-1])


def detect(*frames: "NDArray[np.uint8]") -> Reading | None:
    """Look for the watermark at the picture's own size and at usual ones. None: the picture is too small to tell.

    frames: uint8 [H, W, 3], RGB: a picture, or some of a film, all of one size. What their blocks say is averaged, so
    that the film is looked at once, as a picture is, and not once for each frame: chance is as rare by the same
    threshold, though the frames be much alike.
    """
    import numpy as np
    from PIL import Image

    height, width = frames[0].shape[:2]
    best = None
    for size in _sizes(width, height):
        pictures = frames
        if size != (width, height):
            images = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
            pictures = tuple(np.asarray(image) for image in images)
        reading = Reading(score=score(*pictures), size=size, frames=len(frames))
        if best is None or reading.score > best.score:
            best = reading
        if best.found:
            break
    return best


def _sizes(width: int, height: int) -> list[tuple[int, int]]:
    """The picture's own, where it has enough pixels and not too many, and usual ones that it may have had."""
    sizes = [(width, height)] if LEAST_PIXELS <= width * height <= _MOST_PIXELS else []
    if max(width, height) > 4 * min(width, height):  # a strip is no size that a picture is made in
        return sizes
    for side in _SIZES:
        scale = side / min(width, height)
        size = round(width * scale), round(height * scale)
        if 0.25 <= scale <= 4 and size not in sizes:
            sizes.append(size)
    return sizes


def score(*frames: "NDArray[np.uint8]") -> float:
    """Standard deviations by which the blocks agree with the pattern, at this size alone.

    Under no watermark the correlation r of 64 independent bits has a standard deviation of 1/8, whatever they are
    averages of.
    """
    import numpy as np

    return float(agreement(np.mean([block_bits(frame) for frame in frames], axis=0), np.array(pattern())))


def block_bits(pixels: "NDArray[np.uint8]") -> "NDArray[np.float64]":
    """What each block says, 0 or 1, in the order of the pattern's repetitions: float64 [blocks]."""
    import numpy as np

    height, width = pixels.shape[:2]
    blocks = (height // 4 // 2) * (width // 4 // 2)  # of 4x4 after a wavelet step halved both sides
    decoder = _library().WatermarkDecoder("bits", blocks)
    bits = decoder.decode(np.ascontiguousarray(pixels[..., ::-1]), _METHOD)
    return np.asarray(bits, dtype=np.float64)


def agreement(blocks: "NDArray[np.float64]", patterns: "NDArray[Any]") -> "NDArray[np.float64]":
    """The correlation of blocks [n] with patterns [..., 64] of 0 and 1, in standard deviations: float64 [...]."""
    import numpy as np

    place = np.arange(len(blocks)) % _BITS
    means = np.bincount(place, weights=blocks, minlength=_BITS) / np.maximum(np.bincount(place, minlength=_BITS), 1)
    said = means - means.mean()
    wanted = patterns - patterns.mean(axis=-1, keepdims=True)
    norms = np.sqrt((said**2).sum() * (wanted**2).sum(axis=-1))
    return np.asarray(wanted @ said / np.maximum(norms, 1e-12) * _BITS**0.5)


def pattern() -> list[int]:
    """The 64 zeros and ones that are looked for."""
    return [_PATTERN >> bit & 1 for bit in range(_BITS)]


def _library() -> Any:
    return load("imwatermark", "a watermark", 'Install it with pip install "lowvram[watermark]".')
