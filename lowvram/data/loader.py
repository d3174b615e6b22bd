"""The endless, shuffled, resumable stream of batches.

The stream is a list of positions 0, 1, 2, ... without end. Position k shows image `permutation(seed, k // N)[k % N]`,
mirrored or not by a coin of (seed, k): nothing depends on what was read before, so that a run resumes anywhere, with
any number of workers and processes, exactly where it stopped.

Of latents of several shapes (aspect-ratio buckets) each batch is of one shape: `BucketPlan` then says which image is
where, by (seed, batch, k).
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lowvram.data.bucketed import shape_numbers
from lowvram.data.buckets import BucketPlan
from lowvram.data.dataset import ImageSet
from lowvram.data.latents import LatentSet
from lowvram.errors import LowVRAMError

log = logging.getLogger(__name__)

# Positions of one batch, and the images, mirror flags and crops they stand for: int64, int64, bool, int64 [n].
Request = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]

_PREFETCH_BYTES = 256 * 2**20


@dataclass
class Batch:
    """images: uint8 [n, 3, R, R], or what else the data set reads; pinned with CUDA. Latents are float16 [n, C, h, w],
    where h and w may change from batch to batch.

    labels: int64 [n], -1 without labels. position: int64 [n], each sample's place in the stream. skipped: "file:
    reason" of each bad file whose place another image took.
    """

    images: Tensor
    labels: Tensor
    position: Tensor
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.position)


@dataclass
class _Parcel:
    """What a worker sends: a batch, or the error that stopped it.

    Only the images are worth shared memory, as a tensor: arrays go through the pipe, small ones faster.
    """

    images: Tensor | NDArray[Any] | None = None
    labels: NDArray[np.int64] | None = None
    position: NDArray[np.int64] | None = None
    skipped: list[str] = field(default_factory=list)
    enlarged: str | None = None
    error: tuple[str, str] | None = None

    def pin_memory(self) -> _Parcel:
        """Called by the DataLoader's pinning thread."""
        self.images = torch.as_tensor(self.images).pin_memory() if self.images is not None else None
        return self


class _Reader(Dataset[_Parcel]):
    """Decodes whole batches; lives in a worker, or in the main process when there are none."""

    def __init__(self, dataset: ImageSet, as_arrays: bool) -> None:
        self.dataset = dataset
        self.as_arrays = as_arrays

    def __getitem__(self, request: Request) -> _Parcel:
        position, index, mirrored, crops = request
        # A fresh tensor goes to shared memory without a second copy.
        dtype = torch.from_numpy(np.empty(0, self.dataset.item_dtype)).dtype
        images = torch.empty(len(index), *_shape(self.dataset, int(index[0])), dtype=dtype)  # [n, 3, R, R]
        labels = np.empty(len(index), np.int64)
        parcel = _Parcel()
        out = images.numpy()
        for row, (at, flip, crop) in enumerate(zip(index.tolist(), mirrored.tolist(), crops.tolist(), strict=True)):
            try:
                item = self.dataset.read(at, mirrored=flip, crop=crop)
            except LowVRAMError as error:  # as data: a DataLoader would rebuild it with its message alone
                return _Parcel(error=(error.problem, error.remedy))
            out[row], labels[row] = item.array, item.label
            parcel.skipped += [line for line in item.skipped if line not in parcel.skipped]
            parcel.enlarged = parcel.enlarged or item.enlarged
        parcel.images = out if self.as_arrays else images
        parcel.labels, parcel.position = labels, position
        return parcel


class _Stream(Sampler[Request]):
    """The positions of this process's batches, from `start` on, without end."""

    def __init__(self, loader: Loader, start: int) -> None:
        self.loader = loader
        self.start = start

    def __iter__(self) -> Iterator[Request]:
        first = self.start
        # Of a run that goes on with another batch size: its batches of one shape begin where its batches do.
        shift = -first % self.loader.batch
        while True:
            position = self.loader.positions(first)
            yield (position, *self.loader.lookup(position, shift=shift))
            first += self.loader.batch


class Loader:
    """Batches of an ImageSet for one process of `world_size`.

    batch: images in a step, over all processes. mirror: flip half of the images left to right. workers: decoding
    processes; 0 decodes in this one. group: the global batch is read as [group, batch / group] and cut by columns, so
    that minibatch stddev, which groups sample n with n + batch / group, sees the same groups in each process.
    pin_memory: None pins where CUDA is there. start_method: of the workers, None takes the platform's own.
    """

    def __init__(
        self,
        dataset: ImageSet,
        *,
        batch: int,
        seed: int,
        mirror: bool,
        workers: int,
        group: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool | None = None,
        start_method: str | None = None,
    ) -> None:
        if batch < 1 or group < 1 or batch % (group * world_size):
            raise LowVRAMError(
                f"batch={batch} cannot be cut into groups of {group} over {world_size} processes",
                f"Use a multiple of {group * world_size}.",
            )
        if not 0 <= rank < world_size:
            raise LowVRAMError(f"rank={rank} is not below world_size={world_size}", "Ranks count from 0.")
        if workers < 0:
            raise LowVRAMError(f"data.workers={workers} must not be negative", "0 decodes in the training process.")
        self.dataset = dataset
        self.batch = batch
        self.seed = seed
        self.mirror = mirror
        self.workers = workers
        self.group = group
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self.start_method = start_method
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]] = {}
        shapes = shape_numbers(dataset)
        self._plan = None if shapes is None else BucketPlan(shapes, batch=batch, seed=seed)
        # The largest item, by which memory is reckoned.
        firsts = [0] if shapes is None else np.unique(shapes, return_index=True)[1].tolist()
        self._item_numbers = max(math.prod(_shape(dataset, at)) for at in firsts)

    def positions(self, first: int) -> NDArray[np.int64]:
        """This process's share of the global batch that starts at position `first`: int64 [batch / world_size]."""
        columns = self.batch // self.group // self.world_size
        grid = np.arange(first, first + self.batch, dtype=np.int64).reshape(self.group, -1)
        return grid[:, self.rank * columns : (self.rank + 1) * columns].ravel()

    def lookup(
        self, position: NDArray[np.int64], *, shift: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """The image index, mirror flag and crop of each position: int64, bool, int64 [n], by (seed, position) alone.

        Of several shapes, batches begin at the positions that are a multiple of `batch` with `shift` added.
        """
        epochs, offset = np.divmod(position, len(self.dataset))
        index = np.empty_like(position)
        mirrored = np.zeros(len(position), np.bool_)
        crop = np.zeros_like(position)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            order, coins, crops = self._epoch(epoch)
            index[rows], crop[rows] = order[offset[rows]], crops[offset[rows]]
            if self.mirror:
                mirrored[rows] = coins[offset[rows]]
        if self._plan is not None:
            index = self._plan.lookup(position + shift)
        return index, mirrored, crop

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """The order of an epoch's images, and for each position a coin and a crop: int64, bool, int64 [N]."""
        if epoch not in self._epochs:
            # RandomState keeps its numbers from one numpy to the next, which the newer generators do not promise.
            words = [*_words(self.seed), *_words(epoch)]
            random = np.random.RandomState(words)
            order = random.permutation(len(self.dataset)).astype(np.int64)
            coins = random.randint(0, 2, len(self.dataset)).astype(np.bool_)
            crops = random.randint(0, self.dataset.crops, len(self.dataset)).astype(np.int64)
            while len(self._epochs) >= 4:  # a batch rarely spans more; a tiny set in a large batch draws anew
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = (order, coins, crops)
        return self._epochs[epoch]

    def iterate(self, images_seen: int) -> Generator[Batch, None, None]:
        """Batches without end, from position `images_seen` of the stream. Closing the iterator ends the workers.

        Raises LowVRAMError for bad files as the data set is set, and when a worker dies.
        """
        if images_seen < 0:
            raise LowVRAMError(f"images_seen={images_seen} must not be negative", "Start at 0.")
        return self._run(images_seen)

    def _run(self, start: int) -> Generator[Batch, None, None]:
        parcels = _iterator(self._data_loader(start))
        at_exit = Finalize(None, _kill_workers, (parcels,), exitpriority=100)
        try:
            while True:
                try:
                    parcel = next(parcels)
                except (RuntimeError, OSError, EOFError) as error:
                    # Of a dead worker torch tells by a RuntimeError, or its pipe by breaking.
                    if isinstance(error, RuntimeError) and not re.search("exited unexpected|killed by", str(error)):
                        raise
                    raise LowVRAMError(
                        f"a data worker died: {error}",
                        "It may have run out of memory: use fewer with data.workers, or 0.",
                    ) from error
                yield self._open(parcel)
        finally:
            # Dropping the iterator ends the workers, but after an error its traceback still holds it: end them now.
            getattr(parcels, "_shutdown_workers", lambda: None)()
            at_exit.cancel()
            del parcels, at_exit

    def _open(self, parcel: _Parcel) -> Batch:
        if parcel.error is not None:
            raise LowVRAMError(*parcel.error)
        self.dataset.skip_log.report(parcel.skipped)
        self.dataset.skip_log.note_enlarged(parcel.enlarged, self.dataset.resolution)
        return Batch(
            images=torch.as_tensor(parcel.images),
            labels=torch.as_tensor(parcel.labels),
            position=torch.as_tensor(parcel.position),
            skipped=parcel.skipped,
        )

    def _data_loader(self, start: int) -> DataLoader[_Parcel]:
        item_bytes = self._item_numbers * np.dtype(self.dataset.item_dtype).itemsize
        batch_bytes = self.batch // self.world_size * item_bytes
        prefetch = int(np.clip(_PREFETCH_BYTES // max(1, batch_bytes * self.workers), 1, 4))
        flight_bytes = batch_bytes * (prefetch + 1) * self.workers
        return DataLoader(
            _Reader(self.dataset, as_arrays=self.workers > 0 and not _shared_memory_holds(flight_bytes)),
            sampler=_Stream(self, start),
            batch_size=None,  # a request is a whole batch already
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            prefetch_factor=prefetch if self.workers else None,
            worker_init_fn=_quiet_worker,
            multiprocessing_context=self.start_method if self.workers else None,
            # Its own generator: a DataLoader draws a seed, and drawing it from torch's default one would make the
            # random numbers of a run depend on how often it was resumed.
            generator=torch.Generator(),
        )


def _iterator(data_loader: DataLoader[_Parcel]) -> Iterator[_Parcel]:
    """The DataLoader's iterator, without the SIGCHLD handler that it installs.

    That handler raises wherever the main thread happens to be when a worker dies: within a step, within a save.
    Without it `next` tells, after 5 seconds at most, which is soon enough and in one place.
    """
    if data_loader.num_workers == 0 or threading.current_thread() is not threading.main_thread():
        return iter(data_loader)
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    parcels = iter(data_loader)
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    return parcels


def _kill_workers(parcels: Iterator[_Parcel]) -> None:
    """End the workers of a stream that is still open when the process exits.

    Python would send them SIGTERM, which they ignore, and then wait for ever.
    """
    for worker in getattr(parcels, "_workers", []):
        worker.kill()


def _shape(dataset: ImageSet, index: int) -> tuple[int, ...]:
    """The shape of what `dataset.read` gives for an index."""
    return dataset.shape_of(index) if isinstance(dataset, LatentSet) else dataset.item_shape


def _as_is(parcel: Any) -> Any:
    return parcel


def _words(number: int) -> list[int]:
    """An integer as two 32-bit words, as RandomState takes them."""
    return [number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF]


def _quiet_worker(_worker: int) -> None:
    """Leave SIGINT and SIGTERM to the main process, which finishes its step and then ends the workers; a terminal
    or a scheduler sends them to the whole process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _shared_memory_holds(flight_bytes: int) -> bool:
    """Whether batches on their way fit in shared memory; a container often has 64 MiB, and a write beyond it kills."""
    if sys.platform != "linux" or not Path("/dev/shm").is_dir():
        return True
    return shutil.disk_usage("/dev/shm").free > 4 * flight_bytes
