"""Which code runs a kernel: Triton's on a GPU, PyTorch's elsewhere; and the one place where a Triton kernel starts.

Files of kernels take `triton`, `tl` and `jit` from here, so that they can be imported where there is no Triton.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lowvram.errors import LowVRAMError

try:
    import triton
    import triton.language as tl
except ImportError as error:  # macOS, Windows, a CPU build of torch
    _missing: str | None = str(error)

    class _Absent:
        """Stands for triton.language, of which kernels read names as they are defined."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

    triton = tl = _Absent()
else:
    _missing = None

Impl = Literal["auto", "reference", "triton"]
Launch = Callable[[Any, Sequence[int], tuple[Any, ...], dict[str, Any]], None]

TRITON_FROM = (7, 5)  # compute capability; below it PyTorch itself has no kernels any more
_LIBRARY = torch.library.Library("lowvram", "DEF")

_default: Impl = "auto"  # what "auto" means in this process
_pretended: bool | None = None  # in a trace that stands for a card: whether that card runs Triton
_take_launch: Launch | None = None
_log = logging.getLogger("lowvram")


def jit(function: Callable[..., Any]) -> Any:
    """A Triton kernel; without Triton a name that can't be launched."""
    return function if _missing is not None else triton.jit(function)


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit`, where one compilation serves all values of these whole numbers.

    Of others Triton compiles a kernel for 1, for multiples of 16 and for the rest, which wide loads may want.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return function if _missing is not None else triton.jit(function, do_not_specialize=names)

    return decorate


def runs_triton(impl: Impl, x: Tensor) -> bool:
    """Whether to run Triton's kernels on x, or on what x stands for in a trace.

    impl: "triton" insists, "reference" never does, and "auto" takes Triton on GPUs where it works.

    Raises:
        LowVRAMError: "triton" is asked for where it can't run.
    """
    impl = _checked(impl)
    if impl == "auto":
        impl = _default
    if impl == "reference":
        return False
    if _pretended is not None:
        return _pretended or impl == "triton"
    if impl == "auto":
        return x.is_cuda and works_on(x.device.index or 0)
    if _missing is not None:
        raise LowVRAMError(f"Triton kernels were asked for, and Triton can't be imported: {_missing}.", _REMEDY)
    if _take_launch is None and not x.is_cuda and not interpreted():
        raise LowVRAMError(f"Triton kernels were asked for, for a tensor on {x.device}.", _REMEDY)
    return True


_REMEDY = "Use kernels=auto, which runs PyTorch's own there; or set TRITON_INTERPRET=1 to try a kernel on a CPU."


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, or stands for what would be there in a trace."""
    return x.is_cuda or _pretended is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, number by number, as it does on request where there is no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Within, "auto" means `impl`, in every thread."""
    global _default
    before, _default = _default, impl
    try:
        yield
    finally:
        _default = before


def use(impl: str) -> None:
    """From now on "auto" means `impl`: "auto" itself, "reference" or "triton"."""
    global _default
    _default = _checked(impl)


def _checked(impl: str) -> Impl:
    if impl not in get_args(Impl):
        raise ValueError(f'impl={impl!r} is not known; use "auto", "reference" or "triton"')
    return cast(Impl, impl)


@contextmanager
def pretending(triton: bool) -> Iterator[None]:
    """Within, tensors of every device stand for those of a card that runs Triton, or does not; nothing is launched."""
    global _pretended
    before, _pretended = _pretended, triton
    try:
        yield
    finally:
        _pretended = before


@contextmanager
def launches_go_to(take: Launch) -> Iterator[None]:
    """Within, take(kernel, grid, arguments, options) is called in place of every launch: to record or to compile it."""
    global _take_launch
    before, _take_launch = _take_launch, take
    try:
        yield
    finally:
        _take_launch = before


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel over `grid`; over an empty one nothing happens.

    options: its constexpr arguments, num_warps, num_stages.
    """
    if 0 in grid:
        return
    if _take_launch is not None:
        _take_launch(kernel, grid, arguments, options)
        return
    tensor = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[tuple(grid)](*arguments, **options)


def register(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function torch.ops.lowvram.NAME, which tracing and compiling see as one operation; returns that.

    schema: such as "swiglu(Tensor x) -> Tensor", with (a!) at what it writes to. fake: makes its outputs, unwritten.
    It has no derivative of its own: an autograd Function calls it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"lowvram::{name}", fake, lib=_LIBRARY)

    def decorate(function: Callable[..., Any]) -> Any:
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.lowvram, name).default

    return decorate


def wide(x: Tensor) -> Any:
    """The type that a kernel computes in: fp32, or fp64 for fp64, as numerical checks of derivatives want it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@jit
def _add_one(x):
    tl.store(x, tl.load(x) + 1)


def works_on(device: int) -> bool:
    """Whether a small kernel gives the right answer on a card: Triton wants a C compiler and a driver of its time."""
    return _tried_on(device)


# torch.compile is to take the answer, not to trace the trial. (torch's own decorator for it imports all of dynamo.)
works_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _tried_on(device: int) -> bool:
    if torch.cuda.get_device_capability(device) < TRITON_FROM:
        return False
    if _missing is not None:
        reason = f"it can't be imported ({_missing})"
    else:
        try:
            with _disable_current_modes():  # somebody's trace may be the first to ask
                x = torch.ones(1, device=torch.device("cuda", device))
                launch(_add_one, (1,), x)
                if x.item() == 2:
                    return True
            reason = "it gave a wrong result"
        except torch.OutOfMemoryError:
            raise  # which tells nothing of Triton
        except Exception as error:  # whatever it is, training goes on without it
            reason = f"it failed: {type(error).__name__}: {error}"
    _log.warning("Triton does not work on this card, as %s; PyTorch's own kernels are used.", reason)
    return False
