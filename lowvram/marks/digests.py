"""The hash that names the weights which made an image.

Of one file it is the file's own, as `sha256sum` prints it. Of several it is that of sha256sum's list of them, sorted
by name, as `(cd FOLDER; sha256sum A.safetensors B.safetensors | sha256sum)` prints it; of a folder with a pipeline,
the files that are read of it, by their names in it (`unet/diffusion_pytorch_model.safetensors`).
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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


def of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Of files of weights, each with the name that it is listed by, read whole: about a second for each gigabyte.

    Raises:
        OSError: one can't be read.
    """
    hashes = []
    for name, path in files:
        with path.open("rb") as opened:
            hashes.append((name, hashlib.file_digest(opened, "sha256").hexdigest()))
    return _joined(hashes)


def _joined(hashes: list[tuple[str, str]]) -> str:
    """hashes: (name, hash) of each file; two may have the same name."""
    if len(hashes) == 1:
        return f"sha256:{hashes[0][1]}"
    listed = "".join(f"{own}  {name}\n" for name, own in sorted(hashes))
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
