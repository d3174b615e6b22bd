"""The UNet against diffusers: the published networks by key and shape, small ones by their outputs and gradients."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.memory.checkpointing import recomputing
from lowvram.models.unet import UNet
from lowvram.models.unet_layers import ResnetBlock, SpatialTransformer, TransformerBlock, sinusoids

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
}
SDXL: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}

PUBLISHED = {"SD 1.5": SD15, "SD 2": SD2, "SDXL": SDXL}

# The same layouts, narrow.
SMALL = {"norm_num_groups": 2, "cross_attention_dim": 12}
SMALL_SD15 = SD15 | SMALL | {"block_out_channels": (8, 12, 16, 16), "attention_head_dim": 2}
SMALL_SD2 = SD2 | SMALL | {"block_out_channels": (4, 8, 16, 16), "attention_head_dim": [1, 2, 4, 4]}
SMALL_SDXL = SDXL | {
    "block_out_channels": (4, 8, 16),
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    **SMALL,
}
SMALL_CLASSES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 1,
    "num_class_embeds": 5,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
VARIANTS = {
    "heads of a width for each level": {
        **SMALL_CLASSES,
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": (4, 16),
        "cross_attention_dim": 12,
    },
    "no middle, sines first, other eps, layers for each level": {
        **SMALL_SD15,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "layers_per_block": (1, 2),
        "in_channels": 9,
    },
}


def published(reference: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """A network of diffusers in which every parameter counts: norms and biases are random too."""
    torch.manual_seed(0)
    network = reference(**settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


@cache
def weightless(name: str) -> UNet:
    """Ours by a published configuration, without storage."""
    with torch.device("meta"):
        return UNet.from_config(PUBLISHED[name])


def ours(network: nn.Module) -> UNet:
    """The like of ours, from its configuration as it is in a file, with its weights."""
    unet = UNet.from_config(json.loads(network.to_json_string()))
    unet.load_state_dict(network.state_dict())
    return unet


def conditions(unet: UNet, batch: int) -> dict[str, Tensor]:
    """Something for each input that the network has."""
    torch.manual_seed(2)
    given: dict[str, Tensor] = {}
    if unet.class_embedding is not None:
        given["labels"] = torch.arange(batch) % unet.class_embedding.num_embeddings
    if unet.reads_context:
        given["context"] = torch.randn(batch, 7, unet.cross_attention_dim, requires_grad=True)
    if unet.add_embedding is not None:
        given["pooled"] = torch.randn(batch, 10)
        given["size_ids"] = torch.tensor([[512.0, 384, 0, 16, 1024, 1024]]).repeat(batch, 1)
    return given


def their_names(network: nn.Module, given: dict[str, Tensor]) -> dict[str, Any]:
    names: dict[str, Any] = {"class_labels": given.get("labels")}
    if isinstance(network, UNet2DConditionModel):
        names["encoder_hidden_states"] = given.get("context")
    if "pooled" in given:
        names["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}
    return names


def gradients(network: nn.Module, out: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Of a fixed random projection of the output, by parameter, and by number for inputs."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    named = dict(network.named_parameters()) | {str(i): x for i, x in enumerate(inputs)}
    return dict(zip(named, torch.autograd.grad((out * weights).sum(), named.values()), strict=True))


def small_unet(**changes: Any) -> UNet:
    """Ours, with random weights where a new one has zeros."""
    torch.manual_seed(0)
    unet = UNet(
        **{
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "layers_per_block": 1,
            **changes,
        }
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return unet


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [("SD 1.5", 859_520_964, 686), ("SD 2", 865_910_724, 686), ("SDXL", 2_567_463_684, 1680)],
)
def test_published_networks_by_key_and_shape(name, parameters, tensors):
    unet = weightless(name)
    with torch.device("meta"):
        network = UNet2DConditionModel(**PUBLISHED[name])
    expected = {name: value.shape for name, value in network.state_dict().items()}
    assert {name: value.shape for name, value in unet.state_dict().items()} == expected
    assert len(expected) == tensors
    assert sum(p.numel() for p in unet.parameters()) == parameters


@pytest.mark.parametrize(
    "reference, settings, size",
    [
        (UNet2DConditionModel, SMALL_SD15, (24, 40)),
        (UNet2DConditionModel, SMALL_SD2, (8, 16)),
        (UNet2DConditionModel, SMALL_SDXL, (12, 20)),
        (UNet2DModel, SMALL_CLASSES, (6, 10)),
        (UNet2DModel, SMALL_CLASSES | {"add_attention": False, "attention_head_dim": None}, (6, 10)),
        *((UNet2DConditionModel, settings, (6, 10)) for settings in VARIANTS.values()),
    ],
    ids=["SD 1.5, odd sizes", "SD 2", "SDXL", "classes", "classes, one head", *VARIANTS],
)
def test_outputs_and_gradients_equal_those_of_diffusers(reference, settings, size):
    network = published(reference, settings)
    unet = ours(network)
    x = torch.randn(2, settings.get("in_channels", 4), *size, requires_grad=True)
    time = torch.tensor([3.0, 871.5])
    given = conditions(unet, 2)
    theirs = network(x, time, **their_names(network, given)).sample
    out = unet(x, time, **given)
    torch.testing.assert_close(out, theirs, atol=1e-4, rtol=1e-4)
    inputs = (x, given["context"]) if "context" in given else (x,)
    expected = gradients(network, theirs, *inputs)
    # Each parameter has been compared; the bias of the keys alone changes nothing, as it adds the same to all scores.
    assert min(value.abs().max() for name, value in expected.items() if "to_k.bias" not in name) > 1e-3
    torch.testing.assert_close(gradients(unet, out, *inputs), expected, atol=1e-4, rtol=1e-4)


def test_masked_tokens_are_not_read():
    network = published(UNet2DConditionModel, SMALL_SD2)
    unet = ours(network)
    x, time = torch.randn(2, 4, 8, 8), torch.tensor(250.0)
    context = torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    with torch.no_grad():
        out = unet(x, time, context=context, context_mask=mask)
        theirs = network(x, time, context, encoder_attention_mask=mask).sample
        short = unet(x[:1], time, context=context[:1, :3])
    torch.testing.assert_close(out, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:1], short, atol=1e-5, rtol=1e-4)


def test_a_new_network_predicts_nothing_and_can_learn():
    torch.manual_seed(0)
    unet = UNet(block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=12, layers_per_block=1)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    x, time, context = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 600.0]), torch.randn(2, 3, 12)
    target = torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(15):
        out = unet(x, time, context=context)
        losses.append(F.mse_loss(out, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(losses[0], target.square().mean())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad.abs().max() > 0 for parameter in unet.parameters())


@pytest.mark.parametrize("name", ["time", "labels", "context", "pooled", "size_ids"])
def test_every_condition_changes_the_sample_that_it_is_for(name):
    unet = small_unet(
        num_class_embeds=5,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=46,
    )
    x = torch.randn(2, 4, 8, 8)
    given = {"time": torch.tensor([10.0, 700.0]), **conditions(unet, 2)}
    changed = {key: value.clone().detach() for key, value in given.items()}
    changed[name][1] += 1
    with torch.no_grad():
        before, after = unet(x, **given), unet(x, **changed)
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-4


def test_blocks_of_sd15_are_resnets_transformers_and_samplers_in_the_order_they_run():
    blocks = find_blocks(weightless("SD 1.5"))
    assert list(blocks)[:5] == [
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0",
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.1",
        "down_blocks.0.downsamplers.0",
    ]
    assert list(blocks)[-2:] == ["up_blocks.3.resnets.2", "up_blocks.3.attentions.2"]
    kinds = [type(block) for block in blocks.values()]
    assert (kinds.count(ResnetBlock), kinds.count(SpatialTransformer), len(kinds)) == (22, 16, 44)


def test_no_block_of_sdxl_is_large():
    blocks = find_blocks(weightless("SDXL"))
    sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks.items()}
    assert sum(isinstance(block, TransformerBlock) for block in blocks.values()) == 70
    assert max(sizes.values()) < 0.03 * 2_567_463_684
    assert sum(sizes.values()) > 0.98 * 2_567_463_684


@pytest.mark.parametrize("settings", [SMALL_SD15, SMALL_SDXL, SMALL_CLASSES | {"cross_attention_dim": None}])
def test_blocks_run_once_in_their_order_and_can_be_recomputed(settings):
    torch.manual_seed(0)
    unet = UNet(**{key: value for key, value in settings.items() if key not in ("sample_size", "upcast_attention")})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    x, time, given = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 700.0]), conditions(unet, 2)
    blocks, ran = find_blocks(unet), []
    hooks = [block.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, block in blocks.items()]
    out = unet(x, time, **given)
    assert ran == list(blocks)
    for hook in hooks:
        hook.remove()
    expected = gradients(unet, out)
    with recomputing(list(blocks.values())):
        again = unet(x, time, **given)
        recomputed = gradients(unet, again)
    torch.testing.assert_close(again, out, atol=0, rtol=0)
    torch.testing.assert_close(recomputed, expected, atol=0, rtol=0)


def kept_bytes(unet: UNet, size: int, *, recompute: bool) -> int:
    """Bytes that the forward keeps for the backward, parameters not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    blocks = list(unet.blocks().values()) if recompute else []
    given = conditions(unet, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recomputing(blocks):
        out = unet(torch.randn(1, 4, size, size), torch.tensor([10.0]), **given)
        del out
    return sum(kept.values())


def test_recomputed_blocks_keep_little():
    unet = small_unet(block_out_channels=(32, 64), attention_head_dim=4)
    assert kept_bytes(unet, 16, recompute=True) < 0.2 * kept_bytes(unet, 16, recompute=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_narrow_activations_are_computed_in_fp32(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 8, 8) * 30 + 600).to(dtype)  # sums of squares overflow fp16, and drown in bf16's 8 bits
    block = ResnetBlock(16, 16, 8, groups=2, eps=1e-5)
    wide = block.norm1(x.float())
    torch.testing.assert_close(block.to(dtype).norm1(x).float(), wide, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bf16_is_close_to_fp32_and_keeps_the_dtype_of_x(autocast):
    unet = small_unet()
    x, time, given = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 500.5]), conditions(unet, 2)
    wide = unet(x, time, **given)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = unet(x, time, **given)
    else:
        narrow = unet.to(torch.bfloat16)(x, time, **given)
    assert narrow.dtype == torch.float32
    assert (narrow - wide).square().mean() < 4e-4 * wide.square().mean()
    if not autocast:
        assert unet(x.bfloat16(), time, **given).dtype == torch.bfloat16


def test_sinusoids_of_an_odd_width_end_in_zero():
    waves = sinusoids(torch.tensor([0.0, 2.0]), 5)
    expected = [torch.tensor(2.0).cos(), torch.tensor(0.02).cos(), torch.tensor(2.0).sin(), torch.tensor(0.02).sin()]
    torch.testing.assert_close(waves, torch.stack([torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([*expected, 0.0])]))


def test_without_context_there_is_attention_over_pixels_and_no_more_to_say():
    unet = small_unet(cross_attention_dim=None)
    assert not any(isinstance(module, SpatialTransformer) for module in unet.modules())
    assert "mid_block.attentions.0.group_norm.weight" in unet.state_dict()
    assert unet(torch.randn(1, 4, 6, 6), torch.tensor(5.0)).shape == (1, 4, 6, 6)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"dropout": 0.1}, "dropout"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"only_cross_attention": [True, True, True, False]}, "only_cross_attention"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}, "down_block_types"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"transformer_layers_per_block": [1, [2, 2], 4, 4]}, "transformer_layers_per_block"),
        ({"cross_attention_dim": [768, 1024, 768, 768]}, "cross_attention_dim"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"a_new_setting": 3}, "a_new_setting"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
    ],
)
def test_configurations_of_other_networks_are_refused(change, named):
    with pytest.raises(LowVRAMError, match=named):
        UNet.from_config(SMALL_SD15 | change)


def test_harmless_settings_are_ignored():
    harmless = {"_diffusers_version": "0.6.0", "_name_or_path": "x", "only_cross_attention": [False] * 4, "new": None}
    unet = UNet.from_config(SMALL_SD15 | harmless | {"cross_attention_dim": [12] * 4})
    assert unet.cross_attention_dim == 12


def test_what_a_configuration_leaves_out_is_as_in_diffusers():
    narrow = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 2}
    for reference in (UNet2DConditionModel, UNet2DModel):
        settings = {"_class_name": reference.__name__, **narrow}
        expected = {name: value.shape for name, value in reference.from_config(settings).state_dict().items()}
        assert {name: value.shape for name, value in UNet.from_config(settings).state_dict().items()} == expected


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"block_out_channels": (16, 30)}, "norm_num_groups"),
        ({"attention_head_dim": 5}, "attention_head_dim"),
        ({"attention_head_dim": (2, 2, 2)}, "attention_head_dim"),
        ({"attention_head_dim": None}, "attention_head_dim"),
        ({"layers_per_block": 0}, "layers_per_block"),
        (
            {"cross_attention_dim": None, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
            "nothing to attend",
        ),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, named):
    with pytest.raises(LowVRAMError, match=named):
        small_unet(**settings)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"x": torch.zeros(2, 4, 7, 8)}, "multiples of 2"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "x has shape"),
        ({"time": torch.zeros(3)}, "time has 3 values"),
        ({"context": None}, "needs context"),
        ({"context": torch.zeros(2, 7, 13)}, "context has shape"),
        ({"context": torch.zeros(1, 7, 12)}, "context has shape"),
        ({"context_mask": torch.ones(2, 6, dtype=torch.bool)}, "context_mask has shape"),
        ({"labels": None}, "needs labels"),
        ({"labels": torch.zeros(2, 1, dtype=torch.int64)}, "labels has shape"),
        ({"pooled": None}, "needs pooled"),
        ({"size_ids": torch.zeros(2, 5)}, "projection_class_embeddings_input_dim"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, named):
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 6}
    unet = small_unet(num_class_embeds=5, projection_class_embeddings_input_dim=46, **added)
    given = {"x": torch.zeros(2, 4, 8, 8), "time": torch.zeros(2), **conditions(unet, 2)}
    unet(**given)
    with pytest.raises(LowVRAMError, match=named):
        unet(**given | change)


@pytest.mark.parametrize("name", ["labels", "context", "context_mask", "pooled", "size_ids"])
def test_conditions_that_the_network_has_no_use_for_are_refused(name):
    unet = small_unet(cross_attention_dim=None)
    with pytest.raises(LowVRAMError, match=f"no use for {name}:"):
        unet(torch.zeros(2, 4, 8, 8), torch.zeros(2), **{name: torch.zeros(2, 6)})
