"""Networks out of the pickles that StyleGAN2 is published in, of which nothing is executed.

Such a file holds each network's attributes beside the source code of its class, which the original loader runs. Here
a name in the file is looked up in a short list, and stands for a function of this file that makes a plain record.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.errors import LowVRAMError

NAMES = ("G", "D", "G_ema")
_PLAIN = (bool, int, float, str, type(None))
_NUMPY_KINDS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_DEEPEST = 64  # modules inside modules; a file that goes on is refused before Python's stack ends


@dataclass(frozen=True, kw_only=True)
class PublishedNetwork:
    """A network as a pickle has it: its class's name, what it was made with, and its tensors by state-dict key.

    arguments: by keyword; args: those that had none. Lists, dicts, numbers and text, whatever their keys.
    """

    class_name: str
    args: tuple[Any, ...]
    arguments: Mapping[str, Any]
    state: Mapping[str, Tensor]


def read(path: str | Path) -> dict[str, PublishedNetwork]:
    """The networks of a pickle, by name: G, D and G_ema, as far as they are there.

    Parameters and buffers come under one name each, whether a layer was frozen or not. Tensors are on the CPU.

    Raises:
        LowVRAMError: the file is missing or damaged, asks for anything but tensors and plain values, or holds no
            network.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _networks(path, _Reader(file, path).load())
    except LowVRAMError:
        raise
    except OSError as error:
        raise LowVRAMError(f"weights={path} can't be read: {error.strerror}.", "Give the path of a pickle.") from error
    except (Exception, RecursionError) as error:  # a damaged pickle can fail in any way
        raise LowVRAMError(
            f"weights={path} is damaged, or no pickle of networks: {type(error).__name__}: {error}.",
            "Download it again.",
        ) from error


def _networks(path: Path, content: Any) -> dict[str, PublishedNetwork]:
    if not isinstance(content, dict):
        raise LowVRAMError(f"weights={path} holds a {type(content).__name__}, not networks by name.", _WANTED)
    records = {name: content[name] for name in NAMES if isinstance(content.get(name), _Record)}
    if not records:
        names = ", ".join(map(repr, content)) or "nothing"
        raise LowVRAMError(f"weights={path} holds no network: it has {names}.", _WANTED)
    return {name: _network(path, name, record) for name, record in records.items()}


_WANTED = "Use a pickle with G, D and G_ema, as StyleGAN2 is published."


class _Record:
    """A module of the file: its class's name and its attributes."""

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict) or meta.get("type") != "class":
            raise ValueError("a module without its attributes")
        self.class_name = str(meta.get("class_name"))
        self.state: dict[str, Any] = meta["state"]

    def __setstate__(self, state: Any) -> None:
        if state is not None:
            raise ValueError("a module with a second set of attributes")


class _Storage:
    """The numbers of one or more tensors."""

    def __init__(self, data: Any) -> None:
        if not isinstance(data, bytes):
            raise ValueError("a tensor whose numbers are no bytes")
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(loaded, torch.storage.TypedStorage):
            raise ValueError(f"a {type(loaded).__name__} in place of a tensor's numbers")
        self.values = torch.tensor([], dtype=loaded.dtype).set_(loaded)  # type: ignore[call-overload]


class _DType:
    """A type of numpy's numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in _NUMPY_KINDS:
            raise ValueError(f"numpy numbers of type {code!r}")
        self.code = str(code)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("numpy numbers in another byte order")


def _scalar(dtype: Any, data: Any) -> Any:
    import numpy as np

    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise ValueError("a numpy number that is none")
    (value,) = np.frombuffer(data, dtype=f"<{dtype.code}")
    return value.item()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """What torch rebuilds a tensor from, within its storage: a stride of 0 would make much of little."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without numbers")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of size {size!r} and strides {stride!r}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else 0
    if last >= max(1, storage.values.numel()) or math.prod(size) > storage.values.numel():
        raise ValueError(f"a tensor of size {list(size)} in {storage.values.numel()} numbers")
    return storage.values.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is no tensor")
    return data


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Record,
    ("dnnlib.util", "EasyDict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the file."""
        if (module, name) not in _ALLOWED:
            raise LowVRAMError(
                f"weights={self.path} asks for {module}.{name}, which no network needs: it was not run.",
                "Don't use the file unless you trust its source; weights are safest as .safetensors.",
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: published files keep everything inside."""
        raise ValueError(f"it refers to something outside: {pid!r}")


def _network(path: Path, name: str, record: _Record) -> PublishedNetwork:
    state: dict[str, Tensor] = {}
    for key, tensor in _tensors(record, "", 0):
        if key in state:
            raise LowVRAMError(f"weights={path}: {name} has {key} twice.", "Download it again.")
        state[key] = finite(path, f"{name}.{key}", tensor)
    arguments = record.state.get("_init_kwargs") or {}
    args = record.state.get("_init_args") or ()
    if not isinstance(arguments, dict) or not isinstance(args, (tuple, list)):
        raise LowVRAMError(f"weights={path}: {name} does not say what it was made with.", _WANTED)
    values = {str(key): _plain(path, f"{name}.{key}", value, 0) for key, value in arguments.items()}
    positional = tuple(_plain(path, f"{name}.args", value, 0) for value in args)
    return PublishedNetwork(class_name=record.class_name, args=positional, arguments=values, state=state)


def finite(path: Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises LowVRAMError if it holds what is no number."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise LowVRAMError(f"weights={path}: {key} has values that are not finite.", "Download it again.")
    return tensor


def _tensors(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Record) or depth > _DEEPEST:
        raise ValueError(f"{prefix or 'the network'} is a {type(module).__name__}, not a module")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _items(module, kind, prefix):
            if tensor is not None:
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{prefix}{name} is a {type(tensor).__name__}, not a tensor")
                yield f"{prefix}{name}", tensor
    for name, child in _items(module, "_modules", prefix):
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", depth + 1)


def _items(module: _Record, kind: str, prefix: str) -> list[tuple[str, Any]]:
    values = module.state.get(kind, {})
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{prefix or 'the network'} has no {kind} by name")
    return list(values.items())


def _plain(path: Path, name: str, value: Any, depth: int) -> Any:
    """The value, if it is made of numbers, text, lists and dicts alone."""
    if depth < 8:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, (list, tuple)):
            return [_plain(path, name, item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {str(key): _plain(path, f"{name}.{key}", item, depth + 1) for key, item in value.items()}
    raise LowVRAMError(f"weights={path}: {name} is a {type(value).__name__}, no setting.", _WANTED)
