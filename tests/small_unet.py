"""A small UNet of diffusers, trained to predict noise: plain modules and a phase, as a researcher would bring them."""

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import seeded
from lowvram.memory.apply import Applied, apply
from lowvram.memory.policy import MemoryPolicy
from lowvram.phase import MicroBatch, Phase

BATCH, SIZE = 4, 16


def unet(seed: int = 0) -> UNet2DModel:
    """0.4 M parameters: residual blocks, attention at the lowest resolution, skips between down and up."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )


def noise_phase(network: nn.Module, **changes: object) -> Phase:
    """The eps objective of DDPM (arXiv 2006.11239, equation 14), one phase named "denoise"."""

    def loss(micro: MicroBatch) -> Tensor:
        images = micro.images.float() / 127.5 - 1
        noise = seeded.randn(micro.seeds, *images.shape[1:], stream="noise")
        t = seeded.rand(micro.seeds, stream="t")  # [b] in [0, 1)
        alpha = torch.cos(t * torch.pi / 2)[:, None, None, None]
        noisy = alpha * images + (1 - alpha**2).sqrt() * noise
        dtype = next(network.parameters()).dtype
        predicted = network(noisy.to(dtype), (t * 1000).to(dtype)).sample
        return F.mse_loss(predicted.float(), noise)

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.01)
    settings = {"name": "denoise", "networks": (network,), "optimizer": optimizer, "loss": loss, "samples": BATCH}
    return Phase(**{**settings, **changes})


def pictures(steps: int) -> Tensor:
    """uint8 [steps, BATCH, 3, SIZE, SIZE]: soft blobs, different at every step."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(steps * BATCH, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    return (smooth * 255).to(torch.uint8).unflatten(0, (steps, BATCH))


def train(
    policy: MemoryPolicy, *, steps: int = 10, network: nn.Module | None = None, **changes: object
) -> tuple[Applied, list[float]]:
    """Train the UNet under a policy; returns what applied it, settled, and the losses."""
    phase = noise_phase(unet() if network is None else network, **changes)
    applied = apply(policy, [phase], device="cpu", seed=3)
    losses = [step(applied, phase, images, index) for index, images in enumerate(pictures(steps))]
    applied.settle()
    return applied, losses


def step(applied: Applied, phase: Phase, images: Tensor, index: int) -> float:
    """One step: gradients of all micro-batches, then the update."""
    positions = torch.arange(BATCH) + index * BATCH
    labels = torch.full((BATCH,), -1)
    with applied.running(phase):
        micro_batches = phase.micro_batches(images, labels, positions, index * BATCH, 0)
        loss, _ = applied.accumulate(phase, micro_batches)
    return applied.update(phase, loss).loss
