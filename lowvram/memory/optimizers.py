"""Optimizers by kind, with the hyperparameters of the one that a task made. State: see optimizer_state.py."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowvram.errors import LowVRAMError
from lowvram.memory.narrow_optimizer import NarrowOptimizer
from lowvram.memory.optimizer_classes import Adafactor, SecondMomentAdam, can_fuse
from lowvram.memory.optimizer_state import init_state, kind_of, pack, pack_many, state_to, unpack, unpack_many
from lowvram.memory.paged_optimizer import PagedOptimizer
from lowvram.memory.policy import BITSANDBYTES, NARROW
from lowvram.memory.rounding import stochastic_round_

_KINDS = ("adam", *NARROW, *BITSANDBYTES, "adafactor")

__all__ = [
    "build",
    "init_state",
    "kind_of",
    "pack",
    "pack_many",
    "state_to",
    "stochastic_round_",
    "unpack",
    "unpack_many",
]


def build(
    kind: str, params: Iterable[nn.Parameter], *, like: torch.optim.Optimizer, group: int | None = None
) -> torch.optim.Optimizer:
    """An optimizer of `kind` over `params`, with the hyperparameters of `like`, which itself is left alone.

    group: of which of its groups of parameters; None: it has one.

    adam: like's own class; Adam and AdamW in torch's fused kernel, and without a first moment where beta1 = 0. The
    others need `like` to be Adam or AdamW. adam8bit: 8-bit moments, in lowvram's own kernel. lion8bit: the same for
    Lion; `NarrowOptimizer` says what lr it wants. paged_adam, paged_adam8bit: bitsandbytes', with fp32 or 8-bit moments
    that page to the host. adafactor: lr becomes relative to each tensor's root mean square; see `Adafactor`.

    Raises:
        LowVRAMError: `like` has several groups of parameters or options that the kind does not know, bitsandbytes is
            missing, or it can't work with such parameters.
    """
    if kind not in _KINDS:
        raise LowVRAMError(f"optimizer={kind} is not known.", f"Use one of {', '.join(_KINDS)}.")
    if group is None and len(like.param_groups) != 1:
        raise LowVRAMError(
            f"the task's {type(like).__name__} has {len(like.param_groups)} groups of parameters.", "Use a single one."
        )
    params = list(params)
    own_options = {**like.defaults, **{k: v for k, v in like.param_groups[group or 0].items() if k != "params"}}
    if type(like) not in (torch.optim.Adam, torch.optim.AdamW):  # a subclass may do something else
        return _same_class(kind, params, like, own_options)
    return _adam_like(kind, params, own_options, isinstance(like, torch.optim.AdamW))


def _adam_like(kind: str, params: list[nn.Parameter], group: dict[str, Any], adamw: bool) -> torch.optim.Optimizer:
    decoupled = adamw or bool(group.get("decoupled_weight_decay"))
    lr, (beta1, beta2) = float(group["lr"]), (float(beta) for beta in group["betas"])
    shared: dict[str, Any] = {"lr": lr, "eps": group["eps"], "weight_decay": group["weight_decay"]}
    if kind == "adam":
        if beta1 == 0 and not group["amsgrad"]:
            return SecondMomentAdam(
                params, beta2=beta2, decoupled_weight_decay=decoupled, maximize=group["maximize"], **shared
            )
        own = torch.optim.AdamW if decoupled else torch.optim.Adam
        fused = can_fuse(params)
        options = {"amsgrad": group["amsgrad"], "maximize": group["maximize"], "fused": fused}
        return own(params, betas=(beta1, beta2), foreach=None if fused else False, **options, **shared)
    for option in ("amsgrad", "maximize"):
        if group[option]:
            raise LowVRAMError(f"optimizer={kind} does not know {option}=True of the task's.", "Use optimizer=adam.")
    if kind in (*NARROW, *BITSANDBYTES):
        made = NarrowOptimizer if kind in NARROW else PagedOptimizer
        return made(params, kind=kind, betas=(beta1, beta2), decoupled_weight_decay=decoupled, **shared)
    return Adafactor(params, lr=lr, betas=(beta1, beta2), weight_decay=group["weight_decay"])


def _same_class(
    kind: str, params: list[nn.Parameter], like: torch.optim.Optimizer, group: dict[str, Any]
) -> torch.optim.Optimizer:
    if kind != "adam":
        raise LowVRAMError(
            f"optimizer={kind} takes its settings from Adam or AdamW, and the task made {type(like).__name__}.",
            "Use optimizer=adam, which keeps the task's own.",
        )
    known = inspect.signature(type(like).__init__).parameters
    if "foreach" in group and group["foreach"] is None:
        group["foreach"] = False  # on CUDA it would be true, which takes copies of all gradients at once
    return type(like)(params, **{name: value for name, value in group.items() if name in known})
