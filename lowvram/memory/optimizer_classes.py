"""Optimizers in plain torch that keep less state: Adam without a first moment, and Adafactor for convolutions too."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

_FUSED_DEVICES = ("cpu", "cuda")


def can_fuse(params: Iterable[Tensor]) -> bool:
    """Whether torch has one kernel for a whole Adam step over these: no temporaries, no loop over tensors."""
    return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)


class SecondMomentAdam(torch.optim.Optimizer):
    """Adam or AdamW with beta1 = 0, bit by bit, at 4 bytes of state a parameter instead of 8.

    Its first moment would be the gradient itself, so torch's kernel is given the gradient in its place.

    Args:
        decoupled_weight_decay: as in AdamW; otherwise the decay is added to the gradient, in `param.grad` itself.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled_weight_decay: bool,
        maximize: bool = False,
    ) -> None:
        params = list(params)
        defaults = {
            "lr": lr,
            "betas": (0.0, beta2),
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "fused": can_fuse(params),
        }
        super().__init__(params, defaults)

    def make_state(self, param: nn.Parameter) -> dict[str, Any]:
        """What is kept of one parameter."""
        fused = self.param_groups[0]["fused"]  # the fused kernel reads the count on the device
        return {
            "step": torch.zeros([], dtype=torch.float32, device=param.device if fused else "cpu"),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            states = [_state_of(self, p) for p in params]
            adam(
                params,
                grads,
                grads,  # m = 0 * m + 1 * g
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                foreach=False,
                fused=group["fused"],
                amsgrad=False,
                beta1=0.0,
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )
        return loss


class Adafactor(torch.optim.Optimizer):
    """Adafactor as torch.optim.Adafactor has it, with convolutions treated as matrices [out, in * k * k].

    torch factors the last two dimensions, of which a 3x3 convolution has little to gain: 2.7 bytes of state a parameter
    remain, where the matrix leaves 4 / out + 4 / (in * k * k). Nothing here waits for the device, and the one large
    temporary, of the largest tensor's size, is allocated before the first weight changes.

    The learning rate is relative: a step moves a tensor by lr times its own root mean square (at least 1e-3), and
    lr never exceeds 1 / sqrt(step). The decay of the averages grows as 1 - step ** -0.8. Weight decay is decoupled.
    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", algorithm 4.

    Args:
        betas: not used by the update; the second is needed to turn Adam's state into this one's and back.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "beta2_decay": -0.8,
            "eps": torch.finfo(torch.float32).eps,
            "smallest_rms": 1e-3,
            "clip_rms": 1.0,
        }
        super().__init__(params, defaults)

    def make_state(self, param: nn.Parameter) -> dict[str, Any]:
        """What is kept of one parameter, in fp32: means of its squared gradient over rows and columns, or all of it."""
        zeros = param.detach().new_zeros
        if param.dim() < 2:
            return {"step": 0, "variance": zeros(param.shape, dtype=torch.float32)}
        rows, columns = param.shape[0], param[0].numel()
        return {
            "step": 0,
            "row_var": zeros([rows, 1], dtype=torch.float32),
            "col_var": zeros([1, columns], dtype=torch.float32),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = _evaluate(closure)
        work = [
            (group, p, _state_of(self, p)) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        if not work:
            return loss
        largest = max(p.numel() for _, p, _ in work)
        scratch = torch.empty(largest, dtype=torch.float32, device=work[0][1].device)
        for group, param, state in work:
            _adafactor(group, param, state, scratch[: param.numel()])
        return loss


def _adafactor(group: dict[str, Any], param: nn.Parameter, state: dict[str, Any], scratch: Tensor) -> None:
    """One parameter's step; `scratch` float32 [numel] is overwritten."""
    assert param.grad is not None
    state["step"] += 1
    step, eps, size = state["step"], group["eps"], param.numel()
    new_weight = step ** group["beta2_decay"]
    lr = min(group["lr"], step**-0.5)
    rms = torch.linalg.vector_norm(param, dtype=torch.float32) / size**0.5  # scalar
    if "variance" in state:
        grad = param.grad
        update = torch.mul(grad, grad, out=scratch.view(param.shape))
        state["variance"].lerp_(update, new_weight)
        update.copy_(state["variance"])
    else:
        grad = param.grad.reshape(param.shape[0], -1)  # [m, n]
        for name, dim in (("row_var", 1), ("col_var", 0)):
            norm = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=torch.float32)
            state[name].lerp_(norm.square_().div_(grad.shape[dim]), new_weight)
        update = torch.mul(state["row_var"], state["col_var"], out=scratch.view(grad.shape))  # [m, n]
        update.div_(state["row_var"].mean().clamp_(min=eps))
    update.clamp_(min=eps * eps).rsqrt_().mul_(grad)
    too_large = (torch.linalg.vector_norm(update) / (size**0.5 * group["clip_rms"])).clamp_(min=1.0)
    update.mul_(rms.clamp_(min=group["smallest_rms"]).mul_(-lr).div_(too_large))
    if group["weight_decay"] != 0:
        param.mul_(1 - group["lr"] * group["weight_decay"])
    param.add_(update.view(param.shape))


def _state_of(optimizer: Any, param: nn.Parameter) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[param]
    if not state:
        state.update(optimizer.make_state(param))
    return state


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
