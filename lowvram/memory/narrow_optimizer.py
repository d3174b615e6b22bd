"""Adam and Lion with state in 8 bits, on lowvram's own kernel: one launch for all parameters (kernels/adamw8bit.py)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.kernels.adamw8bit import DTYPES, Rule, Slot, Workspace, adamw8bit_, is_dense, memory_order, workspace
from lowvram.kernels.eight_bit import BLOCK
from lowvram.memory.fsdp_tensors import local

WIDE_BELOW_ELEMENTS = 4096  # smaller tensors keep fp32 state: they are few bytes, and biases suffer most


class NarrowOptimizer(torch.optim.Optimizer):
    """Adam, AdamW or Lion over dense fp32, bf16 or fp16 parameters, also sharded ones (DTensors).

    State of one parameter: `step`, and for each moment either NAME (float32, the parameter's shape and strides) or
    NAME_8bit (uint8 [numel], in the order of the parameter's memory) with NAME_absmax (float32 [blocks], the element of
    largest magnitude of each 256); the moments are exp_avg and exp_avg_sq. Lion keeps the first only. With beta1 = 0
    Adam keeps the second only. Of a sharded parameter each process keeps its own part's, as plain tensors.

    bf16 weights are rounded at random, so that small steps count on average; they need no fp32 copy.

    Lion moves every element by lr: it wants a third to a tenth of Adam's. Its weight decay is decoupled.

    Args:
        kind: adam8bit or lion8bit.

    Raises:
        LowVRAMError: it can't work with such parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        kind: str,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decoupled_weight_decay: bool,
    ) -> None:
        self.kind = kind
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                self._check(param)
        self._workspaces: dict[tuple[int, torch.device], Workspace] = {}

    def make_state(self, param: nn.Parameter) -> dict[str, Any]:
        """What is kept of one parameter, all zero."""
        state: dict[str, Any] = {"step": 0}
        own = local(param.detach())
        for name in self._moments():
            if param.numel() < WIDE_BELOW_ELEMENTS:
                state[name] = torch.zeros_like(own, dtype=torch.float32, memory_format=torch.preserve_format)
            else:
                blocks = -(-own.numel() // BLOCK)
                state[f"{name}_8bit"] = torch.zeros(own.numel(), dtype=torch.uint8, device=own.device)
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=own.device)
        return state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        factor: float = 1.0,
        multiplier: Tensor | None = None,
        keys: Sequence[int] | None = None,
    ) -> Any:
        """Change every parameter that has a gradient. With Triton nothing is allocated, and the host never waits.

        factor: on the gradients. multiplier: another, float32 [] on the device; where it is not finite nothing is
        changed but the count of steps. keys: 63 random bits for each parameter, by which bf16 weights are rounded;
        None: made of the parameter's place and its number of steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = None if keys is None else iter(keys)
        for index, group in enumerate(self.param_groups):
            slots: dict[torch.device, list[Slot]] = {}  # one device, as a rule
            for place, param in enumerate(group["params"]):
                state = self.state[param]
                if not state:
                    state.update(self.make_state(param))
                key = next(given) if given is not None else None
                slot = self._slot(param, state, key if key is not None else seeded.mix(place, state["step"]))
                slots.setdefault(slot.weight.device, []).append(slot)
            rule = self._rule(group)
            for device, some in slots.items():
                work = self._workspaces.get((index, device))
                if work is None:
                    work = self._workspaces[index, device] = workspace([s.weight.numel() for s in some], device)
                adamw8bit_(some, rule, work, factor=factor, multiplier=multiplier)
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["step"] += 1
        return loss

    def workspace_tensors(self) -> list[Tensor]:
        """What lies on the device beside the state, from the first step on."""
        return [tensor for work in self._workspaces.values() for tensor in work.tensors]

    def load_state_dict(self, state_dict: Any) -> None:
        """Refused: torch would cast 8-bit state to the parameters' dtype."""
        raise LowVRAMError(
            f"the state of optimizer={self.kind} can't be loaded with load_state_dict.",
            "Use lowvram.memory.optimizers.unpack.",
        )

    def _moments(self) -> tuple[str, ...]:
        if self.kind == "lion8bit":
            return ("exp_avg",)
        return ("exp_avg_sq",) if self.defaults["betas"][0] == 0 else ("exp_avg", "exp_avg_sq")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            lion=self.kind == "lion8bit",
        )

    def _slot(self, param: nn.Parameter, state: dict[str, Any], key: int) -> Slot:
        self._check(param)
        weight = local(param.detach())
        tensors: dict[str, Tensor | None] = {}
        for name, short in (("exp_avg", "first"), ("exp_avg_sq", "second")):
            wide = state.get(name)
            tensors[short] = state.get(f"{name}_8bit") if wide is None else memory_order(wide)
            tensors[f"{short}_scale"] = state.get(f"{name}_absmax")
        return Slot(
            weight=memory_order(weight),
            grad=None if param.grad is None else _like(local(param.grad), weight),
            step=state["step"] + 1,
            key=key if weight.dtype == torch.bfloat16 else None,
            **tensors,
        )

    def _check(self, param: nn.Parameter) -> None:
        remedy = "Use optimizer=adam, or optimizer=adafactor."
        if param.dtype not in DTYPES:
            raise LowVRAMError(f"optimizer={self.kind} does not know parameters of {param.dtype}.", remedy)
        if not is_dense(local(param.detach())):
            raise LowVRAMError(
                f"optimizer={self.kind} needs parameters without gaps; one of shape {list(param.shape)} has strides "
                f"{param.stride()}.",
                "Use network.to(memory_format=torch.contiguous_format), or optimizer=adam.",
            )


def _like(grad: Tensor, weight: Tensor) -> Tensor:
    """A gradient flat, in the order of the weight's memory: a view, unless autograd left it in another."""
    if not is_dense(grad) or _order(grad) != _order(weight):
        grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    return memory_order(grad)


def _order(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
