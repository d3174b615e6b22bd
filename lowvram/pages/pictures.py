"""Sample grids as small pictures within the page: a few over the whole training, each in so many bytes at most.

What was encoded is kept for as long as the process runs, so that a training encodes each grid once.
"""

import base64
import functools
import io
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.marks import xmp

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

_NAME = re.compile(r"fakes_(\d{1,9})\.png")
_MOST_FRAMES = 24
_MOST_FILE_BYTES = 256 * 2**20
_MOST_PIXELS = 100_000_000  # 96 images of 1024x1024; decoded they take 300 MB
_SMALL_PIXELS = 256 * 256  # such a picture is embedded without loss
_MOST_BYTES = 190_000
_MOST_ORIGIN_BYTES = 64_000  # what a JPEG has room for
_SIZES = ((1024, 84), (960, 76), (768, 72), (640, 64), (480, 50), (320, 40))  # longer side in pixels, JPEG quality


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data: address. width, height: of what is embedded, in pixels. small: shown with hard edges."""

    address: str
    width: int
    height: int
    small: bool


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A grid. kimg: thousands of images seen, as its name says. picture: None where it can't be shown, for a reason."""

    kimg: int
    name: str
    picture: Picture | None
    reason: str = ""


def grids(folder: Path, names: list[str]) -> list[tuple[int, Path]]:
    """The sample grids among the names of a run folder's files, by thousands of images seen."""
    found = {int(match[1]): folder / name for name in names if (match := _NAME.fullmatch(name))}
    return sorted(found.items())


def chosen(all_: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most _MOST_FRAMES + 1 at even distances, first and last among them.

    As a run grows, every second one of those chosen falls out, so that none has to be encoded again.
    """
    stride = 1
    while len(all_) > _MOST_FRAMES * stride:
        stride *= 2
    some = all_[::stride]
    return some if not all_ or some[-1] == all_[-1] else [*some, all_[-1]]


def frames(selected: list[tuple[int, Path]], seconds: float | None = None) -> list[Frame]:
    """The pictures of grids, in their order. seconds: what encoding may take, the newest and the first before others.

    What there is no time for is left out; a later call, which finds the rest done, has it.
    """
    begun = time.monotonic()
    order = sorted(range(len(selected)), key=lambda n: (n not in (0, len(selected) - 1), -n))
    done: dict[int, Frame] = {}
    for n in order:
        kimg, path = selected[n]
        late = seconds is not None and n != len(selected) - 1 and time.monotonic() - begun > seconds
        if late and not _is_known(path):
            continue
        picture, reason = picture_of(path)
        done[n] = Frame(kimg=kimg, name=path.name, picture=picture, reason=reason)
    return [done[n] for n in sorted(done)]


def picture_of(path: Path) -> tuple[Picture | None, str]:
    """A PNG file as a picture, or None and why not. Links are not followed: a foreign folder could show any file."""
    try:
        status = path.lstat()
        if path.is_symlink() or not path.is_file():
            return None, "is no file"
        if status.st_size > _MOST_FILE_BYTES:
            return None, "is too large"
        key = (str(path.absolute()), status.st_mtime_ns, status.st_size)
        _KNOWN.add(key)
        return _encoded(*key)
    except OSError as error:
        return None, f"can't be read: {error.strerror or error}"


_KNOWN: set[tuple[str, int, int]] = set()


def _is_known(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return True
    return (str(path.absolute()), status.st_mtime_ns, status.st_size) in _KNOWN


@functools.lru_cache(maxsize=128)
def _encoded(path: str, _changed: int, _size: int) -> tuple[Picture | None, str]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that holds
            opened = Image.open(path, formats=["PNG"])
        with opened:
            if opened.width * opened.height > _MOST_PIXELS:
                return None, f"has {opened.width} x {opened.height} pixels, too many to show"
            image = opened.convert("RGB")
            origin = _origin_of(opened)
    except Image.DecompressionBombError:
        return None, "has too many pixels to show"
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError):  # what PIL raises for broken files
        return None, "is no picture that can be read"
    small = image.width * image.height <= _SMALL_PIXELS
    if small:
        lossless = io.BytesIO()
        image.save(lossless, format="PNG", optimize=True, pnginfo=_texts(origin))
        if lossless.tell() <= _MOST_BYTES:
            return _picture(image, "png", lossless.getvalue(), small=True), ""
    for side, quality in _SIZES:
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        jpeg = io.BytesIO()
        image.save(jpeg, format="JPEG", quality=quality, optimize=True, xmp=origin)
        if jpeg.tell() <= _MOST_BYTES:
            break
    return _picture(image, "jpeg", jpeg.getvalue(), small=small), ""


def _origin_of(image: "Image.Image") -> bytes:
    """What the picture says of how it was made: an image that is saved from the page says it too. b"" for nothing."""
    packet = image.info.get("XML:com.adobe.xmp") or ""
    content = packet.encode("utf-8", "replace") if isinstance(packet, str) else b""
    try:
        xmp.read(content)
    except xmp.BadPacketError:
        return b""
    return content if len(content) <= _MOST_ORIGIN_BYTES else b""


def _texts(origin: bytes) -> "PngInfo":
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    if origin:
        texts.add_itxt("XML:com.adobe.xmp", origin.decode())
    return texts


def _picture(image: "object", kind: str, content: bytes, *, small: bool) -> Picture:
    width, height = image.size  # type: ignore[attr-defined]
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return Picture(address=address, width=width, height=height, small=small)
