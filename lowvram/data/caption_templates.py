"""Neutral sentences round a new word, one of which stands in for the caption of an image that has none.

So textual inversion learns what the images share, and not what one sentence would say of all (arXiv 2208.01618,
section 4.1).
"""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import LowVRAMError

__all__ = ["OBJECT", "STYLE", "read_templates"]

_MOST_BYTES = 2**18
_MOST_LINES = 2000

OBJECT = (
    "a photo of {}",
    "one photo showing {}",
    "a photo of a single {}",
    "a photo of the {}",
    "a photo of my {}",
    "a plain photo of {}",
    "a sharp photo of {}",
    "a blurred photo of {}",
    "a bright photo of {}",
    "a dim photo of {}",
    "a small photo of {}",
    "a photo taken close to {}",
    "a photo taken far from {}",
    "a photo of {} from the side",
    "a photo of {} in the middle",
    "a snapshot of {}",
    "a picture with {} in it",
    "an image of {}",
    "a view of {}",
    "here is {}",
)

STYLE = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "an artwork in the style of {}",
    "a drawing in the style of {}",
    "a sketch in the style of {}",
    "an illustration in the style of {}",
    "a scene in the style of {}",
    "a detail in the style of {}",
    "a study in the style of {}",
    "a work of art by way of {}",
    "a small painting in the style of {}",
    "a large painting in the style of {}",
    "a bright painting in the style of {}",
    "a dark painting in the style of {}",
    "a plain picture in the style of {}",
    "a rich picture in the style of {}",
    "one of the pictures in the style of {}",
    "something painted as in {}",
    "a canvas that has the look of {}",
    "an image made the way {} is",
)

_KNOWN = {"object": OBJECT, "style": STYLE}


def read_templates(name: str, word: str) -> tuple[str, ...]:
    """Sentences with the word in them. name: object, style, or a text file, one a line with {} where the word goes.

    Raises LowVRAMError: the file is not there, too large, no UTF-8 text or empty; or a line has no {}.
    """
    lines = _KNOWN.get(name) or _lines(name)
    return tuple(line.replace("{}", word) for line in lines)


def _lines(name: str) -> list[str]:
    path = Path(name).expanduser()
    remedy = "Use object, style, none, or a text file with a sentence on each line and {} where the word goes."
    if not path.is_file():
        raise LowVRAMError(f"embedding.templates={name} is neither known nor a file.", remedy)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        lines = [" ".join(line.split()) for line in content.decode("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise LowVRAMError(f"embedding.templates={name} can't be read: {error}.", remedy) from error
    for number, line in enumerate(lines, start=1):
        if line and "{}" not in line:
            raise LowVRAMError(f"embedding.templates={name}: line {number} has no {{}}: {line[:60]!r}.", remedy)
    found = [line for line in lines if line]
    if not 1 <= len(found) <= _MOST_LINES:
        raise LowVRAMError(
            f"embedding.templates={name} has {len(found):,} sentences, not 1 to {_MOST_LINES:,}.", remedy
        )
    return found
