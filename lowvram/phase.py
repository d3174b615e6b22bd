"""What the trainer knows of a task: a list of phases, and the samples that a phase is given."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from lowvram import seeded
from lowvram.errors import LowVRAMError


@dataclass(kw_only=True)
class MicroBatch:
    """A part of a batch that is in memory at one time.

    images: uint8 [b, C, H, W] on the training device.
    labels: int64 [b] class of each image, -1 without classes.
    seeds: int64 [b] on the CPU: the root of every random number that the phase draws for a sample. They depend on the
        run's seed, the phase and the sample's place in the stream, and so on no other sample.
    inputs: of a model of your own, the batch as it was given, with these samples alone.
    """

    images: Tensor
    labels: Tensor
    seeds: Tensor
    reported: dict[str, Tensor] = field(default_factory=dict)
    inputs: Any = None

    @classmethod
    def of(cls, inputs: Any, seeds: Tensor) -> "MicroBatch":
        """Samples as tensors of any structure: images [b, ...]; images and labels; or else whatever `inputs` holds.

        In the last case `images` is empty, [b, 0]; without labels those are -1.
        """
        images = inputs if isinstance(inputs, Tensor) else None
        labels = None
        if isinstance(inputs, list | tuple) and len(inputs) == 2 and all(isinstance(x, Tensor) for x in inputs):
            images, labels = inputs
        if images is None:
            images = torch.empty(len(seeds), 0)
        if labels is None:
            labels = torch.full((len(seeds),), -1, device=images.device)
        return cls(images=images, labels=labels, seeds=seeds, inputs=inputs)

    def __len__(self) -> int:
        return len(self.seeds)

    def report(self, **values: Tensor) -> None:
        """Hand per-sample values [b, ...] to `Phase.finish`, which gets their mean over the whole batch."""
        for name, value in values.items():
            self.reported[name] = value.detach().float().sum(dim=0)


@dataclass(kw_only=True, eq=False)
class Phase:
    """One kind of update: its loss, the networks that it changes, how often, and in what portions.

    Args:
        name: shown in metrics and errors.
        networks: the networks that the update changes; no other network gets gradients.
        frozen: networks that the loss's gradient goes through and whose weights stay: the UNet of a LoRA, the text
            encoder and the UNet of a textual inversion. Parameters of `networks` may sit inside their modules (LoRA
            layers in a UNet's blocks) and are trained all the same.
        optimizer: holds exactly the parameters of `networks`. Phases may share one.
        loss: mean loss, a scalar, of a micro-batch of b samples; or terms of it, one after the other, each of which is
            freed before the next is made. The trainer weighs them by b / samples * every.
        samples: images in one update, over all processes and micro-batches: the first so many of the batch.
        terms: how many the loss yields.
        second_order: the loss takes a derivative of a derivative (`create_graph`): R1, path length.
        every: the phase runs at each n-th step, and its loss counts n-fold (lazy regularisation).
        start: the first step at which it runs.
        micro_batch: samples of one process in memory at a time; None: all of them.
        group: samples i, i + n / group, i + 2 n / group ... of a batch of n belong together (minibatch standard
            deviation) and stay in one micro-batch.
        clip_norm: bound of the global gradient norm; None: none.
        finish: called after the update with the batch means of what `MicroBatch.report` was given.
    """

    name: str
    networks: tuple[nn.Module, ...]
    optimizer: torch.optim.Optimizer
    loss: Callable[[MicroBatch], Tensor | Iterator[Tensor]]
    samples: int
    terms: int = 1
    second_order: bool = False
    every: int = 1
    start: int = 0
    micro_batch: int | None = None
    group: int = 1
    clip_norm: float | None = None
    finish: Callable[[dict[str, Tensor]], None] | None = None
    frozen: tuple[nn.Module, ...] = ()

    def due(self, step: int) -> bool:
        """Whether the phase runs at a step, counted from 0."""
        return step >= self.start and step % self.every == 0

    def losses(self, micro: MicroBatch) -> Iterator[Tensor]:
        """The terms of the loss, each a scalar with a graph of its own."""
        loss = self.loss(micro)
        if isinstance(loss, Tensor):
            yield loss
        else:
            yield from loss

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the phase updates, in a stable order."""
        return [p for network in self.networks for p in network.parameters()]

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Only this phase's networks ask for gradients within; what is frozen does not from here on."""
        parameters = self.parameters()
        for network in self.frozen:
            network.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def micro_batches(
        self, images: Tensor, labels: Tensor, positions: Tensor, start: int, seed: int
    ) -> Iterator[MicroBatch]:
        """Cut this process's share of a batch into micro-batches that keep the groups together.

        images uint8 [n, C, H, W] in group-major order [group, n / group]; labels, positions int64 [n], positions on the
        CPU: each sample's place in the shuffled stream, of which this batch begins at `start`.
        """
        for index, seeds in self._parts(positions, start, seed):
            on_device = index.to(images.device)
            yield MicroBatch(images=images[on_device], labels=labels[on_device.to(labels.device)], seeds=seeds)

    def cut(
        self, batch: Any, *, number: int = 0, seed: int = 0, device: torch.device | str | None = None
    ) -> Iterator[MicroBatch]:
        """Cut a batch of any structure into micro-batches, each brought to `device` when its turn comes.

        batch: images [n, ...]; a pair of images and labels; or tuples, lists and dicts of tensors [n, ...], of which
        `MicroBatch.inputs` gets the like. number: of the step, for the samples' seeds.

        Raises:
            LowVRAMError: it is something else, or has fewer samples than the phase.
        """
        batch = as_tensors(batch)
        n = count_samples(batch)
        if n < self.samples:
            raise LowVRAMError(
                f"a batch of {n} samples for phase {self.name}, which takes {self.samples}.",
                "Leave incomplete batches out: DataLoader(..., drop_last=True).",
            )
        start = number * n
        for index, seeds in self._parts(torch.arange(start, start + n), start, seed):

            def rows(tensor: Tensor, index: Tensor = index) -> Tensor:
                return tensor[index.to(tensor.device)].to(device, non_blocking=True)

            yield MicroBatch.of(tree_map_only(Tensor, rows, batch), seeds)

    def _parts(self, positions: Tensor, start: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each micro-batch its rows of the batch and their seeds, int64 [b] on the CPU."""
        mine = torch.nonzero(positions - start < self.samples).flatten()  # [m], CPU
        if not len(mine):
            return
        rows = mine.reshape(self.group, -1)  # [group, m / group]
        columns = max(1, min(len(mine), self.micro_batch or len(mine)) // self.group)
        salt = zlib.crc32(self.name.encode())
        for part in rows.split(columns, dim=1):
            index = part.reshape(-1)
            seeds = [seeded.mix(seed, salt, position) for position in positions[index].tolist()]
            yield index, torch.tensor(seeds, dtype=torch.int64)


def as_tensors(batch: Any) -> Any:
    """A batch as tuples, lists and dicts of tensors: a `MicroBatch` or another mapping becomes one of these."""
    if isinstance(batch, MicroBatch):
        return (batch.images, batch.labels) if batch.inputs is None else batch.inputs
    return dict(batch) if isinstance(batch, Mapping) else batch


def count_samples(batch: Any) -> int:
    """The samples of a batch of tensors [n, ...]; None among them is passed over.

    Raises:
        LowVRAMError: it holds something else, nothing, or tensors of different n.
    """
    remedy = "Give tensors whose first dimension is the samples, alone or in tuples, lists or dicts."
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(batch)[0] if leaf is not None]
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise LowVRAMError(f"batch{path} is a {type(leaf).__name__}, which can't be cut into samples.", remedy)
        if not leaf.dim() or not len(leaf):
            raise LowVRAMError(f"batch{path} of shape {list(leaf.shape)} holds no samples.", remedy)
        if len(leaf) != len(leaves[0][1]):
            first = f"batch{leaves[0][0]} has {len(leaves[0][1])}"
            raise LowVRAMError(f"batch{path} has {len(leaf)} samples where {first}.", remedy)
    if not leaves:
        raise LowVRAMError("the batch holds no tensor.", remedy)
    return len(leaves[0][1])
