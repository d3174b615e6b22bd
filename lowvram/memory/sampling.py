"""A trained network on a card to sample from: whole where that leaves room for its activations, else block by block."""

from contextlib import ExitStack

import torch
from torch import nn

from lowvram.memory.blocks import find_blocks
from lowvram.memory.guard import Cap
from lowvram.memory.stream import BlockStream

_SHARE = 0.75  # of the card that weights may fill; the rest is for activations and the autoencoder


def place_within(cap: Cap, stack: ExitStack, network: nn.Module, device: torch.device) -> bool:
    """Bring a network to a device in whose memory it fits; returns whether it streams from the host.

    stack: the network can be called, without gradients, until it is closed. What asks for gradients, such as low-rank
    weights inside it, is on the device throughout.

    Raises:
        LowVRAMError: it has to stream, and shows no blocks.
    """
    weights_bytes = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    room_bytes = cap.allocator_bytes if cap.allocator_bytes is not None else cap.total_bytes
    if device.type == "cpu" or weights_bytes <= _SHARE * room_bytes:
        network.to(device)
        return False
    trained = [p for p in network.parameters() if p.requires_grad]
    stack.enter_context(BlockStream(network, find_blocks(network), device, stay=trained).running())
    return True
