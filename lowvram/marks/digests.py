"""The hash that names the weights which made an image.

Of one file it is the file's own, as `sha256sum` prints it. Of several it is that of sha256sum's list of them, sorted
by name, as `(cd FOLDER; sha256sum A.safetensors B.safetensors | sha256sum)` prints it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".pkl")


def of_checkpoint(folder: Path, networks: Iterable[str]) -> str:
    """Of those networks of a checkpoint that sampling uses, from its manifest: nothing large is read.

    Raises:
        OSError, ValueError, KeyError: the manifest is missing or broken.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [f"{name}.safetensors" for name in networks]
    return _joined([(name, manifest[name]["sha256"]) for name in names if name in manifest])


def progress_of(folder: Path) -> tuple[int, int]:
    """(step, images seen) of a checkpoint. Raises as `of_checkpoint`."""
    numbers: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return int(numbers["step"]), int(numbers["images_seen"])


def of_files(paths: Sequence[Path]) -> str:
    """Of files of weights, or folders of them, read whole: about a second for each gigabyte.

    Raises:
        OSError: one can't be read.
    """
    hashes = []
    for path in paths:
        found = sorted(p for p in path.rglob("*") if p.suffix in _WEIGHTS and p.is_file()) if path.is_dir() else [path]
        for file in found:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            with file.open("rb") as opened:
                hashes.append((name, hashlib.file_digest(opened, "sha256").hexdigest()))
    return _joined(hashes)


def _joined(hashes: list[tuple[str, str]]) -> str:
    """hashes: (name, hash) of each file; two may have the same name."""
    if len(hashes) == 1:
        return f"sha256:{hashes[0][1]}"
    listed = "".join(f"{own}  {name}\n" for name, own in sorted(hashes))
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
