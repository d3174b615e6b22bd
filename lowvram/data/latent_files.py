"""The files of a latent cache: shards, the index that lists them, and the lock of the process that writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvram.bars import bar
from lowvram.errors import LowVRAMError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the same images, key and variants give other files
_HEADER_BYTES = 4096  # of a safetensors file, at most, and what a file system adds
_LOCK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Variants:
    """mirror: each picture also flipped left to right. crops: cuts of each picture, the plain one included."""

    mirror: bool = True
    crops: int = 1

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise LowVRAMError(f"crops={self.crops} must be at least 1", "1 keeps the plain picture alone.")

    @property
    def count(self) -> int:
        return self.crops * (2 if self.mirror else 1)

    def number(self, mirrored: bool, crop: int) -> int:
        """The place of a variant, 0 to count - 1. Raises LowVRAMError where it is not kept."""
        if mirrored and not self.mirror:
            raise LowVRAMError(
                "mirrored latents are wanted, and none were kept",
                "Cache them with mirror=true (the flip of a latent is not the latent of the flip), or do not mirror.",
            )
        if not 0 <= crop < self.crops:
            raise LowVRAMError(f"crop {crop} is wanted, of {self.crops} that were kept", "Cache more crops.")
        return crop * (2 if self.mirror else 1) + int(mirrored)


@dataclass(kw_only=True)
class Shard:
    """One file: the moments of some images, [n, *shape].

    ranges: its images, as (first, last + 1). shape: (variants, 2C, h, w). bytes, sha256: of the file, 0 and "" while
    it is not there. bad: image -> "file: reason".
    """

    file: str
    ranges: list[tuple[int, int]]
    shape: tuple[int, ...]
    bytes: int = 0
    sha256: str = ""
    bad: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    @property
    def complete(self) -> bool:
        return bool(self.sha256)

    @property
    def images(self) -> NDArray[np.int64]:
        """The indices of its images, int64 [n], in the order of its rows."""
        return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in self.ranges])

    def forget(self) -> None:
        """Take the file for missing."""
        self.bytes, self.sha256, self.bad = 0, "", {}


@dataclass(kw_only=True)
class Index:
    """index.json: what the cache was made of, and its shards."""

    folder: Path
    key: dict[str, Any]
    shards: list[Shard]

    @classmethod
    def read(cls, folder: Path, key: dict[str, Any]) -> Index | None:
        """The index in a folder; None where there is none of this key that can be read."""
        file = folder / "index.json"
        try:
            content = json.loads(file.read_bytes())
            if content["key"] != json.loads(json.dumps(key)):
                return None
            shards = [
                Shard(
                    file=str(entry["file"]),
                    ranges=[(int(start), int(stop)) for start, stop in entry["ranges"]],
                    shape=tuple(int(side) for side in entry["shape"]),
                    bytes=int(entry["bytes"]),
                    sha256=str(entry["sha256"]),
                    bad={int(image): str(line) for image, line in entry["bad"].items()},
                )
                for entry in content["shards"]
            ]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s is damaged (%s): its latents are made again", file, error)
            return None
        return cls(folder=folder, key=key, shards=shards)

    def write(self) -> None:
        content = {"key": self.key, "shards": [asdict(shard) for shard in self.shards]}
        _write_whole(self.folder / "index.json", json.dumps(content).encode())

    def drop_damaged(self, progress: bool) -> None:
        """Forget the shards whose file is missing, cut off or altered."""
        complete = [shard for shard in self.shards if shard.complete]
        total = sum(shard.bytes for shard in complete)
        with bar(total, "checking latents", "B", shown=progress and total > 2**30) as shown:
            for shard in complete:
                wrong = self._what_is_wrong(shard)
                if wrong:
                    log.warning("latents %s are made again: %s", self.folder / shard.file, wrong)
                    shard.forget()
                shown.update(shard.bytes)

    def _what_is_wrong(self, shard: Shard) -> str:
        path = self.folder / shard.file
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                return f"{size:,} bytes, not {shard.bytes:,}"
            with path.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        return "" if found == shard.sha256 else "damaged"

    def add(self, shard: Shard, moments: NDArray[np.float16], bad: dict[int, str]) -> None:
        """Write the file of a shard, then list it."""
        from safetensors.numpy import save

        data = save({"moments": moments})
        _write_whole(self.folder / shard.file, data)
        shard.bytes, shard.sha256 = len(data), hashlib.sha256(data).hexdigest()
        shard.bad = {image: bad[image] for image in shard.images.tolist() if image in bad}
        try:
            self.write()
        except LowVRAMError:
            shard.forget()
            raise


def ranges_of(images: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending indices as (first, last + 1) of each run of consecutive ones."""
    ends = np.flatnonzero(np.diff(images) != 1)
    firsts = images[np.concatenate([[0], ends + 1])]
    lasts = images[np.concatenate([ends, [len(images) - 1]])]
    return [(first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]


def check_space(index: Index) -> None:
    """Raise LowVRAMError where the missing shards are more than the disk has free."""
    missing = [shard for shard in index.shards if not shard.complete]
    needed = sum(len(shard) * math.prod(shard.shape) * 2 + _HEADER_BYTES for shard in missing)
    free = shutil.disk_usage(index.folder).free
    if needed > free:
        raise LowVRAMError(
            f"the latents need {needed / 2**30:.2f} GiB in {index.folder}, and {free / 2**30:.2f} GiB are free",
            "Free some space there, name another cache folder, or keep fewer variants (mirror, crops).",
        )


def digest_of(content: Any) -> str:
    """16 hex digits of anything that JSON holds."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that it is never there in part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _writing(path.parent), temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())  # else the name might survive a power cut, and the content not
        with _writing(path.parent):
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None, None, None]:
    """Turn what goes wrong with the disk into a LowVRAMError."""
    try:
        yield
    except OSError as error:
        raise LowVRAMError(
            f"the latents in {folder} cannot be written: {error.strerror or error}; what is complete is kept",
            "Free some space there, or name another cache folder; the next start goes on from here.",
        ) from error


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Generator[None, None, None]:
    """Make a folder and be the one process that writes in it; wait for another.

    The lock of a process that dies goes with it.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("wb")
    with handle:
        said = False
        while not _try_lock(handle.fileno()):
            if not said:
                said = True
                log.warning("another process encodes %s into %s: waiting for it", what, folder)
            time.sleep(_LOCK_SECONDS)
        yield  # closing the file unlocks it


def _try_lock(descriptor: int) -> bool:
    """Lock an open file; False where another process holds it. True also where the file system knows no locks."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # such as NFS without locks: at worst two processes do the same work
        return True
    return True
