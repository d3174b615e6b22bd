"""Checkpoints that are whole or not there, and that execute nothing when read.

A checkpoint is a folder: a .safetensors file for each network and optimizer, `state.json` for numbers, and
`manifest.json` with each file's size and hash. It is written under a temporary name, flushed and renamed.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram.errors import LowVRAMError

_NAME = re.compile(r"step-(\d{8})$")
_PARTIAL = ".partial"


@dataclass(kw_only=True)
class Checkpoint:
    """What a run needs to go on exactly.

    tensors: {file name: {key: tensor}}, on the CPU after `read`. numbers: anything JSON can hold.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write folder/step-XXXXXXXX, then delete all but the newest `keep`.

    Raises:
        OSError: the disk is full or not writable; nothing of this checkpoint stays, and the older ones are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    try:
        partial.mkdir()
        for name, tensors in checkpoint.tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            _save_tensors(contiguous, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(checkpoint.numbers, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(files, indent=1))
        for path in partial.iterdir():
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in candidates(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders by name, newest first, good or not."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: p.name, reverse=True)


def latest_good(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are skipped with a warning."""
    for path in candidates(folder):
        fault = damage(path)
        if fault is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({fault}) and is skipped", stacklevel=2)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest.items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if _hash(file) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest can't be read: {error}"
    return None


def read(path: Path, *, only: tuple[str, ...] | None = None) -> Checkpoint:
    """Read a checkpoint folder, or only the named files of it, onto the CPU.

    Raises:
        LowVRAMError: it is missing or damaged.
    """
    fault = damage(path)
    if fault is not None:
        raise LowVRAMError(
            f"checkpoint {path} is damaged: {fault}.", "Use another one, or resume=auto, which skips it."
        )
    try:
        names = [p.stem for p in sorted(path.glob("*.safetensors")) if only is None or p.stem in only]
        tensors = {name: load_file(path / f"{name}.safetensors") for name in names}
        numbers = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise LowVRAMError(f"checkpoint {path} can't be read: {error}.", "Use another one, or resume=auto.") from error
    return Checkpoint(tensors=tensors, numbers=numbers)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # safetensors wraps the operating system's error in its own
        raise OSError(str(error)) from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that the rename can't overtake the data."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != 22:  # EINVAL: the file system has no fsync for this
            raise
    finally:
        os.close(descriptor)
