"""What each technique saves, in bytes: the peak of live device memory over two steps, counted operation by operation.

The network is wide for its images, so that weights, gradients and state count as well as activations.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from small_unet import BATCH, noise_phase, pictures, step
from test_equivalence import policy
from torch import nn

from lowvram import Trainer
from lowvram.memory.apply import apply
from lowvram.memory.policy import MemoryPolicy
from lowvram.memory.tracer import LiveBytes

BLOCKS, CHANNELS = 6, 48


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, CHANNELS)
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.silu(self.first(nn.functional.silu(self.norm(x)))))


class Tower(nn.Module):
    """A stack of equal blocks, called as the UNet is."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Conv2d(3, CHANNELS, 1)
        self.body = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.end = nn.Conv2d(CHANNELS, 3, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> "Tower.Output":
        x = self.begin(x)
        for block in self.body:
            x = block(x)
        return Tower.Output(self.end(x))

    class Output:
        """What diffusers' networks return."""

        def __init__(self, sample: torch.Tensor) -> None:
            self.sample = sample


BLOCK_BYTES = 4 * sum(p.numel() for p in Block().parameters())
WEIGHT_BYTES = 4 * sum(p.numel() for p in Tower().parameters())
IN_BLOCKS_BYTES = BLOCKS * BLOCK_BYTES
ACTIVATION_BYTES = 4 * BATCH * CHANNELS * 16 * 16  # one map of a block
SLACK_BYTES = 96 * 1024  # biases, norms, what is rounded up


@cache
def peak_bytes(chosen: MemoryPolicy, *, beta1: float = 0.9, clip_norm: float | None = None) -> int:
    """Peak of the second step."""
    torch.manual_seed(0)
    with LiveBytes() as memory:
        network = Tower()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(beta1, 0.99))
        phase = noise_phase(network, optimizer=optimizer, clip_norm=clip_norm)
        applied = apply(chosen, [phase], device="cpu")
        images = pictures(2)
        step(applied, phase, images[0], 0)
        applied.settle()
        memory.reset_peak()
        step(applied, phase, images[1], 1)
        return memory.peak_bytes


PLAIN = policy()


def test_the_plain_step_is_weights_gradients_two_moments_and_activations() -> None:
    persistent = 4 * WEIGHT_BYTES
    assert persistent + 3 * BLOCKS * ACTIVATION_BYTES < peak_bytes(PLAIN) + 2 * BLOCK_BYTES
    assert peak_bytes(PLAIN) < persistent + 8 * BLOCKS * ACTIVATION_BYTES


# name: (policy, base policy, bytes that must be saved)
CLAIMS = {
    # A block keeps its input, the norm's and both activations' inputs and results: five maps; recomputed: its input.
    "recompute": (policy(phase={"activations": "recompute"}), PLAIN, 3 * BLOCKS * ACTIVATION_BYTES),
    "recompute every second": (
        policy(phase={"activations": "recompute", "recompute_every": 2}),
        PLAIN,
        1 * BLOCKS * ACTIVATION_BYTES,
    ),
    "offload": (policy(phase={"activations": "offload"}), PLAIN, 3 * BLOCKS * ACTIVATION_BYTES),
    "micro-batch of one": (policy(phase={"micro_batch": 1}), PLAIN, 2 * BLOCKS * ACTIVATION_BYTES),
    # Gradients leave the device as they are made. (Beside all activations that does not show: the backward begins
    # with none. So their base offloads activations.)
    "deferred": (
        policy(update="deferred", phase={"activations": "offload"}),
        policy(phase={"activations": "offload"}),
        WEIGHT_BYTES // 2,
    ),
    "deferred, micro-batches": (
        policy(update="deferred", phase={"micro_batch": 1}),
        policy(phase={"micro_batch": 1}),
        WEIGHT_BYTES - BLOCK_BYTES,  # where they are added up, an earlier micro-batch's comes back for one parameter
    ),
    "fused": (
        policy(update="fused", phase={"activations": "offload"}),
        policy(phase={"activations": "offload"}),
        WEIGHT_BYTES // 2,
    ),
    "state on the host": (policy(state="host"), PLAIN, 2 * (IN_BLOCKS_BYTES - BLOCK_BYTES) - SLACK_BYTES),
    # Two fp32 moments against two bytes and their scales.
    "adam8bit": (policy(kind="adam8bit"), PLAIN, int(1.4 * IN_BLOCKS_BYTES)),
    "lion8bit": (policy(kind="lion8bit"), PLAIN, int(1.6 * IN_BLOCKS_BYTES)),
    "adafactor": (policy(kind="adafactor"), PLAIN, int(1.6 * IN_BLOCKS_BYTES)),
    "bf16 weights": (policy(weights_dtype="bf16"), PLAIN, int(0.8 * WEIGHT_BYTES)),
    "bf16 autocast": (MemoryPolicy(precision="bf16"), PLAIN, BLOCKS * ACTIVATION_BYTES),
    # Of weights, gradients and moments two blocks' weights and one block's rest remain; the base had its last
    # blocks' gradients only.
    "streamed": (
        policy(weights="stream", update="deferred", phase={"activations": "recompute"}),
        policy(phase={"activations": "recompute"}),
        4 * IN_BLOCKS_BYTES - 8 * BLOCK_BYTES - SLACK_BYTES,
    ),
}


@pytest.mark.parametrize("technique", CLAIMS)
def test_it_saves_what_it_claims(technique: str) -> None:
    chosen, base, saved_bytes = CLAIMS[technique]
    assert peak_bytes(base) - peak_bytes(chosen) >= saved_bytes


def test_without_a_first_moment_a_quarter_of_the_state_is_gone() -> None:
    assert peak_bytes(PLAIN) - peak_bytes(PLAIN, beta1=0.0) >= WEIGHT_BYTES - SLACK_BYTES


def test_clipping_takes_no_copy_of_the_gradients() -> None:
    assert peak_bytes(PLAIN, clip_norm=1e-3) <= peak_bytes(PLAIN) + SLACK_BYTES


def test_streamed_weights_and_narrow_state_stay_under_two_blocks() -> None:
    chosen = policy(weights="stream", update="fused", weights_dtype="bf16", kind="adam8bit")
    two_blocks = 2 * BLOCK_BYTES // 2
    largest = 4 * CHANNELS * CHANNELS * 9  # one convolution in fp32: weights, gradient, moments and their rounding
    random_bits = 24 << 14  # PyTorch makes them for so many elements at a time
    maps = (BLOCKS + 7) * ACTIVATION_BYTES // 2
    assert peak_bytes(chosen) <= two_blocks + 8 * largest + random_bits + maps + SLACK_BYTES


@pytest.mark.parametrize("ema", ["device", "host"])
def test_sampling_and_saving_stay_under_the_training_peak(tiny: Callable[..., object], ema: str) -> None:
    with LiveBytes() as memory:
        trainer = Trainer(tiny(f"memory.ema={ema}", "grid=16"), quiet=True)
        batches = trainer.loader.iterate(0)
        for _ in range(2):
            trainer.train_step(next(batches))
        training = memory.peak_bytes
        memory.reset_peak()
        trainer.run.prepare()
        trainer.save()
        trainer.sample(16)
        assert memory.peak_bytes < training
