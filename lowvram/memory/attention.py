"""Which attention runs: torch's choice, plain matrix products, or xformers, under networks that call torch's."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowvram.errors import LowVRAMError
from lowvram.memory.policy import ATTENTION

_ALIGNMENT = 8  # elements: a row of an xformers bias begins at a multiple of 16 bytes


@contextmanager
def using(choice: str, *, second_order: bool = False) -> Iterator[None]:
    """Attention by `choice` within, for calls of `F.scaled_dot_product_attention`; the backward belongs within too.

    sdpa: torch chooses; but in a phase with second derivatives matrix products (math), the only kind that has them.
    math: matrix products. xformers: its memory-efficient attention. torch's shortcut for whole layers in evaluation,
    which passes by that function, is off where the kind is not torch's to choose.

    Raises:
        LowVRAMError: xformers is missing, or asked for in a phase with second derivatives.
    """
    if choice not in ATTENTION:
        raise LowVRAMError(f"memory.attention={choice} is not known.", f"Use one of {', '.join(ATTENTION)}.")
    if choice == "sdpa" and not second_order:
        yield
        return
    if choice == "xformers":
        _check_first_order(second_order)
        with _slow_path(), _through(_xformers_ops()):
            yield
        return
    with _slow_path(), sdpa_kernel(SDPBackend.MATH):
        yield


def check(choice: str, device: torch.device, second_order: bool = False, *, dtype: torch.dtype = torch.float16) -> None:
    """Raise LowVRAMError unless `choice` runs on a device in a phase, forward and backward.

    dtype: of the attention's inputs, float16 unless told; xformers is tried with it.
    """
    if choice not in ATTENTION:
        raise LowVRAMError(f"memory.attention={choice} is not known.", f"Use one of {', '.join(ATTENTION)}.")
    if choice != "xformers":
        return
    _check_first_order(second_order)
    if device.type != "cuda":
        raise LowVRAMError(
            f"memory.attention=xformers has no kernel for the {device.type}.", "Use memory.attention=sdpa."
        )
    ops = _xformers_ops()
    probe = _probe(device, dtype)
    try:
        ops.memory_efficient_attention(probe, probe, probe).sum().backward()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LowVRAMError(
            f"memory.attention=xformers has no working kernel for {torch.cuda.get_device_name(device)} in {dtype}: "
            f"{reason[0]}",
            "Use memory.attention=sdpa.",
        ) from error


@contextmanager
def _through(ops: ModuleType) -> Iterator[None]:
    """Calls of F.scaled_dot_product_attention go to xformers within.

    The function is exchanged in torch.nn.functional, for all threads. A TorchFunctionMode would not do: it is off
    inside of `backward`, where recomputed blocks attend again, and inside of nn.MultiheadAttention.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = partial(_attend, ops)  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own  # type: ignore[assignment]


def _attend(
    ops: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention by xformers: [..., H, L, D] and [..., H, S, D] to [..., H, L, Dv]."""
    if attn_mask is not None and is_causal:
        raise ValueError("scaled_dot_product_attention takes attn_mask or is_causal, not both")
    if torch.is_autocast_enabled(query.device.type):  # torch's own casts by itself; xformers wants equal dtypes
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), dim=-3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])  # [..., H]
    q, k, v = (_heads_inside(x.expand(*lead, *x.shape[-2:])) for x in (query, key, value))  # [B, L or S, H, D]
    bias: Any = None
    if is_causal:
        bias = ops.LowerTriangularMask()  # from the upper left, as torch's
    elif attn_mask is not None:
        bias = _bias(attn_mask, lead, q, k)
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=scale)  # [B, L, H, Dv]
    return out.transpose(1, 2).reshape(*lead, query.size(-2), value.size(-1))


def _heads_inside(x: Tensor) -> Tensor:
    """[..., H, L, D] or [L, D] as [B, L, H, D]."""
    heads = x.size(-3) if x.dim() > 2 else 1
    return x.reshape(-1, heads, *x.shape[-2:]).transpose(1, 2)


def _bias(mask: Tensor, lead: torch.Size, q: Tensor, k: Tensor) -> Tensor:
    """torch's mask, additive or bool with True for what takes part, as [B, H, L, S] to add, its rows aligned."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    length, keys = q.size(1), k.size(1)
    mask = mask.to(q.dtype).expand(*mask.shape[:-2], length, keys)
    padded = F.pad(mask, (0, -keys % _ALIGNMENT))  # a view into longer rows is what xformers asks for
    whole = padded.expand(*lead, length, padded.size(-1)).reshape(q.size(0), q.size(2), length, -1)
    return whole[..., :keys]


def _probe(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, 16, 1, 32, device=device, dtype=dtype, requires_grad=True)  # [B, L, H, D]


@contextmanager
def _slow_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _check_first_order(second_order: bool) -> None:
    if second_order:
        raise LowVRAMError(
            "memory.attention=xformers in a phase with second derivatives (R1, path length): it has only the first.",
            "Use memory.attention=sdpa, which takes matrix products there, or memory.attention=math.",
        )


def _xformers_ops() -> ModuleType:
    """xformers.ops, if xformers is there and its own kernels are."""
    try:
        package, ops = import_module("xformers"), import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise LowVRAMError(
            f"memory.attention=xformers, but xformers can't be imported: {error}.",
            "pip install xformers, in the version built for this torch; or use memory.attention=sdpa.",
        ) from error
    library = getattr(package, "_cpp_lib", None)
    failure = getattr(library, "_cpp_library_load_exception", None)
    if failure is not None:  # what then remains of it calls torch's own kernels
        raise LowVRAMError(
            f"memory.attention=xformers, but its kernels do not load beside torch {torch.__version__}.",
            "Install the xformers built for this torch, or use memory.attention=sdpa.",
        ) from failure
    return ops
