import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from networks import run, small_unet, stir
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from lowvram.adapters import lora
from lowvram.adapters.quantized import PackedLinear, bytes_of, quantize
from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.memory.stream import BlockStream


def packed_layer(kind: str = "nf4", *, bias: bool = True) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(320, 640, bias=bias)
    return linear, PackedLinear(linear, kind=kind, compute_dtype=torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_as_near_as_the_librarys(kind: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(1280, 640)
    nn.init.normal_(linear.weight, std=0.02)
    ours = PackedLinear(linear, kind=kind, compute_dtype=torch.float32).weight  # type: ignore[arg-type]
    packed, state = bnb.quantize_4bit(linear.weight.data, blocksize=64, quant_type=kind, compress_statistics=True)
    theirs = bnb.dequantize_4bit(packed, state).to(torch.float32)
    errors = [(weight - linear.weight).square().mean().sqrt().item() for weight in (ours, theirs)]
    assert errors[0] < 1.002 * errors[1] < 0.2 * 0.02


def test_bytes_are_those_of_the_paper() -> None:
    linear, packed = packed_layer(bias=False)
    count = linear.weight.numel()
    blocks = -(-count // 64 // 256)
    assert bytes_of(packed) == count // 2 + count // 64 + 4 * (blocks + 1)
    assert bytes_of(packed) * 8 / count == pytest.approx(4.127, abs=0.003)
    assert bytes_of(linear) == 4 * count
    shared = nn.ModuleList([linear, linear])
    assert bytes_of(shared) == 4 * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_that_of_the_unpacked_weight(dtype: torch.dtype) -> None:
    _, packed = packed_layer()
    x = torch.randn(3, 5, 320, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    out = packed(x)
    assert packed.bias is not None
    wanted = F.linear(x, packed.weight.to(dtype), packed.bias.to(dtype))
    assert out.dtype == dtype and torch.equal(out, wanted)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, theirs = (torch.autograd.grad(y, x, given)[0] for y in (out, wanted))
    assert torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
        packed(x).float().square().mean().backward()
    assert x.grad is not None and x.grad.dtype == dtype


def test_nothing_but_bytes_is_kept_for_the_backward() -> None:
    _, packed = packed_layer()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        packed(torch.randn(2, 320, requires_grad=True))
    assert not sum(tensor.numel() for tensor in kept)
    state = {key: tensor.clone() for key, tensor in packed.state_dict().items() if key != "bias"}
    packed.to(torch.bfloat16)  # conversions of floats must not touch the scales
    assert all(torch.equal(packed.state_dict()[key], tensor) for key, tensor in state.items())


def test_a_network_shrinks_and_still_works() -> None:
    unet = small_unet()
    before, out = bytes_of(unet), run(unet)
    done = quantize(unet, compute_dtype=torch.float32)
    assert all(isinstance(unet.get_submodule(path), PackedLinear) for path in done)
    assert not any("time_embedding" in path for path in done) and "mid_block.attentions.0.proj_in" not in done
    weights = sum(unet.get_submodule(p).in_features * unet.get_submodule(p).out_features for p in done)  # type: ignore[operator]
    assert before - bytes_of(unet) == pytest.approx(weights * (4 - 4.127 / 8), rel=0.01)
    assert not any(p.requires_grad for p in unet.parameters())
    packed = run(unet)
    assert 0 < (packed - out).norm() < 0.2 * out.norm()
    with pytest.raises(LowVRAMError, match="no linear layer to pack"):
        quantize(unet)
    with pytest.raises(LowVRAMError, match="'int4'"):
        quantize(small_unet(), "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_learn_on_packed_weights(dora: bool) -> None:
    unet, plain = small_unet(), small_unet()
    done = quantize(unet, compute_dtype=torch.float32)
    for path in done:  # the same weights, unpacked
        plain.get_submodule(path).weight = nn.Parameter(unet.get_submodule(path).weight.clone())  # type: ignore[arg-type,operator]
    grads = []
    for network in (unet, plain):
        torch.manual_seed(3)
        adapters = lora.add(network, rank=2, targets=["all"], dora=dora)
        stir(adapters)
        run(network).square().mean().backward()
        grads.append([p.grad for p in adapters.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    with pytest.raises(LowVRAMError, match="packed weights"):
        lora.add(unet, rank=1, targets=["attention"], name="other").merge()


def test_packed_blocks_stream() -> None:
    unet = small_unet()
    quantize(unet, compute_dtype=torch.float32)
    adapters = lora.add(unet, rank=2, targets=["conv_in"])  # outside of the blocks, before them
    stir(adapters)
    wanted = run(unet)
    wanted.square().mean().backward()
    grads = [p.grad.clone() for p in adapters.parameters()]  # type: ignore[union-attr]
    adapters.zero_grad()
    stream = BlockStream(unet, find_blocks(unet), torch.device("cpu"))
    assert any(p.dtype == torch.uint8 for params in stream.params.values() for p in params)
    with stream.running():
        out = run(unet)
        out.square().mean().backward()
    assert torch.equal(out, wanted)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(adapters.parameters(), grads, strict=True))  # type: ignore[arg-type]


def test_a_block_that_ends_in_a_packed_layer_comes_back_before_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    quantize(network, compute_dtype=torch.float32)
    stream = BlockStream(network, {str(n): block for n, block in enumerate(network)}, torch.device("cpu"))
    unpack = PackedLinear.weight.fget  # type: ignore[attr-defined]
    brought = []

    def weight(layer: PackedLinear) -> torch.Tensor:
        slots = {slot.buffer.untyped_storage().data_ptr() for slot in stream._slots}
        brought.append(layer.packed.untyped_storage().data_ptr() in slots)
        unpacked: torch.Tensor = unpack(layer)
        return unpacked

    monkeypatch.setattr(PackedLinear, "weight", property(weight))
    with stream.running():
        network(torch.randn(2, 64, requires_grad=True)).square().mean().backward()
    assert len(brought) >= 8 and all(brought)


def test_fake_tensors_have_the_bytes_of_real_ones() -> None:
    real = small_unet(torch.bfloat16)
    quantize(real)
    with FakeTensorMode():
        fake = small_unet(torch.bfloat16)
        quantize(fake)
        assert bytes_of(fake) == bytes_of(real)
        linear = nn.Linear(320, 640)
        layer = PackedLinear(linear)
        x = torch.randn(3, 320, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None and x.grad.shape == (3, 320)
        assert layer.weight.shape == (640, 320) and layer.weight.dtype == torch.bfloat16


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LowVRAMError, match="pip install bitsandbytes"):
        quantize(small_unet())
