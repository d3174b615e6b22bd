"""Cutting a batch into micro-batches and shares of processes: groups stay together, seeds stay with samples."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram.phase import MicroBatch, Phase


def make_phase(**options: object) -> Phase:
    network = nn.Linear(1, 1)
    settings = {"name": "D", "networks": (network,), "loss": lambda micro: micro.images.sum(), **options}
    return Phase(optimizer=torch.optim.SGD(network.parameters(), lr=0.1), **settings)  # type: ignore[arg-type]


def cut(phase: Phase, batch: int, start: int = 0, seed: int = 7) -> list[MicroBatch]:
    positions = torch.arange(start, start + batch)
    images = positions.to(torch.uint8).reshape(-1, 1, 1, 1)
    return list(phase.micro_batches(images, positions, positions, start, seed))


@given(group=st.sampled_from([1, 2, 4]), columns=st.integers(1, 6), micro_columns=st.integers(1, 6))
def test_groups_are_those_of_the_whole_batch(group: int, columns: int, micro_columns: int) -> None:
    batch = group * columns
    phase = make_phase(samples=batch, group=group, micro_batch=group * micro_columns)
    micros = cut(phase, batch)
    groups = [tuple(m.labels.reshape(group, -1)[:, i].tolist()) for m in micros for i in range(len(m) // group)]
    assert sorted(groups) == [tuple(range(i, batch, columns)) for i in range(columns)]
    assert all(len(m) <= max(group, group * micro_columns) for m in micros)


def test_a_sample_keeps_its_seed_however_the_batch_is_cut() -> None:
    whole = cut(make_phase(samples=8, group=4), 8, start=16)[0]
    expected = dict(zip(whole.labels.tolist(), whole.seeds.tolist(), strict=True))
    for micro in cut(make_phase(samples=8, group=4, micro_batch=4), 8, start=16):
        assert dict(zip(micro.labels.tolist(), micro.seeds.tolist(), strict=True)).items() <= expected.items()
    assert len(set(expected.values())) == 8


def test_phases_steps_and_runs_draw_other_numbers() -> None:
    seeds = set(cut(make_phase(samples=4), 4)[0].seeds.tolist())
    assert seeds.isdisjoint(cut(make_phase(samples=4, name="R1"), 4)[0].seeds.tolist())
    assert seeds.isdisjoint(cut(make_phase(samples=4), 4, start=4)[0].seeds.tolist())
    assert seeds.isdisjoint(cut(make_phase(samples=4), 4, seed=8)[0].seeds.tolist())


def test_a_shrunk_phase_takes_the_first_of_the_batch_whoever_holds_them() -> None:
    phase = make_phase(samples=4, micro_batch=3)
    assert [m.labels.tolist() for m in cut(phase, 8)] == [[0, 1, 2], [3]]
    positions = torch.tensor([1, 3, 5, 7])  # the share of the second of two processes
    images = torch.zeros(4, 1, 1, 1, dtype=torch.uint8)
    assert [m.labels.tolist() for m in phase.micro_batches(images, positions, positions, 0, 7)] == [[1, 3]]
    positions = torch.tensor([5, 6, 7, 8])
    assert list(phase.micro_batches(images, positions, positions, 0, 7)) == []


def test_only_the_phase_s_networks_ask_for_gradients_and_only_within() -> None:
    phase = make_phase(samples=1)
    for parameter in phase.parameters():
        parameter.requires_grad_(False)
    with phase.trainable():
        assert all(p.requires_grad for p in phase.parameters())
    assert not any(p.requires_grad for p in phase.parameters())
