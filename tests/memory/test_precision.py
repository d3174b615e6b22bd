"""Precision by card, autocast without its cache, and the loss scale."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lowvram.errors import LowVRAMError
from lowvram.memory import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("name", "chosen"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_choice_on_a_cpu(name: str, chosen: str) -> None:
    assert precision.choose(name, CPU) == chosen


@pytest.fixture(params=[True, False], ids=["real bf16", "emulated bf16"])
def real_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    asked: list[dict[str, bool]] = []

    def supported(**options: bool) -> bool:
        asked.append(options)
        return request.param or options.get("including_emulation", True)

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2060")
    return request.param


def test_choice_on_a_card(real_bf16: bool) -> None:
    assert precision.choose("auto", CUDA) == ("bf16" if real_bf16 else "fp16")
    assert precision.choose("fp32", CUDA) == "fp32"
    assert precision.choose("fp16", CUDA) == "fp16"
    if real_bf16:
        assert precision.choose("bf16", CUDA) == "bf16"
    else:
        with pytest.raises(LowVRAMError, match=r"precision=bf16: RTX 2060.*\n.*precision=fp16"):
            precision.choose("bf16", CUDA)


def test_unknown_name() -> None:
    with pytest.raises(LowVRAMError, match="precision=fp8"):
        precision.choose("fp8", CPU)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_casts_and_keeps_no_weights(name: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4, bias=False)
    with precision.autocast(name, CPU):
        before = layer(torch.ones(1, 4))
        with torch.no_grad():
            layer.weight.data.zero_()  # a streamed weight changes like this; a cached copy would not notice
        after = layer(torch.ones(1, 4))
    assert before.dtype == after.dtype == dtype
    assert before.abs().sum() > 0
    assert after.abs().sum() == 0


def test_the_cache_would_have_been_stale() -> None:
    """Why it is off: torch's default goes on using the old weight."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.ones(1, 4))
        layer.weight.data.zero_()
        assert layer(torch.ones(1, 4)).abs().sum() > 0


def test_scale_halves_grows_and_is_exhausted() -> None:
    scale = precision.LossScale(init=4.0, growth_every=3)
    for finite, expected in [(True, 4), (True, 4), (True, 8), (False, 4), (True, 4), (True, 4), (False, 2), (False, 1)]:
        scale.update(finite)
        assert scale.scale == expected
        assert not scale.exhausted
    scale.update(False)
    assert scale.scale == 1
    assert scale.exhausted
    scale.update(True)
    assert not scale.exhausted


def test_scale_is_bounded() -> None:
    scale = precision.LossScale(growth_every=1)
    for _ in range(200):
        scale.update(True)
    assert scale.scale == 2.0**24
    large = precision.LossScale(init=2.0**30, growth_every=1)
    large.update(True)
    assert large.scale == 2.0**30  # what was asked for is not cut


def test_scale_resumes() -> None:
    one = precision.LossScale(init=64.0, growth_every=4)
    for finite in (True, False, True, True):
        one.update(finite)
    other = precision.LossScale(growth_every=4)
    other.load_state(one.state())
    for _ in range(2):  # the second of these is the fourth finite step in a row
        one.update(True)
        other.update(True)
    assert other.scale == one.scale == 64.0


def test_scale_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"init=0\.5"):
        precision.LossScale(init=0.5)
