"""Files of tensors by name, read and written one tensor at a time: .safetensors, its shards, and what torch.save wrote.

Such files come from strangers. What a file says of itself is checked against the file before the first tensor is
read, nothing in it is executed, and whatever is wrong with it is told with its path and the tensor's name.

A .safetensors file (https://github.com/huggingface/safetensors) is the length of a header in 8 bytes, the header in
JSON ({name: {dtype, shape, data_offsets}}), and the numbers of each tensor, one after the other without gaps.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.weights import torch_file
from lowvram.weights.torch_file import TensorInfo

__all__ = ["NewTensor", "TensorFile", "TensorInfo", "files_of", "finite", "write_tensors"]

AGAIN = "Download it again, or ask whoever made it."
_SUPPORTED = "Give a .safetensors file (or its .safetensors.index.json), or a .ckpt, .pt or .bin that torch.save wrote."
_MOST_HEADER_BYTES = 2**25  # the header of SDXL's single file is 350 KB; training notes may add some MB
_MOST_INDEX_BYTES = 2**25
_MOST_SHARDS = 256
_METADATA = "__metadata__"
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile:
    """The tensors of one file, or of one file in several parts, by name.

    `with TensorFile.open(path) as file: tensor = file.read(name)`. Host memory holds the tensor that is read; only a
    file in torch's old format, before 1.6, is held whole.

    path: of the file. names: in the file's order. metadata: what a .safetensors file says beside its tensors; of a
    training checkpoint, the plain entries beside its "state_dict", such as global_step.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        read: Callable[[str], Tensor],
        close: Callable[[], object],
    ) -> None:
        self.path = path
        self.names = tuple(tensors)
        self.metadata = dict(metadata)
        self._tensors = dict(tensors)
        self._read = read
        self._close = close
        self._closed = False

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file, of which all but the tensors' numbers is checked.

        A .safetensors file, the index of one in shards (`*.index.json`), or by its content what torch.save wrote,
        flat or under "state_dict"; entries that are no tensors are passed over.

        Raises:
            LowVRAMError: it is none of these, is missing, damaged or cut off, contradicts itself, holds no tensor, or
                asks for something to be executed.
        """
        path = Path(path).expanduser()
        check_file(path)
        if path.name.lower().endswith(".index.json"):
            return cls(path, *_open_shards(path))
        if path.suffix.lower() == ".safetensors":
            return cls(path, *_open_safetensors(path))
        start = _first_bytes(path, 16)
        if torch_file.looks_like_one(start):
            content = torch_file.read_tensors(path)
            kept = content.tensors
            infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in kept.items()}
            return cls(path, infos, content.metadata, lambda name: kept[name].clone(), kept.clear)
        if start[8:9] == b"{":  # a .safetensors under another name
            return cls(path, *_open_safetensors(path))
        raise LowVRAMError(f"{path} is no file of tensors{_guess(start)}.", _SUPPORTED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises KeyError for a name that is not there."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's type. Raises KeyError for a name that is not there."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A tensor in CPU memory of its own, contiguous, with the values as they lie in the file (see `finite`).

        Raises:
            KeyError: the name is not there.
            LowVRAMError: the file can't be read.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if name not in self._tensors:
            raise KeyError(name)
        return self._read(name).contiguous()

    def close(self) -> None:
        """Let go of the file; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._close()


def files_of(path: Path) -> list[Path]:
    """The files whose tensors `TensorFile.open` gives: the file itself, or the shards that an index names.

    Raises:
        LowVRAMError: the index can't be read, or is damaged.
    """
    if not path.name.lower().endswith(".index.json"):
        return [path]
    return [path.parent / shard for shard in sorted(set(_places(path).values()))]


def finite(path: str | Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, as it is. Raises LowVRAMError, with the file and the name, where it holds NaN or infinity."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return tensor
    plain = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    # The extremes tell: NaN passes through both, and no copy of the tensor is made.
    if all(math.isfinite(extreme.item()) for extreme in torch.aminmax(plain)):
        return tensor
    count = int((~plain.isfinite()).sum())
    raise LowVRAMError(
        f"{path}: {name} has {count:,} of {plain.numel():,} values that are not finite numbers.",
        "The training that made it went wrong, or the file is damaged: use an earlier one, or download it again.",
    )


# Reading: what must hold of the file itself.


def check_file(path: Path) -> None:
    """Raise LowVRAMError unless the path leads to a file with something in it that can be read."""
    try:
        if path.is_symlink() and not path.exists():
            raise LowVRAMError(f"{path} is a link to {path.readlink()}, where nothing is.", AGAIN)
        if not path.exists():
            where = f" (looked in {Path.cwd()})" if not path.is_absolute() else ""
            raise LowVRAMError(f"{path} does not exist{where}.", "Check the path.")
        if path.is_dir():
            raise LowVRAMError(f"{path} is a folder, where a file is wanted.", _SUPPORTED)
        if not path.is_file():
            raise LowVRAMError(f"{path} is neither a file nor a folder, but a device or a pipe.", _SUPPORTED)
        if not path.stat().st_size:
            raise LowVRAMError(f"{path} is empty.", AGAIN)
        start = _first_bytes(path, 64)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if start.startswith(b"version https://git-lfs"):
        raise LowVRAMError(
            f"{path} is a pointer of Git LFS, not the file itself.", "Fetch it with `git lfs pull`, or download it."
        )


def _unreadable(path: Path, error: Exception) -> LowVRAMError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return LowVRAMError(f"{path} can't be read: {reason}.", "Check the path, its permissions and the disk.")


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise _unreadable(path, error) from error


def _guess(start: bytes) -> str:
    """What a file may be that is no file of tensors, as the end of a sentence."""
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return ", but a web page: the download went wrong"
    if start.startswith((b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf")):
        return ", but an archive: unpack it"
    if start.startswith(b"GGUF"):
        return ", but GGUF"
    return ""


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError for a name that is there twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return out


def _open_safetensors(
    path: Path,
) -> tuple[dict[str, TensorInfo], dict[str, str], Callable[[str], Tensor], Callable[[], None]]:
    """What a TensorFile is made of, for one .safetensors file."""
    spans, metadata, begin = _header(path)
    try:
        with safe_open(path, "pt") as reference:
            names = set(reference.keys())
        file = path.open("rb")
    except (OSError, SafetensorError, ValueError, MemoryError) as error:
        raise LowVRAMError(f"{path} can't be read as .safetensors: {error}.", AGAIN) from error
    if names != set(spans):
        file.close()
        raise LowVRAMError(f"{path} says two things of what it holds.", AGAIN)

    # Read, not mapped as safetensors would: mapped pages count as this process's memory as long as the file is open,
    # and reading one of a file that has been cut off since would end the process.
    def read(name: str) -> Tensor:
        info, start, stop = spans[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            file.seek(begin + start)
            count = file.readinto(_memory(tensor))
        except OSError as error:
            raise LowVRAMError(f"{path}: {name} can't be read: {error.strerror or error}.", AGAIN) from error
        if count != stop - start:
            raise LowVRAMError(f"{path}: {name} can't be read: the file was cut off since it was opened.", AGAIN)
        return tensor

    return {name: info for name, (info, _, _) in spans.items()}, metadata, read, file.close


_Span = tuple[TensorInfo, int, int]  # a tensor, where it begins and where it ends, from the end of the header


def _header(path: Path) -> tuple[dict[str, _Span], dict[str, str], int]:
    """Tensors and metadata of a .safetensors file, if it bears them out, and the length of what lies before them."""
    file_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 10 or header_bytes > file_bytes - 8:
                raise ValueError(
                    f"its header would be {header_bytes:,} bytes long, of a file of {file_bytes:,}: it is cut off, or "
                    f"no .safetensors{_guess(_first_bytes(path, 16))}"
                )
            if header_bytes > _MOST_HEADER_BYTES:
                raise ValueError(f"its header is {header_bytes:,} bytes long, more than {_MOST_HEADER_BYTES:,}")
            header = json.loads(file.read(header_bytes).decode("utf-8"), object_pairs_hook=_no_doubles)
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, not an object")
        metadata = header.pop(_METADATA, None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"{_METADATA} is not text by name")
        spans = {name: _span(name, entry) for name, entry in header.items()}
        _check_spans(spans, file_bytes - 8 - header_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise LowVRAMError(f"{path} is damaged, or no .safetensors: {error}.", AGAIN) from error
    if not spans:
        raise LowVRAMError(f"{path} holds no tensors.", _SUPPORTED)
    return spans, metadata, 8 + header_bytes


def _span(name: str, entry: Any) -> _Span:
    """A tensor by its entry in the header. Raises ValueError where that contradicts itself."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is a {type(entry).__name__}, not a tensor's description")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has numbers of type {dtype!r}, which is not known")
    shape, offsets = _whole_numbers(name, entry, "shape"), _whole_numbers(name, entry, "data_offsets")
    if len(shape) > torch_file.MOST_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shape} and data_offsets {offsets}")
    start, stop = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if stop - start != needed:
        raise ValueError(f"{name} of shape {shape} and type {dtype} needs {needed:,} bytes, and has {stop - start:,}")
    return TensorInfo(tuple(shape), _DTYPES[dtype]), start, stop


def _whole_numbers(name: str, entry: dict[str, Any], key: str) -> list[int]:
    value = entry.get(key)
    if not isinstance(value, list) or any(type(number) is not int or not 0 <= number < 2**62 for number in value):
        raise ValueError(f"{name} has {key} {str(value)[:80]}, not whole numbers")
    return value


def _check_spans(spans: Mapping[str, _Span], data_bytes: int) -> None:
    """Raise ValueError unless the tensors fill the file, one behind the other."""
    end, before = 0, "the header"
    for name, (_, start, stop) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if stop > data_bytes:
            raise ValueError(
                f"{name} would end at byte {stop:,} of {data_bytes:,} that are there: the file was cut off"
            )
        if start < end:
            raise ValueError(f"{name} overlaps {before}: it begins at byte {start:,}, and that ends at {end:,}")
        if start > end:
            raise ValueError(f"there are {start - end:,} bytes that belong to nothing before {name}")
        end, before = stop, name
    if end != data_bytes:
        raise ValueError(f"there are {data_bytes - end:,} bytes behind its last tensor, {before}")


def _open_shards(
    path: Path,
) -> tuple[dict[str, TensorInfo], dict[str, str], Callable[[str], Tensor], Callable[[], None]]:
    """What a TensorFile is made of, for an index that says which file holds which tensor."""
    places = _places(path)
    with contextlib.ExitStack() as stack:
        shards = dict.fromkeys(places.values())
        files = {shard: stack.enter_context(TensorFile.open(path.parent / shard)) for shard in shards}
        for name, shard in places.items():
            if name not in files[shard]:
                raise LowVRAMError(f"{path} says that {name} is in {shard}, and it is not.", AGAIN)
        stack.pop_all()
    tensors = {name: TensorInfo(files[shard].shape(name), files[shard].dtype(name)) for name, shard in places.items()}

    def close() -> None:
        for file in files.values():
            file.close()

    metadata = next((file.metadata for file in files.values()), {})
    return tensors, metadata, lambda name: files[places[name]].read(name), close


def _places(path: Path) -> dict[str, str]:
    """The shard of each tensor, by the tensor's name."""
    try:
        if path.stat().st_size > _MOST_INDEX_BYTES:
            raise ValueError(f"it is {path.stat().st_size:,} bytes long")
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_doubles)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError('there is no "weight_map" from tensors to files in it')
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise LowVRAMError(f"{path} is damaged, or no index of shards: {error}.", AGAIN) from error
    for name, shard in places.items():
        if shard in ("", ".", "..") or any(sign in shard for sign in "/\\:\0") or shard.endswith(".index.json"):
            raise LowVRAMError(
                f"{path} says that {name} is in {shard!r}, which is no name of a file beside it.",
                "Don't use it: such an index is made to lead elsewhere, or broken.",
            )
    if len(set(places.values())) > _MOST_SHARDS:
        raise LowVRAMError(f"{path} names {len(set(places.values()))} files.", f"At most {_MOST_SHARDS} can be taken.")
    return places


# Writing.


class NewTensor(NamedTuple):
    """A tensor to write: what it is, and the function that makes it when its turn comes, on any device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, NewTensor | tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file, which appears whole or not at all; host memory holds one tensor at a time.

    `make` of each is called once, those of wide types first, so that each tensor lies at a multiple of its type's
    size. A file that is being read may be replaced.

    Raises:
        LowVRAMError: it can't be written, or the disk has less room than it needs; what was there before stays.
        ValueError: a tensor that is made is not what was said.
    """
    path = Path(path).expanduser()
    ordered = {n: NewTensor(*t) for n, t in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0]))}
    header = _new_header(ordered, metadata or {})
    total = len(header) + sum(math.prod(new.shape) * new.dtype.itemsize for new in ordered.values())
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _writing(path):
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if total > free:
                raise OSError(0, f"{total / 2**30:.2f} GiB are needed, and {free / 2**30:.2f} GiB are free")
            file = draft.open("wb")
        with file:
            with _writing(path):
                file.write(header)
            for name, new in ordered.items():
                data = _bytes_of(name, new)  # its own errors are not the disk's
                with _writing(path):
                    file.write(data)
                del data  # else it would be there beside the next
            with _writing(path):
                file.flush()
                os.fsync(file.fileno())  # else the name might survive a power cut, and the content not
        with _writing(path):
            draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _new_header(tensors: Mapping[str, NewTensor], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a .safetensors file, padded so that the numbers begin at a multiple of 8."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    if not all(isinstance(part, str) for item in metadata.items() for part in item):
        raise ValueError("metadata is text by name")
    start = 0
    for name, new in tensors.items():
        if name == _METADATA or new.dtype not in _NAMES:
            raise ValueError(f"a tensor {name!r} of {new.dtype} can't be written")
        stop = start + math.prod(new.shape) * new.dtype.itemsize
        header[name] = {"dtype": _NAMES[new.dtype], "shape": list(new.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER_BYTES:
        raise ValueError(f"a header of {len(text):,} bytes")
    return len(text).to_bytes(8, "little") + text


def _bytes_of(name: str, new: NewTensor) -> memoryview:
    """The numbers of a tensor that is now made."""
    tensor = new.make().detach()
    if tuple(tensor.shape) != tuple(new.shape) or tensor.dtype != new.dtype:
        raise ValueError(
            f"{name} was to be {list(new.shape)} of {new.dtype}, and is {list(tensor.shape)} of {tensor.dtype}"
        )
    return _memory(tensor.to("cpu").contiguous())


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk into a LowVRAMError."""
    try:
        yield
    except OSError as error:
        raise LowVRAMError(
            f"{path} can't be written: {error.strerror or error}.",
            "Free some space there, or choose another place; nothing was left behind.",
        ) from error
