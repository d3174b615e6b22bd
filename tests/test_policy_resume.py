"""A checkpoint written under one policy goes on under any other, and its keys never change."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from seeds import SEEDS, for_one_of_the_seeds
from test_equivalence import CALM, REORDERED, largest_difference, weights
from tiny import TINY

from lowvram import Trainer, checkpoint, load_recipe

Make = Callable[..., object]

POLICIES = {
    "plain": (),
    "deferred, streamed": (
        "memory.weights.G=stream",
        "memory.update.G=deferred",
        "memory.weights.D=stream",
        "memory.update.D=deferred",
        "memory.state.D=host",
    ),
    "sharded": ("memory.fsdp=offload",),
    "fused": ("memory.update.G=fused", "memory.ema=host"),
    "recomputed": ("memory.activations.G=recompute", "memory.activations.R1=offload", "memory.state.G=host"),
}
EXACT = {"plain", "deferred, streamed", "recomputed", "fused"}


def saved(run: Path) -> dict[str, object]:
    """File and key of every tensor in the newest checkpoint, but for the generators' states."""
    folder = checkpoint.latest_good(run / "checkpoints")
    assert folder is not None
    files = sorted(f for f in folder.glob("*.safetensors") if not f.stem.startswith("rng"))
    return {f"{file.stem}.{key}": tensor for file in files for key, tensor in load_file(file).items()}


def train_to(recipe: object) -> Trainer:
    trainer = Trainer(recipe, quiet=True)
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, object]]:
    """The checkpoint of a run that was not interrupted, by seed."""

    @cache
    def make(seed: int) -> dict[str, object]:
        out = tmp_path_factory.mktemp("whole") / "run"
        train_to(load_recipe("faces32", [*TINY, f"out={out}", "kimg=0.064", *CALM, f"seed={seed}"]))
        return saved(out)

    return make


# From and to the plain run, and once round the others.
PAIRS = [
    *((name, "plain") for name in POLICIES if name != "plain"),
    *(("plain", name) for name in POLICIES if name != "plain"),
    *(
        pytest.param(*names, marks=pytest.mark.slow)
        for names in (
            ("deferred, streamed", "sharded"),
            ("sharded", "fused"),
            ("fused", "recomputed"),
            ("recomputed", "deferred, streamed"),
        )
    ),
    ("sharded", "sharded"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_run_goes_on_under_another_policy(
    first: str, second: str, tiny: Make, tmp_path: Path, whole: Callable[[int], dict[str, object]]
) -> None:
    exact = {first, second} <= EXACT

    def check(seed: int) -> None:
        out = tmp_path / f"run{seed}"
        calm = (*CALM, f"seed={seed}", f"out={out}")
        train_to(tiny("kimg=0.032", *calm, *POLICIES[first]))
        keys = saved(out).keys()
        undo = [*_defaults(POLICIES[first]), *POLICIES[second]]
        train_to(tiny("kimg=0.064", "resume=auto", *calm, *undo))
        both = saved(out)
        assert keys == both.keys() == whole(seed).keys()
        assert largest_difference(both, whole(seed)) <= (1e-7 if exact else REORDERED)

    if exact:
        check(SEEDS[0])
    else:
        for_one_of_the_seeds(check)


def _defaults(overrides: tuple[str, ...]) -> list[str]:
    """The plain values of the settings that were named, so that the resumed run names all that differs."""
    plain = {"update": "after", "weights": "device", "state": "device", "activations": "keep", "fsdp": "none"}
    names = [override.split("=")[0] for override in overrides]
    return [f"{name}={plain.get(name.split('.')[1], 'device')}" for name in names]


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("adam", "adam8bit", "converted from adam to adam8bit"),
        pytest.param("adam8bit", "adam", "converted from adam8bit to adam", marks=pytest.mark.slow),
        pytest.param("adam", "lion8bit", "anew", marks=pytest.mark.slow),
        ("adam8bit", "adafactor", "adafactor"),
    ],
)
def test_another_optimizer_takes_what_it_can_and_says_so(
    first: str, second: str, says: str, tiny: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train_to(tiny("kimg=0.032", *CALM, f"memory.optimizer.D={first}"))
    trainer = Trainer(tiny("kimg=0.064", "resume=auto", *CALM, f"memory.optimizer.D={second}"))
    assert says in capsys.readouterr().out
    trainer.fit()
    assert all(t.isfinite().all() for t in weights(trainer).values())


def test_eight_bit_state_resumes_exactly(tiny: Make, tmp_path: Path) -> None:
    narrow = (*CALM, "memory.optimizer.G=adam8bit", "memory.optimizer.D=adam8bit")
    train_to(tiny("kimg=0.064", f"out={tmp_path / 'whole'}", *narrow))
    train_to(tiny("kimg=0.032", *narrow))
    train_to(tiny("kimg=0.064", "resume=auto", *narrow))
    assert largest_difference(saved(tmp_path / "run"), saved(tmp_path / "whole")) == 0
