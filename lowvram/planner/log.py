"""What a traced piece of training asks of a device: memory in order, and work by operation.

Shapes: E events, S storages, N operations.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CATEGORIES = ("weights", "gradients", "optimizer", "average", "activations", "temporary")
WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, ACTIVATIONS, TEMPORARY = range(len(CATEGORIES))

KINDS = ("memory", "matmul", "convolution", "attention")
MEMORY, MATMUL, CONVOLUTION, ATTENTION = range(len(KINDS))

GRAIN_BYTES = 512  # torch's CUDA allocator rounds each request up to a multiple of it


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What an allocator is asked for, in order.

    order: int64 [E]; a number s >= 0 allocates storage s, and ~s frees it. A storage may stay to the end.
    sizes: int64 [S], bytes, multiples of 512. categories: int8 [S], places in CATEGORIES.
    makers: int32 [S], places in `names`: the operation that made it and the module, "convolution in G.b256".
    marks: (event, name), in order: the part of a step that begins there ("G", "path_length", "average" ...).
    """

    order: NDArray[np.int64]
    sizes: NDArray[np.int64]
    categories: NDArray[np.int8]
    makers: NDArray[np.int32]
    names: tuple[str, ...] = ()
    marks: tuple[tuple[int, str], ...] = ()

    def changes(self) -> NDArray[np.int64]:
        """Bytes by which each event changes what is alive, int64 [E]."""
        storages = self.storages()
        return np.where(self.order >= 0, self.sizes[storages], -self.sizes[storages])

    def storages(self) -> NDArray[np.int64]:
        """The storage of each event, int64 [E]."""
        return np.where(self.order >= 0, self.order, ~self.order)

    def live(self) -> NDArray[np.int64]:
        """Bytes alive after each event, int64 [E]."""
        return np.cumsum(self.changes())

    def live_by_category(self) -> NDArray[np.int64]:
        """Bytes alive after each event, int64 [CATEGORIES, E]."""
        kinds = self.categories[self.storages()]
        changes = self.changes()
        return np.stack([np.cumsum(np.where(kinds == index, changes, 0)) for index in range(len(CATEGORIES))])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed and moved, by operation.

    flops: float64 [N], a multiply and an add count as two. bytes: float64 [N], read and written in device memory.
    kinds: int8 [N], places in KINDS. half: bool [N], the operands have 16 bits. host_bytes: copied between host and
    device, both ways together.
    """

    flops: NDArray[np.float64]
    bytes: NDArray[np.float64]
    kinds: NDArray[np.int8]
    half: NDArray[np.bool_]
    host_bytes: float = 0.0

    def __len__(self) -> int:
        return len(self.flops)
