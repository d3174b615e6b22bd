"""Fake operations without the ceremony: several times faster than FakeTensorMode's own way, with the same results.

FakeTensorMode looks at each call for symbolic sizes, constants, several devices and real tensors, of which a trace of
plain tensors on one device has none. What is left is the operation's meta kernel, and a wrapper round its result.
Operations whose meta kernel does not tell the whole truth (FakeTensorMode keeps a list), and calls with anything
unusual about them, go the usual way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_CPU = torch.device("cpu")
_META = torch.device("meta")
_PLAIN_TYPES = frozenset(
    [int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format]
)
_NEW = frozenset(
    [
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty_strided",
    ]
)
# On FakeTensorMode's list for symbolic sizes or devices alone.
_PLAIN = _NEW | {"view", "select", "slice", "copy_", "alias", "_unsafe_view"}
_MAKES = _NEW | {"_to_copy"}  # take a device, to make their result on
_NEVER = frozenset(
    [
        "lift",
        "lift_fresh",
        "lift_fresh_copy",
        "set_",
        "resize_",
        "detach_",
        "item",
        "equal",
        "is_nonzero",
        "_pin_memory",
    ]
)


@cache
def _usual(func: Any) -> bool:
    """Whether the form of what an operation gives is told by the form of what it is given."""
    unusual = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
    if func.namespace != "aten" or func._overloadpacket.__name__ in _NEVER or any(t in func.tags for t in unusual):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _eligible(func: Any) -> bool:
    if not _usual(func) or (func in op_implementations_dict and func._overloadpacket.__name__ not in _PLAIN):
        return False
    return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "Meta"))


class QuickFakes:
    """Runs operations on the fake tensors of one mode.

    What a call gave is kept by what it was given: sizes, strides, types and plain arguments. The next call like it only
    makes tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Any, _Result] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operation; any on other tensors than plainly fake ones are left to the mode."""
        sort = _sort(func)
        # What makes tensors of nothing makes real ones where the mode is put aside.
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is self._mode
        key = _key(func, args, kwargs) if sort is not None and fake else None
        if key is None:
            return self._run(func, args, kwargs)
        known = self._known.get(key)
        if known is not None:
            return known.again(self._mode, args, kwargs)
        if isinstance(sort, _Written):
            target = sort.of(args, kwargs)
            before = (key, target.untyped_storage().nbytes())
            out = self._run(func, args, kwargs)
            if out is target and before == (_key(func, args, kwargs), target.untyped_storage().nbytes()):
                self._known[key] = sort
            return out
        out = self._run(func, args, kwargs)
        made = _Made.of(out, (*args, *kwargs.values()))
        if made is not None:
            self._known[key] = made
        return out

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = _run(self._mode, func, args, kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out


def _run(mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation on fake tensors; NotImplemented: ask the mode."""
    pointwise = _pointwise(func)
    if pointwise is None and not _eligible(func):
        return NotImplemented
    operands = _operands(args, kwargs)
    if not operands:
        return NotImplemented
    if pointwise is not None:
        out = pointwise(mode, operands, args, kwargs)
        if out is not NotImplemented or not _eligible(func):
            return out
    if kwargs:
        if any(isinstance(value, Tensor) for value in kwargs.values()):
            return NotImplemented
        if "device" in kwargs and kwargs["device"] not in (None, _CPU):
            return NotImplemented
    if func._overloadpacket.__name__ in _MAKES:
        kwargs = {**kwargs, "device": _META, "pin_memory": None}
        if "pin_memory" not in _arguments(func):
            del kwargs["pin_memory"]
    with in_kernel_invocation_manager(mode):
        out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        return _wrapped(mode, out)
    if isinstance(out, list | tuple):
        return type(out)(_wrapped(mode, item) if isinstance(item, Tensor) else item for item in out)
    return out


# What a call gave, to be given again.


class _Result(Protocol):
    def again(self, mode: FakeTensorMode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class _Written(_Result):
    """The operation writes into one of its arguments, and returns that."""

    place: int
    name: str

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[self.place] if self.place < len(args) else kwargs.get(self.name)

    def again(self, mode: FakeTensorMode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.of(args, kwargs)


@dataclass(frozen=True)
class _Made(_Result):
    """New tensors. kind: Tensor, or what holds several. metas: shape, strides and dtype of each; None: none there."""

    kind: type
    metas: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]

    @classmethod
    def of(cls, out: Any, given: Sequence[Any]) -> "_Made | None":
        """Of a result whose tensors are new, each with just the storage that it needs; None for any other."""
        several = isinstance(out, list | tuple)
        found = list(out) if several else [out]
        operands = [item for value in given for item in (value if isinstance(value, list | tuple) else (value,))]
        storages = {item.untyped_storage()._cdata for item in operands if isinstance(item, Tensor)}
        metas: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None] = []
        for one in found:
            if one is None:
                metas.append(None)
                continue
            if type(one) is not FakeTensor or one.constant is not None or one.fake_device != _CPU:
                return None
            storage = one.untyped_storage()
            last = 1 + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
            needed_bytes = last * one.element_size() if one.numel() else 0
            if storage._cdata in storages or one.storage_offset() or storage.nbytes() != needed_bytes:
                return None
            storages.add(storage._cdata)
            metas.append((one.shape, one.stride(), one.dtype))
        return cls(type(out) if several else Tensor, tuple(metas))

    def again(self, mode: FakeTensorMode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with torch._C._DisableTorchDispatch():
            made = [
                None if meta is None else torch.empty_strided(meta[0], meta[1], dtype=meta[2], device=_META)
                for meta in self.metas
            ]
        fakes = [None if one is None else FakeTensor(mode, one, _CPU) for one in made]
        return fakes[0] if self.kind is Tensor else self.kind(fakes)


@cache
def _sort(func: Any) -> "_Written | type[_Made] | None":
    """Whether an operation returns new tensors, or an argument that it writes into; None: something else."""
    if not _usual(func):
        return None
    aliases = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None]
    returned = [r.alias_info is not None for r in func._schema.returns]
    if not aliases and returned and not any(returned):
        return _Made
    if len(aliases) == 1 and returned == [True] and aliases[0][1].alias_info.is_write:
        return _Written(aliases[0][0], aliases[0][1].name)
    return None


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What decides of which form the result is; None: not plain."""
    try:
        plain = tuple([_described(value) for value in args])
        named = tuple([(name, _described(value)) for name, value in kwargs.items()]) if kwargs else ()
    except _NotPlain:
        return None
    return func, plain, named, torch.get_default_dtype()


class _NotPlain(Exception):
    pass


def _described(value: Any) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise _NotPlain
        return value.shape, value.stride(), value.dtype, value.fake_device
    if kind in _PLAIN_TYPES:
        return kind, value
    if kind is list or kind is tuple:
        return kind, tuple([_described(item) for item in value])
    raise _NotPlain


def _operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[FakeTensor] | None:
    """The tensors among the arguments; None if one of them is not plainly fake."""
    found: list[FakeTensor] = []
    for value in (*args, *kwargs.values()):
        items = value if isinstance(value, list | tuple) else (value,)
        for item in items:
            if isinstance(item, Tensor):
                if type(item) is not FakeTensor or item.constant is not None:
                    return None
                found.append(item)
    return found


def _wrapped(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return tensor if type(tensor) is FakeTensor else FakeTensor(mode, tensor, _CPU)


@cache
def _arguments(func: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in func._schema.arguments)


# Element by element: the result's shape and strides are those of the first operand, if nothing is to be decided.

_Elementwise = Callable[[FakeTensorMode, list[FakeTensor], Sequence[Any], Mapping[str, Any]], Any]
_UNTAGGED = frozenset(
    [
        "leaky_relu",
        "leaky_relu_",
        "leaky_relu_backward",
        "hardtanh",
        "hardtanh_",
        "hardtanh_backward",
        "elu_backward",
        "softplus_backward",
        "threshold_backward",
        "silu_backward",
        "gelu_backward",
        "sigmoid_backward",
        "tanh_backward",
        "mish_backward",
        "hardswish_backward",
        "hardsigmoid_backward",
    ]
)
_OTHER_TYPE = frozenset(  # whose result is not of the operands' type
    [
        "eq",
        "ne",
        "lt",
        "gt",
        "le",
        "ge",
        "isnan",
        "isinf",
        "isfinite",
        "isposinf",
        "isneginf",
        "signbit",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "where",
        "frexp",
        "real",
        "imag",
        "view_as_real",
        "angle",
        "polar",
        "complex",
        "copy_",
        "copy",
        "fill_",
        "zero_",
        "bernoulli",
    ]
)


@cache
def _pointwise(func: Any) -> _Elementwise | None:
    """How to run an operation that works element by element; None: it does not."""
    name = func._overloadpacket.__name__
    if func.namespace != "aten" or name in _OTHER_TYPE:
        return None
    if torch.Tag.pointwise not in func.tags and name not in _UNTAGGED:
        return None
    if len(func._schema.returns) != 1:
        return None
    written = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return _new
    if written == [0]:
        return _in_place
    name = func._schema.arguments[written[0]].name
    return lambda mode, operands, args, kwargs: _into(kwargs.get(name), operands)


def _in_place(mode: FakeTensorMode, operands: list[FakeTensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    target = args[0]
    if operands[0] is not target or any(not _broadcasts(other.shape, target.shape) for other in operands[1:]):
        return NotImplemented
    return target


def _into(target: Any, operands: list[FakeTensor]) -> Any:
    if target is None or any(other.shape != target.shape for other in operands):
        return NotImplemented
    return target


def _new(mode: FakeTensorMode, operands: list[FakeTensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    first = operands[0]
    shape, strides, dtype = first.shape, first.stride(), first.dtype
    if not dtype.is_floating_point or kwargs or not _decides(shape, strides):
        return NotImplemented
    for other in operands[1:]:
        if other.dtype != dtype or not _broadcasts(other.shape, shape):
            return NotImplemented
        if other.shape == shape and other.stride() != strides:
            return NotImplemented  # which of them decides is the kernel's own business
    with in_kernel_invocation_manager(mode):
        made = torch.empty_strided(shape, strides, dtype=dtype, device=_META)
    return FakeTensor(mode, made, _CPU)


@lru_cache(maxsize=2**16)
def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    if len(shape) > len(to):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


@lru_cache(maxsize=2**16)
def _decides(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether an operand alone decides the result's strides: dense, and no dimension whose stride means nothing."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size < 2 or stride != expected:
            return False
        expected *= size
    return bool(shape)
