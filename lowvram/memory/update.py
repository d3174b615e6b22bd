"""How gradients become new weights: after the backward, inside it, or deferred, with the same meaning throughout.

The meaning: gradients of all micro-batches and processes are summed, checked to be finite, their global norm is
bounded, and each weight is changed once. Only `fused` gives part of that up, and says so where it matters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lowvram.errors import LowVRAMError
from lowvram.memory import fsdp, host, optimizer_convert, optimizers
from lowvram.memory.part import Part, scheduled
from lowvram.memory.policy import NARROW, OptimizerPolicy
from lowvram.memory.precision import LossScale
from lowvram.memory.stream import BlockStream


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an update did. loss: of the whole batch. norm: of the gradient, before it was bounded.

    applied: False where a loss scale was too large; the weights are as before and the scale is smaller now.
    finite: False where loss or norm are not; nothing was applied, except with update=fused.
    """

    loss: float
    norm: float
    applied: bool
    finite: bool


@dataclass(kw_only=True)
class Bucket:
    """Parameters that are on the device together for their update: a block's, or those outside of blocks."""

    name: str
    params: list[nn.Parameter]
    parts: list[Part]
    stream: BlockStream | None = None  # which brings them to the device; None: they are there

    def on_device(self) -> AbstractContextManager[None]:
        """Their weights on the device within."""
        return nullcontext() if self.stream is None else self.stream.loaded(self.name)


@dataclass(kw_only=True)
class Pending:
    """An update that is decided on, and still to be applied to the buckets in `left`, except the parts in `done`.

    factor: on the gradients. count: updates before this one. params: those that got a gradient. now: what schedules
    change, by group.
    """

    factor: float
    count: int
    params: frozenset[nn.Parameter]
    now: list[dict[str, Any]]
    left: dict[str, Bucket]
    done: set[Part] = field(default_factory=set)


class Updater:
    """Changes the weights of one optimizer, as its policy says.

    Args:
        name: of the optimizer, in errors.
        optimizer: the task's own, whose hyperparameters hold; it is not stepped. Its groups of parameters may differ in
            step size and in weight decay. A schedule may change step size and betas (see `finish`).
        blocks: parameters by the name of their block; the others are a bucket of their own.
        streams: of the streamed networks, by the name of their blocks.
        scale: the factor on the loss under fp16 autocast, or None.
        zero_nonfinite: set single non-finite elements of gradients to zero (fp16 without a scale: StyleGAN2-ADA's way).
        sum_over_processes: of a tensor; None for one process.
    """

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        policy: OptimizerPolicy,
        *,
        blocks: dict[str, list[nn.Parameter]],
        streams: dict[str, BlockStream],
        device: torch.device,
        seed: int,
        scale: LossScale | None,
        zero_nonfinite: bool,
        sharded: bool = False,
        sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.name, self.policy, self.device, self.seed = name, policy, device, seed
        self.scale, self.zero_nonfinite, self.sharded = scale, zero_nonfinite, sharded
        self.params: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.like = optimizer
        self.count = 0  # updates so far
        self._indices = {p: i for i, p in enumerate(self.params)}
        self._group_of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        _check_groups(name, optimizer)
        self._sum = sum_over_processes
        self._collecting = False
        self._host_grads: dict[nn.Parameter, Tensor] = {}
        self._norms: dict[nn.Parameter, Tensor] = {}  # of this step's gradients that have arrived, on the device
        self._stepped_inside = False
        self._decided: Outcome | None = None  # by a call of `finish` that something interrupted
        self._pending: Pending | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buckets = self._make_buckets(blocks, streams)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._part_of = {p: part for b in self.buckets.values() for part in b.parts for p in part.params}
        self._bucket_of = {p: bucket for bucket in self.buckets.values() for p in bucket.params}
        if policy.update != "after":
            self._handles = [_hook(param, self.take_gradient) for param in self.params]
        for stream in {id(s): s for s in streams.values()}.values():
            stream.on_load = self._apply_when_loaded

    # Gradients.

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, backward() feeds this updater.

        Raises:
            LowVRAMError: of the schedule, as in `finish`: update=fused steps within.
        """
        self._check_schedule()
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    def backward(self, loss: Tensor) -> None:
        """Backward of a weighted part of the loss."""
        (loss if self.scale is None else loss * self.scale.scale).backward()

    def discard(self) -> None:
        """Forget the gradients of this step.

        Raises:
            LowVRAMError: some were applied already (update=fused).
        """
        for param in self.params:
            param.grad = None
        self._norms.clear()
        if self._stepped_inside:
            self._stepped_inside = False
            raise LowVRAMError(
                f"memory.update.{self.name}=fused changed weights before this step failed: it can't be redone.",
                f"Go on from the last checkpoint with memory.update.{self.name}=deferred, which is exact.",
            )

    def take_gradient(self, param: nn.Parameter) -> None:
        """A gradient is complete: step its parameter (fused) or send it to the host (deferred). Within `collecting`."""
        if not self._collecting or param.grad is None:
            return
        grad, param.grad = param.grad, None
        if self.policy.update == "fused":
            self._step_inside(param, grad)
        else:
            self._send_to_host(param, grad)

    def _step_inside(self, param: nn.Parameter, grad: Tensor) -> None:
        if param in self._norms:
            raise LowVRAMError(
                f"memory.update.{self.name}=fused met a second backward in a step, which would be a second update.",
                f"Use memory.update.{self.name}=deferred.",
            )
        self._clean(grad)
        self._norms[param] = _norm(grad)
        self._stepped_inside = True
        part = self._part_of[param]
        part.step([grad], 1.0, now=self._now()[part.group], seed=self.seed, count=self.count)
        bucket = self._bucket_of[param]
        if bucket.stream is not None:
            bucket.stream.mark_changed(bucket.name)

    def _send_to_host(self, param: nn.Parameter, grad: Tensor) -> None:
        held = self._host_grads.get(param)
        if held is None:
            held = self._host_grads[param] = host.empty_like(grad)
        if param in self._norms:  # an earlier micro-batch's
            self._await_copies()
            grad = grad + torch.empty_like(grad).copy_(held, non_blocking=True)
        self._clean(grad)
        self._norms[param] = _norm(grad)
        if self._copies is None:
            held.copy_(grad)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            held.copy_(grad, non_blocking=True)
        grad.record_stream(self._copies)  # its memory is free for others once the copy is done

    def _clean(self, grad: Tensor) -> None:
        if self.zero_nonfinite:  # a rare overflow in fp16 concerns single elements
            torch.nan_to_num(grad, nan=0.0, posinf=1e5, neginf=-1e5, out=grad)

    def _await_copies(self) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)

    # The update.

    def finish(self, loss: Tensor, clip_norm: float | None) -> Outcome:
        """Decide on the update of the gathered gradients, and apply it; blocks that stream get theirs when next loaded.

        Called again after something interrupted it, it goes on where it was.
        loss: scalar of the whole batch, not scaled.

        Raises:
            LowVRAMError: a schedule moved beta1 from 0 on or down to it, for which there is no state; nothing of this
                update was applied.
        """
        if self._decided is None:
            self._check_schedule()
            self._decided = self._decide(loss, clip_norm)
        if self._pending is not None:
            self._apply_resident()
        outcome, self._decided = self._decided, None
        self.count += outcome.applied
        return outcome

    def _decide(self, loss: Tensor, clip_norm: float | None) -> Outcome:
        self._apply_all()  # what an earlier update left to blocks not used since; first, as memory may run out in it
        norm = self._total_norm()
        loss_value, norm_value = _values(torch.stack([loss, norm.to(loss)]))
        scale = 1.0 if self.scale is None else self.scale.scale
        norm_value /= scale
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if self.scale is not None:
            self.scale.update(finite=finite)
        self._stepped_inside = False
        if not finite:
            self.discard()
            excused = self.scale is not None and math.isfinite(loss_value) and not self.scale.exhausted
            return Outcome(loss=loss_value, norm=norm_value, applied=False, finite=excused)
        factor = 1 / scale
        if clip_norm is not None:
            factor *= min(1.0, clip_norm / (norm_value + 1e-6))
        if self.policy.update == "after":
            grads = [p.grad for p in self.params if p.grad is not None]
            if factor != 1 and grads and self.policy.kind not in NARROW:  # whose kernel takes the factor
                torch._foreach_mul_(grads, factor)
                factor = 1.0
            self._plan(factor, frozenset(p for p in self.params if p.grad is not None))
        elif self.policy.update == "deferred":
            self._plan(factor, frozenset(self._norms))
        self._norms.clear()
        return Outcome(loss=loss_value, norm=norm_value, applied=True, finite=True)

    def _plan(self, factor: float, params: frozenset[nn.Parameter]) -> None:
        left = dict(self.buckets)
        self._pending = Pending(factor=factor, count=self.count, params=params, now=self._now(), left=left)

    def _now(self) -> list[dict[str, Any]]:
        """Step size and betas of the groups of the task's own optimizer now, so that schedules work."""
        return [scheduled(group) for group in self.like.param_groups]

    def _check_schedule(self) -> None:
        now = self._now()
        for part in (part for bucket in self.buckets.values() for part in bucket.parts):
            before = part.beta1_that_stays(now[part.group])
            if before is not None:
                raise LowVRAMError(
                    f"the optimizer {self.name} went from beta1={before} to {now[part.group]['betas'][0]}: with 0 it "
                    "keeps no first moment.",
                    f"Let beta1 stay 0 or stay above it, or use memory.optimizer.{self.name}=adafactor.",
                )

    def flush(self) -> None:
        """Apply what is pending, and bring everything that is kept on the host up to date there."""
        self._apply_all()
        for stream in {id(b.stream): b.stream for b in self.buckets.values() if b.stream is not None}.values():
            stream.flush()
        if self.device.type == "cuda" and not self._is_plain():
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of the parameters' hooks, for another updater to take over."""
        for handle in self._handles:
            handle.remove()

    def _apply_all(self) -> None:
        if self._pending is not None:
            for bucket in list(self._pending.left.values()):
                with bucket.on_device():  # a block that streams is updated as it is loaded
                    self._apply(bucket)
            self._pending = None

    def _apply_resident(self) -> None:
        """Update the buckets that are on the device."""
        assert self._pending is not None
        for bucket in list(self._pending.left.values()):
            if bucket.stream is None:
                self._apply(bucket)
        if not self._pending.left:
            self._pending = None

    def _apply_when_loaded(self, name: str) -> bool:
        bucket = self.buckets.get(name)
        return bucket is not None and self._apply(bucket)

    def _apply(self, bucket: Bucket) -> bool:
        """Apply a pending update to a bucket that is on the device; whether there was one."""
        pending = self._pending
        if pending is None or bucket.name not in pending.left:
            return False
        self._await_copies()
        grads = self._host_grads if self.policy.update == "deferred" else {p: p.grad for p in bucket.params}
        for part in bucket.parts:
            if part not in pending.done:
                given = [grads[p] if p in pending.params else None for p in part.params]
                now = pending.now[part.group]
                part.step(given, pending.factor, now=now, seed=self.seed, count=pending.count)
                pending.done.add(part)
        for param in bucket.params:
            param.grad = None
        del pending.left[bucket.name]
        return True

    def _total_norm(self) -> Tensor:
        """The global norm of the gradients, summed over processes, before unscaling. float32 scalar."""
        if self.policy.update != "after":
            if self._sum is not None:
                self._sum_host_gradients()
            norms = [self._norms[p] for p in self.params if p in self._norms]
            return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros([], device=self.device)
        if self._sum is not None and not self.sharded:
            for param in self._with_gradient_anywhere([p.grad is not None for p in self.params]):
                param.grad = self._sum(torch.zeros_like(param) if param.grad is None else param.grad)
        grads = [p.grad for p in self.params if p.grad is not None]
        for grad in grads:
            self._clean(grad)
        return fsdp.total_norm(grads) if self.sharded else torch.nn.utils.get_total_norm(grads, foreach=True)

    def _sum_host_gradients(self) -> None:
        assert self._sum is not None
        self._await_copies()
        for param in self._with_gradient_anywhere([p in self._norms for p in self.params]):
            grad = torch.zeros_like(param, device=self.device)
            if param in self._norms:
                grad.copy_(self._host_grads[param])
            grad = self._sum(grad)
            self._host_grads.setdefault(param, host.empty_like(grad)).copy_(grad)
            self._norms[param] = _norm(grad)

    def _with_gradient_anywhere(self, here: list[bool]) -> list[nn.Parameter]:
        """Parameters that have a gradient in some process: the others are not stepped, as with a single process."""
        assert self._sum is not None
        counts = self._sum(torch.tensor(here, dtype=torch.float32, device=self.device)).tolist()
        return [param for param, count in zip(self.params, counts, strict=True) if count > 0]

    # State.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON numbers for a checkpoint, whatever the policy, numbered as in the whole network."""
        self.flush()
        parts = [part for bucket in self.buckets.values() for part in bucket.parts]
        shells = {p: s for part in parts for p, s in zip(part.params, part.shells, strict=True)}
        tensors, numbers = optimizers.pack_many([part.optimizer for part in parts], self.params, shells)
        if self.sharded:
            tensors = fsdp.full_tensors(tensors)
        numbers["updates"] = self.count
        if self.scale is not None:
            numbers["loss_scale"] = self.scale.state()
        return tensors, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> list[str]:
        """Restore what `state` gave under this policy or any other. Returns what the user should be told."""
        parts = [part for bucket in self.buckets.values() for part in bucket.parts]
        shells = {p: s for part in parts for p, s in zip(part.params, part.shells, strict=True)}
        if self.sharded:
            tensors = fsdp.sharded_like(optimizer_convert.widened(tensors, self.params), self.params)
        messages = optimizers.unpack_many([part.optimizer for part in parts], self.params, shells, tensors, numbers)
        for part in parts:
            part.adopt_state()
        self.count = int(numbers.get("updates", 0))
        if self.scale is not None and "loss_scale" in numbers:
            self.scale.load_state(numbers["loss_scale"])
        return messages

    # Construction.

    def _is_plain(self) -> bool:
        policy = self.policy
        return (policy.update, policy.state, policy.weights, policy.weights_dtype) == (
            "after",
            "device",
            "device",
            "fp32",
        )

    def _make_buckets(
        self, blocks: dict[str, list[nn.Parameter]], streams: dict[str, BlockStream]
    ) -> dict[str, Bucket]:
        if self._is_plain():
            blocks = {}  # one optimizer over all: the fewest and largest kernels
        mine: dict[str, list[nn.Parameter]] = {}
        in_blocks: set[nn.Parameter] = set()
        for name, params in blocks.items():  # what several blocks share belongs to the first of them
            mine[name] = [p for p in params if p in self._indices and p not in in_blocks]
            in_blocks.update(mine[name])
        mine["rest"] = [p for p in self.params if p not in in_blocks]
        buckets = {}
        for name, params in mine.items():
            if params:
                bucket = Bucket(name=name, params=params, parts=[], stream=streams.get(name))
                with bucket.on_device():
                    bucket.parts = [self._make_part(group, bucket) for group in self._portions(params)]
                buckets[name] = bucket
        return buckets

    def _portions(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Parameters that are stepped at once: a group's. One at a time where each would need a temporary or a step of
        its own."""
        shells = self.policy.weights_dtype == "bf16" and self.policy.kind not in NARROW
        if self.policy.update == "fused" or shells:
            return [[p] for p in params]
        groups = [[p for p in params if self._group_of[p] == n] for n in range(len(self.like.param_groups))]
        return [group for group in groups if group]

    def _make_part(self, params: list[nn.Parameter], bucket: Bucket) -> Part:
        return Part(
            params,
            [self._indices[p] for p in params],
            self.policy.kind,
            self.like,
            device=self.device,
            state_on_host=self.policy.state == "host" or bucket.stream is not None,
            group=self._group_of[params[0]],
        )


def _check_groups(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Groups that differ in more than step size and weight decay are refused: checkpoints know one set for all."""
    first, *others = optimizer.param_groups
    for group in others:
        for option in optimizer.defaults:
            if option not in ("lr", "weight_decay") and group[option] != first[option]:
                raise LowVRAMError(
                    f"the optimizer {name} has groups of parameters with {option}={first[option]} and {group[option]}.",
                    "Let them differ in lr and weight_decay alone, or use a phase for each.",
                )


def _hook(param: nn.Parameter, take: Callable[[nn.Parameter], None]) -> torch.utils.hooks.RemovableHandle:
    asked = param.requires_grad
    param.requires_grad_(True)  # torch refuses a hook on what is frozen at the moment
    handle = param.register_post_accumulate_grad_hook(take)  # type: ignore[arg-type]
    param.requires_grad_(asked)
    return handle


def _values(numbers: Tensor) -> list[float]:
    """The numbers of a tensor [n], read off the device; zeros for a fake one, which has none: a trace goes on."""
    return [0.0] * len(numbers) if isinstance(numbers, FakeTensor) else numbers.tolist()


def _norm(grad: Tensor) -> Tensor:
    """The 2-norm, float32 scalar."""
    return torch.linalg.vector_norm(grad, dtype=torch.float32)
