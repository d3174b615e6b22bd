"""Fake operations without the ceremony: several times faster than FakeTensorMode's own way, with the same results.

FakeTensorMode looks at each call for symbolic sizes, constants, several devices and real tensors, of which a trace of
plain tensors on one device has none. What is left is the operation's meta kernel, and a wrapper round its result.
Operations whose meta kernel does not tell the whole truth (FakeTensorMode keeps a list), and calls with anything
unusual about them, go the usual way.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_CPU = torch.device("cpu")
_META = torch.device("meta")
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
def _eligible(func: Any) -> bool:
    name = func._overloadpacket.__name__
    if func.namespace != "aten" or name in _NEVER:
        return False
    if func in op_implementations_dict and name not in _PLAIN:
        return False
    unusual = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
    if any(tag in func.tags for tag in unusual):
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return False
    return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "Meta"))


def run(mode: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
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
