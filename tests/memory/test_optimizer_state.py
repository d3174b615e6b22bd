"""Optimizer state: made at once, exact on resume, and carried over to any other kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvram import LowVRAMError, checkpoint
from lowvram.checkpoint import Checkpoint
from lowvram.memory import optimizers
from lowvram.memory.optimizer_state import init_state, kind_of, pack, pack_many, state_to, unpack, unpack_many

pytest.importorskip("bitsandbytes")

KINDS = ("adam", "adam8bit", "paged_adam", "paged_adam8bit", "lion8bit", "adafactor")
SHAPES = ([70, 100], [16, 8, 6, 6], [300], [])


def parameters(seed: int = 0) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draws)) for shape in SHAPES]


def make(kind: str, params: list[nn.Parameter], beta1: float = 0.9) -> torch.optim.Optimizer:
    like = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2, betas=(beta1, 0.99), weight_decay=0.01)
    return optimizers.build(kind, params, like=like)


def step(*together: tuple[torch.optim.Optimizer, list[nn.Parameter]], start: int = 0, steps: int = 3) -> None:
    """Steps with the same gradients for each; the last parameter gets none in the first ones."""
    for i in range(start, start + steps):
        draws = torch.Generator().manual_seed(i + 1)
        grads = [torch.randn(shape, generator=draws) for shape in SHAPES]
        for optimizer, params in together:
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if i < 3 and param is params[-1] else grad.clone()
            optimizer.step()


def saved(tmp_path: Path, packed: tuple[dict[str, Tensor], dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = checkpoint.write(tmp_path, 1, Checkpoint(tensors={"o": packed[0]}, numbers=packed[1]), keep=1)
    back = checkpoint.read(path)
    return back.tensors["o"], back.numbers


def same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_exactly(kind: str, beta1: float, tmp_path: Path) -> None:
    params = parameters()
    optimizer = make(kind, params, beta1)
    step((optimizer, params))
    tensors, numbers = saved(tmp_path, pack(optimizer))
    assert numbers["kind"] == kind == kind_of(optimizer)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(kind, again, beta1)
    step((resumed, [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]))  # nothing: none of them is its own
    assert unpack(resumed, tensors, numbers) == []
    step((optimizer, params), (resumed, again), start=3)
    assert same(params, again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_state_is_made_before_the_first_step_and_changes_nothing(kind: str, beta1: float) -> None:
    params, others = parameters(), parameters()
    eager, lazy = make(kind, params, beta1), make(kind, others, beta1)
    init_state(eager)
    assert same(params, others)
    places = [t.data_ptr() for t in tensors_of(eager)]
    assert len(places) > 0
    step((eager, params), (lazy, others), start=3)
    assert same(params, others)
    assert [t.data_ptr() for t in tensors_of(eager)] == places


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("now", KINDS)
@pytest.mark.parametrize("then", KINDS)
def test_any_kind_takes_over_from_any_other(then: str, now: str, beta1: float) -> None:
    """Second moments come across within what both kinds can hold; what can't is announced."""
    params = parameters()
    before = make(then, params, beta1)
    step((before, params), steps=6)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    after = make(now, again, beta1)
    messages = unpack(after, *pack(before))
    anew = then == "lion8bit" and now != "lion8bit"
    no_first = now == "lion8bit" and (then == "adafactor" or (beta1 == 0 and then not in ("lion8bit", "paged_adam")))
    no_first |= then == "adafactor" and now not in ("adafactor", "lion8bit") and beta1 != 0
    assert any("no second moment" in m for m in messages) == anew
    assert any("first moment" in m and "anew" in m for m in messages) == no_first
    alike = then.removeprefix("paged_") == now.removeprefix("paged_") and (then == now or "8bit" in now or beta1 != 0)
    assert any("converted" in m for m in messages) == (not alike and not anew)
    for param, state in after.state.items():
        expected = torch.float32 if "8bit" not in now or param.numel() < 4096 else torch.uint8
        kept = {v.dtype for k, v in state.items() if k not in ("step",) and not k.endswith("_absmax")}
        assert kept == {expected}
    if anew or no_first or now == "lion8bit":
        return
    step((before, params), (after, again), start=6, steps=1)
    if "adafactor" not in (then, now):  # which moves by other rules
        for a, b, old in zip(params, again, parameters(), strict=True):
            assert (a - b).norm() <= 0.05 * (a - old).norm() + 1e-7


def test_factored_moments_stand_for_adam_s_and_back() -> None:
    params = parameters()
    adam = make("adam", params)
    step((adam, params), steps=6)
    factored = make("adafactor", parameters())
    unpack(factored, *pack(adam))
    back = make("adam", parameters())
    unpack(back, *pack(factored))
    for a, b in zip(params, back.param_groups[0]["params"], strict=True):
        second, again = adam.state[a]["exp_avg_sq"], back.state[b]["exp_avg_sq"]
        torch.testing.assert_close(second.mean(), again.mean(), rtol=1e-4, atol=0)
        if a.dim() < 2:
            torch.testing.assert_close(second, again)


def packed_as_of_old(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What checkpoints held before there were kinds of optimizer: tensors by 'index.name', the rest as JSON."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, torch.Tensor) else scalars)[f"{index}.{name}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors, {"scalars": scalars, "groups": groups}


@pytest.mark.parametrize("make_old", [torch.optim.Adam, lambda p: torch.optim.SGD(p, momentum=0.9)])
def test_checkpoints_from_before_there_were_kinds_are_read(make_old: Any, tmp_path: Path) -> None:
    params = parameters()
    old = make_old(params)
    step((old, params))
    packed = saved(tmp_path, packed_as_of_old(old))
    assert "kind" not in packed[1]
    again = [nn.Parameter(p.detach().clone()) for p in params]
    new = make_old(again)
    assert unpack(new, *packed) == []
    step((old, params), (new, again), start=3)
    assert same(params, again)


def test_an_old_checkpoint_without_beta1_goes_on_exactly(tmp_path: Path) -> None:
    params = parameters()
    old = torch.optim.Adam(params, betas=(0.0, 0.99), fused=True)
    step((old, params))
    packed = saved(tmp_path, packed_as_of_old(old))
    again = [nn.Parameter(p.detach().clone()) for p in params]
    new = optimizers.build("adam", again, like=old)
    assert unpack(new, *packed) == []
    assert all("exp_avg" not in state for state in new.state.values())
    step((old, params), (new, again), start=3)
    assert same(params, again)


def test_state_of_an_unknown_optimizer_starts_anew() -> None:
    params = parameters()
    adam = make("adam", params)
    step((adam, params))
    sgd = torch.optim.SGD(parameters(), momentum=0.9)
    assert unpack(sgd, *pack(adam)) == ["the optimizer SGD starts anew: the checkpoint has the state of adam"]
    assert not sgd.state


@pytest.mark.parametrize("kind", ["adam", "adam8bit"])
def test_several_optimizers_over_stand_ins_are_one_in_a_checkpoint(kind: str) -> None:
    params, whole = parameters(), parameters()
    shells = {p: nn.Parameter(p.detach().clone()) for p in params[:2]}
    parts = [make(kind, [shells[params[1]], params[3]]), make(kind, [params[2], shells[params[0]]])]
    one = make(kind, whole)
    for optimizer in (*parts, one):
        init_state(optimizer)
    held = [shells.get(p, p) for p in params]
    step((parts[0], held), (parts[1], []), (one, whole), steps=0)
    for i in range(3):
        draws = torch.Generator().manual_seed(i)
        for a, b in zip(held, whole, strict=True):
            a.grad = torch.randn(a.shape, generator=draws)
            b.grad = a.grad.clone()
        for optimizer in (*parts, one):
            optimizer.step()
    for shell in shells.values():
        shell.data = torch.empty(0)  # as between steps
    tensors, numbers = pack_many(parts, params, shells)
    expected, expected_numbers = pack(one)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in tensors)
    assert numbers == expected_numbers
    for optimizer in parts:
        for tensor in tensors_of(optimizer):
            tensor.zero_()
    assert unpack_many(parts, params, shells, expected, numbers) == []
    assert all(torch.equal(v, expected[k]) for k, v in pack_many(parts, params, shells)[0].items())


def test_state_is_written_where_it_lies() -> None:
    """Paged state stays paged, and state on the host stays there."""
    params = parameters()
    optimizer = make("adam8bit", params)
    step((optimizer, params), start=3)
    packed = {k: v.clone() for k, v in pack(optimizer)[0].items()}, pack(optimizer)[1]
    places = [t.data_ptr() for t in tensors_of(optimizer)]
    step((optimizer, params))
    unpack(optimizer, *packed)
    assert [t.data_ptr() for t in tensors_of(optimizer)] == places
    assert all(torch.equal(v, packed[0][k]) for k, v in pack(optimizer)[0].items())


def test_state_moves_through_a_function() -> None:
    params, others = parameters(), parameters()
    moved, plain = make("adam8bit", params), make("adam8bit", others)
    init_state(moved)
    seen: list[Tensor] = []

    def copy(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    for i in range(3):
        state_to(moved, copy)
        step((moved, params), (plain, others), start=3 + i, steps=1)
    assert same(params, others)
    assert all(t.numel() > 1 for t in seen)
    per_pass = len(seen) // 3
    assert per_pass == 2 * 4 + 2  # codes and scales of two moments for two tensors, two moments of one; not of a scalar
    seen[0].is_paged = True  # type: ignore[attr-defined]
    first = next(iter(moved.state.values()))
    first["exp_avg_8bit"].is_paged = True
    seen.clear()
    state_to(moved, copy)
    assert len(seen) == per_pass - 1


def test_state_of_another_network_is_refused() -> None:
    params = parameters()
    optimizer = make("adam8bit", params)
    step((optimizer, params), start=3)
    packed = pack(optimizer)
    with pytest.raises(LowVRAMError, match="network has 2"):
        unpack(make("adam8bit", parameters()[:2]), *packed)
    wrong = [nn.Parameter(torch.zeros(6, 1000)), *parameters()[1:]]
    with pytest.raises(LowVRAMError, match="parameter 0 has 7000 elements"):
        unpack(make("adam8bit", wrong), *packed)
