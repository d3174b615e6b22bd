"""One object that knows what to do to each image that a command writes."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.marks import xmp
from lowvram.marks.origin import Origin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lowvram.settings.base import MarkSettings

# How an MP4 holds XMP: a box of the type uuid, with this one (XMP specification part 3, 1.2.8).
MP4_XMP = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What an image carries. Formats are png, jpg, webp and mp4.

    origin: in the metadata, always. watermark: also in the pixels. certificate, key: also signed by these. parent: the
    picture that it is made of, which a signature names.
    """

    origin: Origin
    watermark: bool = False
    certificate: Path | None = None
    key: Path | None = None
    parent: Path | None = None

    def of(self, **changes: Any) -> "Mark":
        """The mark of one image: its seed, its index."""
        return replace(self, origin=replace(self.origin, **changes))

    def check(self, width: int, height: int) -> None:
        """Raise LowVRAMError unless pictures of that size can be marked like this, before any is made."""
        if self.watermark:
            from lowvram.marks import watermark

            watermark.check(width, height)
        if self.certificate is not None and self.key is not None:
            from lowvram.marks import credentials

            credentials.check(self.certificate, self.key, self.parent)

    def pixels(self, pixels: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        """The picture [H, W] or [H, W, 3], uint8, as it is to be written."""
        if not self.watermark:
            return pixels
        import numpy as np

        from lowvram.marks import watermark

        return watermark.embed(np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else pixels)

    def arguments(self, format: str) -> dict[str, Any]:
        """What Pillow's `save` is given for the metadata."""
        packet = xmp.write(self.origin)
        if format != "png":
            exif = self._exif()
            return {"xmp": packet, "exif": exif if format == "jpg" else exif.removeprefix(b"Exif\x00\x00")}
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        for name, value in self.texts().items():
            if value.isascii():
                text.add_text(name, value)
            else:
                text.add_itxt(name, value)
        text.add_itxt("XML:com.adobe.xmp", packet.decode())
        return {"pnginfo": text}

    def texts(self) -> dict[str, str]:
        """The origin as texts: a PNG's own, of which the first two have names that other programs know."""
        own = json.dumps({"digitalSourceType": self.origin.source, **self.origin.values()}, ensure_ascii=False)
        return {"Software": self.origin.tool, "Description": self.origin.sentence(), "lowvram": own}

    def finish(self, path: Path, format: str) -> None:
        """What is done to a file that was written: an MP4's metadata, the signature."""
        if format == "mp4":
            packet = MP4_XMP + xmp.write(self.origin)
            with path.open("ab") as file:
                file.write((8 + len(packet)).to_bytes(4, "big") + b"uuid" + packet)
        if self.certificate is None or self.key is None:
            return
        from lowvram.marks import credentials

        signed = path.with_name(f"{path.name}.{os.getpid()}.signed")
        try:
            sign_with = {"certificate": self.certificate, "key": self.key}
            credentials.sign(path, signed, format=format, origin=self.origin, parent=self.parent, **sign_with)
            signed.replace(path)
        finally:
            signed.unlink(missing_ok=True)

    def _exif(self) -> bytes:
        from PIL import ExifTags, Image

        exif = Image.Exif()
        exif[ExifTags.Base.Software] = self.origin.tool
        exif[ExifTags.Base.ImageDescription] = self.origin.sentence().encode("ascii", "replace").decode()
        return exif.tobytes()


def make_mark(settings: "MarkSettings", origin: Origin, parent: Path | None = None) -> Mark | None:
    """The mark that the settings ask for; None: none. parent: the picture that the images are made of."""
    if not settings.enabled:
        return None
    return Mark(
        origin=origin,
        watermark=settings.watermark,
        certificate=None if settings.certificate is None else Path(settings.certificate).expanduser(),
        key=None if settings.key is None else Path(settings.key).expanduser(),
        parent=parent,
    )
