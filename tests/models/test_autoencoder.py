import copy
import logging
import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.models import autoencoder
from lowvram.models.autoencoder import Autoencoder, decode_safely, sample_latents
from lowvram.models.autoencoder_layers import GroupNorm
from lowvram.models.tiling import decode_tiled, encode_tiled

TINY: dict[str, Any] = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}


def tiny(seed: int = 0, **changes: Any) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(**TINY | changes)


def reference(seed: int = 0, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    config = TINY | changes
    stages = len(config["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * stages, ("UpDecoderBlock2D",) * stages
    return AutoencoderKL(down_block_types=down, up_block_types=up, **config)


def images_of(batch: int = 2, height: int = 32, width: int = 24) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents_of(batch: int = 2, height: int = 8, width: int = 6, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(2))


# --- The network is that of published folders ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06},
        {"mid_block_add_attention": False, "layers_per_block": 2},
        {"block_out_channels": (12,), "norm_num_groups": 3},
    ],
)
def test_outputs_and_gradients_are_those_of_diffusers(changes: dict[str, Any]) -> None:
    theirs = reference(**changes)
    ours = Autoencoder.from_config(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    images = images_of()
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    noise = torch.randn(2, ours.latent_channels, 32 // ours.factor, 24 // ours.factor)

    made, moments = ours(inputs[0], noise)
    posterior = theirs.encode(inputs[1]).latent_dist
    wanted = theirs.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(moments, posterior.parameters, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)

    weights = torch.randn(made.shape)
    (made * weights).mean().backward()
    (wanted * weights).mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-6)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_published_layout_by_key_and_shape() -> None:
    with torch.device("meta"):
        ours = Autoencoder().state_dict()
        theirs = reference(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert sum(v.numel() for v in ours.values()) == 83_653_863


def test_configs_go_out_and_back_and_into_diffusers() -> None:
    ours = tiny(scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, latent_channels=6)
    config = ours.to_config()
    back = Autoencoder.from_config(config)
    assert back.to_config() == config
    theirs = AutoencoderKL.from_config(config)
    assert theirs.config.shift_factor == 0.1
    assert list(theirs.state_dict()) and set(theirs.state_dict()) == set(ours.state_dict())


def test_what_a_folder_leaves_out_has_the_formats_value() -> None:
    theirs = AutoencoderKL()
    ours = Autoencoder.from_config({"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "sample_size": 512})
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("act_fn", "relu"),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("latents_mean", [0.1]),
        ("out_channels", 4),
        ("_class_name", "AutoencoderTiny"),
        ("temporal_compression", 4),
    ],
)
def test_a_config_of_another_network_is_refused(setting: str, value: Any) -> None:
    config = {"block_out_channels": [32, 32], "in_channels": 3, setting: value}
    with pytest.raises(LowVRAMError, match=setting):
        Autoencoder.from_config(config)


def test_attention_under_its_old_names_loads() -> None:
    """Folders of 2022 have query, key, value and proj_attn; from some single files these are 1x1 convolutions."""
    ours, other = tiny(0), tiny(1)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in ours.state_dict().items():
        for new, name in old.items():
            if f".{new}." in key:
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 and key.startswith("encoder") else tensor
                key = key.replace(new, name)
        state[key] = tensor
    assert set(state) != set(ours.state_dict())
    other.load_state_dict(state)
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


# --- Latents ---


def test_latents_are_scaled_and_come_back() -> None:
    model = tiny(scaling_factor=0.3, shift_factor=0.2)
    moments = torch.cat([latents_of(), latents_of() * 0.5 - 1], dim=1)
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape)
    z = model.to_latents(moments, noise)
    torch.testing.assert_close(z, (mean + (log_variance / 2).exp() * noise - 0.2) * 0.3)
    torch.testing.assert_close(model.unscale(model.to_latents(moments)), mean)
    torch.testing.assert_close(model.decode(model.unscale(model.to_latents(moments))), model.decode(mean))
    assert model.to_latents(moments.half()).dtype == torch.float32


def test_the_log_variance_is_bounded() -> None:
    model = tiny()
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e4)  # type: ignore[union-attr]
    mean, log_variance = model.encode(images_of()).chunk(2, dim=1)
    assert (log_variance.min().item(), log_variance.max().item()) == (-30, 20)
    assert mean.abs().max() > 30
    assert sample_latents(torch.cat([mean, log_variance], 1), torch.ones_like(mean)).isfinite().all()


def test_an_image_does_not_depend_on_the_batch_around_it() -> None:
    model, images, noise = tiny(), images_of(3), latents_of(3)
    with torch.no_grad():
        whole, _ = model(images, noise)
        alone, _ = model(images[1:2], noise[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_and_autocast(dtype: torch.dtype) -> None:
    model, images, noise = tiny(), images_of(), latents_of()
    exact, _ = model(images, noise)
    with torch.autocast("cpu", dtype=dtype):
        cast, moments = model(images, noise)
        assert GroupNorm(2, 8)(torch.ones(1, 8, 4, 4, dtype=dtype)).dtype == dtype
    assert cast.dtype == moments.dtype == dtype
    narrow, _ = copy.deepcopy(model).to(dtype)(images, noise)  # fp32 images are taken too
    assert narrow.dtype == dtype
    for made in (cast, narrow):
        assert (made.float() - exact).abs().mean() < 0.02 * exact.abs().mean() * (8 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize(
    "images",
    [
        images_of().to(torch.uint8),
        images_of()[:, :1],
        images_of()[0],
        images_of(height=30),
        images_of(width=25),
        images_of(0),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor) -> None:
    with pytest.raises(LowVRAMError, match="images"):
        tiny().encode(images)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LowVRAMError, match=r"block_out_channels=\[8, 10\] with norm_num_groups=4"):
        Autoencoder(block_out_channels=(8, 10), norm_num_groups=4)
    with pytest.raises(LowVRAMError, match="scaling_factor=0"):
        tiny(scaling_factor=0)


# --- Blocks ---


@pytest.mark.parametrize("attention", [True, False])
def test_blocks_run_once_in_the_order_they_are_named_and_hold_nearly_all_weights(attention: bool) -> None:
    model = tiny(mid_block_add_attention=attention, layers_per_block=2)
    blocks = find_blocks(model)
    ran: list[str] = []
    for name, block in blocks.items():
        assert model.get_submodule(name) is block
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(images_of())
    assert ran == list(blocks)
    inside = sum(p.numel() for block in blocks.values() for p in block.parameters())
    assert inside > 0.8 * sum(p.numel() for p in model.parameters())
    assert ("decoder.mid_block.attentions.0" in blocks) == attention
    assert {"encoder.down_blocks.0.downsamplers.0", "decoder.up_blocks.1.upsamplers.0"} <= set(blocks)


# --- Tiles ---


class Local:
    """A codec in which nothing reaches beyond a latent pixel, so that tiles change nothing."""

    def __init__(self, factor: int = 4) -> None:
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


class Centred(Local):
    """A codec in which each latent pixel counts everywhere, as in a group norm."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents - latents.mean())


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    tile=st.integers(2, 24),
    overlap=st.floats(0, 0.75),
    factor=st.sampled_from([1, 2, 4]),
)
def test_weights_of_the_tiles_add_up_to_one(height: int, width: int, tile: int, overlap: float, factor: int) -> None:
    codec = Local(factor)
    latents = latents_of(1, height, width, 2)
    images = codec.decode(latents)
    options = {"tile_pixels": tile * factor, "overlap": overlap}
    torch.testing.assert_close(decode_tiled(codec, latents, **options), images)
    torch.testing.assert_close(encode_tiled(codec, images, **options), latents)


def test_what_fits_one_tile_is_not_cut() -> None:
    model = tiny()
    with torch.no_grad():
        assert torch.equal(encode_tiled(model, images_of(), tile_pixels=32), model.encode(images_of()))
        assert torch.equal(decode_tiled(model, latents_of(), tile_pixels=32), model.decode(latents_of()))
        assert not torch.equal(decode_tiled(model, latents_of(), tile_pixels=16), model.decode(latents_of()))


def test_no_seam_shows_where_tiles_differ() -> None:
    """A slope whose tiles are each centred: without overlap it jumps at borders, with it the jump is spread out."""
    latents = torch.linspace(0, 1, 64).expand(1, 1, 16, 64)
    jumps = [
        decode_tiled(Centred(), latents, tile_pixels=64, overlap=overlap).diff(dim=3).abs().max().item()
        for overlap in (0.0, 0.25)
    ]
    step = 1 / 63
    assert jumps[0] > 14 * step  # 16 latent pixels from one tile's centre to the next
    assert jumps[1] < 2 * step


def test_tiles_of_a_network_differ_from_the_whole_in_their_surroundings_alone() -> None:
    """With attention and norms over a tile the numbers differ; they stay as close as tiles of this size can be."""
    model = tiny().eval()
    latents = F.interpolate(latents_of(1, 4, 4), size=(24, 24), mode="bicubic")
    with torch.no_grad():
        whole = model.decode(latents)
        apart = [
            (decode_tiled(model, latents, tile_pixels=tile, overlap=0.5) - whole).abs().mean().item()
            for tile in (88, 32)
        ]
        moments = encode_tiled(model, whole, tile_pixels=64)
    assert apart[0] < 0.5 * whole.std()
    assert apart[0] < apart[1]
    assert moments.shape == (1, 8, 24, 24)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that anything computed."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_activations_grow_with_the_tile_and_not_with_the_image(direction: str) -> None:
    model = tiny(block_out_channels=(16, 16, 32))

    def largest(side: int, *, tiled: bool) -> int:
        with torch.no_grad(), LargestTensor() as seen:
            if direction == "encode":
                x = images_of(1, side, side)
                encode_tiled(model, x, tile_pixels=32) if tiled else model.encode(x)
            else:
                x = latents_of(1, side // 4, side // 4)
                decode_tiled(model, x, tile_pixels=32) if tiled else model.decode(x)
        return seen.largest

    assert largest(64, tiled=True) == largest(32, tiled=False)
    assert largest(64, tiled=False) > 3.8 * largest(32, tiled=False)  # a down-sampler's padding is one row


@pytest.mark.parametrize("options", [{"tile_pixels": 30}, {"tile_pixels": 4}, {"overlap": 1.0}, {"overlap": math.nan}])
def test_tiles_out_of_range_are_refused(options: dict[str, Any]) -> None:
    for function, x in ((encode_tiled, images_of()), (decode_tiled, latents_of())):
        with pytest.raises(LowVRAMError, match=next(iter(options))):
            function(tiny(), x, **options)
    with pytest.raises(LowVRAMError, match="multiples of 4"):
        encode_tiled(tiny(), images_of(height=30), tile_pixels=16)


# --- Overflow ---


def overflowing() -> Autoencoder:
    """fp16 weights whose mid block, as in SDXL's decoder, goes beyond 65504 for some images, and comes back."""
    model = tiny()
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(1e3)
    return model.half()


def test_what_overflows_is_decoded_again_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    model = overflowing()
    before = copy.deepcopy(model.state_dict())
    latents = latents_of(3)
    latents[1] *= 300
    with torch.no_grad():
        plain = model.decode(latents)
        wide = copy.deepcopy(model).float().decode(latents)
    assert not plain[1].isfinite().all()
    assert plain[0].isfinite().all() and plain[2].isfinite().all()
    with caplog.at_level(logging.WARNING):
        images = decode_safely(model, latents)
        decode_safely(model, latents)
    assert images.dtype == torch.float32 and images.isfinite().all()
    torch.testing.assert_close(images[1], wide[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(images[[0, 2]], plain[[0, 2]].float())
    assert [r.name for r in caplog.records] == [autoencoder.__name__]
    assert "decoding overflowed in float16 for 1 of 3 images" in caplog.text
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, before[key]), key
    torch.testing.assert_close(
        decode_safely(model, latents, tile_pixels=16)[1], decode_tiled_in_fp32(model, latents)[1]
    )


def decode_tiled_in_fp32(model: Autoencoder, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return decode_tiled(copy.deepcopy(model).float(), latents, tile_pixels=16)


def test_overflow_under_autocast_is_decoded_without_it() -> None:
    model, latents = overflowing().float(), latents_of() * 300
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert not model.decode(latents).isfinite().all()
        images = decode_safely(model, latents)
    torch.testing.assert_close(images, model.decode(latents), rtol=1e-4, atol=1e-5)


def test_what_is_finite_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny().half()
    images = decode_safely(model, latents_of())
    assert images.dtype == torch.float16 and not images.requires_grad
    assert torch.equal(images, model.decode(latents_of()))
    assert not caplog.records


def test_broken_latents_and_weights_are_errors() -> None:
    latents = latents_of(3)
    latents[2, 0, 0, 0] = math.inf
    with pytest.raises(LowVRAMError, match=r"latents of samples \[2\] are not finite"):
        decode_safely(tiny(), latents)
    model = tiny()
    nn.init.constant_(model.decoder.conv_out.bias, math.nan)  # type: ignore[arg-type]
    with pytest.raises(LowVRAMError, match=r"samples \[0, 1\] are not finite even when decoded in fp32"):
        decode_safely(model, latents_of())
