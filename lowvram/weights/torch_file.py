"""Tensors out of what torch.save wrote (.ckpt, .pt, .bin), of which nothing is executed.

Such a file is a pickle, which may name any function to be called; `torch.load(weights_only=True)` calls those alone
that put tensors together. Since torch 1.6 it is a zip archive around the pickle, whose members are the numbers of the
tensors, unpacked, so that they can be mapped from the disk rather than read. Before the pickle is looked at, the
archive must be as torch writes it: a packed member would be a bomb, or be taken for numbers as it is.
"""

import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError

MOST_DIMENSIONS = 32
_MOST_PICKLE_BYTES = 2**26  # the tensors' numbers are not in it: SDXL's is below 1 MB
_MOST_MEMBERS = 2**20
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_ZIP_END_BYTES = 22
_AGAIN = "Download it again, or ask whoever made it."
_UNTRUSTED = "Don't use the file unless you trust its source; weights are safest as .safetensors."


class TensorInfo(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Content:
    """tensors: by name, mapped from the file where its format allows. metadata: plain entries beside "state_dict"."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


class _Passed:
    """Stands for an object of a training checkpoint that is no tensor, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Parameters(dict[str, Tensor]):
    """Stands for a torch.nn.ParameterDict, in which early files of textual inversion keep their vectors."""

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") if isinstance(state, dict) else None
        if not isinstance(held, dict):
            raise ValueError("a ParameterDict without parameters")
        self.update({str(name): tensor for name, tensor in held.items() if isinstance(tensor, Tensor)})


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stands for defaultdict, whatever its default."""
    return {}


# Published checkpoints carry these beside the weights: notes of the trainer that made them, and its settings.
_PASSED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "bool", "str")),
)
_STAND_INS: list[Any] = [
    *((_Passed, name) for name in _PASSED),
    (_Parameters, "torch.nn.modules.container.ParameterDict"),
    (_plain_dict, "collections.defaultdict"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
]


def looks_like_one(start: bytes) -> bool:
    """Whether a file that begins so may be one that torch.save wrote."""
    return start.startswith((_ZIP, _PICKLE))


def read_tensors(path: Path) -> Content:
    """The tensors of a file, flat or under "state_dict"; what is no tensor, or has no name, is passed over.

    Raises:
        LowVRAMError: as `load`; or there is no tensor in it, or one whose shape its numbers don't bear out.
    """
    content = load(path)
    if not isinstance(content, Mapping):
        raise LowVRAMError(f"{path} holds a {type(content).__name__}, not tensors by name.", _AGAIN)
    metadata: dict[str, str] = {}
    state = content.get("state_dict")
    if isinstance(state, Mapping):
        plain = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, (str, int, float, bool))}
        metadata = {name: str(value) for name, value in plain.items()}
        content = state
    tensors = {n: _plain(path, n, t) for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
    if not tensors:
        names = ", ".join(repr(name)[:60] for name in list(content)[:5]) or "nothing"
        raise LowVRAMError(f"{path} holds no tensors by name: it has {names}.", "Give a file of weights.")
    return Content(tensors=tensors, metadata=metadata)


def load(path: Path) -> Any:
    """What torch.save wrote to a file: tensors on the CPU, in dicts, lists and beside plain values, as it was.

    Raises:
        LowVRAMError: the file is missing, damaged or cut off, unpacks to more than it is, or asks for anything to be
            executed: then the function is named, which was not run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise LowVRAMError(f"{path} can't be read: {error.strerror or error}.", "Check the path.") from error
    if not looks_like_one(start):
        raise LowVRAMError(f"{path} is nothing that torch.save wrote.", _AGAIN)
    sizes = _check_archive(path) if start == _ZIP else None
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of types of storage that are no longer made
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=sizes is not None)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise _damaged(path, error) from error
        raise LowVRAMError(f"{path} asks for {named[1]}, which no weights need: it was not run.", _UNTRUSTED) from error
    except (Exception, RecursionError) as error:  # a damaged pickle can fail in any way
        raise _damaged(path, error) from error
    _check_storages(path, content, sizes)
    return content


def _damaged(path: Path, error: BaseException) -> LowVRAMError:
    reason = str(error).strip().split("\n")[0]
    if "weights_only" in reason or "Weights only" in reason:  # torch goes on to tell how to load it without a check
        told = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = told[1] if told else "it holds more than tensors"
    return LowVRAMError(f"{path} is damaged, or no weights: {type(error).__name__}: {reason[:200]}.", _AGAIN)


def _check_archive(path: Path) -> set[int]:
    """The sizes of an archive's members in bytes. Raises LowVRAMError unless it is as torch writes one."""
    file_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            file.seek(max(0, file_bytes - _ZIP_END_BYTES))
            # Two readers of an archive with something behind its end, or a comment, may see two lists of members.
            if not file.read(4) == b"PK\x05\x06":
                raise ValueError("its end is missing: it was cut off")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise LowVRAMError(f"{path} can't be read: {error.strerror or error}.", "Check the disk.") from error
    except Exception as error:  # zipfile's own, and whatever else damaged numbers make of it
        raise _damaged(path, error) from error
    packed = next((m for m in members if m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size), None)
    if packed is not None:
        raise LowVRAMError(
            f"{path}: {packed.filename} is packed, {packed.compress_size:,} bytes for {packed.file_size:,}, which "
            "torch.save never does.",
            _UNTRUSTED,
        )
    total = sum(member.file_size for member in members)
    if total > file_bytes or len(members) > _MOST_MEMBERS:
        raise LowVRAMError(
            f"{path} unpacks {len(members):,} members to {total:,} bytes, from a file of {file_bytes:,}.", _UNTRUSTED
        )
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LowVRAMError(f"{path} holds {twice} twice.", _UNTRUSTED)
    for member in members:
        if member.filename.endswith(".pkl") and member.file_size > _MOST_PICKLE_BYTES:
            raise LowVRAMError(f"{path}: {member.filename} is {member.file_size:,} bytes long.", _UNTRUSTED)
    return {member.file_size for member in members}


def _check_storages(path: Path, content: Any, sizes: set[int] | None) -> None:
    """Raise LowVRAMError for a tensor whose numbers are none of the archive's members: it would show other bytes."""
    if sizes is None:
        return
    for name, tensor in tensors_in(content):
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            held = tensor.untyped_storage().nbytes()
            if held and held not in sizes:
                raise LowVRAMError(
                    f"{path}: {name} has {held:,} bytes of numbers, and no member of the archive is as long.", _AGAIN
                )


def tensors_in(content: Any, name: str = "", depth: int = 0) -> list[tuple[str, Tensor]]:
    """The tensors in dicts and lists, with names such as "optimizer.state.0.exp_avg"."""
    if isinstance(content, Tensor):
        return [(name or "its tensor", content)]
    if depth > 8 or not isinstance(content, (Mapping, list, tuple)):
        return []
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    return [
        found for key, value in items for found in tensors_in(value, f"{name}.{key}" if name else str(key), depth + 1)
    ]


def _plain(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor without autograd, if it is a plain one, within its numbers."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise LowVRAMError(
            f"{path}: {name} is a {tensor.layout} tensor on {tensor.device}, not plain numbers.", "Use plain weights."
        )
    tensor = tensor.detach()
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = max(math.prod(tensor.shape), last + 1) * tensor.dtype.itemsize if tensor.numel() else 0
    held = tensor.untyped_storage().nbytes()
    wrong = needed > held or tensor.storage_offset() < 0 or any(stride < 0 for stride in tensor.stride())
    if wrong or tensor.dim() > MOST_DIMENSIONS:  # a stride of 0 makes much of little
        raise LowVRAMError(
            f"{path}: {name} of shape {list(tensor.shape)} needs {needed:,} bytes, and has {held:,}.", _UNTRUSTED
        )
    return tensor
