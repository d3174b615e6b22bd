"""CUDA's autocast on tensors of the CPU: a training step traced on fake CPU tensors casts as it would on a card.

torch.autocast has another list of operations for each kind of device. The CPU's leaves group_norm, layer_norm, exp,
sum and more in 16 bits, which CUDA's runs in 32, so that a step traced under it keeps fewer bytes than a card does.

The lists are those of torch's "Automatic Mixed Precision" page and of ATen/autocast_mode.h, from 2.11 on. Versions
differ little: rms_norm and linalg_matrix_sqrth came after 2.11, names of dimensions went. The dispatcher is asked
which of them this torch's CUDA list has, so that each version keeps to its own.
"""

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

Kernel = Callable[..., Any]

_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_INSTEAD = "cpu"  # the device whose autocast plays CUDA's


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Every floating-point argument becomes 16 bits wide.
NARROW = _names(
    """
    _convolution _convolution.deprecated convolution conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input
    linear matmul mm mv bmm addmm addmv addr addbmm baddbmm einsum chain_matmul linalg_multi_dot linalg_vecdot prelu
    scaled_dot_product_attention _scaled_dot_product_flash_attention
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _thnn_fused_lstm_cell _thnn_fused_gru_cell
    """
)

# Every floating-point argument becomes 32 bits wide.
WIDE = _names(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan softplus logsumexp
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar layer_norm native_layer_norm rms_norm group_norm renorm
    frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity dist pdist cdist linalg_matrix_sqrth
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    binary_cross_entropy_with_logits cosine_embedding_loss hinge_embedding_loss huber_loss kl_div l1_loss
    margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d poisson_nll_loss
    smooth_l1_loss soft_margin_loss triplet_margin_loss
    """
)

# They read what they are given and are asked for a result of 32 bits, unless the caller asks for a dtype.
WIDE_RESULT = _names(
    """
    sum sum.dim_IntList prod prod.dim_int cumsum cumprod softmax.int log_softmax.int linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord
    """
)

# The same for overloads without a dtype: another overload is called.
WIDE_RESULT_BY = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}

# 32 bits if one argument has them, else 16.
WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")

BANNED = frozenset(["binary_cross_entropy"])

# CUDA has them, and no tensor of the CPU gets there: cuDNN's own, and names of dimensions.
ELSEWHERE = _names(
    """
    _cudnn_rnn cudnn_convolution cudnn_convolution_transpose cumprod.dimname cumsum.dimname log_softmax.Dimname
    norm.names_ScalarOpt_dim prod.dim_Dimname softmax.Dimname sum.dim_DimnameList
    """
)

_CPU_STANDS_IN = frozenset(["mkldnn_rnn_layer"])  # the CPU has it where a card has _cudnn_rnn: both in 16 bits

_lock = threading.Lock()
_users = 0
_undo: Callable[[], None] | None = None


@contextmanager
def cuda_autocast_on_cpu() -> Iterator[None]:
    """Let the CPU's autocast be CUDA's within the block, on real and fake tensors.

        with cuda_autocast_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            loss = network(images).square().mean()  # each dtype, hence each byte, as on a card

    Within, `torch.autocast("cuda")` acts on the CPU too, with CUDA's default dtype, its cache of cast weights and no
    warning that there is no CUDA; so do torch.is_autocast_enabled, get_autocast_dtype and their setters, asked about
    "cuda", and custom_fwd(device_type="cuda"). A `torch.autocast("cuda")` made before the block on a machine without
    CUDA has switched itself off already, and stays off.

    Run the backward pass inside too: what checkpointing recomputes there must cast as it did before.

    It holds for the whole process: no other thread should use autocast meanwhile, and nothing should run on a real
    card. Blocks may be nested or overlap; with the last one everything is as before.

    Raises:
        RuntimeError: as on a card, for binary_cross_entropy under autocast (from the operation, not from here).
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _users, _undo
    with _lock:
        if _users == 0:
            _undo = _install()
        _users += 1


def _leave() -> None:
    global _users, _undo
    with _lock:
        _users -= 1
        if _users == 0 and _undo is not None:
            undo, _undo = _undo, None
            undo()


def _install() -> Callable[[], None]:
    """Change the dispatcher and torch's module; what is returned changes them back."""
    with ExitStack() as stack:  # an error on the way undoes what was done
        casts = _WeightCasts()
        stack.callback(casts.clear)
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*overrid")  # that is the purpose
            for name, make in _replacements():
                library.impl(name, torch.library.fallthrough_kernel if make is None else make(casts), "AutocastCPU")
        if not torch.is_autocast_enabled(_INSTEAD):  # the next one gets CUDA's default: fp16
            stack.callback(torch.set_autocast_dtype, _INSTEAD, torch.get_autocast_dtype(_INSTEAD))
            torch.set_autocast_dtype(_INSTEAD, torch.get_autocast_dtype("cuda"))
        for owner, name, patch in _patches(casts):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, patch)
        return stack.pop_all().close


# ---------------------------------------------------------------------------------------------- the dispatcher's part


@functools.cache
def _replacements() -> tuple[tuple[str, "Callable[[_WeightCasts], Kernel] | None"], ...]:
    """What must differ from the CPU's autocast: an operation, and what makes its kernel; None: leave it alone."""
    found: list[tuple[str, Callable[[_WeightCasts], Kernel] | None]] = []
    for name in sorted(cuda_operations() - ELSEWHERE):
        make = _maker(name)
        if make is not None:  # else an operation newer than these lists
            found.append((name, make))
    return (*found, *((name, None) for name in sorted(cpu_operations() - cuda_operations() - _CPU_STANDS_IN)))


@functools.cache
def cuda_operations() -> frozenset[str]:
    """The operations that this torch's CUDA autocast knows, by name and overload: "mm", "softmax.int"."""
    return _operations("AutocastCUDA")


@functools.cache
def cpu_operations() -> frozenset[str]:
    """The operations that this torch's CPU autocast knows, by name and overload."""
    return _operations("AutocastCPU")


def _operations(key: str) -> frozenset[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    return frozenset(name.removeprefix("aten::") for name in names if has(name, key))


def _maker(name: str) -> "Callable[[_WeightCasts], Kernel] | None":
    operation = _overload(name)
    if name in NARROW:
        return functools.partial(_narrow, operation)
    if name in WIDE:
        return functools.partial(_wide, operation)
    if name in WIDE_RESULT:
        return functools.partial(_wide_result, operation)
    if name in WIDE_RESULT_BY:
        return functools.partial(_wide_result_by, operation, _overload(WIDE_RESULT_BY[name]))
    if name in WIDEST:
        return functools.partial(_widest, operation)
    if name in BANNED:
        return functools.partial(_banned, operation)
    return None


def _overload(name: str) -> OpOverload:
    base, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, base), overload or "default")
    return found


def _as_below(operation: OpOverload, args: Any, kwargs: Any) -> Any:
    """Call the operation past autocast."""
    with torch._C._ExcludeDispatchKeyGuard(_CPU_KEY):
        return operation(*args, **kwargs)


def _narrow(operation: OpOverload, casts: "_WeightCasts") -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _as_below(operation, *_cast_all(args, kwargs, torch.get_autocast_dtype(_INSTEAD), casts))

    return kernel


def _wide(operation: OpOverload, casts: "_WeightCasts") -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _as_below(operation, *_cast_all(args, kwargs, torch.float32, casts))

    return kernel


def _wide_result(operation: OpOverload, casts: "_WeightCasts") -> Kernel:
    defaults, place = _positions(operation)
    halves = {"softmax.int": torch.ops.aten._softmax.default, "log_softmax.int": torch.ops.aten._log_softmax.default}
    from_half = halves.get(f"{operation.overloadpacket.__name__}.{operation._overloadname}")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args = (*args, *defaults[len(args) :])
        if not _eligible(args[0]):
            return _as_below(operation, args, kwargs)
        given = kwargs.get("dtype") if place is None else args[place]
        dtype = torch.float32 if given is None else given
        if from_half and dtype is torch.float32 and args[0].dtype is torch.float16 and isinstance(args[0], FakeTensor):
            return _as_below(from_half, (args[0], args[1], True), {})  # CUDA reads fp16 here without a wide copy
        if place is None:
            return _as_below(operation, args, {**kwargs, "dtype": dtype})
        return _as_below(operation, (*args[:place], dtype, *args[place + 1 :]), kwargs)

    return kernel


def _wide_result_by(operation: OpOverload, other: OpOverload, casts: "_WeightCasts") -> Kernel:
    defaults, _ = _positions(operation)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if _eligible(args[0]) else args[0].dtype
        return _as_below(other, (*args, *defaults[len(args) :]), {**kwargs, "dtype": dtype})

    return kernel


def _widest(operation: OpOverload, casts: "_WeightCasts") -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        narrow = torch.get_autocast_dtype(_INSTEAD)
        dtype = narrow
        for tensor in (arg for arg in (*args, *kwargs.values()) if _eligible(arg)):
            if tensor.dtype is torch.float32:
                dtype = torch.float32
            elif dtype is not torch.float32 and tensor.dtype is not dtype:
                raise RuntimeError(f"{operation} of {tensor.dtype} under CUDA autocast to {narrow}")
        return _as_below(operation, *_cast_all(args, kwargs, dtype, casts))

    return kernel


def _banned(operation: OpOverload, casts: "_WeightCasts") -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{operation.overloadpacket.__name__} is refused by CUDA's autocast. Use "
            "binary_cross_entropy_with_logits, without the sigmoid before it."
        )

    return kernel


def _positions(operation: OpOverload) -> tuple[tuple[Any, ...], int | None]:
    """The defaults of the positional arguments, and the place of `dtype` among them if it is one."""
    positional = [argument for argument in operation._schema.arguments if not argument.kwarg_only]
    places = [place for place, argument in enumerate(positional) if argument.name == "dtype"]
    return tuple(argument.default_value for argument in positional), places[0] if places else None


# ------------------------------------------------------------------------------------------------------------- casts


def _eligible(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is torch.float64:
        return False
    device = value.fake_device if isinstance(value, FakeTensor) else value.device  # a fake tensor's `device` is slow
    return device.type == "cpu"


def _cast_all(args: Any, kwargs: Any, dtype: torch.dtype, casts: "_WeightCasts") -> tuple[list[Any], dict[str, Any]]:
    """The arguments in `dtype`, the last cast first: so does torch's compiled code, and an allocator sees the order."""
    named = {name: _cast(value, dtype, casts) for name, value in reversed(kwargs.items())}
    return [_cast(value, dtype, casts) for value in reversed(args)][::-1], named


def _cast(value: Any, dtype: torch.dtype, casts: "_WeightCasts") -> Any:
    """Tensors, and lists of them, in `dtype`; everything else, and what autocast leaves alone, as it is."""
    if isinstance(value, (list, tuple)):
        return [_cast(item, dtype, casts) for item in value]
    if not _eligible(value) or value.dtype is dtype:
        return value
    if value.requires_grad and value.is_leaf and torch.is_autocast_cache_enabled():
        return casts.cast(value, dtype)
    return value.to(dtype)


class _WeightCasts:
    """The cached casts of weights, kept until the outermost autocast ends: torch's own cache has no door in Python."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """weight: a leaf that requires grad. The cast can be differentiated, even if no_grad holds now: as torch's."""
        if weight.dtype is not torch.float32 or dtype is not torch.get_autocast_dtype(_INSTEAD) or weight._is_view():
            return weight.to(dtype)
        known, cast = self._made.get(id(weight), (None, None))
        if known is None or cast is None or known() is not weight:
            with torch.enable_grad():
                cast = weight.to(dtype)
            self._made[id(weight)] = weakref.ref(weight), cast
        return cast

    def clear(self) -> None:
        self._made.clear()


# -------------------------------------------------------------------------------------------------- the module's part


def _patches(casts: _WeightCasts) -> list[tuple[Any, str, Any]]:
    """What stands in for torch's functions: (where, name, function). "cuda" becomes "cpu" in each."""
    mode = torch.amp.autocast_mode
    original_init, original_cast, original_clear = mode.autocast.__init__, mode._cast, torch.clear_autocast_cache
    is_enabled, set_enabled = torch.is_autocast_enabled, torch.set_autocast_enabled
    get_dtype, set_dtype = torch.get_autocast_dtype, torch.set_autocast_dtype

    def init(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if _instead(device_type) == device_type:
            original_init(self, device_type, dtype, enabled, cache_enabled)
            return
        original_init(self, device_type, dtype, False, cache_enabled)  # looks for no CUDA: it would switch itself off
        self._enabled = enabled

    def cast_inputs(value: Any, device_type: str, dtype: torch.dtype) -> Any:
        return original_cast(value, _instead(device_type), dtype)

    def clear() -> None:
        original_clear()
        casts.clear()

    def autocast_is_enabled(device_type: str = "cuda") -> bool:
        return is_enabled(_instead(device_type))

    def set_autocast_enabled(*args: Any, **kwargs: Any) -> None:
        names = ("device_type", "enabled") if len(args) + len(kwargs) == 2 else ("enabled",)
        given = {"device_type": "cuda", **dict(zip(names, args, strict=False)), **kwargs}
        set_enabled(_instead(given["device_type"]), given["enabled"])

    def autocast_dtype(device_type: str = "cuda") -> torch.dtype:
        return get_dtype(_instead(device_type))

    def set_autocast_dtype(device_type: str, dtype: torch.dtype) -> None:
        set_dtype(_instead(device_type), dtype)

    return [
        (mode.autocast, "__init__", init),
        (mode, "_cast", cast_inputs),
        (torch, "clear_autocast_cache", clear),
        (torch, "is_autocast_enabled", autocast_is_enabled),
        (torch, "set_autocast_enabled", set_autocast_enabled),
        (torch, "get_autocast_dtype", autocast_dtype),
        (torch, "set_autocast_dtype", set_autocast_dtype),
        (torch, "get_autocast_gpu_dtype", autocast_dtype),
        (torch, "set_autocast_gpu_dtype", functools.partial(set_autocast_dtype, "cuda")),
    ]


def _instead(device_type: str) -> str:
    return _INSTEAD if isinstance(device_type, str) and device_type.partition(":")[0] == "cuda" else device_type
