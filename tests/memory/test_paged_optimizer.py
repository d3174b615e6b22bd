"""Paged optimizers: bitsandbytes' updates without its traps."""

import builtins
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram import LowVRAMError
from lowvram.memory import optimizer_convert as convert
from lowvram.memory.paged_optimizer import PagedOptimizer

bnb = pytest.importorskip("bitsandbytes")

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def make(
    params: list[nn.Parameter], kind: str = "paged_adam8bit", *, decoupled: bool = True, **changes: Any
) -> PagedOptimizer:
    return PagedOptimizer(params, kind=kind, decoupled_weight_decay=decoupled, **{**SETTINGS, **changes})


def parameters(*shapes: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    sizes = [(s,) if isinstance(s, int) else s for s in shapes]
    return [nn.Parameter(torch.randn(size, generator=draws).to(dtype)) for size in sizes]


def step(optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    """Steps with the same gradients for each."""
    for i in range(steps):
        draws = torch.Generator().manual_seed(i + 1)
        for together in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
            grad = torch.randn(together[0].shape, generator=draws)
            for param in together:
                param.grad = grad.to(param.dtype).clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("paged_adam8bit", lambda p: bnb.optim.PagedAdamW8bit(p, **SETTINGS)),
        ("paged_adam", lambda p: bnb.optim.PagedAdamW(p, **SETTINGS)),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_updates_are_bitsandbytes_own(kind: str, own: Any, dtype: torch.dtype) -> None:
    shapes = (5000, (70, 8, 3, 3), 100, (4, 4))
    ours, theirs = parameters(*shapes, dtype=dtype), parameters(*shapes, dtype=dtype)
    step([make(ours, kind), own(theirs)], 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", ["paged_adam8bit", "paged_adam"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_decay_and_missing_first_moments_follow_torch(kind: str, beta1: float, decoupled: bool) -> None:
    """Coupled decay too, which bitsandbytes' Adam decouples. Small tensors exactly, others as 8 bits allow."""
    settings = {**SETTINGS, "betas": (beta1, 0.99), "weight_decay": 0.1}
    ours, theirs, start = parameters(6000, 300), parameters(6000, 300), parameters(6000, 300)
    torch_s = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    step([make(ours, kind, decoupled=decoupled, **settings), torch_s], 20)
    for a, b, c in zip(ours, theirs, start, strict=True):
        error = ((a - b).norm() / (b - c).norm()).item()
        assert error < (0.03 if kind == "paged_adam8bit" and a.numel() >= 4096 else 1e-5), error


def test_only_the_second_moment_is_kept_without_beta1() -> None:
    (param,) = parameters(8192)
    held = {beta1: bytes_of(make([param], betas=(beta1, 0.99)).make_state(param)) for beta1 in (0.0, 0.9)}
    assert held[0.9] == 2 * held[0.0] == 2 * (8192 + 4 * 8192 // 256)


def bytes_of(state: dict[str, Any]) -> int:
    return sum(v.nbytes for v in state.values() if isinstance(v, torch.Tensor))


def test_elements_of_tiny_gradients_do_not_jump_without_a_first_moment() -> None:
    """A second moment that was rounded to zero would move its element by lr / sqrt(1 - beta2) = 10 lr."""
    (param,) = parameters(4096)
    optimizer = make([param], betas=(0.0, 0.99))
    second = torch.full([4096], 1e-9)  # gradients of 3e-5 beside one of 1 in each block
    second[::256] = 1.0
    state = optimizer.state[param] = optimizer.make_state(param)
    convert.write(convert.Moments(step=1000, first=None, second=second), state, beta2_then=0.99, beta2_now=0.99)
    before = param.detach().clone()
    param.grad = second.sqrt()
    optimizer.step()
    assert (before - param).max() <= 1.01 * SETTINGS["lr"]


def test_overrides_that_others_left_do_not_reach_it() -> None:
    ours, theirs = parameters(5000), parameters(5000)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    own = bnb.optim.AdamW8bit(theirs, **SETTINGS)
    try:
        manager.index2config[(0, 0)] = {"optim_bits": 32, "lr": 1.0}  # as StableEmbedding of another network leaves it
        manager.pid2config[id(ours[0])] = {"optim_bits": 32, "lr": 1.0}
        optimizer = make(ours)
        step([optimizer, own], 1)
    finally:
        manager.initialize()
    assert own.state[theirs[0]]["state1"].dtype == torch.float32  # the trap is there
    assert optimizer.state[ours[0]]["exp_avg_8bit"].dtype == torch.uint8
    assert not torch.equal(ours[0], theirs[0])


def test_weights_stay_where_they_are() -> None:
    """bitsandbytes moves parameters that are not contiguous to new memory, away from whatever else refers to it."""
    (param,) = parameters((70, 8, 3, 3))
    param.data = param.data.contiguous(memory_format=torch.channels_last)
    with pytest.raises(LowVRAMError, match=r"contiguous.*70, 8, 3, 3"):
        make([param])
    (param,) = parameters((70, 8, 3, 3))
    place = param.data_ptr()
    optimizer = make([param])
    param.grad = torch.randn(70, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    expected = parameters((70, 8, 3, 3))
    expected[0].grad = param.grad.contiguous()
    optimizer.step()
    make(expected).step()
    assert param.data_ptr() == place
    assert torch.equal(param, expected[0])


def test_one_bad_gradient_spoils_its_own_tensor_only() -> None:
    first, second = params = parameters(100, 200)
    optimizer = make(params, betas=(0.0, 0.99))
    first.grad, second.grad = torch.full([100], math.inf), torch.ones(200)
    optimizer.step()
    assert second.isfinite().all()


def test_what_can_not_be_done_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (param,) = parameters(5000)
    with pytest.raises(LowVRAMError, match=r"paged_adam8bit.*float64"):
        make([nn.Parameter(param.detach().double())])
    with pytest.raises(LowVRAMError, match="load_state_dict"):
        make([param]).load_state_dict({})
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LowVRAMError, match="optimizer=paged_adam needs bitsandbytes") as raised:
        make([param], "paged_adam")
    assert "pip install bitsandbytes" in raised.value.remedy


@pytest.mark.parametrize("kind", ["paged_adam8bit", "paged_adam"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_it_can_be_traced_with_fake_tensors(kind: str, beta1: float) -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(70, 100)), nn.Parameter(torch.empty(10))]
        optimizer = make(params, kind, betas=(beta1, 0.99))
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    moments = 1 if beta1 == 0 and kind != "paged_adam" else 2
    small = 4 if kind == "paged_adam" else 1
    scales = 0 if kind == "paged_adam" else 4 * 28  # 7000 elements in blocks of 256
    assert bytes_of(optimizer.state[params[0]]) == moments * (small * 7000 + scales)
