"""What a text encoder made of captions, kept on disk: tensors of many rows in one safetensors file, read by row."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_rows(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, parts: Iterable[tuple[str, Tensor]]
) -> None:
    """Write tensors row by row as they are made, so that memory never holds them whole.

    shapes: of each tensor [n, ...]. dtype: float32, float16 or bfloat16. parts: its name and rows [m, ...], in the
    order of `shapes`. The file appears whole or not at all.

    Raises:
        LowVRAMError: the disk is full, or can't be written.
        ValueError: the parts are not the tensors that were announced.
    """
    header: dict[str, Any] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that tensors begin at a multiple of 8 bytes
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name, rows in parts:
                low, high = header[name]["data_offsets"]
                data = rows.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
                if rows.shape[1:] != shapes[name][1:] or not low <= written < high or written + len(data) > high:
                    raise ValueError(f"rows {list(rows.shape)} of {name} {list(shapes[name])} at byte {written}")
                file.write(data)
                written += len(data)
            if written != begin:
                raise ValueError(f"{written} bytes of {begin}")
            file.flush()
            os.fsync(file.fileno())  # else the name might survive a power cut, and the content not
        partial.replace(path)
    except OSError as error:
        raise LowVRAMError(
            f"{path} can't be written ({begin / 2**20:,.0f} MiB): {error.strerror or error}.",
            "Free some space there, or set LOWVRAM_CACHE to a folder on a larger disk.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a file is there, and no shorter or longer than it says."""
    try:
        Rows(path)
    except LowVRAMError:
        return False
    return True


class Rows:
    """A file of `write_rows`, memory-mapped.

    Raises:
        LowVRAMError: it is gone, or damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            file = safe_open(path, "pt")
            self._slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise LowVRAMError(
                f"what was kept of captions in {path} can't be read: {str(error)[:200]}.",
                "Remove the file, and start again: it is made anew.",
            ) from error

    def read(self, name: str, rows: Iterable[int]) -> Tensor:
        """These rows of a tensor, [n, ...]: a copy."""
        return torch.stack([self._slices[name][row] for row in rows])
