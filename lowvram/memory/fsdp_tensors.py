"""Tensors that FSDP2 has spread over processes: whole copies for checkpoints, the way back, and norms of gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lowvram.errors import LowVRAMError


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which shares its memory; any other tensor is returned as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A whole, plain copy of a tensor. Collective: every process must ask for the same tensors in the same order."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1:
        # NCCL knows no host memory, in which an offloaded part lies.
        part = tensor._local_tensor.to(tensor.device_mesh.device_type)
        sizes: Any = {"shape": tensor.shape, "stride": tensor.stride()}
        tensor = DTensor.from_local(part, tensor.device_mesh, tensor.placements, **sizes).full_tensor()
    return local(tensor).to(device, copy=True)


def full_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`full_tensor` of each value that is one, on the CPU; for what `state_dict` or an optimizer's packing gave."""
    return {key: full_tensor(value) if isinstance(value, Tensor) else value for key, value in tensors.items()}


def full_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state_dict as if it were not sharded: the same keys, whole plain tensors on the CPU. Collective."""
    return full_tensors(network.state_dict())


def load_full(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `full_state` or an unsharded network's state_dict gave, in place. Every process holds all of it.

    Raises:
        LowVRAMError: keys or shapes don't fit; nothing is loaded then.
    """
    own = network.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        raise LowVRAMError(
            f"weights don't fit the network: {wrong[0]!r} is missing, unknown or of another shape.",
            "Use weights of a network with the same settings.",
        )
    with torch.no_grad():
        for key, target in own.items():
            local(target).copy_(_part(tensors[key], target))


def sharded_like(tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """{"INDEX.KEY": whole tensor} with those of the shape of parameter INDEX cut and placed as it is.

    The others (such as step counts), and those of parameters that are not sharded, are copied.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        like = parameters[int(name.split(".", 1)[0])]
        if isinstance(like, DTensor) and tensor.shape == like.shape:
            part = _part(tensor, like).to(local(like).device, copy=True)
            sizes: Any = {"shape": like.shape, "stride": like.stride()}
            out[name] = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **sizes)
        else:
            out[name] = tensor.clone()
    return out


def total_norm(grads: Iterable[Tensor]) -> Tensor:
    """2-norm of sharded and plain gradients taken together, float32 [] on the training device. Collective.

    A plain gradient is taken to be the same in every process. With one process the value is that of
    `torch.nn.utils.get_total_norm`, bit for bit.
    """
    grads = list(grads)
    meshes = [grad.device_mesh for grad in grads if isinstance(grad, DTensor)]
    if not meshes or meshes[0].size() == 1:
        norm = torch.nn.utils.get_total_norm([local(grad) for grad in grads])
        return norm.to(meshes[0].device_type) if meshes else norm
    device = meshes[0].device_type
    squares = []
    for wanted in (True, False):
        part = [local(grad) for grad in grads if isinstance(grad, DTensor) == wanted]
        squares.append(torch.nn.utils.get_total_norm(part).to(device, torch.float64).square())  # fp32 could overflow
    dist.all_reduce(squares[0], group=meshes[0].get_group())
    return (squares[0] + squares[1]).sqrt().float()


def _part(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return full
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = torch.chunk(full, like.device_mesh.size(axis), placement.dim)
            rank = like.device_mesh.get_local_rank(axis)
            full = parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)
    return full
