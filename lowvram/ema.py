"""The averaged network that samples are drawn from."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Follow a network's weights with a half-life counted in images (arXiv 1710.10196 section 4.1, 2006.06676 app. A).

    The two may live on different devices and differ in width: then one tensor at a time is brought to the average, so
    that the device never holds more than one parameter beside the networks.

    Args:
        source: the network in training; its parameters may be narrow (bf16) or sharded (DTensor).
        target: a network of the same shape, which holds the average, in fp32. Buffers are copied, not averaged.
        half_life_kimg: thousands of images after which an old value counts half.
        rampup: early on the half-life is at most this fraction of the images seen; None: no ramp.
    """

    def __init__(self, source: nn.Module, target: nn.Module, *, half_life_kimg: float, rampup: float | None) -> None:
        self.source = source
        self.target = target
        self.half_life_kimg = half_life_kimg
        self.rampup = rampup
        self._scratch = _Scratch()
        self._moved: set[nn.Parameter] = set()  # by an update that was interrupted
        self._moved_at = -1  # the images seen by then

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Move the average towards the source, after a step of `batch` images that made `images_seen` of them.

        Interrupted (out of memory) and called again for the same images, it goes on where it was.
        With sharded parameters every process must call it, as each is gathered from all of them.
        """
        half_life_images = self.half_life_kimg * 1000
        if self.rampup is not None:
            half_life_images = min(half_life_images, images_seen * self.rampup)
        beta = 0.5 ** (batch / max(half_life_images, 1e-8))
        if self._moved_at != images_seen:
            self._moved.clear()
        self._moved_at = images_seen
        both = zip(self.target.parameters(), self.source.parameters(), strict=True)
        pairs = [(kept, new) for kept, new in both if kept not in self._moved]
        beside = [(kept, new) for kept, new in pairs if _beside(kept, new)]
        apart = [(kept, new) for kept, new in pairs if not _beside(kept, new)]
        if beside:
            torch._foreach_lerp_([kept for kept, _ in beside], [new for _, new in beside], 1 - beta)
            self._moved.update(kept for kept, _ in beside)
        brought = self._scratch.bring([(new, kept.device) for kept, new in apart])
        for (kept, _), new in zip(apart, brought, strict=True):
            kept.lerp_(new.to(kept.dtype), 1 - beta)
            self._moved.add(kept)
        for buffer, current in zip(self.target.buffers(), self.source.buffers(), strict=True):
            buffer.copy_(current)
        self._moved.clear()


class _Scratch:
    """Brings tensors of a CUDA device to the host through two pinned buffers: one is filled while one is in use."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def bring(self, wanted: list[tuple[Tensor, torch.device]]) -> Iterator[Tensor]:
        """Each tensor on its device, one after the other; valid until the next one is asked for."""
        filled: tuple[Tensor, torch.cuda.Event] | None = None
        fills = 0
        if any(_to_host(new, device) for new, device in wanted):
            self._reserve(max(new.numel() * new.element_size() for new, device in wanted if _to_host(new, device)))
        for index, (new, device) in enumerate(wanted):
            if not _to_host(new, device):
                yield _whole(new).to(device)
                continue
            if filled is None:
                filled, fills = self._fill(new, fills), fills + 1
            host, copied = filled
            filled = None
            if index + 1 < len(wanted) and _to_host(*wanted[index + 1]):  # its copy runs beside the average's update
                filled, fills = self._fill(wanted[index + 1][0], fills), fills + 1
            copied.synchronize()
            yield host

    def _fill(self, new: Tensor, fills: int) -> tuple[Tensor, torch.cuda.Event]:
        whole = _whole(new)
        layout = torch.empty_like(whole, device="meta")  # dense, and in the order of `whole`: a copy without temporary
        flat = self._buffers[fills % 2].view(whole.dtype)
        host = flat.as_strided(layout.size(), layout.stride())
        host.copy_(whole, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(whole.device))
        return host, copied

    def _reserve(self, size_bytes: int) -> None:
        size_bytes = -(-size_bytes // 16) * 16  # a multiple of every element size
        if not self._buffers or self._buffers[0].numel() < size_bytes:
            self._buffers.clear()
            self._buffers += [_pinned(size_bytes), _pinned(size_bytes)]


@contextmanager
def on_device(network: nn.Module, device: torch.device, *, leave: Collection[nn.Module] = ()) -> Iterator[None]:
    """Have a network on `device` within, for sampling; what is there already stays as it is, and so does `leave`.

    Afterwards its parameters and buffers are the very tensors of before, so that nothing is copied back: changes made
    to those that were moved are lost.
    """
    parameters: list[tuple[nn.Parameter, Tensor]] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    try:  # moving may itself run out of memory, half way
        for module in network.modules():
            if module in leave:
                continue
            for parameter in module.parameters(recurse=False):
                if not _is_on(parameter, device):
                    parameters.append((parameter, parameter.data))
                    parameter.data = _copy_on(parameter.data, device)
            for name, buffer in module._buffers.items():
                if buffer is not None and not _is_on(buffer, device):
                    buffers.append((module, name, buffer))
                    module._buffers[name] = _copy_on(buffer, device)
        yield
    finally:
        for parameter, home in parameters:
            parameter.data = home
        for module, name, home in buffers:
            module._buffers[name] = home


def _beside(kept: Tensor, new: Tensor) -> bool:
    return kept.device == new.device and kept.dtype == new.dtype and not _is_sharded(new)


def _to_host(new: Tensor, device: torch.device) -> bool:
    return device.type == "cpu" and (new.device.type == "cuda" or (_is_sharded(new) and _mesh_type(new) == "cuda"))


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, on the mesh's device; others as they are."""
    if not _is_sharded(tensor):
        return tensor
    on_mesh = tensor.to(_mesh_type(tensor))  # FSDP's offload keeps shards on the host, where NCCL cannot gather
    whole: Tensor = on_mesh.full_tensor()  # type: ignore[attr-defined]
    return whole


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _mesh_type(tensor: Tensor) -> str:
    return str(tensor.device_mesh.device_type)  # type: ignore[attr-defined]


def _pinned(size_bytes: int) -> Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _copy_on(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device).copy_(tensor)
