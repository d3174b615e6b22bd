"""Parameters that one inner optimizer changes at one time: a whole network's, a block's, or a single one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowvram import seeded
from lowvram.memory import host, optimizers
from lowvram.memory.policy import BITSANDBYTES, NARROW

_SCHEDULED = ("lr", "betas")


def scheduled(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group of parameters that a schedule may change while training: step size and betas."""
    return {name: group[name] for name in _SCHEDULED if name in group}


class Part:
    """Steps some parameters, with their state brought to the device only for the step where it lives on the host.

    A step that is interrupted (an optimizer that ran out of memory) can be called again: it is applied once.

    Args:
        params: fp32, or bf16 without a master copy: those are stepped in fp32, then rounded stochastically; by the
            kernel itself for the kinds of `policy.NARROW`.
        indices: the places of `params` among the network's, for random numbers that depend on nothing else.
        kind, like, group: see `optimizers.build`.
        state_on_host: keep the state in host memory between steps.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        indices: Sequence[int],
        kind: str,
        like: torch.optim.Optimizer,
        *,
        device: torch.device,
        state_on_host: bool,
        group: int = 0,
    ) -> None:
        self.params = list(params)
        self.indices = list(indices)
        self.group = group
        self.device = device
        self.whole = kind in NARROW  # factor, step and rounding in one kernel
        self.narrow = self.params[0].dtype == torch.bfloat16 and not self.whole
        # Stand-ins are what the inner optimizer sees of bf16 weights: filled in fp32 for a step, empty between steps.
        self.shells = [nn.Parameter(p.detach().float()) for p in self.params] if self.narrow else self.params
        self.optimizer = optimizers.build(kind, self.shells, like=like, group=group)
        optimizers.init_state(self.optimizer)
        self._stepped = False
        # Before any hook of others: what they raise must not make an applied step look like one to repeat.
        self.optimizer.register_step_post_hook(lambda *_: setattr(self, "_stepped", True))
        # Kernels of a whole step allocate nothing between their first and last write.
        fused = self.optimizer.param_groups[0].get("fused") or optimizers.kind_of(self.optimizer) in BITSANDBYTES
        self._may_stop_midway = not fused and not self.whole
        self._host_state: list[Tensor] | None = [] if state_on_host else None
        self._empty_shells()
        self._download()

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor | None], factor: float, *, now: Mapping[str, Any], seed: int, count: int
    ) -> None:
        """Change the parameters, which are on the device, by factor * gradient; gradients may lie on the host.

        now: hyperparameters that a schedule may change from one step to the next, see `scheduled`.
        seed, count: root of the rounding's random numbers, and the number of updates before this one.
        """
        theirs = [shell.grad for shell in self.shells]
        try:
            if not self._stepped:  # else a call that something interrupted after the step goes on
                self.optimizer.param_groups[0].update(now)
                for shell, param, grad in zip(self.shells, self.params, grads, strict=True):
                    if self.narrow:
                        shell.data = param.detach().float()
                    shell.grad = None if grad is None else _scaled(grad, 1.0 if self.whole else factor, like=shell)
                self._upload()
                if self.whole:
                    keys = [seeded.mix(seed, count, index) for index in self.indices]
                    self.optimizer.step(factor=factor, keys=keys)  # type: ignore[call-overload]
                else:
                    self._inner_step()
            self._round(seed, count)  # done again, it draws the same numbers
        except BaseException:
            if not self._stepped:  # the gradients are needed for another try
                self._put_away(theirs)
            raise
        self._put_away([None] * len(self.shells))
        self._stepped = False

    def beta1_that_stays(self, now: Mapping[str, Any]) -> float | None:
        """The beta1 that this part's state is for, where `now` goes from it to 0, or from 0 on; None: it can follow.

        With 0 no first moment is kept. Adafactor never has one, and Lion always.
        """
        if "betas" not in now or optimizers.kind_of(self.optimizer) in ("adafactor", "lion8bit"):
            return None
        beta1 = float(self.optimizer.param_groups[0]["betas"][0])
        return beta1 if (beta1 == 0) != (now["betas"][0] == 0) else None

    def adopt_state(self) -> None:
        """Move state that was loaded from a checkpoint to where this part keeps it."""
        if self._host_state is not None:
            self._host_state = []
            self._download()

    def _put_away(self, grads: Sequence[Tensor | None]) -> None:
        """Leave state and stand-ins as between steps, and these gradients."""
        self._download()
        for shell, grad in zip(self.shells, grads, strict=True):
            shell.grad = grad
        self._empty_shells()

    def _inner_step(self) -> None:
        if not self._may_stop_midway:
            self.optimizer.step()
            return
        weights = [shell.detach().clone() for shell in self.shells]
        state = {shell: _cloned(self.optimizer.state[shell]) for shell in self.shells}
        try:
            self.optimizer.step()
        except BaseException:
            if not self._stepped:
                for shell, weight in zip(self.shells, weights, strict=True):
                    shell.copy_(weight)
                for shell, values in state.items():
                    self.optimizer.state[shell] = values
            raise

    def _round(self, seed: int, count: int) -> None:
        if not self.narrow:
            return
        for shell, param, index in zip(self.shells, self.params, self.indices, strict=True):
            if shell.grad is not None:
                generator = torch.Generator(device=param.device).manual_seed(seeded.mix(seed, count, index))
                optimizers.stochastic_round_(param, shell.detach(), generator)

    def _empty_shells(self) -> None:
        if self.narrow:
            for shell in self.shells:
                shell.data = torch.empty(0, device=shell.device)

    def _upload(self) -> None:
        if self._host_state is not None:
            optimizers.state_to(self.optimizer, lambda t: host.device_copy(t, self.device, non_blocking=True))

    def _download(self) -> None:
        if self._host_state is None:
            return
        if not self._host_state:
            optimizers.state_to(self.optimizer, self._new_host_copy)
            return
        kept = iter(self._host_state)
        # Stream order keeps the device copy's memory from being used before it is read.
        optimizers.state_to(self.optimizer, lambda tensor: next(kept).copy_(tensor, non_blocking=True))

    def _new_host_copy(self, tensor: Tensor) -> Tensor:
        copy = host.copy_of(tensor)
        assert self._host_state is not None
        self._host_state.append(copy)
        return copy


def _scaled(grad: Tensor, factor: float, *, like: Tensor) -> Tensor:
    """factor * grad where `like` is: on the device, or on the host for what FSDP2 keeps there."""
    if grad.device != like.device or host.is_host(grad):
        grad = host.device_copy(grad, like.device, non_blocking=True)
    elif factor != 1 and grad.dtype == like.dtype:
        grad = grad.clone()  # the caller's own stays as it is, for a second attempt
    grad = grad.to(like.dtype)
    return grad if factor == 1 else grad.mul_(factor)


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
