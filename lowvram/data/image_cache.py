"""Pictures kept on disk, for a source that is slow to draw.

Small pictures lie in one file of fixed-size records (checksum, pixels), so that a read is one seek and a few
microseconds. Larger ones lie as one PNG each, since 10,000 raw pictures of 256x256 would take 2 GB. Any number of
processes may read and write at once: a picture is a function of its index, so that two writers write the same bytes,
and a record that is missing, half-written or damaged fails its checksum and is drawn again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

# 10,000 pictures: 31 MB at 32x32, 123 MB at 64x64, and from 128x128 on PNG files (about 45 MB at 128, 500 MB at 1024).
LARGEST_RAW_RESOLUTION = 64

_CHECKSUM_BYTES = 8
_warned = False


def cache_root() -> Path:
    """The folder for all that lowvram keeps: $LOWVRAM_CACHE, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("LOWVRAM_CACHE") or platformdirs.user_cache_dir("lowvram")).expanduser()


def open_cache(key: str, resolution: int) -> ImageCache | None:
    """The cache for pictures of this key and resolution; None, after one warning, where it cannot be written."""
    folder = cache_root() / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        _warn_once(f"cannot write to the cache {folder} ({error.strerror or error}): pictures are drawn anew each time")
        return None
    if resolution <= LARGEST_RAW_RESOLUTION:
        return RawCache(folder / f"{resolution}.raw", resolution)
    return FileCache(folder / str(resolution), resolution)


def png_pixels(png: bytes) -> NDArray[np.uint8]:
    """uint8 [R, R, 3] of an opaque PNG. Raises OSError, SyntaxError or ValueError where the bytes are damaged."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning("%s. Set LOWVRAM_CACHE to a folder that can be written.", message)


class ImageCache(ABC):
    """uint8 pictures [R, R, 3] by index. Never raises for what is wrong on disk: a miss is None, a failed write said
    once and then given up."""

    def __init__(self, path: Path, resolution: int) -> None:
        self.path = path
        self.resolution = resolution
        self._writable = True

    def read(self, index: int) -> NDArray[np.uint8] | None:
        """The picture, or None where it is not there or damaged."""
        try:
            return self._read(index)
        except Exception:  # whatever a damaged file makes of a decoder: the picture is drawn again
            return None

    def write(self, index: int, pixels: NDArray[np.uint8], png: bytes) -> None:
        """Keep a picture, given as pixels and as the PNG they came from."""
        if not self._writable:
            return
        try:
            self._write(index, pixels, png)
        except OSError as error:
            self._writable = False
            _warn_once(f"cannot write to the cache {self.path} ({error.strerror or error}): no more pictures are kept")

    @abstractmethod
    def _read(self, index: int) -> NDArray[np.uint8] | None: ...

    @abstractmethod
    def _write(self, index: int, pixels: NDArray[np.uint8], png: bytes) -> None: ...


class RawCache(ImageCache):
    """One file of records: 8 bytes of checksum, then the pixels [R, R, 3]."""

    def __init__(self, path: Path, resolution: int) -> None:
        super().__init__(path, resolution)
        self._pixel_bytes = resolution * resolution * 3
        self._record_bytes = _CHECKSUM_BYTES + self._pixel_bytes
        self._file: io.FileIO | None = None
        self._owner_pid = 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None, "_owner_pid": 0}

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> io.FileIO:
        # A forked child would share the file position with its parent, hence one handle for each process.
        if self._file is None or self._owner_pid != os.getpid():
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = io.FileIO(os.open(self.path, flags, 0o644), "r+")
            self._owner_pid = os.getpid()
        return self._file

    @staticmethod
    def _checksum(pixels: bytes | memoryview) -> bytes:
        return b"peep" + zlib.crc32(pixels).to_bytes(4, "little")

    def _read(self, index: int) -> NDArray[np.uint8] | None:
        file = self._open()
        file.seek(index * self._record_bytes)
        record = file.read(self._record_bytes)
        pixels = memoryview(record)[_CHECKSUM_BYTES:]
        if len(pixels) != self._pixel_bytes or record[:_CHECKSUM_BYTES] != self._checksum(pixels):
            return None
        return np.frombuffer(pixels, np.uint8).reshape(self.resolution, self.resolution, 3)

    def _write(self, index: int, pixels: NDArray[np.uint8], png: bytes) -> None:
        body = np.ascontiguousarray(pixels).tobytes()
        file = self._open()
        file.seek(index * self._record_bytes)  # past the end leaves a gap, which reads as misses
        file.write(self._checksum(body) + body)


class FileCache(ImageCache):
    """One PNG for each picture, a thousand to a folder; written under another name and renamed."""

    def _file(self, index: int) -> Path:
        return self.path / f"{index // 1000:05d}" / f"{index:08d}.png"

    def _read(self, index: int) -> NDArray[np.uint8] | None:
        pixels = png_pixels(self._file(index).read_bytes())
        return pixels if pixels.shape == (self.resolution, self.resolution, 3) else None

    def _write(self, index: int, pixels: NDArray[np.uint8], png: bytes) -> None:
        target = self._file(index)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_bytes(png)
            temporary.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
