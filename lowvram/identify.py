"""`python -m lowvram.identify FILE...`: what files say and show of where their images come from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.config import report_errors
from lowvram.errors import LowVRAMError

if TYPE_CHECKING:
    from lowvram.marks.reading import Found

_HELP = """python -m lowvram.identify FILE... [json=true]

Tell where images come from, as far as their files say or show it: PNG, JPEG, WebP and MP4 files, or folders of them.

  metadata     the IPTC digital source type and what goes with it, of any program that writes XMP
  watermark    the invisible one of this library, of films in some frames (needs the extra watermark)
  C2PA         signed content credentials of any program, and whether they hold (needs the extra c2pa)

Each with how certain it is. Metadata is a claim that anybody can write or remove; a watermark is found by correlation,
at a rate of false alarms that was measured; a signature proves that nothing changed since, and no more of the signer
than the certificate says. Nothing found is no proof that a person made an image.

  json=true    print it as JSON

Exits with 0 when each file could be read, and with 2 where one could not."""

NOTHING = "nothing found: that is no proof that a person made it"


def main(words: list[str]) -> int:
    """Tell of each file. Returns 2 where one could not be read, else 0. Raises LowVRAMError for wrong words."""
    from lowvram.marks.reading import UnreadableError, look_into

    as_json, names = _parse(words)
    told: list[dict[str, Any]] = []
    failed = False
    for path in _files(names):
        try:
            found = look_into(path)
        except UnreadableError as error:
            failed = True
            told.append({"file": str(path), "error": str(error)})
            lines = [f"can't be read: {error}"]
        else:
            told.append(_as_dict(path, found))
            lines = list(describe(found))
        if not as_json:
            print(f"{_printable(str(path))}\n" + "\n".join(f"  {_printable(line)}" for line in lines), flush=True)
    if as_json:
        print(json.dumps(told, indent=2))
    return 2 if failed else 0


def describe(found: Found) -> list[str]:
    """What was found, in lines, each with how certain it is."""
    from lowvram.marks.origin import KINDS
    from lowvram.marks.watermark import MEASURED, MEASURED_FILMS

    lines = []
    packet = found.packet
    if "source" in packet:
        kind = KINDS.get(packet["source"], packet["source"])
        lines.append(f"metadata: {kind}, says {packet.get('tool', 'a program with no name')}; a claim, not a proof")
        known = {name: value for name, value in packet.items() if name not in ("source", "tool", "version")}
        if known:
            lines.append("  " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items()))
    elif found.texts.get("Software", "").startswith("lowvram "):
        lines.append(f"metadata: {found.texts.get('Description', found.texts['Software'])}; a claim, not a proof")
    if found.watermark is not None and found.watermark.found:
        score, (width, height), frames = found.watermark.score, found.watermark.size, found.watermark.frames
        where = f"{width}x{height}" + (f" in {frames} frames together" if frames > 1 else "")
        measured = MEASURED_FILMS if frames > 1 else MEASURED
        lines.append(f"watermark: that of lowvram, {score:.1f} of 8 standard deviations at {where}; {measured}")
    if found.credentials is not None:
        lines += _signature(found)
    if not found.anything:
        lines.append(NOTHING)
    return lines + found.notes


def _signature(found: Found) -> list[str]:
    from lowvram.marks.origin import KINDS

    credentials = found.credentials
    assert credentials is not None
    source = f", {KINDS.get(credentials.source, credentials.source)}" if credentials.source else ""
    done = ", ".join(name.removeprefix("c2pa.") for name in credentials.actions)
    actions = f" ({done})" if done else ""
    said = f"C2PA: by {credentials.tool or 'a program with no name'}{source}{actions}; signed by {credentials.issuer}"
    if credentials.faults:
        return [f"{said}; it does NOT hold: {', '.join(credentials.faults)}"]
    trust = "and the issuer is trusted" if credentials.trusted else "the issuer is checked against no trust list"
    return [f"{said}; signature and content hold, {trust}"]


def _as_dict(path: Path, found: Found) -> dict[str, Any]:
    mark, credentials = found.watermark, found.credentials
    return {
        "file": str(path),
        "anything": found.anything,
        "metadata": found.packet,
        "texts": found.texts,
        "watermark": None if mark is None else {**asdict(mark), "found": mark.found, "score": round(mark.score, 3)},
        "c2pa": None if credentials is None else {**asdict(credentials), "holds": not credentials.faults},
        "notes": found.notes,
    }


def _parse(words: list[str]) -> tuple[bool, list[str]]:
    """(whether JSON is asked for, the names of files and folders). debug=... is not for us, as in every command."""
    as_json, names = False, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in ("json", "debug") or Path(word).exists():
            names.append(word)
        elif value.lower() not in ("true", "false"):
            raise LowVRAMError(f"{word} is not understood.", f"Write {key}=true.")
        elif key == "json":
            as_json = value.lower() == "true"
    if not names:
        raise LowVRAMError("No file was given.", "Write python -m lowvram.identify FILE...; --help tells more.")
    return as_json, names


def _files(names: list[str]) -> list[Path]:
    """The files that are named, and the images in folders that are, by name."""
    from lowvram.marks.reading import ENDINGS

    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            within = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not within:
                raise LowVRAMError(f"{name} holds no image.", f"It may hold {', '.join(ENDINGS)}.")
            files += within
        elif path.exists():
            files.append(path)
        else:
            raise LowVRAMError(f"{name} is not there.", "Give files or folders; options are json=true alone.")
    return files


def _printable(text: str) -> str:
    """A text of a file's maker without what would steer a terminal."""
    shown = text[:500]
    return "".join(c if c.isprintable() else "\ufffd" for c in shown) + ("…" if len(text) > 500 else "")


def _run() -> None:
    arguments = sys.argv[1:]
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(_HELP)
        return
    sys.exit(main(arguments))


if __name__ == "__main__":
    report_errors(_run, sys.argv[1:])
