"""Weights, gradients and optimizer state sharded over processes, and on the host if asked: torch's FSDP2.

    shard(network, network.blocks(), device, offload=True)   # before its optimizer is made: the parameters are new ones
    with running([network], second_order=False):             # all backwards of one update
        network(...).backward()
    norm = total_norm(grads)

Works for one process too, for networks that are called in parts, and under the second derivatives of R1 and path
length.
"""

import atexit
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_groups
from torch.distributed.tensor import DTensor

from lowvram.errors import LowVRAMError
from lowvram.memory.fsdp_tensors import (
    full_state,
    full_tensor,
    full_tensors,
    load_full,
    local,
    sharded_like,
    total_norm,
)

__all__ = [
    "full_state",
    "full_tensor",
    "full_tensors",
    "is_sharded",
    "load_full",
    "local",
    "reset",
    "running",
    "shard",
    "sharded_like",
    "total_norm",
]


def shard(network: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device, *, offload: bool) -> None:
    """Shard a network's parameters over all processes, one group for each block, and its gradients with them.

    network: on any device; its buffers and 0-dimensional parameters (FSDP2 knows none) end on `device`, whole in every
        process, and so does what rank 0 holds: the other processes' values are overwritten with it.
    blocks: name in `network` -> module. Parameters outside of them are grouped by the children that hold them, so that
        a part that is called on its own (`network.child(...)`) works without the network's own forward.
    offload: parameters, gradients and so the optimizer's state and step are on the host; blocks visit the device.

    Gradients are summed over the processes, not averaged. `network.parameters()` are new objects afterwards (DTensors,
    names, order and requires_grad unchanged, always contiguous): make the optimizer from those. The network can't be
    deep-copied any more.

    Raises:
        LowVRAMError: torch can't do this here or with this network; it is then as it was.
    """
    _start_processes(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    groups = _groups(network, blocks)
    _check(network, blocks, groups)
    _send_from_first_process(network, device)
    whole = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for parameter in network.parameters():
        if parameter in whole:
            parameter.data = parameter.data.to(device)
        elif not parameter.is_contiguous():  # FSDP2 takes no channels_last weights
            parameter.data = parameter.data.contiguous()
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in groups.values():
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy, ignored_params=whole)
    if dist.get_world_size() > 1:  # with one process the division would be a copy
        for part in _sharded_modules(network):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo can't average
    # Now, not at the first forward: that may be a child's, which would make the child a root, and each root completes
    # the gradients of its own part alone.
    cast(Any, network)._get_fsdp_state()._lazy_init()
    # A mapping's output is a view. FSDP2 warns that an in-place change of it would hide the backward from FSDP2; that
    # ends in an error of its own (storage of size 0), and `running` collects the gradients anyway.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was called on a network."""
    return isinstance(network, FSDPModule)


@contextmanager
def running(networks: Iterable[nn.Module], *, second_order: bool = False) -> Iterator[None]:
    """Run the forwards and backwards of one update within. Afterwards the gradients are whole sums over the processes.

    networks: all that run within, also frozen ones; those that are not sharded are left alone.
    second_order: for losses that use create_graph. The networks then stay unsharded on the device from their first use
        to the end, because the second derivative reads the weights when FSDP2 has already let go of them.

    Every process must run each network equally often. After an exception the gradients of these networks are dropped
    and they are ready for another try; unless all processes raised, the others wait in vain.
    """
    sharded = [network for network in networks if is_sharded(network)]
    before: dict[nn.Parameter, Tensor | None] = {}
    for network in sharded:
        _reshard(network)
        _set_reshard(network, not second_order)
        for parameter in network.parameters():
            if not isinstance(parameter, DTensor):
                before[parameter], parameter.grad = parameter.grad, None
    # FSDP2's own node turns gradients that are missing into zeros, and the optimizer would then step parameters that
    # it leaves alone in the plain run (to-RGB biases under path length).
    torch_node = fsdp_groups.RegisterPostBackwardFunction
    fsdp_groups.RegisterPostBackwardFunction = _BlockInput  # type: ignore[misc, assignment]
    try:
        yield
        for network in sharded:
            _collect(network)
        _sum_over_processes(before)
    except BaseException:
        for network in sharded:
            reset(network)
        raise
    finally:
        fsdp_groups.RegisterPostBackwardFunction = torch_node  # type: ignore[misc]
        for network in sharded:
            _set_reshard(network, True)


class _BlockInput(torch.autograd.Function):
    """The inputs of a sharded block, unchanged; its backward tells FSDP2 that the block's gradients are complete."""

    @staticmethod
    def forward(ctx: Any, group: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.group.post_backward()
        return (None, *grads)


def reset(network: nn.Module) -> None:
    """Make a sharded network ready again after an exception within its forward or backward; its gradients are lost."""
    root: Any = cast(Any, network)._get_fsdp_state()
    if root._device.type == "cuda":
        torch.cuda.synchronize(root._device)
    if hasattr(FSDPModule, "reset_iter_state"):
        cast(FSDPModule, network).reset_iter_state()
    else:
        _reset_by_hand(root)
    for parameter in network.parameters():
        parameter.grad = None


# Setting up.


def _start_processes(device: torch.device) -> None:
    """Make sure of a process group that can carry tensors of the device, and that the device is the current one."""
    if device.type not in ("cpu", "cuda"):
        raise LowVRAMError(f"fsdp on device={device}: torch can't shard there.", "Use a CUDA GPU, or fsdp=none.")
    if not dist.is_available():
        raise LowVRAMError("this build of torch has no torch.distributed, which fsdp needs.", "Use fsdp=none.")
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise LowVRAMError(
                f"{here} processes share {gpus} GPUs on this machine, and fsdp needs one for each.",
                f"Start {gpus} processes (accelerate launch --num_processes {gpus}).",
            )
        torch.cuda.set_device(device.index or 0)  # FSDP2 uses the current one
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_stop_processes)
    if device.type == "cuda" and dist.get_world_size() > 1 and "nccl" not in str(dist.get_backend_config()):
        raise LowVRAMError(
            f"fsdp with {dist.get_world_size()} processes on CUDA needs NCCL, and they talk by "
            f"{dist.get_backend_config()}.",
            "Use Linux and a torch build with NCCL, or one process.",
        )


def _stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _groups(network: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules to shard, name -> module, inner ones first: blocks, then children with parameters, then the network.

    A child that only holds others, such as a ModuleList, has no forward at which its weights could be fetched; its
    elements stand for it.
    """
    inner = set(blocks.values())
    groups = {name: block for name, block in blocks.items() if any(True for _ in block.parameters())}

    def add_children(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child in inner or not any(True for _ in child.parameters()):
                continue
            if type(child).forward is nn.Module.forward:
                add_children(child, f"{prefix}{name}.")
            else:
                groups[f"{prefix}{name}"] = child

    add_children(network, "")
    return {**groups, "": network}


def _check(network: nn.Module, blocks: Mapping[str, nn.Module], groups: Mapping[str, nn.Module]) -> None:
    """Raise for what fully_shard would refuse half-way, or silently train wrong."""
    if is_sharded(network):
        raise LowVRAMError("this network is sharded already.", "Call shard once for a network.")
    names = {module: name for name, module in network.named_modules()}
    for name, block in blocks.items():
        if names.get(block) != name:
            raise LowVRAMError(f"block {name} is not a module of that name in the network.", "Use find_blocks.")
    holders = sorted(groups, key=len, reverse=True)

    def holder(parameter_name: str) -> str:
        return next(g for g in holders if not g or parameter_name.startswith(f"{g}."))

    seen: dict[nn.Parameter, str] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        group = holder(name)
        if holder(seen.setdefault(parameter, name)) != group:
            raise LowVRAMError(
                f"{seen[parameter]} and {name} are one parameter in two blocks, which fsdp can't shard.",
                "Use fsdp=none, or untie them.",
            )
        if parameter.ndim and dtypes.setdefault(group, parameter.dtype) != parameter.dtype:
            raise LowVRAMError(
                f"{name} is {parameter.dtype} in a block of {dtypes[group]}, which fsdp can't shard.",
                "Keep the weights in one dtype (network.float()), or use fsdp=none.",
            )


@torch.no_grad()
def _send_from_first_process(network: nn.Module, device: torch.device) -> None:
    if dist.get_world_size() == 1:
        return
    for tensor in (*network.parameters(), *network.buffers()):
        on_device = tensor.detach().to(device, memory_format=torch.contiguous_format)
        dist.broadcast(on_device, 0)
        tensor.copy_(on_device)


# Within a step. From here on torch's internals are used where its methods leave a gap; they are alike in 2.11 to 2.15.


def _sharded_modules(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def _reshard(network: nn.Module) -> None:
    for module in _sharded_modules(network):
        module.reshard()


def _set_reshard(network: nn.Module, after_use: bool) -> None:
    root = cast(FSDPModule, network)
    root.set_reshard_after_forward(after_use)
    root.set_reshard_after_backward(after_use)


def _collect(network: nn.Module) -> None:
    """Reduce gradients that no hook has taken, wait for all of them, and shard the weights again.

    FSDP2's hooks sit on the outputs of modules and on the inputs that it finds. A second derivative need not pass them:
    that of R1 reaches the weights of a linear layer by the graph of the first backward alone.
    """
    root: Any = cast(Any, network)._get_fsdp_state()
    if hasattr(root._state_ctx, "manual_backward_finalization_active"):  # torch 2.15 checks that a backward set it
        root._state_ctx.manual_backward_finalization_active = False
    root._root_post_backward_final_callback()
    _reshard(network)


def _sum_over_processes(before: dict[nn.Parameter, Tensor | None]) -> None:
    """Sum the new gradients of parameters that every process holds whole, and add the older ones."""
    grads = [parameter.grad for parameter in before if parameter.grad is not None]
    if grads and dist.get_world_size() > 1:
        flat = torch.stack([grad.float() for grad in grads])  # they are 0-dimensional
        dist.all_reduce(flat)
        for grad, total in zip(grads, flat, strict=True):
            grad.copy_(total)
    for parameter, older in before.items():
        if older is not None:
            parameter.grad = older if parameter.grad is None else older.add_(parameter.grad)


def _reset_by_hand(root: Any) -> None:
    """What `FSDPModule.reset_iter_state` does in later versions. The device is idle: no event is left to wait for."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    root._comm_ctx.all_gather_state = root._comm_ctx.reduce_scatter_state = None
    root._comm_ctx.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        group = state._fsdp_param_group
        if group is None:
            continue
        group._training_state = TrainingState.IDLE
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._post_forward_indices.clear()
        for parameter in group.fsdp_params:
            parameter.grad_offload_event = None
            parameter.sharded_param.grad = None
            unsharded = getattr(parameter, "_unsharded_param", None)
            if unsharded is not None:
                unsharded.grad = parameter.unsharded_accumulated_grad = None
        group._to_sharded()
