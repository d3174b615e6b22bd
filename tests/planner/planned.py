"""Subjects to plan for, small enough for seconds, and a count of the whole machinery at work that knows no pieces."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from small_unet import noise_phase, unet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram import load_recipe
from lowvram.memory.apply import Applied
from lowvram.memory.policy import MemoryPolicy
from lowvram.memory.recovery import Snapshot
from lowvram.memory.tracer import LiveBytes
from lowvram.phase import MicroBatch, Phase
from lowvram.planner.quick_fake import QuickFakes
from lowvram.planner.recipe import seeds, subject_of
from lowvram.planner.record import Piece
from lowvram.planner.subject import Subject, fake_card, to_fake_host
from lowvram.settings import Settings

Builder = Callable[[], Subject]

# All four phases, 16-bit layers as on a card, augmentation.
FACES = (
    "batch=16",
    "loss.path_length_every=4",
    "loss.style_mixing=0.9",
    "model.num_fp16_res=2",
    "augment.mode=ada",
    "data.builtin_count=40",
)


def faces32(*overrides: str) -> Settings:
    """faces32 with path length, R1 and augmentation, batch 16."""
    return load_recipe("faces32", [*FACES, *overrides])


def stylegan2(*overrides: str) -> Builder:
    """The subject of `faces32(...)`."""
    return subject_of(faces32(*overrides))


def subject(
    phases: list[Phase], shape: tuple[int, ...], *, dtype: torch.dtype = torch.uint8, **options: Any
) -> Subject:
    """A subject of phases that share a batch of images [n, *shape]."""

    def micro_batch(phase: Phase, n: int) -> MicroBatch:
        images = torch.empty(n, *shape, dtype=dtype)
        return MicroBatch(images=images, labels=torch.zeros(n, dtype=torch.int64), seeds=seeds(n))

    networks = {phase.name: phase.networks[0] for phase in phases}
    return Subject(phases=phases, networks=networks, micro_batch=micro_batch, **options)


def small_unet(samples: int = 16, **changes: Any) -> Builder:
    """diffusers' UNet of 0.4 M parameters with the noise objective."""

    def build() -> Subject:
        return subject([noise_phase(unet(), samples=samples, **changes)], (3, 16, 16))

    return build


class Residual(nn.Module):
    """torchvision's basic block: two convolutions with batch norms, and a shortcut that halves the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class Transformer(nn.Module):
    """Blocks as in a vision transformer: attention and an MLP, each after a layer norm, over patches of 4x4."""

    WIDTH, HEADS = 64, 4

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, self.WIDTH, 4, stride=4)
        self.blocks = nn.ModuleList(TransformerBlock(self.WIDTH, self.HEADS) for _ in range(2))
        self.head = nn.Linear(self.WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class TransformerBlock(nn.Module):
    """Attention by scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


def classifier(network: Callable[[], nn.Module], samples: int = 16) -> Builder:
    """A network that tells ten classes of images of 32x32 apart, by AdamW."""

    def build() -> Subject:
        made = network()

        def loss(micro: MicroBatch) -> Tensor:
            return F.cross_entropy(made(micro.images.float() / 255), micro.labels)

        adamw = torch.optim.AdamW(made.parameters(), lr=1e-3)
        phase = Phase(name="classify", networks=(made,), optimizer=adamw, loss=loss, samples=samples)
        return subject([phase], (3, 32, 32))

    return build


def resnet() -> nn.Module:
    """Two residual blocks of a torchvision ResNet, with its stem and head."""
    stem = nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(stem, nn.MaxPool2d(3, 2, 1), Residual(16, 32), Residual(32, 64), head)


# The whole machinery, counted.


class _Quick(TorchDispatchMode):
    """Fake operations by the short way, which test_pieces proves to be the same; reading a number gives zero."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._quick = QuickFakes(fakes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.is_nonzero.default and isinstance(args[0], FakeTensor):
            return False
        return self._quick(func, args, kwargs or {})


def peaks(build: Builder, policy: MemoryPolicy, *, steps: int = 2) -> Mapping[str, int]:
    """Peak of live bytes by phase, "average" and "sampling" too, over steps that run as the trainer runs them.

    No pieces, no recordings, no compositions: `Applied` under this very policy, counted by `tracer.LiveBytes`.
    """
    found: dict[str, int] = {}
    collects = gc.isenabled()
    gc.disable()
    try:
        with fake_card() as fakes, _Quick(fakes), LiveBytes() as memory:
            made = build()
            for name, run in _parts(made, policy, memory, steps):
                gc.collect()
                memory.reset_peak()
                run()
                found[name] = max(found.get(name, 0), memory.peak_bytes)
            made.restore()
    finally:
        if collects:
            gc.enable()
    return found


def _parts(
    made: Subject, policy: MemoryPolicy, memory: LiveBytes, steps: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    if policy.ema == "host":
        for average in made.averages:
            to_fake_host(average.target)
    applied = Applied(
        policy,
        made.phases,
        device=torch.device("cpu"),
        averages=made.averages,
        own_precision=made.own_precision,
        zero_nonfinite=made.zero_nonfinite,
        blocks=made.blocks,
    )
    memory.watch(*made.networks.values(), list(made.resident))
    batch = torch.empty(made.batch_bytes, dtype=torch.uint8)
    snapshot = Snapshot(made.networks.values(), torch.device("cpu"))

    def run(phase: Phase) -> None:
        snapshot.take()
        size = min(phase.micro_batch or phase.samples, phase.samples)
        micro_batches = (made.micro_batch(phase, size) for _ in range(phase.samples // size))
        with applied.running(phase):
            loss, _ = applied.accumulate(phase, micro_batches)
        applied.update(phase, loss)

    def end_step() -> None:
        applied.settle()
        for average in made.averages:
            average.update(100_000, len(batch))

    for _ in range(steps):
        for phase in made.phases:
            yield phase.name, lambda phase=phase: run(phase)
        if made.averages:
            yield "average", end_step
    if made.sample is not None and made.sampling_slice is not None and policy.ema == "device":
        first = made.phases[0]
        slice_ = made.sampling_slice(min(first.micro_batch or first.samples, first.samples))
        yield "sampling", lambda: made.sample(slice_)


# Against the CPU's allocator.


def as_on_a_cpu() -> ExitStack:
    """A CPU's memory formats and random numbers in a trace as well; random states, which are the host's, left out."""
    stack = ExitStack()
    stack.enter_context(mock.patch("lowvram.standin.cuda", nullcontext))
    stack.enter_context(mock.patch("torch.get_rng_state", lambda: torch.empty(0)))
    stack.enter_context(mock.patch("torch.set_rng_state", lambda state: None))
    return stack


def unrounded_peak(piece: Piece) -> int:
    """The peak of a piece, sizes not rounded."""
    storages = np.where(piece.order >= 0, piece.order, ~piece.order)
    return int(np.cumsum(np.where(piece.order >= 0, 1, -1) * piece.sizes[storages]).max())
