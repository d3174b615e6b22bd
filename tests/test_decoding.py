"""Large images are decoded whole where memory suffices, and in tiles where it does not."""

import logging
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lowvram import standin
from lowvram.memory.tracer import LiveBytes
from lowvram.models.autoencoder import Autoencoder
from lowvram.planner.subject import fake_card
from lowvram.tasks import codec
from lowvram.tasks.autoencoder import to_pixels
from lowvram.tasks.codec import Codec

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "stable diffusion": {},
    "one stage": {"block_out_channels": (64,), "layers_per_block": 1},
    "flat": {"block_out_channels": (64, 64, 64)},
    "steep": {"block_out_channels": (32, 512), "layers_per_block": 1},
    "wide below": {"block_out_channels": (32, 32, 512, 512)},
    "16 channels, no attention": {"latent_channels": 16, "mid_block_add_attention": False},
}


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_decoding_takes_is_what_the_planner_traces(shape: str, triton: bool) -> None:
    with fake_card(triton=triton):
        model = Autoencoder(**SHAPES[shape])
        for height, width in ((64, 64), (96, 160)):
            with torch.no_grad(), LiveBytes() as memory:
                model.decode(torch.empty(1, model.latent_channels, height, width))
            assert memory.peak_bytes == pytest.approx(model.decoding_bytes(height, width), rel=0.06)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Codec:
    """A codec for which images above 32 pixels are large."""
    monkeypatch.setattr(codec, "TILE_PIXELS", 32)
    torch.manual_seed(0)
    model = Autoencoder(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8)
    return Codec(autoencoder=model.eval(), scaled=True)


def latents(side: int) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))


def whole(small: Codec, z: Tensor) -> Tensor:
    """Image by image, as large ones are."""
    with torch.no_grad():
        return torch.cat([to_pixels(small.autoencoder.decode(small.autoencoder.unscale(one[None]))) for one in z])


def test_whole_where_memory_suffices(small: Codec, caplog: pytest.LogCaptureFixture) -> None:
    z = latents(16)
    assert torch.equal(small.decode(z, CPU, 8), whole(small, z))
    assert not caplog.records


def test_in_tiles_where_that_was_planned(small: Codec, caplog: pytest.LogCaptureFixture) -> None:
    z = latents(16)
    found = small.decode(z, CPU, 8, whole=False)
    assert not torch.equal(found, whole(small, z))
    assert not caplog.records


@pytest.mark.parametrize("why", ["too little is free", "a plan", "out of memory", "out of the host's memory"])
def test_in_tiles_where_it_does_not(
    why: str, small: Codec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    z = latents(16)
    one, decode, tried = whole(small, z), small.autoencoder.decode, []

    def limited(x: Tensor) -> Tensor:
        tried.append(x.shape[-1])
        if why == "out of memory" and x.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if why == "out of the host's memory" and x.shape[-1] > 8:
            torch.empty(10**15)
        return decode(x)

    monkeypatch.setattr(small.autoencoder, "decode", limited)
    needed = 1.25 * small.autoencoder.decoding_bytes(16, 16)
    if why == "too little is free":
        monkeypatch.setattr(codec, "_room_bytes", lambda device: int(needed) - 1)
    if why == "a plan":
        with standin.cuda():
            assert len(small.decode(z, CPU, 8)) == 1  # the next take the memory of the first
        assert set(tried) == {8}
        return
    found = small.decode(z, CPU, 8)
    assert found.shape == one.shape and not torch.equal(found, one)
    assert tried == ([16] if why.startswith("out of") else []) + [8] * 18  # three by three for each of two
    small.decode(z, CPU, 8)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # said once
    assert "decoding 64x64 in tiles of 32: " in caplog.text
    if why == "too little is free":
        monkeypatch.setattr(codec, "_room_bytes", lambda device: int(needed) + 1)
        assert torch.equal(small.decode(z, CPU, 8), one)
    z = latents(8)  # no larger than a tile
    assert torch.equal(small.decode(z, CPU, 1), whole(small, z))


class Card(NamedTuple):
    """Of 100 bytes. fraction: that this process may reserve. free: by all programs."""

    reserved: int
    allocated: int
    free: int
    fraction: float


@pytest.mark.parametrize(
    ("card", "room"),
    [
        (Card(reserved=30, allocated=10, free=60, fraction=1.0), 80),
        (Card(reserved=30, allocated=10, free=60, fraction=0.5), 40),  # a bound of 50
        (Card(reserved=30, allocated=10, free=5, fraction=0.5), 25),  # others hold most of it
        (Card(reserved=60, allocated=60, free=40, fraction=0.5), 0),  # it was bounded later
    ],
)
def test_room_on_a_card(card: Card, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "memory_reserved": card.reserved,
        "memory_allocated": card.allocated,
        "mem_get_info": (card.free, 100),
        "get_per_process_memory_fraction": card.fraction,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert codec._room_bytes(torch.device("cuda")) == room
