"""Losses of a tiny run of all four phases with augmentation, step by step.

A change of these numbers is a change of what training computes: it needs a reason, in the commit that changes
golden/stylegan2_losses.json. To write them anew: LOWVRAM_WRITE_GOLDEN=1 pytest tests/test_golden.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram import Trainer

GOLDEN = Path(__file__).parent / "golden" / "stylegan2_losses.json"


def test_losses_are_the_golden_ones(tiny: Callable[..., object]) -> None:
    # A large eps: without it Adam's first steps are the signs of gradients, and rounding decides those near zero.
    settings = [
        "augment.pipeline=bgcfnc",
        "augment.p=0.5",
        "augment.mode=fixed",
        "optimizer.eps=0.01",
        "optimizer.lr=0.02",
    ]
    trainer = Trainer(tiny("kimg=0.08", *settings), quiet=True)
    losses = [result.losses for result in trainer]
    if os.environ.get("LOWVRAM_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 10
    for step, (got, wanted) in enumerate(zip(losses, golden, strict=True)):
        assert got == pytest.approx(wanted, rel=2e-3, abs=2e-4), f"step {step}"
