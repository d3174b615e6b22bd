"""The order of thriftier policies, and that it ends from wherever it starts."""

from collections.abc import Iterator
from itertools import product

import pytest

from lowvram.errors import LowVRAMError
from lowvram.memory.ladder import PhaseFacts, thriftier
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy


def climb(policy: MemoryPolicy, phase: PhaseFacts) -> list[str]:
    said = []
    while (found := thriftier(policy, phase)) is not None:
        policy, what = found
        said.append(what)
    return said


def facts(**changes: object) -> PhaseFacts:
    return PhaseFacts(**{"name": "D", "optimizer": "D", "samples_per_process": 16, **changes})


@pytest.mark.parametrize(
    ("policy", "phase", "said"),
    [
        (
            MemoryPolicy(optimizers={"G": OptimizerPolicy()}),
            facts(group=2, has_blocks=True),
            [
                "micro_batch.D: 16 -> 8",
                "micro_batch.D: 8 -> 4",
                "memory.activations.D: keep -> recompute",
                "micro_batch.D: 4 -> 2",
                "memory.state.D: device -> host",
                "memory.state.G: device -> host",
                "memory.ema: device -> host",
            ],
        ),
        (
            MemoryPolicy(ema="host"),
            facts(name="R1", group=4, second_order=True, has_blocks=True, samples_per_process=4),
            ["memory.activations.R1: keep -> offload", "memory.state.D: device -> host"],
        ),
        (  # groups of 8 are never cut; 24 has no half below 16 that keeps them
            MemoryPolicy(ema="host", optimizers={"D": OptimizerPolicy(kind="paged_adam8bit")}),
            facts(group=8, samples_per_process=24, has_blocks=True),
            ["micro_batch.D: 24 -> 8", "memory.activations.D: keep -> recompute"],
        ),
        (  # 6 has no half of 4 or more
            MemoryPolicy(ema="host", fsdp="offload"),
            facts(samples_per_process=12),
            [
                "micro_batch.D: 12 -> 6",
                "micro_batch.D: 6 -> 4",
                "micro_batch.D: 4 -> 2",
                "micro_batch.D: 2 -> 1",
                "memory.activations.D: keep -> offload",
            ],
        ),
        (
            MemoryPolicy(
                ema="host",
                phases={"D": PhasePolicy(activations="recompute", recompute_every=3)},
                optimizers={"D": OptimizerPolicy(update="fused", state="host")},
            ),
            facts(samples_per_process=2, has_blocks=True),
            ["recompute_every.D: 3 -> 1", "memory.update.D: fused -> deferred", "micro_batch.D: 2 -> 1"],
        ),
        (  # streamed blocks are recomputed as it is
            MemoryPolicy(ema="host", optimizers={"D": OptimizerPolicy(weights="stream", update="deferred")}),
            facts(samples_per_process=1, has_blocks=True),
            ["memory.state.D: device -> host"],
        ),
        (  # a micro-batch larger than what there is
            MemoryPolicy(ema="host", fsdp="shard", phases={"D": PhasePolicy(micro_batch=64, activations="offload")}),
            facts(samples_per_process=2),
            ["micro_batch.D: 2 -> 1"],
        ),
    ],
)
def test_order(policy: MemoryPolicy, phase: PhaseFacts, said: list[str]) -> None:
    assert climb(policy, phase) == said


def policies() -> Iterator[MemoryPolicy]:
    """Every kind of policy for a phase "D" of optimizer "D", beside one named "G"."""
    shapes = product((None, 3, 8), ("keep", "recompute", "offload"), (1, 2))
    optimizers = product(
        ("adam", "paged_adam"), ("after", "fused", "deferred"), ("device", "host"), ("device", "stream")
    )
    rest = product(("device", "host"), ("none", "offload"))
    for (micro, kept, every), (kind, update, state, weights), (ema, fsdp) in product(shapes, optimizers, rest):
        try:
            yield MemoryPolicy(
                phases={"D": PhasePolicy(micro_batch=micro, activations=kept, recompute_every=every)},
                optimizers={
                    "D": OptimizerPolicy(kind=kind, update=update, state=state, weights=weights),
                    "G": OptimizerPolicy(),
                },
                ema=ema,
                fsdp=fsdp,
            )
        except LowVRAMError:
            continue


PHASES = [
    PhaseFacts(
        name="D", optimizer="D", samples_per_process=samples, group=group, second_order=second, has_blocks=blocks
    )
    for (samples, group), second, blocks in product(((8, 1), (12, 4), (1, 1)), (False, True), (False, True))
]


def test_every_policy_leads_to_an_end_by_valid_single_changes() -> None:
    checked = set()  # policies from which the rest of the way is known to be good
    starts = list(policies())
    assert len(starts) > 400
    for phase, policy in product(PHASES, starts):
        seen = set()
        while (phase, policy) not in checked and (found := thriftier(policy, phase)) is not None:
            checked.add((phase, policy))
            seen.add(policy)
            before, (policy, what) = policy, found
            assert policy not in seen, "a circle"
            old, new = flat(before), flat(policy)
            changed = [key for key in new if new[key] != old[key]]
            assert len(changed) == 1, changed
            check_change(changed[0], old, new, what, phase)


def check_change(key: str, old: dict[str, object], new: dict[str, object], what: str, phase: PhaseFacts) -> None:
    value = new[key]
    name, _, change = what.partition(": ")
    assert name.removeprefix("memory.") == key
    assert change.endswith(f"-> {value}")
    if key == "micro_batch.D":
        assert isinstance(value, int)
        assert phase.samples_per_process % value == 0
        assert value % phase.group == 0
        assert old[key] is None or value < int(str(old[key]))
        assert value < phase.samples_per_process
        assert new["update.D"] != "fused"
    if key == "activations.D":
        assert (value == "recompute") <= (phase.has_blocks and not phase.second_order)
        assert (value == "recompute") <= (new["weights.D"] == "device")
    if key.startswith("update"):
        assert (old[key], value) == ("fused", "deferred")
    if key.startswith("state"):
        assert value == "host"
        assert new["fsdp"] == "none"


def flat(policy: MemoryPolicy) -> dict[str, object]:
    """By the names that the user reads."""
    values: dict[str, object] = {"ema": policy.ema, "fsdp": policy.fsdp, "precision": policy.precision}
    for name in ("D", "G"):
        values |= {f"{key}.{name}": value for key, value in vars(policy.phase(name)).items()}
        values |= {f"{key}.{name}": value for key, value in vars(policy.optimizer(name)).items()}
    return values
