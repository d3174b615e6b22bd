"""Training the denoiser of a recipe beside diffusers' UNet of the same layout, as its example scripts train it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.peers import recipe_step
from benchmarks.peers.side import Missing, Peer, Step

if TYPE_CHECKING:
    from lowvram.settings import DiffusionSettings


def theirs(settings: "DiffusionSettings", device: torch.device) -> Step:
    """diffusers' UNet without a condition: the same objective, AdamW and precision, the whole batch at once."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise Missing("diffusers", error) from None
    from lowvram.memory.precision import autocast, choose
    from lowvram.noise import Schedule
    from lowvram.objectives.diffusion import diffusion_loss

    shape = settings.unet
    down = ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in shape.attention]
    torch.manual_seed(0)
    network: Any = UNet2DModel(
        sample_size=settings.latent_size,
        in_channels=settings.latent.channels,
        out_channels=settings.latent.channels,
        block_out_channels=tuple(shape.channels),
        layers_per_block=shape.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        attention_head_dim=shape.head_channels,
        norm_num_groups=shape.norm_groups,
    )
    network.to(device)
    adam = settings.optimizer
    optimizer = torch.optim.AdamW(network.parameters(), lr=adam.lr, betas=(adam.beta1, adam.beta2), fused=True)
    precision = choose(settings.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    size = settings.latent_size
    x0 = torch.randn(settings.batch, settings.latent.channels, size, size, device=device)
    seeds = torch.arange(settings.batch)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t).sample

    def run() -> None:
        with autocast(precision, device):
            loss = diffusion_loss(predict, x0, seeds, schedule=Schedule.flow(), predict="flow").mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), adam.clip_norm or 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Step(run=run, held=[network, optimizer], samples=settings.batch, details=recipe_step.counted(network))


def peer(*, small: bool) -> Peer:
    """The comparison, in the recipe's own micro-batch, which diffusers gets as its batch.

    Raises:
        Missing: recipes can't be read.
    """
    recipe = "faces64_ldm" if small else "faces256_ldm"
    batch = 4 if small else 16
    try:
        from lowvram import load_recipe
        from lowvram.settings import DiffusionSettings

        settings = load_recipe(recipe, [f"batch={batch}", "micro_batch.denoiser=null"])
    except ImportError as error:
        raise Missing("hydra-core", error) from None
    assert isinstance(settings, DiffusionSettings)
    return Peer(
        name="diffusers_unet",
        what=f"a training step of {recipe}'s UNet, batch {batch}",
        recipe=recipe,
        sides={
            "ours": lambda device: recipe_step.ours(settings, "denoiser", device),
            "diffusers": lambda device: theirs(settings, device),
        },
    )
