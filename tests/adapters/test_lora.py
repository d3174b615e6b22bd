import sys
from contextlib import nullcontext

import pytest
import torch
from networks import copied, run, small_unet, states_equal, stir
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from lowvram.adapters import lora
from lowvram.errors import LowVRAMError
from lowvram.memory.checkpointing import recompute, wrapped_forwards

BOTH = pytest.mark.parametrize("dora", [False, True])


class Two(nn.Module):
    """A linear layer and a convolution, to compare with the papers' formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv2d(8, 5, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, 4, 4, 6] -> [B, 5, 2, 2]
        return self.conv(self.linear(x).permute(0, 3, 1, 2))


@BOTH
@pytest.mark.parametrize("target", ["attention", "transformer", "all"])
def test_nothing_changes_at_the_start_and_only_adapters_learn(target: str, dora: bool) -> None:
    unet = small_unet()
    before, state = run(unet), copied(unet.state_dict())
    adapters = lora.add(unet, rank=3, alpha=6, targets=[target], dora=dora)
    out = run(unet)
    assert torch.equal(out, before)
    out.square().mean().backward()
    trained = dict(adapters.named_parameters())
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained.values())
    assert any(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    torch.optim.SGD(adapters.parameters(), lr=1.0).step()
    assert states_equal(lora.plain_state(unet), state)  # bit for bit
    assert not torch.equal(run(unet), before)
    adapters.remove()
    assert states_equal(unet.state_dict(), state)
    assert torch.equal(run(unet), before)
    assert not any("lora" in type(module).__module__ for module in unet.modules())


def test_the_presets_reach_the_layers_that_they_say() -> None:
    paths = {preset: lora.find_targets(small_unet(), [preset]) for preset in lora.PRESETS}
    assert set(paths["attention"]) < set(paths["transformer"]) < set(paths["all"])
    ends = {path.split("attn1.")[-1] for path in paths["attention"] if "attn1" in path}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}
    left = set(lora.target_layers(small_unet())) - set(paths["all"])
    assert left == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert lora.find_targets(small_unet(), ["conv_in", "mid_block.resnets.0.conv1"]) == [
        "conv_in",
        "mid_block.resnets.0.conv1",
    ]


@BOTH
def test_the_papers_formulas(dora: bool) -> None:
    torch.manual_seed(0)
    network = Two()
    x = torch.randn(3, 4, 4, 6)
    weights = {name: getattr(network, name).weight.detach().clone() for name in ("linear", "conv")}
    adapters = lora.add(network, rank=2, alpha=3, targets=["linear", "conv"], dora=dora)
    stir(adapters, std=0.3)
    state = {key: value.clone().requires_grad_() for key, value in adapters.state_dict().items()}

    def changed(name: str) -> Tensor:
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        delta = (b.flatten(1) @ a.flatten(1)).reshape(weights[name].shape)
        weight = weights[name] + 3 / 2 * delta
        if not dora:
            return weight
        norm = weight.detach().flatten(1).norm(dim=1)  # DoRA, section 4.3: a constant for the gradient
        scale = state[f"{name}.lora_magnitude_vector.weight"].flatten() / norm
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))

    h = F.linear(x, changed("linear"), adapters.layers["linear"].get_base_layer().bias)
    conv = adapters.layers["conv"].get_base_layer()
    wanted = F.conv2d(h.permute(0, 3, 1, 2), changed("conv"), conv.bias, stride=2, padding=1)
    out = network(x)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in adapters.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging(dora: bool, dtype: torch.dtype) -> None:
    unet = small_unet(dtype)
    state = copied(unet.state_dict())
    adapters = lora.add(unet, rank=3, alpha=6, targets=["all"], dora=dora)
    stir(adapters)
    out = run(unet)
    adapters.merge()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    merged = run(unet)
    assert (merged - out).abs().max() < tolerance * out.abs().max()
    assert not states_equal(lora.plain_state(unet), state)
    with pytest.raises(LowVRAMError, match="merged"):
        adapters.merge()
    with pytest.raises(LowVRAMError, match="merged"):
        adapters.scale(0.5)
    adapters.unmerge()
    assert states_equal(lora.plain_state(unet), state)
    assert torch.equal(run(unet), out)
    with pytest.raises(LowVRAMError, match="not merged"):
        adapters.unmerge()
    adapters.merge(keep=False)
    assert list(unet.state_dict()) == list(state)
    assert torch.equal(run(unet), merged)


def test_several_adapters_add_up() -> None:
    unet = small_unet()
    before = run(unet)
    first = lora.add(unet, rank=2, targets=["conv_out"], name="first")
    stir(first, 3)
    with_first = run(unet) - before
    second = lora.add(unet, rank=4, targets=["conv_out"], name="second")
    stir(second, 4)
    third = lora.add(unet, rank=1, targets=["attention", "conv_out"], name="third")  # changes nothing yet
    assert all(p.requires_grad for adapters in (first, second, third) for p in adapters.parameters())
    first.scale(0)
    with_second = run(unet) - before
    first.scale(1)
    assert with_first.abs().max() > 0.01 < with_second.abs().max()
    torch.testing.assert_close(run(unet), before + with_first + with_second, atol=1e-5, rtol=1e-5)
    second.scale(0)
    torch.testing.assert_close(run(unet), before + with_first, atol=1e-6, rtol=1e-6)
    first.scale(0.5)
    torch.testing.assert_close(run(unet), before + 0.5 * with_first, atol=1e-5, rtol=1e-5)
    first.scale(0)
    assert torch.equal(run(unet), before)
    first.remove()
    second.scale(1)
    torch.testing.assert_close(run(unet), before + with_second, atol=1e-5, rtol=1e-5)
    with pytest.raises(LowVRAMError, match="'second' already"):
        lora.add(unet, rank=2, name="second")


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
def test_a_narrow_frozen_network(autocast: bool, dora: bool) -> None:
    unet, wide = small_unet(torch.bfloat16), small_unet(torch.bfloat16).float()
    outs, grads = [], []
    for network in (unet, wide):
        torch.manual_seed(5)
        adapters = lora.add(network, rank=3, targets=["all"], dora=dora)
        stir(adapters)
        assert all(p.dtype == torch.float32 for p in adapters.parameters())
        narrow = autocast and network is unet
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if narrow else nullcontext():
            out = run(network)
        out.square().mean().backward()
        outs.append(out)
        grads.append(torch.cat([p.grad.flatten() for p in adapters.parameters()]))  # type: ignore[union-attr]
    assert outs[0].dtype == torch.float32
    assert (outs[0] - outs[1]).norm() < 0.05 * outs[1].norm()
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()


@BOTH
def test_recomputation_changes_nothing(dora: bool) -> None:
    unet = small_unet()
    adapters = lora.add(unet, rank=3, targets=["all"], dora=dora, dropout=0.3)
    stir(adapters)
    grads = []
    for recomputed in (False, True):
        torch.manual_seed(0)  # of the dropout
        adapters.zero_grad()

        def wrap(module: nn.Module, forward: object) -> object:
            return lambda *args, **kwargs: recompute(forward, *args, **kwargs)

        with wrapped_forwards(list(unet.blocks().values()), wrap) if recomputed else nullcontext():  # type: ignore[arg-type]
            run(unet).square().mean().backward()
        grads.append([p.grad.clone() for p in adapters.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    adapters.eval()
    assert torch.equal(run(unet), run(unet))
    adapters.train()
    assert not torch.equal(run(unet), run(unet))


@BOTH
def test_fake_tensors(dora: bool) -> None:
    with FakeTensorMode():
        network = Two()
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
        adapters = lora.add(network, rank=4, targets=["linear", "conv"], dora=dora)
        network(torch.randn(1, 4, 4, 6).bfloat16()).sum().backward()
        assert all(p.grad is not None and p.dtype == torch.float32 for p in adapters.parameters())
    real = lora.add(Two(), rank=4, targets=["linear", "conv"], dora=dora)
    assert [p.shape for p in adapters.parameters()] == [p.shape for p in real.parameters()]


def test_a_state_dict_resumes() -> None:
    unet = small_unet()
    adapters = lora.add(unet, rank=3, alpha=1, targets=["transformer"], dora=True)
    stir(adapters)
    names = {key.split("attn1.to_q.")[-1] for key in adapters.state_dict() if "attn1.to_q" in key}
    assert names == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"}
    other = small_unet()
    resumed = lora.add(other, rank=3, alpha=1, targets=["transformer"], dora=True)
    resumed.load_state_dict(adapters.state_dict())
    assert torch.equal(run(other), run(unet))
    assert (adapters.rank, adapters.alpha) == (3, 1.0)


def test_a_twin_lends_its_values() -> None:
    unet = small_unet()
    adapters = lora.add(unet, rank=3, targets=["attention"])
    stir(adapters)
    own, parameters = run(unet), list(adapters.parameters())
    twin = adapters.twin()
    assert list(twin.state_dict()) == list(adapters.state_dict())
    assert not any(p.requires_grad for p in twin.parameters())
    with twin.active():
        assert torch.equal(run(unet), own)
    stir(twin, 9)
    assert torch.equal(run(unet), own)  # not the same memory
    with twin.active():
        lent = run(unet)
        assert not lent.requires_grad
        adapters.merge()  # of the average, as for an export
        torch.testing.assert_close(run(unet), lent, atol=1e-5, rtol=1e-5)
        adapters.unmerge()
    assert not torch.equal(lent, own)
    assert torch.equal(run(unet), own)
    assert all(a is b for a, b in zip(parameters, adapters.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"targets": ["to_qq"]}, "to_q"),
        ({"targets": ["conv_norm_out"]}, "no linear or convolution layer"),
        ({"targets": []}, "no targets"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, object], told: str) -> None:
    unet = small_unet()
    with pytest.raises(LowVRAMError, match=told):
        lora.add(unet, **({"rank": 2} | options))  # type: ignore[arg-type]
    assert list(unet.state_dict()) == list(small_unet().state_dict())


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LowVRAMError, match=r"lowvram\[finetune\]"):
        lora.add(small_unet(), rank=2)
