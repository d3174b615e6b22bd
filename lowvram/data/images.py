"""Images in a folder or a zip archive."""

from __future__ import annotations

import os
import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from lowvram.data.dataset import BadImageError, ImageSet, Picture
from lowvram.data.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES, decode_square
from lowvram.data.labels import read_labels
from lowvram.errors import LowVRAMError

_WANTED = "PNG, JPEG, WebP or BMP"
_FORMATS = ["PNG", "JPEG", "WEBP", "BMP"]
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
MAX_JSON_BYTES = 2**28


def _is_hidden(file: str) -> bool:
    """Whether a path is a leftover of a file manager: a dotfile (.DS_Store, ._x.png) or within __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in file.split("/"))


def _is_image(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES


def _modified(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return -1


def upright_size(handle: IO[bytes], file: str) -> tuple[int, int]:
    """Width and height of an image, turned upright by its EXIF tag, from its header: no pixel is decoded.

    Raises BadImageError for what is no image of a known format.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(handle, formats=_FORMATS) as image:
                # Of a PNG, PIL would decode all pixels to look for an EXIF chunk behind them.
                has_tag = image.format != "PNG" or "exif" in image.info
                sideways = has_tag and image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS
                return (image.height, image.width) if sideways else image.size
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(file, f"not a {_WANTED} image") from None
    except Exception as error:  # what a parser makes of damaged bytes is not limited to a few kinds
        raise BadImageError(file, f"damaged ({error})") from error


class FileSet(ImageSet):
    """Image files with names, sorted by name. The base of FolderSet and ZipSet.

    max_images takes a fixed random choice of the images (the same each time), so that classes stored one after the
    other all stay; the class numbers are those of the whole set.
    """

    def __init__(
        self,
        path: Path,
        *,
        resolution: int,
        labels: bool,
        max_images: int | None,
        on_bad_file: str,
        bad_file_limit: int,
    ) -> None:
        self.path = path.absolute()
        names = sorted(self._list_files())
        files = [name for name in names if _is_image(name)]
        if not files:
            found = f"{len(names)} files, such as {names[0]}" if names else "no files"
            raise LowVRAMError(
                f"{path} holds no images: {found}",
                f"data.path should name a folder or a zip with {_WANTED} files in it, at any depth.",
            )
        numbers: NDArray[np.int64] | None = None
        class_names: list[str] | None = None
        prefix = self._common_folder(names)
        if labels:
            json_name = prefix + "dataset.json"
            try:
                content = self._read(json_name, MAX_JSON_BYTES) if json_name in names else None
            except BadImageError as error:
                raise LowVRAMError(
                    f"dataset.json of {path} cannot be read: {error.reason}", "Mend it, or set data.labels=false."
                ) from error
            numbers, class_names = read_labels([file[len(prefix) :] for file in files], content, path.name)
        if max_images is not None and max_images < len(files):
            # RandomState keeps its numbers from one numpy to the next, which the newer generators do not promise.
            kept = np.sort(np.random.RandomState(0).permutation(len(files))[:max_images])
            files = [files[at] for at in kept]
            numbers = None if numbers is None else numbers[kept]
        self.files = files
        super().__init__(
            name=path.name,
            resolution=resolution,
            labels=numbers,
            class_names=class_names,
            on_bad_file=on_bad_file,
            bad_file_limit=bad_file_limit,
        )

    @staticmethod
    def _common_folder(names: list[str]) -> str:
        """ "faces/" where the one thing in the archive or folder is a folder `faces` of further folders, else ""."""
        prefix = names[0].split("/", 1)[0] + "/"
        within = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        return prefix if len(within) == len(names) and any("/" in name for name in within) else ""

    @abstractmethod
    def _list_files(self) -> list[str]:
        """Every file that is not hidden, as a relative path with "/"."""

    @abstractmethod
    def _read(self, file: str, limit_bytes: int) -> bytes:
        """The bytes of a file. Raises BadImageError."""

    def other_files(self) -> tuple[str, set[str]]:
        """What lies beside the images: the folder that holds everything ("faces/", or ""), and the paths of all files
        that are no images and not hidden."""
        names = self._list_files()
        return self._common_folder(names), {name for name in names if not _is_image(name)}

    def read_file(self, file: str, limit_bytes: int) -> bytes:
        """The bytes of a file of the set, by its path as in `files`. Raises BadImageError, also beyond the limit."""
        return self._read(file, limit_bytes)

    @abstractmethod
    def _open(self, file: str) -> IO[bytes]:
        """A file to read from."""

    def size(self, index: int) -> tuple[int, int]:
        file = self.files[index]
        try:
            with self._open(file) as handle:
                return upright_size(handle, file)
        except (BadImageError, MemoryError, LowVRAMError):
            raise
        except Exception as error:  # of a folder OSError; of a zip also zlib.error, RuntimeError (encrypted) and more
            raise BadImageError(file, f"cannot be read ({error})") from error

    def __len__(self) -> int:
        return len(self.files)

    def file_name(self, index: int) -> str:
        return self.files[index]

    def load(self, index: int) -> Picture:
        file = self.files[index]
        return decode_square(self._read(file, MAX_FILE_BYTES), file=file, resolution=self.resolution)


class FolderSet(FileSet):
    """Every image below a folder; links to folders are followed once."""

    def _list_files(self) -> list[str]:
        return list(self._walk(self.path, "", set()))

    def _walk(self, folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise LowVRAMError(
                f"the folder {folder} cannot be read: {error.strerror or error}", "Check data.path and its permissions."
            ) from error
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from self._walk(folder / entry.name, f"{prefix}{entry.name}/", seen)
            else:
                yield prefix + entry.name

    def _read(self, file: str, limit_bytes: int) -> bytes:
        try:
            with (self.path / file).open("rb") as handle:
                data = handle.read(limit_bytes + 1)
        except OSError as error:
            raise BadImageError(file, f"cannot be read ({error.strerror or error})") from error
        if len(data) > limit_bytes:
            raise BadImageError(file, f"larger than {limit_bytes:,} bytes")
        return data

    def _open(self, file: str) -> IO[bytes]:
        return (self.path / file).open("rb")

    def times(self) -> list[str]:
        return [str(_modified(self.path / file)) for file in self.files]

    def identity(self) -> list[str]:
        return [str(self.path), *self.inside()]

    def inside(self) -> list[str]:
        parts = []
        for file in self.files:
            try:
                size = (self.path / file).stat().st_size
            except OSError:
                size = -1
            parts.append(f"{file}:{size}")
        return parts


class ZipSet(FileSet):
    """Every image in a zip archive."""

    _archive: zipfile.ZipFile | None = None
    _owner_pid = 0

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None, "_owner_pid": 0}

    def __del__(self) -> None:
        # Forked children share the descriptor's position, not the descriptor: closing their copy harms nobody.
        if self._archive is not None:
            self._archive.close()

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._owner_pid != os.getpid():
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise LowVRAMError(
                    f"{self.path} is not a zip archive that can be read: {error}",
                    "Check that it was copied whole (`python -m zipfile -t FILE`), or give a folder of images.",
                ) from error
            self._owner_pid = os.getpid()
        return self._archive

    def _list_files(self) -> list[str]:
        names = []
        for info in self._zip().infolist():
            name = info.filename
            parts = name.replace("\\", "/").split("/")
            if ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
                raise LowVRAMError(
                    f"{self.path} holds an entry that points outside the archive: {name!r}",
                    "Such an archive is made to overwrite files, or broken: pack the images again.",
                )
            if not info.is_dir() and not _is_hidden(name):
                names.append(name)
        return list(dict.fromkeys(names))

    def _read(self, file: str, limit_bytes: int) -> bytes:
        archive = self._zip()
        info = archive.getinfo(file)
        if info.file_size > limit_bytes:
            raise BadImageError(file, f"unpacks to {info.file_size:,} bytes, more than {limit_bytes:,}")
        try:
            return archive.read(info)
        except MemoryError:
            raise
        except Exception as error:  # zlib.error, BadZipFile, EOFError, RuntimeError (encrypted) and more
            raise BadImageError(file, f"cannot be unpacked ({error})") from error

    def _open(self, file: str) -> IO[bytes]:
        return self._zip().open(file)

    def identity(self) -> list[str]:
        return [str(self.path), *self.inside()]

    def inside(self) -> list[str]:
        archive = self._zip()
        return [f"{file}:{archive.getinfo(file).CRC}" for file in self.files]
