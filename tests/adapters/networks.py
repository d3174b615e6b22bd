"""Small networks with weights unlike one another, for adapters to sit in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.models.unet import UNet

Run = Callable[[nn.Module], Tensor]


def small_unet(dtype: torch.dtype = torch.float32, **settings: Any) -> UNet:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    unet = UNet(**(options | settings))
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(dtype)  # Module.to fails on fake tensors
    return unet


def unet_inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    return latents, torch.tensor([3.0, 700.0]), torch.randn(2, 5, 16, generator=draw)


def run(unet: nn.Module) -> Tensor:
    x, time, context = unet_inputs()
    out: Tensor = unet(x, time, context=context)
    return out


@torch.no_grad()
def stir(module: nn.Module, seed: int = 2, std: float = 0.1) -> None:
    """Change all parameters of adapters: they do nothing to begin with."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(std * torch.randn(parameter.shape, generator=draw))


def states_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}
