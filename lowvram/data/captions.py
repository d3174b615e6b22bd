"""A caption for each image: the built-in faces in words, text files beside the images, or metadata.jsonl."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import overload

import numpy as np

from lowvram.data.caption_variants import folder_prompt
from lowvram.data.dataset import BadImageError, DerivedSet, ImageSet
from lowvram.data.face_words import caption
from lowvram.data.image_cache import cache_root
from lowvram.data.images import MAX_JSON_BYTES, FileSet
from lowvram.data.peeps import PeepsSet, attributes, drawing_key
from lowvram.errors import LowVRAMError

__all__ = ["MAX_CAPTION_BYTES", "Captions", "caption", "read_captions"]

log = logging.getLogger(__name__)

MAX_CAPTION_BYTES = 2**16  # a text encoder reads some hundred bytes: what is longer is another kind of file
METADATA = "metadata.jsonl"
_BESIDE = (".caption", ".txt")  # of two beside an image the later counts
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Captions(Sequence[str]):
    """The caption of each image, in the order of the set; "" stands for none, on which a model learns unconditionally.

    texts: one for each image. bad: "file: reason" of each caption that could not be used. outside: entries of
    metadata.jsonl that point outside the set. unused: its entries for images that are not in the set.
    """

    texts: tuple[str, ...]
    bad: list[str] = field(default_factory=list)
    outside: int = 0
    unused: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]

    @property
    def missing(self) -> int:
        """How many images have no caption, bad ones among them."""
        return sum(not text for text in self.texts)

    @classmethod
    def joined(cls, *parts: Captions) -> Captions:
        """The captions of several sets, one after the other."""
        return cls(
            texts=tuple(text for part in parts for text in part.texts),
            bad=[line for part in parts for line in part.bad],
            outside=sum(part.outside for part in parts),
            unused=sum(part.unused for part in parts),
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stay while the captions stay: for caching what was computed from them."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()[:16]


def read_captions(images: ImageSet, *, missing: str = "unconditional", prompt: str | None = None) -> Captions:
    """The captions of an ImageSet.

    The built-in faces are described by their attributes. In a folder or zip, `metadata.jsonl` at its root (or in the
    one folder that holds all) says `{"file_name": "a/1.png", "text": "..."}` on each line; an image that it leaves out
    takes the .txt (or .caption) file of its own name (a/1.txt for a/1.png), whose lines are joined. Texts are UTF-8;
    each run of white space becomes a space. A text above 64 KiB, bad UTF-8 and a line that is not such an object count
    as bad. What is derived from a set, image for image, has that set's captions.

    missing: for an image without a usable caption, "unconditional" leaves it empty and says how many there are;
    "error" stops.
    prompt: the caption of images that have none, as in DreamBooth (arXiv 2208.12242), where one serves all; then none
    is missing. {folder} in it stands for the name of the image's folder (see `folder_prompt`).
    Raises LowVRAMError: for an image without caption and prompt, where missing is "error"; and where no image has one.
    """
    if missing not in ("unconditional", "error"):
        raise LowVRAMError(f"missing={missing!r} is neither unconditional nor error", "Use one of the two.")
    if isinstance(images, DerivedSet) and len(images) == len(images.images):
        return read_captions(images.images, missing=missing, prompt=prompt)
    if isinstance(images, PeepsSet):
        return Captions(texts=tuple(_of_faces(len(images))))
    if not isinstance(images, FileSet):
        if prompt is not None:
            return Captions(texts=(_clean(folder_prompt(prompt, "")),) * len(images))
        raise LowVRAMError(
            f"{images.name} has no captions: it is neither the built-in faces, nor a folder, nor a zip",
            "Train without captions, or on a folder or zip with .txt files or a metadata.jsonl.",
        )
    captions = _Reader(images, prompt).read()
    _report(captions, images, missing)
    return captions


def _of_faces(count: int) -> list[str]:
    """Captions of the first `count` built-in faces; kept on disk, since to draw up 10,000 takes eight seconds."""
    file = cache_root() / drawing_key() / "captions.json"
    kept: list[str] = []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())
        # A few are made anew, so that captions of another version, in other words, are never taken for these.
        if isinstance(content, list) and all(isinstance(text, str) for text in content):
            some = np.unique(np.linspace(0, len(content) - 1, 32).astype(int)).tolist() if content else []
            kept = content if all(content[at] == caption(attributes(at)) for at in some) else []
    if len(kept) >= count:
        return kept[:count]
    texts = kept + [caption(attributes(index)) for index in range(len(kept), count)]
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(texts), encoding="utf-8")
        temporary.replace(file)
    except OSError:  # a cache that cannot be written costs seconds, and says so where pictures are kept
        with contextlib.suppress(OSError):
            temporary.unlink()
    return texts


def _report(captions: Captions, images: FileSet, missing: str) -> None:
    total, without = len(captions), captions.missing
    shown = "; ".join(captions.bad[:_SHOWN]) + ("; ..." if len(captions.bad) > _SHOWN else "")
    why = f" ({len(captions.bad)} captions cannot be used: {shown})" if captions.bad else ""
    if without == total:
        raise LowVRAMError(
            f"none of the {total} images of {images.name} has a caption{why}",
            f'Put a .txt beside each image, or a {METADATA} of {{"file_name": ..., "text": ...}} lines at the root.',
        )
    if missing == "error" and (without or captions.bad):
        first = next((images.files[at] for at, text in enumerate(captions.texts) if not text), "")
        which = f"{without} of {total} images of {images.name} have no caption, {first} first" if without else ""
        raise LowVRAMError(
            f"{which or f'captions of {images.name} cannot be used'}{why}",
            "Mend or add these captions, or set missing=unconditional to train on these images without.",
        )
    if without:
        log.warning(
            "%d of %d images of %s have no caption and train unconditionally%s", without, total, images.name, why
        )
    elif captions.bad:
        log.warning("%d captions of %s cannot be used: %s", len(captions.bad), images.name, shown)
    if captions.outside or captions.unused:
        log.warning(
            "%s of %s names %d files outside the set and %d that are none of its images: ignored",
            METADATA,
            images.name,
            captions.outside,
            captions.unused,
        )


class _Reader:
    """Collects the captions of one FileSet. prompt: for images without."""

    def __init__(self, images: FileSet, prompt: str | None = None) -> None:
        self.images = images
        self.prompt = prompt
        self.root, self.others = images.other_files()
        self.bad: list[str] = []
        self.outside = 0
        self.unused = 0

    def read(self) -> Captions:
        beside = {_stem(file): file for end in _BESIDE for file in self.others if file.lower().endswith(end)}
        listed = self._listed() if self.root + METADATA in self.others else {}
        texts = []
        for file in self.images.files:
            text = listed.pop(file, "")
            if not text and _stem(file) in beside:
                text = self._beside(beside[_stem(file)])
            if not text and self.prompt is not None:
                text = _clean(folder_prompt(self.prompt, file))
            texts.append(text)
        self.unused = len(listed)
        return Captions(texts=tuple(texts), bad=self.bad, outside=self.outside, unused=self.unused)

    def _beside(self, file: str) -> str:
        try:
            return _clean(self.images.read_file(file, MAX_CAPTION_BYTES).decode("utf-8-sig"))
        except BadImageError as bad:
            self.bad.append(str(bad))
        except UnicodeDecodeError as error:
            self.bad.append(f"{file}: not UTF-8 ({error.reason} at byte {error.start})")
        return ""

    def _listed(self) -> dict[str, str]:
        """Captions of metadata.jsonl by the image's path in the set; of two lines for one image the later counts."""
        file = self.root + METADATA
        try:
            content = self.images.read_file(file, MAX_JSON_BYTES)
        except BadImageError as bad:
            self.bad.append(str(bad))
            return {}
        listed = {}
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                name, text = _entry(line)
            except ValueError as error:
                self.bad.append(f"{file} line {number}: {error}")
                continue
            path = _inside(name)
            if path is None:
                self.outside += 1
            else:
                listed[self.root + path] = text
        return listed


def _entry(line: bytes) -> tuple[str, str]:
    """file_name and text of a line. Raises ValueError with what is wrong with it."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__}, not an object")
    for key in ("file_name", "text"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f'no "{key}"' if key not in entry else f'"{key}" is not a string')
    if len(entry["text"].encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
        raise ValueError(f"a text larger than {MAX_CAPTION_BYTES:,} bytes")
    return entry["file_name"], _clean(entry["text"])


def _inside(name: str) -> str | None:
    """The path in the set that a file_name stands for, None where it leads outside."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or PureWindowsPath(name).drive:
        return None
    return "/".join(parts)


def _clean(text: str) -> str:
    """Without control characters and halves of surrogate pairs, each run of white space as one space."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join("".join(sign if sign.isprintable() else " " for sign in whole).split())


def _stem(file: str) -> str:
    """The path without its last suffix."""
    return str(PurePosixPath(file).with_suffix(""))
