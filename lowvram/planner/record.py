"""A recording of a computation on fake tensors: every storage that comes and goes, and the work of every operation.

`lowvram.memory.tracer` counts what is alive; this keeps the order too, and who made what, so that an allocator can be
replayed, a picture drawn and the time foretold.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lowvram.memory import host
from lowvram.memory.fsdp import local
from lowvram.planner import quick_fake
from lowvram.planner.log import (
    ACTIVATIONS,
    ATTENTION,
    CONVOLUTION,
    GRADIENTS,
    MATMUL,
    MEMORY,
    TEMPORARY,
    WEIGHTS,
    Work,
)

QUICK = True
# A batch of so many samples leaves its mark on every size that grows with it: no other dimension is a multiple of it.
PRIME = 4099
LARGE = 8 * PRIME  # such a batch: what cuts it into up to eight parts finds them equal


@dataclass(kw_only=True)
class Piece:
    """A recorded part of a training step. S storages, E events, N operations.

    order, sizes, categories, makers, names: as in `log.Requests`, but sizes are as asked for, not rounded.
    scaled: bool [S], storages that grow with the number of samples. scaled_bytes: what of the work's bytes does, and
        scaled_host_bytes of those between host and device; scaled_flops: bool [N], operations whose arithmetic does.
    arrivals: (event, storage, parameter) of each gradient as it is complete: the storage is the parameter's `grad` at
        that event; parameters are numbered as the phase lists them.
    left: storages that outlive the piece, gradients apart.
    """

    order: NDArray[np.int64]
    sizes: NDArray[np.float64]
    scaled: NDArray[np.bool_]
    scaled_bytes: NDArray[np.float64]
    scaled_flops: NDArray[np.bool_]
    scaled_host_bytes: float
    categories: NDArray[np.int8]
    makers: NDArray[np.int32]
    names: tuple[str, ...]
    arrivals: tuple[tuple[int, int, int], ...]
    left: tuple[int, ...]
    work: Work


@dataclass(frozen=True)
class _Operation:
    """What is known of an operation whatever its operands: its kind, and how to count it."""

    name: str
    view: bool
    free: bool  # views and uninitialised memory: nothing runs
    kind: int
    flops: Callable[..., Any] | None


@dataclass(kw_only=True)
class _Tape:
    order: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    makers: list[int] = field(default_factory=list)
    arrivals: list[tuple[int, int, int]] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)  # events at which a backward begins
    flops: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    scaled_bytes: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    half: list[bool] = field(default_factory=list)
    host_bytes: float = 0.0
    scaled_host_bytes: float = 0.0
    gathered: set[int] = field(default_factory=set)  # storages that hold weights


class Recorder(TorchDispatchMode):
    """Records what runs within, on fake tensors. Reading a number gives zero, for there is none.

    networks: modules whose parts are named in the record.
    """

    def __init__(self, networks: Mapping[str, nn.Module], fakes: FakeTensorMode) -> None:
        super().__init__()
        self._quick = quick_fake.QuickFakes(fakes)
        self._tape = _Tape()
        self._names: dict[str, int] = {}
        self._storages = host.StorageTable[tuple[_Tape, int]](self._freed)
        self._paths: dict[nn.Module, str] = {}
        self._owners: dict[int, str] = {}  # paths of the modules that own parameters, by the parameters' addresses
        self.call_networks(networks)
        self._modules: list[str] = [""]
        self._spans: list[tuple[int, str]] = []  # autograd's nodes from a sequence number on, and their module
        self._noted = 0  # the sequence number up to which nodes have theirs
        self._task = (-1, 0)  # a backward that runs, and the depth of modules at its begin

    # For callers.

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The mode and its hooks, for the block."""
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def collecting(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        """Within, note when a gradient of `params` is complete."""
        hooks = []
        for index, param in enumerate(params):
            asked = param.requires_grad
            param.requires_grad_(True)
            hooks.append(param.register_post_accumulate_grad_hook(partial(self._arrived, index)))  # type: ignore[arg-type]
            param.requires_grad_(asked)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def backward_begins(self) -> None:
        """What is alive now, of what was recorded, is held for a backward."""
        self._tape.backwards.append(len(self._tape.order))

    def know(self, tensors: Iterable[Tensor]) -> None:
        """These were there before, and belong to no piece."""
        before = _Tape()
        for tensor in tensors:
            if host.has_storage(tensor) and self._storages.get(tensor) is None:
                self._storages.set(tensor, (before, 0))

    def resized(self, tensor: Tensor) -> None:
        """A storage that holds gathered weights was freed, or is there again."""
        known, size_bytes, tape = self._storages.get(tensor), tensor.untyped_storage().nbytes(), self._tape
        if known is not None and known[0] is tape:
            if tape.sizes[known[1]] == size_bytes:
                return
            tape.order.append(~known[1])
        if size_bytes:
            tape.gathered.add(self._add(tensor, size_bytes, "all_gather"))
        elif known is not None:
            self._storages.set(tensor, (_Tape(), 0))

    def start(self) -> None:
        """Begin a new piece: what is alive now belongs to none."""
        self._tape = _Tape()
        self._names = {}
        self._spans = []

    def call_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Modules, made since, whose parts are named in the record from here on."""
        for name, network in networks.items():
            for path, module in network.named_modules():
                self._paths[module] = f"{name}.{path}" if path else name
                self._owners.update((id(p), self._paths[module]) for p in module.parameters(recurse=False))

    def cut(self) -> Piece:
        """What was recorded since `start`."""
        tape = self._tape
        alive: set[int] = set()
        categories = np.full(len(tape.sizes), TEMPORARY, dtype=np.int8)
        marks = iter([*sorted(set(tape.backwards)), -1])
        mark = next(marks)
        for event, storage in enumerate([*tape.order, 0]):
            while mark == event:
                categories[list(alive)] = ACTIVATIONS
                mark = next(marks)
            if event == len(tape.order):
                break
            if storage >= 0:
                alive.add(storage)
            else:
                alive.discard(~storage)
        categories[list(tape.gathered)] = WEIGHTS
        gradients = {storage for _, storage, _ in tape.arrivals}
        categories[list(gradients)] = GRADIENTS
        return Piece(
            order=np.array(tape.order, dtype=np.int64),
            sizes=np.array(tape.sizes, dtype=np.float64),
            scaled=np.array([_grows(size) for size in tape.sizes], dtype=np.bool_),
            scaled_bytes=np.array(tape.scaled_bytes, dtype=np.float64),
            scaled_flops=np.array([_grows(flops) for flops in tape.flops], dtype=np.bool_),
            scaled_host_bytes=tape.scaled_host_bytes,
            categories=categories,
            makers=np.array(tape.makers, dtype=np.int32),
            names=tuple(self._names),
            arrivals=tuple(tape.arrivals),
            left=tuple(sorted(alive - gradients)),
            work=Work(
                flops=np.array(tape.flops, dtype=np.float64),
                bytes=np.array(tape.bytes, dtype=np.float64),
                kinds=np.array(tape.kinds, dtype=np.int8),
                half=np.array(tape.half, dtype=np.bool_),
                host_bytes=tape.host_bytes,
            ),
        )

    # Operations.

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here; guarding each call against it takes as long as many operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            device = func is torch.ops.prim.device.default and type(args[0]) is FakeTensor
            return args[0].fake_device if device else func(*args, **kwargs)
        if func in _READS and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            as_bool = dtype == torch.bool or func is torch.ops.aten.is_nonzero.default
            return False if as_bool else 0.0 if dtype.is_floating_point else 0
        if any(_is_wrapper(t) for t in types):
            return NotImplemented
        self._note_nodes()
        out = self._quick(func, args, kwargs) if QUICK else func(*args, **kwargs)
        results: tuple[Tensor, ...] = ()
        if isinstance(out, Tensor):
            results = (out,)
        elif isinstance(out, tuple | list):
            results = tuple(t for t in out if isinstance(t, Tensor))
        operation = _known(func)
        if not operation.view:
            for tensor in results:
                self._see(tensor, operation.name)
        if not operation.free:
            self._count(func, operation, args, kwargs, out, results)
        return out

    def _see(self, tensor: Tensor, name: str) -> None:
        if type(tensor) is not FakeTensor and not host.has_storage(tensor):
            return
        known = self._storages.get(tensor)
        size_bytes = tensor.untyped_storage().nbytes()
        if known is not None:
            if known[0] is not self._tape or self._tape.sizes[known[1]] == size_bytes:
                return
            self._tape.order.append(~known[1])  # resized: another request
        elif host.allocating_on_host() or host.is_host(tensor):
            return
        self._add(tensor, size_bytes, name)

    def _add(self, tensor: Tensor, size_bytes: int, name: str) -> int:
        tape = self._tape
        index = len(tape.sizes)
        tape.sizes.append(size_bytes)
        tape.makers.append(self._maker(name))
        tape.order.append(index)
        self._storages.set(tensor, (tape, index))
        return index

    def _freed(self, entry: tuple[_Tape, int]) -> None:
        tape, index = entry
        if tape is self._tape:
            tape.order.append(~index)

    def _count(
        self, func: Any, operation: _Operation, args: Any, kwargs: Any, out: Any, results: tuple[Tensor, ...]
    ) -> None:
        tape = self._tape
        operands = [value for value in args if isinstance(value, Tensor)]
        if len(operands) < len(args):
            operands += [t for a in args if isinstance(a, list | tuple) for t in a if isinstance(t, Tensor)]
        if kwargs:
            operands += [value for value in kwargs.values() if isinstance(value, Tensor)]
        if func is torch.ops.aten.copy_.default and host.is_host(args[0]) != host.is_host(args[1]):
            tape.host_bytes += args[0].nbytes
            tape.scaled_host_bytes += args[0].nbytes if _grows(args[0].nbytes) else 0
            return
        if operands and all(host.is_host(t) for t in operands):
            return  # the host's processor does it
        if func.namespace in _COLLECTIVES:
            sizes = [t.nbytes for t in (*operands, *results)]
            shared, whole = min(sizes, default=0), max(sizes, default=0)
            tape.host_bytes += whole - shared if whole > shared else 2 * whole  # gathered or scattered; or summed
            return
        sizes = [t.nbytes for t in (*operands, *results)]
        tape.bytes.append(float(sum(sizes)))
        tape.scaled_bytes.append(float(sum(size for size in sizes if _grows(size))))
        flops = 0.0
        if operation.flops is not None:
            try:
                flops = float(operation.flops(*args, **kwargs, out_val=out))
            except (TypeError, ValueError, NotImplementedError):
                flops = 0.0
        tape.flops.append(flops)
        tape.kinds.append(operation.kind)
        tape.half.append(bool(operands) and operands[-1].element_size() == 2)

    # Names.

    def _maker(self, operation: str) -> int:
        where = self._where()
        if torch._C._current_graph_task_id() != -1:
            where = f"{where or 'loss'}, backward"
        return self._names.setdefault(f"{operation} in {where}" if where else operation, len(self._names))

    def _where(self) -> str:
        """The module at work; in a backward the one whose operation is taken back, or done again."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return self._modules[-1]
        if task != self._task[0]:
            self._task = (task, len(self._modules))
        if len(self._modules) > self._task[1]:  # recomputed
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        return "" if node is None else self._module_of(node)

    def _module_of(self, node: Any) -> str:
        if hasattr(node, "variable"):  # it adds up a parameter's gradient, and has no number
            return self._owners.get(id(node.variable), "")
        place = bisect_right(self._spans, node._sequence_nr(), key=lambda span: span[0]) - 1
        return self._spans[place][1] if place >= 0 else ""

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._note_nodes()
        self._modules.append(self._paths.get(module, self._modules[-1]))

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        self._note_nodes()
        if len(self._modules) > 1:
            self._modules.pop()

    def _note_nodes(self) -> None:
        """Nodes made since the last time are of the module at work: those of a backward, too, for a second one."""
        number = torch.autograd._get_sequence_nr()
        if number <= self._noted:
            return  # none, or a recomputation in another thread of autograd, which counts by itself
        where = self._where()
        if not self._spans or self._spans[-1][1] != where:
            self._spans.append((self._noted, where))
        self._noted = number

    def _arrived(self, index: int, param: nn.Parameter) -> None:
        if param.grad is None:
            return
        entry = self._storages.get(local(param.grad))
        if entry is not None and entry[0] is self._tape:
            self._tape.arrivals.append((len(self._tape.order), entry[1], index))


def _grows(size: float) -> bool:
    """Whether a size has the batch in it, when that is a multiple of PRIME."""
    return size > 0 and size % PRIME == 0


@cache
def _is_wrapper(kind: type) -> bool:
    """Whether tensors of this type are made of others, which come here by themselves."""
    return kind is not FakeTensor and hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
)
_COLLECTIVES = ("c10d", "_c10d_functional")  # cards talk by the link that they have to the host
_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "set_")


@cache
def _known(func: Any) -> _Operation:
    packet = func._overloadpacket
    short = packet.__name__
    # What torch puts together of other operations (reshape, contiguous) calls itself a view, and copies if need be. It
    # comes here whole in inference mode.
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    view = bool(getattr(func, "is_view", False)) and not composite
    return _Operation(
        name=f"{func.namespace}.{short}" if func.namespace != "aten" else short,
        view=view and short not in _FREE,
        free=view or short in _FREE,
        kind=_kind(short),
        flops=_OWN_FLOPS.get(func, flop_registry.get(packet)),
    )


def convolution_backward_flops(
    dy: Any,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Sequence[bool],
    *,
    out_val: Any = None,
) -> float:
    """Each of the two gradients takes as much as the convolution. (torch 2.15 counts `groups` times that for the
    weight's.)"""
    return 2.0 * (x if transposed else dy).numel() * math.prod(w.shape[1:]) * (bool(mask[0]) + bool(mask[1]))


_OWN_FLOPS = {torch.ops.aten.convolution_backward.default: convolution_backward_flops}


def _kind(name: str) -> int:
    if "attention" in name:
        return ATTENTION
    if "convolution" in name or "conv" in name:
        return CONVOLUTION
    if name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "linear", "matmul"):
        return MATMUL
    return MEMORY


def rounded(sizes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Requests as the allocator rounds them: up to multiples of 512, int64."""
    return (-(-np.round(sizes).astype(np.int64) // 512) * 512).clip(min=0)
