"""What becomes of a caption before it is read: words before and after it, tags in another order, tags left out."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from lowvram.errors import LowVRAMError

_DRAWN = 8  # variants of each caption, unless another number is wanted
TEMPLATED = "{template}"  # the caption of an image that takes one of `CaptionOptions.templates`


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How captions are varied. Tags are what commas separate.

    prefix, suffix: put before and after each caption, with a space between unless a comma begins what follows; they
        are neither shuffled nor dropped. An image without a caption stays without.
    shuffle: the order of tags is drawn anew. keep: the first so many tags stay where they are, and are never dropped.
    tag_dropout: how often each other tag is left out, 0 to 1.
    variants: of each caption; None: 8 where something is drawn, else the caption alone.
    templates: what the caption TEMPLATED stands for, each of them a variant; they have the prefix and suffix too.

    Raises LowVRAMError for values that are out of range, or say nothing.
    """

    prefix: str = ""
    suffix: str = ""
    shuffle: bool = False
    keep: int = 0
    tag_dropout: float = 0.0
    variants: int | None = None
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.tag_dropout <= 1:
            raise LowVRAMError(f"tag_dropout={self.tag_dropout} is not within 0 to 1.", "0.1 drops a tenth of them.")
        for name, value, least in (("keep", self.keep, 0), ("variants", self.variants, 1)):
            if value is not None and value < least:
                raise LowVRAMError(f"{name}={value} is below {least}.", f"Use {least} or more.")
        if self.draws and self.variants == 1:
            raise LowVRAMError(
                "variants=1 of captions whose tags are shuffled or dropped: each would be drawn once and stay so.",
                f"Leave variants out, which makes {_DRAWN}, or use more than 1.",
            )

    @property
    def draws(self) -> bool:
        """Whether variants differ."""
        return self.shuffle or self.tag_dropout > 0

    @property
    def count(self) -> int:
        """How many variants each caption has."""
        if not self.draws:
            return 1
        return _DRAWN if self.variants is None else self.variants


def variants_of(caption: str, options: CaptionOptions) -> list[str]:
    """The variants of a caption, `options.count` of them; they depend on its text and the options alone.

    Where tags are drawn, each variant is, and two may be alike. "" stays "": no caption. Of TEMPLATED there are as many
    as templates.
    """
    if not caption:
        return [""] * options.count
    if caption == TEMPLATED and options.templates:
        return [_joined(options, template) for template in options.templates]
    if not options.draws:
        return [_joined(options, caption)]
    tags = tags_of(caption)
    fixed, loose = tags[: options.keep], tags[options.keep :]
    seed = zlib.crc32(caption.encode("utf-8", "surrogatepass"))
    drawn = []
    for number in range(options.count):
        random = np.random.RandomState([seed, number])  # the same numbers with any numpy
        order = random.permutation(len(loose)) if options.shuffle else np.arange(len(loose))
        stays = random.random_sample(len(loose)) >= options.tag_dropout
        chosen = [loose[at] for at in order.tolist() if stays[at]]
        drawn.append(_joined(options, ", ".join(fixed + chosen)))
    return drawn


def tags_of(caption: str) -> list[str]:
    """What commas separate, without the spaces around it; empty ones are left out."""
    return [tag for tag in (part.strip() for part in caption.split(",")) if tag]


def folder_prompt(prompt: str, file: str) -> str:
    """A prompt for images without captions, in which {folder} stands for the name of the image's folder.

    Of a name such as "10_sks dog", with which other trainers say how often to show its images, "sks dog" counts.
    file: the image's path in its set, with "/"; at the root the folder has no name.
    """
    folder = file.rsplit("/", 2)[-2] if "/" in file else ""
    return " ".join(prompt.replace("{folder}", re.sub(r"^\d+_", "", folder)).split())


def _joined(options: CaptionOptions, caption: str) -> str:
    whole = ""
    for part in (options.prefix, caption, options.suffix):
        part = part.strip()
        gap = "" if not whole or not part or part.startswith(",") else " "
        whole += gap + part
    return whole
