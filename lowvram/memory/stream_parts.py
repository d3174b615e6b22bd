"""What a stream of blocks is made of: a block's place on the host, a slot on the device, a guess at what comes next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lowvram.memory import host

_ALIGNMENT_BYTES = 512  # of each parameter in a buffer, as the allocators give it: kernels are chosen by alignment


@dataclass(kw_only=True, eq=False)
class StreamedBlock:
    """A block's streamed parameters, and where each lies in a buffer. weights: uint8 [size_bytes] on the host."""

    name: str
    module: nn.Module
    params: list[nn.Parameter]
    offsets_bytes: list[int]
    strides: list[tuple[int, ...]]
    size_bytes: int
    weights: Tensor

    @classmethod
    def make(cls, name: str, module: nn.Module, params: list[nn.Parameter]) -> "StreamedBlock":
        """A block whose parameters are where they were."""
        sizes_bytes = [aligned(param.nbytes) for param in params]
        return cls(
            name=name,
            module=module,
            params=params,
            offsets_bytes=[0, *accumulate(sizes_bytes)][:-1],
            # The strides of a dense copy: memory formats such as channels_last stay.
            strides=[torch.empty_like(param, device="meta").stride() for param in params],
            size_bytes=sum(sizes_bytes),
            weights=torch.empty(0, dtype=torch.uint8),
        )

    def move_to(self, weights: Tensor) -> None:
        """Keep the parameters in this buffer from now on."""
        for param, view in zip(self.params, self.views(weights), strict=True):
            view.copy_(param.data)
        self.weights = weights
        self.point_to(weights)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parameters' places in a buffer, in their shapes."""
        parts = zip(self.params, self.offsets_bytes, self.strides, strict=True)
        return [
            buffer[offset : offset + param.nbytes].view(param.dtype).as_strided(param.shape, stride)
            for param, offset, stride in parts
        ]

    def point_to(self, buffer: Tensor) -> None:
        """Make the parameters views of a buffer that holds their values."""
        for param, view in zip(self.params, self.views(buffer), strict=True):
            param.data = view

    def version(self) -> int:
        """Grows with each change of a parameter that torch notices."""
        return sum(param._version for param in self.params)


@dataclass(kw_only=True, eq=False)
class Slot:
    """Device memory for one block, uint8 [bytes].

    in_use: the block's parameters point here; otherwise it was only brought ahead. changed: said to differ from the
    host's copy. version: the block's, when both were last alike. arrived: the end of the copy to the device.
    """

    buffer: Tensor
    block: StreamedBlock | None = None
    in_use: bool = False
    changed: bool = False
    version: int = 0
    arrived: "torch.cuda.Event | None" = None


class Order:
    """Guesses which block is used next, from what followed the last few when they were last used in the same way."""

    MEMORY = 4  # blocks; a block that runs several times in a pass is told apart by those before it

    def __init__(self) -> None:
        self._next: dict[tuple[str, ...], str] = {}
        self._last: tuple[str, ...] = ("",)  # the pass, then its latest blocks

    def after(self, name: str, pass_: str) -> str | None:
        """Note that a block is used in a pass ("forward", "backward" ...); the block to expect next, if any.

        A pass ends where another begins, with no guess for what comes then: the backward begins with the two blocks
        that the forward ended with, and these are in the slots.
        """
        if pass_ != self._last[0]:
            self._last = (pass_,)
        self._next[self._last] = name
        self._last = (pass_, *self._last[1:][-self.MEMORY + 1 :], name)
        return self._next.get(self._last)


def aligned(size_bytes: int) -> int:
    """What a parameter of so many bytes takes in a buffer."""
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def staying(sizes_bytes: Sequence[int], share: float) -> list[bool]:
    """Which of a network's blocks stay on the device when a share of its bytes, in [0, 1], does.

    They are spread evenly over the order in which they run, so that the copies of those between them have time: going
    through it, a block stays when that brings what has stayed nearer to the share of what was passed. All together are
    thus within half a block of it.
    """
    found, passed, kept = [], 0, 0
    for size in sizes_bytes:
        passed += size
        found.append(size > 0 and share * passed - kept >= size / 2)
        kept += size if found[-1] else 0
    return found


def host_buffers(sizes_bytes: Mapping[str, int], *, pinned: bool) -> Iterator[tuple[str, Tensor]]:
    """Host memory by name, uint8 [size], the largest first; made as it is asked for, so that what moves in is not there
    twice. Page-locked memory comes in powers of two, so several share such a chunk."""
    chunks: list[Tensor] = []  # what is left of them
    left_bytes = sum(sizes_bytes.values())
    largest_bytes = max(sizes_bytes.values(), default=0)
    for name, size_bytes in sorted(sizes_bytes.items(), key=lambda item: -item[1]):
        index = next((i for i, chunk in enumerate(chunks) if len(chunk) >= size_bytes), len(chunks))
        if index == len(chunks):
            chunk_bytes = 1 << (min(largest_bytes, left_bytes) - 1).bit_length()
            with host.on_host():
                chunks.append(torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=pinned))
        buffer, chunks[index] = chunks[index][:size_bytes], chunks[index][size_bytes:]
        left_bytes -= size_bytes
        yield name, buffer
