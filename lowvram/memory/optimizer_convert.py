"""One parameter's optimizer state turned into another optimizer's, through Adam's two moments in fp32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowvram.kernels.adamw8bit import memory_order
from lowvram.kernels.eight_bit import dequantize, quantize
from lowvram.memory.fsdp_tensors import local


@dataclass(kw_only=True)
class Moments:
    """float32 on the CPU, of the parameter's shape; None: the optimizer keeps none.

    factored: the second is Adafactor's estimate, which needs no correction of its bias; Adam's does.
    """

    step: int
    first: Tensor | None
    second: Tensor | None
    factored: bool = False


def read(saved: Mapping[str, Any], shape: torch.Size) -> Moments:
    """Moments of a parameter's saved state, whichever optimizer wrote it."""
    step = int(saved.get("step", 0))
    first = _read(saved, "exp_avg", "signed", shape)
    second = _read(saved, "exp_avg_sq", "positive", shape)  # none is zero beside others, for what divides by its root
    if second is not None:
        return Moments(step=step, first=first, second=second)
    if "variance" in saved:
        second = saved["variance"].float().reshape(shape)
    elif "row_var" in saved:
        rows, columns = saved["row_var"].float(), saved["col_var"].float()
        mean = rows.mean().clamp_(min=torch.finfo(torch.float32).tiny)
        second = (rows * columns / mean).reshape(shape)
    return Moments(step=step, first=first, second=second, factored=second is not None)


def write(
    moments: Moments, state: dict[str, Any], *, beta2_then: float, beta2_now: float, order: Tensor | None = None
) -> None:
    """Fill `state`, as its optimizer made it, in place. First moments that are missing are zero.

    beta2_then, beta2_now: of the optimizers that wrote `moments` and own `state`, if they are Adam. order: a tensor in
    the order of whose memory `state` keeps 8-bit moments; None: of a contiguous one.
    """
    clear(state)
    set_step(state, moments.step)
    second = moments.second
    if moments.step == 0:
        return
    if second is not None:
        if "exp_avg_sq" in state or "exp_avg_sq_8bit" in state:
            if moments.factored:
                second = second * (1 - beta2_now**moments.step)
            _write(state, "exp_avg_sq", second, "positive", order)
            if "max_exp_avg_sq" in state:
                state["max_exp_avg_sq"].copy_(second)
        elif "variance" in state or "row_var" in state:
            if not moments.factored:
                second = second / (1 - beta2_then**moments.step)
            _write_factored(state, second)
    if moments.first is not None and ("exp_avg" in state or "exp_avg_8bit" in state):
        _write(state, "exp_avg", moments.first, "signed", order)


def portable(param: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state that `NarrowOptimizer` keeps of a parameter as a checkpoint holds it, which tells no memory's order.

    Of a contiguous parameter it is as it stands. Of others, and of sharded ones, moments become fp32 on the CPU: they
    turn to the same 8 bits again, as each block's scale is exact.
    """
    own = local(param.detach())
    if not isinstance(param, DTensor) and own.is_contiguous():
        return state
    out: dict[str, Any] = {"step": state["step"]} if state else {}
    for name, code in (("exp_avg", "signed"), ("exp_avg_sq", "positive")):
        if name in state:
            wide = state[name]
        elif f"{name}_8bit" in state:
            flat = dequantize(state[f"{name}_8bit"].cpu(), state[f"{name}_absmax"].cpu(), code)
            wide = torch.empty_strided(own.shape, own.stride())
            memory_order(wide).copy_(flat)
        else:
            continue
        if isinstance(param, DTensor):
            sizes: Any = {"shape": param.shape, "stride": param.stride()}
            wide = DTensor.from_local(wide, param.device_mesh, param.placements, run_check=False, **sizes)
        out[name] = wide
    return out


def widened(tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """{"INDEX.KEY": tensor} of whole parameters, with 8-bit moments of sharded ones in fp32, to be cut as those are."""
    out = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        param = parameters[int(index)]
        if not isinstance(param, DTensor) or not key.endswith(("_8bit", "_absmax")):
            out[name] = tensor
        elif key.endswith("_8bit"):
            moment = key.removesuffix("_8bit")
            code = "signed" if moment == "exp_avg" else "positive"
            scales = tensors[f"{index}.{moment}_absmax"]
            out[f"{index}.{moment}"] = dequantize(tensor.cpu(), scales.cpu(), code).reshape(param.shape)
    return out


def clear(state: dict[str, Any]) -> None:
    """Set state to what it is before the first step, in place."""
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    set_step(state, 0)


def set_step(state: dict[str, Any], step: int) -> None:
    """Set the count of steps, a tensor or a number."""
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(float(step))
    elif "step" in state:
        state["step"] = step


def _read(saved: Mapping[str, Any], name: str, code: str, shape: torch.Size) -> Tensor | None:
    if name in saved:
        wide: Tensor = saved[name]
        return wide.detach().float().cpu().reshape(shape)
    if f"{name}_8bit" not in saved:
        return None
    return dequantize(saved[f"{name}_8bit"].cpu(), saved[f"{name}_absmax"].cpu(), code).reshape(shape)


def _write(state: dict[str, Any], name: str, values: Tensor, code: str, order: Tensor | None) -> None:
    if name in state:
        state[name].copy_(values)
        return
    if order is None or order.is_contiguous():
        flat = values.reshape(-1)
    else:
        flat = memory_order(torch.empty_strided(order.shape, order.stride()).copy_(values))
    narrow, scales = quantize(flat, code)
    state[f"{name}_8bit"].copy_(narrow)
    state[f"{name}_absmax"].copy_(scales)


def _write_factored(state: dict[str, Any], second: Tensor) -> None:
    if "variance" in state:
        state["variance"].copy_(second)
        return
    matrix = second.reshape(second.shape[0], -1)
    state["row_var"].copy_(matrix.mean(dim=1, keepdim=True))
    state["col_var"].copy_(matrix.mean(dim=0, keepdim=True))
