"""Activations on the host: what autograd saves leaves the device, and comes back when the backward asks for it.

Exact to the bit, and under any number of derivatives: bytes are copied, nothing is computed again, and nothing is freed
before the graph that needs it. What the backward of a first derivative saves for the second (R1, path length) leaves
as well; what it saves of tensors that came back is known to be on the host already.

A whole storage is copied where a saved tensor covers most of it, so that its views share one copy on either side.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache
from torch.autograd.graph import saved_tensors_hooks

from lowvram.memory import host

LOOK_BACK = 8  # how many earlier tensors are looked at for one to fetch ahead


class ActivationOffload:
    """Within it, tensors that autograd saves are kept on the host. The backward may run within or after.

        offload = ActivationOffload(device, skip=network.parameters())
        with offload:
            loss = criterion(network(x))
        loss.backward()

    Kept on the device: what is smaller than `min_bytes`, shares memory with a tensor of `skip`, lives elsewhere, or is
    no plain strided tensor. Autograd does not say which tensors are parameters: name them in `skip`, or they are copied
    to no use. It may be entered again and again, not twice at once.

    On CUDA copies run on two side streams, one each way. A tensor's device memory is given back, in the order of the
    computation, as soon as its copy is done, or when more than `in_flight_bytes` (and the newest tensor) wait for
    theirs: then the computation waits too. So a peak holds at most that much more than on a CPU, where copies are done
    at once. When a tensor is brought back, the one saved before it follows while the computation goes on.

    Args:
        device: the training device.
        min_bytes: the smallest tensor that is worth a copy.
        skip: tensors that stay; their storages are looked up each time the context is entered.
        in_flight_bytes: see above.

    host_bytes and peak_host_bytes: what is on the host, and the most that was (torch's page-locked blocks are powers
    of two, and so up to twice that).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        min_bytes: int = 1 << 16,
        skip: Iterable[Tensor] = (),
        in_flight_bytes: int = 64 << 20,
    ) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.min_bytes, self.in_flight_bytes = device, min_bytes, in_flight_bytes
        self.host_bytes = self.peak_host_bytes = 0
        self._skip = tuple(skip)
        self._skip_addresses: set[int] = set()
        self._hooks: saved_tensors_hooks | None = None
        self._lanes: _Lanes = _SideStreams(device) if device.type == "cuda" else _AtOnce()
        # Graphs own the parcels; nothing here keeps one alive.
        self._by_key: weakref.WeakValueDictionary[tuple[Any, ...], _Parcel] = weakref.WeakValueDictionary()
        self._by_number: weakref.WeakValueDictionary[int, _Parcel] = weakref.WeakValueDictionary()
        self._leaving: list[weakref.ref[_Parcel]] = []  # whose device memory waits for the copy, oldest first
        self._ahead: weakref.ref[_Parcel] | None = None  # fetched, and not asked for yet
        self._count = 0

    def __enter__(self) -> Self:
        if self._hooks is not None:
            raise RuntimeError("this ActivationOffload is entered already; make another one to nest")
        self._skip_addresses = {t.untyped_storage()._cdata for t in self._skip if host.has_storage(t)}
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(*exc)
        self._hooks = None

    # To the host.

    def _pack(self, tensor: Tensor) -> "Tensor | _Saved":
        if tensor.device != self.device or not host.has_storage(tensor) or not tensor.numel():
            return tensor.detach()  # detached, because a graph that holds its own output is never freed
        first, stop = _span(tensor)
        small = (stop - first) * tensor.itemsize < self.min_bytes
        if small or tensor.is_conj() or tensor.is_neg() or host.is_host(tensor):
            return tensor.detach()
        storage = tensor.untyped_storage()
        if storage._cdata in self._skip_addresses:
            return tensor.detach()
        whole = storage.nbytes() // tensor.itemsize
        if 2 * (stop - first) >= whole:
            first, stop = 0, whole
        parcel = self._by_key.get(_key(tensor, first, stop))
        if parcel is None or not parcel.stems_from(storage):  # an address may be another storage's by now
            parcel = self._send(tensor.detach().as_strided((stop - first,), (1,), first), first)
        return _Saved(parcel, tensor.size(), tensor.stride(), int(tensor.storage_offset()) - first)

    def _send(self, flat: Tensor, first: int) -> "_Parcel":
        """Start the copy of a range of memory, [n], to the host."""
        self._count += 1
        parcel = _Parcel(self, flat, host.empty_like(flat), self._count)
        self._by_number[self._count] = parcel
        self._by_key[_key(flat, first, first + len(flat))] = parcel
        self._leaving.append(weakref.ref(parcel))
        self._give_back()
        return parcel

    def _give_back(self) -> None:
        """Free the device memory of what has arrived on the host, and of the oldest where too much is on the way."""
        leaving = [p for ref in self._leaving if (p := ref()) is not None and p.is_leaving]
        waiting_bytes = sum(p.buffer.nbytes for p in leaving[:-1])
        for parcel in leaving:
            newest = parcel is leaving[-1]
            if self._lanes.done(parcel.out) or (waiting_bytes > self.in_flight_bytes and not newest):
                parcel.release()
            waiting_bytes -= parcel.buffer.nbytes
        self._leaving = [weakref.ref(p) for p in leaving if p.held is not None]

    # And back.

    def _unpack(self, saved: "Tensor | _Saved") -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        parcel, size, stride, offset = saved
        with torch.no_grad():
            self._give_back()
            flat = self._brought_back(parcel)  # [n]
            self._fetch_ahead(parcel)
            return flat.as_strided(size, stride, offset)

    def _brought_back(self, parcel: "_Parcel") -> Tensor:
        """The parcel's memory on the device, ready for the current stream: the copy that is there, or a new one."""
        if parcel.is_leaving:
            assert parcel.held is not None
            parcel.check()
            return parcel.held
        if parcel.held is None:
            there = parcel.copy_on_device()
            if there is not None:
                self._lanes.wait(parcel.back)
                again = _flat(there, parcel.buffer, self.device)
                self._by_key[_key(again, 0, len(again))] = parcel  # it counts its versions anew
                return again
            self._fetch(parcel)
        flat = parcel.held
        assert flat is not None
        parcel.release()  # the graph holds it for as long as it needs it
        return flat

    def _fetch(self, parcel: "_Parcel") -> None:
        """Start the copy back to the device."""
        flat = parcel.fetch(self.device)
        self._by_key[_key(flat, 0, len(flat))] = parcel  # saved again, it need not be copied again

    def _fetch_ahead(self, parcel: "_Parcel") -> None:
        """Start bringing back what was saved before: the backward goes that way, so it is most likely needed next."""
        ahead = self._ahead() if self._ahead is not None else None
        if ahead is not None and ahead.held is not None:
            if 0 < parcel.number - ahead.number <= LOOK_BACK:
                return  # its turn may still come
            ahead.release()  # it was passed over, or the backward is elsewhere by now
        for number in range(parcel.number - 1, parcel.number - 1 - LOOK_BACK, -1):
            before = self._by_number.get(number)
            if before is not None and before.held is None and before.copy_on_device() is None:
                self._fetch(before)
                self._ahead = weakref.ref(before)
                return


class _Parcel:
    """A range of one storage, [n], in host memory for as long as a graph needs it, and its copy on the device."""

    def __init__(self, owner: ActivationOffload, flat: Tensor, buffer: Tensor, number: int) -> None:
        self.owner, self.lanes, self.buffer, self.number = owner, owner._lanes, buffer, number
        owner.host_bytes += buffer.nbytes
        owner.peak_host_bytes = max(owner.peak_host_bytes, owner.host_bytes)
        self.source = weakref.ref(flat.untyped_storage())
        self.copy: weakref.ref[Any] | None = None  # the storage brought back last
        self.state, self.spoilt = _state(flat), False
        # held: device memory that must stay while a side stream reads it (on its way out) or writes it.
        self.held: Tensor | None = None
        self.is_leaving = False
        self.back: Any = None  # the ticket of the copy back
        self.out = self.lanes.start(buffer, flat, to_host=True, after=None)
        self.held, self.is_leaving = flat, True

    def stems_from(self, storage: Any) -> bool:
        """Whether this is the storage that was sent, or its last copy."""
        return self.source() is storage or (self.copy is not None and self.copy() is storage)

    def copy_on_device(self) -> Any:
        """The storage brought back last, if a graph still holds it."""
        return None if self.copy is None else self.copy()

    def fetch(self, device: torch.device) -> Tensor:
        """Start a copy to new device memory [n], which `held` keeps until `release`."""
        self.check()
        flat = torch.empty(len(self.buffer), dtype=self.buffer.dtype, device=device)
        self.back = self.lanes.start(flat, self.buffer, to_host=False, after=self.out)
        self.held, self.copy = flat, weakref.ref(flat.untyped_storage())
        return flat

    def release(self) -> None:
        """Let go of the device memory, which the computation does not use again before the copy is done."""
        if self.held is not None:
            self.spoilt = self.is_spoilt()
            self.lanes.wait(self.out if self.is_leaving else self.back)
            self.held, self.is_leaving = None, False

    def is_spoilt(self) -> bool:
        """Whether the memory was written to, or taken away, before the copy to the host was known to be done."""
        return self.spoilt or (self.is_leaving and self.held is not None and _state(self.held) != self.state)

    def check(self) -> None:
        """Raise where autograd would, and where the copy may be wrong."""
        if self.is_spoilt():
            raise RuntimeError(
                f"a tensor of {len(self.buffer)} values ({self.buffer.dtype}) that the backward needs was changed in "
                "place, or its memory freed, after it was saved"
            )

    def __del__(self) -> None:
        self.owner.host_bytes -= self.buffer.nbytes
        self.release()


class _Saved(NamedTuple):
    """What the graph holds instead of a tensor: a view of a parcel, in elements."""

    parcel: _Parcel
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Lanes(Protocol):
    """Two one-way lanes for copies beside the computation. `start` gives a ticket for `wait` and `done`."""

    def start(self, target: Tensor, source: Tensor, *, to_host: bool, after: Any) -> Any: ...

    def wait(self, ticket: Any) -> None: ...

    def done(self, ticket: Any) -> bool: ...


class _AtOnce:
    """Copies that are done when `start` returns."""

    def start(self, target: Tensor, source: Tensor, *, to_host: bool, after: Any) -> None:
        with torch.no_grad():
            target.copy_(source)

    def wait(self, ticket: None) -> None:
        pass

    def done(self, ticket: None) -> bool:
        return True


class _Ticket(NamedTuple):
    event: torch.cuda.Event
    stream: torch.cuda.Stream  # of the computation when the copy was started


class _SideStreams:
    """Copies on two CUDA streams beside the current one.

    Device memory is allocated and freed on the computation's stream. Both ends of a copy are therefore ordered by it: a
    copy starts after all that the computation was given before it (the source is written, or the target's last user
    is done), and the memory is let go only after the computation was told to wait for the copy. The allocator needs no
    `record_stream`, which would keep the memory until an event that comes later still.
    Host memory is guarded by its allocator, which notes the streams that copy from and to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor, *, to_host: bool, after: _Ticket | None) -> _Ticket:
        lane = self._out if to_host else self._back
        computation = torch.cuda.current_stream(self.device)
        lane.wait_stream(computation)
        if after is not None:
            lane.wait_event(after.event)
        with torch.no_grad(), torch.cuda.stream(lane):
            target.copy_(source, non_blocking=True)
        return _Ticket(lane.record_event(), computation)

    def wait(self, ticket: _Ticket) -> None:
        for stream in {ticket.stream, torch.cuda.current_stream(self.device)}:
            stream.wait_event(ticket.event)

    def done(self, ticket: _Ticket) -> bool:
        return bool(ticket.event.query())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The elements of its storage that a tensor lies in: from the first to behind the last."""
    first = int(tensor.storage_offset())
    return first, first + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _state(tensor: Tensor) -> tuple[int, int]:
    """What shows that memory is no longer as it was: its version, and its size (FSDP frees weights by resizing)."""
    return tensor._version, tensor.untyped_storage().nbytes()


def _key(tensor: Tensor, first: int, stop: int) -> tuple[Any, ...]:
    """What a range of memory holds: the version goes up when it is written to."""
    return tensor.untyped_storage()._cdata, tensor.dtype, tensor._version, first, stop


def _flat(storage: Any, like: Tensor, device: torch.device) -> Tensor:
    """All of a storage as a tensor [n]."""
    # The cache of fake operations would keep the storage, an argument here, for ever.
    uncached = disable_fake_tensor_cache(like.fake_mode) if isinstance(like, FakeTensor) else nullcontext()
    with uncached:
        return torch.empty(0, dtype=like.dtype, device=device).set_(storage, 0, (len(like),), (1,))
