"""Blocks are residual and transformer blocks, never stages and never bare layers."""

import pytest
import torch
from torch import nn

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.models.stylegan2 import Discriminator, Generator


class Residual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.body(x)


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(depth))


class Encoder(nn.Module):
    """A stack: blocks in a list, and a norm beside them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(depth))
        self.norm = nn.LayerNorm(4)


def disjoint(blocks: dict[str, nn.Module]) -> bool:
    modules = [id(m) for block in blocks.values() for m in block.modules()]
    return len(modules) == len(set(modules))


def test_networks_of_lowvram_name_their_blocks():
    g = Generator(16, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8)
    d = Discriminator(16, channel_base=64, channel_max=8)
    assert list(find_blocks(d)) == ["b16", "b8", "b4"]
    assert find_blocks(g) == g.blocks() and disjoint(g.blocks())


def test_stages_are_looked_into():
    network = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "a": Stage(2), "b": Stage(1)})
    assert list(find_blocks(network)) == ["a.layers.0", "a.layers.1", "b.layers.0"]


def test_stacks_are_looked_into_and_single_blocks_are_not():
    network = nn.ModuleDict({"deep": Encoder(3), "shallow": Encoder(1)})
    assert list(find_blocks(network)) == ["deep.layers.0", "deep.layers.1", "deep.layers.2", "shallow"]


def test_a_sequence_of_bare_layers_is_a_block():
    network = nn.ModuleDict({"encode": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "one": Residual()})
    assert list(find_blocks(network)) == ["encode", "one"]


def test_a_block_that_is_registered_twice_counts_once():
    block = Residual()
    assert list(find_blocks(nn.ModuleList([block, block, Residual()]))) == ["0", "2"]


def test_a_list_called_blocks_is_no_method():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(), Residual()])

    assert list(find_blocks(Net())) == ["blocks.0", "blocks.1"]


def test_transformers_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8)), "head": nn.Linear(8, 2)})
    blocks = find_blocks(network)
    assert list(blocks) == ["encoder.layers.0", "encoder.layers.1"]


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])
def test_no_block_is_an_error(network):
    with pytest.raises(LowVRAMError, match="has no blocks"):
        find_blocks(network)


def test_wrongly_named_blocks_are_errors():
    class Overlapping(Residual):
        def blocks(self):
            return {"body": self.body, "body.0": self.body[0]}

    class Foreign(Residual):
        def blocks(self):
            return {"x": nn.Linear(2, 2)}

    with pytest.raises(LowVRAMError, match=r"body and body\.0 share"):
        find_blocks(Overlapping())
    with pytest.raises(LowVRAMError, match="names x"):
        find_blocks(Foreign())


def test_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    blocks = find_blocks(network)
    kinds = {type(block).__name__ for block in blocks.values()}
    assert kinds == {"TimestepEmbedding", "ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"}
    assert disjoint(blocks)
    loose = {n.rpartition(".")[0] for n, _ in network.named_parameters() if not n.startswith(tuple(blocks))}
    assert loose == {"conv_in", "conv_norm_out", "conv_out"}


@pytest.mark.parametrize("depth, kind", [(1, "Transformer2DModel"), (2, "BasicTransformerBlock")])
def test_conditional_unet_of_diffusers(depth, kind):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=8,
            transformer_layers_per_block=depth,
        )
    blocks = find_blocks(network)
    kinds = [type(block).__name__ for block in blocks.values()]
    assert set(kinds) == {"TimestepEmbedding", "ResnetBlock2D", kind, "Downsample2D", "Upsample2D"}
    assert kinds.count("ResnetBlock2D") == 8 and kinds.count(kind) == 4 * depth  # of 2 + 4 + 2; 1 + 2 + 1
    assert disjoint(blocks)
