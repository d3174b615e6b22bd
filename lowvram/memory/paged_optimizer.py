"""Adam with state in memory that pages to the host, of 8 bits or 32, on bitsandbytes' kernels.

Its functions are used, and not its optimizer classes. Those read a process-wide table of overrides by index (so that
one network's settings reach another's), wait for the device after every parameter, move channels_last weights to other
memory, decouple the weight decay of Adam too, and load 8-bit state wrongly or without its paging.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowvram.errors import LowVRAMError
from lowvram.kernels.eight_bit import BLOCK, FLOOR
from lowvram.memory.narrow_optimizer import WIDE_BELOW_ELEMENTS

PAGED_FROM_ELEMENTS = 100_000


class PagedOptimizer(torch.optim.Optimizer):
    """Adam or AdamW over contiguous fp32, bf16 or fp16 parameters.

    State of one parameter: `step`, and for each moment either NAME (float32, the parameter's shape) or NAME_8bit (uint8
    [numel]) with NAME_absmax (float32 [blocks]); the moments are exp_avg and exp_avg_sq. With beta1 = 0 and 8 bits the
    second only.

    Coupled weight decay is added to `param.grad` itself.

    On a CPU bitsandbytes rounds moments more coarsely than on CUDA: to no less than 1e-5 of their block's largest.

    Args:
        kind: paged_adam8bit or paged_adam. On a CPU there is nothing to page.

    Raises:
        LowVRAMError: bitsandbytes is missing, or can't work with such parameters.
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
        functional(f"optimizer={kind}")
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
        self._codes: dict[tuple[str, torch.device], Tensor] = {}

    def make_state(self, param: nn.Parameter) -> dict[str, Any]:
        """What is kept of one parameter, all zero."""
        state: dict[str, Any] = {"step": 0}
        wide = self.kind == "paged_adam" or param.numel() < WIDE_BELOW_ELEMENTS
        for name in self._moments():
            if wide:
                state[name] = self._zeros(param, param.shape, torch.float32)
            else:
                blocks = -(-param.numel() // BLOCK)
                state[f"{name}_8bit"] = self._zeros(param, torch.Size([param.numel()]), torch.uint8)
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change every parameter that has a gradient. On CUDA nothing is allocated after the first weight changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._check(param)
                    if not self.state[param]:
                        self.state[param].update(self.make_state(param))
                    for name in self._code_names():
                        self._code(name, param.device)
                    work.append((group, param, param.grad.contiguous(), self.state[param]))
        if work:
            device = work[0][1].device
            scratch = torch.empty(WIDE_BELOW_ELEMENTS, device=device)
            with _default_stream(device):
                for group, param, grad, state in work:
                    self._update(group, param, grad, state, scratch)
        return loss

    def workspace_tensors(self) -> list[Tensor]:
        """What lies on the device beside the state, from the first step on."""
        return list(self._codes.values())

    def load_state_dict(self, state_dict: Any) -> None:
        """Refused: torch would cast 8-bit state to the parameters' dtype."""
        raise LowVRAMError(
            f"the state of optimizer={self.kind} can't be loaded with load_state_dict.",
            "Use lowvram.memory.optimizers.unpack.",
        )

    def _moments(self) -> tuple[str, ...]:
        if self.kind != "paged_adam" and self.defaults["betas"][0] == 0:
            return ("exp_avg_sq",)
        return ("exp_avg", "exp_avg_sq")

    def _code_names(self) -> tuple[str, ...]:
        """Of each moment in 8 bits."""
        both = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}
        moments = self._moments()
        return ("positive",) if moments == ("exp_avg_sq",) else tuple(both[m] for m in moments)

    def _update(
        self, group: dict[str, Any], param: nn.Parameter, grad: Tensor, state: dict[str, Any], scratch: Tensor
    ) -> None:
        decay = group["weight_decay"]
        if decay and not group["decoupled_weight_decay"]:
            grad.add_(param.detach(), alpha=decay)
            decay = 0.0
        state["step"] += 1
        bnb = functional(f"optimizer={self.kind}")
        for value in state.values():
            if is_paged(value):
                bnb.prefetch_tensor(value)
        if any(key.endswith("_8bit") for key in state):
            self._update_8bit(bnb, group, param, grad, state, decay)
        else:
            self._update_wide(bnb, group, param, grad, state, decay, scratch)

    def _update_wide(
        self,
        bnb: Any,
        group: dict[str, Any],
        param: nn.Parameter,
        grad: Tensor,
        state: dict[str, Any],
        decay: float,
        scratch: Tensor,
    ) -> None:
        first = state.get("exp_avg")
        if first is None:  # beta1 = 0: what stood in it is multiplied by zero, and must be finite for that
            first = scratch[: param.numel()].view(param.shape).zero_()
        bnb.optimizer_update_32bit(
            "adam",
            grad,
            param,
            first,
            group["betas"][0],
            group["eps"],
            state["step"],
            group["lr"],
            state2=state.get("exp_avg_sq"),
            beta2=group["betas"][1],
            weight_decay=decay,
        )

    def _update_8bit(
        self, bnb: Any, group: dict[str, Any], param: nn.Parameter, grad: Tensor, state: dict[str, Any], decay: float
    ) -> None:
        name, lr, (beta1, beta2), eps, step = "adam", group["lr"], group["betas"], group["eps"], state["step"]
        moments = self._moments()
        if moments == ("exp_avg_sq",):
            # Adam without a first moment is lr g / (sqrt(v) / c + eps) with c = sqrt(1 - beta2^t), and RMSprop is
            # lr g / (sqrt(v) + eps): the same with lr c and eps c. RMSprop's decay would be coupled.
            if decay:
                param.mul_(1 - lr * decay)
                decay = 0.0
            c = math.sqrt(1 - beta2**step)
            name, lr, eps, beta1, beta2 = "rmsprop", lr * c, eps * c, beta2, 0.0
        codes = [*(self._code(n, param.device) for n in self._code_names()), None]
        states = [*(state[f"{m}_8bit"] for m in moments), None]
        scales = [*(state[f"{m}_absmax"] for m in moments), None]
        bnb.optimizer_update_8bit_blockwise(
            name,
            grad.view(-1),
            param.view(-1),
            states[0],
            states[1],
            beta1,
            beta2,
            0.0,
            0.0,
            eps,
            step,
            lr,
            codes[0],
            codes[1],
            scales[0],
            scales[1],
            weight_decay=decay,
        )

    def _code(self, name: str, device: torch.device) -> Tensor:
        """The 256 values that 8 bits stand for. float32 [256]"""
        if (name, device) not in self._codes:
            bnb = functional(f"optimizer={self.kind}")
            with unset_fake_temporarily():  # it reads data
                values = bnb.create_dynamic_map(signed=name == "signed").tolist()
            if name == "positive":  # the unsigned ones without their zero
                values[0] = FLOOR
            self._codes[name, device] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._codes[name, device]

    def _zeros(self, param: nn.Parameter, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        paged = self.kind.startswith("paged") and param.device.type == "cuda" and param.numel() >= PAGED_FROM_ELEMENTS
        if not paged:
            return torch.zeros(shape, dtype=dtype, device=param.device)
        bnb = functional(f"optimizer={self.kind}")
        buffer: Tensor = bnb.get_paged(*shape, dtype=dtype, device=param.device)
        bnb.fill(buffer, 0)
        return buffer

    def _check(self, param: nn.Parameter) -> None:
        remedy = "Use optimizer=adam, or optimizer=adafactor."
        if hasattr(param, "device_mesh"):
            raise LowVRAMError(
                f"optimizer={self.kind} does not know sharded parameters.", "Use optimizer=adam, or fsdp=none."
            )
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise LowVRAMError(f"optimizer={self.kind} does not know parameters of {param.dtype}.", remedy)
        if not param.is_contiguous():
            raise LowVRAMError(
                f"optimizer={self.kind} needs contiguous parameters; one of shape {list(param.shape)} has strides "
                f"{param.stride()}.",
                "Use network.to(memory_format=torch.contiguous_format), or optimizer=adam.",
            )


def functional(wanted_by: str) -> Any:
    """bitsandbytes.functional.

    Raises:
        LowVRAMError: it is not installed. wanted_by: the setting that asks for it.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of 4-bit kernels that are not wanted here
    try:
        from bitsandbytes import functional as module
    except ImportError as error:
        raise LowVRAMError(
            f"{wanted_by} needs bitsandbytes, which can't be imported: {error}.",
            "pip install bitsandbytes, or use optimizer=adam or optimizer=adafactor.",
        ) from error
    finally:
        logger.setLevel(level)
    return module


def is_paged(value: Any) -> bool:
    """Whether it is a tensor in memory that moves between host and device by itself."""
    return isinstance(value, Tensor) and getattr(value, "is_paged", False)


@contextmanager
def _default_stream(device: torch.device) -> Iterator[None]:
    """bitsandbytes launches optimizer kernels on the device's default stream, whichever is current."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
