"""ImageSet: what every source of images offers, and what happens when one of its files cannot be read."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowvram.errors import LowVRAMError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class BadImageError(Exception):
    """One file that cannot be used: its name, and why."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class Picture(NamedTuple):
    """One decoded image: uint8 [R, R, 3], and whether it had to be enlarged to get there."""

    pixels: NDArray[np.uint8]
    enlarged: bool = False


class Fetched(NamedTuple):
    """What `ImageSet.fetch` gives for an index; when files were skipped, picture and label are of the next good one."""

    pixels: NDArray[np.uint8]  # [R, R, 3]
    label: int  # -1 without labels
    skipped: list[str]  # "file: reason"
    enlarged: str | None  # name of the image, where it is smaller than the resolution


class Item(NamedTuple):
    """What a loader is given for an index: as `Fetched`, with the array as it goes into a batch."""

    array: NDArray[Any]  # item_shape, item_dtype
    label: int
    skipped: list[str]
    enlarged: str | None


@dataclass(kw_only=True)
class SkipLog:
    """Counts the distinct bad files seen by this process, says each once, and stops the run beyond `limit`."""

    limit: int
    set_name: str
    lines: list[str] = field(default_factory=list)  # "file: reason", each once
    said_enlarged: bool = False

    def report(self, skipped: list[str]) -> None:
        """Note skipped files; raise LowVRAMError once more than `limit` distinct ones are known."""
        for line in skipped:
            if line in self.lines:
                continue
            self.lines.append(line)
            log.warning("skipped %s (the next good image takes its place)", line)
            if len(self.lines) > self.limit:
                raise too_many_bad_files(self.lines, self.limit, self.set_name)

    def note_enlarged(self, name: str | None, resolution: int) -> None:
        """Say once that images smaller than the resolution are enlarged."""
        if name is None or self.said_enlarged:
            return
        self.said_enlarged = True
        log.warning(
            "%s is smaller than %dx%d and is enlarged, as is every other such image of %s (said once)",
            name,
            resolution,
            resolution,
            self.set_name,
        )


def too_many_bad_files(lines: list[str], limit: int, set_name: str) -> LowVRAMError:
    """The error for more than `limit` unreadable files; names the first few."""
    shown = "; ".join(lines[:3]) + ("; ..." if len(lines) > 3 else "")
    return LowVRAMError(
        f"{len(lines)} files of {set_name} cannot be used, more than bad_file_limit={limit}: {shown}",
        "Remove or replace them, or raise data.bad_file_limit. `python -m lowvram.data` lists every bad file.",
    )


class ImageSet(ABC):
    """A fixed, ordered set of square RGB images.

    name: how messages call it. resolution: R, in pixels. channels: 3. class_names: one for each class, empty
    without labels. labels: int64 [len], or None. `images[i]` is a uint8 tensor [3, R, R]. An instance can be pickled
    and forked: file handles belong to a process and are opened when first needed.
    """

    channels = 3
    crops = 1  # that `read` can choose from
    item_dtype: type[np.generic] = np.uint8

    def __init__(
        self,
        *,
        name: str,
        resolution: int,
        labels: NDArray[np.int64] | None = None,
        class_names: list[str] | None = None,
        on_bad_file: str = "skip",
        bad_file_limit: int = 100,
    ) -> None:
        self.name = name
        self.resolution = resolution
        self.labels = labels
        self.class_names = class_names or []
        self.on_bad_file = on_bad_file
        self.bad_file_limit = bad_file_limit
        self.skip_log = SkipLog(limit=bad_file_limit, set_name=name)
        self._bad: dict[int, str] = {}  # index -> "file: reason", so that a bad file is tried once by each process

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Picture:
        """Decode image `index` (0 <= index < len), with no replacement. Raises BadImageError."""

    @abstractmethod
    def file_name(self, index: int) -> str:
        """What messages and `python -m lowvram.data` call image `index`."""

    @abstractmethod
    def identity(self) -> list[str]:
        """What makes this set of images itself: where it is, and what is in it."""

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image `index`, upright, before it is cropped, from its header. Raises BadImageError."""
        return self.resolution, self.resolution

    def times(self) -> list[str]:
        """When each image was last changed, where `identity` cannot tell an image that was edited in place."""
        return []

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return len(self.class_names)

    def label(self, index: int) -> int:
        """The class of image `index`, or -1 without labels."""
        return -1 if self.labels is None else int(self.labels[index])

    def inside(self) -> list[str]:
        """`identity` without where it is, so that a copy elsewhere has the same."""
        return self.identity()

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stay while the images stay: for caching what was computed from them."""
        return self._digest(self.identity())

    @property
    def contents(self) -> str:
        """As `fingerprint`, of a copy in another place or on another machine too: to know a run's data again."""
        return self._digest(self.inside())

    def _digest(self, parts: list[str]) -> str:
        digest = hashlib.sha256()
        for part in [type(self).__name__, str(len(self)), str(self.resolution), *parts]:
            digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:16]

    def fetch(self, index: int) -> Fetched:
        """Image and label at `index`; a bad file gives the next good one, by index, and is reported as skipped.

        Raises LowVRAMError: on a bad file where `on_bad_file` is "error", and after `bad_file_limit` in a row.
        """
        skipped: list[str] = []
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at not in self._bad:
                try:
                    picture = self.load(at)
                except BadImageError as bad:
                    if self.on_bad_file == "error":
                        raise LowVRAMError(
                            f"{bad.file} of {self.name} cannot be used: {bad.reason}",
                            "Remove or replace it, or set data.on_bad_file=skip.",
                        ) from bad
                    self._bad[at] = str(bad)
                else:
                    enlarged = self.file_name(at) if picture.enlarged else None
                    return Fetched(picture.pixels, self.label(at), skipped, enlarged)
            skipped.append(self._bad[at])
            if len(skipped) > self.bad_file_limit:
                break
        if len(skipped) < len(self):
            raise too_many_bad_files(skipped, self.bad_file_limit, self.name)
        raise LowVRAMError(
            f"none of the {len(self)} images of {self.name} can be used, the first: {skipped[0]}",
            "Check that data.path names a folder or zip of PNG, JPEG or WebP images.",
        )

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of what `read` gives."""
        return (self.channels, self.resolution, self.resolution)

    def read(self, index: int, *, mirrored: bool = False, crop: int = 0) -> Item:
        """Image `index` as it goes into a batch, uint8 [3, R, R]; otherwise as `fetch`."""
        pixels, label, skipped, enlarged = self.fetch(index)
        return Item((pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1), label, skipped, enlarged)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` as a uint8 tensor [3, R, R]; bad files are logged and replaced as in `fetch`."""
        import torch

        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        fetched = self.fetch(index % len(self))
        self.skip_log.report(fetched.skipped)
        self.skip_log.note_enlarged(fetched.enlarged, self.resolution)
        return torch.from_numpy(np.ascontiguousarray(fetched.pixels.transpose(2, 0, 1)))


class DerivedSet(ImageSet):
    """What is made of another set's images, one for one: it has their names, labels and log of bad files."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__(
            name=images.name,
            resolution=images.resolution,
            labels=images.labels,
            class_names=images.class_names,
            on_bad_file=images.on_bad_file,
            bad_file_limit=images.bad_file_limit,
        )
        self.images = images
        self.skip_log = images.skip_log

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Picture:
        return self.images.load(index)

    def file_name(self, index: int) -> str:
        return self.images.file_name(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.images.size(index)

    def times(self) -> list[str]:
        return self.images.times()
