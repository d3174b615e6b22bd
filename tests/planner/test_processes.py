"""Plans for several processes: what two of them really allocate, sharded and side by side, is what was traced."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from planned import as_on_a_cpu, stylegan2, unrounded_peak
from two_processes import BUILD, WORLD, activations_of

from lowvram.errors import LowVRAMError
from lowvram.planner import calibration, cards, make
from lowvram.planner.compose import highest
from lowvram.planner.log import CATEGORIES, WEIGHTS
from lowvram.planner.pieces import Pieces
from lowvram.planner.plan import Plan
from lowvram.planner.search import Search
from lowvram.planner.subject import fake_card
from lowvram.planner.tracing import Job, Structure

TESTS = Path(__file__).parent.parent
CASES = (("none", 8, "keep"), ("shard", 8, "keep"), ("shard", 4, "recompute"), ("offload", 4, "recompute"))
SMALL = stylegan2("augment.mode=none", "resolution=16")
GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """Tests of sharding leave a group of one process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield


# What is allocated.


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[int]]]:
    """Of each of CASES."""
    file = tmp_path_factory.mktemp("measured") / "peaks.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    done = subprocess.run(
        [*launch, str(TESTS / "planner" / "two_processes.py"), str(file), *(str(w) for case in CASES for w in case)],
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, list[int]]] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_each_of_two_processes_allocates_what_was_traced(
    case: tuple[str, int, str], measured: list[dict[str, list[int]]]
) -> None:
    """Side by side and under second derivatives to the byte; where blocks come and go within 1%."""
    fsdp, micro, activations = case
    structure = Structure(fsdp=fsdp, processes=WORLD)
    with as_on_a_cpu(), Pieces(BUILD, processes=1) as pieces:
        facts = pieces.facts(structure)
        for phase in facts.phases:
            size = min(micro, phase.samples_per_process)
            job = Job(
                structure=structure,
                what="phase",
                name=phase.name,
                samples=size,
                runs=phase.samples_per_process // size if fsdp != "none" else 1,
                activations=activations_of(phase.second_order, activations),
            )
            traced = unrounded_peak(pieces.get(job).piece)
            _, outliving, update = measured[CASES.index(case)][phase.name]
            if fsdp == "offload":  # measured, the host's gradients and shards are the device's
                assert outliving - facts.parameter_bytes[phase.optimizer] <= 1.02 * traced
                assert traced <= 1.01 * outliving
                continue
            exact = fsdp == "none" or phase.second_order
            assert traced == pytest.approx(outliving, rel=1e-4 if exact else 0.01, abs=256), phase.name
            piece = pieces.get(Job(structure=structure, what="update", name=phase.optimizer)).piece
            assert unrounded_peak(piece) == pytest.approx(update, abs=512), phase.name


# What is planned.


@pytest.fixture
def pieces() -> Iterator[Pieces]:
    """For one test: sharded ones pretend a group of processes as long as they live, and a process has one."""
    with Pieces(SMALL, processes=1) as made:
        yield made


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_are_rows_rounded_up(pieces: Pieces, processes: int) -> None:
    with fake_card():
        networks = SMALL().networks
        shapes = [p.shape for name in "GD" for p in networks[name].parameters()]
        buffers = sum(b.nbytes for name in "GD" for b in networks[name].buffers())
    rows = sum(4 * -(-s[0] // processes) * s[1:].numel() if s else 4 for s in shapes)
    facts = pieces.facts(Structure(fsdp="shard", processes=processes))
    assert facts.residents.total_bytes(WEIGHTS) == rows + buffers
    assert sum(facts.parameter_bytes.values()) == rows
    assert 0.9 * rows < sum(facts.state_bytes.values()) < 1.1 * rows  # Adam's second moment alone, of real rows
    offloaded = pieces.facts(Structure(fsdp="offload", processes=processes))
    assert offloaded.residents.total_bytes(WEIGHTS) == buffers + 4 * sum(not s for s in shapes)


def test_blocks_come_one_by_one_and_stay_for_a_second_derivative(pieces: Pieces) -> None:
    structure = Structure(fsdp="shard", processes=2)
    whole = pieces.facts(Structure()).parameter_bytes["D"]

    def gathered(name: str) -> int:
        piece = pieces.get(Job(structure=structure, what="phase", name=name, samples=4)).piece
        storages = np.where(piece.order >= 0, piece.order, ~piece.order)
        changes = np.where(piece.order >= 0, 1, -1) * piece.sizes[storages]
        return int(np.cumsum(np.where(piece.categories[storages] == WEIGHTS, changes, 0)).max())

    assert whole <= gathered("R1") <= 1.1 * whole  # with the padding of rows
    assert gathered("D") < 0.9 * whole


@pytest.mark.parametrize("fsdp", ["none", *(pytest.param(k, marks=pytest.mark.slow) for k in ("shard", "offload"))])
def test_a_plan_is_for_each_of_the_processes(fsdp: str) -> None:
    where = make.place(6 * GIB, "RTX 2060")
    request = make.Request(
        build=SMALL, name="small", batch=16, kimg=1, structure=Structure(fsdp=fsdp, processes=2), processes=1
    )
    alone = make.make(replace(request, structure=Structure()), where)
    plan = make.make(request, where)
    assert plan.fits and plan.processes == 2 and plan.policy.fsdp == fsdp
    assert "on each of 2 RTX 2060" in str(plan)
    assert Plan.from_json(plan.to_json()).processes == 2
    assert [row.samples for row in plan.phases[:4]] == [row.samples // 2 for row in alone.phases[:4]]
    for row in plan.phases[:4]:
        assert row.activations != "offload" or fsdp == "none"
    held = {name: row.by_category[name] for row in plan.phases if row.name == "saving" for name in CATEGORIES}
    before = {name: row.by_category[name] for row in alone.phases if row.name == "saving" for name in CATEGORIES}
    share = {"none": (1.0, 1.0), "shard": (0.5, 0.65), "offload": (0.0, 0.15)}[fsdp]
    assert share[0] <= (held["weights"] + held["optimizer"]) / (before["weights"] + before["optimizer"]) <= share[1]
    assert held["average"] == before["average"]
    if fsdp == "offload":
        assert plan.host_bytes >= 0.48 * before["weights"] * 3  # weights, gradients and one moment of half of them


@pytest.mark.slow
def test_a_search_prices_what_a_whole_step_needs(pieces: Pieces) -> None:
    structure = Structure(fsdp="shard", processes=2)
    search = Search(pieces, structure, cards.find("RTX 2060"), calibration.default(cards.find("RTX 2060")))
    best = search.within(6 * GIB).best
    assert best is not None
    assert best.candidate.live_bytes == max(part.live_bytes for part in highest(best.requests).values())
    least = search.least(0)
    assert least.candidate.live_bytes < best.candidate.live_bytes
    assert all(own.weights == "device" for own in least.candidate.policy.optimizers.values())


def test_what_can_not_be_planned_says_so() -> None:
    where = make.place(6 * GIB, "RTX 2060")
    request = make.Request(build=SMALL, name="small", batch=16, kimg=1, structure=Structure(processes=3), processes=1)
    with pytest.raises(LowVRAMError, match="don't divide among 3 processes in groups of 4"):
        make.make(request, where)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LowVRAMError, match="belongs to a group of processes"):
            make.make(replace(request, structure=Structure(fsdp="shard", processes=2)), where)
    finally:
        dist.destroy_process_group()
