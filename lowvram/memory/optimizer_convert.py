"""One parameter's optimizer state turned into another optimizer's, through Adam's two moments in fp32."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram.memory.narrow_optimizer import BLOCK_ELEMENTS, code_values


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
    lone = "exp_avg_8bit" not in saved
    first = _read(saved, "exp_avg", "signed", shape)
    second = _read(saved, "exp_avg_sq", "positive" if lone else "unsigned", shape)
    if second is not None:
        return Moments(step=step, first=first, second=second)
    if "variance" in saved:
        second = saved["variance"].float().reshape(shape)
    elif "row_var" in saved:
        rows, columns = saved["row_var"].float(), saved["col_var"].float()
        mean = rows.mean().clamp_(min=torch.finfo(torch.float32).tiny)
        second = (rows * columns / mean).reshape(shape)
    return Moments(step=step, first=first, second=second, factored=second is not None)


def write(moments: Moments, state: dict[str, Any], *, beta2_then: float, beta2_now: float) -> None:
    """Fill `state`, as its optimizer made it, in place. First moments that are missing are zero.

    beta2_then, beta2_now: of the optimizers that wrote `moments` and own `state`, if they are Adam.
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
            _write(state, "exp_avg_sq", second, "unsigned" if "exp_avg_8bit" in state else "positive")
            if "max_exp_avg_sq" in state:
                state["max_exp_avg_sq"].copy_(second)
        elif "variance" in state or "row_var" in state:
            if not moments.factored:
                second = second / (1 - beta2_then**moments.step)
            _write_factored(state, second)
    if moments.first is not None and ("exp_avg" in state or "exp_avg_8bit" in state):
        _write(state, "exp_avg", moments.first, "signed")


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


def quantize(values: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """float32 [n] as uint8 [n] and the scale of each block, float32 [blocks]; `code`: see `code_values`.

    bitsandbytes' own for CPUs is not used: it looks values up in a coarse table, where all below 1e-5 of the block's
    largest become 2e-5 of it, zeros too.
    """
    levels = torch.tensor(code_values(code))
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK_ELEMENTS)).view(-1, BLOCK_ELEMENTS)
    scales = padded.abs().amax(dim=1)
    scaled = padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return nearest.to(torch.uint8).view(-1)[: len(values)], scales


def dequantize(narrow: Tensor, scales: Tensor, code: str) -> Tensor:
    """What `quantize`, or a step on the device, made of float32 [n]."""
    values = torch.tensor(code_values(code))[narrow.long()]
    return values * scales.repeat_interleave(BLOCK_ELEMENTS)[: len(narrow)]


def _read(saved: Mapping[str, Any], name: str, code: str, shape: torch.Size) -> Tensor | None:
    if name in saved:
        wide: Tensor = saved[name]
        return wide.detach().float().cpu().reshape(shape)
    if f"{name}_8bit" not in saved:
        return None
    return dequantize(saved[f"{name}_8bit"].cpu(), saved[f"{name}_absmax"].cpu(), code).reshape(shape)


def _write(state: dict[str, Any], name: str, values: Tensor, code: str) -> None:
    if name in state:
        state[name].copy_(values)
        return
    narrow, scales = quantize(values.reshape(-1), code)
    state[f"{name}_8bit"].copy_(narrow)
    state[f"{name}_absmax"].copy_(scales)


def _write_factored(state: dict[str, Any], second: Tensor) -> None:
    if "variance" in state:
        state["variance"].copy_(second)
        return
    matrix = second.reshape(second.shape[0], -1)
    state["row_var"].copy_(matrix.mean(dim=1, keepdim=True))
    state["col_var"].copy_(matrix.mean(dim=0, keepdim=True))
