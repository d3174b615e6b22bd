"""What a file says of how its image was made."""

from dataclasses import asdict, dataclass

from lowvram import __version__

# https://cv.iptc.org/newscodes/digitalsourcetype/
_IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = _IPTC + "trainedAlgorithmicMedia"  # by a trained model alone
COMPOSITE = _IPTC + "compositeWithTrainedAlgorithmicMedia"  # by a trained model, of a picture that it was given
DRAWN = _IPTC + "algorithmicMedia"  # by a program that learned from nothing: the built-in faces

KINDS = {
    GENERATED: "made by a trained model",
    COMPOSITE: "made by a trained model of another image",
    DRAWN: "drawn by a program, not by a trained model",
}

_LONGEST = 2000  # characters of one value: with all of them, a packet has room in one segment of a JPEG


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How an image was made. The same command gives the same origin: there is no time of day in it.

    No prompt and no path: what people ask for, and what their folders are called, is their own affair, and a picture
    goes further than its maker thinks. The seed and the checkpoint tell the maker which image it is.

    Attributes:
        source: the IPTC digital source type, GENERATED, COMPOSITE or DRAWN.
        recipe: its name.
        checkpoint: "sha256:..." of the weights that made it (see `digests`); None before the first one is written.
        step, images_seen: how long they were trained.
        weights: file names of published weights that were sampled, or that the training began with or stands on.
        seed, index: image `index` of that seed. images: how many are in the picture, for a grid or an animation.
        version: of this library.
    """

    source: str = GENERATED
    recipe: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    images_seen: int | None = None
    weights: str | None = None
    seed: int | None = None
    index: int | None = None
    images: int | None = None
    version: str = __version__

    @property
    def tool(self) -> str:
        """The library and its version."""
        return f"lowvram {self.version}"

    def values(self) -> dict[str, str]:
        """What is known, as texts that any format can hold, without the source type."""
        known = {name: value for name, value in asdict(self).items() if value is not None and name != "source"}
        return {name: plain(str(value)) for name, value in known.items()}

    def sentence(self) -> str:
        """The origin in words."""
        values = self.values()
        said = [KINDS.get(self.source, self.source)]
        for name in ("recipe", "weights", "checkpoint", "step", "seed", "index", "images"):
            if name in values:
                said.append(f"{name} {values[name]}")
        return f"{self.tool}: " + ", ".join(said)


def plain(text: str) -> str:
    """A text cut to a length, with what neither XML nor PNG can hold (control characters, halves of pairs) replaced."""
    kept = "".join(c if _allowed(ord(c)) else "\ufffd" for c in text[: _LONGEST + 1])
    return kept if len(kept) <= _LONGEST else kept[: _LONGEST - 1] + "…"


def _allowed(code: int) -> bool:
    return 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000
