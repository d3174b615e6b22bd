"""Whole blocks on the host, brought to the device one ahead of their use: a network larger than the device's memory.

Some of them may stay on the device (`resident`): what they compute is time for the copies of the others.

Why two slots are enough. A block's weights are read by its forward, by its recomputation in the backward, and by the
backward that follows it. In the forward, one block runs at a time. In the backward, autograd runs the nodes that are
ready in the reverse order of their creation, and each node after all that used its result. So the node made last of
those still to run is always ready: the order is strictly the reverse of the forward's. A block's nodes were all made
before those of the next; they run after all of those, and before those of the block that ran before it. The first of
its nodes that needs a saved tensor starts its recomputation, at which time no node of a later block is left. (Gradients
are accumulated as soon as they are complete, so earlier still.) Hence when a block is brought, no other is in use: one
slot is its own, and the other is free for the block after it, once the kernels that were launched have run.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from lowvram.memory import host
from lowvram.memory.checkpointing import Forward, recompute, wrapped_forwards
from lowvram.memory.stream_parts import Order, Slot, StreamedBlock, host_buffers, staying


class BlockStream:
    """Keeps the weights of a network's blocks on the host and brings them to the device, one block ahead of its use.

    Exact. Parameters stay the same objects, under the same names; the data of a streamed one is a view of the device's
    copy while its block is there, and of the host's otherwise. Parameters that several blocks share, or that lie
    outside of blocks, are on the device throughout, and so are buffers. What nobody changes is never copied back.

    Whoever reads or changes weights outside of `running`, `resident` and `loaded` (saving, averaging, loading a state
    dict) calls `flush` first: until then the host's copy may be older than the device's.

    Args:
        network: on any device; its blocks need not fit on `device`.
        blocks: by name, as `find_blocks` gives them; none contains another.
        device: where they run.
        stay: parameters that are on the device throughout although they lie inside blocks (trained ones of a frozen
            network).
        resident: the share, in [0, 1], of the blocks' bytes that is on the device throughout, in whole blocks: those
            that `stream_parts.staying` tells. They run as they would without streaming.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Mapping[str, nn.Module],
        device: torch.device,
        *,
        stay: Collection[nn.Parameter] = (),
        resident: float = 0.0,
    ) -> None:
        self.device = torch.device(device)
        # Called with a block's name each time that it is about to be used in a forward, with its weights on the device,
        # on the stream that computes, without grad mode and autocast. Returns whether it changed them. What it changed
        # before an error stays changed. Not called in a backward, whose weights must be the forward's, nor by `loaded`.
        self.on_load: Callable[[str], bool] | None = None
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.copied_bytes = 0  # of weights, in either direction, since it was made
        self._staying: dict[str, StreamedBlock] = {}
        self._blocks: dict[str, StreamedBlock] = {}
        self._move_out(self._take_over(network, blocks, set(stay), resident))
        self._slots: list[Slot] = []
        self._recent: Slot | None = None  # the slot that was used last, and so may be in use still
        self._order = Order()
        self._resident = False
        self._inside: str | None = None  # the block whose forward is running

    # For callers.

    @property
    def params(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that stream, by the names of their blocks; all others are on the device."""
        return {name: list(block.params) for name, block in self._blocks.items()}

    @property
    def staying(self) -> dict[str, list[nn.Parameter]]:
        """As `params`, of the blocks that stay on the device."""
        return {name: list(block.params) for name, block in self._staying.items()}

    def stream_all(self) -> None:
        """No block stays on the device any longer. Not while the network runs."""
        self.flush(release=True)  # for slots that are too small
        self._move_out(self._staying)
        self._staying = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """The network can run within, forward and backward; blocks that run in grad mode are recomputed in it.

        Random numbers are drawn again as they were. Second derivatives need `resident`.

        Raises:
            LowVRAMError: the blocks are streamed or recomputed already.
        """
        with wrapped_forwards(self._modules(), self._streamed):
            yield

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Blocks that run within come to the device and stay until the end; nothing is recomputed. Backward included.

        Raises:
            LowVRAMError: the blocks are streamed or recomputed already.
        """
        with wrapped_forwards(self._modules(), self._kept):
            self.flush(release=True)
            self._resident = True
            try:
                yield
            finally:
                self._resident = False
                self.flush(release=True)

    @contextmanager
    def loaded(self, name: str) -> Iterator[None]:
        """One block is on the device within, to be changed; it is written back at the end, after an error too."""
        if _in_backward():
            raise RuntimeError(f"loaded({name!r}) within a backward could take the slot that the backward needs")
        block = self._blocks[name]
        with _untraced():
            slot = self._bring(block)
            self._prefetch(self._order.after(name, "loaded"))
        try:
            yield
        finally:
            if slot.block is block:
                with _untraced():
                    self._write_back(slot)

    def mark_changed(self, name: str) -> None:
        """Say that the weights of a block were changed on the device: they are written back before it leaves.

        Needed where torch does not notice the change (kernels of other libraries); harmless elsewhere.
        """
        slot = self._holding(self._blocks[name])
        if slot is None or not slot.in_use:
            raise RuntimeError(f"block {name!r} is not on the device, where its weights were said to have changed")
        slot.changed = True

    @torch.no_grad()
    def flush(self, *, release: bool = False) -> None:
        """All weights are on the host, up to date, and can be read at once; parameters are views of them there.

        release: free the device's slots too. Not within `resident` or a backward.
        """
        if self._resident or _in_backward():
            raise RuntimeError("flush within resident() or a backward would take away weights that are needed")
        for slot in self._slots:
            self._evict(slot)
        if self._copies is not None:
            self._copies.synchronize()
        if release:
            self._slots.clear()
            self._recent = None

    def make_slots(self) -> None:
        """Have the memory for two blocks on the device, as it is once blocks have run."""
        with _untraced():
            for name in list(self._blocks)[:2] if not self._slots else ():
                self._prefetch(name)

    def slot_sizes_bytes(self) -> list[int]:
        """Of the slots that are on the device now."""
        return [len(slot.buffer) for slot in self._slots]

    # A block's forward.

    def _streamed(self, module: nn.Module, forward: Forward) -> Forward:
        block = self._of_module[id(module)]

        def run(*args: Any, **kwargs: Any) -> Any:
            if _in_backward():
                self._use(block)
            with self._one_at_a_time(block):
                return self._detached(forward(*args, **kwargs))

        def streamed(*args: Any, **kwargs: Any) -> Any:
            # Here and not in `run`: what an update does must not come between the random state that `recompute` keeps
            # and the numbers that the block draws.
            self._use(block)
            return recompute(run, *args, **kwargs) if torch.is_grad_enabled() else run(*args, **kwargs)

        return streamed

    def _kept(self, module: nn.Module, forward: Forward) -> Forward:
        block = self._of_module[id(module)]

        def kept(*args: Any, **kwargs: Any) -> Any:
            self._use(block)
            return forward(*args, **kwargs)

        return kept

    def _use(self, block: StreamedBlock) -> None:
        backward = _in_backward()
        pass_ = "backward" if backward else "forward" if torch.is_grad_enabled() else "no_grad"
        with _untraced():
            slot = self._bring(block)
            if not backward and self.on_load is not None:
                try:
                    with torch.autocast(self.device.type, enabled=False):
                        slot.changed |= self.on_load(block.name)
                except BaseException:
                    slot.changed = True  # at least it may have
                    raise
            self._prefetch(self._order.after(block.name, pass_))

    @contextmanager
    def _one_at_a_time(self, block: StreamedBlock) -> Iterator[None]:
        if self._inside is not None:
            raise RuntimeError(f"block {block.name!r} runs inside {self._inside!r}: blocks must not call one another")
        self._inside = block.name
        try:
            yield
        finally:
            self._inside = None

    def _detached(self, outputs: Any) -> Any:
        """Outputs that are views of weights, copied: the slot's memory will be another block's."""
        slots = {slot.buffer.untyped_storage()._cdata for slot in self._slots}

        def is_view(t: Tensor) -> bool:
            return host.has_storage(t) and t.untyped_storage()._cdata in slots

        return tree_map_only(Tensor, lambda t: t.clone() if is_view(t) else t, outputs)

    # Slots. Copies run on a stream of their own, one after the other; each waits for the kernels launched before it.

    def _bring(self, block: StreamedBlock) -> Slot:
        """The slot with the block, its parameters pointing there; kernels launched from now on see its weights."""
        slot = self._holding(block)
        if slot is None:
            slot = self._load(block)
        elif not slot.in_use and slot.version != block.version():  # someone wrote to the host's copy since
            slot.arrived = self._copy(slot.buffer, block.weights)
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        if not slot.in_use:
            block.point_to(slot.buffer)
            slot.in_use, slot.version = True, block.version()
        self._recent = slot
        return slot

    def _prefetch(self, name: str | None) -> None:
        if name is not None and self._holding(self._blocks[name]) is None:
            self._load(self._blocks[name])

    def _load(self, block: StreamedBlock) -> Slot:
        slot = self._free_slot(block.size_bytes)
        self._evict(slot)
        slot.arrived = self._copy(slot.buffer, block.weights)
        slot.block, slot.in_use, slot.changed, slot.version = block, False, False, block.version()
        return slot

    def _free_slot(self, wanted_bytes: int) -> Slot:
        if self._resident or len(self._slots) < 2:
            size_bytes = wanted_bytes if self._resident else self._slot_bytes
            self._slots.append(Slot(buffer=torch.empty(size_bytes, dtype=torch.uint8, device=self.device)))
            return self._slots[-1]
        return next(slot for slot in self._slots if slot is not self._recent)

    def _evict(self, slot: Slot) -> None:
        block = slot.block
        if block is None:
            return
        if slot.in_use:
            if slot.changed or slot.version != block.version():
                self._write_back(slot)
            block.point_to(block.weights)
            # A graph that saved these weights as they were (their block was used other than by calling it) would read
            # another block's: this makes its backward an error.
            increment_version(block.params)
        slot.block, slot.in_use, slot.changed = None, False, False

    def _write_back(self, slot: Slot) -> None:
        assert slot.block is not None
        self._copy(slot.block.weights, slot.buffer)
        slot.changed, slot.version = False, slot.block.version()

    def _copy(self, target: Tensor, source: Tensor) -> "torch.cuda.Event | None":
        """Copy as many bytes as both have, after all that was launched before; an event for its end."""
        count = min(len(target), len(source))
        target, source = target[:count], source[:count]
        self.copied_bytes += count
        if self._copies is None:
            target.copy_(source)
            return None
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def _holding(self, block: StreamedBlock) -> Slot | None:
        return next((slot for slot in self._slots if slot.block is block), None)

    def _modules(self) -> list[nn.Module]:
        return [block.module for block in self._blocks.values()]

    # Construction.

    @torch.no_grad()
    def _take_over(
        self, network: nn.Module, blocks: Mapping[str, nn.Module], stay: set[nn.Parameter], resident: float
    ) -> dict[str, StreamedBlock]:
        """Bring to the device what is there throughout; the blocks that are not, still where they were."""
        holders: dict[nn.Parameter, set[str]] = {}  # by name; "" for whatever is no block
        inside = {id(module) for block in blocks.values() for module in block.modules()}
        for name, block in blocks.items():
            for param in block.parameters():
                holders.setdefault(param, set()).add(name)
        for param in stay & holders.keys():
            holders[param].add("")
        for module in network.modules():
            if id(module) not in inside:
                for param in module.parameters(recurse=False):
                    holders.setdefault(param, set()).add("")
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(self.device)
        made = {
            name: StreamedBlock.make(name, block, [p for p in block.parameters() if holders[p] == {name}])
            for name, block in blocks.items()
        }
        stays = staying([block.size_bytes for block in made.values()], resident)
        self._staying = {name: block for (name, block), here in zip(made.items(), stays, strict=True) if here}
        for param, names in holders.items():
            if names == {""} or len(names) > 1 or names <= self._staying.keys():
                param.data = param.data.to(self.device)
        return {name: block for name, block in made.items() if name not in self._staying}

    @torch.no_grad()
    def _move_out(self, blocks: Mapping[str, StreamedBlock]) -> None:
        """Stream these blocks too: their weights go to the host."""
        sizes_bytes = {name: block.size_bytes for name, block in blocks.items()}
        for name, buffer in host_buffers(sizes_bytes, pinned=self.device.type == "cuda"):
            blocks[name].move_to(buffer)
        self._blocks |= blocks
        self._of_module = {id(block.module): block for block in self._blocks.values()}
        self._slot_bytes = max((block.size_bytes for block in self._blocks.values()), default=0)


@contextmanager
def _untraced() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
