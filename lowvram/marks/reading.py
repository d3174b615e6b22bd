"""What files say of where their image comes from. They may be anybody's: nothing in them is trusted or executed."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import LowVRAMError
from lowvram.marks import frames, xmp
from lowvram.marks.credentials import Credentials
from lowvram.marks.credentials import read as read_credentials
from lowvram.marks.mark import MP4_XMP
from lowvram.marks.watermark import Reading, detect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".mp4")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_WEBP_BYTES = 2**29  # Pillow reads these whole
_TEXTS = ("Software", "Description")
_MOST_BOXES = 1000  # of an MP4, at its top
_MOST_TEXT = 10_000


class UnreadableError(Exception):
    """A file is no image of a kind that is known, or is broken."""


@dataclass(kw_only=True)
class Found:
    """What one file holds.

    packet: its XMP by the names of `xmp.read`. texts: a PNG's or the EXIF's. watermark, credentials: None where there
    is none. notes: what could not be looked for, and what is broken.
    """

    packet: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    watermark: Reading | None = None
    credentials: Credentials | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def anything(self) -> bool:
        """Whether the file says or shows where it comes from."""
        marked = self.watermark is not None and self.watermark.found
        ours = self.texts.get("Software", "").startswith("lowvram ")
        return "source" in self.packet or marked or self.credentials is not None or ours


def look_into(path: Path) -> Found:
    """Read a file's metadata, its signature, and its pixels.

    Raises:
        UnreadableError: it can't be read as an image at all.
    """
    found = Found()
    try:
        with path.open("rb") as file:
            head = file.read(12)
        if head[8:12] == b"WEBP" and path.stat().st_size > _MOST_WEBP_BYTES:
            raise UnreadableError(f"a WebP of more than {_MOST_WEBP_BYTES >> 20} MiB")
        if head[4:8] == b"ftyp":
            packet = _packet_of_mp4(path)
            _find_watermark(found, path)
        else:
            packet, found.texts, pictures = _open(path, found.notes)
            _find_watermark(found, pictures)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    if packet is not None:
        try:
            found.packet = xmp.read(packet)
        except xmp.BadPacketError as error:
            found.notes.append(f"metadata: {error}")
    try:
        found.credentials = read_credentials(path)
    except LowVRAMError:
        found.notes.append('C2PA: not looked for; that needs pip install "lowvram[c2pa]"')
    except (ValueError, OSError) as error:
        found.notes.append(f"C2PA: {error}")
    return found


def _open(path: Path, notes: list[str]) -> tuple[bytes | None, dict[str, str], "list[NDArray[np.uint8]]"]:
    """(XMP, texts, frames [H, W, 3] or none where they can't be decoded) of a PNG, JPEG or WebP file."""
    from PIL import Image

    pictures: list[NDArray[np.uint8]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes: they are checked here
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > frames.MOST_PIXELS:
                    notes.append(f"watermark: not looked for in {image.width}x{image.height} pixels")
                else:
                    try:
                        pictures = frames.of_image(image)
                    except Exception as error:
                        notes.append(f"pixels: broken ({_first_line(error)})")
                # Now, for a PNG may have texts after its pixels.
                return _packet_of(image), _texts_of(image), pictures
        except OSError:
            raise
        except Exception as error:  # decoders fail in ways of their own: struct.error, SyntaxError, DecompressionBomb
            raise UnreadableError(_first_line(error)) from error


def _packet_of(image: Any) -> bytes | None:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(packet, str):
        return packet.encode("utf-8", "replace")
    return packet if isinstance(packet, bytes) else None


def _texts_of(image: Any) -> dict[str, str]:
    texts = {name: str(image.info[name])[:_MOST_TEXT] for name in _TEXTS if isinstance(image.info.get(name), str)}
    try:
        from PIL import ExifTags

        exif = image.getexif()
        for name, tag in (("Software", ExifTags.Base.Software), ("Description", ExifTags.Base.ImageDescription)):
            if isinstance(exif.get(tag), str):
                texts.setdefault(name, exif[tag][:_MOST_TEXT])
    except Exception:  # broken EXIF is common, and Pillow has no one error for it
        return texts
    return texts


def _find_watermark(found: Found, pictures: "list[NDArray[np.uint8]] | Path") -> None:
    """pictures: of a still image one, of an animated one some; or the file of a film."""
    try:
        if isinstance(pictures, Path):
            pictures = frames.of_mp4(pictures)
        if not pictures:
            return
        found.watermark = detect(*pictures)
    except LowVRAMError:
        found.notes.append('watermark: not looked for; that needs pip install "lowvram[watermark]"')
        return
    except ValueError as error:
        found.notes.append(f"watermark: {error}")
        return
    if found.watermark is None:
        height, width = pictures[0].shape[:2]
        found.notes.append(f"watermark: {width}x{height} pixels are too few to tell")


def _packet_of_mp4(path: Path) -> bytes | None:
    """The XMP of an MP4: the content of the first box at its top that has the uuid for it."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        at = 0
        for _ in range(_MOST_BOXES):
            file.seek(at)
            head = file.read(32)
            if len(head) < 8:
                return None
            size, header = int.from_bytes(head[:4], "big"), 8
            if size == 1:
                size, header = int.from_bytes(head[8:16], "big"), 16
            if size < header or at + size > end:
                return None
            if head[4:8] == b"uuid" and head[header : header + 16] == MP4_XMP:
                file.seek(at + header + 16)
                return file.read(min(size - header - 16, xmp.MOST_BYTES + 1))
            at += size
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
