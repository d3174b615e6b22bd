"""Some frames of a stranger's film, in which a watermark is looked for: few, and in bounded time and memory."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.libraries import load

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 4  # that are looked at; more of a walk's, which are much alike, add little
MOST_PIXELS = 100_000_000  # of all that are looked at
_MOST_DECODED = 500_000_000  # pixels until the last of them: some seconds
_MOST_SECONDS = 20.0  # of an MP4
_LEAST_COUNTED = 2**16  # pixels of a frame, as what each costs that is nearly empty


def of_image(image: Any) -> "list[NDArray[np.uint8]]":
    """Of an image that Pillow opened, animated or not: uint8 [H, W, 3] each, as many as can be decoded.

    Raises what a decoder does at the first.
    """
    import numpy as np

    frames = [np.asarray(image.convert("RGB"))]
    # A JPEG's further pictures (MPO) are previews and gain maps.
    count = getattr(image, "n_frames", 1) if image.format in ("PNG", "WEBP") else 1
    for index in _places(count, image.width * image.height)[1:]:
        try:
            image.seek(index)
            frame = np.asarray(image.convert("RGB"))
        except Exception:  # decoders fail in ways of their own
            break
        if frame.shape != frames[0].shape:
            break
        frames.append(frame)
    return frames


def of_mp4(path: Path) -> "list[NDArray[np.uint8]]":
    """Of an MP4, by OpenCV, which the library of the watermark needs too: uint8 [H, W, 3] each.

    Raises:
        LowVRAMError: OpenCV is missing.
        ValueError: nothing can be decoded, frames are too large, or OpenCV can't be told the file's name.
    """
    import numpy as np

    # It reads the level when it is loaded; what is wrong with a file is for us to say.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2 = load("cv2", "a film's watermark", 'Install it with pip install "lowvram[watermark]".')
    # By its whole path a file is never taken for an address on the network.
    name = str(path.resolve())
    try:
        name.encode()
    except UnicodeEncodeError:  # OpenCV dies of one
        raise ValueError("not looked for in a film whose name is not UTF-8") from None
    level = cv2.utils.logging.setLogLevel(0)
    capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
    until = time.monotonic() + _MOST_SECONDS  # frames may be larger than the file says
    try:
        width, height, count = (
            int(capture.get(name))
            for name in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT)
        )
        if width * height > MOST_PIXELS:
            raise ValueError(f"not looked for in {width}x{height} pixels")
        frames: list[NDArray[np.uint8]] = []
        at = 0
        for index in _places(max(count, 1), max(width * height, 1)):
            while at < index and time.monotonic() < until and capture.grab():
                at += 1
            read, frame = capture.read()
            at += 1
            if not read or frame.ndim != 3 or (frames and frame.shape != frames[0].shape):
                break
            frames.append(np.ascontiguousarray(frame[..., ::-1]))
    except cv2.error as error:
        raise ValueError(f"no frame can be decoded ({error.err})") from error
    finally:
        capture.release()
        cv2.utils.logging.setLogLevel(level)
    if not frames:
        raise ValueError("no frame can be decoded")
    return frames


def _places(count: int, pixels: int) -> list[int]:
    """Which of `count` frames of so many pixels are looked at: the first, and others as far apart as the limits let."""
    reached = min(count, max(1, _MOST_DECODED // max(pixels, _LEAST_COUNTED)))
    most = min(MOST, reached, max(1, MOST_PIXELS // pixels))
    return [round(place * (reached - 1) / max(1, most - 1)) for place in range(most)]
