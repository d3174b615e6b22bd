"""An optimizer's state: made before the first step, moved, saved by parameters' places, and loaded into any kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.memory import optimizer_convert as convert
from lowvram.memory.fsdp_tensors import local
from lowvram.memory.narrow_optimizer import NarrowOptimizer
from lowvram.memory.optimizer_classes import Adafactor, SecondMomentAdam
from lowvram.memory.paged_optimizer import PagedOptimizer, is_paged


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Make all state now, without changing a weight, so that steps allocate nothing that lasts.

    Optimizers of kinds that are not lowvram's or Adam's make theirs in their first step, as ever.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param] and _is_known(optimizer):
                optimizer.state[param].update(_made(optimizer, group, param))


def state_to(optimizer: torch.optim.Optimizer, where: Callable[[Tensor], Tensor]) -> None:
    """Replace every state tensor of more than one element by what `where` returns for it, always in the same order.

    Paged state stays: it moves by itself.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1 and not is_paged(value):
                    state[key] = where(value)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """adam, adam8bit, paged_adam, paged_adam8bit, lion8bit, adafactor, or the class's name, such as SGD."""
    if isinstance(optimizer, (NarrowOptimizer, PagedOptimizer)):
        return optimizer.kind
    if isinstance(optimizer, Adafactor):
        return "adafactor"
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, SecondMomentAdam)):
        return "adam"
    return type(optimizer).__name__


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors {"0.exp_avg": ...} and JSON numbers {"scalars", "groups", "kind"}."""
    return pack_many([optimizer], _parameters(optimizer), {})


def pack_many(
    optimizers: Sequence[torch.optim.Optimizer],
    params: Sequence[nn.Parameter],
    shells: Mapping[nn.Parameter, nn.Parameter],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of several optimizers of one kind, as one optimizer over `params` would have it.

    params: in the order that numbers them. shells: for a parameter, the one that an optimizer holds in its place.
    The tensors are the optimizers' own, not copies; but see `optimizer_convert.portable`.
    """
    owners = _owners(optimizers)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, param in enumerate(params):
        held = shells.get(param, param)
        owner = _owner(owners, held, index)
        state = owner.state.get(held, {})
        if isinstance(owner, NarrowOptimizer):
            state = convert.portable(held, state)
        for key, value in state.items():
            if is_paged(value) and torch.cuda.is_available():
                torch.cuda.synchronize()  # the host reads it where it lies
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{key}"] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizers[0].param_groups]
    return tensors, {"scalars": scalars, "groups": groups, "kind": kind_of(optimizers[0])}


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> list[str]:
    """Restore what `pack` gave, of this optimizer or any other kind. The settings (such as lr) stay those of now.

    The same kind goes on exactly. Returns what was lost or converted, for the user.

    Raises:
        LowVRAMError: the state is of other parameters.
    """
    return unpack_many([optimizer], _parameters(optimizer), {}, tensors, numbers)


def unpack_many(
    optimizers: Sequence[torch.optim.Optimizer],
    params: Sequence[nn.Parameter],
    shells: Mapping[nn.Parameter, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> list[str]:
    """`unpack` for several optimizers of one kind over parts of `params`; see `pack_many`.

    State is written into the tensors that are there, wherever they lie, so that paged state stays paged.
    """
    saved: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *numbers["scalars"].items()]:
        index, key = name.split(".", 1)
        saved.setdefault(int(index), {})[key] = value
    if saved and max(saved) >= len(params):
        raise LowVRAMError(
            f"the optimizer's state is of parameter {max(saved)}, and the network has {len(params)}.",
            "Resume with the recipe that the checkpoint was written with.",
        )
    owners = _owners(optimizers)
    for optimizer in optimizers:
        init_state(optimizer)
    if any(is_paged(v) for o in optimizers for state in o.state.values() for v in state.values()):
        torch.cuda.synchronize()
    kind_then = numbers.get("kind")  # checkpoints before there were kinds have none
    beta2_then = _beta2(numbers["groups"][0])
    messages: dict[str, None] = {}
    for index, param in enumerate(params):
        held = shells.get(param, param)
        optimizer = _owner(owners, held, index)
        _check_shapes(saved.get(index, {}), param, index)
        load = _load if _is_known(optimizer) else _load_other
        messages.update(dict.fromkeys(load(optimizer, held, param.shape, saved.get(index), kind_then, beta2_then)))
    return list(messages)


@torch.no_grad()
def _load(
    optimizer: torch.optim.Optimizer,
    held: nn.Parameter,
    shape: torch.Size,
    saved: dict[str, Any] | None,
    kind_then: str | None,
    beta2_then: float,
) -> list[str]:
    """Load one parameter's state; messages."""
    state = optimizer.state[held]
    if not saved:  # it never had a gradient
        convert.clear(state)
        return []
    order = None
    if isinstance(optimizer, NarrowOptimizer):
        order = local(held.detach())
        shape = order.shape
        saved = {key: local(value) if isinstance(value, Tensor) else value for key, value in saved.items()}
    if saved.keys() == state.keys() and _in_order(state, order):
        for key, value in state.items():
            if key != "step":
                value.copy_(saved[key].reshape(value.shape))
        convert.set_step(state, int(saved["step"]))
        return []
    now, then = kind_of(optimizer), kind_then or "adam"
    moments = convert.read(saved, shape)
    group = optimizer.param_groups[0]
    needs_second = now != "lion8bit"
    if moments.second is None and needs_second:
        convert.clear(state)
        return [f"the optimizer {now} starts anew: the state of {then} in the checkpoint has no second moment"]
    convert.write(moments, state, beta2_then=beta2_then, beta2_now=_beta2(group), order=order)
    messages = [f"the optimizer's state was converted from {then} to {now}"] if now != then else []
    needs_first = not needs_second or (now != "adafactor" and group["betas"][0] != 0)
    if moments.first is None and needs_first:
        messages.append(f"the first moment of the optimizer {now} starts anew: the checkpoint has none")
    return messages


@torch.no_grad()
def _load_other(
    optimizer: torch.optim.Optimizer,
    held: nn.Parameter,
    shape: torch.Size,
    saved: dict[str, Any] | None,
    kind_then: str | None,
    beta2_then: float,
) -> list[str]:
    """The same for an optimizer that this module knows nothing of: its own state, or none."""
    optimizer.state.pop(held, None)
    if not saved:
        return []
    if kind_then not in (None, kind_of(optimizer)):
        return [f"the optimizer {kind_of(optimizer)} starts anew: the checkpoint has the state of {kind_then}"]
    for key, value in saved.items():
        if isinstance(value, Tensor) and key != "step":
            dtype = held.dtype if value.is_floating_point() else value.dtype
            value = value.to(device=held.device, dtype=dtype, copy=True)
        optimizer.state[held][key] = value
    return []


def _in_order(state: Mapping[str, Any], order: Tensor | None) -> bool:
    """Whether `state` has its numbers in the order that checkpoints have: but for bits of memory in another order."""
    return order is None or order.is_contiguous() or not any(key.endswith("_8bit") for key in state)


def _made(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: nn.Parameter) -> dict[str, Any]:
    if isinstance(optimizer, (NarrowOptimizer, PagedOptimizer, SecondMomentAdam, Adafactor)):
        return optimizer.make_state(param)
    on_device = group["fused"] or group["capturable"]  # as torch.optim.Adam makes it in its first step
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    return {
        "step": torch.zeros([], dtype=torch.float32, device=param.device if on_device else "cpu"),
        **{name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in names},
    }


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    return kind_of(optimizer) != type(optimizer).__name__


def _beta2(group: Mapping[str, Any]) -> float:
    return float(group.get("betas", (0.0, 0.0))[1])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _owners(optimizers: Sequence[torch.optim.Optimizer]) -> dict[nn.Parameter, torch.optim.Optimizer]:
    return {param: optimizer for optimizer in optimizers for param in _parameters(optimizer)}


def _owner(
    owners: Mapping[nn.Parameter, torch.optim.Optimizer], held: nn.Parameter, index: int
) -> torch.optim.Optimizer:
    if held not in owners:
        raise ValueError(f"no optimizer holds parameter {index}")
    return owners[held]


def _check_shapes(saved: Mapping[str, Any], param: nn.Parameter, index: int) -> None:
    """A state of other parameters is refused, before anything is written."""
    for key in ("exp_avg", "exp_avg_sq", "exp_avg_8bit", "exp_avg_sq_8bit", "variance"):
        if key in saved and saved[key].numel() != param.numel():
            raise LowVRAMError(
                f"the optimizer's state {key} of parameter {index} has {saved[key].numel()} elements, and the "
                f"parameter {param.numel()}.",
                "Resume with the recipe that the checkpoint was written with.",
            )
